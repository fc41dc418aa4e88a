"""Unfolding, folding and mode products: the verbs that everything else is made of.

Conventions follow Kolda and Bader, *Tensor Decompositions and Applications*, SIAM Review 51 (2009), with TensorLy's
two changes: modes count from zero, and an unfolding keeps the remaining modes in C order. All functions are pure,
accept the arrays of any array-API library and return arrays of that library; all are differentiable and can be traced
(`torch.compile(fullgraph=True)`, `torch.func.vmap`, `jax.jit`).
"""

import math
from collections.abc import Iterator, Sequence
from functools import reduce
from typing import Any

import array_api_compat
import numpy as np

from flora_tensor._arrays import array_namespace, hermitian, host_view, is_torch, promote
from flora_tensor._checks import as_int, as_sequence, check_mode
from flora_tensor._typing import Array, Namespace

__all__ = ["fold", "mode_dot", "multi_mode_dot", "unfold"]

# What writing one element of a fresh intermediate costs, in multiply-adds. Measured on CPUs: a first touch of memory
# (page fault, cache miss) takes as long as some tens of fused multiply-adds of a large matrix product.
_WRITE_COST = 32.0

# A batched product calls the matrix kernel once per item; below this many multiply-adds a call costs more than copying
# the tensor into one large product.
_SMALL_PRODUCT = 8192

# Above this many, BLAS (OpenBLAS 0.3.31) leaves its kernel for small products, and the other one is slow where a side
# has no more than so many entries: copying is faster again, up to four times (measured).
_MEDIUM_PRODUCT, _THIN = 1 << 20, 32

# Entries that are copied so at a time: what the processor's cache holds.
_TURNED = 1 << 18

# Modes side by side are multiplied as one where they have no more than so many indices, before and after, and the
# tensor has so many entries.
_SHORT, _JOINED = 64, 1 << 12

# Entries of a fresh result that are written at a time: fresh memory is first filled with zeros, which are then still in
# the cache. Of thin factors only, and not of fewer rows than hide the cost of packing the other matrix.
_BAND, _BAND_ROWS, _BAND_INNER = 1 << 21, 64, 128

# Tensors from this many entries on are multiplied along several modes in so many parts, to save memory.
LARGE, PARTS = 1 << 19, 16


def unfold(x: Array, mode: int) -> Array:
    """Lay out a tensor as a matrix whose rows are one mode.

    Parameters
    ----------
    x : array, shape (I_0, …, I_{N-1})
        A tensor of order N ≥ 1.
    mode : int
        The mode that becomes the rows; negative modes count from the end.

    Returns
    -------
    array, shape (I_mode, ∏_{k≠mode} I_k)
        The mode-n unfolding, the other modes in C order (the last one varies fastest). A view where the library allows.

    Raises
    ------
    ValueError
        If ``x`` has no such mode.

    See Also
    --------
    fold : the inverse.

    References
    ----------
    Kolda and Bader (2009), section 2.4; the column order is TensorLy's.

    Examples
    --------
    >>> import numpy as np
    >>> unfold(np.arange(8).reshape(2, 2, 2), 1)
    array([[0, 1, 4, 5],
           [2, 3, 6, 7]])
    """
    xp = array_namespace("unfold", x)
    mode = check_mode("unfold", mode, len(x.shape))
    order = (mode, *(k for k in range(len(x.shape)) if k != mode))
    columns = math.prod(x.shape[:mode]) * math.prod(x.shape[mode + 1 :])
    return xp.reshape(xp.permute_dims(x, order), (x.shape[mode], columns))


def fold(matrix: Array, mode: int, shape: Sequence[int]) -> Array:
    """Put an unfolding back into a tensor.

    Parameters
    ----------
    matrix : array, shape (I_mode, ∏_{k≠mode} I_k)
        A mode-n unfolding, as `unfold` makes it.
    mode : int
        The mode that the rows are; negative modes count from the end.
    shape : sequence of int
        The tensor's shape (I_0, …, I_{N-1}).

    Returns
    -------
    array, shape (I_0, …, I_{N-1})
        The tensor, so that ``fold(unfold(x, mode), mode, x.shape)`` equals ``x`` bit for bit.

    Raises
    ------
    ValueError
        If ``shape`` has no such mode, or the matrix is not of the shape that its unfolding has.

    References
    ----------
    Kolda and Bader (2009), section 2.4.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.arange(24).reshape(2, 3, 4)
    >>> bool((fold(unfold(x, 2), 2, x.shape) == x).all())
    True
    """
    xp = array_namespace("fold", matrix)
    sizes = [as_int("fold", f"shape[{k}]", n) for k, n in enumerate(as_sequence("fold", "shape", shape))]
    mode = check_mode("fold", mode, len(sizes))
    others = sizes[:mode] + sizes[mode + 1 :]
    if tuple(matrix.shape) != (sizes[mode], math.prod(others)):
        raise ValueError(
            f"fold: a matrix of shape {tuple(matrix.shape)} for mode {mode} of shape {tuple(sizes)}; "
            f"pass one of shape {(sizes[mode], math.prod(others))}"
        )
    order = (*range(1, mode + 1), 0, *range(mode + 1, len(sizes)))
    return xp.permute_dims(xp.reshape(matrix, (sizes[mode], *others)), order)


def mode_dot(x: Array, matrix: Array, mode: int) -> Array:
    """Multiply a tensor by a matrix along one mode: Y = X ×_mode M.

    Parameters
    ----------
    x : array, shape (I_0, …, I_{N-1})
        The tensor.
    matrix : array, shape (J, I_mode)
        The matrix. Mixed data types are promoted by the array-API rules.
    mode : int
        The mode; negative modes count from the end.

    Returns
    -------
    array, shape (I_0, …, J, …, I_{N-1})
        The tensor whose mode-n unfolding is ``matrix @ unfold(x, mode)``.

    Raises
    ------
    ValueError
        If ``x`` has no such mode, ``matrix`` is not a matrix, or its columns do not match the mode.

    References
    ----------
    Kolda and Bader (2009), section 2.5.

    Examples
    --------
    >>> import numpy as np
    >>> mode_dot(np.ones((2, 3, 4)), np.ones((5, 3)), 1).shape
    (2, 5, 4)
    """
    xp = array_namespace("mode_dot", x, matrix)
    mode = check_mode("mode_dot", mode, len(x.shape))
    _check_matrix("mode_dot", matrix, mode, x.shape[mode])
    x, matrix = promote(xp, x, matrix)
    return contract(xp, x, matrix, mode)


def multi_mode_dot(
    x: Array,
    matrices: Sequence[Array | None],
    *,
    modes: Sequence[int] | None = None,
    transpose: bool = False,
) -> Array:
    """Multiply a tensor by one matrix along each of several modes: Y = X ×_a A ×_b B ….

    The products are taken in the order that costs least (see `contraction_order`); products along different modes
    commute, so the result does not depend on it beyond rounding.

    Parameters
    ----------
    x : array, shape (I_0, …, I_{N-1})
        The tensor.
    matrices : sequence of (array of shape (J_k, I_k), or None)
        One matrix per entry of ``modes``; ``None`` leaves the mode as it is. With ``transpose`` each has shape
        (I_k, J_k).
    modes : sequence of int, optional
        The mode of each matrix; by default 0, 1, 2, …. A mode that occurs twice is multiplied in the order given.
    transpose : bool
        Multiply by the conjugate transpose of each matrix, as projecting onto factors needs it.

    Returns
    -------
    array, shape (I_0, …, J_k, …, I_{N-1})
        The product.

    Raises
    ------
    ValueError
        If the numbers of matrices and modes differ, or a matrix does not fit its mode.

    References
    ----------
    Kolda and Bader (2009), section 2.5.

    Examples
    --------
    >>> import numpy as np
    >>> x, a, c = np.ones((2, 3, 4)), np.ones((5, 2)), np.ones((7, 4))
    >>> multi_mode_dot(x, [a, None, c]).shape
    (5, 3, 7)
    >>> multi_mode_dot(x, [c], modes=[-1]).shape
    (2, 3, 7)
    """
    where = "multi_mode_dot"
    xp = array_namespace(where, x, *matrices)
    wanted = range(len(matrices)) if modes is None else as_sequence(where, "modes", modes, "one number a matrix")
    if len(wanted) != len(matrices):
        raise ValueError(f"{where}: {len(matrices)} matrices for {len(wanted)} modes; pass one matrix (or None) a mode")
    checked = [check_mode(where, k, len(x.shape)) for k in wanted]
    steps = [(k, m) for k, m in zip(checked, matrices) if m is not None]
    sizes = list(x.shape)
    for k, m in steps:
        _check_matrix(where, m, k, sizes[k], transpose)
        sizes[k] = m.shape[1] if transpose else m.shape[0]
    if transpose:
        steps = [(k, hermitian(xp, m)) for k, m in steps]
    if len({k for k, _ in steps}) == len(steps):
        return multiply(xp, x, steps)
    for k, m in steps:
        x, m = promote(xp, x, m)
        x = contract(xp, x, m, k)
    return x


def multiply(xp: Namespace, x: Array, steps: Sequence[tuple[int, Array]], out: Array | None = None) -> Array:
    """Multiply along different modes, unchecked and in the order that costs least; ``out`` is as for `contract`."""
    new = {k: m.shape[0] for k, m in steps}
    shape = tuple(new.get(k, n) for k, n in enumerate(x.shape))
    if len(steps) > 1 and not is_torch(x) and array_api_compat.is_numpy_array(x):
        x, steps = _joined(x, dict(steps), shape)
    order = contraction_order([m.shape[1] for _, m in steps], [m.shape[0] for _, m in steps])
    steps = [steps[i] for i in order]
    if out is None and _holds_much(x, steps):
        ratios, along = [m.shape[0] / m.shape[1] for _, m in steps], _cut_along(x.shape, [k for k, _ in steps])
        if along not in {k for k, _ in steps} or 2 * math.prod(ratios) < ratios[0]:
            return xp.reshape(_multiply_in_parts(xp, x, steps, along), shape)
        if steps[0][1].shape[0] >= PARTS:
            return xp.reshape(_put_together(xp, x, steps), shape)
    for i, (k, m) in enumerate(steps):
        x, m = promote(xp, x, m)
        x = contract(xp, x, m, k, out if i == len(steps) - 1 else None)
    return x if tuple(x.shape) == shape else xp.reshape(x, shape)


def _joined(x: Any, matrices: dict[int, Any], shape: tuple[int, ...]) -> tuple[Any, Sequence[tuple[int, Any]]]:
    """Take short modes side by side as one, to be multiplied by the Kronecker product of their matrices.

    A tensor that gets ``shape`` is then read and written once, not once a mode, and where these modes are the last ones
    nothing has to be turned. Among small tensors that would save nothing, and short types would round more.
    """
    if max(x.size, math.prod(shape)) < _JOINED or any(a.dtype.char not in "fdFD" for a in (x, *matrices.values())):
        return x, list(matrices.items())
    runs: list[list[int]] = []
    room = 0  # indices that the modes of a run may be multiplied by yet; begun at the end, as there it saves most
    for k in reversed(range(x.ndim)):
        length = max(x.shape[k], shape[k], 1)
        if k in matrices and length <= room:
            runs[0].insert(0, k)
        else:
            runs.insert(0, [k])
            room = _SHORT if k in matrices else 0
        room //= length
    x = x.reshape([math.prod(x.shape[k] for k in run) for run in runs])
    return x, [(i, reduce(kronecker, (matrices[k] for k in run))) for i, run in enumerate(runs) if run[0] in matrices]


def kronecker(a: Array, b: Array) -> Array:
    """Return the Kronecker product of two matrices of NumPy or PyTorch, in any order of memory.

    NumPy's own takes several times as long where they are small, and PyTorch's refuses a matrix beside one in the other
    order of memory.
    """
    (n, p), (m, q) = a.shape, b.shape
    return (a.reshape(n, 1, p, 1) * b.reshape(m, 1, q)).reshape(n * m, p * q)


def contraction_order(inner: Sequence[int], outer: Sequence[int]) -> list[int]:
    """Order mode products that turn sizes ``inner`` into ``outer`` so that they cost least.

    A product along mode k on a tensor of s elements takes s · outer_k multiply-adds and writes s · ρ_k elements, with
    ρ_k = outer_k/inner_k, each worth β multiply-adds: it costs s · A_k, where A_k = outer_k (1 + β/inner_k). Of two
    neighbors, a before b costs s (A_a + ρ_a A_b) and b before a costs s (A_b + ρ_b A_a); what comes later sees the
    same size either way. So a goes first iff

        (ρ_a − 1)/A_a  <  (ρ_b − 1)/A_b,    where    (ρ − 1)/A = (outer − inner) / (outer (inner + β)),

    an order that is total and independent of s: sorting by that key is optimal over all N! orders (exchange argument).

    Parameters
    ----------
    inner, outer : sequence of int
        The sizes of the modes before and after their products.

    Returns
    -------
    list of int
        The indices of the products, in the order in which to take them.

    References
    ----------
    Smith, *Various optimizers for single-stage production*, Naval Research Logistics Quarterly 3 (1956), for the
    exchange argument.

    Examples
    --------
    >>> contraction_order([8, 64, 3], [512, 8, 3])
    [1, 2, 0]
    """

    def key(i: int) -> float:
        a, b = inner[i], outer[i]
        if a == 0 or b == 0:
            # While a mode is empty every product is free: empty one as soon, and fill one as late, as possible.
            return math.inf if a == 0 else -math.inf
        return (b - a) / (b * (a + _WRITE_COST))

    return sorted(range(len(inner)), key=key)


def _holds_much(x: Array, steps: Sequence[tuple[int, Array]]) -> bool:
    """Tell whether the first of several products leaves much of a large tensor."""
    if len(steps) < 2 or is_torch(x) or not array_api_compat.is_numpy_array(x) or x.size < LARGE:
        return False
    first = steps[0][1]
    return 4 * first.shape[0] > first.shape[1]


def _cut_along(shape: Sequence[int], multiplied: Sequence[int]) -> int:
    """Choose the mode to cut a tensor into parts along: one that stays as it is, else the last to be multiplied.

    It is to be long enough, or the longest.
    """
    order = [k for k in range(len(shape)) if k not in multiplied] + list(reversed(multiplied))
    return max(order, key=lambda k: (min(shape[k], PARTS), -order.index(k)))


def _multiply_in_parts(xp: Namespace, x: Any, steps: Sequence[tuple[int, Any]], along: int) -> Any:
    """Multiply along several modes, a part of the tensor at a time, where little is left or a mode stays as it is."""
    matrices = dict(steps)
    shape = [matrices[k].shape[0] if k in matrices else n for k, n in enumerate(x.shape)]
    result = np.zeros(shape, np.result_type(x, *matrices.values()))
    rows = -(-x.shape[along] // PARTS)
    for start in range(0, x.shape[along], rows):
        here = (*(slice(None),) * along, slice(start, start + rows))
        part = x[here]
        for k, m in sorted(steps, key=lambda step: step[0] == along):  # last, as a part has few of its entries
            left, right = promote(xp, part, m[:, start : start + rows] if k == along else m)
            part = contract(xp, left, right, k)
        if along in matrices:
            result += part
        else:
            result[here] = part
    return result


def _put_together(xp: Namespace, x: Any, steps: Sequence[tuple[int, Any]]) -> Any:
    """Multiply along several modes, a part of the result at a time, where much is left in the end."""
    matrices, mode = dict(steps), steps[0][0]
    shape = [matrices[k].shape[0] if k in matrices else n for k, n in enumerate(x.shape)]
    result = np.empty(shape, np.result_type(x, *matrices.values()))
    for start, part in product_slabs(xp, x, steps, mode):
        result[(*(slice(None),) * mode, slice(start, start + part.shape[mode]))] = part
    return result


def product_slabs(
    xp: Namespace, x: Array, steps: Sequence[tuple[int, Array]], mode: int, rows: int = 0
) -> Iterator[tuple[int, Array]]:
    """Multiply along several modes, ``mode`` among them, and give the result slab by slab of it, with where it starts.

    It takes what multiplying along that mode first takes; of the result and of what lies between no more than a slab is
    held, a sixteenth of the tensor at most where no mode grows, or ``rows`` where these are more.
    """
    matrices = dict(steps)
    first = matrices.pop(mode)
    rows = max(rows, -(-x.shape[mode] // PARTS))
    for start in range(0, first.shape[0], rows):
        part, m = promote(xp, x, first[start : start + rows, :])
        yield start, multiply(xp, contract(xp, part, m, mode), list(matrices.items()))


def contract(xp: Namespace, x: Array, matrix: Array, mode: int, out: Array | None = None) -> Array:
    """Multiply along one mode, unchecked; with ``out`` (NumPy or PyTorch, C-contiguous) write the result there."""
    before, after = math.prod(x.shape[:mode]), math.prod(x.shape[mode + 1 :])
    size, new = x.shape[mode], matrix.shape[0]
    shape = (*x.shape[:mode], new, *x.shape[mode + 1 :])
    if before == 1:
        y = _matmul(xp, matrix, xp.reshape(x, (size, after)), out, (new, after))
    elif after == 1:
        y = _matmul(xp, xp.reshape(x, (before, size)), xp.permute_dims(matrix, (1, 0)), out, (before, new))
    elif out is None and is_torch(x):
        # PyTorch copies a matrix that is broadcast from the left (measured: 41 ms against 11 ms on 1024 × 1024 × 9).
        slabs = xp.permute_dims(xp.reshape(x, (before, size, after)), (0, 2, 1))
        y = xp.permute_dims(xp.matmul(slabs, xp.permute_dims(matrix, (1, 0))), (0, 2, 1))
    elif out is None and _is_thin(size * new * after, after) and array_api_compat.is_numpy_array(x):
        y = _contract_in_parts(xp.reshape(x, (before, size, after)), matrix)
    elif size * new * after >= _SMALL_PRODUCT or out is not None:
        y = _matmul(xp, matrix, xp.reshape(x, (before, size, after)), out, (before, new, after))
    elif before * size * after > _TURNED and array_api_compat.is_numpy_array(x):
        y = _contract_in_parts(xp.reshape(x, (before, size, after)), matrix)
    else:
        rows = xp.reshape(xp.permute_dims(xp.reshape(x, (before, size, after)), (0, 2, 1)), (before * after, size))
        y = xp.reshape(xp.matmul(rows, xp.permute_dims(matrix, (1, 0))), (before, after, new))
        y = xp.permute_dims(y, (0, 2, 1))
    return xp.reshape(y, shape)


def _is_thin(product: int, after: int) -> bool:
    return product > _MEDIUM_PRODUCT and after <= _THIN


def _contract_in_parts(x: Any, matrix: Any) -> Any:
    """Multiply (before, size, after) along the middle: as the large product of a turned copy, a part at a time."""
    before, size, after = x.shape
    result = np.empty((before, matrix.shape[0], after), np.result_type(x, matrix))
    step = max(1, _TURNED // (size * after))
    for start in range(0, before, step):
        part = x[start : start + step].transpose(0, 2, 1)
        rows = part.reshape(-1, size) @ matrix.T
        result[start : start + step] = rows.reshape(*part.shape[:2], -1).transpose(0, 2, 1)
    return result


def _matmul(xp: Namespace, a: Array, b: Array, out: Array | None, shape: tuple[int, ...]) -> Array:
    """Multiply matrices, into ``out`` seen as an array of ``shape`` where one is given."""
    if out is None:
        return _matmul_in_bands(a, b) if _fills_much(a, b) else xp.matmul(a, b)
    view = out.reshape(shape)
    left, right, target = host_view(a), host_view(b), host_view(view)
    if left is not None and right is not None and target is not None:
        np.matmul(left, right, out=target)  # the fastest batched product on a CPU; the memory is shared
    else:
        import torch

        torch.matmul(a, b, out=view)
    return view


def _fills_much(a: Array, b: Array) -> bool:
    """Tell whether a product of matrices is much larger than they are, so that writing it counts."""
    if len(a.shape) != 2 or len(b.shape) != 2 or is_torch(a) or not array_api_compat.is_numpy_array(a):
        return False
    return b.shape[0] <= _BAND_INNER and _BAND_ROWS <= _BAND // max(b.shape[1], 1) < a.shape[0] // 2


def _matmul_in_bands(a: Any, b: Any) -> Any:
    """Multiply matrices into fresh memory, some rows at a time."""
    result = np.empty((a.shape[0], b.shape[1]), np.result_type(a, b))
    rows = _BAND // b.shape[1]
    for start in range(0, a.shape[0], rows):
        np.matmul(a[start : start + rows], b, out=result[start : start + rows])
    return result


def _check_matrix(where: str, matrix: Array, mode: int, size: int, transpose: bool = False) -> None:
    """Refuse what cannot multiply a mode of ``size`` entries."""
    if len(matrix.shape) != 2:
        raise ValueError(
            f"{where}: the matrix for mode {mode} has shape {tuple(matrix.shape)}; pass a matrix "
            "(a vector v as v[None, :])"
        )
    if matrix.shape[0 if transpose else 1] != size:
        raise ValueError(
            f"{where}: the matrix for mode {mode} has shape {tuple(matrix.shape)}, but mode {mode} has size {size}; "
            f"pass a matrix with {size} {'rows' if transpose else 'columns'}"
        )
