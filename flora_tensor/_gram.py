"""Gram matrices of unfoldings, in float64 in the processor's memory, and their eigenvalues and leading eigenvectors.

Beside a tensor little more is held than one such matrix and the eigenvectors that are wanted: blocks of an unfolding
are added to one triangle in place, and the steps of LAPACK's eigensolver are taken one by one. NumPy, which has neither
(its `eigh` holds five such matrices and computes all vectors), serves for small matrices; for large ones SciPy is
loaded.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from typing import Any

import array_api_compat
import numpy as np

from flora_tensor._typing import Array, Namespace
from flora_tensor.algebra import mode_dot, multi_mode_dot, product_slabs

# Matrices from this size on go to SciPy.
_LARGE = 128

# Entries of an unfolding that are cast to float64 at a time: what the processor's cache holds. A rank-k update reads
# and writes the whole Gram matrix, which so many columns hide.
_BLOCK, _COLUMNS = 1 << 17, 256

# Neighboring modes are taken together where they have no more than so many indices, and the tensor so many entries
# that a pass over it counts.
SHORT, _LONG_PASS = 64, 1 << 16

# Up to this share of its eigenvectors, inverse iteration takes about the time of divide and conquer for all of them (up
# to a third, less; measured on flat, decaying, graded and clustered spectra and on low rank), and half of its memory.
# LAPACK's MRRR is as fast, but fails (code 22) on some spectra that consist of clusters.
_FEW = 1 / 2

# A product that is not held is made in so many slabs at most: along a mode in the middle, each copies the whole tensor.
_SLABS = 4

# Eigenvectors that are copied at a time.
_TOGETHER = 32

# Entries of a matrix that are looked at at a time.
_SLAB = 1 << 16


class Grams:
    """The Gram matrices A Aᴴ of a tensor's unfoldings; short modes side by side share one pass over the tensor.

    ``factors`` (n, r) of some modes are yet to be multiplied by: the matrices are those of the product, of which never
    more than a part is formed.
    """

    def __init__(self, x: Any, factors: Mapping[int, Any] | None = None) -> None:
        self.x, self.factors = x, dict(factors or {})
        self._joint: dict[range, Any] = {}

    def of(self, mode: int) -> Any:
        """Return one of them, its lower triangle at least, in Fortran order; it is the caller's to overwrite."""
        run = self._neighbors(mode)
        if len(run) == 1:
            return self._sum(run)
        if run not in self._joint:
            sizes = [self.x.shape[k] for k in run]
            joint = _whole(self._sum(run)).reshape(*sizes, *sizes)
            for k in self.factors.keys() & run:
                joint = _turned(joint, k - run.start, self.factors[k])
            self._joint[run] = joint
        # Σ over the other modes of the run, both times at the same index: a partial trace.
        first = [k - run.start for k in run]
        second = [k - run.start + (len(run) if k == mode else 0) for k in run]
        traced = np.einsum(self._joint[run], [*first, *second], [mode - run.start, mode - run.start + len(run)])
        return np.asfortranarray(traced)

    def after(self, mode: int, factor: Any) -> "Grams":
        """Return the Gram matrices of the tensor multiplied by the conjugate transpose of a factor."""
        later = Grams(self.x, {**self.factors, mode: factor})
        run = self._neighbors(mode)
        if run in self._joint:
            later._joint[run] = _turned(self._joint[run], mode - run.start, factor)
        return later

    def _neighbors(self, mode: int) -> range:
        """Return the run of short modes that ``mode`` belongs to."""
        if not is_long_pass(self.x):
            return range(mode, mode + 1)
        starts, size = [0], 1
        for k, n in enumerate(self.x.shape):
            size *= n
            if k and size > SHORT:
                starts.append(k)
                size = n
        return next(range(a, b) for a, b in pairwise([*starts, len(self.x.shape)]) if a <= mode < b)

    def _sum(self, run: range) -> Any:
        """Sum the Gram matrix of a run of modes, seen as one, over parts of the tensor; without the run's factors."""
        gram = None
        for part in self._parts({k: u for k, u in self.factors.items() if k not in run}, run):
            gram = gram_of(_joined(part, run), run.start, gram)
            del part  # before the next one is made
        return gram

    def _parts(self, factors: Mapping[int, Any], run: range) -> Iterator[Any]:
        """Cut the product with factors along a long mode of them, or along a mode without one, but not along a run."""
        x, free = self.x, [k for k in range(self.x.ndim) if k not in factors and k not in run]
        long = max(factors, key=lambda k: factors[k].shape[0], default=None)
        if long is not None and factors[long].shape[0] > SHORT:
            steps, rows = [(k, u.conj().T) for k, u in factors.items()], -(-factors[long].shape[1] // _SLABS)
            yield from (slab for _, slab in product_slabs(array_api_compat.array_namespace(x), x, steps, long, rows))
        elif not factors or not free:
            yield _projected(x, factors)
        else:
            along = max(free, key=lambda k: x.shape[k])
            rows = max(1, 2 * _BLOCK * x.shape[along] // x.size)
            for start in range(0, x.shape[along], rows):
                yield _projected(x[(*(slice(None),) * along, slice(start, start + rows))], factors)


def is_long_pass(x: Any) -> bool:
    """Tell whether a tensor is so large that passes over it count."""
    return math.prod(x.shape) >= _LONG_PASS


def _projected(x: Any, factors: Mapping[int, Any]) -> Any:
    return multi_mode_dot(x, list(factors.values()), modes=list(factors), transpose=True) if factors else x


def _joined(x: Any, run: range) -> Any:
    return x.reshape(*x.shape[: run.start], math.prod(x.shape[run.start : run.stop]), *x.shape[run.stop :])


def _turned(joint: Any, place: int, factor: Any) -> Any:
    """Multiply a joint Gram matrix, an array of twice as many modes, by Uᴴ from the left and U from the right."""
    return mode_dot(mode_dot(joint, factor.conj().T, place), factor.T, place + joint.ndim // 2)


def gram_of(x: Any, mode: int, gram: Any = None) -> Any:
    """Return A Aᴴ of an unfolding in float64 (complex128), its lower triangle at least, in Fortran order.

    It is added to ``gram``, in place, where one is given.
    """
    n = x.shape[mode]
    dtype = np.complex128 if np.iscomplexobj(x) else np.float64
    gram = np.zeros((n, n), dtype=dtype, order="F") if gram is None else gram
    xp = array_api_compat.array_namespace(x)  # NumPy itself has permute_dims since 2.0 only
    for block in column_blocks(xp, x, mode, max(_COLUMNS, _BLOCK // max(n, 1))):
        gram = _plus_square(gram, block.astype(dtype))  # contiguous, by rows or by columns as it lies in x
        del block  # before the next one is made
    return gram


def _plus_square(gram: Any, part: Any) -> Any:
    """Add A Aᴴ to the lower triangle at least, in place."""
    if len(gram) < _LARGE:
        return np.add(gram, part @ part.conj().T, out=gram)
    from scipy.linalg import get_blas_funcs

    update: Any = get_blas_funcs("herk" if np.iscomplexobj(part) else "syrk", (gram,))
    if part.flags.f_contiguous:
        return update(1.0, part, beta=1.0, c=gram, lower=1, overwrite_c=1)
    if np.iscomplexobj(part):
        np.conjugate(part, out=part)  # of the rows' transpose BLAS forms the conjugate
    return update(1.0, part.T, trans=2, beta=1.0, c=gram, lower=1, overwrite_c=1)


def _whole(gram: Any) -> Any:
    """Return a Gram matrix with both triangles."""
    return np.tril(gram) + np.tril(gram, -1).conj().T


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
        del slab


def settle(matrix: Any, floor: float) -> int:
    """Scale a C-contiguous matrix in place to entries of at most one, drop those up to ``floor``; return k of 2**-k."""
    parts = matrix.reshape(-1).view(np.finfo(matrix.dtype).dtype)
    slabs = [parts[i : i + _SLAB] for i in range(0, parts.size, _SLAB)]
    k = math.frexp(max((float(np.abs(slab).max()) for slab in slabs), default=0.0))[1]
    for slab in slabs:
        np.ldexp(slab, -k, out=slab)
        slab[np.abs(slab) <= floor] = 0.0
    return k


def eigenvalues(gram: Any) -> Any:
    """Return the eigenvalues of a Hermitian matrix, whose lower triangle is given and lost, in decreasing order."""
    if len(gram) < _LARGE:
        return np.linalg.eigvalsh(gram)[::-1]
    _, d, e, _ = _tridiagonal(gram)
    return _lapack("sterf", d, d, e)[0][::-1]


def leading_eigenvectors(gram: Any, keep: int | Callable[[Any], int], dtype: Any = None) -> tuple[Any, Any]:
    """Return all eigenvalues of a Hermitian matrix, in decreasing order, and orthonormal eigenvectors of the first.

    Parameters
    ----------
    gram : numpy array, float64 or complex128, shape (n, n)
        The lower triangle, in Fortran order; lost.
    keep : int or callable
        How many eigenvectors, or what says so given all eigenvalues.
    dtype : data type, optional
        The type of the vectors, by default the matrix's.

    Returns
    -------
    values : numpy array, shape (n,)
    vectors : numpy array, shape (n, keep)
    """
    n, dtype = len(gram), gram.dtype if dtype is None else dtype
    if n >= _LARGE and (callable(keep) or keep <= _FEW * n):
        return _some_eigenvectors(gram, keep, dtype)
    if n < _LARGE:
        values, vectors = np.linalg.eigh(gram)
    else:
        values, vectors = _lapack("heevd" if np.iscomplexobj(gram) else "syevd", gram, gram, lower=1, overwrite_a=1)
    values = values[::-1]
    return values, np.array(vectors[:, ::-1][:, : keep(values) if callable(keep) else keep], dtype, order="C")


def _some_eigenvectors(gram: Any, keep: int | Callable[[Any], int], dtype: Any) -> tuple[Any, Any]:
    """Take the eigenvectors of T = Qᴴ C Q, tridiagonal, that are wanted, and multiply them by Q."""
    reflectors, d, e, tau = _tridiagonal(gram)
    values, block, ends = _eigenvalues_by_block(d, e)
    order = np.argsort(-values, kind="stable")
    count = keep(values[order]) if callable(keep) else keep
    # Inverse iteration wants them block by block and increasing, as they are; near ones are made orthogonal.
    chosen = np.sort(order[:count])
    blocks = np.zeros((2, len(d)), dtype=np.int32)
    blocks[0, :count], blocks[1, : len(ends)] = block[chosen], ends
    (vectors,) = _lapack("stein", d, d, e, values[chosen], *blocks)
    turned = _times_reflectors(reflectors, tau, vectors)
    result = np.empty((len(d), count), dtype)
    places = np.argsort(-values[chosen], kind="stable")
    for start in range(0, count, _TOGETHER):
        here = slice(start, start + _TOGETHER)
        result[0, here], result[1:, here] = turned[-1, places[here]], turned[:-1, places[here]]
    return values[order], result


def _eigenvalues_by_block(d: Any, e: Any) -> tuple[Any, Any, Any]:
    """Split a tridiagonal matrix where entries beside the diagonal are negligible, as LAPACK's ``stebz`` does.

    Return the eigenvalues of block after block, increasing in each; the number of each one's block, and where each
    block ends, counted from one. Those of all of it are wanted, which square roots give far faster than bisection.
    """
    eps, tiny = np.finfo(np.float64).eps, np.finfo(np.float64).tiny
    negligible = e * e <= np.abs(d[1:] * d[:-1]) * eps**2 + tiny
    ends = np.append(np.flatnonzero(negligible) + 1, len(d))
    runs = list(pairwise([0, *ends.tolist()]))
    values = [_lapack("sterf", d, d[a:b], e[a : b - 1])[0] if b > a + 1 else d[a:b] for a, b in runs]
    return np.concatenate(values), np.repeat(np.arange(1, len(ends) + 1), [b - a for a, b in runs]), ends


def _tridiagonal(gram: Any) -> tuple[Any, ...]:
    """Reduce a Hermitian matrix by reflections, which take its place; return them, both diagonals and their factors."""
    name = "hetrd" if np.iscomplexobj(gram) else "sytrd"
    return _lapack(name, gram, gram, lower=1, lwork=64 * len(gram), overwrite_a=1)


def _times_reflectors(reflectors: Any, tau: Any, vectors: Any) -> Any:
    """Multiply by the product of the reflections; the first row of the result comes last.

    Reflection j acts on the rows below j; its vector stands below the diagonal of column j. One step down in memory,
    the same columns are those of a QR factorization, by whose factor Q LAPACK multiplies, but for one row more at their
    end, which belongs to the other triangle: with zeros there, and the first row of ``vectors`` moved to the end, it
    takes no part.
    """
    n = len(reflectors)
    reflectors[0, 1:] = 0.0
    below = reflectors.reshape(-1, order="F")[1 : 1 + n * (n - 1)].reshape(n, n - 1, order="F")
    for start in range(0, vectors.shape[1], _TOGETHER):
        vectors[:, start : start + _TOGETHER] = np.roll(vectors[:, start : start + _TOGETHER], -1, axis=0)
    vectors = vectors.astype(reflectors.dtype, copy=False)
    name, work = "unmqr" if np.iscomplexobj(reflectors) else "ormqr", 64 * max(vectors.shape[1], 1)
    return _lapack(name, reflectors, "L", "N", below, tau, vectors, lwork=work, overwrite_c=1)[0]


def orthonormal_factor(matrix: Any, floor: float) -> Any:
    """Return Q of the QR factorization of a tall matrix, in float64 (complex128) and in place of a copy.

    Entries up to ``floor`` of the largest are dropped, as by `settle`.
    """
    wide = np.array(matrix, np.result_type(matrix, np.float64), order="F")
    settle(wide.T, floor)
    work = 64 * wide.shape[1]
    reflectors, tau, _ = _lapack("geqrf", wide, wide, lwork=work, overwrite_a=1)
    name = "ungqr" if np.iscomplexobj(wide) else "orgqr"
    return np.ascontiguousarray(_lapack(name, wide, reflectors, tau, lwork=work, overwrite_a=1)[0], matrix.dtype)


def _lapack(name: str, like: Any, *arguments: Any, **options: Any) -> tuple[Any, ...]:
    """Call a routine of LAPACK for the type of ``like``; return what it found, without its code of success."""
    from scipy.linalg import get_lapack_funcs

    routine: Any = get_lapack_funcs(name, (like,))
    *found, code = routine(*arguments, **options)
    if code:  # pragma: no cover - not seen; NumPy's `eigh` raises the same
        raise np.linalg.LinAlgError(f"eigenvalues of a Gram matrix: LAPACK's {name} failed with code {code}")
    return tuple(found)
