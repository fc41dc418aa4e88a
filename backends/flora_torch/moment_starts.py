"""Starts that know what the layer's input is like: its second moment C = E[x xᵀ] as `collect_moments` takes it.

A moment is over some axes of the weight. A mode of the arranged weight that is made of such axes only has a moment of
its own, the trace of C over the others: all of C for ``o (i h w)``, and for ``o i h w`` one for the channels and one
for each axis of the kernel, which together stand for C as a Kronecker product would.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

import flora_tensor as ft
from flora_tensor import Arrangement, Moments, TuckerTensor
from flora_torch.starts import PRESETS, Start, default_dtype, from_delta, in_float64, start_at

__all__ = ["context", "from_moments", "mode_moments", "moment_ranks"]

# Directions whose share of the input is below this part of the largest are weighed as if they had it.
FLOOR = 1e-6


def mode_moments(
    shape: Sequence[int], moment: Tensor, axes: str | None = None, *, arrangement: Arrangement | None = None
) -> list[Tensor | None]:
    """Return the input's second moment along each mode of an arranged weight.

    Parameters
    ----------
    shape : sequence of int
        The weight's shape.
    moment : Tensor, shape (I, I) or (I,)
        C over the weight's input axes, flattened in C order; or its diagonal.
    axes : str, optional
        These axes, by their standard names; by default all but the first, or the second alone, as the size tells.
    arrangement : Arrangement, optional
        Which axes form a mode.

    Returns
    -------
    list of (Tensor or None), shapes (I_n, I_n) or (I_n,)
        In float64; ``None`` for a mode with an axis that the moment is not over.

    Raises
    ------
    ValueError
        If the moment does not fit the shape, is not finite, or no mode has one.

    Examples
    --------
    >>> full = torch.eye(18)
    >>> [None if c is None else float(c[0, 0]) for c in mode_moments((4, 2, 3, 3), full)]
    [None, 9.0, 6.0, 6.0]
    """
    arrangement = arrangement or Arrangement.native(len(shape))
    names, sizes = _moment_axes(tuple(shape), moment, axes, arrangement)
    if not bool(torch.isfinite(moment).all()):
        raise ValueError("init: the moment has NaN or infinite entries; collect it anew")
    # A tensor with each axis once (a diagonal) or twice.
    split = in_float64(moment.detach()).reshape(tuple(sizes) * moment.dim())
    found = [_reduced(split, names, group) if set(group) <= set(names) else None for group in arrangement.right]
    if all(each is None for each in found):
        raise ValueError(
            f"init: no mode of {arrangement.pattern!r} is made of the axes {' '.join(names)!r} alone, which the moment "
            "is over; choose another arrangement, or collect the moments of whole patches"
        )
    return found


def _moment_axes(
    shape: tuple[int, ...], moment: Tensor, axes: str | None, arrangement: Arrangement
) -> tuple[list[str], list[int]]:
    """Return the names that the arrangement has for a moment's axes, and their sizes."""
    standard = Arrangement.native(len(shape)).pattern.split()
    if axes is None:
        whole = " ".join(standard[1:])
        axes = whole if len(moment) == math.prod(shape[1:]) else standard[1]
    known = [name for name in axes.split() if name in standard]
    total = math.prod([shape[standard.index(name)] for name in known])
    if known != axes.split() or not known or moment.dim() > 2 or tuple(moment.shape) != (total,) * moment.dim():
        raise ValueError(
            f"init: a moment of shape {tuple(moment.shape)} over the axes {axes!r} of a weight of shape {shape}; "
            f"pass one over some of {' '.join(standard)!r}, square or a diagonal"
        )
    names: list[str] = []
    sizes: list[int] = []
    for position in (standard.index(name) for name in known):
        group = arrangement.left[position]
        given = math.prod([arrangement.sizes.get(name, 1) for name in group])
        names += group
        # At most one size of a group is not given, and follows from the others.
        sizes += [arrangement.sizes.get(name, shape[position] // given) for name in group]
    return names, sizes


def _reduced(split: Tensor, names: list[str], group: tuple[str, ...]) -> Tensor:
    """Take the trace over the axes that are not in a group, and flatten those that are."""
    rows = {name: chr(ord("a") + k) for k, name in enumerate(names)}
    if split.dim() == len(names):
        kept = "".join(rows[name] for name in group)
        return torch.einsum(f"{''.join(rows.values())}->{kept}", split).reshape(-1)
    columns = {name: rows[name].upper() if name in group else rows[name] for name in names}
    kept = "".join([rows[name] for name in group] + [columns[name] for name in group])
    reduced = torch.einsum(f"{''.join(rows.values())}{''.join(columns.values())}->{kept}", split)
    return reduced.reshape(math.isqrt(reduced.numel()), -1)


def from_moments(
    shape: Sequence[int],
    ranks: Sequence[int | None],
    moment: Tensor,
    *,
    axes: str | None = None,
    arrangement: Arrangement | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
) -> TuckerTensor:
    """Let the factors of the input's modes span its leading directions, beside a zero core.

    No other factor of these ranks lets more of the input's energy through. The modes of the output get random
    orthonormal factors. Ranks are as they are given; `moment_ranks` moves them between layers, as EVA does.

    Parameters
    ----------
    shape : sequence of int
        The weight's shape.
    ranks : sequence of (int or None)
        One a mode of the arranged weight; ``None`` leaves the mode whole.
    moment : Tensor, shape (I, I) or (I,)
        The input's second moment. The leading directions of a diagonal are unit vectors.
    axes : str, optional
        The weight's axes that it is over; by default as its size tells.
    arrangement : Arrangement, optional
        Which axes form a mode.
    dtype, device, generator
        As for `flora_torch.initialize.random_start`.

    Returns
    -------
    TuckerTensor
        Zero, with orthonormal factors.

    Raises
    ------
    ValueError
        As for `mode_moments`.

    References
    ----------
    Paischer et al., *EVA: parameter efficient fine-tuning via explained variance adaptation*, arXiv 2410.07170, section
    3, for matrices; there of the covariance, here of the second moment, as no bias takes the mean up.

    Examples
    --------
    >>> start = from_moments((3, 4), (2, 1), torch.diag(torch.tensor([1.0, 5.0, 2.0, 0.0])))
    >>> start.factors[1].flatten().tolist()
    [0.0, 1.0, 0.0, 0.0]
    """
    arrangement = arrangement or Arrangement.native(len(shape))
    device = torch.get_default_device() if device is None else device
    arranged = arrangement.shape(tuple(shape))
    factors: list[Tensor | None] = []
    for size, rank, known in zip(
        arranged, ranks, mode_moments(shape, moment, axes, arrangement=arrangement), strict=True
    ):
        if rank is None or rank == size:
            factors.append(None)
            continue
        factor = PRESETS["orthonormal"](size, rank, generator) if known is None else _leading(known, rank)
        factors.append(factor.to(device=device, dtype=dtype).contiguous())
    core = torch.zeros([n if r is None else r for r, n in zip(ranks, arranged)], dtype=dtype, device=device)
    return TuckerTensor(core, tuple(factors))


def _leading(moment: Tensor, rank: int) -> Tensor:
    if moment.dim() == 1:
        order = torch.sort(moment, descending=True, stable=True).indices[:rank]
        return torch.zeros(len(moment), rank, dtype=moment.dtype, device=moment.device).index_put_(
            (order, torch.arange(rank, device=moment.device)), torch.ones((), dtype=moment.dtype, device=moment.device)
        )
    vectors = torch.linalg.eigh(moment).eigenvectors.flip(-1)[:, :rank]
    # The sign of an eigenvector is the solver's whim: the largest entry is made positive.
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return vectors * torch.where(largest < 0, -1.0, 1.0)


def context(
    weight: Tensor,
    ranks: Sequence[int | None],
    moment: Tensor,
    *,
    axes: str | None = None,
    arrangement: Arrangement | None = None,
    scale: float = 1.0,
    dtype: torch.dtype | None = None,
) -> Start:
    """Train the part of the weight that matters most for the outputs on this input.

    Where ``principal`` approximates W, this approximates W C^½, whose norm is that of the outputs: along each mode n
    that has a moment, the weight is multiplied by C_n^½, decomposed, and divided by it again. For a matrix, T then has
    the smallest output error E‖(W − s T) x‖² of all with its ranks; with several such modes, in the norm of ⊗ C_n.

    Parameters
    ----------
    weight : Tensor, any shape
        W.
    ranks : sequence of (int or None)
        One a mode of the arranged weight; ``None`` leaves the mode whole.
    moment : Tensor, shape (I, I) or (I,)
        The second moment C of the weight's input. Eigenvalues below 1e-6 of the largest count as that much, so that
        directions that the data never showed stay defined.
    axes : str, optional
        The weight's axes that it is over; by default as its size tells.
    arrangement, scale, dtype
        As for `flora_torch.initialize.from_delta`.

    Returns
    -------
    Start
        T and T_start, equal, as for `flora_torch.initialize.principal`.

    Raises
    ------
    ValueError
        As for `mode_moments` and `flora_torch.initialize.from_delta`.

    References
    ----------
    Yang et al., *CorDA: context-oriented decomposition adaptation*, NeurIPS 2024, arXiv 2406.05223, equations 1 to 4,
    which multiply by C in the place of C^½; Wang et al., *SVD-LLM*, ICLR 2025, arXiv 2403.07378, for the root.

    Examples
    --------
    >>> start = context(torch.diag(torch.tensor([3.0, 2.0])), (1, 1), torch.diag(torch.tensor([1.0, 4.0])))
    >>> [round(float(x), 4) for x in start.tucker.to_tensor().diagonal()]
    [0.0, 2.0]
    """
    arrangement = arrangement or Arrangement.native(weight.dim())
    moments = mode_moments(tuple(weight.shape), moment, axes, arrangement=arrangement)
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        work = in_float64(arrangement.arrange(weight.detach()))
        roots = [None if known is None else _roots(known) for known in moments]
        for mode, root in enumerate(roots):
            work = work if root is None else ft.mode_dot(work, root[0], mode)
        tucker = from_delta(work, ranks, scale=scale)
        core, factors = tucker.core, list(tucker.factors)
        for mode, root in enumerate(roots):
            if root is not None:
                core, factors[mode] = _multiplied(core, factors[mode], root[1], mode)
        chosen = dtype or default_dtype(weight.dtype)
        return start_at(TuckerTensor(core, tuple(factors)).map(lambda a: a.to(weight.device, chosen).contiguous()))


def _roots(moment: Tensor) -> tuple[Tensor, Tensor]:
    """Return C^½ and C^-½, small eigenvalues lifted to `FLOOR` of the largest; the identity for a zero moment."""
    if moment.dim() == 1:
        values, vectors = moment, torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    else:
        values, vectors = torch.linalg.eigh(moment)
    largest = float(values.max())
    values = torch.ones_like(values) if largest <= 0.0 else values.clamp(min=FLOOR * largest)
    return (vectors * values.sqrt()) @ vectors.mT, (vectors * values.rsqrt()) @ vectors.mT


def _multiplied(core: Tensor, factor: Tensor | None, matrix: Tensor, mode: int) -> tuple[Tensor, Tensor | None]:
    """Multiply one mode of a Tucker tensor by a matrix, and keep its factor orthonormal."""
    if factor is None:
        return ft.mode_dot(core, matrix, mode), None
    orthonormal, upper = torch.linalg.qr(matrix @ factor)
    return ft.mode_dot(core, upper, mode), orthonormal


def moment_ranks(moments: Moments, rank: int, *, max_rank: int | None = None) -> dict[str, int]:
    """Spread ranks over weights: each goes to where the next direction explains the largest share of a layer's input.

    There are as many as ``rank`` for each weight would be, and of all choices with as many this one has the largest sum
    of explained shares. A weight that gets none is left out.

    Parameters
    ----------
    moments : Moments
        The second moments of the weights' inputs, as `flora_torch.collect_moments` gives them.
    rank : int
        How many directions a weight has on average.
    max_rank : int, optional
        The most that one has; by default twice ``rank``.

    Returns
    -------
    dict of str to int
        The rank of each weight, for `attach` as ``ranks``, and its keys as ``target_parameters``.

    Raises
    ------
    ValueError
        If there are no moments, or a rank is below one.

    References
    ----------
    Paischer et al., *EVA: parameter efficient fine-tuning via explained variance adaptation*, arXiv 2410.07170, section
    3, with ρ = ``max_rank`` / ``rank``.

    Examples
    --------
    >>> flat, steep = torch.eye(4), torch.diag(torch.tensor([6.0, 2.0, 1.0, 1.0]))
    >>> names = ("flat", "steep")
    >>> moments = Moments(dict(zip(names, (flat, steep))), dict.fromkeys(names, "i"), dict.fromkeys(names, 9))
    >>> moment_ranks(moments, 2)
    {'flat': 3, 'steep': 1}
    """
    most = 2 * rank if max_rank is None else max_rank
    if not moments or rank < 1 or most < 1:
        raise ValueError(
            f"moment_ranks: {len(moments)} moments, rank {rank} and max_rank {most}; pass at least one of each"
        )
    gains: list[tuple[float, str]] = []
    for name, moment in moments.items():
        given = in_float64(torch.as_tensor(moment))
        energies = (given if given.dim() == 1 else torch.linalg.eigvalsh(given)).clamp(min=0.0)
        shares = energies / energies.sum().clamp(min=torch.finfo(torch.float64).tiny)
        gains += [(share, name) for share in shares.sort(descending=True).values[:most].tolist()]
    # The sort is stable: of equal shares the first weight's comes first.
    chosen = [name for _, name in sorted(gains, key=lambda gain: -gain[0])[: rank * len(moments)]]
    return {name: chosen.count(name) for name in moments if name in chosen}
