"""The configuration of a PoLAR adapter: what PEFT stores in `adapter_config.json`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from peft import PeftConfig
from peft.utils import PeftType

from polar.errors import UserError
from polar.stiefel import LandingConvention
from polar.tuner.backward_field import BackwardField, BackwardFieldName

ThetaKind = Literal["full", "diagonal", "identity"]
ThetaInit = Literal["zeros", "identity"]
FactorInit = Literal["orthonormal", "gaussian", "svd"]
BiasKind = Literal["none", "all", "polar_only"]


@dataclass
class PolarConfig(PeftConfig):
    """Options of one PoLAR adapter: W = W0 + s X Theta Y^T, with s = alpha / r.

    Args:
        r: rank of the adapter; at most min(d_in, d_out) of every layer that it adapts.
        target_modules: names, suffixes of names or one regular expression; "all-linear" takes every linear layer but
            the output layer; None takes PEFT's default for the architecture (that of LoRA).
        exclude_modules: names, suffixes or one regular expression of modules to leave alone.
        alpha: the scale is alpha / r, or alpha / sqrt(r) with `use_rslora`.
        dropout: probability that an input element of the adapter is dropped in training, in [0, 1).
        theta: the scale matrix: a free (r, r) matrix, its diagonal only, or the identity without parameters.
        init_theta: "zeros" (paper) starts at the base model. "identity" starts at dW = s X Y^T, which is not zero and
            is not subtracted from W0; the same holds for `theta="identity"`, which has no other start.
        init_factors: "orthonormal" draws X and Y uniformly from the Stiefel manifold; "gaussian" draws entries from
            N(0, 1/n), off the manifold; "svd" takes the leading singular vectors of the base weight W0.
        use_rslora: scale by alpha / sqrt(r) instead of alpha / r.
        rank_pattern: module name or regular expression -> rank, where it differs from `r`.
        alpha_pattern: module name or regular expression -> alpha, where it differs from `alpha`.
        bias: which biases of the base model are trained: "none", "all", or those of adapted layers, "polar_only".
        modules_to_save: modules that are trained whole and saved with the adapter.
        layers_to_transform: layer index or indices to adapt; all when None.
        layers_pattern: name of the `nn.ModuleList` that the indices count, for example "layers".
        init_weights: False also draws Theta at random, so that the adapter acts at once; for tests.
        fan_in_fan_out: True where the base weight is stored (d_in, d_out), as in transformers' Conv1D; it is set
            from the layer itself when the two disagree.
        backward_field: what the layer's own backward makes of the gradients of X and Y, for loops that cannot call
            `polar.constrain`: "none", their "tangent" projection, or the "landing" field. See
            `polar.tuner.backward_field` for what differs.
        landing_penalty: weight lambda of X (X^T X - I) in one step of the landing field, above 0, in
            `landing_convention`.
        landing_convention: "textbook", or "upstream" (the paper's code), see `polar.stiefel`.
        gradient_accumulation_steps: micro batches of one step in the training loop. The loop divides its loss by them;
            the penalty, which is no part of the loss, is divided here.
        loss_scale: the static loss scale of fp16 training, which multiplies the penalty. None: fp16 is refused with
            the landing field. A dynamic scale cannot be followed.

    Raises:
        UserError: a value that no layer could use.
    """

    r: int = field(default=8, metadata={"help": "Rank of the adapter."})
    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names, suffixes, or one regular expression of the modules to adapt."}
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names, suffixes, or one regular expression of modules to leave alone."}
    )
    alpha: float = field(default=32, metadata={"help": "Scale: s = alpha / r."})
    dropout: float = field(default=0.0, metadata={"help": "Dropout probability on the adapter's input."})
    theta: ThetaKind = field(default="full", metadata={"help": "Scale matrix: full, diagonal or identity."})
    init_theta: ThetaInit = field(default="zeros", metadata={"help": "Start of the scale matrix: zeros or identity."})
    init_factors: FactorInit = field(
        default="orthonormal", metadata={"help": "Start of X and Y: orthonormal, gaussian or svd."}
    )
    use_rslora: bool = field(default=False, metadata={"help": "Scale by alpha / sqrt(r)."})
    rank_pattern: dict[str, int] | None = field(
        default_factory=dict, metadata={"help": "Module name or regular expression -> rank."}
    )
    alpha_pattern: dict[str, float] | None = field(
        default_factory=dict, metadata={"help": "Module name or regular expression -> alpha."}
    )
    bias: BiasKind = field(default="none", metadata={"help": "Trained biases: none, all or polar_only."})
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules that are trained whole and saved with the adapter."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Index or indices of the layers to adapt."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the nn.ModuleList that layers_to_transform counts."}
    )
    init_weights: bool = field(default=True, metadata={"help": "False draws Theta at random, for tests."})
    fan_in_fan_out: bool = field(default=False, metadata={"help": "True where the base weight is (d_in, d_out)."})
    backward_field: BackwardFieldName = field(
        default="none", metadata={"help": "Field in the layer's backward: none, tangent or landing."}
    )
    landing_penalty: float | None = field(default=None, metadata={"help": "Penalty of the landing field, above 0."})
    landing_convention: LandingConvention = field(
        default="textbook", metadata={"help": "Convention of landing_penalty: textbook or upstream."}
    )
    gradient_accumulation_steps: int = field(
        default=1, metadata={"help": "Micro batches per step of the training loop; divides landing_penalty."}
    )
    loss_scale: float | None = field(
        default=None, metadata={"help": "Static loss scale of fp16 training; multiplies landing_penalty."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType["POLAR"]
        # PEFT tests membership and adds names, so lists become sets, as in its own configurations.
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            setattr(self, name, set(value) if isinstance(value, (list, tuple)) else value)
        self.rank_pattern = self.rank_pattern or {}
        self.alpha_pattern = self.alpha_pattern or {}
        self._check()

    def scaling(self, r: int, alpha: float) -> float:
        """Return s for one layer's rank and alpha."""
        return alpha / math.sqrt(r) if self.use_rslora else alpha / r

    def make_backward_field(self) -> BackwardField:
        """Return the field of one backward pass."""
        if self.backward_field != "landing":
            return BackwardField(self.backward_field)
        assert self.landing_penalty is not None  # checked
        penalty = self.landing_penalty * (self.loss_scale or 1.0) / self.gradient_accumulation_steps
        return BackwardField("landing", penalty, self.landing_convention, allows_fp16=self.loss_scale is not None)

    def _check(self) -> None:
        _check_choice("theta", self.theta, ThetaKind)
        _check_choice("init_theta", self.init_theta, ThetaInit)
        _check_choice("init_factors", self.init_factors, FactorInit)
        _check_choice("bias", self.bias, BiasKind)
        _check_rank("r", self.r)
        _check_positive("alpha", self.alpha, "the scale of an adapter is alpha / r")
        for key, rank in (self.rank_pattern or {}).items():
            _check_rank(f"rank_pattern[{key!r}]", rank)
        for key, alpha in (self.alpha_pattern or {}).items():
            _check_positive(f"alpha_pattern[{key!r}]", alpha, "the scale of an adapter is alpha / r")
        if not _is_number(self.dropout) or not 0 <= self.dropout < 1:
            raise UserError(f"dropout must be a number in [0, 1), got {self.dropout!r}; 0 turns it off")
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise UserError(
                "layers_to_transform needs target_modules as a list of names, got the regular expression "
                f"{self.target_modules!r}; put the layer numbers into the expression instead"
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise UserError(
                f"layers_pattern={self.layers_pattern!r} does nothing without layers_to_transform; set both or neither"
            )
        self._check_backward_field()

    def _check_backward_field(self) -> None:
        _check_choice("backward_field", self.backward_field, BackwardFieldName)
        _check_choice("landing_convention", self.landing_convention, LandingConvention)
        steps = self.gradient_accumulation_steps
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise UserError(
                f"gradient_accumulation_steps must be an integer from 1 on, got {steps!r}; give that of the loop"
            )
        if self.backward_field == "landing":
            _check_positive("landing_penalty", self.landing_penalty, "1.0 is a common weight of the landing field")
            if self.loss_scale is not None:
                _check_positive("loss_scale", self.loss_scale, "give the static scale of the loop, or leave it out")
            return
        for name in ("landing_penalty", "landing_convention", "gradient_accumulation_steps", "loss_scale"):
            if getattr(self, name) != getattr(type(self), name):
                raise UserError(
                    f"{name}={getattr(self, name)!r} does nothing with backward_field={self.backward_field!r}; leave "
                    "it out, or set backward_field='landing'"
                )


def _check_choice(name: str, value: Any, choices: Any) -> None:
    if value not in get_args(choices):
        raise UserError(f"{name} must be one of {', '.join(get_args(choices))}; got {value!r}")


def _check_rank(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise UserError(f"{name} must be a positive integer, got {value!r}; 8, 16 and 32 are common ranks")


def _check_positive(name: str, value: Any, fix: str) -> None:
    if not _is_number(value) or not value > 0 or math.isinf(value):
        raise UserError(f"{name} must be a positive number, got {value!r}; {fix}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
