"""The error of a layer's output in the place of the error of its weight: norms weighted by second moments.

Where the input x of a weight has the second moment C = E[x xᵀ], the mean squared change of the output is

    E ‖(ΔW − ΔŴ) x‖² = ‖(ΔW − ΔŴ) C^½‖²,

a Frobenius norm of the weight scaled along its input. Scaled, decomposed and scaled back, an approximation that is best
(or within √N of it, or within a tolerance) in the plain norm has become so in the weighted one. That needs the scaled
axes to lie in one mode: C^½ is then a factor along it, and its inverse goes into that mode's factor.

C is singular where an input never varies. Its eigenvalues are raised to `FLOOR` times their mean, so that what a weight
does to inputs that the calibration did not show still counts for something.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from flora_tensor._arrays import to_numpy
from flora_tensor._checks import printable
from flora_tensor._errors import InputError
from flora_tensor._typing import PathLike
from flora_tensor.arrangement import Arrangement
from flora_tensor.moments import Moments, load_moments
from flora_tensor.tucker_algebra import orthogonalize
from flora_tensor.tucker_tensor import TuckerTensor

__all__ = ["FLOOR", "Calibration", "Weighting", "times"]

# The smallest eigenvalue of a second moment that is taken at its word, relative to their mean.
FLOOR = 1e-3


@dataclass(frozen=True, eq=False)
class Weighting:
    """A factor C^½ along the input axes of a weight, and its inverse.

    Parameters
    ----------
    axes : tuple of int
        The axes of the weight that C is over, consecutive.
    root, inverse : array of float64, shape (I, I) or (I,)
        C^½ and C^−½, symmetric; or their diagonals.
    """

    axes: tuple[int, ...]
    root: npt.NDArray[np.float64]
    inverse: npt.NDArray[np.float64]

    @classmethod
    def of(cls, moment: np.ndarray, axes: tuple[int, ...]) -> "Weighting | None":
        """Take the root of a second moment; ``None`` where there was no input but zeros."""
        moment = moment.astype(np.float64)
        if moment.ndim == 1:
            values, vectors = moment, None
        else:
            values, vectors = np.linalg.eigh((moment + moment.T) / 2)
        mean = float(np.mean(np.maximum(values, 0.0)))
        if mean == 0.0:
            return None
        root = np.sqrt(np.maximum(values, FLOOR * mean))
        if vectors is None:
            return cls(axes, root, 1 / root)
        return cls(axes, (vectors * root) @ vectors.T, (vectors / root) @ vectors.T)

    def fits(self, arrangement: Arrangement) -> bool:
        """Tell whether the axes lie in one mode, side by side at its head."""
        groups = [arrangement.left[axis] for axis in self.axes]
        names = tuple(name for group in groups for name in group)
        return len(names) == len(self.axes) and any(group[: len(names)] == names for group in arrangement.right)

    def mode_of(self, arrangement: Arrangement) -> int:
        """Return the mode at whose head the axes lie, of an arrangement that they fit."""
        names = tuple(name for axis in self.axes for name in arrangement.left[axis])
        return next(k for k, group in enumerate(arrangement.right) if group[: len(names)] == names)

    def of_slices(self) -> "Weighting":
        """Return the same of a stack, whose first axis counts the weights."""
        return replace(self, axes=tuple(axis + 1 for axis in self.axes))

    def scale(self, weight: np.ndarray) -> np.ndarray:
        """Multiply a weight by C^½ along the axes; in the weight's type."""
        first, size = self.axes[0], len(self.root)
        shaped = weight.reshape(math.prod(weight.shape[:first]), size, -1)
        return times(self.root.astype(weight.dtype, copy=False), shaped).reshape(weight.shape)

    def unscale(self, tucker: TuckerTensor, arrangement: Arrangement) -> TuckerTensor:
        """Multiply a decomposition of the scaled weight by C^−½, and make its factors orthonormal again."""
        mode = self.mode_of(arrangement)
        core, factors = to_numpy(tucker.core), [None if u is None else to_numpy(u) for u in tucker.factors]
        inverse = self.inverse.astype(core.dtype, copy=False)
        factor = factors[mode]
        if factor is None:  # the mode is whole: the core has it
            before, after = core.shape[:mode], core.shape[mode + 1 :]
            shaped = core.reshape(math.prod(before), len(inverse), -1)
            core = times(inverse, shaped).reshape(*before, -1, *after)
        else:
            factors[mode] = times(inverse, factor.reshape(1, len(inverse), -1)).reshape(factor.shape)
        return orthogonalize(TuckerTensor(core, tuple(factors)))


def times(matrix: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Multiply (a, n, b) by (n, n), or by a diagonal (n,), along the middle."""
    if matrix.ndim == 1:
        return matrix[:, None] * x
    return (x[..., 0] @ matrix)[..., None] if x.shape[-1] == 1 else np.matmul(matrix, x)


@dataclass(frozen=True, eq=False)
class Calibration:
    """Where the second moments of the inputs are: in a file, of which one at a time is read, or in memory."""

    source: Path | Moments
    digest: str  # of all moments: what was extracted with others is not gone on with

    @classmethod
    def of(cls, given: PathLike | Moments) -> "Calibration":
        """Take moments, or a file of them, whose header is checked."""
        if isinstance(given, Moments):
            content = hashlib.sha256()
            for name in sorted(given):
                content.update(f"{name} {given.axes[name]}".encode() + np.ascontiguousarray(to_numpy(given[name])).data)
            return cls(given, content.hexdigest())
        load_moments(given, ())
        with Path(given).open("rb") as file:
            return cls(Path(given), hashlib.file_digest(file, "sha256").hexdigest())

    @property
    def told(self) -> str:
        """Where the moments come from, in words."""
        return printable(str(self.source)) if isinstance(self.source, Path) else f"{len(self.source)} moments in memory"

    def options(self) -> dict[str, str]:
        """Return what a report says of it."""
        return {"calibration": self.told, "calibration_sha256": self.digest}

    def weighting(self, name: str, shape: Sequence[int]) -> Weighting | None:
        """Return the weighting of a weight, or ``None`` where its moment is not known or zero."""
        moments = load_moments(self.source, [name]) if isinstance(self.source, Path) else self.source
        key = moments.name_of(name)
        if key is None:
            return None
        standard = Arrangement.native(len(shape)).right
        numbers = {names[0]: axis for axis, names in enumerate(standard)}
        words = moments.axes[key].split()
        axes = tuple(numbers.get(word, -1) for word in words)
        where = f"extract: the moment of {name!r} over the axes {moments.axes[key]!r}"
        if -1 in axes or axes != tuple(range(axes[0], axes[0] + len(axes))):
            raise InputError(f"{where} does not fit a weight of shape {tuple(shape)}; collect it anew")
        moment, size = to_numpy(moments[key]), math.prod(shape[axis] for axis in axes)
        if len(moment) != size:
            raise InputError(
                f"{where} is of size {len(moment)}, but these axes of a weight of shape {tuple(shape)} have {size} "
                "entries; collect the moments of this model"
            )
        return Weighting.of(moment, axes)
