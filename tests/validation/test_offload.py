import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from ltx_titan.validation import offloaded


def stepped(device):
    parameter = torch.nn.Parameter(torch.randn(64, 64, device=device))
    optimizer = torch.optim.AdamW([parameter], lr=1e-3)
    parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return parameter, optimizer


def test_state_that_is_on_the_host_stays_where_it_is():
    parameter, optimizer = stepped("cpu")
    state = dict(optimizer.state[parameter])
    with offloaded(optimizer):
        assert all(optimizer.state[parameter][name] is value for name, value in state.items())


@pytest.mark.gpu
def test_state_leaves_the_device_and_comes_back_unchanged():
    parameter, optimizer = stepped("cuda")
    before = {name: (value.device, value.cpu().clone()) for name, value in optimizer.state[parameter].items()}
    taken = torch.cuda.memory_allocated()
    with offloaded(optimizer):
        assert all(value.device.type == "cpu" for value in optimizer.state[parameter].values())
        assert torch.cuda.memory_allocated() <= taken - 2 * parameter.numel() * 4
    for name, value in optimizer.state[parameter].items():
        device, expected = before[name]
        assert value.device == device
        assert torch.equal(value.cpu(), expected)
    optimizer.step()


@pytest.mark.gpu
def test_sharded_state_comes_back_sharded(tmp_path):
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cuda", (1,))
        parameter = torch.nn.Parameter(distribute_tensor(torch.randn(64, 64, device="cuda"), mesh, [Shard(0)]))
        optimizer = torch.optim.AdamW([parameter], lr=1e-3)
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        before = {name: optimizer.state[parameter][name].full_tensor() for name in ("exp_avg", "exp_avg_sq")}
        with offloaded(optimizer):
            assert all(value.device.type == "cpu" for value in optimizer.state[parameter].values())
        for name, expected in before.items():
            value = optimizer.state[parameter][name]
            assert isinstance(value, DTensor)
            assert value.placements == (Shard(0),)
            assert torch.equal(value.full_tensor(), expected)
        optimizer.step()
    finally:
        dist.destroy_process_group()
