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

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any
from warnings import warn

import numpy as np

from flora_tensor._adapter_shards import TENSOR_FILES, open_tensors, tensor_writer
from flora_tensor._arrays import to_numpy
from flora_tensor._checks import check_shard_size, some_names
from flora_tensor._errors import InputError
from flora_tensor._files import canonical_json, read_json, staged_directory, write_file
from flora_tensor._safetensors import READABLE, decode, dtype_code, encode
from flora_tensor._version import __version__
from flora_tensor._warnings import FloraWarning
from flora_tensor.adapter import MAX_SCALE, Adapter, check_scale
from flora_tensor.arrangement import Arrangement
from flora_tensor.checkpoint import Checkpoint
from flora_tensor.tucker_tensor import TuckerTensor

__all__ = ["load_adapter", "save_adapter"]

FORMAT_VERSION = "1.2"
# What an adapter without stacks is written as, so that programs which know no newer one read it without a warning.
_WITHOUT_STACKS = "1.1"
CONFIG_NAME = "adapter_config.json"
REPORT_NAME = "extraction_report.json"
# What a directory of ours may hold, and so what overwriting one may remove. PEFT puts a model card beside an adapter.
OWNED_NAMES = (CONFIG_NAME, *TENSOR_FILES, REPORT_NAME, "README.md")
PREFIX = "base_model.model."
MARK = "tucker_update"
# Binary exponents of a core's largest entry that a type stores well. Outside them a power of two moves into the
# scale, exactly.
_EXPONENTS = {"F64": (-900, 900), "F32": (-100, 100), "BF16": (-100, 100), "F16": (-2, 14)}


def format_version(stacks: Mapping[str, Any]) -> str:
    """Return the oldest version of the format that can hold an adapter."""
    return FORMAT_VERSION if stacks else _WITHOUT_STACKS


def metadata_of(stacks: Mapping[str, Any]) -> dict[str, str]:
    """Return the metadata of the tensor file."""
    version = format_version(stacks)
    return {"flora_tensor": canonical_json({"format": "flora_tensor.adapter", "format_version": version})}


def fitting_core(where: str, name: str, core: np.ndarray, dtype: str) -> tuple[np.ndarray, int]:
    """Return the core times 2**-k, and k, so that the storage type neither overflows nor loses digits; mostly k = 0."""
    exponent = math.frexp(float(np.max(np.abs(core), initial=0.0)))[1]
    low, high = _EXPONENTS[dtype]
    if low <= exponent <= high:
        return core, 0
    if not math.ldexp(1.0, min(exponent, 1000)) < MAX_SCALE:
        raise ValueError(f"{where}: the change of {name!r} reaches 2^{exponent}; pass dtype='float64' to store it")
    return np.ldexp(core, -exponent), exponent


def as_adapter(given: str | os.PathLike[str] | Mapping[str, TuckerTensor]) -> Adapter:
    """Return an adapter as it is, read from its directory, or made of a plain mapping of Tucker tensors."""
    if isinstance(given, str | os.PathLike):
        return load_adapter(given)
    return given if isinstance(given, Adapter) else Adapter(dict(given))


def tensor_key(name: str, part: str) -> str:
    """Return the key in the file of a weight's ``core``, ``factor_k`` or ``magnitude``.

    Examples
    --------
    >>> tensor_key("conv1.weight", "core")
    'base_model.model.conv1.tucker_update.core'
    >>> tensor_key("attn.in_proj_weight", "factor_0")
    'base_model.model.attn.tucker_update.in_proj_weight.factor_0'
    """
    module, _, parameter = name.rpartition(".")
    if not parameter or MARK in name.split("."):
        raise ValueError(f"save_adapter: the weight's name {name!r} cannot be stored; rename it")
    middle = [MARK] if parameter == "weight" else [MARK, parameter]
    return PREFIX + ".".join([*([module] if module else []), *middle, part])


def whole_key(name: str) -> str:
    """Return the key in the file of a tensor that is stored whole."""
    if not name or MARK in name.split("."):
        raise ValueError(f"save_adapter: the tensor's name {name!r} cannot be stored; rename it")
    return PREFIX + name


def split_key(key: str) -> tuple[str, str | None] | None:
    """Return (weight, part) for a part of a Tucker tensor, (name, None) for a whole one, ``None`` for any other key.

    Examples
    --------
    >>> split_key("base_model.model.attn.tucker_update.in_proj_weight.factor_0")
    ('attn.in_proj_weight', 'factor_0')
    >>> split_key("base_model.model.fc.bias")
    ('fc.bias', None)
    """
    if not key.startswith(PREFIX) or len(key) == len(PREFIX):
        return None
    words = key.removeprefix(PREFIX).split(".")
    if MARK not in words:
        return ".".join(words), None
    at = words.index(MARK)
    module, parameter, part = words[:at], ["weight", *words[at + 1 : -1]], words[-1]
    if (
        len(parameter) > 2
        or words.count(MARK) > 1
        or (part not in ("core", "magnitude") and factor_number(part) is None)
    ):
        return None
    if len(parameter) == 2 and parameter[1] in ("weight", ""):
        return None  # `weight` is never spelled out
    return ".".join([*module, parameter[-1]]), part


def factor_number(part: str) -> int | None:
    """Return k of ``factor_k``, written without leading zeros, else ``None``."""
    digits = part.removeprefix("factor_")
    if part == digits or not digits.isascii() or not digits.isdigit() or len(digits) > 2:
        return None
    return int(digits) if str(int(digits)) == digits else None


def load_adapter(path: str | os.PathLike[str], *, strict: bool = True) -> Adapter:
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
    config = read_json(config_path)
    _check_format(config, config_path)
    return _read_tensors(open_tensors(directory), config, strict=strict)


def _check_format(config: Mapping[str, Any], path: Path) -> None:
    """Refuse configs of other methods and of formats that this version cannot know."""
    kind, version = config.get("peft_type"), config.get("format_version")
    if kind != "FLORA":
        raise InputError(f"{path}: not a flora_tensor adapter: peft_type is {kind!r}; 'FLORA' is needed")
    numbers = version.split(".") if isinstance(version, str) else []
    if len(numbers) != 2 or not all(n.isascii() and n.isdigit() and len(n) < 9 for n in numbers):
        raise InputError(
            f"{path}: not a flora_tensor adapter: format_version is {version!r}; one such as '1.0' is needed"
        )
    known = [int(n) for n in FORMAT_VERSION.split(".")]
    major, minor = (int(n) for n in numbers)
    if major != known[0]:
        raise InputError(f"{path}: format {version}, but this version reads {FORMAT_VERSION}; upgrade flora-tensor")
    if minor > known[1]:
        warn(f"{path}: format {version} is newer than {FORMAT_VERSION}; what it adds is ignored", FloraWarning, 3)


def _read_tensors(stored: Checkpoint, config: dict[str, Any], *, strict: bool) -> Adapter:
    path = stored.path
    if not stored.names():
        raise InputError(f"{path}: holds no tensors; an adapter has at least one")
    plan = _Plan.of(stored.names(), config, path)
    missing, unexpected = plan.differences()
    if strict and (missing or unexpected):
        raise InputError(_key_message(path, missing, unexpected))
    arrays: dict[str, np.ndarray] = {}

    def read(key: str) -> np.ndarray:
        file, dtype = stored.shard_of(key), stored.info(key).dtype
        if dtype not in READABLE or dtype == "C64":
            raise InputError(f"{file}: tensor {key!r} is of type {dtype}; an adapter holds real numbers")
        arrays[key] = stored.read(key)
        if not np.isfinite(arrays[key]).all():
            raise InputError(f"{file}: tensor {key!r} has NaN or infinite entries; the adapter is damaged")
        return arrays[key]

    tensors = {name: _assemble(name, parts, read, path) for name, parts in plan.complete().items()}
    magnitudes = {name: read(plan.parts[name]["magnitude"]) for name in plan.channels if name in tensors}
    whole = {name: read(key) for name, key in plan.whole.items()}
    dtypes = {name: stored.info(plan.parts[name]["core"]).dtype for name in tensors}
    dtypes |= {name: stored.info(key).dtype for name, key in plan.whole.items()}
    stacks = {name: members for name, members in plan.stacks.items() if name in tensors}
    try:
        joint = Adapter(
            tensors,
            {n: a for n, a in plan.arrangements.items() if n in tensors},
            {n: s for n, s in plan.scales.items() if n in tensors},
            {n: s for n, s in plan.shapes.items() if n in tensors},
            whole,
            config,
            dtypes,
            tuple(missing),
            tuple(unexpected),
            magnitudes,
            {n: c for n, c in plan.channels.items() if n in tensors},
        )
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
    ranks: dict[str, tuple[int, ...]]
    arrangements: dict[str, Arrangement]
    scales: dict[str, float]
    shapes: dict[str, tuple[int, ...]]
    channels: dict[str, tuple[int, int]]
    stacks: dict[str, list[str]]

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
            else:
                unknown.append(key)
        return cls(parts, whole, promised, unknown, *_weight_tables(config, where))

    def differences(self) -> tuple[list[str], list[str]]:
        """Return the keys that are missing and those that are unexpected."""
        missing = [PREFIX + name for name in self.promised_whole if name not in self.whole]
        missing += [_key_or_name(name, "core") for name in self.ranks if name not in self.parts]
        unexpected = list(self.unknown)
        for name, parts in self.parts.items():
            if "core" not in parts:
                missing.append(_key_or_name(name, "core"))
            if "magnitude" in parts and name not in self.channels:
                unexpected.append(parts["magnitude"])
        missing += [_key_or_name(n, "magnitude") for n in self.channels if "magnitude" not in self.parts.get(n, ())]
        for table in (self.scales, self.shapes, self.arrangements, self.stacks):
            missing += [_key_or_name(name, "core") for name in table if name not in self.parts]
        return list(dict.fromkeys(missing)), unexpected

    def complete(self) -> dict[str, tuple[dict[str, str], tuple[int, ...] | None, tuple[int, ...] | None]]:
        """Return, of each weight that has a core, the keys of its parts, its promised ranks and its arranged shape."""
        result: dict[str, tuple[dict[str, str], tuple[int, ...] | None, tuple[int, ...] | None]] = {}
        for name, parts in self.parts.items():
            # Without its magnitudes, the change would be another one.
            if "core" in parts and ("magnitude" in parts) == (name in self.channels):
                shape = self.shapes.get(name)
                arrangement = self.arrangements.get(name)
                if shape is not None and arrangement is not None:
                    try:
                        shape = arrangement.shape(shape)
                    except ValueError as error:
                        raise InputError(f"{CONFIG_NAME}: weight {name!r}: {error}") from None
                result[name] = (parts, self.ranks.get(name), shape)
        return result


def _key_or_name(name: str, part: str) -> str:
    try:
        return tensor_key(name, part)
    except ValueError:
        return name


def _weight_tables(config: Mapping[str, Any], where: str) -> tuple[Any, Any, Any, Any, Any, Any]:
    """Read the tables that the config keeps by weight name."""
    ranks = {n: _sizes(v, f"{where}: rank_pattern of {n!r}") for n, v in _table(config, "rank_pattern", where)}
    shapes = {n: _sizes(v, f"{where}: weight_shapes of {n!r}") for n, v in _table(config, "weight_shapes", where)}
    try:
        scales = {n: check_scale(f"scale_pattern of {n!r}", v) for n, v in _table(config, "scale_pattern", where)}
        check_scale("scale", config.get("scale", 1.0))
        patterns = {n: _arrangement(n, v) for n, v in _table(config, "arrangement_pattern", where)}
        channels = {n: _channels(n, v) for n, v in _table(config, "magnitude_pattern", where)}
        stacks = {n: _members(n, v) for n, v in _table(config, "stacks", where)}
    except ValueError as error:
        raise InputError(f"{where}: {error}") from None
    return ranks, patterns, scales, shapes, channels, stacks


def _members(name: str, value: Any) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(member, str) for member in value):
        raise ValueError(f"stacks of {name!r} must be a list of names, not {str(value)[:100]}")
    return value


def _channels(name: str, value: Any) -> tuple[int, int]:
    axis, groups = (value.get("axis"), value.get("groups", 1)) if isinstance(value, dict) else (None, None)
    if type(axis) is not int or type(groups) is not int or axis not in (0, 1) or not 0 < groups < 2**63:
        raise ValueError(f"magnitude_pattern of {name!r} must have an axis, 0 or 1, and positive groups")
    return axis, groups


def _table(config: Mapping[str, Any], key: str, where: str) -> Any:
    table = config.get(key, {})
    if not isinstance(table, dict):
        raise InputError(f"{where}: {key} must be a table by weight name, not {type(table).__name__}")
    return table.items()


def _sizes(value: Any, where: str) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(n) is int and 0 <= n < 2**63 for n in value):
        raise InputError(f"{where} must be a list of non-negative integers, not {str(value)[:100]}")
    return tuple(value)


def _arrangement(name: str, value: Any) -> Arrangement:
    sizes = value.get("sizes", {}) if isinstance(value, dict) else None
    if (
        not isinstance(sizes, dict)
        or not isinstance(value.get("pattern"), str)
        or not all(type(n) is int and n > 0 for n in sizes.values())
    ):
        raise ValueError(f"arrangement_pattern of {name!r} must have a pattern and positive sizes")
    return Arrangement(value["pattern"], sizes)


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
    path: str | os.PathLike[str],
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
    adapter = adapter if isinstance(adapter, Adapter) else Adapter(dict(adapter))
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
        for part, array in [("core", tensor.core), *((f"factor_{k}", u) for k, u in enumerate(tensor.factors))]:
            if array is not None:
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


def config_of(
    *,
    ranks: Mapping[str, Sequence[int]],
    scales: Mapping[str, float],
    arrangements: Mapping[str, Arrangement],
    shapes: Mapping[str, Sequence[int]],
    whole: Iterable[str],
    extra: Mapping[str, Any],
    channels: Mapping[str, tuple[int, int]] = MappingProxyType({}),
    stacks: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> dict[str, Any]:
    """Return the content of `adapter_config.json`; keys of ``extra`` that we do not compute are kept."""
    default = check_scale("save_adapter: config's scale", extra.get("scale", 1.0))
    config: dict[str, Any] = {"task_type": None, "inference_mode": True, "base_model_name_or_path": None}
    weights = [member for name in ranks for member in stacks.get(name, [name])]
    return {
        **config,
        **{key: value for key, value in extra.items() if key != "stacks"},
        "peft_type": "FLORA",
        "target_modules": sorted({name.rpartition(".")[0] for name in weights}),
        "rank_pattern": {name: list(r) for name, r in ranks.items()},
        "scale": default,
        "scale_pattern": {name: s for name, s in scales.items() if s != default},
        "arrangement_pattern": {
            name: {"pattern": a.pattern, "sizes": dict(a.sizes)}
            for name, a in arrangements.items()
            if name in stacks or not a.is_native
        },
        "weight_shapes": {name: list(shape) for name, shape in shapes.items()},
        "magnitude_pattern": {name: {"axis": axis, "groups": groups} for name, (axis, groups) in channels.items()},
        **({"stacks": {name: list(members) for name, members in stacks.items()}} if stacks else {}),
        "whole": sorted(whole),
        "format_version": format_version(stacks),
        "flora_tensor_version": __version__,
    }


def write_config(path: Path, config: Mapping[str, Any]) -> None:
    """Write `adapter_config.json`, for people to read, in one way only."""
    try:
        text = json.dumps(config, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"save_adapter: the config cannot be written as JSON: {error}") from None
    write_file(path, (text + "\n").encode())
