"""Adapters rounded, added, subtracted and scaled as they are stored: without the base model and without dense tensors.

All work is done in float64 on cores and factors. The error that is reported is measured on what is stored.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from flora_tensor._adapter_rounding import rounded, unrounded
from flora_tensor._adapter_sums import Sum, apart_or_joined
from flora_tensor._base_notes import VerifyBase
from flora_tensor._checks import check_finite, check_limit, exactly_one
from flora_tensor._whole import BaseLike, WholeTensors
from flora_tensor.adapter import Adapter, check_scale
from flora_tensor.adapter_file import AdapterLike, as_adapter
from flora_tensor.adapter_fit import AdapterFit, AdapterRow

__all__ = ["AdapterFit", "AdapterRow", "add_adapters", "round_adapter", "scale_adapter", "subtract_adapters"]


def round_adapter(
    adapter: AdapterLike,
    *,
    max_parameters: int | None = None,
    max_ratio: float | None = None,
    max_bytes: int | None = None,
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
    max_bytes : int, optional
        How many bytes these numbers may take, each in the type that its weight is stored in.
    rtol : float, optional
        The relative error of all changes together to stay within, with as few numbers as possible. With
        ``weights="uniform"`` it is the root mean square of their relative errors.
    weights : mapping of str to float, "norm", "uniform", or None
        How much each weight's squared error counts, as for `allocate_ranks`; a stack counts as one weight.

    Returns
    -------
    AdapterFit
        The rounded adapter, in the types and arrangements that the given one is stored in (8-bit floats, which have too
        few digits for it, become float32), and its true error.

    Raises
    ------
    ValueError
        If a number is out of its range, an entry is not finite, or the budget holds nothing.
    TypeError
        Unless exactly one of ``max_parameters``, ``max_ratio``, ``max_bytes`` and ``rtol`` is given.
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
    >>> from flora_tensor import TuckerTensor
    >>> t = TuckerTensor(np.diag([3.0, 0.1]), [np.eye(8)[:, :2], np.eye(6)[:, :2]])
    >>> fit = round_adapter({"fc.weight": t}, max_parameters=20)
    >>> fit.adapter["fc.weight"].ranks, round(fit.relative_error, 4)
    ((1, 1), 0.0333)
    """
    limit = _checked_limit("round", max_parameters=max_parameters, max_ratio=max_ratio, max_bytes=max_bytes, rtol=rtol)
    source = as_adapter(adapter)
    _check_tensors("round", source)
    (joint,), stacks = apart_or_joined([source])
    return _restacked(rounded("round", Sum.of(joint), limit, weights), stacks)


def add_adapters(
    adapters: Sequence[AdapterLike],
    *,
    weights: Sequence[float] | None = None,
    base: BaseLike | None = None,
    verify_base: VerifyBase = "warn",
    max_parameters: int | None = None,
    max_ratio: float | None = None,
    max_bytes: int | None = None,
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
    max_parameters, max_ratio, max_bytes, rtol : optional
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
    >>> from flora_tensor import TuckerTensor
    >>> a, b = (TuckerTensor(np.full((1, 1), c), [np.ones((4, 1)), np.eye(4)[:, :1]]) for c in (1.0, 2.0))
    >>> total = add_adapters([{"fc.weight": a}, {"fc.weight": b}], weights=[0.5, 0.25])
    >>> total.adapter.delta("fc.weight")[0].tolist(), total.adapter["fc.weight"].ranks
    ([1.0, 0.0, 0.0, 0.0], (1, 1))
    """
    given = {"max_parameters": max_parameters, "max_ratio": max_ratio, "max_bytes": max_bytes, "rtol": rtol}
    limit = _checked_limit("add", **given) if any(v is not None for v in given.values()) else None
    if not adapters:
        raise ValueError("add: no adapters; pass at least one")
    numbers = [1.0] * len(adapters) if weights is None else [check_scale("add: a weight", w) for w in weights]
    if len(numbers) != len(adapters):
        raise ValueError(f"add: {len(numbers)} weights for {len(adapters)} adapters; pass one for each")
    sources = [as_adapter(a) for a in adapters]
    for source in sources:
        _check_tensors("add", source)
    return _linear("add", sources, numbers, base, verify_base, limit)


def subtract_adapters(
    a: AdapterLike,
    b: AdapterLike,
    *,
    base: BaseLike | None = None,
    verify_base: VerifyBase = "warn",
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
    >>> from flora_tensor import TuckerTensor
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
    verify_base: VerifyBase = "warn",
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
    >>> from flora_tensor import TuckerTensor
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


def _check_tensors(where: str, adapter: Adapter) -> None:
    """Refuse what cannot be computed with: magnitudes, numbers that are not finite, or nothing at all."""
    for name in adapter.magnitudes:
        raise ValueError(
            f"{where}: {name!r} has a magnitude, so that its change depends on the base and is no Tucker tensor; "
            "merge the adapter into its base instead"
        )
    if not adapter and not adapter.whole:
        raise ValueError(f"{where}: an adapter is empty; pass one with at least one tensor")
    for name, tensor in adapter.items():
        for part in (tensor.core, *(u for u in tensor.factors if u is not None)):
            check_finite(where, part, name)


def _checked_limit(where: str, **given: float | None) -> dict[str, Any]:
    """Return the one budget or tolerance that was given, proved to be in range."""
    name = exactly_one(where, **given)
    check_limit(where, name, given[name])
    return {name: given[name]}


def _restacked(fit: AdapterFit, stacks: Mapping[str, tuple[str, ...]]) -> AdapterFit:
    """Give the members of the stacks their names back."""
    left = {name: members for name, members in stacks.items() if name in fit.adapter}
    return replace(fit, adapter=fit.adapter.with_stacks(left)) if left else fit


def _linear(
    where: str,
    sources: Sequence[Adapter],
    numbers: Sequence[float],
    base: BaseLike | None,
    verify_base: str,
    limit: Mapping[str, Any] | None,
) -> AdapterFit:
    """Form Σ w_k · adapter_k and store it, rounded if there is a limit."""
    whole = WholeTensors(where, sources, numbers, base, verify_base)
    values = whole.values()
    plain, stacks = apart_or_joined(sources)
    total = Sum.of_terms(where, plain, numbers, values, whole.codes(values))
    return _restacked(rounded(where, total, limit) if limit else unrounded(where, total), stacks)
