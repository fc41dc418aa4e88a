"""Adapters of a model to files."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import flora_tensor as ft
from flora_tensor._typing import PathLike
from flora_tensor.adapter import Adapter
from flora_torch._sharding import as_parts, gathered, is_first_process, is_sharded
from flora_torch.base_check import describe_bases, dtype_codes
from flora_torch.inventory import adapters_of, check_known, updates_by_weight, whole_of
from flora_torch.model_weights import sites
from flora_torch.stacks import joined_stacks
from flora_torch.update import DROPOUTS, TuckerUpdate

__all__ = ["adapter_of", "notes_of", "save_adapter"]


def save_adapter(
    model: nn.Module,
    path: PathLike,
    *,
    adapter_name: str | None = None,
    base_model_name_or_path: str | None = None,
    max_shard_size: int | None = None,
    overwrite: bool = False,
) -> Path:
    """Write one adapter of a model as an adapter directory, whole or not at all.

    `load_adapter` restores it bit for bit. A tied weight is stored once, under its first name; so are factors that
    layers share, as a stack with the layers' cores side by side. An update with a start, as ``"principal"`` has one, is
    stored as the difference of its two tensors, of twice the ranks, which any reader can merge.

    Where the parameters are spread over processes (``fully_shard``), all of them must call this, and the first writes
    the file; it is the one that a single process would have written. Where each process has them whole (DDP, or within
    FullyShardedDataParallel's ``summon_full_params``), one process calls it.

    Parameters
    ----------
    model : nn.Module
        A model with adapters.
    path : path
        The directory to write.
    adapter_name : str, optional
        The adapter; needed where there are several. The name is not stored.
    base_model_name_or_path : str, optional
        A note in the config of the model that the adapter is for.
    max_shard_size, overwrite
        As for `flora_tensor.save_adapter`.

    Returns
    -------
    Path
        The directory.

    Raises
    ------
    ValueError
        If there is no such adapter, or several and none was named, a number is not finite, ``max_shard_size`` is below
        1, or FullyShardedDataParallel has flattened the parameters.
    FileExistsError, OSError
        As for `flora_tensor.save_adapter`.

    References
    ----------
    The format is described at the head of `flora_tensor.adapter_file`.

    Examples
    --------
    >>> import tempfile, pathlib
    >>> from flora_torch import attach
    >>> model = nn.Sequential(nn.Linear(8, 8))
    >>> _ = attach(model, ranks=2)
    >>> directory = save_adapter(model, pathlib.Path(tempfile.mkdtemp()) / "adapter")
    >>> ft.load_adapter(directory)
    Adapter(1 weight, 0 tensors whole, n_parameters=36)
    """
    as_parts("save_adapter", model)
    adapter = adapter_of(model, adapter_name, "save_adapter")
    note = {"base_model_name_or_path": base_model_name_or_path}
    adapter = replace(adapter, config={**adapter.config, **note})
    updates = updates_by_weight(model, _one_adapter(model, adapter_name, "save_adapter"))
    if any(is_sharded(p) for update in updates.values() for p in update.parameters()) and not is_first_process():
        return Path(path)
    return ft.save_adapter(path, adapter, max_shard_size=max_shard_size, overwrite=overwrite)


def adapter_of(model: nn.Module, adapter_name: str | None, where: str) -> Adapter:
    """Return one adapter of a model as its file holds it; the only one, where none is named."""
    name = _one_adapter(model, adapter_name, where)
    updates = updates_by_weight(model, name)
    whole = {
        place.name_of(local): note.value_in(place.module, local)
        for place, local, note in whole_of(model)
        if note.adapter_name == name
    }
    dtypes = {weight: update.core.dtype for weight, update in updates.items()}
    magnitudes = {weight: u.magnitude for weight, u in updates.items() if u.magnitude is not None}
    stored = {weight: dtype_codes[dtype] for weight, dtype in dtypes.items() if dtype in dtype_codes}
    stored |= {weight: dtype_codes[value.dtype] for weight, value in whole.items() if value.dtype in dtype_codes}
    tensors = {weight: update.exported().map(_as_numpy) for weight, update in updates.items()}
    stacks = joined_stacks(updates, tensors)
    stacked = {member for stack in stacks.values() for member in stack.members}
    return Adapter(
        {weight: tensor for weight, tensor in tensors.items() if weight not in stacked},
        arrangements={weight: update.arrangement for weight, update in updates.items()},
        scales={weight: update.scale for weight, update in updates.items()},
        shapes={weight: update.shape for weight, update in updates.items()},
        whole={weight: _as_numpy(value) for weight, value in whole.items()},
        config=notes_of(model, updates),
        dtypes=stored,
        magnitudes={weight: _as_numpy(magnitude) for weight, magnitude in magnitudes.items()},
        channels={weight: updates[weight].channels for weight in magnitudes},
        stacks=stacks,
    )


def notes_of(model: nn.Module, updates: Mapping[str, TuckerUpdate]) -> dict[str, Any]:
    """Return what the config of a file notes for this backend alone: types, starts, dropouts, and the bases."""
    notes: dict[str, Any] = {
        "adapter_dtypes": {weight: str(u.core.dtype).removeprefix("torch.") for weight, u in updates.items()},
        "start_pattern": {weight: True for weight, u in updates.items() if u.start is not None},
    }
    for key in DROPOUTS:
        chances = {weight: getattr(update, key) for weight, update in updates.items()}
        notes[f"{key}_pattern"] = {weight: chance for weight, chance in chances.items() if chance}
    return notes | describe_bases(sites(model), updates)


def _one_adapter(model: nn.Module, adapter_name: str | None, where: str) -> str:
    if adapter_name is not None:
        check_known(model, where, [adapter_name])
        return adapter_name
    known = adapters_of(model, where)
    if not known:
        raise ValueError(f"{where}: the layers of the model have no adapter; call their add_adapter first")
    if len(known) > 1:
        raise ValueError(f"{where}: the model has the adapters {', '.join(known)}; pass adapter_name")
    return known[0]


def _as_numpy(tensor: Tensor) -> Any:
    # One copy: an array of a parameter's own memory would change as it is trained, nor could torch free that memory.
    dtype = torch.float32 if tensor.dtype == torch.bfloat16 else tensor.dtype
    whole = gathered(tensor.detach())
    return whole.to("cpu", dtype, copy=True, memory_format=torch.contiguous_format).numpy()
