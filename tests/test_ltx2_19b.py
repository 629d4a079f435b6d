"""The way of an LTX-2 (19B) user: its text features have one width for both streams, and the transformer projects them.

The pack is the miniature one with a transformer, connectors and text projection of LTX-2's layout, sizes apart.
"""

import copy
import json
from fractions import Fraction

import pytest
import torch
from safetensors.torch import load_file

from ltx_titan.media import probe_video
from ltx_titan.model import FeatureExtractor, LTXTransformer, TextConnectors
from ltx_titan.model.init import init_random_
from ltx_titan.nano.pack_config import CONFIG, TEXT_ENCODER
from ltx_titan.weights import released_config, save_safetensors
from tests.commands.process.helpers import run as prepare
from tests.jobs import NO_CHECKPOINTS, curve, small_validation, train, write_job
from tests.media.clips import write_clip

TEXT_WIDTH = TEXT_ENCODER["hidden_size"]


def config_of_ltx2() -> dict:
    """The miniature's sizes, and of everything else what LTX-2's released file has."""
    released = released_config("ltx-2-19b")["transformer"]
    own = {key: value for key, value in CONFIG["transformer"].items() if key in released}
    kept = {key: released[key] for key in released if isinstance(released[key], bool)}
    connectors = {f"{prefix}connector_num_attention_heads": 8 for prefix in ("", "audio_")}
    connectors |= {f"{prefix}connector_attention_head_dim": TEXT_WIDTH // 8 for prefix in ("", "audio_")}
    return {**copy.deepcopy(CONFIG), "transformer": released | own | kept | connectors}


@pytest.fixture(scope="module")
def checkpoint(nano_path, tmp_path_factory):
    """Path of the pack's file; its text encoder is the miniature's."""
    config = config_of_ltx2()
    tensors = {
        name: x for name, x in load_file(nano_path).items() if name.startswith(("vae.", "audio_vae.", "vocoder."))
    }
    for prefix, module in (
        ("model.diffusion_model.", LTXTransformer.from_config(config["transformer"])),
        ("model.diffusion_model.", TextConnectors.from_config(config)),
        ("text_embedding_projection.", FeatureExtractor.from_config(config, TEXT_ENCODER)),
    ):
        init_random_(module, seed=1)
        tensors |= {prefix + name: tensor.bfloat16() for name, tensor in module.state_dict().items()}
    path = tmp_path_factory.mktemp("ltx2") / "ltx-2-nano.safetensors"
    save_safetensors(path, tensors, {"config": json.dumps(config), "model_version": "2.0.0"})
    return path


@pytest.fixture(scope="module")
def prepared(checkpoint, nano_path, tmp_path_factory):
    """A dataset of two clips with audio, prepared with that pack."""
    root = tmp_path_factory.mktemp("clips")
    for number in range(2):
        write_clip(root / f"{number}.mp4", frames=17, fps=Fraction(24), channels=2)
    table = root / "dataset.jsonl"
    table.write_text("".join(json.dumps({"video": f"{i}.mp4", "caption": f"clip {i}"}) + "\n" for i in range(2)))
    prepare(checkpoint, table, buckets="64x32x17", text_encoder_path=nano_path.parent / "text_encoder")
    return root / ".precomputed"


def test_the_pack_has_the_names_of_the_released_file(checkpoint):
    names = set(load_file(checkpoint))
    assert "text_embedding_projection.aggregate_embed.weight" in names
    assert "model.diffusion_model.caption_projection.linear_1.weight" in names
    assert not any("prompt_adaln" in name or "to_gate_logits" in name for name in names)


def test_both_streams_have_the_same_features_of_the_text_encoders_width(prepared):
    text = torch.load(prepared / "conditions" / "0.pt", weights_only=True)
    assert text["video_prompt_embeds"].shape == (1024, TEXT_WIDTH)
    torch.testing.assert_close(text["audio_prompt_embeds"], text["video_prompt_embeds"], rtol=0, atol=0)
    assert text["video_prompt_embeds"][-1].float().std() > 0


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_a_job_trains_exports_and_makes_clips(checkpoint, nano_path, prepared, tmp_path, mode):
    settings = small_validation(nano_path, samples=[{"prompt": "a rabbit"}])
    settings |= {"model__mode": mode, "training__steps": 2, "training__global_batch_size": 2}
    job = write_job(tmp_path, checkpoint, prepared, **settings)
    lines = train(job)
    assert len(lines) == 2
    assert lines[0]["grad_norm"] > 0
    assert all(torch.tensor(line["loss"]).isfinite() for line in lines)
    clips = sorted((tmp_path / "run").rglob("*.mp4"))
    assert [(found.width, found.height, found.frames) for found in map(probe_video, clips)] == [(64, 64, 9)] * 2
    (export,) = (tmp_path / "run/export").glob("*step-2.safetensors")
    exported, base = load_file(export), load_file(checkpoint)
    if mode == "full":
        ours = {name for name in base if name.startswith("model.diffusion_model.")}
        assert set(exported) == ours
        name = "model.diffusion_model.caption_projection.linear_1.weight"
        assert not torch.equal(exported[name].bfloat16(), base[name])
    else:
        assert exported
        assert all(".lora_" in name for name in exported)


@pytest.mark.distributed
def test_losses_do_not_depend_on_the_mesh(checkpoint, prepared, tmp_path):
    settings = {"training__steps": 2, "training__global_batch_size": 1, **NO_CHECKPOINTS}
    single = train(write_job(tmp_path / "single", checkpoint, prepared, **settings))
    for axis in ("tp", "cp"):
        lines = train(write_job(tmp_path / axis, checkpoint, prepared, **settings, **{f"parallelism__{axis}": 2}), 2)
        torch.testing.assert_close(torch.tensor(curve(lines)), torch.tensor(curve(single)), rtol=1e-5, atol=0)
