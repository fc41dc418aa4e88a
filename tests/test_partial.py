"""Tensors with modes left whole, stacks of equal weights, memory, and threads."""

import itertools
import json
import math
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import flora_tensor as ft
from support import as_array, distance, for_all, frobenius, ranked_samples, seeds, to_numpy, tolerance

METHODS = {"hosvd": ft.hosvd, "st_hosvd": ft.st_hosvd, "hooi": ft.hooi}


@for_all(
    seed=seeds,
    shape=st.sampled_from([(5, 4, 3), (6, 3, 2, 2), (4, 5)]),
    method=st.sampled_from([*METHODS, "tucker"]),
    whole=st.sets(st.integers(0, 3)),
)
def test_a_whole_mode_stores_no_factor_and_costs_no_accuracy(xp, seed, shape, method, whole):
    values = np.random.default_rng(seed).standard_normal(shape)
    whole = {k for k in whole if k < len(shape)}
    explicit = ft.feasible_ranks([n if k in whole else 2 for k, n in enumerate(shape)], shape)
    ranks = tuple(None if k in whole else r for k, r in enumerate(explicit))
    x = as_array(xp, values)
    run = METHODS.get(method, lambda x, r: ft.tucker(x, r).tucker)
    partial, full = run(x, ranks), run(x, explicit)
    assert [u is None for u in partial.factors] == [k in whole for k in range(len(shape))]
    assert partial.shape == shape
    assert all(partial.ranks[k] == shape[k] for k in whole)
    bound = tolerance("float64", *shape, norm=frobenius(values))
    assert distance(partial.to_tensor(), full.to_tensor()) <= bound
    for u in (u for u in partial.factors if u is not None):
        gram = to_numpy(u).T @ to_numpy(u)
        assert distance(gram, np.eye(gram.shape[0])) <= tolerance("float64", *u.shape)


@given(seed=seeds)
def test_the_reported_error_of_a_partial_tensor_is_the_true_one(seed):
    x = np.random.default_rng(seed).standard_normal((7, 6, 3, 3)).astype(np.float32)
    fit = ft.tucker(x, (3, 3, None, None))
    assert fit.relative_error == pytest.approx(distance(fit.tucker.to_tensor(), x) / frobenius(x), rel=1e-3)
    assert fit.tucker.n_parameters == 3 * 3 * 9 + 7 * 3 + 6 * 3


def test_round_tucker_takes_whole_modes():
    x = np.random.default_rng(0).standard_normal((7, 6, 3, 3))
    partial = ft.tucker(x, (5, 5, None, None)).tucker
    rounded = ft.round_tucker(partial, ranks=(2, 2, None, None))
    assert [u is None for u in rounded.factors] == [False, False, True, True]
    dense = partial.to_tensor()
    error = distance(rounded.to_tensor(), dense) / frobenius(dense)
    assert error == pytest.approx(ft.tucker(dense, (2, 2, 3, 3)).relative_error, rel=0.05)


@pytest.mark.parametrize("run", [*METHODS.values(), ft.tucker])
def test_whole_modes_do_not_excuse_wrong_lengths(run):
    with pytest.raises(ValueError, match=r"3 ranks for 4 modes of shape \(4, 3, 2, 2\); pass one a mode"):
        run(np.ones((4, 3, 2, 2)), (2, 2, None))


@given(seed=seeds, layers=st.integers(2, 6))
def test_a_stack_of_related_weights_is_smaller_together(seed, layers):
    """The joint Tucker tensor of a stack shares its factors: it is never larger than the single ones at their ranks."""
    rng = np.random.default_rng(seed)
    left, right = rng.standard_normal((20, 3)), rng.standard_normal((15, 3))
    weights = [left @ rng.standard_normal((3, 3)) @ right.T for _ in range(layers)]
    joint = ft.tucker(np.stack(weights), rtol=1e-8)
    single = [ft.tucker(w, rtol=1e-8) for w in weights]
    assert joint.relative_error <= 1e-8
    assert joint.tucker.ranks[1:] == (3, 3)
    assert joint.tucker.n_parameters < sum(f.tucker.n_parameters for f in single)


@given(sample=ranked_samples(dtypes=("float32", "float64"), scales=("unit",)))
def test_a_random_start_is_repeated_bit_for_bit(sample):
    drawn, ranks = sample
    x = drawn.to(np)
    if 0 in x.shape:
        return
    first, second = (ft.tucker(x, ranks, method="randomized", rng=7).tucker for _ in range(2))
    assert to_numpy(first.core).tobytes() == to_numpy(second.core).tobytes()


@pytest.mark.parametrize(
    ("shape", "ranks"), [((400, 400, 3, 3), (8, 8, 2, 2)), ((32, 512, 512), (4, 8, 8)), ((1500, 1500), (16, 16))]
)
def test_small_ranks_take_half_the_input_in_memory_at_most(shape, ranks):
    x = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    ft.tucker(x, ranks)  # imports and caches are not the decomposition's
    tracemalloc.start()
    ft.tucker(x, ranks)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak <= 0.5 * x.nbytes


_PEAKS = """
import ctypes, json, statistics, sys
from pathlib import Path
import numpy as np
import flora_tensor as ft
from flora_tensor.spectra import cheapest_spectrum

def size(name):
    return 1024 * int(Path("/proc/self/status").read_text().split(name + ":")[1].split()[0])

def peak(function, times=3):
    function()  # imports and caches
    found = []
    for _ in range(times):  # what the allocator had at hand before differs from one call to the next
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        before = size("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        function()
        found.append((size("VmHWM") - before) / x.nbytes)
    return statistics.median(found)

rng = np.random.default_rng(0)
u, v = (np.linalg.qr(rng.standard_normal((640, 8)))[0].astype(np.float32) for _ in range(2))
x = np.einsum("abhw,ia,jb->ijhw", rng.standard_normal((8, 8, 3, 3), dtype=np.float32), u, v)
x += rng.standard_normal(x.shape, dtype=np.float32) * np.float32(1e-2 * np.sqrt(8 * 8 / 640**2))
planted, out = ft.tucker(x, (16, 16, 2, 2)).tucker, np.empty_like(x)
peaks = [
    peak(lambda: ft.tucker(x, (16, 16, 2, 2))),
    peak(lambda: ft.tucker(x, rtol=0.1)),
    peak(lambda: ft.tucker(x, max_parameters=x.size // 100)),
    peak(lambda: ft.mode_spectra(x)),
    peak(lambda: ft.reconstruct(planted, out=out)),
]
x = rng.standard_normal((4, 16384, 64), dtype=np.float32)
tall = peak(lambda: cheapest_spectrum("test", x), 1)
x = rng.standard_normal((896, 896, 3, 3), dtype=np.float32)
x *= (np.arange(1, 897)[:, None] * np.arange(1, 897)).astype(np.float32)[:, :, None, None] ** -0.5
large = [peak(lambda: f(x, (112, 112, 2, 2)), 1) for f in (ft.hosvd, ft.st_hosvd, ft.hooi)]
large += [peak(lambda: ft.hooi(x, (224, 224, 3, 3), max_sweeps=1), 1)]
x *= (np.arange(1, 897)[:, None] * np.arange(1, 897)).astype(np.float32)[:, :, None, None] ** -0.25
large += [peak(lambda: ft.tucker(x, max_parameters=x.size // 20), 1)]
json.dump([*peaks, tall, large], sys.stdout)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system does not tell a process's peak")
def test_what_the_process_really_takes():
    """tracemalloc sees NumPy's arrays, but not what LAPACK works in. In multiples of the input."""
    # One thread: each has buffers of its own in BLAS, whatever the size of the input.
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    run = subprocess.run(
        [sys.executable, "-c", _PEAKS],
        env=os.environ | dict.fromkeys(names, "1"),
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    ranks, tolerance, budget, spectra, dense, tall, large = json.loads(run.stdout)
    assert ranks <= 0.5
    assert tolerance <= 0.5
    assert budget <= 0.8  # 0.47 to 0.61 measured: a page of 2 MiB is 0.14 of this input
    # One float64 matrix of 640², 2/9 of the input, and blocks that are added to it.
    assert spectra <= 0.7
    assert dense <= 0.05
    # The unfolding and the factor, and little else: the SVD in float64 of a full HOSVD takes eleven (measured).
    assert tall <= 3.0
    # An eighth of the ranks, by HOSVD, ST-HOSVD and HOOI: one float64 matrix of 896² and its leading eigenvectors, and
    # the tensor truncated in one mode.
    assert max(large[:3]) <= 0.55
    # Of a quarter of the ranks and whole kernels the latter would take as much as the matrix, and is not held; nor is
    # HOOI's start beside its own (0.75 to 0.91 where they are).
    assert large[3] <= 0.72
    # A range finder, which is given up here, and then the full HOSVD: neither the vectors that no choice of ranks can
    # use, nor its core, nor the table of all its truncations is held, which take five times the input.
    assert large[4] <= 1.1


_PROGRAM = """
import json, sys
import numpy as np
import flora_tensor as ft
x = np.random.default_rng(0).standard_normal((96, 80, 3, 3)) / np.arange(1, 97)[:, None, None, None]
x = x.astype(np.float32)
tensors = [ft.tucker(x, ranks).tucker.to_tensor() for ranks in ((6, 6, 2, 2), (40, 30, 3, 3))]
json.dump([t[::7, ::5].ravel().tolist() for t in tensors], sys.stdout)
"""


def test_the_number_of_threads_changes_rounding_only():
    results = []
    for threads in ("1", "2"):
        names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
        environment = os.environ | dict.fromkeys(names, threads)
        run = subprocess.run(
            [sys.executable, "-c", _PROGRAM], env=environment, capture_output=True, text=True, check=True, timeout=120
        )
        results.append([np.array(values) for values in json.loads(run.stdout)])
    for one, two in zip(*results):
        assert np.linalg.norm(one - two) <= 1e3 * np.finfo(np.float32).eps * np.linalg.norm(one)


@given(seed=seeds, shape=st.sampled_from([(6, 5, 3), (5, 4, 2, 2), (7, 4), (4, 4), (5,)]))
def test_a_partial_frontier_counts_what_is_stored_and_ends_dense(seed, shape):
    x = np.random.default_rng(seed).standard_normal(shape) * (np.arange(1, shape[-1] + 1) ** -1.0)
    spectrum = ft.hosvd_spectrum(x)
    partial, plain = spectrum.frontier(partial=True), spectrum.frontier()
    assert partial.n_parameters[0] == 0
    assert (np.diff(partial.n_parameters) > 0).all()
    assert (np.diff(partial.error_squared) < 0).all()
    assert partial.n_parameters[-1] <= x.size
    assert partial.error_squared[-1] <= plain.error_squared[-1]
    for count, squares, ranks in zip(partial.n_parameters[1:], partial.error_squared[1:], partial.ranks[1:].tolist()):
        wished = tuple(None if r == n else r for r, n in zip(ranks, shape))
        fit = ft.tucker(x, wished, method="hosvd")
        assert fit.tucker.n_parameters == count
        assert (fit.relative_error * frobenius(x)) ** 2 <= squares + tolerance(
            "float64", x.size, norm=frobenius(x) ** 2
        )
    # At every budget the partial count does at least as well.
    at = np.searchsorted(partial.n_parameters, plain.n_parameters, side="right") - 1
    assert (partial.error_squared[at] <= plain.error_squared).all()


def test_a_partial_frontier_keeps_to_bounds_on_the_ranks():
    spectrum = ft.hosvd_spectrum(np.random.default_rng(0).standard_normal((6, 5, 3)))
    bounded = spectrum.frontier(max_ranks=(2, 5, 3), partial=True)
    assert bounded.ranks.max(axis=0).tolist() == [2, 5, 3]
    with pytest.raises(ValueError, match="2 bounds for 3 modes; pass one a mode"):
        spectrum.frontier(max_ranks=(2, 2))


def test_extraction_never_stores_more_than_the_dense_change(tmp_path):
    from safetensors.numpy import load_file, save_file

    rng = np.random.default_rng(0)
    shapes = {"a.weight": (9, 4, 3, 3), "b.weight": (20, 6), "c.weight": (3, 40)}
    base = {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    tuned = {n: w + rng.standard_normal(w.shape).astype(np.float32) for n, w in base.items()}
    for name, tensors in (("base", base), ("tuned", tuned)):
        save_file(tensors, tmp_path / f"{name}.safetensors")
    paths = (tmp_path / "base.safetensors", tmp_path / "tuned.safetensors")
    report = ft.extract(*paths, tmp_path / "adapter", rtol=0.0)
    assert report.n_parameters == report.dense_parameters == sum(w.size for w in base.values())
    assert report.relative_error == 0.0
    ft.merge_checkpoint(paths[0], tmp_path / "adapter", tmp_path / "merged.safetensors")
    merged = load_file(tmp_path / "merged.safetensors")
    for name, weight in tuned.items():
        assert distance(merged[name], weight) <= tolerance("float32", norm=frobenius(weight), factor=1.0)


@given(seed=seeds, shape=st.sampled_from([(6, 4), (4, 7), (5, 4, 3), (9, 2, 2), (4, 3, 2, 2)]))
def test_a_frontier_with_one_mode_whole_is_the_best_of_all_such_tuples(seed, shape):
    """Against brute force: any ranks with at most one mode whole beyond what the others carry, or the dense tensor."""
    x = np.random.default_rng(seed).standard_normal(shape)
    spectrum = ft.hosvd_spectrum(x)
    frontier = spectrum.frontier(partial=True, one_whole=True)
    bases = [np.linalg.svd(ft.unfold(x, k), full_matrices=False)[0] for k in range(len(shape))]
    points = [(x.size, 0.0), (0, float(np.linalg.norm(x) ** 2))]
    for ranks in itertools.product(*(range(1, n + 1) for n in shape)):
        if sum(r > math.prod(ranks[:k] + ranks[k + 1 :]) for k, r in enumerate(ranks)) > sum(
            r > math.prod(ranks[:k] + ranks[k + 1 :]) and r == n for k, (r, n) in enumerate(zip(ranks, shape))
        ):
            continue  # a factor that no decomposition fills
        projected = x
        for mode, (rank, u) in enumerate(zip(ranks, bases)):
            if rank < shape[mode]:
                projected = ft.mode_dot(projected, u[:, :rank] @ u[:, :rank].T, mode)
        cost = math.prod(ranks) + sum(n * r for n, r in zip(shape, ranks) if r < n)
        points.append((cost, float(np.linalg.norm(x - projected) ** 2)))
    for cost, error in zip(frontier.n_parameters, frontier.error_squared):
        best = min(e for c, e in points if c <= cost)
        assert error == pytest.approx(best, rel=1e-9, abs=1e-20 * x.size)


@given(seed=seeds, rank=st.integers(1, 5))
def test_a_matrix_takes_no_more_numbers_than_its_truncated_svd(seed, rank):
    x = np.random.default_rng(seed).standard_normal((9, 14))
    frontier = ft.hosvd_spectrum(x).frontier(partial=True, one_whole=True)
    at = int(np.searchsorted(frontier.n_parameters, rank * (9 + 14)))
    assert frontier.n_parameters[at] == rank * (9 + 14)
    tail = float(np.sum(np.linalg.svd(x, compute_uv=False)[rank:] ** 2))
    assert frontier.error_squared[at] == pytest.approx(tail, rel=1e-9)
    capped = ft.hosvd_spectrum(x).frontier(max_ranks=(rank, rank), partial=True, one_whole=True)
    assert capped.ranks[-1].tolist() == [rank, 14]
