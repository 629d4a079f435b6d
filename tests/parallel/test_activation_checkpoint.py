from contextlib import contextmanager

import pytest
import torch
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from ltx_titan.common.tensors import without_wrappers
from ltx_titan.model import LTXTransformer
from ltx_titan.parallel.activation_checkpoint import apply_full_checkpointing, apply_selective_checkpointing
from tests.golden_cases import Case, load_case
from tests.model.golden_transformer import build_inputs, build_transformer, weighted_sum

CASE, VIDEO_ALONE = load_case("av_22b"), load_case("video_only")
_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


class _EagerCounter(TorchDispatchMode):
    """Counts computed attentions; outputs that selective checkpointing has saved are not dispatched again."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is _ATTENTION
        return func(*args, **(kwargs or {}))


@contextmanager
def _profiled():
    """The same for compiled code, which does not run under a dispatch mode."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        profile.count = 0
        yield profile
    events = {event.key: event.count for event in profile.key_averages()}
    profile.count = events.get(_ATTENTION.name(), 0)


def _step(model: LTXTransformer, counter=None, case: Case = CASE) -> tuple[dict[str, torch.Tensor], int]:
    """Gradients of one step, and how often attention ran in its forward and backward pass."""
    video, audio, _ = build_inputs(case, "base")
    with counter or _EagerCounter() as counting:
        weighted_sum(case, "base", *model(video, audio)).backward()
    named = {without_wrappers(n): p.grad for n, p in model.named_parameters()}
    return named, getattr(counting, "count", 0)


def _checkpoint(model: LTXTransformer, mode: str) -> None:
    if mode == "selective":
        apply_selective_checkpointing(model.transformer_blocks)
    elif mode != "none":
        step = 2 if mode == "every_k" else 1
        apply_full_checkpointing(model.transformer_blocks, range(0, len(model.transformer_blocks), step))


@pytest.mark.parametrize(("mode", "runs"), [("full", 24), ("every_k", 18), ("selective", 12)])
def test_attention_is_recomputed_or_saved_by_mode_with_the_same_gradients(mode, runs):
    expected, once = _step(build_transformer(CASE))
    assert once == 12
    model = build_transformer(CASE)
    names = list(model.state_dict())
    _checkpoint(model, mode)
    assert list(model.state_dict()) == names
    gradients, count = _step(model)
    assert count == runs
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-5)


def test_compiled_blocks_keep_their_attention_and_share_one_graph():
    """Without audio, which would take three times as long to compile."""
    torch.compiler.reset()
    counters.clear()
    expected, once = _step(build_transformer(VIDEO_ALONE), case=VIDEO_ALONE)
    model = build_transformer(VIDEO_ALONE)
    _checkpoint(model, "selective")
    for block in model.transformer_blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    _step(model, _profiled(), VIDEO_ALONE)
    model.zero_grad()
    assert counters["stats"]["unique_graphs"] == 1
    gradients, count = _step(model, _profiled(), VIDEO_ALONE)
    assert count == once
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-5)


class _MatmulCounter(_EagerCounter):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten.addmm.default, torch.ops.aten.mm.default)
        return func(*args, **(kwargs or {}))


def test_each_level_recomputes_fewer_matmuls_with_the_same_gradients():
    expected, once = _step(build_transformer(CASE), _MatmulCounter())
    counts = []
    for levels in (("full", "full"), ("full", "selective"), ("selective", "matmuls"), ("all_matmuls", "none")):
        model = build_transformer(CASE)
        apply_selective_checkpointing(model.transformer_blocks, levels)
        apply_full_checkpointing(model.transformer_blocks, [n for n, level in enumerate(levels) if level == "full"])
        gradients, count = _step(model, _MatmulCounter())
        counts.append(count)
        for name, gradient in expected.items():
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-5)
    assert counts == sorted(counts, reverse=True)
    assert len(set(counts)) == len(counts)
    assert counts[-1] == once


def test_selective_computes_the_second_matmul_of_the_feed_forward_once():
    def matmuls(mode):
        model = build_transformer(CASE)
        _checkpoint(model, mode)
        shapes = []

        class Watch(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                if func is torch.ops.aten.addmm.default:
                    shapes.append(tuple(args[2].shape))
                return func(*args, **(kwargs or {}))

        _step(model, Watch())
        return shapes.count((256, 64)), shapes.count((64, 256))

    second, first = matmuls("none")
    assert matmuls("full") == (second + 2, first + 2)
    assert matmuls("selective") == (second, first + 2)
