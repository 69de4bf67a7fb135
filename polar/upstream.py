"""Adapters of the paper's own code (kcc-lion/polar), read as what they are: PoLAR under LoRA's name.

Its fork of PEFT writes `"peft_type": "LORA"` with `"parameterize_S"`, and per module, where PEFT knows only A and B,

    lora_B.weight (d_out, r)     lora_S (r, r), below a parametrisation     lora_A.weight (r, d_in)

    dW = lora_alpha / r  B S A   so   X = B,  Theta = S (its diagonal, or I, as `parameterize_S` says),  Y = A^T

Stock PEFT loads such a folder as LoRA and leaves S out: another delta weight.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polar.errors import UserError

# The adapter's name stays in the key under PEFT >= 0.16, which looks for it next to last only.
SCALE_KEY = re.compile(r"(?P<stem>.+)\.lora_S(\.[^.]+)?\.(parametrizations\.weight\.original|weight)")
THETA_OF = {"identity": "full", "diagonal": "diagonal", "removal": "identity"}
SAME_NAME = (
    *("r", "target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern", "bias"),
    *("rank_pattern", "alpha_pattern", "task_type", "base_model_name_or_path", "revision", "fan_in_fan_out"),
)


def is_upstream(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bool:
    """Tell whether a LoRA folder is really one of the paper's code."""
    return config.get("peft_type") == "LORA" and any(".lora_S" in key for key in tensors)


def as_polar(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], source: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return config and tensors of the same adapter in this project's format; nothing is computed.

    Args:
        config: adapter_config.json.
        tensors: the file's tensors.
        source: the file, for messages.

    Raises:
        UserError: an unknown `parameterize_S`, or DoRA.
    """
    parameterize = config.get("parameterize_S", "identity")
    if parameterize not in THETA_OF:
        raise UserError(f"{source}: parameterize_S {parameterize!r} is none of {', '.join(THETA_OF)}; mend the config")
    if config.get("use_dora"):
        raise UserError(f"{source}: use_dora with lora_S is no adapter of the paper's code; mend the config")
    theta = THETA_OF[parameterize]
    found: dict[str, Tensor] = {}
    for key, value in tensors.items():
        scale = SCALE_KEY.fullmatch(key)
        if scale is not None:
            if theta != "identity":
                is_diagonal = theta == "diagonal" and value.ndim == 2
                found[f"{scale['stem']}.polar_Theta"] = torch.diagonal(value).clone() if is_diagonal else value
        elif key.endswith(".lora_B.weight"):
            found[key.removesuffix("lora_B.weight") + "polar_X"] = value
        elif key.endswith(".lora_A.weight"):
            found[key.removesuffix("lora_A.weight") + "polar_Y"] = value.T.contiguous() if value.ndim == 2 else value
        else:
            found[key] = value
    new = {key: config[key] for key in SAME_NAME if key in config}
    # Its layer divides by r whatever use_rslora says.
    new |= {"peft_type": "POLAR", "alpha": config.get("lora_alpha", 8), "theta": theta, "use_rslora": False}
    return new | {"dropout": config.get("lora_dropout", 0.0)}, found


def holds_polar(folder: Path) -> bool:
    """Tell whether an adapter folder holds PoLAR, ours or of the paper's code; reads the names of its tensors only.

    Raises:
        UserError: a config that cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    from polar.adapter_file import WEIGHTS_NAME, read_config

    config = read_config(folder)
    if config["peft_type"] != "LORA":
        return bool(config["peft_type"] == "POLAR")
    try:
        with safe_open(folder / WEIGHTS_NAME, framework="pt") as file:
            return any(".lora_S" in key for key in file.keys())  # noqa: SIM118  safe_open is not a mapping
    except (SafetensorError, OSError):
        return False  # whoever reads the tensors says what is wrong
