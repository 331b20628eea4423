"""A data set on disk: films with captions, cut into windows of equal length inside their shots.

`DIR` holds films and either `NAME.txt` beside `NAME.mp4`, or `metadata.jsonl` with one object a
line: {"file": "a.mp4", "caption": "...", "start": 2.5, "end": 6.0, "split": "train"}. `start` and
`end` (seconds) select one shot of a film; they and `split` may be left out. A window never reaches
from one shot into another, nor over what cannot be decoded. What is in DIR and is not used is named
in a warning.
"""

import json
import math
import os
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from jaxtyping import UInt8

from wanjax.data.probing import ROUNDING, VideoInfo, probe
from wanjax.data.video import Pictures, read_stretches, read_video
from wanjax.errors import UserError, nearest, some
from wanjax.progress import progress_bar
from wanjax.text_files import read_objects, read_text, whole_characters
from wanjax.types import Clip, PathLike

FILMS = {
    *(".mp4", ".m4v", ".mov", ".qt", ".3gp", ".3g2", ".f4v", ".mkv", ".webm", ".ogv", ".ogm"),
    *(".avi", ".divx", ".wmv", ".asf", ".flv", ".rm", ".rmvb", ".mpg", ".mpeg", ".mpe", ".m2v"),
    *(".vob", ".ts", ".mts", ".m2ts", ".m2t", ".trp", ".mod", ".tod", ".mxf", ".dv", ".y4m"),
}
PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".heic", ".avif"}
SPLITS = ("train", "validation", "test")
KEYS = {"file": str, "caption": str, "start": (int, float), "end": (int, float), "split": str}
LISTING = "metadata.jsonl"
SHARED = 0.02  # seconds by which cut lists in rounded seconds may let two shots overlap

Item = TypeVar("Item")


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
        if self.whole:
            return str(self.file)
        until = "its end" if self.end is None else f"{self.end:g} s"
        return f"{self.file} from {self.start:g} s to {until}"

    @property
    def whole(self) -> bool:
        """Whether it is all of its film."""
        return not self.start and self.end is None

    def spans(self, info: VideoInfo, fps: float | int) -> list[range]:
        """The numbers of its frames at `fps`, counted from its start, that can be decoded."""
        spans = []
        for begin, end in info.stretches:
            first = max(0, math.ceil((begin - self.start - ROUNDING) * fps))
            end = end if self.end is None else min(end, self.end)
            spans.append(range(first, info.count(fps, self.start, end)))
        return [span for span in spans if span]


@dataclass(frozen=True)
class Window:
    """Where one training example lies: `frames` frames from `start` seconds on, at `fps`, in a film
    of which `info` tells."""

    name: str
    shot: Shot
    start: float
    frames: int
    fps: float
    info: VideoInfo

    def read(self) -> Clip:
        """Decode it. Raises `UserError` if the film is damaged there."""
        frames, source = read_video(
            self.shot.file, fps=self.fps, start=self.start, frames=self.frames, info=self.info
        )
        return Clip(self.name, frames, self.fps, self.shot.caption, source)


def read_dataset(folder: PathLike, default_caption: str | None = None) -> list[Shot]:
    """The shots of the data set in `folder`, in the order of `metadata.jsonl` or of file names.

    Raises `UserError` that names the films without a caption (unless `default_caption` is given),
    the faulty line of `metadata.jsonl`, a picture, which is no film, or two shots of different
    splits that share frames. Warns of the films and other files that it leaves out.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}; name the one that holds the films.")
    listing = folder / LISTING
    films = _films(folder)
    if listing.is_file():
        shots = [_entry(entry, where, folder) for where, entry in read_objects(listing)]
        _warn_unlisted(films, shots, listing)
    else:
        shots = [Shot(file, _name(file, folder), caption="") for file in films]
    if not shots:
        raise UserError(f"{folder} holds no films; put MP4, MOV, MKV or WebM files into it.")
    refuse_shared(shots, {shot.file: shot.file.resolve() for shot in shots})
    default = None if default_caption is None else whole_characters(default_caption)
    return _captioned(shots, listing, default)


def windows(
    shots: Sequence[Shot],
    frames: int = 33,
    fps: float | int = 16,
    stride: int | None = None,
    skip_short: bool = False,
    cover_end: bool = False,
) -> list[Window]:
    """Every window of `frames` frames at `fps` that fits inside a shot, each `stride` frames on.

    `stride` defaults to `frames`, which is no overlap. With `cover_end` one more window ends with
    the shot, where the others leave frames over. Names are `NAME@N`, N the frame at `fps` at which
    the window begins in its film: they stay when other films come or go. A shot shorter than one
    window is an error, or left out with `skip_short`.
    """
    stride = frames if stride is None else stride
    if frames < 1 or frames % 4 != 1:
        raise UserError(f"frames={frames} is not 4n+1; use {max(0, frames - 1) // 4 * 4 + 1}.")
    if stride < 1 or not 0 < fps <= 1000:
        raise UserError(f"stride={stride} and fps={fps:g} must be above zero (fps up to 1000).")
    films = _probed(shots)
    found: dict[str, Window] = {}
    for shot in shots:
        info = films[shot.file]
        _check_inside(shot, info)
        spans = shot.spans(info, fps)
        available = max(map(len, spans), default=0)
        if available < frames and not skip_short:
            raise UserError(_too_short(shot, available, frames, fps))
        for first in (n for span in spans for n in _firsts(span, frames, stride, cover_end)):
            name = f"{shot.name}@{round(shot.start * fps) + first}"
            window = Window(name, shot, shot.start + first / fps, frames, float(fps), info)
            if name in found:
                raise UserError(
                    f"{shot} and {found[name].shot} give two windows one name, {name}; "
                    "rename one of the files, or let the shots not overlap."
                )
            found[name] = window
    return list(found.values())


def read_windows(
    cut: Sequence[Window],
    convert: Callable[[UInt8[np.ndarray, "H0 W0 3"]], UInt8[np.ndarray, "H W 3"]] = np.asarray,
) -> Iterator[tuple[Window, Pictures | None]]:
    """Each window with its frames, each of which `convert` has brought to its size.

    Film by film, in the order of time: each film is decoded once, in a thread, one window ahead of
    the one that is used. None where the film is damaged, contrary to what was found in it.
    """
    films: dict[Path, list[Window]] = {}
    for window in cut:
        films.setdefault(window.shot.file, []).append(window)

    def read() -> Iterator[tuple[Window, Pictures | None]]:
        for file, group in films.items():
            group.sort(key=lambda window: window.start)
            first, starts = group[0], [window.start for window in group]
            stretches = read_stretches(file, first.info, starts, first.frames, first.fps, convert)
            for window, taken in zip(group, stretches, strict=True):
                yield window, np.stack(taken) if len(taken) == window.frames else None

    return _ahead(read())


def _ahead(items: Iterator[Item]) -> Iterator[Item]:
    """The same items, the next of which is made in a thread while one is used."""
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = thread.submit(next, items, None)
            yield item


def _firsts(span: range, frames: int, stride: int, cover_end: bool) -> list[int]:
    """The first frames of the windows in a span of frames."""
    last = span.stop - frames
    firsts = list(range(span.start, last + 1, stride))
    return [*firsts, last] if cover_end and firsts and firsts[-1] < last else firsts


def _films(folder: Path) -> list[Path]:
    """The films in a folder and those below it, links followed; other files are warned of."""
    files = [file for file in sorted(_files(folder)) if file != folder / LISTING]
    for file in files:
        _refuse_picture(file)
    films = [file for file in files if file.suffix.lower() in FILMS and file.is_file()]
    captions = {film.with_suffix(".txt") for film in films}
    others = [str(file) for file in files if file not in captions.union(films)]
    if others:
        warnings.warn(
            f"{some(others)} in {folder} {'is' if len(others) == 1 else 'are'} left out: no film "
            "by its name, no caption beside one, or a link to nothing.",
            stacklevel=3,
        )
    return films


def _files(folder: Path, above: tuple[Path, ...] = ()) -> list[Path]:
    """All files below `folder` but hidden ones; a link back to a folder `above` ends there."""
    real = folder.resolve()
    if real in above:
        return []
    files = []
    try:
        for entry in folder.iterdir():
            if not entry.name.startswith("."):
                files += _files(entry, (*above, real)) if entry.is_dir() else [entry]
    except PermissionError as error:
        raise UserError(f"{folder} may not be read; change its permissions.") from error
    return files


def _warn_unlisted(films: Sequence[Path], shots: Sequence[Shot], listing: Path) -> None:
    listed = {shot.file.resolve() for shot in shots}
    missing = [str(film) for film in films if film.resolve() not in listed]
    if missing:
        warnings.warn(
            f"{some(missing)} {'is' if len(missing) == 1 else 'are'} left out, as no line of "
            f"{listing} names {'it' if len(missing) == 1 else 'them'}.",
            stacklevel=3,
        )


def _entry(entry: dict[str, Any], where: str, folder: Path) -> Shot:
    entry = {key: value for key, value in entry.items() if value is not None}
    if "file" not in entry:
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
    if not _is_file(file):
        raise UserError(f"{where} names {file}, which is not there; mend the line or add the file.")
    caption = entry.get("caption", "")
    end = None if end is None else float(end)
    return Shot(file, _name(file, folder), caption, float(start), end, split)


def _is_file(file: Path) -> bool:
    try:
        return file.is_file()
    except PermissionError as error:
        raise UserError(f"{file} may not be read; change its permissions.") from error
    except OSError:  # no file can have such a name
        return False


def _name(file: Path, folder: Path) -> str:
    """Its path in the folder, without a suffix; bytes that are not UTF-8 are written out."""
    inside = file.relative_to(folder) if file.is_relative_to(folder) else Path(file.name)
    name = "/".join(inside.with_suffix("").parts)
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _refuse_picture(file: Path) -> None:
    if file.suffix.lower() in PICTURES:
        raise UserError(
            f"{file} is a picture, and image-to-video training needs films, whose first frame it "
            "takes as the picture; put a film in its place or move it out of the folder."
        )


def refuse_shared(shots: Iterable[Shot], films: Mapping[Path, Hashable]) -> None:
    """Raise `UserError` for two shots of one film (of files that are the same in `films`) that
    overlap and are of different splits."""
    latest: dict[tuple[Hashable, str], tuple[float, Shot]] = {}
    for shot in sorted(shots, key=lambda shot: shot.start):
        film = films[shot.file]
        for split in SPLITS:
            end, other = latest.get((film, split), (0.0, shot))
            if split != shot.split and end - shot.start > SHARED:
                raise UserError(
                    f"{other} ({other.split}) and {shot} ({shot.split}) share frames, so that one "
                    "split would be seen in the other; let them not overlap."
                )
        end = math.inf if shot.end is None else shot.end
        if end > latest.get((film, shot.split), (0.0, shot))[0]:
            latest[film, shot.split] = end, shot


def _captioned(shots: Sequence[Shot], listing: Path, default: str | None) -> list[Shot]:
    """Each shot with its own caption, the one beside its film, or the default."""
    captions = [shot.caption.strip() or _caption_beside(shot.file) or default for shot in shots]
    missing = [shot for shot, caption in zip(shots, captions) if not caption]
    if missing:
        names = [str(shot) for shot in missing]
        line = f' or a "caption" in {listing}' if listing.is_file() else ""
        raise UserError(
            f"{some(names)} {'has' if len(names) == 1 else 'have'} no caption; write one into "
            f"{missing[0].file.with_suffix('.txt')}{line}, or give all that have none a "
            "--default-caption."
        )
    return [replace(shot, caption=caption) for shot, caption in zip(shots, captions)]


def _caption_beside(film: Path) -> str:
    beside = film.with_suffix(".txt")
    return read_text(beside).strip() if beside.is_file() else ""


def _probed(shots: Sequence[Shot]) -> dict[Path, VideoInfo]:
    films: dict[Path, VideoInfo] = {}
    refused: dict[str, UserError] = {}
    files = dict.fromkeys(shot.file for shot in shots)
    with progress_bar("looking through the films", len(files)) as bar:
        for file in files:
            try:
                films[file] = probe(file)
            except UserError as error:
                refused[str(file)] = error
            bar.advance()
    if len(refused) > 1:
        first, *others = refused
        raise UserError(f"{refused[first]} Neither can be used: {some(others)}.")
    for error in refused.values():
        raise error
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
        f"{remedy} a longer clip (--skip-short leaves it out)."
    )
