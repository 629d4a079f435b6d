import pytest

from ltx_titan.common.files import atomic_write, write_text


def test_a_file_is_replaced_when_it_is_complete(tmp_path):
    path = tmp_path / "new folder" / "rows.json"
    write_text(path, "old\n")
    with atomic_write(path, suffix=".json") as temporary:
        temporary.write_text("new\r\n", newline="")
        assert path.read_text() == "old\n"
        assert temporary.suffix == ".json"
    assert path.read_bytes() == b"new\r\n"
    assert list(path.parent.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "rows.json"
    write_text(path, "old")

    def fail():
        with atomic_write(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
