"""What one rank can say about its node before a run: device, memory, disk, model, data, versions.

Each check returns `Finding`s and raises nothing: a check that fails is a line in the table of `polar.preflight`.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from polar.base_checkpoint import checkpoint_gib, resolve_base, weight_files
from polar.errors import UserError
from polar.monitor import GIB, host_memory
from polar.rows import check_source, is_file_name
from polar.run_folder import PACKAGES, installed_version

PROBE_BYTES = 2**20  # written to the run folder, and deleted
HUB_TIMEOUT_S = 10


@dataclass(frozen=True)
class Finding:
    """What a check found on one rank.

    Attributes:
        check: the row of the table.
        value: what was found, with its unit.
        fix: what to do about it; empty where nothing is wrong.
        amount: orders the values of different ranks: the table shows the least.
    """

    check: str
    value: str
    fix: str = ""
    amount: float | None = None


def problem_of(check: str, error: UserError) -> Finding:
    """Return the finding of a message that ends with its fix, as ours do: `VALUE: FIX` or `VALUE; FIX`."""
    message = str(error)
    parts = re.split(r"; (?!.*; )|: (?!.*: )", message, maxsplit=1)
    return Finding(check, parts[0].removeprefix(f"{check} "), parts[1] if len(parts) > 1 else "see the value")


def enough(check: str, what: str, amount: float, need: float | None, fix: str) -> Finding:
    """Compare an amount in GiB with what the run needs; None: no need is known."""
    if need is None:
        return Finding(check, what, amount=amount)
    return Finding(check, f"{what}, {need:g} needed", "" if amount >= need else fix, amount)


# Device and memory


def check_device(use_cpu: bool, local_rank: int, need_gib: float | None) -> list[Finding]:
    """Check that the rank's GPU is visible, free enough and multiplies; without GPUs, that none was expected.

    Args:
        use_cpu: the run's own setting.
        local_rank: number of the rank on its node, hence of its GPU.
        need_gib: GPU memory that must be free.
    """
    if use_cpu or not torch.cuda.is_available():
        reason = None if use_cpu else why_no_gpu()
        cores = f"cpu, {len(os.sched_getaffinity(0))} cores"
        if reason:
            return [Finding("device", f"{cores}; {reason}", "use an image or environment whose torch sees the GPU")]
        return [Finding("device", cores)]
    count = torch.cuda.device_count()
    if local_rank >= count:
        fix = "start as many ranks per node as GPUs are visible, or ask for more GPUs"
        return [Finding("device", f"local rank {local_rank}, but {count} GPUs are visible", fix)]
    try:
        torch.cuda.set_device(local_rank)
        free, total = torch.cuda.mem_get_info()
        ones = torch.ones(256, 256, device="cuda")
        right = bool((ones @ ones == 256).all())
    except RuntimeError as error:
        first = str(error).splitlines()[0]
        return [Finding("device", f"GPU {local_rank}: {first}", "exclude the node (sbatch --exclude) and report it")]
    name = torch.cuda.get_device_name()
    if not right:
        return [Finding("device", f"{name}: a product of ones is wrong", "exclude the node (sbatch --exclude)")]
    what = f"{free / GIB:.1f} GiB free of {total / GIB:.1f}"
    fix = "another process holds the memory, or the job needs more nodes or a smaller micro batch"
    return [Finding("device", name), enough("device memory", what, free / GIB, need_gib, fix)]


def why_no_gpu() -> str | None:
    """Return the sign that this job was given GPUs, for a torch that sees none; None where there is no sign."""
    for name in ("SLURM_JOB_GPUS", "SLURM_STEP_GPUS", "SLURM_GPUS_ON_NODE", "CUDA_VISIBLE_DEVICES"):
        value = os.environ.get(name, "")
        if value not in ("", "0", "-1", "NoDevFiles") or (value == "0" and name != "SLURM_GPUS_ON_NODE"):
            return f"torch {torch.__version__} sees no GPU, but {name}={value}"
    if Path("/dev/nvidia0").exists():
        return f"torch {torch.__version__} sees no GPU, but there is /dev/nvidia0"
    return None


def device_identity(use_cpu: bool, local_rank: int) -> str:
    """Return what no two ranks may share, the GPU's UUID; `cpu` where they may."""
    if use_cpu or not torch.cuda.is_available() or local_rank >= torch.cuda.device_count():
        return "cpu"
    return str(torch.cuda.get_device_properties(local_rank).uuid)


def check_host_memory(need_gib: float | None) -> list[Finding]:
    """Compare the node's free memory, or what the job's control group leaves of it, with the need of all its ranks."""
    available, total = host_memory()
    what = f"{available / GIB:.1f} GiB free of {total / GIB:.1f}"
    fix = "ask for more memory (sbatch --mem), or use another node"
    return [enough("host memory", what, available / GIB, need_gib, fix)]


# Disk


def existing_part(folder: Path) -> Path:
    """Return `folder`, or its nearest parent that exists."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def check_run_folder(output_dir: str | None, need_gib: float) -> list[Finding]:
    """Write a file where the run folder is, or will be, and compare the free space with the need."""
    if not output_dir or output_dir == "trainer_output":
        return [Finding("run folder", "output_dir is not set", "add --output_dir runs/NAME")]
    folder = existing_part(Path(output_dir).expanduser())
    if not folder.is_dir():
        return [Finding("run folder", f"{folder} is a file", "give a folder as --output_dir")]
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".preflight-") as file:
            file.write(bytes(PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return [Finding("run folder", f"{folder}: {error.strerror}", "choose an --output_dir that can be written")]
    free = shutil.disk_usage(folder).free / GIB
    what = f"{folder} writable, {free:.1f} GiB free"
    return [enough("run folder", what, free, need_gib, "make room, or choose another --output_dir")]


# Model and data


def check_model(name: str | None, revision: str | None, asks_hub: bool) -> list[Finding]:
    """Look for the base's config and every shard of its weights: in the folder, else in the hub cache.

    Args:
        name: folder or hub name.
        revision: of the hub name.
        asks_hub: whether to ask the hub for a model that the cache lacks; one rank per node does.
    """
    if not name:
        return [Finding("model", "model_name_or_path is not set", "add --model_name_or_path FOLDER_OR_HUB_NAME")]
    path = Path(name).expanduser()
    try:
        if path.exists() or name.startswith((".", "/", "~")):
            return [_whole_model(name, resolve_base(str(path)), "folder")]
        return [_model_in_cache(name, revision, asks_hub)]
    except UserError as error:
        return [problem_of("model", error)]


def _whole_model(name: str, folder: Path, where: str) -> Finding:
    if not (folder / "config.json").is_file():
        raise UserError(f"base model {name}: no config.json in {folder}: fetch it again: hf download {name}")
    weight_files(folder)
    return Finding("model", f"{name}: {where}, {checkpoint_gib(folder) or 0:.1f} GiB")


def _model_in_cache(name: str, revision: str | None, asks_hub: bool) -> Finding:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    cache = constants.HF_HUB_CACHE
    try:
        return _whole_model(name, Path(snapshot_download(name, revision=revision, local_files_only=True)), "hub cache")
    except HFValidationError:
        raise UserError(f"base model {name!r}: neither a folder nor a hub name: give one of them") from None
    except (LocalEntryNotFoundError, UserError) as error:
        lacks = f"{name} is not in the cache {cache}"
        if isinstance(error, UserError):
            lacks += f" as a whole ({error})"
        if constants.HF_HUB_OFFLINE:
            fix = f"run `hf download {name}` with this HF_HOME where there is network (HF_HUB_OFFLINE is set here)"
            return Finding("model", lacks, fix)
        if not asks_hub:
            return Finding("model", lacks + "; left to local rank 0")
        return _model_on_hub(name, revision, lacks)


def _model_on_hub(name: str, revision: str | None, lacks: str) -> Finding:
    from huggingface_hub import model_info

    try:
        model_info(name, revision=revision, timeout=HUB_TIMEOUT_S)
    except Exception as error:  # gated, unknown, no network: as many classes as there are libraries below
        reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        fix = f"run `hf download {name}` with this HF_HOME where there is network, and set HF_HUB_OFFLINE=1"
        return Finding("model", f"{lacks}, and the hub does not give it ({reason})", fix)
    return Finding("model", f"{lacks}; the hub has it")


def check_data(key: str, source: str | None) -> list[Finding]:
    """Look for the rows: the file, or offline the data set that an earlier load left in the cache."""
    if not source:
        return [] if key == "val_dataset" else [Finding(key, "not set", f"add --{key} FILE_OR_HUB_NAME")]
    try:
        check_source(source, key)
    except UserError as error:
        return [problem_of(key, error)]
    if is_file_name(source):
        path = Path(source).expanduser()
        if not os.access(path, os.R_OK):
            return [Finding(key, f"{source} is not readable", "change its mode or owner")]
        return [Finding(key, f"{source}, {path.stat().st_size / 2**20:.1f} MiB")]
    import datasets
    from datasets.naming import camelcase_to_snakecase

    if not datasets.config.HF_HUB_OFFLINE:
        return [Finding(key, f"{source} from the hub")]
    name, _, config = source.partition(":")
    owner, slash, last = name.rpartition("/")
    cache = Path(datasets.config.HF_DATASETS_CACHE).expanduser()
    builder = cache / (owner + "___" * len(slash) + camelcase_to_snakecase(last))
    if any(builder.glob(f"{config or '*'}/*/*")):
        return [Finding(key, f"{source} in the cache")]
    fix = "load it once with this HF_HOME where there is network (HF_HUB_OFFLINE is set here), or give a file"
    return [Finding(key, f"{source} is not in the cache {cache}", fix)]


def check_caches() -> list[Finding]:
    """Say where the hub cache is, and whether it can be written where it may have to be."""
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    if constants.HF_HUB_OFFLINE:
        return [Finding("hub cache", f"{cache}, offline")]
    existing = existing_part(cache)
    if not os.access(existing, os.W_OK | os.X_OK):
        return [Finding("hub cache", f"{existing} is not writable", "set HF_HOME to a folder that all nodes share")]
    return [Finding("hub cache", f"{cache}, online")]


# Versions


def versions() -> dict[str, str]:
    """Return what has to be equal on all ranks: packages, the source of polar, Python, CUDA and NCCL."""
    found: Mapping[str, Any] = {
        "python": platform.python_version(),
        **{name: installed_version(name) for name in PACKAGES},
        "polar's source": source_digest(),
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else None,
    }
    return {name: str(version) for name, version in found.items() if version is not None}


def source_digest() -> str:
    """Return the first 8 digits of a SHA-256 over polar's Python files, by name."""
    digest = hashlib.sha256()
    root = Path(__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:8]


def check_versions(here: Mapping[str, str], reference: Mapping[str, str]) -> list[Finding]:
    """Compare with the versions of rank 0."""
    names = [name for name in {**reference, **here} if here.get(name) != reference.get(name)]
    if names:
        different = ", ".join(f"{n} {here.get(n, 'missing')} (rank 0: {reference.get(n, 'missing')})" for n in names)
        return [Finding("versions", different, "start all nodes from one image, environment and checkout")]
    return [Finding("versions", ", ".join(f"{n} {here[n]}" for n in ("polar", "torch", "deepspeed") if n in here))]
