import json

import pytest
from PIL import Image

from ltx_titan.metrics import plot_loss, summarize_run
from ltx_titan.metrics.summary import smooth


def write(path, **curves):
    lines = [{"step": step, **{name: values[step - 1] for name, values in curves.items()}} for step in range(1, 5)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_an_image_is_written_and_differs_with_the_data(tmp_path):
    both = write(tmp_path / "a.jsonl", loss=[4, 3, None, 1], loss_video=[2, 1, 1, 1], loss_audio=[None] * 4)
    one = write(tmp_path / "b.jsonl", loss=[4, 3, None, 1], loss_video=[None] * 4)
    plot_loss(both, tmp_path / "plots" / "a.png")
    plot_loss(one, tmp_path / "plots" / "b.png")
    images = [Image.open(tmp_path / "plots" / name).convert("RGB") for name in ("a.png", "b.png")]
    assert images[0].size == images[1].size == (1080, 600)
    assert images[0].tobytes() != images[1].tobytes()
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {"a.png", "b.png"}


def test_a_run_without_losses_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"empty\.jsonl: expected steps with a loss"):
        plot_loss(write(tmp_path / "empty.jsonl", loss=[None] * 4), tmp_path / "x.png")


def test_smoothing_starts_at_the_first_value_and_forgets():
    assert smooth((3.0, 3.0, 3.0), 0.9) == pytest.approx([3.0, 3.0, 3.0])
    assert smooth((1.0, 2.0), 0.5) == pytest.approx([1.0, (0.5 * 1 + 2) / 1.5])
    assert smooth((1.0, 7.0), 0.0) == [1.0, 7.0]


def test_the_last_lines_name_the_first_step_that_has_the_stream(tmp_path, caplog):
    write(
        tmp_path / "metrics.jsonl", loss=[None, 3.0, 2.0, 1.0], loss_video=[None] * 4, loss_audio=[None, None, 5.0, 4.0]
    )
    with caplog.at_level("INFO"):
        summarize_run(tmp_path, title="t", files={})
    assert "loss: 3.0000 at step 2, 1.0000 as" in caplog.text
    assert "audio loss: 5.0000 at step 3, 4.0000 as" in caplog.text
    assert "video loss" not in caplog.text


def test_a_run_that_learned_nothing_has_no_curve(tmp_path, caplog):
    write(tmp_path / "metrics.jsonl", loss=[None] * 4, loss_video=[None] * 4, loss_audio=[None] * 4)
    summarize_run(tmp_path, title="t", files={})
    assert not (tmp_path / "loss.png").exists()
