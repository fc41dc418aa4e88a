"""Two more small networks for the digits: a ConvNeXt and a vision transformer, with the layers that large ones have.

With `DigitsNet` they are the three networks on which the quality of extraction is measured. Both take 12×12 images.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["DigitsConvNeXt", "DigitsViT"]


class _Block(nn.Module):
    """A block of ConvNeXt: depthwise convolution, then a wide layer and back at every place."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 5, padding=2, groups=width)
        self.norm = nn.LayerNorm(width)
        self.wide = nn.Linear(width, 4 * width)
        self.back = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        return x + self.back(functional.gelu(self.wide(y))).permute(0, 3, 1, 2)


class DigitsConvNeXt(nn.Module):
    """A ConvNeXt of two stages; 12×12 images in, ten scores out.

    Parameters
    ----------
    width : int
        The channels of the first stage; the second has twice as many.
    seed : int
        What the weights are drawn from; the global generator is left as it was.

    References
    ----------
    Liu et al., *A ConvNet for the 2020s*, CVPR 2022.

    Examples
    --------
    >>> DigitsConvNeXt(8)(torch.zeros(2, 1, 12, 12)).shape
    torch.Size([2, 10])
    """

    def __init__(self, width: int = 24, *, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.stem = nn.Conv2d(1, width, 2, stride=2)
            self.first = nn.Sequential(_Block(width), _Block(width))
            self.down = nn.Conv2d(width, 2 * width, 2, stride=2)
            self.second = _Block(2 * width)
            self.norm = nn.LayerNorm(2 * width)
            self.head = nn.Linear(2 * width, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Score images.

        Parameters
        ----------
        images : Tensor of shape (n, 1, 12, 12)
            The images.

        Returns
        -------
        Tensor of shape (n, 10)
            A score for each digit.
        """
        # Shapes: (n, 1, 12, 12), (n, width, 6, 6), (n, 2 width, 3, 3), (n, 10).
        x = self.second(self.down(self.first(self.stem(images - 0.5))))
        return self.head(self.norm(x.mean((2, 3))))


class _Attention(nn.Module):
    """Attention with its four projections as weights of their own, as transformers names them."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.o_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, width = x.shape
        q, k, v = (
            p(x).view(n, tokens, self.heads, -1).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = functional.scaled_dot_product_attention(q, k, v)
        return self.o_proj(mixed.transpose(1, 2).reshape(n, tokens, width))


class _Layer(nn.Module):
    """A layer of a pre-norm transformer."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = _Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 2 * width)
        self.fc2 = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.fc2(functional.gelu(self.fc1(self.norm2(x))))


class DigitsViT(nn.Module):
    """A vision transformer on 3×3 patches; 12×12 images in, ten scores out.

    Parameters
    ----------
    width : int
        The features of a token, a multiple of ``heads``.
    heads : int
        The attention heads.
    depth : int
        How many layers.
    seed : int
        What the weights are drawn from; the global generator is left as it was.

    References
    ----------
    Dosovitskiy et al., *An image is worth 16x16 words*, ICLR 2021.

    Examples
    --------
    >>> model = DigitsViT(16, heads=2)
    >>> model(torch.zeros(2, 1, 12, 12)).shape, model.config["num_attention_heads"]
    (torch.Size([2, 10]), 2)
    """

    def __init__(self, width: int = 48, *, heads: int = 6, depth: int = 3, seed: int = 0) -> None:
        super().__init__()
        # What stands beside a checkpoint, and tells extraction of the heads.
        self.config: dict[str, Any] = {"num_attention_heads": heads, "hidden_size": width}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.patches = nn.Conv2d(1, width, 3, stride=3)
            self.positions = nn.Parameter(0.02 * torch.randn(1, 16, width))
            self.layers = nn.ModuleList(_Layer(width, heads) for _ in range(depth))
            self.norm = nn.LayerNorm(width)
            self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Score images.

        Parameters
        ----------
        images : Tensor of shape (n, 1, 12, 12)
            The images.

        Returns
        -------
        Tensor of shape (n, 10)
            A score for each digit.
        """
        # Shapes: (n, 1, 12, 12), (n, width, 4, 4), (n, 16, width), (n, 10).
        x = self.patches(images - 0.5).flatten(2).transpose(1, 2) + self.positions
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x.mean(1)))
