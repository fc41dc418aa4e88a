"""What works for which weight: the table in `flora_torch.kinds` says what trying it out gives.

``python tests/test_torch_support.py`` prints it.
"""

import copy
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from transformers.pytorch_utils import Conv1D

from families import mixtral
from flora_torch import FloraLayer, adapter_parameters, attach, kinds, load_adapter, merge, merge_, save_adapter
from flora_torch.experts import FloraExperts
from flora_torch.inventory import updates_by_weight
from flora_torch.weight_layer import WeightLayer, is_read_by_its_parent
from test_torch_kinds import OwnConv, Prompts
from test_torch_quantized import UnpackedLinear, packed


class Kind(NamedTuple):
    """A kind of weight: what it is called, a model that has one, and the options that mean it."""

    name: str
    make: Callable[[], nn.Module]
    options: Mapping[str, Any] = MappingProxyType({})


def wrapped(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(make())


def attention() -> nn.Module:
    return nn.MultiheadAttention(4, 2)


KINDS = [
    Kind("nn.Linear, Conv1D of transformers", wrapped(lambda: nn.Sequential(nn.Linear(4, 4), Conv1D(4, 4)))),
    Kind(
        "nn.Conv1d, 2d, 3d", wrapped(lambda: nn.Sequential(nn.Conv1d(4, 4, 2), nn.Conv2d(4, 4, 2), nn.Conv3d(2, 2, 2)))
    ),
    Kind("nn.ConvTranspose1d, 2d, 3d", wrapped(lambda: nn.ConvTranspose2d(4, 4, 2))),
    Kind("nn.Embedding", wrapped(lambda: nn.Embedding(5, 4))),
    Kind("nn.EmbeddingBag: sum, mean", wrapped(lambda: nn.EmbeddingBag(5, 4))),
    Kind("nn.EmbeddingBag: max", wrapped(lambda: nn.EmbeddingBag(5, 4, mode="max"))),
    Kind("nn.Bilinear", wrapped(lambda: nn.Bilinear(4, 3, 2))),
    Kind("nn.LSTM, GRU, RNN and cells", wrapped(lambda: nn.Sequential(nn.LSTM(4, 4), nn.GRUCell(4, 4)))),
    Kind("nn.MultiheadAttention: in-projections", wrapped(attention), {"target_parameters": "in_proj_weight"}),
    Kind("nn.MultiheadAttention: out_proj", wrapped(attention), {"target_modules": "out_proj"}),
    Kind("experts in one parameter", mixtral, {"target_modules": "experts"}),
    Kind("nn.ParameterList, ParameterDict", wrapped(Prompts), {"target_modules": "all"}),
    Kind("any other parameter with two axes or more", wrapped(lambda: nn.LayerNorm((2, 3))), {"target_modules": "all"}),
    Kind("a layer with a forward of its own", wrapped(lambda: OwnConv(4, 4, 2))),
    Kind("weight_norm", wrapped(lambda: parametrizations.weight_norm(nn.Linear(4, 4)))),
    Kind("spectral_norm and others", wrapped(lambda: parametrizations.spectral_norm(nn.Linear(4, 4)))),
    Kind("quantized, with a way back", wrapped(lambda: UnpackedLinear(nn.Linear(4, 4)))),
    Kind("quantized, without one", wrapped(lambda: packed(nn.Linear(4, 4)))),
]
COLUMNS = ("weight", "ΔW not formed", "input dropout", "magnitude", "merge", "merge_", "save, load")


def works(action: Callable[[], Any]) -> bool:
    try:
        action()
    except ValueError:
        return False
    return True


def row(kind: Kind) -> tuple[str, ...]:
    """Try everything on one kind of weight."""

    def attached(**options: Any) -> nn.Module:
        torch.manual_seed(0)
        model = kind.make()
        attach(model, ranks=2, **kind.options, **options)
        for parameter in adapter_parameters(model):
            nn.init.normal_(parameter)
        return model

    model = attached()
    layers = [module for module in model.modules() if isinstance(module, FloraLayer)]
    dropping = [u for m in attached(dropout=0.5).modules() if isinstance(m, FloraLayer) for u in updates_of(m)]
    answers = [
        all(is_factored(layer) for layer in layers),
        all(update.dropout > 0.0 for update in dropping),
        works(lambda: attached(magnitude=True)),
        works(lambda: plain(merge(copy.deepcopy(model)))),
        works(lambda: merge_(copy.deepcopy(model))),
        works(lambda: comes_back(kind, model)),
    ]
    return (kind.name, *("yes" if answer else "no" for answer in answers))


def updates_of(layer: FloraLayer) -> list[Any]:
    return [update for name in layer.tucker_update for update in layer.updates(name).values()]


def is_factored(layer: Any) -> bool:
    if isinstance(layer, WeightLayer):
        # Attention reads the weight of its output projection, and forms it by that.
        return not is_read_by_its_parent(layer.base_layer) and all(
            layer._has_factored(update) for update in updates_of(layer)
        )
    return isinstance(layer, FloraExperts) and all(layer._is_lazy(name) for name in layer.parameter_names)


def plain(model: nn.Module) -> None:
    assert not any(isinstance(module, FloraLayer) for module in model.modules())


def comes_back(kind: Kind, model: nn.Module) -> None:
    with tempfile.TemporaryDirectory() as directory:
        torch.manual_seed(0)
        again = kind.make()
        load_adapter(again, save_adapter(model, Path(directory) / "adapter"))
    mine, theirs = updates_by_weight(model, "default"), updates_by_weight(again, "default")
    assert mine.keys() == theirs.keys()
    for name, update in mine.items():
        assert all(torch.equal(a, b) for a, b in zip(update.parameters(), theirs[name].parameters(), strict=True))


def table() -> str:
    rows = [COLUMNS, *(row(kind) for kind in KINDS)]
    widths = [max(len(cells[k]) for cells in rows) for k in range(len(COLUMNS))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(cells, widths)).rstrip() for cells in rows]
    rule = "  ".join("=" * width for width in widths)
    return "\n".join([rule, lines[0], rule, *lines[1:], rule])


@pytest.mark.filterwarnings("ignore:.*deprecated.*")
def test_the_documented_table_is_what_trying_gives():
    assert table() in (kinds.__doc__ or ""), f"put this into the docstring of flora_torch.kinds:\n{table()}"


if __name__ == "__main__":
    print(table())
