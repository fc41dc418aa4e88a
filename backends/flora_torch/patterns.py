"""How a user names modules and weights: patterns, options for each pattern, and what was probably meant."""

import difflib
import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Generic, TypeAlias, TypeVar

from torch import nn

from flora_tensor import Arrangement
from flora_torch.model_weights import Site

__all__ = ["Pattern", "PerName", "arranged_as", "as_list", "is_name", "matches", "near", "shown"]

Pattern: TypeAlias = str | re.Pattern[str] | type[nn.Module] | Callable[[str, nn.Module], bool]
Value = TypeVar("Value")


def matches(pattern: Pattern, name: str, module: nn.Module, *, where: str = "attach") -> bool:
    """Tell whether a pattern means a module, or a weight if ``name`` is one's.

    Parameters
    ----------
    pattern : str, re.Pattern, type or callable
        A plain name means that name and every name that ends with it after a dot (``"fc1"`` means ``"block.fc1"``). A
        name with ``*``, ``?`` or ``[`` is a glob for the whole name. ``"re:…"`` and a compiled pattern are regular
        expressions for the whole name. A type means its instances; a callable is asked with name and module.
    name : str
        The name.
    module : nn.Module
        The module, or the one that owns the weight.
    where : str
        Whose error it would be.

    Returns
    -------
    bool
        Whether it matches.

    Raises
    ------
    TypeError
        If the pattern is of another kind.
    ValueError
        If a regular expression cannot be read.

    Examples
    --------
    >>> linear = nn.Linear(2, 2)
    >>> [matches(p, "block.fc1", linear) for p in ("fc1", "c1", "block.*", "re:.*fc[0-9]", nn.Linear)]
    [True, False, True, True, True]
    """
    if isinstance(pattern, str):
        if pattern.startswith("re:"):
            try:
                return re.fullmatch(pattern[3:], name) is not None
            except re.error as error:
                raise ValueError(f"{where}: the regular expression {pattern[3:]!r} cannot be read: {error}") from error
        if is_name(pattern):
            return name == pattern or name.endswith(f".{pattern}")
        return fnmatch.fnmatchcase(name, pattern)
    if isinstance(pattern, re.Pattern):
        return pattern.fullmatch(name) is not None
    if isinstance(pattern, type):
        return isinstance(module, pattern)
    if callable(pattern):
        return bool(pattern(name, module))
    raise TypeError(
        f"{where}: {pattern!r} is not a pattern; pass a name, a glob, 're:…', a compiled pattern, a type or a predicate"
    )


def is_name(pattern: Pattern) -> bool:
    """Tell whether a pattern is a plain name, and not a glob or anything else that may mean many."""
    return isinstance(pattern, str) and not pattern.startswith("re:") and not any(sign in pattern for sign in "*?[")


def as_list(patterns: "Pattern | Sequence[Pattern] | None") -> list[Any]:
    """Return one pattern, several or none as a list."""
    if patterns is None:
        return []
    return list(patterns) if isinstance(patterns, Sequence) and not isinstance(patterns, str) else [patterns]


def near(name: str, known: Iterable[str]) -> str:
    """Return an ending for an error message that names what was probably meant.

    Examples
    --------
    >>> near("fc11", ["block.fc1", "block.norm"])
    '; near names: block.fc1'
    """
    by_tail: dict[str, list[str]] = {}
    for full in known:
        parts = full.split(".")
        for k in range(len(parts)):
            by_tail.setdefault(".".join(parts[k:]), []).append(full)
    close = difflib.get_close_matches(name, by_tail, n=5, cutoff=0.6)
    names = list(dict.fromkeys(full for tail in close for full in by_tail[tail]))[:5]
    return f"; near names: {', '.join(names)}" if names else ""


def shown(pattern: Any) -> str:
    """Return a pattern as an error message shows it."""
    return pattern.__name__ if isinstance(pattern, type) else repr(pattern)


class PerName(Generic[Value]):
    """An option that is one value for all weights, or one for each pattern of names, the first match counting.

    Parameters
    ----------
    option : str
        The option's name, for error messages.
    value : Value, or mapping of pattern to Value
        The value or values.
    default : Value, optional
        For weights that no pattern means; without it they are an error.
    where : str
        Whose errors they are.

    Examples
    --------
    >>> from flora_torch.model_weights import sites
    >>> model = nn.Sequential(nn.Linear(2, 2))
    >>> PerName("ranks", {"0": 4, "*": 2}).of(sites(model)["0.weight"])
    4
    """

    _nothing: Any = object()

    def __init__(self, option: str, value: Any, default: Any = _nothing, *, where: str = "attach") -> None:
        self.option, self.default, self.where = option, default, where
        self.table: dict[Any, Any] | None = dict(value) if isinstance(value, Mapping) else None
        self.value: Any = value
        self.used: set[Any] = set()

    def of(self, site: Site) -> Value:
        """Return the value for a weight: patterns are matched against its module's names and its own.

        Raises
        ------
        ValueError
            If no pattern matches and there is no default.

        Examples
        --------
        >>> from flora_torch.model_weights import sites
        >>> PerName("scale", 2.0).of(sites(nn.Sequential(nn.Linear(2, 2)))["0.weight"])
        2.0
        """
        if self.table is None:
            value: Any = self.value
            return value
        for pattern, value in self.table.items():
            for holder in site.holders:
                candidates = [*holder.names, *(place.name for place in holder.places)]
                if any(matches(pattern, name, holder.module, where=self.where) for name in candidates):
                    self.used.add(pattern)
                    return value
        if self.default is self._nothing:
            raise ValueError(
                f"{self.where}: {self.option} has no pattern for {site.name!r}; add one, or '*' as the last pattern"
            )
        return self.default

    def check_used(self, targets: Sequence[Site]) -> None:
        """Refuse patterns that meant nothing: they are mistyped, or the module is not a target.

        Parameters
        ----------
        targets : sequence of Site
            The weights that values were looked up for.

        Raises
        ------
        ValueError
            If a pattern was never used.

        Examples
        --------
        >>> PerName("scale", 2.0).check_used([])
        """
        for pattern in self.table or ():
            if pattern not in self.used:
                names = [name for site in targets for name in site.names]
                modules = [name.rpartition(".")[0] for name in names]
                hint = near(pattern, [*modules, *names]) if isinstance(pattern, str) else ""
                raise ValueError(
                    f"{self.where}: {self.option} has the pattern {shown(pattern)}, which means no target{hint}"
                )


def arranged_as(option: PerName[Any], site: Site, shape: tuple[int, ...]) -> tuple[Arrangement, tuple[int, ...]]:
    """Return how a weight is arranged, and the arranged shape; its own axes where a single pattern is not for it.

    Raises
    ------
    ValueError
        If an arrangement that was given for this weight does not fit its shape.

    Examples
    --------
    >>> from flora_torch.model_weights import sites
    >>> option, table = PerName("arrangement", "o (i h w)"), sites(nn.Sequential(nn.Conv2d(2, 4, 3), nn.Linear(4, 2)))
    >>> [arranged_as(option, table[name], tuple(table[name].weight.shape))[1] for name in ("0.weight", "1.weight")]
    [(4, 18), (2, 4)]
    """
    given = option.of(site)
    arranged = Arrangement(given) if isinstance(given, str) else given
    if arranged is None or (arranged.n_axes != len(shape) and option.table is None):
        arranged = Arrangement.native(len(shape))
    try:
        return arranged, arranged.shape(shape)
    except ValueError as error:
        raise ValueError(f"{option.where}: {site.name}: {error}") from error
