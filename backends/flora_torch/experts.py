"""All experts of a mixture in one parameter: W + Σ s·ΔW, of which no more is formed than the model reads.

Hugging Face transformers keeps the experts of a layer in parameters with three axes, ``expert o i`` or ``expert i o``,
and its forward takes them one by one: ``linear(x, weight[k])`` or ``x @ weight[k]``. Here the forward gets an object
in the place of the parameter that answers to this. Of an expert that is used, the change is added as a product, with
ΔW_k never formed; of the others nothing is computed. Whatever else the forward asks for, it gets W + Σ s·ΔW, formed
once.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn
from typing_extensions import override

from flora_torch.calling import stand_in
from flora_torch.chain import autocasts
from flora_torch.layers import FloraParameter

__all__ = ["FloraExperts", "expert_weights"]

# A change of one weight: w, the core, and a factor or None for each mode.
Term = tuple[float, Tensor, tuple[Tensor | None, ...]]

_MATRIX_PRODUCTS = {torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm}


def expert_weights(module: nn.Module) -> tuple[str, ...]:
    """List the parameters of a module that hold one matrix for each of its experts.

    They are its own parameters with three axes, of which the first is as long as the module has experts.

    Examples
    --------
    >>> experts = nn.Module()
    >>> experts.num_experts, experts.down_proj = 4, nn.Parameter(torch.zeros(4, 3, 2))
    >>> expert_weights(experts)
    ('down_proj',)
    """
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    counts = [count for name in names if type(count := getattr(module, name, None)) is int]
    own = module.named_parameters(recurse=False, remove_duplicate=False)
    return tuple(name for name, p in own if p.dim() == 3 and p.shape[0] in counts and p.shape[0] > 1)


class FloraExperts(FloraParameter):
    """The experts of a mixture, with W + Σ s·ΔW in the place of some of their parameters.

    ΔW is one Tucker tensor over ``expert o i``: experts share the factors of outputs and inputs, and each has a row of
    its own in the first factor. Only experts that are used get a gradient there.

    Parameters
    ----------
    base_layer : nn.Module
        The module that owns the experts; see `expert_weights`.
    parameter, ranks, adapter_name, **options
        As for `FloraParameter`.

    Raises
    ------
    ValueError
        As for `FloraParameter`.

    References
    ----------
    FLoRA, arXiv 2405.14739, for the tensor; Shazeer et al., arXiv 1701.06538, for mixtures of experts.

    Examples
    --------
    >>> class Experts(nn.Module):
    ...     num_experts = 4
    ...
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.down_proj = nn.Parameter(torch.zeros(4, 3, 2))
    ...
    ...     def forward(self, x, k):
    ...         return nn.functional.linear(x, self.down_proj[k])
    >>> FloraExperts(Experts(), "down_proj", ranks=2)(torch.ones(1, 2), 3).shape
    torch.Size([1, 3])
    """

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        # A compiler cannot look into an object that is no tensor.
        if torch.compiler.is_compiling() or not (self.enabled and self.active_adapters):
            return super().forward(*args, **kwargs)
        # Formed as a whole where the experts' axis is not a mode of its own.
        names = self.parameter_names
        values = {name: self._lazy(name) if self._is_lazy(name) else self.effective(name) for name in names}
        return stand_in(self.base_layer, values)(*args, **kwargs)

    def _is_lazy(self, name: str) -> bool:
        return name in expert_weights(self.base_layer) and all(update.is_native for update in self.running(name))

    def _lazy(self, name: str) -> "_Stack":
        parts = [part for update in self.running(name) for part in update.terms(drop=self.training)]
        terms = [(sign, core, factors) for core, factors, sign in parts]
        return _Stack(getattr(self.base_layer, name), terms, lambda: self.effective(name))


class _Lazy:
    """An object in the place of a tensor, which forms the tensor when something else is wanted than it foresees."""

    def __init__(self, weight: Tensor, terms: list[Term], form: Any) -> None:
        self.weight, self.terms, self._form = weight, terms, form
        self._formed: Tensor | None = None

    @property
    def formed(self) -> Tensor:
        if self._formed is None:
            self._formed = self._form()
        assert self._formed is not None
        return self._formed

    def __getattr__(self, name: str) -> Any:
        # What does not depend on the change is read without forming it.
        return getattr(
            self.weight if name in ("shape", "dtype", "device", "ndim", "dim", "size") else self.formed, name
        )

    def __len__(self) -> int:
        return len(self.weight)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        kwargs = kwargs or {}
        if (result := _product(function, args, kwargs)) is not NotImplemented:
            return result
        return function(*_plain(args), **{key: _plain([value])[0] for key, value in kwargs.items()})


def _plain(values: Iterable[Any]) -> list[Any]:
    return [value.formed if isinstance(value, _Lazy) else value for value in values]


def _product(function: Any, args: Any, kwargs: Any) -> Any:
    """Take a product with one expert's weight without forming its change, if that is what the call is."""
    if len(args) < 2 or not isinstance(args[1], _Expert) or isinstance(args[0], _Lazy):
        return NotImplemented
    x, expert = args[0], args[1]
    if function is nnf.linear:
        return expert.applied(x, nnf.linear(x, expert.weight, *args[2:], **kwargs), transposed=False)
    if function in _MATRIX_PRODUCTS and not kwargs:
        return expert.applied(x, x @ expert.weight, transposed=True)
    return NotImplemented


class _Stack(_Lazy):
    """W + Σ s·ΔW of all experts."""

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, int) or (isinstance(index, Tensor) and index.dim() == 0 and not index.is_floating_point()):
            weight = self.weight[index]
            return _Expert(weight, [_of_expert(term, index) for term in self.terms], lambda: _formed(self, index))
        if isinstance(index, Tensor) and index.dim() == 1 and index.dtype == torch.int64:
            return _formed(self, index)
        return self.formed[index]

    def __matmul__(self, other: Any) -> Any:
        return self.formed @ other

    def __iter__(self) -> Any:
        return (self[k] for k in range(len(self)))


def _of_expert(term: Term, index: Any) -> Term:
    """Return the change of one expert, or of several: the core times their rows of the first factor."""
    sign, core, (experts, *others) = term
    chosen = core[index] if experts is None else torch.tensordot(experts[index], core, 1)
    return sign, chosen, tuple(others)


def _formed(stack: _Stack, index: Any) -> Tensor:
    """Form the weights of some experts."""
    weight = stack.weight[index]
    total: Tensor | None = None
    for sign, core, (rows, columns) in (_of_expert(term, index) for term in stack.terms):
        change = core if rows is None else rows @ core
        change = sign * (change if columns is None else change @ columns.mT)
        # A trained term and its start come one after the other, and cancel bit for bit before W is added.
        total = change if total is None else total + change
    return weight if total is None else (weight + total).to(weight.dtype)


class _Expert(_Lazy):
    """W_k + Σ s·ΔW_k of one expert."""

    def applied(self, x: Tensor, result: Tensor, *, transposed: bool) -> Tensor:
        """Add the change's product with x to the base's."""
        total: Tensor | None = None
        for sign, core, (rows, columns) in self.terms:
            y = x if autocasts(x) else x.to(core.dtype)
            first, last, middle = (rows, columns, core) if transposed else (columns, rows, core.mT)
            y = (y if first is None else y @ first) @ middle
            y = sign * (y if last is None else y @ last.mT)
            total = y if total is None else total + y
        return result if total is None else (result + total).to(result.dtype)

    def __getitem__(self, index: Any) -> Any:
        return self.formed[index]

    def __rmatmul__(self, other: Any) -> Any:
        return _Lazy.__torch_function__(torch.matmul, (), (other, self))

    def __matmul__(self, other: Any) -> Any:
        return self.formed @ other
