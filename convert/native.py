"""`python -m convert pipeline`: a checkpoint of others as a native folder."""

import sys
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.filesize import decimal

from convert.folders import new_folder
from convert.freeing import Freeing, freed, refuse_unfinished
from convert.mapping import native_plan, summary
from convert.networks import TABLES, layers
from convert.sources import SPIECE, Checkpoint, open_checkpoint
from convert.stream import Planned, write_safetensors
from convert.table import expand
from wanjax.outputs import free_space, refuse_existing
from wanjax.progress import progress_bar
from wanjax.weights import METADATA, Manifest, copy_tokenizer, lost, write_manifest


@dataclass(frozen=True)
class Conversion:
    """What was found, and what becomes of it: nothing is read yet but headers."""

    checkpoint: Checkpoint
    plans: Mapping[str, list[Planned]]

    @classmethod
    def of(cls, src: Path, dtype: np.dtype | None, only: Collection[str]) -> "Conversion":
        checkpoint = open_checkpoint(src, only)
        plans = {
            name: native_plan(
                name, s.config, s.named.layout, s.named.tensors, str(s.path), dtype=dtype
            )
            for name, s in checkpoint.sources.items()
        }
        return cls(checkpoint, plans)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for plan in self.plans.values() for tensor in plan)

    def arrays(self) -> list[np.ndarray]:
        """All tensors of the source, also those that are dropped."""
        named = [source.named for source in self.checkpoint.sources.values()]
        return [a for n in named for a in (*n.tensors.values(), *n.dropped.values())]


def convert_pipeline(
    src: Path,
    dst: Path,
    dtype: np.dtype | None = None,
    only: Collection[str] = (),
    delete_source: bool = False,
) -> str:
    """Write the native folder `dst` and return a report of what went into it.

    Tensors keep their types unless `dtype` is given: then they have what `wanjax.precision` says
    for it, so that bfloat16 leaves in fp32 what is computed in fp32. `delete_source` deletes each
    file of weights once it is written (`convert.freeing`). Raises `UserError`, and leaves nothing
    behind, where the source is not whole or the disk has no room.
    """
    refuse_existing(dst)
    if delete_source:
        return _convert_and_free(src, dst, dtype, only)
    refuse_unfinished(dst)
    conversion = Conversion.of(src, dtype, only)
    sys.stderr.write(f"{dst} takes {decimal(conversion.nbytes)}; {free_space(dst)}\n")
    with new_folder("Converting", dst, conversion.plans) as (folder, advance):
        # First, as it may be refused.
        tokenizer = _write_tokenizer(src, conversion.checkpoint, folder)
        for name, plan in conversion.plans.items():
            write_safetensors(folder / f"{name}.safetensors", plan, METADATA, advance)
        write_manifest(folder, _manifest(conversion.checkpoint))
    return "\n".join([f"Wrote {dst}", *_report(conversion), *tokenizer])


def _convert_and_free(src: Path, dst: Path, dtype: np.dtype | None, only: Collection[str]) -> str:
    freeing = Freeing(src, dst, {"dtype": str(dtype), "only": list(only)})
    with freeing.begun() as source:
        conversion = Conversion.of(source, dtype, only)
        needed = freeing.check(conversion.plans)
        sys.stderr.write(
            f"{dst} takes {decimal(conversion.nbytes)}, of which {decimal(needed)} before files of "
            f"{src} are deleted; {free_space(dst)}\n"
        )
        tokenizer = []
        if source == src:  # what was freed has no numbers, of which a tokenizer may be made
            tokenizer = _write_tokenizer(src, conversion.checkpoint, freeing.out)
        arrays = conversion.arrays()
        with progress_bar("Converting", conversion.nbytes, unit="bytes") as bar:
            freeing.write(conversion.plans, arrays, bar.advance)
        write_manifest(freeing.out, _manifest(conversion.checkpoint))
        freeing.finish(dst)
    gone = f"  {src}: {freed(arrays)} of weights deleted"
    return "\n".join([f"Wrote {dst}", *_report(conversion), *tokenizer, gone])


def _manifest(checkpoint: Checkpoint) -> Manifest:
    facts = {
        name: {
            "layout": s.named.layout,
            "dropped": dropped_by_family(s.named.dropped),
            **s.named.facts,
        }
        for name, s in checkpoint.sources.items()
    }
    return Manifest({name: s.config for name, s in checkpoint.sources.items()}, facts)


def dropped_by_family(names: Iterable[str]) -> dict[str, int]:
    """Dropped tensors counted by the first part of their names."""
    return dict(Counter(f"{n.split('.')[0]}.*" if "." in n else n for n in names))


def _write_tokenizer(src: Path, checkpoint: Checkpoint, folder: Path) -> list[str]:
    """Copy the tokenizer, or what there is of one; what to tell about it."""
    if "text_encoder" not in checkpoint.sources:
        return []
    if checkpoint.tokenizer is not None:
        copy_tokenizer(checkpoint.tokenizer, folder / "tokenizer", within=src)
        if (folder / "tokenizer/tokenizer.json").is_file():
            return ["  tokenizer      copied"]
    # ComfyUI keeps the tokenizer's model beside umT5's weights, as a tensor of bytes.
    spiece = checkpoint.sources["text_encoder"].named.dropped.get(SPIECE)
    if spiece is not None:
        (folder / "tokenizer").mkdir(exist_ok=True)
        (folder / "tokenizer/spiece.model").write_bytes(spiece.tobytes())
        return [
            "  tokenizer      without tokenizer.json: copy google/umt5-xxl/tokenizer.json into it"
        ]
    return ["  tokenizer      MISSING: copy google/umt5-xxl/tokenizer.json into its tokenizer/"]


def _report(conversion: Conversion) -> list[str]:
    lines = []
    for name, source in conversion.checkpoint.sources.items():
        plan, named, config = conversion.plans[name], source.named, source.config
        entries = expand(TABLES[name].rows(config), named.layout, layers(config))
        count = len({entry.theirs for entry in entries})
        lines.append(summary(name, plan, f"{count:,} {named.layout} tensors as {len(plan):,}"))
        for family, number in dropped_by_family(named.dropped).items():
            lines.append(f"  {'':14} dropped {number:,} tensors {family}")
        if names := lost(name, config, {p.name: p.parts[0].dtype for p in plan}):
            lines.append(
                f"  {'':14} {len(names):,} tensors that are computed in float32 are coarser in the "
                f"source, such as '{names[-1]}'"
            )
    return lines
