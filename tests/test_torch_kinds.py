"""Bilinear forms, bags, recurrent layers, attention, computed weights, and what is left out."""

import copy
import weakref
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as nnf
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.rnn import pack_padded_sequence
from transformers.pytorch_utils import Conv1D

from flora_tensor import Arrangement
from flora_torch import (
    FloraBilinear,
    FloraConv,
    FloraEmbeddingBag,
    FloraLayer,
    FloraLinear,
    FloraParameter,
    adapter_parameters,
    attach,
    detach,
    disabled,
    merge,
)
from flora_torch.selection import choose
from support import same_bits
from test_torch_layers import LayerCase
from torch_models import close, randomize

pytestmark = pytest.mark.usefixtures("one_thread", "seeded")


# --- products of further kinds -----------------------------------------------------------------------


class TestBilinear(LayerCase):
    def base(self):
        return nn.Bilinear(5, 4, 3)

    def wrap(self, base, **options):
        return FloraBilinear(base, ranks=(2, 3, 2), **options)

    def inputs(self):
        return torch.randn(6, 5), torch.randn(6, 4)

    def test_dropout_drops_the_updates_input_in_training_only(self):
        layer = self.made(dropout=0.5)
        a, b = self.inputs_in(torch.float64)
        with torch.no_grad():
            expected = layer.eval()(a, b)
            runs = torch.stack([layer.train()(a, b) for _ in range(4000)])
        # Both inputs are dropped on their own, so that the form keeps its expectation.
        error = (runs.mean(0) - expected).abs() / (runs.std(0) / 4000**0.5)
        assert float(error.max()) < 5.5
        assert not torch.equal(runs[0], runs[1])


class TestBilinearWithAWholeMode(TestBilinear):
    def wrap(self, base, **options):
        return FloraBilinear(base, ranks=(None, 2, None), **options)


class TestEmbeddingBag(LayerCase):
    has_dropout: ClassVar[bool] = False
    mode: ClassVar[str] = "mean"

    def base(self):
        return nn.EmbeddingBag(9, 6, mode=self.mode, padding_idx=2)

    def wrap(self, base, **options):
        return FloraEmbeddingBag(base, ranks=(3, 2), **options)

    def inputs(self):
        return torch.tensor([1, 2, 3, 3, 8, 0]), torch.tensor([0, 2, 5])

    def test_dropout_drops_the_updates_input_in_training_only(self):
        with pytest.raises(ValueError, match=r"dropout is 0\.5, but what is looked up is summed at once"):
            self.made(dropout=0.5)


class TestSumOfEmbeddings(TestEmbeddingBag):
    mode: ClassVar[str] = "sum"


class TestLargestOfEmbeddings(TestEmbeddingBag):
    mode: ClassVar[str] = "max"
    paths: ClassVar[tuple[str, ...]] = ("auto", "dense")

    def test_compiles_without_a_graph_break(self):
        pytest.skip("torch.compile does not trace the largest of embeddings")


def test_bag_of_weighted_rows_and_refusals():
    base = nn.EmbeddingBag(9, 6, mode="sum", sparse=True).double()
    layer = FloraEmbeddingBag(base, ranks=3)
    randomize(layer)
    ids, weights = torch.tensor([[1, 2], [3, 4]]), torch.rand(2, 2).double()
    expected = nnf.embedding_bag(ids, layer.weight, mode="sum", per_sample_weights=weights)
    assert close(layer(ids, per_sample_weights=weights), expected)
    with pytest.raises(ValueError, match=r"FloraEmbeddingBag: the base has max_norm=1\.0"):
        FloraEmbeddingBag(nn.EmbeddingBag(3, 2, max_norm=1.0))


# --- attention and recurrent layers ------------------------------------------------------------------


def attention(**options):
    return nn.Sequential(nn.MultiheadAttention(8, 2, batch_first=True, **options)).double()


class TestAttention:
    @pytest.mark.parametrize("options", [{}, {"kdim": 6, "vdim": 5}, {"bias": False}, {"add_bias_kv": True}])
    def test_every_projection_is_adapted_in_every_mode(self, options):
        model = attention(**options)
        attach(model, ranks=2)
        names = {n for n, p in nn.MultiheadAttention(8, 2, **options).named_parameters() if p.dim() == 2}
        assert set(names) == {n.removeprefix("base_layer.") for n in names_of(model[0])}
        randomize(model)
        q = torch.randn(2, 3, 8).double()
        k, v = (torch.randn(2, 4, options.get(d, 8)).double() for d in ("kdim", "vdim"))
        if not options:
            k = v = q  # as self-attention takes the fast path
        plain = merge(copy.deepcopy(model))[0]
        for training in (True, False):
            model.train(training)
            plain.train(training)
            for weights in (True, False):
                expected = plain(q, k, v, need_weights=weights)
                assert close(model[0](q, k, v, need_weights=weights)[0], expected[0])
                with torch.no_grad():
                    fast = model[0](q, k, v, need_weights=weights)
                assert close(fast[0], expected[0])
                assert (fast[1] is None) == (not weights)

    @pytest.mark.parametrize("fast", [True, False])
    def test_every_weight_is_formed_once(self, fast, monkeypatch):
        """Also where torch looks at each weight before it uses it."""
        formed, effective = [], FloraLayer.effective

        def counted(layer, parameter="weight", updates=None):
            formed.append((id(layer), parameter))
            return effective(layer, parameter, updates)

        monkeypatch.setattr(FloraLayer, "effective", counted)
        monkeypatch.setattr(torch.backends.mha, "get_fastpath_enabled", lambda: fast)
        fused = []
        original = torch._transformer_encoder_layer_fwd
        monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", lambda *args: fused.append(1) or original(*args))
        layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, dropout=0.0)
        x = torch.randn(2, 3, 8).double()
        for model, inputs in ((attention(), (x, x, x)), (nn.Sequential(nn.Sequential(layer)).double(), (x,))):
            attach(model, ranks=2)
            randomize(model)
            plain = merge(copy.deepcopy(model))
            for training in (True, False):
                for grad in (True, False):
                    with torch.set_grad_enabled(grad):
                        expected = plain.train(training)[0](*inputs)
                        formed.clear()
                        fused.clear()
                        found = model.train(training)[0](*inputs)
                    if training or not grad:
                        assert len(formed) == len(set(formed)) >= 2
                    # The fused kernel is taken where it can be, with the effective weights.
                    assert bool(fused) == (len(inputs) == 1 and fast and not training and not grad)
                    first, second = (y[0] if isinstance(y, tuple) else y for y in (found, expected))
                    assert close(first, second)

    def test_a_weight_that_is_held_is_made_again_when_something_changed(self):
        layer = FloraLinear(nn.Linear(4, 3), ranks=2)
        update = layer.tucker_update["default"]
        nn.init.ones_(update.core)
        # A backward pass can go through a weight once, so that one with a gradient is never given twice.
        kept = layer.weight
        kept.sum().backward()
        layer.weight.sum().backward()

        def rescale():
            update.scale = 2.0

        def weigh():
            update.multiplier = 3.0

        def step():
            update.core.add_(1.0)

        def step_base():
            layer.base_layer.weight.add_(1.0)

        def replace():
            update.core.data = update.core.data * 2.0

        def add():
            nn.init.ones_(layer.add_adapter("other", 1).core)

        def spoil():
            layer.weight.add_(1.0)

        with torch.no_grad():
            held = layer.weight
            for change in (rescale, weigh, step, step_base, replace, add, spoil):
                before = held.clone()
                assert layer.weight is held
                change()
                assert torch.equal(layer.weight, layer.effective()), change.__name__
                assert torch.equal(layer.weight, before) == (change is spoil)
                held = layer.weight
            assert torch.equal(copy.deepcopy(layer).weight, held)
            with torch.inference_mode():
                assert torch.equal(layer.weight, held)
            last = weakref.ref(held)
            del held
            assert last() is None, "nothing is kept alive"
        assert layer.weight.requires_grad

    def test_targets_by_name_include_the_output_projection(self):
        model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 12))
        assert [site.name for site in choose(model, "self_attn")[0]] == [
            "0.self_attn.in_proj_weight",
            "0.self_attn.out_proj.weight",
        ]
        excluded = choose(model, "self_attn", exclude_modules="out_proj")[0]
        assert [site.name for site in excluded] == ["0.self_attn.in_proj_weight"]

    def test_heads_are_a_mode_of_the_stacked_projections(self):
        model = attention()
        heads = Arrangement("(part head d) i -> part head d i", {"part": 3, "head": 2})
        report = attach(model, ranks=2, target_parameters="in_proj_weight", arrangement=heads)
        assert report.layers[0].ranks == (2, 2, 2, 2)
        randomize(model)
        x = torch.randn(2, 3, 8).double()
        expected = model[0](x, x, x)[0]
        assert close(merge(model)[0](x, x, x)[0], expected)

    @pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
    def test_padded_batches_take_the_nested_path_of_the_encoder(self):
        layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, dropout=0.0)
        model = nn.Sequential(nn.TransformerEncoder(layer, 2)).double().eval()
        attach(model, ranks=2)
        randomize(model)
        plain = merge(copy.deepcopy(model))
        x, padding = torch.randn(2, 4, 8).double(), torch.tensor([[False] * 4, [False, False, True, True]])
        expected = plain[0](x, src_key_padding_mask=padding)
        with torch.no_grad():
            fast = model[0](x, src_key_padding_mask=padding)
        slow = model[0](x, src_key_padding_mask=padding)
        assert slow.requires_grad
        assert close(fast[~padding], expected[~padding])
        assert close(slow[~padding], expected[~padding])

    def test_switched_off_and_taken_off(self):
        model, x = attention(), torch.randn(2, 3, 8).double()
        expected = model[0](x, x, x)[0]
        attach(model, ranks=2)
        randomize(model)
        with disabled(model):
            assert close(model[0](x, x, x)[0], expected, 30)
        assert not close(model[0](x, x, x)[0], expected)
        detach(model)
        assert torch.equal(model[0](x, x, x)[0], expected)


def names_of(module, prefix=""):
    """List the weights that have updates, by the names that they have in the plain module."""
    found = []
    for name, layer in module.named_modules():
        if isinstance(layer, FloraLayer):
            owner = name.replace("base_layer.", "").removesuffix("base_layer")
            found += [f"{owner}.{p}".strip(".") for p in layer.parameter_names]
    return found


class TestRecurrent:
    @pytest.mark.parametrize(
        "make",
        [
            lambda: nn.LSTM(4, 6, num_layers=2, bidirectional=True, proj_size=3, dropout=0.0),
            lambda: nn.GRU(4, 6, bidirectional=True),
            lambda: nn.RNN(4, 6, num_layers=2),
        ],
    )
    def test_packed_sequences(self, make):
        model = nn.Sequential(make()).double()
        report = attach(model, ranks=2)
        assert len(report.layers) == sum(name.startswith("weight") for name in make().state_dict())
        randomize(model)
        packed = pack_padded_sequence(torch.randn(5, 3, 4).double(), [5, 3, 2])
        ours = model[0](packed)
        model[0].flatten_parameters()
        theirs = merge(copy.deepcopy(model))[0](packed)
        assert close(ours[0].data, theirs[0].data)
        ours[0].data.sum().backward()
        assert all(bool(p.grad.abs().sum() > 0) for p in adapter_parameters(model))
        # The list in which the layer keeps its weights for cuDNN holds the base's own again.
        assert all(a is b for a, b in zip(model[0].base_layer._flat_weights, model[0].base_layer.parameters()))

    @pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
    def test_cells(self, kind):
        model, x = nn.Sequential(kind(4, 6)).double(), torch.randn(3, 4).double()
        assert [layer.name for layer in attach(model, ranks=2).layers] == ["0.weight_ih", "0.weight_hh"]
        randomize(model)
        ours, theirs = model(x), merge(copy.deepcopy(model))(x)
        assert close(*(y[0] if isinstance(y, tuple) else y for y in (ours, theirs)))


# --- weights that are computed -----------------------------------------------------------------------


class OwnConv(nn.Conv1d):
    """A convolution whose forward does something else with its weight."""

    def forward(self, input):
        return self._conv_forward(input, 2.0 * self.weight, self.bias).abs()


class TestComputedWeights:
    @pytest.mark.parametrize("norm", [parametrizations.weight_norm, parametrizations.spectral_norm])
    @pytest.mark.parametrize("path", ["auto", "factored", "dense"])
    @pytest.mark.parametrize("make", [lambda: nn.Conv1d(4, 6, 3), lambda: OwnConv(4, 6, 3)])
    def test_change_of_the_weight_that_is_used(self, norm, path, make):
        if path == "factored" and make is not None and isinstance(make(), OwnConv):
            pytest.skip("a forward of its own always runs dense")
        model, x = nn.Sequential(norm(make())).double().eval(), torch.randn(2, 4, 7).double()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        weight, start = model[0].weight.detach().clone(), model(x)
        attach(model, ranks=2, path=path)
        assert torch.equal(model(x), start)
        randomize(model)
        delta = model[0].tucker_update["default"].delta().detach()
        assert close(model[0].weight, weight + delta, 30)
        plain = make().double()
        plain.load_state_dict({"weight": weight + delta, "bias": model[0].bias})
        assert close(model(x), plain(x))
        merged = merge(copy.deepcopy(model))
        assert close(merged(x), plain(x))
        # What can hold any weight stays; what holds only weights of norm one cannot.
        stays = norm is parametrizations.weight_norm
        assert parametrize.is_parametrized(merged[0]) == stays
        assert type(plain) is (type(merged[0]) if not stays else parametrize.type_before_parametrizations(merged[0]))
        detach(model)
        assert all(same_bits(value, before[name]) for name, value in model.state_dict().items())
        assert torch.equal(model(x), start)

    def test_attaching_takes_no_step_of_the_power_iteration(self):
        model = nn.Sequential(parametrizations.spectral_norm(nn.Linear(4, 6))).train()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        attach(model, ranks=2, init="principal")
        detach(model)
        assert all(same_bits(value, before[name]) for name, value in model.state_dict().items())
        assert all(module.training for module in model.modules())

    def test_two_computed_weights_of_one_module(self):
        class Pair(nn.Module):
            def __init__(self):
                super().__init__()
                self.up, self.down = nn.Parameter(torch.randn(5, 4)), nn.Parameter(torch.randn(4, 5))

            def forward(self, x):
                return x @ self.up.mT @ self.down.mT

        pair = parametrizations.weight_norm(parametrizations.spectral_norm(Pair(), "down"), "up")
        model, x = nn.Sequential(pair).double().eval(), torch.randn(2, 4).double()
        before = model(x)
        report = attach(model, ranks=2, target_modules="all")
        assert {layer.name for layer in report.layers} == {"0.up", "0.down"}
        randomize(model)
        expected = model(x)
        assert not close(expected, before)
        assert close(merge(copy.deepcopy(model))(x), expected)
        with disabled(model):
            assert torch.equal(model(x), before)

    def test_parts_of_a_computed_weight_can_be_adapted_by_name(self):
        model = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 6))).double()
        attach(model, ranks=2, target_parameters="original1")
        randomize(model)
        x = torch.randn(2, 4).double()
        expected = model(x)
        assert close(merge(model)(x), expected)


# --- collections of parameters -----------------------------------------------------------------------


class Prompts(nn.Module):
    """Entries that are read by index, by slice, by key and one after the other."""

    def __init__(self):
        super().__init__()
        self.listed = nn.ParameterList([torch.randn(3, 4), torch.randn(4, 4), torch.randn(4)])
        self.named = nn.ParameterDict({"up": torch.randn(4, 5), "down": torch.randn(5, 4)})

    def forward(self, x):
        x = x + self.listed[0] @ self.listed[-2] + sum(entry.sum() for entry in self.listed) + self.listed[1:][1]
        x = x @ self.named["up"] @ self.named["down"]
        assert list(self.named) == list(self.named.keys())
        assert "up" in self.named
        assert len(self.named) == 2
        return x + sum(value.mean() for value in self.named.values()) + sum(v.std() for _, v in self.named.items())


def test_lists_and_dictionaries_of_parameters():
    model, x = nn.Sequential(Prompts()).double(), torch.randn(3, 4).double()
    start = model(x)
    report = attach(model, ranks=2, target_modules="all")
    assert {layer.name for layer in report.layers} == {"0.listed.0", "0.listed.1", "0.named.up", "0.named.down"}
    assert {layer.kind for layer in report.layers} == {"FloraParameterCollection"}
    assert torch.equal(model(x), start)
    randomize(model)
    output = model(x)
    output.sum().backward()
    assert all(bool(p.grad.abs().sum() > 0) for p in adapter_parameters(model))
    with disabled(model):
        assert torch.equal(model(x), start)
    with pytest.raises(IndexError, match="index 3 for 3 entries"):
        model[0].listed[3]
    merged = merge(copy.deepcopy(model))
    assert type(merged[0].listed) is nn.ParameterList
    assert close(merged(x), output)
    assert torch.equal(detach(model)(x), start)


# --- what is left out --------------------------------------------------------------------------------


class Odd(nn.Module):
    """Weights of every kind that a choice for the whole model meets."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.zeros(2, 3))
        self.linear = nn.Linear(3, 3)
        self.limited = nn.Embedding(4, 3, max_norm=1.0)
        self.inner = nn.Sequential(nn.LayerNorm((2, 3)))
        self.codes = nn.Linear(3, 3)
        self.codes.weight = nn.Parameter(torch.zeros(3, 3, dtype=torch.int8), requires_grad=False)

    def forward(self, x):
        return self.inner(self.linear(x + self.token))


class TestReport:
    def test_layers_of_known_kinds(self):
        report = attach(Odd(), ranks=2)
        assert [layer.name for layer in report.layers] == ["linear.weight"]
        reasons = {weight.name: weight.reason for weight in report.skipped}
        unknown = "no layer of a known kind; name it in target_parameters, or pass target_modules='all'"
        assert reasons.pop("token") == reasons.pop("inner.0.weight") == reasons.pop("inner.0.bias") == unknown
        assert reasons.pop("limited.weight").startswith("FloraEmbedding: the base has max_norm=1.0")
        assert reasons.pop("codes.weight").startswith("'weight' of Linear is of type torch.int8")
        assert not reasons
        assert f"skipped: token, inner.0.weight, inner.0.bias: {unknown}" in str(report)

    def test_everything(self):
        model, x = Odd(), torch.randn(2, 3)
        expected = model(x)
        report = attach(model, ranks=2, target_modules="all", exclude_modules="codes")
        assert [layer.name for layer in report.layers] == ["linear.weight", "inner.0.weight", "inner.0.bias"]
        reasons = {weight.name: weight.reason for weight in report.skipped}
        assert reasons.pop("linear.bias") == "one axis"
        assert reasons.pop("token").startswith("'token' belongs to the model itself")
        assert set(reasons) == {"limited.weight"}
        assert close(model(x), expected, 30)

    def test_what_is_named_is_refused_and_not_skipped(self):
        for options, message in [
            ({"target_modules": "limited"}, r"max_norm=1.0"),
            ({"target_modules": "codes"}, r"is of type torch.int8"),
            ({"target_parameters": "token"}, r"'token' belongs to the model itself"),
            ({"target_modules": "inner.0"}, r"no layers of a known kind, such as 'inner.0', a LayerNorm"),
        ]:
            with pytest.raises(ValueError, match=message):
                attach(Odd(), ranks=2, **options)
        assert not attach(Odd(), ranks=2, target_modules="linear").skipped

    def test_a_tied_weight_that_one_holder_cannot_have_is_left_out(self):
        model = nn.Sequential(nn.Embedding(4, 3, max_norm=1.0), nn.Linear(3, 4), nn.Linear(4, 2))
        model[1].weight = model[0].weight
        report = attach(model, ranks=2)
        assert [layer.name for layer in report.layers] == ["2.weight"]
        assert {weight.name for weight in report.skipped} == {"0.weight"}


# --- subclasses --------------------------------------------------------------------------------------


class Doubled(Conv1D):
    """A transposed linear layer with a forward of its own."""

    def forward(self, x):
        return 2.0 * super().forward(x)


class Renamed(nn.Linear):
    """A subclass that computes as its parent does."""


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda: Conv1D(5, 4), FloraLinear),
        (lambda: Doubled(5, 4), FloraLinear),
        (lambda: Renamed(4, 5), FloraLinear),
        (lambda: OwnConv(4, 5, 1), FloraConv),
        (lambda: nn.Bilinear(4, 4, 5), FloraBilinear),
        (lambda: nn.LayerNorm((2, 4)), FloraParameter),
    ],
)
def test_subclasses_compute_with_the_effective_weight(make, kind):
    model = nn.Sequential(make()).double()
    x = torch.randn(2, 4).double()
    inputs = (x, x) if isinstance(model[0], nn.Bilinear) else (x.mT[None],) if kind is FloraConv else (x,)
    inputs = (torch.randn(1, 4, 3).double(),) if kind is FloraConv else inputs
    attach(model, ranks=2, target_modules="all")
    assert type(model[0]) is kind
    randomize(model)
    before = model[0](*inputs)
    plain = merge(model)[0]
    assert close(plain(*inputs), before)
    assert type(plain) is type(make())
