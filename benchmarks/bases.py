"""What a base in 8 or 4 bits costs in exactness, and what it takes: `python -m benchmarks.bases`.

The error is the relative L2 norm of a velocity's change, everything computed in fp32, so that it is
that of the codes alone. Three models: four layers of width 1,024 with normal weights; the same with
0.1 % of each kernel's rows a thousand times as large, once those of the fan-in and once outputs;
and `assets/nano`, on the film that its demo shows. "A channel" is int8 with one scale for each
output, which is what blocks of 64 are to be compared with. Memory is that of I2V-14B's weights.
"""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from convert.native import convert_pipeline
from examples import demo
from examples.measures import batch_of, pixels
from wanjax import Pipeline, quantisation
from wanjax.models.dit import DiT, DiTConfig
from wanjax.nn import linears
from wanjax.quantisation import CODES, UNQUANTISED, quantise
from wanjax.weights import device_bytes, random_network

WIDE = DiTConfig(
    dim=1024, ffn_dim=4096, num_layers=4, num_heads=8, text_dim=256, text_len=64, image_dim=128
)
OUTLIERS, LARGER = 0.001, 1000
TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)
CHANNEL = "int8, a channel"

Inputs = tuple[np.ndarray, ...]
Model = tuple[DiT, list[Inputs]]


def main() -> None:
    models = {name: (build(), random_inputs()) for name, build in WIDE_MODELS.items()}
    models["assets/nano"] = nano()
    print(f"| base | {' | '.join(models)} | I2V-14B |\n|---|{'---|' * (len(models) + 1)}")
    print("| bfloat16 |" + " - |" * len(models) + f" {gigabytes(UNQUANTISED)} |", flush=True)
    for base in (*CODES, CHANNEL):
        errors = " | ".join(f"{error(base, model):.2%}" for model in models.values())
        print(f"| {base} | {errors} | {gigabytes(base)} |", flush=True)


def gigabytes(base: str) -> str:
    if base == CHANNEL:
        return "-"
    return f"{device_bytes('dit', DiTConfig(), jnp.bfloat16, base=base) / 1e9:.1f} GB"


def error(base: str, model: Model) -> float:
    """The mean over inputs."""
    whole, inputs = model
    coded = nnx.merge(*nnx.split(whole))  # with the same arrays
    with one_scale_a_channel(base == CHANNEL):
        quantise(coded, "int8" if base == CHANNEL else base)
    return float(np.mean([distance(coded, whole, given) for given in inputs]))


def distance(coded: DiT, whole: DiT, given: Inputs) -> float:
    found, right = (np.asarray(velocity(dit, *given)) for dit in (coded, whole))
    return np.linalg.norm(found - right) / np.linalg.norm(right)


@jax.jit
def velocity(dit: DiT, *given: jax.Array) -> jax.Array:
    return dit(*given)


@contextmanager
def one_scale_a_channel(asked: bool) -> Iterator[None]:
    """Let a block be the whole fan-in."""
    block = quantisation.BLOCK
    quantisation.BLOCK = 1 << 20 if asked else block
    try:
        yield
    finally:
        quantisation.BLOCK = block


def wide() -> DiT:
    return random_network("dit", WIDE, dtype=jnp.float32)


def with_outliers(dit: DiT, axis: int) -> DiT:
    """In every kernel some rows (`axis` -2: of the fan-in; -1: outputs) a thousand times larger."""
    rng = np.random.default_rng(1)
    for _, layer in linears(dit):
        kernel = np.array(layer.kernel[...])
        for number in kernel:
            size = number.shape[axis]
            rows = rng.choice(size, max(1, round(OUTLIERS * size)), replace=False)
            number[rows if axis == -2 else np.s_[:, rows]] *= LARGER
        layer.kernel[...] = jnp.asarray(kernel)
    return dit


WIDE_MODELS: dict[str, Callable[[], DiT]] = {
    "normal weights": wide,
    "outlying inputs": lambda: with_outliers(wide(), axis=-2),
    "outlying outputs": lambda: with_outliers(wide(), axis=-1),
}


def random_inputs(count: int = 4) -> list[Inputs]:
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.standard_normal((1, *shape), np.float32)  # noqa: E731
    grid = (2, 6, 8)
    times = (np.asarray([1000 * t], np.float32) for t in TIMES)
    return [
        (normal(*grid, 16), time, normal(64, 256), normal(17, 128), normal(*grid, 20))
        for _, time in zip(range(count), times)
    ]


def nano() -> Model:
    """The model that ships, and a window of the film which it never saw, at five times."""
    with tempfile.TemporaryDirectory() as folder:
        convert_pipeline(demo.NANO, Path(folder) / "nano")
        pipeline = Pipeline.load(Path(folder) / "nano", dtype="float32")
        film = demo.chosen_film(None, None)
        cut = demo.windows_of(film)
        batch = batch_of(pipeline, pixels(demo.truth_of(cut[len(cut) // 2])), film.caption)
        dit = pipeline.dit
    c = batch.condition
    noise = np.asarray(jax.random.normal(jax.random.key(0), batch.latents.shape))
    mixed = lambda t: (1 - t) * batch.latents + t * noise  # noqa: E731
    times = [np.asarray([1000 * t], np.float32) for t in TIMES]
    inputs = [(mixed(t), time, c.text, c.image, c.latents) for t, time in zip(TIMES, times)]
    return dit, inputs


if __name__ == "__main__":
    main()
