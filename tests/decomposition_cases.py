"""The decompositions under test by name, and what their tests measure and hold in common."""

import functools

import numpy as np
from hypothesis import strategies as st

import flora_tensor as ft
import support
from flora_tensor import TuckerTensor
from support import Sample, Truth, distance, to_numpy, tolerance, unfolded

# Each takes (x, ranks) and returns a TuckerTensor.
METHODS = {
    "hosvd": ft.hosvd,
    "st_hosvd": ft.st_hosvd,
    "hooi": ft.hooi,
    "tucker": lambda x, ranks: ft.tucker(x, ranks).tucker,
    "tucker-hosvd": lambda x, ranks: ft.tucker(x, ranks, method="hosvd").tucker,
    "tucker-st_hosvd": lambda x, ranks: ft.tucker(x, ranks, method="st_hosvd").tucker,
    "tucker-hooi": lambda x, ranks: ft.tucker(x, ranks, method="hooi").tucker,
    "tucker-randomized": lambda x, ranks: ft.tucker(x, ranks, method="randomized", rng=0).tucker,
}
FORCED = ("auto", "hosvd", "st_hosvd", "hooi")
methods = st.sampled_from(sorted(METHODS))
# A randomized start may, with small probability, end above what the spectra promise.
certain = st.sampled_from(sorted(set(METHODS) - {"tucker-randomized"}))
small = {"max_size": 256}
for_all = functools.partial(support.for_all, jax_shapes=((4, 3, 5), (5, 3)), jax_examples=3)


def slack(t: TuckerTensor, sample: Sample, xp=None) -> float:
    """Return how far rounding may carry the relative error of a decomposition."""
    norm = sample.norm
    limit = tolerance(t.dtype, sum(sample.shape), norm=norm, xp=xp)
    return limit / norm if norm else limit


def gap(truth: Truth, ranks) -> float:
    """Return the least (σ_r − σ_{r+1}) / σ_1 over the modes: how well the leading subspaces are determined."""
    if not truth.norm:
        return 0.0
    padded = [np.append(v, 0.0) for v in truth.values]
    return min((float(v[r - 1] - v[r]) / float(v[0]) for v, r in zip(padded, ranks) if r < len(v) - 1), default=1.0)


def assert_orthonormal(t: TuckerTensor) -> None:
    """Hold every factor to LAPACK's ratio ‖I − UᴴU‖ / (n · eps) < 30."""
    for u in (u for u in t.factors if u is not None):
        wide = to_numpy(u).astype(np.complex128)
        n, r = wide.shape
        assert distance(wide.conj().T @ wide, np.eye(r)) <= tolerance(t.dtype, max(n, 1) ** 2)


def assert_all_orthogonal(core: np.ndarray, limit: float) -> None:
    """Hold the slices of a core along every mode to be orthogonal and of decreasing norm; ``limit`` in the core's
    squared units.
    """
    for mode in range(core.ndim):
        matrix = unfolded(core, mode)
        gram = matrix @ matrix.conj().T
        assert np.linalg.norm(gram - np.diag(np.diagonal(gram))) <= limit
        assert (np.diff(np.diagonal(gram).real) <= limit).all()


def loss(weights, t: TuckerTensor):
    """Return a real number that depends on all entries of the dense tensor."""
    product = weights * t.to_tensor()
    return product.real.sum() if hasattr(product, "real") else product.sum()
