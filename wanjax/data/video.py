"""Video files in and out through PyAV: always `T H W 3`.

Frames are taken *by time*: the frame of output time `k / fps` is the one that a player shows then,
by its presentation timestamp. So motion keeps its speed whatever the source's rate, variable rates
included; nothing is ever spread evenly to fit a length. Time 0 is the first frame.

What is handled: rotation and mirroring by the display matrix (phones), pixels that are not square
(widened), colour matrix and range by the file's tags (untagged: BT.709 from 720 lines up, BT.601
below, as players do), interlaced film (deinterlaced), films that begin between key frames, that
carry no presentation times (AVI), or whose times jump (pieces laid end to end). HDR (PQ, HLG) is
refused.
"""

import hashlib
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain, islice, pairwise, takewhile
from pathlib import Path

import av
import numpy as np
from av.format import Flags
from av.video.reformatter import ColorRange, Colorspace
from jaxtyping import Float, UInt8

from wanjax.data.decoding import (
    EXACT,
    Converter,
    decoded,
    opened,
    progressive,
    refuse_hdr,
    unreadable,
)
from wanjax.errors import UserError
from wanjax.outputs import whole_file
from wanjax.types import PathLike

# Containers round timestamps, Matroska to a millisecond: a frame due this much later is shown now.
ROUNDING = 1e-3
REORDERED = 17  # frames: as far as any codec brings frames out of order, and one more
JUMP = 10.0  # seconds by which the times of a stream that may be broken off jump ahead
FAR = 10.0  # seconds of a film that are rather skipped than decoded
BROKEN_OFF = Flags.ts_discont.value  # of containers whose times may break off at any place
BT709 = 1  # the same number for FFmpeg's primaries, transfer and matrix

Pictures = UInt8[np.ndarray, "T H W 3"]
Timed = Iterator[tuple[av.VideoFrame | None, float]]


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
        origin, times, breaks = _decode_times(path)
        rate = _rate(times, rate)
    if not rate and not times[-1]:
        raise unreadable(path, "it has a single frame and no rate")
    # The last frame is shown for as long as the one before it.
    duration = times[-1] + (times[-1] - times[-2] if len(times) > 1 else 1 / rate)
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


def read_video(
    path: PathLike,
    *,
    fps: float | int | None = None,
    start: float | int = 0,
    frames: int | None = None,
    info: VideoInfo | None = None,
) -> tuple[Pictures, float]:
    """Frames from `start` (seconds) on, and the source's mean rate.

    With `fps`, the frame shown at `start + k / fps` for each k; without, every frame as it comes.
    `frames` of them, or all (the caller has the memory for them). Decoding streams, and begins at
    the key frame before `start`. `info` is what `probe` found, where that is known. Raises
    `UserError` if the video ends before, or cannot be read.
    """
    path = Path(path)
    info = info or probe(path)
    if fps:
        wanted = info.count(fps, start) if frames is None else frames
        taken = next(read_stretches(path, info, [start], wanted, fps)) if wanted else []
    else:
        wanted = frames
        with opened(path) as (container, stream):
            converter = Converter(stream)
            shown = _shown_from(container, stream, info, start)
            later = (f and converter(f) for f, until in shown if until > start + ROUNDING)
            taken = _until_lost(islice(later, frames))
    if not len(taken) or len(taken) < (wanted or 1):
        raise UserError(
            f"{path} ends after {len(taken)} of the {wanted or 1} frames asked for"
            f"{f' at {fps:g} fps' if fps else ''} from {start:.3f} s on; "
            "ask for fewer, or start earlier."
        )
    return np.stack(taken), info.fps


def read_stretches(
    path: Path,
    info: VideoInfo,
    starts: Sequence[float],
    frames: int,
    fps: float | int,
    convert: Callable[[UInt8[np.ndarray, "H0 W0 3"]], UInt8[np.ndarray, "H W 3"]] = np.asarray,
) -> Iterator[list[UInt8[np.ndarray, "H W 3"]]]:
    """`frames` frames at `fps` from each of `starts` (seconds, ascending), in one pass.

    `info` is what `probe` found. Each source frame is decoded once and each picture made once, by
    `convert`, whatever stretches it belongs to; what no stretch needs is skipped. A stretch is
    shorter where the film ends, or where a frame is lost, contrary to what was found.
    """
    for run in _runs(starts, FAR + frames / fps if info.times is None else math.inf):
        with opened(path) as (container, stream):
            picture = _composed(Converter(stream), convert)
            shown = _shown_from(container, stream, info, run[0])
            yield from _sweep(shown, run, frames, fps, picture)


def write_video(
    path: PathLike,
    frames: UInt8[np.ndarray, "T H W 3"] | Float[np.ndarray, "T H W 3"],
    fps: float | int = 16,
) -> None:
    """An MP4 that plays everywhere: H.264, yuv420p, BT.709, quality crf 17, index in front.

    `frames` are uint8, or floats in [0, 1]. The file appears when it is whole. Raises `UserError`
    for odd sizes, NaN, another suffix than .mp4, or a disk that does not take it.
    """
    path = Path(path)
    if path.suffix.lower() != ".mp4":
        raise UserError(f"{path} would be an MP4 file; give it a name that ends in .mp4.")
    count, height, width, _ = frames.shape
    if not count or height % 2 or width % 2:
        raise UserError(
            f"{path} cannot hold {count} frames of {width}x{height}: H.264 needs a frame or more, "
            f"and even sizes; crop to {width // 2 * 2}x{height // 2 * 2}."
        )
    # A bad value is found before a file is begun.
    if not np.issubdtype(frames.dtype, np.integer) and not np.isfinite(frames).all():
        raise UserError(f"The frames for {path} hold NaN or infinity; compute them in float32.")
    with whole_file(path, replace=True) as partial:
        options = {"movflags": "+faststart"}
        with av.open(str(partial), "w", format="mp4", container_options=options) as container:
            stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(10**5))
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            # With its macroblock tree x264 makes now one file and now another of small pictures.
            stream.options = {"crf": "17", "preset": "medium", "x264-params": "mbtree=0"}
            context = stream.codec_context
            context.colorspace = context.color_primaries = context.color_trc = BT709
            context.color_range = ColorRange.MPEG
            for frame in frames:
                container.mux(stream.encode(_yuv(np.asarray(frame))))
            container.mux(stream.encode())


@dataclass(frozen=True)
class _Packets:
    """`shown`: times of the packets to be shown, ascending, in units of the stream's time base."""

    shown: list[int]
    trusted: bool


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
    # AVI has no presentation times: where frames are reordered, those that FFmpeg guesses are not.
    guessed = stream.codec_context.has_b_frames and shown == times
    ascending = all(a <= b for a, b in pairwise(decoding)) and all(
        a < b for a, b in pairwise(shown)
    )
    jumps = broken_off and any((b - a) * stream.time_base > JUMP for a, b in pairwise(shown))
    return _Packets(shown, bool(sound and times and ascending and not guessed and not jumps))


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


def _decode_times(path: Path) -> tuple[float, list[float], list[int]]:
    """The first frame's own time, every frame's time since then, and the numbers of the frames with
    which a stretch without a loss begins."""
    raw: list[float | None] = []
    breaks = [0]
    with opened(path) as (container, stream):
        jump = JUMP if container.format.flags & BROKEN_OFF else math.inf
        for frame in decoded(container, stream):
            if frame is None:
                breaks.append(len(raw))
            else:
                raw.append(frame.time)
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


def _continuous(raw: Sequence[float | None], jump: float) -> list[float]:
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


def timed_frames(
    container: av.container.InputContainer, stream: av.VideoStream, info: VideoInfo
) -> Timed:
    """Frames with their times, from where the container stands; None is a loss. As such counts a
    frame that has no time, or comes after a later one."""
    known = None if info.times is None else iter(info.times)
    time, lasting = -math.inf, 1 / info.fps
    for frame in progressive(decoded(container, stream)):
        following = None
        if frame is not None and known is not None:
            following = next(known, None)
        elif frame is not None and frame.pts is not None:
            following = frame.time - info.origin
        if following is None or following < time:
            yield None, time + lasting
        else:
            time = following
            yield frame, time


def _shown_from(
    container: av.container.InputContainer, stream: av.VideoStream, info: VideoInfo, start: float
) -> Timed:
    """Frames from one shown before `start` on, each with the time at which the next replaces it."""
    timed = timed_frames(container, stream, info)
    if start > 1 and info.times is None:
        # Half a second of margin: some containers seek by decoding time.
        container.seek(int((info.origin + start - 0.5) / stream.time_base), stream=stream)
        sought = next(timed, None)
        if sought is None or sought[1] > start:  # an index that leads astray
            container.seek(int(info.origin / stream.time_base), stream=stream)
            sought = None
            timed = timed_frames(container, stream, info)
        timed = timed if sought is None else chain([sought], timed)
    before, lasting = None, 1 / info.fps
    for frame, time in timed:
        if before is not None:
            yield before[0], time
            lasting = time - before[1]
        before = frame, time
    # The last frame stays for as long as the one before it.
    if before is not None:
        yield before[0], before[1] + lasting


def _runs(starts: Sequence[float], far: float) -> Iterator[list[float]]:
    """`starts` in groups, within which none is further than `far` from the one before."""
    run: list[float] = []
    for start in starts:
        if run and start - run[-1] > far:
            yield run
            run = []
        run.append(start)
    if run:
        yield run


def _sweep(
    shown: Timed, starts: Sequence[float], frames: int, fps: float | int, convert: Callable
) -> Iterator[list[np.ndarray]]:
    """The pictures of each stretch, taken from the frames as they pass."""
    waiting = deque(starts)
    taking: deque[tuple[float, list[np.ndarray | None]]] = deque()
    for frame, until in shown:
        while waiting and waiting[0] + ROUNDING < until:
            taking.append((waiting.popleft(), []))
        picture = None
        for start, taken in taking:
            while len(taken) < frames and start + len(taken) / fps + ROUNDING < until:
                if picture is None and frame is not None:
                    picture = convert(frame)
                taken.append(picture)
        while taking and len(taking[0][1]) == frames:
            yield _until_lost(taking.popleft()[1])
        if not taking and not waiting:
            return
    yield from (_until_lost(taken) for _, taken in taking)
    yield from ([] for _ in waiting)


def _composed(first: Callable, second: Callable) -> Callable:
    return lambda given: second(first(given))


def _until_lost(taken: Iterable[np.ndarray | None]) -> list[np.ndarray]:
    return list(takewhile(lambda picture: picture is not None, taken))


def _yuv(picture: np.ndarray) -> av.VideoFrame:
    if picture.dtype != np.uint8:
        picture = np.round(np.clip(picture.astype(np.float32), 0, 1) * 255).astype(np.uint8)
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), "rgb24")
    return frame.reformat(
        format="yuv420p",
        dst_colorspace=Colorspace.ITU709,
        src_color_range=ColorRange.JPEG,
        dst_color_range=ColorRange.MPEG,
        interpolation=EXACT,
    )
