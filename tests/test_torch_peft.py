"""FLoRA as a method of Hugging Face PEFT: what PEFT's users expect of one, and files that go both ways."""

import copy
import importlib
import pickle
import subprocess
import sys
import warnings
from typing import Any

import peft
import pytest
import torch
from peft import (
    PeftModel,
    get_peft_model,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch import nn

import flora_tensor as ft
import flora_torch
import flora_torch.peft
from families import FAMILIES
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
        "`is_gradient_checkpointing` is deprecated",
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


def test_without_peft_the_import_says_what_to_install():
    program = "import sys; sys.modules['peft'] = None; import flora_torch; import flora_torch.peft"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "pip install 'flora-tensor[peft]'" in done.stderr


def test_an_older_peft_is_refused(monkeypatch):
    monkeypatch.delattr(peft.tuners.tuners_utils.BaseTuner, "_remap_adapter_state_dict_for_load")
    with pytest.raises(ImportError, match=r"needs peft 0\.21 or newer"):
        register(FloraConfig, FloraModel)


# --- the config ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bias": "lora_only"}, "bias is 'lora_only'; pass one of none, all, flora_only"),
        ({"scaling": "big"}, "scaling is 'big'"),
        ({"memory": "none"}, "memory is 'none'"),
        ({"init_weights": "gaussian"}, "init_weights is 'gaussian'; pass True, False, or one of orthonormal"),
        ({"init_weights": "from_gradient"}, "starts from data, which a config cannot hold"),
        ({"alpha": 4.0, "scale": 2.0}, "got both scale and alpha"),
        ({"alpha_pattern": {"head": 2.0}}, "alpha_pattern without alpha"),
        ({"target_modules": "head", "layers_to_transform": 1}, "layers_to_transform with target_modules 'head'"),
        ({"layers_pattern": "layers"}, "layers_pattern without layers_to_transform"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        FloraConfig(**options)


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
