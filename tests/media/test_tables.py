import csv
import io
import json

import pytest

from ltx_titan.media.tables import (
    media_of_row,
    moved_row,
    read_sample_table,
    read_table,
    relative_sample_path,
    write_table,
)

ROWS = [{"video": "a.mp4", "caption": "one"}, {"video": "sub/ä b.mp4", "caption": "zwei, drei"}]
# Line breaks of Unicode that str.splitlines() splits at, and those of text files.
BREAKS = "a\u2028b\u2029c\u0085d\x0be\x1cf\r\ng\nh"


def write(folder, name, text):
    (folder / name).write_bytes(text.encode())
    return folder / name


def to_csv(rows):
    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "byte_order_mark"])
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("d.json", json.dumps(ROWS)),
        ("d.jsonl", "\n".join(json.dumps(row) for row in ROWS) + "\n\n"),
        ("d.jsonl", "\r\n".join(json.dumps(row) for row in ROWS) + "\r\n"),
        ("d.csv", 'video,caption\na.mp4,one\nsub/ä b.mp4,"zwei, drei"\n'),
        ("d.CSV", 'media_path,caption\r\na.mp4,one\r\nsub/ä b.mp4,"zwei, drei"\r\n'),
    ],
)
def test_all_formats_give_the_same_rows(tmp_path, name, text, mark):
    table = read_sample_table(write(tmp_path, name, mark + text))
    assert [str(sample.key) for sample in table.samples] == ["a.pt", "sub/ä b.pt"]
    assert [sample.caption for sample in table.samples] == ["one", "zwei, drei"]
    assert table.samples[1].video == tmp_path / "sub" / "ä b.mp4"
    assert (table.has_video, table.has_audio) == (True, False)


@pytest.mark.parametrize("suffix", [".csv", ".json", ".jsonl"])
def test_line_breaks_in_captions_survive_writing_and_reading(tmp_path, suffix):
    rows = [{"video": "a.mp4", "caption": BREAKS}, {"video": "b.mp4", "caption": 'say "x", then\u2028y'}]
    path = tmp_path / f"d{suffix}"
    write_table(path, rows)
    assert read_table(path) == rows
    assert [sample.caption for sample in read_sample_table(path).samples] == [row["caption"] for row in rows]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("d.jsonl", "".join(json.dumps(row | {"caption": BREAKS}, ensure_ascii=False) + "\n" for row in ROWS)),
        ("d.csv", to_csv([row | {"caption": BREAKS} for row in ROWS])),
    ],
)
def test_unescaped_line_breaks_of_other_programs_are_read(tmp_path, name, text):
    assert [sample.caption for sample in read_sample_table(write(tmp_path, name, text)).samples] == [BREAKS, BREAKS]


def test_audio_only(tmp_path):
    table = read_sample_table(write(tmp_path, "d.json", json.dumps([{"audio": "a.wav", "caption": "x"}])))
    assert table.samples[0].video is None
    assert str(table.samples[0].key) == "a.pt"


def test_media_outside_the_folder_keep_their_absolute_path(tmp_path):
    path = write(tmp_path, "d.json", json.dumps([{"video": "/data/x/a.mp4", "caption": "x"}]))
    assert str(read_sample_table(path).samples[0].key) == "data/x/a.pt"


def test_sample_path_mirrors_the_media_below_the_table(tmp_path):
    assert str(relative_sample_path(tmp_path / "a" / "b.clip.mp4", tmp_path)) == "a/b.clip.pt"
    assert str(relative_sample_path("/media/disk/b.mp4", "/data/set")) == "media/disk/b.pt"
    assert str(relative_sample_path("/data/set/../other/b.mp4", "/data/set")) == "data/other/b.pt"


def test_rows_that_would_overwrite_each_other_are_rejected(tmp_path):
    rows = [{"video": "a.mp4", "caption": "x"}, {"video": "a.mov", "caption": "y"}, {"video": "", "caption": "z"}]
    table = read_sample_table(write(tmp_path, "d.json", json.dumps(rows)))
    assert len(table.samples) == 1
    assert [reason for _, reason in table.rejected] == [
        "row 2 has the same output a.pt as row 1; rename one",
        "column 'video' is empty",
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.txt", b"x", "suffix '.txt'"),
        ("d.json", b"{", "d.json: not valid JSON"),
        ("d.jsonl", b'{"video": "a"}\n\n{"video"\n', "d.jsonl: line 3 is not valid JSON"),
        ("d.csv", b"video,caption\na,\xff\n", "d.csv: not UTF-8"),
        ("d.json", b'["a"]', "list of objects"),
        ("d.json", b"[]", "no rows"),
        ("d.json", b'[{"video": "a"}]', "no column 'caption'"),
        ("d.json", b'[{"caption": "a"}]', "no column 'video'"),
        ("d.json", b'[{"video": "a", "media_path": "b", "caption": "c"}]', "mean the same"),
    ],
)
def test_unusable_tables_say_why(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_sample_table(tmp_path / name)


def test_missing_table_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"d\.csv: no such file; expected a table"):
        read_table(tmp_path / "d.csv")


def test_named_columns(tmp_path):
    path = write(tmp_path, "d.json", '[{"clip": "a.mp4", "text": "x", "video": "b.mp4"}]')
    table = read_sample_table(path, video_column="clip", caption_column="text")
    assert str(table.samples[0].key) == "a.pt"
    with pytest.raises(ValueError, match=r"no column 'clips', which --video-column names"):
        read_sample_table(path, video_column="clips", caption_column="text")


def test_moved_rows_name_the_same_files(tmp_path):
    row = {"video": "a.mp4", "reference_video": "sub/b.mp4", "audio_mask": "", "caption": "x"}
    below = moved_row(row, tmp_path / "set", tmp_path)
    assert below == row | {"video": "set/a.mp4", "reference_video": "set/sub/b.mp4"}
    aside = moved_row(row, tmp_path / "set", tmp_path / "other")
    assert media_of_row(aside, tmp_path / "other" / "d.csv") == tmp_path / "set" / "a.mp4"
