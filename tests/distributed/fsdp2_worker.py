"""Models cut by `polar.fsdp2.shard`, on each rank under torchrun: `OUT`. Writes what each rank found."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import AutoModelForCausalLM, Gemma3Config, LlamaConfig

import polar
from polar.fsdp2 import shard

LAYERS = 2
TEXT = {
    "vocab_size": 101,  # divides by no number of ranks: rows are cut unevenly
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": 28, "patch_size": 14}
CONFIGS: dict[str, Any] = {
    # Tied embeddings, buffers that no file holds, layers of two kinds that must not be split.
    "gemma3": Gemma3Config(text_config=TEXT, vision_config=VISION, mm_tokens_per_image=4),
    "llama": LlamaConfig(**TEXT, tie_word_embeddings=False),
}
CASES = [("gemma3", torch.bfloat16), ("gemma3", torch.float32), ("llama", torch.bfloat16)]


def build(name: str, dtype: torch.dtype) -> PeftModel:
    """Return base and adapter, factors off their start so that the adapter acts; on the default device."""
    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name]), dtype=dtype)
    targets = {"target_modules": ["q_proj", "down_proj"], "exclude_modules": r".*vision_tower.*"}
    return get_peft_model(base, polar.PolarConfig(r=5, init_theta="identity", **targets))


def run_case(name: str, dtype: torch.dtype, shard_size: int | None) -> dict[str, Any]:
    source = build(name, dtype) if dist.get_rank() == 0 else None
    with torch.device("meta"):
        skeleton = build(name, dtype)
    expected = [None if source is None else {n: (p.dtype, p.detach()) for n, p in source.named_parameters()}]
    dist.broadcast_object_list(expected, src=0)
    compute = torch.bfloat16 if dtype == torch.bfloat16 else None
    model = shard(skeleton, source, torch.device("cpu"), compute_dtype=compute, shard_size=shard_size)
    ids = torch.arange(24).reshape(2, 12)
    logits = [None if source is None else source(input_ids=ids).logits.float()]
    dist.broadcast_object_list(logits, src=0)
    with torch.no_grad():
        found = model(input_ids=ids).logits.float()
    whole: dict[str, torch.Tensor] = {n: p.full_tensor() for n, p in model.named_parameters()}
    return {
        "case": [name, str(dtype)],
        "names_equal": whole.keys() == expected[0].keys(),
        "wrong": [n for n, (kind, v) in expected[0].items() if whole[n].dtype != kind or not torch.equal(whole[n], v)],
        "trainable": sorted({str(p.dtype) for p in model.parameters() if p.requires_grad}),
        "logit_error": (found - logits[0]).abs().max().item() / logits[0].abs().max().item(),
        "bytes_here": sum(p.to_local().numel() * p.element_size() for p in model.parameters()),
        "bytes_whole": sum(v.numel() * v.element_size() for v in whole.values()),
        "units": sum(isinstance(module, FSDPModule) for module in model.modules()),
        "tied": _is_tied(model),
    }


def _is_tied(model: nn.Module) -> bool:
    return model.get_input_embeddings().weight is model.get_output_embeddings().weight  # type: ignore[operator]


def main() -> None:
    dist.init_process_group("gloo")
    ranks = dist.get_world_size()
    results = [run_case(name, dtype, 2 if ranks == 4 else None) for name, dtype in CASES]
    (Path(sys.argv[1]) / f"{ranks}-{dist.get_rank()}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
