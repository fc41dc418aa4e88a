"""Files that were cut, flipped and rewritten: one line and an exit code, never a traceback or half a result."""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from hypothesis import given, settings
from hypothesis import strategies as st

import flora_tensor as ft
from checkpoints import run, save, save_sharded

CODES = {0, 2, 3, 4, 5}
WORDS = ["dtype", "shape", "data_offsets", "weight_map", "metadata", "__metadata__", "rank_pattern", "whole", "scale"]

# JSON that is near to what belongs there: the keys of the formats, sizes of all sizes, and nonsense.
sizes = st.sampled_from([-1, 0, 1, 2, 3, 6, 8, 2**31, 2**60, 2**63, 2**64, 10**30])
leaves = (
    st.none()
    | st.booleans()
    | sizes
    | st.floats(allow_nan=False)
    | st.text(max_size=4)
    | st.sampled_from(["F32", "BF16"])
)
trees = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(WORDS) | st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The bytes of one valid file of each kind."""
    here = tmp_path_factory.mktemp("valid")
    rng = np.random.default_rng(0)
    base = {"a.weight": rng.standard_normal((4, 3)).astype(np.float32), "b": np.ones(3), "n": np.array(3)}
    tuned = {name: x + 1 for name, x in base.items()}
    paths = save(here / "base.safetensors", base), save(here / "tuned.safetensors", tuned)
    ft.extract(*paths, here / "adapter", ranks=2)
    save_sharded(here / "model", {"x.safetensors": {"a.weight": base["a.weight"]}, "y.safetensors": {"b": base["b"]}})
    names = {
        "base": "base.safetensors",
        "tuned": "tuned.safetensors",
        "config": "adapter/adapter_config.json",
        "adapter": "adapter/adapter_model.safetensors",
        "index": "model/model.safetensors.index.json",
        "x": "model/x.safetensors",
        "y": "model/y.safetensors",
    }
    return {key: (here / name).read_bytes() for key, name in names.items()}


@st.composite
def flipped(draw: st.DrawFn, data: bytes) -> bytes:
    """Change, cut, repeat or insert bytes; most of it where the header is."""
    content = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, min(len(content) - 1, draw(st.sampled_from([12, 60, 300, 10**6]))))))
        kind = draw(st.sampled_from(["change", "cut", "insert", "repeat", "digit"]))
        if kind == "change" and content:
            content[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "cut":
            del content[at : at + draw(st.integers(1, len(content) + 1))]
        elif kind == "insert":
            content[at:at] = draw(st.binary(max_size=9))
        elif kind == "repeat":
            content[at:at] = content[at : at + 20]
        else:  # another number somewhere in the JSON
            places = [k for k, byte in enumerate(content) if chr(byte).isdigit()]
            if places:
                content[draw(st.sampled_from(places))] = ord(draw(st.sampled_from("0123456789-.e")))
    return bytes(content)


@st.composite
def rewritten(draw: st.DrawFn, data: bytes) -> bytes:
    """Replace, remove or add a part of the JSON, and put the file together again."""
    is_tensors = not data.startswith(b"{")
    length = struct.unpack("<Q", data[:8])[0] if is_tensors else len(data)
    text, rest = (data[8 : 8 + length], data[8 + length :]) if is_tensors else (data, b"")
    table = json.loads(text)
    where = table
    while isinstance(where, dict) and where:
        key = draw(st.sampled_from(sorted(where)))
        if isinstance(where[key], dict) and draw(st.booleans()):
            where = where[key]
            continue
        action = draw(st.sampled_from(["replace", "remove", "add", "rename"]))
        if action == "replace":
            where[key] = draw(trees)
        elif action == "add":
            where[draw(st.sampled_from(WORDS) | st.text(max_size=5))] = draw(trees)
        else:
            value = where.pop(key)
            if action == "rename":
                where[
                    draw(st.text(max_size=5) | st.sampled_from(["../x", "/etc/passwd", "a.weight", "\0", "x" * 3000]))
                ] = value
        break
    changed = json.dumps(table).encode()
    claimed = draw(st.sampled_from([len(changed), length, 0, 2**63, len(changed) + 1]) if is_tensors else st.just(0))
    return (struct.pack("<Q", claimed) if is_tensors else b"") + changed + rest


def damaged(data: bytes) -> st.SearchStrategy[bytes]:
    return flipped(data) | rewritten(data)


def lay_out(here: Path, files: dict[str, bytes]) -> dict[str, Path]:
    for name in ("adapter", "model"):
        (here / name).mkdir()
    places = {
        "base": here / "base.safetensors",
        "tuned": here / "tuned.safetensors",
        "config": here / "adapter" / "adapter_config.json",
        "adapter": here / "adapter" / "adapter_model.safetensors",
        "index": here / "model" / "model.safetensors.index.json",
        "x": here / "model" / "x.safetensors",
        "y": here / "model" / "y.safetensors",
    }
    for key, path in places.items():
        path.write_bytes(files[key])
    return places


def assert_orderly(result: Result, out: Path) -> None:
    assert result.exit_code in CODES, (result.exit_code, result.stderr)
    assert "Traceback" not in result.stderr
    if result.exit_code:
        lines = result.stderr.splitlines()
        assert lines[-1].startswith("error: ")
        assert all(line.startswith("warning: ") for line in lines[:-1])
        left = [p.name for p in out.parent.iterdir() if p.name.startswith((out.name, f".{out.name}"))]
        assert not left


@settings(max_examples=250)
@given(data=st.data())
def test_damaged_checkpoints_are_refused_or_read(
    data: st.DataObject, valid: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory
):
    here = tmp_path_factory.mktemp("fuzz")
    kind = data.draw(st.sampled_from(["base", "tuned", "index", "x"]))
    places = lay_out(here, {**valid, kind: data.draw(damaged(valid[kind]))})
    first: Any = here / "model" if kind in ("index", "x") else places["base"]
    options = data.draw(
        st.sampled_from([["--ranks", "1"], ["--max-ratio", "100%", "--noise-floor", "none"], ["--dry-run"]])
    )
    more = data.draw(st.sampled_from([[], ["--allow-missing", "--on-mismatch", "skip"]]))
    result = run("extract", first, places["tuned"], "-o", here / "out", *options, *more)
    assert_orderly(result, here / "out")
    if result.exit_code == 0 and "--dry-run" not in options:
        ft.load_adapter(here / "out")
    assert_orderly(run("diff", first, places["tuned"]), here / "out2")
    assert_orderly(run("merge", first, here / "adapter", "-o", here / "merged"), here / "merged")


@settings(max_examples=250)
@given(data=st.data())
def test_damaged_adapters_are_refused_or_read(
    data: st.DataObject, valid: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory
):
    here = tmp_path_factory.mktemp("fuzz")
    kind = data.draw(st.sampled_from(["config", "adapter"]))
    places = lay_out(here, {**valid, kind: data.draw(damaged(valid[kind]))})
    assert_orderly(run("inspect", here / "adapter"), here / "none")
    result = run("merge", places["base"], here / "adapter", "-o", here / "out")
    assert_orderly(result, here / "out")
    if result.exit_code == 0:
        ft.open_checkpoint(here / "out")
