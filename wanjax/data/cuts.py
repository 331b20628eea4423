"""Cuts between the shots of a film, by FFmpeg's detector of scene changes (`scdet`)."""

from pathlib import Path

import av

from wanjax.data.decoding import opened
from wanjax.data.video import VideoInfo, timed_frames

# Frames are compared at this width, which is enough; the threshold is the filter's own default.
WIDTH, THRESHOLD = 160, 10.0


def find_cuts(path: Path, info: VideoInfo) -> list[float]:
    """The times (seconds) at which a new shot seems to begin.

    In 80 s of Tears of Steel with 29 cuts it finds 21 of them, and 10 flashes of light.
    """
    cuts, graph = [], None
    with opened(path) as (container, stream):
        for frame, time in timed_frames(container, stream, info):
            if frame is None:
                graph = None
                continue
            graph = graph or _detector(frame)
            graph.push(frame)
            score = float(graph.pull().metadata.get("lavfi.scd.score", 0))
            if score > THRESHOLD:
                cuts.append(time)
    return cuts


def _detector(frame: av.VideoFrame) -> av.filter.Graph:
    graph = av.filter.Graph()
    source = graph.add_buffer(
        width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base
    )
    small = graph.add("scale", f"{WIDTH}:-2:flags=fast_bilinear")
    graph.link_nodes(source, small, graph.add("scdet"), graph.add("buffersink")).configure()
    return graph
