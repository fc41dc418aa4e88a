"""TensorLy as the oracle for conventions."""

import subprocess
import sys

import numpy as np
import pytest
import tensorly
from hypothesis import given
from hypothesis import strategies as st
from tensorly.tucker_tensor import tucker_to_tensor, tucker_to_unfolded, tucker_to_vec

import flora_tensor as ft
from support import optional

torch = optional("torch")


def tucker_tensor(seed: int, shape: tuple[int, ...], ranks: tuple[int, ...]) -> ft.TuckerTensor:
    rng = np.random.default_rng(seed)
    factors = tuple(rng.standard_normal((n, r)) for n, r in zip(shape, ranks))
    return ft.TuckerTensor(rng.standard_normal(ranks), factors)


@given(data=st.data(), seed=st.integers(0, 99))
def test_tensorly_sees_the_same_tensor(data: st.DataObject, seed: int):
    shape = tuple(data.draw(st.lists(st.integers(1, 5), min_size=2, max_size=4)))
    ranks = tuple(data.draw(st.integers(1, 4)) for _ in shape)
    ours = tucker_tensor(seed, shape, ranks)
    theirs = ft.to_tensorly(ours)
    dense = ours.to_tensor()
    close = {"rtol": 1e-12, "atol": 1e-12 * max(1.0, float(np.abs(dense).max()))}
    np.testing.assert_allclose(tucker_to_tensor(theirs), dense, **close)
    np.testing.assert_allclose(tucker_to_vec(theirs), dense.reshape(-1), **close)
    for mode in range(len(shape)):
        np.testing.assert_allclose(tucker_to_unfolded(theirs, mode), ft.unfold(dense, mode), **close)
        np.testing.assert_array_equal(tensorly.unfold(dense, mode), ft.unfold(dense, mode))
    assert (theirs.shape, theirs.rank) == (ours.shape, ours.ranks)
    back = ft.from_tensorly(theirs)
    assert back.core is ours.core
    assert all(u is v for u, v in zip(back.factors, ours.factors))


def test_tensorly_s_decomposition_comes_back():
    x = np.random.default_rng(0).standard_normal((5, 4, 3))
    theirs = tensorly.decomposition.tucker(x, rank=[5, 4, 3])
    np.testing.assert_allclose(ft.from_tensorly(theirs).to_tensor(), x, atol=1e-12)


def test_a_mode_that_is_left_whole_gets_an_identity():
    ours = ft.TuckerTensor(np.arange(6.0).reshape(2, 3), (np.ones((4, 2)), None))
    theirs = ft.to_tensorly(ours)
    np.testing.assert_array_equal(theirs.factors[1], np.eye(3))
    np.testing.assert_array_equal(tucker_to_tensor(theirs), ours.to_tensor())


def test_arrays_of_other_libraries_pass_and_the_global_backend_is_left_alone():
    ours = tucker_tensor(0, (4, 3), (2, 2)).map(torch.from_numpy)
    before = tensorly.get_backend()
    theirs = ft.to_tensorly(ours)
    assert isinstance(theirs.core, torch.Tensor)
    assert ft.from_tensorly(theirs).core is ours.core
    assert tensorly.get_backend() == before == "numpy"
    partial = ft.to_tensorly(ft.TuckerTensor(torch.ones(2, 3), (torch.ones(4, 2), None)))
    assert isinstance(partial.factors[1], torch.Tensor)


def test_what_is_no_pair_is_refused():
    with pytest.raises(TypeError, match="from_tensorly: got int; pass a pair"):
        ft.from_tensorly(3)
    with pytest.raises(ValueError, match="factor 0 has shape"):
        ft.from_tensorly((np.ones((2, 2)), [np.ones((3, 1)), np.ones((3, 2))]))


def test_what_is_no_tucker_tensor_is_refused():
    with pytest.raises(TypeError, match=r"to_tensorly: got numpy.ndarray; pass a TuckerTensor, such as"):
        ft.to_tensorly(np.ones((2, 2)))


def test_without_tensorly_the_error_names_the_extra():
    code = """
import sys
sys.modules["tensorly"] = None
import numpy as np, flora_tensor as ft
try:
    ft.to_tensorly(ft.TuckerTensor(np.ones((1, 1)), (np.ones((2, 1)), None)))
except ImportError as error:
    assert "pip install 'flora-tensor[tensorly]'" in str(error), error
else:
    sys.exit(1)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
