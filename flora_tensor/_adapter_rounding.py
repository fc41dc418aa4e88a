"""A sum of adapters as it is stored: rounded to a budget or a tolerance or not, and its error measured."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from flora_tensor._adapter_sums import Sum, wide
from flora_tensor._combining import Term, combine
from flora_tensor._safetensors import BITS, round_to
from flora_tensor._warnings import warn_user
from flora_tensor.adapter import Adapter, check_scale
from flora_tensor.adapter_file import fitting_core
from flora_tensor.adapter_fit import AdapterFit, AdapterRow
from flora_tensor.algebra import multi_mode_dot
from flora_tensor.allocation import Allocation, allocate_ranks
from flora_tensor.arrangement import Arrangement
from flora_tensor.decomposition import tucker
from flora_tensor.spectra import Frontier, Spectrum, cheapest_spectrum
from flora_tensor.tucker_algebra import norm, orthogonalize
from flora_tensor.tucker_tensor import TuckerTensor

__all__ = ["rounded", "unrounded"]

# What rounding to the stored type may add to an error before a tolerance counts as missed.
_ROUNDING = 1e-5


def unrounded(where: str, total: Sum) -> AdapterFit:
    """Store a sum with the ranks that it has."""
    stored = {name: _store(where, total, name, c.tensor) for name, c in total.tensors.items()}
    return _fit(total, stored, None)


def rounded(
    where: str, total: Sum, limit: Mapping[str, Any], weights: Mapping[str, float] | str | None = None
) -> AdapterFit:
    """Spread a budget, or a tolerance, over the spectra of the upright cores, and truncate each to its ranks."""
    upright = {name: _upright(_times(c.tensor, total.scales[name])) for name, c in total.tensors.items()}
    if not upright:
        return _fit(total, {}, None)
    # A core with orthonormal factors has the tensor's own spectra; what ranks store is counted by the tensor's sizes.
    spectra: dict[str, Spectrum] = {
        name: replace(cheapest_spectrum(where, t.core), shape=t.shape) for name, t in upright.items()
    }
    frontiers = {
        name: [cut := spectrum.frontier(partial=True), _as_it_is(total.tensors[name].tensor, cut)]
        for name, spectrum in spectra.items()
    }
    allocation = _allocated(where, frontiers, total, limit, weights)
    stored: dict[str, tuple[TuckerTensor, float] | None] = {}
    for name, choice in allocation.choices.items():
        stored[name] = None
        if choice.option == 1 and choice.n_parameters:
            stored[name] = _store(where, total, name, total.tensors[name].tensor)
        elif choice.n_parameters:
            tensor = _truncated(upright[name], choice.ranks, spectra[name])
            stored[name] = _store(where, total, name, _times(tensor, 1 / total.scales[name]))
    # Where the weights do not count alike, what bounds, and keeps, their weighted error says nothing of the plain one.
    plain = weights in (None, "norm")
    fit = _fit(total, stored, None if "rtol" in limit or not plain else allocation.lower_bound)
    if plain and "rtol" in limit and fit.relative_error > limit["rtol"] + _ROUNDING:
        message = f"{where}: as stored the error is {fit.relative_error:.3g}, above rtol {limit['rtol']}"
        warn_user(f"{message}; the adapter's own types cannot hold less")
    return fit


def _allocated(
    where: str,
    frontiers: dict[str, list[Frontier]],
    total: Sum,
    limit: Mapping[str, Any],
    weights: Mapping[str, float] | str | None,
) -> Allocation:
    """Choose a point of each weight's frontiers; a limit that leaves nothing to store is refused."""
    unit, given = "numbers", limit
    if "max_bytes" in limit:
        # The same problem with another unit: what a number costs is the width of the type it is stored in.
        unit, given = "bytes", {"max_parameters": limit["max_bytes"]}
        widths = {name: BITS[total.codes[name]] // 8 for name in frontiers}
        frontiers = {
            name: [replace(f, n_parameters=f.n_parameters * widths[name]) for f in options]
            for name, options in frontiers.items()
        }
    allocation = allocate_ranks(frontiers, **given, weights=weights)
    if not allocation.n_parameters and not total.whole:
        sizes = [int(f.n_parameters[1]) for options in frontiers.values() for f in options if len(f) > 1]
        if sizes and "rtol" in limit:
            raise ValueError(f"{where}: nothing at all keeps rtol {limit['rtol']}; lower it, or leave the adapter out")
        why = f"the smallest tensor takes {min(sizes)} {unit}; raise it" if sizes else "every change is zero"
        raise ValueError(f"{where}: the budget {limit} holds nothing: {why}")
    return allocation


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


def _store(where: str, total: Sum, name: str, tensor: TuckerTensor) -> tuple[TuckerTensor, float]:
    """Return what a weight's tensor is as stored, and the scale beside it."""
    code, scale = total.codes[name], total.scales[name]
    core, exponent = fitting_core(where, name, tensor.core, code)
    scale = check_scale(f"{where}: scale of {name!r}", math.ldexp(scale, exponent))
    return TuckerTensor(core, tensor.factors).map(lambda array: round_to(array, code)), scale


def _fit(total: Sum, stored: Mapping[str, tuple[TuckerTensor, float] | None], lower_bound: float | None) -> AdapterFit:
    """Measure the error of what is stored, weight by weight, and put the adapter together."""
    rows: list[AdapterRow] = []
    errors: list[float] = []
    for name, exact in total.tensors.items():
        kept = stored[name]
        scaled = _times(exact.tensor, total.scales[name])
        size = float(norm(scaled))
        error = size if kept is None else _distance(scaled, _times(wide(kept[0]), kept[1]))
        errors.append(error)
        rows.append(
            AdapterRow(
                name=name,
                shape=total.shapes[name],
                arrangement=exact.arrangement.pattern,
                ranks=() if kept is None else kept[0].ranks,
                n_parameters=0 if kept is None else kept[0].n_parameters,
                n_parameters_before=total.before[name],
                relative_error=error / size if size else 0.0,
                norm=size,
                notes=exact.notes if kept is not None else (*exact.notes, "left out: rank 0 under this budget"),
            )
        )
    names = [name for name, kept in stored.items() if kept is not None]
    adapter = Adapter(
        {name: kept[0] for name, kept in stored.items() if kept is not None},
        arrangements={name: total.tensors[name].arrangement for name in names},
        scales={name: kept[1] for name, kept in stored.items() if kept is not None},
        shapes={name: total.shapes[name] for name in names},
        whole=total.whole,
        config=total.config,
        dtypes={**{name: total.codes[name] for name in names}, **total.whole_codes},
    )
    size = math.hypot(*(row.norm for row in rows))
    return AdapterFit(adapter, tuple(rows), math.hypot(*errors) / size if size else 0.0, lower_bound)


def _distance(a: TuckerTensor, b: TuckerTensor) -> float:
    """Return ‖A − B‖ of two tensors that are arranged alike, without forming either."""
    pair = [Term(1.0, a, Arrangement.native(a.ndim)), Term(-1.0, b, Arrangement.native(a.ndim))]
    return float(norm(combine(pair, a.shape).tensor))


def _times(tensor: TuckerTensor, number: float) -> TuckerTensor:
    return TuckerTensor(tensor.core * number, tensor.factors)
