"""A model cut by `polar.fsdp2` is the model that one rank has read: values, dtypes, buffers, tied weights, logits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.distributed.fsdp2_worker import CASES, LAYERS
from tests.distributed.launch import run_ranks

WORKER = Path(__file__).with_name("fsdp2_worker.py")


@pytest.fixture(scope="module", params=[3, 4], ids=["3 ranks", "2 x 2 ranks"])
def reports(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[list[dict]]:
    """By case, by rank. Four ranks are two groups of two that each hold all of it (HSDP)."""
    out = tmp_path_factory.mktemp("fsdp2")
    run_ranks(request.param, WORKER, str(out))
    ranks = [json.loads((out / f"{request.param}-{rank}.json").read_text()) for rank in range(request.param)]
    return [list(case) for case in zip(*ranks, strict=True)]


def test_every_rank_has_its_rows_of_what_rank_0_has_read(reports: list[list[dict]]) -> None:
    assert len(reports) == len(CASES)
    for case in reports:
        for report in case:
            assert report["names_equal"], report
            assert report["wrong"] == []
            assert report["trainable"] == ["torch.float32"]  # beside a bf16 base in the same unit
            assert report["tied"] == (report["case"][0] == "gemma3")
            assert report["logit_error"] <= (1e-5 if "float32" in report["case"][1] else 2e-2)


def test_a_rank_holds_its_share_and_no_more(reports: list[list[dict]]) -> None:
    shards = 2 if len(reports[0]) == 4 else 3
    for case in reports:
        for group in range(0, len(case), shards):
            assert sum(report["bytes_here"] for report in case[group : group + shards]) == case[0]["bytes_whole"]
        for report in case:
            assert report["bytes_here"] < 1.1 * report["bytes_whole"] / shards  # rows do not divide evenly


def test_layers_are_units(reports: list[list[dict]]) -> None:
    """Gathered one at a time. Gemma-3's vision tower has further parts that must not be split; it is not adapted."""
    for case in reports:
        assert all(report["units"] >= LAYERS + 1 for report in case)
