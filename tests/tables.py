"""A table of names applied to tensors in memory, for models that are small; convert streams."""

from collections.abc import Iterable, Mapping

import numpy as np

from convert.table import Row, check_names, expand


def to_native(
    rows: Iterable[Row], layout: str, layers: int, tensors: Mapping[str, np.ndarray], where: str
) -> dict[str, np.ndarray]:
    """Their tensors as ours."""
    entries = expand(rows, layout, layers)
    check_names(tensors, (e.theirs for e in entries), where=where)
    leaves: dict[str, list[np.ndarray]] = {}
    stacked = {e.ours: e.layer is not None for e in entries}
    for e in entries:
        piece = np.split(tensors[e.theirs], e.parts)[e.part] if e.parts > 1 else tensors[e.theirs]
        leaves.setdefault(e.ours, []).append(e.op.to_ours(piece))
    return {k: np.stack(v) if stacked[k] else v[0] for k, v in leaves.items()}


def from_native(
    rows: Iterable[Row], layout: str, layers: int, leaves: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Our tensors as theirs: the inverse of `to_native`."""
    parts: dict[str, dict[int, np.ndarray]] = {}
    for e in expand(rows, layout, layers):
        leaf = leaves[e.ours] if e.layer is None else leaves[e.ours][e.layer]
        parts.setdefault(e.theirs, {})[e.part] = e.op.to_theirs(leaf)
    return {
        name: np.concatenate([p[i] for i in range(len(p))]) if len(p) > 1 else p[0]
        for name, p in parts.items()
    }
