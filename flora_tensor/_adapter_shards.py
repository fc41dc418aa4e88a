"""The tensors of an adapter directory: in one file, or in shards with an index, as those of a checkpoint."""

import math
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path

from flora_tensor._errors import InputError
from flora_tensor._safetensors import BITS, TensorInfo, in_file_order
from flora_tensor.checkpoint import Checkpoint, open_checkpoint, open_shards
from flora_tensor.checkpoint_writer import CheckpointWriter, plan_shards, write_files

__all__ = ["MODEL_NAME", "TENSOR_FILES", "open_tensors", "tensor_writer"]

_STEM = "adapter_model"
MODEL_NAME = f"{_STEM}.safetensors"
_INDEX_NAME = f"{MODEL_NAME}.index.json"
# What overwriting an adapter may remove of its tensors: the globs of all names that `tensor_writer` gives.
TENSOR_FILES = (MODEL_NAME, _INDEX_NAME, f"{_STEM}-[0-9]*-of-[0-9]*.safetensors")


def open_tensors(directory: Path) -> Checkpoint:
    """Open the tensor file of an adapter or its shards, every header checked; the file comes first, as for models."""
    if (directory / MODEL_NAME).exists():
        return open_checkpoint(directory / MODEL_NAME)
    if (index := directory / _INDEX_NAME).exists():
        return Checkpoint.of(index, open_shards(index, allow_pickle=None))
    raise InputError(f"{directory}: has no {MODEL_NAME} and no {_INDEX_NAME}; the adapter is incomplete")


@contextmanager
def tensor_writer(
    directory: Path,
    layout: Iterable[tuple[str, str, tuple[int, ...]]],
    metadata: Mapping[str, str],
    max_shard_size: int | None,
) -> Generator[CheckpointWriter]:
    """Write tensors (name, type, shape) into an adapter directory in the making, in any order.

    The order of ``layout`` does not matter either: tensors are spread over shards in the order of one file.
    """
    infos = [
        TensorInfo(name, code, shape, 0, math.prod(shape) * BITS[code] // 8)
        for name, code, shape in in_file_order(layout)
    ]
    shards = plan_shards(infos, like=None, max_shard_size=max_shard_size, stem=_STEM)
    with write_files(directory, shards, metadata=metadata, stem=_STEM) as writer:
        yield writer
