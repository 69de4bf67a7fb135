"""Containers of the built images, with folders of the test mounted and no network."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.container.images import IMAGES, exists, podman
from tests.integration.commands import ROOT

Run = Callable[..., subprocess.CompletedProcess[str]]
CALLER = 4321  # neither root, nor a user of the image, nor one of this machine
# runc runs here only with limits of its own.
LIMITS = ["--ulimit", "nofile=1024:1024", "--ulimit", "nproc=4096:4096"]


@pytest.fixture(scope="session", autouse=True)
def _images() -> None:
    for image in IMAGES:
        assert exists(f"localhost/{image}"), f"{image} is not built: python -m tests.container.images"


@pytest.fixture(scope="session")
def run() -> Run:
    """Return `run(IMAGE, *ARGUMENTS, mounts=(), options=(), code=0)`: a container without network, to its end."""

    def run_(
        image: str, *arguments: str, mounts: tuple[str, ...] = (), options: tuple[str, ...] = (), code: int = 0
    ) -> subprocess.CompletedProcess[str]:
        volumes = [word for mount in mounts for word in ("--volume", mount)]
        done = podman("run", "--rm", "--network", "none", *LIMITS, *volumes, *options, f"localhost/{image}", *arguments)
        assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done

    return run_


@pytest.fixture(scope="session")
def problems(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train.jsonl, val.jsonl and test.jsonl of the demo's problems."""
    from demo.run import make_data

    folder = readable(tmp_path_factory.mktemp("problems"))
    make_data(folder, num_train=64, num_test=8, seed=0)
    return folder


def owned(folder: Path, user: int = CALLER) -> Path:
    """Make a folder that belongs to somebody, below folders that anybody may enter."""
    readable(folder.parent)
    folder.mkdir()
    os.chown(folder, user, user)
    return folder


def readable(folder: Path) -> Path:
    """Let other users into a temporary folder of pytest."""
    for parent in (folder, *folder.parents):
        if parent == Path("/tmp") or parent == Path(os.environ.get("TMPDIR", "/tmp")):
            break
        parent.chmod(parent.stat().st_mode | 0o055)
    return folder


BASE = f"{ROOT}/demo/base:/base:ro"
