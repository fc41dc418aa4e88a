"""Effective weights that the backward pass makes again instead of keeping them.

What an operation stores for its backward pass is the tensor it was given: a layer that runs with W + s·ΔW would keep a
second copy of W. `rebuilding` puts a recipe in its place wherever autograd is about to store it.
"""

import contextlib
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from flora_torch._caching import transforming
from flora_torch.chain import autocasts

__all__ = ["Lent", "rebuilding"]


@dataclass
class _Recipe:
    """How to make a tensor again, and whether what it is made from is still the same."""

    make: Callable[[], Tensor]
    sources: Sequence[Tensor]
    versions: tuple[int, ...] = field(init=False)
    mode: contextlib.AbstractContextManager[Any] = field(init=False)
    # One backward pass may ask several times; nothing is kept alive between them.
    last: "weakref.ref[Tensor] | None" = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.versions = self._now()
        self.mode = _autocast_now(self.sources[0])

    def again(self) -> Tensor:
        if self._now() != self.versions:
            raise RuntimeError(
                "flora_torch: a weight or an update was changed in place after it was used and before its gradients "
                "were computed; call backward before the optimizer's step"
            )
        made = None if self.last is None else self.last()
        if made is None:
            with torch.no_grad(), self.mode:
                made = self.make()
            self.last = weakref.ref(made)
        return made

    def _now(self) -> tuple[int, ...]:
        # Tensors made in inference mode count no changes.
        return tuple(0 if source.is_inference() else source._version for source in self.sources)


@dataclass(frozen=True)
class _View:
    """A place in a tensor that is made again."""

    recipe: _Recipe
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def tensor(self) -> Tensor:
        return self.recipe.again().as_strided(self.size, self.stride, self.offset)


class Lent(contextlib.AbstractContextManager[Tensor, None]):
    """A tensor for what runs inside a block, with hooks on what is stored there; a class, which older compilers trace.

    Parameters
    ----------
    tensor : Tensor
        The tensor.
    hooks : saved_tensors_hooks, optional
        What is in force inside the block.

    Examples
    --------
    >>> with Lent(torch.ones(2)) as tensor:
    ...     float(tensor.sum())
    2.0
    """

    def __init__(self, tensor: Tensor, hooks: torch.autograd.graph.saved_tensors_hooks | None = None):
        self.tensor = tensor
        self.hooks = hooks

    def __enter__(self) -> Tensor:
        if self.hooks is not None:
            self.hooks.__enter__()
        return self.tensor

    def __exit__(self, *raised: object) -> None:
        if self.hooks is not None:
            self.hooks.__exit__(*raised)


def rebuilding(make: Callable[[], Tensor], sources: Sequence[Tensor]) -> Lent:
    """Make a tensor that operations inside the block do not store for their backward pass: it is made again.

    Any view of it counts as well. Other tensors go to the hooks around the block, if there are any, as if it were not
    there. Under a compiler or a transformation of `torch.func`, which decide by themselves what is stored, the tensor
    is an ordinary one.

    Parameters
    ----------
    make : callable
        Makes the tensor, bit for bit the same each time.
    sources : sequence of Tensor
        What it is made from; a change in place is noticed in the backward pass, and refused.

    Returns
    -------
    context manager of a Tensor
        The tensor, with its gradient's history.

    Raises
    ------
    RuntimeError
        In the backward pass, if a source was changed in place.

    Examples
    --------
    >>> u = torch.ones(3, 1, requires_grad=True)
    >>> with rebuilding(lambda: u @ u.mT, [u]) as square:
    ...     y = square @ square
    >>> torch.autograd.grad(y.sum(), u)[0].flatten().tolist()
    [36.0, 36.0, 36.0]
    """
    made = make()
    if not made.requires_grad or transforming():
        return Lent(made)
    recipe, home = _Recipe(make, sources), made.untyped_storage().data_ptr()
    outer_pack, outer_unpack = _outer_hooks()

    def pack(tensor: Tensor) -> Any:
        if tensor.untyped_storage().data_ptr() != home:
            return outer_pack(tensor)
        return _View(recipe, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))

    def unpack(kept: Any) -> Tensor:
        return kept.tensor() if isinstance(kept, _View) else outer_unpack(kept)

    return Lent(made, torch.autograd.graph.saved_tensors_hooks(pack, unpack))


def _autocast_now(source: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Return what brings the autocast of this moment back: a backward pass runs without, or in another one."""
    if source.is_meta:
        return contextlib.nullcontext()
    kind = source.device.type
    return torch.autocast(kind, torch.get_autocast_dtype(kind), enabled=autocasts(source))


def _outer_hooks() -> tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]:
    """Return the hooks around this place: offloading and checkpointing use them, and only the innermost are asked."""
    internals: Any = torch
    top: Any = getattr(internals._C._autograd, "_top_saved_tensors_default_hooks", None)
    hooks = None if top is None else top(False)
    return (_same, _same) if hooks is None else hooks


def _same(x: Any) -> Any:
    return x
