"""The table of what runs on what: complete, shown in the README, and tested row by row elsewhere."""

from __future__ import annotations

import itertools

import pytest

from polar import compatibility
from polar.compatibility import BASES, ENGINES, OPTIMIZERS, PRECISIONS, check_supported, verdict
from polar.errors import UserError
from tests.distributed.constrain_worker import CLOSE, EXACT, REFUSED
from tests.distributed.quantized_worker import CASES as QUANTIZED

ENGINE_OF = {"ddp": "DDP", "zero1": "ZeRO-1", "zero2": "ZeRO-2", "zero3": "ZeRO-3", "fsdp2": "FSDP2"}
OPTIMIZER_OF = {
    **dict.fromkeys(("adamw", "adamw_fused", "adamw_foreach", "zero_redundancy"), "AdamW"),
    **{"sgd": "SGD", "stiefel_adamw": "StiefelAdamW", "cpu_adam": "DeepSpeedCPUAdam", "adamw_8bit": "AdamW8bit"},
}


def combination(case: dict[str, str]) -> tuple[str, str, str]:
    return (
        ENGINE_OF[case["engine"]],
        OPTIMIZER_OF[case.get("optimizer", "adamw")],
        case.get("dtype", "fp32"),
    )


def test_each_case_has_the_verdict_that_it_is_tested_for() -> None:
    for status, cases in (("exact", EXACT), ("close", CLOSE)):
        for case in cases:
            assert verdict(*combination(case)).status == status, case
    for case, _ in REFUSED:
        if case["engine"] in ENGINE_OF:
            assert verdict(*combination(case)).status == "refused", case


def test_each_combination_in_fp32_and_each_precision_has_a_case() -> None:
    """One process is DDP on one rank; it has its own tests in tests/unit and tests/integration."""
    tested = {combination(case) for case in [*EXACT, *CLOSE]} | {
        combination(c) for c, _ in REFUSED if "fsdp1" not in str(c)
    }
    for engine, optimizer in itertools.product(ENGINES[1:], OPTIMIZERS):
        if optimizer == "DeepSpeedCPUAdam" and engine == "one process":
            continue
        assert (engine, optimizer, "fp32") in tested, (engine, optimizer)
    for engine, precision in itertools.product(ENGINES[1:], PRECISIONS):
        if (engine, precision) != ("FSDP2", "fp16"):  # bf16 is FSDP2's precision here; fp16 would need its own scaler
            assert (engine, "AdamW", precision) in tested, (engine, precision)


def test_each_engine_with_a_quantised_base_has_a_case() -> None:
    tested = {(f"{bits}-bit", ENGINE_OF[engine]) for bits, engine in QUANTIZED}
    for base, engine in itertools.product(BASES[1:], ENGINES[1:]):
        assert ((base, engine) in tested) == (verdict(engine, "AdamW", "bf16", base).status == "close"), (base, engine)


def test_refusals_name_the_combination_and_the_fix() -> None:
    with pytest.raises(UserError, match=r"AdamW8bit under FSDP2 does not work: .* use AdamW"):
        check_supported("FSDP2", "AdamW8bit")
    with pytest.raises(UserError, match=r"a base in 8-bit under ZeRO-3 does not work: .* use load_in_4bit"):
        check_supported("ZeRO-3", "AdamW", "bf16", "8-bit")
    check_supported("ZeRO-3", "an optimizer of the user's own")


def test_the_table_has_every_engine() -> None:
    text = "\n".join(compatibility.table())
    for engine in (*ENGINES, *compatibility.NO_ENGINE):
        assert f"| {engine} |" in text
