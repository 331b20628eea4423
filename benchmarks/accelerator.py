"""The 14B's own programs timed on one GPU or TPU: `python -m benchmarks.accelerator [WORD ...]`.

No weights are downloaded and no film is read: weights are random and made on the device, of the
true sizes. Every program is compiled before the weights are there, so that what a compiler tries
out does not count as its memory. A line is printed when it is known: seconds (the median of
`--repeats` after a warm-up), the model's arithmetic by formula (`wanjax.work`; what is computed
again does not count) over that time, its share of the chip's published peak, and the most memory
that the process has held so far beside what the compiler foresaw for this program. It takes about
8 minutes and fits 80 GB; words choose parts, `--base int8` another base, in a run of its own.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
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
from wanjax.denoising import prepare_rows
from wanjax.models.dit import DiT, DiTConfig
from wanjax.models.vae import VAEConfig
from wanjax.planning import traces
from wanjax.quantisation import CODES, UNQUANTISED, QuantisedVariable, draw
from wanjax.sharding import one_device
from wanjax.solvers import initial_state, make_schedule
from wanjax.training import TrainConfig, initial_train_state, make_optimizer, prepare_model
from wanjax.types import Batch, Condition
from wanjax.weights import abstract_network

CONFIG, VAE = DiTConfig(), VAEConfig()
GRIDS = {"480p33": (9, 60, 104), "480p81": (21, 60, 104)}
GRIDS |= {"720p33": (9, 90, 160), "720p81": (21, 90, 160)}
HEADS, HEAD_SIZE = 40, 128
LEAST = 1e-9
PARALLEL = 4  # programs that are compiled at once: their seconds are those of so many together


@dataclass(frozen=True)
class Line:
    """One row of the table."""

    name: str
    seconds: float
    flops: float | None = None
    planned: int | None = None
    compiled_in: float | None = None
    note: str = ""


@dataclass
class Step:
    """A program at one size: compiled first, run when there are weights."""

    name: str
    program: traces.Program
    run: Callable[[jax.stages.Compiled], Callable[[], jax.Array]]
    """From the executable to a call that runs it on random data, and gives what must be finite."""
    flops: float | None
    compiled: jax.stages.Compiled | None = field(init=False, default=None)
    compiled_in: float = field(init=False)
    failed: str = field(init=False, default="")

    def compile(self) -> None:
        start = time.perf_counter()
        try:
            self.compiled = self.program.traced.lower().compile()
        except Exception as error:  # the others are worth having
            self.failed = f"not compiled: {str(error).splitlines()[0][:200]}"
        self.compiled_in = time.perf_counter() - start

    @property
    def planned(self) -> int:
        """Bytes that the compiler foresees, and those of weights that it does not see."""
        if self.compiled is None:
            return 0
        return self.compiled.memory_analysis().peak_memory_in_bytes + self.program.idle()

    def line(self, repeats: int) -> Line:
        if self.failed:
            return Line(self.name, 0, note=self.failed)
        call = self.run(self.compiled)
        try:
            found = np.asarray(call(), np.float32)
        except jax.errors.JaxRuntimeError as error:
            note = f"not run: {str(error).splitlines()[0][:200]}"
            return Line(self.name, 0, planned=self.planned, note=note)
        note = "" if np.isfinite(found).all() else "**NaN**"
        return Line(
            self.name, timed(call, repeats), self.flops, self.planned, self.compiled_in, note
        )


def timed(call: Callable[[], object], repeats: int) -> float:
    """Median seconds of a call that has been run before."""
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(call())
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def warm(call: Callable[[], object], repeats: int) -> float:
    """As `timed`, of a call that has not been run."""
    jax.block_until_ready(call())
    return timed(call, repeats)


def normal(seed: int, *shape: int, dtype=jnp.bfloat16) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32).astype(dtype)


def random_weights(network: str, config: DiTConfig | VAEConfig, base: str) -> nnx.Module:
    """A network whose weights are drawn on the device, the largest leaf first and a layer at a
    time: kernels normal with variance 1/fan-in, scales one, biases zero."""
    graph, state = nnx.split(abstract_network(network, config, jnp.bfloat16, base))
    key = jax.random.key(0, impl="rbg")
    leaves = dict(nnx.to_flat_state(state))
    for i, path in enumerate(sorted(leaves, key=lambda path: -prod(leaves[path].shape))):
        variable, mine = leaves[path], jax.random.fold_in(key, i)
        if isinstance(variable, QuantisedVariable):
            if path[-1] == "codes":
                codes, scales = draw(variable, mine)
                variable.set_value(codes)
                leaves[(*path[:-1], "scales")].set_value(scales)
            continue
        shape, name = tuple(variable.shape), str(path[-1])
        make = _drawn(shape, variable.dtype, name, stacked=path[0] == "blocks")
        variable.set_value(make(mine))
    return nnx.merge(graph, state)


def _drawn(shape: tuple[int, ...], dtype: np.dtype, name: str, *, stacked: bool) -> Callable:
    if name in ("scale", "bias"):
        return jax.jit(lambda key: jnp.full(shape, float(name == "scale"), dtype))
    layer = shape[1:] if stacked else shape
    deviation = prod(layer[:-1]) ** -0.5

    def one(key: jax.Array) -> jax.Array:
        return (jax.random.normal(key, layer, jnp.float32) * deviation).astype(dtype)

    if not stacked:
        return jax.jit(one)
    return jax.jit(lambda key: jax.lax.map(one, jax.random.split(key, shape[0])))


def ceilings(repeats: int) -> Iterator[Line]:
    """What this chip gives a plain product and a plain copy."""
    n = 8192
    a, b = normal(0, n, n), normal(1, n, n)
    multiply, copy = jax.jit(lambda a, b: a @ b), jax.jit(lambda x: x + 1)
    yield Line(f"bf16 product of {n} x {n}", warm(lambda: multiply(a, b), repeats), 2 * n**3)
    large = jnp.ones(GIB // 4, jnp.float32)
    seconds = warm(lambda: copy(large), repeats)
    yield Line("copy of 1 GiB", seconds, note=f"{2 * GIB / seconds / 1e12:.2f} TB/s")


def attention(repeats: int) -> Iterator[Line]:
    """The chip's kernel against the reference in fp32, then its speed."""
    for count in (None, 4000):
        yield _against_reference(count, repeats)
    for length in (32_400, 75_600):
        yield from _speed(length, repeats)


def _against_reference(count: int | None, repeats: int) -> Line:
    """Forward and gradient of 4,096 tokens."""

    @jax.jit
    def fast(q, k, v, change):
        out, back = jax.vjp(lambda q, k, v: compute(q, k, v, count), q, k, v)
        return out, *back(change)

    @jax.jit
    def exact(*given):
        q, k, v, change = (x.astype(jnp.float32) for x in given)
        out, back = jax.vjp(lambda q, k, v: attend(q, k, v, count)[0], q, k, v)
        return out, *back(change)

    given = [normal(i, 1, 4096, 4, HEAD_SIZE) for i in range(4)]
    pairs = zip(("out", "dq", "dk", "dv"), fast(*given), exact(*given))
    errors = {name: float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b)) for name, a, b in pairs}
    assert max(errors.values()) < 2e-2, f"the kernel and the reference disagree: {errors}"
    named = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
    padded = "" if count is None else f", {count:,} of them real"
    seconds = warm(lambda: fast(*given), repeats)
    return Line(f"attention, 4,096 tokens{padded}", seconds, note=f"relative error {named}")


def _speed(length: int, repeats: int) -> Iterator[Line]:
    flops = 4 * length**2 * HEADS * HEAD_SIZE
    given = [normal(i, 1, length, HEADS, HEAD_SIZE) for i in range(4)]
    forward = jax.jit(compute)
    both = jax.jit(lambda q, k, v, change: jax.vjp(compute, q, k, v)[1](change))
    seconds = warm(lambda: forward(*given[:3]), repeats)
    yield Line(f"attention, {length:,} tokens", seconds, flops)
    seconds = warm(lambda: both(*given), repeats)
    flops *= 1 + work.BACKWARD_OF_ATTENTION
    yield Line(f"attention and its gradient, {length:,} tokens", seconds, flops)


class Model:
    """The networks, drawn when first asked for."""

    def __init__(self, base: str):
        self.base = base

    @cached_property
    def dit(self) -> DiT:
        return random_weights("dit", CONFIG, self.base)

    @cached_property
    def vae(self) -> nnx.Module:
        return random_weights("vae", VAE, UNQUANTISED)

    def vae_steps(self) -> Iterator[Step]:
        """Encoding and decoding, in fp32."""
        mesh = one_device()
        for size in ("720p33", "720p81"):
            t, h, w = GRIDS[size]
            shape = (4 * t - 3, 8 * h, 8 * w)
            halves = {
                "encode": (traces.encode(VAE, shape, mesh), (1, *shape, 3)),
                "decode": (traces.decode(VAE, GRIDS[size], mesh), (1, t, h, w, VAE.z_dim)),
            }
            for half, (program, like) in halves.items():

                def run(compiled, like=like):
                    x = normal(0, *like, dtype=jnp.float32).clip(-1, 1)
                    return lambda: compiled(self.vae, x)

                flops = work.counted(program.traced.jaxpr.jaxpr)
                yield Step(f"VAE {half}, {size}", program, run, flops)

    def denoise_step(self, size: str) -> Step:
        """A guided step, both branches together."""
        program = traces.denoise(CONFIG, GRIDS[size], one_device(), base=self.base)

        def run(compiled: jax.stages.Compiled) -> Callable[[], jax.Array]:
            rows = prepare_rows(self.dit, (conditions(size),) * 2)
            row = jax.tree.map(np.float32, make_schedule("unipc", 10, 5.0).row(0))
            noise = normal(5, 1, *GRIDS[size], CONFIG.out_channels, dtype=jnp.float32)

            def call() -> jax.Array:
                state = initial_state(jnp.copy(noise))
                return compiled(self.dit, state, np.float32(900), row, rows, np.float32(5)).x

            return call

        flops = work.denoise_step(CONFIG, GRIDS[size], guided=True)
        return Step(f"guided step, {size}", program, run, flops)

    def lora_step(self, size: str, settings: TrainConfig) -> Step:
        """A step of training adapters on one window."""
        program = traces.train(CONFIG, GRIDS[size], settings, one_device())

        def run(compiled: jax.stages.Compiled) -> Callable[[], jax.Array]:
            _, trained, frozen = prepare_model(nnx.clone(self.dit), settings)
            state = initial_train_state(trained, make_optimizer(settings), one_device())
            latents = normal(6, 1, *GRIDS[size], CONFIG.out_channels)
            batch = Batch(latents, conditions(size, jnp.bfloat16))
            batch = jax.tree.map(lambda x: x[None], batch)  # one micro-batch

            def call() -> jax.Array:
                nonlocal state
                key, shift = jax.random.key(0), np.float32(settings.shift)
                state, metrics = compiled(state, frozen, batch, key, shift)
                return metrics["loss"]

            return call

        name = f"LoRA step, {size}, {self.base} base, remat {settings.remat}"
        return Step(name, program, run, work.train_step(CONFIG, GRIDS[size]))

    def steps(self) -> dict[str, Iterator[Step]]:
        """Every part by its name."""
        lora = {
            f"lora {size} {remat}": iter(
                [self.lora_step(size, TrainConfig(base=self.base, remat=remat))]
            )
            for size in ("480p33", "720p33")
            for remat in ("full", "save_attention")
        }
        denoise = {
            f"denoise {size}": iter([self.denoise_step(size)])
            for size in ("480p81", "720p33", "720p81")
        }
        return {"vae": self.vae_steps()} | denoise | lora


def conditions(size: str, dtype=jnp.float32) -> Condition:
    """What the denoiser is told, at random."""
    channels = CONFIG.in_channels - CONFIG.out_channels
    return Condition(
        normal(2, 1, CONFIG.text_len, CONFIG.text_dim, dtype=dtype),
        normal(3, 1, 257, CONFIG.image_dim, dtype=dtype),
        normal(4, 1, *GRIDS[size], channels, dtype=dtype),
    )


def row(line: Line) -> str:
    """A line of the table."""
    device = jax.local_devices()[0]
    chip, stats = chip_of(device.device_kind), device.memory_stats() or {}
    rate = line.flops and line.flops / max(line.seconds, LEAST)
    held = stats.get("peak_bytes_in_use")
    cells = [
        line.name,
        f"{line.seconds:.3f}" if line.seconds < 10 else f"{line.seconds:.1f}",
        f"{rate / 1e12:.0f}" if rate else "-",
        f"{rate / chip.flops:.0%}" if rate and chip else "-",
        f"{line.planned / GIB:.1f}" if line.planned else "-",
        f"{held / GIB:.1f}" if held else "-",
        f"{line.compiled_in:.0f}" if line.compiled_in else "-",
        line.note,
    ]
    return f"| {' | '.join(cells)} |"


def lines(words: list[str], base: str, repeats: int) -> Iterator[Line]:
    """All that was asked for; programs in the order of their memory, so that each peak is seen."""
    wanted = lambda name: not words or any(word in name for word in words)  # noqa: E731
    for name, run in {"ceilings": ceilings, "attention": attention}.items():
        if wanted(name):
            yield from run(repeats)
    steps = [s for name, of in Model(base).steps().items() if wanted(name) for s in of]
    with ThreadPoolExecutor(PARALLEL) as pool:
        list(pool.map(Step.compile, steps))
    while steps:
        steps.sort(key=lambda step: -step.planned)
        yield steps.pop().line(repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", help="words of the parts to run; all without any")
    parser.add_argument("--base", default=UNQUANTISED, choices=[UNQUANTISED, *CODES])
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    device = jax.local_devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit", 0) / GIB
    print(f"{device.device_kind}, {limit:.1f} GiB for this process; jax {jax.__version__}\n")
    head = "s | model TFLOP/s | of peak | planned GiB | peak GiB so far | compiled in s |"
    print(f"| | {head} |\n|---|---|---|---|---|---|---|---|", flush=True)
    start = time.monotonic()
    with jax.set_mesh(one_device()):
        for line in lines(given.words, given.base, given.repeats):
            print(row(line), flush=True)
    print(f"\n{time.monotonic() - start:.0f} s in all")


if __name__ == "__main__":
    main()
