import json

from ltx_titan.media import probe_video, read_audio
from ltx_titan.nano.debug_dataset import make_debug_dataset


def test_eight_captioned_windows_with_audio_and_attribution(tmp_path):
    metadata = make_debug_dataset(tmp_path)
    rows = [json.loads(line) for line in metadata.read_text().splitlines()]
    assert len(rows) == 8
    assert len({row["caption"] for row in rows}) == 8
    for row in rows:
        info = probe_video(tmp_path / row["video"])
        assert (info.frames, info.fps, info.has_audio) == (25, 25, True)
    assert read_audio(tmp_path / rows[5]["video"]).waveform.abs().max() > 0.01
    assert "Blender Foundation" in (tmp_path / "README.md").read_text()
