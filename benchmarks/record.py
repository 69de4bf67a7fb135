"""What every result file says about how it was made."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]


def environment() -> dict[str, Any]:
    """Command, commit, versions and hardware of this run."""
    versions = {}
    for name in ("torch", "transformers", "peft", "accelerate", "deepspeed", "trl"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    arguments = [Path(argument).name if Path(argument).is_absolute() else argument for argument in sys.argv[1:]]
    script = Path(sys.argv[0]).resolve()
    shown = script.relative_to(ROOT) if script.is_relative_to(ROOT) else script.name
    return {
        "command": shlex.join(["python", str(shown), *arguments]),
        "commit": _commit(),
        "versions": versions,
        "python": platform.python_version(),
        "cpu": _cpu_name(),
        "cpu_cores": os.cpu_count(),
    }


def device_name(device: str) -> str:
    """`cpu` or the name of the GPU."""
    return torch.cuda.get_device_name() if device == "cuda" else "cpu"


def publish(result: dict[str, Any], out: Path | None) -> None:
    """Print a result as JSON and, with `out`, write it there."""
    text = json.dumps(result, indent=2)
    print(text)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text + "\n", encoding="utf-8")


def summary(values: list[float]) -> dict[str, float]:
    """min, median and max of the runs, with their number."""
    return {"min": min(values), "median": statistics.median(values), "max": max(values), "runs": len(values)}


def _commit() -> str:
    done = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude", "*"], capture_output=True, text=True
    )
    return done.stdout.strip() or "unknown"


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
