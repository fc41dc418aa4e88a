"""Extraction by threads, processes and a Dask cluster: the same bytes as in one process, also when workers die."""

import multiprocessing
import os
import signal
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import flora_tensor as ft
from checkpoints import run, save
from flora_tensor import _execution
from flora_tensor._workers import WorkerPool, dask_executor

CRITERIA: list[dict[str, Any]] = [{"ranks": 3}, {"max_ratio": 0.3}]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    here = tmp_path_factory.mktemp("pair")
    rng = np.random.default_rng(0)
    base = {f"m{k}.weight": rng.standard_normal((40, 30 + k)).astype(np.float32) for k in range(8)}
    base |= {"conv.weight": rng.standard_normal((8, 6, 3, 3)), "bias": np.zeros(5), "same": np.ones((3, 3))}
    tuned = {n: x if n == "same" else x + rng.standard_normal(x.shape).astype(x.dtype) for n, x in base.items()}
    return save(here / "base.safetensors", base), save(here / "tuned.safetensors", tuned)


@pytest.fixture(scope="module")
def alone(pair: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, bytes]]:
    here = tmp_path_factory.mktemp("alone")
    for k, criterion in enumerate(CRITERIA):
        ft.extract(*pair, here / str(k), **criterion)
    return [content(here / str(k)) for k in range(len(CRITERIA))]


@pytest.fixture(scope="module")
def workers() -> Iterator[WorkerPool]:
    with WorkerPool(2) as pool:
        yield pool


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def assert_same(executor: Executor, pair: tuple[Path, Path], out: Path, alone: list[dict[str, bytes]]) -> None:
    for k, criterion in enumerate(CRITERIA):
        ft.extract(*pair, out, executor=executor, overwrite=True, **criterion)
        assert content(out) == alone[k]
    promised = ft.extract(*pair, None, executor=executor, dry_run=True, max_ratio=0.3)
    assert promised.to_json() == ft.extract(*pair, None, dry_run=True, max_ratio=0.3).to_json()


def test_threads_give_the_same_bytes(pair: tuple[Path, Path], tmp_path: Path, alone: list[dict[str, bytes]]):
    with ThreadPoolExecutor(2) as executor:
        assert_same(executor, pair, tmp_path / "out", alone)


def test_few_tasks_wait_with_what_they_go_on_from(
    pair: tuple[Path, Path], tmp_path: Path, alone: list[dict[str, bytes]], monkeypatch: pytest.MonkeyPatch
):
    waiting: list[int] = []

    class Counting(ThreadPoolExecutor):
        def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Any:
            waiting.append(self._work_queue.qsize())
            return super().submit(fn, *args, **kwargs)

    monkeypatch.setattr(_execution, "_MOST_HELD", 1)
    with Counting(1) as executor:
        ft.extract(*pair, tmp_path / "out", executor=executor, **CRITERIA[1])
    assert content(tmp_path / "out") == alone[1]
    looks = 11
    assert max(waiting[:looks]) > 1  # what is looked at holds nothing
    assert max(waiting[looks:]) <= 1  # the conv alone has nothing to go on from


def test_processes_give_the_same_bytes(
    workers: WorkerPool, pair: tuple[Path, Path], tmp_path: Path, alone: list[dict[str, bytes]]
):
    assert_same(workers, pair, tmp_path / "out", alone)


def test_an_error_in_a_worker_is_the_caller_s(workers: WorkerPool, tmp_path: Path):
    base = save(tmp_path / "b.safetensors", {"w": np.zeros((3, 3)), "v": np.zeros((3, 3))})
    tuned = save(tmp_path / "t.safetensors", {"w": np.full((3, 3), np.inf), "v": np.ones((3, 3))})
    with pytest.raises(ft.InputError, match="'w' has 9 entries that are NaN or infinite"):
        ft.extract(base, tuned, tmp_path / "out", executor=workers, ranks=1)
    assert {p.name for p in tmp_path.iterdir()} == {"b.safetensors", "t.safetensors"}


def test_a_killed_worker_is_replaced(pair: tuple[Path, Path], tmp_path: Path, alone: list[dict[str, bytes]]):
    others = set(multiprocessing.active_children())

    def kill_a_child(phase: str, done: int, total: int, name: str) -> None:
        if done == 0:
            child = next(c for c in multiprocessing.active_children() if c not in others and c.is_alive())
            os.kill(child.pid or 0, signal.SIGKILL)

    with WorkerPool(2) as pool:
        ft.extract(*pair, tmp_path / "out", executor=pool, progress=kill_a_child, **CRITERIA[0])
    assert content(tmp_path / "out") == alone[0]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_work_that_kills_every_worker_ends():
    with WorkerPool(1) as pool:
        future = pool.submit(die)
        with pytest.raises(BrokenProcessPool):
            future.result(timeout=300)
        assert pool.submit(os.getpid).result(timeout=300) != os.getpid()
    with pytest.raises(RuntimeError, match="WorkerPool: closed; make a new one"):
        pool.submit(die)


class Breaking(ThreadPoolExecutor):
    """Gives up after some calls, as a pool of processes does when one is killed."""

    calls = 0

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return super().submit(fn, *args, **kwargs) if self.calls < 6 else super().submit(give_up)


def give_up() -> None:
    raise BrokenProcessPool("a process was terminated abruptly")


def test_an_executor_that_breaks_leaves_what_is_finished(
    pair: tuple[Path, Path], tmp_path: Path, alone: list[dict[str, bytes]]
):
    with Breaking(1) as executor, pytest.raises(ft.ResourceError, match="a worker died and the executor gave") as error:
        ft.extract(*pair, tmp_path / "out", executor=executor, **CRITERIA[0])
    assert "kept in" in error.value.__notes__[0]
    assert not (tmp_path / "out").exists()
    ft.extract(*pair, tmp_path / "out", resume=True, **CRITERIA[0])
    assert content(tmp_path / "out") == alone[0]


def test_the_command_line_shares_the_work(pair: tuple[Path, Path], tmp_path: Path, alone: list[dict[str, bytes]]):
    done = run("extract", *pair, "-o", tmp_path / "out", "--ranks", "3", "--workers", "2", "--progress")
    assert done.exit_code == 0, done.stderr
    assert content(tmp_path / "out") == alone[0]
    for arguments, code, message in (
        (["--workers", "0"], 2, "workers is 0; pass at least 1"),
        (["--executor", "tcp://x"], 2, "the executor is 'tcp://x'; pass dask://host:port"),
        (["--executor", "dask://x:1", "--workers", "2"], 2, "got --workers and --executor; pass one of them"),
    ):
        refused = run("extract", *pair, "-o", tmp_path / "new", "--ranks", "3", *arguments)
        assert (refused.exit_code, refused.stdout) == (code, "")
        assert message in refused.stderr


def test_without_dask_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "distributed", None)
    with (
        pytest.raises(ImportError, match=r"dask://x:1 needs Dask; pip install 'flora-tensor\[dask\]'"),
        dask_executor("dask://x:1"),
    ):
        pass


@pytest.mark.filterwarnings("ignore::DeprecationWarning:distributed.*")
def test_a_dask_cluster_gives_the_same_bytes_and_survives_a_killed_worker(
    pair: tuple[Path, Path], tmp_path: Path, alone: list[dict[str, bytes]]
):
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, silence_logs=50
    ) as cluster:
        address = cluster.scheduler_address.replace("tcp://", "dask://")
        done = run("extract", *pair, "-o", tmp_path / "out", "--ranks", "3", "--executor", address)
        assert done.exit_code == 0, done.stderr
        assert content(tmp_path / "out") == alone[0]
        pids = [worker.pid for worker in cluster.workers.values()]

        def kill_a_worker(phase: str, done: int, total: int, name: str) -> None:
            if pids:
                os.kill(pids.pop(), signal.SIGKILL)
                pids.clear()

        with dask_executor(address) as executor:
            ft.extract(*pair, tmp_path / "again", executor=executor, progress=kill_a_worker, **CRITERIA[1])
        assert content(tmp_path / "again") == alone[1]
