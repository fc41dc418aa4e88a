"""What the core needs to know of arrays, whatever library they come from.

The namespace is looked up per call (`array_namespace`): there is no registry and no global backend. Nothing here
imports torch or jax unless the caller has already given us one of their arrays.
"""

import math
import sys
from collections.abc import Sequence
from typing import Any

import array_api_compat
import numpy as np

from flora_tensor._typing import Array, DType, Namespace

__all__ = [
    "accumulation_dtype",
    "array_namespace",
    "conjugate",
    "epsilon",
    "float_squares",
    "hermitian",
    "host_numbers",
    "host_squares",
    "host_view",
    "is_complex",
    "is_differentiated",
    "is_exact",
    "is_low_precision",
    "is_torch",
    "largest_magnitude",
    "power_of_two",
    "promote",
    "result_dtype",
    "squared_norm",
    "stop_gradient",
    "suffix_sums",
    "times_power_of_two",
    "to_numpy",
    "widest_dtype",
    "working_dtype",
]


def array_namespace(where: str, *arrays: Array | None) -> Namespace:
    """Return the array-API namespace that all ``arrays`` share; ``None`` entries are skipped.

    Torch is looked up first and by hand: `torch.compile` warns when it traces the cached general look-up.
    """
    given = [a for a in arrays if a is not None]
    torch = sys.modules.get("torch")
    if torch is not None and given and all(isinstance(a, torch.Tensor) for a in given):
        import array_api_compat.torch as torch_namespace

        _refuse_unfit_tensors(where, torch, given)
        return torch_namespace
    try:
        xp = array_api_compat.array_namespace(*given)
    except TypeError as error:
        raise TypeError(_no_arrays(where, given)) from error
    _refuse_unfit(where, given)
    return xp


def _no_arrays(where: str, given: Sequence[Any]) -> str:
    kinds = ", ".join(sorted({f"{type(a).__module__.split('.')[0]}.{type(a).__name__}" for a in given}))
    advice = ", such as numpy.asarray(x)" if not kinds or "builtins." in kinds else ""
    return f"{where}: got {kinds or 'nothing'}; pass arrays of one library (NumPy, PyTorch, JAX, CuPy, …){advice}"


# Codes of NumPy's booleans, integers, and real and complex floats that LAPACK or a cast to its types takes.
_NUMBERS = frozenset("?bBhHiIlLqQefdFD")


def _is_plain(x: Any) -> bool:
    return type(x) is np.ndarray and x.dtype.char in _NUMBERS


def _refuse_unfit(where: str, arrays: Sequence[Array]) -> None:
    """Refuse arrays that the array-API functions take, but without dense numbers that LAPACK could factorize."""
    for a in arrays:
        if _is_plain(a):  # most are
            continue
        if isinstance(a, int | float | complex) and not isinstance(a, np.generic):  # array_api_compat skips them
            raise TypeError(_no_arrays(where, arrays))
        if is_torch(a):
            _refuse_unfit_tensors(where, sys.modules["torch"], [a])
        elif isinstance(a, np.ma.MaskedArray):
            raise TypeError(f"{where}: got a masked array; pass one without gaps, as x.filled(0) gives")
        elif isinstance(a, np.matrix):
            raise TypeError(f"{where}: got a numpy.matrix; pass numpy.asarray(x)")
        elif isinstance(a, np.ndarray) and _is_unfit(a.dtype):
            raise TypeError(
                f"{where}: got an array of type {a.dtype}; pass numbers of up to 64 bits, as x.astype('float64') gives "
                "('complex128' for complex ones)"
            )
        elif isinstance(a.dtype, np.dtype) and a.dtype.itemsize == 1 and a.dtype.name not in ("bool", "int8", "uint8"):
            raise TypeError(_too_short(where, a.dtype.name, "x.astype('float32') gives"))


def _is_unfit(dtype: Any) -> bool:
    """Tell whether a NumPy type is none of numbers, or of longer ones than LAPACK takes; ml_dtypes' short ones pass."""
    most = 16 if dtype.kind == "c" else 8
    return dtype.kind in "OSUMm" or dtype.names is not None or dtype.itemsize > most


def _too_short(where: str, dtype: str, wide: str) -> str:
    """Word the refusal of the 8-bit types and shorter ones, which libraries store and move but hardly compute in."""
    return (
        f"{where}: got an array of type {dtype}, which factors and cores are not stored in; pass its numbers in "
        f"float32, as {wide} them, times their scale where the checkpoint has one"
    )


def _refuse_unfit_tensors(where: str, torch: Any, tensors: Sequence[Any]) -> None:
    for a in tensors:
        if a.dtype.itemsize == 1 and a.dtype not in (torch.bool, torch.int8, torch.uint8) and not a.is_quantized:
            raise TypeError(_too_short(where, str(a.dtype).removeprefix("torch."), "x.float() gives"))
        if a.layout != torch.strided:
            raise TypeError(f"{where}: got a tensor of layout {a.layout}; pass a dense one, as x.to_dense() gives")
        if a.is_quantized:
            raise TypeError(f"{where}: got a quantized tensor; pass its numbers, as x.dequantize() gives them")


def is_torch(x: Array) -> bool:
    """Tell whether ``x`` is a torch tensor, by a test that `torch.compile` can trace."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.Tensor)


def is_complex(xp: Namespace, dtype: DType) -> bool:
    """Tell whether ``dtype`` is a complex floating type."""
    if isinstance(dtype, np.dtype):
        return dtype.kind == "c"
    return not is_low_precision(dtype) and bool(xp.isdtype(dtype, "complex floating"))


def is_low_precision(dtype: DType) -> bool:
    """Tell whether ``dtype`` is a floating type of fewer than 32 bits.

    Told by name: NumPy's own ``isdtype`` refuses the bfloat16 that the package ml_dtypes adds.
    """
    if isinstance(dtype, np.dtype) and dtype.kind in "biufc" and dtype.itemsize >= 4:  # names take time to form
        return False
    return str(dtype).rsplit(".", maxsplit=1)[-1] in ("float16", "bfloat16")


def is_exact(xp: Namespace, dtype: DType) -> bool:
    """Tell whether ``dtype`` holds integers or booleans, which have neither NaN nor rounding."""
    return not is_low_precision(dtype) and bool(xp.isdtype(dtype, ("integral", "bool")))


def working_dtype(xp: Namespace, dtype: DType) -> DType:
    """Return the type to factorize in: float32 for shorter floats, the default float for integers, else itself."""
    if is_exact(xp, dtype):
        return default_float(xp)
    return xp.float32 if is_low_precision(dtype) else dtype


def result_dtype(xp: Namespace, dtype: DType) -> DType:
    """Return the type that results of a factorization of ``dtype`` have: floats keep theirs, integers are promoted."""
    return default_float(xp) if is_exact(xp, dtype) else dtype


def default_float(xp: Namespace) -> DType:
    """Return the library's default real floating type."""
    return xp.__array_namespace_info__().default_dtypes()["real floating"]


def epsilon(xp: Namespace, dtype: DType) -> float:
    """Return the distance from 1 to the next larger number of ``dtype`` (of its real part when complex)."""
    return float(xp.finfo(dtype).eps)


def conjugate(xp: Namespace, x: Array) -> Array:
    """Return the complex conjugate; real arrays come back as they are."""
    return xp.conj(x) if is_complex(xp, x.dtype) else x


def hermitian(xp: Namespace, matrix: Array) -> Array:
    """Return the conjugate transpose of a matrix (n, m) as (m, n)."""
    return conjugate(xp, xp.permute_dims(matrix, (1, 0)))


def promote(xp: Namespace, *arrays: Array) -> list[Array]:
    """Cast all ``arrays`` to their common type, as the array-API promotion rules give it."""
    dtype = arrays[0].dtype
    if all(a.dtype == dtype for a in arrays):
        return list(arrays)
    dtype = xp.result_type(*arrays)
    return [xp.astype(a, dtype, copy=False) for a in arrays]


def to_numpy(x: Array) -> Any:
    """Copy or view any array as a NumPy array on the host, detached from a gradient graph; bfloat16 as float32."""
    if _is_plain(x):  # most are, and the names of types take long
        return x
    if array_api_compat.is_torch_array(x):
        x = x.detach().resolve_conj().resolve_neg().cpu()
        return (x.float() if "bfloat16" in str(x.dtype) else x).numpy()
    if array_api_compat.is_cupy_array(x):  # pragma: no cover
        return x.get()
    if "bfloat16" in str(x.dtype):
        return np.asarray(x).astype(np.float32)
    return np.asarray(x)


def stop_gradient(x: Array) -> Array:
    """Return ``x`` as a constant: no gradient flows through the result."""
    if array_api_compat.is_torch_array(x):
        return x.detach()
    if array_api_compat.is_jax_array(x):
        import jax

        return jax.lax.stop_gradient(x)
    return x


def is_differentiated(x: Array) -> bool:
    """Tell whether somebody differentiates through ``x``: torch on a tape or with a tangent, or a JAX tracer."""
    if array_api_compat.is_torch_array(x):
        import torch.autograd.forward_ad as forward_ad
        from torch import is_grad_enabled

        if getattr(forward_ad, "_current_level", -1) >= 0 and forward_ad.unpack_dual(x).tangent is not None:
            return True
        return is_grad_enabled() and bool(x.requires_grad)
    return "jax" in sys.modules and isinstance(x, sys.modules["jax"].core.Tracer)


def concrete(x: Array) -> float | None:
    """Return a zero-dimensional array's value, or ``None`` where it is only a symbol (under jit or vmap)."""
    try:
        return float(stop_gradient(x))
    except (TypeError, RuntimeError):
        return None


def largest_magnitude(xp: Namespace, x: Array) -> float | None:
    """Return max |x|, without a copy for real x: NaN where x holds one, None where x is traced, 0 if empty."""
    if math.prod(x.shape) == 0:
        return 0.0
    if is_complex(xp, x.dtype):
        return concrete(xp.max(xp.abs(x)))
    if not is_low_precision(x.dtype) and xp.isdtype(x.dtype, "bool"):
        return 1.0
    high, low = concrete(xp.max(x)), concrete(xp.min(x))
    if high is None or low is None:
        return None
    return math.nan if math.isnan(high) or math.isnan(low) else max(abs(high), abs(low))


def power_of_two(xp: Namespace, x: Array) -> int:
    """Return ``k`` so that the largest magnitude in ``x · 2**-k`` lies in [1/2, 1); 0 for zero, empty or traced arrays.

    A factorization of ``x · 2**-k`` neither overflows nor underflows, and since the scaling is exact the factors of
    ``x`` and of ``x · 2**j`` agree bit for bit.
    """
    largest = largest_magnitude(xp, x)
    if not largest or not math.isfinite(largest):
        return 0
    return math.frexp(largest)[1]


def times_power_of_two(x: Array, k: int) -> Array:
    """Return ``x · 2**k``, in steps that stay inside float32's range so that no intermediate factor overflows."""
    number = _number_type(x)
    while k != 0:
        step = max(-100, min(100, k))
        x = x * number(2.0**step)
        k -= step
    return x


def _number_type(x: Array) -> Any:
    """Return the type of a factor that keeps the type of ``x``: in NumPy 1 a Python float makes a scalar float64."""
    if isinstance(x, np.ndarray | np.generic) and x.ndim == 0 and x.dtype.kind in "fc":
        return x.real.dtype.type
    return float


def accumulation_dtype(xp: Namespace, x: Array) -> DType:
    """Return float64 where the library and the device of ``x`` have it, else the real working type of ``x``."""
    on_mps = "mps" in str(array_api_compat.device(x))
    available = xp.__array_namespace_info__().dtypes(kind="real floating")
    if "float64" in available and not on_mps:
        return xp.float64
    return xp.float32


def widest_dtype(xp: Namespace, x: Array) -> DType:
    """Return the widest type of the same kind: float64 or complex128 where there are any."""
    wide = accumulation_dtype(xp, x)
    if is_complex(xp, x.dtype):
        return xp.complex128 if wide == xp.float64 else xp.complex64
    return wide


def host_view(x: Array) -> Any | None:
    """Return ``x`` as a NumPy array that shares its memory, or ``None`` where there is no such memory.

    There is none for arrays on a device, symbols under a trace, and types that NumPy lacks.
    """
    try:
        if array_api_compat.is_numpy_array(x):
            return None if is_low_precision(x.dtype) else x
        if array_api_compat.is_torch_array(x):
            return x.detach().resolve_conj().resolve_neg().numpy() if x.device.type == "cpu" else None
        if array_api_compat.is_jax_array(x):
            return np.asarray(x) if not is_differentiated(x) and "cpu" in str(x.device).lower() else None
        return np.from_dlpack(x)
    except (TypeError, RuntimeError, ValueError, AttributeError, BufferError):
        return None


def squared_norm(xp: Namespace, x: Array) -> float | None:
    """Return Σ |x|² as a float, accumulated in float64 block by block, or ``None`` where x is only a symbol."""
    constant = stop_gradient(x)
    host = host_view(constant)
    if host is not None and host.dtype.kind in "fc":
        flat = host.reshape(-1) if host.flags.c_contiguous else np.ravel(host, order="K")
        flat = flat.view(np.finfo(flat.dtype).dtype) if np.iscomplexobj(flat) else flat
        buffer = np.empty(min(_BLOCK, flat.size))
        total = 0.0
        for start in range(0, flat.size, _BLOCK):
            part = buffer[: min(_BLOCK, flat.size - start)]
            part[...] = flat[start : start + _BLOCK]
            total += float(part @ part)
        return total
    return concrete(_sum_of_squares(xp, constant))


def float_squares(where: str, xp: Namespace, x: Array) -> float:
    """Return Σ |x|² of an array that must not be a symbol."""
    squares = squared_norm(xp, x)
    if squares is None:
        raise ValueError(
            f"{where}: x is traced by jit or vmap, and the numbers in it decide here; call it outside of them, or "
            "hosvd, st_hosvd or hooi with ranks"
        )
    return squares


def host_numbers(where: str, x: Array) -> Any:
    """Return an array as a constant of NumPy; what must not be a symbol is refused if it is one."""
    try:
        return to_numpy(stop_gradient(x))
    except (TypeError, RuntimeError):  # JAX's error and PyTorch's
        float_squares(where, array_namespace(where, x), x)
        raise


# Entries that are cast to float64 at a time: what the processor's cache holds.
_BLOCK = 1 << 16


def _sum_of_squares(xp: Namespace, x: Array) -> Array:
    dtype = accumulation_dtype(xp, x)
    flat = xp.reshape(x, (-1,))
    total = xp.zeros((), dtype=dtype, device=array_api_compat.device(x))
    for start in range(0, flat.shape[0], 256 * _BLOCK):
        part = flat[start : min(start + 256 * _BLOCK, flat.shape[0])]
        halves = (xp.real(part), xp.imag(part)) if is_complex(xp, x.dtype) else (part,)
        for half in halves:
            wide = xp.astype(half, dtype, copy=False)
            total = total + xp.sum(wide * wide)
    return total


def suffix_sums(values: Any) -> Any:
    """Return t with t[r] = Σ_{i≥r} v_i², one entry longer than the host vector, summed from the smallest up."""
    squares = values.astype(np.float64) ** 2
    return np.concatenate([np.cumsum(squares[::-1])[::-1], [0.0]])


def host_squares(values: Array) -> Any:
    """Return the squares of real numbers as a NumPy array in float64."""
    return to_numpy(stop_gradient(values)).astype(np.float64) ** 2
