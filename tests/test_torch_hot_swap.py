"""Another adapter in the parameters of one that is there: exact, all or nothing, and nothing is compiled again."""

import copy
import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

import flora_tensor as ft
from flora_tensor import TuckerTensor
from flora_tensor.adapter import Adapter
from flora_torch import (
    activate,
    adapter_parameters,
    attach,
    attach_adapter,
    disabled,
    hot_swap,
    hotswap_adapter,
    save_adapter,
)
from support import same_bits
from test_torch_layers import close

pytestmark = pytest.mark.usefixtures("seeded", "large_products")


def net(dtype=torch.float64):
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(128, 6)).to(dtype).eval()


X = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1)).double()


def trained(model, **options):
    attach(model, **options)
    for parameter in adapter_parameters(model):
        nn.init.normal_(parameter, std=0.3)
    return model


def output(model, x=X):
    with torch.no_grad():
        return model(x)


def bits(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(same_bits(a[name], b[name]) for name in a)


class TestSwap:
    @pytest.mark.parametrize("magnitude", [False, True])
    def test_equal_forms_are_swapped_bit_for_bit(self, magnitude, tmp_path):
        base = net(torch.float32)
        mine, other = copy.deepcopy(base), copy.deepcopy(base)
        trained(mine, ranks=3, scale=0.5, magnitude=magnitude)
        trained(other, ranks=3, scale=0.5, magnitude=magnitude)
        parameters = [(id(p), p.data_ptr()) for p in mine.parameters()]
        hotswap_adapter(mine, save_adapter(other, tmp_path / "other"))
        assert same(bits(mine), bits(other))
        assert [(id(p), p.data_ptr()) for p in mine.parameters()] == parameters

    @pytest.mark.parametrize("init", ["orthonormal", "principal"])
    def test_lower_ranks_other_scales_and_starts(self, init, tmp_path):
        for k, (mine_init, magnitude) in enumerate(itertools.product(["official", "principal"], [False, True])):
            base = net()
            mine, other = copy.deepcopy(base), copy.deepcopy(base)
            trained(mine, ranks=8, scale=0.5, init=mine_init, magnitude=magnitude)
            # A start doubles the ranks of what is stored, and makes more of a mode than it has entries.
            trained(other, ranks={"0": (3, 2, 1, 2), "*": 3}, scale=-2.0, init=init)
            expected, before = output(other), output(mine)
            hotswap_adapter(mine, save_adapter(other, tmp_path / str(k)))
            assert not torch.allclose(before, output(mine))
            assert close(output(mine), expected, 8, 128, factor=300)
            assert mine[0].tucker_update["default"].scale == 0.5

    def test_whole_modes_on_either_side(self):
        rng, base = np.random.default_rng(0), nn.Sequential(nn.Linear(4, 3, bias=False)).double()
        whole = TuckerTensor(rng.standard_normal((3, 4)), [None, None])
        low = TuckerTensor(rng.standard_normal((1, 2)), [rng.standard_normal((3, 1)), rng.standard_normal((4, 2))])
        mixed = TuckerTensor(rng.standard_normal((3, 2)), [None, rng.standard_normal((4, 2))])
        square = TuckerTensor(rng.standard_normal((3, 4)), [rng.standard_normal((n, n)) for n in (3, 4)])
        for there, given in itertools.product([whole, square], [whole, low, mixed, square]):
            model = copy.deepcopy(base)
            attach_adapter(model, {"0.weight": there})
            hotswap_adapter(model, {"0.weight": given})
            expected = base[0].weight + torch.from_numpy(given.to_tensor())
            assert close(model[0].weight, expected, 3, 4)

    def test_a_weight_that_the_new_one_does_not_change(self, tmp_path):
        for magnitude in (False, True):
            base = net()
            mine, other = copy.deepcopy(base), copy.deepcopy(base)
            trained(mine, ranks=3, init="principal", magnitude=magnitude)
            trained(other, ranks=2, target_modules=nn.Linear)
            hotswap_adapter(mine, save_adapter(other, tmp_path / f"other{magnitude}"))
            assert close(output(mine), output(other), 8, 128, factor=300)

    def test_activity_weight_and_dropout_stay(self, tmp_path):
        base = net()
        mine, other = copy.deepcopy(base), copy.deepcopy(base)
        trained(mine, ranks=3, adapter_name="a", dropout=0.25)
        trained(other, ranks=3)
        activate(mine, {"a": 0.5})
        expected = (output(base[:1]) + output(other[:1])) / 2
        hotswap_adapter(mine, save_adapter(other, tmp_path / "other"), adapter_name="a")
        assert close(output(mine[:1]), expected, 8, 27)
        assert mine[0].tucker_update["a"].dropout == 0.25

    def test_tensors_replaced_whole(self):
        model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).eval()
        before = bits(model)
        names = {"0.bias": np.ones(3), "1.running_mean": np.ones(3)}
        attach_adapter(model, Adapter({}, whole=names), adapter_name="a")
        pointer = model[0].bias.data_ptr()
        hotswap_adapter(model, Adapter({}, whole=dict.fromkeys(names, np.full(3, 2.0))), adapter_name="a")
        assert bool((model[0].bias == 2).all())
        assert bool((model[1].running_mean == 2).all())
        assert model[0].bias.data_ptr() == pointer
        with disabled(model):
            assert same(bits(model), before)
            hotswap_adapter(model, Adapter({}, whole=dict.fromkeys(names, np.full(3, 3.0))), adapter_name="a")
            assert same(bits(model), before)
        assert bool((model[0].bias == 3).all())

    def test_a_compiled_model_is_not_compiled_again(self, tmp_path):
        torch._dynamo.reset()
        base = net()
        mine, others = copy.deepcopy(base), [copy.deepcopy(base) for _ in range(2)]
        trained(mine, ranks=6)
        trained(others[0], ranks=6)
        trained(others[1], ranks=2, scale=3.0)
        counter = CompileCounter()
        compiled = torch.compile(mine, backend=counter, fullgraph=True)
        output(compiled)
        assert counter.frame_count == 1
        for k, other in enumerate(others):
            hotswap_adapter(mine, save_adapter(other, tmp_path / str(k)))
            assert close(output(compiled), output(other), 8, 128, factor=300)
        assert counter.frame_count == 1
        # The counter does count: a change that the graph depends on compiles it again.
        activate(mine)
        output(compiled)
        assert counter.frame_count == 2


class TestRefusals:
    def test_nothing_is_changed(self, tmp_path):
        base = net()
        model = trained(copy.deepcopy(base), ranks=3)
        before = bits(model)

        def written(name, **options):
            return save_adapter(trained(copy.deepcopy(base), **options), tmp_path / name)

        rng = np.random.default_rng(0)
        inverted = TuckerTensor(rng.standard_normal((1, 1)), [np.ones((24, 1)), np.ones((9, 1))])
        arranged = Adapter(
            {"0.weight": inverted}, {"0.weight": ft.Arrangement("(o h) (i w)")}, shapes={"0.weight": (8, 3, 3, 3)}
        )
        high = TuckerTensor(np.full((1, 1), 1e200), [np.full((6, 1), 1e200), np.ones((128, 1))])
        for source, message in [
            (
                written("higher", ranks=4),
                r"'0.weight' has rank 4 for mode 0 in the new adapter, and there is room for 3",
            ),
            (
                written("magnitude", ranks=2, magnitude=True),
                "'0.weight' has a magnitude in the new adapter, and the one",
            ),
            (arranged, r"'0.weight' is arranged as 'o i h w' in the model and as '\(o h\) \(i w\)' in the new"),
            (Adapter({}, whole={"0.bias": np.ones(8)}), "'0.bias' is replaced whole by only one of the two adapters"),
            ({"5.weight": inverted}, "'5.weight' is changed by the new adapter and not by 'default'"),
            ({"3.weight": high.map(lambda a: a * np.inf)}, "'3.weight' has NaN or infinite entries"),
        ]:
            with pytest.raises(ValueError, match=message):
                hotswap_adapter(model, source)
            assert same(bits(model), before)
        with pytest.raises(ValueError, match="the model has no adapter 'other'; attach or load one first"):
            hotswap_adapter(model, arranged, adapter_name="other")
        with pytest.raises(OSError, match="nothing_here"):
            hotswap_adapter(model, tmp_path / "nothing_here")

    def test_what_no_core_can_hold(self, tmp_path):
        base = nn.Sequential(nn.Linear(4, 4))
        model = trained(copy.deepcopy(base), ranks=2, scale=0.0)
        other = trained(copy.deepcopy(base), ranks=2)
        before = bits(model)
        with pytest.raises(ValueError, match=r"'0.weight' has scale 0 in the model, which no core can make 1"):
            hotswap_adapter(model, save_adapter(other, tmp_path / "a"))
        narrow = trained(copy.deepcopy(base), ranks=2, dtype=torch.float16)
        loud = {"0.weight": TuckerTensor(np.full((1, 1), 1e6), [np.ones((4, 1)), np.ones((4, 1))])}
        with pytest.raises(ValueError, match=r"'0.weight' would not be finite in torch.float16"):
            hotswap_adapter(narrow, loud)
        assert same(bits(model), before)

    def test_adapters_that_are_spread_over_processes(self, monkeypatch, tmp_path):
        model = trained(net(), ranks=2)
        directory = save_adapter(model, tmp_path / "a")
        monkeypatch.setattr(hot_swap, "is_sharded", lambda tensor: True)
        with pytest.raises(ValueError, match=r"adapter of '0.weight' is spread over processes .* use load_adapter"):
            hotswap_adapter(model, directory)

    def test_shapes_of_whole_tensors(self):
        model = nn.Sequential(nn.Linear(3, 3))
        attach_adapter(model, Adapter({}, whole={"0.bias": np.ones(3)}))
        with pytest.raises(
            ValueError, match=r"'0.bias' is of shape \(3,\), not \(4,\); pass the adapter of this model"
        ):
            hotswap_adapter(model, Adapter({}, whole={"0.bias": np.ones(4)}))
