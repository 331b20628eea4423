"""`.pth` files: read without torch just as torch reads them, and nothing in them is ever run."""

import collections
import io
import os
import pickle
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from convert.stream import plan
from convert.torch_files import read_torch, write_torch
from wanjax.errors import UserError

TYPES = (np.float32, ml_dtypes.bfloat16, np.float16, np.int64, np.uint8, bool)


def random_arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    arrays = {
        np.dtype(t).name: rng.integers(0, 2, (3, 5)).astype(t) * np.array(1, t) for t in TYPES
    }
    arrays["float32"] = rng.standard_normal((3, 5), np.float32)
    arrays |= {"scalar": np.float32(2.5).reshape(()), "empty": np.zeros((0, 4), np.float32)}
    return arrays


def write(path: Path, arrays: dict[str, np.ndarray]) -> None:
    write_torch(path, [plan(n, a) for n, a in arrays.items()], lambda _: None)


def archive(path: Path, data: bytes, members: dict[str, bytes] | None = None, **options) -> Path:
    """A zip laid out as torch's, around any pickle."""
    with zipfile.ZipFile(path, "w", **options) as file:
        file.writestr("a/data.pkl", data)
        for name, content in (members or {}).items():
            file.writestr(f"a/{name}", content)
    return path


def test_what_is_written_reads_back_bit_for_bit(tmp_path):
    arrays = random_arrays()
    arrays["transposed"] = np.arange(6000, dtype=np.float32).reshape(60, 100).T
    write(tmp_path / "x.pth", arrays)
    back = read_torch(tmp_path / "x.pth")
    assert list(back) == list(arrays)
    for name, array in arrays.items():
        assert (back[name].dtype, back[name].shape) == (array.dtype, array.shape), name
        assert back[name].tobytes() == array.tobytes(), name


def test_storages_lie_aligned(tmp_path):
    write(tmp_path / "x.pth", random_arrays())
    with zipfile.ZipFile(tmp_path / "x.pth") as file:
        assert file.testzip() is None
        for info in file.infolist():
            file.fp.seek(info.header_offset + 26)
            sizes = np.frombuffer(file.fp.read(4), "<u2").astype(int)
            assert (info.header_offset + 30 + sizes.sum()) % 64 == 0, info.filename


def test_torch_reads_what_is_written(tmp_path):
    torch = pytest.importorskip("torch")
    arrays = random_arrays()
    write(tmp_path / "x.pth", arrays)
    for mapped in (False, True):
        back = torch.load(tmp_path / "x.pth", weights_only=True, mmap=mapped)
        assert list(back) == list(arrays)
        for name, array in arrays.items():
            assert tuple(back[name].shape) == array.shape, name
            tensor = back[name].contiguous().flatten()
            got = tensor.view(torch.uint8) if tensor.numel() else tensor
            assert got.numpy().tobytes() == array.tobytes(), name


def test_what_torch_writes_is_read(tmp_path):
    """Views with offsets and strides, shared storages, parameters, an outer dict."""
    torch = pytest.importorskip("torch")
    base = torch.randn(6, 5)
    state = collections.OrderedDict(
        base=base,
        row=base[2],
        block=base[1:4, 2:],
        transposed=base.T,
        parameter=torch.nn.Parameter(torch.randn(3)),
        half=torch.randn(3).bfloat16(),
        scalar=torch.tensor(7),
    )
    for wrapped in (state, {"state_dict": state, "epoch": 3}, {"model": {"module": state}}):
        torch.save(wrapped, tmp_path / "x.pth")
        back = read_torch(tmp_path / "x.pth")
        assert list(back) == list(state)
        for name, tensor in state.items():
            want = tensor.detach()
            assert back[name].shape == tuple(want.shape), name
            assert np.array_equal(back[name].astype(np.float32), want.float().numpy()), name
    torch.save(torch.nn.Linear(2, 3).state_dict(), tmp_path / "y.pth")  # carries `_metadata`
    assert read_torch(tmp_path / "y.pth").keys() == {"weight", "bias"}


class Bomb:
    """Pickles to a call; were it run, a file would appear."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("bomb", "name"),
    [
        (Bomb(os.system, "touch exploded"), "system"),
        (Bomb(eval, "open('exploded', 'w')"), "eval"),
        (Bomb(getattr, dict, "fromkeys"), "getattr"),
        (io.BytesIO(b""), "BytesIO"),
    ],
    ids=["os.system", "eval", "getattr", "object"],
)
def test_calls_are_refused_by_name_and_not_run(bomb, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = archive(tmp_path / "x.pth", pickle.dumps({"a": bomb}, protocol=2))
    with pytest.raises(UserError, match=rf"x\.pth .*{name}"):
        read_torch(path)
    assert not (tmp_path / "exploded").exists()


def tensor_pickle(offset: int, shape: tuple, stride: tuple, count: int = 4) -> bytes:
    """A pickle of one float32 tensor over a storage of `count`, with any geometry."""

    def number(n):
        return b"J" + int(n).to_bytes(4, "little", signed=True)

    def numbers(values):
        return b"(" + b"".join(map(number, values)) + b"t"

    def text(value):
        return b"X" + len(value).to_bytes(4, "little") + value

    storage = b"(" + text(b"storage") + b"ctorch\nFloatStorage\n" + text(b"0") + text(b"cpu")
    storage += number(count) + b"tQ"
    call = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + number(offset)
    call += numbers(shape) + numbers(stride) + b"\x89N" + b"tR"
    return b"\x80\x02}" + text(b"a") + call + b"s."


@pytest.mark.parametrize(
    ("offset", "shape", "stride", "count"),
    [
        (0, (5,), (1,), 4),
        (2, (2, 2), (2, 1), 4),
        (-1, (2,), (1,), 4),
        (0, (2,), (-1,), 4),
        (0, (2, 2), (1 << 30, 1), 4),
        (0, (2,), (1, 1), 4),
        (0, (4,), (1,), 5),
    ],
)
def test_no_tensor_reaches_outside_its_storage(offset, shape, stride, count, tmp_path):
    data = tensor_pickle(offset, shape, stride, count)
    path = archive(tmp_path / "x.pth", data, {"data/0": np.arange(4, dtype="f4").tobytes()})
    with pytest.raises(UserError, match=r"x\.pth"):
        read_torch(path)


def test_a_tensor_inside_its_storage_is_read(tmp_path):
    data = tensor_pickle(1, (3,), (1,))
    path = archive(tmp_path / "x.pth", data, {"data/0": np.arange(4, dtype="f4").tobytes()})
    assert read_torch(path)["a"].tolist() == [1, 2, 3]


def test_other_files_are_refused_with_the_remedy(tmp_path):
    def refused(content: bytes | Path, match: str) -> None:
        path = content if isinstance(content, Path) else tmp_path / "x.pth"
        if isinstance(content, bytes):
            path.write_bytes(content)
        with pytest.raises(UserError, match=match):
            read_torch(path)

    write(tmp_path / "good.pth", random_arrays())
    good = (tmp_path / "good.pth").read_bytes()
    for length in (len(good) - 1, len(good) // 2, 100, 10):
        refused(good[:length], r"x\.pth is truncated or damaged")
    refused(b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.", "before 1.6; save it again")
    refused(b"hello", "is not a .pth file")
    refused(b"", "is not a .pth file")
    refused(tmp_path / "none.pth", "none.pth cannot be read")
    empty = pickle.dumps({}, protocol=2)
    refused(archive(tmp_path / "x.pth", empty), "no tensors by name")
    odd = pickle.dumps({"a": 3}, protocol=2)
    refused(archive(tmp_path / "x.pth", odd), "holds 'a', a int, among its tensors")
    squeezed = archive(tmp_path / "x.pth", empty, compression=zipfile.ZIP_DEFLATED)
    refused(squeezed, "is compressed")
    big = archive(tmp_path / "x.pth", empty, {"byteorder": b"big"})
    refused(big, "big-endian")
    missing = archive(tmp_path / "x.pth", tensor_pickle(0, (4,), (1,)))
    refused(missing, "lacks the storage 'a/data/0'")


def test_legacy_format_of_torch(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"a": torch.ones(2)}, tmp_path / "x.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match="before 1.6"):
        read_torch(tmp_path / "x.pth")


def test_damage_of_any_kind_is_one_sentence(tmp_path):
    """A few bytes changed anywhere: tensors still, or a refusal that names the file."""
    write(tmp_path / "x.pth", {"a": np.ones((3, 4), np.float32), "b": np.zeros(2, np.float32)})
    data, rng = (tmp_path / "x.pth").read_bytes(), np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        spoilt = np.frombuffer(data, np.uint8).copy()
        spoilt[rng.integers(0, len(spoilt), 5)] = rng.integers(0, 256, 5)
        (tmp_path / "y.pth").write_bytes(spoilt.tobytes())
        try:
            read_torch(tmp_path / "y.pth")
        except UserError as error:
            assert "y.pth" in str(error)
            refused += 1
    assert 100 < refused < 300
