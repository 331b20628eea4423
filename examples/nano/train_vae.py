"""Train nano's VAE to give back what it is shown: L1 + LPIPS + a small KL, streaming and causal as
in use.

    python -m examples.nano.train_vae --films build/nano/films --out build/nano/vae

It learns single frames first, which are cheap, and then short videos. What looks at earlier frames
starts as zero, and what changes the number of frames as a copy, so that a frame VAE is where the
video VAE begins. The mean and std of its latents are measured at the end and stored in its config.
"""

import argparse
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from examples.nano.loop import train
from examples.nano.stills import FPS, FRAMES, HEIGHT, WIDTH
from wanjax.data.clips import read_dataset, windows
from wanjax.data.framing import fit
from wanjax.errors import UserError, run_script
from wanjax.eval.lpips import LPIPS
from wanjax.models.vae import VAE, Downsample, Upsample, VAEConfig
from wanjax.progress import progress_bar
from wanjax.weights import save_native

CONFIG = VAEConfig(base_dim=12, num_res_blocks=1, latents_mean=(0.0,) * 16, latents_std=(1.0,) * 16)


@dataclass(frozen=True)
class Stage:
    """Steps on crops of `frames` frames, `batch` at a time, with LPIPS weighted by `lpips`."""

    name: str
    steps: int
    frames: int
    batch: int
    lpips: float


STAGES = (
    Stage("frames", steps=4000, frames=1, batch=8, lpips=0.05),
    Stage("videos", steps=2200, frames=9, batch=2, lpips=0.1),
)
CROP = 64
LEARNING_RATE, KL_WEIGHT = 1.5e-3, 1e-6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--films", type=Path, required=True, help="folder of examples.nano.films")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="of the numbers of steps")
    arguments = parser.parse_args()
    films = read_films(arguments.films, "train")
    vae = first_vae(arguments.seed)
    stages = [replace(s, steps=max(1, int(s.steps * arguments.scale))) for s in STAGES]
    for number, stage in enumerate(stages):
        last = number == len(stages) - 1
        vae = train_stage(vae, stage, films, arguments.out / stage.name, arguments.seed, last)
    vae = with_statistics(vae, films)
    if not (arguments.out / "native").exists():
        save_native(arguments.out / "native", {"vae": vae})


def read_films(folder: Path, split: str) -> list[np.ndarray]:
    """Every window of the split, uint8 `T H W 3` at the size of nano."""
    cut = [w for w in windows(read_dataset(folder), FRAMES, FPS) if w.shot.split == split]
    if not cut:
        raise UserError(f"{folder} has no windows of the split {split}; run examples.nano.films.")
    films = []
    with progress_bar("Reading films", len(cut)) as bar:
        for window in cut:
            films.append(fit(window.read().frames, HEIGHT, WIDTH))
            bar.advance()
    return films


def first_vae(seed: int) -> VAE:
    """A VAE that treats each frame alone, and repeats frames where it makes more of them."""
    vae = VAE(CONFIG, rngs=nnx.Rngs(seed))
    for _, module in nnx.iter_modules(vae):
        kernel = getattr(module, "kernel", None)
        if kernel is not None and kernel.ndim == 5 and kernel.shape[0] == 3:
            kernel[...] = kernel[...].at[:-1].set(0)
    for _, module in nnx.iter_modules(vae):
        if isinstance(module, Downsample | Upsample) and module.time is not None:
            kernel = module.time.kernel
            same = jnp.eye(kernel.shape[-2])
            copies = kernel.shape[-1] // kernel.shape[-2]
            taps = jnp.zeros(kernel.shape[:1]).at[1:].set(0.5) if copies == 1 else jnp.eye(3)[2]
            kernel[...] = (taps[:, None, None] * jnp.tile(same, copies))[:, None, None]
    return vae


def train_stage(
    vae: VAE, stage: Stage, films: list[np.ndarray], run: Path, seed: int, last: bool
) -> VAE:
    """The VAE after one stage; the last one ends with a learning rate of zero."""
    graph, weights = nnx.split(vae)
    peak = LEARNING_RATE if not last else LEARNING_RATE * 0.7
    rate = optax.warmup_cosine_decay_schedule(
        0.0, peak, min(100, stage.steps // 4), stage.steps, 0.0 if last else peak * 0.4
    )
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.99, weight_decay=1e-4)
    )
    judge = LPIPS("alexnet")

    @partial(jax.jit, donate_argnums=0)
    def update(state, judge, video, key):
        weights, moments = state
        (loss, parts), slope = jax.value_and_grad(loss_of, has_aux=True)(
            weights, graph, judge, video, key, stage.lpips
        )
        change, moments = optimizer.update(slope, moments, weights)
        return (optax.apply_updates(weights, change), moments), {"loss": loss, **parts}

    def step_of(state, number):
        rng = np.random.default_rng((seed, stage.frames, number))
        video = np.stack([crop(films, stage.frames, rng) for _ in range(stage.batch)])
        key = jax.random.fold_in(jax.random.key(seed), number)
        return update(state, judge, video, key)

    state = (weights, optimizer.init(weights))
    state = train(f"VAE, {stage.name}", run, stage.steps, state, step_of)
    return nnx.merge(graph, state[0])


def loss_of(weights, graph, judge, video, key, lpips_weight):
    """L1 + LPIPS + KL of a batch of uint8 videos `B T H W 3`."""
    vae = nnx.merge(graph, weights)
    video = video.astype(jnp.float32) / 127.5 - 1
    mean, log_variance = vae.moments(video)
    log_variance = jnp.clip(log_variance, -30, 10)
    noise = jax.random.normal(key, mean.shape)
    seen = vae.reconstruct(mean + jnp.exp(0.5 * log_variance) * noise)
    absolute = jnp.abs(seen - video).mean()
    frames = seen.reshape(-1, *seen.shape[2:]), video.reshape(-1, *video.shape[2:])
    distance = judge(*frames).mean()
    kl = 0.5 * (mean**2 + jnp.exp(log_variance) - 1 - log_variance).sum(-1).mean()
    loss = absolute + lpips_weight * distance + KL_WEIGHT * kl
    psnr = 10 * jnp.log10(4 / jnp.mean((seen - video) ** 2))
    return loss, {"l1": absolute, "lpips": distance, "kl": kl, "psnr": psnr}


def crop(films: list[np.ndarray], frames: int, rng: np.random.Generator) -> np.ndarray:
    """A random stretch of a random film, `frames` by CROP by CROP, perhaps mirrored or reversed,
    half of the time in other colours, of which the films have too few."""
    film = films[rng.integers(len(films))]
    first = rng.integers(len(film) - frames + 1)
    top, left = (rng.integers(n - CROP + 1) for n in film.shape[1:3])
    video = film[first : first + frames, top : top + CROP, left : left + CROP]
    if rng.integers(2):
        video = video[:, :, ::-1]
    if rng.integers(2):
        video = video[::-1]
    return recoloured(video, rng) if rng.integers(2) else video


def recoloured(video: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The channels changed about, each with a gain and an offset of its own."""
    gain, offset = rng.uniform(0.6, 1.2, 3), rng.uniform(-30, 30, 3)
    return np.clip(video[..., rng.permutation(3)] * gain + offset, 0, 255).astype(np.uint8)


def with_statistics(vae: VAE, films: list[np.ndarray], count: int = 64) -> VAE:
    """The VAE with the mean and std per channel of its latents of `count` films in its config."""
    picked = films[:: max(1, len(films) // count)]
    latents = [np.asarray(vae.encode(f[None].astype(np.float32) / 127.5 - 1)) for f in picked]
    every = np.stack(latents)
    axes = tuple(range(every.ndim - 1))
    mean, std = every.mean(axes), every.std(axes)
    vae.config = replace(
        vae.config,
        latents_mean=tuple(float(f"{x:.4g}") for x in mean),
        latents_std=tuple(float(f"{x:.4g}") for x in std),
    )
    return vae


if __name__ == "__main__":
    run_script(main)
