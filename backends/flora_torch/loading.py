"""Adapters from tensors and files on a model; the way back is `flora_torch.saving`.

What a file names is looked up in a table of the model's own names and nowhere else.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor, nn

import flora_tensor as ft
from flora_tensor import TuckerTensor
from flora_tensor._base_notes import VerifyBase, check_verify_base
from flora_tensor._typing import PathLike
from flora_tensor.adapter import Adapter
from flora_torch._sharding import as_parts, assign_, is_sharded
from flora_torch.attachment import AttachReport, Plan, install, n_model_parameters, report_of
from flora_torch.base_check import check_layer, check_samples, dtype_codes
from flora_torch.base_weight import adaptable
from flora_torch.chain import Memory
from flora_torch.freezing import all_or_nothing
from flora_torch.functional import Path
from flora_torch.in_place import refuse_merged
from flora_torch.initialize import default_dtype
from flora_torch.inventory import (
    current_value,
    layers_by_weight,
    layers_of,
    replace_whole,
    tensors_by_name,
    updates_by_weight,
    whole_of,
)
from flora_torch.kinds import drops_input
from flora_torch.model_weights import Site, sites
from flora_torch.patterns import near
from flora_torch.stacks import check_shared, share_factors
from flora_torch.update import DROPOUTS, TuckerUpdate

__all__ = ["as_adapter", "as_torch", "attach_adapter", "load_adapter", "noted_settings", "plan_of"]

_DTYPE_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in dtype_codes}


def attach_adapter(
    model: nn.Module,
    source: PathLike | Mapping[str, TuckerTensor],
    *,
    adapter_name: str = "default",
    dtype: torch.dtype | None = None,
    dropout: float | None = None,
    path: Path = "auto",
    memory: Memory = "normal",
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
    path, memory, freeze_model
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
    check_verify_base("attach_adapter", verify_base)
    as_parts("attach_adapter", model)
    given = as_adapter(source)
    settings: _Settings = {"dtype": dtype, "dropout": dropout, "verify_base": verify_base}
    return _attached(
        "attach_adapter", model, given, adapter_name, settings, path=path, memory=memory, freeze_model=freeze_model
    )


class _Settings(TypedDict):
    """What is asked for beside what the adapter says of itself."""

    dtype: torch.dtype | None
    dropout: float | None
    verify_base: VerifyBase


def _attached(
    where: str,
    model: nn.Module,
    adapter: Adapter,
    adapter_name: str,
    settings: _Settings,
    *,
    path: Path = "auto",
    memory: Memory,
    freeze_model: bool,
) -> AttachReport:
    table = sites(model)
    whole = _whole_targets(where, model, _distinct(where, table, adapter.whole))
    with all_or_nothing(model):
        plans = [plan_of(where, adapter, name, table, **settings) for name in adapter]
        if len({plan.site.name for plan in plans}) < len(plans):
            raise ValueError(f"{where}: two entries of the adapter are for one tied weight; keep one of them")
        share_factors({name: plan.update for name, plan in zip(adapter, plans)}, adapter.stacks)
        if settings["verify_base"] != "ignore":
            check_samples(where, adapter, table, settings["verify_base"])
        report = install(
            where, model, plans, adapter_name, path=path, memory=memory, freeze_model=freeze_model, whole=tuple(whole)
        )
        for owner, local, value in whole.values():
            replace_whole(owner, local, value, adapter_name)
    return report


def as_adapter(source: Any) -> Adapter:
    """Return an adapter from its directory, from a mapping of Tucker tensors, or as it is."""
    if isinstance(source, Adapter):
        return source
    return Adapter(dict(source)) if isinstance(source, Mapping) else ft.load_adapter(source)


def _meant(name: str, table: Mapping[str, Site]) -> str:
    """Return an ending for an error message: the parameter under another prefix, or names that are near."""
    for other in table:
        if other.endswith("." + name):
            return f"; it has {other!r}: put the adapter on that part of the model, {other.removesuffix('.' + name)!r}"
        if name.endswith("." + other):
            prefix = name.removesuffix(other)
            around = f", such as nn.ModuleDict({{{prefix[:-1]!r}: model}})" if prefix[:-1].isidentifier() else ""
            return f"; it has {other!r}: pass the model around it{around}, or a mapping of names without {prefix!r}"
    return near(name, table)


def plan_of(
    where: str,
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
        raise ValueError(f"{where}: the model has no parameter {name!r}{_meant(name, table)}")
    weight = adaptable(f"{where}: {name}", site.holders[0].module, site.holders[0].parameter, values=False)
    if tuple(weight.shape) != adapter.shapes[name]:
        raise ValueError(
            f"{where}: {name!r} is of shape {tuple(weight.shape)} in the model and {adapter.shapes[name]} in "
            "the adapter; pass the adapter of this model"
        )
    if verify_base != "ignore":
        check_layer(where, adapter, name, site)
    for holder in site.holders:
        if holder.places[0].parent is None:
            raise ValueError(f"{where}: {name!r} belongs to the model itself; put it into an nn.Sequential")
    trained, chances = noted_settings(adapter.config, name, site)
    chosen = dtype or trained or default_dtype(weight.dtype)
    tucker = adapter[name].map(lambda array: _converted(where, array, name, weight.device, chosen))
    start = None
    if _hint(adapter.config, "start_pattern", name, False):
        tucker, start = TuckerUpdate.split(tucker)
    if dropout is not None and _drops_input(site):
        chances["dropout"] = dropout
    options: dict[str, Any] = {"arrangement": adapter.arrangements[name], "scale": adapter.scales[name], "start": start}
    if name in adapter.magnitudes:
        wide = torch.promote_types(chosen, torch.float32)
        magnitude = _converted(where, adapter.magnitudes[name], name, weight.device, wide)
        options |= {"magnitude": magnitude, "channels": adapter.channels[name]}
    update = TuckerUpdate(tucker, tuple(weight.shape), **options, **chances)
    return Plan(site, update, update.ranks)


def noted_settings(config: Mapping[str, Any], name: str, site: Site) -> tuple[torch.dtype | None, dict[str, Any]]:
    """Return what a config notes of an update for this backend: the type that it was trained in, and its dropouts."""
    chances = {key: _hint(config, f"{key}_pattern", name, 0.0) for key in DROPOUTS}
    if not _drops_input(site):
        chances["dropout"] = 0.0
    return _DTYPE_NAMES.get(_hint(config, "adapter_dtypes", name, "")), chances


def _drops_input(site: Site) -> bool:
    return all(drops_input(holder.module, holder.parameter) for holder in site.holders)


def _hint(config: Mapping[str, Any], key: str, name: str, default: Any) -> Any:
    """Look an entry of the config up that only this backend writes; of another type it does not count."""
    table = config.get(key)
    value = table.get(name, default) if isinstance(table, Mapping) else default
    return value if isinstance(value, type(default)) else default


def _converted(where: str, array: Any, name: str, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return an array of real numbers as a tensor of another type, which must hold them."""
    tensor = as_torch(where, array, name)
    if not tensor.is_floating_point():
        raise ValueError(f"{where}: {name!r} is of type {tensor.dtype}; cores and factors are real floats")
    return _cast(where, tensor, name, device, dtype)


def _cast(where: str, tensor: Tensor, name: str, device: torch.device, dtype: torch.dtype) -> Tensor:
    result = tensor.to(device=device, dtype=dtype)
    if dtype.is_floating_point and not bool(torch.isfinite(result).all()):
        largest = float(tensor.abs().max())
        raise ValueError(
            f"{where}: {name!r} has entries up to {largest:.3g}, which {dtype} does not hold; pass a wider "
            "dtype, or a model of a wider type"
        )
    return result


def as_torch(where: str, array: Any, name: str) -> Tensor:
    """Return a copy of an array of any library as a tensor; what is complex or not finite is refused."""
    if isinstance(array, Tensor):
        tensor = array.detach().clone()
    else:
        values = np.asarray(array)
        # torch knows no bfloat16 of NumPy's, and float32 holds all its values.
        tensor = torch.from_numpy(np.array(values.astype(np.float32) if values.dtype.name == "bfloat16" else values))
    if tensor.is_complex():
        raise ValueError(f"{where}: {name!r} is of type {tensor.dtype}; an adapter holds real numbers")
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"{where}: {name!r} has NaN or infinite entries; the adapter is damaged")
    return tensor


def _distinct(where: str, table: Mapping[str, Site], whole: Mapping[str, Any]) -> dict[str, Any]:
    """Keep one name of each tied parameter: replaced twice, its own value would be lost."""
    kept: dict[str, Any] = {}
    first: dict[str, str] = {}
    for name, array in whole.items():
        known = first.setdefault(table[name].name, name) if name in table else name
        if known == name:
            kept[name] = array
        elif not torch.equal(as_torch(where, kept[known], known), as_torch(where, array, name)):
            raise ValueError(
                f"{where}: {known!r} and {name!r} are one tied tensor of the model, and the adapter has two "
                "values for it; keep one of them"
            )
    return kept


def _whole_targets(where: str, model: nn.Module, arrays: Mapping[str, Any]) -> dict[str, tuple[nn.Module, str, Tensor]]:
    """Find the parameters and buffers that stored tensors replace, and bring the values to their types and devices."""
    known = tensors_by_name(model) if arrays else {}
    active = [(place.module, local) for place, local, note in whole_of(model) if note.active]
    taken = {id(getattr(owner, local)) for owner, local in active}
    found: dict[str, tuple[nn.Module, str, Tensor]] = {}
    for name, array in arrays.items():
        if name not in known:
            raise ValueError(f"{where}: the model has no tensor {name!r}{near(name, known)}")
        owner, local, current = known[name]
        if current.is_meta:
            raise ValueError(f"{where}: {name!r} is on the meta device and has no values; load the model first")
        value = as_torch(where, array, name)
        if value.shape != current.shape:
            raise ValueError(
                f"{where}: {name!r} is of shape {tuple(current.shape)} in the model and {tuple(value.shape)} in "
                "the adapter; pass the adapter of this model"
            )
        if id(current) in taken:
            raise ValueError(
                f"{where}: {name!r} was replaced by another adapter already; detach that one first, or switch it off "
                "with activate"
            )
        found[name] = (owner, local, _cast(where, value, name, current.device, current.dtype))
    return found


def load_adapter(
    model: nn.Module,
    path: PathLike,
    *,
    adapter_name: str = "default",
    dtype: torch.dtype | None = None,
    dropout: float | None = None,
    memory: Memory = "normal",
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
    dtype, dropout
        As for `attach_adapter`. An adapter that is filled must have this type, or that of the file.
    memory, freeze_model
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
    >>> from flora_torch import attach, save_adapter
    >>> model = nn.Sequential(nn.Linear(8, 8))
    >>> other, _ = copy.deepcopy(model), attach(model, ranks=2, scale=3.0)
    >>> directory = save_adapter(model, pathlib.Path(tempfile.mkdtemp()) / "adapter")
    >>> load_adapter(other, directory).layers[0].ranks
    (2, 2)
    >>> other[0].tucker_update["default"].scale
    3.0
    """
    check_verify_base("load_adapter", verify_base)
    as_parts("load_adapter", model)
    adapter = ft.load_adapter(path, strict=strict)
    keys = {"missing_keys": adapter.missing_keys, "unexpected_keys": adapter.unexpected_keys}
    settings: _Settings = {"dtype": dtype, "dropout": dropout, "verify_base": verify_base}
    present = updates_by_weight(model, adapter_name)
    if not present and all(note.adapter_name != adapter_name for _, _, note in whole_of(model)):
        report = _attached(
            "load_adapter", model, adapter, adapter_name, settings, memory=memory, freeze_model=freeze_model
        )
        return replace(report, **keys)
    return replace(_filled(model, adapter, adapter_name, present, settings), **keys)


def _filled(
    model: nn.Module, adapter: Adapter, adapter_name: str, present: Mapping[str, TuckerUpdate], settings: _Settings
) -> AttachReport:
    """Fill an adapter that the model has with another one of the same form, everything checked before."""
    refuse_merged("load_adapter", layers_of(model, "load_adapter"))
    if differing := set(present) ^ set(adapter):
        raise ValueError(
            f"load_adapter: {min(differing)!r} is in only one of the file and the model's adapter {adapter_name!r}; "
            "load under another adapter_name"
        )
    table = sites(model)
    plans = [plan_of("load_adapter", adapter, name, table, **settings) for name in adapter]
    distinct = _distinct("load_adapter", table, adapter.whole)
    first, again = _whole_again(model, distinct, adapter_name)
    for name, plan in zip(adapter, plans):
        _check_same_form(name, present[name], plan.update)
    check_shared("load_adapter", present, {name: plan.update for name, plan in zip(adapter, plans)})
    if settings["verify_base"] != "ignore":
        check_samples("load_adapter", adapter, table, settings["verify_base"])
    for name, plan in zip(adapter, plans):
        _fill(present[name], plan.update)
    for owner, local, value in (first | again).values():
        replace_whole(owner, local, value, adapter_name)
    layers = layers_by_weight(model)
    # What the plans hold was copied into the parameters that are there, which layers may share.
    plans = [replace(plan, update=present[name]) for name, plan in zip(adapter, plans)]
    counted: set[int] = set()
    reports = tuple(report_of(plan, layers[plan.site.name], counted) for plan in plans)
    return AttachReport(adapter_name, reports, n_model_parameters(model), tuple(distinct))


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
            "the file; pass its dtype if no more than that differs, detach the adapter first, or load under another "
            "adapter_name"
        )


def _whole_again(
    model: nn.Module, arrays: Mapping[str, Any], adapter_name: str
) -> tuple[dict[str, tuple[nn.Module, str, Tensor]], dict[str, tuple[nn.Module, str, Tensor]]]:
    """Find what stored tensors replace: for the first time, and where this adapter has replaced it before."""
    mine = {
        place.name_of(local): (place.module, local)
        for place, local, note in whole_of(model)
        if note.adapter_name == adapter_name
    }
    again: dict[str, tuple[nn.Module, str, Tensor]] = {}
    for name in (name for name in arrays if name in mine):
        owner, local = mine[name]
        value, current = as_torch("load_adapter", arrays[name], name), current_value(owner, local)
        if value.shape != current.shape:
            raise ValueError(f"load_adapter: {name!r} is of shape {tuple(current.shape)}, not {tuple(value.shape)}")
        again[name] = (owner, local, value)
    rest = {name: array for name, array in arrays.items() if name not in mine}
    return _whole_targets("load_adapter", model, rest), again
