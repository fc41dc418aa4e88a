"""Dropouts of directions and of whole updates, and the scales that α stands for."""

import copy
import json
import math

import pytest
import torch
from torch import nn

from flora_torch import (
    FloraConv,
    FloraEmbedding,
    FloraLinear,
    FloraParameter,
    TuckerUpdate,
    adapter_parameters,
    attach,
    load_adapter,
    save_adapter,
)
from flora_torch.scaling import resolve_scale
from flora_torch.update import DROPOUTS
from test_torch_layers import ScaledLinear, close, randomize

pytestmark = pytest.mark.usefixtures("seeded", "large_products")


LAYERS = {
    "linear": (lambda **o: FloraLinear(nn.Linear(6, 5), ranks=(2, 3), **o), torch.randn(2, 6)),
    "conv": (lambda **o: FloraConv(nn.Conv2d(3, 4, 3, padding=1), ranks=2, **o), torch.randn(1, 3, 3, 3)),
    "matrix": (
        lambda **o: FloraConv(nn.Conv2d(3, 4, 3), ranks=3, arrangement="o (i h w)", **o),
        torch.randn(1, 3, 3, 3),
    ),
    "embedding": (lambda **o: FloraEmbedding(nn.Embedding(7, 5), ranks=(3, 2), **o), torch.arange(4)),
    "own forward": (lambda **o: FloraLinear(ScaledLinear(6, 5), ranks=2, **o), torch.randn(2, 6)),
    "parameter": (lambda **o: FloraParameter(nn.LSTM(4, 3), "weight_ih_l0", 2, **o), torch.randn(2, 1, 4)),
}


def made(kind, **options):
    make, x = LAYERS[kind]
    layer = make(scale=0.5, **options).double()
    randomize(layer)
    return layer, x.double() if x.is_floating_point() else x


def result(layer, x):
    output = layer(x)
    return output[0] if isinstance(output, tuple) else output


class TestDropouts:
    @pytest.mark.parametrize("kind", LAYERS)
    @pytest.mark.parametrize("option", ["rank_dropout", "module_dropout"])
    def test_only_in_training_and_drawn_from_the_seed(self, kind, option):
        layer, x = made(kind, **{option: 0.5})
        plain = copy.deepcopy(layer)
        for module in plain.modules():
            if isinstance(module, TuckerUpdate):
                setattr(module, option, 0.0)
        assert torch.equal(result(layer.eval(), x), result(plain.eval(), x))
        layer.train()
        draws = []
        for seed in (0, 0, *range(1, 9)):
            torch.manual_seed(seed)
            draws.append(result(layer, x))
        assert torch.equal(draws[0], draws[1])
        assert any(not torch.allclose(draws[0], draw) for draw in draws)

    @pytest.mark.parametrize("magnitude", [False, True])
    @pytest.mark.parametrize("kind", ["linear", "conv", "embedding"])
    def test_module_dropout_is_all_or_nothing(self, kind, magnitude):
        chance = 0.25
        layer, x = made(kind, module_dropout=chance, magnitude=magnitude)
        base, full = layer.base_layer(x), layer.eval()(x)
        layer.train()
        for path in ("factored", "dense"):
            layer.path = path
            left = 0
            for seed in range(200):
                torch.manual_seed(seed)
                output = layer(x)
                dropped = close(output, base, 9, 9, factor=300)
                kept = close(output, base + (full - base) / (1 - chance), 9, 9, factor=300)
                assert dropped != kept
                left += kept
            # Four standard deviations of 200 draws.
            assert abs(left - 150) < 4 * math.sqrt(200 * 0.25 * 0.75)

    @pytest.mark.parametrize("magnitude", [False, True])
    @pytest.mark.parametrize("kind", ["linear", "conv", "matrix", "embedding"])
    def test_the_expectation_over_dropped_directions_is_the_change(self, kind, magnitude):
        """Summed over every mask there is, each by its probability: exact, and without a single draw."""
        chance = 0.25
        layer, x = made(kind, rank_dropout=chance, magnitude=magnitude)
        update = layer.updates("default")["weight"]
        full = layer.eval()(x)
        layer.train()
        sizes = [r for r, factor in zip(update.ranks, update.factors) if factor is not None]
        shapes = [[r if m == mode else 1 for m in range(update.core.dim())]
                  for mode, r in enumerate(update.ranks) if update.factors[mode] is not None]  # fmt: skip
        for path in ("factored", "dense"):
            layer.path = path
            mean, total = torch.zeros_like(full), 0.0
            for number in range(2 ** sum(sizes)):
                flags = [float(number >> k & 1) for k in range(sum(sizes))]
                weight = math.prod(1 - chance if flag else chance for flag in flags)
                masks, rest = [], list(flags)
                for size, shape in zip(sizes, shapes):
                    masks.append(torch.tensor(rest[:size]).reshape(shape) > 0)
                    rest = rest[size:]
                update._direction_masks = lambda masks=masks: masks
                mean = mean + weight * layer(x).detach()
                total += weight
            assert math.isclose(total, 1.0)
            assert close(mean, full, 9, 9, factor=300)

    def test_the_masks_that_are_drawn(self):
        layer, _ = made("conv", rank_dropout=0.25)
        update = layer.updates("default")["weight"]
        draws = [update._direction_masks() for _ in range(1000)]
        assert [tuple(mask.shape) for mask in draws[0]] == [(2, 1, 1, 1), (1, 2, 1, 1), (1, 1, 2, 1), (1, 1, 1, 2)]
        for mode in range(4):
            values = torch.cat([masks[mode].reshape(-1) for masks in draws])
            assert values.dtype == torch.bool
            # Five standard deviations of 2000 draws.
            assert abs(float(values.double().mean()) - 0.75) < 5 * math.sqrt(0.75 * 0.25 / 2000)
        first, second = (torch.stack([m[mode].reshape(-1)[0] for m in draws]).double() for mode in (0, 1))
        assert abs(float(torch.corrcoef(torch.stack([first, second]))[0, 1])) < 5 / math.sqrt(1000)

    def test_a_start_that_nothing_moved_stays_exact_when_directions_are_dropped(self):
        for path in ("factored", "dense"):
            layer = FloraLinear(nn.Linear(6, 5), ranks=2, init="principal", path=path, rank_dropout=0.5)
            x = torch.randn(4, 6)
            for _ in range(10):
                assert torch.equal(layer(x), layer.base_layer(x))

    def test_merging_and_reading_the_weight(self):
        """What is merged is whole; what a parent reads in training is dropped as in a call."""
        layer, _ = made("linear", rank_dropout=0.5)
        expected = layer.base_layer.weight + layer.tucker_update["default"].delta()
        assert close(layer.train().merged().weight, expected, 6, 5)
        assert any(not torch.allclose(layer.weight, expected) for _ in range(20))
        assert close(layer.eval().weight, expected, 6, 5)

    def test_attention_drops_what_it_reads(self):
        model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 8, dropout=0.0, batch_first=True)).double()
        report = attach(model, ranks=2, dropout=0.5, module_dropout=0.5, target_modules=["out_proj", "linear1"])
        assert [layer.name for layer in report.layers] == ["0.self_attn.out_proj.weight", "0.linear1.weight"]
        projection = model[0].self_attn.out_proj.tucker_update["default"]
        assert (projection.dropout, projection.module_dropout) == (0.0, 0.5)
        assert model[0].linear1.tucker_update["default"].dropout == 0.5
        model[0].linear1.enabled = False
        nn.init.normal_(projection.core)
        x = torch.randn(1, 3, 8).double()
        assert len({model(x).sum().item() for _ in range(20)}) == 2

    def test_they_travel_with_states_and_files(self, tmp_path):
        chances = dict(zip(DROPOUTS, (0.125, 0.25, 0.5)))
        base = nn.Sequential(nn.Linear(6, 5), nn.Bilinear(2, 2, 2))
        model, twin = copy.deepcopy(base), copy.deepcopy(base)
        attach(model, ranks=2, target_modules="0", **chances)
        load_adapter(twin, save_adapter(model, tmp_path / "adapter"))
        found = twin[0].tucker_update["default"]
        assert {key: getattr(found, key) for key in DROPOUTS} == chances
        attach(base, ranks=2, target_modules="0")
        base.load_state_dict(model.state_dict())
        assert {key: getattr(base[0].tucker_update["default"], key) for key in DROPOUTS} == chances
        assert "rank_dropout=0.25, module_dropout=0.5" in repr(base)

    def test_states_of_the_first_version_are_read(self):
        update = FloraLinear(nn.Linear(3, 3), ranks=1, rank_dropout=0.5).tucker_update["default"]
        old = {"pattern": "a b", "sizes": {}, "shape": [3, 3], "scale": 2.0, "dropout": 0.25}
        update.set_extra_state(torch.frombuffer(bytearray(json.dumps(old).encode()), dtype=torch.uint8))
        assert (update.scale, update.dropout, update.rank_dropout, update.module_dropout) == (2.0, 0.25, 0.0, 0.0)
        assert set(json.loads(bytes(update.get_extra_state().tolist()))) == set(old)

    @pytest.mark.parametrize("option", ["rank_dropout", "module_dropout"])
    def test_refusals(self, option):
        for value in (1.0, -0.1, float("nan")):
            with pytest.raises(ValueError, match=f"{option} is {value}; pass a number from 0 to below 1"):
                FloraLinear(nn.Linear(3, 3), ranks=1, **{option: value})
        update = FloraLinear(nn.Linear(3, 3), ranks=1).tucker_update["default"]
        before = update.get_extra_state()
        state = json.loads(bytes(before.tolist())) | {option: 2.0, "scale": 3.0}
        with pytest.raises(ValueError, match=f"{option} is 2.0"):
            update.set_extra_state(torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8))
        assert torch.equal(update.get_extra_state(), before)


class TestScales:
    def test_a_step_of_one_size_changes_weights_by_one_norm(self):
        """s = α/√∏ r: where each entry of the core moves by ±η, ‖ΔW‖ = α·η whatever ranks, shapes and modes."""
        for make, shape in [(lambda: nn.Linear(48, 32), (2, 48)), (lambda: nn.Conv2d(12, 16, 5), (2, 12, 5, 5))]:
            norms = []
            for ranks in (1, 2, 4, (3, *[2] * (len(shape) - 1)), (None, *[3] * (len(shape) - 1))):
                model = nn.Sequential(make()).double()
                attach(model, ranks=ranks, alpha=8.0, scaling="rank_stabilized")
                update = model[0].tucker_update["default"]
                optimizer = torch.optim.Adam([update.core], lr=0.1, eps=1e-30)
                (model(torch.randn(shape).double()) - 1.0).square().sum().backward()
                optimizer.step()
                # A mode left whole is no choice of ranks: its size stays in the norm, as in LoRA.
                whole = math.prod(r for r, u in zip(update.ranks, update.factors) if u is None)
                norms.append(float(update.delta().detach().norm()) / math.sqrt(whole))
            assert all(math.isclose(norm, 0.8, rel_tol=1e-9) for norm in norms)

    def test_lora_is_the_case_of_one_factor(self):
        for r in (1, 4, 16):
            assert resolve_scale("rank_stabilized", 16.0, [r]) == 16.0 / math.sqrt(r)
            assert resolve_scale("rank", 16.0, [r]) == 16.0 / r
        assert resolve_scale("rank", 3.0, []) == resolve_scale("rank_stabilized", 3.0, []) == 3.0

    def test_the_number_is_what_is_kept(self, tmp_path):
        base = nn.Sequential(nn.Linear(16, 12), nn.Conv1d(8, 8, 3))
        model, twin = copy.deepcopy(base), copy.deepcopy(base)
        attach(model, ranks={"0": (2, 2), "1": (3, 2, 3)}, alpha=6.0, scaling="rank_stabilized")
        scales = [layer.tucker_update["default"].scale for layer in model]
        assert scales == [3.0, 6.0 / math.sqrt(6)]
        load_adapter(twin, save_adapter(model, tmp_path / "adapter"))
        assert [layer.tucker_update["default"].scale for layer in twin] == scales
        plain = copy.deepcopy(base)
        attach(plain, ranks={"0": (2, 2), "1": (3, 2, 3)}, alpha=6.0, scaling="rank")
        assert [layer.tucker_update["default"].scale for layer in plain] == [3.0, 2.0]

    def test_a_known_change_is_the_same_under_every_scale(self):
        delta = torch.randn(5, 6)
        for scaling in ("rank", "rank_stabilized"):
            model = nn.Sequential(nn.Linear(6, 5))
            attach(model, ranks=5, alpha=3.0, scaling=scaling, init="from_delta", init_tensors={"0.weight": delta})
            assert close(model[0].tucker_update["default"].delta(), delta, 5, 6)

    def test_refusals(self):
        model = nn.Sequential(nn.Linear(6, 5))
        for options, message in [
            ({"scaling": "rank"}, "attach: 0.weight: scaling is 'rank', but there is no alpha to scale; pass alpha"),
            ({"scaling": "sqrt", "alpha": 1.0}, "there is no rule 'sqrt'; pass 'init', 'rank' or 'rank_stabilized'"),
            ({"scaling": "rank", "alpha": float("inf")}, "alpha is inf; pass a finite number"),
            (
                {"scaling": "rank_stabilized", "alpha": 1.0, "init": "official"},
                "init 'official' draws factors of variance",
            ),
            ({"scaling": "rank_stabilized", "alpha": 1.0, "init": "peft"}, "is rank-stabilized already; pass scale"),
        ]:
            with pytest.raises(ValueError, match=message):
                attach(model, ranks=2, **options)
        assert type(model[0]) is nn.Linear
        assert not hasattr(model, "tucker_update")
        with pytest.raises(ValueError, match="call attach first"):
            adapter_parameters(model)


def test_a_convolution_follows_its_base():
    """Stride, padding and dilation may be set after the layer was made, and the factored path goes along."""
    layer = FloraConv(nn.Conv2d(4, 6, 3, padding=1), ranks=2, path="factored").double()
    randomize(layer)
    x = torch.randn(1, 4, 9, 9).double()
    layer.base_layer.stride, layer.base_layer.padding, layer.base_layer.dilation = (2, 1), (2, 0), (2, 2)
    output = layer(x)
    layer.path = "dense"
    assert output.shape == layer.base_layer(x).shape
    assert close(output, layer(x), 4, 6, 3, 3)
