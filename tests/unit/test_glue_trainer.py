"""What a GLUE run trains and how: data to tokens, the head, optimizer groups, the loss, the progress line."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft.utils import ModulesToSaveWrapper
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from polar.build_model import build_model, load_tokenizer, plan_model
from polar.classifier import head_modules
from polar.errors import UserError
from polar.glue import TASKS
from polar.glue_data import prepare_glue
from polar.glue_trainer import PolarGlueTrainer, about_run
from polar.progress import StepReport
from polar.recipe import split_recipe
from polar.run_config import DataArguments, RunConfig, parse_run
from polar.strict_yaml import load_yaml
from tests.tiny_glue import TARGETS, make_deberta, write_task


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_deberta(tmp_path_factory.mktemp("models") / "deberta")


@pytest.fixture(scope="module")
def tokenizer(base: Path) -> PreTrainedTokenizerBase:
    """The published base has spm.model and no tokenizer.json, for which transformers needs sentencepiece."""
    assert not (base / "tokenizer.json").exists()
    return load_tokenizer(SimpleNamespace(model_name_or_path=str(base), revision=None, trust_remote_code=False))


def glue_config(base: Path, folder: Path, *argv: str) -> RunConfig:
    write_task(folder / "glue", "rte", train=12, dev=5)
    return parse_run(
        [
            *("--task", "rte", "--model_name_or_path", str(base), "--train_dataset", str(folder / "glue")),
            *("--output_dir", str(folder / "run"), "--use_cpu", "--dtype", "float32", "--attn_implementation", "eager"),
            *("--adapter.r", "4", "--adapter.target_modules", TARGETS, "--weight_decay", "0.1"),
            *argv,
        ]
    )


@pytest.fixture
def trainer(base: Path, tokenizer: Any, tmp_path: Path) -> Iterator[PolarGlueTrainer]:
    config = glue_config(base, tmp_path, "--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2")
    data = prepare_glue(config.data, TASKS["rte"], tokenizer, 64)
    made = PolarGlueTrainer(
        task=TASKS["rte"],
        parts=data.parts,
        about=about_run(config, data),
        model=build_model(config),
        args=config.training,
        train_dataset=data.train,
        eval_dataset=data.validation,
        processing_class=tokenizer,
    )
    yield made
    made.manifold_handle.remove()


def test_weight_decay_is_never_on_factors_and_the_head_is_trained(trainer: PolarGlueTrainer) -> None:
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    found: dict[str, set[float]] = {}
    for group in trainer.create_optimizer().param_groups:
        for parameter in group["params"]:
            kind = next(
                k for k in ("polar_X", "polar_Y", "polar_Theta", "bias", "head") if k in names[id(parameter)] + "head"
            )
            found.setdefault(kind, set()).add(group["weight_decay"])
            assert parameter.dtype == torch.float32
    assert found == {"polar_X": {0.0}, "polar_Y": {0.0}, "bias": {0.0}, "polar_Theta": {0.1}, "head": {0.1}}
    wrapped = [name for name, module in trainer.model.named_modules() if isinstance(module, ModulesToSaveWrapper)]
    assert wrapped == ["base_model.model.pooler", "base_model.model.classifier"]


def test_accumulation_averages_the_loss(trainer: PolarGlueTrainer) -> None:
    """The gradient of two micro batches is that of their mean loss, computed without a Trainer."""
    rows = [trainer.train_dataset[i] for i in range(8)]
    batches = [trainer.data_collator(rows[:4]), trainer.data_collator(rows[4:])]
    trainer.current_gradient_accumulation_steps = 2
    trainer.create_optimizer()
    count = trainer._get_num_items_in_batch(batches, torch.device("cpu"))
    for batch in batches:
        trainer.training_step(trainer.model, dict(batch), count)
    weight = trainer.model.base_model.model.classifier.modules_to_save["default"].weight
    found = weight.grad.clone()
    trainer.model.zero_grad()
    outputs = [trainer.model(**{k: v for k, v in batch.items() if k != "labels"}).logits for batch in batches]
    torch.nn.functional.cross_entropy(torch.cat(outputs), torch.cat([batch["labels"] for batch in batches])).backward()
    torch.testing.assert_close(found, weight.grad, rtol=1e-4, atol=1e-6)
    assert found.abs().max() > 1e-3


def test_scores_and_predictions_are_written_with_the_best_adapter(trainer: PolarGlueTrainer) -> None:
    run = Path(trainer.args.output_dir)
    metrics = trainer.evaluate()
    assert trainer._determine_best_metric(metrics, None)
    result = json.loads((run / "eval_glue_rte" / "results.json").read_text())
    rows = [json.loads(line) for line in (run / "eval_glue_rte" / "samples_glue_rte.jsonl").read_text().splitlines()]
    hits = [row["gold"] == row["predicted"] for row in rows]
    assert len(hits) == result["num_problems"] == 5
    assert result["columns"]["accuracy"]["value"] == metrics["eval_accuracy"] == sum(hits) / 5
    assert not trainer._determine_best_metric(metrics | {"eval_accuracy": -1.0}, None)
    assert json.loads((run / "eval_glue_rte" / "results.json").read_text()) == result


def test_rows_become_tokens_as_the_tokenizer_makes_them(tokenizer: Any, tmp_path: Path) -> None:
    """Pairs and token types; a row is cut as the tokenizer cuts it; every cut and every left-out row is reported."""
    write_task(tmp_path, "mrpc", train=30, dev=3)
    with (tmp_path / "mrpc" / "train.tsv").open("a") as file:
        file.write("0\t1\t2\tonly one text\n2\t1\t2\ta\tb\n\t1\t2\ta\tb\n")
    data = DataArguments(task="mrpc", train_dataset=str(tmp_path), on_too_long="truncate", template=None)
    made = prepare_glue(data, TASKS["mrpc"], tokenizer, 20)
    report = made.report["train"]
    assert {kind: entry["examples"] for kind, entry in report["dropped"].items()} == {
        **{"wrong_number_of_columns": [32], "unknown_label": [33], "no_label": [34]}
    }
    assert report["rows_read"] == 33 and report["rows"] == 30 and made.parts == {"": 3}
    lines = [line.split("\t") for line in (tmp_path / "mrpc" / "train.tsv").read_text("utf-8-sig").splitlines()[1:31]]
    whole = tokenizer([line[3] for line in lines], [line[4] for line in lines])
    cut = tokenizer([line[3] for line in lines], [line[4] for line in lines], truncation=True, max_length=20)
    assert made.train["input_ids"][:] == cut.input_ids and made.train["token_type_ids"][:] == cut.token_type_ids
    assert made.train["label"][:] == [int(line[0]) for line in lines]
    assert 0 < report["truncated"]["rows"] == sum(len(ids) > 20 for ids in whole.input_ids)
    summary = made.summary()
    assert f"label not_equivalent {report['labels']['not_equivalent']}, equivalent" in summary
    assert "left out: 1 without a label (line 34); 1 unknown label (line 33); 1 other number of columns" in summary
    data.on_too_long = "error"
    with pytest.raises(UserError, match=r"train.tsv line \d+: \d+ tokens, max_length is 20: raise it, or set"):
        prepare_glue(data, TASKS["mrpc"], tokenizer, 20)


def test_no_row_of_the_task_is_one_error(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": "a", "label": 1}\n')
    (tmp_path / "dev.jsonl").write_text('{"sentence": "a", "label": 1}\n')
    data = DataArguments(task="sst2", train_dataset=str(tmp_path), on_too_long="truncate", template=None)
    with pytest.raises(
        UserError, match=r"none of the 1 rows can be used: 1 lacks a text or the label \(line 1\); rows of sst2 h"
    ):
        prepare_glue(data, TASKS["sst2"], tokenizer, 20)


def test_fingerprint_follows_rows_and_labels(tokenizer: Any, tmp_path: Path) -> None:
    write_task(tmp_path, "stsb", train=5, dev=3)
    data = DataArguments(task="stsb", train_dataset=str(tmp_path), on_too_long="truncate", template=None)

    def fingerprint() -> str:
        return prepare_glue(data, TASKS["stsb"], tokenizer, 64).report["fingerprint"]

    first, file = fingerprint(), tmp_path / "stsb" / "dev.tsv"
    assert fingerprint() == first
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[:-1], lines[-1].rpartition("\t")[0] + "\t4.999"]) + "\n")
    assert fingerprint() != first


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_head_is_drawn_from_the_seed_and_trained_in_fp32(base: Path, tmp_path: Path, dtype: str) -> None:
    def head(seed: str) -> dict[str, torch.Tensor]:
        torch.manual_seed(int(torch.initial_seed() % 1000) + 1)  # whatever was drawn before
        model = build_model(glue_config(base, tmp_path, "--seed", seed, "--dtype", dtype))
        assert head_modules(model.get_base_model()) == ["pooler", "classifier"]
        return {n: p.detach() for n, p in model.named_parameters() if "modules_to_save" in n}

    one, same, other = head("1"), head("1"), head("2")
    assert len(one) == 4 and all(value.dtype == torch.float32 for value in one.values())
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one if name.endswith("weight"))


def test_bases_that_do_not_fit(base: Path, tmp_path: Path) -> None:
    """A head of another task; a body that lacks weights, which transformers would draw at random."""
    from safetensors.torch import load_file, save_file

    other = tmp_path / "three labels"
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    model.save_pretrained(other)
    with pytest.raises(UserError, match=r"its classifier.bias has the shape \(3,\), the task needs \(2,\)"):
        build_model(glue_config(other, tmp_path))
    weights = load_file(other / "model.safetensors")
    lacking = {k: v.clone() for k, v in weights.items() if "layer.1.output" not in k and "classifier" not in k}
    save_file(lacking, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        UserError, match="weights of DebertaV2ForSequenceClassification are not in its files, such as deb"
    ):
        build_model(glue_config(other, tmp_path))


@pytest.mark.parametrize(
    ("chosen", "greater", "earlier", "text"),
    [
        ("eval_accuracy_matched", True, 0.5, "validation accuracy matched 0.7500, loss 0.4000, the best so far"),
        ("eval_accuracy_matched", True, 0.8, "validation accuracy matched 0.7500, loss 0.4000"),
        ("eval_loss", False, 0.5, "validation loss 0.4000, the best so far"),
        (None, None, 0.3, "validation loss 0.4000"),
    ],
)
def test_progress_shows_the_metric_that_chooses(
    capsys: pytest.CaptureFixture[str], chosen: str | None, greater: bool | None, earlier: float, text: str
) -> None:
    state = SimpleNamespace(is_world_process_zero=True, best_metric=earlier, global_step=3, max_steps=9)
    args = SimpleNamespace(metric_for_best_model=chosen, greater_is_better=greater)
    metrics = {"eval_loss": 0.4, "eval_accuracy_matched": 0.75, "eval_runtime": math.inf}
    StepReport(None, None).on_evaluate(args, state, None, metrics=metrics)
    assert capsys.readouterr().out.rstrip().endswith(f"s  {text}")


def test_recipe_in_the_real_size(base: Path, tmp_path: Path) -> None:
    """DeBERTa-v3-base has 184 M parameters; LoRA of r = 8 on these layers has 1.33 M (AdaLoRA, table 1)."""
    config = json.loads((base / "config.json").read_text())
    real = {"vocab_size": 128100, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
    real |= {"num_attention_heads": 12, "position_buckets": 256, "pooler_hidden_size": 768}
    (tmp_path / "config.json").write_text(json.dumps(config | real))
    recipe = ["--config", "configs/glue_deberta_v3_base.yaml", "--task", "mnli", "--model_name_or_path", str(tmp_path)]
    plans = {}
    for variant in ("lora", "paper"):
        run = parse_run([*recipe, "--variant", variant, "--output_dir", str(tmp_path / "run"), "--use_cpu"])
        plans[variant] = plan_model(run)
    head = 768 * 768 + 768 + 3 * 768 + 3
    assert plans["lora"].num_trainable - head == 1_327_104
    assert plans["paper"].num_trainable - head == 1_327_104 + 12 * 6 * 8 * 8
    assert plans["paper"].num_factors == 2 * 12 * 6
    assert 184.3e6 < plans["paper"].num_base < 184.5e6


def test_variants_differ_in_what_they_are_about() -> None:
    own, variants, tasks = split_recipe(
        load_yaml(Path("configs/glue_deberta_v3_base.yaml").read_text(), "glue"), "glue"
    )
    assert variants["lora"].keys() == {"adapter", "learning_rate"}
    assert variants["paper"].keys() == {"manifold_step", "landing_convention", "landing_penalty"}
    lora, polar = variants["lora"]["adapter"], own["adapter"]
    assert (lora["r"], lora["lora_alpha"], lora["target_modules"]) == (
        polar["r"],
        polar["alpha"],
        polar["target_modules"],
    )
    assert {name: settings["num_train_epochs"] for name, settings in tasks.items()} == {
        **{"cola": 25, "mnli": 7, "mrpc": 30, "qnli": 5, "qqp": 7, "rte": 50, "sst2": 25, "stsb": 25}
    }
