"""Tucker decompositions and low-rank tensor adapters, for the arrays of any library.

A change of a weight with N axes as a Tucker tensor: ΔW = s · G ×₁ U₁ … ×_N U_N.
"""

from flora_tensor._checks import feasible_ranks
from flora_tensor._errors import InputError, ResourceError
from flora_tensor._version import __version__
from flora_tensor._warnings import FloraWarning
from flora_tensor.adapter import Adapter
from flora_tensor.adapter_algebra import (
    AdapterFit,
    AdapterRow,
    add_adapters,
    round_adapter,
    scale_adapter,
    subtract_adapters,
)
from flora_tensor.adapter_export import to_diffusers, to_lycoris, to_peft_lora
from flora_tensor.adapter_file import load_adapter, save_adapter
from flora_tensor.algebra import fold, mode_dot, multi_mode_dot, unfold
from flora_tensor.allocation import Allocation, RankAssignment, allocate_ranks
from flora_tensor.arrangement import Arrangement
from flora_tensor.checkpoint import Checkpoint, open_checkpoint
from flora_tensor.comparison import DiffReport, DiffRow, diff_checkpoints
from flora_tensor.conversion import (
    convert_adapter,
    from_diffusers,
    from_lycoris,
    from_official_flora,
    from_peft_lora,
)
from flora_tensor.decomposition import TuckerFit, hooi, hosvd, round_tucker, st_hosvd, tucker
from flora_tensor.extraction import extract
from flora_tensor.interop import from_tensorly, to_tensorly
from flora_tensor.merging import MergeReport, merge_checkpoint
from flora_tensor.moments import Moments, load_moments, save_moments
from flora_tensor.noise import rounding_noise
from flora_tensor.rank_study import BudgetRow, RankStudy, study_ranks
from flora_tensor.ranks import EffectiveRanks, RankChoice, effective_ranks, select_ranks
from flora_tensor.report import ExtractionReport, TensorRow
from flora_tensor.spectra import (
    Frontier,
    ModeSpectra,
    Spectrum,
    error_table,
    hosvd_spectrum,
    mode_spectra,
)
from flora_tensor.stacking import TuckerStack
from flora_tensor.tucker_algebra import (
    add,
    inner,
    norm,
    orthogonalize,
    permute_modes,
    scale,
    select_slice,
    stack,
)
from flora_tensor.tucker_tensor import TuckerTensor, reconstruct

__all__ = [
    "Adapter",
    "AdapterFit",
    "AdapterRow",
    "Allocation",
    "Arrangement",
    "BudgetRow",
    "Checkpoint",
    "DiffReport",
    "DiffRow",
    "EffectiveRanks",
    "ExtractionReport",
    "FloraWarning",
    "Frontier",
    "InputError",
    "MergeReport",
    "ModeSpectra",
    "Moments",
    "RankAssignment",
    "RankChoice",
    "RankStudy",
    "ResourceError",
    "Spectrum",
    "TensorRow",
    "TuckerFit",
    "TuckerStack",
    "TuckerTensor",
    "__version__",
    "add",
    "add_adapters",
    "allocate_ranks",
    "convert_adapter",
    "diff_checkpoints",
    "effective_ranks",
    "error_table",
    "extract",
    "feasible_ranks",
    "fold",
    "from_diffusers",
    "from_lycoris",
    "from_official_flora",
    "from_peft_lora",
    "from_tensorly",
    "hooi",
    "hosvd",
    "hosvd_spectrum",
    "inner",
    "load_adapter",
    "load_moments",
    "merge_checkpoint",
    "mode_dot",
    "mode_spectra",
    "multi_mode_dot",
    "norm",
    "open_checkpoint",
    "orthogonalize",
    "permute_modes",
    "reconstruct",
    "round_adapter",
    "round_tucker",
    "rounding_noise",
    "save_adapter",
    "save_moments",
    "scale",
    "scale_adapter",
    "select_ranks",
    "select_slice",
    "st_hosvd",
    "stack",
    "study_ranks",
    "subtract_adapters",
    "to_diffusers",
    "to_lycoris",
    "to_peft_lora",
    "to_tensorly",
    "tucker",
    "unfold",
]


def __dir__() -> list[str]:
    return __all__
