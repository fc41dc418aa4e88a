"""Plans of the products with Tucker tensors: which thin steps a layer takes, and what their weights are made of.

A convolution with weight W = G ×_0 U_out ×_1 U_in ×_2 V_1 … is three convolutions in a row: 1×1 by U_in, one of the
kernel's size by the core times its kernel factors, 1×1 by U_out. With groups, U_in and the core are the same for every
group, so the groups are folded into the batch, and U_out is cut by groups. A weight arranged as a matrix, such as
``o (i h w)`` or ``(o h) (i w)``, is two convolutions in a row, each over the kernel axes that its mode holds. All of
it is exact: the small convolutions have no bias, so padding (which copies or zeroes positions, channel by channel)
commutes with the 1×1 products and acts on each spatial axis on its own.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from flora_torch._caching import cached
from flora_torch.chain import Chain
from flora_torch.geometry import ConvGeometry
from flora_torch.step_weights import Made, Product, in_order
from flora_torch.steps import Channels, Columns, Convolve, Lookup, Rows, Step

__all__ = ["Shapes", "Sides", "Split", "conv_chain", "embedding_chain", "linear_chain", "own_convolution"]

# The weight's axes in each of the two modes of a separable kernel.
Split: TypeAlias = tuple[tuple[int, ...], tuple[int, ...]]
# The modes of a matrix that lie on the output's side and on the input's, slowest first.
Sides: TypeAlias = tuple[tuple[int, ...], tuple[int, ...]]
# The core's shape, and each factor's; None for a mode that is left whole.
Shapes: TypeAlias = tuple[tuple[int, ...], tuple[tuple[int, int] | None, ...]]


# What the calls of a thin product take, in multiply-adds.
_CALLS = 2**18


def joins(tokens: int, shapes: Shapes, sides: Sides) -> bool:
    """Tell whether the core of a matrix is multiplied into U_0 first, rather than with every row in between.

    Either way takes r_0 · r_1 multiply-adds, for each output or for each row; joined, it is a product of rows less.

    Examples
    --------
    >>> shapes = ((8, 8), ((512, 8), (256, 8)))
    >>> joins(16, shapes, ((0,), (1,))), joins(16, ((64, 64), ((512, 64), (256, 64))), ((0,), (1,)))
    (True, False)
    """
    core, factors = shapes
    outer, _ = sides
    if len(core) != 2 or len(outer) != 1 or any(f is None for f in factors):
        return False
    (out,) = outer
    rows = full_sizes(shapes)[out]
    # The rank that is left is the input's.
    return core[1 - out] <= core[out] and (rows * math.prod(core) <= _CALLS or rows <= tokens)


@cached
def linear_chain(tokens: int, shapes: Shapes, sides: Sides) -> Chain:
    """Plan y = x ΔWᵀ for a matrix whose rows and columns may be split into several modes, such as heads.

    With one mode a side: by U_1, then by U_0 G; or by U_1, the core and U_0, where that takes fewer multiply-adds.

    The last mode of each side is the one that runs fastest in memory, so its factor multiplies rows. The core times
    all other factors is a small matrix between the two: as many rows as there are heads, times a rank.
    """
    outer, inner = sides
    core, factors = shapes
    full = full_sizes(shapes)
    joined = joins(tokens, shapes, sides)
    steps: list[Step] = []
    made: list[Made] = []
    last_out, last_in = factors[outer[-1]], factors[inner[-1]]
    if last_in is not None:
        n, r = last_in
        steps.append(Columns(math.prod([full[k] for k in inner[:-1]])))
        made.append(Made(1 + inner[-1], (), (n, r), (0, 1), (n, r)))
    rest = (*(outer if joined else outer[:-1]), *inner[:-1])
    sizes = tuple(full[k] if k in rest else core[k] for k in range(len(core)))
    products = in_order(rest, core, factors)
    rows, columns = (math.prod([sizes[k] for k in side]) for side in sides)
    steps.append(Rows())
    made.append(Made(0, products, sizes, (*outer, *inner), (rows, columns)))
    if last_out is not None and not joined:
        n, r = last_out
        steps.append(Rows(math.prod([full[k] for k in outer[:-1]])))
        made.append(Made(1 + outer[-1], (), (n, r), (0, 1), (n, r)))
    return Chain(tuple(steps), tuple(made))


def full_sizes(shapes: Shapes) -> list[int]:
    """Return the sizes of the arranged tensor that a core and factors of these shapes make."""
    return [r if f is None else f[0] for r, f in zip(*shapes)]


@cached
def embedding_chain(shapes: Shapes, padding_idx: int | None) -> Chain:
    """Plan a look-up in U_0, then the core and U_1."""
    core, (table, dim) = shapes
    r0, r1 = core
    steps: list[Step] = [Lookup()]
    if table is None:
        made = [Made(0, (), (r0, r1), (0, 1), (r0, r1))]
    else:
        steps.append(Rows())
        made = [Made(1, (), table, (0, 1), table), Made(0, (), (r0, r1), (1, 0), (r1, r0))]
    if dim is not None:
        steps.append(Rows())
        made.append(Made(2, (), dim, (0, 1), dim))
    rows = r0 if table is None else table[0]
    return Chain(tuple(steps), tuple(made), None if padding_idx is None else padding_idx % rows)


@cached
def conv_chain(shapes: Shapes, geometry: ConvGeometry, split: Split | None, shape: tuple[int, ...]) -> Chain:
    """Plan the convolution of `tucker_conv` or `tucker_conv_transpose`."""
    links = _native_links(shapes, geometry) if split is None else _separable_links(shapes, geometry, split, shape)
    if geometry.transposed:
        links.reverse()
    return Chain(tuple(step for step, _ in links), tuple(made for _, made in links))


@cached
def own_convolution(geometry: ConvGeometry) -> Convolve:
    """Plan the convolution of a layer itself, with the whole of its kernel."""
    return replace(_convolve(geometry, geometry.axes, per_group=True), own=True)


def _native_links(shapes: Shapes, geometry: ConvGeometry) -> list[tuple[Step, Made]]:
    """List 1×1 by U_1, the kernel, 1×1 by U_0, in the order of an ordinary convolution."""
    core, factors = shapes
    first, second = factors[0], factors[1]
    products = in_order(range(2, len(core)), core, factors)
    kernel = (*core[:2], *geometry.kernel)
    links: list[tuple[Step, Made]] = []
    if second is not None:
        links.append(_small(second, 2, geometry, shared=True, by_rank=True))
    # Without U_0 the kernel itself has one part per group.
    step = _convolve(geometry, geometry.axes, per_group=first is None)
    links.append((step, Made(0, products, kernel, tuple(range(len(kernel))), kernel)))
    if first is not None:
        links.append(_small(first, 1, geometry, shared=False, by_rank=False))
    return links


def _small(
    factor: tuple[int, int], source: int, geometry: ConvGeometry, *, shared: bool, by_rank: bool
) -> tuple[Step, Made]:
    """Plan the 1×1 convolution by a factor (channels, rank); ``by_rank`` puts the rank on the kernel's first axis."""
    n, r = factor
    order, matrix = ((1, 0), (r, n)) if by_rank else ((0, 1), (n, r))
    if shared or geometry.groups == 1:
        # As a matrix it is (out, in); a transposed kernel is (in, out).
        if geometry.transposed:
            order, matrix = order[::-1], matrix[::-1]
        return Channels(geometry.groups), Made(source, (), factor, order, matrix)
    ones = (1,) * len(geometry.kernel)
    return _convolve(geometry, (), per_group=True), Made(source, (), factor, order, (*matrix, *ones))


def _separable_links(
    shapes: Shapes, geometry: ConvGeometry, split: Split, shape: Sequence[int]
) -> list[tuple[Step, Made]]:
    """List the two convolutions of a matrix W[(o, a), (i, b)] = Σ A[(o, a), r] B[(i, b), r], that by B first.

    The core goes to the side where it lowers the rank in between.
    """
    core, factors = shapes
    (r0, r1), (first, second) = core, factors
    with_second = first is not None and (second is None or r0 <= r1)
    if with_second:
        ours = _Side(1, (), first is not None, r0)
        theirs = _Side(0, in_order((1,), core, factors), False, r0)
    else:
        ours = _Side(0, in_order((0,), core, factors), True, r1)
        theirs = _Side(-1 if second is None else 2, (), True, r1)
    b = _side_link(theirs, split[1], geometry, shape, second=True)
    a = _side_link(ours, split[0], geometry, shape, second=False)
    return [b, a]


@dataclass(frozen=True)
class _Side:
    """One matrix of a separable kernel: what it is made of, and whether its rank is its last axis or its first."""

    source: int
    products: tuple[Product, ...]
    rank_last: bool
    rank: int


def _side_link(
    side: _Side, axes: tuple[int, ...], geometry: ConvGeometry, shape: Sequence[int], *, second: bool
) -> tuple[Step, Made]:
    """Plan a convolution along the kernel axes of one side, with a kernel (channels, rank, *sizes) or its transpose."""
    sizes = tuple(shape[axis] for axis in axes)
    split = (*sizes, side.rank) if side.rank_last else (side.rank, *sizes)
    offset, rank_axis = (0, len(sizes)) if side.rank_last else (1, 0)
    channel, *rest = sorted(axes)
    position = {axis: offset + axes.index(axis) for axis in axes}
    head = [rank_axis, position[channel]] if second else [position[channel], rank_axis]
    matrix = (side.rank, shape[channel]) if second else (shape[channel], side.rank)
    spatial = tuple(sorted(axis - 2 for axis in rest))
    if not spatial and (second or geometry.groups == 1):
        if geometry.transposed:
            head, matrix = head[::-1], matrix[::-1]
        return Channels(geometry.groups), Made(side.source, side.products, split, tuple(head), matrix)
    order = (*head, *(position[axis] for axis in rest))
    kernel = (*matrix, *(shape[a] if a in rest else 1 for a in range(2, len(shape))))
    return _convolve(geometry, spatial, per_group=not second), Made(side.source, side.products, split, order, kernel)


def _convolve(geometry: ConvGeometry, axes: Sequence[int], *, per_group: bool) -> Convolve:
    """Plan one convolution of the chain, which walks along ``axes`` only."""
    n, pads, padding_mode = len(geometry.kernel), geometry.pads, geometry.padding_mode
    mine = tuple(pads[a] if a in axes else (0, 0) for a in range(n))
    # Symmetric zeros are left to the convolution itself.
    inside = geometry.transposed or (padding_mode == "zeros" and all(before == after for before, after in mine))
    written = not inside and any(before or after for before, after in mine)
    return Convolve(
        stride=tuple(geometry.stride[a] if a in axes else 1 for a in range(n)),
        dilation=tuple(geometry.dilation[a] if a in axes else 1 for a in range(n)),
        padding=tuple(before if inside else 0 for before, _ in mine),
        output_padding=tuple(geometry.output_padding[a] if a in axes and geometry.transposed else 0 for a in range(n)),
        transposed=geometry.transposed,
        groups=geometry.groups if per_group else 1,
        folded=1 if per_group else geometry.groups,
        pads=mine if written else (),
        padding_mode=padding_mode,
    )
