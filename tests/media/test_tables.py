import json

import pytest

from ltx_titan.media.tables import read_dataset

ROWS = [{"video": "a.mp4", "caption": "one"}, {"video": "sub/ä b.mp4", "caption": "zwei, drei"}]


def write(folder, name, text):
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("d.json", json.dumps(ROWS)),
        ("d.jsonl", "\n".join(json.dumps(row) for row in ROWS) + "\n\n"),
        ("d.csv", 'video,caption\na.mp4,one\nsub/ä b.mp4,"zwei, drei"\n'),
        ("d.csv", '\ufeffmedia_path,caption\na.mp4,one\nsub/ä b.mp4,"zwei, drei"\n'),
    ],
)
def test_all_forms_give_the_same_rows(tmp_path, name, text):
    dataset = read_dataset(write(tmp_path, name, text))
    assert [str(sample.key) for sample in dataset.samples] == ["a.pt", "sub/ä b.pt"]
    assert [sample.caption for sample in dataset.samples] == ["one", "zwei, drei"]
    assert dataset.samples[1].video == tmp_path / "sub" / "ä b.mp4"
    assert (dataset.has_video, dataset.has_audio) == (True, False)


def test_audio_only(tmp_path):
    dataset = read_dataset(write(tmp_path, "d.json", json.dumps([{"audio": "a.wav", "caption": "x"}])))
    assert dataset.samples[0].video is None
    assert str(dataset.samples[0].key) == "a.pt"


def test_media_elsewhere_keep_their_absolute_path(tmp_path):
    path = write(tmp_path, "d.json", json.dumps([{"video": "/data/x/a.mp4", "caption": "x"}]))
    assert str(read_dataset(path).samples[0].key) == "data/x/a.pt"


def test_rows_that_would_overwrite_each_other_are_rejected(tmp_path):
    rows = [{"video": "a.mp4", "caption": "x"}, {"video": "a.mov", "caption": "y"}, {"video": "", "caption": "z"}]
    dataset = read_dataset(write(tmp_path, "d.json", json.dumps(rows)))
    assert len(dataset.samples) == 1
    assert [reason for _, reason in dataset.rejected] == [
        "row 2 has the same output a.pt as row 1; rename one",
        "column 'video' is empty",
    ]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("d.txt", "x", "suffix '.txt'"),
        ("d.json", "{", "not valid JSON"),
        ("d.json", '["a"]', "list of objects"),
        ("d.json", "[]", "no rows"),
        ("d.json", '[{"video": "a"}]', "no column 'caption'"),
        ("d.json", '[{"caption": "a"}]', "no column 'video'"),
        ("d.json", '[{"video": "a", "media_path": "b", "caption": "c"}]', "mean the same"),
    ],
)
def test_unusable_files_say_why(tmp_path, name, text, message):
    with pytest.raises(ValueError, match=message):
        read_dataset(write(tmp_path, name, text))


def test_named_columns(tmp_path):
    path = write(tmp_path, "d.json", '[{"clip": "a.mp4", "text": "x", "video": "b.mp4"}]')
    dataset = read_dataset(path, video_column="clip", caption_column="text")
    assert str(dataset.samples[0].key) == "a.pt"
    with pytest.raises(ValueError, match=r"no column 'clips', which --video-column names"):
        read_dataset(path, video_column="clips", caption_column="text")
