"""Start the project's commands as a user does, in processes of their own."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 300


def polar(*arguments: str, ok: bool = True) -> subprocess.CompletedProcess[str]:
    """Run `polar ...` in one process."""
    return _run([sys.executable, "-m", "polar.cli", *arguments], ok)


def train(*arguments: str, ok: bool = True) -> subprocess.CompletedProcess[str]:
    """Run `python -m polar.train ...` in one process."""
    return _run([sys.executable, "-m", "polar.train", *arguments], ok)


def python(*arguments: str, ok: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a Python script in one process."""
    return _run([sys.executable, *arguments], ok)


def torchrun_train(*arguments: str, ranks: int = 2, ok: bool = True) -> subprocess.CompletedProcess[str]:
    """Run the training command under torchrun."""
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}"]
    return _run([*launcher, f"--master_port={free_port()}", "-m", "polar.train", *arguments], ok)


def deepspeed_train(*arguments: str, ranks: int = 2, ok: bool = True) -> subprocess.CompletedProcess[str]:
    """Run the training command under the deepspeed launcher, which adds --local_rank=N."""
    return _run(deepspeed_command(*arguments, ranks=ranks), ok)


def deepspeed_command(*arguments: str, ranks: int = 2) -> list[str]:
    """Return the command line that `deepspeed_train` runs."""
    launcher = str(Path(sys.executable).with_name("deepspeed"))
    options = [f"--num_accelerators={ranks}", f"--master_port={free_port()}", "--module"]
    return [launcher, *options, "polar.train", *arguments]


def metrics(run: Path, key: str) -> list[float]:
    """Return the values of `key` in metrics.jsonl, in order."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records: list[dict[str, Any]] = [json.loads(line) for line in lines]
    return [record[key] for record in records if key in record]


def environment() -> dict[str, str]:
    """Return the environment of a command: this process's, without what a launcher or an engine has put there."""
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        variables.pop(name, None)
    variables["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{variables['PATH']}"
    return variables


def free_port() -> int:
    """Return a TCP port that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _run(command: list[str], ok: bool) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(
        command,
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        stdin=subprocess.DEVNULL,
    )
    if ok:
        assert result.returncode == 0, f"{command}\n{result.stdout[-3000:]}\n{result.stderr[-5000:]}"
    return result
