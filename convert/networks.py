"""What conversion knows of each network: its table of names, and how to recognise its files."""

import fnmatch
import re
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace

import numpy as np

from convert import clip, dit, umt5, vae
from convert.table import Row
from wanjax.errors import UserError
from wanjax.models import Config
from wanjax.models.clip import CLIPVisionConfig
from wanjax.models.dit import DiTConfig
from wanjax.models.umt5 import UMT5Config
from wanjax.models.vae import VAEConfig

LAYOUTS = ("official", "diffusers")

# ComfyUI's single files put one of these before every name of the diffusion model.
DIT_PREFIXES = ("model.diffusion_model.", "diffusion_model.")

# Scales beside 8-bit weights, as ComfyUI's fp8_scaled and later quantised files have them.
_SCALES = ("scaled_fp8", "*.scaled_fp8", "*.scale_weight", "*.weight_scale", "*.comfy_quant")


@dataclass(frozen=True)
class Table:
    """A network's rows for a config; `fullest` is a config that has every kind of tensor."""

    rows: Callable[[Config], list[Row]]
    droppable: Mapping[str, tuple[str, ...]]
    fullest: Config


TABLES: dict[str, Table] = {
    "dit": Table(dit.rows, dit.DROPPABLE, replace(DiTConfig(), image_positions=514)),
    "vae": Table(vae.rows, {"official": (), "diffusers": ()}, VAEConfig()),
    "text_encoder": Table(umt5.rows, umt5.DROPPABLE, UMT5Config()),
    "image_encoder": Table(clip.rows, clip.DROPPABLE, CLIPVisionConfig(projection_dim=1024)),
}


def layers(config: Config) -> int:
    """How many stacked layers a network has; the VAE's layers are all different."""
    return getattr(config, "num_layers", 0)


@dataclass(frozen=True)
class Named:
    """A file's tensors under the names of a table, with what was left out or said otherwise."""

    network: str
    layout: str
    tensors: dict[str, np.ndarray]
    dropped: dict[str, np.ndarray]
    facts: dict[str, object]


def recognise(names: Collection[str]) -> tuple[str, str] | None:
    """Network and layout of a file by its tensors' names, or None.

    It is the table of which most templates occur, and at least half: so a file that lacks some
    tensor is still recognised, and the tensor can be named.
    """
    names = {_without_prefix(name) for name in names}
    names |= {clip.PREFIX + name for name in names}
    names |= {re.sub(r"\.\d+\.", ".{i}.", name, count=1) for name in names}
    scores = {}
    for network, table in TABLES.items():
        for layout in LAYOUTS:
            templates = {
                re.sub(r"\[.*", "", theirs)
                for row in table.rows(table.fullest)
                if (theirs := row.theirs(layout)) is not None
            }
            scores[network, layout] = len(templates & names) / len(templates)
    best = max(scores, key=scores.get)
    return best if scores[best] >= 0.5 else None


def _without_prefix(name: str) -> str:
    for prefix in DIT_PREFIXES:
        name = name.removeprefix(prefix)
    return name


def name_tensors(network: str, layout: str, tensors: Mapping[str, np.ndarray], where: str) -> Named:
    """Bring a file's names to the table's: prefixes, second names, and what may be dropped."""
    refuse_scaled(tensors, where)
    patterns = TABLES[network].droppable[layout]
    dropped = {n: t for n, t in tensors.items() if any(fnmatch.fnmatchcase(n, p) for p in patterns)}
    kept = {n: t for n, t in tensors.items() if n not in dropped}
    check_types(kept, where)
    facts: dict[str, object] = {}
    if network == "dit":
        kept = {_without_prefix(n): t for n, t in kept.items()}
    elif (network, layout) == ("image_encoder", "diffusers"):
        facts["prefix"] = any(n.startswith(clip.PREFIX) for n in kept)
        kept = {n if n.startswith(clip.PREFIX) else clip.PREFIX + n: t for n, t in kept.items()}
    elif (network, layout) == ("text_encoder", "diffusers"):
        facts["embedding"] = _merge_aliases(kept, where)
    return Named(network, layout, kept, dropped, facts)


def refuse_scaled(names: Collection[str], where: str) -> None:
    """Refuse 8-bit weights that are kept apart from their scales."""
    for name in names:
        if any(fnmatch.fnmatchcase(name, p) for p in _SCALES):
            raise UserError(
                f"{where} is an fp8_scaled file ('{name}'), whose rounding cannot be undone; "
                "use the bf16, fp16 or fp32 file of the same model."
            )


def check_types(tensors: Mapping[str, np.ndarray], where: str) -> None:
    """Refuse codes where weights belong, and warn of fp8."""
    eight = {name: t.dtype for name, t in tensors.items() if t.dtype.itemsize == 1}
    for name, tensor in tensors.items():
        if tensor.dtype.kind in "biuc":
            raise UserError(
                f"{where} holds '{name}' in {tensor.dtype}, the codes of a quantised model; use "
                "the bf16, fp16 or fp32 file of the same model."
            )
    if eight:
        warnings.warn(
            f"{where} holds {len(eight):,} of its {len(tensors):,} tensors in fp8 "
            f"({next(iter(eight.values()))}), which keep one or two digits of each weight; use the "
            "bf16, fp16 or fp32 file of the same model, to train on it at least.",
            stacklevel=2,
        )


def _merge_aliases(tensors: dict[str, np.ndarray], where: str) -> list[str]:
    """Leave one tensor where a file holds it under two names; the names that it had."""
    found = []
    for second, first in umt5.ALIASES.items():
        found += [name for name in (first, second) if name in tensors]
        if second in tensors:
            tensor = tensors.pop(second)
            if not _same_bits(tensors.setdefault(first, tensor), tensor):
                raise UserError(
                    f"{where} holds '{first}' and '{second}', which should be one tensor, with "
                    "different values; fetch the file again."
                )
    return found


def _same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two matrices are equal, without a mask as large as they are."""
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    rows = range(0, len(a), 4096)
    return all(a[i : i + 4096].tobytes() == b[i : i + 4096].tobytes() for i in rows)
