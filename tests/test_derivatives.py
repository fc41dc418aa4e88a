"""Decompositions differentiated and traced, by PyTorch and JAX."""

import numpy as np
import pytest

import flora_tensor as ft
from decomposition_cases import METHODS, loss
from support import (
    REAL,
    Sample,
    dense,
    distance,
    frobenius,
    normal,
    orthonormal,
    to_numpy,
    tolerance,
)

DIFFERENTIABLE = ("hosvd", "st_hosvd")


def torch_tensor(values, **options):
    torch = pytest.importorskip("torch")
    return torch.tensor(values, **options)


@pytest.mark.parametrize("method", DIFFERENTIABLE)
@pytest.mark.parametrize("dtype", ["float64", "complex128"])
@pytest.mark.parametrize(
    ("shape", "ranks"), [((4, 3, 5), (2, 2, 3)), ((4, 3, 2), (4, 3, 2)), ((5, 3), (2, 2)), ((2, 9), (2, 2))]
)
def test_torch_gradients_of_the_dense_result(method, dtype, shape, ranks):
    x = torch_tensor(normal(np.random.default_rng(1), shape, dtype), requires_grad=True)
    torch = pytest.importorskip("torch")
    assert torch.autograd.gradcheck(lambda x: METHODS[method](x, ranks).to_tensor(), x)


@pytest.mark.parametrize("method", DIFFERENTIABLE)
@pytest.mark.parametrize(("shape", "ranks"), [((4, 3, 5), (2, 2, 3)), ((5, 3), (2, 2)), ((6,), (1,))])
def test_torch_gradients_of_core_and_factors(method, shape, ranks):
    torch = pytest.importorskip("torch")
    x = torch_tensor(normal(np.random.default_rng(2), shape), requires_grad=True)

    def parts(x):
        t = METHODS[method](x, ranks)
        return (t.core, *t.factors)

    assert torch.autograd.gradcheck(parts, x)


def test_torch_gradients_of_singular_values():
    torch = pytest.importorskip("torch")
    for dtype in ("float64", "complex128"):
        x = torch_tensor(normal(np.random.default_rng(3), (4, 3, 2), dtype), requires_grad=True)
        assert torch.autograd.gradcheck(lambda x: ft.mode_spectra(x).values, x)


def test_torch_gradients_of_hooi():
    """HOOI differentiates its iterations; at convergence that is the derivative of what they converge to."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(4)
    planted = dense(5 * rng.standard_normal((2, 2, 2)), [orthonormal(rng, n, 2) for n in (4, 3, 5)])
    x = torch_tensor(planted + 0.1 * rng.standard_normal((4, 3, 5)), requires_grad=True)

    def compressed(x):
        return ft.hooi(x, 2, max_sweeps=30, tolerance=0.0).to_tensor()

    assert torch.autograd.gradcheck(compressed, x, eps=1e-4, atol=1e-2)


@pytest.mark.parametrize("method", DIFFERENTIABLE)
def test_jax_gradients_equal_those_of_torch(method):
    jax = pytest.importorskip("jax")
    rng = np.random.default_rng(5)
    values, weights, ranks = rng.standard_normal((4, 3, 5)), rng.standard_normal((4, 3, 5)), (2, 2, 3)
    x = torch_tensor(values, requires_grad=True)
    loss(torch_tensor(weights), METHODS[method](x, ranks)).backward()
    theirs = jax.grad(lambda x: loss(jax.numpy.asarray(weights), METHODS[method](x, ranks)))(jax.numpy.asarray(values))
    assert distance(theirs, x.grad) <= 1e-9 * frobenius(x.grad)


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("kind", ["eye", "zero", "ones", "superdiagonal"])
@pytest.mark.parametrize("dtype", REAL)
def test_gradients_at_repeated_singular_values_and_zeros_are_finite(method, kind, dtype):
    values = np.eye(4) if kind == "eye" else Sample((3, 3, 3), kind=kind).values
    x = torch_tensor(values.astype(dtype), requires_grad=True)
    weights = torch_tensor(np.random.default_rng(0).standard_normal(values.shape).astype(dtype))
    for ranks in (2, 3):
        (gradient,) = pytest.importorskip("torch").autograd.grad(loss(weights, METHODS[method](x, ranks)), x)
        assert np.isfinite(to_numpy(gradient)).all()


def test_the_gradient_of_an_exact_decomposition_is_that_of_the_identity():
    """Also where singular values coincide: the result does not depend on the choice of basis."""
    for values in (np.eye(4), Sample((3, 4, 2)).values, Sample((3, 3, 3), kind="superdiagonal").values):
        x = torch_tensor(values, requires_grad=True)
        weights = torch_tensor(np.random.default_rng(0).standard_normal(values.shape))
        loss(weights, ft.hosvd(x)).backward()
        assert distance(x.grad, weights) <= 1e-10 * frobenius(weights)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_nothing_hangs_on_the_graph_unless_the_input_does(method):
    torch = pytest.importorskip("torch")
    x = torch_tensor(Sample((4, 3, 5)).values)
    t = METHODS[method](x, 2)
    assert not any(part.requires_grad for part in (t.core, *t.factors))
    x.requires_grad_()
    with torch.no_grad():
        t = METHODS[method](x, 2)
    assert not any(part.requires_grad for part in (t.core, *t.factors))
    fit = ft.tucker(x, 2)
    assert isinstance(fit.relative_error, float)
    assert fit.tucker.core.requires_grad


@pytest.mark.parametrize("method", ["hosvd", "st_hosvd", "hooi"])
def test_decompositions_with_given_ranks_can_be_jitted(method):
    jax = pytest.importorskip("jax")
    x = jax.numpy.asarray(Sample((4, 3, 5), seed=6).values)
    # A traced HOOI cannot see its error fall and takes all its sweeps: let the other one do the same.
    options = {"max_sweeps": 3, "tolerance": 0.0} if method == "hooi" else {}

    def compressed(x):
        return getattr(ft, method)(x, (2, 2, 3), **options).to_tensor()

    assert distance(jax.jit(compressed)(x), compressed(x)) <= tolerance("float64", 12, norm=frobenius(x))


def test_the_driver_refuses_traced_input():
    jax = pytest.importorskip("jax")
    with pytest.raises(ValueError, match=r"tucker: x is traced by jit or vmap, .*; call hosvd, st_hosvd or hooi"):
        jax.jit(lambda x: ft.tucker(x, 2).tucker.core)(jax.numpy.ones((3, 3)))


def test_rounding_to_given_ranks_can_be_jitted():
    jax = pytest.importorskip("jax")
    core, *factors = (jax.numpy.asarray(normal(np.random.default_rng(7), s)) for s in ((4, 3, 2), (9, 4), (8, 3)))
    t, whole = ft.TuckerTensor(core, (*factors, None)), dense(to_numpy(core), [*map(to_numpy, factors), None])
    for ranks in ((4, 3, 2), (2, 2, None)):
        eager = ft.round_tucker(t, ranks=ranks)
        jitted = jax.jit(lambda t, ranks=ranks: ft.round_tucker(t, ranks=ranks))(t)
        assert jitted.ranks == eager.ranks
        # Sweeps under a trace are five, and not as many as they gain something.
        lost, least = (distance(r.to_tensor(), whole) for r in (jitted, eager))
        assert lost <= 1.01 * least + tolerance(core.dtype, 4, 3, 2, norm=frobenius(whole))


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (ft.error_table, "error_table"),
        (ft.mode_spectra, "mode_spectra"),
        (ft.effective_ranks, "mode_spectra"),
        (lambda x: ft.select_ranks(x, rtol=0.1), "hosvd_spectrum"),
        (lambda x: ft.round_tucker(ft.TuckerTensor(x, (None, None)), rtol=0.1), "round_tucker"),
    ],
)
def test_what_looks_at_numbers_refuses_symbols_by_its_name(call, name):
    jax = pytest.importorskip("jax")
    torch = pytest.importorskip("torch")
    for traced in (lambda: jax.jit(call)(jax.numpy.ones((3, 2))), lambda: torch.func.vmap(call)(torch.ones(4, 3, 2))):
        with pytest.raises(ValueError, match=f"^{name}: x is traced by jit or vmap, .*; call it outside of them, or"):
            traced()


def test_tables_and_effective_ranks_are_constants_where_somebody_differentiates():
    jax = pytest.importorskip("jax")
    x = jax.numpy.asarray(Sample((4, 3, 5)).values)
    seen = []

    def through(x):
        seen.append((ft.error_table(x), ft.effective_ranks(x)))
        return x.sum()

    jax.grad(through)(x)
    ((table, ranks),) = seen
    assert np.array_equal(table, ft.error_table(np.asarray(x)))
    assert ranks == ft.effective_ranks(x)
