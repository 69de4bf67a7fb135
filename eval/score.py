"""`polar eval`: score an adapter or a base model on tasks, on the prompts that the adapter was trained on.

    check everything that needs no weights -> load the model once -> task by task: answers, metrics, results.json

A PoLAR adapter is exported to plain LoRA first, so what is scored is what is served.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from polar.base_checkpoint import resolve_base
from polar.errors import UserError
from polar.export import check_output, export_lora
from polar.files import atomic_directory, write_json, write_text
from polar.launch import from_main_process, on_all_ranks
from polar.run_folder import installed_version
from polar.upstream import holds_polar
from polar_eval.catalog import GLUE_TASKS, ScoringTask, find_tasks
from polar_eval.jobs import Job, ScoreOptions, Subject, prepare, settle
from polar_eval.quiet import quiet
from polar_eval.results import RESULT_NAME, Measured, Result, prompt_facts, stock_columns, stock_rows
from polar_eval.sample_cache import SampleCache
from polar_eval.world import World, join_world

VERSIONED = ("polar", "lm_eval", "torch", "transformers", "peft", "datasets", "math_verify", "vllm")


def score(
    adapter: str | os.PathLike[str] | None,
    base: str | None = None,
    out: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    resume: bool = False,
    task: str = "gsm8k",
    **options: Any,
) -> dict[str, Any]:
    """Score one adapter, or the base alone, on one task; see `score_tasks`."""
    results = score_tasks(adapter, find_tasks(task), [out], base, overwrite, resume, **options)
    return results[0]


def score_tasks(
    adapter: str | os.PathLike[str] | None,
    tasks: Sequence[ScoringTask],
    outs: Sequence[str | os.PathLike[str] | None],
    base: str | None = None,
    overwrite: bool = False,
    resume: bool = False,
    **options: Any,
) -> list[dict[str, Any]]:
    """Score one adapter, or the base alone, with the model loaded once. Collective where there are several processes.

    Args:
        adapter: run folder or adapter folder (POLAR, or any method that PEFT itself loads); None scores the base alone.
        tasks: at least one.
        outs: per task, the folder for results.json and the samples; None writes nothing and keeps no cache.
        base: model folder or hub id; default: the one named in the adapter's config.
        overwrite: replace existing folders.
        resume: keep finished results of the same adapter, data and settings. Answers of an unfinished task are always
            taken up.
        options: fields of `ScoreOptions`.

    Returns:
        What each results.json holds.

    Raises:
        UserError: bad arguments or files, prompts that do not fit, or an adapter that does not change the logits.
    """
    assert len(tasks) == len(outs), "one folder per task"
    world = join_world()
    with quiet():
        subject, chosen = on_all_ranks(lambda: settle(adapter, tasks, base, world, ScoreOptions(**options)))
        if any(task.name in GLUE_TASKS for task in tasks):
            from polar_eval.glue import score_glue

            tasks = sorted(tasks, key=lambda task: task.name not in GLUE_TASKS)
            out = None if outs[0] is None else Path(outs[0])
            return [score_glue(subject, tasks, out, chosen, world, overwrite, resume)]
        jobs = on_all_ranks(lambda: prepare(subject, tasks, outs, chosen))
        kept = [job.finished() if resume else None for job in jobs]
        kept = from_main_process(lambda: kept)
        missing = [job for job, result in zip(jobs, kept, strict=True) if result is None]
        on_all_ranks(lambda: [check_output(job.out, adapter, subject.base, overwrite) for job in missing if job.out])
        new = iter(_score_jobs(subject, missing, chosen, world) if missing else [])
        return [next(new) if result is None else result for result in kept]


def _score_jobs(subject: Subject, jobs: Sequence[Job], options: ScoreOptions, world: World) -> list[dict[str, Any]]:
    """Load the model, make sure that the adapter acts, score task by task and write each result at once."""
    from polar_eval.backend import Scorer

    begin = time.perf_counter()
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="polar-eval-")))
        backend = on_all_ranks(lambda: _load(subject, scratch, options))
        scorer = Scorer(backend, world)
        canary = None
        if subject.adapter is not None:
            prompt = scorer.tokens.encode_prompts([jobs[0].requests[0].args[0]])[0][: backend.max_length]
            canary = on_all_ranks(lambda: backend.canary(prompt))
        load_time = time.perf_counter() - begin
        return [_score_job(subject, job, scorer, canary, load_time, options) for job in jobs]


def _load(subject: Subject, scratch: Path, options: ScoreOptions) -> Any:
    """Return the backend, with the adapter as plain LoRA if it is a PoLAR adapter."""
    lora = subject.adapter
    if lora is not None and holds_polar(lora):
        export_lora(lora, scratch / "lora", subject.base, canary=False)
        lora = scratch / "lora"
    folder = resolve_base(subject.base, weights=True)
    if options.backend == "vllm":
        from polar_eval.vllm_backend import VLLMBackend

        return VLLMBackend(folder, lora, options.dtype, options.tensor_parallel, options.batch_size, options.seed)
    from polar_eval.hf_backend import HFBackend

    try:
        return HFBackend(folder, lora, options.dtype, device_of(options), options.parallelize, options.batch_size)
    except RuntimeError as error:
        if lora is None or "size mismatch" not in str(error):
            raise
        mismatch = str(error).partition("size mismatch for ")[2].partition(":")[0]
        raise UserError(
            f"the adapter was made for another base: {mismatch} has another size in {subject.base}"
        ) from error


def device_of(options: ScoreOptions) -> str:
    """Return the device of this process: as asked, else its GPU, else the CPU."""
    import torch

    available = torch.cuda.is_available()
    device = options.device or (f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if available else "cpu")
    if device.startswith("cuda") and not available:
        raise UserError(f"device {device}: there is no GPU here; pass --device cpu")
    return device


def _score_job(
    subject: Subject,
    job: Job,
    scorer: Any,
    canary: dict[str, float] | None,
    load_time: float,
    options: ScoreOptions,
) -> dict[str, Any]:
    """Score one task and write its result."""
    begin = time.perf_counter()
    cache = SampleCache(job.cache_folder, subject.identity(options), scorer.world.rank)
    scorer.begin_task(job.task.name, cache)
    found = job.loaded.evaluate(scorer, options.limit, options.seed)
    cache.close()
    measured = Measured(found, job.loaded.name, scorer.truncated)
    groups = {} if job.task.stock else measured.groups()
    columns = stock_columns(found, job.loaded.name) if job.task.stock else measured.columns()
    score_time = time.perf_counter() - begin
    result = Result(
        task=job.task.name,
        task_version=job.loaded.version,
        headline=job.task.headline,
        columns=columns,
        groups=groups,
        mean_of_groups={
            name: sum(group[name] for group in groups.values()) / len(groups) for name in columns if groups
        },
        num_problems=sum(len({sample["doc_id"] for sample in samples}) for samples in found["samples"].values()),
        num_truncated=sum(scorer.truncated.get(request.args[0], False) for request in job.requests)
        if job.loaded.generation
        else None,
        num_resumed=scorer.num_resumed,
        **prompt_facts(job.requests),
        adapter=subject.describe_adapter(),
        base=subject.base,
        data=job.data,
        template=job.template,
        generation=job.loaded.generation,
        canary=canary,
        **scorer.backend.describe(),
        world_size=scorer.world.size,
        limit=options.limit,
        seed=options.seed,
        versions={name: installed_version(name) for name in VERSIONED},
        identity=job.identity,
        load_time_s=round(load_time, 2),
        score_time_s=round(score_time, 2),
        wall_time_s=round(load_time + score_time + job.seconds, 2),
    ).to_json()
    rows = stock_rows(found) if job.task.stock else measured.rows()
    from_main_process(lambda: _write(job, cache, result, rows))
    return result


def _write(job: Job, cache: SampleCache, result: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
    """Write results.json and the samples, whole or not at all; then the answers kept for a restart may go."""
    if job.out is None:
        return
    with atomic_directory(job.out) as folder:
        lines = [json.dumps(row, ensure_ascii=False, default=str) for row in rows]
        write_text(folder / f"samples_{job.task.name.replace(':', '_')}.jsonl", "\n".join(lines) + "\n")
        write_json(folder / RESULT_NAME, result)
    cache.remove()
