"""Pictures of spectra. Matplotlib is loaded when a picture is asked for."""

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from flora_tensor._arrays import to_numpy
from flora_tensor.spectra import Frontier, ModeSpectra, Spectrum

__all__ = ["plot_budgets", "plot_spectra", "save_figure"]

_MAX_WEIGHTS = 12


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
        axes.plot(points.n_parameters[1:] / points.n_entries, error[1:], label=name, linewidth=1.4)
    axes.set(xscale="log", xlabel="numbers stored / numbers in the dense change", ylabel="relative error", ylim=(0, 1))
    axes.grid(visible=True, which="both", alpha=0.25)
    axes.legend(fontsize="small", loc="lower left")
    figure.suptitle(title)
    return figure


def save_figure(figure: Any, path: str | os.PathLike[str]) -> None:
    """Write a figure as PNG, PDF or SVG, by the path's ending.

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
    figure.savefig(path, dpi=130)


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
    axes.set_title(f"{name} ({'×'.join(map(str, spectrum.shape))})", fontsize="medium")
    axes.grid(visible=True, which="both", alpha=0.25)
    axes.legend(fontsize="x-small")
