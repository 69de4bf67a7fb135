"""The training state moves between engines and numbers of ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.engine_state_worker import CASES, LOADS, SAVING_RANKS, STEPS_BEFORE

ROOT = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).with_name("engine_state_worker.py")
AFTER_TWO_STEPS = 2e-5  # fp32, values of order 1: the same steps on other ranks, sums in another order
LOSS_TOLERANCE = 1e-5
LOADED = [(ranks, number, source) for ranks, loads in LOADS.items() for number, source in loads]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """States saved on 2 ranks under each engine, read on 1 to 4 ranks by another one."""
    folder = tmp_path_factory.mktemp("states")
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, str(WORKER), str(folder)]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return folder


@pytest.mark.parametrize("number", range(len(CASES)), ids=[str(case) for case in CASES])
def test_state_is_what_the_engine_says(results: Path, number: int) -> None:
    """Independent computation: DeepSpeed's own getters, `full_tensor` of FSDP2, the parameters of DDP."""
    for rank in range(SAVING_RANKS):
        result = json.loads((results / f"save-{number}-{rank}.json").read_text())
        assert result == {"wrong": [], "steps": [STEPS_BEFORE]}


@pytest.mark.parametrize(("ranks", "number", "source"), LOADED)
def test_state_goes_on_elsewhere(results: Path, ranks: int, number: int, source: int) -> None:
    """Values and moments bit for bit, what the model computes with, and the losses and values of the next steps."""
    for rank in range(ranks):
        result = json.loads((results / f"load-{ranks}-{number}-{source}-{rank}.json").read_text())
        assert result["wrong"] == []
        if not (CASES[number].get("bf16") or CASES[source].get("bf16")):
            assert result["distance"] < AFTER_TWO_STEPS
            assert result["losses"] == pytest.approx(result["expected_losses"], rel=LOSS_TOLERANCE)
