"""What a film is, before it is read: its size, its rate, its exact times, and what can be decoded.

The packets tell the times of the frames without decoding, where they can be trusted. They cannot
where a film begins between key frames, carries no presentation times (AVI) or has lost packets, and
where its times jump (pieces laid end to end): then the film is decoded once.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
from av.format import Flags

from wanjax.data.decoding import Converter, decoded, opened, refuse_hdr, unreadable
from wanjax.errors import UserError
from wanjax.types import PathLike

# Containers round timestamps, Matroska to a millisecond: a frame due this much later is shown now.
ROUNDING = 1e-3
REORDERED = 17  # frames: as far as any codec brings frames out of order, and one more
JUMP = 10.0  # seconds by which the times of a stream that may be broken off jump ahead
BROKEN_OFF = Flags.ts_discont.value  # of containers whose times may break off at any place


@dataclass(frozen=True)
class VideoInfo:
    """`width` and `height` as shown, mean source `fps`, `duration` in seconds, source `frames`.

    `stretches` are the spans of time (seconds) in which every frame can be decoded. Where the
    file's own times cannot be trusted, `times` has that of every frame, in the decoder's order.
    """

    width: int
    height: int
    fps: float
    duration: float
    frames: int
    interlaced: bool
    origin: float
    stretches: tuple[tuple[float, float], ...]
    times: tuple[float, ...] | None = None

    def count(
        self, fps: float | int, start: float | int = 0, end: float | int | None = None
    ) -> int:
        """How many frames `read_video` finds from `start` to `end` (seconds; None: to the end)."""
        end = self.duration if end is None else min(end, self.duration)
        return max(0, math.ceil((end - start - ROUNDING) * fps))


def probe(path: PathLike) -> VideoInfo:
    """Size, rate, exact length, and what of it can be read.

    One pass over the packets. Where these do not tell for certain what a decoder makes of them,
    the whole film is decoded. Raises `UserError` for what is no video or is cut off.
    """
    path = Path(path)
    with opened(path) as (container, stream):
        first = next(decoded(container, stream), None)
        if first is None:
            raise unreadable(path, "no frame in it can be decoded")
        refuse_hdr(first.color_trc, path)
        height, width = Converter(stream)(first).shape[:2]
        interlaced = bool(first.interlaced_frame)
    with opened(path) as (container, stream):
        packets = _scan(container, stream, path)
        rate = float(stream.average_rate or stream.guessed_rate or 0)
    trusted = packets.trusted and packets.shown[0] == first.pts
    if trusted:
        seconds = [float(time * first.time_base) for time in packets.shown]
        origin, breaks = seconds[0], [0]
        times = [time - origin for time in seconds]
    else:
        origin, times, breaks = _decode_times(path, packets.step)
        rate = _rate(times, rate)
    if not rate and not times[-1]:
        raise unreadable(path, "it has a single frame and no rate")
    # The last frame is shown for as long as the one before it; but that may stand before a loss.
    alike = trusted and len(times) > 1
    duration = times[-1] + (times[-1] - times[-2] if alike else 1 / rate)
    rate = rate or len(times) / duration
    ends = [*(times[n - 1] + 1 / rate for n in breaks[1:]), duration]
    return VideoInfo(
        width=width,
        height=height,
        fps=rate,
        duration=duration,
        frames=len(times),
        interlaced=interlaced,
        origin=origin,
        stretches=tuple((times[n], end) for n, end in zip(breaks, ends)),
        times=None if trusted else tuple(times),
    )


def digest(path: PathLike) -> str:
    """A short hash of all of a film's file: a film replaced by another of its size is another."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); check the file.") from error


@dataclass(frozen=True)
class _Packets:
    """`shown`: times of the packets to be shown, ascending, in units of the stream's time base.
    `step`: seconds from packet to packet, where the container tells when they are decoded alone."""

    shown: list[int]
    trusted: bool
    step: float | None


def _scan(container: av.container.InputContainer, stream: av.VideoStream, path: Path) -> _Packets:
    """Times of the film's packets, and whether a decoder will give these very frames."""
    broken_off = bool(container.format.flags & BROKEN_OFF)
    sound, end, key = True, 0.0, None
    decoding: list[int] = []
    times: list[int] = []
    for packet in container.demux():
        time = packet.pts if packet.pts is not None else packet.dts
        if packet.is_corrupt and not broken_off:
            raise unreadable(path, "it is cut off or damaged")
        if time is None:
            continue
        end = max(end, float((time + (packet.duration or 0)) * packet.time_base))
        if packet.stream.index != stream.index:
            continue
        key = time if key is None and packet.is_keyframe else key
        sound = sound and key is not None and not packet.is_corrupt and packet.pts is not None
        if packet.dts is not None:
            decoding.append(packet.dts)
        if not packet.is_discard:
            times.append(time)
    if not broken_off:
        _check_whole(path, container, stream, end)
    shown = sorted(times)
    # AVI has no presentation times, and what FFmpeg guesses is wrong where frames are reordered.
    guessed = (
        container.format.name == "avi" and stream.codec_context.has_b_frames and len(decoding) > 1
    )
    step = float(np.median(np.diff(decoding)) * stream.time_base) if guessed else None
    ascending = all(a <= b for a, b in pairwise(decoding)) and all(
        a < b for a, b in pairwise(shown)
    )
    jumps = broken_off and any((b - a) * stream.time_base > JUMP for a, b in pairwise(shown))
    return _Packets(shown, bool(sound and times and ascending and not guessed and not jumps), step)


def _check_whole(
    path: Path, container: av.container.InputContainer, stream: av.VideoStream, end: float
) -> None:
    """Compare the last packet's `end` with the length that the file's header declares."""
    if stream.duration:
        declared = float(stream.duration * stream.time_base)
    else:
        declared = (container.duration or 0) / av.time_base
    if end < 0.99 * declared - 0.5:
        raise unreadable(path, f"it is cut off at {end:.1f} of {declared:.1f} s")


def _decode_times(path: Path, step: float | None) -> tuple[float, list[float], list[int]]:
    """The first frame's own time, every frame's time since then, and the numbers of the frames with
    which a stretch without a loss begins. With `step` their own times are but guesses."""
    raw: list[float | None] = []
    breaks = [0]
    with opened(path) as (container, stream):
        jump = JUMP if container.format.flags & BROKEN_OFF else math.inf
        for frame in decoded(container, stream):
            if frame is None:
                breaks.append(len(raw))
            else:
                raw.append(frame.time)
    if step and (None in raw or raw != sorted(raw)):
        raw = [number * step for number in range(len(raw))]
    breaks = [n for n in dict.fromkeys(breaks) if n < len(raw)]
    return raw[0] or 0.0, _continuous(raw, jump), breaks


def _rate(times: Sequence[float], declared: float) -> float:
    """Frames a second, gaps left out: what the file declares, where that is about right."""
    steps = np.diff(times)
    steps = steps[steps > 0]
    if not len(steps):
        return declared
    own = 1 / float(steps[steps <= 2 * np.median(steps)].mean())
    return declared if abs(own - declared) < 0.01 * declared else own


def _continuous(raw: Sequence[float | int | None], jump: float | int) -> list[float]:
    """One timeline from 0 for frames in the decoder's order, whose own times may be missing, out of
    order (by as much as codecs reorder), or jump: back, or ahead by more than `jump` seconds."""
    known = [(number, time) for number, time in enumerate(raw) if time is not None]
    steps = [abs(b - a) / (n - m) for (m, a), (n, b) in pairwise(known)]
    lasting = float(np.median(steps)) if steps else 0.04
    pieces: list[list[float]] = []
    before, latest = -lasting, math.nan
    for time in raw:
        before = before + lasting if time is None else time
        if not latest - REORDERED * lasting < before < latest + jump:
            pieces.append([])
            latest = before
        pieces[-1].append(before)
        latest = max(latest, before)
    times: list[float] = []
    for piece in pieces:
        piece.sort()
        begin = times[-1] + lasting if times else 0.0
        times += [begin + time - piece[0] for time in piece]
    return times
