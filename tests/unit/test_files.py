"""Files and folders get their names when they are whole and on the disk, and kills leave nothing that counts."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from polar.files import atomic_directory, flush, remove_directory, remove_leftovers, write_text


class _Stop(BaseException):
    """A process that ends here: no handler may run, as after SIGKILL."""


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What reaches the disk and what is renamed, in order, by path at that time."""
    found: list[tuple[str, str]] = []
    fsync, rename, replace = os.fsync, os.rename, os.replace

    def note_fsync(descriptor: int) -> None:
        found.append(("fsync", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "rename", lambda a, b: (found.append(("rename", str(a))), rename(a, b)))
    monkeypatch.setattr(os, "replace", lambda a, b: (found.append(("rename", str(a))), replace(a, b)))
    return found


def test_folder_is_on_the_disk_before_it_has_its_name(tmp_path: Path, events: list[tuple[str, str]]) -> None:
    with atomic_directory(tmp_path / "out") as folder:
        (folder / "sub").mkdir()
        for name in ("a", "sub/b"):
            (folder / name).write_text(name)
    *before, rename, parent = events
    assert {path for what, path in before if what == "fsync"} == {
        str(folder / name) for name in ("", "a", "sub", "sub/b")
    }
    assert rename == ("rename", str(folder))
    assert parent == ("fsync", str(tmp_path))  # the new name itself


def test_file_is_on_the_disk_before_it_has_its_name(tmp_path: Path, events: list[tuple[str, str]]) -> None:
    write_text(tmp_path / "a.json", "{}")
    temporary = events[0][1]
    assert ".a.json.incomplete-" in temporary
    assert events == [("fsync", temporary), ("rename", temporary), ("fsync", str(tmp_path))]


def test_only_a_folder_may_be_one_that_cannot_be_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    (tmp_path / "a").write_text("")
    code = errno.EINVAL
    flush(tmp_path)
    with pytest.raises(OSError, match="Invalid"):
        flush(tmp_path / "a")
    code = errno.EIO
    with pytest.raises(OSError, match="Input/output"):
        flush(tmp_path)


def test_kill_between_two_names_keeps_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old folder has given up its name and the new one has not got it."""
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "old").write_text("")
    rename = os.rename

    def stop(source: Path, target: Path) -> None:
        if Path(target) == tmp_path / "adapter":
            monkeypatch.setattr("shutil.rmtree", lambda *a, **k: None)
            raise _Stop
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", stop)
        with pytest.raises(_Stop), atomic_directory(tmp_path / "adapter") as folder:
            (folder / "new").write_text("")
    monkeypatch.undo()
    assert not (tmp_path / "adapter").exists()
    remove_leftovers(tmp_path)
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == ["adapter", "adapter/old"]


def test_leftovers_go_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / ".checkpoint-3.incomplete-a").mkdir()
    (tmp_path / ".config.yaml.incomplete-77").write_text("half")
    previous = tmp_path / ".adapter.previous-b"  # the new adapter is there: the old one need not come back
    (previous / "adapter" / "old").mkdir(parents=True)
    for name in ("adapter", "checkpoint-1", ".git"):
        (tmp_path / name).mkdir()
    remove_leftovers(tmp_path)
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")} == {"adapter", "checkpoint-1", ".git"}


def test_kill_while_a_folder_is_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    for name in "ab":
        (folder / name).write_text("")

    def stop_after_one_file(path: Path, **options: bool) -> None:
        next(path.rglob("a")).unlink()
        raise _Stop

    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", stop_after_one_file)
        with pytest.raises(_Stop):
            remove_directory(folder)
    assert not folder.exists()
    remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == []
