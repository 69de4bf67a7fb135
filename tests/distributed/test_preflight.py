"""`python -m polar.preflight` on two gloo ranks: all well, and a rank whose node sees other files.

Started without torchrun, as srun would start one task per rank, so that the exit code of each rank is seen.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.integration.commands import ROOT, environment, free_port


def preflight(folders: list[Path], *options: str) -> tuple[list[int], str, list[str]]:
    """Run one rank per folder, from that folder; return exit codes, what rank 0 printed, and the other ranks."""
    launcher = {"WORLD_SIZE": str(len(folders)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    settings = ["--model_name_or_path", "demo/base", "--train_dataset", "rows.jsonl", "--output_dir", "runs/x"]
    command = [sys.executable, "-m", "polar.preflight", *settings, "--use_cpu", "--wait_s", "60", *options]
    ranks = [
        subprocess.Popen(
            command,
            cwd=folder,
            env=environment() | launcher | {"RANK": str(rank), "LOCAL_RANK": "0", "SLURMD_NODENAME": f"n{rank}"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank, folder in enumerate(folders)
    ]
    outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
    return [rank.returncode for rank in ranks], outputs[0], outputs[1:]


def node(folder: Path) -> Path:
    """Make a folder with rows and a link to the demo's base."""
    (folder / "demo").mkdir(parents=True)
    (folder / "demo" / "base").symlink_to(ROOT / "demo" / "base")
    (folder / "rows.jsonl").write_text('{"question": "1 + 1?", "answer": "2"}\n')
    return folder


def test_two_ranks_with_nothing_wrong(tmp_path: Path) -> None:
    folder = node(tmp_path / "shared")
    codes, report, others = preflight([folder, folder], "--allreduce_mib", "2")
    assert (codes, others) == ([0, 0], [""]), report
    rows = {line[2:15].strip(): line[17:] for line in report.splitlines() if line.startswith("  ")}
    assert "right sum, 2 MiB" in rows["all-reduce"] and "gloo on" in rows["transport"]
    assert "demo/base: folder" in rows["model"] and "torch" in rows["versions"]
    assert report.startswith("preflight of 2 ranks (n0: 0, n1: 1)") and report.endswith("nothing wrong\n")
    assert sorted(path.name for path in folder.iterdir()) == ["demo", "rows.jsonl"]


def test_a_rank_whose_node_lacks_the_mounts_fails_all(tmp_path: Path) -> None:
    """Rank 1 starts where there is neither the model nor rank 0's run folder."""
    here, elsewhere = node(tmp_path / "shared"), node(tmp_path / "bare")
    (elsewhere / "demo" / "base").unlink()
    codes, report, others = preflight([here, elsewhere])
    assert (codes, others) == ([2, 2], [""]), report
    problems = [line for line in report.splitlines() if line.startswith("problem")]
    assert [line.partition(": ")[0] for line in problems] == ["problem on n1, rank 1"] * 2
    assert "model: " in problems[0] and "demo/base" in problems[0]
    assert f"run folder: {elsewhere} is not the folder that rank 0 sees" in problems[1]
    assert "right sum" in report  # the rest is checked all the same
