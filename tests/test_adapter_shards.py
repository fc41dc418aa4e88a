"""Adapters in several files: the same numbers as in one, whole or not at all, and nothing but what the index says."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import nn

import flora_tensor as ft
import flora_torch
from checkpoints import load, run, save

MODEL, INDEX = "adapter_model.safetensors", "adapter_model.safetensors.index.json"
LIMIT = 200
Damage = Any


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def shards(directory: Path) -> list[Path]:
    return sorted(directory.glob("adapter_model-*.safetensors"))


def tucker(shape: tuple[int, ...], ranks: tuple[int, ...], seed: int) -> ft.TuckerTensor:
    rng = np.random.default_rng(seed)
    return ft.TuckerTensor(rng.standard_normal(ranks), tuple(rng.standard_normal((n, r)) for n, r in zip(shape, ranks)))


def adapter() -> ft.Adapter:
    """Weights of several types, a magnitude, a tensor stored whole, and a stack of three layers."""
    names = [f"layers.{k}.fc.weight" for k in range(3)]
    plain = ft.Adapter(
        {"conv.weight": tucker((6, 4, 3, 3), (3, 2, 2, 2), 0), "fc.weight": tucker((8, 5), (2, 2), 1)},
        scales={"fc.weight": 0.5},
        whole={"fc.bias": np.arange(8, dtype=np.float32)},
        dtypes={"conv.weight": "BF16", "fc.weight": "F32"},
        magnitudes={"fc.weight": np.arange(1.0, 9.0)},
        channels={"fc.weight": (0, 1)},
    )
    joint = tucker((3, 7, 5), (3, 2, 2), 2)
    both = ft.Adapter(
        {**plain, "layers.*.fc.weight": joint},
        {**plain.arrangements, "layers.*.fc.weight": ft.Arrangement("layer o i")},
        plain.scales,
        {**plain.shapes, "layers.*.fc.weight": (3, 7, 5)},
        plain.whole,
        {},
        plain.dtypes,
        (),
        (),
        plain.magnitudes,
        plain.channels,
    )
    return both.with_stacks({"layers.*.fc.weight": names})


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """Two checkpoints of six layers with one row and one column space, a kernel and a bias."""
    rng = np.random.default_rng(0)
    u, v = rng.standard_normal((16, 2)), rng.standard_normal((2, 12))
    base = {f"layers.{k}.fc.weight": rng.standard_normal((16, 12)).astype(np.float32) for k in range(6)}
    tuned = {n: w + (u @ rng.standard_normal((2, 2)) @ v).astype(np.float32) for n, w in base.items()}
    for name, shape in (("conv.weight", (8, 6, 3, 3)), ("bias", (5,))):
        base[name] = np.zeros(shape, np.float32)
        tuned[name] = rng.standard_normal(shape).astype(np.float32)
    return save(tmp_path / "base.safetensors", base), save(tmp_path / "tuned.safetensors", tuned)


def assert_same(a: ft.Adapter, b: ft.Adapter) -> None:
    assert list(a.stacks) == list(b.stacks)
    assert set(a) == set(b)
    for name, tensor in a.items():
        for x, y in zip((tensor.core, *tensor.factors), (b[name].core, *b[name].factors), strict=True):
            np.testing.assert_array_equal(x, y)
    for mine, other in ((a.whole, b.whole), (a.magnitudes, b.magnitudes)):
        assert mine.keys() == other.keys()
        for name, array in mine.items():
            np.testing.assert_array_equal(array, other[name])
    assert (a.scales, a.shapes, a.dtypes, a.channels) == (b.scales, b.shapes, b.dtypes, b.channels)
    assert {n: s.members for n, s in a.stacks.items()} == {n: s.members for n, s in b.stacks.items()}


@pytest.mark.parametrize("limit", [1, LIMIT, 10**6])
def test_shards_hold_the_bits_of_the_single_file_within_the_limit(limit: int, tmp_path: Path):
    ft.save_adapter(tmp_path / "one", adapter())
    directory = ft.save_adapter(tmp_path / "many", adapter(), max_shard_size=limit)
    if limit == 10**6:  # nothing to split
        assert content(directory) == content(tmp_path / "one")
        return
    single, parts = load(tmp_path / "one" / MODEL), [load(path) for path in shards(directory)]
    count = len(parts)
    assert count == len(single) if limit == 1 else 2 < count < len(single)
    assert [p.name for p in shards(directory)] == [
        f"adapter_model-{k:05d}-of-{count:05d}.safetensors" for k in range(1, count + 1)
    ]
    assert sum(map(len, parts)) == len(single)
    for part in parts:
        assert len(part) == 1 or sum(t.nbytes for t in part.values()) <= limit
        for name, value in part.items():
            assert value.dtype == single[name].dtype
            assert torch.equal(value, single[name])
    index = json.loads((directory / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in single.values())
    assert index["weight_map"] == {n: p.name for p, part in zip(shards(directory), parts) for n in part}
    with safe_open(shards(directory)[-1], "np") as last, safe_open(tmp_path / "one" / MODEL, "np") as one:
        assert last.metadata() == one.metadata()
    assert_same(ft.load_adapter(directory), ft.load_adapter(tmp_path / "one"))
    assert (directory / "adapter_config.json").read_bytes() == (tmp_path / "one" / "adapter_config.json").read_bytes()
    # The same adapter gives the same bytes: whatever its order, and after it was read.
    again = ft.save_adapter(tmp_path / "again", ft.load_adapter(directory), max_shard_size=limit)
    assert content(again) == content(directory)


def test_every_command_reads_shards_as_it_reads_one_file(pair: tuple[Path, Path], tmp_path: Path):
    sizes = {"one": [], "many": ["--max-shard-size", "0.4kB"]}
    for name, option in sizes.items():
        stacked = ["--stack", "layers.*.fc.weight", "--max-ratio", "30%"]
        assert run("extract", *pair, "-o", tmp_path / name, *stacked, *option).exit_code == 0
    one, many = tmp_path / "one", tmp_path / "many"
    assert len(shards(many)) > 2
    assert not (many / MODEL).exists()
    assert ft.load_adapter(many).stacks
    for file in ("adapter_config.json", "extraction_report.json"):
        assert (one / file).read_bytes() == (many / file).read_bytes()
    assert run("inspect", many, "--json").stdout == run("inspect", one, "--json").stdout
    commands = [
        ("merge", pair[0], "$", "-o"),
        ("round", "$", "--max-ratio", "10%", "-o"),
        ("add", "$", "$", "--weights", ".7", ".3", "--base", pair[0], "-o"),
        ("subtract", "$", tmp_path / "one1", "--base", pair[0], "-o"),
        ("scale", "$", "0.5", "--base", pair[0], "-o"),
        ("convert", "$", "--to", "flora", "-o"),
        ("convert", "$", "--to", "peft-lora", "-o"),
    ]
    for k, command in enumerate(commands):
        for source in (one, many):
            words = [source if word == "$" else word for word in command]
            assert run(*words, tmp_path / f"{source.name}{k}").exit_code == 0, command
        assert content(tmp_path / f"many{k}") == content(tmp_path / f"one{k}"), command


def test_every_command_that_writes_an_adapter_splits_it(tmp_path: Path):
    plain = ft.Adapter(dict(adapter()))
    twice = ft.Adapter({name: ft.scale(tensor, 2) for name, tensor in plain.items()})
    source, other = ft.save_adapter(tmp_path / "a", plain), ft.save_adapter(tmp_path / "b", twice)
    commands = [
        ("round", source, "--rtol", "0.3"),
        ("add", source, other),
        ("subtract", other, source),
        ("scale", source, "0.5"),
        ("convert", source, "--to", "flora"),
    ]
    for k, command in enumerate(commands):
        one, many = tmp_path / f"one{k}", tmp_path / f"many{k}"
        assert run(*command, "-o", one).exit_code == 0
        assert run(*command, "-o", many, "--max-shard-size", "0.2kB").exit_code == 0
        assert len(shards(many)) > 1
        assert all(len(load(p)) == 1 or sum(t.nbytes for t in load(p).values()) <= 200 for p in shards(many))
        assert_same(ft.load_adapter(many), ft.load_adapter(one))
    refused = run("convert", source, tmp_path / "lora", "--to", "peft-lora", "--max-shard-size", "1kB")
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert "--max-shard-size splits adapters of this library, not peft-lora; leave it out" in refused.stderr


def test_a_model_takes_shards_as_it_takes_one_file(tmp_path: Path):
    def model() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4))

    source, reader = model(), model()
    flora_torch.attach(source, ranks=2)
    for parameter in flora_torch.adapter_parameters(source):
        nn.init.normal_(parameter)
    directory = flora_torch.save_adapter(source, tmp_path / "a", max_shard_size=100)
    assert len(shards(directory)) > 1
    flora_torch.load_adapter(reader, directory)
    for mine, other in zip(flora_torch.adapter_parameters(source), flora_torch.adapter_parameters(reader), strict=True):
        assert torch.equal(mine, other)
    attached = model()
    flora_torch.attach_adapter(attached, directory)
    x = torch.randn(3, 8)
    assert torch.equal(attached(x), source(x))


@pytest.mark.parametrize("stop", [3, 9, 12])
def test_an_interrupted_run_ends_in_the_same_shards(stop: int, pair: tuple[Path, Path], tmp_path: Path):
    options: dict[str, Any] = {"max_ratio": 0.3, "stack": "layers.*.fc.weight"}
    ft.extract(*pair, tmp_path / "whole", max_shard_size=400, **options)
    left = iter(range(stop))

    def progress(*_: Any) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):  # how the result is laid out is no reason to compute anything again
        ft.extract(*pair, tmp_path / "out", progress=progress, **options)
    assert not (tmp_path / "out").exists()
    ft.extract(*pair, tmp_path / "out", resume=True, max_shard_size=400, **options)
    assert len(shards(tmp_path / "out")) > 1
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_overwriting_leaves_nothing_of_the_other_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out, small = tmp_path / "a", {"w": tucker((2, 2), (1, 1), 0)}
    ft.save_adapter(out, adapter(), max_shard_size=LIMIT)
    many = content(out)
    with pytest.raises(FileExistsError, match="the directory exists; choose another one, or pass overwrite=True"):
        ft.save_adapter(out, small)
    ft.save_adapter(out, small, overwrite=True)
    assert set(content(out)) == {"adapter_config.json", MODEL}
    ft.save_adapter(out, adapter(), max_shard_size=LIMIT, overwrite=True)
    assert content(out) == many

    def fail(*arguments: Any, **options: Any) -> None:
        raise OSError("the disk is gone")

    monkeypatch.setattr("flora_tensor.checkpoint_writer.write_file", fail)  # the index, after every shard
    with pytest.raises(OSError, match="the disk is gone"):
        ft.save_adapter(out, adapter(), max_shard_size=1, overwrite=True)
    assert content(out) == many
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    (out / "model-00001-of-00002.safetensors").write_bytes(b"")  # another program's
    with pytest.raises(FileExistsError, match=r"holds 'model-00001-of-00002.safetensors', which is not of its making"):
        ft.save_adapter(out, small, overwrite=True)


def test_a_size_that_no_file_can_keep_is_refused_before_anything_is_read(tmp_path: Path):
    gone = tmp_path / "gone.safetensors"
    with pytest.raises(ValueError, match="extract: max_shard_size is 0; pass at least 1 byte"):
        ft.extract(gone, gone, tmp_path / "a", max_shard_size=0)
    with pytest.raises(TypeError, match="extract: max_shard_size is '2GB'; pass an integer"):
        ft.extract(gone, gone, tmp_path / "a", max_shard_size="2GB")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="save_adapter: max_shard_size is -1; pass at least 1 byte"):
        ft.save_adapter(tmp_path / "a", adapter(), max_shard_size=-1)
    with pytest.raises(ValueError, match="merge: max_shard_size is 0; pass at least 1 byte"):
        ft.merge_checkpoint(gone, adapter(), tmp_path / "a", max_shard_size=0)
    assert not list(tmp_path.iterdir())


def edit(directory: Path, name: str, shard: str) -> None:
    """Let the index say that a tensor is in another file."""
    index = json.loads((directory / INDEX).read_text())
    index["weight_map"][name] = shard
    (directory / INDEX).write_text(json.dumps(index))


def move_out(directory: Path) -> None:
    first = shards(directory)[0]
    first.rename(directory.parent / "outside.safetensors")
    first.symlink_to(directory.parent / "outside.safetensors")


def pickled(directory: Path) -> None:
    """Give a shard the name of a pickle file, in the index too."""
    name = shards(directory)[0].name
    (directory / name).rename(directory / "x.bin")
    (directory / INDEX).write_text((directory / INDEX).read_text().replace(name, "x.bin"))


def twice(directory: Path) -> None:
    """Store a tensor of the first shard in the second too; the index names one place for it."""
    first, second = (load(path) for path in shards(directory)[:2])
    save(shards(directory)[1], {**second, min(first): first[min(first)]})


def of_type(directory: Path, value: Any) -> None:
    path = next(p for p in shards(directory) if BIAS in load(p))
    save(path, load(path) | {BIAS: value})


BIAS = "base_model.model.fc.bias"
DAMAGES: dict[str, tuple[Damage, str]] = {
    "missing shard": (lambda d: shards(d)[1].unlink(), r"the shard 'adapter_model-00002-of-.*' does not exist"),
    "promised key": (lambda d: edit(d, "more", shards(d)[0].name), r"-00001-.* lacks 'more', which the index promises"),
    "name above": (lambda d: edit(d, BIAS, "../m.safetensors"), "the shard name '../m.safetensors' leaves"),
    "name at the root": (lambda d: edit(d, BIAS, "/tmp/m.safetensors"), "the shard name '/tmp/m.safetensors' leaves"),
    "link": (move_out, r"is a link to .*outside.safetensors, outside"),
    "unknown key": (twice, "which the index does not know"),
    "pickle": (pickled, r"x.bin: a pickle file, which can run code when it is read; convert it to safetensors$"),
    "truncated shard": (lambda d: os.truncate(shards(d)[0], shards(d)[0].stat().st_size - 1), "it is truncated"),
    "index of numbers": (lambda d: (d / INDEX).write_text('{"weight_map": {"a": 1}}'), "weight_map must be a table"),
    "empty index": (lambda d: (d / INDEX).write_text('{"weight_map": {}}'), "weight_map must be a table"),
    "no JSON": (lambda d: (d / INDEX).write_text("{"), r"index.json: not valid JSON"),
    "complex": (lambda d: of_type(d, torch.ones(8, dtype=torch.complex64)), "is of type C64; an adapter holds real"),
    "infinite": (lambda d: of_type(d, torch.full((8,), torch.inf)), r"-of-.*safetensors: tensor .*has NaN or infinite"),
    "no index": (lambda d: (d / INDEX).unlink(), r"has no adapter_model.safetensors and no adapter_model.safetensors"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_shards_that_contradict_their_index_are_refused(damage: str, tmp_path: Path):
    directory = ft.save_adapter(tmp_path / "adapter", adapter(), max_shard_size=LIMIT)
    harm, message = DAMAGES[damage]
    harm(directory)
    for strict in (True, False):  # what an index promises is no matter of taste
        with pytest.raises(ft.InputError, match=message):
            ft.load_adapter(directory, strict=strict)
    result = run("inspect", directory)
    assert (result.exit_code, result.stdout, result.stderr.count("error: ")) == (3, "", 1)


def test_an_index_beyond_the_limit_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    directory = ft.save_adapter(tmp_path / "adapter", adapter(), max_shard_size=1)
    size = (directory / "adapter_config.json").stat().st_size
    assert (directory / INDEX).stat().st_size < size + 10**4
    (directory / INDEX).write_text((directory / INDEX).read_text() + " " * 10**4)
    monkeypatch.setattr("flora_tensor._files.MAX_JSON_BYTES", size)
    with pytest.raises(ft.InputError, match=r"index.json: more than \d+ bytes; a file of this kind is smaller"):
        ft.load_adapter(directory)


def test_keys_that_config_and_index_do_not_share_are_refused_or_listed(tmp_path: Path):
    directory = ft.save_adapter(tmp_path / "adapter", adapter(), max_shard_size=LIMIT)
    path = next(p for p in shards(directory) if BIAS in load(p))
    save(path, {("stray" if n == BIAS else n): t for n, t in load(path).items()})
    index = json.loads((directory / INDEX).read_text())
    index["weight_map"]["stray"] = index["weight_map"].pop(BIAS)
    (directory / INDEX).write_text(json.dumps(index))
    with pytest.raises(ft.InputError, match=r"index.json: lacks '.*fc.bias' and has the unknown 'stray'"):
        ft.load_adapter(directory)
    found = ft.load_adapter(directory, strict=False)
    assert (found.missing_keys, found.unexpected_keys) == ((BIAS,), ("stray",))
    assert set(found) == set(adapter())
