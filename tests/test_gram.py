"""Gram matrices of large modes, which go through SciPy, and their leading eigenvectors, against dense computations."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st

import flora_tensor as ft
from flora_tensor import _algorithms
from flora_tensor._arrays import array_namespace
from flora_tensor._bases import gaussian, orthonormal_columns
from flora_tensor._gram import Grams, eigenvalues, leading_eigenvectors
from flora_tensor._krylov import KrylovSpace
from support import (
    as_array,
    distance,
    for_all,
    frobenius,
    normal,
    orthonormal,
    same_bits,
    times_power_of_two,
    to_numpy,
    tolerance,
    unfolded,
)

EPS = float(np.finfo(np.float64).eps)
N = 160


def rotated(values: np.ndarray, rng: np.random.Generator, dtype: str) -> np.ndarray:
    q = orthonormal(rng, len(values), len(values), dtype)
    return (q * values) @ q.conj().T


def glued_wilkinson() -> np.ndarray:
    """Tridiagonal, with pairs of eigenvalues that agree to all digits in every block, and blocks that nearly part."""
    diagonal = np.tile(np.abs(np.arange(20) - 9.5), N // 20)
    beside = np.where(np.arange(1, N) % 20 == 0, 1e-9, 1.0)
    return np.diag(diagonal) + np.diag(beside, 1) + np.diag(beside, -1)


SPECTRA: dict[str, Callable[[np.random.Generator, str], np.ndarray]] = {
    "flat": lambda rng, dtype: (a := normal(rng, (N, 3 * N), dtype)) @ a.conj().T,
    "decaying": lambda rng, dtype: rotated(np.arange(1.0, N + 1) ** -1.4, rng, dtype),
    "graded": lambda rng, dtype: rotated(np.geomspace(1, 1e-20, N), rng, dtype),
    "low rank": lambda rng, dtype: (a := normal(rng, (N, 5), dtype)) @ a.conj().T,
    "low rank and noise": lambda rng, dtype: rotated(np.where(np.arange(N) < 5, 1.0, 1e-12), rng, dtype),
    "clusters": lambda rng, dtype: rotated(np.repeat([1.0, 0.5, 1e-3, 0.0], N // 4), rng, dtype),
    "orthogonal rows": lambda rng, dtype: (a := orthonormal(rng, 3 * N, N, dtype).T) @ a.conj().T,
    "identity": lambda rng, dtype: np.eye(N, dtype=dtype),
    "zero": lambda rng, dtype: np.zeros((N, N), dtype),
    "blocks": lambda rng, dtype: np.kron(np.eye(N // 10), np.outer(*[np.arange(1.0, 11)] * 2)).astype(dtype),
    "glued Wilkinson": lambda rng, dtype: glued_wilkinson().astype(dtype),
}


def lower(matrix: np.ndarray) -> np.ndarray:
    return np.array(np.tril(matrix), order="F")


@pytest.mark.parametrize("dtype", ["float64", "complex128"])
@pytest.mark.parametrize("kind", SPECTRA)
def test_leading_eigenvectors_are_orthonormal_and_span_what_they_should(kind: str, dtype: str):
    gram = SPECTRA[kind](np.random.default_rng(0), dtype)
    exact = np.linalg.eigvalsh(gram)[::-1]
    size = 30 * N * EPS
    np.testing.assert_allclose(eigenvalues(lower(gram)), exact, atol=size * max(exact[0], 1))
    for count in (1, 7, N // 3, N // 2, N):
        values, vectors = leading_eigenvectors(lower(gram), count)
        np.testing.assert_allclose(values, exact, atol=size * max(exact[0], 1))
        assert vectors.shape == (N, count)
        assert np.linalg.norm(vectors.conj().T @ vectors - np.eye(count)) <= size
        assert np.linalg.norm(gram @ vectors - vectors * values[:count]) <= size * exact[0]


def test_how_many_are_wanted_can_depend_on_the_eigenvalues():
    gram = SPECTRA["decaying"](np.random.default_rng(0), "float64")
    for limit in (0.5, 1e-2, 0.0):
        exact = np.linalg.eigvalsh(gram)[::-1]
        count = int(np.count_nonzero(exact > limit))
        values, vectors = leading_eigenvectors(
            lower(gram), lambda found, limit=limit: int(np.sum(found > limit)), np.float32
        )
        assert vectors.shape == (N, count)
        assert vectors.dtype == np.float32
        assert np.linalg.norm(gram @ vectors - vectors * values[:count]) <= tolerance("float32", N, norm=1.0)


@pytest.mark.parametrize("layout", ["C", "F"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "complex64"])
@pytest.mark.parametrize("shape", [(150, 140, 2, 3), (2, 3, 140, 150), (3, 180, 4, 5, 8), (260, 270)])
def test_gram_matrices_are_those_of_the_unfoldings(shape: tuple[int, ...], dtype: str, layout: Any):
    rng = np.random.default_rng(0)
    x = np.asarray(normal(rng, shape, dtype).astype(dtype), order=layout)
    before, product, grams = x.copy(), x, Grams(x)
    for mode in sorted(range(len(shape)), key=lambda k: shape[k]):  # as ST-HOSVD takes them
        matrix = unfolded(product.astype(np.result_type(x, np.float64)), mode)
        expected, found = matrix @ matrix.conj().T, grams.of(mode)
        rounding = tolerance(dtype if grams.factors else "float64", shape[mode], norm=frobenius(product) ** 2)
        assert np.linalg.norm(np.tril(found - expected)) <= rounding
        factor = orthonormal(rng, shape[mode], shape[mode] - 1, dtype).astype(dtype)
        product, grams = ft.multi_mode_dot(product, [factor], modes=[mode], transpose=True), grams.after(mode, factor)
    assert same_bits(x, before)


@pytest.mark.parametrize("dtype", ["float32", "float64", "complex64"])
@pytest.mark.parametrize("modes", [(1, 3), (0, 1, 2, 3), (2, 3), (0, 2, 3)])
def test_products_in_parts_are_the_products(modes: tuple[int, ...], dtype: str):
    rng, shape = np.random.default_rng(0), (210, 1500, 2, 2)
    x = normal(rng, shape, dtype).astype(dtype)
    factors = [normal(rng, (shape[k], 1 if shape[k] == 2 else 5), dtype).astype(dtype) for k in modes]
    expected = x.astype(np.result_type(x, np.float64))
    for mode, factor in zip(modes, factors):
        expected = np.moveaxis(np.tensordot(factor.conj(), expected, axes=(0, mode)), 0, mode)
    found = ft.multi_mode_dot(x, factors, modes=modes, transpose=True)
    assert found.dtype == x.dtype
    assert distance(found, expected) <= tolerance(dtype, norm=frobenius(expected)) * 10


@pytest.mark.parametrize("dtype", ["float32", "complex64"])
def test_large_modes_have_the_same_bits_at_every_scale(dtype: str):
    x = normal(np.random.default_rng(0), (200, 180, 3, 3), dtype).astype(dtype)
    ways: list[Callable[[np.ndarray], ft.TuckerTensor]] = [
        lambda x: ft.hosvd(x, (30, 20, 2, 3)),
        lambda x: ft.st_hosvd(x, (90, 60, 2, 2)),
        lambda x: ft.st_hosvd(x, rtol=0.8),
        lambda x: ft.hooi(x, (20, 30, 2, 2), max_sweeps=2),
    ]
    for way in ways:
        one, other = way(x), way(times_power_of_two(x, 90))
        assert all(same_bits(u, v) for u, v in zip(one.factors, other.factors))
        assert same_bits(times_power_of_two(one.core, 90), other.core)
        for factor in one.factors:
            size = factor.shape[0]
            identity = np.eye(factor.shape[1])
            assert np.linalg.norm(factor.conj().T @ factor - identity) < 30 * size * np.finfo(np.float32).eps


@pytest.mark.parametrize("shape", [(2000, 12, 3), (3, 1200, 5, 7), (1500, 40)])
@pytest.mark.parametrize("rank", [0, 4])
def test_a_mode_longer_than_the_others_together_has_an_orthonormal_factor(shape: tuple[int, ...], rank: int):
    """Of low rank too, where the short side's vectors have images of length zero."""
    rng = np.random.default_rng(0)
    mode = int(np.argmax(shape))
    x = normal(rng, shape).astype(np.float32)
    if rank:
        u = orthonormal(rng, shape[mode], rank, "float32")
        x = ft.mode_dot(x, (u @ u.T).astype(np.float32), mode)
    t = ft.hosvd(x)
    size = shape[mode]
    for factor in map(to_numpy, t.factors):
        assert np.linalg.norm(factor.T @ factor - np.eye(factor.shape[1])) < 30 * size * np.finfo(np.float32).eps
    assert distance(t.to_tensor(), x) <= 30 * size * np.finfo(np.float32).eps * frobenius(x)
    exact = np.linalg.svd(unfolded(x.astype(np.float64), mode), compute_uv=False)
    np.testing.assert_allclose(ft.mode_spectra(x).values[mode], exact, atol=tolerance("float32", norm=exact[0]))


@pytest.mark.parametrize("dtype", ["float32", "complex64"])
def test_products_that_are_copied_for_speed_are_the_products(dtype: str):
    rng = np.random.default_rng(0)
    x = normal(rng, (5, 260, 3, 3), dtype).astype(dtype)
    matrix = normal(rng, (520, 260), dtype).astype(dtype)
    expected = np.moveaxis(np.tensordot(matrix.astype(complex), x, axes=(1, 1)), 0, 1)
    assert distance(ft.mode_dot(x, matrix, 1), expected) <= tolerance(dtype, norm=frobenius(expected))


@pytest.mark.parametrize("dtype", ["float32", "complex64"])
@pytest.mark.parametrize("ranks", [(90, 80, 3, 3), (90, 80, 2, 3)])
def test_a_product_that_is_not_held_gives_what_a_formed_one_does(ranks, dtype, monkeypatch):
    """Gram matrices of the truncations of ST-HOSVD and HOOI, summed over slabs, against those of the whole product."""
    x = normal(np.random.default_rng(0), (150, 140, 3, 3), dtype).astype(dtype)
    runs = {"st_hosvd": lambda: ft.st_hosvd(x, ranks), "hooi": lambda: ft.hooi(x, ranks, max_sweeps=2)}
    formed = {name: run() for name, run in runs.items()}
    slabs: list[int] = []
    monkeypatch.setattr(_algorithms, "LARGE", 1)
    monkeypatch.setattr(_algorithms, "_MUCH", 0.0)
    parts = Grams._parts

    def counted(self: Grams, factors: Any, run: range) -> Any:
        slabs.append(0)
        for part in parts(self, factors, run):
            slabs[-1] += 1
            yield part

    monkeypatch.setattr(Grams, "_parts", counted)
    for name, run in runs.items():
        assert distance(run().to_tensor(), formed[name].to_tensor()) <= tolerance(dtype, 150, 140, norm=frobenius(x))
        assert max(slabs) > 1
        slabs.clear()


@pytest.mark.parametrize("dtype", ["float32", "float64", "complex64", "complex128"])
@pytest.mark.parametrize("shape", [(700, 100), (300, 300)])
def test_large_orthonormal_columns_span_what_they_should(shape, dtype):
    matrix = normal(np.random.default_rng(0), shape, dtype) * np.geomspace(1, 1e-3, shape[1])
    matrix = matrix.astype(dtype)
    q = orthonormal_columns(np, matrix)
    assert (q.shape, q.dtype) == (matrix.shape, matrix.dtype)
    assert distance(q.conj().T @ q, np.eye(shape[1])) <= tolerance(dtype, *shape)
    assert distance(q @ (q.conj().T @ matrix), matrix) <= tolerance(dtype, *shape, norm=frobenius(matrix))


@pytest.mark.parametrize("dtype", ["float32", "complex128"])
def test_random_numbers_drawn_in_parts_are_those_drawn_at_once(dtype):
    drawn = gaussian(np, np.zeros(1, dtype), (9000, 20), np.random.default_rng(3))
    rng = np.random.default_rng(3)
    whole = rng.standard_normal((9000, 20))
    whole = whole + 1j * rng.standard_normal((9000, 20)) if dtype == "complex128" else whole
    assert same_bits(drawn, whole.astype(dtype))


@for_all(mode=st.integers(0, 2))
def test_rows_of_a_krylov_space_that_were_dropped_come_again(xp, mode):
    x = as_array(xp, np.random.default_rng(0).standard_normal((20, 18, 16)))
    space = KrylovSpace(array_namespace("test", x), x, mode, 3, np.random.default_rng(0))
    for _ in range(2):
        for _ in range(2):
            space.grow()
        joined = to_numpy(space.joined())
        expected = ft.mode_dot(to_numpy(x), to_numpy(space.basis).T, mode)
        assert joined.shape[mode] == space.width
        assert distance(joined, expected) <= tolerance("float64", *x.shape, norm=frobenius(x))
