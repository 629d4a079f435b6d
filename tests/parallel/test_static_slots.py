"""Static slots on one rank, in this process; tests/parallel/test_exactness.py compares them with FSDP2 on two ranks."""

import logging

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from ltx_titan.parallel import static_slots
from ltx_titan.parallel.fsdp import apply_fsdp, use_static_slots
from tests.processes import run_here


class Model(nn.Module):
    def __init__(self, widths=(8, 8, 8, 8, 8)) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(8, width), nn.Tanh(), nn.Linear(width, 8)) for width in widths
        )
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            nn.init.normal_(parameter, generator=generator)

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return x


def sharded(wanted, *widths):
    model = Model(*widths)
    apply_fsdp(model, model.blocks, init_device_mesh("cpu", (1,)), torch.bfloat16)
    return model, use_static_slots(model, model.blocks, wanted)


def loss_of(model):
    x = torch.linspace(-1, 1, 24).view(3, 8).bfloat16().requires_grad_()
    return model(x).float().square().mean()


def train_with_evaluation(wanted):
    """Losses of steps, between them that of a pass without a backward pass, which leaves the last block gathered."""
    model, _ = sharded(wanted)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    losses = []
    for _ in range(3):
        with torch.no_grad():
            losses.append(loss_of(model).item())
        loss = loss_of(model)
        # A second pass before the backward pass of the first one.
        other = loss_of(model)
        (loss + other).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_passes_may_come_in_any_order():
    found = []

    def work():
        found.extend(train_with_evaluation(wanted) for wanted in ("on", "off"))

    run_here(work)
    assert found[0] == found[1]
    assert len(set(found[0])) == 3


class BytesWritten(TorchDispatchMode):
    """Counts the bytes that FSDP2's reduction of gradients writes."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        output = kwargs["out"] if kwargs and "out" in kwargs else result
        is_copy = func is torch.ops.aten.copy_.default and args[0].data_ptr() != args[1].data_ptr()
        if is_copy or func in (torch.ops.fsdp.chunk_cat.default, torch.ops.aten.div.Tensor):
            # Weights are gathered in bfloat16.
            self.total += output.nbytes if output.dtype == torch.float32 else 0
        return result


# Without slots FSDP2 also copies what it would have reduced.
@pytest.mark.parametrize(("wanted", "bytes_written"), [("on", 4), ("off", 8)])
def test_one_rank_divides_no_gradients_and_sums_micro_batches(wanted, bytes_written):
    def work():
        plain = Model()
        model, _ = sharded(wanted)
        for steps in (1, 2):
            parameters = {name: p.detach().bfloat16().requires_grad_() for name, p in plain.named_parameters()}
            loss_of(lambda x, p=parameters: functional_call(plain, p, x)).backward()
            with BytesWritten() as written:
                loss_of(model).backward()
            assert written.total == bytes_written * sum(p.numel() for p in plain.parameters())
            for name, p in model.named_parameters():
                assert torch.equal(p.grad.to_local(), steps * parameters[name].grad.float()), name

    run_here(work)


def test_blocks_without_slots_say_why(monkeypatch, caplog):
    def work():
        with caplog.at_level(logging.INFO):
            assert not sharded("auto", (8, 4, 8))[1]
        assert "different shapes" in caplog.text
        with pytest.raises(ValueError, match="fsdp_static_slots = 'on': blocks have weights of different shapes"):
            sharded("on", (8, 4, 8))
        # Another version of torch.
        monkeypatch.setitem(static_slots.RELIED_ON, "group", ("unshard", "renamed"))
        with caplog.at_level(logging.INFO):
            assert not sharded("auto")[1]
        assert f"FSDP2 of torch {torch.__version__} has no FSDPParamGroup.renamed" in caplog.text

    run_here(work)
