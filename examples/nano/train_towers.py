"""Train nano's text encoder and image tower together, as CLIP was: a film's caption and its frames
are to find each other among those of other films.

    python -m examples.nano.train_towers --films build/nano/films --out build/nano/towers

The image side of a pair is the film's first frame and a later one, so that the words for motion are
learnt as well. Pooling and projections serve the training only and are not kept. The tokenizer is
trained on the captions.
"""

import argparse
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from examples.nano.loop import train
from examples.nano.stills import FPS, FRAMES, HEIGHT, WIDTH
from examples.toy_tokenizer import train_toy_tokenizer
from wanjax.conditioning import prepare
from wanjax.data.clips import Window, read_dataset, windows
from wanjax.data.framing import fit
from wanjax.errors import run_script
from wanjax.models.clip import CLIPVision
from wanjax.models.presets import ARCHITECTURES
from wanjax.models.umt5 import UMT5
from wanjax.nn import Linear
from wanjax.progress import progress_bar
from wanjax.text import Tokenizer
from wanjax.types import Tokens
from wanjax.weights import save_native

STEPS, BATCH, WIDTH_OF_PAIRS = 1000, 64, 64
LEARNING_RATE = 1e-3
TOKENS = 96  # more than any caption has; padding is masked, so that fewer are only faster
LATER = (8, 16, 24, 32)  # frames that the first one is shown with


class Towers(nnx.Module):
    """Both encoders, and what makes one vector of each side of a pair."""

    def __init__(self, rngs: nnx.Rngs):
        text, image = (ARCHITECTURES["nano"][n] for n in ("text_encoder", "image_encoder"))
        self.text = UMT5(text, dtype=jnp.float32, rngs=rngs)
        self.image = CLIPVision(image, dtype=jnp.float32, rngs=rngs)
        self.of_text = Linear(text.dim, WIDTH_OF_PAIRS, dtype=jnp.float32, rngs=rngs)
        self.between = Linear(4 * image.dim, 2 * image.dim, dtype=jnp.float32, rngs=rngs)
        self.of_image = Linear(2 * image.dim, WIDTH_OF_PAIRS, dtype=jnp.float32, rngs=rngs)
        self.sharpness = nnx.Param(jnp.asarray(2.0))

    def texts(self, tokens: Tokens) -> jax.Array:
        """Unit vectors `B W` of captions."""
        mask = jnp.asarray(tokens.mask)[..., None]
        features = self.text(tokens.ids, tokens.mask) * mask
        return _unit(self.of_text(features.sum(1) / mask.sum(1)))

    def images(self, pairs: jax.Array) -> jax.Array:
        """Unit vectors `B W` of pairs of pictures `B 2 H W 3`."""
        tokens = self.image(pairs.reshape(-1, *pairs.shape[2:]))
        pooled = jnp.concatenate([tokens[:, 0], tokens[:, 1:].mean(1)], -1)
        both = pooled.reshape(len(pairs), -1)
        return _unit(self.of_image(jax.nn.gelu(self.between(both))))


def _unit(x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt((x * x).sum(-1, keepdims=True) + 1e-12)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--films", type=Path, required=True, help="folder of examples.nano.films")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args()
    shots = [s for s in read_dataset(arguments.films) if s.split == "train"]
    cut = windows(shots, FRAMES, FPS)
    folder = arguments.out / "tokenizer"
    if not folder.exists():
        train_toy_tokenizer(dict.fromkeys(shot.caption for shot in shots), folder)
    tokenizer = Tokenizer(folder, TOKENS)
    towers = train_towers(cut, tokenizer, arguments.out, arguments.steps, arguments.seed)
    if not (arguments.out / "native").exists():
        networks = {"text_encoder": towers.text, "image_encoder": towers.image}
        save_native(arguments.out / "native", networks, tokenizer=folder)


def train_towers(
    cut: list[Window], tokenizer: Tokenizer, run: Path, steps: int, seed: int
) -> Towers:
    """Towers after `steps` of contrastive training on the windows."""
    pictures = read_pictures(cut)
    tokens = tokenizer([window.shot.caption for window in cut])
    towers = Towers(nnx.Rngs(seed))
    graph, weights = nnx.split(towers)
    rate = optax.warmup_cosine_decay_schedule(0.0, LEARNING_RATE, min(100, steps // 4), steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=0.05))

    @partial(jax.jit, donate_argnums=0)
    def update(state, ids, mask, pairs):
        weights, moments = state
        (loss, found), slope = jax.value_and_grad(loss_of, has_aux=True)(
            weights, graph, Tokens(ids, mask), pairs
        )
        change, moments = optimizer.update(slope, moments, weights)
        return (optax.apply_updates(weights, change), moments), {"loss": loss, "found": found}

    def step_of(state, number):
        rng = np.random.default_rng((seed, number))
        rows = rng.choice(len(cut), min(BATCH, len(cut)), replace=False)
        later = rng.integers(1, pictures.shape[1], len(rows))
        pairs = np.stack([pictures[rows, 0], pictures[rows, later]], 1)
        return update(state, tokens.ids[rows], tokens.mask[rows], pairs)

    state = (weights, optimizer.init(weights))
    state = train("Towers", run / "run", steps, state, step_of)
    return nnx.merge(graph, state[0])


def loss_of(weights, graph, tokens, pairs):
    """InfoNCE in both directions; and how many captions find their film."""
    towers = nnx.merge(graph, weights)
    alike = towers.texts(tokens) @ towers.images(pairs).T * jnp.exp(towers.sharpness[...])
    target = jnp.arange(len(alike))
    losses = optax.softmax_cross_entropy_with_integer_labels
    loss = (losses(alike, target) + losses(alike.T, target)).mean() / 2
    return loss, (alike.argmax(1) == target).mean()


def read_pictures(cut: list[Window]) -> np.ndarray:
    """CLIP's inputs `windows 1+later H W 3` of the first frame and some later ones."""
    size = ARCHITECTURES["nano"]["image_encoder"].image_size
    rows = []
    with progress_bar("Reading films", len(cut)) as bar:
        for window in cut:
            frames = fit(window.read().frames, HEIGHT, WIDTH)
            rows.append([_clip_input(frames[i], size) for i in (0, *LATER)])
            bar.advance()
    return np.asarray(rows, np.float32)


def _clip_input(frame: np.ndarray, size: int) -> np.ndarray:
    """As sampling prepares it."""
    prepared = prepare(frame, frames=1, height=HEIGHT, width=WIDTH, clip_size=size)
    return prepared.clip[0]


if __name__ == "__main__":
    run_script(main)
