"""Tucker decompositions and low-rank tensor adapters, for the arrays of any library.

A change of a weight with N axes as a Tucker tensor: ΔW = s · G ×₁ U₁ … ×_N U_N.
"""

from flora_tensor._checks import feasible_ranks
from flora_tensor._version import __version__
from flora_tensor.algebra import fold, mode_dot, multi_mode_dot, unfold
from flora_tensor.arrangement import Arrangement
from flora_tensor.tucker_tensor import (
    TuckerTensor,
    add,
    inner,
    norm,
    orthogonalize,
    permute_modes,
    reconstruct,
    scale,
)

__all__ = [
    "Arrangement",
    "TuckerTensor",
    "__version__",
    "add",
    "feasible_ranks",
    "fold",
    "inner",
    "mode_dot",
    "multi_mode_dot",
    "norm",
    "orthogonalize",
    "permute_modes",
    "reconstruct",
    "scale",
    "unfold",
]
