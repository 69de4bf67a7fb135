"""Does a run that loses one rank after another end where it would have ended?

A tiny Gemma-3 (demo/base) trains under ZeRO-3 on two ranks, started by the deepspeed launcher, with dropout, a
validation set and a checkpoint every 5 steps. A random rank is killed (SIGKILL) again and again, at a moment drawn from
a seed:

    start   after a random part of the time from the start of the ranks to their first step, at the latest then
    step    a random number of steps after the first one, and a random part of a second later
    save    while a checkpoint is being written: a random moment after its temporary folder has appeared

Each time the job must end with an error, and the same command with --resume must continue from the newest checkpoint.
At the end the adapter, the last checkpoint's values and moments, and all logged losses are compared with a run that
nobody killed: they must be equal bit for bit. Linux only (reads /proc).

Usage: python benchmarks/resume_soak.py [--kills 20] [--steps 200] [--seed 0] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.record import ROOT, environment, publish, summary
from demo.problems import SEEN_KINDS, problems
from polar.checkpoint import list_checkpoints, step_of

RANKS, SAVE_STEPS, ROWS = 2, 5, 88  # 8 rows validate, 80 are 20 steps of 4
SAVE_S = 0.05  # a kill during a save comes within this time of its beginning
DEADLINE_S = 600  # for one start to reach what a kill waits for, and for a job to end
MOMENTS = {"start": 0.15, "step": 0.45, "save": 0.4}


def settings(rows: Path, steps: int) -> list[str]:
    """The run, without its folder."""
    return [
        *("--model_name_or_path", str(ROOT / "demo" / "base"), "--dtype", "float32", "--train_dataset", str(rows)),
        *(
            "--template",
            "question_answer",
            "--val_split",
            "8",
            "--eval_steps",
            str(SAVE_STEPS),
            "--max_steps",
            str(steps),
        ),
        *("--adapter.r", "8", "--adapter.target_modules", '["q_proj", "v_proj"]', "--adapter.dropout", "0.1"),
        *("--global_batch_size", "4", "--per_device_train_batch_size", "2", "--learning_rate", "5e-3"),
        *("--save_steps", str(SAVE_STEPS), "--save_total_limit", "2", "--logging_steps", "1"),
        *("--deepspeed", str(ROOT / "ds_configs" / "zero3.json"), "--use_cpu", "true"),
    ]


class Job:
    """One start of the run by the deepspeed launcher, in a process group of its own."""

    def __init__(self, arguments: list[str], run: Path, log: Path) -> None:
        self.run, self.log = run, log
        launcher = [str(Path(sys.executable).with_name("deepspeed")), f"--num_accelerators={RANKS}"]
        command = [*launcher, f"--master_port={free_port()}", "--module", "polar.train", *arguments]
        variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        variables |= {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "DS_ACCELERATOR": "cpu"}
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [*command, "--output_dir", str(run), "--resume"],
                cwd=ROOT,
                env=variables,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        self.ranks: dict[int, int] = {}

    def wait_until(self, happened: Any, pending: list[dict[str, Any]]) -> bool:
        """Wait for a condition; False if the job ended first. Notes when earlier kills were caught up with."""
        deadline = time.monotonic() + DEADLINE_S
        while self.process.poll() is None:
            if time.monotonic() > deadline:
                raise TimeoutError(f"see {self.log}")
            if happened():
                return True
            note_caught_up(self.last_step(), pending)
            time.sleep(0.005)
        return False

    def has_ranks(self) -> bool:
        if len(self.ranks) < RANKS:
            self.ranks = ranks_below(self.process.pid)
        return len(self.ranks) == RANKS

    def first_step(self) -> int | None:
        """The step from which this start goes on, None before it has said so."""
        text = self.log.read_text()
        if "starting afresh" in text:
            return 0
        found = re.search(r"resuming from \S+: step (\d+) of", text)
        return int(found[1]) if found else None

    def last_step(self) -> int:
        """The last step that this start has made, 0 before its first."""
        steps = re.findall(r"^step +(\d+)/\d+ .* loss .*$", self.log.read_text(), re.MULTILINE)
        return int(steps[-1]) if steps else 0

    def newest_checkpoint(self) -> int:
        """The last step that is saved, 0 before the first."""
        return max(map(step_of, list_checkpoints(self.run)), default=0)

    def is_saving(self) -> bool:
        return any(self.run.glob(".checkpoint-*.incomplete-*"))

    def end(self) -> tuple[int, float]:
        """Wait for the launcher; return its exit code and the seconds that it took."""
        begin = time.monotonic()
        code = self.process.wait(timeout=DEADLINE_S)
        return code, time.monotonic() - begin


def kill_once(job: Job, draw: random.Random, start_s: float, pending: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Kill a rank of a job that has just been started, and describe it; None if the job ended before."""
    moment = draw.choices([*MOMENTS], [*MOMENTS.values()])[0]
    rank, delay, steps = draw.randrange(RANKS), draw.random(), draw.randint(1, 2 * SAVE_STEPS)
    if not job.wait_until(job.has_ranks, pending):
        return None
    if moment == "start":
        end = time.monotonic() + delay * start_s
        if not job.wait_until(lambda: time.monotonic() > end or job.last_step() > 0, pending):
            return None
    else:
        if not job.wait_until(lambda: job.first_step() is not None, pending):
            return None
        first = job.first_step() or 0
        if moment == "step":
            if not job.wait_until(lambda: job.last_step() >= first + steps, pending):
                return None
            time.sleep(delay)
        else:
            after = first + (SAVE_STEPS if steps > SAVE_STEPS else 0)
            if not job.wait_until(lambda: job.last_step() > after and job.is_saving(), pending):
                return None
            time.sleep(delay * SAVE_S)
    if job.process.poll() is not None:
        return None
    os.kill(job.ranks[rank], signal.SIGKILL)
    killed_at = time.monotonic()
    code, seconds = job.end()
    left = [path.name for path in job.run.glob(".*")] if job.run.is_dir() else []
    return {
        "moment": moment,
        "rank": rank,
        "began_at_step": job.first_step(),
        "step_at_kill": job.last_step() or job.newest_checkpoint(),
        "newest_checkpoint": job.newest_checkpoint(),
        "killed_at": killed_at,
        "exit_code": code,
        "job_ended_after_s": round(seconds, 2),
        "left_unfinished": sorted(left),
    }


def note_caught_up(step: int, pending: list[dict[str, Any]]) -> None:
    """Give kills the time after which the run was again at the step where it was killed."""
    for kill in [kill for kill in pending if step and step >= kill["step_at_kill"]]:
        kill["back_after_s"] = round(time.monotonic() - kill["killed_at"], 1)
        pending.remove(kill)


def soak(arguments: list[str], run: Path, num_kills: int, draw: random.Random, start_s: float) -> list[dict[str, Any]]:
    """Kill ranks and restart until `num_kills` were killed, then let the run end."""
    kills: list[dict[str, Any]] = []
    pending: list[dict[str, Any]] = []
    while True:
        job = Job(arguments, run, run.with_name(f"start-{len(kills)}.log"))
        kill = kill_once(job, draw, start_s, pending) if len(kills) < num_kills else None
        if kill is None:
            job.wait_until(lambda: False, pending)
        resumed_from = job.first_step()
        for earlier in kills if resumed_from is not None else []:
            earlier.setdefault("resumed_from_step", resumed_from)
        if kill is None:
            code, _ = job.end()
            note_caught_up(job.last_step(), pending)
            if code != 0:
                raise RuntimeError(f"the run ended with {code}: {job.log.read_text()[-3000:]}")
            break
        kills.append(kill)
        pending.append(kill)
        print(json.dumps(kill), file=sys.stderr, flush=True)
    for kill in kills:
        kill["steps_lost"] = kill["step_at_kill"] - kill["resumed_from_step"]
        del kill["killed_at"]
    return kills


def compare(run: Path, reference: Path, steps: int) -> dict[str, bool]:
    """Whether the killed run ended bit for bit where the other one did."""
    same = {}
    for what, name in (
        ("adapter", "adapter/adapter_model.safetensors"),
        ("values_and_moments", f"checkpoint-{steps}/training_state.safetensors"),
    ):
        found, expected = load_file(run / name), load_file(reference / name)
        same[what] = found.keys() == expected.keys() and all(torch.equal(found[k], v) for k, v in expected.items())
    logs = [[json.loads(line) for line in (r / "metrics.jsonl").read_text().splitlines()] for r in (run, reference)]
    for key in ("loss", "eval_loss", "grad_norm"):
        ours, theirs = ([(log["step"], log[key]) for log in lines if key in log] for lines in logs)
        same[f"logged_{key}"] = ours == theirs and bool(ours)
    same["every_step_once"] = [log["step"] for log in logs[0] if "loss" in log] == [*range(1, steps + 1)]
    return same


def ranks_below(launcher: int) -> dict[int, int]:
    """Process ids of the ranks that a launcher has started, by rank."""
    parents, found = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            group, parents[int(folder.name)] = int(fields[2]), int(fields[1])
            variables = (folder / "environ").read_bytes().split(b"\0") if group == launcher else []
        except OSError:  # ended meanwhile, or of another user
            continue
        rank = next((value[5:].decode() for value in variables if value.startswith(b"RANK=")), "")
        if rank:
            found[int(folder.name)] = int(rank)
    return {rank: pid for pid, rank in found.items() if parents[pid] not in found}


def free_port() -> int:
    """A TCP port that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=200, help="a multiple of 5, enough for the kills")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    draw = random.Random(args.seed)
    with tempfile.TemporaryDirectory(prefix="resume-soak-") as temporary:
        folder = Path(temporary)
        rows = folder / "rows.jsonl"
        rows.write_text("".join(json.dumps(p.row()) + "\n" for p in islice(problems(SEEN_KINDS, args.seed), ROWS)))
        arguments = settings(rows, args.steps)
        reference = Job(arguments, folder / "reference", folder / "reference.log")
        begin = time.monotonic()
        reference.wait_until(reference.has_ranks, [])
        ranks_at = time.monotonic()
        reference.wait_until(lambda: reference.last_step() > 0, [])
        start_s = time.monotonic() - ranks_at
        code, _ = reference.end()
        if code != 0:
            raise RuntimeError(f"the run ended with {code}: {reference.log.read_text()[-3000:]}")
        reference_s = time.monotonic() - begin
        print(
            f"reference: {reference_s:.0f} s, first step {start_s:.1f} s after the ranks", file=sys.stderr, flush=True
        )
        kills = soak(arguments, folder / "run", args.kills, draw, start_s)
        equal = compare(folder / "run", folder / "reference", args.steps)
    result = {
        **environment(),
        "steps": args.steps,
        "save_steps": SAVE_STEPS,
        "ranks": RANKS,
        "num_kills": len(kills),
        "kills_by_moment": dict(Counter(kill["moment"] for kill in kills)),
        "kills_that_left_a_half_written_folder": sum(bool(kill["left_unfinished"]) for kill in kills),
        "equal_bit_for_bit": equal,
        "steps_lost": summary([kill["steps_lost"] for kill in kills]),
        "job_ended_after_s": summary([kill["job_ended_after_s"] for kill in kills]),
        "back_after_s": summary([kill["back_after_s"] for kill in kills]),
        "reference_s": round(reference_s, 1),
        "start_to_first_step_s": round(start_s, 1),
        "kills": kills,
    }
    publish(result, args.out)
    broken = [kill for kill in kills if kill["resumed_from_step"] != kill["newest_checkpoint"] or not kill["exit_code"]]
    if not all(equal.values()) or broken or len(kills) < args.kills:
        sys.exit(f"not what was promised: {equal}, {broken}, {len(kills)} kills")


if __name__ == "__main__":
    main()
