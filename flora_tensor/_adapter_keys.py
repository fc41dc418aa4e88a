"""How an adapter's tensors are named in its file: the layout of Hugging Face PEFT (see `flora_tensor.adapter_file`)."""

from collections.abc import Sequence
from typing import Any

__all__ = ["PREFIX", "factor_number", "split_key", "tensor_key", "tensor_parts", "whole_key"]

PREFIX = "base_model.model."
_MARK = "tucker_update"


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
    if not parameter or (not module and "." in name) or _MARK in name.split("."):
        raise ValueError(f"save_adapter: the weight's name {name!r} cannot be stored; rename it")
    middle = [_MARK] if parameter == "weight" else [_MARK, parameter]
    return PREFIX + ".".join([*([module] if module else []), *middle, part])


def tensor_parts(core: Any, factors: Sequence[Any]) -> dict[str, Any]:
    """Return the arrays of a Tucker tensor by what they are called; a mode that is left whole has none.

    Examples
    --------
    >>> list(tensor_parts(0, [1, None, 2]))
    ['core', 'factor_0', 'factor_2']
    """
    return {"core": core, **{f"factor_{mode}": u for mode, u in enumerate(factors) if u is not None}}


def whole_key(name: str) -> str:
    """Return the key in the file of a tensor that is stored whole."""
    if not name or _MARK in name.split("."):
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
    if _MARK not in words:
        return ".".join(words), None
    at = words.index(_MARK)
    module, parameter, part = words[:at], ["weight", *words[at + 1 : -1]], words[-1]
    if (
        len(parameter) > 2
        or words.count(_MARK) > 1
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
