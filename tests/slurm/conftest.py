"""Tests that need a SLURM. `make test-slurm` starts one and names its folder in POLAR_SLURM_HOME."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster

if "POLAR_SLURM_HOME" not in os.environ:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """The local cluster: two nodes with four pretended GPUs each; what is left of the jobs is cancelled at the end."""
    cluster = Cluster(Path(os.environ["POLAR_SLURM_HOME"]))
    yield cluster
    cluster.cancel_all()


@pytest.fixture(scope="session")
def query_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL file with 44 query/response rows, as MetaMathQA has them."""
    from tests.tiny import addition_rows, write_jsonl

    rows = [{"query": row["question"], "response": row["answer"]} for row in addition_rows(44)]
    return write_jsonl(tmp_path_factory.mktemp("data") / "queries.jsonl", rows)
