"""Factored convolutions over the whole product of their options, and the pure functions' refusals."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.func import functional_call, vmap

from flora_tensor import Arrangement, TuckerTensor
from flora_torch import FloraConv, FloraConvTranspose, TuckerUpdate
from flora_torch.cost import Work, conv_work, forming_work, linear_work, prefers_dense
from flora_torch.functional import (
    ConvGeometry,
    dense_delta,
    split_of,
    tucker_conv,
    tucker_conv_transpose,
    tucker_embedding,
    tucker_linear,
)
from flora_torch.plans import joins
from support import tolerance
from torch_models import small_products

CONVS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED: dict[int, Any] = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
SEPARABLE = {
    3: ("o i w", "o (i w)", "(o w) i"),
    4: ("o i h w", "o (i h w)", "(o h) (i w)", "(w o) (h i)", "(o w h) i"),
    5: ("o i d h w", "o (i d h w)", "(o d) (i h w)", "(h o) (w i d)"),
}

pytestmark = pytest.mark.usefixtures("one_thread", "large_products")


@dataclass(frozen=True)
class ConvCase:
    """A convolution, an input and a Tucker tensor, described."""

    ndim: int
    groups: int
    per_group: tuple[int, int]
    options: tuple[tuple[str, Any], ...]
    pattern: str
    whole: tuple[bool, ...]
    sizes: tuple[int, ...]
    batch: int | None
    transposed: bool
    seed: int

    def base(self) -> Any:
        first, second = (self.groups * n for n in self.per_group)
        kind = (TRANSPOSED if self.transposed else CONVS)[self.ndim]
        torch.manual_seed(self.seed)
        return kind(first, second, groups=self.groups, **dict(self.options)).double()

    def update(self, shape: tuple[int, ...]) -> TuckerUpdate:
        arrangement = Arrangement(self.pattern)
        arranged = arrangement.shape(shape)
        ranks = [n if whole else min(n + 1, 2) for n, whole in zip(arranged, self.whole)]
        factors = [
            None if whole else torch.randn(n, r, dtype=torch.float64)
            for n, r, whole in zip(arranged, ranks, self.whole)
        ]
        core = torch.randn(ranks, dtype=torch.float64)
        return TuckerUpdate(TuckerTensor(core, factors), shape, arrangement=arrangement, scale=0.7)

    def input(self, channels: int) -> torch.Tensor:
        head = () if self.batch is None else (self.batch,)
        return torch.randn(*head, channels, *self.sizes, dtype=torch.float64, requires_grad=True)


@st.composite
def conv_cases(draw: st.DrawFn, transposed: bool) -> ConvCase:
    ndim = draw(st.integers(1, 3))
    per_axis = lambda low, high: st.one_of(  # noqa: E731
        st.integers(low, high), st.tuples(*[st.integers(low, high)] * ndim)
    )
    kernel = draw(st.tuples(*[st.integers(1, 3)] * ndim))
    options: dict[str, Any] = {
        "kernel_size": kernel,
        "dilation": draw(per_axis(1, 2)),
        "bias": draw(st.booleans()),
    }
    if transposed:
        options["stride"] = draw(per_axis(1, 3))
        options["padding"] = draw(per_axis(0, 1))
        stride = options["stride"] if isinstance(options["stride"], tuple) else (options["stride"],) * ndim
        dilation = options["dilation"] if isinstance(options["dilation"], tuple) else (options["dilation"],) * ndim
        # torch wants the extra positions fewer than stride or dilation.
        options["output_padding"] = tuple(draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation))
        sizes = draw(st.tuples(*[st.integers(3, 4)] * ndim))
    else:
        options["padding"] = draw(st.one_of(st.sampled_from(["same", "valid"]), per_axis(0, 2)))
        options["stride"] = 1 if options["padding"] == "same" else draw(per_axis(1, 3))
        options["padding_mode"] = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
        sizes = draw(st.tuples(*[st.integers(5, 6)] * ndim))
    pattern = draw(st.sampled_from(SEPARABLE[ndim + 2]))
    n_modes = Arrangement(pattern).n_modes
    return ConvCase(
        ndim=ndim,
        groups=draw(st.sampled_from([1, 2, 3])),
        # One channel per group is the depthwise case.
        per_group=(draw(st.integers(1, 3)), draw(st.integers(1, 3))),
        options=tuple(options.items()),
        pattern=pattern,
        whole=tuple(draw(st.integers(0, 3)) == 0 for _ in range(n_modes)),
        sizes=sizes,
        batch=draw(st.sampled_from([None, 1, 2])),
        transposed=transposed,
        seed=draw(st.integers(0, 2**16)),
    )


def check_case(case: ConvCase) -> None:
    base = case.base()
    update = case.update(tuple(base.weight.shape))
    layer = (FloraConvTranspose if case.transposed else FloraConv)(base, path="factored")
    layer.install("default", update)
    x = case.input(base.in_channels)
    direction = None
    results = []
    with small_products():
        small = layer(x)
    for output in (small, layer(x), functional_call(base, {"weight": base.weight + update.delta()}, (x,))):
        direction = torch.randn_like(output) if direction is None else direction
        results.append((output, *torch.autograd.grad(output, [x, *update.parameters()], direction)))
    size = base.weight.numel()
    for *both, theirs in zip(*results):
        bound = tolerance("float64", size, norm=float(theirs.detach().norm()) + 1.0, factor=1e3)
        assert all(float((ours - theirs).detach().norm()) <= bound for ours in both)
    merged = layer.merged()
    assert type(merged) is type(base)
    difference = (merged(x) - results[-1][0]).detach()
    assert float(difference.norm()) <= tolerance("float64", size, norm=float(results[-1][0].detach().norm()) + 1.0)


# torch tells that an even kernel with padding="same" copies its input.
@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
@settings(max_examples=150)
@given(case=conv_cases(transposed=False))
def test_convolution_with_any_options(case: ConvCase):
    check_case(case)


@settings(max_examples=100)
@given(case=conv_cases(transposed=True))
def test_transposed_convolution_with_any_options(case: ConvCase):
    check_case(case)


@pytest.mark.parametrize("groups", [1, 2])
def test_output_size_in_the_call(groups: int):
    base = nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, groups=groups).double()
    layer = FloraConvTranspose(base, ranks=2, path="factored")
    nn.init.normal_(layer.tucker_update["default"].core)
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    for size in [(9, 9), (10, 9), (2, 6, 10, 10)]:
        expected = functional_call(base, {"weight": layer.weight}, (x, size))
        assert torch.allclose(layer(x, size), expected, rtol=0, atol=1e-12)
        assert torch.allclose(layer(x, output_size=size), expected, rtol=0, atol=1e-12)


def test_pure_functions_agree_with_the_dense_weight():
    core, u, v = torch.randn(2, 3).double(), torch.randn(5, 2).double(), torch.randn(4, 3).double()
    weight = dense_delta(core, [u, v])
    assert torch.allclose(weight, u @ core @ v.T)
    x, y, ids = torch.randn(7, 4).double(), torch.randn(7, 5).double(), torch.tensor([4, 0, 4])
    assert torch.allclose(tucker_linear(x, core, [u, v]), x @ weight.T)
    assert torch.allclose(tucker_linear(y, core, [u, v], transposed=True), y @ weight)
    assert torch.allclose(tucker_embedding(ids, core, [u, v]), weight[ids])
    assert torch.allclose(tucker_embedding(ids, weight, [None, None]), weight[ids])


VOLUMES: dict[str, Any] = {
    "plain": {"padding": 1},
    "walking": {"stride": 2, "dilation": (1, 2, 1), "bias": False},
    "circular": {"padding": 1, "padding_mode": "circular"},
    "same": {"kernel_size": (2, 3, 2), "padding": "same"},
    "split": {"padding": 1, "pattern": "(o d) (i h w)"},
}


def one_volume(name: str, **options: Any) -> tuple[Any, torch.Tensor]:
    """Make a layer for volumes, away from its start, and one volume."""
    torch.manual_seed(0)
    parts = {"kernel_size": 3, "pattern": "o i d h w"} | VOLUMES[name]
    arrangement = Arrangement(parts.pop("pattern"))
    base = nn.Conv3d(6, 5, **parts)
    layer = FloraConv(base, 3 if arrangement.n_modes == 2 else (3, 3, 2, 2, 2), arrangement=arrangement, **options)
    for parameter in layer.tucker_update.parameters():
        nn.init.normal_(parameter)
    return layer, torch.randn(1, 6, 7, 6, 5)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="one volume is left to oneDNN")
@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
@pytest.mark.parametrize("memory", ["normal", "low"])
@pytest.mark.parametrize("name", VOLUMES)
def test_thin_convolutions_of_one_volume_are_onednns(name: str, memory: Any):
    layer, x = one_volume(name, path="factored", memory=memory)
    update = layer.tucker_update["default"]
    wanted = [x.requires_grad_(), *update.parameters()]
    with torch.profiler.profile() as profiler:
        output = layer(x)
        direction = torch.randn_like(output)
        first = torch.autograd.grad(output, wanted, direction, retain_graph=True)
    names = [event.name for event in profiler.events()]
    # Forward the input, backward the input and the output's gradient.
    assert names.count("aten::to_mkldnn") >= 3
    twice = torch.autograd.grad(output, wanted, direction, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in twice), wanted)
    layer.double()
    base, wide = layer.base_layer, x.detach().double().requires_grad_()
    wanted = [wide, *update.parameters()]
    whole = functional_call(base, {"weight": base.weight + update.delta()}, (wide,))
    exact = torch.autograd.grad(whole, wanted, direction.double(), create_graph=True)
    curved = torch.autograd.grad(sum(g.square().sum() for g in exact), wanted)
    for ours, theirs in zip((output, *first, *twice, *second), (whole, *exact, *exact, *curved)):
        bound = tolerance("float32", base.weight.numel(), norm=float(theirs.detach().norm()) + 1.0, factor=1e2)
        assert float((ours - theirs).detach().norm()) <= bound


def test_an_update_of_zero_leaves_the_bits_of_one_volume():
    layer, x = one_volume("plain", path="factored")
    nn.init.zeros_(layer.tucker_update["default"].core)
    assert torch.equal(layer(x), layer.base_layer(x))


def test_transformations_of_one_volume_see_ordinary_operations():
    layer, x = one_volume("plain", path="factored")
    with torch.no_grad():
        mapped, alone = vmap(layer)(torch.stack([x, 2 * x])), layer(x)
        bound = tolerance("float32", layer.base_layer.weight.numel(), norm=float(alone.norm()))
        assert float((mapped[0] - alone).norm()) <= bound
        with FakeTensorMode(allow_non_fake_inputs=True) as fake:
            assert layer(fake.from_tensor(x)).shape == alone.shape


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize(("outputs", "joined"), [(6, True), (1024, False)])
def test_the_core_of_a_matrix_is_joined_with_a_factor_where_that_is_small(outputs: int, joined: bool, small: bool):
    x, core = torch.randn(2, 1, 8).double(), torch.randn(17, 17).double()
    parts = [x, core, torch.randn(outputs, 17).double(), torch.randn(8, 17).double()]
    for part in parts:
        part.requires_grad_()
    shapes = ((17, 17), ((outputs, 17), (8, 17)))
    assert joins(2, shapes, ((0,), (1,))) == joined
    with small_products(small):
        output = tucker_linear(x, core, parts[2:])
    reference = x @ dense_delta(core, parts[2:]).mT
    direction = torch.randn_like(output)
    results = [(y, *torch.autograd.grad(y, parts, direction)) for y in (output, reference)]
    for ours, theirs in zip(*results):
        # Gradients sum over all outputs, and both ways round at each of the two ranks.
        bound = tolerance("float64", 17 * outputs, norm=float(theirs.detach().norm()) * 17, factor=1e2)
        assert float((ours - theirs).detach().norm()) <= bound


def test_padding_position_gets_its_value_and_no_gradient():
    core, u, v = (torch.randn(n, 2).double().requires_grad_() for n in (2, 5, 4))
    rows = tucker_embedding(torch.tensor([1, 3]), core, [u, v], padding_idx=-2)
    assert torch.allclose(rows, dense_delta(core, [u, v])[[1, 3]])
    for grad in torch.autograd.grad(rows[1].sum(), [core, u, v], retain_graph=True):
        assert not grad.any()
    assert all(grad.any() for grad in torch.autograd.grad(rows[0].sum(), [core, u, v]))


def test_maps_over_a_batch_of_adapters():
    cores, x = torch.randn(5, 2, 3), torch.randn(5, 7, 4)
    factors = [torch.randn(6, 2), torch.randn(4, 3)]
    batched = vmap(lambda core, x: tucker_linear(x, core, factors))(cores, x)
    assert torch.allclose(batched, torch.stack([tucker_linear(b, a, factors) for a, b in zip(cores, x)]), atol=1e-5)
    kernels, images = torch.randn(5, 2, 2, 1, 1), torch.randn(5, 1, 4, 6, 6)
    parts = [torch.randn(3, 2), torch.randn(4, 2), torch.randn(3, 1), torch.randn(3, 1)]
    mapped = vmap(lambda core, x: tucker_conv(x, core, parts, padding=1))(kernels, images)
    single = torch.stack([tucker_conv(b, a, parts, padding=1) for a, b in zip(kernels, images)])
    assert torch.allclose(mapped, single, atol=1e-4)


def test_tucker_tensors_are_pytrees_of_torch():
    tensors = vmap(lambda core: TuckerTensor(core, [core.new_ones(4, 2), None]))(torch.randn(5, 2, 3))
    assert tuple(tensors.core.shape) == (5, 2, 3)
    dense = vmap(lambda tucker: tucker.to_tensor())(tensors)
    assert dense.shape == (5, 4, 3)
    leaves, spec = torch.utils._pytree.tree_flatten(TuckerTensor(torch.ones(2, 3), [torch.ones(4, 2), None]))
    again = torch.utils._pytree.tree_unflatten(leaves, spec)
    assert len(leaves) == 2
    assert again.shape == (4, 3)
    assert again.factors[1] is None


def test_two_modes_that_mix_are_not_separable():
    assert split_of(Arrangement("(o h) (i w)")) == ((0, 2), (1, 3))
    assert split_of(Arrangement("(i h) (o w)")) is None
    assert split_of(Arrangement("(o i) (h w)")) is None
    assert split_of(Arrangement("(heads d) i -> heads (d i)", {"heads": 2})) is None


def test_refusals_of_the_pure_functions():
    core, factors = torch.ones(1, 1), [torch.ones(6, 1), torch.ones(4, 1)]
    x = torch.ones(1, 2, 5, 5)
    with pytest.raises(ValueError, match=r"arrangement '\(o h\) \(i w\)' needs the weight's shape; pass shape="):
        tucker_conv(x, core, factors, arrangement=Arrangement("(o h) (i w)"))
    with pytest.raises(ValueError, match=r"pass one of shape \(9, 4\)"):
        tucker_conv(x, core, factors, arrangement=Arrangement("(o h) (i w)"), shape=(3, 2, 3, 2))
    with pytest.raises(ValueError, match="has no factored form; pass one with two modes"):
        tucker_conv_transpose(x, core, factors, arrangement=Arrangement("(o i) (h w)"), shape=(3, 2, 2, 2))


def test_output_sizes_are_torchs_own():
    for stride, dilation, padding in [(1, 1, 0), (2, 1, 1), (3, 2, 2), (1, 2, "same"), (1, 1, "valid")]:
        conv = nn.Conv1d(1, 1, 3, stride=stride, dilation=dilation, padding=padding)
        pads = padding if isinstance(padding, str) else (padding,)
        geometry = ConvGeometry((3,), (stride,), (dilation,), pads)
        assert geometry.output_sizes((11,)) == tuple(conv(torch.ones(1, 1, 11)).shape[2:])


def test_the_cost_rule_picks_the_path_that_measures_faster():
    """Few numbers, far from the break-even point: wide layers run factored, depthwise kernels and tiny inputs dense."""
    wide = linear_work(512, ((8, 8), ((1024, 8), (1024, 8))), ((0,), (1,)))
    forming = forming_work((8, 8), [(1024, 8), (1024, 8)])
    assert not prefers_dense(wide, forming, 512 * 1024**2, 1024**2, training=True)
    assert not prefers_dense(wide, forming, 512 * 1024**2, 1024**2, training=False)
    full = linear_work(100_000, ((64, 64), ((64, 64), (64, 64))), ((0,), (1,)))
    assert prefers_dense(full, forming_work((64, 64), [(64, 64)] * 2), 100_000 * 64**2, 64**2, training=True)
    depthwise = FloraConv(nn.Conv2d(64, 64, 7, padding=3, groups=64), ranks=16)
    update, x = depthwise.tucker_update["default"], torch.zeros(8, 64, 14, 14)
    assert depthwise._forms_delta(update, x)
    convolution = FloraConv(nn.Conv2d(64, 64, 3, padding=1), ranks=(8, 8, 2, 2))
    assert not convolution._forms_delta(convolution.tucker_update["default"], torch.zeros(8, 64, 28, 28))


def test_the_work_of_a_convolution_is_counted_right():
    """The count of multiply-adds is that of the three convolutions, position by position."""
    geometry = ConvGeometry((3, 3), (2, 2), (1, 1), (1, 1))
    work, base = conv_work((2, 8, 10, 10), (4, 5, 3, 3), (6, 8, 3, 3), geometry, None, (False,) * 4)
    assert base == 2 * 25 * 6 * 8 * 9
    assert work.multiplications == 2 * (100 * 8 * 5 + 25 * 4 * 5 * 9 + 25 * 6 * 4)
    assert work.written == 2 * (100 * 5 + 25 * 4 + 25 * 6)
    split = split_of(Arrangement("(o h) (i w)"))
    work, _ = conv_work((2, 8, 10, 10), (4, 5), (6, 8, 3, 3), geometry, split, (False,) * 2)
    assert work.multiplications == 2 * (10 * 5 * 8 * 4 * 3 + 25 * 6 * 4 * 3)
    transposed = ConvGeometry((3, 3), (2, 2), (1, 1), (1, 1), groups=2, transposed=True, output_padding=(0, 0))
    work, base = conv_work((1, 8, 5, 5), (4, 3, 3, 3), (8, 3, 3, 3), transposed, None, (False,) * 4)
    assert base == 25 * 8 * 3 * 9
    assert work.multiplications == 25 * 8 * 4 + 25 * 2 * 4 * 3 * 9 + 81 * 6 * 3
    assert (Work(1, 2) * 3).cost == 3 + 32 * 6
