"""Merging in place and back, weights of adapters, new names: the life of adapters on a model that runs."""

import copy
import itertools
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from flora_tensor import TuckerTensor
from flora_tensor.adapter import Adapter
from flora_torch import (
    FloraLinear,
    FloraParameter,
    activate,
    adapter_parameters,
    adapters_for_rows,
    attach,
    attach_adapter,
    detach,
    disabled,
    hotswap_adapter,
    load_adapter,
    merge,
    merge_,
    rename_adapter,
    save_adapter,
    unmerge_,
)
from flora_torch import update as update_module
from support import same_bits
from test_torch_layers import close

pytestmark = pytest.mark.usefixtures("seeded")


class Net(nn.Module):
    """A convolution, attention, tied embedding and output, and a shared layer."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1, groups=2)
        self.shared = nn.Linear(8, 8)
        self.twice = self.shared
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 9)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.conv(self.embed(ids).mT).mT
        x = self.twice(self.shared(x).tanh())
        return self.head(self.attention(x, x, x)[0])


IDS = torch.arange(10).reshape(2, 5) % 9
NAMES = ("a", "b")


def made(dtype=torch.float32, names=NAMES, **options):
    model = Net().to(dtype).eval()
    for name in names:
        attach(model, ranks=2, adapter_name=name, target_parameters="in_proj_weight", target_modules=[
            nn.Linear, nn.Conv1d, nn.Embedding
        ], **options)  # fmt: skip
    for parameter in adapter_parameters(model):
        nn.init.normal_(parameter, std=0.4)
    return model


def bits(model):
    return {name: value.clone() for name, value in model.named_parameters()}


def same(a, b):
    return a.keys() == b.keys() and all(same_bits(a[name], b[name]) for name in a)


def output(model, ids=IDS):
    with torch.no_grad():
        return model(ids)


class TestInPlace:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
    def test_there_and_back_to_the_bit(self, dtype):
        model = made(dtype)
        before, expected = bits(model), output(model)
        ids = [id(p) for p in model.parameters()]
        pointers = [p.data_ptr() for p in model.parameters()]
        assert merge_(model) is model
        assert not same(bits(model), before)
        assert close(output(model).double(), expected.double(), 8, 8, factor=1e3 * torch.finfo(dtype).eps / 2e-16)
        assert unmerge_(model) is model
        assert same(bits(model), before)
        assert torch.equal(output(model), expected)
        # Nothing was replaced: optimizers, captured graphs and views hold what they held.
        assert [id(p) for p in model.parameters()] == ids
        assert [p.data_ptr() for p in model.parameters()] == pointers

    def test_merged_weights_are_those_of_the_plain_model(self):
        model = made(torch.bfloat16)
        plain = dict(merge(copy.deepcopy(model)).named_parameters(remove_duplicate=False))
        merge_(model)
        assert torch.equal(model.head.base_layer.weight, plain["head.weight"])
        assert torch.equal(model.conv.base_layer.weight, plain["conv.weight"])
        assert torch.equal(model.attention.base_layer.in_proj_weight, plain["attention.in_proj_weight"])
        assert model.head.base_layer.weight is model.embed.base_layer.weight

    def test_each_is_idempotent(self):
        model = made()
        before = bits(model)
        assert same(bits(unmerge_(model)), before)
        once = bits(merge_(model))
        assert same(bits(merge_(model)), once)
        assert same(bits(merge_(model, "a")), once)
        assert same(bits(unmerge_(unmerge_(model))), before)

    def test_one_at_a_time_rounds_as_all_at_once(self):
        model = made(torch.bfloat16)
        before, together = bits(model), bits(merge_(model))
        unmerge_(model)
        merge_(model, "b")
        assert model.conv.merged_adapters == ("b",)
        assert same(bits(merge_(model, ["a"])), together)
        assert same(bits(unmerge_(model)), before)

    def test_one_merged_and_one_trained_on_top(self):
        model = made()
        expected = output(model)
        before = bits(model)
        merge_(model, "a")
        assert close(output(model), expected, 8, 8, factor=1e3)
        for parameter in adapter_parameters(model, "a"):
            parameter.requires_grad_(False)
        optimizer = torch.optim.SGD(adapter_parameters(model, "b"), lr=0.1)
        model.train()(IDS).square().mean().backward()
        optimizer.step()
        assert all(p.grad is not None for p in adapter_parameters(model, "b"))
        after = bits(unmerge_(model))
        changed = {name for name in before if not same_bits(before[name], after[name])}
        assert changed
        assert all(".b." in name for name in changed)

    def test_training_would_pass_a_merged_adapter_by(self):
        model = merge_(made())
        model.train()
        with pytest.raises(RuntimeError, match=r"adapter 'a' is merged into the weight and would not be trained"):
            model(IDS)
        output(model)
        unmerge_(model)(IDS).sum().backward()

    def test_state_dicts_and_files_are_those_of_the_unmerged_model(self, tmp_path):
        model = made()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        first = save_adapter(model, tmp_path / "before", adapter_name="a")
        merge_(model)
        state = model.state_dict()
        assert state.keys() == before.keys()
        assert all(same_bits(state[name], before[name]) for name in before)
        second = save_adapter(model, tmp_path / "merged", adapter_name="a")
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            assert (first / name).read_bytes() == (second / name).read_bytes()
        nested = nn.ModuleDict({"inner": model}).state_dict(prefix="p.")
        assert torch.equal(nested["p.inner.conv.base_layer.weight"], before["conv.base_layer.weight"])

    def test_copies_and_pickles_stay_merged_and_can_go_back(self):
        model = made()
        before = bits(model)
        merge_(model)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(output(twin), output(model))
            assert same(bits(unmerge_(twin)), before)
        assert model.conv.merged_adapters == NAMES

    def test_conversion_takes_the_originals_along(self):
        model = made()
        expected = bits(copy.deepcopy(model).to(torch.bfloat16))
        merge_(model, originals_on="cpu").to(torch.bfloat16)
        assert same(bits(unmerge_(model)), expected)

    def test_detached_and_plain_while_merged(self):
        model = made()
        before = bits(detach(copy.deepcopy(model)))
        merged = bits(merge(copy.deepcopy(model)))
        assert same(bits(detach(merge_(copy.deepcopy(model)))), before)
        assert same(bits(merge(merge_(copy.deepcopy(model)))), merged)
        assert same(bits(merge(merge_(copy.deepcopy(model), "b"))), merged)

    def test_what_a_merged_model_refuses(self, tmp_path):
        model = made()
        directory = save_adapter(model, tmp_path / "a", adapter_name="a")
        merge_(model, "a")
        merged = bits(model)
        for call, message in [
            (lambda: activate(model, "b"), "adapter 'a' is merged into the weights as it is; call unmerge_ first"),
            (lambda: activate(model, {"a": 0.5, "b": 1.0}), "'a' is merged into the weights as it is; call unmerge_"),
            (
                lambda: detach(model, "a"),
                "detach: adapter 'a' is merged into the weights in place; call unmerge_ first",
            ),
            (lambda: disabled(model).__enter__(), "disabled: adapter 'a' is merged into the weights in place"),
            (lambda: adapters_for_rows(model, ["a"]).__enter__(), "adapters_for_rows: adapter 'a' is merged"),
            (lambda: load_adapter(model, directory, adapter_name="a"), "load_adapter: adapter 'a' is merged"),
            (lambda: hotswap_adapter(model, directory, adapter_name="a"), "hotswap_adapter: adapter 'a' is merged"),
            (lambda: model.load_state_dict(model.state_dict()), "a state dict cannot be loaded while adapter 'a' is"),
            (lambda: setattr(model.conv, "enabled", False), "'a' is merged into the weight and cannot be switched off"),
            (
                lambda: setattr(model.conv, "active_adapters", []),
                "adapter 'a' is merged into the weight; call unmerge_",
            ),
            (lambda: model.conv.remove_adapter("a"), "adapter 'a' is merged into the weight; call unmerge_ first"),
            (lambda: model.conv.add_adapter("c", 2, magnitude=True), "'a' is merged into the weight that the update"),
        ]:
            with pytest.raises(ValueError, match=message):
                call()
            assert same(bits(model), merged)
            assert torch.equal(output(model), output(model))
        # What does not touch it is allowed.
        activate(model, "a")
        activate(model, "b", "a")
        rename_adapter(model, "a", "style")
        assert model.conv.merged_adapters == ("style",)

    def test_refusals_merge_nothing(self):
        model = made()
        before = bits(model)
        with torch.no_grad():
            model.head.tucker_update["a"].core.fill_(torch.inf)
        before = bits(model)
        with pytest.raises(ValueError, match=r"merge: \d+ of \d+ entries of 'weight' would be NaN or infinite"):
            merge_(model)
        assert same(bits(model), before)
        assert model.conv.merged_adapters == ()
        assert not model.conv.originals
        merge_(model, "b")
        merged = bits(model)
        with pytest.raises(ValueError, match="would be NaN or infinite"):
            merge_(model)
        assert same(bits(model), merged)
        assert same(bits(unmerge_(model)), before)

    def test_adapters_that_cannot_be_merged(self):
        model = made()
        activate(model, "a")
        for name, message in [("b", "'b' is not active; call activate first"), ("c", "no adapter 'c'; it has a, b")]:
            with pytest.raises(ValueError, match=message):
                merge_(model, name)
        with disabled(model), pytest.raises(ValueError, match="the adapters are disabled; merge outside of disabled"):
            merge_(model)
        for call in (merge_, unmerge_):
            with pytest.raises(ValueError, match="the model has no adapter; call attach first"):
                call(nn.Sequential(nn.Linear(2, 2)))

    def test_rows_and_merging_exclude_each_other(self):
        model = nn.Sequential(nn.Linear(3, 3))
        attach(model, ranks=1)
        with adapters_for_rows(model, [None]), pytest.raises(ValueError, match="outside of adapters_for_rows"):
            merge_(model)

    def test_a_tied_weight_that_is_changed_in_different_ways(self):
        weight = nn.Linear(4, 4)
        other = nn.Linear(4, 4)
        other.weight = weight.weight
        model = nn.Sequential(FloraLinear(weight, ranks=2), other)
        before = bits(model)
        with pytest.raises(
            ValueError, match=r"'0.weight' is held by several modules, which change it in different ways"
        ):
            merge_(model)
        assert same(bits(model), before)

    def test_a_computed_weight_cannot_be_written(self):
        model = nn.Sequential(weight_norm(nn.Linear(4, 4)))
        attach(model, ranks=2)
        with pytest.raises(ValueError, match=r"'0.weight' is computed by .*Linear from other parameters.* use merge"):
            merge_(model)

    def test_magnitudes_merge_and_go_back(self):
        model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.ConvTranspose2d(6, 4, 3, groups=2)).to(torch.bfloat16).eval()
        for name in NAMES:
            attach(model, ranks=2, adapter_name=name, magnitude=True)
        for parameter in adapter_parameters(model):
            nn.init.normal_(parameter)
        before, x = bits(model), torch.randn(2, 4, 6, 6).to(torch.bfloat16)
        with pytest.raises(ValueError, match="'b' has a magnitude, which rescales the original weight; merge it too"):
            merge_(model, "a")
        expected = output(merge(copy.deepcopy(model)), x)
        assert torch.equal(output(merge_(model), x), expected)
        assert same(bits(unmerge_(model)), before)
        activate(model, "a")
        merge_(model)
        with pytest.raises(ValueError, match="a magnitude rescales the layer's own weight, and adapter 'a' is merged"):
            activate(model, "a", "b")

    def test_devices_without_float64_sum_on_the_host(self, monkeypatch):
        model = made()
        expected = bits(merge(copy.deepcopy(model)))
        monkeypatch.setattr(update_module, "NO_FLOAT64", ("cpu",))
        assert same(bits(merge(model)), expected)


class TestWeights:
    def test_the_output_is_that_of_the_weighted_sum(self):
        model = made(torch.float64)
        layer = model.shared
        weight = layer.base_layer.weight
        activate(model, {"b": -0.25, "a": 0.7})
        assert layer.active_adapters == ["b", "a"]
        # ΔW without the multiplier, from the parts.
        parts = {name: layer.tucker_update[name].tucker.to_tensor() for name in NAMES}
        expected = weight + 0.7 * parts["a"] - 0.25 * parts["b"]
        x = torch.randn(3, 8).double()
        for path in ("factored", "dense"):
            layer.path = path
            assert close(layer(x), nn.functional.linear(x, expected, layer.bias), 8, 8)
        merged = merge(copy.deepcopy(model))
        assert close(merged.shared.weight, expected, 8, 8)
        assert "multiplier=0.7" in repr(model)

    def test_whatever_is_not_named_is_back_at_one(self):
        model = made()
        expected = output(model)
        activate(model, {"a": 0.5}, "b")
        assert not torch.allclose(output(model), expected)
        activate(model, *NAMES)
        assert torch.equal(output(model), expected)
        activate(model, {"a": 0.5})
        activate(model, "b")
        assert model.conv.tucker_update["a"].multiplier == 1.0

    def test_they_are_a_switch_and_are_not_stored(self, tmp_path):
        model = made()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        first = save_adapter(model, tmp_path / "one", adapter_name="a")
        activate(model, {"a": 0.5})
        assert all(same_bits(value, before[name]) for name, value in model.state_dict().items())
        second = save_adapter(model, tmp_path / "half", adapter_name="a")
        assert (first / "adapter_config.json").read_bytes() == (second / "adapter_config.json").read_bytes()
        assert copy.deepcopy(model).conv.tucker_update["a"].multiplier == 0.5

    def test_refusals_switch_nothing(self):
        model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).eval()
        change = TuckerTensor(np.ones((1, 1)), [np.ones((3, 1)), np.ones((3, 1))])
        attach_adapter(model, Adapter({"0.weight": change}, whole={"1.bias": np.ones(3)}), adapter_name="a")
        before = output(model, torch.ones(2, 3))
        for weight, message in [
            (float("nan"), "the weight of adapter 'a' is nan; pass a finite number"),
            (0.5, "adapter 'a' replaces tensors whole, which cannot be done in part; pass weight 1"),
        ]:
            with pytest.raises(ValueError, match=message):
                activate(model, {"a": weight})
        assert torch.equal(output(model, torch.ones(2, 3)), before)


class TestNames:
    def test_a_renamed_adapter_is_the_same_one(self, tmp_path):
        model = made()
        expected, parameters = output(model), [id(p) for p in adapter_parameters(model)]
        activate(model, {"b": 0.5})
        rename_adapter(model, "b", "c")
        assert list(model.conv.tucker_update) == ["a", "c"]
        assert model.conv.active_adapters == ["c"]
        assert model.attention.tucker_update["c"]["in_proj_weight"].multiplier == 0.5
        activate(model, "a", "c")
        assert torch.equal(output(model), expected)
        assert [id(p) for p in adapter_parameters(model)] == parameters
        rename_adapter(model, "a", "a")
        assert list(model.conv.tucker_update) == ["a", "c"]
        save_adapter(model, tmp_path / "c", adapter_name="c")

    def test_tensors_replaced_whole_follow(self):
        model = nn.Sequential(nn.Linear(3, 3))
        before = bits(model)
        attach_adapter(model, Adapter({}, whole={"0.bias": np.ones(3)}), adapter_name="a")
        rename_adapter(model, "a", "b")
        activate(model)
        assert same(bits(model), before)
        activate(model, "b")
        assert bool((model[0].bias == 1).all())

    def test_refusals_rename_nothing(self):
        model = made()
        for old, new, message in [
            ("c", "d", "the model has no adapter 'c'; it has a, b"),
            ("a", "b", "the model has an adapter 'b' already; detach it first"),
            ("a", "x.y", "an adapter cannot be named 'x.y'; choose another name"),
            ("a", "", "an adapter cannot be named ''"),
        ]:
            with pytest.raises(ValueError, match=message):
                rename_adapter(model, old, new)
        for old, new, message in [
            ("c", "d", "there is no adapter 'c'; it has a, b"),
            ("a", "b", "there is an adapter 'b' already"),
            ("a", "items", "an adapter cannot be named 'items'"),
        ]:
            with pytest.raises(ValueError, match=message):
                model.conv.rename_adapter(old, new)
        assert list(model.conv.tucker_update) == ["a", "b"]

    def test_adapters_come_and_go_in_any_order(self):
        """Every order of adding, activating, merging and removing ends at the model itself."""
        for order in itertools.permutations(["a", "b", "c"]):
            model = nn.Sequential(nn.Linear(4, 4), nn.Conv1d(4, 4, 1)).eval()
            before = bits(model)
            for k, name in enumerate(order):
                attach(model, ranks=k + 1, adapter_name=name, init="official")
                for parameter in adapter_parameters(model, name):
                    nn.init.normal_(parameter)
                merge_(model)
                unmerge_(model)
            for name in ("b", "a"):
                detach(model, name)
            assert model[0].active_adapters == ["c"]
            merge_(model)
            assert same(bits(detach(model)), before)


def test_a_layer_by_itself():
    layer = FloraLinear(nn.Linear(4, 3), ranks=2)
    nn.init.normal_(layer.tucker_update["default"].core)
    expected = output(layer.eval(), torch.ones(2, 4))
    assert close(output(merge_(layer), torch.ones(2, 4)), expected, 4, 3)
    assert "merged_adapters=['default']" in repr(layer)
    assert torch.equal(output(unmerge_(layer), torch.ones(2, 4)), expected)
    many = FloraParameter(nn.LSTM(3, 4), "weight_ih_l0", 2).eval()
    many.add_adapter("default", 2, parameter="weight_hh_l0")
    for parameter in many.tucker_update.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(5, 1, 3)
    with torch.no_grad():
        expected = many(x)[0]
        assert close(merge_(many)(x)[0], expected, 4, 4, factor=1e3)
        assert torch.equal(unmerge_(many)(x)[0], expected)
    one = merge_(FloraParameter(nn.LSTM(3, 4), "weight_ih_l0", 2))
    with pytest.raises(ValueError, match="is merged into the weight that the update belongs to; call unmerge_ first"):
        one.add_adapter("default", 2, parameter="weight_hh_l0")
