"""Tensors that are spread over several processes (DTensor, as ``fully_shard`` and tensor parallelism make them)."""

from typing import Any, NoReturn

import torch
from torch import Tensor, nn

__all__ = [
    "as_parts",
    "assign_",
    "gathered",
    "in_several_processes",
    "is_first_process",
    "is_sharded",
    "refuse_part",
    "refuse_sharded",
    "reshard",
    "summed",
]


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


def reshard(model: nn.Module) -> None:
    """Have a model that `fully_shard` spread hold its parts again.

    After a forward pass the root, and every group that is not resharded then, holds whole parameters. These are copies:
    what is written to them is lost when they are dropped, and nothing tells that other processes hold them too.
    """
    for module in _modules(model):
        if _is_a(module, "FSDPModule"):
            module.reshard()


def as_parts(where: str, model: nn.Module) -> None:
    """Bring a model that is spread over processes to where its parameters can be read and written, or refuse it.

    Raises
    ------
    ValueError
        If it is wrapped in FullyShardedDataParallel, whose parameters are pieces of one long vector.
    """
    reshard(model)
    for module in _modules(model):
        if not _is_a(module, "FullyShardedDataParallel"):
            continue
        if module.process_group.size() > 1 and module.training_state.name != "SUMMON_FULL_PARAMS":
            raise ValueError(
                f"{where}: the model is spread over processes by FullyShardedDataParallel, which flattens parameters; "
                "attach or load adapters before it wraps the model, and read or fill them within "
                "FullyShardedDataParallel.summon_full_params(model); or use fully_shard"
            )


def _modules(model: Any) -> list[Any]:
    """List the modules of a model; what is none is refused by whoever looks at it next."""
    return [*model.modules()] if isinstance(model, nn.Module) else []


def _is_a(module: nn.Module, name: str) -> bool:
    """Tell whether a module is of a class of this name, without loading what torch loads only for such models."""
    return any(kind.__name__ == name for kind in type(module).__mro__)


def is_first_process() -> bool:
    """Tell whether this process is the one of all that writes files."""
    distributed: Any = torch.distributed
    return not distributed.is_available() or not distributed.is_initialized() or distributed.get_rank() == 0


def in_several_processes() -> bool:
    """Tell whether this process is one of several that know each other."""
    distributed: Any = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def summed(tensor: Tensor) -> Tensor:
    """Return the sum of a tensor over all processes, the same bits in each; every process must call this together."""
    distributed: Any = torch.distributed
    total = tensor.clone(memory_format=torch.contiguous_format)
    distributed.all_reduce(total)
    return total


def refuse_sharded(where: str, weight: Tensor) -> None:
    """Refuse a weight of which this process holds only a part."""
    if is_sharded(weight):
        raise ValueError(
            f"{where} is spread over processes (a DTensor); attach adapters before fully_shard or parallelize_module, "
            "and merge in a single process: save the adapter and load it there"
        )


def refuse_part(what: str, given: tuple[int, ...], needed: tuple[int, ...]) -> NoReturn:
    """Refuse a part of an input or output where an update needs, or gives, the whole."""
    raise ValueError(
        f"tensor parallelism: the {what} beside an update is of shape {given}, and {needed} is needed; parallelize the "
        "base_layer with whole ones: ColwiseParallel(output_layouts=Replicate()), "
        "RowwiseParallel(input_layouts=Replicate())"
    )
