"""Execute notebooks and check that they are stored without outputs: ``python tests/run_notebooks.py notebooks``.

Ends with status 1 if a notebook fails, takes longer than its limit or was stored with outputs, or if there is none.
Each one runs in an empty directory of its own, so that what it writes does not land beside the sources.
"""

import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

LIMIT_S = 300.0


def stored_outputs(notebook: Any) -> Iterator[str]:
    """Name every cell that was stored with an output or an execution count."""
    for number, cell in enumerate(notebook.cells):
        if cell.cell_type == "code" and (cell.outputs or cell.execution_count is not None):
            yield f"cell {number} is stored with its output; clear all outputs before committing"


def execution_failures(notebook: Any, limit_s: float) -> Iterator[str]:
    """Execute a notebook with ``limit_s`` seconds for all cells together, and say what went wrong."""
    start = time.monotonic()

    def left(_: Any) -> float:
        # nbclient takes 0 for "no limit".
        return max(0.1, limit_s - (time.monotonic() - start))

    with tempfile.TemporaryDirectory() as directory:
        client = NotebookClient(
            notebook, timeout_func=left, kernel_name="python3", resources={"metadata": {"path": directory}}
        )
        try:
            client.execute()
        except CellTimeoutError:
            yield f"takes longer than {limit_s:.0f} s"
        except (CellExecutionError, DeadKernelError) as error:
            yield str(error).strip()


def main(arguments: list[str]) -> int:
    """Check all notebooks of the directories and files named; return the exit status."""
    paths = [p for a in arguments for p in (sorted(Path(a).glob("*.ipynb")) if Path(a).is_dir() else [Path(a)])]
    if not paths:
        print(f"run_notebooks: no notebook in {', '.join(arguments) or 'nothing'}; name a directory that has some")
        return 1
    failed = 0
    for path in paths:
        start = time.monotonic()
        notebook = nbformat.read(path, as_version=4)
        problems = [*stored_outputs(notebook), *execution_failures(notebook, LIMIT_S)]
        print(f"{'FAILED' if problems else 'ok':>6}  {time.monotonic() - start:5.1f} s  {path}", flush=True)
        for problem in problems:
            print(f"{path}: {problem}")
        failed += bool(problems)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
