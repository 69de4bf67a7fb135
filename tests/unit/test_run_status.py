"""The state of runs from plain files and from squeue's lines; with a real SLURM: tests/slurm/test_sweep.py."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from slurm import run_status
from slurm.run_status import Job, all_runs, describe, parse_queue, read_run, training_jobs


def make_run(folder: Path, **files: str) -> Path:
    """Write files into a run folder; `__` in a name is a slash."""
    for name, text in ({"config.yaml": "max_steps: -1\nnum_train_epochs: 2\n"} | files).items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def metrics(*entries: dict[str, float]) -> str:
    return "".join(json.dumps(entry) + "\n" for entry in entries)


def test_progress_and_scores(tmp_path: Path) -> None:
    lines = metrics({"step": 5, "epoch": 0.25, "loss": 2.0}, {"step": 10, "epoch": 0.5, "loss": 1.5}, {"step": 10})
    result = json.dumps({"headline": "strict", "filters": {"strict": {"exact_match": 0.84}}})
    folder = make_run(
        tmp_path / "a",
        **{
            "metrics.jsonl": lines + '{"step": 15, "lo',  # being written
            "provenance.json": json.dumps({"resumed": [{}, {}]}),
            "eval_gsm8k__results.json": result,
        },
    )
    status = read_run(folder)
    assert (status.step, status.total, status.loss, status.restarts) == (10, 40, 1.5, 2)
    assert status.scores == {"gsm8k": "84.0"} and status.age_s is not None and status.age_s < 60
    (folder / "config.yaml").write_text("max_steps: 25\n")
    assert read_run(folder).total == 25


def test_a_long_log_is_read_from_its_end(tmp_path: Path) -> None:
    lines = metrics(*({"step": step, "epoch": step / 1000, "loss": 1 / step} for step in range(1, 5001)))
    status = read_run(make_run(tmp_path / "a", **{"metrics.jsonl": lines}))
    assert (status.step, status.total) == (5000, 2000 // 1000 * 1000)


def test_states(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(run_status.shutil, "which", lambda name: None)
    log = metrics({"step": 3, "loss": 1.0})
    old = time.time() - 2 * run_status.ALIVE_S
    failure = "1795637554 node n1, process 3, was ended by signal 9 (SIGKILL)\n"
    done = make_run(tmp_path / "done", **{"metrics.jsonl": log, "done.json": '{"step": 7}', "job__failure.0": failure})
    failed = make_run(tmp_path / "failed", **{"metrics.jsonl": log, "job__failure.0": failure})
    stopped = make_run(tmp_path / "stopped", **{"metrics.jsonl": log})
    os.utime(stopped / "metrics.jsonl", (old, old))
    make_run(tmp_path / "alive", **{"metrics.jsonl": log})
    job = Job("tiny", "4711", 3, "PENDING", 0, Path("/x"))
    states = {path.name: read_run(path).state for path in tmp_path.iterdir()}
    assert states == {"done": "finished", "failed": "failed", "stopped": "stopped", "alive": "running"}
    assert read_run(done).step == 7
    assert read_run(failed).why == "node n1, process 3, was ended by signal 9 (SIGKILL)"
    assert (read_run(failed, job).state, read_run(failed, job).why) == ("queued", "job 4711_3")
    assert read_run(stopped, Job("tiny", "4711", None, "PENDING", 1, Path("/x"))).state == "requeued"
    assert read_run(stopped, Job("tiny", "4711", None, "RUNNING", 1, Path("/x"))).state == "running"
    assert read_run(tmp_path / "absent").state == "new"


def test_jobs_of_launchers_and_of_sweeps(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    make_run(runs / "by_hand")
    plan = {"kind": "train", "items": {"0": {"run": "lr1"}, "1": {"run": "lr2"}}}
    (runs / ".sweep").mkdir()
    (runs / ".sweep" / "train-1.json").write_text(json.dumps(plan))
    columns = [
        ("tiny", "10", "N/A", "RUNNING", "1", f"{runs}/by_hand/slurm-%j.out"),
        ("score", "11", "N/A", "RUNNING", "0", f"{runs}/scored/slurm-%j.out"),
        ("train-1", "12", "1", "PENDING", "0", f"{runs}/.sweep/train-1.%a.out"),
        ("other", "13", "1", "PENDING", "0", "/home/x/slurm-%j.out"),
    ]
    widths = [int(column.partition(":")[2]) for column in run_status.QUEUE_FORMAT.split(",")]
    text = "\n".join("".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in columns)
    jobs = training_jobs(runs, parse_queue(text))
    assert {run: job.name for run, job in jobs.items()} == {"by_hand": "10", "lr2": "12_1"}
    states = {run.name: run.state for run in all_runs(runs, jobs)}
    assert states == {"by_hand": "running", "lr1": "new", "lr2": "queued"}


def test_table(tmp_path: Path) -> None:
    done = run_status.RunStatus("lr1", "finished", "", 40, 40, 0.5, 1, 7300.0, {"boolq": "70.1"})
    lines = describe([done, run_status.RunStatus("lr2", "queued", "job 5_1")]).splitlines()
    assert lines[0].split() == ["run", "state", "step", "loss", "restarts", "last", "log", "boolq"]
    assert lines[1].split() == ["lr1", "finished", "40/40", "0.5000", "1", "2", "h", "ago", "70.1"]
    assert lines[2].split() == ["lr2", "queued", "-", "-", "0", "-", "-", "job", "5_1"]
    assert lines[3] == "2 runs: 1 finished, 1 queued"
