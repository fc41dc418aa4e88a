"""Stacks on PyTorch models: shared factors are one parameter, trained as such and stored once."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import flora_tensor as ft
import flora_torch
from flora_torch.inventory import updates_by_weight
from flora_torch.stacks import shared_name

NAMES = tuple(f"layers.{k}.fc.weight" for k in range(3))
STACK = "layers.*.fc.weight"


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.fc(x))


class Net(nn.Module):
    """Three equal layers and a head, float64."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(6, 4)
        self.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def stacked(layer_rank: int | None = 2, dtype: Any = np.float64, seed: int = 0) -> ft.Adapter:
    rng = np.random.default_rng(seed)
    layers = None if layer_rank is None else rng.standard_normal((3, layer_rank)).astype(dtype)
    factors = [rng.standard_normal((6, r)).astype(dtype) for r in (3, 2)]
    joint = ft.TuckerTensor(rng.standard_normal((layer_rank or 3, 3, 2)).astype(dtype), (layers, *factors))
    head = ft.TuckerTensor(rng.standard_normal((1, 1)).astype(dtype), tuple(np.ones((n, 1), dtype) for n in (4, 6)))
    stack = ft.TuckerStack(NAMES, joint, ft.Arrangement("o i"), (6, 6))
    return ft.Adapter({"head.weight": head}, scales=dict.fromkeys(NAMES, 0.5), stacks={STACK: stack})


def attached(adapter: ft.Adapter | None = None) -> tuple[Net, flora_torch.AttachReport]:
    model = Net()
    return model, flora_torch.attach_adapter(model, adapter or stacked(), dropout=0.0)


def updates(model: nn.Module) -> Any:
    return updates_by_weight(model, "default")


def assert_shared(model: nn.Module) -> None:
    first, *others = (updates(model)[name] for name in NAMES)
    assert all(u.factor_0 is first.factor_0 and u.factor_1 is first.factor_1 for u in others)
    assert len({id(updates(model)[name].core) for name in NAMES}) == 3


def moved(model: nn.Module) -> nn.Module:
    """Train a step or two."""
    optimizer = torch.optim.AdamW(flora_torch.adapter_parameters(model), lr=0.05)
    x = torch.randn(16, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    return model


def test_layers_share_factors_and_compute_with_their_own_changes():
    adapter = stacked()
    model, report = attached(adapter)
    assert_shared(model)
    parameters = flora_torch.adapter_parameters(model)
    numbers = 3 * 6 + 6 * 3 + 6 * 2 + 1 + 4 + 6  # three cores, two factors, the head
    assert sum(p.numel() for p in parameters) == report.n_parameters == numbers
    assert [layer.n_parameters for layer in report.layers] == [1 + 4 + 6, 6 + 18 + 12, 6, 6]
    dense = Net()
    with torch.no_grad():
        for name in adapter:
            dense.get_parameter(name).add_(torch.from_numpy(adapter.delta(name)))
    x = torch.randn(5, 6, dtype=torch.float64)
    torch.testing.assert_close(model(x), dense(x), rtol=1e-12, atol=1e-12)
    groups = flora_torch.parameter_groups(model, 1e-3)
    assert sum(len(group["params"]) for group in groups) == len(parameters)


def test_gradients_of_shared_factors_are_those_of_the_dense_computation():
    model, _ = attached()
    x = torch.randn(7, 6, dtype=torch.float64)
    model(x).square().sum().backward()
    adapter, plain = stacked(), Net()
    u, v = (torch.from_numpy(f).requires_grad_() for f in adapter[NAMES[0]].factors)
    cores = [torch.from_numpy(np.array(adapter[name].core)).requires_grad_() for name in NAMES]
    weights = {name: plain.get_parameter(name) + 0.5 * u @ core @ v.mT for name, core in zip(NAMES, cores)}
    head = plain.head.weight + torch.from_numpy(adapter.delta("head.weight"))
    torch.func.functional_call(plain, weights | {"head.weight": head}, (x,)).square().sum().backward()
    first = updates(model)[NAMES[0]]
    torch.testing.assert_close(first.factor_0.grad, u.grad, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(first.factor_1.grad, v.grad, rtol=1e-11, atol=1e-11)
    for name, core in zip(NAMES, cores):
        torch.testing.assert_close(updates(model)[name].core.grad, core.grad, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_trained_stack_is_stored_once_and_comes_back_bit_for_bit(dtype: torch.dtype, tmp_path: Path):
    model = Net()
    flora_torch.attach_adapter(model, stacked(), dtype=dtype)
    path = flora_torch.save_adapter(moved(model), tmp_path / "a")
    read = ft.load_adapter(path)
    assert list(read.stacks) == [STACK]
    assert read.stacks[STACK].members == NAMES
    assert read.n_parameters == sum(p.numel() for p in flora_torch.adapter_parameters(model))
    copied = Net()
    flora_torch.load_adapter(copied, path)
    assert_shared(copied)
    for name, update in updates(model).items():
        other = updates(copied)[name]
        assert all(torch.equal(a, b) for a, b in zip(update.parameters(), other.parameters(), strict=True))
        assert (other.core.dtype, other.scale) == (dtype, update.scale)
    again = flora_torch.save_adapter(copied, tmp_path / "b")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (path / name).read_bytes() == (again / name).read_bytes()
    x = torch.randn(5, 6, dtype=torch.float64)
    assert torch.equal(model(x), copied(x))


def test_an_extracted_stack_trains_on_and_merges(tmp_path: Path):
    before, after = Net().state_dict(), moved(attached()[0])
    merged = flora_torch.merge(after).state_dict()
    save_file(before, tmp_path / "base.safetensors")
    save_file({name: merged[name].contiguous() for name in before}, tmp_path / "tuned.safetensors")
    pair = tmp_path / "base.safetensors", tmp_path / "tuned.safetensors"
    report = ft.extract(*pair, tmp_path / "adapter", rtol=1e-3, stack=STACK, dtype="float64")
    assert report[NAMES[0]].stack == STACK
    model = Net()
    flora_torch.load_adapter(model, tmp_path / "adapter")
    assert_shared(model)
    x = torch.randn(5, 6, dtype=torch.float64)
    tuned = Net()
    tuned.load_state_dict(merged)
    with torch.no_grad():
        assert float((model(x) - tuned(x)).norm()) <= 0.02 * float((Net()(x) - tuned(x)).norm())
    assert_shared(moved(model))


def test_values_are_filled_in_only_where_all_layers_have_the_same(tmp_path: Path):
    model, _ = attached()
    shared = updates(model)[NAMES[0]].factor_0
    joint = ft.save_adapter(tmp_path / "joint", stacked(layer_rank=None, seed=1))
    flora_torch.load_adapter(model, joint)
    assert updates(model)[NAMES[2]].factor_0 is shared
    x = torch.randn(5, 6, dtype=torch.float64)
    torch.testing.assert_close(model(x), attached(stacked(layer_rank=None, seed=1))[0](x), rtol=1e-12, atol=1e-12)
    other = stacked(layer_rank=None, seed=2)
    tensors = dict(other)
    tensors[NAMES[1]] = ft.TuckerTensor(
        other[NAMES[1]].core, tuple(2 * u for u in other[NAMES[1]].factors if u is not None)
    )
    apart = ft.save_adapter(tmp_path / "apart", ft.Adapter(tensors, scales=other.scales))
    kept = [p.detach().clone() for p in flora_torch.adapter_parameters(model)]
    with pytest.raises(ValueError, match=r"'layers.0.fc.weight' and 'layers.1.fc.weight' share a factor in the model"):
        flora_torch.load_adapter(model, apart)
    with pytest.raises(ValueError, match="hotswap_adapter: layers share a factor in the model"):
        flora_torch.hotswap_adapter(model, apart)
    assert all(torch.equal(a, b) for a, b in zip(kept, flora_torch.adapter_parameters(model), strict=True))
    flora_torch.hotswap_adapter(model, joint)


def test_sharing_survives_copies_casts_retraction_and_merging_in_place():
    model, _ = attached()
    x = torch.randn(5, 6, dtype=torch.float64)
    expected = model(x)
    assert_shared(copy.deepcopy(model))
    flora_torch.retract_(model)
    torch.testing.assert_close(model(x), expected, rtol=1e-11, atol=1e-11)
    first = updates(model)[NAMES[0]].factor_0
    torch.testing.assert_close(first.mT @ first, torch.eye(3, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    flora_torch.merge_(model)
    torch.testing.assert_close(model.eval()(x), expected, rtol=1e-11, atol=1e-11)
    flora_torch.unmerge_(model)
    assert_shared(model.float())
    with flora_torch.disabled(model):
        torch.testing.assert_close(model(x.float()), Net().float()(x.float()))
    assert not any("tucker" in name for name, _ in flora_torch.detach(model).named_parameters())


def test_layers_that_no_longer_agree_are_stored_apart(tmp_path: Path):
    model, _ = attached()
    updates(model)[NAMES[1]].scale = 2.0
    read = ft.load_adapter(flora_torch.save_adapter(model, tmp_path / "a"))
    assert [stack.members for stack in read.stacks.values()] == [(NAMES[0], NAMES[2])]
    assert read.scales[NAMES[1]] == 2.0
    for name, update in updates(model).items():
        np.testing.assert_array_equal(read[name].core, update.core.detach().numpy())


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a.0.w", "a.10.w"], "a.*.w"),
        (["a.0.q.w", "a.1.k.w"], "a.*.*.w"),
        (["w.x", "b.w.x"], "*.w.x"),
        (["q.w", "k.w"], "*.w"),
    ],
)
def test_a_stack_is_named_by_what_its_members_have_in_common(names: list[str], expected: str):
    assert shared_name(names) == expected


def test_several_stacks_on_one_model_are_shared_each_by_itself(tmp_path: Path):
    """Two adapters, weighted, renamed, one detached: what either computes is that of its dense changes."""
    first, second = stacked(), stacked(layer_rank=None, seed=7)
    model = Net()
    flora_torch.attach_adapter(model, first, adapter_name="a", dropout=0.0)
    flora_torch.attach_adapter(model, second, adapter_name="b", dropout=0.0)
    x = torch.randn(5, 6, dtype=torch.float64)

    def dense(**weights: float) -> torch.Tensor:
        plain = Net()
        with torch.no_grad():
            for name, adapter in (("a", first), ("b", second)):
                for weight in adapter if name in weights else ():
                    change = torch.from_numpy(adapter.delta(weight))
                    plain.get_parameter(weight).add_(change, alpha=weights[name])
            return plain(x)

    def check(**weights: float) -> None:
        flora_torch.activate(model, weights)
        torch.testing.assert_close(model(x).detach(), dense(**weights), rtol=1e-11, atol=1e-11)

    check(a=1.0, b=1.0)
    check(a=0.7, b=-0.3)
    check(b=2.0)
    assert all(
        updates_by_weight(model, name)[NAMES[0]].factor_0 is updates_by_weight(model, name)[NAMES[2]].factor_0
        for name in "ab"
    )
    assert updates_by_weight(model, "a")[NAMES[0]].factor_0 is not updates_by_weight(model, "b")[NAMES[0]].factor_0
    for name, adapter in (("a", first), ("b", second)):
        read = ft.load_adapter(flora_torch.save_adapter(model, tmp_path / name, adapter_name=name))
        assert list(read.stacks) == [STACK]
        for weight in NAMES:
            np.testing.assert_allclose(read.delta(weight), adapter.delta(weight), atol=1e-13)
    rows = ["a", None, "b", ("a", "b"), "b"]
    flora_torch.activate(model, "a", "b")
    with flora_torch.adapters_for_rows(model, rows):
        together = model(x)
    expected = [
        dense(**dict.fromkeys([row] if isinstance(row, str) else row or (), 1.0))[k] for k, row in enumerate(rows)
    ]
    torch.testing.assert_close(together.detach(), torch.stack(expected), rtol=1e-11, atol=1e-11)
    flora_torch.rename_adapter(model, "b", "c")
    flora_torch.detach(model, adapter_name="a")
    torch.testing.assert_close(model(x).detach(), dense(b=1.0), rtol=1e-11, atol=1e-11)
    remaining = updates_by_weight(model, "c")
    assert remaining[NAMES[0]].factor_0 is remaining[NAMES[1]].factor_0


def test_rows_with_stacks_of_their_own_give_the_gradients_of_each_alone():
    model = Net()
    for name, seed in (("a", 0), ("b", 7)):
        flora_torch.attach_adapter(model, stacked(seed=seed), adapter_name=name, dropout=0.0)
    x = torch.randn(4, 6, dtype=torch.float64)
    with flora_torch.adapters_for_rows(model, ["a", "b", "a", "b"]):
        model(x).square().sum().backward()
    found = [p.grad.clone() for p in flora_torch.adapter_parameters(model)]
    model.zero_grad()
    for name, rows in (("a", x[::2]), ("b", x[1::2])):
        flora_torch.activate(model, name)
        model(rows).square().sum().backward()
    flora_torch.activate(model, "a", "b")
    for got, parameter in zip(found, flora_torch.adapter_parameters(model), strict=True):
        torch.testing.assert_close(got, parameter.grad, rtol=1e-10, atol=1e-10)


def test_compiled_models_train_shared_factors_as_others_do():
    x = torch.randn(6, 6, dtype=torch.float64)
    results = []
    for compiled in (False, True):
        model, _ = attached()
        run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        optimizer = torch.optim.SGD(flora_torch.adapter_parameters(model), lr=0.01)
        for _ in range(2):
            optimizer.zero_grad()
            run(x).square().sum().backward()
            optimizer.step()
        assert_shared(model)
        results.append([p.detach() for p in flora_torch.adapter_parameters(model)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


def test_a_detached_and_a_merged_model_keep_nothing_of_a_stack():
    model, _ = attached()
    x = torch.randn(5, 6, dtype=torch.float64)
    expected, plain = model(x).detach(), Net()
    merged = flora_torch.merge(copy.deepcopy(model))
    torch.testing.assert_close(merged(x), expected, rtol=1e-11, atol=1e-11)
    assert set(merged.state_dict()) == set(plain.state_dict())
    detached = flora_torch.detach(model)
    assert set(detached.state_dict()) == set(plain.state_dict())
    assert torch.equal(detached(x), plain(x))


def test_state_dicts_of_shared_factors_go_through_torch_itself():
    """`state_dict` names a shared factor once a layer; loading it fills the one parameter in."""
    model = moved(attached()[0])
    other, _ = attached(stacked(seed=5))
    other.load_state_dict(model.state_dict())
    assert_shared(other)
    x = torch.randn(5, 6, dtype=torch.float64)
    assert torch.equal(other(x), model(x))
