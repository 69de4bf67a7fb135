"""The commonsense texts are lm-eval's: compared with its own task objects, and between the two formats of rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from polar.commonsense import TASKS, MultipleChoice, read_row
from polar.errors import UserError
from tests.shared_data import read_jsonl, shared_data

LM_EVAL_FILES = {
    "boolq": "super_glue/boolq/default.yaml",
    "piqa": "piqa/piqa.yaml",
    "social_iqa": "siqa/siqa.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "winogrande": "winogrande/default.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "arc_challenge": "arc/arc_challenge.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml",
}
FOLDERS = {"social_iqa": "social_i_qa", "arc_easy": "ARC-Easy", "arc_challenge": "ARC-Challenge"}
QUOTES = """He said "it's {50%}" \\ twice"""


def _lettered(field: str, key: str, labels: str) -> dict[str, Any]:
    return {
        field: f"{QUOTES}: the sun is",
        "choices": {"text": [f"choice {x}'s" for x in labels], "label": list(labels)},
        "answerKey": key,
    }


# In the hub's format; white space, quotes and braces where real rows have them, and lm-eval's templates could stumble.
HUB_ROWS: dict[str, list[dict[str, Any]]] = {
    "boolq": [
        {"question": "is it so", "passage": f"It -- {QUOTES} is.\n", "label": 1},
        {"question": "is  it", "passage": "", "label": 0},
    ],
    "piqa": [
        {"goal": "dresser ", "sol1": "with bobby pin ", "sol2": "finish, with  pin", "label": 0},
        {"goal": QUOTES, "sol1": QUOTES, "sol2": "[x, 'y']", "label": 1},
    ],
    "social_iqa": [
        {"context": QUOTES, "question": "Why?", "answerA": "a", "answerB": "b's", "answerC": " c", "label": label}
        for label in "123"
    ],
    "hellaswag": [
        {
            "activity_label": "Canoeing",
            "ctx_a": "[header] How [title] Row. [step]  Sit.",
            "ctx_b": "",
            "endings": ["[title] Sit  down. [step] Go.", "go [x] on.", " stop.", "a"],
            "label": "3",
        },
        {
            "activity_label": "Roof",
            "ctx_a": "A man sits.",
            "ctx_b": "the Man in Red",
            "endings": ["a.", "b.", "c.", "d."],
            "label": "0",
        },
    ],
    "winogrande": [
        {"sentence": "Ian likes Dennis because _ cooks.", "option1": "Ian", "option2": "Dennis", "answer": "2"},
        {"sentence": f"_'s  hat: {QUOTES} _ ", "option1": "A B", "option2": "C", "answer": "1"},
    ],
    "arc_easy": [_lettered("question", "2", "1234"), _lettered("question", "C", "ABC")],
    "arc_challenge": [_lettered("question", "E", "ABCDE")],
    "openbookqa": [_lettered("question_stem", " D", "ABCD"), _lettered("question_stem", "A", "ABCD")],
}


def lm_eval_requests(task: str, rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> list[MultipleChoice]:
    """What lm-eval's own task would send to the model for rows of the hub, which a local data set stands in for."""
    import lm_eval
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    asked = {}
    rows_of_split = datasets.Dataset.from_list(rows)
    splits = datasets.DatasetDict({name: rows_of_split for name in ("train", "validation", "test")})

    def load_dataset(path: str, name: str | None = None, **_: Any) -> datasets.DatasetDict:
        asked["source"] = f"{path}:{name}" if name else path
        return splits

    monkeypatch.setattr("lm_eval.api.task.datasets.load_dataset", load_dataset)
    config = load_yaml(Path(lm_eval.__file__).parent / "tasks" / LM_EVAL_FILES[task])
    loaded = ConfigurableTask(config={key: value for key, value in config.items() if key != "tag"})
    assert loaded.config.task == task and asked["source"] == TASKS[task].source
    assert (loaded.config.test_split or loaded.config.validation_split) == TASKS[task].scored_split
    found = []
    for doc in loaded.eval_docs:
        context = loaded.fewshot_context(doc, 0)
        arguments = [request.args for request in loaded.construct_requests(doc, context)]
        gold = loaded.doc_to_text(doc) if loaded.multiple_input else loaded.doc_to_target(doc)
        found.append(MultipleChoice(tuple(a[0] for a in arguments), tuple(a[1] for a in arguments), int(gold)))
    return found


@pytest.mark.parametrize("task", TASKS)
def test_texts_are_those_of_lm_eval(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Independent computation: the requests that lm-eval's own task object builds from the same rows."""
    rows = HUB_ROWS[task]
    original = shared_data("commonsense") / FOLDERS.get(task, task) / "train_original.jsonl"
    if original.is_file() and task != "hellaswag":  # of HellaSwag the file has other fields than the hub
        rows = [*rows, *read_jsonl(original)[:60]]
        fields = rows[0].keys()
        rows = [{field: row[field] for field in fields} for row in rows]
    assert [read_row(task, row) for row in rows] == lm_eval_requests(task, rows, monkeypatch)


@pytest.mark.parametrize("task", TASKS)
def test_every_real_row_in_the_packaging_can_be_read(task: str) -> None:
    folder = shared_data("commonsense") / FOLDERS.get(task, task)
    for part in ("train", "test"):
        rows = json.loads((folder / f"{part}.json").read_text(encoding="utf-8"))
        read = [read_row(task, row) for row in rows]
        assert {choice.gold for choice in read} >= {0, 1}
        for row, choice in zip(rows, read, strict=True):
            prompt, response = choice.training_texts()
            assert prompt == prompt.rstrip() and prompt + response == (
                choice.contexts[choice.gold] + choice.continuations[choice.gold]
            )
            if task not in ("boolq", "hellaswag", "winogrande"):  # the others change or replace the choice's text
                number = choice.gold + 1
                assert f"{number}: {choice.continuations[choice.gold][1:]}" in row["instruction"]
                assert row["answer"].endswith(str(number))


@pytest.mark.parametrize("task", ["piqa", "social_iqa", "winogrande"])
def test_both_formats_of_the_same_rows_agree(task: str) -> None:
    folder = shared_data("commonsense") / FOLDERS.get(task, task)
    packed = json.loads((folder / "train.json").read_text(encoding="utf-8"))
    original = read_jsonl(folder / "train_original.jsonl")
    assert len(packed) == len(original) >= 1000
    for one, other in zip(packed, original, strict=True):
        assert read_row(task, one) == read_row(task, other)


def test_hellaswag_in_the_packaging_is_the_hub_row_but_for_its_label() -> None:
    """The file's `question` is ctx; its last unfinished sentence is ctx_b, found here from the end, word by word."""
    folder = shared_data("commonsense") / "hellaswag"
    packed = json.loads((folder / "train.json").read_text(encoding="utf-8"))
    compared = 0
    for one, other in zip(packed, read_jsonl(folder / "train_original.jsonl"), strict=True):
        ctx, ctx_b = other["question"], ""
        words = ctx.split(" ")
        while words and not words[-1].rstrip("\"'").endswith((".", "!", "?", ")", "]")):
            ctx_b = f"{words.pop()} {ctx_b}".strip()
        if not words or ctx_b[:1].isupper():
            continue
        endings = [other["choices"][letter] for letter in "ABCD"]
        hub = {
            "activity_label": "X", "ctx_a": " ".join(words), "ctx_b": ctx_b, "endings": endings,
            "label": "ABCD".index(other["answer"]),
        }  # fmt: skip
        expected, found = read_row("hellaswag", hub), read_row("hellaswag", one)
        assert (found.gold, found.continuations) == (expected.gold, expected.continuations)
        assert "".join(found.contexts[0].split()) == "".join(expected.contexts[0].removeprefix("X: ").split())
        compared += 1
    assert compared > 900


def test_without_a_passage_the_boolq_prompt_begins_with_the_question() -> None:
    row = {"instruction": "Please answer the following question with true or false, question: is it?\n\n"
           "Answer format: true/false", "output": "the correct answer is true"}  # fmt: skip
    assert read_row("boolq", row) == MultipleChoice(("Question: is it?\nAnswer:",) * 2, (" no", " yes"), 1)


def test_white_space_at_the_end_of_a_context_is_learned() -> None:
    """As lm-eval's `_encode_pair`, which moves it from the context to the continuation."""
    choice = MultipleChoice(("It is ", "It was"), (" a", " b"), 0)
    assert choice.training_texts() == ("It is", "  a")


@pytest.mark.parametrize(
    ("task", "row", "expected"),
    [
        ("boolk", {}, "task 'boolk' is unknown: did you mean boolq?"),
        ("boolq", HUB_ROWS["piqa"][0], "not a row of boolq (no 'passage'): it has the fields goal, sol1, sol2, label"),
        ("piqa", HUB_ROWS["piqa"][0] | {"label": -1}, "label -1 of 2 choices"),
        ("hellaswag", HUB_ROWS["hellaswag"][0] | {"label": ""}, "invalid literal"),
        ("piqa", {"instruction": "Add 1 and 1", "output": "2"}, "does not begin with 'Please choose the correct sol"),
        ("winogrande", HUB_ROWS["winogrande"][0] | {"sentence": "No blank."}, "substring not found"),
    ],
)
def test_rows_of_something_else_are_refused(task: str, row: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError) as error:
        read_row(task, row)
    assert expected in str(error.value)
