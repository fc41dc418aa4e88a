"""What is collected from data is what the layers' own outputs say."""

import copy
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as nnf
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from flora_tensor import FloraWarning, load_moments
from flora_torch import adapter_parameters, attach, collect_moments, merge
from support import same_bits, tolerance

pytestmark = pytest.mark.usefixtures("seeded")


def close(a, b, *sizes):
    return float((a - b).norm()) <= tolerance("float64", *sizes, norm=float(b.norm()) + 1e-30)


@st.composite
def convolutions(draw):
    n = draw(st.integers(1, 3))
    groups, per_group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    one = st.integers(1, 3)
    dilation = tuple(draw(st.integers(1, 2)) for _ in range(n))
    same = draw(st.booleans())
    stride = (1,) * n if same else tuple(draw(one) for _ in range(n))
    padding = "same" if same else tuple(draw(st.integers(0, 2)) for _ in range(n))
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[n - 1]
    return kind(
        groups * per_group,
        2 * groups,
        tuple(draw(one) for _ in range(n)),
        stride,
        padding,
        dilation,
        groups,
        bias=False,
        padding_mode=draw(st.sampled_from(["zeros", "circular", "reflect", "replicate"])),
    ).double()


class TestMoments:
    @pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
    @given(convolutions(), st.integers(1, 3))
    def test_patches_give_the_energy_of_every_output(self, conv, batch):
        """Mean ‖ΔW x‖² = tr(ΔW C ΔWᵀ), which is what the moment is for; the left side is torch's own convolution."""
        x = torch.randn(batch, conv.in_channels, *[7] * len(conv.kernel_size)).double()
        kernel = torch.randn(2, *conv.weight.shape[1:]).double()
        with torch.no_grad():
            conv.weight.copy_(kernel.repeat(conv.groups, *[1] * (kernel.dim() - 1)))
            output = conv(x)
        model = nn.Sequential(conv)
        moments = collect_moments(model, [x[:1], x[1:]] if batch > 1 else [x])
        moment, flat = moments["0.weight"], kernel.flatten(1)
        count = output.numel() // 2
        assert moments.counts == {"0.weight": count}
        assert moments.axes == {"0.weight": ("i w", "i h w", "i d h w")[len(conv.kernel_size) - 1]}
        assert close((flat @ moment * flat).sum(), output.square().sum() / count, output.numel(), flat.numel())
        assert torch.equal(moment, moment.mT)
        channels = collect_moments(model, [x], patches=False)["0.weight"]
        size, places = conv.weight.shape[1], conv.weight[0, 0].numel()
        blocks = moment.reshape(size, places, size, places)
        assert close(channels, torch.einsum("ikjk->ij", blocks) / places, x.numel())

    def test_parts_of_large_inputs_add_up(self, monkeypatch):
        model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1)).double()
        x = torch.randn(3, 3, 6, 5).double()
        whole = collect_moments(model, [x])["0.weight"]
        for at_once in (1, 200, 1500):
            monkeypatch.setattr("flora_torch.calibration._AT_ONCE", at_once)
            assert close(collect_moments(model, [x])["0.weight"], whole, x.numel())

    @pytest.mark.parametrize("groups", [1, 2])
    def test_transposed_convolutions_without_overlap(self, groups):
        layer = nn.ConvTranspose2d(4, 6, 2, stride=2, groups=groups, bias=False).double()
        x = torch.randn(3, 4, 5, 5).double()
        moments = collect_moments(nn.Sequential(layer), [x])
        moment, flat = moments["0.weight"], layer.weight.detach().flatten(1)
        assert (moments.axes["0.weight"], moments.counts["0.weight"]) == ("o", 75)
        with torch.no_grad():
            energy = layer(x).square().sum() / 75
        assert close((flat * (moment @ flat)).sum(), energy, x.numel())
        assert (groups == 1) == bool(moment[0, 3])

    def test_features(self):
        x = torch.randn(4, 5, 6).double()
        rows = x.reshape(-1, 6)
        for layer, axes in ((nn.Linear(6, 3), "i"), (Conv1D(3, 6), "o")):
            moments = collect_moments(nn.Sequential(layer.double()), [x])
            assert close(moments["0.weight"], rows.mT @ rows / 20, 20)
            assert (moments.axes, moments.counts) == ({"0.weight": axes}, {"0.weight": 20})
        diagonal = collect_moments(nn.Sequential(nn.Linear(6, 3).double()), [x], limit=5)["0.weight"]
        assert close(diagonal, rows.square().mean(0), 20)

    def test_channels_where_patches_are_too_large(self):
        model = nn.Sequential(nn.Conv2d(4, 2, 3))
        shapes = {limit: collect_moments(model, [torch.ones(1, 4, 5, 5)], limit=limit) for limit in (36, 35, 3)}
        assert [(tuple(m["0.weight"].shape), m.axes["0.weight"]) for m in shapes.values()] == [
            ((36, 36), "i h w"),
            ((4, 4), "i"),
            ((4,), "i"),
        ]

    def test_tokens(self):
        model = nn.Sequential(nn.Embedding(7, 3))
        moments = collect_moments(model, [torch.tensor([[1, 2], [2, 6]]), torch.tensor([[0]])])
        assert moments["0.weight"].tolist() == pytest.approx([0.2, 0.2, 0.4, 0, 0, 0, 0.2])
        assert (moments.axes, moments.counts) == ({"0.weight": "o"}, {"0.weight": 5})

    def test_shared_and_tied_weights(self):
        linear = nn.Linear(4, 4).double()
        model, x = nn.Sequential(linear, nn.Tanh(), linear), torch.randn(5, 4).double()
        with torch.no_grad():
            inputs = torch.cat([x, linear(x).tanh()])
        moments = collect_moments(model, [x])
        assert close(moments["0.weight"], inputs.mT @ inputs / 10, 10)
        assert moments.name_of("2.weight") == "0.weight"
        config = GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=13, n_positions=9, tie_word_embeddings=True)
        gpt2 = GPT2LMHeadModel(config)
        moments = collect_moments(gpt2, [{"input_ids": torch.tensor([[1, 2, 3]])}])
        assert moments.axes["transformer.wte.weight"] == "i"
        assert moments.name_of("lm_head.weight") == "transformer.wte.weight"
        assert moments["transformer.h.0.attn.c_attn.weight"].shape == (8, 8)

    @pytest.mark.parametrize("path", ["factored", "dense"])
    def test_adapted_models_are_seen_through(self, path):
        model = nn.Sequential(nn.Embedding(7, 6), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2)).double()
        ids = torch.arange(7)[None]
        before = collect_moments(model, [ids])
        attach(model, ranks=2, path=path)
        after = collect_moments(model, [ids])
        assert set(after) == set(before)
        assert all(close(after[name], before[name], 7) for name in before)

    def test_half_precision_and_autocast_sum_in_float32(self):
        model = nn.Sequential(nn.Linear(4, 3)).to(torch.float16)
        x = torch.full((10, 4), 300.0, dtype=torch.float16)  # the squares overflow float16
        moment = collect_moments(model, [x])["0.weight"]
        assert moment.dtype == torch.float32
        assert moment.unique().tolist() == [9e4]
        wide = nn.Sequential(nn.Linear(4, 3))
        x = torch.full((10, 4), 1.0 + 2.0**-12)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            moment = collect_moments(wide, [x])["0.weight"]
        assert torch.allclose(moment, x.mT @ x / 10, rtol=1e-6)

    def test_model_is_left_as_it_was(self):
        model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
        model[0].eval()
        state = {name: value.clone() for name, value in model.state_dict().items()}
        collect_moments(model, [torch.randn(5, 4)])
        with pytest.raises(ValueError, match="no axis of its 4 inputs"):
            collect_moments(model, [torch.randn(5, 9)])
        assert [m.training for m in model] == [False, True, True]
        assert all(same_bits(state[name], value) for name, value in model.state_dict().items())
        assert not any(module._forward_pre_hooks for module in model.modules())
        assert all(p.grad is None and p.requires_grad for p in model.parameters())

    def test_batches_of_every_form(self):
        class Two(nn.Module):
            def __init__(self):
                super().__init__()
                self.fc = nn.Linear(3, 2)

            def forward(self, a, b):
                return self.fc(input=a + b)

        model, a, b = Two(), torch.randn(4, 3), torch.randn(4, 3)
        rule = {"forward": lambda model, batch: model(batch["x"], b)}
        found = [
            collect_moments(model, [(a, b)]),
            collect_moments(model, [{"a": a, "b": b}]),
            collect_moments(model, [{"x": a, "labels": None}], **rule),
        ]
        assert all(torch.equal(m["fc.weight"], found[0]["fc.weight"]) for m in found)

    def test_file(self, tmp_path):
        model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(12, 2))
        x = torch.randn(4, 2, 4, 4)
        moments = collect_moments(model, [x], path=tmp_path / "m.safetensors", device="cpu")
        again = load_moments(tmp_path / "m.safetensors")
        assert all(same_bits(again[name], moments[name]) for name in moments)
        assert (again.axes, again.counts, again.aliases) == (moments.axes, moments.counts, moments.aliases)
        ran = []
        with pytest.raises(FileExistsError, match="overwrite=True"):
            collect_moments(model, [x], path=tmp_path / "m.safetensors", forward=lambda *_: ran.append(1))
        assert not ran
        collect_moments(model, [2 * x], path=tmp_path / "m.safetensors", overwrite=True)
        assert not same_bits(load_moments(tmp_path / "m.safetensors")["0.weight"], moments["0.weight"])

    def test_refusals(self):
        model = nn.Sequential(nn.Linear(3, 2))
        with pytest.raises(ValueError, match="no layer got an input, of 1 that were watched; pass batches"):
            collect_moments(model, [])
        with pytest.raises(ValueError, match=re.escape("the moment of '0.weight' has NaN or infinite entries")):
            collect_moments(model, [torch.full((1, 3), torch.inf)])
        with pytest.raises(ValueError, match="matches no module"):
            collect_moments(model, [torch.ones(1, 3)], target_modules="fc")

    def test_a_layer_that_is_read_and_not_called(self):
        class Reader(nn.Module):
            def __init__(self):
                super().__init__()
                self.called, self.read = nn.Linear(3, 3), nn.Linear(3, 2)

            def forward(self, x):
                return nnf.linear(self.called(x), self.read.weight)

        with pytest.warns(FloraWarning, match=re.escape("'read.weight' never got an input")):
            moments = collect_moments(Reader(), [torch.ones(1, 3)])
        assert set(moments) == {"called.weight"}

    def test_an_input_that_does_not_fit_its_layer(self):
        class Folded(nn.Linear):
            def forward(self, x):
                return nnf.linear(x.mT, self.weight)

        with pytest.raises(ValueError, match=re.escape("'0.weight' got an input of shape (3, 5), which has no axis")):
            collect_moments(nn.Sequential(Folded(3, 2)), [torch.ones(3, 5)])


class TestAttention:
    """Projections that nn.MultiheadAttention reads instead of calling them."""

    @pytest.mark.parametrize("adapted", [False, True])
    @pytest.mark.parametrize("batch_first", [False, True])
    def test_self_attention(self, batch_first, adapted):
        layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=batch_first, dropout=0.0)
        model, x = nn.Sequential(layer).double(), torch.randn(2, 3, 8).double()
        if adapted:
            attach(model, ranks=2)
            for parameter in adapter_parameters(model):
                nn.init.normal_(parameter, std=0.5)
        moments = collect_moments(model, [x, x[:1]])
        assert "out_proj" not in vars(layer.self_attn)
        rows = torch.cat([x, x[:1]]).reshape(-1, 8)
        assert close(moments["0.self_attn.in_proj_weight"], rows.mT @ rows / 9, 9)
        assert moments.counts["0.self_attn.in_proj_weight"] == 9
        # The heads' results, from the definition.
        whole = merge(copy.deepcopy(model)) if adapted else model
        weight, bias = whole[0].self_attn.in_proj_weight, whole[0].self_attn.in_proj_bias
        total = torch.zeros(8, 8).double()
        for batch in (x, x[:1]):
            tokens = batch if batch_first else batch.transpose(0, 1)
            q, k, v = nnf.linear(tokens, weight, bias).chunk(3, -1)
            q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in (q, k, v))
            heads = torch.softmax(q @ k.mT / 2.0, -1) @ v
            rows = heads.transpose(1, 2).reshape(-1, 8)
            total += (rows.mT @ rows).detach()
        assert close(moments["0.self_attn.out_proj.weight"], total / 9, 9)

    def test_cross_attention(self):
        class Cross(nn.Module):
            def __init__(self, **sizes):
                super().__init__()
                self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **sizes)

            def forward(self, q, k, v):
                return self.attention(q, key=k, value=v, need_weights=False)

        q, k, v = torch.randn(2, 3, 8), torch.randn(2, 5, 8), torch.randn(2, 5, 8)
        moments = collect_moments(Cross(), [(q, k, v)])
        rows = torch.cat([q.reshape(-1, 8), k.reshape(-1, 8), v.reshape(-1, 8)])
        assert torch.allclose(moments["attention.in_proj_weight"], rows.mT @ rows / 26, rtol=1e-5, atol=1e-6)
        k, v = torch.randn(2, 5, 6), torch.randn(2, 5, 7)
        moments = collect_moments(Cross(kdim=6, vdim=7), [(q, k, v)])
        for name, x in (("q", q), ("k", k), ("v", v)):
            rows = x.reshape(-1, x.shape[-1])
            found = moments[f"attention.{name}_proj_weight"]
            assert torch.allclose(found, rows.mT @ rows / len(rows), rtol=1e-5, atol=1e-6)

    def test_they_start_an_adapter(self):
        model, x = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)).eval(), torch.randn(2, 3, 8)
        before = model(x)
        moments = collect_moments(model, [x])
        attach(model, ranks=2, init="from_moments", init_tensors=moments)
        assert torch.equal(model(x), before)
        found = model[0].self_attn.tucker_update["default"]["in_proj_weight"].factor_1
        vectors = torch.linalg.eigh(moments["0.self_attn.in_proj_weight"]).eigenvectors[:, -2:]
        assert torch.allclose(found @ found.mT, vectors @ vectors.mT, atol=1e-4)


class TestMasks:
    def test_padding_is_not_counted(self):
        config = GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=13, n_positions=9, tie_word_embeddings=False)
        model = GPT2LMHeadModel(config).eval()
        ids, mask = torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0]]), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
        moments = collect_moments(model, [{"input_ids": ids, "attention_mask": mask}], mask="attention_mask")
        # Each sequence by itself, without padding: a causal model computes the same of it.
        alone = collect_moments(model, [{"input_ids": ids[:1]}, {"input_ids": ids[1:, :2]}])
        assert set(moments) == set(alone)
        for name in moments:
            if name != "transformer.wpe.weight":  # positions are looked up once for the whole batch
                assert moments.counts[name] == alone.counts[name], name
                assert torch.allclose(moments[name], alone[name], rtol=1e-4, atol=1e-6), name

    def test_flattened_tokens_and_callables(self):
        model, x = nn.Sequential(nn.Flatten(0, 1), nn.Linear(3, 2)), torch.randn(2, 4, 3)
        mask = torch.rand(2, 4) < 0.5
        mask[0, 0] = True
        moment = collect_moments(model, [x], mask=lambda batch: mask)["1.weight"]
        rows = x[mask]
        assert torch.allclose(moment, rows.mT @ rows / len(rows), rtol=1e-5, atol=1e-6)

    def test_refusals(self):
        model, x = nn.Sequential(nn.Linear(3, 2)), torch.randn(2, 4, 3)
        with pytest.raises(ValueError, match="mask is 'attention_mask', and a batch has no such entry"):
            collect_moments(model, [x], mask="attention_mask")
        with pytest.raises(ValueError, match="the mask fits no input of a layer"):
            collect_moments(model, [x], mask=lambda batch: torch.ones(5, 5))
        with pytest.raises(ValueError, match="no layer got an input"):
            collect_moments(model, [], mask="attention_mask")
        with pytest.raises(ValueError, match="collect_moments: target_modules 'fc' matches no module of the model"):
            collect_moments(model, [x], target_modules="fc")


def test_what_is_collected_is_no_part_of_a_graph():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    attach(model, ranks=2)
    moments = collect_moments(model, [torch.ones(1, 3, requires_grad=True)])
    assert not any(moment.requires_grad for moment in moments.values())
    assert all(p.grad is None for p in adapter_parameters(model))
    assert np.isfinite(moments["1.weight"].numpy()).all()
