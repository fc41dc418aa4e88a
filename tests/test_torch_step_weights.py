"""What the weights of thin steps are made of, against ordinary contractions and their gradients."""

import pytest
import torch
from torch import Tensor

from flora_torch.chain import form
from flora_torch.step_weights import in_order
from support import tolerance

pytestmark = pytest.mark.usefixtures("seeded", "large_products")

# The core's shape, the sizes that the factors give (None: left whole), and the modes that are multiplied at once.
CASES: dict[str, tuple[tuple[int, ...], tuple[int | None, ...], set[tuple[int, ...]]]] = {
    "a kernel in two dimensions": ((4, 3, 2, 2), (80, 60, 3, 5), {(0,), (1,), (2, 3)}),
    "few channels": ((4, 1, 2, 2), (8, 3, 3, 5), {(0,), (1,), (2, 3)}),
    "in three": ((4, 3, 2, 1, 3), (80, 60, 3, 2, 3), {(0,), (1,), (2, 3, 4)}),
    "an axis left whole between": ((4, 3, 2, 3, 2), (80, 60, 3, None, 3), {(0,), (1,), (2,), (4,)}),
    "the last axis left whole": ((4, 3, 2, 3), (None, 6, 3, None), {(1,), (2,)}),
    "large kernels": ((2, 2, 8, 9), (3, 3, 11, 11), {(0,), (1,), (2,), (3,)}),
    "a matrix": ((2, 3), (6, 4), {(0,), (1,)}),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("scale", [1.0, -2.5])
@pytest.mark.parametrize("transposed", [False, True])
def test_the_tensor_and_its_gradients_are_those_of_ordinary_contractions(name: str, scale: float, transposed: bool):
    shape, sizes, together = CASES[name]
    core = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    pairs = [None if n is None else (n, r) for n, r in zip(sizes, shape)]
    factors = [None if p is None else torch.randn(p, dtype=torch.float64, requires_grad=True) for p in pairs]
    if transposed:
        # Parametrizations and loaded states give factors in either order of memory, also side by side.
        factors[-1] = None if factors[-1] is None else factors[-1].detach().mT.contiguous().mT.requires_grad_()
    assert {product.modes for product in in_order(range(len(shape)), shape, pairs)} == together
    ours = form((core, *factors), scale)
    theirs: Tensor = core * scale
    for mode, factor in enumerate(factors):
        if factor is not None:
            theirs = torch.tensordot(theirs, factor, ([mode], [1])).movedim(-1, mode)
    assert ours.shape == theirs.shape
    direction = torch.randn_like(ours)
    trained = [core, *(u for u in factors if u is not None)]
    found, expected = (torch.autograd.grad(y, trained, direction) for y in (ours, theirs))
    for a, b in zip((ours.detach(), *found), (theirs.detach(), *expected)):
        assert float((a - b).norm()) <= tolerance("float64", direction.numel(), norm=float(b.norm()))
