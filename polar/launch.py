"""One process or many: what a run sets in its environment, and errors that all ranks must share."""

from __future__ import annotations

import atexit
import concurrent.futures
import os
import re
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from polar.errors import UserError

T = TypeVar("T")


def rank() -> int:
    """Return the global rank that the launcher gave this process; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def local_environment(argv: list[str]) -> None:
    """Set what has to stand in the environment before transformers and deepspeed are imported.

    Args:
        argv: the command line; read only for whether it asks for deepspeed.
    """
    import torch

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the data loader forks after the tokenizer was used
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if "RANK" not in os.environ and _asks_for_deepspeed(argv):
        # Started without a launcher, deepspeed looks for MPI. One process is a world of its own.
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", str(_free_port()))


def on_all_ranks(work: Callable[[], T]) -> T:
    """Run `work` on every rank; if it raises UserError anywhere, raise the one of the lowest rank everywhere.

    Collective. Without it a rank that failed alone would leave the others waiting in the next collective.
    """
    import torch.distributed as dist

    result, problem = None, None
    try:
        result = work()
    except UserError as error:
        if not _is_distributed():
            raise
        problem = str(error)
    if _is_distributed():
        problems: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(problems, problem)
        problem = next((p for p in problems if p is not None), None)
        if problem is not None:
            raise UserError(problem)
    return result  # type: ignore[return-value]


def from_main_process(work: Callable[[], T]) -> T:
    """Run `work` on the main process and return its result, or raise its UserError, on every rank. Collective."""
    import torch.distributed as dist

    results = [on_all_ranks(lambda: work() if rank() == 0 else None)]
    if _is_distributed():
        dist.broadcast_object_list(results, src=0)
    return results[0]  # type: ignore[return-value]


def from_main_process_for_long(work: Callable[[], T], check_s: float = 5.0) -> T:
    """`from_main_process` for work that takes longer than a collective may wait (NCCL: ten minutes). Collective.

    The main process works in a thread, and all processes meet every few seconds to hear that it is not done.

    Args:
        work: as for `from_main_process`; it must call no collective.
        check_s: seconds between two meetings.
    """
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        future: Any = pool.submit(work) if rank() == 0 else None
        while not from_main_process(lambda: bool(concurrent.futures.wait([future], check_s).done)):
            pass
        return from_main_process(lambda: future.result())


def join_deepspeed() -> None:
    """Tell deepspeed about the process group that accelerate has set up.

    On the CPU accelerate 1.15 sets up torch.distributed itself, and `zero.Init` would then take the world for one
    process. Where deepspeed has set up the group, this does nothing.
    """
    import deepspeed

    if os.environ.get("DS_ACCELERATOR") == "cpu":
        # DeepSpeed 0.19.8 compiles a shared-memory all-reduce at its first start on CPUs, a minute on two cores, and
        # again whenever another environment was used in between. gloo gives the same sums.
        deepspeed.ops.__compatible_ops__ = {**deepspeed.ops.__compatible_ops__, "deepspeed_shm_comm": False}
    deepspeed.init_distributed(verbose=False)


def shut_down() -> None:
    """Leave the process group, if there is one."""
    import torch.distributed as dist

    if _is_distributed():
        dist.destroy_process_group()


def end_process(code: int) -> NoReturn:
    """Run the exit handlers and end the process, without tearing the interpreter down.

    Engines keep process groups alive after `shut_down`, and with them gloo's threads (torch 2.13). Such a thread that
    lets go of its last tensor while the interpreter finalises cannot take its lock any more, and the process aborts
    ("terminate called without an active exception") after a run that was complete.

    Args:
        code: exit code.
    """
    for thread in threading.enumerate():
        if not thread.daemon and thread is not threading.current_thread():
            thread.join()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _is_distributed() -> bool:
    import torch.distributed as dist

    return dist.is_available() and dist.is_initialized()


def _asks_for_deepspeed(argv: list[str]) -> bool:
    """Tell whether the command line or its config file sets `deepspeed`; the real parser runs later."""
    if any(token.partition("=")[0] == "--deepspeed" for token in argv):
        return True
    for token, following in zip(argv, [*argv[1:], ""], strict=True):
        if token.startswith("--config"):
            path = Path(token.partition("=")[2] or following).expanduser()
            if path.is_file():
                text = path.read_text(encoding="utf-8", errors="replace")
                # Any indentation: a variant may set it, and a process group of one process does no harm.
                return re.search(r"^\s*deepspeed:\s*[^\s#]", text, re.MULTILINE) is not None
    return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
