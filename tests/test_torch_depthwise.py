"""The gradients of depthwise convolutions: the library's own sums, taken in another way, where layers ask for them."""

import itertools
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, vmap

import flora_torch.chain
from flora_torch import FloraConv, FloraConvTranspose
from flora_torch.depthwise import has_slow_kernel_gradient, input_gradient, kernel_gradient
from support import bfloat16_tolerance, tolerance

ONEDNN = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="it stands in for oneDNN's gradient")

pytestmark = pytest.mark.usefixtures("seeded", "large_products")


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("transposed", [False, True])
def test_it_is_the_librarys_own_gradient(n: int, transposed: bool, monkeypatch: pytest.MonkeyPatch):
    kernel, padding = (3, 4, 2)[:n], (1, 2, 0)[:n]
    for stride, dilation, multiplier, images in itertools.product((1, 2, 3), (1, 2), (1, 2), (1, 5)):
        x = torch.randn(images, 4, *(9, 8, 7)[:n], dtype=torch.float64)
        shape = (4, multiplier) if transposed else (4 * multiplier, 1)
        w = torch.randn(*shape, *kernel, dtype=torch.float64)
        extra = stride - 1 if transposed else 0
        options = ((stride,) * n, padding, (dilation,) * n, transposed, (extra,) * n, 4)
        g = torch.randn_like(torch.convolution(x, w, None, *options))
        back: Any = torch.ops.aten.convolution_backward.default
        theirs = back(g, x, w, None, *options, (False, True, False))[1]
        steps = {"stride": options[0], "padding": padding, "dilation": options[2], "transposed": transposed}
        for at_once in (1, 10**6):
            monkeypatch.setattr("flora_torch.depthwise._AT_ONCE", at_once)
            ours = kernel_gradient(g, x, kernel, **steps)
            assert ours.shape == theirs.shape
            bound = tolerance("float64", g.numel(), norm=float(theirs.norm()))
            assert float((ours - theirs).norm()) <= bound


@pytest.mark.parametrize("n", [1, 2, 3])
def test_the_inputs_gradient_is_the_librarys_own(n: int):
    kernel = (3, 4, 2)[:n]
    for dilation, padding in itertools.product((1, 2), ((0, 0, 0), (1, 2, 0), (2, 3, 1))):
        padding = padding[:n]
        x, w = (torch.randn(*shape, dtype=torch.float64) for shape in ((2, 4, *(9, 8, 7)[:n]), (4, 1, *kernel)))
        options = ((1,) * n, padding, (dilation,) * n, False, (0,) * n, 4)
        g = torch.randn_like(torch.convolution(x, w, None, *options))
        back: Any = torch.ops.aten.convolution_backward.default
        theirs = back(g, x, w, None, *options, (True, False, False))[0]
        ours = input_gradient(g, w, padding=padding, dilation=options[2])
        assert ours.shape == theirs.shape
        assert float((ours - theirs).norm()) <= tolerance("float64", g.numel(), norm=float(theirs.norm()))


def test_they_are_differentiable():
    g, x, w = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 3, 5),) * 2 + ((3, 1, 3),)
    )
    run: Any = lambda g, x: kernel_gradient(g, x, (3,), stride=(1,), padding=(1,), dilation=(1,))  # noqa: E731
    assert torch.autograd.gradcheck(run, (g, x))
    run = lambda g, w: input_gradient(g, w, padding=(1,), dilation=(1,))  # noqa: E731
    assert torch.autograd.gradcheck(run, (g, w))


def test_sums_over_many_images_in_16_bits_are_taken_in_32():
    # In bfloat16, 512 plus 1 is 512: a sum taken there would stop growing.
    g, x = torch.ones(1024, 1, 1, dtype=torch.bfloat16), torch.ones(1024, 1, 1, dtype=torch.bfloat16)
    steps: Any = {"stride": (1,), "padding": (0,), "dilation": (1,)}
    assert kernel_gradient(g, x, (1,), **steps).item() == 1024


@ONEDNN
def test_it_is_used_for_large_depthwise_kernels_on_a_cpu():
    x = torch.ones(2, 8, 9, 9)
    assert has_slow_kernel_gradient(x, (7, 7), (1, 1), 8)
    assert has_slow_kernel_gradient(x, (3, 3), (2, 2), 8)
    assert not has_slow_kernel_gradient(x, (3, 3), (1, 1), 8)
    assert not has_slow_kernel_gradient(x, (7, 7), (1, 1), 4)
    assert not has_slow_kernel_gradient(x[:, :1], (7, 7), (1, 1), 1)
    assert not has_slow_kernel_gradient(x.double(), (7, 7), (1, 1), 8)
    assert not has_slow_kernel_gradient(x[:0], (7, 7), (1, 1), 8)
    assert not has_slow_kernel_gradient(x.to("meta"), (7, 7), (1, 1), 8)


def depthwise(**options: Any) -> FloraConv:
    """Make a depthwise layer away from its start."""
    sizes = {"kernel_size": 5, "padding": 2, "groups": 6} | options
    layer = FloraConv(nn.Conv2d(6, 6 * sizes.pop("multiplier", 1), **sizes), ranks=(4, 1, 2, 2), path="dense")
    for parameter in layer.tucker_update.parameters():
        nn.init.normal_(parameter)
    return layer


LAYERS: dict[str, Any] = {
    "plain": {},
    "stride": {"stride": 2, "padding": 1},
    "dilated": {"kernel_size": 3, "dilation": 2},
    "padded beyond its reach": {"padding": 5},
    "multiplied": {"multiplier": 2},
    "circular": {"padding_mode": "circular"},
    "reflect": {"padding_mode": "reflect", "stride": 2},
    "same": {"kernel_size": 4, "padding": "same"},
}


def whole(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """The base with W + ΔW, by einsum alone."""
    update = layer.tucker_update["default"]
    delta = torch.einsum("uvxy,ou,hx,wy->ovhw", update.core, *(update.factors[k] for k in (0, 2, 3)))
    return functional_call(layer.base_layer, {"weight": layer.base_layer.weight + update.scale * delta}, (x,))


@ONEDNN
@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
@pytest.mark.parametrize("memory", ["normal", "low"])
@pytest.mark.parametrize("name", LAYERS)
def test_gradients_and_their_gradients_are_the_dense_ones(name: str, memory: Any, monkeypatch: pytest.MonkeyPatch):
    layer = depthwise(**LAYERS[name])
    layer.memory = memory
    # The layer is of a type that oneDNN knows; the oracle is in float64, where its own way runs.
    exact = depthwise(**LAYERS[name]).double()
    exact.load_state_dict(layer.double().state_dict())
    layer.float()
    used: list[int] = []
    monkeypatch.setattr("flora_torch.steps.kernel_gradient", lambda *a, **k: used.append(1) or kernel_gradient(*a, **k))
    x = torch.randn(3, 6, 9, 9)
    results = []
    weights: list[torch.Tensor] = []
    for run, model in ((layer, layer), (lambda x: whole(exact, x), exact)):
        dtype = model.base_layer.weight.dtype
        wanted = [x.to(dtype).requires_grad_(), *model.tucker_update.parameters()]
        output = run(wanted[0])
        weights = weights or [torch.randn_like(output), *(torch.randn_like(w) for w in wanted)]
        first = torch.autograd.grad((output * weights[0].to(dtype)).sum(), wanted, create_graph=True)
        inner = sum((a * b.to(dtype)).sum() for a, b in zip(first, weights[1:]))
        results.append([output, *first, *torch.autograd.grad(inner, wanted)])
    assert used
    for ours, theirs in zip(*results):
        bound = tolerance("float32", x.numel(), norm=float(theirs.detach().norm()) + 1.0, factor=1e3)
        assert float((ours - theirs).detach().norm()) <= bound


@ONEDNN
def test_the_librarys_own_gradient_is_not_asked_for():
    layer, x = depthwise(), torch.randn(2, 6, 9, 9, requires_grad=True)
    with torch.profiler.profile() as profiler:
        layer(x).sum().backward()
    # One convolution forward, one for the kernel, and one for the input.
    names = [event.name for event in profiler.events()]
    assert (names.count("aten::convolution"), names.count("aten::convolution_backward")) == (3, 0)


@ONEDNN
def test_a_trained_bias_and_a_frozen_input_get_what_is_theirs():
    layer, x = depthwise(), torch.randn(2, 6, 9, 9)
    layer.base_layer.bias.requires_grad_()
    layer(x).square().sum().backward()
    reference = torch.autograd.grad(whole(layer, x).square().sum(), [layer.bias, *layer.tucker_update.parameters()])
    for ours, theirs in zip([layer.bias, *layer.tucker_update.parameters()], reference):
        bound = tolerance("float32", x.numel(), norm=float(theirs.norm()), factor=1e3)
        assert float((ours.grad - theirs).norm()) <= bound


@ONEDNN
def test_transformations_see_ordinary_operations(monkeypatch: pytest.MonkeyPatch):
    layer, x = depthwise(), torch.randn(2, 6, 9, 9)
    monkeypatch.setattr(flora_torch.chain._Convolution, "forward", None)
    tangent = torch.randn_like(x)
    size = x.numel()
    with forward_ad.dual_level():
        ours = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, tangent))).tangent
    theirs = whole(layer, x + tangent) - whole(layer, x)
    bound = tolerance("float32", size, norm=float(theirs.detach().norm()), factor=1e3)
    assert float((ours - theirs).detach().norm()) <= bound
    parameters = {n: p.detach() for n, p in layer.tucker_update.named_parameters(prefix="tucker_update")}
    loss = lambda p, x: functional_call(layer, p, (x[None],)).square().sum()  # noqa: E731
    each = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    alone = torch.autograd.grad(whole(layer, x[:1]).square().sum(), list(layer.tucker_update.parameters()))
    for gradients, one in zip(each.values(), alone):
        bound = tolerance("float32", size, norm=float(one.norm()), factor=1e3)
        assert float((gradients[0] - one).norm()) <= bound


@ONEDNN
def test_autocast_computes_it_in_its_type_and_returns_float32():
    layer, x = depthwise(), torch.randn(2, 6, 9, 9)
    parameters = list(layer.tucker_update.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(x)
    assert output.dtype == torch.bfloat16
    ours = torch.autograd.grad(output.float().square().sum(), parameters)
    theirs = torch.autograd.grad(whole(layer, x).square().sum(), parameters)
    for a, b in zip(ours, theirs):
        assert a.dtype == torch.float32
        # Rounded four times: input, weight, output and its gradient.
        assert float((a - b).norm()) <= bfloat16_tolerance(b)


@ONEDNN
def test_transposed_layers_use_it_too():
    base = nn.ConvTranspose2d(6, 12, 5, stride=2, padding=1, output_padding=1, groups=6)
    layer = FloraConvTranspose(base, ranks=(4, 2, 2, 2), path="dense")
    for parameter in layer.tucker_update.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(3, 6, 7, 7)
    update: Any = layer.tucker_update["default"]
    names = [name for name, _ in update.named_parameters()]
    ours = torch.autograd.grad(layer(x).square().sum(), list(update.parameters()))
    pairs = [f for f in update.factors if f is not None]
    letters = {"factor_0": "ou", "factor_1": "iv", "factor_2": "hx", "factor_3": "wy"}
    core = "".join(letters[f"factor_{k}"][f is not None] for k, f in enumerate(update.factors))
    delta = torch.einsum(",".join([core, *(letters[n] for n in names[1:])]) + "->oihw", update.core, *pairs)
    output = functional_call(base, {"weight": base.weight + delta}, (x,))
    for a, b in zip(ours, torch.autograd.grad(output.square().sum(), list(update.parameters()))):
        assert float((a - b).norm()) <= tolerance("float32", output.numel(), norm=float(b.norm()), factor=1e3)
