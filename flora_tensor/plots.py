"""Pictures of spectra. Matplotlib is loaded when a picture is asked for."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flora_tensor._arrays import to_numpy
from flora_tensor._checks import printable
from flora_tensor._files import staged_file
from flora_tensor._layer_grid import layer_grids, natural_key
from flora_tensor._typing import PathLike
from flora_tensor.report import ExtractionReport, TensorRow
from flora_tensor.spectra import Frontier, ModeSpectra, Spectrum

__all__ = ["plot_budgets", "plot_report", "plot_spectra", "save_figure"]

_MAX_WEIGHTS = 12
_MAX_ROWS = 40
_BLUE, _ORANGE = "#0b6e8f", "#c1571c"


def plot_spectra(spectra: Mapping[str, ModeSpectra | Spectrum], *, title: str = "Singular values of the modes") -> Any:
    """Draw the singular values of each mode, one panel a weight.

    Parameters
    ----------
    spectra : mapping of str to ModeSpectra or Spectrum
        The weights' spectra by name; the twelve of the largest norms are drawn.
    title : str
        The figure's title.

    Returns
    -------
    matplotlib.figure.Figure
        The figure. It belongs to no window: nothing is shown, and no global state of matplotlib is touched.

    Raises
    ------
    ImportError
        If matplotlib is not installed.
    ValueError
        If there is nothing to draw.

    References
    ----------
    De Lathauwer, De Moor and Vandewalle (2000), definition 4.

    Examples
    --------
    >>> from flora_tensor import mode_spectra
    >>> figure = plot_spectra({"fc.weight": mode_spectra(np.diag([3.0, 2.0, 1.0]))})
    >>> figure.axes[0].get_title()
    'fc.weight (3×3)'
    """
    if not spectra:
        raise ValueError("plot_spectra: no spectra; pass at least one")
    names = sorted(spectra, key=lambda name: -spectra[name].norm)[:_MAX_WEIGHTS]
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    figure = _figure(4.2 * columns, 3.1 * rows + 0.5)
    for k, name in enumerate(names):
        axes = figure.add_subplot(rows, columns, k + 1)
        _draw_spectrum(axes, name, spectra[name])
    rest = len(spectra) - len(names)
    figure.suptitle(title + (f" (the {len(names)} largest of {len(spectra)} weights)" if rest else ""))
    return figure


def plot_budgets(frontiers: Mapping[str, Frontier], *, title: str = "What each number of parameters buys") -> Any:
    """Draw, for each weight, the smallest relative error against the share of its numbers that is stored.

    Parameters
    ----------
    frontiers : mapping of str to Frontier
        The weights' frontiers by name; the twelve of the largest norms are drawn.
    title : str
        The figure's title.

    Returns
    -------
    matplotlib.figure.Figure
        The figure, which belongs to no window.

    Raises
    ------
    ImportError
        If matplotlib is not installed.
    ValueError
        If there is nothing to draw.

    References
    ----------
    De Lathauwer, De Moor and Vandewalle (2000), property 10.

    Examples
    --------
    >>> from flora_tensor import hosvd_spectrum
    >>> figure = plot_budgets({"fc.weight": hosvd_spectrum(np.diag([3.0, 2.0, 1.0])).frontier()})
    >>> figure.axes[0].get_xlabel()
    'numbers stored / numbers in the dense change'
    """
    if not frontiers:
        raise ValueError("plot_budgets: no frontiers; pass at least one")
    names = sorted(frontiers, key=lambda name: -frontiers[name].norm_squared)[:_MAX_WEIGHTS]
    figure = _figure(7.0, 4.5)
    axes = figure.add_subplot()
    for name in names:
        points = frontiers[name]
        error = np.sqrt(points.error_squared / (points.norm_squared or 1.0))
        axes.plot(points.n_parameters[1:] / points.n_entries, error[1:], label=_label(name), linewidth=1.4)
    axes.set(xscale="log", xlabel="numbers stored / numbers in the dense change", ylabel="relative error", ylim=(0, 1))
    axes.grid(visible=True, which="both", alpha=0.25)
    axes.legend(fontsize="small", loc="lower left")
    figure.suptitle(title)
    return figure


def plot_report(report: ExtractionReport, *, title: str = "Extraction") -> Any:
    """Draw what other budgets would buy, and how much of each mode the stored tensors keep.

    Parameters
    ----------
    report : ExtractionReport
        What `extract` returned.
    title : str
        The figure's title.

    Returns
    -------
    matplotlib.figure.Figure
        The figure, which belongs to no window. Of many tensors the forty with the most numbers are drawn.

    Raises
    ------
    ImportError
        If matplotlib is not installed.

    References
    ----------
    De Lathauwer, De Moor and Vandewalle (2000), property 10.

    Examples
    --------
    >>> from flora_tensor.report import ExtractionReport, TensorRow
    >>> row = TensorRow("fc.weight", "tucker", shape=(8, 8), ranks=(1, 1), modes=(8, 8), n_parameters=17)
    >>> figure = plot_report(ExtractionReport((row,), 64, 17, 0, 0.25, curve=((0, 1.0), (17, 0.25), (64, 0.0))))
    >>> [axes.get_title() for axes in figure.axes][:2]
    ['What other budgets would buy', 'Share of each mode kept']
    """
    rows = [row for row in report.rows if row.status == "tucker" and len(row.modes) == len(row.ranks) > 0]
    heat, about = _heat(rows)
    figure = _figure(11.0 if heat.shares.shape[1] < 8 else 15.0, max(3.6, 1.6 + 0.22 * len(heat.labels)))
    left, right = figure.subplots(1, 2, width_ratios=[1, 1 if heat.shares.shape[1] < 8 else 2])
    error = report.relative_error if report.weighted_error is None else report.weighted_error
    points = [(n / report.dense_parameters, e) for n, e in report.curve if n > 0]
    if points:
        left.plot(*zip(*points), color=_BLUE, linewidth=2)
    if report.n_parameters:
        left.plot(report.ratio, error, "o", color=_ORANGE, markersize=8, zorder=3)
        place = {"xytext": (8, 8), "textcoords": "offset points", "color": _ORANGE}
        left.annotate(f"{100 * report.ratio:.3g} %: {error:.3g}", (report.ratio, error), **place)
    what = "relative error" if report.weighted_error is None else "relative error of the outputs"
    left.set(xscale="log", xlabel="numbers stored, as a share of the changes", ylabel=what, ylim=(0, 1.02))
    left.xaxis.set_major_formatter(lambda share, _: f"{100 * share:g} %")
    left.set_title("What other budgets would buy", loc="center")
    left.grid(visible=True, alpha=0.25)
    left.spines[["top", "right"]].set_visible(False)
    _draw_heat(figure, right, heat, about)
    figure.suptitle(title)
    return figure


class _Heat(NamedTuple):
    """Shares of modes to be drawn as a field of colors, with the ranks as text."""

    labels: list[str]
    columns: list[str]
    shares: np.ndarray
    ranks: np.ndarray


def _heat(rows: Sequence[TensorRow]) -> tuple[_Heat, str]:
    """Lay out ranks by layer and mode where most tensors belong to layers, else by tensor and mode; and a title."""
    told = {row.name: row for row in rows}
    grid = [row for grid in layer_grids({r.name: (r.ranks, r.modes) for r in rows}).values() for row in grid]
    if 2 * len({name for row in grid for name in row.cells.values()}) > len(rows):
        parts = [sum(told[name].n_parameters for name in row.cells.values()) for row in grid]
        kept = sorted(sorted(range(len(grid)), key=lambda k: -parts[k])[:_MAX_ROWS])
        layers = sorted({layer for k in kept for layer in grid[k].cells})
        labels = [f"{grid[k].label.removesuffix('.weight')}, mode {grid[k].mode}" for k in kept]
        cells = {
            (y, layers.index(layer)): (told[name].ranks[grid[k].mode], told[name].modes[grid[k].mode])
            for y, k in enumerate(kept)
            for layer, name in grid[k].cells.items()
        }
        what, columns, total = "Share of modes kept, by layer", [str(layer) for layer in layers], len(grid)
    else:
        drawn = {row.name for row in sorted(rows, key=lambda row: -row.n_parameters)[:_MAX_ROWS]}
        chosen = sorted((row for row in rows if row.name in drawn), key=lambda row: natural_key(row.name))
        labels = [row.name for row in chosen]
        cells = {(y, k): pair for y, row in enumerate(chosen) for k, pair in enumerate(zip(row.ranks, row.modes))}
        modes = max((len(row.ranks) for row in rows), default=1)
        what, columns, total = "Share of each mode kept", [f"mode {k}" for k in range(modes)], len(rows)
    ranks, sizes = (np.full((max(len(labels), 1), len(columns)), np.nan) for _ in range(2))
    for place, pair in cells.items():
        ranks[place], sizes[place] = pair
    part = f" (the {len(labels)} largest)" if len(labels) < total else ""
    return _Heat(labels, columns, ranks / sizes, ranks), what + part


def _draw_heat(figure: Any, axes: Any, heat: _Heat, title: str) -> None:
    """Show shares as colors, and the ranks themselves in the cells."""
    top = float(np.nanmax(heat.shares)) if np.isfinite(heat.shares).any() else 1.0
    image = axes.imshow(heat.shares, aspect="auto", cmap="Blues", vmin=0, vmax=top)
    for y, x in zip(*np.nonzero(np.isfinite(heat.shares))):
        color = "white" if heat.shares[y, x] > 0.6 * top else "0.15"
        axes.text(x, y, f"{heat.ranks[y, x]:.0f}", ha="center", va="center", fontsize=7, color=color)
    axes.set_yticks(range(len(heat.labels)), [_label(name, 44) for name in heat.labels], fontsize=7)
    axes.set_xticks(range(len(heat.columns)), heat.columns, fontsize=8)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(title, loc="center")
    figure.colorbar(image, ax=axes, fraction=0.05, pad=0.02, label="rank / size")


def picture_formats() -> frozenset[str]:
    """Return the kinds of files that `save_figure` can write, as the ends of their names.

    Returns
    -------
    frozenset of str
        Such as ``"png"``.

    Raises
    ------
    ImportError
        If matplotlib is not installed.

    References
    ----------
    The list is matplotlib's own.

    Examples
    --------
    >>> {"png", "pdf", "svg"} <= picture_formats()
    True
    """
    return frozenset(_figure(1.0, 1.0).canvas.get_supported_filetypes())


def save_figure(figure: Any, path: PathLike) -> None:
    """Write a figure as PNG, PDF or SVG, by the path's ending; the file appears whole or not at all.

    Parameters
    ----------
    figure : matplotlib.figure.Figure
        The figure.
    path : path
        Where to write it; an existing file is replaced.

    Raises
    ------
    ValueError
        If matplotlib does not know the ending.
    OSError
        If the file cannot be written.

    References
    ----------
    Matplotlib, https://matplotlib.org, ``Figure.savefig``.

    Examples
    --------
    >>> import tempfile, pathlib
    >>> from flora_tensor import mode_spectra
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "spectra.png"
    >>> save_figure(plot_spectra({"fc.weight": mode_spectra(np.eye(3))}), path)
    >>> path.stat().st_size > 1000
    True
    """
    target = Path(path)
    with staged_file("save_figure", target, overwrite=True) as stage:
        figure.savefig(stage, format=target.suffix.removeprefix("."), dpi=130)


def _label(name: str, most: int = 200) -> str:
    """Return a name as matplotlib may draw it: without control characters, and with no dollar that begins a formula."""
    short = name if len(name) <= most else f"…{name[1 - most :]}"
    return printable(short).replace("$", r"\$")


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("plots need matplotlib; pip install 'flora-tensor[viz]'") from None
    # Not through pyplot: that would choose a backend and keep the figure alive.
    return Figure(figsize=(width, height), layout="constrained")


def _draw_spectrum(axes: Any, name: str, spectrum: ModeSpectra | Spectrum) -> None:
    for mode, values in enumerate(spectrum.values):
        sigma = np.asarray(to_numpy(values), dtype=np.float64)
        largest = float(sigma[0]) if sigma.size and sigma[0] > 0 else 1.0
        # A logarithm has no place for zeros: what lies below rounding is left out.
        visible = sigma / largest > 1e-12
        marker = "o" if sigma.size < 16 else None
        label = f"mode {mode} ({spectrum.shape[mode]})"
        # Both modes of a matrix have the same values: the second line lets the first one be seen.
        style = {"label": label, "marker": marker, "ms": 3, "linestyle": "--" if mode % 2 else "-"}
        axes.plot(np.arange(1, sigma.size + 1)[visible], (sigma / largest)[visible], **style)
    axes.set(xscale="log", yscale="log", xlabel="index", ylabel="σ / σ₁")
    shape = f"({'×'.join(map(str, spectrum.shape))})"
    # A panel is some 46 small letters wide.
    together = len(name) + len(shape) < 38
    axes.set_title(f"{_label(name, 44)}{' ' if together else chr(10)}{shape}", fontsize="small")
    axes.grid(visible=True, which="both", alpha=0.25)
    axes.legend(fontsize="x-small")
