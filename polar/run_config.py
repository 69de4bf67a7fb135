"""Every setting of a run: five dataclasses, one flat YAML file plus command line, and their way back to YAML.

    python -m polar.train --config configs/X.yaml --learning_rate 4e-4 --adapter.r 16

Order of effects, because building `TrainingArguments` is not free of them:

1. `import polar.run_config` imports trl, hence torch, transformers and peft. No engine, no process group, no device.
2. `parse_run` reads file and command line and checks keys and types: still no side effect.
3. It then builds `PolarTrainingConfig`, last. Its `__post_init__` first derives `gradient_accumulation_steps`, because
   `TrainingArguments.__post_init__` (a) picks the device and, when a launcher started several processes, sets up the
   process group, and (b) with `deepspeed` set copies batch sizes into the "auto" fields of the DeepSpeed config, where
   ZeRO-3 is from then on seen by every `from_pretrained`. So the base model must be loaded *after* `parse_run`.
4. `RunConfig.validate(world_size)` touches only the file system, and writes nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

import yaml

from polar.commonsense import TASKS
from polar.config_parser import RunParser
from polar.errors import UserError
from polar.glue import TASKS as GLUE_TASKS
from polar.glue import GlueTask
from polar.glue_settings import set_glue_defaults
from polar.rank_file import adapter_settings
from polar.run_checks import check_run
from polar.training_config import PolarTrainingConfig

if TYPE_CHECKING:
    from polar.run_ranks import RunRanks

# Keys of SFTConfig / TrainingArguments that would do nothing, or harm, in a polar run, and what to write instead.
REFUSED_KEYS = {
    "model_init_kwargs": "write dtype, attn_implementation, load_in_4bit, ... as keys of their own",
    "chat_template_path": "prompts come from `template`",
    "dataset_text_field": "name columns with prompt_column and response_column",
    "dataset_kwargs": "the data is tokenised by polar.data; see `dataset_format`",
    "eos_token": "the tokenizer's own EOS ends each response",
    "pad_token": "the tokenizer's own pad token is used, else its EOS",
    "assistant_only_loss": "the loss covers the response only; `template` says where it begins",
    "truncation_mode": "write on_too_long: drop, truncate or error",
    "padding_free": "write packing: true",
    "auto_find_batch_size": "the global batch is fixed; lower per_device_train_batch_size, accumulation follows",
    "use_liger_kernel": "not supported by this trainer",
    "liger_kernel_config": "not supported by this trainer",
    "parallelism_config": "write deepspeed: FILE",
    "fsdp": "write engine: fsdp2",
    "fsdp_config": "write engine: fsdp2, and fsdp_shard_size for HSDP",
    "do_train": "polar train always trains",
    "do_eval": "give val_dataset or val_split",
    "do_predict": "use polar eval",
    "resume_from_checkpoint": "write --resume; it continues from the last checkpoint of output_dir",
    "gradient_checkpointing_kwargs": "write activation_checkpointing_kwargs",
}
_ALWAYS_WRITTEN = {"per_device_train_batch_size", "num_train_epochs", "max_steps", "seed", "bf16", "optim"}
_ALWAYS_WRITTEN |= {"max_grad_norm", "report_to"}
_NEVER_WRITTEN = {"hub_token", "local_rank", "resume", "overwrite", "dry_run"}  # secrets, and what one start asks for
T = TypeVar("T")


@dataclass
class ModelArguments:
    """The frozen base model and its tokenizer."""

    _argument_group_name: ClassVar[str] = "model"

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Folder with config.json, or a name on the hub. Required."}
    )
    revision: str | None = field(default=None, metadata={"help": "Hub branch, tag or commit. null: main."})
    dtype: Literal["bfloat16", "float16", "float32"] = field(
        default="bfloat16", metadata={"help": "Storage and compute dtype of the frozen base; factors stay float32."}
    )
    attn_implementation: str = field(
        default="sdpa", metadata={"help": "sdpa, eager or flash_attention_2 (needs the flash-attn package)."}
    )
    load_in_4bit: bool = field(default=False, metadata={"help": "Quantise the base to NF4 with bitsandbytes."})
    load_in_8bit: bool = field(default=False, metadata={"help": "Quantise the base to int8 with bitsandbytes."})
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run Python code that ships with the model. Only for sources you trust."}
    )


@dataclass
class DataArguments:
    """Rows, prompts, and what happens to rows that do not fit. See `polar.data`."""

    _argument_group_name: ClassVar[str] = "data"

    task: str | None = field(
        default=None,
        metadata={
            "help": "boolq, piqa, social_iqa, hellaswag, winogrande, arc_easy, arc_challenge or openbookqa: data, "
            "prompt and response of that task, as lm-eval scores it. cola, sst2, mrpc, stsb, qqp, mnli, qnli or rte: "
            "that task of GLUE, with a classification head. null: rows by columns and template."
        },
    )
    train_dataset: str | None = field(
        default=None,
        metadata={
            "help": "File (.json, .jsonl, .parquet) or hub data set, `name` or `name:config`. With a task: null is the "
            "task's own, a file may also be in LLM-Adapters' packaging; for GLUE a folder with train and dev files."
        },
    )
    train_split: str = field(default="train", metadata={"help": "Split of a hub data set; ignored for files."})
    val_dataset: str | None = field(
        default=None, metadata={"help": "Like train_dataset, for validation. null: none. Not together with val_split."}
    )
    val_dataset_split: str = field(default="test", metadata={"help": "Split of val_dataset when it is a hub name."})
    val_split: float = field(
        default=0.0,
        metadata={"help": "Held out from train_dataset by seed: below 1 a share, from 1 on a number of rows. 0: none."},
    )
    max_train_rows: int | None = field(
        default=None, metadata={"help": "Use the first N rows of the training file. null: all."}
    )
    dataset_format: Literal[
        "auto", "prompt_completion", "query_response", "question_answer", "problem_solution", "instruction"
    ] = field(default="auto", metadata={"help": "Which columns hold what; auto recognises it by their names."})
    prompt_column: str | None = field(default=None, metadata={"help": "Overrides the format's prompt column."})
    input_column: str | None = field(default=None, metadata={"help": "Overrides the format's extra-input column."})
    response_column: str | None = field(default=None, metadata={"help": "Overrides the format's response column."})
    template: str | None = field(
        default="alpaca",
        metadata={
            "help": "Name of a prompt template (polar/templates) or the path of a YAML file. null with a task, which "
            "has its own."
        },
    )
    calculator_marks: Literal["keep", "remove"] = field(
        default="keep",
        metadata={
            "help": "GSM8K's <<48/2=24>> marks in responses. keep: rows as published, comparable with results on "
            "the original data. remove: shorter responses in plain words."
        },
    )
    on_too_long: Literal["drop", "truncate", "error"] = field(
        default="drop",
        metadata={
            "help": "A row above max_length tokens. drop: leave it out. truncate: cut the response (it then gets no "
            "EOS, so that the model does not learn to stop in the middle). Either way it is counted and reported."
        },
    )


@dataclass
class AdapterArguments:
    """`peft_type` (POLAR, LORA, ...) and the fields of that PEFT config class, or `ranks` for some of them."""

    _argument_group_name: ClassVar[str] = "adapter"

    adapter: dict[str, Any] = field(
        default_factory=dict,
        metadata={
            "help": "A mapping: peft_type (default POLAR) and that method's own fields; single ones as --adapter.r 8 "
            """or --adapter.target_modules '["q_proj", "v_proj"]'. ranks: a file of `polar ranks`, auto, or """
            "a mapping of its settings, instead of r, alpha and target_modules. init_from: an adapter to start from."
        },
    )

    def __post_init__(self) -> None:
        self.ranks: RunRanks | None = None  # what the entry `ranks` stands for, once polar.run_ranks has found it

    def fields(self) -> dict[str, Any]:
        """The method's own fields, those that the ranks set among them."""
        values = {key: value for key, value in self.adapter.items() if key not in ("peft_type", "ranks", "init_from")}
        return values | (adapter_settings(self.ranks.content, self.peft_type) if self.ranks is not None else {})

    @property
    def peft_type(self) -> str:
        """Upper-case name of the PEFT method."""
        return str(self.adapter.get("peft_type", "POLAR")).upper()


@dataclass
class ManifoldArguments:
    """The manifold step of PoLAR's Stiefel factors. See `polar.constrain`; without effect on other adapters."""

    _argument_group_name: ClassVar[str] = "manifold step"

    manifold_step: Literal["retract_polar", "retract_qr", "landing", "euclidean_penalty", "none"] = field(
        default="retract_polar",
        metadata={
            "help": "retract_polar, retract_qr: exact. landing: the paper's. euclidean_penalty: its ablation. "
            "none: unconstrained."
        },
    )
    landing_penalty: float | None = field(
        default=None,
        metadata={"help": "lambda of landing or euclidean_penalty, only with these. null: constrain's default."},
    )
    landing_convention: Literal["textbook", "upstream"] | None = field(
        default=None,
        metadata={"help": "Which field lambda belongs to: upstream is the paper's code. null: textbook."},
    )
    manifold_execution: Literal["sharded", "gather"] = field(
        default="sharded",
        metadata={"help": "sharded: r x r sums over ranks. gather: whole factors, the slow reference."},
    )
    project_momentum: bool = field(
        default=False, metadata={"help": "After each step project the momentum of X and Y to the new tangent space."}
    )
    reference_width: float | None = field(
        default=None,
        metadata={
            "help": "Scale updates of a factor with n rows by sqrt(reference_width / n), as StelLA. null: do not."
        },
    )
    second_moment: Literal["elementwise", "per_factor"] = field(
        default="elementwise",
        metadata={
            "help": "per_factor: StiefelAdamW, one second moment per Stiefel factor, so that a step keeps direction. "
            "elementwise: the optimizer that optim names."
        },
    )


@dataclass
class RunConfig:
    """All settings of one run."""

    model: ModelArguments
    data: DataArguments
    adapter: AdapterArguments
    manifold: ManifoldArguments
    training: PolarTrainingConfig
    recipe: str = field(default="", compare=False)
    """The file that the settings come from, and its variants, as `FILE + NAME`; empty without one."""

    @property
    def glue_task(self) -> GlueTask | None:
        """The task of a GLUE run, which trains a classification head; None for a language model."""
        return GLUE_TASKS.get(self.data.task or "")

    @property
    def task_type(self) -> str:
        """PEFT's name of what the model does."""
        return "CAUSAL_LM" if self.glue_task is None else "SEQ_CLS"

    def validate(self, world_size: int) -> None:
        """Check everything that can be checked without loading weights; writes nothing.

        Args:
            world_size: number of processes that really run.

        Raises:
            UserError: one line that names the value and the fix.
        """
        check_run(self, world_size)

    def to_yaml(self) -> str:
        """Return a YAML file that `parse_run` reads back to an equal RunConfig on the same number of processes.

        It holds every key that this project defines, a few that every reader looks for, and every other key that
        differs from its library's default; secrets (`hub_token`) and what only one start asks for (`resume`,
        `overwrite`, `dry_run`) are left out.
        """
        parts = []
        for part in (self.model, self.data, self.adapter, self.manifold):
            parts.append((part._argument_group_name, {f.name: getattr(part, f.name) for f in dataclasses.fields(part)}))
        parts.append(("training", self._training_values()))
        blocks = []
        for title, values in parts:
            dumped = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=110)
            blocks.append(f"# {title}\n{dumped}")
        return "\n".join(blocks)

    def _training_values(self) -> dict[str, Any]:
        raw = self.training.raw_values()
        raw["global_batch_size"] = self.training.global_batch_size
        own = PolarTrainingConfig.__annotations__
        values = {}
        for f in dataclasses.fields(self.training):
            default = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
            listed = f.name in own or f.name in _ALWAYS_WRITTEN or raw.get(f.name) != default
            if f.name in raw and listed and f.name not in _NEVER_WRITTEN:
                values[f.name] = raw[f.name]
        return values


def parse_run(argv: Sequence[str]) -> RunConfig:
    """Read `[--config FILE] [--variant NAME ...] [--key value ...] [--adapter.key value ...]` into a RunConfig.

    Args:
        argv: the command line without the program's name; `--local_rank=N`, which the `deepspeed` command adds, is
            accepted.

    Raises:
        UserError: unknown key, wrong type, unreadable file, or values that TrainingArguments refuses.
        SystemExit: for `--help`.
    """
    given, recipe = read_options(argv)
    model, data = _take(ModelArguments, given), _take(DataArguments, given)
    adapter, manifold = _take(AdapterArguments, given), _take(ManifoldArguments, given)
    _keep_the_best_by_validation(data, given)
    if not {"bf16", "fp16"} & given.keys():  # SFTConfig would compute in bf16 whatever the base is stored in
        given |= {"bf16": model.dtype == "bfloat16", "fp16": model.dtype == "float16"}
    try:
        # SFTConfig has this key too; the two must not differ.
        training = PolarTrainingConfig(**given, trust_remote_code=model.trust_remote_code)
    except UserError:
        raise
    except (ValueError, TypeError, NotImplementedError) as error:
        raise UserError(" ".join(str(error).split())) from error
    return RunConfig(model, data, adapter, manifold, training, recipe)


def read_options(argv: Sequence[str]) -> tuple[dict[str, Any], str]:
    """Return the checked keys that the recipe, the command line or the task set, and the recipe's name; no side effect.

    Raises:
        UserError: unknown key, wrong type or unreadable file.
        SystemExit: for `--help`.
    """
    groups = (ModelArguments, DataArguments, AdapterArguments, ManifoldArguments)
    parser = RunParser([*groups, PolarTrainingConfig], refused=REFUSED_KEYS, prog="python -m polar.train")
    given = parser.read(argv)
    task = given.get("task")
    if task:
        given.setdefault("template", None)
    if task in TASKS and given.get("train_dataset") is None:
        given |= {"train_dataset": TASKS[task].source, "train_split": "train"}
    if task in GLUE_TASKS:
        set_glue_defaults(given, GLUE_TASKS[task])
    return given, parser.recipe


def _take(group: type[T], given: dict[str, Any]) -> T:
    """Build `group` from its keys in `given`, and remove them there."""
    names = [f.name for f in dataclasses.fields(group)]  # type: ignore[arg-type]
    return group(**{name: given.pop(name) for name in names if name in given})


def _keep_the_best_by_validation(data: DataArguments, given: dict[str, Any]) -> None:
    """With a validation set and no `eval_strategy`: evaluate at every checkpoint and keep the best by eval_loss."""
    if "eval_strategy" in given or not (data.val_dataset or data.val_split):
        return
    saves = given.get("save_strategy", "steps")
    given["eval_strategy"] = saves if saves in ("steps", "epoch") else "steps"
    if given["eval_strategy"] == "steps":
        given.setdefault("eval_steps", given.get("save_steps", PolarTrainingConfig.save_steps))
    if saves != "no":
        given.setdefault("load_best_model_at_end", True)
        given.setdefault("metric_for_best_model", "eval_loss")
