"""Adapters rounded, added, subtracted and scaled: against the same on dense tensors, in float64."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import flora_tensor as ft
from checkpoints import run, save
from flora_tensor._combining import Term, combine
from support import optional, tolerance

torch = optional("torch")

SHAPES = [(6, 8), (6, 4, 3, 2), (4, 6, 3)]
HEADS = ft.Arrangement("(heads d) i -> heads d i", {"heads": 2})


def patterns(shape: tuple[int, ...]) -> list[ft.Arrangement]:
    own = list(ft.Arrangement.candidates(len(shape)))
    if len(shape) == 2:
        return [*own, HEADS, ft.Arrangement("o i -> i o")]
    return [*own, ft.Arrangement("(x y) i w -> y (x i) w", {"x": 2})] if len(shape) == 3 else own


def random_adapter(
    rng: np.random.Generator, *, high: int = 4, dtype: Any = np.float64, spread: float = 1.0
) -> ft.Adapter:
    """Draw an adapter on weights of `SHAPES`, arranged at random, some modes whole."""
    tensors, arrangements, scales, shapes = {}, {}, {}, {}
    for k, shape in enumerate(SHAPES):
        choice = patterns(shape)
        arrangement = choice[int(rng.integers(len(choice)))]
        arranged = arrangement.shape(shape)
        ranks = [int(rng.integers(1, high)) for _ in arranged]
        factors = [rng.standard_normal((n, r)) for n, r in zip(arranged, ranks)]
        if rng.random() < 0.3:
            factors[0], ranks[0] = None, arranged[0]
        core = rng.standard_normal(ranks) * spread ** rng.random(ranks)
        name = f"layer{k}.weight"
        tensors[name] = ft.TuckerTensor(core.astype(dtype), [u if u is None else u.astype(dtype) for u in factors])
        arrangements[name], shapes[name] = arrangement, shape
        scales[name] = float(rng.uniform(-3, 3))
    return ft.Adapter(tensors, arrangements, scales, shapes)


def dense(adapter: ft.Adapter) -> dict[str, np.ndarray]:
    """What the adapter stands for, by einsum alone."""
    letters = "abcdefgh"
    found = {}
    for name, tensor in adapter.items():
        operands: list[Any] = [np.asarray(tensor.core, np.float64)]
        terms, out = [letters[: tensor.ndim]], ""
        for mode, u in enumerate(tensor.factors):
            out += letters[mode] if u is None else letters[mode].upper()
            if u is not None:
                operands.append(np.asarray(u, np.float64))
                terms.append(letters[mode].upper() + letters[mode])
        full = np.einsum(f"{','.join(terms)}->{out}", *operands) * adapter.scales[name]
        found[name] = adapter.arrangements[name].restore(full, adapter.shapes[name])
    return found


def total_norm(tensors: dict[str, np.ndarray]) -> float:
    return math.sqrt(sum(float(np.sum(x * x)) for x in tensors.values()))


def gap(adapter: ft.Adapter, expected: dict[str, np.ndarray]) -> float:
    """‖adapter − expected‖; what the adapter does not have is zero there."""
    there = dense(adapter)
    return total_norm({n: there.get(n, 0.0) - x for n, x in expected.items()})


seeds = st.integers(0, 10_000)


@given(seed=seeds, count=st.integers(1, 4))
def test_a_weighted_sum_is_the_sum_of_the_dense_changes(seed: int, count: int):
    rng = np.random.default_rng(seed)
    adapters = [random_adapter(rng) for _ in range(count)]
    weights = [float(w) for w in rng.uniform(-2, 2, count)]
    fit = ft.add_adapters(adapters, weights=weights)
    each = [dense(a) for a in adapters]
    expected = {n: sum(w * d[n] for w, d in zip(weights, each)) for n in each[0]}
    size = sum(abs(w) * total_norm(d) for w, d in zip(weights, each))
    assert gap(fit.adapter, expected) <= tolerance("float64", 24, 24, norm=size)
    assert fit.relative_error * total_norm(expected) <= tolerance("float64", 24, 24, norm=size)
    for name, tensor in fit.adapter.items():
        assert tensor.n_parameters <= math.prod(fit.adapter.shapes[name])
        assert tensor.n_parameters == fit[name].n_parameters


@given(seed=seeds)
def test_a_difference_is_the_difference_of_the_dense_changes(seed: int):
    rng = np.random.default_rng(seed)
    a, b = random_adapter(rng), random_adapter(rng)
    left, right = dense(a), dense(b)
    fit = ft.subtract_adapters(a, b)
    bound = tolerance("float64", 24, 24, norm=total_norm(left) + total_norm(right))
    assert gap(fit.adapter, {n: left[n] - right[n] for n in left}) <= bound
    # What both share cancels exactly, and nothing is left to store.
    with pytest.raises(ValueError, match="the result is zero"):
        ft.subtract_adapters(a, a)


def test_equal_sizes_keep_the_bits_of_cores_and_factors():
    rng = np.random.default_rng(0)
    u = [rng.standard_normal((20, 2)).astype(np.float32) for _ in range(4)]
    a, b = (ft.TuckerTensor(np.float32(rng.standard_normal((2, 2))), u[k : k + 2]) for k in (0, 2))
    fit = ft.subtract_adapters(ft.Adapter({"w": a}, scales={"w": 0.3}), ft.Adapter({"w": b}, scales={"w": 0.3}))
    total = fit.adapter["w"]
    assert fit.adapter.scales["w"] == 0.3
    assert np.array_equal(total.core[:2, :2], a.core)
    assert np.array_equal(total.core[2:, 2:], -b.core)
    assert np.array_equal(total.factors[0], np.hstack([u[0], u[2]]))
    assert total.core.dtype == np.float32
    assert fit.relative_error == 0.0


@settings(max_examples=40)
@given(seed=seeds, budget=st.integers(30, 200))
def test_a_budget_is_kept_and_the_reported_error_is_the_true_one(seed: int, budget: int):
    rng = np.random.default_rng(seed)
    adapter = random_adapter(rng, spread=1e-3)
    expected = dense(adapter)
    fit = ft.round_adapter(adapter, max_parameters=budget)
    assert fit.n_parameters == sum(t.n_parameters for t in fit.adapter.values()) <= budget
    true = gap(fit.adapter, expected) / total_norm(expected)
    assert abs(fit.relative_error - true) <= tolerance("float64", 24, 24)
    assert fit.lower_bound is not None
    for row in fit.rows:
        size = float(np.linalg.norm(expected[row.name]))
        error = np.linalg.norm(dense(fit.adapter).get(row.name, 0.0) - expected[row.name])
        assert abs(row.relative_error * size - error) <= tolerance("float64", 24, 24, norm=size)


@settings(max_examples=30)
@given(seed=seeds)
def test_the_spectra_are_those_of_the_dense_changes(seed: int):
    """The allocation over dense tensors is the oracle: the same numbers spent, and an error at most the same."""
    adapter = random_adapter(np.random.default_rng(seed), spread=1e-3)
    expected = dense(adapter)
    arranged = {n: adapter.arrangements[n].arrange(x) for n, x in expected.items()}
    frontiers = {n: ft.hosvd_spectrum(x).frontier(partial=True) for n, x in arranged.items()}
    budget = 60 + sum(int(f.n_parameters[1]) for f in frontiers.values())
    best = ft.allocate_ranks(frontiers, max_parameters=budget)
    fit = ft.round_adapter(adapter, max_parameters=budget)
    assert fit.relative_error <= best.relative_error * (1 + 1e-6) + 1e-12
    # Tensors that may stay as they are can only lower the bound.
    assert fit.lower_bound is not None
    assert fit.lower_bound <= best.lower_bound * (1 + 1e-6) + 1e-12


@settings(max_examples=40)
@given(seed=seeds, rtol=st.sampled_from([0.0, 1e-9, 1e-3, 0.1, 0.5]))
def test_a_tolerance_is_kept(seed: int, rtol: float):
    rng = np.random.default_rng(seed)
    adapter = random_adapter(rng, high=9, spread=1e-4)
    expected = dense(adapter)
    fit = ft.round_adapter(adapter, rtol=rtol)
    assert gap(fit.adapter, expected) <= rtol * total_norm(expected) + tolerance(
        "float64", 24, 24, norm=total_norm(expected)
    )
    for name, tensor in fit.adapter.items():
        assert tensor.n_parameters <= min(adapter[name].n_parameters, math.prod(adapter.shapes[name]))


WIDTHS = {"F64": 8, "F32": 4, "BF16": 2}


def n_bytes(adapter: ft.Adapter) -> int:
    """The bytes of all cores and factors, by the types that they are stored in."""
    return sum(WIDTHS[adapter.dtypes[name]] * tensor.n_parameters for name, tensor in adapter.items())


@settings(max_examples=30)
@given(seed=seeds, codes=st.tuples(*[st.sampled_from(sorted(WIDTHS))] * len(SHAPES)))
def test_a_budget_in_bytes_counts_the_types_that_numbers_are_stored_in(seed: int, codes: tuple[str, ...]):
    """Brute force over all choices on the frontiers of the dense changes is the oracle."""
    plain = random_adapter(np.random.default_rng(seed), spread=1e-3)
    adapter = ft.Adapter(plain.tensors, plain.arrangements, plain.scales, plain.shapes, dtypes=dict(zip(plain, codes)))
    expected = dense(adapter)
    arranged = [adapter.arrangements[name].arrange(x) for name, x in expected.items()]
    frontiers = [ft.hosvd_spectrum(x).frontier(partial=True) for x in arranged]
    costs = [WIDTHS[code] * f.n_parameters for code, f in zip(codes, frontiers)]
    budget = 150 + min(int(c[1]) for c in costs)
    fit = ft.round_adapter(adapter, max_bytes=budget)
    assert n_bytes(fit.adapter) <= budget
    allowed = sum(np.ix_(*costs)) <= budget
    best = math.sqrt(np.min(sum(np.ix_(*(f.error_squared for f in frontiers)))[allowed])) / total_norm(expected)
    if "BF16" not in codes:  # what its rounding takes away has no bound worth having: factors may nearly cancel
        assert fit.relative_error <= best * (1 + 2e-4) + tolerance("float32", 24, 24)
    assert fit.lower_bound is not None
    assert fit.lower_bound <= best * (1 + 1e-6) + tolerance("float64", 24, 24)


def test_a_budget_in_bytes_is_one_in_numbers_where_all_types_are_one():
    rng = np.random.default_rng(0)
    a, b = random_adapter(rng, dtype=np.float32), random_adapter(rng, dtype=np.float32)
    for by_bytes, by_numbers in (
        (ft.round_adapter(a, max_bytes=403), ft.round_adapter(a, max_parameters=100)),
        (ft.add_adapters([a, b], max_bytes=403), ft.add_adapters([a, b], max_parameters=100)),
    ):
        assert by_bytes.to_json() == by_numbers.to_json()
        assert gap(by_bytes.adapter, dense(by_numbers.adapter)) == 0.0


def test_redundant_ranks_are_found():
    rng = np.random.default_rng(3)
    u, v = rng.standard_normal((40, 3)), rng.standard_normal((30, 3))
    once = ft.TuckerTensor(np.eye(3), [u, v])
    doubled = ft.add_adapters([{"w": once}, {"w": ft.TuckerTensor(2 * np.eye(3), [u @ np.diag([1, 2, 3]), v])}])
    assert doubled.adapter["w"].ranks == (6, 3)  # the shared factor is kept once
    assert ft.round_adapter(doubled.adapter, rtol=1e-12).adapter["w"].ranks == (3, 3)


def test_what_two_arrangements_share_keeps_its_factor():
    rng = np.random.default_rng(1)
    shape = (64, 12, 3, 3)
    flat, native = ft.Arrangement("o (i h w)"), ft.Arrangement.native(4)
    a = ft.TuckerTensor(rng.standard_normal((2, 2)), [rng.standard_normal((64, 2)), rng.standard_normal((108, 2))])
    b = ft.TuckerTensor(
        rng.standard_normal((3, 3, 2, 2)), [rng.standard_normal((n, r)) for n, r in zip(shape, (3, 3, 2, 2))]
    )
    fit = ft.add_adapters([ft.Adapter({"w": a}, {"w": flat}, shapes={"w": shape}), {"w": b}])
    assert fit.adapter.arrangements["w"] == native
    assert [None if u is None else u.shape for u in fit.adapter["w"].factors] == [(64, 5), None, None, None]
    assert fit["w"].notes == ("'o (i h w)' and 'o i h w' meet in 'o i h w'",)
    nothing = ft.add_adapters(
        [
            ft.Adapter({"w": a}, {"w": flat}, shapes={"w": shape}),
            ft.Adapter({"w": random_matrix(rng, (192, 36))}, {"w": ft.Arrangement("(o h) (i w)")}, shapes={"w": shape}),
        ]
    )
    assert "no mode in common: stored dense" in nothing["w"].notes[0]
    assert nothing.adapter.arrangements["w"].is_native


def random_matrix(rng: np.random.Generator, shape: tuple[int, int]) -> ft.TuckerTensor:
    return ft.TuckerTensor(rng.standard_normal((2, 2)), [rng.standard_normal((n, 2)) for n in shape])


def test_a_split_axis_meets_a_whole_one():
    rng = np.random.default_rng(5)
    heads = ft.TuckerTensor(rng.standard_normal((2, 2, 2)), [rng.standard_normal((n, 2)) for n in (2, 3, 80)])
    plain = random_matrix(rng, (6, 80))
    total = combine([Term(1.0, heads, HEADS), Term(1.0, plain, ft.Arrangement.native(2))], (6, 80))
    expected = heads.to_tensor().reshape(6, 80) + plain.to_tensor()
    result = total.arrangement.restore(total.tensor.to_tensor(), (6, 80))
    np.testing.assert_allclose(
        result, expected, rtol=0, atol=tolerance("float64", 480, norm=float(np.linalg.norm(expected)))
    )
    assert total.arrangement == HEADS
    other = ft.Arrangement("(heads d) i -> heads d i", {"heads": 3})
    third = ft.TuckerTensor(rng.standard_normal((2, 2, 2)), [rng.standard_normal((n, 2)) for n in (3, 2, 80)])
    total = combine([Term(1.0, heads, HEADS), Term(2.0, third, other)], (6, 80))
    expected = heads.to_tensor().reshape(6, 80) + 2 * third.to_tensor().reshape(6, 80)
    np.testing.assert_allclose(total.tensor.to_tensor(), expected, rtol=0, atol=1e-12)


@given(seed=seeds, factor=st.floats(-8, 8).filter(lambda x: abs(x) > 1e-6))
def test_scaling_touches_the_scales_only(seed: int, factor: float):
    adapter = random_adapter(np.random.default_rng(seed))
    scaled = ft.scale_adapter(adapter, factor)
    for name, tensor in adapter.items():
        assert scaled[name] is tensor
        assert scaled.scales[name] == adapter.scales[name] * factor
        np.testing.assert_allclose(dense(scaled)[name], factor * dense(adapter)[name], rtol=1e-12, atol=1e-300)


def test_16_bit_adapters_stay_16_bit_and_mixed_ones_become_float32(tmp_path: Path):
    t = ft.TuckerTensor(
        np.full((1, 1), 3 * 2.0**20, np.float32), [np.ones((4, 1), np.float32), np.ones((5, 1), np.float32)]
    )
    half = ft.Adapter({"w": t}, dtypes={"w": "BF16"})
    fit = ft.add_adapters([half, half])
    assert fit.adapter.dtypes["w"] == "BF16"
    ft.save_adapter(tmp_path / "a", fit.adapter)
    # float16 ends at 65504: the size moves into the scale, exactly.
    small = ft.Adapter({"w": ft.TuckerTensor(t.core / 2**20, t.factors)}, scales={"w": 2.0**20}, dtypes={"w": "F16"})
    total = ft.add_adapters([small, small], weights=[1.0, 1.5])
    assert (total.adapter.dtypes["w"], total.relative_error) == ("F16", 0.0)
    ft.save_adapter(tmp_path / "b", total.adapter)
    np.testing.assert_array_equal(ft.load_adapter(tmp_path / "b").delta("w"), np.full((4, 5), 7.5 * 2**20))
    assert ft.add_adapters([half, small]).adapter.dtypes["w"] == "F32"


def test_adapters_of_8_bit_floats_become_float32():
    t = ft.TuckerTensor(np.float32([[1.5, 0], [0, 0.25]]), [np.eye(n, 2, dtype=np.float32) for n in (8, 6)])
    short = ft.Adapter({"w": t}, dtypes={"w": "F8_E4M3"})
    for fit in (ft.round_adapter(short, rtol=0.0), ft.add_adapters([short, short], weights=[0.5, 0.5])):
        assert fit.adapter.dtypes["w"] == "F32"
        np.testing.assert_allclose(dense(fit.adapter)["w"], t.to_tensor(), atol=tolerance("float32", 8, 6))


def test_rounding_to_a_coarse_type_above_the_tolerance_warns():
    rng = np.random.default_rng(0)
    t = ft.TuckerTensor(
        np.float32(rng.standard_normal((6, 6))), [np.float32(rng.standard_normal((20, 6))) for _ in "ab"]
    )
    with pytest.warns(ft.FloraWarning, match="above rtol 1e-06; the adapter's own types cannot hold less"):
        ft.round_adapter(ft.Adapter({"w": t}, dtypes={"w": "BF16"}), rtol=1e-6)


# --- tensors stored whole ----------------------------------------------------------------------------


def biased(value: float, **config: Any) -> ft.Adapter:
    t = ft.TuckerTensor(np.ones((1, 1)), [np.ones((2, 1)), np.ones((2, 1))])
    return ft.Adapter({"fc.weight": t}, whole={"fc.bias": np.full(2, value)}, config=config)


def test_whole_tensors_are_added_as_changes_of_the_base(tmp_path: Path):
    base = save(tmp_path / "base.safetensors", {"fc.bias": np.full(2, 10.0), "fc.weight": np.zeros((2, 2))})
    a, b = biased(11.0), biased(13.0)
    for source in (base, {"fc.bias": torch.full((2,), 10.0, dtype=torch.float64)}):
        assert ft.add_adapters([a, b], base=source).adapter.whole["fc.bias"].tolist() == [14.0, 14.0]
        assert ft.subtract_adapters(a, b, base=source).adapter.whole["fc.bias"].tolist() == [8.0, 8.0]
        assert ft.scale_adapter(a, -2.0, base=source).whole["fc.bias"].tolist() == [8.0, 8.0]
    # Weights that add up to one leave no share for the base.
    assert ft.add_adapters([a, b], weights=[0.75, 0.25]).adapter.whole["fc.bias"].tolist() == [11.5, 11.5]
    # What does not change is not stored.
    c = ft.Adapter({"fc.weight": ft.scale(a["fc.weight"], 2.0)}, whole=a.whole)
    assert ft.subtract_adapters(c, a).adapter.whole == {}
    assert ft.scale_adapter(a, 0.0).whole == {}
    assert ft.scale_adapter(a, 1.0).whole["fc.bias"] is a.whole["fc.bias"]
    with pytest.raises(ValueError, match=r"'fc.bias' is stored whole, by its new value, .* add up to 2; pass base"):
        ft.add_adapters([a, b])
    with pytest.raises(ValueError, match=r"scale: 'fc.bias' is stored whole"):
        ft.scale_adapter(a, 0.5)
    with pytest.raises(ft.InputError, match=r"base has no 'fc.bias' of shape \(2,\)"):
        ft.add_adapters([a, b], base={"fc.bias": np.zeros(3)})
    other = save(tmp_path / "other.safetensors", {"fc.weight": np.zeros((2, 2))})
    with pytest.raises(ft.InputError, match=r"other.safetensors has no 'fc.bias'"):
        ft.add_adapters([a, b], base=other)


def test_merging_the_sum_adds_both_changes(tmp_path: Path):
    """The oracle is the dense arithmetic on three checkpoints."""
    rng = np.random.default_rng(2)
    base = {"fc.weight": rng.standard_normal((8, 6)), "fc.bias": rng.standard_normal(8)}
    path = save(tmp_path / "base.safetensors", base)
    tuned = []
    for name in "ab":
        values = {n: x + rng.standard_normal(x.shape) for n, x in base.items()}
        tuned.append(values)
        ft.extract(path, save(tmp_path / f"{name}.safetensors", values), tmp_path / name, rtol=0, dtype="float64")
    done = run("add", tmp_path / "a", tmp_path / "b", "--weights", ".5", "-2", "--base", path, "-o", tmp_path / "sum")
    assert (done.exit_code, done.stderr) == (0, "")
    ft.merge_checkpoint(path, tmp_path / "sum", tmp_path / "merged.safetensors", verify_base="error")
    merged = ft.open_checkpoint(tmp_path / "merged.safetensors")
    for name, x in base.items():
        expected = x + 0.5 * (tuned[0][name] - x) - 2 * (tuned[1][name] - x)
        np.testing.assert_allclose(merged.read(name), expected, rtol=0, atol=1e-12)


@given(seed=seeds, powers=st.lists(st.integers(-12, 12), min_size=3, max_size=3), share=st.floats(0.2, 0.9))
def test_uniform_rounding_counts_relative_errors(seed, powers, share):
    adapter = random_adapter(np.random.default_rng(seed), high=5)
    scaled = replace(
        adapter, scales={name: c * 2.0**k for (name, c), k in zip(adapter.scales.items(), powers, strict=True)}
    )
    budget = max(60, int(share * sum(t.n_parameters for t in adapter.values())))
    fits = [ft.round_adapter(a, max_parameters=budget, weights="uniform") for a in (adapter, scaled)]
    assert [row.ranks for row in fits[0].rows] == [row.ranks for row in fits[1].rows]
    assert fits[1].lower_bound is None
    within = ft.round_adapter(scaled, rtol=0.3, weights="uniform")
    there = dense(within.adapter)
    squares = [np.sum((there.get(n, 0.0) - x) ** 2) / np.sum(x * x) for n, x in dense(scaled).items()]
    assert math.sqrt(np.mean(squares)) <= 0.3 + 1e-12


def test_counters_are_weighted_and_rounded():
    a, b = (ft.Adapter(biased(1.0).tensors, whole={"n": np.array(n, np.int64)}) for n in (10, 21))
    assert ft.add_adapters([a, b], weights=[0.5, 0.5]).adapter.whole["n"] == np.rint(15.5)
    scaled = ft.scale_adapter(a, 0.3, base={"n": np.array(4)}).whole["n"]
    assert (scaled, scaled.dtype, scaled.shape) == (np.rint(4 + 0.3 * 6), np.int64, ())
    small = ft.Adapter({}, whole={"n": np.array(200, np.uint8)})
    with pytest.raises(ft.InputError, match="scale: 'n' would leave the range of uint8; pass other weights"):
        ft.scale_adapter(small, 2.0, base={"n": np.array(1, np.uint8)})


def test_rounding_keeps_whole_tensors_bit_for_bit(tmp_path: Path):
    adapter = ft.Adapter(biased(1.0).tensors, whole={"n": np.float32([0.1, 0.2])}, dtypes={"n": "BF16"})
    fit = ft.round_adapter(adapter, max_parameters=1)
    assert list(fit.adapter) == []
    assert fit["fc.weight"].notes == ("left out: rank 0 under this budget",)
    assert fit["fc.weight"].relative_error == 1.0
    assert fit.adapter.whole["n"] is adapter.whole["n"]
    assert fit.adapter.dtypes["n"] == "BF16"


def test_a_budget_has_nothing_to_do_with_tensors_stored_whole():
    only = ft.Adapter({}, whole={"n": np.ones(2)})
    for fit in (ft.round_adapter(only, rtol=0.1), ft.add_adapters([only], max_bytes=1)):
        assert fit.adapter.whole["n"] is only.whole["n"]
        assert (fit.n_parameters, fit.relative_error, fit.rows) == (0, 0.0, ())


def test_different_bases_are_told(tmp_path: Path):
    a, b = biased(1.0, base_fingerprint="x", task_type="T"), biased(1.0, base_fingerprint="y", task_type="T")
    with pytest.warns(ft.FloraWarning, match="made for different base models"):
        fit = ft.add_adapters([a, b], weights=[0.5, 0.5])
    assert "base_fingerprint" not in fit.adapter.config
    assert fit.adapter.config["task_type"] == "T"
    with pytest.raises(ft.InputError, match=r"different base models.*pass adapters of one base"):
        ft.subtract_adapters(a, b, verify_base="error")
    assert ft.add_adapters([a, b], weights=[0.5, 0.5], verify_base="ignore").adapter
    assert ft.add_adapters([a, a], weights=[0.5, 0.5]).adapter.config["base_fingerprint"] == "x"
    with pytest.raises(ValueError, match="verify_base is 'no'; pass one of 'warn', 'error', 'ignore'"):
        ft.add_adapters([a], verify_base="no")  # type: ignore[arg-type]
    base = save(tmp_path / "base.safetensors", {"fc.bias": np.zeros(2)})
    with pytest.warns(ft.FloraWarning, match="different base models"):
        ft.scale_adapter(a, 2.0, base=base)


def test_what_a_start_means_does_not_survive_a_new_tensor():
    adapter = ft.Adapter(biased(1.0).tensors, config={"start_pattern": {"fc.weight": True}, "r": 1, "scale": 2.0})
    assert dict(ft.round_adapter(adapter, rtol=0.1).adapter.config) == {"r": 1}
    assert ft.round_adapter(adapter, rtol=0.1).adapter.scales["fc.weight"] == 2.0


# --- bad input ---------------------------------------------------------------------------------------


def one(core: float = 1.0, shape: tuple[int, int] = (2, 2)) -> dict[str, ft.TuckerTensor]:
    return {"w": ft.TuckerTensor(np.full((1, 1), core), [np.ones((n, 1)) for n in shape])}


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: ft.round_adapter(one()), TypeError, "got none of them; pass exactly one of"),
        (lambda: ft.round_adapter(one(), rtol=0.1, max_ratio=0.1), TypeError, "got max_ratio and rtol"),
        (lambda: ft.round_adapter(one(), max_parameters=0), ValueError, "max_parameters is 0; pass at least 1"),
        (lambda: ft.round_adapter(one(), max_bytes=0), ValueError, "max_bytes is 0; pass at least 1"),
        (lambda: ft.round_adapter(one(), max_bytes=31), ValueError, "the smallest tensor takes 32 bytes; raise it"),
        (lambda: ft.add_adapters([one()], max_bytes=1, rtol=0.1), TypeError, "add: got max_bytes and rtol"),
        (lambda: ft.round_adapter(one(), max_ratio=2.0), ValueError, "max_ratio is 2.0"),
        (lambda: ft.round_adapter(one(), rtol=-1.0), ValueError, "rtol is -1.0"),
        (lambda: ft.round_adapter({}, rtol=0.1), ValueError, "an adapter is empty"),
        (
            lambda: ft.round_adapter(one(), max_parameters=2),
            ValueError,
            "the smallest tensor takes 4 numbers; raise it",
        ),
        (lambda: ft.round_adapter(one(0.0), rtol=0.1), ValueError, "every change is zero"),
        (lambda: ft.round_adapter(one(math.nan), rtol=0.1), ValueError, "round: w.*"),
        (lambda: ft.add_adapters([]), ValueError, "no adapters; pass at least one"),
        (
            lambda: ft.add_adapters([one(), one()], weights=[1.0]),
            ValueError,
            "1 weights for 2 adapters; pass one for each",
        ),
        (lambda: ft.add_adapters([one()], weights=[math.inf]), ValueError, "a weight is inf; pass a finite number"),
        (lambda: ft.add_adapters([one()], weights=[0.0]), ValueError, "the result is zero"),
        (lambda: ft.add_adapters([one(math.inf)]), ValueError, "add: w.*"),
        (lambda: ft.add_adapters([one(), one(shape=(2, 3))]), ft.InputError, r"'w' has shapes \[\(2, 2\), \(2, 3\)\]"),
        (
            lambda: ft.add_adapters([one(), ft.Adapter({}, whole={"w": np.ones(2)})]),
            ft.InputError,
            "stored whole in one",
        ),
        (
            lambda: ft.add_adapters([ft.Adapter({}, whole={"b": np.ones(n)}) for n in (2, 3)], weights=[0.5, 0.5]),
            ft.InputError,
            r"'b' has shapes \[\(2,\), \(3,\)\]",
        ),
        (
            lambda: ft.add_adapters(
                [ft.Adapter({}, whole={"b": np.array(n)}) for n in (True, False)], weights=[0.5, 0.5]
            ),
            ft.InputError,
            "'b' holds bool values, which cannot be weighted; extract the adapters without it",
        ),
        (lambda: ft.scale_adapter(one(), math.nan), ValueError, "the factor is nan; pass a finite number"),
        (lambda: ft.scale_adapter(ft.Adapter(one(), scales={"w": 1e30}), 1e30), ValueError, "the scale of 'w' is"),
        (lambda: ft.scale_adapter(ft.Adapter({}, whole={"b": np.ones(2)}), 0.0), ValueError, "nothing is left"),
    ],
)
def test_bad_input_is_named(call: Any, kind: type[Exception], message: str):
    with pytest.raises(kind, match=message):
        call()


@pytest.mark.parametrize(
    "call",
    [
        lambda a, _: ft.round_adapter(a, rtol=0.1),
        lambda a, _: ft.add_adapters([a, a]),
        lambda a, _: ft.scale_adapter(a, 2.0),
        lambda a, out: ft.to_lycoris(a, out),
    ],
)
def test_magnitudes_are_refused(call: Any, tmp_path: Path):
    t = one()["w"]
    adapter = ft.Adapter({"fc.weight": t}, magnitudes={"fc.weight": np.ones(2)})
    with pytest.raises(ValueError, match=r"'fc.weight' has (a magnitude|magnitudes), .* depends on the base"):
        call(adapter, tmp_path / "out")


def test_rows_are_found_by_name():
    fit = ft.round_adapter(one(shape=(4, 4)), rtol=0.1)
    assert fit["w"].ranks == (1, 1)
    with pytest.raises(KeyError):
        fit["v"]


# --- the command line --------------------------------------------------------------------------------


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    rng = np.random.default_rng(7)
    a, b = random_adapter(rng), random_adapter(rng)
    return ft.save_adapter(tmp_path / "a", a), ft.save_adapter(tmp_path / "b", b)


def test_the_commands_are_the_functions(two: tuple[Path, Path], tmp_path: Path):
    a, b = two
    done = run("round", a, "-o", tmp_path / "r", "--max-parameters", "90", "--json")
    report = json.loads(done.stdout)
    assert report["n_parameters"] <= 90
    fit = ft.round_adapter(a, max_parameters=90)
    assert report == json.loads(fit.to_json())
    assert dense(ft.load_adapter(tmp_path / "r")).keys() == dense(fit.adapter).keys()
    assert gap(ft.load_adapter(tmp_path / "r"), dense(fit.adapter)) == 0.0
    assert run("round", a, "-o", tmp_path / "m", "--max-bytes", "0.8kB").exit_code == 0
    assert gap(ft.load_adapter(tmp_path / "m"), dense(ft.round_adapter(a, max_bytes=800).adapter)) == 0.0
    done = run("round", a, "-o", tmp_path / "u", "--max-ratio", "50%", "--weights", "uniform", "--json")
    assert json.loads(done.stdout) == json.loads(ft.round_adapter(a, max_ratio=0.5, weights="uniform").to_json())
    for words in (("--weights", ".7", "-.3"), ("--weights", ".7,-.3"), ("--weights=.7,-.3",)):
        assert run("add", a, b, *words, "-o", tmp_path / "s", "--overwrite", "--max-ratio", "50%").exit_code == 0
        expected = ft.add_adapters([a, b], weights=[0.7, -0.3], max_ratio=0.5)
        assert gap(ft.load_adapter(tmp_path / "s"), dense(expected.adapter)) == 0.0
    shown = run("subtract", a, b, "-o", tmp_path / "d")
    assert shown.stdout.splitlines()[-1] == ft.subtract_adapters(a, b).to_table().splitlines()[-1]
    assert run("scale", a, "-0.5", "-o", tmp_path / "h").exit_code == 0
    assert gap(ft.load_adapter(tmp_path / "h"), {n: -0.5 * x for n, x in dense(ft.load_adapter(a)).items()}) <= 1e-12
    assert (
        json.loads(run("scale", a, "2", "-o", tmp_path / "j", "--json").stdout)["weights"][0]["name"] == "layer0.weight"
    )


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["round", "{a}", "-o", "{out}"], 2, "pass exactly one of"),
        (["round", "{a}", "-o", "{out}", "--max-parameters", "1"], 2, "holds nothing"),
        (["round", "{a}", "-o", "{out}", "--rtol", "1"], 2, "nothing at all keeps rtol 1.0; lower it"),
        (["round", "{missing}", "-o", "{out}", "--rtol", ".1"], 4, "No such file"),
        (["round", "{a}", "-o", "{a}", "--rtol", ".1"], 4, "--overwrite"),
        (["add", "{a}", "{b}", "--weights", "x", "-o", "{out}"], 2, "is not a list of numbers"),
        (["add", "{a}", "{b}", "--weights", "1", "-o", "{out}"], 2, "1 weights for 2 adapters"),
        (["add", "-o", "{out}"], 2, "Missing argument"),
        (["subtract", "{a}", "{a}", "-o", "{out}"], 2, "the result is zero"),
        (["scale", "{a}", "two", "-o", "{out}"], 2, "not a valid float"),
        (["scale", "{a}", "nan", "-o", "{out}"], 2, "pass a finite number"),
    ],
)
def test_errors_have_one_line_and_write_nothing(
    words: list[str], code: int, message: str, two: tuple[Path, Path], tmp_path: Path
):
    places = {"a": two[0], "b": two[1], "out": tmp_path / "out", "missing": tmp_path / "missing"}
    before = ft.load_adapter(two[0])
    done = run(*(word.format(**places) for word in words))
    assert (done.exit_code, done.stdout) == (code, ""), done.stderr
    assert message in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
    assert gap(ft.load_adapter(two[0]), dense(before)) == 0.0
