"""`adapter.init_from`: a run starts from a saved adapter's values, or says in one line why it cannot."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from polar.build_model import build_model, plan_model
from polar.convert import convert
from polar.errors import UserError
from polar.run_config import RunConfig, parse_run

TARGETS = '["q_proj", "down_proj"]'


@pytest.fixture
def make_config(tmp_path: Path, tiny_gemma3: Path, tiny_rows: Path):
    def make(*options: str) -> RunConfig:
        return parse_run(
            [
                *("--model_name_or_path", str(tiny_gemma3), "--train_dataset", str(tiny_rows), "--dtype", "float32"),
                *("--output_dir", str(tmp_path / "run"), "--max_steps", "2", "--adapter.r", "4"),
                *("--adapter.target_modules", TARGETS, "--adapter.alpha", "8", *options),
            ]
        )

    return make


def save(folder: Path, config: RunConfig, seed: int = 5) -> dict[str, torch.Tensor]:
    """A trained adapter: the run's own, with other factors and a Theta that is not zero."""
    config.training.seed = seed
    model = build_model(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "polar_Theta" in name or "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape))
    model.save_pretrained(folder)
    return load_file(folder / "adapter_model.safetensors")


def values(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {n.replace(".default", ""): p.detach() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("ranks", ["{}", '{"layers.0.self_attn.q_proj": 2}'])
def test_a_run_starts_with_the_adapters_values(make_config, tmp_path: Path, ranks: str) -> None:
    options = ("--adapter.rank_pattern", ranks)
    tensors = save(tmp_path / "first" / "adapter", make_config(*options))
    config = make_config(*options, "--adapter.init_from", str(tmp_path / "first"))
    config.validate(1)
    assert plan_model(config).num_trainable == sum(value.numel() for value in tensors.values())
    found = values(build_model(config))
    assert found.keys() == tensors.keys() and all(torch.equal(found[key], tensors[key]) for key in tensors)
    assert "init_from" in config.to_yaml()


def test_a_lora_run_starts_from_lora_and_polar_from_its_conversion(make_config, tmp_path: Path) -> None:
    lora = ("--adapter.peft_type", "LORA", "--adapter.lora_alpha", "8")

    def lora_config(*options: str) -> RunConfig:
        config = make_config(*lora, *options)
        del config.adapter.adapter["alpha"]
        return config

    tensors = save(tmp_path / "lora", lora_config())
    found = values(build_model(lora_config("--adapter.init_from", str(tmp_path / "lora"))))
    assert all(torch.equal(found[key], tensors[key]) for key in tensors)
    with pytest.raises(UserError, match="holds a LORA adapter, the run trains POLAR: convert it with polar convert"):
        plan_model(make_config("--adapter.init_from", str(tmp_path / "lora")))
    convert(tmp_path / "lora", tmp_path / "polar")
    model = build_model(make_config("--adapter.init_from", str(tmp_path / "polar")))
    key = "base_model.model.model.layers.0.self_attn.q_proj"
    want = 2.0 * tensors[f"{key}.lora_B.weight"].double() @ tensors[f"{key}.lora_A.weight"].double()
    torch.testing.assert_close(
        model.get_submodule(key).get_delta_weight("default").double(), want, rtol=1e-5, atol=1e-6
    )
    with pytest.raises(UserError, match="holds a POLAR adapter, the run trains LORA"):
        plan_model(lora_config("--adapter.init_from", str(tmp_path / "polar")))


def _nan(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    next(value for key, value in tensors.items() if key.endswith("polar_X")).fill_(float("nan"))
    save_file(tensors, folder / "adapter_model.safetensors")


def _stretched(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({k: v * (1.1 if k.endswith("polar_X") else 1) for k, v in tensors.items()},
              folder / "adapter_model.safetensors")  # fmt: skip


def _alpha_pattern(folder: Path) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"alpha_pattern": {"down_proj": 3}}))


BAD = {
    "no folder": (None, ["--adapter.init_from", "nowhere"], "adapter nowhere: no such folder"),
    "other rank": (None, ["--adapter.r", "8"], "its r is 4, the run's adapter.r is 8: set the run's to 4"),
    "other alpha": (None, ["--adapter.alpha", "16"], "its alpha is 8, the run's adapter.alpha is 16"),
    "other theta": (None, ["--adapter.theta", "diagonal"], "its theta is full, the run's adapter.theta is diagonal"),
    "more modules": (None, ["--adapter.target_modules", '["q_proj", "down_proj", "k_proj"]'], "lacks .*k_proj.polar_"),
    "fewer modules": (None, ["--adapter.target_modules", '["q_proj"]'], "has .*down_proj.*, which the run does not"),
    "other ranks": (None, ["--adapter.rank_pattern", '{"q_proj": 2}'], r"q_proj.polar_\w+ is \(.*\), in the run \("),
    "other scales": (_alpha_pattern, [], "down_proj has the scale 0.75, in the run 2"),
    "nan": (_nan, [], "holds NaN or Inf"),
    "off the manifold": (_stretched, [], "off the manifold, .* with polar convert"),
}


@pytest.mark.parametrize("name", BAD)
def test_another_adapter_is_refused_before_weights_are_loaded(make_config, tmp_path: Path, name: str) -> None:
    arrange, options, message = BAD[name]
    save(tmp_path / "first", make_config())
    if arrange is not None:
        arrange(tmp_path / "first")
    with pytest.raises(UserError, match=message) as caught:
        plan_model(make_config("--adapter.init_from", str(tmp_path / "first"), *options))
    assert "\n" not in str(caught.value)
