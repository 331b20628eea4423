"""Teach nano the look of Tears of Steel, and ask whether it was the film that taught it.

    python -m examples.nano.tears --tears FOLDER --films build/nano/films --out build/nano/tears

FOLDER holds battle.webm and scene_0500.mp4. Two adapters are trained alike on the shipped base: one
on the training shots of the film, one, the control, on as many windows of the base's own domain.
Both are then measured on shots of the film that neither has seen: the loss of every shot under base
and adapters, the differences in pairs with a bootstrap over shots, and videos from the shots' first
frames. The film's shots are short, so windows have 17 frames. What was chosen by looking at results
(the number of steps) was chosen on the shots for validation; the figures are those of the test's.
"""

import argparse
import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from configs import PRESETS
from examples.commands import ROOT, run
from examples.measures import digest, flow_loss_of, lpips, pixels, sample_from, signed
from examples.nano.stills import FPS, HEIGHT, WIDTH
from examples.sheet import contact_sheet
from wanjax.data.clips import Window, read_dataset, windows
from wanjax.data.features import Features
from wanjax.data.framing import fit
from wanjax.data.loader import collate
from wanjax.errors import UserError, run_script
from wanjax.eval.bootstrap import bootstrap_mean
from wanjax.eval.lpips import LPIPS
from wanjax.outputs import whole_file
from wanjax.pipeline import Pipeline
from wanjax.progress import progress_bar

CUTS = Path(__file__).with_name("tears_of_steel.jsonl")
CREDIT = "Tears of Steel: (CC) Blender Foundation | mango.blender.org, CC-BY 3.0"
FRAMES, STRIDE = 17, 4
STEPS = 300
LATER = slice(8, None)
SIZE = ("--frames", FRAMES, "--height", HEIGHT, "--width", WIDTH, "--fps", FPS, "--stride", STRIDE)
ADAPTERS = ("film", "control")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--tears", type=Path, required=True, help="folder of the two films")
    parser.add_argument("--films", type=Path, required=True, help="folder of examples.nano.films")
    parser.add_argument("--out", type=Path, required=True, help="folder to work in")
    parser.add_argument("--base", type=Path, default=ROOT / "assets/nano", help="a checkpoint")
    parser.add_argument("--steps", type=int, default=STEPS, help="of each adapter")
    arguments = parser.parse_args()
    out, base = arguments.out.resolve(), arguments.out.resolve() / "base"
    write_data(arguments.tears.resolve(), arguments.films.resolve(), out)
    if not base.exists():
        run("-m", "convert", "pipeline", arguments.base.resolve(), base)
    before = digest(base)
    for name in ADAPTERS:
        if not (features := out / f"{name}_features").exists():
            data = ("--data", out / f"{name}_data", "--checkpoint", base, "--out", features)
            run("encode.py", "nano", *data, *SIZE)
        train = ("--features", features, "--checkpoint", base, "--run", out / f"{name}_run")
        check = ("--validate-every", 50) if name == "film" else ()
        run("train.py", "nano", *train, "--steps", arguments.steps, *check)
    report = {"steps": arguments.steps, "base_unchanged": digest(base) == before}
    report |= measure(out, base)
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    for name, value in report["summary"].items():
        print(f"{name:45} {value}")


def write_data(tears: Path, films: Path, out: Path) -> None:
    """The two folders of clips: the film with its cut list, and the control's."""
    shots = [json.loads(line) for line in CUTS.read_text().splitlines()]
    shots = [shot | {"file": str(tears / shot["file"])} for shot in shots]
    if missing := [shot["file"] for shot in shots if not Path(shot["file"]).is_file()]:
        raise UserError(f"There is no film {missing[0]}; fetch it from mango.blender.org.")
    _write_listing(out / "film_data", shots)
    wanted = len([w for w in _cut(out / "film_data") if w.shot.split == "train"])
    _write_listing(out / "control_data", control_shots(films, wanted))


def control_shots(films: Path, wanted: int) -> list[dict]:
    """Training shots of the base's own domain that give `wanted` windows or a few more: Bunny's,
    and then camera moves and moving shapes as they come."""
    if not (films / "metadata.jsonl").is_file():
        raise UserError(f"{films} holds no films of examples.nano.films; make them first.")
    listed = [json.loads(line) for line in (films / "metadata.jsonl").read_text().splitlines()]
    listed = [s | {"file": str(films / s["file"])} for s in listed if s["split"] == "train"]
    bunny = [shot for shot in listed if "start" in shot]
    drawn = [shot for shot in listed if "start" not in shot]
    drawn.sort(key=lambda shot: shot["file"].rpartition("_")[2])  # the kinds by turns
    count = math.ceil((wanted - sum(map(_windows_of, bunny))) / _windows_of({"end": 33 / FPS}))
    return bunny + drawn[: max(0, count)]


def _windows_of(shot: Mapping) -> int:
    frames = math.floor((shot["end"] - shot.get("start", 0.0)) * FPS + 1e-3)
    return max(0, (frames - FRAMES) // STRIDE + 1)


def _write_listing(folder: Path, shots: list[dict]) -> None:
    with whole_file(folder / "metadata.jsonl", replace=True) as partial:
        partial.write_text("".join(json.dumps(shot) + "\n" for shot in shots))


def _cut(folder: Path) -> list[Window]:
    return windows(read_dataset(folder), FRAMES, FPS, STRIDE)


def measure(out: Path, base: Path) -> dict:
    """Losses of every held-out shot, videos of its first window, and what follows from them."""
    features = Features.open(out / "film_features")
    models = {"base": Pipeline.load(base, dtype="float32")}
    for name in ADAPTERS:
        adapter = [(out / f"{name}_run", 1.0)]
        models[name] = Pipeline.load(base, dtype="float32", lora=adapter)
    shots: dict[object, list[Window]] = {}
    for window in _cut(out / "film_data"):
        if window.shot.split != "train":
            shots.setdefault(window.shot, []).append(window)
    rows, judge, shown = [], LPIPS("alexnet"), {}
    with progress_bar("Measuring", len(shots)) as bar:
        for shot, cut in shots.items():
            row = {"name": cut[0].name, "split": shot.split, "caption": shot.caption}
            batches = [collate([features.example(window.name)]) for window in cut]
            truth = signed(fit(cut[0].read().frames, HEIGHT, WIDTH))
            videos = {"the film": truth}
            for name, pipeline in models.items():
                losses = [flow_loss_of(pipeline, batch, draws=2) for batch in batches]
                row[f"{name}_loss"] = float(np.mean(losses))
                video = sample_from(pipeline, batches[0], PRESETS["nano"].sample)
                row[f"{name}_lpips"] = lpips(judge, video[LATER], truth[LATER])
                videos[name] = video
            rows.append(row)
            shown[cut[0].name] = {name: pixels(video) for name, video in videos.items()}
            bar.advance(note=cut[0].name)
    draw_sheets(out / "sheets", shown)
    return {"summary": summary(rows), "shots": rows}


def draw_sheets(folder: Path, shown: Mapping[str, Mapping[str, np.ndarray]]) -> None:
    """A contact sheet of every shot: film, base, and the adapters' videos."""
    folder.mkdir(exist_ok=True)
    for name, videos in shown.items():
        contact_sheet(folder / f"{name.replace('/', '_')}.png", videos, credit=CREDIT)


def summary(rows: list[dict]) -> dict[str, str]:
    """Means over the shots of each split, and differences in pairs, with their intervals."""
    pairs = (("base", "film"), ("base", "control"), ("control", "film"))
    found = {}
    for split in ("validation", "test"):
        own = [row for row in rows if row["split"] == split]
        found[f"{split}: shots"] = str(len(own))
        for measured in ("loss", "lpips"):
            models = ("base", *ADAPTERS)
            column = {m: np.asarray([row[f"{m}_{measured}"] for row in own]) for m in models}
            for name, values in column.items():
                found[f"{split}: {measured}, {name}"] = str(bootstrap_mean(values))
            for a, b in pairs:
                difference = bootstrap_mean(column[a] - column[b])
                found[f"{split}: {measured}, {a} less {b}"] = str(difference)
    return found


if __name__ == "__main__":
    run_script(main)
