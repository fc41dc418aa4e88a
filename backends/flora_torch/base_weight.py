"""The weight of a base layer, however the layer keeps it: as a parameter, computed by a parametrization, or quantized.

An update changes the *dense* weight, with which the layer's product is taken. Where the layer keeps something else,
that weight can be read through the functions here and put in its place for one call, but never be written.
"""

import copy
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

__all__ = [
    "BaseWeight",
    "adaptable",
    "check_adaptable",
    "check_writable",
    "dense_value",
    "describe",
    "identity",
    "is_packed_for_inference",
    "is_quantized",
    "is_unpacked_linear",
    "own_parameter",
    "parametrizations_of",
    "plain_with",
    "weight_names",
]


@dataclass(frozen=True)
class BaseWeight:
    """What is known of a weight without forming it.

    Parameters
    ----------
    storage : {"plain", "computed", "quantized"}
        How the layer keeps it.
    shape : tuple of int
        The shape of the dense weight.
    dtype : torch.dtype
        The type of the dense weight, as far as it is known before it is formed.
    device : torch.device
        Where it is.
    form : callable
        Gives the dense weight, without a gradient; raises ValueError where no way is known.

    Examples
    --------
    >>> describe(nn.Linear(3, 2), "weight").shape
    (2, 3)
    """

    storage: Literal["plain", "computed", "quantized"]
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    form: Callable[[], Tensor]


def own_parameter(module: nn.Module, name: str) -> nn.Parameter | None:
    """Return a module's own parameter; ``None`` where it has none of this name, whatever else it has.

    Parameters
    ----------
    module : nn.Module
        The module.
    name : str
        The name.

    Returns
    -------
    nn.Parameter, of any shape, or None
        The parameter.

    Examples
    --------
    >>> own_parameter(nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)), "weight") is None
    True
    """
    table: dict[str, nn.Parameter | None] = module.__dict__["_parameters"]
    return table.get(name)


def weight_names(module: nn.Module) -> tuple[str, ...]:
    """List a module's own parameters, and the weights that it computes or unpacks from them.

    Examples
    --------
    >>> weight_names(nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)))
    ('bias', 'weight')
    """
    own = [name for name, _ in module.named_parameters(recurse=False, remove_duplicate=False)]
    computed = list(parametrizations_of(module))
    unpacked = ["weight"] if is_unpacked_linear(module) else []
    return (*own, *computed, *unpacked)


def describe(module: nn.Module, name: str) -> BaseWeight | None:
    """Tell what is known of a weight of a module; ``None`` where it has none of this name.

    Examples
    --------
    >>> describe(nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)), "weight").storage
    'computed'
    >>> describe(nn.ReLU(), "weight") is None
    True
    """
    if name in parametrizations_of(module):
        value = _computed(module, name)
        return BaseWeight("computed", tuple(value.shape), value.dtype, value.device, lambda: value)
    if name == "weight" and (packed := _quantized(module)) is not None:
        return packed
    weight = dict(module.named_parameters(recurse=False, remove_duplicate=False)).get(name)
    if weight is None:
        return None
    shape = () if nn.parameter.is_lazy(weight) else tuple(weight.shape)
    return BaseWeight("plain", shape, weight.dtype, weight.device, lambda: weight.detach())


def check_adaptable(where: str, module: nn.Module, parameter: str) -> BaseWeight:
    """Refuse a weight that a Tucker update cannot change, without forming it.

    Raises
    ------
    ValueError
        As for `adaptable`.

    Examples
    --------
    >>> check_adaptable("here", nn.Linear(3, 2), "weight").storage
    'plain'
    """
    base, weight = type(module).__name__, describe(module, parameter)
    if is_packed_for_inference(module):
        raise ValueError(
            f"{where}: {base} of {type(module).__module__.rpartition('.')[0]} is packed for inference and passes no "
            "gradient on; adapt the float model, merge, and quantize the result"
        )
    if weight is None:
        known = ", ".join(weight_names(module)) or "none"
        hint = ""
        if parameter not in module.__dict__["_buffers"] and isinstance(getattr(module, parameter, None), Tensor):
            hint = ", which a hook computes it from; use torch.nn.utils.parametrizations, or make it permanent first"
        raise ValueError(f"{where}: {base} has no parameter {parameter!r} of its own; it has {known}{hint}")
    own = own_parameter(module, parameter)
    if own is not None and nn.parameter.is_lazy(own):
        raise ValueError(f"{where}: {parameter!r} of {base} has no shape yet; run the model once, then adapt it")
    if weight.device.type == "meta":
        raise ValueError(
            f"{where}: {parameter!r} of {base} is on the meta device and has no values; load the model first"
        )
    if not weight.dtype.is_floating_point or weight.dtype.itemsize < 2:
        raise ValueError(
            f"{where}: {parameter!r} of {base} is of type {weight.dtype}; real floats of 16 bits or more are needed"
        )
    if len(weight.shape) < 2:
        raise ValueError(f"{where}: {parameter!r} of {base} has shape {weight.shape}; an update needs two axes or more")
    if math.prod(weight.shape) == 0:
        raise ValueError(f"{where}: {parameter!r} of {base} has shape {weight.shape}, which holds no number to change")
    return weight


def is_packed_for_inference(module: nn.Module) -> bool:
    """Tell whether a module is a quantized one of torch.ao, whose packed weight passes no gradient on.

    Examples
    --------
    >>> is_packed_for_inference(nn.Linear(3, 2))
    False
    """
    here = type(module).__module__.startswith(("torch.ao.nn.quantized", "torch.nn.quantized"))
    return here and callable(getattr(module, "weight", None))


def adaptable(where: str, module: nn.Module, parameter: str, *, values: bool = True) -> Tensor:
    """Return the dense value of a weight that a Tucker update can change.

    Parameters
    ----------
    where : str
        What error messages begin with.
    module : nn.Module
        The module.
    parameter : str
        What the module calls the weight.
    values : bool
        Whether the entries are wanted; otherwise a weight that is not a parameter is not formed, and the result has
        its shape, type and device alone.

    Returns
    -------
    Tensor, of the dense weight's shape
        The parameter itself, or what is computed or dequantized from others.

    Raises
    ------
    ValueError
        If there is none of that name, or it has no values, is no real float of 16 bits or more, has fewer than two
        axes or no entries, or is packed in a way that nothing is known of.

    Examples
    --------
    >>> adaptable("here", nn.Linear(3, 2), "weight").shape
    torch.Size([2, 3])
    """
    weight = check_adaptable(where, module, parameter)
    if weight.storage == "plain":
        return module.get_parameter(parameter)
    if not values:
        return torch.zeros((), dtype=weight.dtype, device=weight.device).expand(weight.shape)
    try:
        return weight.form()
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def check_writable(where: str, module: nn.Module, parameter: str, *, instead: str) -> nn.Parameter:
    """Return a parameter that holds the weight as it is used, so that another one can be written there.

    Raises
    ------
    ValueError
        If the weight is quantized, or computed from other parameters; the message names what to call ``instead``.

    Examples
    --------
    >>> check_writable("here", nn.Linear(3, 2), "weight", instead="merge").shape
    torch.Size([2, 3])
    """
    if is_quantized(module):
        # Its values are at the centers of their cells, and a fine-tuning seldom moves one out: quantized to 4 bits
        # again (NF4), a change of up to 3 % of the weight's norm came back with an error of 107 % of itself.
        raise ValueError(
            f"{where} is quantized, and the sum would be rounded to its few values; keep the adapter beside it, or use "
            f"{instead}, which makes a float layer"
        )
    own = own_parameter(module, parameter)
    if own is None:
        raise ValueError(
            f"{where} is computed by {type(module).__name__} from other parameters, and nothing can be added to it "
            f"where it is; use {instead}, or torch.nn.utils.parametrize.remove_parametrizations before attaching"
        )
    return own


def dense_value(module: nn.Module, name: str) -> Tensor:
    """Return the dense weight as the layer uses it now.

    Parameters
    ----------
    module : nn.Module
        The layer.
    name : str
        The weight.

    Returns
    -------
    Tensor, of the dense weight's shape
        The parameter itself, the computed tensor, or the dequantized one.

    Examples
    --------
    >>> dense_value(nn.Linear(3, 2), "weight").shape
    torch.Size([2, 3])
    """
    packed = _quantized(module) if name == "weight" else None
    return getattr(module, name) if packed is None else packed.form()


def is_quantized(module: nn.Module) -> bool:
    """Tell whether a layer keeps its ``weight`` quantized.

    Examples
    --------
    >>> is_quantized(nn.Linear(3, 2))
    False
    """
    return _quantized(module) is not None


def identity(module: nn.Module, name: str) -> int:
    """Return what two names of one weight have in common: the same number for tied parameters.

    Examples
    --------
    >>> one, other = nn.Linear(3, 2), nn.Linear(3, 2)
    >>> other.weight = one.weight
    >>> identity(one, "weight") == identity(other, "weight")
    True
    """
    weight = own_parameter(module, name)
    # A computed weight is a new tensor at every use: what stays is the module that computes it.
    return id(module) if weight is None else id(weight)


def plain_with(module: nn.Module, values: Mapping[str, Tensor]) -> nn.Module:
    """Return a module that keeps new values in the places of some of its weights, and shares everything else.

    A parametrization stays if it can hold the new value (weight normalization can) and goes if it cannot (spectral
    normalization). A quantized layer becomes a float one.

    Parameters
    ----------
    module : nn.Module
        The module, which stays as it is.
    values : mapping of str to Tensor
        The weights, in their dense shapes.

    Returns
    -------
    nn.Module
        The new module.

    Examples
    --------
    >>> plain_with(nn.Linear(2, 1), {"weight": torch.ones(1, 2)}).weight.tolist()
    [[1.0, 1.0]]
    """
    if "weight" in values and is_quantized(module) and not _has_plain_class(module):
        return _float_layer(module, values["weight"])
    computed = [name for name in values if name in parametrizations_of(module)]
    clone = _with_held(module, values, computed) if computed else _shallow(module)
    for name, value in values.items():
        if name not in computed:
            setattr(clone, name, nn.Parameter(value, requires_grad=_requires_grad(module, name)))
    return clone


def _requires_grad(module: nn.Module, name: str) -> bool:
    weight = own_parameter(module, name)
    return weight is not None and weight.requires_grad


def _shallow(module: nn.Module) -> Any:
    kind: Any = type(module)
    clone: Any = kind.__new__(kind) if parametrize.is_parametrized(module) else copy.copy(module)
    clone.__dict__.update(vars(module))
    # A shallow copy shares the dictionaries themselves, and the list in which a recurrent layer keeps its weights.
    for table in ("_parameters", "_buffers", "_modules"):
        clone.__dict__[table] = dict(module.__dict__[table])
    clone.__dict__.update({key: list(value) for key, value in vars(module).items() if type(value) is list})
    return clone


# --- computed weights --------------------------------------------------------------------------------


def parametrizations_of(module: nn.Module) -> Mapping[str, nn.Module]:
    """Return what computes the weights of a module that are computed, by their names.

    Examples
    --------
    >>> list(parametrizations_of(nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))))
    ['weight']
    """
    found: Any = module.__dict__["_modules"].get("parametrizations") if parametrize.is_parametrized(module) else None
    return {} if found is None else dict(found.items())


def _computed(module: nn.Module, name: str) -> Tensor:
    """Compute a weight and change nothing: in training, a spectral norm moves its vectors whenever it is read."""
    parts = list(parametrizations_of(module)[name].modules())
    training = [part.training for part in parts]
    for part in parts:
        part.training = False
    try:
        with torch.no_grad():
            return getattr(module, name)
    finally:
        for part, mode in zip(parts, training):
            part.training = mode


def _with_held(module: nn.Module, values: Mapping[str, Tensor], computed: list[str]) -> Any:
    """Return a copy whose parametrizations hold the new values, or else one without parametrizations."""
    tables: Any = vars(module)
    kept = [*tables["_parameters"].values(), *tables["_buffers"].values()]
    kept += [child for name, child in tables["_modules"].items() if name != "parametrizations"]
    clone = copy.deepcopy(module, {id(part): part for part in kept if part is not None})
    if all(_holds(clone, name, values[name]) for name in computed):
        return clone
    # Not `remove_parametrizations`: it takes the property from the class, which the copy shares with the base.
    kind: Any = parametrize.type_before_parametrizations(module)
    plain: Any = kind.__new__(kind)
    plain.__dict__.update(vars(_shallow(module)))
    del plain._modules["parametrizations"]
    for name in parametrizations_of(module):
        value = values[name] if name in values else _computed(module, name)
        plain.register_parameter(name, nn.Parameter(value, requires_grad=False))
    return plain


def _holds(clone: nn.Module, name: str, value: Tensor) -> bool:
    """Assign to a parametrized weight, and tell whether it gives the same value back, to a few roundings."""
    try:
        with torch.no_grad():
            setattr(clone, name, value)
    except (NotImplementedError, RuntimeError, ValueError):
        # There is no inverse, or not for this value.
        return False
    error = (_computed(clone, name).double() - value.double()).norm()
    return bool(error <= 8 * torch.finfo(value.dtype).eps * value.double().norm())


# --- quantized weights -------------------------------------------------------------------------------


def _quantized(module: nn.Module) -> BaseWeight | None:
    """Describe a quantized ``weight`` through the hooks of the libraries that are known, none of which is imported."""
    weight: Any = own_parameter(module, "weight")
    if weight is None:
        return _unpacked_linear(module) if is_unpacked_linear(module) else None
    kinds = {kind.__name__ for kind in type(weight).__mro__}
    if kinds & {"Params4bit", "Int8Params"}:
        return _of_bitsandbytes(module, weight)
    # Every tensor has this method; a tensor class for quantized values brings its own.
    if type(weight).dequantize is not Tensor.dequantize:
        return BaseWeight("quantized", tuple(weight.shape), weight.dtype, weight.device, lambda: _dequantized(weight))
    is_packed = not weight.dtype.is_floating_point or weight.dtype.itemsize < 2
    if is_packed and isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward:
        return _described(module, weight, None, _refusal(module))
    return None


def _dequantized(weight: Any) -> Tensor:
    with torch.no_grad():
        return weight.dequantize().detach()


def _refusal(module: nn.Module) -> Callable[[], Tensor]:
    def form() -> Tensor:
        raise ValueError(
            f"the weight of this {type(module).__name__} is quantized, and no way to dequantize it is known; keep the "
            "adapter beside it, or attach it to the float model and merge there"
        )

    return form


def _described(module: Any, packed: Tensor, dtype: torch.dtype | None, form: Callable[[], Tensor]) -> BaseWeight:
    bias: Tensor | None = getattr(module, "bias", None)
    # Packed weights say nothing of the type that the layer computes in; a bias does.
    known = dtype or (torch.float32 if bias is None or not bias.is_floating_point() else bias.dtype)
    names = ("num_embeddings", "embedding_dim") if isinstance(module, nn.Embedding) else ("out_features", "in_features")
    shape = tuple(int(getattr(module, name)) for name in names)
    return BaseWeight("quantized", shape, known, packed.device, lambda: form().to(known))


def _of_bitsandbytes(module: Any, weight: Any) -> BaseWeight:
    def form() -> Tensor:
        functional = sys.modules["bitsandbytes"].functional
        if weight.dtype.is_floating_point:
            return weight.detach()
        with torch.no_grad():
            if hasattr(weight, "quant_state"):
                return functional.dequantize_4bit(*_unpacked_4bit(functional, weight)).detach()
            # The first call moves the scales from the weight to the layer's state.
            scales = module.state.SCB if weight.SCB is None else weight.SCB
            return functional.int8_vectorwise_dequant(weight.data, scales).detach()

    state = getattr(weight, "quant_state", None)
    dtype = getattr(state, "original_dtype", None) or getattr(state, "dtype", None)
    return _described(module, weight, dtype, form)


def _unpacked_4bit(functional: Any, weight: Any) -> tuple[Tensor, Any]:
    """Return 4-bit values in the order that they are dequantized from: some processors reorder them for inference."""
    if not getattr(weight.quant_state, "packing_format_for_cpu", False):
        return weight.data, weight.quant_state
    # It writes to the state that it is given, and leaves the scales as they were reordered, in 16 bits.
    values, state = functional._convert_weight_packed_for_cpu_inverse(weight.data, copy.deepcopy(weight.quant_state))
    if not state.nested and state.absmax.dim() == 2:
        state.absmax = state.absmax.T.reshape(-1).float()
    return values, state


def is_unpacked_linear(module: Any) -> bool:
    """Tell whether a module is a linear layer without a ``weight`` that can tell what its weight would be.

    Examples
    --------
    >>> is_unpacked_linear(nn.Linear(3, 2))
    False
    """
    if isinstance(module, (nn.Linear, nn.Embedding)) or "weight" in module._parameters:
        return False
    sizes = (getattr(module, "in_features", None), getattr(module, "out_features", None))
    return all(type(size) is int for size in sizes) and callable(getattr(module, "dequantize", None))


def _unpacked_linear(module: Any) -> BaseWeight:
    tensors = [*module._parameters.values(), *module._buffers.values()]
    packed = next((tensor for tensor in tensors if tensor is not None), torch.empty(0))
    dtype = getattr(module, "compute_dtype", None)
    known = dtype if isinstance(dtype, torch.dtype) else None
    return _described(module, packed, known, lambda: _dequantized(module))


def _has_plain_class(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.nn.")


def _float_layer(module: Any, value: Tensor) -> nn.Module:
    """Return a float layer in the place of a quantized one."""
    bias: Tensor | None = getattr(module, "bias", None)
    rows, columns = value.shape
    if isinstance(module, nn.Embedding):
        layer: Any = nn.Embedding(rows, columns, module.padding_idx, device="meta")
    else:
        layer = nn.Linear(columns, rows, bias=False, device="meta")
    layer.weight = nn.Parameter(value, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return layer.train(module.training)
