"""What every method of `tucker` promises, at sizes where each of them really runs, for tensors of every kind.

The tests of `test_decomposition` draw tensors of a few hundred entries, in which no mode is large enough for the
randomized method. Here at least two are. The rows are those that LAPACK's own tests and the theory of the HOSVD give:
orthonormal factors, an all-orthogonal core, true errors within their bounds, the same bits for the same input.
"""

import functools
import math
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import flora_tensor as ft
from support import (
    EVERY_DTYPE,
    FLOATING,
    KINDS,
    LAYOUTS,
    SCALES,
    Sample,
    Truth,
    as_array,
    dense,
    distance,
    namespace,
    orthonormal,
    same_bits,
    seeds,
    supports,
    times_power_of_two,
    to_numpy,
    tolerance,
    unfolded,
)

METHODS = ("auto", "hosvd", "st_hosvd", "hooi", "randomized")
methods = st.sampled_from(METHODS)

# Two modes or more are over twice a rank of up to 3 and its 16 further directions.
SHAPES = ((44, 40), (80, 39), (40, 300), (40, 39, 3), (2, 41, 40), (39, 40, 41), (42, 40, 2, 2), (1, 40, 1, 45))


@st.composite
def wide_samples(draw: st.DrawFn, dtypes=EVERY_DTYPE, kinds=KINDS, scales=SCALES, layouts=LAYOUTS):
    """Draw a tensor with two large modes and small ranks."""
    dtype, scale = draw(st.sampled_from(dtypes)), draw(st.sampled_from(scales))
    sample = Sample(
        shape=draw(st.sampled_from(SHAPES)),
        kind=draw(st.sampled_from(kinds)),
        # The norm of so many entries would be beyond what a core in float16 can hold; that is refused.
        scale="unit" if (dtype, scale) == ("float16", "huge") else scale,
        layout=draw(st.sampled_from(layouts)),
        dtype=dtype,
        seed=draw(seeds),
    )
    return sample, ft.feasible_ranks([draw(st.integers(1, 3)) for _ in sample.shape], sample.shape)


def array(sample: Sample):
    """Return the sample in NumPy, and where NumPy lacks the type in PyTorch."""
    if supports(np, sample.dtype):
        return sample.to(np)
    return sample.to(namespace("torch"))


CRITERIA = ("ranks", "rtol", "max_parameters")


def criterion(name: str, ranks: tuple[int, ...], shape: tuple[int, ...]) -> dict:
    """Ask for ranks, or for a tolerance or a budget that leave the choice of the ranks to `tucker`."""
    budget = math.prod(ranks) + sum(n * r for n, r in zip(shape, ranks))
    return {name: {"ranks": ranks, "rtol": 0.1, "max_parameters": budget}[name]}


def rounding(sample: Sample, dtype) -> float:
    """Return how far rounding may carry a relative error."""
    norm = sample.norm
    limit = tolerance(dtype, sum(sample.shape), norm=norm)
    return limit / norm if norm else limit


@functools.lru_cache(maxsize=4)
def truth_of(sample: Sample) -> Truth:
    return Truth.of(sample.values)


@given(case=wide_samples(), method=methods)
def test_factors_are_orthonormal_to_lapacks_ratio(case, method):
    """‖I − UᴴU‖ < 30 · n · eps, whatever the rank of the tensor."""
    sample, ranks = case
    t = ft.tucker(array(sample), ranks, method=method).tucker
    assert (t.shape, t.ranks) == (sample.shape, ranks)
    for u in t.factors:
        wide = to_numpy(u).astype(np.complex128)
        assert distance(wide.conj().T @ wide, np.eye(u.shape[1])) <= tolerance(t.dtype, len(wide) ** 2)


@given(case=wide_samples(), method=methods)
def test_the_core_is_the_projection_and_all_orthogonal(case, method):
    sample, ranks = case
    truth = truth_of(sample)
    t = ft.tucker(array(sample), ranks, method=method).tucker
    core, slack = truth.core(t), rounding(sample, t.dtype) * (truth.norm or 1.0)
    projection = dense(truth.x, [to_numpy(u).astype(np.complex128).conj().T for u in t.factors])
    assert distance(core, projection) <= slack
    for mode in range(core.ndim):
        matrix = unfolded(core, mode)
        gram = matrix @ matrix.conj().T
        limit = 2 * slack * (truth.norm or 1.0)
        assert np.linalg.norm(gram - np.diag(np.diagonal(gram))) <= limit
        assert (np.diff(np.diagonal(gram).real) <= limit).all()


@given(case=wide_samples(), method=methods)
def test_the_error_is_the_one_reported_and_within_its_bounds(case, method):
    sample, ranks = case
    truth = truth_of(sample)
    fit = ft.tucker(array(sample), ranks, method=method)
    true, slack = truth.error(fit.tucker), rounding(sample, fit.tucker.dtype)
    assert fit.relative_error == pytest.approx(true, rel=1e-3, abs=slack)
    assert fit.lower_bound - slack <= fit.relative_error <= fit.error_bound + slack
    tails = truth.tails(ranks)
    assert math.sqrt(max(tails)) - slack <= true <= math.sqrt(sum(tails)) + slack
    assert fit.lower_bound <= math.sqrt(max(tails)) + slack
    assert fit.certificate >= 1 - 1e-6
    if fit.lower_bound > 1e-3 and method == "hosvd":
        assert fit.certificate <= math.sqrt(len(ranks)) * (1 + 1e-3)
    assert fit.certificate < math.inf or fit.lower_bound == 0 < fit.relative_error


@given(case=wide_samples(), method=methods)
def test_no_method_loses_more_than_st_hosvd(case, method):
    """HOOI starts there and only improves; the randomized method ends 0.1 % above it at most, except on white noise.

    There every subspace is nearly as good as any other, and iterations end in whichever they began near.
    """
    sample, ranks = case
    if method == "hosvd":
        return
    x, truth = array(sample), truth_of(sample)
    t = ft.tucker(x, ranks, method=method).tucker
    share = 1.0 if method != "randomized" else 1.01 if sample.kind == "gauss" else 1.001
    assert truth.error(t) <= share * truth.error(ft.st_hosvd(x, ranks)) + rounding(sample, t.dtype)


@given(
    case=wide_samples(FLOATING, scales=("unit",), layouts=("C", "F", "permuted")),
    method=methods,
    by=st.sampled_from(CRITERIA),
    power=st.sampled_from((-90, -17, 3, 16, 90)),
)
def test_a_power_of_two_leaves_the_factors_bit_for_bit(case, method, by, power):
    sample, ranks = case
    x, asked = sample.to(np), criterion(by, ranks, sample.shape)
    t, scaled = (ft.tucker(a, **asked, method=method).tucker for a in (x, x * x.dtype.type(2.0) ** power))
    assert all(same_bits(u, v) for u, v in zip(t.factors, scaled.factors))
    tiny = np.finfo(t.core.dtype).smallest_normal
    assert distance(scaled.core, times_power_of_two(t.core, power)) <= math.sqrt(t.core.size) * tiny * max(
        1.0, 2.0**power
    )


@given(case=wide_samples(layouts=LAYOUTS[1:]), method=methods)
def test_the_input_is_not_changed_and_its_layout_only_rounds(case, method):
    sample, ranks = case
    x, truth = array(sample), truth_of(sample)
    t = ft.tucker(x, ranks, method=method).tucker
    assert same_bits(x, sample.values)
    plain = ft.tucker(as_array(np, sample.values), ranks, method=method).tucker
    assert truth.error(t) == pytest.approx(truth.error(plain), abs=1e-3 + 4 * tolerance(t.dtype))


@given(case=wide_samples(), method=methods, by=st.sampled_from(CRITERIA), seed=st.integers(0, 3))
def test_the_same_seed_gives_the_same_bits(case, method, by, seed):
    sample, ranks = case
    x, asked = array(sample), criterion(by, ranks, sample.shape)
    first, second = (ft.tucker(x, **asked, method=method, rng=seed).tucker for _ in range(2))
    assert all(same_bits(a, b) for a, b in zip((first.core, *first.factors), (second.core, *second.factors)))


# --- derivatives -------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["gauss", "zero", "ones", "superdiagonal"])
@pytest.mark.parametrize("shape", [(44, 40), (40, 39, 3)])
def test_gradients_are_finite_where_singular_values_coincide(method, kind, shape):
    torch = pytest.importorskip("torch")
    values = Sample(shape, kind=kind).values
    x = torch.tensor(values, requires_grad=True)
    weights = torch.tensor(np.random.default_rng(0).standard_normal(shape))
    criteria = {"ranks": ft.feasible_ranks((2,) * len(shape), shape)}, {"rtol": 0.3}, {"max_parameters": 400}
    for criterion in criteria:
        t = ft.tucker(x, **criterion, method=method).tucker
        (gradient,) = torch.autograd.grad((weights * t.to_tensor()).sum(), x)
        assert bool(torch.isfinite(gradient).all())


# --- threads -----------------------------------------------------------------------------------------

_DECOMPOSE = """
import sys
import numpy as np
import flora_tensor as ft
x, wide = np.load(sys.argv[1]).values()
fits = {method: ft.tucker(x, (6, 6, 2, 2), method=method, rng=0) for method in sys.argv[3:]}
fits["hosvd and hooi by a tolerance"] = ft.tucker(x, rtol=0.1)
fits["range finder"] = ft.tucker(wide, rtol=0.1)
fits["budget"] = ft.tucker(wide, max_parameters=6 * sum(wide.shape) + 216)
fits["matrix"] = ft.tucker(wide.reshape(160, -1), 6, method="randomized")
np.savez(sys.argv[2], **{name: fit.tucker.to_tensor() for name, fit in fits.items()})
"""


def test_the_number_of_threads_only_rounds(tmp_path):
    """The subspaces are well determined here: whatever the order of sums, all methods end in the same ones."""
    rng = np.random.default_rng(0)

    def noisy(shape, ranks):
        signal = dense(rng.standard_normal(ranks), [orthonormal(rng, n, r) for n, r in zip(shape, ranks)])
        noise = rng.standard_normal(shape)
        return (signal + noise * (0.05 * np.linalg.norm(signal) / np.linalg.norm(noise))).astype(np.float32)

    x, wide = noisy((72, 64, 3, 3), (6, 6, 2, 2)), noisy((160, 144, 6), (6, 6, 6))
    np.savez(tmp_path / "x.npz", x, wide)
    found = []
    for threads in ("1", "2"):
        variables = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
        arguments = [str(tmp_path / "x.npz"), str(tmp_path / f"{threads}.npz"), *METHODS]
        environment = {**os.environ, **dict.fromkeys(variables, threads)}
        subprocess.run([sys.executable, "-c", _DECOMPOSE, *arguments], env=environment, check=True)
        found.append(dict(np.load(tmp_path / f"{threads}.npz")))
    for name, one in found[0].items():
        # Iterations stop on the way to where they converge: there, not in the rounding, lies what may differ.
        limit = tolerance("float32", sum(x.shape)) if name in {"hosvd", "st_hosvd"} else 1e-4
        assert distance(one, found[1][name]) <= limit * np.linalg.norm(one), name
