"""Second moments of the inputs of a model's weights, and the file that keeps them.

The output of a layer changes by ΔW x when its weight does, and the mean of ‖ΔW x‖² is ‖ΔW C^½‖² with C = E[x xᵀ]: the
second moment of the input is all that must be known of the data. It is a matrix over those of the weight's axes that
meet the input, named as `Arrangement` names them, flattened in C order:

    "i h w"   a whole patch of a convolution's input, (I, I) with I = in/groups · height · width
    "i"       the input features of a linear layer, or the channels of a convolution, averaged over the kernel
    "o"       where the weight's first axis meets the input: embeddings, transposed convolutions, transformers' Conv1D

A vector in the place of a matrix is its diagonal. The file is one safetensors file, with everything that is not an
array as JSON under one key of its metadata, so that the same moments give the same bytes.
"""

import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flora_tensor._arrays import to_numpy
from flora_tensor._errors import InputError
from flora_tensor._files import canonical_json, open_regular, parse_json, staged_file
from flora_tensor._safetensors import FLOATS, SafetensorsWriter, TensorInfo, decode, encode, read_header, read_span
from flora_tensor._safetensors import dtype_code as code_of
from flora_tensor._typing import Array, PathLike

__all__ = ["Moments", "load_moments", "save_moments"]

_KEY = "flora_tensor_moments"
_VERSION = 1


class Moments(dict[str, Array]):
    """Second moments by the names of weights: a dictionary of arrays that knows what each is over.

    Parameters
    ----------
    values : mapping of str to array
        E[x xᵀ] of the input of each weight, (I, I); or its diagonal, (I,).
    axes : mapping of str to str
        Which of the weight's axes an array is over, by their standard names: ``"i h w"``, ``"i"``, ``"o"``.
    counts : mapping of str to int
        How many inputs x the mean was taken over.
    aliases : mapping of str to sequence of str, optional
        The other names of a weight that a model holds several times.

    Attributes
    ----------
    axes : dict of str to str
        As given.
    counts : dict of str to int
        As given.
    aliases : dict of str to tuple of str
        As given; every weight has an entry.

    Raises
    ------
    ValueError
        If an array is neither a square matrix nor a vector, or has no axes or count.

    References
    ----------
    Yang et al., *CorDA: context-oriented decomposition adaptation of large language models*, NeurIPS 2024, arXiv
    2406.05223, for the moments of linear layers' inputs.

    Examples
    --------
    >>> moments = Moments({"fc.weight": np.eye(3)}, {"fc.weight": "i"}, {"fc.weight": 100})
    >>> moments["fc.weight"].shape, moments.axes["fc.weight"]
    ((3, 3), 'i')
    """

    def __init__(
        self,
        values: Mapping[str, Array],
        axes: Mapping[str, str],
        counts: Mapping[str, int],
        aliases: Mapping[str, Iterable[str]] | None = None,
    ) -> None:
        super().__init__(values)
        self.axes, self.counts = dict(axes), dict(counts)
        self.aliases = {name: tuple((aliases or {}).get(name, ())) for name in self}
        for name, value in self.items():
            shape = tuple(value.shape)
            if not 1 <= len(shape) <= 2 or shape[0] != shape[-1]:
                raise ValueError(f"Moments: {name!r} is of shape {shape}; pass a square matrix, or its diagonal")
            if not self.axes.get(name, "").split() or self.counts.get(name, 0) < 1:
                raise ValueError(f"Moments: {name!r} needs the axes that it is over, and a count of 1 or more")

    def name_of(self, weight: str) -> str | None:
        """Return the key under which a weight's moment stands, or ``None`` where there is none.

        Parameters
        ----------
        weight : str
            Any of the names that the model knows the weight by.

        Returns
        -------
        str or None
            The key.

        Examples
        --------
        >>> moments = Moments({"a.weight": np.eye(3)}, {"a.weight": "i"}, {"a.weight": 1}, {"a.weight": ["b.weight"]})
        >>> moments.name_of("b.weight")
        'a.weight'
        """
        if weight in self:
            return weight
        return next((name for name, others in self.aliases.items() if weight in others), None)


def save_moments(path: PathLike, moments: Moments, *, overwrite: bool = False) -> Path:
    """Write moments as one safetensors file, whole or not at all; the same moments give the same bytes.

    Parameters
    ----------
    path : path
        The file to write.
    moments : Moments
        What to write; arrays of any library, stored in their own types.
    overwrite : bool, default False
        Whether a file that exists is replaced.

    Returns
    -------
    Path
        The file.

    Raises
    ------
    ValueError
        If there is nothing to write, or an entry is not finite.
    FileExistsError
        If the file exists and ``overwrite`` is false.
    OSError
        If the disk is full or cannot be written to.

    References
    ----------
    The format is described at the head of `flora_tensor.moments`.

    Examples
    --------
    >>> import tempfile, pathlib
    >>> moments = Moments({"fc.weight": np.eye(3)}, {"fc.weight": "i"}, {"fc.weight": 100})
    >>> file = save_moments(pathlib.Path(tempfile.mkdtemp()) / "moments.safetensors", moments)
    >>> load_moments(file).counts
    {'fc.weight': 100}
    """
    if not moments:
        raise ValueError("save_moments: there is no moment to write; pass at least one")
    arrays = {name: to_numpy(value) for name, value in moments.items()}
    types = {name: code_of(value.dtype) for name, value in moments.items()}
    for name, array in arrays.items():
        if types[name] not in FLOATS or not np.isfinite(array).all():
            raise ValueError(f"save_moments: {name!r} is no real float or has NaN or infinite entries; collect it anew")
    weights = {
        name: {"axes": moments.axes[name], "count": moments.counts[name], "aliases": list(moments.aliases[name])}
        for name in moments
    }
    metadata = {_KEY: canonical_json({"version": _VERSION, "weights": weights})}
    layout = [(name, types[name], array.shape) for name, array in arrays.items()]
    with (
        staged_file("save_moments", Path(path), overwrite=overwrite) as stage,
        SafetensorsWriter(stage, layout, metadata) as writer,
    ):
        for name, array in arrays.items():
            writer.write(name, encode(array, types[name]))
        writer.finish()
    return Path(path)


def load_moments(path: PathLike, names: Iterable[str] | None = None) -> Moments:
    """Read a file of moments, everything that it claims checked.

    Parameters
    ----------
    path : path
        A file that `save_moments` or `flora_torch.collect_moments` wrote.
    names : iterable of str, optional
        Read these weights alone, called by any of their names; those that the file lacks are left out.

    Returns
    -------
    Moments
        NumPy arrays, finite; float32 for 16-bit types.

    Raises
    ------
    InputError
        If the file is damaged, holds no moments, or was written by a newer version. It is a ValueError.
    OSError
        If the file cannot be read.

    References
    ----------
    The format is described at the head of `flora_tensor.moments`.

    Examples
    --------
    >>> import tempfile, pathlib
    >>> moments = Moments({"fc.weight": np.ones(3)}, {"fc.weight": "o"}, {"fc.weight": 7})
    >>> file = save_moments(pathlib.Path(tempfile.mkdtemp()) / "moments.safetensors", moments)
    >>> load_moments(file)["fc.weight"].tolist()
    [1.0, 1.0, 1.0]
    """
    path = Path(path)
    fd = open_regular(path)
    try:
        header = read_header(fd, path)
        weights = _described(header.metadata, path)
        if set(weights) != set(header.tensors):
            name = min(set(weights) ^ set(header.tensors))
            raise InputError(f"{path}: {name!r} is in only one of the metadata and the tensors; the file is damaged")
        if names is not None:
            asked = set(names)
            weights = {name: entry for name, entry in weights.items() if asked & {name, *entry["aliases"]}}
        arrays = {name: _read(fd, header.tensors[name], path) for name in weights}
    finally:
        os.close(fd)
    try:
        columns = [{name: entry[key] for name, entry in weights.items()} for key in ("axes", "count", "aliases")]
        return Moments(arrays, *columns)
    except ValueError as error:
        raise InputError(f"{path}: {error}") from None


def _described(metadata: Mapping[str, str], path: Path) -> dict[str, Any]:
    """Read the metadata; every entry has the right types afterwards."""
    if _KEY not in metadata:
        raise InputError(f"{path}: not a file of moments; flora_torch.collect_moments writes one")
    content = parse_json(metadata[_KEY].encode(), f"{path}: {_KEY}")
    if content.get("version") != _VERSION:
        raise InputError(f"{path}: version {content.get('version')!r}, but {_VERSION} is known; upgrade flora-tensor")
    weights = content.get("weights")
    if not isinstance(weights, dict) or not all(_is_entry(entry) for entry in weights.values()):
        raise InputError(f"{path}: its table of weights cannot be read; the file is damaged")
    return weights


def _is_entry(entry: Any) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("aliases"), list):
        return False
    names = [entry.get("axes"), *entry["aliases"]]
    return type(entry.get("count")) is int and all(isinstance(name, str) for name in names)


def _read(fd: int, info: TensorInfo, path: Path) -> np.ndarray:
    if info.dtype not in FLOATS or math.prod(info.shape) == 0:
        raise InputError(f"{path}: tensor {info.name!r} is {info.dtype} of shape {info.shape}; moments are floats")
    array = decode(read_span(fd, info.start, info.n_bytes, path), info.dtype, info.shape)
    if not np.isfinite(array).all():
        raise InputError(f"{path}: tensor {info.name!r} has NaN or infinite entries; collect the moments anew")
    return array
