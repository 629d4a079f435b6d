"""Peer memory and the exchange of gradients on gloo ranks, with mapped files; test_exactness.py trains with both."""

import logging

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from ltx_titan.parallel import peer_memory
from ltx_titan.parallel.fsdp import apply_fsdp, use_static_slots
from ltx_titan.parallel.gradient_exchange import GradientExchange
from tests.parallel.test_static_slots import Model, loss_of
from tests.processes import run_here, run_ranks

CPU = torch.device("cpu")


def exchange(by_copy_engines):
    """Sums of three reductions of different sizes, one after the other."""
    group, ranks = dist.group.WORLD, dist.get_world_size()
    reduction = GradientExchange(4 * ranks, torch.bfloat16, by_copy_engines=by_copy_engines)
    reduction.share(group, CPU)
    sums = []
    for step, size in enumerate((4, 2, 4)):
        # 1 and 2^-9 need more digits than bfloat16 has.
        values = torch.arange(ranks * size).float() + (1 if dist.get_rank() else 2**-9) + step
        reduction.begin(torch.cpu.current_stream())
        gradients = reduction.allocate((ranks * size,), dtype=torch.float32, device=CPU)
        gradients.copy_(values)
        output = reduction.allocate((size,), dtype=torch.float32, device=CPU)
        reduction(output, gradients, group, dist.ReduceOp.SUM)
        sums.append(output)
    return sums


def reduce():
    """The same by a reduce-scatter of what was rounded to bfloat16."""
    ranks, sums = dist.get_world_size(), []
    for step, size in enumerate((4, 2, 4)):
        values = torch.arange(ranks * size).float() + (1 if dist.get_rank() else 2**-9) + step
        sums.append(torch.empty(size))
        dist.reduce_scatter_tensor(sums[-1], values.bfloat16().float())
    return sums


def all_sums():
    return reduce(), exchange(by_copy_engines=False), exchange(by_copy_engines=True)


def test_exchanged_gradients_are_added_in_float32():
    for expected, exchanged, by_peers in run_ranks(all_sums, 3):
        torch.testing.assert_close(exchanged, expected, rtol=0, atol=0)
        torch.testing.assert_close(by_peers, expected, rtol=0, atol=0)


def share_and_drop():
    shared = peer_memory.allocate(5, torch.bfloat16, dist.group.WORLD, CPU)
    peers, held = shared.peers, peer_memory.held_bytes()
    del shared
    return peers, (held, peer_memory.held_bytes())


def test_no_two_ranks_read_from_the_same_rank_at_a_time_and_memory_is_counted_while_it_lives():
    peers, held = zip(*run_ranks(share_and_drop, 3), strict=True)
    assert [sorted(turn) for turn in zip(*peers, strict=True)] == [[0, 1, 2], [0, 1, 2]]
    assert held == ((10, 0),) * 3


def gradients_with_a_frozen_block(wanted):
    model = Model()
    model.blocks[0][0].requires_grad_(False)
    apply_fsdp(model, model.blocks, init_device_mesh("cpu", (2,)), torch.bfloat16)
    assert use_static_slots(model, model.blocks, "on", copy_engines=wanted, exchange_gradients=wanted)
    for scale in (1, 2):
        loss_of(model).mul(scale + dist.get_rank()).backward()
    return {name: p.grad.full_tensor() for name, p in model.named_parameters() if p.grad is not None}


def both_gradients():
    return gradients_with_a_frozen_block("off"), gradients_with_a_frozen_block("on")


def test_blocks_may_differ_in_what_is_frozen():
    for plain, exchanged in run_ranks(both_gradients, 2):
        assert plain.keys() == exchanged.keys()
        assert "blocks.0.0.weight" not in plain
        assert all(torch.equal(exchanged[name], gradient) for name, gradient in plain.items())


def test_ranks_without_peers_say_why(caplog):
    def work():
        model = Model()
        apply_fsdp(model, model.blocks, init_device_mesh("cpu", (1,)), torch.bfloat16)
        with pytest.raises(ValueError, match="fsdp_copy_engines = 'on': one rank has nothing to gather"):
            use_static_slots(model, model.blocks, "auto", copy_engines="on")
        with pytest.raises(ValueError, match="fsdp_exchange_gradients = 'on': one rank has all gradients"):
            use_static_slots(model, model.blocks, "auto", exchange_gradients="on")
        with pytest.raises(ValueError, match="fsdp_exchange_gradients = 'on': parallelism"):
            use_static_slots(model, model.blocks, "off", exchange_gradients="on")
        with caplog.at_level(logging.INFO):
            assert use_static_slots(model, model.blocks, "auto", copy_engines="auto", exchange_gradients="auto")
        assert "take turns in 2 static slots" in caplog.text
        # One rank gathers nothing, which needs no explanation.
        assert "NCCL" not in caplog.text
        assert "exchanged" not in caplog.text

    run_here(work)
