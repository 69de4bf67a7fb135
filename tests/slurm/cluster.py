"""Jobs on the local cluster: submit, wait for a line of the log, wait for the end, find the ranks."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
DEADLINE_S = 240
PAUSE_S = 5  # before a requeued job may start: SLURM takes a late message of the old start for one of the new start


@dataclass(frozen=True)
class Job:
    """A submitted job and its run folder, which holds the log."""

    number: int
    run: Path

    @property
    def log(self) -> str:
        """What the job has printed over all its starts."""
        path = self.run / f"slurm-{self.number}.out"
        return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


class Cluster:
    """The cluster that `slurm/local_cluster.sh up` has started in `home`.

    Args:
        home: its folder, POLAR_SLURM_HOME.
    """

    def __init__(self, home: Path) -> None:
        self._paused: dict[tuple[int, str], float] = {}
        self.environment = {
            **{key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "MASTER_ADDR")},
            "SLURM_CONF": str(home / "slurm.conf"),
            "POLAR_PYTHON": sys.executable,
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
            "DS_ACCELERATOR": "cpu",
        }

    def run(self, *command: str, check: bool = True) -> str:
        """Run a command of SLURM, or a launcher, and return what it prints."""
        done = subprocess.run(command, cwd=ROOT, env=self.environment, capture_output=True, text=True, timeout=60)
        assert not check or done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def submit(self, launcher: str, *arguments: str, run: Path, **environment: str) -> Job:
        """Submit `launchers/LAUNCHER.sh` with its own --submit, on two nodes with one process each."""
        size = ["--nodes", "2", "--gpus_per_node", "1", "--sbatch", "--parsable"]
        command = ["bash", f"launchers/{launcher}.sh", "--submit", *size, "--output_dir", str(run), *arguments]
        variables = self.environment | environment
        done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return Job(int(done.stdout), run)

    def fields(self, job: Job) -> dict[str, str]:
        """What `scontrol show job` says: JobState, Restarts, NodeList, StartTime, ..."""
        return dict(re.findall(r"(\w+)=(\S*)", self.run("scontrol", "show", "job", str(job.number))))

    def ended_state(self, job: Job) -> str | None:
        """Return the state of a job that has ended, else None; shortens the pause of a requeued job."""
        fields = self.fields(job)
        if fields["JobState"] == "PENDING" and fields["Reason"] == "BeginTime":
            paused = self._paused.setdefault((job.number, fields["Restarts"]), time.monotonic())
            if time.monotonic() - paused > PAUSE_S:
                self.run("scontrol", "update", f"JobId={job.number}", "StartTime=now", check=False)
        return fields["JobState"] if fields["JobState"] in ENDED else None

    def wait_for_line(self, job: Job, pattern: str) -> str:
        """Return the first match of a regular expression in the job's log, once it is there."""
        return str(self._wait(job, lambda: re.search(pattern, job.log))[0])

    def wait_for_end(self, job: Job) -> str:
        """Return the state in which the job ends; a requeued one starts again at once."""
        return str(self._wait(job, lambda: self.ended_state(job)))

    def wait_for_restart(self, job: Job) -> None:
        """Wait until a requeued job runs again."""
        self._wait(job, lambda: self.ended_state(job) or self.fields(job)["Restarts"] != "0")
        self._wait(job, lambda: self.ended_state(job) or self.fields(job)["JobState"] == "RUNNING")

    def ranks(self, job: Job) -> dict[int, int]:
        """Return the process of each rank of the job's training that lives now: rank to process id."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                arguments = (folder / "cmdline").read_bytes().decode().split("\0")
                variables = (folder / "environ").read_bytes().decode().split("\0")
            except (OSError, UnicodeDecodeError):
                continue
            if "polar.train" in arguments and str(job.run) in arguments:
                rank = next((v.removeprefix("RANK=") for v in variables if v.startswith("RANK=")), None)
                if rank is not None:
                    found[int(rank)] = int(folder.name)
        return found

    def cancel_all(self) -> None:
        """End what still runs."""
        for number in self.run("squeue", "--noheader", "--format=%A").split():
            self.run("scancel", number, check=False)

    def _wait(self, job: Job, condition):  # type: ignore[no-untyped-def]
        deadline = time.monotonic() + DEADLINE_S
        while not (result := condition()):
            assert time.monotonic() < deadline, f"{self.fields(job)}\n{job.log[-5000:]}"
            time.sleep(0.2)
        return result
