"""Finished runs with scores, as the trainer and `polar eval` leave them, for tests of `polar report`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file

BASE = "meta-llama/Llama-2-7b-hf"
STABLE_RANK = 3.25  # of the PoLAR modules below: (1 + 1 + 1 + 0.5^2) / 1


def write_adapter(folder: Path, method: str, r: int = 4) -> int:
    """Two layers with two adapted modules each; return the number of parameters.

    Args:
        folder: made.
        method: POLAR (stable rank 3.25 for r = 4) or LORA (1).
        r: adapter rank, at least 4.
    """
    folder.mkdir(parents=True)
    config = {"peft_type": method, "r": r, "alpha": 8, "lora_alpha": 8, "theta": "full", "target_modules": ["q_proj"]}
    config["base_model_name_or_path"] = BASE
    (folder / "adapter_config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in range(2):
        for kind in ("q_proj", "down_proj"):
            stem = f"base_model.model.model.layers.{layer}.{kind}"
            if method == "POLAR":
                tensors[f"{stem}.polar_X"] = torch.eye(12, r)
                tensors[f"{stem}.polar_Y"] = torch.eye(10, r)
                tensors[f"{stem}.polar_Theta"] = torch.diag(torch.tensor([1.0, 1.0, 1.0, 0.5] + [0.0] * (r - 4)))
            else:
                tensors[f"{stem}.lora_A.weight"] = torch.randn(r, 10, generator=generator)
                left, right = (torch.randn(size, generator=generator) for size in ((12, 1), (1, r)))
                tensors[f"{stem}.lora_B.weight"] = left @ right
    save_file(tensors, folder / "adapter_model.safetensors")
    return sum(tensor.numel() for tensor in tensors.values())


def write_run(
    folder: Path, method: str, seed: int = 0, r: int = 4, checkpoints: tuple[int, ...] = (), **config: Any
) -> Path:
    """A finished run of 40 steps, without scores."""
    num = write_adapter(folder / "adapter", method, r)
    for step in checkpoints:
        write_adapter(folder / f"checkpoint-{step}", method, r)
    adapter = {"peft_type": method, "r": r}
    settings = {"model_name_or_path": BASE, "seed": seed, "output_dir": str(folder), "adapter": adapter, **config}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    lines: list[dict[str, float]] = []
    for step in range(5, 41, 5):
        lines.append({"step": step, "loss": 2.0 / step})
        if method == "POLAR":
            lines[-1]["orthonormality_error"] = 1e-7 * step
    lines.append({"step": 40, "eval_loss": 0.125})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = {"step": 40, "adapter_step": 40, "num_starts": 2, "train_time_s": 61.4, "peak_memory_gib": 1.5}
    done |= {"peak_memory_of": "device", "num_trainable": num, "world_size": 2, "engine": "FSDP2"}
    (folder / "done.json").write_text(json.dumps(done))
    return folder


def write_score(
    folder: Path,
    task: str,
    value: float,
    adapter: Path | None,
    num_problems: int = 400,
    headline: str | None = "acc",
    **fields: Any,
) -> Path:
    """The results.json of one task.

    Args:
        folder: made.
        task: its name.
        value: of the headline, a share.
        adapter: the scored run; None: the base alone.
        num_problems: behind it.
        headline: name of the number; None: a stock task, whose number is called "acc,none".
        fields: others.
    """
    folder.mkdir(parents=True)
    stderr = (value * (1 - value) / (num_problems - 1)) ** 0.5
    column = {"value": value, "stderr": stderr, "num_correct": round(value * num_problems), "num_without_answer": None}
    about = None
    if adapter is not None:
        about = {"folder": str(adapter / "adapter"), "peft_type": "POLAR", "sha256": str(adapter)}
    result = {"task": task, "headline": headline, "columns": {headline or "acc,none": column}, "base": BASE}
    result |= {"adapter": about, "num_problems": num_problems, "prompt_sha256": task, "limit": None, **fields}
    (folder / "results.json").write_text(json.dumps(result))
    return folder


def write_sweep(root: Path, values: dict[tuple[str, str, int], float]) -> Path:
    """A run per (method, task, seed) with its score, in `root/METHOD_TASK_SEED`."""
    for (method, task, seed), value in values.items():
        run = write_run(root / f"{method.lower()}_{task}_{seed}", method, seed, task=task)
        write_score(run / f"eval_{task}", task, value, run)
    return root
