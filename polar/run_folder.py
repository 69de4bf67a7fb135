"""The folder of one run: its settings, where it came from, what it read."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from polar.files import remove_leftovers, write_json, write_text

PACKAGES = ("polar", "torch", "transformers", "peft", "trl", "accelerate", "deepspeed", "datasets", "safetensors")
DONE = "done.json"  # written last: a folder that holds it holds a run that reached its last step
FILES = (
    "config.yaml",
    "provenance.json",
    "metrics.jsonl",
    "data_report.json",
    "trainer_state.json",
    "ranks.json",
    DONE,
)


def open_run_folder(folder: Path, config_yaml: str, data_report: dict[str, Any], provenance: dict[str, Any]) -> None:
    """Remove what an earlier run left in `folder` and write the files that exist before the first step.

    Call it on the main process only, when nothing can be wrong with the settings any more. Files that are not of a
    run stay.
    """
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    for name in FILES:
        (folder / name).unlink(missing_ok=True)
    # Scores of the old adapter would stand beside the new one in a report.
    scores = [file.parent for file in folder.glob("eval_*/results.json")]
    for old in [folder / "adapter", *folder.glob("checkpoint-*"), *scores]:
        if old.is_dir():
            shutil.rmtree(old)
    write_text(folder / "config.yaml", config_yaml)
    write_json(folder / "data_report.json", data_report)
    write_json(folder / "provenance.json", provenance)


def continue_run_folder(folder: Path, config_yaml: str, provenance: dict[str, Any], metrics_bytes: int) -> None:
    """Prepare `folder` for a run that continues: forget what was logged after the checkpoint. On the main process only.

    Args:
        folder: holds the run.
        config_yaml: the settings of this start.
        provenance: of this start; goes into the list `resumed` of provenance.json, which keeps the first start.
        metrics_bytes: size of metrics.jsonl when the checkpoint was written.
    """
    remove_leftovers(folder)
    (folder / DONE).unlink(missing_ok=True)
    metrics = folder / "metrics.jsonl"
    if metrics.is_file() and metrics.stat().st_size > metrics_bytes:
        os.truncate(metrics, metrics_bytes)
    write_text(folder / "config.yaml", config_yaml)
    try:
        first = json.loads((folder / "provenance.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        first = provenance
    write_json(folder / "provenance.json", first | {"resumed": [*first.get("resumed", []), provenance]})


def collect_provenance(world_size: int, device: str, engine: str) -> dict[str, Any]:
    """Return versions, commit, command, machine and time of this start."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "command": shlex.join([Path(sys.executable).name, *sys.orig_argv[1:]]),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": source_commit(),
        "world_size": world_size,
        "engine": engine,
        "device": device,
        "gpu": gpu,
        "cpu_count": os.cpu_count(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: installed_version(name) for name in PACKAGES},
    }


def read_done(folder: Path) -> dict[str, Any] | None:
    """Return what a finished run wrote into done.json, None where the run is not finished."""
    try:
        return json.loads((folder / DONE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def installed_version(package: str) -> str | None:
    """Return the version of an installed distribution, None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def source_commit() -> str | None:
    """Return the commit of the checkout that polar runs from, with "+changes" where files differ.

    An installed polar has none (None); an image has that of its build, in POLAR_COMMIT, where it was named.
    """
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return os.environ.get("POLAR_COMMIT") or None
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True, timeout=20
        ).stdout.strip()
        changes = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"],
            cwd=root,
            capture_output=True,
            text=True,
            check=True,
            timeout=20,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+changes" if changes else "")
