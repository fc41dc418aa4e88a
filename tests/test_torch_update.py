"""Where updates start, what they save, and what they refuse."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import flora_tensor as ft
from flora_tensor import Arrangement, TuckerTensor
from flora_torch import FloraConv, FloraEmbedding, FloraLinear, FloraParameter, TuckerUpdate
from flora_torch.initialize import (
    PRESETS,
    default_dtype,
    from_delta,
    from_gradient,
    orthonormal,
    preset_scale,
    principal,
    random_start,
    resolve_ranks,
    start_update,
)
from support import bfloat16_tolerance, tolerance

pytestmark = pytest.mark.usefixtures("seeded", "large_products")


def low_rank(shape, ranks, dtype=torch.float64):
    return TuckerTensor(torch.randn(ranks, dtype=dtype), [torch.randn(n, r, dtype=dtype) for n, r in zip(shape, ranks)])


class TestRandomStarts:
    def test_orthonormal_has_gain_one_at_every_size(self):
        for shape, ranks in [((64, 32), (8, 8)), ((16, 12, 3, 3), (4, 4, 2, 3)), ((5, 4), (None, 2))]:
            start = orthonormal(shape, ranks, dtype=torch.float64)
            for u in start.factors:
                if u is not None:
                    eye = torch.eye(u.shape[1], dtype=u.dtype)
                    assert float((u.mT @ u - eye).norm()) <= tolerance("float64", *u.shape)
            core = torch.randn_like(start.core)
            dense = TuckerTensor(core, start.factors).to_tensor()
            assert math.isclose(float(dense.norm()), float(core.norm()), rel_tol=1e-12)

    def test_another_default_device_draws_the_same_numbers(self):
        weight = torch.ones(6, 4)
        for init in PRESETS:
            expected = start_update(weight, (2, 2), init=init, generator=torch.Generator().manual_seed(1)).tucker
            with torch.device("meta"):
                generator = torch.Generator("cpu").manual_seed(1)
                got = start_update(weight, (2, 2), init=init, generator=generator).tucker
                there = random_start((6, 4), (2, 2), init)
                default = torch.get_default_device().type  # older versions of torch do not see the block
            assert all(torch.equal(a, b) for a, b in zip(got.factors, expected.factors))
            assert {a.device.type for a in (there.core, *there.factors)} == {default}

    def test_a_full_rank_mode_needs_no_factor_in_ours_and_has_one_in_the_published_starts(self):
        assert orthonormal((5, 4), (5, 2)).factors[0] is None
        for preset in ("official", "loralib", "peft"):
            assert random_start((5, 4), (5, 2), preset).factors[0].shape == (5, 5)

    def test_published_distributions(self):
        """Against torch's own functions, which the published codes call: the same bound or deviation."""
        size, rank = 4000, 16
        drawn = {name: random_start((size, size), (rank, rank), name).factors[0] for name in PRESETS}
        normal = nn.init.kaiming_normal_(torch.empty(size, rank), a=math.sqrt(3))
        uniform = nn.init.kaiming_uniform_(torch.empty(size, rank), a=math.sqrt(5))
        # 64,000 numbers: the deviation of an empirical deviation is below 0.3 %.
        assert math.isclose(float(drawn["official"].std()), float(normal.std()), rel_tol=0.02)
        assert math.isclose(float(drawn["loralib"].std()), 0.02, rel_tol=0.02)
        assert math.isclose(float(drawn["peft"].std()), float(uniform.std()), rel_tol=0.02)
        assert float(drawn["peft"].abs().max()) <= 1 / math.sqrt(rank)
        assert math.isclose(float(drawn["peft"].abs().max()), float(uniform.abs().max()), rel_tol=0.01)

    def test_gain_of_the_official_start_grows_with_the_width(self):
        for size in (256, 1024):
            factors = random_start((size, size), (8, 8), "official", dtype=torch.float64).factors
            core = torch.randn(8, 8, dtype=torch.float64)
            gain = float(TuckerTensor(core, factors).to_tensor().norm() / core.norm())
            assert math.isclose(gain, size / 16, rel_tol=0.25)

    def test_same_numbers_in_every_type(self):
        for preset in PRESETS:
            wide, narrow = (
                random_start((9, 8), (3, 2), preset, dtype=dtype, generator=torch.Generator().manual_seed(3))
                for dtype in (torch.float64, torch.float16)
            )
            assert all(torch.equal(a.half(), b) for a, b in zip(wide.factors, narrow.factors))

    def test_scales(self):
        assert preset_scale("official", 4.0, 8) == 4.0
        assert preset_scale("loralib", 16.0, 8) == 16.0 / 8.00001
        assert preset_scale("peft", 16.0, 8) == 2.0
        with pytest.raises(ValueError, match=r"alpha belongs to init .* not to 'orthonormal'; pass scale instead"):
            preset_scale("orthonormal", 1.0, 1)
        with pytest.raises(ValueError, match="there is no start 'xavier'; pass one of 'orthonormal'"):
            random_start((3, 3), (1, 1), "xavier")


class TestDecomposedStarts:
    @pytest.mark.parametrize("ranks", [(2, 3, 2, 2), (None, 3, 2, 2), (2, 3, None, 3), (None, None, None, None)])
    def test_from_delta_is_the_decomposition(self, ranks):
        delta = low_rank((8, 6, 3, 3), (2, 3, 2, 2)).to_tensor()
        update = from_delta(delta, ranks, scale=-0.25)
        error = float((-0.25 * update.to_tensor() - delta).norm())
        assert error <= tolerance("float64", 8, 6, 3, 3, norm=float(delta.norm()))
        assert [u is None for u in update.factors] == [r is None or r == n for r, n in zip(ranks, delta.shape)]
        assert not update.core.requires_grad

    def test_from_delta_is_as_good_as_the_driver_says(self):
        delta = torch.randn(12, 10, 3, 3, dtype=torch.float64)
        for pattern, ranks in [("o i h w", (4, 4, 2, 2)), ("o (i h w)", (5, 5)), ("(o h) (i w)", (7, 7))]:
            arrangement = Arrangement(pattern)
            update = from_delta(delta, ranks, arrangement=arrangement)
            dense = arrangement.restore(update.to_tensor(), delta.shape)
            promised = ft.tucker(arrangement.arrange(delta), ranks).relative_error
            assert math.isclose(float((dense - delta).norm() / delta.norm()), promised, rel_tol=1e-6)

    def test_whole_mode_beside_a_small_rank(self):
        delta = low_rank((9, 5), (2, 2)).to_tensor()
        assert torch.allclose(from_delta(delta, (None, 2)).to_tensor(), delta)

    def test_low_precision_is_decomposed_in_float32(self):
        delta = low_rank((16, 12), (2, 2), torch.float32).to_tensor().to(torch.bfloat16)
        update = from_delta(delta, (4, 4))
        assert update.core.dtype == torch.float32
        assert from_delta(delta, (4, 4), dtype=torch.bfloat16).core.dtype == torch.bfloat16
        # What is left is the rounding to bfloat16 of the delta itself, spread over all of its other directions.
        assert float((update.to_tensor() - delta.float()).norm()) <= bfloat16_tolerance(delta)

    def test_principal_trains_the_weights_largest_part(self):
        weight = torch.diag(torch.tensor([5.0, 4.0, 3.0, 2.0]))
        start = principal(weight, (2, 2), scale=2.0)
        assert torch.allclose(2.0 * start.start.to_tensor(), torch.diag(torch.tensor([5.0, 4.0, 0.0, 0.0])), atol=1e-5)
        assert start.tucker.core is not start.start.core
        whole = principal(weight, (None, None))
        assert whole.start is None
        assert not whole.tucker.core.any()

    def test_from_gradient_makes_the_first_step_follow_the_gradient(self):
        gradient = low_rank((7, 6, 3), (2, 2, 2)).to_tensor()
        update = from_gradient(gradient, (2, 2, 2))
        assert not update.core.any()
        core = update.core.clone().requires_grad_()
        (TuckerTensor(core, update.factors).to_tensor() * gradient).sum().backward()
        step = TuckerTensor(core.grad, update.factors).to_tensor()
        assert torch.allclose(step, gradient)

    def test_autocast_changes_no_decomposition(self):
        delta = torch.randn(20, 16, generator=torch.Generator().manual_seed(0))
        expected = from_delta(delta, (5, 5))
        with torch.autocast("cpu", torch.bfloat16):
            got = from_delta(delta, (5, 5))
            whole = from_delta(delta, (20, 16))
        assert torch.equal(got.core, expected.core)
        assert all(torch.equal(a, b) for a, b in zip(got.factors, expected.factors))
        rounding = tolerance("float32", *delta.shape, norm=float(delta.norm()))
        assert float((whole.to_tensor() - delta).norm()) <= rounding

    def test_refusals(self):
        with pytest.raises(ValueError, match="scale is 0, so that no update can be the given change"):
            from_delta(torch.ones(2, 2), (1, 1), scale=0.0)
        with pytest.raises(ValueError, match="NaN or infinite"):
            from_delta(torch.full((2, 2), torch.nan), (1, 1))
        weight = torch.ones(3, 2)
        for options, message in [
            (
                {"init": "svd"},
                "there is no start 'svd'; pass one of 'orthonormal', 'official', 'loralib', 'peft', 'principal'",
            ),
            ({"tensor": weight}, "'orthonormal' decomposes no tensor; pass init='from_delta'"),
            ({"init": "from_gradient"}, r"'from_gradient' needs the tensor to decompose; pass one of shape \(3, 2\)"),
            ({"init": "from_delta", "tensor": torch.ones(2, 3)}, r"a tensor of shape \(2, 3\) for a weight of shape"),
        ]:
            with pytest.raises(ValueError, match=message):
                start_update(weight, (1, 1), **options)


class TestRanks:
    def test_every_form(self):
        shape = (64, 32, 3, 3)
        for ranks, given in [
            (16, (16, 16, 3, 3)),
            (1000, shape),
            # 16 would exceed 8 · 1 · 1, the product of the other ranks.
            (0.25, (8, 8, 1, 1)),
            (1.0, shape),
            (1e-9, (1, 1, 1, 1)),
            ((40, 2, 3, 3), (18, 2, 3, 3)),
            ((16, None, 0.5, 3), (16, None, 2, 3)),
            (np.int64(16), (16, 16, 3, 3)),
            (np.array([40, 2, 3, 3]), (18, 2, 3, 3)),
            ([torch.tensor(16), None, np.float32(0.5), np.int32(3)], (16, None, 2, 3)),
        ]:
            assert resolve_ranks(ranks, shape)[1] == given

    def test_refusals(self):
        for ranks, kind, message in [
            ("8", TypeError, "ranks is '8'; pass an integer, a fraction"),
            (True, TypeError, "ranks is True"),
            (None, TypeError, "ranks is None"),
            ((True, 1), TypeError, "the rank for mode 0 is True; pass an integer, a fraction or None"),
            ((1, 2, 3), ValueError, r"3 ranks for 2 modes of shape \(4, 3\); pass one a mode"),
            (0, ValueError, "rank 0 for mode 0; pass at least 1 and at most 4"),
            ((1, -2), ValueError, "rank -2 for mode 1; pass at least 1 and at most 3"),
            (0.0, ValueError, "the fraction 0.0 for mode 0; pass one above 0 and at most 1"),
            (float("nan"), ValueError, "the fraction nan for mode 0"),
        ]:
            with pytest.raises(kind, match=message):
                resolve_ranks(ranks, (4, 3))


class TestUpdate:
    def update(self, **options):
        return TuckerUpdate(low_rank((6, 4), (2, 3)), **options)

    def test_export_with_a_start_is_the_difference(self):
        for whole in ((False, False, False), (True, False, False), (False, True, True)):
            pair = [
                TuckerTensor(
                    torch.randn([n if w else 2 for n, w in zip((5, 4, 3), whole)]),
                    [None if w else torch.randn(n, 2) for n, w in zip((5, 4, 3), whole)],
                )
                for _ in range(2)
            ]
            update = TuckerUpdate(pair[0], start=pair[1], scale=3.0)
            exported = update.exported()
            assert torch.allclose(3.0 * exported.to_tensor(), update.delta(), atol=1e-4)
            for ours, theirs in zip(TuckerUpdate.split(exported), pair):
                for a, b in zip((ours.core, *ours.factors), (theirs.core, *theirs.factors)):
                    assert (a is None and b is None) or torch.equal(a, b)

    def test_the_start_stays_where_the_trained_tensors_were_passed_for_it(self):
        tucker = low_rank((6, 4), (2, 3))
        update = TuckerUpdate(tucker, start=tucker)
        assert not update.delta().any()
        with torch.no_grad():
            update.core.mul_(3.0)
        assert torch.allclose(update.delta(), 2.0 * update.start.to_tensor())

    def test_a_start_needs_factors_for_the_same_modes(self):
        core, eye = torch.ones(2, 2), torch.eye(2)
        with pytest.raises(ValueError, match="same shape and ranks, with factors for the same modes"):
            TuckerUpdate(TuckerTensor(core, [eye, None]), start=TuckerTensor(core, [None, eye]))
        with pytest.raises(ValueError, match="a start without factors is no more than a shift of the core; pass the"):
            TuckerUpdate(TuckerTensor(core, [None, None]), start=TuckerTensor(core, [None, None]))

    def test_delta_in_double_precision(self):
        update = TuckerUpdate(low_rank((6, 4), (2, 3), torch.float32))
        exact = update.tucker.map(lambda a: a.detach().double()).to_tensor()
        assert torch.equal(update.delta(torch.float64).detach(), exact)

    def test_properties(self):
        update = self.update(dropout=0.5, arrangement=Arrangement("(o h) (i w)"), shape=(3, 2, 2, 2))
        assert (update.ranks, update.shape, update.n_parameters) == ((2, 3), (3, 2, 2, 2), 6 + 12 + 12)
        assert update.tucker.core is update.core
        for part in ("shape=(3, 2, 2, 2)", "ranks=(2, 3)", "dropout=0.5", "arrangement='(o h) (i w)'"):
            assert part in repr(update)

    def test_state_of_another_arrangement_is_taken_over(self):
        first = TuckerUpdate(low_rank((6, 6), (2, 2)), (3, 3, 2, 2), arrangement=Arrangement("(o h) (i w)"), scale=3.0)
        second = TuckerUpdate(low_rank((6, 6), (2, 2)), (3, 3, 2, 2), arrangement=Arrangement("(o w) (i h)"))
        second.load_state_dict(first.state_dict())
        assert torch.equal(second.delta(), first.delta())
        assert second.split_axes == first.split_axes

    def test_refusals(self):
        for options, message in [
            ({"scale": math.inf}, "scale is inf; pass a finite number"),
            ({"dropout": 1.0}, "dropout is 1.0; pass a number from 0 to below 1"),
            ({"shape": (4, 6)}, r"a Tucker tensor of shape \(6, 4\) for a weight of shape \(4, 6\)"),
            ({"start": low_rank((6, 4), (1, 1))}, "start is .* pass one of the same shape and ranks"),
        ]:
            with pytest.raises(ValueError, match=message):
                self.update(**options)
        update = self.update()
        for state, message in [
            (torch.tensor([1, 2, 3], dtype=torch.uint8), "the extra state of the state dict cannot be read"),
            ({"scale": 1.0}, "the extra state of the state dict cannot be read"),
            (
                TuckerUpdate(low_rank((4, 6), (2, 3))).get_extra_state(),
                r"holds an update of a weight of shape \(4, 6\)",
            ),
        ]:
            with pytest.raises(ValueError, match=message):
                update.set_extra_state(state)

    def test_types(self):
        expected = {torch.float16: torch.float32, torch.bfloat16: torch.float32, torch.float64: torch.float64}
        assert {dtype: default_dtype(dtype) for dtype in expected} == expected


class TestLayerRefusals:
    def test_wrong_bases(self):
        for kind, base, known in [
            (FloraLinear, nn.ReLU(), "Linear"),
            (FloraConv, nn.Linear(2, 2), "Conv1d, Conv2d, Conv3d"),
            (FloraEmbedding, nn.EmbeddingBag(3, 2), "Embedding"),
        ]:
            with pytest.raises(TypeError, match=f"the base is a {type(base).__name__}; pass one of {known}"):
                kind(base, ranks=1)

    def test_options_that_do_not_fit(self):
        with pytest.raises(TypeError, match="FloraLinear: scale without ranks; pass ranks too"):
            FloraLinear(nn.Linear(2, 2), scale=2.0)
        with pytest.raises(TypeError, match="pass parameter and ranks together"):
            FloraParameter(nn.Bilinear(2, 2, 2), "weight")
        with pytest.raises(
            ValueError, match="FloraParameter: Bilinear has no parameter 'wait' of its own; it has weight"
        ):
            FloraParameter(nn.Bilinear(2, 2, 2), "wait", 1)
        with pytest.raises(ValueError, match="FloraLinear: adapts 'weight' and not 'bias'; use FloraParameter"):
            FloraLinear(nn.Linear(2, 2)).install("x", TuckerUpdate(low_rank((2, 2), (1, 1))), parameter="bias")
        with pytest.raises(ValueError, match=r"'bias' of Linear has shape \(2,\); an update needs two axes or more"):
            FloraParameter(nn.Linear(2, 2), "bias", 1)
        arrangement = Arrangement("(h d) (g e) -> (h g) d e", {"h": 2, "g": 2})
        with pytest.raises(
            ValueError, match=r"path is 'factored', but Linear with arrangement .* has no factored form"
        ):
            FloraLinear(nn.Linear(2, 2), ranks=1, arrangement=arrangement, path="factored")
        with pytest.raises(ValueError, match=r"an update of shape \(3, 3\) for 'weight' of shape \(2, 2\)"):
            FloraLinear(nn.Linear(2, 2)).install("default", TuckerUpdate(low_rank((3, 3), (1, 1))))
        with pytest.raises(ValueError, match=r"FloraEmbedding: the base has max_norm=2[.]0"):
            FloraEmbedding(nn.Embedding(3, 2, max_norm=2.0))

    def test_types_too_narrow_to_add_up(self):
        linear = nn.Linear(2, 2)
        linear.weight = nn.Parameter(linear.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
        with pytest.raises(
            ValueError, match=r"'weight' of Linear is of type torch.float8_e4m3fn; real floats of 16 bits"
        ):
            FloraLinear(linear, ranks=1)

    def test_a_forward_that_was_set_on_the_object(self):
        base = nn.Linear(4, 3)
        plain = base.forward
        base.forward = lambda x: plain(2 * x)
        layer, x = FloraLinear(base, ranks=2), torch.randn(5, 4)
        with torch.no_grad():
            layer.tucker_update["default"].core.normal_()
        assert torch.allclose(layer(x), nn.functional.linear(2 * x, layer.weight, base.bias), atol=1e-5)
        with pytest.raises(ValueError, match=r"forward of this Linear was set on the object itself .* delete that"):
            layer.merged()

    def test_merging_a_recurrent_layer_leaves_its_base(self):
        base, x = nn.LSTM(4, 5), torch.randn(3, 2, 4)
        before = base(x)[0]
        layer = FloraParameter(base, "weight_hh_l0", 2)
        with torch.no_grad():
            layer.tucker_update["default"]["weight_hh_l0"].core.normal_()
        merged = layer.merged()
        assert torch.allclose(merged(x)[0], layer(x)[0], atol=1e-6)
        assert not torch.equal(merged(x)[0], before)
        assert torch.equal(base(x)[0], before)

    def test_parameter_named_like_a_method(self):
        module = nn.Module()
        module.register_parameter("keys", nn.Parameter(torch.ones(3, 2)))
        with pytest.raises(ValueError, match="a parameter named 'keys' cannot be adapted; rename it"):
            FloraParameter(module, "keys", 1)

    def test_a_property_that_fails_does_not_look_like_the_bases_attribute(self):
        layer = FloraLinear(nn.Linear(2, 2), ranks=1)
        layer._active_adapters = None
        with pytest.raises((AttributeError, TypeError)):
            _ = layer.weight


def test_importing_the_backend_changes_no_global_state():
    """Nothing of torch's defaults moves, and no number is drawn."""
    state, dtype = torch.random.get_rng_state(), torch.get_default_dtype()
    import importlib

    import flora_torch

    importlib.reload(flora_torch)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.get_default_dtype() == dtype
    assert np.isfinite(tolerance("float32"))
