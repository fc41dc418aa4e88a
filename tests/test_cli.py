"""The command line: exit codes, streams, and one real process."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import click
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

import flora_tensor as ft
from checkpoints import load, run, save
from flora_tensor import cli
from flora_tensor.cli.options import count, ranks, share, size, tolerance
from support import optional

torch = optional("torch")


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    rng = np.random.default_rng(0)
    base = {"conv.weight": rng.standard_normal((8, 6, 3, 3)), "conv.bias": np.zeros(8), "same": np.ones((2, 2))}
    tuned = {**base, "conv.weight": base["conv.weight"] + rng.standard_normal((8, 6, 3, 3)), "conv.bias": np.ones(8)}
    return save(tmp_path / "base.safetensors", base), save(tmp_path / "tuned.safetensors", tuned)


def test_the_way_from_two_checkpoints_to_a_merged_one(pair: tuple[Path, Path], tmp_path: Path):
    adapter, merged = tmp_path / "adapter", tmp_path / "merged.safetensors"
    extracted = run("extract", *pair, "-o", adapter, "--rtol", "0", "--dtype", "float64")
    assert extracted.exit_code == 0, extracted.stderr
    assert extracted.stderr == ""
    assert "conv.weight" in extracted.stdout
    assert "- (unchanged)" in extracted.stdout
    inspected = run("inspect", adapter)
    assert inspected.exit_code == 0
    assert "1 weight, 1 tensor whole" in inspected.stdout
    result = run("merge", pair[0], adapter, "-o", merged)
    assert result.stdout == "1 tensors merged, 1 replaced, 1 copied: merged.safetensors\n"
    assert run("merge", pair[0], adapter, "-o", merged).stderr.startswith(
        "error: merge: the file exists; choose another"
    )
    for name, tensor in load(pair[1]).items():
        torch.testing.assert_close(load(merged)[name], tensor, rtol=1e-12, atol=1e-12)
    different = run("diff", pair[0], merged)
    assert "2 of 3 tensors differ" in different.stdout


def test_what_is_no_model_or_no_adapter_is_named_with_what_to_do(pair: tuple[Path, Path], tmp_path: Path):
    base, tuned = pair
    adapter, lora = tmp_path / "adapter", tmp_path / "lora"
    assert run("extract", base, tuned, "-o", adapter, "--ranks", "2", "--vectors", "skip").exit_code == 0
    assert run("convert", adapter, lora, "--to", "peft-lora").exit_code == 0
    for directory in (adapter, lora):
        refused = run("extract", base, directory, "-o", tmp_path / "x")
        assert refused.exit_code == 3
        assert f"{directory} holds an adapter, not a model's weights" in refused.stderr
    assert "base.safetensors; an adapter is a directory with" in run("inspect", base).stderr
    assert "peft_type is 'LORA'; 'FLORA' is needed; convert it first" in run("inspect", lora).stderr
    prefixed = save(
        tmp_path / "p.safetensors", {f"model.{n}": x for n, x in safetensors.numpy.load_file(tuned).items()}
    )
    refused = run("extract", base, prefixed, "-o", tmp_path / "x")
    assert "one side's names begin with 'model.': save both from the same class" in refused.stderr
    refused = run("extract", base, tuned, "-o", tmp_path / "x", "--include", "conv")
    assert "include pattern 'conv' matches no tensor; it has to match the whole name: pass '*conv*'" in refused.stderr


@pytest.mark.parametrize("device", ["cuda:99", "nonsense", "mps"])
def test_a_device_that_is_not_there_is_refused_before_the_work(device: str, pair: tuple[Path, Path], tmp_path: Path):
    pytest.importorskip("torch")
    refused = run("extract", *pair, "-o", tmp_path / "x", "--device", device)
    assert refused.exit_code == 2
    assert f"extract: device '{device}' cannot be used: " in refused.stderr
    assert not (tmp_path / "x").exists()


def test_json_is_all_that_stdout_gets(pair: tuple[Path, Path], tmp_path: Path):
    adapter = tmp_path / "adapter"
    report = json.loads(run("extract", *pair, "-o", adapter, "--max-ratio", "50%", "--json").stdout)
    assert report["totals"]["n_parameters"] <= 0.5 * report["totals"]["dense_parameters"]
    assert report == json.loads((adapter / "extraction_report.json").read_text())
    content = json.loads(run("inspect", adapter, "--json").stdout)
    assert content["weights"][0]["name"] == "conv.weight"
    assert content["whole"] == [{"name": "conv.bias", "shape": [8], "dtype": "F64"}]
    change = ft.load_adapter(adapter).delta("conv.weight")
    assert content["weights"][0]["delta_norm"] == pytest.approx(np.linalg.norm(change), rel=1e-5)
    merged = json.loads(run("merge", pair[0], adapter, "-o", tmp_path / "m", "--json").stdout)
    assert merged["files"] == ["model.safetensors"]
    assert json.loads(run("diff", *pair, "--json").stdout)["equal"] is False
    study = json.loads(run("ranks", *pair, "--json", "--budget", "10%", "--budget", "1").stdout)
    assert [row["max_ratio"] for row in study["budgets"]] == [0.1, 1.0]
    assert [len(v) for v in study["weights"][0]["singular_values"]] == [8, 6, 3, 3]


def test_options_reach_the_functions(pair: tuple[Path, Path], tmp_path: Path):
    arguments = ["--ranks", "4,3,2,2", "--include", "conv*", "--exclude", "*.bias", "--arrangement", "o i h w"]
    report = json.loads(run("extract", *pair, "-o", tmp_path / "a", "--json", "--dtype", "float16", *arguments).stdout)
    rows = {row["name"]: row for row in report["tensors"]}
    assert rows["conv.weight"]["ranks"] == [4, 3, 2, 2]
    assert rows["conv.bias"]["reason"] == rows["same"]["reason"] == "excluded by name"
    assert ft.load_adapter(tmp_path / "a").dtypes["conv.weight"] == "F16"
    dry = json.loads(run("extract", *pair, "--dry-run", "--json", "--vectors", "skip").stdout)
    assert dry["dry_run"] is True
    sizes = run("merge", pair[0], tmp_path / "a", "-o", tmp_path / "m", "--max-shard-size", "0.1kB", "--json")
    assert len(json.loads(sizes.stdout)["files"]) == 3


def test_a_picture_of_the_spectra_is_drawn(pair: tuple[Path, Path], tmp_path: Path):
    result = run("ranks", *pair, "--plot", tmp_path / "s.png")
    assert result.exit_code == 0, result.stderr
    assert (tmp_path / "s.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert "ranks at 90 %" in result.stdout
    assert "lower bound" in result.stdout


@pytest.mark.parametrize(
    ("text", "value"), [("5%", 0.05), ("0.05", 0.05), ("100%", 1.0), (" 2.5% ", 0.025), ("1", 1.0), ("1e-3", 1e-3)]
)
def test_shares_are_percent_or_fractions(text: str, value: float):
    assert share(text) == pytest.approx(value)


def test_ranks_and_sizes_are_read():
    assert ranks("16") == 16
    assert ranks("16,16,2,2") == [16, 16, 2, 2]
    sizes = {
        "1000": 1000,
        "5GB": 5 * 10**9,
        "512MiB": 512 * 2**20,
        "1.5k": 1500,
        "2B": 2,
        "1e6": 10**6,
        "2e3 kB": 2 * 10**6,
    }
    assert {s: size(s) for s in sizes} == sizes
    counts = {
        "7": 7,
        "1_000": 1000,
        "1e6": 10**6,
        "2M": 2 * 10**6,
        "1.5B": 15 * 10**8,
        "2.5k": 2500,
        "9" * 20: 10**20 - 1,
    }
    assert {s: count(s) for s in counts} == counts
    assert [tolerance(s) for s in ("0.1", "10%", "0", "1e-3")] == [0.1, 0.1, 0.0, 1e-3]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["extract", "BASE"], 2, "Missing argument 'TUNED'"),
        (["extract", "BASE", "TUNED"], 2, "missing option '-o' / '--out'; pass a directory, or --dry-run"),
        (
            ["extract", "BASE", "TUNED", "-o", "OUT", "--max-ratio", "five"],
            2,
            "'five' is not a share; pass one such as",
        ),
        (["extract", "BASE", "TUNED", "-o", "OUT", "--max-ratio", "0%"], 2, "'0%' is not a share above 0"),
        (["extract", "BASE", "TUNED", "-o", "OUT", "--max-ratio", "nan"], 2, "'nan' is not a share above 0"),
        (["extract", "BASE", "TUNED", "-o", "OUT", "--ranks", "4x4"], 2, "'4x4' is not a list of ranks"),
        (["extract", "BASE", "TUNED", "-o", "OUT", "--ranks", "0"], 2, "rank 0; pass at least 1"),
        (["extract", "BASE", "TUNED", "-o", "OUT", "--ranks", "2", "--rtol", "0.1"], 2, "pass one of ranks, rtol"),
        (["extract", "BASE", "TUNED", "-o", "OUT", "--vectors", "x"], 2, "'x' is not one of"),
        (["extract", "BASE", "TUNED", "-o", "OUT", "--max-memory", "lots"], 2, "'lots' is not a size"),
        (
            ["extract", "BASE", "TUNED", "-o", "OUT", "--max-parameters", "1.5"],
            2,
            "'1.5' is not a count; pass one such",
        ),
        (["extract", "BASE", "TUNED", "-o", "OUT", "--max-parameters", "-5"], 2, "'-5' is not a count"),
        (["extract", "BASE", "TUNED", "-o", "OUT", "--rtol", "low"], 2, "'low' is not an error; pass one such as 0.1"),
        (["extract", "BASE", "TUNED", "-o", "OUT", "--rtol", "-1%"], 2, "rtol is -0.01; pass a number from 0 to 1"),
        (["extract", "BASE", "TUNED", "-o", "-"], 2, "'-' is no place to write to; pass a path"),
        (["extract", "BASE", "TUNED", "-o", "BASE"], 2, "is or holds the input"),
        (["extract", "BASE", "BASE", "-o", "OUT"], 3, "nothing to extract"),
        (["extract", "BASE", "PICKLE", "-o", "OUT"], 3, "a pickle file, which can run code"),
        (["extract", "BASE", "gone", "-o", "OUT"], 4, "gone: no such file"),
        (["extract", "BASE", "TUNED", "-o", "/proc/x"], 4, "No such file or directory: /proc/"),
        (["extract", "BASE", "TUNED", "-o", "OUT", "--max-memory", "1kB"], 5, "needs about"),
        (["merge", "BASE", "gone", "-o", "OUT"], 4, "gone"),
        (["inspect", "BASE"], 4, "Not a directory"),
        (["diff", "BASE", "gone"], 4, "gone: no such file"),
        (["nonsense"], 2, "No such command 'nonsense'"),
        (["--nonsense"], 2, "No such option"),
    ],
)
def test_errors_are_one_line_and_an_exit_code(
    arguments: list[str], code: int, message: str, pair: tuple[Path, Path], tmp_path: Path
):
    torch.save({"w": torch.ones(2)}, tmp_path / "m.pt")
    names = {"BASE": pair[0], "TUNED": pair[1], "OUT": tmp_path / "out", "PICKLE": tmp_path / "m.pt"}
    result = run(*(names.get(a, a) for a in arguments))
    assert (result.exit_code, result.stdout) == (code, ""), result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert message in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_budget_beyond_everything_stores_everything(pair: tuple[Path, Path], tmp_path: Path):
    done = run("extract", *pair, "-o", tmp_path / "a", "--max-parameters", "9" * 30, "--json")
    assert json.loads(done.stdout)["totals"]["n_parameters"] == 8 * 6 * 9, done.stderr
    assert run("round", tmp_path / "a", "-o", tmp_path / "r", "--max-bytes", "9" * 30).exit_code == 0


def test_an_existing_output_is_an_io_error(pair: tuple[Path, Path], tmp_path: Path):
    assert run("extract", *pair, "-o", tmp_path / "a", "--ranks", "2").exit_code == 0
    refused = run("extract", *pair, "-o", tmp_path / "a", "--ranks", "2")
    assert (refused.exit_code, refused.stdout) == (4, "")
    assert "--overwrite" in refused.stderr
    assert run("extract", *pair, "-o", tmp_path / "a", "--ranks", "2", "--overwrite").exit_code == 0


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted; nothing was written"),
        (MemoryError(), 5, "not enough memory"),
        (ImportError("plots need matplotlib"), 5, "plots need matplotlib"),
        (ft.InputError("two\nlines"), 3, "two lines"),
        (OSError(28, "No space left on device", "/x"), 4, "No space left on device: /x"),
        (RuntimeError("a mistake"), 1, "unexpected RuntimeError: a mistake; run again with --debug"),
        (torch.OutOfMemoryError("CUDA"), 5, "CUDA"),
    ],
)
def test_every_kind_of_error_has_its_code(
    error: BaseException, code: int, message: str, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
):
    def fail(*args: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr("flora_tensor.comparison.diff_checkpoints", fail)
    result = run("diff", *pair)
    assert result.exit_code == code
    assert result.stderr.startswith(f"error: {message}")
    assert "Traceback" not in result.stderr
    assert "Traceback" in run("diff", *pair, "--debug").stderr


def test_a_closed_pipe_is_no_error(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch):
    def fail(*args: Any, **options: Any) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("flora_tensor.comparison.diff_checkpoints", fail)
    result = run("diff", *pair)
    assert (result.exit_code, result.stderr) == (0, "")


def test_a_reader_that_leaves_ends_a_real_process_quietly(pair: tuple[Path, Path]):
    command = [sys.executable, "-m", "flora_tensor", "ranks", str(pair[0]), str(pair[1]), "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


def test_our_warnings_are_one_line(pair: tuple[Path, Path], tmp_path: Path):
    run("extract", *pair, "-o", tmp_path / "a", "--ranks", "2")
    result = run("merge", pair[1], tmp_path / "a", "-o", tmp_path / "m")
    assert result.exit_code == 0
    assert result.stderr.startswith("warning: merge: ")
    assert result.stderr.count("\n") == 1


def test_without_a_command_the_help_is_shown():
    assert run().stdout.startswith("Usage:")
    assert run("--help").exit_code == run().exit_code == 0
    assert ft.__version__ in run("--version").stdout
    for command in cli.main.commands:
        assert run(command, "--help").exit_code == 0
    shell = subprocess.run(
        [sys.executable, "-m", "flora_tensor"],
        env={**os.environ, "_FLORA_TENSOR_COMPLETE": "bash_source"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "complete -o nosort -F" in shell.stdout


@pytest.mark.parametrize("command", cli.main.commands.values(), ids=str)
def test_the_examples_of_every_help_text_can_be_typed(command: click.Command):
    lines = (command.epilog or "").splitlines()[2:]
    assert lines
    for line in lines:
        program, name, *words = shlex.split(line)
        assert (program, cli.main.commands[name]) == ("flora-tensor", command)
        context = command.make_context(name, words, resilient_parsing=False)
        assert context.params


def test_a_report_cannot_replace_a_checkpoint_and_is_refused_before_the_work(pair: tuple[Path, Path], tmp_path: Path):
    before = pair[1].read_bytes()
    for option, path, message in (
        ("--html", pair[1], "does not end in .html"),
        ("--plot", pair[1], "does not end in .png, .pdf or .svg"),
        ("--plot", tmp_path / "x.xyz", "does not end in .png"),
        ("--html", tmp_path, "is a directory or lies in none"),
        ("--plot", tmp_path / "gone" / "x.png", "is a directory or lies in none"),
    ):
        for command in (["extract", *pair, "-o", tmp_path / "out", "--ranks", "1"], ["ranks", *pair]):
            refused = run(*command, option, path)
            assert (refused.exit_code, refused.stdout) == (2, "")
            assert message in refused.stderr
    assert pair[1].read_bytes() == before
    assert not (tmp_path / "out").exists()


def test_where_to_write_a_conversion_is_said_once(pair: tuple[Path, Path], tmp_path: Path):
    run("extract", *pair, "-o", tmp_path / "a", "--ranks", "1", "--vectors", "skip")
    for arguments in ([], [tmp_path / "x", "-o", tmp_path / "y"]):
        refused = run("convert", tmp_path / "a", "--to", "flora", *arguments)
        assert (refused.exit_code, refused.stdout) == (2, "")
        assert "pass where to write once: as OUT, or with '-o' / '--out'" in refused.stderr
    for arguments in ([tmp_path / "x"], ["-o", tmp_path / "y"]):
        assert run("convert", tmp_path / "a", "--to", "flora", *arguments).exit_code == 0
    for name in ("x", "y"):
        assert list(ft.load_adapter(tmp_path / name)) == ["conv.weight"]


def test_progress_is_drawn_on_a_terminal_s_stderr_only(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("click.testing._NamedTextIOWrapper.isatty", lambda self: True, raising=False)
    result = run("diff", *pair, "--json")
    assert "comparing" in result.stderr
    json.loads(result.stdout)


@settings(max_examples=15)
@given(content=st.binary(max_size=200))
def test_no_bytes_make_a_traceback_or_a_partial_output(content: bytes, tmp_path_factory: pytest.TempPathFactory):
    here = tmp_path_factory.mktemp("cli")
    (here / "x.safetensors").write_bytes(content)
    (here / "adapter").mkdir()
    (here / "adapter" / "adapter_config.json").write_bytes(content)
    good = save(here / "good.safetensors", {"w": np.ones((2, 2))})
    for arguments in (
        ("extract", good, here / "x.safetensors", "-o", here / "out"),
        ("merge", good, here / "adapter", "-o", here / "out"),
        ("inspect", here / "adapter"),
        ("diff", here / "x.safetensors", good),
    ):
        result = run(*arguments)
        assert result.exit_code == 3
        assert result.stderr.count("\n") == 1
        assert not (here / "out").exists()


def test_a_real_process(pair: tuple[Path, Path], tmp_path: Path):
    command = [sys.executable, "-m", "flora_tensor"]
    arguments = ["extract", str(pair[0]), str(pair[1]), "-o", str(tmp_path / "a"), "--ranks", "3", "--json"]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["totals"]["tucker"] == 1
    again = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
    assert (again.returncode, again.stdout) == (4, "")
    assert "Traceback" not in again.stderr


def test_what_nohup_starts_hears_no_terminal_close(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch):
    def close_the_terminal(*_: object, **__: object) -> NoReturn:
        os.kill(os.getpid(), signal.SIGHUP)
        raise ft.InputError("went on")

    monkeypatch.setattr("flora_tensor.comparison.diff_checkpoints", close_the_terminal)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        result = run("diff", *pair)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    assert (result.exit_code, result.stderr) == (3, "error: went on\n")


def test_an_output_that_exists_is_refused_before_the_work(pair: tuple[Path, Path], tmp_path: Path):
    adapter, out = tmp_path / "adapter", tmp_path / "out"
    assert run("extract", *pair, "-o", adapter, "--ranks", "2", "--vectors", "skip").exit_code == 0
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    damaged = adapter / "adapter_model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])  # nobody is to read it
    calls = {"round": ("--rtol", "0.5"), "add": (), "subtract": (adapter,), "scale": ("2",)}
    for command, more in calls.items():
        for overwrite, told in (
            ((), "the directory exists"),
            (("--overwrite",), "holds 'notes.txt', which is not of its"),
        ):
            result = run(command, adapter, *more, "-o", out, *overwrite)
            assert (result.exit_code, result.stderr.count("\n")) == (4, 1)
            assert result.stderr.startswith(f"error: {command}: {told}")
    assert (out / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_ends_a_run_that_can_be_continued(number: int, code: int, tmp_path: Path):
    x = np.random.default_rng(0).standard_normal((600, 600)).astype(np.float32)
    base = save(tmp_path / "b.safetensors", {f"w{k}": x for k in range(30)})
    tuned = save(tmp_path / "t.safetensors", {f"w{k}": x * (k + 2) for k in range(30)})
    # What runs in the background of a shell script ignores Ctrl-C, and so would its children.
    start = (
        "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "runpy.run_module('flora_tensor', run_name='__main__')"
    )
    command = [sys.executable, "-c", start, "extract", str(base), str(tuned), "-o", str(tmp_path / "out")]
    lines = tmp_path / "out.partial" / "journal.jsonl"
    with subprocess.Popen(command, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"}) as process:
        deadline = time.monotonic() + 300
        # Two lines: of a last one it is not known whether the run has counted it yet.
        while not (lines.exists() and lines.read_bytes().count(b"\n") > 1) and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=300)
    assert process.returncode == code
    assert re.fullmatch(
        rf"error: interrupted; \d+ finished tasks? (is|are) kept in {tmp_path}/out.partial; "
        r"continue with resume=True \(--resume\)\n",
        stderr.decode(),
    )
    assert {p.name for p in tmp_path.iterdir()} == {"b.safetensors", "t.safetensors", "out.partial"}
    refused = run("extract", base, tuned, "-o", tmp_path / "out")
    assert (refused.exit_code, refused.stdout) == (4, "")
    assert "keeps what an unfinished run has done; continue it with resume=True (--resume)" in refused.stderr
    assert run("extract", base, tuned, "-o", tmp_path / "out", "--resume").exit_code == 0
    assert {p.name for p in tmp_path.iterdir()} == {"b.safetensors", "t.safetensors", "out"}
