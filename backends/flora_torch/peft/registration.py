"""Making FLORA a method of PEFT, which has no way for others to add one: its types are a closed enumeration."""

from typing import Any

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import PeftType
from peft.utils.hotswap import CONFIG_KEYS_TO_CHECK

__all__ = ["HOTSWAP_KEYS", "NAME", "PREFIX", "peft_type", "register"]

NAME = "FLORA"
PREFIX = "tucker_update"
# Two adapters whose configs agree in these can be swapped by copying tensors.
HOTSWAP_KEYS = ["ranks", "rank_pattern", "scale", "scale_pattern", "alpha", "scaling", "arrangement_pattern", "whole"]


def peft_type() -> Any:
    """Return the member of `PeftType` for FLoRA, made on first use.

    Examples
    --------
    >>> peft_type() is PeftType("FLORA")
    True
    """
    kinds: Any = PeftType
    known = kinds.__members__.get(NAME)
    if known is not None:
        return known
    member: Any = str.__new__(kinds, NAME)
    member._name_ = member._value_ = NAME
    member.__objclass__, member._sort_order_ = kinds, len(kinds.__members__)
    # An enumeration refuses new attributes by its metaclass' `__setattr__`. The attribute comes before the tables:
    # where it cannot be set, nothing has changed.
    type.__setattr__(kinds, NAME, member)
    kinds._member_map_[NAME] = member
    kinds._value2member_map_[NAME] = member
    kinds._member_names_.append(NAME)
    return member


def register(config_class: type, model_class: type) -> None:
    """Make PEFT know the method; a second time changes nothing.

    Parameters
    ----------
    config_class, model_class : type
        The classes of the config and of the tuner.

    Raises
    ------
    ImportError
        If PEFT is too old.
    RuntimeError
        If somebody else has registered a method of this name.

    Examples
    --------
    >>> from flora_torch.peft import FloraConfig, FloraModel
    >>> register(FloraConfig, FloraModel)
    """
    if not hasattr(BaseTuner, "_remap_adapter_state_dict_for_load"):
        raise ImportError("flora_torch.peft needs peft 0.21 or newer; run pip install --upgrade 'flora-tensor[peft]'")
    member = peft_type()
    known = PEFT_TYPE_TO_CONFIG_MAPPING.get(member)
    if known is not None and (known.__module__, known.__qualname__) != (
        config_class.__module__,
        config_class.__qualname__,
    ):
        raise RuntimeError(
            f"flora_torch.peft: PEFT has a method {NAME!r} already, by {known.__module__}.{known.__qualname__}; import "
            "only one of the two"
        )
    PEFT_TYPE_TO_CONFIG_MAPPING[member] = config_class
    PEFT_TYPE_TO_TUNER_MAPPING[member] = model_class
    PEFT_TYPE_TO_PREFIX_MAPPING[member] = PREFIX
    CONFIG_KEYS_TO_CHECK[member] = HOTSWAP_KEYS
