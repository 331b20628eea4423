"""Sharded equals unsharded: loss and gradients of adapters, and whole videos, on virtual devices.

The devices have to be there before JAX starts, so this file also is the program of a process:
`python -m tests.test_sharding WORLD` prints one JSON line for every mesh.
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from tests.scripts import start
from wanjax.errors import UserError
from wanjax.sharding import make_mesh, spec

pytestmark = pytest.mark.compiles

MESHES = {
    "data": {"data": 2},
    "ring": {"ring": 2},
    "ulysses": {"ulysses": 2},
    "data x ulysses": {"data": 2, "ulysses": 2},
}
TRAINED, SAMPLED = "data x ulysses", ("ring", "data x ulysses")


def distance(got, expected) -> float:
    """Relative L2 over all leaves."""
    norm = lambda trees: float(np.sqrt(sum(np.sum(np.square(x)) for x in trees)))  # noqa: E731
    got, expected = (jax.tree.leaves(jax.device_get(tree)) for tree in (got, expected))
    return norm([a - b for a, b in zip(got, expected, strict=True)]) / norm(expected)


def compare(world: Path) -> None:
    """Print, for every mesh, how far it is from one device, and how the work was laid out. More
    than 20 s, since each mesh has a training step and a video of its own to compile and to run."""
    from wanjax import Pipeline
    from wanjax.pipeline import denoise_step

    expected, _ = gradients({}, steps=0)
    picture = {"image": world / "picture.png", "prompt": "rain", "frames": 9, "steps": 2}
    picture |= {"height": 32, "width": 48}
    video = Pipeline.load(world / "ck", dtype="float32").sample(**picture)
    for name, sizes in MESHES.items():
        got, report = gradients(sizes, steps=2 if name == TRAINED else 0)
        report |= {"mesh": name, "error": distance(got, expected)}
        if name in SAMPLED:
            before = denoise_step._cache_size()
            pipeline = Pipeline.load(world / "ck", dtype="float32", mesh=make_mesh(**sizes))
            report["video_error"] = distance(pipeline.sample(**picture), video)
            report["programs"] = denoise_step._cache_size() - before
        print(json.dumps(report), flush=True)


def gradients(sizes: dict[str, int], steps: int):
    """Loss and gradients at random adapters, and a report of the training from there."""
    from flax import nnx

    from tests.toy import toy_batch, toy_dit
    from wanjax.flow import flow_loss
    from wanjax.sharding import shardings
    from wanjax.training import TrainConfig, Trainer, place_batch, train_step

    config = TrainConfig(rank=2, targets="all", dtype="float32", learning_rate=1e-2, warmup=1)

    mesh = make_mesh(**sizes) if sizes else None
    # 80 = 5 x 16: sizes that 2 devices divide, and 4 heads.
    model = toy_dit(dim=80, num_heads=4)
    if mesh is not None:
        graph, state = nnx.split(model)
        model = nnx.merge(graph, jax.device_put(state, shardings(state, mesh)))
    trainer = Trainer(model, config, mesh)
    leaves, tree = jax.tree.flatten(trainer.state.params)
    rng = np.random.default_rng(0)
    values = [0.3 * rng.standard_normal(x.shape, np.float32) for x in leaves]
    values = [jax.device_put(v, x.sharding) for v, x in zip(values, leaves)]
    trainer.state = trainer.state._replace(params=jax.tree.unflatten(tree, values))
    batch = place_batch(toy_batch(batch=2, grid=(2, 4, 8)), mesh)

    @jax.jit
    def both(params, frozen, batch):
        def loss(params):
            model = nnx.merge(trainer.graph, params, frozen)
            return flow_loss(model, batch, jax.random.key(3), law="uniform", shift=5.0)

        return jax.value_and_grad(loss)(params)

    with trainer._on_mesh():
        got = jax.device_get(both(trainer.state.params, trainer.frozen, batch))
    before = train_step._cache_size()
    losses = [trainer.train(toy_batch(batch=2, grid=(2, 4, 8)))["loss"] for _ in range(steps)]
    kernel = trainer.model().blocks.self_attn.q.kernel[...]
    report = {"programs_of_training": train_step._cache_size() - before, "losses": losses}
    share = kernel.addressable_shards[0].data.size / kernel.size
    return got, report | {"share_of_a_kernel": share}


@pytest.fixture(scope="module")
def reports(world) -> dict[str, dict]:
    four = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    process = start("-m", "tests.test_sharding", world, cwd=world, environment=four)
    out, errors = process.communicate(timeout=400)
    assert process.returncode == 0, errors
    lines = [json.loads(line) for line in out.splitlines()]
    return {line["mesh"]: line for line in lines}


@pytest.mark.parametrize("mesh", MESHES)
def test_loss_and_gradients_equal_the_unsharded(mesh, reports):
    report = reports[mesh]
    assert report["error"] <= 1e-5
    devices = np.prod(list(MESHES[mesh].values()))
    assert report["share_of_a_kernel"] == pytest.approx(1 / devices)


def test_two_steps_of_training_are_one_program(reports):
    """The state stays where it was put, so that the second step is not another program."""
    assert reports[TRAINED]["programs_of_training"] == 1 and len(reports[TRAINED]["losses"]) == 2


@pytest.mark.parametrize("mesh", SAMPLED)
def test_a_video_equals_the_unsharded(mesh, reports):
    assert reports[mesh]["video_error"] <= 1e-5 and reports[mesh]["programs"] == 1


def test_specs_name_only_axes_that_divide():
    assert len(jax.devices()) == 1
    mesh = jax.sharding.AbstractMesh((2, 1, 2), ("data", "ring", "ulysses"))
    assert spec(("embed", "mlp"), (8, 12), mesh) == PartitionSpec(("data", "ulysses"))
    assert spec(("embed", "mlp"), (3, 8, 12), mesh) == PartitionSpec(None, ("data", "ulysses"))
    assert spec(("embed",), (6,), mesh) == PartitionSpec()  # 4 do not divide 6: it stays whole
    assert spec(("batch", "tokens", None), (2, 6, 5), mesh) == PartitionSpec("data", "ulysses")
    with pytest.raises(UserError, match="needs 2 devices and there are 1; choose"):
        make_mesh(ring=2)


if __name__ == "__main__":
    compare(Path(sys.argv[1]))
