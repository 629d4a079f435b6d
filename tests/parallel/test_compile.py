"""Compiled blocks: one graph for each shape of a batch, and limits that all shapes of a job fit in."""

import re
import signal
from functools import partialmethod
from pathlib import Path

import pytest
import torch
import torch._dynamo
from torch._dynamo.utils import counters
from torch._inductor.async_compile import AsyncCompile

from ltx_titan.conditioning import FlexibleStrategy
from ltx_titan.diffusion import UniformSigma, draw_step
from ltx_titan.lora import apply_lora, init_lora_
from ltx_titan.model import LTXTransformer
from ltx_titan.model.init import init_random_
from ltx_titan.parallel import parallelize
from ltx_titan.parallel.stop import STOP_SIGNALS
from tests.lora.adapted import settings, stir
from tests.parallel.harness import SCENARIOS, batch_of, model_config


@pytest.fixture
def eager_backend(monkeypatch):
    """Dynamo without Inductor, which takes minutes; limits and guards are Dynamo's."""
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend="eager"))
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(recompile_limit=1, accumulated_recompile_limit=1):
        yield
    torch._dynamo.reset()


def adapted_video_model() -> LTXTransformer:
    model = LTXTransformer.from_config(model_config(), "video")
    init_random_(model, 0)
    apply_lora(model, settings())
    init_lora_(model, seed=1)
    stir(model)
    return model


def gradients(model: LTXTransformer, frames: int) -> dict[str, torch.Tensor]:
    strategy = FlexibleStrategy.from_config({"name": "flexible", "video": SCENARIOS["joint"]["video"], "audio": None})
    batch = batch_of("joint", slice(0, 1))
    batch["video_latents"]["latents"] = batch["video_latents"]["latents"][:, :, :frames]
    draws = draw_step(*strategy.draw_plan(batch), sampler=UniformSigma(0.2, 0.8), seed=0, step=1, indices=[0])
    inputs = strategy.prepare(batch, draws)
    model.zero_grad()
    video, _ = model(inputs.video, None, None)
    strategy.loss(video, None, inputs).total.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_with_a_frozen_base_every_shape_has_one_graph_and_the_limit_holds_all(eager_backend, monkeypatch):
    expected = [gradients(adapted_video_model(), frames) for frames in (1, 2)]
    model = adapted_video_model()
    monkeypatch.setattr(parallelize, "_OTHER_GRAPHS", 0)
    parallelize.apply_compile(model.transformer_blocks)
    parallelize.give_gradient_to_block_inputs(model)
    parallelize.allow_graphs(1)
    for frames, wanted in zip((1, 2), expected, strict=True):
        torch.testing.assert_close(gradients(model, frames), wanted)
    assert counters["stats"]["unique_graphs"] == 2
    # One graph was allowed and one added: what a job without a plan would meet at its next shape.
    with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
        gradients(model, 3)
    parallelize.allow_graphs(1)
    assert gradients(model, 3).keys() == expected[0].keys()


def test_processes_that_compile_ignore_stop_signals(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    handlers = [signal.getsignal(number) for number in STOP_SIGNALS]
    AsyncCompile.process_pool.cache_clear()
    parallelize.start_compile_workers()
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == handlers
    pool = AsyncCompile.process_pool()
    try:
        status = Path(f"/proc/{pool.process.pid}/status").read_text()
        ignored = int(re.search(r"SigIgn:\s*(\w+)", status).group(1), 16)
        assert all(ignored >> (number - 1) & 1 for number in STOP_SIGNALS)
    finally:
        pool.process.kill()
        pool.shutdown()
        AsyncCompile.process_pool.cache_clear()
