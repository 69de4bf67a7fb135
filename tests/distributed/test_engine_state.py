"""The training state moves between engines and numbers of ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.distributed.engine_state_worker import CASES, STEPS_BEFORE
from tests.distributed.launch import run_ranks

WORKER = Path(__file__).with_name("engine_state_worker.py")
AFTER_TWO_STEPS = 2e-5  # fp32, values of order 1: the same steps on 2 ranks and on 3, sums in another order


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """States saved on 2 ranks under each engine; each read on 3 ranks by the engine before it in the table."""
    folder = tmp_path_factory.mktemp("states")
    run_ranks(2, WORKER, "save", str(folder))
    run_ranks(3, WORKER, "load", str(folder))
    return folder


@pytest.mark.parametrize("number", range(len(CASES)), ids=[str(case) for case in CASES])
def test_state_is_what_the_engine_says(results: Path, number: int) -> None:
    """Independent computation: DeepSpeed's own getters, `full_tensor` of FSDP2, the parameters of DDP."""
    for rank in range(2):
        result = json.loads((results / f"save-{number}-{rank}.json").read_text())
        assert result == {"wrong": [], "steps": [STEPS_BEFORE]}


@pytest.mark.parametrize("number", range(len(CASES)), ids=[str(case) for case in CASES])
def test_three_ranks_continue_what_two_began_under_another_engine(results: Path, number: int) -> None:
    source = CASES[(number + 1) % len(CASES)]
    for rank in range(3):
        result = json.loads((results / f"load-{number}-{rank}.json").read_text())
        assert result["wrong"] == []
        if not (CASES[number].get("bf16") or source.get("bf16")):
            assert result["distance"] < AFTER_TWO_STEPS
