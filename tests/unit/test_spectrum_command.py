"""`polar spectrum` end to end: its tables against dense delta weights (numpy, scipy), its plots, what it refuses."""

from __future__ import annotations

import argparse
import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from safetensors.torch import load_file, save_file
from scipy.spatial.distance import pdist

from polar import spectrum_command
from polar.adapter_formats import read_any_adapter
from polar.errors import UserError
from polar.low_rank import effective_rank, overlap, rank_for_energy, thin_svd, truncation_error, weighted_sum
from polar.subspaces import compare_subspaces, direction_map
from tests.tiny_models import write_adapter

SIZES = {"model.layers.0.q_proj": (24, 16), "model.layers.1.q_proj": (24, 16), "model.layers.0.down_proj": (9, 40)}
PNG = b"\x89PNG"


def spectrum(*arguments: str | Path) -> None:
    parser = argparse.ArgumentParser()
    spectrum_command.add_arguments(parser)
    spectrum_command.run(parser.parse_args([str(argument) for argument in arguments]))


@pytest.mark.parametrize(("m", "n", "k"), [(7, 5, 3), (30, 20, 8), (5, 9, 7), (3, 9, 4), (6, 6, 1)])
@pytest.mark.parametrize("seed", [0, 1])
def test_factors_against_the_dense_matrix(m: int, n: int, k: int, seed: int) -> None:
    torch.manual_seed(seed)
    left, core, right = torch.randn(m, k), torch.randn(k, k), torch.randn(n, k)
    dense = (left.double() @ core.double() @ right.double().T).numpy()
    svd = thin_svd(left, core, right)
    want = np.linalg.svd(dense, compute_uv=False)
    np.testing.assert_allclose(svd.U.numpy() * svd.S.numpy() @ svd.V.numpy().T, dense, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(svd.S, want[: min(m, n, k)], rtol=1e-9, atol=1e-12)
    for factor in (svd.U, svd.V):
        np.testing.assert_allclose(factor.T @ factor, np.eye(factor.shape[1]), atol=1e-12)
    assert svd.numerical_rank == np.linalg.matrix_rank(dense, tol=1e-6 * want[0])
    p = want[want > 1e-12 * want[0]] / want.sum()
    assert effective_rank(svd.S) == pytest.approx(math.exp(-(p * np.log(p)).sum()), rel=1e-9)
    for rank in range(min(m, n, k) + 1):
        U, S, Vt = np.linalg.svd(dense)
        best = U[:, :rank] * S[:rank] @ Vt[:rank]
        error = np.linalg.norm(dense - best) / np.linalg.norm(dense)
        assert truncation_error(svd.S, rank) == pytest.approx(error, rel=1e-7, abs=1e-12)
    other = (torch.randn(m, 2), torch.randn(2, 2), torch.randn(n, 2))
    left, core, right = weighted_sum([(left, core, right), other], [0.3, -1.5])
    total = 0.3 * dense - 1.5 * (other[0].double() @ other[1].double() @ other[2].double().T).numpy()
    np.testing.assert_allclose(left @ core @ right.T, total, rtol=1e-10, atol=1e-10)


def test_numbers_at_their_ends() -> None:
    zero = torch.zeros(3, dtype=torch.float64)
    assert effective_rank(zero) == 0 and truncation_error(zero, 1) == 0 and rank_for_energy(zero, 0.9) == 1
    assert effective_rank(torch.ones(4)) == pytest.approx(4) and effective_rank(torch.eye(3)[0]) == pytest.approx(1)
    assert rank_for_energy(torch.tensor([3.0, 0.0, 4.0]).sort(descending=True).values, 16 / 25) == 1
    assert rank_for_energy(torch.ones(4), 1.0) == 4
    assert math.isnan(overlap(torch.zeros(0)))


def test_overlaps_are_the_principal_angles_of_the_dense_matrices(tmp_path: Path) -> None:
    first = write_adapter(tmp_path / "a", SIZES, r=4, seed=1)
    second = write_adapter(tmp_path / "b", SIZES, r=6, seed=2)
    # The second adapter holds two of the first one's left directions in one module.
    file = tmp_path / "b" / "adapter_model.safetensors"
    tensors, X = load_file(file), load_file(tmp_path / "a" / "adapter_model.safetensors")
    key = "base_model.model.model.layers.0.q_proj.polar_X"
    stacked = torch.cat([X[key][:, :2], tensors[key][:, 2:]], dim=1)
    tensors[key] = torch.linalg.qr(stacked).Q.contiguous()
    save_file(tensors, file)
    read = {name: read_any_adapter(tmp_path / name) for name in "ab"}
    module = read["b"].modules["model.layers.0.q_proj"]
    second["model.layers.0.q_proj"] = module.X.double() @ module.core() @ module.Y.double().T
    found = compare_subspaces(read)
    assert [item.module for item in found] == sorted(SIZES)
    for item in found:
        A, B = first[item.module].numpy(), second[item.module].numpy()
        for left, right, cosines, value in (
            (A, B, item.left, item.left_overlap), (A.T, B.T, item.right, item.right_overlap),
        ):  # fmt: skip
            spaces = [np.linalg.svd(M)[0][:, :rank] for M, rank in ((left, 4), (right, 6))]
            want = np.cos(scipy.linalg.subspace_angles(*spaces))
            np.testing.assert_allclose(np.sort(cosines), np.sort(want), atol=1e-7)
            assert value == pytest.approx(np.square(want).mean(), rel=1e-6)
        assert item.left_chance == pytest.approx(6 / A.shape[0]) and item.right_chance == pytest.approx(6 / A.shape[1])
    assert found[1].left_overlap > 0.5  # two of four directions, and some of the others by chance


@pytest.mark.parametrize("max_rows", [24, 10])
def test_distances_are_those_of_the_dense_rows(tmp_path: Path, max_rows: int) -> None:
    deltas = write_adapter(tmp_path / "a", SIZES, seed=3)
    module = read_any_adapter(tmp_path / "a").modules["model.layers.0.q_proj"]
    module.X[5] = 0.0  # a row without direction
    dense = deltas["model.layers.0.q_proj"].numpy()
    found = direction_map(module, max_rows, seed=1)
    assert len(set(found.rows.tolist())) == len(found.rows) == min(max_rows, 24) - found.num_zero
    assert 5 not in found.rows and (max_rows < 24 or found.num_zero == 1)
    chosen = dense[found.rows.numpy()]
    chosen /= np.linalg.norm(chosen, axis=1, keepdims=True)
    np.testing.assert_allclose(found.distances, scipy.spatial.distance.squareform(pdist(chosen)), atol=1e-6)
    assert found.mean == pytest.approx(pdist(chosen).mean(), rel=1e-6)
    assert torch.equal(found.rows, direction_map(module, max_rows, seed=1).rows)
    # Clustering puts neighbours beside each other: closer than in the file's order.
    beside = found.distances.diagonal(1).mean()
    by_index = found.distances[found.rows.argsort()][:, found.rows.argsort()].diagonal(1).mean()
    assert beside < by_index


def test_tables_and_plots_of_two_adapters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    deltas = {"one": write_adapter(tmp_path / "one" / "adapter", SIZES, seed=1)}
    deltas["two"] = write_adapter(tmp_path / "two" / "adapter", SIZES, seed=2, theta="diagonal")
    spectrum(tmp_path / "one", tmp_path / "two", "--out", tmp_path / "out", "--rows", "12")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    plots = {f"{name}.png" for name in ("directions", "overlap", "singular_values", "stable_rank")}
    assert names == plots | {"overlap.csv", "spectrum.csv", "spectrum.json"}
    assert all((tmp_path / "out" / name).read_bytes().startswith(PNG) for name in plots)
    rows = list(csv.DictReader((tmp_path / "out" / "spectrum.csv").read_text().splitlines()))
    assert len(rows) == 6
    stable: dict[str, list[float]] = {"one": [], "two": []}
    for row in rows:
        S = np.linalg.svd(deltas[row["adapter"]][row["module"]].numpy(), compute_uv=False)
        stable[row["adapter"]].append(np.square(S).sum() / S[0] ** 2)
        assert float(row["stable_rank"]) == pytest.approx(stable[row["adapter"]][-1], rel=1e-5)
        assert float(row["norm"]) == pytest.approx(np.linalg.norm(S), rel=1e-5)
        assert float(row["largest_singular_value"]) == pytest.approx(S[0], rel=1e-5)
    content = json.loads((tmp_path / "out" / "spectrum.json").read_text())
    assert content["adapters"][0]["modules"]["model.layers.0.q_proj"]["singular_values"] == pytest.approx(
        np.linalg.svd(deltas["one"]["model.layers.0.q_proj"].numpy(), compute_uv=False)[:4], rel=1e-5
    )
    assert len(content["overlaps"]) == 3 and len(content["overlaps"][0]["column_angles_deg"]) == 4
    text = capsys.readouterr().out
    for name, values in stable.items():
        line = next(line for line in text.splitlines() if line.startswith(f"{name} "))
        assert f"{np.median(values):.2f}" in line.split()
    assert "one and two" in text


def test_the_checkpoints_of_a_run_and_its_final_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step, scale in ((10, 0.0), (20, 1.0), (100, 1.0)):  # at step 10 Theta is zero still
        write_adapter(tmp_path / "run" / f"checkpoint-{step}", SIZES, seed=step, scale=scale)
    write_adapter(tmp_path / "run" / "adapter", SIZES, seed=9)
    (tmp_path / "run" / "done.json").write_text('{"adapter_step": 110}')
    spectrum(tmp_path / "run", "--checkpoints", "--out", tmp_path / "out")
    rows = list(csv.DictReader((tmp_path / "out" / "spectrum.csv").read_text().splitlines()))
    assert [row["step"] for row in rows[::3]] == ["10", "20", "100", "110"]
    assert (tmp_path / "out" / "stable_rank_evolution.png").read_bytes().startswith(PNG)
    lines = capsys.readouterr().out.splitlines()
    assert "dW = 0" in lines[1] and lines[1].startswith("run step 10 ")


def _nan(path: Path) -> None:
    file = path / "a" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors[next(key for key in tensors if key.endswith("polar_Theta"))].fill_(math.nan)
    save_file(tensors, file)


def _short(path: Path) -> None:
    file = path / "a" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])


BAD = {
    "no adapter": (None, ["none"], "no such folder"),
    "not a number": (_nan, ["a"], "holds NaN or Inf"),
    "truncated": (_short, ["a"], "truncated or corrupt"),
    "another base": (None, ["a", "other"], "different bases, org/a and org/b"),
    "nothing in common": (None, ["a", "alone"], "no module is common"),
    "twice": (None, ["a", "a"], "is given twice"),
    "no checkpoints": (None, ["a", "--checkpoints"], "no checkpoint-N in it"),
    "one row": (None, ["a", "--rows", "1"], "--rows 1: at least 2"),
    "no such module": (None, ["a", "--directions", "k_proj"], "--directions k_proj: no common module"),
    "alpha of a folder": (None, ["a", "--alpha", "3"], "--alpha 3: adapter folders say their own"),
    "full folder": (lambda path: (path / "out").mkdir() or (path / "out/x").touch(), ["a"], "exists and is not empty"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_measured_is_one_line_and_nothing_is_written(tmp_path: Path, name: str) -> None:
    arrange, arguments, message = BAD[name]
    write_adapter(tmp_path / "a", SIZES, base_model_name_or_path="org/a")
    write_adapter(tmp_path / "other", SIZES, base_model_name_or_path="org/b")
    write_adapter(tmp_path / "alone", {"m.k_proj": (8, 8)})
    if arrange is not None:
        arrange(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    paths = [tmp_path / part if (tmp_path / part).exists() or part == "none" else part for part in arguments]
    with pytest.raises(UserError, match=message) as caught:
        spectrum(*paths, "--out", tmp_path / "out")
    assert "\n" not in str(caught.value) and sorted(tmp_path.rglob("*")) == before
