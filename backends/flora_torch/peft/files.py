"""Between what a PEFT model holds and what an adapter file holds, which is that of `flora_tensor.adapter_file`.

A file names weights as the model does without any adapter, leaves the adapter's name out, and its config says of each
weight what the tensors do not. PEFT asks for the tensors when it saves, and gives them back when it loads.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from flora_tensor import Adapter, Arrangement, TuckerTensor, select_slice
from flora_tensor._adapter_config import config_of
from flora_tensor._adapter_keys import PREFIX as ROOT
from flora_tensor._adapter_keys import split_key, tensor_parts
from flora_tensor.magnitudes import channel_count
from flora_tensor.stacking import member_arrangement
from flora_torch.base_check import check_layer, check_samples
from flora_torch.base_weight import adaptable
from flora_torch.initialize import default_dtype, random_start
from flora_torch.inventory import WHOLE, replace_whole, tensors_by_name, updates_by_weight
from flora_torch.layers import FloraParameter
from flora_torch.loading import noted_settings
from flora_torch.model_weights import Site, places, sites
from flora_torch.patterns import near
from flora_torch.peft.config import FloraConfig
from flora_torch.peft.layers import FloraTunerLayer
from flora_torch.peft.registration import PREFIX
from flora_torch.saving import notes_of
from flora_torch.update import DROPOUTS, TuckerUpdate

__all__ = [
    "check_file",
    "check_injectable",
    "checkpoint_key",
    "describe",
    "file_update",
    "fitted_state",
    "stored_state",
    "without_layers",
]


def checkpoint_key(key: str, adapter_name: str) -> str:
    """Return the key in the file of a tensor of the model.

    Examples
    --------
    >>> checkpoint_key("base_model.model.attn.base_layer.out_proj.tucker_update.default.core", "default")
    'base_model.model.attn.out_proj.tucker_update.core'
    >>> checkpoint_key("base_model.model.attn.tucker_update.default.in_proj_weight.core", "default")
    'base_model.model.attn.tucker_update.in_proj_weight.core'
    >>> checkpoint_key("base_model.model.fc.base_layer.bias", "default")
    'base_model.model.fc.bias'
    """
    head, mark, tail = key.partition(f".{PREFIX}.{adapter_name}.")
    if mark:
        # A weight that is called so is never spelled out.
        return f"{without_layers(head)}.{PREFIX}.{tail.removeprefix('weight.')}"
    # A copy of a frozen embedding, which PEFT puts beside the adapter, keeps the name that tells it apart.
    return without_layers(key) if key.endswith("bias") else key


def without_layers(key: str) -> str:
    """Return a name in the model without the layers of ours around a module."""
    return ".".join(word for word in key.split(".") if word != "base_layer")


# --- reading: what a file's config says ---------------------------------------------------------------


def check_file(config: FloraConfig, model: nn.Module) -> None:
    """Refuse a model that a file is not for, before anything is changed.

    Raises
    ------
    ValueError
        If the model lacks a weight or tensor, or one is of another shape or belongs to another kind of layer.

    Warns
    -----
    FloraWarning
        If its weights have other values than those that the adapter was made for.
    """
    table, notes = sites(model), Adapter({}, config=config.to_dict())
    for name, stored in config.file_weights.items():
        if name not in table:
            raise ValueError(
                f"FloraConfig: the file changes {name!r}, which the model does not have{near(name, table)}"
            )
        shape, own = config.tables.shapes.get(stored), tuple(table[name].weight.shape)
        if shape is not None and (shape[1:] if stored != name else shape) != own:
            raise ValueError(
                f"FloraConfig: {name!r} is of shape {own} in the model and {shape} in the file; load the adapter of "
                "this model"
            )
        check_layer("FloraConfig", notes, name, table[name])
    check_samples("FloraConfig", notes, table, "warn")
    if config.resized:
        raise ValueError(
            f"FloraConfig: the file gives {min(config.resized)!r} more rows, which PEFT cannot; merge it with "
            "flora_tensor.merge_checkpoint"
        )
    known = tensors_by_name(model)
    for name in config.whole:
        # Those of modules that PEFT saves whole itself have a copy for each adapter.
        if name not in known and not config.modules_to_save:
            raise ValueError(
                f"FloraConfig: the file replaces {name!r}, which the model does not have{near(name, known)}"
            )


def check_injectable(config: FloraConfig) -> None:
    """Refuse to put a file's adapter on a model whose tensors others will load, by their names in the file alone.

    Raises
    ------
    ValueError
        If it replaces tensors whole, other than those of ``modules_to_save``, or has stacks.
    """
    aside = tuple(f".{name}." for name in config.modules_to_save or ())
    whole = [name for name in config.whole if not any(part in f".{name}" for part in aside)]
    if whole or config.stacks:
        what = f"replaces {whole[0]!r} whole" if whole else f"has the stack {min(config.stacks)!r}"
        raise ValueError(
            f"FloraConfig: the file {what}, which PeftModel.from_pretrained and flora_torch.load_adapter can load, and "
            "load_adapter of a transformers model or inject_adapter_in_model cannot"
        )


def file_update(config: FloraConfig, site: Site) -> TuckerUpdate:
    """Make an update of the form that a file has, to be filled with its tensors.

    A mode of full rank has no factor. Two tensors that are subtracted (a start) are one of twice the ranks, as stored.

    Raises
    ------
    ValueError
        If the weight cannot be adapted, or is arranged in a way that it cannot be.
    """
    name, holder = site.name, site.holders[0]
    weight = adaptable(f"FloraConfig: {name}", holder.module, holder.parameter, values=False)
    tables, stored = config.tables, config.file_weights[name]
    ranks, arrangement = tables.ranks[stored], tables.arrangements.get(stored)
    if stored != name:
        ranks, arrangement = ranks[1:], None if arrangement is None else member_arrangement(arrangement)
    arrangement = arrangement or Arrangement.native(weight.dim())
    shape = arrangement.shape(tuple(weight.shape))
    trained, chances = noted_settings(vars(config), name, site)
    dtype = trained or default_dtype(weight.dtype)
    # Ranks that were not chosen here may exceed the sizes, which orthonormal columns cannot.
    preset = "orthonormal" if all(r <= n for r, n in zip(ranks, shape)) else "peft"
    given = [None if r == n else r for r, n in zip(ranks, shape, strict=True)]
    tucker = random_start(shape, given, preset, dtype=dtype, device=weight.device)
    options: dict[str, Any] = {**chances}
    if name in tables.channels:
        channels = options["channels"] = tables.channels[name]
        size = channel_count(tuple(weight.shape), *channels)
        options["magnitude"] = torch.ones(size, dtype=torch.promote_types(dtype, torch.float32), device=weight.device)
    scale = tables.scales.get(stored, config.scale)
    return TuckerUpdate(tucker, tuple(weight.shape), arrangement=arrangement, scale=scale, **options)


# --- reading: the tensors -----------------------------------------------------------------------------


def fitted_state(
    model: nn.Module, config: FloraConfig, adapter_name: str, state_dict: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return a file's tensors under the names that they have in the model, whose updates are given the file's form.

    Tensors that the file has whole take the places of the model's own, which come back when the adapter is off.
    """
    parts, rest = _sorted(state_dict)
    for name, members in config.tables.stacks.items():
        if name in parts:
            joint = _tucker(parts.pop(name))
            parts |= {member: _parts(select_slice(joint, 0, k)) for k, member in enumerate(members)}
    result: dict[str, Tensor] = {}
    for head, name, layer, parameter in _updates(model, adapter_name):
        given = parts.pop(name, None)
        if given is not None and "core" in given:
            _fit(layer, adapter_name, parameter, given, split=bool(config.start_pattern.get(name)))
            result |= {f"{head}.{part}": tensor for part, tensor in given.items()}
    # PEFT reports what is left over.
    result |= {f"{name}.{part}": tensor for name, given in parts.items() for part, tensor in given.items()}
    return result | _put_whole(model, config, adapter_name, rest)


def _sorted(state_dict: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Tell the parts of updates, by the names of the weights, from all other tensors."""
    parts: dict[str, dict[str, Tensor]] = {}
    rest: dict[str, Tensor] = {}
    for key, tensor in state_dict.items():
        name, part = split_key(key if key.startswith(ROOT) else ROOT + key) or (key, None)
        if part is None:
            rest[key] = tensor
        elif not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"load_adapter: {key!r} has NaN or infinite entries; the adapter is damaged")
        else:
            parts.setdefault(name, {})[part] = tensor
    return parts, rest


def _updates(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, str, FloraTunerLayer, str]]:
    """Give, of each update, what its keys in the model begin with, its weight's plain name, its layer and parameter."""
    keys = {id(module): key for key, module in model.named_modules()}
    for place in places(model):
        layer = place.wrapper
        if not isinstance(layer, FloraTunerLayer):
            continue
        for parameter in layer.updates(adapter_name):
            head = f"{keys[id(layer)]}.{PREFIX}.{adapter_name}"
            head += f".{parameter}" if isinstance(layer, FloraParameter) else ""
            yield head, place.name_of(parameter), layer, parameter


def _tucker(parts: Mapping[str, Tensor], prefix: str = "") -> TuckerTensor:
    core = parts[f"{prefix}core"]
    return TuckerTensor(core, tuple(parts.get(f"{prefix}factor_{mode}") for mode in range(core.dim())))


def _parts(tucker: TuckerTensor, prefix: str = "") -> dict[str, Tensor]:
    return {f"{prefix}{part}": tensor for part, tensor in tensor_parts(tucker.core, tucker.factors).items()}


def _fit(layer: FloraTunerLayer, adapter_name: str, parameter: str, given: dict[str, Tensor], *, split: bool) -> None:
    """Give an update the form of a file's tensors, and the tensors, in place, that of an update."""
    update = layer.updates(adapter_name)[parameter]
    tucker, start = _tucker(given), None
    if split or update.start is not None:
        tucker, start = TuckerUpdate.split(tucker)
        for part in [part for part in given if part != "magnitude"]:
            del given[part]
        given |= _parts(tucker) | _parts(start, "start_")
    mine, theirs = ([u is None for u in t.factors] for t in (update.tucker, tucker))
    # Other ranks are for torch to refuse, as for any other module.
    same_ranks = update.ranks == (tucker.ranks if update.start is not None or start is None else _doubled(tucker))
    if same_ranks and (mine, update.start is None) != (theirs, start is None):
        options = {key: getattr(update, key) for key in ("arrangement", "scale", *DROPOUTS, "channels", "magnitude")}
        weight = layer.original(parameter)
        own, other = (
            None if t is None else t.map(lambda a: a.detach().to(weight.device).clone()) for t in (tucker, start)
        )
        assert own is not None
        update = TuckerUpdate(own, update.shape, start=other, **options).requires_grad_(update.core.requires_grad)
        layer.replace_update(adapter_name, update, parameter)


def _doubled(tucker: TuckerTensor) -> tuple[int, ...]:
    return tuple(r if u is None else 2 * r for r, u in zip(tucker.ranks, tucker.factors))


def _put_whole(model: nn.Module, config: FloraConfig, adapter_name: str, rest: dict[str, Tensor]) -> dict[str, Tensor]:
    """Replace what a file has whole, and return the other tensors under the names that they have in the model."""
    known, left = tensors_by_name(model), dict[str, Tensor]()
    layers = [module for module in model.modules() if isinstance(module, FloraTunerLayer)]
    active = {name for layer in layers for name in layer.active_adapters}
    keys = {key: key for key in (model.state_dict() if rest else ()) if f".{PREFIX}." not in key}
    keys = {without_layers(key).removeprefix(ROOT): key for key in keys} | keys
    for key, tensor in rest.items():
        name = key.removeprefix(ROOT)
        if name not in config.whole or name not in known:
            left[keys.get(key, keys.get(name, key))] = tensor
            continue
        module, local, _ = known[name]
        replace_whole(module, local, tensor, adapter_name, active=adapter_name in active)
    return left


# --- writing ------------------------------------------------------------------------------------------


def stored_state(model: nn.Module, adapter_name: str, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a file, the updates' still under the names that they have in the model."""
    result: dict[str, Tensor] = {}
    groups: dict[str, dict[str, Tensor]] = {}
    for key, tensor in own.items():
        head, _, part = key.rpartition(".")
        if f".{PREFIX}.{adapter_name}" in key:
            groups.setdefault(head, {})[part] = tensor
        else:
            result[key] = tensor
    for head, parts in groups.items():
        if "start_core" in parts:
            both = TuckerUpdate(_tucker(parts), start=_tucker(parts, "start_"))
            magnitude = {"magnitude": parts["magnitude"]} if "magnitude" in parts else {}
            parts = _parts(both.exported()) | magnitude
        result |= {f"{head}.{part}": tensor for part, tensor in parts.items()}
    for key, module in model.named_modules():
        for (local, owner), note in module.__dict__.get(WHOLE, {}).items():
            if owner == adapter_name:
                name = without_layers(f"{key}.{local}" if key else local)
                result[name] = note.value_in(module, local)
    return result


def describe(config: FloraConfig, model: nn.Module, adapter_name: str, stored: Mapping[str, Tensor]) -> None:
    """Let the config say what a file's tensors do not; it is written after them."""
    updates = updates_by_weight(model, adapter_name)
    keys = {checkpoint_key(key, adapter_name): tensor for key, tensor in stored.items()}
    parts, rest = _sorted(keys)
    whole = [key.removeprefix(ROOT) for key in rest if ".base_layer." not in key]
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            saved = module.adapter_state_dict_load_map(adapter_name)
            whole += [f"{name}.{key}".removeprefix(ROOT) for key in saved]
    table = config_of(
        ranks={name: tuple(given["core"].shape) for name, given in parts.items() if "core" in given},
        scales={name: update.scale for name, update in updates.items()},
        arrangements={name: update.arrangement for name, update in updates.items()},
        shapes={name: update.shape for name, update in updates.items()},
        whole=whole,
        extra=notes_of(model, updates) | {"scale": config.scale},
        channels={name: u.channels for name, u in updates.items() if u.magnitude is not None},
    )
    ours = ("task_type", "inference_mode", "base_model_name_or_path", "peft_type", "target_modules")
    config.described = {key: value for key, value in table.items() if key not in ours} | {"stacks": {}}
