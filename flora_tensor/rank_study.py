"""What ranks a fine-tuning needs: the spectra of every weight's change, and what each budget would buy."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from flora_tensor._checks import check_fraction, prefix_between, some_names
from flora_tensor._deltas import check_memory, read_delta
from flora_tensor._errors import InputError
from flora_tensor._heads import with_heads
from flora_tensor._layer_grid import natural_key
from flora_tensor._progress import Progress, silent
from flora_tensor._reporting import Report
from flora_tensor._scaled import scale_of, weight_of
from flora_tensor._settings import check_globs, globs, heads_option, matches
from flora_tensor._stacks import find_stacks
from flora_tensor._typing import PathLike
from flora_tensor._version import __version__
from flora_tensor._warnings import warn_user
from flora_tensor.allocation import allocate_with_stacks, budget_curve, grouped_frontiers
from flora_tensor.arrangement import Arrangement
from flora_tensor.checkpoint import Checkpoint, is_float, open_checkpoint
from flora_tensor.report import format_table
from flora_tensor.spectra import Frontier, ModeSpectra, cheapest_spectrum
from flora_tensor.stacking import stacked_arrangement

__all__ = ["BudgetRow", "RankStudy", "study_ranks"]

BUDGETS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)


@dataclass(frozen=True)
class BudgetRow:
    """What one budget buys.

    Attributes
    ----------
    max_ratio : float
        The budget, as a share of the numbers in the dense changes.
    n_parameters : int
        Numbers that would be stored.
    relative_error : float
        The relative error of all changes together, as the spectra promise it.
    lower_bound : float
        What no choice of truncated HOSVDs can beat at this budget.
    n_weights : int
        How many weights would store anything.
    stacks : tuple of str
        The stacks that would be stored as one tensor.
    """

    max_ratio: float
    n_parameters: int
    relative_error: float
    lower_bound: float
    n_weights: int
    stacks: tuple[str, ...] = ()


@dataclass(frozen=True, repr=False)
class RankStudy(Report):
    """Spectra of the changes of all weights; made by `study_ranks`.

    Attributes
    ----------
    spectra : dict of str to ModeSpectra
        The singular values of each changed weight's own modes; of a stack, those of all its members as one tensor,
        whose first mode counts them.
    frontiers : dict of str to list of Frontier
        What each number of parameters buys, for every arrangement that extraction would try.
    budgets : tuple of BudgetRow
        What each budget would give, all weights together.
    curve : tuple of (int, float)
        The same for growing numbers of stored numbers, and the relative error that each gives.
    stacks : dict of str to tuple of str
        The members of each stack that was asked for, as far as they changed; its other entries bear its name.

    References
    ----------
    De Lathauwer, De Moor and Vandewalle (2000), definition 4 and property 10.
    """

    spectra: dict[str, ModeSpectra]
    frontiers: dict[str, list[Frontier]]
    budgets: tuple[BudgetRow, ...]
    curve: tuple[tuple[int, float], ...] = ()
    stacks: dict[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])

    @property
    def weights(self) -> dict[str, ModeSpectra]:
        """The spectra of the weights alone, without those of stacks."""
        return {name: spectra for name, spectra in self.spectra.items() if name not in self.stacks}

    def energy_ranks(self, name: str, energy: float) -> tuple[int, ...]:
        """Return for each mode of a weight how many singular values hold this share of ‖ΔW‖².

        Parameters
        ----------
        name : str
            The weight, or the stack.
        energy : float
            The share, in (0, 1].

        Returns
        -------
        tuple of int
            One count a mode.

        Raises
        ------
        KeyError
            If there is no such weight.
        ValueError
            If the share is out of its range.

        References
        ----------
        De Lathauwer, De Moor and Vandewalle (2000), property 10.
        """
        share = check_fraction("energy_ranks", "energy", energy)
        counts: list[int] = []
        for tail in self.spectra[name].tails():
            total = float(tail[0])
            counts.append(int(np.argmax(tail <= (1 - share) * total * (1 + 1e-12))))
        return tuple(counts)

    def to_dict(self) -> dict[str, Any]:
        """Return the study as plain values, ready for JSON, singular values included."""
        weights = [
            {
                "name": name,
                "shape": list(s.shape),
                "norm": s.norm,
                "ranks_90": list(self.energy_ranks(name, 0.9)),
                "ranks_99": list(self.energy_ranks(name, 0.99)),
                "singular_values": [np.asarray(v, dtype=np.float64).tolist() for v in s.values],
                **({"members": list(self.stacks[name])} if name in self.stacks else {}),
            }
            for name, s in self.spectra.items()
        ]
        return {
            "flora_tensor_version": __version__,
            "weights": weights,
            "budgets": [self._budget(row) for row in self.budgets],
            "curve": list(map(list, self.curve)),
        }

    def to_table(self) -> str:
        """Return the study as two text tables: the weights, and the budgets."""
        weights = [
            [name, "×".join(map(str, s.shape)), f"{s.norm:.4g}", *(self._ranks_text(name, e) for e in (0.9, 0.99))]
            for name, s in sorted(self.spectra.items(), key=lambda item: natural_key(item[0]))
        ]
        budgets = [
            [
                f"{100 * row.max_ratio:g} %",
                f"{row.n_parameters:,}",
                f"{row.n_weights} of {len(self.weights)}",
                f"{row.relative_error:.4g}",
                f"{row.lower_bound:.4g}",
                *([", ".join(row.stacks)] if self.stacks else []),
            ]
            for row in self.budgets
        ]
        first = format_table(["weight", "shape", "‖ΔW‖", "ranks at 90 %", "ranks at 99 %"], weights, "llrrr")
        header = ["budget", "parameters", "weights", "error", "lower bound", *(["as one"] if self.stacks else [])]
        second = format_table(header, budgets, "rrrrr" + "l" * bool(self.stacks))
        return f"{first}\n\n{second}"

    def __repr__(self) -> str:
        return f"RankStudy({len(self.spectra)} spectra, {len(self.budgets)} budgets)"

    def _budget(self, row: BudgetRow) -> dict[str, Any]:
        return {key: value for key, value in vars(row).items() if key != "stacks" or self.stacks}

    def _ranks_text(self, name: str, energy: float) -> str:
        return "×".join(map(str, self.energy_ranks(name, energy)))


def study_ranks(
    base: PathLike,
    tuned: PathLike,
    *,
    budgets: Sequence[float] = BUDGETS,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    stack: str | Sequence[str] | None = None,
    heads: int | Literal["auto"] | None = "auto",
    allow_pickle: bool = False,
    max_memory: int | None = None,
    progress: Progress | None = None,
) -> RankStudy:
    """Compute the spectra of every weight's change, and what each budget would give.

    Parameters
    ----------
    base, tuned : path
        The checkpoints (see `open_checkpoint`).
    budgets : sequence of float
        Shares of the numbers in the dense changes, each in (0, 1].
    include, exclude : str or sequence of str, optional
        Globs of names to look at, and not to.
    stack : str or sequence of str, optional
        Globs of names of weights that `extract` may store as one tensor: their joint spectra are listed too, and a
        budget takes a stack where it is smaller.
    heads : "auto", int or None
        How many heads the attentions have, as for `extract`: arrangements with heads as a mode are tried too.
    allow_pickle : bool, default False
        Whether pickle files are read, with ``weights_only=True``.
    max_memory : int, optional
        How many bytes one tensor's work may take; what the machine has free by default.
    progress : callable, optional
        Called as ``progress(phase, done, total, name)`` before each tensor.

    Returns
    -------
    RankStudy
        Weights of two axes or more that are in both checkpoints, are of one shape there, and differ; without those of
        8 bits that a tensor beside them scales.

    Raises
    ------
    InputError
        If a checkpoint is damaged, a number is not finite, or no weight differs.
    ValueError
        If a budget is out of its range, a pattern of ``include`` or ``exclude`` matches nothing, or a stack's pattern
        does not match two weights or more of one shape.
    ResourceError
        If a tensor would need more memory than there is.

    Warns
    -----
    FloraWarning
        If tensors are in one checkpoint only.

    References
    ----------
    De Lathauwer, De Moor and Vandewalle (2000); the budgets are spread by `allocate_ranks`.

    Examples
    --------
    >>> import tempfile, pathlib
    >>> from safetensors.numpy import save_file
    >>> here = pathlib.Path(tempfile.mkdtemp())
    >>> save_file({"fc.weight": np.zeros((8, 8), np.float32)}, here / "a.safetensors")
    >>> save_file({"fc.weight": np.ones((8, 8), np.float32)}, here / "b.safetensors")
    >>> study = study_ranks(here / "a.safetensors", here / "b.safetensors", budgets=[0.25])
    >>> study.energy_ranks("fc.weight", 0.99), study.budgets[0].n_parameters
    ((1, 1), 16)
    """
    shares = [check_fraction("ranks", "budget", budget) for budget in budgets]
    before, after = open_checkpoint(base, allow_pickle=allow_pickle), open_checkpoint(tuned, allow_pickle=allow_pickle)
    check_globs("ranks", list(dict.fromkeys((*before.names(), *after.names()))), include, exclude)
    names = [name for name in before.names() if _is_pair(before, after, name) and matches(name, include, exclude)]
    _warn_of_missing(before, after, include, exclude)
    stacks = find_stacks("ranks", before, after, names, tuple(dict.fromkeys(globs(stack))))
    found, say = heads_option(heads, before, after), progress or silent
    spectra: dict[str, ModeSpectra] = {}
    frontiers: dict[str, list[Frontier]] = {}
    for done, name in enumerate((*names, *stacks)):
        say("reading", done, len(names) + len(stacks), name)
        sides, of_one, members = (before, after), name, ()
        if name in stacks:
            stacks[name] = members = tuple(member for member in stacks[name] if member in spectra)
            if len(members) < 2:
                continue
            sides, of_one = (before.stacked(name, members), after.stacked(name, members)), members[0]
        check_memory("ranks", *sides, name, max_memory)
        delta = read_delta(*sides, name)
        if delta is not None and np.any(delta):
            own = with_heads(found, of_one, before.info(of_one).shape)
            spectra[name], frontiers[name] = _study(delta, map(stacked_arrangement, own) if members else own)
    before.check_unchanged()
    after.check_unchanged()
    if not spectra:
        scaled = [name for name in before.names() if scale_of(before, name)]
        why = f"; {some_names(scaled)} cannot be compared: convert quantized checkpoints first" if scaled else ""
        raise InputError(f"ranks: no selected weight differs between {before.path} and {after.path}{why}")
    stacks = {name: members for name, members in stacks.items() if name in spectra}
    rows = tuple(_budget_row(frontiers, stacks, share) for share in shares)
    return RankStudy(spectra, frontiers, rows, budget_curve(grouped_frontiers(frontiers, stacks)), stacks)


def _warn_of_missing(base: Checkpoint, tuned: Checkpoint, include: Any, exclude: Any) -> None:
    """Warn of tensors that only one checkpoint has, which `extract` refuses."""
    lost, new = (
        [name for name in one.names() if name not in other and matches(name, include, exclude)]
        for one, other in ((base, tuned), (tuned, base))
    )
    if alone := [*lost, *new]:
        prefix = prefix_between(lost, new)
        why = f"; one side's names begin with {prefix!r}" if prefix else ""
        warn_user(f"ranks: only one checkpoint has {some_names(alone)}; they are left out{why}")


def _is_pair(base: Checkpoint, tuned: Checkpoint, name: str) -> bool:
    if name not in tuned:
        return False
    a, b = base.info(name), tuned.info(name)
    if a.shape != b.shape or len(a.shape) < 2 or math.prod(a.shape) == 0 or not (is_float(a) and is_float(b)):
        return False
    # Scaled weights and their scales: `extract` leaves them out.
    return not any(scale_of(side, name) or weight_of(side, name) for side in (base, tuned))


def _study(delta: np.ndarray, arrangements: Iterable[Arrangement]) -> tuple[ModeSpectra, list[Frontier]]:
    """Return the spectra of a change's own modes, and the frontiers of all its arrangements."""
    native = cheapest_spectrum("ranks", delta)
    rest = (cheapest_spectrum("ranks", a.arrange(delta)) for a in arrangements if not a.is_native)
    # Only values are kept: cores and factors of all weights together are as large as the model.
    spectra = ModeSpectra(tuple(np.array(v) for v in native.values), native.norm, native.shape)
    return spectra, [spectrum.frontier(partial=True, one_whole=True) for spectrum in (native, *rest)]


def _budget_row(
    frontiers: Mapping[str, list[Frontier]], stacks: Mapping[str, tuple[str, ...]], share: float
) -> BudgetRow:
    found = allocate_with_stacks(frontiers, stacks, max_ratio=share)
    stored = [name for name, choice in found.choices.items() if any(choice.ranks)]
    together = tuple(name for name in stored if name in stacks)
    count = len(stored) + sum(len(stacks[name]) - 1 for name in together)
    return BudgetRow(share, found.n_parameters, found.relative_error, found.lower_bound, count, together)
