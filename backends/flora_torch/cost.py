"""What the two ways to apply a change cost, and which of them is cheaper."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flora_tensor.algebra import contraction_order
from flora_torch._caching import cached, is_exporting
from flora_torch.geometry import ConvGeometry
from flora_torch.plans import Shapes, Sides, Split, full_sizes, joins

__all__ = [
    "Work",
    "conv_rule",
    "conv_work",
    "embedding_rule",
    "forming_work",
    "linear_rule",
    "linear_work",
    "n_rows",
    "prefers_dense",
    "sizes_of",
]

# What writing one element of a fresh tensor costs, in multiply-adds of a large product: the same figure as in
# flora_tensor.algebra, where it orders the mode products.
_WRITE_COST = 32

# Whether compilers can be asked which sizes are fixed. They decide by those of the moment otherwise.
_TRACES_SIZES = torch.__version__ >= "2.9"

# The size of an image along each axis for which exported programs decide.
_ANY_SIZE = 32


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


def n_rows(shape: Sequence[int]) -> int:
    """Return the number of an input's rows to decide by.

    An exported program is for batches of any size, and a decision by theirs would bind it to one side; a compiled one,
    once it is for several sizes, would be compiled again for each side of each layer. There it is made for one row,
    beside which forming ΔW costs most.

    Examples
    --------
    >>> n_rows((2, 5))
    10
    """
    return 1 if _is_for_any(shape) else math.prod(shape)


def sizes_of(images: Tensor, n_axes: int) -> tuple[int, ...]:
    """Return the shape to decide by of images with spatial axes: for programs as in `n_rows`, of one of any size.

    Examples
    --------
    >>> import torch
    >>> sizes_of(torch.ones(4, 3, 8, 8), 2)
    (4, 3, 8, 8)
    """
    any_size = (*[1] * (images.dim() - n_axes), *[_ANY_SIZE] * n_axes)
    return any_size if _is_for_any(images.shape) else tuple(images.shape)


def _is_for_any(sizes: Sequence[int]) -> bool:
    """Tell whether a program is being made for inputs of other sizes too, which asking for these would bind it to."""
    if is_exporting():
        return True
    if not (_TRACES_SIZES and torch.compiler.is_compiling()):
        return False
    # Loaded by the compiler, and by nobody else: it is large.
    from torch.fx.experimental.symbolic_shapes import has_static_value

    return not all(has_static_value(size) for size in sizes)


@cached
def linear_rule(tokens: int, shapes: Shapes, sides: Sides, training: bool) -> bool:
    """Tell what `prefers_dense` says of a linear layer."""
    size = _size(shapes)
    return prefers_dense(linear_work(tokens, shapes, sides), forming_work(*shapes), tokens * size, size, training)


@cached
def embedding_rule(tokens: int, shapes: Shapes, training: bool) -> bool:
    """Tell what `prefers_dense` says of an embedding."""
    ((r0, r1), (first, second)), size = shapes, _size(shapes)
    dim = r1 if second is None else second[0]
    # A look-up multiplies nothing; only the rows that are looked up meet the core and U_1.
    products = (0 if first is None else r0 * r1) + (0 if second is None else dim * r1)
    factored = Work(tokens * products, tokens * (r0 + r1 + dim))
    return prefers_dense(factored, forming_work(*shapes), size, size, training)


@cached
def conv_rule(
    x_shape: tuple[int, ...],
    shapes: Shapes,
    shape: tuple[int, ...],
    geometry: ConvGeometry,
    split: Split | None,
    training: bool,
) -> bool:
    """Tell what `prefers_dense` says of a convolution."""
    factored, base = conv_work(x_shape, shapes[0], shape, geometry, split, [f is None for f in shapes[1]])
    return prefers_dense(factored, forming_work(*shapes), base, math.prod(shape), training)


def _size(shapes: Shapes) -> int:
    return math.prod(full_sizes(shapes))


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


def linear_work(tokens: int, shapes: Shapes, sides: Sides) -> Work:
    """Count what the steps of `flora_torch.plans.linear_chain` take."""
    core, factors = shapes
    (*out_rest, out_last), (*in_rest, in_last) = sides
    full = full_sizes(shapes)
    outer, inner = math.prod([full[k] for k in out_rest]), math.prod([full[k] for k in in_rest])
    rows, columns = outer * core[out_last], inner * core[in_last]
    first = 0 if factors[in_last] is None else columns * full[in_last]
    if joins(tokens, shapes, sides):
        last = full[out_last] * columns
        return Work(tokens * (first + last) + rows * last, tokens * (columns + full[out_last]) + last)
    last = 0 if factors[out_last] is None else rows * full[out_last]
    written = columns * bool(first) + rows * bool(last) + outer * full[out_last]
    return Work(tokens * (first + rows * columns + last), tokens * written)


def conv_work(
    x_shape: Sequence[int],
    core_shape: Sequence[int],
    shape: Sequence[int],
    geometry: ConvGeometry,
    split: Split | None,
    whole: Sequence[bool],
) -> tuple[Work, float]:
    """Count what the steps of `flora_torch.plans.conv_chain` take, and the multiply-adds of the base itself."""
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
