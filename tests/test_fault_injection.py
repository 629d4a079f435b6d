"""The short form of tests/fault_injection.py."""

import multiprocessing
import os
import sys

import pytest

from tests import fault_injection


def campaign(arguments, log):
    """In a process of its own, because it makes itself the parent of every orphan."""
    sys.stdout = sys.stderr = log.open("w", buffering=1)
    os._exit(fault_injection.main(arguments))


@pytest.mark.distributed
def test_a_run_that_is_killed_and_restarted_equals_an_unbroken_one(tmp_path):
    arguments = ["--kills", "3", "--seed", "1", "--mesh", "1", "--steps", "8", "--restarts"]
    arguments += ["--folder", str(tmp_path), "--log", str(tmp_path / "kills.jsonl")]
    # Forked from the server that has the trainer imported.
    process = multiprocessing.get_context("forkserver").Process(target=campaign, args=(arguments, tmp_path / "log"))
    process.start()
    process.join()
    assert process.exitcode == 0, (tmp_path / "log").read_text()[-6000:]
    assert "3 kills survived" in (tmp_path / "log").read_text()
