"""`polar eval` on real GSM8K problems: what reaches the model, what comes out, how it is graded, what is refused."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.model import LM
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from polar.data import prepare
from polar.errors import UserError
from polar.export import export_lora, export_merged
from polar.run_config import DataArguments
from polar_eval.backend import Scorer
from polar_eval.catalog import TASKS
from polar_eval.command import add_arguments, run
from polar_eval.harness import LoadedTask
from polar_eval.hf_backend import HFBackend
from polar_eval.score import score
from polar_eval.world import World
from tests.shared_data import read_jsonl, shared_data
from tests.tiny_models import linear_sizes, write_adapter

pytestmark = [
    # peft 0.21.2 reads an attribute that transformers 5.23 has renamed.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


@pytest.fixture(scope="module")
def problems(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first 24 real test problems."""
    lines = (shared_data("gsm8k") / "test.jsonl").read_text(encoding="utf-8").splitlines()[:24]
    file = tmp_path_factory.mktemp("data") / "problems.jsonl"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, tiny_gemma3: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A PoLAR adapter for `tiny_gemma3` in a run folder, and its dW by module name."""
    folder = tmp_path_factory.mktemp("run")
    sizes = linear_sizes(AutoModelForCausalLM.from_pretrained(tiny_gemma3))
    deltas = write_adapter(folder / "adapter", sizes, base_model_name_or_path=str(tiny_gemma3))
    (folder / "config.yaml").write_text("template: question_answer\n")
    return folder, deltas


def test_command_scores_real_problems(
    tmp_path: Path, problems: Path, adapter: tuple[Path, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    arguments = ["--data", str(problems), "--limit", "20", "--max_new_tokens", "24"]
    run(parser.parse_args([str(adapter[0]), *arguments, "--out", str(tmp_path / "polar")]))
    run(parser.parse_args([str(adapter[0]), "--base_only", *arguments, "--out", str(tmp_path / "base")]))
    assert "strict" in capsys.readouterr().out
    ours, base = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("polar", "base"))
    assert ours["num_problems"] == base["num_problems"] == 20
    assert ours["prompt_sha256"] == base["prompt_sha256"]
    assert ours["template"] == base["template"] == "question_answer"  # the run's own
    assert ours["canary"]["max_logit_change"] > 0 and base["canary"] is None
    assert ours["adapter"]["peft_type"] == "POLAR" and base["adapter"] is None
    assert set(ours["columns"]) == {"strict", "flexible"} and ours["task_version"] == 1.0
    samples, of_base = (read_jsonl(tmp_path / name / "samples_gsm8k.jsonl") for name in ("polar", "base"))
    rows = read_jsonl(problems)[:20]
    assert [sample["question"] for sample in samples] == [row["question"] for row in rows]
    assert [sample["gold"] for sample in samples] == [row["answer"].split("#### ")[1].replace(",", "") for row in rows]
    assert [sample["generation"] for sample in samples] != [sample["generation"] for sample in of_base]
    for name, summary in ours["columns"].items():
        assert summary["num_correct"] == sum(sample[f"{name}_correct"] for sample in samples)


def test_generations_are_those_of_the_changed_weights_one_prompt_at_a_time(
    tmp_path: Path, problems: Path, adapter: tuple[Path, dict[str, torch.Tensor]], tiny_gemma3: Path
) -> None:
    """Against transformers alone on W + dW: no batch, no padding, no LoRA, no lm-eval."""
    score(adapter[0], data=str(problems), limit=9, batch_size=4, max_new_tokens=24, out=tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tiny_gemma3).eval()
    for name, delta in adapter[1].items():
        weight = model.get_submodule(name).weight
        weight.data = (weight.data.double() + delta).float()
    tokenizer = AutoTokenizer.from_pretrained(tiny_gemma3)
    for sample in read_jsonl(tmp_path / "out" / "samples_gsm8k.jsonl"):
        ids = tokenizer(sample["prompt"], return_tensors="pt")["input_ids"]
        new = model.generate(ids, max_new_tokens=24, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
        assert sample["generation"] == tokenizer.decode(new, skip_special_tokens=True)


@pytest.mark.parametrize("template", ["alpaca", "question_answer", "plain"])
def test_scoring_prompt_is_the_training_prompt_token_by_token(problems: Path, tiny_gemma3: Path, template: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_gemma3)
    trained = prepare(DataArguments(train_dataset=str(problems), template=template), tokenizer, 4096, seed=0).train
    backend = HFBackend(tiny_gemma3, None, dtype="float32")
    requests = LoadedTask(TASKS["gsm8k"], template, str(problems)).prepare(None, None, seed=0)
    scorer = Scorer(backend, World())
    rows = scorer.tokens.encode_prompts([request.args[0] for request in requests])
    input_ids, attention_mask = backend._padded_left(rows)
    assert len(trained) == len(rows) == 24
    for row, ids, mask in zip(trained, input_ids, attention_mask, strict=True):
        start = row["completion_mask"].index(1)
        assert ids[mask == 1].tolist() == row["input_ids"][:start]
        assert (ids == tokenizer.bos_token_id).sum() == 1
        assert mask.tolist() == sorted(mask.tolist())  # padded on the left


class Scripted(LM):
    """An lm-eval model that answers with what a function makes of the reference solution."""

    def __init__(self, reply: Callable[[str], str]) -> None:
        super().__init__()
        self.reply = reply

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        return [self.reply(request.doc["solution"]) for request in requests]

    def loglikelihood(self, requests: Sequence[Any]) -> list[Any]:
        raise NotImplementedError

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[Any]:
        raise NotImplementedError


REPLIES = {
    "the reference": (lambda text: text, 1.0, 1.0),
    "MetaMathQA's ending": (lambda text: text.replace("####", "The answer is:"), 1.0, 1.0),
    "no mark": (lambda text: text.replace("####", "So"), 0.0, 1.0),
    "decimals and currency": (lambda text: "#### $" + text.split("#### ")[1] + ".00", 1.0, 1.0),
    "goes on counting": (lambda text: text + "\nI also like the number 123456789", 1.0, 0.0),
    "wrong": (lambda text: text + "1", 0.0, 0.0),
    "empty": (lambda text: "", 0.0, 0.0),
}


@pytest.mark.parametrize("name", REPLIES)
def test_task_grades_known_replies(name: str) -> None:
    """All 660 problems through lm-eval's own filters and metrics."""
    reply, strict, flexible = REPLIES[name]
    task = LoadedTask(TASKS["gsm8k"], "alpaca", str(shared_data("gsm8k") / "test.jsonl"))
    assert len(task.prepare(None, None, seed=0)) == 660
    found = task.evaluate(Scripted(reply), None, seed=0)  # type: ignore[arg-type]
    results = found["results"]["gsm8k_polar"]
    assert found["n-samples"]["gsm8k_polar"]["effective"] == 660
    assert results["exact_match,strict"] == pytest.approx(strict, abs=0.005)
    assert results["exact_match,flexible"] == pytest.approx(flexible, abs=0.005)


def test_an_adapter_that_does_not_reach_the_model_is_not_scored(
    tmp_path: Path, problems: Path, adapter: tuple[Path, Any], tiny_gemma3: Path
) -> None:
    export_lora(adapter[0], tmp_path / "lora", str(tiny_gemma3), canary=False)
    file = tmp_path / "lora" / "adapter_model.safetensors"
    save_file({key: value * ("lora_A" in key) for key, value in load_file(file).items()}, file)
    with pytest.raises(UserError, match="same logits"):
        score(tmp_path / "lora", str(tiny_gemma3), data=str(problems), max_new_tokens=8, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_exported_adapter_scores_like_its_source(
    tmp_path: Path, problems: Path, adapter: tuple[Path, Any], tiny_gemma3: Path
) -> None:
    export_lora(adapter[0], tmp_path / "lora", str(tiny_gemma3), canary=False)
    common = {"data": str(problems), "limit": 4, "max_new_tokens": 12, "template": "plain"}
    score(adapter[0], str(tiny_gemma3), out=tmp_path / "1", **common)
    score(tmp_path / "lora", str(tiny_gemma3), out=tmp_path / "2", **common)
    first, second = ((tmp_path / name / "samples_gsm8k.jsonl").read_text() for name in "12")
    assert first == second


def test_an_export_remembers_the_template_of_its_training(
    tmp_path: Path, problems: Path, adapter: tuple[Path, Any], tiny_gemma3: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    common: dict[str, Any] = {"data": str(problems), "limit": 1, "max_new_tokens": 4}
    export_lora(adapter[0], tmp_path / "lora", canary=False)
    export_merged(adapter[0], tmp_path / "merged")
    assert score(tmp_path / "lora", **common)["template"] == "question_answer"
    assert score(None, str(tmp_path / "merged"), **common)["template"] == "question_answer"
    assert "note" not in capfd.readouterr().err
    assert score(None, str(tiny_gemma3), **common)["template"] == "alpaca"
    assert "says which prompts it was trained on, so alpaca" in capfd.readouterr().err


def test_nothing_but_the_problems_is_shown(
    tmp_path: Path,
    problems: Path,
    adapter: tuple[Path, Any],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Neither bars for the files of the base, nor git's complaint about a folder that is no checkout."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    score(adapter[0], data=str(problems), limit=1, max_new_tokens=4)
    shown = capfd.readouterr().err
    assert "git" not in shown and "Loading weights" not in shown


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 1}, "another base: only the adapter has"),
        ({"num_hidden_layers": 3}, "another base: only the base has"),
        ({"hidden_size": 16}, "another base: .*lora_A.* has another size"),
    ],
)
def test_an_exported_adapter_on_another_base_is_refused(
    tmp_path: Path, problems: Path, adapter: tuple[Path, Any], tiny_gemma3: Path, changes: dict[str, int], message: str
) -> None:
    export_lora(adapter[0], tmp_path / "lora", canary=False)
    config = AutoConfig.from_pretrained(tiny_gemma3)
    for key, value in changes.items():
        setattr(config, key, value)
    config.layer_types = ["full_attention"] * config.num_hidden_layers
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(tiny_gemma3).save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match=message) as caught:
        score(tmp_path / "lora", str(tmp_path / "other"), data=str(problems), max_new_tokens=4)
    assert "\n" not in str(caught.value)


BAD = {
    "no such file": ({"data": "nowhere.jsonl"}, "nowhere.jsonl: no such file"),
    "hub data without network": ({"data": "openai/gsm8k:main"}, "openai/gsm8k"),
    "unknown task": ({"task": "mmlu"}, "task 'mmlu': unknown; there is gsm8k"),
    "unknown template": ({"template": "haiku"}, "template 'haiku': no such template"),
    "limit of zero": ({"limit": 0}, "limit 0: must be at least 1"),
    "no room to answer": ({"max_new_tokens": 1020}, r"the model takes 1024; pass --max_new_tokens \d+ or less"),
    "no base": ({"base": "polar-tests/nowhere"}, "not in the hub cache"),
    "no GPU": ({"device": "cuda"}, "there is no GPU here; pass --device cpu"),
    "unknown dtype": ({"dtype": "int3"}, "dtype 'int3'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_writes_nothing(
    tmp_path: Path, problems: Path, adapter: tuple[Path, Any], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "no GPU":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    changes, message = BAD[name]
    arguments: dict[str, Any] = {"data": str(problems), "max_new_tokens": 8, "out": tmp_path / "out"} | changes
    with pytest.raises(UserError, match=message) as caught:
        score(adapter[0], **arguments)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (['{"question": "a?", "answer": "no number"}'], "row 1: no number in the reference solution"),
        (['{"question": "a?", "answer": "#### 1"}', "{"], "line 2: not valid JSON"),
        (["[1]"], "is int, not an object|row 1"),
        (['{"text": "a"}'], "row 1: has the fields text; rename them to .*question and answer"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, tiny_gemma3: Path, rows: list[str], message: str) -> None:
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n")
    with pytest.raises(UserError, match=message):
        score(None, str(tiny_gemma3), data=str(tmp_path / "rows.jsonl"))


def test_results_are_kept_unless_told_otherwise(
    tmp_path: Path, problems: Path, adapter: tuple[Path, Any], tiny_gemma3: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "results.json").write_text("{}")
    with pytest.raises(UserError, match="--overwrite"):
        score(None, str(tiny_gemma3), data=str(problems), out=tmp_path / "out")
    for out in (adapter[0], tiny_gemma3):  # the adapter's config names the base
        with pytest.raises(UserError, match="replace its own source"):
            score(adapter[0], data=str(problems), out=out, overwrite=True)
    score(None, str(tiny_gemma3), data=str(problems), limit=1, max_new_tokens=4, out=tmp_path / "out", overwrite=True)
    assert json.loads((tmp_path / "out" / "results.json").read_text())["columns"]["strict"]["stderr"] is None
