"""How a convolution walks over its input, how its input is padded, and how gradients come back through the padding."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as nnf
from torch import Tensor

from flora_torch._caching import cached

__all__ = ["ConvGeometry", "Pads", "kept_geometry", "pad", "unpad"]

# (before, after) of each spatial axis.
Pads = tuple[tuple[int, int], ...]


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


@cached
def kept_geometry(*parts: Any) -> ConvGeometry:
    """Return the geometry of these parts, in the order of its fields; made once, as layers ask for it at every call.

    Examples
    --------
    >>> kept_geometry((3,), (1,), (1,), (1,)) is kept_geometry((3,), (1,), (1,), (1,))
    True
    """
    return ConvGeometry(*parts)


def pad(x: Tensor, pads: Pads, mode: str) -> Tensor:
    """Pad the last axes of ``x`` as a convolution with padding mode ``mode`` does.

    Examples
    --------
    >>> import torch
    >>> pad(torch.tensor([[[1.0, 2.0, 3.0]]]), ((1, 2),), "reflect").tolist()
    [[[2.0, 1.0, 2.0, 3.0, 2.0, 1.0]]]
    """
    flat = [amount for pair in reversed(pads) for amount in pair]
    return nnf.pad(x, flat, mode="constant" if mode == "zeros" else mode)


def unpad(g: Tensor, pads: Pads, mode: str) -> Tensor:
    """Bring the gradient of a padded tensor back: the transpose of `pad`, one axis at a time.

    Examples
    --------
    >>> import torch
    >>> unpad(torch.ones(1, 1, 6), ((1, 2),), "reflect").tolist()
    [[[2.0, 3.0, 1.0]]]
    """
    for k, (before, after) in enumerate(pads):
        if before or after:
            g = _unpad_axis(g, k - len(pads), before, after, mode)
    return g


def _unpad_axis(g: Tensor, axis: int, before: int, after: int, mode: str) -> Tensor:
    n = g.shape[axis] - before - after
    inner = g.narrow(axis, before, n)
    if mode == "zeros":
        return inner
    inner = inner.clone()
    first, last = g.narrow(axis, 0, before), g.narrow(axis, before + n, after)
    if mode == "circular":
        inner.narrow(axis, n - before, before).add_(first)
        inner.narrow(axis, 0, after).add_(last)
    elif mode == "reflect":
        # The first and the last entry themselves are not repeated.
        inner.narrow(axis, 1, before).add_(first.flip(axis))
        inner.narrow(axis, n - 1 - after, after).add_(last.flip(axis))
    else:
        inner.narrow(axis, 0, 1).add_(first.sum(axis, keepdim=True))
        inner.narrow(axis, n - 1, 1).add_(last.sum(axis, keepdim=True))
    return inner
