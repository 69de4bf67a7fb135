"""Rows from files or the hub, in any of the known formats, each with the place where it stands.

No tokens here: `polar.data` turns rows into tokens.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polar.errors import UserError

FILE_KINDS = (".json", ".jsonl", ".parquet")


@dataclass(frozen=True)
class Columns:
    """Which columns of a row hold what; `input` is optional extra context."""

    prompt: str
    response: str
    input: str | None = None


FORMATS = {
    "prompt_completion": Columns("prompt", "completion"),
    "query_response": Columns("query", "response"),  # MetaMathQA
    "question_answer": Columns("question", "answer"),  # GSM8K
    "problem_solution": Columns("problem", "solution"),  # MATH
    "instruction": Columns("instruction", "output", "input"),  # Alpaca, LLM-Adapters
}


def request_of(fields: Mapping[str, object]) -> tuple[str, str]:
    """Return (instruction, extra input) of a row in any known format; the response may be missing.

    Raises:
        UserError: no column of a known format, or columns of two formats.
    """
    names = {columns.prompt: columns for columns in FORMATS.values() if fields.get(columns.prompt) is not None}
    if "instruction" in names:
        names = {"instruction": names["instruction"]}
    if len(names) != 1:
        found = ", ".join(sorted(names)) or "none"
        known = ", ".join(columns.prompt for columns in FORMATS.values())
        raise UserError(f"a prompt needs exactly one of the fields {known}; the row has {found}")
    prompt, columns = next(iter(names.items()))
    extra = fields.get(columns.input) if columns.input else None
    return str(fields[prompt]), "" if extra is None else str(extra)


def recognise(names: set[str], source: str) -> tuple[str, Columns]:
    """Return the format whose columns are all among `names`.

    Raises:
        UserError: no format fits, or several do.
    """
    fitting = [key for key, columns in FORMATS.items() if {columns.prompt, columns.response} <= names]
    if len(fitting) == 1:
        return fitting[0], FORMATS[fitting[0]]
    columns_text = ", ".join(sorted(names)) or "none"
    if fitting:
        raise UserError(
            f"{source}: the columns ({columns_text}) fit several formats: set dataset_format to one of "
            + ", ".join(fitting)
        )
    raise UserError(
        f"{source}: no known format has the columns ({columns_text}): set dataset_format, or prompt_column and "
        "response_column"
    )


def is_file_name(source: str) -> bool:
    """Tell a path from a hub name: by ending, by existence, or by how it starts."""
    return (
        Path(source).suffix.lower() in (*FILE_KINDS, ".csv", ".tsv", ".txt", ".gz")
        or source.startswith(("/", "./", "../", "~"))
        or Path(source).expanduser().exists()
    )


def check_source(source: str, key: str) -> None:
    """Check that a file exists, is of a known kind and not empty; a hub name only for its form.

    Raises:
        UserError: naming `key`, the config key that holds `source`.
    """
    if not is_file_name(source):
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?", source):
            raise UserError(f"{key} {source!r}: no such file, and not a hub name like openai/gsm8k:main")
        return
    path = Path(source).expanduser()
    if path.is_dir():
        raise UserError(f"{key} {source} is a folder: give a {', '.join(FILE_KINDS)} file in it")
    if not path.is_file():
        raise UserError(f"{key} {source}: no such file")
    if path.suffix.lower() not in FILE_KINDS:
        raise UserError(f"{key} {source}: unknown kind of file {path.suffix!r}: use {', '.join(FILE_KINDS)}")
    if path.stat().st_size == 0:
        raise UserError(f"{key} {source}: the file is empty")


@dataclass(frozen=True)
class Source:
    """Rows that can be read once, and a digest that changes when they do.

    `rows` yields (place, row): the line number in a file with one row per line, else the row's number, both from 1. A
    row is whatever the file holds there; that it is a mapping with text in it is the reader's check.
    """

    rows: Iterator[tuple[int, Any]]
    digest: str


def open_source(source: str, split: str, key: str = "train_dataset") -> Source:
    """Open a file or load a hub data set; a file's rows are read, and its errors raised, only on iteration.

    Args:
        source: file or `name` or `name:config`.
        split: of a hub data set.
        key: the config key that holds `source`, for messages.

    Raises:
        UserError: unreadable file, broken line (with file and line number), hub not reachable.
    """
    check_source(source, key)
    if not is_file_name(source):
        loaded = _load_hub(source, split, key)
        return Source(enumerate(loaded, start=1), loaded._fingerprint)
    path = Path(source).expanduser()
    parquet = path.suffix.lower() == ".parquet"
    rows = enumerate(_parquet_rows(path), start=1) if parquet else _json_rows(path)
    try:
        with path.open("rb") as file:
            return Source(rows, hashlib.file_digest(file, "sha256").hexdigest())
    except OSError as error:
        raise UserError(f"{key} {source}: cannot read it: {error.strerror}") from None


def read_rows(source: str, split: str, key: str = "train_dataset") -> Iterator[tuple[int, Any]]:
    """Yield (place, row) of a file or hub data set; arguments and errors as in `open_source`."""
    return open_source(source, split, key).rows


def _json_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Rows of a JSON list, or of one JSON value per line, whatever the ending says."""
    with path.open("rb") as file:
        head = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    if head.startswith(b"["):
        yield from enumerate(_json_list(path), start=1)
        return
    line_number = 0
    try:
        with path.open(encoding="utf-8-sig") as file:  # -sig: files from Windows tools begin with a byte order mark
            for line_number, line in enumerate(file, start=1):
                if line.strip():
                    yield line_number, json.loads(line)
    except json.JSONDecodeError as error:
        if line_number == 1 and path.suffix.lower() == ".json":
            raise UserError(f"{path}: neither a JSON list of rows nor one JSON object per line: {error.msg}") from None
        raise UserError(
            f"{path} line {line_number}: not valid JSON ({error.msg} at column {error.colno}): mend or delete the line"
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} line {line_number + 1}: not UTF-8 text ({error.reason})") from None


def _json_list(path: Path) -> list[Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} line {error.lineno}: not valid JSON ({error.msg} at column {error.colno})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise UserError(f"{path}: not a readable parquet file: {str(error).splitlines()[0]}") from None


def _load_hub(source: str, split: str, key: str) -> Any:
    import datasets  # here only: reading files does not need it

    name, _, config = source.partition(":")
    try:
        return datasets.load_dataset(name, config or None, split=split)
    except Exception as error:  # offline, unknown name, config or split: as many classes as there are libraries below
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{key} {source} (split {split}): cannot load it from the hub ({type(error).__name__}: {reason}): "
            "check name and network, or give a local .jsonl or .parquet file"
        ) from error
