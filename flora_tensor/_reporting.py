"""What all reports have in common: text for people, JSON text from plain values, and rows by name."""

import html
import json
import math
from typing import Any, Generic, Protocol, TypeVar

__all__ = ["Report", "RowReport", "Tabled", "plain"]


class _Row(Protocol):
    @property
    def name(self) -> str: ...


RowT = TypeVar("RowT", bound=_Row)


class Tabled:
    """Prints as a table, which a notebook shows too; its repr is the table's last line, that of the totals.

    A dataclass takes its repr from here with ``repr=False``: its fields hold an object for each tensor of a model.
    """

    def to_table(self) -> str:
        """Return the whole as text."""
        raise NotImplementedError

    def __str__(self) -> str:
        return self.to_table()

    def __repr__(self) -> str:
        totals = self.to_table().splitlines()[-1]
        return f"{type(self).__name__}({totals})"

    def _repr_html_(self) -> str:
        return f'<pre style="white-space: pre; overflow-x: auto">{html.escape(self.to_table())}</pre>'


class Report(Tabled):
    """The outcome of a command, which can be told as plain values and so as JSON."""

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values, ready for JSON."""
        raise NotImplementedError

    def to_json(self) -> str:
        """Return the report as JSON text, the same for the same outcome."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False)


class RowReport(Report, Generic[RowT]):
    """A report with a row for each tensor, to be looked up by the tensor's name."""

    rows: tuple[RowT, ...]

    def __getitem__(self, name: str) -> RowT:
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(name)


def plain(value: Any) -> Any:
    """Return a value as JSON can hold it: tuples as lists, and ``None`` for what is not finite, which has no word."""
    if isinstance(value, tuple):
        return [plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
