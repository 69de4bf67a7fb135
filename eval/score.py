"""`polar eval`: score an adapter or a base model with lm-eval, on the prompt that the adapter was trained on.

A PoLAR adapter is exported to plain LoRA first, so what is scored is what is served.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import logging
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from polar.adapter_file import WEIGHTS_NAME, find_adapter, read_config
from polar.base_checkpoint import resolve_base
from polar.errors import UserError
from polar.export import check_output, export_lora
from polar.files import atomic_directory, write_json, write_text
from polar.run_folder import installed_version
from polar.templates import load_template, trained_template
from polar_eval.answers import NO_ANSWER

TASK_NAMES = {"gsm8k": "gsm8k_polar"}
HEADLINE = "strict"  # comparable with the paper's scoring, which reads the number after "the answer is:"
HUB_DATA = "openai/gsm8k:main"
DEFAULT_TEMPLATE = "alpaca"
DEFAULT_BATCH_SIZES = {"cpu": 8, "cuda": 32}
VERSIONED = ("polar", "lm_eval", "torch", "transformers", "peft", "datasets")
RESULT_NAME = "results.json"


@dataclass(frozen=True)
class ScoreOptions:
    """How to score.

    Attributes:
        task: a key of `TASK_NAMES`.
        data: a local file, or a hub name with its config behind a colon.
        template: prompt template; None: the run's own where the adapter lies in a run folder, else alpaca.
        limit: score the first so many problems; None: all.
        batch_size: prompts per batch; None: 8 on CPU, 32 on a GPU. lm-eval's "auto" tries batches of the model's full
            context length, which takes hours on a CPU and says little about generation.
        max_new_tokens: generation limit; None: the task's own, 512.
        dtype: of the base: auto (as its files), float32, bfloat16 or float16.
        device: cuda, cuda:N or cpu; None: cuda if there is one.
        parallelize: spread the base over all GPUs of this machine.
        seed: of everything that lm-eval draws; greedy decoding draws nothing.
    """

    task: str = "gsm8k"
    data: str = HUB_DATA
    template: str | None = None
    limit: int | None = None
    batch_size: int | None = None
    max_new_tokens: int | None = None
    dtype: str = "auto"
    device: str | None = None
    parallelize: bool = False
    seed: int = 0

    def check(self) -> None:
        """Raise a UserError for a value that cannot be."""
        if self.task not in TASK_NAMES:
            raise UserError(f"task {self.task!r}: unknown; there is {', '.join(TASK_NAMES)}")
        for name in ("limit", "batch_size", "max_new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} {value}: must be at least 1")
        if self.dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise UserError(f"dtype {self.dtype!r}: choose auto, float32, bfloat16 or float16")


def score(
    adapter: str | os.PathLike[str] | None,
    base: str | None = None,
    out: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Score one adapter, or the base alone, on one task.

    Args:
        adapter: run folder or adapter folder (POLAR, or any method that PEFT itself loads); None scores the base alone.
        base: model folder or hub id; default: the one named in the adapter's config.
        out: folder for results.json and the samples; None writes nothing.
        overwrite: replace an existing `out`.
        options: fields of `ScoreOptions`.

    Returns:
        What results.json holds.

    Raises:
        UserError: bad arguments or files, prompts that do not fit, or an adapter that does not change the logits.
    """
    chosen = ScoreOptions(**options)
    chosen.check()
    folder = None if adapter is None else find_adapter(adapter)
    base = base or (None if folder is None else read_config(folder).get("base_model_name_or_path"))
    if not base:
        raise UserError("no base model named; pass --base MODEL")
    target = None if out is None else check_output(out, adapter, base, overwrite)
    template = chosen.template or trained_template(folder or Path(base))
    if template is None:
        template = DEFAULT_TEMPLATE
        print(
            f"polar: note: nothing beside {adapter or base} says which prompts it was trained on, so {template}"
            " is used; --template NAME changes it",
            file=sys.stderr,
        )
    load_template(template)  # a wrong name should not wait for imports and weights
    with quiet():
        result, samples = _measure(folder, base, replace(chosen, template=template))
    if target is not None:
        with atomic_directory(target) as written:
            lines = [json.dumps(row, ensure_ascii=False) for row in _sample_rows(samples)]
            write_text(written / f"samples_{chosen.task}.jsonl", "\n".join(lines) + "\n")
            write_json(written / RESULT_NAME, result)
    return result


def _measure(folder: Path | None, base: str, chosen: ScoreOptions) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Load, check, run; return the result and lm-eval's samples."""
    begin = time.perf_counter()
    evaluate, load_task, model_class = _harness()
    problems = load_task(TASK_NAMES[chosen.task], chosen.template, chosen.data)
    prompts = [doc["prompt"] for doc in list(problems.eval_docs)[: chosen.limit]]
    settings = dict(problems.config.generation_kwargs)
    settings["max_gen_toks"] = chosen.max_new_tokens or settings["max_gen_toks"]
    with tempfile.TemporaryDirectory(prefix="polar-eval-") as scratch:
        lora = None if folder is None else _plain_adapter(folder, base, Path(scratch))
        model = _load(model_class, base, lora, chosen)
        if lora is not None:
            model.check_adapter(lora)
    model.check_prompts(prompts, settings["max_gen_toks"])
    canary = None if lora is None else model.canary(prompts[0])
    loaded = time.perf_counter()
    found = evaluate(model, problems, settings, chosen.limit, chosen.seed)
    result = {
        **_scores(found, TASK_NAMES[chosen.task]),
        **_prompt_facts(prompts),
        "adapter": None if folder is None else _describe_adapter(folder),
        "base": base,
        "data": chosen.data,
        "template": chosen.template,
        "generation": settings,
        "canary": canary,
        "dtype": str(model.model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "batch_size": int(model.batch_size),
        "seed": chosen.seed,
        "versions": {name: installed_version(name) for name in VERSIONED},
        "load_time_s": round(loaded - begin, 2),
        "wall_time_s": round(time.perf_counter() - begin, 2),
    }
    return result, found["samples"][TASK_NAMES[chosen.task]]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hide what the libraries say about their own workings; what concerns the user is checked and said here."""
    import transformers

    # lm-eval: an advertisement for --metadata with every custom data set, and notes on changed generation settings.
    # bitsandbytes: that an optional kernel is not installed.
    loggers = [logging.getLogger(name) for name in ("lm_eval", "lm-eval", "bitsandbytes")]
    levels = [logger.level for logger in loggers]
    verbosity, bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        transformers.logging.set_verbosity_error()  # sampling values in the base's generation_config
        transformers.logging.disable_progress_bar()  # one for the base's files; lm-eval's own shows the problems
        with warnings.catch_warnings():
            # peft 0.21.2 reads an attribute that transformers 5.23 has renamed.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            # `check_adapter` says it, and stops.
            warnings.filterwarnings("ignore", "Found missing adapter keys", UserWarning)
            yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        if bars:
            transformers.logging.enable_progress_bar()
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _plain_adapter(folder: Path, base: str, scratch: Path) -> Path:
    """Return `folder` itself, or its LoRA export if it is a PoLAR adapter."""
    if read_config(folder)["peft_type"] != "POLAR":
        return folder
    export_lora(folder, scratch / "lora", base, canary=False)
    return scratch / "lora"


def _harness() -> tuple[Any, Any, Any]:
    try:
        from polar_eval.harness import PromptModel, evaluate, load_task
    except ModuleNotFoundError as error:
        raise UserError(f"polar eval needs {error.name}; install it: pip install 'polar[eval]'") from error
    return evaluate, load_task, PromptModel


def _load(model_class: Any, base: str, adapter: Path | None, chosen: ScoreOptions) -> Any:
    import torch

    device = chosen.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"device {device}: there is no GPU here; pass --device cpu")
    pretrained = str(resolve_base(base, weights=True))
    try:
        return model_class(
            pretrained=pretrained,
            peft=None if adapter is None else str(adapter),
            dtype=chosen.dtype,
            device=device,
            parallelize=chosen.parallelize,
            batch_size=chosen.batch_size or DEFAULT_BATCH_SIZES[device.partition(":")[0]],
        )
    except RuntimeError as error:
        if adapter is None or "size mismatch" not in str(error):
            raise
        mismatch = str(error).partition("size mismatch for ")[2].partition(":")[0]
        raise UserError(f"the adapter was made for another base: {mismatch} has another size in {base}") from error


def _prompt_facts(prompts: list[str]) -> dict[str, Any]:
    digest = hashlib.sha256("\0".join(prompts).encode()).hexdigest()
    return {"num_problems": len(prompts), "prompt_sha256": digest, "first_prompt": prompts[0]}


def _scores(found: dict[str, Any], name: str) -> dict[str, Any]:
    """Return, by filter, exact match and its standard error (shares, 0 to 1) and the counts behind them."""
    values, samples = found["results"][name], found["samples"][name]
    summaries: dict[str, dict[str, Any]] = {}
    for key in sorted({sample["filter"] for sample in samples}, key=lambda key: key != HEADLINE):
        own = [sample for sample in samples if sample["filter"] == key]
        error = values[f"exact_match_stderr,{key}"]
        summaries[key] = {
            "exact_match": values[f"exact_match,{key}"],
            "stderr": error if isinstance(error, float) else None,  # one problem has none
            "num_correct": sum(int(sample["exact_match"]) for sample in own),
            "num_without_answer": sum(sample["filtered_resps"][0] == NO_ANSWER for sample in own),
        }
    return {"task": name, "task_version": found["versions"][name], "headline": HEADLINE, "filters": summaries}


def _sample_rows(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one row per problem: prompt, generation, what each filter read in it, and whether it is right."""
    rows: dict[int, dict[str, Any]] = {}
    for sample in samples:
        row = rows.setdefault(
            sample["doc_id"],
            {
                "row": sample["doc"]["row"],
                "question": sample["doc"]["question"],
                "prompt": sample["arguments"][0][0],
                "generation": sample["resps"][0][0],
                "gold": sample["target"],
            },
        )
        row[sample["filter"]] = sample["filtered_resps"][0]
        row[f"{sample['filter']}_correct"] = bool(sample["exact_match"])
    return [rows[doc_id] for doc_id in sorted(rows)]


def _describe_adapter(folder: Path) -> dict[str, Any]:
    file = folder / WEIGHTS_NAME
    return {
        "folder": str(folder),
        "peft_type": read_config(folder)["peft_type"],
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None,
    }


def format_result(result: dict[str, Any]) -> str:
    """Return the result as a small table."""
    who = (
        "base alone" if result["adapter"] is None else f"{result['adapter']['peft_type']} {result['adapter']['folder']}"
    )
    lines = [
        f"{result['task']} version {result['task_version']}, {result['num_problems']} problems of {result['data']},"
        f" template {result['template']}",
        f"base {result['base']} ({result['dtype']}), {who}",
        "",
        f"{'filter':<12}{'exact match':>12}{'stderr':>9}{'correct':>9}{'no answer':>11}",
    ]
    for name, summary in result["filters"].items():
        error = "-" if summary["stderr"] is None else f"{summary['stderr']:.4f}"
        mark = "  <- headline" if name == result["headline"] else ""
        lines.append(
            f"{name:<12}{summary['exact_match']:>12.4f}{error:>9}{summary['num_correct']:>9}"
            f"{summary['num_without_answer']:>11}{mark}"
        )
    if result["canary"]:
        lines += ["", f"canary: the adapter moves the logits by {result['canary']['max_logit_change']:.3g}"]
    return "\n".join([*lines, f"{result['wall_time_s']:.1f} s, {result['load_time_s']:.1f} s of it loading"])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `polar eval`."""
    parser.add_argument("adapter", metavar="ADAPTER", help='run folder, adapter folder, or "base" for the base alone')
    parser.add_argument("--tasks", default="gsm8k", help=f"one of {', '.join(TASK_NAMES)}; default: %(default)s")
    parser.add_argument("--base", help="base model folder or hub id; default: the one named in the adapter")
    parser.add_argument("--base_only", action="store_true", help="score the adapter's base alone, with its template")
    parser.add_argument(
        "--data", default=HUB_DATA, help="local .jsonl/.json/.parquet, or a hub name; default: %(default)s"
    )
    parser.add_argument("--template", help=f"prompt template; default: the run's own, else {DEFAULT_TEMPLATE}")
    parser.add_argument("--limit", type=int, help="score the first so many problems")
    parser.add_argument("--batch_size", type=int, help="default: 8 on CPU, 32 on a GPU")
    parser.add_argument("--max_new_tokens", type=int, help="generation limit; default: the task's own, 512")
    parser.add_argument("--out", help="folder for results.json and the samples; default: RUN/eval_<task>")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing --out")
    parser.add_argument("--dtype", default="auto", help="auto (as the base's files), float32, bfloat16, float16")
    parser.add_argument("--device", help="cuda, cuda:N or cpu; default: cuda if there is one")
    parser.add_argument("--parallelize", action="store_true", help="spread the base over all GPUs of this machine")
    parser.add_argument("--seed", type=int, default=0)


def run(args: argparse.Namespace) -> None:
    """Run `polar eval` with parsed arguments."""
    adapter = None if args.adapter == "base" else args.adapter
    base, template = args.base, args.template
    if args.base_only and adapter is not None:
        folder = find_adapter(adapter)
        base, template = (
            base or read_config(folder).get("base_model_name_or_path"),
            template or trained_template(folder),
        )
        adapter = None
    result = score(
        adapter,
        base=base,
        task=args.tasks,
        data=args.data,
        template=template,
        limit=args.limit,
        batch_size=args.batch_size,
        out=args.out or _default_out(args),
        dtype=args.dtype,
        seed=args.seed,
        max_new_tokens=args.max_new_tokens,
        device=args.device,
        parallelize=args.parallelize,
        overwrite=args.overwrite,
    )
    print(format_result(result))
    print(f"written: {args.out or _default_out(args)}")


def _default_out(args: argparse.Namespace) -> Path:
    name = f"eval_{args.tasks}"
    if args.adapter == "base":
        return Path(f"{name}_base")
    folder = find_adapter(args.adapter)
    run_folder = folder.parent if (folder.parent / "config.yaml").is_file() else folder
    return run_folder / (f"{name}_base" if args.base_only else name)
