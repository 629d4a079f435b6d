import pytest
import torch

from ltx_titan.config import OptimizerSection
from ltx_titan.model.parts import matches
from ltx_titan.optim import build_optimizers, check_groups, freeze_groups
from ltx_titan.parallel.grad_norm import grad_norms
from tests.optim.toy import loss_of, toy


def moved(groups, steps=1, decay=0.0, loss=loss_of, **fields):
    """Distance that each weight of the toy moved, by name."""
    model = toy()
    settings = OptimizerSection(lr=1e-3, weight_decay=decay, groups=groups, **fields)
    check_groups(model, settings.groups)
    freeze_groups(model, settings.groups)
    optimizers = build_optimizers(model.named_parameters(), settings)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for _ in range(steps):
        optimizers.set_lr(1e-3)
        loss(model).backward()
        optimizers.step()
        optimizers.zero_grad()
    return {name: parameter.detach() - before[name] for name, parameter in model.named_parameters()}


HALF = [{"name": "half", "match": ["up"], "lr_factor": 0.5}]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"name": "adamw8bit"},
        {"name": "adamw_schedulefree"},
        {"name": "muon"},
        {"name": "adafactor"},
        {"in_backward": True},
        {"offload_state": True},
    ],
)
def test_a_group_moves_by_its_factor_with_every_optimizer(fields):
    plain, found = moved([], **fields), moved(HALF, **fields)
    for name, change in found.items():
        expected = plain[name] * (0.5 if ".up." in name else 1)
        # Differences of weights of about 0.05 that moved by 1e-3.
        torch.testing.assert_close(change, expected, rtol=1e-3, atol=2e-8, msg=name)


def test_a_group_has_a_weight_decay_of_its_own():
    groups = [{"name": "decayed", "match": ["down"], "blocks": [1, 1], "weight_decay": 0.5}]
    found = moved(groups, loss=lambda model: loss_of(model) * 0)
    model = dict(toy().named_parameters())
    for name, change in found.items():
        decay = 0.5 if name.startswith("transformer_blocks.1.down") else 0.0
        torch.testing.assert_close(change, -1e-3 * decay * model[name], rtol=1e-3, atol=1e-8, msg=name)


def test_frozen_weights_stay_and_have_no_state_and_the_first_group_counts():
    groups = [
        {"name": "kept", "match": ["scale_shift_table"]},
        {"name": "early", "blocks": [0, 0], "freeze": True},
        {"name": "ends", "match": ["patchify_proj", "proj_out"], "freeze": True},
    ]
    for name, change in moved(groups, steps=2).items():
        is_frozen = "scale_shift_table" not in name and not name.startswith("transformer_blocks.1")
        assert (change == 0).all() == is_frozen, name


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        ([{"name": "a", "match": ["attn9"]}], r"groups\[0\] \(a\).*matches no trained weight.*cross_modal"),
        ([{"name": "a", "blocks": [2, 9]}], r"groups\[0\] \(a\).*matches no trained weight"),
        ([{"name": "a", "match": ["up"]}, {"name": "b", "match": ["up"], "blocks": [0, 1]}], r"\[1\] \(b\).*earlier"),
        ([{"name": "a", "match": ["video"], "freeze": True}], "every trained weight is frozen"),
    ],
)
def test_groups_that_do_nothing_or_everything_are_refused(groups, words):
    with pytest.raises(ValueError, match=words):
        check_groups(toy(), OptimizerSection(groups=groups).groups)


def test_the_norm_of_a_group_is_reported_beside_those_of_the_streams():
    model = toy()
    loss_of(model).backward()
    squares = {name: parameter.grad.square().sum() for name, parameter in model.named_parameters()}
    total, norms = grad_norms(
        model.named_parameters(),
        lambda name: "blocks" if "blocks" in name else "ends",
        lambda name: "up" if ".up." in name else None,
    )
    assert norms.keys() == {"blocks", "ends", "up"}
    torch.testing.assert_close(norms["up"] ** 2, sum(value for name, value in squares.items() if ".up." in name))
    torch.testing.assert_close(norms["blocks"] ** 2 + norms["ends"] ** 2, total**2)
    torch.testing.assert_close(total**2, sum(squares.values()))


@pytest.mark.parametrize(
    ("part", "matched", "others"),
    [
        (
            "audio",
            ["audio_attn1.to_q.weight", "audio_ff.net.2.bias"],
            ["attn1.to_q.weight", "audio_to_video_attn.to_q"],
        ),
        ("cross_modal", ["video_to_audio_attn.to_q.weight", "scale_shift_table_a2v_ca_video"], ["attn2.to_q.weight"]),
        ("text_attention", ["attn2.to_q.lora_A.weight", "audio_attn2.q_norm.weight"], ["attn1.to_q.weight"]),
        ("feed_forward", ["ff.net.0.proj.weight", "audio_ff.net.2.bias"], ["attn1.to_q.weight"]),
        (
            "attn1.to_q",
            ["attn1.to_q.weight", "attn1.to_q.lora_B.weight"],
            ["audio_attn1.to_q.weight", "attn1.to_k.weight"],
        ),
        ("lora_B", ["attn1.to_q.lora_B.weight"], ["attn1.to_q.lora_A.weight"]),
    ],
)
def test_parts_of_the_model_are_found_by_name(part, matched, others):
    for name in matched:
        assert matches(f"transformer_blocks.7.{name}", [part], None), name
        assert matches(f"transformer_blocks.7.{name}", ["nothing", part], (0, 7)), name
        assert not matches(f"transformer_blocks.7.{name}", [part], (8, 9)), name
    for name in others:
        assert not matches(f"transformer_blocks.7.{name}", [part], None), name
    assert not matches("patchify_proj.weight", [], (0, 47))
