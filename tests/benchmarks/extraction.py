"""Time the extraction of adapters from two checkpoints against PEFT's SVD conversion and LyCORIS's extraction.

All start from the same two files, in the page cache, and end with factors of the same rank; ours are on the disk,
flushed and read back, with their measured errors, while those of the peers stay in memory. Every figure is taken in
this process, in turn; rates are in numbers of the dense change, per core where one thread is used. Peers cost the cube
of a layer's width, so they are timed on the two smaller sets only. Run from the repository:

    python tests/benchmarks/extraction.py            # some minutes
    python tests/benchmarks/extraction.py --small    # seconds: shows that the program works
"""

import argparse
import importlib
import itertools
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import nn

import flora_tensor as ft

MIX = {
    **{f"attention.{k}.weight": (1024, 1024) for k in range(6)},
    "mlp.up.weight": (4096, 1024),
    **{f"conv.{k}.weight": (320, 320, 3, 3) for k in range(6)},
    "down.weight": (640, 320, 3, 3),
}
WIDE = {
    "attention.weight": (2048, 2048),
    "mlp.up.weight": (4096, 2048),
    "conv.0.weight": (512, 512, 3, 3),
    "conv.1.weight": (1024, 512, 3, 3),
}
LARGE = {
    **{f"attention.{k}.weight": (4096, 4096) for k in range(2)},
    "mlp.up.weight": (11008, 4096),
    **{f"conv.{k}.weight": (1024, 1024, 3, 3) for k in range(2)},
}
SMALL_MIX = {"attention.weight": (192, 192), "conv.weight": (48, 32, 3, 3)}


def write_pair(here: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> tuple[Path, Path]:
    """Write weights, and the same weights after a change whose spectrum falls, with some noise."""
    generator = torch.Generator().manual_seed(0)
    base: dict[str, torch.Tensor] = {}
    tuned: dict[str, torch.Tensor] = {}
    for name, shape in shapes.items():
        columns = int(np.prod(shape[1:]))
        rank = min(64, shape[0], columns)
        left = torch.randn(shape[0], rank, generator=generator) * torch.logspace(0, -2, rank)
        change = 1e-3 * left @ torch.randn(rank, columns, generator=generator)
        change += 1e-4 * torch.randn(shape[0], columns, generator=generator)
        weight = 0.02 * torch.randn(shape, generator=generator)
        base[name], tuned[name] = weight.to(dtype), (weight + change.reshape(shape)).to(dtype)
    here.mkdir(parents=True)
    for side, tensors in (("base", base), ("tuned", tuned)):
        safetensors.torch.save_file(tensors, here / f"{side}.safetensors")
    return here / "base.safetensors", here / "tuned.safetensors"


class _Delta:
    """A weight's change, as PEFT's conversion wants to be given it."""

    def __init__(self, delta: torch.Tensor) -> None:
        self.delta = delta

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        return self.delta

    def get_base_layer(self) -> nn.Module:
        return nn.Linear(1, 1)


def by_peer(paths: tuple[Path, Path], convert: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Convert every change with a peer; return the relative error of all together."""
    base, tuned = (safetensors.torch.load_file(path) for path in paths)
    left = total = 0.0
    for name, weight in tuned.items():
        change = weight.float() - base[name].float()
        up, down = convert(change)
        rest = change.flatten(1) - up.flatten(1) @ down.flatten(1)
        left, total = left + float(rest.square().sum()), total + float(change.square().sum())
    return (left / total) ** 0.5


def by_peft(change: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Convert by `peft.convert_to_lora`'s own step; it takes matrices, so kernels are unfolded for it."""
    from peft.tuners.lora.conversion import _convert_module_to_lora

    down, up, _ = _convert_module_to_lora(_Delta(change.flatten(1)), rank, "default")
    return up, down


def by_lycoris(change: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Convert as LyCORIS's extraction does, which forms the residual too."""
    from lycoris.utils import extract_conv, extract_linear

    parts, _ = (extract_conv if change.ndim == 4 else extract_linear)(change, "fixed", rank)
    return parts[1], parts[0]


def contenders(paths: tuple[Path, Path], out: Path, rank: int) -> dict[str, Callable[[], Any]]:
    """Everything that is timed on one pair of files."""

    def ours(**options: Any) -> Callable[[], ft.ExtractionReport]:
        return lambda: ft.extract(*paths, out, overwrite=True, **options)

    return {
        f"flora-tensor, ranks={rank}": ours(ranks=rank),
        f"flora-tensor, ranks={rank}, o (i h w)": ours(ranks=rank, arrangements="o (i h w)"),
        "flora-tensor, max_ratio=0.05": ours(max_ratio=0.05),
        "PEFT, SVD conversion": lambda: by_peer(paths, lambda change: by_peft(change, rank)),
        "LyCORIS, extraction": lambda: by_peer(paths, lambda change: by_lycoris(change, rank)),
    }


def measure(functions: Mapping[str, Callable[[], Any]], runs: int, slow: Callable[[str], bool]) -> None:
    """Run all in turn, slow ones once, and print seconds, rates and ratios to the first."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    results: dict[str, Any] = {}
    for run in range(runs + 1):  # the first round warms up
        for name, function in functions.items():
            if slow(name) and run != 1:
                continue
            start = time.perf_counter()
            results[name] = function()
            if run > 0:
                times[name].append(time.perf_counter() - start)
    first = next(iter(functions))
    numbers = results[first].dense_parameters
    for name, taken in times.items():
        seconds, result = statistics.median(taken), results[name]
        error, stored = (result, "") if isinstance(result, float) else (result.relative_error, result.n_parameters)
        ratio = seconds / statistics.median(times[first])
        rate = numbers / seconds / 1e6
        print(f"  {name:38s} {seconds:9.3f} s {rate:8.1f} M/s {ratio:8.2f} ×   error {error:.4f}  {stored}", flush=True)
    ours = {name: statistics.median(taken) for name, taken in times.items() if name.startswith("flora")}
    for peer in times.keys() - ours.keys():
        told = (f"{times[peer][0] / seconds:.1f} × at {n.partition(', ')[2]}" for n, seconds in ours.items())
        print(f"  {peer} takes {'; '.join(told)}", flush=True)


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="tiny tensors: shows that the program works")
    parser.add_argument("--rank", type=int, default=16, help="the rank of every mode but those of the kernel")
    parser.add_argument("--runs", type=int, default=3, help="counted runs of ours; the peers run once")
    arguments = parser.parse_args()
    for peer in ("peft", "lycoris.utils"):  # imports are nobody's extraction
        importlib.import_module(peer)
    torch.set_num_threads(1)  # set OMP_NUM_THREADS=1 for NumPy's part
    here = Path(tempfile.mkdtemp())
    try:
        mixes = {"convolutions and linear layers": SMALL_MIX if arguments.small else MIX}
        mixes |= {} if arguments.small else {"wider ones": WIDE}
        for (title, mix), dtype in itertools.product(mixes.items(), (torch.bfloat16, torch.float32)):
            name = f"{dtype}".removeprefix("torch.")
            paths = write_pair(here / f"{title} {name}", mix, dtype)
            print(f"\n{title}, {name}")
            measure(
                contenders(paths, here / "out", arguments.rank), arguments.runs, lambda n: not n.startswith("flora")
            )
        if not arguments.small:
            paths = write_pair(here / "large", LARGE, torch.bfloat16)
            print("\nlarge layers, bfloat16: what full decompositions would take minutes for")
            found = contenders(paths, here / "out", arguments.rank)
            ours = {name: run for name, run in found.items() if name.startswith("flora")}
            measure(ours, arguments.runs, lambda n: "ratio" in n)
        print(f"\npeak memory of it all: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024} MiB")
    finally:
        shutil.rmtree(here)


if __name__ == "__main__":
    main()
