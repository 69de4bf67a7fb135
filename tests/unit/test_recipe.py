"""Recipes: variants of a file, tasks, and the settings that result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from polar.commonsense import TASKS, read_row
from polar.data import prepare
from polar.errors import UserError
from polar.pair_tokens import PairTokenizer
from polar.run_config import DataArguments, RunConfig, parse_run
from tests.small_tokenizers import small_tokenizers
from tests.unit.test_commonsense import HUB_ROWS
from tests.unit.test_run_config import BASE, folder  # noqa: F401  a fixture

RECIPE = """
learning_rate: 4e-3
max_length: 512
adapter: {peft_type: POLAR, r: 16, alpha: 32, target_modules: [q_proj]}
variants:
  lora:
    learning_rate: 4e-4
    adapter: {peft_type: LORA, r: 16, lora_alpha: 32}
  wide:
    adapter: {r: 64}
  tiny:
    max_length: 64
    max_steps: 2
"""


def recipe(text: str, *argv: str) -> RunConfig:
    Path("recipe.yaml").write_text(text)
    config = parse_run([*BASE, "--config", "recipe.yaml", *argv])
    config.validate(world_size=1)
    return config


def test_variants_change_the_recipe_in_their_order(folder: Path) -> None:  # noqa: F811
    plain = recipe(RECIPE)
    assert plain.adapter.adapter == {"peft_type": "POLAR", "r": 16, "alpha": 32, "target_modules": ["q_proj"]}
    assert (plain.training.learning_rate, plain.training.max_steps, plain.recipe) == (4e-3, -1, "recipe.yaml")
    lora = recipe(RECIPE, "--variant", "lora")
    assert lora.adapter.adapter == {"peft_type": "LORA", "r": 16, "lora_alpha": 32}, "replaced as a whole"
    assert (lora.training.learning_rate, lora.training.max_length) == (4e-4, 512)
    wide = recipe(RECIPE, "--variant=wide")
    assert wide.adapter.adapter == plain.adapter.adapter | {"r": 64}
    both = recipe(RECIPE, "--variant", "lora", "--variant", "wide", "--variant", "tiny")
    assert both.adapter.adapter == {"peft_type": "LORA", "r": 64, "lora_alpha": 32}
    assert (both.training.max_length, both.recipe) == (64, "recipe.yaml + lora + wide + tiny")
    assert recipe(RECIPE, "--variant", "wide", "--variant", "lora").adapter.adapter["r"] == 16


def test_the_command_line_comes_after_the_variants(folder: Path) -> None:  # noqa: F811
    config = recipe(RECIPE, "--adapter.r", "4", "--learning_rate", "1e-3", "--variant", "lora")
    assert config.adapter.adapter["r"] == 4 and config.training.learning_rate == 1e-3


def test_the_written_settings_are_the_resolved_ones(folder: Path) -> None:  # noqa: F811
    config = recipe(RECIPE, "--variant", "lora", "--variant", "tiny")
    text = config.to_yaml()
    assert "variants" not in yaml.safe_load(text)
    Path("again.yaml").write_text(text)
    assert parse_run(["--config", "again.yaml"]) == config


@pytest.mark.parametrize(
    ("text", "argv", "expected"),
    [
        (RECIPE, ["--variant", "loar"], "recipe.yaml has no variant 'loar': did you mean lora? It has lora, w"),
        ("seed: 1\n", ["--variant", "lora"], "recipe.yaml has no variant 'lora': it has none: leave --variant out"),
        (RECIPE, ["--variant"], "--variant needs the name of a variant"),
        ("variants: [lora]\n", [], "recipe.yaml: variants must map names to settings, found list"),
        ("variants: {lora: }\n", [], "recipe.yaml: variants.lora must hold `key: value` lines, found None"),
        ("variants: {lora: {learning_rat: 1}}\n", [], "variants.lora: unknown key 'learning_rat': did you mean "),
        ("variants: {lora: {seed: x}}\n", [], "recipe.yaml: variants.lora: seed: 'x' is not an integer"),
        ("variants: {a: {variants: {b: {seed: 1}}}}\n", [], "variants.a.variants: variants hold no variants"),
        ("variants: {1: {seed: 1}}\n", [], "variants: 1 is not text"),
        ("variants: {a: {seed: 1}, a: {seed: 2}}\n", [], "recipe.yaml line 1: not valid YAML: the key 'a' occurs"),
        ("variants: {a: {adapter: {rr: 1}}}\n", ["--variant", "a"], "adapter.rr: unknown field of PolarConfig"),
    ],
)  # fmt: skip
def test_mistakes_in_variants(folder: Path, text: str, argv: list[str], expected: str) -> None:  # noqa: F811
    """A mistake in a variant that nobody asked for is an error too."""
    with pytest.raises(UserError) as error:
        recipe(text, *argv)
    assert expected in str(error.value) and "\n" not in str(error.value)


def test_variants_need_a_file(folder: Path) -> None:  # noqa: F811
    with pytest.raises(UserError, match="--variant lora: variants are in a recipe file: add --config FILE"):
        parse_run([*BASE, "--variant", "lora"])


# --- tasks ----------------------------------------------------------------------------------------------------------


def test_a_task_brings_its_data_and_its_prompt(folder: Path) -> None:  # noqa: F811
    own = parse_run(["--task", "boolq", "--model_name_or_path", "model", "--output_dir", "out", "--use_cpu"])
    own.validate(1)
    assert (own.data.train_dataset, own.data.train_split, own.data.template) == ("aps/super_glue:boolq", "train", None)
    given = parse_run([*BASE, "--task", "boolq"])
    assert given.data.train_dataset == "rows.jsonl"
    Path("again.yaml").write_text(given.to_yaml())
    assert parse_run(["--config", "again.yaml"]) == given


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--task", "boolk"], "task 'boolk' is unknown: did you mean boolq?"),
        (["--task", "piqa", "--template", "alpaca"], "template is alpaca: task piqa has its own reading: leave it out"),
        (["--task", "piqa", "--prompt_column", "goal"], "prompt_column is goal: task piqa has its own"),
        (["--task", "piqa", "--dataset_format", "instruction"], "dataset_format is instruction: task piqa has its own"),
        (["--config", "none.yaml"], "template is null: it goes with a task"),
    ],
)
def test_mistakes_with_tasks(folder: Path, argv: list[str], expected: str) -> None:  # noqa: F811
    Path("none.yaml").write_text("template: null\n")
    with pytest.raises(UserError) as error:
        parse_run([*BASE, *argv]).validate(1)
    assert expected in str(error.value)


@pytest.mark.parametrize("kind", ["gemma", "llama2", "llama3"])
@pytest.mark.parametrize("task", TASKS)
def test_training_and_scoring_prompts_are_equal_to_the_token(task: str, kind: str, tmp_path: Path) -> None:
    """Independent computation: lm-eval's own `_encode_pair`, for the right choice."""
    from lm_eval.api.model import TemplateLM

    tokenizer = small_tokenizers()[kind]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in HUB_ROWS[task]))
    data = prepare(DataArguments(task=task, template=None, train_dataset=str(file)), tokenizer, None, seed=0)
    assert len(data.train) == len(HUB_ROWS[task]) and data.report["train"]["format"] == f"task {task}"
    spans = 0
    for row, trained in zip(HUB_ROWS[task], data.train, strict=True):
        choice = read_row(task, row)
        context, continuation = choice.contexts[choice.gold], choice.continuations[choice.gold]
        prompt, response = TemplateLM._encode_pair(_Encoder(tokenizer), context, continuation)
        ids, mask = trained["input_ids"], trained["completion_mask"]
        start = mask.index(1)
        assert ids[:start] == prompt and mask == [0] * start + [1] * (len(ids) - start)
        if PairTokenizer(tokenizer).encode([choice.training_texts()[0]], [choice.training_texts()[1]])[0].spans_border:
            spans += 1  # lm-eval cuts the joint tokens wherever the prompt's number of tokens falls
        else:
            assert ids[start:] == [*response, tokenizer.eos_token_id]
    assert data.report["train"]["token_spans_prompt_and_response"] == spans < len(data.train)


class _Encoder:
    """What `_encode_pair` asks of a model: lm-eval's transformers backend, with a tokenizer and no weights."""

    backend = "causal"

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def tok_encode(self, text: str, **_: Any) -> list[int]:
        return self.tokenizer(text)["input_ids"]


def test_rows_that_are_not_of_the_task_are_counted(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    rows = [HUB_ROWS["piqa"][0], HUB_ROWS["boolq"][0], HUB_ROWS["piqa"][0] | {"label": -1}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataArguments(task="piqa", template=None, train_dataset=str(file))
    done = prepare(data, small_tokenizers()["llama3"], None, seed=0)
    assert len(done.train) == 1
    assert "2 not a row of the task, or without a label (lines 2, 3)" in done.summary()


TASKS_RECIPE = """
num_train_epochs: 3
seed: 1
tasks:
  boolq: {num_train_epochs: 5, learning_rate: 1e-3}
  piqa: {learning_rate: 2e-3}
variants:
  short: {num_train_epochs: 1}
"""


def test_settings_of_a_task_come_between_the_recipe_and_its_variants(folder: Path) -> None:  # noqa: F811
    boolq = recipe(TASKS_RECIPE, "--task", "boolq").training
    assert (boolq.num_train_epochs, boolq.learning_rate, boolq.seed) == (5, 1e-3, 1)
    assert recipe(TASKS_RECIPE, "--task", "piqa").training.num_train_epochs == 3
    short = recipe(TASKS_RECIPE, "--task", "boolq", "--variant", "short").training
    assert (short.num_train_epochs, short.learning_rate) == (1, 1e-3)
    assert recipe(TASKS_RECIPE, "--task", "boolq", "--num_train_epochs", "9").training.num_train_epochs == 9
    assert recipe("task: piqa\n" + TASKS_RECIPE).training.learning_rate == 2e-3


@pytest.mark.parametrize(
    ("text", "argv", "expected"),
    [
        (TASKS_RECIPE, [], "recipe.yaml has several tasks: choose one with --task: boolq, piqa"),
        (TASKS_RECIPE, ["--task", "pika"], "recipe.yaml has no task 'pika': did you mean piqa? It has boolq, piqa"),
        ("tasks: [piqa]\n", [], "recipe.yaml: tasks must map names to settings, found list"),
        ("tasks: {piqa: {seeed: 1}}\n", [], "tasks.piqa: unknown key 'seeed'"),
        ("tasks: {piqa: {variants: {}}}\n", [], "tasks.piqa.variants: tasks hold no variants"),
    ],
)
def test_tasks_that_cannot_be(folder: Path, text: str, argv: list[str], expected: str) -> None:  # noqa: F811
    with pytest.raises(UserError) as caught:
        recipe(text, *argv)
    assert expected in str(caught.value)
