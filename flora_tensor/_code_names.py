"""What two codes call the modules of one network: diffusers, and the code that the network was published with.

The U-Net of Stable Diffusion and SDXL has the same modules in both, by other names. Flux has some of diffusers' modules
as one, in the code of Black Forest Labs: its weight has their rows, one below the other.
"""

import re
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import NamedTuple

import numpy as np

__all__ = ["Place", "naming_hint", "other_names", "rows_of"]


class Place(NamedTuple):
    """Where the rows of a module's weight are in another code: in these weights, in their order."""

    weights: tuple[str, ...]
    is_swapped: bool = False  # the two halves of the rows have changed places


def rows_of(place: Place, heights: Iterable[int]) -> list[np.ndarray | None]:
    """Return which rows of a module each weight has, given their numbers; ``None`` stands for all, as they are.

    Examples
    --------
    >>> rows_of(Place(("q", "k")), [2, 3])
    [array([0, 1]), array([2, 3, 4])]
    """
    ends = np.cumsum([0, *heights])
    if place.is_swapped:
        return [np.roll(np.arange(ends[1]), ends[1] // 2)]
    if len(place.weights) == 1:
        return [None]
    return [np.arange(low, high) for low, high in pairwise(ends)]


# By which names a code is known, with dots or underscores.
_CODES = {
    "diffusers": r"(?:(?:down|up|transformer)_blocks|single_transformer_blocks)[._]\d|mid_block[._]",
    "the original code of Stable Diffusion": r"(?:input|output)_blocks[._]\d|middle_block[._]\d",
    "the code of Black Forest Labs": r"(?:double|single)_blocks[._]\d",
}


def naming_hint(what: str, names: Iterable[str], base: Iterable[str]) -> str:
    """Say what to do where names of a file or an adapter follow another code than a base's; nothing where not.

    Examples
    --------
    >>> naming_hint("file", ["down_blocks.0.resnets.0.conv1"], ["double_blocks.0.img_attn.qkv.weight"])[:61]
    'the file has the names of diffusers, the base those of the co'
    """
    own, other = _naming_of(names), _naming_of(base)
    if own is None or other is None or own == other:
        return ""
    return f"the {what} has the names of {own}, the base those of {other}: pass the base under the names of {own}"


def _naming_of(names: Iterable[str]) -> str | None:
    """Return the code that names of modules or weights follow, if it is one of these."""
    for name in names:
        # Blocks stand at the front: inside of them, the U-Net has transformer_blocks in either code.
        found = {code: match.start() for code, p in _CODES.items() if (match := re.search(rf"(?:^|[._]){p}", name))}
        if found:
            return min(found, key=lambda code: found[code])
    return None


def other_names(modules: Iterable[str]) -> dict[str, Place]:
    """Return what the other code calls modules of the U-Net or of Flux, and where these are; nothing for others."""
    known = list(modules)
    found = {original: Place((module,)) for module, original in _original_names(known).items()}
    found |= {name: Place((module,)) for module, name in _diffusers_names(known).items()}
    return found | _flux_names(set(known))


# The names in the U-Net's original code of what diffusers names inside a residual block, and outside of all blocks.
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


def _diffusers_names(modules: Iterable[str]) -> dict[str, str]:
    """Return what diffusers calls the modules of the original U-Net: the way back of `_original_names`."""
    known = list(modules)
    changes = [int(m.split(".")[1]) for m in known if re.fullmatch(r"input_blocks\.\d+\.0\.op", m)]
    if not changes:
        return {}
    n = min(changes)  # where the size changes first: blocks of n - 1 layers and the change
    outside, resnet = ({original: name for name, original in table.items()} for table in (_OUTSIDE, _RESNET))
    found = {module: outside[module] for module in known if module in outside}
    for module in known:
        place = re.fullmatch(r"(?:(in|out)put_blocks\.(\d+)|middle_block)\.(\d+)\.(.+)", module)
        if place is None or module in outside:
            continue
        way, number, child, rest = place.groups()
        if way is None:  # a residual block, an attention, a residual block
            start, layer, is_resnet = "mid_block", int(child) // 2, child != "1"
        else:
            block, layer = divmod(int(number) - (way == "in"), n)
            start, is_resnet = f"{'down' if way == 'in' else 'up'}_blocks.{block}", child == "0"
        if rest in ("op", "conv"):
            found[module] = f"{start}.{'downsamplers' if rest == 'op' else 'upsamplers'}.0.conv"
        elif is_resnet:
            found[module] = f"{start}.resnets.{layer}.{resnet.get(rest, rest)}"
        else:
            found[module] = f"{start}.attentions.{layer}.{rest}"
    return found


# The modules of Flux in the code of Black Forest Labs, and those of diffusers that they stand for.
_FLUX_BLOCKS: Mapping[str, tuple[str, Mapping[str, tuple[str, ...]]]] = {
    "double_blocks": (
        "transformer_blocks",
        {
            "img_mod.lin": ("norm1.linear",),
            "txt_mod.lin": ("norm1_context.linear",),
            "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
            "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
            "img_attn.proj": ("attn.to_out.0",),
            "txt_attn.proj": ("attn.to_add_out",),
            "img_mlp.0": ("ff.net.0.proj",),
            "img_mlp.2": ("ff.net.2",),
            "txt_mlp.0": ("ff_context.net.0.proj",),
            "txt_mlp.2": ("ff_context.net.2",),
        },
    ),
    "single_blocks": (
        "single_transformer_blocks",
        {
            "modulation.lin": ("norm.linear",),
            "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
            "linear2": ("proj_out",),
        },
    ),
}
_FLUX_OUTSIDE = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer.linear": "proj_out",
}


def _flux_names(modules: set[str]) -> dict[str, Place]:
    """Return what the code of Black Forest Labs calls the modules of diffusers' Flux."""
    blocks = {(m.split(".")[0], m.split(".")[1]) for m in modules if re.match(r"(single_)?transformer_blocks\.\d", m)}
    if not any(start == "single_transformer_blocks" for start, _ in blocks):
        return {}
    found = {name: Place((module,)) for name, module in _FLUX_OUTSIDE.items() if module in modules}
    if "norm_out.linear" in modules:  # diffusers has the scale before the shift
        found["final_layer.adaLN_modulation.1"] = Place(("norm_out.linear",), is_swapped=True)
    for start, (own, inside) in _FLUX_BLOCKS.items():
        for number in (number for block, number in blocks if block == own):
            for name, parts in inside.items():
                weights = tuple(f"{own}.{number}.{part}" for part in parts)
                if modules.issuperset(weights):
                    found[f"{start}.{number}.{name}"] = Place(weights)
    return found
