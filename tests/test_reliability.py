"""The list of bad inputs, row by row, through the real command line.

Every row says what is wrong with a pair of checkpoints, the exit code, and what the one line on stderr must name. That
nothing else happens is checked for all of them: no traceback, nothing on stdout, the output of an earlier run as it
was, and no file that was not there before. Below, every system call of every command that writes fails in turn.
"""

import contextlib
import errno
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

import flora_tensor as ft
from checkpoints import entry, load, raw, run, save, save_sharded
from flora_tensor import _files

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = "model.safetensors.index.json"
Damage = Callable[[Path], object]


def weights(step: float) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    shapes = {"fc.weight": (12, 8), "conv.weight": (6, 4, 3, 3), "fc.bias": (12,)}
    change = np.random.default_rng(1)
    return {
        name: (rng.standard_normal(shape) + step * change.standard_normal(shape)).astype(np.float32)
        for name, shape in shapes.items()
    }


def make_pair(here: Path) -> None:
    """Lay out a base, a sharded model of the same tensors, and a tuned checkpoint."""
    save(here / "base.safetensors", weights(0.0))
    save(here / "tuned.safetensors", weights(1.0))
    first, *rest = weights(0.0).items()
    save_sharded(here / "model", {SHARDS[0]: dict([first]), SHARDS[1]: dict(rest)})


def tree(here: Path) -> dict[str, bytes | str]:
    """Everything below a directory: the bytes of files, the targets of links, and that a directory is there."""
    found: dict[str, bytes | str] = {}
    for path in sorted(here.rglob("*")):
        name = str(path.relative_to(here))
        found[name] = str(path.readlink()) if path.is_symlink() else "" if not path.is_file() else path.read_bytes()
    return found


def bytes_of(path: str, change: Callable[[bytes], bytes]) -> Damage:
    return lambda here: (here / path).write_bytes(change((here / path).read_bytes()))


def tuned_with(**tensors: Any) -> Damage:
    """Store other tensors in the tuned checkpoint; ``None`` leaves one out."""

    def damage(here: Path) -> None:
        named = {name.replace("_", "."): x for name, x in tensors.items()}
        kept = {name: x for name, x in (weights(1.0) | named).items() if x is not None}
        save(here / "tuned.safetensors", kept)

    return damage


def index_with(text: str | bytes) -> Damage:
    return lambda here: (here / "model" / INDEX).write_bytes(text if isinstance(text, bytes) else text.encode())


def shard_named(name: str) -> Damage:
    return index_with(json.dumps({"weight_map": dict.fromkeys(weights(0.0), name)}))


def linked_shard(target: str) -> Damage:
    def damage(here: Path) -> None:
        shard = here / "model" / SHARDS[0]
        shutil.move(shard, here / "outside.safetensors")
        shard.symlink_to(target)

    return damage


def linked_index(here: Path) -> None:
    (here / "model" / INDEX).unlink()
    (here / "model" / INDEX).symlink_to(INDEX)


def pickled(here: Path) -> None:
    torch.save({name: torch.from_numpy(x) for name, x in weights(1.0).items()}, here / "tuned.bin")


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch evil",)


def nothing(here: Path) -> None:
    """Leave the files as they are."""


F4 = entry("F32", [1], 0, 4)
BIG = np.float32(3e38)
ONE_NAN = np.where(np.arange(96).reshape(12, 8) == 9, np.nan, 1.0)


class Row(NamedTuple):
    what: str
    damage: Damage
    code: int
    says: str
    base: str = "base.safetensors"
    tuned: str = "tuned.safetensors"
    out: str = "out"
    options: str = ""


REFUSED = [
    # safetensors files
    Row("truncated", bytes_of("tuned.safetensors", lambda b: b[:-9]), 3, "tuned.safetensors: .* it is truncated: down"),
    Row("truncated header", bytes_of("base.safetensors", lambda b: b[:40]), 3, "base.safetensors: .* it is truncated"),
    Row("trailing bytes", bytes_of("tuned.safetensors", lambda b: b + b"x"), 3, "tuned.*: 1 bytes after the last"),
    Row("overlap", bytes_of("tuned.safetensors", lambda b: raw({"a": F4, "b": F4}, b"1234")), 3, "'b' overlaps"),
    Row("hole", bytes_of("tuned.safetensors", lambda b: raw({"a": entry("F32", [1], 4, 8)}, b"1" * 8)), 3, "no tensor"),
    Row("bad header", bytes_of("tuned.safetensors", lambda b: raw(b"{]")), 3, "tuned.safetensors: header: not valid"),
    Row("an empty file", bytes_of("tuned.safetensors", lambda b: b""), 3, "0 bytes; a safetensors file has at least 8"),
    Row(
        "duplicate key among many",
        bytes_of(
            "tuned.safetensors",
            lambda b: raw(b"{%s}" % b",".join(b'"k%d":{}' % min(k, 49_998) for k in range(50_000))),
        ),
        3,
        "the key 'k49998' stands twice",
    ),
    Row("a directory named so", lambda here: (here / "dir.safetensors").mkdir(), 3, "dir", tuned="dir.safetensors"),
    Row("a named pipe", lambda here: os.mkfifo(here / "pipe"), 3, "pipe: not a regular file", tuned="pipe"),
    Row("a link in a circle", lambda here: (here / "loop").symlink_to("loop"), 4, "loop: no such file", tuned="loop"),
    Row("no such file", nothing, 4, "gone: no such file; pass a safetensors file", tuned="gone"),
    # the pair
    Row(
        "shape mismatch", tuned_with(fc_weight=np.ones((12, 9))), 3, r"'fc.weight' has shape \(12, 8\).*\(12, 9\).*skip"
    ),
    Row(
        "vocabulary resized",
        tuned_with(fc_weight=np.ones((15, 8))),
        3,
        r"has the vocabulary been resized.*--resized pad",
    ),
    Row("key lost", tuned_with(fc_bias=None), 3, r"1 only in .*base.*'fc.bias'.*--allow-missing"),
    Row("key new", tuned_with(extra=np.ones(2)), 3, r"1 only in .*tuned.*'extra'.*--allow-missing"),
    Row("NaN", tuned_with(fc_weight=ONE_NAN), 3, r"tuned.*'fc.weight' has 1 entries .* first at \(1, 1\)"),
    Row("infinity", tuned_with(fc_bias=np.full(12, np.inf)), 3, r"'fc.bias' has 12 entries .* first at \(0,\)"),
    Row(
        "overflow in the subtraction",
        lambda here: [
            save(here / f"{n}.safetensors", {"w": s * np.full((4, 4), BIG)}) for n, s in (("base", -1), ("tuned", 1))
        ],
        3,
        "the change of 'w' overflows float32; store the inputs as F64",
    ),
    Row("equal checkpoints", nothing, 3, "nothing to extract", tuned="base.safetensors"),
    # sharded models
    Row(
        "missing shard", lambda here: (here / "model" / SHARDS[1]).unlink(), 3, f"'{SHARDS[1]}' does not exist", "model"
    ),
    Row("key absent from its shard", shard_named(SHARDS[0]), 3, f"{SHARDS[0]} lacks 'conv.weight', 'fc.bias'", "model"),
    Row(
        "shard with extra keys",
        lambda here: save(here / "model" / SHARDS[0], {"fc.weight": np.ones((12, 8)), "stray": np.ones(1)}),
        3,
        "holds 'stray', which the index does not know",
        "model",
    ),
    *(
        Row(f"shard named {name!r}", shard_named(name), 3, f"{INDEX}: the shard name .* leaves", "model")
        for name in ("../tuned.safetensors", "/etc/passwd", "C:x", "a\\b", "a\0b", "x/../../y", "")
    ),
    Row("shard that is a link outside", linked_shard("../outside.safetensors"), 3, "is a link to .*outside", "model"),
    Row("shard that is a link in a circle", linked_shard(SHARDS[0]), 3, f"'{SHARDS[0]}' does not exist", "model"),
    Row("shard that is the index", shard_named(INDEX), 3, f"{INDEX}: the header claims", "model"),
    Row("index that is a link in a circle", linked_index, 4, f"{INDEX}: no such file", "model"),
    Row("index too deep", index_with('{"weight_map":' * 90_000), 3, f"{INDEX}: nested too deeply", "model"),
    Row(
        "index of wrong types", index_with('{"weight_map": {"fc.weight": 7}}'), 3, "weight_map must be a table", "model"
    ),
    Row("index that is a list", index_with("[]"), 3, f"{INDEX}: a JSON table is needed, not list", "model"),
    Row("index in another encoding", index_with("{}".encode("utf-16")), 3, f"{INDEX}: not valid JSON", "model"),
    # pickle files
    Row("a pickle file", pickled, 3, "tuned.bin: a pickle file, .*--allow-pickle", tuned="tuned.bin"),
    Row(
        "a pickle file that runs code",
        lambda here: torch.save({"w": Evil()}, here / "evil.pt"),
        3,
        "evil.pt: cannot be read with weights_only=True",
        tuned="evil.pt",
        options="--allow-pickle",
    ),
    # the output
    Row("output is an input", nothing, 2, "is or holds the input", out="tuned.safetensors"),
    Row("output is the model's directory", nothing, 2, "is or holds the input", "model", out="model"),
    Row("output is a file", lambda here: (here / "file").write_text(""), 4, "a file is in the way", out="file"),
    Row("output below a file", nothing, 4, "base.safetensors", out="base.safetensors/x"),
    Row("output holds other files", lambda here: (here / "out" / "mine.txt").write_text(""), 4, "holds 'mine.txt'"),
    Row("output where nothing can be written", nothing, 4, "/proc/", out="/proc/out"),
    Row("a name that is too long", nothing, 4, "File name too long", out="x" * 254),
    # memory
    Row(
        "no memory",
        nothing,
        5,
        r"'conv.weight' of .* needs about .* kB of memory, but 2 kB",
        options="--max-memory 2kB",
    ),
]


@pytest.fixture(scope="module")
def laid_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a pair of checkpoints and the adapter of an earlier run."""
    here = tmp_path_factory.mktemp("reliability")
    make_pair(here)
    ft.extract(here / "base.safetensors", here / "tuned.safetensors", here / "out", ranks=1)
    return here


@pytest.fixture
def here(laid_out: Path, tmp_path: Path) -> Path:
    return shutil.copytree(laid_out, tmp_path / "work", symlinks=True)


def error_line(result: Any) -> str:
    """Return the one line that a refusal says."""
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize("row", REFUSED, ids=lambda row: row.what)
def test_a_bad_input_is_refused_and_everything_stays_as_it_was(row: Row, here: Path):
    row.damage(here)
    before = tree(here)
    paths = here / row.base, here / row.tuned, "-o", here / row.out
    result = run("extract", *paths, "--overwrite", *(row.options.split() or ["--ranks", "1"]))
    assert result.exit_code == row.code, result.stderr
    assert re.search(row.says, error_line(result)), result.stderr
    assert tree(here) == before


class Told(NamedTuple):
    """What is accepted, and what the report must say about which tensor."""

    what: str
    tuned: dict[str, Any]
    name: str
    says: dict[str, Any]
    options: str = ""
    base: Mapping[str, Any] = MappingProxyType({})


HALF = torch.from_numpy(weights(1.0)["fc.weight"]).bfloat16()
KEPT = "kept as it is: ranks (9, 9) truncate nothing"
ACCEPTED = [
    Told("types differ", {"fc.weight": HALF}, "fc.weight", {"dtype": "F32 → BF16", "notes": ["types differ", KEPT]}),
    Told(
        "most entries did not change",
        {"fc.weight": weights(0.0)["fc.weight"] + np.eye(12, 8, dtype=np.float32)},
        "fc.weight",
        {"notes": ["update below storage precision: 92 % of the entries did not change", KEPT]},
    ),
    *(
        Told(
            f"{kind} cannot be decomposed",
            {"n": torch.ones(3, 2).to(kind)},
            "n",
            {"status": "left out", "changed": True, "reason": f"type {code} cannot be decomposed"},
            base={"n": torch.zeros(3, 2).to(kind)},
        )
        for kind, code in ((torch.int64, "I64"), (torch.bool, "BOOL"), (torch.uint8, "U8"))
    ),
    Told("zero-size", {"n": np.ones((0, 4))}, "n", {"reason": "zero-size"}, base={"n": np.ones((0, 4))}),
    Told("a scalar", {"n": np.array(2.0)}, "n", {"status": "whole"}, base={"n": np.array(1.0)}),
    Told("a vector", {}, "fc.bias", {"status": "whole", "n_parameters": 12}),
    Told("a vector, to be skipped", {}, "fc.bias", {"reason": "vector, skipped as asked"}, "--vectors skip"),
    Told("one unchanged", weights(0.0) | {"fc.weight": weights(1.0)["fc.weight"]}, "fc.bias", {"reason": "unchanged"}),
    Told(
        "a mismatch, to be skipped",
        {"n": np.ones((3, 2))},
        "n",
        {"reason": "shape differs: (2, 3) and (3, 2)"},
        "--on-mismatch skip",
        {"n": np.ones((2, 3))},
    ),
    Told(
        "a larger vocabulary, to be skipped",
        {"n": np.ones((5, 3))},
        "n",
        {"status": "left out"},
        "--resized skip",
        {"n": np.ones((2, 3))},
    ),
    Told("a key lost, allowed", {}, "n", {"reason": "missing in tuned"}, "--allow-missing", {"n": np.ones(2)}),
    Told("a key new, allowed", {"n": np.ones(2)}, "n", {"reason": "missing in base"}, "--allow-missing"),
    Told(
        "a very long name",
        {"n" * 5000: np.ones((2, 2))},
        "n" * 5000,
        {"status": "tucker"},
        base={"n" * 5000: np.zeros((2, 2))},
    ),
    Told(
        "a name in any script",
        {"重み \U0001f600\x1b[31m": np.ones((2, 2))},
        "重み \U0001f600\x1b[31m",
        {"status": "tucker"},
        base={"重み \U0001f600\x1b[31m": np.zeros((2, 2))},
    ),
    Told(
        "large factors in float16",
        {"n": np.full((4, 4), 1e30)},
        "n",
        {"status": "tucker"},
        "--dtype float16",
        {"n": np.zeros((4, 4))},
    ),
]


@pytest.mark.parametrize("row", ACCEPTED, ids=lambda row: row.what)
def test_what_is_left_out_or_changed_is_told(row: Told, tmp_path: Path):
    paths = (
        save(tmp_path / "base.safetensors", {**weights(0.0), **row.base}),
        save(tmp_path / "tuned.safetensors", weights(1.0) | row.tuned),
    )
    options = ["--ranks", "9", "-o", tmp_path / "out", *row.options.split()]
    result = run("extract", *paths, *options, "--json")
    warned = (
        f"warning: extract: {row.name!r} changed and cannot be stored" if "type" in row.says.get("reason", "") else ""
    )
    assert (result.exit_code, result.stderr.split(", for")[0]) == (0, warned)
    report = json.loads(result.stdout)
    (found,) = (entry for entry in report["tensors"] if entry["name"] == row.name)
    assert {key: found[key] for key in row.says} == row.says
    assert len(report["tensors"]) == len({**weights(0.0), **row.base, **row.tuned})
    if found["status"] == "tucker":
        error = load(paths[1])[row.name].double() - load(paths[0])[row.name].double()
        error -= torch.from_numpy(ft.load_adapter(tmp_path / "out").delta(row.name, dtype=np.float64))
        step = 2.0**-11 if "float16" in row.options else 2.0**-24
        assert float(error.norm()) <= 40 * step * found["delta_norm"]
    shown = run("inspect", tmp_path / "out")
    assert (shown.exit_code, shown.stderr) == (0, "")
    assert "\x1b" not in shown.stdout


def test_a_model_in_the_hub_s_cache_is_read_through_its_links(here: Path):
    blobs, snapshot = here / "models--x" / "blobs", here / "models--x" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    shutil.move(here / "model", blobs)
    for file in (*SHARDS, INDEX):
        (snapshot / file).symlink_to(Path("../../blobs") / file)
    done = run("extract", snapshot, here / "tuned.safetensors", "-o", here / "new", "--ranks", "1")
    assert (done.exit_code, done.stderr) == (0, "")


def test_tied_tensors_are_one_adapter_and_the_other_name_is_recorded(tmp_path: Path):
    for name, step in (("base", 0.0), ("tuned", 1.0)):
        save(tmp_path / f"{name}.safetensors", weights(step), {"format": "pt", "head.weight": "fc.weight"})
    paths = tmp_path / "base.safetensors", tmp_path / "tuned.safetensors"
    report = json.loads(run("extract", *paths, "-o", tmp_path / "out", "--json").stdout)
    assert report["options"]["aliases"] == {"head.weight": "fc.weight"}
    assert {row["name"] for row in report["tensors"]} == set(weights(0.0))


def test_names_of_files_may_be_any_bytes(here: Path):
    base = here / os.fsdecode(b"b\xff\x1b[31m.safetensors")
    shutil.move(here / "base.safetensors", base)
    out = here / os.fsdecode(b"o\xfe" + b"x" * 230)
    done = run("extract", base, here / "tuned.safetensors", "-o", out, "--ranks", "1", "--html", here / "r.html")
    assert (done.exit_code, done.stderr) == (0, "")
    assert ft.load_adapter(out).config["base_model_name_or_path"].endswith(r"b\udcff\x1b[31m.safetensors")
    refused = run("extract", base, here / "gone\x1b[31m", "-o", out)
    assert r"gone\x1b[31m: no such file" in error_line(refused)


def test_thousands_of_tensors_are_no_matter(tmp_path: Path):
    count = 4000
    header = {f"layers.{k}.scale": entry("F32", [1], 4 * k, 4 * k + 4) for k in range(count)}
    for name, value in (("base", 0.0), ("tuned", 1.0)):
        (tmp_path / f"{name}.safetensors").write_bytes(raw(header, np.full(count, value, "<f4").tobytes()))
    paths = tmp_path / "base.safetensors", tmp_path / "tuned.safetensors"
    done = run("extract", *paths, "-o", tmp_path / "out", "--include", "layers.*9.scale", "--json")
    assert json.loads(done.stdout)["totals"]["whole"] == count // 10


# Every step fails in turn ---------------------------------------------------------------------------------------------


_FSYNC = os.fsync


class Faults:
    """Makes the n-th of the system calls that a command makes fail, or counts them."""

    CALLS = ("open", "pwrite", "preadv", "fsync", "mkdir", "rename", "replace", "ftruncate", "chmod")

    def __init__(self, monkeypatch: pytest.MonkeyPatch, here: Path) -> None:
        self.count, self.at, self.error = 0, -1, OSError()
        self.here = here
        for name in self.CALLS:
            monkeypatch.setattr(os, name, self.wrapped(getattr(os, name)))
        monkeypatch.setattr(_files, "_exchange", self.wrapped(_files._exchange))

    def wrapped(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **options: Any) -> Any:
            path = args[0] if isinstance(args[0], str | os.PathLike) else ""
            # Modules that are loaded on the way are not the command's, and a clean-up must be able to work.
            own = not path or str(self.here) in os.fspath(path)
            if own and sys._getframe(1).f_globals["__name__"] != "shutil":
                self.count += 1
                if self.count - 1 == self.at:
                    raise self.error
            return None if call is _FSYNC else call(*args, **options)  # no test waits for a disk

        return counted

    @contextlib.contextmanager
    def failing(self, at: int, error: BaseException) -> Iterator[None]:
        self.count, self.at, self.error = 0, at, error  # type: ignore[assignment]
        try:
            yield
        finally:
            self.at = -1


FAULTS: dict[str, BaseException] = {
    "disk full": OSError(errno.ENOSPC, "No space left on device"),
    "disk broken": OSError(errno.EIO, "Input/output error"),
    "Ctrl-C": KeyboardInterrupt(),
}
WRITERS = {
    "extract by ranks": "extract base.safetensors tuned.safetensors -o result --ranks 2 --overwrite",
    "extract by budget": "extract model tuned.safetensors -o result --max-ratio 30% --overwrite",
    "merge to a directory": "merge model out -o result --overwrite --verify-base ignore",
    "merge to a file": "merge base.safetensors out -o result.safetensors --overwrite",
    "round": "round out -o result --max-parameters 40 --overwrite",
    "convert": "convert out result --to flora --overwrite",
    "ranks": "ranks base.safetensors tuned.safetensors --html result.html",
}


def words(here: Path, line: str) -> list[str]:
    names = ("base.safetensors", "tuned.safetensors", "model", "out", "result", "result.safetensors", "result.html")
    return [str(here / word) if word in names else word for word in line.split()]


def outputs(here: Path) -> dict[str, bytes | str]:
    return {name: content for name, content in tree(here).items() if "result" in name}


@pytest.mark.parametrize("kind", FAULTS)
@pytest.mark.parametrize("command", WRITERS)
def test_whatever_step_fails_the_output_is_the_old_or_the_new_one(
    command: str, kind: str, here: Path, monkeypatch: pytest.MonkeyPatch
):
    arguments = words(here, WRITERS[command])
    assert run(*arguments).exit_code == 0  # everything is loaded
    new = outputs(here)
    for name in [name for name in new if "/" not in name]:
        target = here / name
        shutil.rmtree(target) if target.is_dir() else target.unlink()
    older = [w if w not in ("2", "30%", "40") else {"2": "1", "30%": "20%", "40": "30"}[w] for w in arguments]
    assert run(*older).exit_code == 0
    old = outputs(here)
    faults = Faults(monkeypatch, here)
    error = FAULTS[kind]
    with faults.failing(-1, error):
        assert run(*arguments).exit_code == 0
    total = faults.count
    assert total > 10
    codes = set()
    for at in range(list(FAULTS).index(kind), total, 3):  # the three kinds together take every step
        if outputs(here) != old:
            run(*older)
        with faults.failing(at, type(error)(*error.args)):
            result = run(*arguments)
        codes.add(result.exit_code)
        assert result.exit_code in (0, 130 if kind == "Ctrl-C" else 4), result.stderr
        if result.exit_code:
            error_line(result)
        left = outputs(here)
        partial = {name: left.pop(name) for name in list(left) if name.startswith("result.partial")}
        assert not partial or kind != "disk full"
        assert left in (old, new)
        shutil.rmtree(here / "result.partial", ignore_errors=True)
    assert codes - {0}


LIMITED = """
import resource, runpy
resource.setrlimit(resource.RLIMIT_FSIZE, (900, 900))
runpy.run_module("flora_tensor", run_name="__main__")
"""


@pytest.mark.parametrize("command", ["extract by ranks", "merge to a directory", "ranks"])
def test_a_limit_on_files_is_an_error_like_a_full_disk(command: str, here: Path):
    save(here / "base.safetensors", weights(0.0) | {"w": np.zeros((99, 99))})
    save(here / "tuned.safetensors", weights(1.0) | {"w": np.random.default_rng(0).standard_normal((99, 99))})
    before = tree(here)
    line = words(here, WRITERS[command].replace("model", "base.safetensors"))
    line += ["--ranks", "90"] if "extract" in command else []
    done = subprocess.run([sys.executable, "-c", LIMITED, *line], capture_output=True, text=True, check=False)
    assert done.returncode == 4
    assert re.search(f"File too large: {here}", error_line(done))
    assert tree(here) == before
