"""The trainable part of a layer: one Tucker tensor as a module, which knows its arrangement and its scale."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from flora_tensor import Arrangement, TuckerTensor
from flora_tensor.magnitudes import by_channel, channel_count, channel_ratio, spread_over_channels
from flora_torch._sharding import gathered
from flora_torch.functional import dense_delta, sides_of, split_of

__all__ = ["DROPOUTS", "Term", "TuckerUpdate", "widest_float"]

# A summand w · T of ΔW: the core and the factors of T, and w.
Term: TypeAlias = tuple[Tensor, tuple[Tensor | None, ...], float]

# Kinds of devices without float64.
NO_FLOAT64 = ("mps",)
DROPOUTS = ("dropout", "rank_dropout", "module_dropout")


class TuckerUpdate(nn.Module):
    """A trainable change of one weight: ΔW = s · (T − T_start), with T = G ×_0 U_0 … ×_{N-1} U_{N-1}.

    The parameters are ``core`` and ``factor_0``, ``factor_1``, …; a mode that is left whole has none. What else changes
    the result (arrangement, scale, dropouts, the weight's shape) travels in the state dict as ``_extra_state``, JSON in
    an uint8 tensor, so that a state dict can also be written as safetensors.

    With a magnitude m, the change is that of the rescaled weight: m · (W + ΔW) / ‖W + ΔW‖ − W, the norm taken over each
    output channel and, as in section 4.3 of the paper on it, held constant in the backward pass.

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
    rank_dropout : float
        The chance, in [0, 1), that a direction is dropped for a step of training: a slice of the core, and with it a
        column of the factor, independently in every mode that has a factor.
    module_dropout : float
        The chance, in [0, 1), that the whole update is dropped for a step of training.
    start : TuckerTensor, optional
        T_start, copied to buffers ``start_core``, ``start_factor_0``, …; ``None`` stands for zero. It has factors for
        the same modes as T, at least one.
    magnitude : Tensor, shape (channels,), optional
        m; see `start_magnitude`, which sets it to what changes nothing.
    channels : tuple of two int
        Where the output channels are: the axis of the weight (0 or 1), and the groups that share it; see
        `flora_tensor.magnitudes`.

    Attributes
    ----------
    core : nn.Parameter, shape (r_0, …, r_{N-1})
        G.
    scale, dropout, rank_dropout, module_dropout : float
        As given; may be changed. What a dropout leaves is divided by the chance to be left, so that the expected change
        is the whole one.
    multiplier : float
        A factor on the whole change, 1 unless `flora_torch.activate` is given weights. A switch of the moment like the
        active adapters: not saved.
    magnitude : nn.Parameter or None, shape (channels,)
        m.
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
    FLoRA, arXiv 2405.14739; for the magnitude DoRA, arXiv 2402.09353, equation 5 and section 4.3.

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
    magnitude: nn.Parameter | None

    def __init__(
        self,
        tucker: TuckerTensor,
        shape: Sequence[int] | None = None,
        *,
        arrangement: Arrangement | None = None,
        scale: float = 1.0,
        dropout: float = 0.0,
        rank_dropout: float = 0.0,
        module_dropout: float = 0.0,
        start: TuckerTensor | None = None,
        magnitude: Tensor | None = None,
        channels: tuple[int, int] = (0, 1),
    ) -> None:
        super().__init__()
        self.shape = tucker.shape if shape is None else tuple(int(n) for n in shape)
        self._arrange(arrangement or Arrangement.native(len(self.shape)))
        self.scale, self.multiplier = _check_scale(scale), 1.0
        self.dropout = _check_dropout("dropout", dropout)
        self.rank_dropout = _check_dropout("rank_dropout", rank_dropout)
        self.module_dropout = _check_dropout("module_dropout", module_dropout)
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
        self.channels = channels
        self.register_parameter("magnitude", None)
        if magnitude is not None:
            self._set_magnitude(magnitude)

    def _set_magnitude(self, magnitude: Tensor) -> None:
        channels = channel_count(self.shape, *self.channels)
        if tuple(magnitude.shape) != (channels,):
            raise ValueError(
                f"TuckerUpdate: a magnitude of shape {tuple(magnitude.shape)} for a weight of shape {self.shape} with "
                f"{channels} output channels; pass one of shape ({channels},)"
            )
        self.magnitude = nn.Parameter(magnitude.contiguous())

    def start_magnitude(self, weight: Tensor, channels: tuple[int, int]) -> None:
        """Give the update a magnitude: the norms of W + ΔW as they are now, so that it changes nothing yet.

        Parameters
        ----------
        weight : Tensor, of the weight's shape
            W.
        channels : tuple of two int
            As for the class.

        Raises
        ------
        ValueError
            If the weight has no such output channels.

        Examples
        --------
        >>> update = TuckerUpdate(TuckerTensor(torch.zeros(1, 1), [torch.ones(2, 1), torch.ones(3, 1)]))
        >>> update.start_magnitude(torch.full((2, 3), 2.0), (0, 1))
        >>> update.magnitude.tolist()
        [3.464101552963257, 3.464101552963257]
        """
        self.channels = channels
        with torch.no_grad():
            norms = self.norms(weight + self.delta())
            # Magnitudes change by little in training: 16 bits would not see it.
            self._set_magnitude(norms.to(torch.promote_types(self.core.dtype, torch.float32)))

    def norms(self, total: Tensor) -> Tensor:
        """Return the norm of each output channel of W + ΔW, summed in the widest type and detached.

        Parameters
        ----------
        total : Tensor, of the weight's shape
            W + ΔW.

        Returns
        -------
        Tensor, shape (channels,)
            The norms.

        Examples
        --------
        >>> update = TuckerUpdate(TuckerTensor(torch.zeros(1, 1), [torch.ones(2, 1), torch.ones(3, 1)]))
        >>> update.norms(torch.full((2, 3), 2.0)).shape
        torch.Size([2])
        """
        tensor, kept = by_channel(total.detach(), *self.channels)
        rest = [axis for axis in range(tensor.dim()) if axis not in kept]
        return torch.linalg.vector_norm(tensor, dim=rest, dtype=widest_float(total.device)).reshape(-1)

    def ratio(self, norms: Tensor) -> Tensor:
        """Return m / ‖W + ΔW‖ for norms of that shape, in m's type; 1 where the norm is zero.

        Parameters
        ----------
        norms : Tensor, shape (channels,)
            What `norms` returned.

        Returns
        -------
        Tensor, shape (channels,)
            The ratio; gradients flow to m.

        Examples
        --------
        >>> t = TuckerTensor(torch.zeros(1, 1), [torch.ones(2, 1), torch.ones(3, 1)])
        >>> TuckerUpdate(t, magnitude=torch.tensor([1.0, 2.0])).ratio(torch.tensor([4.0, 4.0])).tolist()
        [0.25, 0.5]
        """
        assert self.magnitude is not None
        # The same rounding of the norms in every path: what has not been trained gives exactly one.
        return channel_ratio(self.magnitude, norms)

    def _arrange(self, arrangement: Arrangement) -> None:
        # The forward pass asks for these, and reading a pattern takes longer than a small product.
        self.arrangement = arrangement
        self._part_names = ("core", *(f"factor_{mode}" for mode in range(arrangement.n_modes)))
        self.is_native, self.split_axes = arrangement.is_native, split_of(arrangement)
        self.sides = sides_of(arrangement)

    @property
    def core_and_factors(self) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """The core, and the factor matrices."""
        own = self._parameters
        # Looked up where nn.Module keeps them: its own search takes longer than a small product. One that is computed,
        # as by an orthogonal parametrization, is not there.
        parts: Any = [own[name] if name in own else getattr(self, name) for name in self._part_names]
        return parts[0], tuple(parts[1:])

    @property
    def factors(self) -> tuple[Tensor | None, ...]:
        """The factor matrices, ``None`` for a mode that is left whole."""
        return self.core_and_factors[1]

    @property
    def has_start(self) -> bool:
        """Whether there is a T_start beside zero."""
        return self._buffers["start_core"] is not None

    @property
    def has_magnitude(self) -> bool:
        """Whether there is a magnitude."""
        own = self._parameters
        # One that is computed, or that a wrapper took over, is not among the parameters.
        return "magnitude" not in own or own["magnitude"] is not None

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

    def terms(self, dtype: torch.dtype | None = None, *, drop: bool = False) -> list[Term]:
        """Return ΔW as a sum of terms w · T: the trained one with w = s times the multiplier, the start with −w.

        The start is a term of its own, computed in the same way as the trained one, so that both cancel bit for bit as
        long as nothing has been trained.

        Parameters
        ----------
        dtype : torch.dtype, optional
            The type to compute in; by default the parameters'.
        drop : bool
            Whether the rank and module dropouts are drawn. Where there is a magnitude, multiplier and module dropout
            are not applied here but to its result, by `rescale`.

        Returns
        -------
        list of (Tensor, tuple of (Tensor or None), float)
            One or two terms: a core of shape (r_0, …), factors of shapes (I_n, r_n), and w.

        Examples
        --------
        >>> update = TuckerUpdate(TuckerTensor(torch.ones(1, 1), [None, None]), scale=3.0)
        >>> [(core.item(), weight) for core, _, weight in update.terms()]
        [(1.0, 3.0)]
        """
        plain = dtype is None and not (self.has_start or self.has_magnitude)
        core, factors = self.core_and_factors
        if plain and not (drop and (self.rank_dropout or self.module_dropout)):
            return [(core, factors, self.scale * self.multiplier)]

        def cast(x: Tensor | None) -> Any:
            return x if x is None or dtype is None else x.to(dtype)

        scale: float | Tensor = self.scale
        if self.magnitude is None:
            scale = scale * self.outer_factor(drop=drop)
        masks = self._direction_masks() if drop and self.rank_dropout else []

        def term(core: Tensor, factors: Sequence[Tensor | None], sign: float) -> Any:
            core = cast(core)
            for mask in masks:
                core = core * (mask.to(core.dtype) / (1.0 - self.rank_dropout))
            core, weight = (core * scale, sign) if isinstance(scale, Tensor) else (core, sign * scale)
            return core, tuple(cast(u) for u in factors), weight

        terms = [term(core, factors, 1.0)]
        if self.start_core is not None:
            # The start loses the same directions, so that what is not trained yet still cancels.
            start = [getattr(self, f"start_factor_{m}") for m in range(self.core.dim())]
            terms.append(term(self.start_core, start, -1.0))
        return terms

    def _direction_masks(self) -> list[Tensor]:
        """Draw, for each mode that has a factor, which slices of the core are kept."""
        kept, core = 1.0 - self.rank_dropout, self.core
        masks: list[Tensor] = []
        for mode, factor in enumerate(self.factors):
            if factor is not None:
                shape = [1] * core.dim()
                shape[mode] = core.shape[mode]
                masks.append(torch.rand(shape, device=core.device) < kept)
        return masks

    def outer_factor(self, *, drop: bool = False) -> float | Tensor:
        """Return what the whole change is multiplied by: the multiplier, and the module dropout where it is drawn.

        Parameters
        ----------
        drop : bool
            Whether the module dropout is drawn.

        Returns
        -------
        float or Tensor, shape ()
            The factor.

        Examples
        --------
        >>> TuckerUpdate(TuckerTensor(torch.ones(1, 1), [None, None])).outer_factor()
        1.0
        """
        if not (drop and self.module_dropout):
            return self.multiplier
        kept = 1.0 - self.module_dropout
        return (torch.rand((), device=self.core.device) < kept).to(self.core.dtype) * (self.multiplier / kept)

    def change(self, weight: Tensor, dtype: torch.dtype | None = None, *, drop: bool = False) -> Tensor:
        """Form all that is added to W: ΔW, or with a magnitude m · (W + ΔW) / ‖W + ΔW‖ − W.

        Parameters
        ----------
        weight : Tensor, of the weight's shape
            W; no gradient flows to it.
        dtype : torch.dtype, optional
            The type to compute in; by default the parameters'.
        drop : bool
            Whether the rank and module dropouts are drawn.

        Returns
        -------
        Tensor, of the weight's shape
            The change; gradients flow to the update.

        Raises
        ------
        ValueError
            If the magnitude does not fit the weight.

        Examples
        --------
        >>> t = TuckerTensor(torch.zeros(1, 1), [torch.ones(2, 1), torch.ones(2, 1)])
        >>> TuckerUpdate(t, magnitude=torch.tensor([5.0, 10.0])).change(torch.tensor([[3.0, 4.0], [3.0, 4.0]])).tolist()
        [[0.0, 0.0], [3.0, 4.0]]
        """
        delta = self.delta(dtype, drop=drop)
        if self.magnitude is None:
            return delta
        # Added in the wider of the two types, as everywhere: the norms must not depend on the path.
        base = weight.detach() if dtype is None else weight.detach().to(dtype)
        whole = delta
        if drop and self.rank_dropout:
            with torch.no_grad():
                whole = self.delta(dtype)
        # The norms are those with nothing dropped: then the expectation over what is dropped is the whole change.
        ratio = spread_over_channels(self.ratio(self.norms(base + whole)), self.shape, *self.channels)
        return self.rescale(base, delta, ratio, drop=drop)

    def rescale(self, base: Tensor, delta: Tensor, ratio: Tensor, *, drop: bool = False) -> Tensor:
        """Return c · (W + ΔW) − W, or the same of products with W and ΔW, which are linear in them; c = m / ‖W + ΔW‖.

        Parameters
        ----------
        base, delta : Tensor
            W and ΔW, or their products with an input, of one shape.
        ratio : Tensor
            c by channel, of a shape that broadcasts against ``base``.
        drop : bool
            Whether the module dropout is drawn.

        Returns
        -------
        Tensor, of the shape of base
            The change, with the multiplier applied.

        Examples
        --------
        >>> t = TuckerTensor(torch.zeros(1, 1), [torch.ones(1, 1), torch.ones(1, 1)])
        >>> update = TuckerUpdate(t, magnitude=torch.tensor([6.0]))
        >>> update.rescale(torch.ones(1, 1), torch.ones(1, 1), torch.tensor([[3.0]])).item()
        5.0
        """
        # Written with c − 1, nothing at all is left of a base that is not rescaled; c is not narrowed before.
        return ((ratio - 1.0) * base + ratio * delta) * self.outer_factor(drop=drop)

    def delta(self, dtype: torch.dtype | None = None, *, drop: bool = False) -> Tensor:
        """Form ΔW = s · (T − T_start), times the multiplier, as a dense tensor of the weight's shape.

        Parameters
        ----------
        dtype : torch.dtype, optional
            The type to compute in; by default the parameters'. Autocast is off.
        drop : bool
            As for `terms`.

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
        for core, factors, weight in self.terms(dtype, drop=drop):
            term = dense_delta(core, factors, arrangement=self.arrangement, shape=self.shape, scale=weight)
            total = term if total is None else total + term
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
        # What is spread over processes is put together: every process must come here.
        tucker = self.tucker.map(lambda a: gathered(a.detach()))
        if self.start is None:
            return tucker
        start = self.start.map(gathered)
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
        # What is not used is not written: older versions of this library read such a state too.
        settings |= {key: getattr(self, key) for key in ("rank_dropout", "module_dropout") if getattr(self, key)}
        settings |= {} if self.magnitude is None else {"channels": list(self.channels)}
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
            others = settings.get("rank_dropout", 0.0), settings.get("module_dropout", 0.0)
            axis, groups = settings.get("channels", self.channels)
        except (AttributeError, TypeError, KeyError, ValueError) as error:
            raise ValueError(f"TuckerUpdate: the extra state of the state dict cannot be read: {error!r}") from error
        if shape != self.shape:
            raise ValueError(
                f"TuckerUpdate: the state dict holds an update of a weight of shape {shape}, and this one is of "
                f"shape {self.shape}; load it into a layer of the same shape"
            )
        _check_fit(self.tucker, arrangement, shape)
        if self.magnitude is not None and (axis, groups) != self.channels:
            raise ValueError(
                f"TuckerUpdate: the state dict's magnitude is for the output channels {(axis, groups)} (axis, groups), "
                f"and this one's are {self.channels}; load it into a layer of the same kind"
            )
        scale, dropout = _check_scale(scale), _check_dropout("dropout", dropout)
        rank_dropout, module_dropout = (
            _check_dropout(name, value) for name, value in zip(("rank_dropout", "module_dropout"), others)
        )
        self._arrange(arrangement)
        self.channels = (axis, groups)
        self.scale, self.dropout = scale, dropout
        self.rank_dropout, self.module_dropout = rank_dropout, module_dropout

    def extra_repr(self) -> str:
        """Return what the module's repr shows."""
        shown = [f"shape={self.shape}", f"ranks={self.ranks}", f"scale={self.scale:g}"]
        shown += [] if self.arrangement.is_native else [f"arrangement={self.arrangement.pattern!r}"]
        for name in DROPOUTS:
            shown += [f"{name}={getattr(self, name):g}"] if getattr(self, name) else []
        shown += [f"multiplier={self.multiplier:g}"] if self.multiplier != 1.0 else []
        shown += [] if self.magnitude is None else ["magnitude=True"]
        return ", ".join([*shown, f"n_parameters={self.n_parameters}"])


def _check_scale(scale: float) -> float:
    if not math.isfinite(scale):
        raise ValueError(f"TuckerUpdate: scale is {scale}; pass a finite number")
    return float(scale)


def _check_dropout(name: str, chance: float) -> float:
    if not 0.0 <= chance < 1.0:
        raise ValueError(f"TuckerUpdate: {name} is {chance}; pass a number from 0 to below 1")
    return float(chance)


def widest_float(device: torch.device) -> torch.dtype:
    """Return the widest float of a device: float64, which Apple's GPUs do not have.

    Examples
    --------
    >>> widest_float(torch.device("cpu"))
    torch.float64
    """
    return torch.float32 if device.type in NO_FLOAT64 else torch.float64


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
