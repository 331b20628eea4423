"""One table of tensor names per network, read in both directions.

A `Row` pairs our name with the official and the diffusers name and an invertible `Op`. `{i}` stands
for a layer's number; where it occurs on their side only, the layers are stacked along a new first
axis of ours. A suffix `[p/n]` on their side means the p-th of n equal parts along the first axis
(Wan's CLIP keeps q, k and v in one matrix). A column that is None has no such tensor.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from wanjax.errors import UserError, nearest


@dataclass(frozen=True)
class Op:
    """An invertible change of layout, from a tensor of theirs to one of ours and back."""

    to_ours: Callable[[np.ndarray], np.ndarray]
    to_theirs: Callable[[np.ndarray], np.ndarray]


def _permute(*axes: int) -> Op:
    inverse = tuple(np.argsort(axes))
    return Op(lambda x: x.transpose(axes), lambda x: x.transpose(inverse))


def lead(count: int) -> Op:
    """Their tensor has `count` leading axes of size 1 that ours has not."""
    return Op(lambda x: x.reshape(x.shape[count:]), lambda x: x.reshape((1,) * count + x.shape))


def trail(count: int) -> Op:
    """Their tensor has `count` trailing axes of size 1 that ours has not."""
    return Op(
        lambda x: x.reshape(x.shape[: x.ndim - count]), lambda x: x.reshape(x.shape + (1,) * count)
    )


SAME = Op(lambda x: x, lambda x: x)
LINEAR = _permute(1, 0)  # (out, in) -> (in, out)
CONV2D = _permute(2, 3, 1, 0)  # (O, I, H, W) -> (H, W, I, O)
CONV3D = _permute(2, 3, 4, 1, 0)  # (O, I, T, H, W) -> (T, H, W, I, O)


@dataclass(frozen=True)
class Row:
    """One line of a table: our name, the official and the diffusers name, and the layout change."""

    ours: str
    official: str | None
    diffusers: str | None
    op: Op = SAME

    def theirs(self, layout: str) -> str | None:
        return {"official": self.official, "diffusers": self.diffusers}[layout]


@dataclass(frozen=True)
class Entry:
    """A row for one layer: `theirs[part of parts] <-> ours[layer]` (or all of `ours`)."""

    ours: str
    layer: int | None
    theirs: str
    part: int
    parts: int
    op: Op


_PART = re.compile(r"^(.*)\[(\d+)/(\d+)\]$")


def expand(rows: Iterable[Row], layout: str, layers: int) -> list[Entry]:
    """Every tensor of one layout: rows with `{i}` are repeated for each of `layers` layers."""
    entries = []
    for row in rows:
        theirs = row.theirs(layout)
        if theirs is None:
            continue
        match = _PART.match(theirs)
        name, part, parts = match.groups() if match else (theirs, 0, 1)
        for layer in range(layers) if "{i}" in name else (None,):
            full = name if layer is None else name.replace("{i}", str(layer))
            entries.append(Entry(row.ours, layer, full, int(part), int(parts), row.op))
    return entries


def linear(ours: str, official: str, diffusers: str, *, bias: bool = True) -> list[Row]:
    """The rows of a Linear layer: `kernel` and, unless `bias=False`, `bias`."""
    rows = [Row(f"{ours}.kernel", f"{official}.weight", f"{diffusers}.weight", LINEAR)]
    if bias:
        rows.append(Row(f"{ours}.bias", f"{official}.bias", f"{diffusers}.bias"))
    return rows


def check_names(present: Iterable[str], expected: Iterable[str], *, where: str) -> None:
    """Refuse missing and stray tensors, by name."""
    present, expected = set(present), set(expected)
    if missing := sorted(expected - present):
        raise UserError(
            f"{where} lacks the tensor '{missing[0]}' ({len(missing)} missing in all); "
            "fetch the checkpoint again, or check that it is the model that its config says."
        )
    if stray := sorted(present - expected):
        raise UserError(
            f"{where} holds a tensor that does not belong to this model, '{stray[0]}' "
            f"({len(stray)} such in all){nearest(stray[0], expected)}"
        )
