"""`python -m convert lora-info`: what an adapter does to which layers, and who would take it."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np

from convert.loaders import described
from convert.lora_read import Entry, read_entries
from convert.lora_write import each, each_change
from wanjax.checkpoint import is_native_adapter, load_lora
from wanjax.lora import LoRA
from wanjax.tensor_files import read_safetensors

_HEAD = ("layer", "blocks", "rank", "scale", "norm of the change")


@dataclass(frozen=True)
class Fact:
    """One layer of one block (None: outside of the blocks), or a parameter changed as it stands."""

    name: str
    block: int | None
    rank: int
    scale: float
    norm: float


def lora_info(path: Path) -> str:
    """A report of a run or an adapter file."""
    path, names = Path(path), None
    if path.is_dir() or not path.exists() or is_native_adapter(read_safetensors(path).metadata):
        lora = load_lora(path)
        facts, metadata = list(_facts(lora)), lora.metadata
    else:
        file = read_safetensors(path)
        entries = read_entries(file, skip_unmatched=True)
        facts = [fact for entry in entries for fact in _facts_of_entry(entry)]
        metadata, names = file.metadata, list(file.tensors)
    lines = [f"{path}: {_total(facts)}", *_table(facts)]
    if names is not None:
        matched = sum(len(entry.keys) for entry in entries)
        lines += [f"tensors: {matched:,} matched, {len(names) - matched:,} unmatched"]
        lines += [described(names)]
    else:
        lines += ["for wanjax; python -m convert lora writes it for others"]
    return "\n".join(lines + [f"{name}: {_short(value)}" for name, value in metadata.items()])


def _total(facts: list[Fact]) -> str:
    pairs = [fact for fact in facts if fact.rank]
    changed = len(facts) - len(pairs)
    blocks = {fact.block for fact in facts}
    inside = [f"in {len(blocks - {None})} blocks"] if blocks - {None} else []
    where = " and ".join(
        inside + ["outside of them" if inside else "outside of the blocks"] * (None in blocks)
    )
    whole = f" and {changed:,} parameters changed as they stand" if changed else ""
    return f"{len(pairs):,} adapted matrices{whole}, {where}"


def _facts(lora: LoRA) -> Iterable[Fact]:
    for name, adapter in lora.layers.items():
        for block, down, up in each(adapter, name):
            norm = _norm(down.T, up.T, adapter.scale)
            yield Fact(name, block, adapter.rank, adapter.scale, norm)
    for name, change in lora.changes.items():
        for block, values in each_change(name, change):
            yield Fact(name, block, 0, 1.0, float(np.linalg.norm(values)))


def _facts_of_entry(entry: Entry) -> Iterable[Fact]:
    parts = {part: np.asarray(t, np.float32) for part, t in entry.parts.items()}
    if entry.rank:
        name = entry.module.layer or entry.module.official
        norm = _norm(parts["down"], parts["up"], entry.scale)
        yield Fact(name, entry.block, entry.rank, entry.scale, norm)
    for part in ("diff", "diff_m", "diff_b", "up_bias"):
        if part in parts:
            row = entry.module.bias if part in ("diff_b", "up_bias") else entry.module.weight
            scale = entry.scale if part == "up_bias" else 1.0
            norm = float(np.linalg.norm(parts[part])) * abs(scale)
            yield Fact(row.ours, entry.block, 0, scale, norm)


def _norm(down: np.ndarray, up: np.ndarray, scale: float) -> float:
    """Frobenius' norm of `scale * up @ down` by two small products, in float64."""
    down, up = np.asarray(down, np.float64), np.asarray(up, np.float64)
    square = np.sum((down @ down.T) * (up.T @ up))
    return abs(scale) * float(np.sqrt(max(square, 0)))


def _table(facts: list[Fact]) -> list[str]:
    """A line for each layer and each rank and scale that it has, with the blocks."""
    key = lambda fact: (not fact.rank, fact.name, fact.rank, fact.scale)  # noqa: E731
    rows = [_HEAD]
    for (_, name, rank, scale), found in groupby(sorted(facts, key=key), key):
        found = list(found)
        blocks = _ranges([fact.block for fact in found if fact.block is not None])
        norm = np.sqrt(sum(fact.norm**2 for fact in found))
        rows.append((name, blocks or "-", str(rank or "whole"), f"{scale:.6g}", f"{norm:.4g}"))
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEAD))]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in rows]


def _ranges(numbers: Iterable[int]) -> str:
    """`0-3,7` for 0, 1, 2, 3, 7."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(f"{a}-{b}" if b > a else str(a) for a, b in runs)


def _short(value: Mapping | str) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 200 else f"{text[:197]}..."
