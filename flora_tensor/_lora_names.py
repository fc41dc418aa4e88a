"""What LoRA files of diffusers, kohya's tools and LyCORIS call a model's modules, and which of its weights that means.

kohya's names have underscores for dots, and begin with a word for the model of a pipeline; those for the U-Net of SDXL
count its blocks as the original code does. diffusers' names have dots, and several endings from several years.
"""

import re
from collections.abc import Iterable, Mapping

__all__ = [
    "DIFFUSERS_NAME",
    "FOLDERS",
    "KOHYA",
    "METADATA_KEY",
    "PEFT_PARTS",
    "dotted_part",
    "kohya_prefix",
    "root_of",
    "weights_by_module",
]

# What diffusers calls a file of LoRAs, and the config in it.
DIFFUSERS_NAME, METADATA_KEY = "pytorch_lora_weights.safetensors", "lora_adapter_metadata"

# What may stand before the names of a model in a checkpoint of several: a pipeline's folder, or, in the single file of
# the original code, its attribute. The model alone has none of them.
_ROOTS = {
    "lycoris": (),
    "lora_unet": ("unet.", "model.diffusion_model.", "transformer."),
    "lora_transformer": ("transformer.",),
    "lora_te1": ("text_encoder.", "conditioner.embedders.0.transformer."),
    "lora_te2": ("text_encoder_2.",),
    "lora_te3": ("text_encoder_3.",),
    "lora_te": ("text_encoder.", "cond_stage_model.transformer."),
}
KOHYA = tuple(_ROOTS)
# The folders of pipelines whose models LoRAs are trained for.
FOLDERS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")


def root_of(prefix: str, names: Iterable[str]) -> str:
    """Return what stands before a model's own names in a checkpoint, for the word that kohya has for the model.

    Examples
    --------
    >>> root_of("lora_te", ["unet.conv_in.weight", "text_encoder.fc.weight"]), root_of("lora_unet", ["conv_in.weight"])
    ('text_encoder.', '')
    """
    table = list(names)
    return next((root for root in _ROOTS.get(prefix, ()) if any(name.startswith(root) for name in table)), "")


def kohya_prefix(folder: str, folders: Iterable[str]) -> str:
    """Return kohya's word for the model in a pipeline's folder; a first text encoder has a number where there are more.

    Examples
    --------
    >>> kohya_prefix("unet", ["unet"]), kohya_prefix("text_encoder", ["text_encoder", "text_encoder_2"])
    ('lora_unet', 'lora_te1')
    """
    if folder == "text_encoder":
        return "lora_te1" if any(other.startswith("text_encoder_") for other in folders) else "lora_te"
    return {"unet": "lora_unet", "transformer": "lora_transformer"}.get(folder, f"lora_te{folder[-1:]}")


def weights_by_module(shapes: Mapping[str, tuple[int, ...]], root: str) -> dict[str, list[str]]:
    """List the weights that a name with underscores can mean, of the model whose names begin with ``root``.

    Examples
    --------
    >>> table = weights_by_module({"unet.down_blocks.0.resnets.0.conv1.weight": (2, 2)}, "unet.")
    >>> list(table)
    ['down_blocks_0_resnets_0_conv1', 'input_blocks_1_0_in_layers_2']
    """
    modules = {
        name.removeprefix(root).removesuffix(".weight"): name
        for name, shape in shapes.items()
        if name.startswith(root) and name.endswith(".weight") and len(shape) >= 2
    }
    table: dict[str, list[str]] = {}
    for module, name in modules.items():
        table.setdefault(module.replace(".", "_"), []).append(name)
    for module, original in _original_names(modules).items():
        table.setdefault(original.replace(".", "_"), []).append(modules[module])
    for module, name in modules.items():
        # Versions of transformers differ in whether CLIP's text encoder has this level.
        other = module.removeprefix("text_model.") if module.startswith("text_model.") else f"text_model.{module}"
        if "encoder.layers" in module:
            table.setdefault(other.replace(".", "_"), [name])
    return table


# The names in SDXL's original code of what diffusers names inside a residual block, and outside of all blocks.
_RESNET = {
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}


def _original_names(modules: Iterable[str]) -> dict[str, str]:
    """Return what the original code of Stable Diffusion calls the modules of diffusers' U-Net; nothing for others.

    It counts what diffusers keeps in blocks of L layers and a change of size: the l-th layer of the b-th block of the
    way down is its input block 1 + b (L + 1) + l, on the way up, where blocks have L + 1 layers, its output block
    b (L + 1) + l.
    """
    known = list(modules)
    n = len({m.split(".")[3] for m in known if m.startswith("down_blocks.0.resnets.")}) + 1
    if n == 1:
        return {}
    with_attention = {m.split(".")[1] for m in known if m.startswith("up_blocks.") and ".attentions." in m}
    found = {module: _OUTSIDE[module] for module in known if module in _OUTSIDE}
    for module in known:
        if place := re.fullmatch(r"(?:(down|up)_blocks\.(\d+)|mid_block)\.(\w+)\.(\d+)\.(.+)", module):
            way, block, kind, layer, rest = place.groups()
            first, k = n * int(block or 0), int(layer)
            if kind not in ("resnets", "attentions", "downsamplers", "upsamplers"):
                continue
            if way is None:
                start = f"middle_block.{2 * k if kind == 'resnets' else 1}"
            elif kind == "downsamplers":
                start, rest = f"input_blocks.{first + n}.0", "op"
            elif kind == "upsamplers":
                start = f"output_blocks.{first + n - 1}.{1 + (block in with_attention)}"
            else:
                block_name = f"input_blocks.{1 + first + k}" if way == "down" else f"output_blocks.{first + k}"
                start = f"{block_name}.{int(kind == 'attentions')}"
            found[module] = f"{start}.{_RESNET.get(rest, rest) if kind == 'resnets' else rest}"
    return found


# The parts of a module in PEFT's files, as a regular expression; those of LyCORIS are named alike but for LoRA.
PEFT_PARTS = r"lora_[AB]\.weight|lora_embedding_[AB]|hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t2)"
_PARTS = rf"{PEFT_PARTS}|lora_(?:down|up|mid)\.weight|alpha"


def dotted_part(key: str) -> tuple[str, str] | None:
    """Return the module and the part of it that a key of a LoRA with dots names, as PEFT or LyCORIS call it.

    Examples
    --------
    >>> dotted_part("unet.mid_block.attn.to_q.lora.down.weight")
    ('unet.mid_block.attn.to_q', 'lora_down.weight')
    >>> dotted_part("attn1.processor.to_out_lora.up.weight"), dotted_part("fc.bias")
    (('attn1.to_out.0', 'lora_up.weight'), None)
    """
    if found := re.fullmatch(r"(.+)\.processor\.(to_[a-z]+)_lora\.(down|up)\.weight", key):
        attention, layer, side = found.groups()
        return f"{attention}.{'to_out.0' if layer == 'to_out' else layer}", f"lora_{side}.weight"
    if found := re.fullmatch(r"(.+)\.(?:lora|lora_linear_layer)\.(down|up)\.weight", key):
        return found[1], f"lora_{found[2]}.weight"
    if found := re.fullmatch(rf"(.+)\.({_PARTS})", key):
        return found[1], found[2]
    return None
