"""The committed base model: small, loadable by plain transformers, with a tokenizer that loses nothing."""

from __future__ import annotations

import json
import random
from itertools import islice
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from demo.problems import NEW_KINDS, SEEN_KINDS, problems

BASE = Path(__file__).parents[2] / "demo" / "base"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(BASE)


def test_folder_is_small_and_holds_no_pickle() -> None:
    files = [path for path in BASE.rglob("*") if path.is_file()]
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in files}
    assert sum(path.stat().st_size for path in files) < 8_000_000
    assert not [path for path in files if path.suffix in (".bin", ".pt", ".pkl")]


def test_loads_as_gemma3(tokenizer) -> None:
    model, info = AutoModelForCausalLM.from_pretrained(BASE, output_loading_info=True)
    assert type(model).__name__ == "Gemma3ForCausalLM"
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.get_input_embeddings().num_embeddings == len(tokenizer)


def test_tokenizer_round_trips(tokenizer) -> None:
    rng = random.Random(0)
    texts = [f"{p.question}\n{p.answer}" for p in islice(problems(SEEN_KINDS | NEW_KINDS, seed=11), 100)]
    texts += ["Größe: 3½ €\t – “naïve” 日本語 🍎\r\n\n", "".join(chr(rng.randrange(1, 0xD800)) for _ in range(200)), ""]  # noqa: RUF001
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text


def test_digits_stand_alone_and_bos_comes_once(tokenizer) -> None:
    ids = tokenizer("12+345=357")["input_ids"]
    assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id
    assert tokenizer.convert_ids_to_tokens(ids[1:]) == list("12+345=357")
    special = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert len(set(special)) == 3 and None not in special


def test_report_says_what_the_base_can_do() -> None:
    """Measured when it was made; `tests/integration/test_demo.py` measures it again."""
    report = json.loads((BASE / "base_report.json").read_text())
    scores = report["accuracy_by_kind"]
    assert set(scores) == set(SEEN_KINDS) | set(NEW_KINDS)
    assert report["kinds_never_seen"] == list(NEW_KINDS)
    assert min(scores[kind] for kind in SEEN_KINDS) > 0.8 > 0.2 > max(scores[kind] for kind in NEW_KINDS)
