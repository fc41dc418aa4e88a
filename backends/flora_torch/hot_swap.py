"""Another adapter in the place of one that a model runs with: the same parameters, with other values."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from flora_tensor import TuckerTensor, mode_dot
from flora_tensor._typing import PathLike
from flora_tensor.adapter import Adapter
from flora_torch._sharding import as_parts, is_sharded
from flora_torch.in_place import refuse_merged
from flora_torch.inventory import Whole, layers_by_weight, layers_of, updates_by_weight, whole_of
from flora_torch.loading import as_adapter, as_torch, plan_of
from flora_torch.model_weights import Place, sites
from flora_torch.update import TuckerUpdate

__all__ = ["hotswap_adapter"]


def hotswap_adapter(
    model: nn.Module, source: PathLike | Mapping[str, TuckerTensor], *, adapter_name: str = "default"
) -> None:
    """Write another adapter's tensors into the parameters of one that is there, so that nothing is compiled again.

    The parameters stay the same objects, of the same shapes and types. Lower ranks are filled up with zeros (training
    does not move those: to train on, load the adapter instead), a start becomes part of the tensor where there is none,
    and a weight that the new adapter does not change is not changed any more. The scale of the layer stays too: another
    one is multiplied into the core. So do the dropouts and the adapter's name, weight and activity.

    Parameters
    ----------
    model : nn.Module
        A model with adapters.
    source : path, Adapter, or mapping of str to TuckerTensor
        The new adapter.
    adapter_name : str
        The adapter that it takes the place of.

    Raises
    ------
    ValueError
        If there is no such adapter, or the new one does not fit into it: a higher rank, another arrangement, a weight
        or a whole tensor that the old one does not change, a magnitude where the old one has none. Nothing is changed
        then.
    OSError
        If a file cannot be read.

    References
    ----------
    FLoRA, arXiv 2405.14739, equation 5: a Tucker tensor of lower ranks is one of higher ranks with zeros.

    Examples
    --------
    >>> import numpy as np
    >>> from flora_torch import attach
    >>> model = nn.Sequential(nn.Linear(3, 2, bias=False))
    >>> _ = attach(model, ranks=2)
    >>> core = model[0].tucker_update["default"].core
    >>> hotswap_adapter(model, {"0.weight": TuckerTensor(np.full((1, 1), 2.0), [np.ones((2, 1)), np.ones((3, 1))])})
    >>> model[0].tucker_update["default"].core is core, model[0].weight.shape
    (True, torch.Size([2, 3]))
    """
    as_parts("hotswap_adapter", model)
    present = updates_by_weight(model, adapter_name)
    replaced = [(place, local, note) for place, local, note in whole_of(model) if note.adapter_name == adapter_name]
    layers = layers_of(model, "hotswap_adapter")
    if not present and not replaced:
        raise ValueError(f"hotswap_adapter: the model has no adapter {adapter_name!r}; attach or load one first")
    refuse_merged("hotswap_adapter", layers)
    for name, update in present.items():
        if any(is_sharded(p) for p in update.parameters()):
            raise ValueError(
                f"hotswap_adapter: the adapter of {name!r} is spread over processes (DTensor); use load_adapter, which "
                "fills an adapter of the same form"
            )
    adapter, table = as_adapter(source), sites(model)
    given = {table[name].name if name in table else name: name for name in adapter}
    if unknown := set(given) - set(present):
        raise ValueError(
            f"hotswap_adapter: {min(unknown)!r} is changed by the new adapter and not by {adapter_name!r}; attach it "
            "under another adapter_name"
        )
    whole = _whole_values(adapter, replaced)
    owners = layers_by_weight(model)
    values: list[tuple[Tensor, Tensor]] = []
    for name, update in present.items():
        weight = owners[name].original(table[name].holders[0].parameter)
        new = plan_of("hotswap_adapter", adapter, given[name], table).update if name in given else None
        values += _values(name, update, new, weight)
    _check_consistent(values)
    with torch.no_grad():
        for tensor, value in [*values, *whole]:
            tensor.copy_(value)


def _check_consistent(values: list[tuple[Tensor, Tensor]]) -> None:
    """Refuse two values for a tensor that layers share."""
    first: dict[int, Tensor] = {}
    for tensor, value in values:
        if tensor.numel() and not torch.equal(first.setdefault(tensor.data_ptr(), value), value):
            raise ValueError(
                "hotswap_adapter: layers share a factor in the model and have factors of their own in the new adapter; "
                "attach it under another adapter_name"
            )


def _whole_values(adapter: Adapter, replaced: list[tuple[Place, str, Whole]]) -> list[tuple[Tensor, Tensor]]:
    """Pair the tensors that are replaced whole with their new values."""
    there = {place.name_of(local): (place, local, note) for place, local, note in replaced}
    if differing := set(there) ^ set(adapter.whole):
        raise ValueError(
            f"hotswap_adapter: {min(differing)!r} is replaced whole by only one of the two adapters; attach the new "
            "one under another adapter_name"
        )
    pairs: list[tuple[Tensor, Tensor]] = []
    for name, (place, local, note) in there.items():
        tensor, value = note.value_in(place.module, local), as_torch("hotswap_adapter", adapter.whole[name], name)
        if tensor.shape != value.shape:
            raise ValueError(
                f"hotswap_adapter: {name!r} is of shape {tuple(tensor.shape)}, not {tuple(value.shape)}; pass the "
                "adapter of this model"
            )
        pairs.append((tensor, value.to(tensor)))
    return pairs


def _values(name: str, there: TuckerUpdate, new: TuckerUpdate | None, weight: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Pair the tensors of an update with what another one puts there; without one, with what changes nothing."""
    if new is None:
        cleared = [there.core] if there.start_core is None else [there.core, there.start_core]
        pairs = [(core.detach(), torch.zeros_like(core)) for core in cleared]
        return [*pairs, *_magnitude(there, weight, 0.0)]
    _check_form(name, there, new)
    ratio = 1.0 if new.scale == there.scale else new.scale / there.scale
    split = there.start is not None and new.start is not None
    pairs = _tensors(name, there, new.tucker if split else new.exported(), ratio, "")
    if there.start_core is not None:
        start = new.start if split else None
        if start is None:
            pairs.append((there.start_core, torch.zeros_like(there.start_core)))
        else:
            pairs += _tensors(name, there, start, ratio, "start_")
    if new.magnitude is not None and there.magnitude is not None:
        return [*pairs, (there.magnitude.detach(), new.magnitude.detach().to(there.magnitude))]
    return [*pairs, *_magnitude(there, weight, new.delta().detach())]


def _magnitude(there: TuckerUpdate, weight: Tensor, delta: Any) -> list[tuple[Tensor, Tensor]]:
    """Pair a magnitude, if there is one, with the norms of W + ΔW, which rescale nothing."""
    if there.magnitude is None:
        return []
    norms = there.norms(weight + delta)
    return [(there.magnitude.detach(), norms.to(there.magnitude))]


def _check_form(name: str, there: TuckerUpdate, new: TuckerUpdate) -> None:
    if new.arrangement != there.arrangement:
        raise ValueError(
            f"hotswap_adapter: {name!r} is arranged as {there.arrangement.pattern!r} in the model and as "
            f"{new.arrangement.pattern!r} in the new adapter; attach it under another adapter_name"
        )
    if new.magnitude is not None and (there.magnitude is None or new.channels != there.channels):
        raise ValueError(
            f"hotswap_adapter: {name!r} has a magnitude in the new adapter, and the one in its place has none like it; "
            "attach it under another adapter_name"
        )
    if there.scale == 0.0 and new.scale != 0.0:
        raise ValueError(
            f"hotswap_adapter: {name!r} has scale 0 in the model, which no core can make {new.scale:g}; attach the new "
            "adapter under another adapter_name"
        )


def _tensors(
    name: str, there: TuckerUpdate, tucker: TuckerTensor, ratio: float, prefix: str
) -> list[tuple[Tensor, Tensor]]:
    """Pair a core and its factors with those of a Tucker tensor, filled up with zeros."""
    tucker = tucker.map(lambda a: a.detach().to(there.core))
    core, pairs = tucker.core, list[tuple[Tensor, Tensor]]()
    for mode, (mine, given) in enumerate(zip(there.factors, tucker.factors)):
        if mine is None:
            core = core if given is None else mode_dot(core, given, mode)
            continue
        if given is not None and given.shape[1] > mine.shape[1] == mine.shape[0]:
            # More directions than the mode has entries (a start doubles them) are multiplied out.
            core, given = mode_dot(core, given, mode), None
        # A mode left whole is one with the identity for its factor.
        given = torch.eye(mine.shape[0]).to(mine) if given is None else given
        if given.shape[1] > mine.shape[1]:
            raise ValueError(
                f"hotswap_adapter: {name!r} has rank {given.shape[1]} for mode {mode} in the new adapter, and there is "
                f"room for {mine.shape[1]}; round it to lower ranks, or attach it under another adapter_name"
            )
        pairs.append((getattr(there, f"{prefix}factor_{mode}").detach(), _padded(given, tuple(mine.shape))))
    pairs.append((getattr(there, f"{prefix}core").detach(), _padded(core * ratio, there.ranks)))
    if not all(bool(torch.isfinite(value).all()) for _, value in pairs):
        raise ValueError(
            f"hotswap_adapter: {name!r} would not be finite in {there.core.dtype}; attach it in a wider type"
        )
    return pairs


def _padded(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    result = tensor.new_zeros(shape)
    result[tuple(slice(0, n) for n in tensor.shape)] = tensor
    return result
