"""Train adapters on cached features: `python train.py PRESET --features F --checkpoint C --run R`.

Ctrl-C or SIGTERM finishes the step, saves and stops; the same command goes on from there, bit for
bit. A run may go on with more steps, on another mesh, with other logging; any other changed setting
is refused. Watch it with `tensorboard --logdir RUN`, or read RUN/metrics.jsonl.
"""

import hashlib
import json
import math
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from configs import TrainJob, command_line, parse_mesh
from wanjax.checkpoint import RUN_FILE, RUN_VERSION, Checkpoints, check_resumable, read_run
from wanjax.data.features import Features
from wanjax.data.loader import make_loader
from wanjax.errors import UserError, run_script
from wanjax.metrics import MetricsLog
from wanjax.outputs import require_writable, whole_file
from wanjax.precision import parse_dtype
from wanjax.progress import progress_bar
from wanjax.sharding import check_heads
from wanjax.training import TrainConfig, Trainer, check_config, free_to_change, stop_signals
from wanjax.types import Batch
from wanjax.weights import fingerprint, load_network, read_config, replace_network


def main() -> None:
    preset, job = command_line(lambda preset: preset.train, __doc__)
    mesh = parse_mesh(job.mesh)
    check_config(job.settings, mesh)
    features = Features.open(job.features)
    check_belongs(features, job)
    if mesh is not None:
        check_heads(read_config(job.checkpoint)["dit"].num_heads, mesh.shape["ulysses"])
    if job.settings.validate_every:
        features.source("validation")  # or a sentence, now and not at the first validation
    settings = describe(preset, job, features)
    check_run(job.run, settings, free_to_change(job.settings))

    dtype = "float32" if job.settings.train == "full" else job.settings.dtype
    dit = load_network(job.checkpoint, "dit", dtype=parse_dtype(dtype), mesh=mesh)
    trainer = Trainer(dit, job.settings, mesh)
    loader = make_loader(
        features,
        batch=job.settings.batch,
        seed=job.settings.seed,
        data_parallel=1 if mesh is None else mesh.shape["data"],
    )
    write_settings(job.run, settings)
    checkpoints = Checkpoints(job.run, keep=job.settings.keep)
    if checkpoints.latest is not None:
        loader.set_state(trainer.restore(checkpoints, checkpoints.latest))
    model = job.run / "model"
    if trainer.step < job.settings.steps:
        shutil.rmtree(model, ignore_errors=True)  # of the same run when it had fewer steps
    stopped_by = train(trainer, loader, features, checkpoints, job)
    if stopped_by is not None:
        sys.stderr.write(f"stopped at step {trainer.step}; the same command goes on from there\n")
        sys.exit(128 + stopped_by)
    if job.settings.train == "full" and not model.exists():
        replace_network(job.checkpoint, model, "dit", trainer.model())


def check_belongs(features: Features, job: TrainJob) -> None:
    """Refuse features that other encoders made, or that are of another shape than the model's."""
    configs = read_config(job.checkpoint)
    for name, made_by in features.fingerprint.get("checkpoint", {}).items():
        if name in configs and fingerprint(job.checkpoint, name) != made_by:
            raise UserError(
                f"{job.features} was encoded by another {name} than the one in {job.checkpoint}; "
                "encode again with this checkpoint."
            )
    if "dit" not in configs:
        raise UserError(f"{job.checkpoint} holds no dit to train; convert it again, with it.")
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
        "mesh": job.mesh,
        "base": fingerprint(job.checkpoint, "dit"),
        "features": digest(features),
        **asdict(job.settings),
    }


def digest(features: Features) -> str:
    """A short hash of what the cache holds and of all that it was made from."""
    facts = [asdict(features.spec), features.fingerprint, features.names]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def check_run(run: Path, settings: dict, free: frozenset[str]) -> None:
    """See that `run` is new, or that the run which stands there is this one but for `free`."""
    if (run / RUN_FILE).exists():
        check_resumable(run, settings, read_run(run), free, asdict(TrainConfig()))
    elif run.exists() and (not run.is_dir() or any(run.iterdir())):
        raise UserError(f"{run} exists and is not a run of train.py; choose another --run.")
    require_writable(run / RUN_FILE)


def write_settings(run: Path, settings: dict) -> None:
    """Put the settings down (with what a resumed run has changed), now that all is well."""
    run.mkdir(parents=True, exist_ok=True)
    with whole_file(run / RUN_FILE, replace=True) as partial:
        partial.write_text(json.dumps(settings, indent=1))


def train(
    trainer: Trainer,
    loader: Iterator[Batch],
    features: Features,
    checkpoints: Checkpoints,
    job: TrainJob,
) -> int | None:
    """Step until the last step; the number of the signal that stopped it earlier, if one did."""
    config = job.settings
    with (
        MetricsLog(job.run, trainer.step) as log,
        progress_bar("Training", config.steps, done=trainer.step) as bar,
        stop_signals() as stopped_by,
    ):
        while trainer.step < config.steps and stopped_by() is None:
            metrics = timed_step(trainer, next(loader))
            step = trainer.step
            check_finite(metrics, checkpoints)
            validates = config.validate_every and step % config.validate_every == 0
            if validates:
                held_out = make_loader(features, "validation", batch=1, seed=0, repeat=False)
                metrics["validation_loss"] = trainer.validate(held_out)
            if step % config.log_every == 0 or step == config.steps or validates:
                log.write(step, metrics)
            if step % config.checkpoint_every == 0:
                trainer.save(checkpoints, loader.get_state())
            bar.advance(
                note="loss {loss:.4f}  {seconds:.2f} s/step  {tokens_per_second:,.0f} "
                "tokens/s".format(**metrics)
            )
        if trainer.step != checkpoints.latest and trainer.step > 0:
            trainer.save(checkpoints, loader.get_state())
        return stopped_by() if trainer.step < config.steps else None


def timed_step(trainer: Trainer, batch: Batch) -> dict[str, float]:
    """One step: its loss, gradient norm, seconds, and video tokens a second."""
    start = time.perf_counter()
    metrics = trainer.train(batch)
    seconds = time.perf_counter() - start
    count, t, h, w, _ = batch.latents.shape
    tokens = count * t * (h // 2) * (w // 2)
    return metrics | {"seconds": seconds, "tokens_per_second": tokens / seconds}


def check_finite(metrics: dict[str, float], checkpoints: Checkpoints) -> None:
    """Stop before a broken state is saved over good ones."""
    if not math.isfinite(metrics["loss"]):
        raise UserError(
            f"The loss became {metrics['loss']} after the checkpoint of step {checkpoints.latest}; "
            "start a new run with a lower --learning-rate."
        )


if __name__ == "__main__":
    run_script(main)
