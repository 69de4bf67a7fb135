"""A process killed at any moment of a save: the run folder as it was before every change that a run makes to it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from polar.checkpoint import find_checkpoint, list_checkpoints, step_of, why_damaged
from polar.files import remove_leftovers
from tests.integration.commands import ROOT, environment, metrics
from tests.integration.resume_worker import SAVE_STATES, SAVES_STEPS

WORKER = Path(__file__).with_name("resume_worker.py")


@pytest.fixture(scope="module")
def saves(tmp_path_factory: pytest.TempPathFactory, tiny_gemma3: Path, tiny_rows: Path) -> Path:
    """`run`, not stopped; `snapshots/N`, its folder at each change; a folder per SAVE_STATES, continued from there."""
    folder = tmp_path_factory.mktemp("saves")
    command = [sys.executable, str(WORKER), "saves", str(folder), str(tiny_gemma3), str(tiny_rows)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return folder


def _snapshots(saves: Path) -> list[Path]:
    return sorted((saves / "snapshots").iterdir(), key=lambda path: int(path.name))


def test_nothing_half_written_has_the_name_of_a_checkpoint(saves: Path) -> None:
    """At each of the moments all folders `checkpoint-N` are whole, and the newest is the one that was saved last."""
    found = []
    for snapshot in _snapshots(saves):
        problems: list[str] = []
        newest = find_checkpoint(snapshot, problems.append)
        assert newest is not None
        assert problems == []
        assert [folder for folder in list_checkpoints(snapshot) if why_damaged(folder)] == []
        found.append(step_of(newest))
    assert found == sorted(found)
    assert set(found) == set(range(2, SAVES_STEPS + 1, 2))
    assert min(found.count(step) for step in range(2, SAVES_STEPS, 2)) > 10  # moments seen between two checkpoints


def test_next_start_leaves_no_trace_of_a_kill_and_loses_no_adapter(saves: Path, tmp_path: Path) -> None:
    for snapshot in _snapshots(saves):
        copy = tmp_path / snapshot.name
        shutil.copytree(snapshot, copy)
        remove_leftovers(copy)
        assert list(copy.glob(".*")) == []
        assert load_file(copy / "adapter" / "adapter_model.safetensors").keys()
        assert {p.name for p in snapshot.glob("[!.]*")} <= {p.name for p in copy.iterdir()}


def test_log_is_on_the_disk_before_the_checkpoint_that_counts_its_bytes(saves: Path) -> None:
    flushed = json.loads((saves / "snapshots.json").read_text())["flushed"]
    for step in range(2, SAVES_STEPS + 1, 2):
        first = next(k for k, name in enumerate(flushed) if name.startswith(f".checkpoint-{step}.incomplete-"))
        log = max(k for k, name in enumerate(flushed[:first]) if name == "metrics.jsonl")
        previous = [k for k, name in enumerate(flushed[:first]) if name.startswith(f".checkpoint-{step - 2}.inc")]
        assert log > max(previous, default=-1)


@pytest.mark.parametrize("state", SAVE_STATES)
def test_run_continues_bit_for_bit_from(saves: Path, state: str) -> None:
    """And from checkpoint, rotation and best adapter the same as the run that nobody stopped."""
    run, reference = saves / state, saves / "run"
    assert "resuming from" in (saves / f"{state}.log0").read_text()
    for name in ("adapter/adapter_model.safetensors", f"checkpoint-{SAVES_STEPS}/training_state.safetensors"):
        found, expected = load_file(run / name), load_file(reference / name)
        assert found.keys() == expected.keys()
        assert [key for key, value in expected.items() if not torch.equal(found[key], value)] == []
    for key in ("step", "loss", "eval_loss", "grad_norm"):
        assert metrics(run, key) == metrics(reference, key)
    assert {p.name for p in run.iterdir()} == {p.name for p in reference.iterdir()}
    resumed = json.loads((run / "provenance.json").read_text())["resumed"]
    assert len(resumed) == 1
