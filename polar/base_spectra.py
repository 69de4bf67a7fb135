"""Spectra of a base model's weights, one weight at a time from its safetensors files: 27B in the memory of a few.

The eigenvalues of W^T W need the M x M Gram matrix of the smaller side, not an SVD of W. Weights are worked on by
threads, one core each: torch lets go of the interpreter lock inside its kernels, and threads start at once and share
one copy of the libraries.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from polar.base_checkpoint import TORCH_DTYPES, TensorEntry
from polar.base_weights import StoredWeight
from polar.errors import UserError
from polar.files import write_json
from polar.heavy_tails import PowerLawFit

Precision = Literal["auto", "float32", "float64"]

# lambda_max / lambda_{M-k} up to which a float32 Gram matrix gives alpha_hill of the upper half to 1e-5; the error
# grows in proportion. Measured: eigenvalues are off by up to 3e-6 lambda_max, most by 1e-7.
FLOAT32_CONDITION = 1e4
CHUNK_ROWS = 2048  # rows of the tall side converted at once
NUM_PANELS = 8  # of the Gram matrix, of which only the lower triangle is computed
MIN_PANEL = 128
CACHE_VERSION = 1
LINE_INTERVAL_S = 10.0


@dataclass(frozen=True)
class WeightSpectrum:
    """Eigenvalues of W^T W.

    Attributes:
        eigenvalues: (M,) float64, ascending; zeros may come as small negative numbers.
        precision: dtype of the Gram matrix, float32 or float64.
    """

    eigenvalues: Tensor
    precision: str

    @property
    def rounding(self) -> float:
        """Machine epsilon of the Gram matrix."""
        return torch.finfo(getattr(torch, self.precision)).eps


def gram_spectrum(W: Tensor, precision: Precision = "auto") -> WeightSpectrum:
    """Return the eigenvalues of W^T W through the Gram matrix of the smaller side.

    A float32 Gram matrix gives each eigenvalue to within 3e-6 lambda_max, most to 1e-7: alpha_hill of the upper half,
    which the median fit uses, is right to five digits unless the spectrum is steep, and the smallest eigenvalues may
    be wrong altogether. "auto" therefore repeats in float64 where lambda_max / lambda_{M-k} exceeds 1e4. Cost: M^2 N
    multiplications (half of a full product) and 4/3 M^3 for the eigenvalues; memory beyond W: two M x M matrices and
    one chunk.

    Args:
        W: (rows, columns), any floating dtype and device; not modified.
        precision: of the Gram matrix.

    Raises:
        ValueError: W holds NaN or infinity, or only zeros.
    """
    smallest, largest = (float(value) for value in torch.aminmax(W))
    peak = max(-smallest, largest)
    if not math.isfinite(smallest) or not math.isfinite(peak):
        raise ValueError("holds NaN or infinity")
    if peak == 0:
        raise ValueError("is all zeros")
    scale = 2.0 ** -math.frexp(peak)[1]  # exact, and squares can neither overflow nor vanish
    if precision != "float64":
        values = torch.linalg.eigvalsh(_lower_gram(W, torch.float32, scale))
        threshold = values[max(values.numel() // 2 - 1, 0)]
        if precision == "float32" or values[-1] <= FLOAT32_CONDITION * threshold:
            return WeightSpectrum(values.double().cpu() / scale**2, "float32")
    values = torch.linalg.eigvalsh(_lower_gram(W, torch.float64, scale))
    return WeightSpectrum(values.cpu() / scale**2, "float64")


def _lower_gram(W: Tensor, dtype: torch.dtype, scale: float) -> Tensor:
    """Return (M, M) whose lower triangle is that of (scale W)^T (scale W); above the diagonal blocks it is zero."""
    tall = W if W.shape[0] >= W.shape[1] else W.T
    M = tall.shape[1]
    panel = max(MIN_PANEL, math.ceil(M / NUM_PANELS))
    G = torch.zeros(M, M, dtype=dtype, device=W.device)
    for start in range(0, tall.shape[0], CHUNK_ROWS):
        rows = tall[start : start + CHUNK_ROWS].to(dtype, copy=True).mul_(scale)
        for first in range(0, M, panel):
            last = min(M, first + panel)
            G[first:last, :last].addmm_(rows[:, first:last].T, rows[:, :last])
    return G


class SpectrumCache:
    """Spectra on disk by content: one file per safetensors shard and precision, named by the shard's SHA-256.

    Hashes of files outside the hub's cache (which names files by their hash) are remembered by path, size and times.

    Args:
        folder: where; None keeps nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def file_hash(self, file: Path) -> str:
        """Return the SHA-256 of a file."""
        real = file.resolve()
        if real.parent.name == "blobs" and len(real.name) == 64:
            return real.name
        status = real.stat()
        identity = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
        note = None
        if self.folder is not None:
            note = self.folder / f"hash-{hashlib.sha256(str(real).encode()).hexdigest()[:32]}.json"
            try:
                known = json.loads(note.read_text(encoding="utf-8"))
                if known["identity"] == identity:
                    return str(known["sha256"])
            except (OSError, ValueError, KeyError, TypeError):
                pass  # not there, or not ours: read the file
        with real.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        if note is not None:
            write_json(note, {"identity": identity, "sha256": digest})
        return digest

    def load(self, shard_hash: str, precision: Precision) -> dict[str, WeightSpectrum]:
        """Return tensor name -> spectrum of what is known about a shard; a damaged file counts as nothing."""
        path = self._path(shard_hash, precision)
        if path is None or not path.is_file():
            return {}
        try:
            with safe_open(path, framework="pt") as stored:
                precisions = json.loads((stored.metadata() or {})["precisions"])
                return {
                    name: WeightSpectrum(stored.get_tensor(name), precisions[name])
                    for name in stored.keys()  # noqa: SIM118
                }
        except (SafetensorError, OSError, ValueError, KeyError):
            return {}

    def save(self, shard_hash: str, precision: Precision, spectra: dict[str, WeightSpectrum]) -> None:
        """Write all spectra of a shard, atomically."""
        path = self._path(shard_hash, precision)
        if path is None or not spectra:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.incomplete-{os.getpid()}")
        precisions = json.dumps({name: spectrum.precision for name, spectrum in spectra.items()})
        try:
            tensors = {name: spectrum.eigenvalues for name, spectrum in spectra.items()}
            save_file(tensors, temporary, metadata={"precisions": precisions})
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def fits(self, identity: Sequence[object], compute: Callable[[], list[PowerLawFit]]) -> list[PowerLawFit]:
        """Return what `compute` gives for `identity` (anything JSON can hold), from an earlier call where there is one.

        goodness_of_fit takes a third of a second for a side of 5,376, which is minutes for a 27B model.
        """
        if self.folder is None:
            return compute()
        key = hashlib.sha256(json.dumps([CACHE_VERSION, identity]).encode()).hexdigest()
        path = self.folder / f"fits-v{CACHE_VERSION}-{key[:40]}.json"
        try:
            return [PowerLawFit(**values) for values in json.loads(path.read_text(encoding="utf-8"))]
        except (OSError, ValueError, TypeError):
            found = compute()
        write_json(path, [dataclasses.asdict(fit) for fit in found])
        return found

    def _path(self, shard_hash: str, precision: Precision) -> Path | None:
        if self.folder is None:
            return None
        return self.folder / f"spectra-v{CACHE_VERSION}-{shard_hash[:40]}-{precision}.safetensors"


@dataclass(frozen=True)
class ReadSpectra:
    """Spectra by module name, SHA-256 by safetensors file name, and how many spectra came from the cache."""

    spectra: dict[str, WeightSpectrum]
    file_hashes: dict[str, str]
    num_cached: int


def read_spectra(
    weights: Sequence[StoredWeight],
    precision: Precision = "auto",
    device: str = "cpu",
    workers: int = 1,
    cache: SpectrumCache | None = None,
) -> ReadSpectra:
    """Measure weights, shard by shard, `workers` at a time; memory is that of `workers` weights.

    What is done is in the cache even when a later weight fails or the process is interrupted.

    Args:
        weights: what to measure.
        precision: of the Gram matrices.
        device: where they are made: cpu or cuda.
        workers: threads. On a CPU each uses one core.
        cache: where earlier results are and these go.

    Raises:
        UserError: a weight with NaN, infinity or only zeros; a file that ends early.
    """
    cache = cache or SpectrumCache(None)
    by_file: dict[str, list[StoredWeight]] = {}
    for weight in weights:
        by_file.setdefault(weight.entry.file, []).append(weight)
    limit = torch.get_num_threads()
    with concurrent.futures.ThreadPoolExecutor(
        workers, "spectra", initializer=torch.set_num_threads, initargs=(1 if workers > 1 else limit,)
    ) as pool:
        try:
            hashes = {}
            with _Progress("files hashed", len(by_file)) as progress:
                for file, value in zip(by_file, pool.map(cache.file_hash, map(Path, by_file)), strict=True):
                    hashes[file] = value
                    progress.step()
            known = {file: cache.load(hashes[file], precision) for file in by_file}
            num_cached = sum(weight.entry.name in known[weight.entry.file] for weight in weights)
            with _Progress("weights measured", len(weights), num_cached) as progress:
                for file, stored in by_file.items():
                    todo = [weight for weight in stored if weight.entry.name not in known[file]]
                    todo.sort(key=lambda weight: -weight.entry.num_bytes)  # the largest first keeps all threads busy
                    futures = {pool.submit(_measure, weight, precision, device): weight for weight in todo}
                    try:
                        for future in concurrent.futures.as_completed(futures):
                            known[file][futures[future].entry.name] = future.result()
                            progress.step()
                    finally:
                        if todo:
                            cache.save(hashes[file], precision, known[file])
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
        finally:
            torch.set_num_threads(limit)
    spectra = {weight.name: known[weight.entry.file][weight.entry.name] for weight in weights}
    return ReadSpectra(spectra, {Path(file).name: value for file, value in hashes.items()}, num_cached)


def _measure(weight: StoredWeight, precision: Precision, device: str) -> WeightSpectrum:
    try:
        return gram_spectrum(_read(weight.entry).to(device), precision)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(
            f"{weight.entry.file}: the weight of {weight.name} {error}, so it has no spectrum;"
            f" download the model again, or leave it out with --exclude {weight.name}"
        ) from error


def _read(entry: TensorEntry) -> Tensor:
    """Read one tensor by its byte range: a mapped shard would stay in memory."""
    data = bytearray(entry.num_bytes)
    with open(entry.file, "rb") as stream:
        stream.seek(entry.start)
        if stream.readinto(data) != len(data):
            raise UserError(f"{entry.file}: ends inside {entry.name}; download the model again")
    return torch.frombuffer(data, dtype=TORCH_DTYPES[entry.dtype]).view(entry.shape)


class _Progress:
    """A bar on a terminal, a line every ten seconds elsewhere; nothing for what is done at once."""

    def __init__(self, what: str, total: int, done: int = 0) -> None:
        self.what, self.total, self.done = what, total, done
        self.bar = None
        if sys.stderr.isatty() and done < total:
            self.bar = tqdm(total=total, initial=done, desc=what, dynamic_ncols=True, delay=1, leave=False)
        self.start = self.last = time.monotonic()

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def step(self) -> None:
        self.done += 1
        now = time.monotonic()
        if self.bar is not None:
            self.bar.update()
        elif now - self.last >= LINE_INTERVAL_S:
            self.last = now
            print(f"{self.what}: {self.done}/{self.total}, {now - self.start:.0f} s", file=sys.stderr, flush=True)
