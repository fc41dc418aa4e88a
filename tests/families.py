"""Tiny models of many families, each with an input: what an adapter has to be attachable to."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers
from torch import nn

IDS = torch.arange(12).reshape(2, 6) % 19


class Family(NamedTuple):
    """A model family: how to make a model, its keyword arguments, and how to read the result."""

    make: Callable[[], nn.Module]
    inputs: dict[str, torch.Tensor]
    read: Callable[[Any], torch.Tensor] = lambda output: output


def _logits(output: Any) -> torch.Tensor:
    return output.logits


def _pooled(output: Any) -> torch.Tensor:
    return output.pooler_output


def _state(output: Any) -> torch.Tensor:
    return output.last_hidden_state


def noise(*shape: int) -> torch.Tensor:
    """Return the same random numbers every time."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def vit() -> nn.Module:
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, image_size=8, patch_size=4
    )
    return transformers.ViTModel(config)


def convnext() -> nn.Module:
    config = transformers.ConvNextConfig(hidden_sizes=[8, 12], depths=[1, 1], num_stages=2, patch_size=2)
    return transformers.ConvNextModel(config)


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=19, n_positions=8)
    return transformers.GPT2LMHeadModel(config)


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=19,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def mixtral(experts: str = "eager") -> nn.Module:
    config = transformers.MixtralConfig(
        hidden_size=16, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=19, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config)
    model.set_experts_implementation(experts)
    return model


def gpt_oss(experts: str = "eager") -> nn.Module:
    config = transformers.GptOssConfig(
        hidden_size=16, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        head_dim=8, vocab_size=19, num_local_experts=4, num_experts_per_tok=2, sliding_window=4,
    )  # fmt: skip
    model = transformers.GptOssForCausalLM(config)
    model.set_experts_implementation(experts)
    return model


def whisper() -> nn.Module:
    config = transformers.WhisperConfig(
        d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=24, decoder_ffn_dim=24, vocab_size=19, num_mel_bins=8, max_source_positions=6,
        max_target_positions=8, pad_token_id=0, bos_token_id=0, eos_token_id=1, decoder_start_token_id=2,
    )  # fmt: skip
    return transformers.WhisperModel(config)


def wav2vec2() -> nn.Module:
    config = transformers.Wav2Vec2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, conv_dim=(8, 8),
        conv_stride=(4, 2), conv_kernel=(8, 3), num_feat_extract_layers=2, num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    return transformers.Wav2Vec2Model(config)


def t5() -> nn.Module:
    config = transformers.T5Config(
        d_model=16, d_kv=8, d_ff=24, num_layers=1, num_decoder_layers=1, num_heads=2, vocab_size=19,
        decoder_start_token_id=0, relative_attention_num_buckets=8,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


class UNet(nn.Module):
    """Down, up and across, in two or three dimensions."""

    def __init__(self, dims: int, width: int = 6):
        super().__init__()
        conv: Any = {2: nn.Conv2d, 3: nn.Conv3d}[dims]
        up: Any = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}[dims]
        pool: Any = {2: nn.MaxPool2d, 3: nn.MaxPool3d}[dims]
        norm: Any = {2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}[dims]

        def block(before: int, after: int) -> nn.Module:
            middle = conv(after, after, 3, padding=1, groups=2)
            return nn.Sequential(conv(before, after, 3, padding=1), norm(after, affine=True), nn.SiLU(), middle)

        self.down = block(2, width)
        self.pool = pool(2)
        self.middle = block(width, 2 * width)
        self.up = up(2 * width, width, 2, stride=2)
        self.across = block(2 * width, width)
        self.head = conv(width, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = self.down(x)
        up = self.up(self.middle(self.pool(first)))
        return self.head(self.across(torch.cat([first, up], 1)))


class Transformer(nn.Module):
    """The encoder and decoder of torch, whose layers read weights instead of calling modules where they can."""

    def __init__(self):
        super().__init__()
        options: dict[str, Any] = {"dropout": 0.0, "batch_first": True}
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 24, **options), 2)
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(16, 2, 24, **options), 1)

    def forward(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return self.decoder(target, self.encoder(source))


class Tagger(nn.Module):
    """Recurrent, bilinear and normalized layers, a parameter of its own, and one shared layer."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(19, 10)
        self.bag = nn.EmbeddingBag(19, 8)
        self.lstm = nn.LSTM(10, 8, num_layers=2, bidirectional=True, batch_first=True, proj_size=4)
        self.cell = nn.GRUCell(8, 8)
        self.conv = nn.utils.parametrizations.weight_norm(nn.Conv1d(8, 8, 3, padding=1), dim=2)
        self.mix = nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8))
        self.pair = nn.Bilinear(8, 8, 5)
        self.again = nn.ModuleList([self.mix, self.mix])

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        states, _ = self.lstm(self.embed(ids))
        states = self.conv(states.transpose(1, 2)).transpose(1, 2)
        for layer in self.again:
            states = layer(states).tanh()
        last = self.cell(self.bag(ids), states[:, -1])
        return self.pair(states, last.unsqueeze(1).expand_as(states).contiguous())


FAMILIES = {
    "vit": Family(vit, {"pixel_values": noise(2, 3, 8, 8)}, _pooled),
    "convnext": Family(convnext, {"pixel_values": noise(2, 3, 16, 16)}, _state),
    "gpt2": Family(gpt2, {"input_ids": IDS}, _logits),
    "llama": Family(llama, {"input_ids": IDS}, _logits),
    "mixtral": Family(mixtral, {"input_ids": IDS}, _logits),
    "gpt_oss": Family(gpt_oss, {"input_ids": IDS}, _logits),
    "whisper": Family(whisper, {"input_features": noise(2, 8, 12), "decoder_input_ids": IDS}, _state),
    "wav2vec2": Family(wav2vec2, {"input_values": noise(2, 200)}, _state),
    "t5": Family(t5, {"input_ids": IDS, "decoder_input_ids": IDS}, _logits),
    "unet": Family(functools.partial(UNet, 2), {"x": noise(1, 2, 8, 8)}),
    "unet3d": Family(functools.partial(UNet, 3), {"x": noise(1, 2, 4, 4, 4)}),
    "transformer": Family(Transformer, {"source": noise(2, 5, 16), "target": noise(2, 3, 16)}),
    "tagger": Family(Tagger, {"ids": IDS}),
}
