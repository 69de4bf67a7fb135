"""Both ways of multiplying whole rows, the CPU's and the accelerator's, against plain float64 products, on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from polar import stiefel, whole_rows
from polar.shards import FactorSlice

SHAPES = [(40, 4), (40, 4), (40, 4), (9, 4), (4, 4), (40, 4), (9, 4)]
Way = Callable[[Sequence[FactorSlice]], whole_rows.WholeRows]


def make_slices(dtype: torch.dtype, missing: set[int]) -> list[FactorSlice]:
    """Factors in leaves of their own; those in `missing` have no gradient."""
    torch.manual_seed(3)
    slices = []
    for k, (n, r) in enumerate(SHAPES):
        leaf = torch.randn(n, r).to(dtype)
        leaf.grad = None if k in missing else torch.randn(n, r).to(dtype)
        slices.append(FactorSlice(f"f{k}", n, r, 0, n * r, leaf, 0, None))
    return slices


def wholes(slices: Sequence[FactorSlice]) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    return [(s.leaf.double().clone(), None if s.leaf.grad is None else s.leaf.grad.double().clone()) for s in slices]


@pytest.fixture(params=["one by one", "one by one in blocks", "stacked", "stacked in small chunks"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Way:
    if request.param.startswith("one by one"):
        monkeypatch.setattr(whole_rows, "CACHE_NUMEL", 200)  # several groups
        if request.param == "one by one in blocks":  # 40 rows: three blocks and a rest
            monkeypatch.setattr(whole_rows, "BLOCK_ROWS", 12)
            monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
        return whole_rows.OneByOne
    if request.param == "stacked in small chunks":
        monkeypatch.setattr(whole_rows, "STACK_BYTES", 2 * 8 * 40 * 4)  # two factors of 40 rows
    return whole_rows.Stacked


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.06)])
@pytest.mark.parametrize("missing", [set(), {1, 4}, set(range(len(SHAPES)))])
def test_sums_fields_and_products(way: Way, dtype: torch.dtype, tolerance: float, missing: set[int]) -> None:
    slices = make_slices(dtype, missing)
    before, F = wholes(slices), len(SHAPES)
    rows = way(slices)
    XtX, XtG, GtG = torch.zeros(F, 4, 4), torch.zeros(F, 4, 4), torch.zeros(F)
    rows.add_sums(XtX, XtG, GtG)
    A, B, M = torch.randn(3, F, 4, 4)
    for k, (X, G) in enumerate(before):
        torch.testing.assert_close(XtX[k].double(), X.T @ X, atol=1e-4, rtol=1e-4)
        if G is not None:
            torch.testing.assert_close(XtG[k].double(), X.T @ G, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(GtG[k].double(), (G * G).sum(), atol=1e-3, rtol=1e-4)
    rows.apply_field(A, B)
    rows.apply_field(None, B)
    rows.apply_retraction(M)
    for k, (X, G) in enumerate(before):
        expected = X @ M[k].double()
        scale = max(1.0, expected.abs().max().item())
        torch.testing.assert_close(slices[k].leaf.double(), expected, atol=tolerance * scale, rtol=0)
        if G is None:
            assert slices[k].leaf.grad is None
        else:
            expected = G @ A[k].double() + 2 * X @ B[k].double()
            scale = max(1.0, expected.abs().max().item())
            assert slices[k].leaf.grad is not None
            torch.testing.assert_close(slices[k].leaf.grad.double(), expected, atol=tolerance * scale, rtol=0)


@pytest.mark.parametrize("missing", [set(), {0, 3}])
def test_fused_projection_and_retraction(way: Way, missing: set[int]) -> None:
    slices = make_slices(torch.float32, missing)
    before = wholes(slices)
    rows = way(slices)
    XtG, XtX = torch.zeros(2, len(SHAPES), 4, 4)
    rows.project(XtG, stiefel.tangent_core)
    rows.retract(XtX, lambda sums: stiefel.polar_core(sums).M.float())
    for k, (X, G) in enumerate(before):
        U, _, Vh = torch.linalg.svd(X, full_matrices=False)
        torch.testing.assert_close(slices[k].leaf.double(), U @ Vh, atol=2e-5, rtol=0)
        torch.testing.assert_close(XtX[k].double(), X.T @ X, atol=1e-4, rtol=1e-4)
        if G is not None:
            assert slices[k].leaf.grad is not None
            expected = G - X @ (X.T @ G + G.T @ X) / 2
            torch.testing.assert_close(slices[k].leaf.grad.double(), expected, atol=2e-4, rtol=1e-4)
