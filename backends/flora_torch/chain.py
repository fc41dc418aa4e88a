"""Products with a Tucker tensor as chains of thin linear steps, with a backward pass that can do without memory.

A `Chain` is a plan without tensors: for each step, what it does to its input and how its matrix or kernel is made of
the parameters (the core and the factors). `run_chain` runs it. Gradients are taken by one autograd function that stores
the input, the parameters and, if asked to, the thin results between the steps; without them it computes these again.
The frozen base's own product is not part of it, so no gradient of the base's weight is ever taken.

Every step is linear in its input and in its weight, so the backward pass is made of such steps too, and differentiable.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from flora_torch._caching import cached, is_exporting, transforming
from flora_torch.step_weights import Made, Parameters, in_order
from flora_torch.steps import Convolve, Step

__all__ = [
    "Chain",
    "Frozen",
    "Memory",
    "autocasts",
    "exactly",
    "form",
    "run_chain",
    "run_step",
]

Memory: TypeAlias = Literal["normal", "low"]
MEMORIES: tuple[Memory, ...] = ("normal", "low")


@dataclass(frozen=True)
class Chain:
    """A product as steps, each with what its weight is made of.

    Parameters
    ----------
    steps : tuple of Step
        In the order in which they are taken.
    made : tuple of Made
        Their weights.
    blocked : int, optional
        With integers for input: positions with this value give no gradient.
    """

    steps: tuple[Step, ...]
    made: tuple[Made, ...]
    blocked: int | None = None


def autocasts(x: Tensor) -> bool:
    """Tell whether autocast takes products with ``x`` in another type; it knows nothing of the meta device.

    Examples
    --------
    >>> autocasts(torch.ones(1)), autocasts(torch.ones(1, device="meta"))
    (False, False)
    """
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


class Frozen(NamedTuple):
    """A frozen layer's own product, beside which a chain runs: a step with its weight and bias."""

    step: Step
    weight: Tensor
    bias: Tensor | None


# Below so many entries, what a product takes is the calls, and those of ordinary operations take least.
_SMALL = 2**15


def _is_small(x: Tensor) -> bool:
    # Autograd records volumes as PyTorch convolves them itself, which takes longer than calls.
    return x.numel() < _SMALL and x.dim() < 5


class _Plan(NamedTuple):
    """What a product is, apart from tensors."""

    chain: Chain
    low: bool
    scale: float
    # The type of the chain, and what autocast narrows the frozen layer to.
    dtype: torch.dtype
    narrow: torch.dtype | None
    beside: Step | None


def run_chain(
    chain: Chain,
    x: Tensor,
    parameters: Parameters,
    *,
    scale: float = 1.0,
    memory: Memory = "normal",
    out: Tensor | Frozen | None = None,
) -> Tensor:
    """Run a chain on ``x``.

    Parameters
    ----------
    chain : Chain
        The plan.
    x : Tensor
        The input.
    parameters : sequence of (Tensor or None)
        The core and the factors.
    scale : float
        Multiplies the core.
    memory : {"normal", "low"}
        Whether the thin results between the steps are kept for the backward pass, or computed again.
    out : Tensor or Frozen, optional
        Added to the result, in place where nobody can tell; its type is kept. Given as the frozen layer that makes it
        of ``x``, both products also write to one gradient of the input in the backward pass.

    Returns
    -------
    Tensor
        The product, or ``out`` plus the product.
    """
    core = parameters[0]
    assert core is not None
    cast = autocasts(x)
    dtype = torch.get_autocast_dtype(x.device.type) if cast else core.dtype
    (step, weight, bias), added = (out, None) if isinstance(out, Frozen) else ((None, None, None), out)
    # Autocast leaves float64 alone.
    narrow = dtype if cast and weight is not None and weight.dtype != torch.float64 else None
    plan = _Plan(chain, memory == "low", scale, dtype, narrow, step)
    with exactly(x) if cast else contextlib.nullcontext():
        known = transforming()
        if known or (not plan.low and _is_small(x if added is None else added)):
            return _run_plain(plan, x, added, weight, bias, parameters, small=not known)
        if not torch.is_grad_enabled():
            return _run(plan, x, added, weight, bias, parameters)[0]
        return _Product.apply(plan, x, added, weight, bias, *parameters)  # type: ignore[no-any-return]


def run_step(step: Step, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Run one step with a weight and a bias of which gradients may be asked.

    Parameters
    ----------
    step : Step
        The step.
    x, weight, bias : Tensor
        Its input, weight and bias.

    Returns
    -------
    Tensor
        The product; kernels whose gradient is slow in the library get it in a faster way, see `flora_torch.depthwise`.
    """
    # Autocast does not know every operation that steps are made of.
    if autocasts(x) and weight.dtype != torch.float64:
        narrow = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = _cast(x, narrow), _cast(weight, narrow), None if bias is None else _cast(bias, narrow)
    with exactly(x):
        # What a convolution pads itself is not kept, but padded again.
        ours = isinstance(step, Convolve) and (step.is_slow(x, weight) or step.pads)
        if not (ours and weight.requires_grad and torch.is_grad_enabled()) or transforming():
            return step.run(x, weight, bias)
        return _Convolution.apply(step, x, weight, bias)  # type: ignore[no-any-return]


class _Convolution(torch.autograd.Function):
    """Convolve with a kernel, whose gradient is taken as the step does, and not as the library would."""

    @staticmethod
    def forward(ctx: Any, step: Convolve, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.step = step
        ctx.save_for_backward(x, weight)
        return step.run(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, weight = ctx.saved_tensors
        (g,), (_, *needed) = grads, ctx.needs_input_grad
        with exactly(x):
            return (
                None,
                *ctx.step.gradients(g, x, weight, needed[0], needed[1]),
                g.sum([axis for axis in range(g.dim()) if axis != 1]) if needed[2] else None,
            )


def exactly(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Keep autocast out of what is cast already, or must not be."""
    kind = x.device.type
    if autocasts(x):
        return torch.autocast(kind, enabled=False)
    return contextlib.nullcontext()


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype == dtype or not x.is_floating_point() else x.to(dtype)


def _weights(chain: Chain, stages: Sequence[Sequence[Tensor]], dtype: torch.dtype) -> list[Tensor]:
    return [_cast(made.rearranged(each[-1]), dtype) for made, each in zip(chain.made, stages)]


def _stages(chain: Chain, parameters: Parameters, scale: float) -> list[list[Tensor]]:
    return [made.stages(parameters, scale) for made in chain.made]


# From so many entries of the input on, and below this rank, copying a factor costs less than it saves.
_WORTH_A_COPY = 2**15
_THIN = 16


def _laid_out(weights: list[Tensor], x: Tensor) -> list[Tensor]:
    """Lay very thin matrices out along their long axis: along the other, BLAS on a CPU takes 1.5 to 5 times as long."""
    if x.device.type != "cpu" or is_exporting() or x.numel() < _WORTH_A_COPY:
        return weights
    return [_along(w) if w.dim() == 2 and min(w.shape) < _THIN else w for w in weights]


def _along(w: Tensor) -> Tensor:
    return w.contiguous() if w.shape[0] < w.shape[1] else w.mT.contiguous().mT


def _run_plain(
    plan: _Plan,
    x: Tensor,
    out: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    parameters: Parameters,
    *,
    small: bool,
) -> Tensor:
    """Do what `_run` does by ordinary operations, which autograd and, unless ``small``, all transformations know."""
    chain, y = plan.chain, _cast(x, plan.dtype)
    if plan.beside is not None:
        out, _ = _run_frozen(plan, x, y, weight, bias)
    for step, made in zip(chain.steps, chain.made):
        w = _cast(made.weight(parameters, plan.scale), plan.dtype)
        y = step.run_small(y, w) if small else step.run(y, w)
    if chain.blocked is not None:
        # Cutting only the row of the table off would still let these positions move the other parameters.
        y = torch.where((x == chain.blocked).unsqueeze(-1), y.detach(), y)
    return y if out is None else _cast(out + y, out.dtype)


def _run_frozen(
    plan: _Plan, x: Tensor, entry: Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Run the frozen layer, narrowed where autocast narrows it; also return its weight as used."""
    assert plan.beside is not None
    assert weight is not None
    if plan.narrow is not None:
        x, weight, bias = entry, _cast(weight, plan.narrow), None if bias is None else _cast(bias, plan.narrow)
    return plan.beside.run(x, weight, bias), weight


def _run(
    plan: _Plan, x: Tensor, out: Tensor | None, weight: Tensor | None, bias: Tensor | None, parameters: Parameters
) -> tuple[Tensor, list[Tensor], Tensor | None]:
    """Run a chain, into ``out`` or the frozen layer's output; also return what is between its steps and W as used."""
    chain, entry = plan.chain, _cast(x, plan.dtype)
    given = out is not None
    weights = _laid_out(_weights(chain, _stages(chain, parameters, plan.scale), plan.dtype), entry)
    # The thin products first: what has just been made is still in the cache, until the frozen layer fills it.
    hidden = _between(chain, entry, weights)
    if plan.beside is not None:
        out, weight = _run_frozen(plan, x, entry, weight, bias)
    if out is None:
        return chain.steps[-1].run(hidden[-1], weights[-1]), hidden[1:], weight
    chain.steps[-1].add_to(out, hidden[-1], weights[-1])
    # The sum under a name of its own: `out` may be a view, and a view that is written to costs autograd a copy.
    result = torch.ops.aten._unsafe_view.default(out, out.shape) if given or out._is_view() else out
    return result, hidden[1:], weight


class _Product(torch.autograd.Function):
    """Run a chain, beside a frozen layer or not; store the input, the parameters and, unless low, what is thin."""

    @staticmethod
    def forward(
        ctx: Any,
        plan: _Plan,
        x: Tensor,
        out: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        *parameters: Tensor | None,
    ) -> Tensor:
        ctx.plan = plan
        result, thin, used = _run(plan, x, out, weight, bias, parameters)
        if plan.low:
            ctx.save_for_backward(x, weight, *parameters)
        else:
            ctx.save_for_backward(x, used, *parameters, *thin)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        chain, _, scale, dtype, narrow, beside = ctx.plan
        (g,), needed = grads, ctx.needs_input_grad[5:]
        x, weight, *rest = ctx.saved_tensors
        parameters, kept = rest[: len(needed)], rest[len(needed) :]
        with exactly(x):
            entry, stages = _cast(x, dtype), _stages(chain, parameters, scale)
            weights = _laid_out(_weights(chain, stages, dtype), entry)
            # What is stored hangs on no graph, so a second derivative needs it computed again.
            fresh = torch.is_grad_enabled() or len(kept) < len(weights) - 1
            hidden = _between(chain, entry, weights) if fresh else [entry, *kept]
            into = _cast(g, dtype)
            if chain.blocked is not None:
                into = into.masked_fill((x == chain.blocked).unsqueeze(-1), 0)
            wanted = ctx.needs_input_grad[1]
            first, found = _pull_back(chain, into, hidden, weights, (wanted and beside is None, *needed))
            gx = first if wanted else None
            if wanted and beside is not None:
                base = (g, x, weight) if narrow is None else (g, entry, _cast(weight, narrow))
                gx = _plus_grad_input(beside.grad_input(*base), chain.steps[0], first, entry, weights[0])
            sums: dict[int, Tensor] = {}
            for k, gw in found:
                gw = _cast(gw, parameters[0].dtype)
                for number, part in chain.made[k].gradients(gw, parameters, scale, stages[k]).items():
                    sums[number] = sums[number] + part if number in sums else part
        return (
            None,
            None if gx is None else _cast(gx, x.dtype),
            g if ctx.needs_input_grad[2] else None,
            None,
            None,
            *(sums.get(k) if wanted else None for k, wanted in enumerate(needed)),
        )


def form(parameters: Parameters, scale: float) -> Tensor:
    """Form the dense tensor; for its gradients nothing is stored but the parameters."""
    if transforming() or not torch.is_grad_enabled():
        return _whole(parameters).weight(parameters, scale)
    return _Formed.apply(scale, *parameters)  # type: ignore[no-any-return]


def _whole(parameters: Parameters) -> Made:
    core, *factors = parameters
    assert core is not None
    return _whole_of(core.shape, tuple(None if u is None else (u.shape[0], u.shape[1]) for u in factors))


@cached
def _whole_of(core: tuple[int, ...], factors: tuple[tuple[int, int] | None, ...]) -> Made:
    """Plan the whole tensor for a core and factors of these shapes."""
    shape = tuple(r if u is None else u[0] for r, u in zip(core, factors))
    return Made(0, in_order(range(len(core)), core, factors), shape, tuple(range(len(shape))), shape)


class _Formed(torch.autograd.Function):
    """Form the dense tensor; compute the partial products again for the gradients."""

    @staticmethod
    def forward(ctx: Any, scale: float, *parameters: Tensor | None) -> Tensor:
        ctx.scale = scale
        ctx.save_for_backward(*parameters)
        return _whole(parameters).weight(parameters, scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        parameters = ctx.saved_tensors
        with exactly(grads[0]):
            made = _whole(parameters)
            found = made.gradients(grads[0], parameters, ctx.scale, made.stages(parameters, ctx.scale))
        return (None, *(found.get(k) if ctx.needs_input_grad[1 + k] else None for k in range(len(parameters))))


def _between(chain: Chain, x: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """Return the input of every step."""
    hidden = [x]
    for step, w in zip(chain.steps[:-1], weights):
        hidden.append(step.run(hidden[-1], w))
    return hidden


def _pull_back(
    chain: Chain, g: Tensor, hidden: Sequence[Tensor], weights: Sequence[Tensor], needed: Sequence[bool]
) -> tuple[Tensor, list[tuple[int, Tensor]]]:
    """Walk the chain backward: the gradient of the input, or of the first product if that is all, and each weight's."""
    found: list[tuple[int, Tensor]] = []
    for k in range(len(chain.steps) - 1, -1, -1):
        step, made = chain.steps[k], chain.made[k]
        trained = any(needed[1 + number] for number in made.parts)
        below, gw = step.gradients(g, hidden[k], weights[k], k > 0 or needed[0], trained)
        if gw is not None:
            found.append((k, gw))
        if below is not None:
            g = below
    return g, found


def _plus_grad_input(total: Tensor, step: Step, g: Tensor, x: Tensor, w: Tensor) -> Tensor:
    """Add a step's gradient of its input to ``total``, in place where nothing is to be known of it."""
    if torch.is_grad_enabled():
        return total + step.grad_input(g, x, w)
    step.add_grad_input(total, g, x, w)
    return total
