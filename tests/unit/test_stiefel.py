"""Laws of the manifold mathematics, in float64, over seeds and shapes; fp32 against an independent float64 result."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from polar import stiefel

SHAPES = [(5, 1), (7, 7), (64, 4), (300, 16), (33, 32)]
SEEDS = [0, 1, 2]


def random_point(n: int, r: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """A point of St(n, r) made by numpy's QR, not by the code under test."""
    Q, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((n, r)))
    return torch.tensor(Q).to(dtype).contiguous()


def random_matrix(n: int, r: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.tensor(np.random.default_rng(1000 + seed).standard_normal((n, r))).to(dtype)


@pytest.mark.parametrize("n,r", SHAPES)
@pytest.mark.parametrize("seed", SEEDS)
def test_projection_is_tangent_idempotent_and_orthogonal(n: int, r: int, seed: int) -> None:
    X, G = random_point(n, r, seed), random_matrix(n, r, seed)
    P = stiefel.tangent_project(X, G)
    assert torch.allclose(X.T @ P + P.T @ X, torch.zeros(r, r, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(stiefel.tangent_project(X, P), P, atol=1e-12)
    other = stiefel.tangent_project(X, random_matrix(n, r, seed + 50))
    assert torch.allclose(((G - P) * other).sum(), torch.zeros((), dtype=torch.float64), atol=1e-10)


@pytest.mark.parametrize("n,r", SHAPES)
@pytest.mark.parametrize("seed", SEEDS)
def test_polar_retraction_is_the_svd_polar_factor_and_first_order(n: int, r: int, seed: int) -> None:
    X = random_point(n, r, seed)
    step = stiefel.tangent_project(X, random_matrix(n, r, seed))
    step = step / np.linalg.norm(step)  # zero where the manifold is two points (n = r = 1 does not occur here)
    U, _, Vh = np.linalg.svd((X + 0.3 * step).numpy(), full_matrices=False)
    np.testing.assert_allclose(stiefel.retract_polar(X + 0.3 * step).numpy(), U @ Vh, atol=1e-12)
    errors = [float(torch.linalg.norm(stiefel.retract_polar(X + t * step) - X - t * step)) for t in (1e-2, 1e-3)]
    assert errors[1] < errors[0] / 50  # quadratic in t


@pytest.mark.parametrize("n,r", SHAPES)
def test_fp32_polar_core_matches_float64_svd_to_1e_7(n: int, r: int) -> None:
    """At steps of 4e-3, the paper's learning rate, the Gram route loses nothing against an SVD."""
    X = random_point(n, r, 3, torch.float32) + 4e-3 * random_matrix(n, r, 3, torch.float32)
    U, _, Vh = np.linalg.svd(X.double().numpy(), full_matrices=False)
    M, condition = stiefel.polar_core(X.T @ X)
    assert condition < stiefel_repeat_condition()
    assert np.abs((X @ M.float()).numpy() - U @ Vh).max() < 5e-7


def stiefel_repeat_condition() -> float:
    from polar.factor_batch import REPEAT_CONDITION

    return REPEAT_CONDITION


@pytest.mark.parametrize("n,r", SHAPES)
@pytest.mark.parametrize("seed", SEEDS)
def test_landing_fields_equal_the_n_by_n_formulas(n: int, r: int, seed: int) -> None:
    X, G, penalty = random_matrix(n, r, seed), random_matrix(n, r, seed + 9), 0.37
    x, g = X.numpy(), G.numpy()
    pull = penalty * x @ (x.T @ x - np.eye(r))
    skew = g @ x.T - x @ g.T
    for convention, expected in (("textbook", 0.5 * skew @ x + pull), ("upstream", skew @ x + pull)):
        field = stiefel.landing_field(X, G, penalty=penalty, convention=convention)
        assert np.linalg.norm(field.numpy() - expected) <= 1e-12 * np.linalg.norm(expected)


def test_batched_equals_looped() -> None:
    X = torch.stack([random_matrix(20, 4, s) for s in range(6)])
    G = torch.stack([random_matrix(20, 4, s + 20) for s in range(6)])
    for batched, single in (
        (stiefel.tangent_project(X, G), [stiefel.tangent_project(x, g) for x, g in zip(X, G, strict=True)]),
        (stiefel.retract_polar(X), [stiefel.retract_polar(x) for x in X]),
        (stiefel.orthonormality_error(X), [stiefel.orthonormality_error(x) for x in X]),
    ):
        assert torch.allclose(batched, torch.stack(single), atol=1e-12)


def test_polar_core_says_when_it_cannot() -> None:
    singular = torch.zeros(3, 4, 4)
    singular[0] = torch.diag(torch.tensor([1.0, 1.0, 1.0, 0.0]))
    singular[1] = torch.nan
    singular[2] = torch.eye(4) * torch.tensor([1.0, 1.0, 1.0, 4.0])
    M, condition = stiefel.polar_core(singular)
    assert condition[0] == torch.inf and condition[1] == torch.inf
    assert condition[2] == pytest.approx(4.0)
    assert torch.equal(M[0], torch.eye(4).double()) and torch.equal(M[1], torch.eye(4).double())


def test_retraction_of_a_rank_deficient_step_is_still_orthonormal() -> None:
    X = random_matrix(30, 4, 0)
    X[:, 3] = X[:, 2]
    assert stiefel.orthonormality_error(stiefel.retract_polar(X)) < 1e-12


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_full_precision_restores_the_choice_of_the_loop(precision: str) -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        with stiefel.full_precision():
            assert torch.backends.cuda.matmul.fp32_precision == "ieee"
            assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("n,r", SHAPES)
@pytest.mark.parametrize("seed", SEEDS)
def test_qr_retraction_is_numpys_q_with_positive_diagonal(n: int, r: int, seed: int) -> None:
    X = random_point(n, r, seed) + 0.1 * random_matrix(n, r, seed) / n**0.5
    Q, R = np.linalg.qr(X.numpy())
    expected = Q * np.where(np.diag(R) < 0, -1.0, 1.0)
    np.testing.assert_allclose(stiefel.retract_qr(X).numpy(), expected, atol=1e-12)
    M, condition = stiefel.qr_core(X.T @ X)
    np.testing.assert_allclose((X @ M).numpy(), expected, atol=1e-10)
    true = np.linalg.cond(X.numpy()) ** 2
    assert 1.0 <= float(condition) <= true * (1 + 1e-9) or float(condition) == pytest.approx(1.0)


def test_qr_core_says_when_it_cannot() -> None:
    sums = torch.stack([torch.zeros(3, 3), torch.full((3, 3), torch.nan), torch.eye(3)])
    M, condition = stiefel.qr_core(sums)
    assert condition.tolist() == [torch.inf, torch.inf, 1.0]
    assert torch.equal(M, torch.eye(3).double().expand(3, 3, 3))


@pytest.mark.parametrize("spread", [1e-9, 1e-4, 0.1, 0.4, 0.85, 3.0, 300.0])
@pytest.mark.parametrize("r", [1, 5, 32])
def test_inverse_root_is_exact_near_and_far_from_the_identity(spread: float, r: int) -> None:
    """Newton-Schulz near a multiple of I and eigenvectors elsewhere give the same matrix, at any scale."""
    Q = random_point(r, r, 1)
    eigenvalues = 1 + spread * torch.linspace(0, 1, r, dtype=torch.float64)
    for scale in (1e-3, 1.0, 50.0):
        S = scale * (Q * eigenvalues) @ Q.T
        M, condition = stiefel.polar_core(S[None])
        expected = (Q * (scale * eigenvalues).rsqrt()) @ Q.T
        assert torch.linalg.norm(M[0] - expected) <= 1e-9 * torch.linalg.norm(expected)
        assert condition[0] >= float(eigenvalues[-1] / eigenvalues[0]) * (1 - 1e-9)
