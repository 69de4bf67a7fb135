"""Run a script on N gloo ranks of this machine, forked from one process that has imported torch, PEFT and DeepSpeed.

Usage: python -m tests.distributed.launch RANKS TIMEOUT_S SCRIPT ARGUMENTS
"""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run_ranks(num_ranks: int, script: Path, *arguments: str, timeout_s: int = 240) -> str:
    """Run `script` on each rank and return what they printed; AssertionError with the output when a rank fails."""
    command = [sys.executable, "-m", "tests.distributed.launch", str(num_ranks), str(timeout_s), str(script)]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        # One ninja for all: another version of it takes operators that are built already for outdated.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        # gloo binds to the address of the host name by default, which a bare machine may not resolve
        "GLOO_SOCKET_IFNAME": "lo",
    }
    done = subprocess.run(
        [*command, *arguments], cwd=ROOT, env=environment, text=True, capture_output=True, timeout=timeout_s + 60
    )
    output = done.stdout + done.stderr
    assert done.returncode == 0, f"{script.name} failed on {num_ranks} ranks:\n{output[-6000:]}"
    return output


def main(num_ranks: int, timeout_s: float, script: str, arguments: list[str]) -> None:
    """Import what every script needs, then fork."""
    import deepspeed  # noqa: F401

    import polar  # noqa: F401
    from tests import forked_ranks

    def work() -> None:
        sys.argv, sys.path[0] = [script, *arguments], str(Path(script).parent)
        runpy.run_path(script, run_name="__main__")

    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "rank"
        forked_ranks.run_ranks(num_ranks, work, log, timeout_s)
        for rank in range(num_ranks):
            print(Path(f"{log}{rank}").read_text())


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3], sys.argv[4:])
