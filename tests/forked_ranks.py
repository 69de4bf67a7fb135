"""Ranks forked from a process that has imported everything: they start in a second, where a launcher takes twenty.

For scripts that start ranks many times. What the launchers themselves do is tested with the launchers.
"""

from __future__ import annotations

import gc
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

TIMEOUT_S = 240


def start_ranks(num_ranks: int, work: Callable[[], int | None], log: Path) -> list[int]:
    """Fork `num_ranks` processes that call `work`, in the environment that torchrun gives.

    Args:
        num_ranks: 0 for one process without a launcher's environment.
        work: returns the exit code; None counts as 0.
        log: gets what the processes print, `log` + rank.

    Returns:
        Process ids, by rank.
    """
    port, pids = _free_port(), []
    gc.freeze()  # the ranks share what is imported, and look for garbage in what is theirs
    sys.stdout.flush()
    for rank in range(max(num_ranks, 1)):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                for descriptor in (1, 2):
                    os.dup2(os.open(f"{log}{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
                if num_ranks:
                    os.environ |= {
                        **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_ranks)},
                        **{"LOCAL_WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
                    }
                code = work() or 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        pids.append(pid)
    return pids


def wait_for_ranks(pids: list[int], timeout_s: float = TIMEOUT_S) -> list[int]:
    """Return the exit codes, negative for signals; ranks that do not end in time are killed first."""
    deadline, codes = time.monotonic() + timeout_s, dict.fromkeys(pids)
    while None in codes.values():
        for pid in [pid for pid, code in codes.items() if code is None]:
            if time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    return [code for code in codes.values() if code is not None]


def run_ranks(num_ranks: int, work: Callable[[], int | None], log: Path, timeout_s: float = TIMEOUT_S) -> None:
    """Run `work` on all ranks; AssertionError with what the first failing rank printed."""
    codes = wait_for_ranks(start_ranks(num_ranks, work, log), timeout_s)
    for rank, code in enumerate(codes):
        assert code == 0, f"exit codes {codes}\n{Path(f'{log}{rank}').read_text()[-4000:]}"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
