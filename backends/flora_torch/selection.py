"""Which weights of a model an adapter is for: names, tied weights, patterns, and what to say when nothing fits."""

import difflib
import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from flora_torch.base_weight import check_adaptable, describe, identity, is_unpacked_linear, own_parameter, weight_names
from flora_torch.kinds import layer_weights, refusal, wrapper_for
from flora_torch.layers import FloraLayer

__all__ = [
    "Holder",
    "Pattern",
    "PerName",
    "Place",
    "Site",
    "SkippedWeight",
    "choose",
    "matches",
    "places",
    "select",
    "sites",
]

Pattern: TypeAlias = str | re.Pattern[str] | type[nn.Module] | Callable[[str, nn.Module], bool]
Value = TypeVar("Value")


@dataclass(frozen=True)
class Place:
    """A module of the model, under the name that it has without any adapter.

    Parameters
    ----------
    name : str
        The module's name; empty for the model itself.
    module : nn.Module
        The module, or the base of the layer that wraps it.
    wrapper : FloraLayer, optional
        The layer that wraps it.
    parent : nn.Module, optional
        The module that it is a child of; ``None`` for the model itself.
    key : str
        The child's name in the parent.
    is_internal : bool
        Whether it computes a weight of another module, as a parametrization does.

    Examples
    --------
    >>> [place.name for place in places(nn.Sequential(nn.Linear(2, 2)))]
    ['', '0']
    """

    name: str
    module: nn.Module
    wrapper: FloraLayer | None
    parent: nn.Module | None
    key: str
    is_internal: bool = False


@dataclass(frozen=True)
class Holder:
    """One module that holds a weight, and all the places where the module stands.

    Parameters
    ----------
    module : nn.Module
        The module.
    parameter : str
        What the module calls the weight.
    places : tuple of Place
        Where the module stands; several for a shared module.

    Examples
    --------
    >>> linear = nn.Linear(2, 2)
    >>> [holder.names for holder in sites(nn.Sequential(linear, linear))["0.weight"].holders]
    [('0.weight', '1.weight')]
    """

    module: nn.Module
    parameter: str
    places: tuple[Place, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The names under which the model knows the weight by this holder."""
        return tuple(_join(place.name, self.parameter) for place in self.places)

    @property
    def wrapper(self) -> FloraLayer | None:
        """The layer that wraps the module already, if any."""
        return self.places[0].wrapper


@dataclass(frozen=True)
class Site:
    """One weight of the model, and everything that holds it: tied weights are one.

    Parameters
    ----------
    name : str
        The weight's first name.
    weight : nn.Parameter, or Tensor on the meta device
        The weight; for one that is computed or quantized, an empty tensor of the dense weight's shape and type.
    holders : tuple of Holder
        The modules that hold it.
    is_parameter : bool
        Whether the model has a parameter of this name.

    Examples
    --------
    >>> sites(nn.Sequential(nn.Linear(2, 3)))["0.weight"].names
    ('0.weight',)
    """

    name: str
    weight: Tensor
    holders: tuple[Holder, ...]
    is_parameter: bool = True

    @property
    def names(self) -> tuple[str, ...]:
        """Every name that the model knows the weight by."""
        return tuple(name for holder in self.holders for name in holder.names)

    @property
    def kind(self) -> type[FloraLayer]:
        """The kind of layer that adapts it, for the first holder."""
        return wrapper_for(self.holders[0].module, self.holders[0].parameter)


def _join(module: str, parameter: str) -> str:
    return f"{module}.{parameter}" if module else parameter


# Modules that only run another one, by their classes' names, and what they call it.
_RUNNERS = {
    "OptimizedModule": "_orig_mod",
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "AveragedModel": "module",
    "CheckpointWrapper": "_checkpoint_wrapped_module",
    "OffloadWrapper": "_checkpoint_wrapped_module",
}


def places(model: nn.Module) -> list[Place]:
    """List every module of a model under its plain name, seen through the layers that wrap some of them.

    A shared module is listed once for each of its names. What only runs another module, as a compiled or parallel one
    does, adds nothing to a name.

    Examples
    --------
    >>> from flora_torch import FloraLinear
    >>> [place.name for place in places(nn.Sequential(FloraLinear(nn.Linear(2, 2), ranks=1)))]
    ['', '0']
    """
    found: list[Place] = []

    def walk(module: nn.Module, name: str, parent: nn.Module | None, key: str, internal: bool = False) -> None:
        wrapper = module if isinstance(module, FloraLayer) else None
        base = module if wrapper is None else wrapper.base_layer
        found.append(Place(name, base, wrapper, parent, key, internal))
        # `named_children` would skip the second name of a shared child.
        for child_key, child in vars(base)["_modules"].items():
            if child is not None:
                inside = internal or (child_key == "parametrizations" and is_parametrized(base))
                below = name if _RUNNERS.get(type(base).__name__) == child_key else _join(name, child_key)
                walk(child, below, base, child_key, inside)

    walk(model, "", None, "")
    return found


def sites(model: nn.Module) -> dict[str, Site]:
    """List every weight of a model by every name it has; tied parameters share one `Site`.

    Beside the parameters these are the weights that parametrizations compute, under the names that the modules use.

    Examples
    --------
    >>> list(sites(nn.Sequential(nn.Linear(2, 3))))
    ['0.weight', '0.bias']
    """
    holders: dict[int, dict[tuple[int, str], list[Place]]] = {}
    for place in places(model):
        for parameter in weight_names(place.module):
            key = identity(place.module, parameter)
            holders.setdefault(key, {}).setdefault((id(place.module), parameter), []).append(place)
    table: dict[str, Site] = {}
    for found in holders.values():
        # What one module computes has no identity but the module's: several such weights are told apart by name.
        for names in _told_apart(found):
            listed = tuple(Holder(found[key][0].module, key[1], tuple(found[key])) for key in names)
            first = listed[0]
            is_parameter = own_parameter(first.module, first.parameter) is not None
            site = Site(first.names[0], _shown_weight(first), listed, is_parameter)
            table |= dict.fromkeys(site.names, site)
    return table


def _told_apart(found: Mapping[tuple[int, str], list[Place]]) -> list[list[tuple[int, str]]]:
    real = [key for key, where in found.items() if own_parameter(where[0].module, key[1]) is not None]
    return [real] if real else [[key] for key in found]


def _shown_weight(holder: Holder) -> Tensor:
    weight = describe(holder.module, holder.parameter)
    assert weight is not None
    own = own_parameter(holder.module, holder.parameter)
    if weight.storage == "plain" and own is not None:
        return own
    return torch.empty(weight.shape, dtype=weight.dtype, device="meta")


def matches(pattern: Pattern, name: str, module: nn.Module) -> bool:
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
                raise ValueError(f"attach: the regular expression {pattern[3:]!r} cannot be read: {error}") from error
        if any(sign in pattern for sign in "*?["):
            return fnmatch.fnmatchcase(name, pattern)
        return name == pattern or name.endswith(f".{pattern}")
    if isinstance(pattern, re.Pattern):
        return pattern.fullmatch(name) is not None
    if isinstance(pattern, type):
        return isinstance(module, pattern)
    if callable(pattern):
        return bool(pattern(name, module))
    raise TypeError(
        f"attach: {pattern!r} is not a pattern; pass a name, a glob, 're:…', a compiled pattern, a type or a predicate"
    )


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


@dataclass(frozen=True)
class SkippedWeight:
    """A weight that a choice for a whole model left out, and why.

    Parameters
    ----------
    name : str
        The weight's name.
    reason : str
        Why.

    Examples
    --------
    >>> table = nn.Sequential(nn.Linear(2, 2), nn.Embedding(3, 2, max_norm=1.0))
    >>> [skipped.name for skipped in choose(table)[1]]
    ['1.weight']
    """

    name: str
    reason: str


def select(
    model: nn.Module,
    target_modules: "Pattern | Sequence[Pattern] | None" = None,
    exclude_modules: "Pattern | Sequence[Pattern] | None" = None,
    target_parameters: "Pattern | Sequence[Pattern] | None" = None,
) -> list[Site]:
    """Choose the weights that an adapter is for.

    Parameters
    ----------
    model, target_modules, exclude_modules, target_parameters
        As for `choose`.

    Returns
    -------
    list of Site
        The weights, tied ones once, in the model's order.

    Raises
    ------
    ValueError
        As for `choose`.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    >>> [site.name for site in select(model, exclude_modules="2")]
    ['0.weight']
    """
    return choose(model, target_modules, exclude_modules, target_parameters)[0]


def choose(
    model: nn.Module,
    target_modules: "Pattern | Sequence[Pattern] | None" = None,
    exclude_modules: "Pattern | Sequence[Pattern] | None" = None,
    target_parameters: "Pattern | Sequence[Pattern] | None" = None,
) -> tuple[list[Site], list[SkippedWeight]]:
    """Choose the weights that an adapter is for, and say which ones a choice for the whole model left out.

    Parameters
    ----------
    model : nn.Module
        The model.
    target_modules, exclude_modules : pattern or sequence of patterns, optional
        Modules whose weights are meant, or not meant; see `matches`. With neither ``target_modules`` nor
        ``target_parameters``, those of every layer of a known kind are. ``"all"`` means every weight of the model with
        two axes or more.
    target_parameters : pattern or sequence of patterns, optional
        Parameters, by their own names.

    Returns
    -------
    list of Site
        The weights, tied ones once, in the model's order.
    list of SkippedWeight
        Without patterns, and for ``"all"``: the weights that were left out though nobody excluded them.

    Raises
    ------
    ValueError
        If a pattern means nothing that can be adapted, or nothing is left, or a weight is tied to an excluded one, or
        belongs to the model itself and not to a module in it.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(2, 2), nn.PReLU())
    >>> [site.name for site in choose(model, "all")[0]], choose(model, "all")[1]
    (['0.weight'], [SkippedWeight(name='0.bias', reason='one axis'), SkippedWeight(name='1.weight', reason='one axis')])
    """
    table, everywhere = sites(model), places(model)
    excluded = as_list(exclude_modules)

    def is_excluded(place: Place) -> bool:
        return any(matches(pattern, place.name, place.module) for pattern in excluded)

    chosen: dict[str, Site] = {}
    skipped: list[SkippedWeight] = []
    whole_model = target_modules == "all" or (target_modules is None and target_parameters is None)
    if whole_model:
        chosen, skipped = _everything(everywhere, table, is_excluded, only_layers=target_modules is None)
    else:
        for pattern in as_list(target_modules):
            chosen |= _by_module(pattern, everywhere, table, is_excluded)
    for pattern in as_list(target_parameters):
        chosen |= _by_parameter(pattern, table, is_excluded)
    if not chosen:
        _refuse_all(everywhere, skipped)
    order = {name: k for k, name in enumerate(table)}
    result = sorted({site.name: site for site in chosen.values()}.values(), key=lambda site: order[site.name])
    for site in result:
        _check_site(site, is_excluded)
    return result, skipped


def _refuse_all(everywhere: list[Place], skipped: list[SkippedWeight]) -> None:
    for weight in skipped:
        if weight.reason not in _NOT_TRIED:
            raise ValueError(f"attach: {weight.name}: {weight.reason}")
    kinds = ", ".join(sorted({type(place.module).__name__ for place in everywhere}))
    raise ValueError(f"attach: no layer of the model can be adapted or all are excluded; it is made of {kinds}")


# Why a weight is left out that nothing speaks against.
_VECTOR = "one axis"
_UNKNOWN = "no layer of a known kind; name it in target_parameters, or pass target_modules='all'"
_NOT_TRIED = (_VECTOR, _UNKNOWN)


def _everything(
    everywhere: list[Place],
    table: Mapping[str, Site],
    is_excluded: Callable[[Place], bool],
    *,
    only_layers: bool,
) -> tuple[dict[str, Site], list[SkippedWeight]]:
    """Take what can be adapted, and note what cannot."""
    chosen: dict[str, Site] = {}
    skipped: dict[str, SkippedWeight] = {}
    for place in everywhere:
        if is_excluded(place) or place.is_internal:
            continue
        of_layer = [name for name in layer_weights(place.module) if "." not in name]
        # What a quantized layer packs its weight into is no weight.
        others = () if is_unpacked_linear(place.module) else weight_names(place.module)
        for parameter in dict.fromkeys([*of_layer, *others]):
            name = _join(place.name, parameter)
            reason = _reason(place, parameter, name, table, of_layer, only_layers)
            if reason is None:
                chosen[name] = table[name]
            elif reason != _VECTOR or not only_layers:
                skipped[name] = SkippedWeight(name, reason)
    # A tied weight that one of its holders cannot have is no target of the others either.
    names = {site.name: site for site in chosen.values()}.values()
    unfit = {site.name: skipped[name] for site in names for name in site.names if name in skipped}
    taken = {name: site for name, site in chosen.items() if site.name not in unfit}
    known = {name for site in taken.values() for name in site.names}
    return taken, [weight for weight in skipped.values() if weight.name not in known]


def _reason(
    place: Place, parameter: str, name: str, table: Mapping[str, Site], of_layer: list[str], only_layers: bool
) -> str | None:
    """Tell why a weight of a whole model is left out; ``None`` where it is taken."""
    site = table.get(name)
    if site is not None and not _has_values(place.module, parameter):
        return None if parameter in of_layer else _UNKNOWN  # refused later, whole: the model was not loaded
    if site is not None and site.weight.dim() < 2:
        return _VECTOR
    if only_layers and parameter not in of_layer:
        return _UNKNOWN
    if site is None and parameter not in weight_names(place.module):
        return refusal(place.module, parameter)
    if place.parent is None:
        return _root_refusal(name, place.module, parameter)
    return refusal(place.module, parameter)


def _has_values(module: nn.Module, parameter: str) -> bool:
    own = own_parameter(module, parameter)
    return own is None or not (own.is_meta or isinstance(own, nn.parameter.UninitializedParameter))


def _by_module(
    pattern: Any, everywhere: list[Place], table: Mapping[str, Site], is_excluded: Callable[[Place], bool]
) -> dict[str, Site]:
    hits = [place for place in everywhere if matches(pattern, place.name, place.module)]
    known = [place for place in hits if layer_weights(place.module)]
    if not hits:
        names = [place.name for place in everywhere if place.name]
        hint = near(pattern, names) if isinstance(pattern, str) else ""
        raise ValueError(f"attach: target_modules {_shown(pattern)} matches no module of the model{hint}")
    if not known:
        first = hits[0]
        own = ", ".join(_join(first.name, n) for n, _ in first.module.named_parameters(recurse=False)) or "none"
        raise ValueError(
            f"attach: target_modules {_shown(pattern)} matches only modules that are no layers of a known kind, such "
            f"as {first.name or 'the model'!r}, a {type(first.module).__name__}; pass its parameters in "
            f"target_parameters (it has {own})"
        )
    owners = {place.name: place for place in everywhere}
    found: dict[str, Site] = {}
    for place in known:
        for name in [_join(place.name, parameter) for parameter in layer_weights(place.module)]:
            owner = owners[name.rpartition(".")[0]]
            if is_excluded(place) or is_excluded(owner):
                continue
            if name not in table:
                check_adaptable(f"attach: {name}", owner.module, name.rpartition(".")[2])
            found[name] = table[name]
    return found


def _by_parameter(pattern: Any, table: Mapping[str, Site], is_excluded: Callable[[Place], bool]) -> dict[str, Site]:
    found: dict[str, Site] = {}
    for name, site in table.items():
        for holder in site.holders:
            if name in holder.names and matches(pattern, name, holder.module):
                place = holder.places[holder.names.index(name)]
                if not is_excluded(place):
                    found[name] = site
    if not found:
        hint = near(pattern, table) if isinstance(pattern, str) else ""
        raise ValueError(f"attach: target_parameters {_shown(pattern)} matches no parameter of the model{hint}")
    many = not isinstance(pattern, str) or any(sign in pattern for sign in "*?[") or pattern.startswith("re:")
    # A pattern for many parameters means the weights among them; a vector that is named is refused later, with the
    # reason.
    return {name: site for name, site in found.items() if site.weight.dim() >= 2} if many else found


def _shown(pattern: Any) -> str:
    return pattern.__name__ if isinstance(pattern, type) else repr(pattern)


def _root_refusal(name: str, module: nn.Module, parameter: str) -> str:
    return (
        f"{name!r} belongs to the model itself, which cannot be replaced from outside; wrap it with "
        f"{wrapper_for(module, parameter).__name__}, or put it into an nn.Sequential"
    )


def _check_site(site: Site, is_excluded: Callable[[Place], bool]) -> None:
    """Refuse a weight that cannot be reached from outside, or that an excluded module holds too."""
    for holder in site.holders:
        for place, name in zip(holder.places, holder.names):
            if place.parent is None:
                raise ValueError(f"attach: {_root_refusal(name, holder.module, holder.parameter)}")
            if is_excluded(place):
                raise ValueError(
                    f"attach: {site.name!r} is tied to {name!r}, which is excluded; tied weights are adapted together: "
                    "exclude both or neither"
                )


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

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(2, 2))
    >>> PerName("ranks", {"0": 4, "*": 2}).of(sites(model)["0.weight"])
    4
    """

    _nothing: Any = object()

    def __init__(self, option: str, value: Any, default: Any = _nothing) -> None:
        self.option, self.default = option, default
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
        >>> PerName("scale", 2.0).of(sites(nn.Sequential(nn.Linear(2, 2)))["0.weight"])
        2.0
        """
        if self.table is None:
            value: Any = self.value
            return value
        for pattern, value in self.table.items():
            for holder in site.holders:
                candidates = [*holder.names, *(place.name for place in holder.places)]
                if any(matches(pattern, name, holder.module) for name in candidates):
                    self.used.add(pattern)
                    return value
        if self.default is self._nothing:
            raise ValueError(
                f"attach: {self.option} has no pattern for {site.name!r}; add one, or '*' as the last pattern"
            )
        return self.default

    def check_used(self, names: Iterable[str]) -> None:
        """Refuse patterns that meant nothing: they are mistyped, or the module is not a target.

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
                hint = near(pattern, names) if isinstance(pattern, str) else ""
                raise ValueError(
                    f"attach: {self.option} has the pattern {_shown(pattern)}, which means no target{hint}"
                )
