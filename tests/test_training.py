"""The training step and its loop in one process: what it differentiates, and exact resumption."""

import json
import re
from dataclasses import asdict, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from tests.meshes import distance
from tests.scripts import compiled_quickly
from tests.toy import randomised_adapters, toy_batch, toy_dit
from wanjax import lora
from wanjax.checkpoint import RUN_FILE, RUN_VERSION, Checkpoints, check_resumable, read_run
from wanjax.errors import UserError
from wanjax.flow import draw, losses_at, sample_times
from wanjax.training import (
    FREE_TO_CHANGE,
    TrainConfig,
    Trainer,
    check_config,
    free_to_change,
    in_micro_batches,
    make_optimizer,
    place_batch,
    train_step,
)

pytestmark = [pytest.mark.compiles, pytest.mark.usefixtures("quickly")]

CONFIG = TrainConfig(rank=3, alpha=6, targets="all", learning_rate=1e-2, warmup=3, dtype="float32")


def leaves(trainer: Trainer) -> list[np.ndarray]:
    return [np.asarray(x) for x in jax.tree.leaves(trainer.state)]


def assert_same_bits(a: Trainer, b: Trainer) -> None:
    for x, y in zip(leaves(a), leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_four_steps_equal_two_and_resume_and_two(tmp_path, optimizer):
    config = replace(CONFIG, optimizer=optimizer)
    straight, first = Trainer(toy_dit(), config), Trainer(toy_dit(), config)
    for i in range(4):
        straight.train(toy_batch(seed=i))
    for i in range(2):
        first.train(toy_batch(seed=i))
    first.save(Checkpoints(tmp_path), {"position": 2})

    resumed = Trainer(toy_dit(), config)
    loader = resumed.restore(Checkpoints(tmp_path), 2)
    assert loader == {"position": 2} and resumed.step == 2
    assert_same_bits(resumed, first)
    for i in range(2, 4):
        resumed.train(toy_batch(seed=i))
    assert_same_bits(resumed, straight)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_loss_falls_and_the_base_keeps_every_bit(optimizer):
    trainer = Trainer(toy_dit(), replace(CONFIG, optimizer=optimizer))
    before = [np.array(x) for x in jax.tree.leaves(trainer.frozen)]
    losses = [trainer.train(toy_batch())["loss"] for _ in range(40)]
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])
    for x, y in zip(before, jax.tree.leaves(trainer.frozen), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_full_training_moves_every_parameter(optimizer):
    config = replace(CONFIG, train="full", learning_rate=1e-3, optimizer=optimizer)
    trainer = Trainer(toy_dit(), config)
    before = [np.array(x) for x in jax.tree.leaves(trainer.state.params)]
    assert not jax.tree.leaves(trainer.frozen)
    for i in range(2):
        trainer.train(toy_batch(seed=i))
    moved = [
        not np.array_equal(a, b) for a, b in zip(before, jax.tree.leaves(trainer.state.params))
    ]
    assert all(moved)


def test_muon_gives_each_layer_of_a_stack_a_step_of_its_own():
    """Nearly orthogonal in every layer, and as large as AdamW's: 0.2 a number."""
    config = replace(CONFIG, train="full", optimizer="muon", warmup=0, weight_decay=0.0)
    trainer = Trainer(toy_dit(), config)
    kernel = lambda: np.array(trainer.state.params["blocks"]["ffn"]["up"]["kernel"][...])  # noqa: E731
    before = kernel()
    trainer.train(toy_batch())
    for change in (kernel() - before) / config.learning_rate:
        largest = np.linalg.norm(change, 2) / (0.2 * np.sqrt(max(change.shape)))
        assert 0.65 < largest < 1.25


def updates(optimizer, gradients: list[dict], params: dict) -> list[dict]:
    """What an optimizer adds to `params`, which stay as they are, step by step."""
    state, moves = optimizer.init(params), []
    for gradient in gradients:
        move, state = optimizer.update(gradient, state, params)
        moves.append(move)
    return moves


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_gradients_are_clipped_to_the_norm_of_all_together(optimizer):
    """A gradient ten times too large acts as it does at the norm it is clipped to; AdamW and Muon
    hardly feel a gradient's size at once, only beside those that came before."""
    config = replace(CONFIG, optimizer=optimizer, warmup=0, clip_norm=0.5)
    params = {"blocks": {"kernel": jnp.zeros((3, 4, 5))}, "scale": jnp.zeros(7)}
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(0)
    small, other = (tree.unflatten([rng.normal(size=x.shape) for x in leaves]) for _ in range(2))
    to_norm = lambda tree, norm: jax.tree.map(lambda x: x * norm / optax.tree.norm(tree), tree)  # noqa: E731
    small, clipped, large = to_norm(small, 0.4), to_norm(other, 0.5), to_norm(other, 5.0)
    make = lambda: make_optimizer(config)  # noqa: E731
    expected = updates(make(), [small, clipped], params)
    got = updates(make(), [small, large], params)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4), got, expected)
    free = updates(make_optimizer(replace(config, clip_norm=1e9)), [small, large], params)
    difference = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), free[1], expected[1])
    assert min(jax.tree.leaves(difference)) > 1e-2 * config.learning_rate


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_weights_decay_apart_from_the_gradient(optimizer):
    """Without a gradient every weight moves towards zero by its share of the learning rate."""
    config = replace(CONFIG, optimizer=optimizer, warmup=0, weight_decay=0.25)
    rng = np.random.default_rng(0)
    params = {"blocks": {"kernel": rng.normal(size=(3, 4, 5))}, "scale": rng.normal(size=7)}
    params = jax.tree.map(jnp.asarray, params)
    nothing = jax.tree.map(jnp.zeros_like, params)
    (move,) = updates(make_optimizer(config), [nothing], params)
    expected = jax.tree.map(lambda x: -config.learning_rate * 0.25 * x, params)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5), move, expected)


def drawn(monkeypatch, of: str, steps: int = 3) -> list[float]:
    """What `train_step` draws at each of its steps: the mean of its times or of its noise."""
    draw = {"times": lambda times, noise: times, "noise": lambda _, noise: noise.mean((1, 2, 3, 4))}
    monkeypatch.setattr(
        "wanjax.training.losses_at", lambda model, batch, times, noise: draw[of](times, noise)
    )
    trainer = Trainer(toy_dit(), CONFIG)
    return [float(trainer.train(toy_batch())["loss"]) for _ in range(steps)]


@pytest.mark.parametrize("of", ["times", "noise"])
def test_every_step_draws_its_own_times_and_noise(monkeypatch, of):
    """The same ones in another run with this seed."""
    first = drawn(monkeypatch, of)
    assert len(set(first)) == len(first) and drawn(monkeypatch, of) == first


def test_muon_wants_one_device():
    mesh = jax.sharding.AbstractMesh((2, 1, 1), ("data", "ring", "ulysses"))
    with pytest.raises(UserError, match="optimizer=muon runs on one device"):
        check_config(replace(CONFIG, optimizer="muon"), mesh)
    one = jax.sharding.AbstractMesh((1, 1, 1), ("data", "ring", "ulysses"))
    check_config(replace(CONFIG, optimizer="muon"), one)


@pytest.mark.parametrize("name", ["alpha", "learning_rate", "clip_norm", "shift"])
def test_numbers_that_nothing_can_be_trained_with(name):
    for value in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(UserError, match=f"{name}=.* is not a positive number"):
            check_config(replace(CONFIG, **{name: value}))


def compiled_step(train: str) -> str:
    """The compiled program of one step at a width that no other size in it shares."""
    config = replace(CONFIG, train=train)
    model = toy_dit(dim=72, ffn_dim=104, num_heads=4)
    trainer = Trainer(model, config)
    lowered = train_step.lower(
        trainer.state,
        trainer.frozen,
        in_micro_batches(toy_batch(batch=1), 1),
        jax.random.key(0),
        np.float32(3),
        graph=trainer.graph,
        optimizer=trainer.optimizer,
        law="uniform",
    )
    return lowered.compile().as_text()


def weight_gradients(program: str) -> list[str]:
    """Matrix products whose result has the shape of a block's kernel (72x72, 72x104, 104x72)."""
    pattern = r"f32\[(?:1,)?(?:72,72|72,104|104,72)\](?:\{[^}]*\})? dot\("
    return [line for line in program.splitlines() if re.search(pattern, line)]


def test_no_gradient_is_computed_for_a_frozen_kernel():
    """LoRA's program has no D x D product; full training's, the control, has many."""
    assert len(weight_gradients(compiled_step("full"))) >= 10
    assert weight_gradients(compiled_step("lora")) == []


def test_adapters_stay_fp32_on_a_bf16_base():
    trainer = Trainer(toy_dit(dtype=jnp.bfloat16), replace(CONFIG, dtype="bfloat16"))
    trainer.train(toy_batch())
    assert {x.dtype.name for x in jax.tree.leaves(trainer.state.params)} == {"float32"}
    moments = [x for x in jax.tree.leaves(trainer.state.optimizer) if x.ndim]
    assert {x.dtype.name for x in moments} == {"float32"}


def test_the_loss_is_the_formula():
    model, batch = toy_dit(), toy_batch(batch=1)
    noise = np.random.default_rng(5).normal(size=batch.latents.shape).astype(np.float32)
    t = 0.3
    noisy = (1 - t) * batch.latents + t * noise
    c = batch.condition
    velocity = np.asarray(model(noisy, jnp.asarray([300.0]), c.text, c.image, c.latents))
    expected = np.mean((velocity - (noise - batch.latents)) ** 2)
    got = losses_at(model, batch, jnp.asarray([t]), noise)
    np.testing.assert_allclose(got, [expected], rtol=1e-5)


@pytest.mark.parametrize("law", ["uniform", "logit_normal"])
def test_times_lie_inside_and_follow_the_shift(law):
    key = jax.random.key(0)
    plain = sample_times(key, 20_000, law=law, shift=1.0)
    shifted = sample_times(key, 20_000, law=law, shift=5.0)
    assert float(plain.min()) > 0 and float(shifted.max()) <= 1
    np.testing.assert_allclose(shifted, 5 * plain / (1 + 4 * plain), rtol=1e-5)
    assert abs(float(plain.mean()) - 0.5) < 0.01
    with pytest.raises(UserError, match="uniform"):
        sample_times(key, 1, law="unifrom", shift=1.0)


def test_batch_of_one_is_the_mean_of_two():
    """No weight is normalised over the batch: a batch's loss is the mean of its examples'."""
    model, batch = toy_dit(), toy_batch(batch=2)
    times, noise = jnp.asarray([0.2, 0.8]), jnp.ones(batch.latents.shape)
    both = losses_at(model, batch, times, noise)
    for i in range(2):
        one = jax.tree.map(lambda x, i=i: x[i : i + 1], batch)
        alone = losses_at(model, one, times[i : i + 1], noise[i : i + 1])
        np.testing.assert_allclose(alone[0], both[i], rtol=1e-5)


def test_validation_is_the_same_every_time_and_sees_the_adapters():
    trainer = Trainer(toy_dit(), CONFIG)
    batches = [toy_batch(batch=1, seed=i) for i in range(2)]
    first = trainer.validate(iter(batches))
    assert first == trainer.validate(iter(batches))
    model = trainer.model()
    randomised_adapters(model)
    trainer.state = trainer.state._replace(params=lora.split(model)[1])
    assert trainer.validate(iter(batches)) != first


def test_resume_refuses_changed_settings_by_name(tmp_path):
    saved, defaults = vars(CONFIG), vars(TrainConfig())
    free = {**saved, "steps": 99, "log_every": 7}
    check_resumable(tmp_path, free, saved, FREE_TO_CHANGE, defaults)
    for name in sorted(saved.keys() - FREE_TO_CHANGE):
        with pytest.raises(UserError, match=f"{name}="):
            check_resumable(tmp_path, {**saved, name: "other"}, saved, FREE_TO_CHANGE, defaults)


# As wanjax 0.1.0 wrote it, before there was a version and a `residual`.
FIRST_RUN = """{"format": "wanjax-run", "preset": "i2v_14b_480p", "mesh": null,
"base": "0123456789abcdef", "features": "fedcba9876543210", "train": "lora", "rank": 8,
"alpha": 16.0, "targets": "paper", "steps": 1000, "batch": 1, "optimizer": "adamw",
"learning_rate": 3e-05, "warmup": 20, "cooldown": 0, "weight_decay": 0.01, "clip_norm": 1.0,
"shift": 3.0, "timestep_law": "uniform", "dtype": "bfloat16", "remat": true, "seed": 0,
"checkpoint_every": 100, "keep": 3, "log_every": 1, "validate_every": 0}"""


def test_a_run_of_an_older_version_goes_on_and_of_a_newer_one_does_not(tmp_path):
    (tmp_path / RUN_FILE).write_text(FIRST_RUN)
    saved = read_run(tmp_path)
    assert saved["weights"] == "0123456789abcdef"
    facts = {name: saved[name] for name in ("format", "preset", "mesh", "weights", "features")}
    config = TrainConfig(shift=3.0)
    now = {**facts, "version": RUN_VERSION, **asdict(config)}
    defaults = asdict(TrainConfig())
    check_resumable(tmp_path, now, saved, FREE_TO_CHANGE, defaults)
    # What the older run did not know has its default, which another value is not.
    with pytest.raises(UserError, match="was started with residual='bfloat16'"):
        check_resumable(tmp_path, {**now, "residual": "float32"}, saved, FREE_TO_CHANGE, defaults)
    with pytest.raises(UserError, match="was started with base='bfloat16' .* has 'nf4'"):
        check_resumable(tmp_path, {**now, "base": "nf4"}, saved, FREE_TO_CHANGE, defaults)
    with pytest.raises(UserError, match="was started with shift=3.0"):
        check_resumable(tmp_path, {**now, "shift": 5.0}, saved, FREE_TO_CHANGE, defaults)
    with pytest.raises(UserError, match="was started with remat='full'"):
        check_resumable(tmp_path, {**now, "remat": "none"}, saved, FREE_TO_CHANGE, defaults)
    (tmp_path / RUN_FILE).write_text(json.dumps({**now, "version": RUN_VERSION + 1}))
    with pytest.raises(UserError, match=f"version {RUN_VERSION + 1} .* update wanjax"):
        read_run(tmp_path)


@pytest.fixture(scope="module")
def kept():
    """Gradients where everything is kept."""
    with compiled_quickly():
        return gradients("none")


def gradients(remat: str) -> list[np.ndarray]:
    """The gradient by every adapter, where all of them act."""
    trainer = Trainer(toy_dit(), replace(CONFIG, remat=remat))
    model = randomised_adapters(trainer.model())
    graph, params, frozen = lora.split(model)
    batch = toy_batch()
    times, noise = draw(jax.random.key(3), batch.latents.shape, law="uniform", shift=5.0)

    @jax.jit
    @jax.grad
    def find(params):
        return losses_at(nnx.merge(graph, params, frozen), batch, times, noise).mean()

    program = str(jax.make_jaxpr(find)(params))
    assert ("MemorySpace.Host" in program) == (remat == "offload")
    return [np.asarray(x) for x in jax.tree.leaves(find(params))]


@pytest.mark.parametrize("remat", ["full", "save_attention", "offload"])
def test_gradients_are_the_same_whatever_is_computed_again(remat, kept):
    for a, b in zip(gradients(remat), kept, strict=True):
        assert np.isfinite(a).all() and np.any(a)
        assert distance(a, b) <= 1e-6


def test_batches_in_turn_equal_one_large_batch():
    """Parameters and moments after twelve steps with a warm-up and a cool-down: so the rate of
    every step was the same, and no part of a batch counted for more than the others."""
    config = replace(CONFIG, steps=12, warmup=4, cooldown=4, remat="full")
    large = Trainer(toy_dit(), replace(config, batch=4))
    small = Trainer(toy_dit(), replace(config, batch=1, accumulate=4))
    start = jax.device_get(large.state.params)
    for i in range(12):
        one, other = (trainer.train(toy_batch(batch=4, seed=i)) for trainer in (large, small))
        for name in ("loss", "gradient_norm"):
            assert float(one[name]) == pytest.approx(float(other[name]), rel=1e-5)
    assert large.step == small.step == 12
    for a, b in zip(leaves(large), leaves(small), strict=True):
        assert a.dtype == b.dtype and (np.array_equal(a, b) or distance(b, a) <= 1e-5)
    moved = jax.tree.map(lambda x, y: np.abs(x - y).max(), large.state.params, start)
    assert min(jax.tree.leaves(moved)) > 1e-2


def test_a_batch_that_does_not_divide_into_parts_is_refused():
    with pytest.raises(UserError, match="3 rows does not divide into accumulate=2"):
        in_micro_batches(toy_batch(batch=3), 2)
    with pytest.raises(UserError, match="accumulate=0 is too small"):
        check_config(replace(CONFIG, accumulate=0))


def test_true_and_false_are_full_and_none():
    for word, remat in ((True, "full"), (False, "none")):
        assert TrainConfig(remat=word) == TrainConfig(remat=remat)
    assert TrainConfig().remat == "full"
    with pytest.raises(UserError, match="no remat policy 'ful'; did you mean 'full'"):
        TrainConfig(remat="ful")


def test_the_cool_down_ends_at_zero_and_holds_the_number_of_steps():
    config = replace(CONFIG, steps=20, warmup=4, cooldown=8, learning_rate=1.0, weight_decay=0.0)
    optimizer = make_optimizer(config)
    params = {"x": jnp.zeros(())}
    state = optimizer.init(params)
    moves = []
    for _ in range(21):
        change, state = optimizer.update({"x": jnp.ones(())}, state, params)
        moves.append(-float(change["x"]))
    expected = [0.25, 0.4375, 0.625, 0.8125, *[1.0] * 8, *np.linspace(1, 0, 9)]
    np.testing.assert_allclose(moves, expected, atol=1e-4)
    assert "steps" not in free_to_change(config) and "steps" in free_to_change(CONFIG)
    with pytest.raises(UserError, match="do not fit into steps=10"):
        check_config(replace(config, steps=10))


def test_batches_that_do_not_divide_are_refused():
    from wanjax.sharding import make_mesh

    with pytest.raises(UserError, match="needs 64 devices"):
        make_mesh(data=64)
    place_batch(toy_batch(), make_mesh())


def test_a_damaged_checkpoint_is_refused_by_name(tmp_path):
    trainer = Trainer(toy_dit(), CONFIG)
    trainer.train(toy_batch())
    trainer.save(Checkpoints(tmp_path), {})
    for file in (tmp_path / "checkpoints" / "1" / "state").rglob("*"):
        if file.is_file() and file.stat().st_size > 200:
            file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match="checkpoints/1"):
        Trainer(toy_dit(), CONFIG).restore(Checkpoints(tmp_path), 1)


def test_a_rank_of_zero_is_refused():
    with pytest.raises(UserError, match="rank"):
        Trainer(toy_dit(), replace(CONFIG, rank=0))
