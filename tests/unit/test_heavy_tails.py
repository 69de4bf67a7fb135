"""Fits and spike counts on spectra whose answer is known, and against slow formulas and scipy's own statistics."""

from __future__ import annotations

import math

import pytest
import scipy.stats
import torch

from polar.errors import UserError
from polar.heavy_tails import (
    count_spikes,
    fit_power_law,
    marchenko_pastur_edge,
    tracy_widom_cdf,
    tracy_widom_quantile,
    tracy_widom_width,
)

FITS = ("median", "fix_finger", "goodness_of_fit")


def pareto(num: int, alpha: float, seed: int, x_min: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(num, generator=generator, dtype=torch.float64)
    return (x_min * uniform ** (-1 / (alpha - 1))).sort().values


def noise_eigenvalues(M: int, N: int, generator: torch.Generator, spikes: tuple[float, ...] = ()) -> torch.Tensor:
    """Eigenvalues of W^T W for noise with unit mean eigenvalue plus spikes, given as singular values."""
    W = torch.randn(N, M, generator=generator, dtype=torch.float64) / math.sqrt(N)
    for value in spikes:
        u, v = (torch.randn(n, generator=generator, dtype=torch.float64) for n in (N, M))
        W += value * torch.outer(u / u.norm(), v / v.norm())
    return torch.linalg.svdvals(W).flip(0) ** 2


def slow_hill(values: list[float], k: int) -> float:
    """The formula, word for word, with 1-based lambda_i."""
    M = len(values)
    lam = dict(enumerate(values, start=1))
    return 1 + k / sum(math.log(lam[M - i + 1] / lam[M - k]) for i in range(1, k + 1))


@pytest.mark.parametrize("M", [2, 3, 10, 51])
def test_median_fit_is_the_formula(M: int) -> None:
    values = pareto(M, 2.5, M)
    fit = fit_power_law(values)
    k = min(math.ceil(M / 2), M - 1)
    assert fit.num_tail == k
    assert fit.x_min == values[M - k - 1]
    assert fit.alpha == pytest.approx(slow_hill(values.tolist(), k), rel=1e-12)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_goodness_of_fit_minimises_scipys_distance(seed: int) -> None:
    bulk = torch.rand(30, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    values = torch.cat([bulk, pareto(20, 2.2, seed)]).sort().values
    best = (math.inf, 0, 0.0)
    for k in range(1, len(values)):
        alpha, x_min = slow_hill(values.tolist(), k), values[-k - 1].item()
        law = scipy.stats.pareto(alpha - 1, scale=x_min)
        best = min(best, (scipy.stats.kstest(values[-k:].numpy(), law.cdf).statistic, k, alpha))
    fit = fit_power_law(values, "goodness_of_fit")
    assert (fit.ks_distance, fit.num_tail, fit.alpha) == pytest.approx(best, rel=1e-9)


@pytest.mark.parametrize("alpha", [1.8, 2.5, 4.0])
@pytest.mark.parametrize("fit", FITS)
def test_known_exponent_of_a_pareto_spectrum(fit: str, alpha: float) -> None:
    """The Hill estimator of k values has the standard error (alpha - 1) / sqrt(k); four of them are allowed."""
    values = pareto(2000, alpha, seed=7, x_min=0.03)
    found = fit_power_law(values, fit)
    assert found.num_tail >= 300
    assert abs(found.alpha - alpha) < 4 * (alpha - 1) / math.sqrt(found.num_tail)


def test_only_goodness_of_fit_finds_a_tail_above_the_median() -> None:
    """Three quarters of the spectrum are flat bulk: the median fit mixes bulk into the tail."""
    bulk = torch.linspace(0.5, 1, 1500, dtype=torch.float64)
    values = torch.cat([bulk, pareto(500, 2.0, 3)]).sort().values
    found = fit_power_law(values, "goodness_of_fit")
    assert 400 <= found.num_tail <= 510
    assert abs(found.alpha - 2.0) < 4 / math.sqrt(found.num_tail)
    assert fit_power_law(values, "median").alpha > 2.3


def test_fix_finger_looks_around_the_mode() -> None:
    """The mode is at 1, whatever the small values below it do; x_min stays in its window."""
    values = torch.cat([torch.logspace(-4, -0.5, 100, dtype=torch.float64), pareto(1000, 2.5, 1)]).sort().values
    found = fit_power_law(values, "fix_finger")
    assert 0.9 < found.x_min < 1.6
    assert abs(found.alpha - 2.5) < 4 * 1.5 / math.sqrt(found.num_tail)
    scaled = fit_power_law(1e-6 * values, "fix_finger")  # the published code's window depends on the unit
    assert scaled.num_tail == found.num_tail


@pytest.mark.parametrize("fit", FITS)
def test_fits_do_not_depend_on_the_unit(fit: str) -> None:
    values = pareto(301, 2.5, 5)
    assert fit_power_law(1e-12 * values, fit).alpha == pytest.approx(fit_power_law(values, fit).alpha, rel=1e-9)


def test_rank_deficient_spectra() -> None:
    """Zeros below the median play no part; where x_min would be noise, the noise is left out."""
    values = pareto(100, 2.5, 2)
    few = torch.cat([torch.full((40,), -1e-17, dtype=torch.float64), values])
    assert fit_power_law(few).alpha == pytest.approx(slow_hill(few.tolist(), 70))
    many = torch.cat([torch.full((150,), 1e-17, dtype=torch.float64), values])
    assert fit_power_law(many).alpha == pytest.approx(fit_power_law(values).alpha)
    assert fit_power_law(torch.full((8,), 3.0)).alpha == math.inf
    with pytest.raises(UserError, match="a power law needs 2"):
        fit_power_law(torch.tensor([0.0, 0.0, 0.0, 1.0]))


@pytest.mark.parametrize(("s", "probability"), [(-1.2686, 0.5), (0.4501, 0.90), (0.9793, 0.95), (2.0234, 0.99)])
def test_tracy_widom_has_the_published_quantiles(s: float, probability: float) -> None:
    """Values of beta = 1 as tabulated by Bejan 2005 and in RMTstat."""
    assert tracy_widom_cdf(s) == pytest.approx(probability, abs=2e-5)
    assert tracy_widom_quantile(probability) == pytest.approx(s, abs=1e-4)


@pytest.mark.parametrize("M,N", [(40, 40), (40, 120), (30, 300)])
def test_width_of_the_edge_on_wishart_draws(M: int, N: int) -> None:
    """Edge + quantile * width is exceeded as often as the quantile says; 4 standard errors and the finite-size bias."""
    generator = torch.Generator().manual_seed(M + N)
    W = torch.randn(500, N, M, generator=generator)
    largest = torch.linalg.eigvalsh(W.mT @ W / N)[:, -1].double()
    for probability in (0.5, 0.9):
        edge = marchenko_pastur_edge(M, N) + tracy_widom_quantile(probability) * tracy_widom_width(M, N)
        share = (largest <= edge).double().mean().item()
        assert share == pytest.approx(probability, abs=4 * math.sqrt(probability * (1 - probability) / 500) + 0.03)
    spread = largest.std().item() / tracy_widom_width(M, N)
    assert spread == pytest.approx(1.268, rel=0.15)  # standard deviation of the Tracy-Widom distribution


@pytest.mark.parametrize("num_spikes", [0, 1, 5])
@pytest.mark.parametrize("M,N", [(160, 160), (140, 300)])
def test_planted_spikes_are_counted_exactly(M: int, N: int, num_spikes: int) -> None:
    """From 2.5 times the singular value at which a spike leaves the bulk, (M/N)^(1/4)."""
    generator = torch.Generator().manual_seed(num_spikes)
    spikes = tuple((2.5 + 0.3 * i) * (M / N) ** 0.25 for i in range(num_spikes))
    for _ in range(6):
        assert count_spikes(noise_eigenvalues(M, N, generator, spikes), N, tracy_widom=0.999) == num_spikes


def test_correction_removes_false_spikes() -> None:
    """The asymptotic edge is exceeded by noise in about a sixth of the draws."""
    generator = torch.Generator().manual_seed(0)
    draws = [noise_eigenvalues(40, 80, generator) for _ in range(150)]
    plain = sum(count_spikes(draw, 80) for draw in draws)
    corrected = sum(count_spikes(draw, 80, tracy_widom=0.99) for draw in draws)
    assert 8 <= plain <= 45
    assert corrected <= 5
    assert sum(count_spikes(1e-9 * draw, 80, tracy_widom=0.99) for draw in draws) == corrected


def test_strong_spikes_hide_weak_ones() -> None:
    """The formula's variance is the mean of all eigenvalues, so a giant raises the edge for the others."""
    generator = torch.Generator().manual_seed(0)
    assert count_spikes(noise_eigenvalues(100, 100, generator, (2.5, 2.8)), 100) == 2
    assert count_spikes(noise_eigenvalues(100, 100, generator, (2.5, 2.8, 30.0)), 100) == 1


def test_quantile_out_of_range() -> None:
    with pytest.raises(UserError, match="tracy_widom 99: a probability"):
        tracy_widom_quantile(99)
