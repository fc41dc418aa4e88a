"""Batches whose rows have adapters of their own: each row is what it is in a batch of its own."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from flora_tensor.adapter import Adapter
from flora_torch import activate, adapter_parameters, adapters_for_rows, attach, attach_adapter, disabled
from test_torch_layers import ScaledLinear, close

ROWS = ["a", "b", None, ("b", "a"), "a", ()]

pytestmark = pytest.mark.usefixtures("seeded", "large_products")


def adapted(model, dtype=torch.float64, names=("a", "b"), **options):
    model = model.to(dtype).eval()
    for name in names:
        attach(model, ranks=2, adapter_name=name, **options)
    for parameter in adapter_parameters(model):
        nn.init.normal_(parameter, std=0.5)
    return model


def alone(model, x, rows, *args):
    """Run each row in a batch of its own, with its adapters active."""
    results = []
    for row, given in zip(x, rows):
        activate(model, *([given] if isinstance(given, str) else given or ()))
        results.append(model(row.unsqueeze(0), *args))
    activate(model, "a", "b")
    return torch.cat(results)


LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), (6, 3, 6)),
    "transposed linear": (lambda: Conv1D(5, 6), (6, 6)),
    "conv": (lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2), (6, 4, 5, 4)),
    "transposed conv": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), (6, 4, 3, 3)),
    "embedding": (lambda: nn.Embedding(9, 6), (6, 4)),
}


class TestLayers:
    @pytest.mark.parametrize("magnitude", [False, True])
    @pytest.mark.parametrize("kind", LAYERS)
    def test_rows_are_what_they_are_alone(self, kind, magnitude):
        make, shape = LAYERS[kind]
        for path in ("auto", "factored", "dense"):
            model = adapted(nn.Sequential(make()), path=path, magnitude=magnitude)
            x = torch.randint(9, shape) if kind == "embedding" else torch.randn(shape).double()
            expected = alone(model, x, ROWS)
            with adapters_for_rows(model, ROWS) as same:
                assert same is model
                output = model(x)
            assert close(output, expected, *model[0].base_layer.weight.shape, factor=100)
            with torch.no_grad(), disabled(model):
                assert torch.equal(output[2].detach(), model(x)[2])
            with adapters_for_rows(model, ROWS), disabled(model), torch.no_grad():
                plain = model(x)
            with torch.no_grad(), disabled(model):
                assert torch.equal(plain, model(x))

    def test_gradients_are_those_of_each_alone(self):
        model = adapted(nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)))
        x, direction = torch.randn(6, 6).double(), torch.randn(6, 4).double()
        expected = torch.autograd.grad(alone(model, x, ROWS), adapter_parameters(model), direction)
        with adapters_for_rows(model, ROWS):
            ours = torch.autograd.grad(model(x), adapter_parameters(model), direction)
        assert all(close(a, b, 6, 5, factor=1e4) for a, b in zip(ours, expected))

    def test_one_adapter_for_all_rows_and_weights(self):
        model = adapted(nn.Sequential(nn.Linear(6, 5)))
        x = torch.randn(3, 6).double()
        activate(model, {"b": 0.5})
        expected = model(x)
        with adapters_for_rows(model, ["b"] * 3):
            assert torch.equal(model(x), expected)
        # The choice of the moment is as it was.
        assert torch.equal(model(x), expected)

    def test_sixteen_bits_round_once(self):
        model = adapted(nn.Sequential(nn.Linear(6, 5)), torch.bfloat16)
        x = torch.randn(6, 6).to(torch.bfloat16)
        expected = alone(model, x, [*ROWS[:3], "a", "b", None])
        with adapters_for_rows(model, [*ROWS[:3], "a", "b", None]):
            output = model(x)
        assert output.dtype == torch.bfloat16
        assert torch.equal(output, expected)

    def test_the_base_runs_once(self):
        model = adapted(nn.Sequential(nn.Linear(6, 5)))
        calls = []
        model[0].base_layer.register_forward_hook(lambda *_: calls.append(1))
        with adapters_for_rows(model, ROWS):
            model(torch.randn(6, 6).double())
        assert len(calls) == 1

    def test_a_layer_without_the_adapter_is_its_base_for_these_rows(self):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).double().eval()
        attach(model, ranks=2, adapter_name="a", target_modules="0")
        attach(model, ranks=2, adapter_name="b", target_modules="1")
        for parameter in adapter_parameters(model):
            nn.init.normal_(parameter)
        x = torch.randn(2, 4).double()
        expected = alone(model, x, ["a", "b"])
        with adapters_for_rows(model, ["a", "b"]):
            assert close(model(x), expected, 4, 4)


def test_a_transformer_with_beams():
    config = GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=23, n_positions=12, attn_implementation="eager")
    model = adapted(GPT2LMHeadModel(config), torch.float32)
    ids = torch.arange(12).reshape(3, 4)
    rows = ["a", "b", None]
    with torch.no_grad():
        expected = []
        for row, name in zip(ids, rows):
            activate(model, *([name] if name else []))
            expected.append(model(row.unsqueeze(0)).logits)
        activate(model, "a", "b")
        with adapters_for_rows(model, rows):
            # Positions are looked up once, as one row, and the adapters' rows of them belong to every row.
            assert close(model(ids).logits, torch.cat(expected), 16, 16, factor=300)
        beams = ids.repeat_interleave(2, 0)
        with adapters_for_rows(model, [name for name in rows for _ in range(2)]):
            assert close(model(beams).logits, torch.cat(expected).repeat_interleave(2, 0), 16, 16, factor=300)
        with (
            adapters_for_rows(model, rows),
            pytest.raises(ValueError, match=r"adapters for 3 rows, but 'transformer.wte'"),
        ):
            model(beams)


def test_a_compiled_model_takes_other_rows():
    """It is compiled for the adapters of a batch, and once more when an adapter first has another number of rows."""
    torch._dynamo.reset()
    model = adapted(nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 5)))
    counter = CompileCounter()
    compiled, x = torch.compile(model, backend=counter, fullgraph=True), torch.randint(9, (6, 4))
    batches = [("aabb..", 1), (".baab.", 1), ("baaab.", 2), ("bbb.aa", 3), ("aabbbb", 3), ("aa....", 4), ("aabb..", 4)]
    for text, count in batches:
        rows = [None if name == "." else name for name in text]
        with torch.no_grad(), adapters_for_rows(model, rows):
            for _ in range(2):
                assert close(compiled(x), model(x), 6, 5)
        assert counter.frame_count == count, text


class TestRefusals:
    def test_lengths_that_do_not_fit(self):
        model = adapted(nn.Sequential(nn.Linear(6, 5)))
        with adapters_for_rows(model, ["a", "b"]):
            for shape in [(3, 6), (6,), (4, 2, 6)]:
                with pytest.raises(
                    ValueError, match=r"adapters for 2 rows, but '0' was given an input of shape \(.*beams"
                ):
                    model(torch.zeros(shape).double())
        conv = adapted(nn.Sequential(nn.Conv1d(2, 2, 1)))
        with adapters_for_rows(conv, ["a", "b"]), pytest.raises(ValueError, match="whose first axis is not these rows"):
            conv(torch.zeros(2, 5).double())
        with adapters_for_rows(conv, []), pytest.raises(ValueError, match="adapters for 0 rows"):
            conv(torch.zeros(2, 2, 5).double())

    def test_before_anything_runs(self):
        model = adapted(nn.Sequential(nn.Linear(6, 5)))
        with pytest.raises(ValueError, match="adapters_for_rows: the model has no adapter 'c'; it has a, b"):
            adapters_for_rows(model, ["a", "c"]).__enter__()
        with adapters_for_rows(model, ["a"]):
            with pytest.raises(ValueError, match="the rows have adapters already; leave the other with block first"):
                adapters_for_rows(model, ["b"]).__enter__()
            assert model[0].row_plan.rows == {"a": [0]}
        assert model[0].row_plan is None
        with pytest.raises(ValueError, match="the model has no adapter; call attach first"):
            adapters_for_rows(nn.Linear(2, 2), ["a"]).__enter__()

    def test_products_that_are_not_known_row_by_row(self):
        for module, options in [
            (nn.Bilinear(3, 3, 3), {"target_parameters": "0.weight"}),
            (ScaledLinear(3, 3), {}),
        ]:
            model = adapted(nn.Sequential(module), **options)
            with pytest.raises(
                ValueError, match=r"'a' changes '0', a .* whose product with the weight is not known row"
            ):
                adapters_for_rows(model, ["a"]).__enter__()
            assert model[0].row_plan is None

    def test_tensors_that_are_replaced_whole(self):
        model = adapted(nn.Sequential(nn.Linear(3, 3)))
        attach_adapter(model, Adapter({}, whole={"0.bias": np.ones(3)}), adapter_name="c")
        with pytest.raises(ValueError, match="'c' replaces 'bias' of '0' whole, which has one value for all rows"):
            adapters_for_rows(model, ["a"]).__enter__()
        activate(model, "a")
        with adapters_for_rows(model, ["a"]):
            copy.deepcopy(model)(torch.zeros(1, 3).double())
