"""Rows -> prompts -> tokens and masks.

What TRL 1.16's SFTTrainer does with the result, which has `input_ids` and `completion_mask` (read in
`SFTTrainer._prepare_dataset`): because `input_ids` is there it adds no EOS and tokenises nothing; with
`completion_only_loss=True` it makes `labels`, -100 where the mask is 0; it cuts at `max_length` and drops rows without
any label left, neither of which can happen here, because no row is longer and each has a response token; its collator
pads on the right, labels with -100. With `packing=True` rows are packed after that, whole (strategy `bfd`).

`prepare` calls no collective. Call it on every rank, inside `main_process_first()` or not: the first process that comes
builds a file in the datasets cache under a lock, all others map the same file, so the data is the same everywhere.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
from tqdm.auto import tqdm

from polar.data_report import Counts, many_left_out, statistics, summary_line
from polar.errors import UserError
from polar.files import locked, write_json
from polar.pair_tokens import PairTokenizer, TokenPair
from polar.row_texts import RowTexts, column_texts, task_texts
from polar.rows import open_source
from polar.templates import Template, load_template

if TYPE_CHECKING:
    from polar.run_config import DataArguments

__all__ = ["PreparedData", "Template", "load_template", "prepare"]

CACHE_VERSION = 1  # raise it when the same settings should give other tokens
_BATCH = 1000  # rows per call of the tokenizer
_SCHEMA = pa.schema(
    {
        "input_ids": pa.list_(pa.int32()),
        "completion_mask": pa.list_(pa.int8()),
        "length": pa.int32(),
        "loss_tokens": pa.int32(),
        "prompt_hash": pa.int64(),
    }
)
_CALCULATOR_MARK = re.compile(r"<<[^<>]*>>")  # GSM8K: 48/2 = <<48/2=24>>24


@dataclass(frozen=True)
class PreparedData:
    """Tokenised rows and what happened on the way.

    `train` and `validation` have the columns `input_ids` (token ids; prompt, response, EOS) and `completion_mask` (1
    on response and EOS, 0 on the prompt). `report` is what `data_report.json` holds.
    """

    train: datasets.Dataset
    validation: datasets.Dataset | None
    report: dict[str, Any]

    def summary(self) -> str:
        """Return one readable line per part: rows, tokens, and every row that was left out or cut."""
        parts = [name for name in ("train", "validation") if self.report[name]]
        notes = [f"note: {note}" for note in self.report["notes"]]
        return "\n".join([summary_line(name, self.report[name]) for name in parts] + notes)

    def example(self, tokenizer: Any, row: int = 0) -> str:
        """Return a training row as text, special tokens included, with [[ ]] around what the loss covers."""
        ids, mask = self.train[row]["input_ids"], self.train[row]["completion_mask"]
        start = mask.index(1)
        return f"{tokenizer.decode(ids[:start])}[[{tokenizer.decode(ids[start:])}]]"


def prepare(data: DataArguments, tokenizer: Any, max_length: int | None, seed: int) -> PreparedData:
    """Read, check, tokenise and split the data of a run.

    Args:
        data: the run's data settings.
        tokenizer: the base model's.
        max_length: most tokens per row, prompt, response and EOS together; None: no limit.
        seed: of the held-out rows; the same seed gives the same rows on any number of processes.

    Returns:
        PreparedData. The order of rows is the file's.

    Raises:
        UserError: unreadable data, no row that can be used, a validation split that leaves no training rows; with
            `on_too_long: error`, a row above `max_length`.
    """
    pairs = PairTokenizer(tokenizer)
    train_table, train_report = _tokens_of(data, pairs, max_length)
    hashes = train_table.data.column("prompt_hash").to_numpy()
    everything = np.arange(len(train_table))
    validation, validation_report = None, None
    if data.val_dataset:
        source = replace(data, train_dataset=data.val_dataset, train_split=data.val_dataset_split, max_train_rows=None)
        validation, validation_report = _tokens_of(source, pairs, max_length, key="val_dataset")
        train_rows = everything
        known = np.isin(validation.data.column("prompt_hash").to_numpy(), hashes)
        validation_report |= statistics(validation, np.arange(len(validation)))
        validation_report["prompts_also_in_train"] = int(known.sum())
    else:
        held_out = hold_out(hashes, data.val_split, seed)
        if data.val_split and not len(held_out):
            raise UserError(
                f"val_split {data.val_split:g} holds out none of {len(everything)} rows: rows of one prompt stay "
                "together, and each group is larger than that; raise val_split, or give val_dataset"
            )
        train_rows = np.setdiff1d(everything, held_out, assume_unique=True)
        if len(held_out):
            if not len(train_rows):
                raise UserError(f"val_split {data.val_split:g} leaves none of {len(everything)} rows for training")
            validation = train_table.select(held_out)
            held_from = {"source": train_report["source"], "held_out_by_seed": seed, "dropped": {}, "truncated": None}
            validation_report = held_from | statistics(train_table, held_out)
    train_report["held_out"] = len(everything) - len(train_rows)
    train_report |= statistics(train_table, train_rows)
    train = train_table.select(train_rows) if len(train_rows) < len(everything) else train_table
    report = {
        "train": train_report,
        "validation": validation_report,
        "task": data.task,
        "template": data.template,
        "max_length": max_length,
        "on_too_long": data.on_too_long,
        "notes": pairs.notes() + many_left_out(train_report) + many_left_out(validation_report),
    }
    report["fingerprint"] = _digest(report)  # equal on all ranks, or their data differs
    columns = ["input_ids", "completion_mask"]
    return PreparedData(
        train.select_columns(columns), None if validation is None else validation.select_columns(columns), report
    )


def hold_out(prompt_hashes: np.ndarray, amount: float, seed: int) -> np.ndarray:
    """Choose validation rows; rows with the same prompt stay on the same side, so that none is validated on.

    Args:
        prompt_hashes: (rows,) int64.
        amount: below 1 a share of the rows, from 1 on a number of rows; 0 chooses none.
        seed: the same seed and rows give the same choice.

    Returns:
        Sorted row indices, int64. Fewer than asked for only if groups of equal prompts do not fit.
    """
    wanted = round(amount * len(prompt_hashes)) if amount < 1 else int(amount)
    if amount > 0:
        wanted = max(wanted, 1)
    _, first, group, sizes = np.unique(prompt_hashes, return_index=True, return_inverse=True, return_counts=True)
    by_appearance = np.argsort(first)  # so that the choice does not depend on the values of the hashes
    chosen, left = np.zeros(len(sizes), dtype=bool), wanted
    for index in by_appearance[np.random.default_rng(seed).permutation(len(sizes))]:
        if left == 0:
            break
        if sizes[index] <= left:
            chosen[index] = True
            left -= sizes[index]
    return np.flatnonzero(chosen[group])


def _tokens_of(
    data: DataArguments, pairs: PairTokenizer, max_length: int | None, key: str = "train_dataset"
) -> tuple[datasets.Dataset, dict[str, Any]]:
    """Return the tokenised rows of `data.train_dataset` (columns of _SCHEMA) and their report, from the cache if
    the same file, template, tokenizer and settings were prepared before."""
    source = str(data.train_dataset)
    template = load_template(data.template) if data.template else None
    opened = open_source(source, data.train_split, key)
    settings = asdict(data) | {"val_dataset": None, "val_split": None, "val_dataset_split": None, "template": None}
    identity = {
        "version": CACHE_VERSION,
        "source": opened.digest,
        "settings": settings,
        "template": template and asdict(template),
        "tokenizer": _tokenizer_digest(pairs.tokenizer),
        "max_length": max_length,
    }
    cache = Path(datasets.config.HF_DATASETS_CACHE) / "polar"
    folder = cache / _digest(identity)
    try:
        with locked(folder):
            if not folder.exists():
                _build(folder, data, opened.rows, template, pairs, max_length)
    except OSError as error:
        raise UserError(f"cannot write prepared data to {cache}: {error}: set HF_DATASETS_CACHE") from error
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return datasets.Dataset.from_file(str(folder / "tokens.arrow")), report | {"prepared_as": folder.name}


def _build(
    folder: Path,
    data: DataArguments,
    rows: Iterator[tuple[int, Any]],
    template: Template | None,
    pairs: PairTokenizer,
    max_length: int | None,
) -> None:
    """Write `folder` with tokens.arrow and report.json; it appears whole or not at all."""
    source = str(data.train_dataset)
    limits = _Limits(max_length, data.on_too_long, pairs.eos, pairs.special)
    counts = Counts(source, "line" if source.endswith(".jsonl") else "row")

    def clean(response: str) -> str:
        response = pairs.without_eos(response)
        return _CALCULATOR_MARK.sub("", response) if data.calculator_marks == "remove" else response

    rows = islice(rows, data.max_train_rows)
    head = list(islice(rows, 100))
    names = {str(key) for _, row in head if isinstance(row, dict) for key in row}
    if template is None:
        assert data.task is not None, "a run without a template has a task"
        texts = task_texts(data.task)
    else:
        texts = column_texts(data, template, names, clean, source)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        with pa.OSFile(str(temporary / "tokens.arrow"), "wb") as file, pa.ipc.new_stream(file, _SCHEMA) as writer:
            readable = _texts(chain(head, rows), texts, counts)
            shown = tqdm(readable, desc=f"tokenising {source}", unit=" rows", disable=None, mininterval=2, leave=False)
            for batch in _batches(shown, _BATCH):
                encoded = pairs.encode([text.prompt for text in batch], [text.response for text in batch])
                fitted = (_fitted(*row, limits, counts) for row in zip(batch, encoded, strict=True))
                kept = [row for row in fitted if row is not None]
                writer.write_batch(pa.RecordBatch.from_pylist(kept, schema=_SCHEMA))
        if not counts.kept:
            raise UserError(counts.nothing_left())
        write_json(temporary / "report.json", counts.report() | texts.report)
        try:
            os.rename(temporary, folder)
        except OSError:
            if not folder.exists():  # else another node without a common lock was first, with the same content
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


class _Text(NamedTuple):
    """A row as text, and where it stands."""

    place: int
    prompt: str
    response: str


def _texts(rows: Iterable[tuple[int, Any]], texts: RowTexts, counts: Counts) -> Iterator[_Text]:
    """Yield the rows that have a prompt and a response; count the others."""
    for place, row in rows:
        counts.rows += 1
        if not isinstance(row, dict):
            counts.drop("not_a_mapping", place)
            continue
        found = texts.read(row)
        if isinstance(found, str):
            counts.drop(found, place)
        else:
            yield _Text(place, *found)


@dataclass(frozen=True)
class _Limits:
    """What a tokenised row must keep to."""

    max_length: int | None
    on_too_long: str
    eos: int
    special: frozenset[int]
    """Ids that end or restart a text: none may stand in the middle of a row."""

    def problem(self, pair: TokenPair) -> str | None:
        """Return why the row cannot be used, or None; a row that can be truncated has no problem."""
        if not pair.response:  # a tokenizer may have nothing for a text, such as a lone zero-width space
            return "empty_response"
        if not self.special.isdisjoint([*pair.prompt[1:], *pair.response]):
            return "special_token_in_text"
        if self.max_length is None or pair.length < self.max_length:
            return None
        if len(pair.prompt) >= self.max_length:
            return "prompt_too_long"
        return None if self.on_too_long == "truncate" else "too_long"


def _fitted(text: _Text, pair: TokenPair, limits: _Limits, counts: Counts) -> dict[str, Any] | None:
    """Return a row of _SCHEMA, or None after counting why there is none."""
    problem = limits.problem(pair)
    if limits.on_too_long == "error" and problem in ("too_long", "prompt_too_long"):
        raise UserError(
            f"{counts.source} {counts.unit} {text.place}: {pair.length + 1} tokens with EOS, max_length is "
            f"{limits.max_length}: raise it, or set on_too_long to drop or truncate"
        )
    if problem:
        counts.drop(problem, text.place)
        return None
    ids = [*pair.prompt, *pair.response, limits.eos]
    if limits.max_length is not None and len(ids) > limits.max_length:
        counts.truncate(text.place)
        ids = ids[: limits.max_length]
    counts.kept += 1
    counts.spans_border += pair.spans_border
    loss_tokens = len(ids) - len(pair.prompt)
    return {
        "input_ids": ids,
        "completion_mask": [0] * len(pair.prompt) + [1] * loss_tokens,
        "length": len(ids),
        "loss_tokens": loss_tokens,
        "prompt_hash": int.from_bytes(hashlib.sha256(text.prompt.encode()).digest()[:8], "big", signed=True),
    }


def _batches(rows: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(rows)
    while batch := list(islice(iterator, size)):
        yield batch


def _tokenizer_digest(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return _digest([type(tokenizer).__name__, tokenizer.bos_token, tokenizer.eos_token, content])


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]
