"""Adapter files: ours, and the one that ComfyUI, diffusers and diffusion-pipe all read.

That file has `diffusion_model.blocks.N.<layer>.lora_A.weight` and `lora_B.weight` in torch's
layout, official layer names, no alpha (it is folded into B in fp32 before the cast), block linears
only, and `k_img` with `v_img` or neither. Layer names come from the denoiser's own table.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np

from convert.dit import rows
from convert.networks import check_types
from wanjax.checkpoint import ADAPTER_FORMAT, load_lora, save_lora
from wanjax.errors import UserError, nearest
from wanjax.lora import CROSS_IMAGE, LayerAdapter, LoRA, require_finite
from wanjax.models.dit import DiTConfig
from wanjax.nn import STACK
from wanjax.outputs import whole_file
from wanjax.tensor_files import SafetensorsWriter, read_safetensors

PREFIX = "diffusion_model."
DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
FORMATS = ("comfyui", "native")
_KEY = re.compile(r"^blocks\.(0|[1-9][0-9]{0,8})\.(.+)\.lora_([AB])\.weight$")


def role_names() -> dict[str, str]:
    """Our role of every adaptable layer (`ffn.up`) to its official name (`ffn.0`)."""
    names = {}
    for row in rows(DiTConfig()):
        if row.ours.startswith(f"{STACK}.") and row.ours.endswith(".kernel"):
            role = row.ours.removeprefix(f"{STACK}.").removesuffix(".kernel")
            names[role] = row.official.removeprefix("blocks.{i}.").removesuffix(".weight")
    return names


def convert_lora(src: Path, out: Path, format: str, dtype: str = "float32") -> str:
    """Read a run, a native adapter or a ComfyUI file, write the other kind, and say what was done.

    `dtype` is that of a ComfyUI file; fp32 gives the very same output as the run it came from.
    """
    if format not in FORMATS:
        raise UserError(f"There is no LoRA format '{format}'{nearest(format, FORMATS)}")
    lora = open_lora(src)
    if format == "native":
        save_lora(out, lora)
    else:
        write_comfyui(out, lora, DTYPES[dtype])
    ranks = sorted({a.rank for a in lora.layers.values()})
    blocks = len({block for a in lora.layers.values() for block in a.numbers})
    size = sum(a.down.size + a.up.size for a in lora.layers.values())
    return (
        f"{out}: {len(lora.layers)} layers in {blocks} blocks, rank "
        f"{', '.join(map(str, ranks))}, {size:,} parameters ({', '.join(lora.layers)})"
    )


def open_lora(path: Path) -> LoRA:
    """Adapters from a run, a native adapter file or a ComfyUI file, told apart by content."""
    path = Path(path)
    if path.is_dir() or not path.exists():
        return load_lora(path)
    if read_safetensors(path).metadata.get("format") == ADAPTER_FORMAT:
        return load_lora(path)
    return read_comfyui(path)


def to_comfyui(lora: LoRA) -> dict[str, np.ndarray]:
    """The file's tensors in fp32, alpha folded into B."""
    names = role_names()
    tensors = {}
    for role, adapter in _with_image_pair(lora.layers).items():
        scale = adapter.alpha / adapter.rank
        for i, down, up in zip(adapter.numbers, adapter.down, adapter.up):
            layer = f"{PREFIX}blocks.{i}.{names[role]}"
            tensors[f"{layer}.lora_A.weight"] = np.ascontiguousarray(down.T)
            tensors[f"{layer}.lora_B.weight"] = np.ascontiguousarray(up.T * np.float32(scale))
    return tensors


def write_comfyui(path: Path, lora: LoRA, dtype: np.dtype) -> None:
    """Write the file, whole or not at all."""
    with np.errstate(over="ignore"):  # what does not fit is refused next
        tensors = {name: t.astype(dtype) for name, t in to_comfyui(lora).items()}
    for name, tensor in tensors.items():
        if not np.isfinite(tensor).all():
            raise UserError(f"'{name}' has values that {dtype} cannot hold; use --dtype float32.")
    header = {name: (t.dtype, t.shape) for name, t in tensors.items()}
    with (
        whole_file(Path(path)) as partial,
        SafetensorsWriter(partial, header, _metadata(lora, path)) as writer,
    ):
        for name, tensor in tensors.items():
            writer.write(name, tensor)


def read_comfyui(path: Path) -> LoRA:
    """The adapters of such a file. Raises `UserError`, naming the key, for any other family."""
    roles = {official: role for role, official in role_names().items()}
    found: dict[str, dict[int, dict[str, np.ndarray]]] = {}
    file = read_safetensors(path)
    check_types(file.tensors, str(path))
    for key, tensor in file.tensors.items():
        match = _KEY.match(key.removeprefix(PREFIX)) if key.startswith(PREFIX) else None
        if match is None or match[2] not in roles or tensor.ndim != 2:
            raise UserError(
                f"{path} holds '{key}', which is not of the form {PREFIX}blocks.N.LAYER."
                "lora_A.weight; only that family of LoRA files can be read so far."
            )
        pair = found.setdefault(roles[match[2]], {}).setdefault(int(match[1]), {})
        with np.errstate(over="ignore"):  # what does not fit is refused next
            pair[match[3]] = np.asarray(tensor, np.float32)
        require_finite(pair[match[3]], key, path)
    if not found:
        raise UserError(f"{path} holds no LoRA; check that it is the right file.")
    layers = {role: _stacked(path, role, blocks) for role, blocks in found.items()}
    return LoRA(layers, {k: v for k, v in file.metadata.items() if k != "format"})


def _stacked(path: Path, role: str, blocks: Mapping[int, Mapping[str, np.ndarray]]) -> LayerAdapter:
    """One array over the blocks that are there; smaller ranks are filled up with zeros, which add
    nothing."""
    for block, pair in blocks.items():
        matches = pair.keys() == {"A", "B"} and pair["A"].shape[0] == pair["B"].shape[1]
        if not matches or not pair["A"].shape[0]:
            raise UserError(
                f"{path}: block {block} of '{role}' has no matching lora_A and lora_B; "
                "the file is incomplete, fetch it again."
            )
    widths = {block: (pair["A"].shape[1], pair["B"].shape[0]) for block, pair in blocks.items()}
    numbers = sorted(blocks)
    d_in, d_out = widths[numbers[0]]
    for block in numbers:
        if widths[block] != (d_in, d_out):
            raise UserError(f"{path}: block {block} of '{role}' differs in width from the others.")
    rank = max(pair["A"].shape[0] for pair in blocks.values())
    down = np.zeros((len(blocks), d_in, rank), np.float32)
    up = np.zeros((len(blocks), rank, d_out), np.float32)
    for i, block in enumerate(numbers):
        have = blocks[block]["A"].shape[0]
        down[i, :, :have], up[i, :have] = blocks[block]["A"].T, blocks[block]["B"].T
    return LayerAdapter(down, up, float(rank), tuple(numbers))


def _with_image_pair(layers: Mapping[str, LayerAdapter]) -> dict[str, LayerAdapter]:
    """diffusers wants both image projections or none: the missing one becomes zeros."""
    given = [role for role in CROSS_IMAGE if role in layers]
    if len(given) != 1:
        return dict(layers)
    (missing,) = set(CROSS_IMAGE) - set(given)
    there = layers[given[0]]
    zeros = replace(there, down=np.zeros_like(there.down), up=np.zeros_like(there.up))
    return {**layers, missing: zeros}


def _metadata(lora: LoRA, path: Path) -> dict[str, str]:
    rank = max(a.rank for a in lora.layers.values())
    kept = {k: v for k, v in lora.metadata.items() if k.startswith(("ss_", "modelspec."))}
    facts = {k: v for k, v in lora.metadata.items() if k not in kept}
    alpha = next(iter(lora.layers.values())).alpha
    return {
        "ss_base_model_version": "wan2.1",
        "modelspec.architecture": "wan2.1/lora",
        "modelspec.title": Path(path).stem,
        **kept,
        **{k if k.startswith("wanjax.") else f"wanjax.{k}": v for k, v in facts.items()},
        "wanjax.alpha": f"{alpha:g}",
        "format": "pt",
        # Alpha is folded into the weights, so for a reader of this file it equals the rank.
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(rank),
    }
