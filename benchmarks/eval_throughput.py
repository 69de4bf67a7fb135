"""How many samples does `polar eval` score per second, beside plain `lm_eval`?

The demo's base model (0.85 M parameters, fp32) answers generated word problems, greedily, on one CPU thread: the same
task (eval/tasks/gsm8k_polar), prompts and limit. Each measurement is a process of its own; methods alternate.

    ours             `polar eval`: batch size found on the way, longest prompts first, rows end one by one
    lm_eval_batch_1  lm_eval's transformers backend with its default batch size
    lm_eval_batch_2  the same as the paper's scripts set it

`score_s` is the scoring itself, from the loaded model to the metrics; `whole_s` has the start of Python, the imports
and the loading too, as a user waits for it; `score_cpu_s` is the processor time of the scoring, which other work on
the machine changes less than the wall clock.

Usage: python benchmarks/eval_throughput.py [--problems 96] [--runs 3] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.record import ROOT, environment, publish, summary

BASE = ROOT / "demo" / "base"
TEMPLATE = "question_answer"
MAX_NEW_TOKENS = 112  # the longest solution has 75 tokens
METHODS = ("ours", "lm_eval_batch_1", "lm_eval_batch_2")


def ours(data: str) -> dict[str, Any]:
    """Score with `polar eval`; its own clock starts behind the loading of the model."""
    import polar_eval.harness
    import polar_eval.hf_backend  # noqa: F401  their imports are no scoring
    from polar_eval.score import score

    begin = time.process_time()
    result = score(
        None, str(BASE), data=data, template=TEMPLATE, dtype="float32", device="cpu", max_new_tokens=MAX_NEW_TOKENS
    )
    return {
        "score_s": result["score_time_s"],
        "score_cpu_s": time.process_time() - begin,  # with reading the data and loading this small model
        "num_correct": result["columns"]["strict"]["num_correct"],
        "batch_size": result["batch_size"],
    }


def lm_eval(data: str, batch_size: int) -> dict[str, Any]:
    """Score with lm_eval's own backend and evaluation."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model = HFLM(pretrained=str(BASE), device="cpu", dtype="float32", batch_size=batch_size)
    metadata = {"template": TEMPLATE, "data": data}
    manager = TaskManager(include_path=str(ROOT / "eval" / "tasks"), include_defaults=False, metadata=metadata)
    tasks = manager.load(["gsm8k_polar"])
    task = tasks["tasks"]["gsm8k_polar"]
    task.set_config("generation_kwargs", {"max_gen_toks": MAX_NEW_TOKENS}, update=True)
    begin, begin_cpu = time.perf_counter(), time.process_time()
    found = evaluate(lm=model, task_dict=tasks, bootstrap_iters=100)
    assert found is not None
    seconds, cpu_seconds = time.perf_counter() - begin, time.process_time() - begin_cpu
    right = [sample["exact_match"] for sample in found["samples"]["gsm8k_polar"] if sample["filter"] == "strict"]
    return {"score_s": seconds, "score_cpu_s": cpu_seconds, "num_correct": int(sum(right)), "batch_size": batch_size}


def work(method: str, data: str) -> None:
    """One measurement, in this process; prints it as the last line."""
    torch.set_num_threads(1)
    found = ours(data) if method == "ours" else lm_eval(data, int(method.rpartition("_")[2]))
    print(json.dumps(found))


def measure(method: str, data: str) -> dict[str, Any]:
    """One measurement, in a process of its own."""
    begin = time.perf_counter()
    variables = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, __file__, "--worker", method, "--data", data],
        env=os.environ | variables,
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise RuntimeError(f"{method}: {done.stderr[-2000:]}")
    return {**json.loads(done.stdout.splitlines()[-1]), "whole_s": time.perf_counter() - begin}


def main() -> None:
    """Measure and publish."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, default=96)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", choices=METHODS, help=argparse.SUPPRESS)
    parser.add_argument("--data", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments.worker, arguments.data)
        return
    from demo.problems import SEEN_KINDS, problems, to_jsonl

    found: dict[str, list[dict[str, Any]]] = {method: [] for method in METHODS}
    load = [os.getloadavg()[0]]
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "problems.jsonl"
        data.write_text(to_jsonl(list(islice(problems(SEEN_KINDS, seed=77), arguments.problems))), encoding="utf-8")
        for _ in range(arguments.runs):
            for method in METHODS:
                found[method].append(measure(method, str(data)))
            load.append(os.getloadavg()[0])
    clocks = ("score_s", "score_cpu_s", "whole_s")
    rates = {
        clock: {method: summary([arguments.problems / run[clock] for run in runs]) for method, runs in found.items()}
        for clock in clocks
    }
    publish(
        {
            **environment(),
            "problems": arguments.problems,
            "model": "demo/base",
            "threads": 1,
            "load_average": [round(value, 1) for value in load],
            "num_correct": {method: sorted({run["num_correct"] for run in runs}) for method, runs in found.items()},
            "batch_size": {method: runs[-1]["batch_size"] for method, runs in found.items()},
            "samples_per_s": rates,
            "times_faster_than": {
                clock: {
                    method: rates[clock]["ours"]["median"] / rates[clock][method]["median"] for method in METHODS[1:]
                }
                for clock in clocks
            },
        },
        arguments.out,
    )


if __name__ == "__main__":
    main()
