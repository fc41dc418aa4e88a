"""The layers whose one ``weight`` is adapted and whose product with it may be known: how their output is computed.

Two ways lead there. *Factored*: add the product ΔW·x, computed without forming ΔW. *Dense*: form ΔW and run the base
once with the effective weight. With ``path="auto"`` the cheaper of the two runs, by the rule in
`flora_torch.functional.Work`; depthwise kernels and tiny inputs are cheaper dense. A base whose class, or which itself,
has a `forward` of its own always runs dense, since nothing is known of what it does with its weight.
"""

import math
import sys
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from typing_extensions import override

from flora_torch.base_weight import call_with, dense_value, is_quantized
from flora_torch.flora_layer import FloraLayer
from flora_torch.functional import Factors, Path, Work, forming_work, prefers_dense
from flora_torch.initialize import Ranks
from flora_torch.rows import RowPlan
from flora_torch.update import TuckerUpdate

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
        **options: Any,
    ) -> None:
        if not self.accepts(base_layer):
            known = ", ".join(kind.__name__ for kind in self._known)
            raise TypeError(f"{type(self).__name__}: the base is a {type(base_layer).__name__}; pass one of {known}")
        super().__init__(base_layer, path=path)
        # A class that overrides `forward` may do anything with its weight: such a base only ever runs as a whole.
        # A quantized one is known to give the product with the weight that it stands for, whatever its class.
        self._is_quantized = is_quantized(base_layer)
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
        return is_quantized(module) or _has_known_forward(module, cls._known)

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
        if update.dropout and is_read_by_its_parent(self.base_layer):
            raise ValueError(
                f"{type(self).__name__}: dropout on an update's input would have no effect: nn.MultiheadAttention "
                "reads the weight of its output projection instead of calling it; pass dropout=0, or rank_dropout"
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
        if self.row_plan is not None and self.enabled:
            return self._forward_rows(self.row_plan, input, *args, **kwargs)
        formed: list[TuckerUpdate] = []
        added: list[TuckerUpdate] = []
        for update in self.running():
            (formed if self._forms_delta(update, input) else added).append(update)
        if formed and any(update.magnitude is not None for update in added):
            # What a magnitude rescales is the product with W alone, so the base runs with nothing formed.
            formed, added = [], formed + added
        result = base = self._run_base(formed, input, *args, **kwargs)
        for update in added:
            result = (result + self._contribution(update, base, input, *args, **kwargs)).to(result.dtype)
        return result

    def _forward_rows(self, plan: RowPlan, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run the base once, and add to each row what its own adapters change."""
        input = self._checked_rows(plan, input)
        base = result = self.base_layer(input, *args, **kwargs)
        for adapter in plan.rows:
            update = self.updates(adapter).get("weight")
            if update is None:
                continue
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
        return call_with(self.base_layer, {"weight": self.effective("weight", formed)}, (input, *args), kwargs)

    def _drops(self, update: TuckerUpdate) -> bool:
        return self.training and update.dropout > 0.0

    def _forms_delta(self, update: TuckerUpdate, input: Tensor) -> bool:
        """Decide between the two paths; dropout on the update's own input leaves no single effective weight."""
        # Nothing can be added to a quantized weight: the change stays a product of its own.
        if self._is_quantized or self._drops(update):
            return False
        if self.path != "auto" or not self._has_factored(update):
            return self.path != "factored"
        if update.magnitude is not None and not torch.is_grad_enabled():
            return True  # its norms need ΔW formed in any case
        factored, base = self._work(update, input)
        shapes = [None if u is None else (u.shape[0], u.shape[1]) for u in update.factors]
        training = torch.is_grad_enabled() and update.core.requires_grad
        return prefers_dense(factored, forming_work(update.core.shape, shapes), base, math.prod(update.shape), training)

    def _contribution(self, update: TuckerUpdate, base: Tensor, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Compute what an update adds to the output of the base."""
        change = self._change(update, input, *args, **kwargs)
        return change if update.magnitude is None else self._rescaled(update, base, input, change)

    def _rescaled(self, update: TuckerUpdate, base: Tensor, input: Tensor, change: Tensor) -> Tensor:
        """Turn ΔW·x into c · (W + ΔW)·x − W·x, given the base's output, from which its bias is taken off again."""
        del input
        with torch.no_grad():
            norms = update.norms(self._base_value("weight").to(update.core.dtype) + update.delta())
        bias: Tensor | None = getattr(self.base_layer, "bias", None)
        axes = (-1, *[1] * (-1 - self._channel_axis))
        product = base.to(change.dtype)
        if bias is not None:
            product = product - bias.to(change.dtype).reshape(axes)
        return update.rescale(product, change, update.ratio(norms).reshape(axes), drop=self.training)

    # The axis of the output's channels, counted from the end.
    _channel_axis = -1

    def _change(self, update: TuckerUpdate, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Compute s·ΔW·x on its own."""
        x = nnf.dropout(input, update.dropout) if self._drops(update) else input
        if not self._has_factored(update) or self.path == "dense":
            return self._change_by(update.delta(drop=self.training), x, *args, **kwargs)
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(update.core.dtype)
        return self._sum(update, lambda core, factors: self._product(update, x, core, factors, *args, **kwargs))

    def _change_by(self, delta: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Compute ΔW·x by the base itself: without its bias, it is the product with its weight."""
        base: Any = self.base_layer
        parts = {"weight": delta.to(x.dtype if self._is_quantized else base.weight.dtype)}
        parts |= {} if getattr(base, "bias", None) is None else {"bias": torch.zeros_like(base.bias)}
        return call_with(base, parts, (x, *args), kwargs)

    def _sum(self, update: TuckerUpdate, product: Any) -> Tensor:
        total: Tensor | None = None
        for core, factors, sign in update.terms(drop=self.training):
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
    if "forward" in vars(module):
        return False
    if is_conv1d_of_transformers(module):
        return forward is sys.modules["transformers.pytorch_utils"].Conv1D.forward
    return any(isinstance(module, kind) and forward is kind.forward for kind in known)
