"""The change of a model's weights, as an object: Tucker tensors by name, and what goes with each of them."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from flora_tensor._arrays import to_numpy
from flora_tensor.arrangement import Arrangement
from flora_tensor.magnitudes import channel_count, magnitude_change
from flora_tensor.tucker_tensor import TuckerTensor

__all__ = ["Adapter"]

# A scale beyond float32's range cannot have been meant, and overflows every weight.
MAX_SCALE = 2.0**128


@dataclass(frozen=True, eq=False, repr=False)
class Adapter(Mapping[str, TuckerTensor]):
    """The change of a model's weights: a mapping from a weight's name to a Tucker tensor, and what goes with it.

    Parameters
    ----------
    tensors : mapping of str to TuckerTensor
        For each weight its change, of the *arranged* weight's shape and without the scale.
    arrangements : mapping of str to Arrangement, optional
        Which axes form a mode. A weight not named here has its own axes.
    scales : mapping of str to float, optional
        The number s that the change is multiplied by. A weight not named here has ``config["scale"]``, or 1.
    shapes : mapping of str to tuple of int, optional
        The weights' own shapes. One that is not named here, and whose arrangement is native, has its tensor's shape.
    whole : mapping of str to array, optional
        Tensors stored whole, with their new value.
    config : mapping of str to Any, optional
        The adapter's `adapter_config.json`; keys that this library does not know are kept.
    dtypes : mapping of str to str, optional
        The types that tensors have in the file (``"BF16"``), by the name of the weight or of the tensor stored whole.
        One that is not named here keeps its arrays' own.
    magnitudes : mapping of str to array, optional
        For each weight that has them, the magnitudes m of its output channels, of shape (channels,): the weight becomes
        m · (W + s·ΔW) / ‖W + s·ΔW‖.
    channels : mapping of str to tuple of two int, optional
        Where these channels are: the axis, and the groups that share it; (0, 1) where it is not given. See
        `flora_tensor.magnitudes`.
    missing_keys, unexpected_keys : tuple of str
        What `load_adapter` did not find, and what it did not know; both are empty unless it was called with
        ``strict=False``.

    Raises
    ------
    ValueError
        If an arrangement, a shape, a magnitude and a tensor do not fit each other, a scale is not a finite number, or a
        name is used twice.

    Notes
    -----
    The mappings are read-only. `delta` gives a weight's change as a dense array.

    References
    ----------
    Si et al., *Maintaining structural integrity in parameter spaces for parameter efficient fine-tuning* (FLoRA),
    ICLR 2025, equation 5, for ΔW = s · G ×_0 U_0 … ×_{N-1} U_{N-1}; Liu et al. (DoRA), ICML 2024, equation 5, for
    magnitudes.

    Examples
    --------
    >>> import numpy as np
    >>> t = TuckerTensor(np.ones((1, 1)), [np.ones((2, 1)), np.ones((3, 1))])
    >>> adapter = Adapter({"fc.weight": t}, scales={"fc.weight": 2.0})
    >>> adapter
    Adapter(1 weight, 0 tensors whole, n_parameters=6)
    >>> adapter.delta("fc.weight")
    array([[2., 2., 2.],
           [2., 2., 2.]])
    """

    tensors: Mapping[str, TuckerTensor]
    arrangements: Mapping[str, Arrangement] = field(default_factory=dict[str, Arrangement])
    scales: Mapping[str, float] = field(default_factory=dict[str, float])
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict[str, tuple[int, ...]])
    whole: Mapping[str, Any] = field(default_factory=dict[str, Any])
    config: Mapping[str, Any] = field(default_factory=dict[str, Any])
    dtypes: Mapping[str, str] = field(default_factory=dict[str, str])
    missing_keys: tuple[str, ...] = ()
    unexpected_keys: tuple[str, ...] = ()
    magnitudes: Mapping[str, Any] = field(default_factory=dict[str, Any])
    channels: Mapping[str, tuple[int, int]] = field(default_factory=dict[str, tuple[int, int]])

    def __post_init__(self) -> None:
        names = set(self.tensors)
        for option in ("arrangements", "scales", "shapes", "magnitudes", "channels"):
            if unknown := set(getattr(self, option)) - names:
                raise ValueError(f"Adapter: {option} names {min(unknown)!r}, which has no tensor; remove it")
        if both := names & set(self.whole):
            raise ValueError(f"Adapter: {min(both)!r} is stored whole and as a Tucker tensor; pass one of the two")
        default = check_scale("Adapter: config's scale", self.config.get("scale", 1.0))
        arrangements = {n: self.arrangements.get(n) or Arrangement.native(t.ndim) for n, t in self.tensors.items()}
        shapes = {n: _own_shape(n, t, arrangements[n], self.shapes.get(n)) for n, t in self.tensors.items()}
        scales = {n: check_scale(f"Adapter: scale of {n!r}", self.scales.get(n, default)) for n in self.tensors}
        for name, table in (("arrangements", arrangements), ("scales", scales), ("shapes", shapes)):
            object.__setattr__(self, name, MappingProxyType(table))
        channels = {n: _checked_channels(n, m, shapes[n], self.channels.get(n)) for n, m in self.magnitudes.items()}
        object.__setattr__(self, "channels", MappingProxyType(channels))
        for name in ("tensors", "whole", "config", "dtypes", "magnitudes"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))

    def __getitem__(self, name: str) -> TuckerTensor:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    @property
    def n_parameters(self) -> int:
        """How many numbers the adapter stores, Tucker tensors and whole tensors together."""
        whole = sum(math.prod(array.shape) for array in (*self.whole.values(), *self.magnitudes.values()))
        return whole + sum(tensor.n_parameters for tensor in self.tensors.values())

    def delta(self, name: str, *, dtype: Any = None) -> Any:
        """Form a weight's change s · ΔW as a dense array; with a magnitude, `change` is what is added to the weight.

        Parameters
        ----------
        name : str
            The weight.
        dtype : NumPy data type, optional
            The type to compute in and to return; the tensor's own by default. Given, the result is a NumPy array.

        Returns
        -------
        array, of the weight's own shape
            The change, with the scale applied and the arrangement undone.

        Raises
        ------
        KeyError
            If the adapter does not change this weight.

        References
        ----------
        Si et al. (2025), equation 5.

        Examples
        --------
        >>> import numpy as np
        >>> t = TuckerTensor(np.ones((1, 1)), [np.ones((4, 1)), np.ones((1, 1))])
        >>> adapter = Adapter({"w": t}, {"w": Arrangement("(o h) (i w)")}, shapes={"w": (2, 1, 2, 1)})
        >>> adapter.delta("w").shape
        (2, 1, 2, 1)
        """
        tensor = self.tensors[name]
        if dtype is not None:
            tensor = tensor.map(lambda array: to_numpy(array).astype(dtype, copy=False))
        # The scale goes onto the small core: one pass over it and not over the dense tensor.
        scaled = TuckerTensor(tensor.core * self.scales[name], tensor.factors)
        return self.arrangements[name].restore(scaled.to_tensor(), self.shapes[name])

    def change(self, name: str, weight: Any, *, dtype: Any = None) -> Any:
        """Form all that is added to a weight W: s · ΔW, or with a magnitude m · (W + s·ΔW) / ‖W + s·ΔW‖ − W.

        Parameters
        ----------
        name : str
            The weight.
        weight : array, shape as the weight's
            W.
        dtype : NumPy data type, optional
            As for `delta`; W is taken as it is.

        Returns
        -------
        array, of the weight's own shape
            The change.

        Raises
        ------
        KeyError
            If the adapter does not change this weight.

        References
        ----------
        Liu et al. (DoRA), ICML 2024, equation 5.

        Examples
        --------
        >>> import numpy as np
        >>> t = TuckerTensor(np.zeros((1, 1)), [np.ones((1, 1)), np.ones((2, 1))])
        >>> Adapter({"w": t}, magnitudes={"w": np.asarray([10.0])}).change("w", np.asarray([[3.0, 4.0]]))
        array([[3., 4.]])
        """
        delta = self.delta(name, dtype=dtype)
        if name not in self.magnitudes:
            return delta
        return magnitude_change(weight, delta, self.magnitudes[name], *self.channels[name])

    def __repr__(self) -> str:
        weights = f"{len(self)} weight{'s' if len(self) != 1 else ''}"
        whole = f"{len(self.whole)} tensor{'s' if len(self.whole) != 1 else ''} whole"
        return f"Adapter({weights}, {whole}, n_parameters={self.n_parameters})"


def check_scale(where: str, value: Any) -> float:
    """Return a scale as a float; anything that is not a finite number in float32's range is refused."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < MAX_SCALE:
        raise ValueError(f"{where} is {value!r}; pass a finite number, below 2^128 in magnitude")
    return float(value)


def _own_shape(
    name: str, tensor: TuckerTensor, arrangement: Arrangement, shape: tuple[int, ...] | None
) -> tuple[int, ...]:
    """Return the weight's shape, proved to be the one that the arranged tensor comes from."""
    if shape is None and not arrangement.is_native:
        raise ValueError(
            f"Adapter: the arrangement {arrangement.pattern!r} of {name!r} does not tell the weight's shape; "
            "pass it in shapes"
        )
    shape = tensor.shape if shape is None else tuple(shape)
    if arrangement.shape(shape) != tensor.shape:
        factors = [None if u is None else tuple(u.shape) for u in tensor.factors]
        raise ValueError(
            f"Adapter: {name!r} has shape {shape}, arranged {arrangement.shape(shape)}, but its core {tensor.ranks} "
            f"and factors {factors} make {tensor.shape}"
        )
    return shape


def _checked_channels(
    name: str, magnitude: Any, shape: tuple[int, ...], given: tuple[int, int] | None
) -> tuple[int, int]:
    """Return where a weight's output channels are, proved to be as many as its magnitudes."""
    axis, groups = given or (0, 1)
    try:
        channels = channel_count(shape, axis, groups)
    except ValueError as error:
        raise ValueError(f"Adapter: {name!r}: {error}") from None
    if tuple(magnitude.shape) != (channels,):
        raise ValueError(
            f"Adapter: {name!r} of shape {shape} has magnitudes of shape {tuple(magnitude.shape)}; pass ({channels},), "
            f"one for each channel of axis {axis} in {groups} group{'s' if groups != 1 else ''}"
        )
    return axis, groups
