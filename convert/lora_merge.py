"""`python -m convert lora-merge`: adapters added to a checkpoint, tensor by tensor on its way.

Of each matrix the sum of all changes is made and added in fp32, and rounded once to the type that
the base has. What of a change is below the base's steps is lost by that rounding: the share of its
squared norm that survives is counted.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from convert.export import FORMATS as LAYOUTS
from convert.export import export
from convert.folders import new_folder
from convert.lora import open_lora
from convert.lora_names import by_layer
from convert.mapping import summary
from convert.networks import TABLES, layers
from convert.stream import Planned, write_safetensors
from convert.table import Entry, expand
from wanjax.errors import UserError, nearest
from wanjax.lora import Change, LoRA, check_fits
from wanjax.models.dit import DiTConfig
from wanjax.nn import STACK
from wanjax.outputs import refuse_existing
from wanjax.tensor_files import read_safetensors
from wanjax.weights import (
    METADATA,
    abstract_network,
    copy_tokenizer,
    link_or_copy,
    read_manifest,
    write_manifest,
)

FORMATS = ("native", *LAYOUTS)


def lora_merge(
    base: Path, out: Path, loras: Sequence[tuple[Path, float]], format: str = "native"
) -> str:
    """Write the native folder `base` with adapters added, each with a strength, in any layout.

    Raises `UserError`, and leaves nothing behind, for adapters of another model.
    """
    if format not in FORMATS:
        raise UserError(f"There is no format '{format}'{nearest(format, FORMATS)}")
    refuse_existing(out)
    networks = read_manifest(base).networks
    if "dit" not in networks:
        raise UserError(
            f"{base} holds no dit to merge into; convert the checkpoint again, with it."
        )
    merging = Merging(networks["dit"], [(open_lora(path), s) for path, s in loras])
    if format == "native":
        report = _native(base, out, merging)
    else:
        report = export(base, out, format, merging=merging)
    return f"{report}\n  {merging.survived()}"


def _native(base: Path, out: Path, merging: "Merging") -> str:
    """A native folder, whose other networks are hard links where the disk allows it."""
    manifest = read_manifest(base)
    planned = merging.into(
        [
            Planned(name, t.dtype, t.shape, tuple(t) if name.startswith(f"{STACK}.") else (t,))
            for name, t in read_safetensors(base / "dit.safetensors").tensors.items()
        ]
    )
    with new_folder("Merging", out, {"dit": planned}) as (folder, advance):
        write_safetensors(folder / "dit.safetensors", planned, METADATA, advance)
        for name in manifest.networks:
            if name != "dit":
                link_or_copy(base / f"{name}.safetensors", folder / f"{name}.safetensors")
        if (base / "tokenizer").is_dir():
            copy_tokenizer(base / "tokenizer", folder / "tokenizer", within=base)
        write_manifest(folder, manifest)
    return f"Wrote {out}\n{summary('dit', planned, f'{len(planned):,} tensors')}"


class Merging:
    """The sum of some adapters for one denoiser, and what the rounding has left of it."""

    def __init__(self, config: DiTConfig, loras: Sequence[tuple[LoRA, float]]):
        check_fits(abstract_network("dit", config, np.float32), loras)
        self._config, self._loras = config, loras
        self._layers = {module.weight.ours: name for name, module in by_layer().items()}
        self._wanted = self._lost = 0.0

    def into(self, planned: Sequence[Planned], layout: str | None = None) -> list[Planned]:
        """The tensors with the changes added on their way; `layout` None stands for our own."""
        entries: dict[str, Entry] = {}
        if layout is not None:
            rows = TABLES["dit"].rows(self._config)
            entries = {e.theirs: e for e in expand(rows, layout, layers(self._config))}
        return [self._altered(tensor, entries.get(tensor.name)) for tensor in planned]

    def survived(self) -> str:
        """A sentence, once all is written."""
        share = 1 - self._lost / self._wanted if self._wanted else 1.0
        return f"{100 * share:.4g} % of the change survives the rounding"

    def _altered(self, tensor: Planned, entry: Entry | None) -> Planned:
        name = tensor.name if entry is None else entry.ours
        if not self._touches(name):
            return tensor

        def alter(i: int, part: np.ndarray) -> np.ndarray:
            change = self._change(name, i if entry is None else entry.layer or 0)
            if change is None:
                return part
            change = change if entry is None else entry.op.to_theirs(change)
            base = np.asarray(part, np.float32)
            merged = (base + change).astype(tensor.dtype)
            self._wanted += float(np.vdot(change, change))
            left = np.asarray(merged, np.float32) - base - change
            self._lost += float(np.vdot(left, left))
            return merged

        return replace(tensor, alter=alter)

    def _touches(self, name: str) -> bool:
        layer = self._layers.get(name)
        return any(name in lora.changes or layer in lora.layers for lora, _ in self._loras)

    def _change(self, name: str, block: int) -> np.ndarray | None:
        """What is added to our tensor (of a block), in fp32; None for nothing."""
        total = None
        for lora, strength in self._loras:
            for part in _parts(lora, name, self._layers.get(name), block):
                total = np.float32(strength) * part + (0 if total is None else total)
        return total


def _parts(lora: LoRA, name: str, layer: str | None, block: int) -> list[np.ndarray]:
    """What one adapter adds: a product, a change as it stands, both, or nothing."""
    found = []
    adapter = lora.layers.get(layer)
    if adapter is not None and block in adapter.numbers:
        i = list(adapter.numbers).index(block)
        found.append(np.float32(adapter.scale) * (adapter.down[i] @ adapter.up[i]))
    change = lora.changes.get(name)
    if change is not None:
        found += _values(change, name, block)
    return found


def _values(change: Change, name: str, block: int) -> list[np.ndarray]:
    if not name.startswith(f"{STACK}."):
        return [change.values]
    numbers = range(len(change.values)) if change.blocks is None else change.blocks
    return [change.values[i] for i, number in enumerate(numbers) if number == block]
