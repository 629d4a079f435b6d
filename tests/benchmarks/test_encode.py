import json

from ltx_titan.cli import main
from ltx_titan.nano.pack_config import CONFIG


def test_whole_clips_and_tiles_are_timed_at_the_given_size(tmp_path):
    shape, out = tmp_path / "nano.json", tmp_path / "rows.jsonl"
    shape.write_text(json.dumps(CONFIG))
    assert main(["bench", "encode", "--shape", str(shape), "--clip", "96x64x9", "--out", str(out)]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["tiling"] for row in rows] == [False, True]
    assert all(row["latent"] == [128, 2, 2, 3] and row["clip_s"] > 0 for row in rows)


def test_an_invalid_size_is_named(tmp_path, capsys):
    assert main(["bench", "encode", "--clip", "1280x704"]) == 1
    assert "--clip is '1280x704'" in capsys.readouterr().err
