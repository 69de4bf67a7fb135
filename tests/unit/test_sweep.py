"""Which runs a grid has and what of a sweep is missing; with a real SLURM: tests/slurm/test_sweep.py."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from slurm.grid import SweepError, read_grid, runs_of
from slurm.run_status import PLANS, Job
from slurm.sweep import ROOT, Array, Sweep, batch_script, main, submit

GRID = ["learning_rate=4e-4,8e-4", "task=boolq,piqa"]


@pytest.fixture
def launcher(tmp_path: Path) -> Path:
    file = tmp_path / "launcher.sh"
    file.write_text('#!/usr/bin/env bash\n#SBATCH --time=1\n#SBATCH --requeue\nprintf "%s\\n" "$@"\n')
    return file


def sweep(tmp_path: Path, jobs: list[Job] | None = None, options: list[str] | None = None, **changes) -> Sweep:
    values = {"runs": tmp_path / "runs", "grid": GRID, "score": None, "score_options": "", "no_report": False}
    values |= {"launcher": tmp_path / "launcher.sh", "score_launcher": tmp_path / "launcher.sh", "max_running": 2}
    values |= dict.fromkeys(["nodes", "gpus_per_node", "time", "score_nodes", "score_gpus_per_node", "score_time"])
    return Sweep(Namespace(**values | {"sbatch": []} | changes), options or [], jobs or [])


def put(tmp_path: Path, run: str, name: str, text: str = "{}") -> None:
    file = tmp_path / "runs" / run / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def summary(arrays: list[Array]) -> list[tuple[str, str, list[tuple[int, str, str]]]]:
    return [
        (array.kind, array.dependency, [(i, item["run"], item.get("task", "")) for i, item in array.items.items()])
        for array in arrays
    ]


def test_runs_and_their_names() -> None:
    runs = runs_of(read_grid(["seed=0", "adapter.r=4", "learning_rate=4e-4,0.008", "--method=lora", "template=a/b"]))
    assert list(runs) == ["lora_r4_lr0.0004_templatea-b_seed0", "lora_r4_lr0.008_templatea-b_seed0"]
    other_order = runs_of(read_grid(["learning_rate=0.0004", "template=a/b", "method=lora", "adapter.r=4", "seed=0"]))
    assert list(other_order) == list(runs)[:1]
    assert runs["lora_r4_lr0.008_templatea-b_seed0"]["template"] == "a/b"
    assert list(runs_of({"x": ["1", "-1"]})) == ["x1", "x-1"]
    with pytest.raises(SweepError, match="share the folder templatea-b"):
        runs_of({"template": ["a/b", "a-b"]})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["learning_rate"], "KEY=VALUE"),
        (["learning_rate=1,,2"], "KEY=VALUE"),
        (["learning_rate=4e-4,0.0004"], "twice"),
        (["seed=0", "seed=1"], "twice"),
        (["output_dir=a,b"], "gives --output_dir itself"),
        (["method=polar,lora", "landing_penalty=1,2"], "means nothing to method lora"),
    ],
)
def test_grids_that_make_no_sense(words: list[str], message: str) -> None:
    with pytest.raises(SweepError, match=message):
        read_grid(words)


def test_a_new_sweep_submits_everything(tmp_path: Path) -> None:
    runs = ["boolq_lr0.0004", "boolq_lr0.0008", "piqa_lr0.0004", "piqa_lr0.0008"]
    new = sweep(tmp_path, options=["--seed", "3"])
    arrays = new.arrays()
    assert summary(arrays) == [
        ("train", "", [(index, run, "") for index, run in enumerate(runs)]),
        ("score", "aftercorr:{train}", [(0, runs[0], "boolq"), (1, runs[1], "boolq")]),
        ("score", "aftercorr:{train}", [(2, runs[2], "piqa"), (3, runs[3], "piqa")]),
        ("report", "afterany:{all}", [(0, "report", "")]),
    ]
    folder = str(tmp_path / "runs" / runs[1])
    expected = ["--task", "boolq", "--learning_rate", "8e-4", "--seed", "3", "--output_dir", folder]
    assert arrays[0].items[1]["arguments"] == expected
    assert arrays[1].items[1]["arguments"] == [folder, "--tasks", "boolq"]


def test_only_what_is_missing_is_submitted(tmp_path: Path) -> None:
    """Four runs: finished and scored; finished; in training since an earlier submission; new."""
    for run in ("boolq_lr0.0004", "boolq_lr0.0008"):
        put(tmp_path, run, "done.json")
    put(tmp_path, "boolq_lr0.0004", "eval_boolq/results.json")
    plan = {"kind": "train", "items": {"5": {"run": "piqa_lr0.0004", "arguments": []}}}
    put(tmp_path, PLANS, "train-1.json", json.dumps(plan))
    job = Job("train-1", "70", 5, "RUNNING", 0, tmp_path / "runs" / PLANS / "train-1.%a.out")
    partial = sweep(tmp_path, [job])
    assert summary(partial.arrays()) == [
        ("train", "", [(0, "piqa_lr0.0008", "")]),
        ("score", "", [(0, "boolq_lr0.0008", "boolq")]),
        ("score", "afterok:70_5", [(0, "piqa_lr0.0004", "piqa")]),
        ("score", "aftercorr:{train}", [(0, "piqa_lr0.0008", "piqa")]),
        ("report", "afterany:70_5:{all}", [(0, "report", "")]),
    ]
    decisions = {row[0]: row[1:] for row in partial.rows}
    assert decisions["boolq_lr0.0004"] == ["skip: finished", "boolq: skip: scored"]
    assert decisions["piqa_lr0.0004"] == ["skip: running as 70_5", "piqa: submit, after 70_5"]


def test_a_complete_sweep_submits_nothing_but_a_stale_report(tmp_path: Path) -> None:
    for run in runs_of(read_grid(GRID)):
        put(tmp_path, run, "done.json")
        put(tmp_path, run, f"eval_{run.partition('_')[0]}/results.json")
    assert summary(sweep(tmp_path).arrays()) == [("report", "afterany:{all}", [(0, "report", "")])]
    put(tmp_path, "report", "report.md")
    assert sweep(tmp_path).arrays() == []
    page = tmp_path / "runs" / "report" / "report.md"
    os.utime(page, (page.stat().st_mtime - 100,) * 2)
    assert [array.kind for array in sweep(tmp_path).arrays()] == ["report"]
    plan = {"kind": "report", "items": {"0": {"run": "report", "arguments": []}}}
    put(tmp_path, PLANS, "report-1.json", json.dumps(plan))
    job = Job("report-1", "71", 0, "PENDING", 0, tmp_path / "runs" / PLANS / "report-1.%a.out")
    assert sweep(tmp_path, [job]).arrays() == []
    assert sweep(tmp_path, no_report=True).arrays() == []


def test_a_finished_run_of_other_options_is_not_taken_for_this_one(tmp_path: Path) -> None:
    run = str(tmp_path / "runs" / "boolq_lr0.0004")
    before = ["--task", "boolq", "--learning_rate", "4e-4", "--max_steps", "5", "--output_dir", run]
    plan = {"kind": "train", "items": {"0": {"run": "boolq_lr0.0004", "arguments": before}}}
    put(tmp_path, PLANS, "train-1.json", json.dumps(plan))
    sweep(tmp_path, options=["--max_steps", "6"])  # not finished: the trainer compares by itself
    put(tmp_path, "boolq_lr0.0004", "done.json")
    sweep(tmp_path, options=["--max_steps", "5"])
    with pytest.raises(SweepError, match="'5', now '6'"):
        sweep(tmp_path, options=["--max_steps", "6"])


def test_batch_script_runs_the_launcher_of_its_task(tmp_path: Path, launcher: Path) -> None:
    items = {3: {"run": "a b", "arguments": ["--x", "it's $HOME"]}, 7: {"run": "c", "arguments": []}}
    script = batch_script(Array("train", launcher, items), tmp_path / "my runs")
    assert script.splitlines()[1:3] == ["#SBATCH --time=1", "#SBATCH --requeue"]
    subprocess.run(
        ["bash", "-c", script], env=os.environ | {"SLURM_ARRAY_TASK_ID": "3", "SLURM_JOB_ID": "9"}, check=True
    )
    assert (tmp_path / "my runs" / "a b" / "slurm-9.out").read_text() == "--x\nit's $HOME\n"


def test_submission_writes_its_plan_first_and_chains_the_arrays(tmp_path: Path, launcher: Path, monkeypatch) -> None:
    """sbatch is a script that writes down its arguments and whether the plan was there."""
    log, sbatch = tmp_path / "log", tmp_path / "bin" / "sbatch"
    sbatch.parent.mkdir()
    plans = tmp_path / "runs" / PLANS
    sbatch.write_text(f'#!/bin/sh\necho "$(ls {plans}/*.json | wc -l) $*" >>{log}\nwc -l <{log}\n')
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{sbatch.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("POLAR_SBATCH_OPTIONS", "--exclusive")
    plans.mkdir(parents=True)
    new = sweep(tmp_path, nodes=2, score_gpus_per_node=1, grid=["learning_rate=1,2"], score=["math"])
    submit(new, new.arrays())
    train, score, report = log.read_text().splitlines()
    assert train.startswith("1 --parsable --job-name=train-") and "--array=0,1%2 " in train and "--nodes=2" in train
    assert score.startswith("2 ") and "--dependency=aftercorr:1 " in score and "--gpus-per-node=1" in score
    assert report.startswith("3 ") and "--dependency=afterany:1:2 " in report and "--exclusive" in report


def test_command_line_without_slurm(tmp_path: Path, launcher: Path) -> None:
    """The same with a Python that has nothing installed: that of a login node."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "bash").symlink_to(str(shutil.which("bash")))
    environment = {"PATH": str(tmp_path / "bin"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-S", str(ROOT / "slurm" / "sweep.py"), "--launcher", str(launcher), "--no_report"]
    command += ["--score_launcher", str(launcher), "--grid", "task=boolq", "--runs", str(tmp_path / "runs")]
    done = subprocess.run([*command, "--dry_run"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("sbatch --parsable") == 2, done.stderr
    refused = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert refused.returncode == 2 and "there is no sbatch here" in refused.stderr
    assert not (tmp_path / "runs").exists()


def test_a_launcher_that_refuses_its_options_stops_the_submission(
    tmp_path: Path, launcher: Path, capsys, monkeypatch
) -> None:
    launcher.write_text("#!/usr/bin/env bash\n[[ \"$*\" != *8e-4* ]] || { echo 'x: error: no 8e-4' >&2; exit 2; }\n")
    options = ["--launcher", str(launcher), "--score_launcher", str(launcher), "--runs", str(tmp_path / "runs")]
    options += ["--grid", "learning_rate=4e-4,8e-4"]
    monkeypatch.setattr("slurm.sweep.read_queue", lambda: [])
    assert main([*options, "--dry_run"]) == 2
    assert "lr0.0008: x: no 8e-4" in capsys.readouterr().err
