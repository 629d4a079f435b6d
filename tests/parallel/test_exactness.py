import pytest
import torch

from ltx_titan.parallel.mesh import Degrees
from tests.golden_cases import assert_close_to_max
from tests.parallel.harness import LR, STEPS, Case, records, selected, single

FSDP2, HSDP = Degrees(dp_shard=2), Degrees(dp_replicate=2, dp_shard=2)
TP2, TP4, CP2, TP2_CP2 = Degrees(tp=2), Degrees(tp=4), Degrees(cp=2), Degrees(tp=2, cp=2)
ALL = Degrees(dp_shard=2, cp=2, tp=2)

CASES = selected(
    [
        Case(FSDP2, "reference", ci=True),
        Case(TP2, "joint", ci=True),
        Case(CP2, "joint", ci=True),
    ]
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_training_equals_one_process(case):
    actual = records(case.world, tuple(c for c in CASES if c.world == case.world))[str(case)]
    expected = single(case.scenario)
    torch.testing.assert_close(actual.losses, expected.losses, rtol=1e-5, atol=0)
    torch.testing.assert_close(actual.norms, expected.norms, rtol=1e-5, atol=0)
    assert actual.gradients.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        assert_close_to_max(actual.gradients[name], gradient, 2e-4, name)
