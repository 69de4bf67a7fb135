"""Real rows of GSM8K, MATH, MetaMathQA and LLM-Adapters, as published: every row becomes tokens or is accounted for.

The rows lie beside the clone, in `../shared/data` (or where POLAR_SHARED_DATA says); a fresh clone does not have them.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import datasets
import pytest

from polar.data import load_template, prepare
from polar.run_config import DataArguments
from tests.small_tokenizers import KINDS

DATA = Path(os.environ.get("POLAR_SHARED_DATA", Path(__file__).parents[3] / "shared" / "data"))
pytestmark = pytest.mark.skipif(
    not DATA.is_dir() and not os.environ.get("CI"), reason=f"{DATA} does not exist; set POLAR_SHARED_DATA"
)

COMMONSENSE = ["boolq", "piqa", "social_i_qa", "hellaswag", "winogrande", "ARC-Easy", "ARC-Challenge", "openbookqa"]
FILES = [
    ("gsm8k/train.jsonl", "question_answer", "question", "answer"),
    ("gsm8k/test.jsonl", "question_answer", "question", "answer"),
    ("math/train.jsonl", "problem_solution", "problem", "solution"),
    ("metamathqa/questions_answers_512.jsonl", "question_answer", "question", "answer"),
    *((f"commonsense/{task}/train.json", "instruction", "instruction", "output") for task in COMMONSENSE),
]


def rows_of(path: Path) -> list[dict[str, Any]]:
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    assert DATA.is_dir(), f"{DATA} must exist in CI"
    return KINDS["llama3"]([row["question"] + row["answer"] for row in rows_of(DATA / "gsm8k" / "test.jsonl")])


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)


@pytest.mark.parametrize(("file", "format_name", "prompt", "response"), FILES, ids=[file[0] for file in FILES])
def test_every_row_is_text_again_or_counted(
    file: str, format_name: str, prompt: str, response: str, tokenizer: Any
) -> None:
    """Read back from its tokens, each row is the template's prompt, one space, and the response of the file."""
    rows = rows_of(DATA / file)
    data = prepare(DataArguments(train_dataset=str(DATA / file)), tokenizer, None, 0)
    report = data.report["train"]
    assert report["format"] == format_name
    assert report["rows_read"] == len(rows) == len(data.train) + sum(e["rows"] for e in report["dropped"].values())
    assert len(data.train) == len(rows), data.summary()
    template = load_template("alpaca")
    step = max(1, len(rows) // 100)
    for row, tokens in zip(rows[::step], data.train.select(range(0, len(rows), step)), strict=True):
        expected = f"{template.prompt({'instruction': row[prompt]})} {row[response].strip()}"
        assert tokenizer.decode(tokens["input_ids"]) == f"<bos>{expected}<eos>"
        start = tokens["completion_mask"].index(1)
        assert tokenizer.decode(tokens["input_ids"][start:]) == f" {row[response].strip()}<eos>"


def test_gsm8k_with_a_cutoff_and_a_held_out_part(tokenizer: Any) -> None:
    rows = rows_of(DATA / "gsm8k" / "train.jsonl")
    settings = DataArguments(train_dataset=str(DATA / "gsm8k" / "train.jsonl"), val_split=0.05)
    data = prepare(settings, tokenizer, 512, 0)
    whole = prepare(DataArguments(train_dataset=str(DATA / "gsm8k" / "train.jsonl")), tokenizer, None, 0)
    lengths = [len(ids) for ids in whole.train["input_ids"]]
    too_long = [line for line, length in enumerate(lengths, start=1) if length > 512]
    assert len(data.train) + len(data.validation) + len(too_long) == len(rows) == 7473
    dropped = data.report["train"]["dropped"]
    assert set(dropped) <= {"too_long", "prompt_too_long"}
    assert sum(entry["rows"] for entry in dropped.values()) == len(too_long)
    assert dropped["too_long"]["examples"][0] in too_long
    assert len(data.validation) == round(0.05 * (len(rows) - len(too_long)))
    assert "<<" in tokenizer.decode(data.train[0]["input_ids"]), "calculator marks stay unless told otherwise"
