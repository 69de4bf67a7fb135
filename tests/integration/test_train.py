"""The training command, started in the three ways that the README shows."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import polar  # noqa: F401  registers POLAR
from polar.cli import main as command
from polar.spectrum import adapter_spectrum
from tests.integration.commands import ROOT, deepspeed_train, metrics, python, torchrun_train, train

# float32, the same rows in every step, sums over ranks in another order.
LOSS_TOLERANCE = 1e-4
STEPS = 14
# The choices about the update that a run has beside its manifold step.
OPTIONS = ["--second_moment", "per_factor", "--project_momentum", "true", "--reference_width", "64"]


@dataclass
class FinishedRun:
    folder: Path
    process: subprocess.CompletedProcess[str]


def _settings(model: Path, rows: Path, output: Path) -> list[str]:
    return [
        *("--model_name_or_path", str(model), "--train_dataset", str(rows), "--output_dir", str(output)),
        *("--dtype", "float32", "--template", "question_answer", "--val_split", "8", "--eval_steps", "7"),
        *("--adapter.r", "5", "--adapter.target_modules", '["q_proj", "v_proj", "down_proj"]'),
        *("--global_batch_size", "8", "--per_device_train_batch_size", "4", "--num_train_epochs", "2"),
        *("--learning_rate", "1e-2", "--theta_learning_rate", "2e-2", "--weight_decay", "0.1"),
        *("--logging_steps", "1", "--save_steps", "7"),
    ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_gemma3, tiny_rows) -> dict[str, FinishedRun]:
    """The same settings on one process (2 x 4 accumulated), DDP and ZeRO-3 (2 ranks x 4)."""
    folder = tmp_path_factory.mktemp("runs")
    finished = {}
    for name, start, extra in (
        ("one", train, []),
        ("ddp", torchrun_train, []),
        ("zero3", deepspeed_train, ["--deepspeed", "ds_configs/zero3.json"]),
        ("fsdp2", torchrun_train, ["--engine", "fsdp2"]),
        ("one, options", train, [*OPTIONS, "--report_to", "tensorboard"]),
        ("zero2, options", deepspeed_train, [*OPTIONS, "--deepspeed", "ds_configs/zero2.json"]),
    ):
        output = folder / name
        finished[name] = FinishedRun(output, start(*_settings(tiny_gemma3, tiny_rows, output), *extra))
    return finished


@pytest.mark.parametrize(
    ("alone", "engine"),
    [("one", "ddp"), ("one", "zero3"), ("one", "fsdp2"), ("one, options", "zero2, options")],
    ids=lambda name: name,
)
def test_engines_train_the_same_model(runs, alone, engine) -> None:
    """Independent computation: the same run on one process without any collective."""
    for key, count in (("loss", STEPS), ("eval_loss", 2), ("grad_norm", STEPS), ("stable_rank", STEPS - 1)):
        expected, found = metrics(runs[alone].folder, key), metrics(runs[engine].folder, key)
        assert len(expected) == count
        assert found == pytest.approx(expected, rel=LOSS_TOLERANCE if key != "stable_rank" else 1e-2)
    one, other = (load_file(runs[n].folder / "adapter" / "adapter_model.safetensors") for n in (alone, engine))
    assert one.keys() == other.keys()
    for key, value in one.items():
        torch.testing.assert_close(other[key], value, rtol=0, atol=2e-3)


def test_options_reach_the_optimizer(runs) -> None:
    assert metrics(runs["one, options"].folder, "loss") != pytest.approx(metrics(runs["one"].folder, "loss"), rel=1e-3)
    state = json.loads((runs["zero2, options"].folder / f"checkpoint-{STEPS}" / "training_state.json").read_text())
    assert state["optimizer"]["kind"] == "StiefelAdamW"


def test_tensorboard_gets_what_the_run_folder_gets(runs) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = runs["one, options"].folder
    (file,) = run.rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file)).Reload()
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(metrics(run, "loss"))
    assert len(events.Scalars("train/orthonormality_error")) == STEPS
    assert not list(runs["one"].folder.rglob("events.out.tfevents.*"))


@pytest.mark.parametrize("engine", ["one", "ddp", "zero3", "fsdp2", "zero2, options"])
def test_run_learns_on_the_manifold(runs, engine) -> None:
    run = runs[engine].folder
    loss = metrics(run, "loss")
    assert loss[-1] < loss[0] - 0.1
    assert max(metrics(run, "orthonormality_error")) < 1e-5
    assert min(metrics(run, "tokens_per_s")) > 0
    tensors = load_file(run / "adapter" / "adapter_model.safetensors")
    assert len(tensors) == 2 * 3 * 3  # layers x modules x (X, Theta, Y)
    for key, value in tensors.items():
        assert value.dtype == torch.float32
        if not key.endswith("polar_Theta"):
            torch.testing.assert_close(value.T @ value, torch.eye(5), rtol=0, atol=1e-5)
        else:
            assert value.abs().max() > 1e-3


def test_adapter_loads_and_acts(runs, tiny_gemma3) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_gemma3)
    ids = tokenizer("What is 3 + 4?", return_tensors="pt").input_ids
    with torch.no_grad():
        base = AutoModelForCausalLM.from_pretrained(tiny_gemma3)
        before = base(ids).logits.clone()
        after = PeftModel.from_pretrained(base, runs["zero3"].folder / "adapter")(ids).logits
    assert (after - before).abs().max() > 1e-2


@pytest.mark.parametrize("engine", ["one", "zero3", "fsdp2"])
def test_the_log_has_the_stable_rank_of_the_adapter_that_was_saved(runs, engine) -> None:
    run = runs[engine].folder
    saved = adapter_spectrum(run / f"checkpoint-{STEPS}")
    assert metrics(run, "stable_rank")[-1] == pytest.approx(median(s.stable_rank for s in saved), rel=1e-4)


def test_adapters_are_measured_truncated_and_added_by_the_commands(runs, tmp_path, capsys) -> None:
    one, other = str(runs["one"].folder), str(runs["one, options"].folder)
    spectrum, difference, small, new = (str(tmp_path / name) for name in ("spectrum", "difference", "small", "new"))
    assert command(["spectrum", one, "--checkpoints", "--out", spectrum]) == 0
    shown = capsys.readouterr().out
    assert "one step 7 " in shown and "one step 14 " in shown
    assert (tmp_path / "spectrum" / "stable_rank_evolution.png").stat().st_size > 10_000
    assert command(["combine", one, other, "--weights", "1", "-1", "--out", difference]) == 0
    assert command(["convert", difference, small, "--r", "2"]) == 0
    shown = capsys.readouterr().out
    assert "r = 2" in shown and "of norm(dW)_F" in shown
    assert len(adapter_spectrum(tmp_path / "small")) == 6
    assert command(["combine", one, small, "--r", "99", "--out", new]) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not (tmp_path / "new").exists()


def test_a_run_starts_from_an_adapter_under_zero3(runs, tiny_gemma3, tiny_rows, tmp_path) -> None:
    one = runs["one"].folder
    settings = _settings(tiny_gemma3, tiny_rows, tmp_path / "next")
    options = ("--adapter.init_from", str(one), "--deepspeed", "ds_configs/zero3.json", "--max_steps", "2")
    deepspeed_train(*settings, *options, "--eval_on_start", "true")
    best = json.loads((one / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())["best_metric"]
    assert metrics(tmp_path / "next", "eval_loss")[0] == pytest.approx(best, rel=LOSS_TOLERANCE)


def test_run_folder_says_what_was_run(runs) -> None:
    run = runs["zero3"].folder
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["adapter"]["r"] == 5
    assert config["global_batch_size"] == 8
    assert not {"overwrite", "resume", "dry_run"} & config.keys()
    provenance = json.loads((run / "provenance.json").read_text())
    assert provenance["world_size"] == 2
    assert provenance["engine"] == "DeepSpeed ZeRO-3"
    assert provenance["versions"]["deepspeed"]
    assert "--theta_learning_rate 2e-2" in provenance["command"]
    assert json.loads((run / "data_report.json").read_text())["train"]["rows"] == 56
    checkpoint = {path.name for path in (run / "checkpoint-14").iterdir()}
    adapter_files = {"adapter_config.json", "adapter_model.safetensors"}
    state_files = {"training_state.safetensors", "training_state.json", "random_state.json", "trainer_state.json"}
    assert checkpoint == {*adapter_files, *state_files, "checkpoint.json"}


@pytest.mark.parametrize("engine", ["one", "ddp", "zero3", "fsdp2"])
def test_run_prints_no_warning(runs, engine) -> None:
    process = runs[engine].process
    lines = [line for line in (process.stdout + process.stderr).splitlines() if "warn" in line.lower()]
    # The deepspeed launcher says, before our code runs, that there is no hostfile and that the accelerator is the CPU.
    assert [line for line in lines if "runner.py" not in line and "real_accelerator.py" not in line] == []
    if engine == "one":
        assert process.stderr == ""
        assert "off manifold" in process.stdout


def test_second_start_in_the_same_folder_is_refused(runs, tiny_gemma3, tiny_rows) -> None:
    run = runs["ddp"].folder
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    result = torchrun_train(*_settings(tiny_gemma3, tiny_rows, run), ok=False)
    assert result.returncode != 0
    errors = [line for line in result.stderr.splitlines() if line.startswith("polar: error:")]
    assert len(errors) == 1, result.stderr  # two ranks, one line
    assert "--overwrite" in errors[0]
    assert "exitcode  : 2" in result.stderr
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*")}


def test_zero3_partitions_the_base_while_it_is_read(tmp_path, tiny_gemma3, tiny_rows) -> None:
    """Else every rank would hold all weights of a 27B model in host memory first."""
    config = json.loads((ROOT / "ds_configs/zero3.json").read_text())
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    (tmp_path / "ds.json").write_text(json.dumps(config))
    script = tmp_path / "load.py"
    script.write_text(
        "import sys\n"
        "from polar.launch import join_deepspeed, local_environment, shut_down\n"
        "local_environment(sys.argv)\n"
        "from polar.run_config import parse_run\n"
        "from polar.build_model import build_model\n"
        "config = parse_run(sys.argv[1:])\n"
        "join_deepspeed()\n"
        "model = build_model(config)\n"
        "base = [p for n, p in model.named_parameters() if 'polar_' not in n]\n"
        "assert base and all(hasattr(p, 'ds_id') and p.numel() == 0 for p in base)\n"
        "print('partitioned', len(base))\n"
        "shut_down()\n"
    )
    arguments = _settings(tiny_gemma3, tiny_rows, tmp_path / "run")
    result = python(str(script), *arguments, "--deepspeed", str(tmp_path / "ds.json"))
    assert "partitioned" in result.stdout
