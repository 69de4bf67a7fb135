"""How the ranks of a preflight find and hear each other: a store for findings, one timed all-reduce, its transport."""

from __future__ import annotations

import collections
import datetime
import fcntl
import json
import os
import re
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from polar.errors import UserError
from polar.monitor import node_name
from polar.preflight_checks import Finding

TIMED_RUNS = 5
LEAST_WAIT_S = 20  # for a step that begins close to the deadline
PATTERN = 7  # element i of rank k holds (k + 1) (1 + i mod 7): sums are whole numbers, exact in fp32 up to 2,000 ranks
SIOCGIFADDR = 0x8915  # ioctl of Linux: the IPv4 address of an interface


class Ranks:
    """The ranks of this start, as far as they have arrived; exchanges small values without any collective.

    A TCP connection to rank 0 is the least that has to work, so what is wrong with anything else can still be said.

    Args:
        environment: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, as launchers set them; without RANK
            this process is alone.
        wait_s: how long to wait for the other ranks, in all.

    Raises:
        UserError: rank 0 cannot be reached.
    """

    def __init__(self, environment: Mapping[str, str], wait_s: float) -> None:
        self.rank = int(environment.get("RANK", "0"))
        self.world_size = int(environment.get("WORLD_SIZE", "1"))
        self.local_rank = int(environment.get("LOCAL_RANK", "0"))
        self.deadline = time.monotonic() + wait_s
        self.missing: set[int] = set()
        self.store: dist.Store = dist.HashStore()
        self.where = "this process"
        if "RANK" not in environment:
            return
        host, port = environment.get("MASTER_ADDR"), environment.get("MASTER_PORT")
        if not host or not port:
            raise UserError("RANK is set, but not MASTER_ADDR and MASTER_PORT: start with torchrun, or export them")
        self.where = f"{host}:{port}"
        torchrun = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # its agent holds the store
        is_master = self.rank == 0 and not torchrun
        try:
            store = dist.TCPStore(
                host, int(port), None, is_master, datetime.timedelta(seconds=wait_s), wait_for_workers=False
            )
        except (RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0][:200]
            verb = "open" if is_master else "reach"
            raise UserError(
                f"rank {self.rank} on {node_name()} cannot {verb} {self.where} ({reason}): check that rank 0 "
                "has started, MASTER_ADDR resolves to its node, and no firewall or other job holds the port"
            ) from None
        self.store = dist.PrefixStore("preflight", store)

    def exchange(self, name: str, value: Any) -> list[Any]:
        """Return the values of all ranks, in order; None for ranks that did not say theirs in time.

        Args:
            name: of this exchange, used once.
            value: anything that JSON can hold.

        Raises:
            UserError: rank 0 did not answer.
        """
        self.store.set(f"{name}/{self.rank}", json.dumps(value))
        if self.rank == 0:
            self.share(name, self._collect(name))
        return self.shared(name)

    def share(self, name: str, value: Any) -> None:
        """Tell the other ranks; on rank 0."""
        self.store.set(name, json.dumps(value))

    def shared(self, name: str) -> Any:
        """Return what rank 0 shared.

        Raises:
            UserError: it did not, although it had time.
        """
        if not self._wait([name], 3 * LEAST_WAIT_S):  # rank 0 waits for the others, and no longer than this
            raise UserError(f"rank {self.rank} on {node_name()}: rank 0 fell silent: look at its output")
        return json.loads(self.store.get(name))

    def leave(self) -> None:
        """Let rank 0, which may hold the store, stay until the others have read what they need."""
        self.store.set(f"leave/{self.rank}", "true")
        if self.rank == 0:
            self._collect("leave")

    def _collect(self, name: str) -> list[Any]:
        """Return what each rank said; one that was late once is not waited for again."""
        keys = {rank: f"{name}/{rank}" for rank in range(self.world_size) if rank not in self.missing}
        if not self._wait(list(keys.values()), LEAST_WAIT_S):
            self.missing |= {rank for rank, key in keys.items() if not self.store.check([key])}
        here = [rank not in self.missing for rank in range(self.world_size)]
        return [json.loads(self.store.get(keys[rank])) if here[rank] else None for rank in range(self.world_size)]

    def _wait(self, keys: list[str], at_least_s: float) -> bool:
        """Wait for `keys` until the deadline, then for so many seconds more; tell whether all have come."""
        left = max(self.deadline - time.monotonic(), 0) + at_least_s
        try:
            self.store.wait(keys, datetime.timedelta(seconds=left))
        except RuntimeError:  # DistStoreError: too late, or the store is gone
            return False
        return True


def check_all_reduce(ranks: Ranks, use_gpu: bool, mebibytes: int, need_gb_per_s: float | None) -> list[Finding]:
    """Sum a tensor over all ranks as training will: value, time, bandwidth, and on rank 0 the transport.

    Runs in a thread of its own: a transport that cannot connect blocks instead of raising.

    Args:
        ranks: of this start, all of which call it.
        use_gpu: with NCCL on GPUs, else with gloo.
        mebibytes: size of the tensor on each rank.
        need_gb_per_s: bus bandwidth below which something is wrong, None: any will do.
    """
    log = _capture_nccl(ranks.rank) if use_gpu else None
    result: list[float | str] = []

    def work() -> None:
        try:
            result.append(_time_all_reduce(ranks, use_gpu, mebibytes))
        except Exception as error:  # whatever a transport raises is what the table has to say
            result.append(f"{type(error).__name__}: {str(error).splitlines()[0]}")

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(max(ranks.deadline - time.monotonic(), LEAST_WAIT_S))
    outcome = result[0] if result else "no answer in time"
    backend = "NCCL" if use_gpu else "gloo"
    findings = []
    if isinstance(outcome, str):
        variable = "NCCL_SOCKET_IFNAME" if use_gpu else "GLOO_SOCKET_IFNAME"
        fix = f"set {variable} to the interface that joins the nodes, and see that they reach each other on it"
        findings.append(Finding("all-reduce", f"{backend}: {outcome}", fix))
    else:
        num_bytes = mebibytes * 2**20
        bandwidth = 2 * (ranks.world_size - 1) / ranks.world_size * num_bytes / outcome / 1e9
        what = f"right sum, {mebibytes} MiB in {1000 * outcome:.1f} ms, {bandwidth:.2f} GB/s"
        slow = need_gb_per_s is not None and bandwidth < need_gb_per_s
        what += "" if need_gb_per_s is None else f", {need_gb_per_s:g} needed"
        fix = f"look at the transport below; {backend} may have fallen back to a slower one"
        findings.append(Finding("all-reduce", what, fix if slow else "", bandwidth))
    if log is not None:
        findings.append(nccl_transport(log))
    elif not use_gpu:
        findings.append(gloo_transport())
    return findings


def _time_all_reduce(ranks: Ranks, use_gpu: bool, mebibytes: int) -> float:
    """Return the median of the seconds that one sum took, the warm-up left out."""
    # The process group's own time-out aborts the process: ours comes first.
    timeout = datetime.timedelta(seconds=ranks.deadline - time.monotonic() + 60)
    dist.init_process_group(
        "nccl" if use_gpu else "gloo",
        store=dist.PrefixStore("all-reduce", ranks.store),
        rank=ranks.rank,
        world_size=ranks.world_size,
        timeout=timeout,
    )
    device = torch.device("cuda", ranks.local_rank) if use_gpu else torch.device("cpu")
    pattern = torch.arange(mebibytes * 2**18, device=device).remainder_(PATTERN).add_(1).float()
    times = []
    for _ in range(1 + TIMED_RUNS):
        values = pattern * (ranks.rank + 1)
        if use_gpu:
            torch.cuda.synchronize()
        start = time.perf_counter()
        dist.all_reduce(values)
        if use_gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
        expected = pattern * (ranks.world_size * (ranks.world_size + 1) // 2)
        if not torch.equal(values, expected):
            raise ArithmeticError(f"{int((values != expected).sum()):,} of {values.numel():,} sums are wrong")
    return sorted(times[1:])[TIMED_RUNS // 2]


# Which transport


def _capture_nccl(rank: int) -> Path | None:
    """Let NCCL write on rank 0 what it decides, before its first communicator."""
    if rank != 0:
        return None
    descriptor, name = tempfile.mkstemp(prefix="polar-nccl-")
    os.close(descriptor)
    os.environ |= {"NCCL_DEBUG": "INFO", "NCCL_DEBUG_SUBSYS": "INIT,NET,ENV", "NCCL_DEBUG_FILE": name}
    return Path(name)


def nccl_transport(log: Path) -> Finding:
    """Read from rank 0's NCCL_DEBUG=INFO log which network and which channels NCCL took; deletes the log."""
    text = log.read_text(encoding="utf-8", errors="replace")
    log.unlink(missing_ok=True)
    fabrics = sorted(path.name for path in Path("/sys/class/infiniband").glob("*"))
    return describe_nccl(text, fabrics)


def describe_nccl(text: str, fabrics: Sequence[str]) -> Finding:
    """Say what NCCL's log tells about transports.

    Args:
        text: what NCCL_DEBUG=INFO printed.
        fabrics: InfiniBand and RoCE devices of the node: with one of them sockets between nodes are a fall-back.
    """
    network = re.search(r"Using network (\S+)", text)
    via = collections.Counter(re.findall(r"via ((?:P2P|SHM|NET|NVLS|COLLNET)[/\w]*)", text))
    channels = ", ".join(f"{count} {name}" for name, count in via.most_common())
    version = re.search(r"NCCL version (\S+)", text)
    parts = [f"NCCL {version[1]}" if version else "NCCL"]
    parts += [f"network {network[1]}"] if network else ["it named no network"]
    parts += [f"channels of rank 0: {channels}"] if channels else []
    by_socket = any(name.startswith("NET/Socket") for name in via)
    if by_socket and fabrics:
        fix = "let the image bring the fabric's libraries; set NCCL_IB_HCA and NCCL_SOCKET_IFNAME as the site says"
        return Finding("transport", f"{', '.join(parts)}, although the node has {', '.join(fabrics)}", fix)
    return Finding("transport", ", ".join(parts))


def gloo_transport() -> Finding:
    """Say which interface gloo listens on: the one it is told, else that of the host name's address."""
    told = os.environ.get("GLOO_SOCKET_IFNAME")
    if told:
        return Finding("transport", f"gloo on {told}")
    try:
        address = socket.gethostbyname(socket.gethostname())
    except OSError:
        address = "127.0.0.1"  # gloo's own choice for a host name without an address
    names = [name for _, name in socket.if_nameindex() if _address_of(name) == address]
    return Finding("transport", f"gloo on {names[0] if names else 'no interface of this node'} ({address})")


def _address_of(interface: str) -> str | None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            answer = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, struct.pack("256s", interface[:15].encode()))
        except OSError:  # it has none
            return None
    return socket.inet_ntoa(answer[20:24])
