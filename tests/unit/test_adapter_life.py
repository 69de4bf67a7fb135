"""Adapters in a loaded model: swapped in place, side by side, and added up; through PEFT's own entry points.

Everything is compared with models that PEFT loads afresh, or with sums of dense delta weights in float64.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from torch import nn

import polar
from polar import PolarConfig, PolarLinear
from polar.errors import UserError

x = torch.linspace(-1, 1, 36).view(3, 12)


class Network(nn.Module):
    """Two linear layers of uneven sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(12, 20)
        self.down = nn.Linear(20, 5)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(h)))


def base() -> Network:
    torch.manual_seed(0)
    return Network().eval()


def adapted(seed: int, **options: object) -> PeftModel:
    model = base()
    torch.manual_seed(seed)
    config = {"r": 3, "alpha": 6, "target_modules": ["up", "down"], "init_weights": False, **options}
    return get_peft_model(model, PolarConfig(**config)).eval()


def saved(folder: Path, seed: int, **options: object) -> Path:
    adapted(seed, **options).save_pretrained(folder)
    return folder


def fresh(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return PeftModel.from_pretrained(base(), str(folder)).eval()(x)


def swapped(model: nn.Module, folder: Path) -> torch.Tensor:
    hotswap_adapter(model, str(folder), adapter_name="default", torch_device="cpu")
    with torch.no_grad():
        return model(x)


@pytest.mark.parametrize("theta", ["full", "diagonal", "identity"])
@pytest.mark.parametrize(
    "other",
    [
        {},
        {"alpha": 11, "use_rslora": True},
        {"r": 2, "alpha_pattern": {"down": 9.0}},
        {"r": 4, "rank_pattern": {"down": 5}},
    ],
)
def test_a_swapped_adapter_is_the_one_that_peft_loads(tmp_path: Path, theta: str, other: dict[str, object]) -> None:
    model = adapted(1, theta=theta)
    folder = saved(tmp_path, 2, theta=theta, **other)
    torch.testing.assert_close(swapped(model, folder), fresh(folder), rtol=1e-6, atol=1e-6)
    model.save_pretrained(tmp_path / "again")  # with the swapped adapter's ranks and alphas
    torch.testing.assert_close(fresh(tmp_path / "again"), fresh(folder), rtol=1e-6, atol=1e-6)


def test_equal_shapes_are_written_in_place_and_a_compiled_model_stays_compiled(tmp_path: Path) -> None:
    model = adapted(1)
    parameters = {name: (parameter, parameter.data_ptr()) for name, parameter in model.named_parameters()}
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        compiled(x)
    folder = saved(tmp_path, 2)
    with torch.compiler.set_stance("fail_on_recompile"):
        torch.testing.assert_close(swapped(compiled, folder), fresh(folder), rtol=1e-6, atol=1e-6)
    for name, parameter in model.named_parameters():
        assert parameters[name] == (parameter, parameter.data_ptr()) or "base_layer" in name


def test_layers_that_the_new_adapter_lacks_add_nothing_and_training_goes_on(tmp_path: Path) -> None:
    model = adapted(1)
    handle = polar.constrain(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    folder = saved(tmp_path, 2, target_modules=["up"])
    torch.testing.assert_close(swapped(model, folder), fresh(folder), rtol=1e-6, atol=1e-6)
    model(x).square().mean().backward()
    optimizer.step()
    handle.check()
    assert handle.orthonormality_error() < 1e-5
    handle.remove()


def test_what_cannot_be_swapped_is_refused_and_nothing_changes(tmp_path: Path) -> None:
    model = adapted(1, target_modules=["up"])
    with torch.no_grad():
        before = model(x)
    wide = Network()
    wide.up = nn.Linear(14, 20)
    torch.manual_seed(3)
    config = PolarConfig(r=3, alpha=6, target_modules=["up"], init_weights=False)
    get_peft_model(wide, config).save_pretrained(tmp_path / "wide")
    cases = {
        saved(tmp_path / "more", 2): "has no base_model.model.down; load the new one with load_adapter",
        tmp_path / "wide": r"up.polar_Y is \(14, 3\), the base needs \(12, 3\)",
        saved(tmp_path / "theta", 2, theta="diagonal", target_modules=["up"]): "for theta, full != diagonal",
    }
    for folder, message in cases.items():
        with pytest.raises(ValueError, match=message):
            swapped(model, folder)
    with torch.no_grad():
        assert torch.equal(model(x), before)
    model.merge_adapter()
    with pytest.raises(UserError, match="is merged into the base"):
        swapped(model, saved(tmp_path / "good", 2, target_modules=["up"]))


def test_lora_is_swapped_as_before(tmp_path: Path) -> None:
    def lora(seed: int) -> PeftModel:
        model = base()
        torch.manual_seed(seed)
        return get_peft_model(model, LoraConfig(r=2, target_modules=["up"], init_lora_weights=False)).eval()

    lora(2).save_pretrained(tmp_path)
    torch.testing.assert_close(swapped(lora(1), tmp_path), fresh(tmp_path))


def three_adapters(tmp_path: Path) -> PeftModel:
    """Ranks, thetas, scales and layers that differ."""
    saved(tmp_path / "b", 2, r=4, theta="diagonal", alpha=5, use_rslora=True, target_modules=["up"])
    saved(tmp_path / "c", 3, r=2, theta="identity", rank_pattern={"down": 5})
    model = adapted(1)
    for name in "bc":
        model.load_adapter(str(tmp_path / name), adapter_name=name)
    return model


def deltas(model: PeftModel, adapter: str) -> dict[str, torch.Tensor]:
    found = {}
    for name, layer in model.named_modules():
        if isinstance(layer, PolarLinear) and adapter in layer.polar_X:
            found[name.rpartition(".")[2]] = layer.get_delta_weight(adapter).detach().double()
    return found


WEIGHTS = {"default": 0.7, "b": -1.5, "c": 0.25}


def wanted(model: PeftModel) -> dict[str, torch.Tensor]:
    parts = {name: deltas(model, name) for name in WEIGHTS}
    return {
        kind: sum(WEIGHTS[name] * found[kind] for name, found in parts.items() if kind in found)
        for kind in ("up", "down")
    }


def assert_on_manifold(model: PeftModel, adapter: str) -> None:
    for layer in model.modules():
        if isinstance(layer, PolarLinear):
            for factor in (layer.polar_X[adapter], layer.polar_Y[adapter]):
                r = factor.shape[1]
                torch.testing.assert_close(factor.T @ factor, torch.eye(r), rtol=0, atol=1e-5)


def test_the_weighted_sum_is_exact_with_cat(tmp_path: Path) -> None:
    model = three_adapters(tmp_path)
    model.add_weighted_adapter(list(WEIGHTS), list(WEIGHTS.values()), "sum", combination_type="cat")
    found = deltas(model, "sum")
    for kind, delta in wanted(model).items():
        torch.testing.assert_close(found[kind], delta, rtol=1e-5, atol=1e-6)
    ranks = {n: m.r["sum"] for n, m in model.named_modules() if isinstance(m, PolarLinear)}
    assert ranks == {"base_model.model.up": 9, "base_model.model.down": 5}  # 3 + 4 + 2; 3 + 5 above min(d) = 5
    assert_on_manifold(model, "sum")
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".sum" in n)
    assert model.active_adapters == ["default"]
    model.set_adapter("sum")
    with torch.no_grad():
        want = model(x)
    model.save_pretrained(tmp_path / "out", selected_adapters=["sum"])
    torch.testing.assert_close(fresh(tmp_path / "out" / "sum"), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("svd_rank", [None, 1, 2])
def test_the_weighted_sum_of_lower_rank_is_the_best(tmp_path: Path, svd_rank: int | None) -> None:
    model = three_adapters(tmp_path)
    model.add_weighted_adapter(list(WEIGHTS), list(WEIGHTS.values()), "sum", svd_rank=svd_rank)
    found = deltas(model, "sum")
    for kind, delta in wanted(model).items():
        U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
        k = svd_rank or 5
        torch.testing.assert_close(found[kind], U[:, :k] * S[:k] @ Vh[:k], rtol=1e-4, atol=1e-5)
    assert_on_manifold(model, "sum")


def test_what_cannot_be_added_is_refused_and_nothing_is_added(tmp_path: Path) -> None:
    model = three_adapters(tmp_path)
    add = model.add_weighted_adapter
    cases = [
        (lambda: add(["default", "b"], [1.0, 1.0], "sum", combination_type="linear"), "combination_type 'linear'"),
        (lambda: add(["default"], [1.0, 1.0], "sum"), "2 weights for 1 adapters"),
        (lambda: add(["default", "d"], [1.0, 1.0], "sum"), "adapter 'd' is not loaded; there are default, b, c"),
        (lambda: add(["default", "b"], [1.0, 1.0], "c"), "adapter 'c' exists already"),
        (lambda: add(["default", "b"], [1.0, 1.0], "sum", svd_rank=8), "svd_rank is 8: the ranks sum up to 7"),
    ]
    for call, message in cases:
        with pytest.raises(UserError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
    assert "sum" not in model.peft_config


def test_adapters_of_one_batch_are_told_apart(tmp_path: Path) -> None:
    """Each row gets what its adapter alone would give it."""
    model = three_adapters(tmp_path)
    with torch.no_grad():
        mixed = model(x, adapter_names=["b", "__base__", "c"])
        for row, name in enumerate(("b", None, "c")):
            if name is None:
                with model.disable_adapter():
                    want = model(x)[row]
            else:
                model.set_adapter(name)
                want = model(x)[row]
            torch.testing.assert_close(mixed[row], want, rtol=1e-5, atol=1e-6)
