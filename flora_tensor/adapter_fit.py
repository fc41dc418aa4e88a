"""What came of computing with adapters: the result, and a row for each weight."""

from dataclasses import dataclass
from typing import Any

from flora_tensor._reporting import RowReport, plain
from flora_tensor._version import __version__
from flora_tensor.adapter import Adapter
from flora_tensor.report import format_table

__all__ = ["AdapterFit", "AdapterRow"]


@dataclass(frozen=True)
class AdapterRow:
    """What became of one weight's change.

    Attributes
    ----------
    name : str
        The weight, or the stack.
    shape : tuple of int
        Its shape.
    arrangement : str
        Which axes form a mode of what is stored.
    ranks : tuple of int
        The ranks stored; empty where nothing is.
    n_parameters, n_parameters_before : int
        Numbers stored, and those that went in (of all adapters that were added).
    relative_error : float
        ‖stored − exact‖ / ‖exact‖, measured on the stored bits; 0 for a change that is zero.
    norm : float
        ‖exact‖, the scale included.
    notes : tuple of str
        What else there is to say.
    """

    name: str
    shape: tuple[int, ...]
    arrangement: str
    ranks: tuple[int, ...]
    n_parameters: int
    n_parameters_before: int
    relative_error: float
    norm: float
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False, repr=False)
class AdapterFit(RowReport[AdapterRow]):
    """An adapter computed from others, and how near it is to the exact result.

    Attributes
    ----------
    adapter : Adapter
        The result, as `save_adapter` stores it.
    rows : tuple of AdapterRow
        A row for every weight, a stack counting as one.
    relative_error : float
        √(Σ ‖stored − exact‖² / Σ ‖exact‖²) over all weights, measured on the stored bits.
    lower_bound : float or None
        With a budget, no ranks of the truncated HOSVDs within it have a smaller error; ``None`` without one, or where
        weights do not count alike.
    """

    adapter: Adapter
    rows: tuple[AdapterRow, ...]
    relative_error: float
    lower_bound: float | None = None

    @property
    def n_parameters(self) -> int:
        """Numbers in all Tucker tensors together; tensors that are stored whole are not counted."""
        return sum(row.n_parameters for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values, ready for JSON."""
        return {
            "flora_tensor_version": __version__,
            "n_parameters": self.n_parameters,
            "n_parameters_before": sum(row.n_parameters_before for row in self.rows),
            "relative_error": self.relative_error,
            "lower_bound": self.lower_bound,
            "whole": sorted(self.adapter.whole),
            "tensors": [{key: plain(value) for key, value in vars(row).items()} for row in self.rows],
        }

    def to_table(self) -> str:
        """Return the report as a text table, with a line of totals."""
        rows = [
            [
                row.name,
                "×".join(map(str, row.shape)),
                row.arrangement,
                "×".join(map(str, row.ranks)) or "-",
                f"{row.n_parameters_before:,}",
                f"{row.n_parameters:,}",
                f"{row.relative_error:.4g}",
                "; ".join(row.notes),
            ]
            for row in self.rows
        ]
        header = ["tensor", "shape", "stored as", "ranks", "before", "after", "error", ""]
        before = sum(row.n_parameters_before for row in self.rows)
        totals = f"{before:,} → {self.n_parameters:,} numbers, relative error {self.relative_error:.4g}"
        return f"{format_table(header, rows, 'llllrrrl')}\n{totals}"
