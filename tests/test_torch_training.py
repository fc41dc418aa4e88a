"""Training aids, and that adapters train under everything that torch and its neighbors put around a model."""

import copy
import pickle
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as nnf
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint_sequential

from flora_tensor import TuckerTensor
from flora_torch import (
    FloraLinear,
    TuckerUpdate,
    adapter_parameters,
    attach,
    detach,
    load_adapter,
    merge,
    parameter_groups,
    retract_,
    save_adapter,
)
from support import bfloat16_tolerance, same_bits, tolerance

pytestmark = pytest.mark.usefixtures("seeded")


def net(dtype=torch.float64):
    """Two convolutions, one of them twice, a norm, and a linear layer."""
    shared = nn.Conv1d(4, 4, 3, padding=1)
    layers = [
        shared,
        nn.Tanh(),
        shared,
        nn.BatchNorm1d(4),
        nn.Conv1d(4, 6, 3, groups=2),
        nn.Flatten(),
        nn.Linear(24, 3),
    ]
    return nn.Sequential(*layers).to(dtype)


def adapted(dtype=torch.float64, **options: Any):
    torch.manual_seed(0)
    model = net(dtype)
    attach(model, **{"ranks": 2, "generator": torch.Generator().manual_seed(1), **options})
    return model


X, Y = torch.randn(8, 4, 6, generator=torch.Generator().manual_seed(2)).double(), torch.arange(8) % 3


def loss(model, dtype=torch.float64):
    return nnf.cross_entropy(model(X.to(dtype)), Y)


def moved(model):
    with torch.no_grad():
        for parameter in adapter_parameters(model):
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


class TestParameterGroups:
    def names(self, groups):
        return {group["name"]: group["param_names"] for group in groups}

    def test_every_trained_parameter_once(self):
        model = adapted(freeze_model=False, target_modules=["0", "4"])
        attach(model, ranks=1, adapter_name="other", freeze_model=False, target_modules=["0", "6"])
        groups = parameter_groups(model, 1e-3, core_lr=1e-2, factor_lr=1e-4, weight_decay=0.1, factor_weight_decay=0.0)
        listed = [(name, id(p)) for group in groups for name, p in zip(group["param_names"], group["params"])]
        trained = [(name, id(p)) for name, p in model.named_parameters() if p.requires_grad]
        assert sorted(listed) == sorted(trained)
        rates = {group["name"]: (group["lr"], group["weight_decay"]) for group in groups}
        assert rates == {
            "default.core": (1e-2, 0.1),
            "default.factors": (1e-4, 0.0),
            "other.core": (1e-2, 0.1),
            "other.factors": (1e-4, 0.0),
            "model": (1e-3, 0.1),
        }
        names = self.names(groups)
        assert names["default.core"] == ["0.tucker_update.default.core", "4.tucker_update.default.core"]
        assert names["model"] == ["3.weight", "3.bias"]

    def test_one_adapter_alone(self):
        model = adapted()
        attach(model, ranks=1, adapter_name="other", target_modules="6")
        assert set(self.names(parameter_groups(model, 1.0, adapter_name="other"))) == {"other.core", "other.factors"}

    def test_wrapped_models_and_single_layers(self):
        layer = FloraLinear(nn.Linear(3, 4), ranks=(2, None))
        inside = self.names(parameter_groups(nn.ModuleDict({"module": layer}), 1.0))
        alone = self.names(parameter_groups(layer, 1.0))
        assert alone == {
            "default.core": ["tucker_update.default.core"],
            "default.factors": ["tucker_update.default.factor_0"],
        }
        assert inside == {group: [f"module.{name}" for name in names] for group, names in alone.items()}

    @pytest.mark.parametrize("kind", ["SGD", "AdamW", "Adagrad", "RMSprop", "NAdam"])
    def test_optimizers_take_them(self, kind):
        model = adapted()
        optimizer = getattr(torch.optim, kind)(parameter_groups(model, 1e-3, core_lr=1e-2))
        before = loss(model).item()
        for _ in range(3):
            optimizer.zero_grad()
            loss(model).backward()
            optimizer.step()
        assert loss(model).item() < before
        again = getattr(torch.optim, kind)(parameter_groups(copy.deepcopy(model), 1.0))
        again.load_state_dict(optimizer.state_dict())
        assert [group["lr"] for group in again.param_groups] == [1e-2, 1e-3]
        assert [group["param_names"] for group in again.param_groups] == [
            group["param_names"] for group in optimizer.param_groups
        ]

    def test_a_rate_of_zero_keeps_a_group_still(self):
        model = adapted()
        start = [p.detach().clone() for p in adapter_parameters(model)]
        optimizer = torch.optim.SGD(parameter_groups(model, 0.1, factor_lr=0.0))
        for _ in range(2):
            optimizer.zero_grad()
            loss(model).backward()
            optimizer.step()
        changed = [not torch.equal(a, b) for a, b in zip(start, adapter_parameters(model))]
        cores = {id(p) for group in parameter_groups(model, 1.0) if "core" in group["name"] for p in group["params"]}
        assert changed == [id(p) in cores for p in adapter_parameters(model)]

    def test_refusals(self):
        with pytest.raises(ValueError, match="nothing of the model is trained; attach an adapter first"):
            parameter_groups(net().requires_grad_(False), 1e-3)
        with pytest.raises(ValueError, match="no adapter 'b' of the model is trained"):
            parameter_groups(adapted(), 1e-3, adapter_name="b")
        with pytest.raises(ValueError, match=re.escape("{'lr': -1.0, 'weight_decay': 0.0} for the core; pass numbers")):
            parameter_groups(adapted(), 1e-3, core_lr=-1.0)


@st.composite
def updates(draw):
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=4)))
    ranks = [draw(st.integers(1, n)) for n in shape]
    whole = [draw(st.booleans()) for _ in shape]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    factors = [
        None if w else torch.randn(n, r, dtype=torch.float64, generator=generator)
        for n, r, w in zip(shape, ranks, whole)
    ]
    if draw(st.booleans()) and (first := next((u for u in factors if u is not None), None)) is not None:
        first[:, -1] = 0.0  # a factor without full rank
    core = torch.randn(
        [n if w else r for n, r, w in zip(shape, ranks, whole)], dtype=torch.float64, generator=generator
    )
    return TuckerTensor(core, factors)


class TestRetraction:
    @given(updates(), st.sampled_from([1.0, 1e8, 1e-8]))
    def test_orthonormal_and_the_change_the_same(self, tucker, size):
        update = TuckerUpdate(tucker.map(lambda a: size * a), scale=2.0)
        layer = FloraLinear(nn.Linear(2, 2))
        layer.tucker_update["default"] = update
        before = update.delta().detach()
        # The products' sizes bound the rounding, where cancellation makes the change itself small.
        bound = 2.0 * float(update.core.detach().norm())
        for factor in update.factors:
            bound *= 1.0 if factor is None else float(factor.detach().norm())
        parameters = [id(p) for p in update.parameters()]
        retract_(layer)
        assert parameters == [id(p) for p in update.parameters()]
        assert float((update.delta() - before).detach().norm()) <= tolerance("float64", before.numel(), norm=bound)
        for factor in update.factors:
            if factor is not None:
                gram, eye = factor.mT @ factor, torch.eye(factor.shape[1]).double()
                assert float((gram - eye).detach().norm()) <= tolerance("float64", len(factor))
        # What is orthonormal stays as it is.
        state = {name: value.clone() for name, value in update.state_dict().items()}
        retract_(layer)
        for name, value in update.state_dict().items():
            norm = float(state[name].double().norm())
            assert float((value.double() - state[name].double()).norm()) <= tolerance("float64", 25, norm=norm)

    @pytest.mark.parametrize("init", ["orthonormal", "principal"])
    def test_after_every_step(self, init, tmp_path):
        """The files, the merge and the copies of a model that is trained so are those of any other."""
        model = adapted(init=init, scale=0.5)
        optimizer = torch.optim.SGD(parameter_groups(model, 0.1), momentum=0.9)
        optimizer.register_step_post_hook(lambda *_: retract_(model))
        before = loss(model).item()
        for _ in range(20):
            optimizer.zero_grad()
            loss(model).backward()
            optimizer.step()
        assert loss(model).item() < before
        for update in (m for m in model.modules() if isinstance(m, TuckerUpdate)):
            for factor in update.factors:
                if factor is not None:
                    eye = torch.eye(factor.shape[1]).double()
                    assert float((factor.mT @ factor - eye).detach().norm()) <= tolerance("float64", len(factor))
        fresh = detach(copy.deepcopy(model))
        load_adapter(fresh, save_adapter(model, tmp_path / "adapter"))
        model.eval(), fresh.eval()
        assert same_bits(fresh(X), model(X))
        assert torch.allclose(merge(copy.deepcopy(model))(X), model(X), rtol=0, atol=1e-12)

    def test_shared_updates_once_and_adapters_by_name(self):
        model = moved(adapted())
        attach(model, ranks=1, adapter_name="other", target_modules="6")
        output = model.eval()(X)
        other = [p.detach().clone() for p in adapter_parameters(model, "other")]
        retract_(model, "default")
        assert all(torch.equal(a, b) for a, b in zip(other, adapter_parameters(model, "other")))
        retract_(model)
        assert torch.allclose(model(X), output, rtol=0, atol=1e-12)

    def test_parametrizations_of_torch_are_the_other_way(self, tmp_path):
        """They work, files and merging included, at the price that the docstring names."""
        model = moved(adapted(target_modules="6")).eval()
        update = model[6].tucker_update["default"]
        nn.utils.parametrizations.orthogonal(update, "factor_1")
        gradients(model)
        torch.optim.SGD(adapter_parameters(model), lr=0.5).step()
        eye = torch.eye(2).double()
        assert float((update.factor_1.mT @ update.factor_1 - eye).detach().norm()) <= tolerance("float64", 24)
        fresh = net()
        fresh.load_state_dict(detach(copy.deepcopy(model)).state_dict())
        load_adapter(fresh, save_adapter(model, tmp_path / "adapter"))
        assert torch.allclose(fresh.eval()(X), model(X), rtol=0, atol=1e-12)
        assert "6.tucker_update.default.parametrizations.factor_1.original" in dict(model.named_parameters())
        with pytest.raises(RuntimeError, match="Serialization of parametrized modules"):
            pickle.dumps(model)
        with pytest.raises(ValueError, match="adapter 'default' has a parametrization of torch"):
            retract_(model)

    def test_low_precision(self):
        layer = FloraLinear(nn.Linear(8, 8), ranks=2, dtype=torch.bfloat16)
        moved(layer)
        before = layer.tucker_update["default"].delta(torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            retract_(layer)
        after = layer.tucker_update["default"].delta(torch.float32)
        assert float((after - before).detach().norm()) <= bfloat16_tolerance(before)

    def test_refusals_change_nothing(self):
        with pytest.raises(ValueError, match="the model has no adapter; call attach first"):
            retract_(net())
        with pytest.raises(ValueError, match="no adapter 'b'"):
            retract_(adapted(), "b")
        layer = FloraLinear(nn.Linear(2, 2))
        layer.install("wide", TuckerUpdate(TuckerTensor(torch.ones(3, 2), [torch.ones(2, 3), None])))
        with pytest.raises(ValueError, match=re.escape("factor 0 of adapter 'wide' is of shape (2, 3); its columns")):
            retract_(layer)
        model = moved(adapted())
        with torch.no_grad():
            model[6].tucker_update["default"].core[0, 0] = torch.nan
        before = [p.detach().clone() for p in adapter_parameters(model)]
        with pytest.raises(ValueError, match="NaN or infinite entries; training has diverged"):
            retract_(model)
        assert all(same_bits(a, b) for a, b in zip(before, adapter_parameters(model)))


def gradients(model, dtype=torch.float64):
    model.zero_grad()
    loss(model, dtype).backward()
    return [p.grad.clone() for p in adapter_parameters(model)]


class TestAround:
    """What people put around a model in training."""

    def test_gradient_checkpointing(self):
        model = moved(adapted()).eval()
        expected = gradients(model)
        for use_reentrant in (False, True):
            model.zero_grad()
            x = X.clone().requires_grad_(use_reentrant)
            nnf.cross_entropy(checkpoint_sequential(list(model), 3, x, use_reentrant=use_reentrant), Y).backward()
            found = [p.grad for p in adapter_parameters(model)]
            assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-14) for a, b in zip(found, expected))

    def test_mixed_precision_with_a_scaler(self):
        model = adapted(torch.float32)
        optimizer = torch.optim.AdamW(parameter_groups(model, 1e-2))
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=1)
        before = loss(model, torch.float32).item()
        for step in range(6):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                value = nnf.cross_entropy(model(X.float()), Y)
            scaler.scale(value).backward()
            if step == 2:  # an overflow is skipped, and leaves the parameters alone
                adapter_parameters(model)[0].grad.fill_(torch.inf)
            kept = [p.detach().clone() for p in adapter_parameters(model)]
            scaler.step(optimizer)
            scaler.update()
            same = all(torch.equal(a, b) for a, b in zip(kept, adapter_parameters(model)))
            assert same == (step == 2)
        assert all(p.dtype == torch.float32 for p in adapter_parameters(model))
        assert loss(model, torch.float32).item() < before

    @pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
    def test_every_implementation_of_a_step_agrees(self, kind):
        results = []
        for options in ({"foreach": False}, {"foreach": True}, {"fused": True}):
            model = adapted()
            optimizer = kind(parameter_groups(model, 1e-2), **options)
            for _ in range(4):
                optimizer.zero_grad()
                loss(model).backward()
                optimizer.step()
            results.append([p.detach() for p in adapter_parameters(model)])
        for other in results[1:]:
            assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(results[0], other))

    def test_averages(self, tmp_path):
        model = adapted()
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
        optimizer = torch.optim.SGD(adapter_parameters(model), lr=0.1)
        expected = [p.detach().clone() for p in adapter_parameters(model)]
        for step in range(3):
            optimizer.zero_grad()
            loss(model).backward()
            optimizer.step()
            average.update_parameters(model)
            now = [p.detach() for p in adapter_parameters(model)]
            expected = [n.clone() if step == 0 else (e + n) / 2 for e, n in zip(expected, now)]
        found = adapter_parameters(average)
        assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-15) for a, b in zip(found, expected))
        # The average is a model of its own: it is saved, loaded and merged like any other.
        save_adapter(average.module, tmp_path / "average")
        twin = detach(copy.deepcopy(model))
        load_adapter(twin, tmp_path / "average")
        assert same_bits(twin.eval()(X), average.eval()(X))
        state = average.state_dict()
        again = AveragedModel(adapted())
        again.load_state_dict(state)
        assert same_bits(again.eval()(X), average(X))

    def test_copies_are_apart(self):
        model = moved(adapted()).eval()
        twin = copy.deepcopy(model)
        output = model(X)
        moved(twin)
        assert same_bits(model(X), output)
        assert not {id(p) for p in twin.parameters()} & {id(p) for p in model.parameters()}
        # The shared layer is still one in the copy.
        assert twin[0] is twin[2]

    def test_accelerate(self, tmp_path):
        accelerate = pytest.importorskip("accelerate")
        model = adapted(torch.float32)
        optimizer = torch.optim.AdamW(parameter_groups(model, 1e-2, core_lr=2e-2))
        data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X.float(), Y), batch_size=4)
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2, mixed_precision="bf16")
        model, optimizer, data = accelerator.prepare(model, optimizer, data)
        before = loss(model, torch.float32).item()
        for _ in range(5):
            for x, y in data:
                with accelerator.accumulate(model):
                    accelerator.backward(nnf.cross_entropy(model(x), y))
                    accelerator.clip_grad_norm_(adapter_parameters(model), 1.0)
                    optimizer.step()
                    optimizer.zero_grad()
        assert loss(model, torch.float32).item() < before
        accelerator.save_state(tmp_path / "state", safe_serialization=True)
        plain = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        kept = [p.detach().clone() for p in adapter_parameters(plain)]
        moved(plain)
        accelerator.load_state(tmp_path / "state")
        assert all(same_bits(a, b) for a, b in zip(kept, adapter_parameters(plain)))
        save_adapter(plain, tmp_path / "adapter")
        twin = net(torch.float32)
        twin.load_state_dict(detach(copy.deepcopy(plain)).state_dict())
        load_adapter(twin, tmp_path / "adapter")
        assert same_bits(twin.eval()(X.float()), plain.eval()(X.float()))
