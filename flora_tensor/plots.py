"""Pictures of spectra. Matplotlib is loaded when a picture is asked for."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flora_tensor._arrays import to_numpy
from flora_tensor._checks import printable
from flora_tensor._files import staged_file
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


def plot_budgets(frontier: Mapping[str, Frontier], *, title: str = "What each number of parameters buys") -> Any:
    """Draw, for each weight, the smallest relative error against the share of its numbers that is stored.

    Parameters
    ----------
    frontier : mapping of str to Frontier
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
    if not frontier:
        raise ValueError("plot_budgets: no frontiers; pass at least one")
    names = sorted(frontier, key=lambda name: -frontier[name].norm_squared)[:_MAX_WEIGHTS]
    figure = _figure(7.0, 4.5)
    axes = figure.add_subplot()
    for name in names:
        points = frontier[name]
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
    >>> from flora_tensor._files import staged_file
    from flora_tensor.report import ExtractionReport, TensorRow
    >>> row = TensorRow("fc.weight", "tucker", shape=(8, 8), ranks=(1, 1), modes=(8, 8), n_parameters=17)
    >>> figure = plot_report(ExtractionReport((row,), 64, 17, 0, 0.25, curve=((0, 1.0), (17, 0.25), (64, 0.0))))
    >>> [axes.get_title() for axes in figure.axes][:2]
    ['What other budgets would buy', 'Share of each mode kept']
    """
    rows = [row for row in report.rows if row.status == "tucker" and len(row.modes) == len(row.ranks) > 0]
    drawn = {row.name for row in sorted(rows, key=lambda row: -row.n_parameters)[:_MAX_ROWS]}
    rows = [row for row in rows if row.name in drawn]
    figure = _figure(11.0, max(3.6, 1.6 + 0.22 * len(rows)))
    left, right = figure.subplots(1, 2)
    error = report.relative_error if report.weighted_error is None else report.weighted_error
    points = [(n / report.dense_parameters, e) for n, e in report.curve if n > 0]
    if points:
        left.plot(*zip(*points), color=_BLUE, linewidth=2)
    if report.n_parameters:
        left.plot(report.ratio, error, "o", color=_ORANGE, markersize=8, zorder=3)
        place = {"xytext": (8, 8), "textcoords": "offset points", "color": _ORANGE}
        left.annotate(f"{100 * report.ratio:.3g} %: {error:.3g}", (report.ratio, error), **place)
    what = "relative error" if report.weighted_error is None else "relative error of the outputs"
    left.set(xscale="log", xlabel="numbers stored / numbers in the dense changes", ylabel=what, ylim=(0, 1.02))
    left.set_title("What other budgets would buy", loc="center")
    left.grid(visible=True, alpha=0.25)
    left.spines[["top", "right"]].set_visible(False)
    _draw_heat(figure, right, rows, len(drawn) < report.count("tucker"))
    figure.suptitle(title)
    return figure


def _draw_heat(figure: Any, axes: Any, rows: Sequence[TensorRow], is_part: bool) -> None:
    """Show the ranks of each tensor's modes as shares of their sizes, the ranks themselves in the cells."""
    modes = max((len(row.ranks) for row in rows), default=1)
    shares = np.full((max(len(rows), 1), modes), np.nan)
    for k, row in enumerate(rows):
        shares[k, : len(row.ranks)] = [rank / size for rank, size in zip(row.ranks, row.modes)]
    image = axes.imshow(shares, aspect="auto", cmap="Blues", vmin=0, vmax=1)
    for k, row in enumerate(rows):
        for mode, rank in enumerate(row.ranks):
            color = "white" if shares[k, mode] > 0.6 else "0.15"
            axes.text(mode, k, str(rank), ha="center", va="center", fontsize=7, color=color)
    axes.set_yticks(range(len(rows)), [_label(row.name, 44) for row in rows], fontsize=7)
    axes.set_xticks(range(modes), [f"mode {k}" for k in range(modes)], fontsize=8)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title("Share of each mode kept" + (f" (the {len(rows)} largest)" if is_part else ""), loc="center")
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


def save_figure(figure: Any, path: str | os.PathLike[str]) -> None:
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
        axes.plot(np.arange(1, sigma.size + 1)[visible], (sigma / largest)[visible], label=label, marker=marker, ms=3)
    axes.set(xscale="log", yscale="log", xlabel="index", ylabel="σ / σ₁")
    axes.set_title(f"{_label(name)} ({'×'.join(map(str, spectrum.shape))})", fontsize="medium")
    axes.grid(visible=True, which="both", alpha=0.25)
    axes.legend(fontsize="x-small")
