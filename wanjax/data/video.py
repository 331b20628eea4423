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

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction
from itertools import chain, islice, takewhile
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace
from jaxtyping import Float, UInt8

from wanjax.data.decoding import (
    EXACT,
    Converter,
    decoded,
    opened,
    progressive,
)
from wanjax.data.probing import ROUNDING, VideoInfo, probe
from wanjax.errors import UserError
from wanjax.outputs import whole_file
from wanjax.types import PathLike

FAR = 10.0  # seconds of a film that are rather skipped than decoded
BT709 = 1  # the same number for FFmpeg's primaries, transfer and matrix

Pictures = UInt8[np.ndarray, "T H W 3"]
Timed = Iterator[tuple[av.VideoFrame | None, float]]


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
    starts: Sequence[float | int],
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
    comment: str = "",
) -> None:
    """An MP4 that plays everywhere: H.264, yuv420p, BT.709, quality crf 17, index in front.

    `frames` are uint8, or floats in [0, 1]; `comment` is put into the file's tag of that name. The
    file appears when it is whole. Raises `UserError`
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
            container.metadata["comment"] = comment
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


def timed_frames(decoded_frames: Iterator[av.VideoFrame | None], info: VideoInfo) -> Timed:
    """Frames with their times; None is a loss. As such counts a frame that has no time, or comes
    after a later one."""
    known = None if info.times is None else iter(info.times)
    time, lasting = -math.inf, 1 / info.fps
    for frame in decoded_frames:
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
    container: av.container.InputContainer,
    stream: av.VideoStream,
    info: VideoInfo,
    start: float | int,
) -> Timed:
    """Frames from one shown before `start` on, each with the time at which the next replaces it."""
    frames = lambda: progressive(decoded(container, stream))  # noqa: E731
    timed = timed_frames(frames(), info)
    if start > 1 and info.times is None:
        # Half a second of margin: some containers seek by decoding time.
        container.seek(int((info.origin + start - 0.5) / stream.time_base), stream=stream)
        sought = next(timed, None)
        if sought is None or sought[1] > start:  # an index that leads astray
            container.seek(int(info.origin / stream.time_base), stream=stream)
            sought = None
            timed = timed_frames(frames(), info)
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


def _runs(starts: Sequence[float | int], far: float | int) -> Iterator[list[float | int]]:
    """`starts` in groups, within which none is further than `far` from the one before."""
    run: list[float | int] = []
    for start in starts:
        if run and start - run[-1] > far:
            yield run
            run = []
        run.append(start)
    if run:
        yield run


def _sweep(
    shown: Timed, starts: Sequence[float | int], frames: int, fps: float | int, convert: Callable
) -> Iterator[list[np.ndarray]]:
    """The pictures of each stretch, taken from the frames as they pass."""
    waiting = deque(starts)
    taking: deque[tuple[float | int, list[np.ndarray | None]]] = deque()
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
