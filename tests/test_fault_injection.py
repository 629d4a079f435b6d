"""The short form of tests/fault_injection.py, and signals to the launcher."""

import multiprocessing
import os
import signal
import sys
import traceback

import pytest

from tests import fault_injection
from tests.fault_injection import Campaign, become_subreaper
from tests.fault_runs import Run, wait_for
from tests.jobs import read_run


def run_alone(work, log, *arguments):
    """Runs `work` in a process of its own, forked from the server that has the trainer imported."""
    process = multiprocessing.get_context("forkserver").Process(target=_body, args=(work, log, *arguments))
    process.start()
    process.join()
    assert process.exitcode == 0, log.read_text()[-6000:]


def _body(work, log, *arguments):
    sys.stdout = sys.stderr = log.open("w", buffering=1)
    code = 1
    try:
        code = work(*arguments)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code or 0)


@pytest.mark.distributed
def test_a_run_that_is_killed_and_restarted_equals_an_unbroken_one(tmp_path):
    arguments = ["--kills", "2", "--seed", "1", "--mesh", "1", "--steps", "8", "--restarts"]
    arguments += ["--folder", str(tmp_path), "--log", str(tmp_path / "kills.jsonl")]
    run_alone(fault_injection.main, tmp_path / "log", arguments)
    assert "2 kills survived" in (tmp_path / "log").read_text()


def stop_by(folder):
    """Stops one job by one signal after another, each sent to its launcher; every launch resumes."""
    become_subreaper()
    job = Campaign(folder, "fork", 100_000, None).write_job("stopped", "1")
    saved = 0
    for number in (signal.SIGINT, signal.SIGHUP):
        run = Run(job, "1", "fork")
        try:
            wait_for(lambda run=run, saved=saved: run.has_ended() or run.phase()[1] > saved, "no step")
            os.kill(run.launchers[0], number)
            run.wait_until_gone()
        finally:
            run.end()
        text, saved = run.text(), read_run(job)[-1]["step"]
        # The launcher passes Ctrl-C on as SIGTERM.
        name = {signal.SIGINT: "SIGTERM"}.get(number, number.name)
        assert list(run.codes.values()) == [0], text
        assert f"received {name}: saved and stopped after step {saved}" in text
        assert "Traceback" not in text
        assert (job.parent / "run" / "checkpoint" / f"step-{saved}").is_dir()
    run = Run(job, "1", "fork")
    try:
        wait_for(lambda: run.has_ended() or run.phase()[1] > saved, "no step")
        # A rank that is stopped cannot save, as one in a step that takes an hour.
        os.kill(run.ranks()[0], signal.SIGSTOP)
        os.kill(run.launchers[0], signal.SIGINT)
        wait_for(lambda: run.has_ended() or "press Ctrl-C again" in run.text(), "no answer to Ctrl-C")
        os.kill(run.launchers[0], signal.SIGINT)
        run.wait_until_gone()
    finally:
        run.end()
    assert list(run.codes.values()) == [130], run.text()
    assert "Traceback" not in run.text()
    assert run.text().count("ended by SIGINT") == 1
    assert (job.parent / "run" / "checkpoint" / f"step-{saved}").is_dir() or run.text().count("is complete")


@pytest.mark.distributed
def test_ctrl_c_and_hangup_at_the_launcher_save_and_a_second_ctrl_c_ends_at_once(tmp_path):
    run_alone(stop_by, tmp_path / "log", tmp_path)
