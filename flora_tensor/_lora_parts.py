"""The tensors of LoRA, LoCon, LoHa, LoKr and the official FLoRA as Tucker tensors, and back: exactly, without SVD.

A low-rank matrix B·A is a Tucker tensor whose second mode is left whole: core A, one factor B. So LoRA keeps its bits
and its number of parameters. A Hadamard product of Tucker tensors has Khatri-Rao products of their factors, and a
Kronecker product is an outer product of rearranged axes.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from flora_tensor._errors import InputError
from flora_tensor.algebra import multi_mode_dot, unfold
from flora_tensor.arrangement import Arrangement
from flora_tensor.tucker_tensor import TuckerTensor

__all__ = ["Converted", "LowRank", "from_official", "from_parts", "low_rank_of"]

Parts = Mapping[str, np.ndarray]


class Converted(NamedTuple):
    """A change as a Tucker tensor of the arranged weight."""

    tensor: TuckerTensor
    arrangement: Arrangement
    shape: tuple[int, ...]
    rank: int | None  # what alpha is divided by; None where there is no alpha
    is_copied: bool = True  # no arithmetic but the choice of places: any storage type holds it

    def rows(self, name: str, index: np.ndarray) -> "Converted":
        """Return the change of some rows of the weight, for the weight ``name`` that they are."""
        if not self.arrangement.is_native:
            raise InputError(
                f"{name}: part of a LoKr's weight, which is no LoKr; pass the base as the code that it was trained with"
            )
        core, (first, *others) = self.tensor
        core, first = (core[index], None) if first is None else (core, first[index])
        return self._replace(tensor=TuckerTensor(core, (first, *others)), shape=(len(index), *self.shape[1:]))


class LowRank(NamedTuple):
    """ΔW = up · down with up (out, r) and down (r, in, *kernel)."""

    up: np.ndarray
    down: np.ndarray


def from_parts(name: str, parts: Parts, shape: tuple[int, ...] | None) -> Converted:
    """Convert the tensors of one module, by the names that LyCORIS gives them; ``shape`` is the weight's, if known."""
    if "dora_scale" in parts:
        raise InputError(
            f"{name}: weight-decomposed (DoRA): its change depends on the base weight; merge and extract it"
        )
    if "diff_b" in parts:
        raise InputError(
            f"{name}: has diff_b, a change of the bias, of which only the base tells the new value; merge and extract"
        )
    given = set(parts) - {"alpha", "scalar"}
    for needed, optional, build in _BUILDERS:
        if needed <= given <= needed | optional:
            return build(name, parts, shape)
    listed = ", ".join(sorted(given)) or "nothing"
    raise InputError(f"{name}: has {listed}, which is no LoRA, LoCon, LoHa, LoKr or full change; leave this module out")


def _lora(name: str, parts: Parts, shape: tuple[int, ...] | None) -> Converted:
    up, down = parts["lora_up.weight"], parts["lora_down.weight"]
    rank = down.shape[0]
    if "lora_mid.weight" in parts:
        mid = parts["lora_mid.weight"]
        found = (up.shape[0], down.shape[1], *mid.shape[2:])
        _check(name, parts, mid.shape[:2] == (rank, rank) and up.size == up.shape[0] * rank)
        factors = (_matrix(up), np.ascontiguousarray(_matrix(down).T), *(None for _ in mid.shape[2:]))
        return _fitting(name, Converted(TuckerTensor(mid, factors), Arrangement.native(mid.ndim), found, rank), shape)
    _check(name, parts, up.ndim >= 2 and down.ndim >= 2 and up.size == up.shape[0] * rank)
    found = shape if shape is not None else (up.shape[0], *down.shape[1:])
    _check_size(name, down.size, rank * math.prod(found[1:]), found)
    core = down.reshape(rank, *found[1:])
    tensor = TuckerTensor(core, (_matrix(up), *(None for _ in found[1:])))
    return _fitting(name, Converted(tensor, Arrangement.native(core.ndim), found, rank), shape)


def _loha(name: str, parts: Parts, shape: tuple[int, ...] | None) -> Converted:
    a1, b1, a2, b2 = (parts[f"hada_w{k}_{side}"].astype(np.float64) for k in (1, 2) for side in "ab")
    rank = b1.shape[0]
    if "hada_t1" in parts:
        t1, t2 = parts["hada_t1"].astype(np.float64), parts["hada_t2"].astype(np.float64)
        _check(name, parts, t1.shape == t2.shape and t1.shape[:2] == (rank, rank))
        found = (a1.shape[1], b1.shape[1], *t1.shape[2:])
        # (t1 × a1 × b1) ∘ (t2 × a2 × b2): kernel axes are multiplied entry by entry, the others get all pairs.
        core = np.einsum("ij...,kl...->ikjl...", t1, t2).reshape(rank**2, rank**2, *t1.shape[2:])
        factors = [_pairs(a1.T, a2.T), _pairs(b1.T, b2.T), *(None for _ in t1.shape[2:])]
        tensor = TuckerTensor(core, tuple(factors))
    else:
        _check(name, parts, a1.shape == a2.shape and b1.shape == b2.shape and a1.shape[1] == rank)
        found = shape if shape is not None else (a1.shape[0], b1.shape[1])
        _check_size(name, b1.size, rank * math.prod(found[1:]), found)
        core = _pairs(b1.T, b2.T).T.reshape(rank**2, *found[1:])
        tensor = TuckerTensor(core, (_pairs(a1, a2), *(None for _ in found[1:])))
    result = Converted(_least(tensor), Arrangement.native(len(found)), found, rank, is_copied=False)
    return _fitting(name, result, shape)


def _lokr(name: str, parts: Parts, shape: tuple[int, ...] | None) -> Converted:
    """W1 ⊗ W2 has rank one between the axes of W1 and those of W2."""
    ranks = [parts[key].shape[0] for key in ("lokr_w1_b", "lokr_w2_b") if key in parts]
    w1 = parts["lokr_w1"] if "lokr_w1" in parts else parts["lokr_w1_a"].astype(np.float64) @ parts["lokr_w1_b"]
    first = w1.reshape(-1, 1)
    a, c = w1.shape
    copied = "lokr_w1" in parts
    if "lokr_w2" in parts:
        w2 = parts["lokr_w2"]
        found = shape if shape is not None else (a * w2.shape[0], c * w2.shape[1], *w2.shape[2:])
        _check_size(name, w1.size * w2.size, math.prod(found), found)
        factors, core = (first, None), w2.reshape(1, -1)
        arrangement = _kronecker(len(found), a, c, "(b d{k})")
    elif "lokr_t2" in parts:
        mid, left, right = parts["lokr_t2"], parts["lokr_w2_a"], parts["lokr_w2_b"]
        found = (a * left.shape[1], c * right.shape[1], *mid.shape[2:])
        core, kernel = mid[None], (None for _ in mid.shape[2:])
        factors = (first, np.ascontiguousarray(left.T), np.ascontiguousarray(right.T), *kernel)
        arrangement = _kronecker(len(found), a, c, "b d{k}")
    else:
        left, right = parts["lokr_w2_a"], parts["lokr_w2_b"]
        found = shape if shape is not None else (a * left.shape[0], c * right.shape[1])
        _check_size(name, left.shape[0] * right[0].size * w1.size, math.prod(found), found)
        core, factors = right.reshape(1, right.shape[0], -1), (first, left, None)
        arrangement = _kronecker(len(found), a, c, "b (d{k})")
    tensor = TuckerTensor(core, factors)
    return _fitting(name, Converted(tensor, arrangement, found, ranks[-1] if ranks else None, copied), shape)


def _kronecker(ndim: int, a: int, c: int, rest: str) -> Arrangement:
    kernel = " ".join(("h", "w", "t")[: ndim - 2] if ndim != 3 else ("w",))
    spaced = f" {kernel}" if kernel else ""
    right = rest.replace("{k}", spaced).replace("(d)", "d")
    return Arrangement(f"(a b) (c d){spaced} -> (a c) {right}", {"a": a, "c": c})


def _full(name: str, parts: Parts, shape: tuple[int, ...] | None) -> Converted:
    diff = parts["diff"]
    if diff.ndim < 2:
        raise InputError(f"{name}: diff has shape {diff.shape}; a change needs two axes or more")
    tensor = TuckerTensor(diff, (None,) * diff.ndim)
    return _fitting(name, Converted(tensor, Arrangement.native(diff.ndim), diff.shape, None), shape)


_Builder = Callable[[str, Parts, tuple[int, ...] | None], Converted]
_BUILDERS: tuple[tuple[set[str], set[str], _Builder], ...] = (
    ({"lora_up.weight", "lora_down.weight"}, {"lora_mid.weight"}, _lora),
    ({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}, set(), _loha),
    ({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"}, set(), _loha),
    ({"lokr_w1", "lokr_w2"}, set(), _lokr),
    ({"lokr_w1_a", "lokr_w1_b", "lokr_w2"}, set(), _lokr),
    ({"lokr_w1", "lokr_w2_a", "lokr_w2_b"}, {"lokr_t2"}, _lokr),
    ({"lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b"}, {"lokr_t2"}, _lokr),
    ({"diff"}, set(), _full),
)


def from_official(name: str, parts: Mapping[str, np.ndarray]) -> Converted:
    """Convert ``param_G``, ``param_0``, …: the official code's modes are (in, out, *kernel)."""
    core = parts["param_G"]
    wanted = {"param_G", *(f"param_{k}" for k in range(core.ndim))}
    if set(parts) != wanted or core.ndim < 2:
        raise InputError(
            f"{name}: has {', '.join(sorted(parts))}, but a core of shape {core.shape}; the file is damaged"
        )
    order = (1, 0, *range(2, core.ndim))
    try:
        tensor = TuckerTensor(core.transpose(order).copy(), tuple(parts[f"param_{k}"] for k in order))
    except ValueError as error:
        raise InputError(f"{name}: {error}") from None
    return Converted(tensor, Arrangement.native(core.ndim), tensor.shape, None)


def low_rank_of(tensor: TuckerTensor, arrangement: Arrangement, shape: tuple[int, ...]) -> LowRank:
    """Write a change as up · down, of the least rank that is exact without an SVD.

    The first mode's rank, or the product of the other ranks where that is smaller.
    """
    whole = [u is None for u in tensor.factors]
    if not arrangement.is_native and arrangement != Arrangement(f"o ({' '.join(_axes(len(shape))[1:])})"):
        tensor = TuckerTensor(arrangement.restore(tensor.to_tensor(), shape), (None,) * len(shape))
        whole = [True] * len(shape)
    first, others = tensor.factors[0], math.prod(tensor.ranks[1:])
    if not whole[0] and tensor.ranks[0] <= others:
        down = multi_mode_dot(tensor.core, [None, *tensor.factors[1:]])
        return LowRank(np.asarray(first), down.reshape(tensor.ranks[0], *shape[1:]))
    if others < shape[0]:
        # The unfolded core joins the first factor; the rest are the rows of a Kronecker product of the other factors.
        flat = unfold(tensor.core, 0)
        up = flat if first is None else first @ flat
        rows = np.eye(others).reshape(others, *tensor.ranks[1:])
        return LowRank(up, multi_mode_dot(rows, [None, *tensor.factors[1:]]).reshape(others, *shape[1:]))
    return LowRank(np.eye(shape[0], dtype=tensor.core.dtype), tensor.to_tensor().reshape(shape))


def _axes(ndim: int) -> list[str]:
    return Arrangement.native(ndim).pattern.split()


def _pairs(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the row-wise Kronecker product: (n, r), (n, s) → (n, r·s)."""
    return np.einsum("nr,ns->nrs", a, b).reshape(a.shape[0], -1)


def _least(tensor: TuckerTensor) -> TuckerTensor:
    """Return the dense tensor where it stores less."""
    if tensor.n_parameters <= math.prod(tensor.shape):
        return tensor
    return TuckerTensor(tensor.to_tensor(), (None,) * tensor.ndim)


def _matrix(x: np.ndarray) -> np.ndarray:
    return x.reshape(x.shape[0], -1)


def _check(name: str, parts: Parts, holds: bool) -> None:
    if not holds:
        shapes = ", ".join(f"{key} {array.shape}" for key, array in sorted(parts.items()))
        raise InputError(f"{name}: the tensors do not fit each other: {shapes}; the file is damaged")


def _check_size(name: str, has: int, needs: int, shape: Sequence[int]) -> None:
    if has != needs:
        raise InputError(
            f"{name}: its tensors do not make a weight of shape {tuple(shape)}; pass the base they are for"
        )


def _fitting(name: str, converted: Converted, shape: tuple[int, ...] | None) -> Converted:
    """Return a conversion as it is, proved to be for a weight of this shape."""
    found = converted.shape
    if shape is None or found == shape:
        try:
            made = converted.arrangement.shape(found)
        except ValueError as error:
            raise InputError(f"{name}: {error}") from None
        if made != converted.tensor.shape:
            raise InputError(f"{name}: its tensors do not make a weight of shape {found}; pass the base they are for")
        return converted
    raise InputError(f"{name}: changes a weight of shape {found}, but the base has {shape}; pass the base it is for")
