"""Mathematics of a delta weight that is kept in factors: dW = left core right^T is never formed.

Thin QR of the outer factors leaves a k x k matrix with the singular values of dW, whatever the factors look like:

    left = Q_L R_L,  right = Q_R R_R,  R_L core R_R^T = U S V^T     =>     dW = (Q_L U) S (Q_R V)^T

All arithmetic is in float64. The cost per delta weight is O((d_out + d_in) k^2).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Below this share of the largest singular value a direction of dW is the rounding of factors kept in fp32.
RANK_TOLERANCE = 1e-6


class ThinSvd(NamedTuple):
    """dW = U diag(S) V^T with U (d_out, m), S (m,) descending, V (d_in, m), m = min(k, d_out, d_in); float64."""

    U: Tensor
    S: Tensor
    V: Tensor

    @property
    def numerical_rank(self) -> int:
        """Singular values above RANK_TOLERANCE of the largest; 0 where dW = 0."""
        return int((self.S / self.S.max() > RANK_TOLERANCE).sum()) if self.S.max() > 0 else 0


def thin_svd(left: Tensor, core: Tensor, right: Tensor) -> ThinSvd:
    """Return the singular value decomposition of left core right^T.

    Args:
        left: (d_out, k), any dtype; neither orthonormal nor of full rank. d_out < k is allowed.
        core: (k, k).
        right: (d_in, k), like left.
    """
    Q_left, R_left = torch.linalg.qr(left.double())
    Q_right, R_right = torch.linalg.qr(right.double())
    U, S, Vh = torch.linalg.svd(R_left @ core.double() @ R_right.T, full_matrices=False)
    return ThinSvd(Q_left @ U, S, Q_right @ Vh.T)


def singular_values(left: Tensor, core: Tensor, right: Tensor) -> Tensor:
    """Return the k singular values of left core right^T, arguments as of `thin_svd`, padded with zeros to k."""
    R_left = torch.linalg.qr(left.double(), mode="r").R
    R_right = torch.linalg.qr(right.double(), mode="r").R
    values = torch.linalg.svdvals(R_left @ core.double() @ R_right.T)
    return torch.nn.functional.pad(values, (0, core.shape[0] - values.numel()))


def weighted_sum(
    terms: Sequence[tuple[Tensor, Tensor, Tensor]], weights: Sequence[float]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return factors of sum_i weights[i] left_i core_i right_i^T: factors side by side, cores along the diagonal.

    Args:
        terms: (left, core, right) each, of equal d_out and d_in and of any k.
        weights: one per term.
    """
    left, right = (torch.cat([term[i].double() for term in terms], dim=1) for i in (0, 2))
    core = torch.block_diag(*(weight * term[1].double() for term, weight in zip(terms, weights, strict=True)))
    return left, core, right


def truncation_error(S: Tensor, rank: int) -> float:
    """Return norm(dW - dW_rank)_F / norm(dW)_F of the best approximation of that rank; 0.0 where dW = 0.

    Exact by Eckart and Young: the singular values that are left out are the error.
    """
    total = torch.linalg.vector_norm(S).item()
    return torch.linalg.vector_norm(S[rank:]).item() / total if total > 0 else 0.0


def rank_for_energy(S: Tensor, share: float) -> int:
    """Return the smallest rank that keeps `share` of norm(dW)_F^2, in (0, 1]; 1 where dW = 0."""
    squares = (S / S.max()).square() if S.numel() and S.max() > 0 else torch.zeros(1)
    kept = squares.cumsum(0) / max(squares.sum().item(), math.ulp(0.0))
    return min(int((kept < share * (1 - 1e-12)).sum()) + 1, max(S.numel(), 1))


# One number per spectrum.


def stable_rank(S: Tensor) -> float:
    """Return sum(S^2) / max(S)^2 of (k,) singular values in any order, in [1, k]; 0.0 if all are zero."""
    largest = S.max().item()
    # Scaled first, so that tiny delta weights do not underflow when squared.
    return ((S.double() / largest) ** 2).sum().item() if largest > 0 else 0.0


def effective_rank(S: Tensor) -> float:
    """Return exp of the entropy of S / sum(S), in [1, k]; 0.0 if all are zero (Roy and Vetterli 2007)."""
    total = S.double().sum().item()
    if not total > 0:
        return 0.0
    p = S.double() / total
    return math.exp(-torch.special.xlogy(p, p).sum().item())


# Two delta weights, and the rows of one.


def principal_cosines(first: Tensor, second: Tensor) -> Tensor:
    """Return the cosines of the principal angles between two column spaces, descending.

    Args:
        first: (n, k), orthonormal columns.
        second: (n, l), orthonormal columns.

    Returns:
        (min(k, l),), in [0, 1].
    """
    return torch.linalg.svdvals(first.T @ second).clamp(max=1.0)


def overlap(cosines: Tensor) -> float:
    """Return the mean squared cosine: norm(U_a^T U_b)_F^2 / min(k, l), 1.0 where one space holds the other.

    Two random spaces of dimensions k >= l in R^n have k / n on average. NaN where a space is empty.
    """
    return cosines.square().mean().item() if cosines.numel() else math.nan


def row_coordinates(left: Tensor, core: Tensor, right: Tensor, rows: Tensor) -> Tensor:
    """Return rows of dW in coordinates of its row space: (len(rows), k), with the norms and angles of the rows.

    With right = Q R the rows of left core R^T are those of dW written in the orthonormal basis Q.

    Args:
        left: (d_out, k).
        core: (k, k).
        right: (d_in, k).
        rows: indices into 0 ... d_out - 1.
    """
    R = torch.linalg.qr(right.double(), mode="r").R
    return left[rows].double() @ (core.double() @ R.T)
