"""Orthonormal bases of a tensor's unfoldings: the one numerical kernel under every decomposition.

The kernel is LAPACK's SVD of the small factor of an LQ factorization. A Gram matrix would be faster and would lose
every singular value below √eps of the largest (measured: tolerance 1e-4 in float32 then keeps 339 directions where 256
do).
"""

from typing import Any, NamedTuple

import array_api_compat

from flora_tensor._arrays import (
    array_namespace,
    conjugate,
    epsilon,
    hermitian,
    is_complex,
    is_differentiated,
    stop_gradient,
)
from flora_tensor._typing import Array, Namespace


class Basis(NamedTuple):
    """Left singular vectors (n, m), m = min(n, columns), and singular values (m,) in decreasing order."""

    vectors: Array
    values: Array


def left_basis(matrix: Array) -> Basis:
    """Return the left singular vectors and the singular values of a matrix (n, p).

    The vectors are orthonormal whatever the rank, zero included. The entry of largest magnitude in each is positive
    (the first of equals), so equal input gives equal signs on every platform.

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
        constant = hermitian(xp, _triangular_factor(xp, hermitian(xp, constant)))
    vectors, values, _ = xp.linalg.svd(constant, full_matrices=False)
    vectors = _with_fixed_signs(xp, vectors)
    if is_differentiated(matrix):
        vectors, values = _with_derivatives(xp, matrix, vectors, values)
    return Basis(vectors, values)


def _triangular_factor(xp: Namespace, tall: Array) -> Array:
    """Return R of the QR factorization, without forming Q where the library can leave it out."""
    if array_api_compat.is_torch_array(tall):
        import torch

        return torch.linalg.qr(tall, mode="r")[1]
    if array_api_compat.is_numpy_array(tall) or array_api_compat.is_cupy_array(tall):
        library: Any = __import__(type(tall).__module__.split(".")[0])
        return library.linalg.qr(tall, mode="r")
    return xp.linalg.qr(tall)[1]


def _with_fixed_signs(xp: Namespace, vectors: Array) -> Array:
    """Make the entry of largest magnitude in each column real and positive, the first one where several are largest."""
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
    turned = xp.matmul(vectors, within * _safe_inverse(xp, gaps, floor))
    outside = (image - xp.matmul(vectors, within)) * _safe_inverse(xp, eigenvalues, floor)[None, :]
    change = xp.real(xp.linalg.diagonal(within)) if is_complex(xp, matrix.dtype) else xp.linalg.diagonal(within)
    singular = values + 0.5 * change * _safe_inverse(xp, values, xp.sqrt(floor))
    return vectors + turned + outside, singular


def _safe_inverse(xp: Namespace, x: Array, floor: Any) -> Array:
    """Return 1/x, and 0 where |x| does not exceed ``floor``."""
    large = xp.abs(x) > floor
    return xp.astype(large, x.dtype) / xp.where(large, x, xp.ones_like(x))
