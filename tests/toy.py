"""Tiny models and inputs that several tests share."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from wanjax.lora import LoRAParam
from wanjax.models.dit import DiT, DiTConfig
from wanjax.types import Batch, Condition
from wanjax.weights import random_network

SMALL = DiTConfig(
    dim=48,
    ffn_dim=80,
    num_layers=3,
    num_heads=4,
    text_dim=24,
    text_len=16,
    freq_dim=32,
    image_dim=20,
)


def toy_dit(seed: int = 0, dtype=jnp.float32, **changes) -> DiT:
    """A small DiT with random weights, the same for the same seed."""
    return random_network("dit", replace(SMALL, **changes), dtype=dtype, seed=seed)


def dit_inputs(batch: int = 2, seed: int = 1, grid=(3, 4, 6)):
    """Latents, timesteps, text, image tokens and condition."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    times = np.linspace(900, 100, batch).astype(np.float32)
    text = normal(batch, SMALL.text_len, SMALL.text_dim)
    image, condition = normal(batch, 5, SMALL.image_dim), normal(batch, *grid, 20)
    return normal(batch, *grid, 16), times, text, image, condition


def toy_batch(batch: int = 2, seed: int = 1, grid=(3, 4, 6)) -> Batch:
    """A training batch on the host."""
    latents, _, text, image, condition = dit_inputs(batch, seed, grid)
    return Batch(latents, Condition(text, image, condition))


def randomised_adapters(model: nnx.Module, seed: int = 0) -> nnx.Module:
    """Give every adapter weight a random value, in place."""
    state = nnx.state(model, LoRAParam)
    leaves, tree = jax.tree.flatten(state)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    noise = [0.3 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves)]
    nnx.update(model, jax.tree.unflatten(tree, noise))
    return model
