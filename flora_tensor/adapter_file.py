"""The adapter directory: `adapter_config.json` and `adapter_model.safetensors`, read and written without PyTorch.

The tensors may be split among `adapter_model-00001-of-0000N.safetensors`, …; the index of Hugging Face transformers,
`adapter_model.safetensors.index.json`, then says where each one is.

The layout is the one of Hugging Face PEFT. For the parameter ``weight`` of a module ``m`` the tensors are named
``base_model.model.m.tucker_update.core``, ``….factor_0``, ``….factor_1``, …; for another parameter ``p`` of it
``base_model.model.m.tucker_update.p.core``, and so on. A factor that is the identity is absent. A weight whose output
channels have a magnitude of their own (since format 1.1) has a tensor ``….magnitude`` beside the core, and an entry of
``magnitude_pattern`` in the config which says where the channels are. Tensors that are stored
whole (biases, norms) keep their own name after ``base_model.model.`` and hold the new value, not the change.

A stack of equal weights (since format 1.2) is stored as a single weight under the stack's name, such as
``layers.*.fc.weight``, of the shape (L, …) and with an arrangement whose first mode counts the L layers; the config's
table ``stacks`` lists for that name those of its members, in their order. What the layers share is stored once.
"""

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from flora_tensor._adapter_config import CONFIG_NAME, WeightTables, check_format, config_of, metadata_of, write_config
from flora_tensor._adapter_keys import PREFIX, factor_number, split_key, tensor_key, tensor_parts, whole_key
from flora_tensor._adapter_shards import TENSOR_FILES, open_tensors, tensor_writer
from flora_tensor._arrays import to_numpy
from flora_tensor._checks import check_shard_size, some_names
from flora_tensor._errors import InputError
from flora_tensor._files import read_json, staged_directory
from flora_tensor._safetensors import READABLE, decode, dtype_code, encode
from flora_tensor._typing import PathLike
from flora_tensor.adapter import MAX_SCALE, Adapter
from flora_tensor.checkpoint import Checkpoint
from flora_tensor.tucker_tensor import TuckerTensor

__all__ = ["load_adapter", "save_adapter"]

AdapterLike: TypeAlias = PathLike | Mapping[str, TuckerTensor]
REPORT_NAME = "extraction_report.json"
# What a directory of ours may hold, and so what overwriting one may remove. PEFT puts a model card beside an adapter.
OWNED_NAMES = (CONFIG_NAME, *TENSOR_FILES, REPORT_NAME, "README.md")
# Binary exponents of a core's largest entry that a type stores well. Outside them a power of two moves into the
# scale, exactly. Nothing is computed for types that are not named here: 8-bit floats are copied.
_EXPONENTS = {"F64": (-900, 900), "F32": (-100, 100), "BF16": (-100, 100), "F16": (-2, 14)}


def fitting_core(where: str, name: str, core: np.ndarray, dtype: str) -> tuple[np.ndarray, int]:
    """Return the core times 2**-k, and k, so that the storage type neither overflows nor loses digits; mostly k = 0."""
    exponent = math.frexp(float(np.max(np.abs(core), initial=0.0)))[1]
    low, high = _EXPONENTS.get(dtype, (-math.inf, math.inf))
    if low <= exponent <= high:
        return core, 0
    if not math.ldexp(1.0, min(exponent, 1000)) < MAX_SCALE:
        raise ValueError(f"{where}: the change of {name!r} reaches 2^{exponent}; pass dtype='float64' to store it")
    return np.ldexp(core, -exponent), exponent


def as_adapter(given: AdapterLike) -> Adapter:
    """Return an adapter as it is, read from its directory, or made of a plain mapping of Tucker tensors."""
    if isinstance(given, str | os.PathLike):
        return load_adapter(given)
    return given if isinstance(given, Adapter) else Adapter(given)


def load_adapter(path: PathLike, *, strict: bool = True) -> Adapter:
    """Read an adapter directory, everything it claims checked, without PyTorch.

    Parameters
    ----------
    path : path
        A directory with `adapter_config.json` and `adapter_model.safetensors`, or with shards and their index.
    strict : bool, default True
        Whether a key of the tensor file that is unknown, or one that the config promises and the file lacks, is an
        error. With ``strict=False`` both are listed in ``missing_keys`` and ``unexpected_keys``, and incomplete
        weights are left out.

    Returns
    -------
    Adapter
        NumPy arrays, finite; 16-bit floats come as float32, which holds each of their values.

    Raises
    ------
    InputError
        If the directory is no adapter, is of a newer major format, or its parts contradict each other, or an index and
        its shards do, whatever ``strict`` is. It is a ValueError.
    OSError
        If a file cannot be read.

    Warns
    -----
    FloraWarning
        If the adapter is of a newer minor format than this library knows.

    References
    ----------
    The format is described at the head of `flora_tensor.adapter_file`; its layout is that of Hugging Face PEFT.

    Examples
    --------
    >>> import tempfile, pathlib, numpy as np
    >>> t = TuckerTensor(np.ones((1, 1)), [np.ones((2, 1)), np.ones((3, 1))])
    >>> directory = pathlib.Path(tempfile.mkdtemp()) / "adapter"
    >>> _ = save_adapter(directory, {"fc.weight": t})
    >>> load_adapter(directory)["fc.weight"].shape
    (2, 3)
    """
    directory = Path(path)
    config_path = directory / CONFIG_NAME
    if directory.is_dir() and not config_path.exists():
        raise InputError(f"{directory}: has no {CONFIG_NAME}; it is not a flora_tensor adapter")
    if directory.is_file():
        raise NotADirectoryError(
            f"Not a directory: {directory}; an adapter is a directory with {CONFIG_NAME}: pass that"
        )
    config = read_json(config_path)
    check_format(config, config_path)
    return _read_tensors(open_tensors(directory), config, strict=strict)


def _read_tensors(stored: Checkpoint, config: dict[str, Any], *, strict: bool) -> Adapter:
    path = stored.path
    if not stored.names():
        raise InputError(f"{path}: holds no tensors; an adapter has at least one")
    plan = _Plan.of(stored.names(), config, path)
    missing, unexpected = plan.differences()
    if strict and (missing or unexpected):
        raise InputError(_key_message(path, missing, unexpected))

    def read(key: str) -> np.ndarray:
        file, dtype = stored.shard_of(key), stored.info(key).dtype
        if dtype not in READABLE or dtype == "C64":
            raise InputError(f"{file}: tensor {key!r} is of type {dtype}; an adapter holds real numbers")
        array = stored.read(key)
        if not np.isfinite(array).all():
            raise InputError(f"{file}: tensor {key!r} has NaN or infinite entries; the adapter is damaged")
        return array

    tensors = {name: _assemble(name, parts, read, path) for name, parts in plan.complete().items()}

    def kept(table: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in table.items() if name in tensors}

    tables = plan.tables
    magnitudes = {name: read(plan.parts[name]["magnitude"]) for name in kept(tables.channels)}
    whole = {name: read(key) for name, key in plan.whole.items()}
    dtypes = {name: stored.info(plan.parts[name]["core"]).dtype for name in tensors}
    dtypes |= {name: stored.info(key).dtype for name, key in plan.whole.items()}
    try:
        joint = Adapter(
            tensors,
            arrangements=kept(tables.arrangements),
            scales=kept(tables.scales),
            shapes=kept(tables.shapes),
            whole=whole,
            config=config,
            dtypes=dtypes,
            missing_keys=tuple(missing),
            unexpected_keys=tuple(unexpected),
            magnitudes=magnitudes,
            channels=kept(tables.channels),
        )
        stacks = kept(tables.stacks)
        return joint.with_stacks(stacks) if stacks else joint
    except ValueError as error:
        raise InputError(f"{path.parent}: {error}") from None


def _key_message(path: Path, missing: list[str], unexpected: list[str]) -> str:
    lists = [
        f"{what} {some_names(keys)}" for what, keys in (("lacks", missing), ("has the unknown", unexpected)) if keys
    ]
    return f"{path}: {' and '.join(lists)}; pass strict=False to load what fits"


@dataclass(frozen=True)
class _Plan:
    """What the config promises and what the tensor file holds, before any data is read."""

    parts: dict[str, dict[str, str]]  # weight -> part -> key
    whole: dict[str, str]  # name -> key
    promised_whole: list[str]
    unknown: list[str]
    tables: WeightTables

    @classmethod
    def of(cls, keys: Iterable[str], config: Mapping[str, Any], path: Path) -> "_Plan":
        where = f"{path.parent / CONFIG_NAME}"
        promised = config.get("whole", [])
        if not isinstance(promised, list) or not all(isinstance(n, str) for n in promised):
            raise InputError(f"{where}: whole must be a list of names")
        parts: dict[str, dict[str, str]] = {}
        whole: dict[str, str] = {}
        unknown: list[str] = []
        expected_whole = set(promised)
        for key in keys:
            name, part = split_key(key) or (None, None)
            if name is not None and part is not None:
                parts.setdefault(name, {})[part] = key
            elif name is not None and name in expected_whole:
                whole[name] = key
            elif name is not None and "base_layer" in name.split("."):
                continue  # a copy of a frozen weight, which PEFT puts beside the adapter of an embedding
            else:
                unknown.append(key)
        return cls(parts, whole, promised, unknown, WeightTables.of(config, where))

    def differences(self) -> tuple[list[str], list[str]]:
        """Return the keys that are missing and those that are unexpected."""
        tables, unexpected = self.tables, list(self.unknown)
        missing = [PREFIX + name for name in self.promised_whole if name not in self.whole]
        missing += [_key_or_name(name, "core") for name in tables.ranks if name not in self.parts]
        for name, parts in self.parts.items():
            if "core" not in parts:
                missing.append(_key_or_name(name, "core"))
            if "magnitude" in parts and name not in tables.channels:
                unexpected.append(parts["magnitude"])
        missing += [_key_or_name(n, "magnitude") for n in tables.channels if "magnitude" not in self.parts.get(n, ())]
        for table in (tables.scales, tables.shapes, tables.arrangements, tables.stacks):
            missing += [_key_or_name(name, "core") for name in table if name not in self.parts]
        return list(dict.fromkeys(missing)), unexpected

    def complete(self) -> dict[str, tuple[dict[str, str], tuple[int, ...] | None, tuple[int, ...] | None]]:
        """Return, of each weight that has a core, the keys of its parts, its promised ranks and its arranged shape."""
        result: dict[str, tuple[dict[str, str], tuple[int, ...] | None, tuple[int, ...] | None]] = {}
        for name, parts in self.parts.items():
            # Without its magnitudes, the change would be another one.
            if "core" in parts and ("magnitude" in parts) == (name in self.tables.channels):
                shape = self.tables.shapes.get(name)
                arrangement = self.tables.arrangements.get(name)
                if shape is not None and arrangement is not None:
                    try:
                        shape = arrangement.shape(shape)
                    except ValueError as error:
                        raise InputError(f"{CONFIG_NAME}: weight {name!r}: {error}") from None
                result[name] = (parts, self.tables.ranks.get(name), shape)
        return result


def _key_or_name(name: str, part: str) -> str:
    try:
        return tensor_key(name, part)
    except ValueError:
        return name


def _assemble(
    name: str,
    plan: tuple[dict[str, str], tuple[int, ...] | None, tuple[int, ...] | None],
    read: Any,
    path: Path,
) -> TuckerTensor:
    """Put a weight's core and factors together; every contradiction names the weight and the shapes."""
    parts, ranks, shape = plan
    core = read(parts["core"])
    numbers = {factor_number(part): key for part, key in parts.items() if part not in ("core", "magnitude")}
    factors = [read(numbers[k]) if k in numbers else None for k in range(core.ndim)]
    shapes = f"core {core.shape}, factors {[None if u is None else u.shape for u in factors]}"
    if beyond := sorted(k for k in numbers if k is not None and k >= core.ndim):
        raise InputError(f"{path}: weight {name!r} has a factor {beyond[0]}, but {shapes}: no such mode")
    for dtype in {str(a.dtype) for a in (core, *factors) if a is not None}:
        if not dtype.startswith("float"):
            raise InputError(f"{path}: weight {name!r} is stored as {dtype}; core and factors must be floats")
    if ranks is not None and ranks != core.shape:
        raise InputError(f"{path}: weight {name!r}: the config says ranks {ranks}, but it has {shapes}")
    try:
        tensor = TuckerTensor(core, tuple(factors))
    except ValueError as error:
        raise InputError(f"{path}: weight {name!r}: {shapes} do not fit: {error}") from None
    if shape is not None and tensor.shape != shape:
        absent = [k for k, u in enumerate(factors) if u is None]
        hint = f"; factors {absent} are missing" if absent else ""
        raise InputError(f"{path}: weight {name!r} is of arranged shape {shape}, but it has {shapes}{hint}")
    return tensor


def save_adapter(
    path: PathLike,
    adapter: Mapping[str, TuckerTensor],
    *,
    max_shard_size: int | None = None,
    overwrite: bool = False,
) -> Path:
    """Write an adapter directory, whole or not at all; the same adapter gives the same bytes.

    The directory is built beside its place, flushed to the disk, read back and compared, and only then renamed. A
    run that is killed leaves the old directory as it was.

    Parameters
    ----------
    path : path
        The directory to write. Its parents are made where they are missing.
    adapter : Adapter, or mapping of str to TuckerTensor
        What to write; arrays of any library. A plain mapping means native arrangements and scale 1.
    max_shard_size : int, optional
        The most bytes of tensors in a file; more are split into `adapter_model-00001-of-0000N.safetensors`, … with an
        index, as Hugging Face does for models. One file by default: PEFT itself reads no adapter in several.
    overwrite : bool, default False
        Whether an adapter directory that exists is replaced. A directory that holds anything else never is.

    Returns
    -------
    Path
        The directory.

    Raises
    ------
    ValueError
        If there is nothing to write, an entry is not finite, a name cannot be stored, or ``max_shard_size`` is below 1.
    FileExistsError
        If the directory exists and ``overwrite`` is false, or holds files that this library did not write.
    OSError
        If the disk is full or cannot be written to.

    References
    ----------
    Pillai et al., *All file systems are not created equal*, OSDI 2014, for the order of flushing and renaming.

    Examples
    --------
    >>> import tempfile, pathlib, numpy as np
    >>> t = TuckerTensor(np.ones((1, 1)), [np.ones((2, 1)), np.ones((3, 1))])
    >>> written = save_adapter(pathlib.Path(tempfile.mkdtemp()) / "adapter", {"fc.weight": t})
    >>> sorted(file.name for file in written.iterdir())
    ['adapter_config.json', 'adapter_model.safetensors']
    """
    check_shard_size("save_adapter", max_shard_size)
    adapter = adapter if isinstance(adapter, Adapter) else Adapter(adapter)
    if not adapter and not adapter.whole:
        raise ValueError("save_adapter: the adapter is empty; pass at least one tensor")
    stacks, adapter = {name: stack.members for name, stack in adapter.stacks.items()}, adapter.joined()
    stored = dict(_stored_arrays(adapter))
    with staged_directory("save_adapter", Path(path), overwrite=overwrite, owned=OWNED_NAMES) as stage:
        layout = [(key, dtype, tuple(array.shape)) for key, (array, dtype) in stored.items()]
        with tensor_writer(stage, layout, metadata_of(stacks), max_shard_size) as writer:
            for key, (array, dtype) in stored.items():
                writer.write(key, encode_finite(key, to_numpy(array), dtype))
        config = config_of(
            ranks={name: tensor.ranks for name, tensor in adapter.items()},
            scales=adapter.scales,
            arrangements=adapter.arrangements,
            shapes=adapter.shapes,
            whole=adapter.whole,
            extra=adapter.config,
            channels=adapter.channels,
            stacks=stacks,
        )
        write_config(stage / CONFIG_NAME, config)
        load_adapter(stage)
    return Path(path)


def _stored_arrays(adapter: Adapter) -> Iterator[tuple[str, tuple[Any, str]]]:
    """Give the key, array and stored type of everything in the adapter."""
    for name, tensor in adapter.items():
        for part, array in tensor_parts(tensor.core, tensor.factors).items():
            yield tensor_key(name, part), (array, adapter.dtypes.get(name) or dtype_code(array.dtype))
    for name, array in adapter.magnitudes.items():
        # In their own type: they change by little, which the type of the core and the factors may be too narrow for.
        yield tensor_key(name, "magnitude"), (array, dtype_code(array.dtype))
    for name, array in adapter.whole.items():
        yield whole_key(name), (array, adapter.dtypes.get(name) or dtype_code(array.dtype))


def encode_finite(key: str, array: np.ndarray, dtype: str) -> np.ndarray:
    """Return an array's bytes in its stored type; what is not finite, before or after rounding, is refused."""
    if not np.isfinite(array).all():
        raise ValueError(f"save_adapter: {key!r} has NaN or infinite entries; an adapter must be finite")
    data = encode(array, dtype)
    if not np.isfinite(decode(data, dtype, array.shape)).all():
        raise ValueError(f"save_adapter: {key!r} overflows {dtype}; store it as F32, or move its size into the scale")
    return data
