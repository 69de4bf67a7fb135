"""Which directions an adapter uses: overlap of two adapters' subspaces, and distances between the rows of one dW.

Overlap of two delta weights U_a S_a V_a^T and U_b S_b V_b^T, of ranks k and l: the principal angles between the column
spaces (left, U) and between the row spaces (right, V); the mean squared cosine is 1 where one space holds the other
and max(k, l) / n on average for random spaces in R^n.

Distances, as in the PoLAR paper's figure: the rows w_i of dW are scaled to norm one, and norm(w_i - w_j) is 0 for equal
directions, sqrt(2) for orthogonal and 2 for opposite ones. A dW of low stable rank shows blocks of 0 and 2 after
hierarchical clustering. Rows are taken in the r coordinates of the row space, where all distances are the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from polar.adapter_file import AdapterFile, AdapterModule
from polar.low_rank import overlap, principal_cosines, row_coordinates, singular_values, stable_rank, thin_svd

# Rows shorter than this share of the longest have no direction worth drawing.
ZERO_ROW = 1e-9


@dataclass(frozen=True)
class SubspaceOverlap:
    """How far two adapters use the same directions in one module.

    Attributes:
        module: its name in the base model.
        first, second: names of the adapters.
        ranks: numerical ranks of the two delta weights.
        left, right: cosines of the principal angles, descending; column and row spaces.
        left_chance, right_chance: overlap of random spaces of these ranks.
    """

    module: str
    first: str
    second: str
    ranks: tuple[int, int]
    left: Tensor
    right: Tensor
    left_chance: float
    right_chance: float

    @property
    def left_overlap(self) -> float:
        """Mean squared cosine of the column spaces, in [0, 1]; NaN where a delta weight is zero."""
        return overlap(self.left)

    @property
    def right_overlap(self) -> float:
        """The same of the row spaces."""
        return overlap(self.right)


@dataclass(frozen=True)
class DirectionMap:
    """Distances between the directions of the rows of one delta weight.

    Attributes:
        rows: which rows, in the order of `distances`, which hierarchical clustering has chosen.
        distances: (n, n), in [0, 2].
        num_rows: d_out.
        num_zero: rows that were looked at and left out because they are zero.
        stable_rank: of the whole dW.
    """

    rows: Tensor
    distances: Tensor
    num_rows: int
    num_zero: int
    stable_rank: float

    @property
    def mean(self) -> float:
        """Mean over all pairs of different rows; NaN where there are none."""
        n = len(self.rows)
        return self.distances.sum().item() / (n * (n - 1)) if n > 1 else float("nan")


def compare_subspaces(adapters: Mapping[str, AdapterFile]) -> list[SubspaceOverlap]:
    """Return the overlap of each pair of adapters in each module that all of them have."""
    found = []
    for name in common_modules(list(adapters.values())):
        svds = {}
        for label, adapter in adapters.items():
            module = adapter.modules[name]
            svd = thin_svd(module.X, module.core(), module.Y)
            svds[label] = (svd.U[:, : svd.numerical_rank], svd.V[:, : svd.numerical_rank])
        for (first, (U_a, V_a)), (second, (U_b, V_b)) in combinations(svds.items(), 2):
            ranks = (U_a.shape[1], U_b.shape[1])
            found.append(
                SubspaceOverlap(
                    name, first, second, ranks, principal_cosines(U_a, U_b), principal_cosines(V_a, V_b),
                    max(ranks) / U_a.shape[0], max(ranks) / V_a.shape[0],
                )
            )  # fmt: skip
    return found


def common_modules(adapters: Sequence[AdapterFile]) -> list[str]:
    """Return the names of the modules that all adapters have, sorted."""
    return sorted(set.intersection(*(set(adapter.modules) for adapter in adapters)))


def direction_map(module: AdapterModule, max_rows: int, seed: int) -> DirectionMap:
    """Return the distances between the directions of the rows of dW, ordered by average-linkage clustering.

    Args:
        module: factors of dW, of any kind.
        max_rows: where d_out is larger, so many rows are drawn without replacement.
        seed: of the draw; the same rows for all modules of one d_out.
    """
    from scipy.cluster import hierarchy
    from scipy.spatial.distance import pdist, squareform

    rows = torch.arange(module.d_out)
    if module.d_out > max_rows:
        rows = torch.randperm(module.d_out, generator=torch.Generator().manual_seed(seed))[:max_rows].sort().values
    vectors = row_coordinates(module.X, module.core(), module.Y, rows)
    norms = torch.linalg.vector_norm(vectors, dim=1)
    keep = norms > ZERO_ROW * norms.max()
    vectors, kept = vectors[keep] / norms[keep, None], rows[keep]
    num_zero = len(rows) - len(kept)
    rank = stable_rank(singular_values(module.X, module.core(), module.Y))
    if len(kept) < 2:
        return DirectionMap(kept, torch.zeros(len(kept), len(kept), dtype=torch.float64), module.d_out, num_zero, rank)
    condensed = pdist(vectors.numpy())
    order = torch.from_numpy(hierarchy.leaves_list(hierarchy.linkage(condensed, method="average"))).long()
    distances = torch.from_numpy(squareform(condensed))[order][:, order]
    return DirectionMap(kept[order], distances, module.d_out, num_zero, rank)
