"""The transformers backend against lm-eval's own one, one request at a time."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from polar.errors import UserError
from polar_eval.backend import Generation, Scorer
from polar_eval.hf_backend import HFBackend, StopTexts
from polar_eval.quiet import quiet
from polar_eval.world import World
from tests.shared_data import read_jsonl, shared_data

LIMIT = 20


@pytest.fixture(scope="module")
def backend(tiny_gemma3: Path) -> HFBackend:
    return HFBackend(tiny_gemma3, None)


@pytest.fixture(scope="module")
def stock(tiny_gemma3: Path) -> HFLM:
    with quiet():
        return HFLM(pretrained=str(tiny_gemma3), device="cpu", dtype="float32", batch_size=1)


@pytest.fixture(scope="module")
def questions() -> list[str]:
    return [row["question"] for row in read_jsonl(shared_data("gsm8k") / "test.jsonl")[:40]]


def requests(kind: str, arguments: list[Any]) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=args, idx=0) for args in arguments]


def test_loglikelihoods_are_those_of_lm_eval(backend: HFBackend, stock: HFLM, questions: list[str]) -> None:
    """Shared prompts, one-token and long continuations, white space at the border, an empty context."""
    pairs = [(question, f" {choice}") for question in questions[:8] for choice in ("yes", "no", "a longer one")]
    pairs += [(f"{questions[0]} ", "12 eggs"), ("", "What is 5?"), ("a\n", " b"), (questions[1], " yes"), ("a", " b")]
    asked = requests("loglikelihood", pairs)
    ours = Scorer(backend, World()).loglikelihood(asked)
    with quiet():
        theirs = stock.loglikelihood(asked, disable_tqdm=True)
    assert [value for value, _ in ours] == pytest.approx([value for value, _ in theirs], abs=2e-4)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]


def test_whole_texts_score_as_in_lm_eval(backend: HFBackend, stock: HFLM, questions: list[str]) -> None:
    """One text that fits and one of several windows."""
    asked = requests("loglikelihood_rolling", [(questions[0],), (" ".join(questions),)])
    assert len(backend.tokenizer(" ".join(questions))["input_ids"]) > 2 * backend.max_length
    with quiet():
        theirs = stock.loglikelihood_rolling(asked, disable_tqdm=True)
    assert Scorer(backend, World()).loglikelihood_rolling(asked) == pytest.approx(theirs, rel=1e-5)


def test_generations_are_those_of_lm_eval_with_and_without_stop_texts(
    backend: HFBackend, stock: HFLM, questions: list[str]
) -> None:
    free = {"do_sample": False, "max_gen_toks": LIMIT, "until": []}
    scorer = Scorer(backend, World())
    texts = scorer.generate_until(requests("generate_until", [(question, free) for question in questions[:10]]))
    assert all(scorer.truncated.values())
    # A stop text from the middle of an answer, over the border of two tokens where there is one.
    stops = [text[5:8] for text in texts[:3] if len(text) > 12]
    for until in ([], stops):
        asked = requests("generate_until", [(question, {**free, "until": until}) for question in questions[:10]])
        ours = scorer.generate_until(asked)
        with quiet():
            assert ours == stock.generate_until(asked, disable_tqdm=True)
        # An answer that a stop text ends is not counted as truncated.
        assert [scorer.truncated[question] for question in questions[:10]] == [
            not any(stop in text for stop in until) for text in texts
        ]


def test_an_answer_does_not_depend_on_its_batch(tiny_gemma3: Path, questions: list[str]) -> None:
    found = []
    for batch_size in (1, 7, None):
        scorer = Scorer(HFBackend(tiny_gemma3, None, batch_size=batch_size), World())
        asked = [(question, {"max_gen_toks": 8, "until": ["\n"]}) for question in questions]
        found.append(scorer.generate_until(requests("generate_until", asked)))
    assert found[0] == found[1] == found[2]
    assert scorer.backend.describe()["batch_size"] >= 16


def test_eos_ends_an_answer_and_is_no_truncation(tiny_gemma3: Path, questions: list[str]) -> None:
    """The token that the model writes first is made its EOS."""
    backend = HFBackend(tiny_gemma3, None)
    ids = [backend.tokenizer(question)["input_ids"] for question in questions[:3]]
    first = [int(backend.model(torch.tensor([row])).logits[0, -1].argmax()) for row in ids]
    backend.model.generation_config.eos_token_id = sorted({*backend._eos, first[0]})
    backend._eos = backend.model.generation_config.eos_token_id
    answers = next(backend.generate(sorted(ids, key=len, reverse=True), Generation(5)))
    by_prompt = dict(zip(map(tuple, sorted(ids, key=len, reverse=True)), answers, strict=True))
    assert by_prompt[tuple(ids[0])].text == "" and not by_prompt[tuple(ids[0])].truncated


def test_stop_text_over_many_tokens_and_within_one(backend: HFBackend) -> None:
    tokenizer = backend.tokenizer
    for text, stop in (("12 + 7 = 19 ####", "= 19"), ("What is 5?", "is"), ("a\u00e9\u20acb", "\u20ac")):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        stops = StopTexts(tokenizer, (stop,))
        stops.begin(1, 1)
        ended = [place for place in range(1, len(ids) + 1) if stops(torch.tensor([[2, *ids[:place]]]), None)[0]]  # type: ignore[arg-type]
        first = next(place for place in itertools.count(1) if stop in tokenizer.decode(ids[:place]))
        assert ended[0] == first == stops.ends[0] and ended == list(range(first, len(ids) + 1))


def test_the_bases_own_sampling_settings_are_left_behind(
    tmp_path: Path, tiny_gemma3: Path, questions: list[str]
) -> None:
    """Many published bases come with do_sample, a temperature and a repetition penalty in generation_config.json."""
    import json
    import shutil

    shutil.copytree(tiny_gemma3, tmp_path / "base")
    settings = {"do_sample": True, "temperature": 3.0, "repetition_penalty": 5.0, "eos_token_id": [1], "max_length": 20}
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps(settings))
    found = []
    for folder in (tiny_gemma3, tmp_path / "base"):
        backend = HFBackend(folder, None)
        ids = [backend.tokenizer(question)["input_ids"] for question in questions[:3]]
        found.append(next(backend.generate(sorted(ids, key=len, reverse=True), Generation(12))))
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        (
            "generate_until",
            "a",
            r"max_new_tokens 2000: the longest prompt has \d+ tokens and the model takes 1024; pass",
        ),
        ("generate_until", "x y " * 900, "the longest prompt has .* leave such rows out"),
        ("loglikelihood", "x y " * 900, "the longest prompt has .* leave such rows out"),
    ],
)
def test_prompts_are_never_cut(backend: HFBackend, kind: str, text: str, message: str) -> None:
    second: Any = {"max_gen_toks": 2000, "until": []} if kind == "generate_until" else " b"
    with pytest.raises(UserError, match=message):
        getattr(Scorer(backend, World()), kind)(requests(kind, [(text, second)]))


def test_models_without_logits_to_keep_score_the_same(backend: HFBackend, questions: list[str]) -> None:
    pairs = [(question, " yes") for question in questions[:5]]
    full = HFBackend.__new__(HFBackend)
    full.__dict__.update(backend.__dict__, _keeps_logits=False)
    asked = requests("loglikelihood", pairs)
    ours, theirs = Scorer(backend, World()).loglikelihood(asked), Scorer(full, World()).loglikelihood(asked)
    assert [value for value, _ in ours] == pytest.approx([value for value, _ in theirs], abs=1e-5)
