from fractions import Fraction

import pytest
import torch
from PIL import Image

from ltx_titan.media import Audio, probe_video, read_audio
from ltx_titan.validation.decode import DecodedSample, load_decoders, side_by_side, write_sample


def frames(count, height=32, width=48):
    return torch.arange(count, dtype=torch.uint8)[:, None, None, None].expand(count, height, width, 3).contiguous()


def test_a_clip_with_audio_is_one_file_of_its_length_and_rates(tmp_path):
    audio = Audio(torch.zeros(2, 24000), 48000)
    path = write_sample(tmp_path, "sample-01", DecodedSample(frames(12, 64, 64), audio), 24000 / 1001)
    info = probe_video(path)
    assert (path.name, info.frames, info.width, info.height) == ("sample-01.mp4", 12, 64, 64)
    assert info.fps == Fraction(24000, 1001)
    assert read_audio(path).sample_rate == 48000


def test_one_frame_is_a_picture_and_audio_alone_a_wav(tmp_path):
    picture = write_sample(tmp_path, "a", DecodedSample(frames(1), None), 24)
    assert Image.open(picture).size == (48, 32)
    audio = write_sample(tmp_path, "b", DecodedSample(None, Audio(torch.zeros(2, 100), 24000)), 24)
    assert read_audio(audio).waveform.shape == (2, 100)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.wav"]


@pytest.mark.parametrize("grid", [(19, 1, 1), (1, 1, 26), (1, 26, 1)], ids=["long", "wide", "high"])
def test_tiles_join_to_the_whole(pack, grid):
    """145 frames are three tiles, 832 pixels are two."""
    latents = torch.randn(1, 128, *grid, generator=torch.Generator().manual_seed(0))
    whole, tiled = (load_decoders(pack.path, None, "cpu", tiling).video.decode(latents)[0] for tiling in (False, True))
    assert tiled.shape == whole.shape
    difference, dim = (tiled - whole).abs(), max(range(3), key=lambda axis: grid[axis]) + 1
    assert difference.narrow(dim, 0, 24).max() < 1e-4
    # Random weights see further than tiles overlap: 0.19, 0.09 and 0.08 of the spread on average.
    assert difference.mean() < 0.25 * whole.std()
    if dim == 1:
        # Far from both seams 0.05; a frame too early or too late is off by 1.0.
        assert difference[:, 84:96].mean() < 0.1 * whole.std()


def test_a_reference_is_on_the_left_at_the_results_height():
    both = side_by_side(frames(9, 16, 30), frames(9, 32, 48))
    assert both.shape == (9, 32, 60 + 48, 3)
    assert both[4, 0, 0, 0] == both[4, 0, -1, 0] == 4


def test_a_reference_of_fewer_frames_per_second_holds_each_frame():
    both = side_by_side(frames(5), frames(9), every=2)
    assert both[:, 0, 0, 0].tolist() == [0, 1, 1, 2, 2, 3, 3, 4, 4]


def test_a_short_reference_is_stretched_and_a_long_one_cut():
    assert side_by_side(frames(3), frames(6))[:, 0, 0, 0].tolist() == [0, 0, 1, 1, 2, 2]
    assert side_by_side(frames(9), frames(3))[:, 0, 0, 0].tolist() == [0, 1, 2]
    assert side_by_side(frames(2), frames(9), every=2)[:, 0, 0, 0].tolist() == [0] + [1] * 8
