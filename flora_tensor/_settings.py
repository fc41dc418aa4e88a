"""The options of an extraction, checked, and which tensors and arrangements they mean."""

import difflib
import fnmatch
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from flora_tensor._checks import as_int, check_limit, feasible_ranks
from flora_tensor._heads import Heads, heads_beside, with_heads
from flora_tensor._safetensors import dtype_code
from flora_tensor._weighting import Calibration
from flora_tensor.arrangement import Arrangement
from flora_tensor.checkpoint import Checkpoint

__all__ = [
    "STORED",
    "RanksOption",
    "Settings",
    "arrangement_option",
    "checked_budget",
    "globs",
    "heads_option",
    "matches",
    "noise_option",
    "stack_option",
]

RanksOption: TypeAlias = int | Sequence[int] | Mapping[str, int | Sequence[int]]
# The types that cores and factors are stored in.
STORED = {name: dtype_code(name) for name in ("float64", "float32", "float16", "bfloat16")}
_CRITERIA = "ranks, rtol, max_parameters, max_ratio and max_bytes"
_DEFAULT_RATIO = 0.05


@dataclass(frozen=True)
class Settings:
    """The options of `extract`, checked."""

    budget: dict[str, Any]
    ranks: RanksOption | None
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    arrangement: Arrangement | None
    calibration: Calibration | None
    weights: str
    vectors: str
    on_mismatch: str
    resized: str
    allow_missing: bool
    dtype: str
    device: Any
    max_memory: int | None
    noise_floor: float | Literal["auto"] | None
    dry_run: bool
    heads: tuple[Heads, ...] = ()
    share: float | None = None  # the budget as a share of what the headers list, where it is one
    stack: tuple[str, ...] = ()
    max_shard_size: int | None = None  # how the result is laid out in files: no outcome depends on it

    def limit(self) -> dict[str, Any]:
        """Return the budget as `allocate_ranks` takes it."""
        if "max_bytes" not in self.budget:
            return self.budget
        return {"max_parameters": self.budget["max_bytes"] // (int(self.dtype.strip("BF")) // 8)}

    def options(self) -> dict[str, Any]:
        """Return what shaped the result, for the report."""
        ranks = self.ranks
        if isinstance(ranks, Mapping):
            ranks = {pattern: r if isinstance(r, int) else list(r) for pattern, r in ranks.items()}
        elif ranks is not None and not isinstance(ranks, int):
            ranks = list(ranks)
        return {
            **({"ranks": ranks} if ranks is not None else self.budget),
            "include": list(self.include),
            "exclude": list(self.exclude),
            **({"stack": list(self.stack)} if self.stack else {}),
            "arrangements": self.arrangement.pattern if self.arrangement else "auto",
            **({"heads": [heads.query for heads in self.heads]} if self.heads else {}),
            **({"weights": self.weights} if self.weights != "norm" else {}),
            **(self.calibration.options() if self.calibration else {}),
            "vectors": self.vectors,
            **({"resized": self.resized} if self.resized != "error" else {}),
            "noise_floor": self.noise_floor,
            "dtype": {code: name for name, code in STORED.items()}[self.dtype],
        }

    def of_a_task(self) -> dict[str, Any]:
        """Return those of the options that the outcome for one tensor depends on, beside what was chosen for it."""
        elsewhere = {"include": (), "exclude": (), "stack": (), "vectors": "", **dict.fromkeys(self.budget, 0)}
        return {**self.options(), **elsewhere} | {
            "device": str(self.device),
            "share": self.share,
            "dry_run": self.dry_run,
        }

    @property
    def in_one_pass(self) -> bool:
        """Whether a tensor can be decomposed as soon as it is read: where its ranks are given, not chosen."""
        return self.ranks is not None and not self.dry_run

    def selects(self, name: str) -> bool:
        """Tell whether a tensor is asked for."""
        return matches(name, self.include, self.exclude)

    @property
    def caps_noise(self) -> bool:
        """Whether the rounding noise of the checkpoints bounds the ranks: a tolerance is a promise and is kept."""
        return self.noise_floor == "auto" and self.ranks is None and "rtol" not in self.budget

    def arrangements(self, name: str, shape: tuple[int, ...]) -> tuple[Arrangement, ...]:
        """Return the arrangements to try for a weight of this name and shape."""
        native = Arrangement.native(len(shape))
        if self.arrangement is None and self.ranks is not None:
            return (native,)
        if self.arrangement is None:
            return with_heads(self.heads, name, shape)
        try:
            self.arrangement.shape(shape)
        except ValueError:
            return (native,)
        return (self.arrangement,)

    def ranks_of(self, name: str, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the ranks asked for, and those to store: feasible, and the shape where they truncate nothing."""
        ranks = self.ranks
        if isinstance(ranks, Mapping):
            found = [r for pattern, r in ranks.items() if fnmatch.fnmatchcase(name, pattern)]
            if not found:
                raise ValueError(f"extract: ranks has no pattern for {name!r}; add one, or '*' for all others")
            ranks = found[0]
        asked = [ranks] * len(shape) if isinstance(ranks, int) else list(ranks or ())
        asked = [as_int("extract", "ranks", r) for r in asked]
        if len(asked) != len(shape):
            raise ValueError(
                f"extract: {len(asked)} ranks for {name!r}, which has {len(shape)} modes; pass one integer for all, "
                "or a mapping from name patterns to ranks"
            )
        if min(asked) < 1:
            raise ValueError(f"extract: rank {min(asked)} for {name!r}; pass at least 1")
        feasible = feasible_ranks(asked, shape)
        return tuple(asked), tuple(shape) if feasible == feasible_ranks(shape, shape) else feasible


def checked_budget(budget: Mapping[str, Any], ranks: RanksOption | None) -> dict[str, Any]:
    """Return the one criterion that was given; 5 % of the dense size where none was."""
    given = {name: value for name, value in budget.items() if value is not None}
    if len(given) + (ranks is not None) > 1:
        names = [*given, *(["ranks"] if ranks is not None else [])]
        raise TypeError(f"extract: got {' and '.join(names)}; pass one of {_CRITERIA}")
    for name, value in given.items():
        check_limit("extract", name, value)
    if isinstance(ranks, Mapping):
        return {}
    for rank in ranks if isinstance(ranks, Sequence) else [ranks] if ranks is not None else []:
        if as_int("extract", "ranks", rank) < 1:
            raise ValueError(f"extract: rank {rank}; pass at least 1")
    return given or {"max_ratio": _DEFAULT_RATIO}


def matches(name: str, include: str | Sequence[str] | None, exclude: str | Sequence[str] | None) -> bool:
    """Tell whether a name fits one of the globs ``include``, or there are none, and none of ``exclude``."""
    wanted, unwanted = globs(include), globs(exclude)
    is_wanted = not wanted or any(fnmatch.fnmatchcase(name, pattern) for pattern in wanted)
    return is_wanted and not any(fnmatch.fnmatchcase(name, pattern) for pattern in unwanted)


def globs(given: str | Sequence[str] | None) -> tuple[str, ...]:
    return () if given is None else (given,) if isinstance(given, str) else tuple(given)


def check_globs(
    where: str, names: Sequence[str], include: str | Sequence[str] | None, exclude: str | Sequence[str] | None
) -> None:
    """Refuse globs that no name fits."""
    for option, patterns in (("include", globs(include)), ("exclude", globs(exclude))):
        for pattern in patterns:
            if not fnmatch.filter(names, pattern):
                raise ValueError(f"{where}: {option} pattern {pattern!r} matches no tensor; {_meant(pattern, names)}")


def _meant(pattern: str, names: Sequence[str]) -> str:
    """Say what a pattern that matches nothing was probably to be."""
    part = pattern.strip("*")
    if part and any(part in name for name in names):
        return f"it has to match the whole name: pass {f'*{part}*'!r}"
    return nearest(part, names)


def nearest(part: str, names: Sequence[str]) -> str:
    """Say which names there are, those most like ``part``."""
    return f"there are {', '.join(difflib.get_close_matches(part, names, n=3, cutoff=0.4) or names[:3])}"


def noise_option(given: Any) -> float | Literal["auto"] | None:
    if given is None or given == "auto":
        return given
    try:
        value = float(given)
    except (TypeError, ValueError):
        value = math.nan
    if not 0 <= value < math.inf:
        raise ValueError(f"extract: noise_floor is {given!r}; pass 'auto', None, or a finite number of at least 0")
    return value


def arrangement_option(given: str | Arrangement) -> Arrangement | None:
    if isinstance(given, Arrangement):
        return given
    return None if given == "auto" else Arrangement(given)


def heads_option(given: Any, *checkpoints: Checkpoint) -> tuple[Heads, ...]:
    """Return the numbers of heads: as given, from the first `config.json` beside a checkpoint, or none."""
    if given is None:
        return ()
    if given == "auto":
        return next((found for c in checkpoints if (found := heads_beside(c.path))), ())
    count = as_int("extract", "heads", given)
    if count < 1:
        raise ValueError(f"extract: heads is {count}; pass 'auto', None, or the number of heads")
    return (Heads(count, count),)


def stack_option(given: str | Sequence[str] | None, settings: Settings) -> tuple[str, ...]:
    """Return the patterns of stacks, refused beside options that stacks cannot be weighed under."""
    patterns = tuple(dict.fromkeys(globs(given)))
    if patterns and settings.ranks is not None:
        raise ValueError(
            "extract: stack with ranks: a stack is used where it is smaller at a budget; pass a budget or rtol"
        )
    return patterns
