"""Data sets on disk: captions, shots, windows that stay inside them, and errors that name files."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.test_video import counter, numbers
from wanjax.data.clips import read_dataset, summary, windows
from wanjax.data.framing import fit
from wanjax.data.video import read_video
from wanjax.errors import UserError

ASSETS = Path(__file__).resolve().parents[1] / "../shared/assets"


def film(path, frames=60, rate=24):
    path.parent.mkdir(parents=True, exist_ok=True)
    return counter(path, [1000 * i / rate for i in range(frames)], rate)


def listing(folder, *entries):
    lines = "\n".join(json.dumps(entry) for entry in entries)
    (folder / "metadata.jsonl").write_text(lines + "\n")
    return folder


def test_captions_beside_films(tmp_path):
    for name in ("b", "a", "more/a"):
        film(tmp_path / f"{name}.mp4").with_suffix(".txt").write_text(f" about {name}\n")
    film(tmp_path / ".hidden.mp4")
    shots = read_dataset(tmp_path)
    assert [(s.name, s.caption) for s in shots] == [
        ("a", "about a"),
        ("b", "about b"),
        ("more/a", "about more/a"),
    ]
    cut = windows(shots, frames=17, fps=16)
    assert [w.name for w in cut] == [f"{n}@{k}" for n in ("a", "b", "more/a") for k in (0, 17)]
    assert summary(shots, cut) == "3 films, 3 shots, 6 windows (train 6)"


def test_windows_hold_the_frames_of_their_times(tmp_path):
    film(tmp_path / "a.mp4")
    shots = read_dataset(tmp_path, default_caption="a film")
    cut = windows(shots, frames=9, fps=16, stride=4)
    assert [w.name for w in cut] == [f"a@{4 * k}" for k in range(8)]  # 40 frames at 16 fps
    clip = cut[3].read()
    assert numbers(clip.frames) == [int((12 + k) * 1.5) for k in range(9)]
    assert (clip.name, clip.fps, clip.source_fps, clip.caption) == ("a@12", 16, 24, "a film")


def test_windows_stay_inside_their_shots(tmp_path):
    film(tmp_path / "a.mp4")
    borders = [0, 17, 37, 60]  # in source frames; given in rounded seconds, as people do
    entries = [
        {"file": "a.mp4", "caption": "c", "start": round(s / 24, 3), "end": round(e / 24, 3)}
        for s, e in zip(borders, borders[1:])
    ]
    entries[2]["split"] = "validation"
    shots = read_dataset(listing(tmp_path, *entries))
    cut = windows(shots, frames=5, fps=16)
    assert [w.shot.split for w in cut] == ["train"] * 4 + ["validation"] * 3
    for window in cut:
        first, last = (round(t * 24) for t in (window.shot.start, window.shot.end))
        shown = numbers(window.read().frames)
        assert first <= shown[0] and shown[-1] < last
    assert summary(shots, cut) == "1 film, 3 shots, 7 windows (train 4, validation 3)"


def test_a_shot_shorter_than_a_window(tmp_path):
    film(tmp_path / "long.mp4", 60)
    film(tmp_path / "short.mp4", 30)
    shots = read_dataset(tmp_path, default_caption="c")
    with pytest.raises(UserError, match=r"short\.mp4 has 20 frames at 16 fps .* needs 33; .* 17 "):
        windows(shots)
    cut = windows(shots, skip_short=True)
    assert [w.name for w in cut] == ["long@0"]
    assert summary(shots, cut).endswith("1 window (train 1); shorter than a window: 1")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"metadata\.jsonl:1 is not JSON"),
        ('{"caption": "c"}', r":1 names no film"),
        ('{"file": "a.mp4", "captoin": "c"}', r"unknown key 'captoin'; did you mean 'caption'"),
        ('{"file": "a.mp4", "start": "2"}', r'start="2", of the wrong type'),
        ('{"file": "a.mp4", "split": "val"}', r"unknown split 'val'; choose from"),
        ('{"file": "a.mp4", "start": 2, "end": 1}', r"start=2 and end=1"),
        ('{"file": "b.mp4", "caption": "c"}', r"names .*b\.mp4, which is not there"),
        ('{"file": "a.mp4"}', r"a\.mp4 has no caption; write one into .*a\.txt or .*metadata"),
        ('{"file": "a.png", "caption": "c"}', r"a\.png is a picture"),
        ('{"file": "a.mp4", "caption": "c", "end": 9}', r"a\.mp4 from 0 s to 9 s reaches beyond"),
        (
            '{"file": "a.mp4", "caption": "c"}\n{"file": "a.mp4", "caption": "d"}',
            r"give two windows one name, a@0",
        ),
    ],
)
def test_faulty_listings_are_named(tmp_path, line, message):
    film(tmp_path / "a.mp4")
    (tmp_path / "metadata.jsonl").write_text(line)
    with pytest.raises(UserError, match=message):
        windows(read_dataset(tmp_path), frames=5)


def test_faulty_folders_are_named(tmp_path):
    with pytest.raises(UserError, match="There is no folder"):
        read_dataset(tmp_path / "absent")
    with pytest.raises(UserError, match="holds no films"):
        read_dataset(tmp_path)
    film(tmp_path / "a.mp4")
    with pytest.raises(UserError, match=r"a\.mp4 has no caption; write one into .*a\.txt, or"):
        read_dataset(tmp_path)
    (tmp_path / "a.txt").write_bytes("Ä".encode("latin1"))
    with pytest.raises(UserError, match=r"a\.txt is not UTF-8"):
        read_dataset(tmp_path)
    Image.new("RGB", (32, 32)).save(tmp_path / "b.png")
    with pytest.raises(UserError, match=r"b\.png is a picture, .*needs films"):
        read_dataset(tmp_path)
    with pytest.raises(UserError, match=r"frames=32 is not 4n\+1; use 29"):
        windows([], frames=32)


def test_fit_covers_and_crops_at_the_centre():
    columns = np.arange(0, 240, 4, dtype=np.uint8)
    frames = np.broadcast_to(columns[None, None, :, None], (2, 30, 60, 3))
    fitted = fit(frames, 16, 16)  # the middle 30 of 60 columns, shrunk to 16
    assert fitted.shape == (2, 16, 16, 3)
    expected = 4 * (15 + (np.arange(16) + 0.5) * 30 / 16 - 0.5)
    assert np.abs(fitted[1, 8, 2:-2, 0] - expected[2:-2]).max() < 1.5
    assert fit(frames, 30, 60) is frames
    assert fit(frames, 64, 48).shape == (2, 64, 48, 3)


def test_fit_does_not_alias():
    stripes = np.zeros((1, 64, 64, 3), np.uint8)
    stripes[:, :, ::2] = 255  # far finer than the result can hold: it must come out grey
    assert np.abs(fit(stripes, 16, 16)[:, :, 2:-2].astype(int) - 128).max() < 4


@pytest.mark.skipif(not ASSETS.exists(), reason="the real clips are not here")
def test_the_shots_of_a_real_film(tmp_path):
    folder = (ASSETS / "tears_of_steel").resolve()
    with open(folder / "cutlist.csv") as file:
        rows = list(csv.DictReader(file))
    entries = [
        {
            "file": str(folder / row["file"]),
            "caption": "a scene",
            "start": int(row["start_frame"]) / 24,
            "end": int(row["end_frame_excl"]) / 24,
        }
        for row in rows
    ]
    shots = read_dataset(listing(tmp_path, *entries))
    assert len(windows(shots, frames=33, fps=16, skip_short=True)) == 22
    assert len(windows(shots, frames=33, fps=24, skip_short=True)) == 44
    window = windows(shots, skip_short=True)[1]
    first = round(window.start * 24)
    clip, (source, _) = window.read(), read_video(window.shot.file, frames=first + 50)
    for k in (0, 1, 2, 16, 32):
        np.testing.assert_array_equal(clip.frames[k], source[first + int(k * 1.5)])
