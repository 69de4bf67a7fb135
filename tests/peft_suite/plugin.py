"""A pytest plugin for PEFT's test modules: puts POLAR into their parameters, keeps its tests, knows the exceptions."""

from __future__ import annotations

import contextlib
import re
import sys
import types
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from cases import ACTIVE_ROWS, DESELECTED, EXPECTED_FAILURES, MIXED_ROWS, ROWS, TRANSFORMERS_ROW
from fake_hub import models

from polar import PolarConfig

# PEFT's test modules import diffusers for an isinstance check and for two tests of image models.
_diffusers = types.ModuleType("diffusers")
_diffusers.StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})  # type: ignore[attr-defined]
sys.modules.setdefault("diffusers", _diffusers)

# What a parametrised test is given, by the names of its parameters.
_RANDOM = {"init_weights": False}
_PARAMETERS: dict[str, list[Any]] = {
    "test_name,model_id,config_cls,config_kwargs": [(f"PoLAR {n}", m, PolarConfig, kwargs) for n, m, kwargs in ROWS],
    "test_name,tuner_method,config_cls,config_kwargs_1,config_kwargs_2": [
        (f"PoLAR {name}", "polar", PolarConfig, _RANDOM | a, _RANDOM | b) for name, a, b in ACTIVE_ROWS
    ],
    "config_class,mandatory_kwargs": [(PolarConfig, {})],
    "config_cls": [PolarConfig],
    "config_class": [PolarConfig],
}
_MIXED = [(f"PoLAR {name}", PolarConfig(**_RANDOM, **a), PolarConfig(**_RANDOM, **b)) for name, a, b in MIXED_ROWS]
_TASKS = {
    "test_decoder_models": "CAUSAL_LM",
    "test_encoder_decoder_models": "SEQ_2_SEQ_LM",
    "test_feature_extraction_models": "FEATURE_EXTRACTION",
    "test_seq_classifier": "SEQ_CLS",
}
_METHODS = ("config_cls", "config_class", "config0")


@contextlib.contextmanager
def _offline(model_id: str) -> Iterator[None]:
    yield  # the tests' own version goes online when a model is used for the first time


def _mixed(values: list[Any], module: Any) -> list[Any]:
    """Return our rows for the table of mixed batches; elsewhere the row for LoRA as one for us."""
    if values is module.MIXED_ADAPTER_TEST_CASES:
        return _MIXED
    rows = [row for row in values if row[0].startswith("LoRA")]
    return [(f"PoLAR for {name}", _translate(config0), _translate(config1)) for name, config0, config1 in rows]


def _translate(config: Any) -> PolarConfig:
    names = {"target_modules": config.target_modules, "modules_to_save": config.modules_to_save}
    return PolarConfig(**names, r=2, init_weights=False)


def _ours(mark: pytest.Mark, module: Any) -> pytest.Mark:
    """Return a parametrize mark with PEFT's methods replaced by ours, and only models that the fake hub has."""
    if mark.name != "parametrize":
        return mark
    names, values, *rest = mark.args
    key = ",".join(n.strip() for n in names.split(",")) if isinstance(names, str) else ",".join(names)
    if key in _PARAMETERS:
        values = _PARAMETERS[key]
    elif key == "test_name,config0,config1":
        values = _mixed(values, module)
    elif key == "config_cls,config_kwargs" and module.__name__.rpartition(".")[2] in _TASKS:
        values = [(PolarConfig, {**TRANSFORMERS_ROW, "task_type": _TASKS[module.__name__.rpartition(".")[2]]})]
    elif key == "model_id":
        values = [value for value in values if value in models()]
    else:
        return mark
    return pytest.Mark("parametrize", (names, values, *rest), {}, _ispytest=True)


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Replace the parameters of a test before they multiply it."""
    module = metafunc.module
    if hasattr(module, "hub_online_once"):
        module.hub_online_once = _offline
    common = sys.modules.get("tests.testing_common")
    if common is not None:
        common.hub_online_once = _offline
        # Lists of methods that may do something: mixed batches; Conv1D layers.
        common.RoadConfig = common.LoHaConfig = PolarConfig
    definition = metafunc.definition
    definition.own_markers[:] = [_ours(mark, module) for mark in definition.own_markers]


@pytest.fixture(autouse=True)
def mixes_batches(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let tests of mixed batches, which PEFT's decoder models have for LoRA alone, take us for it."""
    if "mixed_adapter_batches" in request.node.name:
        for module in (request.module, sys.modules["tests.testing_common"]):
            monkeypatch.setattr(module, "LoraConfig", PolarConfig)
    if "mixed_adapter_batches_mlp" in request.node.name:
        monkeypatch.setattr(request.module, "MLP", _unsaturated(request.module.MLP))


def _unsaturated(mlp: Any) -> Any:
    """Return PEFT's MLP, whose inputs go up to 89, for inputs up to 1.

    Its log-softmax saturates: some outputs are -1e-7, a rounding error of the logits. Products over 3 rows and over 9
    round differently on some CPUs, so comparing such outputs to a relative 1e-5 would test the CPU.
    """

    class UnsaturatedMLP(mlp):  # type: ignore[misc]
        def forward(self, X: Any) -> Any:
            return super().forward(X.float() / 90)

    return UnsaturatedMLP


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the tests of POLAR; mark those that are expected to fail."""
    kept, dropped = [], []
    for item in items:
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        about_us = "test_polar_" in item.nodeid or any(name in parameters for name in _METHODS)
        if not about_us or _reason(DESELECTED, item.nodeid):
            dropped.append(item)
            continue
        if reason := _reason(EXPECTED_FAILURES, item.nodeid):
            item.add_marker(pytest.mark.xfail(strict=True, reason=reason))
        kept.append(item)
    config.hook.pytest_deselected(items=dropped)
    items[:] = kept


def _reason(table: dict[str, str], nodeid: str) -> str | None:
    return next((reason for pattern, reason in table.items() if re.search(pattern, nodeid)), None)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print what did not run or was expected to fail, with the reasons."""
    write = terminalreporter.write_line
    xfailed, skipped = terminalreporter.stats.get("xfailed", []), terminalreporter.stats.get("skipped", [])
    reasons = Counter(report.wasxfail for report in xfailed)
    reasons_to_skip = Counter(report.longrepr[2] for report in skipped)
    terminalreporter.section("expected failures, by reason")
    for pattern, reason in EXPECTED_FAILURES.items():
        write(f"{reasons.get(reason, 0):5d}  {pattern}: {reason}")
    terminalreporter.section("skipped by PEFT's tests themselves, by reason")
    for reason, count in reasons_to_skip.most_common():
        write(f"{count:5d}  {reason.removeprefix('Skipped: ')}")
    terminalreporter.section("left out")
    for pattern, reason in DESELECTED.items():
        write(f"       {pattern}: {reason}")
