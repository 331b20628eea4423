"""`python -m convert export`: a native folder in the formats of others."""

import dataclasses
import json
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from convert import clip, umt5
from convert.configs import dit_to_official, to_diffusers
from convert.folders import TORCH, new_folder, write_json, write_pipeline_files, write_shards
from convert.groups import read_networks
from convert.mapping import foreign_plan, summary
from convert.native import dropped_by_family
from convert.networks import name_tensors, recognise
from convert.sources import COMPONENTS, CONFIGS_FILE, CONFIGS_KEY, OFFICIAL_NAMES, SPIECE
from convert.stream import Planned, plan, write_safetensors
from convert.torch_files import write_torch
from wanjax.errors import UserError
from wanjax.models import Config
from wanjax.outputs import refuse_existing, require_space, whole_file
from wanjax.progress import progress_bar
from wanjax.tensor_files import read_safetensors
from wanjax.weights import Manifest, copy_tokenizer, read_manifest

if TYPE_CHECKING:
    from convert.lora_merge import Merging

FORMATS = ("official", "diffusers", "comfyui")
Plans = dict[str, list[Planned]]


@dataclass(frozen=True)
class Native:
    """An open native folder, what is wanted of it, and where dropped tensors are found again."""

    folder: Path
    manifest: Manifest
    wanted: tuple[str, ...]
    origin: Path | None
    merging: "Merging | None" = None

    def config(self, network: str) -> Config:
        return self.manifest.networks[network]

    def plan(self, network: str, layout: str) -> list[Planned]:
        path = self.folder / f"{network}.safetensors"
        leaves = read_safetensors(path).tensors
        planned = foreign_plan(network, self.config(network), layout, leaves, str(path))
        if self.merging is not None and network == "dit":
            return self.merging.into(planned, layout)
        return planned

    def own_configs(self) -> dict[str, object]:
        """Our configs, for what another format has no place for."""
        return {name: dataclasses.asdict(self.config(name)) for name in self.wanted}


def export(
    folder: Path,
    out: Path,
    format: str,
    origin: Path | None = None,
    only: Collection[str] = (),
    merging: "Merging | None" = None,
) -> str:
    """Write `out` and return a report of what went into it.

    `origin` is the checkpoint that the folder was made of, whence tensors come that we do not keep;
    `merging` adds adapters to the denoiser on its way.
    Raises `UserError`, and leaves nothing behind, where something is missing or has no room.
    """
    refuse_existing(out)
    manifest = read_manifest(folder)
    wanted = tuple(only) or (("dit",) if format == "comfyui" else tuple(manifest.networks))
    for network in wanted:
        if network not in manifest.networks:
            have = ", ".join(manifest.networks)
            raise UserError(f"{folder} holds no {network}; choose from {have} with --only.")
    native = Native(folder, manifest, wanted, origin, merging)
    write = {"official": _official, "diffusers": _diffusers, "comfyui": _comfyui}[format]
    return "\n".join([f"Wrote {out}", *write(native, out)])


def _official(native: Native, out: Path) -> list[str]:
    plans = {name: native.plan(name, "official") for name in native.wanted}
    notes = _restore(native, plans, "official")
    with new_folder("Exporting", out, plans) as (folder, advance):
        for name, planned in plans.items():
            if name == "dit":
                write_shards(folder, "diffusion_pytorch_model", planned, advance)
                write_json(folder / "config.json", dit_to_official(native.config("dit")))
            else:
                write_torch(folder / OFFICIAL_NAMES[name], planned, advance)
        if "text_encoder" in plans:
            notes += _copy(native.folder, "tokenizer", folder / "google/umt5-xxl")
        if "image_encoder" in plans and native.origin and native.origin.is_dir():
            notes += _copy(native.origin, "xlm-roberta-large", folder / "xlm-roberta-large")
        write_json(folder / CONFIGS_FILE, {"networks": native.own_configs()})
    return _summary(plans) + notes


def _diffusers(native: Native, out: Path) -> list[str]:
    plans = {name: _named_as_found(native, name) for name in native.wanted}
    notes = _restore(native, plans, "diffusers")
    with new_folder("Exporting", out, plans) as (folder, advance):
        for component, name in COMPONENTS.items():
            if name in plans:
                (folder / component).mkdir()
                stem = "diffusion_pytorch_model" if name in ("dit", "vae") else "model"
                write_shards(folder / component, stem, plans[name], advance)
                dtype = str(max(plans[name], key=lambda t: t.nbytes).dtype)
                config = to_diffusers(name, native.config(name), dtype)
                write_json(folder / component / "config.json", config)
        if "text_encoder" in plans:
            notes += _copy(native.folder, "tokenizer", folder / "tokenizer")
        if plans.keys() == native.manifest.networks.keys() and "dit" in plans:
            side = getattr(native.manifest.networks.get("image_encoder"), "image_size", 0)
            write_pipeline_files(folder, native.config("dit"), plans, side)
        else:
            notes.append("  no model_index.json, since this is not a whole pipeline")
        write_json(folder / CONFIGS_FILE, {"networks": native.own_configs()})
    return _summary(plans) + notes


def _comfyui(native: Native, out: Path) -> list[str]:
    if len(native.wanted) != 1 or out.suffix != ".safetensors":
        raise UserError(
            f"ComfyUI takes one network a file, whose name ends in .safetensors, and {out} was to "
            f"hold {', '.join(native.wanted)}; give one network with --only, and such a name."
        )
    (name,) = native.wanted
    planned = native.plan(name, "official" if name in ("dit", "vae") else "diffusers")
    notes = []
    if name == "text_encoder":
        spiece = native.folder / "tokenizer/spiece.model"
        if spiece.is_file():
            planned.append(plan(SPIECE, np.fromfile(spiece, np.uint8)))
        else:
            notes.append(f"  without its tokenizer, which ComfyUI needs: there is no {spiece}")
    total = sum(t.nbytes for t in planned)
    require_space(out, total)
    metadata = {**TORCH, CONFIGS_KEY: json.dumps(native.own_configs())}
    with whole_file(out) as file, progress_bar("Exporting", total, unit="bytes") as bar:
        write_safetensors(file, planned, metadata, bar.advance)
    return _summary({name: planned}) + notes


def _named_as_found(native: Native, network: str) -> list[Planned]:
    """Diffusers' names, in the variant that the source had where there are several."""
    planned = native.plan(network, "diffusers")
    facts = native.manifest.source.get(network, {})
    if network == "image_encoder" and facts.get("prefix") is False:
        return [replace(t, name=t.name.removeprefix(clip.PREFIX)) for t in planned]
    if network == "text_encoder" and facts.get("embedding"):
        aliased, found = set(umt5.ALIASES.values()), facts["embedding"]
        return [
            replace(t, name=name)
            for t in planned
            for name in (found if t.name in aliased else [t.name])
        ]
    return planned


def _restore(native: Native, plans: Plans, layout: str) -> list[str]:
    """Add to the plans what was dropped, from the origin; what to tell of what stays left out."""
    notes = []
    origins = read_networks(native.origin, native.wanted) if native.origin else {}
    for network, planned in plans.items():
        group = origins.get(network)
        if group is None or recognise(group.tensors) != (network, layout):
            families = _left_out(native, network, layout)
            if families and native.origin:
                raise UserError(
                    f"{native.origin} holds no {network} in {layout} names that {families[0]} "
                    "could be taken from; name another checkpoint with --from, or none."
                )
            if families:
                notes.append(
                    f"  {network:14} without {', '.join(families)}, which the native folder does "
                    "not keep; --from CHECKPOINT takes them from one that has them"
                )
            continue
        named = name_tensors(network, layout, group.tensors, str(group.path))
        have = {t.name for t in planned}
        # CLIP's head is kept, but a native folder made of diffusers' files never had it.
        names = [n for n in (*named.dropped, "visual.head") if n in group.tensors and n not in have]
        planned += [plan(n, group.tensors[n]) for n in names]
        if names:
            families = ", ".join(dropped_by_family(names))
            notes.append(f"  {network:14} with {families} ({len(names):,} tensors) of {group.path}")
    return notes


def _left_out(native: Native, network: str, layout: str) -> list[str]:
    """The families of tensors that the layout's own files have and a native folder has not."""
    facts = native.manifest.source.get(network, {})
    families = list(facts.get("dropped", {})) if facts.get("layout") == layout else []
    if (network, layout) == ("image_encoder", "official"):
        families = families or ["textual.*", "log_scale"]
        if native.config(network).projection_dim is None:
            families.append("visual.head")
    return families


def _copy(checkpoint: Path, name: str, to: Path) -> list[str]:
    """Copy a checkpoint's folder of a tokenizer, if it is there."""
    if not (checkpoint / name).is_dir():
        return [f"  without {to.name}/, since there is no {checkpoint / name}"]
    copy_tokenizer(checkpoint / name, to, within=checkpoint)
    return []


def _summary(plans: Plans) -> list[str]:
    return [summary(name, planned, f"{len(planned):,} tensors") for name, planned in plans.items()]
