"""The field in the layer's backward under real engines on gloo ranks: five Adam steps, every parameter.

Compared with the float64 reference of tests/reference.py and with the hooks of `polar.constrain` in the same process.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import reference
from tests.distributed import network
from tests.distributed.backward_field_worker import CASES, LR
from tests.distributed.launch import run_ranks

# fp32 against float64, and two orders of fp32 sums, over five Adam steps of 0.05.
TOLERANCE = 1e-5


@pytest.fixture(scope="module", params=[2, 3])
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    out = tmp_path_factory.mktemp("backward-field") / f"{request.param}.json"
    run_ranks(request.param, Path(__file__).with_name("backward_field_worker.py"), str(out))
    return json.loads(out.read_text())


def expected(case: dict[str, Any]) -> dict[str, np.ndarray]:
    values, weights, batches = network.make_problem()
    if case["backward_field"] == "landing":
        penalty, convention = case["landing_penalty"], case["landing_convention"]
        options = {"lr": LR, "manifold_step": "landing", "penalty": penalty, "convention": convention}
        return reference.train(values, weights, network.SCALES, batches, **options)[0]
    adam = reference.Adam(LR)  # the projection alone: nothing retracts
    for inputs, targets in batches:
        _, grads = reference.network_gradients(values, weights, network.SCALES, inputs, targets)
        for name in (name for name in grads if not name.endswith("Theta")):
            grads[name] = reference.tangent_project(values[name], grads[name])
        adam.step(values, grads)
    return values


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda k: "-".join(str(v) for v in CASES[k].values()))
def test_every_parameter_equals_the_float64_reference_and_that_of_constrain(
    results: list[dict[str, Any]], number: int
) -> None:
    result, wanted = results[number], expected(CASES[number])
    assert result["values"].keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_allclose(result["values"][name], value.reshape(-1), atol=TOLERANCE, err_msg=name)
    if "by_constrain" in result:
        for name, value in result["by_constrain"].items():
            np.testing.assert_allclose(result["values"][name], value, atol=TOLERANCE, err_msg=name)
