"""Files that were cut, flipped and rewritten: one line and an exit code, never a traceback or half a result."""

import json
import re
import shlex
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from hypothesis import given, settings
from hypothesis import strategies as st

import flora_tensor as ft
from checkpoints import run, save, save_sharded

CODES = {0, 2, 3, 4, 5}
WORDS = [
    "dtype",
    "shape",
    "data_offsets",
    "weight_map",
    "metadata",
    "__metadata__",
    "rank_pattern",
    "whole",
    "scale",
    "axes",
    "sizes",
]

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


FILES = {
    "base": "base.safetensors",
    "tuned": "tuned.safetensors",
    "heads": "config.json",
    "index": "model/model.safetensors.index.json",
    "x": "model/x.safetensors",
    "y": "model/y.safetensors",
    "config": "adapter/adapter_config.json",
    "adapter": "adapter/adapter_model.safetensors",
    "second config": "second/adapter_config.json",
    "second": "second/adapter_model.safetensors",
    "shards": "sharded/adapter_model.safetensors.index.json",
    "shard": "sharded/adapter_model-00001-of-00002.safetensors",
    "moments": "moments.safetensors",
    "lora config": "lora/adapter_config.json",
    "lora": "lora/adapter_model.safetensors",
    "lycoris": "lycoris.safetensors",
}
# Every command by the files that it reads; `$` stands for the directory that they lie in.
EXTRACT = "extract $/base.safetensors $/tuned.safetensors -o $/out"
COMMANDS = {
    "base tuned heads": [
        f"{EXTRACT} --ranks 1",
        f"{EXTRACT} --max-ratio 100% --noise-floor none --allow-missing --on-mismatch skip",
        f"{EXTRACT} --rtol 0.1 --dry-run",
        f"{EXTRACT} --max-bytes 60 --resized pad --dtype bfloat16 --html $/out.html",
        "ranks $/base.safetensors $/tuned.safetensors --html $/out.html",
        "diff $/base.safetensors $/tuned.safetensors",
        "merge $/base.safetensors $/adapter -o $/out.safetensors",
    ],
    "index x y": [
        "extract $/model $/tuned.safetensors -o $/out --ranks 1 --allow-missing --on-mismatch skip",
        "diff $/model $/tuned.safetensors",
        "ranks $/model $/tuned.safetensors",
        "merge $/model $/adapter -o $/out",
    ],
    "config adapter": [
        "inspect $/adapter",
        "merge $/base.safetensors $/adapter -o $/out --verify-base error",
        "round $/adapter -o $/out --max-ratio 50%",
        "round $/adapter -o $/out --rtol 0.5",
        "add $/second $/adapter -o $/out --weights .5 .5 --base $/base.safetensors",
        "subtract $/adapter $/second -o $/out --base $/base.safetensors",
        "scale $/adapter -2 -o $/out --base $/base.safetensors",
        "convert $/adapter $/out --to peft-lora",
        "convert $/adapter $/out.safetensors --to lycoris --skip-whole",
        "convert $/adapter $/out.safetensors --to kohya --skip-whole",
    ],
    "shards shard": ["inspect $/sharded", "merge $/base.safetensors $/sharded -o $/out"],
    "moments": [
        f"{EXTRACT} --calibration $/moments.safetensors --max-ratio 90%",
        f"{EXTRACT} --calibration $/moments.safetensors --rtol 0.1 --arrangement 'o (i h w)'",
    ],
    "lora config lora": [
        "convert $/lora $/out --to flora",
        "convert $/lora $/out --to flora --base $/base.safetensors",
    ],
    "lycoris": ["convert $/lycoris.safetensors $/out --to flora --base $/base.safetensors"],
}


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The bytes of one valid file of each kind."""
    here = tmp_path_factory.mktemp("valid")
    rng = np.random.default_rng(0)
    base = {"a.q_proj.weight": (4, 3), "c.weight": (3, 2, 2, 2)}
    base = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in base.items()}
    base |= {"b": np.ones(3), "n": np.array(3)}
    tuned = {name: x if name == "n" else x + 1 for name, x in base.items()}
    paths = save(here / "base.safetensors", base), save(here / "tuned.safetensors", tuned)
    ft.extract(*paths, here / "adapter", ranks=2)
    ft.save_adapter(here / "second", ft.scale_adapter(here / "adapter", 0.5, base=paths[0]))
    stored = ft.open_checkpoint(here / "adapter" / "adapter_model.safetensors")
    ft.save_adapter(here / "sharded", ft.load_adapter(here / "adapter"), max_shard_size=stored.n_bytes - 1)
    names = list(base)
    shards = {"x.safetensors": names[:2], "y.safetensors": names[2:]}
    save_sharded(here / "model", {file: {name: base[name] for name in held} for file, held in shards.items()})
    (here / "config.json").write_text(json.dumps({"num_attention_heads": 2, "hidden_size": 4, "text_config": {}}))
    axes = {"a.q_proj.weight": "i", "c.weight": "i"}
    moments = {name: np.eye(base[name].shape[1]) for name in axes}
    ft.save_moments(here / "moments.safetensors", ft.Moments(moments, axes, dict.fromkeys(axes, 5)))
    decomposed = ft.Adapter(dict(ft.load_adapter(here / "adapter")))
    ft.to_peft_lora(decomposed, here / "lora")
    ft.to_lycoris(decomposed, here / "lycoris.safetensors")
    for command in (line for lines in COMMANDS.values() for line in lines):
        result = run(*shlex.split(command.replace("$", str(here))), "--json")
        assert result.exit_code == 0, (command, result.stderr)
        for path in here.glob("out*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return {key: (here / name).read_bytes() for key, name in FILES.items()}


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


def lay_out(here: Path, files: dict[str, bytes]) -> None:
    for key, name in FILES.items():
        (here / name).parent.mkdir(exist_ok=True)
        (here / name).write_bytes(files[key])


def assert_orderly(result: Result, here: Path) -> None:
    assert result.exit_code in CODES, (result.exit_code, result.stderr)
    assert "Traceback" not in result.stderr
    left = [p.name for p in here.iterdir() if p.name.startswith(("out", ".out"))]
    if result.exit_code:
        lines = result.stderr.splitlines()
        assert lines[-1].startswith("error: ")
        assert all(line.startswith("warning: ") for line in lines[:-1])
        assert not left
    else:
        assert not [name for name in left if name.startswith(".")]
        for path in here.glob("out"):
            if (path / "adapter_config.json").exists() and not (path / "lora").exists():
                kind = json.loads((path / "adapter_config.json").read_text())["peft_type"]
                ft.load_adapter(path) if kind == "FLORA" else ft.from_peft_lora(path)


@pytest.mark.parametrize("kinds", COMMANDS)
@settings(max_examples=4 * settings.default.max_examples)
@given(data=st.data())
def test_damaged_files_are_refused_or_read(
    kinds: str, data: st.DataObject, valid: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory
):
    here = tmp_path_factory.mktemp("fuzz")
    kind = data.draw(st.sampled_from([key for key in FILES if re.search(rf"\b{key}\b", kinds)]))
    lay_out(here, {**valid, kind: data.draw(damaged(valid[kind]))})
    for command in data.draw(st.lists(st.sampled_from(COMMANDS[kinds]), min_size=1, max_size=3, unique=True)):
        result = run(*shlex.split(command.replace("$", str(here))), *data.draw(st.sampled_from([[], ["--json"]])))
        assert_orderly(result, here)
        for path in here.glob("out*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
