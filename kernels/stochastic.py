"""Stochastic rounding to bfloat16: up or down at random, with the exact value as the mean.

bfloat16 is the upper half of float32: a random number below one unit of it is added, then the lower half is cut off.
Random numbers are a hash of a seed, a step and the element's number, so they repeat, and need no state.
"""

import triton
import triton.language as tl


@triton.jit
def _mix(x):
    """A 32-bit integer hash (lowbias32): each bit of the input changes half of the bits of the result."""
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def round_at_random(values, numbers, step, seed):
    """Float32 values that bfloat16 holds exactly, each the one below or above.

    Args:
        values: float32.
        numbers: of the elements, integers of the same shape.
        step, seed: integers below 2^31, of any type.
    """
    key = _mix(step.to(tl.uint32) ^ seed.to(tl.uint32))
    bits = values.to(tl.uint32, bitcast=True) + (_mix(numbers.to(tl.uint32) ^ key) >> 16)
    return (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
