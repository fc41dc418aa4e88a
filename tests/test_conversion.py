"""Other formats: files that PEFT and LyCORIS themselves wrote, read by us, and ours read by them. Outputs agree."""

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import flora_tensor as ft
import flora_torch
from checkpoints import run, save
from flora_tensor._lora_parts import from_parts, low_rank_of
from flora_torch import convert
from support import tolerance

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import lycoris


class Net(nn.Module):
    """Two convolutions of different strides and dilations, a grouped one, two linear layers."""

    def __init__(self, *, groups: int = 1) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 8, 3, padding=1)
        self.block = nn.Sequential(nn.Conv2d(8, 12, (3, 2), stride=2, groups=groups), nn.ReLU())
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.hidden = nn.Linear(48, 16)
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(self.block(torch.relu(self.first(x))))
        return self.head(torch.relu(self.hidden(x.flatten(1))))


def net(seed: int = 0, **options: Any) -> Net:
    torch.manual_seed(seed)
    return Net(**options).eval()


def image(seed: int = 1) -> torch.Tensor:
    return torch.randn(3, 4, 9, 9, generator=torch.Generator().manual_seed(seed))


def randomize(module: nn.Module, seed: int = 2) -> None:
    """Give every trainable parameter a value of its own, so that no adapter is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * float(theirs.detach().abs().max()))


def attached(adapter: Any, **options: Any) -> Net:
    model = net(**options)
    flora_torch.attach_adapter(model, adapter)
    return model


# --- PEFT --------------------------------------------------------------------------------------------


def saved_by_peft(path: Path, config: Any, model: nn.Module | None = None) -> torch.Tensor:
    """Wrap a model in PEFT, save the adapter, and return the output."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(model or net(), config)
        randomize(wrapped)
        wrapped.save_pretrained(path)
        wrapped.eval()
        with torch.no_grad():
            return wrapped(image()).clone()


CONFIGS = {
    "lora": peft.LoraConfig(r=3, lora_alpha=5, target_modules=["first", "0", "hidden", "head"]),
    "rslora": peft.LoraConfig(r=4, lora_alpha=3, use_rslora=True, target_modules=["first", "hidden"]),
    "patterns": peft.LoraConfig(
        r=2,
        lora_alpha=4,
        target_modules=["first", "0", "hidden", "head"],
        rank_pattern={"first": 3, "h.*d": 4},
        alpha_pattern={"^block.0": 1, "hidden": 7},
    ),
    "modules_to_save": peft.LoraConfig(r=2, target_modules=["hidden"], modules_to_save=["head"]),
    "bias": peft.LoraConfig(r=2, target_modules=["first", "head"], bias="all"),
    "loha": peft.LoHaConfig(r=2, alpha=3, target_modules=["first", "0", "hidden", "head"]),
    "loha tucker": peft.LoHaConfig(r=2, target_modules=["first", "0", "head"], use_effective_conv2d=True),
    "lokr": peft.LoKrConfig(r=2, alpha=3, target_modules=["first", "0", "hidden", "head"]),
    "lokr tucker": peft.LoKrConfig(
        r=1, target_modules=["first", "0", "hidden"], use_effective_conv2d=True, decompose_both=True
    ),
    "lokr full": peft.LoKrConfig(r=64, alpha=16, target_modules=["first", "hidden"], decompose_factor=2),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_what_peft_saved_gives_the_same_outputs(name: str, tmp_path: Path):
    theirs = saved_by_peft(tmp_path / "a", CONFIGS[name])
    adapter = convert.from_peft_lora(tmp_path / "a", net())
    with torch.no_grad():
        close(attached(adapter)(image()), theirs)
    # It is an adapter directory like any other.
    ft.save_adapter(tmp_path / "flora", adapter)
    with torch.no_grad():
        close(attached(tmp_path / "flora")(image()), theirs)


def test_a_lora_keeps_its_bits_and_its_size_and_comes_back(tmp_path: Path):
    theirs = saved_by_peft(tmp_path / "a", CONFIGS["patterns"])
    adapter = ft.from_peft_lora(tmp_path / "a")
    before = safetensors.torch.load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert adapter.n_parameters == sum(t.numel() for t in before.values())
    ft.to_peft_lora(adapter, tmp_path / "b")
    after = safetensors.torch.load_file(tmp_path / "b" / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert torch.equal(after[key], tensor)
    close(read_by_peft(tmp_path / "b"), theirs)


def test_bfloat16_loras_stay_bfloat16(tmp_path: Path):
    saved_by_peft(tmp_path / "a", CONFIGS["lora"], net().bfloat16().float())
    file = tmp_path / "a" / "adapter_model.safetensors"
    half = {k: t.bfloat16() for k, t in safetensors.torch.load_file(file).items()}
    safetensors.torch.save_file(half, file)
    adapter = ft.from_peft_lora(tmp_path / "a")
    assert set(adapter.dtypes.values()) == {"BF16"}
    ft.to_peft_lora(adapter, tmp_path / "b")
    for key, tensor in safetensors.torch.load_file(tmp_path / "b" / "adapter_model.safetensors").items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, half[key])


def read_by_peft(path: Path, model: nn.Module | None = None, x: Any = None) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # missing keys are but a warning
        wrapped = peft.PeftModel.from_pretrained(model or net(), path)
    with torch.no_grad():
        return wrapped.eval()(image() if x is None else x)


RANKS = [(3, 2, 2, 2), (8, 2, 1, 1), (2, 4, 3, 2)]


@pytest.mark.parametrize("ranks", RANKS)
def test_peft_reads_what_we_wrote(ranks: tuple[int, ...], tmp_path: Path):
    model = net()
    flora_torch.attach(
        model, ranks={"head": (2, 3), "hidden": (4, 2), "*": ranks}, scale={"first": 0.3, "hidden": -2.0}
    )
    randomize(model)
    with torch.no_grad():
        ours = model(image())
    convert.to_peft_lora(model, tmp_path / "lora")
    close(read_by_peft(tmp_path / "lora"), ours)
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    written = {**dict.fromkeys(("first", "block.0", "hidden", "head"), config["r"])}
    written |= {k.removeprefix("^").replace("\\", ""): r for k, r in config["rank_pattern"].items()}
    assert (written["head"], written["hidden"]) == (2, 2)
    expected = min(ranks[0], 4, 3 * 3 * 4)
    assert written["first"] <= max(expected, min(ranks[0], ranks[1] * ranks[2] * ranks[3]))


def test_embeddings_and_transposed_linear_layers(tmp_path: Path):
    from transformers.pytorch_utils import Conv1D

    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.mix = nn.Embedding(11, 6), Conv1D(9, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.mix(self.words(x))

    def words() -> Words:
        torch.manual_seed(0)
        return Words()

    ids = torch.arange(11)
    model = words()
    flora_torch.attach(model, ranks=(3, 2), target_modules=["words", "mix"])
    randomize(model)
    with torch.no_grad():
        ours = model(ids)
    convert.to_peft_lora(model, tmp_path / "lora")
    close(read_by_peft(tmp_path / "lora", words(), ids), ours)
    # The directory notes what the model knows, so that the command line writes the same.
    flora_torch.save_adapter(model, tmp_path / "ours")
    assert run("convert", tmp_path / "ours", tmp_path / "by_command", "--to", "peft-lora").exit_code == 0
    close(read_by_peft(tmp_path / "by_command", words(), ids), ours)
    for source in (words(), None):
        again = words()
        flora_torch.attach_adapter(again, convert.from_peft_lora(tmp_path / "lora", source))
        with torch.no_grad():
            close(again(ids), ours)


def test_layers_that_peft_has_no_lora_for_are_refused_without_a_model_too(tmp_path: Path):
    for layer in (nn.Conv1d(4, 6, 3, groups=2), nn.ConvTranspose1d(4, 6, 3), nn.Bilinear(4, 5, 6)):
        model = nn.Sequential(layer)
        flora_torch.attach(model, ranks=2)
        flora_torch.save_adapter(model, tmp_path / "a", overwrite=True)
        with pytest.raises(ft.InputError, match=r"'0\.weight' is of a .* groups, of which PEFT has no LoRA"):
            ft.to_peft_lora(tmp_path / "a", tmp_path / "lora")


def test_whole_tensors_travel_with_a_lora(tmp_path: Path):
    model = net()
    flora_torch.attach(model, ranks=2, target_modules=["hidden"])
    randomize(model)
    flora_torch.save_adapter(model, tmp_path / "a")
    given = ft.load_adapter(tmp_path / "a")
    values = {name: np.full(n, 0.5, np.float32) for name, n in (("hidden.bias", 16), ("head.bias", 5))}
    adapter = ft.Adapter(given.tensors, scales=given.scales, whole=values)
    ft.to_peft_lora(adapter, tmp_path / "lora")
    with torch.no_grad():
        close(read_by_peft(tmp_path / "lora"), attached(adapter)(image()))
    back = ft.from_peft_lora(tmp_path / "lora")
    assert {n: x.tolist() for n, x in back.whole.items()} == {n: x.tolist() for n, x in values.items()}


def test_counters_travel_with_a_lora(tmp_path: Path):
    given = ft.Adapter({"fc.weight": tensor()}, whole={"norm.num_batches_tracked": np.array(7)})
    ft.to_peft_lora(given, tmp_path / "lora")
    back = ft.from_peft_lora(tmp_path / "lora")
    assert (back.whole["norm.num_batches_tracked"], back.dtypes["norm.num_batches_tracked"]) == (7, "I64")


# --- LyCORIS -----------------------------------------------------------------------------------------

ALGOS: dict[str, dict[str, Any]] = {
    "lora": {"algo": "lora", "linear_dim": 3, "linear_alpha": 2.0},
    "tucker": {"algo": "locon", "linear_dim": 3, "linear_alpha": 5.0, "use_tucker": True},
    "loha": {"algo": "loha", "linear_dim": 2, "linear_alpha": 3.0},
    "loha tucker": {"algo": "loha", "linear_dim": 2, "linear_alpha": 1.0, "use_tucker": True},
    "lokr": {"algo": "lokr", "linear_dim": 2, "linear_alpha": 3.0, "factor": 2},
    "lokr tucker": {"algo": "lokr", "linear_dim": 1, "linear_alpha": 3.0, "factor": 2, "use_tucker": True},
    "lokr both": {"algo": "lokr", "linear_dim": 1, "linear_alpha": 3.0, "decompose_both": True},
    "lokr full": {"algo": "lokr", "linear_dim": 100000, "linear_alpha": 3.0, "factor": 4},
}


@pytest.mark.parametrize("name", ALGOS)
@pytest.mark.parametrize("groups", [1, 2])
def test_what_lycoris_saved_gives_the_same_outputs(name: str, groups: int, tmp_path: Path):
    options = {"linear_dim": 4, "linear_alpha": 1.0, **ALGOS[name]}
    model = net(groups=groups)
    lycoris.LycorisNetwork.apply_preset({"target_name": [], "target_module": ["Linear", "Conv2d"]})
    network = lycoris.create_lycoris(model, 1.0, preset="full", **options)
    network.apply_to()
    network.requires_grad_(True)
    randomize(network)
    with torch.no_grad():
        theirs = model(image())
    file = tmp_path / "saved.safetensors"
    network.save_weights(str(file), None, {})
    adapter = convert.from_lycoris(file, net(groups=groups))
    assert len(adapter) == 4
    with torch.no_grad():
        close(attached(adapter, groups=groups)(image()), theirs)
    dense = sum(np.prod(shape) for shape in adapter.shapes.values())
    assert adapter.n_parameters <= dense


def read_by_lycoris(file: Path, model: nn.Module) -> torch.Tensor:
    network, _ = lycoris.create_lycoris_from_weights(1.0, str(file), model)
    assert len(network.loras) == 4
    network.apply_to()
    with torch.no_grad():
        return model(image())


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("tucker", [True, False])
@pytest.mark.parametrize("groups", [1, 2])
def test_lycoris_reads_what_we_wrote(ranks: tuple[int, ...], tucker: bool, groups: int, tmp_path: Path):
    model = net(groups=groups)
    flora_torch.attach(model, ranks={"head": (2, 3), "hidden": 4, "*": ranks}, scale={"first": 0.3, "hidden": -2.0})
    randomize(model)
    with torch.no_grad():
        ours = model(image())
    file = convert.to_lycoris(model, tmp_path / "ours.safetensors", tucker=tucker)
    assert any("lora_mid" in key for key in safetensors.torch.load_file(file)) <= tucker
    close(read_by_lycoris(file, net(groups=groups)), ours)
    with torch.no_grad():
        close(attached(convert.from_lycoris(file, model), groups=groups)(image()), ours)


def test_a_tucker_kernel_is_written_as_a_locon_tucker(tmp_path: Path):
    rng = np.random.default_rng(0)
    shape, ranks = (32, 24, 3, 3), (3, 5, 2, 2)
    t = ft.TuckerTensor(rng.standard_normal(ranks), [rng.standard_normal((n, r)) for n, r in zip(shape, ranks)])
    file = ft.to_lycoris({"a.b.weight": t}, tmp_path / "f.safetensors", prefix="lora_unet")
    parts = {k.removeprefix("lora_unet_a_b."): v for k, v in safetensors.torch.load_file(file).items()}
    assert {k: tuple(v.shape) for k, v in parts.items()} == {
        "lora_up.weight": (32, 5, 1, 1),
        "lora_down.weight": (5, 24, 1, 1),
        "lora_mid.weight": (5, 5, 3, 3),
        "alpha": (),
    }
    rebuilt = torch.einsum(
        "mnhw,im,nj->ijhw",
        parts["lora_mid.weight"],
        parts["lora_up.weight"][..., 0, 0],
        parts["lora_down.weight"][..., 0, 0],
    )
    torch.testing.assert_close(rebuilt * parts["alpha"] / 5, torch.from_numpy(t.to_tensor()), rtol=1e-10, atol=1e-10)


# --- the official code -------------------------------------------------------------------------------


class OfficialLayer(nn.Module):
    """The parameters and the weight of the official layer, from its description: modes (in, out, *kernel)."""

    def __init__(self, shape: tuple[int, ...], ranks: tuple[int, ...], scale: float) -> None:
        super().__init__()
        self.scale = scale
        sizes = (shape[1], shape[0], *shape[2:])
        self.param_G = nn.Parameter(torch.randn(ranks))
        for k, (n, r) in enumerate(zip(sizes, ranks)):
            self.register_parameter(f"param_{k}", nn.Parameter(torch.randn(n, r)))

    def delta(self) -> torch.Tensor:
        weight = self.param_G
        for k in range(self.param_G.dim()):
            weight = torch.tensordot(weight, getattr(self, f"param_{k}"), dims=[[0], [1]])
        return self.scale * weight.transpose(0, 1)


@pytest.mark.parametrize(
    ("shape", "ranks"), [((6, 4), (2, 3)), ((6, 4, 3, 2), (3, 2, 2, 1)), ((5, 4, 3, 2, 3), (2, 3, 1, 2, 2))]
)
def test_official_layers_are_read_with_their_modes_in_order(
    shape: tuple[int, ...], ranks: tuple[int, ...], tmp_path: Path
):
    torch.manual_seed(0)
    layer = OfficialLayer(shape, ranks, 4.0)
    state = {f"model.a.b.flora_layer.{k}": v for k, v in layer.state_dict().items()}
    state["model.a.b.base_layer.weight"] = torch.zeros(shape)
    adapter = ft.from_official_flora(state, scale=4.0)
    bound = tolerance("float32", *shape, norm=float(layer.delta().detach().norm()))
    assert np.linalg.norm(adapter.delta("a.b.weight") - layer.delta().detach().numpy()) <= bound
    torch.save(state, tmp_path / "f.pt")
    with pytest.raises(ft.InputError, match="pickle"):
        ft.from_official_flora(tmp_path / "f.pt", scale=4.0)
    again = ft.from_official_flora(tmp_path / "f.pt", scale=4.0, allow_pickle=True)
    assert np.array_equal(again.delta("a.b.weight"), adapter.delta("a.b.weight"))
    # The wrapper's prefix is only taken off where that leads to the base's names.
    inner = ft.from_official_flora(state, scale=1.0, base={"model.a.b.weight": np.zeros(shape)})
    assert list(inner) == ["model.a.b.weight"]
    with pytest.raises(ft.InputError, match="but the base has"):
        ft.from_official_flora(state, scale=1.0, base={"a.b.weight": np.zeros((1, *shape[1:]))})
    with pytest.raises(ft.InputError, match=r"the base has no 'model.a.b.weight'"):
        ft.from_official_flora(state, scale=1.0, base={"c.weight": np.zeros(shape)})
    converted = ft.convert_adapter(save(tmp_path / "f.safetensors", state), scale=4.0, prefix="model.a.")
    assert np.array_equal(converted.delta("b.weight"), adapter.delta("a.b.weight"))
    with pytest.raises(ft.InputError, match=r"has no flora_layer.param_G; it is no state dict of the official"):
        ft.from_official_flora({"model.a.b.base_layer.weight": np.zeros(shape)}, scale=1.0)
    with pytest.raises(ft.InputError, match=r"a.b.weight: TuckerTensor: factor . has shape"):
        ft.from_official_flora({**state, "model.a.b.flora_layer.param_0": torch.ones(3, 7)}, scale=1.0)
    del state["model.a.b.flora_layer.param_0"]
    with pytest.raises(ft.InputError, match=r"has param_1, .*the file is damaged"):
        ft.from_official_flora(state, scale=1.0)


# --- the algebra -------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(seed=st.integers(0, 10_000), data=st.data())
def test_low_rank_is_exact_for_every_arrangement(seed: int, data: st.DataObject):
    rng = np.random.default_rng(seed)
    shape = data.draw(st.sampled_from([(6, 5), (6, 4, 3), (6, 4, 3, 2)]))
    arrangement = data.draw(st.sampled_from(ft.Arrangement.candidates(len(shape))))
    arranged = arrangement.shape(shape)
    ranks = [int(rng.integers(1, 5)) for _ in arranged]
    whole = rng.random(len(arranged)) < 0.3
    ranks = [n if w else r for n, r, w in zip(arranged, ranks, whole)]
    t = ft.TuckerTensor(
        rng.standard_normal(ranks),
        [None if w else rng.standard_normal((n, r)) for n, r, w in zip(arranged, ranks, whole)],
    )
    up, down = low_rank_of(t, arrangement, shape)
    expected = arrangement.restore(t.to_tensor(), shape)
    bound = tolerance("float64", *shape, norm=float(np.linalg.norm(up) * np.linalg.norm(down)) + 1)
    assert np.linalg.norm(np.tensordot(up, down, 1) - expected) <= bound
    assert down.shape[0] <= min(shape[0], int(np.prod(shape[1:])))
    if arrangement.is_native:
        assert down.shape[0] <= min(ranks[0], int(np.prod(ranks[1:])))


# --- bad input ---------------------------------------------------------------------------------------


def test_what_has_no_exact_counterpart_is_refused(tmp_path: Path):
    saved_by_peft(tmp_path / "dora", peft.LoraConfig(r=2, target_modules=["head"], use_dora=True))
    with pytest.raises(ft.InputError, match="DoRA's change depends on the base weight"):
        ft.from_peft_lora(tmp_path / "dora")
    saved_by_peft(tmp_path / "groups", peft.LoraConfig(r=4, target_modules=["0"]), net(groups=2))
    with pytest.raises(ft.InputError, match="a LoRA of a convolution with 2 groups"):
        ft.from_peft_lora(tmp_path / "groups")
    saved_by_peft(tmp_path / "bias", peft.LoraConfig(r=4, target_modules=["head"], lora_bias=True))
    with pytest.raises(ft.InputError, match=r"'base_model.model.head.lora_B.bias': it has no Tucker tensor"):
        ft.from_peft_lora(tmp_path / "bias")
    saved_by_peft(tmp_path / "ia3", peft.IA3Config(target_modules=["head"], feedforward_modules=[]))
    with pytest.raises(ft.InputError, match="peft_type is 'IA3'; LORA, LOHA and LOKR can be converted"):
        ft.from_peft_lora(tmp_path / "ia3")
    saved_by_peft(tmp_path / "loha", CONFIGS["loha"])
    with pytest.raises(ValueError, match="LOHA tensors do not tell a kernel's shape; pass base"):
        ft.from_peft_lora(tmp_path / "loha")
    with pytest.raises(ft.InputError, match=r"do not make a weight of shape \(3, 48\)"):
        ft.from_peft_lora(
            tmp_path / "loha",
            base={
                "first.weight": np.zeros((8, 4, 3, 3)),
                "block.0.weight": np.zeros((12, 8, 3, 2)),
                "hidden.weight": np.zeros((3, 48)),
                "head.weight": np.zeros((5, 16)),
            },
        )
    with pytest.raises(ft.InputError, match=r"has no adapter_config.json"):
        ft.from_peft_lora(tmp_path)
    keys = [f"base_model.model.head.base_layer.lora_{side}.weight" for side in "AB"]
    save(tmp_path / "bias" / "adapter_model.safetensors", dict(zip(keys, (np.ones((1, 16)), np.ones((5, 1))))))
    with pytest.raises(ft.InputError, match=r"'head.base_layer' adapts a parameter by name, which cannot be converted"):
        ft.from_peft_lora(tmp_path / "bias")
    save(tmp_path / "bias" / "adapter_model.safetensors", {})
    with pytest.raises(ft.InputError, match="holds no adapter tensors"):
        ft.from_peft_lora(tmp_path / "bias")
    (tmp_path / "dora" / "adapter_model.safetensors").unlink()
    config = json.loads((tmp_path / "dora" / "adapter_config.json").read_text())
    (tmp_path / "dora" / "adapter_config.json").write_text(json.dumps({**config, "use_dora": False}))
    with pytest.raises(ft.InputError, match=r"has no adapter_model.safetensors; save the adapter as safetensors"):
        ft.from_peft_lora(tmp_path / "dora")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora_alpha": "x"}, "lora_alpha of 'head' is 'x'; a number is needed"),
        ({"rank_pattern": [], "alpha_pattern": ["head"]}, "alpha_pattern must be a table"),
        ({"alpha_pattern": {"(": 1}}, "which cannot be read"),
    ],
)
def test_damaged_configs_are_named(change: dict[str, Any], message: str, tmp_path: Path):
    saved_by_peft(tmp_path / "a", peft.LoraConfig(r=2, target_modules=["head"]))
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ft.InputError, match=message.replace("(", r"\(")):
        ft.from_peft_lora(tmp_path / "a")


UP, DOWN = np.ones((4, 2), np.float32), np.ones((2, 3), np.float32)
LORA = {"lycoris_fc.lora_up.weight": UP, "lycoris_fc.lora_down.weight": DOWN}
FC = {"fc.weight": np.zeros((4, 3))}


@pytest.mark.parametrize(
    ("file", "base", "options", "kind", "message"),
    [
        (LORA, {"gc.weight": UP}, {}, ft.InputError, "'lycoris_fc' is no weight of the base"),
        (LORA, {"fc.weight": np.zeros((4, 5))}, {}, ft.InputError, r"do not make a weight of shape \(4, 5\)"),
        (
            LORA,
            FC | {"fc.bias": np.zeros(4)},
            {"prefix": "lora_te"},
            ft.InputError,
            "no module has the prefix 'lora_te'",
        ),
        (
            {**LORA, "lora_te_fc.lora_up.weight": UP},
            FC,
            {},
            ValueError,
            "has the prefixes lora_te, lycoris; pass prefix to choose one",
        ),
        ({"fc.lora_up.weight": UP}, FC, {}, ft.InputError, "'fc' is no module of a LyCORIS or kohya file"),
        ({**LORA, "lycoris_fc.dora_scale": UP}, FC, {}, ft.InputError, "weight-decomposed"),
        ({**LORA, "lycoris_fc.diff_b": UP[:, 0]}, FC, {}, ft.InputError, "has diff_b, a change of the bias"),
        ({**LORA, "lycoris_fc.on_input": UP}, FC, {}, ft.InputError, "which is no LoRA, LoCon, LoHa, LoKr or full"),
        ({**LORA, "lycoris_fc.lora_up.weight": UP * np.nan}, FC, {}, ft.InputError, "has NaN or infinite entries"),
        ({**LORA, "lycoris_fc.lora_up.weight": UP[:, :1]}, FC, {}, ft.InputError, "do not fit each other"),
        (
            {**LORA, "lycoris_fc.lora_up.weight": UP.astype(int)},
            FC,
            {},
            ft.InputError,
            "is of type I64; floats are needed",
        ),
        ({"lycoris_fc.diff": np.ones(4)}, {"fc.weight": UP}, {}, ft.InputError, "needs two axes or more"),
        (
            {"lycoris_a_b.lora_up.weight": UP},
            {"a.b.weight": UP, "a_b.weight": UP},
            {},
            ft.InputError,
            "stands for both 'a.b.weight' and 'a_b.weight'",
        ),
    ],
)
def test_bad_lycoris_files_are_named(file: Any, base: Any, options: Any, kind: type[Exception], message: str):
    with pytest.raises(kind, match=message):
        ft.from_lycoris(file, base, **options)


def test_one_of_several_prefixes_can_be_chosen():
    file = {**LORA, **{name.replace("lycoris", "lora_te"): 2 * array for name, array in LORA.items()}}
    adapters = [ft.from_lycoris(file, FC, prefix=prefix) for prefix in ("lycoris", "lora_te")]
    assert np.array_equal(4 * adapters[0].delta("fc.weight"), adapters[1].delta("fc.weight"))


def test_a_kronecker_factor_that_divides_no_axis_is_named():
    file = {"lycoris_fc.lokr_w1": np.ones((3, 2)), "lycoris_fc.lokr_w2": np.ones((2, 2))}
    with pytest.raises(ft.InputError, match=r"fc.weight: .* 4 .* 3"):
        ft.from_lycoris(file, {"fc.weight": np.zeros((4, 6))})
    file = {"lycoris_fc.lokr_w1": np.ones((3, 2)), "lycoris_fc.lokr_w2_a": np.ones((4, 1))}
    with pytest.raises(ft.InputError, match=r"do not make a weight of shape \(6, 4\)"):  # as many numbers, other sides
        ft.from_lycoris({**file, "lycoris_fc.lokr_w2_b": np.ones((1, 1))}, {"fc.weight": np.zeros((6, 4))})


def test_8_bit_loras_keep_their_bits(tmp_path: Path):
    parts = {"lora_up.weight": torch.randn(5, 2), "lora_down.weight": torch.randn(2, 4)}
    file = {f"lora_unet_fc.{name}": value.to(torch.float8_e4m3fn) for name, value in parts.items()}
    base = {"fc.weight": np.zeros((5, 4))}
    adapter = ft.from_lycoris(save(tmp_path / "a.safetensors", file), base)
    assert adapter.dtypes["fc.weight"] == "F8_E4M3"
    again = ft.load_adapter(ft.save_adapter(tmp_path / "a", adapter))["fc.weight"]
    for ours, theirs in zip((again.factors[0], again.core), file.values(), strict=True):
        np.testing.assert_array_equal(ours, theirs.float())


def test_full_changes_and_missing_alphas():
    assert ft.from_lycoris(LORA, FC).scales["fc.weight"] == 1.0
    full = from_parts("fc", {"diff": UP}, (4, 2))
    assert np.array_equal(full.tensor.to_tensor(), UP)


def tensor(shape: tuple[int, ...] = (2, 2)) -> ft.TuckerTensor:
    return ft.TuckerTensor(np.ones((1,) * len(shape)), [np.ones((n, 1)) for n in shape])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda out: ft.to_peft_lora({}, out), "has no Tucker tensors"),
        (lambda out: ft.to_peft_lora({"in_proj": tensor()}, out), "'in_proj' is not the weight of a module"),
        (
            lambda out: ft.to_peft_lora({"a.weight": tensor()}, out, kinds={"b.weight": "embedding"}),
            "kinds has 'b.weight'",
        ),
        (
            lambda out: ft.to_peft_lora({"a.weight": tensor((2, 2, 2))}, out, kinds={"a.weight": "conv1d"}),
            "has two axes",
        ),
        (lambda out: ft.to_lycoris({"a.b.weight": tensor(), "a_b.weight": tensor()}, out), "underscores for dots"),
        (lambda out: ft.to_lycoris(ft.Adapter({"a.weight": tensor()}, whole={"b": UP}), out), "'b' is stored whole"),
        (
            lambda out: ft.to_lycoris({"a.weight": tensor()}, out, whole="no"),
            "whole is 'no'; pass one of 'error', 'skip'",
        ),
        (lambda out: convert.to_lycoris({"a.weight": tensor()}, out, adapter_name="x"), "the source is one adapter"),
        (
            lambda out: convert.to_peft_lora({"block.0.weight": tensor((12, 4, 3, 2))}, out, model=net(groups=2)),
            "has no LoRA|has no",
        ),
    ],
)
def test_what_cannot_be_written_is_named_and_nothing_is_left(call: Any, message: str, tmp_path: Path):
    with pytest.raises(ValueError, match=message):
        call(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# --- the command line --------------------------------------------------------------------------------


def test_the_command_converts_there_and_back(tmp_path: Path):
    theirs = saved_by_peft(tmp_path / "lora", CONFIGS["lora"])
    base = save(tmp_path / "base.safetensors", net().state_dict())
    a, b, c, d = (tmp_path / name for name in ("a", "b.safetensors", "c.safetensors", "d"))
    for words in (
        ("convert", tmp_path / "lora", a, "--to", "flora", "--base", base),
        ("convert", a, b, "--to", "lycoris"),
        ("convert", a, c, "--to", "kohya"),
        ("convert", c, d, "--to", "flora", "--base", base),
        ("convert", b, tmp_path / "e", "--to", "peft-lora", "--base", base, "--json"),
    ):
        done = run(*words)
        assert (done.exit_code, done.stderr) == (0, ""), done.stderr
    assert json.loads(done.stdout)["weights"][0]["name"]
    with torch.no_grad():
        for path in (a, d):
            close(attached(path)(image()), theirs)
    close(read_by_peft(tmp_path / "e"), theirs)
    assert all(key.startswith("lora_unet_") for key in safetensors.torch.load_file(c))


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["{lycoris}", "{out}", "--to", "flora"], 2, "pass base (--base)"),
        (["{official}", "{out}", "--to", "flora"], 2, "pass scale (--scale)"),
        (["{lora}", "{out}", "--to", "flora"], 3, "pass the directory"),
        (["{lycoris}", "{out}", "--to", "flora", "--base", "{official}"], 3, "no weight of the base"),
        (["{none}", "{out}", "--to", "flora"], 4, "no such file"),
        (["{lycoris}", "{out}", "--to", "gguf"], 2, "is not one of"),
        (["{empty}", "{out}", "--to", "flora"], 3, "not a flora_tensor adapter"),
    ],
)
def test_errors_of_the_command(words: list[str], code: int, message: str, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    places = {
        "lycoris": save(tmp_path / "l.safetensors", LORA),
        "official": save(tmp_path / "o.safetensors", {"model.fc.flora_layer.param_G": UP}),
        "lora": save(tmp_path / "p.safetensors", {"base_model.model.fc.lora_A.weight": DOWN}),
        "none": tmp_path / "none",
        "empty": tmp_path / "empty",
        "out": tmp_path / "out",
    }
    done = run("convert", *(word.format(**places) for word in words))
    assert (done.exit_code, done.stdout) == (code, ""), done.stderr
    assert message in done.stderr
    assert not (tmp_path / "out").exists()
