"""The whole way on a real fine-tuning: two checkpoints, adapters at three budgets, merging, and training on.

A small network learns digits and is then fully fine-tuned on shifted ones (see `flora_torch.digits`). The change of its
weights is extracted, merged and measured, beside the layout in which LoRA stores a convolution: the truncated SVD of
the weight as an ``o (i h w)`` matrix, with the same biases and the ranks spread over the layers by the same function.
"""

import tempfile
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter
from safetensors.torch import load_file, save_file
from torch import nn

import flora_tensor as ft
from flora_tensor._reporting import Report
from flora_tensor.plots import save_figure
from flora_tensor.report import format_table
from flora_torch.digits import Digits, DigitsNet, accuracy, digits, predict, shifted, train
from flora_torch.model import adapter_parameters, attach_adapter, load_adapter, save_adapter

__all__ = ["BUDGETS", "DemoReport", "DemoRow", "Training", "run_demo"]

BUDGETS = (0.1, 0.2, 0.4)
_TUCKER, _SVD = "Tucker", "SVD of o (i h w)"


@dataclass(frozen=True)
class DemoRow:
    """One way to store the change of the weights, and what it costs.

    Attributes
    ----------
    layout : str
        ``"Tucker"``, as `flora_tensor.extract` chose it, or ``"SVD of o (i h w)"``.
    max_ratio : float
        The budget, as a share of the numbers in the dense changes.
    n_parameters : int
        Numbers stored for the weights; the biases are stored whole in either layout and not counted.
    relative_error : float
        √(Σ ‖ΔW − stored‖² / Σ ‖ΔW‖²).
    accuracy : float
        Of the merged network on held-out shifted digits.
    """

    layout: str
    max_ratio: float
    n_parameters: int
    relative_error: float
    accuracy: float


@dataclass(frozen=True)
class Training:
    """What came of attaching the smallest extracted adapter and training it on.

    Attributes
    ----------
    max_ratio : float
        The adapter's budget.
    n_parameters : int
        How many numbers are trained.
    epochs : int
        For how long.
    accuracy_attached : float
        On held-out shifted digits, as extracted.
    accuracy_trained : float
        The same after training.
    difference_to_merged : float
        The largest difference between a score of the attached and of the merged network, before training.
    restored_exactly : bool
        Whether the adapter that was saved and loaded back gives the same scores bit for bit.
    """

    max_ratio: float
    n_parameters: int
    epochs: int
    accuracy_attached: float
    accuracy_trained: float
    difference_to_merged: float
    restored_exactly: bool


@dataclass(frozen=True)
class DemoReport(Report):
    """All that the demonstration measured; made by `run_demo`.

    Attributes
    ----------
    seed : int
        What everything was drawn from.
    n_test : int
        How many held-out images every accuracy is measured on.
    accuracy_base : float
        Of the base network on held-out digits that are not shifted.
    accuracy_before : float
        Of the base network on held-out shifted digits: no change.
    accuracy_tuned : float
        Of the fully fine-tuned network on them: the full change.
    dense_parameters : int
        Numbers in the dense changes of all weights.
    whole_parameters : int
        Numbers in the biases, stored whole.
    rows : tuple of DemoRow
        The budgets of the table, each in both layouts.
    curve : tuple of DemoRow
        More budgets, for the figure.
    training : Training
        The adapter trained on.
    seconds : float
        How long all of it took; the only number that differs from run to run on one machine.
    """

    seed: int
    n_test: int
    accuracy_base: float
    accuracy_before: float
    accuracy_tuned: float
    dense_parameters: int
    whole_parameters: int
    rows: tuple[DemoRow, ...]
    curve: tuple[DemoRow, ...]
    training: Training
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values, ready for JSON."""
        return {"flora_tensor_version": ft.__version__, "torch_version": str(torch.__version__), **asdict(self)}

    def to_table(self) -> str:
        """Return the report as a text table, with what was done before and after it."""
        lines = [
            ["nothing", "", "0", "1.000", f"{self.accuracy_before:.3f}"],
            *(
                [r.layout, f"{r.max_ratio:.0%}", f"{r.n_parameters:,}", f"{r.relative_error:.3f}", f"{r.accuracy:.3f}"]
                for r in self.rows
            ),
            ["the full change", "100%", f"{self.dense_parameters:,}", "0.000", f"{self.accuracy_tuned:.3f}"],
        ]
        table = format_table(["change stored as", "budget", "parameters", "error", "accuracy"], lines, "lrrrr")
        t = self.training
        back = "the same scores, bit for bit" if t.restored_exactly else "other scores: this is a bug"
        return (
            f"Digits: the base network has accuracy {self.accuracy_base:.3f}; on shifted digits it has "
            f"{self.accuracy_before:.3f},\nand {self.accuracy_tuned:.3f} after fine-tuning all its weights.\n\n"
            f"{table}\n\n"
            f"Accuracy on {self.n_test} held-out shifted digits. All rows but the first store {self.whole_parameters} "
            f"biases whole.\n\nThe {t.max_ratio:.0%} adapter, attached and trained on for {t.epochs} epochs "
            f"({t.n_parameters:,} parameters): {t.accuracy_attached:.3f} → {t.accuracy_trained:.3f}.\n"
            f"Saved and loaded back: {back}. All of it took {self.seconds:.0f} s."
        )


@dataclass(frozen=True)
class _Sizes:
    """How long and how large: the whole demonstration, or a short one for tests."""

    width: int
    base_epochs: int
    tuned_epochs: int
    more_epochs: int
    curve: tuple[float, ...]


_FULL = _Sizes(32, 12, 25, 10, (0.02, 0.05, 0.15, 0.3, 0.6))
_SMALL = _Sizes(8, 2, 3, 1, ())


@dataclass(frozen=True, eq=False)
class _Pair:
    """The two checkpoints, on disk and in memory, and the tasks that they were trained on."""

    base: Path
    tuned: Path
    task: Digits
    shifted: Digits
    width: int

    def network(self, weights: Mapping[str, torch.Tensor]) -> nn.Module:
        network = DigitsNet(self.width)
        network.load_state_dict(dict(weights))
        return network.eval()

    def accuracy(self, weights: Mapping[str, torch.Tensor]) -> float:
        """Measure a network of these weights on held-out shifted digits."""
        return accuracy(self.network(weights), self.shifted.test, self.shifted.test_labels)


def run_demo(
    out: str | Path = "demo-output",
    *,
    seed: int = 0,
    small: bool = False,
    progress: Callable[[str], None] | None = None,
) -> DemoReport:
    """Fine-tune a small network, extract adapters from it, merge them, compare, and train one on.

    Writes ``base.safetensors``, ``tuned.safetensors``, an adapter directory and a merged checkpoint for each budget,
    the adapter that was trained on, ``demo.json`` and ``demo.png``. It computes on one thread: the network is too small
    for more, and the numbers then do not depend on how many cores there are.

    Parameters
    ----------
    out : path
        The directory to write; what an earlier run left there is replaced.
    seed : int
        What data, weights and batches are drawn from.
    small : bool
        Whether to train for seconds only, on a narrower network, as tests do.
    progress : callable, optional
        Called with a line of text before each part.

    Returns
    -------
    DemoReport
        All that was measured.

    Raises
    ------
    OSError
        If the directory cannot be written.

    References
    ----------
    Si et al. (FLoRA), ICLR 2025, arXiv 2405.14739; Hu et al. (LoRA), ICLR 2022, arXiv 2106.09685.

    Examples
    --------
    >>> import tempfile
    >>> report = run_demo(tempfile.mkdtemp(), small=True)
    >>> [row.max_ratio for row in report.rows if row.layout == "Tucker"]
    [0.1, 0.2, 0.4]
    """
    start, say = time.perf_counter(), progress or _silent
    out, sizes = Path(out), _SMALL if small else _FULL
    out.mkdir(parents=True, exist_ok=True)
    with _one_thread():
        say("training the base network, then fine-tuning it")
        pair, accuracy_base = _fine_tuned(out, sizes, seed)
        rows, extracted = _compared(pair, out, BUDGETS, say)
        more, _ = _compared(pair, None, sizes.curve, say)
        say("training the smallest adapter on")
        training = _trained_on(pair, out, rows[0], sizes.more_epochs, seed)
    report = DemoReport(
        seed=seed,
        n_test=len(pair.shifted.test),
        accuracy_base=accuracy_base,
        accuracy_before=pair.accuracy(load_file(pair.base)),
        accuracy_tuned=pair.accuracy(load_file(pair.tuned)),
        dense_parameters=extracted.dense_parameters,
        whole_parameters=extracted.whole_parameters,
        rows=rows,
        curve=tuple(sorted((*rows, *more), key=lambda row: (row.layout, row.max_ratio))),
        training=training,
        seconds=round(time.perf_counter() - start, 1),
    )
    save_figure(_figure(report), out / "demo.png")
    (out / "demo.json").write_text(report.to_json() + "\n", encoding="utf-8")
    return report


def _silent(_: str) -> None:
    """Show no progress."""


@contextmanager
def _one_thread() -> Generator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _fine_tuned(out: Path, sizes: _Sizes, seed: int) -> tuple[_Pair, float]:
    """Train on digits, write the checkpoint, train all weights on shifted digits, and write that one."""
    task = digits(seed)
    moved = shifted(task, seed)
    pair = _Pair(out / "base.safetensors", out / "tuned.safetensors", task, moved, sizes.width)
    network = DigitsNet(sizes.width, seed=seed)
    train(network, task.train, task.train_labels, epochs=sizes.base_epochs, learning_rate=3e-3, seed=seed)
    accuracy_base = accuracy(network, task.test, task.test_labels)
    save_file(network.state_dict(), pair.base)
    train(network, moved.train, moved.train_labels, epochs=sizes.tuned_epochs, learning_rate=3e-3, seed=seed)
    save_file(network.state_dict(), pair.tuned)
    return pair, accuracy_base


# --- both layouts ------------------------------------------------------------------------------------


def _compared(
    pair: _Pair, out: Path | None, budgets: Sequence[float], say: Callable[[str], None]
) -> tuple[tuple[DemoRow, ...], Any]:
    """Store the change at each budget in both layouts; without a directory the files are thrown away."""
    rows: list[DemoRow] = []
    report: ft.ExtractionReport | None = None
    with tempfile.TemporaryDirectory() as scratch:
        for max_ratio in budgets:
            say(f"storing the change in {max_ratio:.0%} of its numbers")
            row, report = _as_tucker(pair, out or Path(scratch), max_ratio)
            budget = int(max_ratio * report.dense_parameters)
            rows += [row, _as_svd(pair, max_ratio, budget)]
    return tuple(rows), report


def _adapter_name(max_ratio: float) -> str:
    return f"adapter-{100 * max_ratio:g}pct"


def _merged_name(max_ratio: float) -> str:
    return f"merged-{100 * max_ratio:g}pct.safetensors"


def _as_tucker(pair: _Pair, out: Path, max_ratio: float) -> tuple[DemoRow, ft.ExtractionReport]:
    """Extract an adapter, merge it into the base, and measure the merged checkpoint."""
    adapter, merged = out / _adapter_name(max_ratio), out / _merged_name(max_ratio)
    report = ft.extract(pair.base, pair.tuned, adapter, max_ratio=max_ratio, overwrite=True)
    ft.merge_checkpoint(pair.base, adapter, merged, overwrite=True)
    reached = pair.accuracy(load_file(merged))
    return DemoRow(_TUCKER, max_ratio, report.n_parameters, report.relative_error, reached), report


def _as_svd(pair: _Pair, max_ratio: float, budget: int) -> DemoRow:
    """Store the change as LoRA does, r(m + n) numbers for an m×n matrix, with the best ranks within the budget."""
    base, tuned = load_file(pair.base), load_file(pair.tuned)
    deltas = {name: (tuned[name].double() - base[name].double()).numpy() for name in base if base[name].dim() > 1}
    matrices = {name: delta.reshape(len(delta), -1) for name, delta in deltas.items()}
    allocation = ft.allocate_ranks({name: _svd_frontier(m) for name, m in matrices.items()}, max_parameters=budget)
    merged, left, total = dict(tuned), 0.0, 0.0
    for name, matrix in matrices.items():
        rank = allocation.ranks[name][0]
        u, s, vt = np.linalg.svd(matrix, full_matrices=False)
        # Rounded to float32 before it is measured, as the Tucker tensors are.
        approximation = (u[:, :rank] * s[:rank]).astype(np.float32) @ vt[:rank].astype(np.float32)
        left += float(np.sum((approximation - matrix) ** 2))
        total += float(np.sum(matrix**2))
        merged[name] = base[name] + torch.from_numpy(approximation.reshape(deltas[name].shape))
    return DemoRow(_SVD, max_ratio, allocation.n_parameters, (left / total) ** 0.5, pair.accuracy(merged))


def _svd_frontier(matrix: np.ndarray) -> ft.Frontier:
    """List what each rank of a truncated SVD costs and leaves out: two factors, and no core between them."""
    squares = np.linalg.svd(matrix, compute_uv=False) ** 2
    tails = np.append(np.cumsum(squares[::-1])[::-1], 0.0)
    ranks = np.arange(len(tails))
    return ft.Frontier(ranks * sum(matrix.shape), tails, np.stack([ranks, ranks], 1), float(tails[0]), matrix.size)


# --- training on -------------------------------------------------------------------------------------


def _trained_on(pair: _Pair, out: Path, row: DemoRow, epochs: int, seed: int) -> Training:
    """Attach the adapter of a row, train it on the shifted task, save it and load it back."""
    adapter = out / _adapter_name(row.max_ratio)
    network = pair.network(load_file(pair.base))
    attached = attach_adapter(network, adapter)
    images, labels = pair.shifted.test, pair.shifted.test_labels
    merged = pair.network(load_file(out / _merged_name(row.max_ratio)))
    difference = float((predict(network, images) - predict(merged, images)).abs().max())
    before = accuracy(network, images, labels)
    trained = adapter_parameters(network)
    task = pair.shifted
    train(network, task.train, task.train_labels, epochs=epochs, learning_rate=1e-2, parameters=trained, seed=seed)
    saved = save_adapter(network, out / "adapter-trained", overwrite=True, base_model_name_or_path=str(pair.base))
    again = pair.network(load_file(pair.base))
    load_adapter(again, saved)
    return Training(
        max_ratio=row.max_ratio,
        n_parameters=attached.n_parameters,
        epochs=epochs,
        accuracy_attached=before,
        accuracy_trained=accuracy(network, images, labels),
        difference_to_merged=difference,
        restored_exactly=torch.equal(predict(network, images), predict(again, images)),
    )


# --- the figure --------------------------------------------------------------------------------------

_COLORS = {_TUCKER: "#0b6e8f", _SVD: "#c1571c"}
_LABELS = {_TUCKER: "Tucker\n(flora-tensor)", _SVD: "SVD of o (i h w)\n(LoRA layout)"}


def _figure(report: DemoReport) -> Figure:
    """Draw error and accuracy against the numbers stored, for both layouts."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, column in ((left, "relative_error"), (right, "accuracy")):
        for layout, color in _COLORS.items():
            _draw_curve(axes, [r for r in report.curve if r.layout == layout], column, color)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("numbers stored for the change of the weights")
        axes.grid(visible=True, which="major", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    left.set_ylabel("relative error of the change")
    left.set_ylim(0, 1)
    left.set_title("How much of the change is lost", loc="left")
    right.set_ylabel("accuracy on held-out shifted digits")
    right.set_ylim(0, 1)
    right.set_title("What the merged network can still do", loc="left")
    _draw_references(right, report)
    return figure


def _draw_curve(axes: Any, rows: Sequence[DemoRow], column: str, color: str) -> None:
    parameters = [row.n_parameters for row in rows]
    values = [getattr(row, column) for row in rows]
    axes.plot(parameters, values, color=color, linewidth=2, zorder=3)
    chosen = [(row.n_parameters, getattr(row, column)) for row in rows if row.max_ratio in BUDGETS]
    axes.plot(*zip(*chosen), "o", color=color, markersize=7, zorder=4)
    if column == "relative_error":
        # The line itself bears its name: no legend to look up.
        middle = len(rows) // 2
        above = rows[0].layout == _SVD
        axes.annotate(
            _LABELS[rows[0].layout],
            (parameters[middle], values[middle]),
            xytext=(12, 10) if above else (-12, -10),
            textcoords="offset points",
            ha="left" if above else "right",
            va="bottom" if above else "top",
            color=color,
            fontweight="bold",
        )


def _draw_references(axes: Any, report: DemoReport) -> None:
    """Mark the full change, no change, and the adapter trained on."""
    lines = ((report.accuracy_tuned, "all weights fine-tuned", 3), (report.accuracy_before, "no change", -12))
    for level, text, above in lines:
        axes.axhline(level, color="0.35", linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        axes.annotate(
            f"{text}: {level:.3f}",
            (0.01, level),
            xycoords=("axes fraction", "data"),
            xytext=(0, above),
            textcoords="offset points",
            color="0.3",
            fontsize=9,
        )
    t = report.training
    start = next(row for row in report.rows if row.layout == _TUCKER and row.max_ratio == t.max_ratio)
    axes.annotate(
        "",
        (start.n_parameters, t.accuracy_trained),
        xytext=(start.n_parameters, t.accuracy_attached),
        arrowprops={"arrowstyle": "-|>", "color": _COLORS[_TUCKER], "linestyle": ":", "linewidth": 1.5, "shrinkA": 6},
    )
    axes.plot(start.n_parameters, t.accuracy_trained, "*", color=_COLORS[_TUCKER], markersize=15, zorder=5)
    axes.annotate(
        f"adapter trained on\nfor {t.epochs} epochs: {t.accuracy_trained:.3f}",
        (start.n_parameters, t.accuracy_trained),
        xytext=(-10, -2),
        textcoords="offset points",
        ha="right",
        va="top",
        color=_COLORS[_TUCKER],
        fontsize=9,
    )
