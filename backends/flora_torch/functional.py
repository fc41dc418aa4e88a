"""The product ΔW·x of a Tucker tensor ΔW with the input of a layer, without forming ΔW.

Everything here is a pure function of tensors: no module, no state. A factor that is ``None`` stands for the identity.

A convolution with weight W = G ×_0 U_out ×_1 U_in ×_2 V_1 … is three convolutions in a row: 1×1 by U_in, one of the
kernel's size by the core times its kernel factors, 1×1 by U_out. With groups, U_in and the core are the same for every
group, so the groups are folded into the batch, and U_out is cut by groups. A weight arranged as a matrix, such as
``o (i h w)`` or ``(o h) (i w)``, is two convolutions in a row, each over the kernel axes that its mode holds. All of
it is exact: the small convolutions have no bias, so padding (which copies or zeroes positions, channel by channel)
commutes with the 1×1 products and acts on each spatial axis on its own.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as nnf
from torch import Tensor

from flora_tensor.algebra import contraction_order, multi_mode_dot
from flora_tensor.arrangement import Arrangement

__all__ = [
    "ConvGeometry",
    "Work",
    "dense_delta",
    "tucker_conv",
    "tucker_conv_transpose",
    "tucker_embedding",
    "tucker_linear",
]

Factors: TypeAlias = Sequence[Tensor | None]
Path: TypeAlias = Literal["auto", "factored", "dense"]
Split: TypeAlias = tuple[tuple[int, ...], tuple[int, ...]]

_CONV: dict[int, Callable[..., Tensor]] = {1: nnf.conv1d, 2: nnf.conv2d, 3: nnf.conv3d}
_CONV_TRANSPOSE: dict[int, Callable[..., Tensor]] = {
    1: nnf.conv_transpose1d,
    2: nnf.conv_transpose2d,
    3: nnf.conv_transpose3d,
}

# What writing one element of a fresh tensor costs, in multiply-adds of a large product: the same figure as in
# flora_tensor.algebra, where it orders the mode products.
_WRITE_COST = 32


def tucker_linear(x: Tensor, core: Tensor, factors: Factors, *, transposed: bool = False) -> Tensor:
    """Multiply by a Tucker matrix: y = x ΔWᵀ with ΔW = U_0 G U_1ᵀ.

    Takes tokens · (in · r_1 + r_1 · r_0 + r_0 · out) multiply-adds and forms nothing of ΔW's size.

    Parameters
    ----------
    x : Tensor, shape (…, in)
        The input.
    core : Tensor, shape (r_0, r_1)
        The core G.
    factors : sequence of (Tensor or None)
        U_0 of shape (out, r_0) and U_1 of shape (in, r_1).
    transposed : bool
        The weight is stored as (in, out), as in Hugging Face's ``Conv1D``: y = x ΔW.

    Returns
    -------
    Tensor, shape (…, out)
        The product.

    References
    ----------
    FLoRA, arXiv 2405.14739, for two modes.

    Examples
    --------
    >>> x, core = torch.ones(5, 4), torch.ones(2, 2)
    >>> tucker_linear(x, core, [torch.ones(3, 2), torch.ones(4, 2)]).shape
    torch.Size([5, 3])
    """
    into, out_of = (0, 1) if transposed else (1, 0)
    u_in, u_out = factors[into], factors[out_of]
    if u_in is not None:
        x = nnf.linear(x, u_in.mT)
    x = nnf.linear(x, core.mT if transposed else core)
    return x if u_out is None else nnf.linear(x, u_out)


def tucker_embedding(ids: Tensor, core: Tensor, factors: Factors, *, padding_idx: int | None = None) -> Tensor:
    """Look up rows of a Tucker matrix ΔW = U_0 G U_1ᵀ.

    Parameters
    ----------
    ids : Tensor of integers, any shape
        The rows.
    core : Tensor, shape (r_0, r_1)
        The core G.
    factors : sequence of (Tensor or None)
        U_0 of shape (rows, r_0) and U_1 of shape (dim, r_1).
    padding_idx : int, optional
        A row that gets no gradient, as in `torch.nn.functional.embedding`; its value is looked up like any other.

    Returns
    -------
    Tensor, shape (*ids.shape, dim)
        The rows.

    References
    ----------
    FLoRA, arXiv 2405.14739, for two modes.

    Examples
    --------
    >>> rows = tucker_embedding(torch.tensor([0, 2]), torch.ones(1, 1), [torch.tensor([[1.0], [2.0], [3.0]]), None])
    >>> rows.tolist()
    [[1.0], [3.0]]
    """
    table, u_dim = factors
    rows = nnf.embedding(ids, core, padding_idx) if table is None else nnf.linear(nnf.embedding(ids, table), core.mT)
    rows = rows if u_dim is None else nnf.linear(rows, u_dim)
    if padding_idx is None:
        return rows
    # Cutting only the row of U_0 off would still let these positions move the core and U_1.
    return torch.where((ids == padding_idx % _rows(core, table)).unsqueeze(-1), rows.detach(), rows)


def _rows(core: Tensor, table: Tensor | None) -> int:
    return core.shape[0] if table is None else table.shape[0]


def dense_delta(
    core: Tensor,
    factors: Factors,
    *,
    arrangement: Arrangement | None = None,
    shape: Sequence[int] | None = None,
) -> Tensor:
    """Form ΔW, in the weight's own shape.

    Computed with autocast off: a small change that is rounded to 16 bits on the way would lose most of itself.

    Parameters
    ----------
    core : Tensor, shape (r_0, …)
        The core.
    factors : sequence of (Tensor or None)
        One factor a mode of the arranged tensor.
    arrangement : Arrangement, optional
        Which axes of the weight form a mode; by default each its own.
    shape : sequence of int, optional
        The weight's shape; needed with an arrangement that is not native.

    Returns
    -------
    Tensor, shape ``shape``
        The dense change.

    Raises
    ------
    ValueError
        If the arrangement does not make the tensor's shape of ``shape``.

    Examples
    --------
    >>> core, factors = torch.ones(1, 1), [torch.ones(6, 1), torch.ones(4, 1)]
    >>> dense_delta(core, factors, arrangement=Arrangement("(o h) (i w)"), shape=(3, 2, 2, 2)).shape
    torch.Size([3, 2, 2, 2])
    """
    with torch.autocast(core.device.type, enabled=False):
        tensor: Tensor = multi_mode_dot(core, list(factors))
        if arrangement is None or arrangement.is_native:
            return tensor
        return arrangement.restore(tensor, tuple(tensor.shape) if shape is None else tuple(shape))


@dataclass(frozen=True)
class ConvGeometry:
    """How a convolution walks over its input: everything but the weight and the bias.

    Parameters
    ----------
    kernel : tuple of int
        The kernel's sizes, one a spatial axis.
    stride, dilation, output_padding : tuple of int
        In positions, one a spatial axis. ``output_padding`` is for transposed convolutions.
    padding : tuple of int, "same" or "valid"
        Positions added on both sides of each spatial axis.
    groups : int
        How many groups the channels fall into.
    padding_mode : str
        "zeros", "reflect", "replicate" or "circular".
    transposed : bool
        A transposed convolution, whose weight is (in, out/groups, *kernel).

    Examples
    --------
    >>> geometry = ConvGeometry((3, 3), (2, 2), (1, 1), (1, 1))
    >>> geometry.output_sizes((8, 8))
    (4, 4)
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[int, ...] | str
    groups: int = 1
    padding_mode: str = "zeros"
    output_padding: tuple[int, ...] = ()
    transposed: bool = False
    # (before, after) of each axis; derived once, since "same" may need one position more after than before.
    pads: tuple[tuple[int, int], ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if isinstance(self.padding, str):
            totals = [d * (k - 1) if self.padding == "same" else 0 for d, k in zip(self.dilation, self.kernel)]
            pads = tuple((total // 2, total - total // 2) for total in totals)
        else:
            pads = tuple((p, p) for p in self.padding)
        object.__setattr__(self, "pads", pads)

    @property
    def axes(self) -> tuple[int, ...]:
        """The numbers of the spatial axes, from 0."""
        return tuple(range(len(self.kernel)))

    def output_sizes(self, sizes: Sequence[int]) -> tuple[int, ...]:
        """Return the output's spatial sizes for an input with spatial ``sizes``."""
        extra = self.output_padding or (0,) * len(self.kernel)
        result: list[int] = []
        for a, n in enumerate(sizes):
            before, after = self.pads[a]
            reach = self.dilation[a] * (self.kernel[a] - 1) + 1
            if self.transposed:
                result.append((n - 1) * self.stride[a] - before - after + reach + extra[a])
            else:
                result.append((n + before + after - reach) // self.stride[a] + 1)
        return tuple(result)


def tucker_conv(
    x: Tensor,
    core: Tensor,
    factors: Factors,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
    arrangement: Arrangement | None = None,
    shape: Sequence[int] | None = None,
) -> Tensor:
    """Convolve with a Tucker kernel, in one to three dimensions, without forming the kernel.

    Parameters
    ----------
    x : Tensor, shape (batch, in, *sizes) or (in, *sizes)
        The input.
    core : Tensor, shape (r_0, r_1, *kernel ranks), or (r_0, r_1) with an arrangement of two modes
        The core.
    factors : sequence of (Tensor or None)
        U_0 (out, r_0), U_1 (in/groups, r_1) and one factor per kernel axis; or one per mode of the arrangement.
    stride, padding, dilation, groups, padding_mode
        As `torch.nn.Conv2d` takes them, ``padding="same"`` and ``"valid"`` included.
    arrangement : Arrangement, optional
        The native one by default; or one with two modes, of which the first holds the weight's first axis and the
        second its second, such as ``o (i h w)`` and ``(o h) (i w)``.
    shape : sequence of int, optional
        The weight's shape (out, in/groups, *kernel); needed with an arrangement.

    Returns
    -------
    Tensor, shape (batch, out, *output sizes) or (out, *output sizes)
        The convolution, without a bias.

    Raises
    ------
    ValueError
        If the arrangement has no factored form, or needs ``shape`` and there is none.

    References
    ----------
    Kim et al., *Compression of deep convolutional neural networks for fast and low power mobile applications*, ICLR
    2016, for the three steps; Jaderberg et al., *Speeding up convolutional neural networks with low rank expansions*,
    BMVC 2014, for the separable form.

    Examples
    --------
    >>> x, core = torch.ones(1, 4, 8, 8), torch.ones(2, 2, 1, 1)
    >>> factors = [torch.ones(6, 2), torch.ones(4, 2), torch.ones(3, 1), torch.ones(3, 1)]
    >>> tucker_conv(x, core, factors, stride=2, padding=1).shape
    torch.Size([1, 6, 4, 4])
    """
    shape = _weight_shape("tucker_conv", core, factors, arrangement, shape)
    n = len(shape) - 2
    pad = padding if isinstance(padding, str) else _per_axis(padding, n)
    geometry = ConvGeometry(
        tuple(shape[2:]), _per_axis(stride, n), _per_axis(dilation, n), pad, groups, padding_mode, (0,) * n
    )
    return apply_conv(x, core, factors, geometry, _require_split("tucker_conv", arrangement), shape)


def tucker_conv_transpose(
    x: Tensor,
    core: Tensor,
    factors: Factors,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
    arrangement: Arrangement | None = None,
    shape: Sequence[int] | None = None,
) -> Tensor:
    """Convolve, transposed, with a Tucker kernel, in one to three dimensions, without forming the kernel.

    Parameters
    ----------
    x : Tensor, shape (batch, in, *sizes) or (in, *sizes)
        The input.
    core : Tensor, shape (r_0, r_1, *kernel ranks), or (r_0, r_1) with an arrangement of two modes
        The core.
    factors : sequence of (Tensor or None)
        U_0 (in, r_0), U_1 (out/groups, r_1) and one factor per kernel axis; or one per mode of the arrangement.
    stride, padding, output_padding, groups, dilation
        As `torch.nn.ConvTranspose2d` takes them.
    arrangement : Arrangement, optional
        As for `tucker_conv`; its first axis is the weight's first, the input channels.
    shape : sequence of int, optional
        The weight's shape (in, out/groups, *kernel); needed with an arrangement.

    Returns
    -------
    Tensor, shape (batch, out, *output sizes) or (out, *output sizes)
        The transposed convolution, without a bias.

    Raises
    ------
    ValueError
        If the arrangement has no factored form, or needs ``shape`` and there is none.

    References
    ----------
    As for `tucker_conv`, whose steps are taken in the opposite order.

    Examples
    --------
    >>> x, core = torch.ones(1, 4, 8, 8), torch.ones(2, 2, 1, 1)
    >>> factors = [torch.ones(4, 2), torch.ones(6, 2), torch.ones(3, 1), torch.ones(3, 1)]
    >>> tucker_conv_transpose(x, core, factors, stride=2, padding=1, output_padding=1).shape
    torch.Size([1, 6, 16, 16])
    """
    where = "tucker_conv_transpose"
    shape = _weight_shape(where, core, factors, arrangement, shape)
    n = len(shape) - 2
    steps = (_per_axis(stride, n), _per_axis(dilation, n), _per_axis(padding, n))
    geometry = ConvGeometry(
        tuple(shape[2:]), *steps, groups=groups, output_padding=_per_axis(output_padding, n), transposed=True
    )
    return apply_conv(x, core, factors, geometry, _require_split(where, arrangement), shape)


def split_of(arrangement: Arrangement) -> Split | None:
    """Return the weight's axes in each of the two modes of a separable arrangement; ``None`` for any other."""
    if arrangement.n_modes != 2 or any(len(group) != 1 for group in arrangement.left):
        return None
    names = [group[0] for group in arrangement.left]
    first, second = (tuple(names.index(name) for name in group) for group in arrangement.right)
    return (first, second) if 0 in first and 1 in second else None


def apply_conv(
    x: Tensor, core: Tensor, factors: Factors, geometry: ConvGeometry, split: Split | None, shape: Sequence[int]
) -> Tensor:
    """Run the convolution of `tucker_conv` and `tucker_conv_transpose` with everything already looked up."""
    n = len(geometry.kernel)
    batched = x.dim() == n + 2
    x = x if batched else x.unsqueeze(0)
    steps = _native_steps(core, factors, geometry) if split is None else _separable_steps(core, factors, split, shape)
    for step in reversed(steps) if geometry.transposed else steps:
        x = _run_step(x, step, geometry)
    return x if batched else x.squeeze(0)


@dataclass(frozen=True)
class _Step:
    """One convolution of the chain: a kernel, the spatial axes it walks, and whether each group has its own part of it.

    ``weight`` is (a, b, *sizes) with ``a`` on the side of the full weight's first axis. A kernel that all groups share
    sees the groups folded into the batch.
    """

    weight: Tensor
    axes: tuple[int, ...]
    per_group: bool


def _native_steps(core: Tensor, factors: Factors, geometry: ConvGeometry) -> list[_Step]:
    """List 1×1 by U_1, the kernel, 1×1 by U_0, in the order of an ordinary convolution."""
    first, second = factors[0], factors[1]
    kernel: Tensor = multi_mode_dot(core, [None, None, *factors[2:]])
    ones = (1,) * len(geometry.kernel)
    steps: list[_Step] = []
    if second is not None:
        steps.append(_Step(second.mT.reshape(*second.mT.shape, *ones), (), False))
    # Without U_0 the kernel itself has one part per group.
    steps.append(_Step(kernel, geometry.axes, first is None))
    if first is not None:
        steps.append(_Step(first.reshape(*first.shape, *ones), (), True))
    return steps


def _separable_steps(core: Tensor, factors: Factors, split: Split, shape: Sequence[int]) -> list[_Step]:
    """List the two convolutions of a matrix W[(o, a), (i, b)] = Σ A[(o, a), r] B[(i, b), r], that by B first."""
    first, second = factors
    fold_into_second = first is not None and (second is None or core.shape[0] <= core.shape[1])
    if fold_into_second:
        second = core.mT if second is None else second @ core.mT
    else:
        first = core if first is None else first @ core
        if second is None:
            second = torch.eye(core.shape[1], dtype=core.dtype, device=core.device)
    assert first is not None
    assert second is not None
    a, b = _as_kernel(first, split[0], shape), _as_kernel(second, split[1], shape).transpose(0, 1)
    return [_Step(b, _spatial(split[1]), False), _Step(a, _spatial(split[0]), True)]


def _spatial(axes: Sequence[int]) -> tuple[int, ...]:
    return tuple(sorted(axis - 2 for axis in axes if axis >= 2))


def _as_kernel(matrix: Tensor, axes: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Turn a factor (∏ of the axes' sizes, r) into a kernel (channels, r, *sizes), of size 1 along the other axes."""
    rank = matrix.shape[1]
    tensor = matrix.reshape(*[shape[axis] for axis in axes], rank)
    channel, *rest = sorted(axes)
    tensor = tensor.permute(axes.index(channel), len(axes), *[axes.index(axis) for axis in rest])
    return tensor.reshape(shape[channel], rank, *[shape[a] if a in rest else 1 for a in range(2, len(shape))])


def _run_step(x: Tensor, step: _Step, geometry: ConvGeometry) -> Tensor:
    """Convolve with one kernel of the chain, along the axes that belong to it only."""
    batch, groups = x.shape[0], geometry.groups
    folded = groups > 1 and not step.per_group
    if folded:
        x = x.reshape(batch * groups, x.shape[1] // groups, *x.shape[2:])
    n, mine = len(geometry.kernel), step.axes
    options: dict[str, Any] = {
        "stride": [geometry.stride[a] if a in mine else 1 for a in range(n)],
        "dilation": [geometry.dilation[a] if a in mine else 1 for a in range(n)],
        "groups": groups if step.per_group else 1,
    }
    if geometry.transposed:
        options["padding"] = [geometry.pads[a][0] if a in mine else 0 for a in range(n)]
        options["output_padding"] = [geometry.output_padding[a] if a in mine else 0 for a in range(n)]
        x = _CONV_TRANSPOSE[n](x, step.weight, **options)
    else:
        x, options["padding"] = _pad(x, mine, geometry)
        x = _CONV[n](x, step.weight, **options)
    return x.reshape(batch, x.shape[1] * groups, *x.shape[2:]) if folded else x


def _pad(x: Tensor, axes: Sequence[int], geometry: ConvGeometry) -> tuple[Tensor, list[int]]:
    """Pad along ``axes``; symmetric zeros are left to the convolution itself, as the second result."""
    n = len(geometry.kernel)
    pads = [geometry.pads[a] if a in axes else (0, 0) for a in range(n)]
    zeros = geometry.padding_mode == "zeros"
    if zeros and all(before == after for before, after in pads):
        return x, [before for before, _ in pads]
    if not any(before or after for before, after in pads):
        return x, [0] * n
    flat = [amount for pair in reversed(pads) for amount in pair]
    return nnf.pad(x, flat, mode="constant" if zeros else geometry.padding_mode), [0] * n


@dataclass(frozen=True)
class Work:
    """What a way of computing costs: multiply-adds, and elements written to fresh memory.

    The two ways to apply a change are compared by ``cost`` = multiply-adds + 32 · elements written, where 32 is what
    one written element takes in multiply-adds of a large product. With gradients, each product of the chain is taken
    three times (forward, for its input, for its kernel), and forming ΔW also takes the gradient of the whole weight,
    which is one more run of the base.

    Parameters
    ----------
    multiplications : float
        Multiply-adds.
    written : float
        Elements of intermediate results.

    Examples
    --------
    >>> (Work(100, 2) + Work(10, 1)).cost
    206
    """

    multiplications: float
    written: float

    @property
    def cost(self) -> float:
        """The two numbers as one, in multiply-adds."""
        return self.multiplications + _WRITE_COST * self.written

    def __add__(self, other: "Work") -> "Work":
        return Work(self.multiplications + other.multiplications, self.written + other.written)

    def __mul__(self, times: float) -> "Work":
        return Work(self.multiplications * times, self.written * times)


def prefers_dense(factored: Work, forming: Work, base: float, size: int, training: bool) -> bool:
    """Tell whether forming ΔW and running one operation with W + s·ΔW costs less than the factored products.

    ``base`` is the multiply-adds of the base operation, ``size`` the number of the weight's entries. See `Work`.
    """
    if not training:
        return (forming + Work(0, size)).cost < factored.cost
    return (forming * 3 + Work(base, 3 * size)).cost < (factored * 3).cost


def forming_work(core_shape: Sequence[int], factor_shapes: Sequence[tuple[int, int] | None]) -> Work:
    """Count what forming ΔW takes, in the order of mode products that `flora_tensor.reconstruct` chooses."""
    sizes = [shape for shape in factor_shapes if shape is not None]
    elements, total = math.prod(core_shape), Work(0, 0)
    for k in contraction_order([r for _, r in sizes], [n for n, _ in sizes]):
        size, rank = sizes[k]
        product = elements * size
        elements = product // rank
        total = total + Work(product, elements)
    return total


def linear_work(tokens: int, core_shape: Sequence[int], shape: Sequence[int], whole: Sequence[bool]) -> Work:
    """Count what `tucker_linear` takes for a weight of ``shape``; ``whole`` marks modes without a factor."""
    (r0, r1), (n0, n1) = core_shape, shape
    first, second = (0 if whole[0] else n0 * r0), (0 if whole[1] else n1 * r1)
    return Work(tokens * (first + r0 * r1 + second), tokens * (r0 + r1 + n0))


def conv_work(
    x_shape: Sequence[int],
    core_shape: Sequence[int],
    shape: Sequence[int],
    geometry: ConvGeometry,
    split: Split | None,
    whole: Sequence[bool],
) -> tuple[Work, float]:
    """Count what `apply_conv` takes, and the multiply-adds of the base convolution itself."""
    n, g = len(geometry.kernel), geometry.groups
    batch = x_shape[0] if len(x_shape) == n + 2 else 1
    sizes = tuple(x_shape[-n:])
    outer = geometry.output_sizes(sizes)
    # A transposed convolution does its products at the input's positions, an ordinary one at the output's.
    walked = math.prod(sizes if geometry.transposed else outer)
    base = float(batch * walked * math.prod(shape))
    before, after = math.prod(sizes), math.prod(outer)
    channels = (shape[0], g * shape[1])
    if split is None:
        r0, r1 = core_shape[0], core_shape[1]
        near0, near1 = (before, after) if geometry.transposed else (after, before)
        kernel = walked * r1 * math.prod(geometry.kernel) * (r0 if whole[0] else g * r0)
        products = (
            kernel + near0 * channels[0] * (0 if whole[0] else r0) + near1 * channels[1] * (0 if whole[1] else r1)
        )
        written = after * (g * r0 + channels[0] if not geometry.transposed else g * r1 + channels[1])
        return Work(batch * products, batch * (written + before * g * (r0 if geometry.transposed else r1))), base
    rank = min(core_shape)
    ours = [a - 2 for a in split[0] if a >= 2]
    # Between the two steps, an axis is walked already if the step taken first holds it.
    middle = math.prod([outer[a] if (a in ours) == geometry.transposed else sizes[a] for a in range(n)])
    at0, at1 = (before, middle) if geometry.transposed else (after, middle)
    taps0 = math.prod([geometry.kernel[a] for a in ours])
    taps1 = math.prod(geometry.kernel) // max(taps0, 1)
    products = at0 * channels[0] * rank * taps0 + at1 * channels[1] * rank * taps1
    written = middle * g * rank + after * channels[1 if geometry.transposed else 0]
    return Work(batch * products, batch * written), base


def _per_axis(value: int | Sequence[int], n: int) -> tuple[int, ...]:
    return (value,) * n if isinstance(value, int) else tuple(value)


def _weight_shape(
    where: str, core: Tensor, factors: Factors, arrangement: Arrangement | None, shape: Sequence[int] | None
) -> tuple[int, ...]:
    tensor = tuple(r if u is None else u.shape[0] for r, u in zip(core.shape, factors))
    if arrangement is None or arrangement.is_native:
        return tensor
    if shape is None:
        raise ValueError(f"{where}: arrangement {arrangement.pattern!r} needs the weight's shape; pass shape=")
    if arrangement.shape(shape) != tensor:
        raise ValueError(
            f"{where}: a Tucker tensor of shape {tensor} for a weight of shape {tuple(shape)} arranged as "
            f"{arrangement.pattern!r}; pass one of shape {arrangement.shape(shape)}"
        )
    return tuple(shape)


def _require_split(where: str, arrangement: Arrangement | None) -> Split | None:
    if arrangement is None or arrangement.is_native:
        return None
    split = split_of(arrangement)
    if split is None:
        raise ValueError(
            f"{where}: arrangement {arrangement.pattern!r} has no factored form; pass one with two modes such as "
            "'o (i h w)', or form the weight with dense_delta"
        )
    return split
