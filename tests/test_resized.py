"""Vocabularies that grew or shrank, there and back."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import flora_tensor as ft
from checkpoints import bits, load, run, save, save_sharded


def normal(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@given(
    before=st.integers(1, 9),
    after=st.integers(1, 9),
    changed=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    criterion=st.sampled_from([{"ranks": 9}, {"max_ratio": 1.0, "noise_floor": None}]),
)
def test_merging_gives_the_tuned_shape_and_the_new_rows_bit_for_bit(
    before: int,
    after: int,
    changed: bool,
    dtype: torch.dtype,
    criterion: dict[str, Any],
    tmp_path_factory: pytest.TempPathFactory,
):
    here = tmp_path_factory.mktemp("resized")
    base = {"emb": normal((before, 6), 0).to(dtype), "bias": normal((before,), 1), "fc": normal((5, 6), 2)}
    common = min(before, after)
    step = normal((common, 6), 3).to(dtype) if changed else torch.zeros(common, 6, dtype=dtype)
    tuned = {
        "emb": torch.cat([base["emb"][:common] + step, normal((after - common, 6), 4).to(dtype)]),
        "bias": torch.cat([base["bias"][:common], normal((after - common,), 5)]),
        "fc": base["fc"] + 1,
    }
    paths = save(here / "b.safetensors", base), save(here / "t.safetensors", tuned)
    report = ft.extract(*paths, here / "a", resized="pad", **criterion)
    assert report["emb"].changed or before == after
    assert report["emb"].status == ("tucker" if changed else "whole" if before != after else "left out")
    if before != after:
        assert f"resized from {before} to {after} rows: those in common are compared" in report["emb"].notes[-1]
    assert report.whole_parameters == max(after - before, 0) * 7
    ft.merge_checkpoint(paths[0], here / "a", here / "m")
    merged = load(here / "m")
    assert {n: (t.dtype, t.shape) for n, t in merged.items()} == {n: (t.dtype, t.shape) for n, t in tuned.items()}
    assert bits(merged["emb"][common:]) == bits(tuned["emb"][common:])
    assert bits(merged["bias"]) == bits(tuned["bias"])
    # Full rank: the sum is as near as half a unit of the stored type, or the rounding of float32 factors.
    unit = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7, torch.float64: 2.0**-23}[dtype]
    scale = float(tuned["emb"].abs().max()) + float(step.abs().max())
    assert torch.allclose(merged["emb"].double(), tuned["emb"].double(), rtol=0, atol=50 * unit * scale)


def pair(here: Path) -> tuple[Path, Path]:
    base = {"emb": normal((9, 4), 0), "fc": normal((5, 4), 1)}
    tuned = {"emb": torch.cat([base["emb"] + 1, normal((3, 4), 2)]), "fc": base["fc"] + 1}
    return save(here / "b.safetensors", base), save(here / "t.safetensors", tuned)


def test_a_resized_tensor_is_refused_skipped_or_padded(tmp_path: Path):
    paths = pair(tmp_path)
    with pytest.raises(ft.InputError, match=r"resized[?] pass resized='pad' \(--resized pad\) to keep its new rows"):
        ft.extract(*paths, tmp_path / "a", ranks=1)
    report = ft.extract(*paths, tmp_path / "skip", ranks=1, resized="skip")
    assert report["emb"].reason == "shape differs: (9, 4) and (12, 4)"
    dry = ft.extract(*paths, None, dry_run=True, ranks=1, resized="pad")
    done = run("extract", *paths, "-o", tmp_path / "pad", "--ranks", "1", "--resized", "pad", "--json")
    rows = {row["name"]: row for row in json.loads(done.stdout)["tensors"]}
    assert rows["emb"]["notes"] == list(dry["emb"].notes)
    assert rows["emb"]["notes"][-1].endswith("3 new rows are stored whole")
    assert rows["emb"]["shape"] == [9, 4]
    config = json.loads((tmp_path / "pad" / "adapter_config.json").read_text())
    assert config["resized"] == {"emb": [9, 12]}
    assert config["whole"] == ["emb.new_rows"]
    other = save(tmp_path / "o.safetensors", {"emb": torch.zeros(9, 5), "fc": torch.zeros(5, 4)})
    with pytest.raises(ft.InputError, match=r"shape \(9, 4\) in .* and \(9, 5\)"):
        ft.extract(paths[0], other, tmp_path / "a", ranks=1, resized="pad")


def test_a_copied_configuration_that_tells_the_old_size_is_warned_of(tmp_path: Path):
    base, tuned = pair(tmp_path)
    (tmp_path / "base").mkdir()
    base = base.rename(tmp_path / "base" / "model.safetensors")
    (base.parent / "config.json").write_text('{"vocab_size": 9}')
    ft.extract(base, tuned, tmp_path / "a", ranks=1, resized="pad")
    with pytest.warns(ft.FloraWarning, match=r"config.json is copied as it is, but 'emb' has 12 rows now, not 9; put"):
        ft.merge_checkpoint(base.parent, tmp_path / "a", tmp_path / "merged")
    assert json.loads((tmp_path / "merged" / "config.json").read_text()) == {"vocab_size": 9}
    # Without the new rows, or as one file, no configuration is copied that could be wrong: warnings are errors here.
    ft.merge_checkpoint(base.parent, tmp_path / "a", tmp_path / "merged.safetensors")
    ft.extract(base, tuned, tmp_path / "same", ranks=1, resized="skip")
    ft.merge_checkpoint(base.parent, tmp_path / "same", tmp_path / "unresized")


def test_workers_shards_and_interrupts_see_the_same_rows(tmp_path: Path):
    paths = pair(tmp_path)
    ft.extract(*paths, tmp_path / "alone", ranks=2, resized="pad")
    with ThreadPoolExecutor(2) as executor:
        ft.extract(*paths, tmp_path / "shared", ranks=2, resized="pad", executor=executor)

    def interrupt(phase: str, done: int, total: int, name: str) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ft.extract(*paths, tmp_path / "again", ranks=2, resized="pad", progress=interrupt)
    ft.extract(*paths, tmp_path / "again", ranks=2, resized="pad", resume=True)
    for other in ("shared", "again"):
        for file in ("adapter_config.json", "adapter_model.safetensors", "extraction_report.json"):
            assert (tmp_path / other / file).read_bytes() == (tmp_path / "alone" / file).read_bytes()
    tensors = load(paths[0])
    sharded = save_sharded(
        tmp_path / "base", {"1.safetensors": {"emb": tensors["emb"]}, "2.safetensors": {"fc": tensors["fc"]}}
    )
    ft.merge_checkpoint(sharded, tmp_path / "alone", tmp_path / "m", max_shard_size=100)
    assert len(list((tmp_path / "m").glob("*.safetensors"))) == 2
    assert load(tmp_path / "m")["emb"].shape == (12, 4)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ([1], "the adapter's table resized must hold two numbers of rows by tensor"),
        ({"emb": [9]}, "must hold two numbers of rows"),
        ({"emb": [9, -1]}, "must hold two numbers of rows"),
        ({"emb": [8, 12]}, r"'emb' must have 8 rows, but in .* it has shape \(9, 4\)"),
        ({"nowhere": [9, 12]}, r"'nowhere' must have 9 rows"),
        ({"emb": [9, 14]}, "the adapter lacks the 5 new rows of 'emb'"),
        ({}, "lacks 'emb.new_rows', which the adapter changes"),
    ],
)
def test_a_table_of_rows_that_does_not_fit_is_refused(table: Any, message: str, tmp_path: Path):
    paths = pair(tmp_path)
    ft.extract(*paths, tmp_path / "a", ranks=1, resized="pad")
    config = tmp_path / "a" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"resized": table}))
    with pytest.raises(ft.InputError, match=message):
        ft.merge_checkpoint(paths[0], tmp_path / "a", tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_new_rows_must_be_finite(tmp_path: Path):
    base, tuned = pair(tmp_path)
    tensors = load(tuned)
    tensors["emb"][11, 3] = np.nan
    save(tuned, tensors)
    with pytest.raises(ft.InputError, match=r"'emb.new_rows' has 1 entries .* the first at \(2, 3\)"):
        ft.extract(base, tuned, tmp_path / "a", ranks=1, resized="pad")


def test_what_cannot_be_stored_makes_no_empty_adapter(tmp_path: Path):
    base = save(tmp_path / "b.safetensors", {"ids": torch.arange(6).reshape(2, 3)})
    tuned = save(tmp_path / "t.safetensors", {"ids": torch.arange(6).reshape(2, 3) + 1})
    with (
        pytest.warns(ft.FloraWarning, match="extract: 'ids' changed and cannot be stored"),
        pytest.raises(ft.InputError, match="nothing to extract: no tensor that changed can be stored; see a dry run"),
    ):
        ft.extract(base, tuned, tmp_path / "a", ranks=1)
    assert {p.name for p in tmp_path.iterdir()} == {"b.safetensors", "t.safetensors"}
