import pytest
import torch

from ltx_titan.data import token_counts
from ltx_titan.nano.synthetic import SyntheticDataset
from tests.data.files import AV_SOURCES

DEFAULTS = {
    "width": 64,
    "height": 32,
    "num_frames": 17,
    "fps": 24.0,
    "num_samples": 4,
    "text_tokens": 8,
    "video_text_dim": 6,
    "audio_text_dim": 4,
}


def make(sources=AV_SOURCES, **changes):
    return SyntheticDataset(sources, **(DEFAULTS | changes))


def test_samples_have_the_format_of_prepared_data():
    data = make()
    sample = data.load(0)
    assert sample["video_latents"]["latents"].shape == (128, 3, 1, 2)
    assert sample["audio_latents"]["latents"].shape == (8, round(25 * 17 / 24), 16)
    assert sample["conditions"]["video_prompt_embeds"].shape == (8, 6)
    assert sample["conditions"]["audio_prompt_embeds"].shape == (8, 4)
    assert "prompt_attention_mask" not in sample["conditions"]
    assert token_counts(data.shape_key(3)) == {"video_latents": 6, "audio_latents": 18}


def test_features_come_with_a_left_padded_mask():
    mask = make(contexts=False).load(1)["conditions"]["prompt_attention_mask"]
    assert mask.dtype == torch.int64
    assert 1 <= mask.sum() <= 8
    assert torch.equal(mask, mask.sort().values)


def test_values_depend_on_seed_and_index_alone():
    first = make().load(2)["video_latents"]["latents"]
    assert torch.equal(make(num_samples=9).load(2)["video_latents"]["latents"], first)
    video_only = {"latents": "video_latents", "conditions": "conditions"}
    assert torch.equal(make(video_only).load(2)["video_latents"]["latents"], first)
    assert not torch.equal(make().load(3)["video_latents"]["latents"], first)
    assert not torch.equal(make(seed=1).load(2)["video_latents"]["latents"], first)


def test_streams_that_the_job_does_not_read_are_absent():
    data = make({"conditions": "conditions", "audio_latents": "audio_latents"}, audio_text_dim=None)
    assert sorted(data.load(0)) == ["audio_latents", "conditions"]
    assert sorted(data.load(0)["conditions"]) == ["video_prompt_embeds"]


def test_fingerprint_distinguishes_datasets():
    assert make().fingerprint == make().fingerprint
    assert len({make().fingerprint, make(num_samples=5).fingerprint, make(width=96).fingerprint}) == 3


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"width": 70}, r"data\.synthetic\.width = 70: expected a multiple of 32; set it to 64"),
        ({"num_frames": 20}, r"num_frames = 20: expected a multiple of 8 plus 1; set it to 17"),
        ({"sources": AV_SOURCES | {"video_masks": "video_masks"}}, r"found the folders \['video_masks'\]"),
    ],
)
def test_impossible_shapes_and_folders_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        make(**changes)
