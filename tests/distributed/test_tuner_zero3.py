"""The tuner on weights that ZeRO-3 has partitioned over two ranks, against the same network held whole."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.distributed.launch import run_ranks


def test_svd_start_delta_conversion_and_merge_equal_those_of_whole_weights(tmp_path: Path) -> None:
    run_ranks(2, Path(__file__).with_name("tuner_zero3_worker.py"), str(tmp_path))
    whole = load_file(tmp_path / "whole-0.safetensors")
    assert len([name for name in whole if name.endswith("delta")]) == 2 and len(whole) == 2 + 4 + 4
    for rank in range(2):
        partitioned = load_file(tmp_path / f"partitioned-{rank}.safetensors")
        assert partitioned.keys() == whole.keys()
        for name, value in whole.items():
            torch.testing.assert_close(partitioned[name], value, atol=1e-5, rtol=1e-5, msg=f"rank {rank}: {name}")
    for name in ("merged", "merged_safely", "unmerged"):
        torch.testing.assert_close(whole[name], whole["out"], atol=1e-4, rtol=1e-5)
