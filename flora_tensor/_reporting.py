"""What all reports have in common: JSON text from plain values, and rows by name."""

import json
import math
from typing import Any, Generic, Protocol, TypeVar

__all__ = ["Report", "RowReport", "plain"]


class _Row(Protocol):
    @property
    def name(self) -> str: ...


RowT = TypeVar("RowT", bound=_Row)


class Report:
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
