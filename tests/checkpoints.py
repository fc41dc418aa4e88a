"""Checkpoints for the tests, written by the public safetensors package and not by ours."""

import inspect
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from click.testing import CliRunner, Result

from flora_tensor.cli import main
from support import optional

torch = optional("torch")


def save(path: Path, tensors: Mapping[str, Any], metadata: dict[str, str] | None = None) -> Path:
    """Write arrays or torch tensors as safetensors."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not any(hasattr(t, "detach") for t in tensors.values()):
        arrays = {n: np.array(t, order="C") for n, t in tensors.items()}
        safetensors.numpy.save_file(arrays, path, metadata=metadata)
        return path
    as_torch = {
        n: (t if isinstance(t, torch.Tensor) else torch.from_numpy(np.array(t))).clone().contiguous()
        for n, t in tensors.items()
    }
    optional("safetensors.torch").save_file(as_torch, path, metadata=metadata)
    return path


def load(path: Path) -> "dict[str, torch.Tensor]":
    """Read a file, or all shards of a directory, with the public package."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    return {name: tensor for file in files for name, tensor in optional("safetensors.torch").load_file(file).items()}


def save_sharded(directory: Path, shards: Mapping[str, Mapping[str, Any]], **index: Any) -> Path:
    """Write a sharded checkpoint with its index; ``index`` replaces parts of it."""
    for name, tensors in shards.items():
        save(directory / name, tensors)
    content = {"metadata": {}, "weight_map": {n: file for file, tensors in shards.items() for n in tensors}, **index}
    (directory / "model.safetensors.index.json").write_text(json.dumps(content))
    return directory


def save_pipeline(directory: Path, unet: Mapping[str, Any], text_encoder: Mapping[str, Any]) -> Path:
    """Write a pipeline as diffusers lays it out: a model in two files, one in one, a folder without weights."""
    stem, names = "diffusion_pytorch_model", list(unet)
    shards = {f"{stem}-0000{k + 1}-of-00002.safetensors": {n: unet[n] for n in names[k::2]} for k in (0, 1)}
    save_sharded(directory / "unet", shards)
    (directory / "unet" / "model.safetensors.index.json").rename(directory / "unet" / f"{stem}.safetensors.index.json")
    save(directory / "text_encoder" / "model.safetensors", text_encoder, {"format": "pt"})
    parts = {name: ["library", "Class"] for name in ("unet", "text_encoder", "scheduler", "safety_checker")}
    (directory / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline", **parts}))
    (directory / "scheduler").mkdir()
    for name in ("unet/config.json", "text_encoder/config.json", "scheduler/scheduler_config.json"):
        (directory / name).write_text(json.dumps({"of": name}))
    return directory


def raw(header: Any, data: bytes = b"", *, length: int | None = None) -> bytes:
    """Put a safetensors file together by hand, valid or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype: str, shape: list[Any], start: Any, stop: Any) -> dict[str, Any]:
    """One tensor's entry in a header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def run(*args: Any) -> Result:
    """Run the command line in this process."""
    # click 8.1 keeps the two streams apart only where it is told to; later versions always do.
    options = {"mix_stderr": False} if "mix_stderr" in inspect.signature(CliRunner).parameters else {}
    return CliRunner(**options).invoke(main, [str(a) for a in args])


def bits(tensor: "torch.Tensor") -> bytes:
    """The bytes of a tensor."""
    flat = tensor.contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
