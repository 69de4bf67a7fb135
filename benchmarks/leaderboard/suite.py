"""The suite in a checkout of PEFT: its folders, its result files, and one experiment run in it."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.leaderboard.folders import CONFIG_FILE, EXPERIMENTS, FOLDER, METHOD, PARAMETERS_FILE, files_of

PLACE = Path("method_comparison") / "MetaMathQA"
DEFAULTS_FILE = "default_training_params.json"
FILES = ("run.py", "utils.py", "data.py", DEFAULTS_FILE)  # without which it cannot run
COUNTED, OTHER_BRANCHES, CANCELED = "results", "temporary_results", "cancelled_results"
WITH_POLAR = Path(__file__).resolve().with_name("with_polar.py")
MIB, GIB = 2**20, 2**30


@dataclass(frozen=True)
class Suite:
    """The suite in one checkout; an experiment is named METHOD/NAME, as in its `experiments/`.

    Attributes:
        checkout: root of the git work tree.
        with_polar: the script that runs `run.py`; another one in tests, where there is no accelerator.
    """

    checkout: Path
    with_polar: Path = WITH_POLAR

    @property
    def folder(self) -> Path:
        """Where `run.py` is."""
        return self.checkout / PLACE

    def git(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run git in the checkout."""
        return subprocess.run(["git", *arguments], cwd=self.checkout, capture_output=True, text=True)

    @property
    def branch(self) -> str:
        """Name of the branch; "HEAD" when none is checked out. The suite counts results of "main" only."""
        return self.git("rev-parse", "--abbrev-ref", "HEAD").stdout.strip()

    @property
    def commit(self) -> str:
        """The commit that is checked out."""
        return self.git("rev-parse", "HEAD").stdout.strip()

    @property
    def is_dirty(self) -> bool:
        """Tracked files differ from the commit, by the suite's own question; untracked files do not count."""
        return any(self.git("diff", *cached, "--quiet").returncode for cached in ([], ["--cached"]))

    @property
    def results_folder(self) -> str:
        """Where a successful run of this branch puts its result."""
        return COUNTED if self.branch == "main" else OTHER_BRANCHES

    def parameters(self, experiment: str) -> dict[str, Any]:
        """Training parameters: the suite's defaults under those of the experiment, key by key."""
        folder = FOLDER.parent / experiment if is_ours(experiment) else self.folder / "experiments" / experiment
        own = folder / PARAMETERS_FILE
        return {**read_json(self.folder / DEFAULTS_FILE), **(read_json(own) if own.exists() else {})}

    def place(self, experiment: str) -> None:
        """Put one of our folders into the checkout, where it stays untracked; what is there already stays."""
        folder = self.folder / "experiments" / experiment
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files_of(Path(experiment).name).items():
            if not (folder / name).exists():
                (folder / name).write_text(text, encoding="utf-8")

    def differing_files(self, experiment: str) -> list[str]:
        """Files of one of our experiments that the checkout has with another content."""
        folder = self.folder / "experiments" / experiment
        there = {name: folder / name for name in (CONFIG_FILE, PARAMETERS_FILE) if (folder / name).exists()}
        ours = files_of(Path(experiment).name) if is_ours(experiment) else {}
        return [name for name, path in there.items() if ours and json.loads(ours[name]) != read_json(path)]

    def finished(self, experiment: str) -> Path | None:
        """The newest successful result; of our experiments one that was made with the settings of today.

        The suite's own committed results count on every branch.
        """
        places = dict.fromkeys([self.results_folder, *(() if is_ours(experiment) else (COUNTED,))])
        for path in sorted(self._results(experiment, *places), key=lambda file: file.stat().st_mtime, reverse=True):
            result = read_result(path)
            if result is None or result["train_info"]["status"] != "success":
                continue
            if not is_ours(experiment) or self._has_settings_of_today(experiment, result["run_info"]):
                return path
        return None

    def command(self, experiment: str) -> list[str]:
        """The command that runs an experiment, from the suite's folder."""
        return [sys.executable, str(self.with_polar), "-v", f"experiments/{experiment}"]

    def run(self, experiment: str) -> tuple[int, Path | None, bool]:
        """Run one experiment in a process of its own, its output going where ours goes.

        Returns:
            Exit code; the result file that it wrote, if any; whether Ctrl-C was pressed meanwhile. The suite then
            ends by itself and writes what it has.
        """
        places = (COUNTED, OTHER_BRANCHES, CANCELED)
        before = {path: path.stat().st_mtime_ns for path in self._results(experiment, *places)}
        interrupted = False
        with subprocess.Popen(self.command(experiment), cwd=self.folder) as process:
            while process.returncode is None:
                try:
                    process.wait()
                except KeyboardInterrupt:
                    interrupted = True
        new = [p for p in self._results(experiment, *places) if before.get(p) != p.stat().st_mtime_ns]
        return process.returncode, max(new, key=lambda path: path.stat().st_mtime_ns, default=None), interrupted

    def _results(self, experiment: str, *places: str) -> list[Path]:
        stem = experiment.replace("/", "--")
        files = [path for place in places for path in (self.folder / place).glob(f"{stem}*.json")]
        return [path for path in files if path.stem == stem or path.stem.startswith(f"{stem}--")]

    def _has_settings_of_today(self, experiment: str, run_info: dict[str, Any]) -> bool:
        config = json.loads(files_of(Path(experiment).name)[CONFIG_FILE])
        # The suite fills what is null in the file, for example the name of the base.
        same = all(
            _unordered(run_info["peft_config"].get(k)) == _unordered(v) for k, v in config.items() if v is not None
        )
        return same and bool(run_info["train_config"] == self.parameters(experiment))


def is_ours(experiment: str) -> bool:
    """Whether an experiment is one of this project's."""
    method, _, name = experiment.partition("/")
    return method == METHOD and name in EXPERIMENTS


def read_json(path: Path) -> Any:
    """Read one JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def read_result(path: Path) -> dict[str, Any] | None:
    """Read a result file; None for one that a killed run left half-written."""
    try:
        result: dict[str, Any] = read_json(path)
    except json.JSONDecodeError:
        return None
    return result


def measured(result: dict[str, Any]) -> dict[str, Any]:
    """The numbers of one result file; None for what a run that ended early does not have."""
    train, metrics = result["train_info"], result["train_info"]["metrics"]
    last: dict[str, Any] = next((m for m in reversed(metrics) if "test accuracy" in m), {})
    meta = result["meta_info"]
    return {
        "status": train["status"],
        "error": result["run_info"].get("error_msg") or None,
        "test_accuracy": last.get("test accuracy"),
        "forgetting": last.get("forgetting"),
        "memory_max_gib": train["accelerator_memory_max"] / GIB,
        "train_time_s": train["train_time"],
        "file_size_mib": train["file_size"] / MIB,
        "num_trainable_params": train.get("num_trainable_params"),
        "accelerator": meta["system_info"].get("accelerator"),
        "branch": result["run_info"]["peft_branch"],
        "dirty": result["run_info"].get("peft_worktree_is_dirty"),
        "packages": meta["package_info"],
    }


def _unordered(value: Any) -> Any:
    return sorted(value) if isinstance(value, list) else value
