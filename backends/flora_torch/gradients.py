"""Gradients of whole weights, kept as Tucker tensors: no more than one dense gradient is in memory at a time."""

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import flora_tensor as ft
from flora_tensor import Arrangement, TuckerTensor, feasible_ranks
from flora_torch._sharding import as_parts, in_several_processes, refuse_sharded, summed
from flora_torch.base_weight import adaptable
from flora_torch.calibration import evaluating
from flora_torch.initialize import Ranks, default_dtype, resolve_ranks
from flora_torch.model_weights import Site
from flora_torch.patterns import Pattern, PerName, arranged_as
from flora_torch.selection import select

__all__ = ["Gradients", "collect_gradients"]


class Gradients(dict[str, TuckerTensor]):
    """Gradients by the names of weights, as Tucker tensors of the arranged weights; made by `collect_gradients`.

    Attributes
    ----------
    errors : dict of str to float
        For each weight an upper bound on ‖∇ − T‖ / ‖T‖, of what all truncations together left out.
    n_batches : int
        How many batches the mean was taken over.

    Examples
    --------
    >>> Gradients().n_batches
    0
    """

    def __init__(self) -> None:
        super().__init__()
        self.errors: dict[str, float] = {}
        self.n_batches = 0


def collect_gradients(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
    *,
    ranks: Ranks | Mapping[Any, Ranks],
    target_modules: "Pattern | Sequence[Pattern] | None" = None,
    exclude_modules: "Pattern | Sequence[Pattern] | None" = None,
    target_parameters: "Pattern | Sequence[Pattern] | None" = None,
    arrangement: Arrangement | str | Mapping[Any, Arrangement | str] | None = None,
    oversampling: int = 8,
    sum_over_processes: bool = True,
) -> Gradients:
    """Take the mean gradient over batches with respect to whole weights, compressed while the backward pass runs.

    Each gradient is decomposed as soon as it is complete, and freed before the next one comes, so that the memory
    needed is that of the largest gradient and of small tensors. With several batches, what was kept before is added to
    the fresh gradient and both are decomposed again, to 2 r + ``oversampling`` in every mode; ``errors`` bounds what
    that left out. It is exact where the ranks reach the modes' sizes.

    The model runs in evaluation mode, so that no dropout disturbs the gradient and no statistics move, and is left as
    it was: modes, gradients and which parameters require them.

    In several processes (torch.distributed) each sees its own batches, and the mean is over those of all: at the end,
    one weight at a time, what each has kept is added up dense.

    Parameters
    ----------
    model : nn.Module
        The model, with or without adapters.
    batches : iterable
        Whatever ``loss`` takes. One batch is what LoRA-GA uses.
    loss : callable, optional
        Called as ``loss(model, batch)``, gives a tensor of shape (); by default ``model(**batch).loss``.
    ranks : int, float, sequence of (int, float or None), or mapping of pattern to these
        The ranks that adapters will start with; as for `attach`.
    target_modules, exclude_modules, target_parameters, arrangement
        As for `attach`.
    oversampling : int
        How many more directions than 2 r are kept for each mode.
    sum_over_processes : bool
        With ``False``, each process has the gradients of its own batches. Otherwise all must call this.

    Returns
    -------
    Gradients
        For ``attach(…, init="from_gradient", init_tensors=gradients)``; and, multiplied by −η, for
        ``init="from_delta"``, which begins with a first step of length η.

    Raises
    ------
    ValueError
        If there is no batch, the loss is no finite scalar or reaches none of the weights, a gradient is not finite, or
        an option does not fit.

    References
    ----------
    Wang, Yu and Li, *LoRA-GA*, arXiv 2407.05000, section 3.3 and appendix, for one layer at a time; Lv et al., *Full
    parameter fine-tuning for large language models with limited resources*, ACL 2024, for freeing gradients within the
    backward pass.

    Examples
    --------
    >>> from flora_torch import attach
    >>> model, images, labels = nn.Sequential(nn.Linear(8, 4)), torch.eye(8), torch.arange(8) % 4
    >>> def loss(model, batch):
    ...     return nn.functional.cross_entropy(model(batch[0]), batch[1])
    >>> gradients = collect_gradients(model, [(images, labels)], loss, ranks=2)
    >>> report = attach(model, ranks=2, init="from_gradient", init_tensors=gradients)
    >>> gradients["0.weight"].shape, report.layers[0].ranks
    ((4, 8), (2, 2))
    """
    as_parts("collect_gradients", model)
    targets = select(model, target_modules, exclude_modules, target_parameters, where="collect_gradients")
    plans = _plans(targets, ranks, arrangement, oversampling)
    gradients = Gradients()
    sums = {site.name: _RunningSum(site.name, plan) for site, plan in zip(targets, plans)}
    with _only_these_require_gradients(model, targets), evaluating(model), torch.enable_grad():
        hooks = [site.weight.register_post_accumulate_grad_hook(sums[site.name].take) for site in targets]
        try:
            for batch in batches:
                _loss_of(model, batch, loss).backward()
                gradients.n_batches += 1
        finally:
            for hook in hooks:
                hook.remove()
    if sum_over_processes and in_several_processes():
        gradients.n_batches = int(summed(torch.tensor(gradients.n_batches, device=targets[0].weight.device)))
        for site in targets:
            sums[site.name].sum_over_processes(site.weight)
    if not gradients.n_batches:
        raise ValueError("collect_gradients: there is no batch; pass at least one")
    for site in targets:
        total = sums[site.name]
        if total.tucker is None:
            raise ValueError(f"collect_gradients: the loss does not depend on {site.name!r}; exclude its module")
        gradients[site.name] = ft.scale(total.tucker, 1.0 / gradients.n_batches)
        norm = float(ft.norm(total.tucker))
        gradients.errors[site.name] = total.lost / norm if norm else 0.0
    return gradients


def _loss_of(model: nn.Module, batch: Any, loss: Callable[[nn.Module, Any], Tensor] | None) -> Tensor:
    value: Any = model(**batch).loss if loss is None else loss(model, batch)
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
        given = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(type(value).__name__)
        raise ValueError(f"collect_gradients: the loss is {given}; a scalar that depends on the weights is needed")
    if not bool(torch.isfinite(value)):
        raise ValueError(f"collect_gradients: the loss is {value.item()}; a finite one is needed")
    return value


_Plan = tuple[Arrangement, tuple[int | None, ...]]


def _plans(targets: list[Site], ranks: Any, arrangement: Any, oversampling: int) -> list[_Plan]:
    """Choose for each weight its arrangement, and how much of each mode is kept."""
    by_rank: PerName[Any] = PerName("ranks", ranks, where="collect_gradients")
    by_arrangement: PerName[Any] = PerName("arrangement", arrangement, None, where="collect_gradients")
    plans: list[_Plan] = []
    for site in targets:
        holder = site.holders[0]
        weight = adaptable(f"collect_gradients: {site.name}", holder.module, holder.parameter, values=False)
        refuse_sharded(f"collect_gradients: {site.name}", weight)
        if weight is not site.weight:
            raise ValueError(
                f"collect_gradients: {site.name!r} is computed or quantized and gets no gradient of its own; exclude it"
            )
        arranged, shape = arranged_as(by_arrangement, site, tuple(weight.shape))
        _, wanted = resolve_ranks(by_rank.of(site), shape, where=f"collect_gradients: {site.name}")
        kept = feasible_ranks([n if r is None else min(n, 2 * r + oversampling) for r, n in zip(wanted, shape)], shape)
        # None where all of a mode is kept: no factor, and no error.
        plans.append((arranged, tuple(None if r == n else r for r, n in zip(kept, shape))))
    for option in (by_rank, by_arrangement):
        option.check_used(targets)
    return plans


class _RunningSum:
    """The sum of one weight's gradients so far, and a bound on what truncations left out of it."""

    def __init__(self, name: str, plan: _Plan) -> None:
        self.name, (self.arrangement, self.ranks) = name, plan
        self.tucker: TuckerTensor | None = None
        self.lost = 0.0

    def take(self, weight: Tensor) -> None:
        """Add a weight's gradient and free it; called when the backward pass has completed it."""
        gradient, weight.grad = weight.grad, None
        assert gradient is not None
        with torch.no_grad(), torch.autocast(gradient.device.type, enabled=False):
            work = self.arrangement.arrange(gradient.to_dense()).to(default_dtype(gradient.dtype))
            if not bool(torch.isfinite(work).all()):
                raise ValueError(f"collect_gradients: the gradient of {self.name!r} has NaN or infinite entries")
            self._keep(work if self.tucker is None else work + self.tucker.to_tensor())

    def sum_over_processes(self, weight: Tensor) -> None:
        """Add up what every process has kept, and decompose the sum; one that was not reached adds nothing."""
        kept = self.tucker
        n_reached, self.lost = summed(
            torch.tensor([float(kept is not None), self.lost], dtype=torch.float64, device=weight.device)
        ).tolist()
        if n_reached:
            with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
                empty = weight.new_zeros(weight.shape, dtype=default_dtype(weight.dtype))
                self._keep(summed(self.arrangement.arrange(empty) if kept is None else kept.to_tensor()))

    def _keep(self, work: Tensor) -> None:
        """Decompose the sum so far, and note what that leaves out."""
        if all(r is None for r in self.ranks):
            self.tucker = TuckerTensor(work.contiguous(), (None,) * work.dim())
            return
        fit = ft.tucker(work, self.ranks)
        self.tucker = fit.tucker
        self.lost += fit.relative_error * float(work.norm())


@contextmanager
def _only_these_require_gradients(model: nn.Module, targets: list[Site]) -> Generator[None, None, None]:
    """Let the targets alone collect gradients; flags and gradients come back afterwards."""
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    chosen = {id(site.weight) for site in targets}
    try:
        for parameter, _, _ in before:
            parameter.grad = None
            parameter.requires_grad = id(parameter) in chosen
        yield
    finally:
        for parameter, flag, gradient in before:
            parameter.requires_grad, parameter.grad = flag, gradient
