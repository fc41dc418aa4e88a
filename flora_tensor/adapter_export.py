"""Adapters written in other formats, exactly: the LoRA of PEFT and diffusers, LyCORIS and kohya files.

Nothing here takes an SVD or needs PyTorch. What has no exact counterpart is refused, with the reason.
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

import numpy as np

from flora_tensor._adapter_config import CONFIG_NAME
from flora_tensor._adapter_keys import PREFIX
from flora_tensor._adapter_shards import MODEL_NAME
from flora_tensor._arrays import to_numpy
from flora_tensor._base_notes import noted_layer
from flora_tensor._checks import check_choice
from flora_tensor._errors import InputError
from flora_tensor._files import staged_directory, staged_file, write_file
from flora_tensor._lora_names import DIFFUSERS_NAME, FOLDERS, METADATA_KEY, kohya_prefix
from flora_tensor._lora_parts import LowRank, low_rank_of
from flora_tensor._safetensors import SafetensorsWriter, dtype_code
from flora_tensor._typing import PathLike
from flora_tensor.adapter import Adapter
from flora_tensor.adapter_file import AdapterLike, as_adapter, encode_finite
from flora_tensor.arrangement import Arrangement
from flora_tensor.tucker_tensor import TuckerTensor

__all__ = ["to_diffusers", "to_lycoris", "to_peft_lora"]

Kind: TypeAlias = Literal["embedding", "conv1d"]
PYTORCH = MappingProxyType({"format": "pt"})


def to_peft_lora(
    adapter: AdapterLike, out: PathLike, *, kinds: Mapping[str, Kind] | None = None, overwrite: bool = False
) -> Path:
    """Write an adapter as a LoRA of Hugging Face PEFT, exactly and without an SVD.

    A matrix becomes a LoRA of rank min(r_0, r_1), a kernel of native arrangement or ``o (i h w)`` one of rank
    min(r_0, ∏ r_k). Other arrangements are written at the full rank of the weight: extract them natively first. Tensors
    stored whole are written with their values.

    Parameters
    ----------
    adapter : path, Adapter, or mapping of str to TuckerTensor
        The adapter.
    out : path
        The directory to write.
    kinds : mapping of str to {"embedding", "conv1d"}, optional
        The weights, by name, that belong to an embedding, or to a Conv1D of transformers, whose weight is (in, out).
        The tensors do not tell; by default it is what `flora_torch.save_adapter` noted in the config.
    overwrite : bool, default False
        Whether a directory that exists is replaced.

    Returns
    -------
    Path
        The directory, ready for ``PeftModel.from_pretrained``.

    Raises
    ------
    ValueError
        If there is nothing to write, a weight is not named ``….weight``, or ``kinds`` is wrong.
    InputError
        If the config notes a layer that PEFT has no LoRA of the same shape of, and as for `load_adapter`.
    OSError
        As for `load_adapter` and `save_adapter`.

    References
    ----------
    Hu et al., *LoRA*, ICLR 2022, section 4.1.

    Examples
    --------
    >>> import json, tempfile, pathlib, numpy as np
    >>> t = TuckerTensor(np.ones((2, 2)), [np.ones((4, 2)), np.ones((3, 2))])
    >>> path = to_peft_lora({"block.fc.weight": t}, pathlib.Path(tempfile.mkdtemp()) / "lora")
    >>> config = json.loads((path / "adapter_config.json").read_text())
    >>> config["peft_type"], config["r"], config["target_modules"]
    ('LORA', 2, ['block.fc'])
    """
    source = _exportable("to_peft_lora", adapter)
    kinds = _noted_kinds("to_peft_lora", source) if kinds is None else dict(kinds)
    if unknown := [n for n, kind in kinds.items() if n not in source or kind not in ("embedding", "conv1d")]:
        raise ValueError(
            f"to_peft_lora: kinds has {unknown[0]!r}: {kinds[unknown[0]]!r}; pass 'embedding' or 'conv1d' of a weight"
        )
    stored, ranks = _peft_tensors(source, kinds, PREFIX)
    targets = {name.removesuffix(".weight") for name in source}
    for name, array in source.whole.items():
        module, _, parameter = name.rpartition(".")
        key = f"{module}.base_layer.{parameter}" if module in targets else name
        stored[PREFIX + key] = (to_numpy(array), source.dtypes.get(name) or dtype_code(array.dtype))
    config = _lora_config(source, ranks, is_turned="conv1d" in kinds.values())
    with staged_directory(
        "to_peft_lora", Path(out), overwrite=overwrite, owned=(CONFIG_NAME, MODEL_NAME, "README.md")
    ) as stage:
        _write_tensors(stage / MODEL_NAME, stored)
        text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
        write_file(stage / CONFIG_NAME, (text + "\n").encode())
    return Path(out)


def _peft_tensors(
    source: Adapter, kinds: Mapping[str, Kind], start: str
) -> tuple[dict[str, tuple[np.ndarray, str]], dict[str, int]]:
    """Return the factors by PEFT's names, with the types to store them in, and the ranks of the weights."""
    stored: dict[str, tuple[np.ndarray, str]] = {}
    ranks: dict[str, int] = {}
    for name in source:
        pair = _low_rank(source, name, turned=name in kinds)
        module, ranks[name] = name.removesuffix(".weight"), pair.down.shape[0]
        code = _export_code(source, name)
        is_embedding = kinds.get(name) == "embedding"
        names = ("lora_embedding_A", "lora_embedding_B") if is_embedding else ("lora_A.weight", "lora_B.weight")
        stored[f"{start}{module}.{names[0]}"] = (pair.down, code)
        stored[f"{start}{module}.{names[1]}"] = (_with_kernel(pair), code)
    return stored, ranks


def _noted_kinds(where: str, source: Adapter) -> dict[str, Kind]:
    """Read from the config which weights are written in ways of their own."""
    kinds: dict[str, Kind] = {}
    for name in source:
        layer = noted_layer(source.config, name)
        kind = layer.get("kind")
        if kind in ("transposed_convolution", "bilinear") or layer.get("groups", 1) != 1:
            raise InputError(
                f"{where}: {name!r} is of a {str(kind)[:40].replace('_', ' ')} with {layer.get('groups', 1)} "
                "groups, of which PEFT has no LoRA of the same shape; leave it out, or use to_lycoris"
            )
        if kind in ("embedding", "transposed_linear"):
            kinds[name] = "embedding" if kind == "embedding" else "conv1d"
    return kinds


def _lora_config(source: Adapter, ranks: Mapping[str, int], *, is_turned: bool, folder: str = "") -> dict[str, Any]:
    modules = {name: name.removeprefix(f"{folder}.").removesuffix(".weight") for name in ranks}
    common = max(set(ranks.values()), key=list(ranks.values()).count)
    # PEFT matches the ends of names, as regular expressions: anchored and escaped, each means one module.
    exact = {name: f"^{re.escape(module)}" for name, module in modules.items()}
    alphas = {name: source.scales[name] * rank for name, rank in ranks.items()}
    is_plain = all("." in module for module in modules.values())
    return {
        "peft_type": "LORA",
        "task_type": source.config.get("task_type"),
        "base_model_name_or_path": source.config.get("base_model_name_or_path"),
        "inference_mode": True,
        "r": common,
        "lora_alpha": common,
        "lora_dropout": 0.0,
        "bias": "all" if source.whole else "none",
        "fan_in_fan_out": is_turned,
        "init_lora_weights": True,
        "rank_pattern": {exact[name]: rank for name, rank in ranks.items() if rank != common},
        "alpha_pattern": {exact[name]: alpha for name, alpha in alphas.items() if alpha != common},
        "target_modules": sorted(modules.values()) if is_plain else "|".join(re.escape(m) for m in modules.values()),
        "use_rslora": False,
        "use_dora": False,
    }


def to_diffusers(
    adapter: AdapterLike, out: PathLike, *, whole: Literal["error", "skip"] = "error", overwrite: bool = False
) -> Path:
    """Write an adapter as a LoRA file of diffusers, `pytorch_lora_weights.safetensors`, exactly and without an SVD.

    The scales are in the LoraConfig that diffusers keeps in such a file, one for each model of a pipeline.

    Parameters
    ----------
    adapter : path, Adapter, or mapping of str to TuckerTensor
        The adapter: of one model, or of a pipeline, where all names begin with the models' folders (``unet.…``).
    out : path
        The directory to write.
    whole : {"error", "skip"}
        What to do about tensors that are stored whole, for which the format has no place.
    overwrite : bool, default False
        Whether a directory that exists is replaced.

    Returns
    -------
    Path
        The directory, ready for ``pipeline.load_lora_weights``, or, of one model, for
        ``model.load_lora_adapter(…, prefix=None, use_safetensors=True)``.

    Raises
    ------
    ValueError
        If there is nothing to write, a weight is not named ``….weight``, or tensors are stored whole.
    InputError
        If the config notes a layer that PEFT has no LoRA of the same shape of, and as for `load_adapter`.
    OSError
        As for `load_adapter` and `save_adapter`.

    References
    ----------
    Hu et al., *LoRA*, ICLR 2022, section 4.1.

    Examples
    --------
    >>> import tempfile, pathlib, numpy as np
    >>> from flora_tensor import from_diffusers
    >>> t = TuckerTensor(np.ones((2, 2)), [np.ones((4, 2)), np.ones((3, 2))])
    >>> path = to_diffusers({"unet.fc.weight": t}, pathlib.Path(tempfile.mkdtemp()) / "lora")
    >>> from_diffusers(path / "pytorch_lora_weights.safetensors")["unet.fc.weight"].ranks
    (2, 3)
    """
    source = _exportable("to_diffusers", adapter)
    _check_whole("to_diffusers", source, whole)
    kinds = _noted_kinds("to_diffusers", source)
    stored, ranks = _peft_tensors(source, kinds, "")
    noted: dict[str, Any] = {}
    for folder in _folders(source) or [""]:
        own = {name: rank for name, rank in ranks.items() if name.startswith(f"{folder}." if folder else "")}
        is_turned = any(kinds.get(name) == "conv1d" for name in own)
        config = _lora_config(source, own, is_turned=is_turned, folder=folder)
        noted |= {f"{folder}.{key}".removeprefix("."): value for key, value in config.items()}
    metadata = {"format": "pt", METADATA_KEY: json.dumps(noted, sort_keys=True, allow_nan=False)}
    with staged_directory("to_diffusers", Path(out), overwrite=overwrite, owned=(DIFFUSERS_NAME,)) as stage:
        _write_tensors(stage / DIFFUSERS_NAME, stored, metadata)
    return Path(out)


def _folders(source: Adapter) -> list[str]:
    """List the folders of the pipeline that an adapter is for; empty for one of a single model."""
    found = list(dict.fromkeys(name.partition(".")[0] for name in source))
    return found if set(found) <= set(FOLDERS) else []


def _check_whole(where: str, source: Adapter, whole: str) -> None:
    check_choice(where, "whole", whole, ("error", "skip"))
    if source.whole and whole == "error":
        name = next(iter(source.whole))
        raise ValueError(
            f"{where}: {name!r} is stored whole, which the format has no place for; pass whole='skip' (--skip-whole)"
        )


def to_lycoris(
    adapter: AdapterLike,
    out: PathLike,
    *,
    prefix: str | None = "lycoris",
    tucker: bool = True,
    whole: Literal["error", "skip"] = "error",
    overwrite: bool = False,
) -> Path:
    """Write an adapter as a LyCORIS file, exactly: a LoRA for a matrix, a LoCon or LoCon-Tucker for a kernel.

    Of the two forms of a kernel the one with fewer numbers is written; unequal ranks are padded with zeros.

    Parameters
    ----------
    adapter : path, Adapter, or mapping of str to TuckerTensor
        The adapter.
    out : path
        The `.safetensors` file to write.
    prefix : str or None
        What the names begin with: ``"lycoris"``, or ``"lora_unet"`` and the like for kohya's tools. With ``None`` it is
        kohya's word for the model: that of each folder of a pipeline, else ``"lora_unet"``.
    tucker : bool, default True
        Whether ``lora_mid`` may be written, which not every reader knows.
    whole : {"error", "skip"}
        What to do about tensors that are stored whole, for which the format has no place.
    overwrite : bool, default False
        Whether a file that exists is replaced.

    Returns
    -------
    Path
        The file.

    Raises
    ------
    ValueError
        If there is nothing to write, a weight is not named ``….weight``, two names become one with underscores for
        dots, or tensors are stored whole.
    InputError, OSError
        As for `load_adapter` and `save_adapter`.

    References
    ----------
    Yeh et al., *Navigating text-to-image customization*, ICLR 2024, section 3.

    Examples
    --------
    >>> import tempfile, pathlib, numpy as np
    >>> t = TuckerTensor(np.ones((1, 2)), [np.ones((4, 1)), np.ones((3, 2))])
    >>> from flora_tensor import from_lycoris
    >>> file = to_lycoris({"fc.weight": t}, pathlib.Path(tempfile.mkdtemp()) / "fc.safetensors")
    >>> from_lycoris(file, {"fc.weight": np.zeros((4, 3))})["fc.weight"].ranks
    (1, 3)
    """
    source = _exportable("to_lycoris", adapter)
    _check_whole("to_lycoris", source, whole)
    folders = _folders(source) if prefix is None else []
    stored: dict[str, tuple[np.ndarray, str]] = {}
    for name in source:
        folder, _, rest = name.partition(".") if folders else ("", "", name)
        start = kohya_prefix(folder, folders) if folders else prefix or "lora_unet"
        module = f"{start}_{rest.removesuffix('.weight').replace('.', '_')}"
        if f"{module}.alpha" in stored:
            raise ValueError(f"to_lycoris: another weight has the name of {name!r} with underscores for dots")
        code = _export_code(source, name)
        parts = _locon(source, name, tucker=tucker)
        stored |= {f"{module}.{part}": (array, code) for part, array in parts.items() if part != "alpha"}
        stored[f"{module}.alpha"] = (parts["alpha"], "F32")
    with staged_file("to_lycoris", Path(out), overwrite=overwrite) as stage:
        _write_tensors(stage, stored)
    return Path(out)


def _locon(source: Adapter, name: str, *, tucker: bool) -> dict[str, np.ndarray]:
    """Return the tensors of one module in LyCORIS's form."""
    shape, scale = source.shapes[name], source.scales[name]
    pair = _low_rank(source, name, turned=False)
    rank = pair.down.shape[0]
    parts = {"lora_up.weight": _with_kernel(pair), "lora_down.weight": pair.down}
    if tucker and math.prod(shape[2:]) > 1 and source.arrangements[name].is_native:
        square = _locon_tucker(source[name])
        if sum(a.size for a in square.values()) < pair.up.size + pair.down.size:
            parts, rank = square, square["lora_mid.weight"].shape[0]
    # alpha is kept as float32: where that would round the scale, the factors take it.
    alpha = np.float32(scale * rank)
    if float(alpha) / rank != scale:
        alpha = np.float32(rank)
        parts["lora_up.weight"] = parts["lora_up.weight"] * scale
    return {**parts, "alpha": np.array(alpha, np.float32)}


def _locon_tucker(tensor: TuckerTensor) -> dict[str, np.ndarray]:
    """Return up, down and mid = core × kernel factors, the two channel ranks made equal by zeros."""
    core, (first, second, *kernel) = tensor.map(to_numpy)
    mid = TuckerTensor(core, (None, None, *kernel)).to_tensor()
    first = np.eye(core.shape[0], dtype=core.dtype) if first is None else first
    second = np.eye(core.shape[1], dtype=core.dtype) if second is None else second
    rank, ones = max(mid.shape[:2]), (1,) * (mid.ndim - 2)
    mid = np.pad(mid, [(0, rank - mid.shape[0]), (0, rank - mid.shape[1]), *([(0, 0)] * len(ones))])
    up = np.pad(first, [(0, 0), (0, rank - first.shape[1])])
    down = np.pad(second, [(0, 0), (0, rank - second.shape[1])]).T
    return {
        "lora_up.weight": up.reshape(*up.shape, *ones),
        "lora_down.weight": down.reshape(*down.shape, *ones),
        "lora_mid.weight": mid,
    }


def _exportable(where: str, given: AdapterLike) -> Adapter:
    source = as_adapter(given)
    if not source:
        raise ValueError(f"{where}: the adapter has no Tucker tensors; there is nothing to write")
    for name in source.magnitudes:
        raise InputError(f"{where}: {name!r} has magnitudes, whose change depends on the base; merge and extract it")
    for name in source:
        if not name.endswith(".weight") or name == ".weight":
            raise ValueError(
                f"{where}: {name!r} is not the weight of a module, and the format knows no other; remove it"
            )
    return source


def _export_code(source: Adapter, name: str) -> str:
    """Products of stored numbers need more digits than the numbers: 16-bit adapters are written as float32."""
    code = source.dtypes.get(name) or dtype_code(source[name].core.dtype)
    is_lora = source[name].factors[0] is not None and all(u is None for u in source[name].factors[1:])
    return code if is_lora or code == "F64" else "F32"


def _low_rank(source: Adapter, name: str, *, turned: bool) -> LowRank:
    tensor, arrangement, shape = source[name].map(to_numpy), source.arrangements[name], source.shapes[name]
    if turned:
        if len(shape) != 2:
            raise ValueError(f"to_peft_lora: {name!r} has shape {shape}; an embedding or Conv1D has two axes")
        if not arrangement.is_native:
            tensor = TuckerTensor(arrangement.restore(tensor.to_tensor(), shape), (None, None))
        tensor, shape = TuckerTensor(tensor.core.T, tensor.factors[::-1]), shape[::-1]
        arrangement = Arrangement.native(2)
    if tensor.core.dtype != np.float64 and any(u is not None for u in tensor.factors[1:]):
        tensor = tensor.map(lambda a: a.astype(np.float64))  # rounded once, when it is written
    return low_rank_of(tensor, arrangement, shape)


def _with_kernel(pair: LowRank) -> np.ndarray:
    """Return ``up`` as the 1×1 convolution that follows a convolution."""
    return pair.up.reshape(*pair.up.shape, *(1 for _ in pair.down.shape[2:]))


def _write_tensors(
    path: Path, stored: Mapping[str, tuple[np.ndarray, str]], metadata: Mapping[str, str] = PYTORCH
) -> None:
    layout = [(key, code, tuple(array.shape)) for key, (array, code) in stored.items()]
    with SafetensorsWriter(path, layout, metadata) as writer:
        for key, (array, code) in stored.items():
            writer.write(key, encode_finite(key, np.asarray(array), code))
        writer.finish()
