"""Layers with a frozen base and trainable Tucker updates: the output is the base's with W + Σ s·ΔW.

One class for each kind of product that is known, and `FloraParameter` for everything else. What they share is in
`flora_torch.adapted_module` and `flora_torch.flora_layer`, and how an output is computed in `flora_torch.weight_layer`.
"""

import functools
import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn
from typing_extensions import override

from flora_tensor.magnitudes import channel_ratio
from flora_torch.adapted_module import TAKEN_NAMES
from flora_torch.base_weight import is_unpacked_linear
from flora_torch.calling import call_method, call_with, is_own_method
from flora_torch.chain import Chain, Frozen
from flora_torch.cost import conv_rule, embedding_rule, linear_rule, n_rows, sizes_of
from flora_torch.flora_layer import FloraLayer
from flora_torch.functional import run_conv, run_rows, shapes_of, tucker_embedding
from flora_torch.geometry import ConvGeometry, kept_geometry
from flora_torch.initialize import Ranks
from flora_torch.plans import Shapes, Sides, conv_chain, embedding_chain, linear_chain, own_convolution
from flora_torch.reading import effective_weight
from flora_torch.rows import RowPlan
from flora_torch.steps import Rows, Step
from flora_torch.update import Term, TuckerUpdate, widest_float
from flora_torch.weight_layer import WeightLayer, is_conv1d_of_transformers

__all__ = [
    "FloraConv",
    "FloraConvTranspose",
    "FloraEmbedding",
    "FloraLayer",
    "FloraLinear",
    "FloraParameter",
]


class FloraLinear(WeightLayer):
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
    memory : {"normal", "low"}
        What is kept for the backward pass; see `FloraLayer`.
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
        return isinstance(module, cls._known) or is_conv1d_of_transformers(module) or is_unpacked_linear(module)

    @classmethod
    @override
    def output_channels(cls, where: str, module: nn.Module) -> tuple[int, int]:
        return (1, 1) if is_conv1d_of_transformers(module) else (0, 1)

    @property
    def _transposed(self) -> bool:
        base = self._base
        return not isinstance(base, nn.Linear) and is_conv1d_of_transformers(base)

    @override
    def _change_by(self, delta: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # The class of a quantized layer can do nothing with a dense weight.
        return nnf.linear(x, delta.to(x.dtype)) if self._is_quantized else super()._change_by(delta, x, *args, **kwargs)

    @override
    def _has_factored(self, update: TuckerUpdate) -> bool:
        return self._is_plain and update.sides is not None

    def _sides(self, update: TuckerUpdate) -> Sides:
        # The output's side first; a transposed weight is (in, out).
        assert update.sides is not None
        first, second = update.sides
        return (second, first) if self._transposed else (first, second)

    @override
    def _product(
        self, update: TuckerUpdate, x: Tensor, term: Term, out: Tensor | Frozen | None, *args: Any, **kwargs: Any
    ) -> Tensor:
        core, factors, weight = term
        chain = linear_chain(n_rows(x.shape[:-1]), shapes_of(core, factors), self._sides(update))
        return run_rows(chain, x, (core, *factors), scale=weight, memory=self.memory, out=out)

    @override
    def _own_step(self, input: Tensor, *args: Any, **kwargs: Any) -> Step | None:
        plain = self._is_plain and not (self._is_quantized or args or kwargs) and isinstance(self._base, nn.Linear)
        return _ROWS if plain else None

    @override
    def _is_cheaper_dense(self, update: TuckerUpdate, shapes: Shapes, input: Tensor, training: bool) -> bool:
        return linear_rule(n_rows(input.shape[:-1]), shapes, self._sides(update), training)


_ROWS = Rows()


class FloraConv(WeightLayer):
    """A convolution in one to three dimensions with W + Σ s·ΔW, ΔW a Tucker tensor of the kernel.

    Stride, dilation, groups (depthwise included), every form of padding and every padding mode are the base's own.

    Parameters
    ----------
    base_layer : nn.Conv1d, nn.Conv2d or nn.Conv3d
        The layer to adapt; subclasses too.
    ranks : int, float, or sequence of (int, float or None), optional
        One a mode of the weight (out, in/groups, *kernel) as it is arranged; see `FloraLayer.add_adapter`.
    adapter_name, path, memory, **options
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

    @classmethod
    @override
    def output_channels(cls, where: str, module: nn.Module) -> tuple[int, int]:
        return (0, 1)

    @property
    def _geometry(self) -> ConvGeometry:
        # Read at every use: a base may be given another stride or padding after it was wrapped.
        return _geometry_of(self._base)

    @property
    @override
    def _n_unbatched_axes(self) -> int:
        return len(self._geometry.kernel) + 1

    @property
    @override
    def _channel_axis(self) -> int:
        return -1 - len(self._geometry.kernel)

    @override
    def _has_factored(self, update: TuckerUpdate) -> bool:
        return self._is_plain and (update.is_native or update.split_axes is not None)

    @override
    def _product(
        self, update: TuckerUpdate, x: Tensor, term: Term, out: Tensor | Frozen | None, *args: Any, **kwargs: Any
    ) -> Tensor:
        core, factors, weight = term
        split = None if update.is_native else update.split_axes
        geometry = self._geometry_for(x, *args, **kwargs)
        chain = conv_chain(shapes_of(core, factors), geometry, split, update.shape)
        return run_conv(chain, x, (core, *factors), geometry, scale=weight, memory=self.memory, out=out)

    def _geometry_for(self, x: Tensor, *args: Any, **kwargs: Any) -> ConvGeometry:
        """Return the geometry of a call."""
        del x, args, kwargs
        return self._geometry

    @override
    def _own_step(self, input: Tensor, *args: Any, **kwargs: Any) -> Step | None:
        geometry = self._geometry
        if not self._is_plain or args or kwargs or input.dim() != len(geometry.kernel) + 2:
            return None
        return own_convolution(geometry)

    @override
    def _is_cheaper_dense(self, update: TuckerUpdate, shapes: Shapes, input: Tensor, training: bool) -> bool:
        split, geometry = None if update.is_native else update.split_axes, self._geometry
        sizes = sizes_of(input, len(geometry.kernel))
        return conv_rule(sizes, shapes, update.shape, geometry, split, training)


class FloraConvTranspose(FloraConv):
    """A transposed convolution in one to three dimensions with W + Σ s·ΔW, ΔW a Tucker tensor of the kernel.

    Stride, dilation, groups, padding and output padding (``output_size`` in the call included) are the base's own.

    Parameters
    ----------
    base_layer : nn.ConvTranspose1d, nn.ConvTranspose2d or nn.ConvTranspose3d
        The layer to adapt; subclasses too. Its weight is (in, out/groups, *kernel), and so is its update.
    ranks, adapter_name, path, memory, **options
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

    @classmethod
    @override
    def output_channels(cls, where: str, module: Any) -> tuple[int, int]:
        return (1, int(module.groups))

    @override
    def _geometry_for(self, x: Tensor, *args: Any, **kwargs: Any) -> ConvGeometry:
        return _with_output_size(self._geometry, x, *args, **kwargs)


def _geometry_of(layer: Any) -> ConvGeometry:
    return kept_geometry(
        tuple(layer.kernel_size),
        tuple(layer.stride),
        tuple(layer.dilation),
        layer.padding if isinstance(layer.padding, str) else tuple(layer.padding),
        layer.groups,
        layer.padding_mode,
        tuple(layer.output_padding),
        bool(layer.transposed),
    )


def _with_output_size(geometry: ConvGeometry, x: Tensor, output_size: Any = None) -> ConvGeometry:
    """Return the geometry whose output has the sizes asked for in the call; the base has checked that it can."""
    if output_size is None:
        return geometry
    n = len(geometry.kernel)
    plain = replace(geometry, output_padding=(0,) * n)
    smallest = plain.output_sizes(tuple(x.shape[-n:]))
    return replace(plain, output_padding=tuple(int(a) - b for a, b in zip(list(output_size)[-n:], smallest)))


class FloraEmbedding(WeightLayer):
    """An embedding with W + Σ s·ΔW, where the rows of ΔW = U_0 G U_1ᵀ are looked up in U_0.

    ``padding_idx`` gets no gradient, as in the base. ``scale_grad_by_freq`` divides the gradient of a row of the
    *weight*, so it always runs dense. ``sparse`` is about the gradient of the base's weight, which is frozen, and has
    no effect. ``max_norm`` renormalizes the base's weight in place whenever it is used, which a frozen base must
    not, and is refused. Dropout drops whole positions: they are the input.

    Parameters
    ----------
    base_layer : nn.Embedding
        The layer to adapt; subclasses too.
    ranks, adapter_name, path, memory, **options
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

    @classmethod
    @override
    def output_channels(cls, where: str, module: nn.Module) -> tuple[int, int]:
        # One magnitude a row: a tied linear layer has its output channels there too.
        return (0, 1)

    @override
    def _checked_rows(self, plan: RowPlan, input: Tensor) -> Tensor:
        if input.dim() > 1 and input.shape[0] == 1:
            # Positions that are looked up once for the whole batch.
            input = input.expand(plan.n_rows, *input.shape[1:])
        return super()._checked_rows(plan, input)

    @property
    @override
    def _n_unbatched_axes(self) -> int:
        return 0

    @override
    def _has_factored(self, update: TuckerUpdate) -> bool:
        return super()._has_factored(update) and not self.base_layer.scale_grad_by_freq

    @override
    def _run_base(self, formed: list[TuckerUpdate], input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not formed or not self._is_plain:
            return super()._run_base(formed, input, *args, **kwargs)
        with self.rebuilt("weight", formed) as weight:
            return self._look_up(input, weight)

    @override
    def _as_used(self, weight: Tensor) -> Tensor:
        return weight  # autocast leaves look-ups alone

    def _look_up(self, ids: Tensor, weight: Tensor) -> Tensor:
        # Dense gradients, whatever the base's `sparse` says: a sparse one cannot flow into W + s·ΔW.
        base: Any = self.base_layer
        return nnf.embedding(ids, weight, base.padding_idx, scale_grad_by_freq=base.scale_grad_by_freq)

    @override
    def _change(self, update: TuckerUpdate, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result = super()._change(update, input, *args, **kwargs)
        if not self._drops(update):
            return result
        kept = nnf.dropout(torch.ones(input.shape, dtype=result.dtype, device=result.device), update.dropout)
        return result * kept.unsqueeze(-1)

    @override
    def _adds_in_place(self, update: TuckerUpdate) -> bool:
        return super()._adds_in_place(update) and not self._drops(update)

    @override
    def _dropped(self, update: TuckerUpdate, input: Tensor) -> Tensor:
        return input

    @override
    def _dense_change(self, update: TuckerUpdate, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self._look_up(x, update.delta(drop=self.training))

    @override
    def _chain(self, update: TuckerUpdate, shapes: Shapes) -> Chain:
        return embedding_chain(shapes, self.base_layer.padding_idx)  # type: ignore[arg-type]

    @override
    def _rescaled(self, update: TuckerUpdate, base: Tensor, input: Tensor, change: Tensor) -> Tensor:
        # Each row that is looked up is a channel, so only their norms are needed; of the whole rows, nothing dropped.
        assert update.magnitude is not None
        with torch.no_grad():
            if self._has_factored(update):
                # Summed before the base is added: a start that nothing has moved yet cancels bit for bit.
                whole = sum(s * tucker_embedding(input, core, factors) for core, factors, s in update.terms())
            else:
                whole = nnf.embedding(input, update.delta())
            total = base + whole
            norms = torch.linalg.vector_norm(total, dim=-1, dtype=widest_float(total.device))
        magnitude = self._look_up(input, update.magnitude.unsqueeze(-1)).squeeze(-1)
        ratio = channel_ratio(magnitude, norms).unsqueeze(-1)
        return update.rescale(base, change, ratio, drop=self.training)

    @override
    def _is_cheaper_dense(self, update: TuckerUpdate, shapes: Shapes, input: Tensor, training: bool) -> bool:
        return embedding_rule(n_rows(input.shape), shapes, training)


class FloraParameter(FloraLayer):
    """Any module, with W + Σ s·ΔW in the place of some of its parameters, by their names.

    For what no other layer covers: the ``in_proj_weight`` of nn.MultiheadAttention, recurrent layers, modules that
    nothing is known of. ΔW is always formed. Reading such a parameter from this module gives the effective
    one, and methods that the base's own class has run with it too; its properties see the frozen one.

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
            return effective_weight(self, name)
        found = super().__getattr__(name)
        # Models call methods of their modules past `forward`, as for a table of biases that attention adds.
        is_method = ready and inspect.ismethod(found) and found.__self__ is self.base_layer
        is_own = is_method and is_own_method(self.base_layer, name)
        return functools.partial(self._call_method, name) if is_own else found

    def _call_method(self, method: str, *args: Any, **kwargs: Any) -> Any:
        if not (self.enabled and self.active_adapters):
            return getattr(self.base_layer, method)(*args, **kwargs)
        effective = {name: self.effective(name) for name in self.parameter_names}
        return call_method(self.base_layer, method, effective, args, kwargs)

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
        if parameter in TAKEN_NAMES:
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
        return self._call_with(self.parameter_names, {}, args, kwargs)

    def _call_with(
        self, names: Sequence[str], effective: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Call the base inside one block for each name; compilers do not resume in a stack of blocks."""
        if not names:
            return call_with(self.base_layer, effective, args, kwargs)
        first, *rest = names
        with self.rebuilt(first, self.running(first)) as value:
            return self._call_with(rest, {**effective, first: value}, args, kwargs)
