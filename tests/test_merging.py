"""An adapter put into a checkpoint, and checkpoints compared."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import flora_tensor as ft
from checkpoints import bits, load, save, save_pipeline, save_sharded
from flora_tensor.adapter import Adapter
from support import tolerance

INDEX = "unet/diffusion_pytorch_model.safetensors.index.json"


def rank_one(shape: tuple[int, ...], value: float = 1.0, dtype: Any = np.float32) -> ft.TuckerTensor:
    core = np.full((1,) * len(shape), value, dtype)
    return ft.TuckerTensor(core, tuple(np.ones((n, 1), dtype) for n in shape))


def test_the_sum_is_formed_in_float64_and_rounded_once(tmp_path: Path):
    # 1 + 2^-8 + 2^-40 is above bfloat16's tie; through float32 it would be the tie itself, and go to even.
    base = save(tmp_path / "b.safetensors", {"w": torch.ones(2, 2, dtype=torch.bfloat16)})
    ft.merge_checkpoint(base, {"w": rank_one((2, 2), 2**-8 + 2**-40, np.float64)}, tmp_path / "m.safetensors")
    assert load(tmp_path / "m.safetensors")["w"].float().tolist() == [[1 + 2**-7] * 2] * 2


@given(seed=st.integers(0, 1000), scale=st.floats(-4, 4), data=st.data())
def test_merged_weights_are_w_plus_s_delta(
    seed: int, scale: float, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
):
    rng = np.random.default_rng(seed)
    shape = data.draw(st.sampled_from([(4, 6), (4, 3, 2, 2), (5, 2, 3)]))
    arrangement = data.draw(st.sampled_from(ft.Arrangement.candidates(len(shape))))
    dtype = data.draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]))
    arranged = arrangement.shape(shape)
    ranks = tuple(int(rng.integers(1, 4)) for _ in arranged)
    factors = tuple(rng.standard_normal((n, r)) for n, r in zip(arranged, ranks))
    change = ft.TuckerTensor(rng.standard_normal(ranks), factors)
    adapter = Adapter({"w": change}, {"w": arrangement}, {"w": scale}, {"w": shape})
    base = torch.from_numpy(rng.standard_normal(shape)).to(dtype)
    here = tmp_path_factory.mktemp("merge")
    path = save(here / "b.safetensors", {"w": base})
    ft.merge_checkpoint(path, adapter, here / "m.safetensors")
    expected = base.double().numpy() + scale * arrangement.restore(change.to_tensor(), shape)
    merged = load(here / "m.safetensors")["w"]
    assert merged.dtype == dtype
    # One rounding to the stored type, and float64's own in the product of at most five factors.
    unit = {torch.float64: 0.0, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    noise = 1e-13 * (1 + np.abs(expected).max())
    tiny = 2.0**-25 if dtype == torch.float16 else 0.0
    assert np.all(np.abs(merged.double().numpy() - expected) <= unit * np.abs(expected) + noise + tiny)


def test_what_is_not_changed_is_copied_bit_for_bit(tmp_path: Path):
    odd = torch.tensor([math.nan, math.inf, -0.0])
    tensors = {
        "w": torch.zeros(2, 2),
        "odd": odd,
        "fp8": torch.ones(3).to(torch.float8_e8m0fnu),
        "ids": torch.arange(5),
        "void": torch.zeros(0, 2),
    }
    base = save(tmp_path / "b.safetensors", tensors, {"format": "pt", "x": "y"})
    report = ft.merge_checkpoint(base, {"w": rank_one((2, 2))}, tmp_path / "m.safetensors")
    merged = load(tmp_path / "m.safetensors")
    for name in ("odd", "fp8", "ids", "void"):
        assert bits(merged[name]) == bits(tensors[name])
        assert merged[name].dtype == tensors[name].dtype
    assert set(report.copied) == {"odd", "fp8", "ids", "void"}
    assert (report.merged, report.replaced, report.files) == (("w",), (), ("m.safetensors",))
    assert json.loads(report.to_json())["merged"] == ["w"]
    assert ft.open_checkpoint(tmp_path / "m.safetensors").metadata == {"format": "pt", "x": "y"}


def test_an_adapter_of_torch_tensors_merges_too(tmp_path: Path):
    base = save(tmp_path / "b.safetensors", {"w": torch.zeros(2, 2), "b": torch.zeros(2)})
    change = rank_one((2, 2)).map(lambda a: torch.from_numpy(a).bfloat16().requires_grad_())
    ft.merge_checkpoint(base, Adapter({"w": change}, whole={"b": torch.ones(2)}), tmp_path / "m.safetensors")
    assert load(tmp_path / "m.safetensors")["w"].tolist() == [[1, 1], [1, 1]]
    assert load(tmp_path / "m.safetensors")["b"].tolist() == [1, 1]


def test_files_are_divided_as_in_the_base_or_by_size(tmp_path: Path):
    shards = {"a.safetensors": {"w": torch.zeros(2, 2)}, "b.safetensors": {"v": torch.zeros(9), "u": torch.zeros(9)}}
    base = save_sharded(tmp_path / "base", shards)
    change = {"w": rank_one((2, 2))}
    kept = ft.merge_checkpoint(base, change, tmp_path / "kept")
    assert set(kept.files) == {"a.safetensors", "b.safetensors"}
    one = ft.merge_checkpoint(base, change, tmp_path / "one.safetensors")
    assert one.files == ("one.safetensors",)
    small = ft.merge_checkpoint(base, change, tmp_path / "small", max_shard_size=36)
    assert small.files == tuple(f"model-0000{k}-of-00003.safetensors" for k in (1, 2, 3))
    large = ft.merge_checkpoint(base, change, tmp_path / "large", max_shard_size=10**6)
    assert large.files == ("model.safetensors",)
    for out in ("kept", "one.safetensors", "small", "large"):
        assert ft.diff_checkpoints(tmp_path / "kept", tmp_path / out).is_equal
        assert set(load(tmp_path / out)) == {"w", "v", "u"}


def test_a_pickle_base_becomes_safetensors(tmp_path: Path):
    torch.save({"w": torch.zeros(2, 2)}, tmp_path / "b.pt")
    with pytest.raises(ft.InputError, match="a pickle file"):
        ft.merge_checkpoint(tmp_path / "b.pt", {"w": rank_one((2, 2))}, tmp_path / "m")
    ft.merge_checkpoint(tmp_path / "b.pt", {"w": rank_one((2, 2))}, tmp_path / "m", allow_pickle=True)
    assert load(tmp_path / "m")["w"].tolist() == [[1, 1], [1, 1]]


@pytest.mark.parametrize(
    ("base", "adapter", "message"),
    [
        ({"v": torch.zeros(2)}, {"w": rank_one((2, 2)), "x": rank_one((2, 2))}, "lacks 'w', 'x', which the adapter"),
        (
            {
                "m.parametrizations.weight.original0": torch.zeros(2),
                "m.parametrizations.weight.original1": torch.zeros(2),
            },
            {"m.weight": rank_one((2, 2))},
            "lacks 'm.weight', .* the model computes it from other tensors, .* merge the model",
        ),
        ({"w": torch.zeros(2, 3)}, {"w": rank_one((2, 2))}, r"'w' has shape \(2, 3\) in .* changes \(2, 2\)"),
        ({"w": torch.zeros(2, 2, dtype=torch.int8)}, {"w": rank_one((2, 2))}, "of type I8 .* floats only"),
        ({"w": torch.zeros(2, 2).to(torch.float8_e8m0fnu)}, {"w": rank_one((2, 2))}, "of type F8_E8M0 .* floats only"),
        ({"w": torch.full((2, 2), 6e4).half()}, {"w": rank_one((2, 2), 6e4)}, "the sum of 'w' is not finite as F16"),
        ({"w": torch.full((2, 2), 3e38)}, {"w": rank_one((2, 2), 3e38)}, "the sum of 'w' is not finite as F32"),
        ({"b": torch.zeros(2)}, Adapter({}, whole={"b": np.ones(3)}), r"'b' has shape \(2,\) .* changes \(3,\)"),
        ({"b": torch.zeros(2).half()}, Adapter({}, whole={"b": np.full(2, 1e6)}), "stored value of 'b' is not finite"),
        ({"b": torch.zeros(2).int()}, Adapter({}, whole={"b": np.full(2, 0.5)}), "'b' cannot be written as I32"),
        ({"b": torch.zeros(2).to(torch.float8_e8m0fnu)}, Adapter({}, whole={"b": np.ones(2)}), "cannot be replaced"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_before_anything_is_written(
    base: Any, adapter: Any, message: str, tmp_path: Path
):
    path = save(tmp_path / "b.safetensors", base)
    with pytest.raises(ft.InputError, match=message):
        ft.merge_checkpoint(path, adapter, tmp_path / "m")
    assert [p.name for p in tmp_path.iterdir()] == ["b.safetensors"]


def test_another_base_is_noticed(tmp_path: Path):
    base = save(tmp_path / "b.safetensors", {"w": torch.zeros(4, 4)})
    tuned = save(tmp_path / "t.safetensors", {"w": torch.ones(4, 4)})
    ft.extract(base, tuned, tmp_path / "a", ranks=1)
    ft.merge_checkpoint(base, tmp_path / "a", tmp_path / "m.safetensors", verify_base="error")
    for other in (tuned, tmp_path / "m.safetensors"):  # the second is the adapter merged twice
        with pytest.raises(ft.InputError, match="is not the checkpoint that the adapter was extracted from"):
            ft.merge_checkpoint(other, tmp_path / "a", tmp_path / "x", verify_base="error")
        with pytest.warns(ft.FloraWarning, match="their fingerprints differ"):
            ft.merge_checkpoint(other, tmp_path / "a", tmp_path / "x", overwrite=True)
        ft.merge_checkpoint(other, tmp_path / "a", tmp_path / "x", overwrite=True, verify_base="ignore")
    with pytest.raises(ValueError, match="verify_base is 'no'; pass one of 'warn', 'error', 'ignore'"):
        ft.merge_checkpoint(base, tmp_path / "a", tmp_path / "x", verify_base="no")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="is or holds the input"):
        ft.merge_checkpoint(base, tmp_path / "a", base, overwrite=True)


def test_a_base_that_changes_during_the_merge_is_noticed(tmp_path: Path):
    base = save(tmp_path / "b.safetensors", {"w": torch.zeros(4, 4)})

    def meddle(phase: str, done: int, total: int, name: str) -> None:
        save(base, {"w": torch.ones(4, 4)})

    with pytest.raises(ft.InputError, match="changed while it was being read"):
        ft.merge_checkpoint(base, {"w": rank_one((4, 4))}, tmp_path / "m", progress=meddle)
    assert [p.name for p in tmp_path.iterdir()] == ["b.safetensors"]


# Comparison -----------------------------------------------------------------------------------------------------------


def test_a_comparison_has_a_row_for_every_tensor(tmp_path: Path):
    x = torch.arange(6.0).reshape(2, 3)
    a = {
        "same": x,
        "moved": x,
        "gone": x,
        "shape": x,
        "cast": x,
        "fp8": torch.zeros(2).to(torch.float8_e8m0fnu),
        "nan": x,
        "zero": torch.zeros(2),
        "flag": torch.tensor([True, False]),
        "complex": torch.tensor([1 + 1j]),
    }
    b = {n: t.clone() for n, t in a.items() if n != "gone"}
    b |= {
        "moved": x + torch.tensor([0.0, 0.0, 2.0]),
        "new": x,
        "shape": x.T,
        "cast": x.bfloat16(),
        "fp8": torch.ones(2).to(torch.float8_e8m0fnu),
        "nan": x * math.nan,
        "zero": torch.ones(2),
        "flag": torch.tensor([True, True]),
        "complex": torch.tensor([1 - 1j]),
    }
    report = ft.diff_checkpoints(save(tmp_path / "a.safetensors", a), save(tmp_path / "b.safetensors", b))
    assert {row.name: row.status for row in report.rows} == {
        "same": "equal",
        "moved": "changed",
        "gone": "only in A",
        "new": "only in B",
        "shape": "shape differs",
        "cast": "equal",
        "fp8": "changed",
        "nan": "changed",
        "zero": "changed",
        "flag": "changed",
        "complex": "changed",
    }
    moved = report["moved"]
    assert (moved.max_abs, moved.unchanged) == (2.0, 4)
    assert moved.relative_norm == pytest.approx(math.sqrt(8 / 55))
    assert report["zero"].relative_norm == math.inf
    assert report["nan"].max_abs is None
    assert report["fp8"].max_abs is None
    assert report["flag"].unchanged == 1
    assert report["complex"].max_abs == 2.0
    assert not report.is_equal
    content = json.loads(report.to_json())
    assert {row["name"] for row in content["tensors"]} == set(a) | set(b)
    assert "9 of 11 tensors differ" in report.to_table()
    with pytest.raises(KeyError):
        report["other"]


@given(exponent=st.integers(-300, 300), seed=st.integers(0, 99))
def test_norms_neither_overflow_nor_vanish(exponent: int, seed: int, tmp_path_factory: pytest.TempPathFactory):
    rng = np.random.default_rng(seed)
    x, y = rng.standard_normal((2, 3, 4))
    here = tmp_path_factory.mktemp("diff")
    paths = [save(here / f"{k}.safetensors", {"w": np.ldexp(v, 3 * exponent)}) for k, v in enumerate((x, y))]
    row = ft.diff_checkpoints(*paths)["w"]
    if abs(3 * exponent) < 900:
        assert row.relative_norm == pytest.approx(np.linalg.norm(y - x) / np.linalg.norm(x), rel=1e-12)
        assert row.max_abs == np.ldexp(np.abs(y - x).max(), 3 * exponent)


def test_what_a_models_directory_holds_beside_its_weights_is_copied(tmp_path: Path):
    base = save(tmp_path / "base" / "model.safetensors", {"w": torch.zeros(2, 2)}).parent
    kept = {"config.json": "{}", "tokenizer.model": "x", "vocab.txt": "a", "modeling.py": "", "LICENSE": "free"}
    for name, text in {**kept, "model.safetensors.index.json.bak": "", "pytorch_model.bin": "", "notes.md": ""}.items():
        (base / name).write_text(text)
    (base / "deeper.json").mkdir()
    for overwrite in (False, True):
        report = ft.merge_checkpoint(base, {"w": rank_one((2, 2))}, tmp_path / "m", overwrite=overwrite)
        assert report.beside == tuple(sorted(kept))
        written = {path.name: path.read_text() for path in (tmp_path / "m").iterdir() if path.suffix != ".safetensors"}
        assert written == kept
    assert str(report).endswith(
        "model.safetensors beside LICENSE, config.json, modeling.py, tokenizer.model, vocab.txt"
    )
    # Other files are nobody's to remove.
    (tmp_path / "m" / "mine.json").write_text("")
    with pytest.raises(FileExistsError, match=r"mine\.json"):
        ft.merge_checkpoint(base, {"w": rank_one((2, 2))}, tmp_path / "m", overwrite=True)
    ft.merge_checkpoint(base, {"w": rank_one((2, 2))}, tmp_path / "f.safetensors")
    assert not (tmp_path / "f").exists()


def test_a_pipeline_is_extracted_and_merged_folder_by_folder(tmp_path: Path):
    g = torch.Generator().manual_seed(0)
    unet = {f"conv{k}.weight": torch.randn(6, 5, generator=g, dtype=torch.float64) for k in range(3)}
    text = {"fc.weight": torch.randn(4, 3, generator=g), "n": torch.arange(3)}
    base = save_pipeline(tmp_path / "base", unet, text)
    delta = torch.outer(torch.arange(6.0), torch.arange(5.0))
    tuned = save_pipeline(tmp_path / "tuned", {**unet, "conv1.weight": unet["conv1.weight"] + delta}, text)
    report = ft.extract(base, tuned, tmp_path / "adapter", ranks=1)
    assert [row.name for row in report.rows if row.status == "tucker"] == ["unet.conv1.weight"]

    def tree(directory: Path) -> set[str]:
        return {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}

    merged = ft.merge_checkpoint(base, tmp_path / "adapter", tmp_path / "merged")
    assert tree(tmp_path / "merged") == tree(base) == {*merged.files, *merged.beside, INDEX}
    for name in merged.beside:
        assert (tmp_path / "merged" / name).read_bytes() == (base / name).read_bytes()
    assert set(load(tmp_path / "merged" / "unet")) == set(unet)
    # Factors are stored in float32.
    found, atol = load(tmp_path / "merged" / "unet")["conv1.weight"], tolerance("float32", 30, norm=delta.norm())
    np.testing.assert_allclose(found, unet["conv1.weight"] + delta, atol=atol)
    shared = json.loads((base / INDEX).read_text())["weight_map"]
    assert json.loads((tmp_path / "merged" / INDEX).read_text())["weight_map"] == shared
    # By size, every folder is divided for itself.
    small = ft.merge_checkpoint(base, tmp_path / "adapter", tmp_path / "small", max_shard_size=300)
    assert {f"unet/diffusion_pytorch_model-0000{k}-of-00003.safetensors" for k in (1, 2, 3)} < set(small.files)
    assert ft.diff_checkpoints(tmp_path / "merged", tmp_path / "small").is_equal
    with pytest.raises(ValueError, match="a pipeline of unet, text_encoder; pass a directory to write it to"):
        ft.merge_checkpoint(base, tmp_path / "adapter", tmp_path / "m.safetensors")
    with pytest.raises(ft.InputError, match=r"pass the folder of its model, .*unet"):
        ft.merge_checkpoint(base, {"conv1.weight": rank_one((6, 5))}, tmp_path / "other")


def test_files_keep_the_name_that_diffusers_looks_for(tmp_path: Path):
    base = save(
        tmp_path / "base" / "diffusion_pytorch_model.safetensors", {"w": torch.zeros(2, 2), "v": torch.zeros(3)}
    )
    for source in (base, base.parent):
        ft.merge_checkpoint(source, {"w": rank_one((2, 2))}, tmp_path / "m", overwrite=True)
        assert load(tmp_path / "m" / base.name)["w"].tolist() == [[1, 1], [1, 1]]
    ft.merge_checkpoint(base, {"w": rank_one((2, 2))}, tmp_path / "s", max_shard_size=1)
    assert (tmp_path / "s" / "diffusion_pytorch_model.safetensors.index.json").exists()


def test_names_that_differ_by_a_prefix_and_pickle_names_are_told(tmp_path: Path):
    paths = [
        save(
            tmp_path / f"{k}.safetensors",
            {f"{prefix}fc.weight": np.full((4, 4), k + 0.0), "same": np.full((2, 2), k + 0.0)},
        )
        for k, prefix in enumerate(("model.", "module.model."))
    ]
    adapter = {"model.fc.weight": rank_one((4, 4))}
    with pytest.raises(
        ft.InputError, match=r"'model.fc.weight', .*; one side's names begin with 'module.'; pass the base"
    ):
        ft.merge_checkpoint(paths[1], adapter, tmp_path / "merged.safetensors")
    with pytest.raises(
        ValueError, match=r"merge: .*merged.bin is no name of a safetensors file; pass one, or a directory"
    ):
        ft.merge_checkpoint(paths[0], adapter, tmp_path / "merged.bin")
    with pytest.warns(
        ft.FloraWarning, match=r"ranks: only one checkpoint has 'model.fc.weight', .* begin with 'module.'"
    ):
        assert set(ft.study_ranks(*paths).spectra) == {"same"}


@pytest.mark.parametrize("scale", ["fc.weight_scale_inv", "fc.weight_scale", "fc.scale_weight", "fc.scale"])
def test_weights_that_a_tensor_beside_them_scales_are_not_taken_for_numbers(scale: str, tmp_path: Path):
    rng = np.random.default_rng(0)
    tensors = [torch.from_numpy(rng.standard_normal((6, 5))).to(torch.float8_e4m3fn) for _ in range(2)]
    paths = [save(tmp_path / f"{k}.safetensors", {"fc.weight": w, scale: torch.ones(1)}) for k, w in enumerate(tensors)]
    adapter = {"fc.weight": rank_one((6, 5))}
    with pytest.raises(ft.InputError, match=f"merge: 'fc.weight' is of type F8_E4M3 in .* and scaled by '{scale}'"):
        ft.merge_checkpoint(paths[0], adapter, tmp_path / "merged.safetensors")
    with pytest.raises(ft.InputError, match=r"ranks: no selected weight differs .*; 'fc.weight' cannot be compared"):
        ft.study_ranks(*paths)
    row = ft.diff_checkpoints(*paths)["fc.weight"]
    assert (row.status, row.max_abs, row.relative_norm, row.unchanged) == ("changed", None, None, None)
    with (
        pytest.warns(ft.FloraWarning, match="extract: 'fc.weight' changed and cannot be stored"),
        pytest.raises(ft.InputError, match="nothing to extract: no tensor that changed can be stored"),
    ):
        ft.extract(*paths, tmp_path / "adapter")


def test_a_scale_beside_an_ordinary_weight_is_a_tensor_in_its_own_right(tmp_path: Path):
    weights = [torch.full((6, 5), 1.0 + k) for k in range(2)]
    paths = [
        save(tmp_path / f"{k}.safetensors", {"fc.weight": w, "fc.scale": torch.full((6,), 1.0 + k)})
        for k, w in enumerate(weights)
    ]
    ft.extract(*paths, tmp_path / "adapter", ranks=1)
    ft.merge_checkpoint(paths[0], tmp_path / "adapter", tmp_path / "merged.safetensors")
    merged = load(tmp_path / "merged.safetensors")
    assert torch.equal(merged["fc.scale"], torch.full((6,), 2.0))
    torch.testing.assert_close(merged["fc.weight"], weights[1])
