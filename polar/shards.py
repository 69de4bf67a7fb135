"""A Stiefel factor as flat slices: the only place that knows where each engine keeps its fp32 values.

Every engine can describe its share of a factor of shape (n, r) as a range `[start, end)` of the row-major flattening,
together with the tensor that the engine's optimizer really steps (the *leaf*) and the place of the range in it:

    engine              leaf                                            range
    one process, DDP    the parameter itself                            everything, no process group
    ZeRO-1, ZeRO-2      the flat fp32 partition of its parameter group  what of the group falls on this rank
    ZeRO-3              the flat fp32 partition of its sub-group        rank * partition_numel, clipped to numel
    FSDP2               the parameter (DTensor), its local tensor       whole rows, unevenly, perhaps none

A slice may begin and end inside a row, because ZeRO cuts where it likes. Every rank knows all `cuts`, so each can tell
who holds the pieces of a cut row (`polar.cut_rows`).
"""

from __future__ import annotations

import gc
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from polar.compatibility import refused_engine
from polar.errors import UserError


@dataclass(frozen=True)
class FactorSlice:
    """This rank's part of one Stiefel factor.

    Attributes:
        name: where the factor is in the model, for messages.
        n, r: shape of the whole factor.
        start, end: the range held here, in the row-major flattening of (n, r); empty when start == end.
        leaf: the tensor that the optimizer steps; it holds the values, and its `.grad` the gradient at that time.
        offset: where the range begins in the flattened local leaf.
        group: process group whose ranks together hold the factor once, or None when this rank holds all of it.
        cuts: where in the flattening the slices of the group's ranks 1, 2, ... begin, ascending; those outside of
            [0, n * r] cut nothing. The same on every rank; empty where ranks hold nothing but whole rows.
        engine: who holds it, as `polar.compatibility` names engines.
    """

    name: str
    n: int
    r: int
    start: int
    end: int
    leaf: Tensor
    offset: int
    group: dist.ProcessGroup | None
    cuts: Sequence[int] = ()
    engine: str = "one process"

    @property
    def numel(self) -> int:
        """Number of elements held here."""
        return self.end - self.start

    @property
    def device(self) -> torch.device:
        """Where the values are."""
        return self.leaf.device

    def storage(self) -> Tensor:
        """The local tensor, of any shape, that holds the values, and at that time perhaps those of other factors."""
        return _local(self.leaf.detach())

    def grad_storage(self) -> Tensor | None:
        """The same for the gradient, None where backward left none."""
        return None if self.leaf.grad is None else _local(self.leaf.grad.detach())

    def values(self) -> Tensor:
        """1-D view of the values held here."""
        return self._view(self.storage())

    def grad(self) -> Tensor | None:
        """1-D view of their gradient, None where backward left none."""
        storage = self.grad_storage()
        return None if storage is None else self._view(storage)

    def _view(self, tensor: Tensor) -> Tensor:
        return tensor.view(-1)[self.offset : self.offset + self.numel]


def resolve(parameters: Mapping[str, nn.Parameter], model: nn.Module) -> dict[str, FactorSlice]:
    """Ask the factors of a model where their fp32 values live. Call it when the engine is set up, at the first step.

    Args:
        parameters: the factors by name. Parameters of other shapes work too, as (first dimension, the rest): a
            checkpoint slices every trainable parameter.
        model: the model that they belong to; some engines can only be found through other parameters.

    Raises:
        UserError: the engine that holds a factor is not supported.
    """
    engine = zero12_engine(model)
    return {name: _resolve_one(name, parameter, engine) for name, parameter in parameters.items()}


def related_leaves(model: nn.Module) -> list[Tensor]:
    """All tensors that the optimizer of this model's engine may step, whether or not they hold factors."""
    leaves: list[Tensor] = list(model.parameters())
    engine = zero12_engine(model)
    if engine is not None:
        return leaves + list(engine.single_partition_of_fp32_groups)
    for parameter in model.parameters():
        if hasattr(parameter, "_z3_optimizer"):
            return leaves + list(parameter._z3_optimizer.fp32_partitioned_groups_flat)
    return leaves


def all_reduce(buffer: Tensor, group: dist.ProcessGroup) -> None:
    """Sum over the ranks of a group, in place; through the accelerator where offloaded values meet an NCCL group."""
    moved = _where_group_talks(buffer, group)
    dist.all_reduce(moved, group=group)
    if moved is not buffer:
        buffer.copy_(moved)


def all_to_all(rows: Tensor, num_sent: list[int], num_received: list[int], group: dist.ProcessGroup) -> Tensor:
    """Send rows to the ranks of a group, `num_sent[k]` to rank k in that order; return what they sent, likewise.

    Through the accelerator as in `all_reduce`. Collective, also for a rank that has nothing to send.
    """
    moved = _where_group_talks(rows, group)
    received = moved.new_empty(sum(num_received), *rows.shape[1:])
    dist.all_to_all_single(received, moved, num_received, num_sent, group=group)
    return received.to(rows.device)


def _where_group_talks(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    devices = [device.type for device in group._device_types]
    return tensor if tensor.device.type in devices else tensor.to(devices[0])


def _local(tensor: Any) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def zero12_engine(model: nn.Module) -> Any:
    """The ZeRO-1/2 optimizer that holds parameters of this model, None where there is none.

    DeepSpeed 0.19.8 leaves no reference from a parameter to it (`_zero_optimizer` only with offload), and the inner
    optimizer that our hooks see does not know it either, so the garbage collector is asked, once per set-up.
    """
    module = sys.modules.get("deepspeed.runtime.zero.stage_1_and_2")
    sharded = {id(parameter) for parameter in model.parameters() if hasattr(parameter, "_hp_mapping")}
    if module is None or not sharded:
        return None

    def search() -> Any:
        for candidate in gc.get_objects():
            # By type: isinstance asks each object for its __class__, and some of torch's answer with a warning.
            if issubclass(type(candidate), module.DeepSpeedZeroOptimizer) and any(
                id(parameter) in sharded for group in candidate.bit16_groups for parameter in group
            ):
                return candidate
        return None

    found = search()
    if found is None and gc.get_freeze_count():  # a loop that calls gc.freeze() hides what was made before
        gc.unfreeze()
        found = search()
        gc.freeze()
    return found


def _resolve_one(name: str, parameter: nn.Parameter, zero_engine: Any) -> FactorSlice:
    if hasattr(parameter, "ds_id"):
        return _resolve_zero3(name, parameter)
    if hasattr(parameter, "_hp_mapping"):
        return _resolve_zero12(name, parameter, zero_engine)
    if hasattr(parameter, "device_mesh"):
        return _resolve_fsdp2(name, parameter)
    if getattr(parameter, "_fsdp_flattened", False):
        raise refused_engine("FSDP1 (FullyShardedDataParallel)", name)
    if not parameter.is_contiguous():
        raise UserError(f"{name} has strides {parameter.stride()}: store it contiguously, as (n, r) row-major")
    n, r = _rows_of(parameter.shape)
    return FactorSlice(name, n, r, 0, n * r, parameter, 0, None)


def _rows_of(shape: Sequence[int]) -> tuple[int, int]:
    """(n, r) of a tensor of any shape: its first dimension, and the product of the others."""
    return (shape[0], math.prod(shape[1:])) if len(shape) else (1, 1)


def _resolve_zero3(name: str, parameter: Any) -> FactorSlice:
    # DeepSpeed 0.19.8. Sub-group and offset are `grad_position`; there is no public way to ask for a writable view of
    # the fp32 partition (the setters of deepspeed.utils fail when numel % world_size != 0).
    engine = getattr(parameter, "_z3_optimizer", None)
    if engine is None:
        raise UserError(
            f"{name} is partitioned by ZeRO-3 but no ZeRO-3 optimizer holds it: add the adapter before "
            "deepspeed.initialize and step with the engine's optimizer"
        )
    n, r = _rows_of(parameter.ds_shape)
    sub_group, offset, _ = engine.grad_position[engine.get_param_id(parameter)]
    leaf = engine.fp32_partitioned_groups_flat[sub_group]
    if leaf is None or leaf.numel() == 0:
        raise refused_engine("ZeRO with NVMe offload", name)
    group, share, numel = parameter.ds_process_group, parameter.partition_numel(), n * r
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    start, end = min(rank * share, numel), min((rank + 1) * share, numel)
    cuts = range(share, ranks * share, share)
    return FactorSlice(name, n, r, start, end, leaf, offset, group if ranks > 1 else None, cuts, "ZeRO-3")


def _resolve_zero12(name: str, parameter: Any, engine: Any) -> FactorSlice:
    # DeepSpeed 0.19.8: a parameter group is flattened (in `round_robin_bit16_groups` order, with padding between
    # parameters) and cut into equal partitions. `_hp_mapping` says the same for this rank alone; all cuts are needed.
    if engine is None:
        raise refused_engine("DeepSpeed's BF16_Optimizer", name)
    n, r = _rows_of(parameter.shape)
    for index, members in enumerate(engine.round_robin_bit16_groups):
        for member, begin in zip(members, engine.round_robin_bit16_offsets[index], strict=True):
            if member is parameter:
                group, share = engine.real_dp_process_group[index], engine.partition_size[index]
                ranks, rank, numel = dist.get_world_size(group), dist.get_rank(group), n * r
                start, end = (min(max(k * share - begin, 0), numel) for k in (rank, rank + 1))
                cuts = range(share - begin, ranks * share - begin, share)
                leaf = engine.single_partition_of_fp32_groups[index]
                offset = max(begin - rank * share, 0) if end > start else 0
                group = group if ranks > 1 else None
                stage = "ZeRO-2" if engine.partition_gradients else "ZeRO-1"
                return FactorSlice(name, n, r, start, end, leaf, offset, group, cuts, stage)
    raise UserError(f"{name} is in no parameter group of the ZeRO optimizer: create the engine after the adapter")


def _resolve_fsdp2(name: str, parameter: Any) -> FactorSlice:
    n, r = _rows_of(parameter.shape)
    group, rows, start_row = None, parameter.to_local().shape[0], 0
    for dimension, placement in enumerate(parameter.placements):
        if placement.is_replicate():
            continue
        if not placement.is_shard(0) or group is not None:
            raise UserError(
                f"{name} is placed as {parameter.placements}: manifold steps need one dimension that shards rows"
            )
        group = parameter.device_mesh.get_group(dimension)
        ranks, rank = dist.get_world_size(group), dist.get_rank(group)
        share = -(-n // ranks)  # torch.chunk: equal parts of the rounded-up size, the last ones short or empty
        start_row = min(rank * share, n)
        assert rows == min((rank + 1) * share, n) - start_row, (name, rows, start_row)
        group = group if ranks > 1 else None
    return FactorSlice(name, n, r, start_row * r, (start_row + rows) * r, parameter, 0, group, (), "FSDP2")
