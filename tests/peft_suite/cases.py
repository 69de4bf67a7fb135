"""What PEFT's suite is told about POLAR: rows for its tables, names to replace in its modules, and known exceptions."""

from __future__ import annotations

from typing import Any

# Rows for TEST_CASES of test_custom_models.py: (name, model, config arguments). Its MLP is 10 -> 20 -> 2, so an adapter
# on the second layer has at most r = 2.
ROWS: list[tuple[str, str, dict[str, Any]]] = [
    ("1 string", "MLP", {"target_modules": "lin0"}),
    ("2 list", "MLP", {"target_modules": ["lin0"]}),
    ("3 narrow layer", "MLP", {"target_modules": ["lin1"], "r": 2}),
    ("4 two layers", "MLP", {"target_modules": ["lin0", "lin1"], "r": 2, "alpha": 2}),
    ("5 modules_to_save", "MLP", {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
    ("6 save a target", "MLP", {"target_modules": ["lin0", "lin1"], "r": 2, "modules_to_save": ["lin1"]}),
    ("7 rank_pattern", "MLP", {"target_modules": ["lin0", "lin1"], "r": 4, "alpha": 4, "rank_pattern": {"lin1": 2}}),
    ("8 alpha_pattern", "MLP", {"target_modules": ["lin0"], "alpha_pattern": {"lin0": 4}, "use_rslora": True}),
    ("9 dropout", "MLP", {"target_modules": ["lin0"], "dropout": 0.1}),
    ("10 diagonal", "MLP", {"target_modules": ["lin0"], "theta": "diagonal"}),
    ("11 identity", "MLP", {"target_modules": ["lin0"], "theta": "identity"}),
    ("12 Theta0 = I", "MLP", {"target_modules": ["lin0"], "init_theta": "identity"}),
    ("13 gaussian", "MLP", {"target_modules": ["lin0"], "init_factors": "gaussian"}),
    ("14 svd", "MLP", {"target_modules": ["lin0"], "init_factors": "svd"}),
    ("15 Conv1D", "EmbConv1D", {"target_modules": ["conv1d"], "r": 1}),
    ("16 exclude", "MLP", {"target_modules": ["lin0", "lin1"], "exclude_modules": ["lin1"]}),
    ("17 tangent", "MLP", {"target_modules": ["lin0"], "backward_field": "tangent"}),
    ("18 landing", "MLP", {"target_modules": ["lin0"], "backward_field": "landing", "landing_penalty": 0.3}),
]

# Rows for MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES: (name, arguments of adapter 1, of adapter 2).
ACTIVE_ROWS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("same layer", {"target_modules": ["lin0"]}, {"target_modules": ["lin0"]}),
    ("other rank", {"target_modules": ["lin0"], "r": 8}, {"target_modules": ["lin0"], "r": 4, "alpha": 8}),
    ("other layer", {"target_modules": ["lin0"], "r": 2}, {"target_modules": ["lin1"], "r": 2}),
    ("kinds of Theta", {"target_modules": ["lin0"], "theta": "diagonal"}, {"target_modules": ["lin0"]}),
]

# Rows for MIXED_ADAPTER_TEST_CASES: (name, arguments of adapter 0, of adapter 1).
MIXED_ROWS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("ranks", {"target_modules": ["lin0"]}, {"target_modules": ["lin0"], "r": 4}),
    ("layers", {"target_modules": ["lin0"], "r": 2}, {"target_modules": ["lin1"], "r": 2}),
    ("kinds of Theta", {"target_modules": ["lin0"], "theta": "identity"}, {"target_modules": ["lin0"]}),
]

# Row for ALL_CONFIGS of test_decoder_models.py (and the encoder-decoder, classification and feature modules).
TRANSFORMERS_ROW: dict[str, Any] = {"target_modules": None, "r": 4, "alpha": 16}

_DELETE = """del sd_before["model.decoder.layers.5.self_attn.q_proj.polar_Theta"]
            del sd_before["model.decoder.layers.5.self_attn.q_proj.lora_A.weight"]"""

# Modules that are written for one method: they run a second time with its names replaced by ours.
RENAMED_MODULES: dict[str, list[tuple[str, str]]] = {
    "test_lora_conversion.py": [
        ("    LoKrConfig,\n    LoraConfig", "    LoraConfig"),
        ("    C3AConfig,\n", ""),
        ("LoKrConfig", "PolarConfig"),
        ("C3AConfig(block_size=4, ", "PolarConfig("),
        ("c3a_only", "polar_only"),
        ('".lokr"', '".polar"'),
        # rank 16 of a random Theta does not fit into rank 8
        ("PolarConfig(r=16, init_weights=False)\n        lokr", "PolarConfig(r=8, init_weights=False)\n        lokr"),
    ],
    "test_low_level_api.py": [
        ("    LoraConfig,\n", ""),
        (" LoraConfig", " PolarConfig"),
        ("[LoraConfig", "[PolarConfig"),
        ("{LoraConfig", "{PolarConfig"),
        ("lora_alpha", "alpha"),
        ("lora_dropout", "dropout"),
        ("init_lora_weights=False", "init_weights=False, r=4"),  # layers of these tests are 5 x 5
        ('config_cls(target_modules=["lin0"])', 'config_cls(target_modules=["lin0"], r=4)'),
        ('modules_to_save=["lora_head"]', 'modules_to_save=["lora_head"], r=4'),
        ("r=64", "r=8"),
        ("r=8, alpha=4, target_modules=", "r=4, alpha=4, target_modules="),
        ("lora_only", "polar_only"),
        ('"lora" in k', '"polar" in k'),
        ('"lora_A"', '"polar_X"'),
        ('"lora_B"', '"polar_Y"'),
        ('"lora_', '"polar_'),
        ("self.lora_head", "self.polar_head"),
        ("model.lora_head", "model.polar_head"),
        ("lora_foo", "polar_foo"),
        ("foo_lora", "foo_polar"),
        ('del sd_before["model.decoder.layers.5.self_attn.q_proj.lora_A.weight"]', _DELETE),
        (".lora_A.weight", ".polar_X"),
        (".lora_B.weight", ".polar_Y"),
        ('linear.lora_A["default"].weight.data', 'linear.polar_X["default"].data'),
        ("v_proj.lora_B.default.weight", "v_proj.polar_Theta.default"),
    ],
}

# Tests that cannot pass, by a regular expression for their id; each must fail (xfail, strict).
EXPECTED_FAILURES: dict[str, str] = {
    r"test_adapter_dtype_autocast\[(True|False)-False-dtype[01]-": (
        "autocast_adapter_dtype=False asks for 16-bit parameters; Stiefel factors are fp32 on every base"
    ),
    r"test_add_adapter_no_autocast_adapter_dtype": "autocast_adapter_dtype=False, as above",
    r"test_convert_float16_dtype": "autocast_adapter_dtype=False, as above, for the LoRA made from such parameters",
    r"test_disable_adapters(_with_merging)?\[PoLAR (11|12) ": (
        "they want dW = 0 at the start; Theta = I starts at dW = s X Y^T by definition"
    ),
}

# Tests that are not about a tuner such as ours, by a regular expression for their id.
DESELECTED: dict[str, str] = {
    r"_conv[12]d|mha_raises|with_unsupported_layers": "adapters on convolutions, embeddings, attention",
    r"prompt_learning": "for methods without layers",
    r"test_config.py.*(from_pretrained|runtime_config)": "load LoRA configurations from the hub",
    r"target_parameters": "LoRA on nn.Parameter",
    r"rejects_shared_state_tuners": "for methods that share tensors between layers",
    r"stable_diffusion": "an image model of the hub",
    r"test_polar_lora_conversion.py::TestMiss|kasa|test_converted_lora_to_lora": "about another method",
}
