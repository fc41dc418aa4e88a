"""The base of all layers with a Tucker update: the frozen module, its adapters, the effective weight and merging."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from flora_tensor import Arrangement
from flora_torch.base_weight import adaptable, check_adaptable, plain_with
from flora_torch.functional import Path
from flora_torch.initialize import Ranks, needs_values, resolve_ranks, start_update
from flora_torch.update import TuckerUpdate

__all__ = ["FROZEN", "FloraLayer", "freeze", "thaw"]

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

    Raises
    ------
    TypeError
        If the base is wrapped already.
    ValueError
        If there is no such path.

    Notes
    -----
    Any other attribute (``in_features``, ``kernel_size``, ``bias``, …) is the base layer's.

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

    def __init__(self, base_layer: nn.Module, *, path: Path = "auto") -> None:
        super().__init__()
        if isinstance(base_layer, FloraLayer):
            raise TypeError(
                f"{type(self).__name__}: the base is a {type(base_layer).__name__} already; use its add_adapter"
            )
        if path not in _PATHS:
            raise ValueError(f"{type(self).__name__}: path is {path!r}; pass one of {', '.join(_PATHS)}")
        self.base_layer = base_layer
        self.tucker_update = nn.ModuleDict()
        self.active_adapters: list[str] = []
        self.enabled = True
        self.path: Path = path
        # A model in evaluation stays in evaluation: a new module would be in training, and would drop its input.
        self.training = base_layer.training
        freeze(base_layer)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # While unpickling there are no modules yet. And a property that failed must not look like the base's
            # attribute.
            if "_modules" not in self.__dict__ or name == "base_layer" or hasattr(type(self), name):
                raise
            return getattr(self.base_layer, name)

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
        scale, dropout
            See `TuckerUpdate`.
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
        weight = adaptable(type(self).__name__, self.base_layer, parameter, values=needs_values(init))
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
            start=start.start,
        )
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
        if not adapter_name or "." in adapter_name or "lora_" in adapter_name or hasattr(nn.ModuleDict(), adapter_name):
            raise ValueError(f"{where}: an adapter cannot be named {adapter_name!r}; choose another name")
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
        del self.tucker_update[adapter_name]
        self.active_adapters = [name for name in self.active_adapters if name != adapter_name]

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
        if not self.enabled:
            return []
        found = [self.updates(adapter).get(parameter) for adapter in self.active_adapters]
        return [update for update in found if update is not None]

    def effective(self, parameter: str = "weight", updates: Iterable[TuckerUpdate] | None = None) -> Tensor:
        """Return W + Σ s·ΔW in W's type, added up in the wider one; gradients flow to the updates.

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

        Examples
        --------
        >>> from flora_torch import FloraLinear
        >>> layer = FloraLinear(nn.Linear(4, 3), ranks=2)
        >>> bool((layer.effective() == layer.base_layer.weight).all())
        True
        """
        weight = self._base_value(parameter)
        total: Tensor = weight
        for update in self.running(parameter) if updates is None else updates:
            total = total + update.delta()
        return total if total is weight else total.to(weight.dtype)

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
        if "forward" in vars(self.base_layer):
            raise ValueError(
                f"merge: the forward of this {type(self.base_layer).__name__} was set on the object itself and would "
                "go on with the weights of the base; delete that attribute first"
            )
        values = {name: self._merged_value(name) for name in self.parameter_names}
        return plain_with(self.base_layer, values)

    def _merged_value(self, parameter: str) -> Tensor:
        weight = adaptable("merge", self.base_layer, parameter).detach()
        total = weight.to(torch.float64)
        for adapter in self.active_adapters:
            update = self.updates(adapter).get(parameter)
            total = total if update is None else total + update.delta(torch.float64).detach()
        result = total.to(weight.dtype)
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

    def extra_repr(self) -> str:
        """Return what the module's repr shows."""
        shown = [] if self.path == "auto" else [f"path={self.path!r}"]
        shown += [] if self.enabled else ["enabled=False"]
        if self.active_adapters != list(self.tucker_update):
            shown.append(f"active_adapters={self.active_adapters}")
        return ", ".join(shown)


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
