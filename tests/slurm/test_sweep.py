"""A sweep on the local cluster: two trainings, a score after each, one report; submitted three times, run once."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

import pytest

from tests.tiny import addition_rows, write_jsonl

pytestmark = pytest.mark.skipif("POLAR_SLURM_HOME" not in os.environ, reason="needs the cluster of `make test-slurm`")
ROOT = Path(__file__).resolve().parents[2]
DEADLINE_S = 300
RECIPE = f"""\
model_name_or_path: {ROOT}/demo/base
train_dataset: ROWS
template: question_answer
dtype: float32
use_cpu: true
adapter: {{peft_type: POLAR, r: 4, target_modules: [q_proj]}}
max_length: 96
global_batch_size: 2
per_device_train_batch_size: 2
max_steps: 2
logging_steps: 1
save_strategy: "no"
report_to: none
"""


def test_a_sweep_runs_in_order_and_only_once(cluster, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    rows = write_jsonl(tmp_path / "rows.jsonl", addition_rows(8))
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(RECIPE.replace("ROWS", str(rows)))
    runs = tmp_path / "runs"
    submit = ["slurm/submit.sh", "--launcher", "launchers/metamath_gemma27b.sh", "--runs", str(runs)]
    submit += ["--grid", "learning_rate=4e-4,8e-3", "--max_running", "2", "--nodes", "1", "--gpus_per_node", "1"]
    submit += ["--score", "gsm8k", "--score_options", f"--data {rows} --limit 2 --max_new_tokens 4"]
    submit += ["--score_gpus_per_node", "1", "--", "--no_preflight", "--recipe", str(recipe)]

    preview = cluster.run(submit[0], "--dry_run", *submit[1:])
    assert preview.count("sbatch --parsable") == 3 and not runs.exists()

    first = cluster.run(*submit)
    numbers = re.findall(r"^submitted \d \w+ jobs? as (\d+)$", first, re.MULTILINE)
    assert len(numbers) == 3, first  # trainings, scores, report
    waiting = cluster.run("squeue", "--noheader", "--array", "--format=%F %E")
    assert waiting.count(f"{numbers[1]} aftercorr:{numbers[0]}_") == 2, waiting
    assert waiting.count(f"{numbers[2]} afterany:{numbers[0]}_*") == 1, waiting

    second = cluster.run(*submit)
    assert "submitted" not in second and second.count("skip: ") == 5
    assert all(f"as {numbers[0]}_{task}" in second for task in (0, 1))
    assert re.findall(r"(\S+) +(?:queued|running) ", cluster.run("slurm/status.sh", str(runs))) == [
        "lr0.0004",
        "lr0.008",
    ]

    deadline = time.monotonic() + DEADLINE_S
    while cluster.run("squeue", "--noheader", f"--jobs={','.join(numbers)}", check=False):
        assert time.monotonic() < deadline, _logs(runs)
        time.sleep(0.5)
    page = runs / "report" / "report.md"
    assert page.is_file(), _logs(runs)
    for name in ("lr0.0004", "lr0.008"):
        files = [runs / name / "done.json", runs / name / "eval_gsm8k" / "results.json", page]
        written = [file.stat().st_mtime for file in files]
        assert written == sorted(written), f"{name}: not in the order of training, score, report"
        assert name in page.read_text(encoding="utf-8")
        assert list((runs / name / "job").glob("system.polar-n*.jsonl")), "no log of the node"
    status = cluster.run("slurm/status.sh", str(runs)).splitlines()
    assert [line.split()[1:3] for line in status[1:3]] == [["finished", "2/2"]] * 2 and "gsm8k" in status[0]

    third = cluster.run(*submit)
    assert "submitted" not in third and "skip: nothing new" in third and third.count("skip: scored") == 2
    assert not cluster.run("squeue", "--noheader", f"--jobs={','.join(numbers)}", check=False)


def _logs(runs: Path) -> str:
    return "\n".join(f"{file}:\n{file.read_text()[-2000:]}" for file in sorted(runs.glob("*/slurm-*.out")))
