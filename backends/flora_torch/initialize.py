"""Where an update starts: random factors and a zero core, or the Tucker decomposition of something known.

An initialization takes a weight, its arrangement and the wanted ranks, and gives a `Start`: a Tucker tensor of the
arranged shape, and where needed a second one that is subtracted from it for ever, so that training starts at the model.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeAlias

import torch
from torch import Tensor

import flora_tensor as ft
from flora_tensor import Arrangement, TuckerTensor, feasible_ranks

__all__ = [
    "PRESETS",
    "Ranks",
    "Start",
    "default_dtype",
    "from_delta",
    "from_gradient",
    "orthonormal",
    "preset_scale",
    "principal",
    "random_start",
    "resolve_ranks",
    "start_update",
]

Ranks: TypeAlias = int | float | Sequence[int | float | None]


@dataclass(frozen=True)
class Start:
    """An update at its start: ΔW = s · (T − T_start).

    Parameters
    ----------
    tucker : TuckerTensor
        T, whose core and factors are trained.
    start : TuckerTensor, optional
        T_start, which stays; where T is equal to it, the update is exactly zero. ``None`` stands for zero.

    Examples
    --------
    >>> tucker = orthonormal((6, 4), (2, 2))
    >>> Start(tucker).start is None
    True
    """

    tucker: TuckerTensor
    start: TuckerTensor | None = None


def default_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the type of an update for a weight of ``dtype``: float32 for 16-bit floats, else the weight's own.

    Sixteen bits cannot hold the small steps of an optimizer, and float16 parameters break gradient scaling.

    Examples
    --------
    >>> default_dtype(torch.bfloat16)
    torch.float32
    """
    return torch.float32 if dtype.itemsize < 4 else dtype


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


def _one_rank(where: str, wish: Any, size: int, mode: int) -> int | None:
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


def _orthonormal_factor(size: int, rank: int, generator: torch.Generator | None) -> Tensor:
    # The QR factor of a Gaussian matrix spans a uniformly distributed subspace.
    gaussian = torch.randn(size, rank, dtype=torch.float64, device="cpu", generator=generator)
    return torch.linalg.qr(gaussian).Q


def _loralib_factor(size: int, rank: int, generator: torch.Generator | None) -> Tensor:
    return torch.randn(size, rank, dtype=torch.float64, device="cpu", generator=generator) * 0.02


def _official_factor(size: int, rank: int, generator: torch.Generator | None) -> Tensor:
    # kaiming_normal_ with a = √3 on a (size, rank) matrix: variance 2 / ((1 + a²) · rank).
    return torch.randn(size, rank, dtype=torch.float64, device="cpu", generator=generator) * math.sqrt(0.5 / rank)


def _peft_factor(size: int, rank: int, generator: torch.Generator | None) -> Tensor:
    # kaiming_uniform_ with a = √5: the bound is √(6 / ((1 + a²) · rank)) = 1/√rank.
    uniform = torch.rand(size, rank, dtype=torch.float64, device="cpu", generator=generator)
    return (2.0 * uniform - 1.0) / math.sqrt(rank)


PRESETS: Mapping[str, Callable[[int, int, torch.Generator | None], Tensor]] = MappingProxyType(
    {
        "orthonormal": _orthonormal_factor,
        "official": _official_factor,
        "loralib": _loralib_factor,
        "peft": _peft_factor,
    }
)
"""How each random start draws one factor (size, rank); all of them have a zero core, so that the start is the model."""


def random_start(
    shape: Sequence[int],
    ranks: Sequence[int | None],
    preset: str = "orthonormal",
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
) -> TuckerTensor:
    """Draw random factors beside a zero core, so that the update starts at exactly zero.

    ``"orthonormal"`` has gain ‖ΔW‖/‖G‖ = 1 at every size, so that a scale found at one width holds at another. The
    other three are those of the published codes: ``"official"`` (normal, variance 1/(2r); gain √∏(I/2r)),
    ``"loralib"`` (normal, deviation 0.02) and ``"peft"`` (uniform within 1/√r). See `preset_scale` for the scales
    that belong to them.

    Parameters
    ----------
    shape : sequence of int
        The arranged tensor's shape (I_0, …).
    ranks : sequence of (int or None)
        (r_0, …); ``None`` leaves a mode whole. With ``"orthonormal"`` a rank of the mode's size does the same: a square
        factor would add numbers and no tensors.
    preset : str
        A key of `PRESETS`.
    dtype, device
        Of the result. The numbers are drawn in float64 on the CPU, the same for every type and device.
    generator : torch.Generator, optional
        The source of the numbers, on the CPU; by default torch's global one.

    Returns
    -------
    TuckerTensor
        Zero, of shape ``shape``.

    Raises
    ------
    ValueError
        If there is no such preset.

    References
    ----------
    FLoRA, arXiv 2405.14739, section 4, and its published code; He et al., *Delving deep into rectifiers*, ICCV 2015.

    Examples
    --------
    >>> start = random_start((6, 4, 3), (2, 2, 3))
    >>> [None if u is None else tuple(u.shape) for u in start.factors], float(start.core.abs().max())
    ([(6, 2), (4, 2), None], 0.0)
    """
    if preset not in PRESETS:
        raise ValueError(f"random_start: there is no start {preset!r}; pass one of {', '.join(PRESETS)}")
    device = torch.get_default_device() if device is None else device
    square_is_whole = preset == "orthonormal"
    factors: list[Tensor | None] = []
    for size, rank in zip(shape, ranks, strict=True):
        if rank is None or (square_is_whole and rank == size):
            factors.append(None)
        else:
            factors.append(PRESETS[preset](size, rank, generator).to(device=device, dtype=dtype))
    core = torch.zeros([n if r is None else r for r, n in zip(ranks, shape)], dtype=dtype, device=device)
    return TuckerTensor(core, tuple(factors))


def orthonormal(shape: Sequence[int], ranks: Sequence[int | None], **options: Any) -> TuckerTensor:
    """Draw orthonormal factors beside a zero core: `random_start` with its default preset.

    Parameters
    ----------
    shape, ranks
        As for `random_start`.
    **options
        ``dtype``, ``device`` and ``generator``, as for `random_start`.

    Returns
    -------
    TuckerTensor
        Zero, of shape ``shape``, with U_nᵀ U_n = I.

    Examples
    --------
    >>> orthonormal((6, 4), (2, 2)).ranks
    (2, 2)
    """
    return random_start(shape, ranks, "orthonormal", **options)


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


def from_delta(
    delta: Tensor,
    ranks: Sequence[int | None],
    *,
    arrangement: Arrangement | None = None,
    scale: float = 1.0,
    dtype: torch.dtype | None = None,
) -> TuckerTensor:
    """Decompose a known change of the weight: the update starts at its best approximation of these ranks.

    Parameters
    ----------
    delta : Tensor, of the weight's shape
        ΔW, for example the difference of two checkpoints.
    ranks : sequence of (int or None)
        One a mode of the arranged tensor; ``None`` leaves the mode whole.
    arrangement : Arrangement, optional
        Which axes form a mode.
    scale : float
        The update's s; the core is divided by it.
    dtype : torch.dtype, optional
        Of the result; by default `default_dtype` of the delta's.

    Returns
    -------
    TuckerTensor
        T with s · T ≈ ΔW, as `flora_tensor.tucker` gives it; no gradient flows through it.

    Raises
    ------
    ValueError
        If ``scale`` is zero, the delta is not finite, or the ranks do not fit.

    References
    ----------
    De Lathauwer, De Moor and Vandewalle, *A multilinear singular value decomposition*, SIMAX 21 (2000).

    Examples
    --------
    >>> delta = torch.outer(torch.arange(1.0, 5.0), torch.ones(3))
    >>> update = from_delta(delta, (1, 1), scale=2.0)
    >>> bool(torch.allclose(2.0 * update.to_tensor(), delta))
    True
    """
    if scale == 0.0:
        raise ValueError("from_delta: scale is 0, so that no update can be the given change; pass another scale")
    # Autocast would take the products in 16 bits.
    with torch.no_grad(), torch.autocast(delta.device.type, enabled=False):
        arranged = delta.detach() if arrangement is None else arrangement.arrange(delta.detach())
        # Rounded once at the end: 16-bit factors would have lost their orthonormality before the core is taken.
        work = arranged.to(default_dtype(arranged.dtype))
        sizes = feasible_ranks([n if r is None else r for r, n in zip(ranks, work.shape, strict=True)], work.shape)
        tucker = _whole_modes(ft.tucker(work, sizes).tucker, ranks)
        tucker = TuckerTensor(tucker.core / scale, tucker.factors)
        return tucker.map(lambda a: a.to(dtype or work.dtype).contiguous().clone())


def _whole_modes(tucker: TuckerTensor, ranks: Sequence[int | None]) -> TuckerTensor:
    """Multiply square factors into the core and drop them, and those of modes that ``ranks`` leaves whole."""
    core, factors = tucker.core, list(tucker.factors)
    for mode, factor in enumerate(factors):
        if factor is not None and (ranks[mode] is None or factor.shape[0] == factor.shape[1]):
            core, factors[mode] = ft.mode_dot(core, factor, mode), None
    return TuckerTensor(core, tuple(factors))


def principal(
    weight: Tensor,
    ranks: Sequence[int | None],
    *,
    arrangement: Arrangement | None = None,
    scale: float = 1.0,
    dtype: torch.dtype | None = None,
) -> Start:
    """Train the principal part of the weight itself.

    The update is s · (T − T_start) with T = T_start at the start, both the decomposition of the weight. This is the
    update whose base is corrected to W − s · T_start, except that the base keeps its own bits: the start is exactly the
    model, and detaching needs no inverse.

    Parameters
    ----------
    weight : Tensor
        W.
    ranks, arrangement, scale, dtype
        As for `from_delta`.

    Returns
    -------
    Start
        T and T_start. Where every mode is whole, T_start would only shift the core, and is left out.

    Raises
    ------
    ValueError
        As for `from_delta`.

    References
    ----------
    Meng, Wang and Zhang, *PiSSA: principal singular values and singular vectors adaptation*, NeurIPS 2024, for
    matrices.

    Examples
    --------
    >>> start = principal(torch.eye(4), (2, 2))
    >>> bool((start.tucker.core == start.start.core).all())
    True
    """
    tucker = from_delta(weight, ranks, arrangement=arrangement, scale=scale, dtype=dtype)
    if all(u is None for u in tucker.factors):
        return Start(TuckerTensor(torch.zeros_like(tucker.core), tucker.factors))
    return Start(tucker, tucker.map(torch.clone))


def from_gradient(
    gradient: Tensor,
    ranks: Sequence[int | None],
    *,
    arrangement: Arrangement | None = None,
    dtype: torch.dtype | None = None,
) -> TuckerTensor:
    """Let the factors span the principal subspaces of a gradient, beside a zero core.

    The first step on the core then follows the best approximation of the gradient with these ranks.

    Parameters
    ----------
    gradient : Tensor, of the weight's shape
        The loss's gradient with respect to the weight.
    ranks, arrangement, dtype
        As for `from_delta`.

    Returns
    -------
    TuckerTensor
        Zero, with orthonormal factors.

    Raises
    ------
    ValueError
        As for `from_delta`.

    References
    ----------
    Wang, Yu and Li, *LoRA-GA: low-rank adaptation with gradient approximation*, NeurIPS 2024, for matrices.

    Examples
    --------
    >>> float(from_gradient(torch.eye(4), (2, 2)).core.abs().max())
    0.0
    """
    tucker = from_delta(gradient, ranks, arrangement=arrangement, dtype=dtype)
    return TuckerTensor(torch.zeros_like(tucker.core), tucker.factors)


def start_update(
    weight: Tensor,
    ranks: Sequence[int | None],
    *,
    init: str = "orthonormal",
    arrangement: Arrangement | None = None,
    scale: float = 1.0,
    dtype: torch.dtype | None = None,
    generator: torch.Generator | None = None,
    tensor: Tensor | None = None,
) -> Start:
    """Start an update for a weight in the way that ``init`` names.

    Parameters
    ----------
    weight : Tensor
        The weight.
    ranks : sequence of (int or None)
        One a mode of the arranged weight.
    init : str
        A key of `PRESETS`, or ``"from_delta"``, ``"principal"``, ``"from_gradient"``.
    arrangement : Arrangement, optional
        Which axes form a mode.
    scale : float
        The update's s.
    dtype : torch.dtype, optional
        The update's type; by default `default_dtype` of the weight's.
    generator : torch.Generator, optional
        For the random starts.
    tensor : Tensor, optional
        The change or the gradient that ``"from_delta"`` and ``"from_gradient"`` decompose.

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
    _check_start_tensor(init, tensor, weight)
    if init in PRESETS:
        shape = arrangement.shape(tuple(weight.shape))
        return Start(random_start(shape, ranks, init, dtype=dtype, device=weight.device, generator=generator))
    if init == "principal":
        return principal(weight, ranks, arrangement=arrangement, scale=scale, dtype=dtype)
    assert tensor is not None
    tensor = tensor.to(weight.device)
    if init == "from_delta":
        return Start(from_delta(tensor, ranks, arrangement=arrangement, scale=scale, dtype=dtype))
    return Start(from_gradient(tensor, ranks, arrangement=arrangement, dtype=dtype))


def _check_start_tensor(init: str, tensor: Tensor | None, weight: Tensor) -> None:
    if init not in (*PRESETS, "principal", "from_delta", "from_gradient"):
        known = ", ".join([*PRESETS, "principal", "from_delta", "from_gradient"])
        raise ValueError(f"init: there is no start {init!r}; pass one of {known}")
    wanted = init in ("from_delta", "from_gradient")
    if not wanted and tensor is not None:
        raise ValueError(f"init: {init!r} decomposes no tensor; pass init='from_delta', or leave the tensor out")
    if wanted and tensor is None:
        raise ValueError(f"init: {init!r} needs the tensor to decompose; pass one of shape {tuple(weight.shape)}")
    if tensor is not None and tensor.shape != weight.shape:
        raise ValueError(
            f"init: {init!r} got a tensor of shape {tuple(tensor.shape)} for a weight of shape {tuple(weight.shape)}; "
            "pass one of the weight's shape"
        )
