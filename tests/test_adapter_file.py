"""The adapter directory: what is written is read back, and nothing else is read."""

import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import flora_tensor as ft
from checkpoints import entry, load, raw, run, save
from flora_tensor import adapter_file
from flora_tensor.adapter_file import split_key, tensor_key, whole_key
from support import optional

torch = optional("torch")

CONFIG, MODEL = "adapter_config.json", "adapter_model.safetensors"
LAYER = "base_model.model.fc.tucker_update"


def tensor(shape: tuple[int, ...], ranks: tuple[int, ...], dtype: Any = np.float32, seed: int = 0) -> ft.TuckerTensor:
    rng = np.random.default_rng(seed)
    factors = [rng.standard_normal((n, r)).astype(dtype) for n, r in zip(shape, ranks)]
    return ft.TuckerTensor(rng.standard_normal(ranks).astype(dtype), tuple(factors))


def same(a: ft.TuckerTensor, b: ft.TuckerTensor) -> None:
    assert len(a.factors) == len(b.factors)
    for x, y in zip((a.core, *a.factors), (b.core, *b.factors)):
        if x is None or y is None:
            assert x is y
        else:
            np.testing.assert_array_equal(x, y)


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A small adapter, for the tests that damage it."""
    return ft.save_adapter(tmp_path / "adapter", {"fc.weight": tensor((4, 6), (2, 3))})


def edit(directory: Path, **changes: Any) -> None:
    path = directory / CONFIG
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def replace_tensors(directory: Path, changes: dict[str, Any]) -> None:
    tensors = {**load(directory / MODEL), **changes}
    save(directory / MODEL, {n: t for n, t in tensors.items() if t is not None})


NAMES = st.text(alphabet="abWé0_ -", min_size=1, max_size=5).filter(lambda n: n != "tucker_update")
PATHS = st.lists(NAMES, min_size=1, max_size=4).map(".".join)


@given(data=st.data())
def test_what_was_saved_is_loaded_bit_for_bit(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory):
    names = data.draw(st.lists(PATHS, min_size=1, max_size=4, unique=True))
    tensors, arrangements, shapes, scales = {}, {}, {}, {}
    whole: dict[str, np.ndarray] = {}
    for k, name in enumerate(names):
        kind = data.draw(st.sampled_from(["native", "separable", "partial", "whole"]))
        dtype = data.draw(st.sampled_from([np.float32, np.float64]))
        if kind == "whole":
            kinds = [np.float32, np.float64, np.int64, np.bool_]
            whole[name] = np.arange(k + 1).astype(data.draw(st.sampled_from(kinds)))
        elif kind == "separable":
            tensors[name] = tensor((6, 8), (data.draw(st.integers(0, 6)), 2), dtype, k)
            arrangements[name] = ft.Arrangement("(o h) (i w)")
            shapes[name] = (3, 4, 2, 2)
        else:
            made = tensor((3, 4, 2), (2, 5, 2), dtype, k)
            partial = kind == "partial"
            tensors[name] = ft.TuckerTensor(made.core, (made.factors[0], made.factors[1], None)) if partial else made
        if name in tensors and data.draw(st.booleans()):
            scales[name] = data.draw(st.floats(-1e6, 1e6))
    adapter = ft.Adapter(tensors, arrangements, scales, shapes, whole, {"task_type": "CAUSAL_LM", "scale": 0.5})
    directory = tmp_path_factory.mktemp("adapter") / "a"
    ft.save_adapter(directory, adapter)
    back = ft.load_adapter(directory)
    assert set(back) == set(tensors)
    assert set(back.whole) == set(whole)
    for name, value in tensors.items():
        same(back[name], value)
        np.testing.assert_array_equal(back.delta(name), adapter.delta(name))
    for name, array in whole.items():
        np.testing.assert_array_equal(back.whole[name], array)
        assert back.whole[name].dtype == array.dtype
    assert dict(back.scales) == {name: scales.get(name, 0.5) for name in tensors}
    assert dict(back.shapes) == {name: shapes.get(name, t.shape) for name, t in tensors.items()}
    assert {n: a for n, a in back.arrangements.items() if not a.is_native} == arrangements
    assert back.config["task_type"] == "CAUSAL_LM"
    again = directory.with_name("again")
    ft.save_adapter(again, back)
    for file in (CONFIG, MODEL):
        assert (again / file).read_bytes() == (directory / file).read_bytes()


def test_a_delta_is_scaled_and_put_back_into_the_weight_s_own_axes():
    t = tensor((6, 8), (2, 2), np.float64)
    adapter = ft.Adapter({"w": t}, {"w": ft.Arrangement("(o h) (i w)")}, {"w": 3.0}, {"w": (3, 4, 2, 2)})
    expected = 3.0 * t.to_tensor().reshape(3, 2, 4, 2).transpose(0, 2, 1, 3)
    np.testing.assert_allclose(adapter.delta("w"), expected, rtol=1e-13)
    assert adapter.delta("w", dtype=np.float32).dtype == np.float32
    with pytest.raises(KeyError):
        adapter.delta("v")


def test_an_adapter_is_read_only():
    adapter = ft.Adapter({"w": tensor((4, 6), (2, 3))})
    with pytest.raises(TypeError):
        adapter.tensors["v"] = adapter["w"]  # type: ignore[index]
    with pytest.raises(TypeError):
        adapter.scales["w"] = 2.0  # type: ignore[index]


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("fc.weight", "base_model.model.fc.tucker_update.core"),
        ("a.b.in_proj_weight", "base_model.model.a.b.tucker_update.in_proj_weight.core"),
        ("weight", "base_model.model.tucker_update.core"),
        ("emb", "base_model.model.tucker_update.emb.core"),
        ("a.core", "base_model.model.a.tucker_update.core.core"),
        ("a.factor_0", "base_model.model.a.tucker_update.factor_0.core"),
    ],
)
def test_keys_have_the_documented_form(name: str, key: str):
    assert tensor_key(name, "core") == key
    assert split_key(key) == (name, "core")


@given(name=PATHS, part=st.sampled_from(["core", "factor_0", "factor_12"]))
def test_keys_name_one_weight_and_no_other(name: str, part: str):
    assert split_key(tensor_key(name, part)) == (name, part)
    assert split_key(whole_key(name)) == (name, None)


@pytest.mark.parametrize(
    "key",
    [
        "fc.tucker_update.core",
        "base_model.model.",
        f"{LAYER}.factor_x",
        f"{LAYER}.factor_01",
        f"{LAYER}.factor_-1",
        f"{LAYER}.factor_٣",
        f"{LAYER}.weight.core",
        f"{LAYER}.a.b.core",
        f"{LAYER}..core",
        f"{LAYER}.tucker_update.core",
        LAYER,
    ],
)
def test_other_keys_mean_nothing(key: str):
    assert split_key(key) is None


@pytest.mark.parametrize("name", ["", "a.tucker_update", "tucker_update.weight", "a.", "tucker_update"])
def test_names_that_could_be_read_otherwise_are_refused(name: str, tmp_path: Path):
    with pytest.raises(ValueError, match="cannot be stored; rename it"):
        ft.save_adapter(tmp_path / "a", {name: tensor((4, 6), (2, 3))})
    if name != "a.":
        with pytest.raises(ValueError, match=r"the tensor's name .* cannot be stored; rename it"):
            ft.save_adapter(tmp_path / "a", ft.Adapter({}, whole={name: np.ones(2)}))
    assert not (tmp_path / "a").exists()


def test_arrays_of_other_libraries_keep_their_type_in_the_file(tmp_path: Path):
    t = tensor((4, 6), (2, 3)).map(lambda a: torch.from_numpy(a).to(torch.bfloat16).requires_grad_())
    bias = torch.tensor([0.1, 0.2], dtype=torch.float16)
    ft.save_adapter(tmp_path / "a", ft.Adapter({"fc.weight": t}, whole={"fc.bias": bias}))
    stored = load(tmp_path / "a" / MODEL)
    assert stored[f"{LAYER}.core"].dtype == torch.bfloat16
    assert torch.equal(stored["base_model.model.fc.bias"], bias)
    back = ft.load_adapter(tmp_path / "a")
    assert back["fc.weight"].dtype == np.float32
    np.testing.assert_array_equal(back["fc.weight"].core, t.core.detach().float().numpy())
    ft.save_adapter(tmp_path / "b", back)
    assert (tmp_path / "b" / MODEL).read_bytes() == (tmp_path / "a" / MODEL).read_bytes()


def test_conjugated_and_permuted_torch_views_are_stored_as_their_values(tmp_path: Path):
    core = torch.arange(6.0).reshape(3, 2).T
    factor = torch._neg_view(torch.ones(4, 2))
    ft.save_adapter(tmp_path / "a", {"fc.weight": ft.TuckerTensor(core, (factor, None))})
    back = ft.load_adapter(tmp_path / "a")["fc.weight"]
    np.testing.assert_array_equal(back.core, core.numpy())
    np.testing.assert_array_equal(back.factors[0], -np.ones((4, 2)))


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": ...}, "not a flora_tensor adapter: peft_type is None"),
        ({"peft_type": "LORA"}, "not a flora_tensor adapter: peft_type is 'LORA'"),
        ({"format_version": ...}, "not a flora_tensor adapter: format_version is None"),
        ({"format_version": "one"}, "format_version is 'one'; one such as '1.0' is needed"),
        ({"format_version": 1.0}, "format_version is 1.0"),
        ({"format_version": "2.0"}, "format 2.0, but this version reads 1.2; upgrade flora-tensor"),
        ({"scale": "2"}, "scale is '2'; pass a finite number"),
        ({"scale": 1e39}, "scale is 1e[+]39; pass a finite number, below 2.128"),
        ({"scale": True}, "scale is True"),
        ({"scale_pattern": {"fc.weight": None}}, "scale_pattern of 'fc.weight' is None"),
        ({"scale_pattern": [1]}, "scale_pattern must be a table by weight name, not list"),
        ({"rank_pattern": {"fc.weight": [2, 4]}}, r"'fc.weight'.*the config says ranks \(2, 4\).*core \(2, 3\)"),
        ({"rank_pattern": {"fc.weight": "2"}}, "rank_pattern of 'fc.weight' must be a list of non-negative integers"),
        ({"rank_pattern": {"tucker_update.w": [2]}}, "lacks 'tucker_update.w'"),
        ({"rank_pattern": {"gone.weight": [2]}}, "lacks 'base_model.model.gone.tucker_update.core'"),
        ({"weight_shapes": {"fc.weight": [4, 7]}}, r"arranged shape \(4, 7\), but it has core \(2, 3\), factors"),
        ({"weight_shapes": {"fc.weight": [-4, 6]}}, "non-negative integers"),
        ({"whole": "fc.bias"}, "whole must be a list of names"),
        ({"whole": ["fc.bias"]}, "lacks 'base_model.model.fc.bias'"),
        ({"arrangement_pattern": {"fc.weight": "o i"}}, "must have a pattern and positive sizes"),
        ({"arrangement_pattern": {"fc.weight": {"pattern": "o ("}}}, "cannot be read"),
        ({"arrangement_pattern": {"fc.weight": {"pattern": "o i", "sizes": {"o": 0}}}}, "positive sizes"),
        ({"arrangement_pattern": {"fc.weight": {"pattern": "o i h"}}}, "is for weights with 3 axes"),
        ({"magnitude_pattern": {"fc.weight": {"axis": 2}}}, "'fc.weight' must have an axis, 0 or 1, and positive"),
        ({"magnitude_pattern": {"fc.weight": 0}}, "'fc.weight' must have an axis, 0 or 1, and positive groups"),
        ({"magnitude_pattern": {"fc.weight": {"axis": 0}}}, "lacks 'base_model.model.fc.tucker_update.magnitude'"),
    ],
)
def test_a_config_that_contradicts_the_format_or_the_tensors_is_refused(changes: Any, message: str, written: Path):
    edit(written, **changes)
    with pytest.raises(ft.InputError, match=f"(?s){message}"):
        ft.load_adapter(written)
    result = run("inspect", written)
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (3, "", 1)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({f"{LAYER}.core": None}, "lacks 'base_model.model.fc.tucker_update.core'"),
        ({f"{LAYER}.factor_0": None}, r"core \(2, 3\), factors \[None, \(6, 3\)\]; factors \[0\] are missing"),
        ({f"{LAYER}.factor_2": np.ones((2, 2), np.float32)}, "has a factor 2, but core .* no such mode"),
        ({f"{LAYER}.factor_0": np.ones((4, 5), np.float32)}, r"'fc.weight': core \(2, 3\), factors.*do not fit"),
        ({f"{LAYER}.factor_0": np.ones((5, 2), np.float32)}, r"of arranged shape \(4, 6\), but"),
        ({"extra": np.ones(2, np.float32)}, "has the unknown 'extra'; pass strict=False"),
        ({"base_model.model.fc.bias": np.ones(2, np.float32)}, "has the unknown 'base_model.model.fc.bias'"),
        (
            {f"{LAYER}.magnitude": np.ones(4, np.float32)},
            "has the unknown .*tucker_update.magnitude'",
        ),
        ({f"{LAYER}.core": np.full((2, 3), np.nan, np.float32)}, "has NaN or infinite entries; the adapter is damaged"),
        ({f"{LAYER}.core": np.full((2, 3), np.inf)}, "NaN or infinite"),
        (
            {f"{LAYER}.core": np.ones((2, 3), np.int64)},
            "stored as int64; core and factors must be floats",
        ),
        ({f"{LAYER}.core": np.ones((2, 3), np.complex64)}, "of type C64; an adapter holds real numbers"),
    ],
)
def test_tensors_that_do_not_make_up_the_adapter_are_refused(tensors: Any, message: str, written: Path):
    replace_tensors(written, tensors)
    with pytest.raises(ft.InputError, match=message):
        ft.load_adapter(written)


def test_files_that_are_missing_empty_or_no_json_are_refused(written: Path, tmp_path: Path):
    with pytest.raises(FileNotFoundError):
        ft.load_adapter(tmp_path / "nowhere")
    with pytest.raises(ft.InputError, match=r"has no adapter_config.json; it is not a flora_tensor adapter"):
        ft.load_adapter(tmp_path)
    model = (written / MODEL).read_bytes()
    (written / MODEL).write_bytes(raw({}))
    with pytest.raises(ft.InputError, match="holds no tensors; an adapter has at least one"):
        ft.load_adapter(written)
    (written / MODEL).unlink()
    with pytest.raises(
        ft.InputError, match=r"has no adapter_model.safetensors and no .*index.json; the adapter is incomplete"
    ):
        ft.load_adapter(written)
    (written / MODEL).write_bytes(model)
    for text, message in [("[]", "a JSON table is needed, not list"), ('{"a":1,"a":2}', "'a' stands twice")]:
        (written / CONFIG).write_text(text)
        with pytest.raises(ft.InputError, match=message):
            ft.load_adapter(written)


def test_a_json_file_beyond_the_limit_is_not_read(written: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("flora_tensor._files.MAX_JSON_BYTES", 100)
    with pytest.raises(ft.InputError, match="more than 100 bytes"):
        ft.load_adapter(written)


def test_a_header_that_claims_more_than_the_file_has_is_refused_before_anything_is_allocated(written: Path):
    huge = raw({f"{LAYER}.core": entry("F32", [2**20, 2**20], 0, 2**42)}, b"1234")
    (written / MODEL).write_bytes(huge)
    with pytest.raises(ft.InputError, match="truncated"):
        ft.load_adapter(written)


@given(data=st.data())
def test_mutated_adapters_are_read_or_refused(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory):
    directory = tmp_path_factory.mktemp("mutated") / "a"
    ft.save_adapter(directory, ft.Adapter({"fc.weight": tensor((4, 6), (2, 3))}, whole={"fc.bias": np.ones(2)}))
    path = directory / data.draw(st.sampled_from([CONFIG, MODEL]))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(content))
    result = run("inspect", directory)
    assert result.exit_code in (0, 3)
    assert (result.stdout == "") == (result.exit_code == 3)
    assert result.stderr.count("error: ") == (result.exit_code == 3)


def test_without_strict_what_fits_is_loaded_and_the_rest_is_listed(written: Path):
    edit(written, whole=["fc.bias"], rank_pattern={"fc.weight": [2, 3], "gone.weight": [1, 1]})
    lone = "base_model.model.lone.tucker_update.factor_0"
    replace_tensors(written, {"extra": np.ones(2), lone: np.ones((2, 2))})
    adapter = ft.load_adapter(written, strict=False)
    assert list(adapter) == ["fc.weight"]
    assert set(adapter.missing_keys) == {
        "base_model.model.fc.bias",
        "base_model.model.gone.tucker_update.core",
        "base_model.model.lone.tucker_update.core",
    }
    assert adapter.unexpected_keys == ("extra",)


def test_a_newer_minor_format_is_read_with_a_warning(written: Path):
    edit(written, format_version="1.7")
    with pytest.warns(ft.FloraWarning, match=r"format 1.7 is newer than 1.2; what it adds is ignored"):
        ft.load_adapter(written)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda t: ft.Adapter({"w": t}, scales={"w": float("nan")}), "scale of 'w' is nan; pass a finite number"),
        (lambda t: ft.Adapter({"w": t}, scales={"v": 1.0}), "scales names 'v', which has no tensor"),
        (lambda t: ft.Adapter({"w": t}, whole={"w": np.ones(2)}), "'w' is stored whole and as a Tucker tensor"),
        (
            lambda t: ft.Adapter({"w": t}, shapes={"w": (6, 4)}),
            r"'w' has shape \(6, 4\), arranged .*, but its core",
        ),
        (lambda t: ft.Adapter({"w": t}, {"w": ft.Arrangement("(o h) (i w)")}), "does not tell the weight's shape"),
    ],
)
def test_an_adapter_of_parts_that_do_not_fit_is_refused(make: Any, message: str):
    with pytest.raises(ValueError, match=message):
        make(tensor((4, 6), (2, 3)))


def test_nothing_and_what_is_not_finite_is_not_saved(tmp_path: Path):
    with pytest.raises(ValueError, match="the adapter is empty"):
        ft.save_adapter(tmp_path / "a", {})
    bad = ft.TuckerTensor(np.full((1, 1), np.nan), (np.ones((2, 1)), None))
    with pytest.raises(ValueError, match="NaN or infinite entries; an adapter must be finite"):
        ft.save_adapter(tmp_path / "a", {"w": bad})
    large = ft.TuckerTensor(np.full((1, 1), 1e6), (np.ones((2, 1)), None))
    with pytest.raises(ValueError, match="overflows F16; store it as F32"):
        ft.save_adapter(tmp_path / "a", ft.Adapter({"w": large}, dtypes={"w": "F16"}))
    with pytest.raises(ValueError, match="the config cannot be written as JSON"):
        ft.save_adapter(tmp_path / "a", ft.Adapter({"w": tensor((2, 2), (1, 1))}, config={"x": object()}))
    assert list(tmp_path.iterdir()) == []


# Whole or not at all --------------------------------------------------------------------------------------------------


def test_an_existing_directory_is_replaced_only_when_asked_and_only_if_it_is_ours(written: Path):
    old = (written / MODEL).read_bytes()
    new = {"other.weight": tensor((3, 3), (1, 1))}
    with pytest.raises(FileExistsError, match="the directory exists; choose another one, or pass overwrite=True"):
        ft.save_adapter(written, new)
    (written / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"holds 'notes.txt', which is not of its making"):
        ft.save_adapter(written, new, overwrite=True)
    assert (written / MODEL).read_bytes() == old
    (written / "notes.txt").unlink()
    ft.save_adapter(written, new, overwrite=True)
    assert list(ft.load_adapter(written)) == ["other.weight"]
    assert [p.name for p in written.parent.iterdir()] == [written.name]
    file = written.parent / "file"
    file.write_text("")
    with pytest.raises(FileExistsError, match="a file is in the way"):
        ft.save_adapter(file, new, overwrite=True)


def test_a_link_to_a_directory_stays_a_link_and_a_link_inside_one_is_not_ours(written: Path, tmp_path: Path):
    link = tmp_path / "link"
    link.symlink_to(written)
    ft.save_adapter(link, {"other.weight": tensor((3, 3), (1, 1))}, overwrite=True)
    assert link.is_symlink()
    assert list(ft.load_adapter(written)) == ["other.weight"]
    (written / "README.md").symlink_to("/etc/hostname")
    with pytest.raises(FileExistsError, match=r"holds 'README.md'"):
        ft.save_adapter(written, {"w": tensor((3, 3), (1, 1))}, overwrite=True)


def test_an_empty_directory_may_be_filled(tmp_path: Path):
    ft.save_adapter(tmp_path / "a", {"w": tensor((3, 3), (1, 1))})
    (tmp_path / "b").mkdir()
    ft.save_adapter(tmp_path / "b", {"w": tensor((3, 3), (1, 1))})
    assert (tmp_path / "a" / MODEL).read_bytes() == (tmp_path / "b" / MODEL).read_bytes()


def test_permissions_follow_the_umask(tmp_path: Path):
    old = os.umask(0o027)
    try:
        ft.save_adapter(tmp_path / "a", {"w": tensor((3, 3), (1, 1))})
    finally:
        os.umask(old)
    assert (tmp_path / "a" / MODEL).stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o750


@pytest.mark.parametrize("step", ["config", "verify", "rename"])
def test_a_failure_leaves_the_old_directory_and_no_traces(step: str, written: Path, monkeypatch: pytest.MonkeyPatch):
    old = (written / MODEL).read_bytes()

    def fail(*args: Any, **options: Any) -> None:
        raise OSError("the disk is gone")

    target = {"config": "adapter_file.write_config", "verify": "adapter_file.load_adapter", "rename": "_files._swap_in"}
    monkeypatch.setattr(f"flora_tensor.{target[step]}", fail)
    with pytest.raises(OSError, match="the disk is gone"):
        adapter_file.save_adapter(written, {"w": tensor((3, 3), (1, 1))}, overwrite=True)
    assert (written / MODEL).read_bytes() == old
    assert [p.name for p in written.parent.iterdir()] == [written.name]


def test_where_directories_cannot_trade_names_the_old_one_steps_aside(written: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("flora_tensor._files._exchange", lambda a, b: False)
    rename = Path.rename

    def blocked(self: Path, target: Path) -> Path:
        if ".partial-" in self.name:
            raise OSError("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", blocked)
    with pytest.raises(OSError, match="no"):
        ft.save_adapter(written, {"w": tensor((3, 3), (1, 1))}, overwrite=True)
    assert list(ft.load_adapter(written)) == ["fc.weight"]
    monkeypatch.setattr(Path, "rename", rename)
    ft.save_adapter(written, {"w": tensor((3, 3), (1, 1))}, overwrite=True)
    assert list(ft.load_adapter(written)) == ["w"]
    assert [p.name for p in written.parent.iterdir()] == [written.name]


KILLED = """
import os, signal, sys
import numpy as np
import flora_tensor as ft
from flora_tensor import _files
step, path = int(sys.argv[1]), sys.argv[2]
calls = 0
def counted(function):
    def wrapper(*args, **options):
        global calls
        calls += 1
        if calls == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **options)
    return wrapper
for name in ("open", "pwrite", "fsync", "close", "rename", "mkdir", "preadv"):
    setattr(os, name, counted(getattr(os, name)))
_files._exchange = counted(_files._exchange)
ft.save_adapter(path, {"new.weight": ft.TuckerTensor(np.ones((1, 1)), (np.ones((2, 1)), None))}, overwrite=True)
print(calls)
"""


def test_kill_9_between_any_two_steps_leaves_the_old_adapter_or_the_new_one(written: Path):
    """The process is killed before each of the system calls of a save in turn; then a save succeeds and cleans up."""

    def attempt(step: int) -> subprocess.CompletedProcess[str]:
        arguments = [sys.executable, "-c", KILLED, str(step), str(written)]
        return subprocess.run(arguments, capture_output=True, text=True, check=False, timeout=300)

    total = int(attempt(0).stdout)
    assert total > 15
    ft.save_adapter(written, {"fc.weight": tensor((4, 6), (2, 3))}, overwrite=True)
    seen: set[str] = set()
    for step in sorted({*range(1, total + 1, 3), *range(total - 6, total + 1)}):
        killed = attempt(step)
        assert killed.returncode == -signal.SIGKILL
        (name,) = ft.load_adapter(written)
        seen.add(name)
        if name == "new.weight":
            ft.save_adapter(written, {"fc.weight": tensor((4, 6), (2, 3))}, overwrite=True)
    assert seen == {"fc.weight", "new.weight"}
    ft.save_adapter(written, {"fc.weight": tensor((4, 6), (2, 3))}, overwrite=True)
    assert [p.name for p in written.parent.iterdir()] == [written.name]


def _save_limited(path: Path, queue: Any) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    try:
        ft.save_adapter(path, {"w": tensor((64, 64), (32, 32))}, overwrite=True)
        queue.put("no error")
    except OSError as error:
        queue.put(os.strerror(error.errno or 0))


def test_a_full_disk_leaves_the_old_adapter(written: Path):
    # A limit on file sizes fails a write midway, as a full disk does.
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_save_limited, args=(written, queue))
    process.start()
    assert queue.get(timeout=300) == "File too large"
    process.join()
    assert list(ft.load_adapter(written)) == ["fc.weight"]
    assert [p.name for p in written.parent.iterdir()] == [written.name]


def test_a_directory_that_cannot_be_written_to_is_an_os_error():
    # /proc refuses even root, for whom permission bits mean nothing.
    with pytest.raises(OSError):
        ft.save_adapter("/proc/adapter", {"w": tensor((3, 3), (1, 1))})


def test_two_runs_cannot_write_one_output(written: Path):
    import fcntl

    lock = written.parent / f".{written.name}.lock"
    with lock.open("w") as file:
        file.write("12345\n")
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(BlockingIOError, match=r"process 12345 is writing .*; wait for it to end"):
            ft.save_adapter(written, {"w": tensor((3, 3), (1, 1))}, overwrite=True)
    # Its holder is gone, the file is still there: nothing blocks.
    ft.save_adapter(written, {"w": tensor((3, 3), (1, 1))}, overwrite=True)
    assert not lock.exists()


def test_loading_needs_no_torch(written: Path):
    code = "import sys, flora_tensor as ft; ft.load_adapter(sys.argv[1]); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, str(written)], check=True)


def test_warnings_are_ours():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.warn("x", ft.FloraWarning, stacklevel=1)
    assert issubclass(caught[0].category, UserWarning)


# Of another kind ------------------------------------------------------------------------------------------------------


CHANGE = ft.TuckerTensor(np.ones((1, 1)), [np.ones((5, 1)), np.ones((4, 1))])


@pytest.mark.parametrize(
    ("adapter", "error", "message"),
    [
        (None, TypeError, "Adapter: tensors is NoneType; pass a mapping"),
        ([CHANGE], TypeError, "Adapter: tensors is list; pass a mapping"),
        ({"w": np.ones((5, 4))}, TypeError, "'w' is numpy.ndarray; pass a TuckerTensor, such as"),
        ({3: CHANGE}, TypeError, "a weight's name is 3; pass a text"),
        ({".weight": CHANGE}, ValueError, "the weight's name '.weight' cannot be stored; rename it"),
        ({"w": CHANGE.map(lambda a: a * 1j)}, TypeError, "'w' is of type complex128; pass real floats"),
        ({"w": CHANGE.map(lambda a: a.astype(int))}, TypeError, "'w' is of type int64; pass real floats"),
    ],
)
def test_what_is_no_adapter_is_refused(tmp_path, adapter, error, message):
    with pytest.raises(error, match=message):
        ft.save_adapter(tmp_path / "a", adapter)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"config": 3}, TypeError, "config is int; pass a mapping"),
        ({"arrangements": {"w": "o i"}}, TypeError, "the arrangement of 'w' is 'o i'; pass an Arrangement"),
        ({"whole": {"b": [1.0]}}, TypeError, "'b', stored whole, is list; pass an array"),
        ({"dtypes": {"w": "F99"}}, ValueError, "the stored type of 'w' is 'F99'; pass one of F64, F32"),
        ({"dtypes": {"w": "I32"}}, ValueError, "the stored type of 'w' is 'I32'; pass one of F64, F32"),
    ],
)
def test_options_of_another_kind_are_refused(options, error, message):
    with pytest.raises(error, match=f"Adapter: {message}"):
        ft.Adapter({"w": CHANGE}, **options)


def test_arrays_of_the_other_byte_order_are_stored(tmp_path):
    t = CHANGE.map(lambda a: (a * 1.5).astype(">f8"))
    again = ft.load_adapter(ft.save_adapter(tmp_path / "a", {"w": t}))["w"]
    assert np.array_equal(again.to_tensor(), t.to_tensor())
