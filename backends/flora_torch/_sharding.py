"""Tensors that are spread over several processes (DTensor, as ``fully_shard`` and tensor parallelism make them)."""

from typing import Any

import torch
from torch import Tensor

__all__ = ["assign_", "gathered", "is_sharded"]


def is_sharded(tensor: Any) -> bool:
    """Tell whether a tensor is a DTensor, without loading what torch loads only for these."""
    return isinstance(tensor, Tensor) and type(tensor).__name__ == "DTensor"


def gathered(tensor: Tensor) -> Tensor:
    """Return a tensor as a whole one; every process must call this together."""
    whole: Any = tensor
    return whole.full_tensor() if is_sharded(tensor) else tensor


def assign_(parameter: Tensor, value: Tensor) -> None:
    """Copy a whole value, the same in every process, into a tensor that may be spread."""
    target: Any = parameter
    if is_sharded(parameter):
        from torch.distributed.tensor import distribute_tensor

        # Every process holds the value: none has to be told it.
        value = distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)
    with torch.no_grad():
        target.copy_(value)
