"""Adapter files as trainers write them, made without this project's own writers."""

import numpy as np
from safetensors.numpy import save_file

# The 12 matrices of a block: official names, and those of diffusers.
LAYERS = {
    **{f"self_attn.{x}": f"attn1.to_{x}" for x in "qkv"},
    **{f"cross_attn.{x}": f"attn2.to_{x}" for x in "qkv"},
    "self_attn.o": "attn1.to_out.0",
    "cross_attn.o": "attn2.to_out.0",
    "cross_attn.k_img": "attn2.add_k_proj",
    "cross_attn.v_img": "attn2.add_v_proj",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
}
OURS = {"ffn.0": "ffn.up", "ffn.2": "ffn.down"}  # where our name is another


def widths(layer: str, dim: int, ffn: int) -> tuple[int, int]:
    return {"ffn.0": (dim, ffn), "ffn.2": (ffn, dim)}.get(layer, (dim, dim))


def random_pairs(config, *, blocks=None, layers=tuple(LAYERS), ranks=(4,), seed=0):
    """`A` (r, in) and `B` (out, r) by block and official name; ranks in turn."""
    rng, found = np.random.default_rng(seed), {}
    for block in range(config.num_layers) if blocks is None else blocks:
        for layer in layers:
            rank = ranks[len(found) % len(ranks)]
            fan_in, fan_out = widths(layer, config.dim, config.ffn_dim)
            a = rng.standard_normal((rank, fan_in), np.float32) * 0.3
            found[block, layer] = a, rng.standard_normal((fan_out, rank), np.float32) * 0.3
    return found


def dotted(prefix: str, a: str, b: str, name=lambda layer: layer):
    return lambda i, layer: (f"{prefix}blocks.{i}.{name(layer)}", a, b)


def underscored(prefix: str):
    key = lambda i, layer: f"{prefix}blocks_{i}_{layer.replace('.', '_')}"  # noqa: E731
    return lambda i, layer: (key(i, layer), "lora_down.weight", "lora_up.weight")


FAMILIES = {
    "comfyui": dotted("diffusion_model.", "lora_A.weight", "lora_B.weight"),
    "comfyui, kohya names": dotted("diffusion_model.", "lora_down.weight", "lora_up.weight"),
    "whole model": dotted("model.diffusion_model.", "lora_down.weight", "lora_up.weight"),
    "diffusers": dotted("transformer.", "lora_A.weight", "lora_B.weight", LAYERS.get),
    "diffusers, default": dotted(
        "transformer.", "lora_A.default.weight", "lora_B.default.weight", LAYERS.get
    ),
    "musubi": underscored("lora_unet_"),
    "VideoX-Fun": underscored("lora_unet__"),
    "bare": dotted("", "lora_A.default.weight", "lora_B.default.weight"),
    "peft": dotted("base_model.model.", "lora_A.weight", "lora_B.weight"),
}


def in_family(family: str, pairs, alpha=None, dtype=np.float32) -> dict[str, np.ndarray]:
    """The tensors of a file; `alpha(n)` is that of the n-th layer, or None for no key."""
    tensors = {}
    for n, ((block, layer), (a, b)) in enumerate(pairs.items()):
        module, down, up = FAMILIES[family](block, layer)
        tensors[f"{module}.{down}"], tensors[f"{module}.{up}"] = a.astype(dtype), b.astype(dtype)
        if alpha is not None and alpha(n) is not None:
            tensors[f"{module}.alpha"] = np.asarray(alpha(n))
    return tensors


def save(path, tensors, metadata=None):
    """A file by the safetensors package, which has no bfloat16 here."""
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, path, metadata)
    return path


def merged(pairs, alpha=None) -> dict[tuple[int, str], np.ndarray]:
    """The change of each weight, (out, in), in float64."""
    found = {}
    for n, (key, (a, b)) in enumerate(pairs.items()):
        given = None if alpha is None else alpha(n)
        scale = 1 if given is None else float(np.asarray(given, np.float64).reshape(())) / len(a)
        found[key] = scale * (b.astype(np.float64) @ a.astype(np.float64))
    return found


def merged_by_us(lora) -> dict[tuple[int, str], np.ndarray]:
    """The same of a `LoRA`."""
    theirs = {ours: layer for layer, ours in OURS.items()}
    found = {}
    for role, layer in lora.layers.items():
        for i, down, up in zip(layer.numbers, layer.down, layer.up):
            change = down.astype(np.float64) @ up.astype(np.float64)
            found[i, theirs.get(role, role)] = layer.alpha / layer.rank * change.T
    return found


def assert_same_change(got, expected, tolerance=1e-6):
    """Equal by the largest value of each layer."""
    assert got.keys() == expected.keys()
    for key, change in expected.items():
        error = np.abs(got[key] - change).max() / np.abs(change).max()
        assert error <= tolerance, (key, error)
