"""Orthonormal bases of a tensor's unfoldings: the numerical kernels under every decomposition.

Two kernels give all left singular vectors of an unfolding:

* *Gram*: the eigenvectors of A Aᴴ, accumulated in float64. Forming A Aᴴ squares the singular values, so those below
about √eps of the
  largest drown in rounding: 1.5e-8 in float64. For float32 data that lies *below* what LAPACK's float32 SVD
  resolves (eps = 1.2e-7), so the kernel loses nothing there. In float32 it would lose everything below 3e-4
  (measured: a tolerance of 1e-4 then keeps 339 directions where 256 do).
* *LQ*: the SVD of the small triangular factor of an LQ factorization. Resolves down to eps of the working type; several
times dearer.

`mode_basis` takes the first where it loses nothing and the second elsewhere.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import array_api_compat
import numpy as np

from flora_tensor._arrays import (
    accumulation_dtype,
    array_namespace,
    conjugate,
    epsilon,
    hermitian,
    host_squares,
    host_view,
    is_complex,
    is_differentiated,
    power_of_two,
    stop_gradient,
    times_power_of_two,
)
from flora_tensor._typing import Array, Namespace
from flora_tensor.algebra import unfold

# Entries of an unfolding that are cast to float64 and multiplied at a time: this many, or an eighth of the tensor if
# that is more, a quarter of the memory of float32. Few large products are faster than many small ones: after each of
# them NumPy copies one triangle of the result to the other, which for 8 blocks takes a third of syrk's time (measured).
_BLOCK = 1 << 17

# Relative size of the smallest singular value that a Gram matrix in float64 still resolves, with a margin.
GRAM_FLOOR = 1e-7


class Basis(NamedTuple):
    """Left singular vectors (n, m), m = min(n, columns), and singular values (m,) in decreasing order."""

    vectors: Array
    values: Array


def mode_basis(xp: Namespace, x: Array, mode: int, accuracy: float = 0.0) -> Basis:
    """Return the left singular vectors and the singular values of an unfolding.

    The vectors are orthonormal whatever the rank, zero included. The entry of largest magnitude in each is positive
    (the first of equals). Derivatives are those of `left_basis`.

    Parameters
    ----------
    xp : namespace
        The namespace of ``x``.
    x : array, shape (I_0, …, I_{N-1})
        The tensor, of moderate magnitude.
    mode : int
        The mode that becomes the rows.
    accuracy : float
        Singular values down to this share of the largest must be right. What the data type itself resolves is always
        enough: 0 asks for that.
    """
    size = x.shape[mode]
    columns = math.prod(x.shape) // size if size else 0
    resolved = max(accuracy, epsilon(xp, x.dtype))
    if size > columns or size == 0 or resolved < GRAM_FLOOR:
        return left_basis(unfold(x, mode))
    constant = stop_gradient(x)
    host = host_view(constant)
    if host is not None:
        gram, k = _near_one(np, _host_gram(host, mode), epsilon(xp, x.dtype))
        eigenvalues, eigenvectors = np.linalg.eigh(gram)
        device = array_api_compat.device(x)
        vectors = xp.asarray(eigenvectors[:, ::-1].astype(host.dtype), device=device)
        values = np.sqrt(np.ldexp(np.maximum(eigenvalues[::-1], 0.0), k)).astype(host.real.dtype)
        values = xp.asarray(values, device=device)
    elif "64" in str(accumulation_dtype(xp, x)):
        vectors, values = _device_gram_basis(xp, constant, mode)
    else:
        return left_basis(unfold(x, mode))
    vectors = with_fixed_signs(xp, vectors)
    if is_differentiated(x):
        vectors, values = _with_derivatives(xp, unfold(x, mode), vectors, values)
    return Basis(vectors, values)


def mode_values(xp: Namespace, x: Array, mode: int) -> Array:
    """Return only the singular values of an unfolding, as `mode_basis` would, for a fraction of its cost."""
    size = x.shape[mode]
    host = host_view(x) if epsilon(xp, x.dtype) >= GRAM_FLOOR and 0 < size <= math.prod(x.shape) // size else None
    if host is None or is_differentiated(x):
        return mode_basis(xp, x, mode).values
    gram, k = _near_one(np, _host_gram(host, mode), epsilon(xp, x.dtype))
    values = np.sqrt(np.ldexp(np.maximum(np.linalg.eigvalsh(gram)[::-1], 0.0), k))
    return xp.asarray(values.astype(host.real.dtype), device=array_api_compat.device(x))


def left_basis(matrix: Array) -> Basis:
    """Return the left singular vectors and the singular values of a matrix (n, p), to the accuracy of its type.

    Where somebody differentiates through ``matrix``, the vectors carry the exact first derivative for separated
    singular values; between values that coincide to rounding the derivative of their rotation into each other is set to
    zero. That is the true derivative of everything that does not depend on the choice of basis among equals, and never
    NaN.
    """
    xp = array_namespace("left_basis", matrix)
    constant = stop_gradient(matrix)
    n, p = constant.shape
    if n == 0 or p == 0:
        return Basis(constant[:, :0], xp.reshape(xp.abs(constant[:0, :0]), (0,)))
    if p > n:  # L of the LQ factorization has the same left singular vectors and values, and is small
        k = power_of_two(xp, constant)
        constant = hermitian(xp, _triangular_factor(xp, hermitian(xp, times_power_of_two(constant, -k))))
    else:
        constant, k = _near_one(xp, constant)
    vectors, values, _ = xp.linalg.svd(constant, full_matrices=False)
    values = times_power_of_two(values, k)
    vectors = with_fixed_signs(xp, vectors)
    if is_differentiated(matrix):
        vectors, values = _with_derivatives(xp, matrix, vectors, values)
    return Basis(vectors, values)


def leading_basis(xp: Namespace, x: Array, mode: int, rank: int, size: int) -> Array:
    """Return an orthonormal basis of up to ``size`` columns, the first ``rank`` of which span as many leading vectors.

    All of a wide basis costs little more than its first columns: the Gram matrix of the unfolding's shorter side, and
    QR where that is the right one.
    """
    n = x.shape[mode]
    columns = math.prod(x.shape) // n
    matrix = unfold(x, mode)
    if columns <= rank:
        return orthonormal_columns(xp, matrix)
    basis = mode_basis(xp, x, mode, 1.0) if n <= columns else mode_basis(xp, hermitian(xp, matrix), 0, 1.0)
    if below_reach(xp, basis, rank):
        return left_basis(matrix).vectors[:, :size]
    leading = basis.vectors[:, :size]
    if n <= columns:
        return leading
    images, lengths = xp.matmul(matrix, leading), basis.values[:size]
    weakest, longest = float(lengths[-1]), float(lengths[0])
    # The images are orthogonal; where none is short, dividing by their lengths is as good as QR and far cheaper.
    return images / lengths[None, :] if 32 * weakest > longest else orthonormal_columns(xp, images)


def below_reach(xp: Namespace, basis: Basis, rank: int) -> bool:
    """Tell whether a basis from a Gram matrix is not good enough: what is kept or what is cut drowns in its rounding.

    For float32 data it always is; see the head of this file.
    """
    squares = host_squares(basis.values)
    if epsilon(xp, basis.values.dtype) >= GRAM_FLOOR or not 0 < rank <= squares.size:
        return False
    weakest, cut = squares[rank - 1], np.sum(squares[rank:])
    reach = (100 * GRAM_FLOOR) ** 2 * squares[0]
    return bool(weakest < reach or (rank < squares.size and cut < reach))


def orthonormal_columns(xp: Namespace, matrix: Array) -> Array:
    """Return Q of the QR factorization of a tall matrix."""
    return xp.linalg.qr(_near_one(xp, matrix)[0])[0]


def _near_one(xp: Namespace, matrix: Array, eps: float = 0.0) -> tuple[Array, int]:
    """Return ``matrix · 2**-k`` with entries of at most one, without those that are nothing beside the largest, and k.

    ``eps`` is the rounding of the data that the matrix was computed from, where that is coarser than its own.

    Products and reflections of tensors of low rank leave rounding of rounding, smaller by eps from step to step. It
    soon meets the subnormal numbers, whose rounding depends on the scale, and the last vectors are made of it: they
    have the same bits at every scale only if the factorization is given the same bits.
    """
    floor = max(eps, epsilon(xp, matrix.dtype)) ** 4
    if array_api_compat.is_numpy_array(matrix):  # the same in few calls, as most of these matrices are small
        copy = np.array(matrix, order="C")
        parts = copy.view(np.finfo(copy.dtype).dtype)
        k = math.frexp(float(np.abs(parts).max(initial=0.0)))[1]
        np.ldexp(parts, -k, out=parts)
        parts[np.abs(parts) <= floor] = 0.0
        return copy, k
    k = power_of_two(xp, matrix)
    scaled = times_power_of_two(matrix, -k)

    def cut(part: Array) -> Array:
        return xp.where(xp.abs(part) > floor, part, xp.zeros_like(part))

    if not is_complex(xp, matrix.dtype):
        return cut(scaled), k
    real, imaginary = (xp.astype(cut(part), matrix.dtype) for part in (xp.real(scaled), xp.imag(scaled)))
    return real + 1j * imaginary, k


def complement(xp: Namespace, old: Array, new: Array) -> Array:
    """Return as many orthonormal columns as ``new`` has, orthogonal to ``old``, that with it span what ``new`` does."""
    for _ in range(2):
        new = orthonormal_columns(xp, new - xp.matmul(old, xp.matmul(hermitian(xp, old), new)))
        if float(xp.max(xp.abs(xp.matmul(hermitian(xp, old), new)))) <= 10 * epsilon(xp, new.dtype):
            return new
    # Where nothing but rounding is left of a direction, projecting it again leaves rounding again. Householder
    # reflections complete a basis whatever they are given.
    return orthonormal_columns(xp, xp.concat([old, new], axis=1))[:, old.shape[1] :]


def gaussian(xp: Namespace, x: Array, shape: tuple[int, int], generator: np.random.Generator) -> Array:
    """Draw a matrix of standard normal numbers, of the type and on the device of ``x``; the same for every library."""
    real = generator.standard_normal(shape)
    drawn = real + 1j * generator.standard_normal(shape) if is_complex(xp, x.dtype) else real
    return xp.astype(xp.asarray(drawn, device=array_api_compat.device(x)), x.dtype, copy=False)


def column_blocks(xp: Namespace, x: Array, mode: int, width: int) -> Iterator[Array]:
    """Cut an unfolding into blocks (n, ≤ ``width``) of its columns, in their order, without copying the whole."""
    n = x.shape[mode]
    before, after = math.prod(x.shape[:mode]), math.prod(x.shape[mode + 1 :])
    slabs = xp.reshape(x, (before, n, after))
    together = max(1, width // max(after, 1))
    for start in range(0, before, together):
        stop = min(before, start + together)
        if stop == start + 1:
            slab = slabs[start, ...]
        else:
            slab = xp.reshape(xp.permute_dims(slabs[start:stop, ...], (1, 0, 2)), (n, (stop - start) * after))
        for left in range(0, slab.shape[1], width):
            yield slab[:, left : min(left + width, slab.shape[1])]


def _host_gram(x: Any, mode: int) -> Any:
    """Return A Aᴴ of an unfolding in float64 (complex128), block by block: the tensor is neither copied nor cast whole.

    NumPy recognizes a product of a matrix with its own transpose and computes half of it (syrk).
    """
    n = x.shape[mode]
    dtype = np.complex128 if np.iscomplexobj(x) else np.float64
    gram = np.zeros((n, n), dtype=dtype)
    xp = array_api_compat.array_namespace(x)  # NumPy itself has permute_dims since 2.0 only
    for block in column_blocks(xp, x, mode, max(1, max(_BLOCK, x.size // 8) // n)):
        part = np.ascontiguousarray(block, dtype=dtype)
        gram += part @ (part.conj().T if np.iscomplexobj(part) else part.T)
    return gram


def _device_gram_basis(xp: Namespace, x: Array, mode: int) -> tuple[Array, Array]:
    """Do as the Gram kernel does where the array lives: on a device, or under a trace."""
    matrix = unfold(x, mode)
    wide = xp.complex128 if is_complex(xp, x.dtype) else xp.float64
    n, p = matrix.shape
    gram = xp.zeros((n, n), dtype=wide, device=array_api_compat.device(x))
    width = max(n, _BLOCK * 128 // n)
    for left in range(0, p, width):
        part = xp.astype(matrix[:, left : min(left + width, p)], wide)
        gram = gram + xp.matmul(part, hermitian(xp, part))
    eigenvalues, eigenvectors = xp.linalg.eigh(gram)
    eigenvalues, eigenvectors = xp.flip(eigenvalues), xp.flip(eigenvectors, axis=1)
    values = xp.sqrt(xp.where(eigenvalues > 0, eigenvalues, xp.zeros_like(eigenvalues)))
    return xp.astype(eigenvectors, x.dtype), xp.astype(
        values, xp.real(matrix[:1, :1]).dtype if is_complex(xp, x.dtype) else x.dtype
    )


def _triangular_factor(xp: Namespace, tall: Array) -> Array:
    """Return R of the QR factorization, without forming Q where the library can leave it out."""
    if array_api_compat.is_torch_array(tall):
        import torch

        return torch.linalg.qr(tall, mode="r")[1]
    if array_api_compat.is_numpy_array(tall):
        return np.linalg.qr(tall, mode="r")
    return xp.linalg.qr(tall)[1]


def with_fixed_signs(xp: Namespace, vectors: Array) -> Array:
    """Make the entry of largest magnitude in each column real and positive, the first one where several are largest."""
    if 0 in vectors.shape:
        return vectors
    magnitudes = xp.abs(vectors)
    rows = xp.arange(vectors.shape[0], device=array_api_compat.device(vectors))
    chosen = rows[:, None] == xp.argmax(magnitudes, axis=0)[None, :]
    entries = xp.sum(xp.where(chosen, vectors, xp.zeros_like(vectors)), axis=0)
    if is_complex(xp, vectors.dtype):
        sizes = xp.max(magnitudes, axis=0)
        return vectors * (conjugate(xp, entries) / sizes)[None, :]
    return vectors * xp.sign(entries)[None, :]


def _with_derivatives(xp: Namespace, matrix: Array, vectors: Array, values: Array) -> tuple[Array, Array]:
    """Attach first derivatives: equal in value, differentiable in ``matrix``.

    With C = A Aᴴ = U Λ Uᴴ, perturbation theory gives dλ_j = u_jᴴ dC u_j and
    du_j = Σ_{i≠j} u_i (u_iᴴ dC u_j)/(λ_j − λ_i) + (I − U Uᴴ) dC u_j / λ_j; the sum leaves out pairs with equal λ.
    Here dC = C − constant(C), which is zero in value and has C's derivative.
    """
    n, p = matrix.shape
    gram = xp.matmul(matrix, hermitian(xp, matrix))
    image = xp.matmul(gram - stop_gradient(gram), vectors)  # dC · U
    within = xp.matmul(hermitian(xp, vectors), image)  # Uᴴ · dC · U
    eigenvalues = values * values
    floor = max(n, p) * epsilon(xp, matrix.dtype) * xp.max(eigenvalues)
    gaps = eigenvalues[None, :] - eigenvalues[:, None]
    turned = xp.matmul(vectors, within * safe_inverse(xp, gaps, floor))
    outside = (image - xp.matmul(vectors, within)) * safe_inverse(xp, eigenvalues, floor)[None, :]
    change = xp.real(xp.linalg.diagonal(within)) if is_complex(xp, matrix.dtype) else xp.linalg.diagonal(within)
    singular = values + 0.5 * change * safe_inverse(xp, values, xp.sqrt(floor))
    return vectors + turned + outside, singular


def safe_inverse(xp: Namespace, x: Array, floor: Any) -> Array:
    """Return 1/x, and 0 where |x| does not exceed ``floor``."""
    large = xp.abs(x) > floor
    return xp.astype(large, x.dtype) / xp.where(large, x, xp.ones_like(x))
