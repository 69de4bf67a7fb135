"""Mathematics of the Stiefel manifold St(n, r) = { X in R^(n x r): X^T X = I_r }, on tensors alone.

Two families. The first works on whole factors and is what a textbook prints. The second, the *cores*, needs only
r x r matrices, because every field is `G A + X B` and every retraction is `X M` with r x r matrices A, B, M that depend
on X^T X and X^T G alone. That is why a factor whose rows lie on many ranks never has to be gathered: the ranks add up
r x r sums, each computes the cores, and each multiplies its own rows from the right.

    field                  A                    B
    tangent projection     I                    -sym(X^T G)
    landing, textbook      1/2 X^T X            -1/2 G^T X + penalty (X^T X - I)
    landing, upstream      X^T X                -G^T X     + penalty (X^T X - I)

    retraction             M
    polar                  (X^T X)^(-1/2)
    QR                     R^-1,  R = chol(X^T X) upper triangular

No function here forms an n x n matrix, knows a module, a process group or an engine. All arguments may carry leading
batch dimensions.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor

LandingConvention = Literal["textbook", "upstream"]

# X^T X comes from fp32 products, so eigenvalues below 1e-7 of the largest are rounding.
MAX_CONDITION = 1e7


class RetractionCore(NamedTuple):
    """Of a retraction X M: M (..., r, r) float64, and the condition number of X^T X (...,), inf where singular."""

    M: Tensor
    condition: Tensor


def sym(A: Tensor) -> Tensor:
    """Symmetric part (A + A^T) / 2 of square matrices (..., r, r)."""
    return (A + A.mT) / 2


def tangent_project(X: Tensor, G: Tensor) -> Tensor:
    """Project Euclidean gradients onto the tangent space of St(n, r) at X: `G - X sym(X^T G)`.

    Cost 4 n r^2 flops. The projection is orthogonal in the Euclidean metric (Edelman, Arias, Smith 1998, eq. 2.4).

    Args:
        X: (..., n, r), columns orthonormal; otherwise the result is tangent only up to the error of X.
        G: (..., n, r), any.
    """
    return G - X @ sym(X.mT @ G)


def landing_field(
    X: Tensor, G: Tensor, *, penalty: float | Tensor, convention: LandingConvention = "textbook"
) -> Tensor:
    """Landing field `skew(G X^T) X + penalty X (X^T X - I)`, skew(A) = (A - A^T)/2, without any n x n matrix.

    `upstream` is the direction of the paper's code, which leaves out the factor 1/2 of skew (PoLAR, Algorithm 2, as
    coded); the same direction under `textbook` has half of its penalty. Source: Ablin and Peyre 2022, eq. 5. X need not
    be orthonormal: the penalty pulls it back. Cost 8 n r^2 flops.

    Args:
        X: (..., n, r), any full-rank matrix.
        G: (..., n, r), the Euclidean gradient.
        penalty: weight lambda of the orthonormality term, in the named convention.
    """
    A, B = landing_cores(X.mT @ X, X.mT @ G, penalty=penalty, convention=convention)
    return G @ A + X @ B


def landing_cores(
    XtX: Tensor, XtG: Tensor, *, penalty: float | Tensor, convention: LandingConvention
) -> tuple[Tensor, Tensor]:
    """Cores (A, B) with `landing_field = G A + X B`; arguments and results (..., r, r)."""
    half = 0.5 if convention == "textbook" else 1.0
    identity = torch.eye(XtX.shape[-1], dtype=XtX.dtype, device=XtX.device)
    return half * XtX, penalty * (XtX - identity) - half * XtG.mT


def tangent_core(XtG: Tensor) -> Tensor:
    """Core B with `tangent_project = G + X B`; (..., r, r)."""
    return -sym(XtG)


def polar_core(XtX: Tensor) -> RetractionCore:
    """Core M = (X^T X)^(-1/2) of the polar retraction, in float64.

    Coupled Newton-Schulz iteration (Higham 2008, eq. 6.35) where all matrices are within 0.9 of a multiple of I, which
    every sane step is: a few batched products. Otherwise an eigendecomposition. Float64 because the r x r
    work is small beside the n x r products, and it leaves the rounding of X^T X as the only error. Cost O(r^3) per
    matrix, one synchronisation with an accelerator.

    Args:
        XtX: (..., r, r) symmetric positive semi-definite. Matrices that are not finite or are numerically singular give
            M = I and condition = inf: the caller has to take another path for them.

    Returns:
        M and an upper bound of the condition number.
    """
    S = XtX.double()
    identity = torch.eye(S.shape[-1], dtype=S.dtype, device=S.device)
    mean = S.diagonal(dim1=-2, dim2=-1).mean(-1)  # of the eigenvalues
    A = S / mean[..., None, None]
    distance = torch.linalg.matrix_norm(identity - A)
    worst = distance.max().item()
    if not worst < 0.9:  # also when it is not a number
        return _polar_core_by_eigh(S)
    M = _inverse_root(A, identity, worst) * mean.rsqrt()[..., None, None]
    return RetractionCore(M, (1 + distance) / (1 - distance))


def _inverse_root(A: Tensor, identity: Tensor, distance: float) -> Tensor:
    """A^(-1/2) by coupled Newton-Schulz for norm(I - A) <= distance < 1; each iteration squares the distance."""
    T = 1.5 * identity - 0.5 * A
    Y, Z = A @ T, T  # Y -> A^(1/2), Z -> A^(-1/2)
    distance = (3 + distance) * distance**2 / 4
    while distance > 1e-9:
        T = 1.5 * identity - 0.5 * (Z @ Y)
        Z = T @ Z
        distance = (3 + distance) * distance**2 / 4
        if distance > 1e-9:
            Y = Y @ T
    return Z


def _polar_core_by_eigh(S: Tensor) -> RetractionCore:
    finite = S.isfinite().all(-1).all(-1)
    identity = torch.eye(S.shape[-1], dtype=S.dtype, device=S.device)
    eigenvalues, V = torch.linalg.eigh(torch.where(finite[..., None, None], S, identity))
    condition = eigenvalues[..., -1] / eigenvalues[..., 0]
    usable = finite & (condition > 0) & (condition < MAX_CONDITION)
    condition = torch.where(usable, condition, torch.inf)
    eigenvalues = torch.where(usable[..., None], eigenvalues, 1.0)  # M = V V^T = I
    return RetractionCore((V * eigenvalues.rsqrt()[..., None, :]) @ V.mT, condition)


def qr_core(XtX: Tensor) -> RetractionCore:
    """Core M = R^-1 of the QR retraction, R the Cholesky factor of X^T X with positive diagonal, in float64.

    One multiplication is CholeskyQR; repeating it where the condition asks for it is CholeskyQR2 (Yamamoto et al.
    2015). The condition is estimated from the diagonal of R, a lower bound within r of it in practice.

    Args:
        XtX: (..., r, r), as for `polar_core`.
    """
    S = XtX.double()
    identity = torch.eye(S.shape[-1], dtype=S.dtype, device=S.device).expand_as(S)
    L, info = torch.linalg.cholesky_ex(S)
    diagonal = L.diagonal(dim1=-2, dim2=-1)
    condition = (diagonal.amax(-1) / diagonal.amin(-1)).square()
    usable = (info == 0) & (condition < MAX_CONDITION) & S.isfinite().all(-1).all(-1)
    if not usable.all():
        condition = torch.where(usable, condition, torch.inf)
        L = torch.where(usable[..., None, None], L, identity)
    return RetractionCore(torch.linalg.solve_triangular(L.mT, identity, upper=True), condition)


def polar_factor(A: Tensor) -> Tensor:
    """Nearest matrix with orthonormal columns, U V^T of the SVD of A (..., n, r), in float64; any rank.

    The safe and slow way: for a rank-deficient A it still returns orthonormal columns. Cost O(n r^2) with a large
    constant.
    """
    U, _, Vh = torch.linalg.svd(A.double(), full_matrices=False)
    return (U @ Vh).to(A.dtype)


def retract_polar(X: Tensor) -> Tensor:
    """Polar retraction X (X^T X)^(-1/2) of whole factors (..., n, r); to first order equal to the step that led to X.

    The result is the nearest point of St(n, r) to X (Absil, Mahony, Sepulchre 2008, ex. 4.1.3).
    """
    M, condition = polar_core(X.mT @ X)
    return torch.where((condition < 1e4)[..., None, None], X @ M.to(X.dtype), polar_factor(X))


def retract_qr(X: Tensor) -> Tensor:
    """QR retraction of whole factors (..., n, r): Q of X = Q R with positive diagonal of R, in float64.

    Source: Absil, Mahony, Sepulchre 2008, ex. 4.1.3.
    """
    Q, R = torch.linalg.qr(X.double())
    signs = torch.where(R.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0)
    return (Q * signs[..., None, :]).to(X.dtype)


def orthonormality_error(X: Tensor) -> Tensor:
    """norm(X^T X - I)_F for each factor (..., n, r)."""
    XtX = X.mT @ X
    return torch.linalg.matrix_norm(XtX - torch.eye(XtX.shape[-1], dtype=XtX.dtype, device=XtX.device))


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Run fp32 matrix products in real fp32, whatever the training loop chose, and restore its choice.

    TF32 or bf16 products would leave X^T X with an error of 1e-3 and autocast one of 8e-3; retraction has to see 1e-7.
    """
    backends = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        with torch.no_grad(), torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
    finally:
        for backend, value in zip(backends, before, strict=True):
            backend.fp32_precision = value
