"""Whether a model is the one that an adapter was made for: the layers of its weights, and a few of their numbers.

`save_adapter` notes both in the adapter's config, extraction the numbers. Neither is needed to read an adapter.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from flora_tensor._base_notes import (
    LAYERS,
    SAMPLES,
    VerifyBase,
    noted_layer,
    sample_positions,
    samples_agree,
    text_of_samples,
)
from flora_tensor._warnings import warn_user
from flora_tensor.adapter import Adapter
from flora_torch._sharding import gathered, is_sharded
from flora_torch.base_weight import is_quantized, own_parameter
from flora_torch.bilinear import FloraBilinear, FloraEmbeddingBag
from flora_torch.kinds import wrapper_for
from flora_torch.layers import FloraConv, FloraConvTranspose, FloraEmbedding, FloraLinear
from flora_torch.model_weights import Holder, Site
from flora_torch.weight_layer import is_conv1d_of_transformers

__all__ = ["check_layer", "check_samples", "describe_bases", "dtype_codes"]

dtype_codes = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
"""How files call the types of weights."""
_KINDS = {
    FloraConv: "convolution",
    FloraConvTranspose: "transposed_convolution",
    FloraEmbedding: "embedding",
    FloraEmbeddingBag: "embedding",
    FloraBilinear: "bilinear",
}


def describe_bases(sites: Mapping[str, Site], updates: Mapping[str, nn.Module]) -> dict[str, Any]:
    """Return what the config of an adapter says of the weights that it changes.

    Of a weight that is spread over processes samples are taken where its update is spread too, for then every process
    comes here.

    Parameters
    ----------
    sites : mapping of str to Site
        The model's weights.
    updates : mapping of str to nn.Module
        The updates of those that the adapter changes.

    Returns
    -------
    dict of str to dict
        For each weight its layer, where that is of a known kind, with the weight's other names, where it is tied; and
        its samples, where it is a plain parameter.

    Examples
    --------
    >>> from flora_torch.model_weights import sites
    >>> describe_bases(sites(nn.Sequential(nn.Conv2d(2, 2, 1))), {"0.weight": nn.Module()})["layer_pattern"]
    {'0.weight': {'kind': 'convolution', 'groups': 1, 'padding_mode': 'zeros'}}
    """
    chosen = {name: sites[name] for name in updates if name in sites}
    layers = {name: _layer(site.holders[0]) | _tied(site, name) for name, site in chosen.items()}
    samples = {
        name: _samples(site, gather=any(is_sharded(p) for p in updates[name].parameters()))
        for name, site in chosen.items()
    }
    return {
        LAYERS: {name: layer for name, layer in layers.items() if layer},
        SAMPLES: {name: text for name, text in samples.items() if text},
    }


def _layer(holder: Holder) -> dict[str, Any]:
    """Describe the layer that a weight belongs to; empty where its product is not known."""
    module: Any = holder.module
    kind = wrapper_for(module, holder.parameter)
    if kind is FloraLinear:
        is_turned = is_conv1d_of_transformers(module) and not isinstance(module, nn.Linear)
        return {"kind": "transposed_linear" if is_turned else "linear"}
    if kind not in _KINDS:
        return {}
    geometry = {"groups": module.groups, "padding_mode": module.padding_mode} if issubclass(kind, FloraConv) else {}
    return {"kind": _KINDS[kind], **geometry}


def _tied(site: Site, name: str) -> dict[str, Any]:
    """Return the weight's other names: a checkpoint may hold it under each of them, or under another one alone."""
    others = [other for other in site.names if other != name]
    return {"tied": others} if others else {}


def _samples(site: Site, *, gather: bool = False) -> str | None:
    """Return samples of a weight as it is with nothing merged; ``None`` where the module keeps something else.

    Of one that is spread over processes there are none either, unless all of them come here to ``gather`` it.
    """
    holder = site.holders[0]
    weight: Tensor | None = own_parameter(holder.module, holder.parameter)
    if weight is None or weight.is_meta or weight.dtype not in dtype_codes or is_quantized(holder.module):
        return None
    if holder.wrapper is not None:
        weight = holder.wrapper.originals.get(holder.parameter, weight)
    if is_sharded(weight) and not gather:
        return None
    weight = gathered(weight.detach())
    places = torch.tensor(sample_positions(weight.numel()), device=weight.device)
    # Indexed by axes: flattening would copy a weight in another memory format.
    values = weight[torch.unravel_index(places, weight.shape)]
    return text_of_samples(values.to(torch.float32).cpu().numpy(), dtype_codes[weight.dtype])


def check_layer(where: str, adapter: Adapter, name: str, site: Site) -> None:
    """Refuse a weight whose layer computes something else with it than the one that the adapter was made for.

    Raises
    ------
    ValueError
        If the kind, the groups or the padding mode differ.

    Examples
    --------
    >>> from flora_torch.model_weights import sites
    >>> check_layer("here", Adapter({}), "0.weight", sites(nn.Sequential(nn.Linear(2, 2)))["0.weight"])
    """
    noted = noted_layer(adapter.config, name)
    then = {key: noted[key] for key in ("kind", "groups", "padding_mode") if key in noted}
    now = [_layer(holder) for holder in site.holders] if then else [{}]
    # Where nothing is known of a layer, nothing speaks against it; a tied weight may be listed in another order.
    if all(layer and layer != then for layer in now):
        raise ValueError(
            f"{where}: the layer of {name!r} is {_shown(now[0])} in the model and {_shown(then)} in the "
            "adapter; pass the model that it was made for, or verify_base='ignore'"
        )


def _shown(layer: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {str(value)[:40]!r}" for key, value in layer.items())


def check_samples(where: str, adapter: Adapter, sites: Mapping[str, Site], verify_base: VerifyBase) -> None:
    """Warn, or refuse, if the model's weights are not the numbers that the adapter was made for.

    Raises
    ------
    ValueError
        If they differ and ``verify_base="error"``.

    Warns
    -----
    FloraWarning
        If they differ and ``verify_base="warn"``.

    Examples
    --------
    >>> check_samples("here", Adapter({}), {}, "error")
    """
    table = adapter.config.get(SAMPLES)
    noted: Mapping[str, Any] = table if isinstance(table, Mapping) else {}
    differing: list[str] = []
    for name in noted:
        found = _samples(sites[name]) if name in sites else None
        if found is not None and not samples_agree(noted[name], found):
            differing.append(name)
    if not differing:
        return
    message = (
        f"{where}: the values of {differing[0]!r}"
        f"{f' and of {len(differing) - 1} more weights' if len(differing) > 1 else ''} are not those that the adapter "
        "was made for: this is another model, or another state of it"
    )
    if verify_base == "error":
        raise ValueError(f"{message}; pass the original, or verify_base='warn'")
    warn_user(message)
