"""The tuner inside PEFT: several adapters, saving and loading, mixed batches, conversion, refusals, registration."""

from __future__ import annotations

import copy
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    convert_to_lora,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.utils import PeftType, PeftWarning
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

import polar
import polar.tuner
from polar import PolarConfig, PolarLinear
from polar.errors import UserError

# transformers 5.23 renames "gradient checkpointing" to "activation checkpointing"; PEFT 0.21.2 uses the old names.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")

ROOT = Path(__file__).resolve().parents[2]
SIZE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "vocab_size": 64}


def llama(**config: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SIZE, "eos_token_id": 2, "pad_token_id": 0, **config})).eval()


def polar_config(**options: object) -> PolarConfig:
    return PolarConfig(
        **{"r": 4, "alpha": 16, "target_modules": ["q_proj", "down_proj"], "init_weights": False, **options}
    )


def adapted(seed: int = 1, **options: object) -> PeftModel:
    base = llama()
    torch.manual_seed(seed)
    return get_peft_model(base, polar_config(task_type="CAUSAL_LM", **options)).eval()


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.arange(3, 33).view(3, 10)


def logits(model: nn.Module, tokens: torch.Tensor, **kwargs: object) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tokens, **kwargs).logits


_FRESH_PROCESS = """
import json, sys, time
from pathlib import Path
import peft, torch, transformers
from safetensors.torch import save_file
before, start = set(sys.modules), time.process_time()
import polar
report = {"import_s": time.process_time() - start, "imported": sorted(set(sys.modules) - before)}

# A notebook that drops the modules and imports them again.
for name in [name for name in sys.modules if name.split(".")[0] == "polar"]:
    del sys.modules[name]
import polar
config = peft.PeftConfig.from_peft_type(peft_type="POLAR", r=2, target_modules=["0"], init_weights=False)
model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), config)
report["classes_are_new"] = type(config) is polar.PolarConfig and type(model.base_model) is polar.PolarModel
report["converted_rank"] = peft.convert_to_lora(model, rank=2)[0].r

folder = Path(sys.argv[1])
base = transformers.AutoModelForCausalLM.from_pretrained(folder / "base")
model = peft.PeftModel.from_pretrained(base, folder / "adapter").eval()
tensors = {name: p.detach() for name, p in model.named_parameters() if "polar_" in name}
tensors["logits"] = model(input_ids=torch.arange(3, 33).view(3, 10)).logits.detach()
save_file(tensors, folder / "out.safetensors")
(folder / "report.json").write_text(json.dumps(report))
"""


def saved_model() -> PeftModel:
    return adapted(target_modules=["q_proj", "down_proj"], rank_pattern={"down_proj": 2})


@pytest.fixture(scope="module")
def fresh_process(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, an adapter, and what one other process made of them (starting it is the slow part)."""
    folder = tmp_path_factory.mktemp("fresh")
    saved_model().save_pretrained(folder / "adapter")
    llama().save_pretrained(folder / "base")
    done = subprocess.run(
        [sys.executable, "-c", _FRESH_PROCESS, str(folder)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_saving_and_loading_in_a_fresh_process_is_exact(fresh_process: Path, tokens: torch.Tensor) -> None:
    config = json.loads((fresh_process / "adapter" / "adapter_config.json").read_text())
    assert config["peft_type"] == "POLAR" and config["alpha"] == 16
    saved = load_file(fresh_process / "adapter" / "adapter_model.safetensors")
    assert "base_model.model.model.layers.0.self_attn.q_proj.polar_X" in saved and len(saved) == 3 * 2 * 3
    model = saved_model()
    out = load_file(fresh_process / "out.safetensors")
    assert torch.equal(out.pop("logits"), logits(model, tokens))
    assert len(out) == len(saved)
    for name, value in out.items():
        assert value.dtype == torch.float32 and torch.equal(value, model.get_parameter(name)), name


def test_importing_polar_imports_no_engine_and_takes_less_than_a_fifth_of_a_second(fresh_process: Path) -> None:
    report = json.loads((fresh_process / "report.json").read_text())
    engines = {"deepspeed", "trl", "lm_eval", "datasets", "matplotlib", "bitsandbytes"}
    assert not engines & {name.split(".")[0] for name in report["imported"]}
    assert report["import_s"] < 0.2


def test_modules_that_are_imported_twice_are_the_registered_ones(fresh_process: Path) -> None:
    report = json.loads((fresh_process / "report.json").read_text())
    assert report["classes_are_new"] and report["converted_rank"] == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_cpu_mem_usage_loads_the_same_fp32_factors(tmp_path: Path, dtype: torch.dtype) -> None:
    model = adapted()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(
        llama().to(dtype), tmp_path, low_cpu_mem_usage=True, autocast_adapter_dtype=False, is_trainable=True
    )
    parameters = dict(model.named_parameters())
    names = [name for name, _ in loaded.named_parameters() if "polar_" in name]
    assert len(names) == 18
    for name in names:
        parameter = loaded.get_parameter(name)
        assert parameter.dtype == torch.float32 and parameter.requires_grad and parameter.is_contiguous()
        assert torch.equal(parameter, parameters[name])


def test_low_cpu_mem_usage_computes_nothing_for_a_new_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.linalg, "qr", lambda *_: pytest.fail("an empty adapter was initialised"))
    model = get_peft_model(llama(), polar_config(init_factors="svd"), low_cpu_mem_usage=True)
    assert all(p.is_meta for name, p in model.named_parameters() if "polar_" in name)


def test_disable_and_adapters_of_different_rank_and_kind(tokens: torch.Tensor) -> None:
    base = logits(llama(), tokens)
    model = adapted()
    first = logits(model, tokens)
    torch.manual_seed(2)
    model.add_adapter("second", polar_config(r=2, theta="diagonal", target_modules=["v_proj", "q_proj"]))
    assert torch.equal(logits(model, tokens), first)  # adding does not activate
    model.set_adapter("second")
    second = logits(model, tokens)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable and all(name.endswith(".second") for name in trainable)
    with model.disable_adapter():
        assert torch.equal(logits(model, tokens), base)
    assert torch.equal(logits(model, tokens), second) and not torch.allclose(second, first)
    model.set_adapter("default", inference_mode=True)
    assert torch.equal(logits(model, tokens), first)
    assert not any(p.requires_grad for p in model.parameters())
    model.delete_adapter("second")
    assert not any(".second" in name for name, _ in model.named_parameters())
    for layer in (m for m in model.modules() if isinstance(m, PolarLinear)):
        assert "second" not in layer.scaling and "second" not in layer.r and "second" not in layer.alpha
    assert torch.equal(logits(model.unload(), tokens), base)


def test_two_active_adapters_add_up_and_merge_together(tokens: torch.Tensor) -> None:
    model = adapted()
    torch.manual_seed(2)
    model.add_adapter("second", polar_config(theta="identity", r=2))
    model.base_model.set_adapter(["default", "second"])
    both = logits(model, tokens)
    layer = model.get_submodule("base_model.model.model.layers.0.mlp.down_proj")
    x = torch.randn(4, 24)
    with torch.no_grad():
        dense = x @ (layer.get_delta_weight("default") + layer.get_delta_weight("second")).T + layer.get_base_layer()(x)
        torch.testing.assert_close(layer(x), dense, atol=1e-5, rtol=1e-5)
    merged = model.merge_and_unload(safe_merge=True)
    assert not any(isinstance(m, PolarLinear) for m in merged.modules())
    torch.testing.assert_close(logits(merged, tokens), both, atol=1e-5, rtol=1e-5)


def test_a_mixed_batch_equals_separate_runs(tokens: torch.Tensor) -> None:
    model = adapted()
    torch.manual_seed(2)
    model.add_adapter("second", polar_config(r=2, theta="diagonal", target_modules=["q_proj", "v_proj"]))
    names = ["second", "__base__", "default"]
    mixed = logits(model, tokens, adapter_names=names)
    generated = model.generate(input_ids=tokens, adapter_names=names, num_beams=2, max_new_tokens=4, do_sample=False)
    for row, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                want = logits(model, tokens[row : row + 1])
                alone = model.generate(input_ids=tokens[row : row + 1], num_beams=2, max_new_tokens=4, do_sample=False)
        else:
            model.set_adapter(name)
            want = logits(model, tokens[row : row + 1])
            alone = model.generate(input_ids=tokens[row : row + 1], num_beams=2, max_new_tokens=4, do_sample=False)
        torch.testing.assert_close(mixed[row : row + 1], want, atol=1e-5, rtol=1e-5)
        assert generated[row, : alone.shape[1]].tolist() == alone[0].tolist()
    with pytest.raises(ValueError, match=r"non-existing adapter.*third"):
        logits(model, tokens, adapter_names=["third", "default", "default"])
    with pytest.raises(ValueError, match="Length of `adapter_names`"):
        logits(model, tokens, adapter_names=["default"])
    with pytest.raises(ValueError, match="training mode"):
        model.train()(input_ids=tokens, adapter_names=names)
    model.eval().merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        logits(model, tokens, adapter_names=names)


def test_a_mixed_batch_with_beams_reaches_encoder_and_decoder(tokens: torch.Tensor) -> None:
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_ff": 24, "d_kv": 8, "num_layers": 2, "num_heads": 2, "vocab_size": 64}
    base = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).eval()
    config = PolarConfig(r=4, alpha=64, target_modules=["q", "v"], init_weights=False, task_type="SEQ_2_SEQ_LM")
    model = get_peft_model(base, config).eval()
    model.add_adapter("second", config)
    options = {"num_beams": 3, "max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
    options |= {"output_scores": True}
    mixed = model.generate(input_ids=tokens[:2], adapter_names=["second", "default"], **options)
    for row, name in enumerate(["second", "default"]):
        model.set_adapter(name)
        alone = model.generate(input_ids=tokens[row : row + 1], **options)
        torch.testing.assert_close(mixed.scores[0][3 * row : 3 * row + 3], alone.scores[0], atol=1e-4, rtol=1e-4)


def test_layers_to_transform_exclude_modules_and_all_linear_choose_modules() -> None:
    def names(**options: object) -> set[str]:
        model = get_peft_model(llama(), polar_config(**options))
        return {n.removeprefix("base_model.model.") for n, m in model.named_modules() if isinstance(m, PolarLinear)}

    assert names(target_modules=["q_proj"], layers_to_transform=[0, 2]) == {
        "model.layers.0.self_attn.q_proj",
        "model.layers.2.self_attn.q_proj",
    }
    assert names(target_modules=["q_proj"], exclude_modules=["layers.1.self_attn.q_proj"]) == names(
        target_modules=["q_proj"], layers_to_transform=[0, 2]
    )
    everything = names(target_modules="all-linear")
    assert len(everything) == 3 * 7 and "lm_head" not in everything
    assert names(target_modules=None) == names(target_modules=["q_proj", "v_proj"])  # PEFT's default for llama


def test_modules_to_save_are_trained_saved_and_loaded(tmp_path: Path, tokens: torch.Tensor) -> None:
    model = adapted(modules_to_save=["lm_head"], bias="none")
    head = model.base_model.model.lm_head
    assert all(p.requires_grad for p in head.modules_to_save.parameters())
    with torch.no_grad():
        head.modules_to_save["default"].weight.mul_(2)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path).eval()
    assert torch.equal(logits(loaded, tokens), logits(model, tokens))


def test_bias_polar_only_trains_and_saves_the_biases_of_adapted_layers() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    peft_model = get_peft_model(model, PolarConfig(r=2, target_modules=["0"], bias="polar_only"))
    trainable = {name for name, p in peft_model.named_parameters() if p.requires_grad}
    assert {name for name in trainable if name.endswith("bias")} == {"base_model.model.0.base_layer.bias"}
    assert "base_model.model.0.base_layer.bias" in get_peft_model_state_dict(peft_model)


def test_gradient_checkpointing_gives_the_same_gradients(tokens: torch.Tensor) -> None:
    def gradients(model: PeftModel) -> dict[str, torch.Tensor]:
        model.train()(input_ids=tokens, labels=tokens).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain = gradients(adapted())
    for reentrant in (True, False):
        model = adapted()
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        checkpointed = gradients(model)
        assert len(plain) == 18
        for name, gradient in plain.items():
            torch.testing.assert_close(checkpointed[name], gradient)


def test_a_deep_copy_is_independent(tokens: torch.Tensor) -> None:
    model = adapted()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "polar_Theta" in name:
                p.zero_()
    assert not torch.allclose(logits(model, tokens), logits(twin, tokens))
    assert twin.peft_config["default"].peft_type is PeftType.POLAR


def test_state_dict_round_trip_without_a_peft_model(tokens: torch.Tensor) -> None:
    source, target = inject_adapter_in_model(polar_config(), llama()), llama()
    torch.manual_seed(2)
    target = inject_adapter_in_model(polar_config(), target)
    assert not torch.allclose(logits(source, tokens), logits(target, tokens))
    result = set_peft_model_state_dict(target, get_peft_model_state_dict(source))
    assert not result.unexpected_keys
    assert torch.equal(logits(source, tokens), logits(target, tokens))


def test_transformers_loads_an_adapter_folder_itself(tmp_path: Path, tokens: torch.Tensor) -> None:
    model = adapted()
    model.save_pretrained(tmp_path)
    base = llama()
    base.load_adapter(str(tmp_path))
    assert torch.equal(logits(base, tokens), logits(model, tokens))


def test_a_factor_that_is_not_whole_is_reported_when_saved() -> None:
    model = adapted()
    layer = next(m for m in model.modules() if isinstance(m, PolarLinear))
    layer.polar_X["default"].data = torch.empty(0)  # what ZeRO-3 leaves on a rank
    with pytest.warns(PeftWarning, match=r"1 factors are not whole.*must be gathered"):
        get_peft_model_state_dict(model)


@pytest.mark.parametrize("theta", ["full", "diagonal", "identity"])
@pytest.mark.parametrize("rank", [4, 6])
def test_conversion_to_lora_is_exact_without_a_decomposition(
    theta: str, rank: int, tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted(theta=theta)
    monkeypatch.setattr(torch.linalg, "svd", lambda *_, **__: pytest.fail("a decomposition was taken"))
    config, tensors = convert_to_lora(model, rank=rank)
    assert isinstance(config, LoraConfig) and config.r == config.lora_alpha == rank and not config.rank_pattern
    lora = get_peft_model(llama(), config).eval()
    assert not set_peft_model_state_dict(lora, tensors).unexpected_keys
    torch.testing.assert_close(logits(lora, tokens), logits(model, tokens), atol=1e-5, rtol=1e-5)


def test_conversion_to_a_lower_rank_is_the_best_approximation() -> None:
    """Eckart-Young: the error of rank k is the norm of the singular values of dW that are left out."""
    model = adapted(init_factors="gaussian")
    layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    delta = layer.get_delta_weight("default").detach().double()
    S = torch.linalg.svdvals(delta)
    _, tensors = convert_to_lora(model, rank=2)
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    error = torch.linalg.norm(delta - tensors[key.format("B")].double() @ tensors[key.format("A")].double())
    assert error.item() == pytest.approx(S[2:].norm().item(), rel=1e-4)
    share = (S[:3].square().sum() / S.square().sum()).item()
    _, tensors = convert_to_lora(model, rank=share - 1e-4)
    assert tensors[key.format("A")].shape == (3, 16)


def test_other_methods_still_convert_as_before(tokens: torch.Tensor) -> None:
    base = llama()
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)).eval()
    with pytest.warns(UserWarning, match="already a LoRA"):
        config, tensors = convert_to_lora(model, rank=4)
    lora = get_peft_model(llama(), config).eval()
    set_peft_model_state_dict(lora, tensors)
    torch.testing.assert_close(logits(lora, tokens), logits(model, tokens), atol=1e-4, rtol=1e-4)


def assert_untouched(model: nn.Module) -> None:
    assert not any(isinstance(m, PolarLinear) for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("targets", [["q_proj", "down_proj"], "all-linear", r".*(q_proj|down_proj)"])
def test_a_rank_above_a_layer_names_module_shapes_and_fix_and_changes_nothing(targets: object) -> None:
    model = llama()
    with pytest.raises(
        UserError, match=r"r=20 .*min\(d_in, d_out\)=16 of module model.layers.0.* use r <= 16"
    ) as error:
        get_peft_model(model, polar_config(r=20, target_modules=targets))
    assert "\n" not in str(error.value)
    assert_untouched(model)


@pytest.mark.parametrize("targets", [["embed_tokens"], ["norm"], ["q_proj", "input_layernorm"]])
def test_a_layer_that_is_not_linear_is_refused_by_name(targets: list[str]) -> None:
    model = llama()
    with pytest.raises(UserError, match="cannot carry a PoLAR adapter") as error:
        get_peft_model(model, polar_config(target_modules=targets))
    assert "\n" not in str(error.value)
    assert_untouched(model)


def test_the_output_projection_of_torch_attention_is_refused() -> None:
    """`nn.MultiheadAttention` never calls it, so an adapter there would train nothing."""
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    with pytest.raises(UserError, match=r"self_attn.out_proj .* only linear layers that are called"):
        get_peft_model(model, PolarConfig(r=2, target_modules=["linear1", "out_proj"]))


@pytest.mark.parametrize("options", [{"target_modules": ["qq_proj"]}, {"exclude_modules": ["q_proj", "down_proj"]}])
def test_targets_that_match_nothing_are_one_line_with_the_names_there_are(options: dict[str, object]) -> None:
    with pytest.raises(
        ValueError, match=r"Linear layers of this model: down_proj, gate_proj, k_proj, lm_head"
    ) as error:
        get_peft_model(llama(), polar_config(**options))
    assert isinstance(error.value, UserError) and "\n" not in str(error.value)


def test_a_second_adapter_that_fails_leaves_the_first_alone(tokens: torch.Tensor) -> None:
    model = adapted()
    before = logits(model, tokens)
    for bad in ({"r": 20}, {"target_modules": ["nothing"]}):
        with pytest.raises(UserError):
            model.add_adapter("bad", polar_config(**bad))
    assert list(model.peft_config) == ["default"]
    assert not any(".bad" in name for name, _ in model.named_parameters())
    assert torch.equal(logits(model, tokens), before)


def test_target_parameters_are_refused() -> None:
    with pytest.raises(TypeError, match="target_parameters"):
        PolarConfig(target_modules=["q_proj"], target_parameters=["experts.weight"])


def test_registration_survives_a_second_import() -> None:
    member = PeftType.POLAR
    importlib.reload(polar.tuner)
    importlib.reload(polar)
    assert PeftType("POLAR") is PeftType.POLAR is member and list(PeftType).count(member) == 1
    assert isinstance(PeftConfig.from_peft_type(peft_type="POLAR", r=2), PolarConfig)
    config, _ = convert_to_lora(adapted(), rank=4)
    assert config.r == 4
