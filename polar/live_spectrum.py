"""What the training log says about the adapter's geometry: orthonormality error and stable rank, beside the loss.

The stable rank needs no delta weight and no factor: norm(dW)_F^2 and norm(dW)_2^2 of dW = L C R^T follow from r x r
matrices alone,

    M = (L^T L)^(1/2) C (R^T R)^(1/2)     has the singular values of dW,

and the Gram matrices of the Stiefel factors are there already, for the orthonormality error. PoLAR: C = Theta, whole on
every rank after one small sum. LoRA and DoRA: C = I, where A and B are whole (one process, DDP, ZeRO-1, ZeRO-2).
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

import torch
from torch import Tensor, nn

from polar import stiefel
from polar.constrain import ManifoldHandle
from polar.engine_state import whole_of, whole_shape
from polar.factor_batch import largest_orthonormality_error
from polar.shards import FactorSlice, resolve

# Below this the Gram matrices are I up to rounding, and Theta alone has the spectrum.
ORTHONORMAL = 1e-4


class LiveSpectrum:
    """Measures the adapter that a model trains, at logging steps.

    Args:
        model: with one trainable adapter, or several.
        handle: what `polar.constrain` returned, None for adapters without Stiefel factors.
    """

    def __init__(self, model: nn.Module, handle: ManifoldHandle | None) -> None:
        self.model = model
        self.handle = handle
        self._thetas: dict[str, FactorSlice] = {}
        self._resolved: tuple[int, ...] = ()

    def measure(self) -> dict[str, float]:
        """Return `orthonormality_error`, the largest, and `stable_rank`, the median over modules with dW != 0.

        What cannot be measured is left out. Collective: call it on every rank of the engine.
        """
        if self.handle is None:
            ranks = stable_ranks(self._lora_matrices())
            return {"stable_rank": median(ranks)} if ranks else {}
        grams = self.handle.gram_matrices()
        error = largest_orthonormality_error(grams.values())
        thetas = self._whole_thetas()
        matrices: list[tuple[Tensor | None, Tensor, Tensor | None]] = []
        for name, XtX in grams.items():
            stem, _, adapter = name.rpartition(".polar_X.")
            YtY = grams.get(f"{stem}.polar_Y.{adapter}")
            if not stem or YtY is None:
                continue
            Theta = thetas.get(f"{stem}.polar_Theta.{adapter}")
            C = torch.eye(len(XtX)) if Theta is None else torch.diag(Theta) if Theta.dim() == 1 else Theta
            matrices.append((None, C, None) if error < ORTHONORMAL else (XtX, C, YtY))
        ranks = stable_ranks(matrices)
        return {"orthonormality_error": error, **({"stable_rank": median(ranks)} if ranks else {})}

    def _whole_thetas(self) -> dict[str, Tensor]:
        parameters = {n: p for n, p in self.model.named_parameters() if p.requires_grad and ".polar_Theta." in n}
        identity = tuple(id(parameter) for parameter in parameters.values())
        if identity != self._resolved:  # the first time, or another adapter is trained now
            self._thetas, self._resolved = resolve(parameters, self.model), identity
        found = whole_of(self._thetas)
        return {name: found[name].view(whole_shape(parameter)) for name, parameter in parameters.items()}

    def _lora_matrices(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        parameters = {n: p for n, p in self.model.named_parameters() if p.requires_grad and ".lora_" in n}
        matrices = []
        with torch.no_grad(), stiefel.full_precision():
            for name, A in parameters.items():
                B = parameters.get(name.replace(".lora_A.", ".lora_B."))
                if ".lora_A." in name and B is not None and _is_matrix(A) and _is_matrix(B):
                    BtB, AAt = B.float().T @ B.float(), A.float() @ A.float().T
                    matrices.append((BtB, torch.eye(len(AAt)), AAt))
        return matrices


def stable_ranks(matrices: Sequence[tuple[Tensor | None, Tensor, Tensor | None]]) -> list[float]:
    """Return norm(dW)_F^2 / norm(dW)_2^2 of each dW = L C R^T that is not zero.

    Args:
        matrices: (L^T L, C, R^T R), each (r, r) on any device; None stands for the identity.
    """
    by_r: dict[int, list[tuple[Tensor | None, Tensor, Tensor | None]]] = {}
    for item in matrices:
        by_r.setdefault(item[1].shape[0], []).append(item)
    found: list[float] = []
    for same in by_r.values():
        M = _stack([item[1] for item in same])
        if same[0][0] is not None:
            M = _root(_stack([item[0] for item in same])) @ M
        if same[0][2] is not None:
            M = M @ _root(_stack([item[2] for item in same]))
        size = M.abs().amax(dim=(-2, -1))
        M = M[size > 0] / size[size > 0, None, None]  # so that no square underflows
        if len(M) and M.isfinite().all():
            squares = torch.linalg.eigvalsh(M.mT @ M)
            found += (squares.sum(-1) / squares[:, -1]).tolist()
    return found


def _stack(items: list[Tensor | None]) -> Tensor:
    return torch.stack([item for item in items if item is not None]).to("cpu", torch.float64)


def _root(gram: Tensor) -> Tensor:
    """Symmetric square root of positive semidefinite matrices (F, r, r)."""
    values, vectors = torch.linalg.eigh(gram)
    return (vectors * values.clamp(min=0).sqrt()[:, None, :]) @ vectors.mT


def _is_matrix(parameter: Tensor) -> bool:
    """Whether this rank holds all of a matrix: ZeRO-3 leaves an empty tensor, FSDP2 a DTensor."""
    return parameter.dim() == 2 and not hasattr(parameter, "ds_id") and not hasattr(parameter, "device_mesh")
