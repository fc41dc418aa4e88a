"""The safetensors format, read strictly and written reproducibly.

The public reader accepts duplicate keys and non-contiguous sizes of up to 2^60, and maps the file into memory, so
that a file truncated during the run kills the process. Here every claim of a header is checked against the file's
size before a byte of data is read, and data is read by position, never mapped.
"""

import functools
import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from flora_tensor._errors import InputError
from flora_tensor._files import create_exclusive, naming, parse_json, write_at

__all__ = [
    "BITS",
    "CODES",
    "FLOATS",
    "MAX_HEADER_BYTES",
    "READABLE",
    "Header",
    "SafetensorsWriter",
    "TensorInfo",
    "decode",
    "decode_into",
    "dtype_code",
    "encode",
    "float_table",
    "in_file_order",
    "read_header",
    "read_into",
    "read_span",
    "round_to",
]

MAX_HEADER_BYTES = 100_000_000
_TRUNCATED = "it is truncated: download or save it again"
# Sizes in bits, as the format's reference implementation has them (safetensors 0.8).
BITS = {
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}
# Mantissa bits, bias and special values of the 8-bit floats: those of Micikevicius et al., *FP8 formats for deep
# learning* (2022), and those without a negative zero.
_FLOAT8 = {
    "F8_E4M3": (3, 7, "fn"),
    "F8_E5M2": (2, 15, "ieee"),
    "F8_E4M3FNUZ": (3, 8, "fnuz"),
    "F8_E5M2FNUZ": (2, 16, "fnuz"),
}
# Floats that NumPy lacks or computes slowly with: they are read as float32.
_SHORT = ("F16", "BF16", *_FLOAT8)
FLOATS = ("F64", "F32", *_SHORT)
_NUMPY = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",
    "C64": "<c8",
    "BOOL": "|b1",
    "I8": "|i1",
    "U8": "|u1",
    "I16": "<i2",
    "U16": "<u2",
    "I32": "<i4",
    "U32": "<u4",
    "I64": "<i8",
    "U64": "<u8",
    **dict.fromkeys(_FLOAT8, "|u1"),
}
READABLE = tuple(_NUMPY)
# How NumPy, PyTorch and JAX call the types that are written.
CODES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "complex64": "C64",
    "bool": "BOOL",
    **{f"int{bits}": f"I{bits}" for bits in (8, 16, 32, 64)},
    **{f"uint{bits}": f"U{bits}" for bits in (8, 16, 32, 64)},
}


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor of a file stands: bytes ``start`` to ``stop`` of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def n_bytes(self) -> int:
        """How many bytes the tensor takes."""
        return self.stop - self.start

    @property
    def n_elements(self) -> int:
        """How many numbers the tensor has."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """What a safetensors file says it holds: tensors in file order, and its text metadata."""

    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    data_start: int


def dtype_name(dtype: Any) -> str:
    """Return the name of an array's data type, alike in all libraries and for either order of bytes."""
    return dtype.name if isinstance(dtype, np.dtype) else str(dtype).rsplit(".", maxsplit=1)[-1]


def dtype_code(dtype: Any) -> str:
    """Return the format's name of an array's data type, of any library; a TypeError where it has none."""
    name = dtype_name(dtype)
    if name not in CODES:
        raise TypeError(f"safetensors: arrays of type {name} cannot be stored; cast to one of {', '.join(CODES)}")
    return CODES[name]


def decode(raw: np.ndarray, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """Turn a tensor's bytes into an array; 8- and 16-bit floats come back as float32, which holds each value."""
    if dtype not in _NUMPY:
        raise InputError(f"tensor of type {dtype}: NumPy has no such type; it can only be copied")
    array = raw.view(_NUMPY[dtype]).reshape(shape)
    if dtype in _SHORT:
        return decode_into(raw, dtype, np.empty(array.size, np.float32)).reshape(shape)
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def decode_into(raw: np.ndarray, dtype: str, out: np.ndarray) -> np.ndarray:
    """Turn the bytes of floats into an array of the type of ``out``, float32 or float64, and of its length.

    ``out`` is only written to where the bytes are not yet such an array: the result may share memory with either.
    """
    array = raw.view(_NUMPY[dtype])
    if array.dtype == out.dtype:
        return array
    if dtype == "BF16" and out.dtype == np.float32:
        bits = out.view(np.uint32)  # bfloat16 is the upper half of a float32
        bits[...] = array
        np.left_shift(bits, np.uint32(16), out=bits)
    elif dtype in _SHORT:
        # Looking 16 bits up is twice as fast as NumPy's own conversion. No index is out of range: "clip" checks none.
        codes = raw.view("<u2" if dtype in ("F16", "BF16") else np.uint8)
        out[...] = np.take(float_table(dtype), codes, mode="clip")
    else:
        out[...] = array
    return out


@functools.cache
def float_table(dtype: str) -> np.ndarray:
    """Return the value of every bit pattern of a float of 8 or 16 bits, as float32."""
    if dtype in _FLOAT8:
        return _float8_table(*_FLOAT8[dtype])
    codes = np.arange(1 << 16, dtype=np.uint16)
    if dtype == "F16":
        return codes.view(np.float16).astype(np.float32)
    return (codes.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _float8_table(mantissa: int, bias: int, special: str) -> np.ndarray:
    """Build the values of an 8-bit float: sign, exponent and ``mantissa`` bits, and what its last codes mean."""
    codes = np.arange(128)
    exponents, fractions = codes >> mantissa, (codes & ((1 << mantissa) - 1)) / (1 << mantissa)
    normal = np.ldexp(1 + fractions, exponents - bias)
    values = np.where(exponents == 0, np.ldexp(fractions, 1 - bias), normal)
    if special == "ieee":  # the largest exponent holds infinity and NaN
        top = exponents == exponents[-1]
        values[top] = np.where(fractions[top] == 0, np.inf, np.nan)
    elif special == "fn":  # finite but for one NaN of each sign
        values[-1] = np.nan
    table = np.concatenate([values, -values]).astype(np.float32)
    if special == "fnuz":  # no negative zero: its code is the only NaN
        table[128] = np.nan
    return table


def encode(array: np.ndarray, dtype: str) -> np.ndarray:
    """Round an array to ``dtype``, to nearest with ties to even, and return its bytes as uint8, shape (n_bytes,)."""
    if dtype not in _NUMPY:
        raise TypeError(f"safetensors: cannot convert to {dtype}; pass one of {', '.join(_NUMPY)}")
    if dtype == "BF16":
        stored = _to_bfloat16(array).astype("<u2", copy=False)
    elif dtype in _FLOAT8:
        stored = _to_float8(array, dtype)
    else:
        with np.errstate(over="ignore"):  # an overflow is an infinity, which the callers look for
            stored = array.astype(_NUMPY[dtype], copy=False)
    return np.ascontiguousarray(stored).reshape(-1).view(np.uint8)


def round_to(array: np.ndarray, dtype: str) -> np.ndarray:
    """Return what is read back after ``array`` was stored as ``dtype``."""
    return decode(encode(array, dtype), dtype, array.shape)


def _to_bfloat16(array: np.ndarray) -> np.ndarray:
    """Round to bfloat16, returned as its bits in uint16."""
    short = _to_float32_odd(array) if array.dtype == np.float64 else array.astype(np.float32, copy=False)
    single = np.ascontiguousarray(short)
    bits = single.view(np.uint32)
    # Adding just under half of the last place carries into the upper half exactly where rounding goes up; the kept
    # part's own last bit makes ties go to even.
    half = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    with np.errstate(over="ignore"):
        rounded = ((bits + half) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(single), np.uint16(0x7FC0), rounded)


def _to_float8(array: np.ndarray, dtype: str) -> np.ndarray:
    """Round to an 8-bit float, returned as its codes: to nearest, ties to even; beyond the range NaN or infinity."""
    values = float_table(dtype)[:128].astype(np.float64)
    finite = values[np.isfinite(values)]
    # The codes of positive values rise with them, so the code is the number of midpoints below. The last midpoint
    # stands where the next value would be rounded down to the largest.
    steps = np.append(finite, 2 * finite[-1] - finite[-2])
    middles = (steps[:-1] + steps[1:]) / 2
    magnitudes = np.abs(array.astype(np.float64, copy=False))
    code = np.searchsorted(middles, magnitudes, side="left")
    tied = np.searchsorted(middles, magnitudes, side="right") > code
    code = np.where(tied, code + (code & 1), code)
    beyond = 0x7C if dtype == "F8_E5M2" else 0x80 if dtype.endswith("FNUZ") else 0x7F
    code = np.where(code >= finite.size, beyond, code)
    code = np.where(np.isnan(magnitudes), 0x80 if dtype.endswith("FNUZ") else 0x7F, code)
    negative = np.signbit(array) & (code != 0x80) & ~((code == 0) & dtype.endswith("FNUZ"))
    return np.where(negative, code | 0x80, code).astype(np.uint8)


def _to_float32_odd(array: np.ndarray) -> np.ndarray:
    """Round float64 to float32 so that a second rounding is right: inexact results get an odd last bit.

    Rounding twice to nearest can land on the wrong side of a tie. Rounding to odd first cannot (Boldo and Melquiond,
    *Emulation of a FMA and correctly rounded sums: proved algorithms using rounding to odd*, IEEE TC 2008).
    """
    with np.errstate(over="ignore"):
        single = array.astype(np.float32)
    inexact = np.isfinite(single) & (single.astype(np.float64) != array)
    even = (np.ascontiguousarray(single).view(np.uint32) & np.uint32(1)) == 0
    toward = np.where(array > single, np.float32(np.inf), np.float32(-np.inf))
    return np.where(inexact & even, np.nextafter(single, toward), single)


def read_span(fd: int, start: int, n_bytes: int, path: Path) -> np.ndarray:
    """Read ``n_bytes`` bytes from position ``start`` of an open file, as uint8; a shorter file is an InputError."""
    buffer = np.empty(n_bytes, np.uint8)
    read_into(fd, start, buffer, path)
    return buffer


def read_into(fd: int, start: int, buffer: np.ndarray, path: Path) -> None:
    """Fill ``buffer``, contiguous uint8, from position ``start`` of an open file."""
    view, done, n_bytes = buffer.data, 0, buffer.nbytes
    while done < n_bytes:
        count = os.preadv(fd, [view[done : done + (1 << 30)]], start + done)
        if count == 0:
            raise InputError(f"{path}: ends at byte {start + done}, inside its data; {_TRUNCATED}")
        done += count


def read_header(fd: int, path: Path) -> Header:
    """Read and check the header of an open safetensors file.

    Guaranteed of the result: the tensors cover the data without overlap, hole or trailing bytes, and each one's
    type and shape make up exactly its bytes.
    """
    size = os.fstat(fd).st_size
    if size < 8:
        raise InputError(f"{path}: {size} bytes; a safetensors file has at least 8")
    length = int.from_bytes(read_span(fd, 0, 8, path).tobytes(), "little")
    if length > MAX_HEADER_BYTES:
        raise InputError(f"{path}: the header claims {length} bytes, more than the {MAX_HEADER_BYTES} allowed")
    if 8 + length > size:
        raise InputError(f"{path}: the header claims {length} bytes, but the file has {size}; {_TRUNCATED}")
    text = read_span(fd, 8, length, path).tobytes()
    if text[:1] != b"{":
        raise InputError(f"{path}: the header does not begin with '{{'; this is not a safetensors file")
    content = parse_json(text, f"{path}: header")
    metadata = _metadata(content.pop("__metadata__", {}), path)
    tensors = [_tensor_info(name, entry, 8 + length, path) for name, entry in content.items()]
    tensors.sort(key=lambda info: (info.start, info.stop))
    _check_cover(tensors, 8 + length, size, path)
    return Header({info.name: info for info in tensors}, metadata, 8 + length)


def _metadata(entry: Any, path: Path) -> dict[str, str]:
    if not isinstance(entry, dict) or not all(isinstance(v, str) for v in entry.values()):
        raise InputError(f"{path}: __metadata__ is not a table of texts")
    return entry


def _tensor_info(name: str, entry: Any, data_start: int, path: Path) -> TensorInfo:
    where = f"{path}: tensor {name!r}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise InputError(f"{where}: its entry is not dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise InputError(f"{where}: unknown type {str(dtype)[:40]!r}; known are {', '.join(BITS)}")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise InputError(f"{where}: shape and data_offsets must be lists of non-negative integers, two offsets")
    start, stop = offsets
    # Python integers do not overflow; sizes beside a zero must still be ones that an array library can hold.
    if len(shape) > 32 or math.prod(n for n in shape if n) * BITS[dtype] >= 2**63:
        raise InputError(f"{where}: shape {_short(shape)} is larger than any memory")
    if math.prod(shape) * BITS[dtype] != 8 * (stop - start):
        raise InputError(
            f"{where}: shape {_short(shape)} of type {dtype} takes {math.prod(shape) * BITS[dtype] / 8:g} bytes, "
            f"but its offsets span {stop - start}"
        )
    return TensorInfo(name, dtype, tuple(shape), data_start + start, data_start + stop)


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)


def _short(shape: list[int]) -> str:
    return str(shape) if len(shape) <= 8 else f"of {len(shape)} axes"


def _check_cover(tensors: list[TensorInfo], data_start: int, size: int, path: Path) -> None:
    position = data_start
    for info in tensors:
        if info.start < position:
            raise InputError(f"{path}: tensor {info.name!r} overlaps the one before it at byte {info.start}")
        if info.start > position:
            raise InputError(f"{path}: bytes {position} to {info.start} belong to no tensor")
        position = info.stop
    if position > size:
        raise InputError(f"{path}: the tensors end at byte {position}, but the file has {size}; {_TRUNCATED}")
    if position < size:
        raise InputError(f"{path}: {size - position} bytes after the last tensor, which belong to no tensor")


def in_file_order(layout: Iterable[tuple[str, str, tuple[int, ...]]]) -> list[tuple[str, str, tuple[int, ...]]]:
    """Sort tensors (name, type, shape) as a file holds them: by falling size of their type, then by name."""
    return sorted(layout, key=lambda item: (-BITS[item[1]], item[0]))


class SafetensorsWriter:
    """Write a new safetensors file whose layout is known, its tensors in any order.

    The same content gives the same bytes. `finish` proves that every tensor was written, flushes the file to the
    disk, reads it again and compares each tensor's digest. The file must not exist; where to put it and when it
    gets its final name is the caller's business.

    Parameters
    ----------
    path : Path
        The file to create.
    layout : iterable of (name, dtype, shape)
        The tensors. They are laid out by falling size of their type, then by name, so that each one is aligned.
    metadata : mapping of str to str
        Text to store beside them.
    """

    def __init__(
        self, path: Path, layout: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]
    ) -> None:
        self.path = path
        entries: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
        position = 0
        for name, dtype, shape in in_file_order(layout):
            stop = position + math.prod(shape) * BITS[dtype] // 8
            entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, stop]}
            position = stop
        text = _dump_header(entries)
        start = 8 + len(text)
        self._spans = {
            n: (start + e["data_offsets"][0], start + e["data_offsets"][1])
            for n, e in entries.items()
            if n != "__metadata__"
        }
        self._digests: dict[str, bytes] = {}
        self._fd = create_exclusive(path)
        write_at(self._fd, len(text).to_bytes(8, "little") + text, 0, path)

    def write(self, name: str, data: np.ndarray) -> None:
        """Write the bytes (uint8, contiguous) of one tensor to its place."""
        start, stop = self._spans[name]
        if data.nbytes != stop - start or name in self._digests:
            raise ValueError(f"SafetensorsWriter: {data.nbytes} bytes for {name!r}, which takes {stop - start}, once")
        write_at(self._fd, data, start, self.path)
        self._digests[name] = hashlib.sha256(data.data).digest()

    def finish(self) -> None:
        """Flush the file to the disk and prove that it reads back as it was written."""
        if missing := self._spans.keys() - self._digests.keys():
            raise ValueError(f"SafetensorsWriter: {sorted(missing)[:3]} were not written")
        with naming(self.path):
            os.fsync(self._fd)
        self.close()
        fd = os.open(self.path, os.O_RDONLY)
        try:
            header = read_header(fd, self.path)
            for name, digest in self._digests.items():
                info = header.tensors[name]
                data = read_span(fd, info.start, info.n_bytes, self.path)
                if hashlib.sha256(data.data).digest() != digest:
                    raise OSError(f"{self.path}: tensor {name!r} does not read back as it was written; check the disk")
        finally:
            os.close(fd)

    def close(self) -> None:
        """Close the file; the second time does nothing."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _dump_header(entries: Mapping[str, Any]) -> bytes:
    try:
        text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError as error:
        raise ValueError("safetensors: a name or metadata text is not valid Unicode; rename it") from error
    # Data begins at a multiple of eight bytes; the format allows trailing spaces for that.
    return text + b" " * (-len(text) % 8)
