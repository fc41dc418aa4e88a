"""Tucker tensors in the function transforms of torch."""

import functools
from typing import Any

from torch.utils import _pytree as pytree

from flora_tensor import TuckerTensor

__all__ = ["register_with_torch"]


def _flatten(tucker: TuckerTensor) -> tuple[list[Any], tuple[bool, ...]]:
    # A whole mode is part of the structure: to torch, None would be a leaf that is no tensor.
    return [tucker.core, *(u for u in tucker.factors if u is not None)], tuple(u is None for u in tucker.factors)


def _unflatten(leaves: Any, whole: tuple[bool, ...]) -> TuckerTensor:
    # Transformations rebuild trees from batched tensors and from placeholders, so nothing is validated here.
    core, *given = leaves
    factors = iter(given)
    tucker = object.__new__(TuckerTensor)
    object.__setattr__(tucker, "core", core)
    object.__setattr__(tucker, "factors", tuple(None if is_whole else next(factors) for is_whole in whole))
    return tucker


@functools.cache
def register_with_torch() -> bool:
    """Make `TuckerTensor` a pytree of torch, so that `torch.func.vmap` takes and gives Tucker tensors.

    Called once when `flora_torch` is imported; calling it again changes nothing.

    Returns
    -------
    bool
        Whether it is one now; false where this version of torch does not offer the registration.

    Examples
    --------
    >>> import torch
    >>> register_with_torch()
    True
    >>> batch = torch.func.vmap(lambda core: TuckerTensor(core, [None, None]))(torch.ones(5, 2, 3))
    >>> torch.func.vmap(lambda tucker: tucker.core.sum())(batch).shape
    torch.Size([5])
    """
    register = getattr(pytree, "register_pytree_node", None)
    if register is not None:
        register(TuckerTensor, _flatten, _unflatten, serialized_type_name="flora_tensor.TuckerTensor")
    return register is not None
