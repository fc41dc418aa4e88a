"""The names that annotations use.

The array-API standard has no type for "an array of some library", and the libraries do not share a base class.
``Array`` therefore is ``Any`` by another name: it tells a reader what is meant.
"""

import os
from collections.abc import Sequence
from typing import Any, TypeAlias

__all__ = ["Array", "DType", "Namespace", "PathLike", "Ranks"]

Array: TypeAlias = Any
"""An array of NumPy, PyTorch, JAX, CuPy or any other library that follows the array-API standard."""

Namespace: TypeAlias = Any
"""The array-API namespace (module) that an array belongs to."""

DType: TypeAlias = Any
"""A data type of some array library."""

Ranks: TypeAlias = int | Sequence[int | None]
"""One rank a mode (``None``: the mode is left whole), or one number for all of them."""

PathLike: TypeAlias = str | os.PathLike[str]
"""Where something lies on the disk."""
