"""Rows of GLUE's tasks: from the hub, or from local TSV, JSONL and parquet files, each with the place where it stands.

A row that cannot be used is named by its kind of problem (`polar.data_report.MEANING`), so that it can be counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from polar.errors import UserError
from polar.glue import MAX_SCORE, GlueTask
from polar.rows import FILE_KINDS, is_file_name, open_source

# Stems of the files of a folder: the official download's, the hub's.
_STEMS = {"train": ("train",), "validation": ("dev", "validation")}
_STEMS |= {"validation_matched": ("dev_matched", "validation_matched", "dev", "validation")}
_STEMS |= {"validation_mismatched": ("dev_mismatched", "validation_mismatched")}
KINDS = (".tsv", *FILE_KINDS)


class GlueRow(NamedTuple):
    """One or two texts, and a class or a score."""

    texts: tuple[str, ...]
    label: int | float


@dataclass(frozen=True)
class GlueSource:
    """Where the rows of one split are.

    Attributes:
        name: file, or hub name with its config.
        unit: what a place is: line or row.
        rows: yields (place, row) once; a row is what the file holds there, or the name of a problem.
    """

    name: str
    unit: str
    rows: Iterator[tuple[int, Any]]


def validation_split(part: str) -> str:
    """The hub's name of a validation set."""
    return f"validation_{part}" if part else "validation"


def open_split(task: GlueTask, source: str, split: str, key: str) -> GlueSource:
    """Open one split of a task.

    Args:
        task: which one.
        source: a file; a folder with train and dev files, or with a folder of the task; or a hub name, whose config
            is the task where none is given.
        split: the hub's name of the split.
        key: the config key that holds `source`, for messages.

    Raises:
        UserError: no such file, no such split in the folder, a header without the task's columns, hub not reachable.
    """
    if not is_file_name(source):
        name = source if ":" in source else f"{source}:{task.name}"
        return GlueSource(name, "row", open_source(name, split, key).rows)
    path = find_file(task, source, split, key)
    if path.suffix.lower() == ".tsv":
        return GlueSource(str(path), "line", _tsv_rows(task, path))
    return GlueSource(str(path), "line" if path.suffix == ".jsonl" else "row", open_source(str(path), split, key).rows)


def find_file(task: GlueTask, source: str, split: str, key: str) -> Path:
    """Return the file of a split: `source` itself, or what a folder calls it.

    Raises:
        UserError: there is none; says what was looked for.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        path = _file_in(path, task, source, split, key)
    if not path.is_file():
        raise UserError(f"{key} {source}: no such file or folder")
    if path.suffix.lower() not in KINDS:
        raise UserError(f"{key} {source}: unknown kind of file {path.suffix!r}: use {', '.join(KINDS)}")
    if path.stat().st_size == 0:
        raise UserError(f"{key} {path}: the file is empty")
    return path


def _file_in(path: Path, task: GlueTask, source: str, split: str, key: str) -> Path:
    folder = next((path / name for name in (task.name, task.folder) if (path / name).is_dir()), path)
    for stem in _STEMS[split]:
        candidates = [folder / f"{stem}{kind}" for kind in KINDS] + sorted(folder.glob(f"{stem}-00000-of-00001.*"))
        for candidate in candidates:
            if candidate.is_file() and candidate.suffix in KINDS:
                return candidate
    stems = " or ".join(_STEMS[split])
    raise UserError(f"{key} {source}: no {split} rows of {task.name} in {folder}: put {stems}{'|'.join(KINDS)} there")


def _tsv_rows(task: GlueTask, path: Path) -> Iterator[tuple[int, Any]]:
    """Yield the lines of an official TSV file under the hub's names; a line with other columns is a problem.

    The files know no quoting: a bare double quote is text (csv.QUOTE_NONE), and a line ends at a line feed only.
    """
    columns: tuple[str, ...] = ()
    with path.open("rb") as file:
        for line_number, content in enumerate(file, start=1):
            try:
                line = content.decode(
                    "utf-8-sig" if line_number == 1 else "utf-8"
                )  # MRPC begins with a byte order mark
            except UnicodeDecodeError as error:
                raise UserError(f"{path} line {line_number}: not UTF-8 text ({error.reason})") from None
            fields = line.rstrip("\r\n").split("\t")
            if not columns:
                columns, is_header = _columns(task, fields, path)
                if is_header:
                    continue
            if not line.strip():
                continue
            if len(fields) == len(columns):
                yield line_number, _renamed(task, dict(zip(columns, fields, strict=True)))
            else:
                yield line_number, "wrong_number_of_columns"


def _columns(task: GlueTask, first: list[str], path: Path) -> tuple[tuple[str, ...], bool]:
    """Return the columns of a TSV file by its first line, and whether that is a header."""
    official, hub = {*task.tsv_texts, task.tsv_label}, {*task.texts, "label"}
    if official <= set(first) or hub <= set(first):
        return tuple(first), True
    if task.tsv_columns and len(first) == len(task.tsv_columns):
        return task.tsv_columns, False
    missing = ", ".join(name for name in (*task.tsv_texts, task.tsv_label) if name not in first)
    expected = f"{len(task.tsv_columns)} columns without a header" if task.tsv_columns else f"a header with {missing}"
    raise UserError(
        f"{path} line 1: task {task.name} expects {expected}, found {len(first)} columns: {', '.join(first)[:100]}"
    )


def _renamed(task: GlueTask, fields: Mapping[str, str]) -> dict[str, str]:
    if {*task.texts, "label"} <= fields.keys():
        return {name: fields[name] for name in (*task.texts, "label")}
    texts = {name: fields[official] for name, official in zip(task.texts, task.tsv_texts, strict=True)}
    return texts | {"label": fields[task.tsv_label]}


def read_row(task: GlueTask, row: Any) -> GlueRow | str:
    """Return the texts and the label of a row under the hub's names, or the kind of problem that it has."""
    if isinstance(row, str):
        return row
    if not isinstance(row, Mapping):
        return "not_a_mapping"
    texts: list[Any] = [row.get(name) for name in task.texts]
    if "label" not in row or any(text is None for text in texts):
        return "missing_column"
    if not all(isinstance(text, str) for text in texts):
        return "not_text"
    if not all(text.strip() for text in texts):
        return "empty_text"
    label = row["label"]
    if label is None or label == "" or (label in (-1, "-1") and not task.is_regression):  # -1: the hub's test rows
        return "no_label"
    value = _score(label) if task.is_regression else _class(task, label)
    return "unknown_label" if value is None else GlueRow(tuple(texts), value)


def _score(label: Any) -> float | None:
    try:
        value = float(label)
    except (TypeError, ValueError):
        return None
    return value if 0 <= value <= MAX_SCORE and math.isfinite(value) and not isinstance(label, bool) else None


def _class(task: GlueTask, label: Any) -> int | None:
    if isinstance(label, str):
        if label in task.labels:
            return task.labels.index(label)
        label = int(label) if label.isdecimal() else None
    return label if type(label) is int and 0 <= label < len(task.labels) else None
