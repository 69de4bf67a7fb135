"""Adapters of several formats, read as the same three factors: dW = s X Theta Y^T.

    PoLAR                 a folder of this project or of the paper's code       X, Theta, Y
    LoRA, rsLoRA, QLoRA   PEFT's folder                                         X = B, Theta = I, Y = A^T
    DoRA                  PEFT's folder; its low-rank part, s B A               the same, with a note
    loralib               a .bin, .pt or .safetensors file (microsoft/LoRA)     the same; alpha is not in the file

For LoRA nothing is orthonormal. Pickles are opened as tensors only (`weights_only=True`), which runs no code of theirs.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from polar.adapter_file import (
    KEY_PREFIX,
    WEIGHTS_NAME,
    AdapterFile,
    AdapterModule,
    check_numbers,
    check_values,
    find_adapter,
    module_r,
    module_scaling,
    read_adapter,
    read_config,
    read_tensors,
)
from polar.errors import UserError
from polar.upstream import is_upstream

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
LORALIB = "loralib"  # stands for a peft_type where there is no adapter_config.json
# Options of PEFT's LoraConfig with which the adapter is more than base + s B A.
MORE_THAN_LOW_RANK = (
    *("use_dora", "lora_bias", "layer_replication", "use_qalora", "alora_invocation_tokens", "arrow_config"),
    *("target_parameters", "trainable_token_indices"),
)
# Starts of LoRA by name that leave the base as it is; pissa, olora, corda, loftq and others take theirs out of it.
LEAVE_THE_BASE = ("gaussian", "orthogonal", "eva")


def read_any_adapter(path: str | Path, lora_alpha: float | None = None) -> AdapterFile:
    """Read an adapter of any format above.

    Args:
        path: run folder, adapter folder, or a loralib file.
        lora_alpha: alpha of a loralib file; None: s = 1 there, with a note. Folders have their own.

    Raises:
        UserError: one line with the value and the fix.
    """
    if Path(path).is_file():
        return _read_loralib(Path(path), lora_alpha)
    folder = find_adapter(path)
    config = read_config(folder)
    if config["peft_type"] == "LORA":
        tensors = read_tensors(folder)
        if not is_upstream(config, tensors):
            return _read_lora(folder, config, tensors)
    elif config["peft_type"] != "POLAR":
        raise UserError(
            f"{folder}: peft_type {config['peft_type']} is no low-rank update; pass a POLAR or LORA adapter"
        )
    return read_adapter(folder)


def check_low_rank(adapter: AdapterFile) -> None:
    """Raise UserError where the adapter is more than base + dW, so that another adapter cannot stand for it."""
    config = adapter.config
    found = [name for name in MORE_THAN_LOW_RANK if config.get(name)]
    if config.get("bias", "none") != "none":
        found.append(f"bias: {config['bias']}")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init not in LEAVE_THE_BASE:
        found.append(f"init_lora_weights: {init}, which changes the base,")
    if found:
        raise UserError(
            f"{adapter.folder}: {found[0]} makes it more than base + dW; merge it with PEFT (merge_and_unload) and use"
            " the merged model as the base"
        )


def check_same_base(sources: Sequence[AdapterFile]) -> None:
    """Raise UserError unless adapters can be compared or added: one base, equal shapes, modules in common."""
    first = sources[0]
    for other in sources[1:]:
        names = [str(source.config.get("base_model_name_or_path") or "") for source in (first, other)]
        if all(names) and _base_label(names[0]) != _base_label(names[1]):
            raise UserError(
                f"{first.folder} and {other.folder} are of different bases, {names[0]} and {names[1]}; pass adapters of"
                " one base"
            )
        common = [name for name in first.modules if name in other.modules]
        for name in common:
            a, b = ((source.modules[name].d_out, source.modules[name].d_in) for source in (first, other))
            if a != b:
                raise UserError(
                    f"{first.folder} and {other.folder} are of different bases: {name} is {a} in the first and {b} in"
                    " the second; pass adapters of one base"
                )
    if not set.intersection(*(set(source.modules) for source in sources)):
        shown = [f"{source.folder} ({next(iter(source.modules))}, ...)" for source in sources]
        raise UserError(f"no module is common to {' and '.join(shown)}; pass adapters of the same modules")


def _base_label(name: str) -> str:
    """Last part of a base's path or hub name; that of the hub's cache folders is models--OWNER--NAME."""
    cached = [part for part in Path(name).parts if part.startswith("models--")]
    return cached[-1].rpartition("--")[2].lower() if cached else Path(name).name.lower()


def method_of(adapter: AdapterFile) -> str:
    """Return PoLAR, LoRA, rsLoRA or DoRA, for tables."""
    return method_name(adapter.config)


def method_name(config: Mapping[str, Any]) -> str:
    """Return the same from an adapter_config.json; of other methods, PEFT's name."""
    if config["peft_type"] not in ("LORA", LORALIB):
        return "PoLAR" if config["peft_type"] == "POLAR" else str(config["peft_type"])
    return "DoRA" if config.get("use_dora") else "rsLoRA" if config.get("use_rslora") else "LoRA"


def _read_lora(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> AdapterFile:
    file = folder / WEIGHTS_NAME
    check_numbers(config, folder, alpha="lora_alpha")
    pairs, other = _pair(tensors, file, KEY_PREFIX, ".weight")
    alphas = {**config, "alpha": config["lora_alpha"]}
    modules = {}
    for name, (A, B) in pairs.items():
        if A.shape[0] != module_r(config, name):
            raise UserError(
                f"{file}: {name} has rank {A.shape[0]}, adapter_config.json says {module_r(config, name)}; config and"
                " file do not match, save the adapter again"
            )
        modules[name] = AdapterModule(B, None, A.T, module_scaling(alphas, name))
    notes = []
    if config.get("use_dora"):
        notes.append(f"{folder}: DoRA rescales the whole weight as well; this is its low-rank part, s B A")
    return AdapterFile(folder, config, tensors, modules, other, _sha256(file), notes)


def _read_loralib(file: Path, lora_alpha: float | None) -> AdapterFile:
    tensors = _load_state_dict(file)
    pairs, other = _pair(tensors, file, "", "")
    if lora_alpha is not None and not 0 < lora_alpha < float("inf"):
        raise UserError(f"--alpha {lora_alpha}: must be a positive number; it is the lora_alpha of the training")
    modules = {
        name: AdapterModule(B, None, A.T, 1.0 if lora_alpha is None else lora_alpha / A.shape[0])
        for name, (A, B) in pairs.items()
    }
    notes = [] if lora_alpha is not None else [f"{file}: alpha is not in the file, so s = 1; give it with --alpha"]
    if other:
        notes.append(f"{file}: {len(other)} tensors that are no LoRA are left out, e.g. {next(iter(other))}")
    config = {"peft_type": LORALIB, "target_modules": sorted(modules)}
    return AdapterFile(file, config, tensors, modules, {}, _sha256(file), notes)


def _load_state_dict(file: Path) -> dict[str, Tensor]:
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        if file.suffix not in PICKLE_SUFFIXES:
            raise UserError(
                f"{file}: is neither an adapter folder nor a {', '.join((*PICKLE_SUFFIXES, '.safetensors'))} file"
            )
        loaded = torch.load(file, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, EOFError, ValueError, RuntimeError, pickle.UnpicklingError) as error:
        if isinstance(error, UserError):
            raise
        first = (str(error).split(". ")[0].strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{file}: truncated, or more than tensors in a pickle ({first}); download it again") from error
    if not isinstance(loaded, Mapping) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise UserError(f"{file}: holds {type(loaded).__name__}, not a state dict of tensors; pass the LoRA checkpoint")
    return dict(loaded)


def _pair(
    tensors: Mapping[str, Tensor], file: Path, prefix: str, ending: str
) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tensor]]:
    """Sort tensors into (A, B) per module and the rest by parameter name; check values and shapes."""
    suffix_A, suffix_B = f".lora_A{ending}", f".lora_B{ending}"
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    other = {}
    for key in sorted(tensors):
        stem = key.removesuffix(suffix_A)
        if ".lora_embedding_" in key:
            raise UserError(f"{file}: {key} adapts an embedding, which has no PoLAR form; leave embeddings out")
        if key.endswith(suffix_B) and key.removesuffix(suffix_B) + suffix_A not in tensors:
            raise UserError(f"{file}: {key} has no lora_A beside it; save the adapter again")
        if stem == key:
            if ".lora_" not in key:
                other[key.removeprefix(prefix)] = tensors[key]
            continue
        if stem + suffix_B not in tensors:
            raise UserError(f"{file}: {key} has no lora_B beside it; save the adapter again")
        A, B = tensors[key], tensors[stem + suffix_B]
        _check_pair(stem, A, B, file)
        pairs[stem.removeprefix(prefix)] = (A, B)
    if not pairs:
        raise UserError(f"{file}: no lora_A tensors in it; pass an adapter, or save it again")
    return pairs, other


def _check_pair(stem: str, A: Tensor, B: Tensor, file: Path) -> None:
    for value, part in ((A, "lora_A"), (B, "lora_B")):
        if value.ndim != 2 or value.numel() == 0:
            raise UserError(
                f"{file}: {stem}.{part} has shape {tuple(value.shape)}; only the 2-D, not empty factors of"
                " linear layers have a PoLAR form"
            )
        check_values(value, f"{file}: {stem}.{part}")
    if A.shape[0] != B.shape[1]:
        raise UserError(
            f"{file}: {stem} has A {tuple(A.shape)} and B {tuple(B.shape)}; need (r, d_in) and (d_out, r). Layers that"
            " loralib merges (q, k and v in one) are not read"
        )


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
