"""Whatever is done to adapters, in whatever order: a layer is its base with the weight that dense computations give.

Hypothesis attaches, weighs, merges in place and back, retracts, swaps, renames, saves, loads, copies and detaches the
adapters of a layer of any kind, with magnitudes and starts. After each step outputs, gradients, rows and merged layers
are compared with an oracle: einsum and einops on float64 tensors, and torch's own layer.
"""

import copy
import io
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from einops import rearrange
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrizations
from transformers.pytorch_utils import Conv1D

from flora_tensor import Arrangement
from flora_torch import (
    TuckerUpdate,
    activate,
    adapters_for_rows,
    attach,
    detach,
    disabled,
    hotswap_adapter,
    load_adapter,
    merge,
    merge_,
    rename_adapter,
    retract_,
    save_adapter,
    unmerge_,
)
from support import tolerance

NAMES = ("a", "b", "c")
N_ROWS = 3


class Kind(NamedTuple):
    """How a layer is made and called, and where its output channels are: as einops axes, and back."""

    make: Any
    inputs: Any
    parameter: str = "weight"
    arrangements: tuple[str | None, ...] = (None,)
    channels: tuple[str, str] | None = None
    takes_rows: bool = True
    computed: Any = None


def floats(*shape: int) -> Any:
    return lambda: (torch.randn(N_ROWS, *shape).double(),)


def integers() -> tuple[torch.Tensor]:
    return (torch.randint(7, (N_ROWS, 4)),)


ROWS, KERNELS = ("o i", "o i"), ("o i h w", "o (i h w)")
KINDS = {
    "linear": Kind(lambda: nn.Linear(6, 5), floats(2, 6), channels=ROWS, arrangements=(None, "o (h d) -> o h d")),
    "transposed linear": Kind(lambda: Conv1D(5, 6), floats(6), channels=("i o", "o i")),
    "convolution": Kind(
        lambda: nn.Conv2d(4, 6, 3, padding=2, groups=2, dilation=2, padding_mode="circular"),
        floats(4, 5, 4),
        channels=KERNELS,
        arrangements=(None, "o (i h w)", "(o h) (i w)"),
    ),
    "depthwise": Kind(lambda: nn.Conv2d(4, 4, 3, groups=4), floats(4, 4, 5), channels=KERNELS),
    "transposed convolution": Kind(
        lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2),
        floats(4, 3, 2),
        channels=("(g i) o h w", "(g o) (i h w)"),
        arrangements=(None, "(o h) (i w)"),
    ),
    "embedding": Kind(lambda: nn.Embedding(7, 6, padding_idx=2), integers, channels=ROWS),
    "bag": Kind(lambda: nn.EmbeddingBag(7, 6), integers, takes_rows=False),
    "bilinear": Kind(lambda: nn.Bilinear(4, 3, 5), lambda: floats(4)() + floats(3)(), takes_rows=False),
    "recurrent": Kind(lambda: nn.GRU(4, 5, batch_first=True), floats(2, 4), "weight_hh_l0", takes_rows=False),
    "weight norm": Kind(lambda: nn.Linear(6, 5), floats(6), channels=ROWS, computed=parametrizations.weight_norm),
}
SIZES = {"g": 2, "h": 3}  # groups, and what the pattern of the linear layer splits its columns into


@dataclass
class Known:
    """An adapter: its parameters, its weight, and what it added when it was merged in place."""

    update: TuckerUpdate
    weight: float = 1.0
    merged: torch.Tensor | None = None


def dense(update: TuckerUpdate) -> torch.Tensor:
    """Form s · (T − T_start)."""
    total: Any = 0.0
    for sign, tucker in ((1.0, update.tucker), (-1.0, update.start)):
        if tucker is not None:
            term, letters = tucker.core, "abcd"[: tucker.core.dim()]
            for letter, factor in zip(letters, tucker.factors):
                if factor is not None:
                    term = torch.einsum(f"{letters},z{letter}->{letters.replace(letter, 'z')}", term, factor)
            total = total + sign * term
    left, _, right = f"o i h w -> {update.arrangement.pattern}".rpartition(" -> ")
    if update.arrangement.is_native:
        return update.scale * total
    left, sizes = left.rpartition(" -> ")[2], dict(update.arrangement.sizes)
    sizes |= dict(zip(left.split(), update.shape)) if "(" not in left else {}
    return update.scale * rearrange(total, f"{right} -> {left}", **sizes)


class Adapters(RuleBasedStateMachine):
    """One layer, and what is done to its adapters."""

    known: dict[str, Known]

    @initialize(
        kind=st.sampled_from(sorted(KINDS)),
        path=st.sampled_from(["auto", "dense"]),
        memory=st.sampled_from(["normal", "low"]),
    )
    def begin(self, kind: str, path: str, memory: str) -> None:
        torch.manual_seed(0)
        self.kind, self.options = KINDS[kind], {"path": path, "memory": memory}
        self.plain = self.kind.make().double().eval()
        self.model = self.fresh()
        self.weight = self.plain.get_parameter(self.kind.parameter).detach().clone()
        self.inputs = self.kind.inputs()
        self.known, self.active = {}, []

    def fresh(self) -> nn.Module:
        base = copy.deepcopy(self.plain)
        return nn.Sequential(base if self.kind.computed is None else self.kind.computed(base))

    # --- the oracle

    def change(self, name: str) -> torch.Tensor:
        """Return what an adapter adds to the weight."""
        known = self.known[name]
        if known.merged is not None:
            return known.merged
        delta, magnitude = dense(known.update), known.update.magnitude
        if magnitude is not None:
            assert self.kind.channels is not None
            axes, by_row = self.kind.channels
            groups = {"g": 2} if "g" in axes else {}
            whole = rearrange(self.weight + delta, f"{axes} -> {by_row}", **groups)
            # Constant in the backward pass, as section 4.3 of DoRA has it; a channel of zeros, as of padding, stays.
            norms = whole.detach().norm(dim=1)
            whole = whole * torch.where(norms == 0.0, 1.0, magnitude / norms)[:, None]
            sizes = {"h": 3, "w": 3} if "h" in axes else {}
            first = self.weight.shape[axes.replace("(g i)", "i").split().index("i")]
            sizes |= {"i": first // 2 if groups else first}
            delta = rearrange(whole, f"{by_row} -> {axes}", **sizes, **groups) - self.weight
        return known.weight * delta

    def expected(self, names: Any, inputs: Any = None) -> torch.Tensor:
        weight = sum((self.change(name) for name in names), self.weight)
        inputs = self.inputs if inputs is None else inputs
        return first(functional_call(self.plain, {self.kind.parameter: weight}, inputs))

    def close(self, a: torch.Tensor, b: torch.Tensor, factor: float = 1e5) -> None:
        """Compare what is summed in another order: relative to the largest terms, not to what is left of them."""
        terms = [float(x.detach().norm()) for x in (b, self.weight, *map(self.change, self.known))]
        assert float((a - b).detach().norm()) <= tolerance(
            "float64", *self.weight.shape, norm=sum(terms), factor=factor
        )

    # --- what is done

    def is_merged(self) -> bool:
        return any(known.merged is not None for known in self.known.values())

    def move(self, update: TuckerUpdate) -> None:
        with torch.no_grad():
            for parameter in update.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))

    def updates(self, model: nn.Module, name: str) -> TuckerUpdate:
        return model[0].updates(name)[self.kind.parameter]

    def target(self) -> str:
        return f"0.{self.kind.parameter}"

    @precondition(lambda self: len(self.known) < len(NAMES))
    @rule(
        rank=st.integers(1, 4),
        scale=st.sampled_from([1.0, -0.5, 3.0]),
        init=st.sampled_from(["orthonormal", "official", "principal"]),
        magnitude=st.booleans(),
        pattern=st.integers(0, 2),
        chance=st.sampled_from(["rank_dropout", "module_dropout"]),
    )
    def put_on(self, rank: int, scale: float, init: str, magnitude: bool, pattern: int, chance: str) -> None:
        name = next(name for name in NAMES if name not in self.known)
        chosen = self.kind.arrangements[pattern % len(self.kind.arrangements)]
        arrangement = Arrangement(chosen, {"h": 3} if "d" in chosen else {}) if chosen else None
        options: dict[str, Any] = {"ranks": rank, "scale": scale, "init": init, "arrangement": arrangement, chance: 0.5}
        options["magnitude"] = magnitude and self.kind.channels is not None and not self.is_merged()
        before = self.expected(self.active)
        attach(self.model, adapter_name=name, target_parameters=self.target(), **options, **self.options)
        self.known[name] = Known(self.updates(self.model, name))
        self.active.append(name)
        self.close(self.output(self.model), before)
        self.move(self.known[name].update)

    @precondition(lambda self: self.known and not self.is_merged())
    @rule(
        names=st.permutations(NAMES), n=st.integers(0, 3), weights=st.tuples(*[st.sampled_from([1.0, 0.5, -2.0])] * 3)
    )
    def choose(self, names: list[str], n: int, weights: tuple[float, ...]) -> None:
        chosen = {name: weight for name, weight in list(zip(names, weights))[:n] if name in self.known}
        activate(self.model, chosen)
        self.active = list(chosen)
        for name, known in self.known.items():
            known.weight = chosen.get(name, 1.0)

    @precondition(lambda self: self.active and not self.is_merged() and self.kind.computed is None)
    @rule(n=st.integers(1, 3))
    def merge_in_place(self, n: int) -> None:
        chosen, rest = self.active[:n], self.active[n:]
        if any(self.known[name].update.magnitude is not None for name in rest):
            with pytest.raises(ValueError, match="has a magnitude, which rescales the original weight"):
                merge_(self.model, chosen)
            return
        changes = {name: self.change(name).detach().clone() for name in chosen}
        merge_(self.model, chosen)
        for name, change in changes.items():
            self.known[name].merged = change

    @precondition(lambda self: self.is_merged())
    @rule()
    def unmerge_in_place(self) -> None:
        unmerge_(self.model)
        assert torch.equal(self.model[0].base_layer.get_parameter(self.kind.parameter), self.weight)
        for known in self.known.values():
            known.merged = None

    @precondition(lambda self: self.known and not self.is_merged())
    @rule(data=st.data())
    def retract(self, data: Any) -> None:
        name = data.draw(st.sampled_from(sorted(self.known)))
        before = self.change(name).detach()
        retract_(self.model, name)
        self.close(self.change(name), before)
        for factor in self.known[name].update.factors:
            if factor is not None:
                self.close(factor.mT @ factor, torch.eye(factor.shape[1]).double())

    @precondition(lambda self: self.known and not self.is_merged())
    @rule(data=st.data())
    def take_off(self, data: Any) -> None:
        name = data.draw(st.sampled_from(sorted(self.known)))
        detach(self.model, name)
        del self.known[name]
        self.active = [other for other in self.active if other != name]

    @precondition(lambda self: 0 < len(self.known) < len(NAMES))
    @rule(data=st.data())
    def rename(self, data: Any) -> None:
        old = data.draw(st.sampled_from(sorted(self.known)))
        new = next(name for name in NAMES if name not in self.known)
        rename_adapter(self.model, old, new)
        self.known = {new if name == old else name: known for name, known in self.known.items()}
        self.active = [new if name == old else name for name in self.active]

    @precondition(lambda self: self.known)
    @rule(pickled=st.booleans())
    def copy(self, pickled: bool) -> None:
        if pickled and self.kind.computed is None:  # torch pickles no parametrized module
            torch.save(self.model, file := io.BytesIO())
            file.seek(0)
            self.model = torch.load(file, weights_only=False)
        else:
            self.model = copy.deepcopy(self.model)
        for name, known in self.known.items():
            known.update = self.updates(self.model, name)

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def save_and_load(self, data: Any) -> None:
        name = data.draw(st.sampled_from(sorted(self.known)))
        with tempfile.TemporaryDirectory() as directory:
            path = save_adapter(self.model, Path(directory) / "adapter", adapter_name=name)
            load_adapter(other := self.fresh(), path, adapter_name=name, verify_base="error")
            stored, own = self.updates(other, name), self.known[name].update
            if not self.is_merged():
                self.move(own)
                load_adapter(self.model, path, adapter_name=name, verify_base="error")
        assert dict(stored.named_parameters()).keys() == dict(own.named_parameters()).keys()
        assert all(torch.equal(a, b) for a, b in zip(stored.parameters(), own.parameters()))

    @precondition(lambda self: self.known and not self.is_merged())
    @rule(data=st.data())
    def swap(self, data: Any) -> None:
        """Put an adapter of lower ranks in the place of one."""
        known = self.known[data.draw(st.sampled_from(sorted(self.known)))]
        arrangement = None if known.update.arrangement.is_native else known.update.arrangement
        options: dict[str, Any] = {"target_parameters": self.target(), "arrangement": arrangement}
        attach(other := self.fresh(), ranks=1, scale=0.5, **options)
        self.move(new := self.updates(other, "default"))
        name = next(name for name, each in self.known.items() if each is known)
        with tempfile.TemporaryDirectory() as directory:
            hotswap_adapter(self.model, save_adapter(other, Path(directory) / "adapter"), adapter_name=name)
        self.close(self.change(name), known.weight * dense(new))

    # --- what holds

    def output(self, model: nn.Module) -> torch.Tensor:
        return first(model[0](*self.inputs))

    @invariant()
    def output_and_gradients_are_the_dense_ones(self) -> None:
        output, expected = self.output(self.model), self.expected(self.active)
        self.close(output, expected)
        live = [self.known[name] for name in self.active if self.known[name].merged is None]
        parameters = [parameter for known in live for parameter in known.update.parameters()]
        if parameters:
            direction = torch.randn_like(expected)
            ours, theirs = (torch.autograd.grad(y, parameters, direction) for y in (output, expected))
            for a, b in zip(ours, theirs):
                self.close(a, b, 1e6)

    @invariant()
    @torch.no_grad()
    def merged_disabled_and_by_rows(self) -> None:
        if not self.known:
            return
        expected = self.expected(self.active)
        self.close(self.output(self.model), expected)
        self.close(self.output(merge(copy.deepcopy(self.model))), expected)
        if self.is_merged():
            return
        with disabled(self.model):
            self.close(self.output(self.model), self.expected([]))
        if self.kind.takes_rows:
            rows = [[next(iter(self.known))], [], list(self.known)]
            alone = [self.expected(row, tuple(x[k : k + 1] for x in self.inputs)) for k, row in enumerate(rows)]
            with adapters_for_rows(self.model, [tuple(row) for row in rows]):
                self.close(self.output(self.model), torch.cat(alone))


def first(value: Any) -> torch.Tensor:
    return value[0] if isinstance(value, tuple) else value


TestAdapters = Adapters.TestCase
# Each example is of a dozen steps.
TestAdapters.settings = settings(max_examples=settings.default.max_examples // 3, stateful_step_count=12)
