"""Rank rules: by tolerance, by energy, by budget, each exact over all rank tuples; and by noise.

Given the core of the full HOSVD the error of every rank tuple is known exactly (`spectra.error_table`), so the cheapest
tuple within a tolerance, and the best within a budget, are found by looking at all of them.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from flora_tensor._arrays import is_low_precision, stop_gradient, to_numpy
from flora_tensor._checks import (
    as_int,
    as_number,
    as_sequence,
    check_choice,
    check_fraction,
    check_tolerance,
    exactly_one,
    feasible_ranks,
)
from flora_tensor._frontiers import n_parameters_of
from flora_tensor._rank_search import check_budget, fewest_parameters, smallest_error
from flora_tensor._typing import Array
from flora_tensor.noise import bic, doubts, evbmf, gavish_donoho, projected_edge
from flora_tensor.spectra import Spectrum, hosvd_spectrum, mode_spectra

__all__ = ["EffectiveRanks", "RankChoice", "effective_ranks", "select_ranks"]

NoiseRule = Literal["noise", "evbmf", "bic", "gavish-donoho"]


@dataclass(frozen=True)
class RankChoice:
    """Chosen ranks and what they cost; made by `select_ranks`.

    Attributes
    ----------
    ranks : tuple of int
        One rank a mode.
    n_parameters : int
        ∏ r_n + Σ I_n r_n.
    relative_error : float
        ‖X − X_r‖ / ‖X‖ of the HOSVD truncated to these ranks, exactly; HOOI can only lower it.
    lower_bound : float
        No tensor of these ranks has a smaller relative error.
    certificate : float
        ``relative_error / lower_bound``: how many times the error of the best tensor of these ranks this is at most. At
        most √N; 1 where both are 0.
    method : str
        The criterion that chose them.
    notes : tuple of str
        What a reader should know about the choice, if anything.
    """

    ranks: tuple[int, ...]
    n_parameters: int
    relative_error: float
    lower_bound: float
    method: str
    notes: tuple[str, ...] = ()

    @property
    def certificate(self) -> float:
        """How many times the error of the best tensor of these ranks the truncated HOSVD is at most."""
        return certificate_of(self.relative_error, self.lower_bound)


@dataclass(frozen=True)
class EffectiveRanks:
    """Three descriptions of how fast singular values fall, one number per mode; made by `effective_ranks`.

    Attributes
    ----------
    entropy : tuple of float
        exp of the entropy of σ / Σσ.
    stable : tuple of float
        ‖X‖² / σ_1².
    participation : tuple of float
        (Σσ²)² / Σσ⁴.
    """

    entropy: tuple[float, ...]
    stable: tuple[float, ...]
    participation: tuple[float, ...]


def select_ranks(
    x: Array | Spectrum,
    *,
    rtol: float | None = None,
    energy: float | None = None,
    max_parameters: int | None = None,
    max_ratio: float | None = None,
    max_bytes: int | None = None,
    method: NoiseRule | None = None,
    noise_floor: float | None = None,
    max_ranks: Sequence[int] | None = None,
) -> RankChoice:
    """Choose the ranks of a Tucker decomposition by exactly one criterion.

    Tolerances and budgets are met optimally: the exact error of every rank tuple is compared. Noise rules tell signal
    from noise and are a diagnosis rather than a promise; on fine-tuning deltas without a clean bulk of noise they
    disagree, and the notes say so.

    Parameters
    ----------
    x : array of shape (I_0, …, I_{N-1}), or Spectrum
        The tensor, or its `hosvd_spectrum`, which saves computing it again for a second choice.
    rtol : float, optional
        The fewest parameters with ‖X − X_r‖ ≤ rtol · ‖X‖.
    energy : float, optional
        The share of ‖X‖² to keep, in (0, 1]: the same as ``rtol = √(1 − energy)``.
    max_parameters : int, optional
        The smallest error with ∏ r_n + Σ I_n r_n ≤ max_parameters.
    max_ratio : float, optional
        The same budget as a share of the dense tensor's ∏ I_n entries, in (0, 1].
    max_bytes : int, optional
        The same budget in bytes, numbers stored in the type of ``x`` (of a `Spectrum`: the type it was computed in).
    method : {"noise", "evbmf", "bic", "gavish-donoho"}, optional
        A noise rule. ``"noise"``: the directions above the edge of the noise, each mode seen through the signal
        subspaces of the others. ``"evbmf"``: empirical variational Bayes on each unfolding. ``"bic"``: the Bayesian
        information criterion over all rank tuples. ``"gavish-donoho"``: the optimal hard threshold on each unfolding,
        one noise level for all. All of them take the noise to be white; only ``"noise"`` allows it to be stronger in
        some slices of a tensor than in others. What the ranks leave over is tested for heavy tails and correlation, and
        a note says where either is found (a false alarm in about a million on white noise).
    noise_floor : float, optional
        A known standard deviation of noise in the entries, such as `rounding_noise` gives. It replaces the estimate of
        ``"noise"`` and ``"gavish-donoho"``; beside any other criterion it caps the ranks, as more rank would only store
        noise.
    max_ranks : sequence of int, optional
        Bounds on the ranks, beside the criterion.

    Returns
    -------
    RankChoice
        Feasible ranks, their number of parameters, exact error and lower bound. All ranks are zero where a noise rule,
        or the noise floor, finds no signal; otherwise each is at least 1.

    Raises
    ------
    ValueError
        If a number is out of its range, no rank tuple satisfies the criterion (the budget is below the smallest Tucker
        tensor of this shape, or ``max_ranks`` forbid the tolerance), ``method`` is unknown, or ``x`` holds NaN or
        infinity.
    TypeError
        Unless exactly one criterion is given.

    References
    ----------
    The error of each tuple: De Lathauwer, De Moor and Vandewalle, SIMAX 21 (2000), property 10, evaluated without
    cancellation as in `error_table`. Ghadiri, Fahrbach, Fu and Mirrokni, *Approximately optimal core shapes for Tucker
    decompositions*, ICML 2023, treat the problem given the singular values only. Noise rules: Johnstone, Annals of
    Statistics 29 (2001) for the edge; Han, Chen and Zhang, arXiv 2011.07131 (2020), for the iterated projection;
    Nakajima et al., JMLR 14 (2013); Schwarz, Annals of Statistics 6 (1978); Gavish and Donoho, IEEE TIT 60 (2014).

    Examples
    --------
    >>> import numpy as np
    >>> x = np.einsum("i,j,k->ijk", np.arange(1.0, 6), np.ones(4), np.ones(3))
    >>> select_ranks(x, rtol=1e-6).ranks
    (1, 1, 1)
    >>> select_ranks(x, max_parameters=20).n_parameters
    13
    >>> noise = np.random.default_rng(0).standard_normal((20, 20, 20))
    >>> select_ranks(noise, method="noise").ranks
    (0, 0, 0)
    """
    where = "select_ranks"
    criterion = exactly_one(
        where,
        rtol=rtol,
        energy=energy,
        max_parameters=max_parameters,
        max_ratio=max_ratio,
        max_bytes=max_bytes,
        method=method,
    )
    floor = None if noise_floor is None else _checked_floor(where, noise_floor)
    spectrum = x if isinstance(x, Spectrum) else hosvd_spectrum(x)
    caps = _caps(where, max_ranks, spectrum.max_ranks)
    if method is not None:
        return _by_noise_rule(where, spectrum, method, floor, caps)
    notes: tuple[str, ...] = ()
    if floor is not None:
        edge, _ = projected_edge(spectrum, floor)
        if not any(edge):
            return choice_of(spectrum, edge, criterion, ("nothing stands above the noise floor",))
        capped = tuple(min(a, b) for a, b in zip(caps, edge))
        notes = () if capped == caps else (f"ranks are capped at {capped} by the noise floor",)
        caps = feasible_ranks(capped, spectrum.shape)
    if criterion in ("rtol", "energy"):
        tolerance = check_tolerance(where, rtol) if energy is None else _tolerance_of(where, energy)
        ranks = fewest_parameters(spectrum, spectrum.shape, tolerance**2, caps)
        if ranks is None and floor is not None:
            ranks, notes = caps, (*notes, f"the noise floor stands above the tolerance of {tolerance:g}")
        elif ranks is None:
            raise ValueError(
                f"{where}: no ranks up to max_ranks={caps} reach a relative error of {tolerance:g}; raise max_ranks"
            )
    else:
        stored = np.dtype(np.float16) if not isinstance(x, Spectrum) and is_low_precision(x.dtype) else spectrum.dtype
        budget = _budget(where, spectrum.shape, stored.itemsize, max_parameters, max_ratio, max_bytes)
        check_budget(where, spectrum.shape, budget)
        ranks = smallest_error(spectrum, spectrum.shape, budget, caps) or (1,) * len(spectrum.shape)
    return choice_of(spectrum, ranks, criterion, notes)


def effective_ranks(x: Array | Spectrum) -> EffectiveRanks:
    """Describe how fast each unfolding's singular values fall, by numbers that are no ranks to decompose with.

    Parameters
    ----------
    x : array of shape (I_0, …, I_{N-1}), or Spectrum
        The tensor, or its `hosvd_spectrum`.

    Returns
    -------
    EffectiveRanks
        One number per mode in each field, from 1 to the number of singular values; 0 for a zero tensor.

    Raises
    ------
    ValueError
        If ``x`` has no axes, or holds NaN or infinity.

    References
    ----------
    Roy and Vetterli, *The effective rank*, EUSIPCO 2007 (entropy); Rudelson and Vershynin, *Sampling from large
    matrices*, JACM 54 (2007) (stable rank); the participation ratio is the inverse Herfindahl index of the σ².

    Examples
    --------
    >>> import numpy as np
    >>> effective_ranks(np.eye(3)).stable
    (3.0, 3.0)
    """
    values = x.values if isinstance(x, Spectrum) else mode_spectra(stop_gradient(x)).values
    rows: list[tuple[float, float, float]] = []
    for v in values:
        s = to_numpy(v).astype(np.float64)
        if not s.any():
            rows.append((0.0, 0.0, 0.0))
            continue
        s = s / s[0]
        p, squares = s[s > 0] / s.sum(), s * s
        entropy = math.exp(-float(np.sum(p * np.log(p))))
        rows.append((entropy, float(squares.sum()), float(squares.sum() ** 2 / np.sum(squares * squares))))
    return EffectiveRanks(*(tuple(column) for column in zip(*rows)))


def certificate_of(error: float, lower_bound: float) -> float:
    """Return how far an error is from a bound that no other falls below: their ratio, 1 where both are 0.

    Where both are rounding the error may be below the bound; no error is less than once the best.
    """
    return max(1.0, error / lower_bound) if lower_bound > 0 else 1.0 if error == 0 else math.inf


def _by_noise_rule(
    where: str, spectrum: Spectrum, method: str, floor: float | None, caps: tuple[int, ...]
) -> RankChoice:
    check_choice(where, "method", method, get_args(NoiseRule))
    likely = bic(spectrum)
    rules: dict[str, Callable[[], tuple[int, ...]]] = {
        "noise": lambda: projected_edge(spectrum, floor, likely)[0],
        "evbmf": lambda: evbmf(spectrum),
        "bic": lambda: likely,
        "gavish-donoho": lambda: gavish_donoho(spectrum, floor, likely),
    }
    ranks = rules[method]()
    other = "noise" if method == "bic" else "bic"
    second = rules[other]()
    notes: list[str] = []
    if second != ranks:
        notes.append(
            f"{method!r} gives {ranks} and {other!r} gives {second}: "
            "the noise is not white, or the signal has no clear end"
        )
    if floor is None:  # a known deviation is the user's word
        balanced = method == "noise" and len(spectrum.shape) > 2
        notes += [
            f"what {ranks} leave over is not white noise: {d}" for d in doubts(spectrum, ranks, balanced=balanced)
        ]
    capped = feasible_ranks([min(a, b) for a, b in zip(ranks, caps)], spectrum.shape)
    if capped != ranks:
        notes.append(f"ranks are capped at {capped} by max_ranks")
    return choice_of(spectrum, capped, method, tuple(notes))


def _budget(
    where: str,
    shape: Sequence[int],
    itemsize: int,
    max_parameters: int | None,
    max_ratio: float | None,
    max_bytes: int | None,
) -> int:
    """Return the one budget that was given, in numbers."""
    if max_ratio is not None:
        return math.floor(check_fraction(where, "max_ratio", max_ratio) * math.prod(shape))
    if max_bytes is not None:
        return as_int(where, "max_bytes", max_bytes) // itemsize
    return as_int(where, "max_parameters", max_parameters)


def _checked_floor(where: str, value: object) -> float:
    floor = as_number(where, "noise_floor", value)
    if not 0 <= floor < math.inf:
        raise ValueError(f"{where}: noise_floor is {value}; pass a finite standard deviation of at least 0")
    return floor


def choice_of(spectrum: Spectrum, ranks: tuple[int, ...], method: str, notes: tuple[str, ...] = ()) -> RankChoice:
    """Look up what ``ranks`` cost."""
    return RankChoice(
        ranks=ranks,
        n_parameters=int(n_parameters_of(ranks, spectrum.shape)),
        relative_error=spectrum.error(ranks),
        lower_bound=spectrum.lower_bound(ranks),
        method=method,
        notes=notes,
    )


def _caps(where: str, max_ranks: Sequence[int] | None, most: tuple[int, ...]) -> tuple[int, ...]:
    if max_ranks is None:
        return most
    given = tuple(as_int(where, f"max_ranks[{k}]", r) for k, r in enumerate(as_sequence(where, "max_ranks", max_ranks)))
    if len(given) != len(most) or min(given, default=1) < 1:
        raise ValueError(f"{where}: max_ranks is {given}; pass {len(most)} integers of at least 1, one a mode")
    return tuple(min(r, m) for r, m in zip(given, most))


def _tolerance_of(where: str, energy: float) -> float:
    return math.sqrt(1.0 - check_fraction(where, "energy", energy))
