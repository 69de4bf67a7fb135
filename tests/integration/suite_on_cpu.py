"""PEFT's unchanged MetaMathQA suite on a CPU without a network: a stand-in for `benchmarks/leaderboard/with_polar.py`.

Replaced from outside is only what hardware and network deny: the name of the device, its memory counters, and the data
sets, which come from the folder SUITE_ROWS as `OWNER--NAME.json` with a list of rows per split.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import datasets
import peft.utils
import torch

from benchmarks.leaderboard.with_polar import run_unchanged


class Cpu(str):
    """The CPU to torch, and an XPU to the suite's check at import."""

    def __eq__(self, other: object) -> bool:
        return other in (str(self), "xpu")  # transformers compares with "cuda"

    __hash__ = str.__hash__


class TemporaryDirectory(tempfile.TemporaryDirectory):  # type: ignore[type-arg]
    """That of Python 3.12, which can keep the folder."""

    def __init__(self, *, ignore_cleanup_errors: bool = False, delete: bool = True) -> None:
        super().__init__(ignore_cleanup_errors=ignore_cleanup_errors)


def load_dataset(name: str, *_: str, split: str | None = None, streaming: bool = False) -> Any:
    """The rows of a data set, from its file."""
    splits = json.loads((Path(os.environ["SUITE_ROWS"]) / f"{name.replace('/', '--')}.json").read_text())
    found = datasets.DatasetDict({key: datasets.Dataset.from_list(rows) for key, rows in splits.items()})
    return found[split].to_iterable_dataset() if streaming else found


if __name__ == "__main__":
    sys.path.pop(0)
    peft.utils.infer_device = lambda: Cpu("cpu")
    for counter in ("max_memory_reserved", "memory_allocated", "memory_reserved"):
        setattr(torch.cpu, counter, lambda: 0)
    for action in ("reset_peak_memory_stats", "empty_cache"):
        setattr(torch.cpu, action, lambda: None)
    torch.cpu.manual_seed_all = torch.manual_seed  # type: ignore[attr-defined]
    torch.cpu.get_device_name = lambda _: "CPU"  # type: ignore[attr-defined]
    datasets.load_dataset = load_dataset
    if sys.version_info < (3, 12):
        tempfile.TemporaryDirectory = TemporaryDirectory  # type: ignore[misc]
    run_unchanged(sys.argv[1:])
