"""Warnings point at the line that can be changed: the caller's, however deep in the library they arise."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import flora_tensor as ft
import flora_torch
from checkpoints import save
from test_adapter_file import edit

RNG = np.random.default_rng(0)
TENSOR = ft.TuckerTensor(*(RNG.standard_normal((6, 6)), [RNG.standard_normal((20, 6)) for _ in "ab"]))


def of_base(fingerprint: str) -> ft.Adapter:
    return ft.Adapter({"w": TENSOR}, config={"base_fingerprint": fingerprint})


def checkpoint(here: Path, name: str, scale: float) -> Path:
    return save(here / f"{name}.safetensors", {"w": np.float32(scale * TENSOR.to_tensor())})


def with_a_newer_format(here: Path) -> Path:
    edit(ft.save_adapter(here / "newer", of_base("x")), format_version="1.99")
    return here / "newer"


def for_another_model(here: Path) -> tuple[nn.Module, Path]:
    torch.manual_seed(0)
    model, other = nn.Sequential(nn.Linear(4, 3)), nn.Sequential(nn.Linear(4, 3))
    flora_torch.attach(model, ranks=1)
    return other, flora_torch.save_adapter(model, here / "a")


def without_an_input(_: Path) -> ft.Moments:
    model = nn.ModuleDict({"used": nn.Linear(2, 2), "unused": nn.Linear(2, 2)})
    return flora_torch.collect_moments(model, [torch.ones(1, 2)], forward=lambda m, x: m["used"](x))


CALLS: dict[str, Callable[[Path], object]] = {
    "round": lambda _: ft.round_adapter(ft.Adapter({"w": TENSOR}, dtypes={"w": "BF16"}), rtol=1e-6),
    "add": lambda _: ft.add_adapters([of_base("x"), of_base("y")]),
    "scale": lambda here: ft.scale_adapter(of_base("x"), 2.0, base=checkpoint(here, "base", 1.0)),
    "load": lambda here: ft.load_adapter(with_a_newer_format(here)),
    "round from a directory": lambda here: ft.round_adapter(with_a_newer_format(here), rtol=0.1),
    "merge": lambda here: ft.merge_checkpoint(checkpoint(here, "base", 1.0), of_base("x"), here / "out.safetensors"),
    "extract": lambda here: ft.extract(
        checkpoint(here, "base", 1.0), checkpoint(here, "tuned", 2.0), here / "a", rtol=1e-6, dtype="bfloat16"
    ),
    "attach": lambda here: flora_torch.attach_adapter(*for_another_model(here)),
    "collect": without_an_input,
}


@pytest.mark.parametrize("name", CALLS)
def test_a_warning_points_at_the_caller(name: str, tmp_path: Path):
    with pytest.warns(ft.FloraWarning) as caught:
        CALLS[name](tmp_path)
    assert [warning.filename for warning in caught] == [__file__]
