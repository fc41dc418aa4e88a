"""Layers with a trained magnitude for each output channel: everything that holds of a layer holds of them too."""

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

import flora_tensor as ft
import test_torch_layers as layers
from flora_torch import (
    FloraConv,
    FloraConvTranspose,
    FloraEmbedding,
    FloraLayer,
    FloraLinear,
    FloraParameter,
    TuckerUpdate,
    attach,
    attach_adapter,
    load_adapter,
    save_adapter,
)
from flora_torch.update import DROPOUTS
from support import same_bits
from test_torch_layers import close, randomize

pytestmark = pytest.mark.usefixtures("seeded", "large_products")


def rescaled(weight: torch.Tensor, update: TuckerUpdate) -> torch.Tensor:
    """Compute m · (W + ΔW) / ‖W + ΔW‖ channel by channel, the norm held constant."""
    total = weight + update.delta()
    axis, groups = update.channels
    rows = total.shape[0] // groups
    slices: list[Any] = []
    for k in range(len(update.magnitude)):
        group, column = divmod(k, total.shape[1])
        slices.append((k,) if axis == 0 else (slice(group * rows, (group + 1) * rows), column))
    ratio = torch.ones_like(total)
    for k, where in enumerate(slices):
        mask = torch.zeros_like(total)
        mask[where] = 1.0
        ratio = ratio + mask * (update.magnitude[k] / total[where].detach().norm() - 1.0)
    return ratio * total


class MagnitudeCase:
    """What the cases of layers need to know of magnitudes."""

    def effective(self, layer: FloraLayer) -> torch.Tensor:
        return rescaled(layer.base_layer.weight, layer.updates("default")["weight"])

    def test_reading_the_parameter_gives_the_effective_one(self):
        layer = self.made()
        assert close(layer.weight, self.effective(layer), *self.sizes)
        layer.enabled = False
        assert layer.weight is layer.base_layer.weight

    def test_adapters_add_up(self):
        """Each changes the layer by as much as it would alone, beside adapters with and without a magnitude."""
        layer, inputs = self.made(), self.inputs_in(torch.float64)
        layer.add_adapter("second", 2, scale=-1.5, magnitude=True)
        layer.add_adapter("third", 2)
        randomize(layer)
        weight = layer.base_layer.weight
        parts = [rescaled(weight, layer.updates(name)["weight"]) - weight for name in ("default", "second")]
        both = weight + sum(parts) + layer.updates("third")["weight"].delta()
        reference = self.result(functional_call(layer.base_layer, {"weight": both}, inputs))
        for path in self.paths:
            assert close(self.result(self.with_path(layer, path)(*inputs)), reference, *self.sizes, factor=60)

    def test_multiplier_scales_the_whole_change(self):
        layer, inputs = self.made(), self.inputs_in(torch.float64)
        weight, update = layer.base_layer.weight, layer.updates("default")["weight"]
        update.multiplier = -0.5
        part = weight - 0.5 * (rescaled(weight, update) - weight)
        reference = self.result(functional_call(layer.base_layer, {"weight": part}, inputs))
        for path in self.paths:
            assert close(self.result(self.with_path(layer, path)(*inputs)), reference, *self.sizes, factor=60)
        assert close(layer.merged().weight, part, *self.sizes)

    def test_narrow_adapters_keep_wide_magnitudes(self):
        """Whatever the types of base and update, an untrained magnitude gives a ratio of exactly one on every path."""
        for base_type, dtype in itertools.product((torch.float32, torch.bfloat16), (torch.float32, torch.bfloat16)):
            base = self.base().to(base_type)
            layer, inputs = self.wrap(base, dtype=dtype), self.inputs_in(base_type)
            assert layer.updates("default")["weight"].magnitude.dtype == torch.float32
            for path in self.paths:
                assert torch.equal(self.with_path(layer, path)(*inputs), base(*inputs))
            assert torch.equal(layer.merged().weight, base.weight)
            with torch.autocast("cpu", torch.bfloat16):
                assert torch.equal(layer(*inputs), base(*inputs))

    def test_a_small_magnitude_counts_under_autocast(self):
        """A ratio of 1.001 is one in bfloat16, and its effect on a wide output is not."""
        base = self.base()
        layer, inputs = self.wrap(base), self.inputs_in(torch.float32)
        with torch.no_grad():
            layer.updates("default")["weight"].magnitude.mul_(1.001)
        update = layer.updates("default")["weight"]
        change = update.rescale(torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.bfloat16), torch.full((1, 1), 1.001))
        assert abs(change.item() - 0.001) < 1e-6
        expected = functional_call(base, {"weight": 1.001 * base.weight}, inputs)
        assert close(layer(*inputs), expected, *self.sizes)

    def test_the_start_of_a_change_keeps_its_output(self):
        """A magnitude that starts beside a known change rescales nothing of it."""
        base = self.base().double()
        delta = torch.randn_like(base.weight)
        plain = self.wrap(copy.deepcopy(base), init="from_delta", tensor=delta)
        layer = self.wrap(base, init="from_delta", tensor=delta, magnitude=True)
        # The case's own ranks and options are those of `wrap`; the magnitude alone differs.
        reference = layers.LayerCase.effective(self, plain)
        assert close(layer.weight, reference, *self.sizes)


class TestLinear(MagnitudeCase, layers.TestLinear):
    def wrap(self, base, **options):
        return FloraLinear(base, ranks=(3, 4), **{"magnitude": True, **options})


class TestConv1DOfTransformers(MagnitudeCase, layers.TestConv1DOfTransformers):
    test_dropout_drops_the_updates_input_in_training_only = test_compiles_without_a_graph_break = None

    def base(self):
        return Conv1D(16, 24)

    def wrap(self, base, **options):
        return FloraLinear(base, ranks=(3, 4), **{"magnitude": True, **options})


class TestConv2d(MagnitudeCase, layers.TestConv2d):
    test_dropout_drops_the_updates_input_in_training_only = test_compiles_without_a_graph_break = None

    def wrap(self, base, **options):
        return FloraConv(base, ranks=3, **{"magnitude": True, **options})


class TestConvTranspose2d(MagnitudeCase, layers.TestConvTranspose2d):
    test_dropout_drops_the_updates_input_in_training_only = None

    def wrap(self, base, **options):
        return FloraConvTranspose(base, ranks=3, **{"magnitude": True, **options})


class TestEmbedding(MagnitudeCase, layers.TestEmbedding):
    def wrap(self, base, **options):
        return FloraEmbedding(base, ranks=(4, 3), **{"magnitude": True, **options})


class TestModels:
    def model(self):
        net = nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 11))
        net[3].weight = net[0].weight
        return net

    @pytest.mark.parametrize("init", ["orthonormal", "principal"])
    @pytest.mark.parametrize("dtype", [None, torch.bfloat16])
    def test_saved_and_loaded_bit_for_bit(self, init, dtype, tmp_path):
        model, ids = self.model(), torch.arange(6).reshape(2, 3)
        twin = copy.deepcopy(model)
        before = model(ids)
        options = dict.fromkeys(DROPOUTS, 0.25)
        report = attach(model, ranks=2, init=init, dtype=dtype, magnitude=True, scale=1.7, **options)
        assert report.n_parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
        if dtype is None:
            assert torch.equal(model.eval()(ids), before)
        randomize(model)
        directory = save_adapter(model, tmp_path / "adapter")
        for _ in range(2):
            # The first time it is attached, the second time filled.
            load_adapter(twin, directory)
            assert set(twin.state_dict()) == set(model.state_dict())
            assert all(same_bits(value, twin.state_dict()[name]) for name, value in model.state_dict().items())
            randomize(twin)
        load_adapter(twin, directory)
        assert torch.equal(twin.eval()(ids), model.eval()(ids))

    def test_files_merge_without_torch_to_the_same_weights(self, tmp_path):
        model = nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2), nn.Conv2d(6, 4, 3), nn.Linear(4, 4))
        base = {name: value.clone() for name, value in model.state_dict().items()}
        attach(model, ranks=2, magnitude=True)
        randomize(model)
        stored = ft.load_adapter(save_adapter(model, tmp_path / "adapter"))
        assert stored.channels["0.weight"] == (1, 2)
        for name in stored:
            merged = model[int(name[0])].merged().weight
            weight = base[name].double().numpy()
            assert close(
                torch.from_numpy(stored.change(name, weight, dtype="f8") + weight).float(), merged, *merged.shape
            )

    def test_layers_without_output_channels_are_refused(self):
        with pytest.raises(ValueError, match="FloraParameter knows none of Bilinear; pass magnitude=False"):
            FloraParameter(nn.Bilinear(3, 3, 3), "weight", 2, magnitude=True)
        model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 8, batch_first=True))
        before = [p.requires_grad for p in model.parameters()]
        with pytest.raises(
            ValueError, match=r"attach: 0.self_attn.in_proj_weight: a magnitude needs a weight with output"
        ):
            attach(model, ranks=2, magnitude=True, target_parameters="in_proj_weight")
        assert [p.requires_grad for p in model.parameters()] == before

    def test_magnitudes_of_another_layout_are_refused(self):
        linear, conv = nn.Linear(4, 4), Conv1D(4, 4)
        update = FloraLinear(conv, ranks=2, magnitude=True).updates("default")["weight"]
        with pytest.raises(
            ValueError, match=r"a magnitude for the output channels \(1, 1\) .* those of Linear are \(0, 1\)"
        ):
            FloraLinear(linear).install("a", update)
        tucker = update.tucker.map(lambda a: a.detach())
        with pytest.raises(
            ValueError, match=r"a magnitude of shape \(3,\) .* with 4 output channels; pass one of shape"
        ):
            TuckerUpdate(tucker, magnitude=torch.ones(3))
        state = FloraConvTranspose(nn.ConvTranspose2d(4, 2, 1, groups=2), ranks=1, magnitude=True).state_dict()
        other = FloraConvTranspose(nn.ConvTranspose2d(4, 1, 1), ranks=1, magnitude=True)
        with pytest.raises(ValueError, match=r"is for the output channels \(1, 2\) .* and this one's are \(1, 1\)"):
            other.load_state_dict(state)

    def test_a_file_with_magnitudes_is_not_filled_into_an_adapter_without(self, tmp_path):
        model = self.model()
        attach(model, ranks=2, magnitude=True)
        directory, plain = save_adapter(model, tmp_path / "a"), self.model()
        attach(plain, ranks=2)
        with pytest.raises(ValueError, match=r"has core, factors, type, start and magnitude .* in the model"):
            load_adapter(plain, directory)
        weights = ft.load_adapter(directory)
        broken = {name: weights.magnitudes[name] * float("nan") for name in weights.magnitudes}
        with pytest.raises(ValueError, match="NaN or infinite entries"):
            attach_adapter(self.model(), copy_of(weights, broken))


def copy_of(adapter: ft.Adapter, magnitudes: Any) -> ft.Adapter:
    return ft.Adapter(
        adapter.tensors, adapter.arrangements, adapter.scales, adapter.shapes, magnitudes=magnitudes,
        channels=adapter.channels,
    )  # fmt: skip


def test_a_channel_of_zeros_has_finite_gradients():
    base = nn.Linear(6, 4)
    with torch.no_grad():
        base.weight[1] = 0.0
    for path, training in itertools.product(("factored", "dense"), (True, False)):
        layer = FloraLinear(base, ranks=2, magnitude=True, path=path).train(training)
        output = layer(torch.ones(2, 6))
        assert torch.equal(output, base(torch.ones(2, 6)))
        grads = torch.autograd.grad(output.sum(), list(layer.tucker_update.parameters()))
        assert all(bool(g.isfinite().all()) for g in grads)
