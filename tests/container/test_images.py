"""The images do what a checkout does, for whoever mounts the folders; nothing that should stay outside is in them."""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path

import pytest

from tests.container.conftest import BASE, CALLER, LIMITS, Run, owned
from tests.container.images import IMAGES, OTHER_TORCH, ROOT, podman
from tests.integration.commands import polar

TRAIN = ["train", "--config", "configs/demo.yaml", "--model_name_or_path", "/base"]
TRAIN += ["--train_dataset", "/data/train.jsonl", "--val_dataset", "/data/val.jsonl", "--eval_strategy", "no"]
SCORE = ["--max_new_tokens", "24", "--batch_size", "8"]
TOKEN = "hf_planted_token"


def answers(folder: Path) -> list[str]:
    """What a scoring generated, problem by problem."""
    lines = (folder / "samples_gsm8k.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["generation"] for line in lines]


@pytest.fixture(scope="module")
def out(run: Run, problems: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """/out of polar:eval after a training of two steps, an export, and a scoring of both adapters."""
    folder = owned(tmp_path_factory.mktemp("eval") / "out")
    mounts = (BASE, f"{problems}:/data:ro", f"{folder}:/out")
    token = ("--env", f"HF_TOKEN={TOKEN}")
    run("polar:eval", *TRAIN, "--output_dir", "runs/first", "--max_steps", "2", mounts=mounts)
    run("polar:eval", "export", "runs/first", "out/lora", "--format", "lora", mounts=mounts)
    for adapter in ("/out/first", "/out/lora"):
        arguments = [adapter, "gsm8k", "/base", "--data", "/data/test.jsonl", *SCORE]
        run("polar:eval", *arguments, mounts=mounts, options=token)
    return folder


def test_scores_are_those_of_the_same_command_outside(out: Path, problems: Path, tmp_path: Path) -> None:
    inside = answers(out / "first" / "eval_gsm8k")
    base = ["--base", str(ROOT / "demo" / "base"), "--data", str(problems / "test.jsonl")]
    polar("eval", str(out / "first"), "--tasks", "gsm8k", *base, *SCORE, "--out", str(tmp_path / "outside"))
    assert inside == answers(tmp_path / "outside")
    assert len(inside) == 8 and any(inside)


def test_the_exported_adapter_scores_as_the_one_it_was_made_from(out: Path) -> None:
    assert answers(out / "lora" / "eval_gsm8k") == answers(out / "first" / "eval_gsm8k")


def test_files_belong_to_the_owner_of_the_mounted_folder(out: Path) -> None:
    owners = {str(path): path.lstat().st_uid for path in [out, *out.rglob("*")]}
    assert len(owners) > 20
    assert set(owners.values()) == {CALLER}, {path: user for path, user in owners.items() if user != CALLER}


def test_each_command_leaves_a_log(out: Path) -> None:
    logs = {path.name.rsplit("-", 2)[0]: path.read_text() for path in (out / "logs").iterdir()}
    assert set(logs) == {"train", "export", "eval_gsm8k"}
    assert "step 2" in logs["train"]
    assert "written: /out/" in logs["eval_gsm8k"]


def test_the_run_names_the_commit_that_the_image_was_built_from(out: Path) -> None:
    assert "0123abc" in "".join(path.read_text() for path in (out / "first").glob("*.json"))


def test_a_token_is_in_no_file(out: Path) -> None:
    files = [path for path in out.rglob("*") if path.is_file()]
    assert [str(path) for path in files if TOKEN.encode() in path.read_bytes()] == []


def test_the_base_keeps_its_torch(run: Run) -> None:
    code = "import torch, polar; print(torch.__version__, torch.__file__)"
    version, file = run("polar:gemma3", "python", "-c", code).stdout.split()
    assert version == OTHER_TORCH
    assert not file.startswith("/opt/venv")
    found = run("polar:gemma3", "shell", "-c", "ls -d /opt/venv/lib/python*/site-packages/torch*", code=2)
    assert found.stdout == ""


def test_self_test_trains_exports_and_scores_on_that_torch(run: Run) -> None:
    said = run("polar:gemma3", "self-test").stdout
    assert f"self-test passed: torch {OTHER_TORCH}" in said
    assert "of 8 right" in said


@pytest.mark.parametrize("image", IMAGES)
def test_nothing_that_should_stay_outside_is_in_the_image(run: Run, image: str) -> None:
    def found(command: str) -> str:  # by root, who may look everywhere
        return run(image, "-c", f"{command}; true", options=("--entrypoint", "bash")).stdout

    assert found("grep -rIl planted /opt/polar /home /root /tmp /etc") == ""
    assert found("find / -xdev -name .git -o -xdev -name cluster.env") == ""
    folders = "/opt/polar /home /root /cache /out /tmp"
    assert found(f"find {folders} -name '*.safetensors' -o -name '*.bin' -o -name '*.pt'") == ""
    assert found("id -u") == "0\n"
    # The index that the build used may need a password.
    assert found("cat /etc/pip.conf 2>/dev/null") == ""
    assert "planted" not in podman("inspect", f"localhost/{image}").stdout


def test_without_mounts_it_is_not_root(run: Run) -> None:
    assert run("polar:eval", "shell", "-c", "id -u").stdout == "10001\n"


def test_a_named_user_is_kept(run: Run, tmp_path: Path) -> None:
    folder = owned(tmp_path / "out", 1234)
    options = ("--user", "1234:1234")
    command = "touch /out/made && python -c 'import getpass; print(getpass.getuser())'"
    run("polar:eval", "shell", "-c", command, mounts=(f"{folder}:/out",), options=options)
    assert (folder / "made").stat().st_uid == 1234


def test_a_folder_that_the_engine_made_goes_to_the_owner_of_the_cache(run: Run, tmp_path: Path) -> None:
    mounts = (f"{owned(tmp_path / 'cache')}:/cache", f"{owned(tmp_path / 'out', 0)}:/out")
    run("polar:eval", "shell", "-c", "touch /out/made", mounts=mounts)
    assert (tmp_path / "out" / "made").stat().st_uid == CALLER
    assert (tmp_path / "out").stat().st_uid == CALLER


def test_a_folder_of_root_is_left_to_root_with_a_note(run: Run, tmp_path: Path) -> None:
    folder = owned(tmp_path / "out", 0)
    (folder / "there").touch()
    done = run("polar:eval", "shell", "-c", "touch /out/made", mounts=(f"{folder}:/out",))
    assert (folder / "made").stat().st_uid == 0
    assert "/out belongs to root, so this runs as root" in done.stderr


def test_a_folder_of_somebody_else_is_one_clear_line(run: Run, tmp_path: Path) -> None:
    mounts, options = (f"{owned(tmp_path / 'out')}:/out",), ("--user", "1234:1234")
    done = run("polar:eval", "report", "/out", mounts=mounts, options=options, code=2)
    assert done.stderr.splitlines() == [
        "polar: error: /out is not writable for user 1234: it belongs to 4321:4321; add --user "
        '"$(id -u):$(id -g)" for the owner, or mount it without :ro'
    ]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["/out/adapter"], "'/out/adapter': say ADAPTER TASK [BASE_MODEL], or one of train, export"),
        (["train"], "train '': say --config FILE, or one of: adaptive_rank_llama8b commonsense_gemma"),
        (["train", "metamath"], "train 'metamath': say --config FILE, or one of: adaptive_rank_llama8b"),
    ],
)
def test_a_wrong_command_is_one_clear_line(run: Run, arguments: list[str], line: str) -> None:
    done = run("polar:eval", *arguments, code=2)
    assert done.stderr.startswith(f"polar: error: {line}")
    assert len(done.stderr.splitlines()) == 1


def test_a_launcher_runs_by_its_name(run: Run, tmp_path: Path) -> None:
    mounts = (f"{owned(tmp_path / 'out')}:/out",)
    said = run("polar:eval", "train", "metamath_gemma27b", "--method", "lora", "--dry_run", mounts=mounts).stdout
    assert "-m polar.train --config /opt/polar/configs/metamathqa_gemma3_27b.yaml --deepspeed" in said
    assert "--variant lora" in said
    assert "--output_dir /out/metamath_gemma27b_lora" in said


def test_stopping_a_container_saves_the_step(problems: Path, tmp_path: Path) -> None:
    folder = owned(tmp_path / "out")
    volumes = [word for mount in (BASE, f"{problems}:/data:ro", f"{folder}:/out") for word in ("--volume", mount)]
    arguments = [*TRAIN, "--output_dir", "/out/long", "--max_steps", "5000", "--logging_steps", "1"]
    started = podman("run", "--detach", "--network", "none", *LIMITS, *volumes, "localhost/polar:eval", *arguments)
    container = started.stdout.strip()
    try:
        wait_for_step(3, container)
        podman("stop", "--time", "120", container)
        assert podman("inspect", "--format", "{{.State.ExitCode}}", container).stdout.strip() == "0"
    finally:
        podman("rm", "--force", container)
    assert [path for path in (folder / "long").glob("checkpoint-*") if (path / "checkpoint.json").is_file()]


def wait_for_step(step: int, container: str, timeout_s: float = 180) -> None:
    """Wait until a training has made a step; AssertionError with what it said when that takes too long."""
    deadline = time.monotonic() + timeout_s
    while not re.search(rf"^step +{step}/", (said := podman("logs", container)).stdout, re.MULTILINE):
        assert time.monotonic() < deadline, said.stdout + said.stderr
        time.sleep(1)


def test_only_root_changes_users() -> None:
    """The tests above mean something only where folders can be given away."""
    assert os.geteuid() == 0
