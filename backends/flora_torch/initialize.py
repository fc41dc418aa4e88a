"""What the user asked for, made into the start of an update: ranks, published scales, and the starts by their names."""

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from flora_tensor import Arrangement, TuckerTensor, feasible_ranks
from flora_torch.moment_starts import context, from_moments
from flora_torch.starts import (
    PRESETS,
    Start,
    default_dtype,
    from_delta,
    from_gradient,
    minor,
    orthonormal,
    principal,
    random_start,
)

__all__ = [
    "DECOMPOSING",
    "INITS",
    "PRESETS",
    "Ranks",
    "Start",
    "context",
    "default_dtype",
    "from_delta",
    "from_gradient",
    "from_moments",
    "minor",
    "needs_values",
    "orthonormal",
    "preset_scale",
    "principal",
    "random_start",
    "resolve_ranks",
    "start_update",
]

Ranks: TypeAlias = int | float | Sequence[int | float | None]

DECOMPOSING = ("from_delta", "from_gradient", "from_moments", "context")
"""The starts that need a tensor for each weight."""

INITS = (*PRESETS, "principal", "minor", *DECOMPOSING)
"""The names of all starts."""


def resolve_ranks(
    ranks: Any, shape: Sequence[int], *, where: str = "resolve_ranks"
) -> tuple[tuple[int | None, ...], tuple[int | None, ...]]:
    """Turn what the user asked for into one rank a mode, lowered to what is feasible.

    Parameters
    ----------
    ranks : int, float or sequence of (int, float or None)
        An integer stands for that rank in every mode; a fraction in (0, 1] for that part of each mode's size, rounded
        up; ``None`` leaves a mode whole, without a factor.
    shape : sequence of int
        The arranged tensor's shape.
    where : str
        Who asks; begins the error messages.

    Returns
    -------
    asked : tuple of (int or None)
        One wish a mode, fractions resolved.
    given : tuple of (int or None)
        The ranks: at most the mode's size and the product of the other ranks.

    Raises
    ------
    ValueError
        If a rank is below 1, a fraction outside (0, 1], or there is not one rank a mode.
    TypeError
        If a rank is neither.

    Examples
    --------
    >>> resolve_ranks(16, (64, 32, 3, 3))
    ((16, 16, 16, 16), (16, 16, 3, 3))
    >>> resolve_ranks((0.25, 8, None), (64, 32, 3))
    ((16, 8, None), (16, 8, None))
    """
    ranks = _plain(ranks)
    if isinstance(ranks, bool | str | bytes) or not isinstance(ranks, int | float | Sequence):
        raise TypeError(f"{where}: ranks is {ranks!r}; pass an integer, a fraction, or one of them a mode")
    wishes = [ranks] * len(shape) if isinstance(ranks, int | float) else list(ranks)
    if len(wishes) != len(shape):
        raise ValueError(
            f"{where}: {len(wishes)} ranks for {len(shape)} modes of shape {tuple(shape)}; pass one a mode"
        )
    asked = tuple(_one_rank(where, wish, size, mode) for mode, (wish, size) in enumerate(zip(wishes, shape)))
    feasible = feasible_ranks([n if r is None else r for r, n in zip(asked, shape)], shape)
    return asked, tuple(None if r is None else f for r, f in zip(asked, feasible))


def _plain(value: Any) -> Any:
    """Return the numbers of an array, a tensor or a scalar of theirs as Python's own."""
    return value.tolist() if hasattr(value, "tolist") else value


def _one_rank(where: str, wish: Any, size: int, mode: int) -> int | None:
    wish = _plain(wish)
    if wish is None:
        return None
    if isinstance(wish, bool) or not isinstance(wish, int | float):
        raise TypeError(f"{where}: the rank for mode {mode} is {wish!r}; pass an integer, a fraction or None")
    if isinstance(wish, float):
        if not 0.0 < wish <= 1.0:
            raise ValueError(
                f"{where}: the fraction {wish} for mode {mode}; pass one above 0 and at most 1, or an integer"
            )
        return max(1, math.ceil(wish * size))
    if wish < 1:
        raise ValueError(f"{where}: rank {wish} for mode {mode}; pass at least 1 and at most {size}")
    return wish


def preset_scale(preset: str, alpha: float, rank: int) -> float:
    """Return the multiplier s that a published code makes of its ``alpha`` and its rank r.

    Parameters
    ----------
    preset : str
        ``"loralib"`` (s = α / (r + 1e-5)), ``"peft"`` (s = α / r) or ``"official"`` (s = α).
    alpha : float
        α.
    rank : int
        r; for several ranks the largest that was asked for.

    Returns
    -------
    float
        s.

    Raises
    ------
    ValueError
        If the preset knows no α.

    Examples
    --------
    >>> preset_scale("peft", 16.0, 8)
    2.0
    """
    rules = {"official": alpha, "loralib": alpha / (rank + 1e-5), "peft": alpha / rank}
    if preset not in rules:
        known = "'official', 'loralib' or 'peft'"
        raise ValueError(f"alpha belongs to init {known}, not to {preset!r}; pass scale instead")
    return rules[preset]


def needs_values(init: str) -> bool:
    """Tell whether a start depends on the weight's entries, and not on its shape and a given tensor alone.

    Examples
    --------
    >>> needs_values("orthonormal"), needs_values("principal")
    (False, True)
    """
    return init not in (*PRESETS, "from_delta", "from_gradient", "from_moments")


def start_update(
    weight: Tensor,
    ranks: Sequence[int | None],
    *,
    init: str = "orthonormal",
    arrangement: Arrangement | None = None,
    scale: float = 1.0,
    dtype: torch.dtype | None = None,
    generator: torch.Generator | None = None,
    tensor: Tensor | TuckerTensor | None = None,
    axes: str | None = None,
) -> Start:
    """Start an update for a weight in the way that ``init`` names.

    Parameters
    ----------
    weight : Tensor, any shape
        The weight.
    ranks : sequence of (int or None)
        One a mode of the arranged weight.
    init : str
        One of `INITS`: a key of `PRESETS`, or ``"from_delta"``, ``"principal"``, ``"minor"``, ``"from_gradient"``,
        ``"from_moments"``, ``"context"``.
    arrangement : Arrangement, optional
        Which axes form a mode.
    scale : float
        The update's s.
    dtype : torch.dtype, optional
        The update's type; by default `default_dtype` of the weight's.
    generator : torch.Generator, optional
        For the random starts.
    tensor : Tensor of the weight's shape, or TuckerTensor, optional
        The change or the gradient that ``"from_delta"`` and ``"from_gradient"`` decompose; or the input's second
        moment, (I, I) or (I,), for ``"from_moments"`` and ``"context"``.
    axes : str, optional
        The weight's axes that a moment is over; by default as its size tells.

    Returns
    -------
    Start
        The start, on the weight's device.

    Raises
    ------
    ValueError
        If there is no such ``init``, or ``tensor`` is missing, not wanted, or not of the weight's shape.

    Examples
    --------
    >>> start_update(torch.eye(4), (2, 2), init="official").tucker.ranks
    (2, 2)
    """
    arrangement = arrangement or Arrangement.native(weight.dim())
    dtype = dtype or default_dtype(weight.dtype)
    _check_start_tensor(init, tensor, weight, arrangement)
    shape, device = tuple(weight.shape), weight.device
    if init in PRESETS:
        return Start(
            random_start(arrangement.shape(shape), ranks, init, dtype=dtype, device=device, generator=generator)
        )
    if init in ("principal", "minor"):
        part = principal if init == "principal" else minor
        return part(weight, ranks, arrangement=arrangement, scale=scale, dtype=dtype)
    assert tensor is not None
    tensor = tensor.map(lambda a: a.to(device)) if isinstance(tensor, TuckerTensor) else tensor.to(device)
    if init == "from_delta":
        return Start(from_delta(tensor, ranks, arrangement=arrangement, scale=scale, dtype=dtype))
    if init == "from_gradient":
        return Start(from_gradient(tensor, ranks, arrangement=arrangement, dtype=dtype))
    assert isinstance(tensor, Tensor)
    if init == "context":
        return context(weight, ranks, tensor, axes=axes, arrangement=arrangement, scale=scale, dtype=dtype)
    options: dict[str, Any] = {"dtype": dtype, "device": device, "generator": generator}
    return Start(from_moments(shape, ranks, tensor, axes=axes, arrangement=arrangement, **options))


def _check_start_tensor(
    init: str, tensor: Tensor | TuckerTensor | None, weight: Tensor, arrangement: Arrangement
) -> None:
    if init not in INITS:
        raise ValueError(f"init: there is no start {init!r}; pass one of {', '.join(map(repr, INITS))}")
    if init not in DECOMPOSING and tensor is not None:
        raise ValueError(f"init: {init!r} decomposes no tensor; pass init='from_delta', or leave the tensor out")
    if init in DECOMPOSING and tensor is None:
        raise ValueError(f"init: {init!r} needs the tensor to decompose; pass one of shape {tuple(weight.shape)}")
    if tensor is None:
        return
    if init in ("from_moments", "context"):
        # The starts themselves check a moment's size, which depends on the axes that it is over.
        if isinstance(tensor, TuckerTensor):
            raise ValueError(f"init: {init!r} got a Tucker tensor; pass the second moment of the weight's input")
        return
    wanted = arrangement.shape(tuple(weight.shape)) if isinstance(tensor, TuckerTensor) else tuple(weight.shape)
    if tuple(tensor.shape) != wanted:
        raise ValueError(
            f"init: {init!r} got a tensor of shape {tuple(tensor.shape)} for a weight of shape {wanted}; "
            "pass one of the weight's shape"
        )
