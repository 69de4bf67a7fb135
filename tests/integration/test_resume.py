"""A run on one process that is stopped and resumed, against the same run without a stop."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

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
    assert main([*settings, "--output_dir", str(run), "--resume"]) == 0
    assert f"step {STEPS} of {STEPS}" in capfd.readouterr().out
    _assert_equal(run, one)


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
