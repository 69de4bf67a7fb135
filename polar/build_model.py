"""Base model, tokenizer, quantisation, adapter: from settings to a PeftModel that is ready to train.

`plan_model` builds the same model on the meta device first: it holds shapes but no weights, takes about a second even
for 27B, and finds whatever is wrong with the adapter before a weight is read.
"""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

from polar.classifier import add_head_settings, head_to_fp32, load_classifier, modules_to_save
from polar.errors import UserError
from polar.init_from import start_from
from polar.launch import on_all_ranks, rank
from polar.rank_file import check_rank_file
from polar.run_checks import make_adapter_config

if TYPE_CHECKING:
    from polar.run_config import ModelArguments, RunConfig

FACTOR_KEYS = ("polar_X", "polar_Y")
# Language-model names such as q_proj also occur in the vision tower of multimodal models, which text does not train.
VISION_MODULES = r".*(vision_tower|vision_model|visual|multi_modal_projector).*"


@dataclass(frozen=True)
class AdaptedModules:
    """All adapted layers of one name: how many, and their trainable parameters together."""

    num_modules: int
    num_parameters: int


@dataclass(frozen=True)
class ModelPlan:
    """What would be trained, counted on the meta device.

    Attributes:
        architecture: class of the base model.
        num_base: parameters of the base model.
        base_bytes: its size as loaded (dtype and quantisation counted).
        num_trainable: trainable parameters.
        num_factors: Stiefel factors among them; 0 for other adapters.
        largest_factor: elements of the largest trainable tensor; ZeRO-3's persistence threshold must be above it.
        modules: last part of the module's name (q_proj, ...) -> counts.
        num_layers: layers of the language model.
        hidden_size: width of its residual stream.
    """

    architecture: str
    num_base: int
    base_bytes: int
    num_trainable: int
    num_factors: int
    largest_factor: int
    modules: dict[str, AdaptedModules]
    num_layers: int
    hidden_size: int


def load_tokenizer(model: ModelArguments, *, needs_eos: bool = True) -> PreTrainedTokenizerBase:
    """Load the base model's tokenizer, with a pad token.

    Args:
        model: which base.
        needs_eos: whether rows end with EOS; a classification head reads none.

    Raises:
        UserError: there is none, or it has no EOS token.
    """
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(
            model.model_name_or_path, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"no tokenizer in model_name_or_path {model.model_name_or_path}: {_first_line(error)}"
        ) from error
    if tokenizer.eos_token_id is None and (needs_eos or tokenizer.pad_token_id is None):
        raise UserError(f"the tokenizer of {model.model_name_or_path} has no EOS token: responses could not end")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding has no label and no attention, so any token does
    return tokenizer


def plan_model(config: RunConfig) -> ModelPlan:
    """Build model and adapter on the meta device and count; reads config.json, no weights.

    Raises:
        UserError: no usable config, or an adapter that does not fit the model.
    """
    model, base_config = _meta_model(config)
    if config.adapter.ranks is not None:
        value = config.adapter.adapter["ranks"]
        source = f"adapter.ranks {value}" if isinstance(value, str) else "adapter.ranks"
        check_rank_file(config.adapter.ranks.content, _linear_shapes(model), source)
    architecture = type(model).__name__
    num_base = sum(p.numel() for p in model.parameters())
    base_bytes = _loaded_bytes(model, config.model)
    adapted = _add_adapter(model, config, low_cpu_mem_usage=True)
    text_config = base_config.get_text_config()
    return ModelPlan(
        architecture=architecture,
        num_base=num_base,
        base_bytes=base_bytes,
        num_trainable=sum(p.numel() for p in adapted.parameters() if p.requires_grad),
        num_factors=sum(1 for name, p in adapted.named_parameters() if p.requires_grad and _is_factor(name)),
        largest_factor=max(p.numel() for p in adapted.parameters() if p.requires_grad),
        modules=_count_modules(adapted),
        num_layers=getattr(text_config, "num_hidden_layers", 0),
        hidden_size=getattr(text_config, "hidden_size", 0),
    )


@contextlib.contextmanager
def unpartitioned(config: RunConfig) -> Iterator[None]:
    """Build models whole: transformers' from_config would partition a meta model while ZeRO-3 is announced to it."""
    zero3 = config.training.hf_deepspeed_config if is_deepspeed_zero3_enabled() else None
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if zero3 is not None:
            set_hf_deepspeed_config(zero3)


def _meta_model(config: RunConfig) -> tuple[Any, PreTrainedConfig]:
    """Return the base model on the meta device, and its config."""
    base_config = _load_base_config(config)
    kind = AutoModelForCausalLM if config.glue_task is None else AutoModelForSequenceClassification
    try:
        with unpartitioned(config), torch.device("meta"):
            model = kind.from_config(
                base_config,
                dtype=getattr(torch, config.model.dtype),
                attn_implementation=config.model.attn_implementation,
                trust_remote_code=config.model.trust_remote_code,
            )
    except (ValueError, ImportError) as error:
        raise UserError(f"model_name_or_path {config.model.model_name_or_path}: {_first_line(error)}") from error
    return model, base_config


def build_model(config: RunConfig) -> PeftModel:
    """Load the base model, quantise it if asked, add the adapter.

    Under ZeRO-3 the weights are partitioned while they are read: `config.training` exists already, and transformers
    looks at the DeepSpeed config that it holds.

    Returns:
        A PeftModel whose factors are fp32; the base keeps the dtype that was asked for and is never upcast.

    Raises:
        UserError: the weights cannot be read, or the adapter does not fit.
    """
    if config.training.engine == "fsdp2":
        return _build_sharded(config)
    return _load_adapted(config)


def _build_sharded(config: RunConfig) -> PeftModel:
    """Load the model on rank 0 and cut it over all ranks. Collective."""
    from polar.fsdp2 import shard

    training = config.training
    source = on_all_ranks(lambda: _load_adapted(config) if rank() == 0 else None)
    skeleton = _add_adapter(_meta_model(config)[0], config, low_cpu_mem_usage=True)
    skeleton.config.use_cache = False
    compute_dtype = torch.bfloat16 if training.bf16 else None
    shard(skeleton, source, training.device, compute_dtype=compute_dtype, shard_size=training.fsdp_shard_size)
    return skeleton


def _load_adapted(config: RunConfig) -> PeftModel:
    """Return base and adapter with values, in this process."""
    arguments = config.model
    assert arguments.model_name_or_path is not None  # validated
    quantization = _quantization_config(arguments)
    options: dict[str, Any] = {}
    if quantization is not None:
        options["quantization_config"] = quantization
    stays_on_host = is_deepspeed_zero3_enabled() or config.training.engine == "fsdp2"
    if not stays_on_host and (quantization is not None or config.training.device.type == "cuda"):
        options["device_map"] = {"": config.training.device}  # straight to its device, not through host memory
    options |= {
        "revision": arguments.revision,
        "dtype": getattr(torch, arguments.dtype),
        "attn_implementation": arguments.attn_implementation,
        "trust_remote_code": arguments.trust_remote_code,
    }
    try:
        if config.glue_task is None:
            model = AutoModelForCausalLM.from_pretrained(arguments.model_name_or_path, **options)
        else:
            set_seed(config.training.seed)  # a new head is drawn while the base is read
            model = load_classifier(arguments.model_name_or_path, _load_base_config(config), **options)
    except UserError:
        raise
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"cannot load the model {arguments.model_name_or_path}: {_first_line(error)}") from error
    model.config.use_cache = False  # a key-value cache is of no use in training
    # Seeded here, so that the adapter starts the same however many random numbers the loading took.
    set_seed(config.training.seed)
    return _add_adapter(model, config)


def _add_adapter(model: nn.Module, config: RunConfig, **options: Any) -> PeftModel:
    adapter_config = make_adapter_config(config.adapter, config.task_type)
    if config.glue_task is not None and hasattr(adapter_config, "modules_to_save"):
        adapter_config.modules_to_save = modules_to_save(model, adapter_config.modules_to_save)
    if hasattr(model.config, "vision_config") and not getattr(adapter_config, "exclude_modules", None):
        adapter_config.exclude_modules = VISION_MODULES
    adapter_config.revision = config.model.revision
    try:
        # Adapters of other methods stay in fp32 too, which is PEFT's default (autocast_adapter_dtype).
        adapted = get_peft_model(model, adapter_config, **options)
    except UserError:
        raise
    except (ValueError, KeyError, NotImplementedError) as error:
        raise UserError(f"adapter ({config.adapter.peft_type}): {_first_line(error)}") from error
    head_to_fp32(adapted)
    if config.adapter.adapter.get("init_from"):
        start_from(adapted, str(config.adapter.adapter["init_from"]))
    return adapted


def _load_base_config(config: RunConfig) -> PreTrainedConfig:
    arguments = config.model
    assert arguments.model_name_or_path is not None  # validated
    try:
        base_config = AutoConfig.from_pretrained(
            arguments.model_name_or_path, revision=arguments.revision, trust_remote_code=arguments.trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"model_name_or_path {arguments.model_name_or_path}: no folder with a readable config.json, and the hub "
            f"did not give it ({_first_line(error)})"
        ) from error
    if config.glue_task is not None:
        add_head_settings(base_config, config.glue_task)
    return base_config


def _quantization_config(arguments: ModelArguments) -> BitsAndBytesConfig | None:
    if not (arguments.load_in_4bit or arguments.load_in_8bit):
        return None
    if arguments.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    dtype = getattr(torch, arguments.dtype)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        # Packed weights must look like the other parameters of the model, or sharding engines cannot flatten them.
        bnb_4bit_quant_storage=dtype,
    )


def _loaded_bytes(model: nn.Module, arguments: ModelArguments) -> int:
    """Size of the base in memory: bitsandbytes quantises every linear layer but the output layer."""
    total = sum(p.numel() * p.element_size() for p in model.parameters())
    if not (arguments.load_in_4bit or arguments.load_in_8bit):
        return total
    per_element = 0.5 + 1 / 64 if arguments.load_in_4bit else 1.0  # NF4: one 8-bit scale per block of 64
    output = model.get_output_embeddings()  # type: ignore[operator]
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not output:
            total -= int(module.weight.numel() * (module.weight.element_size() - per_element))
    return total


def _linear_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """(d_out, d_in) by module name; () for modules that are no linear layer."""
    return {
        name: (module.out_features, module.in_features) if isinstance(module, nn.Linear) else ()
        for name, module in model.named_modules()
    }


def _count_modules(model: PeftModel) -> dict[str, AdaptedModules]:
    prefix = getattr(model.base_model, "prefix", "")  # of the tuner's parameters: lora_, polar_, hada_, ...
    names: dict[str, set[str]] = collections.defaultdict(set)
    numbers: collections.Counter[str] = collections.Counter()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            module = _module_of(name, prefix)
            kind = module.rpartition(".")[2]
            names[kind].add(module)
            numbers[kind] += parameter.numel()
    return {kind: AdaptedModules(len(names[kind]), numbers[kind]) for kind in sorted(names)}


def _module_of(parameter: str, prefix: str) -> str:
    """Name of the adapted module: `...self_attn.q_proj.polar_X.default` -> `...self_attn.q_proj`."""
    parts = parameter.split(".")
    for i, part in enumerate(parts):
        if part.startswith("modules_to_save") or (prefix and part.startswith(prefix)):
            return ".".join(parts[:i])
    return ".".join(parts[:-1])


def _is_factor(name: str) -> bool:
    return any(f".{key}." in name for key in FACTOR_KEYS)


def _first_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."
