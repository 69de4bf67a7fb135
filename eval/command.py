"""The arguments of `polar eval` and where its results go."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from polar.adapter_file import find_adapter, read_config
from polar.errors import UserError
from polar.launch import shut_down
from polar.templates import trained_template
from polar_eval.catalog import GLUE_PREFIX, STOCK_PREFIX, SUITES, TASKS, ScoringTask, find_tasks
from polar_eval.jobs import BACKENDS, DEFAULT_TEMPLATE
from polar_eval.results import format_result
from polar_eval.score import score_tasks


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `polar eval`."""
    add, names = parser.add_argument, ", ".join([*TASKS, *SUITES])
    add("adapter", metavar="ADAPTER", help='run folder, adapter folder, or "base" for --base alone (a merged model)')
    add(
        "--tasks",
        default="gsm8k",
        help=f"comma-separated: {names}, {STOCK_PREFIX}NAME; {GLUE_PREFIX}TASK alone; default: %(default)s",
    )
    add("--base", help="base model folder or hub id; default: the one named in the adapter")
    add("--base_only", action="store_true", help="score the adapter's base alone, with its template")
    add("--data", help="local .jsonl/.json/.parquet, or a hub name; default: the task's own on the hub")
    add("--data_dir", help="folder with a file per task, e.g. gsm8k/test.jsonl, commonsense/piqa/test.json")
    add("--template", help=f"prompt template; default: the run's own, else {DEFAULT_TEMPLATE}")
    add("--limit", type=int, help="score the first so many problems of each task")
    add("--batch_size", default="auto", help="prompts per batch; auto finds it on the prompts themselves")
    add("--max_new_tokens", type=int, help="generation limit; default: the task's own (gsm8k 512, math 1024)")
    add("--out", help="folder for results.json and the samples, one per task below it where there are several; "
        "default: RUN/eval_TASK")  # fmt: skip
    add("--overwrite", action="store_true", help="replace existing results")
    add("--resume", action="store_true", help="keep finished results; an unfinished task is always taken up again")
    add("--backend", default="hf", choices=BACKENDS, help="default: %(default)s")
    add("--tensor_parallel", type=int, default=1, help="vllm: GPUs that share the base")
    add("--dtype", default="auto", help="auto (as the base's files), float32, bfloat16, float16")
    add("--device", help="hf: cuda, cuda:N or cpu; default: this process's GPU, if there is one")
    add("--parallelize", action="store_true", help="hf: spread the base over all GPUs of this machine")
    add("--seed", type=int, default=0)


def run(args: argparse.Namespace) -> None:
    """Run `polar eval` with parsed arguments; of several processes only the first one speaks."""
    first = os.environ.get("RANK", "0") == "0"
    try:
        results, outs = _score(args)
    except UserError as error:
        if first:
            raise
        raise SystemExit(2) from error
    finally:
        shut_down()
    for result, out in zip(results, outs, strict=True):
        if first:
            print(f"{format_result(result)}\nwritten: {out}\n")


def _score(args: argparse.Namespace) -> tuple[list[dict[str, object]], list[Path]]:
    adapter = None if args.adapter == "base" else args.adapter
    base, template = args.base, args.template
    if args.base_only and adapter is not None:
        folder = find_adapter(adapter)
        base = base or read_config(folder).get("base_model_name_or_path")
        template = template or trained_template(folder)
        adapter = None
    tasks = find_tasks(args.tasks)
    outs = [output_folder(args, task, alone=len(tasks) == 1) for task in tasks]
    results = score_tasks(
        adapter,
        tasks,
        outs,
        base=base,
        overwrite=args.overwrite,
        resume=args.resume,
        data=args.data,
        data_dir=args.data_dir,
        template=template,
        limit=args.limit,
        batch_size=batch_size(args.batch_size),
        max_new_tokens=args.max_new_tokens,
        dtype=args.dtype,
        device=args.device,
        parallelize=args.parallelize,
        backend=args.backend,
        tensor_parallel=args.tensor_parallel,
        seed=args.seed,
    )
    return results, outs


def batch_size(text: str) -> int | None:
    """Read --batch_size: a number, or auto (None)."""
    if text == "auto":
        return None
    if not text.isdigit():
        raise UserError(f"batch_size {text!r}: give a number, or auto")
    return int(text)


def output_folder(args: argparse.Namespace, task: ScoringTask, alone: bool) -> Path:
    """Return where a task's results go: --out, below it where there are several tasks, or in the run folder."""
    name = f"eval_{task.name.replace(':', '_').replace('/', '_')}"
    if args.out:
        return Path(args.out) if alone else Path(args.out) / name
    if args.adapter == "base":
        return Path(f"{name}_base")
    folder = find_adapter(args.adapter)
    run_folder = folder.parent if (folder.parent / "config.yaml").is_file() else folder
    return run_folder / (f"{name}_base" if args.base_only else name)
