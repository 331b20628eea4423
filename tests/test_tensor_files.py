"""safetensors files whose headers are not what they should be: a sentence, never a traceback."""

import json
import os
import struct

import numpy as np
import pytest
from safetensors.numpy import save_file

from wanjax.errors import UserError
from wanjax.tensor_files import read_safetensors


def entry(dtype="F32", shape=(4,), offsets=(0, 16)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def write(path, header, data=bytes(16)):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


ONE = json.dumps({"a": entry()})[1:-1].encode()
HOSTILE = {
    "a list": [1],
    "null": None,
    "a string": "a",
    "no JSON": b"{]",
    "no UTF-8": b'{"\xff": 1}',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "empty": b"",
    "deeply nested": b"[" * 100_000,
    "a number of 5,000 digits": b'{"a": ' + b"9" * 5000 + b"}",
    "a name twice": b"{" + ONE + b"," + ONE + b"}",
    "a field twice": b'{"a": {"dtype": "F32", ' + ONE[6:] + b"}",
    "no tensor": {},
    "overlap": {"a": entry(shape=(2,), offsets=(0, 8)), "b": entry(shape=(3,), offsets=(4, 16))},
    "the same bytes twice": {"a": entry(), "b": entry()},
    "a hole": {"a": entry(shape=(1,), offsets=(0, 4)), "b": entry(shape=(2,), offsets=(8, 16))},
    "a hole before": {"a": entry(shape=(3,), offsets=(4, 16))},
    "bytes after": {"a": entry(shape=(3,), offsets=(0, 12))},
    "beyond the end": {"a": entry(shape=(8,), offsets=(0, 32))},
    "backwards": {"a": entry(offsets=(16, 0))},
    "negative offsets": {"a": entry(offsets=(-16, 0))},
    "a huge offset": {"a": entry(offsets=(0, 10**4000))},
    "three offsets": {"a": entry(offsets=(0, 8, 16))},
    "text for offsets": {"a": {**entry(), "data_offsets": "ab"}},
    "negative shape": {"a": entry(shape=(-2, -2))},
    "float shape": {"a": entry(shape=(4.0,))},
    "text shape": {"a": entry(shape=("4",))},
    "true for a shape": {"a": entry(shape=(True,), offsets=(0, 4))},
    "infinite shape": {"a": entry(shape=(float("inf"),))},
    "a product that overflows": {"a": entry(shape=(2**62, 8, 2**62))},
    "another size": {"a": entry(shape=(5,))},
    "another type": {"a": entry("F64")},
    "none of a huge size": {"a": entry(shape=(0, 2**62), offsets=(0, 0)), "b": entry()},
    "a hundred axes": {"a": entry(shape=(*[1] * 100, 4))},
    "an unknown type": {"a": entry("F4")},
    "a type that is no text": {"a": entry(["F32"])},
    "no type": {"a": {"shape": [4], "data_offsets": [0, 16]}},
    "an entry that is a list": {"a": [1]},
    "an entry that is null": {"a": None},
    "metadata of numbers": {"__metadata__": {"a": 1}, "a": entry()},
    "metadata in a list": {"__metadata__": ["a"], "a": entry()},
    "a name of megabytes": {"x" * (1 << 20): entry("y" * (1 << 20))},
}  # fmt: skip


@pytest.mark.parametrize("header", HOSTILE.values(), ids=HOSTILE)
def test_hostile_headers_are_refused_in_a_sentence(header, tmp_path):
    path = tmp_path / "x.safetensors"
    write(path, header)
    with pytest.raises(UserError, match=r"x\.safetensors ") as caught:
        read_safetensors(path)
    assert len(str(caught.value)) < 700 and "\n" not in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"\1", struct.pack("<Q", 1 << 63) + b"{}", bytes(8)])
def test_no_header_at_all(data, tmp_path):
    (tmp_path / "x.safetensors").write_bytes(data)
    with pytest.raises(UserError, match="is not a safetensors file"):
        read_safetensors(tmp_path / "x.safetensors")


def test_what_is_sound_is_read(tmp_path):
    """An empty tensor, other fields, and metadata, or none of it, are no fault."""
    path = tmp_path / "x.safetensors"
    empty = entry(shape=(0, 3), offsets=(0, 0))
    write(path, {"__metadata__": None, "e": empty, "a": {**entry(), "more": 1}})
    found = read_safetensors(path)
    assert found.metadata == {} and found.tensors["e"].shape == (0, 3)
    numbers = {"a": np.arange(6, dtype=np.int16).reshape(2, 3), "b": np.full((), 3.5)}
    save_file(numbers, path, {"format": "pt"})
    found = read_safetensors(path)
    assert found.metadata == {"format": "pt"}
    for name, array in numbers.items():
        np.testing.assert_array_equal(found.tensors[name], array)


def test_truncation_is_told_from_other_faults(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": np.ones((8, 8), np.float32)}, path)
    size = path.stat().st_size
    os.truncate(path, size - 1)
    with pytest.raises(UserError, match=f"is truncated: .* {size:,} bytes and it has {size - 1:,}"):
        read_safetensors(path)


def test_what_may_not_be_read_gets_that_remedy(tmp_path, monkeypatch):
    def closed(*_):
        raise PermissionError(13, "Permission denied")

    (tmp_path / "x.safetensors").write_bytes(b"x")
    monkeypatch.setattr("pathlib.Path.open", closed)
    with pytest.raises(UserError, match=r"x\.safetensors may not be read; change its permissions"):
        read_safetensors(tmp_path / "x.safetensors")
