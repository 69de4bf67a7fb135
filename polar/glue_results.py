"""results.json and samples of a GLUE scoring, by the training at its best adapter and by `polar eval` afterwards."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from polar.files import atomic_directory, write_json, write_text
from polar.glue import GlueTask, named, standard_error


def result_columns(
    task: GlueTask, parts: Mapping[str, int], values: Mapping[str, float]
) -> dict[str, dict[str, float | None]]:
    """Return each score with its standard error, the headline first.

    Args:
        task: which one.
        parts: name of each validation set -> its number of rows.
        values: name of the score -> value, as `polar.glue.scores` gives them.
    """
    return {
        name: {"value": values[name], "stderr": standard_error(name, values[name], rows)}
        for part, rows in parts.items()
        for name in (named(metric, part) for metric in task.metrics)
    }


def prediction_rows(
    task: GlueTask, parts: Mapping[str, int], logits: np.ndarray, labels: np.ndarray
) -> list[dict[str, Any]]:
    """Return one row per validation row, in their order: part, label, what was predicted, the head's outputs."""
    gold_values, outputs_of = labels.tolist(), np.asarray(logits, dtype=np.float32).reshape(len(labels), -1)
    places = [(part, place) for part, rows in parts.items() for place in range(rows)]
    rows = []
    for (part, place), gold, outputs in zip(places, gold_values, outputs_of, strict=True):
        predicted = float(outputs[0]) if task.is_regression else task.labels[int(outputs.argmax())]
        gold = gold if task.is_regression else task.labels[gold]
        rows.append({"part": part, "row": place, "gold": gold, "predicted": predicted, "logits": outputs.tolist()})
    return rows


def write_results(folder: Path, result: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write results.json and the samples of a task, whole or not at all."""
    with atomic_directory(folder) as temporary:
        write_text(temporary / f"samples_{result['task']}.jsonl", "\n".join(map(json.dumps, rows)) + "\n")
        write_json(temporary / "results.json", result)
