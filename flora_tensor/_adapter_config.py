"""The `adapter_config.json` of an adapter: its tables by weight name, read strictly and written in one way only."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from flora_tensor._errors import InputError
from flora_tensor._files import canonical_json, write_file
from flora_tensor._version import __version__
from flora_tensor._warnings import warn_user
from flora_tensor.adapter import check_scale
from flora_tensor.arrangement import Arrangement

__all__ = ["CONFIG_NAME", "WeightTables", "check_format", "config_of", "metadata_of", "write_config"]

CONFIG_NAME = "adapter_config.json"
_FORMAT_VERSION = "1.2"
# What an adapter without stacks is written as, so that programs which know no newer one read it without a warning.
_WITHOUT_STACKS = "1.1"


def _format_version(stacks: Mapping[str, Any]) -> str:
    """Return the oldest version of the format that can hold an adapter."""
    return _FORMAT_VERSION if stacks else _WITHOUT_STACKS


def metadata_of(stacks: Mapping[str, Any]) -> dict[str, str]:
    """Return the metadata of the tensor file."""
    version = _format_version(stacks)
    return {"flora_tensor": canonical_json({"format": "flora_tensor.adapter", "format_version": version})}


def check_format(config: Mapping[str, Any], path: Path | str) -> None:
    """Refuse configs of other methods and of formats that this version cannot know."""
    kind, version = config.get("peft_type"), config.get("format_version")
    if kind != "FLORA":
        convertible = kind in ("LORA", "LOHA", "LOKR")
        hint = "; convert it first: flora-tensor convert, convert_adapter" if convertible else ""
        raise InputError(f"{path}: not a flora_tensor adapter: peft_type is {kind!r}; 'FLORA' is needed{hint}")
    numbers = version.split(".") if isinstance(version, str) else []
    if len(numbers) != 2 or not all(n.isascii() and n.isdigit() and len(n) < 9 for n in numbers):
        raise InputError(
            f"{path}: not a flora_tensor adapter: format_version is {version!r}; one such as '1.0' is needed"
        )
    known = [int(n) for n in _FORMAT_VERSION.split(".")]
    major, minor = (int(n) for n in numbers)
    if major != known[0]:
        raise InputError(f"{path}: format {version}, but this version reads {_FORMAT_VERSION}; upgrade flora-tensor")
    if minor > known[1]:
        warn_user(f"{path}: format {version} is newer than {_FORMAT_VERSION}; what it adds is ignored")


class WeightTables(NamedTuple):
    """What a config says of each weight, by its name."""

    ranks: dict[str, tuple[int, ...]]
    arrangements: dict[str, Arrangement]
    scales: dict[str, float]
    shapes: dict[str, tuple[int, ...]]
    channels: dict[str, tuple[int, int]]
    stacks: dict[str, list[str]]

    @classmethod
    def of(cls, config: Mapping[str, Any], where: str) -> "WeightTables":
        """Read the tables; everything in them has the right type afterwards."""
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
        return cls(ranks, patterns, scales, shapes, channels, stacks)


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
        "format_version": _format_version(stacks),
        "flora_tensor_version": __version__,
    }


def write_config(path: Path, config: Mapping[str, Any]) -> None:
    """Write `adapter_config.json`, for people to read, in one way only."""
    try:
        text = json.dumps(config, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"save_adapter: the config cannot be written as JSON: {error}") from None
    write_file(path, (text + "\n").encode())
