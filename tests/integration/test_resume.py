"""A run on one process that is stopped and resumed, against the same run without a stop."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from polar.progress import StepReport
from polar.train import main
from tests.integration.commands import environment, metrics, train
from tests.integration.resume_worker import stopped

STEPS = 14


@pytest.fixture(scope="module")
def settings(tiny_gemma3: Path, tiny_rows: Path) -> list[str]:
    """Two epochs of 7 steps with checkpoints at 3, 6, 9, 12, 14: in both epochs, and between two logs.

    With dropout, so that the run continues bit for bit only if its random numbers do.
    """
    return [
        *("--model_name_or_path", str(tiny_gemma3), "--train_dataset", str(tiny_rows), "--dtype", "float32"),
        *("--template", "question_answer", "--val_split", "8", "--eval_steps", "3", "--save_steps", "3"),
        *("--adapter.r", "5", "--adapter.target_modules", '["q_proj", "v_proj", "down_proj"]'),
        *("--adapter.dropout", "0.1", "--global_batch_size", "8", "--per_device_train_batch_size", "4"),
        *("--num_train_epochs", "2", "--learning_rate", "1e-2", "--theta_learning_rate", "2e-2"),
        *("--weight_decay", "0.1", "--logging_steps", "2"),
    ]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory, settings: list[str]) -> Path:
    """One process, without a stop."""
    folder = tmp_path_factory.mktemp("runs") / "one"
    train(*settings, "--output_dir", str(folder))
    return folder


def _assert_equal(run: Path, expected: Path) -> None:
    """Values, moments, logged numbers and the best adapter are the same bit for bit; no step is logged twice."""
    for name in ("adapter/adapter_model.safetensors", f"checkpoint-{STEPS}/training_state.safetensors"):
        found, wanted = load_file(run / name), load_file(expected / name)
        assert found.keys() == wanted.keys()
        assert [key for key, value in wanted.items() if not torch.equal(found[key], value)] == []
    for key in ("step", "loss", "eval_loss", "grad_norm", "learning_rate", "epoch", "num_tokens"):
        assert metrics(run, key) == metrics(expected, key)
    states = [json.loads((r / f"checkpoint-{STEPS}" / "trainer_state.json").read_text()) for r in (run, expected)]
    assert states[0]["best_metric"] == states[1]["best_metric"]
    assert states[0]["best_global_step"] == states[1]["best_global_step"]


def test_killed_run_resumes_bit_for_bit(one: Path, settings: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-m", "polar.train", *settings, "--output_dir", str(run), "--resume"]
    with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 120
        while not (run / "checkpoint-6").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        output = process.communicate()[0]
    assert process.returncode == -signal.SIGKILL
    assert "starting afresh" in output
    assert not (run / f"checkpoint-{STEPS}").exists()
    resumed = train(*settings, "--output_dir", str(run), "--resume").stdout
    step = int(resumed.partition("checkpoint-")[2].partition(":")[0])
    assert 6 <= step < STEPS
    assert f"step {step} of {STEPS}, made by 1 process" in resumed
    _assert_equal(run, one)
    assert not list(run.glob(".*"))
    provenance = json.loads((run / "provenance.json").read_text())
    assert [start["checkpoint"] for start in provenance["resumed"]] == [f"checkpoint-{step}"]


def test_truncated_checkpoint_is_skipped(one: Path, settings: list[str], tmp_path: Path, capfd: Any) -> None:
    run = stopped(one, tmp_path / "run", 12)
    tensors = run / "checkpoint-12" / "training_state.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-100])
    assert main([*settings, "--output_dir", str(run), "--resume", "--save_total_limit", "2"]) == 0
    output = capfd.readouterr().out
    assert f"skipping {run / 'checkpoint-12'}: training_state.safetensors has" in output
    assert f"resuming from {run / 'checkpoint-9'}: step 9 of {STEPS}" in output
    _assert_equal(run, one)
    assert {path.name for path in run.glob("checkpoint-*")} == {"checkpoint-12", "checkpoint-14"}


def test_finished_run_stays_as_it_is(one: Path, settings: list[str], tmp_path: Path, capfd: Any) -> None:
    run = stopped(one, tmp_path / "run", STEPS)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert main([*settings, "--output_dir", str(run), "--resume"]) == 0
    assert f"nothing to do: this run was finished at step {STEPS}" in capfd.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*")}


def test_run_killed_before_its_last_file_is_finished(one: Path, settings: list[str], tmp_path: Path) -> None:
    """The last checkpoint is there, done.json is not."""
    run = stopped(one, tmp_path / "run", STEPS)
    (run / "done.json").unlink()
    assert main([*settings, "--output_dir", str(run), "--resume"]) == 0
    _assert_equal(run, one)
    assert json.loads((run / "done.json").read_text())["step"] == STEPS


@pytest.mark.parametrize("step", [1, 6, 7])  # before any checkpoint; where one and an evaluation are due; end of epoch
def test_stop_file_stops_and_resumes_bit_for_bit(
    one: Path, settings: list[str], tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    run, file = tmp_path / "run", tmp_path / "job.stop"
    monkeypatch.setenv("POLAR_STOP_FILE", str(file))
    _touch_after(step, file, monkeypatch)
    command = [*settings, "--output_dir", str(run), "--resume"]
    assert main(command) == 0
    assert f"stopped at step {step} of {STEPS} by the file of POLAR_STOP_FILE" in capfd.readouterr().out
    assert not (run / "done.json").exists()
    file.unlink()  # it belongs to the job script, which names another one at the next start
    monkeypatch.undo()
    assert main(command) == 0
    _assert_equal(run, one)
    done = json.loads((run / "done.json").read_text())
    assert (done["step"], done["num_starts"]) == (STEPS, 2)
    assert done["train_time_s"] > 0


def test_stop_at_the_last_step_comes_too_late_and_stops_no_later_start(
    one: Path, settings: list[str], tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a thread of its own, where Python allows no signal handlers: the file works all the same."""
    run = tmp_path / "run"
    _touch_after(STEPS, run / "stop", monkeypatch)
    with ThreadPoolExecutor() as pool:
        assert pool.submit(main, [*settings, "--output_dir", str(run)]).result() == 0
    assert "stopped at" not in capfd.readouterr().out
    assert not (run / "stop").exists()
    _assert_equal(run, one)


def test_stop_at_the_end_of_an_epoch_that_is_evaluated(
    settings: list[str], tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Trainer evaluates and saves at the end of an epoch, and announces one wherever it stops: at 4 and at 7."""
    by_epoch = [*settings, "--eval_strategy", "epoch", "--save_strategy", "epoch", "--logging_strategy", "epoch"]
    assert main([*by_epoch, "--output_dir", str(tmp_path / "whole")]) == 0
    run = tmp_path / "run"
    for step in (4, 7):
        with monkeypatch.context() as patch:
            _touch_after(step, run / "stop", patch)
            assert main([*by_epoch, "--output_dir", str(run), "--resume"]) == 0
        assert f"stopped at step {step} of {STEPS} by the file stop" in capfd.readouterr().out
        assert not (run / "stop").exists()
    assert main([*by_epoch, "--output_dir", str(run), "--resume"]) == 0
    _assert_equal(run, tmp_path / "whole")


def _touch_after(step: int, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let somebody create `file` at the end of a step, just before the run looks for it."""
    report = StepReport.on_step_end

    def touch_and_report(self: StepReport, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == step:
            file.touch()
        report(self, args, state, control, **kwargs)

    monkeypatch.setattr(StepReport, "on_step_end", touch_and_report)


def test_checkpoint_of_another_run_is_refused(one: Path, settings: list[str], tmp_path: Path, capfd: Any) -> None:
    other = tmp_path / "rows.jsonl"
    other.write_text("".join(f'{{"question": "What is {k} + 1?", "answer": "{k + 1}"}}\n' for k in range(64)))
    before = {path: path.stat().st_mtime_ns for path in one.rglob("*")}
    for change, words in (
        (["--adapter.r", "6"], "adapter.r 5 (now 6)"),
        (["--learning_rate", "0.02"], "learning_rate 0.01 (now 0.02)"),
        (["--train_dataset", str(other)], "other training data"),
    ):
        assert main([*settings, "--output_dir", str(one), "--resume", *change]) == 2
        lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("polar: error:")]
        assert len(lines) == 1
        assert f"{one / 'checkpoint-14'} was made with" in lines[0]
        assert words in lines[0]
    assert before == {path: path.stat().st_mtime_ns for path in one.rglob("*")}
