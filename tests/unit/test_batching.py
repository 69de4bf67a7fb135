"""The search for a batch size: grows while that pays, never repeats work, backs off when memory ends."""

from __future__ import annotations

import pytest
import torch

from polar.errors import UserError
from polar_eval.batching import BatchSize, max_rows, run_batches


def sizes(seconds_per_batch: dict[int, float], num_items: int, most: int) -> list[int]:
    """Batch sizes that follow from the given durations by size."""
    size, used, left = BatchSize(None, most), [], num_items
    while left > 0:
        rows = min(size.rows, left)
        used.append(rows)
        size.measured(rows, rows, seconds_per_batch.get(rows, 1.0))
        left -= rows
    return used


def test_doubles_while_a_batch_costs_the_same() -> None:
    assert sizes({}, 300, 128) == [16, 32, 64, 128, 60]


def test_stays_where_twice_the_rows_take_twice_the_time() -> None:
    assert sizes({16: 1.0, 32: 2.0}, 120, 128) == [16, 32, 32, 32, 8]


def test_a_given_size_is_kept() -> None:
    size = BatchSize(5)
    size.measured(5, 5, 1e-3)
    assert size.rows == 5


def test_every_item_is_run_once_though_large_batches_do_not_fit() -> None:
    done, tried = [], []

    def run(batch):
        tried.append(len(batch))
        if len(batch) > 20:
            raise torch.OutOfMemoryError("CUDA out of memory")
        done.extend(batch)
        return [item * 2 for item in batch], len(batch)

    found = [result for _, results in run_batches(range(100), run, BatchSize(None, 128)) for result in results]
    assert found == [2 * item for item in range(100)] and done == list(range(100))
    assert tried[:3] == [16, 32, 16] and max(tried[2:]) == 16  # never again too large


def test_an_item_that_never_fits_is_an_error_with_a_fix() -> None:
    def run(batch):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(UserError, match="does not fit into the GPU's memory; pass --dtype"):
        list(run_batches([1, 2, 3], run, BatchSize(8)))


def test_bound_by_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Llama-2-7B's keys and values: 32 layers x 4096 x 2 x 2 bytes = 0.5 MiB per token."""
    from transformers import LlamaConfig

    config = LlamaConfig(num_hidden_layers=32, hidden_size=4096, num_attention_heads=32, vocab_size=32000)
    monkeypatch.setattr("os.sysconf", lambda name: 2**30 * 100 if name == "SC_AVPHYS_PAGES" else 1)  # 100 GiB
    rows = max_rows(config, 1000, 1, torch.device("cpu"), torch.bfloat16)
    assert rows == int(0.3 * 100 * 2**30 / (1000 * 2**19 + 10 * 32000))
    assert max_rows(config, 10, 1, torch.device("cpu"), torch.bfloat16) == 128
    assert max_rows(config, 10**9, 1, torch.device("cpu"), torch.bfloat16) == 1
