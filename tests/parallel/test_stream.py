"""Streamed weights against resident ones: equal bit for bit, whenever the copies happen."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch._dynamo.utils import counters

from ltx_titan.config import LoRASection
from ltx_titan.lora.linear import LoRALinear
from ltx_titan.parallel.activation_checkpoint import Level, apply_full_checkpointing, apply_selective_checkpointing
from ltx_titan.parallel.stream import StreamedBlock, WeightStream
from ltx_titan.weights import QuantizedLinear, module_tensors
from tests.jobs import read_run, train, write_job

BLOCKS, WIDTH = 5, 16


class Block(nn.Module):
    """Two streams, adapted and plain frozen layers, and a frozen table, like a transformer's block."""

    def __init__(self, base: str) -> None:
        super().__init__()
        layers = [nn.Linear(WIDTH, WIDTH, dtype=torch.bfloat16) for _ in range(3)]
        if base != "bfloat16":
            layers = [QuantizedLinear.from_linear(layer, base) for layer in layers]
        self.video, self.audio = (LoRALinear(layer, LoRASection(rank=2)) for layer in layers[:2])
        self.cross = layers[2].requires_grad_(False)
        self.table = nn.Parameter(torch.randn(WIDTH, dtype=torch.bfloat16), requires_grad=False)
        for layer in (self.video, self.audio):
            layer.base.requires_grad_(False)
            nn.init.normal_(layer.lora_A.weight)
            nn.init.normal_(layer.lora_B.weight, std=0.1)

    def forward(self, video: Tensor, audio: Tensor, has_video: bool) -> tuple[Tensor, Tensor]:
        audio = audio + torch.tanh(self.audio(audio * self.table) + self.cross(video))
        return video + torch.tanh(self.video(video)) * self.table if has_video else video, audio


class Model(nn.Module):
    def __init__(self, base: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.transformer_blocks = nn.ModuleList(Block(base) for _ in range(BLOCKS))

    def forward(self, x: Tensor, has_video: bool = True) -> Tensor:
        video = audio = x
        for block in self.transformer_blocks:
            video, audio = block(video, audio, has_video)
        return torch.cat((video, audio)).float()


class LatestCopies:
    """The worst timing that events allow: a slot is overwritten as soon as a copy starts, and is valid once waited for.

    Attributes:
        log: the blocks that were copied, in order.
    """

    def __init__(self, hosts: list[Tensor]) -> None:
        self.hosts = hosts
        self.log: list[int] = []

    def start(self, slot: Tensor, host: Tensor) -> Callable[[], None]:
        slot.fill_(255)  # NaN as bfloat16
        self.log.append(next(number for number, own in enumerate(self.hosts) if own is host))
        return lambda: slot.copy_(host)


def build(base: str, levels: list[Level], slots: int, backend: str | None = None) -> tuple[Model, list[int]]:
    """A model, streamed if there are slots, and the log of its copies."""
    model = Model(base)
    blocks = model.transformer_blocks
    apply_selective_checkpointing(blocks, levels)
    if backend is not None:
        for block in blocks:
            block.compile(fullgraph=True, dynamic=False, backend=backend)
    apply_full_checkpointing(blocks, [number for number, level in enumerate(levels) if level == "full"])
    if slots == 0:
        return model, []
    values = {name: tensor.clone() for name, tensor in module_tensors(model).items()}
    stream = WeightStream(blocks, slots)
    stream.allocate(torch.device("cpu"))
    for name, tensor in module_tensors(model).items():
        tensor.copy_(values[name])
    copies = LatestCopies(stream._hosts)
    stream.start(torch.device("cpu"), copies)
    return model, copies.log


def inputs(number: int) -> Tensor:
    return torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(number)).bfloat16()


def trained_by(model: Model) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def train_steps(model: Model, steps: int = 3) -> list[Tensor]:
    """Losses, gradients and predictions of steps of three micro-batches, with sampling in between."""
    trained = trained_by(model)
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    seen = []
    for step in range(steps):
        for number in range(3):
            # The second micro-batch has a stream that passes through all blocks.
            loss = model(inputs(10 * step + number), has_video=number != 1).square().mean()
            loss.backward()
            seen.append(loss.detach())
        seen += [p.grad.clone() for p in trained]
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad() if step % 2 else torch.inference_mode():
            seen += [model(inputs(100 + number)).clone() for number in range(2)]
    return seen


def equal(found: list[Tensor], expected: list[Tensor]) -> bool:
    assert all(tensor.isfinite().all() for tensor in expected)
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


MODES: dict[str, list[Level]] = {
    "none": ["none"] * BLOCKS,
    "full": ["full"] * BLOCKS,
    "selective": ["selective"] * BLOCKS,
    "budget": ["full", "full", "selective", "selective", "selective"],
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("base", "slots"), [("bfloat16", 2), ("bfloat16", 4), ("int4", 3), ("float8", 1)])
def test_a_streamed_base_gives_every_bit_of_a_resident_one(mode, base, slots):
    expected = train_steps(build(base, MODES[mode], 0)[0])
    assert equal(train_steps(build(base, MODES[mode], slots)[0]), expected)


@pytest.mark.parametrize("slots", [2, 3])
def test_blocks_are_copied_ahead_and_no_more_often_than_needed(slots, monkeypatch):
    model, log = build("bfloat16", MODES["full"], slots)
    train_steps(model, 1)
    late = []
    for before in ("before_forward", "before_backward"):
        original = getattr(WeightStream, before)

        def check(stream: WeightStream, number: int, original: Callable = original) -> None:
            late.append(stream._held[number % slots] != number)
            original(stream, number)

        monkeypatch.setattr(WeightStream, before, check)
    streamed = BLOCKS - slots
    log.clear()
    model(inputs(0)).mean().backward()
    assert log == [*range(slots, BLOCKS), *reversed(range(streamed))]
    log.clear()
    with torch.no_grad():
        model(inputs(0))
    # The forward pass wraps around, to the blocks that the next one starts with.
    assert sorted(log) == sorted([*range(slots, BLOCKS), *range(min(slots, streamed))])
    assert len(late) >= 3 * BLOCKS
    assert not any(late)


def test_streamed_blocks_share_their_compiled_code():
    torch.compiler.reset()
    counters.clear()
    model, _ = build("bfloat16", MODES["selective"], 2, "aot_eager")
    resident, _ = build("bfloat16", MODES["none"], 0)
    for number in range(2):
        for each in (model, resident):
            each(inputs(number)).mean().backward()
    # One for the first block, whose input needs no gradient, and one for all others.
    assert counters["stats"]["unique_graphs"] == 2
    assert equal([p.grad for p in trained_by(model)], [p.grad for p in trained_by(resident)])


def test_settled_slots_wait_for_nothing():
    model, log = build("bfloat16", MODES["full"], 2)
    stream = next(block.stream for block in model.modules() if isinstance(block, StreamedBlock))
    model(inputs(0))  # without a backward pass, as a skipped step
    stream.settle()
    assert (stream._held, stream._waits) == ([0, 1], {})
    log.clear()
    model(inputs(0)).mean().backward()
    # As it began: a recorded graph of the step may be replayed any number of times.
    assert (stream._held, stream._waits) == ([0, 1], {})


@pytest.mark.parametrize("base", ["bfloat16", "int4"])
def test_saved_weights_are_the_blocks_own_and_names_stay(base):
    expected = module_tensors(build(base, MODES["none"], 0)[0])
    model, _ = build(base, MODES["full"], 2)
    model(inputs(0))
    found = module_tensors(model)
    assert list(found) == list(expected)
    assert all(torch.equal(found[name].view(torch.uint8), expected[name].view(torch.uint8)) for name in found)


def test_a_streamed_job_trains_resumes_and_exports_as_a_resident_one(tmp_path, nano_path, data_root):
    lora = {"mode": "lora", "rank": 4, "targets": ["attn1.to_q", "ff.net.2"], "base_dtype": "int8"}
    common = {f"{'model' if key == 'mode' else 'lora'}__{key}": value for key, value in lora.items()}
    common |= {"training__dtype": "bfloat16", "training__steps": 2}
    resident = write_job(tmp_path / "resident", nano_path, data_root, **common)
    job = write_job(tmp_path / "streamed", nano_path, data_root, **common, parallelism__stream_blocks=1)
    train(resident)
    train(job, 1, "--training.stop_at=1")
    train(job)
    assert [line["loss"] for line in read_run(job)] == [line["loss"] for line in read_run(resident)]
    found, expected = exported(job), exported(resident)
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in found)


def exported(job: Path) -> dict[str, Tensor]:
    return load_file(job.parent / "run" / "export" / "lora-step-2.safetensors")
