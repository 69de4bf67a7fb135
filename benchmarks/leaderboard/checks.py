"""What a run in the suite needs, checked before anything starts: one line for each thing that is not there.

The suite itself would find most of this late, and some of it never: with another PEFT than the checkout's it asks git
in the wrong folder, under Python 3.11 it reports a made-up file size, and with changed files its result says "dirty".
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.leaderboard.suite import COUNTED, FILES, GIB, PLACE, Suite, measured, read_json

DATASETS = ("meta-math/MetaMathQA", "openai/gsm8k")
STREAMED = "HuggingFaceFW/finewiki"  # never in a cache
PACKAGES = ("bitsandbytes", "datasets", "numpy", "tqdm", "transformers")
MIN_PYTHON = (3, 12)
YARDSTICK = "lora/llama-3.2-3B-rank32"  # the suite's own experiment with our rank and modules
PROBE = """
import json, torch
kind = next((k for k in ("cuda", "xpu") if getattr(torch, k).is_available()), None)
print(json.dumps([kind, getattr(torch, kind).mem_get_info()[0] if kind else 0]))
"""


def unmet_by_checkout(suite: Suite) -> list[str]:
    """Whether there is a suite at all."""
    if not suite.checkout.is_dir() or suite.git("rev-parse", "--is-inside-work-tree").stdout.strip() != "true":
        return [f"{suite.checkout} is no git checkout: git clone https://github.com/huggingface/peft {suite.checkout}"]
    missing = [name for name in FILES if not (suite.folder / name).is_file()]
    if missing:
        return [f"{suite.checkout} has no {PLACE / missing[0]}: check out a commit of PEFT that has the suite"]
    return []


def unmet_by_state(suite: Suite, experiments: Sequence[str]) -> list[str]:
    """Whether the checkout is as the suite wants it, and is the PEFT that Python imports."""
    lines = []
    if suite.is_dirty:
        lines.append(f"{suite.checkout} has changed files, results would be marked dirty: commit or restore them")
    found = importlib.util.find_spec("peft")
    origin = Path(found.origin).resolve() if found is not None and found.origin else None
    if origin is None or not origin.is_relative_to(suite.checkout.resolve()):
        where = origin.parent if origin else "not installed"
        lines.append(f"the peft that Python imports is not the checkout's ({where}): pip install -e {suite.checkout}")
    for experiment in experiments:
        folder = PLACE / "experiments" / experiment
        lines += [
            f"{folder / name} in the checkout has other settings than this project's: move that folder away"
            for name in suite.differing_files(experiment)
        ]
    return lines


def unmet_by_python() -> list[str]:
    """Python's version and the packages that the suite imports."""
    lines = []
    if sys.version_info < MIN_PYTHON:
        have, want = (".".join(map(str, version[:2])) for version in (sys.version_info, MIN_PYTHON))
        lines.append(f"Python is {have}, with which the suite cannot save adapters: use {want} or newer")
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        lines.append(f"the suite imports {', '.join(missing)}: pip install {' '.join(missing)}")
    return lines


def unmet_by_accelerator(suite: Suite) -> list[str]:
    """A GPU, with as much free memory as the suite's LoRA of the same rank took where PEFT measured it."""
    # In a process of its own: a CUDA context here would hold memory while the experiments run.
    kind, free = json.loads(subprocess.run([sys.executable, "-c", PROBE], capture_output=True, check=True).stdout)
    if kind is None:
        return ["no CUDA or XPU device: the suite refuses other machines; --dry_run works on a CPU"]
    yardstick = suite.folder / COUNTED / f"{YARDSTICK.replace('/', '--')}.json"
    need = measured(read_json(yardstick))["memory_max_gib"] if yardstick.is_file() else 0.0
    if free / GIB < need:
        return [
            f"{kind} has {free / GIB:.1f} GiB free, {YARDSTICK} took {need:.1f} GiB: end other processes, or use "
            "a larger device"
        ]
    return []


def unmet_by_hub(suite: Suite, experiments: Sequence[str]) -> list[str]:
    """Each base model and data set is in the cache or can be fetched with this login."""
    models = dict.fromkeys(suite.parameters(experiment)["model_id"] for experiment in experiments)
    lines = [
        f"model {model} is neither cached nor reachable ({why}): accept its licence on the hub, hf auth login, "
        f"hf download {model}"
        for model in models
        if not Path(model).is_dir() and (why := _refusal(model, "model")) and not _is_cached_model(model)
    ]
    for dataset in DATASETS:
        if (why := _refusal(dataset, "dataset")) and not _is_cached_dataset(dataset):
            lines.append(f"data set {dataset} is neither cached nor reachable ({why}): load it once with a network")
    if why := _refusal(STREAMED, "dataset"):
        lines.append(f"data set {STREAMED} is not reachable ({why}): the suite streams it, so it needs a network")
    return lines


def _refusal(repository: str, kind: str) -> str:
    """Why the hub does not give out a repository, in a word; empty where it does."""
    from huggingface_hub import HfApi

    try:
        HfApi().auth_check(repository, repo_type=kind)
    except Exception as error:  # many classes, of the hub and of the network below it
        return type(error).__name__
    return ""


def _is_cached_model(model: str) -> bool:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        index = try_to_load_from_cache(model, "model.safetensors.index.json")
    except HFValidationError:  # a path that does not exist
        return False
    files = set(read_json(Path(index))["weight_map"].values()) if isinstance(index, str) else {"model.safetensors"}
    return all(isinstance(try_to_load_from_cache(model, file), str) for file in {*files, "config.json"})


def _is_cached_dataset(dataset: str) -> bool:
    if importlib.util.find_spec("datasets") is None:
        return False
    from datasets import config

    return os.path.isdir(os.path.join(config.HF_DATASETS_CACHE, dataset.replace("/", "___")))
