"""Merging into the weights where they are, and taking it back to the bit.

The layers stay, with their adapters, and the base's weights hold W + Σ s·ΔW until `unmerge_`. The original of each such
weight is kept, which takes the memory of the adapted weights once more: no difference of rounded numbers could give its
bits back.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from flora_torch._sharding import as_parts, refuse_sharded
from flora_torch.base_weight import check_writable
from flora_torch.inventory import check_known, layers_of
from flora_torch.layers import FloraLayer
from flora_torch.model_weights import Holder, Site, sites

__all__ = ["merge_", "refuse_merged", "unmerge_"]


def merge_(
    model: nn.Module, adapters: str | Sequence[str] | None = None, *, originals_on: torch.device | str | None = None
) -> nn.Module:
    """Add active adapters to the weights in place: the layers stay, and run as fast as without adapters.

    Each sum is taken in float64 over all that is merged and rounded once to the weight's type. The original weights are
    kept, which takes their memory once more. What is merged already stays so. Adapters that are active and not merged
    go on being added, and can be trained, on top. State dicts and `save_adapter` are those of the model with nothing
    merged; `merge` gives plain layers from here too.

    Parameters
    ----------
    model : nn.Module
        A model with adapters: the whole one, for a tied weight is merged once for all modules that hold it.
    adapters : str or sequence of str, optional
        Which of the active adapters; by default all of them.
    originals_on : torch.device or str, optional
        Where the originals are kept; by default on the weight's own device.

    Returns
    -------
    nn.Module
        The model itself.

    Raises
    ------
    ValueError
        If the model has no such adapter, it is not active or is disabled, an entry of a sum is not finite, the modules
        that hold a tied weight change it in different ways, or an adapter with a magnitude, which rescales the original
        weight, would be left on top. Nothing is merged then.

    References
    ----------
    FLoRA, arXiv 2405.14739, equation 5.

    Examples
    --------
    >>> from flora_torch import attach
    >>> model = nn.Sequential(nn.Linear(8, 8))
    >>> _ = attach(model, ranks=2)
    >>> merge_(model)[0].merged_adapters
    ('default',)
    >>> unmerge_(model)[0].merged_adapters
    ()
    """
    as_parts("merge_", model)
    layers = layers_of(model, "merge_")
    asked = _asked(model, layers, adapters)
    wanted = {id(layer): _wanted(layer, asked) for layer in layers}
    for layer in layers:
        _check_rest(layer, wanted[id(layer)])
    done: list[tuple[Tensor, Tensor]] = []
    kept: list[tuple[FloraLayer, str, Tensor]] = []
    try:
        for site in {site.name: site for site in sites(model).values()}.values():
            kept += _merge_site(site, wanted, done, originals_on)
    except BaseException:
        for weight, before in done:
            _overwrite(weight, before)
        raise
    for layer, name, original in kept:
        layer.originals[name] = original
    for layer in layers:
        layer.merged_adapters = wanted[id(layer)]
    return model


def _asked(model: nn.Module, layers: list[FloraLayer], adapters: str | Sequence[str] | None) -> list[str] | None:
    """Return the adapters to merge, proved to be active somewhere; ``None`` for all that are."""
    for layer in layers:
        if not layer.enabled and layer.active_adapters:
            raise ValueError("merge_: the adapters are disabled; merge outside of disabled()")
        if layer.row_plan is not None:
            raise ValueError("merge_: each row has its own adapters now; merge outside of adapters_for_rows()")
    if adapters is None:
        return None
    names = [adapters] if isinstance(adapters, str) else list(adapters)
    check_known(model, "merge_", names)
    active = {name for layer in layers for name in layer.active_adapters}
    for name in names:
        if name not in active and any(name in layer.tucker_update for layer in layers):
            raise ValueError(f"merge_: adapter {name!r} is not active; call activate first")
    return names


def _wanted(layer: FloraLayer, asked: Iterable[str] | None) -> tuple[str, ...]:
    """Return what is merged afterwards, in the order in which the layer adds it up."""
    chosen = set(layer.active_adapters if asked is None else asked) | set(layer.merged_adapters)
    return tuple(name for name in layer.active_adapters if name in chosen and name in layer.tucker_update)


def _check_rest(layer: FloraLayer, wanted: Sequence[str]) -> None:
    for name in layer.active_adapters:
        left = wanted and name not in wanted
        if left and any(update.magnitude is not None for update in layer.updates(name).values()):
            raise ValueError(
                f"merge_: adapter {name!r} has a magnitude, which rescales the original weight; merge it too, or "
                "activate only the others"
            )


def _merge_site(
    site: Site,
    wanted: dict[int, tuple[str, ...]],
    done: list[tuple[Tensor, Tensor]],
    originals_on: torch.device | str | None,
) -> list[tuple[FloraLayer, str, Tensor]]:
    """Merge into one weight, once for all modules that hold it; return the original for each of their layers."""
    holders = [(holder, _update_ids(holder, wanted)) for holder in site.holders]
    first = holders[0][1]
    if any(ids != first for _, ids in holders):
        raise ValueError(
            f"merge_: {site.name!r} is held by several modules, which change it in different ways; merge gives each "
            "its own weight"
        )
    layer = site.holders[0].wrapper
    if not first or layer is None:
        return []
    parameter = site.holders[0].parameter
    refuse_sharded(f"merge_: {site.name!r}", site.weight)
    check_writable(f"merge_: {site.name!r}", layer.base_layer, parameter, instead="merge")
    if set(wanted[id(layer)]) == set(layer.merged_adapters) and parameter in layer.originals:
        return []
    value = layer.merged_value(parameter, wanted[id(layer)])
    original = layer.originals.get(parameter)
    if original is None:
        original = before = site.weight.detach().to(originals_on, copy=True)
    else:
        before = site.weight.detach().clone()
    done.append((site.weight, before))
    _overwrite(site.weight, value)
    wrappers = [(holder.wrapper, holder.parameter) for holder in site.holders]
    return [(wrapper, name, original) for wrapper, name in wrappers if wrapper is not None]


def _update_ids(holder: Holder, wanted: dict[int, tuple[str, ...]]) -> list[int]:
    layer = holder.wrapper
    if layer is None:
        return []
    found = [layer.updates(adapter).get(holder.parameter) for adapter in wanted[id(layer)]]
    return [id(update) for update in found if update is not None]


@torch.no_grad()
def _overwrite(weight: Tensor, value: Tensor) -> None:
    # Into the memory that is there: views, captured graphs and flat buffers of it stay right.
    weight.copy_(value)


def unmerge_(model: nn.Module) -> nn.Module:
    """Undo `merge_`: every weight has its own bits again, and the adapters are added as before.

    Parameters
    ----------
    model : nn.Module
        A model with adapters; with nothing merged, nothing is done.

    Returns
    -------
    nn.Module
        The model itself.

    Raises
    ------
    ValueError
        If the model has no adapter.

    References
    ----------
    FLoRA, arXiv 2405.14739, equation 5.

    Examples
    --------
    >>> from flora_torch import attach
    >>> model = nn.Sequential(nn.Linear(8, 8))
    >>> before = model[0].weight.detach().clone()
    >>> _ = attach(model, ranks=2, init="official")
    >>> nn.init.ones_(model[0].tucker_update["default"].core).shape
    torch.Size([2, 2])
    >>> _ = unmerge_(merge_(model))
    >>> bool((model[0].base_layer.weight == before).all())
    True
    """
    for layer in layers_of(model, "unmerge_"):
        for name, original in layer.originals.items():
            _overwrite(layer.base_layer.get_parameter(name), original)
        layer.originals, layer.merged_adapters = {}, ()
    return model


def refuse_merged(where: str, layers: Iterable[FloraLayer]) -> None:
    """Refuse what cannot be done while an adapter is merged in place."""
    for layer in layers:
        if layer.merged_adapters:
            raise ValueError(
                f"{where}: adapter {layer.merged_adapters[0]!r} is merged into the weights in place; "
                "call unmerge_ first"
            )
