"""Time decompositions of what fine-tuning really changed, beside TensorLy, pyttb and `torch.svd_lowrank`.

Two networks learn scikit-learn's digits and are fully fine-tuned on shifted ones: a convolutional network with a
256×256×3×3 kernel, and a BERT of transformers' configuration that reads the rows of an image as tokens, with layers of
512×2048. The change of their weights is decomposed at several ranks by each library in turn, in this process; printed
are the medians, their ratio to ours, and the relative error of each. Synthetic spectra are `decompositions.py`'s.
Run from the repository:

    OMP_NUM_THREADS=1 python tests/benchmarks/real_deltas.py --threads 1    # some minutes, most of it training
    python tests/benchmarks/real_deltas.py --small                         # seconds: shows that the program works
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from decompositions import matrix_contenders, measure, report, tensor_contenders
from torch import Tensor, nn
from torch.nn import functional

import flora_tensor as ft
from flora_torch.digits import accuracy, digits, shifted, train


class WideNet(nn.Module):
    """A convolutional network whose middle kernel is (width, width, 3, 3); 12×12 images in, ten scores out."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, stride=2, padding=1)
        self.middle = nn.Conv2d(width, width, 3, stride=2, padding=1)
        self.head = nn.Linear(9 * width, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Score images (n, 1, 12, 12)."""
        # Shapes: (n, width, 6, 6), (n, width, 3, 3), (n, 10).
        x = functional.relu(self.stem(images - 0.5))
        return self.head(functional.relu(self.middle(x)).flatten(1))


class RowBert(nn.Module):
    """A BERT that reads an image as twelve tokens, its rows; ten scores out."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        from transformers import BertConfig, BertModel

        config = BertConfig(
            vocab_size=1,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=8,
            intermediate_size=4 * width,
            max_position_embeddings=12,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        self.rows = nn.Linear(12, width)
        self.encoder = BertModel(config, add_pooling_layer=False)
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Score images (n, 1, 12, 12)."""
        # Shapes: (n, 12, 12), (n, 12, width), (n, 10).
        states = self.encoder(inputs_embeds=self.rows(images[:, 0] - 0.5)).last_hidden_state
        return self.head(states.mean(1))


def deltas(model: nn.Module, wanted: str, epochs: tuple[int, int], learning_rate: float) -> dict[str, np.ndarray]:
    """Train a network on digits, then on shifted ones; return the change of the weights whose names hold ``wanted``."""
    task = digits()
    moved = shifted(task)
    start = time.perf_counter()
    train(model, task.train, task.train_labels, epochs=epochs[0], learning_rate=learning_rate)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    at_first = accuracy(model, moved.test, moved.test_labels)
    train(model, moved.train, moved.train_labels, epochs=epochs[1], learning_rate=learning_rate)
    at_last = accuracy(model, moved.test, moved.test_labels)
    print(
        f"\n{type(model).__name__}: trained in {time.perf_counter() - start:.0f} s; "
        f"accuracy on shifted digits {at_first:.3f} before, {at_last:.3f} after fine-tuning"
    )
    return {
        name: (p.detach() - before[name]).numpy()
        for name, p in model.named_parameters()
        if wanted in name and p.dim() > 1
    }


def compare(name: str, delta: np.ndarray, rank: int, runs: int) -> None:
    """Print what each library takes and loses at a rank (of the large modes; small ones keep at most two)."""
    ranks = ft.feasible_ranks([rank if n > 9 else min(n, 2) for n in delta.shape], delta.shape)
    contenders = matrix_contenders(delta, ranks[0], full=True) if delta.ndim == 2 else tensor_contenders(delta, ranks)
    contenders["HOSVD, the full spectra"] = lambda: ft.tucker(delta, ranks, method="hosvd")
    slow = {"TensorLy, default", "TensorLy, random start", "torch.linalg.svd"}
    title = f"{name} {'×'.join(map(str, delta.shape))} to {ranks}"
    report(title, delta, measure(runs, contenders, slow), "flora-tensor (NumPy)")


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="tiny networks: shows that the program works")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of PyTorch")
    parser.add_argument("--runs", type=int, default=None, help="counted runs of each contender")
    parser.add_argument(
        "--keep", type=Path, help="an .npz file to keep the changes in; where it exists, to read them from"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    runs = arguments.runs or (1 if arguments.small else 5)
    ranks = (4,) if arguments.small else (8, 16, 32)
    if arguments.keep is not None and arguments.keep.exists():
        changes = dict(np.load(arguments.keep))
    elif arguments.small:
        changes = deltas(WideNet(24), "middle", (1, 1), 1e-3) | deltas(RowBert(32, 1), "layer.0", (1, 1), 1e-3)
    else:
        changes = deltas(WideNet(256), "middle", (6, 12), 1e-3)
        changes |= deltas(RowBert(512, 1), "layer.0", (5, 10), 2e-4)
    if arguments.keep is not None and not arguments.keep.exists():
        np.savez(arguments.keep, **changes)
    kept = ("middle.weight", "intermediate.dense.weight", "query.weight")
    for name, delta in changes.items():
        if name.endswith(kept):
            for rank in ranks:
                compare(name.removeprefix("encoder.encoder."), delta, rank, runs)


if __name__ == "__main__":
    main()
