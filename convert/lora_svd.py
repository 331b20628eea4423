"""Adapters by singular values: the difference of two checkpoints, and an adapter of lesser rank.

The first r singular values and vectors are the best approximation of rank r (Eckart and Young
1936); the share that they cover is that of the squared norm.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from convert.lora import describe, open_lora, write
from convert.lora_names import by_layer
from convert.mapping import native_plan
from convert.sources import kind_of, open_checkpoint
from wanjax.errors import UserError
from wanjax.lora import Change, LayerAdapter, LoRA
from wanjax.models.dit import DiTConfig
from wanjax.nn import STACK
from wanjax.progress import progress_bar
from wanjax.tensor_files import drop_pages, read_safetensors
from wanjax.weights import read_config

Parts = tuple[np.ndarray, ...]  # a tensor of ours: one for each block, or one outside of them


def lora_extract(
    base: Path, tuned: Path, out: Path, rank: int, format: str = "comfyui", dtype: str = "float32"
) -> str:
    """Write the difference of two checkpoints (native, official, diffusers or ComfyUI's) as an
    adapter of `rank`: matrices by SVD in fp32, all else (norms, biases, ...) as it stands."""
    if rank < 1:
        raise UserError(f"A LoRA of rank {rank} has no weights; use a rank of 1 or more.")
    (config, before), (other, after) = _leaves(base), _leaves(tuned)
    if config != other:
        raise UserError(
            f"{base} and {tuned} are models of other architectures ({_differing(config, other)}); "
            "give two that differ in their weights only."
        )
    layers, changes, covered = {}, {}, _Share()
    layer_of = {m.weight.ours: name for name, m in by_layer().items()}
    with progress_bar("Comparing", sum(map(len, before.values()))) as bar:
        for name, parts in before.items():
            found = {}
            for i, (old, new) in enumerate(zip(parts, after[name])):
                difference = np.asarray(new, np.float32) - np.asarray(old, np.float32)
                if difference.any():
                    found[i] = (
                        _truncated(difference, rank, covered) if name in layer_of else difference
                    )
                drop_pages(old)
                drop_pages(new)
                bar.advance()
            stacked = name.startswith(f"{STACK}.")
            if found and name in layer_of:
                layers[layer_of[name]] = _layer(found, stacked)
            elif found:
                changes[name] = _change(found, stacked)
    if not layers and not changes:
        raise UserError(f"{base} and {tuned} hold the same weights; there is nothing to extract.")
    facts = {"extracted_from": str(tuned), "extracted_base": str(base)}
    lora = LoRA(layers, facts, changes)
    write(out, lora, format, dtype)
    return f"{out}: {describe(lora)}\n{covered} of the change of the matrices is covered"


def lora_resize(
    src: Path, out: Path, rank: int, format: str = "comfyui", dtype: str = "float32"
) -> str:
    """Write an adapter whose every matrix has `rank`: in its best approximation, or filled up with
    zeros where it had less. Changes of whole parameters stay."""
    lora = open_lora(src)
    most = max((adapter.rank for adapter in lora.layers.values()), default=0)
    if not 1 <= rank <= most:
        raise UserError(f"rank={rank} is not a lesser rank than that of {src}; use 1 to {most}.")
    layers, covered = {}, _Share()
    for name, adapter in lora.layers.items():
        folded = adapter.up * np.float32(adapter.scale)
        pairs = [_shrunk(*pair, rank, covered) for pair in zip(adapter.down, folded)]
        down, up = (np.stack(x) for x in zip(*pairs))
        missing = rank - down.shape[-1]
        down = np.pad(down, ((0, 0), (0, 0), (0, missing)))
        up = np.pad(up, ((0, 0), (0, missing), (0, 0)))
        layers[name] = replace(adapter, down=down, up=up, alpha=float(rank))
    write(out, replace(lora, layers=layers), format, dtype)
    return f"{out}: {describe(replace(lora, layers=layers))}\n{covered} of the change is covered"


class _Share:
    """How much of the squared norm is kept, over all matrices."""

    def __init__(self) -> None:
        self._kept = self._all = 0.0

    def add(self, values: np.ndarray, rank: int) -> None:
        squares = np.asarray(values, np.float64) ** 2
        self._kept, self._all = self._kept + squares[:rank].sum(), self._all + squares.sum()

    def __str__(self) -> str:
        return f"{100 * self._kept / self._all:.4g} %" if self._all else "100 %"


def _truncated(matrix: np.ndarray, rank: int, share: _Share) -> tuple[np.ndarray, np.ndarray]:
    """`down` (C, r) and `up` (r, C2) of the best approximation, on whatever device JAX has."""
    u, values, v = (np.asarray(x) for x in jnp.linalg.svd(matrix, full_matrices=False))
    if not np.isfinite(values).all():
        raise UserError("The difference holds NaN or infinity; check both checkpoints.")
    share.add(values, rank)
    root = np.sqrt(values[:rank])
    return u[:, :rank] * root, root[:, None] * v[:rank]


def _shrunk(
    down: np.ndarray, up: np.ndarray, rank: int, share: _Share
) -> tuple[np.ndarray, np.ndarray]:
    """The same of a product, by the singular values of a small matrix, in float64."""
    left, right_of_left = np.linalg.qr(down.astype(np.float64))
    right, right_of_right = np.linalg.qr(up.T.astype(np.float64))
    u, values, v = np.linalg.svd(right_of_left @ right_of_right.T)
    share.add(values, rank)
    root = np.sqrt(values[:rank])
    pair = left @ u[:, :rank] * root, root[:, None] * (v[:rank] @ right.T)
    return tuple(x.astype(np.float32) for x in pair)


def _layer(found: Mapping[int, tuple[np.ndarray, np.ndarray]], stacked: bool) -> LayerAdapter:
    down, up = (np.stack(x) for x in zip(*found.values()))
    return LayerAdapter(down, up, float(down.shape[-1]), tuple(found) if stacked else None)


def _change(found: Mapping[int, np.ndarray], stacked: bool) -> Change:
    return Change(np.stack(list(found.values())), tuple(found)) if stacked else Change(found[0])


def _leaves(path: Path) -> tuple[DiTConfig, dict[str, Parts]]:
    """The denoiser of a checkpoint: its config, and its tensors in our names and layout."""
    if path.exists() and kind_of(path) == "native":
        configs = read_config(path)
        if "dit" not in configs:
            raise UserError(f"{path} holds no dit; convert the checkpoint again, with it.")
        tensors = read_safetensors(path / "dit.safetensors").tensors
        parts = {n: tuple(t) if n.startswith(f"{STACK}.") else (t,) for n, t in tensors.items()}
        return configs["dit"], parts
    source = open_checkpoint(path, ("dit",)).sources["dit"]
    named = source.named
    planned = native_plan(
        "dit", source.config, named.layout, named.tensors, str(path), np.dtype(np.float32)
    )
    return source.config, {tensor.name: tensor.parts for tensor in planned}


def _differing(one: DiTConfig, other: DiTConfig) -> str:
    return ", ".join(
        f"{name} {value} and {getattr(other, name)}"
        for name, value in vars(one).items()
        if getattr(other, name) != value
    )
