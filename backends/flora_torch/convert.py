"""Adapters of other formats from and to PyTorch models: the converters of `flora_tensor.conversion`, told by the model.

The model knows what files do not say: the modules' names behind underscores, the kernels' shapes, and which weights
belong to embeddings or to layers whose weight is transposed.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

from torch import Tensor, nn

import flora_tensor as ft
from flora_tensor import Adapter, TuckerTensor
from flora_tensor._typing import PathLike
from flora_torch.layers import FloraLinear
from flora_torch.model_weights import places, sites
from flora_torch.saving import adapter_of

__all__ = ["from_lycoris", "from_official_flora", "from_peft_lora", "to_lycoris", "to_peft_lora"]

Source: TypeAlias = PathLike | Mapping[str, TuckerTensor] | nn.Module


def to_peft_lora(
    source: Source,
    out: PathLike,
    *,
    model: nn.Module | None = None,
    adapter_name: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write an adapter as a LoRA of Hugging Face PEFT, exactly and without an SVD.

    Parameters
    ----------
    source : nn.Module, path, Adapter, or mapping of str to TuckerTensor
        A model with adapters, or an adapter.
    out : path
        The directory to write.
    model : nn.Module, optional
        The model that an adapter from elsewhere is for, plain or with adapters: embeddings and the Conv1D layers of
        transformers are written in their own ways.
    adapter_name : str, optional
        Which of the model's adapters, where it has several.
    overwrite : bool, default False
        Whether a directory that exists is replaced.

    Returns
    -------
    Path
        The directory, ready for ``PeftModel.from_pretrained``.

    Raises
    ------
    ValueError
        As for `flora_tensor.to_peft_lora`; if the model has no such adapter; or if a convolution has groups, of which
        PEFT's LoRA is of another shape.

    References
    ----------
    Hu et al., *LoRA*, ICLR 2022, section 4.1.

    Examples
    --------
    >>> import tempfile, flora_torch
    >>> model = nn.Sequential(nn.Linear(8, 8))
    >>> _ = flora_torch.attach(model, ranks=2)
    >>> path = to_peft_lora(model, Path(tempfile.mkdtemp()) / "lora")
    >>> from_peft_lora(path, model)["0.weight"].ranks
    (2, 8)
    """
    adapter = _adapter(source, adapter_name, "to_peft_lora")
    owner = source if isinstance(source, nn.Module) else model
    kinds: dict[str, Any] | None = None if owner is None else _kinds(owner, adapter)
    return ft.to_peft_lora(adapter, out, kinds=kinds, overwrite=overwrite)


def to_lycoris(
    source: Source,
    out: PathLike,
    *,
    adapter_name: str | None = None,
    prefix: str | None = "lycoris",
    tucker: bool = True,
    whole: Literal["error", "skip"] = "error",
    overwrite: bool = False,
) -> Path:
    """Write an adapter as a LyCORIS file, exactly: a LoRA for a matrix, a LoCon or LoCon-Tucker for a kernel.

    Parameters
    ----------
    source : nn.Module, path, Adapter, or mapping of str to TuckerTensor
        A model with adapters, or an adapter.
    out : path
        The `.safetensors` file to write.
    adapter_name : str, optional
        Which of the model's adapters, where it has several.
    prefix, tucker, whole, overwrite
        As for `flora_tensor.to_lycoris`.

    Returns
    -------
    Path
        The file.

    Raises
    ------
    ValueError
        As for `flora_tensor.to_lycoris`, or if the model has no such adapter.

    References
    ----------
    Yeh et al., *Navigating text-to-image customization*, ICLR 2024, section 3.

    Examples
    --------
    >>> import tempfile, flora_torch
    >>> model = nn.Sequential(nn.Conv2d(4, 8, 3))
    >>> _ = flora_torch.attach(model, ranks=(4, 2, 3, 3))
    >>> file = to_lycoris(model, Path(tempfile.mkdtemp()) / "conv.safetensors")
    >>> from_lycoris(file, nn.Sequential(nn.Conv2d(4, 8, 3)))["0.weight"].ranks
    (4, 4, 3, 3)
    """
    adapter = _adapter(source, adapter_name, "to_lycoris")
    return ft.to_lycoris(adapter, out, prefix=prefix, tucker=tucker, whole=whole, overwrite=overwrite)


def from_peft_lora(source: PathLike, model: nn.Module | None = None) -> Adapter:
    """Read an adapter directory of PEFT (LoRA, LoHa, LoKr) for `attach_adapter`, exactly.

    Parameters
    ----------
    source : path
        The directory.
    model : nn.Module, optional
        The model, plain or with adapters; needed for LoHa and LoKr, which do not tell a kernel's shape.

    Returns
    -------
    Adapter
        One entry a weight.

    Raises
    ------
    InputError, ValueError, OSError
        As for `flora_tensor.from_peft_lora`.

    References
    ----------
    Hu et al., *LoRA*, ICLR 2022, section 4.1.

    Examples
    --------
    >>> import tempfile, flora_torch
    >>> model = nn.Sequential(nn.Linear(8, 8))
    >>> _ = flora_torch.attach(model, ranks=2)
    >>> adapter = from_peft_lora(to_peft_lora(model, Path(tempfile.mkdtemp()) / "lora"))
    >>> flora_torch.attach_adapter(nn.Sequential(nn.Linear(8, 8)), adapter).layers[0].ranks
    (2, 8)
    """
    return ft.from_peft_lora(source, base=None if model is None else _parameters(model))


def from_lycoris(
    source: PathLike | Mapping[str, Tensor],
    model: nn.Module,
    *,
    prefix: str | None = None,
    allow_pickle: bool = False,
) -> Adapter:
    """Read a LyCORIS or kohya file for `attach_adapter`, exactly.

    Parameters
    ----------
    source : path or mapping of str to Tensor
        The file, or its state dict: tensors of any shape.
    model : nn.Module
        The model, plain or with adapters.
    prefix, allow_pickle
        As for `flora_tensor.from_lycoris`.

    Returns
    -------
    Adapter
        One entry a weight.

    Raises
    ------
    InputError, ValueError, OSError
        As for `flora_tensor.from_lycoris`.

    References
    ----------
    Yeh et al., *Navigating text-to-image customization*, ICLR 2024.

    Examples
    --------
    >>> import torch
    >>> file = {"lora_unet_0.lora_up.weight": torch.ones(4, 2), "lora_unet_0.lora_down.weight": torch.ones(2, 3)}
    >>> from_lycoris(file, nn.Sequential(nn.Linear(3, 4)))["0.weight"].shape
    (4, 3)
    """
    return ft.from_lycoris(source, _parameters(model), prefix=prefix, allow_pickle=allow_pickle)


def from_official_flora(
    source: PathLike | Mapping[str, Tensor],
    model: nn.Module | None = None,
    *,
    scale: float,
    prefix: str = "model.",
    allow_pickle: bool = False,
) -> Adapter:
    """Read a state dict of the official FLoRA code for `attach_adapter`, exactly.

    Parameters
    ----------
    source : path or mapping of str to Tensor
        The saved state dict: tensors of any shape.
    model : nn.Module, optional
        The model that it was trained on, without the official code's wrappers: names and shapes are checked against it.
    scale : float
        The multiplier that it was trained with; the file does not hold it.
    prefix, allow_pickle
        As for `flora_tensor.from_official_flora`.

    Returns
    -------
    Adapter
        One entry a weight.

    Raises
    ------
    InputError, OSError
        As for `flora_tensor.from_official_flora`.

    References
    ----------
    Si et al. (FLoRA), ICLR 2025, equation 5, and its repository SJTU-DeepVisionLab/FLoRA, ``flora/layers.py``.

    Examples
    --------
    >>> import torch
    >>> parts = {"param_G": (2, 1), "param_0": (3, 2), "param_1": (5, 1)}
    >>> state = {f"model.0.flora_layer.{name}": torch.ones(shape) for name, shape in parts.items()}
    >>> from_official_flora(state, nn.Sequential(nn.Linear(3, 5)), scale=4.0)["0.weight"].shape
    (5, 3)
    """
    base = None if model is None else _parameters(model)
    return ft.from_official_flora(source, scale=scale, base=base, prefix=prefix, allow_pickle=allow_pickle)


def _adapter(source: Source, adapter_name: str | None, where: str) -> Any:
    if isinstance(source, nn.Module):
        return adapter_of(source, adapter_name, where)
    if adapter_name is not None:
        raise ValueError(f"{where}: adapter_name is {adapter_name!r}, but the source is one adapter; leave it out")
    return source


def _parameters(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters by their plain names, seen through the layers that wrap some of them."""
    return {name: site.weight for name, site in sites(model).items()}


def _kinds(model: nn.Module, adapter: Mapping[str, TuckerTensor] | PathLike) -> dict[str, str]:
    """Find the weights that PEFT's LoRA writes in ways of their own."""
    given = ft.load_adapter(adapter) if isinstance(adapter, str | os.PathLike) else adapter
    kinds: dict[str, str] = {}
    for place in places(model):
        name = place.name_of("weight")
        module: Any = place.module
        if name not in given:
            continue
        if isinstance(module, nn.Embedding):
            kinds[name] = "embedding"
        elif getattr(module, "groups", 1) != 1 or getattr(module, "transposed", False):
            raise ValueError(
                f"to_peft_lora: {name!r} is of a {type(module).__name__} with groups or transposed, of which PEFT has "
                "no LoRA of the same shape; leave it out, or use to_lycoris"
            )
        elif FloraLinear.accepts(module) and not isinstance(module, nn.Linear):
            kinds[name] = "conv1d"
    return kinds
