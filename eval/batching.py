"""How many prompts go through the model at once: found on the real prompts, while they are being scored.

lm-eval's `auto` tries batches of the model's full context length, which takes minutes and says little about prompts of
200 tokens. Here the longest prompts go first, in batches that double as long as that makes the work faster and the
memory suffices. No trial is thrown away: every batch is part of the result.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch

from polar.errors import UserError

T = TypeVar("T")
R = TypeVar("R")
START_ROWS = 16
MAX_ROWS = {"cpu": 128, "cuda": 512}
MEMORY_SHARE = 0.3  # of the free memory, for one batch's keys and values: on a CPU nothing reports that it got too much
WORTHWHILE = 1.1  # double again only while the last doubling made the work this much faster


class BatchSize:
    """The number of rows of the next batch.

    Args:
        fixed: a number that the user chose; None finds one.
        max_rows: upper bound for the search.
    """

    def __init__(self, fixed: int | None, max_rows: int = MAX_ROWS["cpu"]) -> None:
        self.rows = fixed or min(START_ROWS, max_rows)
        self.max_rows = fixed or max_rows
        self.growing = fixed is None
        self.best_speed = 0.0

    def measured(self, rows: int, work: float, seconds: float) -> None:
        """Take note of a batch of full size; `work` in any unit that makes batches comparable (tokens)."""
        if not self.growing or rows < self.rows:
            return
        speed = work / max(seconds, 1e-9)
        if speed < WORTHWHILE * self.best_speed or self.rows >= self.max_rows:
            self.growing = False
            return
        self.best_speed = speed
        self.rows = min(2 * self.rows, self.max_rows)

    def too_large(self) -> bool:
        """Take note that a batch did not fit into the memory; tell whether a smaller one can be tried."""
        self.growing = False
        self.rows //= 2
        self.max_rows = max(self.rows, 1)
        return self.rows >= 1


def run_batches(
    items: Sequence[T], run: Callable[[Sequence[T]], tuple[list[R], float]], size: BatchSize
) -> Iterator[tuple[Sequence[T], list[R]]]:
    """Yield (batch, results) over `items`, which come longest first.

    Args:
        items: what `run` takes.
        run: a batch -> (one result per item, the work done in tokens).
        size: changed on the way.

    Raises:
        UserError: a single item does not fit into the GPU's memory.
    """
    start = 0
    while start < len(items):
        batch = items[start : start + size.rows]
        begin = time.perf_counter()
        try:
            results, work = run(batch)
        except torch.OutOfMemoryError as error:
            size.rows = len(batch)
            if not size.too_large():
                raise UserError(
                    "one prompt alone does not fit into the GPU's memory; pass --dtype bfloat16, --parallelize, or a"
                    " smaller --max_new_tokens"
                ) from error
            torch.cuda.empty_cache()
            continue
        size.measured(len(batch), work, time.perf_counter() - begin)
        start += len(batch)
        yield batch, results


def max_rows(config: Any, num_tokens: int, num_logits: int, device: torch.device, dtype: torch.dtype) -> int:
    """Return how many sequences fit: keys, values and logits take at most MEMORY_SHARE of the free memory.

    Args:
        config: of the model.
        num_tokens: of a sequence, prompt and answer.
        num_logits: positions of a sequence whose logits are kept.
        device: where the model is.
        dtype: of keys, values and logits.
    """
    text: Any = config.get_text_config()
    num_heads = int(getattr(text, "num_attention_heads", None) or 1)
    kv_heads = int(getattr(text, "num_key_value_heads", None) or num_heads)
    head_dim = int(getattr(text, "head_dim", None) or text.hidden_size // num_heads)
    layers = int(getattr(text, "num_hidden_layers", None) or 1)
    element = torch.empty((), dtype=dtype).element_size()
    cache_bytes = 2 * layers * kv_heads * head_dim * element * num_tokens
    row_bytes = cache_bytes + (element + 8) * num_logits * text.vocab_size
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(1, min(MAX_ROWS.get(device.type, MAX_ROWS["cpu"]), int(MEMORY_SHARE * free / row_bytes)))
