"""A grid of runs as one job array: trainings, then the scoring of each, then a report; submits only what is missing.

    slurm/submit.sh --launcher launchers/commonsense_llama7b.sh --runs runs/llama7b --max_running 4 \\
        --grid method=polar,lora --grid adapter.r=4,8 --grid task=boolq,piqa --grid seed=0,1 -- --num_train_epochs 3

Every run gets a folder in --runs that is named after its values. Nothing but these folders and the queue is asked for
what there is: `done.json` is a finished training, `eval_TASK/results.json` a score. What was submitted is written down
before SLURM hears of it, in RUNS/.sweep/NAME.json and NAME.sh, and the array's output file carries NAME. So whatever
interrupts a submission, the next one finds its jobs in the queue.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import fcntl
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slurm.grid import SweepError, arguments_of, read_grid, runs_of
from slurm.run_status import PLANS, Job, QueueError, jobs_of_sweep, read_plans, read_queue, table, training_jobs

ROOT = Path(__file__).resolve().parents[1]
REPORT = ("report", "report", "")  # kind, run and task of the report job


@dataclass
class Array:
    """One job array to submit.

    Attributes:
        kind: train, score or report.
        launcher: bash script that each task runs.
        items: by array index: `run`, `task` for a score, and `arguments` of the launcher.
        dependency: what sbatch waits for, empty for nothing; `{train}` stands for this submission's trainings.
        options: of sbatch.
    """

    kind: str
    launcher: Path
    items: dict[int, dict[str, Any]]
    dependency: str = ""
    options: list[str] = field(default_factory=list)


# What is missing


class Sweep:
    """A grid in a folder: what it has, what the queue holds, and what to submit.

    Args:
        args: of `main`.
        options: of every training.
        jobs: the queue.
    """

    def __init__(self, args: argparse.Namespace, options: Sequence[str], jobs: Sequence[Job]) -> None:
        self.args, self.options = args, list(options)
        self.folder = args.runs.resolve()
        self.grid_runs = runs_of(read_grid(args.grid))
        self.jobs = jobs_of_sweep(self.folder, jobs)
        self.training_jobs = training_jobs(self.folder, jobs)
        self.rows: list[list[str]] = []
        self._check_finished_runs()

    def tasks_of(self, run: str) -> list[str]:
        """Return the tasks on which a run is scored: those asked for, else its own."""
        own = self.grid_runs[run].get("task")
        return self.args.score if self.args.score is not None else [own] if own else []

    def arrays(self) -> list[Array]:
        """Decide about every run, score and the report; fills `rows`, the table of decisions."""
        args = self.args
        train = Array("train", args.launcher, {}, options=_size_options(args, ""))
        scores: dict[tuple[str, str], Array] = {}
        for run in self.grid_runs:
            decision, index = self._training(run), None
            if decision == "submit":
                index = len(train.items)
                train.items[index] = {"run": run, "arguments": self._arguments(run)}
            row = [run, decision]
            for task in self.tasks_of(run):
                decision, dependency = self._scoring(run, task, index)
                row.append(f"{task}: {decision}")
                if decision.startswith("submit"):
                    # Tasks of one array wait for those of the same index in another, so each scored task has its own.
                    key = (dependency, task if "{train}" in dependency else "")
                    array = scores.setdefault(
                        key, Array("score", args.score_launcher, {}, dependency, _size_options(args, "score_"))
                    )
                    place = len(array.items) if index is None else index
                    options = ["--tasks", task, *shlex.split(args.score_options)]
                    arguments = [str(self.folder / run), *options]
                    array.items[place] = {"run": run, "task": task, "arguments": arguments}
            self.rows.append(row)
        arrays = ([train] if train.items else []) + list(scores.values())
        return arrays + self._report(bool(arrays))

    def _arguments(self, run: str) -> list[str]:
        return [*arguments_of(self.grid_runs[run]), *self.options, "--output_dir", str(self.folder / run)]

    def _training(self, run: str) -> str:
        if (self.folder / run / "done.json").is_file():
            return "skip: finished"
        job = self.training_jobs.get(run)
        return "submit" if job is None else f"skip: {_state(job)} as {job.name}"

    def _scoring(self, run: str, task: str, index: int | None) -> tuple[str, str]:
        """Return the decision, and what the job waits for."""
        job = self.jobs.get(("score", run, task))
        if job is not None:
            return f"skip: {_state(job)} as {job.name}", ""
        if index is not None:
            return "submit, after training", "aftercorr:{train}"
        training = self.training_jobs.get(run)
        if training is not None:
            return f"submit, after {training.name}", f"afterok:{training.name}"
        if (self.folder / run / f"eval_{task}" / "results.json").is_file():
            return "skip: scored", ""
        return "submit", ""

    def _report(self, something_new: bool) -> list[Array]:
        """Return the report job: after everything else, and only where there is or will be something new to say."""
        if self.args.no_report:
            return []
        job = self.jobs.get(REPORT)
        if not something_new:
            files = [file for name in ("done.json", "eval_*/results.json") for file in self.folder.glob(f"*/{name}")]
            page = self.folder / "report" / "report.md"
            if job is not None:
                self.rows.append(["report", f"skip: {_state(job)} as {job.name}"])
            elif not files or (page.is_file() and page.stat().st_mtime >= max(f.stat().st_mtime for f in files)):
                self.rows.append(["report", "skip: nothing new"])
            else:
                something_new = True
        if not something_new:
            return []
        self.rows.append(["report", "submit, after all jobs of this sweep"])
        item = {"run": "report", "arguments": [str(self.folder)]}
        queued = sorted({job.name for key, job in self.jobs.items() if key != REPORT})
        return [Array("report", ROOT / "launchers" / "report.sh", {0: item}, ":".join(["afterany", *queued, "{all}"]))]

    def _check_finished_runs(self) -> None:
        """Refuse to take a finished run for one of other options.

        Raises:
            SweepError: names the first option that differs.
        """
        submitted = {
            item["run"]: item["arguments"]
            for plan in read_plans(self.folder).values()
            if plan["kind"] == "train"
            for item in plan["items"].values()
        }
        for run in self.grid_runs:
            before, now = submitted.get(run), self._arguments(run)
            if before is not None and before != now and (self.folder / run / "done.json").is_file():
                old, new = next(
                    pair for pair in itertools.zip_longest(before, now, fillvalue="nothing") if len(set(pair)) > 1
                )
                raise SweepError(
                    f"{self.args.runs / run} was trained with other options ({old!r}, now {new!r}): use another --runs"
                )


def _state(job: Job) -> str:
    return "queued" if job.state == "PENDING" else job.state.lower()


def _size_options(args: argparse.Namespace, prefix: str) -> list[str]:
    """Return sbatch's options for the size of a training, or with `score_` of a scoring job."""
    names = {"nodes": "nodes", "gpus_per_node": "gpus-per-node", "time": "time"}
    given = ((option, getattr(args, prefix + name)) for name, option in names.items())
    return [f"--{option}={value}" for option, value in given if value is not None]


# Submission


def submit(sweep: Sweep, arrays: Sequence[Array]) -> None:
    """Hand the arrays to SLURM in order, so that later ones can wait for earlier ones."""
    ids: dict[str, str] = {}
    for array in arrays:
        dependency = array.dependency.replace("{train}", ids.get("train", ""))
        dependency = dependency.replace("{all}", ":".join(ids.values())).rstrip(":")
        name = _free_name(sweep.folder, array.kind)
        plan = {"kind": array.kind, "launcher": str(array.launcher), "items": array.items}
        folder = sweep.folder / PLANS
        (folder / f"{name}.sh").write_text(batch_script(array, sweep.folder), encoding="utf-8")
        (folder / f"{name}.json").write_text(json.dumps(plan, indent=1) + "\n", encoding="utf-8")
        command = sbatch_command(sweep, array, name, "" if dependency == "afterany" else dependency)
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            reason = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
            raise SweepError(
                f"sbatch refuses the {array.kind} jobs: {reason}: mend the options; what is submitted stays"
            )
        job = done.stdout.strip().partition(";")[0]
        ids["train" if array.kind == "train" else name] = job
        print(f"submitted {len(array.items)} {array.kind} job{'s' * (len(array.items) > 1)} as {job}", flush=True)


def sbatch_command(sweep: Sweep, array: Array, name: str, dependency: str) -> list[str]:
    """Return the command that submits an array."""
    args, folder = sweep.args, sweep.folder / PLANS
    indices = ",".join(map(str, sorted(array.items)))
    limit = f"%{args.max_running}" if args.max_running and len(array.items) > 1 else ""
    command = ["sbatch", "--parsable", f"--job-name={name}", f"--array={indices}{limit}"]
    command += [f"--output={folder / name}.%a.out", "--kill-on-invalid-dep=yes"]
    command += [f"--dependency={dependency}"] if dependency else []
    command += [*array.options, *shlex.split(os.environ.get("POLAR_SBATCH_OPTIONS", "")), *args.sbatch]
    return [*command, str(folder / f"{name}.sh")]


def batch_script(array: Array, folder: Path) -> str:
    """Return the script of an array: the launcher's own #SBATCH lines, and what each task runs.

    Args:
        array: to submit.
        folder: of the runs; what a task prints goes to slurm-JOB.out in its run.
    """
    directives = re.findall(r"^#SBATCH .*", array.launcher.read_text(encoding="utf-8"), re.MULTILINE)
    cases = [
        f"    {index}) run={shlex.quote(item['run'])} arguments=({shlex.join(item['arguments'])}) ;;"
        for index, item in sorted(array.items.items())
    ]
    return "\n".join(
        [
            "#!/usr/bin/env bash",
            *directives,
            "set -euo pipefail",
            'case "$SLURM_ARRAY_TASK_ID" in',
            *cases,
            "esac",
            f"run={shlex.quote(str(folder))}/$run",
            'mkdir -p "$run"',
            'exec >>"$run/slurm-$SLURM_JOB_ID.out" 2>&1',
            f'exec bash {shlex.quote(str(array.launcher))} "${{arguments[@]}}"',
            "",
        ]
    )


def check_launchers(sweep: Sweep, arrays: Sequence[Array]) -> None:
    """Let each launcher look at its options, before anything is submitted.

    Raises:
        SweepError: what the launcher says.
    """
    for array in arrays:
        for item in array.items.values():
            sizes = [option.replace("gpus-per-node", "gpus_per_node") for option in array.options]
            command = ["bash", str(array.launcher), "--submit", "--dry_run", *sizes, *item["arguments"]]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            if done.returncode:
                lines = (done.stderr or done.stdout).strip().splitlines() or [f"exit code {done.returncode}"]
                raise SweepError(f"{item['run']}: {lines[-1].replace(' error: ', ' ', 1)}")


def _free_name(folder: Path, kind: str) -> str:
    """Return a name for an array, in which its time follows its kind."""
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    names = (f"{kind}-{stamp}-{number:02}" for number in itertools.count())
    return next(name for name in names if not (folder / PLANS / f"{name}.json").exists())


# The command


def main(argv: Sequence[str] | None = None) -> int:
    """Run `slurm/submit.sh`."""
    words = list(sys.argv[1:] if argv is None else argv)
    own, options = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    args = _parser().parse_args(own)
    try:
        _check(args)
        with _lock(args.runs.resolve(), args.dry_run):
            sweep = Sweep(args, options, read_queue())
            arrays = sweep.arrays()
            check_launchers(sweep, arrays)
            print(_describe(sweep), flush=True)
            if args.dry_run:
                for array in arrays:
                    print(shlex.join(sbatch_command(sweep, array, f"{array.kind}-NAME", array.dependency)))
            else:
                submit(sweep, arrays)
    except (SweepError, QueueError) as error:
        print(f"submit: error: {error}", file=sys.stderr)
        return 2
    return 0


def _describe(sweep: Sweep) -> str:
    width = max(len(row) for row in sweep.rows)
    header = ["run", "training", *["scoring"] * (width - 2)]
    return table(header, [row + [""] * (width - len(row)) for row in sweep.rows])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="submit.sh",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="What follows -- is passed to every training.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--launcher", type=Path, required=True, help="of the trainings, one of launchers/*.sh")
    add("--runs", type=Path, required=True, help="folder for the run folders and the report")
    add("--grid", action="append", required=True, metavar="KEY=V,V", help="values of an option; give one per option")
    add("--max_running", type=int, metavar="N", help="most tasks of an array that run at the same time")
    add(
        "--score",
        type=_words,
        metavar="T,T",
        help="tasks to score every run on; default: the run's own --task; '': none",
    )
    add("--score_options", default="", metavar="WORDS", help="more options of polar eval, as one word")
    add("--score_launcher", type=Path, default=ROOT / "launchers" / "score.sh", help="default: launchers/score.sh")
    add("--no_report", action="store_true", help="no report at the end")
    for prefix, what in (("", "of a training"), ("score_", "of a scoring job")):
        add(f"--{prefix}nodes", type=int, metavar="N", help=f"{what}; default: the launcher's")
        add(f"--{prefix}gpus_per_node", type=int, metavar="N", help=f"{what}; default: the launcher's")
        add(f"--{prefix}time", metavar="T", help=f"time limit {what}; default: the launcher's")
    add("--sbatch", action="append", default=[], metavar="OPT", help="any other option of sbatch, for all jobs")
    add("--dry_run", action="store_true", help="show what would be submitted, and submit nothing")
    return parser


def _words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def _check(args: argparse.Namespace) -> None:
    args.launcher, args.score_launcher = args.launcher.resolve(), args.score_launcher.resolve()
    for launcher in (args.launcher, args.score_launcher):
        if not launcher.is_file():
            raise SweepError(f"{launcher}: no such file: give a launcher of launchers/")
    if args.max_running is not None and args.max_running < 1:
        raise SweepError(f"--max_running {args.max_running}: it must be at least 1")
    if not args.dry_run and shutil.which("sbatch") is None:
        raise SweepError("there is no sbatch here: run it on a login node, or see with --dry_run what it would do")


@contextlib.contextmanager
def _lock(runs: Path, dry_run: bool) -> Iterator[None]:
    """Keep a second submission to the same folder waiting; a dry run makes no folder."""
    if dry_run:
        yield
        return
    (runs / PLANS).mkdir(parents=True, exist_ok=True)
    with (runs / PLANS / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":
    sys.exit(main())
