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

from flora_tensor._adapter_config import CONFIG_NAME
from flora_tensor._adapter_keys import PREFIX
from flora_tensor._adapter_shards import MODEL_NAME
from flora_tensor._arrays import to_numpy
from flora_tensor._errors import InputError
from flora_tensor._files import read_json
from flora_tensor._lora_parts import Converted, from_official, from_parts
from flora_tensor._safetensors import FLOATS, dtype_code
from flora_tensor._typing import PathLike
from flora_tensor._whole import BaseLike, widest_code
from flora_tensor.adapter import Adapter
from flora_tensor.adapter_file import as_adapter, fitting_core
from flora_tensor.arrangement import Arrangement
from flora_tensor.checkpoint import open_checkpoint
from flora_tensor.tucker_tensor import TuckerTensor

__all__ = [
    "convert_adapter",
    "from_lycoris",
    "from_official_flora",
    "from_peft_lora",
]

_KOHYA = ("lycoris", "lora_unet", "lora_te1", "lora_te2", "lora_te", "lora_transformer")
# The names of PEFT's LoRA tensors, and those of LyCORIS for the same.
_LORA = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight"}
_EMBEDDING = {"lora_embedding_A": "lora_down.weight", "lora_embedding_B": "lora_up.weight"}


class _Arrays:
    """The tensors of a file or a state dict: float arrays that are finite, and the types they are stored in."""

    def __init__(self, where: str, source: PathLike | Mapping[str, Any], allow_pickle: bool = False) -> None:
        self.where = where
        if isinstance(source, Mapping):
            self._table, self._file = source, None
            self.names = tuple(source)
            self.label = "the state dict"
        else:
            self._table, self._file = {}, open_checkpoint(source, allow_pickle=allow_pickle)
            self.names = self._file.names()
            self.label = str(source)

    def code(self, name: str) -> str:
        """Return the type that a tensor is stored in."""
        return self._file.info(name).dtype if self._file else dtype_code(self._table[name].dtype)

    def read(self, name: str) -> np.ndarray:
        """Return one tensor; what is not a finite float is refused."""
        if self.code(name) not in FLOATS:
            raise InputError(f"{self.label}: {name!r} is of type {self.code(name)}; floats are needed")
        array = self._file.read(name) if self._file else to_numpy(self._table[name])
        if not np.isfinite(array).all():
            raise InputError(f"{self.label}: {name!r} has NaN or infinite entries; the adapter is damaged")
        return array.astype(np.float32) if array.dtype == np.float16 else array


class _Builder:
    """An adapter under construction."""

    def __init__(self, arrays: _Arrays) -> None:
        self.arrays = arrays
        self.tensors: dict[str, TuckerTensor] = {}
        self.arrangements: dict[str, Arrangement] = {}
        self.scales: dict[str, float] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self.whole: dict[str, np.ndarray] = {}

    def add(self, name: str, made: Converted, scale: float, keys: Collection[str]) -> None:
        """Take a converted weight; what was computed is stored in float32 at least."""
        code = widest_code([self.arrays.code(key) for key in keys])
        if not made.is_copied:
            code = "F64" if code == "F64" else "F32"
        core, exponent = fitting_core(self.arrays.where, name, made.tensor.core, code)
        kind = np.float64 if code == "F64" else np.float32
        tensor = TuckerTensor(core, made.tensor.factors).map(lambda a: a.astype(kind, copy=False))
        self.tensors[name], self.arrangements[name], self.shapes[name] = tensor, made.arrangement, made.shape
        self.scales[name], self.dtypes[name] = math.ldexp(scale, exponent), code

    def keep_whole(self, name: str, key: str) -> None:
        """Take a tensor with its new value."""
        self.whole[name], self.dtypes[name] = self.arrays.read(key), self.arrays.code(key)

    def adapter(self, config: Mapping[str, Any]) -> Adapter:
        """Put the adapter together."""
        return Adapter(
            self.tensors,
            arrangements=self.arrangements,
            scales=self.scales,
            shapes=self.shapes,
            whole=self.whole,
            config=config,
            dtypes=self.dtypes,
        )


def _shapes(base: BaseLike | None) -> dict[str, tuple[int, ...]] | None:
    if base is None:
        return None
    if isinstance(base, Mapping):
        return {name: tuple(array.shape) for name, array in base.items()}
    checkpoint = open_checkpoint(base)
    return {name: checkpoint.info(name).shape for name in checkpoint.names()}


def _shape_of(where: str, shapes: Mapping[str, tuple[int, ...]], name: str) -> tuple[int, ...]:
    if name not in shapes:
        raise InputError(f"{where}: the base has no {name!r}, which the adapter changes; pass the base it is for")
    return shapes[name]


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
    arrays = _Arrays("from_peft_lora", directory / MODEL_NAME)
    shapes = _shapes(base)
    if kind != "LORA" and shapes is None:
        raise ValueError(f"from_peft_lora: {kind} tensors do not tell a kernel's shape; pass base (--base)")
    builder = _Builder(arrays)
    for module, keys in _peft_modules(arrays, builder).items():
        _add_peft_module(builder, config, module, keys, shapes)
    if not builder.tensors and not builder.whole:
        raise InputError(f"{directory}: holds no adapter tensors")
    kept = {k: config[k] for k in ("base_model_name_or_path", "task_type") if config.get(k) is not None}
    return builder.adapter(kept)


def _peft_modules(arrays: _Arrays, builder: _Builder) -> dict[str, dict[str, str]]:
    """Sort a PEFT file's keys by module; what is stored in full goes to the builder at once."""
    modules: dict[str, dict[str, str]] = {}
    parts = r"lora_[AB]\.weight|lora_embedding_[AB]|hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t2)"
    for key in arrays.names:
        name = key.removeprefix(PREFIX)
        found = re.fullmatch(rf"(?:(.+)\.)?({parts})", name)
        if found and found[1]:
            modules.setdefault(found[1], {})[found[2]] = key
        elif re.search(r"(^|\.)(lora_|hada_|lokr_)", name):
            why = "DoRA's change depends on the base weight" if "magnitude" in name else "it has no Tucker tensor"
            raise InputError(f"{arrays.label}: {key!r}: {why}; merge and extract such an adapter")
        else:
            builder.keep_whole(name.replace(".base_layer.", "."), key)
    return modules


def _add_peft_module(
    builder: _Builder, config: Mapping[str, Any], module: str, keys: Mapping[str, str], shapes: Any
) -> None:
    if ".base_layer" in f".{module}":
        raise InputError(f"{builder.arrays.label}: {module!r} adapts a parameter by name, which cannot be converted")
    name = f"{module}.weight"
    shape = None if shapes is None else _shape_of(builder.arrays.where, shapes, name)
    standard = {**_LORA, **_EMBEDDING}
    parts = {standard.get(part, part): builder.arrays.read(key) for part, key in keys.items()}
    is_turned = "lora_embedding_A" in keys or _is_turned(config, parts, shape)
    own = shape[::-1] if is_turned and shape is not None else shape
    _refuse_groups(name, parts)
    made = from_parts(name, parts, own)
    rank = made.rank if config["peft_type"] == "LORA" else None
    scale = _peft_scale(config, module, rank)
    builder.add(name, _turned(made) if is_turned else made, scale, keys.values())


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
    alpha_key = "lora_alpha" if config["peft_type"] == "LORA" else "alpha"
    alpha = _by_pattern(config, "alpha_pattern", module, config.get(alpha_key, 8))
    divisor = _by_pattern(config, "rank_pattern", module, config.get("r", 8)) if rank is None else rank
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
        model tells which.
    prefix : str, optional
        The part of the names before the module's, such as ``"lora_unet"``; needed where the file has several.
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
    arrays = _Arrays("from_lycoris", source, allow_pickle)
    shapes = _shapes(base)
    assert shapes is not None
    modules: dict[str, dict[str, str]] = {}
    for key in arrays.names:
        module, _, part = key.partition(".")
        modules.setdefault(module, {})[part] = key
    chosen = _prefix("from_lycoris", arrays.label, modules, prefix)
    table = _mangled(shapes)
    builder = _Builder(arrays)
    for mangled, keys in modules.items():
        if not mangled.startswith(f"{chosen}_"):
            continue
        names = table.get(mangled.removeprefix(f"{chosen}_"), [])
        if len(names) != 1:
            why = f"stands for both {names[0]!r} and {names[1]!r}" if names else "is no weight of the base"
            raise InputError(f"{arrays.label}: the module {mangled!r} {why}; pass the base that the file is for")
        parts = {part: arrays.read(key) for part, key in keys.items()}
        made = from_parts(names[0], parts, shapes[names[0]])
        scale = 1.0
        if made.rank is not None and "alpha" in parts:
            scale = float(parts["alpha"].reshape(-1)[0]) / made.rank
        builder.add(names[0], made, scale, [key for part, key in keys.items() if part not in ("alpha", "scalar")])
    return builder.adapter({})


def _prefix(where: str, label: str, modules: Collection[str], chosen: str | None) -> str:
    if chosen is not None:
        if not any(module.startswith(f"{chosen}_") for module in modules):
            raise InputError(f"{label}: no module has the prefix {chosen!r}; the first is {next(iter(modules), '')!r}")
        return chosen
    found = {next((p for p in _KOHYA if module.startswith(f"{p}_")), "") for module in modules}
    if "" in found or not found:
        first = next((m for m in modules if not m.startswith(tuple(f"{p}_" for p in _KOHYA))), "")
        raise InputError(
            f"{label}: {first!r} is no module of a LyCORIS or kohya file; pass prefix if it has another one"
        )
    if len(found) > 1:
        raise ValueError(f"{where}: {label} has the prefixes {', '.join(sorted(found))}; pass prefix to choose one")
    return found.pop()


def _mangled(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, list[str]]:
    table: dict[str, list[str]] = {}
    for name, shape in shapes.items():
        module, _, parameter = name.rpartition(".")
        if parameter == "weight" and module and len(shape) >= 2:
            table.setdefault(module.replace(".", "_"), []).append(name)
    return table


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
    arrays = _Arrays("from_official_flora", source, allow_pickle)
    shapes = _shapes(base)
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
    builder = _Builder(arrays)
    for module, keys in modules.items():
        name = f"{module.removeprefix(prefix) if strips else module}.weight"
        made = from_official(name, {part: arrays.read(key) for part, key in keys.items()})
        if shapes is not None and _shape_of("from_official_flora", shapes, name) != made.shape:
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
        An adapter directory of ours or of PEFT, or a file of LyCORIS, kohya's tools or the official FLoRA.
    base : path or mapping of str to array, optional
        As for the function that reads the format.
    scale : float, optional
        The multiplier of an official FLoRA; needed for it, and for no other.
    prefix : str, optional
        As for `from_lycoris` and `from_official_flora`.
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
    `from_peft_lora`, `from_lycoris`, `from_official_flora` and `load_adapter`, one of which is called.

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
    if path.is_dir():
        if not (path / CONFIG_NAME).exists() or read_json(path / CONFIG_NAME).get("peft_type") == "FLORA":
            return as_adapter(path)
        return from_peft_lora(path, base=base)
    arrays = _Arrays("convert", path, allow_pickle)
    if any(".flora_layer.param_" in name for name in arrays.names):
        if scale is None:
            raise ValueError("convert: an official FLoRA file does not hold its scale; pass scale (--scale), such as 4")
        options: dict[str, Any] = {} if prefix is None else {"prefix": prefix}
        return from_official_flora(path, scale=scale, base=base, allow_pickle=allow_pickle, **options)
    if any(re.search(r"\.lora_[AB]\.", name) for name in arrays.names):
        raise InputError(f"{path}: holds a LoRA of PEFT, whose alpha is in its config; pass the directory")
    if base is None:
        raise ValueError("convert: the names in such a file have underscores for dots; pass base (--base)")
    return from_lycoris(path, base, prefix=prefix, allow_pickle=allow_pickle)
