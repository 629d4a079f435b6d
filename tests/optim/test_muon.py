import pytest
import torch

from ltx_titan.optim.muon import Muon, newton_schulz


@pytest.mark.parametrize("shape", [(24, 24), (8, 40), (40, 8)])
def test_it_is_torchs_muon(shape):
    def weight():
        return torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)))

    one, two = weight(), weight()
    theirs = torch.optim.Muon([one], lr=0.02, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw")
    ours = Muon([two], lr=0.02, weight_decay=0.1, momentum=0.9)
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        gradient = torch.randn(shape, generator=generator)
        one.grad, two.grad = gradient.clone(), gradient.clone()
        theirs.step()
        ours.step()
    # Both orthogonalize in bfloat16, not in the same order of operations: a few of its roundings of one update.
    assert (one - two).abs().max() < 4 * 2**-8 * 0.02 * 0.2 * max(shape) ** 0.5 * 3


def test_newton_schulz_brings_singular_values_near_one_and_keeps_the_directions():
    matrix = torch.randn(48, 16, generator=torch.Generator().manual_seed(0))
    found = newton_schulz(matrix).float()
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.6
    assert values.max() < 1.3
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    assert torch.nn.functional.cosine_similarity(found.flatten(), (u @ v).flatten(), dim=0) > 0.97
