"""The files of ds_configs/ hold memory settings; batch, precision and clipping come from the run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

FILES = sorted((Path(__file__).resolve().parents[2] / "ds_configs").glob("*.json"))
# The longest factor of Gemma-3-27B at r = 32: a smaller threshold would gather adapters one by one.
LONGEST_FACTOR = 32 * 21504


def test_each_way_to_save_memory_has_a_file() -> None:
    assert [path.stem for path in FILES] == ["zero1", "zero2", "zero3", "zero3_hpz", "zero3_offload"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_everything_but_memory_is_auto(path: Path) -> None:
    config = json.loads(path.read_text())
    zero = config.pop("zero_optimization")
    assert zero["stage"] == int(path.stem[4])
    for key, value in config.items():
        assert value == "auto" or value == {"enabled": "auto"}, key
    if zero["stage"] == 3:
        assert zero["stage3_param_persistence_threshold"] >= LONGEST_FACTOR
