"""From two checkpoints to an adapter and back."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import einops
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import flora_tensor as ft
from checkpoints import bits, load, raw, save, save_sharded
from flora_tensor import _deltas
from flora_tensor._deltas import read_change
from flora_tensor.arrangement import Arrangement
from flora_tensor.checkpoint import open_checkpoint
from flora_tensor.report import TensorRow

EPS = {torch.float64: 2.0**-52, torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
TYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# Weights as the layers of PyTorch have them: (out, in / groups, *kernel), transposed ones (in, out / groups, *kernel).
LAYERS = {
    "conv": (12, 8, 3, 3),
    "conv 5×5, dilated, circular": (8, 6, 5, 5),
    "conv grouped": (12, 2, 3, 3),
    "conv depthwise": (16, 1, 3, 3),
    "conv pointwise": (12, 8, 1, 1),
    "conv 1d": (10, 6, 5),
    "conv 3d": (6, 4, 3, 3, 3),
    "conv transposed, grouped": (8, 3, 4, 4),
    "embedding": (40, 6),
    "linear": (16, 12),
    "attention in_proj": (24, 8),
    "experts": (3, 8, 6),
}


def normal(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(a.double() - b.double()))


def pair(here: Path, base: dict[str, Any], tuned: dict[str, Any]) -> tuple[Path, Path]:
    return save(here / "base.safetensors", base), save(here / "tuned.safetensors", tuned)


def assert_merges_back(here: Path, base: Path, tuned: Path, report: ft.ExtractionReport) -> None:
    """Merged weights are as near to the tuned ones as the report says, up to rounding; the rest agrees bit for bit."""
    ft.merge_checkpoint(base, here / "adapter", here / "merged")
    before, after, merged = load(base), load(tuned), load(here / "merged")
    assert merged.keys() == before.keys()
    for row in report.rows:
        old, new, got = before[row.name], after[row.name], merged[row.name]
        assert (got.dtype, got.shape) == (old.dtype, old.shape)
        if row.status == "tucker":
            assert row.relative_error is not None
            assert row.delta_norm is not None
            promised = row.relative_error * row.delta_norm
            # Half a unit of the stored type for each entry of the sum, and one of the type that the change has.
            work = EPS[torch.float64 if torch.float64 in (old.dtype, new.dtype) else torch.float32]
            rounding = EPS[old.dtype] * float(torch.linalg.vector_norm(got.double())) + work * row.delta_norm
            assert distance(got, new) <= promised * (1 + 1e-6) + rounding
            assert distance(got, new) >= promised * (1 - 1e-6) - rounding
        elif row.status == "whole":
            assert bits(got) == bits(new.to(old.dtype))
        else:
            assert bits(got) == bits(old)


@settings(max_examples=25)
@given(data=st.data())
def test_any_pair_merges_back_to_within_the_reported_error(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
):
    base: dict[str, torch.Tensor] = {}
    tuned: dict[str, torch.Tensor] = {}
    for k in range(data.draw(st.integers(1, 4))):
        kind = data.draw(st.sampled_from([*LAYERS, "free"]))
        free = st.lists(st.integers(1, 6), min_size=2, max_size=6).map(tuple)
        shape = LAYERS[kind] if kind != "free" else data.draw(free)
        dtype = data.draw(st.sampled_from(TYPES))
        old = normal(shape, k, dtype)
        step = data.draw(st.sampled_from([1e-3, 0.1, 10.0]))
        base[f"m{k}.weight"], tuned[f"m{k}.weight"] = (
            old,
            (old.double() + step * normal(shape, 100 + k).double()).to(dtype),
        )
        if data.draw(st.booleans()):
            base[f"m{k}.bias"], tuned[f"m{k}.bias"] = normal((shape[0],), k, dtype), normal((shape[0],), 50 + k, dtype)
    base["same"] = tuned["same"] = normal((4, 4), 1)
    criterion = data.draw(
        st.sampled_from([{"rtol": 0.0}, {"rtol": 0.3}, {"max_ratio": 0.5}, {"ranks": 2}, {"ranks": 100}])
    )
    here = tmp_path_factory.mktemp("pair")
    paths = pair(here, base, tuned)
    try:
        report = ft.extract(*paths, here / "adapter", **criterion)
    except ValueError as error:
        # The step was below the precision of every weight, or the budget below rank 1 of each.
        empty = "max_ratio" in criterion and "holds nothing" in str(error)
        assume(not empty and "nothing to extract" not in str(error))
        raise
    assert_merges_back(here, *paths, report)
    if "rtol" in criterion:
        assert report.relative_error <= criterion["rtol"] + 1e-5
    if "max_ratio" in criterion:
        assert report.n_parameters <= 0.5 * report.dense_parameters


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("dtype", TYPES)
def test_full_rank_reproduces_the_tuned_weight_to_rounding(kind: str, dtype: torch.dtype, tmp_path: Path):
    old = normal(LAYERS[kind], 0, dtype)
    new = normal(LAYERS[kind], 1, dtype)
    paths = pair(tmp_path, {"m.weight": old}, {"m.weight": new})
    storage: Any = "float64" if dtype == torch.float64 else "float32"
    report = ft.extract(*paths, tmp_path / "adapter", ranks=1000, dtype=storage)
    unit = EPS[torch.float64 if dtype == torch.float64 else torch.float32]
    # LAPACK's test ratio allows 50 n ulp for a decomposition and its product; n is the longest side of an unfolding.
    assert report["m.weight"].relative_error <= 50 * max(old.shape) * unit
    assert_merges_back(tmp_path, *paths, report)


@pytest.mark.parametrize("pattern", ["o i h w", "o (i h w)", "(o h) (i w)", "(g c) i h w -> g c i h w"])
def test_an_arrangement_is_used_where_it_fits_and_stored_beside_the_tensor(pattern: str, tmp_path: Path):
    base = {"conv.weight": normal((8, 4, 3, 3), 0), "fc.weight": normal((8, 8), 1)}
    tuned = {n: t + normal(tuple(t.shape), 2) for n, t in base.items()}
    arrangement = ft.Arrangement(pattern, {"g": 2} if "g" in pattern else {})
    paths = pair(tmp_path, base, tuned)
    report = ft.extract(*paths, tmp_path / "adapter", arrangements=arrangement, rtol=0.2)
    assert report["conv.weight"].arrangement == pattern
    assert report["fc.weight"].arrangement == "o i"
    assert ft.load_adapter(tmp_path / "adapter").arrangements["conv.weight"] == arrangement
    assert_merges_back(tmp_path, *paths, report)


def test_the_arrangement_is_chosen_by_what_the_change_is(tmp_path: Path):
    rng = np.random.default_rng(0)
    separable = np.einsum("oh,iw->oihw", rng.standard_normal((16, 3)), rng.standard_normal((12, 3)))
    multilinear = np.einsum("o,i,h,w->oihw", *(rng.standard_normal(n) for n in (16, 12, 3, 3)))
    flat = np.einsum("o,ihw->oihw", rng.standard_normal(16), rng.standard_normal((12, 3, 3)))
    changes = {"separable": separable, "multilinear": multilinear, "flat": flat}
    base = {n: np.zeros((16, 12, 3, 3)) for n in changes}
    report = ft.extract(*pair(tmp_path, base, changes), tmp_path / "adapter", rtol=1e-6)
    chosen = {n: (report[n].arrangement, report[n].ranks) for n in changes}
    assert chosen == {
        "separable": ("(o h) (i w)", (1, 36)),
        "multilinear": ("o i h w", (1, 12, 1, 1)),
        "flat": ("o (i h w)", (1, 108)),
    }


def test_the_budget_goes_to_the_weight_that_needs_it(tmp_path: Path):
    rng = np.random.default_rng(0)
    low = rng.standard_normal((32, 1)) @ rng.standard_normal((1, 32))
    base = {n: np.zeros((32, 32)) for n in ("low", "tiny", "noise")}
    tuned = {"low": low, "tiny": 1e-6 * low, "noise": rng.standard_normal((32, 32))}
    paths = pair(tmp_path, base, tuned)
    report = ft.extract(*paths, tmp_path / "adapter", max_parameters=1000)
    assert report.n_parameters <= 1000
    assert report["low"].ranks == (1, 32)  # one mode whole: two vectors, and no core between them
    assert report["noise"].ranks[0] > 5
    assert report["tiny"].reason == "rank 0 under this budget"
    assert report["tiny"].status == "left out"
    assert "tiny" not in ft.load_adapter(tmp_path / "adapter")
    assert report.lower_bound is not None
    assert report.lower_bound * 0.98 <= report.relative_error


@pytest.mark.parametrize("weights", ["norm", "uniform"])
@pytest.mark.parametrize("max_ratio", [0.05, 0.2])
def test_the_bound_is_never_above_what_was_reached(tmp_path: Path, max_ratio, weights):
    # On noise HOOI gains, and predictions that are met exactly differ from the stored numbers' error by rounding.
    rng = np.random.default_rng(0)
    base = {f"w{k}": rng.standard_normal((24, 20, 3, 3)).astype(np.float32) for k in range(3)}
    tuned = {name: w + 0.1 * rng.standard_normal(w.shape).astype(np.float32) for name, w in base.items()}
    report = ft.extract(*pair(tmp_path, base, tuned), tmp_path / "adapter", max_ratio=max_ratio, weights=weights)
    errors = [1.0 if row.relative_error is None else row.relative_error for row in report.rows]
    reached = report.relative_error if weights == "norm" else math.sqrt(np.mean(np.square(errors)))
    assert report.lower_bound is not None
    assert 0 < report.lower_bound <= reached * (1 + 1e-12)


@pytest.mark.parametrize(("dtype", "itemsize"), [("float32", 4), ("bfloat16", 2), ("float64", 8)])
def test_a_budget_in_bytes_counts_the_stored_type(tmp_path: Path, dtype, itemsize):
    paths = pair(tmp_path, {"w": np.zeros((40, 30))}, {"w": normal((40, 30), 0)})
    by_bytes = ft.extract(*paths, tmp_path / "a", max_bytes=500 * itemsize + itemsize - 1, dtype=dtype)
    by_numbers = ft.extract(*paths, tmp_path / "b", max_parameters=500, dtype=dtype)
    assert by_bytes["w"].ranks == by_numbers["w"].ranks
    assert by_bytes.options["max_bytes"] == 500 * itemsize + itemsize - 1
    stored = ft.load_adapter(tmp_path / "a")["w"]
    assert stored.n_parameters * itemsize <= 500 * itemsize


def test_the_default_is_five_percent(tmp_path: Path):
    paths = pair(tmp_path, {"w": np.zeros((64, 64))}, {"w": normal((64, 64), 0)})
    report = ft.extract(*paths, tmp_path / "adapter")
    assert report.options["max_ratio"] == 0.05
    assert 0 < report.n_parameters <= 0.05 * 64 * 64
    assert report.dense_parameters == 64 * 64


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize("criterion", [{"max_ratio": 0.3}, {"rtol": 0.5}, {"ranks": 3}, {"max_ratio": 1.0}])
def test_no_tensor_of_the_chosen_ranks_could_come_closer_than_the_bound(
    criterion: dict[str, Any], dry_run: bool, tmp_path: Path
):
    shapes = {"conv": (12, 8, 3, 3), "fc": (20, 16), "q_proj.weight": (16, 12), "three": (6, 7, 8)}
    changes = {name: normal(shape, k).double() for k, (name, shape) in enumerate(shapes.items())}
    paths = pair(tmp_path, {n: torch.zeros_like(x) for n, x in changes.items()}, changes)
    options = {"heads": 4, "noise_floor": None, "dtype": "float64", "dry_run": dry_run, **criterion}
    report = ft.extract(*paths, tmp_path / "a", **options)
    stored = [row for row in report.rows if row.status == "tucker"]
    assert stored
    for row in stored:
        own = Arrangement.native(len(row.shape)).pattern
        pattern = row.arrangement if "->" in row.arrangement else f"{own} -> {row.arrangement}"
        x = einops.rearrange(changes[row.name].numpy(), pattern, **({"heads": 4} if "heads" in pattern else {}))
        assert x.shape == row.modes
        tails = [
            np.linalg.norm(np.linalg.svd(np.moveaxis(x, k, 0).reshape(n, -1), compute_uv=False)[rank:])
            for k, (n, rank) in enumerate(zip(row.modes, row.ranks))
        ]
        best = max(tails) / np.linalg.norm(x)
        if "ranks" in criterion and not dry_run:  # of the modes whose exact singular values the method computed, if any
            assert row.lower_bound is None or 0 < row.lower_bound <= best * (1 + 1e-6)
            continue
        assert row.lower_bound == pytest.approx(best, rel=1e-6, abs=1e-7)
        assert row.lower_bound <= row.relative_error * (1 + 1e-6) + 1e-12
        if len(x.shape) == 2:  # Eckart and Young: the bound is reached
            assert row.relative_error == pytest.approx(row.lower_bound, rel=1e-5, abs=1e-12)
    told = {row["name"]: row["lower_bound"] for row in json.loads(report.to_json())["tensors"]}
    assert told == {row.name: row.lower_bound for row in report.rows}


# Nothing is dropped silently ------------------------------------------------------------------------------------------


def everything() -> tuple[dict[str, Any], dict[str, Any]]:
    x = normal((8, 6), 0)
    base = {
        "changed": x,
        "unchanged": x,
        "signs of zero": torch.zeros(3, 3),
        "vector": torch.ones(4),
        "counter": torch.tensor(3),
        "mask": torch.zeros(2, 2, dtype=torch.bool),
        "ids": torch.arange(6).reshape(2, 3),
        "fp8": x.to(torch.float8_e4m3fn),
        "scaled": x.to(torch.float8_e4m3fn),
        "scaled_scale_inv": torch.ones(1, 1),
        "scaled_scale": torch.ones(1),
        "packed": torch.zeros(4, 4, dtype=torch.uint8),
        "void": torch.zeros(0, 5),
        "resized": torch.zeros(10, 4),
        "lost": x,
        "secret": x,
        "mixed": x.bfloat16(),
        "sparse": torch.zeros(8, 8),
    }
    tuned = {n: t.clone() for n, t in base.items() if n != "lost"}
    tuned |= {
        "changed": x + 1,
        "signs of zero": -torch.zeros(3, 3),
        "vector": torch.full((4,), 2.0),
        "counter": torch.tensor(4),
        "ids": torch.arange(6).reshape(2, 3) + 1,
        "fp8": (x + 4).to(torch.float8_e4m3fn),
        "scaled": (x + 4).to(torch.float8_e4m3fn),
        "scaled_scale": torch.zeros(1),
        "resized": torch.zeros(12, 4),
        "secret": x + 1,
        "mixed": x.bfloat16().float() + 1,
        "new": x,
        "sparse": torch.eye(8),
    }
    return base, tuned


def test_every_tensor_of_both_checkpoints_has_a_row_and_a_reason(tmp_path: Path):
    paths = pair(tmp_path, *everything())
    options = {"exclude": "sec*", "on_mismatch": "skip", "allow_missing": True}
    with pytest.warns(ft.FloraWarning, match="extract: 'ids', 'scaled_scale', 'scaled' changed and cannot be stored"):
        report = ft.extract(*paths, tmp_path / "adapter", rtol=0.01, **options)
    assert {row.name for row in report.rows} == set(everything()[0]) | set(everything()[1])
    assert {row.name: row.reason for row in report.rows if row.status == "left out"} == {
        "unchanged": "unchanged",
        "signs of zero": "unchanged in value, the bits differ",
        "mask": "unchanged",
        "ids": "type I64 cannot be decomposed",
        "scaled": "type F8_E4M3 is scaled by 'scaled_scale': convert the checkpoint first",
        "scaled_scale": "a scale of 'scaled', which is left out",
        "scaled_scale_inv": "unchanged",
        "packed": "unchanged",
        "void": "zero-size",
        "resized": "shape differs: (10, 4) and (12, 4)",
        "lost": "missing in tuned",
        "new": "missing in base",
        "secret": "excluded by name",
    }
    assert {row.name for row in report.rows if row.status == "whole"} == {"vector", "counter"}
    assert {row.name for row in report.rows if row.status == "tucker"} == {"changed", "mixed", "sparse", "fp8"}
    assert report["mixed"].dtype == "BF16 → F32"
    assert report["mixed"].notes == ("types differ",)
    assert report["sparse"].notes == ("update below storage precision: 88 % of the entries did not change",)
    assert {row.name for row in report.rows if row.status == "left out" and row.changed} == {
        "ids",
        "resized",
        "scaled",
        "scaled_scale",
    }
    written = json.loads((tmp_path / "adapter" / "extraction_report.json").read_text())
    assert written == json.loads(report.to_json())
    assert written["totals"]["left_out_changed"] == 4
    table = report.to_table()
    for row in report.rows:
        assert row.name in table
        assert row.reason in table


def test_the_adapter_directory_is_the_same_bytes_again(tmp_path: Path):
    paths = pair(tmp_path, *everything())
    options: Any = {"rtol": 0.1, "on_mismatch": "skip", "allow_missing": True, "exclude": ["ids", "scaled*"]}
    for name in ("1", "2"):
        ft.extract(*paths, tmp_path / name, **options)
    for file in ("adapter_config.json", "adapter_model.safetensors", "extraction_report.json"):
        assert (tmp_path / "1" / file).read_bytes() == (tmp_path / "2" / file).read_bytes()


def test_a_dry_run_promises_what_a_run_keeps_and_writes_nothing(tmp_path: Path):
    base = {"conv": normal((8, 6, 3, 3), 0), "fc": normal((20, 30), 1)}
    paths = pair(tmp_path, base, {n: t + normal(tuple(t.shape), 2) for n, t in base.items()})
    for criterion in ({"max_ratio": 0.3}, {"rtol": 0.5}, {"ranks": 3}, {"ranks": {"conv": (2, 2, 1, 1), "*": 4}}):
        promised = ft.extract(*paths, tmp_path / "dry", dry_run=True, **criterion)
        assert not (tmp_path / "dry").exists()
        assert promised.dry_run
        kept = ft.extract(*paths, tmp_path / "wet", overwrite=True, **criterion)
        assert [row.ranks for row in promised.rows] == [row.ranks for row in kept.rows]
        assert promised.n_parameters == kept.n_parameters == sum(t.n_parameters for t in load_all(tmp_path / "wet"))
        # The promise is the truncated HOSVD. HOOI improves on it; a randomized start may cost a hair, which a
        # tolerance does not allow.
        assert kept.relative_error <= promised.relative_error * (1 + (1e-5 if "rtol" in criterion else 1e-3))
        assert kept.relative_error >= 0.8 * promised.relative_error
    assert ft.extract(*paths, None, dry_run=True).to_table().count("would store") == 1


def load_all(directory: Path) -> list[ft.TuckerTensor]:
    return list(ft.load_adapter(directory).values())


def test_ranks_are_lowered_to_what_is_feasible_and_that_is_said(tmp_path: Path):
    paths = pair(tmp_path, {"w": normal((8, 6, 3), 0)}, {"w": normal((8, 6, 3), 1)})
    report = ft.extract(*paths, tmp_path / "a", ranks=(9, 2, 2))
    assert report["w"].ranks == (4, 2, 2)
    assert report["w"].notes == ("ranks (9, 2, 2) lowered to (4, 2, 2)",)
    assert report.lower_bound is None
    with pytest.raises(ValueError, match=r"2 ranks for 'w', which has 3 modes; pass one integer for all"):
        ft.extract(*paths, tmp_path / "b", ranks=(2, 2))
    with pytest.raises(ValueError, match="ranks has no pattern for 'w'"):
        ft.extract(*paths, tmp_path / "b", ranks={"v*": 2})
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("ranks", [100, (8, 6), {"*": (6, 7)}])
def test_what_given_ranks_do_not_truncate_is_kept_as_it_is(tmp_path: Path, ranks):
    base, tuned = {"w": normal((8, 6), 0)}, {"w": normal((8, 6), 1)}
    paths = pair(tmp_path, base, tuned)
    promised = ft.extract(*paths, None, ranks=ranks, dry_run=True)["w"]
    row = ft.extract(*paths, tmp_path / "a", ranks=ranks)["w"]
    assert row.ranks == promised.ranks == (8, 6)
    assert row.n_parameters == promised.n_parameters == 48
    assert "kept as it is: ranks (" in row.notes[0]
    assert promised.notes == row.notes
    np.testing.assert_array_equal(ft.load_adapter(tmp_path / "a")["w"].to_tensor(), tuned["w"] - base["w"])


# Vectors --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64])
def test_vectors_are_kept_bit_for_bit(dtype: torch.dtype, tmp_path: Path):
    base = {"b": torch.ones(5, dtype=dtype), "w": torch.zeros(4, 4)}
    tuned = {"b": (3 * normal((5,), 0)).to(dtype), "w": torch.ones(4, 4)}
    report = ft.extract(*pair(tmp_path, base, tuned), tmp_path / "adapter", ranks=1)
    assert report["b"].status == "whole"
    assert report.whole_parameters == 5
    ft.merge_checkpoint(tmp_path / "base.safetensors", tmp_path / "adapter", tmp_path / "m.safetensors")
    assert bits(load(tmp_path / "m.safetensors")["b"]) == bits(tuned["b"])


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_8_bit_weights_are_decomposed_and_merged_in_their_own_type(dtype: torch.dtype, tmp_path: Path):
    old, step = normal((12, 8), 0), 4 * torch.outer(torch.arange(1, 13), torch.ones(8))
    base = {"w": old.to(dtype)}
    paths = pair(tmp_path, base, {"w": (base["w"].float() + step).to(dtype)})
    ft.extract(*paths, tmp_path / "a", ranks=8)
    ft.merge_checkpoint(paths[0], tmp_path / "a", tmp_path / "m.safetensors")
    assert bits(load(tmp_path / "m.safetensors")["w"]) == bits(load(paths[1])["w"])


@pytest.mark.parametrize("dtype", TYPES)
def test_a_change_is_measured_while_it_is_read(dtype: torch.dtype, tmp_path: Path):
    # Three pieces and a bit; the first differs in its last number only, the second not at all.
    size = 3 * _deltas._PIECE + 5
    old = normal((1, size), 0, dtype)
    new = old.clone()
    new[0, _deltas._PIECE - 1] += 2
    new[0, 2 * _deltas._PIECE + 7 :] *= 3
    files = [open_checkpoint(path) for path in pair(tmp_path, {"w": old}, {"w": new})]
    change = read_change(*files, "w", noise=True)
    assert change is not None
    work = torch.float64 if dtype == torch.float64 else torch.float32
    dense = (new.to(work) - old.to(work)).numpy()
    assert np.array_equal(change.values, dense)
    assert change.norm == pytest.approx(np.linalg.norm(dense.astype(np.float64)), rel=1e-8)
    assert change.unchanged == np.count_nonzero(dense == 0)
    name = str(dtype).removeprefix("torch.")
    stored = max(ft.rounding_noise(x.to(work).numpy(), name) for x in (old, new))
    own = ft.rounding_noise(dense, str(dense.dtype))
    assert change.noise == pytest.approx(math.hypot(stored, own), rel=1e-8)
    assert read_change(files[0], files[0], "w") is None
    assert read_change(files[1], files[0], "w").digest == "-".join(reversed(change.digest.split("-")))


@given(data=st.data())
def test_a_digest_notices_what_happens_by_accident(data: st.DataObject):
    length = data.draw(st.integers(1, 40))
    rng = np.random.default_rng(data.draw(st.integers(0, 9)))
    pieces = [rng.integers(0, 256, length, np.uint8) for _ in range(data.draw(st.integers(2, 5)))]
    pieces[-1] = pieces[-1][: data.draw(st.integers(1, length))]

    def digest(content: list[np.ndarray]) -> str:
        taken = _deltas._Digest()
        for piece in content:
            taken.add(piece)
        return str(taken)

    whole = digest(pieces)
    assert whole == digest([piece.copy() for piece in pieces])
    first, second = data.draw(st.permutations(range(len(pieces))))[:2]
    at = data.draw(st.integers(0, min(pieces[first].size, pieces[second].size) - 1))
    changed = [piece.copy() for piece in pieces]
    changed[first][at] ^= 128  # a sign, and then the same one in another piece
    assert digest(changed) != whole
    changed[second][at] ^= 128
    assert digest(changed) != whole
    if pieces[first].size == pieces[second].size and not np.array_equal(pieces[first], pieces[second]):
        pieces[first], pieces[second] = pieces[second], pieces[first]
        assert digest(pieces) != whole


@pytest.mark.parametrize("ranks", [(6, 5, 2, 3), (7, 16, 3, 3), (20, 9, 3, 3), (20, 16, 1, 3), (20, 16, 3, 3)])
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_the_error_is_that_of_the_stored_numbers(ranks: tuple[int, ...], dtype: Any, tmp_path: Path):
    # Several modes are truncated, one only (which is a matrix), or none.
    change = normal((20, 16, 3, 3), 1)
    paths = pair(tmp_path, {"w": torch.zeros(20, 16, 3, 3)}, {"w": change})
    report = ft.extract(*paths, tmp_path / "a", ranks=ranks, dtype=dtype)
    assert report["w"].ranks == ranks
    stored = ft.load_adapter(tmp_path / "a").delta("w", dtype=np.float64)
    dense = np.linalg.norm(stored - change.numpy()) / np.linalg.norm(change.double())
    assert report["w"].relative_error == pytest.approx(dense, rel=2e-5, abs=1e-7)


def test_vectors_can_be_skipped_or_refused(tmp_path: Path):
    paths = pair(tmp_path, {"b": np.ones(5), "w": np.zeros((4, 4))}, {"b": np.zeros(5), "w": np.ones((4, 4))})
    report = ft.extract(*paths, tmp_path / "skip", vectors="skip", ranks=1)
    assert (report["b"].status, report["b"].reason) == ("left out", "vector, skipped as asked")
    assert not ft.load_adapter(tmp_path / "skip").whole
    with pytest.raises(ft.InputError, match="the vector 'b' changed; pass vectors='keep'"):
        ft.extract(*paths, tmp_path / "error", vectors="error", ranks=1)
    only = pair(tmp_path / "only", {"b": np.ones(5)}, {"b": np.zeros(5)})
    ft.extract(*only, tmp_path / "whole")
    assert len(ft.load_adapter(tmp_path / "whole")) == 0


# Storage --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", ["float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("magnitude", [1e-30, 1e-6, 1.0, 1e6, 1e30])
def test_any_magnitude_survives_any_storage_type(storage: Any, magnitude: float, tmp_path: Path):
    change = magnitude * normal((12, 10), 0, torch.float64)
    paths = pair(tmp_path, {"w": torch.zeros(12, 10)}, {"w": change.float()})
    report = ft.extract(*paths, tmp_path / "adapter", ranks=12, dtype=storage)
    unit = {"float64": 1e-5, "float32": 1e-5, "bfloat16": 2.0**-7, "float16": 2.0**-10}[storage]
    assert report["w"].relative_error < 2 * unit
    adapter = ft.load_adapter(tmp_path / "adapter")
    assert adapter.dtypes["w"] == {"float64": "F64", "float32": "F32", "bfloat16": "BF16", "float16": "F16"}[storage]
    measured = np.linalg.norm(adapter.delta("w", dtype=np.float64) / magnitude - change.numpy() / magnitude)
    assert measured / np.linalg.norm(change / magnitude) < 3 * unit
    assert_merges_back(tmp_path, *paths, report)


def test_a_change_beyond_what_a_scale_can_hold_is_refused(tmp_path: Path):
    paths = pair(tmp_path, {"w": np.zeros((4, 4))}, {"w": np.full((4, 4), 1e250)})
    with pytest.raises(ValueError, match=r"the change of 'w' reaches 2\^\d+; pass dtype='float64'"):
        ft.extract(*paths, tmp_path / "a", ranks=1)
    report = ft.extract(*paths, tmp_path / "a", ranks=1, dtype="float64")
    assert report.relative_error < 1e-12


def test_a_tolerance_below_the_storage_type_is_a_warning(tmp_path: Path):
    paths = pair(tmp_path, {"w": np.zeros((9, 9))}, {"w": normal((9, 9), 0)})
    with pytest.warns(ft.FloraWarning, match=r"stored as bfloat16 the error is .*, above rtol 0.0001"):
        ft.extract(*paths, tmp_path / "a", rtol=1e-4, dtype="bfloat16")


def test_a_torch_device_gives_the_same_adapter(tmp_path: Path):
    base = {"w": normal((12, 8, 3, 3), 0)}
    paths = pair(tmp_path, base, {"w": base["w"] + normal((12, 8, 3, 3), 1)})
    reports = [ft.extract(*paths, tmp_path / str(d), max_ratio=0.3, device=d) for d in (None, "cpu")]
    assert reports[0]["w"].ranks == reports[1]["w"].ranks
    assert reports[0].relative_error == pytest.approx(reports[1].relative_error, rel=1e-4)


# Bad inputs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"ranks": 2, "rtol": 0.1},
            TypeError,
            "got rtol and ranks; pass one of ranks, rtol, max_parameters, max_ratio and max_bytes",
        ),
        ({"ranks": 0}, ValueError, "extract: rank 0; pass at least 1"),
        ({"ranks": {"*": 0}}, ValueError, "extract: rank 0 for 'w'; pass at least 1"),
        ({"ranks": 2.5}, TypeError, "pass an integer"),
        ({"max_ratio": 0.0}, ValueError, "max_ratio is 0.0"),
        ({"max_ratio": 1.5}, ValueError, "max_ratio is 1.5"),
        ({"max_parameters": 0}, ValueError, "max_parameters is 0; pass at least 1"),
        ({"max_bytes": 0}, ValueError, "max_bytes is 0; pass at least 1"),
        ({"max_parameters": 5}, ValueError, r"holds nothing: the smallest tensor takes 14 numbers"),
        ({"rtol": -0.1}, ValueError, "rtol"),
        ({"vectors": "drop"}, ValueError, "vectors is 'drop'; pass one of 'keep', 'skip', 'error'"),
        ({"dtype": "int8"}, ValueError, "dtype is 'int8'; pass one of"),
        ({"on_mismatch": "pad"}, ValueError, "on_mismatch is 'pad'"),
        ({"include": "conv*"}, ValueError, "include pattern 'conv[*]' matches no tensor; there are w"),
        ({"exclude": ["w", "conv*"]}, ValueError, "exclude pattern 'conv[*]' matches no tensor; there are w"),
        ({"arrangements": "o ("}, ValueError, "cannot be read"),
        (
            {"max_memory": 1000},
            ft.ResourceError,
            r"'w' of shape \(8, 6\) needs about .* kB of memory, but 1 kB are allowed",
        ),
    ],
)
def test_options_that_cannot_be_honored_are_refused(options: Any, error: Any, message: str, tmp_path: Path):
    paths = pair(tmp_path, {"w": normal((8, 6), 0)}, {"w": normal((8, 6), 1)})
    with pytest.raises(error, match=message):
        ft.extract(*paths, tmp_path / "a", **options)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("base", "tuned", "message"),
    [
        ({"w": np.zeros((2, 2))}, {"w": np.zeros((2, 2))}, "nothing to extract: no selected tensor differs"),
        (
            {"w": np.zeros((9, 4))},
            {"w": np.zeros((12, 4))},
            r"'w' has shape \(9, 4\).*\(12, 4\).*vocabulary been",
        ),
        ({"w": np.zeros((9, 4))}, {"w": np.zeros((4, 9, 1))}, r"\(4, 9, 1\) in .*; pass on_mismatch='skip'"),
        (
            {"w": np.ones((2, 2)), "v": np.ones(2)},
            {"w": np.zeros((2, 2)), "u": np.ones(2)},
            "1 only in .*'v'.* 1 only",
        ),
        (
            {"w": np.zeros((2, 2))},
            {"w": np.full((2, 2), np.nan)},
            r"'w' has 4 entries .* first at \(0, 0\)",
        ),
        ({"w": np.diag([1, np.inf])}, {"w": np.zeros((2, 2))}, r"'w' has 1 entries .* the first at \(1, 1\)"),
        ({"b": np.zeros(3)}, {"b": np.array([0, 0, np.nan])}, r"'b' has 1 entries .* the first at \(2,\)"),
        (
            {"w": np.full((2, 2), -3e38, np.float32)},
            {"w": np.full((2, 2), 3e38, np.float32)},
            "the change of 'w' overflows float32; store the inputs as F64",
        ),
    ],
)
def test_checkpoints_that_do_not_make_a_change_are_refused(base: Any, tuned: Any, message: str, tmp_path: Path):
    paths = pair(tmp_path, base, tuned)
    with pytest.raises(ft.InputError, match=message):
        ft.extract(*paths, tmp_path / "a")
    assert not (tmp_path / "a").exists()
    assert {p.name for p in tmp_path.iterdir()} == {"base.safetensors", "tuned.safetensors"}


def test_an_infinity_that_did_not_change_is_no_matter(tmp_path: Path):
    mask = np.triu(np.full((3, 3), -np.inf), 1)
    paths = pair(tmp_path, {"mask": mask, "w": np.zeros((3, 3))}, {"mask": mask, "w": np.ones((3, 3))})
    assert ft.extract(*paths, tmp_path / "a", ranks=1)["mask"].reason == "unchanged"


def test_the_output_may_not_be_an_input(tmp_path: Path):
    base, tuned = pair(tmp_path, {"w": np.zeros((3, 3))}, {"w": np.ones((3, 3))})
    for out in (base, tmp_path, tmp_path.parent):
        with pytest.raises(ValueError, match="is or holds the input"):
            ft.extract(base, tuned, out, overwrite=True)
    with pytest.raises(ValueError, match="out is None; pass a directory, or dry_run=True"):
        ft.extract(base, tuned, None)


def test_a_disk_without_room_is_noticed_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    paths = pair(tmp_path, {"w": np.zeros((3, 3))}, {"w": np.ones((3, 3))})
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(OSError, match=r"the result takes 1.05 MB, but the disk has 1 kB free"):
        ft.extract(*paths, tmp_path / "a", ranks=1)
    assert {p.name for p in tmp_path.iterdir()} == {"base.safetensors", "tuned.safetensors"}


@pytest.mark.parametrize("which", ["base", "tuned"])
def test_an_input_that_changes_between_the_passes_is_noticed(which: str, tmp_path: Path):
    paths = pair(tmp_path, {"w": np.zeros((3, 3))}, {"w": np.ones((3, 3))})

    def meddle(phase: str, done: int, total: int, name: str) -> None:
        if phase == "decomposing":
            save(tmp_path / f"{which}.safetensors", {"w": np.full((3, 3), 2.0)})

    with pytest.raises(ft.InputError, match="changed while it was being read"):
        ft.extract(*paths, tmp_path / "a", ranks=1, progress=meddle)
    assert not (tmp_path / "a").exists()


def test_an_interrupt_leaves_nothing_behind(tmp_path: Path):
    paths = pair(tmp_path, {"w": np.zeros((3, 3))}, {"w": np.ones((3, 3))})

    def interrupt(phase: str, done: int, total: int, name: str) -> None:
        if phase == "decomposing":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ft.extract(*paths, tmp_path / "a", ranks=1, progress=interrupt)
    assert {p.name for p in tmp_path.iterdir()} == {"base.safetensors", "tuned.safetensors"}


# Models ---------------------------------------------------------------------------------------------------------------


def test_sharded_models_and_tied_names_are_read_and_written_as_they_are(tmp_path: Path):
    a, b = normal((8, 6), 0), normal((6, 4), 1)
    base = save_sharded(tmp_path / "base", {"x-1.safetensors": {"a": a}, "x-2.safetensors": {"b": b, "c": b}})
    tuned = save(tmp_path / "tuned.safetensors", {"a": a + 1, "b": b + 1, "c": b}, {"head": "a"})
    report = ft.extract(base, tuned, tmp_path / "adapter", rtol=1e-4)
    assert report.options["aliases"] == {"head": "a"}
    ft.merge_checkpoint(base, tmp_path / "adapter", tmp_path / "merged")
    assert {p.name for p in (tmp_path / "merged").iterdir()} == {
        "x-1.safetensors",
        "x-2.safetensors",
        "model.safetensors.index.json",
    }
    merged = load(tmp_path / "merged")
    assert distance(merged["a"], a + 1) < 1e-3
    assert bits(merged["c"]) == bits(b)


def test_a_whole_network_computes_the_same_after_extract_and_merge(tmp_path: Path):
    def network() -> torch.nn.Module:
        torch.manual_seed(0)
        conv = torch.nn.Conv2d(4, 8, 3, groups=2, dilation=2, padding=2, padding_mode="circular")
        depthwise = torch.nn.Conv2d(8, 8, 5, groups=8, padding=2)
        up = torch.nn.ConvTranspose2d(8, 6, 4, stride=2, groups=2)
        return torch.nn.Sequential(conv, torch.nn.BatchNorm2d(8), torch.nn.GELU(), depthwise, up).double()

    base, tuned = network(), network()
    with torch.no_grad():
        for k, parameter in enumerate(tuned.parameters()):
            parameter += 0.1 * normal(tuple(parameter.shape), k, torch.float64)
        tuned(normal((4, 4, 9, 9), 99, torch.float64))  # moves the statistics and the counter of the norm
    paths = pair(tmp_path, base.state_dict(), tuned.state_dict())
    ft.extract(*paths, tmp_path / "adapter", ranks=1000, dtype="float64")
    ft.merge_checkpoint(paths[0], tmp_path / "adapter", tmp_path / "merged.safetensors")
    base.load_state_dict(load(tmp_path / "merged.safetensors"))
    x = normal((2, 4, 9, 9), 7, torch.float64)
    torch.testing.assert_close(base.eval()(x), tuned.eval()(x), rtol=1e-10, atol=1e-10)


MEASURED = """
import pathlib, sys
import flora_tensor as ft
criterion = {"ranks": 2} if sys.argv[5] == "ranks" else {"max_ratio": 0.01}
ft.extract(sys.argv[1], sys.argv[2], sys.argv[3], **criterion)
ft.merge_checkpoint(sys.argv[1], sys.argv[3], sys.argv[4], max_shard_size=10**8)
# Not ru_maxrss, which a process inherits from the one that started it.
print(pathlib.Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
"""


def sparse_file(path: Path, shapes: dict[str, tuple[int, int]], corner: float) -> Path:
    """Write float32 tensors that are zero but for a corner; zeros take no room on the disk and none in the cache."""
    header, position = {}, 0
    for name, (rows, columns) in shapes.items():
        header[name] = {"dtype": "F32", "shape": [rows, columns]}
        header[name]["data_offsets"] = [position, position + 4 * rows * columns]
        position += 4 * rows * columns
    with path.open("wb") as file:
        file.write(raw(header))
        start = file.tell()
        for name, (_, columns) in shapes.items():
            for row in range(8):
                file.seek(start + header[name]["data_offsets"][0] + 4 * row * columns)
                file.write(np.full(8, corner + row, np.float32).tobytes())
        file.truncate(start + position)
    return path


@pytest.mark.parametrize("criterion", ["ranks", "ratio"])
def test_memory_is_that_of_one_tensor_whatever_the_model(criterion: str, tmp_path: Path):
    largest = (16384, 512)
    shapes = {f"layers.{k}.weight": (8192, 256) for k in range(36)} | {"embedding.weight": largest}
    paths = [sparse_file(tmp_path / f"{n}.safetensors", shapes, c) for n, c in (("base", 1.0), ("tuned", 2.5))]
    command = [sys.executable, "-c", MEASURED, *map(str, paths), str(tmp_path / "a"), str(tmp_path / "m"), criterion]
    used = 1024 * int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    model = sum(4 * rows * columns for rows, columns in shapes.values())
    limit = 4 * 4 * math.prod(largest) + 300 * 10**6
    assert 2 * model > 1.5 * limit  # a run that held both models would be found out
    assert used < limit


def test_a_table_counts_layers_as_people_do_and_one_long_name_widens_no_other_line():
    rows = [TensorRow(name, "left out", reason="no") for name in ("layers.10.w", "layers.9.w", "n" * 3000)]
    lines = ft.ExtractionReport(tuple(rows), 0, 0, 0, 0.0).to_table().splitlines()
    assert [line.split(" ")[0] for line in lines[2:5]] == ["layers.9.w", "layers.10.w", "n" * 3000]
    assert max(len(line) for line in lines[:4]) < 100


def test_a_report_answers_by_name_and_writes_no_infinities():
    row = TensorRow("w", "tucker", delta_norm=math.inf, relative_error=math.nan)
    report = ft.ExtractionReport((row,), 0, 0, 0, math.nan)
    assert report["w"] is row
    assert report.ratio == 0
    assert json.loads(report.to_json())["tensors"][0]["delta_norm"] is None
    with pytest.raises(KeyError):
        report["v"]
    assert r"\x1b" in ft.ExtractionReport((TensorRow("\x1b[2J", "whole"),), 0, 0, 0, 0.0).to_table()
