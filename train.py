"""Train adapters on cached features: `python train.py PRESET --features F --checkpoint C --run R`.

Ctrl-C or SIGTERM finishes the step, saves and stops; the same command goes on from there, bit for
bit. A run may go on with more steps, on another mesh, with other logging; any other changed setting
is refused. Watch it with `tensorboard --logdir RUN`, or read RUN/metrics.jsonl.
"""

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

from configs import TrainJob, command_line, parse_mesh
from wanjax.checkpoint import RUN_FILE, Checkpoints, check_resumable, read_run
from wanjax.data.features import Features
from wanjax.data.loader import Loader
from wanjax.errors import run_script
from wanjax.metrics import MetricsLog
from wanjax.outputs import whole_file
from wanjax.pipeline import parse_dtype
from wanjax.progress import progress_bar
from wanjax.training import FREE_TO_CHANGE, Trainer, stop_signals
from wanjax.types import Batch
from wanjax.weights import fingerprint, load_network, replace_network


def main() -> None:
    preset, job = command_line(lambda preset: preset.train, __doc__)
    features = Features.open(job.features)
    settings = describe(preset, job, features)
    open_run(job.run, settings)

    dtype = "float32" if job.settings.train == "full" else job.settings.dtype
    mesh = parse_mesh(job.mesh)
    dit = load_network(job.checkpoint, "dit", dtype=parse_dtype(dtype), mesh=mesh)
    trainer = Trainer(dit, job.settings, mesh)
    loader = Loader(features, "train", batch=job.settings.batch, seed=job.settings.seed)
    checkpoints = Checkpoints(job.run, keep=job.settings.keep)
    if checkpoints.latest is not None:
        loader.set_state(trainer.restore(checkpoints, checkpoints.latest))
    stopped_by = train(trainer, loader, features, checkpoints, job)
    if stopped_by is not None:
        sys.exit(128 + stopped_by)
    if job.settings.train == "full":
        replace_network(job.checkpoint, job.run / "model", "dit", trainer.model())


def describe(preset: str, job: TrainJob, features: Features) -> dict:
    """Everything that makes this run what it is; a resumed run must have the same."""
    return {
        "format": "wanjax-run",
        "preset": preset,
        "mesh": job.mesh,
        "base": fingerprint(job.checkpoint, "dit"),
        "features": features.digest,
        **asdict(job.settings),
    }


def open_run(run: Path, settings: dict) -> None:
    """Start a new run, or see that this is the run that stands there."""
    if run.exists():
        check_resumable(run, settings, read_run(run), FREE_TO_CHANGE)
    else:
        run.mkdir(parents=True)
        with whole_file(run / RUN_FILE) as partial:
            partial.write_text(json.dumps(settings, indent=1))


def train(
    trainer: Trainer, loader: Loader, features: Features, checkpoints: Checkpoints, job: TrainJob
) -> int | None:
    """Step until the last step; the number of the signal that stopped it earlier, if one did."""
    config, tokens = job.settings, None
    with (
        MetricsLog(job.run, trainer.step) as log,
        progress_bar("Training", config.steps, done=trainer.step) as bar,
        stop_signals() as stopped_by,
    ):
        while trainer.step < config.steps and stopped_by() is None:
            start = time.perf_counter()
            batch = next(loader)
            tokens = tokens or video_tokens(batch)
            metrics = trainer.train(batch)
            metrics |= speed(time.perf_counter() - start, tokens)
            step = trainer.step
            last = step == config.steps or stopped_by() is not None
            if config.validate_every and (step % config.validate_every == 0 or last):
                split = Loader(features, "validation", batch=1, seed=0, repeat=False)
                metrics["validation_loss"] = trainer.validate(split)
            if step % config.log_every == 0 or last or "validation_loss" in metrics:
                log.write(step, metrics)
            if step % config.checkpoint_every == 0 or last:
                trainer.save(checkpoints, loader.get_state())
            bar.advance(
                1,
                note=f"loss {metrics['loss']:.4f}  {metrics['seconds']:.2f} s/step  "
                f"{metrics['tokens_per_second']:,.0f} tokens/s",
            )
        return stopped_by() if trainer.step < config.steps else None


def video_tokens(batch: Batch) -> int:
    """Tokens that the denoiser sees in one step."""
    count, t, h, w, _ = batch.latents.shape
    return count * t * (h // 2) * (w // 2)


def speed(seconds: float, tokens: int) -> dict[str, float]:
    return {"seconds": seconds, "tokens_per_second": tokens / seconds}


if __name__ == "__main__":
    run_script(main)
