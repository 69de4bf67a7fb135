"""Settings from YAML and command line: values, batch arithmetic, back to YAML, and one line for each mistake."""

from __future__ import annotations

import dataclasses
import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from polar.errors import UserError
from polar.run_checks import make_adapter_config
from polar.run_config import (
    AdapterArguments,
    DataArguments,
    ManifoldArguments,
    ModelArguments,
    RunConfig,
    parse_run,
)
from polar.training_config import resolve_batch

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a model's config.json and one row of data."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "rows.jsonl").write_text('{"question": "1 + 1?", "answer": "2"}\n')
    return tmp_path


BASE = ["--model_name_or_path", "model", "--train_dataset", "rows.jsonl", "--output_dir", "out", "--use_cpu"]


def run(*argv: str) -> RunConfig:
    config = parse_run([*BASE, *argv])
    config.validate(world_size=1)
    return config


def write_config(folder: Path, text: str) -> str:
    (folder / "run.yaml").write_text(text)
    return "run.yaml"


def test_command_line_wins_over_file_and_file_over_default(folder: Path) -> None:
    path = write_config(folder, "learning_rate: 2e-3\nmax_length: 300\nadapter: {r: 4, alpha: 16}\n")
    config = run("--config", path, "--max_length", "200", "--adapter.r", "8")
    assert config.training.learning_rate == 2e-3  # YAML 1.1 reads `2e-3` as text
    assert config.training.max_length == 200
    assert config.adapter.adapter == {"r": 8, "alpha": 16}
    assert config.data.template == "alpaca"


def test_dotted_values_are_yaml(folder: Path) -> None:
    config = run(
        "--adapter.target_modules", '["q_proj", "v_proj"]', "--adapter.alpha=1e1", "--adapter.use_rslora", "true"
    )
    assert config.adapter.adapter == {"target_modules": ["q_proj", "v_proj"], "alpha": 10.0, "use_rslora": True}
    assert run("--adapter.target_modules", "q_proj", "v_proj").adapter.adapter == {
        "target_modules": ["q_proj", "v_proj"]
    }
    scheduler = run("--lr_scheduler_type", "cosine_with_min_lr", "--lr_scheduler_kwargs.min_lr", "1e-5").training
    assert scheduler.lr_scheduler_kwargs == {"min_lr": 1e-5}


def test_adapter_becomes_the_config_of_its_method(folder: Path) -> None:
    polar = make_adapter_config(run("--adapter.r", "4", "--adapter.target_modules", "q_proj", "k_proj").adapter)
    assert (polar.peft_type, polar.task_type, polar.r) == ("POLAR", "CAUSAL_LM", 4)
    assert set(polar.target_modules) == {"q_proj", "k_proj"}
    lora = make_adapter_config(run("--adapter", "{peft_type: lora, r: 2, lora_alpha: 6}").adapter)
    assert (type(lora).__name__, lora.r, lora.lora_alpha) == ("LoraConfig", 2, 6)


def test_launcher_arguments_and_bare_words_of_yaml(folder: Path) -> None:
    config = run("--local_rank=0", "--config", write_config(folder, "save_strategy: no\nreport_to: none\n"))
    assert config.training.save_strategy == "no"  # YAML 1.1 reads a bare `no` as false
    assert config.training.report_to == []


def test_project_defaults(folder: Path) -> None:
    training = run().training
    assert training.completion_only_loss and not training.packing and not training.gradient_checkpointing
    assert (training.lr_scheduler_type, training.warmup_steps, training.seed) == ("cosine", 0.03, 42)
    assert (training.save_strategy, training.report_to, training.bf16) == ("steps", [], True)


def test_compute_precision_follows_the_dtype_of_the_base(folder: Path) -> None:
    """SFTConfig alone computes a float32 base in bf16."""
    assert not run("--dtype", "float32").training.bf16
    assert run("--dtype", "float32", "--bf16").training.bf16


@pytest.mark.parametrize("key", ["gradient_checkpointing", "activation_checkpointing"])
def test_both_names_of_checkpointing_work_without_a_warning(folder: Path, key: str) -> None:
    training = run(f"--{key}").training  # warnings are errors here
    assert training.gradient_checkpointing is True and training.activation_checkpointing is True


def test_a_validation_set_selects_the_best_checkpoint(folder: Path) -> None:
    training = run("--val_split", "0.5", "--save_steps", "20").training
    assert (training.eval_strategy, training.eval_steps) == ("steps", 20)
    assert training.load_best_model_at_end and training.metric_for_best_model == "eval_loss"
    assert not training.greater_is_better
    own = run("--val_split", "0.5", "--eval_strategy", "no").training
    assert own.eval_strategy == "no" and not own.load_best_model_at_end


@pytest.mark.parametrize("seed", range(3))
def test_batch_arithmetic_is_exact_or_an_error(seed: int) -> None:
    """global = micro x processes x accumulation; upstream's integer division gave 120 for 128."""
    for total, micro, world in itertools.product([1, 2, 96, 128], [1, 2, 4, 5], [1, 2, 3, 8, 12 + seed]):
        if total % (micro * world) == 0:
            assert resolve_batch(total, micro, None, world) == (total, total // (micro * world))
        else:
            with pytest.raises(UserError) as error:
                resolve_batch(total, micro, None, world)
            nearest = [int(word) for word in str(error.value).partition("use ")[2].split(" or ")]
            assert all(n > 0 and n % (micro * world) == 0 and abs(n - total) < micro * world for n in nearest)
    assert resolve_batch(None, 2, None, 4) == (8, 1)
    assert resolve_batch(None, 2, 3, 4) == (24, 3)


def test_accumulation_counts_the_processes_of_the_launcher(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = run("--global_batch_size", "32", "--per_device_train_batch_size", "4").training
    assert training.gradient_accumulation_steps == 8
    with pytest.raises(UserError, match="2 processes run"):
        parse_run([*BASE, "--global_batch_size", "32"]).validate(world_size=2)


def test_yaml_round_trip(folder: Path) -> None:
    argv = ["--adapter.r", "4", "--adapter.rank_pattern", "{q_proj: 2}", "--manifold_step", "landing"]
    argv += ["--landing_penalty", "5e-3", "--landing_convention", "upstream", "--val_split", "1", "--optim", "sgd"]
    argv += ["--global_batch_size", "32", "--learning_rate", "4e-4", "--lr_scheduler_kwargs", "{}", "--packing"]
    argv += ["--hub_token", "secret", "--template", "plain", "--max_length", "null", "--report_to", "tensorboard"]
    first = parse_run([*BASE, *argv, "--overwrite", "--resume", "--dry_run"])
    text = first.to_yaml()
    again = parse_run(["--config", write_config(folder, text)])
    first.training.hub_token = None
    assert again == first
    assert again.to_yaml() == text
    assert {"report_to", "seed", "bf16", "num_train_epochs"} <= yaml.safe_load(parse_run(BASE).to_yaml()).keys()
    assert again.training.max_length is None and again.training.gradient_accumulation_steps == 4
    for word in ("secret", "overwrite", "resume", "dry_run"):
        assert word not in text, "neither secrets nor what one start asked for"


def test_every_field_has_a_description_and_help_prints_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leave:
        parse_run(["--help"])
    assert leave.value.code == 0
    text = capsys.readouterr().out
    for group in (ModelArguments, DataArguments, AdapterArguments, ManifoldArguments):
        for field in dataclasses.fields(group):
            assert field.metadata["help"] and f"--{field.name}" in text
    for name in ("--theta_learning_rate", "--on_too_long", "--landing_penalty", "--adapter", "--global_batch_size"):
        assert name in text
    assert "--padding_free" not in text, "a key that does nothing here is not offered"


MISTAKES = {
    "unknown key": (["--learning_rat", "1"], "--learning_rat", "--learning_rate"),
    "name of another kit": (["--cutoff_len", "512"], "--cutoff_len", "max_length"),
    "key without effect": (["--eos_token", "x"], "--eos_token", "EOS"),
    "abbreviation": (["--learn", "1"], "--learn", "--learning_rate"),
    "not an integer": (["--max_length", "long"], "'long'", "an integer"),
    "not a number": (["--learning_rate", "fast"], "'fast'", "a number"),
    "not a boolean": (["--packing", "perhaps"], "'perhaps'", "true or false"),
    "unknown choice": (["--manifold_step", "retract"], "'retract'", "retract_"),
    "unknown scheduler": (["--lr_scheduler_type", "cosin"], "'cosin'", "cosine"),
    "value missing": (["--max_steps"], "--max_steps", "expected one argument"),
    "stray word": (["--seed", "1", "512"], "'512'", "--key value"),
    "negative rate": (["--learning_rate", "-1"], "learning_rate is -1", "above 0"),
    "NaN rate": (["--learning_rate", "nan"], "learning_rate is nan", "above 0"),
    "no steps": (["--max_steps", "0"], "max_steps is 0", "at least 1"),
    "negative seed": (["--seed", "-1"], "seed is -1", "from 0"),
    "no validation batch": (["--per_device_eval_batch_size", "0"], "size is 0", "at least 1"),
    "best of nothing": (["--save_strategy", "best"], "save_strategy is best", "val_split"),
    "broken expression": (["--adapter.target_modules", "(q_proj"], "'(q_proj'", "list of names"),
    "broken mapping": (["--adapter", "{r: "], "'{r: '", "not valid YAML"),
    "no length": (["--max_length", "0"], "max_length is 0", "above 0"),
    "batch": (["--global_batch_size", "100", "--per_device_train_batch_size", "16"], "100", "96 or 112"),
    "batch and accumulation": (["--global_batch_size", "32", "--gradient_accumulation_steps", "3"], "32", "derived"),
    "rank 0": (["--adapter.r", "0"], "0", "at least 1"),
    "rank text": (["--adapter.r", "eight"], "'eight'", "an integer"),
    "adapter field": (["--adapter.lora_alpha", "8"], "adapter.lora_alpha", "adapter.alpha"),
    "adapter method": (["--adapter.peft_type", "LORRA"], "LORRA", "LORA"),
    "not a mapping": (["--template.name", "x"], "--template.name", "template"),
    "adapter value missing": (["--adapter.r"], "--adapter.r", "value"),
    "field twice": (["--adapter.backward_field", "tangent", "--manifold_step", "landing"], "landing", "act twice"),
    "field and loop": (
        [
            *("--adapter.backward_field", "landing", "--adapter.landing_penalty", "1", "--manifold_step", "none"),
            *("--global_batch_size", "16", "--per_device_train_batch_size", "4"),
        ],
        "adapter.gradient_accumulation_steps is 1",
        "set it to 4",
    ),
    "penalty without landing": (["--landing_penalty", "0.1"], "0.1", "landing"),
    "model without config": (["--model_name_or_path", "."], ".", "config.json"),
    "model missing": (["--model_name_or_path", "./nowhere/model"], "./nowhere/model", "no such folder"),
    "both quantisations": (["--load_in_4bit", "--load_in_8bit"], "load_in_4bit", "choose one"),
    "data missing": (["--train_dataset", "absent.jsonl"], "absent.jsonl", "no such file"),
    "data kind": (["--train_dataset", "./model/config.toml"], "config.toml", "no such file"),
    "two validation sets": (["--val_dataset", "rows.jsonl", "--val_split", "0.1"], "rows.jsonl", "choose one"),
    "validation rows": (["--val_split", "2.5"], "2.5", "whole number"),
    "template": (["--template", "alpacca"], "alpacca", "alpaca"),
    "evaluation without data": (["--eval_strategy", "steps"], "steps", "val_split"),
    "deepspeed file": (["--deepspeed", "absent.json"], "absent.json", "ds_configs"),
    "resume and overwrite": (["--resume", "--overwrite"], "--resume", "choose one"),
    "output is a file": (["--output_dir", "rows.jsonl"], "rows.jsonl", "folder"),
    "config missing": (["--config", "absent.yaml"], "absent.yaml", "No such file"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line_with_value_and_fix(folder: Path, name: str) -> None:
    argv, value, fix = MISTAKES[name]
    before = sorted(folder.rglob("*"))
    with pytest.raises(UserError) as error:
        run(*argv)
    message = str(error.value)
    assert value in message and fix in message and "\n" not in message
    assert sorted(folder.rglob("*")) == before, "nothing is written"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("learning_rat: 1\n", "run.yaml: unknown key 'learning_rat': did you mean learning_rate?"),
        ("max_length: 512\nmax_length: 256\n", "run.yaml line 2: not valid YAML: the key 'max_length' occurs twice"),
        ("a: [1\nb: 2\n", "run.yaml line 2: not valid YAML"),
        ("- max_length\n", "run.yaml must hold `key: value` lines, found list"),
        ("max_length: [512]\n", "run.yaml: max_length: [512] is not an integer or null"),
        ("max_length: 12.5\n", "run.yaml: max_length: 12.5 is not an integer or null"),
        ("packing: 3\n", "run.yaml: packing: 3 is not true or false"),
        ("revision: 1.0\n", "run.yaml: revision: 1.0 is not text or null (write it in quotes)"),
        ("adapter: 8\n", "run.yaml: adapter: 8 is not a mapping"),
        ("env: {NCCL_DEBUG: INFO}\n", "run.yaml: unknown key 'env': write the shell"),
        ("dtype: bf16\n", "run.yaml: dtype: 'bf16' is unknown: did you mean bfloat16?"),
    ],
)
def test_mistakes_in_the_file_name_file_and_key(folder: Path, text: str, expected: str) -> None:
    with pytest.raises(UserError) as error:
        run("--config", write_config(folder, text))
    assert str(error.value).startswith(expected)


@pytest.mark.parametrize("leftover", ["config.yaml", "metrics.jsonl", "adapter/", "checkpoint-5/"])
def test_a_folder_that_holds_a_run_needs_a_decision(folder: Path, leftover: str) -> None:
    run()
    path = folder / "out" / leftover
    path.mkdir(parents=True) if leftover.endswith("/") else (path.parent.mkdir(), path.write_text(""))
    with pytest.raises(UserError, match="holds another run"):
        run()
    run("--resume")
    run("--overwrite")


def test_a_folder_with_other_files_is_no_run(folder: Path) -> None:
    (folder / "out").mkdir()
    (folder / "out" / "slurm-17.log").write_text("")
    run()


def test_required_keys(folder: Path) -> None:
    for index in (0, 2, 4):
        with pytest.raises(UserError, match=f"{BASE[index][2:]} is not set"):
            parse_run(BASE[:index] + BASE[index + 2 :]).validate(1)


def test_missing_deepspeed_is_said_before_anything_starts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "zero.json").write_text("{}")
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None if name == "deepspeed" else True)
    with pytest.raises(UserError, match=r"'zero.json'.*not installed: pip install"):
        run("--deepspeed", "zero.json")


def test_import_starts_no_engine() -> None:
    code = """
import sys, polar.run_config, torch.distributed
assert "deepspeed" not in sys.modules and "datasets" not in sys.modules, "imported"
assert not torch.distributed.is_initialized()
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY, timeout=120)


@pytest.mark.parametrize("path", sorted((REPOSITORY / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_recipe_is_valid(folder: Path, path: Path) -> None:
    given = yaml.safe_load(path.read_text())
    places = [token for key in (0, 2, 4) if BASE[key][2:] not in given for token in BASE[key : key + 2]]
    for task in given.get("tasks", [None]):
        chosen = [] if task is None else ["--task", task, "--train_dataset", "nyu-mll/glue"]
        config = parse_run(["--config", str(path), *places, *chosen, "--model_name_or_path", "model", "--use_cpu"])
        if task is None:
            config.data.train_dataset = "rows.jsonl"  # the file that a recipe names may not be there
            config.data.val_dataset = config.data.val_dataset and "rows.jsonl"
        config.validate(world_size=1)
