"""Train adapters on cached features: `python train.py PRESET --features F --checkpoint C --run R`.

Ctrl-C or SIGTERM finishes the step, saves and stops; the same command goes on from there, bit for
bit. A run may go on with more steps, on another mesh, with other logging; any other changed setting
is refused. Watch it with `tensorboard --logdir RUN`, or read RUN/metrics.jsonl.
"""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
from grain import DatasetIterator
from jax.sharding import Mesh

from configs import TrainJob, check_preset, command_line, parse_mesh
from convert.lora import open_lora
from wanjax import __version__, lora, work
from wanjax.checkpoint import (
    RUN_FILE,
    RUN_VERSION,
    Checkpoints,
    check_resumable,
    latest_step,
    read_run,
    validations,
)
from wanjax.data.features import Features
from wanjax.data.loader import make_loader
from wanjax.devices import Speed, claim_memory, describe_devices, memory_explained
from wanjax.errors import UserError, run_script
from wanjax.loop import Loop
from wanjax.metrics import read_metrics
from wanjax.models.vae import VAEConfig
from wanjax.outputs import LOCK, alone, require_writable, whole_file
from wanjax.planning.table import nearest_row
from wanjax.precision import parse_dtype
from wanjax.programs import keep_programs
from wanjax.sharding import check_heads, one_device
from wanjax.training import TrainConfig, Trainer, check_config, free_to_change
from wanjax.types import Batch
from wanjax.weights import (
    abstract_network,
    fingerprint,
    load_network,
    read_config,
    replace_network,
)


def main() -> None:
    claim_memory()
    keep_programs()
    preset, job = command_line(lambda preset: preset.train, __doc__, fixed=fixed_by_adapter)
    initial, made_by = initial_adapter(job)
    mesh = parse_mesh(job.mesh)
    check_config(job.settings, mesh)
    check_model(preset, job, mesh, initial)
    features = Features.open(job.features)
    check_belongs(features, job)
    if job.settings.validate_every:
        features.source("validation")  # or a sentence, now and not at the first validation
    loader = make_loader(
        features,
        batch=job.settings.batch,
        accumulate=job.settings.accumulate,
        seed=job.settings.seed,
        data_parallel=1 if mesh is None else mesh.shape["data"],
    )
    settings = describe(preset, job, features) | {"init_lora": made_by}
    check_run(job, settings)
    with alone(job.run, "training"), memory_told(job, mesh, features):
        run(job, mesh, features, loader, settings, initial)


def memory_told(job: TrainJob, mesh: Mesh | None, features: Features) -> AbstractContextManager:
    """Running out of memory is a sentence with what decides it."""
    mesh = mesh or one_device()
    frames, height, width = VAEConfig().video_shape(features.spec.latents[:3])
    return memory_explained(
        f"training on {frames} frames of {width}x{height}, {job.settings.batch} windows a step,",
        mesh,
        nearest_row("train", frames, height, width, mesh.size),
        "use --remat full, a smaller --batch with more --accumulate, a quantised --base, more "
        "devices (--mesh), or features of smaller or shorter windows",
    )


def run(
    job: TrainJob,
    mesh: Mesh | None,
    features: Features,
    loader: DatasetIterator[Batch],
    settings: dict,
    initial: lora.LoRA | None = None,
) -> None:
    """All that writes into the run."""
    config = job.settings
    dtype = "float32" if config.train == "full" else config.dtype
    dit = load_network(job.checkpoint, "dit", dtype=parse_dtype(dtype), mesh=mesh, base=config.base)
    trainer = Trainer(dit, config, mesh, initial)
    write_settings(job.run, settings)
    checkpoints = Checkpoints(job.run, keep=config.keep)
    if checkpoints.latest is not None:
        loader.set_state(trainer.restore(checkpoints, checkpoints.latest))
    model = job.run / "model"
    if trainer.step < config.steps:
        shutil.rmtree(model, ignore_errors=True)  # of the same run when it had fewer steps
    speed, start = step_speed(job, trainer.mesh, features), trainer.step
    sys.stderr.write(plan(trainer, features, job, speed))
    loop = make_loop(trainer, loader, features, checkpoints, config, speed)
    stopped_by = loop.run(job.run, checkpoints)
    if stopped_by is not None:
        sys.stderr.write(f"stopped at step {trainer.step}; the same command goes on from there\n")
        sys.exit(128 + stopped_by)
    if config.train == "full" and not model.exists():
        replace_network(job.checkpoint, model, "dit", trainer.model())
    sys.stderr.write(outcome(job))
    sys.stderr.write(reached(job.run, start, speed))


def step_speed(job: TrainJob, mesh: Mesh, features: Features) -> Speed:
    """The arithmetic of a step, by formula."""
    config, settings = read_config(job.checkpoint)["dit"], job.settings
    grid, full = features.spec.latents[:3], settings.train == "full"
    windows = settings.batch * settings.accumulate
    return Speed.of(work.train_step(config, grid, windows=windows, full=full), mesh)


def reached(run: Path, start: int, speed: Speed) -> str:
    """How fast the steps after `start` were, but for the first, which compiles."""
    seconds = [entry["seconds"] for entry in read_metrics(run) if entry["step"] > start + 1]
    return f"{median(seconds):.2f} s/step, {speed.said(median(seconds))}\n" if seconds else ""


def make_loop(
    trainer: Trainer,
    loader: Iterator[Batch],
    features: Features,
    checkpoints: Checkpoints,
    config: TrainConfig,
    speed: Speed,
) -> Loop:
    """The loop over this run's steps."""

    def step() -> dict[str, jax.Array | float]:
        batch = next(loader)
        count, t, h, w, _ = batch.latents.shape
        host = {"tokens": count * t * (h // 2) * (w // 2), "flops": speed.flops}
        return trainer.train(batch) | host

    def validate() -> float:
        held_out = make_loader(features, "validation", batch=1, seed=0, repeat=False)
        return trainer.validate(held_out)

    def save(_: int, found: dict[str, float] | None) -> None:
        trainer.save(checkpoints, loader.get_state(), found)

    return Loop(
        "Training",
        config.steps,
        step,
        save,
        save_every=config.checkpoint_every,
        log_every=config.log_every,
        validate=validate,
        validate_every=config.validate_every,
    )


def plan(trainer: Trainer, features: Features, job: TrainJob, speed: Speed) -> str:
    """What is about to happen, in two lines or three."""
    config = job.settings
    trained = sum(x.size for x in jax.tree.leaves(trainer.state.params))
    what = f"adapters of rank {config.rank} ({config.targets})"
    what = what if config.train == "lora" else "all weights"
    windows = ", ".join(f"{split} {count}" for split, count in features.splits.items())
    t, h, w, _ = features.spec.latents
    rows, parts = config.batch, config.accumulate
    windows_a_step = f"{rows} windows" if parts == 1 else f"{parts} times {rows} windows"
    return (
        f"{what}: {trained:,} parameters; windows of {job.features}: {windows}, "
        f"{t}x{h}x{w} latents each\n"
        f"steps {trainer.step} to {config.steps}, {windows_a_step} a step, on "
        f"{describe_devices(trainer.mesh.size)}, into {job.run}\n"
    ) + (f"{floor}\n" if (floor := speed.floor()) else "")


def outcome(job: TrainJob) -> str:
    """What the run has come to, and what to do with it."""
    losses = [entry["loss"] for entry in read_metrics(job.run) if "loss" in entry]
    tenth = max(1, len(losses) // 10)
    first, last = (sum(part) / max(1, len(part)) for part in (losses[:tenth], losses[-tenth:]))
    found = validations(job.run, job.settings.steps)
    best = min(found, key=found.get, default=None)
    best = "" if best is None else f"; least validation loss {found[best]:.4f} at step {best}"
    use = f"--checkpoint {job.run}/model" if job.settings.train == "full" else f"--lora {job.run}"
    return (
        f"{job.run}: {job.settings.steps} steps, loss {first:.4f} in the first tenth and "
        f"{last:.4f} in the last{best}; sample with {use}\n"
    )


def initial_adapter(job: TrainJob) -> tuple[lora.LoRA | None, str | None]:
    """The adapter to start from, if any, and a short hash of it. A run that has begun goes on
    without it, where it is gone."""
    if job.init_lora is None:
        return None, None
    try:
        found = open_lora(job.init_lora)
        return found, hash_of(*lora.content(found))
    except UserError:
        begun = begun_from(job)
        if begun is None:
            raise
        return None, begun["init_lora"]


def begun_from(job: TrainJob) -> dict | None:
    """The settings of this run, where it has a checkpoint and was started from that adapter."""
    if not (job.run / RUN_FILE).exists() or latest_step(job.run) is None:
        return None
    saved = read_run(job.run)
    same = saved.get("init_lora") and saved["paths"].get("init_lora") == str(job.init_lora)
    return saved if same else None


def fixed_by_adapter(job: TrainJob) -> tuple[str, dict[str, Any]]:
    """What --init-lora says of the adapters."""
    if job.init_lora is None or job.settings.train == "full":
        return "", {}
    initial, _ = initial_adapter(job)
    begun = None if initial is not None else begun_from(job)
    names = ("rank", "alpha", "targets")
    option = f"--init-lora {job.init_lora}"
    settings = {n: begun[n] for n in names} if begun else lora.train_settings(initial, option)
    return option, settings


def check_model(
    preset: str, job: TrainJob, mesh: Mesh | None, initial: lora.LoRA | None = None
) -> None:
    """Refuse, before features and weights are read, what is not for this model: a preset, targets,
    a mesh, an adapter to start from."""
    configs = read_config(job.checkpoint)
    if "dit" not in configs:
        raise UserError(f"{job.checkpoint} holds no dit to train; convert it again, with it.")
    config = configs["dit"]
    check_preset(preset, job.checkpoint, config)
    if job.settings.train == "lora":
        base = job.settings.base
        dit = abstract_network("dit", config, jnp.bfloat16, base)
        lora.select(dit, job.settings.targets)
        if initial is not None:
            lora.check_fits(dit, [(initial, 1.0)])
    if mesh is not None:
        check_heads(config.num_heads, mesh.shape["ulysses"])


def check_belongs(features: Features, job: TrainJob) -> None:
    """Refuse features that other encoders made, or that are of another shape than the model's."""
    configs = read_config(job.checkpoint)
    for name, made_by in features.fingerprint.get("checkpoint", {}).items():
        if name in configs and fingerprint(job.checkpoint, name) != made_by:
            raise UserError(
                f"{job.features} was encoded by another {name} than the one in {job.checkpoint}; "
                "encode again with this checkpoint."
            )
    dit, spec = configs["dit"], features.spec
    channels = spec.latents[-1] + (0 if spec.condition is None else spec.condition[-1])
    given = {
        "text width": (spec.text[-1], dit.text_dim),
        "image width": (spec.image and spec.image[-1], dit.image_dim),
        "latent channels": (channels, dit.in_channels),
    }
    for what, (has, wants) in given.items():
        if has != wants:
            raise UserError(
                f"{job.features} has {what} {has} and the model in {job.checkpoint} takes {wants}; "
                "encode the clips with this checkpoint."
            )


def describe(preset: str, job: TrainJob, features: Features) -> dict:
    """Everything that makes this run what it is; a resumed run must have the same."""
    return {
        "format": "wanjax-run",
        "version": RUN_VERSION,
        "preset": preset,
        "wanjax": __version__,
        "paths": {
            "features": str(job.features),
            "checkpoint": str(job.checkpoint),
            "init_lora": None if job.init_lora is None else str(job.init_lora),
        },
        "mesh": job.mesh,
        "weights": fingerprint(job.checkpoint, "dit"),
        "features": digest(features),
        **asdict(job.settings),
    }


def digest(features: Features) -> str:
    """A short hash of what the cache holds and of all that it was made from."""
    facts = [asdict(features.spec), features.fingerprint, features.names]
    return hash_of(json.dumps(facts, sort_keys=True).encode())


def hash_of(*parts: bytes) -> str:
    """A short hash of all parts."""
    found = hashlib.sha256()
    for part in parts:
        found.update(part)
    return found.hexdigest()[:16]


def check_run(job: TrainJob, settings: dict) -> None:
    """See that the run is new, or that the one which stands there is this one but for what is free
    to change."""
    run, steps = job.run, job.settings.steps
    if (run / RUN_FILE).exists():
        free = free_to_change(job.settings)
        check_resumable(run, settings, read_run(run), free, asdict(TrainConfig()))
        if (done := latest_step(run) or 0) > steps:
            raise UserError(
                f"{run} has {done} steps and this command has steps={steps}; use --steps {done} or "
                f"more, or take the checkpoint that you want as {run}@STEP."
            )
    elif run.exists() and (not run.is_dir() or set(os.listdir(run)) - {LOCK}):
        raise UserError(f"{run} exists and is not a run of train.py; choose another --run.")
    require_writable(run / RUN_FILE)


def write_settings(run: Path, settings: dict) -> None:
    """Put the settings down (with what a resumed run has changed), now that all is well."""
    run.mkdir(parents=True, exist_ok=True)
    with whole_file(run / RUN_FILE, replace=True) as partial:
        partial.write_text(json.dumps(settings, indent=1))


if __name__ == "__main__":
    run_script(main)
