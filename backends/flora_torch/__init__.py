"""PyTorch layers for low-rank tensor adapters.

A frozen base layer and a trainable Tucker tensor ΔW: the output is the base's with W + s·ΔW. See `attach`.
"""

from flora_torch.layers import (
    FloraConv,
    FloraConvTranspose,
    FloraEmbedding,
    FloraLayer,
    FloraLinear,
    FloraParameter,
)
from flora_torch.update import TuckerUpdate, register_with_torch

__all__ = [
    "FloraConv",
    "FloraConvTranspose",
    "FloraEmbedding",
    "FloraLayer",
    "FloraLinear",
    "FloraParameter",
    "TuckerUpdate",
]

register_with_torch()
