"""Every layer is its base with W + s·ΔW: one inherited case of behavior that every kind of layer passes."""

import copy
import io
import itertools
import pickle
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from flora_tensor import Arrangement
from flora_torch import (
    FloraConv,
    FloraConvTranspose,
    FloraEmbedding,
    FloraLayer,
    FloraLinear,
    FloraParameter,
    TuckerUpdate,
)
from flora_torch.calling import call_with
from support import bfloat16_tolerance, tolerance
from torch_models import small_products

pytestmark = pytest.mark.usefixtures("one_thread", "seeded", "large_products")


def randomize(layer: nn.Module) -> None:
    """Move every update away from its zero start, to entries of order one."""
    for module in layer.modules():
        if isinstance(module, TuckerUpdate):
            for parameter in module.parameters():
                nn.init.normal_(parameter)


def close(a: torch.Tensor, b: torch.Tensor, *sizes: int, factor: float = 30.0) -> bool:
    """Compare two computations of one thing: each entry is a sum of ``sizes`` products."""
    bound = tolerance(str(b.dtype).removeprefix("torch."), *sizes, norm=float(b.detach().norm()) + 1e-30, factor=factor)
    return float((a.detach() - b.detach()).norm()) <= bound


class LayerCase:
    """What every layer must do. A subclass says how to make the layer, its input, and which weight is adapted."""

    parameter: ClassVar[str] = "weight"
    paths: ClassVar[tuple[str, ...]] = ("auto", "factored", "dense")
    has_dropout: ClassVar[bool] = True
    start_mode: ClassVar[Any] = torch.enable_grad

    def base(self) -> nn.Module:
        raise NotImplementedError

    def wrap(self, base: nn.Module, **options: Any) -> FloraLayer:
        raise NotImplementedError

    def inputs(self) -> tuple[torch.Tensor, ...]:
        raise NotImplementedError

    def made(self, dtype: torch.dtype = torch.float64, **options: Any) -> FloraLayer:
        layer = self.wrap(self.base().to(dtype), scale=0.5, **options)
        randomize(layer)
        return layer

    def inputs_in(self, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        return tuple(x.to(dtype) if x.is_floating_point() else x for x in self.inputs())

    def result(self, value: Any) -> torch.Tensor:
        return value[0] if isinstance(value, tuple) else value

    def effective(self, layer: FloraLayer) -> torch.Tensor:
        weight = getattr(layer.base_layer, self.parameter)
        return weight + layer.updates("default")[self.parameter].delta()

    def dense(self, layer: FloraLayer, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """The base with the effective weight: what the layer must equal."""
        return self.result(functional_call(layer.base_layer, {self.parameter: self.effective(layer)}, inputs))

    def with_path(self, layer: FloraLayer, path: str) -> FloraLayer:
        layer.path = path
        return layer

    @property
    def sizes(self) -> tuple[int, ...]:
        weight = getattr(self.base(), self.parameter)
        return tuple(weight.shape)

    def test_equals_the_base_with_the_effective_weight(self):
        for path, dtype in itertools.product(self.paths, (torch.float64, torch.float32)):
            layer, inputs = self.with_path(self.made(dtype), path), self.inputs_in(dtype)
            assert close(self.result(layer(*inputs)), self.dense(layer, inputs), *self.sizes)

    def test_gradients_equal_the_dense_ones(self):
        for path, small in itertools.product(self.paths, (False, True)):
            layer = self.with_path(self.made(), path)
            inputs = [x.requires_grad_() if x.is_floating_point() else x for x in self.inputs_in(torch.float64)]
            wanted = [x for x in inputs if x.is_floating_point()] + list(layer.tucker_update.parameters())
            with small_products(small):
                output = self.result(layer(*inputs))
            reference = self.dense(layer, tuple(inputs))
            direction = torch.randn_like(output)
            ours = torch.autograd.grad(output, wanted, direction)
            theirs = torch.autograd.grad(reference, wanted, direction)
            # A gradient's rounding is relative to the terms that are summed, not to what is left of them.
            for a, b in zip(ours, theirs):
                assert close(a, b, *self.sizes, factor=1e4)
                assert bool(b.abs().sum() > 0)

    def test_starts_at_the_base_bit_for_bit(self):
        for path, init in itertools.product(self.paths, ("orthonormal", "official", "loralib", "peft", "principal")):
            base = self.base()
            layer = self.with_path(self.wrap(base, init=init, scale=2.0), path)
            inputs = self.inputs_in(torch.float32)
            with self.start_mode():
                assert torch.equal(self.result(layer(*inputs)), self.result(base(*inputs)))

    def test_base_is_frozen_and_keeps_its_bits(self):
        layer, inputs = self.made(), self.inputs_in(torch.float64)
        before = {name: value.clone() for name, value in layer.base_layer.state_dict().items()}
        optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=0.1)
        self.result(layer(*inputs)).square().sum().backward()
        optimizer.step()
        assert not any(p.requires_grad for p in layer.base_layer.parameters())
        assert all(p.grad is None for p in layer.base_layer.parameters())
        assert all(torch.equal(value, before[name]) for name, value in layer.base_layer.state_dict().items())
        assert {n.split(".")[0] for n, p in layer.named_parameters() if p.requires_grad} == {"tucker_update"}

    def test_merged_is_plain_and_equal(self):
        layer, inputs = self.made(), self.inputs_in(torch.float64)
        plain = layer.merged()
        assert type(plain) is type(layer.base_layer)
        assert not any(isinstance(module, FloraLayer) for module in plain.modules())
        assert set(plain.state_dict()) == set(layer.base_layer.state_dict())
        assert close(getattr(plain, self.parameter), self.effective(layer), *self.sizes)
        assert close(self.result(plain(*inputs)), self.dense(layer, inputs), *self.sizes)

    def test_merging_a_zero_update_keeps_the_bits(self):
        for dtype in (torch.float32, torch.bfloat16):
            layer = self.wrap(self.base().to(dtype))
            before, after = layer.base_layer.state_dict(), layer.merged().state_dict()
            assert all(torch.equal(before[name], after[name]) for name in before)

    def test_merging_refuses_what_is_not_finite(self):
        layer = self.made()
        with torch.no_grad():
            layer.updates("default")[self.parameter].core.fill_(torch.inf)
        with pytest.raises(ValueError, match=r"merge: \d+ of \d+ entries of .* NaN or infinite"):
            layer.merged()

    def test_reading_the_parameter_gives_the_effective_one(self):
        layer = self.made()
        assert torch.equal(getattr(layer, self.parameter), self.effective(layer))
        layer.enabled = False
        assert getattr(layer, self.parameter) is getattr(layer.base_layer, self.parameter)

    def test_disabled_is_the_base(self):
        layer, inputs = self.made(), self.inputs_in(torch.float64)
        layer.enabled = False
        assert torch.equal(self.result(layer(*inputs)), self.result(layer.base_layer(*inputs)))
        assert "enabled=False" in repr(layer)

    def test_adapters_add_up(self):
        layer, inputs = self.made(), self.inputs_in(torch.float64)
        layer.add_adapter("second", 2, parameter=self.parameter, scale=-1.5)
        randomize(layer)
        both = getattr(layer.base_layer, self.parameter) + sum(
            layer.updates(name)[self.parameter].delta() for name in ("default", "second")
        )
        reference = self.result(functional_call(layer.base_layer, {self.parameter: both}, inputs))
        for path in self.paths:
            assert close(self.result(self.with_path(layer, path)(*inputs)), reference, *self.sizes, factor=60)
        layer.active_adapters = ["default"]
        assert close(self.result(layer(*inputs)), self.dense(layer, inputs), *self.sizes)
        layer.remove_adapter("default")
        assert torch.equal(self.result(layer(*inputs)), self.result(layer.base_layer(*inputs)))

    def test_pickles_and_copies(self):
        layer, inputs = self.made(), self.inputs_in(torch.float64)
        expected = self.result(layer(*inputs))
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert torch.equal(self.result(twin(*inputs)), expected)
            randomize(twin)
            assert torch.equal(self.result(layer(*inputs)), expected)

    def test_state_dict_carries_everything(self):
        layer, inputs = self.made(), self.inputs_in(torch.float64)
        other = self.wrap(copy.deepcopy(layer.base_layer), scale=7.0)
        buffer = io.BytesIO()
        torch.save(layer.state_dict(), buffer)
        buffer.seek(0)
        assert other.load_state_dict(torch.load(buffer, weights_only=True)).missing_keys == []
        assert torch.equal(self.result(other(*inputs)), self.result(layer(*inputs)))
        third = self.wrap(copy.deepcopy(layer.base_layer), scale=7.0)
        third.load_state_dict(load_safetensors(save_safetensors(layer.state_dict())))
        assert torch.equal(self.result(third(*inputs)), self.result(layer(*inputs)))

    def test_dropout_drops_the_updates_input_in_training_only(self):
        if not self.has_dropout:
            with pytest.raises(ValueError, match="has no input to drop"):
                self.wrap(self.base(), dropout=0.5)
            return
        layer, inputs = self.made(dropout=0.5), self.inputs_in(torch.float64)
        base = self.result(layer.base_layer(*inputs))
        layer.eval()
        assert close(self.result(layer(*inputs)), self.dense(layer, inputs), *self.sizes)
        layer.train()
        for path in self.paths:
            self.with_path(layer, path)
            torch.manual_seed(1)
            first = self.result(layer(*inputs))
            torch.manual_seed(1)
            assert torch.equal(self.result(layer(*inputs)), first)
            assert not torch.allclose(self.result(layer(*inputs)), first)
            mean = sum(self.result(layer(*inputs)) for _ in range(1500)) / 1500
            exact = self.dense(layer, inputs)
            # The mean of 1500 draws of variance about ‖ΔW x‖²: three standard deviations of its norm are far below
            # 0.15.
            assert float((mean - exact).detach().norm()) < 0.15 * float((exact - base).detach().norm())

    def test_checkpointing_gives_the_same_gradients(self):
        layer, inputs = self.made(), self.inputs_in(torch.float64)
        parameters = list(layer.tucker_update.parameters())
        plain = torch.autograd.grad(self.result(layer(*inputs)).square().sum(), parameters)
        output = checkpoint(lambda *x: self.result(layer(*x)), *inputs, use_reentrant=False)
        again = torch.autograd.grad(output.square().sum(), parameters)
        assert all(torch.equal(a, b) for a, b in zip(plain, again))

    def test_compiles_without_a_graph_break(self):
        inputs = self.inputs_in(torch.float32)
        for path, backend in zip(self.paths, ("eager", "aot_eager")):
            torch._dynamo.reset()
            layer = self.with_path(self.made(torch.float32), path)
            compiled = torch.compile(layer, fullgraph=True, backend=backend)
            output, expected = self.result(compiled(*inputs)), self.result(layer(*inputs))
            assert close(output, expected, *self.sizes)
            direction = torch.randn_like(expected)
            parameters = list(layer.tucker_update.parameters())
            ours = torch.autograd.grad(output, parameters, direction)
            theirs = torch.autograd.grad(expected, parameters, direction)
            assert all(close(a, b, *self.sizes, factor=1e4) for a, b in zip(ours, theirs))

    def test_low_precision_base_keeps_float32_adapters(self):
        layer, inputs = self.made(torch.bfloat16), self.inputs_in(torch.bfloat16)
        assert {p.dtype for p in layer.tucker_update.parameters()} == {torch.float32}
        exact = copy.deepcopy(layer).to(torch.float64)
        reference = self.dense(exact, tuple(x.double() if x.is_floating_point() else x for x in inputs))
        for path in self.paths:
            output = self.result(self.with_path(layer, path)(*inputs))
            assert output.dtype == torch.bfloat16
            bound = bfloat16_tolerance(reference)
            assert float((output.double() - reference).detach().norm()) <= bound
        narrow = self.wrap(self.base().to(torch.bfloat16), dtype=torch.bfloat16)
        # A magnitude, where there is one, changes by too little for 16 bits.
        own = [p for name, p in narrow.tucker_update.named_parameters() if not name.endswith("magnitude")]
        assert {p.dtype for p in own} == {torch.bfloat16}
        assert self.result(narrow(*inputs)).dtype == torch.bfloat16

    def test_autocast_computes_in_its_type_and_trains_in_float32(self):
        layer, inputs = self.made(torch.float32), self.inputs_in(torch.float32)
        inputs = tuple(x.requires_grad_() if x.is_floating_point() else x for x in inputs)
        wanted = [x for x in inputs if x.requires_grad] + list(layer.tucker_update.parameters())
        reference = self.dense(layer, inputs)
        direction = torch.randn_like(reference)
        exact = torch.autograd.grad(reference, wanted, direction)
        for path in self.paths:
            self.with_path(layer, path)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                base = self.base_in_bfloat16(layer, inputs)
                output = self.result(layer(*inputs))
                inside = torch.autograd.grad(output.float(), wanted, direction, retain_graph=True)
                assert layer.updates("default")[self.parameter].delta().dtype == torch.float32
            assert output.dtype == base.dtype
            bound = bfloat16_tolerance(reference)
            assert float((output.float() - reference).detach().norm()) <= bound
            grads = torch.autograd.grad(output.float(), wanted, direction)
            assert {g.dtype for g in grads} == {torch.float32}
            for *found, expected in zip(grads, inside, exact):
                bound = bfloat16_tolerance(expected)
                assert all(float((grad - expected).norm()) <= bound for grad in found)

    def base_in_bfloat16(self, layer: Any, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        try:
            return self.result(layer.base_layer(*inputs))
        except RuntimeError as error:
            pytest.skip(f"PyTorch does not run this layer in bfloat16 on this processor: {error}")

    def test_factored_path_saves_nothing_of_the_weights_size(self):
        if "factored" not in self.paths:
            pytest.skip("this layer always forms ΔW")
        layer, inputs = self.with_path(self.made(), "factored"), self.inputs_in(torch.float64)
        update = layer.updates("default")[self.parameter]
        own = {t.data_ptr() for t in (*layer.parameters(), *inputs)}
        shapes: list[tuple[int, ...]] = []

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.data_ptr() not in own:
                shapes.append(tuple(tensor.shape))
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            self.result(layer(*inputs))
        assert shapes
        assert sorted(update.shape) not in [sorted(shape) for shape in shapes]

    def test_new_layer_keeps_the_mode_of_its_base(self):
        assert self.wrap(self.base().eval()).training is False
        assert self.wrap(self.base().train()).training is True

    def test_reads_other_attributes_from_the_base(self):
        layer = self.made()
        layer.base_layer.note = "kept"
        assert layer.note == "kept"
        with pytest.raises(AttributeError, match="no attribute 'nothing_of_that_name'"):
            _ = layer.nothing_of_that_name

    def test_refuses_the_same_adapter_twice_and_bad_names(self):
        layer = self.made()
        for name, message in [
            ("default", "is an adapter 'default'"),
            ("a.b", "cannot be named"),
            ("", "cannot be named"),
        ]:
            with pytest.raises(ValueError, match=message):
                layer.add_adapter(name, 2, parameter=self.parameter)
        for name in ("items", "my_lora_one"):
            with pytest.raises(ValueError, match="cannot be named"):
                layer.add_adapter(name, 2, parameter=self.parameter)
        with pytest.raises(ValueError, match="there is no adapter 'missing'; it has default"):
            layer.remove_adapter("missing")
        with pytest.raises(TypeError, match=r"is a Flora.* already; use its add_adapter"):
            FloraParameter(layer)

    def test_refuses_weights_without_values(self):
        with pytest.raises(ValueError, match="is on the meta device and has no values; load the model first"):
            self.wrap(self.base().to("meta"))


class TestLinear(LayerCase):
    def base(self):
        return nn.Linear(24, 16)

    def wrap(self, base, **options):
        return FloraLinear(base, ranks=(3, 4), **options)

    def inputs(self):
        return (torch.randn(2, 5, 24),)


class TestLinearWholeMode(TestLinear):
    def wrap(self, base, **options):
        return FloraLinear(base, ranks=(None, 4), **options)


class TestOutputProjectionOfAttention(TestLinear):
    def base(self):
        return nn.MultiheadAttention(16, 2).out_proj

    def inputs(self):
        return (torch.randn(3, 16),)

    def test_dropout_drops_the_updates_input_in_training_only(self):
        with pytest.raises(ValueError, match=r"no effect: nn.MultiheadAttention reads the weight .* pass dropout=0"):
            self.wrap(self.base(), dropout=0.5)


class TestConv1DOfTransformers(TestLinear):
    def base(self):
        return Conv1D(16, 24)


class TestHeads(TestLinear):
    """Heads as a mode of their own, on the side of the output."""

    def wrap(self, base, **options):
        arrangement = Arrangement("(heads d) i -> heads d i", {"heads": 4})
        return FloraLinear(base, ranks=(2, 3, 4), arrangement=arrangement, **options)


class TestMixedSides(TestLinear):
    """An arrangement without a factored form: a mode that holds axes of both sides."""

    paths = ("auto", "dense")

    def wrap(self, base, **options):
        arrangement = Arrangement("(a b) (c d) -> (a c) b d", {"a": 4, "c": 2})
        return FloraLinear(base, ranks=(2, 3, 4), arrangement=arrangement, **options)


class TestHeadsOfTheInput(TestLinear):
    def wrap(self, base, **options):
        arrangement = Arrangement("o (heads d) -> o heads d", {"heads": 4})
        return FloraLinear(base, ranks=(4, 4, 3), arrangement=arrangement, **options)


class ScaledLinear(nn.Linear):
    """A subclass that does more than its parent: only running it as a whole is right."""

    def forward(self, input):
        return 3.0 * super().forward(input).relu()


class TestLinearWithItsOwnForward(TestLinear):
    paths = ("auto", "dense")
    has_dropout = True

    def base(self):
        return ScaledLinear(24, 16)

    def test_dropout_drops_the_updates_input_in_training_only(self):
        with pytest.raises(ValueError, match=r"dropout .* needs a base whose product is known"):
            self.wrap(self.base(), dropout=0.5)


class TestConv1d(LayerCase):
    def base(self):
        return nn.Conv1d(6, 8, 3, padding="same", dilation=2)

    def wrap(self, base, **options):
        return FloraConv(base, ranks=3, **options)

    def inputs(self):
        return (torch.randn(2, 6, 9),)


class TestConv2d(TestConv1d):
    def base(self):
        return nn.Conv2d(6, 8, (3, 5), stride=2, padding=1, groups=2, padding_mode="circular")

    def inputs(self):
        return (torch.randn(2, 6, 9, 7),)


class TestConv2dMatrix(TestConv2d):
    def wrap(self, base, **options):
        return FloraConv(base, ranks=3, arrangement="o (i h w)", **options)


class TestConv2dSeparable(TestConv2d):
    def wrap(self, base, **options):
        return FloraConv(base, ranks=3, arrangement="(o h) (i w)", **options)


class TestDepthwise(TestConv2d):
    def base(self):
        return nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False)


class TestConv3d(TestConv1d):
    def base(self):
        return nn.Conv3d(4, 6, 3, padding=1, padding_mode="replicate")

    def inputs(self):
        return (torch.randn(1, 4, 4, 5, 3),)


class TestConvTranspose2d(TestConv1d):
    def base(self):
        return nn.ConvTranspose2d(6, 8, 3, stride=2, padding=1, output_padding=1, groups=2)

    def wrap(self, base, **options):
        return FloraConvTranspose(base, ranks=3, **options)

    def inputs(self):
        return (torch.randn(2, 6, 5, 4),)


class TestConvTransposeSeparable(TestConvTranspose2d):
    def wrap(self, base, **options):
        return FloraConvTranspose(base, ranks=3, arrangement="(o h) (i w)", **options)


class TestEmbedding(LayerCase):
    def base(self):
        return nn.Embedding(20, 12, padding_idx=3)

    def wrap(self, base, **options):
        return FloraEmbedding(base, ranks=(4, 3), **options)

    def inputs(self):
        return (torch.tensor([[1, 3, 7], [19, 0, 3]]),)


class TestEmbeddingByFrequency(TestEmbedding):
    paths = ("auto", "dense")

    def base(self):
        return nn.Embedding(20, 12, scale_grad_by_freq=True)

    def inputs(self):
        return (torch.tensor([[1, 1, 1], [19, 0, 3]]),)


class TestSparseEmbedding(TestEmbedding):
    def base(self):
        return nn.Embedding(20, 12, sparse=True)

    def dense(self, layer, inputs):
        return self.effective(layer)[inputs[0]]  # a sparse gradient would not go on to the update's parameters

    def test_gradients_equal_the_dense_ones(self):
        layer, (ids,) = self.made(), self.inputs()
        update = layer.updates("default")["weight"]
        for path in self.paths:
            grads = torch.autograd.grad(self.with_path(layer, path)(ids).square().sum(), list(update.parameters()))
            reference = torch.autograd.grad(self.dense(layer, (ids,)).square().sum(), list(update.parameters()))
            assert all(close(a, b, 20, 12, factor=1e4) for a, b in zip(grads, reference))


class TestBilinear(LayerCase):
    paths = ("auto",)
    has_dropout = False

    def base(self):
        return nn.Bilinear(6, 5, 4)

    def wrap(self, base, **options):
        return FloraParameter(base, self.parameter, 2, **options)

    def inputs(self):
        return torch.randn(3, 6), torch.randn(3, 5)


class TestAttention(TestBilinear):
    parameter = "in_proj_weight"
    # Attention takes another kernel where no gradient is needed, and then rounds differently from itself.
    start_mode = torch.no_grad

    def base(self):
        return nn.MultiheadAttention(16, 2, batch_first=True)

    def inputs(self):
        x = torch.randn(2, 5, 16)
        return x, x.clone(), x.clone()


class Experts(nn.Module):
    """One 3-D parameter for all experts."""

    def __init__(self):
        super().__init__()
        self.gate_up = nn.Parameter(torch.randn(3, 8, 6) / 3)
        self.down = nn.Parameter(torch.randn(3, 4, 8) / 3)

    def forward(self, x):
        return torch.einsum("eoh,ebh->bo", self.down, torch.einsum("ehi,bi->ebh", self.gate_up, x).tanh())


class TestExperts(TestBilinear):
    parameter = "gate_up"

    def base(self):
        return Experts()

    def inputs(self):
        return (torch.randn(5, 6),)

    def test_two_parameters_of_one_module(self):
        layer, inputs = self.made(), self.inputs_in(torch.float64)
        layer.add_adapter("default", 2, parameter="down")
        randomize(layer)
        assert layer.parameter_names == ("gate_up", "down")
        both = {name: getattr(layer, name) for name in layer.parameter_names}
        assert torch.equal(layer(*inputs), functional_call(layer.base_layer, both, inputs))


class TableOfBiases(nn.Module):
    """A module that others ask past its forward, as attention does for biases of relative positions."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(5, 4))
        self.calls = 0

    def rows(self, index, *, factor=1.0):
        self.calls += 1
        return self.table[index] * factor

    def reset(self):
        nn.init.zeros_(self.table)

    def forward(self, index):
        return self.rows(index)


class TestMethods(TestBilinear):
    parameter = "table"

    def base(self):
        return TableOfBiases()

    def inputs(self):
        return (torch.tensor([0, 3]),)

    def test_its_own_methods_run_with_the_effective_parameter(self):
        layer, (index,) = self.made(), self.inputs()
        randomize(layer)
        update = layer.updates("default")["table"]
        expected = (layer.base_layer.table + update.delta())[index]
        rows = layer.rows(index, factor=2.0)
        assert torch.allclose(rows, 2 * expected, rtol=0, atol=1e-12)
        rows.sum().backward()
        assert all(parameter.grad is not None for parameter in update.parameters())
        assert layer.base_layer.calls == 1
        layer.enabled = False
        assert torch.equal(layer.rows(index), layer.base_layer.table[index])
        layer.enabled = True
        layer.reset()  # sets the weight itself
        assert not layer.base_layer.table.any()

    def test_a_method_of_a_module_that_computes_its_parameter_runs_with_the_sum(self):
        base = nn.utils.parametrizations.weight_norm(TableOfBiases(), "table")
        layer, (index,) = FloraParameter(base.double(), "table", 2), self.inputs()
        randomize(layer)
        assert torch.allclose(layer.rows(index), layer(index), rtol=0, atol=1e-12)


class TestRecurrent(TestBilinear):
    parameter = "weight_ih_l0"

    def base(self):
        return nn.LSTM(4, 5)

    def inputs(self):
        return (torch.randn(3, 2, 4),)

    def test_compiles_without_a_graph_break(self):
        pytest.skip("torch.compile does not trace recurrent layers of torch itself")


def test_a_weight_that_its_module_also_keeps_as_a_view_is_replaced():
    # So does FullyShardedDataParallel(use_orig_params=True) while a module runs.
    linear, x = nn.Linear(3, 2), torch.ones(3)
    vars(linear)["weight"] = linear.weight.view(2, 3)
    other = torch.full((2, 3), 2.0)
    assert torch.equal(call_with(linear, {"weight": other}, (x,), {}), other @ x + linear.bias)
