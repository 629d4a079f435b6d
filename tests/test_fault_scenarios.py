"""What tests/fault_scenarios.py leaves behind when it is ended: nothing."""

import os
import signal
import subprocess
import sys
import uuid
from contextlib import suppress
from pathlib import Path

import pytest

from tests.fault_runs import wait_for

_MARK = "LTX_TITAN_TEST_MARK"


def marked(mark):
    """States of the living processes that have inherited a mark, by their ids."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it ended, or is another user's
            state = (folder / "stat").read_text().rpartition(") ")[2][0]
            if state != "Z" and f"{_MARK}={mark}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                found[int(folder.name)] = state
    return found


@pytest.mark.distributed
def test_terminated_scenarios_leave_no_process_behind_not_even_a_stopped_rank(tmp_path):
    mark = uuid.uuid4().hex
    command = [sys.executable, "-m", "tests.fault_scenarios", "stop-rank-1", "--start", "fork"]
    command += ["--log", str(tmp_path / "log.jsonl"), "--steps", "100000"]
    with (tmp_path / "out.txt").open("w") as out:
        program = subprocess.Popen(command, env=os.environ | {_MARK: mark}, stdout=out, stderr=out)
    try:
        wait_for(lambda: program.poll() is not None or "T" in marked(mark).values(), "no rank is stopped")
        assert program.poll() is None, (tmp_path / "out.txt").read_text()
        program.send_signal(signal.SIGTERM)
        assert program.wait(timeout=120) == 1
        assert marked(mark) == {}
    finally:
        for process in marked(mark):
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
    assert "ended by SIGTERM" in (tmp_path / "log.jsonl").read_text()
