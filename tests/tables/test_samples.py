import csv
import io
import json

import pytest

from ltx_titan.tables.samples import (
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
        ("d.jsonl", b'\n{"video"\n', "d.jsonl: has no row that can be used; .*line 2 is not valid JSON"),
        (
            "d.csv",
            "video,caption\na,café\n".encode("latin-1"),
            r"not UTF-8: line 2 .*0xe9.*'a,café.*iconv -f WINDOWS-1252",
        ),
        (
            "d.csv",
            "video,caption\na,b\n".encode("utf-16-le"),
            r"but UTF-16LE without a byte-order mark; .*iconv -f UTF-16LE",
        ),
        ("d.json", '[{"video": "a"}]'.encode("utf-16-be"), r"but UTF-16BE without a byte-order mark"),
        ("d.csv", b"video,caption,caption\na,b,c\n", r"has the columns \['caption'\] more than once"),
        ("d.csv", b"video,,caption\na,b,c\n", "column 2 of 3 has no name"),
        ("d.json", b'[{"video": "a"}, // first\n{}]', "JSON has no comments"),
        ("d.json", b'[{"video": "a"},\n]', "not valid JSON.*delete the comma before it"),
        ("d.json", b"[{'video': 'a'}]", "JSON has double quotes only"),
        ("d.json", b'{"data": [{"video": "a"}]}', r"found an object with the keys \['data'\]"),
        ("d.json", b'{"a.mp4": "a cat"}', r"expected a list of objects.*found an object"),
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


def captions_and_rejected(path):
    table = read_sample_table(path)
    return [sample.caption for sample in table.samples], table.rejected


@pytest.mark.parametrize(
    ("text", "captions", "item", "reason"),
    [
        (
            "video,caption\na,A cat, asleep\nb,two\n",
            ["two"],
            "row 1 (line 2)",
            "has 3 cells, expected 2 (video, caption)",
        ),
        ('video,caption\na,He said "hi, you" once\nb,two\n', ["two"], "row 1 (line 2)", "into double quotes"),
        ('video,caption\na,one\nb,"no end\nc,three\n', ["one", "three"], "row 2 (line 3)", "close the quotes"),
        (
            'video,caption\na,"no end\nb,"two, too"\nc,three\n',
            ["two, too", "three"],
            "row 1 (line 2)",
            "close the quotes",
        ),
        ('video,caption\na.mp4,"no end\nb.mp4,two"\nc.mp4,x\n', ["x"], "row 1 (line 2)", "swallows the rows after it"),
        ("video,caption\na\nb,two\n", ["two"], "row 1 (line 2)", "has 1 cells, expected 2"),
        ("video,caption\na,one\0\nb,two\n", ["two"], "row 1 (line 2)", "contains a NUL byte"),
        ("video;caption\na;one; too\nb;two, too\n", ["two, too"], "row 1 (line 2)", "contain a semicolon"),
    ],
    ids=["comma", "said", "open_quote", "open_before_quoted", "swallowed", "missing", "nul", "semicolon"],
)
def test_doubtful_csv_rows_are_rejected_alone(tmp_path, text, captions, item, reason):
    found, rejected = captions_and_rejected(write(tmp_path, "d.csv", text))
    assert found == captions
    assert rejected[0][0] == item
    assert reason in rejected[0][1]


@pytest.mark.parametrize(
    "text",
    [
        "video,caption\r\na,one\r\n\r\n\r\nb,two\r\n",
        "\n\nvideo,caption,\na,one,\n,,\nb,two,\n",
        " video , caption \na,one\nb,two\n",
        'video, caption\na, "one"\nb, two\n',
        "video;caption\na;one\nb;two\n",
        "video\tcaption\na\tone\nb\ttwo\n",
        "video,caption\ra,one\rb,two\r",
    ],
    ids=["empty_lines", "empty_columns", "spaces_in_header", "spaces_after_commas", "semicolons", "tabs", "old_mac"],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_csv_styles_of_other_programs(tmp_path, text, encoding):
    path = tmp_path / "d.csv"
    path.write_bytes(text.encode(encoding))
    assert captions_and_rejected(path) == (["one", "two"], ())


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"video": "a", "caption": NaN}', "column 'caption': expected text, found a number (NaN)"),
        ('{"video": "a", "caption": 5}', "found a number (5)"),
        ('{"video": "a", "caption": ["one", "two"]}', 'found a list (["one", "two"])'),
        ('{"video": ["a", "b"], "caption": "x"}', "column 'video': expected text, found a list"),
        ('{"video": "a", "caption": {"en": "x"}}', "found an object"),
        ('{"video": "a", "caption": true}', "found true or false"),
        ('{"video": "a", "caption": "x", "caption": "y"}', "has the key 'caption' twice"),
        ('{"video": "a", "caption": "\\ud83d"}', "half of a surrogate pair"),
        ('{"video": "a\\u0000", "caption": "x"}', "contains a NUL byte"),
        ('{"video": "a", "caption": "x",}', "not valid JSON"),
        ('["a", "x"]', "found a list"),
        ("null", "found null"),
        ('"a"', "expected an object such as"),
    ],
)
@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_doubtful_json_rows_are_rejected_alone(tmp_path, line, reason, suffix):
    good = '{"video": "b", "caption": "two"}'
    if suffix == "json" and "not valid" in reason:
        return
    text = f"[{good}, {line}]" if suffix == "json" else f"{good}\n{line}\n"
    found, ((item, why),) = captions_and_rejected(write(tmp_path, f"d.{suffix}", text))
    assert found == ["two"]
    assert item.startswith("row 2")
    assert reason in why


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("d.jsonl", '[{"video": "a", "caption": "one"},\n {"video": "b", "caption": "two"}]'),
        ("d.json", '{"video": "a", "caption": "one"}\n{"video": "b", "caption": "two"}\n'),
    ],
    ids=["array_named_lines", "lines_named_json"],
)
def test_json_and_json_lines_may_have_each_others_names(tmp_path, name, text):
    assert captions_and_rejected(write(tmp_path, name, text)) == (["one", "two"], ())


def test_rows_that_would_be_lost_stop_a_table_from_being_rewritten(tmp_path):
    path = write(tmp_path, "d.csv", "video,caption\na,A cat, asleep\nb,two\n")
    with pytest.raises(ValueError, match=r"1 rows cannot be read and would be lost.*row 1 \(line 2\)"):
        read_table(path)


def test_values_of_named_columns_must_be_text(tmp_path):
    path = write(tmp_path, "d.json", '[{"clip": "a", "text": 5}, {"clip": "b", "text": "two"}]')
    table = read_sample_table(path, video_column="clip", caption_column="text")
    assert [sample.caption for sample in table.samples] == ["two"]
    assert table.rejected == (("row 1", "column 'text': expected text, found a number (5); write it in double quotes"),)


def fill(folder, **files):
    for name, content in files.items():
        path = folder / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def test_folder_of_clips_with_captions_is_a_table(tmp_path):
    fill(tmp_path, a_mp4="", a_txt=" a cat,\n asleep \n", sub__b_MOV="", sub__b_txt="\ufeffzwei ä\r\n", c_jpg="")
    fill(tmp_path, c_TXT="drei\u2028x".encode("utf-16"))
    table = read_sample_table(tmp_path)
    assert [(str(sample.key), sample.caption) for sample in table.samples] == [
        ("a.pt", "a cat,\n asleep"),
        ("c.pt", "drei\u2028x"),
        ("sub/b.pt", "zwei ä"),
    ]
    assert table.samples[2].video == tmp_path / "sub" / "b.MOV"
    assert table.rejected == ()
    assert (table.has_video, table.has_audio) == (True, False)


def test_files_of_a_folder_that_do_not_match_are_named(tmp_path):
    fill(tmp_path, a_mp4="", a_txt="one", b_mp4="", c_mp4="", c_txt=" \n", readme_txt="x", d_mp4="", d_txt=b"caf\xe9")
    fill(tmp_path, a_wav="", _hidden__e_mp4="", a_edges_mp4="")
    (tmp_path / "a_edges.mp4").touch()
    table = read_sample_table(tmp_path)
    assert [sample.caption for sample in table.samples] == ["one"]
    reasons = {item.removeprefix(f"{tmp_path}/"): reason for item, reason in table.rejected}
    assert reasons["b.mp4"] == "has no text file b.txt beside it; write its caption there"
    assert reasons["c.mp4"].startswith("has an empty text file c.txt")
    assert reasons["readme.txt"].startswith("has no media file beside it")
    assert reasons["d.txt"].startswith("not UTF-8: line 1 has the byte 0xe9")
    assert reasons["a.wav"].startswith("is audio in a folder of videos")
    # Captions are not needed where only media are encoded.
    found = [str(sample.key) for sample in read_sample_table(tmp_path, needs_captions=False).samples]
    assert found == ["a.edges.pt", "a.pt", "b.pt", "c.pt", "d.pt"]


def test_folder_of_audio_and_folders_without_captions(tmp_path):
    fill(tmp_path, x__a_wav="", x__a_txt="rain", y__a_mp4="", y__dataset_jsonl="{}", z__a_mp4="")
    table = read_sample_table(tmp_path / "x")
    assert (table.has_video, table.has_audio, table.samples[0].caption) == (False, True, "rain")
    with pytest.raises(ValueError, match=r"holds no captions; expected a text file NAME\.txt.*y/dataset\.jsonl"):
        read_sample_table(tmp_path / "y")
    with pytest.raises(ValueError, match=r"holds no captions.*ltx-titan caption"):
        read_sample_table(tmp_path / "z")
