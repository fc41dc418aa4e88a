"""Weights with a magnitude of their own for each output channel: W' = m · V / ‖V‖, V = W + ΔW.

An output channel is a slice of the weight: of its first axis, or of its second in a weight stored as (in, out). A
transposed convolution with groups stores (in, out/groups, …), and its channels are the slices of every group's part.
"""

from typing import Any

from flora_tensor._arrays import array_namespace
from flora_tensor._typing import Array

__all__ = ["by_channel", "channel_count", "channel_norms", "channel_ratio", "magnitude_change", "spread_over_channels"]


def channel_count(shape: tuple[int, ...], axis: int, groups: int = 1) -> int:
    """Return how many output channels a weight has.

    Parameters
    ----------
    shape : tuple of int
        The weight's shape.
    axis : {0, 1}
        The axis of the output channels.
    groups : int
        How many groups share that axis; 1 unless ``axis`` is 1.

    Returns
    -------
    int
        The number of channels.

    Raises
    ------
    ValueError
        If the weight has no such axis, or its first axis does not fall into as many groups.

    Examples
    --------
    >>> channel_count((8, 3, 5, 5), 0), channel_count((8, 3, 5, 5), 1, groups=4)
    (8, 12)
    """
    if axis not in (0, 1) or len(shape) < 2:
        raise ValueError(f"magnitude: no output channels on axis {axis} of shape {shape}; pass axis 0 or 1 of a weight")
    if groups < 1 or (groups > 1 and (axis != 1 or shape[0] % groups)):
        raise ValueError(
            f"magnitude: {groups} groups on axis {axis} of shape {shape}; groups belong to axis 1 and divide axis 0"
        )
    return shape[axis] * groups


def channel_norms(weight: Array, axis: int, groups: int = 1) -> Array:
    """Return the Frobenius norm of each output channel's slice, in the weight's type.

    Parameters
    ----------
    weight : array, shape (n_0, n_1, …)
        V.
    axis, groups
        As for `channel_count`.

    Returns
    -------
    array, shape (channels,)
        ‖V‖ by channel.

    Raises
    ------
    ValueError
        As for `channel_count`.

    References
    ----------
    Liu et al., *DoRA: weight-decomposed low-rank adaptation*, ICML 2024, equation 2.

    Examples
    --------
    >>> import numpy as np
    >>> channel_norms(np.asarray([[3.0, 4.0], [0.0, 2.0]]), 0)
    array([5., 2.])
    """
    xp: Any = array_namespace("magnitude", weight)
    channel_count(tuple(weight.shape), axis, groups)
    tensor, kept = by_channel(weight, axis, groups)
    rest = tuple(k for k in range(tensor.ndim) if k not in kept)
    return xp.reshape(xp.linalg.vector_norm(tensor, axis=rest), (-1,))


def spread_over_channels(values: Array, shape: tuple[int, ...], axis: int, groups: int = 1) -> Array:
    """Give one number a channel a shape that broadcasts against the weight.

    Parameters
    ----------
    values : array, shape (channels,)
        A number for each output channel.
    shape : tuple of int
        The weight's shape.
    axis, groups
        As for `channel_count`.

    Returns
    -------
    array, shape (n_0 or 1, n_1 or 1, 1, …)
        The numbers, at their channels.

    Raises
    ------
    ValueError
        If there is not one number for each channel, and as for `channel_count`.

    Examples
    --------
    >>> import numpy as np
    >>> spread_over_channels(np.asarray([1.0, 2.0]), (4, 1), 1, groups=2).tolist()
    [[1.0], [1.0], [2.0], [2.0]]
    """
    xp: Any = array_namespace("magnitude", values)
    channels = channel_count(shape, axis, groups)
    if tuple(values.shape) != (channels,):
        raise ValueError(f"magnitude: values of shape {tuple(values.shape)} for {channels} channels; pass one for each")
    ones = (1,) * (len(shape) - 2)
    if groups == 1:
        return xp.reshape(values, (channels, 1, *ones) if axis == 0 else (1, channels, *ones))
    per_group = xp.reshape(values, (groups, 1, shape[1]))
    return xp.reshape(xp.broadcast_to(per_group, (groups, shape[0] // groups, shape[1])), (shape[0], shape[1], *ones))


def by_channel(weight: Array, axis: int, groups: int) -> tuple[Any, tuple[int, ...]]:
    """Return the weight with an axis for its groups, where it has several, and the axes that name a channel."""
    if groups == 1:
        return weight, (axis,)
    xp: Any = array_namespace("magnitude", weight)
    first, *rest = weight.shape
    return xp.reshape(weight, (groups, first // groups, *rest)), (0, 2)


def magnitude_change(weight: Array, delta: Array, magnitude: Array, axis: int, groups: int = 1) -> Array:
    """Return m · V / ‖V‖ − W with V = W + ΔW: what a magnitude makes of a change.

    The norms are rounded to the type that the magnitude is stored in before they divide it, so that a magnitude which
    was started from the same norms changes nothing at all.

    Parameters
    ----------
    weight, delta : array, shape (n_0, n_1, …)
        W and ΔW.
    magnitude : array, shape (channels,)
        m.
    axis, groups
        As for `channel_count`.

    Returns
    -------
    array, shape (n_0, n_1, …)
        What is added to W. A channel of norm zero is not rescaled.

    Raises
    ------
    ValueError
        As for `spread_over_channels`.

    References
    ----------
    Liu et al., *DoRA: weight-decomposed low-rank adaptation*, ICML 2024, equation 5.

    Examples
    --------
    >>> import numpy as np
    >>> magnitude_change(np.asarray([[3.0, 3.0]]), np.asarray([[0.0, 1.0]]), np.asarray([10.0]), 0)
    array([[3., 5.]])
    """
    xp: Any = array_namespace("magnitude", weight, delta)
    ratio = channel_ratio(magnitude, channel_norms(weight + delta, axis, groups))
    spread = xp.astype(spread_over_channels(ratio, tuple(delta.shape), axis, groups), delta.dtype)
    return (spread - 1) * weight + spread * delta


def channel_ratio(magnitude: Array, norms: Array) -> Array:
    """Return m / ‖V‖ in m's type, and 1 where the norm is zero: such a channel has no direction to rescale.

    Examples
    --------
    >>> import numpy as np
    >>> channel_ratio(np.asarray([4.0, 0.0]), np.asarray([2.0, 0.0]))
    array([2., 1.])
    """
    xp: Any = array_namespace("magnitude", magnitude)
    rounded = xp.astype(norms, magnitude.dtype)
    ones = xp.ones_like(rounded)
    # The division is by one where the other branch is taken: an infinite gradient times zero would be NaN.
    return xp.where(rounded > 0, magnitude / xp.where(rounded > 0, rounded, ones), ones)
