"""Adapters on whole models: attach, detach, merge, disable, save and load.

Wrapping is all or nothing: everything is built and checked before the first module is replaced. Tied weights are one
weight: all modules that hold it are wrapped and share one update. What a file names is looked up in a table of the
model's own names and nowhere else.
"""

import os
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import flora_tensor as ft
from flora_tensor import Arrangement, TuckerTensor
from flora_tensor.adapter_file import Adapter
from flora_torch.functional import Path
from flora_torch.initialize import Ranks, default_dtype, preset_scale, resolve_ranks, start_update
from flora_torch.layers import FROZEN, FloraLayer, FloraParameter, adaptable, drops_input, freeze, thaw, wrapper_for
from flora_torch.selection import Pattern, PerName, Place, Site, near, places, select, sites
from flora_torch.update import TuckerUpdate

__all__ = [
    "AttachReport",
    "LayerReport",
    "activate",
    "adapter_parameters",
    "attach",
    "attach_adapter",
    "detach",
    "disabled",
    "load_adapter",
    "merge",
    "save_adapter",
]

_WHOLE = "_flora_whole"
_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_DTYPE_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in _DTYPES}


@dataclass(frozen=True)
class LayerReport:
    """What `attach` did to one weight.

    Parameters
    ----------
    name : str
        The weight's name.
    kind : str
        The layer that wraps its module.
    shape : tuple of int
        Its shape.
    pattern : str
        The arrangement.
    asked, ranks : tuple of (int or None)
        The ranks asked for and those given; they differ where a rank was lowered to what is feasible.
    n_parameters : int
        How many numbers are trained.
    tied : tuple of str
        The weight's other names, which the update serves too.

    References
    ----------
    FLoRA, arXiv 2405.14739, section 3, for what ranks and parameters count.

    Examples
    --------
    >>> report = attach(nn.Sequential(nn.Linear(8, 3)), ranks=4)
    >>> report.layers[0].asked, report.layers[0].ranks
    ((4, 4), (3, 3))
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    pattern: str
    asked: tuple[int | None, ...]
    ranks: tuple[int, ...]
    n_parameters: int
    tied: tuple[str, ...] = ()

    @property
    def clamped(self) -> bool:
        """Whether a rank was lowered."""
        return any(a is not None and a != r for a, r in zip(self.asked, self.ranks))


@dataclass(frozen=True)
class AttachReport:
    """What `attach` did; its text is a table.

    Parameters
    ----------
    adapter_name : str
        The adapter.
    layers : tuple of LayerReport
        One entry a weight.
    n_model_parameters : int
        How many parameters the model has without the adapter.
    whole : tuple of str
        Tensors that were replaced by a stored value.

    References
    ----------
    FLoRA, arXiv 2405.14739, section 3, for what ranks and parameters count.

    Examples
    --------
    >>> report = attach(nn.Sequential(nn.Linear(8, 8)), ranks=2)
    >>> report.n_parameters, round(report.share, 3)
    (36, 0.5)
    >>> print(report)
    weight    kind         shape  ranks  parameters
    0.weight  FloraLinear  8×8    2×2            36
    adapter 'default': 36 parameters on 1 weight, 50.0 % of the model's 72
    """

    adapter_name: str
    layers: tuple[LayerReport, ...]
    n_model_parameters: int
    whole: tuple[str, ...] = ()

    @property
    def n_parameters(self) -> int:
        """How many numbers the adapter trains."""
        return sum(layer.n_parameters for layer in self.layers)

    @property
    def share(self) -> float:
        """`n_parameters` as a part of the model's own parameters."""
        return self.n_parameters / max(1, self.n_model_parameters)

    def __str__(self) -> str:
        rows = [("weight", "kind", "shape", "ranks", "parameters")]
        for layer in self.layers:
            ranks = "×".join(map(str, layer.ranks))
            asked = "×".join("whole" if r is None else str(r) for r in layer.asked)
            pattern = "" if Arrangement(layer.pattern).is_native else f" as {layer.pattern}"
            rows.append(
                (
                    layer.name + "".join(f" = {name}" for name in layer.tied),
                    layer.kind,
                    "×".join(map(str, layer.shape)) + pattern,
                    f"{ranks} (asked {asked})" if layer.clamped else ranks,
                    f"{layer.n_parameters:,}",
                )
            )
        widths = [max(len(row[k]) for row in rows) for k in range(5)]
        lines = ["  ".join([*(c.ljust(w) for c, w in zip(r[:4], widths)), r[4].rjust(widths[4])]) for r in rows]
        lines += [f"whole: {name}" for name in self.whole]
        weights = f"{len(self.layers)} weight{'' if len(self.layers) == 1 else 's'}"
        return "\n".join(
            [
                *lines,
                f"adapter {self.adapter_name!r}: {self.n_parameters:,} parameters on {weights}, "
                f"{self.share:.1%} of the model's {self.n_model_parameters:,}".replace("%", " %"),
            ]
        )


@dataclass
class _Whole:
    """A tensor that an adapter replaced: the value that is not in the model now, and which one that is."""

    adapter_name: str
    other: Tensor
    active: bool = True


def attach(
    model: nn.Module,
    *,
    ranks: Ranks | Mapping[Any, Ranks],
    target_modules: "Pattern | Sequence[Pattern] | None" = None,
    exclude_modules: "Pattern | Sequence[Pattern] | None" = None,
    target_parameters: "Pattern | Sequence[Pattern] | None" = None,
    scale: float | Mapping[Any, float] = 1.0,
    alpha: float | None = None,
    dropout: float = 0.0,
    init: str = "orthonormal",
    init_tensors: Mapping[str, Tensor] | None = None,
    adapter_name: str = "default",
    arrangement: Arrangement | str | Mapping[Any, Arrangement | str] | None = None,
    dtype: torch.dtype | None = None,
    path: Path = "auto",
    freeze_model: bool = True,
    generator: torch.Generator | None = None,
) -> AttachReport:
    """Wrap layers of a model, in place, so that they train a Tucker tensor beside their frozen weight.

    The model's output does not change: every start but ``"from_delta"`` is exactly zero. Nothing is changed if
    anything is refused. A weight that several modules hold (a shared module, or tied weights such as embedding and
    output layer) gets one update, which all of them use.

    Parameters
    ----------
    model : nn.Module
        The model.
    ranks : int, float, sequence of (int, float or None), or mapping of pattern to these
        One rank for all modes, a fraction of each mode's size, or one a mode (``None``: left whole); lowered to what is
        feasible, and reported. A mapping gives them by name, the first pattern that matches counting.
    target_modules, exclude_modules : pattern or sequence of patterns, optional
        Names, globs, regular expressions (``"re:…"``), types or predicates ``(name, module) -> bool``; by default every
        linear, convolutional and embedding layer. See `flora_torch.selection.matches`.
    target_parameters : pattern or sequence of patterns, optional
        Parameters by their own names, such as ``"self_attn.in_proj_weight"``.
    scale : float, or mapping of pattern to float
        s; 1 for weights that no pattern means.
    alpha : float, optional
        α of the published codes, from which s follows by `flora_torch.initialize.preset_scale`; in the place of
        ``scale``.
    dropout : float
        The chance that an entry of an update's input is zeroed in training. Weights adapted by `FloraParameter` have
        none.
    init : str
        ``"orthonormal"``, ``"official"``, ``"loralib"``, ``"peft"``, ``"principal"``, ``"from_delta"``,
        ``"from_gradient"``.
    init_tensors : mapping of str to Tensor, optional
        By the weight's name, what ``"from_delta"`` and ``"from_gradient"`` decompose: tensors of the weights' own
        shapes.
    adapter_name : str
        The adapter's name; a weight can have several adapters, which add up.
    arrangement : Arrangement, str, or mapping of pattern to these, optional
        Which axes form a mode. A single one is used for the weights with as many axes as it has, and the others keep
        their own axes.
    dtype : torch.dtype, optional
        The update's type; by default float32 for 16-bit weights, else the weight's.
    path : {"auto", "factored", "dense"}
        How layers compute their output; see `flora_torch.layers`.
    freeze_model : bool
        Whether all of the model's own parameters stop requiring gradients, or only those of the wrapped layers.
    generator : torch.Generator, optional
        The source of random numbers, on the CPU.

    Returns
    -------
    AttachReport
        What was done to each weight.

    Raises
    ------
    ValueError
        If a pattern matches nothing (near names are listed), a weight cannot be adapted (meta device, integers, a
        vector, tied to an excluded one), it has an adapter of this name already, or an option does not fit.

    References
    ----------
    FLoRA, arXiv 2405.14739.

    Examples
    --------
    >>> model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=4))
    >>> report = attach(model, ranks={"0": (4, 3, 3, 3), "*": 0.5}, scale=4.0)
    >>> [(layer.name, layer.ranks) for layer in report.layers]
    [('0.weight', (4, 3, 3, 3)), ('2.weight', (8, 2, 2, 2))]
    """
    targets = select(model, target_modules, exclude_modules, target_parameters)
    options = _AttachOptions(ranks, scale, alpha, dropout, init, init_tensors or {}, arrangement, dtype, generator)
    with _all_or_nothing(model):
        plans = [options.plan(site) for site in targets]
        options.check_used(targets)
        return _install(model, plans, adapter_name, path, freeze_model)


@dataclass(frozen=True)
class _Plan:
    """An update that is ready to be installed, and the ranks that were asked for."""

    site: Site
    update: TuckerUpdate
    asked: tuple[int | None, ...]


class _AttachOptions:
    """The options of `attach`, looked up by weight."""

    def __init__(
        self,
        ranks: Any,
        scale: Any,
        alpha: float | None,
        dropout: float,
        init: str,
        tensors: Mapping[str, Tensor],
        arrangement: Any,
        dtype: torch.dtype | None,
        generator: torch.Generator | None,
    ) -> None:
        self.ranks: PerName[Any] = PerName("ranks", ranks)
        self.scale: PerName[float] = PerName("scale", scale, 1.0)
        self.arrangement: PerName[Any] = PerName("arrangement", arrangement, None)
        self.alpha, self.dropout, self.init, self.tensors = alpha, dropout, init, tensors
        self.dtype, self.generator = dtype, generator
        if alpha is not None and (isinstance(scale, Mapping) or scale != 1.0):
            raise TypeError("attach: got both scale and alpha; pass one of them")

    def plan(self, site: Site) -> _Plan:
        """Build the update of one weight."""
        holder = site.holders[0]
        weight = adaptable(f"attach: {site.name}", holder.module, holder.parameter)
        arranged = self._arrangement_of(site, weight)
        shape = arranged.shape(tuple(weight.shape))
        asked, given = resolve_ranks(self.ranks.of(site), shape, where=f"attach: {site.name}")
        scale = self.scale.of(site)
        if self.alpha is not None:
            scale = preset_scale(self.init, self.alpha, max((r for r in asked if r is not None), default=max(shape)))
        try:
            start = start_update(
                weight.detach(),
                given,
                init=self.init,
                arrangement=arranged,
                scale=scale,
                dtype=self.dtype,
                generator=self.generator,
                tensor=self._tensor_of(site),
            )
        except ValueError as error:
            raise ValueError(f"attach: {site.name}: {error}") from error
        # A parameter by name has no input that could be dropped.
        dropout = (
            0.0 if any(wrapper_for(h.module, h.parameter) is FloraParameter for h in site.holders) else self.dropout
        )
        update = TuckerUpdate(
            start.tucker,
            tuple(weight.shape),
            arrangement=arranged,
            scale=scale,
            dropout=dropout,
            start=start.start,
        )
        return _Plan(site, update, asked)

    def _arrangement_of(self, site: Site, weight: Tensor) -> Arrangement:
        given = self.arrangement.of(site)
        arranged = Arrangement(given) if isinstance(given, str) else given
        by_name = self.arrangement.table is not None
        if arranged is None or (arranged.n_axes != weight.dim() and not by_name):
            return Arrangement.native(weight.dim())
        try:
            arranged.shape(tuple(weight.shape))
        except ValueError as error:
            raise ValueError(f"attach: {site.name}: {error}") from error
        return arranged

    def _tensor_of(self, site: Site) -> Tensor | None:
        if self.init not in ("from_delta", "from_gradient"):
            return None
        return next((self.tensors[name] for name in site.names if name in self.tensors), None)

    def check_used(self, targets: list[Site]) -> None:
        """Refuse options that meant nothing."""
        names = [name for site in targets for name in site.names]
        modules = [holder_name.rpartition(".")[0] for holder_name in names]
        for option in (self.ranks, self.scale, self.arrangement):
            option.check_used([*modules, *names])
        single = self.arrangement.value if self.arrangement.table is None else None
        arranged = Arrangement(single) if isinstance(single, str) else single
        if arranged is not None and all(site.weight.dim() != arranged.n_axes for site in targets):
            raise ValueError(
                f"attach: arrangement {arranged.pattern!r} is for weights with {arranged.n_axes} axes, and no target "
                "has as many; pass another one, or none"
            )
        if self.tensors and self.init not in ("from_delta", "from_gradient"):
            raise ValueError(f"attach: init_tensors with init {self.init!r}; pass init='from_delta' or 'from_gradient'")
        for name in self.tensors:
            if name not in names:
                raise ValueError(f"attach: init_tensors has {name!r}, which is no target{near(name, names)}")


@contextmanager
def _all_or_nothing(model: nn.Module) -> Generator[None, None, None]:
    """Put gradients' flags back as they were if the body fails: wrapping freezes bases before everything is checked."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    notes = [(m, m.__dict__.get(FROZEN)) for m in model.modules()]
    try:
        yield
    except BaseException:
        for parameter, flag in flags:
            parameter.requires_grad = flag
        for module, note in notes:
            module.__dict__.pop(FROZEN, None)
            if note is not None:
                module.__dict__[FROZEN] = note
        raise


def _install(
    model: nn.Module, plans: list[_Plan], adapter_name: str, path: Path, freeze_model: bool, whole: Sequence[str] = ()
) -> AttachReport:
    """Wrap what is not wrapped yet, check every update against its layer, and only then put all of them in."""
    n_model = _n_model_parameters(model)
    wrappers: dict[int, FloraLayer] = {}
    steps: list[tuple[FloraLayer, TuckerUpdate, str]] = []
    doors: list[tuple[Place, FloraLayer]] = []
    for plan in plans:
        for holder in plan.site.holders:
            identity = id(holder.module)
            wrapper = wrappers.get(identity) or holder.wrapper
            if wrapper is None:
                wrapper = _wrap(holder.module, _parameters_of(holder.module, plans), path, plan.site.name)
                doors.extend((place, wrapper) for place in holder.places)
            wrappers[identity] = wrapper
            try:
                wrapper.check_update(adapter_name, plan.update, parameter=holder.parameter)
            except ValueError as error:
                raise ValueError(f"attach: {plan.site.name}: {error}") from error
            steps.append((wrapper, plan.update, holder.parameter))
    for wrapper, update, parameter in steps:
        wrapper.install(adapter_name, update, parameter=parameter)
    for place, wrapper in doors:
        assert place.parent is not None
        place.parent.add_module(place.key, wrapper)
    if freeze_model:
        freeze(model)
    reports = tuple(_report(plan, wrappers[id(plan.site.holders[0].module)]) for plan in plans)
    return AttachReport(adapter_name, reports, n_model, tuple(whole))


def _parameters_of(module: nn.Module, plans: list[_Plan]) -> list[str]:
    return [h.parameter for plan in plans for h in plan.site.holders if h.module is module]


def _wrap(module: nn.Module, parameters: list[str], path: Path, name: str) -> FloraLayer:
    """Make the layer for a module; one that knows the product only if its ``weight`` is all that is adapted."""
    kind = wrapper_for(module, parameters[0]) if len(set(parameters)) == 1 else FloraParameter
    try:
        return FloraParameter(module) if kind is FloraParameter else kind(module, path=path)
    except ValueError as error:
        raise ValueError(f"attach: {name}: {error}") from error


def _report(plan: _Plan, wrapper: FloraLayer) -> LayerReport:
    update, site = plan.update, plan.site
    return LayerReport(
        site.name,
        type(wrapper).__name__,
        update.shape,
        update.arrangement.pattern,
        plan.asked,
        update.ranks,
        update.n_parameters,
        tuple(name for name in site.names if name != site.name),
    )


def _n_model_parameters(model: nn.Module) -> int:
    return sum(site.weight.numel() for site in {id(s.weight): s for s in sites(model).values()}.values())


def attach_adapter(
    model: nn.Module,
    source: str | os.PathLike[str] | Mapping[str, TuckerTensor],
    *,
    adapter_name: str = "default",
    dtype: torch.dtype | None = None,
    dropout: float | None = None,
    path: Path = "auto",
    freeze_model: bool = True,
) -> AttachReport:
    """Put Tucker tensors that are known already on a model, as trainable updates.

    Tensors that the adapter stores whole (biases, norms) replace the model's, frozen; `detach` puts the model's own
    back. Nothing is changed if anything does not fit.

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

    Returns
    -------
    AttachReport
        What was done to each weight.

    Raises
    ------
    ValueError
        If the model has no such weight (near names are listed), a shape differs, an entry is not finite, or an adapter
        of this name is there already.

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
    adapter = _as_adapter(source)
    table = sites(model)
    whole = {name: _whole_target(model, name, array) for name, array in _distinct(table, adapter.whole).items()}
    with _all_or_nothing(model):
        plans = [_plan_of(adapter, name, table, dtype, dropout) for name in adapter]
        twice = {site.name for site in (p.site for p in plans)}
        if len(twice) < len(plans):
            raise ValueError("attach_adapter: two entries of the adapter are for one tied weight; keep one of them")
        report = _install(model, plans, adapter_name, path, freeze_model, tuple(whole))
        for owner, local, value in whole.values():
            _replace_whole(owner, local, value, adapter_name)
    return report


def _as_adapter(source: Any) -> Adapter:
    if isinstance(source, Adapter):
        return source
    return Adapter(dict(source)) if isinstance(source, Mapping) else ft.load_adapter(source)


def _plan_of(
    adapter: Adapter, name: str, table: Mapping[str, Site], dtype: torch.dtype | None, dropout: float | None
) -> _Plan:
    """Build the update of one entry of an adapter."""
    site = table.get(name)
    if site is None:
        raise ValueError(f"attach_adapter: the model has no parameter {name!r}{near(name, table)}")
    weight = adaptable(f"attach_adapter: {name}", site.holders[0].module, site.holders[0].parameter)
    if tuple(weight.shape) != adapter.shapes[name]:
        raise ValueError(
            f"attach_adapter: {name!r} is of shape {tuple(weight.shape)} in the model and {adapter.shapes[name]} in "
            "the adapter; pass the adapter of this model"
        )
    for holder in site.holders:
        if holder.places[0].parent is None:
            raise ValueError(f"attach_adapter: {name!r} belongs to the model itself; put it into an nn.Sequential")
    trained = _DTYPE_NAMES.get(_hint(adapter, "adapter_dtypes", name, ""))
    chosen = dtype or trained or default_dtype(weight.dtype)
    tucker = adapter[name].map(lambda array: _as_torch(array, name).to(device=weight.device, dtype=chosen))
    start = None
    if _hint(adapter, "start_pattern", name, False):
        tucker, start = TuckerUpdate.split(tucker)
    rate = _hint(adapter, "dropout_pattern", name, 0.0) if dropout is None else dropout
    if not all(drops_input(h.module, h.parameter) for h in site.holders):
        rate = 0.0
    arrangement, scale = adapter.arrangements[name], adapter.scales[name]
    update = TuckerUpdate(tucker, tuple(weight.shape), arrangement=arrangement, scale=scale, dropout=rate, start=start)
    return _Plan(site, update, update.ranks)


def _hint(adapter: Adapter, key: str, name: str, default: Any) -> Any:
    """Look an entry of the config up that only this backend writes; of another type it does not count."""
    table = adapter.config.get(key)
    value = table.get(name, default) if isinstance(table, Mapping) else default
    return value if isinstance(value, type(default)) else default


def _as_torch(array: Any, name: str) -> Tensor:
    if isinstance(array, Tensor):
        tensor = array.detach().clone()
    else:
        values = np.asarray(array)
        # torch knows no bfloat16 of NumPy's, and float32 holds all its values.
        tensor = torch.from_numpy(np.array(values.astype(np.float32) if values.dtype.name == "bfloat16" else values))
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
        elif not torch.equal(_as_torch(kept[known], known), _as_torch(array, name)):
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
    value = _as_torch(array, name)
    if value.shape != current.shape:
        raise ValueError(
            f"attach_adapter: {name!r} is of shape {tuple(current.shape)} in the model and {tuple(value.shape)} in "
            "the adapter; pass the adapter of this model"
        )
    taken = [dict(p.module.named_parameters(recurse=False)).get(other) for p, other, _ in _whole_of(model)]
    if local in owner.__dict__.get(_WHOLE, {}) or any(parameter is current for parameter in taken):
        raise ValueError(f"attach_adapter: {name!r} was replaced by another adapter already; detach that one first")
    return owner, local, value.to(device=current.device, dtype=current.dtype)


def _replace_whole(owner: nn.Module, local: str, value: Tensor, adapter_name: str) -> None:
    original = _swap(owner, local, value)
    owner.__dict__.setdefault(_WHOLE, {})[local] = _Whole(adapter_name, original)


def _current(owner: nn.Module, local: str) -> Tensor:
    own = dict(owner.named_parameters(recurse=False))
    return own[local].detach() if local in own else owner.get_buffer(local)


def _swap(owner: nn.Module, local: str, value: Tensor) -> Tensor:
    """Put a value in the place of a parameter's or buffer's, and return the old one; the parameter object stays."""
    own = dict(owner.named_parameters(recurse=False))
    if local in own:
        old = own[local].data
        own[local].data = value.to(old)
        return old
    old = owner.get_buffer(local)
    setattr(owner, local, value.to(old))
    return old


def _whole_of(model: nn.Module) -> list[tuple[Place, str, _Whole]]:
    """List the tensors that adapters replaced, a shared module once."""
    seen: dict[int, Place] = {}
    for place in places(model):
        seen.setdefault(id(place.module), place)
    return [(p, local, note) for p in seen.values() for local, note in p.module.__dict__.get(_WHOLE, {}).items()]


def _layers_of(model: nn.Module, where: str) -> list[FloraLayer]:
    layers = [module for module in model.modules() if isinstance(module, FloraLayer)]
    if not layers and not _whole_of(model):
        raise ValueError(f"{where}: the model has no adapter; call attach first")
    return layers


def _check_known(model: nn.Module, where: str, names: Sequence[str]) -> None:
    layers = _layers_of(model, where)
    known = dict.fromkeys([name for layer in layers for name in layer.tucker_update])
    known |= dict.fromkeys([note.adapter_name for _, _, note in _whole_of(model)])
    for name in names:
        if name not in known:
            raise ValueError(f"{where}: the model has no adapter {name!r}; it has {', '.join(known)}")


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
    _check_known(model, "adapter_parameters", [] if adapter_name is None else [adapter_name])
    found: dict[int, nn.Parameter] = {}
    for layer in _layers_of(model, "adapter_parameters"):
        for name in layer.tucker_update:
            if adapter_name in (None, name):
                for update in layer.updates(name).values():
                    found |= {id(p): p for p in update.parameters()}
    return list(found.values())


def activate(model: nn.Module, *adapter_names: str) -> None:
    """Choose the adapters that take part in the output; they add up. Without a name, none does.

    A tensor that an adapter replaced has the adapter's value while that adapter takes part, and the model's otherwise.

    Parameters
    ----------
    model : nn.Module
        A model with adapters.
    *adapter_names : str
        The adapters, in the order in which they are added.

    Raises
    ------
    ValueError
        If the model has no adapter of such a name.

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
    """
    _check_known(model, "activate", adapter_names)
    for layer in _layers_of(model, "activate"):
        layer.active_adapters = [name for name in adapter_names if name in layer.tucker_update]
    for place, local, note in _whole_of(model):
        if note.active != (note.adapter_name in adapter_names):
            note.other, note.active = _swap(place.module, local, note.other), not note.active


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
    layers = [layer for layer in _layers_of(model, "disabled") if layer.enabled]
    replaced = [(place.module, local, note) for place, local, note in _whole_of(model) if note.active]
    for layer in layers:
        layer.enabled = False
    for owner, local, note in replaced:
        note.other, note.active = _swap(owner, local, note.other), False
    try:
        yield model
    finally:
        for layer in layers:
            layer.enabled = True
        for owner, local, note in replaced:
            # The body may have detached or activated the adapter.
            if not note.active and owner.__dict__.get(_WHOLE, {}).get(local) is note:
                note.other, note.active = _swap(owner, local, note.other), True


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
    _check_known(model, "detach", [] if adapter_name is None else [adapter_name])
    for layer in _layers_of(model, "detach"):
        for name in list(layer.tucker_update):
            if adapter_name in (None, name):
                layer.remove_adapter(name)
    for place, local, note in _whole_of(model):
        if adapter_name in (None, note.adapter_name):
            if note.active:
                _swap(place.module, local, note.other)
            _forget(place.module, local)
    model = _unwrap(model, lambda layer: layer if len(layer.tucker_update) else layer.base_layer)
    if not any(isinstance(module, FloraLayer) for module in model.modules()) and not _whole_of(model):
        thaw(model)
    return model


def _forget(owner: nn.Module, local: str) -> None:
    notes = owner.__dict__[_WHOLE]
    del notes[local]
    if not notes:
        del owner.__dict__[_WHOLE]


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

    References
    ----------
    FLoRA, arXiv 2405.14739, equation 5.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(8, 8))
    >>> _ = attach(model, ranks=2, init="from_delta", init_tensors={"0.weight": torch.eye(8)})
    >>> type(merge(model)[0]).__name__
    'Linear'
    """
    for layer in _layers_of(model, "merge"):
        layer.merged()  # refuses what is not finite, before anything is replaced
    tied: dict[tuple[Any, ...], nn.Parameter] = {}

    def plain(layer: FloraLayer) -> nn.Module:
        result = layer.merged()
        for name in layer.parameter_names:
            # One weight with one set of updates becomes one parameter, wherever it stands.
            key = (id(getattr(layer.base_layer, name)), *(id(update) for update in _active(layer, name)))
            setattr(result, name, tied.setdefault(key, result.get_parameter(name)))
        return result

    for place, local, _ in _whole_of(model):
        _forget(place.module, local)
    model = _unwrap(model, plain)
    thaw(model)
    return model


def _active(layer: FloraLayer, parameter: str) -> list[TuckerUpdate]:
    found = [layer.updates(adapter).get(parameter) for adapter in layer.active_adapters]
    return [update for update in found if update is not None]


def save_adapter(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    adapter_name: str | None = None,
    base_model_name_or_path: str | None = None,
    overwrite: bool = False,
) -> FilePath:
    """Write one adapter of a model as an adapter directory, whole or not at all.

    `load_adapter` restores it bit for bit. A tied weight is stored once, under its first name; a ``"principal"``
    update as the difference of its two tensors, of twice the ranks, which any reader can merge.

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
    overwrite : bool
        Whether an adapter directory that exists is replaced.

    Returns
    -------
    Path
        The directory.

    Raises
    ------
    ValueError
        If there is no such adapter, or several and none was named, or a number is not finite.
    FileExistsError, OSError
        As for `flora_tensor.save_adapter`.

    References
    ----------
    The format is described at the head of `flora_tensor.adapter_file`.

    Examples
    --------
    >>> import tempfile, pathlib
    >>> model = nn.Sequential(nn.Linear(8, 8))
    >>> _ = attach(model, ranks=2)
    >>> directory = save_adapter(model, pathlib.Path(tempfile.mkdtemp()) / "adapter")
    >>> ft.load_adapter(directory)
    Adapter(1 weight, 0 tensors whole, n_parameters=36)
    """
    name = _one_adapter(model, adapter_name)
    updates = _updates_by_weight(model, name)
    whole = {
        f"{place.name}.{local}" if place.name else local: _whole_value(place.module, local, note)
        for place, local, note in _whole_of(model)
        if note.adapter_name == name
    }
    dtypes = {weight: update.core.dtype for weight, update in updates.items()}
    config: dict[str, Any] = {
        "base_model_name_or_path": base_model_name_or_path,
        "adapter_dtypes": {weight: str(dtype).removeprefix("torch.") for weight, dtype in dtypes.items()},
        "start_pattern": {weight: True for weight, update in updates.items() if update.start is not None},
        "dropout_pattern": {weight: update.dropout for weight, update in updates.items() if update.dropout},
    }
    stored = {weight: _DTYPES[dtype] for weight, dtype in dtypes.items() if dtype in _DTYPES}
    stored |= {weight: _DTYPES[value.dtype] for weight, value in whole.items() if value.dtype in _DTYPES}
    adapter = Adapter(
        {weight: update.exported().map(_as_numpy) for weight, update in updates.items()},
        {weight: update.arrangement for weight, update in updates.items()},
        {weight: update.scale for weight, update in updates.items()},
        {weight: update.shape for weight, update in updates.items()},
        {weight: _as_numpy(value) for weight, value in whole.items()},
        config,
        stored,
    )
    return ft.save_adapter(path, adapter, overwrite=overwrite)


def _one_adapter(model: nn.Module, adapter_name: str | None) -> str:
    layers = _layers_of(model, "save_adapter")
    known = dict.fromkeys([name for layer in layers for name in layer.tucker_update])
    known |= dict.fromkeys([note.adapter_name for _, _, note in _whole_of(model)])
    if adapter_name is None and len(known) > 1:
        raise ValueError(f"save_adapter: the model has the adapters {', '.join(known)}; pass adapter_name")
    name = next(iter(known)) if adapter_name is None else adapter_name
    _check_known(model, "save_adapter", [name])
    return name


def _updates_by_weight(model: nn.Module, adapter_name: str) -> dict[str, TuckerUpdate]:
    """Return an adapter's updates by the plain names of their weights; a shared one once, under its first name."""
    found: dict[int, tuple[str, TuckerUpdate]] = {}
    for place in places(model):
        if place.wrapper is not None:
            for parameter, update in place.wrapper.updates(adapter_name).items():
                name = f"{place.name}.{parameter}" if place.name else parameter
                found.setdefault(id(update), (name, update))
    return dict(found.values())


def _whole_value(owner: nn.Module, local: str, note: _Whole) -> Tensor:
    return _current(owner, local) if note.active else note.other


def _as_numpy(tensor: Tensor) -> Any:
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).contiguous().numpy()


def load_adapter(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    adapter_name: str = "default",
    freeze_model: bool = True,
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

    Returns
    -------
    AttachReport
        What the model has now.

    Raises
    ------
    ValueError
        If the directory is no adapter, does not fit the model, or does not fit the adapter that is there.
    OSError
        If a file cannot be read.

    References
    ----------
    The format is described at the head of `flora_tensor.adapter_file`.

    Examples
    --------
    >>> import tempfile, pathlib
    >>> model, copy = nn.Sequential(nn.Linear(8, 8)), nn.Sequential(nn.Linear(8, 8))
    >>> _ = attach(model, ranks=2, scale=3.0)
    >>> directory = save_adapter(model, pathlib.Path(tempfile.mkdtemp()) / "adapter")
    >>> load_adapter(copy, directory).layers[0].ranks
    (2, 2)
    >>> copy[0].tucker_update["default"].scale
    3.0
    """
    adapter = ft.load_adapter(path)
    present = _updates_by_weight(model, adapter_name)
    if not present and all(note.adapter_name != adapter_name for _, _, note in _whole_of(model)):
        return attach_adapter(model, adapter, adapter_name=adapter_name, freeze_model=freeze_model)
    if differing := set(present) ^ set(adapter):
        raise ValueError(
            f"load_adapter: {min(differing)!r} is in only one of the file and the model's adapter {adapter_name!r}; "
            "load under another adapter_name"
        )
    table = sites(model)
    plans = [_plan_of(adapter, name, table, None, None) for name in adapter]
    distinct = _distinct(table, adapter.whole)
    whole = {name: _whole_again(model, name, array, adapter_name) for name, array in distinct.items()}
    for name, plan in zip(adapter, plans):
        _check_same_form(name, present[name], plan.update)
    for name, plan in zip(adapter, plans):
        present[name].load_state_dict(plan.update.state_dict())
    for owner, local, value, is_new in whole.values():
        if is_new:
            _replace_whole(owner, local, value, adapter_name)
        elif (note := owner.__dict__[_WHOLE][local]).active:
            _swap(owner, local, value)
        else:
            note.other = value.to(note.other)
    layers = _layers_by_weight(model)
    reports = tuple(_report(plan, layers[plan.site.name]) for plan in plans)
    return AttachReport(adapter_name, reports, _n_model_parameters(model), tuple(whole))


def _layers_by_weight(model: nn.Module) -> dict[str, FloraLayer]:
    found: dict[str, FloraLayer] = {}
    for place in places(model):
        if place.wrapper is not None:
            for parameter in place.wrapper.parameter_names:
                found[f"{place.name}.{parameter}" if place.name else parameter] = place.wrapper
    return found


def _check_same_form(name: str, there: TuckerUpdate, given: TuckerUpdate) -> None:
    mine, theirs = (
        (
            [None if u is None else tuple(u.shape) for u in (update.core, *update.factors)],
            str(update.core.dtype),
            update.start is not None,
        )
        for update in (there, given)
    )
    if mine != theirs:
        raise ValueError(
            f"load_adapter: {name!r} has core, factors, type and start {mine} in the model and {theirs} in the file; "
            "detach the adapter first, or load under another adapter_name"
        )


def _whole_again(model: nn.Module, name: str, array: Any, adapter_name: str) -> tuple[nn.Module, str, Tensor, bool]:
    """Find the tensor that a stored one replaces; one that this adapter replaced before is only given its new value."""
    for place, local, note in _whole_of(model):
        if note.adapter_name == adapter_name and name == (f"{place.name}.{local}" if place.name else local):
            value, current = _as_torch(array, name), _current(place.module, local)
            if value.shape != current.shape:
                raise ValueError(f"load_adapter: {name!r} is of shape {tuple(current.shape)}, not {tuple(value.shape)}")
            return place.module, local, value, False
    return (*_whole_target(model, name, array), True)
