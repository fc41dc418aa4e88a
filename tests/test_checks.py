"""The wording of refusals, and the rules behind them checked by brute force."""

import itertools
import math
import re
import warnings

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, reject
from hypothesis import strategies as st

import flora_tensor as ft
from flora_tensor import feasible_ranks
from flora_tensor._checks import (
    as_int,
    check_finite,
    check_fraction,
    check_mode,
    check_ranks,
    check_tensor,
    check_tolerance,
    exactly_one,
)
from support import EVERY_DTYPE, FLOATING, LOW_PRECISION, as_array, for_all, optional, samples, supports


@given(st.integers())
def test_as_int_takes_integers_of_every_library(value):
    assert as_int("f", "n", value) == value
    small = value % 100
    assert as_int("f", "n", np.int32(small)) == small
    assert type(as_int("f", "n", np.uint8(small))) is int


@pytest.mark.parametrize("value", [1.0, "3", None, True, False, 1j, [1], np.float64(2)])
def test_as_int_refuses_what_is_no_integer(value):
    with pytest.raises(TypeError, match=re.escape(f"f: n is {value!r}; pass an integer")):
        as_int("f", "n", value)


@given(ndim=st.integers(1, 8), mode=st.integers(-12, 12))
def test_check_mode_counts_as_python_does(ndim, mode):
    if -ndim <= mode < ndim:
        assert check_mode("f", mode, ndim) == list(range(ndim))[mode]
    else:
        message = re.escape(f"f: mode {mode} of a tensor with {ndim} modes; its modes are {-ndim} to {ndim - 1}")
        with pytest.raises(ValueError, match=message):
            check_mode("f", mode, ndim)


def test_check_mode_of_a_scalar():
    with pytest.raises(ValueError, match="f: mode 0 of a tensor with 0 modes; its modes are none, as it has no axes"):
        check_mode("f", 0, 0)


@for_all(sample=samples(dtypes=EVERY_DTYPE))
def test_finite_tensors_pass(xp, sample):
    assert check_tensor("f", sample.to(xp)) is None


@for_all(
    sample=samples(dtypes=FLOATING + LOW_PRECISION, min_dim=1),
    bad=st.sampled_from((math.nan, math.inf, -math.inf)),
    places=st.lists(st.integers(0, 10**6), min_size=1, max_size=3),
)
def test_nan_and_infinity_are_refused_with_their_place(xp, sample, bad, places):
    if not supports(xp, sample.dtype):
        reject()
    values = np.array(sample.values)
    hit = sorted({place % values.size for place in places})
    for flat in hit:
        values.flat[flat] = bad
    first = tuple(int(i) for i in np.unravel_index(hit[0], values.shape))
    message = re.escape(f"f: weight has {len(hit)} entries that are NaN or infinite, the first at {first}; a decompo")
    with pytest.raises(ValueError, match=message):
        check_finite("f", as_array(xp, values, sample.dtype), "weight")


def test_a_complex_magnitude_that_overflows_is_finite():
    largest = np.finfo(np.float64).max
    with np.errstate(over="ignore"):
        assert check_finite("f", np.array([complex(largest, largest)])) is None


def test_an_infinite_imaginary_part_is_refused(xp):
    with pytest.raises(ValueError, match=r"f: x has 1 entries that are NaN or infinite, the first at \(1,\)"):
        check_finite("f", as_array(xp, np.array([1.0, complex(0, math.inf)])))


def test_check_tensor_refuses_a_scalar(xp):
    with pytest.raises(ValueError, match="f: x is a scalar; a decomposition needs at least one axis"):
        check_tensor("f", xp.asarray(1.0))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.ones((2, 2), object), "array of type object; pass numbers of up to 64 bits, as x.astype"),
        (np.array([["a", "b"]]), "array of type <U1; pass numbers of up to 64 bits"),
        (np.zeros((2, 2), "M8[s]"), "array of type datetime64"),
        (np.ma.masked_array(np.ones((2, 2)), np.eye(2)), "a masked array; pass one without gaps, as x.filled"),
        (np.eye(2).view(np.matrix), r"a numpy.matrix; pass numpy.asarray\(x\)"),
        ([[1.0, 2.0]], "builtins.list; pass arrays of one library"),
    ],
)
def test_arrays_without_dense_numbers_are_refused(x, message):
    for function in (ft.tucker, ft.hosvd, ft.hosvd_spectrum, ft.error_table):
        with pytest.raises(TypeError, match=f"{function.__name__}: got (an )?{message}"):
            function(x)


@pytest.mark.parametrize("name", ["longdouble", "clongdouble"])
def test_numbers_longer_than_lapack_takes_are_refused(name):
    if np.dtype("longdouble") == np.dtype("float64") or np.finfo("longdouble").dtype.itemsize == 8:
        pytest.skip("a long double is a double here")
    with pytest.raises(TypeError, match=r"tucker: got an array of type .*; pass numbers of up to 64 bits"):
        ft.tucker(np.ones((2, 2), name), 1)


def test_torch_tensors_without_dense_numbers_are_refused():
    torch = pytest.importorskip("torch")
    with pytest.raises(TypeError, match=r"hosvd: got a tensor of layout torch.sparse_coo; pass a dense one, as x.to_d"):
        ft.hosvd(torch.eye(3).to_sparse())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer versions of PyTorch want others to make these
        quantized = torch.quantize_per_tensor(torch.eye(3), 0.1, 0, torch.qint8)
    with pytest.raises(TypeError, match=r"hosvd: got a quantized tensor; pass its numbers, as x.dequantize\(\)"):
        ft.hosvd(quantized)


def test_tensors_on_the_meta_device_are_refused():
    torch = pytest.importorskip("torch")
    x = torch.ones(3, 4, device="meta")
    a = ft.TuckerTensor(x, [None, None])
    assert ft.add(a, a).to_tensor().shape == (3, 4)
    for function, empty in ((ft.tucker, x), (ft.st_hosvd, x), (ft.hooi, x), (ft.round_tucker, a)):
        with pytest.raises(ValueError, match=f"{function.__name__}: . is on PyTorch's meta device and holds"):
            function(empty, ranks=1)


@pytest.mark.parametrize("library", ["numpy", "torch", "jax"])
@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2", "int4"])
def test_types_of_eight_bits_and_fewer_are_refused_by_all_that_computes(library, name):
    wide = np.random.default_rng(0).standard_normal((3, 4, 2)).astype(np.float32)
    if library == "torch":
        torch = pytest.importorskip("torch")
        if name == "int4":
            pytest.skip("PyTorch computes nothing of this type, not even a conversion")
        x = torch.from_numpy(wide).to(getattr(torch, name))
    else:
        x = wide.astype(getattr(ml_dtypes, name))
        x = x if library == "numpy" else pytest.importorskip("jax").numpy.asarray(x)
    for function in (ft.tucker, ft.hosvd, ft.hosvd_spectrum, ft.mode_spectra):
        with pytest.raises(TypeError, match=rf"{function.__name__}: got an array of type {name}, which .* in float32"):
            function(x)
    with pytest.raises(TypeError, match=f"TuckerTensor: got an array of type {name}"):
        ft.TuckerTensor(x, [None, None, None])


def test_a_traced_tensor_is_let_through():
    jax = pytest.importorskip("jax")
    assert jax.jit(lambda x: [check_finite("f", x), x][1])(jax.numpy.ones(2)).shape == (2,)


# --- ranks -------------------------------------------------------------------------------------------


def is_feasible(ranks: tuple[int, ...]) -> bool:
    return all(r <= math.prod(ranks[:k] + ranks[k + 1 :]) for k, r in enumerate(ranks))


small_shapes = st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple)


@given(shape=small_shapes, data=st.data())
def test_feasible_ranks_are_the_largest_that_are_feasible(shape, data):
    wished = tuple(data.draw(st.integers(1, 7)) for _ in shape)
    found = feasible_ranks(wished, shape)
    limits = [min(r, n) for r, n in zip(wished, shape)]
    feasible = [r for r in itertools.product(*(range(1, n + 1) for n in limits)) if is_feasible(r)]
    # The feasible ranks below a bound have one greatest element, mode by mode: that is what is promised.
    assert found in feasible
    assert all(all(a <= b for a, b in zip(ranks, found)) for ranks in feasible)


@given(shape=small_shapes, data=st.data())
def test_check_ranks_accepts_just_what_is_feasible(shape, data):
    ranks = tuple(data.draw(st.integers(-1, 6)) for _ in shape)
    good = all(1 <= r <= n for r, n in zip(ranks, shape)) and is_feasible(ranks)
    if good:
        assert check_ranks("f", ranks, shape) == ranks
    else:
        with pytest.raises(ValueError, match=r"^f: rank -?[0-9]+ for mode [0-9].*pass at (most|least)"):
            check_ranks("f", ranks, shape)


@given(shape=small_shapes, rank=st.integers(1, 8))
def test_one_rank_stands_for_all_modes(shape, rank):
    assert check_ranks("f", rank, shape) == feasible_ranks([rank] * len(shape), shape)


def test_ranks_of_every_integer_type_are_taken():
    assert check_ranks("f", np.array([2, 2]), (3, 3)) == (2, 2)
    assert check_ranks("f", [np.int64(2), 2], (3, 3)) == (2, 2)
    assert check_ranks("f", iter((2, 2)), (3, 3)) == (2, 2)


def test_an_empty_mode_has_rank_zero():
    assert feasible_ranks((2, 2), (0, 3)) == (0, 0)
    assert check_ranks("f", 2, (0, 3)) == (0, 0)


@pytest.mark.parametrize(
    ("ranks", "shape", "message"),
    [
        (0, (4, 4), "f: rank 0; pass at least 1"),
        (-3, (4, 4), "f: rank -3; pass at least 1"),
        ((40, 4), (32, 32), "f: rank 40 for mode 0 exceeds its size 32; pass at most 32"),
        ((4, 0), (32, 32), "f: rank 0 for mode 1; pass at least 1 and at most 32"),
        ((-1, 4), (32, 32), "f: rank -1 for mode 0; pass at least 1 and at most 32"),
        ((-1, 4), (0, 32), "f: rank -1 for mode 0 of size 0; pass 0"),
        ((4, 4, 4), (32, 32), "f: 3 ranks for 2 modes of shape (32, 32); pass one a mode"),
        ((), (32, 32), "f: 0 ranks for 2 modes of shape (32, 32); pass one a mode"),
        (
            (9, 2, 2),
            (16, 8, 8),
            "f: rank 9 for mode 0 exceeds 4, the product of the other ranks of (9, 2, 2): no tensor has it; "
            "pass at most 4, as in (4, 2, 2)",
        ),
    ],
)
def test_wrong_ranks_are_refused(ranks, shape, message):
    with pytest.raises(ValueError, match="^" + re.escape(message) + "$"):
        check_ranks("f", ranks, shape)


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ("44", "f: ranks is '44'; pass an integer, or one integer a mode"),
        (b"44", "f: ranks is b'44'; pass an integer, or one integer a mode"),
        (4.0, "f: ranks is 4.0; pass an integer"),
        (True, "f: ranks is True; pass an integer"),
        (None, "f: ranks is None; pass an integer"),
        ((4, 2.5), "f: ranks[1] is 2.5; pass an integer"),
        ((4, "2"), "f: ranks[1] is '2'; pass an integer"),
    ],
)
def test_ranks_of_the_wrong_type_are_refused(ranks, message):
    with pytest.raises(TypeError, match=re.escape(message)):
        check_ranks("f", ranks, (8, 8))


def test_feasible_ranks_refuses_another_number_of_modes():
    with pytest.raises(ValueError, match=r"feasible_ranks: 2 ranks for 3 modes of shape \(4, 4, 4\); pass one a mode"):
        feasible_ranks((2, 2), (4, 4, 4))


# --- numbers and options -----------------------------------------------------------------------------


@given(st.floats(0, 1, exclude_min=True))
def test_fractions_are_taken(value):
    assert check_fraction("f", "energy", value) == value
    assert check_tolerance("f", value) == value


def test_zero_is_a_fraction_where_it_makes_sense():
    assert check_fraction("f", "rtol", 0, zero=True) == 0.0
    assert check_tolerance("f", 0) == 0.0
    with pytest.raises(ValueError, match=r"f: energy is 0\.0; pass a number above 0 to 1"):
        check_fraction("f", "energy", 0)


@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan, math.inf])
def test_numbers_that_are_no_fraction_are_refused(value):
    with pytest.raises(ValueError, match=rf"f: energy is {value}; pass a number above 0 to 1"):
        check_fraction("f", "energy", value)
    with pytest.raises(ValueError, match=rf"f: rtol is {value}; pass a number from 0 to 1"):
        check_tolerance("f", value)


@pytest.mark.parametrize("value", ["5%", None, [0.5, 0.5], 1j])
def test_what_is_no_number_is_refused(value):
    with pytest.raises(TypeError, match=re.escape(f"f: energy is {value!r}; pass a number")):
        check_fraction("f", "energy", value)


def test_exactly_one_option():
    assert exactly_one("f", rtol=None, energy=0.0) == "energy"
    with pytest.raises(TypeError, match="f: got none of them; pass exactly one of rtol, energy"):
        exactly_one("f", rtol=None, energy=None)
    with pytest.raises(TypeError, match="f: got rtol and energy; pass exactly one of rtol, energy"):
        exactly_one("f", rtol=0.1, energy=0.9)


TUCKER = ft.TuckerTensor(np.ones((2, 2)), [np.ones((3, 2)), None])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ft.fold(np.ones((2, 3)), 0, 6), "fold: shape is 6; pass a sequence"),
        (lambda: ft.multi_mode_dot(np.ones((2, 3)), [None], modes=0), "multi_mode_dot: modes is 0; pass a sequence"),
        (lambda: ft.select_ranks(np.eye(3), rtol=0.1, max_ranks=3), "select_ranks: max_ranks is 3; pass a sequence"),
        (lambda: ft.select_ranks(np.eye(3), rtol=0.1, noise_floor="a"), "noise_floor is 'a'; pass a number"),
        (lambda: ft.feasible_ranks(3, (2, 3)), "feasible_ranks: ranks is 3; pass a sequence"),
        (lambda: ft.stack(TUCKER.core.size), "stack: tensors is 4; pass a sequence, of Tucker tensors"),
        (lambda: ft.permute_modes(TUCKER, 3), "permute_modes: axes is 3; pass a sequence"),
        (lambda: ft.st_hosvd(np.eye(3), 1, mode_order=0), "st_hosvd: mode_order is 0; pass a sequence"),
        (lambda: ft.hooi(np.eye(3), 1, tolerance="a"), "hooi: tolerance is 'a'; pass a number"),
        (lambda: ft.hosvd_spectrum(np.eye(3)).frontier(max_ranks=3), "Spectrum.frontier: max_ranks is 3; pass a seq"),
        (lambda: ft.hosvd_spectrum(np.eye(3)).upper_bound(1), "Spectrum.upper_bound: ranks is 1; pass a sequence"),
        (
            lambda: ft.TuckerTensor(np.ones((2, 2)), [1, 2]),
            "TuckerTensor: got builtins.int, numpy.ndarray; pass arrays",
        ),
        (lambda: ft.reconstruct(TUCKER, out=3), "reconstruct: got builtins.int, numpy.ndarray; .* numpy.asarray"),
        (
            lambda: ft.scale(TUCKER, optional("torch").tensor(2.0)),
            "scale: c is torch.Tensor; pass a number, or an array of the core",
        ),
    ],
)
def test_what_is_of_another_kind_is_named(call, message):
    with pytest.raises(TypeError, match=message):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ft.hosvd_spectrum(np.eye(3)).lower_bound((1,)), "Spectrum.lower_bound: 1 ranks for 2 modes; pass one"),
        (
            lambda: ft.hosvd_spectrum(np.eye(3)).upper_bound((1, -1)),
            r"upper_bound: ranks is \(1, -1\); pass none below 0",
        ),
        (lambda: ft.hooi(np.eye(3), 1, tolerance=float("nan")), "hooi: tolerance is nan; pass 0 or more"),
    ],
)
def test_numbers_out_of_range_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
