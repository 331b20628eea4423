"""Adapter files of all families as a `LoRA`: pairs, alphas, and changes of whole parameters.

The change of a weight is `alpha/rank * up @ down`; without an alpha, in the file or in its
metadata, the two are equal. `.diff`, `.diff_b` and `.diff_m` are added as they stand.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from convert.lora_names import Key, Module, other_kind, parse
from convert.networks import check_types
from wanjax.errors import UserError
from wanjax.lora import Change, LayerAdapter, LoRA, require_finite
from wanjax.models.dit import DiTConfig
from wanjax.tensor_files import TensorFile, read_safetensors

METADATA = "lora_adapter_metadata"  # where diffusers keeps the config of its adapters, as JSON


@dataclass(frozen=True)
class Entry:
    """What a file has for one module (of one block): its tensors by part, as they are stored."""

    module: Module
    block: int | None
    name: str
    parts: Mapping[str, np.ndarray]
    keys: Mapping[str, str]
    alpha: float | None
    scale: float

    @property
    def rank(self) -> int:
        """Of the pair; 0 where there is none."""
        return len(self.parts["down"]) if "down" in self.parts else 0


def read_foreign(path: Path, *, skip_unmatched: bool = False) -> LoRA:
    """The adapters of a file of any family.

    Raises `UserError`, naming the key, for what matches no layer of Wan2.1 (unless
    `skip_unmatched`; nothing at all must match), LoKr, LoHa and DoRA, and a pair without its half.
    """
    file = read_safetensors(path)
    entries = read_entries(file, skip_unmatched=skip_unmatched)
    pairs: dict[str, list[Entry]] = {}
    changes: dict[str, dict[int | None, np.ndarray]] = {}
    for entry in entries:
        if "down" in entry.parts and entry.module.layer is not None:
            pairs.setdefault(entry.module.layer, []).append(entry)
        for name, values in _changes(path, entry):
            there = changes.setdefault(name, {})
            there[entry.block] = there[entry.block] + values if entry.block in there else values
    layers = {name: _stacked(path, name, found) for name, found in pairs.items()}
    metadata = {k: v for k, v in file.metadata.items() if k not in ("format", METADATA)}
    return LoRA(layers, metadata, {n: _together(path, n, x) for n, x in changes.items()})


def read_entries(file: TensorFile, *, skip_unmatched: bool = False) -> list[Entry]:
    """What the file has for each module, in the order of the file."""
    keys = {name: parse(name) for name in file.tensors}
    _check_keys(file.path, keys, skip_unmatched)
    matched = [key for key in keys.values() if key is not None]
    weights = {k.name: file.tensors[k.name] for k in matched if k.part != "alpha"}
    check_types(weights, str(file.path))
    grouped: dict[tuple[str, int | None], list[Key]] = {}
    for key in matched:
        grouped.setdefault((key.module.official, key.block), []).append(key)
    scale_of = _scales_of_metadata(file)
    return [_entry(file, found, scale_of) for found in grouped.values()]


def _check_keys(path: Path, keys: Mapping[str, Key | None], skip_unmatched: bool) -> None:
    unmatched = [name for name, key in keys.items() if key is None]
    for name in unmatched:
        if kind := other_kind(name):
            raise UserError(
                f"{path} holds '{name}', which is {kind}; only LoRA with two factors and whole "
                "differences (.diff, .diff_b, .diff_m) are read."
            )
    if not keys:
        raise UserError(f"{path} holds no LoRA; check that it is the right file.")
    if len(unmatched) == len(keys):
        raise UserError(
            f"{path} holds '{unmatched[0]}', which is not of the form of any adapter for Wan2.1, "
            f"and none of its {len(keys):,} tensors is; check that it is the right file."
        )
    if unmatched and not skip_unmatched:
        raise UserError(
            f"{path} holds '{unmatched[0]}', which is not of the form of any adapter for Wan2.1 "
            f"({len(keys) - len(unmatched):,} of its tensors match and {len(unmatched):,} do not); "
            "convert it with --skip-unmatched to leave those out."
        )


def _entry(file: TensorFile, keys: list[Key], scale_of: "Scales") -> Entry:
    first, parts = keys[0], {key.part: file.tensors[key.name] for key in keys}
    name = first.module.official.replace("{i}", str(first.block))
    names = {key.part: key.name for key in keys}
    if len(parts) < len(keys):
        raise UserError(f"{file.path} holds the {keys[-1].part} of '{name}' twice; fetch it again.")
    for part in ("down", "up"):
        if part in parts:
            parts[part] = _matrix(parts[part])
    halves = parts.keys() & {"down", "up", "up_bias"}
    sound = {"down", "up"} <= halves and parts["down"].ndim == parts["up"].ndim == 2
    if halves and not (sound and len(parts["down"]) == parts["up"].shape[1] > 0):
        raise UserError(
            f"{file.path}: '{name}' has no matching lora_A and lora_B; the file is incomplete, "
            "fetch it again."
        )
    if parts.keys() == {"alpha"}:
        raise UserError(f"{file.path} has an alpha for '{name}' and no weights; fetch it again.")
    if not halves:
        return Entry(first.module, first.block, name, parts, names, None, 1.0)
    rank = len(parts["down"])
    alpha = _alpha(file.path, name, parts["alpha"]) if "alpha" in parts else None
    scale = scale_of(first, rank) if alpha is None else alpha / rank
    return Entry(first.module, first.block, name, parts, names, alpha, scale)


def _matrix(tensor: np.ndarray) -> np.ndarray:
    """A factor as a matrix; of a convolution all but the first axis is the fan-in."""
    return tensor.reshape(len(tensor), -1) if tensor.ndim > 2 and len(tensor) else tensor


def _alpha(path: Path, name: str, tensor: np.ndarray) -> float:
    values = np.asarray(tensor, np.float64).reshape(-1)
    if values.size != 1 or not math.isfinite(values[0]):
        raise UserError(f"{path}: the alpha of '{name}' is no number; fetch the file again.")
    return float(values[0])


def _numbers(path: Path, entry: Entry, part: str) -> np.ndarray:
    """A part in fp32."""
    with np.errstate(over="ignore"):  # what does not fit is refused next
        values = np.asarray(entry.parts[part], np.float32)
    require_finite(values, entry.keys[part], path)
    return values


def _changes(path: Path, entry: Entry) -> list[tuple[str, np.ndarray]]:
    """What an entry adds to our parameters as they stand, in our layout."""
    module, found = entry.module, []
    if "down" in entry.parts and module.layer is None:  # of the patches: one small matrix
        product = np.float32(entry.scale) * (
            _numbers(path, entry, "up") @ _numbers(path, entry, "down")
        )
        patch = DiTConfig().patch_size
        if product.shape[1] % math.prod(patch):
            raise UserError(f"{path}: '{entry.name}' has a fan-in of no patches; fetch it again.")
        found.append((module.weight, product.reshape(len(product), -1, *patch)))
    rows = {"diff": module.weight, "diff_m": module.weight, "diff_b": module.bias}
    found += [(row, _numbers(path, entry, p)) for p, row in rows.items() if p in entry.parts]
    if "up_bias" in entry.parts:
        bias = np.float32(entry.scale) * _numbers(path, entry, "up_bias")
        found.append((module.bias, bias))
    return [(row.ours, _in_our_layout(path, entry, row, values)) for row, values in found]


def _in_our_layout(path: Path, entry: Entry, row, values: np.ndarray) -> np.ndarray:
    if row.ours.endswith(("modulation", "positions")) and values.ndim == 2:
        return values  # without the leading axis that the model's own tensor has
    try:
        return row.op.to_ours(values)
    except (ValueError, IndexError) as error:
        raise UserError(
            f"{path}: the change of '{entry.name}' has the shape {values.shape}, which is not that "
            "of the weight; fetch the file again."
        ) from error


def _stacked(path: Path, name: str, entries: list[Entry]) -> LayerAdapter:
    """One array over the blocks that are there; smaller ranks are filled up with zeros, which add
    nothing. Where ranks or alphas differ, each is folded into its own weights."""
    entries = sorted(entries, key=lambda entry: entry.block or 0)
    widths = [(e.parts["down"].shape[1], e.parts["up"].shape[0]) for e in entries]
    for entry, width in zip(entries, widths):
        if width != widths[0]:
            raise UserError(f"{path}: '{entry.name}' differs in width from the other blocks'.")
    (d_in, d_out), rank = widths[0], max(entry.rank for entry in entries)
    same = {(entry.rank, entry.scale) for entry in entries}
    down = np.zeros((len(entries), d_in, rank), np.float32)
    up = np.zeros((len(entries), rank, d_out), np.float32)
    for i, entry in enumerate(entries):
        fold = np.float32(entry.scale if len(same) > 1 else 1)
        down[i, :, : entry.rank] = _numbers(path, entry, "down").T
        up[i, : entry.rank] = _numbers(path, entry, "up").T * fold
    alpha = rank * entries[0].scale if len(same) == 1 else float(rank)
    blocks = None if entries[0].block is None else tuple(entry.block for entry in entries)
    return LayerAdapter(down, up, alpha, blocks)


def _together(path: Path, name: str, values: Mapping[int | None, np.ndarray]) -> Change:
    """One array over the blocks that are there, or that of a parameter outside of them."""
    if None in values:
        return Change(values[None])
    numbers = sorted(values)
    if len({values[block].shape for block in numbers}) > 1:
        raise UserError(f"{path}: the changes of '{name}' differ in shape from block to block.")
    return Change(np.stack([values[block] for block in numbers]), tuple(numbers))


class Scales:
    """Alpha over rank by a file's metadata: diffusers' config of the adapter, or finetrainers'."""

    def __init__(self, path: Path, settings: Mapping[str, object]):
        self._path, self._settings = path, settings
        if settings.get("use_dora"):
            raise UserError(f"{path} is DoRA, by its metadata; only LoRA is read.")

    def __call__(self, key: Key, rank: int) -> float:
        if "lora_alpha" not in self._settings:
            return 1.0
        names = [
            n.replace("{i}", str(key.block)) for n in (key.module.official, key.module.diffusers)
        ]
        alpha = self._settings["lora_alpha"]
        for pattern, value in self._patterns().items():
            if any(f".{name}".endswith("." + pattern.removeprefix("^")) for name in names):
                alpha = value
                break
        if (
            isinstance(alpha, bool)
            or not isinstance(alpha, int | float)
            or not math.isfinite(alpha)
        ):
            raise UserError(f"{self._path} gives an alpha that is no number in its metadata.")
        return alpha / (math.sqrt(rank) if self._settings.get("use_rslora") else rank)

    def _patterns(self) -> Mapping[str, object]:
        patterns = self._settings.get("alpha_pattern") or {}
        if not isinstance(patterns, Mapping):
            raise UserError(f"{self._path} has an alpha_pattern that is no object.")
        for pattern in patterns:
            if set(pattern) & set("*+?[](){}|\\$"):
                raise UserError(
                    f"{self._path} gives alpha by the expression '{pattern[:80]}' in its metadata, "
                    "and only plain names are read; save it with an alpha for each layer."
                )
        return patterns


def _scales_of_metadata(file: TensorFile) -> Scales:
    for entry, prefix in ((METADATA, "transformer."), ("lora_config", "")):
        if entry in file.metadata:
            try:
                settings = json.loads(file.metadata[entry])
                mine = {k.removeprefix(prefix): v for k, v in settings.items()}
            except (ValueError, AttributeError, RecursionError) as error:
                raise UserError(
                    f"{file.path} has a '{entry}' in its metadata that is no JSON object; "
                    "save the adapter again."
                ) from error
            return Scales(file.path, mine)
    return Scales(file.path, {})
