"""Adapters on whole models: what is chosen, what is tied, what is saved, and that everything can be undone."""

import copy
import os
import pickle
import re
import shutil
import socket
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as multiprocessing
from safetensors.torch import load_file, save_file
from torch import nn

import flora_tensor as ft
from flora_tensor import Arrangement
from flora_torch import (
    FloraConv,
    FloraEmbedding,
    FloraLayer,
    FloraLinear,
    FloraParameter,
    TuckerUpdate,
    adapter_parameters,
    attach,
    detach,
    disabled,
    load_adapter,
    merge,
    save_adapter,
)
from support import tolerance
from torch_models import IDS, bits, cnn, encoder, gpt2, randomize, same_state

pytestmark = pytest.mark.usefixtures("one_thread", "seeded")


def logits(model, *inputs):
    output = model(*inputs)
    return getattr(output, "logits", output)


MODELS = {
    "cnn": (cnn, (IDS,), {}),
    "gpt2": (gpt2, (torch.arange(10).reshape(2, 5),), {}),
    "encoder": (encoder, (torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0)).double(),), {
        "target_modules": nn.Linear, "target_parameters": "in_proj_weight"
    }),
}  # fmt: skip


@pytest.fixture(params=MODELS)
def case(request):
    make, inputs, options = MODELS[request.param]
    return make(), inputs, options


class TestAnyModel:
    def test_attached_model_starts_as_it_was(self, case):
        model, inputs, options = case
        with torch.no_grad():
            before = logits(model, *inputs)
            report = attach(model, ranks=2, **options)
            assert torch.equal(logits(model, *inputs), before)
        assert report.n_parameters == sum(p.numel() for p in adapter_parameters(model))
        assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in adapter_parameters(model)}
        assert str(report).endswith(f"of the model's {report.n_model_parameters:,}")

    def test_merged_model_is_plain_and_equal(self, case):
        model, inputs, options = case
        names = list(model.state_dict())
        attach(model, ranks=2, **options)
        randomize(model)
        with torch.no_grad():
            expected = logits(model, *inputs)
            assert merge(model) is model
            output = logits(model, *inputs)
        assert list(model.state_dict()) == names
        assert not any(isinstance(m, FloraLayer | TuckerUpdate) for m in model.modules())
        assert all(p.requires_grad for p in model.parameters())
        dtype = str(output.dtype).removeprefix("torch.")
        assert float((output - expected).norm()) <= tolerance(dtype, 100, norm=float(expected.norm()), factor=100)

    def test_detached_model_has_its_modules_and_bits_back(self, case):
        model, _, options = case
        before, modules = bits(model), list(model.modules())
        flags = [p.requires_grad for p in model.parameters()]
        attach(model, ranks=2, **options)
        randomize(model)
        assert detach(model) is model
        assert same_state(bits(model), before)
        assert [id(m) for m in model.modules()] == [id(m) for m in modules]
        assert [p.requires_grad for p in model.parameters()] == flags
        assert not any("flora" in name for m in model.modules() for name in vars(m))

    def test_disabled_is_the_model_itself(self, case):
        model, inputs, options = case
        with torch.no_grad():
            before = logits(model, *inputs)
            attach(model, ranks=2, **options)
            randomize(model)
            changed = logits(model, *inputs)
            with disabled(model) as same, disabled(model):
                assert same is model
                assert torch.equal(logits(model, *inputs), before)
            assert torch.equal(logits(model, *inputs), changed)
            assert not torch.allclose(changed, before)

    @pytest.mark.parametrize("init", ["orthonormal", "official", "principal"])
    @pytest.mark.parametrize("dtype", [None, torch.bfloat16])
    def test_saved_adapter_is_read_bit_for_bit(self, case, init, dtype, tmp_path):
        model, inputs, options = case
        twin = copy.deepcopy(model)
        attach(model, ranks=3, init=init, dtype=dtype, scale=1.7, dropout=0.25, **options)
        with torch.no_grad():
            for parameter in adapter_parameters(model):
                parameter.add_(torch.randn_like(parameter) * 0.3)
        directory = save_adapter(model, tmp_path / "adapter", base_model_name_or_path="toy")
        report = load_adapter(twin, directory)
        assert report.n_parameters == sum(p.numel() for p in adapter_parameters(model))
        assert same_state(bits(twin), bits(model))
        with torch.no_grad():
            assert torch.equal(logits(twin, *inputs), logits(model, *inputs))
        randomize(twin)
        load_adapter(twin, directory)
        assert same_state(bits(twin), bits(model))

    def test_file_merges_without_torch_to_the_same_weights(self, case, tmp_path):
        model, _, options = case
        attach(model, ranks=3, init="principal", scale=1.7, **options)
        randomize(model)
        stored = ft.load_adapter(save_adapter(model, tmp_path / "adapter"))
        base = {name: p.detach().clone() for name, p in detach(copy.deepcopy(model)).named_parameters()}
        merged = dict(merge(model).named_parameters())
        assert len(stored) >= 3
        for name in stored:
            expected = merged[name].detach().double().numpy()
            ours = base[name].double().numpy() + stored.delta(name, dtype=np.float64)
            dtype = str(merged[name].dtype).removeprefix("torch.")
            assert np.linalg.norm(ours - expected) <= tolerance(dtype, *expected.shape, norm=np.linalg.norm(expected))

    def test_copies_and_pickles(self, case):
        model, inputs, options = case
        attach(model, ranks=2, **options)
        randomize(model)
        with torch.no_grad():
            expected = logits(model, *inputs)
            for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
                assert torch.equal(logits(twin, *inputs), expected)
                assert detach(twin) is twin
                assert all(p.requires_grad for p in twin.parameters())

    def test_training_lowers_the_loss_and_moves_only_the_adapter(self, case):
        model, inputs, options = case
        before = bits(model)
        attach(model, ranks=2, **options)
        target = torch.randn_like(logits(model, *inputs))
        optimizer = torch.optim.Adam(adapter_parameters(model), lr=0.02)
        losses = []
        for _ in range(15):
            loss = (logits(model, *inputs) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.97 * losses[0]
        assert same_state(bits(detach(model)), before)


class TestSelection:
    def names(self, model, **options):
        return [layer.name for layer in attach(model, ranks=2, **options).layers]

    @pytest.mark.parametrize(
        ("pattern", "expected"),
        [
            (None, ["embed.weight", "shared.weight", "blocks.1.weight"]),
            ("head", ["embed.weight"]),
            ("blocks.1", ["blocks.1.weight"]),
            (["1", "embed"], ["embed.weight", "blocks.1.weight"]),
            ("blocks.*", ["shared.weight", "blocks.1.weight"]),
            ("re:blocks[.][0-9]", ["shared.weight", "blocks.1.weight"]),
            (re.compile(r".*\.1"), ["blocks.1.weight"]),
            (nn.Conv2d, ["shared.weight", "blocks.1.weight"]),
            (lambda name, module: isinstance(module, nn.Conv2d) and module.groups == 8, ["blocks.1.weight"]),
        ],
    )
    def test_patterns(self, pattern, expected):
        assert self.names(cnn(), target_modules=pattern) == expected

    def test_exclusion_and_parameters(self):
        assert self.names(cnn(), exclude_modules=["embed", "head"]) == ["shared.weight", "blocks.1.weight"]
        assert self.names(encoder(), target_parameters="0.layers.0.self_attn.in_proj_weight") == [
            "0.layers.0.self_attn.in_proj_weight"
        ]
        # A pattern for many parameters means the weights among them, and a known kind of layer keeps its product.
        model = encoder()
        assert self.names(model, target_parameters="*.linear1.*") == [f"0.layers.{k}.linear1.weight" for k in range(2)]
        assert isinstance(model[0].layers[0].linear1, FloraLinear)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"target_modules": "block.1"}, "target_modules 'block.1' matches no module .* near names: blocks.1"),
            ({"target_modules": "zzz"}, "target_modules 'zzz' matches no module of the model$"),
            ({"target_modules": "all-linear"}, "matches no module of the model; pass torch.nn.Linear, a class"),
            ({"target_modules": r".*\.(0|1)"}, r"a regular expression begins with 're:', as 're:.*\\.\(0\|1\)'"),
            ({"target_modules": "norm"}, "no layers of a known kind, such as 'norm', a BatchNorm2d"),
            ({"target_modules": nn.LSTM}, "target_modules LSTM matches no module"),
            ({"target_modules": "re:("}, "the regular expression '\\(' cannot be read"),
            ({"target_parameters": "hed.weight"}, "matches no parameter of the model; near names: head.weight"),
            ({"target_parameters": "norm.weight"}, r"norm.weight: .* has shape \(8,\); an update needs two axes"),
            ({"exclude_modules": "embed"}, "'embed.weight' is tied to 'embed.weight', which is excluded"),
            ({"exclude_modules": "*"}, "no layer of the model can be adapted or all are excluded"),
            ({"ranks": {"head": 2}}, "ranks has no pattern for 'shared.weight'; add one, or '\\*'"),
            ({"ranks": {"*": 2, "heed": 3}}, "ranks has the pattern 'heed', which means no target; near names: head"),
            ({"scale": {"heed": 3.0}}, "scale has the pattern 'heed', which means no target"),
            ({"ranks": 0}, "rank 0 for mode 0; pass at least 1"),
            ({"ranks": (1, 2, 3)}, "attach: embed.weight: 3 ranks for 2 modes"),
            ({"ranks": 1.5}, "the fraction 1.5 for mode 0; pass one above 0 and at most 1"),
            ({"scale": float("nan")}, "scale is nan; pass a finite number"),
            ({"dropout": 1.0}, "dropout is 1.0; pass a number from 0 to below 1"),
            ({"init": "zeros"}, "there is no start 'zeros'; pass one of 'orthonormal'"),
            ({"init": "from_delta"}, "'from_delta' needs the tensor to decompose"),
            ({"init_tensors": {"head.weight": torch.ones(1)}}, "init_tensors with init 'orthonormal'"),
            (
                {"init": "from_delta", "init_tensors": {"heed.weight": torch.ones(1)}, "target_modules": "head"},
                "'from_delta' needs the tensor to decompose",
            ),
            (
                {"init": "from_gradient", "init_tensors": {"head.weight": torch.ones(1)}, "target_modules": "head"},
                r"got a tensor of shape \(1,\) for a weight of shape \(11, 8\)",
            ),
            ({"alpha": 2.0}, "alpha belongs to init 'official', 'loralib' or 'peft', not to 'orthonormal'"),
            ({"arrangement": "a b c"}, "for weights with 3 axes, and no target has as many"),
            (
                {"arrangement": {"head": "a b c"}},
                "attach: embed.weight: Arrangement 'a b c' is for weights with 3 axes",
            ),
            ({"adapter_name": "a.b"}, "an adapter cannot be named 'a.b'"),
            ({"path": "fast"}, "path is 'fast'; pass one of 'auto', 'factored', 'dense'"),
        ],
    )
    def test_refusals_change_nothing(self, options, message):
        model = cnn()
        before, modules = bits(model), [id(m) for m in model.modules()]
        model.norm.weight.requires_grad_(False)
        flags = [p.requires_grad for p in model.parameters()]
        with pytest.raises(ValueError, match=message):
            attach(model, **{"ranks": 2, **options})
        assert same_state(bits(model), before)
        assert [id(m) for m in model.modules()] == modules
        assert [p.requires_grad for p in model.parameters()] == flags
        assert not any("flora" in name for m in model.modules() for name in vars(m))

    def test_wrong_kinds_of_arguments(self):
        for options, message in [
            ({"target_modules": 3}, "3 is not a pattern"),
            ({"ranks": "8"}, "ranks is '8'; pass an integer, a fraction"),
            ({"ranks": True}, "ranks is True"),
            ({"ranks": (2, "x"), "target_modules": "head"}, "the rank for mode 1 is 'x'"),
            ({"scale": 2.0, "alpha": 2.0}, "got both scale and alpha"),
        ]:
            with pytest.raises(TypeError, match=message):
                attach(cnn(), **{"ranks": 2, **options})

    def test_what_is_no_model_is_refused_by_its_kind(self):
        with pytest.raises(TypeError, match=r"got str for a model; pass an nn\.Module"):
            attach("model.pt", ranks=2)

    def test_models_that_cannot_be_adapted(self):
        with pytest.raises(ValueError, match=r"no layer of the model can be adapted .* it is made of ReLU, Sequential"):
            attach(nn.Sequential(nn.ReLU()), ranks=2)
        with pytest.raises(ValueError, match=r"'weight' belongs to the model itself.* wrap it with FloraLinear"):
            attach(nn.Linear(3, 3), ranks=2)
        with torch.device("meta"):
            model = nn.Sequential(nn.Linear(3, 3))
        with pytest.raises(ValueError, match=r"attach: 0.weight: .* is on the meta device and has no values"):
            attach(model, ranks=2)
        with pytest.raises(ValueError, match="has no shape yet; run the model once"):
            attach(nn.Sequential(nn.LazyLinear(3)), ranks=2)
        with pytest.raises(ValueError, match=r"max_norm=1.0, which rewrites its weight at every use"):
            attach(nn.Sequential(nn.Embedding(4, 3, max_norm=1.0)), ranks=2)
        integers = nn.Sequential(nn.Linear(3, 3))
        integers[0].weight = nn.Parameter(torch.zeros(3, 3, dtype=torch.int8), requires_grad=False)
        with pytest.raises(ValueError, match=r"is of type torch.int8"):
            attach(integers, ranks=2)

    def test_second_adapter_of_the_same_name_changes_nothing(self):
        model = cnn()
        attach(model, ranks=2, target_modules="blocks.1")
        before = bits(model)
        with pytest.raises(ValueError, match=r"attach: blocks.1.weight: .* is an adapter 'default'"):
            attach(model, ranks=2)
        assert same_state(bits(model), before)
        assert type(model.shared) is nn.Conv2d


class TestRanks:
    def test_forms_and_report(self):
        model = cnn()
        report = attach(model, ranks={"blocks.1": 4, "shared": (2, None, 3, 1), "*": 0.3}, scale={"head": 2.0})
        by_name = {layer.name: layer for layer in report.layers}
        assert by_name["blocks.1.weight"].asked == (4, 4, 4, 4)
        assert by_name["blocks.1.weight"].ranks == (4, 1, 3, 3)
        assert by_name["blocks.1.weight"].clamped
        assert by_name["shared.weight"].ranks == (2, 4, 3, 1)
        assert not by_name["shared.weight"].clamped
        assert by_name["shared.weight"].tied == ("blocks.0.weight", "blocks.2.weight")
        assert by_name["embed.weight"].ranks == (3, 3)
        assert model.embed.tucker_update["default"].scale == 2.0
        assert model.shared.tucker_update["default"].scale == 1.0
        text = str(report)
        assert "4×1×3×3 (asked 4×4×4×4)" in text
        assert "embed.weight = head.weight" in text
        assert report.share == report.n_parameters / report.n_model_parameters

    def test_arrangements_by_name_and_for_all(self):
        model = cnn()
        report = attach(model, ranks=2, arrangement="o (i h w)")
        assert {layer.pattern for layer in report.layers} == {"o i", "o (i h w)"}
        detach(model)
        heads = Arrangement("(heads d) i -> heads d i", {"heads": 11})
        report = attach(model, ranks=2, arrangement={"embed": heads, "shared": "(o h) (i w)"})
        assert [layer.pattern for layer in report.layers] == [heads.pattern, "(o h) (i w)", "o i h w"]
        assert " as (o h) (i w)" in str(report)

    def test_alpha_gives_the_published_scales(self):
        for init, scale in [("official", 8.0), ("loralib", 8.0 / (2 + 1e-5)), ("peft", 4.0)]:
            model = cnn()
            attach(model, ranks=2, init=init, alpha=8.0, target_modules="shared")
            assert model.shared.tucker_update["default"].scale == scale

    def test_deltas_and_gradients(self):
        model, delta = cnn(), torch.randn(11, 8).double()
        attach(model, ranks=8, target_modules="head", init="from_delta", init_tensors={"head.weight": delta}, scale=0.5)
        assert torch.allclose(model.head.weight - model.head.base_layer.weight, delta)
        attach(
            model,
            ranks=8,
            target_modules="head",
            init="from_gradient",
            init_tensors={"embed.weight": delta},
            adapter_name="g",
        )
        assert not model.head.tucker_update["g"].core.any()

    def test_seeded_by_a_generator(self):
        drawn = []
        for _ in range(2):
            model = cnn()
            torch.rand(3)
            attach(model, ranks=2, generator=torch.Generator().manual_seed(7))
            drawn.append([p.detach() for p in adapter_parameters(model)])
        assert all(torch.equal(a, b) for a, b in zip(*drawn))


def adapter_delta(layer, parameter):
    return layer.updates("default")[parameter].delta().detach()


class TestTies:
    def test_shared_modules_have_one_wrapper(self):
        model = cnn()
        attach(model, ranks=2)
        assert isinstance(model.shared, FloraConv)
        assert model.shared is model.blocks[0] is model.blocks[2]
        merge(model)
        assert type(model.shared) is nn.Conv2d
        assert model.shared is model.blocks[0] is model.blocks[2]

    def test_tied_weights_have_one_update_and_stay_tied(self):
        for target in ("embed", "head"):
            model = cnn()
            attach(model, ranks=2, target_modules=target)
            assert isinstance(model.embed, FloraEmbedding)
            assert isinstance(model.head, FloraLinear)
            assert model.embed.tucker_update["default"] is model.head.tucker_update["default"]
            randomize(model)
            assert torch.equal(model.embed.weight, model.head.weight)
            twin = copy.deepcopy(model)
            assert twin.embed.tucker_update["default"] is twin.head.tucker_update["default"]
            merge(model)
            assert model.embed.weight is model.head.weight
            assert model.embed.weight.requires_grad

    def test_a_weight_tied_inside_a_wrapped_module_is_changed_once(self):
        class Inside(nn.Module):
            def __init__(self):
                super().__init__()
                self.linear = nn.Linear(4, 4, bias=False, dtype=torch.float64)
                self.own = self.linear.weight
                self.alias = self.own

            def forward(self, x):
                return self.linear(x) + x @ self.own + x @ self.alias.square()

        model, x = nn.Sequential(Inside()), torch.randn(3, 4, dtype=torch.float64)
        weight = model[0].own
        before = weight.detach().clone()
        report = attach(model, ranks=2, target_parameters="0.own")
        assert set(report.layers[0].tied) | {report.layers[0].name} == {"0.own", "0.alias", "0.linear.weight"}
        randomize(model)
        changed = before + adapter_delta(model[0], "own")
        expected = x @ changed.mT + x @ changed + x @ changed.square()
        assert torch.allclose(model(x), expected, rtol=0, atol=1e-12)
        merged = merge(copy.deepcopy(model))
        assert merged[0].own is merged[0].alias is merged[0].linear.weight
        assert torch.allclose(merged(x), expected, rtol=0, atol=1e-12)
        detach(model)
        assert model[0].own is model[0].alias is model[0].linear.weight is weight
        assert torch.equal(weight, before)

    @pytest.mark.parametrize("kept", [("wte", "lm_head"), ("wte",), ("lm_head",)])
    def test_a_checkpoint_is_changed_under_each_name_that_it_has_a_tied_weight_under(self, kept, tmp_path):
        model = gpt2()
        base = {name: tensor.clone() for name, tensor in model.state_dict().items() if ".weight" in name}
        names = {"wte": "transformer.wte.weight", "lm_head": "lm_head.weight"}
        base = {name: t for name, t in base.items() if name not in names.values() or name in [names[k] for k in kept]}
        save_file(base, tmp_path / "base.safetensors")
        attach(model, ranks=2)
        randomize(model)
        save_adapter(model, tmp_path / "adapter")
        expected = merge(model).state_dict()
        ft.merge_checkpoint(tmp_path / "base.safetensors", tmp_path / "adapter", tmp_path / "merged.safetensors")
        merged = load_file(tmp_path / "merged.safetensors")
        assert set(merged) == set(base)
        for name in merged:
            torch.testing.assert_close(merged[name], expected[name])

    def test_a_tied_name_with_other_numbers_in_the_checkpoint_stays_as_it_is(self, tmp_path):
        model = gpt2()
        base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        base["lm_head.weight"] += 1
        save_file(base, tmp_path / "base.safetensors")
        attach(model, ranks=2, target_modules="wte")
        randomize(model)
        save_adapter(model, tmp_path / "adapter")
        report = ft.merge_checkpoint(tmp_path / "base.safetensors", tmp_path / "adapter", tmp_path / "m.safetensors")
        assert report.merged == ("transformer.wte.weight",)

    def test_gpt2_merges_to_a_model_that_is_still_tied(self):
        model = gpt2()
        report = attach(model, ranks=2)
        assert report.layers[0].tied == ("lm_head.weight",)
        assert {layer.kind for layer in report.layers} == {"FloraEmbedding", "FloraLinear"}
        randomize(model)
        merge(model)
        assert model.lm_head.weight is model.transformer.wte.weight


class TestAttention:
    def test_fast_path_and_training_path_agree(self):
        """TransformerEncoderLayer reads weights instead of calling layers where no gradient is needed."""
        model = encoder()
        attach(model, ranks=2, target_modules=nn.Linear, target_parameters="in_proj_weight")
        randomize(model)
        assert isinstance(model[0].layers[0].self_attn, FloraParameter)
        assert isinstance(model[0].layers[0].self_attn.out_proj, FloraLinear)
        x = torch.randn(2, 5, 16).double()
        with torch.no_grad():
            fast = model(x)
        slow = model(x.requires_grad_())
        assert slow.requires_grad
        assert torch.allclose(fast, slow, rtol=0, atol=1e-12)

    def test_freezing_only_the_wrapped_layers(self):
        model = encoder()
        attach(model, ranks=2, target_modules="linear1", freeze_model=False)
        assert not model[0].layers[0].linear1.base_layer.bias.requires_grad
        assert model[0].layers[0].linear2.weight.requires_grad
        detach(model)
        assert all(p.requires_grad for p in model.parameters())


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _train_rank(rank: int, port: int, directory: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = cnn()
    attach(model, ranks=2, generator=torch.Generator().manual_seed(1))
    parallel = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(adapter_parameters(model), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        parallel(IDS[rank : rank + 1]).square().mean().backward()
        optimizer.step()
    mine, theirs = (Path(directory) / f"{r}.pt" for r in (rank, 1 - rank))
    torch.save([p.detach() for p in adapter_parameters(model)], mine.with_suffix(".part"))
    mine.with_suffix(".part").rename(mine)
    # Taking gloo down can deadlock: the reducer joins gloo's threads with the interpreter's lock in hand, and they want
    # it too. So nothing is taken down; each rank only waits until the other one no longer needs it.
    while not theirs.exists():
        time.sleep(0.01)
    os._exit(0)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")
def test_two_ranks_train_as_one(tmp_path):
    """Gradients averaged over two ranks are those of the whole batch, so both end where one process does."""
    ranks = multiprocessing.spawn(_train_rank, args=(_free_port(), str(tmp_path)), nprocs=2, join=False)
    end = time.monotonic() + 120
    while not ranks.join(timeout=1.0):
        if time.monotonic() > end:
            for process in ranks.processes:
                process.kill()
            pytest.fail("the two ranks hang")
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    model = cnn()
    attach(model, ranks=2, generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.SGD(adapter_parameters(model), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(IDS).square().mean().backward()
        optimizer.step()
    for a, b, alone in zip(first, second, adapter_parameters(model)):
        assert torch.equal(a, b)
        assert torch.allclose(a, alone.detach(), rtol=1e-9, atol=1e-12)


def test_compiled_model_trains():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 8, 3, groups=2)).double()
    attach(model, ranks=2)
    randomize(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, 6, 6).double()
    ours = torch.autograd.grad(compiled(x).square().sum(), adapter_parameters(model))
    theirs = torch.autograd.grad(model(x).square().sum(), adapter_parameters(model))
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-10) for a, b in zip(ours, theirs))


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Skipping serialization of skipfiles")  # torch 2.6 of itself
def test_compiled_by_inductor():
    layer = FloraLinear(nn.Linear(16, 8), ranks=2, path="factored")
    nn.init.normal_(layer.tucker_update["default"].core)
    x = torch.randn(4, 16)
    compiled = torch.compile(layer, fullgraph=True)
    assert torch.allclose(compiled(x), layer(x), atol=1e-5)
    ours = torch.autograd.grad(compiled(x).sum(), adapter_parameters(layer))
    theirs = torch.autograd.grad(layer(x).sum(), adapter_parameters(layer))
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(ours, theirs))
