"""Adapters that do not fit, are damaged or were made for another model: what loading and attaching refuse.

Every refusal comes before the first change: `unchanged` compares all that a model is, before and after.
"""

import contextlib
import copy
import json

import numpy as np
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import flora_tensor as ft
from checkpoints import entry, raw
from flora_tensor import Adapter, FloraWarning, TuckerTensor
from flora_torch import adapter_parameters, attach, attach_adapter, hotswap_adapter, load_adapter, save_adapter
from support import same_bits
from test_adapter_file import CONFIG, MODEL, edit, replace_tensors

FIRST, LAST = "base_model.model.conv.tucker_update", "base_model.model.fc.tucker_update"


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1, groups=2, padding_mode="circular")
        self.norm = nn.BatchNorm1d(8)
        self.fc = nn.Linear(8, 8)

    def forward(self, ids):
        return self.fc(self.norm(self.conv(self.embed(ids).mT)).mT)


def net(**other):
    torch.manual_seed(0)
    model = Net()
    for name, module in other.items():
        setattr(model, name, module)
    return model


@pytest.fixture
def written(tmp_path):
    """The directory of an adapter that changes three layers and replaces a norm's weight."""
    model = net()
    attach(model, ranks=2, init="official", scale=0.5)
    with torch.no_grad():
        for parameter in adapter_parameters(model):
            parameter.add_(0.1)
    given = ft.load_adapter(save_adapter(model, tmp_path / "first"))
    whole = {"norm.weight": np.linspace(1, 2, 8, dtype=np.float32)}
    adapter = Adapter(given.tensors, scales=given.scales, shapes=given.shapes, whole=whole, config=given.config)
    return ft.save_adapter(tmp_path / "adapter", adapter)


@contextlib.contextmanager
def unchanged(model):
    def everything():
        state = {name: value.detach().clone() for name, value in model.state_dict().items()}
        kinds = [(name, id(module), type(module)) for name, module in model.named_modules()]
        flags = [(name, id(p), p.requires_grad) for name, p in model.named_parameters()]
        notes = [sorted(k for k in vars(module) if k.startswith("_flora")) for module in model.modules()]
        return state, (kinds, flags, notes)

    before, others = everything()
    yield
    after, others_after = everything()
    assert others == others_after
    assert set(before) == set(after)
    assert all(same_bits(before[name], after[name]) for name in before)


def in_every_way(directory, message, **options):
    """Load what is damaged: attached anew, into the adapter that is there, and by attaching."""
    for load in (load_adapter, attach_adapter):
        model = net()
        with unchanged(model), pytest.raises(ValueError, match=f"(?s){message}"):
            load(model, directory, **options)
    model = net()
    attach(model, ranks=2, init="official")
    with unchanged(model), pytest.raises(ValueError, match=f"(?s){message}"):
        load_adapter(model, directory, **options)


class TestDamaged:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"peft_type": ...}, "not a flora_tensor adapter: peft_type is None"),
            ({"peft_type": "LORA"}, "not a flora_tensor adapter: peft_type is 'LORA'"),
            ({"format_version": "2.0"}, "format 2.0, but this version reads"),
            ({"rank_pattern": {"fc.weight": [3, 3]}}, r"'fc.weight'.*ranks \(3, 3\).*core \(2, 2\), factors"),
            ({"weight_shapes": {"fc.weight": [9, 8]}}, r"'fc.weight' is of arranged shape \(9, 8\).*core \(2, 2\)"),
            ({"whole": []}, "has the unknown 'base_model.model.norm.weight'"),
            ({"scale_pattern": {"fc.weight": 1e39}}, "scale_pattern of 'fc.weight' is 1e[+]39; pass a finite number"),
            ({"scale_pattern": {"fc.weight": float("inf")}}, "not JSON|Infinity|finite"),
        ],
    )
    def test_configs(self, written, changes, message):
        edit(written, **changes)
        in_every_way(written, message)

    @pytest.mark.parametrize(
        ("tensors", "message"),
        [
            ({f"{LAST}.core": None}, "lacks 'base_model.model.fc.tucker_update.core'"),
            ({f"{LAST}.factor_1": np.ones((8, 5), np.float32)}, r"'fc.weight': core \(2, 2\), factors .* do not fit"),
            ({"extra": np.ones(2, np.float32)}, "has the unknown 'extra'; pass strict=False"),
            ({f"{LAST}.core": np.full((2, 2), np.nan, np.float32)}, "has NaN or infinite entries"),
            ({f"{LAST}.core": np.ones((2, 2), np.complex64)}, "of type C64; an adapter holds real numbers"),
            ({f"{LAST}.core": np.full((2, 2), 1e300)}, r"'fc.weight' has entries up to 1e\+300, which torch.float32"),
        ],
    )
    def test_tensors(self, written, tensors, message):
        replace_tensors(written, tensors)
        in_every_way(written, message)

    def test_empty_files_and_sizes_that_no_memory_has(self, written):
        (written / MODEL).write_bytes(b"")
        in_every_way(written, "0 bytes; a safetensors file has at least 8")
        (written / MODEL).write_bytes(raw({}))
        in_every_way(written, "holds no tensors")
        # 2^60 numbers of four bytes: their product, taken in 64 bits of bytes, would just fit.
        (written / MODEL).write_bytes(raw({f"{LAST}.core": entry("F32", [2**30, 2**30], 0, 2**62)}, b"1234"))
        in_every_way(written, "truncated|larger than any memory")
        (written / MODEL).write_bytes(raw({f"{LAST}.core": entry("F32", [2**40, 2**40], 0, 4)}, b"1234"))
        in_every_way(written, "larger than any memory")
        (written / CONFIG).write_text("")
        in_every_way(written, "JSON|json")

    def test_newer_minor_formats_are_read_with_a_note(self, written):
        edit(written, format_version="1.99")
        for load in (load_adapter, attach_adapter):
            with pytest.warns(FloraWarning, match="format 1.99 is newer than"):
                load(net(), written)

    def test_without_strict_both_lists_are_in_the_report(self, written):
        replace_tensors(written, {f"{LAST}.core": None, "extra": np.ones(2, np.float32)})
        model = net()
        report = load_adapter(model, written, strict=False)
        assert report.missing_keys == (f"{LAST}.core",)
        assert report.unexpected_keys == ("extra",)
        assert {layer.name for layer in report.layers} == {"embed.weight", "conv.weight"}
        assert type(model.fc) is nn.Linear

    @pytest.mark.parametrize(
        "name",
        ["fc.__class__", "__dict__.weight", "fc.forward.__globals__", "fc._parameters.weight", "fc.in_features", "."],
    )
    def test_names_reach_no_attributes(self, name, written):
        """A name is looked up among the model's own, and followed nowhere."""
        model = net()
        tensor = TuckerTensor(np.ones((1, 1)), [np.ones((8, 1)), np.ones((8, 1))])
        with unchanged(model):
            with pytest.raises(ValueError, match="the model has no parameter"):
                attach_adapter(model, {name: tensor})
            with pytest.raises(ValueError, match="the model has no tensor"):
                attach_adapter(model, Adapter({}, whole={name: np.ones(8)}))

    def test_values_that_no_float_of_the_model_holds(self):
        ones = [np.ones((8, 1)), np.ones((8, 1))]
        for core, error, message in [
            (np.ones((1, 1), complex), TypeError, "'fc.weight' is of type complex128; pass real floats"),
            (np.ones((1, 1), int), TypeError, "'fc.weight' is of type int64; pass real floats"),
            (np.full((1, 1), 1e39), ValueError, r"has entries up to 1e\+39, which torch.float32 does not hold"),
        ]:
            model = net()
            with unchanged(model), pytest.raises(error, match=message):
                attach_adapter(model, {"fc.weight": TuckerTensor(core, ones)})
        attach_adapter(net().double(), {"fc.weight": TuckerTensor(np.full((1, 1), 1e39), ones)})
        model = net()
        report = attach_adapter(model, {"fc.weight": TuckerTensor(np.full((1, 1), 0.1), ones)})
        assert report.layers[0].name == "fc.weight"
        assert model.fc.tucker_update["default"].core.dtype == torch.float32
        half = net().half()
        with unchanged(half), pytest.raises(ValueError, match=r"'norm.bias' has entries up to 1e\+06.*torch.float16"):
            attach_adapter(half, Adapter({}, whole={"norm.bias": np.full(8, 1e6)}))

    def test_models_without_values(self, written):
        model = net().to("meta")
        for load in (load_adapter, attach_adapter):
            with pytest.raises(ValueError, match="is on the meta device and has no values; load the model first"):
                load(model, written)
        assert type(model.fc) is nn.Linear

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_the_type_of_the_base_is_followed(self, written, dtype):
        model = net().to(dtype).eval()
        load_adapter(model, written)
        ids = torch.arange(6).reshape(2, 3)
        assert model(ids).dtype == dtype
        assert {p.dtype for p in adapter_parameters(model)} == {torch.float32}  # as they were trained


class TestOtherModels:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (
                {"conv": nn.Conv1d(8, 8, 3, groups=1)},
                r"'conv.weight' is of shape \(8, 8, 3\) in the model and",
            ),
            (
                {"conv": nn.Conv1d(8, 8, 5, groups=2)},
                r"'conv.weight' is of shape \(8, 4, 5\) in the model and",
            ),
            ({"conv": nn.Conv1d(4, 8, 3)}, "layer of 'conv.weight' is kind 'convolution', groups '1'.*groups '2'"),
            ({"conv": nn.Conv1d(8, 8, 3, groups=2)}, "'conv.weight' .*padding_mode 'zeros' .*padding_mode 'circular'"),
            ({"conv": nn.ConvTranspose1d(8, 4, 3)}, "'conv.weight' is kind 'transposed_convolution'.*'convolution'"),
            ({"fc": Conv1D(8, 8)}, "'fc.weight' is kind 'transposed_linear' .*kind 'linear' in the adapter"),
            ({"fc": nn.Embedding(8, 8)}, "'fc.weight' is kind 'embedding' in the model and kind 'linear'"),
            ({"fc": nn.Identity()}, "the model has no parameter 'fc.weight'"),
        ],
    )
    def test_layers_that_compute_something_else(self, written, change, message):
        model = net(**change)
        for load in (load_adapter, attach_adapter):
            with unchanged(model), pytest.raises(ValueError, match=message):
                load(model, written)
        if "kind" in message:
            load_adapter(model, written, verify_base="ignore")

    def test_other_values_are_told(self, written):
        with torch.no_grad():
            (model := net()).fc.weight.mul_(1.001)
        strict = copy.deepcopy(model)
        for load in (load_adapter, attach_adapter):
            with unchanged(strict), pytest.raises(ValueError, match=r"the values of 'fc.weight' are not those"):
                load(strict, written, verify_base="error")
        with pytest.warns(FloraWarning, match=r"the values of 'fc.weight' are not those that the adapter was made for"):
            load_adapter(model, written)
        with pytest.warns(FloraWarning, match="the values of 'fc.weight'"):  # into the adapter that is there
            load_adapter(model, written)
        load_adapter(model, written, verify_base="ignore")
        with pytest.raises(ValueError, match="verify_base is 'maybe'; pass one of 'warn', 'error', 'ignore'"):
            load_adapter(model, written, verify_base="maybe")
        with pytest.raises(ValueError, match="verify_base is 'maybe'"):
            attach_adapter(net(), written, verify_base="maybe")

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
    @pytest.mark.parametrize("trained", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
    def test_a_cast_is_no_other_model(self, trained, dtype, tmp_path):
        model = net().to(trained)
        attach(model, ranks=1)
        directory = save_adapter(model, tmp_path / "adapter")
        # The first type decides what the second is a cast of.
        load_adapter(net().to(dtype), directory, verify_base="error")
        other = net()
        with torch.no_grad():
            other.embed.weight.mul_(1.02)
        with pytest.raises(ValueError, match=r"the values of 'embed.weight'"):
            load_adapter(other.to(dtype), directory, verify_base="error")

    def test_notes_that_are_no_tables_check_nothing(self, written):
        for note in (None, 3, [], {"fc.weight": 3}, {"fc.weight": "F32:zz"}, {"fc.weight": ":"}, {"fc.weight": {}}):
            edit(written, base_samples=note, layer_pattern=note)
            load_adapter(net(), written, verify_base="error")

    def test_what_extraction_notes(self, tmp_path):
        from safetensors.torch import save_file

        base, tuned = net(), net()
        with torch.no_grad():
            tuned.fc.weight.add_(torch.outer(torch.randn(8), torch.randn(8)))
        for name, model in (("base", base), ("tuned", tuned)):
            save_file(model.state_dict(), tmp_path / f"{name}.safetensors")
        ft.extract(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", tmp_path / "adapter", rtol=1e-3)
        attach_adapter(base, tmp_path / "adapter", verify_base="error")
        with pytest.raises(ValueError, match=r"the values of 'fc.weight' are not those"):
            attach_adapter(tuned, tmp_path / "adapter", verify_base="error")

    def test_notes_are_of_the_model_with_nothing_merged(self, tmp_path, written):
        from flora_torch import merge_

        model = net()
        load_adapter(model, written)
        one = save_adapter(model, tmp_path / "one")
        two = save_adapter(merge_(model), tmp_path / "two")
        assert (one / CONFIG).read_bytes() == (two / CONFIG).read_bytes()
        assert json.loads((one / CONFIG).read_text())["layer_pattern"]["fc.weight"] == {"kind": "linear"}

    def test_a_swap_looks_at_the_layers_too(self, written):
        model = net(fc=Conv1D(8, 8))
        attach(model, ranks=2)
        edit(written, whole=[])
        replace_tensors(written, {"base_model.model.norm.weight": None})
        with unchanged(model), pytest.raises(ValueError, match=r"layer of 'fc.weight' is kind 'transposed_linear'"):
            hotswap_adapter(model, written)


def test_loaded_twice_is_loaded_once(written):
    ids = torch.arange(6).reshape(2, 3)
    model, once = net().eval(), net().eval()
    load_adapter(once, written)
    load_adapter(model, written)
    kept = adapter_parameters(model)
    load_adapter(model, written)
    assert [id(p) for p in kept] == [id(p) for p in adapter_parameters(model)]
    assert torch.equal(model(ids), once(ids))
    with unchanged(model), pytest.raises(ValueError, match="there is an adapter 'default' for 'weight' already"):
        attach_adapter(model, {"fc.weight": TuckerTensor(np.ones((1, 1)), [np.ones((8, 1)), np.ones((8, 1))])})
