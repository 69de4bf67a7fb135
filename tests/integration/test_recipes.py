"""Every recipe with every variant: as a dry run in the real size, and trained as its tiny twin."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from polar.commonsense import TASKS
from polar.errors import UserError
from polar.rank_file import selected_ranks
from polar.recipe import merge, split_recipe
from polar.strict_yaml import load_yaml
from polar.train import main
from polar.training_config import resolve_batch
from tests.integration.commands import ROOT, environment, metrics
from tests.integration.recipe_bases import BASES, write_real_size, write_rows, write_tiny

CONFIGS = ROOT / "configs"
RECIPES = {name: load_yaml((CONFIGS / f"{name}.yaml").read_text(), name) for name in BASES}
VARIANTS = {name: list(content["variants"]) for name, content in RECIPES.items()}
ZERO3 = ["--deepspeed", "ds_configs/zero3.json"]
# Rows, task, variants and what else stands on the command line; ranks 0 is one process without a launcher.
TRAINED: dict[str, tuple[str, int, list[str]]] = {
    "metamathqa_gemma3_27b": ("metamathqa", 2, ZERO3),
    "commonsense_gemma3_12b": ("winogrande", 0, ["--variant", "paper"]),
    "commonsense_gemma2_2b": ("boolq", 0, []),
    "commonsense_llama2_7b": ("piqa", 0, ["--variant", "lora", "--load_in_4bit", "true"]),
    "commonsense170k_llama3_8b": ("instruction", 0, []),
    "math10k_llama_7b": ("instruction", 2, ["--variant", "polar", "--save_steps", "1", *ZERO3]),
}


def settings_of(recipe: str, *variants: str) -> dict[str, Any]:
    """What a recipe says with some variants."""
    values, changes = split_recipe(RECIPES[recipe], recipe)[:2]
    for name in variants:
        values = merge(values, changes[name])
    return values


def test_every_recipe_of_the_paper_and_of_lora_ar_is_tested_here() -> None:
    others = {"demo", "gsm8k_tiny", "glue_deberta_v3_base"}  # tested elsewhere
    assert {path.stem for path in CONFIGS.glob("*.yaml")} - others == BASES.keys()


@pytest.mark.parametrize("recipe", BASES)
def test_the_global_batch_is_exact(recipe: str) -> None:
    """128 = 16 processes x 2 x 4 for the 27B model; the others on the numbers of GPUs of a node."""
    values = settings_of(recipe)
    total, micro = values["global_batch_size"], values["per_device_train_batch_size"]
    assert total == (128 if "commonsense170k" not in recipe and "math10k" not in recipe else 16)
    worlds = (16,) if recipe == "metamathqa_gemma3_27b" else (1, 2, 4)
    for world in worlds:
        found, accumulation = resolve_batch(total, micro, None, world)
        assert found == total == micro * world * accumulation
    if recipe == "metamathqa_gemma3_27b":
        assert accumulation == 4
        with pytest.raises(UserError, match="use 120 or 144"):  # the paper's 3 nodes x 4 GPUs, where 120 was trained
            resolve_batch(total, micro, None, 12)


@pytest.mark.parametrize("recipe", BASES)
def test_baselines_differ_in_adapter_and_learning_rate_only(recipe: str) -> None:
    changes = split_recipe(RECIPES[recipe], recipe)[1]
    for name in {"lora", "dora", "rslora", "polar"} & changes.keys():
        assert changes[name].keys() <= {"adapter", "learning_rate"} and "peft_type" in changes[name]["adapter"]
    assert (
        changes["paper"].keys() == {"manifold_step", "landing_convention", "landing_penalty"}
        if ("paper" in changes)
        else "polar" in changes
    )
    lora, dora = (dict(changes[name]["adapter"]) for name in ("lora", "dora"))
    assert dora == lora | {"use_dora": True}
    if "paper" in changes:
        polar = settings_of(recipe)["adapter"]
        assert changes["rslora"]["adapter"] == lora | {"use_rslora": True}
        assert (lora["r"], lora["lora_alpha"], lora["lora_dropout"], lora["target_modules"]) == (
            polar["r"], polar["alpha"], polar["dropout"], polar["target_modules"]
        )  # fmt: skip


def test_numbers_of_the_sources() -> None:
    """What the paper's scripts use, and that LoRA-AR's budgets are its published shares."""
    for recipe, base in BASES.items():
        values = settings_of(recipe)
        assert values.get("activation_checkpointing", False) is ("27b" in recipe or "llama3" in recipe)
        if "paper" in VARIANTS[recipe]:
            assert (values["max_length"], values["warmup_steps"], values["lr_scheduler_type"]) == (512, 0.03, "cosine")
            assert values["num_train_epochs"] == (2 if "27b" in recipe else 5)
        else:
            share = {"math10k_llama_7b": 0.821, "commonsense170k_llama3_8b": 0.48}[recipe]
            published = settings_of(recipe, "budget")["adapter"]["ranks"]
            budget = published.pop("budget")
            assert published == values["adapter"]["ranks"]
            assert 100 * budget / base.num_parameters == pytest.approx(share, abs=0.002)
    assert 100 * BASES["math10k_llama_7b"].num_trainable(32, theta=False) / 6738415616 == pytest.approx(0.83, abs=0.01)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_rows(tmp_path_factory.mktemp("rows"))


@pytest.mark.parametrize("recipe", BASES)
def test_dry_run_of_every_variant_in_the_real_size(
    recipe: str, rows: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """The command itself, on config.json without weights; parameters are counted independently from the sizes."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("POLAR_CACHE", str(tmp_path / "cache"))
    base = BASES[recipe]
    folder = write_real_size(tmp_path / "base", recipe)
    data = TRAINED[recipe][0]
    common = ["--config", f"configs/{recipe}.yaml", "--model_name_or_path", str(folder), "--use_cpu", "--dry_run"]
    common += ["--train_dataset", str(rows[data]), "--val_split", "2", "--output_dir", str(tmp_path / "run")]
    common += ["--task", data] if data in TASKS else []
    for variant in ["", *VARIANTS[recipe]]:
        if variant == "tiny":
            continue  # trained below
        quantised = ["--load_in_4bit", "true"] if variant == "lora" else []
        assert main([*common, *(["--variant", variant] if variant else []), *quantised]) == 0
        text = capsys.readouterr().out
        assert ("NF4 4-bit" in text) is bool(quantised)
        values = settings_of(recipe, *([variant] if variant else []))
        adapter = values["adapter"]
        assert f"{base.num_parameters / 1e9:.2f} B parameters" in text
        assert f"recipe   configs/{recipe}.yaml" + (f" + {variant}" if variant else "") in text
        if "r" in adapter and not adapter.get("use_dora"):
            number = base.num_trainable(adapter["r"], theta=adapter["peft_type"] == "POLAR")
            assert f"{number:,} trainable parameters" in text
        if "ranks" in adapter:
            assert "ranks computed from the weights before training" in text and "on all 224 layers" in text
        assert "vision" not in text and not (tmp_path / "run").exists()


@pytest.mark.parametrize("task", TASKS)
def test_every_task_reads_its_own_source(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from polar.run_config import parse_run

    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for recipe in ("commonsense_llama2_7b", "commonsense_gemma3_12b", "commonsense_gemma2_2b"):
        path = str(CONFIGS / f"{recipe}.yaml")
        config = parse_run(["--config", path, "--task", task, "--adapter.r", "4", "--use_cpu", "--output_dir", "x"])
        config.validate(1)
        assert (config.data.train_dataset, config.adapter.adapter["r"]) == (TASKS[task].source, 4)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, rows: dict[str, Path]) -> Path:
    """The tiny twin of every recipe, each trained for two steps; the last one continued from its first checkpoint."""
    folder = tmp_path_factory.mktemp("recipes")
    runs: list[dict[str, Any]] = []
    for recipe, (data, ranks, more) in TRAINED.items():
        arguments = ["--config", f"configs/{recipe}.yaml", "--train_dataset", str(rows[data])]
        arguments += ["--model_name_or_path", str(write_tiny(folder / f"{recipe}-base", recipe))]
        arguments += [*more, "--variant", "tiny", *(["--task", data] if data in TASKS else [])]
        runs.append({"name": recipe, "ranks": ranks, "arguments": arguments})
    again = {"name": "continued", "continue_from": "math10k_llama_7b", "ranks": 2, "cache": "no cache"}
    runs.append(again | {"arguments": [*runs[-1]["arguments"], "--resume"]})
    (folder / "runs.json").write_text(json.dumps(runs))
    worker = [sys.executable, "-m", "tests.integration.recipes_worker", str(folder)]
    done = subprocess.run(worker, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return folder


@pytest.mark.parametrize("recipe", BASES)
def test_the_tiny_twin_trains(recipe: str, trained: Path) -> None:
    run = trained / recipe
    assert json.loads((run / "done.json").read_text())["step"] == 2
    written = yaml.safe_load((run / "config.yaml").read_text())
    named = [
        more for flag, more in zip(TRAINED[recipe][2], TRAINED[recipe][2][1:], strict=False) if flag == "--variant"
    ]
    expected = settings_of(recipe, *named, "tiny")
    assert written["adapter"] == expected["adapter"] and "variants" not in written
    assert written["learning_rate"] == expected["learning_rate"]
    assert len(metrics(run, "loss")) == 2 and len(metrics(run, "eval_loss")) >= 1
    tensors = load_file(run / "adapter" / "adapter_model.safetensors")
    assert tensors and not [key for key in tensors if "vision" in key or "projector" in key]
    if expected["adapter"]["peft_type"] == "POLAR":
        assert max(metrics(run, "orthonormality_error")) < (1e-5 if "paper" not in named else 1)
    else:
        assert all(".lora_" in key for key in tensors)


@pytest.mark.parametrize("recipe", ["commonsense170k_llama3_8b", "math10k_llama_7b"])
def test_computed_ranks_are_those_of_the_adapter(recipe: str, trained: Path) -> None:
    """On one process, and under ZeRO-3 on two ranks: ranks.json says what the adapter's tensors are."""
    run = trained / recipe
    ranks = json.loads((run / "ranks.json").read_text())
    tensors = load_file(run / "adapter" / "adapter_model.safetensors")
    found = {}
    for key, value in tensors.items():
        name = key.removeprefix("base_model.model.")
        if name.endswith(".lora_A.weight"):
            found[name.removesuffix(".lora_A.weight")] = value.shape[0]
        elif name.endswith(".polar_X"):
            found[name.removesuffix(".polar_X")] = value.shape[1]
    assert found == selected_ranks(ranks) and len(set(found.values())) > 1
    assert sum(value.numel() for value in tensors.values()) == ranks["num_parameters"]
    provenance = json.loads((run / "provenance.json").read_text())["ranks"]
    assert provenance["settings"] == ranks["settings"] and provenance["origin"].startswith("computed (")
    assert ranks["settings"]["method"] == ("polar" if recipe == "math10k_llama_7b" else "lora")


def test_a_continued_run_keeps_its_ranks(trained: Path) -> None:
    """With an empty cache: nothing is computed again, and the end is that of the run that was not stopped."""
    run, whole = trained / "continued", trained / "math10k_llama_7b"
    assert (run / "ranks.json").read_text() == (whole / "ranks.json").read_text()
    assert not (trained / "no cache").exists()
    assert "ranks this run's own" in (trained / "continued.log0").read_text()
    assert metrics(run, "loss") == metrics(whole, "loss")
