"""The Tucker tensor and its algebra: everything must equal the same operation on the dense tensor."""

import dataclasses
import itertools
import math
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import flora_tensor as ft
import support
from flora_tensor import TuckerTensor
from support import (
    FLOATING,
    LOW_PRECISION,
    TuckerSample,
    as_array,
    distance,
    dtype_name,
    for_all,
    frobenius,
    library,
    normal,
    orthonormal,
    same_bits,
    supports,
    to_numpy,
    tolerance,
    tucker_pairs,
    tucker_samples,
)


def limit(sample: TuckerSample, xp=None, *, dtype: str | None = None, norm: float | None = None) -> float:
    """Return how far rounding may carry a result whose terms are bounded by the norms of core and factors."""
    norm = sample.bound if norm is None else norm
    return tolerance(dtype or sample.dtype, sum(sample.ranks) + sum(sample.shape), norm=norm, xp=xp)


def unchanged(t: TuckerTensor, sample: TuckerSample) -> bool:
    """Tell whether a Tucker tensor still holds the numbers it was made of."""
    fresh = sample.to(np) if sample.dtype != "bfloat16" else sample
    arrays = zip((t.core, *t.factors), (fresh.core, *fresh.factors))
    return all((a is None and b is None) or same_bits(a, b) for a, b in arrays)


def example(xp=np, dtype: str = "float64") -> TuckerTensor:
    """Return a small Tucker tensor with one whole mode."""
    return TuckerSample((4, 3, 5), (2, 3, 2), (False, True, False), dtype, seed=1).to(xp)


# --- the noun ----------------------------------------------------------------------------------------


@for_all(sample=tucker_samples())
def test_properties_describe_what_is_stored(xp, sample):
    t = sample.to(xp)
    assert (t.shape, t.ranks, t.ndim) == (sample.shape, sample.ranks, len(sample.shape))
    assert t.dtype == t.core.dtype
    assert t.n_parameters == sample.core.size + sum(u.size for u in sample.factors if u is not None)
    core, factors = t
    assert core is t.core
    assert factors is t.factors
    assert isinstance(factors, tuple)


def test_repr_is_the_summary():
    t = example()
    expected = "TuckerTensor(shape=(4, 3, 5), ranks=(2, 3, 2), n_parameters=30, whole_modes=(1,), dtype=float64)"
    assert repr(t) == expected
    torch = pytest.importorskip("torch")
    assert repr(TuckerTensor(torch.ones(1, 1), [torch.ones(2, 1), torch.ones(3, 1)])).endswith("dtype=float32)")


def test_instances_are_immutable_and_compare_by_identity():
    t = example()
    with pytest.raises(dataclasses.FrozenInstanceError):
        t.core = np.ones((1, 1, 1))  # type: ignore[misc]
    assert t == t
    assert t != example()
    assert len({t, t, example()}) == 2


def test_a_list_of_factors_is_copied():
    factors = [np.ones((3, 2)), None]
    t = TuckerTensor(np.ones((2, 2)), factors)
    factors[0] = None
    assert t.shape == (3, 2)


def test_pickling_keeps_the_numbers():
    t = example()
    copy = pickle.loads(pickle.dumps(t))
    assert same_bits(copy.to_tensor(), t.to_tensor())


def test_map_reaches_every_array(xp):
    t = example(xp).map(lambda a: a * 2)
    assert distance(t.core, 2 * to_numpy(example().core)) == 0
    assert t.factors[1] is None
    assert distance(t.factors[2], 2 * to_numpy(example().factors[2])) == 0


def test_a_wrong_number_of_factors_is_refused(xp):
    message = r"TuckerTensor: 1 factors for a core of shape \(2, 2\); pass one factor \(or None\) a mode"
    with pytest.raises(ValueError, match=message):
        TuckerTensor(xp.ones((2, 2)), [xp.ones((3, 2))])


@pytest.mark.parametrize("shape", [(3, 3), (2, 3), (2,), (3, 2, 1)])
def test_a_factor_that_does_not_fit_the_core_is_refused(xp, shape):
    message = r"TuckerTensor: factor 1 has shape \(.*\), but the core has shape \(2, 2\); pass a matrix with 2 columns"
    with pytest.raises(ValueError, match=message):
        TuckerTensor(xp.ones((2, 2)), [None, xp.ones(shape)])


def test_core_and_factors_of_two_libraries_are_refused():
    torch = pytest.importorskip("torch")
    with pytest.raises(TypeError, match=r"TuckerTensor: got numpy.ndarray, torch.Tensor; pass arrays of one library"):
        TuckerTensor(np.ones((2, 2)), [torch.ones(3, 2), None])


def test_lists_are_refused():
    with pytest.raises(TypeError, match=r"TuckerTensor: got builtins.list; pass arrays of one library"):
        TuckerTensor([[1.0]], [[[1.0], [1.0]], [[1.0]]])
    with pytest.raises(TypeError, match="TuckerTensor: factors is NoneType; pass one factor"):
        TuckerTensor(np.ones((2, 2)), None)
    for c in ("2", [2.0], None):
        with pytest.raises(TypeError, match=r"scale: c is .*; pass a number"):
            ft.scale(example(), c)


def test_a_tensor_without_axes_is_its_core(xp):
    a = TuckerTensor(xp.asarray(3.0), [])
    assert float(ft.reconstruct(a)) == float(ft.norm(a)) == 3.0
    assert ft.add(a, a).to_tensor().shape == ()


def test_a_numpy_array_is_made_only_on_request():
    for call in (np.asarray, np.array, lambda t: np.ones(3) * t):
        with pytest.raises(TypeError, match=r"TuckerTensor: it is a core and factors, .* use to_tensor\(\)"):
            call(example())


@pytest.mark.parametrize(
    "call",
    [
        ft.norm,
        ft.orthogonalize,
        ft.reconstruct,
        lambda x: ft.inner(example(), x),
        lambda x: ft.add(x, x),
        lambda x: ft.stack([x]),
        lambda x: ft.scale(x, 2),
        lambda x: ft.permute_modes(x, (0, 1)),
        lambda x: ft.select_slice(x, 0, 1),
        lambda x: ft.round_tucker(x, ranks=1),
    ],
)
def test_what_is_no_tucker_tensor_is_refused(call):
    with pytest.raises(TypeError, match=r"got numpy.ndarray; pass a TuckerTensor, such as tucker\(x, ranks\).tucker"):
        call(np.ones((2, 2)))


# --- the dense tensor --------------------------------------------------------------------------------


@for_all(sample=tucker_samples(dtypes=FLOATING + LOW_PRECISION))
def test_reconstruct_equals_einsum(xp, sample):
    t = sample.to(xp)
    x = ft.reconstruct(t)
    assert tuple(x.shape) == sample.shape
    assert x.dtype == t.dtype
    assert distance(x, sample.dense) <= limit(sample, xp)
    assert same_bits(t.to_tensor(), x)
    assert unchanged(t, sample), "the input was changed"


@given(sample=tucker_samples(dtypes=("float64",)))
def test_tensorly_reconstructs_alike(sample):
    tensorly = pytest.importorskip("tensorly")
    factors = [np.eye(n) if u is None else u for n, u in zip(sample.shape, sample.factors)]
    expected = tensorly.tucker_to_tensor((sample.core, factors))
    assert distance(ft.reconstruct(sample.to(np)), expected) <= limit(sample)


def test_a_tensor_with_an_empty_mode_is_empty(xp):
    t = TuckerTensor(xp.ones((2, 3)), [xp.ones((0, 2)), xp.ones((4, 3))])
    assert t.to_tensor().shape == (0, 4)
    empty_core = TuckerTensor(xp.ones((0, 0)), [xp.ones((2, 0)), xp.ones((3, 0))])
    assert same_bits(empty_core.to_tensor(), np.zeros((2, 3), dtype=to_numpy(empty_core.core).dtype))


def test_core_and_factors_of_two_precisions_are_promoted(xp):
    t = TuckerTensor(xp.ones((2, 2), dtype=xp.float32), [xp.ones((3, 2), dtype=xp.float64), None])
    assert ft.reconstruct(t).dtype == xp.float64


@for_all(sample=tucker_samples(dtypes=FLOATING), layout=st.sampled_from(("C", "F", "strided", "negative", "slice")))
def test_out_is_filled_in_every_layout(xp, sample, layout):
    if library(xp) not in {"numpy", "torch"}:
        pytest.skip(f"arrays of {library(xp)} cannot be written to")
    t, dtype, ndim = sample.to(xp), getattr(xp, sample.dtype), len(sample.shape)
    frame = xp.full((2, *(n + 2 for n in sample.shape)), 7.0, dtype=dtype)
    if layout == "C":
        out = xp.full(sample.shape, 7.0, dtype=dtype)
    elif layout == "F":
        out = xp.permute_dims(xp.full(sample.shape[::-1], 7.0, dtype=dtype), tuple(range(ndim))[::-1])
    elif layout == "strided":
        out = xp.full((*sample.shape[:-1], 2 * sample.shape[-1]), 7.0, dtype=dtype)[..., ::2]
    elif layout == "negative":
        out = xp.flip(xp.full(sample.shape, 7.0, dtype=dtype))
    else:
        out = frame[(1, *(slice(1, -1) for _ in sample.shape))]
    assert ft.reconstruct(t, out=out) is out
    assert distance(out, sample.dense) <= limit(sample)
    assert unchanged(t, sample), "the input was changed"
    if layout == "slice":
        out[...] = 7.0
        assert bool((frame == 7.0).all()), "something was written outside of out"


def test_out_of_a_tensor_without_factors():
    t = TuckerTensor(np.arange(6.0).reshape(2, 3), [None, None])
    out = np.empty((2, 3))
    assert same_bits(ft.reconstruct(t, out=out), t.core)
    assert not np.shares_memory(out, t.core)


@pytest.mark.parametrize("aliased", ["core", "factor"])
def test_out_may_be_the_core_or_a_factor(aliased):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    core, u, v = (rng.standard_normal((4, 4)) for _ in range(3))
    for make in (np.array, torch.tensor):
        arrays = [make(core), make(u), make(v)]
        out = arrays[0] if aliased == "core" else arrays[2]
        ft.reconstruct(TuckerTensor(arrays[0], arrays[1:]), out=out)
        expected = u @ core @ v.T
        assert distance(out, expected) <= tolerance("float64", 8, norm=frobenius(u) * frobenius(core) * frobenius(v))


@pytest.mark.parametrize("name", ["numpy", "torch"])
def test_out_of_another_shape_or_type_is_refused(name):
    xp = pytest.importorskip(f"array_api_compat.{name}")
    t = example(xp)
    message = r"reconstruct: out has shape \(4, 3\) and type .*float64; pass shape \(4, 3, 5\) and type .*float64"
    with pytest.raises(ValueError, match=message):
        ft.reconstruct(t, out=xp.empty((4, 3), dtype=xp.float64))
    message = r"reconstruct: out has shape \(4, 3, 5\) and type .*float32; pass shape \(4, 3, 5\) and type .*float64"
    with pytest.raises(ValueError, match=message):
        ft.reconstruct(t, out=xp.empty((4, 3, 5), dtype=xp.float32))


def test_out_that_cannot_be_written_to_is_refused():
    torch = pytest.importorskip("torch")
    out = np.empty((4, 3, 5))
    out.flags.writeable = False
    with pytest.raises(ValueError, match="reconstruct: out is read-only; pass an array that can be written to"):
        ft.reconstruct(example(), out=out)
    import array_api_compat.torch as xp

    expanded = torch.empty(1, 3, 5, dtype=torch.float64).expand(4, 3, 5)
    with pytest.raises(ValueError, match="reconstruct: out repeats its memory along mode 0; pass an array of its own"):
        ft.reconstruct(example(xp), out=expanded)


def test_out_is_refused_where_a_gradient_is_recorded():
    torch = pytest.importorskip("torch")
    import array_api_compat.torch as xp

    t = example(xp).map(lambda a: a.requires_grad_())
    out = torch.empty(4, 3, 5, dtype=torch.float64)
    with pytest.raises(ValueError, match="reconstruct: out cannot record gradients; leave it out, or use"):
        ft.reconstruct(t, out=out)
    with torch.no_grad():
        assert distance(ft.reconstruct(t, out=out), example().to_tensor()) <= 1e-13


@pytest.mark.parametrize("name", ["jax.numpy", "array_api_strict"])
def test_out_of_a_library_without_writing_is_refused(name):
    xp = pytest.importorskip(name)
    t = TuckerTensor(xp.ones((1, 1)), [xp.ones((2, 1)), xp.ones((3, 1))])
    kind = "jax" if "jax" in name else name
    with pytest.raises(TypeError, match=f"reconstruct: out is an array of {kind}.*; pass a NumPy or PyTorch array, or"):
        ft.reconstruct(t, out=xp.empty((2, 3)))


def test_out_of_another_library_is_refused():
    torch = pytest.importorskip("torch")
    with pytest.raises(TypeError, match=r"reconstruct: got numpy.ndarray, torch.Tensor; pass arrays of one library"):
        ft.reconstruct(example(), out=torch.empty(4, 3, 5, dtype=torch.float64))


# --- algebra -----------------------------------------------------------------------------------------


@for_all(pair=tucker_pairs())
def test_inner_equals_the_dense_one(xp, pair):
    a, b = pair
    value = ft.inner(a.to(xp), b.to(xp))
    expected = np.vdot(a.dense, b.dense)
    assert tuple(value.shape) == ()
    assert distance(value, expected) <= limit(a, xp, norm=a.bound * b.bound)


@for_all(pair=tucker_pairs())
def test_add_equals_the_dense_one(xp, pair):
    a, b = pair
    s, t = a.to(xp), b.to(xp)
    total = ft.add(s, t)
    expected = tuple(
        r if u is None and v is None else r + q for r, q, u, v in zip(a.ranks, b.ranks, s.factors, t.factors)
    )
    assert total.ranks == expected
    assert total.dtype == s.dtype
    assert distance(total.to_tensor(), a.dense + b.dense) <= limit(a, xp, norm=a.bound + b.bound)
    assert unchanged(s, a)
    assert unchanged(t, b)


@for_all(sample=tucker_samples(), mode=st.integers(0, 100), seed=st.integers(0, 1000))
def test_add_keeps_factors_that_are_shared(xp, sample, mode, seed):
    t, mode = sample.to(xp), mode % len(sample.shape)
    core = normal(np.random.default_rng(seed), sample.ranks, sample.dtype).astype(sample.dtype)
    other = TuckerTensor(as_array(xp, core), t.factors)
    total = ft.add(t, other)
    assert total.ranks == sample.ranks
    assert all(u is v for u, v in zip(total.factors, t.factors))
    assert same_bits(total.core, to_numpy(t.core + other.core))
    # Now one mode is not shared: only its rank may grow.
    apart = TuckerTensor(
        other.core, [None if u is None else u + 0 if k == mode else u for k, u in enumerate(other.factors)]
    )
    grown = ft.add(t, apart)
    expected = [r * 2 if k == mode and not sample.whole[mode] else r for k, r in enumerate(sample.ranks)]
    assert grown.ranks == tuple(expected)
    assert distance(grown.to_tensor(), total.to_tensor()) <= limit(sample, xp, norm=4 * sample.bound + frobenius(core))


@for_all(sample=tucker_samples(), c=st.floats(-8, 8))
def test_scale_equals_the_dense_one(xp, sample, c):
    t = sample.to(xp)
    scaled = ft.scale(t, c)
    assert scaled.dtype == t.dtype
    assert all(u is v for u, v in zip(scaled.factors, t.factors))
    assert distance(scaled.to_tensor(), c * sample.dense) <= limit(sample, xp, norm=(1 + abs(c)) * sample.bound)


def test_scale_by_an_array_and_by_a_complex_number(xp):
    t = example(xp, "complex128")
    assert distance(ft.scale(t, xp.asarray(2.0)).core, 2 * to_numpy(t.core)) == 0
    assert distance(ft.scale(t, 1j).core, 1j * to_numpy(t.core)) == 0


def test_scale_refuses_an_array_with_axes(xp):
    with pytest.raises(ValueError, match=r"scale: c has shape \(2,\); pass a number"):
        ft.scale(example(xp), xp.ones((2,)))


@for_all(sample=tucker_samples())
def test_norm_equals_the_dense_one(xp, sample):
    value = ft.norm(sample.to(xp))
    assert tuple(value.shape) == ()
    assert "complex" not in dtype_name(value.dtype)
    assert abs(float(value) - frobenius(sample.dense)) <= limit(sample, xp)


@for_all(sample=tucker_samples())
def test_norm_of_a_difference_that_cancels(xp, sample):
    # The difference of two equal tensors whose factors are not the same objects: their ranks add up, and the zero must
    # come out of the arithmetic. The square root of an inner product would be off by sqrt(eps).
    a, b = sample.to(xp), sample.to(xp)
    difference = ft.add(a, ft.scale(b, -1))
    assert float(ft.norm(difference)) <= limit(sample, xp)
    assert float(ft.norm(ft.add(a, ft.scale(a, -1)))) == 0


@pytest.mark.parametrize("exponent", [-30, 30])
@pytest.mark.parametrize("place", ["core", "factor", "opposed", "brink"])
def test_norm_neither_overflows_nor_underflows(xp, exponent, place):
    # The magnitude in the core, in a factor, or in a factor against its opposite in two others: partial products
    # would leave float32's range although the result does not.
    rng = np.random.default_rng(0)
    core = rng.standard_normal((2, 2, 2)).astype("float32")
    factors = [rng.standard_normal((4, 2)).astype("float32") for _ in range(3)]
    expected = frobenius(TuckerTensor(core.astype(float), [u.astype(float) for u in factors]).to_tensor())
    big = np.float32(10.0**exponent)
    if place == "core":
        core, expected = core * big, expected * 10.0**exponent
    elif place == "factor":
        factors[1], expected = factors[1] * big, expected * 10.0**exponent
    elif place == "brink":
        # The core's largest entry is within a factor of three of the type's limit, and the other factors enlarge it.
        brink = np.float32(1e38) / np.abs(core).max()
        core, factors[1], expected = core * brink, factors[1] / big, expected * float(brink) / 10.0**exponent
        if exponent < 0:
            factors[1], expected = factors[1] * big * big, expected * 10.0 ** (2 * exponent)
    else:
        core, factors[0] = core * big, factors[0] * big
        factors[1], factors[2] = factors[1] / big, factors[2] / big
    t = TuckerTensor(as_array(xp, core), [as_array(xp, u) for u in factors])
    assert float(ft.norm(t)) == pytest.approx(expected, rel=tolerance("float32", 20))


def test_norm_of_zero_is_zero(xp):
    assert float(ft.norm(ft.scale(example(xp), 0.0))) == 0
    assert float(ft.norm(TuckerTensor(xp.zeros((0, 2)), [xp.zeros((0, 0)), None]))) == 0


@for_all(sample=tucker_samples())
def test_orthogonalize_keeps_the_tensor(xp, sample):
    t = sample.to(xp)
    q = ft.orthogonalize(t)
    assert q.shape == t.shape
    assert q.ranks == tuple(min(r, n) for r, n in zip(sample.ranks, sample.shape))
    for u, whole in zip(q.factors, sample.whole):
        assert (u is None) == whole
        if u is not None:
            gram = to_numpy(u).conj().T @ to_numpy(u)
            assert distance(gram, np.eye(u.shape[1])) <= tolerance(sample.dtype, *u.shape)
    assert distance(q.to_tensor(), sample.dense) <= limit(sample, xp)
    assert abs(frobenius(q.core) - frobenius(sample.dense)) <= limit(sample, xp)
    assert unchanged(t, sample), "the input was changed"


@for_all(sample=tucker_samples(dtypes=LOW_PRECISION, max_ndim=3))
def test_sixteen_bit_floats_are_factorized_in_float32(xp, sample):
    if not supports(xp, "float16"):
        pytest.skip("the array-API standard has no 16-bit floats")
    t = sample.to(xp)
    q = ft.orthogonalize(t)
    assert dtype_name(q.dtype) == sample.dtype
    assert all(u is None or dtype_name(u.dtype) == sample.dtype for u in q.factors)
    assert distance(q.to_tensor(), sample.dense) <= limit(sample)
    assert dtype_name(ft.norm(t).dtype) == "float32"
    assert abs(float(ft.norm(t)) - frobenius(sample.dense)) <= limit(sample, dtype="float32")
    assert dtype_name(ft.inner(t, t).dtype) == "float32"


def test_inner_of_sixteen_bit_floats_does_not_overflow(xp):
    if not supports(xp, "float16"):
        pytest.skip("the array-API standard has no 16-bit floats")
    t = TuckerTensor(xp.full((1, 1), 300.0, dtype=xp.float16), [xp.ones((2, 1), dtype=xp.float16)] * 2)
    assert float(ft.inner(t, t)) == 4 * 300.0**2


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "bool"])
def test_types_in_which_sums_overflow_are_held_but_not_computed_with(xp, dtype):
    if library(xp) == "torch" and dtype == "uint16":
        pytest.skip("PyTorch has hardly a function for it")
    short = getattr(xp, dtype if dtype != "bool" or hasattr(xp, "bool") else "bool_")
    t = TuckerTensor(xp.ones((2, 2), dtype=xp.float32), [None, xp.ones((3, 2), dtype=short)])
    calls = [lambda f=f: f(t) for f in (ft.norm, ft.reconstruct, ft.orthogonalize)]
    calls += [lambda: ft.inner(t, t), lambda: ft.add(t, t), lambda: ft.scale(t, 2.0), lambda: ft.select_slice(t, 0, 0)]
    for call in (*calls, lambda: ft.round_tucker(t, ranks=1)):
        with pytest.raises(
            TypeError, match=f"got a core or factor of type .*{dtype}.* overflow; pass floats, as t.map"
        ):
            call()
    wide = t.map(lambda a: xp.astype(a, xp.float32))
    assert float(ft.inner(wide, wide)) == 4.0 * 6


def test_integers_are_promoted(xp):
    t = TuckerTensor(xp.asarray([[1, 2], [3, 4]]), [xp.asarray([[1, 1], [0, 2], [1, 0]]), None])
    expected = np.array([[4.0, 6], [6, 8], [1, 2]])
    q = ft.orthogonalize(t)
    assert "float" in dtype_name(q.dtype)
    assert distance(q.to_tensor(), expected) <= tolerance(q.dtype, 6, norm=frobenius(expected))
    assert float(ft.norm(t)) == pytest.approx(frobenius(expected), rel=tolerance(q.dtype, 6))
    large = TuckerTensor(xp.asarray([[40000]], dtype=xp.int32), [xp.asarray([[2]], dtype=xp.int32)] * 2)
    assert float(ft.inner(large, large)) == 160000.0**2  # beyond int32


@for_all(sample=tucker_samples(), shuffle=st.randoms(use_true_random=False))
def test_permute_modes_equals_the_dense_one(xp, sample, shuffle):
    axes = list(range(len(sample.shape)))
    shuffle.shuffle(axes)
    t = sample.to(xp)
    permuted = ft.permute_modes(t, axes)
    assert same_bits(permuted.core, sample.core.transpose(axes))
    assert all(u is t.factors[k] for u, k in zip(permuted.factors, axes))
    assert distance(permuted.to_tensor(), sample.dense.transpose(axes)) <= limit(sample, xp)
    counted_back = ft.permute_modes(t, [k - len(axes) for k in axes])
    assert same_bits(counted_back.core, permuted.core)


@pytest.mark.parametrize("axes", [(0, 1), (0, 1, 1), (0, 1, 2, 0), ()])
def test_permute_modes_refuses_what_is_no_permutation(axes):
    with pytest.raises(ValueError, match=r"permute_modes: axes \(.*\) of a tensor with 3 modes; pass each mode once"):
        ft.permute_modes(example(), axes)


def test_permute_modes_refuses_a_mode_that_is_not_there():
    with pytest.raises(ValueError, match="permute_modes: mode 3 of a tensor with 3 modes; its modes are -3 to 2"):
        ft.permute_modes(example(), (0, 1, 3))


@pytest.mark.parametrize("function", [ft.inner, ft.add])
def test_tensors_of_two_shapes_are_refused(function, xp):
    other = TuckerTensor(xp.ones((4, 3)), [None, None])
    name = function.__name__
    with pytest.raises(ValueError, match=rf"{name}: shapes \(4, 3, 5\) and \(4, 3\) differ; pass tensors of one shape"):
        function(example(xp), other)


# --- slices and stacks -------------------------------------------------------------------------------


@for_all(sample=tucker_samples(), mode=st.integers(0, 100), index=st.integers(0, 100))
def test_a_slice_equals_the_dense_one(xp, sample, mode, index):
    ndim = len(sample.shape)
    if ndim == 1:
        return
    mode = mode % ndim
    index = index % sample.shape[mode]
    t = sample.to(xp)
    part = ft.select_slice(t, mode, index)
    assert part.dtype == t.dtype
    assert part.ranks == sample.ranks[:mode] + sample.ranks[mode + 1 :]
    assert all(u is v for u, v in zip(part.factors, t.factors[:mode] + t.factors[mode + 1 :]))
    assert distance(part.to_tensor(), np.take(sample.dense, index, axis=mode)) <= limit(sample, xp)
    counted_back = ft.select_slice(t, mode - ndim, index - sample.shape[mode])
    assert same_bits(counted_back.core, to_numpy(part.core))
    assert unchanged(t, sample)


@for_all(pair=tucker_pairs(), place=st.integers(0, 100))
def test_a_stack_equals_the_dense_one_and_its_slices_are_what_it_was_made_of(xp, pair, place):
    a, b = pair
    tensors = [a.to(xp), b.to(xp), a.to(xp)]
    place = place % (len(a.shape) + 1)
    joined = ft.stack(tensors, mode=place)
    assert joined.shape == (*a.shape[:place], 3, *a.shape[place:])
    assert joined.factors[place] is None
    dense_ones = [a.dense, b.dense, a.dense]
    assert distance(joined.to_tensor(), np.stack(dense_ones, axis=place)) <= limit(a, xp, norm=2 * a.bound + b.bound)
    for k, expected in enumerate(dense_ones):
        part = ft.select_slice(joined, place, k)
        assert distance(part.to_tensor(), expected) <= limit(a, xp, norm=a.bound + b.bound)
    assert same_bits(ft.stack(tensors, mode=place - len(a.shape) - 1).core, to_numpy(joined.core))


@for_all(sample=tucker_samples())
def test_a_stack_keeps_factors_that_are_shared(xp, sample):
    t = sample.to(xp)
    joined = ft.stack([t, ft.scale(t, 2.0)])
    assert joined.ranks == (2, *sample.ranks)
    assert all(u is v for u, v in zip(joined.factors[1:], t.factors))
    assert same_bits(ft.stack([t]).core, to_numpy(t.core)[None])


def test_rounding_a_stack_finds_what_its_layers_have_in_common(xp):
    """Layers in one pair of subspaces, each with a basis of its own that nothing can know to be the same."""
    rng = np.random.default_rng(0)
    common = [orthonormal(rng, n, 2) for n in (9, 8)]
    layers = [
        TuckerTensor(as_array(xp, rng.standard_normal((2, 2))), [as_array(xp, u @ normal(rng, (2, 2))) for u in common])
        for _ in range(5)
    ]
    joined = ft.stack(layers)
    assert joined.ranks == (5, 10, 10)
    small = ft.round_tucker(joined, rtol=1e-10)
    assert small.ranks[1:] == (2, 2)
    for k, layer in enumerate(layers):
        part = ft.select_slice(small, 0, k)
        assert distance(part.to_tensor(), layer.to_tensor()) <= 1e-9 * frobenius(joined.to_tensor())


def test_slices_and_stacks_refuse_what_is_not_there():
    t = example()
    with pytest.raises(ValueError, match="select_slice: mode 3 of a tensor with 3 modes; its modes are -3 to 2"):
        ft.select_slice(t, 3, 0)
    with pytest.raises(ValueError, match="select_slice: index 4 of mode 0 of size 4; pass a number from -4 to 3"):
        ft.select_slice(t, 0, 4)
    with pytest.raises(TypeError, match=r"select_slice: index is 1.0; pass an integer"):
        ft.select_slice(t, 0, 1.0)
    with pytest.raises(ValueError, match="select_slice: a has a single mode, whose slices are numbers"):
        ft.select_slice(TuckerTensor(np.ones(2), [np.ones((3, 2))]), 0, 0)
    with pytest.raises(ValueError, match="stack: got no tensors; pass at least one"):
        ft.stack([])
    with pytest.raises(ValueError, match=r"stack: shapes \(4, 3, 5\) and \(4, 3\) differ; pass tensors of one shape"):
        ft.stack([t, t, ft.select_slice(t, 2, 0)])
    with pytest.raises(ValueError, match="stack: mode 4 of a tensor with 4 modes"):
        ft.stack([t], mode=4)


# --- gradients and transformations -------------------------------------------------------------------


def tucker_functions():
    """Return scalar functions of a Tucker tensor beside the same function of the dense one."""
    return {
        "reconstruct": (lambda t: (ft.reconstruct(t) ** 2).sum(), lambda x: (x**2).sum()),
        "inner": (lambda t: ft.inner(t, t), lambda x: (x * x).sum()),
        "norm": (ft.norm, lambda x: (x**2).sum() ** 0.5),
        "orthogonalize": (lambda t: (ft.orthogonalize(t).core ** 2).sum(), lambda x: (x**2).sum()),
        "add": (lambda t: (ft.add(t, ft.scale(t, 2.0)).to_tensor() ** 2).sum(), lambda x: 9 * (x**2).sum()),
        "select_slice": (lambda t: (ft.select_slice(t, 1, 2).to_tensor() ** 3).sum(), lambda x: (x[:, 2] ** 3).sum()),
        "stack": (lambda t: (ft.stack([t, ft.scale(t, 2.0)]).to_tensor() ** 2).sum(), lambda x: 5 * (x**2).sum()),
        "permute_modes": (lambda t: (ft.permute_modes(t, (2, 0, 1)).to_tensor() ** 3).sum(), lambda x: (x**3).sum()),
    }


def gradient_arrays():
    """Return a core and factors of full column rank, where even QR is differentiable."""
    rng = np.random.default_rng(5)
    factors = [orthonormal(rng, n, r) @ (np.eye(r) + 0.3 * normal(rng, (r, r))) for n, r in ((4, 2), (3, 2), (5, 3))]
    return [normal(rng, (2, 2, 3)), *factors]


@pytest.mark.parametrize("name", tucker_functions())
def test_torch_gradients_equal_the_dense_ones(name):
    torch = pytest.importorskip("torch")
    ours, theirs = tucker_functions()[name]

    def gradients(function):
        leaves = [torch.tensor(a, requires_grad=True) for a in gradient_arrays()]
        return torch.autograd.grad(function(leaves), leaves)

    found = gradients(lambda a: ours(TuckerTensor(a[0], a[1:])))
    expected = gradients(lambda a: theirs(torch.einsum("abc,xa,yb,zc->xyz", *a)))
    for g, e in zip(found, expected):
        assert distance(g, e) <= tolerance("float64", 60, norm=frobenius(e), factor=100)


@pytest.mark.parametrize("name", tucker_functions())
def test_jax_gradients_flow_through_the_pytree(name):
    jax = pytest.importorskip("jax")
    ours, theirs = tucker_functions()[name]
    core, *factors = [jax.numpy.asarray(a) for a in gradient_arrays()]
    found = jax.jit(jax.grad(ours))(TuckerTensor(core, factors))
    assert isinstance(found, TuckerTensor)
    expected = jax.grad(lambda a: theirs(jax.numpy.einsum("abc,xa,yb,zc->xyz", *a)))([core, *factors])
    for g, e in zip([found.core, *found.factors], expected):
        assert distance(g, e) <= tolerance("float64", 60, norm=frobenius(e), factor=100)


def test_jax_knows_the_tree():
    jax = pytest.importorskip("jax")
    t = example(jax.numpy)
    leaves, tree = jax.tree_util.tree_flatten(t)
    assert len(leaves) == 3, "a whole mode has no leaf"
    assert same_bits(jax.tree_util.tree_unflatten(tree, leaves).to_tensor(), t.to_tensor())
    doubled = jax.tree_util.tree_map(lambda a: 2 * a, t)
    assert same_bits(doubled.core, 2 * to_numpy(t.core))


def placed(array: np.ndarray, offset: int) -> np.ndarray:
    """Copy an array to memory that begins ``offset`` bytes behind a cache line."""
    memory = np.empty(array.nbytes + 128, np.uint8)
    start = -memory.ctypes.data % 64 + offset
    copy = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


@pytest.mark.parametrize("name", ["numpy", "torch"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    ("shape", "ranks"), [((8, 64, 96), (4, 16, 12)), ((40, 24, 3, 3), (9, 8, 2, 3)), ((65, 33), (7, 5))]
)
def test_equal_numbers_give_equal_bits_wherever_they_lie(name, dtype, shape, ranks):
    """MKL's products round by the alignment and the layout of what they are given."""
    xp, rng = support.namespace(name), np.random.default_rng(0)
    arrays = [normal(rng, ranks, dtype), *(normal(rng, pair, dtype) for pair in zip(shape, ranks))]
    places = [0, 16, 40, np.dtype(dtype).itemsize]
    copies = [[xp.asarray(placed(a, (place + 8 * k) % 64)) for k, a in enumerate(arrays)] for place in places]
    copies.append([xp.asarray(np.asfortranarray(a)) for a in arrays])
    dense = [TuckerTensor(core, tuple(factors)).to_tensor() for core, *factors in copies]
    assert all(same_bits(dense[0], other) for other in dense[1:])


# The norm reads a magnitude off the tensor, which torch.compile cannot trace in one graph.
@pytest.mark.parametrize(
    ("name", "transformation"),
    [
        *itertools.product(
            ["reconstruct", "inner", "add"], ["torch.compile", "torch.func.vmap", "jax.jit", "jax.vmap"]
        ),
        *itertools.product(["norm"], ["torch.func.vmap", "jax.jit", "jax.vmap"]),
    ],
)
def test_transformations_trace_the_algebra(name, transformation):
    library_name, _, verb = transformation.partition(".")
    module = pytest.importorskip(library_name)
    ours, _ = tucker_functions()[name]
    batch = [np.stack([a, 2 * a, a - 1]) for a in gradient_arrays()]

    def body(core, *factors):
        return ours(TuckerTensor(core, factors))

    expected = np.stack([body(*item) for item in zip(*batch)])
    arrays = [module.asarray(a) if library_name == "torch" else module.numpy.asarray(a) for a in batch]
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
    assert distance(result, expected) <= tolerance("float64", 60, norm=frobenius(expected))


def test_compiled_reconstruction_takes_a_whole_mode():
    torch = pytest.importorskip("torch")
    import array_api_compat.torch as xp

    t = example(xp)

    def body(core, u, v):
        return ft.reconstruct(TuckerTensor(core, (u, None, v)))

    compiled = torch.compile(body, fullgraph=True, backend="eager")
    assert distance(compiled(t.core, t.factors[0], t.factors[2]), t.to_tensor()) <= tolerance("float64", 10, norm=10)


def test_the_product_of_norms_bounds_the_tensor():
    # `TuckerSample.bound` carries the tolerances of this file: it must be a bound, and not a loose one.
    sample = TuckerSample((5, 4, 3), (3, 2, 2), (False,) * 3)
    assert frobenius(sample.dense) <= sample.bound <= 100 * frobenius(sample.dense)
    assert math.isfinite(sample.bound)
