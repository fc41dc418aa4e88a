"""The strict reader and the reproducible writer of the safetensors format."""

import json
import math
import os
import struct
from fractions import Fraction
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import flora_tensor as ft
from checkpoints import entry, raw, run, save
from flora_tensor._safetensors import (
    BITS,
    MAX_HEADER_BYTES,
    SafetensorsWriter,
    decode,
    decode_into,
    dtype_code,
    encode,
    read_header,
    read_span,
    round_to,
)

F4 = entry("F32", [1], 0, 4)
BAD_HEADERS = {
    "empty": (b"", "0 bytes; a safetensors file has at least 8"),
    "seven bytes": (b"1234567", "at least 8"),
    "header beyond the file": (raw({}, length=50), "truncated"),
    "header claims 2^63": (struct.pack("<Q", 2**63) + b"{}", "more than the 100000000 allowed"),
    "not an object": (raw(b"[1, 2]"), "does not begin with"),
    "leading space": (raw(b" {}"), "does not begin with"),
    "broken JSON": (raw(b'{"a": '), "not valid JSON"),
    "not UTF-8": (raw(b'{"\xff": 1}'), "not valid JSON"),
    "lone surrogate": (raw(b'{"\\ud800": 1}'), "not valid JSON"),
    "NaN in JSON": (raw(b'{"a": NaN}'), "NaN is not a JSON number"),
    "deep nesting": (raw(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), "nested too deeply"),
    "digits without end": (raw(b'{"a": ' + b"1" * 5000 + b"}"), "not valid JSON"),
    "duplicate key": (
        raw(b'{"a":%b,"a":%b}' % ((json.dumps(F4).encode(),) * 2), b"1234"),
        "the key 'a' stands twice",
    ),
    "duplicate key inside": (raw(b'{"a":{"dtype":"F32","dtype":"F16"}}'), "'dtype' stands twice"),
    "metadata is a list": (raw({"__metadata__": [1]}), "not a table of texts"),
    "metadata holds a number": (raw({"__metadata__": {"a": 1}}), "not a table of texts"),
    "entry is a list": (raw({"a": []}), "its entry is not dtype, shape and data_offsets"),
    "entry has more": (raw({"a": {**F4, "x": 1}}, b"1234"), "its entry is not"),
    "unknown type": (raw({"a": entry("F33", [1], 0, 4)}, b"1234"), "unknown type 'F33'"),
    "type is a list": (raw({"a": entry(["F32"], [1], 0, 4)}, b"1234"), "unknown type"),  # type: ignore[arg-type]
    "negative size": (raw({"a": entry("F32", [-1], 0, 4)}, b"1234"), "non-negative integers"),
    "size is true": (raw({"a": entry("F32", [True], 0, 4)}, b"1234"), "non-negative integers"),
    "size is a float": (raw({"a": entry("F32", [1.0], 0, 4)}, b"1234"), "non-negative integers"),
    "three offsets": (raw({"a": {**F4, "data_offsets": [0, 4, 4]}}, b"1234"), "two offsets"),
    "shape and bytes differ": (raw({"a": entry("F32", [2], 0, 4)}, b"1234"), "takes 8 bytes, but its offsets span 4"),
    "stop before start": (raw({"a": entry("F32", [1], 4, 0)}, b"1234"), "takes 4 bytes, but its offsets span -4"),
    "product of 2^64 + 1 bytes": (raw({"a": entry("F32", [2**31, 2**31], 0, 4)}, b"1234"), "larger than any memory"),
    "huge beside a zero": (raw({"a": entry("F32", [0, 2**60, 8], 0, 0)}), "larger than any memory"),
    "many axes": (raw({"a": entry("F32", [1] * 33, 0, 4)}, b"1234"), "larger than any memory"),
    "half a byte": (raw({"a": entry("F4", [1], 0, 0)}), "takes 0.5 bytes"),
    "overlap": (raw({"a": F4, "b": entry("F32", [1], 2, 6)}, b"123456"), "overlaps the one before it at byte"),
    "same bytes twice": (raw({"a": F4, "b": F4}, b"1234"), "overlaps"),
    "hole": (raw({"a": F4, "b": entry("F32", [1], 8, 12)}, b"1" * 12), "belong to no tensor"),
    "hole at the start": (raw({"a": entry("F32", [1], 4, 8)}, b"1" * 8), "belong to no tensor"),
    "truncated data": (raw({"a": F4}, b"123"), "the file has .* it is truncated"),
    "trailing bytes": (raw({"a": F4}, b"12345"), "1 bytes after the last tensor"),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_a_damaged_header_is_refused_with_the_file_and_the_reason(case: str, tmp_path: Path):
    content, message = BAD_HEADERS[case]
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(ft.InputError, match=rf"(?s){path.name}.*{message}"):
        ft.open_checkpoint(path)
    good = save(tmp_path / "good.safetensors", {"a": np.ones((4, 4), np.float32)})
    result = run("extract", good, path, "-o", tmp_path / "out")
    assert result.exit_code == 3
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


@given(data=st.data())
def test_mutated_files_never_crash_the_reader(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory):
    """Every mutation either reads as a consistent file or is refused with an `InputError`."""
    tensors = {"a.weight": np.arange(12, dtype=np.float32).reshape(3, 4), "b": np.arange(3), "é": np.zeros((0, 2))}
    path = save(tmp_path_factory.mktemp("mutated") / "model.safetensors", tensors, {"format": "pt"})
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        kind = data.draw(st.sampled_from(["flip", "delete", "insert", "cut"]))
        if kind == "flip":
            content[at] = data.draw(st.integers(0, 255))
        elif kind == "delete":
            del content[at : at + data.draw(st.integers(1, 9))]
        elif kind == "insert":
            content[at:at] = data.draw(st.binary(min_size=1, max_size=9))
        else:
            del content[at:]
        if not content:
            break
    path.write_bytes(bytes(content))
    result = run("diff", path, path)
    assert result.exit_code in (0, 3)
    assert result.stderr.count("error: ") == (result.exit_code == 3)
    try:
        checkpoint = ft.open_checkpoint(path)
    except ft.InputError:
        return
    for name in checkpoint.names():
        assert (
            len(checkpoint.read_raw(name)) * 8 == checkpoint.info(name).n_elements * BITS[checkpoint.info(name).dtype]
        )


def test_a_valid_file_reads_as_the_public_reader_reads_it(tmp_path: Path):
    rng = np.random.default_rng(0)
    tensors = {
        "f64": rng.standard_normal((2, 3)),
        "f32": rng.standard_normal((4,)).astype(np.float32),
        "i8": np.arange(-3, 3, dtype=np.int8),
        "bool": np.array([True, False]),
        "scalar": np.array(5, dtype=np.int64),
        "empty": np.zeros((0, 7), np.float32),
    }
    checkpoint = ft.open_checkpoint(save(tmp_path / "m.safetensors", tensors, {"k": "v"}))
    assert set(checkpoint.names()) == set(tensors)
    assert checkpoint.metadata == {"k": "v"}
    for name, expected in tensors.items():
        np.testing.assert_array_equal(checkpoint.read(name), expected)
        assert checkpoint.read(name).dtype == expected.dtype


def test_types_agree_with_the_public_package_on_every_size(tmp_path: Path):
    pytest.importorskip("safetensors", minversion="0.8", reason="earlier versions know fewer types")
    # The public reader knows sizes; where it accepts a type of ours, it accepts the same number of bytes.
    for code, width in BITS.items():
        path = tmp_path / f"{code}.safetensors"
        path.write_bytes(raw({"a": entry(code, [8], 0, width)}, b"\0" * width))
        with path.open("rb") as file:
            assert read_header(file.fileno(), path).tensors["a"].n_bytes == width
        with safetensors.safe_open(path, "np") as theirs:
            assert theirs.get_slice("a").get_dtype() == code


def test_written_files_are_read_by_the_public_package_and_are_the_same_bytes_again(tmp_path: Path):
    arrays = {"b": np.arange(6.0).reshape(2, 3), "a": np.arange(3, dtype=np.int8), "z": np.zeros((0, 3), np.float16)}
    layout = [(n, dtype_code(a.dtype), a.shape) for n, a in arrays.items()]
    paths = [tmp_path / "1.safetensors", tmp_path / "2.safetensors"]
    for path, order in zip(paths, (list(arrays), list(arrays)[::-1])):
        with SafetensorsWriter(path, layout if path is paths[0] else layout[::-1], {"y": "1", "x": "é"}) as writer:
            for name in order:
                writer.write(name, encode(arrays[name], dtype_code(arrays[name].dtype)))
            writer.finish()
    assert paths[0].read_bytes() == paths[1].read_bytes()
    with safetensors.safe_open(paths[0], "np") as theirs:
        assert theirs.metadata() == {"x": "é", "y": "1"}
        for name, array in arrays.items():
            np.testing.assert_array_equal(theirs.get_tensor(name), array)
    with paths[0].open("rb") as file:
        header = read_header(file.fileno(), paths[0])
    assert all(info.start % (BITS[info.dtype] // 8) == 0 for info in header.tensors.values())


def test_a_writer_refuses_what_it_was_not_told(tmp_path: Path):
    with SafetensorsWriter(tmp_path / "w", [("a", "F32", (2,))], {}) as writer:
        with pytest.raises(ValueError, match=r"4 bytes for 'a', which takes 8, once"):
            writer.write("a", np.zeros(4, np.uint8))
        with pytest.raises(ValueError, match=r"\['a'\] were not written"):
            writer.finish()
    with pytest.raises(FileExistsError):
        SafetensorsWriter(tmp_path / "w", [], {})
    with pytest.raises(ValueError, match="not valid Unicode"):
        SafetensorsWriter(tmp_path / "u", [("\ud800", "F32", (2,))], {})
    with pytest.raises(TypeError, match="arrays of type complex128 cannot be stored"):
        dtype_code(np.dtype("complex128"))
    with pytest.raises(TypeError, match="cannot convert to F8_E8M0"):
        encode(np.zeros(2), "F8_E8M0")
    with pytest.raises(ft.InputError, match="NumPy has no such type"):
        decode(np.zeros(2, np.uint8), "F8_E8M0", (2,))


def test_a_disk_that_gives_back_other_bytes_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    writer = SafetensorsWriter(tmp_path / "w", [("a", "F32", (2,))], {})
    writer.write("a", np.zeros(8, np.uint8))
    fsync = os.fsync

    def corrupt(fd: int) -> None:
        os.pwrite(fd, b"\1", os.fstat(fd).st_size - 1)
        fsync(fd)

    monkeypatch.setattr(os, "fsync", corrupt)
    with pytest.raises(OSError, match="does not read back as it was written"):
        writer.finish()


def test_a_file_that_shrinks_under_the_reader_is_an_error_and_no_signal(tmp_path: Path):
    path = tmp_path / "f"
    path.write_bytes(b"12345678")
    with path.open("rb") as file, pytest.raises(ft.InputError, match="ends at byte 8, inside its data"):
        read_span(file.fileno(), 4, 10, path)


def test_a_hundred_thousand_tensors_take_linear_time(tmp_path: Path):
    header = {f"layers.{k}.weight": entry("U8", [1], k, k + 1) for k in range(100_000)}
    path = tmp_path / "many.safetensors"
    path.write_bytes(raw(header, b"\0" * 100_000))
    assert len(ft.open_checkpoint(path)) == 100_000


def test_the_size_limit_of_headers_is_the_format_s():
    assert MAX_HEADER_BYTES == 100_000_000


FLOATS64 = hnp.arrays(np.float64, hnp.array_shapes(max_dims=2, max_side=6), elements=st.floats(width=64))


@given(x=FLOATS64)
def test_bfloat16_is_rounded_once_to_nearest_even(x: np.ndarray):
    """Compared with exact rational arithmetic, subnormals and overflow included."""
    stored = encode(x, "BF16").view(np.uint16).reshape(x.shape)
    for value, code in zip(x.ravel(), stored.ravel()):
        if math.isnan(value):
            assert math.isnan(_bfloat16(int(code)))
        else:
            assert int(code) == _nearest_bfloat16(float(value))


def test_bfloat16_of_float32_is_ml_dtypes_on_every_boundary():
    codes = np.arange(0, 2**16, dtype=np.uint32)
    patterns = np.concatenate([(codes << 16) + tail for tail in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)])
    x = patterns.astype(np.uint32).view(np.float32)
    x = x[~np.isnan(x)]
    np.testing.assert_array_equal(encode(x, "BF16").view(np.uint16), x.astype(ml_dtypes.bfloat16).view(np.uint16))
    np.testing.assert_array_equal(round_to(x, "BF16"), x.astype(ml_dtypes.bfloat16).astype(np.float32))


def test_rounding_twice_would_be_wrong_where_ours_is_right():
    # Just above a tie of bfloat16, by less than float32 can see: rounding through float32 goes down to even.
    x = np.array([1 + 2**-8 + 2**-40])
    twice = x.astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float64)[0]
    assert (twice, float(round_to(x, "BF16")[0])) == (1.0, 1 + 2**-7)


def _bfloat16(code: int) -> float:
    return struct.unpack("<f", struct.pack("<I", code << 16))[0]


def _nearest_bfloat16(value: float) -> int:
    """Round by bisection over the codes of one sign, in exact arithmetic."""
    sign = 0x8000 if math.copysign(1, value) < 0 else 0
    if math.isinf(value):
        return sign | 0x7F80
    target = abs(Fraction(value))
    low, high = 0, 0x7F80
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if Fraction(_bfloat16(middle)) <= target else (low, middle)
    below = Fraction(_bfloat16(low))
    above = Fraction(2) ** 128 if high == 0x7F80 else Fraction(_bfloat16(high))
    if target - below != above - target:
        return sign | (low if target - below < above - target else high)
    return sign | (low if low % 2 == 0 else high)


FLOAT8 = {
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
    "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
}


@pytest.mark.parametrize("code", FLOAT8)
def test_every_8_bit_float_reads_as_its_value(code: str):
    patterns = np.arange(256, dtype=np.uint8)
    oracle = patterns.view(FLOAT8[code]).astype(np.float32)
    read = decode(patterns, code, (256,))
    np.testing.assert_array_equal(read, oracle)
    np.testing.assert_array_equal(np.signbit(read)[~np.isnan(oracle)], np.signbit(oracle)[~np.isnan(oracle)])


@pytest.mark.parametrize("code", FLOAT8)
def test_8_bit_floats_are_rounded_to_nearest_with_ties_to_even(code: str):
    values = np.sort(np.arange(256, dtype=np.uint8).view(FLOAT8[code]).astype(np.float64))
    values = values[np.isfinite(values)]
    middles = (values[1:] + values[:-1]) / 2
    rng = np.random.default_rng(0)
    spread = rng.standard_normal(4000) * 10.0 ** rng.integers(-9, 7, 4000)
    beyond = values[-1] * np.array([1.03, 1.0625, 1.07, 1.125, 1.2, np.inf, np.nan])
    # Beside the ties by a float32's step: the oracle itself rounds to float32 first.
    near = [np.nextafter(middles.astype(np.float32), np.float32(side)).astype(np.float64) for side in (0, np.inf)]
    given = np.concatenate([values, middles, *near, spread, beyond, -beyond])
    with np.errstate(over="ignore", invalid="ignore"):
        oracle = given.astype(FLOAT8[code]).astype(np.float32)
    np.testing.assert_array_equal(decode(encode(given, code), code, given.shape), oracle)


@pytest.mark.parametrize("code", [*FLOAT8, "F16", "BF16", "F32", "F64"])
def test_pieces_are_decoded_as_the_whole_is(code: str):
    raw = np.random.default_rng(0).integers(0, 256, 64, dtype=np.uint8)
    whole = decode(raw, code, (64 * 8 // BITS[code],))
    for dtype in {whole.dtype, np.dtype(np.float64)}:
        with np.errstate(invalid="ignore"):
            np.testing.assert_array_equal(decode_into(raw, code, np.empty(whole.size, dtype)), whole.astype(dtype))
