"""train.py killed, stopped and resumed: what it leaves equals what an unbroken run leaves."""

import json
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

import train
from tests.scripts import (
    READS_PROGRAMS,
    SIZE,
    call,
    last_said,
    listing,
    run,
    start,
    stop_when,
    write_checkpoint,
)
from wanjax.checkpoint import latest_step
from wanjax.errors import UserError
from wanjax.loop import TFLOPS
from wanjax.weights import fingerprint

pytestmark = pytest.mark.compiles

ENDLESS = 10**6


def words(run_folder: Path, steps: int, *more: object) -> tuple:
    paths = ("--features", "features", "--checkpoint", "ck", "--run", run_folder)
    settings = ("--batch", 2, "--accumulate", 2, "--warmup", 3, "--keep", 100)
    rank = () if "full" in more else ("--rank", 2)
    return tuple(last_said(("train.py", "nano", *paths, *settings, *rank, "--steps", steps, *more)))


def metrics(folder: Path) -> list[dict]:
    """The lines of a run's metrics without the times; a last line still being written is none."""
    file = folder / "metrics.jsonl"
    whole = file.read_text().rpartition("\n")[0] if file.exists() else ""
    timed = ("seconds", "tokens_per_second", TFLOPS)
    return [
        {k: v for k, v in json.loads(line).items() if k not in timed} for line in whole.splitlines()
    ]


def checkpoint(folder: Path, step: int) -> tuple[dict[str, np.ndarray], dict]:
    """Every array of a checkpoint by its path, and the loader's position."""
    place = (folder / "checkpoints" / str(step)).absolute()
    reader = ocp.PyTreeCheckpointer()
    tree = reader.metadata(place / "state").item_metadata.tree
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    state = reader.restore(place / "state", restore_args=as_numpy)
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    loader = json.loads((place / "loader" / "metadata").read_text())
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in leaves}, loader


def assert_same_checkpoint(one: Path, other: Path, step: int) -> None:
    (state, loader), (state_2, loader_2) = checkpoint(one, step), checkpoint(other, step)
    # Parameters, two moments of each, the counts of the optimizer and the step.
    assert len(state) > 3 * 24 and state.keys() == state_2.keys()
    assert loader == loader_2 and any(np.any(x != 0) for x in state.values())
    for name, array in state.items():
        assert array.dtype == state_2[name].dtype
        np.testing.assert_array_equal(array, state_2[name], err_msg=name)


@pytest.fixture(scope="module")
def broken(world, features, tmp_path_factory) -> tuple[Path, int]:
    """A run that was killed, terminated and interrupted, each time resumed; and its last step."""
    folder = tmp_path_factory.mktemp("broken") / "run"
    saved = folder / "checkpoints" / "2"
    endless = words(folder, ENDLESS, "--checkpoint-every", 2)
    process = start(*endless, cwd=world, environment=READS_PROGRAMS)
    stop_when(saved.exists, process, signal.SIGKILL, -signal.SIGKILL)
    at = latest_step(folder)
    assert at is not None and at >= 2
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        more = ("--checkpoint-every", ENDLESS)
        process = start(*words(folder, ENDLESS, *more), cwd=world)
        reached = lambda: any(line["step"] >= at + 2 for line in metrics(folder))  # noqa: E731, B023
        said = stop_when(reached, process, number, code)
        before, at = at, latest_step(folder)
        # It finished its step, logged it, and saved it.
        assert at >= before + 2 and metrics(folder)[-1]["step"] == at
        assert f"stopped at step {at}; the same command goes on from there" in said
    return folder, at


def test_a_broken_run_equals_an_unbroken_one_bit_for_bit(world, broken, tmp_path):
    """The broken one in processes of its own, the unbroken one called in this process. More than
    20 s, for three of them start, train, and are killed or stopped one after another."""
    folder, at = broken
    base = listing(world / "ck")
    shutil.copytree(folder, tmp_path / "resumed")
    call(*words(tmp_path / "resumed", at + 2), cwd=world)
    call(*words(tmp_path / "straight", at + 2, "--checkpoint-every", at), cwd=world)
    logged = (folder / "metrics.jsonl").read_text()
    resumed = (tmp_path / "resumed" / "metrics.jsonl").read_text()
    assert resumed.startswith(logged)  # with its times: no step was taken a second time
    assert_same_checkpoint(tmp_path / "straight", folder, at)
    assert_same_checkpoint(tmp_path / "straight", tmp_path / "resumed", at + 2)
    assert metrics(tmp_path / "straight") == metrics(tmp_path / "resumed")
    assert [line["step"] for line in metrics(tmp_path / "straight")] == list(range(1, at + 3))
    assert listing(world / "ck") == base


def test_a_run_goes_on_over_two_devices(world, broken, tmp_path):
    """With another mesh and other logging: the same losses, to the rounding of fp32."""
    folder, at = broken
    shutil.copytree(folder, tmp_path / "one")
    shutil.copytree(folder, tmp_path / "two")
    call(*words(tmp_path / "one", at + 4), cwd=world)
    two = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    more = ("--mesh", "data=2", "--log-every", 2, "--validate-every", 0)
    run(*words(tmp_path / "two", at + 4, *more), cwd=world, environment=two)
    alone = {line["step"]: line for line in metrics(tmp_path / "one")}
    shared = [line for line in metrics(tmp_path / "two") if line["step"] > at]
    assert shared and all(line["step"] % 2 == 0 or line["step"] == at + 4 for line in shared)
    for line in shared:
        for name in ("loss", "gradient_norm"):
            assert line[name] == pytest.approx(alone[line["step"]][name], rel=1e-5)
    # And back on one device.
    call(*words(tmp_path / "two", at + 5), cwd=world)
    assert latest_step(tmp_path / "two") == at + 5


def test_other_settings_are_refused_by_name(world, broken, tmp_path, monkeypatch):
    folder, at = broken
    monkeypatch.chdir(world)
    monkeypatch.setattr(train, "load_network", lambda *_, **__: pytest.fail("went on"))

    def refusal(*more: object) -> str:
        monkeypatch.setattr("sys.argv", list(words(folder, at + 2, *more)))
        before = listing(folder)
        with pytest.raises(UserError) as refused:
            train.main()
        assert listing(folder) == before
        return str(refused.value)

    changed = {
        "learning_rate": ("--learning-rate", 1e-4),
        "rank": ("--rank", 3),
        "alpha": ("--alpha", 3.0),
        "targets": ("--targets", "qv"),
        "shift": ("--shift", 2.0),
        "batch": ("--batch", 1),
        "accumulate": ("--accumulate", 1),
        "remat": ("--remat", "offload"),
        "seed": ("--seed", 1),
        "dtype": ("--dtype", "bfloat16"),
        "train": ("--train", "full"),
        "warmup": ("--warmup", 4),
    }
    for name, option in changed.items():
        assert f"was started with {name}=" in refusal(*option)

    write_checkpoint(tmp_path / "ck", seed=1)
    assert fingerprint("ck", "vae") == fingerprint(tmp_path / "ck", "vae")
    assert "was started with weights=" in refusal("--checkpoint", tmp_path / "ck")

    other = shutil.copytree("features", tmp_path / "features")
    manifest = json.loads((other / "wanjax.json").read_text())
    manifest["fingerprint"]["preprocess"] = "diffusers"
    (other / "wanjax.json").write_text(json.dumps(manifest))
    assert "was started with features=" in refusal("--features", other)


def test_full_training_leaves_a_model_that_can_be_sampled(world, features, tmp_path):
    full = ("--train", "full", "--learning-rate", 1e-3)
    base = listing(world / "ck")
    call(*words(tmp_path / "r", 1, *full), cwd=world)
    model = tmp_path / "r" / "model"
    first = fingerprint(model, "dit")
    assert first != fingerprint(world / "ck", "dit")
    assert fingerprint(model, "vae") == fingerprint(world / "ck", "vae")
    picture = ("--image", "picture.png", "--prompt", "rain", "--steps", 1, *SIZE)
    sampling = ("sample.py", "nano", "--checkpoint", model, *picture)
    call(*sampling, "--out", tmp_path / "o.mp4", cwd=world)
    assert (tmp_path / "o.mp4").exists()
    # More steps make another model of it.
    call(*words(tmp_path / "r", 2, *full), cwd=world)
    assert fingerprint(model, "dit") not in (first, fingerprint(world / "ck", "dit"))
    assert listing(world / "ck") == base
