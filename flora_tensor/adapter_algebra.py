"""Adapters rounded, added, subtracted and scaled as they are stored: without the base model and without dense tensors.

All work is done in float64 on cores and factors. The error that is reported is measured on what is stored.
"""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias
from warnings import warn

import numpy as np

from flora_tensor._arrays import to_numpy
from flora_tensor._checks import as_int, check_finite, check_fraction, check_tolerance, exactly_one
from flora_tensor._combining import Combination, Term, combine
from flora_tensor._errors import InputError
from flora_tensor._reporting import RowReport
from flora_tensor._safetensors import FLOATS, dtype_code, round_to
from flora_tensor._version import __version__
from flora_tensor._warnings import FloraWarning
from flora_tensor._whole import BaseLike, WholeTensors, widest_code
from flora_tensor.adapter import Adapter, check_scale
from flora_tensor.adapter_file import as_adapter, fitting_core
from flora_tensor.algebra import multi_mode_dot
from flora_tensor.allocation import allocate_ranks
from flora_tensor.arrangement import Arrangement
from flora_tensor.decomposition import tucker
from flora_tensor.report import format_table
from flora_tensor.spectra import Frontier, Spectrum, cheapest_spectrum
from flora_tensor.tucker_tensor import TuckerTensor, norm, orthogonalize

__all__ = ["AdapterFit", "AdapterRow", "add_adapters", "round_adapter", "scale_adapter", "subtract_adapters"]

PathLike: TypeAlias = str | os.PathLike[str]
AdapterLike: TypeAlias = PathLike | Mapping[str, TuckerTensor]
# Entries of a config that describe tensors of the adapter it came with, and no longer hold for a new one.
_OF_TENSORS = ("start_pattern", "adapter_dtypes", "dropout_pattern", "scale", "target_modules", "stacks")
# What rounding to the stored type may add to an error before a tolerance counts as missed.
_ROUNDING = 1e-5


@dataclass(frozen=True)
class AdapterRow:
    """What became of one weight's change.

    Attributes
    ----------
    name : str
        The weight, or the stack.
    shape : tuple of int
        Its shape.
    arrangement : str
        Which axes form a mode of what is stored.
    ranks : tuple of int
        The ranks stored; empty where nothing is.
    n_parameters, n_parameters_before : int
        Numbers stored, and those that went in (of all adapters that were added).
    relative_error : float
        ‖stored − exact‖ / ‖exact‖, measured on the stored bits; 0 for a change that is zero.
    norm : float
        ‖exact‖, the scale included.
    notes : tuple of str
        What else there is to say.
    """

    name: str
    shape: tuple[int, ...]
    arrangement: str
    ranks: tuple[int, ...]
    n_parameters: int
    n_parameters_before: int
    relative_error: float
    norm: float
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class AdapterFit(RowReport[AdapterRow]):
    """An adapter computed from others, and how near it is to the exact result.

    Attributes
    ----------
    adapter : Adapter
        The result, as `save_adapter` stores it.
    rows : tuple of AdapterRow
        A row for every weight, a stack counting as one.
    relative_error : float
        √(Σ ‖stored − exact‖² / Σ ‖exact‖²) over all weights, measured on the stored bits.
    lower_bound : float or None
        With a budget, no ranks of the truncated HOSVDs within it have a smaller error; else ``None``.
    """

    adapter: Adapter
    rows: tuple[AdapterRow, ...]
    relative_error: float
    lower_bound: float | None = None

    @property
    def n_parameters(self) -> int:
        """Numbers in all Tucker tensors together; tensors that are stored whole are not counted."""
        return sum(row.n_parameters for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values, ready for JSON."""
        return {
            "flora_tensor_version": __version__,
            "n_parameters": self.n_parameters,
            "n_parameters_before": sum(row.n_parameters_before for row in self.rows),
            "relative_error": self.relative_error,
            "lower_bound": self.lower_bound,
            "whole": sorted(self.adapter.whole),
            "tensors": [
                {key: list(value) if isinstance(value, tuple) else value for key, value in vars(row).items()}
                for row in self.rows
            ],
        }

    def to_table(self) -> str:
        """Return the report as a text table, with a line of totals."""
        rows = [
            [
                row.name,
                "×".join(map(str, row.shape)),
                row.arrangement,
                "×".join(map(str, row.ranks)) or "-",
                f"{row.n_parameters_before:,}",
                f"{row.n_parameters:,}",
                f"{row.relative_error:.4g}",
                "; ".join(row.notes),
            ]
            for row in self.rows
        ]
        header = ["tensor", "shape", "stored as", "ranks", "before", "after", "error", ""]
        before = sum(row.n_parameters_before for row in self.rows)
        totals = f"{before:,} → {self.n_parameters:,} numbers, relative error {self.relative_error:.4g}"
        return f"{format_table(header, rows, 'llllrrrl')}\n{totals}"


def round_adapter(
    adapter: AdapterLike,
    *,
    max_parameters: int | None = None,
    max_ratio: float | None = None,
    rtol: float | None = None,
    weights: Mapping[str, float] | str | None = None,
) -> AdapterFit:
    """Lower the ranks of an adapter under one budget, or within one tolerance, for all its weights together.

    The factors are orthogonalized; then the spectra of the cores are those of the dense changes, which are never
    formed. Tensors stored whole stay as they are, and do not count. A stack is rounded as the one tensor that it is.

    Parameters
    ----------
    adapter : path, Adapter, or mapping of str to TuckerTensor
        An adapter directory, or what it holds.
    max_parameters : int, optional
        How many numbers to store in all Tucker tensors together.
    max_ratio : float, optional
        The same as a share of the numbers in the dense weights, in (0, 1].
    rtol : float, optional
        The relative error of all changes together to stay within, with as few numbers as possible.
    weights : mapping of str to float, "relative", or None
        How much each weight's squared error counts, as for `allocate_ranks`.

    Returns
    -------
    AdapterFit
        The rounded adapter, in the types and arrangements that the given one is stored in, and its true error.

    Raises
    ------
    ValueError
        If a number is out of its range, an entry is not finite, or the budget holds nothing.
    TypeError
        Unless exactly one of ``max_parameters``, ``max_ratio`` and ``rtol`` is given.
    InputError, OSError
        As for `load_adapter`.

    Warns
    -----
    FloraWarning
        If rounding to the stored type takes the error above ``rtol``.

    References
    ----------
    Oseledets, Savostyanov and Tyrtyshnikov, *Linear algebra for tensor problems*, Computing 85 (2009), section 3, for
    one tensor; the budget is spread by `allocate_ranks`.

    Examples
    --------
    >>> import numpy as np
    >>> t = TuckerTensor(np.diag([3.0, 0.1]), [np.eye(8)[:, :2], np.eye(6)[:, :2]])
    >>> fit = round_adapter({"fc.weight": t}, max_parameters=20)
    >>> fit.adapter["fc.weight"].ranks, round(fit.relative_error, 4)
    ((1, 1), 0.0333)
    """
    given = {"max_parameters": max_parameters, "max_ratio": max_ratio, "rtol": rtol}
    budget = _checked_budget("round", given)
    source = as_adapter(adapter)
    _check_tensors("round", source)
    (joint,), stacks = _side_by_side([source])
    return _restacked(_rounded("round", _Sum.of(joint), budget, weights), stacks)


def add_adapters(
    adapters: Sequence[AdapterLike],
    *,
    weights: Sequence[float] | None = None,
    base: BaseLike | None = None,
    verify_base: Literal["warn", "error", "ignore"] = "warn",
    max_parameters: int | None = None,
    max_ratio: float | None = None,
    rtol: float | None = None,
) -> AdapterFit:
    """Add adapters of one model, exactly, and round the sum if a budget is given.

    Changes that are arranged alike get their factors side by side. Others meet in the modes that their arrangements
    share; where there are none, the change is stored dense, and a note says so. Without a budget only the rounding to
    the stored type is lost. A stack stays one where all adapters that change its members have it; else its members are
    added up one by one.

    Parameters
    ----------
    adapters : sequence of (path, Adapter, or mapping of str to TuckerTensor)
        Two adapters or more; one is allowed.
    weights : sequence of float, optional
        A number for each adapter; 1 by default.
    base : path or mapping of str to array, optional
        The checkpoint that they change. Tensors stored whole hold new values b + Δb, so that adding the changes needs
        b, unless the weights of those who have the tensor add up to 1.
    verify_base : {"warn", "error", "ignore"}
        What to do where the adapters were made for different bases, or for another one than ``base``.
    max_parameters, max_ratio, rtol : optional
        As for `round_adapter`; at most one of them.

    Returns
    -------
    AdapterFit
        The sum, and its true error.

    Raises
    ------
    ValueError
        If there are no adapters, a number is out of its range, or whole tensors need a base and there is none.
    InputError
        If shapes differ, one adapter stores whole what another changes by a Tucker tensor, or the bases differ and
        ``verify_base="error"``.

    Warns
    -----
    FloraWarning
        If the bases differ, and ``verify_base="warn"``.

    References
    ----------
    Bader and Kolda, *Efficient MATLAB computations with sparse and factored tensors*, SISC 30 (2007), section 4.2.

    Examples
    --------
    >>> import numpy as np
    >>> a, b = (TuckerTensor(np.full((1, 1), c), [np.ones((4, 1)), np.eye(4)[:, :1]]) for c in (1.0, 2.0))
    >>> total = add_adapters([{"fc.weight": a}, {"fc.weight": b}], weights=[0.5, 0.25])
    >>> total.adapter.delta("fc.weight")[0].tolist(), total.adapter["fc.weight"].ranks
    ([1.0, 0.0, 0.0, 0.0], (1, 1))
    """
    given = {"max_parameters": max_parameters, "max_ratio": max_ratio, "rtol": rtol}
    criterion = _checked_budget("add", given) if any(v is not None for v in given.values()) else None
    if not adapters:
        raise ValueError("add: no adapters; pass at least one")
    numbers = [1.0] * len(adapters) if weights is None else [check_scale("add: a weight", w) for w in weights]
    if len(numbers) != len(adapters):
        raise ValueError(f"add: {len(numbers)} weights for {len(adapters)} adapters; pass one for each")
    sources = [as_adapter(a) for a in adapters]
    for source in sources:
        _check_tensors("add", source)
    return _linear("add", sources, numbers, base, verify_base, criterion)


def subtract_adapters(
    a: AdapterLike,
    b: AdapterLike,
    *,
    base: BaseLike | None = None,
    verify_base: Literal["warn", "error", "ignore"] = "warn",
) -> AdapterFit:
    """Subtract one adapter from another, exactly: the change that leads from ``b`` to ``a``.

    Parameters
    ----------
    a, b : path, Adapter, or mapping of str to TuckerTensor
        Two adapters of one model.
    base, verify_base
        As for `add_adapters`.

    Returns
    -------
    AdapterFit
        a − b; weights whose change is the same bit for bit are left out.

    Raises
    ------
    ValueError, InputError
        As for `add_adapters`.

    References
    ----------
    Bader and Kolda (2007), section 4.2.

    Examples
    --------
    >>> import numpy as np
    >>> t = TuckerTensor(np.ones((1, 1)), [np.ones((2, 1)), np.ones((2, 1))])
    >>> left = subtract_adapters({"a.weight": t, "b.weight": t}, {"b.weight": t})
    >>> list(left.adapter)
    ['a.weight']
    """
    sources = [as_adapter(a), as_adapter(b)]
    for source in sources:
        _check_tensors("subtract", source)
    return _linear("subtract", sources, [1.0, -1.0], base, verify_base, None)


def scale_adapter(
    adapter: AdapterLike,
    factor: float,
    *,
    base: BaseLike | None = None,
    verify_base: Literal["warn", "error", "ignore"] = "warn",
) -> Adapter:
    """Multiply an adapter's changes by a number: only the scales change, every core and factor keeps its bits.

    Parameters
    ----------
    adapter : path, Adapter, or mapping of str to TuckerTensor
        The adapter.
    factor : float
        The number.
    base, verify_base
        As for `add_adapters`; needed for tensors that are stored whole, unless the factor is 1 or 0.

    Returns
    -------
    Adapter
        factor · adapter. With a factor of 0, tensors stored whole are left out: they do not change.

    Raises
    ------
    ValueError
        If the factor, or a scale that it leads to, is not a number in float32's range, or a base is needed.
    InputError
        As for `add_adapters`.

    References
    ----------
    Bader and Kolda (2007), section 4.2.

    Examples
    --------
    >>> import numpy as np
    >>> t = TuckerTensor(np.ones((1, 1)), [np.ones((2, 1)), np.ones((2, 1))])
    >>> scale_adapter({"fc.weight": t}, 0.5).scales["fc.weight"]
    0.5
    """
    source, number = as_adapter(adapter), check_scale("scale: the factor", factor)
    _check_tensors("scale", source)
    config = {key: value for key, value in source.config.items() if key != "scale"}
    whole = WholeTensors("scale", [source], [number], base, verify_base).values()
    scales = {name: check_scale(f"scale: the scale of {name!r}", s * number) for name, s in source.scales.items()}
    if not source and not whole:
        raise ValueError("scale: nothing is left of the adapter; a factor other than 0 keeps it")
    return replace(source, scales=scales, whole=whole, config=config)


@dataclass(frozen=True)
class _Sum:
    """An exact result before it is stored: Σ scale · tensor, in float64."""

    tensors: Mapping[str, Combination]
    before: Mapping[str, int]
    shapes: Mapping[str, tuple[int, ...]]
    scales: Mapping[str, float]
    codes: Mapping[str, str]
    whole: Mapping[str, Any]
    whole_codes: Mapping[str, str]
    config: Mapping[str, Any]

    @classmethod
    def of(cls, source: Adapter) -> "_Sum":
        """Take one adapter as it is."""
        return cls(
            {name: Combination(_wide(tensor), source.arrangements[name]) for name, tensor in source.items()},
            {name: tensor.n_parameters for name, tensor in source.items()},
            source.shapes,
            source.scales,
            {name: _code(source, name) for name in source},
            source.whole,
            {name: code for name, code in source.dtypes.items() if name in source.whole},
            _common_config([source]),
        )


def _check_linear(where: str, adapter: Adapter) -> None:
    if adapter.magnitudes:
        name = min(adapter.magnitudes)
        raise ValueError(
            f"{where}: {name!r} has a magnitude, so that its change depends on the base and is no Tucker tensor; "
            "merge the adapter into its base instead"
        )


def _check_tensors(where: str, adapter: Adapter) -> None:
    _check_linear(where, adapter)
    if not adapter and not adapter.whole:
        raise ValueError(f"{where}: an adapter is empty; pass one with at least one tensor")
    for name, tensor in adapter.items():
        for part in (tensor.core, *(u for u in tensor.factors if u is not None)):
            check_finite(where, part, name)


def _checked_budget(where: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the one criterion that was given, its number proved to be in range."""
    name = exactly_one(where, **given)
    value = given[name]
    if name == "rtol":
        check_tolerance(where, value)
    elif name == "max_ratio":
        check_fraction(where, "max_ratio", value)
    elif as_int(where, "max_parameters", value) < 1:
        raise ValueError(f"{where}: max_parameters is {value}; pass at least 1")
    return {name: value}


def _wide(tensor: TuckerTensor) -> TuckerTensor:
    return tensor.map(lambda array: to_numpy(array).astype(np.float64, copy=False))


def _times(tensor: TuckerTensor, number: float) -> TuckerTensor:
    return TuckerTensor(tensor.core * number, tensor.factors)


def _code(adapter: Adapter, name: str) -> str:
    """Return the type that a weight's core and factors are stored in."""
    code = adapter.dtypes.get(name) or dtype_code(adapter[name].core.dtype)
    return code if code in FLOATS else "F64"


def _common_config(sources: Sequence[Adapter]) -> dict[str, Any]:
    """Keep what all configs agree on and what still holds."""
    first = sources[0].config
    agreed = {k: v for k, v in first.items() if all(k in s.config and s.config[k] == v for s in sources)}
    return {key: value for key, value in agreed.items() if key not in _OF_TENSORS}


def _linear(
    where: str,
    sources: Sequence[Adapter],
    numbers: Sequence[float],
    base: BaseLike | None,
    verify_base: str,
    budget: Mapping[str, Any] | None,
) -> AdapterFit:
    """Form Σ w_k · adapter_k and store it, rounded if there is a budget."""
    whole = WholeTensors(where, sources, numbers, base, verify_base)
    values = whole.values()
    sources, stacks = _side_by_side(sources)
    tensors: dict[str, Combination] = {}
    scales: dict[str, float] = {}
    for name in dict.fromkeys(name for source in sources for name in source):
        owners = [(w, source) for w, source in zip(numbers, sources) if name in source]
        total, scales[name] = _combined(where, name, owners)
        if total is not None:
            tensors[name] = total
    if not tensors and not values:
        raise ValueError(f"{where}: the result is zero: no change is left to store")
    having = {name: [source for source in sources if name in source] for name in tensors}
    result = _Sum(
        tensors,
        {name: sum(source[name].n_parameters for source in owners) for name, owners in having.items()},
        {name: owners[0].shapes[name] for name, owners in having.items()},
        scales,
        {name: widest_code([_code(source, name) for source in owners]) for name, owners in having.items()},
        values,
        whole.codes(values),
        _common_config(sources),
    )
    fit = _rounded(where, result, budget, None) if budget and tensors else _unrounded(where, result)
    return _restacked(fit, stacks)


def _side_by_side(sources: Sequence[Adapter]) -> tuple[list[Adapter], dict[str, tuple[str, ...]]]:
    """Take stacks for single weights where all that change their members have them, and take the others apart."""
    stacks: dict[str, tuple[str, ...]] = {}
    for source in sources:
        for name, stack in source.stacks.items():
            alike = (s.stacks[name].members == stack.members for s in sources if name in s.stacks)
            if all(alike) and all(name in s.stacks or not set(stack.members) & set(s.tensors) for s in sources):
                stacks[name] = stack.members
    kept = [replace(s, stacks={n: stack for n, stack in s.stacks.items() if n in stacks}) for s in sources]
    return [source.joined() for source in kept], stacks


def _restacked(fit: AdapterFit, stacks: Mapping[str, tuple[str, ...]]) -> AdapterFit:
    """Give the members of the stacks their names back."""
    left = {name: members for name, members in stacks.items() if name in fit.adapter}
    return replace(fit, adapter=fit.adapter.with_stacks(left)) if left else fit


def _combined(where: str, name: str, owners: Sequence[tuple[float, Adapter]]) -> tuple[Combination | None, float]:
    """Return Σ w_k s_k T_k / s for one weight, ``None`` where it is zero, and s."""
    shapes = list(dict.fromkeys(source.shapes[name] for _, source in owners))
    if len(shapes) > 1:
        raise InputError(f"{where}: {name!r} has shapes {shapes}; pass adapters of one model")
    factors = [w * source.scales[name] for w, source in owners]
    # Where all have one size it becomes the scale, and the cores keep their bits.
    scale = abs(factors[0]) if factors[0] and len({abs(f) for f in factors}) == 1 else 1.0
    terms = [
        Term(factor / scale, _wide(source[name]), source.arrangements[name])
        for factor, (_, source) in zip(factors, owners)
        if factor
    ]
    total = combine(terms, shapes[0]) if terms else None
    return (total if total is not None and bool(np.any(total.tensor.core)) else None), scale


def _unrounded(where: str, total: _Sum) -> AdapterFit:
    stored = {name: _store(where, total, name, c.tensor) for name, c in total.tensors.items()}
    return _fit(total, stored, None)


def _rounded(
    where: str, total: _Sum, budget: Mapping[str, Any], weights: Mapping[str, float] | str | None
) -> AdapterFit:
    """Spread the budget over the spectra of the upright cores, and truncate each to its ranks."""
    upright = {name: _upright(_times(c.tensor, total.scales[name])) for name, c in total.tensors.items()}
    if not upright:
        return _fit(total, {}, None)
    # A core with orthonormal factors has the tensor's own spectra; what ranks store is counted by the tensor's sizes.
    spectra: dict[str, Spectrum] = {
        name: replace(cheapest_spectrum(where, t.core), shape=t.shape) for name, t in upright.items()
    }
    frontiers = {name: [spectrum.frontier(partial=True)] for name, spectrum in spectra.items()}
    for name, options in frontiers.items():
        options.append(_as_it_is(total.tensors[name].tensor, options[0]))
    allocation = allocate_ranks(frontiers, **budget, weights=weights)
    if not allocation.n_parameters and not total.whole:
        least = min(
            (int(f.n_parameters[1]) for options in frontiers.values() for f in options if len(f) > 1), default=None
        )
        why = "every change is zero" if least is None else f"the smallest tensor takes {least} numbers; raise it"
        raise ValueError(f"{where}: the budget {budget} holds nothing: {why}")
    stored: dict[str, tuple[TuckerTensor, float] | None] = {}
    for name, choice in allocation.choices.items():
        stored[name] = None
        if choice.option == 1 and choice.n_parameters:
            stored[name] = _store(where, total, name, total.tensors[name].tensor)
        elif choice.n_parameters:
            tensor = _truncated(upright[name], choice.ranks, spectra[name])
            stored[name] = _store(where, total, name, _times(tensor, 1 / total.scales[name]))
    fit = _fit(total, stored, None if "rtol" in budget else allocation.lower_bound)
    if "rtol" in budget and fit.relative_error > budget["rtol"] + _ROUNDING:
        message = f"{where}: as stored the error is {fit.relative_error:.3g}, above rtol {budget['rtol']}"
        warn(f"{message}; the adapter's own types cannot hold less", FloraWarning, 4)
    return fit


def _upright(tensor: TuckerTensor) -> TuckerTensor:
    """Give a tensor orthonormal factors; with more than two modes, those that are nearly square become whole modes.

    A whole mode stores less than a rank above half its size, so the spectrum has to know its full rank too.
    """
    result = orthogonalize(tensor)
    if result.ndim <= 2:
        return result
    near = [u if u is not None and u.shape[0] <= 2 * u.shape[1] else None for u in result.factors]
    return _multiplied_out(result, near)


def _multiplied_out(tensor: TuckerTensor, factors: Sequence[Any]) -> TuckerTensor:
    """Multiply some of the factors, those that are given, into the core."""
    kept = tuple(u if v is None else None for u, v in zip(tensor.factors, factors))
    return TuckerTensor(multi_mode_dot(tensor.core, factors), kept)


def _as_it_is(tensor: TuckerTensor, other: Frontier) -> Frontier:
    """Offer a tensor unchanged, beside its truncations: one that is not upright can store less than those."""
    ranks = np.array([(0,) * tensor.ndim, tensor.ranks], dtype=np.int64)
    numbers = np.array([0, tensor.n_parameters], dtype=np.int64)
    if not other.norm_squared:
        ranks, numbers = ranks[:1], numbers[:1]
    errors = np.array([other.norm_squared, 0.0])[: len(numbers)]
    return Frontier(numbers, errors, ranks, other.norm_squared, other.n_entries)


def _truncated(upright: TuckerTensor, ranks: tuple[int, ...], spectrum: Spectrum) -> TuckerTensor:
    """Lower the ranks of a tensor with orthonormal factors; a mode of full rank is left whole, without its factor."""
    if ranks == upright.shape:  # the dense tensor itself, where that stores least
        return TuckerTensor(upright.to_tensor(), (None,) * len(ranks))
    asked = [None if rank == size else rank for rank, size in zip(ranks, upright.ranks)]
    small = TuckerTensor(upright.core, (None,) * len(ranks))
    if any(asked):
        fit = tucker(upright.core, asked)
        if spectrum.core is not None and fit.relative_error > spectrum.error(ranks) * (1 + 1e-9):
            fit = min(fit, tucker(upright.core, asked, method="hosvd"), key=lambda f: f.relative_error)
        small = fit.tucker
    factors = [u if v is None else v if u is None else u @ v for u, v in zip(upright.factors, small.factors)]
    whole = [u if u is not None and u.shape[0] == u.shape[1] else None for u in factors]
    return _multiplied_out(TuckerTensor(small.core, tuple(factors)), whole)


def _store(where: str, total: _Sum, name: str, tensor: TuckerTensor) -> tuple[TuckerTensor, float]:
    """Return what a weight's tensor is as stored, and the scale beside it."""
    code, scale = total.codes[name], total.scales[name]
    core, exponent = fitting_core(where, name, tensor.core, code)
    scale = check_scale(f"{where}: scale of {name!r}", math.ldexp(scale, exponent))
    return TuckerTensor(core, tensor.factors).map(lambda array: round_to(array, code)), scale


def _fit(total: _Sum, stored: Mapping[str, tuple[TuckerTensor, float] | None], lower_bound: float | None) -> AdapterFit:
    """Measure the error of what is stored, weight by weight, and put the adapter together."""
    rows: list[AdapterRow] = []
    errors: list[float] = []
    for name, exact in total.tensors.items():
        kept = stored[name]
        scaled = _times(exact.tensor, total.scales[name])
        size = float(norm(scaled))
        error = size if kept is None else _distance(scaled, _times(_wide(kept[0]), kept[1]))
        errors.append(error)
        rows.append(
            AdapterRow(
                name,
                total.shapes[name],
                exact.arrangement.pattern,
                () if kept is None else kept[0].ranks,
                0 if kept is None else kept[0].n_parameters,
                total.before[name],
                error / size if size else 0.0,
                size,
                exact.notes if kept is not None else (*exact.notes, "left out: rank 0 under this budget"),
            )
        )
    names = [name for name, kept in stored.items() if kept is not None]
    adapter = Adapter(
        {name: kept[0] for name, kept in stored.items() if kept is not None},
        {name: total.tensors[name].arrangement for name in names},
        {name: kept[1] for name, kept in stored.items() if kept is not None},
        {name: total.shapes[name] for name in names},
        total.whole,
        total.config,
        {**{name: total.codes[name] for name in names}, **total.whole_codes},
    )
    size = math.hypot(*(row.norm for row in rows))
    return AdapterFit(adapter, tuple(rows), math.hypot(*errors) / size if size else 0.0, lower_bound)


def _distance(a: TuckerTensor, b: TuckerTensor) -> float:
    """Return ‖A − B‖ of two tensors that are arranged alike, without forming either."""
    pair = [Term(1.0, a, Arrangement.native(a.ndim)), Term(-1.0, b, Arrangement.native(a.ndim))]
    return float(norm(combine(pair, a.shape).tensor))
