"""The way of an LTX-2.5 user: a split pack with a packed text encoder, prepared and trained with the shipped recipe.

The files are those of `make-nano --shape 2.5`.
"""

import json
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ltx_titan.conditioning import FlexibleStrategy
from ltx_titan.media import probe_video
from ltx_titan.nano.split_pack import make_split_nano
from tests.commands.process.helpers import run as prepare
from tests.jobs import train_rank
from tests.media.clips import write_clip
from tests.processes import run_here

RECIPE = Path(__file__).parent.parent / "train_configs" / "ltx25_lora_i2v.toml"
KEYFRAMES = '--video.conditions=[{type="keyframe", at=["last"]}]'


@pytest.fixture(scope="module")
def pack(nano_path, tmp_path_factory):
    """The four files of the pack, by the end of the options that take them."""
    files = make_split_nano(tmp_path_factory.mktemp("ltx25"), codecs=load_file(nano_path))
    tensors = load_file(files.transformer)
    assert "model.diffusion_model.keyframes_abs_pos_embedding" in tensors
    assert not any(".ff.net" in name and "bias" in name and "connector" not in name for name in tensors)
    return {
        "model_path": files.transformer,
        "text_encoder_path": files.text_encoder,
        "video_vae_path": files.video_vae,
        "audio_vae_path": files.audio_vae,
    }


def test_the_recipe_trains_and_samples_on_the_split_pack_with_its_marker(pack, tmp_path, monkeypatch):
    root = tmp_path / "clips"
    root.mkdir()
    write_clip(root / "a.mp4", frames=17, fps=Fraction(24), channels=2)
    table = root / "dataset.jsonl"
    table.write_text(json.dumps({"video": "a.mp4", "caption": "a clip"}) + "\n")
    prepare(pack["model_path"], table, buckets="64x32x17", **{k: v for k, v in pack.items() if k != "model_path"})
    text = torch.load(root / ".precomputed" / "conditions" / "a.pt", weights_only=True)
    assert text["video_prompt_embeds"][-1].float().std() > 0
    assert text["prompt_attention_mask"].sum() == 1 + len("a clip")

    found = []
    original = FlexibleStrategy.prepare
    monkeypatch.setattr(FlexibleStrategy, "prepare", lambda *a: found.append(original(*a)) or found[-1])
    codecs = [f"--validation.{key}={pack[key]}" for key in pack if key != "model_path"]
    quick = ["--compile.enable=false", "--training.steps=1", "--checkpoint.enable=false"]
    quick += [f"--validation.{key}=1" for key in ("inference_steps", "video_cfg_scale", "audio_cfg_scale")]
    paths = [f"--model.checkpoint_path={pack['model_path']}", f"--data.root={root}"]
    folder = f"--job.dump_folder={tmp_path / 'run'}"
    counts = ["--validation.dataset_samples=1", "--validation.interval=1", "--validation.skip_initial_validation"]
    run_here(train_rank, RECIPE, *paths, *codecs, *quick, *counts, folder, KEYFRAMES)
    inputs = found[0]
    # Three latent frames of 2 tokens: the last one is a keyframe, the first one alone is a single pixel frame.
    assert (~inputs.video_loss_mask[0]).tolist() == [False] * 4 + [True] * 2
    assert inputs.video.keyframes_mask[0, :, 0].tolist() == [1.0] * 2 + [0.0] * 4
    (clip,) = (tmp_path / "run" / "samples" / "step-1").glob("sample-01.mp4")
    assert probe_video(clip).frames == 17
    [line] = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert line["loss_video"] > 0
    assert line["loss_audio"] > 0
    assert line["grad_norm"] > 0
