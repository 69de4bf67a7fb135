"""The eight commonsense tasks of the paper: a row -> the texts that lm-eval scores, for training and for scoring.

    read_row("piqa", row) -> MultipleChoice(contexts, continuations, gold)

Choice i is scored by the log-likelihood of `continuations[i]` behind `contexts[i]`. The texts are those of lm-eval
0.4.13 (its doc_to_text, target_delimiter and doc_to_choice; no few-shot examples), and training uses the same ones, so
that the two prompts cannot differ. Rows come in the hub's format, or in the packaging of LLM-Adapters
(github.com/AGI-Edgerunners/LLM-Adapters: `instruction`, `output`, `answer`, with the choices in the instruction).

LLM-Adapters leaves out two things, and no reading can bring them back: BoolQ's passage (then the prompt begins with
"Question:"), and, in HellaSwag, where the unfinished last sentence begins, whose first letter lm-eval writes as a
capital (here: the lower-case words behind the last end of a sentence).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from polar.errors import UserError

DELIMITER = " "  # lm-eval's target_delimiter, in all eight tasks
_SENTENCE_END = re.compile(r"[.!?\])][\"']?\s+(?=[^.!?\]]*$)")


@dataclass(frozen=True)
class MultipleChoice:
    """What is scored: choice i is `continuations[i]` behind the prompt `contexts[i]`; `gold` is the right one."""

    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    gold: int

    def training_texts(self) -> tuple[str, str]:
        """Return (prompt, response) of the right choice.

        White space at the end of a context belongs to the response, where lm-eval's `_encode_pair` moves it.
        """
        context = self.contexts[self.gold]
        prompt = context.rstrip()
        return prompt, context[len(prompt) :] + self.continuations[self.gold]


@dataclass(frozen=True)
class _Question:
    """A row whatever its format: the text in front of the choices, the choices, which one is right."""

    text: str
    choices: tuple[str, ...]
    gold: int


@dataclass(frozen=True)
class _Packaging:
    """How LLM-Adapters writes a row: lead, text, NAME1: ..., NAME2: ..., the names again behind "Answer format: "."""

    lead: str
    name: str
    between: str = " "
    end: str = "\n\n"

    def read(self, row: Mapping[str, Any]) -> _Question:
        """Take an instruction apart; ValueError where it is not of this form."""
        body, found, names = str(row["instruction"]).rpartition("Answer format: ")
        if not found or not body.startswith(self.lead):
            raise ValueError(f"the instruction does not begin with {self.lead.strip()!r}")
        answers = names.strip().split("/")
        gold = answers.index(_answer(row))
        text = body.removeprefix(self.lead).removesuffix(self.end)
        choices = []
        separator = "\n\n"
        for i in range(1, len(answers) + 1):
            part, mark, text = text.partition(f"{separator}{self.name}{i}: ")
            if not mark:
                raise ValueError(f"the instruction has no {self.name}{i}")
            choices.append(part)
            separator = self.between
        return _Question(choices[0], (*choices[1:], text), gold)


@dataclass(frozen=True)
class CommonsenseTask:
    """One task.

    Attributes:
        name: in lm-eval.
        source: hub data set, `name` or `name:config`, as in lm-eval.
        scored_split: the split that lm-eval scores; training rows are in `train`.
        from_hub: a row in the hub's format -> question.
        from_instruction: a row in LLM-Adapters' packaging -> question.
        lay_out: question -> what is scored.
    """

    name: str
    source: str
    scored_split: str
    from_hub: Callable[[Mapping[str, Any]], _Question]
    from_instruction: Callable[[Mapping[str, Any]], _Question]
    lay_out: Callable[[_Question], MultipleChoice]


def read_row(task: str, row: Mapping[str, Any]) -> MultipleChoice:
    """Return what lm-eval scores for a row of `task`, in the hub's format or in LLM-Adapters' packaging.

    Raises:
        UserError: unknown task, or a row that is not of this task or has no label.
    """
    entry = find_task(task)
    read = entry.from_instruction if "instruction" in row else entry.from_hub
    try:
        question = read(row)
        if not 0 <= question.gold < len(question.choices):
            raise ValueError(f"label {question.gold} of {len(question.choices)} choices")
        return entry.lay_out(question)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(f"not a row of {task} ({reason}): it has the fields {', '.join(map(str, row))}") from error


def find_task(task: str) -> CommonsenseTask:
    """Return the task of this name.

    Raises:
        UserError: there is none; names the nearest.
    """
    if task not in TASKS:
        near = difflib.get_close_matches(task, TASKS, n=1)
        fix = f"did you mean {near[0]}?" if near else f"use one of {', '.join(TASKS)}"
        raise UserError(f"task {task!r} is unknown: {fix}")
    return TASKS[task]


def _answer(row: Mapping[str, Any]) -> str:
    """The answer of a row in LLM-Adapters' packaging; some of its files have it in `output` only."""
    return str(row.get("answer") or str(row["output"]).removeprefix("the correct answer is ")).strip()


def _lettered(field: str) -> Callable[[Mapping[str, Any]], _Question]:
    """ARC and OpenBookQA: `choices` has texts and labels, `answerKey` is a label (A to E or 1 to 5)."""

    def read(row: Mapping[str, Any]) -> _Question:
        labels = list(row["choices"]["label"])
        return _Question(row[field], tuple(row["choices"]["text"]), labels.index(row["answerKey"].lstrip()))

    return read


def _boolq(row: Mapping[str, Any]) -> _Question:
    return _Question(f"{row['passage']}\nQuestion: {row['question']}?", ("no", "yes"), int(row["label"]))


def _boolq_instruction(row: Mapping[str, Any]) -> _Question:
    lead = "Please answer the following question with true or false, question: "
    question, found, _ = str(row["instruction"]).partition("\n\nAnswer format: true/false")
    if not found or not question.startswith(lead):
        raise ValueError(f"the instruction does not begin with {lead.strip()!r}")
    text = f"Question: {question.removeprefix(lead).removesuffix('?')}?"
    return _Question(text, ("no", "yes"), ("false", "true").index(_answer(row)))


def _piqa(row: Mapping[str, Any]) -> _Question:
    return _Question(row["goal"], (row["sol1"], row["sol2"]), int(row["label"]))


def _social_iqa(row: Mapping[str, Any]) -> _Question:
    choices = tuple(row[f"answer{letter}"] for letter in "ABC")
    return _Question(f"{row['context']} {row['question']}", choices, int(row["label"]) - 1)


def _winogrande(row: Mapping[str, Any]) -> _Question:
    return _Question(row["sentence"], (row["option1"], row["option2"]), int(row["answer"]) - 1)


def _hellaswag(row: Mapping[str, Any]) -> _Question:
    text = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return _Question(text, tuple(row["endings"]), int(row["label"]))


def _hellaswag_instruction(row: Mapping[str, Any]) -> _Question:
    question = _Packaging("Please choose the correct ending to complete the given sentence: ", "Ending").read(row)
    ends = list(_SENTENCE_END.finditer(question.text))
    start = ends[-1].end() if ends else 0
    last = question.text[start:]
    if ends and last[:1].islower():
        question = _Question(question.text[:start] + last.capitalize(), question.choices, question.gold)
    return question


def _behind(before: str, after: str) -> Callable[[_Question], MultipleChoice]:
    """One prompt, the choices behind it."""

    def lay_out(question: _Question) -> MultipleChoice:
        context = f"{before}{question.text}{after}"
        continuations = tuple(DELIMITER + choice for choice in question.choices)
        return MultipleChoice((context,) * len(continuations), continuations, question.gold)

    return lay_out


def _into_the_blank(question: _Question) -> MultipleChoice:
    """WinoGrande: each choice stands in the blank, and the rest of the sentence is scored behind it."""
    blank = question.text.index("_")
    rest = DELIMITER + question.text[blank + 1 :].strip()
    contexts = tuple(question.text[:blank] + choice for choice in question.choices)
    return MultipleChoice(contexts, (rest,) * len(contexts), question.gold)


def _hellaswag_texts(question: _Question) -> MultipleChoice:
    cleaned = tuple(_without_wikihow_marks(choice) for choice in question.choices)
    return _behind("", "")(_Question(_without_wikihow_marks(question.text), cleaned, question.gold))


def _without_wikihow_marks(text: str) -> str:
    """lm-eval's cleaning of HellaSwag: WikiHow's [title] ends a sentence, other marks go."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


_CHOOSE = "Please choose the correct answer to the question: "
_ANSWERS = _Packaging(_CHOOSE, "Answer").read
_SOLUTIONS = _Packaging("Please choose the correct solution to the question: ", "Solution", between="\n\n").read
_OPTIONS = _Packaging(
    "Please choose the correct answer to fill in the blank to complete the given sentence: ", "Option", end=" "
).read
_ASK = _behind("Question: ", "\nAnswer:")

TASKS = {
    task.name: task
    for task in (
        CommonsenseTask(
            "boolq", "aps/super_glue:boolq", "validation", _boolq, _boolq_instruction, _behind("", "\nAnswer:")
        ),
        CommonsenseTask("piqa", "baber/piqa", "validation", _piqa, _SOLUTIONS, _ASK),
        CommonsenseTask("social_iqa", "lighteval/siqa", "validation", _social_iqa, _ANSWERS, _behind("Q: ", "\nA:")),
        CommonsenseTask(
            "hellaswag", "Rowan/hellaswag", "validation", _hellaswag, _hellaswag_instruction, _hellaswag_texts
        ),
        CommonsenseTask(
            "winogrande", "allenai/winogrande:winogrande_xl", "validation", _winogrande, _OPTIONS, _into_the_blank
        ),
        CommonsenseTask("arc_easy", "allenai/ai2_arc:ARC-Easy", "test", _lettered("question"), _ANSWERS, _ASK),
        CommonsenseTask(
            "arc_challenge", "allenai/ai2_arc:ARC-Challenge", "test", _lettered("question"), _ANSWERS, _ASK
        ),
        CommonsenseTask(
            "openbookqa", "allenai/openbookqa:main", "test", _lettered("question_stem"), _ANSWERS, _behind("", "")
        ),
    )
}
