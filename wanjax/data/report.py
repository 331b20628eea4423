"""What is to be said of films and windows before hours are spent on them."""

from collections import Counter
from collections.abc import Sequence

from wanjax.data.clips import SPLITS, Shot, Window


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
