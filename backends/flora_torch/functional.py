"""The product ΔW·x of a Tucker tensor ΔW with the input of a layer, without forming ΔW.

Everything here is a pure function of tensors: no module, no state. A factor that is ``None`` stands for the identity.

`flora_torch.plans` says which thin products each of them is. All of it is exact.
"""

from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from flora_tensor.arrangement import Arrangement
from flora_torch.chain import Chain, Frozen, Memory, exactly, form, run_chain
from flora_torch.cost import n_rows
from flora_torch.geometry import ConvGeometry
from flora_torch.plans import Shapes, Sides, Split, conv_chain, embedding_chain, linear_chain

__all__ = [
    "ConvGeometry",
    "dense_delta",
    "tucker_conv",
    "tucker_conv_transpose",
    "tucker_embedding",
    "tucker_linear",
]

Factors: TypeAlias = Sequence[Tensor | None]
Path: TypeAlias = Literal["auto", "factored", "dense"]
_MATRIX: Sides = ((0,), (1,))
_MATRIX_TRANSPOSED: Sides = ((1,), (0,))


def tucker_linear(
    x: Tensor, core: Tensor, factors: Factors, *, transposed: bool = False, memory: Memory = "normal"
) -> Tensor:
    """Multiply by a Tucker matrix: y = x ΔWᵀ with ΔW = U_0 G U_1ᵀ.

    Takes tokens · (in · r_1 + r_1 · r_0 + r_0 · out) multiply-adds and forms nothing of ΔW's size.

    Parameters
    ----------
    x : Tensor, shape (…, in)
        The input.
    core : Tensor, shape (r_0, r_1)
        The core G.
    factors : sequence of (Tensor or None)
        U_0 of shape (out, r_0) and U_1 of shape (in, r_1).
    transposed : bool
        The weight is stored as (in, out), as in Hugging Face's ``Conv1D``: y = x ΔW.
    memory : {"normal", "low"}
        Whether the thin results between the products are kept for the backward pass, or computed again in it.

    Returns
    -------
    Tensor, shape (…, out)
        The product.

    References
    ----------
    FLoRA, arXiv 2405.14739, for two modes.

    Examples
    --------
    >>> import torch
    >>> x, core = torch.ones(5, 4), torch.ones(2, 2)
    >>> tucker_linear(x, core, [torch.ones(3, 2), torch.ones(4, 2)]).shape
    torch.Size([5, 3])
    """
    sides = _MATRIX_TRANSPOSED if transposed else _MATRIX
    chain = linear_chain(n_rows(x.shape[:-1]), shapes_of(core, factors), sides)
    return run_rows(chain, x, (core, *factors), memory=memory)


def tucker_embedding(
    ids: Tensor,
    core: Tensor,
    factors: Factors,
    *,
    padding_idx: int | None = None,
    memory: Memory = "normal",
) -> Tensor:
    """Look up rows of a Tucker matrix ΔW = U_0 G U_1ᵀ.

    Parameters
    ----------
    ids : Tensor of integers, any shape
        The rows.
    core : Tensor, shape (r_0, r_1)
        The core G.
    factors : sequence of (Tensor or None)
        U_0 of shape (rows, r_0) and U_1 of shape (dim, r_1).
    padding_idx : int, optional
        A row that gets no gradient, as in `torch.nn.functional.embedding`; its value is looked up like any other.
    memory : {"normal", "low"}
        Whether the thin results between the products are kept for the backward pass, or computed again in it.

    Returns
    -------
    Tensor, shape (*ids.shape, dim)
        The rows.

    References
    ----------
    FLoRA, arXiv 2405.14739, for two modes.

    Examples
    --------
    >>> import torch
    >>> rows = tucker_embedding(torch.tensor([0, 2]), torch.ones(1, 1), [torch.tensor([[1.0], [2.0], [3.0]]), None])
    >>> rows.tolist()
    [[1.0], [3.0]]
    """
    chain = embedding_chain(shapes_of(core, factors), padding_idx)
    return run_chain(chain, ids, (core, *factors), memory=memory)


def dense_delta(
    core: Tensor,
    factors: Factors,
    *,
    arrangement: Arrangement | None = None,
    shape: Sequence[int] | None = None,
    scale: float = 1.0,
) -> Tensor:
    """Form ΔW, in the weight's own shape.

    Computed with autocast off: a small change that is rounded to 16 bits on the way would lose most of itself. For the
    gradients nothing is stored but the core and the factors.

    Parameters
    ----------
    core : Tensor, shape (r_0, …)
        The core.
    factors : sequence of (Tensor or None)
        One factor a mode of the arranged tensor.
    arrangement : Arrangement, optional
        Which axes of the weight form a mode; by default each its own.
    shape : sequence of int, optional
        The weight's shape; needed with an arrangement that is not native.
    scale : float
        Multiplies the core.

    Returns
    -------
    Tensor, shape ``shape``
        The dense change.

    Raises
    ------
    ValueError
        If the arrangement does not make the tensor's shape of ``shape``.

    Examples
    --------
    >>> import torch
    >>> core, factors = torch.ones(1, 1), [torch.ones(6, 1), torch.ones(4, 1)]
    >>> dense_delta(core, factors, arrangement=Arrangement("(o h) (i w)"), shape=(3, 2, 2, 2)).shape
    torch.Size([3, 2, 2, 2])
    """
    with exactly(core):
        tensor = form((core, *factors), scale)
        if arrangement is None or arrangement.is_native:
            return tensor
        return arrangement.restore(tensor, tuple(tensor.shape) if shape is None else tuple(shape))


def tucker_conv(
    x: Tensor,
    core: Tensor,
    factors: Factors,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
    arrangement: Arrangement | None = None,
    shape: Sequence[int] | None = None,
    memory: Memory = "normal",
) -> Tensor:
    """Convolve with a Tucker kernel, in one to three dimensions, without forming the kernel.

    Parameters
    ----------
    x : Tensor, shape (batch, in, *sizes) or (in, *sizes)
        The input.
    core : Tensor, shape (r_0, r_1, *kernel ranks), or (r_0, r_1) with an arrangement of two modes
        The core.
    factors : sequence of (Tensor or None)
        U_0 (out, r_0), U_1 (in/groups, r_1) and one factor per kernel axis; or one per mode of the arrangement.
    stride, padding, dilation, groups, padding_mode
        As `torch.nn.Conv2d` takes them, ``padding="same"`` and ``"valid"`` included.
    arrangement : Arrangement, optional
        The native one by default; or one with two modes, of which the first holds the weight's first axis and the
        second its second, such as ``o (i h w)`` and ``(o h) (i w)``.
    shape : sequence of int, optional
        The weight's shape (out, in/groups, *kernel); needed with an arrangement.
    memory : {"normal", "low"}
        Whether the thin results between the products are kept for the backward pass, or computed again in it.

    Returns
    -------
    Tensor, shape (batch, out, *output sizes) or (out, *output sizes)
        The convolution, without a bias.

    Raises
    ------
    ValueError
        If the arrangement has no factored form, or needs ``shape`` and there is none.

    References
    ----------
    Kim et al., *Compression of deep convolutional neural networks for fast and low power mobile applications*, ICLR
    2016, for the three steps; Jaderberg et al., *Speeding up convolutional neural networks with low rank expansions*,
    BMVC 2014, for the separable form.

    Examples
    --------
    >>> import torch
    >>> x, core = torch.ones(1, 4, 8, 8), torch.ones(2, 2, 1, 1)
    >>> factors = [torch.ones(6, 2), torch.ones(4, 2), torch.ones(3, 1), torch.ones(3, 1)]
    >>> tucker_conv(x, core, factors, stride=2, padding=1).shape
    torch.Size([1, 6, 4, 4])
    """
    shape = _weight_shape("tucker_conv", core, factors, arrangement, shape)
    n = len(shape) - 2
    pad = padding if isinstance(padding, str) else _per_axis(padding, n)
    geometry = ConvGeometry(
        tuple(shape[2:]), _per_axis(stride, n), _per_axis(dilation, n), pad, groups, padding_mode, (0,) * n
    )
    chain = conv_chain(shapes_of(core, factors), geometry, _require_split("tucker_conv", arrangement), shape)
    return run_conv(chain, x, (core, *factors), geometry, memory=memory)


def tucker_conv_transpose(
    x: Tensor,
    core: Tensor,
    factors: Factors,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
    arrangement: Arrangement | None = None,
    shape: Sequence[int] | None = None,
    memory: Memory = "normal",
) -> Tensor:
    """Convolve, transposed, with a Tucker kernel, in one to three dimensions, without forming the kernel.

    Parameters
    ----------
    x : Tensor, shape (batch, in, *sizes) or (in, *sizes)
        The input.
    core : Tensor, shape (r_0, r_1, *kernel ranks), or (r_0, r_1) with an arrangement of two modes
        The core.
    factors : sequence of (Tensor or None)
        U_0 (in, r_0), U_1 (out/groups, r_1) and one factor per kernel axis; or one per mode of the arrangement.
    stride, padding, output_padding, groups, dilation
        As `torch.nn.ConvTranspose2d` takes them.
    arrangement : Arrangement, optional
        As for `tucker_conv`; its first axis is the weight's first, the input channels.
    shape : sequence of int, optional
        The weight's shape (in, out/groups, *kernel); needed with an arrangement.
    memory : {"normal", "low"}
        Whether the thin results between the products are kept for the backward pass, or computed again in it.

    Returns
    -------
    Tensor, shape (batch, out, *output sizes) or (out, *output sizes)
        The transposed convolution, without a bias.

    Raises
    ------
    ValueError
        If the arrangement has no factored form, or needs ``shape`` and there is none.

    References
    ----------
    As for `tucker_conv`, whose steps are taken in the opposite order.

    Examples
    --------
    >>> import torch
    >>> x, core = torch.ones(1, 4, 8, 8), torch.ones(2, 2, 1, 1)
    >>> factors = [torch.ones(4, 2), torch.ones(6, 2), torch.ones(3, 1), torch.ones(3, 1)]
    >>> tucker_conv_transpose(x, core, factors, stride=2, padding=1, output_padding=1).shape
    torch.Size([1, 6, 16, 16])
    """
    where = "tucker_conv_transpose"
    shape = _weight_shape(where, core, factors, arrangement, shape)
    n = len(shape) - 2
    steps = (_per_axis(stride, n), _per_axis(dilation, n), _per_axis(padding, n))
    geometry = ConvGeometry(
        tuple(shape[2:]), *steps, groups=groups, output_padding=_per_axis(output_padding, n), transposed=True
    )
    chain = conv_chain(shapes_of(core, factors), geometry, _require_split(where, arrangement), shape)
    return run_conv(chain, x, (core, *factors), geometry, memory=memory)


def split_of(arrangement: Arrangement) -> Split | None:
    """Return the weight's axes in each of the two modes of a separable arrangement; ``None`` for any other."""
    if arrangement.n_modes != 2 or any(len(group) != 1 for group in arrangement.left):
        return None
    names = [group[0] for group in arrangement.left]
    first, second = (tuple(names.index(name) for name in group) for group in arrangement.right)
    return (first, second) if 0 in first and 1 in second else None


def sides_of(arrangement: Arrangement) -> Sides | None:
    """Return the modes on each side of an arranged matrix, slowest first; ``None`` where a mode mixes the sides.

    Examples
    --------
    >>> sides_of(Arrangement("(heads d) i -> heads d i", {"heads": 2}))
    ((0, 1), (2,))
    """
    found: list[tuple[int, ...]] = []
    for names in arrangement.left:
        mine = [k for k, group in enumerate(arrangement.right) if group[0] in names]
        mine.sort(key=lambda k: names.index(arrangement.right[k][0]))
        if [name for k in mine for name in arrangement.right[k]] != list(names):
            return None
        found.append(tuple(mine))
    return (found[0], found[1]) if len(found) == 2 else None


def run_rows(
    chain: Chain,
    x: Tensor,
    parameters: Factors,
    *,
    scale: float = 1.0,
    memory: Memory = "normal",
    out: Tensor | Frozen | None = None,
) -> Tensor:
    """Run a chain of products with rows on any number of axes before them: for autograd, as one axis."""
    # Each product would record these axes on its own; but what had to be copied, the backward pass would keep.
    if x.dim() == 2 or not (torch.is_grad_enabled() and x.is_contiguous()):
        return run_chain(chain, x, parameters, scale=scale, memory=memory, out=out)
    target = out.reshape(-1, out.shape[-1]) if isinstance(out, Tensor) else out
    rows = x.unsqueeze(0) if x.dim() == 1 else x.flatten(0, -2)
    result = run_chain(chain, rows, parameters, scale=scale, memory=memory, out=target)
    # Not a view: one that is written to costs autograd a copy.
    return torch.ops.aten._unsafe_view.default(result, (*x.shape[:-1], result.shape[-1]))


def run_conv(
    chain: Chain,
    x: Tensor,
    parameters: Factors,
    geometry: ConvGeometry,
    *,
    scale: float = 1.0,
    memory: Memory = "normal",
    out: Tensor | Frozen | None = None,
) -> Tensor:
    """Run a chain of convolutions on a batch, or on one input without the batch's axis."""
    if x.dim() == len(geometry.kernel) + 2:
        return run_chain(chain, x, parameters, scale=scale, memory=memory, out=out)
    target = out.unsqueeze(0) if isinstance(out, Tensor) else out
    return run_chain(chain, x.unsqueeze(0), parameters, scale=scale, memory=memory, out=target).squeeze(0)


def shapes_of(core: Tensor, factors: Factors) -> Shapes:
    """Return the shapes of a Tucker tensor's parts: what a plan is made from."""
    return core.shape, tuple([None if u is None else u.shape for u in factors])  # type: ignore[return-value]


def _per_axis(value: int | Sequence[int], n: int) -> tuple[int, ...]:
    return (value,) * n if isinstance(value, int) else tuple(value)


def _weight_shape(
    where: str, core: Tensor, factors: Factors, arrangement: Arrangement | None, shape: Sequence[int] | None
) -> tuple[int, ...]:
    tensor = tuple(r if u is None else u.shape[0] for r, u in zip(core.shape, factors))
    if arrangement is None or arrangement.is_native:
        return tensor
    if shape is None:
        raise ValueError(f"{where}: arrangement {arrangement.pattern!r} needs the weight's shape; pass shape=")
    if arrangement.shape(shape) != tensor:
        raise ValueError(
            f"{where}: a Tucker tensor of shape {tensor} for a weight of shape {tuple(shape)} arranged as "
            f"{arrangement.pattern!r}; pass one of shape {arrangement.shape(shape)}"
        )
    return tuple(shape)


def _require_split(where: str, arrangement: Arrangement | None) -> Split | None:
    if arrangement is None or arrangement.is_native:
        return None
    split = split_of(arrangement)
    if split is None:
        raise ValueError(
            f"{where}: arrangement {arrangement.pattern!r} has no factored form; pass one with two modes such as "
            "'o (i h w)', or form the weight with dense_delta"
        )
    return split
