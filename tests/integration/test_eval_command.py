"""`polar eval` as a user starts it: several tasks, killed and started again, on two processes, on bad input."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from polar.cli import main
from tests.integration.commands import ROOT, environment, free_port
from tests.shared_data import read_jsonl, shared_data

BASE = str(ROOT / "demo" / "base")
NUM_PROBLEMS = 24
TASKS = {"gsm8k": "gsm8k/test.jsonl", "piqa": "commonsense/piqa/test.json"}
COMMON = ["base", "--base", BASE, "--tasks", ",".join(TASKS), "--dtype", "float32", "--template", "question_answer"]
COMMON += ["--limit", str(NUM_PROBLEMS), "--max_new_tokens", "40", "--batch_size", "4"]
RUN_TIME = {"load_time_s", "score_time_s", "wall_time_s", "num_resumed", "world_size", "canary"}


@pytest.fixture(scope="module")
def data() -> str:
    return str(shared_data(""))


def results(out: Path) -> dict[str, dict[str, Any]]:
    return {task: json.loads((out / f"eval_{task}" / "results.json").read_text()) for task in TASKS}


def samples(out: Path) -> dict[str, list[dict[str, Any]]]:
    return {task: read_jsonl(out / f"eval_{task}" / f"samples_{task}.jsonl") for task in TASKS}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, data: str) -> Path:
    """Both tasks in one start, on one process, undisturbed."""
    out = tmp_path_factory.mktemp("whole")
    code, shown, errors = here("eval", *COMMON, "--data_dir", data, "--out", str(out))
    assert code == 0 and not errors.strip(), f"noise: {errors}"
    assert shown.count("written: ") == 2 and "acc_norm" in shown
    return out


def here(*arguments: str) -> tuple[int, str, str]:
    """Run `polar ...` in this process, whose imports are paid for; return exit code, stdout, stderr."""
    shown, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(errors):
        code = main(list(arguments))
    return code, shown.getvalue(), errors.getvalue()


def assert_same(found: Path, expected: Path) -> None:
    """Same texts and numbers; log-likelihoods to rounding, since batches differ."""
    for task, rows in samples(expected).items():
        for row, other in zip(rows, samples(found)[task], strict=True):
            assert row.pop("loglikelihoods", []) == pytest.approx(other.pop("loglikelihoods", []), abs=1e-3)
            assert row == other
    for task, result in results(expected).items():
        other = results(found)[task]
        assert {k: v for k, v in result.items() if k not in RUN_TIME} == {
            k: v for k, v in other.items() if k not in RUN_TIME
        }
    assert sorted(path.name for path in found.iterdir()) == sorted(f"eval_{task}" for task in TASKS)  # no leftovers


def test_one_start_scores_several_tasks(whole: Path) -> None:
    """Counted again from the samples; the demo's base writes unfinished answers to real problems."""
    found, rows = results(whole), samples(whole)
    assert [found[task]["num_problems"] for task in TASKS] == [NUM_PROBLEMS] * 2
    assert found["gsm8k"]["num_truncated"] == sum(row["truncated"] for row in rows["gsm8k"]) > 0
    assert found["piqa"]["template"] is found["piqa"]["num_truncated"] is None
    likeliest = [max(range(2), key=row["loglikelihoods"].__getitem__) for row in rows["piqa"]]
    right = sum(choice == row["gold"] for choice, row in zip(likeliest, rows["piqa"], strict=True))
    assert found["piqa"]["columns"]["acc"]["num_correct"] == right
    p = right / NUM_PROBLEMS
    assert found["piqa"]["columns"]["acc"]["stderr"] == pytest.approx((p * (1 - p) / (NUM_PROBLEMS - 1)) ** 0.5)


def test_killed_and_started_again_ends_the_same_and_keeps_what_was_done(tmp_path: Path, whole: Path, data: str) -> None:
    """kill -9 after the first answers; then the same command; then --resume on the finished folder."""
    command = ["eval", *COMMON, "--data_dir", data, "--out", str(tmp_path), "--resume"]
    cache = tmp_path / ".eval_gsm8k.answers" / "rank-0.jsonl"
    process = subprocess.Popen(
        [sys.executable, "-m", "polar.cli", *command], cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not cache.is_file() or cache.read_bytes().count(b"\n") < 4:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    kept = cache.read_bytes().count(b"\n")
    assert 4 <= kept < NUM_PROBLEMS and not (tmp_path / "eval_gsm8k").exists()
    code, shown, _ = here(*command)
    assert code == 0 and f"{kept} answers from an interrupted scoring" in shown
    assert results(tmp_path)["gsm8k"]["num_resumed"] == kept and results(tmp_path)["piqa"]["num_resumed"] == 0
    assert_same(tmp_path, whole)
    before = (tmp_path / "eval_piqa" / "results.json").stat().st_mtime_ns
    assert here(*command)[0] == 0
    assert (tmp_path / "eval_piqa" / "results.json").stat().st_mtime_ns == before
    code, _, errors = here(*command[:-1])
    assert code == 2 and "pass --overwrite" in errors


def test_two_processes_score_like_one(tmp_path: Path, whole: Path, data: str) -> None:
    done = torchrun("eval", *COMMON, "--data_dir", data, "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("written: ") == 2  # said once, by the first process
    assert {result["world_size"] for result in results(tmp_path).values()} == {2}
    assert_same(tmp_path, whole)


@pytest.mark.parametrize(("rank", "times_said"), [("0", 1), ("1", 0)])
def test_of_several_processes_only_the_first_one_says_what_is_wrong(
    tmp_path: Path, rank: str, times_said: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every process finds it: all read the same files. `polar.launch.on_all_ranks` shares what only one finds."""
    monkeypatch.setenv("RANK", rank)
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        try:
            code: Any = main(["eval", *COMMON, "--data_dir", str(tmp_path), "--out", str(tmp_path / "out")])
        except SystemExit as end:
            code = end.code
    assert code == 2 and errors.getvalue().count("no rows of gsm8k in it") == times_said


BAD = {
    "several tasks, one file": (["--tasks", "gsm8k,math", "--data", "rows.jsonl"], "pass --data_dir FOLDER"),
    "no task": (["--tasks", "gsm9k"], "did you mean gsm8k"),
    "batch size": (["--batch_size", "many"], "batch_size 'many': give a number, or auto"),
    "two sources": (["--data", "a.jsonl", "--data_dir", "b"], "give one of them"),
    "no vLLM": (["--backend", "vllm"], "--backend vllm needs vLLM"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    changes, message = BAD[name]
    code = main(["eval", "base", "--base", BASE, "--template", "plain", "--out", str(tmp_path / "out"), *changes])
    error = capsys.readouterr().err
    assert code == 2 and message in error and len(error.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}"]
    return subprocess.run(
        [*launcher, "-m", "polar.cli", *arguments],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
