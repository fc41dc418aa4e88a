"""Magnitudes of output channels: what they do to a weight, in every array library, and in files."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import flora_tensor as ft
from flora_tensor.adapter import Adapter
from flora_tensor.magnitudes import channel_count, channel_norms, magnitude_change, spread_over_channels
from flora_tensor.report import adapter_table, describe_adapter
from support import as_array, dtype_name, for_all, frobenius, to_numpy, tolerance

LAYOUTS = [
    ((5, 4), 0, 1),
    ((5, 4), 1, 1),
    ((6, 2, 3, 3), 0, 1),
    ((6, 2, 3, 3), 1, 1),
    ((6, 2, 3), 1, 3),
    ((6, 2), 1, 2),
]


def channel(weight: np.ndarray, axis: int, groups: int, number: int) -> np.ndarray:
    """Cut one output channel out of a weight, by hand."""
    if axis == 0:
        return weight[number]
    per_group, rows = weight.shape[1], weight.shape[0] // groups
    group, column = divmod(number, per_group)
    return weight[group * rows : (group + 1) * rows, column]


def rescaled(weight: np.ndarray, delta: np.ndarray, magnitude: np.ndarray, axis: int, groups: int) -> np.ndarray:
    """Compute m · (W + ΔW) / ‖W + ΔW‖ channel by channel."""
    total = weight + delta
    for number, m in enumerate(magnitude):
        part = channel(total, axis, groups, number)
        part *= m / np.linalg.norm(part)
    return total


@for_all(seed=st.integers(0, 2**32 - 1), dtype=st.sampled_from(["float32", "float64"]), layout=st.sampled_from(LAYOUTS))
def test_each_channel_gets_its_magnitude(xp: Any, seed: int, dtype: str, layout: tuple[Any, ...]):
    rng, (shape, axis, groups) = np.random.default_rng(seed), layout
    weight, delta = (rng.standard_normal(shape).astype(dtype) for _ in range(2))
    n = channel_count(shape, axis, groups)
    magnitude = rng.standard_normal(n).astype(dtype)
    given = [as_array(xp, a) for a in (weight, delta, magnitude)]
    exact = [a.astype(np.float64) for a in (weight, delta, magnitude)]
    norms = to_numpy(channel_norms(given[0] + given[1], axis, groups))
    expected = np.array([np.linalg.norm(channel(exact[0] + exact[1], axis, groups, k)) for k in range(n)])
    assert np.linalg.norm(norms - expected) <= tolerance(dtype, *shape, norm=float(np.linalg.norm(expected)))
    change = magnitude_change(*given, axis, groups)
    assert dtype_name(change.dtype) == dtype
    oracle = rescaled(*exact, axis, groups)
    # The rounding of V = W + ΔW is relative to its terms, and is divided by the norm of what is left of them.
    shrunk = float(max(abs(exact[2]) / expected))
    bound = frobenius(oracle) + (1 + shrunk) * (frobenius(weight) + frobenius(delta))
    assert frobenius(to_numpy(change).astype(np.float64) + weight - oracle) <= tolerance(dtype, *shape, norm=bound)


def test_what_was_started_from_its_own_norms_changes_nothing(xp: Any):
    rng = np.random.default_rng(0)
    for shape, axis, groups in LAYOUTS:
        weight = as_array(xp, rng.standard_normal(shape).astype("float32"))
        start = channel_norms(weight, axis, groups)
        change = magnitude_change(weight, weight * 0, start, axis, groups)
        assert not to_numpy(change).any()


def test_a_channel_of_zeros_is_left_alone(xp: Any):
    weight = as_array(xp, np.array([[0.0, 0.0], [3.0, 4.0]]))
    change = magnitude_change(weight, weight * 0, as_array(xp, np.array([7.0, 10.0])), 0)
    assert to_numpy(change).tolist() == [[0.0, 0.0], [3.0, 4.0]]


@pytest.mark.parametrize(
    ("shape", "axis", "groups", "message"),
    [
        ((5, 4), 2, 1, r"no output channels on axis 2 of shape \(5, 4\); pass axis 0 or 1"),
        ((5,), 0, 1, "no output channels on axis 0"),
        ((5, 4), 0, 2, "2 groups on axis 0 .* groups belong to axis 1 and divide axis 0"),
        ((5, 4), 1, 2, "2 groups on axis 1 .* divide axis 0"),
        ((6, 4), 1, 0, "0 groups on axis 1"),
    ],
)
def test_layouts_that_cannot_be(shape: tuple[int, ...], axis: int, groups: int, message: str):
    with pytest.raises(ValueError, match=f"magnitude: {message}"):
        channel_count(shape, axis, groups)
    with pytest.raises(ValueError, match=f"magnitude: {message}"):
        channel_norms(np.ones(shape), axis, groups)


def test_one_number_for_each_channel():
    with pytest.raises(ValueError, match=r"values of shape \(3,\) for 8 channels; pass one for each"):
        spread_over_channels(np.ones(3), (4, 4), 1, 2)


# Files ------------------------------------------------------------------------------------------------


def change_of(rng: np.random.Generator, shape: tuple[int, ...]) -> ft.TuckerTensor:
    ranks = [min(n, 2) for n in shape]
    factors = [rng.standard_normal((n, r)).astype("f4") for n, r in zip(shape, ranks)]
    return ft.TuckerTensor(rng.standard_normal(ranks).astype("f4"), factors)


def adapter_with_magnitudes() -> Adapter:
    rng = np.random.default_rng(1)
    return Adapter(
        {
            "up.weight": change_of(rng, (6, 2, 3, 3)),
            "fc.weight": change_of(rng, (5, 4)),
            "out.weight": change_of(rng, (3, 5)),
        },
        scales={"fc.weight": 0.5},
        magnitudes={"up.weight": rng.random(6).astype("f4"), "fc.weight": rng.random(5).astype("f4")},
        channels={"up.weight": (1, 3)},
    )


def test_files_keep_magnitudes_bit_for_bit(tmp_path: Path):
    adapter = adapter_with_magnitudes()
    back = ft.load_adapter(ft.save_adapter(tmp_path / "a", adapter))
    assert dict(back.channels) == {"up.weight": (1, 3), "fc.weight": (0, 1)}
    assert back.n_parameters == adapter.n_parameters == sum(t.n_parameters for t in adapter.values()) + 11
    assert all(np.array_equal(back.magnitudes[name], adapter.magnitudes[name]) for name in adapter.magnitudes)
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert tensors["base_model.model.fc.tucker_update.magnitude"].shape == (5,)
    table = adapter_table(back)
    assert "o i + magnitude" in table
    assert sum(row["n_parameters"] for row in describe_adapter(back)["weights"]) == back.n_parameters
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["format_version"] == "1.1"
    assert config["magnitude_pattern"] == {"up.weight": {"axis": 1, "groups": 3}, "fc.weight": {"axis": 0, "groups": 1}}


def test_merging_a_checkpoint_applies_them(tmp_path: Path):
    adapter, rng = adapter_with_magnitudes(), np.random.default_rng(2)
    base = {name: rng.standard_normal(adapter.shapes[name]).astype("f4") for name in adapter}
    save_file(base, tmp_path / "base.safetensors")
    ft.merge_checkpoint(tmp_path / "base.safetensors", adapter, tmp_path / "merged.safetensors")
    merged = load_file(tmp_path / "merged.safetensors")
    for name in adapter:
        delta, weight = adapter.delta(name, dtype=np.float64), base[name].astype(np.float64)
        expected = weight + delta
        if name in adapter.magnitudes:
            expected = rescaled(weight, delta, adapter.magnitudes[name].astype(np.float64), *adapter.channels[name])
        error = np.linalg.norm(merged[name] - expected)
        assert error <= tolerance("float32", *expected.shape, norm=float(np.linalg.norm(expected)))


def test_contradictions_are_refused(tmp_path: Path):
    good, rng = adapter_with_magnitudes(), np.random.default_rng(3)
    for options, message in [
        (
            {"magnitudes": {"fc.weight": np.ones(4)}},
            r"magnitudes of shape \(4,\); pass \(5,\), one for each channel of",
        ),
        ({"magnitudes": {"no.weight": np.ones(4)}}, "magnitudes names 'no.weight', which has no tensor"),
        ({"channels": {"no.weight": (0, 1)}}, "channels names 'no.weight', which has no tensor"),
        ({"magnitudes": {"fc.weight": np.ones(4)}, "channels": {"fc.weight": (1, 2)}}, "2 groups on axis 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            Adapter({"fc.weight": change_of(rng, (5, 4))}, **options)
    directory = ft.save_adapter(tmp_path / "a", good)
    config = json.loads((directory / "adapter_config.json").read_text())
    config["magnitude_pattern"].pop("fc.weight")
    (directory / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ft.InputError, match=r"has the unknown 'base_model.model.fc.tucker_update.magnitude'"):
        ft.load_adapter(directory)
    # Without its magnitudes the change would be another one: the weight is left out.
    loose = ft.load_adapter(directory, strict=False)
    assert set(loose) == {"up.weight", "out.weight"}


def test_algebra_refuses_what_is_no_tucker_tensor():
    adapter = adapter_with_magnitudes()
    calls = [
        lambda: ft.round_adapter(adapter, rtol=0.1),
        lambda: ft.add_adapters([adapter, adapter]),
        lambda: ft.subtract_adapters(adapter, adapter),
        lambda: ft.scale_adapter(adapter, 2.0),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"'\w+\.weight' has a magnitude, so that its change depends on the base"):
            call()
