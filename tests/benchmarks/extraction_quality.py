"""What extraction loses at each size, on three networks fine-tuned here, beside the layouts of other tools.

A convolutional network, a ConvNeXt and a vision transformer learn scikit-learn's digits and are fully fine-tuned on
shifted ones. The change of their weights is stored at growing budgets: by `extract`, without and with a calibration or
stacks of the layers that are equal, and in the peers' layouts, whose ranks are given every advantage: spread over the
weights by the same optimal allocation, or the largest equal rank that fits. Printed are the relative error of the
change, the error of the layers' outputs on held-out shifted digits, and the accuracy of the merged network there. Run
from the repository:

    python tests/benchmarks/extraction_quality.py            # three networks, about a minute and a half
    python tests/benchmarks/extraction_quality.py --small    # seconds: shows that the program works
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import flora_tensor as ft
import flora_torch
from flora_torch.digit_networks import DigitsConvNeXt, DigitsViT
from flora_torch.digits import Digits, DigitsNet, accuracy, digits, shifted, train

BUDGETS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.4)
OURS, CALIBRATED, STACKED = "extract", "extract, calibrated", "extract, stacks"
Weights = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Recipe:
    """A network, whole and small, and how long it learns."""

    make: Callable[[], nn.Module]
    make_small: Callable[[], nn.Module]
    epochs: tuple[int, int]
    stacks: tuple[str, ...] = ()


VIT_LAYERS = ("attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj", "fc1", "fc2")
CONVNEXT_BLOCKS = ("depthwise", "wide", "back")

RECIPES = {
    "CNN": Recipe(DigitsNet, lambda: DigitsNet(10), (10, 20)),
    "ConvNeXt": Recipe(
        DigitsConvNeXt, lambda: DigitsConvNeXt(8), (10, 20), tuple(f"first.*.{name}.weight" for name in CONVNEXT_BLOCKS)
    ),
    "ViT": Recipe(
        DigitsViT,
        lambda: DigitsViT(24, heads=4, depth=2),
        (12, 25),
        tuple(f"layers.*.{name}.weight" for name in VIT_LAYERS),
    ),
}


@dataclass(frozen=True)
class Trained:
    """Two checkpoints of a network, what it was tuned on, and the moments of its inputs on either half of that."""

    make: Callable[[], nn.Module]
    base: Path
    tuned: Path
    task: Digits
    seen: ft.Moments
    held_out: ft.Moments
    stacks: tuple[str, ...] = ()

    @property
    def deltas(self) -> dict[str, np.ndarray]:
        """The changes of all weights with two axes or more, float64."""
        before, after = load_file(self.base), load_file(self.tuned)
        return {n: (after[n].double() - w.double()).numpy() for n, w in before.items() if w.dim() > 1}

    def merged_accuracy(self, kept: Mapping[str, np.ndarray]) -> float:
        """Measure the base network plus these changes; vectors are the tuned ones."""
        before, weights = load_file(self.base), load_file(self.tuned)
        for name in self.deltas:
            change = torch.from_numpy(np.asarray(kept[name], dtype=np.float32)) if name in kept else 0.0
            weights[name] = before[name] + change
        model = self.make()
        model.load_state_dict(weights)
        return accuracy(model.eval(), self.task.test, self.task.test_labels)

    def output_error(self, kept: Mapping[str, np.ndarray]) -> float:
        """Return √(Σ ‖(ΔW − kept) C^½‖² / Σ ‖ΔW C^½‖²), C from held-out images; only layers with a moment."""
        lost = size = 0.0
        for name, moment in self.held_out.items():
            change = self.deltas[name].reshape(len(self.deltas[name]), -1)
            rest = change - np.asarray(kept[name], np.float64).reshape(change.shape) if name in kept else change
            c = np.asarray(moment, np.float64)
            lost += float(np.einsum("oi,ij,oj->", rest, c, rest))
            size += float(np.einsum("oi,ij,oj->", change, c, change))
        return (lost / size) ** 0.5


@dataclass(frozen=True)
class Row:
    """One way to store the change at one budget."""

    layout: str
    max_ratio: float
    n_parameters: int
    relative_error: float
    output_error: float
    accuracy: float


def fine_tuned(name: str, directory: Path, *, small: bool = False) -> Trained:
    """Train a network on digits, then on shifted ones, and collect the moments of its inputs."""
    recipe, task = RECIPES[name], digits()
    moved = shifted(task)
    make = recipe.make_small if small else recipe.make
    model, (first, second) = make(), (3, 4) if small else recipe.epochs
    folder = directory / name
    folder.mkdir(parents=True)
    train(model, task.train, task.train_labels, epochs=first, learning_rate=3e-3)
    save_file(model.state_dict(), folder / "base.safetensors")
    (folder / "config.json").write_text(json.dumps(getattr(model, "config", {})))
    train(model, moved.train, moved.train_labels, epochs=second, learning_rate=3e-3)
    save_file(model.state_dict(), folder / "tuned.safetensors")
    seen = flora_torch.collect_moments(model, moved.train.split(200), patches=False)
    held_out = flora_torch.collect_moments(model, moved.test.split(200))
    return Trained(
        make, folder / "base.safetensors", folder / "tuned.safetensors", moved, seen, held_out, recipe.stacks
    )


def extracted(
    trained: Trained, max_ratio: float, calibration: ft.Moments | None = None, stacks: Sequence[str] = ()
) -> Row:
    """Store the change by `extract` and read it back."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "adapter"
        pair = trained.base, trained.tuned
        report = ft.extract(*pair, out, max_ratio=max_ratio, calibration=calibration, stack=stacks)
        adapter = ft.load_adapter(out)
    kept = {name: np.asarray(adapter.delta(name)) for name in adapter}
    layout = STACKED if stacks else OURS if calibration is None else CALIBRATED
    return _row(trained, layout, max_ratio, report.n_parameters, kept)


def _row(trained: Trained, layout: str, max_ratio: float, stored: int, kept: Mapping[str, np.ndarray]) -> Row:
    deltas = trained.deltas
    lost = sum(float(np.sum((d - kept.get(n, 0.0)) ** 2)) for n, d in deltas.items())
    error = (lost / sum(float(np.sum(d**2)) for d in deltas.values())) ** 0.5
    return Row(layout, max_ratio, stored, error, trained.output_error(kept), trained.merged_accuracy(kept))


# --- the peers' layouts ------------------------------------------------------------------------------


def as_rows(delta: np.ndarray) -> np.ndarray:
    """Return a weight as PEFT's o (i h w) matrix."""
    return delta.reshape(len(delta), -1)


def separable(delta: np.ndarray) -> np.ndarray:
    """Return a kernel as loralib's (o h) (i w) matrix, other weights as PEFT's."""
    if delta.ndim != 4:
        return as_rows(delta)
    o, i, h, w = delta.shape
    return delta.transpose(0, 2, 1, 3).reshape(o * h, i * w)


def back(matrix: np.ndarray, shape: Sequence[int], arrange: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Undo one of the two arrangements."""
    if arrange is as_rows or len(shape) != 4:
        return matrix.reshape(shape)
    o, i, h, w = shape
    return matrix.reshape(o, h, i, w).transpose(0, 2, 1, 3)


def truncated(matrix: np.ndarray, rank: int) -> np.ndarray:
    """Return the best approximation of a rank."""
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


def svd_frontier(matrix: np.ndarray) -> ft.Frontier:
    """List what each rank of a truncated SVD costs, r (m + n) numbers, and leaves out; the dense matrix at the end."""
    tails = np.append(np.cumsum(np.linalg.svd(matrix, compute_uv=False)[::-1] ** 2)[::-1], 0.0)
    ranks = np.arange(len(tails))
    fits = ranks * sum(matrix.shape) < matrix.size
    cost = np.append(ranks[fits] * sum(matrix.shape), matrix.size)
    ranks, tails = np.append(ranks[fits], len(tails) - 1), np.append(tails[fits], 0.0)
    return ft.Frontier(cost, tails, np.stack([ranks, ranks], 1), float(tails[0]), matrix.size)


def by_svd(trained: Trained, max_ratio: float, layout: str, arrange: Callable[[np.ndarray], np.ndarray]) -> Row:
    """Truncate the SVD of every weight in a layout, at the ranks that an optimal allocation of the budget gives."""
    matrices = {name: arrange(delta) for name, delta in trained.deltas.items()}
    allocation = ft.allocate_ranks({n: svd_frontier(m) for n, m in matrices.items()}, max_ratio=max_ratio)
    kept = {
        name: back(truncated(matrix, allocation.ranks[name][0]), trained.deltas[name].shape, arrange)
        for name, matrix in matrices.items()
        if any(allocation.ranks[name])
    }
    return _row(trained, layout, max_ratio, allocation.n_parameters, kept)


def by_equal_ranks(trained: Trained, max_ratio: float, layout: str, *, as_matrix: bool) -> Row:
    """Take one rank for all weights, the largest that fits: a LoRA of that rank, or Tucker with it in every mode."""
    deltas = {n: as_rows(d) if as_matrix else d for n, d in trained.deltas.items()}
    budget = max_ratio * sum(d.size for d in deltas.values())
    stored, chosen = 0, dict[str, tuple[int, ...]]()
    for rank in range(1, max(max(d.shape) for d in deltas.values()) + 1):
        ranks = {n: ft.feasible_ranks([min(rank, s) for s in d.shape], d.shape) for n, d in deltas.items()}
        cost = sum(
            sum(s * r for s, r in zip(d.shape, ranks[n])) + (0 if as_matrix else int(np.prod(ranks[n])))
            for n, d in deltas.items()
        )
        if cost > budget:
            break
        stored, chosen = cost, ranks
    kept = {
        n: np.asarray(ft.hooi(deltas[n], r).to_tensor()).reshape(trained.deltas[n].shape) for n, r in chosen.items()
    }
    return _row(trained, layout, max_ratio, stored, kept)


PEERS: dict[str, Callable[[Trained, float], Row]] = {
    "SVD of o (i h w)": lambda t, b: by_svd(t, b, "SVD of o (i h w)", as_rows),
    "SVD of (o h) (i w)": lambda t, b: by_svd(t, b, "SVD of (o h) (i w)", separable),
    "LoRA, one rank": lambda t, b: by_equal_ranks(t, b, "LoRA, one rank", as_matrix=True),
    "Tucker, equal ranks": lambda t, b: by_equal_ranks(t, b, "Tucker, equal ranks", as_matrix=False),
}


def compare(trained: Trained, budgets: Sequence[float] = BUDGETS) -> list[Row]:
    """Store the change at each budget in every way."""
    rows: list[Row] = []
    for budget in budgets:
        rows += [extracted(trained, budget), extracted(trained, budget, trained.seen)]
        rows += [extracted(trained, budget, stacks=trained.stacks)] if trained.stacks else []
        rows += [peer(trained, budget) for peer in PEERS.values()]
    return rows


def report(name: str, trained: Trained, rows: Sequence[Row]) -> bool:
    """Print a table; tell whether extraction was never worse than a peer."""
    full, none = trained.merged_accuracy(trained.deltas), trained.merged_accuracy({})
    size = sum(d.size for d in trained.deltas.values())
    print(f"\n{name}: {size:,} numbers in the changes; accuracy {none:.3f} with none of them, {full:.3f} with all")
    print(f"  {'budget':>7} {'stored as':22} {'numbers':>8} {'error':>7} {'outputs':>8} {'accuracy':>9}")
    for row in rows:
        print(
            f"  {row.max_ratio:7.0%} {row.layout:22} {row.n_parameters:8,} {row.relative_error:7.3f} "
            f"{row.output_error:8.3f} {row.accuracy:9.3f}"
        )
    worse = [b for b in dict.fromkeys(r.max_ratio for r in rows) if not _is_best(rows, b)]
    gains = _gains(rows)
    print(f"  error of extract over the best peer's: {', '.join(f'{g:.6g}' for g in gains)}")
    print("  extract is never above a peer" if not worse else f"  ABOVE A PEER at {worse}")
    return not worse


def _gains(rows: Sequence[Row]) -> list[float]:
    budgets = dict.fromkeys(row.max_ratio for row in rows)
    at = {(row.max_ratio, row.layout): row.relative_error for row in rows}
    return [at[b, OURS] / min(at[b, peer] for peer in PEERS) for b in budgets]


def _is_best(rows: Sequence[Row], budget: float) -> bool:
    errors: dict[str, float] = {row.layout: row.relative_error for row in rows if row.max_ratio == budget}
    # An allocation ends with the best choice, or within 0.01 % of the squared error's bound; float32 adds its rounding.
    least = min(errors[peer] for peer in PEERS) * (1 + 5e-5)
    return errors[OURS] <= least and errors.get(STACKED, 0.0) <= errors[OURS] * (1 + 1e-6)


def main() -> Any:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="narrow networks, few epochs: shows that it works")
    parser.add_argument("--networks", nargs="*", choices=list(RECIPES), default=list(RECIPES))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    best = True
    with tempfile.TemporaryDirectory() as directory:
        for name in arguments.networks:
            trained = fine_tuned(name, Path(directory), small=arguments.small)
            best &= report(name, trained, compare(trained, (0.05, 0.2) if arguments.small else BUDGETS))
    return 0 if best else 1


if __name__ == "__main__":
    raise SystemExit(main())
