"""Tiny random bases and hand-written adapter files for tests of what reads and exports them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

TARGETS = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
TEXT_CONFIG: dict[str, Any] = {
    "vocab_size": 384,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 1024,
    "sliding_window": 64,
    "layer_types": ["sliding_attention", "full_attention"],
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}


def write_gemma3(
    folder: Path, seed: int = 0, max_shard_size: str = "5GB", dtype: torch.dtype = torch.float32, **config: Any
) -> Path:
    """Write a random text-only Gemma-3 (tied embeddings, as the real one) and return its folder."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(seed)
    model = Gemma3ForCausalLM(Gemma3TextConfig(**{**TEXT_CONFIG, **config})).to(dtype)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def write_multimodal_gemma3(folder: Path, seed: int = 0, **text: Any) -> Path:
    """Write a random multimodal Gemma-3 whose files use the names of the published ones: `language_model.model...`."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    torch.manual_seed(seed)
    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = Gemma3Config(text_config=TEXT_CONFIG | text, vision_config=vision, mm_tokens_per_image=4)
    Gemma3ForConditionalGeneration(config).save_pretrained(folder)
    file = folder / "model.safetensors"
    renamed = {}
    for name, value in load_file(file).items():  # transformers 5.23 writes most of these names itself
        name = name.replace("model.language_model.", "language_model.model.")
        name = name.removeprefix("model.") if "language_model" not in name else name
        if name.startswith("vision_tower.") and ".vision_model." not in name:
            name = name.replace("vision_tower.", "vision_tower.vision_model.")
        renamed[name] = value.clone()
    save_file(renamed, file, metadata={"format": "pt"})
    return folder


def orthonormal(n: int, r: int, generator: torch.Generator) -> torch.Tensor:
    """Return a random (n, r) matrix with orthonormal columns, contiguous fp32."""
    return torch.linalg.qr(torch.randn(n, r, generator=generator))[0].contiguous()


def write_adapter(
    folder: Path,
    sizes: dict[str, tuple[int, int]],
    r: int = 4,
    alpha: float = 8.0,
    theta: str = "full",
    scale: float = 1.0,
    seed: int = 0,
    **config: Any,
) -> dict[str, torch.Tensor]:
    """Write a PoLAR adapter folder file by file, as the format is documented, and return dW by module name in float64.

    Args:
        folder: where to.
        sizes: module name -> (d_out, d_in).
        r: rank where `rank_pattern` (by full module name here) says nothing.
        alpha: numerator of s.
        theta: full, diagonal or identity.
        scale: standard deviation of Theta.
        seed: of all random numbers.
        config: further fields of adapter_config.json.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    deltas: dict[str, torch.Tensor] = {}
    for name, (d_out, d_in) in sizes.items():
        rank = config.get("rank_pattern", {}).get(name, r)
        X, Y = orthonormal(d_out, rank, generator), orthonormal(d_in, rank, generator)
        shape = (rank, rank) if theta == "full" else (rank,)
        Theta = scale * torch.randn(shape, generator=generator)
        a = config.get("alpha_pattern", {}).get(name, alpha)
        s = a / math.sqrt(rank) if config.get("use_rslora") else a / rank
        tensors |= {f"base_model.model.{name}.polar_X": X, f"base_model.model.{name}.polar_Y": Y}
        if theta != "identity":
            tensors[f"base_model.model.{name}.polar_Theta"] = Theta
        middle = {"full": Theta, "diagonal": torch.diag(Theta) if theta == "diagonal" else None}.get(theta)
        middle = torch.eye(rank) if middle is None else middle
        deltas[name] = s * X.double() @ middle.double() @ Y.double().T
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    full = {
        "peft_type": "POLAR",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": r,
        "alpha": alpha,
        "theta": theta,
        "target_modules": sorted({name.rpartition(".")[2] for name in sizes}),
        **config,
    }
    (folder / "adapter_config.json").write_text(json.dumps(full))
    return deltas


def linear_sizes(model: torch.nn.Module, within: str = "", targets: tuple[str, ...] = TARGETS) -> dict[str, Any]:
    """Return (d_out, d_in) of the modules of `model` whose name begins with `within` and ends with one of `targets`."""
    return {
        name: tuple(module.weight.shape)
        for name, module in model.named_modules()
        if name.startswith(within) and name.rpartition(".")[2] in targets
    }
