from ltx_titan.config.sections import MetricsSection
from ltx_titan.metrics import MetricsLogger, StepMetrics, start_wandb
from tests.wandb_records import history, run_folders

OFFLINE = MetricsSection(wandb="offline", wandb_project="films", wandb_tags=("ltx",))


def log(folder, steps, resumed_step=0):
    run = start_wandb(OFFLINE, folder, {"training": {"steps": 9}}, "a test")
    logger = MetricsLogger(folder, total_steps=9, resumed_step=resumed_step, tensorboard=False, wandb=run)
    for step in steps:
        logger.log(StepMetrics(step, loss=float(step), extra={"held_out/total": 2.0}))
    logger.close()
    return run


def test_a_job_is_one_run_that_a_resumed_job_goes_on_in(tmp_path):
    first = log(tmp_path / "film", [1, 2, 3])
    again = log(tmp_path / "film", [3, 4], resumed_step=2)
    assert first.id == again.id
    assert (first.project, first.name, first.notes) == ("films", "film", "a test")
    assert first.config["training"] == {"steps": 9}
    rows = [
        [(row["step"], row["loss/total"], row["held_out/total"]) for row in history(run)]
        for run in run_folders(tmp_path / "film")
    ]
    # Step 3 comes twice, as it was trained twice.
    assert rows == [[(1, 1.0, 2.0), (2, 2.0, 2.0), (3, 3.0, 2.0)], [(3, 3.0, 2.0), (4, 4.0, 2.0)]]


def test_jobs_are_runs_of_their_own(tmp_path):
    assert log(tmp_path / "a", [1]).id != log(tmp_path / "b", [1]).id
