"""Folders of videos that are to be compared, and the one form in which all are seen.

Videos may be of any codec, size, rate and length. All are resampled to one rate by time, cut to one
length from their start, and scaled and cropped to one size, so that no set gains by its form.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from wanjax.data.clips import FILMS
from wanjax.data.decoding import opened
from wanjax.data.framing import cut_away, fit_picture
from wanjax.data.probing import VideoInfo, digest, probe
from wanjax.data.video import read_stretches
from wanjax.errors import UserError
from wanjax.eval.pixels import Video
from wanjax.progress import progress_bar
from wanjax.types import PathLike

LEAST_FRAMES = 9  # what I3D can see
SHOT_MARK = "@"  # encode.py names windows FILM@FRAME: what stands before is the shot


@dataclass(frozen=True)
class ClipFile:
    """A video in a set. `name` is its path in the folder, without a suffix; `content` a hash."""

    name: str
    file: Path
    info: VideoInfo
    content: str

    @property
    def shot(self) -> str:
        """What it is a window of; of most videos themselves."""
        return self.name.rpartition(SHOT_MARK)[0] or self.name


@dataclass(frozen=True)
class View:
    """How every video is seen: `frames` from its start, at `fps`, of `width` x `height`."""

    frames: int
    height: int
    width: int
    fps: float

    def read(self, clip: ClipFile) -> Video:
        """The frames of a clip. Raises `UserError` if it is damaged."""
        convert = lambda picture: fit_picture(picture, self.height, self.width)  # noqa: E731
        taken = next(read_stretches(clip.file, clip.info, [0], self.frames, self.fps, convert))
        if len(taken) < self.frames:
            raise UserError(
                f"{clip.file} is damaged: {len(taken)} of {self.frames} frames can be decoded; "
                "export it again, or take it out of the folder."
            )
        return np.stack(taken)

    def key(self) -> dict[str, object]:
        """What results of a video depend on besides its content."""
        return asdict(self)


def read_set(folder: PathLike) -> dict[str, ClipFile]:
    """The videos in a folder and those below it, by name.

    Raises `UserError` for a folder that is missing or has none, for two of one name, and for files
    that are no videos by their content.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}; name one that holds videos.")
    files = sorted(
        file
        for file in folder.rglob("*")
        if file.suffix.lower() in FILMS
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    )
    if not files:
        raise UserError(f"{folder} holds no videos; put MP4, MOV, MKV or WebM files into it.")
    found: dict[str, ClipFile] = {}
    with progress_bar(f"looking through {folder.name}", len(files)) as bar:
        for file in files:
            name = file.relative_to(folder).with_suffix("").as_posix()
            if name in found:
                raise UserError(
                    f"{found[name].file} and {file} have one name but for the suffix, by which "
                    "videos are paired; rename or remove one."
                )
            found[name] = ClipFile(name, file, probe(file), digest(file))
            bar.advance()
    return found


def common_view(
    sets: Mapping[str, Mapping[str, ClipFile]],
    *,
    frames: int | None = None,
    fps: float | int | None = None,
    size: tuple[int, int] | None = None,
) -> View:
    """What all videos can be brought to without inventing anything, unless it is given: the length
    of the shortest, the lowest rate, and the size (height, width) of the smallest.

    Raises `UserError` for under 9 frames, and for more than the shortest has.
    """
    clips = [clip for clips in sets.values() for clip in clips.values()]
    if fps is not None and not 0 < fps <= 1000:
        raise UserError(f"--fps {fps:g} is no rate; use one above 0, such as 16.")
    fps = fps or min(round(clip.info.fps, 3) for clip in clips)
    available = {clip: _whole_frames(clip, fps) for clip in clips}
    shortest = min(clips, key=lambda clip: available[clip])
    if available[shortest] < LEAST_FRAMES or (frames is not None and frames < LEAST_FRAMES):
        count = (
            f"{shortest.file} has {available[shortest]}" if frames is None else f"--frames {frames}"
        )
        raise UserError(
            f"{count} frame(s) at {fps:g} fps, and {LEAST_FRAMES} are needed; use longer videos."
        )
    if frames is not None and frames > available[shortest]:
        raise UserError(
            f"{shortest.file} has {available[shortest]} frames at {fps:g} fps, fewer than --frames "
            f"{frames}; ask for fewer."
        )
    smallest = min(clips, key=lambda clip: clip.info.height * clip.info.width)
    height, width = size or (smallest.info.height, smallest.info.width)
    return View(frames or available[shortest], height, width, float(fps))


def describe_set(clips: Mapping[str, ClipFile], view: View) -> dict[str, object]:
    """What a set is made of, and what was done to it, for people and for `results.json`."""
    infos = [clip.info for clip in clips.values()]
    cropped = [cut_away(i.height, i.width, view.height, view.width) for i in infos]
    return {
        "clips": len(clips),
        "shots": len({clip.shot for clip in clips.values()}),
        "sizes": _counted(f"{info.width}x{info.height}" for info in infos),
        "rates": _counted(f"{info.fps:.5g}" for info in infos),
        "codecs": _counted(_codec(clip.file) for clip in clips.values()),
        "frames": _counted(str(_whole_frames(clip, view.fps)) for clip in clips.values()),
        "resampled": sum(abs(info.fps - view.fps) > 0.01 for info in infos),
        "cut": sum(_whole_frames(clip, view.fps) > view.frames for clip in clips.values()),
        "scaled": sum((i.height, i.width) != (view.height, view.width) for i in infos),
        "most cropped": round(max(cropped), 4),
    }


def notes(label: str, about: Mapping[str, object]) -> list[str]:
    """Sentences on what was done to a set; none where its videos were taken as they are."""
    said = {
        "resampled": "resampled to the common rate",
        "cut": "cut to the common length",
        "scaled": "scaled to the common size",
    }
    found = [
        f"{label}: {about[key]} of {about['clips']} videos {what}."
        for key, what in said.items()
        if about[key]
    ]
    if about["most cropped"] > 0.01:
        found.append(f"{label}: up to {about['most cropped']:.0%} of a picture is cropped away.")
    return found


def draw(
    sets: Mapping[str, Mapping[str, ClipFile]], count: int, seed: int
) -> dict[str, dict[str, ClipFile]]:
    """`count` clips of every set; the same names where all sets have them."""
    common = set.intersection(*(set(clips) for clips in sets.values()))
    drawn = {}
    for label, clips in sets.items():
        names = sorted(common if len(common) >= count else clips)
        rng = np.random.default_rng(seed)
        chosen = sorted(rng.choice(len(names), count, replace=False))
        drawn[label] = {names[i]: clips[names[i]] for i in chosen}
    return drawn


def _whole_frames(clip: ClipFile, fps: float | int) -> int:
    """Frames at `fps` from the start on that can be decoded."""
    begin, end = clip.info.stretches[0]
    return 0 if begin > 0 else clip.info.count(fps, 0, min(end, clip.info.duration))


def _codec(file: Path) -> str:
    with opened(file) as (_, stream):
        return stream.codec_context.name


def _counted(values: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(values).items(), key=lambda item: -item[1]))
