"""Fixtures that every part may use."""

from __future__ import annotations

import atexit
import gc
import os
import shutil
import tempfile
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for the hub
os.environ.setdefault("DS_ACCELERATOR", "cpu")
if "HF_DATASETS_CACHE" not in os.environ:  # prepared data of tests is not worth keeping
    os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="polar-tests-")
    atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)


def pytest_collection_finish() -> None:
    """Leave what is imported by now out of every search for garbage."""
    gc.freeze()


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """A tokenizer trained on the rows of `tests.tiny.addition_rows`; special tokens <pad> <eos> <bos> <unk>."""
    from tests.tiny import addition_rows, make_tokenizer

    return make_tokenizer([f"{row['question']}\n{row['answer']}" for row in addition_rows(200)])


@pytest.fixture(scope="session")
def tiny_gemma3(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer) -> Path:
    """Folder of a random two-layer Gemma-3 text model (hidden size 64, fp32) with `tiny_tokenizer`; read only."""
    from tests.tiny import make_gemma3

    return make_gemma3(tmp_path_factory.mktemp("models") / "gemma3", tiny_tokenizer)


@pytest.fixture(scope="session")
def tiny_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL file with 64 question/answer rows."""
    from tests.tiny import addition_rows, write_jsonl

    return write_jsonl(tmp_path_factory.mktemp("data") / "rows.jsonl", addition_rows(64))
