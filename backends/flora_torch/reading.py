"""Effective weights that code reads instead of calling the layer, several times for one output: formed once.

The fast paths of torch's transformers look at every weight before they use it. Nothing is kept for that: a weight that
was read is given again as long as somebody holds it and nothing that it was made of has changed. One with a gradient is
made anew each time, for a backward pass can go through it only once.
"""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flora_torch._caching import transforming
from flora_torch.base_weight import own_parameter
from flora_torch.flora_layer import FloraLayer
from flora_torch.update import TuckerUpdate

__all__ = ["effective_weight"]


@dataclass(frozen=True)
class _Made:
    """An effective weight, and what it was made of."""

    weight: "weakref.ref[Tensor]"
    version: int
    sources: "tuple[weakref.ref[Tensor], ...]"
    state: tuple[Any, ...]

    def again(self, sources: Sequence[Tensor], state: tuple[Any, ...]) -> Tensor | None:
        weight = self.weight()
        # Whoever holds it may have written to it.
        if weight is None or weight._version != self.version or state != self.state:
            return None
        same = len(sources) == len(self.sources) and all(ref() is t for ref, t in zip(self.sources, sources))
        return weight if same else None


_last: "weakref.WeakKeyDictionary[nn.Module, dict[str, _Made]]" = weakref.WeakKeyDictionary()


def effective_weight(layer: FloraLayer, parameter: str) -> Tensor:
    """Return a layer's effective parameter, as `FloraLayer.effective` does; the one read before, if it is still held.

    Parameters
    ----------
    layer : FloraLayer
        The layer.
    parameter : str
        The parameter of its base.

    Returns
    -------
    Tensor, of the parameter's shape
        W + Σ s·ΔW.

    Examples
    --------
    >>> from flora_torch import FloraLinear
    >>> layer = FloraLinear(nn.Linear(4, 3), ranks=2)
    >>> with torch.no_grad():
    ...     first = layer.weight
    ...     layer.weight is first
    True
    """
    updates = layer.running(parameter)
    base = own_parameter(layer.base_layer, parameter)
    drawn = layer.training and any(update.rank_dropout or update.module_dropout for update in updates)
    sources = [] if base is None else [base, *(t for u in updates for t in (*u.parameters(), *u.buffers()))]
    needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in sources)
    # What is computed, drawn or traced may be another one each time; what is not changed is the parameter itself.
    if base is None or drawn or not updates or needs_grad or transforming() or any(t.is_inference() for t in sources):
        return layer.effective(parameter)
    state = _state(sources, updates)
    known = _last.setdefault(layer, {})
    made = known[parameter].again(sources, state) if parameter in known else None
    if made is None:
        made = layer.effective(parameter)
        if not made.is_inference():  # tensors of inference mode count no changes
            known[parameter] = _Made(weakref.ref(made), made._version, tuple(map(weakref.ref, sources)), state)
    return made


def _state(sources: Sequence[Tensor], updates: Sequence[TuckerUpdate]) -> tuple[Any, ...]:
    """Return what tells whether a weight would be made the same way again."""
    tensors = [(t._version, t.data_ptr(), t.dtype) for t in sources]
    settings = [(update.scale, update.multiplier, update.arrangement) for update in updates]
    return (*tensors, *settings)
