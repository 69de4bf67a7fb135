"""The monitor ends with the process it watches, limits its log, and stays small."""

from __future__ import annotations

import datetime
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from polar import monitor

ROOT = Path(__file__).resolve().parents[2]
MAX_RESIDENT_MIB = 30  # torch alone takes 200


def test_log_of_a_process_agrees_with_the_system_and_ends_with_it(tmp_path: Path) -> None:
    watched = subprocess.Popen(["sleep", "1.2"])
    command = [sys.executable, "-IS", str(ROOT / "polar" / "monitor.py"), "--out", str(tmp_path / "logs")]
    logging = subprocess.Popen(
        [*command, "--interval", "0.3", "--pid", str(watched.pid)], env={"SLURMD_NODENAME": "n1"}
    )
    time.sleep(0.7)
    status = Path(f"/proc/{logging.pid}/status").read_text(encoding="ascii")
    resident = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS:"))
    assert resident / 1024 < MAX_RESIDENT_MIB
    watched.wait()
    assert logging.wait(timeout=5) == 0  # an interval is 0.3 s, but the end is not waited for
    entries = [json.loads(line) for line in (tmp_path / "logs" / "system.n1.jsonl").read_text().splitlines()]
    assert 3 <= len(entries) <= 7
    last = entries[-1]
    age = datetime.datetime.now(datetime.UTC) - datetime.datetime.fromisoformat(last["time"])
    assert age.total_seconds() < 60
    assert abs(last["disk_free_gib"] - shutil.disk_usage(tmp_path).free / 2**30) < 1
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    assert 0 < last["memory_available_gib"] < last["memory_total_gib"] <= total * 1.01
    assert last["cpu_count"] == os.cpu_count() and len(last["load"]) == 3


def test_file_is_renamed_before_it_exceeds_its_size(tmp_path: Path) -> None:
    file = tmp_path / "system.n1.jsonl"
    for number in range(25):
        monitor.append(file, {"number": number}, max_bytes=100)
    previous = file.with_name("system.n1.jsonl.1")
    assert sorted(tmp_path.iterdir()) == [file, previous]
    assert file.stat().st_size <= 100 and previous.stat().st_size <= 100
    numbers = [json.loads(line)["number"] for path in (previous, file) for line in path.read_text().splitlines()]
    assert numbers == list(range(numbers[0], 25)) and len(numbers) > 5


def test_gpus_of_nvidia_smi() -> None:
    text = "0, 87, 65536, 81559, 61, 402.11\n1, [N/A], 3, 81559, [Not Supported], 70.00\n"
    first, second = monitor.parse_gpus(text)
    assert first == {
        "index": 0,
        "use_percent": 87,
        "memory_used_mib": 65536,
        "memory_total_mib": 81559,
        "temperature_c": 61,
        "power_w": 402.11,
    }
    assert second["use_percent"] is None and second["temperature_c"] is None and second["power_w"] == 70


def test_broken_nvidia_smi_is_logged(tmp_path: Path, monkeypatch) -> None:
    script = tmp_path / "nvidia-smi"
    script.write_text("#!/bin/sh\necho Unable to determine the device handle for GPU 0000:41:00.0; exit 255\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert monitor.read_gpus() == (
        [],
        "nvidia-smi ended with 255: Unable to determine the device handle for GPU 0000:41:00.0",
    )
    assert "handle" in monitor.sample(tmp_path)["gpu_problem"]


def test_memory_limit_of_a_control_group_counts(tmp_path: Path, monkeypatch) -> None:
    """A job of 64 MiB on a node with gigabytes, 48 MiB in use, 8 of them cached files."""
    job = tmp_path / "job"
    job.mkdir()
    files = {"memory.max": 64 << 20, "memory.current": 48 << 20, "memory.stat": f"anon 1\ninactive_file {8 << 20}"}
    for name, value in files.items():
        (job / name).write_text(f"{value}\n")
    (tmp_path / "memory.max").write_text("max\n")
    monkeypatch.setattr(monitor, "CGROUPS", ((str(tmp_path), *monitor.CGROUPS[0][1:]), monitor.CGROUPS[1]))
    own = Path("/proc/self/cgroup")
    real = Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda self, *a, **k: "0::/job\n" if self == own else real(self, *a, **k))
    assert monitor.host_memory() == (24 << 20, 64 << 20)


def test_bad_arguments(tmp_path: Path) -> None:
    command = [sys.executable, "-IS", str(ROOT / "polar" / "monitor.py"), "--out", str(tmp_path / "x")]
    for option, value, message in (("--pid", "4194305", "runs on this node"), ("--interval", "0", "above 0")):
        done = subprocess.run([*command, option, value], capture_output=True, text=True)
        assert done.returncode == 2 and message in done.stderr
    assert not (tmp_path / "x").exists()
