"""Equal weights of several layers as one Tucker tensor: the layers are one more mode.

A stack of L weights, each arranged as ``o i``, is a tensor ``layer o i``. Decomposed, all layers share the factors of
``o`` and ``i``; what is a layer's own is its row of the layers' factor, which contracted with the core gives it a core
of its own.
"""

from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property

from flora_tensor.arrangement import Arrangement, side_text
from flora_tensor.tucker_algebra import select_slice
from flora_tensor.tucker_tensor import TuckerTensor

__all__ = ["LAYER", "TuckerStack", "member_arrangement", "stacked_arrangement"]

# The name of the mode that counts the weights of a stack.
LAYER = "layer"


def stacked_arrangement(arrangement: Arrangement) -> Arrangement:
    """Put the mode of the layers before an arrangement of each of them: ``o (i h w)`` → ``layer o (i h w)``."""
    sides = [f"{LAYER} {side_text(groups)}" for groups in (arrangement.left, arrangement.right)]
    return Arrangement(sides[0] if sides[0] == sides[1] else " -> ".join(sides), arrangement.sizes)


def member_arrangement(arrangement: Arrangement) -> Arrangement | None:
    """Take the first axis out of an arrangement, or ``None`` where it is not the first mode, alone."""
    left, right = arrangement.left, arrangement.right
    if len(left) < 2 or len(right) < 2 or len(left[0]) != 1 or left[0] != right[0]:
        return None
    if left[1:] == right[1:]:
        return Arrangement.native(len(left) - 1)
    sizes = {name: size for name, size in arrangement.sizes.items() if (name,) != left[0]}
    with suppress(ValueError):  # a pattern without its left side means the standard axes
        if (short := Arrangement(side_text(right[1:]), sizes)).left == left[1:]:
            return short
    return Arrangement(f"{side_text(left[1:])} -> {side_text(right[1:])}", sizes)


@dataclass(frozen=True, eq=False)
class TuckerStack:
    """Equal weights of several layers as one Tucker tensor.

    Parameters
    ----------
    members : tuple of str
        The weights' names, in the order of the first mode; two at least.
    tensor : TuckerTensor, shape (L, …)
        Their arranged changes; mode 0 counts the L members.
    arrangement : Arrangement
        How each member is arranged; ``o i`` for a stack ``layer o i``.
    shape : tuple of int
        The shape of each member.

    Raises
    ------
    ValueError
        If there are fewer than two members, a name appears twice, or the tensor is not of the shape that members,
        arrangement and shape make.

    References
    ----------
    Bershatsky et al., *LoTR: Low Tensor Rank Weight Adaptation*, arXiv 2402.01376, equation 3, for layers that share
    their outer factors; with a factor for the layers too it is the Tucker decomposition of FLoRA, equation 5.

    Examples
    --------
    >>> import numpy as np
    >>> joint = TuckerTensor(np.ones((1, 1, 1)), [np.asarray([[1.0], [2.0]]), np.ones((3, 1)), np.ones((4, 1))])
    >>> stack = TuckerStack(("0.weight", "1.weight"), joint, Arrangement("o i"), (3, 4))
    >>> second = stack.slices[1]
    >>> second.shape, second.core.tolist(), second.factors[0] is joint.factors[1]
    ((3, 4), [[2.0]], True)
    """

    members: tuple[str, ...]
    tensor: TuckerTensor
    arrangement: Arrangement
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.members) < 2 or len(set(self.members)) < len(self.members):
            raise ValueError(f"TuckerStack: the members are {self.members}; pass two different names or more")
        expected = (len(self.members), *self.arrangement.shape(self.shape))
        if self.tensor.shape != expected:
            raise ValueError(
                f"TuckerStack: {len(self.members)} members of shape {self.shape}, arranged as "
                f"{self.arrangement.pattern!r}, make a tensor of shape {expected}, not {self.tensor.shape}"
            )

    @cached_property
    def slices(self) -> tuple[TuckerTensor, ...]:
        """The members' own Tucker tensors: a core for each, and the factors of the other modes, which all share."""
        return tuple(select_slice(self.tensor, 0, index) for index in range(len(self.members)))

    @property
    def joint_arrangement(self) -> Arrangement:
        """The arrangement of the whole: ``layer o i``."""
        return stacked_arrangement(self.arrangement)

    @property
    def joint_shape(self) -> tuple[int, ...]:
        """The shape of the members' weights side by side, (L, …)."""
        return (len(self.members), *self.shape)
