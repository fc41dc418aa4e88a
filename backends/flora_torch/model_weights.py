"""The weights of a model: under which names, in which modules, tied ones as one."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from flora_torch.base_weight import describe, identity, own_parameter, weight_names
from flora_torch.layers import FloraLayer

__all__ = ["Holder", "Place", "Site", "places", "sites"]


@dataclass(frozen=True)
class Place:
    """A module of the model, under the name that it has without any adapter.

    Parameters
    ----------
    name : str
        The module's name; empty for the model itself.
    module : nn.Module
        The module, or the base of the layer that wraps it.
    wrapper : FloraLayer, optional
        The layer that wraps it.
    parent : nn.Module, optional
        The module that it is a child of; ``None`` for the model itself.
    key : str
        The child's name in the parent.
    is_internal : bool
        Whether it computes a weight of another module, as a parametrization does.

    Examples
    --------
    >>> [place.name for place in places(nn.Sequential(nn.Linear(2, 2)))]
    ['', '0']
    """

    name: str
    module: nn.Module
    wrapper: FloraLayer | None
    parent: nn.Module | None
    key: str
    is_internal: bool = False

    def name_of(self, local: str) -> str:
        """Return the whole name of what the module calls ``local``: a parameter, a buffer, a child."""
        return f"{self.name}.{local}" if self.name else local


@dataclass(frozen=True)
class Holder:
    """One module that holds a weight, and all the places where the module stands.

    Parameters
    ----------
    module : nn.Module
        The module.
    parameter : str
        What the module calls the weight.
    places : tuple of Place
        Where the module stands; several for a shared module.

    Examples
    --------
    >>> linear = nn.Linear(2, 2)
    >>> [holder.names for holder in sites(nn.Sequential(linear, linear))["0.weight"].holders]
    [('0.weight', '1.weight')]
    """

    module: nn.Module
    parameter: str
    places: tuple[Place, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The names under which the model knows the weight by this holder."""
        return tuple(place.name_of(self.parameter) for place in self.places)

    @property
    def wrapper(self) -> FloraLayer | None:
        """The layer that wraps the module already, if any."""
        return self.places[0].wrapper


@dataclass(frozen=True)
class Site:
    """One weight of the model, and everything that holds it: tied weights are one.

    Parameters
    ----------
    name : str
        The weight's first name.
    weight : nn.Parameter, or Tensor on the meta device
        The weight; for one that is computed or quantized, an empty tensor of the dense weight's shape and type.
    holders : tuple of Holder
        The modules that hold it.
    is_parameter : bool
        Whether the model has a parameter of this name.

    Examples
    --------
    >>> sites(nn.Sequential(nn.Linear(2, 3)))["0.weight"].names
    ('0.weight',)
    """

    name: str
    weight: Tensor
    holders: tuple[Holder, ...]
    is_parameter: bool = True

    @property
    def names(self) -> tuple[str, ...]:
        """Every name that the model knows the weight by."""
        return tuple(name for holder in self.holders for name in holder.names)


# Modules that only run another one, by their classes' names, and what they call it.
_RUNNERS = {
    "OptimizedModule": "_orig_mod",
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "AveragedModel": "module",
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
    "CheckpointWrapper": "_checkpoint_wrapped_module",
    "OffloadWrapper": "_checkpoint_wrapped_module",
    "FloraModel": "model",
    # Those of PEFT have a class for each task, which derives from this one.
    "PeftModel": "base_model",
}


def _runs(module: nn.Module, key: str) -> bool:
    """Tell whether a module only runs the child of this name; a sharded one is of a class made from its own."""
    return any(_RUNNERS.get(kind.__name__) == key for kind in type(module).__mro__)


def places(model: nn.Module) -> list[Place]:
    """List every module of a model under its plain name, seen through the layers that wrap some of them.

    A shared module is listed once for each of its names. What only runs another module, as a compiled or parallel one
    does, adds nothing to a name.

    Examples
    --------
    >>> from flora_torch import FloraLinear
    >>> [place.name for place in places(nn.Sequential(FloraLinear(nn.Linear(2, 2), ranks=1)))]
    ['', '0']
    """
    if not isinstance(model, nn.Module):  # type: ignore[redundant-expr]  # who passes a path is told so
        raise TypeError(f"got {type(model).__name__} for a model; pass an nn.Module")
    found: list[Place] = []

    def walk(module: nn.Module, name: str, parent: nn.Module | None, key: str, internal: bool = False) -> None:
        wrapper = module if isinstance(module, FloraLayer) else None
        base = module if wrapper is None else wrapper.base_layer
        place = Place(name, base, wrapper, parent, key, internal)
        found.append(place)
        # `named_children` would skip the second name of a shared child.
        for child_key, child in vars(base)["_modules"].items():
            if child is not None:
                inside = internal or (child_key == "parametrizations" and is_parametrized(base))
                below = name if _runs(base, child_key) else place.name_of(child_key)
                walk(child, below, base, child_key, inside)

    walk(model, "", None, "")
    return found


def sites(model: nn.Module) -> dict[str, Site]:
    """List every weight of a model by every name it has; tied parameters share one `Site`.

    Beside the parameters these are the weights that parametrizations compute, under the names that the modules use.

    Examples
    --------
    >>> list(sites(nn.Sequential(nn.Linear(2, 3))))
    ['0.weight', '0.bias']
    """
    holders: dict[int, dict[tuple[int, str], list[Place]]] = {}
    for place in places(model):
        for parameter in weight_names(place.module):
            key = identity(place.module, parameter)
            holders.setdefault(key, {}).setdefault((id(place.module), parameter), []).append(place)
    table: dict[str, Site] = {}
    for found in holders.values():
        # What one module computes has no identity but the module's: several such weights are told apart by name.
        for names in _told_apart(found):
            listed = tuple(Holder(found[key][0].module, key[1], tuple(found[key])) for key in names)
            first = listed[0]
            is_parameter = own_parameter(first.module, first.parameter) is not None
            site = Site(first.names[0], _shown_weight(first), listed, is_parameter)
            table |= dict.fromkeys(site.names, site)
    return table


def _told_apart(found: Mapping[tuple[int, str], list[Place]]) -> list[list[tuple[int, str]]]:
    real = [key for key, where in found.items() if own_parameter(where[0].module, key[1]) is not None]
    return [real] if real else [[key] for key in found]


def _shown_weight(holder: Holder) -> Tensor:
    weight = describe(holder.module, holder.parameter)
    assert weight is not None
    own = own_parameter(holder.module, holder.parameter)
    if weight.storage == "plain" and own is not None:
        return own
    return torch.empty(weight.shape, dtype=weight.dtype, device="meta")
