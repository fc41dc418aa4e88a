"""Adapters of other formats, read exactly: PEFT's LoRA, LyCORIS and kohya files, the official FLoRA.

Nothing here takes an SVD or needs PyTorch. What has no exact counterpart is refused, with the reason.
`flora_tensor.adapter_export` writes such adapters.
"""

import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flora_tensor._adapter_builder import AdapterBuilder, NamedArrays, shape_of, shapes_of
from flora_tensor._adapter_config import CONFIG_NAME
from flora_tensor._adapter_keys import PREFIX
from flora_tensor._adapter_shards import MODEL_NAME
from flora_tensor._code_names import Place, rows_of
from flora_tensor._errors import InputError
from flora_tensor._files import parse_json, read_json
from flora_tensor._lora_names import (
    DIFFUSERS_NAME,
    KOHYA,
    METADATA_KEY,
    PEFT_PARTS,
    BaseNames,
    dotted_part,
    root_of,
)
from flora_tensor._lora_parts import Converted, from_official, from_parts
from flora_tensor._typing import PathLike
from flora_tensor._whole import BaseLike
from flora_tensor.adapter import Adapter
from flora_tensor.adapter_file import as_adapter
from flora_tensor.tucker_tensor import TuckerTensor

__all__ = [
    "convert_adapter",
    "from_diffusers",
    "from_lycoris",
    "from_official_flora",
    "from_peft_lora",
]

# The names of PEFT's LoRA tensors, and those of LyCORIS for the same.
_NAMED_BY_PEFT = {
    "lora_A.weight": "lora_down.weight",
    "lora_B.weight": "lora_up.weight",
    "lora_embedding_A": "lora_down.weight",
    "lora_embedding_B": "lora_up.weight",
}
# Parts of a module that are no factors.
_NUMBERS = ("alpha", "scalar")


def from_peft_lora(source: PathLike, *, base: BaseLike | None = None) -> Adapter:
    """Read an adapter directory of Hugging Face PEFT (LoRA, LoHa, LoKr) as Tucker tensors, exactly.

    ``lora_alpha``, ``use_rslora``, ``rank_pattern`` and ``alpha_pattern`` become scales. A LoRA keeps its bits and its
    number of parameters: its second mode is left whole. Tensors that are stored in full (``modules_to_save``, biases)
    are stored whole.

    Parameters
    ----------
    source : path
        A directory with `adapter_config.json` and `adapter_model.safetensors`.
    base : path or mapping of str to array, optional
        The model's checkpoint, or its parameters by name; needed for LoHa and LoKr, which do not tell a kernel's shape.
        For LoRA the shapes are checked against it.

    Returns
    -------
    Adapter
        One entry a weight.

    Raises
    ------
    InputError
        If the files are damaged, of another method, or hold what has no Tucker tensor of its own: DoRA's magnitudes,
        biases of ``lora_B``, grouped convolutions (PEFT's change of one is not of the weight's shape), or parameters by
        name.
    OSError
        If a file cannot be read.

    References
    ----------
    Hu et al., *LoRA*, ICLR 2022, section 4.1; Kalajdzievski, *A rank stabilization scaling factor*, 2023, for rsLoRA.

    Examples
    --------
    >>> import tempfile, pathlib, numpy as np
    >>> t = TuckerTensor(np.ones((2, 3)), [np.ones((4, 2)), None])
    >>> from flora_tensor import to_peft_lora
    >>> path = to_peft_lora({"fc.weight": t}, pathlib.Path(tempfile.mkdtemp()) / "lora")
    >>> from_peft_lora(path)["fc.weight"].ranks
    (2, 3)
    """
    directory = Path(source)
    if not (directory / CONFIG_NAME).exists():
        raise InputError(f"{directory}: has no {CONFIG_NAME}; pass the directory that PEFT's save_pretrained wrote")
    config = read_json(directory / CONFIG_NAME)
    kind = config.get("peft_type")
    if kind not in ("LORA", "LOHA", "LOKR"):
        raise InputError(f"{directory}: peft_type is {kind!r}; LORA, LOHA and LOKR can be converted")
    if config.get("use_dora"):
        raise InputError(f"{directory}: use_dora: DoRA's change depends on the base weight; merge and extract it")
    if not (directory / MODEL_NAME).exists():
        raise InputError(f"{directory}: has no {MODEL_NAME}; save the adapter as safetensors")
    arrays = NamedArrays("from_peft_lora", directory / MODEL_NAME)
    shapes = shapes_of(base)
    if kind != "LORA" and shapes is None:
        raise ValueError(f"from_peft_lora: {kind} tensors do not tell a kernel's shape; pass base (--base)")
    builder = AdapterBuilder(arrays)
    for module, keys in _peft_modules(arrays, builder).items():
        _add_peft_module(builder, config, module, keys, shapes)
    if not builder.tensors and not builder.whole:
        raise InputError(f"{directory}: holds no adapter tensors")
    kept = {k: config[k] for k in ("base_model_name_or_path", "task_type") if config.get(k) is not None}
    return builder.adapter(kept)


def _peft_modules(arrays: NamedArrays, builder: AdapterBuilder) -> dict[str, dict[str, str]]:
    """Sort a PEFT file's keys by module; what is stored in full goes to the builder at once."""
    modules: dict[str, dict[str, str]] = {}
    for key in arrays.names:
        name = key.removeprefix(PREFIX)
        found = re.fullmatch(rf"(?:(.+)\.)?({PEFT_PARTS})", name)
        if found and found[1]:
            modules.setdefault(found[1], {})[found[2]] = key
        elif re.search(r"(^|\.)(lora_|hada_|lokr_)", name):
            why = "DoRA's change depends on the base weight" if "magnitude" in name else "it has no Tucker tensor"
            raise InputError(f"{arrays.label}: {key!r}: {why}; merge and extract such an adapter")
        else:
            builder.keep_whole(name.replace(".base_layer.", "."), key)
    return modules


def _add_peft_module(
    builder: AdapterBuilder, config: Mapping[str, Any], module: str, keys: Mapping[str, str], shapes: Any
) -> None:
    if ".base_layer" in f".{module}":
        raise InputError(f"{builder.arrays.label}: {module!r} adapts a parameter by name, which cannot be converted")
    name = f"{module}.weight"
    if shapes is not None:
        shape_of(builder.arrays.where, shapes, name)
    _add_module(builder, config, module, Place((name,)), keys, shapes)


def _add_module(
    builder: AdapterBuilder,
    config: Mapping[str, Any] | None,
    module: str,
    place: Place,
    keys: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]] | None,
) -> None:
    """Convert one module; where no config tells its scale, the file does."""
    name, shape = place.weights[0], None if shapes is None else _shape_at(place, shapes)
    parts = {_NAMED_BY_PEFT.get(part, part): builder.arrays.read(key) for part, key in keys.items()}
    is_turned = "lora_embedding_A" in keys or _is_turned(config or {}, parts, shape)
    _refuse_groups(name, parts)
    made = from_parts(name, parts, shape[::-1] if is_turned and shape is not None else shape)
    scale = _own_scale(made, parts) if config is None else _peft_scale(config, module, made.rank)
    _add_at(builder, place, _turned(made) if is_turned else made, scale, keys, shapes)


def _is_turned(config: Mapping[str, Any], parts: Mapping[str, np.ndarray], shape: tuple[int, ...] | None) -> bool:
    """Tell whether the weight is (in, out), as in transformers' Conv1D."""
    up, down = parts.get("lora_up.weight"), parts.get("lora_down.weight")
    if up is None or down is None or down.ndim != 2:
        return False
    found = (up.shape[0], down.shape[1])
    if shape is not None and found[0] != found[1]:
        return shape == found[::-1]
    return bool(config.get("fan_in_fan_out"))


def _refuse_groups(name: str, parts: Mapping[str, np.ndarray]) -> None:
    up, down = parts.get("lora_up.weight"), parts.get("lora_down.weight")
    if up is None or down is None or up.ndim < 3:
        return
    if up.shape[1] != down.shape[0] and up.shape[1] and down.shape[0] % up.shape[1] == 0:
        groups = down.shape[0] // up.shape[1]
        raise InputError(
            f"{name}: a LoRA of a convolution with {groups} groups; PEFT's change of it mixes all input channels and "
            "is not of the weight's shape"
        )


def _turned(made: Converted) -> Converted:
    """Exchange the two axes of a matrix."""
    core, (first, second) = made.tensor
    tensor = TuckerTensor(np.ascontiguousarray(core.T), (second, first))
    return made._replace(tensor=tensor, shape=made.shape[::-1])


def _peft_scale(config: Mapping[str, Any], module: str, rank: int | None) -> float:
    """Return α over the rank: that of a LoRA's tensors, else the config's."""
    is_lora = config.get("peft_type", "LORA") == "LORA"
    alpha_key = "lora_alpha" if is_lora else "alpha"
    alpha = _by_pattern(config, "alpha_pattern", module, config.get(alpha_key, 8))
    known = rank if is_lora else None
    divisor = _by_pattern(config, "rank_pattern", module, config.get("r", 8)) if known is None else known
    for option, value in ((alpha_key, alpha), ("r", divisor)):
        if isinstance(value, bool) or not isinstance(value, int | float) or (option == "r" and value <= 0):
            raise InputError(f"{CONFIG_NAME}: {option} of {module!r} is {value!r}; a number is needed")
    return alpha / (math.sqrt(divisor) if config.get("use_rslora") else divisor)


def _by_pattern(config: Mapping[str, Any], table: str, module: str, default: Any) -> Any:
    """Look a module up as PEFT does: the first pattern that matches the end of its name."""
    patterns = config.get(table) or {}
    if not isinstance(patterns, Mapping):
        raise InputError(f"{CONFIG_NAME}: {table} must be a table")
    for pattern, value in patterns.items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        except re.error as error:
            raise InputError(f"{CONFIG_NAME}: {table} has {pattern!r}, which cannot be read: {error}") from None
    return default


def from_diffusers(
    source: PathLike | Mapping[str, Any],
    *,
    base: BaseLike | None = None,
    prefix: str | None = None,
    allow_pickle: bool = False,
) -> Adapter:
    """Read a LoRA file of diffusers (`pytorch_lora_weights.safetensors`) as Tucker tensors, exactly; LoKr and LoHa too.

    The scales are those of the LoraConfig that newer versions of diffusers keep in the file, else α/r where the file
    holds α, else 1, as diffusers reads it.

    Parameters
    ----------
    source : path or mapping of str to array
        The file, or its tensors by name.
    base : path or mapping of str to array, optional
        The model's checkpoint or the pipeline's directory, or the model's parameters by name: names and shapes are
        checked against it. Needed for LoHa and LoKr of kernels.
    prefix : str, optional
        The model of the pipeline to convert, such as ``"unet"``; its name is taken off. By default all are converted.
    allow_pickle : bool, default False
        Whether pickle files are read, with ``weights_only=True``.

    Returns
    -------
    Adapter
        One entry a weight.

    Raises
    ------
    InputError
        If the file is damaged, holds what has no Tucker tensor of its own, or is for another base.
    OSError
        If a file cannot be read.

    References
    ----------
    Hu et al., *LoRA*, ICLR 2022, section 4.1.

    Examples
    --------
    >>> import numpy as np
    >>> file = {"unet.fc.lora_B.weight": np.ones((4, 2)), "unet.fc.lora_A.weight": np.ones((2, 3))}
    >>> adapter = from_diffusers(file, prefix="unet")
    >>> adapter.scales["fc.weight"], adapter["fc.weight"].shape
    (1.0, (4, 3))
    """
    arrays = NamedArrays("from_diffusers", source, allow_pickle)
    shapes, builder, configs = shapes_of(base), AdapterBuilder(arrays), _stored_configs(arrays)
    names = None if shapes is None else BaseNames(shapes)
    for module, keys in _dotted_modules(arrays, prefix).items():
        folder = next((f for f in configs if f and f"{prefix or module}.".startswith(f"{f}.")), "")
        own = module if prefix else module.removeprefix(f"{folder}.")
        place = Place((f"{module}.weight",)) if names is None else _in_base(arrays, module, names)
        _add_module(builder, configs.get(folder), own, place, keys, shapes)
    if not builder.tensors:
        raise InputError(f"{arrays.label}: holds no LoRA{f' of {prefix!r}' if prefix else ''}")
    return builder.adapter({})


def _stored_configs(arrays: NamedArrays) -> dict[str, dict[str, Any]]:
    """Read the configs that diffusers keeps in a file: one, or one for each model, by the model's folder."""
    text = arrays.metadata(METADATA_KEY)
    configs: dict[str, dict[str, Any]] = {}
    for key, value in (parse_json(text.encode(), f"{arrays.label}: {METADATA_KEY}") if text else {}).items():
        folder, _, option = key.rpartition(".")
        configs.setdefault(folder, {})[option] = value
    for config in configs.values():
        if config.get("peft_type") == "FLORA":
            raise InputError(
                f"{arrays.label}: a FLoRA that diffusers saved, without its scales and arrangements; save it with "
                "flora_torch.save_adapter"
            )
        if config.get("use_dora"):
            raise InputError(
                f"{arrays.label}: use_dora: DoRA's change depends on the base weight; merge and extract it"
            )
    return configs


def _dotted_modules(arrays: NamedArrays, prefix: str | None) -> dict[str, dict[str, str]]:
    """Sort the keys of the models that are meant by module and part."""
    modules: dict[str, dict[str, str]] = {}
    for key in arrays.names:
        name = key.removeprefix(PREFIX)
        if prefix is not None and not name.startswith(f"{prefix}."):
            continue
        found = dotted_part(name.removeprefix("" if prefix is None else f"{prefix}."))
        if found is None:
            is_dora = "magnitude" in name or "dora" in name
            why = "DoRA's change depends on the base weight" if is_dora else "no part of a LoRA"
            raise InputError(f"{arrays.label}: {key!r}: {why}; merge and extract such an adapter")
        modules.setdefault(found[0], {})[found[1]] = key
    return modules


def _in_base(arrays: NamedArrays, module: str, names: BaseNames) -> Place:
    """Return where in the base the module of a file is."""
    if (place := names.dotted(module)) is not None:
        return place
    folder, _, rest = module.partition(".")
    hint = f"pass prefix={folder!r} (--prefix)" if f"{rest}.weight" in names.shapes else names.hint([module])
    raise InputError(f"{arrays.label}: the base has no '{module}.weight', which the adapter changes; {hint}")


def _shape_at(place: Place, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """Return the shape of a module's weight, whose rows are in one weight of the base or in several."""
    first = shapes[place.weights[0]]
    return (sum(shapes[name][0] for name in place.weights), *first[1:])


def _add_at(
    builder: AdapterBuilder,
    place: Place,
    made: Converted,
    scale: float,
    keys: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]] | None,
) -> None:
    """Take a module's change, each of the base's weights its rows."""
    used = [key for part, key in keys.items() if part not in _NUMBERS]
    heights = [0 if shapes is None else shapes[name][0] for name in place.weights]
    for name, rows in zip(place.weights, rows_of(place, heights)):
        builder.add(name, made if rows is None else made.rows(name, rows), scale, used)


def from_lycoris(
    source: PathLike | Mapping[str, Any], base: BaseLike, *, prefix: str | None = None, allow_pickle: bool = False
) -> Adapter:
    """Read a LyCORIS or kohya file as Tucker tensors, exactly: LoRA, LoCon (Tucker too), LoHa, LoKr, full changes.

    A LoCon-Tucker is a Tucker tensor; a LoKr becomes a Tucker tensor of the arrangement ``(a b) (c d) -> (a c) …``, in
    which it has rank one; a LoHa has the Khatri-Rao products of its factors, of squared rank.

    Parameters
    ----------
    source : path or mapping of str to array
        A `.safetensors` file, or its tensors by name.
    base : path or mapping of str to array
        The model's checkpoint, or its parameters by name. The file's names have underscores for dots, and only the
        model tells which. For a file of several models it is the pipeline's directory, or a single file of the
        original code.
    prefix : str, optional
        The part of the names before the module's, such as ``"lora_unet"``; needed where the file has several and the
        base is one model.
    allow_pickle : bool, default False
        Whether pickle files are read, with ``weights_only=True``.

    Returns
    -------
    Adapter
        One entry a weight.

    Raises
    ------
    InputError
        If the file is damaged, a module is unknown to the base, or its tensors are of another method or of DoRA.
    ValueError
        If the file has several prefixes and none was chosen.
    OSError
        If a file cannot be read.

    References
    ----------
    Yeh et al., *Navigating text-to-image customization: from LyCORIS fine-tuning to model evaluation*, ICLR 2024.

    Examples
    --------
    >>> import numpy as np
    >>> file = {"lycoris_fc.lora_up.weight": np.ones((4, 2)), "lycoris_fc.lora_down.weight": np.ones((2, 3))}
    >>> adapter = from_lycoris(file | {"lycoris_fc.alpha": np.array(1.0)}, {"fc.weight": np.zeros((4, 3))})
    >>> adapter.scales["fc.weight"], adapter["fc.weight"].shape
    (0.5, (4, 3))
    """
    arrays = NamedArrays("from_lycoris", source, allow_pickle)
    shapes = shapes_of(base)
    assert shapes is not None
    modules: dict[str, dict[str, str]] = {}
    for key in arrays.names:
        module, _, part = key.partition(".")
        modules.setdefault(module, {})[part] = key
    roots = _roots("from_lycoris", arrays.label, modules, prefix, shapes)
    names, builder = BaseNames(shapes), AdapterBuilder(arrays)
    for mangled, keys in modules.items():
        chosen = next((p for p in roots if mangled.startswith(f"{p}_")), None)
        if chosen is None:
            continue
        places = names.places(chosen, mangled.removeprefix(f"{chosen}_"))
        if len(places) != 1:
            both = [place.weights[0] for place in places[:2]]
            why = f"stands for both {both[0]!r} and {both[1]!r}" if both else "is no weight of the base"
            raise InputError(f"{arrays.label}: the module {mangled!r} {why}; {names.hint([mangled])}")
        parts = {part: arrays.read(key) for part, key in keys.items()}
        made = from_parts(places[0].weights[0], parts, _shape_at(places[0], shapes))
        _add_at(builder, places[0], made, _own_scale(made, parts), keys, shapes)
    return builder.adapter({})


def _own_scale(made: Converted, parts: Mapping[str, np.ndarray]) -> float:
    """Return α/r where a file holds α, else 1."""
    if made.rank is None or "alpha" not in parts:
        return 1.0
    return float(parts["alpha"].reshape(-1)[0]) / made.rank


def _roots(
    where: str, label: str, modules: Collection[str], chosen: str | None, shapes: Mapping[str, Any]
) -> dict[str, str]:
    """Return the prefixes that are converted, each with what stands before its model's names in the base."""
    if chosen is not None:
        if not any(module.startswith(f"{chosen}_") for module in modules):
            raise InputError(f"{label}: no module has the prefix {chosen!r}; the first is {next(iter(modules), '')!r}")
        return {chosen: root_of(chosen, shapes)}
    found = {next((p for p in KOHYA if module.startswith(f"{p}_")), "") for module in modules}
    if "" in found or not found:
        first = next((m for m in modules if not m.startswith(tuple(f"{p}_" for p in KOHYA))), "")
        raise InputError(
            f"{label}: {first!r} is no module of a LyCORIS or kohya file; pass prefix if it has another one"
        )
    roots = {prefix: root_of(prefix, shapes) for prefix in sorted(found)}
    if len(found) > 1 and ("" in roots.values() or len(set(roots.values())) < len(roots)):
        raise ValueError(
            f"{where}: {label} has the prefixes {', '.join(sorted(found))}; pass prefix to choose one, or the "
            "pipeline's directory as base"
        )
    return roots


def from_official_flora(
    source: PathLike | Mapping[str, Any],
    *,
    scale: float,
    base: BaseLike | None = None,
    prefix: str = "model.",
    allow_pickle: bool = False,
) -> Adapter:
    """Read a state dict of the official FLoRA code (``param_G``, ``param_0``, …), exactly.

    Its modes are (in, out, *kernel) and become (out, in, *kernel). The frozen layers' tensors are passed over.

    Parameters
    ----------
    source : path or mapping of str to array
        The saved state dict.
    scale : float
        The multiplier that it was trained with; the file does not hold it. The published setting is 4.
    base : path or mapping of str to array, optional
        The model's checkpoint, or its parameters by name: names and shapes are checked against it.
    prefix : str
        What the wrapper put before the model's own names; taken off where all names have it, and where it leads to
        names of the base, if that is given.
    allow_pickle : bool, default False
        Whether pickle files are read, with ``weights_only=True``.

    Returns
    -------
    Adapter
        One entry a weight.

    Raises
    ------
    InputError
        If the file has no such tensors, or is damaged, or does not fit the base.
    OSError
        If a file cannot be read.

    References
    ----------
    Si et al. (FLoRA), ICLR 2025, equation 5, and its repository SJTU-DeepVisionLab/FLoRA, ``flora/layers.py``.

    Examples
    --------
    >>> import numpy as np
    >>> names = {"param_G": (2, 1), "param_0": (3, 2), "param_1": (5, 1)}
    >>> file = {f"model.fc.flora_layer.{name}": np.ones(shape) for name, shape in names.items()}
    >>> adapter = from_official_flora(file, scale=4.0)
    >>> adapter["fc.weight"].shape, adapter.scales["fc.weight"]
    ((5, 3), 4.0)
    """
    arrays = NamedArrays("from_official_flora", source, allow_pickle)
    shapes = shapes_of(base)
    modules: dict[str, dict[str, str]] = {}
    for key in arrays.names:
        found = re.fullmatch(r"(.+)\.flora_layer\.(param_(?:G|\d+))", key)
        if found:
            modules.setdefault(found[1], {})[found[2]] = key
    if not modules:
        raise InputError(f"{arrays.label}: has no flora_layer.param_G; it is no state dict of the official FLoRA code")
    strips = all(module.startswith(prefix) for module in modules)
    if strips and shapes is not None:
        strips = all(f"{module.removeprefix(prefix)}.weight" in shapes for module in modules)
    builder = AdapterBuilder(arrays)
    for module, keys in modules.items():
        name = f"{module.removeprefix(prefix) if strips else module}.weight"
        made = from_official(name, {part: arrays.read(key) for part, key in keys.items()})
        if shapes is not None and shape_of("from_official_flora", shapes, name) != made.shape:
            raise InputError(f"{name}: changes a weight of shape {made.shape}, but the base has {shapes[name]}")
        builder.add(name, made, float(scale), keys.values())
    return builder.adapter({})


def convert_adapter(
    source: PathLike,
    *,
    base: BaseLike | None = None,
    scale: float | None = None,
    prefix: str | None = None,
    allow_pickle: bool = False,
) -> Adapter:
    """Read an adapter of any format that is known, told apart by what the files hold.

    Parameters
    ----------
    source : path
        An adapter directory of ours, of PEFT or of diffusers, or a file of diffusers, LyCORIS, kohya's tools or the
        official FLoRA.
    base : path or mapping of str to array, optional
        As for the function that reads the format.
    scale : float, optional
        The multiplier of an official FLoRA; needed for it, and for no other.
    prefix : str, optional
        As for `from_diffusers`, `from_lycoris` and `from_official_flora`.
    allow_pickle : bool, default False
        Whether pickle files are read, with ``weights_only=True``.

    Returns
    -------
    Adapter
        Its changes as Tucker tensors.

    Raises
    ------
    ValueError
        If the format needs an option that is not given.
    InputError, OSError
        As for the function that reads the format.

    References
    ----------
    `from_peft_lora`, `from_diffusers`, `from_lycoris`, `from_official_flora` or `load_adapter`, which it calls.

    Examples
    --------
    >>> import tempfile, pathlib, numpy as np
    >>> t = TuckerTensor(np.ones((2, 3)), [np.ones((4, 2)), None])
    >>> from flora_tensor import to_peft_lora
    >>> path = to_peft_lora({"fc.weight": t}, pathlib.Path(tempfile.mkdtemp()) / "lora")
    >>> convert_adapter(path).shapes["fc.weight"]
    (4, 3)
    """
    path = Path(source)
    if (path / DIFFUSERS_NAME).exists() and not (path / CONFIG_NAME).exists():
        path = path / DIFFUSERS_NAME
    if path.is_dir():
        if not (path / CONFIG_NAME).exists() or read_json(path / CONFIG_NAME).get("peft_type") == "FLORA":
            return as_adapter(path)
        return from_peft_lora(path, base=base)
    arrays = NamedArrays("convert", path, allow_pickle)
    if any(".flora_layer.param_" in name for name in arrays.names):
        if scale is None:
            raise ValueError("convert: an official FLoRA file does not hold its scale; pass scale (--scale), such as 4")
        options: dict[str, Any] = {} if prefix is None else {"prefix": prefix}
        return from_official_flora(path, scale=scale, base=base, allow_pickle=allow_pickle, **options)
    if any(name.startswith(PREFIX) for name in arrays.names):
        raise InputError(f"{path}: holds an adapter of PEFT, whose alpha is in its config; pass the directory")
    is_dotted = any("." in part[0] for name in arrays.names if (part := dotted_part(name)))
    if is_dotted or any(".tucker_update." in name for name in arrays.names):
        return from_diffusers(path, base=base, prefix=prefix, allow_pickle=allow_pickle)
    if base is None:
        raise ValueError("convert: the names in such a file have underscores for dots; pass base (--base)")
    return from_lycoris(path, base, prefix=prefix, allow_pickle=allow_pickle)
