"""Prompt and response as tokens: the ids of lm-eval, one BOS, one EOS, loss on the response only."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import datasets
import pytest

from polar.data import load_template
from polar.errors import UserError
from polar.pair_tokens import PairTokenizer
from polar.templates import template_names
from tests.small_tokenizers import KINDS, ROWS, prepared, sentence, small_tokenizers


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Any]:
    return small_tokenizers()


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    return folder


@pytest.fixture(scope="module")
def lm_eval_models(tokenizers: dict[str, Any]) -> dict[str, Any]:
    """lm-eval's own transformers backend around each tokenizer, with the smallest model it accepts."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lm-eval's imports, not ours
        from lm_eval.models.huggingface import HFLM
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    model = LlamaForCausalLM(config)
    return {kind: HFLM(pretrained=model, tokenizer=tokenizer, device="cpu") for kind, tokenizer in tokenizers.items()}


@pytest.mark.parametrize("template", template_names())
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "adds_eos"])
def test_ids_are_those_of_lm_eval(
    kind: str, template: str, tokenizers: dict[str, Any], lm_eval_models: dict[str, Any], tmp_path: Path
) -> None:
    """Against HFLM: the prompt as it is sent for generation, prompt + response as it is scored by log-likelihood."""
    rows = [
        {"instruction": f"{row['question']}{end}", "output": row["answer"]} for row in ROWS[:6] for end in ("", " ")
    ]
    rows += [{"instruction": sentence(99), "input": sentence(98), "output": "yes"}]
    data = prepared(tmp_path, rows, tokenizers[kind], template=template)
    scorer, prompts = lm_eval_models[kind], load_template(template)
    assert len(data.train) == len(rows)
    for row, trained in zip(rows, data.train, strict=True):
        scoring_prompt = prompts.prompt(row)
        prompt_ids = [i for i, m in zip(trained["input_ids"], trained["completion_mask"], strict=True) if not m]
        assert prompt_ids == scorer.tok_encode(scoring_prompt)
        generation_ids, _ = scorer.tok_batch_encode([scoring_prompt])
        assert prompt_ids == generation_ids[0].tolist()
        context, continuation = scorer._encode_pair(scoring_prompt, prompts.full_response(row, row["output"]))
        assert trained["input_ids"] == context + continuation + [tokenizers[kind].eos_token_id]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text_brings", ["nothing", "bos", "eos", "both"])
def test_one_bos_one_eos(kind: str, text_brings: str, tokenizers: dict[str, Any], tmp_path: Path) -> None:
    tokenizer = tokenizers[kind]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    start = tokenizer.bos_token if bos is not None and text_brings in ("bos", "both") else ""
    end = tokenizer.eos_token if text_brings in ("eos", "both") else ""
    row = {"prompt": start + ROWS[0]["question"], "completion": " " + ROWS[0]["answer"] + end}
    data = prepared(tmp_path, [row], tokenizer, template="plain")
    ids, mask = data.train[0]["input_ids"], data.train[0]["completion_mask"]
    expected_bos = 1 if kind not in ("gpt2", "qwen") or (kind == "gpt2" and start) else 0
    assert ids.count(eos) == 1 + (expected_bos if bos == eos else 0) and ids[-1] == eos and mask[-1] == 1
    assert bos is None or ids[:-1].count(bos) == expected_bos
    assert not expected_bos or (ids[0] == bos and mask[0] == 0)


@pytest.mark.parametrize("kind", KINDS)
def test_no_space_too_much_or_missing(kind: str, tokenizers: dict[str, Any], tmp_path: Path) -> None:
    """The text that is trained on, read back from its tokens, whatever white space the row brings."""
    row = ROWS[3]
    for answer in (row["answer"], f" {row['answer']}\n", f"\n{row['answer']} "):
        data = prepared(tmp_path, [row | {"answer": answer}], tokenizers[kind], template="question_answer")
        text = tokenizers[kind].decode(data.train[0]["input_ids"], skip_special_tokens=True)
        assert text == f"Question: {row['question']}\nAnswer: {row['answer']}"


@pytest.mark.parametrize("kind", ["llama2", "qwen", "gemma", "llama3"])
def test_a_token_across_the_border_leaves_the_prompt_as_it_is_scored(kind: str, tokenizers: dict[str, Any]) -> None:
    """`Response:` + line break is one token of the joint text for some tokenizers; none may eat the prompt's end."""
    pairs = PairTokenizer(tokenizers[kind])
    prompts, responses = ["Is it so? ### Response:", "many app", "a"], ["\n\nIt is so.", "les", " b"]
    seen_across = 0
    for prompt, response, pair in zip(prompts, responses, pairs.encode(prompts, responses), strict=True):
        alone, joint = pairs.encode_prompts([prompt, prompt + response])
        assert pair.prompt == alone
        assert tokenizers[kind].decode(pair.prompt + pair.response, skip_special_tokens=True) == prompt + response
        assert pair.spans_border == (joint[: len(alone)] != alone)
        seen_across += pair.spans_border
    assert seen_across, "the case does occur with these texts"


def test_loss_covers_the_response_only(tokenizers: dict[str, Any], tmp_path: Path) -> None:
    data = prepared(tmp_path, ROWS[:1], tokenizers["gemma"])
    before, _, covered = data.example(tokenizers["gemma"]).partition("[[")
    assert before == "<bos>" + load_template("alpaca").prompt(ROWS[0])
    assert covered == f" {ROWS[0]['answer']}<eos>]]"


def test_trl_keeps_ids_and_makes_the_labels(tokenizers: dict[str, Any], tmp_path: Path) -> None:
    """TRL's own preparation, on which the module's docstring relies: nothing added, nothing cut, labels by mask."""
    from trl import SFTConfig, SFTTrainer

    data = prepared(tmp_path, ROWS[:8], tokenizers["gemma"], max_length=400)
    trainer = object.__new__(SFTTrainer)
    trainer._tokenizer, trainer.completion_only_loss, trainer.chat_template = tokenizers["gemma"], True, None
    arguments = SFTConfig(output_dir=str(tmp_path), use_cpu=True, gradient_checkpointing=None, max_length=400)
    result = trainer._prepare_dataset(data.train, tokenizers["gemma"], arguments, False, None, "train")
    assert result["input_ids"] == data.train["input_ids"]
    for ids, mask, labels in zip(data.train["input_ids"], data.train["completion_mask"], result["labels"], strict=True):
        assert labels == [i if m else -100 for i, m in zip(ids, mask, strict=True)]


def test_tokenizer_without_eos_is_refused(tokenizers: dict[str, Any]) -> None:
    from transformers import PreTrainedTokenizerFast

    with pytest.raises(UserError, match="no EOS token"):
        PairTokenizer(PreTrainedTokenizerFast(tokenizer_object=tokenizers["qwen"].backend_tokenizer))


def test_unusual_special_tokens_are_reported(tokenizers: dict[str, Any], tmp_path: Path) -> None:
    assert "adds EOS" in prepared(tmp_path, ROWS[:1], tokenizers["adds_eos"]).report["notes"][0]
    assert prepared(tmp_path, ROWS[:1], tokenizers["gemma"]).report["notes"] == []
