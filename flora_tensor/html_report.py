"""Reports as one HTML page each, which needs nothing else: no scripts, fonts or pictures from elsewhere.

The page reads on a phone and in the dark, its tables are tables and its pictures have descriptions. Its only script
sorts a table by the column that is clicked.
"""

import html
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from flora_tensor._checks import printable
from flora_tensor._layer_grid import GridRow, layer_grids, natural_key
from flora_tensor._version import __version__
from flora_tensor.rank_study import RankStudy
from flora_tensor.report import ExtractionReport, TensorRow

__all__ = ["report_html", "study_html"]

_STYLE = """
:root{--ink:#1c2733;--soft:#5b6875;--line:#d9dfe5;--paper:#fff;--band:#f5f7f9;--blue:#0b6e8f;--heat:#0b6e8f;
--orange:#b8500f}
@media(prefers-color-scheme:dark){:root{--ink:#e6ebf0;--soft:#9aa7b4;--line:#34404c;--paper:#141a20;--band:#1b232b;
--blue:#5cc0e0;--heat:#2f93b3;--orange:#f0955a}}
*{box-sizing:border-box}body{margin:0 auto;padding:1.2rem;max-width:68rem;color:var(--ink);background:var(--paper);
font:16px/1.5 system-ui,sans-serif}h1{font-size:1.5rem;line-height:1.25;margin:.2rem 0;overflow-wrap:anywhere}
h2{font-size:1.15rem;margin:2.2rem 0 .4rem}p{margin:.3rem 0 .8rem;max-width:46rem}.soft{color:var(--soft)}
dl{display:grid;grid-template-columns:repeat(auto-fit,minmax(8rem,1fr));gap:.7rem;margin:1.2rem 0}
dl div{background:var(--band);border-radius:.5rem;padding:.6rem .8rem}dt{color:var(--soft);font-size:.8rem}
dd{margin:0;font-size:1.3rem;font-variant-numeric:tabular-nums}
.wide{overflow:auto;max-height:85vh;border:1px solid var(--line);border-radius:.5rem;margin:.8rem 0}
.wide:focus-visible{outline:2px solid var(--blue)}
table{border-collapse:separate;border-spacing:0;width:100%;font-size:.86rem}
caption{text-align:left;color:var(--soft);padding:.5rem .6rem}
caption span{display:inline-block;position:sticky;left:.6rem;max-width:min(60rem,calc(100vw - 4rem))}
th,td{padding:.32rem .6rem;text-align:left;border-top:1px solid var(--line);vertical-align:top}
thead th{background:var(--band);white-space:nowrap;position:sticky;top:0}
tbody th{font-weight:500;overflow-wrap:anywhere;min-width:10rem}
.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
button{all:unset;cursor:pointer;font-weight:600}button:focus-visible{outline:2px solid var(--blue)}
th[aria-sort=ascending] button::after{content:" ▲"}th[aria-sort=descending] button::after{content:" ▼"}
.rank{text-align:center;white-space:nowrap;font-variant-numeric:tabular-nums}.note{color:var(--soft)}
.grid{width:auto}.grid .rank{padding:.2rem .35rem;min-width:1.9rem}.grid thead th+th{text-align:center}
.grid tbody th{min-width:0;white-space:nowrap;background:var(--paper);position:sticky;left:0}
svg{width:100%;height:auto;max-width:46rem;display:block}svg text{font:12px system-ui,sans-serif;fill:var(--soft)}
@media(max-width:40rem){svg text{font-size:19px}tbody th,.grid tbody th{position:static}}
@media print{.wide{max-height:none;overflow:visible}thead th{position:static}}
"""

_SCRIPT = """
document.querySelectorAll("th button").forEach(function(b){b.addEventListener("click",function(){
var th=b.parentNode,row=th.parentNode,k=Array.prototype.indexOf.call(row.children,th),t=th.closest("table").tBodies[0];
var down=th.getAttribute("aria-sort")==="ascending";
Array.prototype.forEach.call(row.children,function(c){c.removeAttribute("aria-sort")});
th.setAttribute("aria-sort",down?"descending":"ascending");
var key=function(r){var v=r.cells[k].dataset.v;return v===undefined?r.cells[k].textContent:v===""?-1:parseFloat(v)};
Array.prototype.slice.call(t.rows).sort(function(a,b){var x=key(a),y=key(b);
return (x<y?-1:x>y?1:0)*(down?-1:1)}).forEach(function(r){t.appendChild(r)})})});
"""


@dataclass(frozen=True)
class _Cell:
    """What stands in a table: a text, or a number with the value that it is sorted by; a class says how it looks."""

    text: str
    value: float | None = None
    look: str = ""
    style: str = ""
    title: str = ""


def report_html(report: ExtractionReport, *, title: str = "Extraction report") -> str:
    """Return an extraction's report as a page of HTML.

    Parameters
    ----------
    report : ExtractionReport
        What `extract` returned.
    title : str
        The page's title.

    Returns
    -------
    str
        A whole document: totals, the curve of error against size, the ranks by tensor and mode, and every tensor's row.

    References
    ----------
    W3C, *Web Content Accessibility Guidelines* 2.2, for descriptions, contrast and keyboard use.

    Examples
    --------
    >>> from flora_tensor.report import ExtractionReport, TensorRow
    >>> row = TensorRow("fc.weight", "tucker", changed=True, shape=(8, 8), ranks=(1, 1), modes=(8, 8), n_parameters=17)
    >>> page = report_html(ExtractionReport((row,), 64, 17, 0, 0.25))
    >>> page.startswith("<!DOCTYPE html>"), page.count("<table")
    (True, 2)
    """
    at = (report.n_parameters, _counted_error(report))
    body = [_facts(_totals(report))]
    if len(report.curve) > 1:
        what = "of the layers' outputs" if report.weighted_error is not None else "of all changes together"
        body += [
            "<h2>What other budgets would buy</h2>",
            f"<p class='soft'>The smallest relative error {what} at each size; the dot is this extraction.</p>",
            _curve(report.curve, report.dense_parameters, at),
        ]
    stored = [row for row in report.rows if row.status == "tucker" and len(row.modes) == len(row.ranks) > 0]
    if stored:
        told = {row.name: row.arrangement for row in stored}
        body += ["<h2>Ranks</h2>", *_heat({row.name: (row.ranks, row.modes) for row in stored}, told)]
    about = (
        "All tensors of both checkpoints. Errors are measured on the stored bits; no tensor of the same ranks has one "
        "below “at least”"
    )
    body += ["<h2>Tensors</h2>", _table(about, *_tensor_rows(report, report.rows))]
    if report.stacks:
        what = "Weights that share their factors, each stack as the one tensor that it is stored as"
        body += ["<h2>Stacks</h2>", _table(what, *_tensor_rows(report, report.stacks))]
    options = ", ".join(f"{key}: {value}" for key, value in report.options.items() if value not in ([], None))
    body.append(f"<p class='soft'>Options: {_escape(options)}.</p>")
    return _page(title, "Nothing was written: this is a dry run." if report.dry_run else "", body)


def study_html(study: RankStudy, *, title: str = "Rank study") -> str:
    """Return a rank study as a page of HTML.

    Parameters
    ----------
    study : RankStudy
        What `study_ranks` returned.
    title : str
        The page's title.

    Returns
    -------
    str
        A whole document: the curve of error against size, what budgets give, and the ranks that hold 90 and 99 % of
        each weight's change.

    References
    ----------
    As `report_html`.

    Examples
    --------
    >>> import numpy as np
    >>> from flora_tensor import mode_spectra
    >>> from flora_tensor.rank_study import RankStudy
    >>> page = study_html(RankStudy({"fc.weight": mode_spectra(np.eye(3))}, {}, ()))
    >>> page.count("<table")
    3
    """
    dense = sum(math.prod(s.shape) for s in study.weights.values())
    body = [_facts([("changed weights", f"{len(study.weights):,}"), ("numbers in their changes", f"{dense:,}")])]
    if len(study.curve) > 1:
        body += ["<h2>What budgets buy</h2>", _curve(study.curve, dense, None)]
    budgets = [
        [
            _Cell(f"{100 * row.max_ratio:g} %", row.max_ratio, "n"),
            _Cell(f"{row.n_parameters:,}", row.n_parameters, "n"),
            _Cell(f"{row.n_weights:,}", row.n_weights, "n"),
            _Cell(f"{row.relative_error:.4g}", row.relative_error, "n"),
            _Cell(f"{row.lower_bound:.4g}", row.lower_bound, "n"),
            *([_Cell(", ".join(row.stacks))] if study.stacks else []),
        ]
        for row in study.budgets
    ]
    header = ["budget", "numbers stored", "weights stored", "relative error", "lower bound"]
    header += ["stored as one"] if study.stacks else []
    body.append(_table("Budgets, as a share of the dense changes", header, budgets))
    names = sorted(study.spectra, key=natural_key)
    body += ["<h2>Ranks that hold 99 % of ‖ΔW‖²</h2>"]
    held = {n: (study.energy_ranks(n, 0.99), study.spectra[n].shape) for n in names}
    body += _heat({n: ranks for n, ranks in held.items() if n not in study.stacks}, {})
    if study.stacks:
        body.append(_tensor_heat([(n, *held[n]) for n in names if n in study.stacks], "of each stack"))
    rows = [
        [
            _Cell(name, None, "head"),
            _Cell("×".join(map(str, s.shape)), math.prod(s.shape)),
            _Cell(f"{s.norm:.4g}", s.norm, "n"),
            *(_Cell("×".join(map(str, study.energy_ranks(name, e)))) for e in (0.9, 0.99)),
        ]
        for name, s in ((name, study.spectra[name]) for name in names)
    ]
    body += ["<h2>Weights</h2>"]
    body.append(_table("All changed weights", ["weight", "shape", "‖ΔW‖", "ranks at 90 %", "ranks at 99 %"], rows))
    return _page(title, "", body)


def _counted_error(report: ExtractionReport) -> float:
    return report.relative_error if report.weighted_error is None else report.weighted_error


def _totals(report: ExtractionReport) -> list[tuple[str, str]]:
    error = "not measured" if math.isnan(report.relative_error) else f"{report.relative_error:.4g}"
    facts = [
        ("numbers stored", f"{report.n_parameters:,}"),
        ("share of the changes", f"{100 * report.ratio:.3g} %"),
        ("relative error", error),
    ]
    if report.weighted_error is not None:
        facts.append(("error of the outputs", f"{report.weighted_error:.4g}"))
    if report.lower_bound is not None:
        facts.append(("lower bound", f"{report.lower_bound:,.4g}"))
    facts += [("decomposed", f"{report.count('tucker'):,}"), ("stored whole", f"{report.count('whole'):,}")]
    return [*facts, ("left out", f"{report.count('left out'):,}")]


def _tensor_rows(report: ExtractionReport, given: Sequence[TensorRow]) -> tuple[list[str], list[list[_Cell]]]:
    weighted = report.weighted_error is not None
    header = ["tensor", "shape", "stored as", "ranks", "numbers", "error", *(["output error"] if weighted else [])]
    rows = sorted(given, key=lambda row: natural_key(row.name))
    return [*header, "at least", "‖ΔW‖"], [_tensor_row(row, weighted) for row in rows]


def _tensor_row(row: TensorRow, weighted: bool) -> list[_Cell]:
    stored = {"tucker": row.arrangement, "whole": "whole", "left out": f"— {row.reason}"}[row.status]
    stored += f" in {row.stack}" if row.stack else ""
    notes = f" ({'; '.join(row.notes)})" if row.notes else ""
    return [
        _Cell(row.name, None, "head"),
        _Cell("×".join(map(str, row.shape)), math.prod(row.shape)),
        _Cell(stored + notes, None, "note" if row.status == "left out" else ""),
        _Cell("×".join(map(str, row.ranks)) if row.status == "tucker" else "", None, "n"),
        _Cell(f"{row.n_parameters:,}" if row.n_parameters else "", row.n_parameters, "n"),
        _number(row.relative_error),
        *([_number(row.weighted_error)] if weighted else []),
        _number(row.lower_bound),
        _number(row.delta_norm),
    ]


def _number(value: float | None) -> _Cell:
    return _Cell("", -1.0, "n") if value is None or not math.isfinite(value) else _Cell(f"{value:.4g}", value, "n")


# --- the parts of a page -----------------------------------------------------------------------------


def _escape(text: str) -> str:
    return html.escape(printable(text))


def _page(title: str, remark: str, body: Iterable[str]) -> str:
    policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            f"<title>{_escape(title)}</title><style>{_STYLE}</style></head><body><main>",
            f"<h1>{_escape(title)}</h1>",
            f"<p class='soft'>flora-tensor {_escape(__version__)}. {_escape(remark)}</p>",
            *body,
            f"</main><script>{_SCRIPT}</script></body></html>",
            "",
        ]
    )


def _facts(facts: Sequence[tuple[str, str]]) -> str:
    entries = "".join(f"<div><dt>{_escape(name)}</dt><dd>{_escape(value)}</dd></div>" for name, value in facts)
    return f"<dl>{entries}</dl>"


def _table(caption: str, header: Sequence[str], rows: Sequence[Sequence[_Cell]]) -> str:
    numeric = [bool(rows) and rows[0][k].look == "n" for k in range(len(header))]
    head = "".join(
        f'<th scope="col"{" class=n" if n else ""}><button type="button">{_escape(name)}</button></th>'
        for name, n in zip(header, numeric)
    )
    lines = ("<tr>" + "".join(_cell(cell) for cell in row) + "</tr>" for row in rows)
    about = f"{_escape(caption)}; click a title to sort."
    return (
        f'<div class="wide" tabindex="0"><table><caption><span>{about}</span></caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def _cell(cell: _Cell) -> str:
    if cell.look == "head":
        # A name may be broken behind its dots and underscores.
        text = re.sub(r"([._])", r"\1<wbr>", _escape(cell.text))
        return f'<th scope="row">{text}</th>'
    look = f' class="{cell.look}"' if cell.look else ""
    value = "" if cell.value is None else f' data-v="{cell.value!r}"'
    style = f' style="{cell.style}"' if cell.style else ""
    title = f' title="{_escape(cell.title)}"' if cell.title else ""
    return f"<td{look}{value}{style}{title}>{_escape(cell.text)}</td>"


_Ranks = Mapping[str, tuple[Sequence[int], Sequence[int]]]


def _heat(ranks: _Ranks, arrangements: Mapping[str, str]) -> Iterable[str]:
    """Show ranks by layer and mode, and those of tensors that are in no layer by tensor and mode."""
    grids = layer_grids(ranks)
    for title, rows in grids.items():
        yield _grid_table(title, rows, ranks, arrangements)
    in_grids = {name for rows in grids.values() for row in rows for name in row.cells.values()}
    if others := sorted(ranks.keys() - in_grids, key=natural_key):
        yield _tensor_heat([(name, *ranks[name]) for name in others], "of other tensors" if grids else "of each tensor")


def _grid_table(title: str, rows: Sequence[GridRow], ranks: _Ranks, arrangements: Mapping[str, str]) -> str:
    """Show one grid: a row for each weight and mode, a column for each layer."""
    layers = sorted({layer for row in rows for layer in row.cells})
    shares = {name: [rank / size for rank, size in zip(*ranks[name])] for row in rows for name in row.cells.values()}
    most = max(shares[name][row.mode] for row in rows for name in row.cells.values())
    head = "".join(f'<th scope="col">{_escape(text)}</th>' for text in ["weight", "mode", *map(str, layers)])
    lines: list[str] = []
    for row in rows:
        cells = [_Cell(str(row.mode), None, "rank")]
        for layer in layers:
            if (name := row.cells.get(layer)) is None:
                cells.append(_Cell(""))
                continue
            rank, size = (of[row.mode] for of in ranks[name])
            told = f"layer {layer}: rank {rank} of {size}"
            told += f", {arrangements[name]}" if name in arrangements else ""
            cells.append(_Cell(str(rank), None, "rank", _color(shares[name][row.mode] / most), told))
        label = _escape(row.label.removesuffix(".weight"))
        lines.append(f'<tr><th scope="row">{label}</th>{"".join(map(_cell, cells))}</tr>')
    caption = f"{title}: ranks by layer and mode; the deepest color keeps {100 * most:.3g} % of a mode"
    return (
        f'<div class="wide" tabindex="0"><table class="grid"><caption><span>{_escape(caption)}</span></caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def _tensor_heat(entries: Sequence[tuple[str, Sequence[int], Sequence[int]]], whose: str) -> str:
    """Show ranks by tensor and mode; the deeper a cell's color, the more of the mode is kept."""
    modes = max(len(ranks) for _, ranks, _ in entries)
    rows: list[list[_Cell]] = []
    for name, ranks, sizes in entries:
        cells = [_Cell(name, None, "head")]
        for rank, size in zip(ranks, sizes):
            share = rank / size if size else 0.0
            cells.append(_Cell(f"{rank} / {size}", share, "rank", _color(share)))
        rows.append([*cells, *[_Cell("", -1.0)] * (modes - len(ranks))])
    header = ["tensor", *(f"mode {k}" for k in range(modes))]
    return _table(f"Ranks {whose}, out of the modes' sizes; deeper colors keep more", header, rows)


def _color(share: float) -> str:
    # Sixty percent of the color leave the text on it a contrast above 5, on white and on black.
    return f"background:color-mix(in srgb,var(--heat) {round(60 * share)}%,transparent)"


_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 680, 336, 60, 24, 14, 62


def _curve(points: Sequence[tuple[int, float]], dense: int, at: tuple[int, float] | None) -> str:
    """Draw error against the share of numbers stored, the latter on a logarithm, with this choice marked."""
    drawn = [(n / dense, e) for n, e in points if n > 0]
    low = math.floor(math.log10(min([share for share, _ in drawn] + ([at[0] / dense] if at and at[0] else []))))

    def x(share: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * (1 - math.log10(max(share, 10.0**low)) / low if low else 1.0)

    def y(error: float) -> float:
        return _TOP + (_HEIGHT - _TOP - _BOTTOM) * (1 - min(error, 1.0))

    line = " ".join(f"{x(min(share, 1.0)):.1f},{y(error):.1f}" for share, error in drawn)
    parts = [f'<polyline points="{line}" fill="none" stroke="var(--blue)" stroke-width="2.5" stroke-linejoin="round"/>']
    for error in (0.0, 0.25, 0.5, 0.75, 1.0):
        parts.insert(0, _grid(_LEFT, y(error), _WIDTH - _RIGHT, y(error)))
        parts.append(f'<text x="{_LEFT - 8}" y="{y(error) + 4:.1f}" text-anchor="end">{error:g}</text>')
    for power in range(low, 1):
        place = x(10.0**power)
        parts.insert(0, _grid(place, _TOP, place, _HEIGHT - _BOTTOM))
        anchor = "end" if power == 0 else "middle"
        text = f"{100 * 10.0**power:g} %"
        parts.append(f'<text x="{place:.1f}" y="{_HEIGHT - _BOTTOM + 23}" text-anchor="{anchor}">{text}</text>')
    middle, label = (_LEFT + _WIDTH - _RIGHT) / 2, "numbers stored, as a share of the changes"
    parts.append(f'<text x="{middle:.0f}" y="{_HEIGHT - 8}" text-anchor="middle">{label}</text>')
    about = "Relative error against the share of numbers stored."
    if at is not None and at[0] > 0:
        share, error = at[0] / dense, at[1]
        parts.append(f'<circle cx="{x(min(share, 1.0)):.1f}" cy="{y(error):.1f}" r="6" fill="var(--orange)"/>')
        # The curve falls: there is room above it to the right, and at its end below it to the left.
        at_end = x(min(share, 1.0)) > _WIDTH - 250
        place, level = (x(min(share, 1.0)) - 11, y(error) + 20) if at_end else (x(min(share, 1.0)) + 11, y(error) - 9)
        parts.append(
            f'<text x="{place:.1f}" y="{min(level, y(0.0) - 6):.1f}" text-anchor="{"end" if at_end else "start"}" '
            f'style="fill:var(--orange);font-weight:600">{100 * share:.3g} %, error {error:.3g}</text>'
        )
        about += f" This choice: {100 * share:.3g} %, error {error:.4g}."
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{_escape(about)}">'
        f"<title>{_escape(about)}</title>{''.join(parts)}</svg>"
    )


def _grid(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="var(--line)"/>'
