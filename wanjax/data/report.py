"""What is to be said of films and windows before hours are spent on them."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from wanjax.data.clips import SPLITS, Shot, Window
from wanjax.data.cuts import find_cuts
from wanjax.data.framing import cut_away, enlargement
from wanjax.data.probing import ROUNDING
from wanjax.errors import UserError, some
from wanjax.progress import progress_bar

LONG = 20.0  # seconds of a film from which on it may well be of several shots
TOLD = 0.05  # the share of a picture, or of the frames, from which on its loss is told


def summary(shots: Sequence[Shot], cut: Sequence[Window]) -> str:
    """Counts in one line: films, shots, windows per split, the shots that gave none, and what is
    left over behind the last windows of shots."""
    used = {window.shot for window in cut}
    splits = Counter(window.shot.split for window in cut)
    films = {shot.file for shot in shots}
    counts = (len(films), "film"), (len(shots), "shot"), (len(cut), "window")
    text = ", ".join(f"{count} {noun}{'s' * (count != 1)}" for count, noun in counts)
    text += f" ({', '.join(f'{s} {splits[s]}' for s in SPLITS if splits[s]) or 'none'})"
    left_out = sum(shot not in used for shot in shots)
    text += f"; shorter than a window: {left_out}" if left_out else ""
    seconds = left_over(cut)
    return text + (f"; behind last windows: {seconds:.1f} s" if seconds > 0.05 else "")


def left_over(cut: Sequence[Window]) -> float:
    """Seconds that lie behind the last window of each shot (or decodable stretch)."""
    ends: dict[tuple[Shot, range], float] = {}
    for window in cut:
        first = round((window.start - window.shot.start) * window.fps)
        for span in window.shot.spans(window.info, window.fps):
            if first in span:
                left = (span.stop - first - window.frames) / window.fps
                ends[window.shot, span] = min(left, ends.get((window.shot, span), left))
    return sum(ends.values())


def describe_films(cut: Sequence[Window], height: int, width: int) -> list[str]:
    """A line for each kind of film that is not taken as it is: cropped, enlarged, with frames
    repeated (its rate is lower), deinterlaced, or with stretches that cannot be decoded."""
    kinds: dict[str, list[str]] = {}
    for window in _one_a_film(cut):
        if told := _treatment(window, height, width):
            kinds.setdefault(told, []).append(str(window.shot.file))
    return [f"{some(files)}: {told}" for told, files in kinds.items()]


def refuse_cropped(cut: Sequence[Window], height: int, width: int, limit: float | int) -> None:
    """Raise `UserError` for films that would lose more than `limit` of their pictures."""
    if not 0 <= limit <= 1:
        raise UserError(f"--max-crop {limit:g} is no share of a picture; use 0 to 1.")
    lost = {
        str(window.shot.file): cut_away(window.info.height, window.info.width, height, width)
        for window in _one_a_film(cut)
    }
    films = [file for file, share in lost.items() if share > limit]
    if films:
        raise UserError(
            f"{some(films)} would lose {max(lost.values()):.0%} of the picture in "
            f"{width}x{height}, more than --max-crop {limit:g}; give films of another aspect a "
            "folder and an --out of their own, or allow it."
        )


def warn_of_cuts(cut: Sequence[Window]) -> str | None:
    """A sentence on how many windows of long films seem to contain a cut, as a whole film with one
    caption beside it may: or None, where there are none."""
    films: dict[Path, list[Window]] = {}
    for window in cut:
        if window.shot.whole and window.info.duration > LONG:
            films.setdefault(window.shot.file, []).append(window)
    torn: dict[Path, int] = {}
    with progress_bar("looking for cuts", len(films), hidden=not films) as bar:
        for file, group in films.items():
            cuts = find_cuts(file, group[0].info)
            torn[file] = sum(_contains(window, cuts) for window in group)
            bar.advance()
    found = [str(file) for file, count in torn.items() if count]
    if not found:
        return None
    windows = sum(len(films[file]) for file, count in torn.items() if count)
    return (
        f"{sum(torn.values())} of the {windows} windows of {some(found)} seem to contain a cut; "
        "list the shots with their start and end in metadata.jsonl, so that no window crosses one."
    )


def _contains(window: Window, cuts: Sequence[float]) -> bool:
    last = window.start + (window.frames - 1) / window.fps
    return any(window.start + ROUNDING < cut <= last + ROUNDING for cut in cuts)


def _one_a_film(cut: Sequence[Window]) -> list[Window]:
    return list({window.shot.file: window for window in cut}.values())


def _treatment(window: Window, height: int, width: int) -> str:
    info = window.info
    share, factor = (
        cut_away(info.height, info.width, height, width),
        enlargement(info.height, info.width, height, width),
    )
    repeated = 1 - info.fps / window.fps
    lost = info.duration - sum(end - begin for begin, end in info.stretches)
    told = [
        f"{share:.0%} of the picture is cut away" if share >= TOLD else "",
        f"it is enlarged {factor:.1f} times" if factor >= 1 + TOLD else "",
        f"{repeated:.0%} of the frames are repeated" if repeated >= TOLD else "",
        "it is deinterlaced" if info.interlaced else "",
        f"{lost:.1f} s cannot be decoded" if lost >= TOLD else "",
    ]
    told = [text for text in told if text]
    size = f"{info.width}x{info.height} at {info.fps:.4g} fps"
    return f"{size}, {', '.join(told)}" if told else ""
