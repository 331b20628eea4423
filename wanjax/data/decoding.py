"""Films as FFmpeg decodes them, through PyAV: which stream, which frames, and their colours.

The decoder's own order is the order of the frames. What cannot be decoded before the first key
frame (a film cut by stream copy, a recording) does not exist; what is lost later is marked.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path

import av
import numpy as np
from av.sidedata.sidedata import Type as SideData
from av.stream import Disposition
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter
from jaxtyping import UInt8

from wanjax.errors import UserError

UNSPECIFIED, HDR_TRANSFERS = 2, (16, 18)  # FFmpeg's AVCOL_SPC_UNSPECIFIED; PQ and HLG
PICTURES = Disposition.attached_pic | Disposition.timed_thumbnails | Disposition.still_image
STILLS = {"mjpeg", "png", "bmp", "gif", "webp"}  # codecs of covers, where there is another stream
# Without these, FFmpeg's conversion to RGB comes out a grey level too dark.
EXACT = (
    Interpolation.BICUBIC
    | Interpolation.ACCURATE_RND
    | Interpolation.FULL_CHR_H_INP
    | Interpolation.FULL_CHR_H_INT
)


@contextmanager
def opened(path: Path) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """The film's container and its video stream. Raises `UserError` for what is no film."""
    try:
        if path.is_dir():
            raise UserError(f"{path} is a folder and not a video; name a file in it.")
        if not path.is_file():
            raise UserError(f"There is no video {path}; check the name.")
        # Absolute, lest FFmpeg takes what stands before a colon for a protocol.
        with av.open(str(path.absolute())) as container:
            stream = _film(container, path)
            refuse_hdr(stream.codec_context.color_trc, path)
            stream.thread_type = "AUTO"
            try:
                yield container, stream
            finally:
                # The decoder's threads come to rest while the interpreter is free. Closed as they
                # work, they could wait for the interpreter (to log) while it waits for them.
                stream.codec_context.flush_buffers()
    except PermissionError as error:
        raise UserError(f"{path} may not be read; change its permissions.") from error
    except (av.error.InvalidDataError, av.error.EOFError) as error:
        raise unreadable(path, error.strerror) from error
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror or error}); check the file and its disk."
        ) from error
    except av.FFmpegError as error:
        raise unreadable(path, error.strerror) from error


def unreadable(path: Path, reason: str) -> UserError:
    """The refusal of a film that is damaged or none."""
    return UserError(
        f"{path} cannot be read as a video ({reason}); export it again as MP4, MOV, MKV or WebM."
    )


def refuse_hdr(transfer: int, path: Path) -> None:
    """Raise `UserError` for PQ and HLG."""
    if transfer in HDR_TRANSFERS:
        raise UserError(
            f"{path} is HDR, whose colours would come out wrong; export it as SDR (BT.709) first."
        )


def _film(container: av.container.InputContainer, path: Path) -> av.VideoStream:
    """FFmpeg's choice of a stream, but no cover, flagged as one or not."""
    films = [s for s in container.streams.video if not s.disposition & PICTURES]
    picture = container.format.name.endswith("_pipe") or container.format.name == "image2"
    if not films or picture:
        raise unreadable(path, "it is a picture" if picture else "no video stream in it")
    moving = [s for s in films if s.frames != 1 and s.codec_context.name not in STILLS] or films
    best = container.streams.best("video")
    return best if best in moving else max(moving, key=lambda s: (s.frames, s.width * s.height))


def decoded(
    container: av.container.InputContainer, stream: av.VideoStream
) -> Iterator[av.VideoFrame | None]:
    """Frames in the decoder's order, from the first key frame on; None where some are lost.

    What follows a lost frame leans on it, so that all up to the next key frame are lost too.
    """
    begun = lost = False
    resumes = None  # the time of the key frame with which a loss ends
    for packet in container.demux(stream):
        begun = begun or packet.is_keyframe
        if not begun:
            continue
        if lost and packet.is_keyframe:
            resumes = packet.pts
        try:
            frames = packet.decode()
            damaged = packet.is_corrupt
        except av.FFmpegError:
            frames, damaged = [], True
        for frame in frames:
            lost = lost and not (resumes is not None and frame.pts == resumes)
            if not lost:
                yield frame
        if damaged:
            if not lost:
                yield None
            lost, resumes = True, None


def progressive(frames: Iterator[av.VideoFrame | None]) -> Iterator[av.VideoFrame | None]:
    """Interlaced frames deinterlaced, one for one (FFmpeg's bwdif); others as they come."""
    for shape, run in groupby(frames, _shape):
        if shape is None:
            yield from run
        else:
            yield from _deinterlaced(run)


def _shape(frame: av.VideoFrame | None) -> tuple[int, int, str] | None:
    return None if frame is None else (frame.width, frame.height, frame.format.name)


def _deinterlaced(frames: Iterator[av.VideoFrame]) -> Iterator[av.VideoFrame]:
    """The same for frames of one shape without a loss, which a filter needs."""
    graph = None
    for frame in frames:
        if graph is None and frame.interlaced_frame:
            graph = _deinterlacer(frame)
        if graph is None:
            yield frame
        else:
            graph.push(frame)
            yield from _filtered(graph)
    if graph is not None:
        graph.push(None)
        yield from _filtered(graph)


def _deinterlacer(frame: av.VideoFrame) -> av.filter.Graph:
    graph = av.filter.Graph()
    source = graph.add_buffer(
        width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base
    )
    filter_ = graph.add("bwdif", "mode=send_frame:deint=interlaced")
    graph.link_nodes(source, filter_, graph.add("buffersink")).configure()
    return graph


def _filtered(graph: av.filter.Graph) -> Iterator[av.VideoFrame]:
    while True:
        try:
            yield graph.pull()
        except (av.error.BlockingIOError, av.error.EOFError):
            return


def square_pixels(stream: av.VideoStream) -> tuple[int, int]:
    """Width and height, the width stretched where the file says that pixels are not square."""
    aspect = float(stream.sample_aspect_ratio or 1)
    width = round(stream.width * aspect) if abs(aspect - 1) > 0.01 else stream.width
    return width, stream.height


class Converter:
    """Frames to pictures: upright, in 8-bit RGB; what is transparent lies over black, as in
    pictures. It keeps FFmpeg's own converter, which takes as long to set up as to run."""

    def __init__(self, stream: av.VideoStream):
        self._size = square_pixels(stream)
        self._reformatter = VideoReformatter()

    def __call__(self, frame: av.VideoFrame) -> UInt8[np.ndarray, "H W 3"]:
        untagged_hd = frame.colorspace == UNSPECIFIED and frame.height >= 720
        transparent = any(component.is_alpha for component in frame.format.components)
        picture = self._reformatter.reformat(
            frame,
            *self._size,
            "rgba" if transparent else "rgb24",
            src_colorspace=Colorspace.ITU709 if untagged_hd else None,
            dst_color_range=ColorRange.JPEG,
            interpolation=EXACT,
        ).to_ndarray()
        if transparent:
            picture = np.round(picture[..., :3] * (picture[..., 3:] / 255)).astype(np.uint8)
        return _upright(picture, frame)


def _upright(
    picture: UInt8[np.ndarray, "H0 W0 3"], frame: av.VideoFrame
) -> UInt8[np.ndarray, "H W 3"]:
    """Turned and mirrored as the frame's display matrix says."""
    matrix = next((side for side in frame.side_data if side.type == SideData.DISPLAYMATRIX), None)
    if matrix is None:
        return picture
    # x' = a x + c y, y' = b x + d y, in quarter turns and mirrors.
    a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5]
    across, down = (a, d) if a else (c, b)
    picture = picture if a else picture.swapaxes(0, 1)
    return np.ascontiguousarray(picture[:: -1 if down < 0 else 1, :: -1 if across < 0 else 1])
