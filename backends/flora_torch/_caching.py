"""Results of pure functions of shapes, kept: working one out takes longer than the small product that it is for."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

__all__ = ["cached", "is_exporting"]

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
