"""Whole files or none: everything that polar writes appears under its final name only when it is complete."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def atomic_directory(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary sibling directory that becomes `path` when the block ends without an error.

    Args:
        path: the final name. An existing directory there is replaced only after the new one is complete.
    """
    final = Path(path)
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{final.name}.incomplete-", dir=final.parent))
    os.chmod(temporary, 0o777 & ~_umask())  # mkdtemp gives 0700, which hides results from group members
    try:
        yield temporary
        for path in temporary.rglob("*"):
            if path.is_file():
                path.chmod(0o666 & ~_umask())  # safetensors 0.8 writes 0600
        if final.exists():
            previous = Path(tempfile.mkdtemp(prefix=f".{final.name}.previous-", dir=final.parent))
            os.rename(final, previous / final.name)
            os.rename(temporary, final)
            shutil.rmtree(previous)
        else:
            os.rename(temporary, final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` to `path` through a temporary file and a rename."""
    final = Path(path)
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = final.with_name(f".{final.name}.incomplete-{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, final)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
