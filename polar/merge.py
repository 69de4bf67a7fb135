"""Add an adapter to its base's safetensors files, a few rows at a time: merging 27B needs megabytes, not a model.

Files are read and written by byte ranges rather than mapped, so that memory stays at one block whatever the shard size.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from polar.adapter_file import AdapterFile
from polar.base_checkpoint import (
    INDEX_NAME,
    SAFETENSORS_NAMES,
    TORCH_DTYPES,
    BaseModel,
    TensorEntry,
    parameter_names,
    read_entries,
    refuse_quantized,
    resolve_base,
    weight_files,
)
from polar.errors import UserError
from polar.files import write_json

BLOCK_BYTES = 8 * 2**20  # fp32 bytes of W that are in memory at once; the working set is about five times this
COPIED_SUFFIXES = {".json", ".txt", ".model", ".jinja", ".tiktoken"}


@dataclass(frozen=True)
class Edit:
    """What happens to one stored tensor: `new` replaces it, or `left @ right` (fp32) is added to it.

    Both factors are in the orientation of the stored tensor: (rows, r) and (r, columns).
    """

    left: torch.Tensor | None = None
    right: torch.Tensor | None = None
    new: torch.Tensor | None = None


@dataclass
class MergeCounts:
    """Elements of edited tensors, and how many of them differ from the base after rounding to the file's dtype."""

    edited: int = 0
    changed: int = 0


def write_merged(adapter: AdapterFile, base: BaseModel, out: Path, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """Write base + adapter as a model folder that plain transformers loads.

    W + s X Theta Y^T is computed in fp32 and rounded once. Sharding, index, tensor names and, unless `dtype` is given,
    dtypes stay the base's.

    Args:
        adapter: read with `base`, so that module names are the base's.
        base: the architecture and its folder or hub id.
        out: an existing, empty folder.
        dtype: of all floating point tensors; None keeps each tensor's own.

    Returns:
        Counts: merged modules, share of edited elements that changed.

    Raises:
        UserError: quantised or pickled base, tied target, missing tensor, or a delta below the resolution of the dtype.
    """
    refuse_quantized(base)
    folder = resolve_base(base.name, weights=True)
    files = weight_files(folder)
    headers = {file: read_entries(file) for file in files}
    entries = {entry.name: entry for found, _ in headers.values() for entry in found}
    edits = _plan_edits(adapter, base, entries)
    counts = MergeCounts()
    weight_map: dict[str, str] = {}
    total = 0
    for file, (found, metadata) in headers.items():
        total += _rewrite(file, out / file.name, found, metadata, edits, dtype, counts)
        weight_map.update({entry.name: file.name for entry in found})
    if edits and counts.changed == 0:
        raise UserError(
            "merging changes no weight: the adapter's delta is zero or below the resolution of the stored dtype;"
            " merge with --dtype float32, or export --format lora"
        )
    if (folder / INDEX_NAME).is_file():
        index = json.loads((folder / INDEX_NAME).read_text(encoding="utf-8"))
        index["metadata"] = {**index.get("metadata", {}), "total_size": total}
        write_json(out / INDEX_NAME, {**index, "weight_map": dict(sorted(weight_map.items()))})
    _copy_companions(folder, out, dtype)
    return {
        "num_modules": len(adapter.modules),
        "num_replaced_tensors": len(adapter.other_tensors),
        "changed_share": counts.changed / max(counts.edited, 1),
    }


def _plan_edits(adapter: AdapterFile, base: BaseModel, entries: Mapping[str, TensorEntry]) -> dict[str, Edit]:
    names = parameter_names(base.model, list(entries))
    edits: dict[str, Edit] = {}
    for module_name, module in adapter.modules.items():
        if module_name in base.tied_modules:
            raise UserError(
                f"{module_name} shares its weight with another module of {base.name}, so merging would change both;"
                " export --format lora instead"
            )
        entry = _entry(names, entries, f"{module_name}.weight", base)
        B = (module.X.double() @ module.core()).float()
        A = module.Y.float().T
        transposed = base.linears[module_name].transposed
        left, right = (A.T, B.T) if transposed else (B, A)
        if entry.shape != (left.shape[0], right.shape[1]):
            raise UserError(
                f"{entry.file}: {entry.name} has shape {entry.shape}, the config asks for"
                f" {(left.shape[0], right.shape[1])}; the checkpoint does not match its config.json"
            )
        edits[entry.name] = Edit(left=left.contiguous(), right=right.contiguous())
    for parameter, value in adapter.other_tensors.items():
        entry = _entry(names, entries, parameter, base)
        if parameter.rpartition(".")[0] in base.tied_modules:
            raise UserError(f"modules_to_save: {parameter} is tied in {base.name}; export --format lora instead")
        if entry.shape != tuple(value.shape):
            raise UserError(f"modules_to_save: {parameter} has shape {tuple(value.shape)}, the base {entry.shape}")
        edits[entry.name] = Edit(new=value)
    return edits


def _entry(
    names: Mapping[str, str], entries: Mapping[str, TensorEntry], parameter: str, base: BaseModel
) -> TensorEntry:
    if parameter not in names:
        raise UserError(
            f"base model {base.name}: its files hold no tensor for {parameter}; export --format lora instead"
        )
    entry = entries[names[parameter]]
    if entry.dtype not in TORCH_DTYPES:
        raise UserError(
            f"{entry.file}: {entry.name} is {entry.dtype}: a quantised base; merge into the original weights"
        )
    return entry


def _rewrite(
    source: Path,
    target: Path,
    entries: list[TensorEntry],
    metadata: Mapping[str, str],
    edits: Mapping[str, Edit],
    dtype: torch.dtype | None,
    counts: MergeCounts,
) -> int:
    """Write one safetensors file with the edits applied; return the bytes of its tensors."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for entry in entries:
        name = SAFETENSORS_NAMES[dtype] if dtype is not None and entry.dtype in TORCH_DTYPES else entry.dtype
        length = entry.num_bytes
        if name != entry.dtype:
            length = length // TORCH_DTYPES[entry.dtype].itemsize * TORCH_DTYPES[name].itemsize
        header[entry.name] = {
            "dtype": name,
            "shape": list(entry.shape),
            "data_offsets": [position, position + length],
        }
        position += length
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # the format aligns the data to 8 bytes
    with source.open("rb") as reader, target.open("wb") as writer:
        writer.write(struct.pack("<Q", len(encoded)) + encoded)
        for entry in entries:
            reader.seek(entry.start)
            if entry.name in edits or header[entry.name]["dtype"] != entry.dtype:
                out_dtype = TORCH_DTYPES[header[entry.name]["dtype"]]
                _write_rows(reader, writer, entry, edits.get(entry.name), out_dtype, counts)
            else:
                _copy_bytes(reader, writer, entry.num_bytes)
    return position


def _write_rows(
    reader: BinaryIO,
    writer: BinaryIO,
    entry: TensorEntry,
    edit: Edit | None,
    dtype: torch.dtype,
    counts: MergeCounts,
) -> None:
    """Read, change and write one tensor in blocks of whole rows."""
    stored = TORCH_DTYPES[entry.dtype]
    rows = entry.shape[0] if entry.shape else 1
    num_elements = entry.num_bytes // stored.itemsize
    columns = num_elements // rows if rows else 0
    block = max(1, BLOCK_BYTES // max(columns * 4, 1))
    for start in range(0, rows if num_elements else 0, block):
        stop = min(rows, start + block)
        data = bytearray((stop - start) * columns * stored.itemsize)
        if reader.readinto(data) != len(data):  # type: ignore[attr-defined]
            raise UserError(f"{entry.file}: ends inside {entry.name}; download the model again")
        old = torch.frombuffer(data, dtype=stored).view(stop - start, columns)
        new = old
        if edit is not None and edit.new is not None:
            new = edit.new.reshape(rows, columns)[start:stop]
        elif edit is not None and edit.left is not None and edit.right is not None:
            new = old.to(torch.float32, copy=True).addmm_(edit.left[start:stop], edit.right)
        new = new.to(dtype).contiguous()
        if edit is not None:
            counts.edited += new.numel()
            counts.changed += int(torch.count_nonzero(new != old.to(dtype)))
        writer.write(memoryview(new.view(torch.uint8).numpy()))  # type: ignore[arg-type]


def _copy_bytes(reader: BinaryIO, writer: BinaryIO, length: int) -> None:
    while length:
        data = reader.read(min(length, BLOCK_BYTES))
        if not data:
            raise UserError(f"{reader.name}: ends early; download the model again")
        writer.write(data)
        length -= len(data)


def _copy_companions(folder: Path, out: Path, dtype: torch.dtype | None) -> None:
    """Copy config, tokenizer and licence files; put the new dtype into the config where one was asked for."""
    for path in sorted(folder.iterdir()):
        is_text = path.suffix in COPIED_SUFFIXES or path.name.upper().startswith(("LICENSE", "NOTICE"))
        if path.is_file() and is_text and not path.name.endswith(".index.json"):
            shutil.copyfile(os.path.realpath(path), out / path.name)  # the hub cache holds symbolic links
    if dtype is None:
        return
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    name = str(dtype).removeprefix("torch.")
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key in ("dtype", "torch_dtype"):
            if key in part:
                part[key] = name
    config["dtype"] = name
    write_json(out / "config.json", config)
