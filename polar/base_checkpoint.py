"""What a base model's checkpoint holds, read from its config and its safetensors headers: no weights are loaded.

Two sets of names meet here. *Module names* are those of the model that transformers builds (and that PEFT writes into
an adapter); *tensor names* are those in the checkpoint's files. They differ for Gemma-3 and its relatives:
`model.language_model.layers.0.mlp.up_proj` lies in the files as `language_model.model.layers.0.mlp.up_proj.weight`.
"""

from __future__ import annotations

import json
import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from polar.errors import UserError

# safetensors' names for element types, https://github.com/huggingface/safetensors (README, "Format").
TORCH_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
SAFETENSORS_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
INDEX_NAME = "model.safetensors.index.json"


@dataclass(frozen=True)
class LinearModule:
    """A layer that an adapter can stand on: W is (d_out, d_in), stored as (d_in, d_out) when `transposed` (Conv1D)."""

    d_out: int
    d_in: int
    transposed: bool = False


@dataclass(frozen=True)
class TensorEntry:
    """One tensor in a safetensors file: `start` is the byte offset in the file, `num_bytes` its length."""

    file: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    num_bytes: int


@dataclass(frozen=True)
class BaseModel:
    """A base model without its weights.

    `linears` maps module names to sizes, `tied_modules` are the modules whose weight is another module's, and
    `model` is the architecture on the meta device.
    """

    name: str
    folder: Path
    config: Any
    model: Any
    linears: dict[str, LinearModule]
    tied_modules: frozenset[str]


def resolve_base(name: str, revision: str | None = None, weights: bool = False) -> Path:
    """Return the local folder of a base model given as a folder or a hub id.

    Args:
        name: a folder, or a hub id, which is looked up in the cache first and downloaded only if it is not there.
        revision: hub branch, tag or commit.
        weights: whether the safetensors files are needed too; without them the config is enough.

    Raises:
        UserError: neither a folder with a config nor a hub id that can be had.
    """
    folder = Path(name)
    if name.strip() and folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"base model {name}: the folder has no config.json; pass the folder that holds the model")
        return folder
    if not name.strip() or name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise UserError(
            f"base model {name!r}: no such folder; pass a model folder or a hub id such as google/gemma-3-27b-pt"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.txt", "*.model", "*.jinja", *(["*.safetensors"] if weights else [])]
    try:
        try:
            cached = Path(snapshot_download(name, revision=revision, allow_patterns=patterns, local_files_only=True))
            # A cache that an earlier config-only call has filled is a folder too, so look for what is needed.
            if (cached / "config.json").is_file() and (not weights or any(cached.glob("*.safetensors"))):
                return cached
        except LocalEntryNotFoundError:
            pass
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = type(error).__name__
        raise UserError(
            f"base model {name!r}: not a folder, not in the hub cache, and it could not be downloaded ({reason});"
            " pass --base FOLDER, or fetch it first where there is network"
        ) from error


def describe_base(name: str, revision: str | None = None, task_type: str | None = None) -> BaseModel:
    """Build the base architecture on the meta device and list its linear layers.

    Args:
        name: a folder or a hub id.
        revision: hub branch, tag or commit.
        task_type: PEFT's task type; `SEQ_CLS` selects a classification class, else the causal one where there is one.
    """
    import transformers
    from transformers.pytorch_utils import Conv1D

    folder = resolve_base(name, revision)
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
    except (ValueError, OSError, KeyError) as error:
        raise UserError(
            f"base model {name}: config.json cannot be read: {_first_line(error)}; check the folder"
        ) from error
    try:
        with torch.device("meta"):
            model = _architecture(config, task_type)
    except (ValueError, AttributeError) as error:
        raise UserError(f"base model {name}: {_first_line(error)}; transformers must know the architecture") from error
    linears: dict[str, LinearModule] = {}
    for module_name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            linears[module_name] = LinearModule(module.out_features, module.in_features)
        elif isinstance(module, Conv1D):
            d_in, d_out = module.weight.shape
            linears[module_name] = LinearModule(d_out, d_in, transposed=True)
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    tied_parameters = set(tied) | (set(tied.values()) if isinstance(tied, dict) else set())
    tied_modules = frozenset(parameter.rpartition(".")[0] for parameter in tied_parameters)
    return BaseModel(name, folder, config, model, linears, tied_modules)


def _architecture(config: Any, task_type: str | None) -> Any:
    import transformers

    if task_type == "SEQ_CLS":
        return transformers.AutoModelForSequenceClassification.from_config(config)
    if type(config) in transformers.AutoModelForCausalLM._model_mapping:
        return transformers.AutoModelForCausalLM.from_config(config)
    names = getattr(config, "architectures", None) or []
    if not names or not hasattr(transformers, names[0]):
        raise ValueError(f"unknown architecture {names}")
    return getattr(transformers, names[0])._from_config(config)


def refuse_quantized(base: BaseModel) -> None:
    """Raise where the checkpoint holds quantised weights, to which a delta cannot be added without loss."""
    quantization = getattr(base.config, "quantization_config", None)
    if quantization is not None:
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else "unknown"
        raise UserError(
            f"base model {base.name} is quantised ({method}): merge into the unquantised checkpoint"
            " (--base), or use --format lora"
        )


def read_entries(file: str | os.PathLike[str]) -> tuple[list[TensorEntry], dict[str, str]]:
    """Read the header of a safetensors file.

    Returns:
        The tensors in the order of their bytes, and the file's metadata.

    Raises:
        UserError: not a safetensors file, or its length is not what the header says (truncated download).
    """
    path = Path(file)
    size = path.stat().st_size
    try:
        with path.open("rb") as stream:
            (header_bytes,) = struct.unpack("<Q", stream.read(8))
            if header_bytes > size:
                raise ValueError("header longer than the file")
            header = json.loads(stream.read(header_bytes))
        metadata = header.pop("__metadata__", {})
        first = 8 + header_bytes
        entries = [
            TensorEntry(
                str(path), name, item["dtype"], tuple(item["shape"]), first + item["data_offsets"][0], _length(item)
            )
            for name, item in header.items()
        ]
    except (struct.error, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: not a whole safetensors file ({_first_line(error)}); copy or download it again"
        ) from error
    entries.sort(key=lambda entry: (entry.start, entry.num_bytes))
    end = max((entry.start + entry.num_bytes for entry in entries), default=first)
    if end != size:
        raise UserError(f"{path}: truncated, {size} bytes where the header asks for {end}; copy or download it again")
    return entries, metadata


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a model folder, in the order of its index.

    Raises:
        UserError: none, a shard missing, or weights in another format (pickles are never opened).
    """
    index = folder / INDEX_NAME
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise UserError(
                f"base model {folder}: shard {missing[0]} of the index is missing; download the model again"
            )
        return [folder / name for name in names]
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    others = sorted(path.name for path in folder.glob("*.bin"))
    if others:
        raise UserError(f"base model {folder}: weights only as pickle ({others[0]}); convert them to safetensors first")
    raise UserError(f"base model {folder}: no model.safetensors; pass the folder that holds the weights")


def parameter_names(model: Any, tensor_names: list[str]) -> dict[str, str]:
    """Map parameter names of `model` to tensor names of its checkpoint, as `from_pretrained` would.

    Tensors that transformers converts on loading (fused experts and the like) are left out: no row of such a tensor
    belongs to one parameter.

    Args:
        model: the architecture, on the meta device.
        tensor_names: all names in the checkpoint.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    state = model.state_dict()
    mapping: dict[str, str] = {}
    for tensor_name in tensor_names:
        parameter, converted = rename_source_key(tensor_name, renamings, converters, model.base_model_prefix, state)
        if converted is None and parameter in state:
            mapping[parameter] = tensor_name
    return mapping


def checkpoint_gib(folder: Path) -> float | None:
    """Size of the safetensors files in GiB (2^30 bytes); None where there are none."""
    sizes = [path.stat().st_size for path in folder.glob("*.safetensors")]
    return sum(sizes) / 2**30 if sizes else None


def _length(item: dict[str, Any]) -> int:
    begin, end = item["data_offsets"]
    if item["dtype"] in TORCH_DTYPES:
        expected = math.prod(item["shape"]) * TORCH_DTYPES[item["dtype"]].itemsize
        if end - begin != expected:
            raise ValueError(f"{end - begin} bytes for a tensor of {expected}")
    return int(end - begin)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
