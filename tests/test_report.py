"""What is said of films before they are encoded: losses, enlargement, repeated frames, cuts."""

from pathlib import Path

import numpy as np
import pytest

from tests.test_clips import listing
from wanjax.data import report
from wanjax.data.clips import Shot, Window, read_dataset, windows
from wanjax.data.cuts import find_cuts
from wanjax.data.framing import cut_away, enlargement, fit_picture
from wanjax.data.probing import VideoInfo, probe
from wanjax.data.report import describe_films, refuse_cropped, warn_of_cuts
from wanjax.data.video import write_video
from wanjax.errors import UserError


def window(name, width=832, height=480, fps=24.0, **facts):
    given = {"duration": 9.0, "frames": 9, "interlaced": False, "origin": 0.0}
    given |= {"stretches": ((0.0, 9.0),)} | facts
    return Window(
        f"{name}@0",
        Shot(Path(name), name, "c"),
        0.0,
        33,
        16.0,
        VideoInfo(width, height, fps, **given),
    )


def test_what_a_film_loses_is_told():
    cut = [
        window("plain.mp4"),
        window("tall.mp4", 720, 1280),
        window("tall2.mp4", 720, 1280),
        window("small.mp4", 416, 240, fps=12.0),
        window("tape.mts", 832, 480, interlaced=True, stretches=((0.0, 2.0), (3.0, 9.0))),
    ]
    assert describe_films(cut, 480, 832) == [
        "tall.mp4, tall2.mp4: 720x1280 at 24 fps, 68% of the picture is cut away, "
        "it is enlarged 1.2 times",
        "small.mp4: 416x240 at 12 fps, it is enlarged 2.0 times, 25% of the frames are repeated",
        "tape.mts: 832x480 at 24 fps, it is deinterlaced, 1.0 s cannot be decoded",
    ]


def test_what_loses_too_much_is_refused():
    cut = [window("wide.mp4"), window("tall.mp4", 480, 832)]
    with pytest.raises(
        UserError, match=r"^tall\.mp4 would lose 67% .*832x480, more than --max-crop"
    ):
        refuse_cropped(cut, 480, 832, 0.5)
    refuse_cropped(cut, 480, 832, 0.7)
    refuse_cropped(cut[:1], 480, 832, 0.0)
    with pytest.raises(UserError, match="--max-crop 50 is no share of a picture; use 0 to 1"):
        refuse_cropped(cut, 480, 832, 50)


def test_shares_are_those_of_the_picture_made():
    """Of a picture whose pixels tell their place, the part that is left."""
    place = np.stack(np.broadcast_arrays(*np.ogrid[0:120, 0:200], 0), -1).astype(np.uint8)
    left = fit_picture(place, 60, 20)
    rows, columns = (np.ptp(left[..., axis].astype(int)) + 2 for axis in (0, 1))
    assert 1 - rows * columns / (120 * 200) == pytest.approx(cut_away(120, 200, 60, 20), abs=0.01)
    assert enlargement(120, 200, 60, 20) == 0.5 and enlargement(30, 20, 60, 20) == 2


def shots_film(path, lengths, size=(64, 96)):
    """Shots of moving noise at different levels, at 16 fps."""
    random, frames = np.random.default_rng(0), []
    for number, length in enumerate(lengths):
        scene = random.integers(0, 120, (size[0] // 8, size[1] // 8, 3)) + 120 * (number % 2)
        scene = np.kron(scene, np.ones((8, 8, 1))).astype(np.uint8)
        frames += [np.roll(scene, k // 2, 1) for k in range(length)]
    write_video(path, np.stack(frames))


def test_cuts_are_found_and_windows_that_hold_one_counted(tmp_path, monkeypatch):
    shots_film(tmp_path / "a.mp4", [20, 30, 22])
    shots_film(tmp_path / "b.mp4", [60])
    path = tmp_path / "a.mp4"
    np.testing.assert_allclose(find_cuts(path, probe(path)), [20 / 16, 50 / 16], atol=1e-6)
    assert find_cuts(tmp_path / "b.mp4", probe(tmp_path / "b.mp4")) == []
    cut = windows(read_dataset(tmp_path, default_caption="c"), frames=5)
    assert warn_of_cuts(cut) is None  # too short to be looked through
    monkeypatch.setattr(report, "LONG", 2.0)
    # Frames 20 to 24 and 50 to 54 begin at cuts, and hold none.
    assert warn_of_cuts(cut) is None
    cut = windows(read_dataset(tmp_path, default_caption="c"), frames=9)
    assert warn_of_cuts(cut).startswith(f"2 of the 8 windows of {path} seem to contain a cut")
    whole = {"file": "a.mp4", "caption": "c"}
    listing(tmp_path, whole | {"end": 1.25}, whole | {"start": 1.25, "end": 3.125})
    with pytest.warns(UserWarning, match="left out"):
        shots = read_dataset(tmp_path)
    assert warn_of_cuts(windows(shots, frames=9)) is None
