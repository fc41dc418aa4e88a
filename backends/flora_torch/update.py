"""The trainable part of a layer: one Tucker tensor as a module, which knows its arrangement and its scale."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from flora_tensor import Arrangement, TuckerTensor
from flora_torch.functional import dense_delta, split_of

__all__ = ["TuckerUpdate", "register_with_torch"]


class TuckerUpdate(nn.Module):
    """A trainable change of one weight: ΔW = s · (T − T_start), with T = G ×_0 U_0 … ×_{N-1} U_{N-1}.

    The parameters are ``core`` and ``factor_0``, ``factor_1``, …; a mode that is left whole has none. What else changes
    the result (arrangement, scale, dropout, the weight's shape) travels in the state dict as ``_extra_state``, JSON in
    an uint8 tensor, so that a state dict can also be written as safetensors.

    Parameters
    ----------
    tucker : TuckerTensor of torch tensors
        T, of the arranged weight's shape. The tensors become parameters, copied only where they are not
        contiguous (which no file format stores).
    shape : sequence of int, optional
        The weight's shape; by default the Tucker tensor's.
    arrangement : Arrangement, optional
        Which of the weight's axes form a mode; by default each its own.
    scale : float
        s.
    dropout : float
        The chance, in [0, 1), that an entry of this update's input is zeroed in training.
    start : TuckerTensor, optional
        T_start, copied to buffers ``start_core``, ``start_factor_0``, …; ``None`` stands for zero. It has factors for
        the same modes as T, at least one.

    Attributes
    ----------
    core : nn.Parameter, shape (r_0, …, r_{N-1})
        G.
    scale, dropout : float
        As given; may be changed.
    shape : tuple of int
        The weight's shape.
    arrangement : Arrangement
        As given.

    Raises
    ------
    ValueError
        If arrangement, shape and tensors do not fit, the scale is not finite, or the dropout is not in [0, 1).

    References
    ----------
    FLoRA, arXiv 2405.14739.

    Examples
    --------
    >>> update = TuckerUpdate(TuckerTensor(torch.ones(1, 1), [torch.ones(3, 1), torch.ones(2, 1)]), scale=0.5)
    >>> update.delta().tolist()
    [[0.5, 0.5], [0.5, 0.5], [0.5, 0.5]]
    >>> [name for name, _ in update.named_parameters()]
    ['core', 'factor_0', 'factor_1']
    """

    core: nn.Parameter
    start_core: Tensor | None

    def __init__(
        self,
        tucker: TuckerTensor,
        shape: Sequence[int] | None = None,
        *,
        arrangement: Arrangement | None = None,
        scale: float = 1.0,
        dropout: float = 0.0,
        start: TuckerTensor | None = None,
    ) -> None:
        super().__init__()
        self.shape = tucker.shape if shape is None else tuple(int(n) for n in shape)
        self._arrange(arrangement or Arrangement.native(len(self.shape)))
        self.scale, self.dropout = _check_scale(scale), _check_dropout(dropout)
        _check_fit(tucker, self.arrangement, self.shape)
        self.core = nn.Parameter(tucker.core.contiguous())
        for mode, factor in enumerate(tucker.factors):
            self.register_parameter(f"factor_{mode}", None if factor is None else nn.Parameter(factor.contiguous()))
        if start is not None:
            _check_start(tucker, start)
            # The start stays where it is, also where the caller passed the tensors that are trained.
            start = start.map(lambda a: a.detach().clone(memory_format=torch.contiguous_format))
        self.register_buffer("start_core", None if start is None else start.core)
        for mode, factor in enumerate((None,) * tucker.ndim if start is None else start.factors):
            self.register_buffer(f"start_factor_{mode}", factor)

    def _arrange(self, arrangement: Arrangement) -> None:
        # The forward pass asks for these two, and reading a pattern takes longer than a small product.
        self.arrangement = arrangement
        self.is_native, self.split_axes = arrangement.is_native, split_of(arrangement)

    @property
    def factors(self) -> tuple[Tensor | None, ...]:
        """The factor matrices, ``None`` for a mode that is left whole."""
        return tuple(getattr(self, f"factor_{mode}") for mode in range(self.core.dim()))

    @property
    def ranks(self) -> tuple[int, ...]:
        """The core's shape."""
        return tuple(self.core.shape)

    @property
    def n_parameters(self) -> int:
        """How many numbers are trained."""
        return sum(math.prod(p.shape) for p in self.parameters())

    @property
    def tucker(self) -> TuckerTensor:
        """T, made of the parameters themselves: gradients flow through it."""
        return TuckerTensor(self.core, self.factors)

    @property
    def start(self) -> TuckerTensor | None:
        """T_start, or ``None`` where it is zero."""
        if self.start_core is None:
            return None
        return TuckerTensor(self.start_core, tuple(getattr(self, f"start_factor_{m}") for m in range(self.core.dim())))

    def terms(self, dtype: torch.dtype | None = None) -> list[tuple[Tensor, tuple[Tensor | None, ...], float]]:
        """Return the change as a sum of (core, factors, sign), the scale applied to the cores.

        The start is a term of its own, computed in the same way as the trained one, so that both cancel bit for bit as
        long as nothing has been trained.

        Parameters
        ----------
        dtype : torch.dtype, optional
            The type to compute in; by default the parameters'.

        Returns
        -------
        list of (Tensor, tuple of (Tensor or None), float)
            One or two terms: a core of shape (r_0, …), factors of shapes (I_n, r_n), and 1 or -1.

        Examples
        --------
        >>> update = TuckerUpdate(TuckerTensor(torch.ones(1, 1), [None, None]), scale=3.0)
        >>> [(core.item(), sign) for core, _, sign in update.terms()]
        [(3.0, 1.0)]
        """

        def cast(x: Tensor | None) -> Any:
            return x if x is None or dtype is None else x.to(dtype)

        terms = [(cast(self.core) * self.scale, tuple(cast(u) for u in self.factors), 1.0)]
        if self.start_core is not None:
            start = tuple(cast(getattr(self, f"start_factor_{m}")) for m in range(self.core.dim()))
            terms.append((cast(self.start_core) * self.scale, start, -1.0))
        return terms

    def delta(self, dtype: torch.dtype | None = None) -> Tensor:
        """Form s · (T − T_start) as a dense tensor of the weight's shape.

        Parameters
        ----------
        dtype : torch.dtype, optional
            The type to compute in; by default the parameters'. Autocast is off.

        Returns
        -------
        Tensor, of the weight's shape
            The change; gradients flow through it.

        Examples
        --------
        >>> TuckerUpdate(TuckerTensor(torch.ones(2, 3), [None, None])).delta(torch.float64).dtype
        torch.float64
        """
        total: Tensor | None = None
        for core, factors, sign in self.terms(dtype):
            term = dense_delta(core, factors, arrangement=self.arrangement, shape=self.shape)
            total = term if total is None else total + sign * term
        assert total is not None
        return total

    def exported(self) -> TuckerTensor:
        """Return T − T_start as one Tucker tensor, exactly and detached: ranks double where there is a start.

        Examples
        --------
        >>> t = TuckerTensor(torch.ones(1, 1), [torch.ones(3, 1), None])
        >>> TuckerUpdate(t, start=t).exported().ranks
        (2, 1)
        """
        tucker = self.tucker.map(lambda a: a.detach())
        start = self.start
        if start is None:
            return tucker
        factors = [
            None if u is None or v is None else torch.cat([u, v], 1) for u, v in zip(tucker.factors, start.factors)
        ]
        doubled = [r if u is None else 2 * r for r, u in zip(tucker.ranks, factors)]
        core = tucker.core.new_zeros(doubled)
        core[tuple(slice(0, r) for r in tucker.ranks)] = tucker.core
        # A mode without a factor is shared by both blocks; the others keep them apart.
        core[tuple(slice(d - r, d) for r, d in zip(tucker.ranks, doubled))] = -start.core
        return TuckerTensor(core, tuple(factors))

    @staticmethod
    def split(exported: TuckerTensor) -> tuple[TuckerTensor, TuckerTensor]:
        """Undo `exported` where there was a start: return T and T_start, bit for bit.

        Parameters
        ----------
        exported : TuckerTensor
            A tensor that `exported` returned for an update with a start.

        Returns
        -------
        tuple of two TuckerTensor
            T and T_start.

        Examples
        --------
        >>> t = TuckerTensor(torch.ones(1, 1), [torch.ones(3, 1), None])
        >>> [part.ranks for part in TuckerUpdate.split(TuckerUpdate(t, start=t).exported())]
        [(1, 1), (1, 1)]
        """
        ranks = [r if u is None else r // 2 for r, u in zip(exported.ranks, exported.factors)]
        first = exported.core[tuple(slice(0, r) for r in ranks)].clone()
        second = -exported.core[tuple(slice(d - r, d) for r, d in zip(ranks, exported.ranks))]
        left = [None if u is None else u[:, :r].clone() for u, r in zip(exported.factors, ranks)]
        right = [None if u is None else u[:, r:].clone() for u, r in zip(exported.factors, ranks)]
        return TuckerTensor(first, tuple(left)), TuckerTensor(second, tuple(right))

    def get_extra_state(self) -> Tensor:
        """Return everything that is not a tensor and changes the result, as JSON in an uint8 tensor.

        Examples
        --------
        >>> TuckerUpdate(TuckerTensor(torch.ones(1, 1), [None, None])).get_extra_state().dtype
        torch.uint8
        """
        settings = {
            "pattern": self.arrangement.pattern,
            "sizes": dict(self.arrangement.sizes),
            "shape": list(self.shape),
            "scale": self.scale,
            "dropout": self.dropout,
        }
        return torch.frombuffer(bytearray(json.dumps(settings, sort_keys=True).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        """Take the settings of a state dict over.

        Parameters
        ----------
        state : Tensor of uint8, shape (n,)
            What `get_extra_state` returned.

        Raises
        ------
        ValueError
            If they cannot be read, or belong to a weight of another shape.

        Examples
        --------
        >>> t = TuckerTensor(torch.ones(1, 1), [None, None])
        >>> update = TuckerUpdate(t)
        >>> update.set_extra_state(TuckerUpdate(t, scale=4.0).get_extra_state())
        >>> update.scale
        4.0
        """
        try:
            settings: Mapping[str, Any] = json.loads(bytes(state.cpu().tolist()))
            arrangement = Arrangement(settings["pattern"], settings["sizes"])
            shape, scale, dropout = tuple(settings["shape"]), settings["scale"], settings["dropout"]
        except (AttributeError, TypeError, KeyError, json.JSONDecodeError) as error:
            raise ValueError(f"TuckerUpdate: the extra state of the state dict cannot be read: {error!r}") from error
        if shape != self.shape:
            raise ValueError(
                f"TuckerUpdate: the state dict holds an update of a weight of shape {shape}, and this one is of "
                f"shape {self.shape}; load it into a layer of the same shape"
            )
        _check_fit(self.tucker, arrangement, shape)
        self._arrange(arrangement)
        self.scale, self.dropout = _check_scale(scale), _check_dropout(dropout)

    def extra_repr(self) -> str:
        """Return what the module's repr shows."""
        shown = [f"shape={self.shape}", f"ranks={self.ranks}", f"scale={self.scale:g}"]
        shown += [] if self.arrangement.is_native else [f"arrangement={self.arrangement.pattern!r}"]
        shown += [f"dropout={self.dropout:g}"] if self.dropout else []
        return ", ".join([*shown, f"n_parameters={self.n_parameters}"])


def _check_scale(scale: float) -> float:
    if not math.isfinite(scale):
        raise ValueError(f"TuckerUpdate: scale is {scale}; pass a finite number")
    return float(scale)


def _check_dropout(dropout: float) -> float:
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"TuckerUpdate: dropout is {dropout}; pass a number from 0 to below 1")
    return float(dropout)


def _check_fit(tucker: TuckerTensor, arrangement: Arrangement, shape: tuple[int, ...]) -> None:
    arranged = arrangement.shape(shape)
    if tucker.shape != arranged:
        raise ValueError(
            f"TuckerUpdate: a Tucker tensor of shape {tucker.shape} for a weight of shape {shape} arranged as "
            f"{arrangement.pattern!r}; pass one of shape {arranged}"
        )


def _check_start(tucker: TuckerTensor, start: TuckerTensor) -> None:
    whole, whole_start = ([u is None for u in t.factors] for t in (tucker, start))
    if (start.shape, start.ranks, whole_start) != (tucker.shape, tucker.ranks, whole):
        raise ValueError(
            f"TuckerUpdate: start is {start!r} beside {tucker!r}; pass one of the same shape and ranks, with factors "
            "for the same modes"
        )
    if all(whole):
        raise ValueError(
            "TuckerUpdate: a start without factors is no more than a shift of the core; pass the core's difference as "
            "the Tucker tensor, and no start"
        )


def _flatten(tucker: TuckerTensor) -> tuple[list[Any], tuple[bool, ...]]:
    # A whole mode is part of the structure: to torch, None would be a leaf that is no tensor.
    return [tucker.core, *(u for u in tucker.factors if u is not None)], tuple(u is None for u in tucker.factors)


def _unflatten(leaves: Any, whole: tuple[bool, ...]) -> TuckerTensor:
    # Transformations rebuild trees from batched tensors and from placeholders, so nothing is validated here.
    core, *given = leaves
    factors = iter(given)
    tucker = object.__new__(TuckerTensor)
    object.__setattr__(tucker, "core", core)
    object.__setattr__(tucker, "factors", tuple(None if is_whole else next(factors) for is_whole in whole))
    return tucker


def register_with_torch() -> bool:
    """Make `TuckerTensor` a pytree of torch, so that `torch.func.vmap` takes and gives Tucker tensors.

    Called once when `flora_torch` is imported; calling it again changes nothing.

    Returns
    -------
    bool
        Whether it is one now; false where this version of torch does not offer the registration.

    Examples
    --------
    >>> register_with_torch()
    True
    >>> batch = torch.func.vmap(lambda core: TuckerTensor(core, [None, None]))(torch.ones(5, 2, 3))
    >>> torch.func.vmap(lambda tucker: tucker.core.sum())(batch).shape
    torch.Size([5])
    """
    global _torch_knows_us
    register = getattr(pytree, "register_pytree_node", None)
    if not _torch_knows_us and register is not None:
        register(TuckerTensor, _flatten, _unflatten, serialized_type_name="flora_tensor.TuckerTensor")
        _torch_knows_us = True
    return _torch_knows_us


_torch_knows_us = False
