"""The linear steps that chains of thin products are made of; each knows its transposes, so gradients are steps too."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor
from typing_extensions import override

from flora_torch._caching import transforming
from flora_torch.depthwise import HAS_ONEDNN, has_slow_kernel_gradient, input_gradient, kernel_gradient
from flora_torch.geometry import Pads, pad, unpad

__all__ = ["Channels", "Columns", "Convolve", "Lookup", "Rows", "Step"]


class Step:
    """One linear step: what it does with its input ``x`` and its weight ``w``, and its transposes."""

    def run(self, x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return the product; only steps that a layer's own base may be take a bias."""
        raise NotImplementedError

    def run_small(self, x: Tensor, w: Tensor) -> Tensor:
        """Return the product by what takes least where input and weight are small; autograd alone knows it."""
        return self.run(x, w)

    def add_to(self, out: Tensor, x: Tensor, w: Tensor) -> None:
        """Add the product to ``out``, in place."""
        out.add_(self.run(x, w))

    def grad_input(self, g: Tensor, x: Tensor, w: Tensor) -> Tensor:
        """Return the input's gradient for the product's, ``g``."""
        raise NotImplementedError

    def add_grad_input(self, total: Tensor, g: Tensor, x: Tensor, w: Tensor) -> None:
        """Add the input's gradient to ``total``, in place."""
        total.add_(self.grad_input(g, x, w))

    def gradients(
        self, g: Tensor, x: Tensor, w: Tensor, of_input: bool, of_weight: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return those gradients that are asked for."""
        return self.grad_input(g, x, w) if of_input else None, self.grad_weight(g, x, w) if of_weight else None

    def grad_weight(self, g: Tensor, x: Tensor, w: Tensor) -> Tensor:
        """Return the weight's gradient for the product's, ``g``."""
        raise NotImplementedError


@dataclass(frozen=True)
class Rows(Step):
    """Multiply the last axis, seen as ``parts`` equal pieces, by a matrix (out, in) that all pieces share."""

    parts: int = 1

    @override
    def run(self, x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
        if self.parts == 1:
            return nnf.linear(x, w, bias)
        lead = x.shape[:-1]
        return nnf.linear(x.reshape(*lead, self.parts, w.shape[1]), w).reshape(*lead, self.parts * w.shape[0])

    @override
    def add_to(self, out: Tensor, x: Tensor, w: Tensor) -> None:
        if out.is_contiguous() and out.dtype == x.dtype:
            _as_rows(out, w.shape[0]).addmm_(_as_rows(x, w.shape[1]), w.mT)
        else:
            out.add_(self.run(x, w))

    @override
    def grad_input(self, g: Tensor, x: Tensor, w: Tensor) -> Tensor:
        product = _as_rows(g, w.shape[0]) @ w
        return product if product.shape == x.shape else product.reshape(x.shape)

    @override
    def add_grad_input(self, total: Tensor, g: Tensor, x: Tensor, w: Tensor) -> None:
        self.add_to(total, g, w.mT)

    @override
    def grad_weight(self, g: Tensor, x: Tensor, w: Tensor) -> Tensor:
        return _thin_first(_as_rows(g, w.shape[0]), _as_rows(x, w.shape[1]))


@dataclass(frozen=True)
class Columns(Rows):
    """Multiply the last axis by a matrix (in, out), as factors are stored: transposed, it is a view more to record."""

    @override
    def run(self, x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
        return x @ w if self.parts == 1 else super().run(x, w.mT)

    @override
    def add_to(self, out: Tensor, x: Tensor, w: Tensor) -> None:
        super().add_to(out, x, w.mT)

    @override
    def grad_input(self, g: Tensor, x: Tensor, w: Tensor) -> Tensor:
        return super().grad_input(g, x, w.mT)

    @override
    def add_grad_input(self, total: Tensor, g: Tensor, x: Tensor, w: Tensor) -> None:
        Rows.add_to(self, total, g, w)

    @override
    def grad_weight(self, g: Tensor, x: Tensor, w: Tensor) -> Tensor:
        return super().grad_weight(g, x, w.mT).mT


def _as_rows(x: Tensor, n: int) -> Tensor:
    return x if x.dim() == 2 and x.shape[1] == n else x.reshape(-1, n)


def _thin_first(g: Tensor, x: Tensor) -> Tensor:
    """Compute gᵀx with the thinner one first: BLAS takes half the time of the other order."""
    return g.mT @ x if g.shape[-1] <= x.shape[-1] else (x.mT @ g).mT


@dataclass(frozen=True)
class Channels(Step):
    """Multiply axis 1 by a matrix (out, in): a 1×1 convolution whose kernel is shared by all groups."""

    groups: int = 1

    @override
    def run(self, x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
        if self._is_last(x):
            return nnf.linear(x.movedim(1, -1), w).movedim(-1, 1)
        flat = self._flat(x)
        product = torch.bmm(w.expand(flat.shape[0], *w.shape), flat)
        return product.reshape(x.shape[0], self.groups * w.shape[0], *x.shape[2:])

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
    def add_grad_input(self, total: Tensor, g: Tensor, x: Tensor, w: Tensor) -> None:
        self.add_to(total, g, w.mT)

    @override
    def grad_weight(self, g: Tensor, x: Tensor, w: Tensor) -> Tensor:
        if self._is_last(x):
            return _thin_first(g.movedim(1, -1).reshape(-1, w.shape[0]), x.movedim(1, -1).reshape(-1, w.shape[1]))
        g, x = self._flat(g), self._flat(x)
        # `@` takes a fifth longer than `bmm` where the pieces are small.
        return (torch.bmm(g, x.mT) if g.shape[1] <= x.shape[1] else torch.bmm(x, g.mT).mT).sum(0)

    def _is_last(self, x: Tensor) -> bool:
        """Tell whether the channels are neighbors in memory, so that positions are the rows of a matrix."""
        return x.stride(1) == 1 and self.groups == 1 and x.shape[1] > 1 and x.movedim(1, -1).is_contiguous()

    def _flat(self, x: Tensor) -> Tensor:
        # Spelled out: of an empty batch, no size could be left to be found.
        return x.reshape(x.shape[0] * self.groups, x.shape[1] // self.groups, math.prod(x.shape[2:]))


# Up to so many entries, the last axis left out, PyTorch convolves one image or volume itself.
_OVERLOOKED = 20480

# So many entries has the input of a convolution as a matrix, each once for every tap, that is tiny.
_TINY = 2**16


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
    # A frozen layer's own convolution, whose result is the layer's to the last bit.
    own: bool = False
    # As torch's operations take them.
    _options: tuple[Any, ...] = field(init=False, repr=False, compare=False)

    @override
    def run(self, x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
        x = self._prepare(x)
        if self._is_overlooked(x):
            return self._unfold(torch.convolution(x.to_mkldnn(), w, bias, *self._options).to_dense())
        return self._unfold(torch.convolution(x, w, bias, *self._options))

    @override
    def run_small(self, x: Tensor, w: Tensor) -> Tensor:
        if not self._is_tiny(x, w):
            return self.run(x, w)
        plain: Any = torch.ops.aten.thnn_conv2d.default
        return plain(x, w, w.shape[2:], None, self.stride, self.padding)

    def _is_tiny(self, x: Tensor, w: Tensor) -> bool:
        """Tell whether a convolution takes less as a matrix product than what oneDNN needs to begin with one."""
        apart = self.groups > 1 or self.folded > 1 or self.pads or self.transposed or self.dilation != (1, 1)
        if apart or x.dim() != 4 or type(x) is not Tensor or x.device.type != "cpu":
            return False
        # The operation reads the order of memory off the strides: there must be no doubt about it.
        sure = x.is_contiguous() and w.is_contiguous() and min(x.shape[1], x.shape[3], w.shape[3]) > 1
        return sure and 0 < x.numel() * math.prod(w.shape[2:]) < _TINY

    @override
    def grad_input(self, g: Tensor, x: Tensor, w: Tensor) -> Tensor:
        if self.is_slow(x, w) and self._is_mirrored(w):
            gx = input_gradient(g, w, padding=self.padding, dilation=self.dilation)
            return unpad(gx, self.pads, self.padding_mode)
        found = self._library(g, x, w, True, False)[0]
        assert found is not None
        return found

    @override
    def grad_weight(self, g: Tensor, x: Tensor, w: Tensor) -> Tensor:
        if self.is_slow(x, w):
            steps = {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}
            return kernel_gradient(g, self._prepare(x), w.shape[2:], **steps, transposed=self.transposed)
        found = self._library(g, x, w, False, True)[1]
        assert found is not None
        return found

    @override
    def gradients(
        self, g: Tensor, x: Tensor, w: Tensor, of_input: bool, of_weight: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        if self.is_slow(x, w):
            return super().gradients(g, x, w, of_input, of_weight)
        return self._library(g, x, w, of_input, of_weight)

    def _library(
        self, g: Tensor, x: Tensor, w: Tensor, of_input: bool, of_weight: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Take the gradients as the library does, both in one operation."""
        back: Any = torch.ops.aten.convolution_backward.default
        g, x = self._fold(g), self._prepare(x)
        overlooked = self._is_overlooked(x)
        if overlooked:
            g, x = g.to_mkldnn(), x.to_mkldnn()
        gx, gw, _ = back(g, x, w, None, *self._options, (of_input, of_weight, False))
        if overlooked:
            gx, gw = (None if found is None else found.to_dense() for found in (gx, gw))
        return None if gx is None else self._unfold(unpad(gx, self.pads, self.padding_mode)), gw

    def is_slow(self, x: Tensor, w: Tensor) -> bool:
        """Tell whether the library's own gradients are slow, that of the kernel above all."""
        return has_slow_kernel_gradient(x, w.shape[2:], self.dilation, self.groups)

    def _is_overlooked(self, x: Tensor) -> bool:
        """Tell whether PyTorch would convolve a volume itself, where oneDNN takes a fifth of the time.

        PyTorch leaves one volume to oneDNN by its size, of which it forgets the last axis, and a tensor in oneDNN's own
        layout always.
        """
        if len(self.stride) < 3 or x.shape[0] != 1 or self.own or self.transposed or self.groups > 1:
            return False
        if torch.is_grad_enabled() or transforming():  # asked first: compilers trace nothing of what follows
            return False
        known = type(x) is Tensor and x.device.type == "cpu" and x.dtype == torch.float32
        return known and 0 < x.numel() <= _OVERLOOKED * x.shape[-1] and HAS_ONEDNN

    def _is_mirrored(self, w: Tensor) -> bool:
        """Tell whether `input_gradient` can: one kernel a channel, stride 1, no more padding than kernel."""
        reaches = [d * (n - 1) for d, n in zip(self.dilation, w.shape[2:])]
        alone = w.shape[0] == self.groups and not self.transposed and max(self.stride) == 1
        return alone and all(p <= reach for p, reach in zip(self.padding, reaches))

    def __post_init__(self) -> None:
        steps = (self.stride, self.padding, self.dilation)
        object.__setattr__(self, "_options", (*steps, self.transposed, self.output_padding, self.groups))

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
    def run(self, x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
        return nnf.embedding(x, w)

    @override
    def grad_weight(self, g: Tensor, x: Tensor, w: Tensor) -> Tensor:
        back: Any = torch.ops.aten.embedding_dense_backward.default
        return back(g, x, w.shape[0], -1, False)
