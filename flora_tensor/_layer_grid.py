"""Weights of a network's layers put in order: what is the same weight of another layer, by the numbers in the names."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

__all__ = ["GridRow", "layer_grids", "natural_key"]


def natural_key(name: str) -> list[tuple[int, str]]:
    """Return what sorts names as people count: layer 2 before layer 10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


@dataclass(frozen=True)
class GridRow:
    """One mode of one weight, through all layers.

    ``label`` tells the weight apart from the others of its grid; ``cells`` maps a layer's number to the name of its
    tensor.
    """

    label: str
    mode: int
    cells: Mapping[int, str]


def layer_grids(ranks: Mapping[str, tuple[Sequence[int], Sequence[int]]]) -> dict[str, list[GridRow]]:
    """Sort tensors into grids of weights by layers.

    Parameters
    ----------
    ranks : mapping of str to (ranks, sizes)
        The ranks and sizes of each tensor's modes.

    Returns
    -------
    dict of str to list of GridRow
        The grids by a name with stars in place of numbers, such as ``"model.layers.*"``. A mode that every layer keeps
        whole has no row; a tensor that is the only one of its kind is in no grid.

    Examples
    --------
    >>> grids = layer_grids({f"layers.{k}.fc.weight": ((2, 9), (8, 9)) for k in (10, 9)})
    >>> [(title, row.label, row.mode, list(row.cells)) for title, rows in grids.items() for row in rows]
    [('layers.*', 'fc.weight', 0, [9, 10])]
    """
    alike: dict[str, list[str]] = {}
    for name in sorted(ranks, key=natural_key):
        alike.setdefault(".".join("*" if word.isdecimal() else word for word in name.split(".")), []).append(name)
    grids: dict[str, list[GridRow]] = {}
    for pattern, names in alike.items():
        place = _layer_place(pattern, names)
        if place is None:
            continue
        title = ".".join(pattern.split(".")[: place + 1])
        for label, cells in _families(names, place, is_only=pattern.count("*") == 1).items():
            if len(cells) > 1:
                grids.setdefault(title, []).extend(_rows(label, cells, ranks))
    return {title: sorted(rows, key=lambda row: (natural_key(row.label), row.mode)) for title, rows in grids.items()}


def _layer_place(pattern: str, names: Sequence[str]) -> int | None:
    """Return which word of the names counts the layers: of several numbers the one that takes the most values."""
    places = [k for k, word in enumerate(pattern.split(".")) if word == "*"]
    return max(places, key=lambda k: len({name.split(".")[k] for name in names}), default=None)


def _families(names: Iterable[str], place: int, *, is_only: bool) -> dict[str, dict[int, str]]:
    """Return the tensors by label and by layer."""
    families: dict[str, dict[int, str]] = {}
    for name in names:
        words = name.split(".")
        label = words[place + 1 :] if is_only else [*words[:place], "*", *words[place + 1 :]]
        families.setdefault(".".join(label), {})[int(words[place])] = name
    return families


def _rows(
    label: str, cells: Mapping[int, str], ranks: Mapping[str, tuple[Sequence[int], Sequence[int]]]
) -> list[GridRow]:
    rows: list[GridRow] = []
    for mode in range(max(len(ranks[name][0]) for name in cells.values())):
        held = {layer: name for layer, name in cells.items() if mode < len(ranks[name][0])}
        if any(ranks[name][0][mode] < ranks[name][1][mode] for name in held.values()):
            rows.append(GridRow(label, mode, held))
    return rows
