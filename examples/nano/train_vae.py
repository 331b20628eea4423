"""Train nano's VAE to give back what it is shown: L1 + LPIPS + a small KL, streaming and causal as
in use.

    python -m examples.nano.train_vae --films build/nano/films --out build/nano/vae

It learns single frames first, which are cheap, then short videos, then longer ones. What looks at
earlier frames starts as zero, and what makes more of them as a cross-fade, so that a frame VAE is
where the video VAE begins. The mean and std of its latents are measured at the end and stored in
its config.
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
from optax.contrib import MuonDimensionNumbers, muon

from examples.nano.loop import train
from examples.nano.stills import FPS, FRAMES, HEIGHT, WIDTH
from wanjax.causal import CausalConv
from wanjax.data.clips import read_dataset, windows
from wanjax.data.framing import fit
from wanjax.errors import UserError, run_script
from wanjax.eval.lpips import LPIPS
from wanjax.models.vae import VAE, Downsample, ResidualBlock, Upsample, VAEConfig
from wanjax.progress import progress_bar
from wanjax.weights import save_native

CONFIG = VAEConfig(base_dim=12, num_res_blocks=1, latents_mean=(0.0,) * 16, latents_std=(1.0,) * 16)


@dataclass(frozen=True)
class Stage:
    """Steps on crops of `frames` frames, `batch` at a time, with LPIPS weighted by `lpips`; the
    learning rate falls from `rate` to zero."""

    name: str
    steps: int
    frames: int
    batch: int
    lpips: float
    rate: float


STAGES = (
    Stage("frames", steps=3000, frames=1, batch=8, lpips=0.2, rate=5e-3),
    Stage("videos", steps=1800, frames=9, batch=2, lpips=0.3, rate=3e-3),
    # Beyond the 9 frames it has seen, contrast drifts: a held-out film was at 25.5 dB before this
    # stage and at 30 dB after it.
    Stage("long", steps=600, frames=25, batch=1, lpips=0.3, rate=1e-3),
)
CROP, KL_WEIGHT = 64, 1e-6


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
    for stage in stages:
        vae = train_stage(vae, stage, films, arguments.out / stage.name, arguments.seed)
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
    """A VAE that treats each frame alone, residual blocks that do nothing yet, and between the
    latents of two chunks a cross-fade: what is learnt from here is detail, and then motion."""
    vae = VAE(CONFIG, rngs=nnx.Rngs(seed))
    for _, module in nnx.iter_modules(vae):
        if isinstance(module, ResidualBlock):
            module.conv_out.kernel[...] = jnp.zeros_like(module.conv_out.kernel[...])
        elif isinstance(module, CausalConv) and module.kernel.shape[:2] == (3, 3):
            module.kernel[...] = module.kernel[...].at[:-1].set(0)
    for _, module in nnx.iter_modules(vae):
        if isinstance(module, Downsample | Upsample) and module.time is not None:
            module.time.kernel[...] = _in_between(*module.time.kernel.shape[-2:])
    return vae


def _in_between(d_in: int, d_out: int) -> jax.Array:
    """A kernel `3 1 1 C C2` that takes the later of two frames; or that makes two frames of one,
    itself and before it the mean with the one before."""
    same, none = jnp.eye(d_in), jnp.zeros((d_in, d_in))
    if d_in == d_out:
        taps = [none, none, same]
    else:
        pairs = (none, none), (same / 2, none), (same / 2, same)
        taps = [jnp.concatenate(pair, axis=1) for pair in pairs]
    return jnp.stack(taps)[:, None, None]


def train_stage(vae: VAE, stage: Stage, films: list[np.ndarray], run: Path, seed: int) -> VAE:
    """The VAE after one stage, or after what is left of it."""
    graph, weights = nnx.split(vae)
    rate = optax.warmup_cosine_decay_schedule(
        0.0, stage.rate, min(50, stage.steps // 4), stage.steps
    )
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), muon_of(rate))
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


def muon_of(rate: optax.Schedule) -> optax.GradientTransformation:
    """Muon for the kernels and Adam for vectors, with steps of equal size (Jordan 2024; Liu et al.,
    arXiv 2502.16982). A convolution's kernel is a matrix from all that it sees to its channels."""

    def matrices(weights):
        return jax.tree.map(
            lambda x: (
                MuonDimensionNumbers(tuple(range(x.ndim - 1)), x.ndim - 1) if x.ndim > 1 else None
            ),
            weights,
        )

    return muon(rate, muon_weight_dimension_numbers=matrices, consistent_rms=0.2, adam_b2=0.99)


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
