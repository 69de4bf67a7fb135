"""Start a script on N gloo ranks of this machine and show its output when it fails."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run_ranks(num_ranks: int, script: Path, *arguments: str, timeout_s: int = 240) -> str:
    """Run `script` under torchrun and return what it printed; AssertionError with the output when a rank fails."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_ranks)]
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
        [*command, str(script), *arguments], env=environment, text=True, capture_output=True, timeout=timeout_s
    )
    output = done.stdout + done.stderr
    assert done.returncode == 0, f"{script.name} failed on {num_ranks} ranks:\n{output[-6000:]}"
    return output
