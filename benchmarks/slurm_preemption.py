"""What does one preemption cost, and does a run that is preempted again and again end where it would have ended?

A SLURM of two nodes starts on this machine (slurm/local_cluster.sh). The demo's tiny Gemma-3 trains under ZeRO-3 as a
real batch job, one rank per node, with dropout and a validation set: once undisturbed, once preempted at moments drawn
from a seed, a few steps after the start and in the middle of whatever happens then, each time in one of two ways:

    usr2      SIGUSR2 to the batch shell, as SLURM sends it ahead of a time limit: the job requeues itself
    requeue   scontrol requeue: SLURM sends SIGTERM to everything and requeues the job

SLURM's own pause before a requeued job may start again (2 minutes, here shortened) is left out. At the end adapter,
last checkpoint and every logged number are compared with the undisturbed run: they must be equal bit for bit.

Usage: python benchmarks/slurm_preemption.py [--preemptions 20] [--seed 0] [--out FILE]      as root, on Debian
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.record import ROOT, environment, publish, summary
from benchmarks.resume_soak import ROWS, compare, settings
from demo.problems import SEEN_KINDS, problems
from tests.slurm.cluster import Cluster, Job

MOST_STEPS = 4  # of one start before the next preemption
DEADLINE_S = 900


def submit(cluster: Cluster, arguments: list[str], run: Path) -> Job:
    """Submit the run through the launcher of the 27B job, with the settings of the tiny one."""
    options = ["--recipe", "gsm8k_tiny", "--no_preflight", *arguments]
    return cluster.submit("metamath_gemma27b", *options, run=run)


def steps(job: Job) -> list[int]:
    """Return the steps that the job has printed over all its starts."""
    return [int(step) for step in re.findall(r"^step +(\d+)/\d+ .* loss .* lr ", job.log, re.MULTILINE)]


def wait(cluster: Cluster, job: Job, reached: Callable[[], bool]) -> float:
    """Return the time at which `reached` became true.

    Raises:
        RuntimeError: the job ended before, or nothing happened.
    """
    deadline = time.monotonic() + DEADLINE_S
    while not reached():
        if time.monotonic() > deadline or (cluster.ended_state(job) and not reached()):
            raise RuntimeError(f"{cluster.fields(job)}: {job.log[-3000:]}")
        time.sleep(0.05)
    return time.monotonic()


def measure_start(cluster: Cluster, arguments: list[str], run: Path) -> tuple[Job, dict[str, float]]:
    """Submit a job and time it up to its first step."""
    begin = time.monotonic()
    job = submit(cluster, arguments, run)
    submitted = time.monotonic()
    first_line = wait(cluster, job, lambda: "recipe  " in job.log)
    first_step = wait(cluster, job, lambda: bool(steps(job)))
    return job, {
        "sbatch_returns_s": round(submitted - begin, 2),
        "to_the_runs_description_s": round(first_line - begin, 1),
        "to_the_first_step_s": round(first_step - begin, 1),
    }


def preempt(cluster: Cluster, job: Job, draw: random.Random, seen: int) -> dict[str, Any]:
    """Preempt a job once and wait for the first step of its next start.

    Args:
        cluster: runs it.
        job: has printed the first step of its present start.
        draw: of the moment and the way.
        seen: steps that it had printed before that start.
    """
    more, delay, way = draw.randint(1, MOST_STEPS), draw.random(), draw.choice(["usr2", "requeue"])
    wait(cluster, job, lambda: len(steps(job)) >= seen + more)
    time.sleep(delay)
    begin = time.monotonic()
    stops = job.log.count("\nstopped at step ")
    if way == "usr2":
        cluster.run("scancel", "--batch", "--signal=USR2", str(job.number))
    else:
        cluster.run("scontrol", "requeue", str(job.number))
    saved = wait(cluster, job, lambda: job.log.count("\nstopped at step ") > stops)
    at_stop = len(steps(job))
    ended = wait(cluster, job, lambda: cluster.fields(job)["JobState"] == "PENDING")
    began = wait(cluster, job, lambda: cluster.fields(job)["JobState"] == "RUNNING")
    resumed = wait(cluster, job, lambda: len(steps(job)) > at_stop)
    result = {
        "way": way,
        "steps_of_this_start": at_stop - seen,
        "stopped_at_step": steps(job)[at_stop - 1],
        "resumed_with_step": steps(job)[at_stop],
        "saved_after_s": round(saved - begin, 2),
        "ended_after_s": round(ended - begin, 1),
        "started_to_first_step_s": round(resumed - began, 1),
        "lost_s": round((ended - begin) + (resumed - began), 1),
    }
    print(json.dumps(result), file=sys.stderr, flush=True)
    return result


def run_benchmark(cluster: Cluster, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Run both jobs and return what was found."""
    draw, num_steps = random.Random(args.seed), 10 * args.preemptions
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(p.row()) + "\n" for p in islice(problems(SEEN_KINDS, args.seed), ROWS)))
    arguments = settings(rows, num_steps)
    reference, start = measure_start(cluster, arguments, folder / "reference")
    begin = time.monotonic()
    if cluster.wait_for_end(reference) != "COMPLETED":
        raise RuntimeError(reference.log[-3000:])
    reference_s = time.monotonic() - begin
    print(json.dumps(start), f"reference: {reference_s:.0f} s from the first step", file=sys.stderr, flush=True)
    job = submit(cluster, arguments, folder / "run")
    preemptions: list[dict[str, Any]] = []
    for _ in range(args.preemptions):
        seen = sum(p["steps_of_this_start"] for p in preemptions)
        preemptions.append(preempt(cluster, job, draw, seen))
    state = cluster.wait_for_end(job)
    return {
        **environment(),
        "load_average": [round(load, 1) for load in os.getloadavg()],
        "nodes": 2,
        "ranks": 2,
        "steps": num_steps,
        "job_ended": state,
        "from_sbatch": start,
        "reference_first_to_last_step_s": round(reference_s, 1),
        "num_preemptions": len(preemptions),
        "by_way": dict(Counter(p["way"] for p in preemptions)),
        "equal_bit_for_bit": compare(folder / "run", folder / "reference", num_steps),
        "steps_repeated": len(steps(job)) - len(set(steps(job))),
        "saved_after_s": summary([p["saved_after_s"] for p in preemptions]),
        "lost_s": summary([p["lost_s"] for p in preemptions]),
        "preemptions": preemptions,
    }


def main() -> None:
    """Start a cluster, run the benchmark on it, end the cluster."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preemptions", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="polar-slurm-", dir="/tmp") as temporary:
        home = Path(temporary) / "cluster"
        os.environ["POLAR_SLURM_HOME"] = str(home)
        local_cluster = ["bash", str(ROOT / "slurm" / "local_cluster.sh")]
        if subprocess.run([*local_cluster, "up"], stdout=sys.stderr).returncode != 0:
            sys.exit(2)
        try:
            result = run_benchmark(Cluster(home), Path(temporary), args)
        finally:
            subprocess.run([*local_cluster, "down"], stdout=sys.stderr)
    publish(result, args.out)
    if not all(result["equal_bit_for_bit"].values()) or result["job_ended"] != "COMPLETED" or result["steps_repeated"]:
        sys.exit("not what was promised")


if __name__ == "__main__":
    main()
