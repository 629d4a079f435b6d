"""A small regression with the kinds of weights that optimizers treat differently."""

import torch
from torch import Tensor, nn

WIDTH = 128


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(WIDTH, WIDTH)
        self.down = nn.Linear(WIDTH, WIDTH, bias=False)
        self.scale_shift_table = nn.Parameter(torch.zeros(2, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        scale, shift = self.scale_shift_table
        return x + self.down(torch.tanh(self.up(x * (1 + scale) + shift)))


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.patchify_proj = nn.Linear(5, WIDTH)
        self.transformer_blocks = nn.ModuleList(Block() for _ in range(2))
        self.proj_out = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patchify_proj(x)
        for block in self.transformer_blocks:
            x = block(x)
        return self.proj_out(x)


def toy(seed: int = 0) -> Toy:
    torch.manual_seed(seed)
    return Toy()


def loss_of(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    dtype = next(model.parameters()).dtype
    x, y = (torch.randn(16, n, generator=generator).to(dtype) for n in (5, 5))
    return (model(x) - y).float().square().mean()
