"""The noun of this library, a Tucker tensor, and the dense tensor that it stands for.

A factor that is ``None`` stands for the identity: the mode is left whole and stores nothing (a *partial* Tucker
tensor).
"""

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import array_api_compat
import numpy as np

from flora_tensor._arrays import array_namespace, is_differentiated, is_torch, promote
from flora_tensor._checks import type_text
from flora_tensor._typing import Array, DType
from flora_tensor.algebra import multi_mode_dot, multiply

__all__ = ["TuckerTensor", "check_tucker", "explicit_factor", "reconstruct"]


@dataclass(frozen=True, eq=False, repr=False)
class TuckerTensor:
    """A tensor as a small core and one thin factor per mode: X = G ×_0 U_0 … ×_{N-1} U_{N-1}.

    Parameters
    ----------
    core : array, shape (r_0, …, r_{N-1})
        The core tensor G. Any shape: an adapter's ranks may exceed what a decomposition would need.
    factors : sequence of (array of shape (I_n, r_n), or None)
        The factor matrices U_n. ``None`` leaves mode n whole, as the identity would: I_n = r_n, and nothing is stored.

    Attributes
    ----------
    shape : tuple of int
        (I_0, …, I_{N-1}), the shape of the dense tensor.
    ranks : tuple of int
        (r_0, …, r_{N-1}), the shape of the core.
    n_parameters : int
        Numbers stored: ∏ r_n + Σ I_n r_n, the sum over the modes that have a factor.

    Raises
    ------
    ValueError
        If the number of factors is not the core's order, or a factor's shape does not fit the core.
    TypeError
        If core and factors are arrays of different libraries, or there is no sequence of factors.

    Notes
    -----
    Instances are immutable, compare by identity, unpack as ``core, factors = tucker``, and are pytrees in JAX. `map`
    applies a function to every array, for example to move it to another device. Booleans and integers of 8 or 16 bits
    are held, but no function of this library computes with them.

    References
    ----------
    Kolda and Bader, *Tensor Decompositions and Applications*, SIAM Review 51 (2009), section 4.

    Examples
    --------
    >>> import numpy as np
    >>> t = TuckerTensor(np.ones((2, 2, 1)), [np.ones((8, 2)), np.ones((6, 2)), np.ones((3, 1))])
    >>> t
    TuckerTensor(shape=(8, 6, 3), ranks=(2, 2, 1), n_parameters=35, dtype=float64)
    >>> t.to_tensor().shape
    (8, 6, 3)
    """

    core: Array
    factors: tuple[Array | None, ...]

    def __post_init__(self) -> None:
        given: Any = self.factors
        if not isinstance(given, Iterable):
            raise TypeError(f"TuckerTensor: factors is {type_text(given)}; pass one factor (or None) a mode")
        factors = tuple(given)
        object.__setattr__(self, "factors", factors)
        array_namespace("TuckerTensor", self.core, *factors)
        ranks = tuple(self.core.shape)
        if len(factors) != len(ranks):
            raise ValueError(
                f"TuckerTensor: {len(factors)} factors for a core of shape {ranks}; pass one factor (or None) a mode"
            )
        for mode, (factor, rank) in enumerate(zip(factors, ranks)):
            if factor is not None and (len(factor.shape) != 2 or factor.shape[1] != rank):
                raise ValueError(
                    f"TuckerTensor: factor {mode} has shape {tuple(factor.shape)}, but the core has shape {ranks}; "
                    f"pass a matrix with {rank} columns"
                )
        _register_with_jax()

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape (I_0, …, I_{N-1}) of the dense tensor."""
        return tuple(r if u is None else u.shape[0] for u, r in zip(self.factors, self.core.shape))

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks (r_0, …, r_{N-1}), which are the core's shape."""
        return tuple(self.core.shape)

    @property
    def ndim(self) -> int:
        """The order N: how many modes the tensor has."""
        return len(self.core.shape)

    @property
    def dtype(self) -> DType:
        """The core's data type."""
        return self.core.dtype

    @property
    def n_parameters(self) -> int:
        """How many numbers the core and the factors store."""
        return math.prod(self.core.shape) + sum(math.prod(u.shape) for u in self.factors if u is not None)

    def to_tensor(self) -> Array:
        """Return the dense tensor, of shape (I_0, …, I_{N-1}); the same as `reconstruct`."""
        return reconstruct(self)

    def map(self, function: Callable[[Array], Array]) -> "TuckerTensor":
        """Apply a function to the core and to every factor, as in ``t.map(lambda a: a.to("cuda"))``.

        Parameters
        ----------
        function : callable
            Takes an array (the core, or a factor of shape (I_n, r_n)) and returns one; it is not called for ``None``.

        Returns
        -------
        TuckerTensor
            A new Tucker tensor of what the function returned.
        """
        return TuckerTensor(function(self.core), tuple(None if u is None else function(u) for u in self.factors))

    def __iter__(self) -> Iterator[Any]:
        return iter((self.core, self.factors))

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        """Refuse to become a NumPy array unasked: it would be dense, or an array of one object."""
        raise TypeError("TuckerTensor: it is a core and factors, not one array; for the dense tensor use to_tensor()")

    def __repr__(self) -> str:
        dtype = str(self.dtype).rsplit(".", maxsplit=1)[-1]
        whole = [mode for mode, u in enumerate(self.factors) if u is None]
        partial = f", whole_modes={tuple(whole)}" if whole else ""
        return (
            f"TuckerTensor(shape={self.shape}, ranks={self.ranks}, n_parameters={self.n_parameters}{partial}, "
            f"dtype={dtype})"
        )


# Told by name, as `is_low_precision` does: not every library's types know their size.
_SHORT_INTEGERS = frozenset(("bool", "int8", "uint8", "int16", "uint16"))


def check_tucker(where: str, *tensors: Any) -> None:
    """Refuse what is no Tucker tensor, such as the dense array or the fit that one was made of, and what overflows."""
    for tensor in tensors:
        if not isinstance(tensor, TuckerTensor):
            raise TypeError(f"{where}: got {type_text(tensor)}; pass a TuckerTensor, such as tucker(x, ranks).tucker")
        for array in (tensor.core, *(u for u in tensor.factors if u is not None)):
            if str(array.dtype).rsplit(".", maxsplit=1)[-1] in _SHORT_INTEGERS:
                raise TypeError(
                    f"{where}: got a core or factor of type {array.dtype}, in which sums of products overflow; "
                    "pass floats, as t.map(lambda a: a.astype('float32')) gives, times their scale if they have one"
                )


def explicit_factor(tucker: TuckerTensor, mode: int) -> Array:
    """Return a mode's factor, the identity spelled out where none is stored."""
    factor = tucker.factors[mode]
    if factor is not None:
        return factor
    xp = array_namespace("TuckerTensor", tucker.core)
    return xp.eye(tucker.ranks[mode], dtype=tucker.dtype, device=array_api_compat.device(tucker.core))


def reconstruct(tucker: TuckerTensor, *, out: Array | None = None) -> Array:
    """Form the dense tensor of a Tucker tensor.

    The factors are multiplied onto the core in the order that takes the fewest multiply-adds and the least writing to
    memory (sorted by a closed form that is optimal over all orders; see `algebra.contraction_order`). Equal numbers
    give equal bits, whatever the layout and the alignment of the arrays that hold them.

    Parameters
    ----------
    tucker : TuckerTensor
        The tensor, of shape (I_0, …, I_{N-1}).
    out : array, shape (I_0, …, I_{N-1}), optional
        A NumPy or PyTorch array to write into, of the result's data type and any layout; it may be the core or a factor
        itself. Saves the allocation, which for large tensors costs more than the arithmetic.

    Returns
    -------
    array, shape (I_0, …, I_{N-1})
        The dense tensor; ``out`` itself where it was given.

    Raises
    ------
    ValueError
        If ``out`` has another shape or data type, cannot be written to, or a gradient is being recorded.
    TypeError
        If ``tucker`` is no Tucker tensor, or ``out`` belongs to a library whose arrays cannot be written to.

    References
    ----------
    Kolda and Bader (2009), equation 4.1.

    Examples
    --------
    >>> import numpy as np
    >>> t = TuckerTensor(np.full((1, 1), 3.0), [np.ones((2, 1)), np.ones((2, 1))])
    >>> reconstruct(t)
    array([[3., 3.],
           [3., 3.]])
    >>> buffer = np.empty((2, 2))
    >>> reconstruct(t, out=buffer) is buffer
    True
    """
    check_tucker("reconstruct", tucker)
    core, factors = _settled(tucker.core), [None if u is None else _settled(u) for u in tucker.factors]
    if out is None:
        return multi_mode_dot(core, factors)
    xp = array_namespace("reconstruct", core, out)
    arrays = promote(xp, core, *(u for u in factors if u is not None))
    _check_out(out, tucker.shape, arrays)
    steps = list(zip((mode for mode, u in enumerate(factors) if u is not None), arrays[1:]))
    writable = _is_contiguous(out) and not any(_may_overlap(out, a) for a in arrays)
    if steps and writable:
        multiply(xp, arrays[0], steps, out)
    else:
        out[...] = multiply(xp, arrays[0], steps)
    return out


def _settled(array: Array) -> Array:
    """Lay an array out in C order and on a cache line, where that is not so: MKL's rounding depends on both."""
    if not is_torch(array):
        # Not by ascontiguousarray, which gives an axis to what has none.
        return np.asarray(array, order="C") if array_api_compat.is_numpy_array(array) else array
    import torch

    if torch.compiler.is_compiling():
        return array
    array = array.contiguous()
    try:
        misplaced = array.device.type == "cpu" and array.data_ptr() % 64 != 0
    except RuntimeError:  # a symbol, or a batch under vmap: it has no place in memory
        return array
    return array.clone() if misplaced else array


def _check_out(out: Array, shape: tuple[int, ...], arrays: Sequence[Array]) -> None:
    dtype = arrays[0].dtype
    if not (array_api_compat.is_numpy_array(out) or array_api_compat.is_torch_array(out)):
        kind = type(out).__module__.split(".")[0]
        raise TypeError(f"reconstruct: out is an array of {kind}; pass a NumPy or PyTorch array, or leave it out")
    if tuple(out.shape) != shape or out.dtype != dtype:
        raise ValueError(
            f"reconstruct: out has shape {tuple(out.shape)} and type {out.dtype}; pass shape {shape} and type {dtype}"
        )
    if array_api_compat.is_numpy_array(out):
        if not out.flags.writeable:
            raise ValueError("reconstruct: out is read-only; pass an array that can be written to")
        return
    if any(is_differentiated(a) for a in (out, *arrays)):
        raise ValueError("reconstruct: out cannot record gradients; leave it out, or use torch.no_grad()")
    for mode, (size, stride) in enumerate(zip(shape, out.stride())):
        if size > 1 and stride == 0:
            raise ValueError(f"reconstruct: out repeats its memory along mode {mode}; pass an array of its own")


def _is_contiguous(out: Array) -> bool:
    if array_api_compat.is_numpy_array(out):
        return bool(out.flags.c_contiguous)
    return bool(out.is_contiguous())


def _may_overlap(a: Array, b: Array) -> bool:
    """Tell whether writing to ``a`` may change ``b``; torch multiplies into an operand without a warning."""
    if array_api_compat.is_numpy_array(a):
        return np.may_share_memory(a, b)
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


_jax_knows_us = False


def _register_with_jax() -> None:
    """Make `TuckerTensor` a pytree as soon as the user has imported jax; the core never imports it itself."""
    global _jax_knows_us
    if _jax_knows_us or "jax" not in sys.modules:
        return
    jax = sys.modules["jax"]
    if not hasattr(jax, "tree_util"):  # jax itself is still being imported
        return

    def flatten(t: TuckerTensor) -> tuple[tuple[Any, Any], None]:
        return (t.core, t.factors), None

    def unflatten(_: None, children: tuple[Any, Any]) -> TuckerTensor:
        # Transformations rebuild trees with placeholders for leaves: no validation here.
        t = object.__new__(TuckerTensor)
        object.__setattr__(t, "core", children[0])
        object.__setattr__(t, "factors", tuple(children[1]))
        return t

    jax.tree_util.register_pytree_node(TuckerTensor, flatten, unflatten)
    _jax_knows_us = True
