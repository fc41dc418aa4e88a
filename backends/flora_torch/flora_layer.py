"""The base of all layers with a Tucker update: how adapters are made, the effective weight and merging."""

import copy
from collections.abc import Iterable, Sequence
from typing import Any, get_args

import torch
from torch import Tensor, nn
from typing_extensions import override

from flora_tensor import Arrangement
from flora_tensor._checks import check_choice
from flora_torch._sharding import refuse_sharded
from flora_torch.adapted_module import AdaptedModule
from flora_torch.base_weight import adaptable, own_parameter, plain_with
from flora_torch.chain import MEMORIES, Memory
from flora_torch.functional import Path
from flora_torch.initialize import Ranks, needs_values, resolve_ranks, start_update
from flora_torch.rebuild import Lent, rebuilding
from flora_torch.update import TuckerUpdate, widest_float

__all__ = ["FloraLayer"]


class FloraLayer(AdaptedModule):
    """What all layers share: a frozen ``base_layer``, the updates of its parameters, and how they are switched.

    Not made directly: `FloraLinear` and `FloraConv` are two of its kinds, `FloraParameter` the one for all else.

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

    def __init__(self, base_layer: nn.Module, *, path: Path = "auto", memory: Memory = "normal") -> None:
        check_choice(type(self).__name__, "path", path, get_args(Path))
        check_choice(type(self).__name__, "memory", memory, MEMORIES)
        super().__init__(base_layer)
        self.path: Path = path
        self.memory: Memory = memory

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

    @override
    def check_update(self, adapter_name: str, update: TuckerUpdate, *, parameter: str = "weight") -> None:
        super().check_update(adapter_name, update, parameter=parameter)
        where = type(self).__name__
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

    def rebuilt(self, parameter: str, updates: Sequence[TuckerUpdate]) -> Lent:
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
            return Lent(self.effective(parameter, updates))
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
        return self.plain_with(self.active_adapters)

    def plain_with(self, adapters: Iterable[str]) -> nn.Module:
        """Return what `merged` does, for some adapters, whether they are active or not.

        Parameters
        ----------
        adapters : iterable of str
            The adapters.

        Returns
        -------
        nn.Module
            The layer.

        Raises
        ------
        ValueError
            As for `merged`.

        Examples
        --------
        >>> from flora_torch import FloraLinear
        >>> type(FloraLinear(nn.Linear(4, 3), ranks=2).plain_with([])).__name__
        'Linear'
        """
        for name, tensor in self.base_layer.named_parameters():
            refuse_sharded(f"merge: {name!r} of {type(self.base_layer).__name__}", tensor)
        if "forward" in self.base_layer.__dict__:
            raise ValueError(
                f"merge: the forward of this {type(self.base_layer).__name__} was set on the object itself and would "
                "go on with the weights of the base; delete that attribute first"
            )
        names = list(adapters)
        return plain_with(self.base_layer, {name: self.merged_value(name, names) for name in self.parameter_names})

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

    def _has_factored(self, update: TuckerUpdate) -> bool:
        del update
        return False

    def takes_rows(self) -> bool:
        """Return whether each row of a batch can have adapters of its own."""
        return False

    def extra_repr(self) -> str:
        """Return what the module's repr shows."""
        shown = [] if self.path == "auto" else [f"path={self.path!r}"]
        shown += [] if self.memory == "normal" else [f"memory={self.memory!r}"]
        shown += [] if self.enabled else ["enabled=False"]
        if self.active_adapters != list(self.tucker_update):
            shown.append(f"active_adapters={self.active_adapters}")
        shown += [f"merged_adapters={list(self.merged_adapters)}"] if self.merged_adapters else []
        return ", ".join(shown)
