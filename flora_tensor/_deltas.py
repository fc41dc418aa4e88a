"""How one tensor changed between two checkpoints: read, checked and measured."""

import math
import os
import zlib
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flora_tensor._errors import InputError
from flora_tensor._memory import require_memory
from flora_tensor._safetensors import BITS, decode_into, dtype_code
from flora_tensor._typing import Array, PathLike
from flora_tensor.checkpoint import Checkpoint
from flora_tensor.noise import FORMATS

__all__ = [
    "Change",
    "check_distinct",
    "check_memory",
    "check_stored_finite",
    "checked_device",
    "frobenius_norm",
    "on_device",
    "read_change",
    "read_delta",
    "read_digest",
]

# Numbers that are read, subtracted and measured at a time: what the processor's cache holds of them and their copies.
_PIECE = 1 << 17

# Squares of float32 numbers are summed in float32 this many at a time, and those sums in float64: the relative error of
# such a sum, about 1e-7 and random, falls with the root of their number. In large tensors less than 1e-8 is left.
_ROW = 1 << 8

# `flora_tensor.noise.FORMATS` by the names that files have for the types.
_FORMATS = {dtype_code(name): parts for name, parts in FORMATS.items()}


@dataclass(frozen=True)
class Change:
    """How one tensor changed, measured while it was read.

    ``values`` is float64 where either side is, else float32, of the tensor's shape; ``norm`` its Frobenius norm;
    ``unchanged`` how many entries are equal; ``noise`` the standard deviation of what rounding to the storage types
    left in an entry (0 where it was not asked for); ``digest`` tells the bits of both sides apart from others.
    """

    values: np.ndarray
    norm: float
    unchanged: int
    noise: float
    digest: str


def read_delta(base: Checkpoint, tuned: Checkpoint, name: str) -> np.ndarray | None:
    """Read how a tensor changed, or ``None`` where its bits did not: float64 where either side is, else float32."""
    change = read_change(base, tuned, name)
    return None if change is None else change.values


def read_change(base: Checkpoint, tuned: Checkpoint, name: str, *, noise: bool = False) -> Change | None:
    """Read how a tensor changed, or ``None`` where its bits did not, in one pass over both files.

    Piece by piece, so that each number comes from memory once for reading, comparing, converting, subtracting, testing
    and summing, and neither side is ever held whole.
    """
    with ExitStack() as stack:
        sides = [_Side(stack, checkpoint, name, noise) for checkpoint in (base, tuned)]
        size = sides[0].info.n_elements
        if sides[0].info.dtype == sides[1].info.dtype and not any(
            _differs(sides, start, min(start + _PIECE, size)) for start in range(0, size, _PIECE)
        ):
            return None
        work = np.float64 if "F64" in (sides[0].info.dtype, sides[1].info.dtype) else np.float32
        delta = np.empty(size, work)
        squares, unchanged = _subtract(sides, delta)
    norm = math.sqrt(squares)
    least, most = (1e-200, 1e200) if work == np.float64 else (1e-28 * size, 1e30)
    if not least < squares < most:  # else some squares may have vanished, or the sum is not even a number
        _check_sides(base, tuned, name, delta)
        norm = frobenius_norm(delta)
    left = _rounding_left(sides, delta, norm) if noise else 0.0
    return Change(delta.reshape(sides[0].info.shape), norm, unchanged, left, _digest(sides))


def _rounding_left(sides: "Sequence[_Side]", delta: np.ndarray, norm: float) -> float:
    """Return the standard deviation of what rounding to the storage types, and of the difference, left in an entry."""
    rounding = max(side.noise() for side in sides)
    dtype = "F64" if delta.dtype == np.float64 else "F32"
    # A last place is at most 2^(1 − bits) of the number. Beside the rounding of a shorter type that vanishes.
    if _ulp_noise(norm * norm * math.ldexp(1.0, 2 - 2 * _FORMATS[dtype][0]), delta.size) < 1e-6 * rounding:
        return rounding
    return math.hypot(rounding, _ulp_noise(_ulp_squares(delta, dtype), delta.size))


def read_digest(base: Checkpoint, tuned: Checkpoint, name: str) -> str:
    """Return the digest that `read_change` gives, for the cost of reading."""
    with ExitStack() as stack:
        sides = [_Side(stack, checkpoint, name, noise=False) for checkpoint in (base, tuned)]
        for side in sides:
            for start in range(0, side.info.n_elements, _PIECE):
                side.raw(start, min(start + _PIECE, side.info.n_elements), note=True)
    return _digest(sides)


def _digest(sides: "Sequence[_Side]") -> str:
    return "-".join(str(side.digest) for side in sides)


class _Digest:
    """Thirty-two bits against accidents, at a third of what CRC-32 alone costs; nobody gains by forging his own input.

    Each of many lanes takes every so-manieth word, as h ← f((h + word) · odd number). Without f, which brings the
    highest bits down, signs that flip twice in a lane would go unnoticed. All lanes go into one CRC-32.
    """

    def __init__(self) -> None:
        self._lanes = self._shifted = np.zeros(0, np.uint32)
        self._rest = 0

    def add(self, piece: np.ndarray) -> None:
        """Take the next bytes; all pieces but the last are of the length of the first."""
        words = piece[: piece.size // 4 * 4].view("<u4")
        if not self._lanes.size:
            self._lanes, self._shifted = np.zeros(words.size, np.uint32), np.empty(words.size, np.uint32)
        lanes, shifted = self._lanes[: words.size], self._shifted[: words.size]
        np.add(lanes, words, out=lanes)
        np.multiply(lanes, np.uint32(0x9E3779B1), out=lanes)
        np.right_shift(lanes, np.uint32(15), out=shifted)
        np.bitwise_xor(lanes, shifted, out=lanes)
        self._rest = zlib.crc32(piece[words.nbytes :].data, self._rest)

    def __str__(self) -> str:
        return f"{zlib.crc32(self._lanes.astype('<u4', copy=False).data, self._rest):08x}"


class _Side:
    """One tensor of one checkpoint, read piece by piece into a buffer that is used again and again."""

    def __init__(self, stack: ExitStack, checkpoint: Checkpoint, name: str, noise: bool) -> None:
        self.info = checkpoint.info(name)
        self.digest = _Digest()
        self._item = BITS[self.info.dtype] // 8
        self._raw = np.empty(min(_PIECE, self.info.n_elements) * self._item, np.uint8)
        self._read = stack.enter_context(checkpoint.reader(name))
        self._measured = noise and self.info.dtype in _FORMATS
        self._squares = 0.0

    def raw(self, start: int, stop: int, *, note: bool = False) -> np.ndarray:
        """Read the bytes of the numbers ``start`` to ``stop``, into the digest too; the next call overwrites them."""
        piece = self._raw[: (stop - start) * self._item]
        self._read(start * self._item, piece)
        if note:
            self.digest.add(piece)
        return piece

    def values(self, start: int, stop: int, out: np.ndarray) -> np.ndarray:
        """Read numbers, into ``out`` where they must be converted, and take note of their bits and their rounding."""
        raw = self.raw(start, stop, note=True)
        values = decode_into(raw, self.info.dtype, out)
        if self._measured:
            self._squares += _ulp_squares(values, self.info.dtype)
        return values

    def noise(self) -> float:
        """Return the standard deviation of the rounding of what was read."""
        return _ulp_noise(self._squares, self.info.n_elements) if self._measured else 0.0


def _differs(sides: Sequence[_Side], start: int, stop: int) -> bool:
    return not np.array_equal(sides[0].raw(start, stop), sides[1].raw(start, stop))


def _subtract(sides: Sequence[_Side], delta: np.ndarray) -> tuple[float, int]:
    """Fill ``delta``; return Σ δ² in float64, which is not finite where anything is not, and the count of zeros."""
    buffers = [np.empty(min(_PIECE, delta.size), delta.dtype) for _ in sides]
    flags = np.empty(len(buffers[0]), bool)
    squares, changed = 0.0, 0
    with np.errstate(over="ignore", invalid="ignore"):
        for start in range(0, delta.size, _PIECE):
            part = delta[start : start + _PIECE]
            count = len(part)
            old, new = (side.values(start, start + count, b[:count]) for side, b in zip(sides, buffers))
            np.subtract(new, old, out=part)
            squares += _sum_of_squares(part)
            changed += int(np.count_nonzero(np.not_equal(part, 0, out=flags[:count])))
    return squares, delta.size - changed


def _ulp_squares(values: np.ndarray, dtype: str) -> float:
    """Sum the squared units in the last place of numbers that are stored as ``dtype``.

    As `flora_tensor.rounding_noise` does, but by masking: sign and significand cleared, a float is the power of two
    that its last place is a fixed part of. Here numbers below the normal ones count as zero.
    """
    bits, least = _FORMATS[dtype]
    integer, mask = (np.uint64, 0x7FF << 52) if values.dtype == np.float64 else (np.uint32, 0xFF << 23)
    total, floor = 0.0, math.ldexp(1.0, least)
    for start in range(0, values.size, _PIECE):
        powers = (values[start : start + _PIECE].view(integer) & integer(mask)).view(values.dtype)
        if dtype == "F16":  # the only type here whose numbers below the normal ones are of any size
            np.maximum(powers, powers.dtype.type(floor), out=powers)
        found = _sum_of_squares(powers)
        if not 1e-28 * powers.size < found < math.inf:
            scaled = np.maximum(powers, floor, dtype=np.float64)
            found = float(scaled @ scaled)
        total += found
    return math.ldexp(total, 2 - 2 * bits)


def _sum_of_squares(x: np.ndarray) -> float:
    """Sum the squares of a vector, in float32 to about 1e-8 where nothing leaves its range."""
    if x.dtype == np.float64:
        return float(x @ x)
    whole = x[: x.size // _ROW * _ROW].reshape(-1, _ROW)
    with np.errstate(over="ignore", invalid="ignore"):
        rows = np.matmul(whole[:, None, :], whole[:, :, None])
    rest = x[whole.size :].astype(np.float64)
    return float(np.sum(rows, dtype=np.float64)) + float(rest @ rest)


def _ulp_noise(squares: float, size: int) -> float:
    return math.sqrt(squares / size / 12)


def _check_sides(base: Checkpoint, tuned: Checkpoint, name: str, delta: np.ndarray) -> None:
    """Say which number is not finite, if one is; or that their difference is not."""
    for side in (base, tuned):
        check_stored_finite(side.path, name, side.read(name))
    if not np.isfinite(delta).all():
        raise InputError(f"extract: the change of {name!r} overflows {delta.dtype.name}; store the inputs as F64")


def check_stored_finite(path: Path, name: str, x: np.ndarray) -> None:
    """Refuse a tensor of a file that holds NaN or infinity, before any SVD: LAPACK's can loop for ever on one."""
    finite = np.isfinite(x)
    if not finite.all():
        first = tuple(int(i[0]) for i in np.nonzero(~finite)) if x.ndim else ()
        count = int(x.size - np.count_nonzero(finite))
        raise InputError(f"{path}: {name!r} has {count} entries that are NaN or infinite, the first at {first}")


def frobenius_norm(x: np.ndarray) -> float:
    """Take the Frobenius norm in float64, whatever the magnitude."""
    largest = float(np.max(np.abs(x), initial=0.0))
    if largest == 0.0:
        return 0.0
    exponent = math.frexp(largest)[1]
    flat, total = x.reshape(-1), 0.0
    for start in range(0, flat.size, 1 << 20):  # in pieces: no second copy of the whole in float64
        scaled = np.ldexp(flat[start : start + (1 << 20)].astype(np.float64), -exponent)
        total += float(scaled @ scaled)
    return math.ldexp(math.sqrt(total), exponent)


def on_device(x: np.ndarray, device: Any) -> Array:
    if device is None:
        return x
    try:
        import torch
    except ImportError:
        raise ImportError("extract: device needs PyTorch; pip install 'flora-tensor[torch]'") from None
    return torch.from_numpy(np.ascontiguousarray(x)).to(device)


def checked_device(device: Any) -> Any:
    """Return the device, if PyTorch can compute on it; this comes before any work."""
    try:
        on_device(np.zeros(1, np.float32), device)
    except (AssertionError, RuntimeError) as error:  # a build without CUDA, no such GPU, no such kind of device
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"extract: device {str(device)!r} cannot be used: {reason}; pass another, or none") from None
    return device


def check_distinct(where: str, out: PathLike, *inputs: Checkpoint) -> None:
    """Refuse an output that is an input, or the directory that an input lies in."""
    target = Path(os.path.realpath(out))
    for checkpoint in inputs:
        paths = {Path(os.path.realpath(checkpoint.path)), *(Path(os.path.realpath(f.path)) for f in checkpoint.files)}
        if any(target == path or target in path.parents for path in paths):
            raise ValueError(
                f"{where}: the output {target} is or holds the input {checkpoint.path}; choose another one"
            )


def check_memory(where: str, base: Checkpoint, tuned: Checkpoint, name: str, max_memory: int | None) -> None:
    """Refuse a tensor whose work does not fit, before anything large is allocated."""
    shape = base.info(name).shape
    size, item = math.prod(shape), 8 if "F64" in (base.info(name).dtype, tuned.info(name).dtype) else 4
    bases = sum(n * min(n, size // n) for n in shape)
    # Two sides, an unfolding and the core; squares and error table in float64; singular vectors and their workspace.
    need = size * (4 * item + 16) + 3 * item * bases
    require_memory(where, name, shape, need, max_memory)
