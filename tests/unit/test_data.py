"""Rows of every kind: recognised, templated, split and cached; every row that does not fit is accounted for."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from polar.data import hold_out, load_template, prepare
from polar.errors import UserError
from polar.pair_tokens import PairTokenizer
from polar.rows import read_rows
from polar.run_config import DataArguments
from tests.small_tokenizers import ROWS, prepared, small_tokenizers, write_jsonl


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Any]:
    return small_tokenizers()


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    return folder


# --- formats and templates ------------------------------------------------------------------------------------------

QUESTION, ANSWER = "How many {apples}?", "Two \\boxed{2}."


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"prompt": QUESTION, "completion": ANSWER}, "prompt_completion"),
        ({"query": QUESTION, "response": ANSWER, "type": "x", "original_question": "y"}, "query_response"),
        ({"question": QUESTION, "answer": ANSWER}, "question_answer"),
        ({"problem": QUESTION, "solution": ANSWER, "level": "Level 4"}, "problem_solution"),
        ({"instruction": QUESTION, "input": "", "output": ANSWER, "answer": "x"}, "instruction"),
        ({"instruction": QUESTION, "output": ANSWER}, "instruction"),
    ],
)
@pytest.mark.parametrize("ending", [".jsonl", ".json", ".parquet"])
def test_every_format_from_every_kind_of_file(
    row: dict[str, str], name: str, ending: str, tokenizers: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / f"rows{ending}"
    if ending == ".parquet":
        datasets.Dataset.from_list([row, row]).to_parquet(path)
    else:
        path.write_text("\n".join(json.dumps(row) for _ in range(2)) if ending == ".jsonl" else json.dumps([row, row]))
    data = prepare(DataArguments(train_dataset=str(path)), tokenizers["llama3"], None, 0)
    assert data.report["train"]["format"] == name and len(data.train) == 2
    assert load_template("alpaca").prompt(row) in data.example(tokenizers["llama3"])
    assert data.example(tokenizers["llama3"]).endswith(f"### Response:[[ {ANSWER}<eos>]]")
    told = prepare(DataArguments(train_dataset=str(path), dataset_format=name), tokenizers["llama3"], None, 0)
    assert told.train["input_ids"] == data.train["input_ids"]


def test_alpaca_is_the_published_prompt() -> None:
    """The literal text of the Alpaca prompts, with and without input."""
    template = load_template("alpaca")
    assert template.prompt({"query": "Add."}) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Response:"
    )
    assert template.prompt({"instruction": "Add.", "input": "1 2"}) == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:"
    )
    assert template.prompt({"instruction": "Add.", "input": " "}) == template.prompt({"query": "Add."})


@pytest.mark.parametrize("end", ["", " ", "\n\n"])
def test_white_space_between_prompt_and_response_belongs_to_the_response(end: str) -> None:
    """No scoring prompt ends in white space, and the plain template still keeps the row's text word for word."""
    plain, row = load_template("plain"), {"prompt": f"Q: 1 + 1?\nA:{end}"}
    assert plain.prompt(row) == "Q: 1 + 1?\nA:"
    assert plain.prompt(row) + plain.full_response(row, " 2") == f"Q: 1 + 1?\nA:{end} 2"
    alpaca = load_template("alpaca")
    assert alpaca.full_response(row, "\n2 ") == " 2"


def test_braces_in_rows_and_templates_stay_text(tmp_path: Path) -> None:
    (tmp_path / "t.yaml").write_text("prompt: 'In \\boxed{}: {instruction} {input}'\n")
    filled = load_template(str(tmp_path / "t.yaml")).prompt({"instruction": "{input} {0}", "input": "{instruction}"})
    assert filled == "In \\boxed{}: {input} {0} {instruction}"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("prompt: 'Q {question}'", "unknown placeholder {question}"),
        ("prompt: 'Answer:'", "no {instruction}"),
        ("prompt: '{instruction}'\nseperator: x", "unknown key 'seperator'"),
        ("text: x", "needs a key `prompt`"),
        ("prompt: '{instruction}'\nseparator: 3", "separator is 3"),
    ],
)
def test_broken_templates_are_refused(text: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / "t.yaml").write_text(text)
    with pytest.raises(UserError) as error:
        load_template(str(tmp_path / "t.yaml"))
    assert expected in str(error.value) and "t.yaml" in str(error.value)


def test_columns_can_be_named(tokenizers: dict[str, Any], tmp_path: Path) -> None:
    row = {"q": "one", "a": "two", "context": "three"}
    named = prepared(
        tmp_path, [row], tokenizers["gpt2"], prompt_column="q", response_column="a", input_column="context"
    )
    expected = load_template("alpaca").prompt({"instruction": "one", "input": "three"})
    assert named.example(tokenizers["gpt2"]) == f"{expected}[[ two<eos>]]"
    with pytest.raises(UserError, match=r"prompt_column 'Q'.*the columns a, context, q"):
        prepared(tmp_path, [row], tokenizers["gpt2"], prompt_column="Q", response_column="a")


def test_unknown_and_ambiguous_columns_ask_for_a_decision(tokenizers: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no known format has the columns \(text\): set dataset_format"):
        prepared(tmp_path, [{"text": "x"}], tokenizers["gpt2"])
    both = {"question": "x", "answer": "y", "query": "x", "response": "y"}
    with pytest.raises(
        UserError, match="fit several formats: set dataset_format to one of query_response, question_an"
    ):
        prepared(tmp_path, [both], tokenizers["gpt2"])
    assert len(prepared(tmp_path, [both], tokenizers["gpt2"], dataset_format="query_response").train) == 1


def test_calculator_marks(tokenizers: dict[str, Any], tmp_path: Path) -> None:
    kept = prepared(tmp_path, ROWS[4:5], tokenizers["llama3"]).example(tokenizers["llama3"])
    removed = prepared(tmp_path, ROWS[4:5], tokenizers["llama3"], calculator_marks="remove").example(
        tokenizers["llama3"]
    )
    assert "4 x 2 = <<4*2=8>>8." in kept
    assert "4 x 2 = 8.\n#### 8<eos>" in removed


# --- rows that do not fit -------------------------------------------------------------------------------------------


def test_every_row_is_accounted_for(tokenizers: dict[str, Any], tmp_path: Path) -> None:
    good = ROWS[:3]
    long_answer, long_question = " ".join(["apples"] * 300), " ".join(["pears"] * 400)
    bad = [
        ({"question": "x"}, "missing_field"),
        ({"question": None, "answer": "y"}, "missing_field"),
        ({"question": "x", "answer": 5}, "not_text"),
        ({"question": ["x"], "answer": "y"}, "not_text"),
        ({"question": "x", "answer": " \n"}, "empty_response"),
        ({"question": "x", "answer": "<eos>"}, "empty_response"),
        ({"question": "\t", "answer": "y"}, "empty_prompt"),
        ("only text", "not_a_mapping"),
        ({"question": "x", "answer": "y <eos> z"}, "special_token_in_text"),
        ({"question": "x <bos>", "answer": "y"}, "special_token_in_text"),
        ({"question": "x", "answer": long_answer}, "too_long"),
        ({"question": long_question, "answer": "y"}, "prompt_too_long"),
    ]
    data = prepared(tmp_path, good + [row for row, _ in bad], tokenizers["gemma"], max_length=200)
    report = data.report["train"]
    assert len(data.train) == report["rows_kept"] == 3 and report["rows_read"] == 15
    for line, (_, kind) in enumerate(bad, start=4):
        assert line in report["dropped"][kind]["examples"]
    assert sum(entry["rows"] for entry in report["dropped"].values()) == 12
    for text in ("2 lacks the prompt or the response field (lines 4, 5)", "1 longer than max_length (line 14)"):
        assert text in data.summary()
    assert "80% of the rows" in data.summary()
    assert json.loads(json.dumps(data.report)) == data.report


def test_too_long_is_cut_or_refused_on_request(tokenizers: dict[str, Any], tmp_path: Path) -> None:
    tokenizer = tokenizers["gemma"]
    rows = [ROWS[0], {"question": "x", "answer": " ".join(["apples"] * 300)}]
    whole = prepared(tmp_path, rows, tokenizer)
    cut = prepared(tmp_path, rows, tokenizer, max_length=200, on_too_long="truncate")
    assert cut.train[0]["input_ids"] == whole.train[0]["input_ids"]
    assert cut.train[1]["input_ids"] == whole.train[1]["input_ids"][:200], "and so without EOS"
    assert cut.report["train"]["truncated"] == {"rows": 1, "examples": [2]} and "response cut: 1" in cut.summary()
    assert max(map(len, cut.train["input_ids"])) == 200
    with pytest.raises(UserError, match=r"rows\.jsonl line 2: \d+ tokens with EOS, max_length is 200"):
        prepared(tmp_path, rows, tokenizer, max_length=200, on_too_long="error")


@pytest.mark.parametrize("on_too_long", ["drop", "truncate"])
def test_the_cutoff_is_exact(on_too_long: str, tokenizers: dict[str, Any], tmp_path: Path) -> None:
    tokenizer = tokenizers["llama3"]
    length = len(prepared(tmp_path, ROWS[:1], tokenizer).train[0]["input_ids"])
    exact = prepared(tmp_path, ROWS[:1], tokenizer, max_length=length, on_too_long=on_too_long)
    assert exact.report["train"]["truncated"]["rows"] == 0 and len(exact.train[0]["input_ids"]) == length
    if on_too_long == "truncate":
        shorter = prepared(tmp_path, ROWS[:1], tokenizer, max_length=length - 1, on_too_long="truncate")
        assert shorter.report["train"]["truncated"]["rows"] == 1
        assert shorter.train[0]["input_ids"] == exact.train[0]["input_ids"][:-1]
    else:
        with pytest.raises(UserError, match="1 longer than max_length"):
            prepared(tmp_path, ROWS[:1], tokenizer, max_length=length - 1)
    prompt_length = exact.train[0]["completion_mask"].index(1)
    with pytest.raises(UserError, match="prompt alone reaches max_length"):
        prepared(tmp_path, ROWS[:1], tokenizer, max_length=prompt_length, on_too_long=on_too_long)


def test_all_rows_bad_is_an_error(tokenizers: dict[str, Any], tmp_path: Path, cache: Path) -> None:
    rows = [{"question": "x", "answer": ""}] * 7
    with pytest.raises(
        UserError, match=r"none of the 7 rows can be used: 7 empty response \(lines 1, 2, 3, 4, 5, \.\.\."
    ):
        prepared(tmp_path, rows, tokenizers["gpt2"])
    assert not list(cache.glob("polar/*/*")) and not list(cache.glob("polar/.*-*")), "nothing half-written"


# --- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", '{"a": 1}\n{"a": \n', "a.jsonl line 2: not valid JSON"),
        ("a.jsonl", '{"a": 1}\n\n{"a": 1} x\n', "a.jsonl line 3: not valid JSON"),
        ("a.json", '[{"a": 1},\n{"a" 2}]', "a.json line 2: not valid JSON"),
        ("a.json", "not json", "a.json: neither a JSON list of rows nor one JSON object per line"),
        ("a.jsonl", "", "a.jsonl: the file is empty"),
        ("a.jsonl", "\n\n", "the file holds no rows"),
        ("a.json", "[]", "the file holds no rows"),
        ("a.parquet", "text", "a.parquet: not a readable parquet file"),
        ("a.csv", "q,a\n", "unknown kind of file '.csv'"),
    ],
)
def test_broken_files_name_file_and_line(
    name: str, content: str, expected: str, tokenizers: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(UserError) as error:
        prepare(DataArguments(train_dataset=str(path)), tokenizers["gpt2"], None, 0)
    assert expected in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)


def test_files_of_other_systems_are_read(tmp_path: Path) -> None:
    """A byte order mark, Windows line ends, a JSON list in a .jsonl, lines in a .json."""
    rows = ROWS[:2]
    lines = "\r\n".join(json.dumps(row) for row in rows)
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.encode())
    (tmp_path / "b.jsonl").write_text(json.dumps(rows, indent=1))
    (tmp_path / "c.json").write_text(lines)
    for name in ("a.jsonl", "b.jsonl", "c.json"):
        assert [row for _, row in read_rows(str(tmp_path / name), "train")] == rows
    (tmp_path / "d.jsonl").write_bytes(b'{"a": "\xff"}\n')
    with pytest.raises(UserError, match=r"d\.jsonl line 1: not UTF-8"):
        list(read_rows(str(tmp_path / "d.jsonl"), "train"))


def test_hub_name_without_network_is_one_line(tokenizers: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"train_dataset nobody/nothing:main \(split train\): cannot load") as error:
        prepare(DataArguments(train_dataset="nobody/nothing:main"), tokenizers["gpt2"], None, 0)
    assert "\n" not in str(error.value)


# --- split and cache ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("amount", "expected"), [(0, 0), (0.1, 20), (1, 1), (37, 37), (0.001, 1)])
def test_held_out_rows(amount: float, expected: int, seed: int) -> None:
    hashes = np.random.default_rng(seed).permutation(200) - 100
    chosen = hold_out(hashes, amount, seed)
    assert len(chosen) == len(set(chosen)) == expected and sorted(chosen) == list(chosen)
    np.testing.assert_array_equal(chosen, hold_out(hashes, amount, seed))
    if 0 < expected < 200:
        assert list(chosen) != list(hold_out(hashes, amount, seed + 1))


@pytest.mark.parametrize("seed", range(5))
def test_no_prompt_on_both_sides(seed: int) -> None:
    """MetaMathQA repeats questions with other answers: a random row split would validate on training prompts."""
    hashes = np.random.default_rng(seed).integers(0, 60, size=300)
    chosen = hold_out(hashes, 0.1, seed)
    rest = np.setdiff1d(np.arange(300), chosen)
    assert not set(hashes[chosen]) & set(hashes[rest])
    assert 25 <= len(chosen) <= 30


def test_split_parts_are_the_whole(tokenizers: dict[str, Any], tmp_path: Path) -> None:
    whole = prepared(tmp_path, ROWS, tokenizers["gpt2"])
    parts = prepared(tmp_path, ROWS, tokenizers["gpt2"], val_split=0.25)
    assert (len(parts.train), len(parts.validation)) == (45, 15)
    together = [*parts.train["input_ids"], *parts.validation["input_ids"]]
    assert sorted(together) == sorted(whole.train["input_ids"])
    assert parts.report["train"]["held_out"] == 15 and "15 held out" in parts.summary()
    for part, report in ((parts.train, parts.report["train"]), (parts.validation, parts.report["validation"])):
        assert report["rows"] == len(part)
        assert report["tokens"] == sum(map(len, part["input_ids"]))
        assert report["loss_tokens"] == sum(map(sum, part["completion_mask"]))
        assert report["length_tokens"]["longest"] == max(map(len, part["input_ids"]))
    with pytest.raises(UserError, match="val_split 60 leaves none of 60 rows"):
        prepared(tmp_path, ROWS, tokenizers["gpt2"], val_split=60)


def test_a_split_that_holds_out_nothing_is_an_error(tokenizers: dict[str, Any], tmp_path: Path) -> None:
    rows = [{"question": f"What is {i // 2}?", "answer": str(i)} for i in range(10)]  # each prompt twice
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(UserError, match=r"val_split 0\.1 holds out none of 10 rows.*raise val_split"):
        prepare(DataArguments(train_dataset=str(path), val_split=0.1), tokenizers["llama3"], None, 0)


def test_own_validation_file_and_its_overlap(tokenizers: dict[str, Any], tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "val.jsonl", ROWS[18:25])
    data = prepared(tmp_path, ROWS[:20], tokenizers["gpt2"], val_dataset=path)
    assert (len(data.train), len(data.validation)) == (20, 7)
    assert data.report["validation"]["prompts_also_in_train"] == 2
    assert "2 of these prompts are also in the training data" in data.summary()


def test_first_rows_only(tokenizers: dict[str, Any], tmp_path: Path) -> None:
    some = prepared(tmp_path, ROWS, tokenizers["gpt2"], max_train_rows=5)
    assert some.train["input_ids"][:] == prepared(tmp_path, ROWS[:5], tokenizers["gpt2"]).train["input_ids"][:]


def test_second_time_reads_the_cache(
    tokenizers: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal settings tokenise once and give the same data set; anything that changes tokens starts afresh."""
    calls = []
    encode = PairTokenizer.encode
    monkeypatch.setattr(PairTokenizer, "encode", lambda self, *texts: calls.append(1) or encode(self, *texts))
    first = prepared(tmp_path, ROWS, tokenizers["gpt2"], val_split=0.1)
    again = prepared(tmp_path, ROWS, tokenizers["gpt2"], val_split=0.1)
    assert len(calls) == 1
    assert first.report == again.report
    assert first.train._fingerprint == again.train._fingerprint, "so that what TRL derives is cached as well"
    changes: list[dict[str, Any]] = [
        {"tokenizer": tokenizers["llama3"]},
        {"max_length": 300},
        {"template": "plain"},
        {"calculator_marks": "remove"},
        {"rows": ROWS[1:]},
    ]
    for number, change in enumerate(changes, start=2):
        other = prepared(tmp_path, **({"rows": ROWS, "tokenizer": tokenizers["gpt2"]} | change))
        assert len(calls) == number and other.report["fingerprint"] != first.report["fingerprint"]


def test_processes_that_start_together_build_once(
    tokenizers: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks call `prepare` at the same time without any collective: one builds, the others wait and map its file."""
    calls = []
    encode = PairTokenizer.encode
    monkeypatch.setattr(PairTokenizer, "encode", lambda self, *texts: calls.append(1) or encode(self, *texts))
    data = DataArguments(train_dataset=write_jsonl(tmp_path / "rows.jsonl", ROWS), val_split=0.2)
    with ThreadPoolExecutor(4) as pool:
        ranks = list(pool.map(lambda _: prepare(data, tokenizers["gpt2"], None, 0), range(4)))
    assert len(calls) == 1
    for rank in ranks[1:]:
        assert rank.report == ranks[0].report and rank.train._fingerprint == ranks[0].train._fingerprint
        assert rank.train["input_ids"][:] == ranks[0].train["input_ids"][:]


def test_cache_that_cannot_be_written(tokenizers: dict[str, Any], tmp_path: Path, cache: Path) -> None:
    (cache / "polar").write_text("a file where the folder should be")
    with pytest.raises(UserError, match="set HF_DATASETS_CACHE"):
        prepared(tmp_path, ROWS, tokenizers["gpt2"])
