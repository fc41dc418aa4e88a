"""What the tests share: array libraries, derived tolerances, and hypothesis strategies for tensors of every kind.

A strategy draws a *description* (`Sample`, `TuckerSample`): a few integers and words that name a tensor. The numbers
come from a seeded generator, so that drawing is fast, shrinking works on shapes and kinds, and the repr of a failing
example is all that is needed to rebuild it.
"""

import contextvars
import functools
import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from flora_tensor import TuckerTensor, feasible_ranks

NAMESPACES = ("numpy", "torch", "jax", "array_api_strict")

REAL = ("float32", "float64")
COMPLEX = ("complex64", "complex128")
LOW_PRECISION = ("float16", "bfloat16")
INTEGRAL = ("int32", "int64", "uint8", "bool")
FLOATING = REAL + COMPLEX
EVERY_DTYPE = FLOATING + LOW_PRECISION + INTEGRAL

KINDS = ("gauss", "zero", "ones", "low-rank", "graded", "superdiagonal", "near-tie")
SCALES = ("unit", "huge", "tiny", "subnormal")
LAYOUTS = ("C", "F", "permuted", "strided", "expanded", "negative", "read-only")

# The magnitudes that a scale stands for. Integers know only one; the squares of "huge" and "tiny" overflow and vanish.
_MAGNITUDES = {
    "float16": {"huge": 2e3, "tiny": 1e-3, "subnormal": 1e-6},
    "bfloat16": {"huge": 1e30, "tiny": 1e-30, "subnormal": 1e-39},
    "float32": {"huge": 1e30, "tiny": 1e-30, "subnormal": 1e-40},
    "float64": {"huge": 1e250, "tiny": 1e-250, "subnormal": 1e-310},
    "complex64": {"huge": 1e30, "tiny": 1e-30, "subnormal": 1e-40},
    "complex128": {"huge": 1e250, "tiny": 1e-250, "subnormal": 1e-310},
}


class _Missing:
    """Stands in for a library that is not installed: the test that needs it is skipped, or the module at its import."""

    def __init__(self, name: str):
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("__"):  # pytest looks for these in whatever a module holds
            raise AttributeError(attribute)
        pytest.skip(f"needs {self._name}", allow_module_level=True)


def optional(name: str) -> Any:
    """Import a library that the core does without, or return what skips the tests that turn to it."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        return _Missing(name)


def namespace(name: str) -> Any:
    """Return the array-API namespace of a library; skip the test where it is not installed."""
    pytest.importorskip(name)
    if name == "jax":
        return importlib.import_module("jax.numpy")
    return importlib.import_module(name if name == "array_api_strict" else f"array_api_compat.{name}")


def library(xp: Any) -> str:
    """Return the entry of `NAMESPACES` that a namespace belongs to."""
    return xp.__name__.removeprefix("array_api_compat.").split(".")[0]


# Where this is set, `shapes` draws from these alone.
_few_shapes: contextvars.ContextVar[Sequence[tuple[int, ...]]] = contextvars.ContextVar("few_shapes", default=())


def few_shapes() -> bool:
    """Tell whether a strategy draws for a library that should see few shapes."""
    return bool(_few_shapes.get())


def for_all(
    *, jax_shapes: Sequence[tuple[int, ...]] = (), jax_examples: int = 0, **strategies: st.SearchStrategy[Any]
) -> Callable[[Callable[..., None]], Callable[[Any], None]]:
    """Run ``test(xp, **drawn)`` as a property, over the namespace that pytest's ``xp`` fixture gives.

    JAX compiles each operation anew for each shape, which takes a hundred times as long as running it, so it sees an
    eighth of the examples (or ``jax_examples``); with ``jax_shapes`` only these shapes, in two data types, whose
    operations are compiled once for all tests.
    """

    def decorate(test: Callable[..., None]) -> Callable[[Any], None]:
        @functools.wraps(test)
        def wrapper(xp: Any) -> None:
            def body(**drawn: Any) -> None:
                test(xp, **drawn)

            # Hypothesis derives the seed of a derandomized run from the name.
            body.__name__ = f"{test.__name__}_{library(xp)}"
            on_jax = library(xp) == "jax"
            examples = settings().max_examples
            examples = jax_examples or max(4, examples // 8) if on_jax else examples
            token = _few_shapes.set(jax_shapes if on_jax else ())
            try:
                settings(max_examples=examples)(given(**strategies)(body))()
            finally:
                _few_shapes.reset(token)

        # pytest reads the signature: only the fixture is its business.
        del wrapper.__wrapped__
        return wrapper

    return decorate


def dtype_name(dtype: Any) -> str:
    """Return the plain name of a data type of any library, such as ``float32``."""
    if isinstance(dtype, type):
        return np.dtype(dtype).name
    return str(dtype).rsplit(".", maxsplit=1)[-1]


def tolerance(dtype: Any, *sizes: int, norm: float = 1.0, factor: float = 30.0, xp: Any = None) -> float:
    """Return c · eps(dtype) · ‖x‖ · sqrt(size): how far rounding may carry a backward-stable result.

    ``sizes`` are the lengths whose product is the number of roundings that add up like a random walk. 30 is the ratio
    that LAPACK's own test suite allows. Below the smallest normal number the spacing of numbers no longer shrinks with
    them, hence the lower limit on ``norm``; XLA rounds all that lies there to zero.
    """
    real = {"complex64": "float32", "complex128": "float64"}.get(dtype_name(dtype), dtype_name(dtype))
    info = ml_dtypes.finfo(real)
    eps, tiny = float(info.eps), float(info.smallest_normal)
    flushed = tiny if xp is not None and library(xp) == "jax" else 0.0
    root = math.sqrt(max(1, math.prod(sizes)))
    return factor * root * max(eps * max(float(norm), tiny), flushed)


def bfloat16_tolerance(x: Any) -> float:
    """Return how far ``x`` may move where products take numbers rounded to 16 bits, and sum in 32.

    Each of some eight operations in a row rounds once what it takes and gives; sizes do not count, for sums are wider.
    """
    return tolerance("bfloat16", norm=frobenius(x.detach()), factor=8.0)


def frobenius(x: Any) -> float:
    """Return the Frobenius norm of an array of any library, in float64 and safe from overflow and underflow."""
    x = to_numpy(x)
    x = np.asarray(x, dtype=np.complex128 if np.iscomplexobj(x) else np.float64)
    largest = float(np.max(np.abs(x), initial=0.0))
    if largest == 0.0 or not math.isfinite(largest):
        return largest
    # Divide in two steps: the reciprocal of a subnormal number overflows.
    exponent = math.frexp(largest)[1]
    half = exponent // 2
    scaled = np.abs(x) * 2.0**-half * 2.0 ** -(exponent - half)
    return math.ldexp(float(np.linalg.norm(scaled.ravel())), exponent)


def distance(a: Any, b: Any) -> float:
    """Return ‖a − b‖ in float64 for arrays of any library; shapes must agree."""
    a, b = to_numpy(a), to_numpy(b)
    assert a.shape == b.shape, f"shapes {a.shape} and {b.shape} differ"
    kind = np.complex128 if np.iscomplexobj(a) or np.iscomplexobj(b) else np.float64
    return frobenius(np.asarray(a, dtype=kind) - np.asarray(b, dtype=kind))


def to_numpy(x: Any) -> np.ndarray:
    """Return an array of any library as NumPy's, bfloat16 as float32 (which holds all its values)."""
    if hasattr(x, "detach"):
        x = x.detach().resolve_conj().resolve_neg()
        return (x.float() if dtype_name(x.dtype) == "bfloat16" else x).numpy()
    x = np.asarray(x)
    return x.astype(np.float32) if x.dtype.name == "bfloat16" else x


def same_bits(a: Any, b: Any) -> bool:
    """Tell whether two arrays agree in shape and data type and bit for bit, NaNs and signs of zeros included."""
    a, b = to_numpy(a), to_numpy(b)
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


def supports(xp: Any, dtype: str) -> bool:
    """Tell whether a library has a data type."""
    xp = namespace("numpy") if xp is np else xp
    return hasattr(xp, dtype) and not (library(xp) == "numpy" and dtype == "bfloat16")


def as_array(xp: Any, values: Any, dtype: str | None = None) -> Any:
    """Return NumPy values as an array of ``xp``, always in memory of its own."""
    values = np.array(values)
    if dtype == "bfloat16" or (dtype is None and values.dtype.name == "bfloat16"):
        return xp.asarray(values.astype(np.float32), dtype=xp.bfloat16)
    return xp.asarray(values if dtype is None else values.astype(dtype))


def normal(rng: np.random.Generator, shape: Sequence[int], dtype: str = "float64") -> np.ndarray:
    """Return standard normal numbers in double precision, complex ones for a complex ``dtype``."""
    x = rng.standard_normal(tuple(shape))
    return x + 1j * rng.standard_normal(tuple(shape)) if dtype in COMPLEX else x


def orthonormal(rng: np.random.Generator, size: int, rank: int, dtype: str = "float64") -> np.ndarray:
    """Return a (size, rank) matrix with orthonormal columns, rank ≤ size, uniformly distributed."""
    q, r = np.linalg.qr(normal(rng, (size, rank), dtype))
    d = np.diagonal(r)
    return q * (d / np.where(d == 0, 1, np.abs(d)))


def dense(core: np.ndarray, factors: Sequence[np.ndarray | None]) -> np.ndarray:
    """Return a Tucker tensor as a dense one by a single `einsum`: slow, and plainly right."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    n = core.ndim
    operands = [(f"{letters[n + k]}{letters[k]}", u) for k, u in enumerate(factors) if u is not None]
    result = "".join(letters[k] if u is None else letters[n + k] for k, u in enumerate(factors))
    terms = ",".join([letters[:n], *(term for term, _ in operands)])
    return np.einsum(f"{terms}->{result}", core, *(u for _, u in operands), optimize=True)


@dataclass(frozen=True)
class Sample:
    """A tensor, described: `values` gives it as a NumPy array, `to` as an array of a library in the layout drawn.

    ``dtype`` is the type of `to`'s result; `values` has the same numbers (for bfloat16 in float32).
    """

    shape: tuple[int, ...]
    kind: str = "gauss"
    scale: str = "unit"
    layout: str = "C"
    dtype: str = "float64"
    seed: int = 0

    @property
    def values(self) -> np.ndarray:
        """The numbers, in C order."""
        rng = np.random.default_rng(self.seed)
        x = _KINDS[self.kind](rng, self.shape, self.dtype)
        if self.layout == "expanded":
            x = np.broadcast_to(x[self._repeated], self.shape)
        if self.dtype in INTEGRAL:
            return (np.abs(x) > 0.5) if self.dtype == "bool" else np.round(np.abs(x) * 4).astype(self.dtype)
        x = x * _MAGNITUDES[self.dtype].get(self.scale, 1.0)
        if self.dtype == "bfloat16":
            return x.astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float32)
        return np.ascontiguousarray(x.astype(self.dtype)).reshape(self.shape)

    @property
    def norm(self) -> float:
        """The Frobenius norm."""
        return frobenius(self.values)

    @property
    def bound(self) -> float:
        """The norm, but at least what as many of the smallest normal numbers have: subnormal entries round coarsely."""
        if self.dtype in INTEGRAL:
            return self.norm
        real = {"complex64": "float32", "complex128": "float64"}.get(self.dtype, self.dtype)
        return max(self.norm, math.sqrt(math.prod(self.shape)) * float(ml_dtypes.finfo(real).smallest_normal))

    @property
    def _repeated(self) -> tuple[slice, ...]:
        """The part that an expanded layout stores: one entry of the first mode."""
        return (slice(0, 1), *(slice(None) for _ in self.shape[1:]))

    def to(self, xp: Any) -> Any:
        """Return the tensor as an array of ``xp``; the example is passed over where the library lacks the data type."""
        xp = namespace("numpy") if xp is np else xp  # NumPy itself follows the standard since 2.0
        if not supports(xp, self.dtype):
            reject()
        make = functools.partial(as_array, xp, dtype=self.dtype)
        values, ndim = self.values, len(self.shape)
        if self.layout in {"F", "permuted"}:
            axes = tuple(range(ndim))[::-1]
            if self.layout == "permuted":
                axes = tuple(int(k) for k in np.random.default_rng(self.seed).permutation(ndim))
            x = xp.permute_dims(make(np.ascontiguousarray(values.transpose(axes))), tuple(np.argsort(axes).tolist()))
        elif self.layout == "expanded":
            x = xp.broadcast_to(make(values[self._repeated]), self.shape)
        elif self.layout == "strided":
            x = make(np.repeat(values, 2, axis=-1))[..., ::2]
        elif self.layout == "negative":
            x = xp.flip(make(np.flip(values)))
        else:
            x = make(values)
        if self.layout == "read-only" and library(xp) == "numpy":
            x.flags.writeable = False
        return x


def _core_of_diagonal(shape: Sequence[int], diagonal: Callable[[int], float]) -> np.ndarray:
    x = np.zeros(tuple(shape))
    for i in range(min(shape)):
        x[(i,) * len(shape)] = diagonal(i)
    return x


def _rotate(rng: np.random.Generator, x: np.ndarray, dtype: str) -> np.ndarray:
    return dense(x, [orthonormal(rng, n, n, dtype) for n in x.shape])


def _low_rank(rng: np.random.Generator, shape: Sequence[int], dtype: str) -> np.ndarray:
    ranks = [min(n, 2) for n in shape]
    x = dense(normal(rng, ranks, dtype), [normal(rng, (n, r), dtype) for n, r in zip(shape, ranks)])
    # Products of many normal numbers have heavy tails, which "huge" would carry beyond float16's range.
    return x / np.max(np.abs(x), initial=1.0)


def _graded(rng: np.random.Generator, shape: Sequence[int], dtype: str) -> np.ndarray:
    """Rotate a tensor whose slices fall by a factor of 1e-6 from the first to the last, over all modes together."""
    x = normal(rng, shape, dtype)
    for mode, n in enumerate(shape):
        slope = np.logspace(0, -6 / len(shape), n)
        x = x * slope.reshape([-1 if k == mode else 1 for k in range(len(shape))])
    return _rotate(rng, x, dtype)


_KINDS: dict[str, Callable[[np.random.Generator, Sequence[int], str], np.ndarray]] = {
    "gauss": normal,
    "zero": lambda rng, shape, dtype: np.zeros(tuple(shape)),
    "ones": lambda rng, shape, dtype: np.ones(tuple(shape)),
    "low-rank": _low_rank,
    "graded": _graded,
    "superdiagonal": lambda rng, shape, dtype: _core_of_diagonal(shape, lambda i: 1.0),
    "near-tie": lambda rng, shape, dtype: _rotate(rng, _core_of_diagonal(shape, lambda i: 1.0 + 1e-7 * i), dtype),
}

seeds = st.integers(0, 2**20)


@st.composite
def shapes(
    draw: st.DrawFn,
    *,
    min_ndim: int = 1,
    max_ndim: int = 8,
    min_dim: int = 0,
    max_dim: int = 7,
    max_size: int = 4096,
) -> tuple[int, ...]:
    """Draw shapes: orders 1 to 5 with modes up to ``max_dim``, now and then 6 to 8 with modes up to 3.

    Empty modes are rare, as an empty tensor says little. Above ``max_size`` elements the largest modes are lowered.
    """
    if few := [s for s in _few_shapes.get() if min_ndim <= len(s) <= max_ndim and min(s) >= min_dim]:
        return draw(st.sampled_from(few))
    usual = st.integers(min_ndim, min(5, max_ndim))
    ndim = draw(st.one_of(*[usual] * 7, st.integers(max(6, min_ndim), max_ndim)) if max_ndim >= 6 else usual)
    top = max_dim if ndim <= 5 else min(3, max_dim)
    dims = st.one_of(*[st.integers(max(1, min_dim), top)] * 15, st.integers(min_dim, top))
    shape = [draw(dims) for _ in range(ndim)]
    while math.prod(shape) > max_size:
        shape[shape.index(max(shape))] -= 1
    return tuple(shape)


@st.composite
def samples(
    draw: st.DrawFn,
    *,
    dtypes: Sequence[str] = FLOATING,
    kinds: Sequence[str] = KINDS,
    scales: Sequence[str] = SCALES,
    layouts: Sequence[str] = LAYOUTS,
    **shape_options: int,
) -> Sample:
    """Draw tensors of every shape, kind, scale, layout and data type that is asked for."""
    if few_shapes():
        dtypes = [d for d in dtypes if d in ("float32", "complex128")] or dtypes[:1]
    return Sample(
        shape=draw(shapes(**shape_options)),
        kind=draw(st.sampled_from(kinds)),
        scale=draw(st.sampled_from(scales)),
        layout=draw(st.sampled_from(layouts)),
        dtype=draw(st.sampled_from(dtypes)),
        seed=draw(seeds),
    )


@st.composite
def ranked_samples(draw: st.DrawFn, **options: Any) -> tuple[Sample, tuple[int, ...]]:
    """Draw a tensor and ranks that a Tucker decomposition of it can have; full ones now and then."""
    sample = draw(samples(**options))
    if few_shapes():
        return sample, feasible_ranks([2] * len(sample.shape), sample.shape)
    ranks = [n if draw(st.integers(0, 3)) == 0 else draw(st.integers(min(n, 1), n)) for n in sample.shape]
    return sample, feasible_ranks(ranks, sample.shape)


@dataclass(frozen=True, eq=False)
class Truth:
    """A tensor in double precision and in units of a power of two near its magnitude, so that squares are safe."""

    x: np.ndarray
    exponent: int

    @classmethod
    def of(cls, values: Any) -> "Truth":
        """Take an array of any library."""
        values = to_numpy(values)
        wide = values.astype(np.complex128 if np.iscomplexobj(values) else np.float64)
        largest = float(np.max(np.abs(wide), initial=0.0))
        exponent = math.frexp(largest)[1] if largest > 0 else 0
        return cls(times_power_of_two(wide, -exponent), exponent)

    @property
    def norm(self) -> float:
        """‖X‖ in these units."""
        return float(np.linalg.norm(self.x.ravel()))

    @functools.cached_property
    def values(self) -> list[np.ndarray]:
        """The singular values of every unfolding, min(I_k, ∏ of the others) of them, in these units."""
        return [
            np.linalg.svd(matrix, compute_uv=False) if matrix.size else np.zeros(0)
            for matrix in (unfolded(self.x, mode) for mode in range(self.x.ndim))
        ]

    def tails(self, ranks: Sequence[int]) -> list[float]:
        """Σ_{i≥r_k} σ_i² / ‖X‖² for every mode k."""
        total = max(self.norm, math.ulp(0.0)) ** 2 if self.norm else 1.0
        return [float(np.sum(v[r:][::-1] ** 2)) / total for v, r in zip(self.values, ranks)]

    def core(self, t: TuckerTensor) -> np.ndarray:
        """Return a decomposition's core in these units, in double precision."""
        core = to_numpy(t.core)
        wide = core.astype(np.complex128 if np.iscomplexobj(core) else np.float64)
        return times_power_of_two(wide, -self.exponent)

    def error(self, t: TuckerTensor) -> float:
        """Return ‖X − X̂‖ / ‖X‖, formed densely in double precision; absolute for a zero tensor."""
        factors = [None if u is None else to_numpy(u).astype(self.core(t).dtype) for u in t.factors]
        residual = float(np.linalg.norm((self.x - dense(self.core(t), factors)).ravel()))
        return residual / self.norm if self.norm else residual


def times_power_of_two(x: np.ndarray, k: int) -> np.ndarray:
    """Return x · 2**k, complex x too, without an overflow on the way."""
    if np.iscomplexobj(x):
        return np.ldexp(x.real, k) + 1j * np.ldexp(x.imag, k)
    return np.ldexp(x, k)


def unfolded(x: np.ndarray, mode: int) -> np.ndarray:
    """Return the unfolding of a NumPy array along a mode, written out anew: the tests' own."""
    others = [k for k in range(x.ndim) if k != mode]
    return x.transpose([mode, *others]).reshape(x.shape[mode], math.prod(x.shape[k] for k in others))


@dataclass(frozen=True)
class TuckerSample:
    """A Tucker tensor, described: `core` and `factors` in NumPy, `to` as a `TuckerTensor` of a library."""

    shape: tuple[int, ...]
    ranks: tuple[int, ...]
    whole: tuple[bool, ...]
    dtype: str = "float64"
    seed: int = 0

    @property
    def core(self) -> np.ndarray:
        """The core, in the sample's data type (bfloat16 as float32)."""
        return self._rounded(normal(np.random.default_rng(self.seed), self.ranks, self.dtype))

    @property
    def factors(self) -> list[np.ndarray | None]:
        """The factors, ``None`` for a whole mode; scaled so that the dense tensor's entries are of order one."""
        rng = np.random.default_rng((self.seed, 1))
        drawn = [normal(rng, (n, r), self.dtype) / math.sqrt(max(r, 1)) for n, r in zip(self.shape, self.ranks)]
        return [None if whole else self._rounded(u) for u, whole in zip(drawn, self.whole)]

    @property
    def dense(self) -> np.ndarray:
        """The dense tensor, computed in double precision from the rounded core and factors."""
        wide = "complex128" if self.dtype in COMPLEX else "float64"
        return dense(self.core.astype(wide), [None if u is None else u.astype(wide) for u in self.factors])

    @property
    def bound(self) -> float:
        """The product of the norms of core and factors: what rounding errors are measured against."""
        return frobenius(self.core) * math.prod(frobenius(u) for u in self.factors if u is not None)

    def to(self, xp: Any) -> TuckerTensor:
        """Return the Tucker tensor in arrays of ``xp``; the example is passed over where the data type is lacking."""
        if not supports(xp, self.dtype):
            reject()
        make = functools.partial(as_array, xp, dtype=self.dtype)
        return TuckerTensor(make(self.core), [None if u is None else make(u) for u in self.factors])

    def _rounded(self, x: np.ndarray) -> np.ndarray:
        if self.dtype == "bfloat16":
            return x.astype(ml_dtypes.bfloat16).astype(np.float32)
        return np.asarray(x).astype(self.dtype)


@st.composite
def tucker_samples(
    draw: st.DrawFn,
    *,
    dtypes: Sequence[str] = FLOATING,
    shape: tuple[int, ...] | None = None,
    excess: int = 2,
    min_dim: int = 1,
    max_dim: int = 5,
    max_ndim: int = 5,
) -> TuckerSample:
    """Draw Tucker tensors with ranks up to ``excess`` above the modes' sizes and some modes left whole."""
    if shape is None:
        shape = draw(shapes(min_dim=min_dim, max_dim=max_dim, max_ndim=max_ndim, max_size=1024))
    whole = tuple(draw(st.booleans()) and draw(st.booleans()) for _ in shape)
    # High orders get small ranks: the core would outgrow the tensor.
    ranks = [draw(st.integers(1, min(n + excess, 4 if len(shape) <= 5 else 2))) for n in shape]
    return TuckerSample(
        shape=shape,
        ranks=tuple(n if w else r for n, r, w in zip(shape, ranks, whole)),
        whole=whole,
        dtype=draw(st.sampled_from(dtypes)),
        seed=draw(seeds),
    )


@st.composite
def tucker_pairs(draw: st.DrawFn, **options: Any) -> tuple[TuckerSample, TuckerSample]:
    """Draw two Tucker tensors of one shape and data type, of different ranks."""
    first = draw(tucker_samples(**options))
    second = draw(tucker_samples(shape=first.shape, dtypes=(first.dtype,)))
    return first, second
