"""FLoRA as a method of Hugging Face PEFT: what PEFT's users expect of one, and files that go both ways."""

import copy
import importlib
import pickle
import sys
import warnings
from typing import Any

import peft
import pytest
import torch
from click.testing import CliRunner
from peft import (
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file, save_file
from torch import nn

import flora_tensor as ft
import flora_torch
import flora_torch.peft
from families import FAMILIES, Transformer
from flora_tensor.cli import main
from flora_torch.peft import FloraConfig, FloraModel
from flora_torch.peft.layers import FloraTunerLayer
from flora_torch.peft.registration import register
from support import tolerance

# What PEFT says of its own accord, and the models' owners of theirs.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in (
        ".*tie_word_embeddings",
        "Could not find a config file",
        "Setting `save_embedding_layers`",
        ".*gradient_checkpointing.* is deprecated",
        "LSTM with projections is not supported with oneDNN",
    )
]


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Net(nn.Module):
    """A grouped, dilated, circular convolution, a norm, a transposed convolution and a head."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, padding=2, dilation=2, groups=2, padding_mode="circular")
        self.norm = nn.BatchNorm2d(8)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        return self.head(self.up(self.norm(self.conv(x)).relu()).mean((-2, -1)))


TARGETS = ["conv", "up", "head"]
IMAGES = torch.randn(3, 4, 6, 6, generator=torch.Generator().manual_seed(1))


def net() -> nn.Module:
    return Net().eval()


def config(**options: Any) -> FloraConfig:
    return FloraConfig(**{"ranks": 2, "target_modules": TARGETS, "init_weights": False, **options})


def close(a: torch.Tensor, b: torch.Tensor, factor: float = 100.0) -> bool:
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm()) <= tolerance("float32", 100, norm=float(b.norm()), factor=factor)


@torch.no_grad()
def run(model: nn.Module, family: str = "llama") -> torch.Tensor:
    return FAMILIES[family].read(model(**FAMILIES[family].inputs))


def dense(base: nn.Module, directory: Any) -> nn.Module:
    """Return a copy of a model with the dense changes that the core reads from a file."""
    plain, adapter = copy.deepcopy(base), ft.load_adapter(directory)
    state = plain.state_dict()
    for name in adapter:
        state[name] = (state[name].double() + torch.as_tensor(adapter.delta(name)).double()).to(state[name])
    state |= {name: torch.as_tensor(value).to(state[name]) for name, value in adapter.whole.items()}
    plain.load_state_dict(state)
    return plain


def saved(model: PeftModel, path: Any) -> Any:
    model.save_pretrained(path)
    return path


# --- registration -------------------------------------------------------------------------------------


def test_importing_twice_registers_once():
    importlib.reload(flora_torch.peft)
    assert peft.PeftType("FLORA") is peft.PeftType.FLORA is FloraConfig().peft_type
    assert list(peft.PeftType).count("FLORA") == 1
    assert pickle.loads(pickle.dumps(peft.PeftType.FLORA)) is peft.PeftType.FLORA
    assert peft.get_peft_config({"peft_type": "FLORA", "ranks": 3}).ranks == 3


def test_another_method_of_this_name_is_refused():
    class Foreign(FloraConfig):
        pass

    with pytest.raises(RuntimeError, match=r"PEFT has a method 'FLORA' already, by flora_torch\.peft\.config"):
        register(Foreign, FloraModel)


def test_without_peft_the_import_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"pip install 'flora-tensor\[peft\]'"):
        importlib.reload(flora_torch.peft)


def test_an_older_peft_is_refused(monkeypatch):
    monkeypatch.delattr(peft.tuners.tuners_utils.BaseTuner, "_remap_adapter_state_dict_for_load")
    with pytest.raises(ImportError, match=r"needs peft 0\.21 or newer"):
        register(FloraConfig, FloraModel)


# --- the config ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bias": "lora_only"}, "bias is 'lora_only'; pass one of 'none', 'all', 'flora_only'"),
        ({"scaling": "big"}, "scaling is 'big'"),
        ({"memory": "none"}, "memory is 'none'"),
        ({"init_weights": "gaussian"}, "init_weights is 'gaussian'; pass True, False, or one of orthonormal"),
        ({"init_weights": "from_gradient"}, "starts from data, which a config cannot hold"),
        ({"alpha": 4.0, "scale": 2.0}, "got both scale and alpha"),
        ({"alpha_pattern": {"head": 2.0}}, "alpha_pattern without alpha"),
        ({"target_modules": "head", "layers_to_transform": 1}, "layers_to_transform with target_modules 'head'"),
        ({"target_modules": "all-linear", "layers_to_transform": 1}, "with target_modules 'all-linear'"),
        ({"layers_pattern": "layers"}, "layers_pattern without layers_to_transform"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        FloraConfig(**options)


@pytest.mark.filterwarnings("ignore:You are trying to modify a model", "ignore:Already found a `peft_config`")
@pytest.mark.parametrize("first", [False, True])
def test_what_cannot_be_done_whole_is_not_done_in_part(first):
    model = inject_adapter_in_model(config(), net()) if first else net()
    modules = [id(module) for module in model.modules()]
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"head\.weight: rank 0"):
        get_peft_model(model, config(rank_pattern={"head": 0}), "other")
    assert [id(module) for module in model.modules()] == modules
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert state.keys() == model.state_dict().keys()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ranks": 0}, "FloraConfig: conv.weight: rank 0 for mode 0"),
        ({"ranks": (2, 2)}, "FloraConfig: conv.weight: 2 ranks for 4 modes"),
        ({"target_modules": None}, "nothing is known of what to adapt in a model of type 'custom'"),
        ({"target_modules": ["norm"]}, "target module 'norm' is a BatchNorm2d, which is no layer of a known kind"),
        ({"target_parameters": ["head.bias"], "target_modules": None}, "head.bias"),
        ({"init_weights": "orthonormal", "alpha": 4.0, "scaling": "init"}, "alpha belongs to init"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        get_peft_model(net(), config(**options))


def test_a_config_is_saved_and_read(tmp_path):
    original = config(ranks=(2, 2, 1, 1), rank_pattern={"head": 3}, modules_to_save=["norm"], layers_to_transform=[0])
    original.save_pretrained(tmp_path)
    assert peft.PeftConfig.from_pretrained(tmp_path) == original
    assert FloraConfig(**original.to_dict()) == original == copy.deepcopy(original)


def test_each_weight_has_what_the_patterns_say():
    model = get_peft_model(
        net(),
        config(
            ranks=(2, 2),
            rank_pattern={"head": 4, "u.": (2, 0.5, 1, None)},
            alpha=6.0,
            alpha_pattern={"up": 1.0},
            arrangement="o (i h w)",
            arrangement_pattern={"up": "i o h w"},
            rank_dropout=0.1,
        ),
    )
    updates = {key: getattr(model.base_model.model, key).tucker_update["default"] for key in TARGETS}
    assert [updates[key].ranks for key in TARGETS] == [(2, 2), (2, 3, 1, 2), (4, 4)]
    assert [updates[key].arrangement.pattern for key in TARGETS[:2]] == ["o (i h w)", "i o h w"]
    assert [updates[key].scale for key in TARGETS] == [3.0, 1 / 3, 1.5]
    assert {updates[key].rank_dropout for key in TARGETS} == {0.1}


@pytest.mark.parametrize(
    ("options", "adapted"),
    [
        ({"target_modules": None}, {"0.self_attn.q_proj", "0.self_attn.v_proj"}),
        ({"target_modules": r".*\.(up|down)_proj"}, {"0.mlp.up_proj", "0.mlp.down_proj"}),
        ({"target_modules": ["q_proj"], "layers_to_transform": [1]}, None),
        ({"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "layers"}, {"0.self_attn.q_proj"}),
        ({"target_modules": "all-linear", "exclude_modules": r".*(self_attn|gate|up).*"}, {"0.mlp.down_proj"}),
        ({"target_modules": None, "target_parameters": ["k_proj.weight"]}, {"0.self_attn.k_proj"}),
    ],
)
def test_pefts_ways_to_name_modules_work(options, adapted):
    if adapted is None:
        with pytest.raises(ValueError, match="not found in the base model"):
            get_peft_model(FAMILIES["llama"].make(), config(**options))
        return
    model = get_peft_model(FAMILIES["llama"].make(), config(**options))
    found = {name.split("layers.")[1] for name, m in model.named_modules() if isinstance(m, FloraTunerLayer)}
    assert found == adapted


# --- every family: the output, the file, and the way back ---------------------------------------------

EVERYTHING = {
    "vit": "all-linear",
    "convnext": r".*(dwconv|pwconv\d|downsampling_layer\.1|patch_embeddings)",
    "gpt2": ["c_attn", "c_proj", "wpe"],
    "llama": "all-linear",
    "mixtral": ["q_proj"],
    "gpt_oss": ["q_proj"],
    "whisper": ["q_proj", "conv1"],
    "wav2vec2": r".*(q_proj|conv_layers\.\d\.conv)",
    "t5": ["q", "wo", "wi"],
    "unet": r".*(\.0|\.3|up|head)",
    "unet3d": r".*(\.0|\.3|up|head)",
    "transformer": ["self_attn", "multihead_attn", "linear1"],
    "tagger": ["embed", "bag", "lstm", "cell", "pair"],
}


@pytest.mark.parametrize("family", FAMILIES)
def test_files_go_both_ways_and_the_base_comes_back(family, tmp_path):
    base = FAMILIES[family].make().eval()
    plain = run(base, family)
    experts = ["gate_up_proj", "down_proj"] if family in ("mixtral", "gpt_oss") else None
    options = {"target_modules": EVERYTHING[family], "target_parameters": experts, "init_weights": True}
    model = get_peft_model(copy.deepcopy(base), config(**options)).eval()
    # Where torch has a fused kernel for plain modules, the rounding differs.
    same = close if family in ("transformer", "tagger") else torch.equal
    assert same(run(model, family), plain)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    output = run(model, family)
    assert not close(output, plain)
    directory = saved(model, tmp_path / "a")
    assert close(output, run(dense(base, directory), family))
    with warnings.catch_warnings():
        # PEFT names the tensors that it did not find in the file; there are none.
        warnings.filterwarnings("error", "Found missing adapter keys")
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), directory)
    assert same(run(loaded, family), output)
    mine, theirs = (
        load_file(saved(m, tmp_path / k) / "adapter_model.safetensors") for m, k in ((model, "b"), (loaded, "c"))
    )
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    other = copy.deepcopy(base)
    flora_torch.load_adapter(other, directory)
    assert same(run(other, family), output)
    flora_torch.save_adapter(other, tmp_path / "d")
    assert same(run(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "d"), family), output)
    with model.disable_adapter():
        assert same(run(model, family), plain)
    merged = model.merge_and_unload()
    assert close(run(merged, family), output)
    assert not any(isinstance(m, BaseTunerLayer) for m in merged.modules())
    assert {name for name, _ in merged.named_parameters()} == {name for name, _ in base.named_parameters()}
    assert same(run(loaded.unload(), family), plain)


# --- training -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("magnitude", [False, True])
def test_only_the_adapter_is_trained_and_every_tensor_of_it_moves(magnitude):
    model = get_peft_model(net(), config(init_weights=True, magnitude=magnitude)).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        model(IMAGES).square().sum().backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("tucker_update" in name)
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name
    n_trained, n_all = model.get_nb_trainable_parameters()
    assert n_trained == sum(p.numel() for name, p in before.items() if "tucker_update" in name)
    assert n_all == n_trained + sum(p.numel() for p in net().parameters())


def test_a_step_of_training_in_a_transformers_model(tmp_path):
    base = FAMILIES["llama"].make()
    model = get_peft_model(copy.deepcopy(base), config(target_modules=None, task_type="CAUSAL_LM", init_weights=True))
    assert type(model).__name__ == "PeftModelForCausalLM"
    inputs = {**FAMILIES["llama"].inputs, "labels": FAMILIES["llama"].inputs["input_ids"]}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(4):
        loss = model(**inputs).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    model.eval()
    tokens = model.generate(input_ids=inputs["input_ids"], max_new_tokens=2, do_sample=False)
    loaded = PeftModel.from_pretrained(base, saved(model, tmp_path / "a"))
    assert torch.equal(loaded.generate(input_ids=inputs["input_ids"], max_new_tokens=2, do_sample=False), tokens)
    assert tokens.shape == (2, 8)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant):
    model = get_peft_model(FAMILIES["llama"].make(), config(target_modules="all-linear"))
    gradients = []
    for _ in range(2):
        model.zero_grad()
        model(**FAMILIES["llama"].inputs).logits.square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapters_stay_in_32_bits_on_narrow_bases_unless_told_otherwise(dtype, tmp_path):
    base = FAMILIES["llama"].make().to(dtype)
    model = get_peft_model(copy.deepcopy(base), config(target_modules=["q_proj", "down_proj"]))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    output = run(model)
    assert output.dtype == dtype
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), saved(model, tmp_path / "a"))
    assert torch.equal(run(loaded), output)
    narrow = PeftModel.from_pretrained(
        copy.deepcopy(base), tmp_path / "a", autocast_adapter_dtype=False, is_trainable=True
    )
    assert {p.dtype for p in narrow.parameters() if p.requires_grad} == {dtype}
    again = PeftModel.from_pretrained(copy.deepcopy(base), saved(narrow, tmp_path / "b"))
    assert {p.dtype for n, p in again.named_parameters() if "tucker_update" in n} == {torch.float32}
    assert close(run(again).float(), output.float(), 2.0**16)


def test_autocast_computes_in_16_bits_and_trains():
    model = get_peft_model(FAMILIES["llama"].make(), config(target_modules="all-linear"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(**FAMILIES["llama"].inputs).logits
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


@pytest.mark.skipif(torch.__version__ < "2.7", reason="earlier compilers trace no contextlib")
def test_a_compiled_model_gives_the_same_numbers():
    model = get_peft_model(net(), config(memory="low"))
    assert model.get_base_model().head.memory == "low"
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert close(compiled(IMAGES), model(IMAGES), 10)
    assert get_peft_model_state_dict(compiled._orig_mod).keys() == get_peft_model_state_dict(model).keys()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_models_are_copied_and_pickled(copied):
    model = get_peft_model(net(), config())
    other = copied(model)
    assert torch.equal(other(IMAGES), model(IMAGES))
    nn.init.zeros_(other.base_model.model.head.tucker_update["default"].core)
    assert not torch.equal(other(IMAGES), model(IMAGES))
    assert other.peft_config["default"] == model.peft_config["default"]


# --- several adapters ---------------------------------------------------------------------------------


def several() -> PeftModel:
    """Return a model with the adapters `default` on all layers, and `style` and `extra` on some of them."""
    model = get_peft_model(net(), config())
    model.add_adapter("style", config(ranks=1, target_modules=["up", "head"], scale=2.0))
    model.add_adapter("extra", config(target_modules=["head"], alpha=3.0))
    return model.eval()


def summed(model: PeftModel, weights: dict[str, float]) -> nn.Module:
    """Return the plain model with the weighted sum of dense changes."""
    plain = net()
    state = {key.replace("base_layer.", ""): value for key, value in model.get_base_model().state_dict().items()}
    plain.load_state_dict({key: value for key, value in state.items() if "tucker_update" not in key})
    for key in TARGETS:
        updates = getattr(getattr(model.get_base_model(), key), "tucker_update", {})
        for name, weight in weights.items():
            if name in updates:
                getattr(plain, key).weight.data += weight * updates[name].delta().detach()
    return plain


@pytest.mark.parametrize("active", ["default", "style", ["style"], ["style", "default"], ["default", "style", "extra"]])
def test_active_adapters_add_up_and_only_they_are_trained(active):
    model = several()
    model.base_model.set_adapter(active)
    names = [active] if isinstance(active, str) else active
    assert model.active_adapters == names
    assert close(model(IMAGES), summed(model, dict.fromkeys(names, 1.0))(IMAGES))
    trained = {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == set(names)
    with model.disable_adapter():
        assert torch.equal(model(IMAGES), summed(model, {})(IMAGES))
    status = model.get_model_status()
    assert (status.enabled, status.available_adapters) == (True, ["default", "extra", "style"])


def test_adapters_are_taken_off():
    model = several()
    with pytest.warns(UserWarning, match="default was active which is now deleted"):
        model.delete_adapter("default")
    assert set(model.peft_config) == {"style", "extra"}
    assert not any(".default." in name for name in model.state_dict())
    model.set_adapter("style")
    assert close(model(IMAGES), summed(model, {"style": 1.0})(IMAGES))
    with pytest.raises(ValueError, match="nothing does not exist"):
        model.delete_adapter("nothing")


def test_a_second_adapter_is_loaded_beside_the_first(tmp_path):
    model = several()
    model.save_pretrained(tmp_path)
    other = PeftModel.from_pretrained(summed(model, {}), tmp_path)
    other.load_adapter(tmp_path / "style", "beside")
    assert other.active_adapters == ["default"]
    other.set_adapter("beside")
    assert torch.equal(other(IMAGES), summed(model, {})(IMAGES)) is False
    model.set_adapter("style")
    assert torch.equal(other(IMAGES), model(IMAGES))
    assert {p.requires_grad for p in other.parameters()} == {False, True}


def test_weighted_sums_of_adapters_are_exact():
    model = several()
    weights = {"default": 0.7, "style": -0.3, "extra": 2.0}
    for kind in ("cat", "linear"):
        model.base_model.add_weighted_adapter(list(weights), list(weights.values()), f"{kind}_sum", kind)
        model.set_adapter(f"{kind}_sum")
        assert close(model(IMAGES), summed(model, weights)(IMAGES))
    with pytest.raises(ValueError, match="combination_type is 'svd'; pass 'cat' or 'linear'"):
        model.add_weighted_adapter(["default"], [1.0], "x", "svd")
    with pytest.raises(ValueError, match="no adapter 'nobody'; it has "):
        model.add_weighted_adapter(["nobody"], [1.0], "x")
    with pytest.raises(ValueError, match="pass one weight for each adapter"):
        model.add_weighted_adapter(["default"], [1.0, 2.0], "x")


def test_sums_that_are_none_are_refused():
    model = get_peft_model(net(), config(target_modules=["conv"]))
    model.add_adapter("flat", config(target_modules=["conv"], arrangement="o (i h w)"))
    with pytest.raises(ValueError, match="arrange 'weight' in different ways"):
        model.add_weighted_adapter(["default", "flat"], [1.0, 1.0], "x")
    model.add_adapter("dora", config(target_modules=["conv"], magnitude=True))
    with pytest.raises(ValueError, match="by a magnitude do not add up"):
        model.add_weighted_adapter(["dora"], [1.0], "x")


def test_a_weighted_sum_is_saved_and_loaded(tmp_path):
    model = several()
    model.add_weighted_adapter(["default", "style"], [0.5, 0.5], "sum")
    model.set_adapter("sum")
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    loaded = PeftModel.from_pretrained(summed(model, {}), tmp_path / "sum")
    assert torch.equal(loaded(IMAGES), model(IMAGES))


def test_each_row_of_a_batch_has_its_own_adapter():
    model = several()
    names = ["style", "__base__", "default"]
    together = model(IMAGES, adapter_names=names)
    for k, name in enumerate(names):
        weights = {} if name == "__base__" else {name: 1.0}
        assert close(together[k : k + 1], summed(model, weights)(IMAGES[k : k + 1]))
    with pytest.raises(ValueError, match="no adapter 'nobody'; it has "):
        model(IMAGES, adapter_names=["nobody"] * 3)
    with pytest.raises(ValueError, match="the model is in training"):
        model.train()(IMAGES, adapter_names=names)


def test_generated_rows_have_their_own_adapters_through_beam_search():
    model = get_peft_model(FAMILIES["llama"].make(), config(target_modules="all-linear", task_type="CAUSAL_LM")).eval()
    ids = FAMILIES["llama"].inputs["input_ids"]
    options = {"max_new_tokens": 2, "do_sample": False, "num_beams": 2, "pad_token_id": 0}
    mixed = model.generate(input_ids=ids, adapter_names=["default", "__base__"], **options)
    assert torch.equal(mixed[:1], model.generate(input_ids=ids[:1], **options))
    with model.disable_adapter():
        assert torch.equal(mixed[1:], model.generate(input_ids=ids[1:], **options))


def test_changes_are_scaled_for_the_moment():
    model = several()
    layer = model.get_base_model().head
    assert dict(layer.scaling) == {"default": 1.0, "style": 2.0, "extra": 1.5}
    output = model(IMAGES)
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.set_scale("default", 0.5)
            module.scale_layer(4.0)
    assert close(model(IMAGES), summed(model, {"default": 1.0})(IMAGES))
    assert layer.tucker_update["default"].multiplier == 2.0
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.unscale_layer(2.0)
    assert torch.equal(model(IMAGES), output)
    layer.scale_layer(3.0)
    layer.unscale_layer()
    assert torch.equal(model(IMAGES), output)


# --- merging ------------------------------------------------------------------------------------------


def test_merging_in_place_gives_the_bits_back():
    model = several()
    base = {name: p for name, p in model.named_parameters() if "base_layer" in name}
    bits = {name: p.detach().clone() for name, p in base.items()}
    output = model(IMAGES)
    model.merge_adapter()
    assert close(model(IMAGES), output)
    assert model.get_model_status().merged_adapters == ["default"]
    assert torch.equal(
        model.state_dict()["base_model.model.head.base_layer.weight"],
        dict(model.named_parameters())["base_model.model.head.base_layer.weight"],
    )
    # PEFT lets merged models be trained, which changes nothing of the adapter.
    model.train().get_base_model().norm.eval()
    model(IMAGES)
    model.unmerge_adapter()
    assert all(p is base[name] for name, p in model.named_parameters() if name in base)
    assert all(torch.equal(base[name], bits[name]) for name in base)
    assert torch.equal(model(IMAGES), output)
    with pytest.warns(UserWarning, match="Already unmerged"):
        model.unmerge_adapter()


def test_what_is_merged_is_all_that_counts():
    model = get_peft_model(net(), config())
    for name in ("style", "extra"):
        model.add_adapter(name, config(ranks=1))
    model.eval().merge_adapter(["style"])
    assert close(model(IMAGES), summed_of_merged(model, {"style": 1.0}))
    with pytest.warns(UserWarning, match="Already following adapters were merged style"):
        model.merge_adapter(["style", "extra"])
    assert close(model(IMAGES), summed_of_merged(model, {"style": 1.0, "extra": 1.0}))
    with pytest.raises(ValueError, match="while they are merged"):
        model.delete_adapter("style")
    with pytest.warns(UserWarning, match="Unmerging the model first"):
        model.set_adapter("default")
    assert close(model(IMAGES), summed(model, {"default": 1.0})(IMAGES))
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(model(IMAGES), summed(model, {})(IMAGES))


def summed_of_merged(model: PeftModel, weights: dict[str, float]) -> torch.Tensor:
    other = copy.deepcopy(model)
    for module in other.modules():
        if isinstance(module, BaseTunerLayer) and module.merged:
            module.unmerge()
    return summed(other, weights)(IMAGES)


@pytest.mark.parametrize("safe", [False, True])
def test_merging_refuses_nan_and_changes_nothing(safe):
    model = several()
    nn.init.constant_(model.get_base_model().head.tucker_update["default"].core, float("nan"))
    with model.disable_adapter():
        plain = model(IMAGES)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="entries of 'weight' would be NaN or infinite"):
            merge(safe_merge=safe)
        assert model.get_model_status().merged_adapters == []
        with model.disable_adapter():
            assert torch.equal(model(IMAGES), plain)


@pytest.mark.parametrize("names", [None, ["style"], ["style", "extra"]])
def test_merged_and_unloaded_models_are_plain(names):
    model = several()
    expected = summed(model, dict.fromkeys(names or ["default"], 1.0))(IMAGES)
    plain = model.merge_and_unload(adapter_names=names)
    assert [type(m) for m in plain.modules()] == [type(m) for m in net().modules()]
    assert close(plain(IMAGES), expected)


def test_an_embedding_is_merged_without_its_tied_head(tmp_path):
    base = FAMILIES["gpt2"].make().eval()
    model = get_peft_model(copy.deepcopy(base), config(target_modules=["wte", "c_attn"])).eval()
    head, output = model.get_base_model().lm_head.weight, run(model, "gpt2")
    model.merge_adapter()
    assert close(run(model, "gpt2"), output)
    assert torch.equal(head, base.lm_head.weight)
    model.unmerge_adapter()
    assert model.get_base_model().transformer.wte.base_layer.weight is head
    assert torch.equal(
        run(PeftModel.from_pretrained(copy.deepcopy(base), saved(model, tmp_path / "a")), "gpt2"), output
    )
    assert set(ft.load_adapter(tmp_path / "a")) == {"transformer.wte.weight", "transformer.h.0.attn.c_attn.weight"}
    assert close(run(model.merge_and_unload(), "gpt2"), output)


def test_computed_weights_are_merged_only_into_plain_layers():
    base = nn.ModuleDict({"fc": nn.utils.parametrizations.weight_norm(nn.Linear(6, 5))})
    base.forward = lambda x: base["fc"](x)
    model = get_peft_model(base, config(target_modules=["fc"]))
    x = torch.randn(2, 6)
    output = model(x)
    with pytest.raises(ValueError, match=r"is computed by .* use merge_and_unload, or torch.nn.utils.parametrize"):
        model.merge_adapter()
    assert close(model.merge_and_unload()(x), output)


# --- state dicts, injection, empty models -------------------------------------------------------------


def test_state_dicts_are_taken_and_given():
    model = several()
    for name in ("default", "style"):
        state = get_peft_model_state_dict(model, adapter_name=name)
        assert all(name not in key and "_extra_state" not in key for key in state)
        other = several()
        result = set_peft_model_state_dict(other, state, adapter_name=name)
        assert not result.unexpected_keys
        assert not [key for key in result.missing_keys if f".{name}." in key]
        theirs = get_peft_model_state_dict(other, adapter_name=name)
        assert all(torch.equal(theirs[key], state[key]) for key in state)
    with pytest.raises(RuntimeError, match="size mismatch"):
        set_peft_model_state_dict(model, get_peft_model_state_dict(model, adapter_name="style"), adapter_name="default")


def test_adapters_are_injected_into_models_that_stay_what_they_are():
    model = inject_adapter_in_model(config(), net())
    assert type(model) is Net
    state = get_peft_model_state_dict(model)
    assert "head.tucker_update.core" in state
    options = {"target_modules": ["conv", "up"], "target_parameters": ["head.weight"]}
    other = inject_adapter_in_model(config(**options), net(), low_cpu_mem_usage=True)
    assert {p.device.type for name, p in other.named_parameters() if "tucker_update" in name} == {"meta"}
    set_peft_model_state_dict(other, state, low_cpu_mem_usage=True)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(IMAGES), model(IMAGES))
    by_keys = inject_adapter_in_model(config(target_modules=["head", "conv", "up"]), net(), state_dict=state)
    assert sum(isinstance(m, FloraTunerLayer) for m in by_keys.modules()) == 3


@pytest.mark.parametrize("options", [{}, {"magnitude": True}, {"init_weights": "principal"}])
def test_models_are_loaded_without_a_copy_in_memory(options, tmp_path):
    model = get_peft_model(net(), config(**options))
    base = copy.deepcopy(model).unload()
    assert {p.device.type for p in get_peft_model(net(), config(**options), low_cpu_mem_usage=True).parameters()} == {
        "cpu",
        "meta",
    }
    loaded = PeftModel.from_pretrained(base, saved(model, tmp_path / "a"), low_cpu_mem_usage=True)
    assert {p.device.type for p in loaded.parameters()} == {"cpu"}
    trained = dict(model.named_parameters())
    assert all(torch.equal(p, trained[name]) for name, p in loaded.named_parameters())
    # These parameters lie in the file, at addresses that PyTorch rounds small products differently for.
    assert close(loaded(IMAGES), model.eval()(IMAGES))


def test_hot_swapping_goes_by_copying_or_is_refused(tmp_path):
    base = net()
    first, second = (get_peft_model(copy.deepcopy(base), config()) for _ in range(2))
    third = get_peft_model(copy.deepcopy(base), config(scale=2.0))
    paths = [saved(model, tmp_path / name) for name, model in (("a", first), ("b", second), ("c", third))]
    model = PeftModel.from_pretrained(copy.deepcopy(base), paths[0])
    cores = [p for name, p in model.named_parameters() if name.endswith("core")]
    hotswap_adapter(model, str(paths[1]), "default")
    assert torch.equal(model(IMAGES), second.eval()(IMAGES))
    assert all(a is b for a, b in zip(cores, [p for name, p in model.named_parameters() if name.endswith("core")]))
    with pytest.raises(ValueError, match="Configs are incompatible: for scale"):
        hotswap_adapter(model, str(paths[2]), "default")
    flora_torch.hotswap_adapter(model, paths[2])
    assert close(model(IMAGES), third.eval()(IMAGES))


# --- transformers -------------------------------------------------------------------------------------


def test_transformers_own_functions_work(tmp_path):
    base = FAMILIES["llama"].make().eval()
    model = copy.deepcopy(base)
    model.add_adapter(config(target_modules=["q_proj", "down_proj"]))
    output = run(model)
    assert not close(output, run(base))
    model.disable_adapters()
    assert torch.equal(run(model), run(base))
    model.enable_adapters()
    model.save_pretrained(tmp_path / "a")
    other = copy.deepcopy(base)
    other.load_adapter(tmp_path / "a", adapter_name="given")
    assert other.active_adapters() == ["given"]
    assert torch.equal(run(other), output)
    assert torch.equal(run(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "a")), output)
    model.delete_adapter("default")
    assert torch.equal(run(model), run(base))


# --- what else a model can have -----------------------------------------------------------------------


@pytest.mark.parametrize("bias", ["all", "flora_only"])
def test_biases_are_trained_and_saved_too(bias, tmp_path):
    base = net()
    model = get_peft_model(copy.deepcopy(base), config(bias=bias)).eval()
    trained = {name for name, p in model.named_parameters() if p.requires_grad and name.endswith("bias")}
    assert len(trained) == (4 if bias == "all" else 3)
    model(IMAGES).sum().backward()
    for name, parameter in model.named_parameters():
        if name in trained:
            assert parameter.grad is not None
            nn.init.normal_(parameter)
    directory = saved(model, tmp_path / "a")
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), directory)
    assert torch.equal(loaded(IMAGES), model(IMAGES))
    assert close(model(IMAGES), dense(base, directory)(IMAGES))
    other = copy.deepcopy(base)
    flora_torch.load_adapter(other, directory)
    assert torch.equal(other(IMAGES), model(IMAGES))


@pytest.mark.parametrize("bias", ["all", "flora_only"])
def test_biases_of_layers_inside_layers_are_taken_and_given(bias):
    options = {"target_modules": ["self_attn"], "bias": bias, "init_weights": False}
    model, other = (get_peft_model(Transformer(), config(**options)).eval() for _ in range(2))
    for name, parameter in model.named_parameters():
        if name.endswith("out_proj.base_layer.bias"):
            nn.init.normal_(parameter)
    state = get_peft_model_state_dict(model)
    assert not set_peft_model_state_dict(other, state).unexpected_keys
    biases = [{n: p for n, p in m.named_parameters() if n.endswith("out_proj.base_layer.bias")} for m in (model, other)]
    assert len(biases[0]) == 3
    assert all(torch.equal(biases[0][name], biases[1][name]) for name in biases[0])


def test_a_copy_of_a_frozen_embedding_does_no_harm(tmp_path):
    base = FAMILIES["llama"].make()
    model = get_peft_model(copy.deepcopy(base), config(target_modules=["embed_tokens", "q_proj"])).eval()
    directory = saved(model, tmp_path / "a")
    keys = load_file(directory / "adapter_model.safetensors")
    assert "base_model.model.model.embed_tokens.base_layer.weight" in keys
    assert close(run(dense(base, directory)), run(model))
    assert torch.equal(run(PeftModel.from_pretrained(copy.deepcopy(base), directory)), run(model))


def test_modules_are_saved_whole(tmp_path):
    base = net()
    model = get_peft_model(copy.deepcopy(base), config(target_modules=["conv"], modules_to_save=["head"])).eval()
    nn.init.normal_(model.get_base_model().head.modules_to_save["default"].weight)
    directory = saved(model, tmp_path / "a")
    assert torch.equal(PeftModel.from_pretrained(copy.deepcopy(base), directory)(IMAGES), model(IMAGES))
    assert sorted(ft.load_adapter(directory).whole) == ["head.bias", "head.weight"]
    assert close(dense(base, directory)(IMAGES), model(IMAGES))


@pytest.mark.parametrize("init", ["principal", "minor", "official", "loralib", "peft"])
def test_every_start_begins_at_the_model_and_comes_back(init, tmp_path):
    base = net()
    model = get_peft_model(copy.deepcopy(base), config(init_weights=init)).eval()
    assert torch.equal(model(IMAGES), base(IMAGES))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    directory = saved(model, tmp_path / "a")
    assert close(model(IMAGES), dense(base, directory)(IMAGES))
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), directory, is_trainable=True)
    assert torch.equal(loaded.eval()(IMAGES), model(IMAGES))
    mine, theirs = ({n: p for n, p in m.named_parameters() if p.requires_grad} for m in (model, loaded))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    state = get_peft_model_state_dict(model)
    set_peft_model_state_dict(loaded, {key: 2 * value for key, value in state.items()})
    assert torch.equal(
        loaded.get_base_model().head.tucker_update["default"].core,
        2 * mine["base_model.model.head.tucker_update.default.core"],
    )


def test_magnitudes_and_dropouts_are_kept(tmp_path):
    options = {"magnitude": True, "dropout": 0.1, "module_dropout": 0.2}
    base = net()
    model = get_peft_model(copy.deepcopy(base), config(**options)).eval()
    nn.init.uniform_(model.get_base_model().head.tucker_update["default"].magnitude)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), saved(model, tmp_path / "a"))
    assert torch.equal(loaded(IMAGES), model(IMAGES))
    update = loaded.get_base_model().up.tucker_update["default"]
    assert (update.dropout, update.module_dropout) == (0.1, 0.2)
    assert close(model.merge_and_unload()(IMAGES), loaded(IMAGES))


def test_linear_layers_are_made_a_lora_by_peft():
    model = get_peft_model(net(), config(target_modules=["head"])).eval()
    assert model.supports_lora_conversion()
    made, state = peft.convert_to_lora(model, 4)
    other = get_peft_model(summed(model, {}), made).eval()
    set_peft_model_state_dict(other, state)
    assert close(other(IMAGES), model(IMAGES), 1e3)


# --- files from elsewhere -----------------------------------------------------------------------------


def tuned_pair(base: nn.Module, tmp_path: Any) -> tuple[Any, Any]:
    tuned = copy.deepcopy(base)
    for parameter in tuned.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    paths = tmp_path / "base.safetensors", tmp_path / "tuned.safetensors"
    for model, path in zip((base, tuned), paths):
        save_file(model.state_dict(), path)
    return paths


def test_an_extraction_is_loaded_switched_and_saved_again(tmp_path):
    base = net()
    ft.extract(*tuned_pair(base, tmp_path), tmp_path / "a", max_ratio=0.5)
    expected = dense(base, tmp_path / "a")(IMAGES)
    assert len(ft.load_adapter(tmp_path / "a").whole) == 5
    model = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "a")
    assert close(model(IMAGES), expected)
    with model.disable_adapter():
        assert torch.equal(model(IMAGES), base(IMAGES))
    model.add_adapter("other", config())
    model.set_adapter("other")
    assert torch.equal(model.get_base_model().norm.weight, base.norm.weight)
    model.set_adapter("default")
    assert close(model(IMAGES), expected)
    directory = saved(model, tmp_path / "b")
    assert close(dense(base, directory)(IMAGES), expected)
    assert torch.equal(PeftModel.from_pretrained(copy.deepcopy(base), directory)(IMAGES), model(IMAGES))
    assert close(copy.deepcopy(model).merge_and_unload()(IMAGES), expected)
    assert torch.equal(copy.deepcopy(model).unload()(IMAGES), base(IMAGES))
    with pytest.raises(ValueError, match=r"replaces 'conv\.bias' whole, which PeftModel\.from_pretrained"):
        inject_adapter_in_model(peft.PeftConfig.from_pretrained(directory), net())
    model.set_adapter("other")
    model.delete_adapter("default")
    with model.disable_adapter():
        assert torch.equal(model(IMAGES), base(IMAGES))


def test_two_extractions_are_switched(tmp_path):
    base = net()
    expected = {}
    for name in ("first", "second"):
        ft.extract(*tuned_pair(base, tmp_path), tmp_path / name, max_ratio=0.5)
        expected[name] = dense(base, tmp_path / name)(IMAGES)
    model = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "first", "first")
    model.load_adapter(tmp_path / "second", "second")
    for name in ("first", "second", "first"):
        model.set_adapter(name)
        assert close(model(IMAGES), expected[name])
    with model.disable_adapter():
        assert torch.equal(model(IMAGES), base(IMAGES))
    assert close(model(IMAGES), expected["first"])
    with pytest.raises(ValueError, match=r"adapters 'first' and 'second' both replace 'conv\.bias' whole"):
        model.base_model.set_adapter(["first", "second"])
    model.set_adapter("second")
    model.delete_adapter("first")
    assert close(model(IMAGES), expected["second"])
    other = copy.deepcopy(base)
    flora_torch.load_adapter(other, tmp_path / "first", adapter_name="first")
    flora_torch.activate(other)
    flora_torch.load_adapter(other, tmp_path / "second", adapter_name="second")
    with pytest.raises(ValueError, match=r"activate: adapters 'first' and 'second' both replace"):
        flora_torch.activate(other, "first", "second")
    for name in ("first", "second"):
        flora_torch.activate(other, name)
        assert close(other(IMAGES), expected[name])
    assert torch.equal(flora_torch.detach(other)(IMAGES), base(IMAGES))


def test_stacks_are_loaded_layer_by_layer(tmp_path):
    base = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    tucker = ft.TuckerTensor(torch.randn(3, 2, 2), (torch.randn(4, 3), torch.randn(8, 2), torch.randn(8, 2)))
    members = tuple(f"{k}.weight" for k in range(4))
    stack = ft.TuckerStack(members, tucker.map(lambda a: a.numpy()), ft.Arrangement("o i"), (8, 8))
    ft.save_adapter(tmp_path / "a", ft.Adapter({}, stacks={"*.weight": stack}, scales=dict.fromkeys(members, 0.5)))
    x = torch.randn(3, 8)
    model = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "a")
    assert close(model(x), dense(base, tmp_path / "a")(x))
    again = PeftModel.from_pretrained(copy.deepcopy(base), saved(model, tmp_path / "b"))
    assert torch.equal(again(x), model(x))


def test_commands_work_on_what_peft_saves(tmp_path):
    base = nn.Sequential(nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 6)).eval()
    save_file(base.state_dict(), tmp_path / "base.safetensors")
    model = get_peft_model(copy.deepcopy(base), config(ranks=3, target_modules=["0", "2"], scale=0.5)).eval()
    saved(model, tmp_path / "a")
    x = torch.randn(4, 12)

    def command(*words: str) -> None:
        done = CliRunner().invoke(main, [str(w) for w in words], catch_exceptions=False)
        assert done.exit_code == 0, done.output

    command("inspect", tmp_path / "a")
    command("merge", tmp_path / "base.safetensors", tmp_path / "a", "-o", tmp_path / "merged.safetensors")
    merged = copy.deepcopy(base)
    merged.load_state_dict(load_file(tmp_path / "merged.safetensors"))
    assert close(merged(x), model(x))
    command("round", tmp_path / "a", "-o", tmp_path / "b", "--max-parameters", "1000")
    assert close(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "b")(x), model(x))
    command("convert", tmp_path / "a", tmp_path / "lora", "--to", "peft-lora")
    assert close(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "lora")(x), model(x))


class Narrow(Net):
    """Another net: its convolution pads with zeros, or its head is of another size."""

    def __init__(self, change: str):
        super().__init__()
        if change == "padding":
            self.conv.padding_mode = "zeros"
        elif change == "shape":
            self.head = nn.Linear(6, 4)
        elif change == "missing":
            self.head = nn.Identity()


def test_other_values_of_the_same_model_are_a_warning(tmp_path):
    directory, other = saved(get_peft_model(net(), config()), tmp_path / "a"), net()
    with pytest.warns(ft.FloraWarning, match=r"the values of '.*' and of 2 more weights are not those"):
        PeftModel.from_pretrained(other, directory)


def test_damaged_and_newer_files_are_refused(tmp_path):
    base = net()
    model = get_peft_model(copy.deepcopy(base), config())
    written = peft.PeftConfig.from_pretrained(saved(model, tmp_path / "a")).to_dict()
    for change, message in (
        ({"format_version": "2.0"}, r"format 2\.0, but this version reads 1\."),
        ({"rank_pattern": {"head.weight": [2, "2"]}}, "must be a list of non-negative integers"),
        ({"rank_pattern": {}}, "the file has no ranks in rank_pattern"),
    ):
        with pytest.raises(ValueError, match=message):
            FloraConfig(**(written | change))
    state = get_peft_model_state_dict(model)
    state["base_model.model.head.tucker_update.core"] *= float("nan")
    with pytest.raises(ValueError, match=r"'.*head\.tucker_update\.core' has NaN or infinite entries"):
        set_peft_model_state_dict(model, state)


def test_rows_that_only_the_file_has_are_refused(tmp_path):
    base = net()
    directory = saved(get_peft_model(copy.deepcopy(base), config()), tmp_path / "a")
    given = peft.PeftConfig.from_pretrained(directory)
    given.resized = {"head.weight": [5, 7]}
    with pytest.raises(ValueError, match=r"the file gives 'head\.weight' more rows"):
        get_peft_model(base, given)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("padding", r"the layer of 'conv\.weight' is .*'zeros' in the model"),
        ("shape", r"'head\.weight' is of shape \(4, 6\) in the model and \(5, 6\) in the file"),
        ("missing", r"the file changes 'head\.weight', which the model does not have"),
    ],
)
def test_a_file_of_another_model_is_refused_before_anything_is_changed(change, message, tmp_path):
    directory, other = saved(get_peft_model(net(), config()), tmp_path / "a"), Narrow(change)
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(other, directory)
    assert not any(isinstance(m, BaseTunerLayer) for m in other.modules())


# --- what is refused ----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_other_methods_are_not_mixed_in():
    with pytest.raises(ValueError, match="not compatible with the `PeftMixedModel`"):
        get_peft_model(net(), config(), mixed=True)
    lora = get_peft_model(net(), peft.LoraConfig(target_modules=["head"]))
    with (
        pytest.warns(UserWarning, match="second time"),
        pytest.raises(ValueError, match="'head' has an adapter of another"),
    ):
        get_peft_model(lora.get_base_model(), config(target_modules=["head"]))
    model = get_peft_model(net(), config())
    with pytest.raises(ValueError, match="different peft types"):
        model.add_adapter("other", peft.LoraConfig(target_modules=["head"]))


def test_a_parameter_of_the_model_itself_is_refused():
    model = nn.Sequential(nn.Linear(2, 2))
    model.register_parameter("own", nn.Parameter(torch.zeros(2, 2)))
    with pytest.raises(ValueError, match="'own' belongs to the model itself"):
        get_peft_model(model, FloraConfig(target_parameters=["own"]))


def test_a_sharded_model_of_peft_names_its_weights_as_any_other(tmp_path):
    model = get_peft_model(net(), config())
    expected = set(ft.load_adapter(saved(model, tmp_path / "a")))
    # fully_shard gives a model a class made from its own.
    model.__class__ = type("FSDPPeftModel", (type(model),), {})
    flora_torch.save_adapter(model, tmp_path / "b")
    assert set(ft.load_adapter(tmp_path / "b")) == expected == {f"{name}.weight" for name in TARGETS}


def test_layers_tell_their_sizes():
    layers = get_peft_model(net(), config()).get_base_model()
    sizes = [(getattr(layers, name).in_features, getattr(layers, name).out_features) for name in TARGETS]
    assert sizes == [(4, 8), (8, 6), (6, 5)]
    attention = get_peft_model(FAMILIES["gpt2"].make(), config(target_modules=["c_attn"])).get_base_model()
    turned = attention.transformer.h[0].attn.c_attn
    assert (turned.in_features, turned.out_features) == (16, 48)
    pair = inject_adapter_in_model(config(target_modules=["pair"]), nn.ModuleDict({"pair": nn.Bilinear(2, 3, 4)}))[
        "pair"
    ]
    assert (hasattr(pair, "in_features"), pair.out_features) == (False, 4)
