"""Tensors that adapters store whole, by their new values: what linear combinations of adapters make of them."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from flora_tensor._arrays import to_numpy
from flora_tensor._base_notes import check_verify_base
from flora_tensor._errors import InputError
from flora_tensor._safetensors import dtype_code
from flora_tensor._typing import PathLike
from flora_tensor._warnings import warn_user
from flora_tensor.adapter import Adapter
from flora_tensor.checkpoint import open_checkpoint

__all__ = ["BaseLike", "WholeTensors", "widest_code"]

BaseLike: TypeAlias = PathLike | Mapping[str, Any]


def widest_code(codes: Sequence[str]) -> str:
    """Return the type that holds every value of the types given."""
    if len(set(codes)) == 1:
        return codes[0]
    return "F64" if "F64" in codes else "F32"  # neither 16-bit type holds the other's values


@dataclass(frozen=True)
class WholeTensors:
    """Tensors that adapters store whole, with their new values: b + Σ w_k (b_k − b), integers rounded."""

    where: str
    sources: Sequence[Adapter]
    numbers: Sequence[float]
    base: BaseLike | None
    verify_base: str

    def values(self) -> dict[str, Any]:
        """Return the new values; a tensor that does not change is left out."""
        self._check_mixed()
        read = self._reader()
        result: dict[str, Any] = {}
        for name in dict.fromkeys(name for source in self.sources for name in source.whole):
            owners = [(w, source.whole[name]) for w, source in zip(self.numbers, self.sources) if name in source.whole]
            shapes = {tuple(value.shape) for _, value in owners}
            if len(shapes) > 1:
                raise InputError(f"{self.where}: {name!r} has shapes {sorted(shapes)}; pass adapters of one model")
            value = self._value(name, owners, read)
            if value is not None:
                result[name] = value
        return result

    def _value(self, name: str, owners: Sequence[tuple[float, Any]], read: Any) -> Any:
        share = math.fsum(w for w, _ in owners)
        arrays = [to_numpy(value) for _, value in owners]
        same = all(np.array_equal(array, arrays[0]) for array in arrays[1:])
        if share == 0 and (same or not any(w for w, _ in owners)):
            return None
        if share == 1 and same:
            return owners[0][1]
        if not all(a.dtype.kind in "fiu" for a in arrays):
            raise InputError(
                f"{self.where}: {name!r} holds {arrays[0].dtype} values, which cannot be weighted; "
                "extract the adapters without it (exclude, --exclude)"
            )
        wide = [array.astype(np.float64) for array in arrays]
        total = sum((w * array for (w, _), array in zip(owners, wide)), np.zeros(wide[0].shape))
        if abs(share - 1) > 1e-12 * max(1.0, sum(abs(w) for w, _ in owners)):
            if read is None:
                raise ValueError(
                    f"{self.where}: {name!r} is stored whole, by its new value, and the weights of the adapters that "
                    f"have it add up to {share:g}; pass base (--base), the checkpoint they change"
                )
            total = total + (1 - share) * np.asarray(read(name, wide[0].shape), dtype=np.float64)
        dtype = np.result_type(*arrays)
        return total.astype(dtype) if dtype.kind == "f" else self._rounded(name, total, dtype)

    def _rounded(self, name: str, total: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
        """Round to whole numbers, such as the counters of batch norms are."""
        total, limits = np.rint(total), np.iinfo(dtype)
        if not np.all((total >= limits.min) & (total <= limits.max) & (np.abs(total) <= 2.0**53)):
            raise InputError(f"{self.where}: {name!r} would leave the range of {dtype}; pass other weights")
        return total.astype(dtype)

    def codes(self, values: Mapping[str, Any]) -> dict[str, str]:
        """Return the types that the new values are stored in."""
        found: dict[str, str] = {}
        for name in values:
            owners = [source for source in self.sources if name in source.whole]
            given = [s.dtypes.get(name) or dtype_code(s.whole[name].dtype) for s in owners]
            integer = np.dtype(to_numpy(values[name]).dtype).kind in "biu"
            wide = dtype_code(values[name].dtype) if integer else widest_code(given)
            found[name] = given[0] if len(set(given)) == 1 else wide
        return found

    def _check_mixed(self) -> None:
        for source in self.sources:
            for other in self.sources:
                if both := sorted(set(source.whole) & set(other.tensors)):
                    raise InputError(
                        f"{self.where}: {both[0]!r} is stored whole in one adapter and as a Tucker tensor in another; "
                        "extract both in the same way"
                    )

    def _reader(self) -> Any:
        """Compare the bases, and return how to read a tensor of the one that was passed."""
        check_verify_base(self.where, self.verify_base)
        recorded = {s.config.get("base_fingerprint") for s in self.sources} - {None}
        if isinstance(self.base, str | os.PathLike):
            checkpoint = open_checkpoint(self.base)
            self._check_base({*recorded, checkpoint.fingerprint()} if recorded else set())

            def read(name: str, shape: tuple[int, ...]) -> np.ndarray:
                if name not in checkpoint or checkpoint.info(name).shape != shape:
                    raise InputError(f"{self.where}: {checkpoint.path} has no {name!r} of shape {shape}; pass the base")
                return checkpoint.read(name)

            return read
        self._check_base(recorded)
        if self.base is None:
            return None
        table = self.base

        def look_up(name: str, shape: tuple[int, ...]) -> np.ndarray:
            if name not in table or tuple(table[name].shape) != shape:
                raise InputError(f"{self.where}: base has no {name!r} of shape {shape}; pass the base's state dict")
            return to_numpy(table[name])

        return look_up

    def _check_base(self, fingerprints: set[Any]) -> None:
        if self.verify_base == "ignore" or len(fingerprints) < 2:
            return
        message = f"{self.where}: the adapters were made for different base models: their fingerprints differ"
        if self.verify_base == "error":
            raise InputError(f"{message}; pass adapters of one base, or verify_base='warn' (--verify-base warn)")
        warn_user(f"{message}; their changes are combined all the same")
