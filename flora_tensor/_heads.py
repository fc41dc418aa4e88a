"""Attention heads as a mode: which weights of a transformer have an axis of heads, and how many there are.

The numbers stand in the `config.json` that transformers writes beside a checkpoint. An arrangement is only a candidate
that the budget may choose or not, so that a name which fits by chance does no harm: any split of an axis is exact.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flora_tensor._errors import InputError
from flora_tensor._files import read_json
from flora_tensor._warnings import warn_user
from flora_tensor.arrangement import Arrangement

__all__ = ["Heads", "heads_beside", "with_heads"]

# The last words of a weight's name, in the families that transformers knows. The rows of these are (heads d) …
_INTO_HEADS = re.compile(
    r"(^|\.)((to_)?(q|k|v)|(q|k|v|query|key|value)(_proj|_lin|_a_proj|_b_proj)?|w(q|k|v))\.weight$", re.IGNORECASE
)
# … those of these hold queries, keys and values above one another …
_FUSED = re.compile(r"(^|\.)(in_proj_weight|(qkv|qkv_proj|wqkv|in_proj|query_key_value)\.weight)$", re.IGNORECASE)
# … and the columns of these are (heads d).
_OUT_OF_HEADS = re.compile(
    r"(^|\.)((o|out)(_proj|_lin)?|to_out(\.0)?|w?o|(self_)?attention\.(output\.)?dense|attn\.proj)\.weight$",
    re.IGNORECASE,
)
_COUNTS = (
    "num_attention_heads",
    "num_heads",
    "n_head",
    "n_heads",
    "encoder_attention_heads",
    "decoder_attention_heads",
)
_WIDTHS = ("hidden_size", "d_model", "n_embd", "dim")


@dataclass(frozen=True)
class Heads:
    """How many heads an attention has.

    Parameters
    ----------
    query : int
        The heads of the queries, and of what goes into the output projection.
    key_value : int
        Those of keys and values; fewer with grouped queries.
    size : int or None
        The features of a head, where that is known: a weight that does not fit it has no heads.
    """

    query: int
    key_value: int
    size: int | None = None

    def arrangements(self, name: str, shape: tuple[int, ...]) -> Iterator[Arrangement]:
        """Give the arrangements with the heads as a mode for the weight of this name: one, or none."""
        if len(shape) != 2:
            return
        if _INTO_HEADS.search(name):
            for heads in dict.fromkeys((self.query, self.key_value)):
                if self._fits(shape[0], heads):
                    yield Arrangement("(heads d) i -> heads d i", {"heads": heads})
                    return
        elif _FUSED.search(name) and shape[0] % 3 == 0 and self._fits(shape[0] // 3, self.query):
            yield Arrangement("(qkv heads d) i -> qkv heads d i", {"qkv": 3, "heads": self.query})
        elif _OUT_OF_HEADS.search(name) and self._fits(shape[1], self.query):
            yield Arrangement("o (heads d) -> o heads d", {"heads": self.query})

    def _fits(self, size: int, heads: int) -> bool:
        # One head alone, or heads of one feature, are no further axis.
        if heads < 2 or size % heads or size == heads:
            return False
        return self.size is None or size == heads * self.size


def with_heads(found: Iterable[Heads], name: str, shape: tuple[int, ...]) -> tuple[Arrangement, ...]:
    """Return all arrangements that are tried for a weight: those of its shape, and those with its heads as a mode."""
    own = (arrangement for heads in found for arrangement in heads.arrangements(name, shape))
    return tuple(dict.fromkeys((*Arrangement.candidates(len(shape)), *own)))


def heads_beside(checkpoint: Path) -> tuple[Heads, ...]:
    """Read the numbers of heads from the `config.json` beside a checkpoint; empty where it has none to tell.

    A model of several towers (text, vision) has a table for each; all of them are given.

    Warns
    -----
    FloraWarning
        If the file is there but cannot be read.
    """
    path = (checkpoint if checkpoint.is_dir() else checkpoint.parent) / "config.json"
    if not path.is_file():
        return ()
    try:
        config = read_json(path)
    except (InputError, OSError) as error:
        warn_user(f"extract: no heads are taken from a damaged file: {error}; pass heads=N (--heads N)")
        return ()
    tables = [config, *(table for key, table in config.items() if key.endswith("_config"))]
    found = (_heads_of(table) for table in tables if isinstance(table, dict))
    return tuple(dict.fromkeys(heads for heads in found if heads is not None))


def _heads_of(config: Mapping[str, Any]) -> Heads | None:
    count = _first(config, _COUNTS)
    if count is None:
        return None
    size = _first(config, ("head_dim", "d_kv", "attention_head_size"))
    width = _first(config, _WIDTHS)
    if size is None and width is not None and width % count == 0:
        size = width // count
    return Heads(count, _first(config, ("num_key_value_heads", "num_kv_heads", "n_kv_heads")) or count, size)


def _first(config: Mapping[str, Any], keys: tuple[str, ...]) -> int | None:
    """Return the first of these entries that is a positive integer."""
    return next((config[key] for key in keys if type(config.get(key)) is int and config[key] > 0), None)
