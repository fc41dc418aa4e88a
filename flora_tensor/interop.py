"""Tucker tensors to and from TensorLy, which need not be installed."""

from typing import Any

from flora_tensor.tucker_tensor import TuckerTensor, check_tucker, explicit_factor

__all__ = ["from_tensorly", "to_tensorly"]


def to_tensorly(tucker: TuckerTensor) -> Any:
    """Turn a Tucker tensor into TensorLy's.

    Arrays are shared, not copied. A factor that is ``None`` becomes the identity matrix, since TensorLy has no partial
    tensors of this kind. TensorLy's global backend is neither read nor set: arrays of any library pass, but
    TensorLy's own functions work on them only under its matching backend.

    Parameters
    ----------
    tucker : TuckerTensor
        A tensor of shape (I_0, …, I_{N-1}), ranks r.

    Returns
    -------
    tensorly.tucker_tensor.TuckerTensor
        The same tensor: core (r_0, …), factors (I_n, r_n).

    Raises
    ------
    ImportError
        If TensorLy is not installed.
    TypeError
        If ``tucker`` is no Tucker tensor.

    References
    ----------
    Kossaifi, Panagakis, Anandkumar and Pantic, *TensorLy: tensor learning in Python*, JMLR 20 (2019).

    Examples
    --------
    >>> import numpy as np
    >>> t = TuckerTensor(np.ones((1, 1)), [np.ones((2, 1)), np.ones((3, 1))])
    >>> core, factors = to_tensorly(t)
    >>> core.shape, [u.shape for u in factors]
    ((1, 1), [(2, 1), (3, 1)])
    """
    try:
        from tensorly.tucker_tensor import TuckerTensor as Theirs
    except ImportError:
        message = "to_tensorly: TensorLy is not installed; pip install 'flora-tensor[tensorly]'"
        raise ImportError(message) from None
    check_tucker("to_tensorly", tucker)
    # Their constructor checks shapes through the global backend, which may be one that does not know these arrays.
    result = Theirs.__new__(Theirs)
    result.core, result.factors = tucker.core, [explicit_factor(tucker, mode) for mode in range(tucker.ndim)]
    result.shape, result.rank = tucker.shape, tucker.ranks
    return result


def from_tensorly(tucker: Any) -> TuckerTensor:
    """Turn TensorLy's Tucker tensor, or any pair of a core and its factors, into ours.

    Parameters
    ----------
    tucker : tensorly.tucker_tensor.TuckerTensor, or (core, factors)
        A tensor of shape (I_0, …, I_{N-1}), ranks r.

    Returns
    -------
    TuckerTensor
        The same tensor; arrays are shared, not copied.

    Raises
    ------
    TypeError
        If this is no pair of a core and factors.
    ValueError
        If core and factors do not fit each other.

    References
    ----------
    Kossaifi, Panagakis, Anandkumar and Pantic, *TensorLy: tensor learning in Python*, JMLR 20 (2019).

    Examples
    --------
    >>> import numpy as np
    >>> from_tensorly((np.ones((1, 1)), [np.ones((2, 1)), np.ones((3, 1))])).shape
    (2, 3)
    """
    try:
        core, factors = tucker
        return TuckerTensor(core, tuple(factors))
    except (TypeError, AttributeError) as error:
        raise TypeError(f"from_tensorly: got {type(tucker).__name__}; pass a pair (core, factors)") from error
