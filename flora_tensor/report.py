"""What was done to each tensor, as an object, as JSON and as a table.

Nothing is dropped silently: a report has a row for every tensor of both checkpoints.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from flora_tensor._checks import printable
from flora_tensor._layer_grid import natural_key
from flora_tensor._reporting import RowReport, plain
from flora_tensor._version import __version__
from flora_tensor.adapter import Adapter
from flora_tensor.tucker_algebra import norm

__all__ = ["ExtractionReport", "TensorRow", "adapter_table", "describe_adapter", "format_table"]

Status = Literal["tucker", "whole", "left out"]
_WIDEST = 90


@dataclass(frozen=True)
class TensorRow:
    """What became of one tensor.

    Attributes
    ----------
    name : str
        The tensor.
    status : {"tucker", "whole", "left out"}
        Decomposed, stored with its new value, or not stored.
    reason : str
        Why it was left out; empty otherwise.
    changed : bool or None
        Whether the two checkpoints differ in it; ``None`` where that was not looked at.
    shape : tuple of int
        Its shape in the base, or in the tuned checkpoint where the base has none.
    dtype : str
        Its type in the base and, where that differs, in the tuned checkpoint.
    arrangement : str
        The pattern whose modes were decomposed.
    ranks : tuple of int
        The ranks, one a mode.
    modes : tuple of int
        The sizes of the modes that the ranks belong to.
    n_parameters : int
        How many numbers are stored for it.
    relative_error : float or None
        ‖ΔW − what is stored‖ / ‖ΔW‖, measured on the stored bits (predicted from the spectrum in a dry run).
    delta_norm : float or None
        ‖ΔW‖, of changed weights with two axes or more.
    weighted_error : float or None
        ‖(ΔW − what is stored) C^½‖ / ‖ΔW C^½‖, the relative error of the layer's output, where a calibration gave the
        second moment C of its input. Where it gave none, the relative error.
    weighted_norm : float or None
        ‖ΔW C^½‖, the root mean square of the change of the layer's output; ‖ΔW‖ where C was not known. ``None`` without
        a calibration.
    lower_bound : float or None
        No tensor of these ranks, in this arrangement, has a smaller error: √(max_n Σ_{i≥r_n} σ_i²) over the norm, of
        the weighted error where there is one. ``None`` where singular values were estimated and not computed. For a
        member of a stack: no tensor of the ranks that its slice has.
    notes : tuple of str
        What else a reader should know.
    stack : str
        The stack that it is stored in: arrangement, ranks and modes are then the stack's, and ``n_parameters`` is this
        tensor's share of what the stack stores. Empty for a tensor of its own.
    """

    name: str
    status: Status
    reason: str = ""
    changed: bool | None = None
    shape: tuple[int, ...] = ()
    dtype: str = ""
    arrangement: str = ""
    ranks: tuple[int, ...] = ()
    modes: tuple[int, ...] = ()
    n_parameters: int = 0
    relative_error: float | None = None
    delta_norm: float | None = None
    weighted_error: float | None = None
    weighted_norm: float | None = None
    lower_bound: float | None = None
    notes: tuple[str, ...] = ()
    stack: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the row as plain values, ready for JSON."""
        row = {key: plain(value) for key, value in vars(self).items()}
        if self.weighted_norm is None:
            del row["weighted_error"], row["weighted_norm"]
        if not self.stack:
            del row["stack"]
        return row


@dataclass(frozen=True, repr=False)
class ExtractionReport(RowReport[TensorRow]):
    """What an extraction stored, what it left out and why, and how well the whole fits; made by `extract`.

    Attributes
    ----------
    rows : tuple of TensorRow
        Every tensor of both checkpoints.
    dense_parameters : int
        Numbers in the dense changes of all changed weights that can be decomposed: what ratios refer to.
    n_parameters : int
        Numbers stored as Tucker tensors.
    whole_parameters : int
        Numbers stored whole.
    relative_error : float
        √(Σ ‖ΔW − stored‖² / Σ ‖ΔW‖²) over those weights; not a number in a dry run with a calibration, or of a stack
        under relative weights.
    lower_bound : float or None
        What no other choice of ranks could beat by truncated HOSVDs: an error for a budget, a number of parameters for
        a tolerance; ``None`` where the ranks were given. Never above what was reached, where the sweeps that follow
        end below it. With a calibration it bounds the weighted error.
    options : mapping of str to Any
        The options of the run.
    dry_run : bool
        Whether nothing was written; the errors are then those that the spectra promise.
    weighted_error : float or None
        √(Σ ‖(ΔW − stored) C^½‖² / Σ ‖ΔW C^½‖²), which a calibrated extraction minimizes: the relative error of the
        layers' outputs. ``None`` without a calibration.
    curve : tuple of (int, float)
        What other budgets would buy: numbers stored in all, and the relative error that counts. Empty where the ranks
        were given.
    stacks : tuple of TensorRow
        A row for each stack that was stored as one tensor, about the whole of it; its members' rows are among the
        others.

    References
    ----------
    The ratio is the one of Si et al. (FLoRA), ICLR 2025, section 4: trained numbers over those of the full change.
    """

    rows: tuple[TensorRow, ...]
    dense_parameters: int
    n_parameters: int
    whole_parameters: int
    relative_error: float
    lower_bound: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    dry_run: bool = False
    weighted_error: float | None = None
    curve: tuple[tuple[int, float], ...] = ()
    stacks: tuple[TensorRow, ...] = ()

    @property
    def ratio(self) -> float:
        """Numbers stored as Tucker tensors over numbers in the dense changes; 0 where there are none."""
        return self.n_parameters / self.dense_parameters if self.dense_parameters else 0.0

    def count(self, status: Status) -> int:
        """Count the tensors of a status.

        Parameters
        ----------
        status : str
            ``"tucker"``, ``"whole"`` or ``"left out"``.

        Returns
        -------
        int
            How many tensors have it.
        """
        return sum(row.status == status for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values, ready for JSON."""
        return {
            "flora_tensor_version": __version__,
            "dry_run": self.dry_run,
            "options": dict(self.options),
            "totals": {
                "tensors": len(self.rows),
                "tucker": self.count("tucker"),
                "whole": self.count("whole"),
                "left_out": self.count("left out"),
                "left_out_changed": sum(row.status == "left out" and row.changed is True for row in self.rows),
                "dense_parameters": self.dense_parameters,
                "n_parameters": self.n_parameters,
                "whole_parameters": self.whole_parameters,
                "ratio": self.ratio,
                "relative_error": plain(self.relative_error),
                **({} if self.weighted_error is None else {"weighted_error": plain(self.weighted_error)}),
                "lower_bound": plain(self.lower_bound),
            },
            "curve": plain(self.curve),
            "tensors": [row.to_dict() for row in self.rows],
            **({"stacks": [row.to_dict() for row in self.stacks]} if self.stacks else {}),
        }

    def to_table(self) -> str:
        """Return the report as a text table, one line a tensor, then one a stack, and the totals below it."""
        lines = [_cells(row) for row in sorted(self.rows, key=lambda row: natural_key(row.name))]
        lines += [_cells(row) for row in self.stacks]
        table = format_table(
            ["tensor", "shape", "stored as", "ranks", "parameters", "error", "at least"], lines, "lllrrrr"
        )
        what = "would store" if self.dry_run else "stored"
        totals = (
            f"{self.count('tucker')} decomposed, {self.count('whole')} whole, {self.count('left out')} left out; "
            f"{what} {self.n_parameters:,} of {self.dense_parameters:,} numbers ({100 * self.ratio:.3g} %)"
            f"{f' and {self.whole_parameters:,} whole' if self.whole_parameters else ''}, "
            f"relative error {'not measured' if math.isnan(self.relative_error) else f'{self.relative_error:.4g}'}"
            f"{'' if self.weighted_error is None else f', {self.weighted_error:.4g} in the outputs'}"
        )
        return f"{table}\n{totals}"


def _cells(row: TensorRow) -> list[str]:
    stored = {"tucker": row.arrangement, "whole": "whole", "left out": f"- ({row.reason})"}[row.status]
    stored += f" in {row.stack}" if row.stack else ""
    if row.notes:
        stored += f" [{'; '.join(row.notes)}]"
    error, bound = ("" if e is None else f"{e:.4g}" for e in (row.relative_error, row.lower_bound))
    ranks = "×".join(map(str, row.ranks)) if row.status == "tucker" else ""
    return [
        row.name,
        "×".join(map(str, row.shape)),
        stored,
        ranks,
        f"{row.n_parameters:,}" if row.n_parameters else "",
        error,
        bound,
    ]


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]], align: str) -> str:
    """Lay out rows of text in columns.

    Parameters
    ----------
    header : sequence of str
        The columns' titles.
    rows : sequence of sequence of str
        One text a column; control characters are shown as escapes, so that a file's names cannot steer a terminal.
    align : str
        ``"l"`` or ``"r"`` for each column.

    Returns
    -------
    str
        The table, lines without trailing spaces.

    References
    ----------
    CWE-150, for why names from files are escaped.

    Examples
    --------
    >>> print(format_table(["name", "n"], [["a", "10"], ["bcdef", "9"]], "lr"))
    name    n
    -----  --
    a      10
    bcdef   9
    """
    cells = [[printable(cell) for cell in row] for row in (header, *rows)]
    # A few very long texts stick out, rather than push every other line apart.
    fitting = [[len(row[k]) for row in cells if len(row[k]) <= _WIDEST] for k in range(len(header))]
    widths = [max(lengths, default=_WIDEST) for lengths in fitting]
    cells.insert(1, ["-" * width for width in widths])
    lines = (
        "  ".join(c.rjust(w) if a == "r" else c.ljust(w) for c, w, a in zip(row, widths, align)).rstrip()
        for row in cells
    )
    return "\n".join(lines)


def describe_adapter(adapter: Adapter) -> dict[str, Any]:
    """List what an adapter holds, as plain values.

    Parameters
    ----------
    adapter : Adapter
        The adapter, of NumPy arrays.

    Returns
    -------
    dict
        ``weights`` (name, shape, arrangement, ranks, n_parameters, scale, delta_norm, stored type, whether its output
        channels have magnitudes, and for a stack of weights its ``members``), ``whole``
        (name, shape), ``n_parameters`` and the ``config``.

    References
    ----------
    ‖ΔW‖ is taken on the factored form: Bader and Kolda (2007), section 4.2.4.

    Examples
    --------
    >>> import numpy as np
    >>> from flora_tensor import Adapter, TuckerTensor
    >>> t = TuckerTensor(np.ones((1, 1)), [np.ones((2, 1)), np.ones((2, 1))])
    >>> round(describe_adapter(Adapter({"fc.weight": t}))["weights"][0]["delta_norm"], 12)
    2.0
    """
    stacks, adapter = adapter.stacks, adapter.joined()
    weights = [
        {
            "name": name,
            "shape": list(adapter.shapes[name]),
            "arrangement": adapter.arrangements[name].pattern,
            "ranks": list(tensor.ranks),
            "n_parameters": tensor.n_parameters + (len(adapter.magnitudes[name]) if name in adapter.magnitudes else 0),
            "scale": adapter.scales[name],
            "delta_norm": plain(abs(adapter.scales[name]) * float(norm(tensor))),
            "dtype": adapter.dtypes.get(name, ""),
            "magnitude": name in adapter.magnitudes,
            **({"members": list(stacks[name].members)} if name in stacks else {}),
        }
        for name, tensor in adapter.items()
    ]
    whole = [
        {"name": name, "shape": list(array.shape), "dtype": adapter.dtypes.get(name, "")}
        for name, array in adapter.whole.items()
    ]
    return {"weights": weights, "whole": whole, "n_parameters": adapter.n_parameters, "config": dict(adapter.config)}


def adapter_table(adapter: Adapter) -> str:
    """Return what `describe_adapter` lists, as a text table.

    Parameters
    ----------
    adapter : Adapter
        The adapter, of NumPy arrays.

    Returns
    -------
    str
        One line a tensor, and the totals.

    References
    ----------
    As `describe_adapter`.

    Examples
    --------
    >>> import numpy as np
    >>> from flora_tensor import Adapter, TuckerTensor
    >>> t = TuckerTensor(np.ones((1, 1)), [np.ones((2, 1)), np.ones((2, 1))])
    >>> print(adapter_table(Adapter({"fc.weight": t})).splitlines()[-1])
    1 weight, 0 tensors whole: 5 numbers
    """
    content = describe_adapter(adapter)
    rows = [
        [
            w["name"],
            "×".join(map(str, w["shape"])),
            w["arrangement"] + (" + magnitude" if w["magnitude"] else ""),
            "×".join(map(str, w["ranks"])),
            f"{w['n_parameters']:,}",
            f"{w['scale']:g}",
            "" if w["delta_norm"] is None else f"{w['delta_norm']:.4g}",
        ]
        for w in content["weights"]
    ]
    rows += [[w["name"], "×".join(map(str, w["shape"])), "whole", "", "", "", ""] for w in content["whole"]]
    header = ["tensor", "shape", "stored as", "ranks", "parameters", "scale", "‖ΔW‖"]
    weights = f"{len(adapter)} weight{'s' if len(adapter) != 1 else ''}"
    whole = f"{len(adapter.whole)} tensor{'s' if len(adapter.whole) != 1 else ''} whole"
    return f"{format_table(header, rows, 'lllrrrr')}\n{weights}, {whole}: {adapter.n_parameters:,} numbers"
