import logging
import time

from ltx_titan.common.progress import ProgressLog


def test_long_work_logs_how_much_is_done_and_left_every_ten_seconds(monkeypatch, caplog):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    progress = ProgressLog("loading weights", 40 * 2**30, "GiB")
    with caplog.at_level(logging.INFO):
        for _ in range(40):
            now[0] += 3
            progress.advance(2**30)
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0] == "loading weights: 4.0 of 40.0 GiB, 1:48 left"
    assert lines[-1] == "loading weights: 36.0 of 40.0 GiB, 0:12 left"
    assert len(lines) == 9


def test_short_work_logs_nothing(caplog):
    progress = ProgressLog("sampling", 3)
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            progress.advance()
    assert not caplog.records
