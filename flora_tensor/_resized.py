"""Vocabularies that grew or shrank: tensors whose first axes differ between two checkpoints.

The rows that both have are compared; rows that only the tuned checkpoint has are stored whole, bit for bit; rows that
only the base has are gone. In an adapter the config's table ``resized`` gives the numbers of rows before and after, and
the new rows of a tensor ``t`` are stored as the tensor ``t.new_rows``.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from flora_tensor._errors import InputError
from flora_tensor._settings import Settings
from flora_tensor.checkpoint import Checkpoint, is_float
from flora_tensor.report import TensorRow

__all__ = ["NEW_ROWS", "crop", "is_resized", "new_rows", "read_resized", "resized_between", "with_resized"]

NEW_ROWS = ".new_rows"
Resized = Mapping[str, tuple[int, int]]


def is_resized(base: Checkpoint, tuned: Checkpoint, name: str) -> bool:
    """Tell whether a tensor of both differs in its first axis only, as a resized embedding does."""
    a, b = base.info(name), tuned.info(name)
    alike = a.shape[1:] == b.shape[1:] and len(a.shape) == len(b.shape) > 0 and 0 not in (*a.shape, *b.shape)
    return alike and a.shape != b.shape and is_float(a) and is_float(b)


def crop(base: Checkpoint, tuned: Checkpoint, settings: Settings) -> tuple[Checkpoint, Checkpoint]:
    """Return both checkpoints without the rows that only one of them has, where that is asked for."""
    if settings.resized != "pad":
        return base, tuned
    names = [n for n in base.names() if n in tuned and settings.selects(n) and is_resized(base, tuned, n)]
    rows = {n: min(base.info(n).shape[0], tuned.info(n).shape[0]) for n in names}
    return (base.cropped(rows), tuned.cropped(rows)) if rows else (base, tuned)


def resized_between(base: Checkpoint, tuned: Checkpoint) -> dict[str, tuple[int, int]]:
    """Return the rows before and after of the tensors that `crop` cropped."""
    if base.original is base:
        return {}
    shapes = {n: (base.original.info(n).shape, tuned.original.info(n).shape) for n in base.names() if n in tuned}
    cropped = (n for n in shapes if shapes[n] != (base.info(n).shape, tuned.info(n).shape))
    return {n: (shapes[n][0][0], shapes[n][1][0]) for n in cropped}


def new_rows(tuned: Checkpoint, resized: Resized) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the rows that are to be stored, by the names of the tensors that hold them."""
    grown = {name: after - before for name, (before, after) in resized.items() if after > before}
    return {f"{name}{NEW_ROWS}": (rows, *tuned.original.info(name).shape[1:]) for name, rows in grown.items()}


def with_resized(rows: Mapping[str, TensorRow], tuned: Checkpoint, resized: Resized) -> dict[str, TensorRow]:
    """Say in the rows of resized tensors what became of the rows that only one side has."""
    shapes = new_rows(tuned, resized)
    told = dict(rows)
    for name, (before, after) in resized.items():
        extra = math.prod(shapes.get(f"{name}{NEW_ROWS}", (0,)))
        gain = f"{after - before} new rows are stored whole" if extra else f"{before - after} rows are dropped"
        note = f"resized from {before} to {after} rows: those in common are compared, {gain}"
        row = rows[name]
        if note in row.notes:
            continue
        row = replace(row, notes=(*row.notes, note), changed=True)
        if row.status != "tucker":  # nothing else is stored of it, or it is stored whole
            row = replace(row, status="whole", reason="", n_parameters=row.n_parameters + extra, relative_error=0.0)
        told[name] = row
    return told


def read_resized(config: Mapping[str, Any], base: Checkpoint, whole: Mapping[str, Any], where: str) -> Resized:
    """Read an adapter's table of resized tensors, proved to fit the base and the rows that are stored."""
    table = config.get("resized", {})
    pairs = table.values() if isinstance(table, dict) else [None]
    if not all(isinstance(p, list) and len(p) == 2 and all(type(n) is int and n > 0 for n in p) for p in pairs):
        raise InputError(f"{where}: the adapter's table resized must hold two numbers of rows by tensor")
    for name, (before, after) in table.items():
        shape = base.info(name).shape if name in base else ()
        if shape[:1] != (before,):
            raise InputError(f"{where}: {name!r} must have {before} rows, but in {base.path} it has shape {shape}")
        rows = whole.get(f"{name}{NEW_ROWS}")
        if after > before and (rows is None or tuple(rows.shape) != (after - before, *shape[1:])):
            raise InputError(f"{where}: the adapter lacks the {after - before} new rows of {name!r}")
    return {name: (before, after) for name, (before, after) in table.items()}
