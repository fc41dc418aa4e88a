"""Several adapters on one model, and adapters whose tensors are known already."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import flora_tensor
from flora_tensor import Arrangement, TuckerTensor
from flora_tensor.adapter import Adapter
from flora_torch import (
    FloraConv,
    FloraLinear,
    activate,
    adapter_parameters,
    attach,
    attach_adapter,
    detach,
    disabled,
    load_adapter,
    merge,
    save_adapter,
)
from support import same_bits
from torch_models import IDS, bits, cnn, randomize, same_state

pytestmark = pytest.mark.usefixtures("one_thread", "seeded")


class TestSeveralAdapters:
    def test_add_up_and_switch(self, tmp_path):
        model = cnn()
        with torch.no_grad():
            outputs = {"none": model(IDS)}
            for name in ("a", "b"):
                attach(model, ranks=2, adapter_name=name)
            randomize(model)
            outputs["both"] = model(IDS)
            for name in ("a", "b"):
                activate(model, name)
                outputs[name] = model(IDS)
            activate(model)
            assert torch.equal(model(IDS), outputs["none"])
            with pytest.raises(ValueError, match="the model has the adapters a, b; pass adapter_name"):
                save_adapter(model, tmp_path / "x")
            load_adapter(fresh := copy.deepcopy(detach(copy.deepcopy(model))), save_adapter(
                model, tmp_path / "b", adapter_name="b"
            ))  # fmt: skip
            assert torch.equal(fresh(IDS), outputs["b"])
            activate(model, "a", "b")
            detach(model, "a")
            assert torch.equal(model(IDS), outputs["b"])
            assert len(adapter_parameters(model)) == len(adapter_parameters(model, "b"))
        for call in (activate, adapter_parameters, detach):
            with pytest.raises(ValueError, match=f"{call.__name__}: the model has no adapter 'a'; it has b"):
                call(model, "a")

    def test_models_without_adapters_are_refused(self, tmp_path):
        with pytest.raises(ValueError, match="disabled: the model has no adapter; call attach first"), disabled(cnn()):
            pass
        with pytest.raises(TypeError, match=r"merge: model is str; pass an nn.Module with adapters"):
            merge("model.safetensors")
        for call in (merge, detach, adapter_parameters, activate):
            with pytest.raises(ValueError, match=f"{call.__name__}: the model has no adapter; call attach first"):
                call(cnn())
        with pytest.raises(ValueError, match="save_adapter: the model has no adapter"):
            save_adapter(cnn(), tmp_path / "x")

    def test_merge_that_is_not_finite_changes_nothing(self):
        model = cnn()
        attach(model, ranks=2)
        with torch.no_grad():
            model.blocks[1].tucker_update["default"].core.fill_(float("inf"))
        before = bits(model)
        with pytest.raises(ValueError, match="would be NaN or infinite"):
            merge(model)
        assert same_state(bits(model), before)
        assert isinstance(model.shared, FloraConv)

    def test_a_single_layer_is_a_model(self):
        layer = FloraLinear(nn.Linear(4, 3), ranks=2)
        base = layer.base_layer
        assert type(merge(copy.deepcopy(layer))) is nn.Linear
        assert detach(layer) is base
        assert base.weight.requires_grad


class TestKnownTensors:
    def change(self, shape, seed=0, ranks=2):
        rng = np.random.default_rng(seed)
        ranks = [min(n, ranks) for n in shape]
        return TuckerTensor(rng.standard_normal(ranks), [rng.standard_normal((n, r)) for n, r in zip(shape, ranks)])

    def test_extracted_tensors_and_whole_ones(self, tmp_path):
        model = cnn()
        before = bits(model)
        with torch.no_grad():
            original = model(IDS)
        adapter = Adapter(
            {"shared.weight": self.change((24, 12)), "embed.weight": self.change((11, 8))},
            {"shared.weight": Arrangement("(o h) (i w)")},
            {"shared.weight": 0.5},
            {"shared.weight": (8, 4, 3, 3)},
            {"norm.running_mean": np.linspace(0, 1, 8), "norm.weight": np.linspace(1, 2, 8)},
        )
        twin = copy.deepcopy(model)
        report = attach_adapter(model, adapter)
        assert report.whole == ("norm.running_mean", "norm.weight")
        assert "whole: norm.weight" in str(report)
        for name in adapter:
            effective = model.get_submodule(name.rpartition(".")[0]).weight
            expected = before[name].numpy() + adapter.delta(name)
            assert np.allclose(effective.detach().numpy(), expected, rtol=0, atol=1e-12)
        assert same_bits(model.norm.weight, adapter.whole["norm.weight"])
        assert not model.norm.weight.requires_grad
        with torch.no_grad():
            changed = model(IDS)
            with disabled(model):
                assert torch.equal(model(IDS), original)
                directory = save_adapter(model, tmp_path / "while_disabled")
            assert torch.equal(model(IDS), changed)
            load_adapter(twin, directory)
            assert torch.equal(twin(IDS), changed)
            load_adapter(twin, directory)
            assert torch.equal(twin(IDS), changed)
        with pytest.raises(ValueError, match=r"'norm.weight' was replaced by another adapter already"):
            attach_adapter(model, Adapter({}, whole={"norm.weight": np.ones(8)}), adapter_name="other")
        assert same_state(bits(merge(twin)), bits(merge(copy.deepcopy(model))))
        assert same_state(bits(detach(model)), before)

    def test_a_tied_tensor_is_replaced_once(self, tmp_path):
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        model[1].bias = model[0].bias
        before = bits(model)
        names = ("0.bias", "1.bias")
        for second in (np.zeros(3), np.full(3, np.inf)):
            with pytest.raises(ValueError, match=r"'0.bias' and '1.bias' are one tied tensor|'1.bias' has NaN"):
                attach_adapter(model, Adapter({}, whole={"0.bias": np.ones(3), "1.bias": second}))
        adapter = Adapter({}, whole=dict.fromkeys(names, np.ones(3)))
        directory = flora_tensor.save_adapter(tmp_path / "adapter", adapter)
        for _ in range(2):
            load_adapter(model, directory)
            assert bool((model[1].bias == 1).all())
            with disabled(model):
                assert same_state(bits(model), before)
        with pytest.raises(ValueError, match=r"'1.bias' was replaced by another adapter already"):
            attach_adapter(model, Adapter({}, whole={"1.bias": np.zeros(3)}), adapter_name="other")
        assert same_state(bits(detach(model)), before)

    def test_whole_tensors_follow_the_active_adapters(self, tmp_path):
        model = cnn()
        before = bits(model)
        attach_adapter(model, Adapter({}, whole={"norm.bias": np.ones(8)}), adapter_name="a")
        attach_adapter(model, Adapter({}, whole={"norm.running_mean": np.ones(8)}), adapter_name="b")
        activate(model, "b")
        assert torch.equal(model.norm.bias, before["norm.bias"])
        assert bool((model.norm.running_mean == 1).all())
        load_adapter(model, save_adapter(model, tmp_path / "a", adapter_name="a"), adapter_name="a")
        assert torch.equal(model.norm.bias, before["norm.bias"])
        activate(model)
        assert same_state(bits(model), before)
        activate(model, "a", "b")
        assert bool((model.norm.bias == 1).all())
        assert same_state(bits(detach(model)), before)

    def test_detached_while_disabled(self):
        model = cnn()
        before = bits(model)
        attach_adapter(model, Adapter({}, whole={"norm.bias": np.ones(8)}))
        with disabled(model):
            detach(model)
        assert same_state(bits(model), before)

    def test_only_whole_tensors(self, tmp_path):
        model = cnn()
        attach_adapter(model, Adapter({}, whole={"norm.bias": np.ones(8)}))
        directory = save_adapter(model, tmp_path / "adapter")
        twin = cnn()
        load_adapter(twin, directory)
        assert bool((twin.norm.bias == 1).all())
        merge(model)
        assert bool((model.norm.bias == 1).all())
        assert model.norm.bias.requires_grad

    @pytest.mark.parametrize(
        ("source", "message"),
        [
            ({"heed.weight": (11, 8)}, "the model has no parameter 'heed.weight'; near names: head.weight"),
            (
                {"1.weight": (8, 1, 3, 3)},
                r"it has 'blocks.1.weight': put the adapter on that part of the model, 'blocks'",
            ),
            (
                {"m.head.weight": (11, 8)},
                r"it has 'head.weight': .* nn.ModuleDict\(\{'m': model\}\), or .* without 'm\.'",
            ),
            ({"head.weight": (8, 11)}, r"'head.weight' is of shape \(11, 8\) in the model and \(8, 11\)"),
            ({"head.weight": (11, 8), "embed.weight": (11, 8)}, "two entries of the adapter are for one tied weight"),
            ({"norm.weight": (8,)}, "an update needs two axes or more"),
        ],
    )
    def test_refusals_change_nothing(self, source, message):
        model = cnn()
        before = bits(model)
        good = {"blocks.1.weight": self.change((8, 1, 3, 3))}
        with pytest.raises(ValueError, match=message):
            attach_adapter(model, {**good, **{name: self.change(shape) for name, shape in source.items()}})
        assert same_state(bits(model), before)
        assert all(p.requires_grad for p in model.parameters())

    def test_damaged_and_unknown_whole_tensors(self):
        model = cnn()
        good = {"blocks.1.weight": self.change((8, 1, 3, 3))}
        for whole, message in [
            ({"norm.wait": np.ones(8)}, "the model has no tensor 'norm.wait'; near names: norm.weight"),
            ({"norm.weight": np.ones(9)}, r"'norm.weight' is of shape \(8,\) in the model and \(9,\)"),
            ({"norm.weight": np.full(8, np.nan)}, "'norm.weight' has NaN or infinite entries"),
        ]:
            with pytest.raises(ValueError, match=message):
                attach_adapter(model, Adapter(good, whole=whole))
        bad = TuckerTensor(np.full((1, 1), np.inf), [np.ones((11, 1)), np.ones((8, 1))])
        with pytest.raises(ValueError, match=r"'head.weight' has NaN or infinite entries; the adapter is damaged"):
            attach_adapter(model, {"head.weight": bad})
        with pytest.raises(ValueError, match=r"'weight' belongs to the model itself; put it into an nn.Sequential"):
            attach_adapter(nn.Linear(8, 11), {"weight": self.change((11, 8))})
        assert type(model.blocks[1]) is nn.Conv2d

    def test_loading_into_another_form_is_refused(self, tmp_path):
        model, other = cnn(), cnn()
        attach(model, ranks=2)
        attach(other, ranks=3)
        directory = save_adapter(model, tmp_path / "adapter")
        with pytest.raises(
            ValueError, match=r"core, factors, type, start and magnitude .* in the model and .* in the file"
        ):
            load_adapter(other, directory)
        detach(other)
        attach(other, ranks=2, target_modules="head")
        with pytest.raises(ValueError, match="is in only one of the file and the model's adapter 'default'"):
            load_adapter(other, directory)

    def test_a_file_with_more_tensors_fills_and_replaces_and_one_of_another_shape_does_neither(self, tmp_path):
        model, change = cnn(), {"blocks.1.weight": self.change((8, 1, 3, 3))}
        before = bits(model)
        attach_adapter(model, change)
        directory = flora_tensor.save_adapter(tmp_path / "more", Adapter(change, whole={"norm.bias": np.ones(8)}))
        assert load_adapter(model, directory).whole == ("norm.bias",)
        assert bool((model.norm.bias == 1).all())
        changed = bits(model)
        longer = flora_tensor.save_adapter(tmp_path / "longer", Adapter(change, whole={"norm.bias": np.ones(9)}))
        with pytest.raises(ValueError, match=r"load_adapter: 'norm.bias' is of shape \(8,\), not \(9,\)"):
            load_adapter(model, longer)
        assert same_state(bits(model), changed)
        assert same_state(bits(detach(model)), before)

    def test_errors_name_the_function_that_was_called(self, tmp_path):
        directory = flora_tensor.save_adapter(tmp_path / "a", {"heed.weight": self.change((11, 8))})
        with pytest.raises(ValueError, match=r"^attach_adapter: the model has no parameter 'heed.weight'"):
            attach_adapter(cnn(), directory)
        with pytest.raises(ValueError, match=r"^load_adapter: the model has no parameter 'heed.weight'"):
            load_adapter(cnn(), directory)

    def test_layers_without_an_adapter_have_nothing_to_save(self, tmp_path):
        with pytest.raises(ValueError, match="save_adapter: the layers of the model have no adapter; call their add_"):
            save_adapter(nn.Sequential(FloraLinear(nn.Linear(3, 2))), tmp_path / "a")

    def test_tensors_of_torch_in_their_own_type(self):
        model = nn.Sequential(nn.Linear(4, 3)).to(torch.bfloat16)
        change = self.change((3, 4)).map(lambda a: torch.from_numpy(a))
        attach_adapter(model, {"0.weight": change})
        assert {p.dtype for p in adapter_parameters(model)} == {torch.float32}
        detach(model)
        attach_adapter(model, {"0.weight": change}, dtype=torch.bfloat16, path="factored")
        assert {p.dtype for p in adapter_parameters(model)} == {torch.bfloat16}
        assert model[0].path == "factored"

    def test_loading_in_another_type(self, tmp_path):
        model, other = cnn().double(), cnn().double()
        other.load_state_dict(model.state_dict())
        attach(model, ranks=2, dropout=0.1, target_modules="head")
        directory = save_adapter(model, tmp_path / "adapter")
        exact = next(iter(flora_tensor.load_adapter(directory).values()))
        load_adapter(other, directory, dtype=torch.float32, dropout=0.3)
        update = other.head.tucker_update["default"]
        assert (update.core.dtype, update.dropout) == (torch.float32, 0.3)
        core = update.core
        assert torch.equal(core, torch.from_numpy(exact.core).float())
        # Filled, the parameters stay as they are: in the file's type or in the one that is asked for.
        with pytest.raises(ValueError, match="in the file; pass its dtype if no more than that differs"):
            load_adapter(other, directory)
        nn.init.zeros_(core)
        load_adapter(other, directory, dtype=torch.float32)
        assert update.core is core
        assert update.dropout == 0.1
        assert torch.equal(core, torch.from_numpy(exact.core).float())
