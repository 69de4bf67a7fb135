"""The launchers without SLURM: what they would run, what they refuse, and one run under plain bash."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.integration.commands import ROOT, environment

TEXTS = {path.stem: path.read_text(encoding="utf-8") for path in sorted((ROOT / "launchers").glob("*.sh"))}
LAUNCHERS = [name for name, text in TEXTS.items() if "/slurm/job.sh" in text]
TRAINERS = [name for name in LAUNCHERS if "train_job" in TEXTS[name]]


def _launch(name: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", f"launchers/{name}.sh", *arguments],
        cwd=ROOT,
        env=_variables() | variables,
        capture_output=True,
        text=True,
        timeout=60,
        stdin=subprocess.DEVNULL,
    )


def _variables() -> dict[str, str]:
    outside_a_job = {key: value for key, value in environment().items() if not key.startswith(("SLURM_", "SBATCH_"))}
    return outside_a_job | {"POLAR_PYTHON": sys.executable}


def _commands(name: str, *arguments: str, **variables: str) -> list[list[str]]:
    """The commands that --dry_run prints, as a shell would split them; without `export` lines."""
    done = _launch(name, "--dry_run", *arguments, **variables)
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines() if not line.startswith("export ")]


def _after(command: list[str], option: str) -> str:
    return command[command.index(option) + 1]


def _recipe(command: list[str]) -> dict[str, Any]:
    return dict(yaml.safe_load(Path(_after(command, "--config")).read_text(encoding="utf-8")))


@pytest.mark.parametrize("name", LAUNCHERS)
def test_help_names_the_launcher_and_the_shared_options(name: str) -> None:
    done = _launch(name, "--help")
    assert done.returncode == 0
    assert f"bash launchers/{name}.sh --submit" in done.stdout
    assert "--gpus_per_node N" in done.stdout


@pytest.mark.parametrize("name", TRAINERS)
def test_dry_run_shows_preflight_and_training_and_writes_nothing(name: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    check, train = _commands(name, "--output_dir", str(run), "--learning_rate", "1e-3")
    assert _after(check[check.index("--max_restarts=0") :], "-m") == "polar.preflight"
    assert _after(train[train.index("--max_restarts=0") :], "-m") == "polar.train"
    assert check[check.index("--config") :] == train[train.index("--config") :]
    assert _recipe(train)["global_batch_size"]
    assert (_after(train, "--learning_rate"), _after(train, "--output_dir")) == ("1e-3", str(run))
    assert "--resume" in train
    assert not run.exists()


def test_the_27b_job_has_the_papers_batch_on_its_own_nodes() -> None:
    sbatch, _, train = _commands("metamath_gemma27b", "--submit", "--method", "lora", "--time", "2:00:00")
    assert sbatch[0] == "env" and sbatch[2] == "sbatch"
    assert {"--nodes=4", "--gpus-per-node=4", "--time=2:00:00"} <= set(sbatch)
    assert sbatch[-2:] == ["--method", "lora"]  # what sbatch has taken does not go to the job again
    assert train[:5] == ["srun", "--nodes=4", "--ntasks=4", "--ntasks-per-node=1", "--kill-on-bad-exit=1"]
    assert {"--nnodes=4", "--nproc_per_node=4", "--rdzv_backend=static"} <= set(train)
    assert _after(train, "--variant") == "lora"
    values = _recipe(train)
    assert values["global_batch_size"] == 4 * 4 * values["per_device_train_batch_size"] * 4


def test_the_27b_job_shards_its_base_by_zero3_or_as_told() -> None:
    assert _after(_commands("metamath_gemma27b")[-1], "--deepspeed") == str(ROOT / "ds_configs" / "zero3.json")
    assert "--deepspeed" not in _commands("metamath_gemma27b", "--engine", "fsdp2")[-1]


def test_in_a_job_nodes_and_processes_come_from_slurm() -> None:
    job = {"SLURM_JOB_ID": "30007", "SLURM_NNODES": "1", "SLURM_GPUS_ON_NODE": "8", "SLURM_CPUS_ON_NODE": "64"}
    done = _launch("metamath_gemma27b", "--dry_run", "--nodes", "2", **job)
    assert done.returncode == 2
    assert "--nodes 2, but the job has 1: use --submit, or sbatch --nodes=2" in done.stderr
    done = _launch("metamath_gemma27b", "--dry_run", "--gpus_per_node", "9", **job)
    assert done.returncode == 2
    assert "--gpus_per_node 9, but the job has 8" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--submit", "--nodes", "3"], "global_batch_size 128 does not divide by 3 nodes x 4 GPUs x"),
        (["--submit", "--global_batch_size=96", "--dry_run"], None),
        (["--nodes", "2"], "--nodes 2 needs SLURM: add --submit"),
        (["--nodes", "none"], "--nodes none: say a number from 1 on"),
        (["--method", "full"], "--method full: choose one of polar lora dora rslora"),
        (["--container", "image.sif"], "say pyxis:IMAGE.sqsh, apptainer:IMAGE.sif or docker:IMAGE"),
        (["--container", "pyxis:image.sqsh"], "pyxis is a part of srun"),
        (["--recipe", "nothing"], "there is no recipe"),
        (["--time"], "--time needs a value"),
        (["--time", "1:00:00"], "--time and --sbatch are for sbatch: add --submit"),
    ],
)
def test_what_cannot_be_is_one_line_and_exit_code_2(arguments: list[str], message: str | None, tmp_path: Path) -> None:
    done = _launch("metamath_gemma27b", *arguments, "--output_dir", str(tmp_path / "run"))
    assert done.returncode == (2 if message else 0)
    if message:
        assert message in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_containers_run_each_nodes_part_inside(tmp_path: Path) -> None:
    size = ["--submit", "--nodes", "2", "--gpus_per_node", "4", "--output_dir", str(tmp_path / "run")]
    mounts = {"POLAR_MOUNTS": "/data:/data"}
    wanted = f"{ROOT}:{ROOT},{tmp_path}/run:{tmp_path}/run,/data:/data"
    pyxis = _commands("metamath_gemma27b", *size, "--container", "pyxis:/images/polar.sqsh", **mounts)[-1]
    assert {"--container-image=/images/polar.sqsh", f"--container-mounts={wanted}"} <= set(pyxis)
    assert pyxis.index(f"--container-mounts={wanted}") < pyxis.index("bash")
    apptainer = _commands("metamath_gemma27b", *size, "--container", "apptainer:polar.sif", **mounts)[-1]
    start = apptainer.index("apptainer")
    assert apptainer[start : start + 5] == ["apptainer", "exec", "--nv", "--bind", wanted]
    assert apptainer[apptainer.index("polar.sif") + 1] == "bash"
    docker = _commands("metamath_gemma27b", *size, "--container", "docker:polar:latest", NCCL_DEBUG="WARN", **mounts)[
        -1
    ]
    start = docker.index("docker")
    assert docker[start:].count("--volume") == 3
    assert f"--user={os.getuid()}:{os.getgid()}" in docker  # files of the run are not root's
    assert "NCCL_DEBUG" in docker and "PYTHONPATH" in docker  # by name: each task gives its own value
    assert docker[docker.index("polar:latest") + 1] == "bash"


def test_site_facts_come_from_cluster_env(tmp_path: Path) -> None:
    site = tmp_path / "checkout"
    for folder in ("slurm", "launchers", "configs", "ds_configs"):
        (site / folder).mkdir(parents=True)
        for file in (ROOT / folder).iterdir():
            if file.is_file():
                (site / folder / file.name).symlink_to(file)
    lines = [
        "POLAR_SBATCH_OPTIONS='--exclusive --qos=long'",
        "POLAR_PYTHON=/env/bin/python",
        "POLAR_CONTAINER=apptainer:a.sif",
    ]
    (site / "slurm" / "cluster.env").write_text("\n".join(lines), encoding="utf-8")
    done = subprocess.run(
        ["bash", str(site / "launchers" / "score.sh"), "--submit", "--dry_run", "run", "--tasks", "gsm8k"],
        env=_variables(),
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    sbatch, _, _, score = [shlex.split(line) for line in done.stdout.splitlines()]
    assert {"--exclusive", "--qos=long"} <= set(sbatch)
    assert "a.sif" in score and "/env/bin/python" in score
    assert score[score.index("polar.cli") :] == ["polar.cli", "eval", "run", "--tasks", "gsm8k", "--resume"]


def test_under_bash_a_run_stops_when_asked_and_the_same_command_continues(
    tiny_gemma3: Path, tiny_rows: Path, tmp_path: Path
) -> None:
    command = ["bash", "launchers/metamath_gemma27b.sh", "--no_preflight", "--variant", "tiny", "--dtype", "float32"]
    command += ["--model_name_or_path", str(tiny_gemma3), "--train_dataset", str(tiny_rows)]
    command += ["--dataset_format", "question_answer", "--max_steps", "6", "--gpus_per_node", "1"]
    command += ["--output_dir", str(tmp_path / "run"), "--use_cpu", "true"]
    metrics = tmp_path / "run" / "metrics.jsonl"
    with (tmp_path / "log").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=_variables(), stdout=log, stderr=log)
        deadline = time.monotonic() + 120
        while not metrics.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(timeout=60) == 0
    text = (tmp_path / "log").read_text(encoding="utf-8")
    assert "stopped by TERM at step" in text and "the same command continues" in text
    assert not (tmp_path / "run" / "done.json").exists()
    done = subprocess.run(command, cwd=ROOT, env=_variables(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "run" / "done.json").read_text(encoding="utf-8"))["step"] == 6
    again = subprocess.run(command, cwd=ROOT, env=_variables(), capture_output=True, text=True, timeout=60)
    assert again.stdout.strip().endswith("is finished: nothing to do")


def test_a_failed_process_leaves_its_last_word_with_its_node(tmp_path: Path) -> None:
    """Through real torchrun, whose closing words node.sh reads."""
    script = tmp_path / "fails.py"
    script.write_text(
        "import os, time\nif os.environ['RANK'] == '1': raise ValueError('no such thing')\ntime.sleep(60)\n"
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    command = ["bash", "slurm/node.sh", str(tmp_path), *torchrun, str(script)]
    done = subprocess.run(command, cwd=ROOT, env=_variables(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    seconds, _, reason = (tmp_path / "failure.0").read_text(encoding="utf-8").strip().partition(" ")
    assert abs(int(seconds) - time.time()) < 60
    assert reason.startswith("node ") and reason.endswith(
        ", process 1, failed with exit code 1: ValueError: no such thing"
    )
