"""Results of pure functions of shapes, kept: working one out takes longer than the small product that it is for.

And what to know of who looks on: a compiler traces through such functions itself.
"""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch.autograd import forward_ad

__all__ = ["cached", "is_exporting", "transforming"]

# Older versions of torch do not tell exporting from compiling.
is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", bool)

P = ParamSpec("P")
T = TypeVar("T")


def cached(function: Callable[P, T]) -> Callable[P, T]:
    """Keep the results of a function of hashable arguments, except under a compiler.

    Examples
    --------
    >>> double = cached(lambda x: [x, x])
    >>> double("a") is double("a")
    True
    """
    kept = functools.lru_cache(maxsize=4096)(function)

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
        # A compiler traces through the function itself and warns of caches.
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        return kept(*args, **kwargs)  # type: ignore[arg-type]

    return wrapper


def transforming() -> bool:
    """Tell whether something else than plain autograd looks on: compilation, torch.func, or forward-mode gradients.

    Then only ordinary operations will do: each of these sees through them, and decides itself what is stored.
    """
    internals: Any = torch
    if torch.compiler.is_compiling() or internals.jit.is_tracing():
        return True
    levels: Any = forward_ad
    return bool(internals._C._are_functorch_transforms_active()) or levels._current_level >= 0
