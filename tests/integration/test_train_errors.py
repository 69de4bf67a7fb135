"""What a user can get wrong: one line with the value and the fix, exit code 2, no output folder; and the dry run."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from polar.train import main
from tests.integration.commands import deepspeed_train, train


@pytest.fixture
def settings(tmp_path, tiny_gemma3, tiny_rows) -> dict[str, str]:
    return {
        "model_name_or_path": str(tiny_gemma3),
        "train_dataset": str(tiny_rows),
        "output_dir": str(tmp_path / "run"),
        "template": "question_answer",
        "dtype": "float32",
        "adapter.r": "4",
        "adapter.target_modules": '["q_proj", "down_proj"]',
        "per_device_train_batch_size": "4",
        "global_batch_size": "8",
    }


def _argv(settings: dict[str, str]) -> list[str]:
    return [word for key, value in settings.items() for word in (f"--{key}", value)]


def _write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


CASES = {
    "unknown key": ({"learning_rat": "1"}, "--learning_rat", "--learning_rate"),
    "wrong type": ({"learning_rate": "fast"}, "'fast'", "number"),
    "rank zero": ({"adapter.r": "0"}, "r is 0", "at least 1"),
    "rank above the layer": ({"adapter.r": "65"}, "r=65", "r <= 64"),
    "targets match nothing": ({"adapter.target_modules": '["nope"]'}, "nope", "q_proj"),
    "batch does not divide": ({"global_batch_size": "10"}, "global_batch_size 10", "use 8 or 12"),
    "missing data": ({"train_dataset": "{tmp}/none.jsonl"}, "none.jsonl", "no such file"),
    "empty data": ({"train_dataset": "{tmp}/empty.jsonl"}, "empty.jsonl", "empty"),
    "broken line": ({"train_dataset": "{tmp}/broken.jsonl"}, "broken.jsonl line 2", "delete the line"),
    "model without config": ({"model_name_or_path": "{tmp}/empty"}, "{tmp}/empty", "no config.json"),
    "tracker that is not installed": ({"report_to": "wandb"}, "report_to wandb", "pip install wandb"),
    "unknown optimizer": ({"optim": "nonsense"}, "nonsense", "adamw_torch"),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_line(case, settings, tmp_path, capsys) -> None:
    changes, value, fix = CASES[case]
    (tmp_path / "empty").mkdir()
    _write(tmp_path / "empty.jsonl", "")
    _write(tmp_path / "broken.jsonl", '{"question": "a", "answer": "b"}\n{"question": oops\n')
    settings |= {key: text.replace("{tmp}", str(tmp_path)) for key, text in changes.items()}
    assert main(_argv(settings)) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line]
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("polar: error: ")
    assert value.replace("{tmp}", str(tmp_path)) in lines[0]
    assert fix in lines[0]
    assert not (tmp_path / "run").exists()


def test_folder_of_another_run_is_refused_then_replaced(settings, tmp_path, capsys) -> None:
    run = tmp_path / "run"
    (run / "adapter").mkdir(parents=True)
    (run / "adapter" / "old").write_text("old")
    (run / "metrics.jsonl").write_text("{}\n")
    (run / "notes.txt").write_text("mine")
    assert main(_argv(settings)) == 2
    assert "holds another run" in capsys.readouterr().err
    assert sorted(p.name for p in run.iterdir()) == ["adapter", "metrics.jsonl", "notes.txt"]
    assert main([*_argv(settings), "--max_steps", "1", "--overwrite"]) == 0
    assert not (run / "adapter" / "old").exists()
    assert (run / "adapter" / "adapter_model.safetensors").is_file()
    assert (run / "notes.txt").read_text() == "mine"
    assert all(json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())


def test_exit_code_of_the_process(settings, tmp_path) -> None:
    result = train(*_argv(settings | {"adapter.r": "0"}), ok=False)
    assert result.returncode == 2
    assert result.stderr == "polar: error: adapter.r is 0: the rank must be at least 1\n"
    assert not (tmp_path / "run").exists()


def test_dry_run_prints_the_arithmetic_and_writes_nothing(settings, tmp_path) -> None:
    """Under ZeRO-3 on 2 ranks, without reading weights: the model folder holds none."""
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in Path(settings["model_name_or_path"]).iterdir():
        if file.suffix == ".json":
            (bare / file.name).write_bytes(file.read_bytes())
    settings |= {"model_name_or_path": str(bare), "num_train_epochs": "3", "deepspeed": "ds_configs/zero3.json"}
    result = deepspeed_train(*_argv(settings), "--dry_run")
    text = " ".join(result.stdout.split())
    assert "DeepSpeed ZeRO-3, 2 processes on cpu" in text
    assert "8 rows per step = 4 per process x 2 processes x 1 accumulated" in text
    assert "24 = 3 epochs x 8" in text  # 64 rows
    assert "8 Stiefel factors, retract_polar" in text
    # (64 + 64) 4 + 4^2 for each q_proj, (64 + 128) 4 + 4^2 for each down_proj
    assert "q_proj 2 modules 1,056" in text
    assert "down_proj 2 modules 1,568" in text
    assert "2,624 trainable parameters" in text
    # 106,688 base parameters in fp32 over 2 ranks; the tokenizer of the tests decides the last digits.
    assert re.search(r"at least [0-9.]+ MiB per process: weights 0\.2[0-9] MiB", text)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (
            ("--second_moment", "per_factor"),
            "StiefelAdamW with offload_optimizer: accelerate would replace it by DeepSpeedCPUAdam without a word: set "
            '"zero_force_ds_cpu_optimizer": false in the DeepSpeed config, or use AdamW',
        ),
        (
            ("--load_in_8bit",),
            "a base in 8-bit under ZeRO-3 does not work: int8 weights cannot be cut: use load_in_4bit, or replicate "
            "the base (DDP, ZeRO-1, ZeRO-2)",
        ),
    ],
    ids=["replaced optimizer", "int8 base"],
)
def test_what_an_engine_cannot_do_is_said_before_anything_is_read(settings, tmp_path, extra, message) -> None:
    settings |= {"model_name_or_path": str(tmp_path), "deepspeed": "ds_configs/zero3_offload.json"}
    (tmp_path / "config.json").write_text("{}")
    result = train(*_argv(settings), *extra, ok=False)
    assert result.returncode == 2
    assert f"polar: error: {message}\n" in result.stderr
    assert not (tmp_path / "run").exists()
