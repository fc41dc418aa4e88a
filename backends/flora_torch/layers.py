"""Layers with a frozen base and trainable Tucker updates: the output is the base's with W + Σ s·ΔW.

Two ways lead there. *Factored*: add the product ΔW·x, computed without forming ΔW. *Dense*: form ΔW and run the base
once with the effective weight. With ``path="auto"`` the cheaper of the two runs, by the rule in
`flora_torch.functional.Work`; depthwise kernels and tiny inputs are cheaper dense. A base whose class, or which itself,
has a `forward` of its own always runs dense, since nothing is known of what it does with its weight.
"""

import copy
import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn
from torch.func import functional_call
from typing_extensions import override

from flora_tensor import Arrangement
from flora_torch.functional import (
    ConvGeometry,
    Factors,
    Path,
    Work,
    apply_conv,
    conv_work,
    forming_work,
    linear_work,
    prefers_dense,
    tucker_embedding,
    tucker_linear,
)
from flora_torch.initialize import Ranks, resolve_ranks, start_update
from flora_torch.update import TuckerUpdate

__all__ = [
    "FloraConv",
    "FloraConvTranspose",
    "FloraEmbedding",
    "FloraLayer",
    "FloraLinear",
    "FloraParameter",
    "adaptable",
    "freeze",
    "thaw",
    "wrapper_for",
]

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
        >>> layer = FloraLinear(nn.Linear(4, 3))
        >>> layer.add_adapter("style", 2).ranks
        (2, 2)
        """
        weight = adaptable(type(self).__name__, self.base_layer, parameter)
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
        >>> layer = FloraLinear(nn.Linear(4, 3))
        >>> layer.check_update("default", FloraLinear(nn.Linear(4, 3), ranks=1).tucker_update["default"])
        """
        where, weight = type(self).__name__, adaptable(type(self).__name__, self.base_layer, parameter)
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
        >>> layer = FloraLinear(nn.Linear(4, 3), ranks=2)
        >>> bool((layer.effective() == layer.base_layer.weight).all())
        True
        """
        weight: Tensor = getattr(self.base_layer, parameter)
        total: Tensor = weight
        for update in self.running(parameter) if updates is None else updates:
            total = total + update.delta()
        return total if total is weight else total.to(weight.dtype)

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
        >>> type(FloraLinear(nn.Linear(4, 3), ranks=2).merged()).__name__
        'Linear'
        """
        if "forward" in vars(self.base_layer):
            raise ValueError(
                f"merge: the forward of this {type(self.base_layer).__name__} was set on the object itself and would "
                "go on with the weights of the base; delete that attribute first"
            )
        values = {name: self._merged_value(name) for name in self.parameter_names}
        return _with_parameters(self.base_layer, values)

    def _merged_value(self, parameter: str) -> Tensor:
        weight: Tensor = getattr(self.base_layer, parameter).detach()
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


class _WeightLayer(FloraLayer):
    """A layer whose one parameter ``weight`` is adapted, and whose product ΔW·x may be known."""

    # The classes whose forward the factored path knows.
    _known: tuple[type[nn.Module], ...] = ()

    def __init__(
        self,
        base_layer: nn.Module,
        ranks: Ranks | None = None,
        *,
        adapter_name: str = "default",
        path: Path = "auto",
        **options: Any,
    ) -> None:
        if not self.accepts(base_layer):
            known = ", ".join(kind.__name__ for kind in self._known)
            raise TypeError(f"{type(self).__name__}: the base is a {type(base_layer).__name__}; pass one of {known}")
        super().__init__(base_layer, path=path)
        # A class that overrides `forward` may do anything with its weight: such a base only ever runs as a whole.
        self._is_plain = self.knows_forward_of(base_layer)
        if ranks is not None:
            self.add_adapter(adapter_name, ranks, **options)
        elif options:
            raise TypeError(f"{type(self).__name__}: {', '.join(options)} without ranks; pass ranks too")

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        """Tell whether this kind of layer can have ``module`` as its base."""
        return isinstance(module, cls._known)

    @classmethod
    def knows_forward_of(cls, module: nn.Module) -> bool:
        """Tell whether the module's class runs the forward that the factored path stands for."""
        return _has_known_forward(module, cls._known)

    @property
    def weight(self) -> Tensor:
        """The effective weight W + Σ s·ΔW, for code that reads it instead of calling the layer."""
        return self.effective("weight")

    @override
    def check_update(self, adapter_name: str, update: TuckerUpdate, *, parameter: str = "weight") -> None:
        if parameter != "weight":
            raise ValueError(f"{type(self).__name__}: adapts 'weight' and not {parameter!r}; use FloraParameter for it")
        if update.dropout and not self._is_plain:
            raise ValueError(
                f"{type(self).__name__}: dropout on an update's input needs a base whose product is known, and "
                f"{type(self.base_layer).__name__} has a forward of its own; pass dropout=0"
            )
        super().check_update(adapter_name, update, parameter=parameter)

    @override
    def updates(self, adapter_name: str) -> dict[str, TuckerUpdate]:
        if adapter_name not in self.tucker_update:
            return {}
        update: Any = self.tucker_update[adapter_name]
        return {"weight": update}

    @override
    def _put(self, adapter_name: str, update: TuckerUpdate, parameter: str) -> None:
        self.tucker_update[adapter_name] = update

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run the base layer with W + Σ s·ΔW.

        Parameters
        ----------
        input : Tensor
            As the base layer takes it.
        *args, **kwargs
            What else the base layer takes.

        Returns
        -------
        Tensor
            As the base layer gives it, in its type.
        """
        formed: list[TuckerUpdate] = []
        added: list[TuckerUpdate] = []
        for update in self.running():
            (formed if self._forms_delta(update, input) else added).append(update)
        result = self._run_base(formed, input, *args, **kwargs)
        for update in added:
            result = (result + self._change(update, input, *args, **kwargs)).to(result.dtype)
        return result

    def _run_base(self, formed: list[TuckerUpdate], input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not formed:
            return self.base_layer(input, *args, **kwargs)
        return functional_call(self.base_layer, {"weight": self.effective("weight", formed)}, (input, *args), kwargs)

    def _drops(self, update: TuckerUpdate) -> bool:
        return self.training and update.dropout > 0.0

    def _forms_delta(self, update: TuckerUpdate, input: Tensor) -> bool:
        """Decide between the two paths; dropout on the update's own input leaves no single effective weight."""
        if self._drops(update):
            return False
        if self.path != "auto" or not self._has_factored(update):
            return self.path != "factored"
        factored, base = self._work(update, input)
        shapes = [None if u is None else (u.shape[0], u.shape[1]) for u in update.factors]
        training = torch.is_grad_enabled() and update.core.requires_grad
        return prefers_dense(factored, forming_work(update.core.shape, shapes), base, math.prod(update.shape), training)

    def _change(self, update: TuckerUpdate, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Compute s·ΔW·x on its own."""
        x = nnf.dropout(input, update.dropout) if self._drops(update) else input
        if not self._has_factored(update) or self.path == "dense":
            bias: Tensor | None = getattr(self.base_layer, "bias", None)
            parts = {"weight": update.delta().to(self.base_layer.weight.dtype)}  # type: ignore[union-attr]
            # A linear or convolutional base without its bias is the product with its weight.
            parts |= {} if bias is None else {"bias": torch.zeros_like(bias)}
            return functional_call(self.base_layer, parts, (x, *args), kwargs)
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(update.core.dtype)
        return self._sum(update, lambda core, factors: self._product(update, x, core, factors, *args, **kwargs))

    @staticmethod
    def _sum(update: TuckerUpdate, product: Any) -> Tensor:
        total: Tensor | None = None
        for core, factors, sign in update.terms():
            term = product(core, factors)
            total = term if total is None else total + sign * term
        assert total is not None
        return total

    @override
    def _has_factored(self, update: TuckerUpdate) -> bool:
        return self._is_plain and update.is_native

    def _product(
        self, update: TuckerUpdate, x: Tensor, core: Tensor, factors: Factors, *args: Any, **kwargs: Any
    ) -> Tensor:
        raise NotImplementedError

    def _work(self, update: TuckerUpdate, input: Tensor) -> tuple[Work, float]:
        raise NotImplementedError


def _is_conv1d_of_transformers(module: nn.Module) -> bool:
    # The class can only exist once its module is loaded; importing it here would load all of transformers.
    loaded = sys.modules.get("transformers.pytorch_utils")
    return loaded is not None and isinstance(module, loaded.Conv1D)


def _has_known_forward(module: nn.Module, known: tuple[type[nn.Module], ...]) -> bool:
    forward = type(module).forward
    if "forward" in vars(module):
        return False
    if _is_conv1d_of_transformers(module):
        return forward is sys.modules["transformers.pytorch_utils"].Conv1D.forward
    return any(isinstance(module, kind) and forward is kind.forward for kind in known)


class FloraLinear(_WeightLayer):
    """A linear layer with W + Σ s·ΔW, where ΔW = U_0 G U_1ᵀ.

    Parameters
    ----------
    base_layer : nn.Linear, or Conv1D of Hugging Face transformers
        The layer to adapt; subclasses too. ``Conv1D`` stores its weight as (in, out), and so does its update.
    ranks : int, float, or sequence of two (int, float or None), optional
        See `FloraLayer.add_adapter`; without it the layer starts without an adapter.
    adapter_name : str
        The first adapter's name.
    path : {"auto", "factored", "dense"}
        How the output is computed.
    **options
        Everything else that `FloraLayer.add_adapter` takes.

    Raises
    ------
    TypeError
        If the base is of another kind.
    ValueError
        As for `FloraLayer.add_adapter`.

    References
    ----------
    FLoRA, arXiv 2405.14739.

    Examples
    --------
    >>> layer = FloraLinear(nn.Linear(16, 8), ranks=4, scale=2.0)
    >>> layer(torch.ones(3, 16)).shape, layer.weight.shape
    (torch.Size([3, 8]), torch.Size([8, 16]))
    """

    _known = (nn.Linear,)

    @classmethod
    @override
    def accepts(cls, module: nn.Module) -> bool:
        return isinstance(module, cls._known) or _is_conv1d_of_transformers(module)

    @property
    def _transposed(self) -> bool:
        return not isinstance(self.base_layer, nn.Linear)

    @override
    def _product(
        self, update: TuckerUpdate, x: Tensor, core: Tensor, factors: Factors, *args: Any, **kwargs: Any
    ) -> Tensor:
        return tucker_linear(x, core, factors, transposed=self._transposed)

    @override
    def _work(self, update: TuckerUpdate, input: Tensor) -> tuple[Work, float]:
        order = (1, 0) if self._transposed else (0, 1)
        core, shape = [update.core.shape[k] for k in order], [update.shape[k] for k in order]
        factors, tokens = update.factors, math.prod(input.shape[:-1])
        return linear_work(tokens, core, shape, [factors[k] is None for k in order]), tokens * math.prod(shape)


class FloraConv(_WeightLayer):
    """A convolution in one to three dimensions with W + Σ s·ΔW, ΔW a Tucker tensor of the kernel.

    Stride, dilation, groups (depthwise included), every form of padding and every padding mode are the base's own.

    Parameters
    ----------
    base_layer : nn.Conv1d, nn.Conv2d or nn.Conv3d
        The layer to adapt; subclasses too.
    ranks : int, float, or sequence of (int, float or None), optional
        One a mode of the weight (out, in/groups, *kernel) as it is arranged; see `FloraLayer.add_adapter`.
    adapter_name, path, **options
        As for `FloraLinear`.

    Raises
    ------
    TypeError
        If the base is of another kind.
    ValueError
        As for `FloraLayer.add_adapter`.

    References
    ----------
    FLoRA, arXiv 2405.14739.

    Examples
    --------
    >>> base = nn.Conv2d(16, 8, 3, padding="same", groups=2, padding_mode="circular")
    >>> layer = FloraConv(base, ranks=(4, 4, 2, 2))
    >>> layer(torch.ones(1, 16, 5, 5)).shape
    torch.Size([1, 8, 5, 5])
    """

    _known = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

    def __init__(self, base_layer: nn.Module, *args: Any, **options: Any) -> None:
        super().__init__(base_layer, *args, **options)
        self._geometry = _geometry_of(base_layer)

    @override
    def _has_factored(self, update: TuckerUpdate) -> bool:
        return self._is_plain and (update.is_native or update.split_axes is not None)

    @override
    def _product(
        self, update: TuckerUpdate, x: Tensor, core: Tensor, factors: Factors, *args: Any, **kwargs: Any
    ) -> Tensor:
        split = None if update.is_native else update.split_axes
        return apply_conv(x, core, factors, self._geometry, split, update.shape)

    @override
    def _work(self, update: TuckerUpdate, input: Tensor) -> tuple[Work, float]:
        split = None if update.is_native else update.split_axes
        whole = [u is None for u in update.factors]
        return conv_work(input.shape, update.core.shape, update.shape, self._geometry, split, whole)


class FloraConvTranspose(FloraConv):
    """A transposed convolution in one to three dimensions with W + Σ s·ΔW, ΔW a Tucker tensor of the kernel.

    Stride, dilation, groups, padding and output padding (``output_size`` in the call included) are the base's own.

    Parameters
    ----------
    base_layer : nn.ConvTranspose1d, nn.ConvTranspose2d or nn.ConvTranspose3d
        The layer to adapt; subclasses too. Its weight is (in, out/groups, *kernel), and so is its update.
    ranks, adapter_name, path, **options
        As for `FloraConv`.

    Raises
    ------
    TypeError
        If the base is of another kind.
    ValueError
        As for `FloraLayer.add_adapter`.

    References
    ----------
    FLoRA, arXiv 2405.14739.

    Examples
    --------
    >>> layer = FloraConvTranspose(nn.ConvTranspose2d(16, 8, 3, stride=2), ranks=4)
    >>> layer(torch.ones(1, 16, 5, 5), output_size=(12, 12)).shape
    torch.Size([1, 8, 12, 12])
    """

    _known = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

    @override
    def _product(
        self, update: TuckerUpdate, x: Tensor, core: Tensor, factors: Factors, *args: Any, **kwargs: Any
    ) -> Tensor:
        split = None if update.is_native else update.split_axes
        geometry = _with_output_size(self._geometry, x, *args, **kwargs)
        return apply_conv(x, core, factors, geometry, split, update.shape)


def _geometry_of(layer: Any) -> ConvGeometry:
    return ConvGeometry(
        kernel=tuple(layer.kernel_size),
        stride=tuple(layer.stride),
        dilation=tuple(layer.dilation),
        padding=layer.padding if isinstance(layer.padding, str) else tuple(layer.padding),
        groups=layer.groups,
        padding_mode=layer.padding_mode,
        output_padding=tuple(layer.output_padding),
        transposed=bool(layer.transposed),
    )


def _with_output_size(geometry: ConvGeometry, x: Tensor, output_size: Any = None) -> ConvGeometry:
    """Return the geometry whose output has the sizes asked for in the call; the base has checked that it can."""
    if output_size is None:
        return geometry
    n = len(geometry.kernel)
    plain = replace(geometry, output_padding=(0,) * n)
    smallest = plain.output_sizes(tuple(x.shape[-n:]))
    return replace(plain, output_padding=tuple(int(a) - b for a, b in zip(list(output_size)[-n:], smallest)))


class FloraEmbedding(_WeightLayer):
    """An embedding with W + Σ s·ΔW, where the rows of ΔW = U_0 G U_1ᵀ are looked up in U_0.

    ``padding_idx`` gets no gradient, as in the base. ``scale_grad_by_freq`` divides the gradient of a row of the
    *weight*, so it always runs dense. ``sparse`` is about the gradient of the base's weight, which is frozen, and has
    no effect. ``max_norm`` renormalizes the base's weight in place whenever it is used, which a frozen base must
    not, and is refused. Dropout drops whole positions: they are the input.

    Parameters
    ----------
    base_layer : nn.Embedding
        The layer to adapt; subclasses too.
    ranks, adapter_name, path, **options
        As for `FloraLinear`.

    Raises
    ------
    TypeError
        If the base is of another kind.
    ValueError
        If the base has ``max_norm``, and as for `FloraLayer.add_adapter`.

    References
    ----------
    FLoRA, arXiv 2405.14739.

    Examples
    --------
    >>> layer = FloraEmbedding(nn.Embedding(100, 16), ranks=4)
    >>> layer(torch.tensor([3, 1, 4])).shape
    torch.Size([3, 16])
    """

    _known = (nn.Embedding,)

    def __init__(self, base_layer: nn.Module, *args: Any, **options: Any) -> None:
        if isinstance(base_layer, nn.Embedding) and base_layer.max_norm is not None:
            raise ValueError(
                f"FloraEmbedding: the base has max_norm={base_layer.max_norm}, which rewrites its weight at every use; "
                "set max_norm to None first"
            )
        super().__init__(base_layer, *args, **options)

    @override
    def _has_factored(self, update: TuckerUpdate) -> bool:
        return super()._has_factored(update) and not self.base_layer.scale_grad_by_freq

    @override
    def _run_base(self, formed: list[TuckerUpdate], input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not formed or not self._is_plain:
            return super()._run_base(formed, input, *args, **kwargs)
        return self._look_up(input, self.effective("weight", formed))

    def _look_up(self, ids: Tensor, weight: Tensor) -> Tensor:
        # Dense gradients, whatever the base's `sparse` says: a sparse one cannot flow into W + s·ΔW.
        base: Any = self.base_layer
        return nnf.embedding(ids, weight, base.padding_idx, scale_grad_by_freq=base.scale_grad_by_freq)

    @override
    def _change(self, update: TuckerUpdate, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self._has_factored(update) and self.path != "dense":
            padding: Any = self.base_layer.padding_idx
            result = self._sum(update, lambda g, u: tucker_embedding(input, g, u, padding_idx=padding))
        else:
            result = self._look_up(input, update.delta())
        if not self._drops(update):
            return result
        kept = nnf.dropout(torch.ones(input.shape, dtype=result.dtype, device=result.device), update.dropout)
        return result * kept.unsqueeze(-1)

    @override
    def _work(self, update: TuckerUpdate, input: Tensor) -> tuple[Work, float]:
        whole = [u is None for u in update.factors]
        tokens = input.numel()
        rows, dim = update.shape
        r0, r1 = update.core.shape
        # A look-up multiplies nothing; only the rows that are looked up meet the core and U_1.
        products = (0 if whole[0] else r0 * r1) + (0 if whole[1] else dim * r1)
        return Work(tokens * products, tokens * (r0 + r1 + dim)), float(rows * dim)


class FloraParameter(FloraLayer):
    """Any module, with W + Σ s·ΔW in the place of some of its parameters, by their names.

    For what no other layer covers: the ``in_proj_weight`` of nn.MultiheadAttention, one 3-D weight for all experts,
    nn.Bilinear, recurrent layers. ΔW is always formed. Reading such a parameter from this module gives the effective
    one; *methods* of the base other than its call see the frozen one.

    Parameters
    ----------
    base_layer : nn.Module
        The module that owns the parameter.
    parameter : str, optional
        The first parameter to adapt.
    ranks : int, float, or sequence of (int, float or None), optional
        One a mode of the parameter as it is arranged; see `FloraLayer.add_adapter`.
    adapter_name : str
        The first adapter's name.
    **options
        Everything else that `FloraLayer.add_adapter` takes, without dropout: a parameter has no input.

    Attributes
    ----------
    tucker_update : nn.ModuleDict
        From the adapter's name to an nn.ModuleDict from the parameter's name to its `TuckerUpdate`.

    Raises
    ------
    ValueError
        If dropout is asked for, and as for `FloraLayer.add_adapter`.

    References
    ----------
    FLoRA, arXiv 2405.14739.

    Examples
    --------
    >>> layer = FloraParameter(nn.Bilinear(5, 4, 3), "weight", ranks=2)
    >>> layer(torch.ones(1, 5), torch.ones(1, 4)).shape
    torch.Size([1, 3])
    """

    def __init__(
        self,
        base_layer: nn.Module,
        parameter: str | None = None,
        ranks: Ranks | None = None,
        *,
        adapter_name: str = "default",
        **options: Any,
    ) -> None:
        super().__init__(base_layer)
        if parameter is not None and ranks is not None:
            self.add_adapter(adapter_name, ranks, parameter=parameter, **options)
        elif parameter is not None or ranks is not None or options:
            raise TypeError("FloraParameter: pass parameter and ranks together, or neither of them")

    def __getattr__(self, name: str) -> Any:
        # While unpickling there is no `tucker_update` yet; and its own look-up comes here too.
        ready = "tucker_update" in self.__dict__.get("_modules", {})
        if ready and name not in ("base_layer", "tucker_update") and name in self.parameter_names:
            return self.effective(name)
        return super().__getattr__(name)

    @override
    def updates(self, adapter_name: str) -> dict[str, TuckerUpdate]:
        if adapter_name not in self.tucker_update:
            return {}
        group: Any = self.tucker_update[adapter_name]
        return dict(group.items())

    @override
    def check_update(self, adapter_name: str, update: TuckerUpdate, *, parameter: str = "weight") -> None:
        super().check_update(adapter_name, update, parameter=parameter)
        if update.dropout:
            raise ValueError(
                f"FloraParameter: dropout is {update.dropout}, but {parameter!r} has no input to drop; pass dropout=0"
            )
        if hasattr(nn.ModuleDict(), parameter):
            raise ValueError(f"FloraParameter: a parameter named {parameter!r} cannot be adapted; rename it")

    @override
    def _put(self, adapter_name: str, update: TuckerUpdate, parameter: str) -> None:
        if adapter_name not in self.tucker_update:
            self.tucker_update[adapter_name] = nn.ModuleDict()
        group: Any = self.tucker_update[adapter_name]
        group[parameter] = update

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the base with the effective parameters in their places.

        Parameters
        ----------
        *args, **kwargs
            As the base takes them.

        Returns
        -------
        object
            What the base gives.
        """
        if not (self.enabled and self.active_adapters):
            return self.base_layer(*args, **kwargs)
        effective = {name: self.effective(name) for name in self.parameter_names}
        # What is tied to a parameter inside the base has updates of its own: it would get them twice.
        return functional_call(self.base_layer, effective, args, kwargs, tie_weights=False)


def adaptable(where: str, module: nn.Module, parameter: str) -> Tensor:
    """Return a parameter of a module that a Tucker update can change.

    Raises
    ------
    ValueError
        If there is none of that name, or it has no values, is no real float of 16 bits or more, or has fewer
        than two axes.

    Examples
    --------
    >>> adaptable("here", nn.Linear(3, 2), "weight").shape
    torch.Size([2, 3])
    """
    base = type(module).__name__
    own = dict(module.named_parameters(recurse=False, remove_duplicate=False))
    weight = own.get(parameter)
    if weight is None:
        known = ", ".join(own) or "none"
        raise ValueError(f"{where}: {base} has no parameter {parameter!r} of its own; it has {known}")
    if isinstance(weight, nn.parameter.UninitializedParameter):
        raise ValueError(f"{where}: {parameter!r} of {base} has no shape yet; run the model once, then adapt it")
    if weight.is_meta:
        raise ValueError(
            f"{where}: {parameter!r} of {base} is on the meta device and has no values; load the model first"
        )
    if not weight.is_floating_point() or weight.dtype.itemsize < 2:
        raise ValueError(
            f"{where}: {parameter!r} of {base} is of type {weight.dtype}; real floats of 16 bits or more are needed"
        )
    if weight.dim() < 2:
        raise ValueError(
            f"{where}: {parameter!r} of {base} has shape {tuple(weight.shape)}; an update needs two axes or more"
        )
    return weight


def wrapper_for(module: nn.Module, parameter: str = "weight") -> type[FloraLayer]:
    """Return the kind of layer that adapts a parameter of a module best: the one that knows its product, if any.

    Parameters
    ----------
    module : nn.Module
        The module that owns the parameter.
    parameter : str
        The parameter's name.

    Returns
    -------
    type
        `FloraLinear`, `FloraConv`, `FloraConvTranspose` or `FloraEmbedding` for the ``weight`` of such a layer, else
        `FloraParameter`.

    Examples
    --------
    >>> wrapper_for(nn.Conv1d(2, 2, 3)).__name__, wrapper_for(nn.Bilinear(2, 2, 2)).__name__
    ('FloraConv', 'FloraParameter')
    """
    if parameter == "weight":
        for kind in (FloraLinear, FloraConv, FloraConvTranspose, FloraEmbedding):
            if kind.accepts(module):
                return kind
    return FloraParameter


def drops_input(module: nn.Module, parameter: str = "weight") -> bool:
    """Tell whether an update of this parameter can have dropout: it needs an input, and a product that is known.

    Examples
    --------
    >>> drops_input(nn.Linear(2, 2)), drops_input(nn.Bilinear(2, 2, 2))
    (True, False)
    """
    kind = wrapper_for(module, parameter)
    return issubclass(kind, _WeightLayer) and kind.knows_forward_of(module)


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


def _with_parameters(module: nn.Module, values: Mapping[str, Tensor]) -> nn.Module:
    """Return a shallow copy of a module with some parameters replaced; all else is shared."""
    clone = copy.copy(module)
    # A shallow copy shares the dictionaries themselves, and the list in which a recurrent layer keeps its weights.
    for table in ("_parameters", "_buffers", "_modules"):
        clone.__dict__[table] = dict(module.__dict__[table])
    clone.__dict__.update({key: list(value) for key, value in vars(module).items() if type(value) is list})
    for name, value in values.items():
        setattr(clone, name, nn.Parameter(value, requires_grad=module.get_parameter(name).requires_grad))
    return clone
