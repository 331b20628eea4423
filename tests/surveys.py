"""Studies for tests: films of two sets, and answer files as the page would save them."""

import json
from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from configs.survey import survey
from wanjax.data.video import write_video
from wanjax.eval.answers import ANSWERS, answers_digest
from wanjax.eval.survey import VERSION

Rate = Callable[[str, str], int]  # the rating of a label (A, B, good ...) by a question


def film(seed: int, frames: int) -> np.ndarray:
    """A bright square that wanders over a coloured ramp, `T 96 160 3`."""
    rng = np.random.default_rng(seed)
    ramp = np.linspace(0, 160, 160)[None, :, None] * rng.uniform(0.3, 1, 3)
    shown = np.repeat(np.broadcast_to(ramp, (96, 160, 3))[None], frames, 0).astype(np.uint8)
    for t in range(frames):
        left = (20 + 2 * t + 13 * seed) % 130
        shown[t, 30:60, left : left + 25] = 240
    return shown


def write_sets(folder: Path, count: int = 3) -> None:
    """plain_set/ (24 fps) and tuned_set/ (16 fps, of other lengths), the last one of which is in 10
    bits, 4:4:4, which browsers do not play."""
    for kind in ("plain_set", "tuned_set"):
        (folder / kind).mkdir()
    for i in range(count):
        write_video(folder / f"plain_set/shot{i}.mp4", film(i, 33), 24)
        write_video(folder / f"tuned_set/shot{i}.mp4", film(i, 21), 16)
    (folder / f"tuned_set/shot{count - 1}.mp4").unlink()
    write_ten_bits(folder / f"tuned_set/shot{count - 1}.mkv", film(count - 1, 21), 16)


def write_ten_bits(path: Path, frames: np.ndarray, fps: int) -> None:
    """A film in yuv444p10le."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv444p10le"
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(frame, "rgb24").reformat(format="yuv444p10le")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())


def build(folder: Path, *words: object) -> Path:
    """A study of plain_set/ and tuned_set/ in the folder."""
    out = folder / "study"
    sets = ("--a", folder / "plain_set", "--b", folder / "tuned_set", "--out", out)
    survey(["build", *map(str, (*sets, *words))])
    return out


def key_of(study: Path) -> dict:
    return json.loads((study / "study.json").read_text())


def rated(about: Mapping, rate: Rate, questions: list[str], swapped: bool = False) -> dict:
    """What the page notes of a trial whose videos are rated by what they are."""
    labels = list(about["files"])[:: -1 if swapped else 1]
    x, y = (about["files"][label] for label in labels)
    scores = [rate(label, questions[0]) for label in labels]
    answers = {q: [rate(label, q) for label in labels] for q in questions}
    choice = "x" if scores[0] >= scores[1] else "y"
    return {"x": x, "y": y, **answers, "choice": choice, "loops": 1}


def write_answers(study: Path, rater: str, rate: Rate, path: Path | None = None) -> Path:
    """The answers of a rater who rates by the labels; every other trial has its sides swapped."""
    known = key_of(study)
    questions = [one["id"] for one in known["page"]["questions"]]
    answers = [
        {"trial": trial, **rated(about, rate, questions, swapped=bool(i % 2))}
        for i, (trial, about) in enumerate(known["key"].items())
    ]
    content = {
        "format": ANSWERS,
        "version": VERSION,
        "study": known["digest"],
        "rater": rater,
        "began": "2026-01-01T10:00:00.000Z",
        "ended": "2026-01-01T10:20:00.000Z",
        "answers": answers,
    }
    path = path or study.parent / f"answers_{rater}.json"
    write_signed(path, content)
    return path


def write_signed(path: Path, content: dict) -> None:
    """An answer file with the digest that belongs to it."""
    path.write_text(json.dumps(content | {"digest": answers_digest(content)}, indent=1))
