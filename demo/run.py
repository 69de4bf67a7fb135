"""`make demo`: adapt the tiny base to a kind of word problem that it has not seen, and measure what came of it.

Data, PoLAR and LoRA under ZeRO-3 on two CPU processes, export to plain LoRA, exact match of base and adapters with
lm-eval, report. Everything lands in one folder; each training's full output is a log file there.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from polar_eval.page import Code

ROOT = Path(__file__).resolve().parent.parent
CONFIG, DS_CONFIG = "configs/demo.yaml", "ds_configs/zero3.json"
TEMPLATE = "question_answer"
NUM_PROCESSES = 2
MAX_NEW_TOKENS = 112  # the longest solution has 75 tokens
METHODS = {
    "polar": [],
    "lora": ["--adapter.peft_type", "LORA", "--adapter.lora_alpha", "32"],
}
NAMES = {"base": "base model", "polar": "PoLAR", "lora": "LoRA"}
# What a person wants to see of a training while it runs; the rest is in its log.
SHOWN = re.compile(r"^(step .*|adapter of step .*|polar: error: .*)$")


class Stages:
    """Numbered headings and the wall time of each stage."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.seconds: dict[str, float] = {}
        self.start = time.perf_counter()

    @contextmanager
    def stage(self, title: str) -> Iterator[None]:
        """Print the heading, and the seconds when it is done."""
        print(f"\n[{len(self.seconds) + 1}/{self.number}] {title}", flush=True)
        begin = time.perf_counter()
        yield
        self.seconds[title] = time.perf_counter() - begin
        print(f"      done in {self.seconds[title]:.0f} s", flush=True)

    @property
    def total(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self.start


def make_data(folder: Path, num_train: int, num_test: int, seed: int) -> str:
    """Write train, validation and test files with no question in common; return one of the questions."""
    from demo.problems import NEW_KINDS, distinct_problems, to_jsonl
    from polar.files import write_text

    parts = distinct_problems(NEW_KINDS, [num_train, 64, num_test], seed)
    for name, rows in zip(("train", "val", "test"), parts, strict=True):
        write_text(folder / f"{name}.jsonl", to_jsonl(rows))
    return parts[2][0].question


def train(method: str, base: str, out: Path, extra: list[str]) -> None:
    """Run the training command on two processes; show its steps, keep everything in a log.

    Raises:
        SystemExit: the training failed; the end of its log was printed.
    """
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(NUM_PROCESSES)),
        *("-m", "polar.train", "--config", CONFIG, "--deepspeed", DS_CONFIG, "--overwrite"),
        *("--model_name_or_path", base),
        *("--train_dataset", str(out / "data" / "train.jsonl"), "--val_dataset", str(out / "data" / "val.jsonl")),
        *("--output_dir", str(out / method), *METHODS[method], *extra),
    ]
    print(f"      {' '.join(['torchrun', *command[3:]])}", flush=True)
    # One thread per process: two processes on two cores. No GPU, so that the demo is the same everywhere.
    settings = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    log = out / f"{method}.log"
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command, env=os.environ | settings, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert process.stdout is not None
        for line in process.stdout:
            file.write(line)
            file.flush()
            if SHOWN.match(line.strip()):
                print(f"      {line.rstrip()}", flush=True)
        code = process.wait()
    if code != 0:
        tail = "".join(log.read_text(encoding="utf-8").splitlines(keepends=True)[-15:])
        print(f"{tail}\npolar: error: training {method} ended with exit code {code}; its log is {log}", file=sys.stderr)
        raise SystemExit(1)


def score_all(base: str, out: Path) -> dict[str, dict[str, Any]]:
    """Exact match of the base and of both adapters on the test problems, with lm-eval, in this process."""
    import torch

    from polar_eval.score import score

    torch.set_num_threads(1)  # the matrices are so small that a second thread mostly waits
    settings: dict[str, Any] = {
        "base": base,
        "data": str(out / "data" / "test.jsonl"),
        "template": TEMPLATE,
        "batch_size": 100,
        "dtype": "float32",
        "max_new_tokens": MAX_NEW_TOKENS,
        "device": "cpu",
        "overwrite": True,
    }
    adapters = {"base": None, "polar": out / "polar_as_lora", "lora": out / "lora"}
    folders = {
        "base": out / "polar" / "eval_gsm8k_base",
        "polar": out / "polar" / "eval_gsm8k",
        "lora": out / "lora" / "eval_gsm8k",
    }
    results = {}
    for name, adapter in adapters.items():
        print(f"      {NAMES[name]} ...", flush=True)
        with (out / "score.log").open("a", encoding="utf-8") as log, redirect_stderr(log):  # lm-eval's bars
            results[name] = score(adapter, out=folders[name], **settings)
        print(f"      {NAMES[name]:<12} {share(results[name])}", flush=True)
    return results


def share(result: dict[str, Any]) -> str:
    """Right answers of a result: count, and per cent with the standard error."""
    from polar_eval.report import share_with_error

    strict = result["columns"]["strict"]
    return f"{strict['num_correct']:4} of {result['num_problems']} right, {share_with_error(strict):>11} %"


def example(out: Path) -> list[Code]:
    """One test problem with both answers: the first that the PoLAR adapter solved and the base did not."""
    from polar_eval.page import Code

    texts = (out / "polar" / folder / "samples_gsm8k.jsonl" for folder in ("eval_gsm8k_base", "eval_gsm8k"))
    before, after = ([json.loads(line) for line in text.read_text(encoding="utf-8").splitlines()] for text in texts)
    pairs = list(zip(before, after, strict=True))
    base, adapted = next((p for p in pairs if p[1]["strict_correct"] and not p[0]["strict_correct"]), pairs[0])
    blocks = [("Question", base["question"]), ("Base model", base["generation"]), ("With PoLAR", adapted["generation"])]
    return [Code(title, text.strip()) for title, text in blocks]


def write_page(out: Path, stages: Stages) -> tuple[Path, dict[str, float]]:
    """Write the report; return its path and the median stable rank by method."""
    from polar_eval.page import Section, Table, Text
    from polar_eval.read_runs import read_run
    from polar_eval.report import write_report

    runs = [read_run(out / method) for method in METHODS]
    text = (
        "A tiny Gemma-3 that was trained on one- and two-step word problems learns a three-step kind that it has not "
        f"seen, with PoLAR and with LoRA for the same number of steps, under ZeRO-3 with {NUM_PROCESSES} processes on "
        "the CPU. One run each, with one learning rate, of a toy: it shows that the whole path works, not which method "
        "is better."
    )
    times = Table(["stage", "s"], [[title, f"{seconds:.0f}"] for title, seconds in stages.seconds.items()])
    preface = [
        Section("What this is", [Text(text)]),
        Section("One test problem", example(out)),
        Section("Wall time", [times]),
    ]
    page = write_report(runs, out, "Demo: a new kind of word problem", preface)
    return page.with_suffix(".html"), {run.name: median(run.stable_ranks) for run in runs}


def summary(out: Path, page: Path, results: dict[str, dict[str, Any]], ranks: dict[str, float], seconds: float) -> str:
    """The closing lines."""
    size = (out / "polar_as_lora" / "adapter_model.safetensors").stat().st_size
    lines = [""]
    for name, result in results.items():
        rank = f"   median stable rank {ranks[name]:.2f}" if name in ranks else ""
        lines.append(f"  {NAMES[name]:<12} {share(result)}{rank}")
    lines += [
        "",
        f"  report    {page} (and report.md, plots beside it)",
        f"  adapter   {out / 'polar' / 'adapter'}; as plain LoRA, {size / 2**10:.0f} KiB: {out / 'polar_as_lora'}",
        f"  answers   {out / 'polar' / 'eval_gsm8k' / 'samples_gsm8k.jsonl'}",
        f"  total     {seconds:.0f} s without installation",
    ]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run the demo."""
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    parser.add_argument("--base", default="demo/base", help="the tiny base model; default: %(default)s")
    parser.add_argument("--num_train", type=int, default=2000, help="training problems")
    parser.add_argument("--num_test", type=int, default=100, help="test problems")
    parser.add_argument("--max_steps", type=int, help="optimizer steps of each training; default: the config's")
    parser.add_argument("--seed", type=int, default=0, help="of the problems and of both trainings")
    arguments = parser.parse_args(argv)
    os.chdir(ROOT)
    out: Path = arguments.out
    (out / "data").mkdir(parents=True, exist_ok=True)
    extra = ["--seed", str(arguments.seed)]
    if arguments.max_steps:
        extra += ["--max_steps", str(arguments.max_steps)]
    stages = Stages(number=5)
    with stages.stage(f"data: {arguments.num_train} training and {arguments.num_test} test problems of a new kind"):
        question = make_data(out / "data", arguments.num_train, arguments.num_test, arguments.seed)
        print(f"      e.g. {question}", flush=True)
    for method in METHODS:
        with stages.stage(f"train {NAMES[method]} under ZeRO-3 on {NUM_PROCESSES} processes"):
            train(method, arguments.base, out, extra)
    with stages.stage("export PoLAR to plain LoRA, score base and adapters with lm-eval"):
        from polar.export import export_lora

        with (out / "score.log").open("w", encoding="utf-8") as log, redirect_stderr(log):
            export_lora(out / "polar", out / "polar_as_lora", base=arguments.base, overwrite=True)
        results = score_all(arguments.base, out)
    with stages.stage("report"):
        page, ranks = write_page(out, stages)
    print(summary(out, page, results, ranks, stages.total))
    return 0


if __name__ == "__main__":
    sys.exit(main())
