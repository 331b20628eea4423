"""A data set on disk: films with captions, cut into windows of equal length inside their shots.

`DIR` holds films and either `NAME.txt` beside `NAME.mp4`, or `metadata.jsonl` with one object a
line: {"file": "a.mp4", "caption": "...", "start": 2.5, "end": 6.0, "split": "train"}. `start` and
`end` (seconds) select one shot of a film; they and `split` may be left out. A window never reaches
from one shot into another.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from wanjax.data.video import VideoInfo, probe, read_video
from wanjax.errors import UserError, nearest
from wanjax.progress import progress_bar
from wanjax.types import Clip, PathLike

FILMS = {".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".wmv", ".flv"}
PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".heic", ".avif"}
SPLITS = ("train", "validation", "test")
KEYS = {"file": str, "caption": str, "start": (int, float), "end": (int, float), "split": str}


@dataclass(frozen=True)
class Shot:
    """A stretch of one film, in seconds (`end` None: to its end). `name` is its file's in DIR."""

    file: Path
    name: str
    caption: str
    start: float = 0.0
    end: float | None = None
    split: str = "train"

    def __str__(self) -> str:
        if not self.start and self.end is None:
            return str(self.file)
        until = "its end" if self.end is None else f"{self.end:g} s"
        return f"{self.file} from {self.start:g} s to {until}"


@dataclass(frozen=True)
class Window:
    """Where one training example lies: `frames` frames from `start` seconds on, at `fps`."""

    name: str
    shot: Shot
    start: float
    frames: int
    fps: float

    def read(self) -> Clip:
        """Decode it. Raises `UserError` if the film is damaged there."""
        frames, source = read_video(
            self.shot.file, fps=self.fps, start=self.start, frames=self.frames
        )
        return Clip(self.name, frames, self.fps, self.shot.caption, source)


def read_dataset(folder: PathLike, default_caption: str | None = None) -> list[Shot]:
    """The shots of the data set in `folder`, in the order of `metadata.jsonl` or of file names.

    Raises `UserError` that names the film without a caption (unless `default_caption` is given),
    the faulty line of `metadata.jsonl`, or a picture, which is not a film.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}; name the one that holds the films.")
    listing = folder / "metadata.jsonl"
    shots = _listed(listing) if listing.is_file() else _found(folder)
    if not shots:
        raise UserError(f"{folder} holds no films; put MP4, MOV, MKV or WebM files into it.")
    return [_captioned(shot, listing, default_caption) for shot in shots]


def windows(
    shots: Sequence[Shot],
    frames: int = 33,
    fps: float | int = 16,
    stride: int | None = None,
    skip_short: bool = False,
) -> list[Window]:
    """Every window of `frames` frames at `fps` that fits inside a shot, each `stride` frames on.

    `stride` defaults to `frames`, which is no overlap. Names are `NAME@N`, N the frame at `fps` at
    which the window begins in its film: they stay when other films come or go. A shot shorter than
    one window is an error, or left out with `skip_short`.
    """
    stride = frames if stride is None else stride
    if frames < 1 or frames % 4 != 1:
        raise UserError(f"frames={frames} is not 4n+1; use {max(0, frames - 1) // 4 * 4 + 1}.")
    if stride < 1 or fps <= 0:
        raise UserError(f"stride={stride} and fps={fps:g} must be above zero; mend them.")
    films = _probed(shots)
    found: dict[str, Window] = {}
    for shot in shots:
        info = films[shot.file]
        _check_inside(shot, info)
        available = info.count(fps, shot.start, shot.end)
        if available < frames and not skip_short:
            raise UserError(_too_short(shot, available, frames, fps))
        for first in range(0, available - frames + 1, stride):
            name = f"{shot.name}@{round(shot.start * fps) + first}"
            window = Window(name, shot, shot.start + first / fps, frames, float(fps))
            if name in found:
                raise UserError(
                    f"{shot} and {found[name].shot} give two windows one name, {name}; "
                    "rename one of the files, or let the shots not overlap."
                )
            found[name] = window
    return list(found.values())


def summary(shots: Sequence[Shot], cut: Sequence[Window]) -> str:
    """Counts in one line: films, shots, windows per split, and the shots that gave none."""
    used = {window.shot for window in cut}
    splits = Counter(window.shot.split for window in cut)
    films = {shot.file for shot in shots}
    counts = (len(films), "film"), (len(shots), "shot"), (len(cut), "window")
    text = ", ".join(f"{count} {noun}{'s' * (count != 1)}" for count, noun in counts)
    text += f" ({', '.join(f'{s} {splits[s]}' for s in SPLITS if splits[s]) or 'none'})"
    left_out = sum(shot not in used for shot in shots)
    return text + (f"; shorter than a window: {left_out}" if left_out else "")


def _found(folder: Path) -> list[Shot]:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    files = [f for f in files if not any(p.startswith(".") for p in f.relative_to(folder).parts)]
    for file in files:
        _refuse_picture(file)
    return [
        Shot(file, _name(file, folder), caption="")
        for file in files
        if file.suffix.lower() in FILMS
    ]


def _listed(listing: Path) -> list[Shot]:
    shots = []
    for number, line in enumerate(listing.read_text("utf-8-sig").splitlines(), 1):
        if line.strip():
            shots.append(_entry(line, f"{listing}:{number}", listing.parent))
    return shots


def _entry(line: str, where: str, folder: Path) -> Shot:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not JSON ({error}); write one object a line.") from error
    if not isinstance(entry, dict) or "file" not in entry:
        raise UserError(f'{where} names no film; write {{"file": "a.mp4", "caption": "..."}}.')
    for key, value in entry.items():
        if key not in KEYS:
            raise UserError(f"{where} has the unknown key '{key}'{nearest(key, KEYS)}")
        if not isinstance(value, KEYS[key]) or isinstance(value, bool):
            raise UserError(f"{where} has {key}={json.dumps(value)}, of the wrong type; mend it.")
    split, start, end = entry.get("split", "train"), entry.get("start", 0), entry.get("end")
    if split not in SPLITS:
        raise UserError(f"{where} has the unknown split '{split}'{nearest(split, SPLITS)}")
    if start < 0 or (end is not None and end <= start):
        raise UserError(f"{where} has start={start} and end={end}; let 0 <= start < end.")
    file = folder / entry["file"]
    _refuse_picture(file)
    if not file.is_file():
        raise UserError(f"{where} names {file}, which is not there; mend the line or add the file.")
    caption = entry.get("caption", "")
    end = None if end is None else float(end)
    return Shot(file, _name(file, folder), caption, float(start), end, split)


def _name(file: Path, folder: Path) -> str:
    inside = file.relative_to(folder) if file.is_relative_to(folder) else Path(file.name)
    return "/".join(inside.with_suffix("").parts)


def _refuse_picture(file: Path) -> None:
    if file.suffix.lower() in PICTURES:
        raise UserError(
            f"{file} is a picture, and image-to-video training needs films, whose first frame it "
            "takes as the picture; put a film in its place or move it out of the folder."
        )


def _captioned(shot: Shot, listing: Path, default: str | None) -> Shot:
    beside = shot.file.with_suffix(".txt")
    caption = shot.caption.strip()
    if not caption and beside.is_file():
        try:
            caption = beside.read_text("utf-8-sig").strip()
        except UnicodeDecodeError as error:
            raise UserError(f"{beside} is not UTF-8 text; save it again as UTF-8.") from error
    if not caption and default is None:
        line = f' or a "caption" in {listing}' if listing.is_file() else ""
        raise UserError(
            f"{shot} has no caption; write one into {beside}{line}, or give a default caption."
        )
    return Shot(shot.file, shot.name, caption or default, shot.start, shot.end, shot.split)


def _probed(shots: Sequence[Shot]) -> dict[Path, VideoInfo]:
    films: dict[Path, VideoInfo] = {}
    files = dict.fromkeys(shot.file for shot in shots)
    with progress_bar("looking through the films", len(files)) as bar:
        for file in files:
            films[file] = probe(file)
            bar.advance()
    return films


def _check_inside(shot: Shot, info: VideoInfo) -> None:
    # A cut list in rounded seconds may point a frame past the end.
    last = shot.start if shot.end is None else shot.end
    if last > info.duration + 1 / info.fps:
        raise UserError(
            f"{shot} reaches beyond the film, which lasts {info.duration:.3f} s; "
            "mend its start and end."
        )


def _too_short(shot: Shot, available: int, frames: int, fps: float | int) -> str:
    remedy = f"use --frames {(available - 1) // 4 * 4 + 1} or fewer, or" if available else "use"
    return (
        f"{shot} has {available} frames at {fps:g} fps and a window needs {frames}; "
        f"{remedy} a longer clip (--skip-short True leaves it out)."
    )
