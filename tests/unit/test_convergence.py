"""The pieces of benchmarks/convergence.py, and a tiny version of it from start to end."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import polar
from benchmarks import convergence, convergence_report, readme
from benchmarks.convergence_problems import Factorisation, LowRank, LowRankLora
from benchmarks.convergence_training import Method, Run, landing_nxn, rate_factor
from polar.stiefel import landing_field


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("n", "r"), [(7, 3), (12, 1), (5, 5)])
def test_the_n_x_n_field_is_that_of_polar(n: int, r: int, seed: int) -> None:
    """Also off the manifold, where the penalty is not zero."""
    torch.manual_seed(seed)
    X, G = torch.randn(n, r), torch.randn(n, r)
    expected = landing_field(X, G, penalty=0.3, convention="upstream")
    torch.testing.assert_close(landing_nxn(X, G, 0.3), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("condition", [10.0, 100.0])
def test_the_target_has_the_stated_spectrum(condition: float) -> None:
    problem = Factorisation(condition, r=8, target_rank=5, rows=40, columns=30)
    A = problem.target(seed=3)
    found = np.linalg.svd(A.double().numpy(), compute_uv=False)
    assert A.shape == (40, 30)
    np.testing.assert_allclose(found[5:], 0, atol=1e-6)
    np.testing.assert_allclose(found[:5], condition ** (-np.arange(5) / 4), rtol=1e-5)
    assert not torch.equal(A, problem.target(seed=4))


def test_the_start_is_zero_and_on_the_manifold() -> None:
    for model in (LowRank(20, 15, 4, (0, 1)), LowRankLora(20, 15, 4, (0, 1))):
        left, right = model()
        assert (left @ right).shape == (2, 20, 15) and not (left @ right).any()
    for X in (p for name, p in LowRank(20, 15, 4, (0,)).named_parameters() if "Theta" not in name):
        torch.testing.assert_close(X.T @ X, torch.eye(4), atol=1e-6, rtol=0)


def test_a_run_equals_a_loop_written_by_hand() -> None:
    """Two seeds side by side against one alone, through `polar.constrain` on a bare model."""
    problem = Factorisation(10.0, r=3, target_rank=3, rows=12, columns=9, steps=30, seeds=(5, 6))
    found = problem.run(Method("retract_polar", "AdamW"), 0.05, problem.seeds)
    model = LowRank(12, 9, 3, (6,))
    handle = polar.constrain(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.0)
    A = problem.target(6)
    for step in range(30):
        optimizer.param_groups[0]["lr"] = 0.05 * rate_factor(step, 30)
        optimizer.zero_grad()
        residual(model, A).square().sum().mul(0.5).backward()
        optimizer.step()
    handle.remove()
    expected = (residual(model, A).square().sum() / A.square().sum()).item()
    assert found.steps[-1] == 30
    assert found.losses[0][-1] != found.losses[1][-1]
    assert found.losses[1][-1] == pytest.approx(expected, rel=1e-2)
    assert max(found.orthonormality) < 3e-6


def residual(model: nn.Module, A: Tensor) -> Tensor:
    left, right = model()
    return left[0] @ right[0] - A


def test_the_grid_grows_until_the_best_rate_is_inside() -> None:
    asked = []

    def losses_at(k: int) -> list[float]:
        asked.append(k)
        return [1.0 + abs(k - 4), 2.0 + abs(k - 4)]

    assert sorted(convergence.sweep(losses_at, (0, 1, 2), floor=0.0)) == [0, 1, 2, 3, 4, 5]
    assert asked == [0, 1, 2, 3, 4, 5]
    assert [convergence.rate_of(k) for k in (-3, -2, -1, 0, 1)] == [0.03, 0.1, 0.3, 1.0, 3.0]


def test_ties_go_to_the_rate_whose_worst_seed_is_best() -> None:
    losses = {0: [1.0, 1.0, 9.0], 1: [1.02, 1.02, 1.03], 2: [math.inf] * 3}
    assert convergence.best_exponent(losses, floor=0.0) == 1
    assert convergence.best_exponent({0: [1e-14] * 3, 1: [1e-13] * 3}, floor=1e-10) == 0  # both have converged


def test_a_rate_that_diverges_is_told() -> None:
    problem = Factorisation(10.0, r=3, target_rank=3, rows=12, columns=9, steps=40, seeds=(0,))
    run = problem.run(Method("none", "SGD"), 1e3, (0,))
    assert run.losses[0][-1] == math.inf and run.steps[-1] == 40


@pytest.mark.parametrize(
    ("ratios", "verdict"),
    [
        ([0.5, 0.6, 0.9], "clearly better"),
        ([0.5, 0.6, 1.1], "neither"),
        ([0.97, 0.98, 0.99], "neither"),
        ([1.1, 2.0, math.inf], "clearly worse"),
    ],
)
def test_verdict(ratios: list[float], verdict: str) -> None:
    assert convergence_report.verdict_of(ratios)["verdict"] == verdict


def test_quick_run_writes_everything_and_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, partial = tmp_path / "convergence_cpu.json", tmp_path / "partial.jsonl"
    command = ["--quick", "--part", "factorisation", "--out", str(out), "--partial", str(partial)]
    convergence.main(command)
    result = json.loads(out.read_text())
    (problem,) = result["parts"]["factorisation"]["problems"].values()
    for found in problem["methods"].values():
        assert found["steps"][0] == 0 and found["losses"][0][0] == pytest.approx(1.0)
        assert max(found["final"]) < 0.8
        assert f"{found['rate']:g}" in found["swept"]
    assert (tmp_path / "convergence_factorisation.png").stat().st_size > 10_000
    lines = "\n".join(readme.convergence(result))
    rate = problem["methods"]["retract_polar AdamW"]["rate"]
    assert f"| retract_polar, AdamW ({rate:g}) |" in lines

    def no_run(*arguments: Any) -> Run:
        raise AssertionError("everything is stored")

    monkeypatch.setattr(Factorisation, "run", no_run)
    with partial.open("a") as file:
        file.write('["cut by a ki')
    convergence.main(command)
    again = json.loads(out.read_text())
    assert again["parts"]["factorisation"]["problems"] == result["parts"]["factorisation"]["problems"]


def part_of(**final: list[float | None]) -> dict[str, Any]:
    methods = {name.replace("__", " "): {"final": losses} for name, losses in final.items()}
    return {"problems": {f"problem {sorted(final)}": {"settings": {"floor": 1e-10}, "methods": methods}}}


def test_only_what_is_better_on_every_problem_and_seed_changes_the_conclusion() -> None:
    easy = part_of(retract_polar__AdamW=[1.0, 1.0], landing__AdamW=[0.5, 0.8], lora__AdamW=[0.1, 0.1])
    hard = part_of(retract_polar__AdamW=[1.0, 2.0], landing__AdamW=[0.5, None], lora__AdamW=[0.1, 0.1], more=[1, 1])
    comparison = convergence_report.compare({"easy": easy})
    assert comparison["clearly_better_on_every_problem"] == ["landing AdamW"]  # LoRA has no manifold step
    assert "landing, AdamW" in convergence_report.conclusion(comparison)
    comparison = convergence_report.compare({"easy": easy, "hard": hard})
    judged = list(comparison["problems"].values())[1]["landing AdamW"]
    assert judged == {"median_ratio": None, "seeds_better": 1, "verdict": "neither"}
    assert "the defaults stay" in convergence_report.conclusion(comparison)


def test_losses_below_the_floor_are_equal() -> None:
    part = part_of(retract_polar__AdamW=[1e-13, 1e-12], none__AdamW=[1e-14, 1e-14])
    (judged,) = convergence_report.compare({"part": part})["problems"].values()
    assert judged["none AdamW"] == {"median_ratio": 1.0, "seeds_better": 0, "verdict": "neither"}


def test_steps_to_a_loss() -> None:
    found = {"steps": [0, 5, 10], "losses": [[1.0, 0.5, 0.1], [1.0, 0.3, None], [1.0, 0.6, 0.2]]}
    assert convergence_report.steps_to(found, 0.5) == 5
    assert convergence_report.steps_to(found, 0.1) is None
