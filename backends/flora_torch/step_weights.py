"""What the weights of thin steps are made of: the core times some factors, or one factor, and their gradients.

Products with a kernel's factors are tiny, and what they cost is the calls: so the factors of the last modes are
multiplied with each other first, and the core by their Kronecker product,

    X ×_1 A ×_2 B = X_(1,2) · (A ⊗ B)ᵀ    with the two modes seen as one.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from flora_tensor.algebra import contraction_order, kronecker

__all__ = ["Made", "Parameters", "Product", "in_order"]

# The core and the factors.
Parameters: TypeAlias = Sequence[Tensor | None]


class Product(NamedTuple):
    """A product of the core with the factors of neighboring modes, taken as one with their Kronecker product.

    Of the tensor as it then is, only how many entries lie ``behind`` the last of these modes in memory counts.
    """

    modes: tuple[int, ...]
    behind: int


@dataclass(frozen=True)
class Made:
    """How the weight of a step is made: the core times some factors, or one factor, with its axes rearranged.

    Parameters
    ----------
    source : int
        0 for the core, 1 + k for factor k, -1 for an identity matrix of the size ``split[-1]``.
    products : tuple of Product
        The products of the core with factors, in the order in which they are taken; see `in_order`.
    split, order, shape : tuple of int
        Reshape to ``split``, permute by ``order``, reshape to ``shape``.

    Examples
    --------
    >>> made = Made(1, (), (3, 2), (1, 0), (2, 3))
    >>> made.weight([torch.ones(2, 2), torch.ones(3, 2)], 1.0).shape
    torch.Size([2, 3])
    """

    source: int
    products: tuple[Product, ...]
    split: tuple[int, ...]
    order: tuple[int, ...]
    shape: tuple[int, ...]
    # The numbers of the parameters that the weight is made of.
    parts: tuple[int, ...] = field(init=False, repr=False, compare=False)
    # Most weights are parameters as they are, or transposed: then nothing is rearranged at every step.
    _stays: bool = field(init=False, repr=False, compare=False)
    _flips: bool = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        stays = self.shape == self.split and self.order == tuple(range(len(self.order)))
        parts = () if self.source < 0 else (self.source, *(1 + k for product in self.products for k in product.modes))
        object.__setattr__(self, "parts", parts)
        object.__setattr__(self, "_stays", stays)
        object.__setattr__(self, "_flips", self.order == (1, 0) and self.shape == self.split[::-1])

    def weight(self, parameters: Parameters, scale: float) -> Tensor:
        """Return the step's weight; ``scale`` multiplies the core."""
        return self.rearranged(self.stages(parameters, scale)[-1])

    def stages(self, parameters: Parameters, scale: float) -> list[Tensor]:
        """Return what the weight is made of: a factor, or the scaled core and what it becomes with each product.

        After a product only the order of the entries is that of the tensor, and not its shape.
        """
        core = parameters[0]
        assert core is not None
        if self.source < 0:
            return [torch.eye(self.split[-1], dtype=core.dtype, device=core.device)]
        if self.source > 0:
            factor = parameters[self.source]
            assert factor is not None
            return [factor]
        stages = [core if scale == 1.0 else core * scale]
        for modes, behind in self.products:
            stages.append(_times(stages[-1], _kronecker(parameters, modes)[0], behind))
        return stages

    def rearranged(self, last: Tensor) -> Tensor:
        """Return the last stage as the weight."""
        if self._flips:
            return last.mT
        if not self._stays:
            return last.reshape(self.split).permute(self.order).reshape(self.shape)
        return last if last.shape == self.shape else last.reshape(self.shape)

    def gradients(self, g: Tensor, parameters: Parameters, scale: float, stages: Sequence[Tensor]) -> dict[int, Tensor]:
        """Return the gradient of each parameter by its number, for the gradient ``g`` of the weight."""
        if self.source < 0:
            return {}
        if self._flips:
            g = g.mT
        elif not self._stays:
            back = [self.order.index(k) for k in range(len(self.order))]
            g = g.reshape([self.split[k] for k in self.order]).permute(back)
        if self.source > 0:
            return {self.source: g if g.shape == stages[0].shape else g.reshape(stages[0].shape)}
        found: dict[int, Tensor] = {}
        for (modes, behind), before in zip(reversed(self.products), reversed(stages[:-1])):
            matrices = _kronecker(parameters, modes)
            found |= _factor_gradients(_pairing(g, before, matrices[0], behind), parameters, modes, matrices)
            g = _times(g, matrices[0].mT, behind)
        g = g if g.shape == stages[0].shape else g.reshape(stages[0].shape)
        found[0] = g if scale == 1.0 else g * scale
        return found


def _kronecker(parameters: Parameters, modes: tuple[int, ...]) -> list[Tensor]:
    """Return the Kronecker product of some modes' factors, of those without the first, and so on."""
    if len(modes) == 1:
        return [parameters[1 + modes[0]]]  # type: ignore[list-item]
    products: list[Tensor] = []
    for k in reversed(modes):
        factor = parameters[1 + k]
        assert factor is not None
        products.insert(0, kronecker(factor, products[0]) if products else factor)
    return products


def _factor_gradients(
    g: Tensor, parameters: Parameters, modes: tuple[int, ...], matrices: Sequence[Tensor]
) -> dict[int, Tensor]:
    """Return the gradient of each factor by its number, for the gradient of their Kronecker product."""
    found: dict[int, Tensor] = {}
    for k, rest in zip(modes[:-1], matrices[1:]):
        factor = parameters[1 + k]
        assert factor is not None
        (n, r), (m, q) = factor.shape, rest.shape
        # With the entries of one factor as rows and those of the other as columns, the product is of rank one.
        pairs = g.reshape(n, m, r, q).transpose(1, 2).reshape(n * r, m * q)
        found[1 + k] = (pairs @ rest.reshape(-1)).reshape(n, r)
        g = (factor.reshape(-1) @ pairs).reshape(m, q)
    return {**found, 1 + modes[-1]: g}


# Factors whose Kronecker product has no more entries than this are multiplied by as one.
_JOINED = 2**10


def in_order(
    modes: Sequence[int], core: Sequence[int], factors: Sequence[tuple[int, int] | None]
) -> tuple[Product, ...]:
    """Plan the products of a core with the factors of some modes in the order in which they cost least.

    The last modes beyond the first two, those of a kernel's sizes, come together where their factors are small: what a
    product of tiny matrices takes is the call.

    Examples
    --------
    >>> in_order((0, 1, 2), (8, 8, 8), [(512, 8), None, (8, 8)])
    (Product(modes=(2,), behind=1), Product(modes=(0,), behind=64))
    >>> [product.modes for product in in_order((0, 2, 3), (8, 8, 2, 2), [(512, 8), None, (3, 2), (3, 2)])]
    [(2, 3), (0,)]
    """
    present = {k: shape for k in modes for shape in [factors[k]] if shape is not None}
    last, entries = len(core), 1
    while last > 2 and last - 1 in present and entries * math.prod(present[last - 1]) <= _JOINED:
        last -= 1
        entries *= math.prod(present[last])
    joined = tuple(range(last, len(core)))
    groups = [(k,) for k in present if k < last] + ([joined] if joined else [])
    inner, outer = ([math.prod([present[k][side] for k in group]) for group in groups] for side in (1, 0))
    found: list[Product] = []
    sizes = list(core)
    for i in contraction_order(inner, outer):
        found.append(Product(groups[i], math.prod(sizes[groups[i][-1] + 1 :])))
        for k in groups[i]:
            sizes[k] = present[k][0]
    return tuple(found)


def _times(x: Tensor, matrix: Tensor, behind: int) -> Tensor:
    """Multiply the mode of a tensor that has so many entries behind it by a matrix; the shape is left as it comes."""
    # How `@` multiplies more than two matrices hangs on what requires a gradient, and so do the last bits of it.
    n = matrix.shape[1]
    if behind == 1:
        return x.reshape(-1, n) @ matrix.mT
    if x.numel() == n * behind:
        return matrix @ (x if x.shape == (n, behind) else x.reshape(n, behind))
    slabs = x.reshape(-1, n, behind)
    return torch.bmm(matrix.expand(slabs.shape[0], *matrix.shape), slabs)


def _pairing(g: Tensor, x: Tensor, matrix: Tensor, behind: int) -> Tensor:
    """Multiply the unfoldings of two tensors along a mode: the gradient of the matrix in `_times`."""
    rows, columns = matrix.shape
    if behind > 1:
        g, x = g.reshape(-1, rows, behind).mT, x.reshape(-1, columns, behind).mT
    return g.reshape(-1, rows).mT @ x.reshape(-1, columns)
