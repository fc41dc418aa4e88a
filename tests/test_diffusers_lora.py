"""LoRAs of diffusers and kohya for the models of a pipeline; PEFT, which diffusers calls, makes and reads them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import safetensors
import torch
from peft.tuners.lora import LoraLayer
from torch import nn

import flora_tensor as ft
import flora_torch
from checkpoints import load, run, save, save_pipeline
from flora_tensor._code_names import Place
from flora_tensor._lora_names import weights_by_module
from support import tolerance

NAME, KEY = "pytorch_lora_weights.safetensors", "lora_adapter_metadata"


class UNet(nn.Module):
    """Two modules by the names that they have in diffusers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, 6, 3)
        self.mid_block = nn.ModuleDict({"to_out": nn.ModuleList([nn.Linear(6, 6)])})


def models() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    text = nn.ModuleDict({"encoder": nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(5, 4)])})})
    return {"unet": UNet(), "text_encoder": nn.ModuleDict({"text_model": text})}


CONFIGS = {
    "unet": {"r": 2, "lora_alpha": 3, "target_modules": ["conv_in", "to_out.0"], "rank_pattern": {"conv_in": 3}},
    "text_encoder": {"r": 2, "lora_alpha": 5, "target_modules": ["layers.0"], "use_rslora": True},
}


def pipeline(path: Path) -> Path:
    return save_pipeline(path, *(model.state_dict() for model in models().values()))


def trained() -> tuple[dict[str, torch.Tensor], dict[str, Any], dict[str, torch.Tensor]]:
    """Return what diffusers writes of two models with PEFT's LoRAs: tensors, configs, and the changes meant."""
    stored: dict[str, torch.Tensor] = {}
    noted: dict[str, Any] = {}
    changes: dict[str, torch.Tensor] = {}
    for folder, model in models().items():
        config = peft.LoraConfig(**CONFIGS[folder], init_lora_weights=False)
        peft.inject_adapter_in_model(config, model)
        stored |= {f"{folder}.{name}": value for name, value in peft.get_peft_model_state_dict(model).items()}
        noted |= {f"{folder}.{key}": value for key, value in config.to_dict().items()}
        for name, module in model.named_modules():
            if isinstance(module, LoraLayer):
                changes[f"{folder}.{name}.weight"] = module.get_delta_weight("default").detach()
    return stored, {k: sorted(v) if isinstance(v, set) else v for k, v in noted.items()}, changes


def check(adapter: ft.Adapter, changes: dict[str, torch.Tensor], start: str = "") -> None:
    assert {start + name for name in adapter} == {name for name in changes if name.startswith(start)}
    for name in adapter:
        expected = changes[start + name].numpy()
        atol = tolerance("float32", 3, norm=np.abs(expected).max())  # sums of as many products as the rank
        np.testing.assert_allclose(adapter.delta(name, dtype=np.float64), expected, atol=atol)


def test_a_file_of_a_pipeline_keeps_the_scales_of_its_configs(tmp_path: Path):
    stored, noted, changes = trained()
    file = save(tmp_path / "lora" / NAME, stored, {"format": "pt", KEY: json.dumps(noted)})
    base = pipeline(tmp_path / "base")
    for source in (file, file.parent):
        check(ft.convert_adapter(source, base=base), changes)
    check(ft.from_diffusers(file), changes)
    check(ft.from_diffusers(file, base=base / "unet", prefix="unet"), changes, "unet.")


def test_a_file_of_one_model_finds_it_in_the_pipeline(tmp_path: Path):
    stored, noted, changes = trained()
    own, config = ({k.removeprefix("unet."): v for k, v in t.items() if k.startswith("unet.")} for t in (stored, noted))
    file = save(tmp_path / NAME, own, {KEY: json.dumps(config)})
    check(ft.from_diffusers(file, base=pipeline(tmp_path / "base") / "unet"), changes, "unet.")
    check(ft.from_diffusers(file, base=tmp_path / "base"), {k: v for k, v in changes.items() if k.startswith("unet.")})


@pytest.mark.parametrize("ending", ["lora.{}.weight", "lora_linear_layer.{}.weight", "lora_{}.weight"])
def test_endings_of_older_versions_and_alphas_are_read(ending: str, tmp_path: Path):
    up, down = torch.randn(6, 2), torch.randn(2, 6)
    module = "unet.mid_block.to_out.0"
    file = {f"{module}.{ending.format('up')}": up, f"{module}.{ending.format('down')}": down}
    base = pipeline(tmp_path / "base")
    check(ft.from_diffusers(file, base=base), {f"{module}.weight": up @ down})  # without α the scale is one
    check(ft.from_diffusers({**file, f"{module}.alpha": torch.tensor(1)}), {f"{module}.weight": up @ down / 2})
    processor = {
        f"unet.a.processor.to_{n}_lora.{s}.weight": t for n in ("q", "out") for s, t in (("up", up), ("down", down))
    }
    assert set(ft.from_diffusers(processor)) == {"unet.a.to_q.weight", "unet.a.to_out.0.weight"}


def test_what_we_write_is_read_by_peft_as_diffusers_calls_it(tmp_path: Path):
    stored, noted, changes = trained()
    file = save(tmp_path / NAME, stored, {KEY: json.dumps(noted)})
    out = ft.to_diffusers(ft.from_diffusers(file), tmp_path / "out")
    with safetensors.safe_open(out / NAME, "pt") as opened:
        config: dict[str, Any] = json.loads(opened.metadata()[KEY])
    written = load(out / NAME)
    for folder, model in models().items():
        own, options = (
            {k.removeprefix(f"{folder}."): v for k, v in table.items() if k.startswith(f"{folder}.")}
            for table in (written, config)
        )
        peft.inject_adapter_in_model(peft.LoraConfig(**options), model)
        assert not peft.set_peft_model_state_dict(model, own).unexpected_keys
        for name, module in model.named_modules():
            if isinstance(module, LoraLayer):
                expected = changes[f"{folder}.{name}.weight"]
                torch.testing.assert_close(module.get_delta_weight("default"), expected)
    with pytest.raises(FileExistsError, match="the directory exists; choose another one, or pass overwrite=True"):
        ft.to_diffusers(ft.from_diffusers(file), out)
    assert set(written) == set(stored)  # a LoRA's factors come back as they were
    assert all(torch.equal(written[name], stored[name]) for name in stored)


def test_an_adapter_of_a_pipeline_goes_onto_its_models(tmp_path: Path):
    stored, noted, changes = trained()
    file = save(tmp_path / NAME, stored, {KEY: json.dumps(noted)})
    parts = nn.ModuleDict(models())
    flora_torch.attach_adapter(parts, ft.from_diffusers(file))
    merged = flora_torch.merge(parts).state_dict()
    for name, change in changes.items():
        expected = nn.ModuleDict(models()).state_dict()[name] + change
        torch.testing.assert_close(merged[name], expected)


# kohya's files --------------------------------------------------------------------------------------------------------


def kohya(stored: dict[str, torch.Tensor], noted: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Write the same LoRAs as kohya's tools do."""
    words = {"unet": "lora_unet", "text_encoder": "lora_te"}
    file: dict[str, torch.Tensor] = {}
    for key, value in stored.items():
        module, side = key.removesuffix(".weight").rsplit(".lora_", 1)
        folder, _, rest = module.partition(".")
        name = f"{words[folder]}_{rest.replace('.', '_')}"
        file[f"{name}.lora_{'down' if side == 'A' else 'up'}.weight"] = value
        if side == "A":
            root = value.shape[0] ** 0.5 if noted[f"{folder}.use_rslora"] else 1
            file[f"{name}.alpha"] = torch.tensor(noted[f"{folder}.lora_alpha"] * root)
    return file


def test_a_kohya_file_of_several_models_is_converted_by_the_pipeline(tmp_path: Path):
    stored, noted, changes = trained()
    file = kohya(stored, noted)
    base = pipeline(tmp_path / "base")
    check(ft.from_lycoris(file, base), changes)
    check(ft.from_lycoris(file, base / "unet", prefix="lora_unet"), changes, "unet.")
    check(ft.from_lycoris(file, base, prefix="lora_te"), {k: v for k, v in changes.items() if k.startswith("text")})
    with pytest.raises(
        ValueError, match=r"has the prefixes lora_te, lora_unet; pass prefix .* the pipeline's directory"
    ):
        ft.from_lycoris(file, base / "unet")
    # And back, by the words for the folders.
    out = ft.to_lycoris(ft.from_lycoris(file, base), tmp_path / "k.safetensors", prefix=None)
    assert set(load(out)) == set(file)
    check(ft.from_lycoris(out, base), changes)


def test_the_single_file_of_the_original_code_is_a_base_too():
    up, down = np.ones((4, 1), np.float32), np.ones((1, 3), np.float32)
    base = {"model.diffusion_model.input_blocks.4.1.proj_in.weight": np.zeros((4, 3))}
    base["cond_stage_model.transformer.text_model.encoder.layers.0.fc1.weight"] = np.zeros((4, 3))
    file = {}
    for name in ("lora_unet_input_blocks_4_1_proj_in", "lora_te_text_model_encoder_layers_0_fc1"):
        file |= {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}
    assert set(ft.from_lycoris(file, base)) == set(base)


def test_names_of_the_original_code_mean_the_modules_of_diffusers():
    """Pairs of names as they stand in the published files of SDXL."""
    pairs = {
        "conv_in": "input_blocks.0.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "down_blocks.0.resnets.0.conv1": "input_blocks.1.0.in_layers.2",
        "down_blocks.0.resnets.1.time_emb_proj": "input_blocks.2.0.emb_layers.1",
        "down_blocks.0.downsamplers.0.conv": "input_blocks.3.0.op",
        "down_blocks.1.attentions.0.blocks.0.attn1.to_q": "input_blocks.4.1.blocks.0.attn1.to_q",
        "down_blocks.2.resnets.0.conv_shortcut": "input_blocks.7.0.skip_connection",
        "down_blocks.2.attentions.1.proj_in": "input_blocks.8.1.proj_in",
        "mid_block.resnets.0.conv2": "middle_block.0.out_layers.3",
        "mid_block.attentions.0.proj_out": "middle_block.1.proj_out",
        "mid_block.resnets.1.conv1": "middle_block.2.in_layers.2",
        "up_blocks.0.resnets.0.conv1": "output_blocks.0.0.in_layers.2",
        "up_blocks.0.attentions.2.proj_in": "output_blocks.2.1.proj_in",
        "up_blocks.0.upsamplers.0.conv": "output_blocks.2.2.conv",
        "up_blocks.2.resnets.2.conv_shortcut": "output_blocks.8.0.skip_connection",
        "conv_out": "out.2",
    }
    # Files of either naming fit bases of either: a folder of diffusers, and the single file of the original code.
    for root, names in (("", pairs), ("model.diffusion_model.", pairs.values())):
        table = weights_by_module({f"{root}{module}.weight": (2, 2) for module in names}, root)
        for name, module, original in zip(names, pairs, pairs.values()):
            place = Place((f"{root}{name}.weight",))
            assert table[original.replace(".", "_")] == table[module.replace(".", "_")] == [place]


def test_a_dotted_lora_of_diffusers_is_for_the_single_file_of_the_original_code():
    roots = {"unet": "model.diffusion_model.", "text_encoder": "cond_stage_model.transformer."}
    modules = {"unet": "down_blocks.0.resnets.0.conv1", "text_encoder": "text_model.encoder.layers.0.fc1"}
    own = {"unet": "input_blocks.1.0.in_layers.2", "text_encoder": "text_model.encoder.layers.0.fc1"}
    base = {f"{roots[folder]}{own[folder]}.weight": np.zeros((4, 3), np.float32) for folder in roots}
    base["model.diffusion_model.input_blocks.3.0.op.weight"] = np.zeros((4, 4, 3, 3), np.float32)
    file = {}
    for folder, module in modules.items():
        parts = {"lora_B.weight": np.ones((4, 2), np.float32), "lora_A.weight": np.ones((2, 3), np.float32)}
        file |= {f"{folder}.{module}.{part}": array for part, array in parts.items()}
    assert set(ft.from_diffusers(file, base=base)) == {f"{roots[f]}{own[f]}.weight" for f in roots}


def test_two_modules_of_one_weight_are_refused():
    parts = {"lora_B.weight": np.ones((4, 2), np.float32), "lora_A.weight": np.ones((2, 3), np.float32)}
    starts = ("unet.down_blocks.0.resnets.0.conv1", "diffusion_model.input_blocks.1.0.in_layers.2")
    file = {f"{start}.{part}": array for start in starts for part, array in parts.items()}
    names = ("input_blocks.1.0.in_layers.2", "input_blocks.3.0.op")
    base = {f"model.diffusion_model.{name}.weight": np.zeros((4, 3), np.float32) for name in names}
    with pytest.raises(ft.InputError, match=r"two modules change 'model\.diffusion_model\.input_blocks\.1"):
        ft.from_diffusers(file, base=base)


def test_text_encoders_match_with_and_without_the_level_that_versions_differ_in():
    for module in ("text_model.encoder.layers.0.fc1", "encoder.layers.0.fc1"):
        table = weights_by_module({f"text_encoder.{module}.weight": (2, 2)}, "text_encoder.")
        assert table["encoder_layers_0_fc1"] == table["text_model_encoder_layers_0_fc1"]


def flux(code: str) -> dict[str, np.ndarray]:
    """Weights of a Flux of one block of each kind, by the names of Black Forest Labs or of diffusers."""
    names = {
        "bfl": {
            "img_in": (4, 3),
            "double_blocks.0.img_mod.lin": (24, 4),
            "double_blocks.0.img_attn.qkv": (12, 4),
            "double_blocks.0.txt_attn.qkv": (12, 4),
            "double_blocks.0.txt_mlp.2": (4, 8),
            "single_blocks.0.linear1": (20, 4),
            "single_blocks.0.linear2": (4, 12),
            "final_layer.adaLN_modulation.1": (8, 4),
        },
        "diffusers": {
            "x_embedder": (4, 3),
            "transformer_blocks.0.norm1.linear": (24, 4),
            **{f"transformer_blocks.0.attn.{part}": (4, 4) for part in ("to_q", "to_k", "to_v")},
            **{f"transformer_blocks.0.attn.add_{part}_proj": (4, 4) for part in "qkv"},
            "transformer_blocks.0.ff_context.net.2": (4, 8),
            **{f"single_transformer_blocks.0.attn.{part}": (4, 4) for part in ("to_q", "to_k", "to_v")},
            "single_transformer_blocks.0.proj_mlp": (8, 4),
            "single_transformer_blocks.0.proj_out": (4, 12),
            "norm_out.linear": (8, 4),
        },
    }[code]
    return {f"{name}.weight": np.zeros(shape, np.float32) for name, shape in names.items()}


def test_a_flux_lora_with_the_names_of_its_makers_is_for_the_model_of_diffusers(tmp_path: Path):
    """Names, the order of rows and the exchanged halves as diffusers' converter of the published weights has them."""
    rng = np.random.default_rng(0)
    kohya, dotted, changes = dict[str, Any](), dict[str, Any](), dict[str, Any]()
    for name, weight in flux("bfl").items():
        module = name.removesuffix(".weight")
        up, down = (rng.standard_normal(s).astype(np.float32) for s in ((len(weight), 2), (2, weight.shape[1])))
        changes[module] = up @ down / 2
        parts = {"lora_up.weight": up, "lora_down.weight": down, "alpha": np.array(1, np.float32)}
        kohya |= {f"lora_unet_{module.replace('.', '_')}.{part}": array for part, array in parts.items()}
        dotted |= {f"diffusion_model.{module}.{part}": array for part, array in parts.items()}
    double, single = "transformer_blocks.0", "single_transformer_blocks.0"
    q, k, v = np.split(changes["double_blocks.0.img_attn.qkv"], 3)
    context = np.split(changes["double_blocks.0.txt_attn.qkv"], 3)
    shift, scale = np.split(changes["final_layer.adaLN_modulation.1"], 2)
    expected = {
        "x_embedder": changes["img_in"],
        f"{double}.norm1.linear": changes["double_blocks.0.img_mod.lin"],
        **{f"{double}.attn.{part}": rows for part, rows in zip(("to_q", "to_k", "to_v"), (q, k, v))},
        **{f"{double}.attn.add_{part}_proj": rows for part, rows in zip("qkv", context)},
        f"{double}.ff_context.net.2": changes["double_blocks.0.txt_mlp.2"],
        f"{single}.attn.to_q": changes["single_blocks.0.linear1"][:4],
        f"{single}.attn.to_k": changes["single_blocks.0.linear1"][4:8],
        f"{single}.attn.to_v": changes["single_blocks.0.linear1"][8:12],
        f"{single}.proj_mlp": changes["single_blocks.0.linear1"][12:],
        f"{single}.proj_out": changes["single_blocks.0.linear2"],
        "norm_out.linear": np.concatenate([scale, shift]),
    }
    expected = {f"transformer.{module}.weight": change for module, change in expected.items()}
    base = {f"transformer.{name}": weight for name, weight in flux("diffusers").items()}
    for adapter in (ft.from_lycoris(kohya, base), ft.from_diffusers(dotted, base=base)):
        assert set(adapter) == set(base)
        for name, change in expected.items():
            # The same rows and columns are multiplied, in blocks of other sizes.
            limit = tolerance("float32", 2, norm=float(np.linalg.norm(change)))
            assert np.abs(adapter.scales[name] * adapter[name].to_tensor() - change).max() <= limit
    assert set(ft.from_lycoris(kohya, flux("bfl"))) == set(flux("bfl"))


def test_names_of_another_code_are_told(tmp_path: Path):
    up, down = np.ones((4, 1), np.float32), np.ones((1, 4), np.float32)
    start = "transformer_blocks.0.attn.to_q"
    file = {f"transformer.{start}.lora_B.weight": up, f"transformer.{start}.lora_A.weight": down}
    told = (
        "has the names of diffusers, the base those of the code of Black Forest Labs: pass the base under the names of"
    )
    with pytest.raises(
        ft.InputError, match=f"the base has no 'transformer.{start}.weight'.*; the file {told} diffusers"
    ):
        ft.from_diffusers(file, base=flux("bfl"))
    file = {f"lora_unet_{start.replace('.', '_')}.lora_{k}.weight": a for k, a in (("up", up), ("down", down))}
    with pytest.raises(ft.InputError, match=f"is no weight of the base; the file {told}"):
        ft.from_lycoris(file, flux("bfl"))
    base = save(tmp_path / "base.safetensors", flux("bfl"))
    change = ft.TuckerTensor(np.ones((1, 1)), [np.ones((4, 1)), np.ones((4, 1))])
    with pytest.raises(ft.InputError, match=f"lacks '{start}.weight', which the adapter changes; the adapter {told}"):
        ft.merge_checkpoint(base, {f"{start}.weight": change}, tmp_path / "out.safetensors")


def test_a_lokr_of_fused_weights_is_refused():
    parts = {"lokr_w1": np.ones((2, 2), np.float32), "lokr_w2": np.ones((6, 2), np.float32)}
    file = {f"lora_unet_double_blocks_0_img_attn_qkv.{part}": array for part, array in parts.items()}
    with pytest.raises(
        ft.InputError, match=r"attn.to_q.weight: part of a LoKr's weight, .*; pass the base as the code"
    ):
        ft.from_lycoris(file, flux("diffusers"))


# Errors and the command -----------------------------------------------------------------------------------------------


DOWN = {
    "unet.mid_block.to_out.0.lora_A.weight": np.ones((2, 6)),
    "unet.mid_block.to_out.0.lora_B.weight": np.ones((6, 2)),
}


@pytest.mark.parametrize(
    ("tensors", "noted", "options", "message"),
    [
        ({**DOWN, "unet.a.lora_magnitude_vector": np.ones(2)}, {}, {}, "DoRA's change depends on the base weight"),
        (DOWN, {"unet.use_dora": True}, {}, "use_dora: DoRA's change"),
        (DOWN, {"peft_type": "FLORA"}, {}, "a FLoRA that diffusers saved, .* save it with flora_torch.save_adapter"),
        ({**DOWN, "unet.bias": np.ones(2)}, {}, {}, "'unet.bias': no part of a LoRA"),
        (DOWN, {}, {"prefix": "text_encoder"}, "holds no LoRA of 'text_encoder'"),
        (DOWN, {}, {"base": {"mid_block.to_out.0.weight": np.ones((6, 6))}}, r"pass prefix='unet' \(--prefix\)"),
        (
            DOWN,
            {},
            {"base": {"other.weight": np.ones((6, 6))}},
            "has no 'unet.mid_block.* pass the base that the file is for",
        ),
    ],
)
def test_bad_files_of_diffusers_are_named(tensors: Any, noted: Any, options: Any, message: str, tmp_path: Path):
    file = save(tmp_path / NAME, tensors, {KEY: json.dumps(noted)} if noted else None)
    with pytest.raises(ft.InputError, match=message):
        ft.from_diffusers(file, **options)


def test_a_flora_that_diffusers_saved_is_named_by_the_command_too(tmp_path: Path):
    tensors = {"mid_block.to_out.0.tucker_update.core": np.ones((1, 1))}
    file = save(tmp_path / NAME, tensors, {KEY: json.dumps({"peft_type": "FLORA"})})
    done = run("convert", file, tmp_path / "out", "--to", "flora")
    assert done.exit_code == 3
    assert "save it with flora_torch.save_adapter" in done.stderr


def test_what_diffusers_has_no_place_for_is_refused(tmp_path: Path):
    tensor = ft.TuckerTensor(np.ones((1, 1)), [np.ones((2, 1)), np.ones((3, 1))])
    adapter = ft.Adapter({"fc.weight": tensor}, whole={"fc.bias": np.ones(2)})
    with pytest.raises(
        ValueError, match=r"to_diffusers: 'fc\.bias' is stored whole, which the format has no place for"
    ):
        ft.to_diffusers(adapter, tmp_path / "out")
    with pytest.raises(ValueError, match="to_diffusers: whole is 'no'; pass one of 'error', 'skip'"):
        ft.to_diffusers(adapter, tmp_path / "out", whole="no")  # type: ignore[arg-type]
    ft.to_diffusers(adapter, tmp_path / "out", whole="skip")
    assert set(load(tmp_path / "out" / NAME)) == {"fc.lora_A.weight", "fc.lora_B.weight"}


def test_the_command_converts_between_diffusers_and_kohya(tmp_path: Path):
    stored, noted, changes = trained()
    save(tmp_path / "lora" / NAME, stored, {KEY: json.dumps(noted)})
    base = pipeline(tmp_path / "base")
    for words in (
        ("convert", tmp_path / "lora", tmp_path / "a", "--to", "flora", "--base", base),
        ("convert", tmp_path / "a", tmp_path / "k.safetensors", "--to", "kohya"),
        ("convert", tmp_path / "k.safetensors", tmp_path / "d", "--to", "diffusers", "--base", base),
    ):
        done = run(*words)
        assert (done.exit_code, done.stderr) == (0, ""), done.stderr
    check(ft.from_diffusers(tmp_path / "d" / NAME), changes)
