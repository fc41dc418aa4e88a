"""The base of all layers with a Tucker update: the frozen module, its adapters, the effective weight and merging."""

import contextlib
import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flora_tensor import Arrangement
from flora_torch._sharding import refuse_sharded
from flora_torch.base_weight import adaptable, check_adaptable, own_parameter, plain_with
from flora_torch.chain import MEMORIES, Memory
from flora_torch.functional import Path
from flora_torch.initialize import Ranks, needs_values, resolve_ranks, start_update
from flora_torch.rebuild import rebuilding
from flora_torch.rows import RowPlan
from flora_torch.update import TuckerUpdate, widest_float

__all__ = ["FROZEN", "FloraLayer", "check_adapter_name", "freeze", "thaw"]

# Under this name a module notes which of its own parameters were frozen.
FROZEN = "_flora_frozen"
_PATHS = ("auto", "factored", "dense")


class FloraLayer(nn.Module):
    """What all layers share: a frozen ``base_layer``, the updates of its parameters, and how they are switched.

    Not made directly; use `FloraLinear`, `FloraConv`, `FloraConvTranspose`, `FloraEmbedding` or `FloraParameter`.

    Parameters
    ----------
    base_layer : nn.Module
        The layer to adapt. It is used as it is, not copied; its parameters no longer require gradients.
    path : {"auto", "factored", "dense"}
        How the output is computed.
    memory : {"normal", "low"}
        What is kept for the backward pass: beside the input and the parameters, the thin results of a factored product,
        or nothing. Both are attributes too, and may be changed.

    Attributes
    ----------
    base_layer : nn.Module
        The frozen layer.
    tucker_update : nn.ModuleDict
        From the adapter's name to its `TuckerUpdate`.
    active_adapters : list of str
        The adapters that take part, in the order in which they are added up; all of them unless changed.
    enabled : bool
        With ``False`` the layer is its base. Neither a parameter nor saved.
    merged_adapters : tuple of str
        Those of the active adapters that `flora_torch.merge_` has added to the weight itself. The state dict is that of
        the layer with nothing merged.

    Raises
    ------
    TypeError
        If the base is wrapped already.
    ValueError
        If there is no such path or memory.

    Notes
    -----
    Any other attribute (``in_features``, ``kernel_size``, ``bias``, …) is the base layer's.

    Updates are read and never called. Where weights are brought in for a module's call, as by accelerate's
    ``cpu_offload``, the layer has to be told to bring its updates along: ``preload_module_classes=["FloraLinear"]``.

    References
    ----------
    FLoRA, arXiv 2405.14739, equation 5.

    Examples
    --------
    >>> from flora_torch import FloraLinear
    >>> layer = FloraLinear(nn.Linear(4, 3), ranks=2)
    >>> isinstance(layer, FloraLayer), layer.in_features, list(layer.tucker_update)
    (True, 4, ['default'])
    """

    base_layer: nn.Module
    tucker_update: nn.ModuleDict

    def __init__(self, base_layer: nn.Module, *, path: Path = "auto", memory: Memory = "normal") -> None:
        super().__init__()
        if isinstance(base_layer, FloraLayer):
            raise TypeError(
                f"{type(self).__name__}: the base is a {type(base_layer).__name__} already; use its add_adapter"
            )
        if path not in _PATHS:
            raise ValueError(f"{type(self).__name__}: path is {path!r}; pass one of {', '.join(_PATHS)}")
        if memory not in MEMORIES:
            raise ValueError(f"{type(self).__name__}: memory is {memory!r}; pass one of {', '.join(MEMORIES)}")
        self.base_layer = base_layer
        self.tucker_update = nn.ModuleDict()
        self._active_adapters: list[str] = []
        self._enabled = True
        self.merged_adapters: tuple[str, ...] = ()
        # What merged weights were before, by the parameter's name.
        self.originals: dict[str, Tensor] = {}
        self.row_plan: RowPlan | None = None
        self.path: Path = path
        self.memory: Memory = memory
        # A model in evaluation stays in evaluation: a new module would be in training, and would drop its input.
        self.training = base_layer.training
        freeze(base_layer)

    def __getattr__(self, name: str) -> Any:
        # Asked several times at every call; while unpickling there are no modules yet.
        modules = self.__dict__.get("_modules")
        if modules is not None and name in modules:
            return modules[name]
        try:
            return super().__getattr__(name)
        except AttributeError:
            # A property that failed must not look like the base's attribute. Nor are special methods for the base alone
            # to answer: a parametrized one has a `__deepcopy__`.
            if modules is None or name == "base_layer" or name.startswith("__") or hasattr(type(self), name):
                raise
            return getattr(self.base_layer, name)

    @property
    def active_adapters(self) -> list[str]:
        """The adapters that take part, in the order in which they are added up."""
        return self._active_adapters

    @active_adapters.setter
    def active_adapters(self, names: Iterable[str]) -> None:
        names = list(names)
        self.check_active(names)
        self._active_adapters = names

    def check_active(self, names: list[str]) -> None:
        """Refuse a choice of adapters that what is merged in place does not allow.

        Parameters
        ----------
        names : list of str
            The adapters that would be active.

        Raises
        ------
        ValueError
            If one that is merged is not among them, or one that is not merged has a magnitude.
        """
        for merged in self.merged_adapters:
            if merged not in names:
                raise ValueError(
                    f"{type(self).__name__}: adapter {merged!r} is merged into the weight; call unmerge_ first"
                )
        added = [name for name in names if self.merged_adapters and name not in self.merged_adapters]
        if any(update.magnitude is not None for name in added for update in self.updates(name).values()):
            raise ValueError(
                f"{type(self).__name__}: a magnitude rescales the layer's own weight, and adapter "
                f"{self.merged_adapters[0]!r} is merged into it; call unmerge_ first"
            )

    @property
    def enabled(self) -> bool:
        """Whether the adapters take part at all."""
        return self._enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        if self.merged_adapters and not value:
            raise ValueError(
                f"{type(self).__name__}: adapter {self.merged_adapters[0]!r} is merged into the weight and cannot be "
                "switched off; call unmerge_ first"
            )
        self._enabled = value

    def updates(self, adapter_name: str) -> dict[str, TuckerUpdate]:
        """Return an adapter's updates by the name of the parameter they change; empty where it has none.

        Parameters
        ----------
        adapter_name : str
            The adapter.

        Returns
        -------
        dict of str to TuckerUpdate
            One entry for each parameter.

        Raises
        ------
        NotImplementedError
            If called on `FloraLayer` itself.

        Examples
        --------
        >>> from flora_torch import FloraLinear
        >>> list(FloraLinear(nn.Linear(4, 3), ranks=2).updates("default"))
        ['weight']
        """
        raise NotImplementedError

    @property
    def parameter_names(self) -> tuple[str, ...]:
        """The parameters of the base layer that have updates."""
        names = (name for adapter in self.tucker_update for name in self.updates(adapter))
        return tuple(dict.fromkeys(names))

    def add_adapter(
        self,
        adapter_name: str,
        ranks: Ranks,
        *,
        parameter: str = "weight",
        scale: float = 1.0,
        dropout: float = 0.0,
        rank_dropout: float = 0.0,
        module_dropout: float = 0.0,
        magnitude: bool = False,
        init: str = "orthonormal",
        arrangement: Arrangement | str | None = None,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
        tensor: Tensor | None = None,
    ) -> TuckerUpdate:
        """Make an update of one parameter and install it.

        Parameters
        ----------
        adapter_name : str
            A name that this layer does not have yet.
        ranks : int, float, or sequence of (int, float or None)
            See `flora_torch.initialize.resolve_ranks`; lowered to what is feasible.
        parameter : str
            The parameter of the base layer.
        scale, dropout, rank_dropout, module_dropout
            See `TuckerUpdate`.
        magnitude : bool
            Whether each output channel also gets a trained magnitude; see `TuckerUpdate`.
        init, dtype, generator
            See `flora_torch.initialize.start_update`.
        arrangement : Arrangement or str, optional
            Which axes form a mode.
        tensor : Tensor, of the parameter's shape, optional
            What ``init`` decomposes, if it is ``"from_delta"`` or ``"from_gradient"``.

        Returns
        -------
        TuckerUpdate
            The update, active.

        Raises
        ------
        ValueError
            If the name is taken, the parameter cannot be adapted, or an option does not fit it.

        Examples
        --------
        >>> from flora_torch import FloraLinear
        >>> layer = FloraLinear(nn.Linear(4, 3))
        >>> layer.add_adapter("style", 2).ranks
        (2, 2)
        """
        weight = adaptable(type(self).__name__, self.base_layer, parameter, values=magnitude or needs_values(init))
        arranged = Arrangement(arrangement) if isinstance(arrangement, str) else arrangement
        arranged = arranged or Arrangement.native(weight.dim())
        shape = arranged.shape(tuple(weight.shape))
        _, given = resolve_ranks(ranks, shape, where=type(self).__name__)
        options: dict[str, Any] = {"init": init, "dtype": dtype, "generator": generator, "tensor": tensor}
        start = start_update(weight.detach(), given, arrangement=arranged, scale=scale, **options)
        update = TuckerUpdate(
            start.tucker,
            tuple(weight.shape),
            arrangement=arranged,
            scale=scale,
            dropout=dropout,
            rank_dropout=rank_dropout,
            module_dropout=module_dropout,
            start=start.start,
        )
        if magnitude:
            update.start_magnitude(weight.detach(), self.output_channels(type(self).__name__, self.base_layer))
        self.install(adapter_name, update, parameter=parameter)
        return update

    def check_update(self, adapter_name: str, update: TuckerUpdate, *, parameter: str = "weight") -> None:
        """Refuse an update that this layer cannot have, before anything is changed.

        Parameters
        ----------
        adapter_name : str
            The name that it would get.
        update : TuckerUpdate
            The update.
        parameter : str
            The parameter that it would change.

        Raises
        ------
        ValueError
            If the adapter's name is taken or impossible, the parameter cannot be adapted, or shapes differ.

        Examples
        --------
        >>> from flora_torch import FloraLinear
        >>> layer = FloraLinear(nn.Linear(4, 3))
        >>> layer.check_update("default", FloraLinear(nn.Linear(4, 3), ranks=1).tucker_update["default"])
        """
        where, weight = type(self).__name__, check_adaptable(type(self).__name__, self.base_layer, parameter)
        check_adapter_name(where, adapter_name)
        if parameter in self.updates(adapter_name):
            raise ValueError(
                f"{where}: there is an adapter {adapter_name!r} for {parameter!r} already; "
                "choose another adapter_name, or remove that one first"
            )
        if update.shape != tuple(weight.shape):
            raise ValueError(
                f"{where}: an update of shape {update.shape} for {parameter!r} of shape {tuple(weight.shape)}; "
                "pass one of the same shape"
            )
        if self.merged_adapters and (update.magnitude is not None or adapter_name in self.merged_adapters):
            raise ValueError(
                f"{where}: adapter {self.merged_adapters[0]!r} is merged into the weight that the update belongs to; "
                "call unmerge_ first"
            )
        if update.magnitude is not None and update.channels != self.output_channels(where, self.base_layer):
            raise ValueError(
                f"{where}: a magnitude for the output channels {update.channels} (axis, groups), but those of "
                f"{type(self.base_layer).__name__} are {self.output_channels(where, self.base_layer)}"
            )
        if self.path == "factored" and not self._has_factored(update):
            raise ValueError(
                f"{where}: path is 'factored', but {type(self.base_layer).__name__} with arrangement "
                f"{update.arrangement.pattern!r} has no factored form; pass path='auto'"
            )

    def install(self, adapter_name: str, update: TuckerUpdate, *, parameter: str = "weight") -> None:
        """Put an update on the layer and activate it; it may be shared with another layer whose weight is tied.

        Parameters
        ----------
        adapter_name : str
            A name that this layer does not have yet.
        update : TuckerUpdate
            An update of the parameter's shape.
        parameter : str
            The parameter of the base layer.

        Raises
        ------
        ValueError
            As for `check_update`.

        Examples
        --------
        >>> from flora_torch import FloraLinear
        >>> layer, other = FloraLinear(nn.Linear(4, 3)), FloraLinear(nn.Linear(4, 3), ranks=1)
        >>> layer.install("shared", other.tucker_update["default"])
        """
        self.check_update(adapter_name, update, parameter=parameter)
        self._put(adapter_name, update, parameter)
        if adapter_name not in self.active_adapters:
            self.active_adapters.append(adapter_name)

    def remove_adapter(self, adapter_name: str) -> None:
        """Take an adapter off; without one left, the layer is its base.

        Parameters
        ----------
        adapter_name : str
            The adapter.

        Raises
        ------
        ValueError
            If there is none of this name.

        Examples
        --------
        >>> from flora_torch import FloraLinear
        >>> layer = FloraLinear(nn.Linear(4, 3), ranks=2)
        >>> layer.remove_adapter("default")
        >>> len(layer.tucker_update)
        0
        """
        if adapter_name not in self.tucker_update:
            known = ", ".join(self.tucker_update) or "none"
            raise ValueError(f"{type(self).__name__}: there is no adapter {adapter_name!r}; it has {known}")
        # The setter refuses where it is merged.
        self.active_adapters = [name for name in self.active_adapters if name != adapter_name]
        del self.tucker_update[adapter_name]

    def rename_adapter(self, old: str, new: str) -> None:
        """Give an adapter another name; its place in the order, its parameters and its switches stay.

        Parameters
        ----------
        old, new : str
            The names.

        Raises
        ------
        ValueError
            If there is no adapter of the old name, or the new one is taken or impossible.

        Examples
        --------
        >>> from flora_torch import FloraLinear
        >>> layer = FloraLinear(nn.Linear(4, 3), ranks=2)
        >>> layer.rename_adapter("default", "style")
        >>> list(layer.tucker_update), layer.active_adapters
        (['style'], ['style'])
        """
        where = type(self).__name__
        if old not in self.tucker_update:
            known = ", ".join(self.tucker_update) or "none"
            raise ValueError(f"{where}: there is no adapter {old!r}; it has {known}")
        if new != old:
            check_adapter_name(where, new)
            if new in self.tucker_update:
                raise ValueError(
                    f"{where}: there is an adapter {new!r} already; remove it first, or choose another name"
                )
        modules = [(new if name == old else name, module) for name, module in self.tucker_update.items()]
        # Kept as one object: an optimizer, a compiled graph or a hook may hold it.
        self.tucker_update.clear()
        for name, module in modules:
            self.tucker_update[name] = module
        self._active_adapters = [new if name == old else name for name in self._active_adapters]
        self.merged_adapters = tuple(new if name == old else name for name in self.merged_adapters)

    @classmethod
    def output_channels(cls, where: str, module: nn.Module) -> tuple[int, int]:
        """Return where the output channels of a base's weight are: its axis, and the groups that share it.

        Parameters
        ----------
        where : str
            Whose error it would be.
        module : nn.Module
            The base.

        Returns
        -------
        tuple of two int
            The axis, and the groups.

        Raises
        ------
        ValueError
            If this kind of layer knows nothing of output channels.

        Examples
        --------
        >>> from flora_torch import FloraLinear
        >>> FloraLinear.output_channels("here", nn.Linear(4, 3))
        (0, 1)
        """
        raise ValueError(
            f"{where}: a magnitude needs a weight with output channels, and {cls.__name__} knows none of "
            f"{type(module).__name__}; pass magnitude=False"
        )

    def running(self, parameter: str = "weight") -> list[TuckerUpdate]:
        """Return the updates of a parameter that take part in the output now.

        Parameters
        ----------
        parameter : str
            The parameter.

        Returns
        -------
        list of TuckerUpdate
            In the order in which they are added.

        Examples
        --------
        >>> from flora_torch import FloraLinear
        >>> layer = FloraLinear(nn.Linear(4, 3), ranks=2)
        >>> layer.enabled = False
        >>> layer.running()
        []
        """
        if not self._enabled:
            return []
        if self.merged_adapters:
            self._check_not_training()
        active = [adapter for adapter in self._active_adapters if adapter not in self.merged_adapters]
        found = [self.updates(adapter).get(parameter) for adapter in active]
        return [update for update in found if update is not None]

    def _check_not_training(self) -> None:
        """Refuse a step of training that would pass a merged adapter by."""
        if not (self.training and torch.is_grad_enabled()):
            return
        for adapter in self.merged_adapters:
            if any(p.requires_grad for update in self.updates(adapter).values() for p in update.parameters()):
                raise RuntimeError(
                    f"{type(self).__name__}: adapter {adapter!r} is merged into the weight and would not be trained; "
                    "call unmerge_ first, or put the model in evaluation"
                )

    def effective(self, parameter: str = "weight", updates: Iterable[TuckerUpdate] | None = None) -> Tensor:
        """Return W + Σ s·ΔW in W's type, added up in the wider one; gradients flow to the updates.

        In training, rank and module dropouts are drawn, as they are in a call; an input that could be dropped there is
        not.

        Parameters
        ----------
        parameter : str
            The parameter W of the base layer.
        updates : iterable of TuckerUpdate, optional
            The updates to add; by default those that are `running`.

        Returns
        -------
        Tensor, of the parameter's shape
            The effective parameter; W itself where nothing is added.

        Raises
        ------
        ValueError
            If the parameter is spread over processes, as between the calls of a sharded model.

        Examples
        --------
        >>> from flora_torch import FloraLinear
        >>> layer = FloraLinear(nn.Linear(4, 3), ranks=2)
        >>> bool((layer.effective() == layer.base_layer.weight).all())
        True
        """
        weight = self._base_value(parameter)
        refuse_sharded(f"{type(self).__name__}: {parameter!r}", weight)
        total: Tensor = weight
        for update in self.running(parameter) if updates is None else updates:
            total = total + update.change(weight, drop=self.training)
        return total if total is weight else total.to(weight.dtype)

    def rebuilt(
        self, parameter: str, updates: Sequence[TuckerUpdate]
    ) -> contextlib.AbstractContextManager[Tensor, bool | None]:
        """Make the effective parameter for what runs inside the block, which does not store it for the backward pass.

        Parameters
        ----------
        parameter : str
            The parameter W of the base layer.
        updates : sequence of TuckerUpdate
            The updates to add.

        Returns
        -------
        context manager of a Tensor of the parameter's shape
            W + Σ s·ΔW; see `flora_torch.rebuild.rebuilding`.

        Examples
        --------
        >>> from flora_torch import FloraLinear
        >>> layer = FloraLinear(nn.Linear(4, 3), ranks=2)
        >>> with layer.rebuilt("weight", layer.running()) as weight:
        ...     weight.shape
        torch.Size([3, 4])
        """
        weight = own_parameter(self.base_layer, parameter)
        drawn = self.training and any(update.rank_dropout or update.module_dropout for update in updates)
        if weight is None or drawn:
            # A computed weight need not be the same a second time, and what is drawn is not.
            return contextlib.nullcontext(self.effective(parameter, updates))
        sources = [weight, *(p for update in updates for p in update.parameters())]
        return rebuilding(lambda: self._as_used(self.effective(parameter, updates)), sources)

    def _as_used(self, weight: Tensor) -> Tensor:
        """Cast an effective weight to the type that the base computes in, if that is known."""
        return weight

    def _base_value(self, parameter: str) -> Tensor:
        return getattr(self.base_layer, parameter)

    def merged(self) -> nn.Module:
        """Return a plain layer of the base's own class, with the active updates added to its parameters.

        The sum is taken in float64 and rounded once to the base's type. The other parameters and buffers are shared
        with the base layer, which keeps its bits.

        Returns
        -------
        nn.Module
            The layer; its output is this layer's to rounding.

        Raises
        ------
        ValueError
            If an entry of the sum is not finite, or the base's ``forward`` was set on the object itself: it would go on
            with the weights of the base.

        Examples
        --------
        >>> from flora_torch import FloraLinear
        >>> type(FloraLinear(nn.Linear(4, 3), ranks=2).merged()).__name__
        'Linear'
        """
        for name, tensor in self.base_layer.named_parameters():
            refuse_sharded(f"merge: {name!r} of {type(self.base_layer).__name__}", tensor)
        if "forward" in vars(self.base_layer):
            raise ValueError(
                f"merge: the forward of this {type(self.base_layer).__name__} was set on the object itself and would "
                "go on with the weights of the base; delete that attribute first"
            )
        values = {name: self.merged_value(name, self.active_adapters) for name in self.parameter_names}
        return plain_with(self.base_layer, values)

    def original(self, parameter: str) -> Tensor:
        """Return a parameter of the base as it is with nothing merged, without its gradient.

        Parameters
        ----------
        parameter : str
            The parameter.

        Returns
        -------
        Tensor, of the parameter's shape
            W.

        Raises
        ------
        ValueError
            If its values are packed in a way that nothing is known of.

        Examples
        --------
        >>> from flora_torch import FloraLinear
        >>> FloraLinear(nn.Linear(4, 3)).original("weight").shape
        torch.Size([3, 4])
        """
        weight = adaptable("merge", self.base_layer, parameter).detach()
        return self.originals[parameter].to(weight.device) if parameter in self.originals else weight

    @torch.no_grad()
    def merged_value(self, parameter: str, adapters: Iterable[str]) -> Tensor:
        """Return W + Σ s·ΔW over some adapters, summed in float64 and rounded once to W's type.

        Parameters
        ----------
        parameter : str
            The parameter W of the base layer.
        adapters : iterable of str
            The adapters; those without an update of it count nothing.

        Returns
        -------
        Tensor, of the parameter's shape
            The sum.

        Raises
        ------
        ValueError
            If an entry of it is not finite.

        Examples
        --------
        >>> from flora_torch import FloraLinear
        >>> layer = FloraLinear(nn.Linear(4, 3), ranks=2)
        >>> bool((layer.merged_value("weight", ["default"]) == layer.base_layer.weight).all())
        True
        """
        weight = self.original(parameter)
        refuse_sharded(f"merge: {parameter!r} of {type(self.base_layer).__name__}", weight)
        found = [self.updates(adapter).get(parameter) for adapter in adapters]
        updates = [update for update in found if update is not None]
        base = weight
        if widest_float(weight.device) != torch.float64:
            # The device cannot sum in float64, but the host can.
            base, updates = weight.cpu(), [copy.deepcopy(update).cpu() for update in updates]
        total = base.to(torch.float64)
        for update in updates:
            total = total + update.change(base, torch.float64)
        result = total.to(weight.dtype).to(weight.device)
        bad = int((~torch.isfinite(result)).sum())
        if bad:
            raise ValueError(
                f"merge: {bad} of {result.numel()} entries of {parameter!r} would be NaN or infinite in "
                f"{weight.dtype}; lower the scale, or merge into a wider type"
            )
        return result

    def _put(self, adapter_name: str, update: TuckerUpdate, parameter: str) -> None:
        raise NotImplementedError

    def _has_factored(self, update: TuckerUpdate) -> bool:
        del update
        return False

    def takes_rows(self) -> bool:
        """Return whether each row of a batch can have adapters of its own."""
        return False

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # What a merged weight was before moves and changes its type together with the weight.
        super()._apply(fn, recurse)
        self.originals = {name: fn(value) for name, value in self.originals.items()}
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the state with nothing merged, whatever is: the adapters would count twice where it is loaded.

        Parameters
        ----------
        *args, **kwargs
            As for `torch.nn.Module.state_dict`.

        Returns
        -------
        dict of str to Tensor
            The state.
        """
        result = super().state_dict(*args, **kwargs)
        prefix = kwargs.get("prefix", args[1] if len(args) > 1 else "")
        for name in self.originals:
            result[f"{prefix}base_layer.{name}"] = self.original(name)
        return result

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        if self.merged_adapters:
            raise ValueError(
                f"{type(self).__name__}: a state dict cannot be loaded while adapter {self.merged_adapters[0]!r} is "
                "merged into the weight; call unmerge_ first, then load it again"
            )
        super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        """Return what the module's repr shows."""
        shown = [] if self.path == "auto" else [f"path={self.path!r}"]
        shown += [] if self.memory == "normal" else [f"memory={self.memory!r}"]
        shown += [] if self.enabled else ["enabled=False"]
        if self.active_adapters != list(self.tucker_update):
            shown.append(f"active_adapters={self.active_adapters}")
        shown += [f"merged_adapters={list(self.merged_adapters)}"] if self.merged_adapters else []
        return ", ".join(shown)


def check_adapter_name(where: str, name: str) -> None:
    """Refuse a name that an adapter cannot have.

    Examples
    --------
    >>> check_adapter_name("here", "style")
    """
    if not name or "." in name or "lora_" in name or hasattr(nn.ModuleDict(), name):
        raise ValueError(f"{where}: an adapter cannot be named {name!r}; choose another name")


def freeze(module: nn.Module) -> None:
    """Stop the gradients of every parameter of a module that is not part of an update, and note which ones had them.

    The note lives on the module that owns the parameter, so that it survives copying, pickling and moving.

    Examples
    --------
    >>> linear = nn.Linear(2, 2)
    >>> freeze(linear)
    >>> linear.weight.requires_grad
    False
    """
    for owner in _outside_updates(module):
        live = [name for name, p in owner.named_parameters(recurse=False) if p.requires_grad]
        if live:
            owner.__dict__[FROZEN] = (*owner.__dict__.get(FROZEN, ()), *live)
            for name in live:
                owner.get_parameter(name).requires_grad = False


def thaw(module: nn.Module) -> None:
    """Undo `freeze`.

    Examples
    --------
    >>> linear = nn.Linear(2, 2)
    >>> freeze(linear)
    >>> thaw(linear)
    >>> linear.weight.requires_grad
    True
    """
    for owner in _outside_updates(module):
        own = dict(owner.named_parameters(recurse=False))
        for name in owner.__dict__.pop(FROZEN, ()):
            if name in own:
                own[name].requires_grad = True


def _outside_updates(module: nn.Module) -> list[nn.Module]:
    """List a module and all below it, without those of trainable updates."""
    found: dict[int, nn.Module] = {}
    waiting = [module]
    while waiting:
        owner = waiting.pop()
        if id(owner) not in found and not isinstance(owner, TuckerUpdate):
            found[id(owner)] = owner
            waiting.extend(owner.children())
    return list(found.values())
