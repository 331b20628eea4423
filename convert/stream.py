"""Tensors on their way from mapped files to a new one, without ever being held whole together.

A `Planned` tensor is a name, a type, a shape and the views that make it up, one after another: the
layers of a stacked leaf of ours, or the parts of a fused matrix of theirs. Everything that this
package writes is a list of these.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from wanjax.tensor_files import SafetensorsWriter, drop_pages, pieces

Advance = Callable[[float], None]


@dataclass(frozen=True)
class Planned:
    """A tensor to be written: `parts`, laid one after another and cast to `dtype`."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    parts: tuple[np.ndarray, ...]
    alter: Callable[[int, np.ndarray], np.ndarray] | None = None
    """What the n-th part becomes on its way, of the same shape."""

    @property
    def nbytes(self) -> int:
        return sum(part.size for part in self.parts) * self.dtype.itemsize

    def stream(self) -> Iterator[np.ndarray]:
        """Its bytes in order; mapped pages are let go of as soon as they are through."""
        for i, part in enumerate(self.parts):
            yield from pieces(part if self.alter is None else self.alter(i, part), self.dtype)
            drop_pages(part)


def plan(name: str, array: np.ndarray) -> Planned:
    """One array as it is."""
    return Planned(name, array.dtype, array.shape, (array,))


def write_safetensors(
    path: Path, tensors: Sequence[Planned], metadata: Mapping[str, str], advance: Advance
) -> None:
    """A safetensors file of the tensors in their order; `advance` is told of bytes written."""
    header = {t.name: (t.dtype, t.shape) for t in tensors}
    with SafetensorsWriter(path, header, metadata) as writer:
        for tensor in tensors:
            at = 0
            for piece in tensor.stream():
                writer.write(tensor.name, piece.view(tensor.dtype), at)
                at += piece.nbytes // tensor.dtype.itemsize
                advance(piece.nbytes)
                del piece  # or it would live on beside the next
