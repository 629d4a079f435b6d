from dataclasses import replace

import pytest
import torch

from ltx_titan.config import Degrees
from tests.golden_cases import assert_close_to_max
from tests.parallel.harness import LR, SCENARIOS, STEPS, Case, records, selected, single

FSDP2, HSDP = Degrees(dp_shard=2), Degrees(dp_replicate=2, dp_shard=2)
TP2, TP4, CP2, TP2_CP2 = Degrees(tp=2), Degrees(tp=4), Degrees(cp=2), Degrees(tp=2, cp=2)
ALL = Degrees(dp_shard=2, cp=2, tp=2)

# float32 weights gathered in bfloat16, two micro-batches a step, recomputation.
PLAIN = Case(FSDP2, "joint", "full", dtype=torch.bfloat16, static_slots="off", ci=True)
# The same with files that both ranks map, for memory that GPUs read from each other.
SLOTS = [
    replace(PLAIN, static_slots="on"),
    replace(PLAIN, static_slots="on", copy_engines="on"),
    replace(PLAIN, static_slots="on", exchange_gradients="on"),
    replace(PLAIN, static_slots="on", copy_engines="on", exchange_gradients="on"),
]

MESHES = (FSDP2, HSDP, TP2, TP4, CP2, TP2_CP2, ALL)
CASES = selected(
    [
        Case(FSDP2, "first_frame", "selective", ci=True),
        Case(FSDP2, "video_alone", "selective", "aot_eager", ci=True),  # one stream: a third of what is compiled
        Case(FSDP2, "frozen_video", "every_k", ci=True),
        Case(TP2, "reference", ci=True),
        Case(TP2, "first_frame", "selective", ci=True),
        Case(CP2, "frozen_audio", ci=True),
        Case(CP2, "joint", "full", ci=True),
        PLAIN,
        *SLOTS,
        *(Case(mesh, scenario) for mesh in MESHES for scenario in SCENARIOS),
        *(Case(mesh, "first_frame", mode) for mesh in MESHES for mode in ("full", "selective", "every_k")),
        *(Case(mesh, "reference", mode, "aot_eager") for mesh in MESHES for mode in ("none", "full", "selective")),
        *(Case(mesh, "joint", mode, "inductor") for mesh in MESHES for mode in ("none", "selective")),
    ]
)


@pytest.mark.parametrize("case", [case for case in CASES if case not in (PLAIN, *SLOTS)], ids=str)
def test_training_equals_one_process(case):
    actual = records(case.world, tuple(c for c in CASES if c.world == case.world))[str(case)]
    expected = single(case.scenario)
    torch.testing.assert_close(actual.losses, expected.losses, rtol=1e-5, atol=0)
    torch.testing.assert_close(actual.norms, expected.norms, rtol=1e-5, atol=0)
    for name, gradient in actual.gradients.items():
        # A compiled block gives zeros where eager mode gives nothing, to what a frozen stream leaves without use.
        wanted = expected.gradients.get(name)
        assert_close_to_max(gradient, torch.zeros_like(gradient) if wanted is None else wanted, 2e-4, name)
    assert actual.gradients.keys() >= expected.gradients.keys()
    # AdamW divides by the gradient's size: an element whose gradient is almost 0 may go the other way in each step.
    differences = torch.cat([(actual.weights[n] - expected.weights[n]).abs().flatten() for n in expected.gradients])
    assert differences.max() <= 2 * LR * STEPS
    assert (differences > 1e-2 * LR).float().mean() <= 1e-3


@pytest.mark.parametrize("case", SLOTS, ids=str)
def test_static_slots_change_no_bit(case):
    with_slots, plain = (records(2, tuple(c for c in CASES if c.world == 2))[str(c)] for c in (case, PLAIN))
    assert with_slots.losses == plain.losses
    assert with_slots.norms == plain.norms
    for kind in ("gradients", "weights"):
        assert all(
            torch.equal(tensor, getattr(plain, kind)[name]) for name, tensor in getattr(with_slots, kind).items()
        )
