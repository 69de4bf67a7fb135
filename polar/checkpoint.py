"""One folder from which a run continues, on any number of processes and under any engine.

    checkpoint-N/
      adapter_config.json, adapter_model.safetensors   the adapter as PEFT reads it
      training_state.safetensors                       fp32 values and optimizer moments, by parameter name
      training_state.json                              steps, scheduler, position, settings, versions
      random_state.json                                random generators, per process
      trainer_state.json                               the Trainer's own: step, epoch, logs, best metric
      checkpoint.json                                  written last: size and SHA-256 of each file

The folder gets its name when it is complete, was read back and lies on the disk; until then it is called
`.checkpoint-N.incomplete-XXXXXXXX`, so the marker of an unfinished checkpoint is its name, which a POSIX file system
changes at once or not at all. Where a rename is no such thing (object stores mounted as folders copy file by file),
checkpoint.json decides: it is the last file written, and a folder that lacks it, or any file that it lists, is skipped.
No pickle and no weight of the base model: for each trained element its fp32 value, the moments, and the value once more
for PEFT (16 bytes with Adam), and JSON that does not grow with the model.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import random
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from polar.errors import UserError
from polar.files import atomic_directory, remove_directory, write_json

if TYPE_CHECKING:
    from polar.run_config import RunConfig

FORMAT = 1
MANIFEST = "checkpoint.json"
TENSORS = "training_state.safetensors"
STATE = "training_state.json"
RANDOM = "random_state.json"
# What one may change between two starts of a run: none of it alters what is trained, beyond the order of sums.
FREE_KEYS = {
    *("output_dir", "run_name", "report_to", "project", "per_device_train_batch_size", "per_device_eval_batch_size"),
    *(
        "gradient_accumulation_steps",
        "deepspeed",
        "engine",
        "fsdp_shard_size",
        "use_cpu",
        "manifold_execution",
        "attn_implementation",
        "disable_tqdm",
    ),
    *("activation_checkpointing", "activation_checkpointing_kwargs", "gradient_checkpointing", "trust_remote_code"),
    *("metric_for_best_model", "greater_is_better", "load_best_model_at_end", "torch_empty_cache_steps"),
    *("model_name_or_path", "revision"),  # compared as `base`
}
FREE_PREFIXES = ("logging_", "save_", "eval_", "dataloader_", "ddp_", "hub_", "push_", "torch_compile", "log_")
MAX_DIFFERENCES = 3  # named in an error


@contextlib.contextmanager
def new_checkpoint(folder: Path) -> Iterator[Path]:
    """Yield a folder that becomes the checkpoint `folder` when the block ends without an error."""
    with atomic_directory(folder) as temporary:
        yield temporary
        files = {str(p.relative_to(temporary)): _entry(p) for p in sorted(temporary.rglob("*")) if p.is_file()}
        write_json(temporary / MANIFEST, {"format": FORMAT, "files": files})


def write_tensors(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write the tensors of a checkpoint and read them back.

    Raises:
        RuntimeError: a tensor is empty, not finite, or is not read back as it was.
    """
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, folder / TENSORS, metadata={"format": "pt"})
    with safe_open(folder / TENSORS, framework="pt") as file:
        if set(file.keys()) != contiguous.keys():
            raise RuntimeError(f"{TENSORS} holds other tensors than were written")
        for name, tensor in contiguous.items():
            found = file.get_tensor(name)
            if not found.numel():
                raise RuntimeError(f"{name} is empty")
            if found.is_floating_point() and not found.isfinite().all():
                raise RuntimeError(f"{name} holds values that are not finite")
            if found.dtype != tensor.dtype or not torch.equal(found, tensor):
                raise RuntimeError(f"{name} was not written as it is")


def find_checkpoint(output_dir: Path, report: Callable[[str], None]) -> Path | None:
    """Return the newest whole checkpoint of a run, None where there is none.

    Args:
        output_dir: the run's folder.
        report: called with one line for each newer checkpoint that cannot be used.
    """
    for folder in reversed(list_checkpoints(output_dir)):
        problem = why_damaged(folder)
        if problem is None:
            return folder
        report(f"skipping {folder}: {problem}")
    return None


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Return the folders `checkpoint-N` of a run by N, damaged ones too."""
    found = [path for path in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted((path for path in found if path.is_dir()), key=step_of)


def step_of(folder: Path) -> int:
    """Return N of `checkpoint-N`."""
    return int(folder.name.removeprefix("checkpoint-"))


def why_damaged(folder: Path) -> str | None:
    """Compare the files of a checkpoint with what was written; return what is wrong, or None."""
    manifest = folder / MANIFEST
    if not manifest.is_file():
        return f"it holds no {MANIFEST}, so no training state"
    try:
        content = json.loads(manifest.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            return f"its format is {content['format']}, this version reads {FORMAT}"
        for name, entry in content["files"].items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != entry["bytes"]:
                return f"{name} has {path.stat().st_size:,} bytes of {entry['bytes']:,}"
            if _entry(path) != entry:
                return f"{name} is not what was written"
        if not {TENSORS, STATE, RANDOM} <= content["files"].keys():
            return "files are missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be used: {error}"
    return None


def read_state(folder: Path) -> dict[str, Any]:
    """Return training_state.json."""
    return json.loads((folder / STATE).read_text(encoding="utf-8"))


def read_random_states(folder: Path) -> list[dict[str, Any]]:
    """Return the `random_state` of each process that wrote a checkpoint."""
    return json.loads((folder / RANDOM).read_text(encoding="utf-8"))


def rotate(output_dir: Path, newest: Path, limit: int | None, best: str | None) -> None:
    """Delete checkpoints above `limit`: first damaged ones that claim to be newer, then the oldest.

    Args:
        output_dir: the run's folder.
        newest: the checkpoint just written, which always stays.
        limit: most checkpoints to keep; None or below 1: all.
        best: folder of the best one by validation, which stays too.
    """
    if limit is None or limit < 1:
        return
    kept = {newest.name} | ({Path(best).name} if best else set())
    folders = list_checkpoints(output_dir)
    # A run continues from its newest whole checkpoint, so one beyond the step just saved is damaged.
    beyond = [folder for folder in folders if step_of(folder) > step_of(newest)]
    old = [folder for folder in folders if folder not in beyond]
    surplus = len(folders) - max(limit, len(kept))
    for folder in [folder for folder in [*beyond, *old] if folder.name not in kept][: max(surplus, 0)]:
        remove_directory(folder)


# Which run a checkpoint belongs to


def run_identity(config: RunConfig, data_fingerprint: str) -> dict[str, Any]:
    """Return the settings that decide what is trained, as JSON values: a checkpoint of others cannot be continued."""
    return settings_of(config.to_yaml()) | {
        "base": _base_identity(str(config.model.model_name_or_path), config.model.revision),
        "data": data_fingerprint,
    }


def settings_of(config_yaml: str) -> dict[str, Any]:
    """Return the settings in a run's config.yaml that may not change between two starts."""
    values = yaml.safe_load(config_yaml)
    kept = {k: v for k, v in values.items() if k not in FREE_KEYS and not k.startswith(FREE_PREFIXES)}
    return json.loads(json.dumps(kept))


def check_same_run(origin: Path, saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Compare the settings of two starts of a run.

    Args:
        origin: what `saved` was read from, for the message.
        saved: `run_identity` then; keys that only one side has count as unset, `base` and `data` must be in both.
        current: `run_identity` now.

    Raises:
        UserError: names the settings that differ.
    """
    different = []
    for key in sorted(saved.keys() | current.keys()):
        old, new = saved.get(key), current.get(key)
        if old == new:
            continue
        if key == "data":
            different.append("other training data (rows, template or tokenizer changed)")
        elif key == "base":
            different.append(f"another base model ({old}, now {new})")
        elif isinstance(old, dict) and isinstance(new, dict):
            names = [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
            different += [f"{key}.{n} {old.get(n)} (now {new.get(n)})" for n in names]
        else:
            different.append(f"{key} {old} (now {new})")
    if different:
        more = f" and {len(different) - MAX_DIFFERENCES} more" if len(different) > MAX_DIFFERENCES else ""
        raise UserError(
            f"{origin} was made with {', '.join(different[:MAX_DIFFERENCES])}{more}: set it back to resume, or start "
            "afresh with --overwrite or in another output_dir"
        )


def _base_identity(name: str, revision: str | None) -> str:
    """Name of a hub model; for a folder, a digest of its config.json and of its weight files' names and sizes."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return f"{name}@{revision or 'main'}"
    sizes = sorted((p.name, p.stat().st_size) for p in folder.iterdir() if p.suffix in (".safetensors", ".bin"))
    content = (folder / "config.json").read_bytes() + json.dumps(sizes).encode()
    return f"{folder.name}-{hashlib.sha256(content).hexdigest()[:12]}"


# Random generators


def random_state() -> dict[str, Any]:
    """Return the state of this process's generators (Python, NumPy, torch, and CUDA where there is one) for JSON."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state = {
        "python": [version, list(words), gauss],
        "numpy": [name, keys.tolist(), position, has_gauss, cached],  # type: ignore[union-attr]
        "torch": _encode(torch.get_rng_state()),
    }
    if torch.cuda.is_available():
        state["cuda"] = _encode(torch.cuda.get_rng_state())
    return state


def set_random_state(state: Mapping[str, Any]) -> None:
    """Continue the random numbers of `random_state`."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(_decode(state["torch"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(_decode(state["cuda"]))


def _encode(state: Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _decode(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)


def _entry(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
