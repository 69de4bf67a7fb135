"""What a node does while a job runs: GPUs, memory, load and disk, one JSON line every N seconds.

    python polar/monitor.py --out runs/x/logs --interval 30 --pid PID &    # ends with the process PID

Only the standard library, so that watching costs next to nothing. `python -m polar.monitor` is the same with a slow
start: Python imports the package, hence torch, before this file can have its say, which then replaces the process by
the lean one (the process id stays).
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import select
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

GIB = 2**30
GPU_FIELDS = {  # key in the log -> field of `nvidia-smi --query-gpu`
    "index": "index",
    "use_percent": "utilization.gpu",
    "memory_used_mib": "memory.used",
    "memory_total_mib": "memory.total",
    "temperature_c": "temperature.gpu",
    "power_w": "power.draw",
}
GPU_TIMEOUT_S = 20  # a GPU that fell off the bus makes nvidia-smi hang
# (folder of the controller, limit, use) of the two generations of control groups
CGROUPS = (
    ("/sys/fs/cgroup", "memory.max", "memory.current"),
    ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
)


def sample(folder: Path) -> dict[str, Any]:
    """Return the state of this node now.

    Args:
        folder: lies on the disk whose free space counts.
    """
    available, total = host_memory()
    gpus, problem = read_gpus()
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "load": [round(value, 2) for value in os.getloadavg()],
        "cpu_count": os.cpu_count(),
        "memory_available_gib": round(available / GIB, 3),
        "memory_total_gib": round(total / GIB, 3),
        "disk_free_gib": round(shutil.disk_usage(folder).free / GIB, 3),
        "gpus": gpus,
        **({"gpu_problem": problem} if problem else {}),
    }


def node_name() -> str:
    """Return SLURM's name of this node; outside of SLURM, the host's."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def host_memory() -> tuple[int, int]:
    """Return (available, total) bytes: the node's, or those of the job's control group where these are less."""
    lines = (line.split() for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
    node = {words[0]: int(words[1]) * 1024 for words in lines}
    available, total = node["MemAvailable:"], node["MemTotal:"]
    for limit, left in _cgroup_limits():
        available, total = min(available, left), min(total, limit)
    return available, total


def read_gpus() -> tuple[list[dict[str, float | None]], str | None]:
    """Ask nvidia-smi for this node's GPUs; return one entry per GPU and what went wrong, if anything did."""
    if shutil.which("nvidia-smi") is None:
        return [], None
    command = ["nvidia-smi", f"--query-gpu={','.join(GPU_FIELDS.values())}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=GPU_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        return [], f"nvidia-smi: {error}"
    if done.returncode:
        return [], f"nvidia-smi ended with {done.returncode}: {(done.stdout + done.stderr).strip()[:200]}"
    return parse_gpus(done.stdout), None


def parse_gpus(text: str) -> list[dict[str, float | None]]:
    """Read the lines of `nvidia-smi --format=csv,noheader,nounits`; what a GPU does not say is None."""
    gpus = []
    for line in text.splitlines():
        cells = [_number(cell) for cell in line.split(",")]
        if len(cells) == len(GPU_FIELDS):
            gpus.append(dict(zip(GPU_FIELDS, cells, strict=True)))
    return gpus


def append(file: Path, entry: dict[str, Any], max_bytes: int) -> None:
    """Append `entry` as a JSON line; a file that would exceed `max_bytes` becomes FILE.1, which replaces the last."""
    line = json.dumps(entry) + "\n"
    if file.is_file() and file.stat().st_size + len(line) > max_bytes:
        os.replace(file, file.with_name(file.name + ".1"))
    with file.open("a", encoding="utf-8") as stream:
        stream.write(line)


def watch(folder: Path, interval_s: float, watched: int | None, max_bytes: int) -> None:
    """Log until the watched process has ended, with one last line then.

    Args:
        folder: gets system.HOST.jsonl.
        interval_s: seconds between two lines.
        watched: descriptor of the process (`os.pidfd_open`), None: until this one is killed.
        max_bytes: see `append`.
    """
    file = folder / f"system.{node_name()}.jsonl"
    ended = select.poll()
    if watched is not None:
        ended.register(watched, select.POLLIN)
    last = False
    while True:
        try:
            append(file, sample(folder) | {"interval_s": interval_s}, max_bytes)
        except OSError as error:  # a full disk must not end the watch: there may be room again
            print(f"monitor: {file}: {error}", file=sys.stderr, flush=True)
        if last:
            return
        last = bool(ended.poll(interval_s * 1000))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="monitor", description="Log what this node does, one JSON line every N seconds."
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for system.HOST.jsonl, made if needed")
    parser.add_argument("--interval", type=float, default=30, help="seconds between two lines; default: %(default)s")
    parser.add_argument("--pid", type=int, help="end with this process of the same node; default: run until killed")
    parser.add_argument("--max_mib", type=float, default=16, help="size at which the file is renamed to FILE.1")
    args = parser.parse_args(argv)
    if args.interval <= 0:
        parser.error(f"--interval {args.interval:g}: it must be above 0")
    try:
        watched = None if args.pid is None else os.pidfd_open(args.pid)
    except OSError as error:
        parser.error(f"--pid {args.pid}: {error.strerror}: give a process that runs on this node")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out {args.out}: {error.strerror}: give a folder that can be written")
    os.nice(10)
    watch(args.out, args.interval, watched, int(args.max_mib * 2**20))
    return 0


def _cgroup_limits() -> list[tuple[int, int]]:
    """Return (limit, bytes left) of each control group above this process that limits its memory."""
    limits = []
    for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root, limit_file, use_file = CGROUPS[1 if controllers else 0]
        group = Path(root) / path.lstrip("/")
        for folder in [group, *group.parents]:
            if folder == Path(root).parent:
                break
            try:
                limit = int((folder / limit_file).read_text())
                use = int((folder / use_file).read_text()) - _reclaimable(folder)
            except (OSError, ValueError):  # the root has none, or it is "max"
                continue
            limits.append((limit, max(limit - use, 0)))
    return limits


def _reclaimable(group: Path) -> int:
    """Bytes of cached files, which count as used but give way."""
    lines = (line.split() for line in (group / "memory.stat").read_text().splitlines())
    values = {words[0]: int(words[1]) for words in lines}
    return values.get("total_inactive_file", values.get("inactive_file", 0))


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:  # "[N/A]", "[Not Supported]"
        return None


if __name__ == "__main__":
    if __package__:  # started with -m: torch is in this process
        os.execv(sys.executable, [sys.executable, "-IS", __file__, *sys.argv[1:]])
    sys.exit(main())
