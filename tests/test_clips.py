"""Data sets on disk: captions, shots, windows that stay inside them, and errors that name files."""

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.test_video import counter, numbers
from wanjax.data.clips import read_dataset, read_windows, windows
from wanjax.data.framing import fit
from wanjax.data.report import summary
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
    assert summary(shots, cut).startswith("3 films, 3 shots, 6 windows (train 6); behind")


def test_windows_hold_the_frames_of_their_times(tmp_path):
    film(tmp_path / "a.mp4")
    shots = read_dataset(tmp_path, default_caption="a film")
    assert len(windows(shots, frames=1)) == 40
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
    assert summary(shots, cut) == (
        "1 film, 3 shots, 7 windows (train 4, validation 3); behind last windows: 0.4 s"
    )


def test_a_shot_shorter_than_a_window(tmp_path):
    film(tmp_path / "long.mp4", 60)
    film(tmp_path / "short.mp4", 30)
    shots = read_dataset(tmp_path, default_caption="c")
    with pytest.raises(UserError, match=r"short\.mp4 has 20 frames at 16 fps .* needs 33; .* 17 "):
        windows(shots)
    cut = windows(shots, skip_short=True)
    assert [w.name for w in cut] == ["long@0"]
    assert summary(shots, cut).endswith(
        "1 window (train 1); shorter than a window: 1; behind last windows: 0.4 s"
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"metadata\.jsonl:1 is not JSON"),
        ('{"caption": "c"}', r":1 names no film"),
        ('{"file": "a.mp4", "captoin": "c"}', r"unknown key 'captoin'; did you mean 'caption'"),
        ('{"file": "a.mp4", "start": "2"}', r'start="2", of the wrong type'),
        ('{"file": "a.mp4", "split": "val"}', r"unknown split 'val'; choose from"),
        ('{"file": "a.mp4", "start": 2, "end": 1}', r"start=2 and end=1"),
        ('{"file": "a.mp4", "start": 2, "end": 2}', r"start=2 and end=2"),
        ('{"file": "b.mp4", "caption": "c"}', r"names .*b\.mp4, which is not there"),
        ('{"file": "a.mp4"}', r"a\.mp4 has no caption; write one into .*a\.txt or .*metadata"),
        ('{"file": "a.png", "caption": "c"}', r"a\.png is a picture"),
        ('{"file": null, "caption": "c"}', r":1 names no film"),
        ('{"file": "\\u0000.mp4", "caption": "c"}', r"which is not there"),
        ('{"file": "' + "a" * 300 + '.mp4", "caption": "c"}', r"which is not there"),
        ('{"file": "a.mp4", "caption": "c", "start": NaN}', r":1 holds NaN"),
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
    with pytest.raises(UserError, match=r"a\.txt:1 is not UTF-8"):
        read_dataset(tmp_path)
    Image.new("RGB", (32, 32)).save(tmp_path / "b.png")
    with pytest.raises(UserError, match=r"b\.png is a picture, .*needs films"):
        read_dataset(tmp_path)
    with pytest.raises(UserError, match=r"frames=32 is not 4n\+1; use 29"):
        windows([], frames=32)


def test_films_of_every_suffix_and_in_linked_folders(tmp_path):
    data, other = tmp_path / "data", tmp_path / "other"
    for name in ("a.MTS", "b.m2ts", "c.3gp", "d.MP4"):
        film(tmp_path / "film.ts" if "ts" in name.lower() else tmp_path / "film.mp4", 12)
        data.mkdir(exist_ok=True)
        (data / name).write_bytes(next(tmp_path.glob("film.*")).read_bytes())
        next(tmp_path.glob("film.*")).unlink()
    film(other / "sub/e.mp4", 12)
    (data / "linked").symlink_to(other)
    (other / "sub/round").symlink_to(data)  # and back: it ends there
    shots = read_dataset(data, default_caption="c")
    assert [shot.name for shot in shots] == ["a", "b", "c", "d", "linked/sub/e"]
    assert len(windows(shots, frames=5)) == 5


def test_what_is_left_out_is_named(tmp_path):
    for name in "abcdef":
        film(tmp_path / f"{name}.mp4", 12)
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "lost.txt").write_text("belongs to no film")
    (tmp_path / "notes.srt").write_text("no film")
    (tmp_path / "gone.mp4").symlink_to(tmp_path / "nowhere.mp4")
    with pytest.warns(
        UserWarning, match=r"gone\.mp4, .*lost\.txt, .*notes\.srt in .* are left out"
    ):
        read_dataset(tmp_path, default_caption="c")
    for name in ("lost.txt", "notes.srt", "gone.mp4"):
        (tmp_path / name).unlink()
    listing(tmp_path, {"file": "b.mp4", "caption": "b", "start": None, "end": None, "split": None})
    said = r"a\.mp4, .*c\.mp4, .*d\.mp4 and 2 others are left out, as no line of .*metadata\.jsonl"
    with pytest.warns(UserWarning, match=said):
        (shot,) = read_dataset(tmp_path)
    assert (shot.start, shot.end, shot.split) == (0, None, "train")


def test_names_that_are_no_utf8_are_read(tmp_path):
    place = os.fsencode(tmp_path) + "/café.mp4".encode("latin1")
    os.rename(film(tmp_path / "a.mp4", 12), place)
    (shot,) = read_dataset(tmp_path, default_caption="a \udcff c")
    assert (shot.name, shot.caption) == ("caf\\xe9", "a \ufffd c")
    (window,) = windows([shot], frames=5, cover_end=False, stride=99)
    assert window.name == "caf\\xe9@0" and window.read().frames.shape == (5, 32, 48, 3)


def test_all_films_without_a_caption_are_named_at_once(tmp_path):
    for name in "abcde":
        film(tmp_path / f"{name}.mp4", 12)
    (tmp_path / "b.txt").write_text("b")
    (tmp_path / "c.txt").write_text(" \n")
    with pytest.raises(
        UserError,
        match=r"a\.mp4, .*c\.mp4, .*d\.mp4 and 1 other have no .*a\.txt.* --default-caption",
    ):
        read_dataset(tmp_path)


@pytest.mark.parametrize(
    ("spans", "shared"),
    [
        ([(0, 1, "train"), (0.9, 2, "validation")], True),
        ([(0, None, "test"), (1, 2, "train")], True),
        ([(0, 2, "train"), (0.1, 0.2, "train"), (1, 1.5, "validation")], True),
        ([(0, 1, "train"), (1, 2, "validation")], False),
        ([(0, 1.005, "train"), (1, 2, "validation")], False),  # rounded seconds
        ([(0, 1.5, "train"), (1, 2, "train")], False),
    ],
)
def test_shots_of_different_splits_share_no_frames(tmp_path, spans, shared):
    film(tmp_path / "a.mp4")
    (tmp_path / "b.mp4").symlink_to(tmp_path / "a.mp4")
    entries = [
        {"file": name, "caption": "c", "start": start, "end": end, "split": split}
        for name, (start, end, split) in zip(("a.mp4", "b.mp4", "b.mp4"), spans)
    ]
    if not shared:
        assert len(read_dataset(listing(tmp_path, *entries))) == len(spans)
        return
    with pytest.raises(
        UserError, match=r"\((train|test)\) and .*\((train|validation)\) share frames"
    ):
        read_dataset(listing(tmp_path, *entries))


def test_all_films_that_cannot_be_read_are_named_at_once(tmp_path):
    for name in "abcd":
        film(tmp_path / f"{name}.mp4", 12)
    for name in "bd":
        (tmp_path / f"{name}.mp4").write_text("no film")
    with pytest.raises(
        UserError, match=r"b\.mp4 cannot be read .*\. Neither can be used: .*d\.mp4\."
    ):
        windows(read_dataset(tmp_path, default_caption="c"), frames=5)


def test_one_more_window_may_end_with_the_shot(tmp_path):
    film(tmp_path / "a.mp4", 60)  # 40 frames at 16 fps
    shots = read_dataset(tmp_path, default_caption="c")
    cut = windows(shots, frames=17)
    assert [w.name for w in cut] == ["a@0", "a@17"]
    assert summary(shots, cut).endswith("; behind last windows: 0.4 s")
    cut = windows(shots, frames=17, cover_end=True)
    assert [w.name for w in cut] == ["a@0", "a@17", "a@23"]
    assert numbers(cut[-1].read().frames) == [int(k * 1.5) for k in range(23, 40)]
    assert "behind" not in summary(shots, cut)
    assert len(windows(shots, frames=5, stride=5, cover_end=True)) == 8  # none is left over


def test_windows_are_read_film_by_film(tmp_path):
    film(tmp_path / "a.mp4", 60)
    film(tmp_path / "b.mp4", 60)
    shots = read_dataset(tmp_path, default_caption="c")
    cut = windows(shots, frames=9, stride=4)
    mixed = [cut[i] for i in np.random.default_rng(0).permutation(len(cut))]
    read = list(read_windows(mixed, lambda picture: picture[:16]))
    assert len(read) == len(cut)
    assert [w.shot.name for w, _ in read] in (["a"] * 8 + ["b"] * 8, ["b"] * 8 + ["a"] * 8)
    for window, frames in read:
        np.testing.assert_array_equal(frames, window.read().frames[:, :16])


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
