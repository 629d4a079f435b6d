"""The way of an LTX-2.5 user: a split pack with a packed text encoder, prepared and trained with the shipped recipe.

The files are the miniature ones with a transformer of LTX-2.5's layout, sizes apart.
"""

import json
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ltx_titan.conditioning import FlexibleStrategy
from ltx_titan.media import probe_video
from ltx_titan.model import LTXTransformer, TextConnectors
from ltx_titan.model.init import init_random_
from ltx_titan.nano.pack_config import CONFIG
from ltx_titan.weights import released_config, save_safetensors
from tests.codecs.packed import SOURCE, write_packed
from tests.commands.process.helpers import run as prepare
from tests.jobs import train_rank
from tests.media.clips import write_clip
from tests.processes import run_here

RECIPE = Path(__file__).parent.parent / "train_configs" / "ltx25_lora_i2v.toml"
KEYFRAMES = '--video.conditions=[{type="keyframe", at=["last"]}]'


@pytest.fixture(scope="module")
def pack(nano_path, tmp_path_factory):
    """The four files of the pack, by the end of the options that take them."""
    released = released_config("ltx-2.5-22b")["transformer"]
    new = {key: released[key] for key in ("ff_bias", "use_keyframes_abs_pos_embedding")}
    transformer = CONFIG["transformer"] | new
    folder, stored = tmp_path_factory.mktemp("ltx25"), load_file(nano_path)
    tensors = {}
    for module in (LTXTransformer.from_config(transformer), TextConnectors.from_config(CONFIG)):
        init_random_(module, seed=1)
        tensors |= {f"model.diffusion_model.{name}": x.bfloat16() for name, x in module.state_dict().items()}
    assert "model.diffusion_model.keyframes_abs_pos_embedding" in tensors
    assert not any(".ff.net" in name and "bias" in name and "connector" not in name for name in tensors)

    def write(name, tensors, config, **metadata):
        save_safetensors(folder / name, tensors, {"config": json.dumps(config), **metadata})
        return folder / name

    versions = {"model_version": "2.5.0", "gemma_source_checkpoint": SOURCE}
    audio = {name: x for name, x in stored.items() if name.startswith(("audio_vae.", "vocoder."))}
    return {
        "model_path": write("transformer.safetensors", tensors, {"transformer": transformer}, **versions),
        "text_encoder_path": write_packed(folder / "gemma4.safetensors"),
        "video_vae_path": write(
            "video-vae.safetensors",
            {name: x for name, x in stored.items() if name.startswith("vae.")},
            {"vae": CONFIG["vae"]},
        ),
        "audio_vae_path": write(
            "audio-vae.safetensors", audio, {name: CONFIG[name] for name in ("audio_vae", "vocoder")}
        ),
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
