"""What the examples measure of videos. Videos are `T H W 3` in [-1, 1] unless said otherwise."""

import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from configs import SampleJob
from wanjax.eval.lpips import LPIPS
from wanjax.flow import losses_at
from wanjax.pipeline import Pipeline
from wanjax.training import VALIDATION_TIMES
from wanjax.types import Batch, Conditioned

Video = Float[np.ndarray, "T H W 3"]
CHUNK = 4  # frames to a latent


def signed(frames: UInt8[np.ndarray, "T H W 3"]) -> Video:
    """Pixels as the networks see them."""
    return frames.astype(np.float32) / 127.5 - 1


def pixels(video: Video) -> UInt8[np.ndarray, "T H W 3"]:
    """The inverse of `signed`."""
    return np.clip((video + 1) * 127.5, 0, 255).round().astype(np.uint8)


def psnr(a: Video, b: Video) -> float:
    """Decibels, against a range of 2."""
    return float(10 * np.log10(4 / np.mean((a - b) ** 2)))


def lpips(judge: LPIPS, a: Video, b: Video) -> float:
    """Mean LPIPS of frames."""
    return float(_lpips(judge, jnp.asarray(a), jnp.asarray(b)).mean())


_lpips = jax.jit(LPIPS.__call__)


def motion(video: Video) -> float:
    """Mean change of a pixel from frame to frame."""
    return float(np.abs(np.diff(video, axis=0)).mean())


def borders(again: Video, truth: Video) -> dict[str, float]:
    """How much more frames change in the reconstruction than in the film, between chunks of the
    VAE and inside of them. Equal ratios: no flicker at the borders."""
    found, meant = (np.abs(np.diff(video, axis=0)).mean((1, 2, 3)) for video in (again, truth))
    between = np.arange(len(found)) % CHUNK == 0
    # Means first: a film that rests for a moment would otherwise be divided by nothing.
    return {
        "border_change": float(found[between].mean() / (meant[between].mean() + 1e-4)),
        "inner_change": float(found[~between].mean() / (meant[~between].mean() + 1e-4)),
    }


def batch_of(pipeline: Pipeline, frames: UInt8[np.ndarray, "T H W 3"], caption: str) -> Batch:
    """The film as training sees it: its latents, under its first frame and caption."""
    count, height, width, _ = frames.shape
    given = pipeline.condition(
        image=frames[0], prompt=caption, height=height, width=width, frames=count
    )
    latents = pipeline.vae.encode(jnp.asarray(signed(frames))[None])
    return Batch(np.asarray(latents), given.positive)


def flow_loss_of(pipeline: Pipeline, batch: Batch, draws: int = 1) -> Float[np.ndarray, " B"]:
    """Every example's flow-matching loss, the mean over fixed times and `draws` fixed noises."""
    total = np.zeros(len(batch.latents))
    for draw in range(draws):
        noise = jax.random.normal(jax.random.key(draw), batch.latents.shape)
        for time in VALIDATION_TIMES:
            times = jnp.full(len(total), time)
            total += np.asarray(_losses_at(pipeline.dit, batch, times, noise))
    return total / (draws * len(VALIDATION_TIMES))


_losses_at = jax.jit(losses_at)


def sample_from(pipeline: Pipeline, batch: Batch, settings: SampleJob, seed: int = 0) -> Video:
    """The video of the one example's own condition, with the schedule of `settings`, unguided."""
    _, latents, height, width, _ = batch.latents.shape
    t, h, w = pipeline.configs["vae"].stride
    frames = t * (latents - 1) + 1
    given = Conditioned(batch.condition, batch.condition, h * height, w * width, frames)
    video = pipeline.generate(
        given,
        steps=settings.steps,
        guidance=1.0,
        shift=settings.shift,
        solver=settings.solver,
        seed=seed,
    )
    return np.asarray(video) * 2 - 1


def digest(folder: Path) -> dict[str, int]:
    """A number for every file in the folder, which changes when the file does."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): zlib.crc32(file.read_bytes()) for file in files}
