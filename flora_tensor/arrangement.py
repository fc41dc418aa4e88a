"""Arrangements: which axes of a weight form a mode of the tensor that is decomposed.

Every tensor adapter in the literature is a Tucker tensor of a *rearranged* weight. An arrangement is an einops pattern:
``o i h w`` is FLoRA, ``o (i h w)`` the convolutional LoRA of PEFT and LyCORIS, ``(o h) (i w)`` the layout of loralib,
``(heads d) i -> heads d i`` puts the attention heads on an axis of their own.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from flora_tensor._arrays import array_namespace
from flora_tensor._checks import as_int
from flora_tensor._typing import Array

__all__ = ["Arrangement", "side_text"]

# The names of a weight's axes in PyTorch's order (out, in/groups, *kernel), by their number.
_AXES = {1: "o", 2: "o i", 3: "o i w", 4: "o i h w", 5: "o i d h w", 6: "o i t d h w"}
_Groups: TypeAlias = tuple[tuple[str, ...], ...]
_MORE_AXES = tuple(f"k{k}" for k in range(16))


def _axis_names(ndim: int) -> list[str]:
    if not 1 <= ndim <= 2 + len(_MORE_AXES):
        raise ValueError(f"Arrangement: a weight with {ndim} axes; pass 1 to {2 + len(_MORE_AXES)}")
    return _AXES[ndim].split() if ndim in _AXES else ["o", "i", *_MORE_AXES][:ndim]


@dataclass(frozen=True)
class Arrangement:
    """Which axes of a weight form a mode, as an einops pattern.

    Parameters
    ----------
    pattern : str
        ``"left -> right"``, or only the right side. Without an arrow the left side is the weight's axes in their order:
        for a right side with groups, such as ``(o h) (i w)``, their standard names ``o i``, ``o i w``, ``o i h w`` or
        ``o i d h w``; otherwise the right side itself (nothing is rearranged).
    sizes : mapping of str to int
        Sizes that the shape alone does not give, such as ``heads`` of ``(heads d) i -> heads d i``.

    Raises
    ------
    ValueError
        If the pattern cannot be read, drops or repeats an axis, or a size is below 1; from the methods if a weight does
        not fit.
    TypeError
        If the pattern is no string or a size no integer.

    References
    ----------
    Rogozhnikov, *Einops: clear and reliable tensor manipulations*, ICLR 2022, for the notation.

    Examples
    --------
    >>> import numpy as np
    >>> kernel = np.zeros((8, 4, 3, 5))
    >>> Arrangement("(o h) (i w)").arrange(kernel).shape
    (24, 20)
    >>> Arrangement("(heads d) i -> heads d i", {"heads": 2}).shape((8, 4))
    (2, 4, 4)
    >>> Arrangement.native(4).pattern
    'o i h w'
    """

    pattern: str
    sizes: Mapping[str, int] = field(default_factory=dict[str, int])
    left: _Groups = field(init=False, repr=False, compare=False)
    right: _Groups = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"Arrangement: pattern is {self.pattern!r}; pass a string, as 'o i h w'")
        sizes = {name: as_int("Arrangement", f"sizes[{name!r}]", size) for name, size in self.sizes.items()}
        object.__setattr__(self, "sizes", sizes)
        for name, size in sizes.items():
            if size < 1:
                self._refuse(f"has size {size} for the axis {name}; pass at least 1")
        sides = self.pattern.split("->")
        if len(sides) > 2:
            self._refuse("has more than one '->'")
        right = self._parse(sides[-1])
        left = self._parse(sides[0]) if len(sides) == 2 else self._implied_left(right)
        for side in (left, right):
            names = [name for group in side for name in group]
            if len(set(names)) != len(names):
                self._refuse("repeats an axis")
        if {n for g in left for n in g} != {n for g in right for n in g}:
            self._refuse("does not keep the same axes on both sides")
        if unknown := set(self.sizes) - {n for g in left for n in g}:
            self._refuse(f"has no axis {', '.join(sorted(unknown))}, for which a size was given")
        object.__setattr__(self, "left", left)
        object.__setattr__(self, "right", right)

    def __hash__(self) -> int:
        return hash((self.pattern, tuple(sorted(self.sizes.items()))))

    @classmethod
    def native(cls, ndim: int) -> "Arrangement":
        """Return the arrangement that leaves the axes of a weight as they are: FLoRA's own.

        Parameters
        ----------
        ndim : int
            How many axes the weight has, 1 to 18.

        Returns
        -------
        Arrangement
            The identity, with the axes' standard names.

        Raises
        ------
        ValueError
            If ``ndim`` is out of that range.
        """
        return cls(" ".join(_axis_names(ndim)))

    @classmethod
    def candidates(cls, ndim: int) -> "tuple[Arrangement, ...]":
        """Return the arrangements worth trying for a weight with ``ndim`` axes, the native one first.

        For a convolution these are ``o i h w``, ``o (i h w)`` and the separable ``(o h) (i w)``; with three kernel axes
        the separable one splits them as ``(o d) (i h w)``. Vectors and matrices have the native one only.

        Parameters
        ----------
        ndim : int
            How many axes the weight has, 1 to 18.

        Returns
        -------
        tuple of Arrangement
            One to three arrangements, no two alike.

        Raises
        ------
        ValueError
            If ``ndim`` is out of that range.
        """
        names = _axis_names(ndim)
        patterns = [" ".join(names)]
        if ndim >= 3:
            patterns.append(f"o ({' '.join(names[1:])})")
        if ndim >= 4:
            patterns.append(f"(o {names[2]}) (i {' '.join(names[3:])})")
        return tuple(cls(p) for p in patterns)

    @property
    def is_native(self) -> bool:
        """Whether the weight's axes are the modes, in their order."""
        return self.left == self.right

    @property
    def n_axes(self) -> int:
        """How many axes a weight must have."""
        return len(self.left)

    @property
    def n_modes(self) -> int:
        """How many modes the arranged tensor has."""
        return len(self.right)

    def shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the arranged tensor's shape.

        Parameters
        ----------
        shape : sequence of int
            The weight's shape.

        Returns
        -------
        tuple of int
            The size of each mode.

        Raises
        ------
        ValueError
            If the weight's shape does not fit the pattern.
        """
        sizes = self.axis_sizes(shape)
        return tuple(math.prod([sizes[name] for name in group]) for group in self.right)

    def arrange(self, weight: Array) -> Array:
        """Rearrange a weight into the tensor whose modes are decomposed.

        Parameters
        ----------
        weight : array, shape as the pattern's left side
            The weight, in PyTorch's order (out, in/groups, *kernel).

        Returns
        -------
        array, shape as the pattern's right side
            The tensor; a view where the library allows.

        Raises
        ------
        ValueError
            If the weight's shape does not fit the pattern.
        """
        sizes = self.axis_sizes(tuple(weight.shape))
        if self.is_native:
            return weight
        return _rearrange(weight, self.left, self.right, sizes)

    def restore(self, tensor: Array, shape: Sequence[int]) -> Array:
        """Rearrange a decomposed tensor back into a weight: the inverse of `arrange`.

        Parameters
        ----------
        tensor : array, shape as the pattern's right side
            The tensor.
        shape : sequence of int
            The weight's shape.

        Returns
        -------
        array
            The weight, of shape ``shape``.

        Raises
        ------
        ValueError
            If the tensor is not of the shape that the pattern makes of ``shape``.
        """
        sizes = self.axis_sizes(shape)
        if tuple(tensor.shape) != self.shape(shape):
            raise ValueError(
                f"Arrangement {self.pattern!r}: a tensor of shape {tuple(tensor.shape)} for a weight of shape "
                f"{tuple(shape)}; pass one of shape {self.shape(shape)}"
            )
        if self.is_native:
            return tensor
        return _rearrange(tensor, self.right, self.left, sizes)

    def rows(self, mode: int) -> frozenset[int] | None:
        """Return which of the weight's axes are the rows of a mode's unfolding, up to transposition.

        Unfoldings with the same rows, of whatever arrangement, have the same singular values.

        Parameters
        ----------
        mode : int
            A mode of the arranged tensor.

        Returns
        -------
        frozenset of int or None
            The axes on that side of the unfolding which axis 0 is on; ``None`` where an axis is split between the
            sides.

        Examples
        --------
        >>> Arrangement.native(4).rows(0) == Arrangement("o (i h w)").rows(1)
        True
        >>> Arrangement("(heads d) i -> heads d i", {"heads": 2}).rows(0) is None
        True
        """
        names = set(self.right[mode])
        axes = frozenset(k for k, group in enumerate(self.left) if names.issuperset(group))
        if {name for k in axes for name in self.left[k]} != names:
            return None
        return axes if 0 in axes else frozenset(range(self.n_axes)) - axes

    def axis_sizes(self, shape: Sequence[int]) -> dict[str, int]:
        """Solve for the size of every named axis.

        Parameters
        ----------
        shape : sequence of int
            The weight's shape.

        Returns
        -------
        dict of str to int
            The size of each name in the pattern.

        Raises
        ------
        ValueError
            If the weight's shape does not fit the pattern.
        """
        if len(shape) != len(self.left):
            self._refuse(f"is for weights with {len(self.left)} axes; the weight has shape {tuple(shape)}")
        sizes = dict(self.sizes)
        for group, total in zip(self.left, shape):
            unknown = [name for name in group if name not in sizes]
            known = math.prod([sizes[name] for name in group if name in sizes])
            if len(unknown) > 1:
                self._refuse(f"does not tell the sizes of {', '.join(unknown)}; pass all but one of them in sizes")
            if total % known or (not unknown and known != total):
                self._refuse(f"does not fit: an axis of size {total} as ({' '.join(group)}) with sizes {self.sizes}")
            if unknown:
                sizes[unknown[0]] = total // known
        return sizes

    def _parse(self, side: str) -> _Groups:
        tokens: list[str] = re.findall(r"\([^()]*\)|[A-Za-z_][A-Za-z_0-9]*|\S", side)
        groups = tuple(tuple(token.strip("()").split()) for token in tokens)
        for token, group in zip(tokens, groups):
            if not group or not all(re.fullmatch(r"[A-Za-z][A-Za-z_0-9]*", name) for name in group):
                self._refuse(f"cannot be read at {token!r}; write axes as names and groups as (a b)")
        if not groups:
            self._refuse("has an empty side; name the axes, as in 'o i h w'")
        return groups

    def _implied_left(self, right: _Groups) -> _Groups:
        names = [name for group in right for name in group]
        if all(len(group) == 1 for group in right):
            return right
        standard = _axis_names(len(names))
        if sorted(names) != sorted(standard):
            self._refuse(
                f"groups axes that are not the standard ones, {' '.join(standard)}; write 'axes -> {self.pattern}'"
            )
        return tuple((name,) for name in standard)

    def _refuse(self, why: str) -> None:
        raise ValueError(f"Arrangement {self.pattern!r} {why}")


def side_text(groups: Sequence[Sequence[str]]) -> str:
    """Write one side of a pattern: the inverse of reading it.

    Examples
    --------
    >>> side_text([("o", "h"), ("i",)])
    '(o h) i'
    """
    return " ".join(f"({' '.join(group)})" if len(group) > 1 else group[0] for group in groups)


def _rearrange(x: Array, left: _Groups, right: _Groups, sizes: Mapping[str, int]) -> Array:
    """Split the axes of ``x``, reorder them and join them again."""
    xp = array_namespace("Arrangement", x)
    before = [name for group in left for name in group]
    after = [name for group in right for name in group]
    x = xp.reshape(x, tuple(sizes[name] for name in before))
    x = xp.permute_dims(x, tuple(before.index(name) for name in after))
    return xp.reshape(x, tuple(math.prod([sizes[name] for name in group]) for group in right))
