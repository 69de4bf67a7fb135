"""How heavy is the tail of a weight's spectrum, and how much of it is not noise? Mathematics on eigenvalues alone.

All eigenvalues here are those of W^T W (squared singular values of W), M of them in ascending order, with M the
smaller and N the larger side of W. Every result is the same for c W as for W.

Source: Adaptive Rank LoRA, UdiBhaskar/Adaptive-Rank-LoRA, paper. Power laws: Clauset, Shalizi and Newman 2009
(arXiv:0706.1062). Edge of a Wishart matrix: Johnstone 2001.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from polar.errors import UserError

FitName = Literal["median", "fix_finger", "goodness_of_fit"]

HISTOGRAM_BINS = 100
# fix_finger looks for x_min between these multiples of the histogram's highest bin, as the source does.
FINGER_WINDOW = (0.95, 1.5)
QUANTILES = (0.001, 0.9999)
# The interval beyond these arguments holds less than 1e-5 of the Tracy-Widom distribution.
TRACY_WIDOM_RANGE = (-6.0, 8.0)
KS_ELEMENTS = 2**20  # of one block of candidates x eigenvalues, float64


@dataclass(frozen=True)
class PowerLawFit:
    """A power law p(x) ~ x^-alpha on x > x_min.

    Attributes:
        alpha: the exponent, inf where all eigenvalues of the tail equal x_min.
        x_min: where the tail begins; the eigenvalue itself is not part of it.
        num_tail: eigenvalues in the tail, k.
        ks_distance: Kolmogorov-Smirnov distance between the tail and the law.
    """

    alpha: float
    x_min: float
    num_tail: int
    ks_distance: float


def fit_power_law(
    eigenvalues: Tensor, fit: FitName = "median", rounding: float = torch.finfo(torch.float64).eps
) -> PowerLawFit:
    """Fit the tail of a spectrum by the Hill estimator (alpha_hill).

        alpha = 1 + k / sum_{i=1..k} ln(lambda_{M-i+1} / lambda_{M-k})

    The fits differ in k alone: "median" takes k = ceil(M/2); "goodness_of_fit" tries every k and keeps that with the
    smallest Kolmogorov-Smirnov distance; "fix_finger" does so for x_min = lambda_{M-k} near the mode of a histogram
    of log10(lambda). The last two cost O(M^2) and O(M w), w the eigenvalues in the window.

    Unlike in the published code, x_min is lambda_{M-k} and not the smallest eigenvalue of the tail, and fix_finger
    compares eigenvalues with eigenvalues (the code compares them with the logarithm of the lower bound).

    Args:
        eigenvalues: (M,) ascending, M >= 2, any float dtype; may hold zeros and small negative rounding residue.
        fit: how k is chosen.
        rounding: machine epsilon of the arithmetic that made the eigenvalues. Those below M * rounding * lambda_M
            are noise around zero: they are left out, except by "median" while x_min is above them.

    Raises:
        UserError: fewer than two eigenvalues above the noise.
    """
    values = eigenvalues.double()
    floor = values.numel() * rounding * values[-1]
    if values.numel() < 2 or fit != "median" or values[_median_index(values.numel())] <= floor:
        values = values[values > floor]
        if values.numel() < 2:
            raise UserError(f"{values.numel()} eigenvalue(s) above rounding noise, a power law needs 2; leave it out")
    candidates = {
        "median": lambda: torch.tensor([_median_index(values.numel())]),
        "fix_finger": lambda: _finger_candidates(values),
        "goodness_of_fit": lambda: torch.arange(values.numel() - 1),
    }[fit]()
    # Rounding residue below a median x_min plays no part; it only must have a logarithm.
    alphas, distances = _hill(values.clamp_min(torch.finfo(torch.float64).tiny).log(), candidates)
    best = int(distances.argmin())
    index = int(candidates[best])
    return PowerLawFit(float(alphas[best]), float(values[index]), values.numel() - 1 - index, float(distances[best]))


def _median_index(num_values: int) -> int:
    """0-based index of lambda_{M-k}, k = ceil(M/2)."""
    return max(num_values - math.ceil(num_values / 2) - 1, 0)


def _finger_candidates(values: Tensor) -> Tensor:
    """Indices of the eigenvalues that fix_finger tries as x_min: those around the fullest bin of log10(lambda)."""
    logs = values.log10()
    counts = torch.histc(logs, HISTOGRAM_BINS, min=logs[0].item(), max=logs[-1].item())
    width = (logs[-1] - logs[0]).item() / HISTOGRAM_BINS
    left = logs[0].item() + int(counts.argmax()) * width
    low = FINGER_WINDOW[0] * 10**left
    high = max(FINGER_WINDOW[1] * 10**left, 10 ** (left + width))  # at least the bin itself
    inside = ((values >= low) & (values <= high)).nonzero().flatten()
    inside = inside[inside < values.numel() - 1]
    return inside if inside.numel() else torch.tensor([_median_index(values.numel())])


def _hill(logs: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
    """Exponent and Kolmogorov-Smirnov distance for each candidate x_min.

    Args:
        logs: (M,) ln of the eigenvalues, ascending.
        candidates: (c,) indices of x_min, below M - 1.

    Returns:
        alpha (c,) and distance (c,); inf and 1 where the tail is one point.
    """
    M = logs.numel()
    num_tail = (M - 1 - candidates).double()
    above = logs.flip(0).cumsum(0).flip(0)[candidates + 1]
    exponents = num_tail / (above - num_tail * logs[candidates]).clamp_min(0)
    distances = torch.ones_like(exponents)
    position = torch.arange(M)
    step = max(1, KS_ELEMENTS // M)
    for start in range(0, candidates.numel(), step):
        index = candidates[start : start + step, None]
        first = int(index.min()) + 1
        order = (position[None, first:] - index).double()  # 1 for the smallest eigenvalue of the tail
        law = -torch.expm1(-exponents[start : start + step, None] * (logs[None, first:] - logs[index]))
        share = order / num_tail[start : start + step, None]
        gap = torch.maximum(share - law, law - share + 1 / num_tail[start : start + step, None])
        distances[start : start + step] = gap.masked_fill(order < 1, 0).amax(1)
    return 1 + exponents, distances.masked_fill(~exponents.isfinite(), 1.0)


def marchenko_pastur_edge(M: int, N: int, variance: float = 1.0) -> float:
    """Upper edge of the bulk of W^T W for noise: variance (1 + 1/sqrt(Q))^2 with Q = N / M.

    Args:
        M: smaller side of W.
        N: larger side.
        variance: mean of the eigenvalues, N times the variance of an entry.
    """
    return variance * (1 + math.sqrt(M / N)) ** 2


def tracy_widom_width(M: int, N: int, variance: float = 1.0) -> float:
    """Scale of the largest eigenvalue's fluctuation about the edge: variance Q^(-1/2) M^(-2/3) (1 + Q^(-1/2))^(4/3)."""
    q = math.sqrt(M / N)
    return variance * q * M ** (-2 / 3) * (1 + q) ** (4 / 3)


def tracy_widom_cdf(s: float) -> float:
    """Tracy-Widom distribution for real matrices (beta = 1), as det(I - A) with A(x, y) = Ai(x + y + s) on x, y > 0.

    The determinant by Gauss-Legendre quadrature converges exponentially (Bornemann 2010, arXiv:0904.1581); the kernel
    is Ferrari and Spohn's (2005). Good to 1e-10 on the range used here.
    """
    nodes, weights = np.polynomial.legendre.leggauss(64)
    length = 20.0  # Ai(20 - 6) is below 1e-15
    x = torch.from_numpy((nodes + 1) * length / 2)
    root = torch.from_numpy(weights * length / 2).sqrt()
    kernel = root[:, None] * torch.special.airy_ai(x[:, None] + x[None, :] + s) * root[None, :]
    return float(torch.linalg.det(torch.eye(len(x), dtype=torch.float64) - kernel))


@functools.lru_cache
def tracy_widom_quantile(probability: float) -> float:
    """Return s with P(Tracy-Widom <= s) = probability, by bisection to 1e-12.

    Raises:
        UserError: outside [0.001, 0.9999].
    """
    if not QUANTILES[0] <= probability <= QUANTILES[1]:
        raise UserError(
            f"tracy_widom {probability}: a probability from {QUANTILES[0]} to {QUANTILES[1]}; 0.99 is usual"
        )
    low, high = TRACY_WIDOM_RANGE
    while high - low > 1e-12:
        middle = (low + high) / 2
        if tracy_widom_cdf(middle) < probability:
            low = middle
        else:
            high = middle
    return high


def count_spikes(eigenvalues: Tensor, N: int, tracy_widom: float | None = None) -> int:
    """Return N_s, the number of eigenvalues above the bulk of a noise matrix with the same mean eigenvalue.

    The asymptotic edge is exceeded by pure noise in about one draw of six; with `tracy_widom` = p the edge moves up
    until that happens with probability 1 - p. (The published code moves it by the square root of a quantity that grows
    as lambda^(2/3), so that its count depends on the unit of W.) Strong spikes raise the mean and with it the edge: a
    weak spike beside a very strong one is not counted.

    Args:
        eigenvalues: (M,) in any order, all of them: their mean is the variance.
        N: larger side of W.
        tracy_widom: probability p, or None for the asymptotic edge.
    """
    M = eigenvalues.numel()
    variance = float(eigenvalues.double().mean())
    edge = marchenko_pastur_edge(M, N, variance)
    if tracy_widom is not None:
        edge += tracy_widom_quantile(tracy_widom) * tracy_widom_width(M, N, variance)
    return int((eigenvalues.double() > edge).sum())
