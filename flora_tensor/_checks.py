"""The wording of every refusal: what came, what is needed, what to do."""

import math
import operator
from collections.abc import Iterable, Sequence
from typing import Any

from flora_tensor._arrays import array_namespace, is_exact, is_torch, largest_magnitude, to_numpy
from flora_tensor._typing import Array, Ranks

__all__ = [
    "as_int",
    "as_number",
    "as_sequence",
    "check_choice",
    "check_finite",
    "check_fraction",
    "check_limit",
    "check_loaded",
    "check_mode",
    "check_ranks",
    "check_shard_size",
    "check_tensor",
    "check_tolerance",
    "exactly_one",
    "feasible_ranks",
    "prefix_between",
    "printable",
    "size_text",
    "some_names",
    "type_text",
    "whole_modes",
]


def as_int(where: str, name: str, value: Any) -> int:
    """Return ``value`` as an ``int``; floats, strings and booleans are refused."""
    if isinstance(value, bool):
        raise TypeError(f"{where}: {name} is {value!r}; pass an integer")
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{where}: {name} is {value!r}; pass an integer") from None


def as_sequence(where: str, name: str, value: Any, each: str = "one number a mode") -> tuple[Any, ...]:
    """Return a sequence's items; what has none, and a text, is refused."""
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        raise TypeError(f"{where}: {name} is {value!r}; pass a sequence, {each}")
    return tuple(value)


def type_text(value: Any) -> str:
    """Return the name of a value's type, with the package that it comes from."""
    kind = type(value)
    package = kind.__module__.split(".")[0]
    return kind.__qualname__ if package == "builtins" else f"{package}.{kind.__qualname__}"


def check_shard_size(where: str, size: Any) -> int | None:
    """Return the limit on the bytes of a file; one that no file can keep is refused, ``None`` is no limit."""
    if size is not None and as_int(where, "max_shard_size", size) < 1:
        raise ValueError(f"{where}: max_shard_size is {size}; pass at least 1 byte")
    return size


def some_names(names: Sequence[str]) -> str:
    """Return the first three names of a list, quoted, and how many more there are."""
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(repr(name) for name in names[:3]) + rest


def prefix_between(one: Sequence[str], other: Sequence[str]) -> str:
    """Return what half or more of the names on one side have before the names of the other, if anything."""
    for short, long in ((one, other), (other, one)):
        known = set(long)
        for name in (name for name in long if short and name.endswith("." + short[0])):
            prefix = name.removesuffix(short[0])
            if 2 * sum(prefix + n in known for n in short) >= len(short):
                return prefix
    return ""


def size_text(n_bytes: int) -> str:
    """Return a number of bytes in words, in powers of 1000."""
    for power, unit in ((4, "TB"), (3, "GB"), (2, "MB"), (1, "kB")):
        if n_bytes >= 1000**power:
            return f"{n_bytes / 1000**power:.3g} {unit}"
    return f"{n_bytes} bytes"


def printable(text: str) -> str:
    """Return a text with its control characters as escapes, so that a file's names can steer nothing."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)


def check_mode(where: str, mode: Any, ndim: int) -> int:
    """Return ``mode`` as a number from 0 to ``ndim - 1``; negative modes count from the end."""
    mode = as_int(where, "mode", mode)
    if not -ndim <= mode < ndim:
        last = f"{-ndim} to {ndim - 1}" if ndim else "none, as it has no axes"
        raise ValueError(f"{where}: mode {mode} of a tensor with {ndim} modes; its modes are {last}")
    return mode % ndim


def check_loaded(where: str, x: Array, name: str = "x") -> None:
    """Refuse a tensor of PyTorch's meta device."""
    if is_torch(x) and x.device.type == "meta":
        raise ValueError(f"{where}: {name} is on PyTorch's meta device and holds no numbers; load them first")


def check_finite(where: str, x: Array, name: str = "x") -> None:
    """Refuse NaN and infinity, with how many there are and where the first one stands, and what holds no numbers.

    This comes before any factorization: LAPACK's SVD can loop for ever on a single infinity.
    """
    xp = array_namespace(where, x)
    check_loaded(where, x, name)
    if is_exact(xp, x.dtype):
        return
    largest = largest_magnitude(xp, x)
    if largest is None or math.isfinite(largest):
        return
    bad = ~to_numpy(xp.isfinite(x))
    if not bad.any():  # a complex entry whose parts are finite but whose magnitude overflows
        return
    first = tuple(int(i) for i in next(zip(*bad.nonzero())))
    raise ValueError(
        f"{where}: {name} has {int(bad.sum())} entries that are NaN or infinite, the first at {first}; "
        "a decomposition needs finite numbers"
    )


def check_tensor(where: str, x: Array) -> None:
    """Refuse a zero-dimensional array and entries that are not finite."""
    array_namespace(where, x)
    if len(x.shape) == 0:
        raise ValueError(f"{where}: x is a scalar; a decomposition needs at least one axis")
    check_finite(where, x)


def check_ranks(where: str, ranks: Ranks, shape: Sequence[int]) -> tuple[int, ...]:
    """Return ``ranks`` as a tuple that a Tucker decomposition of ``shape`` can have.

    One integer stands for that rank in every mode, lowered where the mode cannot have it. A sequence is taken at its
    word: a rank below 1, above the mode's size or above the product of the other ranks is an error. ``None`` in it
    leaves a mode whole (see `whole_modes`): it gets the largest rank that the others allow.
    """
    if isinstance(ranks, str | bytes):
        raise TypeError(f"{where}: ranks is {ranks!r}; pass an integer, or one integer a mode")
    if not isinstance(ranks, Iterable):
        rank = as_int(where, "ranks", ranks)
        if rank < 1:
            raise ValueError(f"{where}: rank {rank}; pass at least 1")
        return feasible_ranks([rank] * len(shape), shape)
    ranks = tuple(ranks)
    if len(ranks) != len(shape):
        raise ValueError(f"{where}: {len(ranks)} ranks for {len(shape)} modes of shape {tuple(shape)}; pass one a mode")
    wished = [n if r is None else as_int(where, f"ranks[{k}]", r) for k, (r, n) in enumerate(zip(ranks, shape))]
    given = tuple(wished)
    if None in ranks:
        lowered = feasible_ranks(wished, shape)
        given = tuple(low if r is None else w for r, w, low in zip(ranks, wished, lowered))
    for mode, (rank, size) in enumerate(zip(given, shape)):
        if rank > size:
            raise ValueError(f"{where}: rank {rank} for mode {mode} exceeds its size {size}; pass at most {size}")
        if rank < 1 and 0 not in shape:
            raise ValueError(f"{where}: rank {rank} for mode {mode}; pass at least 1 and at most {size}")
        if rank < 0:  # an empty tensor has rank 0 in every mode
            raise ValueError(f"{where}: rank {rank} for mode {mode} of size {size}; pass 0")
    for mode, rank in enumerate(given):
        others = math.prod(given[:mode] + given[mode + 1 :])
        if rank > others:
            raise ValueError(
                f"{where}: rank {rank} for mode {mode} exceeds {others}, the product of the other ranks of {given}: "
                f"no tensor has it; pass at most {others}, as in {feasible_ranks(given, shape)}"
            )
    return given


def whole_modes(ranks: Any) -> tuple[int, ...]:
    """Return the modes that ``ranks`` leaves whole: those whose entry is ``None``."""
    if not isinstance(ranks, Iterable):
        return ()
    return tuple(mode for mode, rank in enumerate(ranks) if rank is None)


def feasible_ranks(ranks: Sequence[int], shape: Sequence[int]) -> tuple[int, ...]:
    """Lower ``ranks`` until a Tucker decomposition of ``shape`` can have them.

    A mode's rank is at most its size and at most the product of the other ranks. Lowering one may make another
    infeasible, so the rule is applied until nothing changes.

    Parameters
    ----------
    ranks : sequence of int
        The ranks that are wished for, one a mode.
    shape : sequence of int
        The size of each mode.

    Returns
    -------
    tuple of int
        The largest ranks, no rank above the wished-for one, that are feasible.

    Raises
    ------
    ValueError
        If there is not one rank a mode.

    References
    ----------
    Carlini and Kleppe, *Ranks derived from multilinear maps*, Journal of Pure and Applied Algebra 215 (2011): these
    bounds are necessary, and sufficient for some tensor to have the ranks.

    Examples
    --------
    >>> feasible_ranks((32, 32, 3, 3), (64, 64, 3, 3))
    (32, 32, 3, 3)
    >>> feasible_ranks((40, 4, 3, 9), (64, 64, 3, 3))
    (36, 4, 3, 3)
    """
    ranks, shape = as_sequence("feasible_ranks", "ranks", ranks), as_sequence("feasible_ranks", "shape", shape)
    if len(ranks) != len(shape):
        raise ValueError(
            f"feasible_ranks: {len(ranks)} ranks for {len(shape)} modes of shape {tuple(shape)}; pass one a mode"
        )
    lowered = [min(int(r), int(n)) for r, n in zip(ranks, shape)]
    while True:
        # The bound is monotone in the ranks, so this descends to its greatest fixed point and never below it.
        bounds = [min(r, math.prod(lowered[:k] + lowered[k + 1 :])) for k, r in enumerate(lowered)]
        if bounds == lowered:
            return tuple(lowered)
        lowered = bounds


def as_number(where: str, name: str, value: Any) -> float:
    """Return a real number as a float; what cannot be one is refused."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise TypeError(f"{where}: {name} is {value!r}; pass a number") from None


def check_fraction(where: str, name: str, value: Any, *, zero: bool = False) -> float:
    """Return ``value`` as a float in (0, 1], or in [0, 1] with ``zero=True``."""
    number = as_number(where, name, value)
    if not (0.0 if zero else math.ulp(0.0)) <= number <= 1.0:
        raise ValueError(f"{where}: {name} is {number}; pass a number {'from 0' if zero else 'above 0'} to 1")
    return number


def check_choice(where: str, name: str, value: Any, allowed: Sequence[str]) -> Any:
    """Return an option that has to be one of a few words."""
    if value not in allowed:
        raise ValueError(f"{where}: {name} is {value!r}; pass one of {', '.join(map(repr, allowed))}")
    return value


def exactly_one(where: str, **options: Any) -> str:
    """Return the name of the one option that is not ``None``; none or several are an error."""
    given = [name for name, value in options.items() if value is not None]
    if len(given) != 1:
        came = " and ".join(given) if given else "none of them"
        raise TypeError(f"{where}: got {came}; pass exactly one of {', '.join(options)}")
    return given[0]


def check_tolerance(where: str, value: Any) -> float:
    """Return a relative tolerance as a float in [0, 1]."""
    return check_fraction(where, "rtol", value, zero=True)


def check_limit(where: str, name: str, value: Any) -> None:
    """Refuse a budget or a tolerance, by the name of its option, that is out of its range."""
    if name == "rtol":
        check_tolerance(where, value)
    elif name == "max_ratio":
        check_fraction(where, name, value)
    elif as_int(where, name, value) < 1:
        raise ValueError(f"{where}: {name} is {value}; pass at least 1")
