"""What a process may still take, from files as Linux writes them."""

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoints import run, save
from flora_tensor._memory import available_memory
from support import optional

torch = optional("torch")

GIB = 2**30


def system(root: Path, **files: str) -> Path:
    """Lay out a system's files; two underscores stand for a slash."""
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


MACHINE = {"proc__meminfo": f"MemTotal: {99 * GIB // 1024} kB\nMemAvailable: {64 * GIB // 1024} kB\n"}


@pytest.mark.parametrize(
    ("files", "left"),
    [
        ({}, None),
        (MACHINE, 64 * GIB),
        (MACHINE | {"proc__self__cgroup": "0::/\n"}, 64 * GIB),
        (
            MACHINE
            | {
                "proc__self__cgroup": "0::/a/b\n",
                "sys__fs__cgroup__a__b__memory.max": "max\n",
                "sys__fs__cgroup__a__b__memory.current": "5\n",
                "sys__fs__cgroup__a__memory.max": f"{8 * GIB}\n",
                "sys__fs__cgroup__a__memory.current": f"{7 * GIB}\n",
                "sys__fs__cgroup__a__memory.stat": f"anon 5\nactive_file {GIB}\ninactive_file {2 * GIB}\n",
            },
            4 * GIB,
        ),
        (
            MACHINE
            | {
                "proc__self__cgroup": "5:cpu:/x\n4:memory:/box\n",
                "sys__fs__cgroup__memory__box__memory.limit_in_bytes": f"{2 * GIB}\n",
                "sys__fs__cgroup__memory__box__memory.usage_in_bytes": f"{3 * GIB}\n",
                "sys__fs__cgroup__memory__box__memory.stat": (
                    "active_file 1\ninactive_file 1\ntotal_active_file 0\ntotal_inactive_file 7\n"
                ),
            },
            0,
        ),
    ],
)
def test_the_narrowest_limit_counts(files: dict[str, str], left: int | None, tmp_path: Path):
    assert resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY
    assert available_memory(system(tmp_path, **files)) == left


@pytest.mark.parametrize(
    ("kind", "text"),
    [(lambda: MemoryError, "Unable to allocate 3 GiB"), (lambda: torch.OutOfMemoryError, "CUDA out of\nit")],
)
def test_memory_that_gives_out_all_the_same_names_the_tensor(
    kind: Callable[[], type[Exception]], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    error = kind()(text)

    def fail(*args: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr("flora_tensor._tasks.scan", fail)
    paths = [
        save(tmp_path / f"{name}.safetensors", {"w": np.full((3, 3), step)}) for name, step in (("b", 0.0), ("t", 1.0))
    ]
    done = run("extract", *paths, "-o", tmp_path / "out")
    assert (done.exit_code, done.stdout) == (5, "")
    reason = " ".join(str(error).split())
    assert done.stderr == f"error: extract: 'w': {reason}; exclude it, or use a machine with more memory\n"
    assert {path.name for path in tmp_path.iterdir()} == {"b.safetensors", "t.safetensors"}


def test_a_limit_of_the_shell_is_an_error_with_the_tensor_and_its_need(tmp_path: Path):
    x = np.zeros((4000, 4000), np.float32)
    paths = [save(tmp_path / f"{name}.safetensors", {"w": x + step}) for name, step in (("base", 0), ("tuned", 1))]
    limited = (
        "import resource, runpy; from pathlib import Path; import numpy, click, flora_tensor.extraction; "
        "taken = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize(); "
        "resource.setrlimit(resource.RLIMIT_AS, (taken + 200_000_000,) * 2); "
        "runpy.run_module('flora_tensor', run_name='__main__')"
    )
    arguments = ["extract", *map(str, paths), "-o", str(tmp_path / "out"), "--ranks", "4"]
    done = subprocess.run([sys.executable, "-c", limited, *arguments], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (5, "")
    assert done.stderr.startswith("error: extract: 'w' of shape (4000, 4000) needs about ")
    assert "exclude it, or use a machine with more memory" in done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"base.safetensors", "tuned.safetensors"}


_STACK = """
import json, sys
from pathlib import Path
import numpy as np
import flora_tensor as ft
from flora_tensor.extraction import extract

def size(name):
    return 1024 * int(Path("/proc/self/status").read_text().split(name + ":")[1].split()[0])

base, tuned, out, options = sys.argv[1:5]
small = np.random.default_rng(0).standard_normal((64, 64, 4)).astype(np.float32)
ft.tucker(small, (4, 4, 2)), ft.hosvd_spectrum(small)  # imports and what BLAS allocates once
before = size("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
report = extract(base, tuned, out, stack="layers.*.weight", noise_floor=None, **json.loads(options))
json.dump([size("VmHWM") - before, [row.name for row in report.stacks], report.relative_error], sys.stdout)
"""


@pytest.fixture(scope="module")
def layers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Eight layers of 1024 × 1024 that share 24 directions, with noise."""
    rng, here = np.random.default_rng(0), tmp_path_factory.mktemp("layers")
    u, v = (rng.standard_normal(shape, dtype=np.float32) for shape in ((1024, 24), (24, 1024)))
    names = [f"layers.{k}.weight" for k in range(8)]
    steps = {
        name: u @ rng.standard_normal((24, 24), dtype=np.float32) @ v
        + 8 * rng.standard_normal((1024, 1024), dtype=np.float32)
        for name in names
    }
    zeros = {name: np.zeros((1024, 1024), np.float32) for name in names}
    return save(here / "base.safetensors", zeros), save(here / "tuned.safetensors", steps)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system does not tell a process's peak")
@pytest.mark.parametrize(
    ("options", "copies", "eigenproblems"),
    [
        ({"max_ratio": 0.02}, 3, 0),
        ({"max_ratio": 0.02, "weights": "uniform"}, 3, 0),
        ({"rtol": 0.35}, 4, 1),  # looked at in full
    ],
    ids=["budget", "relative", "tolerance"],
)
def test_a_stack_takes_a_few_times_itself_and_an_eigenproblem(
    options: dict[str, Any], copies: int, eigenproblems: int, layers: tuple[Path, Path], tmp_path: Path
):
    """The rule is four times the largest tensor worked on, and 300 MB."""
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    arguments = [*map(str, layers), str(tmp_path / "out"), json.dumps(options)]
    done = subprocess.run(
        [sys.executable, "-c", _STACK, *arguments],
        env=os.environ | dict.fromkeys(names, "1"),  # each thread of BLAS has buffers of its own
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    grown, stacks, error = json.loads(done.stdout)
    assert stacks == ["layers.*.weight"]
    assert 0 < error < 0.4
    size, mode = 8 * 1024 * 1024 * 4, 1024
    # Matrix, vectors, LAPACK's own copy, and its workspace of twice that: five float64 matrices of a mode's size. The
    # half is for the interpreter's own; one more copy of the stack would not fit.
    assert grown <= (copies + 0.5) * size + eigenproblems * 5 * 8 * mode**2
