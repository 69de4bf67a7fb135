"""GLUE: metrics against scikit-learn and scipy, readers against the csv module, every line about what is wrong."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch

from polar.errors import UserError
from polar.glue import TASKS, mean_loss, scores, standard_error
from polar.glue_rows import open_split, read_row, validation_split
from polar.run_config import RunConfig, parse_run
from tests.shared_data import shared_data
from tests.tiny_glue import HEADERS, public_lines, write_task

# Metrics


@pytest.mark.parametrize("seed", range(4))
def test_metrics_of_classes(seed: int) -> None:
    from sklearn import metrics

    draw = np.random.default_rng(seed)
    logits = draw.normal(size=(57, 2)).astype(np.float32)
    gold = draw.integers(2, size=57)
    predicted = logits.argmax(axis=1)
    found = scores(TASKS["cola"], logits, gold, {"": 57})
    assert list(found) == ["matthews", "accuracy"]
    assert found["matthews"] == pytest.approx(metrics.matthews_corrcoef(gold, predicted), abs=1e-12)
    found = scores(TASKS["mrpc"], logits, gold, {"": 57})
    assert found["accuracy"] == metrics.accuracy_score(gold, predicted)
    assert found["f1"] == pytest.approx(metrics.f1_score(gold, predicted), abs=1e-12)


@pytest.mark.parametrize("digits", [1, 5])
def test_metrics_of_a_regression_with_and_without_ties(digits: int) -> None:
    from scipy import stats

    draw = np.random.default_rng(digits)
    gold = draw.uniform(0, 5, size=80).round(digits).astype(np.float32)
    predicted = (gold + draw.normal(size=80)).round(digits).astype(np.float32)
    found = scores(TASKS["stsb"], predicted[:, None], gold, {"": 80})
    assert found["pearson"] == pytest.approx(stats.pearsonr(predicted.astype(float), gold.astype(float))[0], abs=1e-12)
    assert found["spearman"] == pytest.approx(stats.spearmanr(predicted, gold)[0], abs=1e-12)


def test_constant_predictions_have_no_correlation_and_no_f1() -> None:
    from sklearn import metrics

    gold, constant = np.array([0, 1, 1, 0]), np.tile([1.0, 0.0], (4, 1))
    assert scores(TASKS["cola"], constant, gold, {"": 4})["matthews"] == metrics.matthews_corrcoef(gold, [0] * 4) == 0
    assert scores(TASKS["qqp"], constant, gold, {"": 4})["f1"] == 0
    assert scores(TASKS["qqp"], constant, np.zeros(4, dtype=int), {"": 4}) == {"accuracy": 1.0, "f1": 0.0}
    assert scores(TASKS["stsb"], np.ones(4), gold.astype(float), {"": 4}) == {"pearson": 0.0, "spearman": 0.0}


def test_parts_are_scored_apart_and_rows_are_counted() -> None:
    """A rank that counted its padding would bring more rows than there are."""
    logits, gold = np.eye(3)[[0, 1, 2, 0, 1]], np.array([0, 1, 2, 1, 2])
    parts = {"matched": 3, "mismatched": 2}
    assert scores(TASKS["mnli"], logits, gold, parts) == {"accuracy_matched": 1.0, "accuracy_mismatched": 0.0}
    with pytest.raises(RuntimeError, match="5 predictions for the 4 validation rows"):
        scores(TASKS["mnli"], logits, gold, {"matched": 2, "mismatched": 2})
    assert [task.headline for task in TASKS.values()] == [
        *("matthews", "accuracy", "accuracy", "pearson", "accuracy", "accuracy_matched", "accuracy", "accuracy")
    ]


def test_mean_loss_is_torchs() -> None:
    draw = torch.Generator().manual_seed(0)
    logits, gold = 9 * torch.randn(11, 3, generator=draw), torch.randint(3, (11,), generator=draw)
    expected = torch.nn.functional.cross_entropy(logits.double(), gold).item()
    assert mean_loss(TASKS["mnli"], logits.numpy(), gold.numpy()) == pytest.approx(expected, abs=1e-12)
    values, gold = logits[:, :1], logits[:, 1]
    expected = torch.nn.functional.mse_loss(values[:, 0], gold).item()
    assert mean_loss(TASKS["stsb"], values.numpy(), gold.numpy()) == pytest.approx(expected, rel=1e-6)


def test_standard_error_is_that_of_the_mean() -> None:
    hits = np.array([1, 1, 0, 1, 0, 1])
    assert standard_error("accuracy", hits.mean(), 6) == pytest.approx(hits.std(ddof=1) / np.sqrt(6))
    assert standard_error("f1", 0.5, 6) is None and standard_error("accuracy", 1.0, 1) is None


# Rows


def rows_of(task: str, source: Path | str, split: str = "train") -> list[Any]:
    return [read_row(TASKS[task], row) for _, row in open_split(TASKS[task], str(source), split, "train_dataset").rows]


@pytest.mark.parametrize("task", HEADERS)
def test_official_tsv(task: str, tmp_path: Path) -> None:
    """Against the lines themselves: texts and label by the place of their column."""
    write_task(tmp_path, task, train=12, dev=5)
    lines = public_lines(task, 12)[0 if HEADERS[task] is None else 1 :]
    columns = {"cola": (3, 1), "sst2": (0, 1), "mrpc": (3, 0), "stsb": (7, 9), "qqp": (3, 5), "mnli": (8, 11)}
    first, label = columns.get(task, (1, 3))
    known = TASKS[task]
    for found, line in zip(rows_of(task, tmp_path), lines, strict=True):
        fields = line.split("\t")
        assert found.texts == tuple(fields[first : first + len(known.texts)])
        is_name = fields[label] in known.labels
        assert found.label == (known.labels.index(fields[label]) if is_name else float(fields[label]))
    for i, part in enumerate(known.parts):
        assert len(rows_of(task, tmp_path, validation_split(part))) == 5 + i


@pytest.mark.parametrize("task", ["cola", "sst2", "mrpc", "rte"])
def test_real_files(task: str) -> None:
    """Against Python's csv with its quoting off; the counts are those of the data's description."""
    folder = shared_data("glue") / task
    rows = {"cola": (3000, 1043), "sst2": (3000, 872), "mrpc": (3000, 408), "rte": (2490, 277)}[task]
    for split, name, number in (("train", "train", rows[0]), ("validation", "dev", rows[1])):
        found = rows_of(task, folder.parent, split)
        with (folder / f"{name}.tsv").open(encoding="utf-8-sig", newline="") as file:
            lines = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
        texts = {"cola": [3], "sst2": [0], "mrpc": [3, 4], "rte": [1, 2]}[task]
        assert [row.texts for row in found] == [tuple(line[i] for i in texts) for line in lines[task != "cola" :]]
        assert len(found) == number and {row.label for row in found} == {0, 1}


def test_jsonl_and_parquet_with_the_hubs_columns(tmp_path: Path) -> None:
    rows = [{"premise": 'a "b', "hypothesis": "c", "label": i % 3, "idx": i} for i in range(6)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "mnli").mkdir()
    parquet = tmp_path / "mnli" / "validation_matched-00000-of-00001.parquet"
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), parquet)
    expected = [(('a "b', "c"), i % 3) for i in range(6)]
    assert rows_of("mnli", tmp_path / "train.jsonl") == expected
    assert rows_of("mnli", tmp_path, "validation_matched") == expected


@pytest.mark.parametrize(
    ("task", "row", "expected"),
    [
        ("rte", {"sentence1": "a", "sentence2": "b", "label": "not_entailment"}, (("a", "b"), 1)),
        ("rte", {"sentence1": "a", "sentence2": "b", "label": "1"}, (("a", "b"), 1)),
        ("rte", {"sentence1": "a", "sentence2": "b", "label": -1}, "no_label"),
        ("rte", {"sentence1": "a", "sentence2": "b", "label": ""}, "no_label"),
        ("rte", {"sentence1": "a", "sentence2": "b", "label": 2}, "unknown_label"),
        ("rte", {"sentence1": "a", "sentence2": "b", "label": True}, "unknown_label"),
        ("rte", {"sentence1": "a", "sentence2": "b", "label": "neutral"}, "unknown_label"),
        ("rte", {"sentence1": "a", "label": 0}, "missing_column"),
        ("rte", {"sentence1": "a", "sentence2": "b"}, "missing_column"),
        ("rte", {"sentence1": "a", "sentence2": " ", "label": 0}, "empty_text"),
        ("rte", {"sentence1": "a", "sentence2": 5, "label": 0}, "not_text"),
        ("rte", ["a"], "not_a_mapping"),
        ("stsb", {"sentence1": "a", "sentence2": "b", "label": "3.75"}, (("a", "b"), 3.75)),
        ("stsb", {"sentence1": "a", "sentence2": "b", "label": 5.1}, "unknown_label"),
        ("stsb", {"sentence1": "a", "sentence2": "b", "label": "nan"}, "unknown_label"),
        ("stsb", {"sentence1": "a", "sentence2": "b", "label": None}, "no_label"),
    ],
)
def test_one_row(task: str, row: Any, expected: Any) -> None:
    assert read_row(TASKS[task], row) == expected


def test_lines_with_other_columns_are_problems(tmp_path: Path) -> None:
    text = "index\tsentence1\tsentence2\tlabel\n0\ta\tb\tentailment\n1\ta\tb\n\n2\ta\tb\tc\tentailment\r\n"
    (tmp_path / "train.tsv").write_text(text)
    places = list(open_split(TASKS["rte"], str(tmp_path), "train", "train_dataset").rows)
    assert [place for place, _ in places] == [2, 3, 5]
    assert [row for _, row in places][1:] == ["wrong_number_of_columns"] * 2


@pytest.mark.parametrize(
    ("task", "files", "message"),
    [
        ("rte", {"train.tsv": "sentence\tlabel\n"}, "line 1: task rte expects a header with sentence1, sentence2, fo"),
        (
            "cola",
            {"train.tsv": "a\tb\n"},
            "line 1: task cola expects 4 columns without a header, found 2 columns: a, b",
        ),
        ("rte", {}, ": put train.tsv|.json|.jsonl|.parquet there"),
        ("rte", {"train.tsv": ""}, "train.tsv: the file is empty"),
        ("sst2", {"train.tsv": b"sentence\tlabel\n\xff\t1\n"}, "line 2: not UTF-8 text"),
    ],
)
def test_files_that_cannot_be_read(task: str, files: dict[str, str | bytes], message: str, tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as caught:
        rows_of(task, tmp_path)
    assert message in str(caught.value)


# Settings


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    for task in ("rte", "mnli"):
        write_task(tmp_path / "glue", task, train=4, dev=3)
    return tmp_path


def settings(*argv: str) -> RunConfig:
    base = ("--model_name_or_path", "base", "--output_dir", "run", "--train_dataset", "glue", "--use_cpu")
    config = parse_run([*base, *argv])
    config.validate(world_size=1)
    return config


def test_what_follows_from_the_task(files: Path) -> None:
    config = settings("--task", "mnli", "--save_strategy", "epoch")
    assert (config.data.template, config.data.on_too_long, config.task_type) == (None, "truncate", "SEQ_CLS")
    assert config.training.metric_for_best_model == "eval_accuracy_matched" and config.training.greater_is_better
    assert config.training.eval_strategy == "epoch"
    (files / "again.yaml").write_text(config.to_yaml())
    assert parse_run(["--config", "again.yaml"]) == config
    by_loss = settings("--task", "mnli", "--metric_for_best_model", "eval_loss")
    assert by_loss.training.greater_is_better is False
    assert parse_run(["--task", "rte", "--output_dir", "r"]).data.train_dataset == "nyu-mll/glue"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--task", "rtte"], "task 'rtte' is unknown: did you mean rte?"),
        (["--task", "wnli"], "task 'wnli' is unknown: did you mean "),
        (["--task", "rte", "--template", "alpaca"], "template is alpaca: rte has its own columns and validation rows"),
        (["--task", "rte", "--val_split", "0.1"], "val_split is 0.1: rte has its own columns and validation rows"),
        (["--task", "rte", "--train_split", "dev"], "train_split is dev: rte has its own"),
        (["--task", "rte", "--on_too_long", "drop"], "on_too_long is drop, but a score of rte covers every validation"),
        (["--task", "rte", "--packing"], "packing is true: rows of rte have one label each"),
        (["--task", "rte", "--metric_for_best_model", "f1"], "metric_for_best_model is f1: rte has accuracy, loss"),
        (
            ["--task", "rte", "--train_dataset", "glue/rte/train.tsv"],
            "is one file: give val_dataset as well, or the fo",
        ),
        (["--task", "rte", "--val_dataset", "none.tsv"], "val_dataset none.tsv: no such file or folder"),
        (["--task", "rte", "--train_dataset", "glue/none.tsv"], "train_dataset glue/none.tsv: no such file or folder"),
        (["--task", "qnli"], "train_dataset glue: no train rows of qnli in glue: put train.tsv|.json|"),
        (["--task", "rte", "--max_train_rows", "0"], "max_train_rows is 0: give at least 1"),
    ],
)
def test_settings_that_do_nothing_or_cannot_be(files: Path, argv: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        settings(*argv)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value) and not Path("run").exists()
