"""Values of the Stiefel factors: how they start, and how they come back to fp32."""

from __future__ import annotations

import torch

# Rounding to bf16 (relative error 2^-9 per entry) moves an entry of X^T X by at most 2^-8. Factors that never were
# orthonormal, such as those of "gaussian" (about sqrt(2 / n) per entry), are farther off.
_ROUNDED = 2.0**-8
# Below this size an exact SVD of the base weight takes well under a second.
_EXACT_SVD_SIZE = 1024


@torch.no_grad()
def fill_orthonormal(factor: torch.Tensor) -> None:
    """Fill with a uniform (Haar) draw from St(n, r): QR of a Gaussian with the signs of R's diagonal removed.

    Drawn on the CPU from torch's default generator, so that one seed gives one start on every device.

    Args:
        factor: (n, r) with n >= r, any device and dtype; written in place.
    """
    Q, R = torch.linalg.qr(torch.randn(factor.shape, dtype=torch.float32))
    factor.copy_(Q * torch.where(R.diagonal() < 0, -1.0, 1.0))


@torch.no_grad()
def fill_gaussian(factor: torch.Tensor) -> None:
    """Fill with independent N(0, 1/n): columns of expected squared norm one, not orthonormal.

    Args:
        factor: (n, r), written in place.
    """
    n, _ = factor.shape
    factor.copy_(torch.randn(factor.shape, dtype=torch.float32) / n**0.5)


@torch.no_grad()
def fill_singular(X: torch.Tensor, Y: torch.Tensor, weight: torch.Tensor) -> None:
    """Fill with the r leading left and right singular vectors of the base weight.

    Small weights are decomposed exactly; larger ones by a randomised range finder with power iterations (Halko et
    al. 2011, algorithm 4.4), whose cost is a few products with the weight: an exact SVD of 21504 x 5376 takes minutes.

    Args:
        X: (d_out, r), written in place.
        Y: (d_in, r), written in place.
        weight: (d_out, d_in), floating point.
    """
    W = weight.to(torch.float32)
    r = X.shape[1]
    if min(W.shape) <= max(_EXACT_SVD_SIZE, 2 * r):
        U, _, Vh = torch.linalg.svd(W, full_matrices=False)
        V = Vh.mT
    else:
        U, _, V = torch.svd_lowrank(W, q=r + 8, niter=4)
    X.copy_(orthonormalise(U[:, :r]))
    Y.copy_(orthonormalise(V[:, :r]))


def orthonormalise(factor: torch.Tensor) -> torch.Tensor:
    """Return the matrix with orthonormal columns nearest to a nearly orthonormal one (its polar factor).

    Three Newton-Schulz steps, M <- M (3 I - M^T M) / 2: quadratic convergence, products only.

    Args:
        factor: (n, r), fp32, with ||M^T M - I||_F well below 1.

    Returns:
        (n, r), fp32, contiguous.
    """
    M = factor.to(torch.float32)
    identity = torch.eye(M.shape[1], device=M.device)
    for _ in range(3):
        M = M @ (1.5 * identity - 0.5 * (M.mT @ M))
    return M.contiguous()


def was_orthonormal(factor: torch.Tensor) -> bool:
    """Tell whether a factor is orthonormal up to the rounding of a 16-bit format.

    Args:
        factor: (n, r), fp32.
    """
    identity = torch.eye(factor.shape[1], device=factor.device)
    return bool((factor.mT @ factor - identity).abs().max() < _ROUNDED)
