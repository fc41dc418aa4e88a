"""Adapters on whole models: attach, detach, merge, disable, save and load.

Attaching itself is in `flora_torch.attachment`, and files are in `flora_torch.loading` and `flora_torch.saving`.
"""

import math
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from flora_torch._sharding import as_parts, reshard
from flora_torch.adapted_module import check_adapter_name
from flora_torch.attachment import AttachReport, LayerReport, attach
from flora_torch.base_weight import identity, own_parameter
from flora_torch.freezing import thaw
from flora_torch.hot_swap import hotswap_adapter
from flora_torch.in_place import merge_, refuse_merged, unmerge_
from flora_torch.inventory import (
    WHOLE,
    check_known,
    check_whole,
    forget,
    layers_of,
    swap,
    switch_whole,
    warn_of_quantized,
    whole_of,
)
from flora_torch.layers import FloraLayer
from flora_torch.loading import attach_adapter, load_adapter
from flora_torch.model_weights import Place, places
from flora_torch.row_adapters import adapters_for_rows
from flora_torch.saving import save_adapter
from flora_torch.update import TuckerUpdate

__all__ = [
    "AttachReport",
    "LayerReport",
    "activate",
    "adapter_parameters",
    "adapters_for_rows",
    "attach",
    "attach_adapter",
    "detach",
    "disabled",
    "hotswap_adapter",
    "load_adapter",
    "merge",
    "merge_",
    "rename_adapter",
    "save_adapter",
    "unmerge_",
]


def adapter_parameters(model: nn.Module, adapter_name: str | None = None) -> list[nn.Parameter]:
    """Return what is trained: the cores and factors of one adapter, or of all, each once.

    Parameters
    ----------
    model : nn.Module
        A model with adapters.
    adapter_name : str, optional
        One adapter; by default all.

    Returns
    -------
    list of nn.Parameter
        For an optimizer.

    Raises
    ------
    ValueError
        If the model has no adapter, or none of this name.

    References
    ----------
    FLoRA, arXiv 2405.14739, equation 5: the core and the factors are what is trained.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(8, 8))
    >>> _ = attach(model, ranks=2)
    >>> [tuple(p.shape) for p in adapter_parameters(model)]
    [(2, 2), (8, 2), (8, 2)]
    """
    reshard(model)
    check_known(model, "adapter_parameters", [] if adapter_name is None else [adapter_name])
    found: dict[int, nn.Parameter] = {}
    for layer in layers_of(model, "adapter_parameters"):
        for name in layer.tucker_update:
            if adapter_name in (None, name):
                for update in layer.updates(name).values():
                    found |= {id(p): p for p in update.parameters()}
    return list(found.values())


def activate(model: nn.Module, *adapters: str | Mapping[str, float]) -> None:
    """Choose the adapters that take part in the output; they add up, each times its weight. Without a name, none does.

    Like the choice itself, the weights are a switch of the moment: `merge` and `merge_` use them, `save_adapter` and
    state dicts do not hold them. A tensor that an adapter replaced has the adapter's value while that adapter takes
    part, and the model's otherwise.

    Parameters
    ----------
    model : nn.Module
        A model with adapters.
    *adapters : str, or mapping of str to float
        The adapters, in the order in which they are added; in a mapping with their weights, which are 1 otherwise.

    Raises
    ------
    ValueError
        If the model has no adapter of such a name, a weight is not a finite number, an adapter with another weight than
        1 replaces tensors whole, or something is merged in place that would change.

    References
    ----------
    FLoRA, arXiv 2405.14739, equation 5: changes of one weight add up.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(8, 8))
    >>> for name in ("a", "b"):
    ...     _ = attach(model, ranks=2, adapter_name=name)
    >>> activate(model, "b")
    >>> model[0].active_adapters
    ['b']
    >>> activate(model, {"a": 0.7, "b": 0.3})
    >>> model[0].tucker_update["a"].multiplier
    0.7
    """
    weights: dict[str, float] = {}
    for given in adapters:
        weights |= {given: 1.0} if isinstance(given, str) else given
    adapter_names = list(weights)
    check_known(model, "activate", adapter_names)
    layers = layers_of(model, "activate")
    _check_weights(model, layers, weights)
    for layer in layers:
        layer.active_adapters = [name for name in adapter_names if name in layer.tucker_update]
        for name in layer.tucker_update:
            for update in layer.updates(name).values():
                update.multiplier = weights.get(name, 1.0)
    switch_whole(model, adapter_names)


def _check_weights(model: nn.Module, layers: list[FloraLayer], weights: dict[str, float]) -> None:
    """Refuse weights and choices that cannot be, before any layer is switched."""
    for name, weight in weights.items():
        if not math.isfinite(weight):
            raise ValueError(f"activate: the weight of adapter {name!r} is {weight!r}; pass a finite number")
        if weight != 1.0 and any(note.adapter_name == name for _, _, note in whole_of(model)):
            raise ValueError(
                f"activate: adapter {name!r} replaces tensors whole, which cannot be done in part; pass weight 1"
            )
    check_whole(model, "activate", weights)
    for layer in layers:
        chosen = [name for name in weights if name in layer.tucker_update]
        for name in layer.merged_adapters:
            same = all(update.multiplier == weights.get(name) for update in layer.updates(name).values())
            if name not in chosen or not same:
                raise ValueError(f"activate: adapter {name!r} is merged into the weights as it is; call unmerge_ first")
        if layer.merged_adapters:
            layer.check_active(chosen)


@contextmanager
def disabled(model: nn.Module) -> Generator[nn.Module, None, None]:
    """Run the model as it was before any adapter, inside a ``with`` block; nothing is copied.

    Parameters
    ----------
    model : nn.Module
        A model with adapters.

    Yields
    ------
    nn.Module
        The model, with its own output. Tensors that an adapter replaced have the model's values meanwhile.

    Raises
    ------
    ValueError
        If the model has no adapter.

    References
    ----------
    FLoRA, arXiv 2405.14739, equation 5, without the change.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(8, 8))
    >>> _ = attach(model, ranks=2)
    >>> with disabled(model):
    ...     model[0].enabled
    False
    """
    layers = [layer for layer in layers_of(model, "disabled") if layer.enabled]
    refuse_merged("disabled", layers)
    replaced = [(place.module, local, note) for place, local, note in whole_of(model) if note.active]
    for layer in layers:
        layer.enabled = False
    for owner, local, note in replaced:
        note.other, note.active = swap(owner, local, note.other), False
    try:
        yield model
    finally:
        for layer in layers:
            layer.enabled = True
        for owner, local, note in replaced:
            # The body may have detached or activated the adapter.
            if not note.active and owner.__dict__.get(WHOLE, {}).get((local, note.adapter_name)) is note:
                note.other, note.active = swap(owner, local, note.other), True


def detach(model: nn.Module, adapter_name: str | None = None) -> nn.Module:
    """Take an adapter off a model, or all of them: the original modules, their bits and their gradient flags come back.

    Parameters
    ----------
    model : nn.Module
        A model with adapters.
    adapter_name : str, optional
        One adapter; by default all.

    Returns
    -------
    nn.Module
        The model itself; the base layer, if the model is a single layer.

    Raises
    ------
    ValueError
        If the model has no adapter, or none of this name.

    References
    ----------
    FLoRA, arXiv 2405.14739, equation 5, without the change.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(8, 8))
    >>> linear, _ = model[0], attach(model, ranks=2)
    >>> detach(model)[0] is linear
    True
    """
    check_known(model, "detach", [] if adapter_name is None else [adapter_name])
    if adapter_name is None:
        unmerge_(model)
    refuse_merged("detach", layers_of(model, "detach"))
    for layer in layers_of(model, "detach"):
        for name in list(layer.tucker_update):
            if adapter_name in (None, name):
                layer.remove_adapter(name)
    for place, local, note in whole_of(model):
        if adapter_name in (None, note.adapter_name):
            if note.active:
                swap(place.module, local, note.other)
            forget(place.module, local, note.adapter_name)
    model = _unwrap(model, lambda layer: layer if len(layer.tucker_update) else layer.base_layer)
    if not any(isinstance(module, FloraLayer) for module in model.modules()) and not whole_of(model):
        thaw(model)
    return model


def rename_adapter(model: nn.Module, old: str, new: str) -> None:
    """Give an adapter another name; its parameters, its place in the order and its switches stay.

    Parameters
    ----------
    model : nn.Module
        A model with adapters.
    old, new : str
        The names.

    Raises
    ------
    ValueError
        If there is no adapter of the old name, or the new one is taken or impossible. Nothing is renamed then.

    References
    ----------
    FLoRA, arXiv 2405.14739; a name is no part of the method, nor of the file.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(8, 8))
    >>> _ = attach(model, ranks=2)
    >>> rename_adapter(model, "default", "style")
    >>> list(model[0].tucker_update)
    ['style']
    """
    check_known(model, "rename_adapter", [old])
    check_adapter_name("rename_adapter", new)
    layers = layers_of(model, "rename_adapter")
    taken = {name for layer in layers for name in layer.tucker_update}
    taken |= {note.adapter_name for _, _, note in whole_of(model)}
    if new in taken - {old}:
        raise ValueError(f"rename_adapter: the model has an adapter {new!r} already; detach it first")
    for layer in layers:
        if old in layer.tucker_update:
            layer.rename_adapter(old, new)
    for _, _, note in whole_of(model):
        note.adapter_name = new if note.adapter_name == old else note.adapter_name


def _unwrap(model: nn.Module, replacement: Any) -> nn.Module:
    """Replace every `FloraLayer` of a model by what ``replacement`` makes of it, the innermost first."""
    doors: dict[int, list[Place]] = {}
    for place in places(model):
        if place.wrapper is not None:
            doors.setdefault(id(place.wrapper), []).append(place)
    layers = [module for module in model.modules() if isinstance(module, FloraLayer)]
    # `modules` lists a module before those inside it, and a wrapped module may hold wrapped ones.
    for layer in reversed(layers):
        fresh: nn.Module = replacement(layer)
        for place in doors[id(layer)]:
            if place.parent is None:
                model = fresh
            elif fresh is not layer:
                place.parent.add_module(place.key, fresh)
    return model


def merge(model: nn.Module) -> nn.Module:
    """Add the active adapters to the weights and give plain modules back; the adapters are gone afterwards.

    Each sum W + s·ΔW is taken in float64 and rounded once to the weight's type; tied weights stay tied. Nothing is
    changed if a sum is not finite. Tensors that an active adapter replaced keep the adapter's values.

    Parameters
    ----------
    model : nn.Module
        A model with adapters.

    Returns
    -------
    nn.Module
        The model itself; a plain layer, if the model is a single `FloraLayer`.

    Raises
    ------
    ValueError
        If the model has no adapter, or an entry of a sum is not finite.
    TypeError
        If ``model`` is no module, such as the path of a checkpoint.

    Warns
    -----
    FloraWarning
        If quantized layers become float ones in a model whose config says that they are quantized.

    References
    ----------
    FLoRA, arXiv 2405.14739, equation 5.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(8, 8))
    >>> _ = attach(model, ranks=2)
    >>> type(merge(model)[0]).__name__
    'Linear'
    """
    as_parts("merge", model)
    layers = layers_of(model, "merge")
    for layer in layers:
        layer.plain_with(layer.active_adapters)  # refuses what is not finite, before anything is replaced
    warn_of_quantized("merge", model, layers)
    tied: dict[tuple[Any, ...], nn.Parameter] = {}

    def plain(layer: FloraLayer) -> nn.Module:
        result = layer.plain_with(layer.active_adapters)
        for name in layer.parameter_names:
            # One weight with one set of updates becomes one parameter, wherever it stands.
            key = (identity(layer.base_layer, name), *(id(update) for update in _active(layer, name)))
            if own_parameter(result, name) is not None:
                setattr(result, name, tied.setdefault(key, result.get_parameter(name)))
        return result

    for place, local, note in whole_of(model):
        forget(place.module, local, note.adapter_name)
    model = _unwrap(model, plain)
    thaw(model)
    return model


def _active(layer: FloraLayer, parameter: str) -> list[TuckerUpdate]:
    found = [layer.updates(adapter).get(parameter) for adapter in layer.active_adapters]
    return [update for update in found if update is not None]
