"""Adapters on models that several processes share: DDP, FSDP2 and tensor parallelism on two processes of gloo.

Starting processes takes longer than what they do, so both run every scenario in one go, and the tests read what came of
each. A scenario is a function of the process's number, the mesh and a directory that both see.
"""

import json
import os
import time
import traceback
from collections import OrderedDict
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
import torch.nn.functional as nnf
from torch import nn

from flora_tensor import Adapter, Arrangement, TuckerStack, TuckerTensor, load_moments
from flora_tensor import load_adapter as read_adapter
from flora_torch import (
    FloraLayer,
    adapter_parameters,
    attach,
    attach_adapter,
    collect_gradients,
    collect_moments,
    detach,
    disabled,
    load_adapter,
    merge,
    merge_,
    parameter_groups,
    retract_,
    save_adapter,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available(), reason="torch was built without distributed"),
]

# fully_shard runs on CPUs since their streams have events.
CAN_SHARD = hasattr(torch.cpu.Stream, "record_event")
IDS = torch.arange(24).reshape(4, 6) % 12
FILES = ("adapter_config.json", "adapter_model.safetensors")


class Net(nn.Module):
    """An embedding, a grouped convolution, a norm that stays without an adapter, and linear layers."""

    def __init__(self, tied: bool = False):
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1, groups=2)
        self.norm = nn.LayerNorm(8)
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)
        self.head = nn.Linear(8, 12, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.norm(self.conv(self.embed(ids).mT.contiguous()).mT)
        return self.head(self.down(self.up(x).tanh()).tanh())


def plain(tied=False):
    torch.manual_seed(0)
    return Net(tied).double()


def adapted(tied=False, **options: Any):
    """Return the same model with the same adapter in every process, moved away from its start."""
    model = plain(tied)
    attach(model, **{"ranks": 3, "scale": 0.5, "generator": torch.Generator().manual_seed(1), **options})
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in adapter_parameters(model):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).double())
    return model


def loss(model, ids):
    return nnf.cross_entropy(model(ids).flatten(0, 1), ids.flatten())


def named_gradients(model):
    """Return whole gradients by the parameters' names."""
    whole = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in whole.items()}


def alone(**options: Any):
    """Return the gradients of one process on the whole batch."""
    model = adapted(**options)
    loss(model, IDS).backward()
    return named_gradients(model)


def check_close(found, expected):
    assert set(found) == set(expected)
    for name, value in found.items():
        # Two halves of a batch are averaged in another order than the whole.
        torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def sharded(mesh, model, *, layers=True):
    from torch.distributed.fsdp import fully_shard

    if layers:
        for module in list(model.modules()):
            if isinstance(module, FloraLayer):
                fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def half(rank):
    return IDS[2 * rank : 2 * rank + 2]


def same_files(a: Path, b: Path) -> bool:
    return all((a / name).read_bytes() == (b / name).read_bytes() for name in FILES)


def saved(model, rank, path: Path) -> Path:
    """Save in every process, and go on when the first has written."""
    save_adapter(model, path)
    dist.barrier()
    assert sorted(p.name for p in path.iterdir()) == sorted(FILES)
    return path


# --- the scenarios -----------------------------------------------------------------------------------


def ddp(rank, mesh, directory):
    model = adapted()
    parallel = nn.parallel.DistributedDataParallel(model)
    loss(parallel, half(rank)).backward()
    check_close(named_gradients(model), alone())
    names = {group["name"] for group in parameter_groups(parallel, 1e-3)}
    assert names == {"default.core", "default.factors"}
    retract_(parallel)
    if rank == 0:
        one = adapted()
        retract_(one)
        assert same_files(save_adapter(parallel.module, directory / "two"), save_adapter(one, directory / "one"))


def shared():
    """Two layers with factors in common."""
    generator = torch.Generator().manual_seed(4)
    factors = [torch.randn(8, r, generator=generator).double() for r in (3, 2)]
    joint = TuckerTensor(torch.randn(2, 3, 2, generator=generator).double(), (None, *factors))
    names = ("first.weight", "second.weight")
    torch.manual_seed(0)
    model = nn.Sequential(OrderedDict(first=nn.Linear(8, 8), act=nn.Tanh(), second=nn.Linear(8, 8))).double()
    stack = TuckerStack(names, joint, Arrangement("o i"), (8, 8))
    attach_adapter(model, Adapter({}, stacks={"*.weight": stack}))
    return model


def ddp_of_a_stack(rank, mesh, directory):
    x = torch.arange(32.0, dtype=torch.float64).reshape(4, 8) / 10
    model, one = shared(), shared()
    parallel = nn.parallel.DistributedDataParallel(model)
    parallel(x[2 * rank : 2 * rank + 2]).square().mean().backward()
    one(x).square().mean().backward()
    assert len(adapter_parameters(model)) == 4
    check_close(named_gradients(model), named_gradients(one))


def fsdp_of_a_stack(rank, mesh, directory):
    """Layers that share factors must be in one group; torch itself refuses others."""
    from torch.distributed.fsdp import fully_shard

    def grouped():
        model = shared()
        fully_shard([model.first, model.second], mesh=mesh)
        return fully_shard(model, mesh=mesh)

    x = torch.arange(32.0, dtype=torch.float64).reshape(4, 8) / 10
    for k, make in enumerate((lambda: sharded(mesh, shared(), layers=False), grouped)):
        results = []
        for model, batch in ((make(), x[2 * rank : 2 * rank + 2]), (shared(), x)):
            optimizer = torch.optim.SGD(adapter_parameters(model), lr=0.05, momentum=0.9)
            for _ in range(3):
                optimizer.zero_grad()
                model(batch).square().mean().backward()
                optimizer.step()
            assert len(adapter_parameters(model)) == 4
            retract_(model)
            results.append(model)
        path = saved(results[0], rank, directory / f"sharded{k}")
        torch.testing.assert_close(results[0](x), results[1](x), rtol=1e-9, atol=1e-11)
        assert list(read_adapter(path).stacks) == ["*.weight"]
        again = make()
        load_adapter(again, path)
        assert again.first.tucker_update["default"].factor_0 is again.second.tucker_update["default"].factor_0
        torch.testing.assert_close(again(x), results[0](x), rtol=1e-12, atol=1e-12)
        dist.barrier()
    with pytest.raises(ValueError, match="is shared with a parameter already managed by another FSDP group"):
        sharded(mesh, shared())(x)


def fsdp_gradients(rank, mesh, directory):
    cases = [
        ({}, True),
        ({}, False),
        ({"init": "principal"}, True),
        ({"magnitude": True, "exclude_modules": "embed"}, True),
        ({"path": "dense"}, True),
        ({"tied": True}, False),
    ]
    for options, layers in cases:
        model = sharded(mesh, adapted(**options), layers=layers)
        loss(model, half(rank)).backward()
        check_close(named_gradients(model), alone(**options))


def fsdp_files(rank, mesh, directory):
    for k, options in enumerate(({}, {"init": "principal"}, {"magnitude": True, "exclude_modules": "embed"})):
        path = saved(sharded(mesh, adapted(**options)), rank, directory / f"sharded{k}")
        if rank == 0:
            assert same_files(path, save_adapter(adapted(**options), directory / f"whole{k}"))
        dist.barrier()
        fresh = plain()
        load_adapter(fresh, path)
        assert torch.equal(fresh(IDS), adapted(**options)(IDS))
        # And back into a sharded model whose adapter has other values.
        again = sharded(mesh, adapted(**options))
        with torch.no_grad():
            for parameter in adapter_parameters(again):
                parameter.mul_(2.0)
        identities = [id(p) for p in adapter_parameters(again)]
        load_adapter(again, path)
        assert identities == [id(p) for p in adapter_parameters(again)]
        torch.testing.assert_close(again(IDS), fresh(IDS), rtol=1e-12, atol=1e-12)


def fsdp_after_evaluation(rank, mesh, directory):
    """A forward pass leaves the root's parameters whole in every process, as copies that are dropped later."""
    moved = adapted()
    with torch.no_grad():
        for parameter in adapter_parameters(moved):
            parameter.mul_(2.0)
    paths = [directory / "one", directory / "moved"]
    if rank == 0:
        for path, model in zip(paths, (adapted(), moved)):
            save_adapter(model, path)
    dist.barrier()

    def evaluated():
        model = sharded(mesh, adapted(), layers=False)
        with torch.no_grad():
            model(IDS)
        assert type(model.up.tucker_update["default"].core) is nn.Parameter
        return model

    assert same_files(saved(evaluated(), rank, directory / "sharded"), paths[0])
    model = evaluated()
    load_adapter(model, paths[1])
    torch.testing.assert_close(model(IDS), moved(IDS), rtol=1e-12, atol=1e-12)
    for list_parameters in (adapter_parameters, lambda model: parameter_groups(model, 0.1)[0]["params"]):
        assert {type(p).__name__ for p in list_parameters(evaluated())} == {"DTensor"}
    model = evaluated()
    retract_(model)
    factor = model.up.tucker_update["default"].factor_0.full_tensor()
    torch.testing.assert_close(factor.mT @ factor, torch.eye(3).double(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model(IDS), adapted()(IDS), rtol=1e-9, atol=1e-11)
    with pytest.raises(ValueError, match=r"attach: embed\.weight is spread over processes"):
        attach(evaluated(), ranks=2, adapter_name="second")
    for call in (merge, merge_):
        with pytest.raises(ValueError, match="is spread over processes"):
            call(evaluated())


def fsdp_of_one_vector(rank, mesh, directory):
    """FullyShardedDataParallel flattens parameters, and gives them back for as long as it is asked to."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = FullyShardedDataParallel(adapted(), use_orig_params=True, device_id=torch.device("cpu"))
    loss(model, half(rank)).backward()
    path, message = directory / "adapter", "the model is spread over processes by FullyShardedDataParallel.*summon"
    for call in (retract_, merge, lambda model: save_adapter(model, path), lambda model: load_adapter(model, path)):
        with pytest.raises(ValueError, match=message):
            call(model)
    with FullyShardedDataParallel.summon_full_params(model):
        if rank == 0:
            save_adapter(model, path)
        for parameter in adapter_parameters(model):
            parameter.data.mul_(2.0)
    dist.barrier()
    if rank == 0:
        assert same_files(path, save_adapter(adapted(), directory / "whole"))
    assert float((model(IDS) - adapted()(IDS)).detach().norm()) > 0.1
    with FullyShardedDataParallel.summon_full_params(model):
        load_adapter(model, path)
    torch.testing.assert_close(model(IDS), adapted()(IDS), rtol=1e-12, atol=1e-12)


def fsdp_training(rank, mesh, directory):
    results = []
    for model, batch in ((sharded(mesh, adapted()), half(rank)), (adapted(), IDS)):
        optimizer = torch.optim.SGD(parameter_groups(model, 0.2, core_lr=0.4), momentum=0.9)
        optimizer.register_step_post_hook(lambda *_, model=model: retract_(model))
        start = loss(model, IDS).item()
        for _ in range(4):
            optimizer.zero_grad()
            loss(model, batch).backward()
            nn.utils.clip_grad_norm_(adapter_parameters(model), 1.0)
            optimizer.step()
        assert loss(model, IDS).item() < start
        with disabled(model):
            torch.testing.assert_close(model(IDS), plain()(IDS), rtol=1e-12, atol=1e-12)
        results.append(model(IDS).detach())
    torch.testing.assert_close(results[0], results[1], rtol=1e-8, atol=1e-10)


def fsdp_state(rank, mesh, directory):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict

    model = sharded(mesh, adapted(scale=0.25))
    options = StateDictOptions(full_state_dict=True, ignore_frozen_params=True, strict=False)
    whole = get_model_state_dict(model, options=options)
    assert all("tucker_update" in name for name in whole)
    one = adapted(scale=2.0)
    missing, unexpected = one.load_state_dict(whole, strict=False)
    assert not unexpected
    assert not any("tucker_update" in name for name in missing)
    torch.testing.assert_close(one(IDS), model(IDS), rtol=1e-12, atol=1e-12)
    # The scale came with the extra state.
    assert one.up.tucker_update["default"].scale == 0.25
    other = sharded(mesh, adapted(scale=2.0))
    set_model_state_dict(other, whole, options=options)
    torch.testing.assert_close(other(IDS), model(IDS), rtol=1e-12, atol=1e-12)
    shards = {name: value for name, value in model.state_dict().items() if "tucker_update" in name}
    dcp.save(shards, checkpoint_id=directory / "checkpoint")
    third = sharded(mesh, adapted(scale=0.25))
    with torch.no_grad():
        for parameter in adapter_parameters(third):
            parameter.mul_(3.0)
    target = {name: value for name, value in third.state_dict().items() if "tucker_update" in name}
    dcp.load(target, checkpoint_id=directory / "checkpoint")
    third.load_state_dict(target, strict=False)
    torch.testing.assert_close(third(IDS), model(IDS), rtol=1e-12, atol=1e-12)


def moments(rank, mesh, directory):
    expected = collect_moments(adapted(), [IDS], sum_over_processes=False)
    for model in (adapted(), sharded(mesh, adapted())):
        found = collect_moments(model, [half(rank)], path=directory / "m.safetensors", overwrite=True)
        check_close(dict(found), dict(expected))
        assert found.counts == expected.counts
        dist.barrier()
        check_close(dict(load_moments(directory / "m.safetensors")), {n: m.numpy() for n, m in found.items()})
        dist.barrier()
    own = collect_moments(adapted(), [half(rank)], sum_over_processes=False)
    assert own.counts["up.weight"] == expected.counts["up.weight"] // 2

    # Layers that one process does not reach, and a process without batches.
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.left, self.right = nn.Linear(8, 4).double(), nn.Linear(8, 4).double()

        def forward(self, x, turn):
            return (self.right if turn else self.left)(x)

    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(3)).double()
    found = collect_moments(Branches(), [(x[3 * rank : 3 * rank + 3], rank)])
    alone = collect_moments(Branches(), [(x[:3], 0), (x[3:], 1)], sum_over_processes=False)
    check_close(dict(found), dict(alone))
    check_close(
        dict(collect_moments(Branches(), [(x, 0), (x, 1)] if rank else [])),
        dict(collect_moments(Branches(), [(x, 0), (x, 1)], sum_over_processes=False)),
    )


def gradients(rank, mesh, directory):
    """The mean over the batches of all processes, whichever process has how many."""
    batches = [IDS[:1], IDS[1:2], IDS[2:]]
    for ranks in (3, 0.9):
        expected = collect_gradients(plain(), batches, loss, ranks=ranks, sum_over_processes=False)
        found = collect_gradients(plain(), batches[2:] if rank else batches[:2], loss, ranks=ranks)
        assert found.n_batches == 3
        for name, tucker in found.items():
            exact, given = expected[name].to_tensor(), tucker.to_tensor()
            lost = (found.errors[name] + expected.errors[name]) * float(exact.norm())
            assert float((given - exact).norm()) <= 1.01 * lost + 1e-12, name
            assert torch.equal(given, first_of_all(given))
    nobody = collect_gradients(plain(), batches if rank else [], loss, ranks=0.9)
    assert nobody.n_batches == 3
    with pytest.raises(ValueError, match="there is no batch"):
        collect_gradients(plain(), [], loss, ranks=2)


def first_of_all(tensor):
    """Return what the first process has."""
    first = tensor.clone(memory_format=torch.contiguous_format)
    dist.broadcast(first, 0)
    return first


def refusals(rank, mesh, directory):
    model = sharded(mesh, adapted())
    with pytest.raises(ValueError, match="merge: 'weight' of Embedding is spread over processes"):
        merge(model)
    with pytest.raises(ValueError, match=r"collect_gradients: embed\.weight is spread over processes"):
        collect_gradients(model, [IDS], loss, ranks=2)
    with pytest.raises(ValueError, match=r"FloraLinear: 'weight' is spread over processes"):
        _ = model.up.weight
    fresh = sharded(mesh, plain())
    names = [name for name, _ in fresh.named_modules()]
    with pytest.raises(ValueError, match=r"attach: embed\.weight is spread over processes.*before fully_shard"):
        attach(fresh, ranks=2)
    assert [name for name, _ in fresh.named_modules()] == names


def tensor_parallel(rank, mesh, directory):
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    plan = {
        "up.base_layer": ColwiseParallel(output_layouts=Replicate()),
        "down.base_layer": RowwiseParallel(input_layouts=Replicate()),
    }
    model = parallelize_module(adapted(), mesh, plan)
    assert type(model.up.base_layer.weight).__name__ == "DTensor"
    loss(model, IDS).backward()
    expected = alone()
    # Older versions of torch unfreeze what they spread.
    check_close({name: g for name, g in named_gradients(model).items() if name in expected}, expected)
    if rank == 0:
        # One process alone may write; it cannot note what only all of them know, a few numbers of the spread weights.
        two, one = save_adapter(model, directory / "parallel"), save_adapter(adapted(), directory / "single")
        assert (two / FILES[1]).read_bytes() == (one / FILES[1]).read_bytes()
        configs = [json.loads((path / FILES[0]).read_text()) for path in (two, one)]
        samples = [config.pop("base_samples") for config in configs]
        assert configs[0] == configs[1]
        assert {name: text for name, text in samples[1].items() if name in samples[0]} == samples[0]
        assert set(samples[1]) - set(samples[0]) == {"up.weight", "down.weight"}


def tensor_parallel_refusals(rank, mesh, directory):
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    with pytest.raises(NotImplementedError):  # torch itself knows no wrapped layers
        parallelize_module(adapted(), mesh, {"up": ColwiseParallel()})
    with pytest.raises(ValueError, match=r"the output beside an update is of shape \(4, 6, 8\), and \(4, 6, 16\)"):
        parallelize_module(adapted(), mesh, {"up.base_layer": ColwiseParallel()})(IDS)
    halved = adapted()
    parallelize_module(halved, mesh, {"down.base_layer": RowwiseParallel()})
    with pytest.raises(ValueError, match=r"the input beside an update is of shape \(4, 8\), and \(4, 16\) is needed"):
        halved.down(torch.ones(4, 8).double())
    for options in ({"path": "dense"}, {"magnitude": True, "exclude_modules": "embed"}):
        model = adapted(**options)
        parallelize_module(model, mesh, {"up.base_layer": ColwiseParallel(output_layouts=Replicate())})
        with pytest.raises(ValueError, match="the weight is spread over processes, and this update needs the whole"):
            model(IDS)
    with pytest.raises(ValueError, match="merge: 'weight' of Linear is spread over processes"):
        merge(model)
    assert isinstance(detach(model).up, nn.Linear)


SCENARIOS = {
    each.__name__: each
    for each in (
        ddp,
        ddp_of_a_stack,
        fsdp_of_a_stack,
        fsdp_gradients,
        fsdp_files,
        fsdp_after_evaluation,
        fsdp_of_one_vector,
        fsdp_training,
        fsdp_state,
        moments,
        gradients,
        refusals,
        tensor_parallel,
        tensor_parallel_refusals,
    )
}


def _run(rank: int, directory: str) -> None:
    """Run every scenario in one of two processes, and write what came of each."""
    from torch.distributed.device_mesh import init_device_mesh

    torch.set_num_threads(1)
    here = Path(directory)
    # A collective that only one process enters ends with an error, not with a hang.
    dist.init_process_group(
        "gloo", init_method=f"file://{here / 'store'}", rank=rank, world_size=2, timeout=timedelta(seconds=300)
    )
    mesh = init_device_mesh("cpu", (2,))
    results = {}
    for name, scenario in SCENARIOS.items():
        if not CAN_SHARD and "sharded" in scenario.__code__.co_names:
            results[name] = "cannot shard"
            continue
        (here / name).mkdir(exist_ok=True)
        dist.barrier()
        try:
            scenario(rank, mesh, here / name)
            results[name] = "passed"
        except BaseException:
            results[name] = traceback.format_exc()
            break  # the other process may be anywhere
    mine, theirs = (here / f"{r}.json" for r in (rank, 1 - rank))
    mine.with_suffix(".part").write_text(json.dumps(results))
    mine.with_suffix(".part").rename(mine)
    # Taking gloo down can deadlock: the reducer joins gloo's threads with the interpreter's lock in hand, and they want
    # it too. So nothing is taken down; each process only waits until the other one no longer needs it.
    end = time.monotonic() + 90
    while not theirs.exists() and time.monotonic() < end:
        time.sleep(0.01)
    os._exit(0)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Return what came of each scenario in each of two processes."""
    directory = tmp_path_factory.mktemp("distributed")
    processes = multiprocessing.spawn(_run, args=(str(directory),), nprocs=2, join=False)
    end = time.monotonic() + 240
    while not processes.join(timeout=1.0):
        if time.monotonic() > end:
            for process in processes.processes:
                process.kill()
            pytest.fail("the two processes hang")
    return [json.loads((directory / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_two_processes(results, scenario):
    found = [each.get(scenario, "not reached: a scenario before it failed") for each in results]
    if found == ["cannot shard", "cannot shard"]:
        pytest.skip("this version of torch cannot shard a model on CPUs")
    assert found == ["passed", "passed"], "\n".join(found)
