"""Measure a nano base on films that it was not trained on, and say what it beats.

    python -m convert pipeline assets/nano build/nano/shipped
    python -m examples.nano.evaluate --checkpoint build/nano/shipped \\
        --films build/nano/films --out build/nano/evaluation

Of every held-out shot the first window is taken: how well the VAE gives it back, with the change
from frame to frame at the borders of its chunks and inside; the denoiser's loss; and a video from
its first frame and caption, against the real continuation. The same for an untrained denoiser (as
training begins) and for the first frame held
still. Intervals are bootstraps over shots; camera moves over one picture count as unlike shots.
"""

import argparse
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx

from configs import PRESETS
from examples.measures import (
    batch_of,
    borders,
    flow_loss_of,
    lpips,
    motion,
    pixels,
    psnr,
    sample_from,
    signed,
)
from examples.nano.stills import FPS, FRAMES, HEIGHT, WIDTH
from wanjax.data.clips import Window, read_dataset, windows
from wanjax.data.framing import fit
from wanjax.data.video import write_video
from wanjax.errors import UserError, run_script
from wanjax.eval.bootstrap import bootstrap_mean
from wanjax.eval.lpips import LPIPS
from wanjax.models.dit import DiT
from wanjax.pipeline import Pipeline
from wanjax.progress import progress_bar
from wanjax.weights import replace_network

LATER = slice(8, None)  # frames 9 to 33: what the first frame does not give away


@dataclass(frozen=True)
class Model:
    """A checkpoint to be measured, and how it samples."""

    name: str
    pipeline: Pipeline


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--checkpoint", type=Path, required=True, help="native folder to measure")
    parser.add_argument("--films", type=Path, required=True, help="folder of the films")
    parser.add_argument("--out", type=Path, required=True, help="folder for the report")
    parser.add_argument("--splits", default="validation,test")
    parser.add_argument("--most", type=int, default=1000, help="shots at most")
    arguments = parser.parse_args()
    if arguments.most < 1:
        raise UserError(f"most={arguments.most} leaves no shot; use 1 or more.")
    cut = held_out(arguments.films, arguments.splits.split(","))[: arguments.most]
    trained = Model("trained", Pipeline.load(arguments.checkpoint, dtype="float32"))
    (arguments.out / "videos").mkdir(parents=True, exist_ok=True)
    untrained = Model("untrained", untrained_of(arguments.checkpoint, arguments.out / "untrained"))
    judge = LPIPS("alexnet")
    rows = []
    with progress_bar("Measuring", len(cut)) as bar:
        for window in cut:
            row, strip = measure(window, trained, untrained, judge)
            rows.append(row)
            name = window.name.replace("/", "_")
            write_video(arguments.out / "videos" / f"{name}.mp4", strip, FPS)
            bar.advance(note=window.name)
    report = {"summary": summary(rows), "shots": rows}
    (arguments.out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    for name, value in report["summary"].items():
        print(f"{name:45} {value}")


def held_out(films: Path, splits: Iterable[str]) -> list[Window]:
    """The first window of every shot of these splits."""
    first = {}
    for window in windows(read_dataset(films), FRAMES, FPS):
        if window.shot.split in set(splits):
            first.setdefault(window.shot, window)
    if not first:
        raise UserError(f"{films} has no shot in the splits asked for; give others by --splits.")
    return list(first.values())


def untrained_of(checkpoint: Path, folder: Path) -> Pipeline:
    """The checkpoint with a denoiser as training begins with it."""
    if not folder.exists():
        config = Pipeline.load(checkpoint).configs["dit"]
        replace_network(checkpoint, folder, "dit", DiT(config, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    return Pipeline.load(folder, dtype="float32")


def measure(
    window: Window, trained: Model, untrained: Model, judge: LPIPS
) -> tuple[dict, np.ndarray]:
    """Figures of one shot; and truth, reconstruction and video one above the other, uint8."""
    frames = fit(window.read().frames, HEIGHT, WIDTH)
    truth, batch = signed(frames), batch_of(trained.pipeline, frames, window.shot.caption)
    again = np.asarray(trained.pipeline.vae.decode(batch.latents))[0]
    still = np.broadcast_to(truth[:1], truth.shape)
    row = {"name": window.name, "split": window.shot.split, "caption": window.shot.caption}
    row |= {"vae_psnr": psnr(again, truth), "vae_lpips": lpips(judge, again, truth)}
    row |= borders(again, truth)
    row["still_lpips"] = lpips(judge, still[LATER], truth[LATER])
    row["truth_motion"] = motion(truth)
    for model in (trained, untrained):
        video = sample_from(model.pipeline, batch, PRESETS["nano"].sample)
        found = {
            "loss": float(flow_loss_of(model.pipeline, batch)[0]),
            "lpips": lpips(judge, video[LATER], truth[LATER]),
            "first_frame_psnr": psnr(video[0], again[0]),
            "motion": motion(video) / row["truth_motion"],
        }
        row |= {f"{model.name}_{key}": value for key, value in found.items()}
        if model is trained:
            shown = video
    return row, pixels(np.concatenate([truth, again, shown], axis=1))


def summary(rows: list[dict]) -> dict[str, str]:
    """Means over shots with their intervals, and the comparisons in pairs."""
    column = {key: np.asarray([row[key] for row in rows]) for key in rows[0] if key[-4:] != "name"}
    numbers = {k: v for k, v in column.items() if np.issubdtype(v.dtype, np.floating)}
    pairs = {
        "lpips: still less trained (above 0: beaten)": "still_lpips trained_lpips",
        "lpips: untrained less trained": "untrained_lpips trained_lpips",
        "loss: untrained less trained": "untrained_loss trained_loss",
        "change at borders less inside": "border_change inner_change",
    }
    found = {name: str(bootstrap_mean(values)) for name, values in numbers.items()}
    for label, names in pairs.items():
        a, b = (numbers[name] for name in names.split())
        found[label] = str(bootstrap_mean(a - b))
    return {"shots": str(len(rows)), **found}


if __name__ == "__main__":
    run_script(main)
