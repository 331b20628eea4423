"""Adapters in the layouts of others. What the readers of a layout cannot take is refused here.

- comfyui: `diffusion_model.blocks.N.LAYER.lora_A.weight` and `lora_B.weight`, alpha folded into B
  in fp32 before the cast; `k_img` with `v_img` or neither. ComfyUI, diffusers, diffusion-pipe, and
  musubi-tuner's `convert_lora.py` read it. Changes are `.diff` and `.diff_b`, for ComfyUI.
- diffusers: `transformer.blocks.N.attn1.to_q.lora_A.weight`, with the config in the metadata.
- kohya (musubi-tuner): `lora_unet_blocks_N_self_attn_q.lora_down.weight`, `lora_up`, `alpha`.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np

from convert.lora_names import by_layer, by_parameter
from convert.lora_read import METADATA
from wanjax.errors import UserError, some
from wanjax.lora import CROSS_IMAGE, Change, LayerAdapter, LoRA, in_a_block, over
from wanjax.outputs import whole_file
from wanjax.tensor_files import SafetensorsWriter

DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
Tensors = dict[str, np.ndarray]


def to_comfyui(lora: LoRA) -> Tensors:
    """The file's tensors in fp32, alpha folded into B."""
    tensors: Tensors = {}
    for name, adapter in _with_image_pair(lora.layers).items():
        for i, down, up in each(adapter, name):
            layer = "diffusion_model." + _numbered(by_layer()[name].official, i)
            tensors[f"{layer}.lora_A.weight"] = np.ascontiguousarray(down.T)
            tensors[f"{layer}.lora_B.weight"] = _folded(adapter, up)
    for name, change in lora.changes.items():
        module = by_parameter()[name]
        row, end = (
            (module.weight, "diff") if name == module.weight.ours else (module.bias, "diff_b")
        )
        for i, values in each_change(name, change):
            layer = "diffusion_model." + _numbered(module.official, i)
            tensors[f"{layer}.{end}"] = np.ascontiguousarray(row.op.to_theirs(values))
    return tensors


def to_diffusers(lora: LoRA) -> Tensors:
    """The file's tensors in fp32, alpha folded into B."""
    _refuse_changes(lora, "diffusers reads no changes of norms, biases or whole weights")
    tensors: Tensors = {}
    for name, adapter in lora.layers.items():
        for i, down, up in each(adapter, name):
            layer = "transformer." + _numbered(by_layer()[name].diffusers, i)
            tensors[f"{layer}.lora_A.weight"] = np.ascontiguousarray(down.T)
            tensors[f"{layer}.lora_B.weight"] = _folded(adapter, up)
    return tensors


def to_kohya(lora: LoRA) -> Tensors:
    """The file's tensors in fp32, with the alpha of each layer."""
    _refuse_changes(lora, "musubi-tuner reads no changes of norms, biases or whole weights")
    outside = [name for name in lora.layers if not in_a_block(name)]
    if outside:
        raise UserError(
            f"musubi-tuner takes adapters of the blocks only, and this one has {some(outside)}; "
            "use --format comfyui."
        )
    tensors: Tensors = {}
    for name, adapter in lora.layers.items():
        for i, down, up in each(adapter, name):
            layer = "lora_unet_" + _numbered(by_layer()[name].official, i).replace(".", "_")
            tensors[f"{layer}.lora_down.weight"] = np.ascontiguousarray(down.T)
            tensors[f"{layer}.lora_up.weight"] = np.ascontiguousarray(up.T)
            tensors[f"{layer}.alpha"] = np.asarray(adapter.alpha, np.float32)
    return tensors


LAYOUTS = {
    "comfyui": to_comfyui,
    "diffusers": to_diffusers,
    "kohya": to_kohya,
    "musubi": to_kohya,
}


def write_lora(path: Path, lora: LoRA, layout: str, dtype: np.dtype) -> None:
    """Write a file of a layout, whole or not at all; alphas stay in fp32."""
    for name in (*lora.layers, *lora.changes):
        if name not in by_layer() and name not in by_parameter():
            raise UserError(f"'{name}' is no layer of Wan2.1; check where the adapter came from.")
    with np.errstate(over="ignore"):  # what does not fit is refused next
        tensors = {
            name: t if name.endswith(".alpha") else t.astype(dtype)
            for name, t in LAYOUTS[layout](lora).items()
        }
    for name, tensor in tensors.items():
        if not np.isfinite(tensor).all():
            raise UserError(f"'{name}' has values that {dtype} cannot hold; use --dtype float32.")
    header = {name: (t.dtype, t.shape) for name, t in tensors.items()}
    with (
        whole_file(Path(path)) as partial,
        SafetensorsWriter(partial, header, _metadata(lora, path, layout)) as writer,
    ):
        for name, tensor in tensors.items():
            writer.write(name, tensor)


def each(adapter: LayerAdapter, name: str) -> Iterator[tuple[int | None, np.ndarray, np.ndarray]]:
    """The adapter of every block with its number, or the one of a layer outside of the blocks."""
    numbers = adapter.numbers if in_a_block(name) else [None]
    return zip(numbers, adapter.down, adapter.up)


def each_change(name: str, change: Change) -> Iterator[tuple[int | None, np.ndarray]]:
    if "{i}" not in by_parameter()[name].official:
        return iter([(None, change.values)])
    numbers = range(len(change.values)) if change.blocks is None else change.blocks
    return zip(numbers, change.values)


def _numbered(name: str, block: int | None) -> str:
    return name.replace("{i}", str(block))


def _folded(adapter: LayerAdapter, up: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(up.T * np.float32(adapter.scale))


def _refuse_changes(lora: LoRA, reason: str) -> None:
    if lora.changes:
        raise UserError(
            f"{reason}, and this one has {some(list(lora.changes))}; use --format comfyui."
        )


def _with_image_pair(layers: Mapping[str, LayerAdapter]) -> dict[str, LayerAdapter]:
    """Both image projections of each block or none: a missing one becomes zeros. diffusers
    wants both somewhere in the file, and with both in each block no reader is left to guess."""
    given = [layers[role] for role in CROSS_IMAGE if role in layers]
    blocks = sorted({i for adapter in given for i in adapter.numbers})
    both = {
        role: _spread(layers.get(role, given[0]), blocks, role in layers)
        for role in CROSS_IMAGE
        if given
    }
    return {**layers, **both}


def _spread(adapter: LayerAdapter, blocks: list[int], is_given: bool) -> LayerAdapter:
    """The adapter in all of `blocks`: zeros in those that it lacks, or everywhere."""
    numbers = tuple(adapter.numbers)
    down, up = (
        over(blocks[-1] + 1, numbers, part if is_given else np.zeros_like(part))[blocks]
        for part in (adapter.down, adapter.up)
    )
    return replace(adapter, down=down, up=up, blocks=tuple(blocks))


def _metadata(lora: LoRA, path: Path, layout: str) -> dict[str, str]:
    rank = max((a.rank for a in lora.layers.values()), default=0)
    kept = {k: v for k, v in lora.metadata.items() if k.startswith(("ss_", "modelspec."))}
    facts = {k: v for k, v in lora.metadata.items() if k not in kept}
    alpha = next((a.alpha for a in lora.layers.values()), 0.0)
    folded = {METADATA: json.dumps(_peft_config(lora), sort_keys=True)}
    return {
        "ss_base_model_version": "wan2.1",
        "modelspec.architecture": "wan2.1/lora",
        "modelspec.title": Path(path).stem,
        **kept,
        **{k if k.startswith("wanjax.") else f"wanjax.{k}": v for k, v in facts.items()},
        "wanjax.alpha": f"{alpha:g}",
        "format": "pt",
        "ss_network_dim": str(rank),
        # Where alpha is folded into the weights it equals the rank, for a reader of the file.
        "ss_network_alpha": f"{alpha:g}" if LAYOUTS[layout] is to_kohya else str(rank),
        **(folded if layout == "diffusers" else {}),
    }


def _peft_config(lora: LoRA) -> dict[str, object]:
    """What PEFT's `LoraConfig` is told, with the prefix that diffusers wants: alpha is the rank."""
    ranks = {
        _numbered(by_layer()[name].diffusers, i): adapter.rank
        for name, adapter in lora.layers.items()
        for i, _, _ in each(adapter, name)
    }
    most = max(ranks.values(), default=1)
    others = {name: rank for name, rank in ranks.items() if rank != most}
    config = {
        "r": most,
        "lora_alpha": most,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(ranks),
        "peft_type": "LORA",
    }
    return {f"transformer.{name}": value for name, value in config.items()}
