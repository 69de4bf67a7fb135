"""When a job requeues itself and when it must not. In place of the trainer: a program that stops as it is told to."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, Job

# Waits for the stop file, leaves a checkpoint of the given step and ends. Arguments are those of torchrun.
TRAINER = """#!/usr/bin/env bash
case $2 in *monitor.py) exit ;; esac
trap : TERM
for argument in "$@"; do if [ "$previous" = --output_dir ]; then run=$argument; fi; previous=$argument; done
echo started
until [ -e "$POLAR_STOP_FILE" ]; do sleep 0.1; done
mkdir -p "$run/checkpoint-$SAVE_STEP" && touch "$run/checkpoint-$SAVE_STEP/checkpoint.json"
exit "$EXIT_CODE"
"""


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("bin") / "python"
    path.write_text(TRAINER, encoding="utf-8")
    path.chmod(0o755)
    return str(path)


def _stopped(cluster: Cluster, trainer: str, run: Path, *, save_step: int, exit_code: int = 0) -> Job:
    (run / "checkpoint-3").mkdir(parents=True)
    (run / "checkpoint-3" / "checkpoint.json").touch()
    variables = {"POLAR_PYTHON": trainer, "SAVE_STEP": str(save_step), "EXIT_CODE": str(exit_code)}
    job = cluster.submit("metamath_gemma27b", "--variant", "tiny", "--no_preflight", run=run, **variables)
    cluster.wait_for_line(job, "started")
    return job


def test_a_stop_without_progress_is_an_error_not_a_loop(cluster: Cluster, trainer: str, tmp_path: Path) -> None:
    job = _stopped(cluster, trainer, tmp_path / "run", save_step=3)
    cluster.run("scancel", "--batch", "--signal=USR2", str(job.number))
    assert cluster.wait_for_end(job) == "FAILED"
    assert cluster.fields(job)["Restarts"] == "0"
    assert "error: stopped by USR2 before a step beyond 3 was saved" in job.log.splitlines()[-1]


def test_a_trainer_that_fails_while_it_stops_is_not_requeued(cluster: Cluster, trainer: str, tmp_path: Path) -> None:
    job = _stopped(cluster, trainer, tmp_path / "run", save_step=4, exit_code=7)
    cluster.run("scancel", "--batch", "--signal=USR2", str(job.number))
    assert cluster.wait_for_end(job) == "FAILED"
    assert cluster.fields(job)["Restarts"] == "0"
    assert "node polar-n" in job.log.splitlines()[-1]
    assert "exit code 7" in job.log


def test_a_cancelled_job_does_not_come_back(cluster: Cluster, trainer: str, tmp_path: Path) -> None:
    job = _stopped(cluster, trainer, tmp_path / "run", save_step=4)
    cluster.run("scancel", str(job.number))
    assert cluster.wait_for_end(job) == "CANCELLED"
    assert cluster.fields(job)["Restarts"] == "0"
    assert "requeues itself" not in job.log


def test_a_job_asked_by_term_requeues_itself_as_by_usr2(cluster: Cluster, trainer: str, tmp_path: Path) -> None:
    job = _stopped(cluster, trainer, tmp_path / "run", save_step=4)
    cluster.run("scancel", "--batch", "--signal=TERM", str(job.number))
    cluster.wait_for_line(job, "stopped by TERM at step 4; job [0-9]+ requeues itself")
    cluster.wait_for_restart(job)
    assert cluster.fields(job)["Restarts"] == "1"
    cluster.run("scancel", str(job.number))
