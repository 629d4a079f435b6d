import json

import pytest
import torch
from safetensors.torch import load_file

from ltx_titan.commands.captioning.caption import CaptionOptions, caption_files
from ltx_titan.commands.captioning.local import needs_8bit
from ltx_titan.common.hardware import GIB
from ltx_titan.media import Audio, write_wav
from tests.commands.caption_models import write_audio_model, write_vision_model
from tests.media.clips import tone, write_clip


@pytest.fixture(scope="module")
def vision_model(tmp_path_factory):
    torch.manual_seed(0)
    return write_vision_model(tmp_path_factory.mktemp("vision"))


@pytest.fixture(scope="module")
def audio_model(tmp_path_factory):
    torch.manual_seed(1)
    return write_audio_model(tmp_path_factory.mktemp("audio"))


def test_a_vision_model_captions_clips(vision_model, tmp_path, console):
    write_clip(tmp_path / "a.mp4", frames=25)
    write_clip(tmp_path / "b.mp4", frames=12, channels=0)
    (tmp_path / "zero.mp4").touch()
    options = CaptionOptions(
        tmp_path, local_model=vision_model, skip_audio=True, fps=2, max_tokens=12, instruction="Go."
    )
    report = caption_files(options, console)
    assert report.counts["caption"] == {"done": 2, "failed": 1}
    rows = [json.loads(line) for line in (tmp_path / "dataset.jsonl").read_text().splitlines()]
    assert [row["video"] for row in rows] == ["a.mp4", "b.mp4"]
    assert all(row["caption"] for row in rows)
    # Greedy: the same caption again.
    again = CaptionOptions(**{**vars(options), "output": tmp_path / "again.jsonl"})
    caption_files(again, console)
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "dataset.jsonl").read_bytes()


def test_an_audio_model_receives_the_audio(audio_model, tmp_path, console):
    captions = []
    for name, hertz in (("low", 220.0), ("high", 3520.0)):
        folder = tmp_path / name
        folder.mkdir()
        write_wav(folder / "tone.wav", Audio(tone(0.5, 44100, hertz=hertz), 44100))
        options = CaptionOptions(folder, local_model=audio_model, max_tokens=12, instruction="Go.")
        assert caption_files(options, console).counts["caption"] == {"done": 1}
        captions.append(json.loads((folder / "dataset.jsonl").read_text())["caption"])
    assert captions[0] != captions[1]


def test_weights_in_8_bit(vision_model, tmp_path, console):
    write_clip(tmp_path / "a.mp4")
    options = CaptionOptions(tmp_path, local_model=vision_model, load_in_8bit=True, skip_audio=True, max_tokens=4)
    assert caption_files(options, console).counts["caption"] == {"done": 1}


def test_int8_is_chosen_where_bfloat16_does_not_fit(vision_model):
    weights = sum(tensor.numel() for path in vision_model.glob("*.safetensors") for tensor in load_file(path).values())
    reserve = 2 * GIB
    assert not needs_8bit(vision_model, reserve + 2 * weights)
    assert needs_8bit(vision_model, reserve + 2 * weights - 1)
    # More than one byte a weight: embeddings and norms stay as they are.
    with pytest.raises(ValueError, match=r"--local-model.*int8.*smaller model"):
        needs_8bit(vision_model, reserve + weights)


def test_a_model_without_audio_input_needs_skip_audio(vision_model, tmp_path, console):
    write_clip(tmp_path / "a.mp4")
    with pytest.raises(ValueError, match=r"does not accept audio.*--skip-audio"):
        caption_files(CaptionOptions(tmp_path, local_model=vision_model), console)
    assert not (tmp_path / "dataset.jsonl").exists()
