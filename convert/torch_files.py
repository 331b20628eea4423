"""PyTorch's `.pth` files, read and written without PyTorch.

Such a file is an uncompressed zip archive: `data.pkl` is a pickle whose tensors point at raw
storages, the members `data/0`, `data/1`, ... A pickle can name any function to be called, so ours
is read by an unpickler that knows how to build tensors and nothing else; anything more is refused
by its name. Storages are views of the mapped file. Source: `torch/serialization.py`.
"""

import io
import math
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import ml_dtypes
import numpy as np

from convert.stream import Advance, Planned
from wanjax.errors import UserError
from wanjax.tensor_files import MappedFile, refuse_pointer

STORAGES: dict[str, np.dtype] = {
    "DoubleStorage": np.dtype(np.float64),
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(bool),
}
_STORAGE_NAMES = {dtype: name for name, dtype in STORAGES.items()}
_WRAPPERS = ("state_dict", "model", "module", "model_state_dict")
_ALIGN = 64  # as torch.save aligns storages


def read_torch(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a `.pth` state dict as read-only views of the file, by name.

    A dict that wraps the state dict (`{"state_dict": ...}`) is opened. Raises `UserError`, naming
    the file, where it is missing, truncated, of the old format, or holds anything but tensors.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            if file.read(4) != b"PK\x03\x04":
                raise _not_a_zip(path)
            data = MappedFile.open(file, path)
            members = _members(path, file, data)
    except PermissionError as error:
        raise UserError(f"{path} may not be read; change its permissions.") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); check its name.") from error
    root = next((name[: -len("data.pkl")] for name in members if name.endswith("data.pkl")), None)
    if root is None:
        raise UserError(f"{path} is a zip archive but no .pth file; check its name.")
    if bytes(members.get(f"{root}byteorder", b"little")) != b"little":
        raise UserError(f"{path} was saved big-endian; save it again on a little-endian machine.")
    loaded = _TensorUnpickler(path, members, root).load_state()
    return _state_dict(loaded, path)


def _not_a_zip(path: Path) -> UserError:
    with path.open("rb") as file:
        head = file.read(8)
    refuse_pointer(path, head)
    old = head.startswith(b"\x80\x02")
    kind = "was saved by a PyTorch before 1.6" if old else "is not a .pth file"
    remedy = "save it again with a newer one" if old else "check its name, or fetch it again"
    return UserError(f"{path} {kind}; {remedy}.")


def _members(path: Path, file: io.BufferedReader, data: MappedFile) -> dict[str, memoryview]:
    """The archive's members as views of the mapped file."""
    try:
        entries = zipfile.ZipFile(file).infolist()
    except Exception as error:  # an archive can be wrong in any way
        raise UserError(f"{path} is truncated or damaged ({error}); fetch it again.") from error
    view, members = memoryview(data), {}
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED:
            raise UserError(
                f"{path} is compressed ('{entry.filename}'), which torch.save does not do; "
                "unpack it and save the tensors again, as safetensors for instance."
            )
        local = data[entry.header_offset : entry.header_offset + 30]
        if len(local) < 30 or local[:4] != b"PK\x03\x04":
            raise UserError(f"{path} is damaged at '{entry.filename}'; fetch it again.")
        start = entry.header_offset + 30 + sum(struct.unpack("<HH", local[26:30]))
        if start + entry.file_size > len(data):
            raise UserError(f"{path} is truncated at '{entry.filename}'; fetch it again.")
        members[entry.filename] = view[start : start + entry.file_size]
    return members


class _Known:
    """A stand-in for one of torch's names: it can be called, and nothing can be done to it."""

    __slots__ = ("call",)

    def __init__(self, call):
        self.call = call

    def __call__(self, *arguments):
        return self.call(*arguments)

    def __setstate__(self, state):
        raise pickle.UnpicklingError("state given to a function")


class _TensorUnpickler(pickle.Unpickler):
    def __init__(self, path: Path, members: dict[str, memoryview], root: str):
        super().__init__(io.BytesIO(members[f"{root}data.pkl"]))
        self._path, self._members, self._root = path, members, root

    def load_state(self) -> object:
        try:
            return self.load()
        except UserError:
            raise
        except Exception as error:  # a pickle can be wrong in any way
            raise UserError(
                f"{self._path} holds a broken pickle ({error}); fetch it again."
            ) from error

    def find_class(self, module: str, name: str) -> object:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch._utils" and name in ("_rebuild_tensor_v2", "_rebuild_tensor"):
            return _Known(self._tensor)
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return _Known(lambda tensor, *_: tensor)
        if module == "torch" and name in STORAGES:
            return _Known(STORAGES[name])
        raise UserError(
            f"{self._path} asks for '{module}.{name}', which is no tensor and is not run here; "
            "use a file that holds only the weights, as safetensors or a plain state dict."
        )

    def persistent_load(self, reference: tuple) -> np.ndarray:
        kind, storage, key, _, count = reference
        if kind != "storage" or not isinstance(storage, _Known):
            raise pickle.UnpicklingError("an unknown kind of storage")
        dtype, name = storage.call, f"{self._root}data/{key}"
        if name not in self._members or len(self._members[name]) < count * dtype.itemsize:
            raise UserError(f"{self._path} lacks the storage '{name}'; fetch it again.")
        return np.frombuffer(self._members[name], dtype, count)

    def _tensor(self, storage: np.ndarray, offset: int, shape: tuple, stride: tuple, *_):
        """A view of a storage, within its bounds."""
        sizes = all(n >= 0 for n in (offset, *shape, *stride)) and len(shape) == len(stride)
        last = offset + sum((n - 1) * s for n, s in zip(shape, stride, strict=False))
        if not sizes or (math.prod(shape) and last >= storage.size):
            raise pickle.UnpicklingError(f"a tensor of shape {shape} outside its storage")
        if not math.prod(shape):
            return np.empty(shape, storage.dtype)
        steps = [s * storage.dtype.itemsize for s in stride]
        return np.lib.stride_tricks.as_strided(storage[offset:], shape, steps, writeable=False)


def _state_dict(loaded: object, path: Path) -> dict[str, np.ndarray]:
    """The dict of tensors, perhaps inside another dict; non-tensors beside them are refused."""
    for _ in range(3):
        inner = isinstance(loaded, dict) and [
            k for k in _WRAPPERS if isinstance(loaded.get(k), dict)
        ]
        if not inner:
            break
        loaded = loaded[inner[0]]
    if not isinstance(loaded, dict) or not loaded:
        raise UserError(f"{path} holds no tensors by name; save a model's state_dict().")
    for name, value in loaded.items():
        if not isinstance(name, str) or not isinstance(value, np.ndarray):
            raise UserError(
                f"{path} holds '{name}', a {type(value).__name__}, among its tensors; "
                "save only a model's state_dict()."
            )
    return dict(loaded)


def write_torch(path: Path, tensors: Sequence[Planned], advance: Advance) -> None:
    """A `.pth` of the tensors as `torch.save(state_dict)` would lay it out, written in one pass."""
    with path.open("wb") as file:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            _add(archive, "data.pkl", [_pickle(tensors)])
            _add(archive, "byteorder", [b"little"])
            for number, tensor in enumerate(tensors):
                _add(archive, f"data/{number}", tensor.stream(), advance)
            _add(archive, "version", [b"3\n"])
        file.flush()
        os.fsync(file.fileno())


def _add(archive: zipfile.ZipFile, name: str, chunks, advance: Advance = lambda _: None) -> None:
    entry = zipfile.ZipInfo(f"archive/{name}", (1980, 1, 1, 0, 0, 0))
    # The padding that puts the bytes on a multiple of 64: a field "FB", as torch names it. The
    # zip64 field of 20 bytes, which `zipfile` appends, counts too.
    fixed = archive.fp.tell() + 30 + len(entry.filename) + 4 + 20
    padding = -fixed % _ALIGN
    entry.extra = b"FB" + struct.pack("<H", padding) + b"Z" * padding
    with archive.open(entry, "w", force_zip64=True) as member:
        for chunk in chunks:
            member.write(chunk)
            advance(len(chunk))
            del chunk  # or it would live on beside the next


def _pickle(tensors: Sequence[Planned]) -> bytes:
    """The state dict as pickle opcodes, protocol 2, each tensor alone in a storage of its own."""
    out = [pickle.PROTO, b"\x02", _global("collections", "OrderedDict"), b")R", pickle.MARK]
    for number, tensor in enumerate(tensors):
        if tensor.dtype not in _STORAGE_NAMES:
            raise UserError(f"A .pth file cannot hold '{tensor.name}' of type {tensor.dtype}.")
        storage = _global("torch", _STORAGE_NAMES[tensor.dtype])
        strides = [math.prod(tensor.shape[i + 1 :]) for i in range(len(tensor.shape))]
        size = math.prod(tensor.shape)
        out += [
            *(_text(tensor.name), _global("torch._utils", "_rebuild_tensor_v2"), pickle.MARK),
            *(pickle.MARK, _text("storage"), storage, _text(str(number)), _text("cpu")),
            *(_integer(size), pickle.TUPLE, pickle.BINPERSID),
            *(_integer(0), _integers(tensor.shape), _integers(strides), pickle.NEWFALSE),
            *(_global("collections", "OrderedDict"), b")R", pickle.TUPLE, pickle.REDUCE),
        ]
    return b"".join([*out, pickle.SETITEMS, pickle.STOP])


def _global(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()


def _text(value: str) -> bytes:
    data = value.encode()
    return pickle.BINUNICODE + struct.pack("<I", len(data)) + data


def _integer(value: int) -> bytes:
    if value < 1 << 31:
        return pickle.BININT + struct.pack("<i", value)
    return pickle.LONG1 + b"\x08" + struct.pack("<q", value)


def _integers(values: Sequence[int]) -> bytes:
    return pickle.MARK + b"".join(map(_integer, values)) + pickle.TUPLE
