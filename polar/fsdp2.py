"""FSDP2 in `polar.train`: base and adapter cut by rows over the ranks, layer by layer, without accelerate.

accelerate 1.15 casts every parameter to fp32 when it prepares a model for FSDP2 with mixed precision, which doubles a
frozen bf16 base, and on CPUs it runs DDP instead without a word. torch's `fully_shard` needs neither: since only the
adapter is trained, a layer's fp32 factors and its bf16 weights can be one unit (torch 2.13 asks for one dtype among
trainable parameters alone). So `engine: fsdp2` means the same on GPUs and, for tests, on CPUs:

1. every rank builds model and adapter on the meta device;
2. layer by layer, parameters get memory and are cut at once, so no rank ever holds more than a layer beside its share;
3. rank 0 alone reads the weights, into host memory, and sends each rank its rows;
4. the Trainer is told that the model owns its placement (transformers 5.23, `is_distributed_loading_by_transformers`).

`fsdp_shard_size: N` cuts within groups of N consecutive ranks (the GPUs of a node), and each group holds it all (HSDP).
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from polar.errors import UserError


def make_mesh(device: torch.device, shard_size: int | None) -> DeviceMesh:
    """Return the mesh of all ranks: (shard) or, with a `shard_size` below their number, (replicate, shard)."""
    ranks = dist.get_world_size()
    if shard_size is None or shard_size == ranks:
        return init_device_mesh(device.type, (ranks,), mesh_dim_names=("shard",))
    return init_device_mesh(device.type, (ranks // shard_size, shard_size), mesh_dim_names=("replicate", "shard"))


def shard(
    skeleton: nn.Module,
    source: nn.Module | None,
    device: torch.device,
    *,
    compute_dtype: torch.dtype | None,
    shard_size: int | None = None,
) -> nn.Module:
    """Cut a model over all ranks and fill it with the values of `source`. Collective.

    Args:
        skeleton: the adapted model on the meta device; changed in place.
        source: on rank 0 the same model with values, on the CPU; None elsewhere.
        device: where this rank computes.
        compute_dtype: of all-gathered weights and of activations (bfloat16), None: as stored. Gradients of the adapter
            are summed over ranks in fp32 either way, and its stored values keep their dtype.
        shard_size: ranks per group, None: all.

    Returns:
        `skeleton`, whose parameters are DTensors with sharded rows.
    """
    mesh = make_mesh(device, shard_size)
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32 if compute_dtype else None)
    made: dict[int, torch.Tensor] = {}
    for layer in layers_of(skeleton):
        _give_memory(layer, device, made)
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    _give_memory(skeleton, device, made)
    # By default the root stays whole after a forward, even without a backward: a save after an evaluation would
    # find plain tensors in its place.
    fully_shard(skeleton, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    values = source.state_dict() if source is not None else {}
    set_model_state_dict(
        skeleton, values, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=True)
    )
    _send_buffers(skeleton, source)
    _announce_to_trainer(skeleton)
    return skeleton


def layers_of(model: nn.Module) -> list[nn.Module]:
    """Return the modules that become units of their own: the layers that a transformers model must not split.

    A model that names none (DeBERTa in transformers 5.23) has them in its longest list of equal modules.

    Raises:
        UserError: there is no such list either, so that all of it would be gathered at once.
    """
    names = set()
    for module in model.modules():
        names |= set(getattr(module, "_no_split_modules", None) or ())
    found = [module for module in model.modules() if type(module).__name__ in names]
    inside = {id(inner) for module in found for inner in module.modules() if inner is not module}
    outermost = [module for module in found if id(module) not in inside]
    if not outermost:
        lists = [list(m) for m in model.modules() if isinstance(m, nn.ModuleList) and len({type(x) for x in m}) == 1]
        outermost = max(lists, key=len, default=[])
    if not outermost:
        raise UserError(
            f"engine fsdp2: {type(model).__name__} does not name its layers (_no_split_modules): use --deepspeed "
            "ds_configs/zero3.json"
        )
    return outermost


def _give_memory(module: nn.Module, device: torch.device, made: dict[int, torch.Tensor]) -> None:
    """Replace meta parameters and buffers by uninitialised ones; tied ones stay tied through `made`."""
    for owner in module.modules():
        for tensors in (owner._parameters, owner._buffers):
            for name, tensor in tensors.items():
                if tensor is None or not tensor.is_meta:
                    continue
                if id(tensor) not in made:
                    fresh = torch.empty_like(tensor, device=device)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    made[id(tensor)] = nn.Parameter(fresh, tensor.requires_grad) if is_parameter else fresh
                tensors[name] = made[id(tensor)]  # type: ignore[assignment]  # one of two mappings


def _send_buffers(model: nn.Module, source: nn.Module | None) -> None:
    """Send buffers, such as rotary frequencies, which a state dict may leave out. Collective."""
    values = dict(source.named_buffers()) if source is not None else {}
    for name, buffer in model.named_buffers():
        if dist.get_rank() == 0:
            buffer.copy_(values[name])
        dist.broadcast(buffer, src=0)


def _announce_to_trainer(model: nn.Module) -> None:
    for module in model.modules():
        if hasattr(type(module), "_is_distributed_loading_by_transformers"):
            module._is_distributed_loading_by_transformers = True  # type: ignore[assignment]
