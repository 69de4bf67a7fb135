"""The training state of an adapter, whole and by parameter name, whatever engine holds it.

A parameter's fp32 values and its optimizer moments lie in the same place: `polar.shards` says which range of which leaf
is this rank's, and an optimizer keeps its moments in tensors shaped like the leaf. So one rule reads and writes all of
it, and what was read under ZeRO-3 on two ranks can be written under DDP, on one process, or on three ranks:

    read     zeros of the whole size, this rank's range copied in, summed over the ranks; many parameters at a time
    write    every rank copies its own range out of the whole tensor; then the engine renews its compute copies

DeepSpeed 0.19.8 has setters for whole tensors, which fail where numel is no multiple of the number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from polar.errors import UserError
from polar.shards import FactorSlice, all_reduce, resolve, zero12_engine

BUCKET_NUMEL = 2**25  # elements summed over the ranks at a time: 128 MiB of fp32
STEP = "step"  # the one entry of an optimizer's state that counts instead of holding values


@dataclass(frozen=True)
class OptimizerState:
    """What an optimizer knows, whole, without its hyper-parameters.

    Attributes:
        kind: class of the optimizer.
        moments: on the main process `{parameter: {key: tensor}}`; elsewhere the tensors are left out.
        steps: `{parameter: number of steps}`, for parameters that the optimizer has stepped.
        problem: why the moments cannot be kept, empty if they are all there.
    """

    kind: str
    moments: dict[str, dict[str, Tensor]]
    steps: dict[str, float]
    problem: str = ""


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of `model` that are trained, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def whole_values(model: nn.Module) -> dict[str, Tensor]:
    """Return every trainable parameter whole, on the CPU, in fp32 where the engine keeps fp32. Collective."""
    parameters = trainable_parameters(model)
    slices = resolve(parameters, model)
    found = whole_of(slices)
    return {name: found[name].view(whole_shape(parameter)) for name, parameter in parameters.items()}


def whole_of(slices: Mapping[str, FactorSlice]) -> dict[str, Tensor]:
    """Return some parameters whole and flat, by name, on the CPU of every rank. Collective.

    Args:
        slices: what `polar.shards.resolve` returned for them; the same names in the same order on every rank.
    """
    return dict(_whole(((name, item, item.values()) for name, item in slices.items()), lambda _: True))


def whole_optimizer_state(model: nn.Module, optimizer: Any, *, keep: bool) -> OptimizerState:
    """Return the optimizer's state by parameter name. Collective.

    Args:
        model: the model whose trainable parameters `optimizer` steps.
        optimizer: a torch optimizer, or what accelerate and DeepSpeed wrap around one.
        keep: whether this process wants the tensors; the others take part and throw them away.
    """
    inner = inner_optimizer(optimizer)
    parameters = trainable_parameters(model)
    slices = resolve(parameters, model)
    steps, items = {}, []
    for name, item in slices.items():
        for key, value in inner.state.get(item.leaf, {}).items():
            if key == STEP:
                steps[name] = float(value)
                continue
            if not isinstance(value, Tensor):
                continue
            problem = _why_not_sliceable(item, key, value)
            if not problem and _is_8bit(inner) and not _is_whole(item):
                problem = "it chooses 8 or 32 bits by the size of what it steps, here a flat partition"
            if problem:
                return OptimizerState(type(inner).__name__, {}, {}, f"{type(inner).__name__}: {problem}")
            items.append(((name, key), item, value))
    moments: dict[str, dict[str, Tensor]] = {}
    wholes = _whole(((place, item, _slice_of(item, value)) for place, item, value in items), lambda _: keep)
    for (name, key), value in wholes:
        shape = whole_shape(parameters[name])
        moments.setdefault(name, {})[key] = value.view(shape) if value.numel() == shape.numel() else value
    return OptimizerState(type(inner).__name__, moments, steps)


def write_values(model: nn.Module, read: Callable[[str], Tensor]) -> None:
    """Give every trainable parameter its values, in the engine's fp32 copies and in those it computes with. Collective.

    Args:
        model: set up by the engine.
        read: returns the whole value of a parameter, by name.
    """
    slices = resolve(trainable_parameters(model), model)
    with torch.no_grad():
        for name, item in slices.items():
            item.values().copy_(_range_of(item, read(name)))
    refresh_compute_copies(model)


def write_optimizer_state(
    model: nn.Module, optimizer: Any, keys: dict[str, list[str]], steps: dict[str, float], read: Callable[..., Tensor]
) -> None:
    """Give the optimizer its moments and step counts, as if it had made these steps itself.

    Args:
        model: set up by the engine.
        optimizer: the engine's, wrapped or not.
        keys: which moments each parameter has.
        steps: how often each parameter was stepped.
        read: returns a whole moment; called with the parameter's name and the key.
    """
    inner = inner_optimizer(optimizer)
    slices = resolve(trainable_parameters(model), model)
    is_torch = type(inner).__module__.startswith(("torch.optim", "polar."))  # others count steps in an int
    with torch.no_grad():
        for name, item in slices.items():
            state = inner.state[item.leaf] if name in steps or keys.get(name) else {}
            for key in keys.get(name, []):
                whole = read(name, key)
                if whole.numel() != item.n * item.r or not whole.is_floating_point():
                    if not _is_whole(item):
                        raise UserError(
                            f"the checkpoint's {key} of {name} cannot be cut: resume on one process or under DDP, "
                            "as it was made"
                        )
                    state[key] = whole.to(item.device)  # 8-bit moments and their scales, which no slice has
                    continue
                if key not in state:
                    dtype = item.leaf.dtype if is_torch or item.group is not None else whole.dtype
                    state[key] = torch.zeros_like(item.leaf, dtype=dtype, requires_grad=False)
                _slice_of(item, state[key]).copy_(_range_of(item, whole))
            if name in steps:
                # Parameters that share a flat leaf have made the same steps.
                count = max(steps[name], float(state.get(STEP, 0)))
                state[STEP] = _step_tensor(inner, item.leaf, count) if is_torch else int(count)


def refresh_compute_copies(model: nn.Module) -> None:
    """Copy the fp32 values of DeepSpeed's flat partitions to what the model computes with. Collective.

    As at the end of a step of DeepSpeed 0.19.8; without an engine there is one copy only, and nothing to do.
    """
    engine = zero12_engine(model)
    if engine is not None:
        engine.update_lp_params()
        return
    engine = next((p._z3_optimizer for p in model.parameters() if hasattr(p, "_z3_optimizer")), None)
    if engine is not None:
        engine.checkpoint_event_prologue()  # gives up gathered parameters
        for index in range(len(engine.fp16_groups)):
            engine._reassign_or_swap_out_partitioned_parameters(index)
        engine.checkpoint_event_epilogue()  # gathers those again that always stay gathered


def inner_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """Return the optimizer that really steps, below accelerate's and DeepSpeed's wrappers."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def _is_8bit(optimizer: torch.optim.Optimizer) -> bool:
    return type(optimizer).__module__.startswith("bitsandbytes")


def whole_shape(parameter: Any) -> torch.Size:
    """Return the shape of a parameter, also where ZeRO-3 has left an empty tensor in its place."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def _is_whole(item: FactorSlice) -> bool:
    """Whether the optimizer steps this parameter as it is, and not as a range of something flat."""
    return item.group is None and item.leaf.numel() == item.numel


def _why_not_sliceable(item: FactorSlice, key: str, value: Tensor) -> str:
    """Say why an entry of the optimizer's state cannot be cut like the values; empty if it can, or need not."""
    if _is_whole(item) or (item.storage().shape == _local(value).shape and value.is_floating_point()):
        return ""
    return f"its {key} of {item.name} cannot be cut like the parameter"


def _whole(
    items: Iterable[tuple[Any, FactorSlice, Tensor]], wanted: Callable[[Any], bool]
) -> Iterator[tuple[Any, Tensor]]:
    """Yield (key, whole flat tensor on the CPU) for (key, slice, local range); the order of keys is kept per group."""
    waiting: dict[Any, list[tuple[Any, FactorSlice, Tensor]]] = {}
    for key, item, local in items:
        if item.group is None:
            if wanted(key):
                yield key, local.detach().to("cpu", copy=True)
            continue
        bucket = waiting.setdefault(item.group, [])
        bucket.append((key, item, local))
        if sum(other.n * other.r for _, other, _ in bucket) >= BUCKET_NUMEL:
            yield from _summed(waiting.pop(item.group), wanted)
    for bucket in waiting.values():
        yield from _summed(bucket, wanted)


def _summed(
    bucket: list[tuple[Any, FactorSlice, Tensor]], wanted: Callable[[Any], bool]
) -> Iterator[tuple[Any, Tensor]]:
    group, device = bucket[0][1].group, bucket[0][1].device
    assert group is not None
    buffer = torch.zeros(sum(item.n * item.r for _, item, _ in bucket), dtype=torch.float32, device=device)
    begin, places = 0, []
    for key, item, local in bucket:
        buffer[begin + item.start : begin + item.end].copy_(local)
        places.append((key, begin, begin + item.n * item.r))
        begin += item.n * item.r
    all_reduce(buffer.view(torch.int32), group)  # bits plus zeros: nothing is rounded, and -0.0 stays what it is
    for key, start, end in places:
        if wanted(key):
            yield key, buffer[start:end].to("cpu", copy=True)


def _range_of(item: FactorSlice, whole: Tensor) -> Tensor:
    if whole.numel() != item.n * item.r:
        raise UserError(f"{item.name} has {item.n * item.r:,} elements, the checkpoint has {whole.numel():,}")
    return whole.reshape(-1)[item.start : item.end]


def _slice_of(item: FactorSlice, state: Tensor) -> Tensor:
    """1-D view of the range of `item` in a tensor that is shaped like its leaf; all of it, if it is not."""
    local = _local(state)
    if local.shape != item.storage().shape:
        return local.reshape(-1)
    return local.view(-1)[item.offset : item.offset + item.numel]


def _local(tensor: Any) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _step_tensor(optimizer: torch.optim.Optimizer, leaf: Tensor, count: float) -> Tensor:
    """The step count as torch's own optimizers keep it: beside the parameter only where a kernel reads it."""
    beside = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
    return torch.tensor(count, dtype=torch.float32, device=leaf.device if beside else "cpu")
