"""GLUE's eight tasks (WNLI is left out, as everywhere): columns, labels, parts, metrics.

Sequence classification, and for STS-B regression, each with the task's own metrics. What the literature compares is the
headline, the first metric of a task: Matthews for CoLA, Pearson for STS-B, accuracy for the others (Hu et al. 2022,
LoRA, table 2). No tokens and no files here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

HUB = "nyu-mll/glue"
MAX_SCORE = 5.0  # STS-B: similarity from 0 to 5


@dataclass(frozen=True)
class GlueTask:
    """One task, as the hub packages it.

    Attributes:
        name: the hub's config.
        folder: its folder in the official download.
        texts: columns of the one or two texts.
        labels: names of the classes in the order of the hub's numbers; empty for a regression.
        metrics: keys of `METRICS`; the first is the headline.
        tsv_texts: columns of the texts in the official TSV files.
        tsv_label: column of the label there.
        tsv_columns: all columns where the official files have no header.
        parts: names of the validation sets where there are several.
    """

    name: str
    folder: str
    texts: tuple[str, ...]
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    tsv_texts: tuple[str, ...]
    tsv_label: str
    tsv_columns: tuple[str, ...] = ()
    parts: tuple[str, ...] = ("",)

    @property
    def is_regression(self) -> bool:
        """Whether the label is a number and not a class."""
        return not self.labels

    @property
    def num_labels(self) -> int:
        """Outputs of the head."""
        return len(self.labels) or 1

    @property
    def problem_type(self) -> str:
        """What transformers calls it; it decides the loss (squared error, cross entropy)."""
        return "regression" if self.is_regression else "single_label_classification"

    @property
    def metric_names(self) -> list[str]:
        """Names of all scores: accuracy, or accuracy_matched where there are several validation sets."""
        return [named(metric, part) for part in self.parts for metric in self.metrics]

    @property
    def headline(self) -> str:
        """The score by which the best adapter is chosen."""
        return named(self.metrics[0], self.parts[0])


def named(metric: str, part: str) -> str:
    """Name of a metric on one part of the validation set."""
    return f"{metric}_{part}" if part else metric


_PAIR, _NLI = ("sentence1", "sentence2"), ("entailment", "not_entailment")
TASKS = {
    task.name: task
    for task in (
        GlueTask(
            name="cola",
            folder="CoLA",
            texts=("sentence",),
            labels=("unacceptable", "acceptable"),
            metrics=("matthews", "accuracy"),
            tsv_texts=("sentence",),
            tsv_label="label",
            tsv_columns=("source", "label", "mark", "sentence"),
        ),
        GlueTask("sst2", "SST-2", ("sentence",), ("negative", "positive"), ("accuracy",), ("sentence",), "label"),
        GlueTask(
            name="mrpc",
            folder="MRPC",
            texts=_PAIR,
            labels=("not_equivalent", "equivalent"),
            metrics=("accuracy", "f1"),
            tsv_texts=("#1 String", "#2 String"),
            tsv_label="Quality",
        ),
        GlueTask("stsb", "STS-B", _PAIR, (), ("pearson", "spearman"), _PAIR, "score"),
        GlueTask(
            name="qqp",
            folder="QQP",
            texts=("question1", "question2"),
            labels=("not_duplicate", "duplicate"),
            metrics=("accuracy", "f1"),
            tsv_texts=("question1", "question2"),
            tsv_label="is_duplicate",
        ),
        GlueTask(
            name="mnli",
            folder="MNLI",
            texts=("premise", "hypothesis"),
            labels=("entailment", "neutral", "contradiction"),
            metrics=("accuracy",),
            tsv_texts=_PAIR,
            tsv_label="gold_label",
            parts=("matched", "mismatched"),
        ),
        GlueTask("qnli", "QNLI", ("question", "sentence"), _NLI, ("accuracy",), ("question", "sentence"), "label"),
        GlueTask("rte", "RTE", _PAIR, _NLI, ("accuracy",), _PAIR, "label"),
    )
}


# Metrics: of predictions and labels, each (n,). Tested against scikit-learn and scipy, which a run need not have.


def accuracy(predicted: np.ndarray, gold: np.ndarray) -> float:
    """Share of equal classes."""
    return float(np.mean(predicted == gold))


def f1(predicted: np.ndarray, gold: np.ndarray) -> float:
    """2 TP / (2 TP + FP + FN) of class 1; 0 where class 1 is neither there nor predicted."""
    hits, errors = np.sum((predicted == 1) & (gold == 1)), np.sum(predicted != gold)
    return float(2 * hits / max(2 * hits + errors, 1))


def matthews(predicted: np.ndarray, gold: np.ndarray) -> float:
    """Matthews' correlation of two classes: Pearson's of the 0/1 values; 0 where either is constant."""
    return pearson(predicted, gold)


def pearson(predicted: np.ndarray, gold: np.ndarray) -> float:
    """Pearson's correlation in float64; 0 where either is constant, since there is no correlation to see."""
    x, y = (values.astype(np.float64) - np.mean(values, dtype=np.float64) for values in (predicted, gold))
    if not (np.ptp(predicted) and np.ptp(gold)):
        return 0.0
    return float((x @ y) / np.sqrt((x @ x) * (y @ y)))


def spearman(predicted: np.ndarray, gold: np.ndarray) -> float:
    """Pearson's correlation of the ranks, equal values sharing the mean of theirs."""
    return pearson(_ranks(predicted), _ranks(gold))


def _ranks(values: np.ndarray) -> np.ndarray:
    _, group, sizes = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(sizes) - (sizes - 1) / 2)[group]


METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": accuracy,
    "f1": f1,
    "matthews": matthews,
    "pearson": pearson,
    "spearman": spearman,
}


def scores(task: GlueTask, logits: np.ndarray, labels: np.ndarray, parts: Mapping[str, int]) -> dict[str, float]:
    """Score the outputs of a head.

    Args:
        task: which one.
        logits: (n, num_labels), or for a regression n numbers of any shape.
        labels: (n,), classes or scores.
        parts: name of each validation set -> its number of rows; one after the other they are the n rows.

    Returns:
        Name of the score -> value, the headline first.

    Raises:
        RuntimeError: there are more or fewer rows than the validation sets have.
    """
    predicted = logits.reshape(-1) if task.is_regression else logits.argmax(axis=1)
    if not len(predicted) == len(labels) == sum(parts.values()):
        raise RuntimeError(f"{len(predicted)} predictions for the {sum(parts.values())} validation rows")
    found, begin = {}, 0
    for part, rows in parts.items():
        end = begin + rows
        for metric in task.metrics:
            found[named(metric, part)] = METRICS[metric](predicted[begin:end], labels[begin:end])
        begin = end
    return found


def mean_loss(task: GlueTask, logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean over rows of the loss that the head is trained on: cross entropy, for a regression the squared error.

    transformers averages over batches, with the rows that fill the last one up on each rank.
    """
    logits = logits.astype(np.float64)
    if task.is_regression:
        return float(np.mean((logits.reshape(-1) - labels) ** 2))
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_sums = np.log(np.exp(shifted).sum(axis=1))
    return float(np.mean(log_sums - shifted[np.arange(len(labels)), labels]))


def standard_error(metric: str, value: float, num_rows: int) -> float | None:
    """Standard error of an accuracy, sqrt(p (1 - p) / (n - 1)); None for the others, which have no such formula."""
    if not metric.startswith("accuracy") or num_rows < 2:
        return None
    return float(np.sqrt(value * (1 - value) / (num_rows - 1)))
