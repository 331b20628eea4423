"""Denoise step, VAE and LoRA step against diffusers on the same CPU, in one run, at a small size.

    make bench        (python -m benchmarks.compare [--repeats 5])

Both sides have the same shapes, fp32, random weights, and the same number of threads. Each pair is
timed in turn, A B A B, after a warm-up that compiles; the table gives medians and the median of the
pairwise ratios, which holds when the machine's speed drifts. A ratio under 1 means we are faster.
"""

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version

import jax
import jax.numpy as jnp
import numpy as np
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from peft import LoraConfig

from wanjax.denoising import denoise_step, prepare_rows
from wanjax.models.dit import DiTConfig
from wanjax.models.vae import VAEConfig
from wanjax.solvers import initial_state, make_schedule
from wanjax.training import TrainConfig, Trainer
from wanjax.types import Batch, Condition
from wanjax.weights import random_network

CONFIG = DiTConfig(dim=768, ffn_dim=2048, num_layers=6, num_heads=6, text_dim=512, image_dim=640)
GRID = (5, 20, 32)  # latents of 17 frames at 160x256: 800 tokens
RANK = 8
VAE_FRAMES, VAE_HEIGHT, VAE_WIDTH = 9, 64, 96


@dataclass(frozen=True)
class Pair:
    """One thing to time, on both sides; each call waits for its result."""

    name: str
    ours: Callable[[], object]
    theirs: Callable[[], object]


def inputs(batch: int) -> dict[str, np.ndarray]:
    """Random latents, condition, text and image tokens, channels last."""
    rng = np.random.default_rng(0)
    shapes = {
        "latents": (batch, *GRID, 16),
        "condition": (batch, *GRID, 20),
        "text": (batch, 512, CONFIG.text_dim),
        "image": (batch, 257, CONFIG.image_dim),
    }
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def reference_dit() -> WanTransformer3DModel:
    return WanTransformer3DModel(
        num_attention_heads=CONFIG.num_heads,
        attention_head_dim=CONFIG.head_size,
        in_channels=CONFIG.in_channels,
        text_dim=CONFIG.text_dim,
        ffn_dim=CONFIG.ffn_dim,
        num_layers=CONFIG.num_layers,
        image_dim=CONFIG.image_dim,
        added_kv_proj_dim=CONFIG.dim,
    )


def call_reference(model: WanTransformer3DModel, given: dict, times: torch.Tensor) -> torch.Tensor:
    x = torch.cat([given["latents"], given["condition"]], -1).movedim(-1, 1)
    return model(x, times, given["text"], given["image"], return_dict=False)[0]


def denoise_pair() -> Pair:
    """One guided step: both branches as a batch of two here, one after the other there. What is
    computed once for a video here is not counted; there it is part of every step."""
    dit = random_network("dit", CONFIG, dtype=jnp.float32)
    one = inputs(1)
    condition = Condition(one["text"], one["image"], one["condition"])
    schedule = make_schedule("unipc", 10, 5.0)
    rows = prepare_rows(dit, (condition, condition))

    def ours() -> None:
        state = initial_state(jnp.asarray(one["latents"]))
        given = (np.float32(900), schedule.row(0), rows, np.float32(5))
        state = denoise_step(dit, state, *given, guided=True)
        state.x.block_until_ready()

    model = reference_dit().eval()
    given = {name: torch.from_numpy(x) for name, x in one.items()}

    @torch.no_grad()
    def theirs() -> None:
        positive, negative = (call_reference(model, given, torch.tensor([900.0])) for _ in "ab")
        negative + 5 * (positive - negative)

    return Pair("denoise step, guided", ours, theirs)


def lora_pair() -> Pair:
    """One training step of rank-8 adapters on cross-attention, gradient checkpointing on."""
    settings = TrainConfig(rank=RANK, targets="attention", dtype="float32")
    trainer = Trainer(random_network("dit", CONFIG, dtype=jnp.float32), settings)
    one = inputs(1)
    batch = Batch(one["latents"], Condition(one["text"], one["image"], one["condition"]))

    model = reference_dit()
    model.requires_grad_(False)
    names = ["to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj"]
    model.add_adapter(LoraConfig(r=RANK, lora_alpha=16, target_modules=names))
    model.enable_gradient_checkpointing()
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-5)
    given = {name: torch.from_numpy(x) for name, x in one.items()}

    def theirs() -> None:
        noise, t = torch.randn_like(given["latents"]), torch.rand(1)
        noisy = given | {"latents": (1 - t) * given["latents"] + t * noise}
        velocity = call_reference(model, noisy, 1000 * t).movedim(1, -1)
        loss = torch.nn.functional.mse_loss(velocity, noise - given["latents"])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return Pair("LoRA step", lambda: float(trainer.train(batch)["loss"]), theirs)


def vae_pairs() -> list[Pair]:
    """Encode and decode at full width."""
    vae = random_network("vae", VAEConfig(), dtype=jnp.float32)
    reference = AutoencoderKLWan().eval()
    rng = np.random.default_rng(0)
    video = rng.uniform(-1, 1, (1, VAE_FRAMES, VAE_HEIGHT, VAE_WIDTH, 3)).astype(np.float32)
    shape = (1, (VAE_FRAMES - 1) // 4 + 1, VAE_HEIGHT // 8, VAE_WIDTH // 8, 16)
    latents = rng.standard_normal(shape, np.float32)
    as_torch = lambda x: torch.from_numpy(x).movedim(-1, 1).contiguous()  # noqa: E731
    torch_video, torch_latents = as_torch(video), as_torch(latents)

    @torch.no_grad()
    def their_encode() -> object:
        return reference.encode(torch_video).latent_dist.mode()

    @torch.no_grad()
    def their_decode() -> object:
        return reference.decode(torch_latents, return_dict=False)

    return [
        Pair("VAE encode", lambda: vae.encode(video).block_until_ready(), their_encode),
        Pair("VAE decode", lambda: vae.decode(latents).block_until_ready(), their_decode),
    ]


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def compare(pair: Pair, repeats: int) -> tuple[float, float, float]:
    """Median seconds of ours and theirs, and the median of the pairwise ratios."""
    pair.ours(), pair.theirs()
    times = [(seconds(pair.ours), seconds(pair.theirs)) for _ in range(repeats)]
    ours, theirs = (statistics.median(column) for column in zip(*times))
    return ours, theirs, statistics.median(a / b for a, b in times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(os.cpu_count())
    packages = ", ".join(f"{name} {version(name)}" for name in ("jax", "torch", "diffusers"))
    tokens = GRID[0] * GRID[1] * GRID[2] // 4
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} threads; {packages}")
    print(f"DiT: {CONFIG.num_layers} layers of {CONFIG.dim}, {tokens:,} tokens; VAE at full width, "
          f"{VAE_FRAMES} frames of {VAE_HEIGHT}x{VAE_WIDTH}; fp32; {repeats} pairs\n")  # fmt: skip
    print("| | wanjax (s) | diffusers (s) | ratio |\n|---|---|---|---|")
    for build in (lambda: [denoise_pair()], lambda: [lora_pair()], vae_pairs):
        for pair in build():
            ours, theirs, ratio = compare(pair, repeats)
            print(f"| {pair.name} | {ours:.2f} | {theirs:.2f} | {ratio:.2f} |", flush=True)
        jax.clear_caches()


if __name__ == "__main__":
    main()
