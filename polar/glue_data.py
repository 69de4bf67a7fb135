"""GLUE rows -> tokens and labels, for training and for the validation sets of the task.

A task has at most 400,000 short rows, so every rank reads and tokenises them itself: no cache, no collective, and the
same rows everywhere, which the fingerprint proves.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]

from polar.data_report import Counts, many_left_out, problems_text
from polar.errors import UserError
from polar.glue import GlueTask
from polar.glue_rows import GlueRow, GlueSource, open_split, read_row, validation_split
from polar.rows import is_file_name

if TYPE_CHECKING:
    from polar.run_config import DataArguments

_BATCH = 1000  # rows per call of the tokenizer


@dataclass(frozen=True)
class GlueData:
    """Tokenised rows of a task and what happened on the way.

    Attributes:
        train, validation: columns `input_ids`, `token_type_ids` where the tokenizer makes them, `label`.
        parts: name of each validation set -> its number of rows; they follow each other in `validation`.
        report: what `data_report.json` holds.
    """

    train: datasets.Dataset
    validation: datasets.Dataset
    parts: dict[str, int]
    report: dict[str, Any]

    def summary(self) -> str:
        """Return one readable line per split: rows, tokens, labels, and every row that was left out or cut."""
        splits = {"train": self.report["train"], **self.report["validation"]}
        notes = [f"note: {note}" for note in self.report["notes"]]
        return "\n".join([_summary_line(name, report) for name, report in splits.items()] + notes)


def prepare_glue(data: DataArguments, task: GlueTask, tokenizer: Any, max_length: int | None) -> GlueData:
    """Read, check and tokenise the rows of a task.

    Args:
        data: the run's data settings.
        task: of `data.task`.
        tokenizer: the base model's.
        max_length: most tokens per row, special ones included; longer rows are cut as the tokenizer does (the longest
            text first), or an error with `on_too_long: error`. None: no limit.

    Returns:
        GlueData, in the order of the files.

    Raises:
        UserError: unreadable data, no row that can be used, a row above `max_length` with `on_too_long: error`.
    """
    encode = _Encoder(task, tokenizer, max_length, data.on_too_long)
    source = str(data.train_dataset)
    train, train_report = encode(open_split(task, source, "train", "train_dataset"), data.max_train_rows)
    key, place = ("val_dataset", data.val_dataset) if data.val_dataset else ("train_dataset", source)
    validation, parts, reports = _encode_validation(encode, place, key, None)
    report: dict[str, Any] = {
        "task": task.name,
        "train": train_report,
        "validation": reports,
        "max_length": max_length,
        "on_too_long": data.on_too_long,
        "notes": encode.notes + [note for each in (train_report, *reports.values()) for note in many_left_out(each)],
    }
    report["fingerprint"] = hashlib.sha256(json.dumps(report, sort_keys=True).encode()).hexdigest()[:32]
    return GlueData(train, validation, parts, report)


def prepare_validation(
    task: GlueTask, source: str, key: str, tokenizer: Any, max_length: int | None, max_rows: int | None = None
) -> tuple[datasets.Dataset, dict[str, int], dict[str, Any]]:
    """Read and tokenise the validation rows alone, for scoring.

    Args:
        task: which one.
        source: file, folder or hub name.
        key: the option that holds `source`, for messages.
        tokenizer: the base model's.
        max_length: most tokens per row; longer rows are cut.
        max_rows: the first so many of each validation set; None: all.

    Returns:
        Rows; name of each validation set -> its number of rows; what happened on the way, by split.

    Raises:
        UserError: unreadable data, or no row that can be used.
    """
    return _encode_validation(_Encoder(task, tokenizer, max_length, "truncate"), source, key, max_rows)


def _encode_validation(
    encode: _Encoder, source: str, key: str, max_rows: int | None
) -> tuple[datasets.Dataset, dict[str, int], dict[str, Any]]:
    """The validation sets one after the other; of a single file, the first set."""
    tables, reports, task = {}, {}, encode.task
    is_one_file = is_file_name(source) and not Path(source).expanduser().is_dir()
    for part in task.parts[:1] if is_one_file else task.parts:
        split = validation_split(part)
        tables[part], reports[split] = encode(open_split(task, source, split, key), max_rows)
    if tables.keys() != set(task.parts):
        left_out = ", ".join(validation_split(part) for part in task.parts if part not in tables)
        encode.notes.append(f"{key} is one file, so there is no {left_out}")
    parts = {part: len(table) for part, table in tables.items()}
    return datasets.concatenate_datasets(list(tables.values())), parts, reports


class _Encoder:
    """Texts to tokens; keeps notes that concern all splits.

    Args:
        task: which columns and labels.
        tokenizer: the base model's.
        max_length: most tokens per row.
        on_too_long: truncate or error.
    """

    def __init__(self, task: GlueTask, tokenizer: Any, max_length: int | None, on_too_long: str) -> None:
        self.task, self.tokenizer, self.max_length, self.on_too_long = task, tokenizer, max_length, on_too_long
        self.notes: list[str] = []
        self.columns = [name for name in ("input_ids", "token_type_ids") if name in tokenizer.model_input_names]

    def __call__(self, source: GlueSource, max_rows: int | None) -> tuple[datasets.Dataset, dict[str, Any]]:
        """Return the tokenised rows of a split and their report."""
        counts, digest = Counts(source.name, source.unit), hashlib.sha256()
        label_type = pa.float32() if self.task.is_regression else pa.int64()
        schema = pa.schema({**{name: pa.list_(pa.int32()) for name in self.columns}, "label": label_type})
        batches, lengths, labels = [], [], []
        for rows in _batches(_readable(self.task, islice(source.rows, max_rows), counts), _BATCH):
            encoded = self._encode(rows, counts)
            encoded["label"] = [row.label for _, row in rows]
            for ids, label in zip(encoded["input_ids"], encoded["label"], strict=True):
                digest.update(np.array([len(ids), *ids, label], dtype=np.float64).tobytes())
            lengths += [len(ids) for ids in encoded["input_ids"]]
            labels += encoded["label"]
            batches.append(pa.RecordBatch.from_pydict({name: encoded[name] for name in schema.names}, schema=schema))
        if not counts.kept:
            needed = ", ".join((*self.task.texts, "label"))
            raise UserError(f"{counts.nothing_left()}; rows of {self.task.name} have {needed}")
        half, most = np.percentile(lengths, [50, 95]).tolist()
        report = counts.report() | {
            "rows": counts.kept,
            "tokens": sum(lengths),
            "length_tokens": {"median": half, "p95": most, "longest": max(lengths)},
            "labels": self._label_counts(labels),
            "sha256": digest.hexdigest(),
        }
        del report["token_spans_prompt_and_response"]
        return datasets.Dataset(pa.Table.from_batches(batches)), report

    def _encode(self, rows: list[tuple[int, GlueRow]], counts: Counts) -> dict[str, list[Any]]:
        """Tokenise rows whole, then those again that are too long, so that each cut is counted."""
        texts = [row.texts for _, row in rows]
        whole = self._tokens(texts)
        if self.max_length is None:
            return whole
        too_long = [i for i, ids in enumerate(whole["input_ids"]) if len(ids) > self.max_length]
        if too_long and self.on_too_long == "error":
            place, length = rows[too_long[0]][0], len(whole["input_ids"][too_long[0]])
            raise UserError(
                f"{counts.source} {counts.unit} {place}: {length} tokens, max_length is {self.max_length}: raise it, "
                "or set on_too_long to truncate"
            )
        for index in too_long:
            counts.truncate(rows[index][0])
        cut = self._tokens([texts[i] for i in too_long], truncation=True, max_length=self.max_length)
        for name in self.columns:
            for index, values in zip(too_long, cut.get(name, []), strict=False):
                whole[name][index] = values
        return whole

    def _tokens(self, texts: list[tuple[str, ...]], **options: Any) -> dict[str, list[Any]]:
        if not texts:
            return {}
        encoded = self.tokenizer(*(list(column) for column in zip(*texts, strict=True)), verbose=False, **options)
        return {name: encoded[name] for name in self.columns}

    def _label_counts(self, labels: list[Any]) -> dict[str, Any]:
        if self.task.is_regression:
            return {"mean": round(float(np.mean(labels)), 4), "smallest": min(labels), "largest": max(labels)}
        return {name: labels.count(value) for value, name in enumerate(self.task.labels)}


def _readable(task: GlueTask, rows: Iterable[tuple[int, Any]], counts: Counts) -> Iterator[tuple[int, GlueRow]]:
    """Yield (place, row) for the rows that can be used; count the others."""
    for place, row in rows:
        counts.rows += 1
        found = read_row(task, row)
        if isinstance(found, str):
            counts.drop(found, place)
        else:
            counts.kept += 1
            yield place, found


def _batches(rows: Iterator[Any], size: int) -> Iterator[list[Any]]:
    while batch := list(islice(rows, size)):
        yield batch


def _summary_line(name: str, report: dict[str, Any]) -> str:
    values = report["labels"]
    labels = ", ".join(f"{key} {value:,}" for key, value in values.items())
    text = (
        f"{name}: {report['rows']:,} rows of {report['source']}, {report['tokens']:,} tokens, longest "
        f"{report['length_tokens']['longest']:,}; label {labels}"
    )
    if report["dropped"]:
        text += f"; left out: {problems_text(report['dropped'], report['place'])}"
    if report["truncated"]["rows"]:
        text += f"; cut at max_length: {report['truncated']['rows']:,}"
    return text
