"""The 14B model's own programs timed on one GPU or TPU: `python -m benchmarks.accelerator`.

No weights are downloaded and no film is read: the weights are random and made on the device, of the
true sizes. Each line is printed when it is known: seconds (the median of `--repeats`, after a first
call that compiles), the model's arithmetic by formula (`wanjax.work`, nothing computed again counts)
over that time, its share of the chip's published peak, and the most memory that the process has held
until then. It takes about 8 minutes and fits 80 GB; words choose parts, as in `... accelerator lora`.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from math import prod

os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from wanjax import work
from wanjax.attention.kernels import compute
from wanjax.attention.reference import attend
from wanjax.chips import GIB, chip_of
from wanjax.denoising import denoise_step, prepare_rows
from wanjax.models.dit import DiT, DiTConfig
from wanjax.models.vae import VAEConfig
from wanjax.sharding import one_device
from wanjax.solvers import initial_state, make_schedule
from wanjax.training import TrainConfig, Trainer
from wanjax.types import Batch, Condition
from wanjax.weights import abstract_network

CONFIG = DiTConfig()
GRIDS = {"480p33": (9, 60, 104), "480p81": (21, 60, 104)}
GRIDS |= {"720p33": (9, 90, 160), "720p81": (21, 90, 160)}
HEADS, HEAD_SIZE = 40, 128


@dataclass(frozen=True)
class Line:
    """One timing: seconds, the FLOP of the model in them, and what was aimed at."""

    name: str
    seconds: float
    flops: float | None = None
    first: float | None = None
    note: str = ""


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def timed(
    name: str, call: Callable[[], object], flops: float | None, repeats: int, note: str = ""
) -> Line:
    """The first call, which compiles, and the median of those after it."""
    first = seconds(call)
    again = statistics.median(seconds(call) for _ in range(repeats))
    return Line(name, again, flops, first - again, note)


def random_weights(network: str, config: DiTConfig | VAEConfig) -> nnx.Module:
    """A network whose weights were drawn on the device, a layer at a time: kernels normal with
    variance 1/fan-in, scales one, biases zero."""
    graph, state = nnx.split(abstract_network(network, config, jnp.bfloat16))
    key = jax.random.key(0, impl="rbg")
    for i, (path, variable) in enumerate(nnx.to_flat_state(state)):
        stacked = path[0] == "blocks"
        draw = _drawn(tuple(variable.shape), variable.dtype, str(path[-1]), stacked)
        variable.set_value(draw(jax.random.fold_in(key, i)))
    return nnx.merge(graph, state)


def _drawn(shape: tuple[int, ...], dtype: np.dtype, name: str, stacked: bool) -> Callable:
    if name in ("scale", "bias"):
        return jax.jit(lambda key: jnp.full(shape, float(name == "scale"), dtype))
    layer = shape[1:] if stacked else shape
    deviation = prod(layer[:-1]) ** -0.5

    def draw(key: jax.Array) -> jax.Array:
        return (jax.random.normal(key, layer, jnp.float32) * deviation).astype(dtype)

    if not stacked:
        return jax.jit(draw)
    return jax.jit(lambda key: jax.lax.map(draw, jax.random.split(key, shape[0])))


def normal(seed: int, *shape: int, dtype=jnp.bfloat16) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32).astype(dtype)


def ceilings(repeats: int) -> Iterator[Line]:
    """What this chip gives a plain product and a plain copy."""
    n = 8192
    a, b = normal(0, n, n), normal(1, n, n)
    multiply = jax.jit(lambda a, b: a @ b)
    yield timed(f"bf16 product of {n} x {n}", lambda: multiply(a, b), 2 * n**3, repeats)
    large = jnp.ones(GIB // 4, jnp.float32)
    copy = jax.jit(lambda x: x + 1)
    line = timed("copy of 1 GiB", lambda: copy(large), None, repeats)
    yield Line(line.name, line.seconds, note=f"{2 * GIB / line.seconds / 1e12:.2f} TB/s")


def attention(repeats: int) -> Iterator[Line]:
    """The chip's kernel against the reference in fp32, forward and gradient; then its speed."""
    given = [normal(i, 1, 4096, 4, HEAD_SIZE) for i in range(4)]
    for count in (None, 4000):
        of = lambda f, *x: jax.vjp(lambda q, k, v: f(q, k, v, count), *x)  # noqa: E731

        @jax.jit
        def fast(q, k, v, change):
            out, back = of(compute, q, k, v)  # noqa: B023
            return out, *back(change)

        @jax.jit
        def exact(q, k, v, change):
            wide = [x.astype(jnp.float32) for x in (q, k, v, change)]
            out, back = of(lambda *x: attend(*x)[0], *wide[:3])  # noqa: B023
            return out, *back(wide[3])

        found, right = fast(*given), exact(*given)
        errors = [
            float(jnp.linalg.norm((a.astype(jnp.float32) - b).ravel()) / jnp.linalg.norm(b.ravel()))
            for a, b in zip(found, right)
        ]
        named = ", ".join(f"{n} {e:.1e}" for n, e in zip(("out", "dq", "dk", "dv"), errors))
        padded = "" if count is None else f", {count:,} of them real"
        line = timed(f"attention, 4,096 tokens{padded}", lambda: fast(*given), None, repeats)  # noqa: B023
        yield Line(line.name, line.seconds, note=f"relative error {named}")
        assert max(errors) < 2e-2, "the kernel and the reference disagree"
    for length in (32_400, 75_600):
        flops = 4 * length**2 * HEADS * HEAD_SIZE
        q, k, v, change = (normal(i, 1, length, HEADS, HEAD_SIZE) for i in range(4))
        forward = jax.jit(compute)
        yield timed(
            f"attention, {length:,} tokens",
            lambda: forward(q, k, v),
            flops,
            repeats,  # noqa: B023
        )
        back = jax.jit(lambda q, k, v, change: jax.vjp(compute, q, k, v)[1](change))
        both = work.BACKWARD_OF_ATTENTION + 1
        yield timed(
            f"attention and its gradient, {length:,} tokens",
            lambda: back(q, k, v, change),  # noqa: B023
            both * flops,
            repeats,
        )


def vae(repeats: int) -> Iterator[Line]:
    network = random_weights("vae", VAEConfig())
    for size in ("720p33", "720p81"):
        t, h, w = GRIDS[size]
        video = normal(0, 1, 4 * t - 3, 8 * h, 8 * w, 3, dtype=jnp.float32).clip(-1, 1)
        latents = normal(1, 1, t, h, w, 16, dtype=jnp.float32)
        yield timed(f"VAE encode, {size}", lambda: network.encode(video), None, repeats)  # noqa: B023
        yield timed(f"VAE decode, {size}", lambda: network.decode(latents), None, repeats)  # noqa: B023


class Model:
    """The denoiser in bf16, made when first asked for."""

    def __init__(self) -> None:
        self._dit: DiT | None = None

    @property
    def dit(self) -> DiT:
        if self._dit is None:
            self._dit = random_weights("dit", CONFIG)
        return self._dit


def conditions(size: str, dtype=jnp.float32) -> Condition:
    return Condition(
        normal(2, 1, CONFIG.text_len, CONFIG.text_dim, dtype=dtype),
        normal(3, 1, 257, CONFIG.image_dim, dtype=dtype),
        normal(4, 1, *GRIDS[size], 20, dtype=dtype),
    )


def denoise(model: Model, sizes: tuple[str, ...], repeats: int) -> Iterator[Line]:
    """Guided steps, both branches together."""
    for size in sizes:
        rows = prepare_rows(model.dit, (conditions(size),) * 2)
        schedule = make_schedule("unipc", 10, 5.0)
        noise = normal(5, 1, *GRIDS[size], 16, dtype=jnp.float32)

        def step(noise=noise, rows=rows, schedule=schedule) -> jax.Array:
            state = initial_state(jnp.copy(noise))
            given = (np.float32(900), schedule.row(0), rows, np.float32(5))
            return denoise_step(model.dit, state, *given, guided=True).x

        flops = work.denoise_step(CONFIG, GRIDS[size], guided=True)
        yield timed(f"guided step, {size}", step, flops, repeats)
        assert np.isfinite(np.asarray(step())).all()


def lora(model: Model, size: str, settings: TrainConfig, repeats: int) -> Iterator[Line]:
    """Steps of training adapters on one window."""
    trainer = Trainer(nnx.clone(model.dit), settings)
    given = conditions(size, jnp.bfloat16)
    batch = Batch(normal(6, 1, *GRIDS[size], 16), given)
    host = jax.tree.map(np.asarray, batch)
    flops = work.train_step(CONFIG, GRIDS[size])
    name = f"LoRA step, {size}, rank {settings.rank} on {settings.targets}"
    line = timed(name, lambda: trainer.train(host)["loss"], flops, repeats)
    loss = float(trainer.train(host)["loss"])
    yield Line(line.name, line.seconds, line.flops, line.first, f"loss {loss:.3f}")
    assert np.isfinite(loss)


def parts() -> dict[str, Callable[[int], Iterator[Line]]]:
    """Every part by its name, in an order in which each takes more memory than those before."""
    model = Model()
    return {
        "ceilings": ceilings,
        "vae": vae,
        "attention": attention,
        "denoise": partial(denoise, model, ("480p81", "720p33")),
        "denoise 720p81": partial(denoise, model, ("720p81",)),
        "lora 480p33": partial(lora, model, "480p33", TrainConfig()),
        "lora 720p33": partial(lora, model, "720p33", TrainConfig()),
    }


def row(line: Line) -> str:
    """A line of the table."""
    device = jax.local_devices()[0]
    chip, stats = chip_of(device.device_kind), device.memory_stats() or {}
    rate = line.flops and line.flops / line.seconds
    cells = [
        line.name,
        f"{line.seconds:.3f}" if line.seconds < 10 else f"{line.seconds:.1f}",
        f"{rate / 1e12:.0f}" if rate else "-",
        f"{rate / chip.flops:.0%}" if rate and chip else "-",
        f"{stats['peak_bytes_in_use'] / GIB:.1f}" if "peak_bytes_in_use" in stats else "-",
        f"{line.first:.0f}" if line.first is not None else "-",
        line.note,
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", help="words of the parts to run; all without any")
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    device = jax.local_devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit", 0) / GIB
    print(f"{device.device_kind}, {limit:.1f} GiB for this process; jax {jax.__version__}\n")
    print("| | s | model TFLOP/s | of peak | peak GiB so far | compiled in s | |")
    print("|---|---|---|---|---|---|---|", flush=True)
    start = time.monotonic()
    for name, run in parts().items():
        if given.parts and not any(word in name for word in given.parts):
            continue
        try:
            with jax.set_mesh(one_device()):
                for line in run(given.repeats):
                    print(row(line), flush=True)
        except Exception as error:  # the other parts are worth having
            print(f"| {name} | failed: {str(error).splitlines()[0][:300]} |", flush=True)
            sys.stderr.write(f"{name}: {error}\n")
        jax.clear_caches()
    print(f"\n{time.monotonic() - start:.0f} s in all")


if __name__ == "__main__":
    main()
