"""Models of many families: an adapter goes on everything that they have, trains, is stored, merged and taken off."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from families import FAMILIES, IDS, gpt_oss, mixtral, wav2vec2
from flora_torch import (
    FloraLayer,
    activate,
    adapter_parameters,
    attach,
    detach,
    disabled,
    load_adapter,
    merge,
    merge_,
    save_adapter,
    unmerge_,
)
from support import bfloat16_tolerance, same_bits, tolerance

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=FAMILIES)
def family(request):
    return FAMILIES[request.param]


def frozen(family):
    """Make a model in double precision, without gradients: torch takes other kernels where there are some."""
    torch.manual_seed(0)
    return family.make().double().eval().requires_grad_(False)


def run(family, model):
    inputs = {name: x.double() if x.is_floating_point() else x for name, x in family.inputs.items()}
    return family.read(model(**inputs))


def close(a, b, depth=1e4):
    return float((a - b).detach().norm()) <= tolerance("float64", 100, norm=float(b.detach().norm()), factor=depth)


def bits(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same_state(a, b):
    return a.keys() == b.keys() and all(same_bits(a[name], b[name]) for name in a)


class TestEveryFamily:
    @pytest.mark.parametrize("targets", ["all", None])
    def test_adapter_on_everything(self, family, targets, tmp_path):
        model = frozen(family)
        original = copy.deepcopy(model)
        before, modules = bits(model), [type(module) for module in model.modules()]
        matrices = {name for name, p in model.named_parameters() if p.dim() > 1 and "parametrizations" not in name}
        with torch.no_grad():
            start = run(family, model)
        report = attach(model, ranks=2, target_modules=targets)
        adapted = {name for layer in report.layers for name in (layer.name, *layer.tied)}
        assert matrices <= adapted | {weight.name for weight in report.skipped}
        assert targets != "all" or matrices <= adapted
        with torch.no_grad():
            assert torch.equal(run(family, model), start)
        self.train(family, model)
        trained = run(family, model)
        assert not close(trained, start)
        with disabled(model), torch.no_grad():
            assert torch.equal(run(family, model), start)

        if not any(parametrize.is_parametrized(module) for module in model.modules()):
            assert close(run(family, merge_(model)), trained)
            unmerge_(model)
            assert torch.equal(run(family, model), trained)

        again = copy.deepcopy(original)
        load_adapter(again, save_adapter(model, tmp_path / "adapter"))
        assert torch.equal(run(family, again), trained)
        plain = merge(again)
        assert not any(isinstance(module, FloraLayer) for module in plain.modules())
        assert close(run(family, plain), trained)
        assert len(list(plain.parameters())) == len(list(original.parameters()))

        detach(model)
        assert same_state(bits(model), before)
        assert [type(module) for module in model.modules()] == modules
        with torch.no_grad():
            assert torch.equal(run(family, model), start)

    def train(self, family, model):
        """Take two steps: in the first one, only the cores have a gradient, for the factors are multiplied by zero."""
        parameters = adapter_parameters(model)
        assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in parameters}
        for _ in range(2):
            for parameter in parameters:
                parameter.grad = None
            run(family, model).square().mean().backward()
            with torch.no_grad():
                for parameter in parameters:
                    assert parameter.grad is not None
                    # By its sign: the step does not depend on how large the model's outputs are.
                    parameter -= 0.05 * parameter.grad.sign()
        moved = [p for p in parameters if bool(p.grad.abs().sum() > 0)]
        assert len(moved) > len(parameters) / 2

    def test_everything_is_saved_by_its_plain_name(self, family, tmp_path):
        """An adapter from one library version of a model has the names of its weights, whatever wraps them."""
        model = frozen(family)
        known = {*model.state_dict(), *(name for name, _ in named_computed(model))}
        report = attach(model, ranks=1, target_modules="all")
        assert {layer.name for layer in report.layers} <= known


def named_computed(model):
    for name, module in model.named_modules():
        for local in getattr(module, "parametrizations", ()):
            yield f"{name}.{local}", module


def test_weight_normalization_stays_where_it_can_hold_the_merged_weight():
    model = wav2vec2().double().eval()
    names = set(model.state_dict())
    attach(model, ranks=2)
    for parameter in adapter_parameters(model):
        nn.init.normal_(parameter, std=0.3)
    inputs = FAMILIES["wav2vec2"].inputs["input_values"].double()
    expected = model(inputs).last_hidden_state
    assert set(merge(model).state_dict()) == names
    assert close(model(inputs).last_hidden_state, expected)


class TestExperts:
    @pytest.mark.parametrize("make", [mixtral, gpt_oss])
    @pytest.mark.parametrize("way", ["eager", "batched_mm", "grouped_mm"])
    def test_every_way_of_running_experts_gives_the_dense_result(self, make, way):
        torch.manual_seed(0)
        # The grouped product of torch knows no double precision.
        dtype = torch.float32 if way == "grouped_mm" else torch.float64
        model = make(way).to(dtype)
        attach(model, ranks=3, target_modules="all", init="principal")
        for parameter in adapter_parameters(model):
            nn.init.normal_(parameter, std=0.3)
        output = model(IDS).logits
        plain = merge(copy.deepcopy(model))
        expected = plain(IDS).logits
        bound = tolerance(str(dtype)[6:], 100, norm=float(expected.detach().norm()), factor=1e4)
        assert float((output - expected).detach().norm()) <= bound
        direction = torch.randn_like(output)
        output.backward(direction)
        ours = [p.grad for p in adapter_parameters(model)]
        dense = copy.deepcopy(model)
        for layer in dense.modules():
            if type(layer).__name__ == "FloraExperts":
                layer._is_lazy = lambda name: False
        for parameter in adapter_parameters(dense):
            parameter.grad = None
        dense(IDS).logits.backward(direction)
        for mine, theirs in zip(ours, [p.grad for p in adapter_parameters(dense)]):
            assert float((mine - theirs).norm()) <= 30 * bound * max(1.0, float(theirs.norm()))

    @pytest.mark.parametrize("way", ["eager", "batched_mm"])
    def test_only_used_experts_get_a_gradient(self, way):
        torch.manual_seed(0)
        model = mixtral(way).double()
        attach(model, ranks=2, target_modules="experts")
        for parameter in adapter_parameters(model):
            nn.init.normal_(parameter, std=0.3)
        used = set()
        router = model.model.layers[0].mlp.gate
        router.register_forward_hook(lambda module, inputs, output: used.update(output[2].flatten().tolist()))
        model(IDS[:1, :1]).logits.sum().backward()
        assert 0 < len(used) < 4
        for update in model.model.layers[0].mlp.experts.updates("default").values():
            rows = update.factor_0.grad.abs().sum(1)
            assert {k for k, size in enumerate(rows.tolist()) if size > 0} == used

    # torch.compile looks at the gradient of whatever it traces.
    @pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
    def test_several_adapters_autocast_checkpoints_and_compilation(self):
        torch.manual_seed(0)
        model = mixtral()
        attach(model, ranks=2, target_modules="experts")
        attach(model, ranks=3, target_modules="experts", adapter_name="other", init="principal")
        for parameter in adapter_parameters(model):
            nn.init.normal_(parameter, std=0.3)
        activate(model, {"default": 0.5, "other": 2.0})
        plain = merge(copy.deepcopy(model))
        expected = plain(IDS).logits
        size = float(expected.detach().norm())
        bound = tolerance("float32", 100, norm=size, factor=1e4)
        assert float((model(IDS).logits - expected).detach().norm()) <= bound
        with torch.autocast("cpu", torch.bfloat16):
            error = (model(IDS).logits.float() - expected).detach().norm()
        assert float(error) <= bfloat16_tolerance(expected)
        experts = model.model.layers[0].mlp.experts
        inputs = torch.randn(6, 16), torch.tensor([[0, 2]] * 6), torch.rand(6, 2)
        compiled = torch.compile(experts, backend="eager")(*inputs)
        assert torch.allclose(compiled, experts(*inputs), atol=1e-5)
        torch._dynamo.reset()
        checkpoint(experts, *inputs, use_reentrant=False).sum().backward()
        assert all(bool(p.grad.abs().sum() > 0) for p in adapter_parameters(model))

    def test_no_change_of_an_expert_is_formed(self):
        torch.manual_seed(0)
        model = mixtral()
        attach(model, ranks=2, target_modules="experts")
        experts = model.model.layers[0].mlp.experts
        size = experts.base_layer.down_proj[0].numel()
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
            experts(torch.randn(2, 16), torch.tensor([[0, 1], [1, 2]]), torch.rand(2, 2))
        own = {p.data_ptr() for p in experts.base_layer.parameters()}
        inside = [x for x in saved if x.numel() >= size and x.untyped_storage().data_ptr() not in own]
        assert not inside
        assert any(x.numel() >= size for x in saved)
