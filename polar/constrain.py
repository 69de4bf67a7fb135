"""`constrain(model)`: one line that makes any training loop Riemannian on the Stiefel factors of a model.

It registers torch's process-wide optimizer step hooks, so it acts on the optimizer that the engine really steps:

    before step   sum X^T G over the ranks; replace each factor's gradient by a field (tangent projection or landing)
    after step    sum X^T X over the ranks; retract each factor onto St(n, r)

Factors are kept as (weak reference to their ParameterDict, adapter name) and resolved to flat slices at the first step,
because engines swap Parameter objects while they set themselves up. A step that does nothing is an error: the handle
counts, for each logical step, the factors whose slice was owned by an optimizer that stepped.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from polar import stiefel
from polar.compatibility import check_factor_dtype, check_supported
from polar.errors import UserError
from polar.factor_batch import FactorBatch, batches_of, gram_matrices, largest_orthonormality_error
from polar.gathered import GatheredBatch
from polar.shards import FactorSlice, related_leaves, resolve
from polar.steps import ManifoldStep, ManifoldStepName, TangentField, make_step
from polar.stiefel_adamw import StiefelAdamW, mean_squares
from polar.tuner.backward_field import check_applied_once
from polar.tuner.layer import restore_factor_dtype
from polar.updates import copy_values, momentum_slices, scale_updates

ManifoldExecution = Literal["sharded", "gather"]
FACTOR_NAMES = ("polar_X", "polar_Y")

# Optimizers of other models may step before ours; an optimizer that never meets a factor is a mistake at some point.
MAX_FOREIGN_STEPS = 100

_claimed: weakref.WeakKeyDictionary[nn.ParameterDict, weakref.ref[ManifoldHandle]] = weakref.WeakKeyDictionary()


def constrain(
    model: nn.Module,
    manifold_step: ManifoldStepName = "retract_polar",
    *,
    landing_penalty: float = 1.0,
    landing_convention: stiefel.LandingConvention = "textbook",
    manifold_execution: ManifoldExecution = "sharded",
    project_momentum: bool = False,
    reference_width: float | None = None,
) -> ManifoldHandle:
    """Keep the factors X and Y of every trainable PoLAR adapter in `model` on (or near) the Stiefel manifold.

    May be called before or after DDP, DeepSpeed or an optimizer is set up, once per model, on every rank. Factors that
    somebody cast to 16 bits become fp32 again.

    Args:
        model: a model that holds POLAR adapters; a wrapper around it is fine.
        manifold_step: `retract_polar` and `retract_qr` project the gradient to the tangent space and retract after each
            step (exact); `landing` replaces the gradient by the landing field, which approaches the manifold;
            `euclidean_penalty` adds the gradient of a penalty; `none` only counts.
        landing_penalty: weight lambda of X (X^T X - I) in the landing field, in the chosen convention, and in the
            Euclidean penalty.
        landing_convention: `textbook` or `upstream` (the paper's code, twice the loss part), see `polar.stiefel`.
        manifold_execution: `sharded` works on r x r sums; `gather` sends whole factors: the reference, and slower.
        project_momentum: after each step project the optimizer's momentum to the tangent space at the new factor.
        reference_width: multiply the update of a factor with n rows by sqrt(reference_width / n), None: do not.

    Returns:
        A handle. It lives as long as the model; `remove()` ends the constraint.

    Raises:
        UserError: an unknown option, no Stiefel factor in the model, factors that another constraint holds already,
            or adapters whose `backward_field` applies the field already.
    """
    _check_choice("manifold_step", manifold_step, get_args(ManifoldStepName))
    _check_choice("landing_convention", landing_convention, get_args(stiefel.LandingConvention))
    _check_choice("manifold_execution", manifold_execution, get_args(ManifoldExecution))
    if not landing_penalty >= 0:
        raise UserError(f"landing_penalty is {landing_penalty}: use a number >= 0")
    if reference_width is not None and not reference_width > 0:
        raise UserError(f"reference_width is {reference_width}: use a width above 0, for example the hidden size")
    restore_factor_dtype(model)  # TRL's SFTTrainer casts them to bf16 on a quantised base
    step = make_step(manifold_step, landing_penalty, landing_convention)
    step = replace(step, project_momentum=project_momentum, reference_width=reference_width)
    return ManifoldHandle(model, manifold_step, step, manifold_execution)


@dataclass
class _Firing:
    """One call of an optimizer's step(): the optimizer, and the names of the factors that it steps."""

    optimizer: torch.optim.Optimizer
    names: list[str]
    skipped: bool = False
    before: list[Tensor] | None = None  # the factors before the step, where the update is to be scaled


class ManifoldHandle:
    """What `constrain` returns: the constraint on one model, with its accounting.

    Attributes:
        manifold_step: the step in use.
        steps: completed logical steps, that is, steps in which every trainable factor was updated once.
    """

    def __init__(
        self,
        model: nn.Module,
        manifold_step: ManifoldStepName,
        step: ManifoldStep,
        execution: ManifoldExecution,
    ) -> None:
        self.manifold_step = manifold_step
        self.steps = 0
        self._step = step
        self._execution = execution
        self._model = weakref.ref(model)
        self._containers: list[tuple[str, weakref.ref[nn.ParameterDict]]] = []
        self._adapters: tuple[str, ...] = ()
        self._parameters: dict[str, nn.Parameter] = {}
        self._slices: dict[str, FactorSlice] = {}
        self._is_resolved = False
        self._related: set[int] = set()
        self._batches: dict[tuple[Any, ...], Sequence[FactorBatch | GatheredBatch]] = {}
        self._updated: set[str] = set()
        self._factorless: set[int] = set()
        self._foreign_steps = 0
        self._checked_steps = 0
        self._in_flight: list[_Firing] = []
        self._discover(model)
        if not self._containers:
            raise UserError("the model has no Stiefel factors (polar_X, polar_Y): add a POLAR adapter first")
        self._hooks = [
            register_optimizer_step_pre_hook(self._before_step),
            register_optimizer_step_post_hook(self._after_step),
        ]
        # The hooks keep this handle alive and it keeps no strong reference to the model: they go when the model goes.
        weakref.finalize(model, self.remove).atexit = False

    @property
    def num_factors(self) -> int:
        """Stiefel factors that are trainable now, over all ranks."""
        return sum(1 for _ in self._trainable())

    def remove(self) -> None:
        """End the constraint. The factors keep their values."""
        for hook in self._hooks:
            hook.remove()
        for _, reference in self._containers:
            container = reference()
            if container is not None and container in _claimed and _claimed[container]() is self:
                del _claimed[container]
        self._containers, self._parameters, self._slices = [], {}, {}
        self._batches, self._in_flight = {}, []

    def check(self, *, step_was_skipped: bool = False) -> None:
        """Raise RuntimeError unless every trainable factor was updated since the last call. Call it after each step.

        Args:
            step_was_skipped: the engine left out this step (overflow of a loss scale), so that none is expected.
        """
        self._raise_if_incomplete()
        if self.steps == self._checked_steps and not step_was_skipped:
            raise RuntimeError(
                f"no optimizer reached the {self.num_factors} Stiefel factors in this step: they train without their "
                "constraint. The loop must step a torch.optim.Optimizer that holds them"
            )
        self._checked_steps = self.steps

    def gram_matrices(self) -> dict[str, Tensor]:
        """X^T X, (r, r), of each trainable factor by name. Collective: call it on every rank of the engine."""
        self._refresh()
        return gram_matrices(list(self._slices.values()))

    def orthonormality_error(self) -> float:
        """Largest norm(X^T X - I)_F over the trainable factors. Collective: call it on every rank of the engine."""
        return largest_orthonormality_error(self.gram_matrices().values())

    # Which factors there are, and which of them an optimizer steps.

    def _discover(self, model: nn.Module) -> None:
        check_applied_once(model, self.manifold_step)
        known = {id(reference()) for _, reference in self._containers}
        for name, module in model.named_modules():
            if not isinstance(module, nn.ParameterDict) or name.rpartition(".")[2] not in FACTOR_NAMES:
                continue
            if id(module) in known:
                continue
            holder = _claimed.get(module)
            if holder is not None and holder() is not None:
                raise UserError(f"{name} is constrained already: call constrain() once, or remove() the first")
            self._containers.append((name, weakref.ref(module)))
        for _, reference in self._containers:
            container = reference()
            if container is not None:
                _claimed[container] = weakref.ref(self)
        self._adapters = _adapter_names(model)

    def _trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        for name, reference in self._containers:
            container = reference()
            if container is None:
                continue
            for adapter, parameter in container._parameters.items():
                if parameter is not None and parameter.requires_grad:
                    yield f"{name}.{adapter}", parameter

    def _refresh(self) -> None:
        """Resolve the factors to slices when they are not, or when the model has other ones than last time."""
        model = self._model()
        if model is None or self._in_flight:
            return
        if _adapter_names(model) != self._adapters:
            self._discover(model)
        parameters = dict(self._trainable())
        same = parameters.keys() == self._parameters.keys() and all(
            parameter is self._parameters[name] for name, parameter in parameters.items()
        )
        if same and self._is_resolved:
            return
        check_applied_once(model, self.manifold_step)  # other adapters may be trained now
        self._slices = resolve(parameters, model)
        for name, item in self._slices.items():
            check_factor_dtype(name, item.leaf.dtype)
        self._parameters, self._batches = parameters, {}
        self._related = {id(leaf) for leaf in related_leaves(model)}
        self._updated &= parameters.keys()
        self._is_resolved = True

    def _slices_of(self, firing: _Firing) -> list[FactorSlice]:
        return [self._slices[name] for name in firing.names]

    def _batches_of(self, firing: _Firing, *, of_momentum: bool = False) -> Sequence[FactorBatch | GatheredBatch]:
        """The factors of a firing, with their gradients or with the momentum that the optimizer keeps for them."""
        key = (*firing.names, id(firing.optimizer) if of_momentum else None)
        if key not in self._batches:
            slices: Sequence[FactorSlice] = self._slices_of(firing)
            slices = momentum_slices(slices, firing.optimizer) if of_momentum else slices
            self._batches[key] = batches_of(slices) if self._execution == "sharded" else [GatheredBatch(slices)]
        return self._batches[key]

    # The two hooks.

    def _before_step(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        # A step that raised left its firing behind.
        while any(firing.optimizer is optimizer for firing in self._in_flight):
            self._in_flight.pop()
        self._refresh()
        names, foreign = self._owned_by(optimizer)
        firing = _Firing(optimizer, names, skipped=_overflowed(optimizer))
        self._in_flight.append(firing)
        if not names:
            if not foreign:
                self._tell_mean_squares(optimizer)  # it may stand inside a wrapper that has the field already
            if len(self._in_flight) == 1:
                self._account_without_factors(optimizer, foreign)
            return None
        check_supported(self._slices[names[0]].engine, type(optimizer).__name__)
        if self._updated & set(names):
            self._raise_if_incomplete()
        if self._step.reference_width is not None and not firing.skipped:
            firing.before = copy_values(self._slices_of(firing))
        return self._replace_gradients(firing, args, kwargs)

    def _replace_gradients(
        self, firing: _Firing, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if not callable(closure):
            self._apply_field(firing)
            return None
        wrapped = self._after_closure(closure, firing)  # backward runs inside, so the field has to wait for it
        if "closure" in kwargs:
            return args, {**kwargs, "closure": wrapped}
        return (args[0], wrapped, *args[2:]), kwargs

    def _after_closure(self, closure: Callable[[], Any], firing: _Firing) -> Callable[[], Any]:
        def closure_then_field() -> Any:
            loss = closure()
            self._apply_field(firing)
            return loss

        return closure_then_field

    def _after_step(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._in_flight or self._in_flight[-1].optimizer is not optimizer:
            return
        firing = self._in_flight.pop()
        if not firing.names:
            return
        if not firing.skipped:
            with stiefel.full_precision():
                self._finish_update(firing)
        self._foreign_steps = 0
        self._updated.update(firing.names)
        if self._updated == self._slices.keys():
            self.steps += 1
            self._updated.clear()

    def _finish_update(self, firing: _Firing) -> None:
        """After the optimizer: scale the update, retract, bring the momentum to the new tangent space."""
        if firing.before is not None and self._step.reference_width is not None:
            scale_updates(self._slices_of(firing), firing.before, self._step.reference_width)
        if self._step.retraction is not None:
            for batch in self._batches_of(firing):
                batch.retract(self._step.retraction)
        if self._step.project_momentum:
            for batch in self._batches_of(firing, of_momentum=True):
                batch.apply_field(TangentField(), 1.0)

    def _owned_by(self, optimizer: torch.optim.Optimizer) -> tuple[list[str], bool]:
        """Names of the factors that this optimizer steps and no enclosing one does; is it of another model?"""
        stepped = _stepped_by(optimizer)
        outer = {name for firing in self._in_flight for name in firing.names}
        names = [name for name, item in self._slices.items() if id(item.leaf) in stepped and name not in outer]
        return names, not stepped & self._related

    def _tell_mean_squares(self, optimizer: torch.optim.Optimizer) -> None:
        if isinstance(optimizer, StiefelAdamW):
            stepped = _stepped_by(optimizer)
            optimizer.set_mean_squares(mean_squares([s for s in self._slices.values() if id(s.leaf) in stepped]))

    def _apply_field(self, firing: _Firing) -> None:
        if firing.skipped:
            return
        scale = getattr(firing.optimizer, "grad_scale", None)  # fused optimizers get gradients times the loss scale
        bad = []
        with stiefel.full_precision():
            if self._step.field is not None:
                for batch in self._batches_of(firing):
                    bad += batch.apply_field(self._step.field, 1.0 if scale is None else scale)
            self._tell_mean_squares(firing.optimizer)
        if bad:
            warnings.warn(
                f"step {self.steps + 1}: the gradient of {len(bad)} Stiefel factors is not finite and was set to zero, "
                f"first {bad[0]}; lower the learning rate or clip gradients",
                stacklevel=2,
            )

    # Accounting.

    def _account_without_factors(self, optimizer: torch.optim.Optimizer, foreign: bool) -> None:
        if self.steps or self._updated:
            return
        if foreign:
            self._foreign_steps += 1
            if self._foreign_steps >= MAX_FOREIGN_STEPS:
                raise RuntimeError(
                    f"{MAX_FOREIGN_STEPS} optimizer steps and none held a Stiefel factor of the constrained model: "
                    "give the optimizer the model's own parameters, or call constrain() when the other training is over"
                )
            return
        leaves = _stepped_by(optimizer)
        if leaves & self._factorless:
            raise RuntimeError(
                f"{type(optimizer).__name__} stepped parameters of the model twice and no optimizer held any of its "
                f"{len(self._slices)} Stiefel factors: pass all trainable parameters to the optimizer"
            )
        self._factorless |= leaves

    def _raise_if_incomplete(self) -> None:
        if not self._updated:
            return
        missing = [name for name in self._slices if name not in self._updated]
        self._updated.clear()
        raise RuntimeError(
            f"{len(missing)} of {len(self._slices)} trainable Stiefel factors were not updated in the last step, first "
            f"{missing[0]}: they are in no optimizer that stepped. Create it after the adapter, or freeze them"
        )


def _stepped_by(optimizer: torch.optim.Optimizer) -> set[int]:
    """`id` of each tensor that the optimizer steps."""
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}


def _overflowed(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a fused optimizer was told by GradScaler to leave out this step."""
    found_inf = getattr(optimizer, "found_inf", None)
    return found_inf is not None and bool(found_inf.item() > 0)


def _adapter_names(model: nn.Module) -> tuple[str, ...]:
    """Names of the adapters that the model knows, through wrappers such as DDP."""
    while not hasattr(model, "peft_config"):
        inner = getattr(model, "module", None)
        if not isinstance(inner, nn.Module):
            return ()
        model = inner
    return tuple(model.peft_config)  # type: ignore[arg-type]


def _check_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(f"{key} is {value!r}: use one of {', '.join(choices)}")
