"""Stacks of equal weights as one tensor: in memory, in the file, and in the algebra of adapters."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import flora_tensor as ft
from flora_tensor.report import adapter_table, describe_adapter
from flora_tensor.stacking import member_arrangement, stacked_arrangement

NAMES = tuple(f"layers.{k}.fc.weight" for k in range(5))
STACK = "layers.*.fc.weight"


def tensor(
    shape: tuple[int, ...], ranks: tuple[int | None, ...], seed: int, dtype: Any = np.float64
) -> ft.TuckerTensor:
    rng = np.random.default_rng(seed)
    core = rng.standard_normal([n if r is None else r for n, r in zip(shape, ranks)]).astype(dtype)
    factors = tuple(None if r is None else rng.standard_normal((n, r)).astype(dtype) for n, r in zip(shape, ranks))
    return ft.TuckerTensor(core, factors)


def stacked(seed: int = 0, layer_rank: int | None = 2, dtype: Any = np.float64, scale: float = 0.5) -> ft.Adapter:
    """A stack of five 8×6 weights, and a weight of its own."""
    stack = ft.TuckerStack(NAMES, tensor((5, 8, 6), (layer_rank, 3, 2), seed, dtype), ft.Arrangement("o i"), (8, 6))
    head = tensor((4, 6), (2, 2), seed + 1, dtype)
    return ft.Adapter({"head.weight": head}, scales=dict.fromkeys(NAMES, scale), stacks={STACK: stack})


def deltas(adapter: ft.Adapter) -> dict[str, np.ndarray]:
    return {name: np.asarray(adapter.delta(name, dtype=np.float64)) for name in adapter}


def assert_close(a: dict[str, np.ndarray], b: dict[str, np.ndarray], eps: float = 1e-13) -> None:
    assert a.keys() == b.keys()
    for name, x in a.items():
        assert np.linalg.norm(x - b[name]) <= eps * (np.linalg.norm(x) + 1e-300), name


@pytest.mark.parametrize("layer_rank", [2, None])
def test_members_are_the_slices_of_the_dense_tensor_and_share_their_factors(layer_rank: int | None):
    adapter = stacked(layer_rank=layer_rank)
    dense = 0.5 * np.asarray(adapter.stacks[STACK].tensor.to_tensor())
    for k, name in enumerate(NAMES):
        np.testing.assert_allclose(adapter.delta(name), dense[k], rtol=0, atol=1e-13 * np.abs(dense).max())
        assert adapter[name].core.shape == (3, 2)
        assert all(u is v for u, v in zip(adapter[name].factors, adapter[NAMES[0]].factors))
    own = adapter["head.weight"].n_parameters
    assert adapter.n_parameters == adapter.stacks[STACK].tensor.n_parameters + own
    assert adapter.n_parameters < sum(t.n_parameters for t in adapter.values())


@pytest.mark.parametrize(
    "pattern", ["o i", "o i h w", "o (i h w)", "(o h) (i w)", "(heads d) i -> heads d i", "a b -> b a"]
)
def test_an_arrangement_gets_the_layers_and_loses_them_again(pattern: str):
    own = ft.Arrangement(pattern, {"heads": 2} if "heads" in pattern else {})
    joint = stacked_arrangement(own)
    shape = {2: (4, 3), 4: (4, 3, 2, 5)}[own.n_axes]
    assert joint.shape((7, *shape)) == (7, *own.shape(shape))
    assert member_arrangement(joint) == own
    weights = np.random.default_rng(0).standard_normal((7, *shape))
    for layer, arranged in zip(weights, joint.arrange(weights)):
        assert np.array_equal(own.arrange(layer), arranged)


@pytest.mark.parametrize("dtype", ["F64", "F32", "BF16"])
def test_the_file_holds_what_is_shared_once_and_gives_back_every_bit(dtype: str, tmp_path: Path):
    adapter = stacked(dtype=np.float64 if dtype == "F64" else np.float32)
    adapter = ft.Adapter(
        adapter.tensors, scales=adapter.scales, stacks=adapter.stacks, dtypes=dict.fromkeys(adapter, dtype)
    )
    first = ft.save_adapter(tmp_path / "a", adapter)
    read = ft.load_adapter(first)
    assert list(read.stacks) == [STACK]
    assert read.stacks[STACK].members == NAMES
    assert read.stacks[STACK].joint_arrangement.pattern == "layer o i"
    assert read.n_parameters == adapter.n_parameters
    assert read[NAMES[0]].factors[1] is read[NAMES[4]].factors[1]
    second = ft.save_adapter(tmp_path / "b", read)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    size = {"F64": 8, "F32": 4, "BF16": 2}[dtype]
    assert (first / "adapter_model.safetensors").stat().st_size < adapter.n_parameters * size + 2000
    if dtype != "BF16":
        assert_close(deltas(adapter), deltas(read), 0.0)
    config = json.loads((first / "adapter_config.json").read_text())
    assert config["format_version"] == "1.2"
    assert config["stacks"] == {STACK: list(NAMES)}
    assert config["target_modules"] == ["head", *(name.removesuffix(".weight") for name in NAMES)]


def test_without_stacks_the_format_stays_the_old_one(tmp_path: Path):
    adapter = stacked()
    apart = ft.Adapter(adapter.tensors, scales=adapter.scales, config={"stacks": {STACK: list(NAMES)}})
    config = json.loads((ft.save_adapter(tmp_path / "a", apart) / "adapter_config.json").read_text())
    assert config["format_version"] == "1.1"
    assert "stacks" not in config
    assert_close(deltas(adapter), deltas(ft.load_adapter(tmp_path / "a")))


BROKEN: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no table": (lambda c: c.update(stacks=[1]), "stacks must be a table by weight name"),
    "no list": (lambda c: c["stacks"].update({STACK: "abc"}), "must be a list of names"),
    "no names": (lambda c: c["stacks"].update({STACK: [1, 2]}), "must be a list of names"),
    "too few": (lambda c: c["stacks"].update({STACK: list(NAMES[:4])}), "4 members of shape .* not .5, 8, 6"),
    "one": (lambda c: c["stacks"].update({STACK: list(NAMES[:1])}), "pass two different names or more"),
    "twice": (lambda c: c["stacks"].update({STACK: [*NAMES[:4], NAMES[0]]}), "pass two different names or more"),
    "a weight": (
        lambda c: c["stacks"].update({STACK: [*NAMES[:4], "head.weight"]}),
        "'head.weight' is in the stack .* and given separately",
    ),
    "arranged": (
        lambda c: c["arrangement_pattern"].update({STACK: {"pattern": "l o i -> o l i"}}),
        "has shape|arranged shape|its first axis must be a mode",
    ),
    "unknown": (lambda c: c["stacks"].update({"other.*": list(NAMES)}), "lacks 'base_model.model.other"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_table_of_stacks_that_contradicts_the_tensors_is_refused(case: str, tmp_path: Path):
    change, message = BROKEN[case]
    path = ft.save_adapter(tmp_path / "a", stacked()) / "adapter_config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
    with pytest.raises(ft.InputError, match=message):
        ft.load_adapter(tmp_path / "a")


def test_what_no_stack_can_be_is_refused():
    adapter = stacked()
    stack, other = adapter.stacks[STACK], tensor((8, 6), (1, 1), 7)
    with pytest.raises(ValueError, match=r"'layers.1.fc.weight' is in the stack .* and given separately"):
        ft.Adapter({NAMES[1]: other}, stacks={STACK: stack})
    with pytest.raises(ValueError, match=r"'layers.0.fc.weight' is in the stack 'b' and in the stack 'a'"):
        ft.Adapter({}, stacks={"a": stack, "b": ft.TuckerStack(NAMES, stack.tensor, ft.Arrangement("o i"), (8, 6))})
    with pytest.raises(ValueError, match="is a stack's name and a tensor's"):
        ft.Adapter({"head.weight": other}, stacks={"head.weight": stack})
    with pytest.raises(ValueError, match="has a magnitude; take the stack apart first"):
        ft.Adapter({}, stacks={STACK: stack}, magnitudes={NAMES[0]: np.ones(8)})
    with pytest.raises(ValueError, match=r"have scales \[2.0, 1.0\]; pass one"):
        ft.Adapter({}, stacks={STACK: stack}, scales={NAMES[0]: 2.0})
    with pytest.raises(ValueError, match="the stack 'x' has no tensor; pass the name of a weight"):
        adapter.with_stacks({"x": NAMES})
    swapped = ft.Adapter(
        {"x": tensor((8, 5, 6), (1, 1, 1), 0)}, {"x": ft.Arrangement("l o i -> o l i")}, shapes={"x": (5, 8, 6)}
    )
    with pytest.raises(ValueError, match=r"arranged as 'l o i -> o l i'; its first axis must be a mode"):
        swapped.with_stacks({"x": NAMES})


# --- algebra -----------------------------------------------------------------------------------------


def test_rounding_keeps_a_stack_and_measures_its_error():
    adapter = stacked(layer_rank=None)
    exact = deltas(adapter)
    fit = ft.round_adapter(adapter, max_parameters=60)
    assert list(fit.adapter.stacks) == [STACK]
    assert fit.adapter.n_parameters <= 60
    left = deltas(fit.adapter)
    lost = sum(float(np.sum((x - left.get(name, 0.0)) ** 2)) for name, x in exact.items())
    total = sum(float(np.sum(x**2)) for x in exact.values())
    assert fit.relative_error == pytest.approx((lost / total) ** 0.5, rel=1e-9)
    assert 0 < fit.relative_error < 1
    assert_close(exact, deltas(ft.round_adapter(adapter, rtol=1e-12).adapter), 1e-11)


@pytest.mark.parametrize("other", ["alike", "apart", "some", "none"])
def test_sums_and_differences_are_those_of_the_dense_changes(other: str, tmp_path: Path):
    a, b = stacked(0), stacked(5, layer_rank=None, scale=2.0)
    if other in ("apart", "some"):
        names = list(b) if other == "apart" else NAMES[:2]
        b = ft.Adapter({name: b[name] for name in names}, scales={name: b.scales[name] for name in names})
    elif other == "none":
        b = ft.Adapter({"head.weight": b["head.weight"]})
    first, second = deltas(a), deltas(b)
    for fit, signs in (
        (ft.add_adapters([a, b], weights=[0.7, 0.3]), (0.7, 0.3)),
        (ft.subtract_adapters(a, b), (1.0, -1.0)),
    ):
        expected = {name: signs[0] * x + signs[1] * second.get(name, 0.0) for name, x in first.items()}
        assert_close(expected, {name: deltas(fit.adapter)[name] for name in expected}, 1e-12)
        assert bool(fit.adapter.stacks) == (other in ("alike", "none"))
        ft.save_adapter(tmp_path / "sum", fit.adapter, overwrite=True)
        assert_close(expected, {n: deltas(ft.load_adapter(tmp_path / "sum"))[n] for n in expected}, 1e-12)
    rounded = ft.add_adapters([a, b], max_ratio=0.5)
    assert rounded.n_parameters <= 0.5 * (5 * 48 + 24)


def test_scaling_changes_the_scales_alone():
    adapter = stacked()
    scaled = ft.scale_adapter(adapter, -3.0)
    assert scaled.stacks[STACK] is adapter.stacks[STACK]
    assert_close({name: -3.0 * x for name, x in deltas(adapter).items()}, deltas(scaled))


def test_inspection_lists_a_stack_once():
    adapter = stacked()
    content = describe_adapter(adapter)
    assert [w["name"] for w in content["weights"]] == ["head.weight", STACK]
    assert content["weights"][1]["members"] == list(NAMES)
    assert content["weights"][1]["delta_norm"] == pytest.approx(
        sum(np.sum(deltas(adapter)[name] ** 2) for name in NAMES) ** 0.5
    )
    assert sum(w["n_parameters"] for w in content["weights"]) == adapter.n_parameters
    assert "layer o i" in adapter_table(adapter)


@pytest.mark.parametrize("target", ["lora", "lycoris"])
def test_other_formats_get_the_members_one_by_one(target: str, tmp_path: Path):
    adapter = stacked(dtype=np.float32)
    if target == "lora":
        back = ft.from_peft_lora(ft.to_peft_lora(adapter, tmp_path / "out"))
    else:
        base = {name: np.zeros(shape) for name, shape in adapter.shapes.items()}
        back = ft.from_lycoris(ft.to_lycoris(adapter, tmp_path / "out.safetensors"), base)
    assert not back.stacks
    assert_close(deltas(adapter), deltas(back), 1e-5)
