"""Putting new adapters on a model: all or nothing, tied weights as one.

Everything is built and checked before the first module is replaced. All modules that hold a tied weight are wrapped and
share one update.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from flora_tensor import Arrangement, Moments, TuckerTensor
from flora_tensor._reporting import Tabled
from flora_torch._sharding import as_parts, refuse_sharded
from flora_torch.base_weight import adaptable
from flora_torch.chain import Memory
from flora_torch.freezing import all_or_nothing, freeze
from flora_torch.functional import Path
from flora_torch.initialize import DECOMPOSING, Ranks, needs_values, preset_scale, resolve_ranks, start_update
from flora_torch.kinds import drops_input, wrapper_for
from flora_torch.layers import FloraLayer, FloraParameter
from flora_torch.model_weights import Place, Site, sites
from flora_torch.patterns import Pattern, PerName, arranged_as, near
from flora_torch.scaling import Scaling, resolve_scale
from flora_torch.selection import SkippedWeight, choose
from flora_torch.update import TuckerUpdate

__all__ = [
    "AttachReport",
    "LayerReport",
    "Plan",
    "UpdateOptions",
    "attach",
    "install",
    "n_model_parameters",
    "report_of",
]


@dataclass(frozen=True)
class LayerReport:
    """What `attach` did to one weight.

    Parameters
    ----------
    name : str
        The weight's name.
    kind : str
        The layer that wraps its module.
    shape : tuple of int
        Its shape.
    pattern : str
        The arrangement.
    asked, ranks : tuple of (int or None)
        The ranks asked for and those given; they differ where a rank was lowered to what is feasible.
    n_parameters : int
        How many numbers are trained; what it shares with a layer before it is counted there.
    tied : tuple of str
        The weight's other names, which the update serves too.

    References
    ----------
    FLoRA, arXiv 2405.14739, section 3, for what ranks and parameters count.

    Examples
    --------
    >>> report = attach(nn.Sequential(nn.Linear(8, 3)), ranks=4)
    >>> report.layers[0].asked, report.layers[0].ranks
    ((4, 4), (3, 3))
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    pattern: str
    asked: tuple[int | None, ...]
    ranks: tuple[int, ...]
    n_parameters: int
    tied: tuple[str, ...] = ()

    @property
    def clamped(self) -> bool:
        """Whether a rank was lowered."""
        return any(a is not None and a != r for a, r in zip(self.asked, self.ranks))


@dataclass(frozen=True, repr=False)
class AttachReport(Tabled):
    """What `attach` did; its text is a table.

    Parameters
    ----------
    adapter_name : str
        The adapter.
    layers : tuple of LayerReport
        One entry a weight.
    n_model_parameters : int
        How many parameters the model has without the adapter.
    whole : tuple of str
        Tensors that were replaced by a stored value.
    skipped : tuple of SkippedWeight
        Weights that were left out though nobody excluded them, and why; only where the whole model was asked for.
    missing_keys, unexpected_keys : tuple of str
        What `load_adapter` with ``strict=False`` did not find in the file, and what it did not know.

    References
    ----------
    FLoRA, arXiv 2405.14739, section 3, for what ranks and parameters count.

    Examples
    --------
    >>> report = attach(nn.Sequential(nn.Linear(8, 8)), ranks=2)
    >>> report.n_parameters, round(report.share, 3)
    (36, 0.5)
    >>> print(report)
    weight    kind         shape  ranks  parameters
    0.weight  FloraLinear  8×8    2×2            36
    adapter 'default': 36 parameters on 1 weight, 50.0 % of the model's 72
    """

    adapter_name: str
    layers: tuple[LayerReport, ...]
    n_model_parameters: int
    whole: tuple[str, ...] = ()
    skipped: tuple[SkippedWeight, ...] = ()
    missing_keys: tuple[str, ...] = ()
    unexpected_keys: tuple[str, ...] = ()

    @property
    def n_parameters(self) -> int:
        """How many numbers the adapter trains."""
        return sum(layer.n_parameters for layer in self.layers)

    @property
    def share(self) -> float:
        """`n_parameters` as a part of the model's own parameters."""
        return self.n_parameters / max(1, self.n_model_parameters)

    def _skipped_by_reason(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for weight in self.skipped:
            found.setdefault(weight.reason, []).append(weight.name)
        return found

    def to_table(self) -> str:
        """Return the report as text: a line for each weight, what was left out and why, and the totals."""
        rows = [("weight", "kind", "shape", "ranks", "parameters")]
        for layer in self.layers:
            ranks = "×".join(map(str, layer.ranks))
            asked = "×".join("whole" if r is None else str(r) for r in layer.asked)
            pattern = "" if Arrangement(layer.pattern).is_native else f" as {layer.pattern}"
            rows.append(
                (
                    layer.name + "".join(f" = {name}" for name in layer.tied),
                    layer.kind,
                    "×".join(map(str, layer.shape)) + pattern,
                    f"{ranks} (asked {asked})" if layer.clamped else ranks,
                    f"{layer.n_parameters:,}",
                )
            )
        widths = [max(len(row[k]) for row in rows) for k in range(5)]
        lines = ["  ".join([*(c.ljust(w) for c, w in zip(r[:4], widths)), r[4].rjust(widths[4])]) for r in rows]
        lines += [f"whole: {name}" for name in self.whole]
        lines += [
            f"skipped: {', '.join(names[:3])}{f' and {len(names) - 3} more' if names[3:] else ''}: {reason}"
            for reason, names in self._skipped_by_reason().items()
        ]
        weights = f"{len(self.layers)} weight{'' if len(self.layers) == 1 else 's'}"
        return "\n".join(
            [
                *lines,
                f"adapter {self.adapter_name!r}: {self.n_parameters:,} parameters on {weights}, "
                f"{self.share:.1%} of the model's {self.n_model_parameters:,}".replace("%", " %"),
            ]
        )


def attach(
    model: nn.Module,
    *,
    ranks: Ranks | Mapping[Any, Ranks],
    target_modules: "Pattern | Sequence[Pattern] | None" = None,
    exclude_modules: "Pattern | Sequence[Pattern] | None" = None,
    target_parameters: "Pattern | Sequence[Pattern] | None" = None,
    scale: float | Mapping[Any, float] = 1.0,
    alpha: float | None = None,
    scaling: Scaling = "init",
    dropout: float = 0.0,
    rank_dropout: float = 0.0,
    module_dropout: float = 0.0,
    magnitude: bool = False,
    init: str = "orthonormal",
    init_tensors: Mapping[str, Tensor | TuckerTensor] | None = None,
    adapter_name: str = "default",
    arrangement: Arrangement | str | Mapping[Any, Arrangement | str] | None = None,
    dtype: torch.dtype | None = None,
    path: Path = "auto",
    memory: Memory = "normal",
    freeze_model: bool = True,
    generator: torch.Generator | None = None,
) -> AttachReport:
    """Wrap layers of a model, in place, so that they train a Tucker tensor beside their frozen weight.

    The model's output does not change: every start but ``"from_delta"`` is exactly zero. Nothing is changed if
    anything is refused. A weight that several modules hold (a shared module, or tied weights such as embedding and
    output layer) gets one update, which all of them use. What rewrites weights, as ``tie_weights`` and
    ``resize_token_embeddings`` of transformers do, comes before, or after `flora_torch.merge` or `flora_torch.detach`.

    Parameters
    ----------
    model : nn.Module
        The model.
    ranks : int, float, sequence of (int, float or None), or mapping of pattern to these
        One rank for all modes, a fraction of each mode's size, or one a mode (``None``: left whole); lowered to what is
        feasible, and reported. A mapping gives them by name, the first pattern that matches counting.
    target_modules, exclude_modules : pattern or sequence of patterns, optional
        Names, globs, regular expressions (``"re:…"``), types or predicates ``(name, module) -> bool``; by default every
        layer of a known kind, and with ``"all"`` every weight with two axes or more. See
        `flora_torch.selection.choose`.
    target_parameters : pattern or sequence of patterns, optional
        Parameters by their own names, such as ``"self_attn.in_proj_weight"``.
    scale : float, or mapping of pattern to float
        s; 1 for weights that no pattern means.
    alpha : float, optional
        α, from which s follows by ``scaling``; in the place of ``scale``.
    scaling : {"init", "rank", "rank_stabilized"}
        What s is made of α: what the published code of ``init`` makes of it (`flora_torch.initialize.preset_scale`),
        α over the largest rank, or the rank-stabilized α/√∏ r_n of `flora_torch.scaling`. The number is what is kept.
    dropout : float
        The chance that an entry of an update's input is zeroed in training. Weights whose product with an input is not
        known (`FloraParameter`, a layer with a forward of its own) have none, nor has the output projection of
        nn.MultiheadAttention, which is read instead of called.
    rank_dropout, module_dropout : float
        The chance that a direction of the factors, or the whole update, is dropped for a step of training; see
        `TuckerUpdate`.
    magnitude : bool
        Whether each output channel also gets a trained magnitude: W' = m · (W + ΔW) / ‖W + ΔW‖, started so that nothing
        changes. For linear, convolutional and embedding layers, where a channel is a row.
    init : str
        At random: ``"orthonormal"``, ``"official"``, ``"loralib"``, ``"peft"``. From the weight: ``"principal"``,
        ``"minor"``. From ``init_tensors``: ``"from_delta"``, ``"from_gradient"``, ``"from_moments"``, ``"context"``.
        See `flora_torch.initialize`.
    init_tensors : Moments, or mapping of str to Tensor or TuckerTensor, optional
        By the weight's name: changes or gradients in the weights' own shapes, or as Tucker tensors of the arranged
        ones (see `collect_gradients`); or the inputs' second moments (see `collect_moments`).
    adapter_name : str
        The adapter's name; a weight can have several adapters, which add up.
    arrangement : Arrangement, str, or mapping of pattern to these, optional
        Which axes form a mode. A single one is used for the weights with as many axes as it has, and the others keep
        their own axes.
    dtype : torch.dtype, optional
        The update's type; by default float32 for 16-bit weights, else the weight's.
    path : {"auto", "factored", "dense"}
        How layers compute their output; see `flora_torch.layers`.
    memory : {"normal", "low"}
        What layers keep for the backward pass beside input and parameters: the thin results of factored products, or
        nothing. Like ``path`` it is the layer's and not the adapter's: one that has an adapter already keeps its own.
    freeze_model : bool
        Whether all of the model's own parameters stop requiring gradients, or only those of the wrapped layers.
    generator : torch.Generator, optional
        The source of random numbers, on the CPU.

    Returns
    -------
    AttachReport
        What was done to each weight.

    Raises
    ------
    ValueError
        If a pattern matches nothing (near names are listed), a weight cannot be adapted (meta device, integers, a
        vector, tied to an excluded one), it has an adapter of this name already, or an option does not fit.

    References
    ----------
    FLoRA, arXiv 2405.14739; DoRA, arXiv 2402.09353, for the magnitude; rsLoRA, arXiv 2312.03732, for the scale.

    Examples
    --------
    >>> model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=4))
    >>> report = attach(model, ranks={"0": (4, 3, 3, 3), "*": 0.5}, scale=4.0)
    >>> [(layer.name, layer.ranks) for layer in report.layers]
    [('0.weight', (4, 3, 3, 3)), ('2.weight', (8, 2, 2, 2))]
    """
    as_parts("attach", model)
    targets, skipped = choose(model, target_modules, exclude_modules, target_parameters)
    options = UpdateOptions(
        ranks,
        scale=scale,
        alpha=alpha,
        scaling=scaling,
        init=init,
        tensors=init_tensors or {},
        arrangement=arrangement,
        dtype=dtype,
        generator=generator,
        chances={"dropout": dropout, "rank_dropout": rank_dropout, "module_dropout": module_dropout},
        magnitude=magnitude,
    )
    with all_or_nothing(model):
        plans = [options.plan(site) for site in targets]
        options.check_used(targets)
        report = install("attach", model, plans, adapter_name, path=path, memory=memory, freeze_model=freeze_model)
        return replace(report, skipped=tuple(skipped))


@dataclass(frozen=True)
class Plan:
    """An update that is ready to be installed, and the ranks that were asked for."""

    site: Site
    update: TuckerUpdate
    asked: tuple[int | None, ...]


class UpdateOptions:
    """The options of `attach`, looked up by weight.

    Examples
    --------
    >>> from flora_torch.model_weights import sites
    >>> UpdateOptions(4).plan(sites(nn.Sequential(nn.Linear(8, 3)))["0.weight"]).update.ranks
    (3, 3)
    """

    def __init__(
        self,
        ranks: Any,
        *,
        scale: Any = 1.0,
        alpha: float | None = None,
        scaling: Scaling = "init",
        init: str = "orthonormal",
        tensors: Mapping[str, Tensor | TuckerTensor] = MappingProxyType({}),
        arrangement: Any = None,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
        chances: Mapping[str, float] = MappingProxyType({}),
        magnitude: bool = False,
        where: str = "attach",
    ) -> None:
        self.where = where
        self.ranks: PerName[Any] = PerName("ranks", ranks, where=where)
        self.scale: PerName[float] = PerName("scale", scale, 1.0, where=where)
        self.arrangement: PerName[Any] = PerName("arrangement", arrangement, None, where=where)
        self.alpha, self.scaling, self.init, self.tensors = alpha, scaling, init, tensors
        self.dtype, self.generator = dtype, generator
        self.chances, self.magnitude = dict(chances), magnitude
        if alpha is not None and (isinstance(scale, Mapping) or scale != 1.0):
            raise TypeError(f"{where}: got both scale and alpha; pass one of them")

    def plan(self, site: Site) -> Plan:
        """Build the update of one weight."""
        holder = site.holders[0]
        weight = adaptable(
            f"{self.where}: {site.name}",
            holder.module,
            holder.parameter,
            values=self.magnitude or needs_values(self.init),
        )
        arranged, shape = arranged_as(self.arrangement, site, tuple(weight.shape))
        asked, given = resolve_ranks(self.ranks.of(site), shape, where=f"{self.where}: {site.name}")
        try:
            scale = self._scale_of(site, asked, given, shape)
            start = start_update(
                weight.detach(),
                given,
                init=self.init,
                arrangement=arranged,
                scale=scale,
                dtype=self.dtype,
                generator=self.generator,
                **self._known_of(site),
            )
        except ValueError as error:
            raise ValueError(f"{self.where}: {site.name}: {error}") from error
        # A weight has no input that could be dropped if its product is not known, or its parent reads it.
        no_input = not all(drops_input(h.module, h.parameter) for h in site.holders)
        chances: dict[str, Any] = self.chances | ({"dropout": 0.0} if no_input else {})
        update = TuckerUpdate(
            start.tucker, tuple(weight.shape), arrangement=arranged, scale=scale, start=start.start, **chances
        )
        if self.magnitude:
            kind = wrapper_for(holder.module, holder.parameter)
            # An update may be made on the meta device, to be loaded.
            base = weight.detach().to(update.core.device)
            update.start_magnitude(base, kind.output_channels(f"{self.where}: {site.name}", holder.module))
        return Plan(site, update, asked)

    def _scale_of(self, site: Site, asked: Sequence[Any], given: Sequence[Any], shape: Sequence[int]) -> float:
        if self.alpha is None:
            if self.scaling != "init":
                raise ValueError(f"scaling is {self.scaling!r}, but there is no alpha to scale; pass alpha")
            return self.scale.of(site)
        if self.scaling == "init":
            return preset_scale(self.init, self.alpha, max((r for r in asked if r is not None), default=max(shape)))
        # A mode of full rank has no factor, or one that spans everything: its size is no choice of ranks.
        ranks = [r for r, n in zip(given, shape) if r is not None and r < n]
        return resolve_scale(self.scaling, self.alpha, ranks, init=self.init)

    def _known_of(self, site: Site) -> dict[str, Any]:
        """Return what the start decomposes, and for a moment of the input the axes that it is over."""
        if self.init not in DECOMPOSING:
            return {}
        tensors = self.tensors
        if isinstance(tensors, Moments):
            name = next((key for key in map(tensors.name_of, site.names) if key is not None), None)
            return {} if name is None else {"tensor": torch.as_tensor(tensors[name]), "axes": tensors.axes[name]}
        return {"tensor": next((tensors[name] for name in site.names if name in tensors), None)}

    def check_used(self, targets: list[Site]) -> None:
        """Refuse options that meant nothing."""
        names = dict.fromkeys(name for site in targets for name in site.names)
        for option in (self.ranks, self.scale, self.arrangement):
            option.check_used(targets)
        single = self.arrangement.value if self.arrangement.table is None else None
        arranged = Arrangement(single) if isinstance(single, str) else single
        if arranged is not None and all(site.weight.dim() != arranged.n_axes for site in targets):
            raise ValueError(
                f"{self.where}: arrangement {arranged.pattern!r} is for weights with {arranged.n_axes} axes, and no "
                "target has as many; pass another one, or none"
            )
        if self.tensors and self.init not in DECOMPOSING:
            known = ", ".join(DECOMPOSING)
            raise ValueError(f"{self.where}: init_tensors with init {self.init!r}; pass init={known}")
        # Moments are of a whole model, whichever part of it is adapted.
        for name in () if isinstance(self.tensors, Moments) else self.tensors:
            if name not in names:
                raise ValueError(f"{self.where}: init_tensors has {name!r}, which is no target{near(name, names)}")


def install(
    where: str,
    model: nn.Module,
    plans: list[Plan],
    adapter_name: str,
    *,
    path: Path,
    memory: Memory,
    freeze_model: bool,
    whole: Sequence[str] = (),
) -> AttachReport:
    """Wrap what is not wrapped yet, check every update against its layer, and only then put all of them in."""
    n_model = n_model_parameters(model)
    wrappers: dict[int, FloraLayer] = {}
    steps: list[tuple[FloraLayer, TuckerUpdate, str]] = []
    doors: list[tuple[Place, FloraLayer]] = []
    adapted: dict[int, list[str]] = {}
    for holder in (holder for plan in plans for holder in plan.site.holders):
        adapted.setdefault(id(holder.module), []).append(holder.parameter)
    for plan in plans:
        for holder in plan.site.holders:
            identity, at = id(holder.module), f"{where}: {plan.site.name}"
            wrapper = wrappers.get(identity) or holder.wrapper
            refuse_sharded(at, plan.site.weight)
            if wrapper is None:
                _refuse_compiled(where, plan.site.name, holder.places)
                wrapper = _wrap(at, holder.module, adapted[identity], path, memory)
                doors.extend((place, wrapper) for place in holder.places)
            wrappers[identity] = wrapper
            try:
                wrapper.check_update(adapter_name, plan.update, parameter=holder.parameter)
            except ValueError as error:
                raise ValueError(f"{at}: {error}") from error
            steps.append((wrapper, plan.update, holder.parameter))
    for wrapper, update, parameter in steps:
        wrapper.install(adapter_name, update, parameter=parameter)
    for place, wrapper in doors:
        assert place.parent is not None
        place.parent.add_module(place.key, wrapper)
    if freeze_model:
        freeze(model)
    counted: set[int] = set()
    reports = tuple(report_of(plan, wrappers[id(plan.site.holders[0].module)], counted) for plan in plans)
    return AttachReport(adapter_name, reports, n_model, tuple(whole))


def _refuse_compiled(where: str, name: str, places: Sequence[Place]) -> None:
    """Refuse a module that was compiled by itself: what was compiled would go on calling it, and no layer around it."""
    if any(type(place.parent).__name__ == "OptimizedModule" for place in places):
        raise ValueError(
            f"{where}: the module of {name!r} was compiled by itself, and would go on without the adapter; attach "
            "first, or compile it in place (module.compile()), or the whole model"
        )


def _wrap(where: str, module: nn.Module, parameters: list[str], path: Path, memory: Memory) -> FloraLayer:
    """Make the layer for a module; one that knows the product only if its ``weight`` is all that is adapted."""
    by_parameter = [kind for p in parameters if issubclass(kind := wrapper_for(module, p), FloraParameter)]
    kind = max(by_parameter, key=lambda found: len(found.__mro__), default=wrapper_for(module, parameters[0]))
    kind = FloraParameter if len(set(parameters)) > 1 and not by_parameter else kind
    try:
        return kind(module) if issubclass(kind, FloraParameter) else kind(module, path=path, memory=memory)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def report_of(plan: Plan, wrapper: FloraLayer, counted: set[int]) -> LayerReport:
    """Return what a plan did to its weight; parameters that were counted before are not counted again."""
    update, site = plan.update, plan.site
    own = [parameter for parameter in update.parameters() if id(parameter) not in counted]
    counted.update(map(id, own))
    return LayerReport(
        site.name,
        type(wrapper).__name__,
        update.shape,
        update.arrangement.pattern,
        plan.asked,
        update.ranks,
        sum(parameter.numel() for parameter in own),
        tuple(name for name in site.names if name != site.name),
    )


def n_model_parameters(model: nn.Module) -> int:
    """Count the parameters of a model without its adapters, tied ones once."""
    return sum(site.weight.numel() for site in {id(s): s for s in sites(model).values()}.values() if site.is_parameter)
