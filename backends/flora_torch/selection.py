"""Which weights of a model an adapter is for, and what to say when nothing fits."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from flora_torch.base_weight import check_adaptable, is_unpacked_linear, own_parameter, weight_names
from flora_torch.kinds import layer_weights, refusal, wrapper_for
from flora_torch.model_weights import Place, Site, places, sites
from flora_torch.patterns import Pattern, as_list, is_name, matches, near, shown

__all__ = ["SkippedWeight", "choose", "select"]


@dataclass(frozen=True)
class SkippedWeight:
    """A weight that a choice for a whole model left out, and why.

    Attributes
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
    *,
    where: str = "attach",
) -> list[Site]:
    """Choose the weights that an adapter is for.

    Parameters
    ----------
    model, target_modules, exclude_modules, target_parameters, where
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
    return choose(model, target_modules, exclude_modules, target_parameters, where=where)[0]


def choose(
    model: nn.Module,
    target_modules: "Pattern | Sequence[Pattern] | None" = None,
    exclude_modules: "Pattern | Sequence[Pattern] | None" = None,
    target_parameters: "Pattern | Sequence[Pattern] | None" = None,
    *,
    where: str = "attach",
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
    where : str
        Whose errors they are.

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
        return any(matches(pattern, place.name, place.module, where=where) for pattern in excluded)

    chosen: dict[str, Site] = {}
    skipped: list[SkippedWeight] = []
    whole_model = target_modules == "all" or (target_modules is None and target_parameters is None)
    if whole_model:
        chosen, skipped = _everything(everywhere, table, is_excluded, only_layers=target_modules is None)
    else:
        for pattern in as_list(target_modules):
            chosen |= _by_module(where, pattern, everywhere, table, is_excluded)
    for pattern in as_list(target_parameters):
        chosen |= _by_parameter(where, pattern, table, is_excluded)
    if not chosen:
        _refuse_all(where, everywhere, skipped)
    order = {name: k for k, name in enumerate(table)}
    result = sorted({site.name: site for site in chosen.values()}.values(), key=lambda site: order[site.name])
    for site in result:
        _check_site(where, site, is_excluded)
    return result, skipped


def _refuse_all(where: str, everywhere: list[Place], skipped: list[SkippedWeight]) -> None:
    for weight in skipped:
        if weight.reason not in _NOT_TRIED:
            raise ValueError(f"{where}: {weight.name}: {weight.reason}")
    kinds = ", ".join(sorted({type(place.module).__name__ for place in everywhere}))
    raise ValueError(f"{where}: no layer of the model can be adapted or all are excluded; it is made of {kinds}")


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
            name = place.name_of(parameter)
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
    return own is None or not (own.is_meta or nn.parameter.is_lazy(own))


def _meant(pattern: str, names: list[str]) -> str:
    """Return an ending for an error message about a pattern that matches nothing: PEFT reads some in another way."""
    if pattern == "all-linear":
        return "; pass torch.nn.Linear, a class, for all of its layers, or 'all' for all weights"
    if any(sign in pattern for sign in "\\()|^$+"):
        return f"; a regular expression begins with 're:', as {'re:' + pattern!r}"
    return near(pattern, names)


def _by_module(
    where: str, pattern: Any, everywhere: list[Place], table: Mapping[str, Site], is_excluded: Callable[[Place], bool]
) -> dict[str, Site]:
    hits = [place for place in everywhere if matches(pattern, place.name, place.module, where=where)]
    known = [place for place in hits if layer_weights(place.module)]
    if not hits:
        names = [place.name for place in everywhere if place.name]
        hint = _meant(pattern, names) if isinstance(pattern, str) else ""
        raise ValueError(f"{where}: target_modules {shown(pattern)} matches no module of the model{hint}")
    if not known:
        first = hits[0]
        own = ", ".join(first.name_of(n) for n, _ in first.module.named_parameters(recurse=False)) or "none"
        raise ValueError(
            f"{where}: target_modules {shown(pattern)} matches only modules that are no layers of a known kind, such "
            f"as {first.name or 'the model'!r}, a {type(first.module).__name__}; pass its parameters in "
            f"target_parameters (it has {own})"
        )
    owners = {place.name: place for place in everywhere}
    found: dict[str, Site] = {}
    for place in known:
        for name in [place.name_of(parameter) for parameter in layer_weights(place.module)]:
            owner = owners[name.rpartition(".")[0]]
            if is_excluded(place) or is_excluded(owner):
                continue
            if name not in table:
                check_adaptable(f"{where}: {name}", owner.module, name.rpartition(".")[2])
            found[name] = table[name]
    return found


def _by_parameter(
    where: str, pattern: Any, table: Mapping[str, Site], is_excluded: Callable[[Place], bool]
) -> dict[str, Site]:
    found: dict[str, Site] = {}
    for name, site in table.items():
        for holder in site.holders:
            if name in holder.names and matches(pattern, name, holder.module, where=where):
                place = holder.places[holder.names.index(name)]
                if not is_excluded(place):
                    found[name] = site
    if not found:
        hint = near(pattern, table) if isinstance(pattern, str) else ""
        raise ValueError(f"{where}: target_parameters {shown(pattern)} matches no parameter of the model{hint}")
    if is_name(pattern):
        return found  # a vector that is named is refused later, with the reason
    return {name: site for name, site in found.items() if site.weight.dim() >= 2}


def _root_refusal(name: str, module: nn.Module, parameter: str) -> str:
    return (
        f"{name!r} belongs to the model itself, which cannot be replaced from outside; wrap it with "
        f"{wrapper_for(module, parameter).__name__}, or put it into an nn.Sequential"
    )


def _check_site(where: str, site: Site, is_excluded: Callable[[Place], bool]) -> None:
    """Refuse a weight that cannot be reached from outside, or that an excluded module holds too."""
    for holder in site.holders:
        for place, name in zip(holder.places, holder.names):
            if place.parent is None:
                raise ValueError(f"{where}: {_root_refusal(name, holder.module, holder.parameter)}")
            if is_excluded(place):
                raise ValueError(
                    f"{where}: {site.name!r} is tied to {name!r}, which is excluded; tied weights are adapted "
                    "together: exclude both or neither"
                )
