"""The layers whose one ``weight`` is adapted and whose product with it may be known: how their output is computed.

Two ways lead there. *Factored*: add the product ΔW·x, computed without forming ΔW. *Dense*: form ΔW and run the base
once with the effective weight. With ``path="auto"`` the cheaper of the two runs, by the rule in
`flora_torch.cost.Work`; depthwise kernels and tiny inputs are cheaper dense. (A program of `torch.export`, which is for
any batch, decides for a single row.) A base whose class, or which itself, has a `forward` of its own always runs dense,
since nothing is known of what it does with its weight.
"""

import sys
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from typing_extensions import override

from flora_torch._sharding import is_sharded, refuse_part
from flora_torch.base_weight import dense_value, is_quantized
from flora_torch.calling import call_with
from flora_torch.chain import Chain, Frozen, Memory, autocasts, run_chain, run_step
from flora_torch.flora_layer import FloraLayer
from flora_torch.functional import Path, shapes_of
from flora_torch.initialize import Ranks
from flora_torch.plans import Shapes
from flora_torch.reading import effective_weight
from flora_torch.rebuild import rebuilding
from flora_torch.rows import RowPlan
from flora_torch.steps import Step
from flora_torch.update import Term, TuckerUpdate

__all__ = ["WeightLayer", "is_conv1d_of_transformers", "is_read_by_its_parent"]


class WeightLayer(FloraLayer):
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
        memory: Memory = "normal",
        **options: Any,
    ) -> None:
        if not self.accepts(base_layer):
            known = ", ".join(kind.__name__ for kind in self._known)
            raise TypeError(f"{type(self).__name__}: the base is a {type(base_layer).__name__}; pass one of {known}")
        self.check_base(base_layer)
        super().__init__(base_layer, path=path, memory=memory)
        # A class that overrides `forward` may do anything with its weight: such a base only ever runs as a whole.
        # A quantized one is known to give the product with the weight that it stands for, whatever its class.
        self._is_quantized = is_quantized(base_layer)
        self._is_plain = self.knows_forward_of(base_layer)
        if ranks is not None:
            self.add_adapter(adapter_name, ranks, **options)
        elif options:
            raise TypeError(f"{type(self).__name__}: {', '.join(options)} without ranks; pass ranks too")

    @classmethod
    def check_base(cls, module: nn.Module) -> None:
        """Refuse a base that writes to its own weight, as an embedding with ``max_norm`` does.

        Parameters
        ----------
        module : nn.Module
            The base.

        Raises
        ------
        ValueError
            If it has ``max_norm``.
        """
        limit = getattr(module, "max_norm", None)
        if limit is not None:
            raise ValueError(
                f"{cls.__name__}: the base has max_norm={limit}, which rewrites its weight at every use; "
                "set max_norm to None first"
            )

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        """Tell whether this kind of layer can have ``module`` as its base."""
        return isinstance(module, cls._known)

    @classmethod
    def knows_forward_of(cls, module: nn.Module) -> bool:
        """Tell whether the module's class runs the forward that the factored path stands for."""
        return is_quantized(module) or _has_known_forward(module, cls._known)

    @property
    def weight(self) -> Tensor:
        """The effective weight W + Σ s·ΔW, for code that reads it instead of calling the layer."""
        return effective_weight(self, "weight")

    @override
    def check_update(self, adapter_name: str, update: TuckerUpdate, *, parameter: str = "weight") -> None:
        if parameter != "weight":
            raise ValueError(f"{type(self).__name__}: adapts 'weight' and not {parameter!r}; use FloraParameter for it")
        if update.dropout and not self._is_plain:
            raise ValueError(
                f"{type(self).__name__}: dropout on an update's input needs a base whose product is known, and "
                f"{type(self.base_layer).__name__} has a forward of its own; pass dropout=0"
            )
        if update.dropout and is_read_by_its_parent(self.base_layer):
            raise ValueError(
                f"{type(self).__name__}: dropout on an update's input would have no effect: nn.MultiheadAttention "
                "reads the weight of its output projection instead of calling it; pass dropout=0, or rank_dropout"
            )
        super().check_update(adapter_name, update, parameter=parameter)

    @override
    def updates(self, adapter_name: str) -> dict[str, TuckerUpdate]:
        update = self._update(adapter_name, "weight")
        return {} if update is None else {"weight": update}

    @override
    def _update(self, adapter_name: str, parameter: str) -> TuckerUpdate | None:
        updates: Any = self.__dict__["_modules"]["tucker_update"]
        # Older compilers trace no vars().
        return updates.__dict__["_modules"].get(adapter_name) if parameter == "weight" else None

    @override
    def _put(self, adapter_name: str, update: TuckerUpdate, parameter: str) -> None:
        self.tucker_update[adapter_name] = update

    @override
    def _base_value(self, parameter: str) -> Tensor:
        return dense_value(self.base_layer, parameter) if self._is_quantized else super()._base_value(parameter)

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
        if self.row_plan is not None and self._enabled:
            return self._forward_rows(self.row_plan, input, *args, **kwargs)
        formed: list[TuckerUpdate] = []
        added: list[TuckerUpdate] = []
        for update in self.running():
            (formed if self._forms_delta(update, input) else added).append(update)
        rescales = any(update.has_magnitude for update in added)
        if formed and rescales:
            # What a magnitude rescales is the product with W alone, so the base runs with nothing formed.
            formed, added = [], formed + added
        # The base's output can be written to where nobody else holds it.
        alone = not (rescales or _is_watched(self._base))
        if alone and added and not formed:
            result = self._beside_base(added[0], input, *args, **kwargs)
            if result is not None:
                for update in added[1:]:
                    result = self._added(result, update, result, input, alone)
                return result
        result = base = self._run_base(formed, input, *args, **kwargs)
        for update in added:
            result = self._added(result, update, base, input, alone, *args, **kwargs)
        return result

    def _beside_base(self, update: TuckerUpdate, input: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
        """Run a frozen base and one update as one operation; ``None`` where the base has to be called."""
        if not self._adds_in_place(update) or self._drops(update):
            return None
        own = self._base._parameters
        step, weight, bias = self._own_step(input, *args, **kwargs), own.get("weight"), own.get("bias")
        if step is None or not _is_still(weight) or not (bias is None or _is_still(bias)):
            return None
        (term,) = update.terms(drop=self.training)
        return self._product(update, input, term, Frozen(step, weight, bias))

    def _own_step(self, input: Tensor, *args: Any, **kwargs: Any) -> Step | None:
        """Return what the base does with its weight and this input; ``None`` where it has to be called to know."""
        del input, args, kwargs
        return None

    def _forward_rows(self, plan: RowPlan, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run the base once, and add to each row what its own adapters change."""
        input = self._checked_rows(plan, input)
        base = result = self.base_layer(input, *args, **kwargs)
        for adapter in plan.rows:
            update = self.updates(adapter).get("weight")
            if update is None:
                continue
            self._check_present(update)
            rows = plan.index(adapter, input.device)
            if rows is None:
                result = (result + self._contribution(update, base, input, *args, **kwargs)).to(result.dtype)
                continue
            mine = base.index_select(0, rows), input.index_select(0, rows)
            change = self._contribution(update, *mine, *args, **kwargs)
            # Added in the wider type and rounded once, as for a batch of its own.
            result = result.index_copy(0, rows, (result.index_select(0, rows) + change).to(result.dtype))
        return result

    def _checked_rows(self, plan: RowPlan, input: Tensor) -> Tensor:
        """Return the input, its first axis proved to be the rows of a plan."""
        plan.check(self, tuple(input.shape), self._n_unbatched_axes)
        return input

    @property
    def _n_unbatched_axes(self) -> int:
        """How many axes an input without a batch has."""
        return 1

    @override
    def takes_rows(self) -> bool:
        return self._is_plain

    def _run_base(self, formed: list[TuckerUpdate], input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not formed:
            return self.base_layer(input, *args, **kwargs)
        with self.rebuilt("weight", formed) as weight:
            step = None if _is_watched(self.base_layer) else self._own_step(input, *args, **kwargs)
            if step is not None:
                return run_step(step, input, weight, self.base_layer.bias)  # type: ignore[arg-type]
            return call_with(self.base_layer, {"weight": weight}, (input, *args), kwargs)

    @override
    def _as_used(self, weight: Tensor) -> Tensor:
        # Autocast would make a copy of its own, and the operation would keep that.
        narrow = self._is_plain and autocasts(weight) and weight.dtype == torch.float32
        return weight.to(torch.get_autocast_dtype(weight.device.type)) if narrow else weight

    @property
    def _is_packed(self) -> bool:
        """Whether the weight is quantized, or of 8 bits until hooks of the base widen it, as diffusers does."""
        weight = self._base._parameters.get("weight")
        return self._is_quantized or (weight is not None and weight.dtype.itemsize < 2)

    def _drops(self, update: TuckerUpdate) -> bool:
        return self.training and update.dropout > 0.0

    def _forms_delta(self, update: TuckerUpdate, input: Tensor) -> bool:
        """Decide between the two paths; dropout on the update's own input leaves no single effective weight."""
        if is_sharded(self._base._parameters.get("weight")):
            self._check_parallel(update, input)
            return False
        # Nothing can be added to what is no weight to compute with: the change stays a product of its own.
        if self._is_packed or self._drops(update):
            return False
        if self.path != "auto" or not self._has_factored(update):
            return self.path != "factored"
        core, factors = update.core_and_factors
        training = torch.is_grad_enabled()
        if update.has_magnitude and not training:
            return True  # its norms need ΔW formed in any case
        return self._is_cheaper_dense(update, shapes_of(core, factors), input, training and core.requires_grad)

    def _added(
        self, result: Tensor, update: TuckerUpdate, base: Tensor, input: Tensor, alone: bool, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Add what an update changes to ``result``, in place if that is ``alone`` and the update allows it."""
        if alone and self._adds_in_place(update):
            (term,) = update.terms(drop=self.training)
            return self._product(update, self._dropped(update, input), term, result, *args, **kwargs)
        change = self._contribution(update, base, input, *args, **kwargs)
        if change.shape != result.shape:
            refuse_part("output", tuple(result.shape), tuple(change.shape))
        return (result + change).to(result.dtype)

    def _check_parallel(self, update: TuckerUpdate, input: Tensor) -> None:
        """Refuse what cannot run beside a weight of which this process holds a part."""
        if not self._runs_factored(update) or update.magnitude is not None:
            raise ValueError(
                f"{type(self).__name__}: the weight is spread over processes, and this update needs the whole of it; "
                "adapt it by native modes, with path='auto' and without a magnitude, or leave it out"
            )
        axis = 0 if getattr(self, "_transposed", False) else 1
        if isinstance(self.base_layer, nn.Linear) and input.shape[-1] != update.shape[axis]:
            refuse_part("input", tuple(input.shape), (*input.shape[:-1], update.shape[axis]))

    def _adds_in_place(self, update: TuckerUpdate) -> bool:
        """Tell whether an update is one factored product, whose last step can add to what is there."""
        return self._runs_factored(update) and not (update.has_start or self._is_quantized)

    def _runs_factored(self, update: TuckerUpdate) -> bool:
        return self.path != "dense" and self._has_factored(update)

    def _contribution(self, update: TuckerUpdate, base: Tensor, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Compute what an update adds to the output of the base."""
        change = self._change(update, input, *args, **kwargs)
        return change if update.magnitude is None else self._rescaled(update, base, input, change)

    def _rescaled(self, update: TuckerUpdate, base: Tensor, input: Tensor, change: Tensor) -> Tensor:
        """Turn ΔW·x into c · (W + ΔW)·x − W·x, given the base's output, from which its bias is taken off again."""
        del input
        with torch.no_grad():
            norms = update.norms(self._base_value("weight") + update.delta())
        bias: Tensor | None = getattr(self.base_layer, "bias", None)
        axes = (-1, *[1] * (-1 - self._channel_axis))
        ratio = update.ratio(norms).reshape(axes)
        product = base.to(torch.promote_types(base.dtype, ratio.dtype))
        if bias is not None:
            product = product - bias.reshape(axes)
        return update.rescale(product, change, ratio, drop=self.training)

    # The axis of the output's channels, counted from the end.
    _channel_axis = -1

    def _change(self, update: TuckerUpdate, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Compute s·ΔW·x on its own."""
        x = self._dropped(update, input)
        if not self._runs_factored(update):
            return self._dense_change(update, x, *args, **kwargs)
        # A trained term and its start are summed before anything else, so that they cancel bit for bit.
        total: Tensor | None = None
        for term in update.terms(drop=self.training):
            product = self._product(update, x, term, None, *args, **kwargs)
            total = product if total is None else total + product
        assert total is not None
        return total

    def _dropped(self, update: TuckerUpdate, input: Tensor) -> Tensor:
        """Return the update's input, with dropout where it has any."""
        return nnf.dropout(input, update.dropout) if self._drops(update) else input

    def _dense_change(self, update: TuckerUpdate, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Compute s·ΔW·x on its own, by the base with ΔW as its weight."""
        dtype: torch.dtype = x.dtype if self._is_packed else self.base_layer.weight.dtype  # type: ignore[assignment]
        if self.training and (update.rank_dropout or update.module_dropout):
            return self._change_by(update.delta(drop=True).to(dtype), x, *args, **kwargs)
        with rebuilding(lambda: self._as_used(update.delta().to(dtype)), [*update.parameters()]) as delta:
            return self._change_by(delta, x, *args, **kwargs)

    def _change_by(self, delta: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Compute ΔW·x by the base itself: without its bias, it is the product with its weight."""
        # Hooks that widen a weight of 8 bits are for that weight alone.
        called = _is_watched(self.base_layer) and not self._is_packed
        step = None if called else self._own_step(x, *args, **kwargs)
        if step is not None:
            return run_step(step, x, delta, None)
        base: Any = self.base_layer
        parts = {"weight": delta}
        parts |= {} if getattr(base, "bias", None) is None else {"bias": torch.zeros_like(base.bias)}
        return call_with(base, parts, (x, *args), kwargs)

    @override
    def _has_factored(self, update: TuckerUpdate) -> bool:
        return self._is_plain and update.is_native

    def _product(
        self, update: TuckerUpdate, x: Tensor, term: Term, out: Tensor | Frozen | None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Return a term's w · T·x without forming T, added to ``out`` if that is given."""
        del args, kwargs  # of those that a call may have, only a convolution's change the product
        core, factors, weight = term
        chain = self._chain(update, shapes_of(core, factors))
        return run_chain(chain, x, (core, *factors), scale=weight, memory=self.memory, out=out)

    def _chain(self, update: TuckerUpdate, shapes: Shapes) -> Chain:
        """Return the steps of the product for a core and factors of these shapes."""
        raise NotImplementedError

    def _is_cheaper_dense(self, update: TuckerUpdate, shapes: Shapes, input: Tensor, training: bool) -> bool:
        """Tell which of the two ways the cost rule prefers for a core and factors of these shapes."""
        raise NotImplementedError


# Where torch keeps the hooks of all modules; older versions have no function that tells whether there are any.
_KINDS = ("forward", "forward_pre", "backward", "backward_pre")
_HOOKS_OF_ALL: tuple[Any, ...] = tuple(getattr(nn.modules.module, f"_global_{kind}_hooks") for kind in _KINDS)


def _is_watched(module: nn.Module) -> bool:
    """Tell whether a hook may see what the module takes or hold its output, which then must not be written to."""
    own: Any = module
    mine = own._forward_hooks or own._forward_pre_hooks or own._backward_hooks or own._backward_pre_hooks
    return bool(mine or "forward" in own.__dict__ or any(_HOOKS_OF_ALL))


def _is_still(tensor: Any) -> bool:
    """Tell whether a weight is a plain tensor that nothing is to be known of in the backward pass."""
    return type(tensor) in (nn.Parameter, Tensor) and not tensor.requires_grad


def is_conv1d_of_transformers(module: nn.Module) -> bool:
    """Tell whether a module is the transposed linear layer of Hugging Face transformers."""
    # The class can only exist once its module is loaded; importing it here would load all of transformers.
    loaded = sys.modules.get("transformers.pytorch_utils")
    return loaded is not None and isinstance(module, loaded.Conv1D)


def is_read_by_its_parent(module: nn.Module) -> bool:
    """Tell whether a module is never called: nn.MultiheadAttention reads the weight of its output projection."""
    return isinstance(module, NonDynamicallyQuantizableLinear)


def _has_known_forward(module: nn.Module, known: tuple[type[nn.Module], ...]) -> bool:
    forward = type(module).forward
    if "forward" in module.__dict__:
        return False
    if is_conv1d_of_transformers(module):
        return forward is sys.modules["transformers.pytorch_utils"].Conv1D.forward
    return any(isinstance(module, kind) and forward is kind.forward for kind in known)
