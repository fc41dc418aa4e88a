"""Time a mixture's experts with an adapter against the frozen ones, the formed change, and PEFT's LoRA of parameters.

One mixture-of-experts block of Mixtral, forward and backward to its input, in its eager form. Every figure is taken in
this process, all contenders in turn, and printed as a ratio of medians to the frozen block; with it what the
backward pass keeps beside the parameters. Run from the repository:

    python tests/benchmarks/experts.py            # about a minute
    python tests/benchmarks/experts.py --small    # seconds: shows that the program works
"""

import argparse
import copy
import statistics
import time
from typing import Any

import peft
import torch
import transformers
from torch import nn

from flora_torch import FloraExperts, attach


def block(hidden: int, inner: int, experts: int) -> nn.Module:
    """Make a model whose one layer holds the frozen block."""
    config = transformers.MixtralConfig(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4,
        vocab_size=32, num_local_experts=experts, num_experts_per_tok=2,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config).requires_grad_(False)
    model.set_experts_implementation("eager")
    return model


def contenders(model: Any, rank: int) -> dict[str, Any]:
    """Return the same block plain, with our adapter, with ours formed as a whole, and with PEFT's."""
    ours = copy.deepcopy(model)
    attach(ours, ranks=rank, target_modules="experts")
    formed = copy.deepcopy(ours)
    for layer in formed.modules():
        if isinstance(layer, FloraExperts):
            layer._is_lazy = lambda name: False
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    peer = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=rank, target_parameters=names))
    return {
        "frozen": model.model.layers[0].mlp,
        "flora-tensor": ours.model.layers[0].mlp,
        "flora-tensor, formed": formed.model.layers[0].mlp,
        "PEFT LoRA": peer.base_model.model.model.layers[0].mlp,
    }


def run(module: Any, x: torch.Tensor) -> torch.Tensor:
    """Call a block."""
    output = module(x)
    return output[0] if isinstance(output, tuple) else output


def kept(module: Any, x: torch.Tensor) -> float:
    """Return how many MiB the backward pass keeps that are neither parameters nor the input."""
    own = {p.untyped_storage().data_ptr() for p in module.parameters()} | {x.untyped_storage().data_ptr()}
    found: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = run(module, x)
    del output
    return sum(found.values()) / 2**20


def compare(modules: dict[str, Any], tokens: int, hidden: int, runs: int) -> None:
    """Print one table."""
    x = torch.randn(1, tokens, hidden, requires_grad=True)
    times: dict[str, list[float]] = {name: [] for name in modules}
    for _ in range(runs + 1):
        for name, module in modules.items():
            start = time.perf_counter()
            run(module, x).sum().backward()
            times[name].append(time.perf_counter() - start)
    # The first run of each warms up.
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}
    print(f"{tokens} tokens, frozen: {1000 * medians['frozen']:.1f} ms")
    for name, module in modules.items():
        print(f"  {name:22} {medians[name] / medians['frozen']:6.2f} x   keeps {kept(module, x):7.1f} MiB")


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a tiny block: shows that the program works")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of PyTorch")
    parser.add_argument("--rank", type=int, default=8, help="the rank of every mode, and of the peer")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    hidden, inner, experts = (32, 48, 4) if arguments.small else (512, 1024, 8)
    modules = contenders(block(hidden, inner, experts), arguments.rank)
    for tokens in (4, 16) if arguments.small else (16, 256, 2048):
        compare(modules, tokens, hidden, 1 if arguments.small else 5)


if __name__ == "__main__":
    main()
