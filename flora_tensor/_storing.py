"""The second pass of an extraction: every change decomposed at its ranks, written, and its error measured."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from flora_tensor._arrays import to_numpy
from flora_tensor._deltas import frobenius_norm, on_device, read_delta
from flora_tensor._errors import InputError
from flora_tensor._files import check_free_space
from flora_tensor._safetensors import SafetensorsWriter, encode, round_to
from flora_tensor._settings import Settings
from flora_tensor._survey import Weight, rank_zero_row
from flora_tensor._typing import Array
from flora_tensor.adapter_file import (
    CONFIG_NAME,
    METADATA,
    MODEL_NAME,
    config_of,
    fitting_core,
    tensor_key,
    whole_key,
    write_config,
)
from flora_tensor.checkpoint import Checkpoint
from flora_tensor.decomposition import tucker
from flora_tensor.report import TensorRow
from flora_tensor.tucker_tensor import TuckerTensor

__all__ = ["write_adapter"]


def write_adapter(
    base: Checkpoint,
    tuned: Checkpoint,
    directory: Path,
    rows: Mapping[str, TensorRow],
    weights: Mapping[str, Weight],
    settings: Settings,
) -> dict[str, TensorRow]:
    """Decompose and write everything that is to be stored: the second pass."""
    stored = {name: weight for name, weight in weights.items() if any(weight.ranks)}
    whole = [name for name, row in rows.items() if row.status == "whole"]
    layout = list(_layout(tuned, stored, whole, settings.dtype))
    check_free_space("extract", directory, sum(_n_bytes(dtype, shape) for _, dtype, shape in layout))
    result = {name: rank_zero_row(weight) for name, weight in weights.items() if name not in stored}
    scales: dict[str, float] = {}
    with SafetensorsWriter(directory / MODEL_NAME, layout, METADATA) as writer:
        for done, (name, weight) in enumerate(stored.items()):
            settings.progress("decomposing", done, len(stored), name)
            delta = read_delta(base, tuned, name)
            if delta is None:
                raise InputError(f"{tuned.path}: changed while it was being read; run again when nobody writes to it")
            scales[name], result[name] = _decompose(writer, weight, delta, settings)
        for name in whole:
            writer.write(whole_key(name), tuned.read_raw(name))
        writer.finish()
    config = config_of(
        ranks={name: weight.ranks for name, weight in stored.items()},
        scales=scales,
        arrangements={name: weight.arrangement for name, weight in stored.items() if weight.arrangement},
        shapes={name: weight.row.shape for name, weight in stored.items()},
        whole=whole,
        extra={"base_model_name_or_path": str(base.path), "base_fingerprint": base.fingerprint()},
    )
    write_config(directory / CONFIG_NAME, config)
    return result


def _layout(
    tuned: Checkpoint, stored: Mapping[str, Weight], whole: Sequence[str], dtype: str
) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    for name, weight in stored.items():
        yield tensor_key(name, "core"), dtype, weight.ranks
        for mode, (size, rank) in enumerate(zip(weight.arranged_shape, weight.ranks)):
            if rank < size:  # a mode of full rank is left whole
                yield tensor_key(name, f"factor_{mode}"), dtype, (size, rank)
    for name in whole:
        yield whole_key(name), tuned.info(name).dtype, tuned.info(name).shape


def _n_bytes(dtype: str, shape: Sequence[int]) -> int:
    return math.prod(shape) * {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}.get(dtype, 8)


def _decompose(
    writer: SafetensorsWriter, weight: Weight, delta: np.ndarray, settings: Settings
) -> tuple[float, TensorRow]:
    """Decompose one change at its ranks, write it, and measure the error of the stored bits."""
    assert weight.arrangement is not None
    name, dtype = weight.row.name, settings.dtype
    arranged = weight.arrangement.arrange(delta)
    fitted = _fit(on_device(arranged, settings.device), weight, settings).map(to_numpy)
    core, exponent = fitting_core("extract", name, fitted.core, dtype)
    scale = math.ldexp(1.0, exponent)
    factors = [(f"factor_{k}", u) for k, u in enumerate(fitted.factors) if u is not None]
    for part, array in [("core", core), *factors]:
        writer.write(tensor_key(name, part), encode(to_numpy(array), dtype))
    stored = TuckerTensor(core, fitted.factors).map(lambda array: round_to(array, dtype).astype(np.float64))
    # What `load_adapter` gives and `merge_checkpoint` adds, in float64: the difference is the error and nothing else.
    difference = np.ldexp(stored.to_tensor(), exponent)
    difference -= arranged
    norm = weight.row.delta_norm or 0.0
    row = replace(
        weight.row,
        arrangement=weight.arrangement.pattern,
        ranks=weight.ranks,
        n_parameters=stored.n_parameters,
        relative_error=frobenius_norm(difference) / norm,
    )
    return scale, row


def _fit(arranged: Array, weight: Weight, settings: Settings) -> TuckerTensor:
    """Decompose at the chosen ranks; under a tolerance at least as well as the spectrum promised."""
    ranks = tuple(None if rank == size else rank for rank, size in zip(weight.ranks, arranged.shape))
    if not any(ranks):  # all modes whole: the change itself
        return TuckerTensor(arranged, (None,) * len(ranks))
    fit = tucker(arranged, ranks)
    if (
        "rtol" in settings.budget
        and weight.predicted is not None
        and fit.relative_error > weight.predicted * (1 + 1e-6)
    ):
        # The promise is the truncated HOSVD's; fast ways come within a hair, and that hair counts for a tolerance.
        fit = min(fit, tucker(arranged, ranks, method="hosvd"), key=lambda f: f.relative_error)
    return fit.tucker
