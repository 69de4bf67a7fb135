"""PoLAR on bitsandbytes 4-bit and 8-bit bases: trained on one process, DDP and ZeRO, merged, begun from its SVD."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from peft.utils.integrations import dequantize_module_weight

from polar import PolarConfig
from tests.distributed.launch import run_ranks
from tests.distributed.quantized_worker import CASES, Net, build, run_case

WORKER = Path(__file__).with_name("quantized_worker.py")
BITS = [4, 8]
# bitsandbytes 0.50 warns about fp16 products of 8-bit layers and, on the CPU, about an optional kernel package.
pytestmark = pytest.mark.filterwarnings("ignore:MatMul8bitLt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the reports of two ranks, under each engine."""
    out = tmp_path_factory.mktemp("ranks")
    run_ranks(2, WORKER, str(out))
    return out


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]} bits, {case[1]}")
def reports(request: pytest.FixtureRequest, ranks: Path) -> list[dict]:
    """Reports of one process and of both ranks, after the same training on the same rows."""
    bits, engine = request.param
    files = [ranks / f"bits-{bits}-{engine}-rank-{rank}.json" for rank in range(2)]
    return [run_case(bits), *(json.loads(file.read_text()) for file in files)]


def test_factors_stay_fp32_and_orthonormal_while_the_loss_falls(reports: list[dict]) -> None:
    for report in reports:
        assert report["dtypes"] == ["torch.float32"] * 3
        assert max(report["errors"].values()) < 1e-5
        assert report["losses"][-1] < report["losses"][0]
        assert report["moved"] > 1e-3  # every parameter, both factors included
        assert report["base_unchanged"]


def test_engines_follow_one_process_and_ranks_agree(reports: list[dict]) -> None:
    """The same rows in another partition; measured: losses equal to 1e-7."""
    alone, first, second = reports
    assert first["Theta"] == second["Theta"]
    assert first["losses"] == pytest.approx(alone["losses"], rel=1e-4)


@pytest.mark.parametrize("bits", BITS)
def test_merge_adds_delta_to_the_dequantised_base(bits: int) -> None:
    model = build(bits)
    layer = model.get_submodule("base_model.model.lin0")
    with torch.no_grad():
        layer.polar_Theta["default"].copy_(torch.eye(4))  # dW of norm 4; the base has norm 5.7
    before = dequantize_module_weight(layer.get_base_layer()).float()
    want = before + layer.get_delta_weight("default").detach()
    model.merge_adapter(safe_merge=True)
    after = dequantize_module_weight(layer.get_base_layer()).float()
    assert type(layer.get_base_layer()) is type(Net(bits).lin0)
    # Merging quantises again: half the widest gap of NF4 is 0.15 of a block's largest weight, of int8 1/254 of a row's.
    largest = want.abs().max()
    assert (after - want).abs().max() <= (0.16 if bits == 4 else 1 / 200) * largest
    assert torch.linalg.norm(after - want) < 0.5 * torch.linalg.norm(before - want)
    model.unmerge_adapter()
    restored = dequantize_module_weight(layer.get_base_layer()).float()
    assert (restored - before).abs().max() <= (0.32 if bits == 4 else 1 / 100) * largest


@pytest.mark.parametrize("bits", BITS)
def test_svd_start_reads_the_dequantised_weight(bits: int) -> None:
    net = Net(bits).to("cpu")
    weight = dequantize_module_weight(net.lin0).double()
    U, _, Vh = torch.linalg.svd(weight)
    model = get_peft_model(net, PolarConfig(r=3, target_modules=["lin0"], init_factors="svd"))
    layer = model.get_submodule("base_model.model.lin0")
    for factor, singular in ((layer.polar_X, U[:, :3]), (layer.polar_Y, Vh[:3].T)):
        torch.testing.assert_close(
            (singular.T @ factor["default"].detach().double()).abs(),
            torch.eye(3, dtype=torch.float64),
            atol=1e-3,
            rtol=0,
        )
