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
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as nnf
from torch import Tensor
from torch.autograd import forward_ad
from typing_extensions import override

from flora_tensor.algebra import contraction_order, mode_dot
from flora_torch.geometry import Pads, pad, unpad

__all__ = [
    "Chain",
    "Channels",
    "Convolve",
    "Lookup",
    "Made",
    "Memory",
    "Rows",
    "Step",
    "form",
    "run_chain",
    "transforming",
]

Memory: TypeAlias = Literal["normal", "low"]
Parameters: TypeAlias = Sequence[Tensor | None]
MEMORIES: tuple[Memory, ...] = ("normal", "low")


@dataclass(frozen=True)
class Made:
    """How the weight of a step is made: the core times some factors, or one factor, with its axes rearranged.

    Parameters
    ----------
    source : int
        0 for the core, 1 + k for factor k, -1 for an identity matrix of the size ``split[-1]``.
    modes : tuple of int
        The factors by which the core is multiplied.
    split, order, shape : tuple of int
        Reshape to ``split``, permute by ``order``, reshape to ``shape``.

    Examples
    --------
    >>> made = Made(1, (), (3, 2), (1, 0), (2, 3))
    >>> made.weight([None, torch.ones(3, 2)], 1.0).shape
    torch.Size([2, 3])
    """

    source: int
    modes: tuple[int, ...]
    split: tuple[int, ...]
    order: tuple[int, ...]
    shape: tuple[int, ...]

    def weight(self, parameters: Parameters, scale: float) -> Tensor:
        """Return the step's weight; ``scale`` multiplies the core."""
        core = parameters[0]
        if self.source < 0:
            assert core is not None
            made = torch.eye(self.split[-1], dtype=core.dtype, device=core.device)
        elif self.source > 0:
            made = parameters[self.source]
            assert made is not None
        else:
            made = self._products(parameters, scale)[-1]
        return made.reshape(self.split).permute(self.order).reshape(self.shape)

    def gradients(self, g: Tensor, parameters: Parameters, scale: float) -> dict[int, Tensor]:
        """Return the gradient of each parameter by its number, for the gradient ``g`` of the weight."""
        if self.source < 0:
            return {}
        back = [self.order.index(k) for k in range(len(self.order))]
        g = g.reshape([self.split[k] for k in self.order]).permute(back)
        if self.source > 0:
            owner = parameters[self.source]
            assert owner is not None
            return {self.source: g.reshape(owner.shape)}
        found: dict[int, Tensor] = {}
        partial = self._products(parameters, scale)
        g = g.reshape(partial[-1].shape)
        for k, before in zip(reversed(self._order(parameters)), reversed(partial[:-1])):
            others = [axis for axis in range(g.dim()) if axis != k]
            found[1 + k] = torch.tensordot(g, before, dims=(others, others))  # type: ignore[arg-type]
            g = mode_dot(g, parameters[1 + k].mT, k)  # type: ignore[union-attr]
        found[0] = g if scale == 1.0 else g * scale
        return found

    def _order(self, parameters: Parameters) -> list[int]:
        shapes = [parameters[1 + k].shape for k in self.modes]  # type: ignore[union-attr]
        order = contraction_order([r for _, r in shapes], [n for n, _ in shapes])
        return [self.modes[i] for i in order]

    def _products(self, parameters: Parameters, scale: float) -> list[Tensor]:
        """Return the scaled core and what it becomes with each mode product."""
        core = parameters[0]
        assert core is not None
        partial = [core if scale == 1.0 else core * scale]
        for k in self._order(parameters) if self.modes else ():
            partial.append(_times(partial[-1], parameters[1 + k], k))  # type: ignore[arg-type]
        return partial


def _times(x: Tensor, matrix: Tensor, mode: int) -> Tensor:
    """Multiply along one mode; the bits of the result do not depend on what requires a gradient."""
    if not transforming():
        return mode_dot(x, matrix, mode)
    # torch takes a product of three axes with two in another way if an operand requires a gradient. Here, where none
    # can be detached, a trained tensor and its start would not cancel: so there are two axes.
    rows = x.movedim(mode, -1)
    return (rows.reshape(-1, matrix.shape[1]) @ matrix.mT).reshape(*rows.shape[:-1], matrix.shape[0]).movedim(-1, mode)


class Step:
    """One linear step of a chain: what it does with its input ``x`` and its weight ``w``, and its transposes."""

    def run(self, x: Tensor, w: Tensor) -> Tensor:
        """Return the product."""
        raise NotImplementedError

    def add_to(self, out: Tensor, x: Tensor, w: Tensor) -> None:
        """Add the product to ``out``, in place."""
        out.add_(self.run(x, w))

    def grad_input(self, g: Tensor, x: Tensor, w: Tensor) -> Tensor:
        """Return the input's gradient for the product's, ``g``."""
        raise NotImplementedError

    def grad_weight(self, g: Tensor, x: Tensor, w: Tensor) -> Tensor:
        """Return the weight's gradient for the product's, ``g``."""
        raise NotImplementedError


@dataclass(frozen=True)
class Rows(Step):
    """Multiply the last axis, seen as ``parts`` equal pieces, by a matrix (out, in) that all pieces share."""

    parts: int = 1

    @override
    def run(self, x: Tensor, w: Tensor) -> Tensor:
        if self.parts == 1:
            return nnf.linear(x, w)
        lead = x.shape[:-1]
        return nnf.linear(x.reshape(*lead, self.parts, w.shape[1]), w).reshape(*lead, self.parts * w.shape[0])

    @override
    def add_to(self, out: Tensor, x: Tensor, w: Tensor) -> None:
        if out.is_contiguous() and out.dtype == x.dtype:
            out.view(-1, w.shape[0]).addmm_(x.reshape(-1, w.shape[1]), w.mT)
        else:
            out.add_(self.run(x, w))

    @override
    def grad_input(self, g: Tensor, x: Tensor, w: Tensor) -> Tensor:
        if self.parts == 1:
            return g @ w
        return (g.reshape(-1, w.shape[0]) @ w).reshape(x.shape)

    @override
    def grad_weight(self, g: Tensor, x: Tensor, w: Tensor) -> Tensor:
        g, x = g.reshape(-1, w.shape[0]), x.reshape(-1, w.shape[1])
        return _thin_first(g, x)


def _thin_first(g: Tensor, x: Tensor) -> Tensor:
    """Compute gᵀx, with the thinner of the two transposed: BLAS takes half the time of the other order."""
    return g.mT @ x if g.shape[-1] <= x.shape[-1] else (x.mT @ g).mT


@dataclass(frozen=True)
class Channels(Step):
    """Multiply axis 1 by a matrix (out, in): a 1×1 convolution whose kernel is shared by all groups."""

    groups: int = 1

    @override
    def run(self, x: Tensor, w: Tensor) -> Tensor:
        if self._is_last(x):
            return nnf.linear(x.movedim(1, -1), w).movedim(-1, 1)
        flat = self._flat(x)
        return torch.bmm(w.expand(flat.shape[0], *w.shape), flat).reshape(x.shape[0], -1, *x.shape[2:])

    @override
    def add_to(self, out: Tensor, x: Tensor, w: Tensor) -> None:
        if out.dtype == x.dtype and out.is_contiguous():
            flat = self._flat(x)
            target = out.view(flat.shape[0], w.shape[0], flat.shape[2])
            target.baddbmm_(w.expand(flat.shape[0], *w.shape), flat)
        elif out.dtype == x.dtype and self._is_last(out):
            rows = out.movedim(1, -1)
            rows.view(-1, w.shape[0]).addmm_(x.movedim(1, -1).reshape(-1, w.shape[1]), w.mT)
        else:
            out.add_(self.run(x, w))

    @override
    def grad_input(self, g: Tensor, x: Tensor, w: Tensor) -> Tensor:
        return self.run(g, w.mT)

    @override
    def grad_weight(self, g: Tensor, x: Tensor, w: Tensor) -> Tensor:
        if self._is_last(x):
            return _thin_first(g.movedim(1, -1).reshape(-1, w.shape[0]), x.movedim(1, -1).reshape(-1, w.shape[1]))
        return torch.bmm(self._flat(g), self._flat(x).mT).sum(0)

    def _is_last(self, x: Tensor) -> bool:
        """Tell whether the channels are neighbors in memory, so that positions are the rows of a matrix."""
        return self.groups == 1 and x.shape[1] > 1 and x.movedim(1, -1).is_contiguous()

    def _flat(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0] * self.groups, x.shape[1] // self.groups, -1)


@dataclass(frozen=True)
class Convolve(Step):
    """Convolve, forward or transposed, with a small kernel.

    ``folded`` groups share the kernel and are folded into the batch; ``groups`` have parts of it. ``pads`` are
    written out before the convolution, ``padding`` is left to it.
    """

    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[int, ...]
    output_padding: tuple[int, ...]
    transposed: bool
    groups: int
    folded: int
    pads: Pads
    padding_mode: str

    @override
    def run(self, x: Tensor, w: Tensor) -> Tensor:
        return self._unfold(torch.convolution(self._prepare(x), w, None, *self._options))

    @override
    def grad_input(self, g: Tensor, x: Tensor, w: Tensor) -> Tensor:
        padded = self._prepare(x)
        back: Any = torch.ops.aten.convolution_backward.default
        g, _, _ = back(self._fold(g), padded, w, None, *self._options, (True, False, False))
        return self._unfold(unpad(g, self.pads, self.padding_mode))

    @override
    def grad_weight(self, g: Tensor, x: Tensor, w: Tensor) -> Tensor:
        back: Any = torch.ops.aten.convolution_backward.default
        return back(self._fold(g), self._prepare(x), w, None, *self._options, (False, True, False))[1]

    @property
    def _options(self) -> tuple[Any, ...]:
        steps = (self.stride, self.padding, self.dilation)
        return (*steps, self.transposed, self.output_padding, self.groups)

    def _prepare(self, x: Tensor) -> Tensor:
        x = self._fold(x)
        return pad(x, self.pads, self.padding_mode) if self.pads else x

    def _fold(self, x: Tensor) -> Tensor:
        if self.folded == 1:
            return x
        return x.reshape(x.shape[0] * self.folded, x.shape[1] // self.folded, *x.shape[2:])

    def _unfold(self, x: Tensor) -> Tensor:
        if self.folded == 1:
            return x
        return x.reshape(x.shape[0] // self.folded, x.shape[1] * self.folded, *x.shape[2:])


@dataclass(frozen=True)
class Lookup(Step):
    """Look up rows of a table (rows, rank) by integers."""

    @override
    def run(self, x: Tensor, w: Tensor) -> Tensor:
        return nnf.embedding(x, w)

    @override
    def grad_weight(self, g: Tensor, x: Tensor, w: Tensor) -> Tensor:
        back: Any = torch.ops.aten.embedding_dense_backward.default
        return back(g, x, w.shape[0], -1, False)


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

    def weights(self, parameters: Parameters, scale: float) -> list[Tensor]:
        """Make the weights of all steps."""
        return [made.weight(parameters, scale) for made in self.made]


def transforming() -> bool:
    """Tell whether something else than plain autograd looks on: compilation, torch.func, or forward-mode gradients.

    Then only ordinary operations will do: each of these sees through them, and decides itself what is stored.
    """
    if torch.compiler.is_compiling():
        return True
    internals: Any = torch
    levels: Any = forward_ad
    return bool(internals._C._are_functorch_transforms_active()) or levels._current_level >= 0


def compute_dtype(x: Tensor, core: Tensor) -> torch.dtype:
    """Return the type that products are computed in: autocast's, or the parameters'."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else core.dtype


def run_chain(
    chain: Chain,
    x: Tensor,
    parameters: Parameters,
    *,
    scale: float = 1.0,
    memory: Memory = "normal",
    out: Tensor | None = None,
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
    out : Tensor, optional
        Added to the result, in place where nobody can tell; its type is kept.

    Returns
    -------
    Tensor
        The product, or ``out`` plus the product.
    """
    core = parameters[0]
    assert core is not None
    dtype = compute_dtype(x, core)
    if transforming():
        with _exactly(x):
            result = _run_plain(chain, x, parameters, scale, dtype)
            return result if out is None else (out + result).to(out.dtype)
    if not torch.is_grad_enabled():
        return _run(chain, x, parameters, scale, dtype, out)[0]
    return _Product.apply(chain, memory == "low", scale, dtype, out, x, *parameters)  # type: ignore[no-any-return]


def _exactly(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Keep autocast out of what is cast already."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return contextlib.nullcontext()


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if x.is_floating_point() else x


def _run_plain(chain: Chain, x: Tensor, parameters: Parameters, scale: float, dtype: torch.dtype) -> Tensor:
    """Run a chain by ordinary operations, which autograd and all transformations know."""
    weights = [w.to(dtype) for w in chain.weights(parameters, scale)]
    y = _cast(x, dtype)
    for step, w in zip(chain.steps, weights):
        y = step.run(y, w)
    if chain.blocked is None:
        return y
    # Cutting only the row of the table off would still let these positions move the other parameters.
    return torch.where((x == chain.blocked).unsqueeze(-1), y.detach(), y)


def _run(
    chain: Chain, x: Tensor, parameters: Parameters, scale: float, dtype: torch.dtype, out: Tensor | None
) -> tuple[Tensor, list[Tensor]]:
    """Run a chain, into ``out`` where it is given; also return the thin results between the steps."""
    with _exactly(x):
        weights = [w.to(dtype) for w in chain.weights(parameters, scale)]
        hidden = _between(chain, _cast(x, dtype), weights)
        if out is None:
            return chain.steps[-1].run(hidden[-1], weights[-1]), hidden[1:]
        chain.steps[-1].add_to(out, hidden[-1], weights[-1])
        # The sum under a name of its own: `out` may be a view, and a view that is written to costs autograd a copy.
        return torch.ops.aten._unsafe_view.default(out, out.shape), hidden[1:]


class _Product(torch.autograd.Function):
    """Run a chain and add it to ``out``; store the input, the parameters and, unless ``low``, the thin results."""

    @staticmethod
    def forward(
        ctx: Any,
        chain: Chain,
        low: bool,
        scale: float,
        dtype: torch.dtype,
        out: Tensor | None,
        x: Tensor,
        *parameters: Tensor | None,
    ) -> Tensor:
        ctx.plan = (chain, low, scale, dtype)
        result, thin = _run(chain, x, parameters, scale, dtype, out)
        ctx.save_for_backward(x, *parameters, *([] if low else thin))
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        chain, _, scale, dtype = ctx.plan
        n = len(ctx.needs_input_grad) - 6
        x, *rest = ctx.saved_tensors
        parameters, kept = rest[:n], rest[n:]
        (g,) = grads
        with _exactly(x):
            entry, weights = _cast(x, dtype), [w.to(dtype) for w in chain.weights(parameters, scale)]
            # What is stored hangs on no graph, so a second derivative needs it computed again.
            fresh = torch.is_grad_enabled() or len(kept) < len(weights) - 1
            hidden = _between(chain, entry, weights) if fresh else [entry, *kept]
            into = _cast(g, dtype)
            if chain.blocked is not None:
                into = into.masked_fill((x == chain.blocked).unsqueeze(-1), 0)
            gx, found = _pull_back(chain, into, hidden, weights, ctx.needs_input_grad[5:])
            total: dict[int, Tensor] = {}
            for made, gw in found:
                for number, part in made.gradients(gw.to(parameters[0].dtype), parameters, scale).items():
                    total[number] = total[number] + part if number in total else part
        return (
            *(None,) * 4,
            g if ctx.needs_input_grad[4] else None,
            None if gx is None else gx.to(x.dtype),
            *(total.get(k) if ctx.needs_input_grad[6 + k] else None for k in range(n)),
        )


def form(parameters: Parameters, scale: float) -> Tensor:
    """Form the dense tensor; for its gradients nothing is stored but the parameters."""
    if transforming():
        return _whole(parameters).weight(parameters, scale)
    if not torch.is_grad_enabled():
        return _form_detached(scale, parameters)
    return _Formed.apply(scale, *parameters)  # type: ignore[no-any-return]


def _form_detached(scale: float, parameters: Parameters) -> Tensor:
    # torch takes a batched product in another way if an operand requires a gradient, and the last bits of a trained
    # tensor would not be those of its start.
    given = [p if p is None else p.detach() for p in parameters]
    return _whole(given).weight(given, scale)


def _whole(parameters: Parameters) -> Made:
    core = parameters[0]
    assert core is not None
    modes = tuple(k for k, u in enumerate(parameters[1:]) if u is not None)
    shape = tuple(r if u is None else u.shape[0] for r, u in zip(core.shape, parameters[1:]))
    return Made(0, modes, shape, tuple(range(len(shape))), shape)


class _Formed(torch.autograd.Function):
    """Form the dense tensor; compute the partial products again for the gradients."""

    @staticmethod
    def forward(ctx: Any, scale: float, *parameters: Tensor | None) -> Tensor:
        ctx.scale = scale
        ctx.save_for_backward(*parameters)
        return _form_detached(scale, parameters)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        parameters = ctx.saved_tensors
        with _exactly(grads[0]):
            found = _whole(parameters).gradients(grads[0], parameters, ctx.scale)
        return (None, *(found.get(k) if ctx.needs_input_grad[1 + k] else None for k in range(len(parameters))))


def _between(chain: Chain, x: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """Return the input of every step."""
    hidden = [x]
    for step, w in zip(chain.steps[:-1], weights):
        hidden.append(step.run(hidden[-1], w))
    return hidden


def _pull_back(
    chain: Chain, g: Tensor, hidden: Sequence[Tensor], weights: Sequence[Tensor], needed: Sequence[bool]
) -> tuple[Tensor | None, list[tuple[Made, Tensor]]]:
    """Walk the chain backward: the input's gradient, and that of each step's weight."""
    found: list[tuple[Made, Tensor]] = []
    for k in range(len(chain.steps) - 1, -1, -1):
        step, made = chain.steps[k], chain.made[k]
        numbers = [made.source, *(1 + m for m in made.modes)]
        if any(number >= 0 and needed[1 + number] for number in numbers):
            found.append((made, step.grad_weight(g, hidden[k], weights[k])))
        if k == 0 and not needed[0]:
            return None, found
        g = step.grad_input(g, hidden[k], weights[k])
    return g, found
