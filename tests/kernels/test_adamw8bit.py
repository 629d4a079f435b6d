"""The kernel's update with moments of 8 bits is torchao's over many steps, whatever the weights' addresses."""

import math
from pathlib import Path

import pytest
import torch
from torchao.optim.quant_utils import quantize_8bit_with_qmap
from torchao.optim.subclass_8bit import OptimState8bit

from ltx_titan.benchmarks.adamw import Shards, assert_kernels, launch_as, shard_shapes
from ltx_titan.optim import lowbit
from ltx_titan.optim.lowbit import LowBitAdamW
from ltx_titan_kernels import adamw, adamw8bit
from tests.kernels.comparison import DEVICE

pytestmark = pytest.mark.runs_on("gpu", "interpreter")

# Several chunks, with a rest; one block; none, as in a shard of fewer rows than ranks; float32 moments.
SHAPES = [(80, 128), (33, 256), (1, 4096), (0, 4096), (24,), (5, 3)]
STEPS = 12
JOB = Path(__file__).parents[2] / "docs/benchmarks/ltx23_full_step.toml"
LAUNCHES = [
    (4096, 1024, 8),
    (4096, 2048, 8),
    (4096, 1024, 4),
    (4096, 512, 4),
    (4096, 2048, 4),
    (16384, 2048, 8),
    (4096, 4096, 8),
]
OPTIONS = {"betas": (0.9, 0.999), "eps": 1e-8}


def weights(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(DEVICE, dtype)) for shape in SHAPES]


def groups_of(parameters):
    return [
        {"params": parameters[:2], "lr": 1e-3, "weight_decay": 0.1},
        {"params": parameters[2:], "lr": 2e-3, "weight_decay": 0.0},
    ]


def set_gradients(parameters, step, scale=1.0):
    """Views of one tensor, as FSDP2 makes them, at any address of 4 bytes; one is missing in the fourth step."""
    sizes = [parameter.numel() for parameter in parameters]
    generator = torch.Generator().manual_seed(step)
    values = (torch.randn(sum(sizes) + step % 2, generator=generator) * scale).to(DEVICE)[step % 2 :]
    for parameter, gradient in zip(parameters, values.split(sizes), strict=True):
        parameter.grad = gradient.view_as(parameter).to(parameter.dtype)
    if step == 3:
        parameters[0].grad = None


def take_turns(monkeypatch, kernels, count=STEPS, dtype=torch.float32, **options):
    """Two equal sets of weights: the first updated by torchao, the second by the kernels in the steps of `kernels`."""
    sets = [weights(dtype), weights(dtype)]
    optimizers = [LowBitAdamW(groups_of(one), bits=8, lr=0.0, weight_decay=0.0, **OPTIONS, **options) for one in sets]
    has_kernels = LowBitAdamW._has_kernels
    for step in range(count):
        scale, skip = (torch.tensor(value, device=DEVICE) for value in (3.0 if step % 2 else 1.0, float(step == 6)))
        for number, (parameters, optimizer) in enumerate(zip(sets, optimizers, strict=True)):
            is_taken = number == 1 and step in kernels
            monkeypatch.setattr(LowBitAdamW, "_has_kernels", has_kernels if is_taken else lambda *_: False)
            # Not finite in the step that is skipped.
            set_gradients(parameters, step, math.nan if step == 6 else float(scale))
            optimizer.grad_scale, optimizer.found_inf = scale, skip
            optimizer.step()
    return sets, optimizers


def assert_same(sets, optimizers, rtol):
    for shape, expected, found in zip(SHAPES, *sets, strict=True):
        torch.testing.assert_close(found, expected, rtol=rtol, atol=rtol, msg=f"{shape}")
        theirs, ours = (dict(o.state[p]) for o, p in zip(optimizers, (expected, found), strict=True))
        assert ours.keys() == theirs.keys()
        assert float(ours.pop("step")) == float(theirs.pop("step")), shape
        for name, value in ours.items():
            if name.endswith("codes"):
                # A moment in the middle between two values, which differs in its last bit.
                differ = (value.int() - theirs[name].int()).abs()
                assert differ.numel() == 0 or differ.max() <= 1, (shape, name)
                assert (differ > 0).sum() <= 0.002 * differ.numel(), (shape, name)
            else:
                torch.testing.assert_close(value, theirs[name], rtol=1e-4, atol=1e-9, msg=f"{shape} {name}")


def record_calls(monkeypatch, module):
    taken = []
    update = module.Updater.__call__

    def record(*arguments, **settings):
        taken.append(update(*arguments, **settings))
        return taken[-1]

    monkeypatch.setattr(module.Updater, "__call__", record)
    return taken


def test_it_is_torchaos_update(monkeypatch):
    coded, plain = record_calls(monkeypatch, adamw8bit), record_calls(monkeypatch, adamw)
    sets, optimizers = take_turns(monkeypatch, range(STEPS))
    # The first group has no weight with float32 moments.
    assert coded == [True] * 2 * STEPS
    assert plain == [True] * STEPS
    assert [int(optimizers[1].state[parameter]["step"]) for parameter in sets[1]] == [STEPS - 2] + [STEPS - 1] * 5
    assert_same(sets, optimizers, 2e-5)


def test_a_job_may_change_between_kernel_and_torchao_in_any_step(monkeypatch):
    coded = record_calls(monkeypatch, adamw8bit)
    found = take_turns(monkeypatch, range(1, STEPS, 2))
    assert coded == [True] * STEPS  # of two groups, in half of the steps
    assert_same(*found, 2e-5)


def test_a_gradient_that_is_not_a_number_spoils_its_block_as_in_torchao(monkeypatch):
    sets, optimizers = take_turns(monkeypatch, range(STEPS), count=1)
    for parameters, optimizer, is_ours in zip(sets, optimizers, (False, True), strict=True):
        if not is_ours:
            monkeypatch.setattr(lowbit, "runs_triton", lambda _: False)
        optimizer.grad_scale = None
        for step in (1, 2):
            set_gradients(parameters, step)
            if step == 1:
                parameters[0].grad[3, 5] = math.nan
            optimizer.step()
        monkeypatch.undo()
        assert torch.isnan(parameters[0]).sum() == 128
        assert torch.isnan(parameters[0][3]).all()


@pytest.mark.runs_on("gpu")  # the interpreter truncates to bfloat16
def test_bfloat16_weights_are_rounded_to_nearest(monkeypatch):
    assert_same(*take_turns(monkeypatch, range(STEPS), dtype=torch.bfloat16), 2**-7)


@pytest.mark.parametrize("bits", [8, 32])
def test_rounding_at_random_has_the_exact_value_as_its_mean_and_repeats(bits):
    def rounded(seed, number=0):
        parameters = [torch.nn.Parameter(torch.ones(64, 256, device=DEVICE, dtype=torch.bfloat16)) for _ in range(2)]
        options = {"lr": 1e-3, "weight_decay": 0.0, "stochastic_rounding": True, "seed": seed}
        optimizer = LowBitAdamW(parameters, bits=bits, **OPTIONS, **options)
        found = []
        for _ in range(2):
            for parameter in parameters:
                parameter.data.fill_(1.0)
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()
            found.append(parameters[number].float())
        return torch.stack(found)

    one = rounded(0)
    assert set(one.unique().tolist()) == {1 - 2**-8, 1.0}  # neighbors in bfloat16
    # Steps of 1e-3; of 16,384 roundings the mean is off by 2^-8 x 0.44 / 128.
    torch.testing.assert_close(one.mean((1, 2)), torch.full((2,), 1 - 1e-3, device=DEVICE), rtol=0, atol=6e-5)
    assert torch.equal(one, rounded(0))
    # Other seeds, other weights and other steps have other numbers.
    for other in (rounded(1)[0], rounded(0, 1)[0], one[1]):
        assert 0.5 < (one[0] == other).float().mean() < 0.75


@pytest.mark.parametrize("signed", [True, False])
def test_every_value_gets_torchaos_code(signed):
    levels = OptimState8bit.zeros((1, 128), signed, 128, DEVICE).qmap.cpu()
    middles, edges = (levels[1:] + levels[:-1]) / 2, 10.0 ** -torch.arange(8.0)
    values = [
        torch.zeros(1),
        torch.tensor([1e-38, 5e-8]),
        torch.rand(2000),
        torch.rand(2000) * 10 ** -(torch.rand(2000) * 8),
    ]
    for exact in (levels, middles, edges):
        values += [exact, torch.nextafter(exact, torch.tensor(9.0)), torch.nextafter(exact, torch.tensor(-9.0))]
    x = torch.cat(values)
    x = torch.cat([x, -x]).clamp(-1, 1) if signed else x.clamp(0, 1)
    # In each block a 1, so that values are not divided.
    x = torch.cat([torch.nn.functional.pad(part, (0, 127 - len(part)), value=0.5) for part in x.split(127)]).view(
        -1, 127
    )
    x = torch.cat([torch.ones(len(x), 1), x], 1).to(DEVICE)
    moments = [torch.zeros(x.shape, dtype=torch.uint8, device=DEVICE), torch.zeros(len(x), 1, device=DEVICE)]
    others = [torch.zeros_like(moment) for moment in moments]
    # Neither moment remembers anything: the first becomes the gradient, and the second its square.
    gradient = x if signed else x.sqrt()
    first, second = (OptimState8bit.zeros((1, 128), kind, 128, DEVICE).qmap for kind in (True, False))
    update = adamw8bit.Updater(first, second)
    state = [[tensor] for tensor in (*moments, *others)]
    settings = {"lr": 0.0, "betas": (0.0, 0.0), "eps": 1.0, "weight_decay": 0.0}
    assert update([torch.zeros_like(x)], [gradient], *state, [torch.zeros((), device=DEVICE)], **settings)
    codes, expected = (moments[0], x) if signed else (others[0], gradient * gradient)
    scale = expected.abs().amax(1, keepdim=True)
    assert torch.equal(codes, quantize_8bit_with_qmap(expected / scale, first if signed else second))


def test_what_the_kernels_do_not_take_is_updated_by_torchao(monkeypatch):
    """Codes of 4 bits, and weights that are not contiguous."""
    coded, plain = record_calls(monkeypatch, adamw8bit), record_calls(monkeypatch, adamw)
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(64, 128, generator=generator).to(DEVICE)
    for bits in (4, 8):
        both = []
        for has_triton in (True, False):
            monkeypatch.setattr(lowbit, "runs_triton", lambda _, has_triton=has_triton: has_triton)
            weight = torch.nn.Parameter(values.clone() if bits == 4 else values.repeat_interleave(2, 1)[:, ::2])
            optimizer = LowBitAdamW([weight], bits=bits, lr=1e-2, weight_decay=0.1, **OPTIONS)
            weight.grad = torch.ones_like(weight)
            optimizer.step()
            both.append(weight)
        assert torch.equal(*both)
    assert not any(coded + plain)


@pytest.mark.runs_on("gpu")
def test_it_takes_the_time_of_its_bytes_and_prints_it():
    """Shows several launches (`pytest -s`); a table, since time depends on what else the device does."""
    shapes = shard_shapes(JOB, ranks=4)
    shards = Shards(shapes, 4, DEVICE, "adamw8bit")
    assert_kernels(shards)
    moved = 16.125 * sum(parameter.numel() for _, parameter in shards.named)
    print()
    for chunk, block, warps in LAUNCHES:
        launch_as(shards, {"chunk": chunk, "block": block, "warps": warps})
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        for repeat in range(12):
            if repeat == 2:
                events[0].record()
            shards.optimizers.step()
        events[1].record()
        torch.cuda.synchronize()
        ms = events[0].elapsed_time(events[1]) / 10
        print(f"chunk {chunk:6} block {block:5} warps {warps}: {ms:7.3f} ms, {moved / ms / 1e9:.2f} TB/s")
