"""Scores of clips: those of the models themselves, and never an error that ends a run."""

import logging
import math

import pytest
import torch
from transformers import AutoTokenizer, ClapFeatureExtractor, ClapModel, CLIPModel, XCLIPModel

from ltx_titan.config.validation import QualitySection
from ltx_titan.media import Audio
from ltx_titan.validation.quality import QualityClip, mean_scores, quality_problems, score_clips
from tests.validation.quality_models import write_clap, write_clip, write_x_clip

FRAMES = torch.randint(0, 256, (6, 32, 48, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
TONE = Audio(torch.sin(torch.arange(16000) * 0.3).repeat(2, 1) * 0.5, 16000)
CLIPS = [QualityClip(0, "a dog barks", FRAMES, TONE), QualityClip(3, "x" * 99, FRAMES.flip(0, 3), None)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return write_clip(root / "clip"), write_x_clip(root / "x-clip"), write_clap(root / "clap")


def tokens(path, prompt, length):
    return AutoTokenizer.from_pretrained(path)(prompt, max_length=length, truncation=True, return_tensors="pt")


def cosine(a, b):
    return torch.nn.functional.cosine_similarity(a, b).mean().item()


def test_clip_score_is_the_mean_similarity_of_frames_and_prompt(folders):
    path = folders[0]
    found = score_clips(QualitySection(clip_path=path, frames=3), CLIPS, "cpu")
    model = CLIPModel.from_pretrained(path)
    for clip in CLIPS:
        # The frames have the model's height already: only the sides are cut.
        pixels = clip.frames[[0, 2, 5], :, 8:40].permute(0, 3, 1, 2) / 255
        with torch.no_grad():
            images = model.get_image_features(pixel_values=(pixels - 0.5) / 0.25).pooler_output
            text = model.get_text_features(input_ids=tokens(path, clip.prompt, 16)["input_ids"]).pooler_output
        assert found[clip.index] == {"quality/text_video": pytest.approx(cosine(images, text), abs=1e-5)}
    assert found[0] != found[3]


def test_x_clip_compares_the_clip_as_a_whole(folders):
    path = folders[1]
    found = score_clips(QualitySection(clip_path=path), CLIPS[:1], "cpu")
    model = XCLIPModel.from_pretrained(path)
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.4815, 0.4578, 0.4082), (0.2686, 0.2613, 0.2758)))
    pixels = (FRAMES[[0, 2, 3, 5], :, 8:40].permute(0, 3, 1, 2) / 255 - mean) / std
    with torch.no_grad():
        out = model(pixel_values=pixels[None], input_ids=tokens(path, "a dog barks", 16)["input_ids"])
    expected = cosine(out.video_embeds, out.text_embeds[0])
    assert found[0]["quality/text_video"] == pytest.approx(expected, abs=1e-3)


def test_clap_score_is_the_similarity_of_resampled_audio_and_prompt(folders):
    path = folders[2]
    found = score_clips(QualitySection(clap_path=path), CLIPS, "cpu")
    assert found[3] == {}  # without audio
    model, extractor = ClapModel.from_pretrained(path), ClapFeatureExtractor.from_pretrained(path)
    halved = torch.sin(torch.arange(8000) * 0.6) * 0.5
    features = extractor(halved.numpy(), sampling_rate=8000, return_tensors="pt")
    with torch.no_grad():
        audio = model.get_audio_features(**features).pooler_output
        text = model.get_text_features(input_ids=tokens(path, "a dog barks", 64)["input_ids"]).pooler_output
    assert found[0]["quality/text_audio"] == pytest.approx(cosine(audio, text), abs=1e-2)


def test_a_score_that_fails_is_logged_and_no_mean_is_made_of_the_rest(folders, tmp_path, caplog):
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    section = QualitySection(clip_path=str(tmp_path), clap_path=folders[2])
    with caplog.at_level(logging.WARNING):
        found = score_clips(section, CLIPS, "cpu")
    assert "quality/text_video of this validation is not known" in caplog.text
    assert math.isnan(found[0]["quality/text_video"])
    assert list(mean_scores(list(found.values()))) == ["quality/text_audio"]


def test_a_folder_of_another_model_is_refused_by_key(folders):
    section = QualitySection(clip_path=folders[2], clap_path="none")
    clip, clap = quality_problems(section)
    assert "validation.quality.clip_path" in clip
    assert "found clap" in clip
    assert "validation.quality.clap_path" in clap
