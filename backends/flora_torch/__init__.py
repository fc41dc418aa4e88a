"""PyTorch layers for low-rank tensor adapters.

A frozen base layer and a trainable Tucker tensor ΔW: the output is the base's with W + s·ΔW. See `attach`.
"""

from flora_torch.bilinear import FloraBilinear, FloraEmbeddingBag
from flora_torch.calibration import collect_moments
from flora_torch.containers import FloraParameterCollection
from flora_torch.experts import FloraExperts
from flora_torch.gradients import Gradients, collect_gradients
from flora_torch.layers import (
    FloraConv,
    FloraConvTranspose,
    FloraEmbedding,
    FloraLayer,
    FloraLinear,
    FloraParameter,
)
from flora_torch.model import (
    AttachReport,
    LayerReport,
    activate,
    adapter_parameters,
    adapters_for_rows,
    attach,
    attach_adapter,
    detach,
    disabled,
    hotswap_adapter,
    load_adapter,
    merge,
    merge_,
    rename_adapter,
    save_adapter,
    unmerge_,
)
from flora_torch.moment_starts import moment_ranks
from flora_torch.pytree import register_with_torch
from flora_torch.selection import SkippedWeight
from flora_torch.training import parameter_groups, retract_
from flora_torch.update import TuckerUpdate

__all__ = [
    "AttachReport",
    "FloraBilinear",
    "FloraConv",
    "FloraConvTranspose",
    "FloraEmbedding",
    "FloraEmbeddingBag",
    "FloraExperts",
    "FloraLayer",
    "FloraLinear",
    "FloraParameter",
    "FloraParameterCollection",
    "Gradients",
    "LayerReport",
    "SkippedWeight",
    "TuckerUpdate",
    "activate",
    "adapter_parameters",
    "adapters_for_rows",
    "attach",
    "attach_adapter",
    "collect_gradients",
    "collect_moments",
    "detach",
    "disabled",
    "hotswap_adapter",
    "load_adapter",
    "merge",
    "merge_",
    "moment_ranks",
    "parameter_groups",
    "rename_adapter",
    "retract_",
    "save_adapter",
    "unmerge_",
]

register_with_torch()


def __dir__() -> list[str]:
    return __all__
