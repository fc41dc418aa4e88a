"""Files of second moments: what is written is read, and what is damaged is refused."""

import json
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flora_tensor import InputError, Moments, load_moments, save_moments
from support import same_bits


def some(dtype="float32"):
    return Moments(
        {"conv.weight": np.arange(16.0, dtype=dtype).reshape(4, 4), "embed.weight": np.ones(5, dtype)},
        {"conv.weight": "i h w", "embed.weight": "o"},
        {"conv.weight": 12, "embed.weight": 3},
        {"embed.weight": ["head.weight"]},
    )


@given(st.dictionaries(st.text("abé.", min_size=1, max_size=6), st.integers(1, 5), min_size=1, max_size=4))
def test_round_trip(tmp_path_factory, sizes):
    rng = np.random.default_rng(0)
    moments = Moments(
        {name: rng.standard_normal((n, n) if n % 2 else (n,)) for name, n in sizes.items()},
        dict.fromkeys(sizes, "i"),
        dict(sizes),
        {name: [name + "'"] for name in sizes},
    )
    path = save_moments(tmp_path_factory.mktemp("moments") / "moments.safetensors", moments)
    again = load_moments(path)
    assert set(again) == set(moments)
    assert all(same_bits(again[name], moments[name]) for name in moments)
    assert (again.axes, again.counts, again.aliases) == (moments.axes, moments.counts, moments.aliases)


def test_same_bytes_and_no_overwriting(tmp_path):
    first = save_moments(tmp_path / "a", some()).read_bytes()
    assert save_moments(tmp_path / "b", some()).read_bytes() == first
    with pytest.raises(FileExistsError, match="overwrite=True"):
        save_moments(tmp_path / "a", some())
    with pytest.raises(ValueError, match="NaN"):
        save_moments(tmp_path / "a", Moments({"w": np.array([np.nan])}, {"w": "i"}, {"w": 1}), overwrite=True)
    assert (tmp_path / "a").read_bytes() == first
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_arrays_of_every_library(xp, tmp_path):
    values = xp.asarray(np.eye(3, dtype=np.float32))
    path = save_moments(tmp_path / "m", Moments({"w": values}, {"w": "i"}, {"w": 1}))
    assert same_bits(load_moments(path)["w"], np.eye(3, dtype=np.float32))


def test_names():
    moments = some()
    assert moments.name_of("head.weight") == "embed.weight"
    assert moments.name_of("conv.weight") == "conv.weight"
    assert moments.name_of("weight") is None


@pytest.mark.parametrize(
    ("values", "axes", "counts", "message"),
    [
        (np.ones((2, 3)), {"w": "i"}, {"w": 1}, "shape (2, 3); pass a square matrix, or its diagonal"),
        (np.ones((2, 2, 2)), {"w": "i"}, {"w": 1}, "pass a square matrix"),
        (np.ones(2), {}, {"w": 1}, "needs the axes"),
        (np.ones(2), {"w": "i"}, {"w": 0}, "a count of 1 or more"),
    ],
)
def test_refused(values, axes, counts, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Moments({"w": values}, axes, counts)


def test_nothing_to_write(tmp_path):
    with pytest.raises(ValueError, match="no moment to write"):
        save_moments(tmp_path / "m", Moments({}, {}, {}))


def rewritten(path, change):
    """Change the metadata of a file of moments, the header's length with it."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def with_table(change):
    def change_header(header):
        content = json.loads(header["__metadata__"]["flora_tensor_moments"])
        change(content)
        header["__metadata__"]["flora_tensor_moments"] = json.dumps(content)

    return change_header


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda header: header.pop("__metadata__"), "not a file of moments"),
        (with_table(lambda table: table.update(version=2)), "version 2, but 1 is known; upgrade"),
        (with_table(lambda table: table.update(weights=[])), "table of weights cannot be read"),
        (with_table(lambda table: table["weights"]["conv.weight"].update(count="12")), "cannot be read"),
        (with_table(lambda table: table["weights"].update({"conv.weight": 3})), "table of weights cannot be read"),
        (with_table(lambda table: table["weights"]["conv.weight"].update(count=0)), "a count of 1 or more"),
        (with_table(lambda table: table["weights"].pop("conv.weight")), "'conv.weight' is in only one of"),
        (lambda header: header["conv.weight"].update(shape=[2, 8]), "pass a square matrix"),
        (lambda header: header["conv.weight"].update(dtype="I32"), "moments are floats"),
    ],
)
def test_damaged_files(tmp_path, change, message):
    path = save_moments(tmp_path / "m", some())
    rewritten(path, change)
    with pytest.raises(InputError, match=re.escape(message)):
        load_moments(path)


def test_infinite_and_truncated_files(tmp_path):
    path = save_moments(tmp_path / "m", some())
    data = path.read_bytes()
    path.write_bytes(data[:-4] + np.float32(np.inf).tobytes())
    with pytest.raises(InputError, match="NaN or infinite"):
        load_moments(path)
    path.write_bytes(data[:-4])
    with pytest.raises(InputError, match="truncated"):
        load_moments(path)
