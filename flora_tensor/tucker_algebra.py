"""The exact algebra of Tucker tensors: on cores and factors, without ever forming a dense tensor."""

from collections.abc import Sequence

import array_api_compat

from flora_tensor._arrays import (
    array_namespace,
    conjugate,
    hermitian,
    power_of_two,
    promote,
    result_dtype,
    times_power_of_two,
    working_dtype,
)
from flora_tensor._checks import as_int, as_sequence, check_mode, type_text
from flora_tensor._typing import Array, DType, Namespace
from flora_tensor.algebra import mode_dot, multi_mode_dot
from flora_tensor.tucker_tensor import TuckerTensor, check_tucker, explicit_factor

__all__ = ["add", "inner", "norm", "orthogonalize", "permute_modes", "scale", "select_slice", "stack"]


def inner(a: TuckerTensor, b: TuckerTensor) -> Array:
    """Take the inner product ⟨A, B⟩ = Σ conj(A) · B of two Tucker tensors without forming either.

    Parameters
    ----------
    a, b : TuckerTensor
        Two tensors of one shape (I_0, …, I_{N-1}), of any ranks.

    Returns
    -------
    array, shape ()
        The inner product, conjugate-linear in ``a``. For ⟨A, A⟩ with cancellation in mind use `norm`. As there, 16-bit
        floats are computed and returned in float32, and integers are promoted.

    Raises
    ------
    ValueError
        If the shapes differ.
    TypeError
        If ``a`` or ``b`` is no Tucker tensor.

    References
    ----------
    Bader and Kolda, *Efficient MATLAB computations with sparse and factored tensors*, SISC 30 (2007), section 4.2.3.

    Examples
    --------
    >>> import numpy as np
    >>> t = TuckerTensor(np.full((1, 1), 3.0), [np.ones((2, 1)), np.ones((2, 1))])
    >>> float(inner(t, t))
    36.0
    """
    xp = _same_shape("inner", a, b)
    a, b = (_at_working_precision(xp, t) for t in (a, b))
    grams = [_gram(xp, u, v) for u, v in zip(a.factors, b.factors)]
    projected = multi_mode_dot(b.core, grams)
    left, right = promote(xp, a.core, projected)
    return xp.sum(conjugate(xp, left) * right)


def norm(a: TuckerTensor) -> Array:
    """Take the Frobenius norm ‖A‖ without forming the tensor.

    The factors are orthogonalized first, so the result is accurate to rounding even where terms cancel, as in
    ``norm(add(a, scale(b, -1)))``; the square root of `inner` would lose half the digits there.

    Parameters
    ----------
    a : TuckerTensor
        A tensor of shape (I_0, …, I_{N-1}).

    Returns
    -------
    array, shape ()
        The norm, real, of the core's (real) data type; 16-bit floats are computed and returned in float32,
        integers are promoted.

    Raises
    ------
    TypeError
        If ``a`` is no Tucker tensor.

    Notes
    -----
    Differentiable where every factor has full column rank, as QR is.

    References
    ----------
    Bader and Kolda (2007), section 4.2.4.

    Examples
    --------
    >>> import numpy as np
    >>> t = TuckerTensor(np.full((1, 1), 3.0), [np.ones((2, 1)), np.ones((2, 1))])
    >>> round(float(norm(t)), 12)
    6.0
    """
    check_tucker("norm", a)
    xp = array_namespace("norm", a.core, *a.factors)
    work = _at_working_precision(xp, a)
    core = _orthogonalized(xp, work).core
    k = power_of_two(xp, core)
    flat = xp.reshape(times_power_of_two(core, -k), (-1,))
    return times_power_of_two(xp.linalg.vector_norm(flat), k)


def add(a: TuckerTensor, b: TuckerTensor) -> TuckerTensor:
    """Add two Tucker tensors exactly, without forming either.

    Parameters
    ----------
    a, b : TuckerTensor
        Two tensors of one shape (I_0, …, I_{N-1}), with ranks r and s.

    Returns
    -------
    TuckerTensor
        A + B with ranks r + s: factors side by side, a block-diagonal core. A mode whose factor both tensors share (the
        same object, or ``None``) keeps it, and the cores are added along it. Use `round_tucker` to lower the ranks
        again.

    Raises
    ------
    ValueError
        If the shapes differ.
    TypeError
        If ``a`` or ``b`` is no Tucker tensor.

    References
    ----------
    Bader and Kolda (2007), section 4.2; Lee and Cichocki, *Fundamental tensor operations for large-scale data analysis*
    (2018), section 3.

    Examples
    --------
    >>> import numpy as np
    >>> t = TuckerTensor(np.full((1, 1), 3.0), [np.ones((2, 1)), np.ones((2, 1))])
    >>> add(t, t).to_tensor()
    array([[6., 6.],
           [6., 6.]])
    """
    xp = _same_shape("add", a, b)
    (left, right), factors = _beside(xp, (a, b))
    return TuckerTensor(left + right, factors)


def stack(tensors: Sequence[TuckerTensor], *, mode: int = 0) -> TuckerTensor:
    """Join Tucker tensors of one shape along a new mode exactly, without forming any.

    Parameters
    ----------
    tensors : sequence of TuckerTensor
        L ≥ 1 tensors of one shape (I_0, …, I_{N-1}), of any ranks: the layers of a network, say.
    mode : int
        Where the new mode comes; negative numbers count from the end.

    Returns
    -------
    TuckerTensor
        The stack, of order N + 1, whose new mode has size L and is left whole. In the others the factors stand side by
        side and the ranks add up, except where all tensors share a factor (the same object, or ``None``). Use
        `round_tucker` to find the subspaces that the tensors have in common; `select_slice` takes one out again.

    Raises
    ------
    ValueError
        If there are no tensors, their shapes differ, or there is no such mode.
    TypeError
        If one of them is no Tucker tensor.

    References
    ----------
    Lee and Cichocki, *Fundamental tensor operations for large-scale data analysis* (2018), section 3: concatenation.

    Examples
    --------
    >>> import numpy as np
    >>> t = TuckerTensor(np.full((1, 1), 3.0), [np.ones((2, 1)), np.ones((5, 1))])
    >>> stack([t, scale(t, 2.0), t])
    TuckerTensor(shape=(3, 2, 5), ranks=(3, 1, 1), n_parameters=10, whole_modes=(0,), dtype=float64)
    """
    tensors = as_sequence("stack", "tensors", tensors, "of Tucker tensors")
    if not tensors:
        raise ValueError("stack: got no tensors; pass at least one")
    xp = _same_shape("stack", *tensors)
    place = check_mode("stack", mode, tensors[0].ndim + 1)
    cores, factors = _beside(xp, tensors)
    return TuckerTensor(xp.stack(cores, axis=place), (*factors[:place], None, *factors[place:]))


def select_slice(a: TuckerTensor, mode: int, index: int) -> TuckerTensor:
    """Take one slice of a Tucker tensor, as indexing takes one of a dense tensor, without forming it.

    Parameters
    ----------
    a : TuckerTensor
        A tensor of shape (I_0, …, I_{N-1}), N ≥ 2.
    mode : int
        The mode to index; negative numbers count from the end.
    index : int
        Which slice, from 0 to I_mode - 1; negative numbers count from the end.

    Returns
    -------
    TuckerTensor
        The slice, of order N - 1: the core is contracted with one row of the mode's factor, the other factors are
        shared with ``a``. Of a joint decomposition of a stack of layers this is one layer.

    Raises
    ------
    ValueError
        If there is no such mode or index, or ``a`` has a single mode.
    TypeError
        If ``a`` is no Tucker tensor.

    References
    ----------
    Kolda and Bader (2009), sections 2.1 and 4: a slice is the mode product with a unit vector, which meets the factor.

    Examples
    --------
    >>> import numpy as np
    >>> t = TuckerTensor(np.full((1, 1), 3.0), [np.arange(4.0)[:, None], np.ones((2, 1))])
    >>> select_slice(t, 0, 2).to_tensor()
    array([6., 6.])
    """
    check_tucker("select_slice", a)
    mode = check_mode("select_slice", mode, a.ndim)
    if a.ndim == 1:
        raise ValueError(
            "select_slice: a has a single mode, whose slices are numbers; pass a tensor of two modes or more"
        )
    size, i = a.shape[mode], as_int("select_slice", "index", index)
    if not -size <= i < size:
        raise ValueError(
            f"select_slice: index {i} of mode {mode} of size {size}; pass a number from {-size} to {size - 1}"
        )
    factor, i = a.factors[mode], i % size
    here = (*(slice(None),) * mode, slice(i, i + 1), ...)
    core = a.core[here] if factor is None else mode_dot(a.core, factor[i : i + 1, :], mode)
    xp = array_namespace("select_slice", core)
    return TuckerTensor(xp.squeeze(core, axis=mode), a.factors[:mode] + a.factors[mode + 1 :])


def scale(a: TuckerTensor, c: complex | Array) -> TuckerTensor:
    """Multiply a Tucker tensor by a number.

    Parameters
    ----------
    a : TuckerTensor
        A tensor of shape (I_0, …, I_{N-1}).
    c : number or array of shape ()
        The number.

    Returns
    -------
    TuckerTensor
        c · A: the core is scaled, the factors are shared with ``a``.

    Raises
    ------
    ValueError
        If ``c`` is an array with axes.
    TypeError
        If ``a`` is no Tucker tensor, or ``c`` no number.

    References
    ----------
    Bader and Kolda (2007), section 4.2.

    Examples
    --------
    >>> import numpy as np
    >>> t = TuckerTensor(np.full((1, 1), 3.0), [np.ones((2, 1)), np.ones((2, 1))])
    >>> scale(t, 2.0).to_tensor()
    array([[6., 6.],
           [6., 6.]])
    """
    check_tucker("scale", a)
    if c is None or isinstance(c, str | list | tuple):
        raise TypeError(f"scale: c is {c!r}; pass a number")
    if getattr(c, "shape", ()) != ():
        raise ValueError(f"scale: c has shape {tuple(c.shape)}; pass a number")  # type: ignore[union-attr]
    try:
        return TuckerTensor(a.core * c, a.factors)
    except TypeError:
        raise TypeError(f"scale: c is {type_text(c)}; pass a number, or an array of the core's library") from None


def orthogonalize(a: TuckerTensor) -> TuckerTensor:
    """Rewrite a Tucker tensor with orthonormal factors, exactly and without forming it.

    Parameters
    ----------
    a : TuckerTensor
        A tensor of shape (I_0, …, I_{N-1}), ranks r.

    Returns
    -------
    TuckerTensor
        The same tensor to rounding, with U_nᴴ U_n = I. Ranks become min(r_n, I_n). ``None`` factors stay. 16-bit floats
        are computed in float32 and cast back, integers are promoted.

    Raises
    ------
    TypeError
        If ``a`` is no Tucker tensor.

    Notes
    -----
    Afterwards ‖A‖ = ‖core‖, and compressing the core compresses the tensor with the same error: see `round_tucker`.

    References
    ----------
    Bader and Kolda (2007), section 4.2.4; Hackbusch, *Tensor Spaces and Numerical Tensor Calculus* (2012), section 8.2.

    Examples
    --------
    >>> import numpy as np
    >>> t = TuckerTensor(np.full((1, 1), 3.0), [np.ones((2, 1)), np.ones((2, 1))])
    >>> float(abs(orthogonalize(t).core[0, 0]).round(12))
    6.0
    """
    check_tucker("orthogonalize", a)
    xp = array_namespace("orthogonalize", a.core, *a.factors)
    result = _orthogonalized(xp, _at_working_precision(xp, a))
    dtype = result_dtype(xp, _common_dtype(xp, a))
    return result.map(lambda array: xp.astype(array, dtype, copy=False))


def permute_modes(a: TuckerTensor, axes: Sequence[int]) -> TuckerTensor:
    """Reorder the modes of a Tucker tensor, as ``permute_dims`` reorders a dense one's.

    Parameters
    ----------
    a : TuckerTensor
        A tensor of shape (I_0, …, I_{N-1}).
    axes : sequence of int
        A permutation of 0, …, N-1: mode k of the result is mode ``axes[k]`` of ``a``.

    Returns
    -------
    TuckerTensor
        The permuted tensor, of shape (I_{axes[0]}, …, I_{axes[N-1]}).

    Raises
    ------
    ValueError
        If ``axes`` is not a permutation.
    TypeError
        If ``a`` is no Tucker tensor.

    References
    ----------
    Kolda and Bader (2009), section 4; the core is permuted and the factors change places.

    Examples
    --------
    >>> import numpy as np
    >>> t = TuckerTensor(np.ones((1, 1)), [np.ones((2, 1)), np.ones((5, 1))])
    >>> permute_modes(t, (1, 0)).shape
    (5, 2)
    """
    check_tucker("permute_modes", a)
    order = [check_mode("permute_modes", k, a.ndim) for k in as_sequence("permute_modes", "axes", axes)]
    if sorted(order) != list(range(a.ndim)):
        raise ValueError(f"permute_modes: axes {tuple(axes)} of a tensor with {a.ndim} modes; pass each mode once")
    xp = array_namespace("permute_modes", a.core)
    return TuckerTensor(xp.permute_dims(a.core, tuple(order)), tuple(a.factors[k] for k in order))


def _same_shape(where: str, *tensors: TuckerTensor) -> Namespace:
    check_tucker(where, *tensors)
    first, *others = (t.shape for t in tensors)
    for shape in others:
        if shape != first:
            raise ValueError(f"{where}: shapes {first} and {shape} differ; pass tensors of one shape")
    return array_namespace(where, *(array for t in tensors for array in (t.core, *t.factors)))


def _beside(xp: Namespace, tensors: Sequence[TuckerTensor]) -> tuple[list[Array], tuple[Array | None, ...]]:
    """Write tensors in common factors: side by side, except those that all share; each core in a block of its own."""
    cores = promote(xp, *(t.core for t in tensors))
    factors: list[Array | None] = []
    for mode in range(tensors[0].ndim):
        shared = tensors[0].factors[mode]
        if all(t.factors[mode] is shared for t in tensors):
            factors.append(shared)
            continue
        factors.append(xp.concat(promote(xp, *(explicit_factor(t, mode) for t in tensors)), axis=1))
        ranks = [t.ranks[mode] for t in tensors]
        cores = [_pad(xp, core, mode, sum(ranks[:k]), sum(ranks[k + 1 :])) for k, core in enumerate(cores)]
    return cores, tuple(factors)


def _common_dtype(xp: Namespace, a: TuckerTensor) -> DType:
    return xp.result_type(a.core, *(u for u in a.factors if u is not None))


def _at_working_precision(xp: Namespace, a: TuckerTensor) -> TuckerTensor:
    """Bring core and factors to one type that QR can work in."""
    dtype = working_dtype(xp, _common_dtype(xp, a))
    return a.map(lambda array: xp.astype(array, dtype, copy=False))


def _orthogonalized(xp: Namespace, a: TuckerTensor) -> TuckerTensor:
    # Core and factors are brought to magnitude one first: huge and tiny ones may cancel in the result, but a partial
    # product of them would leave the type's range.
    exponent = power_of_two(xp, a.core)
    core = times_power_of_two(a.core, -exponent)
    orthonormal: list[Array | None] = []
    triangular: list[Array | None] = []
    for u in a.factors:
        k = 0 if u is None else power_of_two(xp, u)
        q, r = (None, None) if u is None else xp.linalg.qr(times_power_of_two(u, -k))
        orthonormal.append(q)
        triangular.append(r)
        exponent += k
    core = times_power_of_two(multi_mode_dot(core, triangular), exponent)
    return TuckerTensor(core, tuple(orthonormal))


def _gram(xp: Namespace, u: Array | None, v: Array | None) -> Array | None:
    """Return Uᴴ V, either of which may be the identity."""
    if u is None or v is None:
        return v if u is None else hermitian(xp, u)
    u, v = promote(xp, u, v)
    return xp.matmul(hermitian(xp, u), v)


def _pad(xp: Namespace, x: Array, mode: int, before: int, after: int) -> Array:
    """Put zeros before and after a mode."""

    def zeros(size: int) -> Array:
        shape = (*x.shape[:mode], size, *x.shape[mode + 1 :])
        return xp.zeros(shape, dtype=x.dtype, device=array_api_compat.device(x))

    return xp.concat([zeros(before), x, zeros(after)], axis=mode)
