"""One ZeRO-3 rank that reads and merges weights which are partitioned: `tuner_zero3_worker.py OUT`."""

from __future__ import annotations

import sys
from pathlib import Path

import deepspeed
import torch
from peft import convert_to_lora, get_peft_model
from safetensors.torch import save_file
from torch import nn

from polar import PolarConfig, PolarLinear
from polar.launch import join_deepspeed

CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
    "zero_force_ds_cpu_optimizer": False,
}


def build(partitioned: bool) -> nn.Module:
    """Return a small adapted network; its base is partitioned from the start, as transformers loads one."""
    torch.manual_seed(0)
    with deepspeed.zero.Init(config_dict_or_path=CONFIG, enabled=partitioned):
        base = nn.Sequential(nn.Linear(13, 9), nn.Tanh(), nn.Linear(9, 5))
    torch.manual_seed(1)
    for p in base.parameters():  # zero.Init broadcasts rank 0's values; set the same ones in both cases
        with deepspeed.zero.GatheredParameters(p, modifier_rank=0, enabled=partitioned):
            values = torch.randn(getattr(p, "ds_shape", p.shape))
            if p.numel():
                p.data.copy_(values)
    torch.manual_seed(2)
    config = PolarConfig(r=3, alpha=6, target_modules=["0", "2"], init_factors="svd", init_weights=False)
    return get_peft_model(base, config)


def collect(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return everything that needs whole weights: start, delta, output, LoRA, merged output, output after unmerging."""
    x = torch.linspace(-1, 1, 4 * 13).view(4, 13)
    found = {}
    for name, layer in model.named_modules():
        if isinstance(layer, PolarLinear):
            found[f"{name}.delta"] = layer.get_delta_weight("default").detach()
    found |= {f"lora.{k}": v for k, v in convert_to_lora(model, rank=3)[1].items()}
    with torch.no_grad():
        found["out"] = model(x)
        model.merge_adapter()
        found["merged"] = model(x)
        model.unmerge_adapter()
        model.merge_adapter(safe_merge=True)
        found["merged_safely"] = model(x)
        model.unmerge_adapter()
        found["unmerged"] = model(x)
    return {name: value.contiguous().clone() for name, value in found.items()}


def main(out: Path) -> None:
    """Write the values of the whole model and of the partitioned one."""
    join_deepspeed()  # without compiling DeepSpeed's own all-reduce
    rank = torch.distributed.get_rank()
    save_file(collect(build(partitioned=False)), out / f"whole-{rank}.safetensors")
    model = build(partitioned=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    engine, *_ = deepspeed.initialize(model=model, config=CONFIG, model_parameters=trained)
    assert all(hasattr(p, "ds_id") for p in model.parameters())
    save_file(collect(engine.module), out / f"partitioned-{rank}.safetensors")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
