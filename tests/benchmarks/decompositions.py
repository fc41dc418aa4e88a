"""Measure decompositions beside TensorLy, pyttb, `torch.svd_lowrank`, SciPy and the full SVD: time, memory and error.

Every figure is taken in this process, ours and the peer's in turn, and printed as a ratio of medians: of our time, and
of one sketch product, which no method that looks at all of the tensor can do without. Beside them stand the error and
the peak of the process's memory beyond what it held before, as a multiple of the input (on Linux; the result counts).
Run from the repository:

    python tests/benchmarks/decompositions.py            # the table of the README, some minutes
    python tests/benchmarks/decompositions.py --small    # seconds: shows that the program works
"""

import argparse
import ctypes
import math
import statistics
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import flora_tensor as ft

TENSORS = {
    (512, 512, 3, 3): (16, 16, 2, 2),
    (1024, 1024, 3, 3): (16, 16, 2, 2),
    (320, 320, 3, 3, 3): (16, 16, 2, 2, 2),
    (32, 1024, 1024): (8, 16, 16),
}
MATRICES = {(4096, 4096): 32, (4096, 11008): 32}
SMALL_TENSORS = {(64, 48, 3, 3): (6, 6, 2, 2), (8, 64, 64): (2, 6, 6)}
SMALL_MATRICES = {(256, 300): 8}


def sample(shape: tuple[int, ...], spectrum: str, seed: int = 0) -> np.ndarray:
    """Make a float32 tensor of norm 1 whose modes decay like k^-0.7 in random bases, or white noise ("flat")."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape, dtype=np.float32)
    if spectrum == "decaying":
        for mode, n in enumerate(shape):
            fall = (np.arange(1, n + 1) ** -0.7).astype(np.float32)
            x *= fall.reshape([-1 if k == mode else 1 for k in range(x.ndim)])
        for mode, n in enumerate(shape):  # products of two Householder reflections: orthogonal, and cheap at any size
            for _ in range(2):
                v = rng.standard_normal(n).astype(np.float32)
                v /= np.linalg.norm(v)
                x -= (
                    2
                    * np.expand_dims(np.tensordot(v, x, axes=(0, mode)), mode)
                    * v.reshape([-1 if k == mode else 1 for k in range(x.ndim)])
                )
    return np.ascontiguousarray(x / np.linalg.norm(x))


class Measured(NamedTuple):
    """Median seconds, the largest peak of memory in bytes (None where the system does not tell), and a result."""

    seconds: float
    peak: int | None
    result: Any


def memory(name: str) -> int:
    """Read one of the process's sizes, in bytes."""
    return 1024 * int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0])


def reset_peak() -> int | None:
    """Give free memory back, start the peak anew, and return what the process holds; None where Linux is not."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        return memory("VmRSS")
    except (OSError, AttributeError):
        return None


def measure(runs: int, contenders: dict[str, Callable[[], Any]], once: Collection[str] = ()) -> dict[str, Measured]:
    """Run all contenders in turn ``runs`` times after a warm-up, slow ones (``once``) a single time."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    peaks: dict[str, list[int]] = {name: [] for name in contenders}
    results: dict[str, Any] = {}
    for run in range(runs + 1):
        for name, function in contenders.items():
            if name in once and run != 1:
                continue
            results.pop(name, None)
            before = reset_peak()
            start = time.perf_counter()
            results[name] = function()
            if run > 0:
                times[name].append(time.perf_counter() - start)
                peaks[name] += [memory("VmHWM") - before] if before is not None else []
    return {
        name: Measured(statistics.median(times[name]), max(peaks[name], default=None), results[name])
        for name in contenders
    }


def relative_error(x: np.ndarray, approximation: Any) -> float:
    """Return ‖x − x̂‖ / ‖x‖ in float64, slab by slab."""
    return float(
        np.sqrt(sum(np.sum((a.astype(np.float64) - b) ** 2) for a, b in zip(x, np.asarray(approximation))))
        / np.linalg.norm(x.astype(np.float64).ravel())
    )


def tensor_contenders(x: np.ndarray, ranks: tuple[int, ...]) -> dict[str, Callable[[], Any]]:
    """Decompose to given ranks by each library."""
    import pyttb
    import tensorly
    from tensorly.decomposition import tucker as tensorly_tucker

    tensor = torch.from_numpy(x)
    tensorly.set_backend("pytorch")
    wide = pyttb.tensor(x.astype(np.float64))
    return {
        "flora-tensor (NumPy)": lambda: ft.tucker(x, ranks),
        "flora-tensor (PyTorch)": lambda: ft.tucker(tensor, ranks),
        "flora-tensor, hooi": lambda: ft.tucker(x, ranks, method="hooi"),
        "flora-tensor, st_hosvd (Gram)": lambda: ft.tucker(x, ranks, method="st_hosvd"),
        "TensorLy, default": lambda: tensorly_tucker(tensor, rank=list(ranks)),
        "TensorLy, random start": lambda: tensorly_tucker(tensor, rank=list(ranks), init="random", random_state=0),
        "TensorLy, randomized SVD": lambda: tensorly_tucker(
            tensor, rank=list(ranks), svd="randomized_svd", random_state=0
        ),
        "pyttb tucker_als (float64)": lambda: pyttb.tucker_als(wide, list(ranks), printitn=0),
    }


def matrix_contenders(x: np.ndarray, rank: int, full: bool) -> dict[str, Callable[[], Any]]:
    """Truncate a matrix to a rank by each routine; the peer with more iterations too, as it is less exact with few."""
    from scipy.sparse.linalg import svds

    tensor = torch.from_numpy(x)

    def by_arpack() -> Any:
        u, s, vh = svds(x, k=rank, random_state=0)
        return (u * s) @ vh

    def lowrank(iterations: int) -> Callable[[], Any]:
        def run() -> Any:
            torch.manual_seed(0)
            u, s, v = torch.svd_lowrank(tensor, q=rank + 8, niter=iterations)
            return (u[:, :rank] * s[:rank]) @ v[:, :rank].T

        return run

    contenders: dict[str, Callable[[], Any]] = {
        "flora-tensor (NumPy)": lambda: ft.tucker(x, (rank, rank)),
        "flora-tensor (PyTorch)": lambda: ft.tucker(tensor, (rank, rank)),
        "torch.svd_lowrank, 2 iterations": lowrank(2),
        "torch.svd_lowrank, 4 iterations": lowrank(4),
        "SciPy svds (ARPACK)": by_arpack,
    }
    if full:
        contenders["torch.linalg.svd"] = lambda: _truncated_svd(tensor, rank)
    return contenders


def _truncated_svd(x: torch.Tensor, rank: int) -> torch.Tensor:
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


def dense(result: Any) -> Any:
    """Form the dense tensor of any library's result."""
    if isinstance(result, ft.TuckerFit):
        return np.asarray(result.tucker.to_tensor())
    if isinstance(result, tuple):  # pyttb: model, initial guess, log
        return result[0].full().data
    if hasattr(result, "core"):
        import tensorly

        return np.asarray(tensorly.tucker_to_tensor(result))
    return np.asarray(result)


SKETCH = "one sketch product"


def limits(x: np.ndarray, ranks: tuple[int, ...]) -> dict[str, Callable[[], Any]]:
    """What no method can beat: one pass over the data, a product with as many columns as our bases have, a syrk."""
    rows = x.reshape(x.shape[0], -1)
    rank = max(r for r, n in zip(ranks, x.shape) if 2 * r < n)
    sketch = np.ones((rows.shape[1], rank + max(16, rank // 2)), dtype=x.dtype)
    return {
        "one pass over the data": lambda: x.sum() is None,
        SKETCH: lambda: rows @ sketch is None,
        "one Gram matrix of a side (syrk)": lambda: rows @ rows.T is None,
        "the same in float64": lambda: _gram(rows.astype(np.float64)),
    }


def _gram(rows: np.ndarray) -> bool:
    return rows @ rows.T is None


def report(title: str, x: np.ndarray, measured: dict[str, Measured], ours: str) -> None:
    """Print a table: milliseconds, how many times ours, how many sketch products, memory, error and what ran."""
    print(f"\n{title}")
    base, sketch = measured[ours].seconds, measured[SKETCH].seconds if SKETCH in measured else None
    for name, (seconds, peak, result) in measured.items():
        known = result is not None and not isinstance(result, bool)
        cells = f"  {name:34s} {1e3 * seconds:10.1f} ms {seconds / base:8.2f} ×"
        cells += f" {seconds / sketch:8.1f} sketches" if sketch else ""
        cells += f" {peak / x.nbytes:6.2f} × memory" if peak is not None else ""
        cells += f"   {relative_error(x, dense(result)):.6f}" if known else ""
        print(cells + (f"   {result.method.split(':')[0]}" if isinstance(result, ft.TuckerFit) else ""))


def criteria(shape: tuple[int, ...], runs: int) -> None:
    """Compare tolerances and budgets with the full HOSVD, on a spectrum that falls exponentially."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal(shape, dtype=np.float32)
    for mode, n in enumerate(shape):
        if n > 8:
            x *= np.exp(np.arange(n) * np.float32(-50 / n)).reshape([-1 if k == mode else 1 for k in range(x.ndim)])
    for options in ({"rtol": 0.1}, {"rtol": 0.01}, {"max_parameters": math.prod(shape) // 100}):
        contenders: dict[str, Callable[[], Any]] = {
            "flora-tensor": lambda options=options: ft.tucker(x, **options),
            "the full HOSVD, then HOOI": lambda options=options: ft.tucker(x, method="hooi", **options),
        }
        title = ", ".join(f"{name}={value}" for name, value in options.items())
        measured = measure(runs, contenders, {"the full HOSVD, then HOOI"})
        report(f"{shape} to {title}, exponential spectrum", x, measured, "flora-tensor")
        print("  ranks: " + ", ".join(str(m.result.tucker.ranks) for m in measured.values()))


def spectra(shape: tuple[int, ...], runs: int) -> None:
    """Compare the spectra of all unfoldings with `numpy.linalg.svd` of each."""
    x, modes = sample(shape, "decaying"), range(len(shape))
    square = np.diag(np.arange(1.0, 1 + shape[0])) + 1e-3
    contenders: dict[str, Callable[[], Any]] = {
        "flora-tensor mode_spectra": lambda: ft.mode_spectra(x) is None,
        "numpy svdvals of each unfolding": lambda: (
            not [np.linalg.svd(ft.unfold(x, k), compute_uv=False) for k in modes]
        ),
        "two float64 Gram matrices (syrk)": lambda: any(_gram(ft.unfold(x, k).astype(np.float64)) for k in (0, 1)),
        "two eigvalsh of their size": lambda: any(np.linalg.eigvalsh(square) is None for _ in range(2)),
    }
    slow = {"numpy svdvals of each unfolding"}
    report(f"spectra {shape}", x, measure(runs, contenders, slow), "flora-tensor mode_spectra")


def reconstructions(shape: tuple[int, ...], ranks: tuple[int, ...], runs: int) -> None:
    """Compare forming the dense tensor with its last matrix product, einsum, opt_einsum and TensorLy."""
    import opt_einsum
    import tensorly

    tensorly.set_backend("numpy")
    rng = np.random.default_rng(0)
    t = ft.TuckerTensor(
        rng.standard_normal(ranks, dtype=np.float32),
        [rng.standard_normal((n, r), dtype=np.float32) for n, r in zip(shape, ranks)],
    )
    out = np.empty(shape, dtype=np.float32)
    letters = "abcdefgh"[: len(shape)]
    upper = letters.upper()
    pattern = f"{letters},{','.join(u + v for u, v in zip(upper, letters))}->{upper}"
    first = max(range(len(shape)), key=lambda k: (shape[k] / ranks[k], -k))
    rest = ft.multi_mode_dot(t.core, [None if k == first else u for k, u in enumerate(t.factors)])
    rest = np.ascontiguousarray(np.moveaxis(rest, first, 0)).reshape(ranks[first], -1)
    flat = np.empty((shape[first], rest.shape[1]), dtype=np.float32)
    contenders: dict[str, Callable[[], Any]] = {
        "flora-tensor, into out": lambda: ft.reconstruct(t, out=out) is None,
        "flora-tensor": lambda: ft.reconstruct(t) is None,
        "its last product, into out": lambda: np.matmul(t.factors[first], rest, out=flat) is None,
        "numpy einsum (optimized)": lambda: np.einsum(pattern, t.core, *t.factors, optimize="optimal") is None,
        "opt_einsum": lambda: opt_einsum.contract(pattern, t.core, *t.factors) is None,
        "TensorLy": lambda: tensorly.tucker_to_tensor((t.core, t.factors)) is None,
    }
    report(f"reconstruction {shape} from {ranks}", out, measure(runs, contenders), "flora-tensor, into out")


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="tiny tensors: shows that the program works")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of PyTorch")
    parser.add_argument("--runs", type=int, default=None, help="counted runs of each contender")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    runs = arguments.runs or (1 if arguments.small else 3)
    tensors, matrices = (SMALL_TENSORS, SMALL_MATRICES) if arguments.small else (TENSORS, MATRICES)
    slow = {"TensorLy, default", "TensorLy, random start", "TensorLy, randomized SVD"}
    slow |= {"torch.linalg.svd", "SciPy svds (ARPACK)"}
    for shape, ranks in tensors.items():
        for spectrum in ("decaying", "flat"):
            x = sample(shape, spectrum)
            contenders = tensor_contenders(x, ranks) | limits(x, ranks)
            title = f"{shape} to {ranks}, {spectrum} spectrum"
            report(title, x, measure(runs, contenders, slow), "flora-tensor (NumPy)")
    for (rows, columns), rank in matrices.items():
        for spectrum in ("decaying", "flat"):
            x = sample((rows, columns), spectrum)
            contenders = matrix_contenders(x, rank, full=rows == columns or arguments.small) | limits(x, (rank, rank))
            title = f"{(rows, columns)} to rank {rank}, {spectrum} spectrum"
            report(title, x, measure(runs, contenders, slow), "flora-tensor (PyTorch)")
    for shape in list(tensors)[:2]:
        criteria(shape, runs)
        spectra(shape, runs)
    for shape, ranks in tensors.items():
        reconstructions(shape, ranks, max(runs, 5))


if __name__ == "__main__":
    main()
