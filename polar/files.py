"""Whole files or none: everything that polar writes appears under its final name only when it is complete.

A file or folder is written under a temporary name that contains `.incomplete-`, flushed to the disk (`fsync`), and then
renamed, which POSIX file systems do at once or not at all. So it survives a killed process, and a node or power that
fails right after the rename. What the flush costs is the time in which the disk takes the bytes, which would otherwise
go by in the background.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

INCOMPLETE, PREVIOUS = ".incomplete-", ".previous-"  # in the names of what is being written, and being replaced


@contextlib.contextmanager
def atomic_directory(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary sibling directory that becomes `path` when the block ends without an error.

    Args:
        path: the final name. An existing directory there is replaced only after the new one is complete; a process
            killed between the two renames leaves it where `remove_leftovers` finds it.
    """
    final = Path(path)
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{final.name}{INCOMPLETE}", dir=final.parent))
    os.chmod(temporary, 0o777 & ~_umask())  # mkdtemp gives 0700, which hides results from group members
    try:
        yield temporary
        for path in temporary.rglob("*"):
            if path.is_file():
                path.chmod(0o666 & ~_umask())  # safetensors 0.8 writes 0600
            flush(path)
        flush(temporary)
        previous = None
        if final.exists():
            previous = Path(tempfile.mkdtemp(prefix=f".{final.name}{PREVIOUS}", dir=final.parent))
            os.rename(final, previous / final.name)
        os.rename(temporary, final)
        flush(final.parent)
        if previous is not None:
            shutil.rmtree(previous)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` to `path` through a temporary file and a rename."""
    final = Path(path)
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = final.with_name(f".{final.name}{INCOMPLETE}{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        flush(temporary)
        os.replace(temporary, final)
        flush(final.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock on a file that is about to be made, where the file system has locks; elsewhere all do the work."""
    from filelock import FileLock

    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_name(f"{path.name}.lock"))
    try:
        lock.acquire()
    except NotImplementedError:
        yield
        return
    try:
        yield
    finally:
        lock.release()


def flush(path: Path) -> None:
    """Wait until what was written to a file, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL or not path.is_dir():  # some network file systems flush no directories
            raise
    finally:
        os.close(descriptor)


def remove_directory(path: Path) -> None:
    """Delete a directory so that a process killed meanwhile leaves nothing half-deleted under its name."""
    doomed = Path(tempfile.mkdtemp(prefix=f".{path.name}{INCOMPLETE}", dir=path.parent))
    os.rename(path, doomed / path.name)
    shutil.rmtree(doomed, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Undo what a killed process was doing in `folder`: delete what it wrote, put back what it was replacing.

    Call it when no other process writes there.
    """
    for previous in sorted(folder.glob(f".*{PREVIOUS}*")):
        for path in previous.iterdir():
            if not (folder / path.name).exists():
                os.rename(path, folder / path.name)
        shutil.rmtree(previous, ignore_errors=True)
    for path in folder.glob(f".*{INCOMPLETE}*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
