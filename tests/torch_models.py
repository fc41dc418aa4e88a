"""Small models, and what their tests do to them and compare."""

import contextlib
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from flora_torch import adapter_parameters, chain
from support import same_bits, tolerance


@contextlib.contextmanager
def small_products(small: bool = True) -> Iterator[None]:
    """Run products with tiny inputs as they are run outside the tests, by ordinary operations."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chain, "_SMALL", 2**15 if small else 0)
        yield


class TiedCNN(nn.Module):
    """A shared convolution, a depthwise and a grouped one, a norm, and tied embedding and output."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.shared = nn.Conv2d(8, 8, 3, padding=1, groups=2, padding_mode="circular")
        self.blocks = nn.ModuleList([self.shared, nn.Conv2d(8, 8, 3, padding=1, groups=8), self.shared])
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 11, bias=True)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids).reshape(ids.shape[0], 3, 3, 8).permute(0, 3, 1, 2)
        for block in self.blocks:
            x = block(x).tanh()
        return self.head(self.norm(x).mean((2, 3)))


def cnn(dtype=torch.float64):
    return TiedCNN().to(dtype).eval()


IDS = torch.arange(18).reshape(2, 9) % 11


def gpt2():
    config = GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=23, n_positions=12, attn_implementation="eager")
    return GPT2LMHeadModel(config).eval()


def encoder():
    layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True, dropout=0.0)
    return nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)).double().eval()


def randomize(model, scale=0.3):
    for parameter in adapter_parameters(model):
        nn.init.normal_(parameter, std=scale)


def bits(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same_state(a, b):
    return set(a) == set(b) and all(same_bits(a[name], b[name]) for name in a)


def close(a, b, factor=1e4):
    name = str(b.dtype).removeprefix("torch.")
    return float((a - b).detach().norm()) <= tolerance(name, 100, norm=float(b.detach().norm()), factor=factor)
