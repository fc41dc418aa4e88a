"""What a process may still take, from files as Linux writes them."""

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
