"""Layers of a stack share their factors, as an embedding and an output layer share a weight: one parameter in several.

Each layer keeps a core of its own, the joint core contracted with the layer's row: training can then take a layer
beyond the few combinations of cores that the rows span, and no layer's product depends on another's parameters.

``fully_shard`` wants parameters that layers share in one group: the whole model's, or ``fully_shard([layer, …])``.
Layers sharded one by one it refuses itself, at the first call.
"""

from collections.abc import Mapping, Sequence
from itertools import zip_longest

import torch
from torch import Tensor

from flora_tensor import TuckerStack, TuckerTensor
from flora_torch.update import TuckerUpdate

__all__ = ["check_shared", "joined_stacks", "share_factors", "shared_name"]


def share_factors(updates: Mapping[str, TuckerUpdate], stacks: Mapping[str, TuckerStack]) -> None:
    """Make one parameter of each factor that the members of a stack have in common, on each device."""
    for stack in stacks.values():
        owners: dict[torch.device, TuckerUpdate] = {}
        for update in (updates[name] for name in stack.members):
            owner = owners.setdefault(update.core.device, update)
            for mode, factor in enumerate(owner.factors):
                setattr(update, f"factor_{mode}", factor)


def joined_stacks(updates: Mapping[str, TuckerUpdate], tensors: Mapping[str, TuckerTensor]) -> dict[str, TuckerStack]:
    """Return the stacks that updates with shared factors make; ``tensors`` are what the file holds of the updates.

    The cores lie side by side, so that the mode of the layers is left whole: the file gives back every bit.
    """
    groups: dict[tuple[object, ...], list[str]] = {}
    for name, update in updates.items():
        factors = tuple(None if u is None else id(u) for u in update.factors)
        if any(factors) and update.start is None and update.magnitude is None:
            form = (factors, update.ranks, update.core.dtype, update.arrangement, update.shape, update.scale)
            groups.setdefault(form, []).append(name)
    stacks: dict[str, TuckerStack] = {}
    for members in groups.values():
        if len(members) > 1:
            first = updates[members[0]]
            # NumPy arrays, which know no namespace functions of torch's.
            cores = torch.stack([torch.as_tensor(tensors[member].core) for member in members]).numpy()
            joint = TuckerTensor(cores, (None, *tensors[members[0]].factors))
            name = shared_name(members)
            while name in stacks or name in tensors:
                name += "*"
            stacks[name] = TuckerStack(tuple(members), joint, first.arrangement, first.shape)
    return stacks


def shared_name(names: Sequence[str]) -> str:
    """Return the pattern of several names: a star for each word between the dots in which they differ.

    >>> shared_name(["layers.0.fc.weight", "layers.1.fc.weight"])
    'layers.*.fc.weight'
    """
    words = [name.split(".") for name in names]
    if len({len(split) for split in words}) > 1:  # from the end: the parameter's name comes last
        common = ["*" if len(set(column)) > 1 else str(column[0]) for column in zip_longest(*map(reversed, words))]
        return ".".join(reversed(common))
    return ".".join(column[0] if len(set(column)) == 1 else "*" for column in zip(*words))


def check_shared(where: str, present: Mapping[str, TuckerUpdate], given: Mapping[str, TuckerUpdate]) -> None:
    """Refuse values for factors that layers share in the model, unless they are the same for all of them."""
    first: dict[int, tuple[str, Tensor]] = {}
    for name, update in present.items():
        for mine, new in zip(update.factors, given[name].factors):
            if mine is None or new is None:
                continue
            other, value = first.setdefault(id(mine), (name, new))
            if value is not new and not torch.equal(value, new):
                raise ValueError(
                    f"{where}: {other!r} and {name!r} share a factor in the model and have two in the file; detach the "
                    "adapter first, or load under another adapter_name"
                )
