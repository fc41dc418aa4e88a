"""Extraction with stacks: together where that is smaller, and with every promise of an extraction without them."""

import itertools
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import flora_tensor as ft
from checkpoints import load, run, save, save_sharded
from flora_tensor._layer_grid import natural_key
from flora_tensor._workers import WorkerPool
from flora_tensor.allocation import allocate_with_stacks
from flora_tensor.checkpoint import open_checkpoint
from flora_tensor.html_report import report_html
from support import optional

torch = optional("torch")

FC, CONV = "layers.*.fc.weight", "layers.*.conv.weight"
LIMITS = [{"max_ratio": 0.05}, {"max_ratio": 0.2}, {"max_ratio": 0.6}, {"rtol": 0.5}, {"rtol": 0.05}]
Weights = dict[str, np.ndarray]


def layers(shape: tuple[int, ...], count: int, seed: int, *, shared: bool, noise: float = 0.02) -> list[np.ndarray]:
    """Changes of equal weights: of one row space and one column space for all, or of spaces of their own."""
    rng = np.random.default_rng(seed)
    rows, columns = shape[0], int(np.prod(shape[1:]))
    u, v = rng.standard_normal((rows, 2)), rng.standard_normal((2, columns))
    found: list[np.ndarray] = []
    for _ in range(count):
        if not shared:
            u, v = rng.standard_normal((rows, 2)), rng.standard_normal((2, columns))
        step = u @ rng.standard_normal((2, 2)) @ v + noise * rng.standard_normal((rows, columns))
        found.append((0.1 * step).reshape(shape))
    return found


def model(seed: int = 0, *, shared: bool = True, count: int = 6) -> tuple[Weights, Weights]:
    """A base and a tuned model of so many layers, each with a matrix and a kernel, and a head."""
    rng = np.random.default_rng(seed)
    base: Weights = {}
    tuned: Weights = {}
    fc, conv = layers((16, 12), count, seed, shared=shared), layers((8, 6, 3, 3), count, seed + 1, shared=shared)
    for k in range(count):
        for name, step in ((f"layers.{2 * k}.fc.weight", fc[k]), (f"layers.{2 * k}.conv.weight", conv[k])):
            base[name] = rng.standard_normal(step.shape).astype(np.float32)
            tuned[name] = base[name] + step.astype(np.float32)
    base["head.weight"], base["bias"] = np.zeros((5, 7), np.float32), np.zeros(5, np.float32)
    tuned["head.weight"], tuned["bias"] = rng.standard_normal((5, 7)).astype(np.float32), np.ones(5, np.float32)
    return base, tuned


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    here = tmp_path_factory.mktemp("pair")
    base, tuned = model()
    return save(here / "base.safetensors", base), save(here / "tuned.safetensors", tuned)


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def test_shared_spaces_are_stored_once_and_merge_back_to_the_reported_errors(pair: tuple[Path, Path], tmp_path: Path):
    apart = ft.extract(*pair, tmp_path / "apart", max_ratio=0.1)
    report = ft.extract(*pair, tmp_path / "adapter", max_ratio=0.1, stack=[FC, CONV])
    adapter = ft.load_adapter(tmp_path / "adapter")
    assert sorted(adapter.stacks) == [CONV, FC]
    assert adapter.stacks[FC].members == tuple(f"layers.{2 * k}.fc.weight" for k in range(6))  # 10 after 2
    # Two dimensions of each space are all there is beside 2 % of noise; apart, each layer pays for its own.
    assert report.relative_error < 0.05 < apart.relative_error
    assert report.n_parameters == adapter.n_parameters - 5
    assert report.n_parameters <= 0.1 * report.dense_parameters
    ft.merge_checkpoint(pair[0], tmp_path / "adapter", tmp_path / "merged.safetensors")
    before, after, merged = load(pair[0]), load(pair[1]), load(tmp_path / "merged.safetensors")
    lost = total = 0.0
    for name, old in before.items():
        change = float(torch.linalg.vector_norm(after[name].double() - old.double()))
        left = float(torch.linalg.vector_norm(after[name].double() - merged[name].double()))
        row = report[name]
        if row.status == "tucker":
            lost, total = lost + left**2, total + change**2
            rounding = 2.0**-23 * float(torch.linalg.vector_norm(old.double()))
            assert row.relative_error == pytest.approx(left / change, abs=2 * rounding / change)
            assert row.stack == ("" if name == "head.weight" else FC if "fc" in name else CONV)
    assert report.relative_error == pytest.approx((lost / total) ** 0.5, rel=1e-3)
    written = json.loads((tmp_path / "adapter" / "extraction_report.json").read_text())
    assert written["options"]["stack"] == [FC, CONV]
    assert {row.get("stack", "") for row in written["tensors"]} == {"", FC, CONV}
    assert "in layers.*.fc.weight" in report.to_table()


def test_layers_with_nothing_in_common_stay_apart(tmp_path: Path):
    base, tuned = model(shared=False)
    paths = save(tmp_path / "base.safetensors", base), save(tmp_path / "tuned.safetensors", tuned)
    ft.extract(*paths, tmp_path / "plain", max_ratio=0.4)
    report = ft.extract(*paths, tmp_path / "adapter", max_ratio=0.4, stack=[FC, CONV])
    assert not ft.load_adapter(tmp_path / "adapter").stacks
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert content(tmp_path / "plain")[name] == content(tmp_path / "adapter")[name]
    assert all(row.stack == "" for row in report.rows)


@settings(max_examples=10)
@given(data=st.data())
def test_stacks_never_cost_accuracy_and_dry_runs_keep_their_word(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
):
    here = tmp_path_factory.mktemp("pair")
    base, tuned = model(data.draw(st.integers(0, 99)), shared=data.draw(st.booleans()), count=3)
    paths = save(here / "base.safetensors", base), save(here / "tuned.safetensors", tuned)
    limit: dict[str, Any] = data.draw(st.sampled_from(LIMITS))
    apart = ft.extract(*paths, None, dry_run=True, **limit)
    promised = ft.extract(*paths, None, dry_run=True, stack=[FC, CONV], **limit)
    report = ft.extract(*paths, here / "out", stack=[FC, CONV], **limit)
    if "rtol" in limit:
        assert promised.n_parameters <= apart.n_parameters
        assert report.relative_error <= limit["rtol"] + 1e-5
        assert (promised.lower_bound or 0) <= promised.n_parameters
    else:
        assert promised.relative_error <= apart.relative_error * (1 + 1e-12)
        alone = ft.extract(*paths, here / "alone", **limit)
        assert report.relative_error <= alone.relative_error * (1 + 1e-6)
        assert report.n_parameters <= limit["max_ratio"] * report.dense_parameters
        assert (promised.lower_bound or 0) <= promised.relative_error * (1 + 1e-9)
    if any(row.stack for row in report.rows):
        assert report.n_parameters == promised.n_parameters
        assert [row.ranks for row in report.rows] == [row.ranks for row in promised.rows]
    # The sweeps after a truncated HOSVD may end below what its spectrum promises.
    assert report.relative_error <= promised.relative_error * (1 + 1e-4) + 1e-6


def eckart_young(x: np.ndarray, ranks: tuple[int, ...]) -> float:
    """Return the relative error that no tensor of such unfoldings' ranks goes below."""
    tails: list[float] = []
    for mode, rank in enumerate(ranks):
        values = np.linalg.svd(np.moveaxis(x, mode, 0).reshape(len(np.moveaxis(x, mode, 0)), -1), compute_uv=False)
        tails.append(float(np.linalg.norm(values[rank:])))
    return max(tails) / float(np.linalg.norm(x))


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize("limit", [{"max_ratio": 0.1}, {"max_ratio": 0.3}, {"rtol": 0.05}])
def test_bounds_of_stacks_and_of_their_slices_are_true(
    limit: dict[str, Any], dry_run: bool, pair: tuple[Path, Path], tmp_path: Path
):
    report = ft.extract(*pair, tmp_path / "out", stack=[FC, CONV], dry_run=dry_run, **limit)
    steps = {n: (load(pair[1])[n].double() - w.double()).numpy() for n, w in load(pair[0]).items()}
    assert {row.name for row in report.stacks} == {row.stack for row in report.rows} - {""}
    assert report.stacks
    for row in report.stacks:
        members = [r for r in report.rows if r.stack == row.name]
        arrangement = ft.Arrangement(row.arrangement)
        joint = arrangement.arrange(np.stack([steps[n] for n in sorted((r.name for r in members), key=natural_key)]))
        assert (row.lower_bound or 0.0) <= eckart_young(joint, row.ranks) * (1 + 1e-5) + 1e-7
        assert (row.lower_bound or 0.0) <= (row.relative_error or 0.0) * (1 + 1e-5)
        assert (row.lower_bound or 0.0) > 0.3 * (row.relative_error or 0.0) or row.lower_bound is None
        assert row.n_parameters == sum(member.n_parameters for member in members)
        for member in members:
            own = joint[sorted((r.name for r in members), key=natural_key).index(member.name)]
            least = eckart_young(own, tuple(min(r, n) for r, n in zip(row.ranks[1:], own.shape)))
            assert member.lower_bound is not None
            assert member.lower_bound <= least * (1 + 1e-5) + 1e-7
            if not dry_run:
                assert member.lower_bound <= (member.relative_error or 0.0) * (1 + 1e-5) + 1e-7
    assert any(member.lower_bound for member in report.rows if member.stack)
    assert [row["name"] for row in report.to_dict()["stacks"]] == [row.name for row in report.stacks]
    assert sum(line.startswith("layers.*") for line in report.to_table().splitlines()) == len(report.stacks)
    assert "<h2>Stacks</h2>" in report_html(report)


def root_mean_square(report: ft.ExtractionReport) -> float:
    """The norm of relative weights: every changed weight counts alike."""
    errors = [row.relative_error for row in report.rows if row.delta_norm is not None]
    return float(np.sqrt(np.mean(np.square([np.nan if e is None else e for e in errors]))))


@settings(max_examples=6)
@given(seed=st.integers(0, 99), shared=st.booleans(), limit=st.sampled_from(LIMITS))
def test_relative_weights_count_the_members_alike(
    seed: int, shared: bool, limit: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
):
    here = tmp_path_factory.mktemp("pair")
    base, tuned = model(seed, shared=shared, count=4)
    for k, name in enumerate(sorted(base)):  # sizes over seven orders of magnitude
        tuned[name] = base[name].astype(np.float64) + 10.0 ** (k % 8 - 5) * (tuned[name] - base[name])
    paths = save(here / "base.safetensors", base), save(here / "tuned.safetensors", tuned)
    options: dict[str, Any] = {"weights": "uniform", "dtype": "float64"} | limit
    apart = ft.extract(*paths, here / "apart", **options)
    report = ft.extract(*paths, here / "out", stack=[FC, CONV], **options)
    if "rtol" in limit:
        assert root_mean_square(report) <= limit["rtol"] * (1 + 1e-6)
        assert report.n_parameters <= apart.n_parameters
        assert (report.lower_bound or 0) <= report.n_parameters
    else:
        assert root_mean_square(report) <= root_mean_square(apart) * (1 + 1e-9)
        assert report.n_parameters <= limit["max_ratio"] * report.dense_parameters
    promised = ft.extract(*paths, None, dry_run=True, stack=[FC, CONV], **options)
    if any(row.stack for row in report.rows):
        assert [row.ranks for row in report.rows] == [row.ranks for row in promised.rows]
    adapter, tensors = ft.load_adapter(here / "out"), {name: tuned[name] - base[name] for name in base}
    for stack in adapter.stacks.values():  # against the slices at norm one, decomposed by the library at these ranks
        norms = [float(np.linalg.norm(tensors[name])) for name in stack.members]
        scaled = np.stack([stack.arrangement.arrange(tensors[n] / size) for n, size in zip(stack.members, norms)])
        errors = [report[name].relative_error or 0.0 for name in stack.members]
        best = ft.tucker(scaled, [None if u is None else u.shape[1] for u in stack.tensor.factors])
        assert np.sqrt(np.mean(np.square(errors))) <= best.relative_error * (1 + 1e-3) + 1e-9
    ft.merge_checkpoint(paths[0], here / "out", here / "merged.safetensors")


@settings(max_examples=40)
@given(data=st.data())
def test_the_choice_between_together_and_apart_is_bounded_by_brute_force(data: st.DataObject):
    rng = np.random.default_rng(data.draw(st.integers(0, 10**6)))

    def frontier(norm_squared: float) -> ft.Frontier:
        count = int(rng.integers(1, 5))
        costs = np.concatenate([[0], np.cumsum(rng.integers(1, 9, count))])
        errors = norm_squared * np.concatenate([[1.0], np.sort(rng.random(count))[::-1]])
        return ft.Frontier(costs, errors, np.stack([costs, costs], 1), norm_squared, int(costs[-1]) + 1)

    alone = {name: [frontier(1.0) for _ in range(data.draw(st.integers(1, 2)))] for name in "abc"}
    joint = {"ab": [frontier(2.0)]}
    spectra, stacks = alone | joint, {"ab": ("a", "b")}
    points = {
        n: [(int(p), float(e)) for f in fs for p, e in zip(f.n_parameters, f.error_squared)]
        for n, fs in spectra.items()
    }
    every = [*itertools.product(points["a"], points["b"], points["c"]), *itertools.product(points["ab"], points["c"])]
    totals = [(sum(p for p, _ in chosen), sum(e for _, e in chosen)) for chosen in every]
    if data.draw(st.booleans()):
        budget = data.draw(st.integers(0, 40))
        found = allocate_with_stacks(spectra, stacks, max_parameters=budget)
        best = min(e for p, e in totals if p <= budget)
        assert found.n_parameters <= budget
        assert 3.0 * found.lower_bound**2 <= best * (1 + 1e-9) <= 3.0 * found.relative_error**2 * (1 + 1e-6) + 1e-12
        assert found.relative_error <= ft.allocate_ranks(alone, max_parameters=budget).relative_error
    else:
        rtol = data.draw(st.sampled_from([0.3, 0.6, 0.9, 1.0]))
        fits = [p for p, e in totals if e <= 3.0 * rtol**2]
        found = allocate_with_stacks(spectra, stacks, rtol=rtol)
        assert found.relative_error <= rtol * (1 + 1e-9) or not fits
        assert not fits or found.lower_bound <= min(fits) <= found.n_parameters
        apart = ft.allocate_ranks(alone, rtol=rtol)
        assert found.n_parameters <= apart.n_parameters or apart.relative_error > rtol
    used = {name for name, choice in found.choices.items() if any(choice.ranks)}
    assert "ab" not in used or not used & {"a", "b"}


def test_a_tolerance_that_only_the_stack_can_keep_is_kept():
    """The lists of the members end where noise begins, at numbers that are fewer and not enough."""

    def frontier(costs: list[int], errors: list[float]) -> ft.Frontier:
        ranks = np.array([costs, costs]).T
        return ft.Frontier(np.array(costs), np.array(errors), ranks, errors[0], costs[-1] + 1)

    spectra = {name: [frontier([0, 2], [1.0, 0.5])] for name in "ab"} | {"ab": [frontier([0, 9], [2.0, 0.02])]}
    found = allocate_with_stacks(spectra, {"ab": ("a", "b")}, rtol=0.1)
    assert (found.n_parameters, found.relative_error) == (9, pytest.approx(0.1))
    found = allocate_with_stacks(spectra, {"ab": ("a", "b")}, rtol=0.8)
    assert (found.n_parameters, found.ranks["ab"]) == (4, (0, 0))


def test_a_stack_over_shards_and_of_16_bits_reads_as_its_members_do(tmp_path: Path):
    base, tuned = model(count=3)
    sides: list[Path] = []
    for side, weights in (("base", base), ("tuned", tuned)):
        half = {n: torch.from_numpy(w).bfloat16() for n, w in weights.items()}
        names = sorted(half)
        shards = {f"model-{k + 1}.safetensors": {n: half[n] for n in names[k::2]} for k in range(2)}
        sides.append(save_sharded(tmp_path / side, shards))
    members = [f"layers.{2 * k}.fc.weight" for k in range(3)]
    checkpoint = open_checkpoint(sides[1])
    joined = checkpoint.stacked("s", members)
    assert joined.info("s").shape == (3, 16, 12)
    assert np.array_equal(joined.read("s"), np.stack([checkpoint.read(m) for m in members]))
    with joined.reader("s") as read:  # pieces that end within a member and go over into the next
        pieces = [np.empty(n, np.uint8) for n in (100, 384, 668)]
        for start, piece in zip((0, 100, 484), pieces):
            read(start, piece)
    assert np.array_equal(np.concatenate(pieces), joined.read_raw("s"))
    assert "s" not in checkpoint
    report = ft.extract(sides[0], sides[1], tmp_path / "out", max_ratio=0.2, stack=FC, noise_floor=None)
    assert report[members[0]].stack == FC


@pytest.mark.parametrize("weights", ["norm", "uniform"])
def test_a_stack_stores_no_rounding_noise_and_is_taken_where_its_members_would(weights: Any, tmp_path: Path):
    rng = np.random.default_rng(0)
    before = {f"layers.{k}.fc.weight": torch.from_numpy(rng.standard_normal((64, 48))).bfloat16() for k in range(6)}
    steps = layers((64, 48), 6, 3, shared=True, noise=0.0)
    after = {n: (w.double() + torch.from_numpy(x)).bfloat16() for (n, w), x in zip(before.items(), steps)}
    paths = save(tmp_path / "b.safetensors", before), save(tmp_path / "t.safetensors", after)
    report = ft.extract(*paths, tmp_path / "out", max_ratio=0.9, stack=FC, weights=weights)
    # Two directions on either side, and at most the four products of theirs that the layers differ in. Apart, the
    # members' own directions would come nearer to the rounded change, by fitting its noise.
    assert {row.stack for row in report.rows} == {FC}
    assert report.rows[0].ranks in [(4, 2, 2), (6, 2, 2)]
    loose = ft.extract(*paths, tmp_path / "loose", max_ratio=0.9, stack=FC, weights=weights, noise_floor=None)
    assert loose.n_parameters > 10 * report.n_parameters


@pytest.mark.parametrize("limit", [{"max_ratio": 0.1}, {"rtol": 0.2}])
def test_a_run_with_stacks_that_is_interrupted_anywhere_ends_in_the_same_bytes(
    limit: dict[str, Any], pair: tuple[Path, Path], tmp_path: Path
):
    options: dict[str, Any] = limit | {"stack": [FC, CONV]}
    calls: list[str] = []
    ft.extract(*pair, tmp_path / "whole", progress=lambda *call: calls.append(call[3]), **options)
    assert calls.count(FC) == 2  # looked at and decomposed
    for stop in range(0, len(calls), 2):
        left = iter(range(stop))

        def interrupt(*_: Any, left: Any = left) -> None:
            if next(left, None) is None:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            ft.extract(*pair, tmp_path / f"out{stop}", progress=interrupt, **options)
        ft.extract(*pair, tmp_path / f"out{stop}", resume=True, **options)
        assert content(tmp_path / f"out{stop}") == content(tmp_path / "whole")


def test_executors_give_the_same_bytes(pair: tuple[Path, Path], tmp_path: Path):
    options: dict[str, Any] = {"max_ratio": 0.1, "stack": [FC, CONV]}
    ft.extract(*pair, tmp_path / "alone", **options)
    with ThreadPoolExecutor(2) as threads, WorkerPool(1) as processes:
        for name, executor in (("threads", threads), ("processes", processes)):
            ft.extract(*pair, tmp_path / name, executor=executor, **options)
            assert content(tmp_path / name) == content(tmp_path / "alone")


def test_a_stack_that_takes_more_than_its_share_is_looked_at_further(tmp_path: Path):
    rng = np.random.default_rng(0)
    u, v = rng.standard_normal((512, 60)), rng.standard_normal((60, 512))
    steps = {f"layers.{k}.fc.weight": u @ rng.standard_normal((60, 60)) @ v for k in range(3)}
    steps |= {f"other.{k}": 0.01 * rng.standard_normal((512, 512)) for k in range(15)}
    paths = (
        save(tmp_path / "b.safetensors", {n: np.zeros(x.shape, np.float32) for n, x in steps.items()}),
        save(tmp_path / "t.safetensors", {n: x.astype(np.float32) for n, x in steps.items()}),
    )
    read: list[str] = []
    options: dict[str, Any] = {"progress": lambda phase, *call: read.append(phase + call[2])}
    report = ft.extract(*paths, tmp_path / "out", max_ratio=0.016, stack=FC, **options)
    # The layers take 72,240 numbers of the budget's 75,497. At first four times 1.6 % of their own 786,432 are listed.
    assert read.count(f"reading{FC}") == 2
    assert report.rows[0].stack == FC
    assert report.relative_error < 0.01


def test_layers_that_did_not_change_are_no_part_of_a_stack(tmp_path: Path):
    base, tuned = model()
    tuned["layers.4.fc.weight"] = base["layers.4.fc.weight"]
    for k in (2, 4, 6, 8, 10):
        tuned[f"layers.{k}.conv.weight"] = base[f"layers.{k}.conv.weight"]
    paths = save(tmp_path / "base.safetensors", base), save(tmp_path / "tuned.safetensors", tuned)
    report = ft.extract(*paths, tmp_path / "out", max_ratio=0.1, stack=[FC, CONV])
    assert (report["layers.4.fc.weight"].reason, report["layers.4.fc.weight"].n_parameters) == ("unchanged", 0)
    stacks = ft.load_adapter(tmp_path / "out").stacks
    assert list(stacks) == [FC]  # of the kernels a single one changed
    assert stacks[FC].members == tuple(f"layers.{k}.fc.weight" for k in (0, 2, 6, 8, 10))


REFUSED: list[tuple[dict[str, Any], str]] = [
    (
        {"stack": "layers.*.fd.weight"},
        r"the stack 'layers.\*.fd.weight' matches no tensor .*; there are layers.",
    ),
    ({"stack": "layers.0.f?.weight"}, "matches only 'layers.0.fc.weight'; pass a pattern that matches two"),
    (
        {"stack": "layers.*.weight"},
        r"matches 'layers.0.conv.weight', F32 of shape \(8, 6, 3, 3\), and 'layers.0.fc.weight'",
    ),
    ({"stack": "v*"}, r"matches 'v1', F32 of shape \(4,\); pass a pattern of weights with two axes or more"),
    ({"stack": [FC, "layers.[24].fc.weight"]}, "both match 'layers.2.fc.weight'; a tensor can be in one"),
    ({"stack": "head.weight"}, "is a tensor's own name; pass a pattern"),
    ({"stack": "*fc.weight."}, "matches no tensor"),
    ({"stack": FC, "include": "*.conv.*"}, "matches no tensor to compare; there are layers...conv.weight"),
    ({"stack": FC, "max_ratio": None, "ranks": 2}, "stack with ranks: .* pass a budget or rtol"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_stacks_that_cannot_be_are_refused_before_anything_is_written(
    options: dict[str, Any], message: str, tmp_path: Path
):
    base, tuned = model()
    vectors = {"v1": np.zeros(4, np.float32), "v2": np.zeros(4, np.float32)}
    paths = save(tmp_path / "b.safetensors", base | vectors), save(tmp_path / "t.safetensors", tuned | vectors)
    with pytest.raises(ValueError, match=message):
        ft.extract(*paths, tmp_path / "out", **dict[str, Any]({"max_ratio": 0.1} | options))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.safetensors", "t.safetensors"]


def test_types_that_differ_between_the_members_are_refused(tmp_path: Path):
    base, tuned = model(count=2)
    half = {n: torch.from_numpy(w) for n, w in base.items()}
    half["layers.2.fc.weight"] = half["layers.2.fc.weight"].half()
    paths = save(tmp_path / "b.safetensors", half), save(tmp_path / "t.safetensors", tuned)
    with pytest.raises(ValueError, match=r"F32 of shape \(16, 12\), and 'layers.2.fc.weight', F16 of shape"):
        ft.extract(*paths, tmp_path / "out", max_ratio=0.1, stack=FC)


def test_a_stack_that_does_not_fit_into_memory_is_named(pair: tuple[Path, Path], tmp_path: Path):
    with pytest.raises(ft.ResourceError, match=r"'layers.\*.conv.weight' of shape \(6, 8, 6, 3, 3\) needs about"):
        ft.extract(*pair, tmp_path / "out", max_ratio=0.1, stack=CONV, max_memory=60_000)
    ft.extract(*pair, tmp_path / "out", max_ratio=0.1, max_memory=60_000, overwrite=True)


def test_the_command_line_takes_stacks_and_its_other_commands_their_result(pair: tuple[Path, Path], tmp_path: Path):
    out = tmp_path / "out"
    done = run("extract", *pair, "-o", out, "--max-ratio", "10%", "--stack", FC, "--stack", CONV)
    assert done.exit_code == 0, done.output
    assert "layer o i in layers.*.fc.weight" in done.output
    assert sorted(ft.load_adapter(out).stacks) == [CONV, FC]
    shown = run("inspect", out)
    assert "6×16×12" in shown.output
    for command in (
        ["round", out, "-o", tmp_path / "small", "--max-parameters", "200"],
        ["add", out, out, "--weights", ".7", ".3", "--base", pair[0], "-o", tmp_path / "sum"],
        ["scale", out, "0.5", "--base", pair[0], "-o", tmp_path / "half"],
        ["convert", out, tmp_path / "lora", "--to", "peft-lora"],
        ["merge", pair[0], tmp_path / "sum", "-o", tmp_path / "merged"],
    ):
        done = run(*command)
        assert done.exit_code == 0, done.output
    assert sorted(ft.load_adapter(tmp_path / "small").stacks) == [CONV, FC]
    once, twice = ft.load_adapter(out), ft.load_adapter(tmp_path / "sum")
    lora = ft.from_peft_lora(tmp_path / "lora")
    assert not lora.stacks
    assert set(lora) == set(once)
    for name in once:
        np.testing.assert_allclose(lora.delta(name), once.delta(name), atol=1e-5 * np.abs(once.delta(name)).max())
        np.testing.assert_allclose(twice.delta(name), once.delta(name), atol=1e-5 * np.abs(once.delta(name)).max())
    refused = run("extract", *pair, "-o", tmp_path / "x", "--stack", "nothing.*")
    assert refused.exit_code == 2
    assert "matches no tensor" in refused.stderr
