"""safetensors files, read without copying and written in pieces.

A file is an 8-byte length, a JSON header `{name: {dtype, shape, data_offsets}}` and the tensors'
bytes one after another (https://github.com/huggingface/safetensors#format). Whether a header is
sound the `safetensors` package judges. Reading maps the file into memory, so that arrays are views
whose pages come when they are touched. Writing puts the header first and then any part of any
tensor at its offset, so that a tensor larger than memory can be written layer by layer.
"""

import json
import math
import mmap
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from wanjax.errors import UserError

DTYPES: dict[str, np.dtype] = {
    "BOOL": np.dtype(bool),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_HEADER_LIMIT = 100 << 20
_PIECE = 64 << 20
# Source rows copied at once when a matrix is transposed: a strip of them stays in the cache.
_STRIP = 16


class MappedFile(mmap.mmap):
    """A file mapped to be read, which remembers its place; so every view of it does."""

    path: Path

    @classmethod
    def open(cls, file: BinaryIO, path: Path) -> "MappedFile":
        mapped = cls(file.fileno(), 0, access=mmap.ACCESS_READ)
        mapped.path = path
        return mapped


def mapped_file(array: np.ndarray) -> MappedFile | None:
    """The file of which an array is a view, if it is."""
    owner: object = array
    while owner is not None and not isinstance(owner, MappedFile):
        owner = owner.obj if isinstance(owner, memoryview) else getattr(owner, "base", None)
    return owner


def span(array: np.ndarray, file: MappedFile) -> tuple[int, int]:
    """The bytes of the file under an array: the first, and the one behind the last."""
    origin = np.frombuffer(file, np.uint8, 1).__array_interface__["data"][0]
    first, last = np.lib.array_utils.byte_bounds(array)
    return first - origin, last - origin


@dataclass(frozen=True)
class TensorFile:
    """An open safetensors file: its arrays are read-only views of the mapped file."""

    path: Path
    tensors: dict[str, np.ndarray]
    metadata: dict[str, str]


def read_safetensors(path: Path) -> TensorFile:
    """Open `path`, whose header is sound and declares the file's own size.

    Raises `UserError`, naming the file, where it is missing, truncated or something else.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            header, start = _read_header(file, path, size)
            _check_sound(path, header, start, size)
            data = MappedFile.open(file, path)
    except PermissionError as error:
        raise UserError(f"{path} may not be read; change its permissions.") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); check its name.") from error
    metadata = header.pop("__metadata__", None) or {}
    tensors = {name: _view(data, start, entry, name, path) for name, entry in header.items()}
    return TensorFile(path, tensors, metadata)


def refuse_pointer(path: Path, head: bytes) -> None:
    """Refuse what git leaves in the place of a large file, by its first 8 bytes or more."""
    if head.startswith(b"version "):
        raise UserError(f"{path} is a git-lfs pointer, not the file itself; run `git lfs pull`.")


def _read_header(file, path: Path, size: int) -> tuple[dict, int]:
    first = file.read(8)
    refuse_pointer(path, first)
    length = int.from_bytes(first, "little")
    if len(first) < 8 or length > _HEADER_LIMIT:
        raise UserError(
            f"{path} is not a safetensors file ({size:,} bytes); check its name, or fetch it again."
        )
    if 8 + length > size:
        raise UserError(f"{path} is truncated in its header ({size:,} bytes); fetch it again.")
    try:
        header = json.loads(file.read(length).decode(), object_pairs_hook=_distinct)
        if not isinstance(header, dict):
            raise ValueError("no object")
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path} is not a safetensors file (its header is not JSON as it should be: "
            f"{_short(error)}); check its name, or fetch it again."
        ) from error
    return header, 8 + length


def _distinct(pairs: list[tuple[str, object]]) -> dict:
    """A JSON object, which may hold no name twice: readers would differ on what it says."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found


def _check_sound(path: Path, header: dict, start: int, size: int) -> None:
    """Leave the judgement to the `safetensors` package, and say what is known of the fault."""
    for name, entry in header.items():
        kind = entry.get("dtype") if isinstance(entry, dict) else None
        if name != "__metadata__" and isinstance(kind, str) and kind not in DTYPES:
            raise UserError(
                f"{path} stores the tensor '{_short(name)}' as {_short(kind)}, which is not read "
                "here; use a file in bfloat16, float16 or float32."
            )
    try:
        with safe_open(path, framework="numpy"):
            return
    except SafetensorError as error:
        ends = [_end(entry) for name, entry in header.items() if name != "__metadata__"]
        end = start + max(ends, default=0) if None not in ends else size
        if end == size:
            raise UserError(
                f"{path} is not a sound safetensors file ({_short(error)}); fetch it again."
            ) from error
        fault = "is truncated" if end > size else "has bytes that its header does not name"
        raise UserError(
            f"{path} {fault}: its header declares {end:,} bytes and it has {size:,}; "
            "fetch or write it again."
        ) from error


def _end(entry: object) -> int | None:
    """Where a tensor's bytes end; None where the header does not say it as it should."""
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    if not isinstance(offsets, list) or len(offsets) != 2:
        return None
    whole = all(isinstance(offset, int) and 0 <= offset < 1 << 63 for offset in offsets)
    return offsets[1] if whole else None


def _view(data: mmap.mmap, start: int, entry: dict, name: str, path: Path) -> np.ndarray:
    """A tensor of a sound header as a view of the mapped file."""
    first, last = entry["data_offsets"]
    try:
        flat = np.frombuffer(data, np.uint8, last - first, start + first)
        return flat.view(DTYPES[entry["dtype"]]).reshape(entry["shape"])
    except ValueError as error:  # more axes than NumPy has, or none of its size
        raise UserError(
            f"{path} holds the tensor '{_short(name)}' of {len(entry['shape'])} axes, which is not "
            "read here; fetch it again."
        ) from error


def _short(text: object) -> str:
    """One line of what a file or a library says."""
    return " ".join(str(text).split())[:200]


class SafetensorsWriter:
    """Writes `path`: the header at once, then parts of tensors in any order. Use with `with`.

    `tensors` gives every tensor's type and shape, in the order in which they lie in the file. With
    `resume` a file that was begun in the same way is gone on with, and one begun otherwise refused.
    """

    def __init__(
        self,
        path: Path,
        tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]],
        metadata: Mapping[str, str] | None = None,
        *,
        resume: bool = False,
    ):
        self.path = path
        self._dtypes = {name: np.dtype(dtype) for name, (dtype, _) in tensors.items()}
        header: dict[str, dict] = {"__metadata__": dict(metadata)} if metadata else {}
        self._spans: dict[str, tuple[int, int]] = {}
        end = 0
        for name, (dtype, shape) in tensors.items():
            first, end = end, end + math.prod(shape) * np.dtype(dtype).itemsize
            self._spans[name] = (first, end)
            header[name] = {
                "dtype": _NAMES[np.dtype(dtype)],
                "shape": list(shape),
                "data_offsets": [first, end],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % 64)  # aligned data can be handed to devices as it lies
        self._start, self._missing = 8 + len(text), end
        text = len(text).to_bytes(8, "little") + text
        flags = os.O_RDWR if resume else os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        self._fd = os.open(path, flags, 0o644)
        if resume and os.pread(self._fd, len(text), 0) != text:
            os.close(self._fd)
            raise UserError(f"{path} was begun otherwise than it would be gone on with; remove it.")
        self._write_at(text, 0)

    def write(self, name: str, part: np.ndarray, at: int = 0) -> None:
        """Write `part`, which begins `at` elements into the tensor, in its type."""
        dtype = self._dtypes[name]
        first, last = self._spans[name]
        offset = first + at * dtype.itemsize
        if offset + part.size * dtype.itemsize > last:
            raise ValueError(f"part of {part.shape} at {at} runs over the end of '{name}'")
        for piece in pieces(part, dtype):
            self._write_at(piece.data, self._start + offset)
            offset += piece.nbytes
            self._missing -= piece.nbytes

    def skip(self, nbytes: int) -> None:
        """So many bytes lie in the file from before."""
        self._missing -= nbytes

    def sync(self) -> None:
        """What was written until now outlives a loss of power."""
        os.fsync(self._fd)

    def _write_at(self, data: bytes | memoryview, offset: int) -> None:
        data = memoryview(data)
        while data:
            written = os.pwrite(self._fd, data, offset)
            data, offset = data[written:], offset + written

    def __enter__(self) -> "SafetensorsWriter":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        try:
            if kind is None:
                if self._missing:
                    raise ValueError(f"{self._missing} bytes of {self.path} were never written")
                os.fsync(self._fd)
        finally:
            os.close(self._fd)


def pieces(array: np.ndarray, dtype: np.dtype) -> Iterator[np.ndarray]:
    """The array in C order and in `dtype`, as flat byte arrays of moderate size."""
    if not array.flags.c_contiguous:
        array = contiguous(array, dtype)
    flat = array.reshape(-1)
    step = _PIECE // max(dtype.itemsize, flat.dtype.itemsize)
    for i in range(0, flat.size, step):
        yield flat[i : i + step].astype(dtype, copy=False).view(np.uint8)


def contiguous(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """A copy in C order; a transposed matrix is copied in strips, five times as fast as at once."""
    if array.ndim != 2 or not array.T.flags.c_contiguous:
        return array.astype(dtype, order="C")
    out = np.empty(array.shape, dtype)
    for i in range(0, array.shape[1], _STRIP):
        out[:, i : i + _STRIP] = array[:, i : i + _STRIP].astype(dtype, order="K", copy=False)
    return out


def drop_pages(array: np.ndarray) -> None:
    """Let go of the mapped pages under `array`, if it is a view of a mapped file."""
    mapping = mapped_file(array)
    if mapping is None:
        return
    first, last = span(array, mapping)
    first = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE  # whole pages of ours only
    last = last // mmap.PAGESIZE * mmap.PAGESIZE
    if last > first:
        mapping.madvise(mmap.MADV_DONTNEED, first, last - first)
