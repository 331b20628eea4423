"""A blind study of two sets of videos: a web page that opens from disk and needs no server.

STUDY/index.html and STUDY/videos are what raters get (STUDY/raters.zip has both); STUDY/study.json,
which says what is what, is for `wanjax.eval.answers` and not for raters. All videos are written
anew, as H.264 that every browser plays, so that neither side shows by its codec, its tags or its
name. The page gives every rater an order and sides of their own.
"""

import hashlib
import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np

from wanjax.data.video import write_video
from wanjax.errors import UserError, some
from wanjax.eval.pixels import Video
from wanjax.eval.videos import ClipFile, View
from wanjax.outputs import whole_folder
from wanjax.progress import progress_bar
from wanjax.types import PathLike

FORMAT, VERSION = "wanjax survey", 1
SHORTEST = 0.5  # seconds that can be judged at all
MOSAIC, HELD = 12, 3  # of a broken video: squares up its height, pictures a second
QUESTIONS = (
    {
        "id": "fidelity",
        "title": "Cinematic fidelity",
        "text": "Light, colour and composition are those of a film.",
    },
    {
        "id": "stability",
        "title": "Temporal stability",
        "text": "Nothing flickers, melts or jumps; motion is natural.",
    },
    {
        "id": "identity",
        "title": "Identity and costume",
        "text": "Faces, clothes and objects stay the same from beginning to end.",
    },
)
SCALE = ("bad", "poor", "fair", "good", "excellent")
CHOICE = {
    "id": "choice",
    "title": "Choice",
    "text": "Which of the two would you rather see in a film?",
}


@dataclass(frozen=True)
class Trial:
    """Two videos under the names of what they are: A and B; good and broken; same and again."""

    kind: str
    name: str
    shot: str
    clips: Mapping[str, ClipFile]


def pairs_of(a: Mapping[str, ClipFile], b: Mapping[str, ClipFile]) -> tuple[list[Trial], list[str]]:
    """The videos that both sets have under one name, and sentences on what else was found.

    Raises `UserError` if no name is in both, or a video is shorter than half a second."""
    names = sorted(a.keys() & b.keys())
    if not names:
        raise UserError(
            f"No video of one set has the name of one of the other ({some(sorted(a))}; "
            f"{some(sorted(b))}); give both videos of a pair one name."
        )
    for clip in (clips[name] for name in names for clips in (a, b)):
        if clip.info.duration < SHORTEST:
            raise UserError(
                f"{clip.file} lasts {clip.info.duration:.2g} s, which nobody can judge; take it "
                f"out, or make it {SHORTEST} s or longer."
            )
    trials = [Trial("pair", name, a[name].shot, {"A": a[name], "B": b[name]}) for name in names]
    alone = sorted(a.keys() ^ b.keys())
    said = [f"Left out, as only one set has them: {some(alone)}."] if alone else []
    return trials, said


def with_checks(trials: Sequence[Trial], count: int, seed: int) -> list[Trial]:
    """Also `count` attention checks, made of the pairs: every other one shows one video twice, the
    rest a video beside itself in a broken form. All in an order of chance, without meaning."""
    if not 0 <= count <= len(trials):
        raise UserError(
            f"--checks {count} does not lie between 0 and the {len(trials)} pairs there are."
        )
    rng = np.random.default_rng(seed)
    checks = []
    for number, row in enumerate(rng.choice(len(trials), count, replace=False)):
        of = trials[row]
        clip = of.clips["AB"[number // 2 % 2]]
        kind, labels = (
            ("identical", ("same", "again")) if number % 2 else ("broken", ("good", "broken"))
        )
        checks.append(Trial(kind, of.name, of.shot, dict.fromkeys(labels, clip)))
    every = [*trials, *checks]
    return [every[i] for i in rng.permutation(len(every))]


def notes(trials: Sequence[Trial], seconds: float | int) -> list[str]:
    """Sentences on what may tell the sides apart, and on what raters do not see."""
    pairs = [trial for trial in trials if trial.kind == "pair"]
    infos = [[clip.info for clip in trial.clips.values()] for trial in pairs]
    differing = {
        "size": sum((p.width, p.height) != (q.width, q.height) for p, q in infos),
        "rate": sum(abs(p.fps - q.fps) > 0.01 for p, q in infos),
    }
    said = [
        f"{count} of {len(pairs)} pairs differ in {what}, by which raters may tell the sides apart."
        for what, count in differing.items()
        if count
    ]
    cut = sum(max(i.duration for i in pair) > _length(pair, seconds) + 0.05 for pair in infos)
    if cut:
        said.append(
            f"{cut} of {len(pairs)} pairs are cut, to their shorter video or {seconds:g} s."
        )
    return said


def write_study(
    folder: PathLike,
    trials: Sequence[Trial],
    *,
    sets: Mapping[str, str],
    seed: int = 0,
    lines: int = 720,
    seconds: float | int = 10,
) -> None:
    """Make the folder of a study. `sets` says what A and B are, which no rater gets to see; `lines`
    and `seconds` are the most that a video has. One pair at a time is in memory.

    Raises `UserError` where the folder exists, or a video cannot be read."""
    with whole_folder(Path(folder)) as partial, progress_bar("pairs", len(trials)) as bar:
        (partial / "videos").mkdir()
        shown, key = [], {}
        for number, trial in enumerate(trials):
            name = f"t{number + 1:02}"
            files, about = _write_trial(partial / "videos", trial, f"{seed} {name}", lines, seconds)
            shown.append({"id": name, "videos": sorted(files.values()), **about})
            key[name] = {
                "kind": trial.kind,
                "name": trial.name,
                "shot": trial.shot,
                "files": files,
            }
            bar.advance()
        page = {"questions": QUESTIONS, "scale": SCALE, "choice": CHOICE, "trials": shown}
        study = {
            "format": FORMAT,
            "version": VERSION,
            "digest": digest_of(page),
            "sets": dict(sets),
        }
        text = json.dumps({**study, "page": page, "key": key}, indent=1, ensure_ascii=False)
        (partial / "study.json").write_text(text + "\n", encoding="utf-8")
        html = page_of({**page, "digest": study["digest"]})
        (partial / "index.html").write_text(html, encoding="utf-8")
        _pack(partial)


def digest_of(page: object) -> str:
    """SHA-256 of what raters are shown and asked."""
    text = json.dumps(page, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def page_of(study: Mapping[str, object]) -> str:
    """`index.html`, with its program and the study in it."""
    here = resources.files("wanjax.eval")
    html = (here / "survey.html").read_text(encoding="utf-8")
    script = (here / "survey.js").read_text(encoding="utf-8")
    data = json.dumps(study, ensure_ascii=False).replace("<", "\\u003c")
    html = html.replace('id="study">{}', f'id="study">{data}')
    return html.replace("/* survey.js */", script)


def broken(frames: Video, fps: float | int) -> Video:
    """What nobody who looks takes for good: coarse squares, three pictures a second. It does not
    flash, which could harm people."""
    size = max(1, frames.shape[1] // MOSAIC)
    coarse = frames[:, size // 2 :: size, size // 2 :: size].repeat(size, 1).repeat(size, 2)
    height, width = frames.shape[1:3]
    edge = ((0, 0), (0, max(0, height - coarse.shape[1])), (0, max(0, width - coarse.shape[2])))
    coarse = np.pad(coarse, (*edge, (0, 0)), "edge")[:, :height, :width]
    step = max(1, round(fps / HELD))
    return coarse[np.arange(len(frames)) // step * step]


def _write_trial(
    folder: Path, trial: Trial, salt: str, lines: int, seconds: float | int
) -> tuple[dict[str, str], dict[str, float]]:
    """The names of the files by their labels; the rate and the aspect that the page asks for."""
    infos = [clip.info for clip in trial.clips.values()]
    length = _length(infos, seconds)
    files = {}
    for label, clip in trial.clips.items():
        frames, fps = _read(clip, length, lines)
        frames = broken(frames, fps) if label == "broken" else frames
        files[label] = _write(folder, frames, fps, f"{salt} {label}")
    rate = max(info.fps for info in infos)
    aspect = max(info.width / info.height for info in infos)
    return files, {"fps": round(rate, 3), "aspect": round(aspect, 3)}


def _length(infos: Sequence, seconds: float | int) -> float:
    """Of both videos of a pair: none is longer, or it would be known by that."""
    return min(seconds, *(info.duration for info in infos))


def _read(clip: ClipFile, length: float, lines: int) -> tuple[Video, float]:
    """All frames at the film's own rate, of even sides, and of so many lines at most."""
    info = clip.info
    scale = min(1.0, lines / info.height)
    height, width = (max(2, round(side * scale / 2) * 2) for side in (info.height, info.width))
    view = View(max(2, info.count(info.fps, 0, length)), height, width, info.fps)
    return view.read(clip), info.fps


def _write(folder: Path, frames: Video, fps: float, salt: str) -> str:
    """A video under a name that says nothing, and is another for the same video elsewhere."""
    unnamed = folder / "unnamed.mp4"
    write_video(unnamed, frames, fps)
    name = hashlib.sha256(salt.encode() + unnamed.read_bytes()).hexdigest()[:12] + ".mp4"
    unnamed.rename(folder / name)
    return name


def _pack(folder: Path) -> None:
    """`raters.zip`: all that a rater needs, and nothing that says what is what."""
    files = [folder / "index.html", *sorted((folder / "videos").iterdir())]
    with zipfile.ZipFile(folder / "raters.zip", "w") as archive:
        for file in files:
            # Without its time, which tells in what order the files were made.
            entry = zipfile.ZipInfo((Path("study") / file.relative_to(folder)).as_posix())
            archive.writestr(entry, file.read_bytes())
