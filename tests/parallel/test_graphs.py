"""Graphed micro-steps against eager ones, with recordings simulated on a CPU.

`SimulatedRecorder` behaves as CUDA graphs do: recording computes nothing (what it wrote becomes NaN), a replay writes
the same tensors again, whatever Python has made of them since, and only tensors that were inputs then are read.
"""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn

from ltx_titan.config import Degrees, JobConfig
from ltx_titan.parallel import graphs
from ltx_titan.parallel.graphs import GraphedMicroStep, flatten, obstacle, unflatten


@dataclass(frozen=True)
class Inputs:
    x: Tensor
    mask: Tensor | None = None
    parts: tuple[Tensor, ...] = ()
    scale: float = 1.0


class Model(nn.Module):
    """Two layers; the second is used only where a mask is given, so that not every micro-step has its gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 1)
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            nn.init.normal_(parameter, generator=generator)

    def step(self, inputs: Inputs) -> tuple[Tensor, None]:
        hidden = self.first(inputs.x) * inputs.scale
        if inputs.mask is not None:
            hidden = self.second(hidden) * inputs.mask
        for part in inputs.parts:
            hidden = hidden + part.mean()
        loss = hidden.square().mean()
        loss.backward()
        return loss.detach(), None


class SimulatedRecorder:
    """CUDA graphs, as far as a caller can tell."""

    def __init__(self, parameters) -> None:
        self.parameters = list(parameters)
        self.eager = self.recorded = self.dropped = 0

    def run(self, function):
        self.eager += 1
        return function()

    def record(self, function):
        self.recorded += 1
        before = [None if p.grad is None else p.grad.clone() for p in self.parameters]
        targets = [p.grad for p in self.parameters]
        result = function()
        written = [p.grad for p in self.parameters]
        for old, target, new in zip(before, targets, written, strict=True):
            if target is not None:
                assert new is target, "an accumulated gradient has moved"
                target.copy_(old)
            elif new is not None:
                new.fill_(torch.nan)
        result[0].fill_(torch.nan)

        def replay() -> None:
            kept = [p.grad for p in self.parameters]
            for p, target in zip(self.parameters, targets, strict=True):
                p.grad = target
            again = function()
            for p, new in zip(self.parameters, written, strict=True):
                if new is not None and p.grad is not new:
                    new.copy_(p.grad)
            result[0].copy_(again[0])
            for p, old in zip(self.parameters, kept, strict=True):
                p.grad = old

        return result, replay

    def drop(self) -> None:
        self.dropped += 1


def batches(seed: int) -> list[Inputs]:
    """Micro-batches of three signatures."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return [
        Inputs(draw(2, 4), draw(2, 1)),
        Inputs(draw(3, 4), draw(3, 1), parts=(draw(2), draw(5))),
        Inputs(draw(2, 4)),
    ]


def steps(micro_step, parameters, order: list[list[int]]) -> list[list[Tensor | None]]:
    """Losses and gradients of steps whose micro-batches have the signatures in `order`."""
    seen = []
    for number, signatures in enumerate(order):
        losses = [micro_step(batches(10 * number + place)[s])[0].clone() for place, s in enumerate(signatures)]
        seen.append(losses + [None if p.grad is None else p.grad.clone() for p in parameters])
        for parameter in parameters:
            parameter.grad = None
    return seen


ORDERS = {
    "one shape": [[0]] * 6,
    "accumulation": [[0, 0, 0]] * 4,
    "shapes that accumulate": [[0, 1], [1, 0], [0, 1, 2], [2, 1, 0], [2, 2], [1, 2], [0, 1, 2]],
    "a gradient that not every step has": [[2]] * 4 + [[0]] * 4 + [[2], [0], [2]],
    "a new shape after recordings": [[0]] * 4 + [[0, 1]] * 3 + [[1, 0]] * 3,
}


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_replays_equal_eager_steps(order):
    expected_model, model = Model(), Model()
    recorder = SimulatedRecorder(model.parameters())
    graphed = GraphedMicroStep(model.step, model.parameters(), recorder)
    expected = steps(expected_model.step, list(expected_model.parameters()), order)
    found = steps(graphed, list(model.parameters()), order)
    assert recorder.recorded > 0
    for number, (one, other) in enumerate(zip(expected, found, strict=True)):
        for a, b in zip(one, other, strict=True):
            assert (a is None) == (b is None), f"step {number}"
            if a is not None:
                torch.testing.assert_close(b, a, rtol=1e-6, atol=1e-6, msg=lambda m, n=number: f"step {n}: {m}")


def test_dropped_graphs_are_warmed_up_and_recorded_again():
    expected_model, model = Model(), Model()
    recorder = SimulatedRecorder(model.parameters())
    graphed = GraphedMicroStep(model.step, model.parameters(), recorder)
    order = [[0, 0]] * 3
    first = steps(graphed, list(model.parameters()), order)
    eager, recorded = recorder.eager, recorder.recorded
    graphed.drop()
    again = steps(graphed, list(model.parameters()), order)
    assert (recorder.eager, recorder.recorded, recorder.dropped) == (2 * eager, 2 * recorded, 1)
    torch.testing.assert_close(again, first)
    torch.testing.assert_close(first, steps(expected_model.step, list(expected_model.parameters()), order))


def test_more_shapes_than_the_limit_run_eagerly_and_say_so(monkeypatch, caplog):
    monkeypatch.setattr(graphs, "_LIMIT", 2)
    model = Model()
    recorder = SimulatedRecorder(model.parameters())
    graphed = GraphedMicroStep(model.step, model.parameters(), recorder)
    order = [[2], [0], [1]] * 5
    expected_model = Model()
    expected = steps(expected_model.step, list(expected_model.parameters()), order)
    torch.testing.assert_close(steps(graphed, list(model.parameters()), order), expected)
    assert recorder.recorded == 2
    assert caplog.text.count("more than 2 different shapes") == 1


def test_a_value_that_is_no_tensor_belongs_to_the_signature():
    model = Model()
    graphed = GraphedMicroStep(model.step, model.parameters(), SimulatedRecorder(model.parameters()))
    one = batches(0)[0]
    for _ in range(4):
        expected = graphed(one)[0].clone()
    other = graphed(replace(one, scale=2.0))[0]
    assert expected.isfinite()
    assert not torch.equal(other, expected)


def test_inputs_are_taken_apart_and_put_together():
    inputs = Inputs(torch.zeros(2), None, (torch.ones(1), torch.ones(3)), 0.5)
    tensors, key = flatten(inputs)
    assert [t.shape[0] for t in tensors] == [2, 1, 3]
    assert key == flatten(replace(inputs, x=torch.ones(2)))[1]
    assert key != flatten(replace(inputs, mask=torch.ones(2)))[1]
    copy = unflatten(inputs, iter([t + 1 for t in tensors]))
    assert copy.mask is None
    assert copy.scale == 0.5
    assert torch.equal(copy.parts[1], torch.full((3,), 2.0))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"parallelism": {"cpu_offload": True}}, "cpu_offload"),
        ({"activation_checkpoint": {"mode": "full", "offload": True}}, "activation_checkpoint.offload"),
        ({"optimizer": {"in_backward": True}, "training": {"max_grad_norm": 0.0}}, "in_backward"),
        ({"optimizer": {"in_backward": True, "name": "adafactor"}, "training": {"max_grad_norm": 0.0}}, None),
    ],
)
def test_jobs_that_cannot_be_recorded_say_why(changes, reason):
    job = JobConfig.model_construct(
        **{name: JobConfig.model_fields[name].annotation(**values) for name, values in changes.items()}
    )
    found = obstacle(job, Degrees(), torch.device("cuda"))
    assert found is None if reason is None else reason in found
    assert "found cpu" in obstacle(job, Degrees(), torch.device("cpu"))
