"""Films as cameras, recorders and cutters leave them: what a decoder gives of them, in order."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest

from tests.test_video import STEP, numbers
from wanjax.data import video
from wanjax.data.clips import Shot, read_windows, windows
from wanjax.data.probing import _continuous, probe
from wanjax.data.video import read_stretches, read_video, write_video
from wanjax.errors import UserError

FAITHFUL = {"bf": "3", "b_strategy": "0", "sc_threshold": "0", "g": "20"}


def steady(path, count=60, rate=24):
    """A film whose frame i has brightness `STEP * i`, with frames out of order in the file."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        stream.options = {"crf": "4", **FAITHFUL}
        for i in range(count):
            grey = np.full((32, 48, 3), STEP * i, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(grey, "rgb24")))
        container.mux(stream.encode())
    return path


def remuxed(source, target, first=0, options=None):
    """The packets of a film from number `first` on, in another container."""
    with av.open(str(source)) as old, av.open(str(target), "w", options=options or {}) as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for number, packet in enumerate(old.demux(video=0)):
            if packet.dts is not None and number >= first:
                packet.stream = stream
                new.mux(packet)
    return target


def read(path, fps=24):
    """The numbers of the frames of each stretch of a film, read whole."""
    info = probe(path)
    return [
        numbers(np.stack(next(read_stretches(path, info, [begin], count, fps))))
        for begin, end in info.stretches
        if (count := info.count(fps, begin, end))
    ]


@pytest.mark.parametrize("frames", ["3", "8"])
def test_avi_with_reordered_frames_gives_them_in_order(tmp_path, frames, monkeypatch):
    monkeypatch.setitem(FAITHFUL, "bf", frames)
    path = steady(tmp_path / "a.avi")
    with av.open(str(path)) as container:
        own = [frame.pts for frame in container.decode(video=0)]
    assert own != sorted(own)  # what a reader that trusts the file's times would go by
    assert read(path) == [list(range(60))]
    part, _ = read_video(path, fps=16, start=1.5, frames=9)
    assert numbers(part) == [36 + int(1.5 * k) for k in range(9)]


def test_frames_are_never_given_out_of_order(tmp_path):
    """Even of a film whose times were taken for good."""
    path = steady(tmp_path / "a.avi")
    info = dataclasses.replace(probe(path), times=None)
    (taken,) = read_stretches(path, info, [0], 60, 24)
    assert len(taken) < 12 and numbers(np.stack(taken)) == sorted(numbers(np.stack(taken)))


@pytest.mark.parametrize(
    ("raw", "times"),
    [
        ([5, 6, 7, 8], [0, 1, 2, 3]),
        ([None, 1, None, 3, None], [0, 1, 2, 3, 4]),
        ([1, 4, 5, 6, 3, 7, 2, 8], [0, 1, 2, 3, 4, 5, 6, 7]),  # AVI's guesses
        ([0, 1, 2, 3, 4, 60, 61], [0, 1, 2, 3, 4, 5, 6]),  # ahead by more than 50
        ([0, 1, 2, 3, 40, 41], [0, 1, 2, 3, 40, 41]),  # a picture that is held
        ([*range(100, 130), *range(20)], list(range(50))),  # back, as in two files end to end
    ],
)
def test_one_timeline(raw, times):
    assert _continuous(raw, jump=50) == times


@pytest.mark.parametrize("suffix", ["mkv", "mp4", "ts", "avi"])
@pytest.mark.parametrize("cut", [1, 7, 25])
@pytest.mark.parametrize("open_gop", [0, 1])
def test_a_film_that_begins_between_key_frames(tmp_path, monkeypatch, suffix, cut, open_gop):
    monkeypatch.setitem(FAITHFUL, "x264-params", f"open-gop={open_gop}")
    whole = steady(tmp_path / f"a.{suffix}")
    path = remuxed(whole, tmp_path / f"b.{suffix}", cut)
    key = -(-cut // 20) * 20
    assert read(path) == [list(range(key, 60))]
    info = probe(path)
    assert info.frames == 60 - key and info.duration == pytest.approx((60 - key) / 24, abs=2e-3)
    cut_up = windows([Shot(path, "b", "c")], frames=9, fps=24, stride=4)
    for window, frames in read_windows(cut_up):
        first = key + int(window.name.removeprefix("b@"))
        assert numbers(frames) == list(range(first, first + 9))


def test_pieces_laid_end_to_end_play_on(tmp_path):
    whole = remuxed(steady(tmp_path / "a.mp4"), tmp_path / "a.ts").read_bytes()
    (tmp_path / "b.ts").write_bytes(whole + whole)
    (stretch, *more) = read(tmp_path / "b.ts")
    assert stretch + [n for other in more for n in other] == [*range(60), *range(60)]
    late = remuxed(tmp_path / "a.mp4", tmp_path / "late.ts", options={"output_ts_offset": "500"})
    (tmp_path / "c.ts").write_bytes(whole + late.read_bytes())
    assert sum(read(tmp_path / "c.ts"), []) == [*range(60), *range(60)]
    assert probe(tmp_path / "c.ts").duration == pytest.approx(5, abs=0.05)


def write_noise(path):
    """60 frames that take some room each."""
    noise = np.random.default_rng(0).integers(0, 60, (60, 32, 48, 1))
    noise += np.arange(60)[:, None, None, None] * 3
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=24)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        stream.options = {"crf": "10", **FAITHFUL}
        for picture in noise:
            picture = np.repeat(picture, 3, -1).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        container.mux(stream.encode())


def spoil(path, at=0.45):
    """700 bytes become nothing."""
    data = bytearray(path.read_bytes())
    begin = int(len(data) * at)
    data[begin : begin + 700] = bytes(700)
    path.write_bytes(data)


@pytest.mark.parametrize("at", [0.45, 0.55, 0.75, 0.9])
def test_no_window_reaches_over_what_is_lost(tmp_path, at):
    path = tmp_path / "a.ts"
    write_noise(path)
    whole, _ = read_video(path, fps=24)
    spoil(path, at)
    info = probe(path)
    assert info.times is not None
    cut = windows([Shot(path, "a", "c")], frames=9, fps=24, stride=1)
    assert 9 < len(cut) < 52
    for window, frames in read_windows(cut):
        assert any(
            b - 1e-3 <= window.start and window.start + 9 / 24 < e + 1e-2 for b, e in info.stretches
        )
        first = int(window.name.removeprefix("a@"))
        np.testing.assert_array_equal(frames, whole[first : first + 9])


def test_damage_that_only_decoding_shows(tmp_path):
    """The packets tell nothing of it: the windows are planned, and those it touches are missing.
    (What of a frame FFmpeg conceals, it tells nobody.)"""
    path = tmp_path / "a.mp4"
    write_noise(path)
    whole, _ = read_video(path, fps=24)
    spoil(path)
    cut = windows([Shot(path, "a", "c")], frames=9, fps=24, stride=1)
    assert len(cut) == 52
    read = list(read_windows(cut))
    lost = [window.name for window, frames in read if frames is None]
    assert 5 < len(lost) < 40 and read[0][1] is not None and read[-1][1] is not None
    for window, frames in (*read[:10], *read[-10:]):
        first = int(window.name.removeprefix("a@"))
        np.testing.assert_array_equal(frames, whole[first : first + 9])


def test_the_film_is_taken_and_not_its_cover(tmp_path):
    for name, flagged in (("a.mp4", False), ("a.mkv", False), ("b.mp4", True)):
        with av.open(str(tmp_path / name), "w") as container:
            cover, film = (
                container.add_stream("mjpeg", rate=24),
                container.add_stream("libx264", rate=24),
            )
            cover.width, cover.height, cover.pix_fmt = 96, 64, "yuvj420p"
            film.width, film.height, film.pix_fmt = 48, 32, "yuv420p"
            if flagged:
                cover.disposition = av.stream.Disposition.attached_pic
            picture = av.VideoFrame.from_ndarray(np.zeros((64, 96, 3), np.uint8), "rgb24")
            container.mux(cover.encode(picture.reformat(format="yuvj420p")))
            for i in range(12):
                grey = np.full((32, 48, 3), STEP * i, np.uint8)
                container.mux(film.encode(av.VideoFrame.from_ndarray(grey, "rgb24")))
            container.mux(cover.encode())
            container.mux(film.encode())
        info = probe(tmp_path / name)
        assert (info.width, info.height, info.frames) == (48, 32, 12), name


@pytest.mark.parametrize("suffix", ["mp4", "avi"])
def test_interlaced_film_is_deinterlaced(tmp_path, suffix):
    """A bar that moves by 8 from field to field: woven fields would be torn."""
    with av.open(str(tmp_path / f"a.{suffix}"), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        stream.options = {"crf": "4", "x264-params": "tff=1"}
        for i in range(10):
            woven = np.zeros((64, 96, 3), np.uint8)
            woven[0::2, 8 * i : 8 * i + 8] = 255
            woven[1::2, 8 * i + 4 : 8 * i + 12] = 255
            container.mux(stream.encode(av.VideoFrame.from_ndarray(woven, "rgb24")))
        container.mux(stream.encode())
    path = tmp_path / f"a.{suffix}"
    assert probe(path).interlaced
    frames, _ = read_video(path, fps=25)
    assert len(frames) == 10
    for i in range(2, 8):
        rows = frames[i, 8:-8].mean(-1) > 128
        assert (rows == rows[0]).mean() > 0.97  # torn: 0.92
        assert np.flatnonzero(rows[20]).mean() - 8 * i in (3.5, 7.5)  # one field or the other


def test_transparent_film_lies_over_black(tmp_path):
    with av.open(str(tmp_path / "a.mov"), "w") as container:
        stream = container.add_stream("qtrle", rate=16)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "argb"
        rgba = np.full((32, 48, 4), 200, np.uint8)
        rgba[..., 3] = np.repeat([0, 102, 255], 16)
        for _ in range(3):
            frame = av.VideoFrame.from_ndarray(rgba, "rgba").reformat(format="argb")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    frames, _ = read_video(tmp_path / "a.mov")
    np.testing.assert_array_equal(
        frames[1, ..., 0], np.repeat([0, 80, 200], 16)[None].repeat(32, 0)
    )


def test_stretches_are_read_in_one_pass(tmp_path):
    path = steady(tmp_path / "a.mp4", 64)
    made = []
    shrink = lambda picture: made.append(1) or picture[::2]  # noqa: E731
    starts = [0, 0.25, 0.5, 1 / 3, 2]
    starts.sort()
    taken = list(read_stretches(path, probe(path), starts, 9, 24, shrink))
    for start, pictures in zip(starts, taken, strict=True):
        assert numbers(np.stack(pictures)) == list(range(round(start * 24), round(start * 24) + 9))
    assert pictures[0].shape == (16, 48, 3)
    assert len(made) == 21 + 9  # frames 0 to 20 and 48 to 56, each once
    (whole, cut) = read_stretches(path, probe(path), [1, 2.5], 9, 24)
    assert len(whole) == 9 and numbers(np.stack(cut)) == [60, 61, 62, 63]


@pytest.mark.parametrize(
    ("second", "trusted", "times"), [(13, True, 2), (10, True, 1), (13, False, 1)]
)
def test_a_far_stretch_is_sought(tmp_path, monkeypatch, second, trusted, times):
    """What lies between is decoded only where it is little, or where seeking cannot be trusted."""
    path = steady(tmp_path / "a.mkv", 64, 4)
    info, begun = probe(path), []
    if not trusted:
        info = dataclasses.replace(info, times=tuple(k / 4 for k in range(64)))
    given = video.opened
    monkeypatch.setattr(video, "opened", lambda path: begun.append(path) or given(path))
    taken = list(read_stretches(path, info, [0.5, second], 5, 4))
    later = list(range(4 * second, 4 * second + 5))
    assert [numbers(np.stack(t)) for t in taken] == [list(range(2, 7)), later]
    assert len(begun) == times


LEFT_EARLY = """
import logging, sys, av
from pathlib import Path
from wanjax.data.decoding import decoded, opened
av.logging.set_level(av.logging.DEBUG)
logging.basicConfig(level=logging.DEBUG, filename="/dev/null")
for _ in range(30):
    with opened(Path(sys.argv[1])) as (container, stream):
        frames = decoded(container, stream)
        assert all(next(frames) is not None for _ in range(3))
"""


def test_a_decoder_that_is_left_early_does_not_hang(tmp_path):
    """Once a package has switched PyAV's log on, the decoder's threads want the interpreter."""
    slope = np.add.outer(np.arange(360), np.arange(640))
    frames = [np.stack([(slope + 3 * i) % 256] * 3, -1).astype(np.uint8) for i in range(48)]
    write_video(tmp_path / "a.mp4", np.stack(frames))
    words = [sys.executable, "-c", LEFT_EARLY, str(tmp_path / "a.mp4")]
    subprocess.run(words, cwd=Path(__file__).parents[1], timeout=60, check=True)


def test_what_may_not_be_read_is_not_to_be_exported_again(tmp_path, monkeypatch):
    path = steady(tmp_path / "a.mp4", 5)

    def refuse(*_, **__):
        raise av.error.PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(av, "open", refuse)
    with pytest.raises(UserError, match=r"a\.mp4 may not be read; change its permissions"):
        probe(path)

    def fail(*_, **__):
        raise av.error.OSError(5, "Input/output error", str(path))

    monkeypatch.setattr(av, "open", fail)
    with pytest.raises(UserError, match=r"a\.mp4 cannot be read \(Input/output error\); check"):
        probe(path)
