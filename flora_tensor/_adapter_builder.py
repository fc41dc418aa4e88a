"""What converters read from, and what they build: tensors of a file or state dict, and the adapter made of them."""

import math
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from flora_tensor._arrays import to_numpy
from flora_tensor._errors import InputError
from flora_tensor._lora_parts import Converted
from flora_tensor._safetensors import FLOATS, READABLE, dtype_code
from flora_tensor._typing import PathLike
from flora_tensor._whole import BaseLike, widest_code
from flora_tensor.adapter import Adapter
from flora_tensor.adapter_file import fitting_core
from flora_tensor.arrangement import Arrangement
from flora_tensor.checkpoint import open_checkpoint
from flora_tensor.tucker_tensor import TuckerTensor

__all__ = ["AdapterBuilder", "NamedArrays", "shape_of", "shapes_of"]


class NamedArrays:
    """The tensors of a file or a state dict: float arrays that are finite, and the types they are stored in."""

    def __init__(self, where: str, source: PathLike | Mapping[str, Any], allow_pickle: bool = False) -> None:
        self.where = where
        if isinstance(source, Mapping):
            self._table, self._file = source, None
            self.names = tuple(source)
            self.label = "the state dict"
        else:
            self._table, self._file = {}, open_checkpoint(source, allow_pickle=allow_pickle)
            self.names = self._file.names()
            self.label = str(source)

    def code(self, name: str) -> str:
        """Return the type that a tensor is stored in."""
        return self._file.info(name).dtype if self._file else dtype_code(self._table[name].dtype)

    def metadata(self, key: str) -> str | None:
        """Return a text that the file holds beside its tensors."""
        return self._file.metadata.get(key) if self._file else None

    def read(self, name: str, *, whole: bool = False) -> np.ndarray:
        """Return one tensor, finite floats; α, a single number, and what is stored ``whole`` may be integers."""
        is_alpha = name.endswith(".alpha") and self.code(name) in ("I64", "I32")
        is_counter = whole and self.code(name) in READABLE and self.code(name) != "C64"
        if self.code(name) not in FLOATS and not is_alpha and not is_counter:
            raise InputError(f"{self.label}: {name!r} is of type {self.code(name)}; floats are needed")
        array = self._file.read(name) if self._file else to_numpy(self._table[name])
        if not np.isfinite(array).all():
            raise InputError(f"{self.label}: {name!r} has NaN or infinite entries; the adapter is damaged")
        return array.astype(np.float32) if array.dtype == np.float16 else array


class AdapterBuilder:
    """An adapter under construction."""

    def __init__(self, arrays: NamedArrays) -> None:
        self.arrays = arrays
        self.tensors: dict[str, TuckerTensor] = {}
        self.arrangements: dict[str, Arrangement] = {}
        self.scales: dict[str, float] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self.whole: dict[str, np.ndarray] = {}

    def add(self, name: str, made: Converted, scale: float, keys: Collection[str]) -> None:
        """Take a converted weight; what was computed is stored in float32 at least."""
        if name in self.tensors:
            raise InputError(f"{self.arrays.label}: two modules change {name!r}; the file is damaged, or of two models")
        code = widest_code([self.arrays.code(key) for key in keys])
        if not made.is_copied:
            code = "F64" if code == "F64" else "F32"
        core, exponent = fitting_core(self.arrays.where, name, made.tensor.core, code)
        kind = np.float64 if code == "F64" else np.float32
        tensor = TuckerTensor(core, made.tensor.factors).map(lambda a: a.astype(kind, copy=False))
        self.tensors[name], self.arrangements[name], self.shapes[name] = tensor, made.arrangement, made.shape
        self.scales[name], self.dtypes[name] = math.ldexp(scale, exponent), code

    def keep_whole(self, name: str, key: str) -> None:
        """Take a tensor with its new value."""
        self.whole[name], self.dtypes[name] = self.arrays.read(key, whole=True), self.arrays.code(key)

    def adapter(self, config: Mapping[str, Any]) -> Adapter:
        """Put the adapter together."""
        return Adapter(
            self.tensors,
            arrangements=self.arrangements,
            scales=self.scales,
            shapes=self.shapes,
            whole=self.whole,
            config=config,
            dtypes=self.dtypes,
        )


def shapes_of(base: BaseLike | None) -> dict[str, tuple[int, ...]] | None:
    if base is None:
        return None
    if isinstance(base, Mapping):
        return {name: tuple(array.shape) for name, array in base.items()}
    checkpoint = open_checkpoint(base)
    return {name: checkpoint.info(name).shape for name in checkpoint.names()}


def shape_of(where: str, shapes: Mapping[str, tuple[int, ...]], name: str) -> tuple[int, ...]:
    if name not in shapes:
        raise InputError(f"{where}: the base has no {name!r}, which the adapter changes; pass the base it is for")
    return shapes[name]
