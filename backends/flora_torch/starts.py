"""Where an update starts: random factors and a zero core, or the Tucker decomposition of something known.

Each start takes a weight or its shape, the arrangement and the wanted ranks, and gives a Tucker tensor of the arranged
shape; or a `Start`, with a second one that is subtracted from it for ever, so that training starts at the model.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

import flora_tensor as ft
from flora_tensor import Arrangement, TuckerTensor, feasible_ranks

__all__ = [
    "PRESETS",
    "Start",
    "default_dtype",
    "from_delta",
    "from_gradient",
    "in_float64",
    "minor",
    "orthonormal",
    "principal",
    "random_start",
    "start_at",
]


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
        raise ValueError(f"random_start: there is no start {preset!r}; pass one of {', '.join(map(repr, PRESETS))}")
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


def from_delta(
    delta: Tensor | TuckerTensor,
    ranks: Sequence[int | None],
    *,
    arrangement: Arrangement | None = None,
    scale: float = 1.0,
    dtype: torch.dtype | None = None,
) -> TuckerTensor:
    """Decompose a known change of the weight: the update starts at its best approximation of these ranks.

    Parameters
    ----------
    delta : Tensor of the weight's shape, or TuckerTensor of the arranged shape
        ΔW, for example the difference of two checkpoints; or one that is decomposed already, to these ranks or more.
    ranks : sequence of (int or None)
        One a mode of the arranged tensor; ``None`` leaves the mode whole.
    arrangement : Arrangement, optional
        Which axes form a mode; not applied to a Tucker tensor.
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
    known = delta.core if isinstance(delta, TuckerTensor) else delta
    # Autocast would take the products in 16 bits.
    with torch.no_grad(), torch.autocast(known.device.type, enabled=False):
        # Rounded once at the end: 16-bit factors would have lost their orthonormality before the core is taken.
        wide = default_dtype(known.dtype)
        if isinstance(delta, TuckerTensor):
            tucker = _rounded(delta.map(lambda a: a.detach().to(wide)), ranks)
        else:
            work = _arranged(delta, arrangement).to(wide)
            tucker = ft.tucker(work, _sizes(ranks, work.shape)).tucker
        tucker = _whole_modes(tucker, ranks)
        tucker = TuckerTensor(tucker.core / scale, tucker.factors)
        return tucker.map(lambda a: a.to(dtype or wide).contiguous().clone())


def _arranged(tensor: Tensor, arrangement: Arrangement | None) -> Tensor:
    return tensor.detach() if arrangement is None else arrangement.arrange(tensor.detach())


def in_float64(tensor: Tensor) -> Tensor:
    """Return a tensor in float64, on the CPU where its own device has no such type.

    Examples
    --------
    >>> in_float64(torch.ones(2)).dtype
    torch.float64
    """
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).to(torch.float64)


def _sizes(ranks: Sequence[int | None], shape: Sequence[int]) -> tuple[int, ...]:
    return feasible_ranks([n if r is None else r for r, n in zip(ranks, shape, strict=True)], shape)


def _rounded(tucker: TuckerTensor, ranks: Sequence[int | None]) -> TuckerTensor:
    """Lower the ranks of something that was decomposed before; it cannot be decomposed to more than it has."""
    wanted = _sizes(ranks, tucker.shape)
    if any(r > given for r, given in zip(wanted, tucker.ranks)):
        raise ValueError(
            f"from_delta: ranks {wanted} of a Tucker tensor that has {tucker.ranks}; pass it with as many or more, or "
            "ask for fewer"
        )
    return ft.round_tucker(tucker, ranks=wanted)


def _whole_modes(tucker: TuckerTensor, ranks: Sequence[int | None]) -> TuckerTensor:
    """Multiply square factors into the core and drop them, and those of modes that ``ranks`` leaves whole."""
    core, factors = tucker.core, list(tucker.factors)
    for mode, factor in enumerate(factors):
        if factor is not None and (ranks[mode] is None or factor.shape[0] == factor.shape[1]):
            core, factors[mode] = ft.mode_dot(core, factor, mode), None
    return TuckerTensor(core, tuple(factors))


def start_at(tucker: TuckerTensor) -> Start:
    """Return the start whose T and T_start are both ``tucker``, so that the update is exactly zero.

    Examples
    --------
    >>> start_at(TuckerTensor(torch.ones(2, 3), [None, None])).start is None
    True
    """
    # Where every mode is whole, T_start would only shift the core, and is left out.
    if all(u is None for u in tucker.factors):
        return Start(TuckerTensor(torch.zeros_like(tucker.core), tucker.factors))
    return Start(tucker, tucker.map(torch.clone))


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
    weight : Tensor, any shape
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
    Meng, Wang and Zhang, *PiSSA: principal singular values and singular vectors adaptation*, NeurIPS 2024, arXiv
    2404.02948, for matrices.

    Examples
    --------
    >>> start = principal(torch.eye(4), (2, 2))
    >>> bool((start.tucker.core == start.start.core).all())
    True
    """
    return start_at(from_delta(weight, ranks, arrangement=arrangement, scale=scale, dtype=dtype))


def minor(
    weight: Tensor,
    ranks: Sequence[int | None],
    *,
    arrangement: Arrangement | None = None,
    scale: float = 1.0,
    dtype: torch.dtype | None = None,
) -> Start:
    """Train the minor part of the weight: the directions that it uses least, its principal part left alone.

    Each factor spans the last of the min(m, n) left singular vectors of its (m, n) unfolding, and the core is the
    weight's there. They come from the eigenvectors of X_n X_nᵀ in float64, which tell apart singular values above 1e-8
    of the largest; below, any basis of that space is as minor.

    Parameters
    ----------
    weight : Tensor, any shape
        W.
    ranks, arrangement, scale, dtype
        As for `from_delta`.

    Returns
    -------
    Start
        T and T_start, equal, as for `principal`.

    Raises
    ------
    ValueError
        As for `from_delta`.

    References
    ----------
    Wang et al., *MiLoRA: harnessing minor singular components for parameter-efficient LLM finetuning*, NAACL 2025,
    arXiv 2406.09044, for matrices.

    Examples
    --------
    >>> start = minor(torch.diag(torch.tensor([3.0, 2.0, 1.0])), (1, 1))
    >>> [round(float(x), 6) for x in start.tucker.to_tensor().diagonal()]
    [0.0, 0.0, 1.0]
    """
    if scale == 0.0:
        raise ValueError("minor: scale is 0, so that no update can be a part of the weight; pass another scale")
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        work = in_float64(_arranged(weight, arrangement))
        if not bool(torch.isfinite(work).all()):
            raise ValueError("minor: the weight has NaN or infinite entries; repair the model first")
        factors = [
            None if r is None or r >= n else _last_vectors(ft.unfold(work, mode), r)
            for mode, (r, n) in enumerate(zip(ranks, work.shape, strict=True))
        ]
        core = ft.multi_mode_dot(work, factors, transpose=True)
        tucker = TuckerTensor(core / scale, tuple(factors))
        chosen = dtype or default_dtype(weight.dtype)
        return start_at(tucker.map(lambda a: a.to(weight.device, chosen).contiguous()))


def _last_vectors(matrix: Tensor, rank: int) -> Tensor:
    """Return the left singular vectors of the smallest of the min(m, n) singular values."""
    # In ascending order of the eigenvalues, which begin with the zeros that only the shape makes.
    vectors = torch.linalg.eigh(matrix @ matrix.mT).eigenvectors
    first = max(0, matrix.shape[0] - matrix.shape[1])
    return vectors[:, first : first + rank]


def from_gradient(
    gradient: Tensor | TuckerTensor,
    ranks: Sequence[int | None],
    *,
    arrangement: Arrangement | None = None,
    dtype: torch.dtype | None = None,
) -> TuckerTensor:
    """Let the factors span the principal subspaces of a gradient, beside a zero core.

    With a zero core only the core moves at first, along the gradient's own projection: a step of gradient descent of
    length η changes the weight by −η s² P(∇L), with P(∇L) the truncated HOSVD of these ranks. This is why neither sign
    nor size of the gradient matters here, the start is exactly the model, and no base has to be corrected. LoRA-GA has
    no core, so that it starts from nonzero factors scaled for a stable output, and subtracts their product from the
    base; LoRA-One takes the first step itself, which is ``from_delta`` of −η ∇L.

    Parameters
    ----------
    gradient : Tensor of the weight's shape, or TuckerTensor of the arranged shape
        The loss's gradient with respect to the weight; or as `flora_torch.collect_gradients` gives it.
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
    Wang, Yu and Li, *LoRA-GA: low-rank adaptation with gradient approximation*, NeurIPS 2024, arXiv 2407.05000; Zhang
    et al., *LoRA-One*, ICML 2025, arXiv 2502.01235; both for matrices.

    Examples
    --------
    >>> float(from_gradient(torch.eye(4), (2, 2)).core.abs().max())
    0.0
    """
    tucker = from_delta(gradient, ranks, arrangement=arrangement, dtype=dtype)
    return TuckerTensor(torch.zeros_like(tucker.core), tucker.factors)
