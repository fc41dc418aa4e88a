"""Unfolding, folding and mode products: the laws they obey, over every array library."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import flora_tensor as ft
from flora_tensor import algebra
from flora_tensor.algebra import _WRITE_COST, contraction_order
from support import (
    COMPLEX,
    EVERY_DTYPE,
    FLOATING,
    LOW_PRECISION,
    Sample,
    as_array,
    distance,
    dtype_name,
    for_all,
    frobenius,
    library,
    normal,
    same_bits,
    samples,
    seeds,
    shapes,
    supports,
    to_numpy,
    tolerance,
)

modes = st.integers(0, 1000)
signs = st.sampled_from((0, -1))


def mode_of(sample: Sample, number: int, sign: int = 0) -> int:
    """Return one of the sample's modes, counted from the end where ``sign`` is -1."""
    ndim = len(sample.shape)
    return number % ndim + sign * ndim


def matrix(sample: Sample, rows: int, columns: int, seed: int) -> np.ndarray:
    """Return a matrix of the sample's data type whose products with it stay in the type's range."""
    return normal(np.random.default_rng(seed), (rows, columns), sample.dtype).astype(sample.dtype)


# --- unfold and fold ------------------------------------------------------------------------------


@for_all(sample=samples(dtypes=EVERY_DTYPE), number=modes, sign=signs)
def test_fold_inverts_unfold_bitwise(xp, sample, number, sign):
    x, mode = sample.to(xp), mode_of(sample, number, sign)
    unfolded = ft.unfold(x, mode)
    others = math.prod(n for k, n in enumerate(sample.shape) if k != mode % len(sample.shape))
    assert tuple(unfolded.shape) == (sample.shape[mode], others)
    assert same_bits(ft.fold(unfolded, mode, sample.shape), sample.values)
    assert same_bits(x, sample.values), "the input was changed"


@for_all(sample=samples(dtypes=FLOATING), number=modes)
def test_unfolding_has_the_modes_fibers_as_columns(xp, sample, number):
    mode = mode_of(sample, number)
    expected = np.stack([f.ravel() for f in np.moveaxis(sample.values, mode, 0)]) if sample.values.size else None
    unfolded = ft.unfold(sample.to(xp), mode)
    if expected is not None:
        assert same_bits(unfolded, expected)


@given(sample=samples(dtypes=("float64",), min_dim=1), number=modes)
def test_tensorly_unfolds_and_folds_alike(sample, number):
    tensorly = pytest.importorskip("tensorly")
    x, mode = sample.values, mode_of(sample, number)
    assert same_bits(ft.unfold(x, mode), tensorly.unfold(x, mode))
    assert same_bits(ft.fold(ft.unfold(x, mode), mode, x.shape), tensorly.fold(tensorly.unfold(x, mode), mode, x.shape))


def test_unfold_of_a_first_mode_is_a_view():
    x = np.zeros((3, 4, 5))
    assert np.shares_memory(ft.unfold(x, 0), x)


@pytest.mark.parametrize(("mode", "ndim"), [(3, 3), (-4, 3), (1, 1), (10, 2)])
def test_unfold_refuses_a_mode_that_is_not_there(xp, mode, ndim):
    message = rf"unfold: mode {mode} of a tensor with {ndim} modes; its modes are {-ndim} to {ndim - 1}"
    with pytest.raises(ValueError, match=message):
        ft.unfold(xp.ones((2,) * ndim), mode)


def test_unfold_refuses_a_scalar(xp):
    with pytest.raises(ValueError, match="unfold: mode 0 of a tensor with 0 modes; its modes are none, as it has no"):
        ft.unfold(xp.asarray(1.0), 0)


@pytest.mark.parametrize("mode", [1.0, "1", None, True])
def test_unfold_refuses_a_mode_that_is_no_integer(mode):
    with pytest.raises(TypeError, match=r"unfold: mode is .*; pass an integer"):
        ft.unfold(np.ones((2, 2)), mode)


@pytest.mark.parametrize("x", [[[1.0, 2.0]], 3, "abc", None])
def test_what_is_no_array_is_refused(x):
    with pytest.raises(TypeError, match=r"unfold: got .*; pass arrays of one library \(NumPy, PyTorch, JAX, CuPy"):
        ft.unfold(x, 0)


def test_arrays_of_two_libraries_are_refused():
    torch = pytest.importorskip("torch")
    with pytest.raises(TypeError, match=r"mode_dot: got numpy.ndarray, torch.Tensor; pass arrays of one library"):
        ft.mode_dot(np.ones((2, 2)), torch.ones(2, 2), 0)


def test_fold_refuses_a_matrix_of_another_shape(xp):
    message = r"fold: a matrix of shape \(3, 8\) for mode 1 of shape \(2, 4, 3\); pass one of shape \(4, 6\)"
    with pytest.raises(ValueError, match=message):
        ft.fold(xp.ones((3, 8)), 1, (2, 4, 3))


def test_fold_refuses_a_tensor_and_a_transposed_unfolding(xp):
    with pytest.raises(ValueError, match=r"fold: a matrix of shape \(4, 2, 3\) for mode 1 .* pass one of shape \(4, 6"):
        ft.fold(xp.ones((4, 2, 3)), 1, (2, 4, 3))
    with pytest.raises(ValueError, match=r"pass one of shape \(4, 6\)"):
        ft.fold(xp.ones((6, 4)), 1, (2, 4, 3))


def test_fold_refuses_a_mode_and_sizes_that_make_no_sense(xp):
    with pytest.raises(ValueError, match="fold: mode 3 of a tensor with 3 modes; its modes are -3 to 2"):
        ft.fold(xp.ones((4, 6)), 3, (2, 4, 3))
    with pytest.raises(TypeError, match=r"fold: shape\[2\] is 3.0; pass an integer"):
        ft.fold(xp.ones((4, 6)), 1, (2, 4, 3.0))


# --- mode products --------------------------------------------------------------------------------


@for_all(sample=samples(), number=modes, sign=signs, rows=st.integers(0, 6), seed=seeds)
def test_mode_dot_multiplies_the_unfolding(xp, sample, number, sign, rows, seed):
    x, mode = sample.to(xp), mode_of(sample, number, sign)
    m = matrix(sample, rows, sample.shape[mode], seed)
    product = ft.mode_dot(x, as_array(xp, m), mode)
    wide = np.complex128 if sample.dtype in COMPLEX else np.float64
    expected = np.moveaxis(np.tensordot(m.astype(wide), sample.values.astype(wide), axes=(1, mode)), 0, mode)
    assert tuple(product.shape) == expected.shape
    assert product.dtype == x.dtype
    limit = tolerance(sample.dtype, sample.shape[mode], norm=sample.bound * frobenius(m), xp=xp)
    assert distance(product, expected) <= limit
    assert same_bits(x, sample.values), "the input was changed"


@for_all(sample=samples(min_ndim=2), number=modes, step=modes, rows=st.tuples(*[st.integers(1, 6)] * 2), seed=seeds)
def test_products_along_different_modes_commute(xp, sample, number, step, rows, seed):
    ndim = len(sample.shape)
    a, b = number % ndim, (number + 1 + step % (ndim - 1)) % ndim
    x = sample.to(xp)
    left, right = matrix(sample, rows[0], sample.shape[a], seed), matrix(sample, rows[1], sample.shape[b], seed + 1)
    p, q = as_array(xp, left), as_array(xp, right)
    one = ft.mode_dot(ft.mode_dot(x, p, a), q, b)
    other = ft.mode_dot(ft.mode_dot(x, q, b), p, a)
    both = ft.multi_mode_dot(x, [p, q], modes=[a, b])
    norm = sample.bound * frobenius(left) * frobenius(right)
    limit = tolerance(sample.dtype, sample.shape[a] + sample.shape[b], norm=norm, xp=xp)
    assert distance(one, other) <= limit
    assert distance(one, both) <= limit


@for_all(sample=samples(), number=modes, rows=st.tuples(*[st.integers(1, 6)] * 2), seed=seeds)
def test_products_along_one_mode_compose(xp, sample, number, rows, seed):
    mode, x = mode_of(sample, number), sample.to(xp)
    first = matrix(sample, rows[0], sample.shape[mode], seed)
    second = matrix(sample, rows[1], rows[0], seed + 1)
    a, b = as_array(xp, first), as_array(xp, second)
    stepwise = ft.mode_dot(ft.mode_dot(x, a, mode), b, mode)
    listed = ft.multi_mode_dot(x, [a, b], modes=[mode, mode - len(sample.shape)])
    at_once = ft.mode_dot(x, xp.matmul(b, a), mode)
    limit = tolerance(
        sample.dtype, sample.shape[mode], rows[0], norm=sample.bound * frobenius(first) * frobenius(second), xp=xp
    )
    assert distance(stepwise, at_once) <= limit
    assert same_bits(stepwise, listed), "a mode that occurs twice is multiplied in the order given"


@for_all(
    sample=samples(scales=("unit",), max_ndim=5),
    present=st.lists(st.booleans(), min_size=5, max_size=5),
    transpose=st.booleans(),
    shuffle=st.randoms(use_true_random=False),
    seed=seeds,
)
def test_multi_mode_dot_equals_einsum(xp, sample, present, transpose, shuffle, seed):
    rng = np.random.default_rng(seed)
    given = [
        matrix(sample, n if transpose else rng.integers(1, 5), rng.integers(1, 5) if transpose else n, seed + k)
        if present[k]
        else None
        for k, n in enumerate(sample.shape)
    ]
    plain = [None if m is None else m.conj().T if transpose else m for m in given]
    letters, expected = "abcde"[: len(sample.shape)], sample.values
    for k, m in enumerate(plain):
        if m is not None:
            expected = np.einsum(f"z{letters[k]},{letters}->{letters.replace(letters[k], 'z')}", m, expected)
    order = list(range(len(sample.shape)))
    shuffle.shuffle(order)
    x = sample.to(xp)
    arrays = [None if m is None else as_array(xp, m) for m in given]
    limit = tolerance(
        sample.dtype,
        sum(sample.shape),
        norm=sample.bound * math.prod(frobenius(m) for m in plain if m is not None),
        xp=xp,
    )
    by_position = ft.multi_mode_dot(x, arrays, transpose=transpose)
    by_mode = ft.multi_mode_dot(x, [arrays[k] for k in order], modes=order, transpose=transpose)
    assert distance(by_position, expected) <= limit
    assert distance(by_mode, expected) <= limit
    assert same_bits(x, sample.values), "the input was changed"


@given(
    sample=samples(dtypes=("float64",), scales=("unit",), min_dim=1), number=modes, transpose=st.booleans(), seed=seeds
)
def test_tensorly_multiplies_alike(sample, number, transpose, seed):
    tensorly_algebra = pytest.importorskip("tensorly.tenalg")
    mode = mode_of(sample, number)
    ms = [matrix(sample, *((n, 2) if transpose else (2, n)), seed + k) for k, n in enumerate(sample.shape)]
    limit = tolerance("float64", sum(sample.shape), norm=sample.bound * math.prod(frobenius(m) for m in ms))
    expected = tensorly_algebra.multi_mode_dot(sample.values, ms, transpose=transpose)
    assert distance(ft.multi_mode_dot(sample.values, ms, transpose=transpose), expected) <= limit
    if not transpose:
        expected = tensorly_algebra.mode_dot(sample.values, ms[mode], mode)
        assert distance(ft.mode_dot(sample.values, ms[mode], mode), expected) <= limit


@pytest.mark.parametrize("dtype", ["float32", "float64", "complex64"])
@pytest.mark.parametrize(
    ("shape", "new"),
    [
        ((20, 24, 3, 3), (4, 5, 2, 2)),
        ((4, 5, 2, 2), (20, 24, 3, 3)),
        ((3, 3, 40, 2, 5, 3), (2, 2, 6, 2, 5, 2)),
        ((2,) * 8, (3,) * 8),
    ],
)
def test_short_modes_side_by_side_are_multiplied_as_tensordot_multiplies_them_one_by_one(shape, new, dtype):
    rng = np.random.default_rng(0)
    x = normal(rng, shape, dtype).astype(dtype)
    ms = [normal(rng, (m, n), dtype).astype(dtype) for n, m in zip(shape, new)]
    for left_whole in (None, 0, len(shape) - 1):
        expected, wanted = x.astype("complex128" if dtype in COMPLEX else "float64"), list(ms)
        if left_whole is not None:
            wanted[left_whole] = None
        for k, m in enumerate(wanted):
            if m is not None:
                expected = np.moveaxis(np.tensordot(m, expected, axes=(1, k)), 0, k)
        t = ft.TuckerTensor(x, wanted)
        adjoint = [None if m is None else m.conj().T for m in wanted]
        limit = tolerance(
            dtype, sum(shape), norm=frobenius(x) * math.prod(frobenius(m) for m in t.factors if m is not None)
        )
        assert distance(ft.multi_mode_dot(x, wanted), expected) <= limit
        assert distance(ft.multi_mode_dot(x, adjoint, transpose=True), expected) <= limit
        assert distance(ft.reconstruct(t, out=np.empty(t.shape, dtype)), expected) <= limit


@pytest.mark.parametrize("rows", [63, 64, 65])
def test_a_large_fresh_result_is_the_product_though_it_is_written_in_bands(monkeypatch, rows):
    monkeypatch.setattr(algebra, "_BAND", 80)
    monkeypatch.setattr(algebra, "_BAND_ROWS", 1)
    rng = np.random.default_rng(0)
    x, m = rng.standard_normal((rows, 3)), rng.standard_normal((20, 3))
    result = ft.mode_dot(x, m, 1)
    assert result.flags.c_contiguous
    assert distance(result, np.einsum("ij,kj->ik", x, m)) <= tolerance("float64", 3, norm=frobenius(x) * frobenius(m))
    assert distance(ft.mode_dot(x.T, m.T @ m, 0), np.einsum("ij,kj->ki", x, m.T @ m)) <= tolerance(
        "float64", 3, norm=frobenius(x) * frobenius(m) ** 2
    )


def test_multi_mode_dot_without_matrices_gives_the_tensor_back(xp):
    x = xp.ones((2, 3))
    assert ft.multi_mode_dot(x, []) is x
    assert ft.multi_mode_dot(x, [None, None]) is x


def test_small_and_large_products_agree(xp):
    # `contract` has two ways for an inner mode: one batched product, or one large one on a copy.
    rng = np.random.default_rng(0)
    for n in (2, 40):
        x, m = rng.standard_normal((3, n, n)), rng.standard_normal((n, n))
        product = ft.mode_dot(as_array(xp, x), as_array(xp, m), 1)
        limit = tolerance("float64", n, norm=frobenius(x) * frobenius(m))
        assert distance(product, np.einsum("bij,ki->bkj", x, m)) <= limit


@for_all(sample=samples(dtypes=LOW_PRECISION, scales=("unit",), min_dim=1), number=modes, seed=seeds)
def test_sixteen_bit_floats_stay_sixteen_bit(xp, sample, number, seed):
    if not supports(xp, "float16"):
        pytest.skip("the array-API standard has no 16-bit floats")
    mode, x = mode_of(sample, number), sample.to(xp)
    m = normal(np.random.default_rng(seed), (3, sample.shape[mode]))
    given = as_array(xp, m, sample.dtype)
    product = ft.mode_dot(x, given, mode)
    expected = np.moveaxis(
        np.tensordot(to_numpy(given).astype(float), sample.values.astype(float), axes=(1, mode)), 0, mode
    )
    assert dtype_name(product.dtype) == sample.dtype
    assert distance(product, expected) <= tolerance(
        sample.dtype, sample.shape[mode], norm=sample.bound * frobenius(to_numpy(given))
    )


def test_mixed_precisions_are_promoted(xp):
    x, m = xp.ones((2, 3), dtype=xp.float32), xp.ones((4, 3), dtype=xp.float64)
    assert ft.mode_dot(x, m, 1).dtype == xp.float64
    assert ft.multi_mode_dot(x, [None, m]).dtype == xp.float64


def test_integers_multiply_exactly(xp):
    x, m = xp.reshape(xp.arange(6, dtype=xp.int64), (2, 3)), xp.ones((1, 3), dtype=xp.int64)
    assert same_bits(ft.mode_dot(x, m, 1), np.array([[3], [12]]))


def test_mode_dot_refuses_what_does_not_fit(xp):
    x = xp.ones((2, 3, 4))
    message = r"mode_dot: the matrix for mode 1 has shape \(5, 4\), but mode 1 has size 3; pass a matrix with 3 columns"
    with pytest.raises(ValueError, match=message):
        ft.mode_dot(x, xp.ones((5, 4)), 1)
    message = r"mode_dot: the matrix for mode 2 has shape \(4,\); pass a matrix \(a vector v as v\[None, :\]\)"
    with pytest.raises(ValueError, match=message):
        ft.mode_dot(x, xp.ones((4,)), -1)
    with pytest.raises(ValueError, match="mode_dot: mode 3 of a tensor with 3 modes; its modes are -3 to 2"):
        ft.mode_dot(x, xp.ones((5, 4)), 3)


def test_multi_mode_dot_refuses_what_does_not_fit(xp):
    x = xp.ones((2, 3))
    with pytest.raises(ValueError, match=r"multi_mode_dot: 1 matrices for 2 modes; pass one matrix \(or None\) a mode"):
        ft.multi_mode_dot(x, [None], modes=[0, 1])
    with pytest.raises(ValueError, match="multi_mode_dot: mode 2 of a tensor with 2 modes; its modes are -2 to 1"):
        ft.multi_mode_dot(x, [None, None, None])
    with pytest.raises(
        ValueError, match=r"multi_mode_dot: the matrix for mode 1 has shape \(4, 2\), but mode 1 has size"
    ):
        ft.multi_mode_dot(x, [None, xp.ones((4, 2))])
    with pytest.raises(ValueError, match=r"multi_mode_dot: the matrix for mode 0 has shape \(2,\); pass a matrix"):
        ft.multi_mode_dot(x, [xp.ones((2,))], modes=[0], transpose=True)


def test_transposed_products_are_refused_in_the_shape_that_was_passed(xp):
    message = (
        r"multi_mode_dot: the matrix for mode 1 has shape \(4, 2\), but mode 1 has size 3; pass a matrix with 3 rows"
    )
    with pytest.raises(ValueError, match=message):
        ft.multi_mode_dot(xp.ones((2, 3)), [None, xp.ones((4, 2))], transpose=True)


def test_a_second_product_along_a_mode_is_checked_against_the_first(xp):
    message = r"the matrix for mode 0 has shape \(4, 2\), but mode 0 has size 5; pass a matrix with 5 columns"
    with pytest.raises(ValueError, match=message):
        ft.multi_mode_dot(xp.ones((2, 3)), [xp.ones((5, 2)), xp.ones((4, 2))], modes=[0, 0])


# --- the order of products ------------------------------------------------------------------------


def cost(order: tuple[int, ...], inner: list[int], outer: list[int]) -> float:
    """Return the model's cost of products in an order: multiply-adds, and writes at their price."""
    sizes, total = list(inner), 0.0
    for k in order:
        multiply_adds = math.prod(sizes) * outer[k]
        sizes[k] = outer[k]
        total += multiply_adds + _WRITE_COST * math.prod(sizes)
    return total


dimensions = st.one_of(st.integers(0, 3), st.integers(1, 40), st.integers(1, 4096))


@settings(max_examples=400)
@given(st.lists(st.tuples(dimensions, dimensions), max_size=5))
@example([(0, 3), (2, 5)])
def test_contraction_order_is_the_best_of_all_permutations(pairs):
    inner, outer = [a for a, _ in pairs], [b for _, b in pairs]
    order = contraction_order(inner, outer)
    assert sorted(order) == list(range(len(pairs)))
    best = min(cost(p, inner, outer) for p in itertools.permutations(range(len(pairs))))
    assert cost(tuple(order), inner, outer) <= best * (1 + 1e-12)


# --- gradients and transformations ----------------------------------------------------------------


@given(shape=shapes(min_dim=1, max_ndim=4, max_dim=4), seed=seeds, dtype=st.sampled_from(("float64", "complex128")))
def test_torch_gradients_equal_the_einsums(shape, seed, dtype):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(seed)
    arrays = [normal(rng, shape, dtype), *(normal(rng, (3, n), dtype) for n in shape)]
    weights = torch.asarray(normal(rng, (3,) * len(shape), dtype))
    inputs, outputs = "abcd"[: len(shape)], "wxyz"[: len(shape)]
    terms = ",".join([inputs, *(f"{o}{i}" for o, i in zip(outputs, inputs))])

    def gradients(function):
        leaves = [torch.asarray(a).requires_grad_() for a in arrays]
        y = function(leaves)
        return torch.autograd.grad((y * weights).abs().square().sum(), leaves)

    ours = gradients(lambda leaves: ft.multi_mode_dot(leaves[0], leaves[1:]))
    theirs = gradients(lambda leaves: torch.einsum(f"{terms}->{outputs}", *leaves))
    for a, b in zip(ours, theirs):
        scale = math.prod(frobenius(x) ** 2 for x in arrays) * frobenius(weights) ** 2
        assert distance(a, b) <= tolerance("float64", sum(shape), norm=scale)


def test_jax_gradients_equal_the_einsums():
    jax = pytest.importorskip("jax")
    rng = np.random.default_rng(0)
    arrays = [jax.numpy.asarray(rng.standard_normal(s)) for s in ((2, 3, 4), (5, 2), (2, 3), (3, 4))]
    weights = rng.standard_normal((5, 2, 3))
    ours = jax.grad(lambda a: (ft.multi_mode_dot(a[0], a[1:]) * weights).sum())(arrays)
    theirs = jax.grad(lambda a: (jax.numpy.einsum("abc,xa,yb,zc->xyz", *a) * weights).sum())(arrays)
    for a, b in zip(ours, theirs):
        assert distance(a, b) <= tolerance("float64", 9, norm=frobenius(b))


@pytest.mark.parametrize("function", ["unfold", "fold", "mode_dot", "multi_mode_dot"])
@pytest.mark.parametrize("transformation", ["torch.compile", "torch.func.vmap", "jax.jit", "jax.vmap"])
def test_transformations_trace_every_verb(function, transformation):
    name, _, verb = transformation.partition(".")
    module = pytest.importorskip(name)
    rng = np.random.default_rng(0)
    x, a, b = rng.standard_normal((6, 2, 3, 4)), rng.standard_normal((6, 5, 3)), rng.standard_normal((6, 2, 4))

    def body(x, a, b):
        if function == "unfold":
            return ft.unfold(x, 1)
        if function == "fold":
            return ft.fold(ft.unfold(x, 1), 1, (2, 3, 4))
        if function == "mode_dot":
            return ft.mode_dot(x, a, 1)
        return ft.multi_mode_dot(x, [None, a, b])

    expected = np.stack([body(*item) for item in zip(x, a, b)])
    arrays = [module.asarray(v) if name == "torch" else module.numpy.asarray(v) for v in (x, a, b)]
    if verb == "func.vmap":
        result = module.func.vmap(body)(*arrays)
    elif verb == "vmap":
        result = module.vmap(body)(*arrays)
    elif verb == "compile":
        compiled = module.compile(body, fullgraph=True, backend="eager")
        result = module.stack([compiled(*item) for item in zip(*arrays)])
    else:
        jitted = module.jit(body)
        result = module.numpy.stack([jitted(*item) for item in zip(*arrays)])
    assert distance(result, expected) <= tolerance("float64", 12, norm=frobenius(expected))


def test_results_stay_in_the_library_of_the_arguments(xp):
    x, m = xp.ones((2, 3)), xp.ones((4, 3))
    for result in (ft.unfold(x, 1), ft.fold(x, 0, (2, 3)), ft.mode_dot(x, m, 1), ft.multi_mode_dot(x, [None, m])):
        assert type(result) is type(x), library(xp)
