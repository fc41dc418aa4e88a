"""What adapters a model has: its layers, their updates by the names of the weights, and the tensors they replaced."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from flora_torch.layers import FloraLayer
from flora_torch.model_weights import Place, places
from flora_torch.update import TuckerUpdate

__all__ = [
    "WHOLE",
    "Whole",
    "check_known",
    "current_value",
    "forget",
    "layers_by_weight",
    "layers_of",
    "replace_whole",
    "swap",
    "updates_by_weight",
    "whole_of",
]

# Under this name a module notes which of its own tensors adapters replaced.
WHOLE = "_flora_whole"


@dataclass
class Whole:
    """A tensor that an adapter replaced: the value that is not in the model now, and which one that is."""

    adapter_name: str
    other: Tensor
    active: bool = True

    def value_in(self, owner: nn.Module, local: str) -> Tensor:
        """Return the adapter's value, wherever it is now."""
        return current_value(owner, local) if self.active else self.other


def replace_whole(owner: nn.Module, local: str, value: Tensor, adapter_name: str) -> None:
    """Put a stored value in the place of a tensor, and note the model's own."""
    original = swap(owner, local, value)
    owner.__dict__.setdefault(WHOLE, {})[local] = Whole(adapter_name, original)


def current_value(owner: nn.Module, local: str) -> Tensor:
    """Return the parameter or buffer of this name, without its gradient."""
    own = dict(owner.named_parameters(recurse=False))
    return own[local].detach() if local in own else owner.get_buffer(local)


def swap(owner: nn.Module, local: str, value: Tensor) -> Tensor:
    """Put a value in the place of a parameter's or buffer's, and return the old one; the parameter object stays."""
    own = dict(owner.named_parameters(recurse=False))
    if local in own:
        old = own[local].data
        own[local].data = value.to(old)
        return old
    old = owner.get_buffer(local)
    setattr(owner, local, value.to(old))
    return old


def whole_of(model: nn.Module) -> list[tuple[Place, str, Whole]]:
    """List the tensors that adapters replaced, a shared module once."""
    seen: dict[int, Place] = {}
    for place in places(model):
        seen.setdefault(id(place.module), place)
    return [(p, local, note) for p in seen.values() for local, note in p.module.__dict__.get(WHOLE, {}).items()]


def layers_of(model: nn.Module, where: str) -> list[FloraLayer]:
    """List the layers with adapters; a model that has no adapter at all is refused."""
    layers = [module for module in model.modules() if isinstance(module, FloraLayer)]
    if not layers and not whole_of(model):
        raise ValueError(f"{where}: the model has no adapter; call attach first")
    return layers


def check_known(model: nn.Module, where: str, names: Sequence[str]) -> None:
    """Refuse adapters that the model does not have."""
    layers = layers_of(model, where)
    known = dict.fromkeys([name for layer in layers for name in layer.tucker_update])
    known |= dict.fromkeys([note.adapter_name for _, _, note in whole_of(model)])
    for name in names:
        if name not in known:
            raise ValueError(f"{where}: the model has no adapter {name!r}; it has {', '.join(known)}")


def forget(owner: nn.Module, local: str) -> None:
    """Drop the note that a tensor was replaced; its value stays."""
    notes = owner.__dict__[WHOLE]
    del notes[local]
    if not notes:
        del owner.__dict__[WHOLE]


def updates_by_weight(model: nn.Module, adapter_name: str) -> dict[str, TuckerUpdate]:
    """Return an adapter's updates by the plain names of their weights; a shared one once, under its first name."""
    found: dict[int, tuple[str, TuckerUpdate]] = {}
    for place in places(model):
        if place.wrapper is not None:
            for parameter, update in place.wrapper.updates(adapter_name).items():
                name = place.name_of(parameter)
                found.setdefault(id(update), (name, update))
    return dict(found.values())


def layers_by_weight(model: nn.Module) -> dict[str, FloraLayer]:
    """Return the layer of each adapted weight, by every name of the weight."""
    found: dict[str, FloraLayer] = {}
    for place in places(model):
        if place.wrapper is not None:
            for parameter in place.wrapper.parameter_names:
                found[place.name_of(parameter)] = place.wrapper
    return found
