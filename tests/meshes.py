"""Sharded equals unsharded, on virtual devices: `python -m tests.meshes [--all] [--world FOLDER]`.

For every mesh one JSON line says how far the loss, each gradient and a sample are from those of one
device (relative L2). The devices have to be there before JAX starts, so this is a process of its
own; `tests/test_sharding.py` runs it for eight meshes and `make test-mesh` for all twenty.
"""

import json
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

DEVICES = 8
TOLERANCE = 1e-5
Sizes = dict[str, int]


def meshes(devices: int) -> list[Sizes]:
    """Every mesh of so many devices."""
    divisors = [d for d in range(1, devices + 1) if not devices % d]
    return [
        {"data": data, "ring": ring, "ulysses": devices // data // ring}
        for data in divisors
        for ring in divisors
        if not devices % (data * ring)
    ]


ALL = [sizes for devices in (1, 2, 4, 8) for sizes in meshes(devices)]
TWO_AXES = [s for s in meshes(DEVICES) if sum(n > 1 for n in s.values()) > 1]
TESTED = [*TWO_AXES, {"data": 1, "ring": 8, "ulysses": 1}]
ALL_AXES = {"data": 2, "ring": 2, "ulysses": 2}
OTHER_REMAT = ("none", "save_attention", "offload")  # beside "full", with which all others are


def named(sizes: Sizes) -> str:
    return ",".join(f"{axis}={n}" for axis, n in sizes.items())


def main(wanted: list[Sizes]) -> Iterator[dict]:
    """The distances of every mesh, and what holds between one mesh and another."""
    expected = results(None)
    for sizes in wanted:
        yield {"mesh": named(sizes)} | compared(results(sizes), expected)
    for remat in OTHER_REMAT:
        found = compared(results(ALL_AXES, remat), expected)
        yield {"mesh": f"{named(ALL_AXES)} {remat}"} | found
    yield in_turn(ALL_AXES)
    yield moved({"data": 2, "ring": 1, "ulysses": 4}, {"data": 2, "ring": 2, "ulysses": 2})


def moved(first: Sizes, second: Sizes) -> dict:
    """Two steps on one mesh, saved, and two on another, beside four on one device; then the loss of
    three windows on the second mesh and on one device."""
    import jax

    from tests.toy import toy_batch
    from wanjax.checkpoint import Checkpoints
    from wanjax.training import train_step

    whole, before, after = (random_trainer(sizes) for sizes in (None, first, second))
    start = jax.device_get(whole.state.params)
    expected = [whole.train(toy_batch(batch=2, seed=i))["loss"] for i in range(4)]
    programs = train_step._cache_size()
    losses = [before.train(toy_batch(batch=2, seed=i))["loss"] for i in range(2)]
    with tempfile.TemporaryDirectory() as run:
        before.save(Checkpoints(Path(run)), {})
        after.restore(Checkpoints(Path(run)), 2)
    losses += [after.train(toy_batch(batch=2, seed=i))["loss"] for i in (2, 3)]
    programs = train_step._cache_size() - programs
    parameters = jax.tree.map(distance, after.state.params, whole.state.params)
    changes = jax.tree.map(distance, after.state.params, start)
    windows = [toy_batch(batch=1, seed=i) for i in range(3)]
    return {
        "mesh": f"{named(first)} to {named(second)}",
        "loss": distance(losses, expected),
        "parameter": max(jax.tree.leaves(parameters)),
        "moved": min(jax.tree.leaves(changes)),
        "validation": distance(after.validate(iter(windows)), whole.validate(iter(windows))),
        "programs": programs,
    }


def in_turn(sizes: Sizes) -> dict:
    """A step over four batches in turn on a mesh, beside one over a large batch on one device: the
    gradients as AdamW's first moments hold them, whose steps magnify what rounding does to the
    smallest."""
    import jax
    import optax

    from tests.toy import toy_batch

    whole, parts = random_trainer(None), random_trainer(sizes, accumulate=4)
    first, second = (t.train(toy_batch(batch=8)) for t in (whole, parts))
    moments = [optax.tree.get(t.state.optimizer, "mu") for t in (parts, whole)]
    return {
        "mesh": f"{named(sizes)} in turn",
        "loss": distance(second["loss"], first["loss"]),
        "gradient": max(jax.tree.leaves(jax.tree.map(distance, *moments))),
    }


def video(world: Path, sizes: Sizes) -> dict:
    """A whole video, from picture and prompt, on a mesh and on one device."""
    from wanjax import Pipeline
    from wanjax.denoising import denoise_step
    from wanjax.sharding import make_mesh

    given = {"image": world / "picture.png", "prompt": "rain", "frames": 9, "steps": 2}
    given |= {"height": 32, "width": 48}
    expected = Pipeline.load(world / "ck", dtype="float32").sample(**given)
    before = denoise_step._cache_size()
    pipeline = Pipeline.load(world / "ck", dtype="float32", mesh=make_mesh(**sizes))
    error = distance(pipeline.sample(**given), expected)
    return {"mesh": "pipeline", "sample": error, "programs": denoise_step._cache_size() - before}


def compared(got: dict, expected: dict) -> dict:
    import jax

    gradients = jax.tree.map(distance, got["gradients"], expected["gradients"])
    report = {"loss": distance(got["loss"], expected["loss"])}
    report["gradient"] = max(jax.tree.leaves(gradients))
    if got["sample"] is not None:
        report["sample"] = distance(got["sample"], expected["sample"])
    return report | {"share": got["share"]}


def distance(got, expected) -> float:
    """Relative L2 of one tensor."""
    import numpy as np

    norm = lambda x: float(np.linalg.norm(np.ravel(x)))  # noqa: E731
    return norm(np.asarray(got) - np.asarray(expected)) / norm(expected)


def results(sizes: Sizes | None, remat: str = "full") -> dict:
    """Loss and gradients at random adapters, and two guided steps from noise."""
    import jax
    from flax import nnx

    from tests.toy import toy_batch
    from wanjax.flow import draw, losses_at

    trainer = random_trainer(sizes, remat=remat)
    batch = toy_batch(batch=8)
    drawn = draw(jax.random.key(3), batch.latents.shape, law="uniform", shift=5.0)

    @jax.jit
    def both(params, frozen, batch):
        def loss(params):
            model = nnx.merge(trainer.graph, params, frozen)
            return losses_at(model, batch, *drawn).mean()

        return jax.value_and_grad(loss)(params)

    from wanjax.training import place_batch

    with trainer.on_mesh():
        batch = place_batch(batch, trainer.mesh)
        loss, gradients = jax.device_get(both(trainer.state.params, trainer.frozen, batch))
    kernel = trainer.model().blocks.self_attn.q.kernel[...]
    share = kernel.addressable_shards[0].data.size / kernel.size
    guided = remat == "full" and (sizes is None or sizes["data"] <= 2)
    taken = sample(trainer) if guided else None
    return {"loss": loss, "gradients": gradients, "sample": taken, "share": share}


def random_trainer(sizes: Sizes | None, *, remat: str = "full", accumulate: int = 1):
    """Four layers, eight heads; every adapter, bias and scale is random, and no length divides."""
    import jax
    import numpy as np
    from flax import nnx

    from tests.toy import toy_dit
    from wanjax.sharding import make_mesh, shardings
    from wanjax.training import TrainConfig, Trainer

    config = TrainConfig(
        rank=2,
        targets="all",
        dtype="float32",
        learning_rate=1e-3,
        warmup=1,
        batch=8,
        remat=remat,
        accumulate=accumulate,
    )
    mesh = None if sizes is None else make_mesh(**sizes)
    graph, state = nnx.split(toy_dit(dim=64, num_heads=8, num_layers=4))
    rng = np.random.default_rng(0)
    for path, variable in nnx.to_flat_state(state):
        noise = 0.3 * rng.standard_normal(variable.shape, np.float32)
        if path[-1] == "bias":
            variable.set_value(noise)
        if path[-1] == "scale":
            variable.set_value(1 + noise)
    place = jax.local_devices()[0] if mesh is None else shardings(state, mesh)
    trainer = Trainer(nnx.merge(graph, jax.device_put(state, place)), config, mesh)
    # Of the size of a trained adapter: a side path that drowns the kernel only magnifies rounding.
    random = lambda x: jax.device_put(0.05 * rng.standard_normal(x.shape, np.float32), x.sharding)  # noqa: E731
    params = jax.tree.map(random, trainer.state.params)
    trainer.state = trainer.state._replace(params=params)
    return trainer


def sample(trainer):
    """Two guided steps of UniPC from fixed noise; meshes that do not split the branches run them
    one after the other."""
    import jax
    import numpy as np

    from tests.toy import toy_batch
    from wanjax.denoising import denoise_step, prepare_rows
    from wanjax.solvers import initial_state, make_schedule

    first, second = toy_batch(batch=1, seed=1), toy_batch(batch=1, seed=2)
    schedule = make_schedule("unipc", 2, 5.0)
    state = initial_state(jax.numpy.asarray(first.latents))
    everywhere = jax.sharding.NamedSharding(trainer.mesh, jax.sharding.PartitionSpec())
    state = jax.device_put(state, everywhere)
    dit, mesh = trainer.model(), trainer.mesh
    branches = "in-turn" if mesh.size > 1 and mesh.shape["data"] == 1 else "together"
    with trainer.on_mesh():
        rows = prepare_rows(dit, (first.condition, second.condition))
        for i, timestep in enumerate(schedule.timesteps):
            given = (timestep, schedule.row(i), rows, np.float32(5))
            state = denoise_step(dit, state, *given, guided=True, branches=branches)
    return np.asarray(state.x)


def table(reports: list[dict]) -> str:
    """The reports as a table in Markdown."""
    columns = ["mesh", "loss", "gradient", "sample", "parameter", "validation"]
    rows = [columns, ["---"] * len(columns)]
    for report in reports:
        numbers = [f"{report[c]:.1e}" if c in report else "-" for c in columns[1:]]
        rows.append([report["mesh"], *numbers])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


if __name__ == "__main__":
    # Optimised as users' programs are: without, sums are rounded more coarsely.
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={DEVICES}"
    os.environ["NPROC"] = "64"  # a thread for every device in every exchange, or they wait forever
    warnings.filterwarnings("ignore", message="A mesh .* uses")
    reports = []
    if "--world" in sys.argv:
        world = Path(sys.argv[sys.argv.index("--world") + 1])
        print(json.dumps(video(world, {"data": 2, "ring": 2, "ulysses": 2})), flush=True)
    for report in main(ALL if "--all" in sys.argv else TESTED):
        reports.append(report)
        print(json.dumps(report), flush=True)
    kinds = ("loss", "gradient", "sample", "parameter", "validation")
    worst = max(r.get(kind, 0) for r in reports for kind in kinds)
    if "--all" in sys.argv:
        print(table(reports))
        print(f"largest distance {worst:.1e}, allowed {TOLERANCE:.0e}")
    sys.exit(not worst <= TOLERANCE)
