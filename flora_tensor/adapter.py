"""The change of a model's weights, as an object: Tucker tensors by name, and what goes with each of them."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType
from typing import Any

from flora_tensor._arrays import to_numpy
from flora_tensor._checks import check_loaded, type_text
from flora_tensor._safetensors import FLOATS, READABLE, dtype_name
from flora_tensor.arrangement import Arrangement
from flora_tensor.magnitudes import channel_count, magnitude_change
from flora_tensor.stacking import TuckerStack, member_arrangement
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
    stacks : mapping of str to TuckerStack, optional
        Weights of several layers that are stored as one Tucker tensor, by the stack's name (the pattern that their
        names match, say). They count as the adapter's weights like all others and need not be in ``tensors``: each has
        a core of its own and shares its factors with the rest of the stack. They have one scale and no magnitudes.
    missing_keys, unexpected_keys : tuple of str
        What `load_adapter` did not find, and what it did not know; both are empty unless it was called with
        ``strict=False``.

    Raises
    ------
    ValueError
        If an arrangement, a shape, a magnitude and a tensor do not fit each other, a scale is not a finite number, a
        name is used twice, or the members of a stack differ in what they must share.
    TypeError
        If a change is no `TuckerTensor` of real floats, or an option no mapping.

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
    stacks: Mapping[str, TuckerStack] = field(default_factory=dict[str, TuckerStack])

    def __post_init__(self) -> None:
        self._check_kinds()
        self._take_members()
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
        for name in ("tensors", "whole", "config", "dtypes", "magnitudes", "stacks"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))
        for name, stack in self.stacks.items():
            self._check_stack(name, stack)

    def _check_kinds(self) -> None:
        """Refuse what is of another kind: what is no mapping, no Tucker tensor of real floats, no known type."""
        for option in (f.name for f in fields(self) if not f.name.endswith("_keys")):
            if not isinstance(table := getattr(self, option), Mapping):
                raise TypeError(f"Adapter: {option} is {type_text(table)}; pass a mapping")
        for name, tensor in self.tensors.items():
            _check_change(name, tensor)
        for name, arrangement in dict[str, Any](self.arrangements).items():
            if not isinstance(arrangement, Arrangement):
                raise TypeError(f"Adapter: the arrangement of {name!r} is {arrangement!r}; pass an Arrangement")
        for name, array in self.whole.items():
            if not hasattr(array, "dtype"):
                raise TypeError(f"Adapter: {name!r}, stored whole, is {type_text(array)}; pass an array")
        for name, code in self.dtypes.items():
            allowed = FLOATS if name in self.tensors else READABLE
            if code not in allowed:
                raise ValueError(f"Adapter: the stored type of {name!r} is {code!r}; pass one of {', '.join(allowed)}")

    def _take_members(self) -> None:
        """Put the members of the stacks among the weights."""
        tensors, arrangements, shapes = dict(self.tensors), dict(self.arrangements), dict(self.shapes)
        taken: dict[str, str] = {}
        for name, stack in self.stacks.items():
            for member, part in zip(stack.members, stack.slices):
                # What `dataclasses.replace` hands on is the same object; anything else would not be what is stored.
                if member in taken or tensors.get(member, part) is not part:
                    other = f"in the stack {taken[member]!r}" if member in taken else "given separately"
                    raise ValueError(f"Adapter: {member!r} is in the stack {name!r} and {other}; keep one of the two")
                taken[member], tensors[member] = name, part
                arrangements[member], shapes[member] = stack.arrangement, stack.shape
        for option, table in (("tensors", tensors), ("arrangements", arrangements), ("shapes", shapes)):
            object.__setattr__(self, option, table)

    def _check_stack(self, name: str, stack: TuckerStack) -> None:
        if name in self.tensors or name in self.whole:
            raise ValueError(f"Adapter: {name!r} is a stack's name and a tensor's; rename the stack")
        if scaled := next((m for m in stack.members if m in self.magnitudes), None):
            raise ValueError(f"Adapter: {scaled!r} of the stack {name!r} has a magnitude; take the stack apart first")
        for what, table in (("scales", self.scales), ("stored types", self.dtypes)):
            if len(values := dict.fromkeys(table.get(member) for member in stack.members)) > 1:
                raise ValueError(f"Adapter: the members of the stack {name!r} have {what} {list(values)}; pass one")

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
        return whole + sum(tensor.n_parameters for tensor in self.joined().tensors.values())

    def joined(self) -> "Adapter":
        """Take each stack for a single weight under the stack's name, with the layers as its first axis: as stored.

        Returns
        -------
        Adapter
            The same changes, without stacks.

        Examples
        --------
        >>> import numpy as np
        >>> t = TuckerTensor(np.ones((1, 1, 1)), [np.ones((2, 1)), np.ones((3, 1)), np.ones((4, 1))])
        >>> stack = TuckerStack(("0.weight", "1.weight"), t, Arrangement("o i"), (3, 4))
        >>> adapter = Adapter({}, stacks={"*.weight": stack})
        >>> list(adapter), adapter.joined().shapes["*.weight"], adapter.joined().arrangements["*.weight"].pattern
        (['0.weight', '1.weight'], (2, 3, 4), 'layer o i')
        """
        if not self.stacks:
            return self
        members = {member for stack in self.stacks.values() for member in stack.members}

        def table(own: Mapping[str, Any], joint: dict[str, Any]) -> dict[str, Any]:
            return {name: value for name, value in own.items() if name not in members} | joint

        first = {name: stack.members[0] for name, stack in self.stacks.items()}
        return replace(
            self,
            tensors=table(self.tensors, {name: stack.tensor for name, stack in self.stacks.items()}),
            arrangements=table(self.arrangements, {n: stack.joint_arrangement for n, stack in self.stacks.items()}),
            scales=table(self.scales, {name: self.scales[member] for name, member in first.items()}),
            shapes=table(self.shapes, {name: stack.joint_shape for name, stack in self.stacks.items()}),
            dtypes=table(self.dtypes, {n: self.dtypes[member] for n, member in first.items() if member in self.dtypes}),
            stacks={},
        )

    def with_stacks(self, members: Mapping[str, Sequence[str]]) -> "Adapter":
        """Take single weights for stacks: the inverse of `joined`.

        Parameters
        ----------
        members : mapping of str to sequence of str
            For the name of each such weight the names along its first axis.

        Returns
        -------
        Adapter
            The same changes, under the members' names.

        Raises
        ------
        ValueError
            If there is no such weight, or its shape and arrangement are not those of a stack of so many members.

        Examples
        --------
        >>> import numpy as np
        >>> t = TuckerTensor(np.ones((1, 1, 1)), [np.ones((2, 1)), np.ones((3, 1)), np.ones((4, 1))])
        >>> list(Adapter({"*.weight": t}).with_stacks({"*.weight": ["0.weight", "1.weight"]}))
        ['0.weight', '1.weight']
        """
        stacks: dict[str, TuckerStack] = {}
        for name, listed in members.items():
            if name not in self.tensors:
                raise ValueError(f"Adapter: the stack {name!r} has no tensor; pass the name of a weight")
            own = member_arrangement(self.arrangements[name])
            if own is None:
                pattern = self.arrangements[name].pattern
                raise ValueError(
                    f"Adapter: the stack {name!r} is arranged as {pattern!r}; its first axis must be a mode"
                )
            stacks[name] = TuckerStack(tuple(listed), self.tensors[name], own, self.shapes[name][1:])

        def rest(own: Mapping[str, Any]) -> dict[str, Any]:
            return {name: value for name, value in own.items() if name not in stacks}

        def shared(own: Mapping[str, Any]) -> dict[str, Any]:
            return rest(own) | {m: own[name] for name, s in stacks.items() if name in own for m in s.members}

        return replace(
            self,
            tensors=rest(self.tensors),
            arrangements=rest(self.arrangements),
            shapes=rest(self.shapes),
            scales=shared(self.scales),
            dtypes=shared(self.dtypes),
            stacks={**self.stacks, **stacks},
        )

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


def _check_change(name: Any, tensor: Any) -> None:
    """Refuse a weight's change that cannot be one: arithmetic with it would fail, or lose what is imaginary."""
    if not isinstance(name, str):
        raise TypeError(f"Adapter: a weight's name is {name!r}; pass a text")
    if not isinstance(tensor, TuckerTensor):
        kind = type_text(tensor)
        raise TypeError(f"Adapter: {name!r} is {kind}; pass a TuckerTensor, such as tucker(x, ranks).tucker")
    for array in (tensor.core, *(u for u in tensor.factors if u is not None)):
        check_loaded("Adapter", array, repr(name))
        kind = dtype_name(array.dtype)
        if kind not in ("float64", "float32", "float16", "bfloat16"):
            raise TypeError(f"Adapter: {name!r} is of type {kind}; pass real floats, as weights are")


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
