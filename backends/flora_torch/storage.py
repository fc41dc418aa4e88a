"""Adapters from tensors and files, and back to files.

What a file names is looked up in a table of the model's own names and nowhere else.
"""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path as FilePath
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import flora_tensor as ft
from flora_tensor import TuckerTensor
from flora_tensor.adapter import Adapter
from flora_torch._sharding import assign_, gathered, is_first_process, is_sharded
from flora_torch.attachment import AttachReport, Plan, all_or_nothing, install, n_model_parameters, report_of
from flora_torch.base_check import (
    VerifyBase,
    check_layer,
    check_option,
    check_samples,
    describe_bases,
    dtype_codes,
)
from flora_torch.base_weight import adaptable
from flora_torch.functional import Path
from flora_torch.in_place import refuse_merged
from flora_torch.initialize import default_dtype
from flora_torch.inventory import (
    WHOLE,
    Whole,
    check_known,
    current_value,
    layers_by_weight,
    layers_of,
    replace_whole,
    swap,
    updates_by_weight,
    whole_of,
)
from flora_torch.kinds import drops_input
from flora_torch.selection import Site, near, places, sites
from flora_torch.stacks import check_shared, joined_stacks, share_factors
from flora_torch.update import DROPOUTS, TuckerUpdate

__all__ = ["as_adapter", "as_torch", "attach_adapter", "load_adapter", "plan_of", "save_adapter"]

_DTYPE_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in dtype_codes}


def attach_adapter(
    model: nn.Module,
    source: str | os.PathLike[str] | Mapping[str, TuckerTensor],
    *,
    adapter_name: str = "default",
    dtype: torch.dtype | None = None,
    dropout: float | None = None,
    path: Path = "auto",
    freeze_model: bool = True,
    verify_base: VerifyBase = "warn",
) -> AttachReport:
    """Put Tucker tensors that are known already on a model, as trainable updates.

    Tensors that the adapter stores whole (biases, norms) replace the model's, frozen; `detach` puts the model's own
    back. Layers of a stack share their factors, each a single parameter of all of them (of those on one device), and
    have each a core of its own. Nothing is changed if anything does not fit.

    Parameters
    ----------
    model : nn.Module
        The model that the adapter was made for.
    source : path, Adapter, or mapping of str to TuckerTensor
        An adapter directory, or for each weight its change in arrays of any library.
    adapter_name : str
        The name that it gets here.
    dtype : torch.dtype, optional
        The updates' type; by default the one that they were trained in, or else float32 for 16-bit weights and the
        weight's own for others.
    dropout : float, optional
        As for `attach`; by default as it was trained.
    path, freeze_model
        As for `attach`.
    verify_base : {"warn", "error", "ignore"}
        What is done if the model's weights are not the numbers that the adapter's config notes; weights that are
        quantized, computed or spread over processes are not compared. A weight that belongs to another kind of layer,
        or to a convolution with other groups or another padding mode, is an error unless this is ``"ignore"``.

    Returns
    -------
    AttachReport
        What was done to each weight.

    Raises
    ------
    ValueError
        If the model has no such weight (near names are listed), a shape or the layer differs, an entry is no finite
        real number or is too large for the update's type, or an adapter of this name is there already.

    Warns
    -----
    FloraWarning
        If the adapter was made for other weights.

    References
    ----------
    FLoRA, arXiv 2405.14739.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(3, 2, bias=False))
    >>> change = TuckerTensor(np.full((1, 1), 2.0), [np.ones((2, 1)), np.ones((3, 1))])
    >>> _ = attach_adapter(model, {"0.weight": change})
    >>> model[0].tucker_update["default"].delta().tolist()
    [[2.0, 2.0, 2.0], [2.0, 2.0, 2.0]]
    """
    check_option("attach_adapter", verify_base)
    adapter, table = as_adapter(source), sites(model)
    whole = {name: _whole_target(model, name, array) for name, array in _distinct(table, adapter.whole).items()}
    with all_or_nothing(model):
        plans = [plan_of(adapter, name, table, dtype, dropout, verify_base) for name in adapter]
        twice = {site.name for site in (p.site for p in plans)}
        if len(twice) < len(plans):
            raise ValueError("attach_adapter: two entries of the adapter are for one tied weight; keep one of them")
        share_factors({name: plan.update for name, plan in zip(adapter, plans)}, adapter.stacks)
        if verify_base != "ignore":
            check_samples(adapter, table, verify_base)
        report = install(model, plans, adapter_name, path, freeze_model, tuple(whole))
        for owner, local, value in whole.values():
            replace_whole(owner, local, value, adapter_name)
    return report


def as_adapter(source: Any) -> Adapter:
    """Return an adapter from its directory, from a mapping of Tucker tensors, or as it is."""
    if isinstance(source, Adapter):
        return source
    return Adapter(dict(source)) if isinstance(source, Mapping) else ft.load_adapter(source)


def plan_of(
    adapter: Adapter,
    name: str,
    table: Mapping[str, Site],
    dtype: torch.dtype | None = None,
    dropout: float | None = None,
    verify_base: VerifyBase = "warn",
) -> Plan:
    """Build the update of one entry of an adapter."""
    site = table.get(name)
    if site is None:
        raise ValueError(f"attach_adapter: the model has no parameter {name!r}{near(name, table)}")
    weight = adaptable(f"attach_adapter: {name}", site.holders[0].module, site.holders[0].parameter, values=False)
    if tuple(weight.shape) != adapter.shapes[name]:
        raise ValueError(
            f"attach_adapter: {name!r} is of shape {tuple(weight.shape)} in the model and {adapter.shapes[name]} in "
            "the adapter; pass the adapter of this model"
        )
    if verify_base != "ignore":
        check_layer(adapter, name, site)
    for holder in site.holders:
        if holder.places[0].parent is None:
            raise ValueError(f"attach_adapter: {name!r} belongs to the model itself; put it into an nn.Sequential")
    trained = _DTYPE_NAMES.get(_hint(adapter, "adapter_dtypes", name, ""))
    chosen = dtype or trained or default_dtype(weight.dtype)
    tucker = adapter[name].map(lambda array: _converted(array, name, weight.device, chosen))
    start = None
    if _hint(adapter, "start_pattern", name, False):
        tucker, start = TuckerUpdate.split(tucker)
    chances = {key: _hint(adapter, f"{key}_pattern", name, 0.0) for key in DROPOUTS}
    chances |= {} if dropout is None else {"dropout": dropout}
    if not all(drops_input(h.module, h.parameter) for h in site.holders):
        chances["dropout"] = 0.0
    options: dict[str, Any] = {"arrangement": adapter.arrangements[name], "scale": adapter.scales[name], "start": start}
    if name in adapter.magnitudes:
        wide = torch.promote_types(chosen, torch.float32)
        magnitude = _converted(adapter.magnitudes[name], name, weight.device, wide)
        options |= {"magnitude": magnitude, "channels": adapter.channels[name]}
    update = TuckerUpdate(tucker, tuple(weight.shape), **options, **chances)
    return Plan(site, update, update.ranks)


def _hint(adapter: Adapter, key: str, name: str, default: Any) -> Any:
    """Look an entry of the config up that only this backend writes; of another type it does not count."""
    table = adapter.config.get(key)
    value = table.get(name, default) if isinstance(table, Mapping) else default
    return value if isinstance(value, type(default)) else default


def _converted(array: Any, name: str, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return an array of real numbers as a tensor of another type, which must hold them."""
    tensor = as_torch(array, name)
    if not tensor.is_floating_point():
        raise ValueError(f"attach_adapter: {name!r} is of type {tensor.dtype}; cores and factors are real floats")
    return _cast(tensor, name, device, dtype)


def _cast(tensor: Tensor, name: str, device: torch.device, dtype: torch.dtype) -> Tensor:
    result = tensor.to(device=device, dtype=dtype)
    if dtype.is_floating_point and not bool(torch.isfinite(result).all()):
        largest = float(tensor.abs().max())
        raise ValueError(
            f"attach_adapter: {name!r} has entries up to {largest:.3g}, which {dtype} does not hold; pass a wider "
            "dtype, or a model of a wider type"
        )
    return result


def as_torch(array: Any, name: str) -> Tensor:
    """Return a copy of an array of any library as a tensor; what is complex or not finite is refused."""
    if isinstance(array, Tensor):
        tensor = array.detach().clone()
    else:
        values = np.asarray(array)
        # torch knows no bfloat16 of NumPy's, and float32 holds all its values.
        tensor = torch.from_numpy(np.array(values.astype(np.float32) if values.dtype.name == "bfloat16" else values))
    if tensor.is_complex():
        raise ValueError(f"attach_adapter: {name!r} is of type {tensor.dtype}; an adapter holds real numbers")
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"attach_adapter: {name!r} has NaN or infinite entries; the adapter is damaged")
    return tensor


def _distinct(table: Mapping[str, Site], whole: Mapping[str, Any]) -> dict[str, Any]:
    """Keep one name of each tied parameter: replaced twice, its own value would be lost."""
    kept: dict[str, Any] = {}
    first: dict[str, str] = {}
    for name, array in whole.items():
        known = first.setdefault(table[name].name, name) if name in table else name
        if known == name:
            kept[name] = array
        elif not torch.equal(as_torch(kept[known], known), as_torch(array, name)):
            raise ValueError(
                f"attach_adapter: {known!r} and {name!r} are one tied tensor of the model, and the adapter has two "
                "values for it; keep one of them"
            )
    return kept


def _whole_target(model: nn.Module, name: str, array: Any) -> tuple[nn.Module, str, Tensor]:
    """Find the parameter or buffer that a stored tensor replaces, and bring the value to its type and device."""
    known: dict[str, tuple[nn.Module, str, Tensor]] = {}
    for place in places(model):
        named = [*place.module.named_parameters(recurse=False), *place.module.named_buffers(recurse=False)]
        for local, tensor in named:
            known[f"{place.name}.{local}" if place.name else local] = (place.module, local, tensor)
    if name not in known:
        raise ValueError(f"attach_adapter: the model has no tensor {name!r}{near(name, known)}")
    owner, local, current = known[name]
    if current.is_meta:
        raise ValueError(f"attach_adapter: {name!r} is on the meta device and has no values; load the model first")
    value = as_torch(array, name)
    if value.shape != current.shape:
        raise ValueError(
            f"attach_adapter: {name!r} is of shape {tuple(current.shape)} in the model and {tuple(value.shape)} in "
            "the adapter; pass the adapter of this model"
        )
    taken = [dict(p.module.named_parameters(recurse=False)).get(other) for p, other, _ in whole_of(model)]
    if local in owner.__dict__.get(WHOLE, {}) or any(parameter is current for parameter in taken):
        raise ValueError(f"attach_adapter: {name!r} was replaced by another adapter already; detach that one first")
    return owner, local, _cast(value, name, current.device, current.dtype)


def save_adapter(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    adapter_name: str | None = None,
    base_model_name_or_path: str | None = None,
    max_shard_size: int | None = None,
    overwrite: bool = False,
) -> FilePath:
    """Write one adapter of a model as an adapter directory, whole or not at all.

    `load_adapter` restores it bit for bit. A tied weight is stored once, under its first name; so are factors that
    layers share, as a stack with the layers' cores side by side; a ``"principal"``
    update as the difference of its two tensors, of twice the ranks, which any reader can merge.

    Where the parameters are spread over processes (``fully_shard``), all of them must call this, and the first writes
    the file; it is the one that a single process would have written.

    Parameters
    ----------
    model : nn.Module
        A model with adapters.
    path : path
        The directory to write.
    adapter_name : str, optional
        The adapter; needed where there are several. The name is not stored.
    base_model_name_or_path : str, optional
        A note in the config of the model that the adapter is for.
    max_shard_size : int, optional
        The most bytes of tensors in a file; more are split into `adapter_model-00001-of-0000N.safetensors`, … with an
        index, as Hugging Face does for models. One file by default: PEFT itself reads no adapter in several.
    overwrite : bool
        Whether an adapter directory that exists is replaced.

    Returns
    -------
    Path
        The directory.

    Raises
    ------
    ValueError
        If there is no such adapter, or several and none was named, a number is not finite, or ``max_shard_size`` is
        below 1.
    FileExistsError, OSError
        As for `flora_tensor.save_adapter`.

    References
    ----------
    The format is described at the head of `flora_tensor.adapter_file`.

    Examples
    --------
    >>> import tempfile, pathlib
    >>> from flora_torch import attach
    >>> model = nn.Sequential(nn.Linear(8, 8))
    >>> _ = attach(model, ranks=2)
    >>> directory = save_adapter(model, pathlib.Path(tempfile.mkdtemp()) / "adapter")
    >>> ft.load_adapter(directory)
    Adapter(1 weight, 0 tensors whole, n_parameters=36)
    """
    adapter = adapter_of(model, adapter_name, "save_adapter")
    note = {"base_model_name_or_path": base_model_name_or_path}
    adapter = replace(adapter, config={**adapter.config, **note})
    updates = updates_by_weight(model, _one_adapter(model, adapter_name, "save_adapter"))
    if any(is_sharded(p) for update in updates.values() for p in update.parameters()) and not is_first_process():
        return FilePath(path)
    return ft.save_adapter(path, adapter, max_shard_size=max_shard_size, overwrite=overwrite)


def adapter_of(model: nn.Module, adapter_name: str | None, where: str) -> Adapter:
    """Return one adapter of a model as its file holds it; the only one, where none is named."""
    name = _one_adapter(model, adapter_name, where)
    updates = updates_by_weight(model, name)
    whole = {
        f"{place.name}.{local}" if place.name else local: _whole_value(place.module, local, note)
        for place, local, note in whole_of(model)
        if note.adapter_name == name
    }
    dtypes = {weight: update.core.dtype for weight, update in updates.items()}
    config: dict[str, Any] = {
        "adapter_dtypes": {weight: str(dtype).removeprefix("torch.") for weight, dtype in dtypes.items()},
        "start_pattern": {weight: True for weight, update in updates.items() if update.start is not None},
    }
    for key in DROPOUTS:
        chances = {weight: getattr(update, key) for weight, update in updates.items()}
        config[f"{key}_pattern"] = {weight: chance for weight, chance in chances.items() if chance}
    config |= describe_bases(sites(model), updates)
    magnitudes = {weight: u.magnitude for weight, u in updates.items() if u.magnitude is not None}
    stored = {weight: dtype_codes[dtype] for weight, dtype in dtypes.items() if dtype in dtype_codes}
    stored |= {weight: dtype_codes[value.dtype] for weight, value in whole.items() if value.dtype in dtype_codes}
    tensors = {weight: update.exported().map(_as_numpy) for weight, update in updates.items()}
    stacks = joined_stacks(updates, tensors)
    stacked = {member for stack in stacks.values() for member in stack.members}
    return Adapter(
        {weight: tensor for weight, tensor in tensors.items() if weight not in stacked},
        {weight: update.arrangement for weight, update in updates.items()},
        {weight: update.scale for weight, update in updates.items()},
        {weight: update.shape for weight, update in updates.items()},
        {weight: _as_numpy(value) for weight, value in whole.items()},
        config,
        stored,
        magnitudes={weight: _as_numpy(magnitude) for weight, magnitude in magnitudes.items()},
        channels={weight: updates[weight].channels for weight in magnitudes},
        stacks=stacks,
    )


def _one_adapter(model: nn.Module, adapter_name: str | None, where: str) -> str:
    layers = layers_of(model, where)
    known = dict.fromkeys([name for layer in layers for name in layer.tucker_update])
    known |= dict.fromkeys([note.adapter_name for _, _, note in whole_of(model)])
    if adapter_name is None and len(known) > 1:
        raise ValueError(f"{where}: the model has the adapters {', '.join(known)}; pass adapter_name")
    name = next(iter(known)) if adapter_name is None else adapter_name
    check_known(model, where, [name])
    return name


def _whole_value(owner: nn.Module, local: str, note: Whole) -> Tensor:
    return current_value(owner, local) if note.active else note.other


def _as_numpy(tensor: Tensor) -> Any:
    tensor = gathered(tensor.detach()).cpu()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).contiguous().numpy()


def load_adapter(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    adapter_name: str = "default",
    freeze_model: bool = True,
    strict: bool = True,
    verify_base: VerifyBase = "warn",
) -> AttachReport:
    """Read an adapter directory into a model: attach it, or fill the adapter of this name that is there already.

    What `save_adapter` wrote comes back bit for bit: every tensor, type, scale, arrangement, start and dropout. A
    filled adapter keeps its parameters, so that an optimizer goes on with them.

    Parameters
    ----------
    model : nn.Module
        The model that the adapter was made for.
    path : path
        The directory.
    adapter_name : str
        The adapter's name in the model.
    freeze_model : bool
        As for `attach`.
    strict : bool
        Whether a key of the tensor file that is unknown, or one that the config promises and the file lacks, is an
        error. With ``strict=False`` the report lists both, and incomplete weights are left out.
    verify_base : {"warn", "error", "ignore"}
        As for `attach_adapter`.

    Returns
    -------
    AttachReport
        What the model has now.

    Raises
    ------
    ValueError
        If the directory is no adapter, does not fit the model, or does not fit the adapter that is there. Nothing is
        changed then.
    OSError
        If a file cannot be read.

    Warns
    -----
    FloraWarning
        If the adapter was made for other weights, or is of a newer minor format.

    References
    ----------
    The format is described at the head of `flora_tensor.adapter_file`.

    Examples
    --------
    >>> import copy, tempfile, pathlib
    >>> from flora_torch import attach
    >>> model = nn.Sequential(nn.Linear(8, 8))
    >>> other, _ = copy.deepcopy(model), attach(model, ranks=2, scale=3.0)
    >>> directory = save_adapter(model, pathlib.Path(tempfile.mkdtemp()) / "adapter")
    >>> load_adapter(other, directory).layers[0].ranks
    (2, 2)
    >>> other[0].tucker_update["default"].scale
    3.0
    """
    check_option("load_adapter", verify_base)
    adapter = ft.load_adapter(path, strict=strict)
    keys = {"missing_keys": adapter.missing_keys, "unexpected_keys": adapter.unexpected_keys}
    present = updates_by_weight(model, adapter_name)
    if not present and all(note.adapter_name != adapter_name for _, _, note in whole_of(model)):
        report = attach_adapter(
            model, adapter, adapter_name=adapter_name, freeze_model=freeze_model, verify_base=verify_base
        )
        return replace(report, **keys)
    return replace(_filled(model, adapter, adapter_name, present, verify_base), **keys)


def _filled(
    model: nn.Module, adapter: Adapter, adapter_name: str, present: Mapping[str, TuckerUpdate], verify_base: VerifyBase
) -> AttachReport:
    """Fill an adapter that the model has with another one of the same form, everything checked before."""
    refuse_merged("load_adapter", layers_of(model, "load_adapter"))
    if differing := set(present) ^ set(adapter):
        raise ValueError(
            f"load_adapter: {min(differing)!r} is in only one of the file and the model's adapter {adapter_name!r}; "
            "load under another adapter_name"
        )
    table = sites(model)
    plans = [plan_of(adapter, name, table, verify_base=verify_base) for name in adapter]
    distinct = _distinct(table, adapter.whole)
    whole = {name: _whole_again(model, name, array, adapter_name) for name, array in distinct.items()}
    for name, plan in zip(adapter, plans):
        _check_same_form(name, present[name], plan.update)
    check_shared("load_adapter", present, {name: plan.update for name, plan in zip(adapter, plans)})
    if verify_base != "ignore":
        check_samples(adapter, table, verify_base)
    for name, plan in zip(adapter, plans):
        _fill(present[name], plan.update)
    for owner, local, value, is_new in whole.values():
        if is_new:
            replace_whole(owner, local, value, adapter_name)
        elif (note := owner.__dict__[WHOLE][local]).active:
            swap(owner, local, value)
        else:
            note.other = value.to(note.other)
    layers = layers_by_weight(model)
    # What the plans hold was copied into the parameters that are there, which layers may share.
    plans = [replace(plan, update=present[name]) for name, plan in zip(adapter, plans)]
    counted: set[int] = set()
    reports = tuple(report_of(plan, layers[plan.site.name], counted) for plan in plans)
    return AttachReport(adapter_name, reports, n_model_parameters(model), tuple(whole))


def _fill(there: TuckerUpdate, given: TuckerUpdate) -> None:
    """Give an update the tensors and settings of another of the same form; the parameters stay the same objects."""
    if not any(is_sharded(p) for p in there.parameters()):
        there.load_state_dict(given.state_dict())
        return
    tensors = dict(there.named_parameters()) | dict(there.named_buffers())
    for name, value in [*given.named_parameters(), *given.named_buffers()]:
        assign_(tensors[name], value.detach())
    there.set_extra_state(given.get_extra_state())


def _check_same_form(name: str, there: TuckerUpdate, given: TuckerUpdate) -> None:
    mine, theirs = (
        (
            [None if u is None else tuple(u.shape) for u in (update.core, *update.factors)],
            str(update.core.dtype),
            update.start is not None,
            None if update.magnitude is None else tuple(update.magnitude.shape),
        )
        for update in (there, given)
    )
    if mine != theirs:
        raise ValueError(
            f"load_adapter: {name!r} has core, factors, type, start and magnitude {mine} in the model and {theirs} in "
            "the file; detach the adapter first, or load under another adapter_name"
        )


def _whole_again(model: nn.Module, name: str, array: Any, adapter_name: str) -> tuple[nn.Module, str, Tensor, bool]:
    """Find the tensor that a stored one replaces; one that this adapter replaced before is only given its new value."""
    for place, local, note in whole_of(model):
        if note.adapter_name == adapter_name and name == (f"{place.name}.{local}" if place.name else local):
            value, current = as_torch(array, name), current_value(place.module, local)
            if value.shape != current.shape:
                raise ValueError(f"load_adapter: {name!r} is of shape {tuple(current.shape)}, not {tuple(value.shape)}")
            return place.module, local, value, False
    return (*_whole_target(model, name, array), True)
