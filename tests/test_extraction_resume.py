"""Runs that are interrupted, killed or tampered with end in the same bytes as one that was left alone."""

import contextlib
import json
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import flora_tensor as ft
from checkpoints import run, save
from flora_tensor._files import locked
from flora_tensor._journal import Journal
from flora_tensor._storing import Part
from flora_tensor._survey import Weight
from flora_tensor._tasks import Outcome, pack, unpack
from flora_tensor.report import TensorRow
from flora_tensor.spectra import Frontier

CRITERIA: list[dict[str, Any]] = [{"ranks": 3}, {"max_ratio": 0.3}, {"rtol": 0.4}]


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    rng = np.random.default_rng(0)
    base = {f"m{k}.weight": rng.standard_normal((12, 8 + k)).astype(np.float32) for k in range(4)}
    base |= {"conv.weight": rng.standard_normal((8, 6, 3, 3)), "bias": np.zeros(5), "same": np.ones((3, 3))}
    tuned = {n: x if n == "same" else x + rng.standard_normal(x.shape).astype(x.dtype) for n, x in base.items()}
    return save(tmp_path / "base.safetensors", base), save(tmp_path / "tuned.safetensors", tuned)


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def interrupt_after(calls: int) -> Any:
    """A progress callback that interrupts the run at its n-th call."""
    left = iter(range(calls))

    def progress(phase: str, done: int, total: int, name: str) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt

    return progress


@pytest.mark.parametrize("criterion", CRITERIA)
def test_a_run_interrupted_anywhere_ends_in_the_same_bytes(
    criterion: dict[str, Any], pair: tuple[Path, Path], tmp_path: Path
):
    ft.extract(*pair, tmp_path / "whole", **criterion)
    calls: list[str] = []
    ft.extract(*pair, tmp_path / "counted", progress=lambda phase, *_: calls.append(phase), **criterion)
    for stop in range(len(calls)):
        out = tmp_path / f"out{stop}"
        with pytest.raises(KeyboardInterrupt):
            ft.extract(*pair, out, progress=interrupt_after(stop), **criterion)
        assert not out.exists()
        report = ft.extract(*pair, out, resume=True, **criterion)
        assert content(out) == content(tmp_path / "whole")
        assert report.to_json() == (out / "extraction_report.json").read_text().rstrip("\n")
        assert not (tmp_path / f"out{stop}.partial").exists()


def computed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record which tensors are decomposed."""
    names: list[str] = []
    original = ft.decomposition.tucker_of

    def counted(x: Any, *arguments: Any) -> Any:
        names.append(str(tuple(x.shape)))
        return original(x, *arguments)

    monkeypatch.setattr("flora_tensor._storing.tucker_of", counted)
    return names


def test_what_is_finished_is_not_done_again_unless_it_no_longer_fits(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    names = computed(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        ft.extract(*pair, tmp_path / "out", ranks=3, progress=interrupt_after(6))
    first = len(names)
    assert first > 1
    ft.extract(*pair, tmp_path / "out", ranks=3, resume=True)
    assert len(names) == 5
    # Other options, so that nothing fits.
    names.clear()
    with pytest.raises(KeyboardInterrupt):
        ft.extract(*pair, tmp_path / "more", ranks=3, progress=interrupt_after(6))
    ft.extract(*pair, tmp_path / "more", ranks=2, resume=True)
    assert len(names) == first + 5
    ft.extract(*pair, tmp_path / "fresh", ranks=2)
    assert content(tmp_path / "more") == content(tmp_path / "fresh")


def test_a_tensor_that_changed_since_is_done_again(pair: tuple[Path, Path], tmp_path: Path):
    with pytest.raises(KeyboardInterrupt):
        ft.extract(*pair, tmp_path / "out", ranks=3, progress=interrupt_after(6))
    tensors = {name: ft.open_checkpoint(pair[1]).read(name) for name in ft.open_checkpoint(pair[1]).names()}
    tensors["m0.weight"] = tensors["m0.weight"] + 1
    save(pair[1], tensors)
    ft.extract(*pair, tmp_path / "out", ranks=3, resume=True)
    ft.extract(*pair, tmp_path / "fresh", ranks=3)
    assert content(tmp_path / "out") == content(tmp_path / "fresh")


@settings(max_examples=40)
@given(data=st.data())
def test_no_damage_to_what_was_kept_shows_in_the_result(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory):
    here = tmp_path_factory.mktemp("damage")
    rng = np.random.default_rng(0)
    base = {f"w{k}": rng.standard_normal((6, 5)) for k in range(4)}
    paths = save(here / "b.safetensors", base), save(here / "t.safetensors", {n: x + 1 for n, x in base.items()})
    with pytest.raises(KeyboardInterrupt):
        ft.extract(*paths, here / "out", ranks=2, progress=interrupt_after(3))
    file = here / "out.partial" / data.draw(st.sampled_from(["journal.jsonl", "results.bin"]))
    content_before = bytearray(file.read_bytes())
    if data.draw(st.booleans()):
        content_before = content_before[: data.draw(st.integers(0, len(content_before)))]
    else:
        for _ in range(data.draw(st.integers(1, 3))):
            content_before[data.draw(st.integers(0, len(content_before) - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(content_before)
    ft.extract(*paths, here / "out", ranks=2, resume=True)
    ft.extract(*paths, here / "fresh", ranks=2)
    assert content(here / "out") == content(here / "fresh")


@pytest.mark.parametrize("arguments", [["--ranks", "8"], ["--max-ratio", "10%"]])
def test_a_run_that_is_killed_again_and_again_ends_in_the_same_bytes(arguments: list[str], tmp_path: Path):
    rng = np.random.default_rng(0)
    base = {f"w{k}": rng.standard_normal((300, 200)).astype(np.float32) for k in range(16)}
    tuned = {n: x + rng.standard_normal(x.shape).astype(np.float32) for n, x in base.items()}
    paths = save(tmp_path / "b.safetensors", base), save(tmp_path / "t.safetensors", tuned)
    assert run("extract", *paths, "-o", tmp_path / "whole", *arguments).exit_code == 0
    command = [
        sys.executable,
        "-m",
        "flora_tensor",
        "extract",
        *map(str, paths),
        "-o",
        str(tmp_path / "out"),
        "--resume",
    ]
    moments = random.Random(1)
    journal = tmp_path / "out.partial" / "journal.jsonl"
    kills = 0
    for attempt in range(4):
        with subprocess.Popen([*command, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
            size = journal.stat().st_size if journal.exists() else 0
            while process.poll() is None and (journal.stat().st_size if journal.exists() else 0) <= size:
                time.sleep(0.002)
            time.sleep(moments.uniform(0, 0.03))
            if process.poll() is None:
                process.kill()
                kills += 1
        if (tmp_path / "out").exists():
            break
        assert attempt == 0 or journal.exists()
    assert kills
    done = run("extract", *paths, "-o", tmp_path / "out", "--resume", "--overwrite", *arguments)
    assert done.exit_code == 0, done.stderr
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    left = {p.name for p in tmp_path.iterdir()}
    assert left == {"b.safetensors", "t.safetensors", "whole", "out"}


def test_the_old_adapter_stays_until_the_new_one_is_complete(pair: tuple[Path, Path], tmp_path: Path):
    ft.extract(*pair, tmp_path / "out", ranks=1)
    old = content(tmp_path / "out")
    for stop in (0, 3, 6):
        with pytest.raises(KeyboardInterrupt):
            ft.extract(*pair, tmp_path / "out", ranks=3, overwrite=True, progress=interrupt_after(stop))
        assert content(tmp_path / "out") == old
    ft.extract(*pair, tmp_path / "out", ranks=3, overwrite=True, resume=True)
    ft.extract(*pair, tmp_path / "fresh", ranks=3)
    assert content(tmp_path / "out") == content(tmp_path / "fresh")


def test_an_unfinished_run_is_neither_lost_nor_continued_unasked(pair: tuple[Path, Path], tmp_path: Path):
    with pytest.raises(KeyboardInterrupt) as interrupt:
        ft.extract(*pair, tmp_path / "out", ranks=3, progress=interrupt_after(4))
    assert interrupt.value.__notes__ == [
        f"2 finished tasks are kept in {tmp_path}/out.partial; continue with resume=True (--resume)"
    ]
    before = content(tmp_path / "out.partial")
    with pytest.raises(FileExistsError, match="keeps what an unfinished run has done; continue it with resume=True"):
        ft.extract(*pair, tmp_path / "out", ranks=3)
    assert content(tmp_path / "out.partial") == before
    ft.extract(*pair, tmp_path / "out", ranks=3, overwrite=True)
    assert not (tmp_path / "out.partial").exists()


def test_a_refused_input_leaves_nothing_and_a_failing_system_leaves_what_is_finished(
    pair: tuple[Path, Path], tmp_path: Path
):
    def fail(error: BaseException) -> Any:
        calls = iter(range(4))

        def progress(*_: Any) -> None:
            if next(calls, None) is None:
                raise error

        return progress

    for error, stays in (
        (ft.InputError("no"), False),
        (ValueError("no"), False),
        (OSError(28, "No space left on device"), False),
        (OSError(5, "Input/output error"), True),
        (MemoryError(), True),
        (ft.ResourceError("no"), True),
    ):
        with pytest.raises(type(error)):
            ft.extract(*pair, tmp_path / "out", ranks=3, progress=fail(error), overwrite=True)
        assert (tmp_path / "out.partial").exists() == stays
        assert not (tmp_path / "out").exists()


def test_two_runs_to_one_output_do_not_meet(pair: tuple[Path, Path], tmp_path: Path):
    with locked("extract", tmp_path / "out"):
        refused = run("extract", *pair, "-o", tmp_path / "out", "--resume")
        assert refused.exit_code == 4
        assert f"process {os.getpid()} is writing {tmp_path / 'out'}; wait for it to end" in refused.stderr
    assert run("extract", *pair, "-o", tmp_path / "out").exit_code == 0


def test_a_lock_of_a_run_that_died_is_no_lock(pair: tuple[Path, Path], tmp_path: Path):
    program = (
        "import os, pathlib, sys\nfrom flora_tensor._files import locked\n"
        "with locked('x', pathlib.Path(sys.argv[1])):\n    os.kill(os.getpid(), 9)"
    )
    killed = subprocess.run([sys.executable, "-c", program, str(tmp_path / "out")], check=False)
    assert killed.returncode == -9
    assert (tmp_path / ".out.lock").exists()
    assert run("extract", *pair, "-o", tmp_path / "out").exit_code == 0


def test_a_partial_directory_of_somebody_else_is_left_alone(pair: tuple[Path, Path], tmp_path: Path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "mine.txt").write_text("mine")
    ft.extract(*pair, tmp_path / "out", ranks=3, resume=True)
    assert (tmp_path / "out.partial" / "mine.txt").read_text() == "mine"


def test_the_adapter_is_there_at_every_moment_of_its_replacement(pair: tuple[Path, Path], tmp_path: Path):
    ft.extract(*pair, tmp_path / "out", ranks=1)
    file = tmp_path / "out" / "adapter_model.safetensors"
    old, stop = file.read_bytes(), threading.Event()
    seen: set[bytes | None] = set()

    def watch() -> None:
        while not stop.is_set():
            seen.add(None if not (tmp_path / "out").is_dir() else old)
            with contextlib.suppress(FileNotFoundError):  # the old directory, removed between its name and its file's
                seen.add(file.read_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        ft.extract(*pair, tmp_path / "out", ranks=3, overwrite=True)
    finally:
        stop.set()
        watcher.join()
    new = file.read_bytes()
    assert new != old
    assert seen <= {old, new}


# The journal ----------------------------------------------------------------------------------------------------------

numbers = st.floats(allow_nan=False, allow_infinity=False)
arrays = st.integers(0, 5).flatmap(lambda n: st.lists(numbers, min_size=n, max_size=n)).map(np.array)


@given(
    norm=numbers,
    error=numbers,
    squares=st.floats(allow_nan=False),
    values=arrays,
    scale=numbers,
    sizes=st.integers(1, 9),
)
def test_an_outcome_is_read_back_to_the_last_bit(
    norm: float, error: float, squares: float, values: np.ndarray, scale: float, sizes: int
):
    row = TensorRow("é", "tucker", shape=(3, sizes), delta_norm=norm, relative_error=error, notes=("a", "b"))
    counts = np.arange(len(values), dtype=np.int64)
    frontier = Frontier(counts, values.astype(np.float64), np.stack([counts, counts], axis=1), squares, 7)
    arrangement = ft.Arrangement("(g c) i -> g c i", {"g": sizes})
    weight = Weight(row, (arrangement, ft.Arrangement.native(2)), [frontier], arrangement, (1, 2), error, "ab-cd")
    parts = {f"factor_{k}": Part("F32", (k, 2), np.arange(8 * k, dtype=np.uint8)) for k in (0, 1, 10)}
    outcome = Outcome(row, weight, scale, parts)
    again = unpack(np.frombuffer(pack(outcome), np.uint8))
    assert pack(again) == pack(outcome)
    assert again.row == row
    assert again.weight is not None
    assert (again.weight.arrangements, again.weight.ranks, again.weight.digest) == (
        weight.arrangements,
        (1, 2),
        "ab-cd",
    )
    assert again.weight.frontiers[0].norm_squared == squares
    np.testing.assert_array_equal(again.weight.frontiers[0].error_squared, values)
    assert [p.data.tolist() for p in again.parts.values()] == [p.data.tolist() for p in parts.values()]
    assert list(again.parts) == list(parts)


def test_a_journal_takes_over_what_is_whole(tmp_path: Path):
    journal = Journal(tmp_path)
    for k in range(3):
        journal.add("look", f"w{k}", "options", f"inputs{k}", bytes([k]) * 10)
    journal.close()
    lines = (tmp_path / "journal.jsonl").read_text().splitlines()
    assert json.loads(lines[0]) == {"format": "flora_tensor.partial", "version": 1}
    (tmp_path / "journal.jsonl").write_text("\n".join(lines)[:-3])  # the last line is torn
    again = Journal(tmp_path)
    assert len(again) == 2
    assert again.inputs_of("look", "w1", "options") == "inputs1"
    assert again.load("look", "w1", "options").tolist() == [1] * 10
    for task, name, options in (("look", "w2", "options"), ("decompose", "w1", "options"), ("look", "w1", "others")):
        assert again.inputs_of(task, name, options) == ""
    again.add("look", "w2", "options", "other", b"abc")
    assert again.load("look", "w2", "options").tobytes() == b"abc"
    again.close()
    assert (tmp_path / "results.bin").stat().st_size == 30
