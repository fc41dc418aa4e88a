"""Executors for the command line: processes on this machine, and a Dask cluster."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator
from concurrent.futures import BrokenExecutor, CancelledError, Executor, Future, ProcessPoolExecutor
from typing import Any

from flora_tensor._checks import as_int

__all__ = ["WorkerPool", "dask_executor"]

# A pool may die this often between two finished tasks. More often than that the work itself kills it.
_MOST_DEATHS = 3


class WorkerPool(Executor):
    """Processes on this machine; when one dies, a new pool takes over what was not finished.

    `concurrent.futures.ProcessPoolExecutor` gives up for good when a worker is killed, as the system does when memory
    runs out. Here the tasks go to a fresh pool, until it dies several times without finishing anything.

    Parameters
    ----------
    n_workers : int
        How many processes, at least 1. Each computes with its share of the processors' threads, unless the environment
        says how many.
    """

    def __init__(self, n_workers: int) -> None:
        self._n_workers = as_int("extract", "workers", n_workers)
        if self._n_workers < 1:
            raise ValueError(f"extract: workers is {n_workers}; pass at least 1")
        self._lock = threading.RLock()
        self._pool: ProcessPoolExecutor | None = None
        self._deaths, self._closed = 0, False

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> "Future[Any]":
        """Schedule a call; its arguments and its result are pickled."""
        outer: Future[Any] = Future()
        self._start(outer, lambda pool: pool.submit(fn, *args, **kwargs))
        return outer

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End the processes: when they have finished, or at once if ``wait`` is false."""
        with self._lock:
            self._closed = True
            pool, self._pool = self._pool, None
        if pool is None:
            return
        processes = list((getattr(pool, "_processes", None) or {}).values())
        pool.shutdown(wait=wait, cancel_futures=cancel_futures or not wait)
        if not wait:
            for process in processes:
                process.terminate()

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        # After an error nobody waits for what is still being computed.
        self.shutdown(wait=error is None)

    def _start(self, outer: "Future[Any]", call: Callable[[ProcessPoolExecutor], "Future[Any]"]) -> None:
        with self._lock:
            if self._closed:
                raise RuntimeError("WorkerPool: closed; make a new one")
            if self._pool is None:
                self._pool = _new_pool(self._n_workers)
            pool = self._pool
            try:
                inner = call(pool)
            except BrokenExecutor:  # it died before it was noticed
                pool = self._pool = _new_pool(self._n_workers)
                inner = call(pool)
        inner.add_done_callback(lambda done: self._finish(outer, call, pool, done))

    def _finish(
        self,
        outer: "Future[Any]",
        call: Callable[[ProcessPoolExecutor], "Future[Any]"],
        pool: ProcessPoolExecutor,
        inner: "Future[Any]",
    ) -> None:
        if outer.cancelled():
            return
        try:
            result = inner.result()
        except (BrokenExecutor, CancelledError) as error:
            if isinstance(error, BrokenExecutor) and self._renewed(pool):
                self._start(outer, call)
            else:
                outer.set_exception(error)
        except BaseException as error:
            outer.set_exception(error)
        else:
            self._deaths = 0
            outer.set_result(result)

    def _renewed(self, pool: ProcessPoolExecutor) -> bool:
        """Take leave of a pool that died, and tell whether another one may take over."""
        with self._lock:
            if self._pool is pool:
                self._pool, self._deaths = None, self._deaths + 1
            return not self._closed and self._deaths < _MOST_DEATHS


def _new_pool(n_workers: int) -> ProcessPoolExecutor:
    # NumPy reads the number of threads when a worker imports it, before any code of ours runs there: it is inherited.
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, str(max(1, (os.cpu_count() or 1) // n_workers)))
    # A fresh interpreter each: a fork would inherit locks that threads of this process hold.
    return ProcessPoolExecutor(n_workers, multiprocessing.get_context("spawn"), _begin)


def _begin() -> None:
    """Set up a worker: no traceback of its own on Ctrl-C, and no life after its parent's."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: Any) -> None:
    parent.join()
    os._exit(1)


@contextlib.contextmanager
def dask_executor(address: str) -> "Generator[Executor]":
    """Connect to a Dask scheduler, given as ``dask://host:port``, and give its executor.

    A worker that dies is replaced by the others: Dask runs its tasks again. All workers must see the checkpoints under
    the same paths.
    """
    if not address.startswith("dask://") or not address.removeprefix("dask://"):
        raise ValueError(f"extract: the executor is {address!r}; pass dask://host:port")
    try:
        from distributed import Client
    except ImportError:
        raise ImportError(f"extract: {address} needs Dask; pip install 'flora-tensor[dask]'") from None
    with Client(f"tcp://{address.removeprefix('dask://')}", set_as_default=False) as client:
        yield client.get_executor(pure=False)
