"""How one tensor changed between two checkpoints: read, checked and measured."""

import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from flora_tensor._errors import InputError, ResourceError
from flora_tensor._safetensors import decode
from flora_tensor._settings import PathLike
from flora_tensor._typing import Array
from flora_tensor.checkpoint import Checkpoint

__all__ = ["check_distinct", "check_finite", "check_memory", "frobenius_norm", "on_device", "read_delta"]


def read_delta(base: Checkpoint, tuned: Checkpoint, name: str) -> np.ndarray | None:
    """Read how a tensor changed, or ``None`` where its bits did not: float64 where either side is, else float32."""
    a, b = base.info(name), tuned.info(name)
    raw_a, raw_b = base.read_raw(name), tuned.read_raw(name)
    if a.dtype == b.dtype and np.array_equal(raw_a, raw_b):
        return None
    work = np.float64 if "F64" in (a.dtype, b.dtype) else np.float32
    old = decode(raw_a, a.dtype, a.shape).astype(work, copy=False)
    del raw_a
    new = decode(raw_b, b.dtype, b.shape).astype(work, copy=False)
    del raw_b
    check_finite(base.path, name, old)
    check_finite(tuned.path, name, new)
    with np.errstate(over="ignore"):
        delta = np.subtract(new, old, out=new)
    if not np.isfinite(delta).all():
        raise InputError(f"extract: the change of {name!r} overflows {np.dtype(work).name}; store the inputs as F64")
    return delta


def check_finite(path: Path, name: str, x: np.ndarray) -> None:
    # Before any SVD: LAPACK's can loop for ever on a single infinity.
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
    free = max_memory if max_memory is not None else _available_memory()
    if free is not None and need > free:
        raise ResourceError(
            f"{where}: {name!r} of shape {shape} needs about {need / 2**30:.2g} GiB, but {free / 2**30:.2g} GiB are "
            "allowed; exclude it, or use a machine with more memory"
        )


def _available_memory() -> int | None:
    """Return how many bytes the machine has free, where it tells."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:  # pragma: no cover - not Linux
        return None
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return found[0] if found else None
