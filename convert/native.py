"""`python -m convert pipeline`: a checkpoint of others as a native folder."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import numpy as np

from convert.folders import new_folder
from convert.mapping import native_plan, summary
from convert.networks import TABLES, layers
from convert.sources import SPIECE, Checkpoint, open_checkpoint
from convert.stream import Planned, write_safetensors
from convert.table import expand
from wanjax.outputs import refuse_existing
from wanjax.weights import METADATA, Manifest, copy_tokenizer, lost, write_manifest


def convert_pipeline(
    src: Path, dst: Path, dtype: np.dtype | None = None, only: Collection[str] = ()
) -> str:
    """Write the native folder `dst` and return a report of what went into it.

    Tensors keep their types unless `dtype` is given: then they have what `wanjax.precision` says
    for it, so that bfloat16 leaves in fp32 what is computed in fp32. Raises `UserError`, and leaves
    nothing behind, where the source is not whole or the disk has no room.
    """
    refuse_existing(dst)
    checkpoint = open_checkpoint(src, only)
    plans = {
        name: native_plan(name, s.config, s.named.layout, s.named.tensors, str(s.path), dtype=dtype)
        for name, s in checkpoint.sources.items()
    }
    with new_folder("Converting", dst, plans) as (folder, advance):
        tokenizer = _write_tokenizer(src, checkpoint, folder)  # first, as it may be refused
        for name, plan in plans.items():
            write_safetensors(folder / f"{name}.safetensors", plan, METADATA, advance)
        write_manifest(folder, _manifest(checkpoint))
    return "\n".join([f"Wrote {dst}", *_report(checkpoint, plans), *tokenizer])


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


def _report(checkpoint: Checkpoint, plans: Mapping[str, list[Planned]]) -> list[str]:
    lines = []
    for name, source in checkpoint.sources.items():
        plan, named, config = plans[name], source.named, source.config
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
