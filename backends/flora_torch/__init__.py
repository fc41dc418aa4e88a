"""PyTorch layers for low-rank tensor adapters.

A frozen base layer and a trainable Tucker tensor ΔW: the output is the base's with W + s·ΔW. See `attach`.
"""

from flora_torch.calibration import collect_moments
from flora_torch.experts import FloraExperts
from flora_torch.gradients import collect_gradients
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
    attach,
    attach_adapter,
    detach,
    disabled,
    load_adapter,
    merge,
    save_adapter,
)
from flora_torch.training import parameter_groups, retract_
from flora_torch.update import TuckerUpdate, register_with_torch

__all__ = [
    "AttachReport",
    "FloraConv",
    "FloraConvTranspose",
    "FloraEmbedding",
    "FloraExperts",
    "FloraLayer",
    "FloraLinear",
    "FloraParameter",
    "LayerReport",
    "TuckerUpdate",
    "activate",
    "adapter_parameters",
    "attach",
    "attach_adapter",
    "collect_gradients",
    "collect_moments",
    "detach",
    "disabled",
    "load_adapter",
    "merge",
    "parameter_groups",
    "retract_",
    "save_adapter",
]

register_with_torch()
