"""What layers keep for the backward pass, and that every look at their gradients gives those of the dense weight."""

import copy
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import flora_torch
from flora_tensor import Arrangement
from flora_torch import FloraConv, FloraConvTranspose, FloraEmbedding, FloraLayer, FloraLinear, FloraParameter
from flora_torch.functional import dense_delta, tucker_conv, tucker_embedding, tucker_linear
from flora_torch.geometry import pad, unpad
from flora_torch.rebuild import rebuilding
from support import bfloat16_tolerance, tolerance

pytestmark = pytest.mark.usefixtures("one_thread", "seeded", "large_products")

HEADS = Arrangement("(heads d) i -> heads d i", {"heads": 4})


def conv(n: int, arrangement: str | None = None, **options: Any) -> Callable[..., FloraLayer]:
    """Make a convolution with n spatial axes."""
    kind: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[n - 1]
    sizes = {"in_channels": 8, "out_channels": 12, "kernel_size": 3, "padding": 1} | options
    return lambda **more: FloraConv(kind(**sizes), ranks=2, arrangement=arrangement, **more)


def transposed(n: int, arrangement: str | None = None, **options: Any) -> Callable[..., FloraLayer]:
    """Make a transposed convolution with n spatial axes."""
    kind: Any = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[n - 1]
    sizes = {"in_channels": 8, "out_channels": 12, "kernel_size": 3, "stride": 2} | options
    return lambda **more: FloraConvTranspose(kind(**sizes), ranks=2, arrangement=arrangement, **more)


def image(n: int) -> Callable[[], torch.Tensor]:
    return lambda: torch.randn(2, 8, *[5] * n)


CASES: dict[str, tuple[Callable[..., FloraLayer], Callable[[], torch.Tensor]]] = {
    "linear": (lambda **o: FloraLinear(nn.Linear(24, 16), ranks=3, **o), lambda: torch.randn(2, 5, 24)),
    "heads": (
        lambda **o: FloraLinear(nn.Linear(24, 16), ranks=(2, 3, 4), arrangement=HEADS, **o),
        lambda: torch.randn(2, 5, 24),
    ),
    "embedding": (
        lambda **o: FloraEmbedding(nn.Embedding(30, 8, padding_idx=1), ranks=3, **o),
        lambda: torch.tensor([[1, 2, 29], [4, 4, 0]]),
    ),
    "depthwise": (conv(2, groups=8, out_channels=8), image(2)),
    "grouped": (conv(2, groups=2, padding_mode="circular"), image(2)),
    "grouped, reflect": (conv(2, "o (i h w)", groups=4, padding_mode="reflect", stride=2), image(2)),
    "replicate": (conv(2, "(o h) (i w)", padding_mode="replicate", dilation=2), image(2)),
    "same": (conv(1, padding="same", kernel_size=4), image(1)),
    "transposed, grouped": (transposed(2, groups=2, output_padding=1), image(2)),
}
for n, patterns in {
    1: ["o i w", "o (i w)", "(o w) i"],
    2: ["o i h w", "o (i h w)", "(o h) (i w)"],
    3: ["o i d h w", "o (i d h w)", "(o d) (i h w)"],
}.items():
    for pattern in patterns:
        CASES[f"conv {pattern}"] = (conv(n, pattern), image(n))
        CASES[f"transposed {pattern}"] = (transposed(n, pattern), image(n))

# torch tells that an even kernel with padding="same" copies its input.
EVEN = pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")


def made(name: str, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[Any, torch.Tensor]:
    """Return a layer moved away from its start, and an input that needs a gradient."""
    wrap, example = CASES[name]
    layer = wrap(scale=0.7, **options).to(dtype)
    for parameter in layer.tucker_update.parameters():
        nn.init.normal_(parameter)
    x = example()
    return layer, (x.to(dtype).requires_grad_() if x.is_floating_point() else x)


def dense(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """The base with W + s·ΔW, by einsum alone."""
    update = layer.tucker_update["default"]
    letters, ranks = "abcdef"[: update.core.dim()], "uvwxyz"[: update.core.dim()]
    pairs = [(u, a + r) for u, a, r in zip(update.factors, letters, ranks) if u is not None]
    core = "".join(a if u is None else r for u, a, r in zip(update.factors, letters, ranks))
    tensor = torch.einsum(
        ",".join([core, *(p for _, p in pairs)]) + f"->{letters}", update.core, *(u for u, _ in pairs)
    )
    delta = update.arrangement.restore(tensor, update.shape)
    return functional_call(layer.base_layer, {"weight": layer.base_layer.weight + update.scale * delta}, (x,))


def saved(run: Callable[[], Any], own: list[torch.Tensor]) -> list[tuple[int, ...]]:
    """Return the shapes of what a forward pass keeps, apart from tensors that are there anyway."""
    known = {t.untyped_storage().data_ptr() for t in own}
    shapes: list[tuple[int, ...]] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in known:
            shapes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        keep = run()
    del keep
    return shapes


@EVEN
@pytest.mark.parametrize("path", ["factored", "dense"])
@pytest.mark.parametrize("name", CASES)
def test_low_memory_keeps_nothing_beside_input_and_parameters(name: str, path: str):
    layer, x = made(name, path=path, memory="low")
    own = [x, *layer.parameters(), *layer.buffers()]
    base = saved(lambda: layer.base_layer(x), own)
    # A base that pads by an operation of its own keeps its padded input; beside an update even that is made again.
    assert not Counter(saved(lambda: layer(x), own)) - Counter(base)


@EVEN
@pytest.mark.parametrize("path", ["factored", "dense"])
@pytest.mark.parametrize("name", CASES)
def test_no_path_keeps_anything_of_the_weights_size(name: str, path: str):
    layer, x = made(name, path=path)
    own = [x, *layer.parameters(), *layer.buffers()]
    weight = sorted(layer.base_layer.weight.shape)
    assert weight not in [sorted(shape) for shape in saved(lambda: layer(x), own)]


@EVEN
@pytest.mark.parametrize("memory", ["normal", "low"])
@pytest.mark.parametrize("path", ["factored", "dense"])
@pytest.mark.parametrize("name", CASES)
def test_gradients_and_their_gradients_are_the_dense_ones(name: str, path: str, memory: Any):
    layer, x = made(name, path=path, memory=memory)
    wanted = [*([x] if x.is_floating_point() else []), *layer.tucker_update.parameters()]
    results = []
    weights: list[torch.Tensor] = []
    for run in (layer, lambda x: dense(layer, x)):
        output = run(x)
        weights = weights or [torch.randn_like(output), *(torch.randn_like(w) for w in wanted)]
        first = torch.autograd.grad((output * weights[0]).sum(), wanted, create_graph=True)
        inner = sum((a * b).sum() for a, b in zip(first, weights[1:]))
        results.append([output, *first, *torch.autograd.grad(inner, wanted, allow_unused=True)])
    size = layer.base_layer.weight.numel()
    for ours, theirs in zip(*results):
        if theirs is None:
            assert ours is None or not ours.any()
            continue
        bound = tolerance("float64", size, norm=float(theirs.detach().norm()) + 1.0, factor=1e4)
        assert float((ours - theirs).detach().norm()) <= bound


@EVEN
@pytest.mark.parametrize(
    "name", ["linear", "heads", "conv o i h w", "transposed (o h) (i w)", "grouped", "conv o (i w)"]
)
@pytest.mark.parametrize("memory", ["normal", "low"])
def test_gradcheck(name: str, memory: Any):
    layer, x = made(name, path="factored", memory=memory)
    x = x.detach()[:1].clone().requires_grad_()
    names = [n for n, _ in layer.tucker_update.named_parameters()]
    values = [p.detach().clone().requires_grad_() for p in layer.tucker_update.parameters()]

    def run(x: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        return functional_call(layer, {f"tucker_update.{n}": v for n, v in zip(names, values)}, (x,)).sum((0, -1))

    assert torch.autograd.gradcheck(run, (x, *values), fast_mode=True)


@pytest.mark.parametrize("memory", ["normal", "low"])
@pytest.mark.parametrize("name", ["linear", "heads", "conv o i h w", "conv (o h) (i w)", "grouped", "transposed o i w"])
def test_forward_mode_and_functional_transformations(name: str, memory: Any):
    layer, x = made(name, path="factored", memory=memory)
    tangent = torch.randn_like(x)
    with forward_ad.dual_level():
        ours = forward_ad.unpack_dual(layer(forward_ad.make_dual(x.detach(), tangent))).tangent
    # The product is linear in its input.
    theirs = dense(layer, x + tangent) - dense(layer, x)
    bound = tolerance("float64", layer.base_layer.weight.numel(), norm=float(theirs.detach().norm()), factor=1e4)
    assert float((ours - theirs).detach().norm()) <= bound
    assert float((jvp(layer, (x.detach(),), (tangent,))[1] - theirs).detach().norm()) <= bound
    parameters = dict(layer.tucker_update.named_parameters(prefix="tucker_update"))

    def loss(parameters: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return functional_call(layer, parameters, (x[None],)).square().sum()

    each = vmap(grad(loss), in_dims=(None, 0))({n: p.detach() for n, p in parameters.items()}, x.detach())
    for row in range(len(x)):
        alone = torch.autograd.grad(dense(layer, x[row : row + 1]).square().sum(), list(parameters.values()))
        for gradients, one in zip(each.values(), alone):
            bound = tolerance("float64", layer.base_layer.weight.numel(), norm=float(one.norm()) + 1.0, factor=1e5)
            assert float((gradients[row] - one).norm()) <= bound


@pytest.mark.parametrize("name", ["linear", "conv o i h w", "embedding"])
def test_checkpointing_and_compiling_with_low_memory(name: str):
    layer, x = made(name, memory="low")
    parameters = list(layer.tucker_update.parameters())
    plain = torch.autograd.grad(layer(x).square().sum(), parameters)
    again = torch.autograd.grad(checkpoint(layer, x, use_reentrant=False).square().sum(), parameters)
    assert all(torch.equal(a, b) for a, b in zip(plain, again))
    torch._dynamo.reset()
    compiled = torch.autograd.grad(
        torch.compile(layer, backend="aot_eager", fullgraph=True)(x).square().sum(), parameters
    )
    size = layer.base_layer.weight.numel()
    for a, b in zip(plain, compiled):
        assert float((a - b).norm()) <= tolerance("float64", size, norm=float(a.norm()), factor=1e4)


@pytest.mark.parametrize("path", ["factored", "dense"])
@pytest.mark.parametrize("name", ["linear", "conv o i h w", "depthwise"])
def test_autocast_with_low_memory_keeps_the_input_alone(name: str, path: str):
    layer, x = made(name, torch.float32, path=path, memory="low")
    parameters = list(layer.tucker_update.parameters())

    def run(module: nn.Module) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return module(x)

    own = [x, *layer.parameters()]
    # The base's own operation keeps what autocast made of its input and, on its own, of its frozen weight.
    allowed = [x.numel()] if path == "dense" else [x.numel(), layer.base_layer.weight.numel()]
    assert all(math.prod(shape) in allowed for shape in saved(lambda: run(layer), own))
    reference = dense(layer, x)
    bound = bfloat16_tolerance(reference)
    output = run(layer)
    assert float((output.float() - reference).detach().norm()) <= bound
    assert {g.dtype for g in torch.autograd.grad(output.float().sum(), parameters)} == {torch.float32}


class Made(TorchDispatchMode):
    """Record the shapes of all that operations make, apart from views of tensors that are there anyway."""

    def __init__(self, own: list[torch.Tensor]) -> None:
        super().__init__()
        self.own, self.shapes = {t.untyped_storage().data_ptr() for t in own}, []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.own:
                self.shapes.append(tuple(sorted(tensor.shape)))
        return result


@EVEN
@pytest.mark.parametrize("memory", ["normal", "low"])
@pytest.mark.parametrize("name", CASES)
def test_a_factored_step_makes_nothing_of_the_weights_size(name: str, memory: Any):
    """Neither ΔW nor a gradient of the frozen weight, forward or backward: no operation returns such a tensor."""
    layer, x = made(name, path="factored", memory=memory)
    # With five inputs, no output happens to have the shape of a weight.
    x = torch.cat([x, x, x[:1]]).detach().requires_grad_(x.requires_grad)
    weight = layer.base_layer.weight
    with Made([x, *layer.parameters(), *layer.buffers()]) as record:
        layer(x).square().sum().backward()
    assert len(record.shapes) > 10
    assert tuple(sorted(weight.shape)) not in record.shapes
    assert weight.grad is None
    assert all(p.grad is not None for p in layer.tucker_update.parameters())


@pytest.mark.parametrize("hook", ["forward", "backward"])
def test_an_output_that_a_hook_may_hold_is_not_written_to(hook: str):
    layer, x = made("linear", path="factored")
    seen: list[torch.Tensor] = []
    if hook == "forward":
        layer.base_layer.register_forward_hook(lambda module, args, output: seen.append(output))
    else:
        layer.base_layer.register_full_backward_hook(lambda module, inputs, outputs: seen.append(outputs[0]))
    output = layer(x)
    assert torch.allclose(output, dense(layer, x), rtol=0, atol=1e-12)
    output.sum().backward()
    if hook == "forward":
        assert torch.equal(seen[0], nn.functional.linear(x, layer.base_layer.weight, layer.base_layer.bias))
    # What comes after a layer may work in place.
    layer.base_layer._forward_hooks.clear()
    layer.base_layer._backward_hooks.clear()
    layer(x).relu_().sum().backward()


@pytest.mark.parametrize("name", ["linear", "conv o i h w", "transposed o i h w"])
def test_a_base_that_is_trained_after_all_gets_its_gradients(name: str):
    layer, x = made(name, path="factored")
    wanted = [x, layer.base_layer.weight.requires_grad_(), layer.base_layer.bias, *layer.tucker_update.parameters()]
    for bias in (False, True):
        layer.base_layer.bias.requires_grad_(bias)
        chosen = [t for t in wanted if t.requires_grad]
        ours = torch.autograd.grad(layer(x).square().sum(), chosen)
        for a, b in zip(ours, torch.autograd.grad(dense(layer, x).square().sum(), chosen)):
            assert float((a - b).norm()) <= tolerance("float64", x.numel(), norm=float(b.norm()), factor=1e4)


@pytest.mark.parametrize("path", ["factored", "dense"])
@pytest.mark.parametrize("name", ["linear", "conv o i h w"])
def test_whatever_is_hung_on_the_base_takes_part(name: str, path: str):
    layer, x = made(name, path=path)
    plain, base = layer(x), layer.base_layer
    seen: list[str] = []
    handles = [
        base.register_forward_pre_hook(lambda module, args: seen.append("before")),
        base.register_forward_hook(lambda module, args, output: seen.append("after")),
        base.register_full_backward_hook(lambda module, inputs, outputs: seen.append("backward")),
        nn.modules.module.register_module_forward_hook(lambda module, args, output: seen.append("everywhere")),
    ]
    assert torch.allclose(layer(x), plain, rtol=0, atol=1e-12)
    layer(x).sum().backward()
    for handle in handles:
        handle.remove()
    assert {"before", "after", "backward", "everywhere"} == set(seen)
    if path == "factored":
        base.forward = lambda x: 2 * type(base).forward(base, x)
        assert torch.allclose(layer(x), plain + type(base).forward(base, x), rtol=0, atol=1e-12)


def test_what_is_changed_on_the_base_counts_from_the_next_call_on():
    layer, x = made("conv o i h w", path="factored")
    layer(x)
    for name, value in (("stride", (2, 2)), ("padding", (0, 2)), ("padding_mode", "circular")):
        setattr(layer.base_layer, name, value)
        layer.base_layer._reversed_padding_repeated_twice = [p for p in layer.base_layer.padding[::-1] for _ in (0, 1)]
        assert torch.allclose(layer(x), dense(layer, x), rtol=0, atol=1e-10)
    layer.base_layer.weight = nn.Parameter(torch.randn_like(layer.base_layer.weight), requires_grad=False)
    other = made("conv o i h w")[0].tucker_update["default"]
    layer.tucker_update["default"].load_state_dict(other.state_dict())
    assert torch.allclose(layer(x), dense(layer, x), rtol=0, atol=1e-10)


def test_frozen_parts_and_inputs_get_no_gradient():
    layer, x = made("conv o i h w", path="factored", memory="low")
    update = layer.tucker_update["default"]
    update.core.requires_grad_(False)
    layer(x.detach()).sum().backward()
    assert update.core.grad is None
    assert all(u.grad is not None for u in update.factors)
    reference = torch.autograd.grad(dense(layer, x).sum(), update.factors)
    assert all(torch.allclose(u.grad, g) for u, g in zip(update.factors, reference))


def test_memory_is_an_option_of_models_and_layers():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    flora_torch.attach(model, ranks=2, memory="low")
    assert [layer.memory for layer in model if isinstance(layer, FloraLayer)] == ["low", "low"]
    assert "memory='low'" in repr(model)
    with pytest.raises(ValueError, match="FloraLinear: memory is 'tiny'; pass one of 'normal', 'low'"):
        FloraLinear(nn.Linear(2, 2), ranks=1, memory="tiny")
    assert copy.deepcopy(model)[0].memory == "low"


def test_memory_is_an_option_of_loading(tmp_path):
    def net() -> nn.Sequential:
        return nn.Sequential(nn.Linear(4, 4))

    made, plain, attached, loaded = net(), net(), net(), net()
    flora_torch.attach(made, ranks=2)
    directory = flora_torch.save_adapter(made, tmp_path / "adapter")
    flora_torch.load_adapter(plain, directory, verify_base="ignore")
    flora_torch.attach_adapter(attached, directory, memory="low", verify_base="ignore")
    flora_torch.load_adapter(loaded, directory, memory="low", verify_base="ignore")
    assert [model[0].memory for model in (plain, attached, loaded)] == ["normal", "low", "low"]
    # It is the layer's: another adapter does not change it.
    flora_torch.attach(loaded, ranks=1, adapter_name="second")
    assert loaded[0].memory == "low"
    with pytest.raises(ValueError, match="FloraLinear: memory is 'tiny'"):
        flora_torch.load_adapter(net(), directory, memory="tiny", verify_base="ignore")


def test_pure_functions_take_the_option():
    core, u, v = (torch.randn(*n, dtype=torch.float64, requires_grad=True) for n in ((2, 3), (5, 2), (4, 3)))
    x, ids = torch.randn(7, 4, dtype=torch.float64, requires_grad=True), torch.tensor([0, 4, 2])
    kernel = [torch.randn(3, 1, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    small = torch.randn(2, 3, 1, 1, dtype=torch.float64, requires_grad=True)
    picture = torch.randn(1, 4, 5, 5, dtype=torch.float64, requires_grad=True)
    runs: list[Callable[[], torch.Tensor]] = [
        lambda: tucker_linear(x, core, [u, v], memory="low"),
        lambda: tucker_embedding(ids, core, [u, v], memory="low"),
        lambda: tucker_conv(picture, small, [u, v, *kernel], padding=1, memory="low"),
    ]
    own = [x, ids, picture, core, u, v, small, *kernel]
    assert all(saved(run, own) == [] for run in runs)
    assert saved(lambda: dense_delta(core, [u, v]), own) == []


def test_a_parameters_module_keeps_no_effective_weight():
    layer = FloraParameter(nn.Bilinear(6, 5, 4), "weight", 2)
    x, y = torch.randn(3, 6, requires_grad=True), torch.randn(3, 5)
    shapes = saved(lambda: layer(x, y), [x, y, *layer.parameters()])
    assert (4, 6, 5) not in shapes


def test_rebuilding_notices_a_change_in_place():
    u = torch.ones(3, 1, requires_grad=True)
    x = torch.ones(2, 3, requires_grad=True)
    with rebuilding(lambda: u @ u.mT, [u]) as square:
        y = x @ square
    with torch.no_grad():
        u.mul_(2)
    with pytest.raises(RuntimeError, match=r"changed in place after it was used .* call backward before the optimizer"):
        y.sum().backward()


@pytest.mark.skipif(
    not hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks"), reason="this torch does not tell its hooks"
)
def test_rebuilding_leaves_other_tensors_to_the_hooks_around_it():
    u = torch.ones(3, 1, requires_grad=True)
    x = torch.ones(2, 3, requires_grad=True)
    packed: list[tuple[int, ...]] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        packed.append(tuple(tensor.shape))
        return 2 * tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept / 2):  # noqa: SIM117
        with rebuilding(lambda: torch.ones(3, 3) * u, [u]) as weight:
            y = x @ weight
    assert (2, 3) in packed
    y.sum().backward()
    assert torch.equal(u.grad, torch.full((3, 1), 6.0))


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_unpad_is_the_transpose_of_pad(mode: str):
    pads = ((1, 2), (2, 1))
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64, requires_grad=True)
    padded = pad(x, pads, mode)
    g = torch.randn_like(padded)
    (theirs,) = torch.autograd.grad(padded, x, g)
    assert torch.allclose(unpad(g, pads, mode), theirs, rtol=0, atol=1e-13)
