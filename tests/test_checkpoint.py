"""Checkpoints read and written one tensor at a time."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import flora_tensor as ft
from checkpoints import bits, load, run, save, save_pipeline, save_sharded
from flora_tensor.checkpoint import TensorInfo
from flora_tensor.checkpoint_writer import plan_shards, write_checkpoint
from support import optional

torch = optional("torch")

ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


def two_shards(directory: Path, **index: Any) -> Path:
    a, b = np.arange(4.0, dtype=np.float32), np.arange(6.0).reshape(2, 3)
    return save_sharded(directory, {ONE: {"a": a}, TWO: {"b": b}}, **index)


def test_a_file_an_index_and_a_directory_open_alike(tmp_path: Path):
    directory = two_shards(tmp_path / "m")
    for path in (directory, directory / INDEX):
        checkpoint = ft.open_checkpoint(path)
        assert checkpoint.names() == ("a", "b")
        assert (len(checkpoint), "a" in checkpoint, "c" in checkpoint) == (2, True, False)
        assert checkpoint.n_bytes == 4 * 4 + 6 * 8
        np.testing.assert_array_equal(checkpoint.read("b"), np.arange(6.0).reshape(2, 3))
        assert checkpoint.shard_of("b").name == TWO
    single = save(tmp_path / "s" / "model.safetensors", {"a": np.ones(2)})
    assert ft.open_checkpoint(single).names() == ft.open_checkpoint(single.parent).names() == ("a",)
    other = save(tmp_path / "o" / "diffusion_pytorch_model.safetensors", {"a": np.ones(2)})
    assert ft.open_checkpoint(other.parent).names() == ("a",)
    with pytest.raises(KeyError, match="no tensor 'zzz'"):
        ft.open_checkpoint(single).read("zzz")


def test_sixteen_bit_floats_are_read_as_float32(tmp_path: Path):
    x = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    tensors = {"bf16": x.bfloat16(), "f16": x.half(), "f32": x, "f64": x.double(), "f8": x.to(torch.float8_e8m0fnu)}
    checkpoint = ft.open_checkpoint(save(tmp_path / "m.safetensors", tensors))
    for name in ("bf16", "f16", "f32"):
        assert checkpoint.read(name).dtype == np.float32
        np.testing.assert_array_equal(checkpoint.read(name), tensors[name].float().numpy())
    np.testing.assert_array_equal(checkpoint.read("f64"), tensors["f64"].numpy())
    assert checkpoint.info("f8").dtype == "F8_E8M0"
    assert checkpoint.read_raw("f8").tobytes() == bits(tensors["f8"])
    with pytest.raises(ft.InputError, match="tensor 'f8' is of type F8_E8M0, which can only be copied"):
        checkpoint.read("f8")


@pytest.mark.parametrize(
    "name", ["../m.safetensors", "/tmp/m.safetensors", "a/../../m", "C:m", "C:/m", "a\\b", "a\0b", ""]
)
def test_shard_names_that_leave_the_directory_are_refused_by_name(name: str, tmp_path: Path):
    two_shards(tmp_path / "m", weight_map={"a": ONE, "b": name})
    with pytest.raises(ft.InputError, match="leaves the model's directory; it is refused"):
        ft.open_checkpoint(tmp_path / "m")


def test_linked_shards_are_legal_in_the_hub_s_cache_and_nowhere_else(tmp_path: Path):
    blobs, snapshot = tmp_path / "models--x" / "blobs", tmp_path / "models--x" / "snapshots" / "abc"
    two_shards(blobs)
    snapshot.mkdir(parents=True)
    for file in (ONE, TWO, INDEX):
        (snapshot / file).symlink_to(Path("../../blobs") / file)
    assert ft.open_checkpoint(snapshot).names() == ("a", "b")
    assert ft.open_checkpoint(snapshot / INDEX).names() == ("a", "b")
    (snapshot / TWO).unlink()
    outside = save(tmp_path / "outside.safetensors", {"b": np.ones(2)})
    (snapshot / TWO).symlink_to(outside)
    with pytest.raises(ft.InputError, match=r"is a link to .*outside.safetensors, outside the model's directory"):
        ft.open_checkpoint(snapshot)
    inside = two_shards(tmp_path / "m")
    (inside / TWO).rename(inside / "real")
    (inside / TWO).symlink_to("real")
    assert ft.open_checkpoint(inside).names() == ("a", "b")


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": ONE, "b": "gone.safetensors"}, "the shard 'gone.safetensors' does not exist"),
        ({"a": ONE, "b": TWO, "c": TWO}, f"{TWO} lacks 'c', which the index promises"),
        ({"a": ONE, "b": ONE}, f"{ONE} lacks 'b'"),
        ({"a": ONE}, None),
        ({}, "weight_map must be a table"),
        ([], "weight_map must be a table"),
        ({"a": 1}, "weight_map must be a table"),
        (None, "weight_map must be a table"),
    ],
)
def test_an_index_and_its_shards_must_agree(weight_map: Any, message: str | None, tmp_path: Path):
    directory = two_shards(tmp_path / "m", weight_map=weight_map)
    if message is None:
        assert ft.open_checkpoint(directory).names() == ("a",)
        save(directory / ONE, {"a": np.ones(4), "stray": np.ones(1)})
        message = f"{ONE} holds 'stray', which the index does not know"
    with pytest.raises(ft.InputError, match=message):
        ft.open_checkpoint(directory)


def test_paths_that_are_no_checkpoint_say_what_is_missing(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="no such file; pass a safetensors file"):
        ft.open_checkpoint(tmp_path / "gone")
    with pytest.raises(ft.InputError, match=r"holds no model.safetensors and no model.safetensors.index.json"):
        ft.open_checkpoint(tmp_path)
    save(tmp_path / "x.safetensors", {"a": np.ones(1)})
    save(tmp_path / "y.safetensors", {"a": np.ones(1)})
    with pytest.raises(ft.InputError, match=r"holds 2 files \*.safetensors and no index; pass one of them"):
        ft.open_checkpoint(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ft.InputError, match="not a regular file"):
        ft.open_checkpoint(tmp_path / "pipe")


@pytest.mark.parametrize("change", ["write", "replace", "truncate", "remove"])
def test_a_file_that_changes_during_the_run_is_noticed(change: str, tmp_path: Path):
    path = save(tmp_path / "m.safetensors", {"a": np.arange(4.0)})
    checkpoint = ft.open_checkpoint(path)
    if change == "write":
        os.utime(path, ns=(1, 1))
    elif change == "replace":
        save(tmp_path / "n.safetensors", {"a": np.arange(4.0)}).replace(path)
    elif change == "truncate":
        os.truncate(path, 50)
    else:
        path.unlink()
    expected = OSError if change == "remove" else ft.InputError
    for read in (lambda: checkpoint.read("a"), checkpoint.check_unchanged, checkpoint.fingerprint):
        with pytest.raises(expected, match=None if change == "remove" else "changed while it was being read"):
            read()


def test_a_fingerprint_tells_checkpoints_apart(tmp_path: Path):
    def made(name: str, **tensors: Any) -> str:
        return ft.open_checkpoint(save(tmp_path / f"{name}.safetensors", tensors)).fingerprint()

    x = np.arange(1000.0)
    first = made("1", a=x, b=x)
    assert made("2", b=x, a=x) == first
    others = [made("3", a=x, c=x), made("4", a=x + 1, b=x), made("5", a=x.reshape(10, 100), b=x)]
    others.append(made("6", a=x.astype(np.float32), b=x))
    assert len({first, *others}) == 5


def test_aliases_are_those_that_the_metadata_records(tmp_path: Path):
    path = save(tmp_path / "m.safetensors", {"emb": np.ones(2)}, {"head": "emb", "format": "pt", "other": "gone"})
    assert ft.open_checkpoint(path).aliases == {"head": "emb"}


# Pipelines ------------------------------------------------------------------------------------------------------------


def test_a_pipeline_is_one_checkpoint_whose_names_begin_with_its_folders(tmp_path: Path):
    unet = {"conv.weight": np.arange(4.0, dtype=np.float32), "conv.bias": np.ones(2)}
    pipeline = ft.open_checkpoint(save_pipeline(tmp_path / "p", unet, {"embed": np.full(3, 7.0)}))
    assert set(pipeline.names()) == {"unet.conv.weight", "unet.conv.bias", "text_encoder.embed"}
    assert pipeline.folders == ("unet", "text_encoder")
    np.testing.assert_array_equal(pipeline.read("unet.conv.weight"), unet["conv.weight"])
    assert pipeline.info("text_encoder.embed").name == "text_encoder.embed"
    assert set(ft.open_checkpoint(tmp_path / "p" / "unet").names()) == set(unet)
    # A cropped one knows its folders too, and tied weights are named as the others.
    save(
        tmp_path / "p" / "text_encoder" / "model.safetensors", {"embed": np.ones(3)}, {"head": "embed", "format": "pt"}
    )
    pipeline = ft.open_checkpoint(tmp_path / "p").cropped({"unet.conv.weight": 2})
    assert pipeline.folder_of("unet.conv.weight") == "unet"
    assert pipeline.aliases == {"text_encoder.head": "text_encoder.embed"}


def test_a_pipeline_of_pickles_is_refused_unless_allowed(tmp_path: Path):
    directory = save_pipeline(tmp_path / "p", {"w": np.ones(2)}, {"embed": np.ones(3)})
    (directory / "text_encoder" / "model.safetensors").unlink()
    torch.save({"embed": torch.ones(3)}, directory / "text_encoder" / "pytorch_model.bin")
    with pytest.raises(ft.InputError, match=r"pytorch_model\.bin: a pickle file"):
        ft.open_checkpoint(directory)
    assert ft.open_checkpoint(directory, allow_pickle=True).read("text_encoder.embed").tolist() == [1, 1, 1]


def test_directories_of_models_that_are_no_pipeline_are_named(tmp_path: Path):
    (tmp_path / "model_index.json").write_text(json.dumps({"unet": ["diffusers", "UNet"], "../up": 1, "a.b": 1}))
    with pytest.raises(ft.InputError, match=r"no folder of those in model_index\.json holds weights"):
        ft.open_checkpoint(tmp_path)
    (tmp_path / "model_index.json").unlink()
    save(tmp_path / "unet" / "model.safetensors", {"a": np.ones(1)})
    with pytest.raises(ft.InputError, match="pass a model's directory or file, such as its folder 'unet'"):
        ft.open_checkpoint(tmp_path)


def test_diffusers_own_file_comes_before_variants_and_its_index_is_known(tmp_path: Path):
    for name, value in (("diffusion_pytorch_model", 1.0), ("diffusion_pytorch_model.fp16", 2.0)):
        save(tmp_path / f"{name}.safetensors", {"a": np.array([value])})
    assert ft.open_checkpoint(tmp_path).read("a").tolist() == [1.0]
    variant = save_sharded(tmp_path / "v", {ONE: {"a": np.ones(1)}, TWO: {"b": np.ones(1)}})
    (variant / INDEX).rename(variant / "diffusion_pytorch_model.safetensors.index.fp16.json")
    assert ft.open_checkpoint(variant).names() == ("a", "b")


# Pickle ---------------------------------------------------------------------------------------------------------------


class Payload:
    """Runs code when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "m.pt", "m.pth", "m.ckpt"])
def test_pickle_files_are_refused_unless_allowed(name: str, tmp_path: Path):
    tensors = {"a": torch.arange(4.0).bfloat16(), "b": torch.arange(6).reshape(2, 3).T, "e": torch.zeros(0, 3)}
    torch.save(tensors, tmp_path / name)
    for path in (tmp_path / name, tmp_path):
        with pytest.raises(ft.InputError, match=r"a pickle file, which can run code.*allow_pickle=True"):
            ft.open_checkpoint(path)
    checkpoint = ft.open_checkpoint(tmp_path / name, allow_pickle=True)
    np.testing.assert_array_equal(checkpoint.read("a"), np.arange(4.0, dtype=np.float32))
    np.testing.assert_array_equal(checkpoint.read("b"), np.arange(6).reshape(2, 3).T)
    assert checkpoint.read("e").shape == (0, 3)
    assert checkpoint.info("a").dtype == "BF16"
    assert checkpoint.fingerprint() == ft.open_checkpoint(tmp_path, allow_pickle=True).fingerprint()
    torch.save({"state_dict": tensors}, tmp_path / name)
    with pytest.raises(ft.InputError, match="changed while it was being read"):
        checkpoint.check_unchanged()
    assert set(ft.open_checkpoint(tmp_path / name, allow_pickle=True).names()) == {"a", "b", "e"}


@pytest.mark.parametrize(("version", "safe"), [("2.5.1+cu121", False), ("2.6.0", True), ("2.10.0.dev1", True)])
def test_pickles_are_read_only_by_versions_that_read_them_safely(version: str, safe: bool, tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    torch.save({"a": torch.ones(2)}, tmp_path / "model.bin")
    monkeypatch.setattr(torch, "__version__", version)
    if safe:
        assert ft.open_checkpoint(tmp_path / "model.bin", allow_pickle=True).names() == ("a",)
    else:
        with pytest.raises(ft.InputError, match=r"safe from PyTorch 2\.6 on, and this is 2\.5\.1.*upgrade"):
            ft.open_checkpoint(tmp_path / "model.bin", allow_pickle=True)


def test_a_pickle_with_code_never_runs_it(tmp_path: Path):
    evil = tmp_path / "evil.pt"
    torch.save({"a": torch.ones(2), "b": Payload(tmp_path / "ran")}, evil)
    with pytest.raises(ft.InputError, match="cannot be read with weights_only=True"):
        ft.open_checkpoint(evil, allow_pickle=True)
    evil.write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    with pytest.raises(ft.InputError, match="cannot be read with weights_only=True"):
        ft.open_checkpoint(evil, allow_pickle=True)
    assert run("diff", evil, evil, "--allow-pickle").exit_code == 3
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda: [torch.ones(1)], "not a table of tensors by name"),
        (lambda: {"a": 1}, "not a table of tensors by name"),
        (lambda: {"a": torch.ones(2, dtype=torch.complex128)}, "of a type that safetensors does not have"),
        (lambda: {"a": torch.eye(2).to_sparse()}, "of a type that safetensors does not have"),
    ],
)
def test_a_pickle_of_something_else_is_refused(content: Callable[[], Any], message: str, tmp_path: Path):
    torch.save(content(), tmp_path / "m.pt")
    with pytest.raises(ft.InputError, match=message):
        ft.open_checkpoint(tmp_path / "m.pt", allow_pickle=True)


# Writing --------------------------------------------------------------------------------------------------------------


def infos(*sizes: int) -> list[TensorInfo]:
    return [TensorInfo(f"t{k}", "U8", (n,), 0, n) for k, n in enumerate(sizes)]


@given(sizes=st.lists(st.integers(0, 50), max_size=12), limit=st.integers(1, 60))
def test_shards_hold_every_tensor_once_in_order_and_keep_the_limit(sizes: list[int], limit: int):
    tensors = infos(*sizes)
    plan = plan_shards(tensors, like=None, max_shard_size=limit)
    assert [info for shard in plan.values() for info in shard] == tensors
    for shard in plan.values():
        assert len(shard) == 1 or sum(info.n_bytes for info in shard) <= limit
    if len(plan) > 1:
        assert list(plan)[-1] == f"model-{len(plan):05d}-of-{len(plan):05d}.safetensors"
    else:
        assert list(plan) == ["model.safetensors"]


def test_shards_are_those_of_a_model_and_keep_their_names(tmp_path: Path):
    source = ft.open_checkpoint(two_shards(tmp_path / "m"))
    plan = plan_shards([source.info(n) for n in source.names()], like=source, max_shard_size=None)
    assert {file: [i.name for i in shard] for file, shard in plan.items()} == {ONE: ["a"], TWO: ["b"]}
    nested = save_sharded(tmp_path / "n", {"x/m.safetensors": {"a": np.ones(1)}, "y/m.safetensors": {"b": np.ones(1)}})
    source = ft.open_checkpoint(nested)
    assert list(plan_shards([source.info(n) for n in source.names()], like=source, max_shard_size=None)) == [ONE, TWO]
    with pytest.raises(ValueError, match="max_shard_size is 0; pass at least 1 byte"):
        plan_shards([], like=None, max_shard_size=0)


def test_a_written_checkpoint_is_read_by_the_public_package(tmp_path: Path):
    layout = {ONE: infos(3, 5)[:1], TWO: infos(3, 5)[1:]}
    with write_checkpoint(tmp_path / "m", layout, metadata={"format": "pt"}) as writer:
        writer.write("t1", np.full(5, 7, np.uint8))
        writer.write("t0", np.full(3, 9, np.uint8))
        with pytest.raises(ValueError, match="'t0' was written before; write each tensor once"):
            writer.write("t0", np.full(3, 9, np.uint8))
    assert {n: t.tolist() for n, t in load(tmp_path / "m").items()} == {"t0": [9] * 3, "t1": [7] * 5}
    index = json.loads((tmp_path / "m" / INDEX).read_text())
    assert index == {"metadata": {"total_size": 8}, "weight_map": {"t0": ONE, "t1": TWO}}
    assert ft.open_checkpoint(tmp_path / "m").names() == ("t0", "t1")


def test_an_incomplete_checkpoint_does_not_appear(tmp_path: Path):
    for out in (tmp_path / "m", tmp_path / "m.safetensors"):
        with (
            pytest.raises(ValueError, match="CheckpointWriter: 't1' not written"),
            write_checkpoint(out, {"model.safetensors": infos(3, 5)}) as writer,
        ):
            writer.write("t0", np.zeros(3, np.uint8))
    with (
        pytest.raises(ValueError, match=r"2 shards for the file .*; pass a directory"),
        write_checkpoint(tmp_path / "m.safetensors", {ONE: infos(3), TWO: infos(3)}),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


def test_an_empty_checkpoint_is_a_file_without_tensors(tmp_path: Path):
    with write_checkpoint(tmp_path / "m.safetensors", {"model.safetensors": []}):
        pass
    assert load(tmp_path / "m.safetensors") == {}


def test_a_file_keeps_its_permissions_and_its_link(tmp_path: Path):
    target = save(tmp_path / "real.safetensors", {"a": np.ones(1)})
    target.chmod(0o604)
    (tmp_path / "link.safetensors").symlink_to(target)
    layout = {"model.safetensors": infos(3)}
    with (
        pytest.raises(FileExistsError, match="the file exists"),
        write_checkpoint(tmp_path / "link.safetensors", layout),
    ):
        pass
    with write_checkpoint(tmp_path / "link.safetensors", layout, overwrite=True) as writer:
        writer.write("t0", np.zeros(3, np.uint8))
    assert (tmp_path / "link.safetensors").is_symlink()
    assert target.stat().st_mode & 0o777 == 0o604
    assert set(load(target)) == {"t0"}
    (tmp_path / "d.safetensors").mkdir()
    with (
        pytest.raises(FileExistsError, match="not a regular file"),
        write_checkpoint(tmp_path / "d.safetensors", layout, overwrite=True),
    ):
        pass


def test_overwriting_a_model_directory_never_removes_other_files(tmp_path: Path):
    directory = two_shards(tmp_path / "m")
    (directory / "config.json").write_text("{}")
    layout = {"model.safetensors": infos(3)}
    with (
        pytest.raises(FileExistsError, match=r"holds 'config.json', which is not of its making"),
        write_checkpoint(directory, layout, overwrite=True),
    ):
        pass
    (directory / "config.json").unlink()
    with write_checkpoint(directory, layout, overwrite=True) as writer:
        writer.write("t0", np.zeros(3, np.uint8))
    assert [p.name for p in directory.iterdir()] == ["model.safetensors"]
