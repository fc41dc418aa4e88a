"""What adapters a model has: its layers, their updates by the names of the weights, and the tensors they replaced."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from flora_tensor._checks import type_text
from flora_tensor._warnings import warn_user
from flora_torch.base_weight import is_quantized
from flora_torch.layers import FloraLayer
from flora_torch.model_weights import Place, places
from flora_torch.update import TuckerUpdate

__all__ = [
    "WHOLE",
    "Whole",
    "adapters_of",
    "check_known",
    "check_whole",
    "current_value",
    "forget",
    "layers_by_weight",
    "layers_of",
    "replace_whole",
    "swap",
    "switch_whole",
    "tensors_by_name",
    "updates_by_weight",
    "warn_of_quantized",
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


def replace_whole(
    owner: nn.Module, local: str, value: Tensor, adapter_name: str, *, active: bool | None = None
) -> None:
    """Note the value that an adapter has for a tensor, and put it in the tensor's place where the adapter is active.

    By default, one that is new is active, and one that has replaced the tensor before stays as it is.
    """
    notes: dict[tuple[str, str], Whole] = owner.__dict__.setdefault(WHOLE, {})
    note = notes.get((local, adapter_name))
    if note is not None and note.active:
        swap(owner, local, value)
        return
    notes[local, adapter_name] = fresh = Whole(adapter_name, value, active=False)
    if active or (active is None and note is None):
        fresh.other, fresh.active = swap(owner, local, value), True


def check_whole(model: nn.Module, where: str, adapter_names: Collection[str]) -> None:
    """Refuse adapters that have different values for one tensor, of which only one can be active."""
    owners: dict[tuple[int, str], str] = {}
    for place, local, note in whole_of(model):
        if note.adapter_name in adapter_names:
            other = owners.setdefault((id(place.module), local), note.adapter_name)
            if other != note.adapter_name:
                raise ValueError(
                    f"{where}: adapters {other!r} and {note.adapter_name!r} both replace {place.name_of(local)!r} "
                    "whole; choose one of them"
                )


def switch_whole(model: nn.Module, adapter_names: Collection[str]) -> None:
    """Give the tensors that adapters have whole the values of these adapters, and all others the model's own."""
    notes = whole_of(model)
    # A value is taken out before another one is put in: what comes back must be the model's own.
    for wanted in (False, True):
        for place, local, note in notes:
            if note.active != wanted and (note.adapter_name in adapter_names) == wanted:
                note.other, note.active = swap(place.module, local, note.other), wanted


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


def tensors_by_name(model: nn.Module) -> dict[str, tuple[nn.Module, str, Tensor]]:
    """Return every parameter and buffer, its module and its name there, by the names without any adapter."""
    found: dict[str, tuple[nn.Module, str, Tensor]] = {}
    for place in places(model):
        named = [*place.module.named_parameters(recurse=False), *place.module.named_buffers(recurse=False)]
        found |= {place.name_of(local): (place.module, local, tensor) for local, tensor in named}
    return found


def whole_of(model: nn.Module) -> list[tuple[Place, str, Whole]]:
    """List the tensors that adapters replaced, a shared module once."""
    seen: dict[int, Place] = {}
    for place in places(model):
        seen.setdefault(id(place.module), place)
    return [(p, local, note) for p in seen.values() for (local, _), note in p.module.__dict__.get(WHOLE, {}).items()]


def layers_of(model: Any, where: str) -> list[FloraLayer]:
    """List the layers with adapters; a model that has no adapter at all is refused."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{where}: model is {type_text(model)}; pass an nn.Module with adapters")
    layers = [module for module in model.modules() if isinstance(module, FloraLayer)]
    if not layers and not whole_of(model):
        raise ValueError(f"{where}: the model has no adapter; call attach first")
    return layers


def warn_of_quantized(where: str, model: nn.Module, layers: Iterable[FloraLayer]) -> None:
    """Warn that quantized layers are about to become float ones, where the model's config will not follow."""
    n = sum(is_quantized(layer.base_layer) for layer in layers)
    configs = [getattr(module, "config", None) for module in model.modules()] if n else []
    if any(getattr(config, "quantization_config", None) is not None for config in configs):
        warn_user(
            f"{where}: {n} quantized layer{'s' * (n > 1)} became float, and the model's config still says quantized: "
            "what its save_pretrained writes does not load; to keep the result, save the adapter and merge it into the "
            "float model (flora-tensor merge)"
        )


def adapters_of(model: nn.Module, where: str) -> list[str]:
    """List the adapters of a model by name; a model that has none at all is refused."""
    known = dict.fromkeys([name for layer in layers_of(model, where) for name in layer.tucker_update])
    return list(known | dict.fromkeys([note.adapter_name for _, _, note in whole_of(model)]))


def check_known(model: nn.Module, where: str, names: Sequence[str]) -> None:
    """Refuse adapters that the model does not have."""
    known = adapters_of(model, where)
    for name in names:
        if name not in known:
            raise ValueError(f"{where}: the model has no adapter {name!r}; it has {', '.join(known)}")


def forget(owner: nn.Module, local: str, adapter_name: str) -> None:
    """Drop the note that a tensor was replaced; its value stays."""
    notes = owner.__dict__[WHOLE]
    del notes[local, adapter_name]
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
