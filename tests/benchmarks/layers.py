"""Time training steps of adapted layers against the frozen layer alone and other ways to adapt it, with their memory.

All contenders of a row run in turn in this process; what is printed is the median over all rounds of a contender's time
as a multiple of the frozen layer's in the same round. "Saved" is what the forward pass keeps for the backward pass
beside input and parameters, "peak" the most that a step allocates above what it found. Run from the repository:

    python tests/benchmarks/layers.py --threads 1              # every layer, some minutes
    python tests/benchmarks/layers.py --threads 1 --rule       # what the cost rule chose, and what was faster
    python tests/benchmarks/layers.py --threads 1 --models     # whole models against PEFT
    python tests/benchmarks/layers.py --small                  # seconds: shows that the program works
"""

import argparse
import contextlib
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import flora_torch
from flora_torch import FloraConv, FloraConvTranspose, FloraLinear

CONVS: dict[int, Any] = {1: nn.functional.conv1d, 2: nn.functional.conv2d, 3: nn.functional.conv3d}


@dataclass(frozen=True)
class Row:
    """A layer and its input."""

    title: str
    base: Callable[[], nn.Module]
    shape: tuple[int, ...]
    ranks: Callable[[int], tuple[int, ...]]
    kind: str = "conv"


def rows(small: bool) -> list[Row]:
    """List what is timed."""
    if small:
        return [
            Row("linear 64, 32 tokens", lambda: nn.Linear(64, 64), (32, 64), lambda r: (r, r), "linear"),
            Row("conv 16, 8²", lambda: nn.Conv2d(16, 16, 3, padding=1), (2, 16, 8, 8), lambda r: (r, r, 2, 2)),
        ]
    listed = [
        Row(f"linear {n}, {t} tokens", lambda n=n: nn.Linear(n, n), (t, n), lambda r: (r, r), "linear")
        for n, t in [(1024, 512), (1024, 4096), (4096, 512), (4096, 4096)]
    ]
    listed += [
        Row(f"conv {c}, {b}×{s}²", lambda c=c: nn.Conv2d(c, c, 3, padding=1), (b, c, s, s), lambda r: (r, r, 2, 2))
        for c, s, b in [(256, 14, 8), (256, 56, 2), (512, 14, 8), (512, 56, 1)]
    ]
    depthwise = lambda: nn.Conv2d(192, 192, 7, padding=3, groups=192)  # noqa: E731
    up = lambda: nn.ConvTranspose2d(256, 128, 4, stride=2, padding=1)  # noqa: E731
    return [
        *listed,
        Row("depthwise 192, 8×28², 7×7", depthwise, (8, 192, 28, 28), lambda r: (r, 1, 2, 2)),
        Row(
            "conv3d 64, 2×16³", lambda: nn.Conv3d(64, 64, 3, padding=1), (2, 64, 16, 16, 16), lambda r: (r, r, 2, 2, 2)
        ),
        Row("transposed 256→128, 4×28²", up, (4, 256, 28, 28), lambda r: (r, r, 2, 2), "transposed"),
    ]


def wrapper(row: Row) -> Any:
    """Return our layer for a row."""
    return {"linear": FloraLinear, "conv": FloraConv, "transposed": FloraConvTranspose}[row.kind]


def ours(row: Row, base: nn.Module, rank: int, **options: Any) -> nn.Module:
    """Wrap a copy-free base in our layer, with the update away from its zero start."""
    layer = wrapper(row)(base, ranks=row.ranks(rank), **options)
    nn.init.normal_(layer.tucker_update["default"].core, std=0.1)
    return layer


class Forming(nn.Module):
    """ΔW formed by ordinary operations, then one operation with W + ΔW, or (the official code's way) a second one."""

    def __init__(self, layer: Any, *, second: bool) -> None:
        super().__init__()
        self.layer, self.second = layer, second

    def forward(self, x: Tensor) -> Tensor:
        update, base = self.layer.tucker_update["default"], self.layer.base_layer
        delta = update.core
        for mode, factor in enumerate(update.factors):
            if factor is not None:
                delta = torch.tensordot(delta, factor.to(delta.dtype), ([mode], [1])).movedim(-1, mode)
        if self.second:
            return base(x) + self.apply(base, x, delta, None)
        return self.apply(base, x, base.weight + delta, base.bias)

    @staticmethod
    def apply(base: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Run the base's operation with another weight."""
        if isinstance(base, nn.Linear):
            return nn.functional.linear(x, weight, bias)
        if isinstance(base, nn.ConvTranspose2d):
            return nn.functional.conv_transpose2d(x, weight, bias, base.stride, base.padding)
        return CONVS[weight.dim() - 2](x, weight, bias, base.stride, base.padding, base.dilation, base.groups)


def peft_lora(base: nn.Module, rank: int) -> nn.Module | None:
    """Wrap the base in PEFT's LoRA, where PEFT has one for it."""
    from peft import LoraConfig, get_peft_model

    if getattr(base, "groups", 1) > 1 or isinstance(base, nn.ConvTranspose2d):
        return None
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=["0"], init_lora_weights=False)
    return get_peft_model(nn.Sequential(base), config).base_model.model[0]  # type: ignore[no-any-return]


def lycoris(base: nn.Module, rank: int) -> nn.Module | None:
    """Wrap the base in LyCORIS' LoCon, in Tucker form and computed beside the base, where there is one for it."""
    from lycoris.modules.locon import LoConModule

    if getattr(base, "groups", 1) > 1 or isinstance(base, nn.ConvTranspose2d):
        return None
    module: Any = LoConModule("bench", base, lora_dim=rank, alpha=rank, use_tucker=True, bypass_mode=True)
    module.apply_to()
    for name, p in module.named_parameters():
        p.requires_grad_("lora" in name)
        nn.init.normal_(p, std=0.1)
    return module


def contenders(row: Row, rank: int) -> dict[str, nn.Module]:
    """Make every way to run a row; each has a base of its own, with the same weight."""
    torch.manual_seed(0)
    state = row.base().state_dict()

    def base() -> nn.Module:
        made = row.base()
        made.load_state_dict(state)
        return made.requires_grad_(False)

    made: dict[str, nn.Module | None] = {
        "frozen": base(),
        "flora": ours(row, base(), rank),
        "flora low": ours(row, base(), rank, memory="low"),
        "PEFT LoRA": peft_lora(base(), rank),
        "LyCORIS": lycoris(base(), rank),
        "forms ΔW": Forming(ours(row, base(), rank), second=False),
        "official": Forming(ours(row, base(), rank), second=True),
    }
    return {name: module for name, module in made.items() if module is not None}


def step_of(
    module: nn.Module, x: Tensor, autocast: bool, training: bool = True
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Return a forward pass, and in training a forward and backward pass with fixed gradients."""
    wanted = [x, *(p for p in module.parameters() if p.requires_grad)]
    kind = x.device.type

    def forward() -> Tensor:
        with torch.autocast(kind, torch.bfloat16) if autocast else contextlib.nullcontext():
            return module(x)

    if not training:
        return forward, forward
    direction = torch.randn_like(forward())
    return forward, lambda: torch.autograd.grad(forward(), wanted, direction)


def saved_bytes(module: nn.Module, x: Tensor, forward: Callable[[], Any]) -> int:
    """Count what a forward pass keeps beside its input and the parameters."""
    # LyCORIS hides the base from its module.
    known = [t for m in (module, *getattr(module, "org_module", ())) for t in (*m.parameters(), *m.buffers())]
    own = {t.untyped_storage().data_ptr() for t in (x, *known)}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = forward()
    del result
    return sum(kept.values())


def peak_bytes(step: Callable[[], Any], device: str) -> int:
    """Return the most memory that a step holds above what was allocated before, as the allocator sees it."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def times_of(steps: dict[str, Callable[[], Any]], runs: int, device: str) -> dict[str, list[float]]:
    """Run all steps in turn, and return the times of each, round by round."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for run in range(runs + 2):  # two rounds warm up
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if device == "cuda":
                torch.cuda.synchronize()
            if run > 1:
                times[name].append(time.perf_counter() - start)
    return times


def ratio(times: dict[str, list[float]], name: str, reference: str) -> float:
    """Return the median over the rounds of one step's time as a multiple of another's."""
    return statistics.median(a / b for a, b in zip(times[name], times[reference]))


def report_row(row: Row, rank: int, arguments: argparse.Namespace) -> None:
    """Print one row: times as multiples of the frozen layer, and memory."""
    x = torch.randn(*row.shape, device=arguments.device).requires_grad_()
    modules = {name: module.to(arguments.device) for name, module in contenders(row, rank).items()}
    if arguments.compile:
        modules = {name: torch.compile(module) for name, module in modules.items()}  # type: ignore[misc]
    passes = {name: step_of(module, x, arguments.autocast) for name, module in modules.items()}
    forward = times_of({name: p[0] for name, p in passes.items()}, arguments.runs, arguments.device)
    both = times_of({name: p[1] for name, p in passes.items()}, arguments.runs, arguments.device)
    least = 1e3 * statistics.median(forward["frozen"]), 1e3 * statistics.median(both["frozen"])
    print(f"\n{row.title}, rank {rank}: frozen {least[0]:.2f} ms forward, {least[1]:.2f} ms with backward")
    print(f"  {'':12s} {'forward':>8s} {'+backward':>9s} {'saved KiB':>10s} {'peak MiB':>9s}")
    for name, module in modules.items():
        saved, peak = saved_bytes(module, x, passes[name][0]), peak_bytes(passes[name][1], arguments.device)
        ratios = ratio(forward, name, "frozen"), ratio(both, name, "frozen")
        print(f"  {name:12s} {ratios[0]:8.2f} {ratios[1]:9.2f} {saved / 2**10:10.1f} {peak / 2**20:9.2f}", flush=True)


def report_rule(row: Row, rank: int, training: bool, arguments: argparse.Namespace) -> float:
    """Print which path the cost rule takes and which one was faster; return what the choice costs beside the better."""
    x = torch.randn(*row.shape, device=arguments.device).requires_grad_(training)
    base = row.base().to(arguments.device).requires_grad_(False)
    steps: dict[str, Callable[[], Any]] = {}
    with torch.set_grad_enabled(training):
        for path in ("factored", "dense"):
            passes = step_of(ours(row, base, rank, path=path).to(arguments.device), x, arguments.autocast, training)
            steps[path] = passes[1]
        layer: Any = ours(row, base, rank)
        chosen = "dense" if layer._forms_delta(layer.tucker_update["default"], x) else "factored"
        times = times_of(steps, arguments.runs, arguments.device)
    # The least time of each: another program on the machine can only add to it.
    least = {path: min(found) for path, found in times.items()}
    regret = least[chosen] / min(least.values())
    mode = "training" if training else "inference"
    verdict = f"rule {chosen:9s} dense/factored {least['dense'] / least['factored']:5.2f} regret {regret:4.2f}"
    print(f"  {row.title:28s} rank {rank:3d} {mode:9s}: {verdict} {'← wrong' if regret > 1.1 else ''}", flush=True)
    return regret


def rule_rows(small: bool) -> list[Row]:
    """List layers on both sides of the break-even point, of the sizes that models have."""
    made: list[Row] = []
    linears = [(n, t) for n in (256, 768, 1024) for t in (1, 8, 64, 512, 2048)] + [(4096, 8), (4096, 128)]
    for n, t in linears if not small else [(32, 1)]:
        made.append(Row(f"linear {n}, {t} tokens", lambda n=n: nn.Linear(n, n), (t, n), lambda r: (r, r), "linear"))
    square = [(64, 2, 1), (64, 7, 1), (64, 14, 4), (64, 56, 1), (256, 2, 1), (256, 7, 2), (256, 14, 4), (512, 7, 2)]
    for c, s, b in square if not small else [(16, 2, 1)]:
        conv = lambda c=c: nn.Conv2d(c, c, 3, padding=1)  # noqa: E731
        made.append(Row(f"conv {c}, {b}×{s}²", conv, (b, c, s, s), lambda r: (r, r, 2, 2)))
    for c, g, s in [(128, 4, 14), (128, 32, 14), (256, 32, 28), (96, 96, 14)] if not small else []:
        grouped = lambda c=c, g=g: nn.Conv2d(c, c, 3, padding=1, groups=g)  # noqa: E731
        made.append(Row(f"conv {c}, {g} groups, 4×{s}²", grouped, (4, c, s, s), lambda r: (r, r, 2, 2)))
    for c, s in [(32, 8), (64, 8), (64, 16)] if not small else []:
        cube = lambda c=c: nn.Conv3d(c, c, 3, padding=1)  # noqa: E731
        made.append(Row(f"conv3d {c}, 1×{s}³", cube, (1, c, s, s, s), lambda r: (r, r, 2, 2, 2)))
    return made


def report_rules(ranks: list[int], arguments: argparse.Namespace) -> None:
    """Print how often the cost rule picks the faster path, and what its worst choice costs."""
    for training in (True, False):
        print(f"\nthe cost rule, in {'training' if training else 'inference'}")
        rows = [row for row in rule_rows(arguments.small) if arguments.only in row.title]
        regrets = [report_rule(row, rank, training, arguments) for row in rows for rank in ranks]
        good = sum(regret <= 1.1 for regret in regrets)
        print(
            f"  right or within 10 %: {good} of {len(regrets)}; the worst choice costs {max(regrets):.2f} × the better"
        )


def models(small: bool) -> dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]]:
    """Return whole models made from configurations: how to make one, its input, and which modules are adapted."""
    from transformers import ConvNextConfig, ConvNextForImageClassification, ViTConfig, ViTForImageClassification

    vit = ViTConfig(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, intermediate_size=1536)
    convnext = ConvNextConfig()  # its defaults are those of ConvNeXt-tiny
    size = 224
    if small:
        sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
        vit = ViTConfig(**sizes, image_size=32, patch_size=8)
        convnext = ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], image_size=32)
        size = 32
    shape = (2, 3, size, size)
    return {
        "ConvNeXt-tiny": (
            lambda: ConvNextForImageClassification(convnext),
            shape,
            "pwconv1 pwconv2 sampling_layer.1",
        ),
        "ViT-small": (lambda: ViTForImageClassification(vit), shape, "linear"),
    }


def adapted_names(model: nn.Module, chosen: str) -> list[str]:
    """List the modules that both libraries adapt."""
    ends = tuple(chosen.split())
    if chosen == "linear":
        return [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and "classifier" not in n]
    return [n for n, m in model.named_modules() if n.endswith(ends) and isinstance(m, nn.Linear | nn.Conv2d)]


def report_model(title: str, rank: int, arguments: argparse.Namespace) -> None:
    """Print the training step of a whole model against PEFT's, the same modules adapted."""
    from peft import LoraConfig, get_peft_model

    make, shape, chosen = models(arguments.small)[title]
    names = adapted_names(make(), chosen)
    made: dict[str, nn.Module] = {"frozen": make().requires_grad_(False)}
    for name, memory in (("flora", "normal"), ("flora low", "low")):
        made[name] = make()
        flora_torch.attach(made[name], ranks=rank, target_modules=names, memory=memory)
    made["PEFT LoRA"] = get_peft_model(make(), LoraConfig(r=rank, lora_alpha=rank, target_modules=names))
    x, labels = (
        torch.randn(*shape, device=arguments.device),
        torch.zeros(shape[0], dtype=torch.long, device=arguments.device),
    )
    steps: dict[str, Callable[[], Any]] = {}
    for name, model in made.items():
        steps[name] = training_step(model.to(arguments.device).train(), x, labels, arguments.autocast)
    times = times_of(steps, max(3, arguments.runs // 2), arguments.device)
    least = 1e3 * statistics.median(times["PEFT LoRA"])
    print(f"\n{title}, {len(names)} modules, rank {rank}: PEFT {least:.0f} ms a step")
    for name, model in made.items():
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        peak = peak_bytes(steps[name], arguments.device) / 2**20
        print(f"  {name:12s} {ratio(times, name, 'PEFT LoRA'):6.3f} × PEFT  peak {peak:8.1f} MiB  {trained:9,} trained")


def training_step(model: nn.Module, x: Tensor, labels: Tensor, autocast: bool) -> Callable[[], Any]:
    """Return a step of SGD; for a frozen model, gradients of the input alone."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1e-4) if trained else None
    image = x.clone().requires_grad_(not trained)

    def step() -> None:
        with torch.autocast(x.device.type, torch.bfloat16) if autocast else contextlib.nullcontext():
            loss = nn.functional.cross_entropy(model(image).logits.float(), labels)
        loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return step


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="tiny layers and models: shows that the program works")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of PyTorch")
    parser.add_argument("--runs", type=int, default=None, help="counted runs of each contender")
    parser.add_argument("--rank", type=int, action="append", help="ranks; by default 8, 16 and 32")
    parser.add_argument("--only", default="", help="only rows whose title contains this")
    parser.add_argument("--rule", action="store_true", help="check the cost rule instead")
    parser.add_argument("--models", action="store_true", help="time whole models instead")
    parser.add_argument("--autocast", action="store_true", help="run under autocast to bfloat16")
    parser.add_argument("--compile", action="store_true", help="run all contenders under torch.compile")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("ignore", module="peft|transformers|lycoris")
    arguments.runs = arguments.runs or (2 if arguments.small else 11)
    ranks = arguments.rank or ([4] if arguments.small else [8, 16, 32])
    chosen = [row for row in rows(arguments.small) if arguments.only in row.title]
    if not (arguments.rule or arguments.models) or arguments.small:
        for rank in ranks:
            for row in chosen:
                report_row(row, rank, arguments)
    if arguments.rule or arguments.small:
        report_rules(arguments.rank or ([4] if arguments.small else [4, 16, 64]), arguments)
    if arguments.models or arguments.small:
        for title in models(arguments.small):
            report_model(title, ranks[0], arguments)


if __name__ == "__main__":
    main()
