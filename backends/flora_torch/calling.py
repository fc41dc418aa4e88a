"""Modules that run with other values in the places of some of their weights."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrize

from flora_torch.base_weight import parametrizations_of

__all__ = ["call_method", "call_with", "is_own_method", "stand_in"]


def call_with(module: nn.Module, values: Mapping[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a module with other values in the places of some of its weights.

    Parameters
    ----------
    module : nn.Module
        The module, which stays as it is.
    values : mapping of str to Tensor
        The weights by the module's own names.
    args, kwargs
        What the module is called with.

    Returns
    -------
    object
        What the module gives.

    Examples
    --------
    >>> call_with(nn.Linear(2, 1, bias=False), {"weight": torch.ones(1, 2)}, (torch.ones(2),), {}).item()
    2.0
    """
    own: Any = module
    internals: Any = torch
    # FullyShardedDataParallel also keeps views of its parameters in the object's own table, which come before them.
    swaps = all(name in own._parameters and name not in vars(module) for name in values)
    if swaps and not internals.jit.is_tracing():
        # What is tied to a parameter inside the base has updates of its own: it would get them twice.
        return functional_call(module, dict(values), args, kwargs, tie_weights=False)
    return stand_in(module, values)(*args, **kwargs)


def call_method(
    module: nn.Module, method: str, values: Mapping[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Call a method of a module's own, with other values in the places of some of its weights.

    Parameters
    ----------
    module : nn.Module
        The module; what the method writes to it stays.
    method : str
        The method's name.
    values, args, kwargs
        As for `call_with`.

    Returns
    -------
    object
        What the method gives.

    Examples
    --------
    >>> call_method(nn.Linear(2, 1, bias=False), "forward", {"weight": torch.ones(1, 2)}, (torch.ones(2),), {}).item()
    2.0
    """
    own: Any = module
    if any(name in vars(module) or name not in own._parameters for name in values):
        return getattr(stand_in(module, values), method)(*args, **kwargs)
    inside = {f"module.{name}": value for name, value in values.items()}
    return functional_call(_Method(module, method), inside, args, kwargs, tie_weights=False)


class _Method(nn.Module):
    """A module whose call is a method of another one."""

    def __init__(self, module: nn.Module, method: str) -> None:
        super().__init__()
        self.module, self.method = module, method

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.module, self.method)(*args, **kwargs)


def is_own_method(module: nn.Module, name: str) -> bool:
    """Tell whether a name is that of a method that a module's own class has, and that computes with its weights.

    The methods of PyTorch's modules are for themselves alone, and what sets weights anew must meet the weights.

    Examples
    --------
    >>> is_own_method(nn.LSTM(2, 2), "flatten_parameters"), is_own_method(nn.Linear(2, 2), "weight")
    (False, False)
    """
    if name.startswith(("init", "_init", "reset", "_reset", "__")):
        return False
    owner = next((kind for kind in type(module).__mro__ if name in vars(kind)), None)
    return owner is not None and not owner.__module__.startswith("torch.") and callable(vars(owner)[name])


def stand_in(module: nn.Module, values: Mapping[str, Any]) -> nn.Module:
    """Return a shallow copy of a module that computes with other weights and shares everything else.

    Examples
    --------
    >>> norm = nn.utils.parametrizations.weight_norm(nn.Linear(2, 1, bias=False))
    >>> stand_in(norm, {"weight": torch.ones(1, 2)})(torch.ones(2)).item()
    2.0
    """
    kind: Any = parametrize.type_before_parametrizations(module)
    clone: Any = kind.__new__(kind)
    rest = [name for name in parametrizations_of(module) if name not in values]
    clone.__dict__.update(vars(module))
    clone.__dict__["_parameters"] = {k: v for k, v in module.__dict__["_parameters"].items() if k not in values}
    # An attribute of the object comes before nn.Module's own look-up, and may be any object.
    clone.__dict__.update({**{name: getattr(module, name) for name in rest}, **values})
    if names := vars(module).get("_flat_weights_names"):
        clone.__dict__["_flat_weights"] = [getattr(clone, name, None) for name in names]
    return clone
