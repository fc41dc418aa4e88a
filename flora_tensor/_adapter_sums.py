"""The exact sum of adapters, before it is stored: each weight's Tucker tensors combined, stacks as they are shared."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from flora_tensor._arrays import to_numpy
from flora_tensor._combining import Combination, Term, combine
from flora_tensor._errors import InputError
from flora_tensor._safetensors import FLOATS, dtype_code
from flora_tensor._whole import widest_code
from flora_tensor.adapter import Adapter
from flora_tensor.tucker_tensor import TuckerTensor

__all__ = ["Sum", "apart_or_joined", "wide"]

# Entries of a config that describe tensors of the adapter it came with, and no longer hold for a new one.
_OF_TENSORS = ("start_pattern", "adapter_dtypes", "dropout_pattern", "scale", "target_modules", "stacks")


@dataclass(frozen=True)
class Sum:
    """An exact result before it is stored: Σ scale · tensor, in float64."""

    tensors: Mapping[str, Combination]
    before: Mapping[str, int]
    shapes: Mapping[str, tuple[int, ...]]
    scales: Mapping[str, float]
    codes: Mapping[str, str]
    whole: Mapping[str, Any]
    whole_codes: Mapping[str, str]
    config: Mapping[str, Any]

    @classmethod
    def of(cls, source: Adapter) -> "Sum":
        """Take one adapter as it is."""
        return cls(
            tensors={name: Combination(wide(tensor), source.arrangements[name]) for name, tensor in source.items()},
            before={name: tensor.n_parameters for name, tensor in source.items()},
            shapes=source.shapes,
            scales=source.scales,
            codes={name: _code(source, name) for name in source},
            whole=source.whole,
            whole_codes={name: code for name, code in source.dtypes.items() if name in source.whole},
            config=_common_config([source]),
        )

    @classmethod
    def of_terms(
        cls,
        where: str,
        sources: Sequence[Adapter],
        numbers: Sequence[float],
        whole: Mapping[str, Any],
        whole_codes: Mapping[str, str],
    ) -> "Sum":
        """Form Σ w_k · adapter_k; what becomes of tensors that are stored whole is known already."""
        owners: dict[str, list[tuple[float, Adapter]]] = {}
        for number, source in zip(numbers, sources):
            for name in source:
                owners.setdefault(name, []).append((number, source))
        tensors: dict[str, Combination] = {}
        scales: dict[str, float] = {}
        for name, terms in owners.items():
            total, scales[name] = _combined(where, name, terms)
            if total is not None:
                tensors[name] = total
        if not tensors and not whole:
            raise ValueError(f"{where}: the result is zero: no change is left to store")
        having = {name: [source for _, source in owners[name]] for name in tensors}
        return cls(
            tensors=tensors,
            before={name: sum(source[name].n_parameters for source in several) for name, several in having.items()},
            shapes={name: several[0].shapes[name] for name, several in having.items()},
            scales=scales,
            codes={name: widest_code([_code(source, name) for source in several]) for name, several in having.items()},
            whole=whole,
            whole_codes=whole_codes,
            config=_common_config(sources),
        )


def apart_or_joined(sources: Sequence[Adapter]) -> tuple[list[Adapter], dict[str, tuple[str, ...]]]:
    """Take stacks for single weights where all that change their members have them, and take the others apart."""
    stacks: dict[str, tuple[str, ...]] = {}
    for source in sources:
        for name, stack in source.stacks.items():
            alike = (s.stacks[name].members == stack.members for s in sources if name in s.stacks)
            apart = (any(m in s.tensors for m in stack.members) for s in sources if name not in s.stacks)
            if all(alike) and not any(apart):
                stacks[name] = stack.members
    kept = [replace(s, stacks={n: stack for n, stack in s.stacks.items() if n in stacks}) for s in sources]
    return [source.joined() for source in kept], stacks


def _combined(where: str, name: str, owners: Sequence[tuple[float, Adapter]]) -> tuple[Combination | None, float]:
    """Return Σ w_k s_k T_k / s for one weight, ``None`` where it is zero, and s."""
    shapes = list(dict.fromkeys(source.shapes[name] for _, source in owners))
    if len(shapes) > 1:
        raise InputError(f"{where}: {name!r} has shapes {shapes}; pass adapters of one model")
    factors = [w * source.scales[name] for w, source in owners]
    # Where all have one size it becomes the scale, and the cores keep their bits.
    scale = abs(factors[0]) if factors[0] and len({abs(f) for f in factors}) == 1 else 1.0
    terms = [
        Term(factor / scale, wide(source[name]), source.arrangements[name])
        for factor, (_, source) in zip(factors, owners)
        if factor
    ]
    total = combine(terms, shapes[0]) if terms else None
    return (total if total is not None and bool(np.any(total.tensor.core)) else None), scale


def _code(adapter: Adapter, name: str) -> str:
    """Return the type to store a result in: that of the weight's core and factors, but no 8-bit float."""
    code = adapter.dtypes.get(name) or dtype_code(adapter[name].core.dtype)
    if code not in FLOATS:
        return "F64"
    return "F32" if code.startswith("F8") else code


def _common_config(sources: Sequence[Adapter]) -> dict[str, Any]:
    """Keep what all configs agree on and what still holds."""
    first = sources[0].config
    agreed = {k: v for k, v in first.items() if all(k in s.config and s.config[k] == v for s in sources)}
    return {key: value for key, value in agreed.items() if key not in _OF_TENSORS}


def wide(tensor: TuckerTensor) -> TuckerTensor:
    """Return a tensor in NumPy arrays of float64."""
    return tensor.map(lambda array: to_numpy(array).astype(np.float64, copy=False))
