"""`polar eval --tasks glue_TASK`: the validation metrics of an adapter that was saved with its head.

No prompts and no lm-eval: rows to tokens as in the training, the head's outputs, the task's own metrics. A PoLAR
adapter is scored as the plain LoRA that would be served.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from polar.adapter_file import WEIGHTS_NAME
from polar.base_checkpoint import resolve_base
from polar.errors import UserError
from polar.export import check_output, export_lora
from polar.glue import HUB, TASKS, GlueTask, scores
from polar.glue_results import prediction_rows, result_columns, write_results
from polar.launch import from_main_process, on_all_ranks
from polar.run_folder import installed_version
from polar.upstream import holds_polar
from polar_eval.catalog import GLUE_PREFIX, ScoringTask
from polar_eval.jobs import ScoreOptions, Subject
from polar_eval.progress import Progress
from polar_eval.world import World

DEFAULT_BATCH_SIZE = 32


@dataclass(frozen=True)
class _Rows:
    """Tokenised validation rows: as `polar.glue_data.GlueData`, of the validation alone."""

    task: GlueTask
    source: str
    table: Any
    parts: dict[str, int]
    reports: dict[str, Any]
    max_length: int | None


def score_glue(
    subject: Subject,
    tasks: Sequence[ScoringTask],
    out: Path | None,
    options: ScoreOptions,
    world: World,
    overwrite: bool,
    resume: bool,
) -> dict[str, Any]:
    """Score one adapter with a head on the task that it was trained on. Collective where there are several processes.

    Args:
        subject: an adapter and its base.
        tasks: one GLUE task.
        out: folder for results.json and the predictions; None writes nothing.
        options: data (a file, a folder with a folder per task, or a hub name), limit, batch size, dtype, device.
        world: this process and the others; each scores its share of the rows.
        overwrite: replace an existing folder.
        resume: keep a finished result of the same adapter, rows and settings.

    Returns:
        What results.json holds.

    Raises:
        UserError: several tasks, no adapter, a head of another task or one that was not saved whole, unreadable rows.
    """
    begin = time.perf_counter()
    task = on_all_ranks(lambda: _check(subject, tasks, options))
    rows = on_all_ranks(lambda: _read_rows(subject, task, options))
    decisive = [subject.identity(options), task.name, rows.reports, rows.max_length]
    identity = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()
    kept = from_main_process(lambda: _finished(out, identity) if resume else None)
    if kept is not None:
        return kept
    on_all_ranks(lambda: None if out is None else check_output(out, subject.adapter, subject.base, overwrite))
    model = on_all_ranks(lambda: _load(subject, task, options))
    load_time = time.perf_counter() - begin
    logits = _outputs(model, rows, options.batch_size or DEFAULT_BATCH_SIZE, world)
    labels = np.asarray(rows.table["label"])
    score_time = time.perf_counter() - begin - load_time
    values = scores(task, logits, labels, rows.parts)
    result = {
        "task": f"{GLUE_PREFIX}{task.name}",
        "task_version": "1.0",
        "headline": task.headline,
        "columns": _with_counts(result_columns(task, rows.parts, values), rows.parts),
        "groups": {},
        "mean_of_groups": {},
        "num_problems": len(labels),
        "num_truncated": None,
        "num_cut": sum(report["truncated"]["rows"] for report in rows.reports.values()),
        "num_left_out": sum(report["rows_read"] - report["rows_kept"] for report in rows.reports.values()),
        "num_resumed": 0,
        "parts": rows.parts,
        "labels": list(task.labels),
        "adapter": subject.describe_adapter(),
        "base": subject.base,
        "data": ", ".join(report["source"] for report in rows.reports.values()),
        "template": None,
        "max_length": rows.max_length,
        "canary": None,
        "backend": "transformers",
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "batch_size": options.batch_size or DEFAULT_BATCH_SIZE,
        "world_size": world.size,
        "limit": options.limit,
        "seed": options.seed,
        "versions": {name: installed_version(name) for name in ("polar", "torch", "transformers", "peft", "datasets")},
        "identity": identity,
        "load_time_s": round(load_time, 2),
        "score_time_s": round(score_time, 2),
        "wall_time_s": round(load_time + score_time, 2),
    }
    if out is not None:
        from_main_process(lambda: write_results(out, result, prediction_rows(task, rows.parts, logits, labels)))
    return result


def _check(subject: Subject, tasks: Sequence[ScoringTask], options: ScoreOptions) -> GlueTask:
    """Settle the task; nothing is loaded yet."""
    from polar.classifier import num_labels_of

    name = tasks[0].name
    task = TASKS[name.removeprefix(GLUE_PREFIX)]
    if len(tasks) > 1:
        raise UserError(f"tasks {', '.join(each.name for each in tasks)}: a head answers one task; score {name} alone")
    if subject.adapter is None:
        raise UserError(f"task {name}: the head was saved with the adapter; name the run or the adapter, without base")
    if options.backend != "hf" or options.parallelize:
        raise UserError(f"task {name}: a head is scored by --backend hf, one copy of the model per process")
    for option in ("template", "max_new_tokens"):
        if getattr(options, option) is not None:
            raise UserError(f"--{option}: {name} has no prompts and generates nothing; leave it out")
    if not (subject.adapter / WEIGHTS_NAME).is_file():
        raise UserError(f"{subject.adapter}: holds no {WEIGHTS_NAME}")
    outputs = num_labels_of(subject.adapter)
    if outputs != task.num_labels:
        found = "no head" if outputs is None else f"a head with {outputs} outputs"
        raise UserError(f"{subject.adapter} has {found}, {name} needs {task.num_labels}: name the task of the training")
    trained = _run_settings(subject.adapter).get("task")
    if trained is not None and trained != task.name:
        raise UserError(f"{subject.adapter} was trained on {GLUE_PREFIX}{trained}, not on {name}")
    return task


def _run_settings(adapter: Path) -> dict[str, Any]:
    """Settings of the run that an adapter lies in; none for an adapter alone."""
    path = adapter.parent / "config.yaml"
    content = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None
    return content if isinstance(content, dict) else {}


def _read_rows(subject: Subject, task: GlueTask, options: ScoreOptions) -> _Rows:
    """Tokenise the validation rows with the training's max_length; without a run, the longest that the base takes."""
    from polar.build_model import load_tokenizer
    from polar.glue_data import prepare_validation
    from polar.run_config import ModelArguments

    assert subject.adapter is not None
    if options.data_dir and not Path(options.data_dir).expanduser().is_dir():
        raise UserError(f"--data_dir {options.data_dir}: no such folder")
    folder = resolve_base(subject.base)
    tokenizer = load_tokenizer(ModelArguments(str(folder)), needs_eos=False)
    longest = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("max_position_embeddings")
    max_length = _run_settings(subject.adapter).get("max_length", longest)
    source = options.data or options.data_dir or HUB
    key = "--data" if options.data else "--data_dir"
    table, parts, reports = prepare_validation(task, source, key, tokenizer, max_length, options.limit)
    return _Rows(task, source, table, parts, reports, max_length)


def _finished(out: Path | None, identity: str) -> dict[str, Any] | None:
    try:
        result = json.loads((out / "results.json").read_text(encoding="utf-8")) if out is not None else None
    except (OSError, ValueError):
        return None
    return result if isinstance(result, dict) and result.get("identity") == identity else None


def _load(subject: Subject, task: GlueTask, options: ScoreOptions) -> Any:
    """Return base, head and adapter, ready to score."""
    import torch
    from peft import PeftModel
    from transformers import AutoConfig

    from polar.classifier import add_head_settings, head_modules, load_classifier
    from polar_eval.score import device_of

    assert subject.adapter is not None
    folder = resolve_base(subject.base, weights=True)
    config = AutoConfig.from_pretrained(folder)
    add_head_settings(config, task)
    dtype: Any = "auto" if options.dtype == "auto" else getattr(torch, options.dtype)
    model = load_classifier(str(folder), config, dtype=dtype)
    _check_head(subject.adapter, head_modules(model))
    with tempfile.TemporaryDirectory(prefix="polar-eval-") as scratch:
        lora = subject.adapter
        if holds_polar(lora):
            lora = Path(scratch) / "lora"
            export_lora(subject.adapter, lora, subject.base, canary=False)
        return PeftModel.from_pretrained(model, str(lora)).eval().to(device_of(options))


def _check_head(adapter: Path, head: Sequence[str]) -> None:
    """Refuse a head of which a part was never saved: its score would depend on how that is drawn."""
    from safetensors import safe_open

    with safe_open(adapter / WEIGHTS_NAME, framework="pt") as file:
        saved = {part for key in file.keys() for part in key.split(".")}  # noqa: SIM118  not a mapping
    missing = [name for name in head if name not in saved]
    if missing:
        raise UserError(
            f"{adapter} was saved without {', '.join(missing)}, which no base has: each load draws it anew, so "
            "there is nothing to score; train with modules_to_save naming it, as polar.train does"
        )


def _outputs(model: Any, rows: _Rows, batch_size: int, world: World) -> np.ndarray:
    """Outputs of the head, (rows, num_labels) float32, in the order of the rows. Longest first, as the memory is then
    known at once. Collective."""
    import torch

    pad = model.config.pad_token_id or 0
    ids, kinds = (
        rows.table["input_ids"],
        rows.table["token_type_ids"] if "token_type_ids" in rows.table.features else None,
    )
    order = sorted(range(len(ids)), key=lambda index: -len(ids[index]))[world.rank :: world.size]
    progress = Progress(f"{GLUE_PREFIX}{rows.task.name}", len(order), shown=world.rank == 0)
    found: dict[int, list[float]] = {}
    for begin in range(0, len(order), batch_size):
        chosen = order[begin : begin + batch_size]
        width = len(ids[chosen[0]])
        batch = {
            "input_ids": torch.tensor([ids[i] + [pad] * (width - len(ids[i])) for i in chosen]),
            "attention_mask": torch.tensor([[1] * len(ids[i]) + [0] * (width - len(ids[i])) for i in chosen]),
        }
        if kinds is not None:
            batch["token_type_ids"] = torch.tensor([kinds[i] + [0] * (width - len(ids[i])) for i in chosen])
        with torch.inference_mode():
            logits = model(**{name: value.to(model.device) for name, value in batch.items()}).logits.float().cpu()
        found |= {index: row for index, row in zip(chosen, logits.tolist(), strict=True)}
        progress.advance(len(chosen))
    progress.close()
    every = world.merge(found)
    return np.asarray([every[index] for index in range(len(ids))], dtype=np.float32)


def _with_counts(columns: dict[str, Any], parts: dict[str, int]) -> dict[str, Any]:
    """Add the counts that results.json has of every task; right rows are known of accuracies only."""
    for name, column in columns.items():
        rows = parts.get(name.partition("_")[2], 0) if name.startswith("accuracy") else 0
        column |= {"num_correct": round(column["value"] * rows) if rows else None, "num_without_answer": None}
    return columns
