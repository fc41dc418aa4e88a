"""The second pass of an extraction: every change decomposed at its ranks, written, and its error measured."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import array_api_compat
import numpy as np

from flora_tensor._adapter_config import CONFIG_NAME, config_of, metadata_of, write_config
from flora_tensor._adapter_keys import tensor_key, tensor_parts, whole_key
from flora_tensor._adapter_shards import tensor_writer
from flora_tensor._algorithms import Target
from flora_tensor._arrays import array_namespace, float_squares, to_numpy
from flora_tensor._base_notes import SAMPLES, sample_positions, text_of_samples
from flora_tensor._bases import orthonormal_columns
from flora_tensor._checks import printable
from flora_tensor._deltas import check_stored_finite, frobenius_norm, on_device
from flora_tensor._driver import Method
from flora_tensor._files import check_free_space
from flora_tensor._fits import tucker_of
from flora_tensor._prepared import prepare
from flora_tensor._residual import PLAIN, residual_norm
from flora_tensor._resized import NEW_ROWS, new_rows
from flora_tensor._safetensors import BITS, decode, encode, round_to
from flora_tensor._settings import Settings
from flora_tensor._stack_norms import StackMoments, StackNorm
from flora_tensor._survey import Weight
from flora_tensor._typing import Array
from flora_tensor._weighting import Weighting
from flora_tensor.adapter_file import fitting_core
from flora_tensor.algebra import fold, multi_mode_dot, unfold
from flora_tensor.checkpoint import Checkpoint
from flora_tensor.stacking import member_arrangement
from flora_tensor.tucker_algebra import select_slice
from flora_tensor.tucker_tensor import TuckerTensor

__all__ = ["Part", "Stored", "check_space", "decompose", "write_adapter"]


class Part(NamedTuple):
    """One stored array: its type in the file, its shape, and its bytes, uint8 of shape (n_bytes,)."""

    dtype: str
    shape: tuple[int, ...]
    data: np.ndarray


class Stored(NamedTuple):
    """A decomposed weight, its scale, and a way to its parts, which are read when they are written."""

    weight: Weight
    scale: float
    parts: Callable[[], Mapping[str, Part]]


def check_space(target: Path, tuned: Checkpoint, weights: Iterable[Weight], whole: Sequence[str], dtype: str) -> None:
    """Refuse a run whose result does not fit on the disk beside its copy in the making."""
    layout = _layout(tuned, {w.row.name: w for w in weights}, whole, dtype)
    check_free_space("extract", target, 2 * sum(math.prod(shape) * BITS[code] // 8 for _, code, shape in layout))


def write_adapter(
    base: Checkpoint,
    tuned: Checkpoint,
    directory: Path,
    stored: Mapping[str, Stored],
    whole: Sequence[str],
    settings: Settings,
    resized: Mapping[str, tuple[int, int]],
) -> None:
    """Put the adapter's files together, in the order of the checkpoint, whatever the order of the work was."""
    weights = {name: item.weight for name, item in stored.items()}
    stacks = {name: weight.members for name, weight in weights.items() if weight.members}
    grown = new_rows(tuned, resized)
    rows = [(whole_key(n), tuned.info(n.removesuffix(NEW_ROWS)).dtype, shape) for n, shape in grown.items()]
    layout = [*_layout(tuned, weights, whole, settings.dtype), *rows]
    with tensor_writer(directory, layout, metadata_of(stacks), settings.max_shard_size) as writer:
        for name, item in stored.items():
            for part, content in item.parts().items():
                writer.write(tensor_key(name, part), content.data)
        for name in whole:
            writer.write(whole_key(name), tuned.read_raw(name))
        for name in grown:
            writer.write(whole_key(name), _read_new_rows(tuned, name.removesuffix(NEW_ROWS)))
    config = config_of(
        ranks={name: weight.ranks for name, weight in weights.items()},
        scales={name: item.scale for name, item in stored.items()},
        arrangements={name: weight.arrangement for name, weight in weights.items() if weight.arrangement},
        shapes={name: weight.row.shape for name, weight in weights.items()},
        whole=[*whole, *grown],
        stacks=stacks,
        extra={
            "base_model_name_or_path": printable(str(base.path)),
            "base_fingerprint": base.original.fingerprint(),
            SAMPLES: {name: _samples(base, name) for key, w in weights.items() for name in w.members or [key]},
            **({"resized": {name: list(sizes) for name, sizes in resized.items()}} if resized else {}),
        },
    )
    write_config(directory / CONFIG_NAME, config)


def _samples(base: Checkpoint, name: str) -> str:
    """Read the few numbers by which a model in memory is recognized as the base."""
    info = base.info(name)
    width = BITS[info.dtype] // 8
    places = sample_positions(math.prod(info.shape))
    raw = np.empty((len(places), width), np.uint8)
    with base.reader(name) as read:
        for row, place in zip(raw, places):
            read(place * width, row)
    return text_of_samples(decode(raw.reshape(-1), info.dtype, (len(places),)), info.dtype)


def _read_new_rows(tuned: Checkpoint, name: str) -> np.ndarray:
    """Read the bytes of the rows that the base does not have."""
    full, common = tuned.original.info(name), tuned.info(name)
    data = np.empty(full.n_bytes - common.n_bytes, np.uint8)
    with tuned.original.reader(name) as read:
        read(common.n_bytes, data)
    check_stored_finite(
        tuned.path, f"{name}{NEW_ROWS}", decode(data, full.dtype, (full.shape[0] - common.shape[0], *full.shape[1:]))
    )
    return data


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


def decompose(
    weight: Weight, delta: np.ndarray, settings: Settings, bases: Mapping[int, np.ndarray]
) -> tuple[float, Weight, dict[str, Part]]:
    """Decompose one change at its ranks; return its scale, the weight with the errors of what is stored, the parts.

    ``bases`` are leading left singular vectors of some of its unfoldings that are known already.
    """
    assert weight.arrangement is not None
    name, dtype = weight.row.name, settings.dtype
    arranged = weight.arrangement.arrange(delta)
    fitted, known, bound, weighting = _fitted(delta, arranged, weight, settings, bases)
    core, exponent = fitting_core("extract", name, fitted.core, dtype)
    scale = math.ldexp(1.0, exponent)
    arrays = tensor_parts(core, fitted.factors)
    parts = {part: Part(dtype, a.shape, encode(to_numpy(a), dtype)) for part, a in arrays.items()}
    # What `load_adapter` gives and `merge_checkpoint` adds: its distance from the change is the error and nothing else.
    stored = TuckerTensor(core, fitted.factors).map(lambda array: round_to(array, dtype))
    if exponent:
        stored = TuckerTensor(np.ldexp(stored.core.astype(np.float64), exponent), stored.factors)
    norm = weight.row.delta_norm or 0.0
    errors = _member_errors(arranged, stored) if weight.members else ()
    outputs = _member_outputs(arranged, stored, weight, settings) if weight.members and weight.is_weighted else ()
    if errors:
        known = math.hypot(*errors) / norm
    elif known is None or known < PLAIN or not _equal(stored, fitted):
        known = residual_norm(arranged, stored, norm) / norm
    row = replace(
        weight.row,
        arrangement=weight.arrangement.pattern,
        modes=weight.arranged_shape,
        ranks=weight.ranks,
        n_parameters=stored.n_parameters,
        relative_error=known,
        weighted_error=(
            math.hypot(*outputs) / (weight.row.weighted_norm or 1.0)
            if outputs
            else _output_error(arranged, stored, weight, weighting)
        ),
        lower_bound=weight.bound if weight.bound is not None else bound,
    )
    return scale, replace(weight, row=row, member_errors=errors, member_outputs=outputs), parts


def _member_errors(arranged: np.ndarray, stored: TuckerTensor) -> tuple[float, ...]:
    """Measure the error of each member of a stack, as `load_adapter` gives it."""
    slices = (select_slice(stored, 0, k) for k in range(len(arranged)))
    return tuple(residual_norm(x, part, frobenius_norm(x)) for x, part in zip(arranged, slices))


def _member_outputs(
    arranged: np.ndarray, stored: TuckerTensor, weight: Weight, settings: Settings
) -> tuple[float, ...]:
    """Measure the error of each member's output."""
    assert weight.arrangement is not None
    own, found = member_arrangement(weight.arrangement), list[float]()
    assert own is not None
    for k, (x, root) in enumerate(zip(arranged, _moments_of(weight, settings).roots())):
        part = select_slice(stored, 0, k).map(lambda array: array.astype(np.float64))
        difference = own.restore(part.to_tensor() - x, weight.row.shape[1:])
        found.append(frobenius_norm(difference if root is None else root.scale(difference)))
    return tuple(found)


def _equal(a: TuckerTensor, b: TuckerTensor) -> bool:
    pairs = ((u, v) for u, v in zip(a.factors, b.factors) if u is not None and v is not None)
    return all(np.array_equal(u, v) for u, v in [(a.core, b.core), *pairs])


def _output_error(
    arranged: np.ndarray, stored: TuckerTensor, weight: Weight, weighting: Weighting | None
) -> float | None:
    """Measure the error of the layer's output, where a calibration says what that is."""
    if weight.row.weighted_norm is None:
        return None
    assert weight.arrangement is not None
    difference = stored.map(lambda array: array.astype(np.float64)).to_tensor() - arranged
    own = weight.arrangement.restore(difference, weight.row.shape)
    return frobenius_norm(own if weighting is None else weighting.scale(own)) / weight.row.weighted_norm


def _fitted(
    delta: np.ndarray,
    arranged: np.ndarray,
    weight: Weight,
    settings: Settings,
    bases: Mapping[int, np.ndarray],
) -> tuple[TuckerTensor, float | None, float | None, Weighting | None]:
    """Decompose a change; return its relative error too, where the decomposition measured it with NumPy, and a bound.

    The change is scaled by its input's second moment, and back, where a calibration gave one that fits.
    """
    assert weight.arrangement is not None
    if weight.members and weight.is_weighted and weight.ranks != arranged.shape:
        return _fitted_outputs(delta, weight, settings), None, None, None
    if weight.units and weight.ranks != arranged.shape:
        units = StackNorm(weight.units)
        scaled = on_device(units.scale_(arranged.copy()), settings.device)
        found, _, bound = _fit(scaled, weight, settings, math.sqrt(len(weight.units)), bases)
        return units.unscale(found.map(to_numpy), weight.arrangement), None, bound, None
    if not (weight.is_weighted and settings.calibration) or weight.ranks == arranged.shape:
        found, *told = _fit(on_device(arranged, settings.device), weight, settings, weight.row.delta_norm or 0.0, bases)
        return found.map(to_numpy), told[0] if settings.device is None else None, told[1], None
    weighting = settings.calibration.weighting(weight.row.name, delta.shape)
    assert weighting is not None
    scaled = on_device(weight.arrangement.arrange(weighting.scale(delta)), settings.device)
    found, _, bound = _fit(scaled, weight, settings, weight.row.weighted_norm or 0.0, bases)
    return weighting.unscale(found.map(to_numpy), weight.arrangement), None, bound, weighting


def _fitted_outputs(delta: np.ndarray, weight: Weight, settings: Settings) -> TuckerTensor:
    """Decompose a stack so that the error of its members' outputs is small, and at most what was promised.

    The promise is that of a truncated HOSVD in one of two norms, whichever of them that was.
    """
    assert weight.arrangement is not None
    moments = _moments_of(weight, settings)
    units = weight.units or (1.0,) * len(weight.members)
    target = math.sqrt(len(units)) if weight.units else weight.row.weighted_norm or 0.0
    target *= math.inf if weight.predicted is None else weight.predicted * (1 + 1e-6)
    found: list[tuple[float, TuckerTensor]] = []
    for method in ("auto", "hosvd"):
        if found and min(found, key=lambda item: item[0])[0] <= target:
            break
        for outputs in moments.norms(units):
            x = weight.arrangement.arrange(outputs.norm.scale_(delta.copy()))
            fit = _decomposed(on_device(x, settings.device), weight.ranks, frobenius_norm(x), method)[0]
            tucker, error = outputs.best_core(x, fit.map(to_numpy), weight.arrangement)
            found.append((error, outputs.norm.unscale(tucker, weight.arrangement)))
    return min(found, key=lambda item: item[0])[1]


def _moments_of(weight: Weight, settings: Settings) -> StackMoments:
    assert settings.calibration is not None
    found = StackMoments.of(settings.calibration, weight.row.name, weight.members, weight.row.shape[1:])
    assert found is not None
    return found


def _fit(
    x: Array, weight: Weight, settings: Settings, norm: float, bases: Mapping[int, np.ndarray]
) -> tuple[TuckerTensor, float, float | None]:
    """Decompose at the chosen ranks, at least as well as the spectrum promised.

    Returned are the decomposition, its relative error, and what no other of these ranks can go below, where the method
    computed exact singular values.
    """
    cut = _cut_modes(weight.ranks, x.shape)
    if len(cut) == 1 and (known := _projected(x, cut[0], weight.ranks[cut[0]], norm, bases)) is not None:
        return *known, None
    must = "rtol" in settings.budget or weight.is_listed
    found = _decomposed(x, weight.ranks, norm, "auto")
    if must and weight.predicted is not None and found[1] > weight.predicted * (1 + 1e-6):
        # The promise is the truncated HOSVD's; fast ways come within a hair (2e-4 was measured). A tolerance counts
        # that hair, and where all ranks were listed the exact way costs what the list did.
        found = min(found, _decomposed(x, weight.ranks, norm, "hosvd"), key=lambda f: f[1])
    return found


def _cut_modes(ranks: Sequence[int], shape: Sequence[int]) -> list[int]:
    return [k for k, (rank, size) in enumerate(zip(ranks, shape)) if rank < size]


def _decomposed(
    x: Array, ranks: tuple[int, ...], norm: float, method: Method
) -> tuple[TuckerTensor, float, float | None]:
    shape = tuple(x.shape)
    cut = _cut_modes(ranks, shape)
    if not cut:  # all modes whole: the change itself
        return TuckerTensor(x, (None,) * len(shape)), 0.0, 0.0
    if len(cut) == 1:  # both bases of a matrix, for the leading directions, cost less than all of one side's
        x, target, whole = unfold(x, cut[0]), Target((ranks[cut[0]],) * 2), ()
    else:
        target, whole = Target(ranks), [k for k in range(len(shape)) if k not in cut]
    fit = tucker_of(x, prepare("extract", x, norm * norm), target, whole, method)
    found = _of_matrix(fit.tucker, cut[0], shape) if len(cut) == 1 else fit.tucker
    return found, fit.relative_error, fit.lower_bound or None


def _projected(
    x: Array, mode: int, rank: int, norm: float, bases: Mapping[int, np.ndarray]
) -> tuple[TuckerTensor, float] | None:
    """Truncate one unfolding where its leading singular vectors, or a matrix's right ones, are known already."""
    xp, shape = array_namespace("extract", x), tuple(x.shape)
    across = 1 - mode if len(shape) == 2 and mode not in bases else mode
    if across not in bases or bases[across].shape[1] < rank:
        return None
    known = xp.astype(
        xp.asarray(np.ascontiguousarray(bases[across][:, :rank]), device=array_api_compat.device(x)),
        x.dtype,
        copy=False,
    )
    core = multi_mode_dot(x, [known], modes=[across], transpose=True)
    if across == mode:
        factor = known
    else:  # the left vectors are what the right ones become, and the core takes these
        factor = orthonormal_columns(xp, unfold(core, mode))
        core = multi_mode_dot(multi_mode_dot(core, [factor], modes=[mode], transpose=True), [known], modes=[across])
    left = norm * norm - float_squares("extract", xp, core)
    factors = tuple(factor if k == mode else None for k in range(len(shape)))
    return TuckerTensor(core, factors), math.sqrt(max(left, 0.0)) / norm


def _of_matrix(matrix: TuckerTensor, mode: int, shape: tuple[int, ...]) -> TuckerTensor:
    """Fold the decomposition of an unfolding back: the factor of its columns goes into the core."""
    core = multi_mode_dot(matrix.core, [matrix.factors[1]], modes=[1])
    ranks = tuple(core.shape[0] if k == mode else n for k, n in enumerate(shape))
    factors = tuple(matrix.factors[0] if k == mode else None for k in range(len(shape)))
    return TuckerTensor(fold(core, mode, ranks), factors)
