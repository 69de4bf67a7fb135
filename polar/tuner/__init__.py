"""The PEFT method POLAR. Importing this package registers it; doing so again changes nothing."""

from __future__ import annotations

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType, register_peft_method

from polar.tuner.config import PolarConfig
from polar.tuner.conversion import extend_peft_conversion
from polar.tuner.hotswap import extend_peft_hotswap
from polar.tuner.layer import PolarLayer, PolarLinear, restore_factor_dtype
from polar.tuner.model import PolarModel

__all__ = ["PolarConfig", "PolarLayer", "PolarLinear", "PolarModel", "restore_factor_dtype"]


def _extend_peft_type(name: str) -> PeftType:
    """Add a member to PEFT's closed enum of methods, or return the one that is there.

    `register_peft_method` (PEFT 0.21.2) accepts only members of `PeftType` and offers no way to add one.
    """
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType._member_names_)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    type.__setattr__(PeftType, name, member)  # Enum forbids the normal way
    return member


def _register() -> None:
    """Enter the method in PEFT's tables; an entry left by an earlier import of these modules is replaced."""
    member = _extend_peft_type("POLAR")
    for table in (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING):
        table.pop(member, None)
    register_peft_method(name="polar", config_cls=PolarConfig, model_cls=PolarModel)


_register()
extend_peft_conversion()
extend_peft_hotswap()
