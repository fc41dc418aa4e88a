"""Which rows of a batch each adapter is for."""

from collections.abc import Collection, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

__all__ = ["RowAdapters", "RowPlan"]

RowAdapters: TypeAlias = Sequence[str | Sequence[str] | None]
"""For each row of a batch an adapter's name, ``None`` for no adapter, or several names that add up."""


class RowPlan:
    """The rows of a batch, grouped by adapter: the base runs once for all of them, each adapter for its own.

    Parameters
    ----------
    rows : sequence of (str, None or sequence of str)
        The adapters of each row.
    layer_names : dict of int to str
        From a layer's id to its name in the model, for error messages.
    devices : collection of torch.device
        Where the layers are.

    Examples
    --------
    >>> plan = RowPlan(["a", None, ("a", "b")], {})
    >>> plan.n_rows, plan.rows
    (3, {'a': [0, 2], 'b': [2]})
    """

    def __init__(self, rows: RowAdapters, layer_names: dict[int, str], devices: Collection[torch.device] = ()) -> None:
        self.n_rows = len(rows)
        self.layer_names = layer_names
        found: dict[str, list[int]] = {}
        for number, given in enumerate(rows):
            for name in [given] if isinstance(given, str) else dict.fromkeys(given or ()):
                found.setdefault(name, []).append(number)
        # A compiled model reads the names, in an order that does not depend on the rows, and takes the indices as
        # inputs: the next batch with these adapters, whichever rows are whose, runs as it is compiled.
        self.rows = dict(sorted(found.items()))
        keys = [(name, device) for name in self.rows for device in devices]
        self._indices = {key: self._made(*key) for key in keys}

    def index(self, adapter_name: str, device: torch.device) -> Tensor | None:
        """Return an adapter's rows as indices on a device; ``None`` where it has all of them in order."""
        key = (adapter_name, device)
        if key not in self._indices:  # as of weights that are elsewhere between calls
            self._indices[key] = self._made(*key)
        return self._indices[key]

    def _made(self, adapter_name: str, device: torch.device) -> Tensor | None:
        rows = self.rows[adapter_name]
        return None if len(rows) == self.n_rows else torch.tensor(rows, device=device)

    def check(self, layer: object, shape: tuple[int, ...], n_axes: int) -> None:
        """Refuse an input whose first axis is not the rows; ``n_axes`` is what one without a batch has."""
        if len(shape) > n_axes and shape[0] == self.n_rows:
            return
        name = self.layer_names.get(id(layer), type(layer).__name__)
        raise ValueError(
            f"adapters_for_rows: got adapters for {self.n_rows} rows, but {name!r} was given an input of shape "
            f"{shape}, whose first axis is not these rows; pass one entry for each row of the batch as layers see it "
            "(with beams or several samples, each entry as many times)"
        )
