"""The state of every run in a folder, from its files and, where there is SLURM, from the queue.

    slurm/status.sh runs/llama7b

`done.json` says that a run is finished, `metrics.jsonl` how far it is, `job/failure.*` why a job failed, and
`eval_*/results.json` how it scored. A job belongs to the run in whose folder its output goes, or, as a task of a
sweep's job array, to the run that the sweep's plan names.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PLANS = ".sweep"  # in the folder of the runs: what `slurm/sweep.py` has submitted
STATES = ("finished", "running", "requeued", "queued", "failed", "stopped", "new")
ALIVE_S = 600  # without SLURM a run whose log is younger counts as running
TAIL_BYTES = 65536
QUEUE_FORMAT = "Name:64,ArrayJobID:24,ArrayTaskID:24,State:24,RestartCnt:12,STDOUT:4096"
LOST = ("BOOT_FAIL", "CANCELLED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT")
ABSENT = "-"


@dataclass(frozen=True)
class Job:
    """A job in the queue, or one task of a job array; `output` is the pattern of its output file."""

    title: str
    job_id: str
    task: int | None
    state: str
    restarts: int
    output: Path

    @property
    def name(self) -> str:
        """SLURM's way to write it, as in 4711 or 4711_3."""
        return self.job_id if self.task is None else f"{self.job_id}_{self.task}"


@dataclass
class RunStatus:
    """One line of the table; steps are optimizer steps, `age_s` the seconds since the log was last written."""

    name: str
    state: str = "new"
    why: str = ""
    step: int | None = None
    total: int | None = None
    loss: float | None = None
    restarts: int = 0
    age_s: float | None = None
    scores: dict[str, str] = field(default_factory=dict)


class QueueError(RuntimeError):
    """The queue cannot be read; says why."""


def read_queue() -> list[Job]:
    """Return this user's jobs, one entry per task of an array; none where there is no SLURM.

    Raises:
        QueueError: squeue fails.
    """
    if shutil.which("squeue") is None:
        return []
    command = ["squeue", "--me", "--array", "--noheader", f"--Format={QUEUE_FORMAT}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise QueueError(f"squeue: {error}") from None
    if done.returncode:
        raise QueueError(f"squeue: {done.stderr.strip()}")
    return parse_queue(done.stdout)


def parse_queue(text: str) -> list[Job]:
    """Read the lines of `squeue --Format=QUEUE_FORMAT`, whose columns have fixed widths."""
    widths = [int(column.partition(":")[2]) for column in QUEUE_FORMAT.split(",")]
    jobs = []
    for line in text.splitlines():
        cells, start = [], 0
        for width in widths:
            cells.append(line[start : start + width].strip())
            start += width
        title, job_id, task, state, restarts, output = cells
        number = int(task) if task.isdigit() else None
        jobs.append(Job(title, job_id, number, state, int(restarts or 0), Path(output)))
    return jobs


def read_plans(runs: Path) -> dict[str, dict[str, Any]]:
    """Return what was submitted for the runs of a folder: the plans by name (KIND-DATE-TIME-N), oldest first."""
    files = sorted((runs / PLANS).glob("*.json"), key=lambda file: file.name.partition("-")[2])
    return {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in files}


def jobs_of_sweep(runs: Path, jobs: Sequence[Job]) -> dict[tuple[str, str, str], Job]:
    """Return the queued and running jobs of a sweep by (kind, run, task scored)."""
    plans, found = read_plans(runs), {}
    for job in jobs:
        if job.output.parent == (runs / PLANS).resolve():
            plan = plans.get(job.output.name.partition(".")[0], {"items": {}})
            item = plan["items"].get(str(job.task))
            if item is not None:
                found[plan["kind"], item["run"], item.get("task", "")] = job
    return found


def training_jobs(runs: Path, jobs: Sequence[Job]) -> dict[str, Job]:
    """Return the queued and running training jobs by the name of their run."""
    folders = {job.output.parent: job for job in jobs if job.title not in ("score", "report")}  # names in launchers/
    found = {folder.name: job for folder, job in folders.items() if folder.parent == runs.resolve()}
    found.pop(PLANS, None)
    sweep = jobs_of_sweep(runs, jobs)
    return found | {run: job for (kind, run, _), job in sweep.items() if kind == "train"}


def read_run(folder: Path, job: Job | None = None) -> RunStatus:
    """Return what the files of a run and its job in the queue say.

    Args:
        folder: the run's output_dir.
        job: its training job, None where it has none.
    """
    status = RunStatus(folder.name)
    _read_progress(folder, status)
    status.scores = {file.parent.name.removeprefix("eval_"): _score(file) for file in _results(folder)}
    failures = sorted((folder / "job").glob("failure.*"))
    if (folder / "done.json").is_file():
        status.state = "finished"
        status.step = status.total = _read_json(folder / "done.json").get("step", status.step)
    elif job is not None:
        waits = job.state in ("PENDING", "REQUEUED", "REQUEUE_HOLD")
        status.state = "running" if not waits else "requeued" if job.restarts else "queued"
        status.why = f"job {job.name}"
    elif failures:
        status.state, status.why = "failed", _text(failures[0]).strip().partition(" ")[2]
    elif status.step is not None or any(folder.glob("checkpoint-*")):
        lost = _lost_job(folder)
        alive = shutil.which("squeue") is None and status.age_s is not None and status.age_s < ALIVE_S
        status.state = "running" if alive else "failed" if lost else "stopped"
        status.why = lost or ""
    return status


def _read_progress(folder: Path, status: RunStatus) -> None:
    metrics = folder / "metrics.jsonl"
    config = _yaml_numbers(folder / "config.yaml")
    if int(config.get("max_steps", -1)) > 0:
        status.total = int(config["max_steps"])
    status.restarts = len(_read_json(folder / "provenance.json").get("resumed", []))
    if not metrics.is_file():
        return
    status.age_s = max(time.time() - metrics.stat().st_mtime, 0)
    epoch = None
    for line in _tail(metrics):
        status.step = int(line.get("step", status.step or 0))
        status.loss = line.get("loss", status.loss)
        epoch = line.get("epoch", epoch)
    if status.total is None and status.step and epoch and "num_train_epochs" in config:
        status.total = round(status.step * config["num_train_epochs"] / epoch)


def _tail(file: Path) -> list[dict[str, Any]]:
    """Return the entries in the last 64 KiB of a file of JSON lines; a line that is being written does not count."""
    with file.open("rb") as stream:
        stream.seek(max(file.stat().st_size - TAIL_BYTES, 0))
        lines = stream.read().splitlines()
    entries = []
    for line in lines:
        try:
            entries.append(json.loads(line))
        except ValueError:
            continue
    return [entry for entry in entries if isinstance(entry, dict)]


def _results(folder: Path) -> list[Path]:
    return sorted(folder.glob("eval_*/results.json"))


def _score(file: Path) -> str:
    """Return the headline of a result in per cent, e.g. "84.0"; "?" for a file that says it in no known way."""
    result = _read_json(file)
    summary = result.get("filters", {}).get(result.get("headline"), {})
    for value in (summary.get("exact_match"), summary.get("acc"), result.get("score")):
        if isinstance(value, (int, float)):
            return f"{100 * value:.1f}"
    return "?"


def _lost_job(folder: Path) -> str | None:
    """Ask SLURM's accounting, where there is any, how the run's last job ended; None if it was not lost."""
    outputs = [re.fullmatch(r"slurm-(\d+)\.out", path.name) for path in folder.glob("slurm-*.out")]
    numbers = [int(match[1]) for match in outputs if match]
    if not numbers or shutil.which("sacct") is None:
        return None
    command = ["sacct", "--allocations", "--noheader", "--parsable2", "--format=State", f"--jobs={max(numbers)}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    state = done.stdout.strip().partition("\n")[0]
    return f"job {max(numbers)}: {state}" if state.startswith(LOST) else None


def _yaml_numbers(file: Path) -> dict[str, float]:
    """Return the top-level `key: number` lines of a run's config.yaml."""
    found = re.findall(r"^(\w+): *(-?\d+(?:\.\d+)?) *$", _text(file), re.MULTILINE)
    return {key: float(value) for key, value in found}


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(_text(file) or "{}")
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


# The table


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return lines whose columns are as wide as their widest cell."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = ["  ".join(row[column].ljust(width) for column, width in enumerate(widths)) for row in [header, *rows]]
    return "\n".join(line.rstrip() for line in lines)


def describe(runs: Sequence[RunStatus]) -> str:
    """Return the table of all runs and how many are in which state."""
    tasks = list(dict.fromkeys(task for run in runs for task in run.scores))
    rows = []
    for run in runs:
        total = ABSENT if run.total is None else str(run.total)
        progress = ABSENT if run.step is None else f"{run.step}/{total}"
        loss = ABSENT if run.loss is None else f"{run.loss:.4f}"
        scores = [run.scores.get(task, ABSENT) for task in tasks]
        rows.append([run.name, run.state, progress, loss, str(run.restarts), _age(run.age_s), *scores, run.why])
    header = ["run", "state", "step", "loss", "restarts", "last log", *tasks, ""]
    states = [run.state for run in runs]
    counts = ", ".join(f"{states.count(state)} {state}" for state in STATES if state in states)
    return table(header, rows) + f"\n{len(runs)} runs: {counts}"


def _age(seconds: float | None) -> str:
    if seconds is None:
        return ABSENT
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"


def all_runs(runs: Path, jobs: Mapping[str, Job]) -> list[RunStatus]:
    """Return the state of every run in a folder: those with files, those in a sweep's plans, those in the queue."""
    planned = [
        item["run"] for plan in read_plans(runs).values() if plan["kind"] == "train" for item in plan["items"].values()
    ]
    with_files = [path.parent.name for name in ("config.yaml", "done.json") for path in runs.glob(f"*/{name}")]
    return [read_run(runs / name, jobs.get(name)) for name in sorted({*planned, *with_files, *jobs})]


def main(argv: Sequence[str] | None = None) -> int:
    """Run `slurm/status.sh`."""
    parser = argparse.ArgumentParser(prog="status.sh", description="Show the state of all runs in a folder.")
    parser.add_argument("runs", metavar="RUNS", type=Path, help="folder that holds run folders")
    args = parser.parse_args(argv)
    if not args.runs.is_dir():
        parser.error(f"{args.runs}: no such folder")
    try:
        queue = read_queue()
    except QueueError as error:
        print(f"status: without the queue: {error}", file=sys.stderr)
        queue = []
    found = all_runs(args.runs, training_jobs(args.runs, queue))
    if not found:
        parser.error(f"{args.runs}: no run in it: give the folder that holds the runs' folders")
    print(describe(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
