"""What LoRA files of diffusers, kohya's tools and LyCORIS call a model's modules, and which of its weights that means.

kohya's names have underscores for dots, and begin with a word for the model of a pipeline; those for the U-Net of SDXL
count its blocks as the original code does. diffusers' names have dots, and several endings from several years. A file
may follow one code and the base another; `flora_tensor._code_names` knows both.
"""

import re
from collections.abc import Iterable, Mapping

from flora_tensor._code_names import Place, naming_hint, other_names

__all__ = [
    "DIFFUSERS_NAME",
    "FOLDERS",
    "KOHYA",
    "METADATA_KEY",
    "PEFT_PARTS",
    "BaseNames",
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


class BaseNames:
    """The weights of a base, to be found by what files call their modules."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.shapes = shapes
        self._tables: dict[str, dict[str, list[Place]]] = {}

    def places(self, prefix: str, module: str) -> list[Place]:
        """List where in the base a module can be, of the model that kohya's word ``prefix`` stands for."""
        if prefix not in self._tables:
            self._tables[prefix] = weights_by_module(self.shapes, root_of(prefix, self.shapes))
        return self._tables[prefix].get(module.replace(".", "_"), [])

    def dotted(self, module: str) -> Place | None:
        """Return where a module named with dots is, which may begin with a pipeline's folder."""
        if f"{module}.weight" in self.shapes:
            return Place((f"{module}.weight",))
        inside = [name for folder in FOLDERS if (name := f"{folder}.{module}.weight") in self.shapes]
        if inside:
            return Place((inside[0],)) if len(inside) == 1 else None
        folder, _, rest = module.partition(".")
        if folder in FOLDERS and f"{rest}.weight" in self.shapes:  # one model of the pipeline: the caller is to say so
            return None
        words = _WORDS.get(folder, ())
        places = [p for word in words or ("lora_unet",) for p in self.places(word, rest if words else module)]
        return places[0] if len(set(places)) == 1 else None

    def hint(self, modules: Iterable[str]) -> str:
        """Say what to pass instead of a base that lacks modules of a file."""
        return naming_hint("file", modules, self.shapes) or "pass the base that the file is for"


# kohya's words for what names with dots begin with: a pipeline's folder, or what ComfyUI calls the network.
_WORDS = {
    "diffusion_model": ("lora_unet",),
    "unet": ("lora_unet",),
    "transformer": ("lora_unet",),
    "text_encoder": ("lora_te", "lora_te1"),
    "text_encoder_2": ("lora_te2",),
    "text_encoder_3": ("lora_te3",),
}


def weights_by_module(shapes: Mapping[str, tuple[int, ...]], root: str) -> dict[str, list[Place]]:
    """List where a name with underscores can be, in the model whose names begin with ``root``.

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
    table: dict[str, list[Place]] = {}
    for module, name in modules.items():
        table.setdefault(module.replace(".", "_"), []).append(Place((name,)))
    for other, place in other_names(modules).items():
        weights = tuple(modules[module] for module in place.weights)
        table.setdefault(other.replace(".", "_"), []).append(place._replace(weights=weights))
    for module, name in modules.items():
        # Versions of transformers differ in whether CLIP's text encoder has this level.
        other = module.removeprefix("text_model.") if module.startswith("text_model.") else f"text_model.{module}"
        if "encoder.layers" in module:
            table.setdefault(other.replace(".", "_"), [Place((name,))])
    return table


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
