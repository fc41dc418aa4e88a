"""Where an update starts: what is promised of each start, and gradients that are compressed while they are computed."""

import copy
import itertools
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as nnf
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import flora_tensor as ft
from flora_tensor import Arrangement, Moments, TuckerTensor
from flora_torch import adapter_parameters, attach, collect_gradients, collect_moments, disabled, moment_ranks
from flora_torch.initialize import INITS, context, from_delta, from_moments, minor, start_update
from flora_torch.moment_starts import mode_moments
from flora_torch.starts import random_start
from support import distance, same_bits, tolerance

pytestmark = pytest.mark.usefixtures("seeded")


class Net(nn.Module):
    """Every kind of layer, a depthwise convolution, and an output tied to the embedding."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 6)
        self.conv = nn.Conv1d(6, 6, 3, padding=1, groups=2)
        self.depthwise = nn.Conv1d(6, 6, 3, padding=1, groups=6)
        self.up = nn.ConvTranspose1d(6, 6, 2, stride=2)
        self.norm = nn.BatchNorm1d(6)
        self.fc = nn.Linear(6, 6)
        self.head = nn.Linear(6, 9, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.norm(self.up(self.depthwise(self.conv(self.embed(ids).mT).tanh())))
        return self.head(self.fc(x.mT.contiguous()).tanh())


IDS = torch.tensor([[0, 3, 5, 1], [8, 2, 2, 7], [4, 6, 1, 0]])


def loss(model, ids):
    return nnf.cross_entropy(model(ids)[:, ::2].flatten(0, 1), ids.flatten())


def net():
    return Net().double().eval()


def known(model, init, ranks=2):
    if init == "from_gradient":
        return collect_gradients(model, [IDS], loss, ranks=ranks)
    return collect_moments(model, [IDS]) if init in ("from_moments", "context") else None


@pytest.mark.parametrize("path", ["auto", "factored", "dense"])
@pytest.mark.parametrize("init", [init for init in INITS if init != "from_delta"])
def test_the_start_is_the_model_bit_for_bit(init, path):
    model = net()
    before = model(IDS)
    targets = None if path != "factored" else [nn.Linear, "conv", "depthwise", "up"]
    report = attach(
        model, ranks=2, init=init, init_tensors=known(model, init), scale=0.7, path=path, target_modules=targets
    )
    assert report.n_parameters > 0
    assert torch.equal(model(IDS), before)
    loss(model, IDS).backward()
    moved = [float(p.grad.norm()) > 0 for p in adapter_parameters(model)]
    assert any(moved)
    if init in ("principal", "minor", "context"):
        assert all(moved), "a start that is not zero moves the factors, too"


HEADS = {"heads": 4}


@pytest.mark.parametrize("init", ["principal", "minor"])
@pytest.mark.parametrize(
    ("base", "shapes", "arrangements"),
    [
        (
            lambda: nn.Linear(48, 64),
            [(7, 48)],
            [
                None,
                Arrangement("(heads d) i -> heads d i", HEADS),
                Arrangement("o (heads d) -> heads o d", HEADS),
                Arrangement("o (heads d) -> o heads d", HEADS),
            ],
        ),
        (lambda: nn.Conv2d(12, 16, 3), [(2, 12, 9, 9)], [None, "o (i h w)", "(o h) (i w)", "h w o i", "o h w i"]),
        (lambda: nn.ConvTranspose2d(12, 16, 3), [(2, 12, 9, 9)], [None, "(i h) (o w)"]),
        (lambda: nn.Conv3d(8, 8, 3), [(2, 8, 5, 5, 5)], [None]),
        (lambda: nn.Bilinear(8, 9, 10), [(3, 8), (3, 9)], [None]),
        (lambda: nn.GRUCell(8, 8), [(3, 8)], [None]),
    ],
    ids=["linear", "conv2d", "transposed", "conv3d", "bilinear", "recurrent"],
)
def test_the_start_cancels_in_every_arrangement(base, shapes, arrangements, init):
    """What is formed of the trained tensor and of its start has the same bits, with gradients and without."""
    for arrangement in arrangements:
        for dtype in (torch.float32, torch.float64):
            check_cancels(base().to(dtype), shapes, init, arrangement)


def test_the_start_cancels_where_it_is_compiled():
    arrangement = Arrangement("o (heads d) -> heads o d", HEADS)
    check_cancels(nn.Linear(48, 64).double(), [(7, 48)], "principal", arrangement, compiled=True)


def check_cancels(base, shapes, init, arrangement, compiled=False):
    model = nn.Sequential(base)
    attach(model, ranks=0.5, init=init, arrangement=arrangement, path="dense", scale=0.7)
    layer = torch.compile(model[0], backend="eager") if compiled else model[0]
    dtype = next(base.parameters()).dtype
    inputs = [torch.randn(shape, dtype=dtype) for shape in shapes]
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            changed = layer(*inputs)
            with disabled(model):
                assert torch.equal(changed, layer(*inputs))


@pytest.mark.parametrize("shape", [(5, 5), (7, 4), (4, 7)])
@pytest.mark.parametrize("rank", [1, 3])
def test_minor_part_of_a_matrix(shape, rank):
    weight = torch.randn(shape).double()
    u, s, vt = np.linalg.svd(weight.numpy(), full_matrices=False)
    expected = (u[:, -rank:] * s[-rank:]) @ vt[-rank:]
    start = minor(weight, (rank, rank), scale=2.0)
    bound = tolerance("float64", *shape, norm=float(s[0] ** 2 / (s[-rank - 1] - s[-rank])))
    assert distance(2.0 * start.tucker.to_tensor(), expected) <= bound
    assert same_bits(start.tucker.core, start.start.core)


def test_minor_part_of_a_kernel():
    weight = torch.randn(6, 5, 3, 3).double()
    start = minor(weight, (2, 2, None, 3)).tucker
    assert [u is None for u in start.factors] == [False, False, True, True]
    for mode in (0, 1):
        u = start.factors[mode].numpy()
        full = np.linalg.svd(np.moveaxis(weight.numpy(), mode, 0).reshape(weight.shape[mode], -1))[0]
        assert distance(full[:, -2:].T @ u @ (full[:, -2:].T @ u).T, np.eye(2)) <= tolerance("float64", 6, factor=1e4)
    separable = minor(weight, (2, 2), arrangement=Arrangement("(o h) (i w)")).tucker
    assert separable.shape == (18, 15)


def partial_trace(moment, sizes, kept):
    """Take the trace over all axes but ``kept``, entry by entry."""
    result = np.zeros((sizes[kept], sizes[kept]))
    for row in np.ndindex(*sizes):
        for column in np.ndindex(*sizes):
            if all(row[k] == column[k] for k in range(len(sizes)) if k != kept):
                i, j = np.ravel_multi_index(row, sizes), np.ravel_multi_index(column, sizes)
                result[row[kept], column[kept]] += moment[i, j]
    return result


def second_moment(size, rank=None):
    x = torch.randn(rank or 3 * size, size).double()
    return x.mT @ x


class TestMomentStarts:
    def test_each_mode_has_its_own_moment(self):
        sizes = (4, 3, 2)
        moment = second_moment(24)
        found = mode_moments((7, *sizes), moment)
        assert found[0] is None
        for k in range(3):
            expected = partial_trace(moment.numpy(), sizes, k)
            assert distance(found[1 + k], expected) <= tolerance("float64", 24, norm=float(moment.norm()))
        diagonal = mode_moments((7, *sizes), moment.diagonal())
        for vector, matrix in zip(diagonal[1:], found[1:]):
            assert torch.allclose(vector, matrix.diagonal(), rtol=1e-12)
        assert torch.equal(mode_moments((7, *sizes), moment, arrangement=Arrangement("o (i h w)"))[1], moment)
        turned = mode_moments((7, *sizes), moment, arrangement=Arrangement("o (w i h)"))[1]
        order = torch.arange(24).reshape(sizes).permute(2, 0, 1).flatten()
        assert torch.equal(turned, moment[order][:, order])

    def test_axes_of_other_names(self):
        moment = second_moment(6)
        heads = mode_moments((4, 6), moment, arrangement=Arrangement("o (heads d) -> o heads d", {"heads": 3}))
        assert distance(heads[1], partial_trace(moment.numpy(), (3, 2), 0)) <= tolerance("float64", 6, norm=1e3)
        first = mode_moments((6, 4), moment, "o")
        assert torch.equal(first[0], moment)
        assert first[1] is None
        channels = mode_moments((4, 6, 3, 3), moment)
        assert [c is None for c in channels] == [True, False, True, True]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (((4, 6), torch.eye(5)), "a moment of shape (5, 5) over the axes 'i' of a weight of shape (4, 6)"),
            (((4, 6), torch.eye(6), "q"), "pass one over some of 'o i'"),
            (((4, 6), torch.ones(6, 5)), "square or a diagonal"),
            (((4, 6), torch.full((6,), torch.nan)), "NaN or infinite"),
        ],
    )
    def test_refused(self, arguments, message):
        with pytest.raises(ValueError, match=re.escape(message)):
            mode_moments(*arguments)
        with pytest.raises(ValueError, match=re.escape("no mode of 'o (i h w)' is made of the axes 'i' alone")):
            mode_moments((4, 6, 3, 3), torch.eye(6), arrangement=Arrangement("o (i h w)"))
        with pytest.raises(ValueError, match="got a Tucker tensor; pass the second moment"):
            start_update(torch.eye(2), (1, 1), init="context", tensor=TuckerTensor(torch.eye(2), [None, None]))

    @pytest.mark.parametrize("rank", [1, 4])
    def test_factors_let_the_most_energy_through(self, rank):
        moment = second_moment(9)
        start = from_moments((5, 9), (2, rank), moment, dtype=torch.float64)
        factor = start.factors[1]
        largest = np.linalg.eigvalsh(moment.numpy())[-rank:].sum()
        bound = tolerance("float64", 9, norm=float(moment.norm()))
        assert abs(float((factor.mT @ moment @ factor).trace()) - largest) <= bound
        assert distance(factor.mT @ factor, np.eye(rank)) <= tolerance("float64", 9)
        assert not start.core.any()

    def test_a_seed_gives_the_other_factors(self):
        draw = [
            from_moments((5, 9), (2, 3), torch.eye(9), generator=torch.Generator().manual_seed(k)) for k in (1, 1, 2)
        ]
        assert torch.equal(draw[0].factors[0], draw[1].factors[0])
        assert not torch.equal(draw[0].factors[0], draw[2].factors[0])

    @pytest.mark.parametrize("deficient", [False, True])
    def test_context_has_the_smallest_output_error(self, deficient):
        """E‖(W − T) x‖² cannot be below the tail of the singular values of W L, with C = L Lᵀ."""
        x = torch.randn(4 if deficient else 40, 8).double() * torch.logspace(0, -2, 8).double()
        weight, moment = torch.randn(6, 8).double(), x.mT @ x / len(x)
        tucker = context(weight, (2, 2), moment).tucker
        error = float(((weight - tucker.to_tensor()) @ x.mT).square().sum() / len(x))
        tail = np.linalg.svd((weight @ x.mT / len(x) ** 0.5).numpy(), compute_uv=False)[2:]
        # The floor under the eigenvalues adds at most its own share to the output.
        floor = 1e-6 * float(torch.linalg.eigvalsh(moment)[-1]) * float(weight.square().sum())
        assert (tail**2).sum() * (1 - 1e-9) <= error <= (tail**2).sum() + floor
        plain = from_delta(weight, (2, 2)).to_tensor()
        assert error < float(((weight - plain) @ x.mT).square().sum() / len(x))
        assert distance(tucker.factors[1].mT @ tucker.factors[1], np.eye(2)) <= tolerance("float64", 8)

    def test_context_of_an_even_input_is_principal(self):
        weight = torch.randn(5, 4, 3, 3).double()
        for shape in ((36, 36), (36,), (4, 4)):
            moment = torch.ones(shape).double() if len(shape) == 1 else torch.eye(shape[0]).double()
            found = context(weight, (3, 2, 2, 2), 5.0 * moment, scale=0.5).tucker.to_tensor()
            expected = from_delta(weight, (3, 2, 2, 2), scale=0.5).to_tensor()
            assert distance(found, expected) <= tolerance("float64", 180, norm=float(weight.norm()), factor=1e3)

    def test_moments_may_cover_more_than_the_targets(self):
        model = net()
        moments = collect_moments(model, [IDS])
        attach(model, ranks=2, init="from_moments", init_tensors=moments, target_modules="fc")
        with pytest.raises(ValueError, match="needs the tensor to decompose"):
            attach(model, ranks=2, init="context", init_tensors=Moments({}, {}, {}), adapter_name="b")
        loaded = {name: value.numpy() for name, value in moments.items()}
        attach(
            model, ranks=2, init="from_moments", init_tensors=Moments(loaded, moments.axes, moments.counts),
            target_modules="head", adapter_name="c",
        )  # fmt: skip


class TestRanksOfMoments:
    @pytest.mark.parametrize("max_rank", [None, 2, 9])
    def test_no_other_choice_explains_more(self, max_rank):
        sizes, rank = {"a": 3, "b": 4, "c": 2}, 2
        values = {name: torch.rand(n, dtype=torch.float64) ** 3 for name, n in sizes.items()}
        bases = {name: torch.linalg.qr(torch.randn(n, n, dtype=torch.float64)).Q for name, n in sizes.items()}
        full = {name: (q * values[name]) @ q.mT for name, q in bases.items()}
        full["c"] = values["c"]  # a diagonal
        moments = Moments(full, dict.fromkeys(sizes, "i"), dict.fromkeys(sizes, 9))
        found = moment_ranks(moments, rank, max_rank=max_rank)
        shares = {name: (v.sort(descending=True).values / v.sum()).cumsum(0).tolist() for name, v in values.items()}

        def explained(ranks):
            return sum(shares[name][r - 1] for name, r in zip(sizes, ranks) if r)

        most = 2 * rank if max_rank is None else max_rank
        choices = itertools.product(*(range(min(n, most) + 1) for n in sizes.values()))
        best = max(explained(ranks) for ranks in choices if sum(ranks) <= rank * len(sizes))
        assert explained([found.get(name, 0) for name in sizes]) == pytest.approx(best, abs=1e-12)
        assert sum(found.values()) == min(rank * len(sizes), sum(min(n, most) for n in sizes.values()))

    def test_they_are_what_attach_takes(self):
        model = net()
        moments = collect_moments(model, [IDS])
        ranks = moment_ranks(moments, 1)
        report = attach(model, target_parameters=list(ranks), ranks=ranks, init="from_moments", init_tensors=moments)
        assert {layer.name: layer.asked[0] for layer in report.layers} == ranks

    def test_refusals(self):
        moments = Moments({"a": torch.eye(2)}, {"a": "i"}, {"a": 1})
        for given in ((moments, 0), (Moments({}, {}, {}), 1)):
            with pytest.raises(ValueError, match=r"moment_ranks: .* pass at least one of each"):
                moment_ranks(*given)


class TestGradients:
    def dense(self, model, batches):
        """Return the mean gradients of whole weights as autograd gives them."""
        model = copy.deepcopy(model).requires_grad_()
        for batch in batches:
            loss(model, batch).backward()
        return {name: p.grad / len(batches) for name, p in model.named_parameters()}

    def test_wide_enough_ranks_keep_all(self):
        model, batches = net(), list(IDS[:, None])
        expected = self.dense(model, batches)
        gradients = collect_gradients(model, batches, loss, ranks=6)
        assert set(gradients) == {"embed.weight", "conv.weight", "depthwise.weight", "up.weight", "fc.weight"}
        assert gradients.n_batches == 3
        for name, tucker in gradients.items():
            assert gradients.errors[name] <= tolerance("float64", 3, tucker.core.numel())
            bound = tolerance("float64", 3, tucker.core.numel(), norm=float(expected[name].norm()))
            assert distance(tucker.to_tensor(), expected[name]) <= bound

    def test_what_is_left_out_is_bounded(self):
        model, batches = nn.Sequential(nn.Linear(30, 25), nn.Tanh(), nn.Linear(25, 3)).double(), torch.randn(4, 20, 30)

        def energy(model, batch):
            return model(batch.double()).square().mean()

        gradients = collect_gradients(model, batches, energy, ranks={"0": 2, "2": (1, None)}, oversampling=1)
        twin = copy.deepcopy(model)
        (sum(energy(twin, batch) for batch in batches) / 4).backward()
        tucker, exact = gradients["0.weight"], twin[0].weight.grad
        assert tucker.ranks == (5, 5)
        error = distance(tucker.to_tensor(), exact) / ft.norm(tucker)
        assert 1e-9 < error <= gradients.errors["0.weight"] + 1e-12
        assert gradients["2.weight"].ranks == (3, 3)
        # One batch is decomposed once, so no start of these ranks is better than √2 times the best.
        alone = collect_gradients(model, batches[:1], energy, ranks=2, oversampling=1)["0.weight"]
        twin.zero_grad()
        energy(twin, batches[0]).backward()
        singular = np.linalg.svd(twin[0].weight.grad.numpy(), compute_uv=False)
        assert distance(alone.to_tensor(), twin[0].weight.grad) <= 2**0.5 * np.linalg.norm(singular[5:])

    def test_one_dense_gradient_at_a_time(self, monkeypatch):
        model = net()
        seen = []
        real = ft.tucker

        def counted(x, *args, **options):
            seen.append(sum(p.grad is not None for p in model.parameters()))
            return real(x, *args, **options)

        monkeypatch.setattr(ft, "tucker", counted)
        gradients = collect_gradients(model, [IDS, IDS], loss, ranks=1, oversampling=1)
        assert len(seen) >= 8
        # The gradient that is decomposed has left its parameter already.
        assert set(seen) == {0}
        assert all(p.grad is None for p in model.parameters())
        assert gradients["fc.weight"].ranks == (3, 3)

    def test_model_is_left_as_it_was(self):
        model = net().train()
        model.fc.eval()
        model.conv.weight.requires_grad_(False)
        model.norm.weight.grad = torch.ones(6).double()
        state = {name: value.clone() for name, value in model.state_dict().items()}
        collect_gradients(model, [IDS], loss, ranks=2)
        with pytest.raises(ZeroDivisionError):
            collect_gradients(model, [IDS], lambda model, ids: 1 / 0, ranks=2)
        assert (model.training, model.fc.training) == (True, False)
        assert all(same_bits(state[name], value) for name, value in model.state_dict().items())
        assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["conv.weight"]
        assert [name for name, p in model.named_parameters() if p.grad is not None] == ["norm.weight"]
        assert not any(p._post_accumulate_grad_hooks for p in model.parameters())

    @pytest.mark.parametrize("path", ["factored", "dense"])
    def test_adapted_models_have_the_gradients_of_their_weights(self, path):
        model = net()
        expected = self.dense(model, [IDS])
        attach(model, ranks=2, path=path, target_modules=["fc", "conv", "up"])
        gradients = collect_gradients(model, [IDS], loss, ranks=6, target_modules=["fc", "conv", "up"])
        for name, tucker in gradients.items():
            bound = tolerance("float64", tucker.core.numel(), norm=float(expected[name].norm()))
            assert distance(tucker.to_tensor(), expected[name]) <= bound
        assert all(p.grad is None and p.requires_grad for p in adapter_parameters(model))

    @pytest.mark.parametrize("arrangement", [None, "o (i w)"])
    def test_the_first_step_is_the_gradients_projection(self, arrangement):
        """A step of length η on the core changes the weight by −η s² P(∇L), P(∇L) the truncated gradient."""
        model, exact = net(), self.dense(net(), [IDS])
        model.load_state_dict((twin := net()).state_dict())
        exact = self.dense(twin, [IDS])["conv.weight"]
        options = {"ranks": 2, "target_modules": "conv", "arrangement": arrangement}
        gradients = collect_gradients(model, [IDS], loss, **options)
        attach(model, init="from_gradient", init_tensors=gradients, scale=3.0, **options)
        update = model.conv.tucker_update["default"]
        loss(model, IDS).backward()
        torch.optim.SGD(adapter_parameters(model), lr=0.01).step()
        arranged = update.arrangement.arrange(exact)
        projected = ft.st_hosvd(arranged, 2) if arrangement else None
        factors = [u.detach() if u is not None else None for u in update.factors]
        expected = ft.multi_mode_dot(ft.multi_mode_dot(arranged, factors, transpose=True), factors)
        if projected is not None:
            assert distance(expected, projected.to_tensor()) <= tolerance("float64", 54, norm=1.0, factor=1e4)
        expected = -0.01 * 9.0 * update.arrangement.restore(expected, exact.shape)
        bound = tolerance("float64", 54, norm=float(expected.norm()), factor=1e3)
        assert distance(update.delta(), expected) <= bound
        assert float((update.delta().detach() * exact).sum()) < 0

    def test_a_first_step_of_descent(self):
        """−η times the gradient is a start of its own, whose loss is lower."""
        model = net()
        gradients = collect_gradients(model, [IDS], loss, ranks=4)
        before = loss(model, IDS).item()
        steps = {name: ft.scale(tucker, -0.1) for name, tucker in gradients.items()}
        attach(model, ranks=4, init="from_delta", init_tensors=steps, scale=2.0)
        assert loss(model, IDS).item() < before

    def test_transformers_losses(self):
        config = GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=13, n_positions=9, bos_token_id=0, eos_token_id=0)
        model = GPT2LMHeadModel(config)
        batch = {"input_ids": IDS, "labels": IDS}
        gradients = collect_gradients(model, [batch], ranks=2, target_modules="c_attn")
        report = attach(model, ranks=2, target_modules="c_attn", init="from_gradient", init_tensors=gradients)
        assert report.layers[0].ranks == (2, 2)

    def test_refusals(self):
        model = net()
        cases = [
            ([], loss, {}, "there is no batch"),
            ([IDS], lambda model, ids: model(ids), {}, "the loss is a tensor of shape (3, 8, 9); a scalar"),
            ([IDS], lambda model, ids: 1.0, {}, "the loss is 'float'; a scalar that depends on the weights"),
            ([IDS], lambda model, ids: loss(model, ids).detach(), {}, "depends on the weights"),
            ([IDS], lambda model, ids: loss(model, ids) * torch.inf, {}, "the loss is inf; a finite one"),
            ([IDS], lambda model, ids: model.fc.weight.sum(), {}, "does not depend on 'embed.weight'; exclude"),
            ([IDS], loss, {"ranks": {"fc": 2}}, "collect_gradients: ranks has no pattern for"),
            (
                [IDS],
                loss,
                {"ranks": {"*": 2, "fd": 3}},
                "collect_gradients: ranks has the pattern 'fd', which",
            ),
            ([IDS], loss, {"target_modules": "hed"}, "collect_gradients: target_modules 'hed' matches no module"),
        ]
        for batches, function, options, message in cases:
            with pytest.raises(ValueError, match=re.escape(message)):
                collect_gradients(model, batches, function, **{"ranks": 2, **options})
        with torch.no_grad():
            model.fc.weight.fill_(torch.inf)

        def broken(model, ids):
            return nnf.relu(model.embed(ids)).sum() + (0.0 * model.fc(model.embed(ids))).nan_to_num().sum()

        with pytest.raises(ValueError, match=r"gradient of 'embed[.]weight' has NaN or infinite"):
            collect_gradients(model, [IDS], broken, ranks=2, target_modules="embed")

    def test_tensors_that_were_decomposed_to_fewer_ranks(self):
        model = nn.Sequential(nn.Linear(20, 20))
        gradients = collect_gradients(model, [torch.randn(9, 20)], lambda m, x: m(x).square().sum(), ranks=1)
        with pytest.raises(ValueError, match=re.escape("ranks (12, 12) of a Tucker tensor that has (10, 10)")):
            attach(model, ranks=12, init="from_gradient", init_tensors=gradients)
        wrong = {"0.weight": TuckerTensor(torch.ones(1, 1), [torch.ones(5, 1), torch.ones(4, 1)])}
        with pytest.raises(ValueError, match="got a tensor of shape \\(5, 4\\)"):
            attach(model, ranks=1, init="from_delta", init_tensors=wrong)


@pytest.mark.parametrize(
    ("preset", "draw"),
    [
        ("official", lambda factor: nn.init.kaiming_normal_(factor, a=3**0.5)),
        ("loralib", lambda factor: nn.init.normal_(factor, std=0.02)),
        ("peft", lambda factor: nn.init.kaiming_uniform_(factor, a=5**0.5)),
    ],
)
def test_random_factors_are_distributed_as_in_the_published_codes(preset, draw):
    shape, ranks = (4000, 3000), (25, 16)
    start = random_start(shape, ranks, preset, generator=torch.Generator().manual_seed(0))
    for factor, size, rank in zip(start.factors, shape, ranks):
        theirs = draw(torch.empty(size, rank))
        # Of 48,000 numbers a quantile and a mean absolute value are known to two percent.
        for of in (lambda x: x.abs().mean(), lambda x: x.abs().quantile(0.5), lambda x: x.abs().quantile(0.99)):
            assert float(of(factor)) == pytest.approx(float(of(theirs)), rel=0.03)
        assert abs(float(factor.mean())) <= 0.03 * float(theirs.std())


def test_orthonormal_factors_keep_the_norm_of_the_core():
    start = random_start((40, 30, 3), (5, 4, 3), generator=torch.Generator().manual_seed(0))
    assert start.factors[2] is None
    for factor in start.factors[:2]:
        assert torch.allclose(factor.mT @ factor, torch.eye(factor.shape[1]), atol=1e-6)
