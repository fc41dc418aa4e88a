"""Count how often each noise rule finds planted ranks, and time the exact search over all rank tuples.

Every line is measured in this process. The rules: those of `flora_tensor.select_ranks`, and as peers the share of
energy (99 %, per mode) and the largest gap between successive singular values. Run from the repository:

    python tests/benchmarks/ranks.py                   # 100 trials a line, some minutes
    python tests/benchmarks/ranks.py --part stored     # one of the three tables alone
    python tests/benchmarks/ranks.py --small           # seconds: shows that the program works
"""

import argparse
import math
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Sequence

import ml_dtypes
import numpy as np

import flora_tensor as ft
from flora_tensor._rank_errors import ErrorTable, rank_grid

RANKS = (5, 4, 2, 2)
RULES = ("noise", "bic", "evbmf", "gavish-donoho")
KERNEL, WIDE, CUBE = (32, 24, 3, 3), (64, 48, 3, 3), (16, 16, 16, 16)
Ranks = tuple[int, ...]


def orthonormal(rng: np.random.Generator, n: int, r: int) -> np.ndarray:
    """Return an (n, r) matrix of orthonormal columns."""
    return np.linalg.qr(rng.standard_normal((n, r)))[0]


def signal(rng: np.random.Generator, shape: Sequence[int], ranks: Sequence[int]) -> np.ndarray:
    """Return a tensor of these ranks whose unfoldings have singular values within a factor of two of each other."""
    core = rng.standard_normal(ranks)
    for _ in range(60):
        for mode in range(len(ranks)):
            u, s, v = np.linalg.svd(ft.unfold(core, mode), full_matrices=False)
            core = ft.fold((u * np.maximum(s, 0.6 * s[0])) @ v, mode, tuple(ranks))
    return ft.TuckerTensor(core, [orthonormal(rng, n, r) for n, r in zip(shape, ranks)]).to_tensor()


def white(rng: np.random.Generator, shape: Sequence[int]) -> np.ndarray:
    """Return normal noise of one strength."""
    return rng.standard_normal(shape)


def heavy(degrees: float) -> Callable[[np.random.Generator, Sequence[int]], np.ndarray]:
    """Return a maker of Student's noise of unit variance."""
    return lambda rng, shape: rng.standard_t(degrees, shape) * math.sqrt((degrees - 2) / degrees)


def uneven(kind: str) -> Callable[[np.random.Generator, Sequence[int]], np.ndarray]:
    """Return a maker of normal noise that is stronger in some rows, and columns, than in others."""

    def strength(rng: np.random.Generator, size: int) -> np.ndarray:
        found = rng.uniform(1.0, 3.0, size) if kind == "within three" else np.ones(size)
        found[: 1 if kind == "one loud" else 0] = 10.0
        return found / math.sqrt(np.mean(found**2))

    def make(rng: np.random.Generator, shape: Sequence[int]) -> np.ndarray:
        rows = strength(rng, shape[0]).reshape(-1, *[1] * (len(shape) - 1))
        columns = strength(rng, shape[1]).reshape(-1, *[1] * (len(shape) - 2))
        return rows * columns * rng.standard_normal(shape)

    return make


def colored(rng: np.random.Generator, shape: Sequence[int]) -> np.ndarray:
    """Return noise whose first unfolding falls like 1/k: no bulk, no gap."""
    rows = shape[0]
    matrix = (orthonormal(rng, rows, rows) / np.arange(1, rows + 1)) @ rng.standard_normal((rows, math.prod(shape[1:])))
    return matrix.reshape(shape) / math.sqrt(np.mean(matrix**2))


CASES = [
    ("white, 20 dB", KERNEL, 20, white),
    ("white, 5 dB", KERNEL, 5, white),
    ("white, 0 dB", KERNEL, 0, white),
    ("white, -3 dB", KERNEL, -3, white),
    ("white, -3 dB", WIDE, -3, white),
    ("white, -15 dB", CUBE, -15, white),
    ("nothing but noise", KERNEL, None, white),
    ("nothing but noise", CUBE, None, white),
    ("uneven within 3, 5 dB", KERNEL, 5, uneven("within three")),
    ("uneven within 3, 5 dB", WIDE, 5, uneven("within three")),
    ("a loud row and column, 5 dB", KERNEL, 5, uneven("one loud")),
    ("Student t, 4 degrees, 5 dB", KERNEL, 5, heavy(4)),
    ("Student t, 2.5 degrees, 5 dB", KERNEL, 5, heavy(2.5)),
    ("colored, no gap, 5 dB", KERNEL, 5, colored),
]


def by_energy(spectrum: ft.Spectrum) -> Ranks:
    """Keep 99 % of the energy in every mode."""
    shares = [np.cumsum(v**2) / np.sum(v**2) for v in spectrum.values]
    return tuple(int(np.searchsorted(share, 0.99) + 1) for share in shares)


def by_gap(spectrum: ft.Spectrum) -> Ranks:
    """Cut every mode at its largest ratio of successive singular values."""
    return tuple(int(np.argmax(v[:-1] / np.maximum(v[1:], 1e-300)) + 1) for v in spectrum.values)


def recovery(trials: int) -> None:
    """Print how often each rule finds the planted ranks."""
    names = (*RULES, "energy 99 %", "largest gap")
    print(
        f"planted ranks {RANKS} found, % of {trials} trials; 'noted': where wrong, \"noise\" says that rules disagree"
    )
    print(f"{'noise':30}{'shape':>14}" + "".join(f"{name:>15}" for name in names) + f"{'noted':>10}")
    for title, shape, decibels, make in CASES:
        right, wrong, noted = Counter[str](), 0, 0
        for seed in range(trials):
            rng = np.random.default_rng(seed)
            noise = make(rng, shape)
            x, truth = noise, (0,) * len(shape)
            if decibels is not None:
                planted = signal(rng, shape, RANKS)
                level = np.linalg.norm(planted) / 10 ** (decibels / 20) / math.sqrt(noise.size)
                x, truth = planted + level * noise, RANKS
            spectrum = ft.hosvd_spectrum(x)
            choices = {rule: ft.select_ranks(spectrum, method=rule) for rule in RULES}
            found = {rule: choice.ranks for rule, choice in choices.items()}
            found |= {"energy 99 %": by_energy(spectrum), "largest gap": by_gap(spectrum)}
            right.update(name for name, ranks in found.items() if ranks == truth)
            if found["noise"] != truth:
                wrong, noted = wrong + 1, noted + bool(choices["noise"].notes)
        cells = "".join(f"{100 * right[name] / trials:15.0f}" for name in names)
        print(f"{title:30}{'x'.join(map(str, shape)):>14}{cells}{f'{noted}/{wrong}':>10}")


def stored(trials: int) -> None:
    """Print which ranks come back from a low-rank update that was added to a weight and stored in few bits."""
    print(
        f"\na planted update stored in few bits: ranks under its rounding noise, % of {trials} trials exact (% above)"
    )
    print(f"{'update':26}{'type':>10}" + "".join(f"{f'‖Δ‖/‖W‖ {share:.0%}':>18}" for share in (0.1, 0.03, 0.01)))
    updates = {
        "matrix 384x384, rank 8": ((384, 384), (8, 8)),
        "conv 64x64x3x3, (8,8,2,2)": ((64, 64, 3, 3), (8, 8, 2, 2)),
    }
    types = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}
    for title, (shape, ranks) in updates.items():
        for name, kind in types.items():
            cells = ""
            for share in (0.1, 0.03, 0.01):
                exact = above = 0
                for seed in range(trials):
                    rng = np.random.default_rng(seed)
                    base = (rng.standard_normal(shape) / 20).astype(kind).astype(np.float64)
                    change = signal(rng, shape, ranks)
                    change *= share * np.linalg.norm(base) / np.linalg.norm(change)
                    tuned = (base + change).astype(kind).astype(np.float64)
                    spectrum = ft.hosvd_spectrum(tuned - base)
                    floor = ft.rounding_noise(tuned, name)
                    found = ft.select_ranks(spectrum, method="noise", noise_floor=floor).ranks
                    exact += found == ranks
                    above += any(a > b for a, b in zip(found, ranks))
                cells += f"{f'{100 * exact / trials:.0f} ({100 * above / trials:.0f})':>18}"
            print(f"{title:26}{name:>10}{cells}")


def search(shape: Sequence[int]) -> None:
    """Print time and memory of the error table and the searches on a core, beside one pass over all tuples."""
    rng = np.random.default_rng(0)
    core = rng.standard_normal(shape, dtype=np.float32)
    for mode, n in enumerate(shape):
        core *= (
            (np.arange(1, n + 1) ** -0.7).astype(np.float32).reshape([-1 if k == mode else 1 for k in range(core.ndim)])
        )
    values = tuple(np.linalg.norm(ft.unfold(core, mode), axis=1) for mode in range(core.ndim))
    factors = tuple(np.empty((n, 0), np.float32) for n in shape)
    spectrum = ft.Spectrum(values, core, factors, float(np.linalg.norm(core)), tuple(shape))
    tracemalloc.start()
    start = time.perf_counter()
    budget = ft.select_ranks(spectrum, max_ratio=0.05)
    first, peak = time.perf_counter() - start, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    start = time.perf_counter()
    tolerance = ft.select_ranks(spectrum, rtol=budget.relative_error)
    second = time.perf_counter() - start
    start = time.perf_counter()
    np.cumsum(np.square(core, dtype=np.float64), axis=-1)
    one_pass = time.perf_counter() - start
    start = time.perf_counter()
    grid = rank_grid(shape, 48**2 * math.prod(n + 1 for n in shape[2:]))  # 48 points in each long mode
    ErrorTable.of_core(core, spectrum.exponent, grid)
    coarse = time.perf_counter() - start
    name = "x".join(map(str, shape))
    print(
        f"\nall {core.size:,} rank tuples of {name}: table and budget {first:.2f} s, then a tolerance {second:.2f} s,"
    )
    print(f"peak {peak / 2**20:.0f} MiB; one cumulative sum over the squared core {one_pass:.2f} s; ", end="")
    print(f"a table on a grid of {'x'.join(str(len(g)) for g in grid)} ranks {coarse:.2f} s")
    print(f"5 % of the numbers: ranks {budget.ranks}, error {budget.relative_error:.4f}; ", end="")
    print(f"fewest numbers at that error: {tolerance.ranks}")


def main() -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="few trials and a small table")
    parser.add_argument("--trials", type=int, default=100, help="trials a line")
    parser.add_argument("--part", choices=("recovery", "stored", "search"), help="print one table alone")
    options = parser.parse_args()
    trials = 2 if options.small else options.trials
    parts: dict[str, Callable[[], None]] = {
        "recovery": lambda: recovery(trials),
        "stored": lambda: stored(trials),
        "search": lambda: search((128, 128, 3, 3) if options.small else (1280, 1280, 3, 3)),
    }
    for part in [options.part] if options.part else parts:
        parts[part]()


if __name__ == "__main__":
    main()
