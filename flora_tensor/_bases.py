"""Orthonormal bases of a tensor's unfoldings: the numerical kernels under every decomposition.

Two kernels give left singular vectors of an unfolding:

* *Gram*: the eigenvectors of A Aᴴ, or of Aᴴ A where that is smaller, accumulated in float64. Forming A Aᴴ squares the
  singular values, so those below about √eps of the largest drown in rounding: 1.5e-8 in float64. For float32 data that
  lies *below* what LAPACK's float32 SVD resolves (eps = 1.2e-7), so the kernel loses nothing there. In float32 it would
  lose everything below 3e-4 (measured: a tolerance of 1e-4 then keeps 339 directions where 256 do).
* *LQ*: the SVD of the small triangular factor of an LQ factorization. Resolves down to eps of the working type; several
  times dearer.

`mode_basis` takes the first where it loses nothing and the second elsewhere.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

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
from flora_tensor._gram import Grams, eigenvalues, leading_eigenvectors, orthonormal_factor, settle
from flora_tensor._typing import Array, Namespace
from flora_tensor.algebra import unfold

# Relative size of the smallest singular value that a Gram matrix in float64 still resolves, with a margin.
GRAM_FLOOR = 1e-7

# Matrices from so many entries on are factorized in place: NumPy's `qr` holds them four times in float64.
_LARGE_QR = 1 << 16

# Random numbers that are drawn at a time.
_DRAWN = 1 << 16

# Entries of an unfolding on a device that are cast to float64 at a time.
_DEVICE_BLOCK = 1 << 24

# How many vectors are wanted: a number, what says so given all singular values, or all there are.
Keep: TypeAlias = int | Callable[[Array], int] | None


class Basis(NamedTuple):
    """Leading left singular vectors (n, k), and all m = min(n, columns) singular values (m,) in decreasing order."""

    vectors: Array
    values: Array


def mode_bases(xp: Namespace, x: Array, accuracy: float = 0.0, keep: Sequence[Keep] | None = None) -> list[Basis]:
    """Do what `mode_basis` does for every mode; short modes side by side share a pass over the tensor."""
    grams = grams_of(x)
    wanted = [None] * len(x.shape) if keep is None else keep
    return [mode_basis(xp, x, mode, accuracy, k, grams) for mode, k in enumerate(wanted)]


def mode_basis(
    xp: Namespace, x: Array, mode: int, accuracy: float = 0.0, keep: Keep = None, grams: Grams | None = None
) -> Basis:
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
    keep : int or callable, optional
        How many vectors are wanted, by default all. A few of a large mode's take half the time and a fraction of the
        memory.
    grams : Grams, optional
        The Gram matrices of ``x``, where several modes' bases are wanted.
    """
    if not by_gram(xp, x, mode, accuracy):
        return _first(left_basis(unfold(x, mode)), keep)
    if _is_long(x, mode):
        return _long_basis(xp, unfold(x, mode), accuracy, keep)
    grams = grams or grams_of(x)
    if grams is None:
        vectors, values = _device_gram_basis(xp, stop_gradient(x), mode)
    else:
        vectors, values = _host_gram_basis(xp, x, grams, mode, None if is_differentiated(x) else keep)
    vectors = with_fixed_signs(xp, vectors)
    if is_differentiated(x):
        vectors, values = _with_derivatives(xp, unfold(x, mode), vectors, values)
    return _first(Basis(vectors, values), keep)


def mode_values(xp: Namespace, x: Array, mode: int, accuracy: float = 0.0, grams: Grams | None = None) -> Array:
    """Return only the singular values of an unfolding, as `mode_basis` would, for a fraction of its cost."""
    grams = grams or grams_of(x)
    if grams is None or is_differentiated(x) or not by_gram(xp, x, mode, accuracy):
        return mode_basis(xp, x, mode, accuracy, 0).values
    if _is_long(x, mode):
        return mode_values(xp, hermitian(xp, unfold(x, mode)), 0, accuracy)
    gram = grams.of(mode)
    k = settle(gram.T, epsilon(xp, x.dtype) ** 4)
    return _roots(xp, x, grams, eigenvalues(gram), k)


def all_mode_values(xp: Namespace, x: Array) -> list[Array]:
    """Return the singular values of every unfolding; short modes side by side share a pass over the tensor."""
    grams = grams_of(x)
    return [mode_values(xp, x, mode, 0.0, grams) for mode in range(len(x.shape))]


def by_gram(xp: Namespace, x: Array, mode: int, accuracy: float) -> bool:
    """Tell whether the Gram kernel loses nothing, and is there where the array lives."""
    if 0 in x.shape or max(accuracy, epsilon(xp, x.dtype)) < GRAM_FLOOR:
        return False
    if _is_long(x, mode) and is_differentiated(x):  # QR has no derivative where directions are without content
        return False
    return "64" in str(accumulation_dtype(xp, x)) or host_view(stop_gradient(x)) is not None


def _is_long(x: Array, mode: int) -> bool:
    return x.shape[mode] ** 2 > math.prod(x.shape)


def grams_of(x: Array) -> Grams | None:
    """Return the Gram matrices of a tensor that lies in the processor's memory."""
    host = host_view(stop_gradient(x))
    return None if host is None else Grams(host)


def _host_gram_basis(xp: Namespace, x: Array, grams: Grams, mode: int, keep: Keep) -> tuple[Array, Array]:
    gram = grams.of(mode)
    k = settle(gram.T, epsilon(xp, x.dtype) ** 4)
    count = (lambda found: keep(_roots(xp, x, grams, found, k))) if callable(keep) else keep
    found, vectors = leading_eigenvectors(gram, len(gram) if count is None else count, grams.x.dtype)
    return xp.asarray(vectors, device=array_api_compat.device(x)), _roots(xp, x, grams, found, k)


def _roots(xp: Namespace, x: Array, grams: Grams, squares: Any, k: int) -> Array:
    """Return singular values in the type of ``x`` from the eigenvalues, times 2**-k, of a Gram matrix."""
    values = np.sqrt(np.ldexp(np.maximum(squares, 0.0), k)).astype(grams.x.real.dtype)
    return xp.asarray(values, device=array_api_compat.device(x))


def _long_basis(xp: Namespace, matrix: Array, accuracy: float, keep: Keep) -> Basis:
    """Find A = U Σ Vᴴ, with more rows than columns, by its short side: the columns of A V = U Σ are orthogonal."""
    short, values = mode_basis(xp, hermitian(xp, matrix), 0, accuracy, keep)
    images, lengths = xp.matmul(matrix, short), values[: short.shape[1]]
    if lengths.shape[0] and 32 * float(lengths[-1]) > float(lengths[0]):
        # Where none is short, dividing by their lengths is as good as QR and far cheaper.
        vectors = images / lengths[None, :]
    else:
        vectors = orthonormal_columns(xp, images)
    return Basis(with_fixed_signs(xp, vectors), values)


def _first(basis: Basis, keep: Keep) -> Basis:
    """Leave out the vectors that are not wanted."""
    if keep is None:
        return basis
    return Basis(basis.vectors[:, : keep(basis.values) if callable(keep) else keep], basis.values)


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
    if math.prod(x.shape) <= rank * x.shape[mode]:
        return orthonormal_columns(xp, unfold(x, mode))
    basis = mode_basis(xp, x, mode, 1.0, size)
    return left_basis(unfold(x, mode)).vectors[:, :size] if below_reach(xp, basis, rank) else basis.vectors


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
    if array_api_compat.is_numpy_array(matrix) and matrix.shape[0] >= matrix.shape[1] and matrix.size >= _LARGE_QR:
        return orthonormal_factor(matrix, epsilon(xp, matrix.dtype) ** 4)
    return xp.linalg.qr(_near_one(xp, matrix)[0])[0]


def _near_one(xp: Namespace, matrix: Array) -> tuple[Array, int]:
    """Return ``matrix · 2**-k`` with entries of at most one, without those that are nothing beside the largest, and k.

    Products and reflections of tensors of low rank leave rounding of rounding, smaller by eps from step to step. It
    soon meets the subnormal numbers, whose rounding depends on the scale, and the last vectors are made of it: they
    have the same bits at every scale only if the factorization is given the same bits.
    """
    floor = epsilon(xp, matrix.dtype) ** 4
    if array_api_compat.is_numpy_array(matrix):  # the same in few calls, as most of these matrices are small
        copy = np.array(matrix, order="C")
        return copy, settle(copy, floor)
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
    if array_api_compat.is_numpy_array(x):
        drawn: Any = np.empty(shape, x.dtype)
        step = max(1, _DRAWN // max(shape[1], 1))
        for part in (drawn.real, drawn.imag) if np.iscomplexobj(drawn) else (drawn,):
            for start in range(0, shape[0], step):  # never all in float64
                rows = part[start : start + step]
                rows[...] = generator.standard_normal(rows.shape)
        return drawn
    real = generator.standard_normal(shape)
    drawn = real + 1j * generator.standard_normal(shape) if is_complex(xp, x.dtype) else real
    return xp.astype(xp.asarray(drawn, device=array_api_compat.device(x)), x.dtype, copy=False)


def _device_gram_basis(xp: Namespace, x: Array, mode: int) -> tuple[Array, Array]:
    """Do as the Gram kernel does where the array lives: on a device, or under a trace."""
    matrix = unfold(x, mode)
    wide = xp.complex128 if is_complex(xp, x.dtype) else xp.float64
    n, p = matrix.shape
    gram = xp.zeros((n, n), dtype=wide, device=array_api_compat.device(x))
    width = max(n, _DEVICE_BLOCK // n)
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
    return vectors if 0 in vectors.shape else vectors * phases_of(xp, vectors)[None, :]


def phases_of(xp: Namespace, vectors: Array) -> Array:
    """Return what to multiply the columns of a matrix (n, r) by for that: signs, or complex numbers of size 1."""
    if array_api_compat.is_numpy_array(vectors):  # the same in few calls, as most of these matrices are small
        entries = vectors[np.argmax(np.abs(vectors), axis=0), np.arange(vectors.shape[1])]
        return entries.conj() / np.abs(entries) if np.iscomplexobj(entries) else np.sign(entries)
    magnitudes = xp.abs(vectors)
    rows = xp.arange(vectors.shape[0], device=array_api_compat.device(vectors))
    chosen = rows[:, None] == xp.argmax(magnitudes, axis=0)[None, :]
    entries = xp.sum(xp.where(chosen, vectors, xp.zeros_like(vectors)), axis=0)
    if is_complex(xp, vectors.dtype):
        return conjugate(xp, entries) / xp.max(magnitudes, axis=0)
    return xp.sign(entries)


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
