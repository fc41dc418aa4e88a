"""The gradients of a depthwise convolution, where the library's own are slow.

oneDNN convolves quickly, channel by channel, but takes the kernel's gradient as quickly only for small kernels that are
not dilated: for 7×7 it needs three times as long as for all the rest of a step. Yet that gradient is a depthwise
convolution itself:

    ∂L/∂W[c, p] = Σ_n Σ_i g[n, c, i] · x[n, c, s·i + d·p]

walks along p over the input, with the output's gradient for a kernel, stride and dilation exchanged, and each image and
channel a group of its own. This takes as long as the forward pass does.

The input's gradient takes longer than the forward pass too: 1.1 to 2 times as long, 7 to 9 times for dilated kernels.
With stride 1 it is a depthwise convolution as well, of the output's gradient with the kernel turned around:

    ∂L/∂x[n, c, j] = Σ_p g[n, c, j − d·p] · W[c, p]
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["HAS_ONEDNN", "has_slow_kernel_gradient", "input_gradient", "kernel_gradient"]

# What is convolved at once should stay in the cache: elements of the input, 2 MiB in float32.
_AT_ONCE = 2**19
# A property of the build, asked once: compilers do not trace the question.
HAS_ONEDNN = torch.backends.mkldnn.is_available()
# Up to so many taps, not dilated, the library's own gradient is as fast.
_FEW_TAPS = 9


def has_slow_kernel_gradient(x: Tensor, kernel: Sequence[int], dilation: Sequence[int], groups: int) -> bool:
    """Tell whether `kernel_gradient` is faster than the library: for large depthwise kernels, on a CPU.

    Parameters
    ----------
    x : Tensor, shape (batch, channels, *sizes)
        The convolution's input.
    kernel, dilation : sequence of int
        The kernel's sizes and its dilation, one a spatial axis.
    groups : int
        The convolution's groups.

    Returns
    -------
    bool
        Whether it is.

    Examples
    --------
    >>> has_slow_kernel_gradient(torch.ones(1, 4, 9, 9), (3, 3), (1, 1), 4)
    False
    """
    if groups == 1 or groups != x.shape[1] or x.device.type != "cpu" or x.numel() == 0:
        return False
    if x.dtype not in (torch.float32, torch.bfloat16) or not HAS_ONEDNN:
        return False
    return math.prod(kernel) > _FEW_TAPS or max(dilation) > 1


def input_gradient(g: Tensor, w: Tensor, *, padding: Sequence[int], dilation: Sequence[int]) -> Tensor:
    """Compute the input's gradient of a depthwise convolution with stride 1 that pads no more than the kernel reaches.

    Parameters
    ----------
    g : Tensor, shape (batch, channels, *output sizes)
        The output's gradient.
    w : Tensor, shape (channels, 1, *kernel)
        The kernel.
    padding, dilation : sequence of int
        As the convolution has them, one a spatial axis.

    Returns
    -------
    Tensor, shape (batch, channels, *sizes)
        The gradient.

    Examples
    --------
    >>> g, w = torch.tensor([[[1.0, 0.0, 0.0]]]), torch.tensor([[[2.0, 3.0]]])
    >>> input_gradient(g, w, padding=(0,), dilation=(1,)).tolist()
    [[[2.0, 3.0, 0.0, 0.0]]]
    """
    n = len(padding)
    rest = [d * (size - 1) - p for d, size, p in zip(dilation, w.shape[2:], padding)]
    turned = w.flip(list(range(2, 2 + n)))
    return torch.convolution(g, turned, None, [1] * n, rest, dilation, False, [0] * n, w.shape[0])


def kernel_gradient(
    g: Tensor,
    x: Tensor,
    kernel: Sequence[int],
    *,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool = False,
) -> Tensor:
    """Compute the kernel's gradient of a depthwise convolution, some images at a time.

    Parameters
    ----------
    g : Tensor, shape (batch, channels · multiplier, *output sizes)
        The output's gradient.
    x : Tensor, shape (batch, channels, *sizes)
        The input.
    kernel, stride, padding, dilation : sequence of int
        As the convolution has them, one a spatial axis.
    transposed : bool
        Whether the convolution is transposed.

    Returns
    -------
    Tensor, shape (channels · multiplier, 1, *kernel), transposed (channels, multiplier, *kernel)
        The gradient, summed over the images in float32 for 16-bit types.

    Examples
    --------
    >>> g, x = torch.ones(1, 2, 3), torch.tensor([[[1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 1.0, 0.0]]])
    >>> kernel_gradient(g, x, (2,), stride=(1,), padding=(0,), dilation=(1,)).tolist()
    [[[6.0, 9.0]], [[1.0, 1.0]]]
    """
    channels, multiplier = g.shape[1], g.shape[1] // x.shape[1]
    # A transposed convolution walks over its output.
    walked, walker = (g, x) if transposed else (x, g)
    at_once = max(1, _AT_ONCE // walked[0].numel())
    total: Tensor | None = None
    for k in range(0, x.shape[0], at_once):
        a, b = (_each_channel(t[k : k + at_once], channels) for t in (walked, walker))
        groups = a.shape[0] * channels
        a, b = a.reshape(1, groups, *a.shape[2:]), b.reshape(groups, 1, *b.shape[2:])
        part = torch.convolution(a, b, None, dilation, padding, stride, False, [0] * len(kernel), groups)
        if part.shape[2:] != tuple(kernel):
            # With a stride, the input may reach further than the kernel ever did.
            part = part[(..., *(slice(n) for n in kernel))]
        part = part.reshape(-1, channels, *kernel).sum(0, dtype=torch.float32 if x.dtype.itemsize == 2 else None)
        total = part if total is None else total + part
    assert total is not None
    shape = (x.shape[1], multiplier) if transposed else (channels, 1)
    return total.reshape(*shape, *kernel).to(x.dtype)


def _each_channel(x: Tensor, channels: int) -> Tensor:
    """Repeat the input's channels where each has several kernels."""
    return x if x.shape[1] == channels else x.repeat_interleave(channels // x.shape[1], 1)
