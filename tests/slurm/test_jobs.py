"""Real jobs on two nodes, one gloo rank on each: the metamath launcher, the recipe's variant `tiny`, ZeRO-3."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.slurm.cluster import Cluster, Job

STEPS = 12


@dataclass(frozen=True)
class Jobs:
    """What the jobs of `jobs` were and how they ended."""

    whole: Job
    preempted: Job
    both_ran: bool
    killed: Job
    seconds_to_fail: float
    states: dict[str, str]


@pytest.fixture(scope="module")
def jobs(cluster: Cluster, tiny_gemma3: Path, query_rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    """A whole and a preempted job side by side on both nodes, then one that loses a rank."""
    runs = tmp_path_factory.mktemp("runs")
    settings = [
        *("--variant", "tiny", "--model_name_or_path", str(tiny_gemma3), "--train_dataset", str(query_rows)),
        *("--dtype", "float32", "--use_cpu", "true", "--max_train_rows", "null", "--max_steps", str(STEPS)),
        *("--save_steps", "100", "--eval_steps", "100"),
    ]

    def submit(name: str, *options: str) -> Job:
        return cluster.submit("metamath_gemma27b", *settings, *options, run=runs / name)

    # Warned 900 s ahead of a limit of 180 s: at once, which in SLURM means within 30 s.
    preempted = submit("preempted", "--no_preflight", "--time", "3")
    whole = submit("whole")
    cluster.wait_for_line(preempted, r"step +1/|USR2: asking")
    both_ran = cluster.fields(whole)["JobState"] == cluster.fields(preempted)["JobState"] == "RUNNING"
    _hold_until_warned(cluster, preempted)
    cluster.wait_for_restart(preempted)
    cluster.run("scontrol", "update", f"JobId={preempted.number}", "TimeLimit=60")  # no further warning
    cluster.wait_for_line(preempted, r"resuming from (?s:.*)step +\d+/")
    cluster.run("scontrol", "requeue", str(preempted.number))
    states = {"whole": cluster.wait_for_end(whole)}
    killed = submit("killed", "--no_preflight", "--max_steps", "1000")
    cluster.wait_for_line(killed, r"step +1/")
    os.kill(cluster.ranks(killed)[1], signal.SIGKILL)
    start = time.monotonic()
    states["killed"] = cluster.wait_for_end(killed)
    seconds = time.monotonic() - start
    states["preempted"] = cluster.wait_for_end(preempted)
    return Jobs(whole, preempted, both_ran, killed, seconds, states)


def _hold_until_warned(cluster: Cluster, job: Job) -> None:
    """On a fast machine the run would be over before SLURM's warning."""
    held = list(cluster.ranks(job).values()) if "USR2: asking" not in job.log else []
    for process in held:
        os.kill(process, signal.SIGSTOP)
    cluster.wait_for_line(job, "USR2: asking")
    for process in held:
        os.kill(process, signal.SIGCONT)


def _assert_equal(run: Path, expected: Path) -> None:
    """Same adapter, same last checkpoint bit for bit, every step logged once."""
    for name in ("adapter/adapter_model.safetensors", f"checkpoint-{STEPS}/training_state.safetensors"):
        found, wanted = load_file(run / name), load_file(expected / name)
        assert found.keys() == wanted.keys()
        assert [key for key, value in wanted.items() if not torch.equal(found[key], value)] == []
    lines = [(folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines() for folder in (run, expected)]
    found_losses, losses = ([(r["step"], r["loss"]) for r in map(json.loads, part) if "loss" in r] for part in lines)
    assert found_losses == losses
    assert [step for step, _ in losses] == list(range(1, STEPS + 1))


def test_a_job_trains_on_both_nodes_after_a_preflight(jobs: Jobs) -> None:
    assert jobs.states["whole"] == "COMPLETED"
    assert re.search(r"preflight of 2 ranks \(polar-n0: 0, polar-n1: 1\)", jobs.whole.log)
    done = json.loads((jobs.whole.run / "done.json").read_text())
    assert (done["step"], done["world_size"], done["num_starts"]) == (STEPS, 2, 1)
    provenance = json.loads((jobs.whole.run / "provenance.json").read_text())
    assert provenance["engine"] == "DeepSpeed ZeRO-3"
    watched = {path.name for path in (jobs.whole.run / "job").glob("system.*")}
    assert watched == {"system.polar-n0.jsonl", "system.polar-n1.jsonl"}


def test_two_jobs_at_once_on_the_same_nodes_do_not_meet(jobs: Jobs) -> None:
    assert jobs.both_ran
    assert jobs.states["whole"] == jobs.states["preempted"] == "COMPLETED"


def test_a_job_short_of_time_saves_and_requeues_itself(jobs: Jobs) -> None:
    assert re.search(r"stopped at step \d+ of 12 by the file of POLAR_STOP_FILE", jobs.preempted.log)
    assert re.search(r"stopped by USR2 at step \d+; job \d+ requeues itself", jobs.preempted.log)
    assert not list((jobs.preempted.run / "job").glob("stop.*"))  # nothing that a later start would take for a request


def test_a_job_that_slurm_requeues_saves_within_its_grace(jobs: Jobs) -> None:
    assert re.search(r"stopped at step \d+ of 12 by SIGTERM", jobs.preempted.log)


def test_a_job_preempted_in_both_ways_ends_as_if_undisturbed(jobs: Jobs) -> None:
    assert jobs.states["preempted"] == "COMPLETED"
    assert jobs.preempted.log.count("resuming from") == 2  # all starts in one log: it is appended to
    assert json.loads((jobs.preempted.run / "done.json").read_text())["num_starts"] == 3
    _assert_equal(jobs.preempted.run, jobs.whole.run)


def test_a_killed_rank_ends_its_job_and_the_log_ends_with_host_and_reason(jobs: Jobs) -> None:
    assert jobs.states["killed"] == "FAILED"
    assert jobs.seconds_to_fail < 60
    last = jobs.killed.log.strip().splitlines()[-2:]
    assert any(line.endswith("node polar-n1, process 1, was ended by signal 9 (SIGKILL)") for line in last), last
    assert not (jobs.killed.run / "done.json").exists()
