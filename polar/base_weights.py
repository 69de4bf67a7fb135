"""Which weights of a base model have a spectrum of interest, and where they lie in its files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from polar.base_checkpoint import (
    TORCH_DTYPES,
    BaseModel,
    TensorEntry,
    parameter_names,
    read_entries,
    resolve_base,
    weight_files,
)
from polar.errors import UserError


@dataclass(frozen=True)
class StoredWeight:
    """A weight to be measured: `entry` is where it lies; W is (d_out, d_in) or its transpose."""

    name: str
    entry: TensorEntry


def find_weights(
    base: BaseModel, revision: str | None, include: Sequence[str], exclude: Sequence[str]
) -> list[StoredWeight]:
    """Return the stored weights of the linear layers that the patterns leave, in the order of the modules.

    Raises:
        UserError: none are left; weights that are quantised, missing or not 2-D; a truncated or missing shard.
    """
    if getattr(base.config, "quantization_config", None) is not None:
        raise UserError(f"base model {base.name} is quantised: spectra need its original weights; pass that model")
    names = layer_names(base, include, exclude)
    entries: dict[str, TensorEntry] = {}
    for file in weight_files(resolve_base(base.name, revision, weights=True)):
        entries.update({entry.name: entry for entry in read_entries(file)[0]})
    tensors = parameter_names(base.model, list(entries))
    weights = []
    for name in names:
        if f"{name}.weight" not in tensors:
            raise UserError(f"base model {base.name}: its files hold no weight of {name}: --exclude {name}")
        entry, linear = entries[tensors[f"{name}.weight"]], base.linears[name]
        if len(entry.shape) != 2:
            raise UserError(
                f"{entry.file}: the weight of {name} has {len(entry.shape)} dimensions, {entry.shape}; only matrices"
                f" have a spectrum: --exclude {name}"
            )
        shape = (linear.d_in, linear.d_out) if linear.transposed else (linear.d_out, linear.d_in)
        if entry.shape != shape:
            raise UserError(
                f"{entry.file}: the weight of {name} has shape {entry.shape}, config.json asks for {shape};"
                " download the model again"
            )
        if entry.dtype not in TORCH_DTYPES:
            raise UserError(f"{entry.file}: the weight of {name} is {entry.dtype}; pass a bf16, fp16 or fp32 model")
        weights.append(StoredWeight(name, entry))
    return weights


def layer_names(base: BaseModel, include: Sequence[str], exclude: Sequence[str]) -> list[str]:
    """Return the linear layers that are measured, in the order of the modules; arguments and errors: `find_weights`."""
    from polar.build_model import VISION_MODULES  # where training leaves them out too

    output = base.model.get_output_embeddings()
    heads = {name for name, module in base.model.named_modules() if module is output}
    linears = [
        name for name in base.linears
        if name not in heads and name not in base.tied_modules and not re.fullmatch(VISION_MODULES, name)
    ]  # fmt: skip
    names = [name for name in linears if not include or any(matches(pattern, name) for pattern in include)]
    for pattern in include:
        if not any(matches(pattern, name) for name in linears):
            raise UserError(f"--include {pattern!r} matches no linear layer of {base.name}{_why_not(base, pattern)}")
    names = [name for name in names if not any(matches(pattern, name) for pattern in exclude)]
    if not names:
        example = f"; a name of its layers is {linears[0]}" if linears else ""
        raise UserError(f"no linear layer of {base.name} is left by --exclude {' '.join(exclude)}{example}")
    return names


def _why_not(base: BaseModel, pattern: str) -> str:
    """Say what a pattern matches instead of a linear layer that can be scored."""
    for name, module in base.model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, torch.Tensor) and matches(pattern, name):
            if name in base.linears:
                return f": {name} is an output layer or in a vision tower, which are left out"
            return f": the weight of {name} has {weight.ndim} dimension(s) and is no linear layer's"
    endings = sorted({name.rpartition(".")[2] for name in base.linears})
    return f"; its linear layers end in {', '.join(endings)}"


def matches(pattern: str, name: str) -> bool:
    """Return whether a pattern names a module: its name, the ending of it after a dot, or a regular expression.

    Raises:
        UserError: none of these.
    """
    try:
        return name == pattern or name.endswith(f".{pattern}") or re.fullmatch(pattern, name) is not None
    except re.error as error:
        raise UserError(f"pattern {pattern!r} is no regular expression ({error}); a name does as well") from error
