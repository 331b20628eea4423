"""A whole Wan2.1 image-to-video checkpoint at toy widths, with random weights: `nano`.

The structure is the 14B's; only widths and depths differ, and the tokenizer is trained on the given
captions. What is random still has to be of a usable scale: the latents' mean and std are measured
on the clip that will be trained on, as Wan measured its own.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx

from examples.toy_tokenizer import train_toy_tokenizer
from wanjax.models.presets import ARCHITECTURES
from wanjax.weights import random_network, save_native


def write_random_nano(
    folder: Path, captions: Sequence[str], frames: np.ndarray, seed: int = 0
) -> None:
    """Write the native folder. `frames` (uint8 `T H W 3`, T = 4n+1) calibrate the VAE."""
    networks = {
        name: random_network(name, config, dtype=jnp.float32, seed=seed + i)
        for i, (name, config) in enumerate(ARCHITECTURES["nano"].items())
    }
    networks["vae"] = calibrated(networks["vae"], frames)
    with tempfile.TemporaryDirectory() as tokenizer:
        train_toy_tokenizer(captions, tokenizer)
        save_native(folder, networks, tokenizer=tokenizer)


def calibrated(vae: nnx.Module, frames: np.ndarray) -> nnx.Module:
    """The VAE with the mean and std of its own latents of `frames` in its config."""
    channels = vae.config.z_dim
    vae.config = replace(vae.config, latents_mean=(0.0,) * channels, latents_std=(1.0,) * channels)
    latents = np.asarray(vae.encode(frames[None].astype(np.float32) / 127.5 - 1))
    mean, std = latents.mean((0, 1, 2, 3)), latents.std((0, 1, 2, 3))
    vae.config = replace(
        vae.config, latents_mean=tuple(map(float, mean)), latents_std=tuple(map(float, std))
    )
    return vae
