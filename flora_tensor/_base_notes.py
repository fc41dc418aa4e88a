"""What an adapter's config notes of the model that it is for: the layers of its weights, and a few of their numbers.

The numbers are what a weight is recognized by. A digest of a whole checkpoint changes with every cast and every renamed
tensor. These are of one weight, and are compared to the rounding of the narrower of the two types they were taken in.
"""

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias, get_args

import numpy as np

from flora_tensor._checks import check_choice
from flora_tensor._safetensors import FLOATS

__all__ = [
    "LAYERS",
    "SAMPLES",
    "VerifyBase",
    "check_verify_base",
    "noted_layer",
    "noted_names",
    "sample_positions",
    "samples_agree",
    "text_of_samples",
]

# What happens where a base is not the one that was noted.
VerifyBase: TypeAlias = Literal["warn", "error", "ignore"]

# Under these names a config holds the layer and the samples of each weight.
LAYERS, SAMPLES = "layer_pattern", "base_samples"
_N_SAMPLES = 16
# The distance from 1 to the next number of a type; float64 is noted as float32.
_EPSILON = {"F64": 2.0**-23, "F32": 2.0**-23, "F16": 2.0**-10, "BF16": 2.0**-7}
_SUBNORMAL = 2.0**-24  # the smallest step of float16


def check_verify_base(where: str, value: Any) -> None:
    """Refuse what is none of the three choices of `VerifyBase`."""
    check_choice(where, "verify_base", value, get_args(VerifyBase))


def noted_layer(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Return what a config notes of a weight's layer: ``kind``, and of a convolution ``groups`` and ``padding_mode``.

    Nothing, where nothing is noted or where it is no table: the notes are not needed to read an adapter.

    Examples
    --------
    >>> noted_layer({"layer_pattern": {"fc.weight": {"kind": "linear"}}}, "fc.weight")
    {'kind': 'linear'}
    """
    table = config.get(LAYERS)
    entry = table.get(name) if isinstance(table, Mapping) else None
    return entry if isinstance(entry, Mapping) else {}


def noted_names(config: Mapping[str, Any], name: str) -> list[str]:
    """Return the other names that a config notes of a weight that is tied: the model's, in its order.

    Examples
    --------
    >>> noted_names({"layer_pattern": {"wte.weight": {"kind": "embedding", "tied": ["lm_head.weight"]}}}, "wte.weight")
    ['lm_head.weight']
    """
    names = noted_layer(config, name).get("tied")
    return [other for other in names if isinstance(other, str)] if isinstance(names, list) else []


def sample_positions(size: int) -> list[int]:
    """Return the places of the samples in a weight of ``size`` entries, flattened in C order: evenly spread.

    Examples
    --------
    >>> sample_positions(31)
    [0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30]
    """
    return sorted({(size - 1) * k // (_N_SAMPLES - 1) for k in range(_N_SAMPLES)}) if size else []


def text_of_samples(values: np.ndarray, dtype: str) -> str:
    """Return samples of a weight of type ``dtype`` as they stand in a config: float32, in hexadecimal.

    Examples
    --------
    >>> text_of_samples(np.asarray([1.0, -2.0]), "BF16")
    'BF16:0000803f000000c0'
    """
    with np.errstate(over="ignore"):
        return f"{dtype}:{values.astype('<f4').tobytes().hex()}"


def samples_agree(noted: Any, found: str) -> bool:
    """Tell whether samples can be of one weight, stored in the two types; what cannot be read speaks against nothing.

    Examples
    --------
    >>> samples_agree("F32:3333b33f", "BF16:0000b33f"), samples_agree("F32:3333b33f", "F32:0000b33f")
    (True, False)
    """
    then, now = _read(noted), _read(found)
    if then is None or now is None:
        return True
    if then[0] == now[0]:
        return bool(np.array_equal(then[1], now[1], equal_nan=True))
    if then[1].shape != now[1].shape:
        return False
    tolerance = max(_EPSILON.get(code, 0.25) for code in (then[0], now[0]))  # 2⁻² is that of float8 E5M2
    a, b = then[1].astype(np.float64), now[1].astype(np.float64)
    return bool((np.abs(a - b) <= tolerance * np.maximum(np.abs(a), np.abs(b)) + _SUBNORMAL).all())


def _read(text: Any) -> tuple[str, np.ndarray] | None:
    code, mark, digits = text.partition(":") if isinstance(text, str) else ("", "", "")
    if not mark or code not in FLOATS:
        return None
    try:
        return code, np.frombuffer(bytes.fromhex(digits), "<f4")
    except ValueError:
        return None
