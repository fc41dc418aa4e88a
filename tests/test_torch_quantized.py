"""Weights that are quantized: in a tensor, in a layer, in bytes, and in ways that nothing is known of."""

import copy
import sys
import types
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as nnf
from torch import nn

from flora_tensor import Arrangement, FloraWarning
from flora_torch import (
    FloraConv,
    adapter_parameters,
    attach,
    detach,
    disabled,
    load_adapter,
    merge,
    merge_,
    save_adapter,
)
from flora_torch.base_weight import dense_value, describe
from support import tolerance
from torch_models import close, randomize

pytestmark = pytest.mark.usefixtures("one_thread", "seeded")


class ScaledInt8(torch.Tensor):
    """A tensor of integers and scales that stands for their product, as those of torchao and quanto do."""

    @staticmethod
    def __new__(cls, values, scales):
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=scales.dtype, device=values.device)

    def __init__(self, values, scales):
        self.values, self.scales = values, scales

    @classmethod
    def of(cls, weight):
        scales = weight.abs().amax(1, keepdim=True) / 127
        return cls((weight / scales).round().to(torch.int8), scales)

    def dequantize(self, *args):
        return self.values.to(self.scales.dtype) * self.scales

    def __repr__(self, **options):
        return "ScaledInt8()"

    @classmethod
    def __torch_dispatch__(cls, function, kinds, args=(), kwargs=None):
        if function in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return cls(args[0].values, args[0].scales)
        plain = [a.dequantize() if isinstance(a, cls) else a for a in args]
        return function(*plain, **(kwargs or {}))


def quantized_tensor(linear):
    linear.weight = nn.Parameter(ScaledInt8.of(linear.weight.detach()), requires_grad=False)
    return linear


class UnpackedLinear(nn.Module):
    """A linear layer with packed values and a method that gives the weight, as that of HQQ has."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.W_q = nn.Parameter((linear.weight.detach() * 1000).round().to(torch.int16), requires_grad=False)
        self.bias, self.compute_dtype = linear.bias, linear.weight.dtype

    def dequantize(self):
        return self.W_q.to(self.compute_dtype) / 1000

    def forward(self, x):
        return nnf.linear(x, self.dequantize(), self.bias)


class Params4bit(nn.Parameter):
    """Packed values with a state that describes them, as bitsandbytes has."""


class Linear4bit(nn.Linear):
    """A linear layer of such a parameter: flat bytes, of another shape than the weight."""

    def forward(self, input):
        weight = bitsandbytes_stub().functional.dequantize_4bit(self.weight, self.weight.quant_state)
        return nnf.linear(input, weight, self.bias)


def bitsandbytes_stub():
    def dequantize_4bit(data, state):
        high, low = data.reshape(-1) >> 4, data.reshape(-1) & 15
        return ((torch.stack([high, low], 1).reshape(state.shape).to(state.dtype) - 8) / 20).to(state.dtype)

    return types.SimpleNamespace(functional=types.SimpleNamespace(dequantize_4bit=dequantize_4bit))


def four_bits(linear):
    layer = Linear4bit(linear.in_features, linear.out_features).to(linear.weight.dtype)
    codes = (linear.weight.detach() * 20 + 8).round().clamp(0, 15).to(torch.uint8).reshape(-1, 2)
    layer.weight = Params4bit((codes[:, 0] << 4 | codes[:, 1]).reshape(-1, 1), requires_grad=False)
    layer.weight.quant_state = types.SimpleNamespace(shape=linear.weight.shape, dtype=linear.weight.dtype)
    layer.bias = linear.bias
    return layer


class PackedLinear(nn.Linear):
    """A quantized layer of which nothing but its product is known."""

    def forward(self, input):
        return nnf.linear(input, self.weight.to(input.dtype) / 100, self.bias)


def packed(linear):
    layer = PackedLinear(linear.in_features, linear.out_features).to(linear.weight.dtype)
    values = (linear.weight.detach() * 100).round().clamp(-127, 127).to(torch.int8)
    layer.weight, layer.bias = nn.Parameter(values, requires_grad=False), linear.bias
    return layer


QUANTIZED: dict[str, Any] = {"tensor": quantized_tensor, "unpacked": UnpackedLinear, "bytes": four_bits}


def real(name):
    """Quantize by a real library, where it is installed."""
    if name.startswith("torchao"):
        quantization = pytest.importorskip("torchao.quantization", exc_type=ImportError)
        config = {"torchao int8": "Int8WeightOnlyConfig", "torchao fp8": "Float8WeightOnlyConfig"}[name]

        def quantize(linear):
            model = nn.Sequential(linear.float())
            quantization.quantize_(model, getattr(quantization, config)())
            return model[0]

    else:
        bnb: Any = pytest.importorskip("bitsandbytes", exc_type=ImportError)

        def quantize(linear):
            sizes = linear.in_features, linear.out_features
            if name == "bitsandbytes nf4":
                layer = bnb.nn.Linear4bit(*sizes, compute_dtype=torch.float32, quant_type="nf4")
                layer.weight = bnb.nn.Params4bit(linear.weight.data.float(), requires_grad=False, quant_type="nf4")
            else:
                layer = bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False)
                layer.weight = bnb.nn.Int8Params(linear.weight.data.float(), requires_grad=False)
            layer.bias = nn.Parameter(linear.bias.data.float())
            return layer.to("cpu")

    return quantize


REAL = ("torchao int8", "torchao fp8", "bitsandbytes nf4", "bitsandbytes int8")


class TestQuantized:
    @pytest.fixture(params=[*QUANTIZED, *REAL])
    def quantize(self, request, monkeypatch):
        name = request.param
        if name == "bytes":
            monkeypatch.setitem(sys.modules, "bitsandbytes", bitsandbytes_stub())
        function = QUANTIZED.get(name) or real(name)

        def quantize():
            torch.manual_seed(1)
            return nn.Sequential(function(nn.Linear(16, 12)), nn.Tanh(), function(nn.Linear(12, 16)))

        return quantize

    @pytest.mark.filterwarnings("ignore")
    def test_an_update_beside_a_base_that_stays_quantized(self, quantize, tmp_path):
        model, x = quantize(), torch.randn(5, 16)
        with torch.no_grad():
            start = model(x)
        dense = [dense_value(model[k], "weight").clone() for k in (0, 2)]
        report = attach(model, ranks=3)
        assert [(layer.name, layer.kind, layer.shape) for layer in report.layers] == [
            ("0.weight", "FloraLinear", (12, 16)),
            ("2.weight", "FloraLinear", (16, 12)),
        ]
        assert not report.skipped
        with torch.no_grad():
            assert torch.equal(model(x), start)
        randomize(model)
        output = model(x)
        output.sum().backward()
        assert all(bool(p.grad.abs().sum() > 0) for p in adapter_parameters(model))
        expected = x
        for k, weight in zip((0, 2), dense):
            change = model[k].tucker_update["default"].delta()
            expected = nnf.linear(expected, weight + change, model[k].bias)
            expected = expected.tanh() if k == 0 else expected
            assert close(model[k].weight, weight + change, 30)
        assert close(output, expected)
        model[0].path = "dense"
        assert close(model(x), expected)
        with disabled(model), torch.no_grad():
            assert torch.equal(model(x), start)
        again = quantize()
        load_adapter(again, save_adapter(model, tmp_path / "adapter"))
        assert close(again(x), output, 30)
        # The names and shapes are those of the float model.
        load_adapter(nn.Sequential(nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 16)), tmp_path / "adapter")
        with pytest.raises(ValueError, match=r"is quantized, .* keep the adapter beside it, or use merge, which"):
            merge_(model)
        merged = merge(model)
        assert [type(module) for module in merged] == [nn.Linear, nn.Tanh, nn.Linear]
        assert close(merged(x), output)

    @pytest.mark.filterwarnings("ignore")
    def test_the_principal_part_and_arrangements(self, quantize):
        model, x = quantize(), torch.randn(5, 16)
        with torch.no_grad():
            start = model(x)
        pattern = Arrangement("(a b) i -> a b i", {"a": 4})
        attach(model, ranks=2, init="principal", arrangement={"*": pattern})
        with torch.no_grad():
            assert torch.equal(model(x), start)
        randomize(model)
        expected = model(x)
        assert close(merge(model)(x), expected)

    def test_a_magnitude_of_a_quantized_weight(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "bitsandbytes", bitsandbytes_stub())
        for quantize in QUANTIZED.values():
            model, x = nn.Sequential(quantize(nn.Linear(16, 12))), torch.randn(5, 16)
            start = model(x)
            attach(model, ranks=2, magnitude=True)
            assert close(model(x), start, 30)
            randomize(model)
            expected = model(x)
            assert not close(expected, start)
            assert close(merge(model)(x), expected)

    def test_a_base_that_nothing_is_known_of_trains_but_does_not_merge(self):
        model, x = nn.Sequential(packed(nn.Linear(16, 12))), torch.randn(3, 16)
        with torch.no_grad():
            start = model(x)
        attach(model, ranks=2)
        with torch.no_grad():
            assert torch.equal(model(x), start)
        randomize(model)
        output = model(x)
        assert close(output, start + x @ model[0].tucker_update["default"].delta().mT)
        with pytest.raises(ValueError, match=r"merge: the weight of this PackedLinear is quantized, and no way to"):
            merge(model)
        assert torch.equal(model(x), output)
        with pytest.raises(ValueError, match=r"attach: 0.weight: the weight of this PackedLinear is quantized"):
            attach(model, ranks=2, init="principal", adapter_name="other")

    @pytest.mark.parametrize("by_peft", [False, True])
    def test_a_config_that_goes_on_saying_quantized(self, by_peft):
        """As one of transformers does, whose from_pretrained then looks for packed weights where floats are."""
        model = nn.Sequential(quantized_tensor(nn.Linear(16, 12)), nn.Linear(12, 4))
        model.config = types.SimpleNamespace(quantization_config={"quant_method": "some"})

        def merged(targets):
            if by_peft:
                peft = pytest.importorskip("flora_torch.peft")
                return (
                    pytest.importorskip("peft")
                    .get_peft_model(model, peft.FloraConfig(ranks=2, target_modules=targets))
                    .merge_and_unload()
                )
            attach(model, ranks=2, target_modules=targets)
            return merge(model)

        merged(["1"])  # a float layer: nothing to warn of
        with pytest.warns(FloraWarning, match=r"1 quantized layer became float.* merge it into the float model"):
            plain = merged(["0", "1"])
        assert [type(layer) for layer in plain] == [nn.Linear, nn.Linear]

    def test_packed_layers_of_torch_are_refused(self):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "(?s).*deprecated", UserWarning)  # newer versions of torch
            layer = torch.ao.nn.quantized.dynamic.Linear(4, 3)
        model = nn.Sequential(layer, nn.Linear(3, 2))
        message = "Linear of torch.ao.nn.quantized.dynamic.modules is packed for inference and passes no gradient on"
        report = attach(model, ranks=2)
        assert [layer.name for layer in report.layers] == ["1.weight"]
        assert [weight.name for weight in report.skipped] == ["0.weight"]
        assert report.skipped[0].reason.startswith(message)
        detach(model)
        with pytest.raises(ValueError, match=f"attach: 0.weight: {message}"):
            attach(model, ranks=2, target_modules="0")


def test_descriptions_of_weights():
    linear = nn.Linear(3, 2)
    assert describe(linear, "weight").storage == "plain"
    assert describe(linear, "scale") is None
    assert describe(quantized_tensor(linear), "weight").storage == "quantized"
    assert describe(UnpackedLinear(nn.Linear(3, 2)), "weight").shape == (2, 3)


@pytest.mark.parametrize("path", ["auto", "dense", "factored"])
@pytest.mark.parametrize("arrangement", [None, "o (i w)"])
def test_a_base_that_its_hooks_keep_in_8_bits(path: Any, arrangement: str | None):
    """As `enable_layerwise_casting` of diffusers does, after adapters were put on."""
    base = nn.Conv1d(8, 8, 3, groups=2)
    layer = FloraConv(base, 2, path=path, arrangement=arrangement)
    for parameter in adapter_parameters(layer):
        nn.init.normal_(parameter, std=0.3)
    base.to(torch.float8_e4m3fn)
    stored = copy.deepcopy(base).float()
    base.register_forward_pre_hook(lambda module, _: module.float() and None)
    base.register_forward_hook(lambda module, _, output: (module.to(torch.float8_e4m3fn), output)[1])
    x = torch.randn(2, 8, 9)
    weight = stored.weight + layer.updates("default")["weight"].delta()
    expected = nnf.conv1d(x, weight, stored.bias, groups=2)
    bound = tolerance("float32", 12, norm=float(expected.detach().norm()))
    for trains in (False, True):
        with torch.set_grad_enabled(trains):
            assert float((layer(x) - expected).detach().norm()) <= bound
    wanted = list(adapter_parameters(layer))
    for ours, theirs in zip(*(torch.autograd.grad(y.square().sum(), wanted) for y in (layer(x), expected))):
        assert float((ours - theirs).norm()) <= tolerance("float32", 100, norm=float(theirs.norm()))
    assert base.weight.dtype == torch.float8_e4m3fn
