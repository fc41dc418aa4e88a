"""Adapted models under PyTorch's own tools: traced, exported, replicated, wrapped, and run on nothing."""

import contextlib
import copy
import io

import pytest
import safetensors.torch
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.nn.utils import prune
from transformers import GPT2Config, GPT2LMHeadModel

from flora_torch import (
    FloraLayer,
    FloraLinear,
    activate,
    adapter_parameters,
    adapters_for_rows,
    attach,
    detach,
    disabled,
    load_adapter,
    merge,
    merge_,
    save_adapter,
    unmerge_,
)
from flora_torch.cost import _TRACES_SIZES
from support import same_bits, tolerance

IDS = torch.arange(10).reshape(2, 5)


class Net(nn.Module):
    """Every way of computing an output: factored, formed, read, recurrent."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1, groups=2)
        self.gru = nn.GRU(8, 8, batch_first=True)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 11)

    def forward(self, ids):
        x, _ = self.gru(self.conv(self.embed(ids).mT).mT)
        return self.head(x + self.attention(x, x, x, need_weights=False)[0])


def net():
    torch.manual_seed(0)
    return Net().eval()


def randomize(model):
    for parameter in adapter_parameters(model):
        nn.init.normal_(parameter, std=0.3)
    return model


def adapted(**options):
    model = net()
    attach(model, ranks=2, **options)
    return randomize(model)


def close(a, b):
    return float((a - b).detach().norm()) <= tolerance("float32", 100, norm=float(b.detach().norm()), factor=1e3)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_traced_by_jit():
    model = adapted()
    traced = torch.jit.trace(model, (IDS,), check_trace=False)
    assert close(traced(IDS), model(IDS))


@pytest.mark.skipif(torch.__version__ < "2.7", reason="earlier compilers trace no contextlib")
@pytest.mark.filterwarnings("ignore:The tensor attributes .*_flat_weights")
@pytest.mark.parametrize("merged", [False, True])
def test_exported(merged):
    model = adapted()
    expected = model(IDS)
    exported = torch.export.export(merge(model) if merged else model, (IDS,))
    assert close(exported.module()(IDS), expected)


class Product(Net):
    """Beside these layers, a bilinear form and a bag."""

    def __init__(self):
        super().__init__()
        self.form, self.bag = nn.Bilinear(11, 11, 5), nn.EmbeddingBag(11, 5)

    def forward(self, ids):
        y = self.head(self.conv(self.embed(ids).mT).mT)
        return self.form(y, y).sum(1) + self.bag(ids)


@pytest.mark.skipif(torch.__version__ < "2.7", reason="earlier compilers trace no contextlib")
@pytest.mark.parametrize("strict", [False, True])
def test_exported_for_batches_of_any_size(strict):
    """The cost rule would prefer either way for some of these, and a program has one."""
    torch.manual_seed(0)
    model = Product().eval()
    attach(model, ranks=2, target_modules=["embed", "conv", "head", "form", "bag"])
    randomize(model)
    sizes = {k: torch.export.Dim(name, min=2, max=64) for k, name in enumerate(("batch", "length"))}
    exported = torch.export.export(model, (IDS,), dynamic_shapes=(sizes,), strict=strict).module()
    for shape in ((2, 3), (64, 64)):
        ids = torch.randint(0, 11, shape)
        assert close(exported(ids), model(ids))


@pytest.mark.skipif(not _TRACES_SIZES, reason="earlier compilers do not tell which sizes are fixed")
@pytest.mark.parametrize("grad", [False, True])
def test_compiled_for_all_lengths_as_often_as_the_base(grad):
    """The cost rule prefers the other way from some length on, another one in each layer; a compiler stops at eight."""
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 64), nn.Linear(64, 8))
    attach(model, ranks=2)
    randomize(model)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    ways: set[tuple[bool, ...]] = set()
    with torch.set_grad_enabled(grad):
        for n in (4, 16, 64, 256, 2048):
            x = torch.randn(n, 8)
            assert close(compiled(x), model(x))
            inputs = [torch.randn(n, layer.in_features) for layer in model]
            updates = [layer.tucker_update["default"] for layer in model]
            ways.add(tuple(map(FloraLinear._forms_delta, model, updates, inputs)))
    assert len(ways) > 2
    assert counter.frame_count == 2  # for the first length, and for any


def test_shapes_on_the_meta_device():
    model = adapted().to("meta")
    out = model(IDS.to("meta"))
    assert (out.shape, out.device.type) == ((2, 5, 11), "meta")


@pytest.mark.parametrize("path", ["factored", "dense"])
@pytest.mark.parametrize(
    ("base", "shape", "arrangements"),
    [
        (nn.Conv1d(8, 8, 3, groups=2), (0, 8, 5), [None, "(o w) i", "o (i w)"]),
        (nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"), (0, 8, 5, 5), [None, "(o h) (i w)", "o (i h w)"]),
        (nn.ConvTranspose2d(8, 8, 3, groups=2), (0, 8, 5, 5), [None]),
        (nn.Linear(8, 4), (3, 0, 8), [None]),
    ],
)
def test_batches_without_samples(base, shape, arrangements, path):
    for arrangement in arrangements:
        for memory in ("normal", "low"):
            model = nn.Sequential(copy.deepcopy(base))
            attach(model, ranks=2, path=path, memory=memory, arrangement=arrangement)
            out = model(torch.zeros(shape))
            assert out.shape == base(torch.zeros(shape)).shape
            out.sum().backward()
            assert all(bool((p.grad == 0).all()) for p in adapter_parameters(model))


RUNNERS = {
    "parallel": nn.DataParallel,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "averaged": torch.optim.swa_utils.AveragedModel,
}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("runner", RUNNERS)
def test_what_only_runs_a_model_adds_nothing_to_names(runner, tmp_path):
    """A file that was saved through it fits the model itself, and the other way round."""
    model, wrap = adapted(), RUNNERS[runner]
    expected = model(IDS)
    wrapped = wrap(model)
    one, two = save_adapter(model, tmp_path / "one"), save_adapter(wrapped, tmp_path / "two")
    assert all((one / file.name).read_bytes() == file.read_bytes() for file in two.iterdir())
    other = net()
    load_adapter(other, two)
    assert close(other(IDS), expected)
    fresh = wrap(net())
    load_adapter(fresh, one)
    assert close(fresh(IDS), expected)
    assert close(merge(fresh)(IDS), expected)
    again = wrap(net())
    assert [layer.name for layer in attach(again, ranks=1, target_modules=["head"]).layers] == ["head.weight"]
    unmerge_(merge_(again))
    detach(again)
    assert not any(isinstance(module, FloraLayer) for module in again.modules())


def test_a_layer_that_is_compiled_by_itself(tmp_path):
    """It would be called without the adapter; one that is compiled in place is not."""
    model = adapted()
    path = save_adapter(model, tmp_path / "adapter")
    other = net()
    other.head = torch.compile(other.head, backend="eager")
    attempts = {"load_adapter": lambda: load_adapter(other, path), "attach": lambda: attach(other, ranks=2)}
    for where, attempt in attempts.items():
        with pytest.raises(ValueError, match=rf"{where}: the module of 'head.weight' was compiled by .*attach first"):
            attempt()
        assert not any(isinstance(module, FloraLayer) for module in other.modules())
        assert all(p.requires_grad for p in other.parameters())
    other = net()
    other.head.compile(backend="eager")
    load_adapter(other, path)
    with torch.no_grad():
        assert close(other(IDS), model(IDS))


def test_compiled_once_and_switched():
    model = adapted()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        assert close(compiled(IDS), model(IDS))
        activate(model)
        assert close(compiled(IDS), net()(IDS))
        activate(model, "default")
        expected = model(IDS)
        merge_(model)
        assert close(compiled(IDS), expected)


@pytest.mark.skipif(torch.__version__ < "2.7", reason="earlier compilers trace no contextlib")
@pytest.mark.parametrize("memory", ["normal", "low"])
def test_what_is_switched_back_is_not_compiled_again(memory):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 5)).eval()
    for name in ("a", "b"):
        attach(model, ranks=2, adapter_name=name, memory=memory)
    randomize(model)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)

    def check(n_graphs):
        assert close(compiled(IDS), model(IDS))
        assert counter.frame_count == n_graphs

    check(1)
    randomize(model)  # other values, as of an optimizer's step
    check(1)
    # Each choice is a graph of its own; of weights other than one, numbers are no part of it.
    for chosen, n_graphs in (["a"], 2), (["a", "b"], 2), ([{"a": 0.5, "b": 0.25}], 3), ([{"a": 2.0, "b": -1.0}], 3):
        activate(model, *chosen)
        check(n_graphs)
    activate(model, "a", "b")
    with disabled(model):
        check(4)
    check(4)
    merge_(model)
    check(5)
    unmerge_(model)
    check(5)


@pytest.mark.parametrize("grad", [True, False])
def test_called_with_other_parameters(grad):
    model = adapted()
    own = dict(model.named_parameters())
    zeros = {name: torch.zeros_like(p) if "tucker_update" in name else p for name, p in own.items()}
    with torch.set_grad_enabled(grad):
        assert close(torch.func.functional_call(model, zeros, (IDS,)), net()(IDS))
        assert close(torch.func.functional_call(model, own, (IDS,)), model(IDS))


def test_replicas_of_data_parallel():
    model, x = adapted(), torch.randn(2, 8)
    replica = model.head._replicate_for_data_parallel()
    replica._modules = dict(model.head._modules)
    assert torch.equal(replica(x), model.head(x))


def test_trained_after_inference_mode():
    model = adapted()
    with torch.inference_mode():
        before = model(IDS)
    model(IDS).sum().backward()
    assert close(model(IDS), before)
    assert all(p.grad is not None for p in adapter_parameters(model))


def test_states_are_assigned_and_whole_models_saved():
    model, other = adapted(), net()
    attach(other, ranks=2)
    other.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(other(IDS), model(IDS))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(IDS), model(IDS))


def test_everything_is_frozen_thawed_and_taken_off():
    model = adapted()
    model.requires_grad_(False)
    model.requires_grad_(True)
    model(IDS).sum().backward()
    with disabled(model):
        model(IDS).sum().backward()
    detach(model)
    assert all(
        same_bits(value, other) for value, other in zip(model.state_dict().values(), net().state_dict().values())
    )
    assert all(p.requires_grad for p in model.parameters())


def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=13, n_positions=12, tie_word_embeddings=True)
    return GPT2LMHeadModel(config).eval()


def test_merged_transformers_are_saved_and_loaded(tmp_path):
    model = gpt2()
    attach(model, ranks=2)
    randomize(model)
    expected = model(IDS).logits
    text = model.generate(IDS[:, :3], max_new_tokens=3, do_sample=False, pad_token_id=0)
    merge(model).save_pretrained(tmp_path)
    again = GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    assert close(again(IDS).logits, expected)
    assert torch.equal(again.generate(IDS[:, :3], max_new_tokens=3, do_sample=False, pad_token_id=0), text)


def test_transformers_with_adapted_tied_embeddings_are_saved_as_they_are(tmp_path):
    """As transformers' Trainer saves and resumes them."""
    model, again = gpt2(), gpt2()
    attach(model, ranks=2)
    randomize(model)
    model.save_pretrained(tmp_path)
    attach(again, ranks=2)
    state = safetensors.torch.load_file(tmp_path / "model.safetensors")
    left_out = set(again.state_dict()) - set(state)
    assert {name.partition(".")[0] for name in left_out} <= {"lm_head", "transformer"}
    assert len(left_out) == 4  # the base's weight, the core and two factors have another name too
    missing, unexpected = again.load_state_dict(state, strict=False)
    assert (set(missing), unexpected) == (left_out, [])
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_what_transformers_does_to_embeddings_is_done_before_or_after():
    model = gpt2()
    model.resize_token_embeddings(15)
    attach(model, ranks=2)
    randomize(model)
    expected = model(IDS).logits
    with pytest.raises(AttributeError, match=r"wte\.weight` is neither a parameter"):
        model.tie_weights()
    with pytest.raises(TypeError, match=r"Old embeddings are of type .*FloraEmbedding"):
        model.resize_token_embeddings(17)
    for layer, name in ((model.lm_head, "weight"), (model.transformer.h[0].mlp.c_fc, "bias")):
        with pytest.raises(ValueError, match=f"'{name}' cannot be set on a layer with an adapter.*before the adapter"):
            setattr(layer, name, nn.Parameter(torch.zeros(8)))
    assert torch.equal(model(IDS).logits, expected)
    merge(model).tie_weights()
    model.resize_token_embeddings(17)
    assert close(model(IDS).logits[..., :15], expected)


def test_weights_that_accelerate_keeps_elsewhere():
    """A layer's updates are read and not called, so that the layer has to bring them along."""
    offload = pytest.importorskip("accelerate").cpu_offload
    model = adapted(target_modules=["embed", "head"])
    with torch.no_grad():
        expected = model(IDS)
        classes = ["FloraEmbedding", "FloraLinear", "MultiheadAttention", "GRU"]
        offload(model, execution_device="cpu", preload_module_classes=classes)
        assert {p.device.type for p in adapter_parameters(model)} == {"meta"}
        assert close(model(IDS), expected)


@pytest.mark.parametrize("shape", [(1, 8), (64, 8)])
@pytest.mark.parametrize("by_rows", [False, True])
def test_updates_that_nothing_brings_in_are_refused(shape, by_rows):
    """PyTorch adds products with values of nowhere to the output, without an error: the result was arbitrary."""
    offload = pytest.importorskip("accelerate").cpu_offload
    model = nn.Sequential(nn.Linear(8, 8), nn.GRU(8, 8)).eval()
    attach(model, ranks=2)
    offload(model, execution_device="cpu")
    for layer, name in ((model[0], "FloraLinear"), (model[1], "FloraParameter"))[: 1 if by_rows else 2]:
        rows = adapters_for_rows(model[0], ["default"] * shape[0]) if by_rows else contextlib.nullcontext()
        with torch.no_grad(), rows, pytest.raises(RuntimeError, match=rf"preload_module_classes=\['{name}', …\]"):
            layer(torch.ones(shape))


def test_weights_that_hooks_compute_are_refused_with_the_way_out():
    pruned = nn.Sequential(nn.Linear(4, 4))
    prune.l1_unstructured(pruned[0], "weight", 0.5)
    with pytest.raises(ValueError, match="which a hook computes it from; use "):
        attach(pruned, ranks=2)
    prune.remove(pruned[0], "weight")
    attach(pruned, ranks=2)
