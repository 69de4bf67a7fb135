"""Every task through lm-eval's own filters and metrics, with replies that are known to be right or wrong."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.model import LM

from polar.commonsense import TASKS as COMMONSENSE
from polar.errors import UserError
from polar_eval.catalog import TASKS, find_data
from polar_eval.harness import LoadedTask, stock_tasks
from polar_eval.quiet import quiet
from polar_eval.results import Measured, format_result
from polar_eval.score import score
from tests.shared_data import shared_data

LIMIT = 20
CHOICES = "(A) 1 (B) 2 (C) 3 (D) 4 (E) 5"
# In LLM-Adapters' packaging, made here: the real files are not among the shared data.
MADE = {
    "svamp": [{"instruction": f"{a} + 3?", "answer": [a + 3.0], "output": f"The answer is {a + 3}."} for a in range(9)],
    "mawps": [
        {"instruction": f"{a}?", "answer": f"{a - 30}.0", "output": f"The answer is {a - 30}."} for a in range(9)
    ],
    "aqua": [
        {"instruction": f"Answer Choices: {CHOICES}", "answer": [letter], "output": f"The answer is ({letter})."}
        for letter in "ABCDEABCDE"
    ],
}


class Scripted(LM):
    """An lm-eval model whose answers a function makes from the problem."""

    def __init__(self, reply: Callable[[dict[str, Any]], str]) -> None:
        super().__init__()
        self.reply = reply

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        return [self.reply(request.doc) for request in requests]

    def loglikelihood(self, requests: Sequence[Any]) -> list[Any]:
        """The right choice (or, for "wrong", another) is the likeliest, by a margin that no length evens out."""
        right = self.reply({}) == "right"
        chosen = [request.doc["gold"] if right else int(request.doc["gold"] == 0) for request in requests]
        return [
            (-1.0 if request.idx == index else -1e4, False) for request, index in zip(requests, chosen, strict=True)
        ]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[Any]:
        raise NotImplementedError


def measure(name: str, data: str, reply: Callable[[dict[str, Any]], str]) -> Measured:
    task = TASKS[name]
    with quiet():
        loaded = LoadedTask(task, "question_answer" if task.generates else None, data)
        loaded.prepare(None, LIMIT, seed=0)
        return Measured(loaded.evaluate(Scripted(reply), LIMIT, seed=0), loaded.name)  # type: ignore[arg-type]


def values(measured: Measured) -> dict[str, float]:
    return {name: column.value for name, column in measured.columns().items()}


MATH_REPLIES: dict[str, tuple[Callable[[dict[str, Any]], str], float, float]] = {
    "the reference": (lambda doc: doc["solution"], 0.0, 1.0),  # the paper's rule compares the whole text
    "MetaMathQA's ending": (lambda doc: f"{doc['solution']}\nThe answer is: {doc['gold']}", 1.0, 1.0),
    "in dollars": (lambda doc: f"The answer is: ${doc['gold']}$", 0.0, 1.0),
    "boxed": (lambda doc: f"So \\boxed{{{doc['gold']}}} it is.", 0.0, 1.0),
    "cut off": (lambda doc: doc["solution"][: doc["solution"].rindex("\\boxed") + 7], 0.0, 0.0),
    "goes on to another": (lambda doc: f"The answer is: {doc['gold']}\nThe answer is: 77777", 1.0, 1.0),
    "two answers": (lambda doc: f"The answer is: {doc['gold']}, 77777", 0.0, 0.0),
    "wrong": (lambda doc: "The answer is: 77777", 0.0, 0.0),
    "empty": (lambda doc: "", 0.0, 0.0),
}


@pytest.mark.parametrize("reply", MATH_REPLIES)
def test_math(reply: str) -> None:
    answer, string, symbolic = MATH_REPLIES[reply]
    measured = measure("math", str(shared_data("math") / "test.jsonl"), answer)
    assert values(measured) == {
        "string": pytest.approx(string, abs=0.03),
        "symbolic": pytest.approx(symbolic, abs=0.03),
    }
    if reply == "empty":
        assert [column.num_without_answer for column in measured.columns().values()] == [LIMIT, LIMIT]


def test_math_by_subject_and_the_mean_that_counts_each_subject_once(tmp_path: Path) -> None:
    rows = [
        {"problem": f"{n}?", "type": "Algebra" if n < 6 else "Geometry", "solution": f"\\boxed{{{n}}}"}
        for n in range(8)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    measured = measure("math", str(tmp_path / "rows.jsonl"), lambda doc: f"The answer is: {min(int(doc['gold']), 6)}")
    assert measured.groups() == {
        "Algebra": {"num_problems": 6, "string": 1.0, "symbolic": 1.0},
        "Geometry": {"num_problems": 2, "string": 0.5, "symbolic": 0.5},
    }
    assert values(measured)["string"] == 7 / 8


WORD_REPLIES: dict[str, tuple[Callable[[dict[str, Any]], str], float, float]] = {
    "the reference": (lambda doc: doc["solution"], 1.0, 1.0),
    "no mark": (lambda doc: f"So {doc['gold']}", 0.0, 1.0),
    "goes on": (lambda doc: f"The answer is {doc['gold']}. Then 999", 1.0, 0.0),
    "wrong": (lambda doc: "The answer is 999.", 0.0, 0.0),
    "empty": (lambda doc: "", 0.0, 0.0),
}


@pytest.mark.parametrize("name", ["svamp", "mawps"])
def test_word_problems(tmp_path: Path, name: str) -> None:
    (tmp_path / "test.json").write_text(json.dumps(MADE[name]))
    for reply, strict, flexible in WORD_REPLIES.values():
        assert values(measure(name, str(tmp_path / "test.json"), reply)) == {"strict": strict, "flexible": flexible}


def test_aqua(tmp_path: Path) -> None:
    (tmp_path / "test.json").write_text(json.dumps(MADE["aqua"]))
    replies: list[tuple[Callable[[dict[str, Any]], str], float, float]] = [
        (lambda doc: doc["solution"], 1.0, 1.0),
        (lambda doc: f"the answer is: {doc['gold']}.", 1.0, 1.0),
        (lambda doc: f"A train goes on. The answer is ({doc['gold']}).", 1.0, 0.2),  # LLM-Adapters reads the "A"
        (lambda doc: f"It is ({doc['gold']}).", 0.0, 1.0),
        (lambda doc: "The answer is (F).", 0.0, 0.0),
        (lambda doc: "", 0.0, 0.0),
    ]
    for reply, strict, flexible in replies:
        assert values(measure("aqua", str(tmp_path / "test.json"), reply)) == {"strict": strict, "flexible": flexible}


@pytest.mark.parametrize("name", COMMONSENSE)
def test_choices(name: str) -> None:
    """Real rows; and the requests are those of `read_row` word for word."""
    data = find_data(TASKS[name], None, str(shared_data("commonsense")))
    right, wrong = (measure(name, data, lambda doc, kind=kind: kind) for kind in ("right", "wrong"))
    assert set(values(right).values()) == {1.0} and set(values(wrong).values()) == {0.0}
    assert TASKS[name].headline in values(right)
    for row in right.rows():
        assert len(row["prompts"]) == len(row["choices"]) and all(choice.startswith(" ") for choice in row["choices"])
        assert row["loglikelihoods"][row["gold"]] == -1.0
    assert len({tuple(row["prompts"]) for row in right.rows()}) >= LIMIT // 2


# A row of each task as the hub has it, made here; lm-eval's own task says what its requests and metrics are.
HUB_ROWS: dict[str, dict[str, Any]] = {
    "boolq": {"passage": "Ice is cold.", "question": "is ice cold", "idx": 0, "label": 1},
    "piqa": {"goal": "Open a jar", "sol1": "Turn the lid.", "sol2": "Eat the lid.", "label": 0},
    "social_iqa": {
        "context": "Ann ran.", "question": "Why?", "answerA": "to win", "answerB": "to eat", "answerC": "to nap",
        "label": "1",
    },
    "hellaswag": {
        "ind": 1, "activity_label": "Running", "ctx_a": "A man runs.", "ctx_b": "he", "ctx": "A man runs. he",
        "endings": ["stops [title] now.", "flies.", "melts.", "sings."], "label": "2", "source_id": "a", "split": "val",
    },
    "winogrande": {"sentence": "Ann met Bea, so _ waved.", "option1": "Ann", "option2": "Bea", "answer": "2"},
    "arc_easy": {"question": "Hot?", "choices": {"text": ["ice", "fire"], "label": ["A", "B"]}, "answerKey": "B"},
    "openbookqa": {"question_stem": "Ice is", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "A"},
}  # fmt: skip


def hub_of(name: str, monkeypatch: pytest.MonkeyPatch, copies: int = 3) -> None:
    """Let `datasets` find this task's row on the hub, in every split."""
    import datasets

    rows = datasets.Dataset.from_list([HUB_ROWS[name]] * copies)
    found = datasets.DatasetDict({split: rows for split in ("train", "validation", "test")})
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: found)


def test_a_stock_task_is_scored_with_its_own_prompts_and_metrics(
    tmp_path: Path, tiny_gemma3: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub_of("arc_easy", monkeypatch)
    result = score(None, str(tiny_gemma3), tmp_path / "stock", task="lm_eval:arc_easy")
    (tmp_path / "rows.jsonl").write_text((json.dumps(HUB_ROWS["arc_easy"]) + "\n") * 3)
    ours = score(None, str(tiny_gemma3), tmp_path / "ours", task="arc_easy", data=str(tmp_path / "rows.jsonl"))
    assert {key: column["value"] for key, column in result["columns"].items()} == {
        f"{name},none": column["value"] for name, column in ours["columns"].items()
    }
    assert result["num_problems"] == 3 and result["template"] is result["headline"] is None
    assert result["prompt_sha256"] == ours["prompt_sha256"]
    assert len((tmp_path / "stock" / "samples_lm_eval_arc_easy.jsonl").read_text().splitlines()) == 3
    assert "acc_norm,none" in format_result(result)


def test_a_stock_task_that_is_not_there(tiny_gemma3: Path) -> None:
    with pytest.raises(UserError, match="lm-eval has no task of this name"):
        score(None, str(tiny_gemma3), task="lm_eval:no_such_task")


@pytest.mark.parametrize("name", HUB_ROWS)
def test_requests_and_accuracies_are_those_of_lm_evals_own_task(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """lm-eval's task is given the same rows in place of the hub's."""
    hub_of(name, monkeypatch)
    (tmp_path / "rows.jsonl").write_text(json.dumps(HUB_ROWS[name]) + "\n")
    with quiet():
        theirs = stock_tasks().load([name])["tasks"][name]
        theirs.set_config("num_fewshot", 0)
        theirs.build_all_requests(limit=1, rank=0, world_size=1)
        ours = LoadedTask(TASKS[name], None, str(tmp_path / "rows.jsonl"))
        requests = ours.prepare(None, None, seed=0)
    assert [request.args for request in requests] == [request.args for request in theirs.instances]
    doc, own_doc = theirs.eval_docs[0], next(iter(ours.tasks.values())).eval_docs[0]
    for values in ([-3.0, -2.9, -2.8, -2.7], [-2.0, -3.0, -9.0, -1.9], [-5.0, -4.0, -1.0, -2.0]):
        answers = [(value, False) for value in values[: len(requests)]]
        expected = theirs.process_results(doc, answers)
        found = next(iter(ours.tasks.values())).process_results(own_doc, answers)
        assert {metric: found[metric] for metric in expected} == expected
