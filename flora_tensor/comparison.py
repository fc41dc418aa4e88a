"""Two checkpoints compared, one tensor at a time."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from flora_tensor._progress import Progress, silent
from flora_tensor._reporting import RowReport, plain
from flora_tensor._safetensors import READABLE
from flora_tensor._scaled import scale_of
from flora_tensor._typing import PathLike
from flora_tensor._version import __version__
from flora_tensor.checkpoint import Checkpoint, open_checkpoint, same_bits
from flora_tensor.report import format_table

__all__ = ["DiffReport", "DiffRow", "diff_checkpoints"]


@dataclass(frozen=True)
class DiffRow:
    """How one tensor differs between two checkpoints.

    Attributes
    ----------
    name : str
        The tensor.
    status : {"equal", "changed", "only in A", "only in B", "shape differs"}
        The verdict; ``"equal"`` means bit for bit, where the types agree, else value for value.
    shape : tuple of int
        Its shape in A, or in B where A has none.
    dtype : str
        Its type, or both where they differ.
    max_abs : float or None
        max |B − A|; ``None`` where there is no such number (types without arithmetic, 8-bit numbers that a tensor
        beside them scales, NaN).
    relative_norm : float or None
        ‖B − A‖ / ‖A‖; infinite where A is zero.
    unchanged : int or None
        How many entries are equal in value.
    """

    name: str
    status: str
    shape: tuple[int, ...]
    dtype: str
    max_abs: float | None = None
    relative_norm: float | None = None
    unchanged: int | None = None


@dataclass(frozen=True, repr=False)
class DiffReport(RowReport[DiffRow]):
    """How two checkpoints differ, tensor by tensor; made by `diff_checkpoints`.

    Attributes
    ----------
    rows : tuple of DiffRow
        Every tensor of both.
    """

    rows: tuple[DiffRow, ...]

    @property
    def is_equal(self) -> bool:
        """Whether no tensor differs."""
        return all(row.status == "equal" for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values, ready for JSON; numbers that are not finite become ``None``."""
        rows = [{key: plain(value) for key, value in vars(row).items()} for row in self.rows]
        return {"flora_tensor_version": __version__, "equal": self.is_equal, "tensors": rows}

    def to_table(self) -> str:
        """Return the report as a text table, with a line of totals."""
        rows = [
            [
                row.name,
                "×".join(map(str, row.shape)),
                row.dtype,
                row.status,
                "" if row.max_abs is None else f"{row.max_abs:.4g}",
                "" if row.relative_norm is None else f"{row.relative_norm:.4g}",
                "" if row.unchanged is None else f"{row.unchanged:,}",
            ]
            for row in self.rows
        ]
        header = ["tensor", "shape", "type", "status", "max |Δ|", "‖Δ‖/‖A‖", "unchanged"]
        differing = sum(row.status != "equal" for row in self.rows)
        return f"{format_table(header, rows, 'llllrrr')}\n{differing} of {len(self.rows)} tensors differ"


def diff_checkpoints(
    a: PathLike, b: PathLike, *, allow_pickle: bool = False, progress: Progress | None = None
) -> DiffReport:
    """Compare two checkpoints tensor by tensor.

    Parameters
    ----------
    a, b : path
        The checkpoints (see `open_checkpoint`).
    allow_pickle : bool, default False
        Whether pickle files are read, with ``weights_only=True``.
    progress : callable, optional
        Called as ``progress(phase, done, total, name)`` before each tensor.

    Returns
    -------
    DiffReport
        A row for every tensor of both.

    Raises
    ------
    InputError
        If a checkpoint is damaged.
    OSError
        If a file cannot be read.

    References
    ----------
    Golub and Van Loan, *Matrix Computations* (2013), section 2.3, for the norms.

    Examples
    --------
    >>> import tempfile, pathlib, numpy as np
    >>> from safetensors.numpy import save_file
    >>> here = pathlib.Path(tempfile.mkdtemp())
    >>> save_file({"w": np.ones(4, np.float32)}, here / "a.safetensors")
    >>> save_file({"w": np.array([1, 1, 1, 3], np.float32)}, here / "b.safetensors")
    >>> row = diff_checkpoints(here / "a.safetensors", here / "b.safetensors")["w"]
    >>> row.max_abs, row.relative_norm, row.unchanged
    (2.0, 1.0, 3)
    """
    left, right = open_checkpoint(a, allow_pickle=allow_pickle), open_checkpoint(b, allow_pickle=allow_pickle)
    names = tuple(dict.fromkeys((*left.names(), *right.names())))
    rows = tuple(_diff_rows(left, right, names, progress or silent))
    left.check_unchanged()
    right.check_unchanged()
    return DiffReport(rows)


def _diff_rows(a: Checkpoint, b: Checkpoint, names: Sequence[str], progress: Progress) -> Iterator[DiffRow]:
    for done, name in enumerate(names):
        progress("comparing", done, len(names), name)
        if name not in a or name not in b:
            info = (a if name in a else b).info(name)
            yield DiffRow(name, "only in A" if name in a else "only in B", info.shape, info.dtype)
            continue
        x, y = a.info(name), b.info(name)
        dtype = " → ".join(dict.fromkeys((x.dtype, y.dtype)))
        if x.shape != y.shape:
            yield DiffRow(name, "shape differs", x.shape, dtype)
        elif same_bits(a, name, b, name):
            yield DiffRow(name, "equal", x.shape, dtype, 0.0, 0.0, x.n_elements)
        elif x.dtype in READABLE and y.dtype in READABLE and not (scale_of(a, name) or scale_of(b, name)):
            yield _diff_values(name, dtype, a.read(name), b.read(name))
        else:
            yield DiffRow(name, "changed", x.shape, dtype)


def _diff_values(name: str, dtype: str, x: np.ndarray, y: np.ndarray) -> DiffRow:
    shape, x, y = x.shape, x.reshape(-1), y.reshape(-1)
    unchanged = int(np.count_nonzero(x == y))
    with np.errstate(invalid="ignore", over="ignore"):
        max_abs = max((float(np.abs(b - a).max()) for a, b in _pieces(x, y)), default=0.0)
        largest = max((float(np.abs(a).max()) for a, _ in _pieces(x, y)), default=0.0)
        if not math.isfinite(max_abs) or not math.isfinite(largest):
            return DiffRow(name, "changed", shape, dtype, None, None, unchanged)
        # In units of the largest number no square overflows.
        unit = max(max_abs, largest) or 1.0
        change = math.fsum(float((np.abs((b - a) / unit) ** 2).sum()) for a, b in _pieces(x, y))
        norm = math.fsum(float((np.abs(a / unit) ** 2).sum()) for a, _ in _pieces(x, y))
    relative = math.sqrt(change / norm) if norm else (math.inf if change else 0.0)
    status = "equal" if unchanged == x.size and " → " in dtype else "changed"
    return DiffRow(name, status, shape, dtype, max_abs, relative, unchanged)


def _pieces(x: np.ndarray, y: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Cut two vectors into pieces in float64, so that no large tensor is ever held in it whole."""
    kind = np.complex128 if "c" in x.dtype.kind + y.dtype.kind else np.float64
    for start in range(0, x.size, 1 << 20):
        span = slice(start, start + (1 << 20))
        yield x[span].astype(kind), y[span].astype(kind)
