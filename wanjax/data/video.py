"""Video files in and out through PyAV: always `T H W 3`.

Frames are taken *by time*: the frame of output time `k / fps` is the one that a player shows then,
by its presentation timestamp. So motion keeps its speed whatever the source's rate, variable rates
included; nothing is ever spread evenly to fit a length. Time 0 is the first frame.

What is handled: rotation and mirroring by the display matrix (phones), pixels that are not square
(widened), colour matrix and range by the file's tags (untagged: BT.709 from 720 lines up, BT.601
below, as players do). HDR (PQ, HLG) is refused. Interlaced film is read as it is.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path

import av
import numpy as np
from av.sidedata.sidedata import Type as SideData
from av.video.reformatter import ColorRange, Colorspace, Interpolation
from jaxtyping import Float, UInt8

from wanjax.errors import UserError
from wanjax.outputs import whole_file
from wanjax.types import PathLike

# Containers round timestamps, Matroska to a millisecond: a frame due this much later is shown now.
ROUNDING = 1e-3
UNSPECIFIED, HDR_TRANSFERS = 2, (16, 18)  # FFmpeg's AVCOL_SPC_UNSPECIFIED; PQ and HLG
BT709 = 1  # the same number for FFmpeg's primaries, transfer and matrix
# Without these, FFmpeg's conversion to RGB comes out a grey level too dark.
EXACT = (
    Interpolation.BICUBIC
    | Interpolation.ACCURATE_RND
    | Interpolation.FULL_CHR_H_INP
    | Interpolation.FULL_CHR_H_INT
)


@dataclass(frozen=True)
class VideoInfo:
    """`width` and `height` as shown, mean source `fps`, `duration` in seconds, source `frames`."""

    width: int
    height: int
    fps: float
    duration: float
    frames: int

    def count(
        self, fps: float | int, start: float | int = 0, end: float | int | None = None
    ) -> int:
        """How many frames `read_video` finds from `start` to `end` (seconds; None: to the end)."""
        end = self.duration if end is None else min(end, self.duration)
        return max(0, math.ceil((end - start - ROUNDING) * fps))


def probe(path: PathLike) -> VideoInfo:
    """Size, rate and exact length, from one pass over the packets, without decoding them.

    Raises `UserError` for what is not a video, has none in it, or is cut off.
    """
    path = Path(path)
    with _opened(path) as (container, stream):
        frame = next(_decoded(container, stream, path), None)
        if frame is None:
            raise _unreadable(path, "no frame in it can be decoded")
        height, width = _rgb(frame, *_square_pixels(stream)).shape[:2]
    with _opened(path) as (container, stream):
        times, end = [], 0.0
        for packet in container.demux():
            if packet.is_corrupt:
                raise _unreadable(path, "it is cut off or damaged")
            time = packet.pts if packet.pts is not None else packet.dts
            if time is None:
                continue
            if packet.stream.index == stream.index and not packet.is_discard:
                times.append(float(time * packet.time_base))
            end = max(end, float((time + (packet.duration or 0)) * packet.time_base))
        _check_whole(path, container, stream, end)
        rate = float(stream.average_rate or stream.guessed_rate or 0)
    times.sort()
    if len(times) == 1 and not rate:
        raise _unreadable(path, "it has a single frame and no rate")
    last = times[-1] - times[-2] if len(times) > 1 else 1 / rate
    duration = times[-1] - times[0] + last
    return VideoInfo(width, height, rate or len(times) / duration, duration, len(times))


def read_video(
    path: PathLike,
    *,
    fps: float | int | None = None,
    start: float | int = 0,
    frames: int | None = None,
) -> tuple[UInt8[np.ndarray, "T H W 3"], float]:
    """Frames from `start` (seconds) on, and the source's mean rate.

    With `fps`, the frame shown at `start + k / fps` for each k; without, every frame as it comes.
    `frames` of them, or all (the caller has the memory for them). Decoding streams, and begins at
    the key frame before `start`. Raises `UserError` if the video ends before, or cannot be read.
    """
    path = Path(path)
    if frames is None:
        probe(path)  # refuses a file that is cut off, which would otherwise just end early
    with _opened(path) as (container, stream):
        size = _square_pixels(stream)
        shown = _shown_from(container, stream, path, start)
        chosen = _by_time(shown, start, fps) if fps else (frame for frame, _ in shown)
        taken = [_rgb(frame, *size) for frame in islice(chosen, frames)]
        rate = float(stream.average_rate or stream.guessed_rate or 0)
    if not taken or len(taken) < (frames or 1):
        raise UserError(
            f"{path} ends after {len(taken)} of the {frames or 1} frames asked for"
            f"{f' at {fps:g} fps' if fps else ''} from {start:.3f} s on; "
            "ask for fewer, or start earlier."
        )
    return np.stack(taken), rate


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
            stream.options = {"crf": "17", "preset": "medium"}
            context = stream.codec_context
            context.colorspace = context.color_primaries = context.color_trc = BT709
            context.color_range = ColorRange.MPEG
            for frame in frames:
                container.mux(stream.encode(_yuv(np.asarray(frame))))
            container.mux(stream.encode())


@contextmanager
def _opened(path: Path) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    try:
        if path.is_dir():
            raise UserError(f"{path} is a folder and not a video; name a file in it.")
        if not path.is_file():
            raise UserError(f"There is no video {path}; check the name.")
        # Absolute, lest FFmpeg takes what stands before a colon for a protocol.
        with av.open(str(path.absolute())) as container:
            cover = av.stream.Disposition.attached_pic
            streams = [s for s in container.streams.video if not s.disposition & cover]
            picture = container.format.name.endswith("_pipe") or container.format.name == "image2"
            if not streams or picture:
                raise _unreadable(path, "it is a picture" if picture else "no video stream in it")
            if streams[0].codec_context.color_trc in HDR_TRANSFERS:
                raise UserError(
                    f"{path} is HDR, whose colours would come out wrong; "
                    "export it as SDR (BT.709) first."
                )
            streams[0].thread_type = "AUTO"
            yield container, streams[0]
    except PermissionError as error:
        raise UserError(f"{path} may not be read; change its permissions.") from error
    except av.FFmpegError as error:
        raise _unreadable(path, error.strerror) from error


def _unreadable(path: Path, reason: str) -> UserError:
    return UserError(
        f"{path} cannot be read as a video ({reason}); export it again as MP4, MOV, MKV or WebM."
    )


def _check_whole(
    path: Path, container: av.container.InputContainer, stream: av.VideoStream, end: float
) -> None:
    """Compare the last packet's `end` with the length that the file's header declares."""
    if stream.duration:
        declared = float(stream.duration * stream.time_base)
    else:
        declared = (container.duration or 0) / av.time_base
    if end < 0.99 * declared - 0.5:
        raise _unreadable(path, f"it is cut off at {end:.1f} of {declared:.1f} s")


def _decoded(
    container: av.container.InputContainer, stream: av.VideoStream, path: Path
) -> Iterator[av.VideoFrame]:
    for packet in container.demux(stream):
        if packet.is_corrupt:
            raise _unreadable(path, "it is cut off or damaged")
        for frame in packet.decode():
            if frame.pts is None:
                raise _unreadable(path, "its frames carry no timestamps")
            yield frame


def _shown_from(
    container: av.container.InputContainer, stream: av.VideoStream, path: Path, start: float | int
) -> Iterator[tuple[av.VideoFrame, float]]:
    """Frames from the one shown at `start` on, each with the time at which the next replaces it."""
    decoded = _decoded(container, stream, path)
    frame = next(decoded, None)
    if frame is None:
        raise _unreadable(path, "no frame in it can be decoded")
    first, origin = frame.pts, frame.time
    if start > 1:  # half a second of margin: some containers seek by decoding time
        container.seek(int((origin + start - 0.5) / stream.time_base), stream=stream)
        decoded = _decoded(container, stream, path)
        frame = next(decoded, None)
        if frame is None or frame.time - origin > start:  # an index that leads astray
            container.seek(first, stream=stream)
            decoded = _decoded(container, stream, path)
            frame = next(decoded)
    lasting = 1 / float(stream.average_rate or stream.guessed_rate or 1)
    for following in decoded:
        lasting = following.time - frame.time
        if following.time - origin > start + ROUNDING:
            yield frame, following.time - origin
        frame = following
    # The last frame stays for as long as the one before it.
    if frame.time + lasting - origin > start + ROUNDING:
        yield frame, frame.time + lasting - origin


def _by_time(
    shown: Iterator[tuple[av.VideoFrame, float]], start: float | int, fps: float | int
) -> Iterator[av.VideoFrame]:
    index = 0
    for frame, until in shown:
        while start + index / fps + ROUNDING < until:
            yield frame
            index += 1


def _square_pixels(stream: av.VideoStream) -> tuple[int, int]:
    """Width and height, the width stretched where the file says that pixels are not square."""
    aspect = float(stream.sample_aspect_ratio or 1)
    width = round(stream.width * aspect) if abs(aspect - 1) > 0.01 else stream.width
    return width, stream.height


def _rgb(frame: av.VideoFrame, width: int, height: int) -> UInt8[np.ndarray, "H W 3"]:
    untagged_hd = frame.colorspace == UNSPECIFIED and frame.height >= 720
    picture = frame.reformat(
        width,
        height,
        "rgb24",
        src_colorspace=Colorspace.ITU709 if untagged_hd else None,
        dst_color_range=ColorRange.JPEG,
        interpolation=EXACT,
    ).to_ndarray()
    matrix = next((side for side in frame.side_data if side.type == SideData.DISPLAYMATRIX), None)
    if matrix is None:
        return picture
    # x' = a x + c y, y' = b x + d y, in quarter turns and mirrors.
    a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5]
    across, down = (a, d) if a else (c, b)
    picture = picture if a else picture.swapaxes(0, 1)
    return np.ascontiguousarray(picture[:: -1 if down < 0 else 1, :: -1 if across < 0 else 1])


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
