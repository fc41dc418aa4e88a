"""Compare where an adapter starts: the loss and the accuracy of a real fine-tuning by epochs, for every start.

A network is trained on scikit-learn's digits and adapted to the same digits moved, blurred and inverted, with the same
ranks and learning rate from every start. Each row is a start, with its mean over the seeds and, behind ±, the standard
deviation; "first epoch" is its mean training loss there over that of the random orthonormal start, in the same run.

    python tests/benchmarks/starts.py [--small] [--threads N]
"""

import argparse
import copy
import statistics
import time

import torch
from torch import nn

import flora_tensor as ft
from flora_torch import attach, collect_gradients, collect_moments, parameter_groups
from flora_torch.digits import Digits, DigitsNet, accuracy, digits, shifted, train

RANKS = {"head": 4, "*": (8, 8, 3, 3)}
RATE = 3e-3
# What a first step of gradient descent, before all training, changes at most in the largest entry of a weight.
FIRST_STEP = 1e-2


def loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def known(model: nn.Module, start: str, batches: list[tuple[torch.Tensor, torch.Tensor]]):
    """Return the name of the start and what it decomposes."""
    if start in ("from_moments", "context"):
        return start, collect_moments(model, batches, forward=lambda model, batch: model(batch[0]))
    if start in ("from_gradient", "first step"):
        gradients = collect_gradients(model, batches, loss, ranks=RANKS)
        if start == "from_gradient":
            return start, gradients
        largest = max(float(g.to_tensor().abs().max()) for g in gradients.values())
        return "from_delta", {name: ft.scale(g, -FIRST_STEP / largest) for name, g in gradients.items()}
    return start, None


def adapted(base: nn.Module, start: str, task: Digits, seed: int, epochs: int, core_ratio: float):
    """Train an adapter, epoch by epoch; return losses, accuracies and the seconds that the start took."""
    model = copy.deepcopy(base)
    batches = [(task.train[at], task.train_labels[at]) for at in torch.arange(400).split(100)]
    began = time.perf_counter()
    init, tensors = known(model, start, batches)
    generator = torch.Generator().manual_seed(seed)
    attach(model, ranks=RANKS, init=init, init_tensors=tensors, generator=generator)
    seconds = time.perf_counter() - began
    optimizer = torch.optim.Adam(parameter_groups(model, RATE, core_lr=core_ratio * RATE))
    order = torch.Generator().manual_seed(seed)
    losses, accuracies = [], []
    for _ in range(epochs):
        total = 0.0
        for at in torch.randperm(len(task.train), generator=order).split(50):
            optimizer.zero_grad()
            value = loss(model, (task.train[at], task.train_labels[at]))
            value.backward()
            optimizer.step()
            total += value.item() * len(at)
        losses.append(total / len(task.train))
        accuracies.append(accuracy(model, task.test, task.test_labels))
    return losses, accuracies, seconds


def spread(values: list[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.3f} ±{deviation:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="one seed, a narrow network and two epochs")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    width, seeds, epochs = (8, [0], 2) if options.small else (32, [0, 1, 2, 3], 5)
    starts = ["orthonormal", "official", "principal", "minor", "from_moments", "context", "from_gradient", "first step"]
    rows = [(start, 1.0) for start in starts] + [("orthonormal", 4.0), ("from_gradient", 4.0)]
    results: dict[tuple[str, float], list] = {row: [] for row in rows}
    for seed in seeds:
        task = digits(seed)
        base = DigitsNet(width, seed=seed)
        train(base, task.train, task.train_labels, epochs=6, learning_rate=3e-3, seed=seed)
        moved = shifted(task, seed)
        for start, ratio in rows:
            results[start, ratio].append(adapted(base, start, moved, seed, epochs, ratio))
    print(f"width {width}, seeds {seeds}, Adam at {RATE}; accuracy on held-out digits")
    print(f"{'start':14} {'core rate':>9} {'first epoch':>14} {'after 1':>14} {f'after {epochs}':>14} {'start, s':>9}")
    for row, runs in results.items():
        plain = results["orthonormal", 1.0]
        ratios = [run[0][0] / reference[0][0] for run, reference in zip(runs, plain)]
        first, last = [run[1][0] for run in runs], [run[1][-1] for run in runs]
        seconds = statistics.median(run[2] for run in runs)
        print(f"{row[0]:14} {row[1]:8.0f}× {spread(ratios):>14} {spread(first):>14} {spread(last):>14} {seconds:9.2f}")


if __name__ == "__main__":
    main()
