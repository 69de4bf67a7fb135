"""Turn a PoLAR adapter into what everybody else can load: a plain LoRA adapter, or a merged model.

    dW = s X Theta Y^T = B A     with     B = s X Theta  (d_out, r),     A = Y^T  (r, d_in)

This holds for any X, Theta, Y: no SVD, nothing is lost but rounding.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from polar.adapter_file import KEY_PREFIX, AdapterFile, read_adapter, selected_modules
from polar.base_checkpoint import BaseModel, checkpoint_gib, describe_base
from polar.errors import UserError
from polar.files import atomic_directory, write_json
from polar.merge import write_merged
from polar.run_folder import installed_version
from polar.templates import trained_template

FORMULA = "dW = s X Theta Y^T = B A, B = s X Theta, A = Y^T, lora_alpha = r"
VLLM_MAX_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
REPORT_NAME = "polar_export.json"
# Beyond this the forward canary is left to `polar eval`, which loads the model anyway.
CANARY_MAX_GIB = 8.0
CANARY_TOKENS = 24


def export_lora(
    adapter: str | os.PathLike[str],
    out: str | os.PathLike[str],
    base: str | None = None,
    dtype: str = "float32",
    overwrite: bool = False,
    canary: bool = True,
) -> dict[str, Any]:
    """Write a standard PEFT LoRA adapter folder; no part of `polar` is needed to load it.

    With a rank_pattern every factor is zero-padded to the largest r, since servers do not read patterns.

    Args:
        adapter: run folder or adapter folder.
        out: the new folder.
        base: model folder or hub id; default: the one named in the adapter's config, if it can be found.
        dtype: of A and B. They are computed in float64 and rounded once.
        overwrite: replace an existing `out`.
        canary: run a prompt through base, adapter and export where the base's weights are here and small.

    Returns:
        What `polar_export.json` in the folder holds.

    Raises:
        UserError: bad adapter, another base, an adapter that changes nothing, an existing `out`.
    """
    target = check_output(out, adapter, base, overwrite)
    source, described = _read(adapter, base, required=False)
    check_output(out, adapter, described.name if described else None, overwrite)  # the base that the adapter names
    tensor_dtype = _dtype(dtype)
    norms = _weight_canary(source)
    r_max = max(module.r for module in source.modules.values())
    report = {
        **_report(source, described, "lora", norms),
        "r": r_max,
        "max_lora_rank": next((allowed for allowed in VLLM_MAX_LORA_RANKS if allowed >= r_max), None),
        "dtype": dtype,
    }
    with atomic_directory(target) as folder:
        _save_lora(source, described, folder, r_max, tensor_dtype)
        if canary:
            report["canary"]["forward"] = _forward_canary(source, described, folder)
        write_json(folder / REPORT_NAME, report)
    return report


def export_merged(
    adapter: str | os.PathLike[str],
    out: str | os.PathLike[str],
    base: str | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write base + adapter as a model folder in the base's own sharding, names and dtype.

    Args:
        adapter: run folder or adapter folder.
        out: the new folder.
        base: model folder or hub id; default: the one named in the adapter's config.
        dtype: of all floating point weights; None keeps the base's.
        overwrite: replace an existing `out`.

    Returns:
        What `polar_export.json` in the folder holds.

    Raises:
        UserError: as `export_lora`; also a quantised or pickled base, or a target whose weight is tied.
    """
    target = check_output(out, adapter, base, overwrite)
    source, described = _read(adapter, base, required=True)
    assert described is not None
    check_output(out, adapter, described.name, overwrite)  # the base that the adapter names
    report = {**_report(source, described, "merged", _weight_canary(source)), "dtype": dtype or "as the base"}
    with atomic_directory(target) as folder:
        report["canary"]["merge"] = write_merged(source, described, folder, _dtype(dtype) if dtype else None)
        write_json(folder / REPORT_NAME, report)
    return report


def _read(adapter: str | os.PathLike[str], base: str | None, required: bool) -> tuple[AdapterFile, BaseModel | None]:
    """Read the adapter and its base; where no base was named and none is at hand, the base stays unchecked."""
    source = read_adapter(adapter)
    if source.config.get("bias", "none") != "none":
        raise UserError(f"{source.folder}: bias: {source.config['bias']} cannot be exported; train with bias: none")
    name = base or source.config.get("base_model_name_or_path")
    if not name:
        if required:
            raise UserError(f"{source.folder}: adapter_config.json names no base model; pass --base MODEL")
        return source, None
    try:
        described = describe_base(name, source.config.get("revision"), source.config.get("task_type"))
    except UserError:
        if base is not None or required:
            raise
        print(
            f"polar: note: base model {name} is not here, so key names are not checked; --base MODEL checks them",
            file=sys.stderr,
        )
        return source, None
    return read_adapter(adapter, described), described


def check_output(
    out: str | os.PathLike[str], adapter: str | os.PathLike[str] | None, base: str | None, overwrite: bool
) -> Path:
    """Return `out`; raise if it exists (unless `overwrite`), or if writing it would remove adapter or base."""
    target = Path(out)
    for name in (adapter, base):
        if name and Path(name).exists():
            source, destination = Path(name).resolve(), target.resolve()
            if destination == source or destination in source.parents:
                raise UserError(f"output {out}: would replace its own source {name}; choose another folder")
    if target.is_file():
        raise UserError(f"output {out}: is a file; choose a folder")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise UserError(f"output {out}: exists and is not empty; choose another folder or pass --overwrite")
    return target


def _dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise UserError(f"dtype {name!r}: choose one of {', '.join(DTYPES)}")
    return DTYPES[name]


def _weight_canary(source: AdapterFile) -> dict[str, float]:
    """Return norm(dW)_F per module; raise when the adapter changes nothing at all."""
    norms = {name: module.delta_norm() for name, module in source.modules.items()}
    if max(norms.values()) == 0.0 and not source.other_tensors:
        raise UserError(
            f"{source.folder}: the adapter changes nothing, s X Theta Y^T is zero in all {len(norms)} modules;"
            " it was saved before training, or nothing was trained"
        )
    return norms


def _save_lora(source: AdapterFile, base: BaseModel | None, folder: Path, r_max: int, dtype: torch.dtype) -> None:
    from peft import LoraConfig
    from safetensors.torch import save_file

    tensors: dict[str, torch.Tensor] = {}
    for name, module in source.modules.items():
        A = torch.zeros(r_max, module.d_in, dtype=dtype)
        B = torch.zeros(module.d_out, r_max, dtype=dtype)
        A[: module.r] = module.Y.T.to(dtype)
        B[:, : module.r] = (module.X.double() @ module.core()).to(dtype)
        tensors[f"{KEY_PREFIX}{name}.lora_A.weight"] = A
        tensors[f"{KEY_PREFIX}{name}.lora_B.weight"] = B
    tensors.update({KEY_PREFIX + name: value.contiguous() for name, value in source.other_tensors.items()})
    if not all(torch.isfinite(value).all() for value in tensors.values()):
        raise UserError(f"dtype {dtype}: the factors overflow in it; export with --dtype float32")
    save_file(dict(sorted(tensors.items())), folder / "adapter_model.safetensors", metadata={"format": "pt"})
    LoraConfig(
        r=r_max,
        lora_alpha=r_max,
        target_modules=_target_modules(source, base),
        modules_to_save=source.config.get("modules_to_save"),
        fan_in_fan_out=bool(source.config.get("fan_in_fan_out")),
        task_type=source.config.get("task_type"),
        base_model_name_or_path=base.name if base else source.config.get("base_model_name_or_path"),
        revision=source.config.get("revision"),
        inference_mode=True,
    ).save_pretrained(str(folder))


def _target_modules(source: AdapterFile, base: BaseModel | None) -> list[str]:
    """Return leaf names such as q_proj where these select exactly the adapter's modules, else their full names."""
    modules = set(source.modules)
    leaves = sorted({name.rpartition(".")[2] for name in modules})
    view = {"target_modules": leaves, "modules_to_save": source.config.get("modules_to_save")}
    if base is not None and selected_modules(view, base) == modules:
        return leaves
    return sorted(modules)


def _report(source: AdapterFile, base: BaseModel | None, kind: str, norms: dict[str, float]) -> dict[str, Any]:
    return {
        "format": kind,
        "formula": FORMULA,
        "source": {"adapter": source.folder.name, "sha256": source.sha256, "notes": source.notes},
        "base_model_name_or_path": base.name if base else source.config.get("base_model_name_or_path"),
        "template": trained_template(source.folder),  # `polar eval` scores with the prompts of the training
        "base_checked": base is not None,
        "num_modules": len(source.modules),
        "versions": {
            name: installed_version(name) for name in ("polar", "torch", "transformers", "peft", "safetensors")
        },
        "canary": {
            "max_delta_norm": max(norms.values()),
            "num_zero_modules": sum(norm == 0.0 for norm in norms.values()),
        },
    }


def _forward_canary(source: AdapterFile, base: BaseModel | None, folder: Path) -> dict[str, Any] | str:
    """Run one batch through base, PoLAR adapter and exported LoRA; return the differences, or why it was not run."""
    if base is None:
        return "not run: no base model"
    size = checkpoint_gib(base.folder)
    if size is None or size > CANARY_MAX_GIB:
        reason = "its weights are not here" if size is None else f"{size:.0f} GiB"
        return f"not run: base {base.name}, {reason}; polar eval runs it before scoring"
    return compare_forward(base, folder, None if source.renamed else source.folder)


def compare_forward(base: BaseModel, lora: Path, adapter: Path | None) -> dict[str, Any]:
    """Return the largest logit differences between base, LoRA export and PoLAR adapter in fp32 on fixed token ids.

    Args:
        base: its weights are loaded.
        lora: the export.
        adapter: the PoLAR adapter; None where its names are not the base's, so that it cannot be loaded on it.

    Raises:
        UserError: base and export give the same logits.
    """
    from peft import PeftModel

    import polar  # noqa: F401  registers POLAR with PEFT
    from polar.classifier import num_labels_of, without_load_report

    num_labels = num_labels_of(lora)

    def load() -> Any:
        options = {} if num_labels is None else {"num_labels": num_labels}
        with without_load_report() if options else contextlib.nullcontext():
            return type(base.model).from_pretrained(base.folder, dtype=torch.float32, **options).eval()

    model = load()
    vocabulary = base.config.get_text_config().vocab_size
    input_ids = torch.randint(0, vocabulary, (1, CANARY_TOKENS), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), warnings.catch_warnings():
        # peft 0.21.2 reads an attribute that transformers 5.23 has renamed; harmless, gone with the next peft.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        base_logits = model(input_ids).logits
        adapter_logits = None
        if adapter is not None:
            ours = PeftModel.from_pretrained(model, str(adapter)).eval()
            adapter_logits = ours(input_ids).logits
            model = ours.unload() if num_labels is None else load()  # peft 0.21.2 cannot unload a pooler
        lora_logits = PeftModel.from_pretrained(model, str(lora)).eval()(input_ids).logits
    change = (lora_logits - base_logits).abs().max().item()
    if change == 0.0:
        raise UserError(f"base {base.name} and the export give the same logits; the adapter is not applied")
    return {
        "max_logit_change": change,
        "max_difference_to_adapter": None
        if adapter_logits is None
        else (lora_logits - adapter_logits).abs().max().item(),
        "dtype": "float32",
        "num_tokens": CANARY_TOKENS,
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `polar export`."""
    parser.add_argument("adapter", metavar="RUN_OR_ADAPTER", help="run folder or adapter folder")
    parser.add_argument("out", metavar="OUT", help="new folder")
    parser.add_argument("--format", choices=("lora", "merged"), default="lora", help="default: %(default)s")
    parser.add_argument("--base", help="base model folder or hub id; default: the one named in the adapter")
    parser.add_argument(
        "--dtype", choices=sorted(DTYPES), help="lora: dtype of A and B (default float32); merged: default as the base"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing OUT")
    parser.add_argument(
        "--no_canary",
        action="store_true",
        help=f"lora: do not compare logits with the base (never done for bases above {CANARY_MAX_GIB:.0f} GiB)",
    )


def run(args: argparse.Namespace) -> None:
    """Run `polar export` with parsed arguments."""
    import transformers

    transformers.logging.disable_progress_bar()  # one for the base's files, in the canary
    if args.format == "lora":
        dtype = args.dtype or "float32"
        report = export_lora(args.adapter, args.out, args.base, dtype, args.overwrite, canary=not args.no_canary)
        serve = report["max_lora_rank"] or "none that vLLM allows"
        print(f"{args.out}: LoRA, {report['num_modules']} modules, r = {report['r']}, max_lora_rank for vLLM: {serve}")
        forward = report["canary"].get("forward", "not run: --no_canary")
        if isinstance(forward, str):
            print(f"canary: {forward}")
        else:
            difference = forward["max_difference_to_adapter"]
            against = "" if difference is None else f" and differ by {difference:.3g} from the PoLAR adapter"
            print(f"canary: logits move by {forward['max_logit_change']:.3g} against the base{against}")
    else:
        report = export_merged(args.adapter, args.out, args.base, args.dtype, args.overwrite)
        share = report["canary"]["merge"]["changed_share"]
        print(f"{args.out}: merged model, {report['num_modules']} modules, {share:.1%} of their weights changed")
    for note in report["source"]["notes"]:
        print(f"note: {note}")
