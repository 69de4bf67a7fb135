"""Answers of an interrupted scoring, so that the next start of the same command does not compute them again.

One JSON line per answer, written as soon as its batch is done, one file per process, in a folder beside the results
that goes when these are written. lm-eval's own cache is a pickle in SQLite, keyed by the prompt alone: it would give
the answers of one adapter to the next. The key here is a hash of the prompt and of everything else that decides.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TextIO


class SampleCache:
    """Answers by key.

    Args:
        folder: where the files are; None keeps nothing.
        identity: what decides an answer besides the request: adapter, base, dtype, backend.
        rank: of this process, the only one that writes its file.
    """

    def __init__(self, folder: Path | None, identity: dict[str, Any], rank: int = 0) -> None:
        self.folder, self.rank = folder, rank
        self._identity = json.dumps(identity, sort_keys=True)
        self._file: TextIO | None = None

    def key(self, *request: Any) -> str:
        """Return the key of a request: any JSON values."""
        text = json.dumps([self._identity, *request], sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()

    def read(self) -> dict[str, Any]:
        """Return all answers in the folder, of whatever process and identity; a line that was cut off is left out."""
        known: dict[str, Any] = {}
        for path in sorted(self.folder.glob("*.jsonl")) if self.folder else []:
            for line in path.read_bytes().splitlines():
                try:
                    entry = json.loads(line)
                    known[entry["key"]] = entry["answer"]
                except (ValueError, KeyError, TypeError):
                    continue
        return known

    def add(self, answers: Iterable[tuple[str, Any]]) -> None:
        """Append answers and hand them to the operating system, where they survive the death of this process."""
        if self.folder is None:
            return
        if self._file is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / f"rank-{self.rank}.jsonl"
            torn = path.is_file() and not path.read_bytes().endswith(b"\n")
            self._file = path.open("a", encoding="utf-8")
            if torn:  # the last process died within a line
                self._file.write("\n")
        for key, answer in answers:
            self._file.write(json.dumps({"key": key, "answer": answer}) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close this process's file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def remove(self) -> None:
        """Delete the folder; the results are written."""
        self.close()
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
