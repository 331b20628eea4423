"""Folders of unlike videos, the one form in which they are seen, pairs, prompts, and the cache."""

import json
from itertools import permutations

import numpy as np
import pytest

from tests.scripts import film
from wanjax.data.video import write_video
from wanjax.errors import UserError
from wanjax.eval.kept import Kept
from wanjax.eval.pairing import paired_by, prompts_of, read_prompts, unpaired
from wanjax.eval.videos import ClipFile, common_view, describe_set, draw, notes, read_set


def write_set(folder, names, *, frames=12, fps=16, size=(40, 64), seed=0):
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names):
        pictures = film(seed + i, frames)[:, : size[0], : size[1]]
        write_video(folder / f"{name}.mp4", pictures, fps)
    return folder


def test_all_are_seen_as_the_shortest_slowest_smallest(tmp_path):
    sets = {
        "real": read_set(write_set(tmp_path / "real", "ab", frames=25, fps=24)),
        "A": read_set(write_set(tmp_path / "A", "ab", frames=14, size=(32, 48))),
    }
    view = common_view(sets)
    assert (view.frames, view.height, view.width, view.fps) == (14, 32, 48, 16)
    assert all(view.read(clip).shape == (14, 32, 48, 3) for clip in sets["real"].values())
    about = describe_set(sets["real"], view)
    assert about["sizes"] == {"64x40": 2} and about["codecs"] == {"h264": 2}
    assert (about["resampled"], about["cut"], about["scaled"]) == (2, 2, 2)
    assert len(notes("real", about)) == 4 and not notes("A", describe_set(sets["A"], view))


def test_a_video_of_the_common_form_is_taken_as_it_is(tmp_path):
    clips = read_set(write_set(tmp_path, "a", frames=9))
    seen = common_view({"A": clips}).read(clips["a"])
    assert np.abs(seen.astype(int) - film(0, 9)).mean() < 3  # H.264's own loss


@pytest.mark.parametrize("frames", [1, 8])
def test_under_nine_frames_is_refused(tmp_path, frames):
    clips = read_set(write_set(tmp_path, "a", frames=frames))
    with pytest.raises(UserError, match=rf"a.mp4 has {frames} frame.*9 are needed"):
        common_view({"A": clips})


def test_more_frames_than_there_are_are_refused(tmp_path):
    clips = read_set(write_set(tmp_path, "a", frames=12))
    with pytest.raises(UserError, match="12 frames at 16 fps, fewer than --frames 20"):
        common_view({"A": clips}, frames=20)
    with pytest.raises(UserError, match="--frames 5 frame.* 9 are needed"):
        common_view({"A": clips}, frames=5)
    assert common_view({"A": clips}, frames=10).frames == 10


def test_folders_that_are_none(tmp_path):
    with pytest.raises(UserError, match="There is no folder"):
        read_set(tmp_path / "nowhere")
    (tmp_path / "note.txt").write_text("no video")
    with pytest.raises(UserError, match="holds no videos"):
        read_set(tmp_path)
    (tmp_path / "a.mp4").write_bytes(b"")
    with pytest.raises(UserError, match="a.mp4 cannot be read as a video"):
        read_set(tmp_path)


def test_two_of_one_name_are_refused(tmp_path):
    write_set(tmp_path, "a")
    (tmp_path / "a.mkv").write_bytes((tmp_path / "a.mp4").read_bytes())
    with pytest.raises(UserError, match="one name but for the suffix"):
        read_set(tmp_path)


def test_shots_by_name(tmp_path):
    clips = read_set(write_set(tmp_path, ["rider@0", "rider@33", "river"]))
    assert [clip.shot for clip in clips.values()] == ["rider", "rider", "river"]


def test_what_is_drawn_is_of_the_same_names(tmp_path):
    names = "abcdef"
    sets = {label: read_set(write_set(tmp_path / label, names)) for label in ("real", "A")}
    drawn = draw(sets, 3, seed=1)
    assert len(drawn["A"]) == 3 and drawn["A"].keys() == drawn["real"].keys()
    assert draw(sets, 3, seed=1) == drawn
    assert any(draw(sets, 3, seed=s)["A"].keys() != drawn["A"].keys() for s in range(5))


def test_prompts_of_three_kinds_of_files(tmp_path):
    clips = read_set(write_set(tmp_path / "A", "abc"))
    path = tmp_path / "prompts.jsonl"
    lines = [
        {"file": "a.mp4", "prompt": "a rider"},
        {"file": "b.mkv", "caption": "a river"},
        {"out": "videos/c.mp4", "prompt": "rain", "seed": 3},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = prompts_of(read_prompts(path), {"A": clips}, path)
    assert found == {"a": "a rider", "b": "a river", "c": "rain"}
    path.write_text(json.dumps(lines[0]))
    with pytest.raises(UserError, match="no prompt for b, c"):
        prompts_of(read_prompts(path), {"A": clips}, path)
    path.write_text('{"file": "a.mp4"}')
    with pytest.raises(UserError, match="prompts.jsonl:1 lacks a video or its prompt"):
        read_prompts(path)


@pytest.mark.parametrize(
    ("file", "name", "found"),
    [
        ("c0.mp4", "c0", True),
        ("x/c0.mp4", "x/c0", True),
        ("./x/c0.mp4", "x/c0", True),
        ("x/c0.mp4", "c0", True),
        ("x/c0.mp4", "y/c0", False),
        ("c0.mp4", "x/c0", False),
        ("x/c0.mp4", "z/x/c0", False),
    ],
)
def test_no_video_gets_the_prompt_of_another_folder(tmp_path, file, name, found):
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"file": file, "prompt": "a rider"}))
    sets = {"A": {name: ClipFile(name, tmp_path / f"{name}.mp4", None, name)}}
    if found:
        assert prompts_of(read_prompts(path), sets, path) == {name: "a rider"}
    else:
        with pytest.raises(UserError, match=f"no prompt for {name}; "):
            prompts_of(read_prompts(path), sets, path)


def test_prompts_that_could_be_either_are_refused(tmp_path):
    path = tmp_path / "prompts.jsonl"
    lines = [{"file": f"{of}.mp4", "prompt": f"prompt of {of}"} for of in ("x/c0", "y/c0", "c0")]
    sets = {"A": {"c0": ClipFile("c0", tmp_path / "c0.mp4", None, "c0")}}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines[:2]))
    with pytest.raises(UserError, match="several prompts.* for c0; "):
        prompts_of(read_prompts(path), sets, path)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert prompts_of(read_prompts(path), sets, path) == {"c0": "prompt of c0"}
    path.write_text("".join(json.dumps(lines[0] | {"prompt": p}) + "\n" for p in "aab"))
    with pytest.raises(UserError, match="prompts.jsonl:3 gives x/c0.mp4 a second prompt"):
        read_prompts(path)


def test_pairs_by_a_table(tmp_path):
    sets = {
        "real": read_set(write_set(tmp_path / "real", "ab")),
        "A": read_set(write_set(tmp_path / "A", "xyz")),
    }
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"real": "a.mp4", "A": "y.mp4"}\n{"real": "b.mp4", "A": "x.mp4"}\n')
    paired = paired_by(path, sets)
    assert paired["A"]["a"].file.name == "y.mp4" and paired["A"]["b"].name == "b"
    assert unpaired(paired) == ["A: no real video has the name of z."]
    assert unpaired(sets) == [
        "A: no real video has the name of x, y, z.",
        "A: no video has the name of the real a, b.",
    ]
    for line, said in [
        ('{"real": "a.mp4", "A": "n.mp4"}', "names n.mp4, which is not in A"),
        ('{"real": "a.mp4", "C": "x.mp4"}', "names the set 'C'"),
        ('{"A": "x.mp4"}', "is no pair"),
    ]:
        path.write_text(line)
        with pytest.raises(UserError, match=said):
            paired_by(path, sets)


@pytest.mark.parametrize("order", list(permutations(range(3))))
@pytest.mark.parametrize("line", [0, 1, 2])
def test_pairs_keep_every_video_whatever_is_renamed(tmp_path, order, line):
    """Swaps, rings and chains of names that real videos have, too, from any line on."""
    clips = {name: ClipFile(name, tmp_path / f"{name}.mp4", None, name) for name in "abc"}
    path, sets = tmp_path / "pairs.jsonl", {"real": clips, "A": clips}
    pairs = [("abc"[i], "abc"[of]) for i, of in enumerate(order)]
    lines = [json.dumps({"real": real, "A": name}) + "\n" for real, name in pairs]
    path.write_text("".join(lines[line:] + lines[:line]))
    found = paired_by(path, sets)["A"]
    assert {name: (clip.name, clip.content) for name, clip in found.items()} == {
        real: (real, name) for real, name in pairs
    }


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (("aa", "ab"), r"pairs.jsonl:2 pairs a with b of A, and a line before"),
        (("aa", "ba"), r"pairs.jsonl:2 pairs b with a of A, and a line before"),
        (("ab",), "gives other videos of A the names of a, which it does not pair"),
        (("ab", "bc"), "the names of a, which"),
    ],
)
def test_pairs_that_would_lose_a_video_are_refused(tmp_path, lines, said):
    clips = {name: ClipFile(name, tmp_path / f"{name}.mp4", None, name) for name in "abc"}
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps({"real": r, "A": a}) + "\n" for r, a in lines))
    with pytest.raises(UserError, match=said):
        paired_by(path, {"real": clips, "A": clips})


def test_what_is_kept_is_found_by_all_of_its_key(tmp_path):
    kept, key = Kept(tmp_path), {"video": "abc", "view": {"frames": 9}}
    assert kept.get(key) is None
    kept.put(key, np.arange(3.0))
    assert Kept(tmp_path).get(key).tolist() == [0, 1, 2]
    assert kept.get(key | {"video": "abd"}) is None
    assert kept.get(key | {"view": {"frames": 10}}) is None


def test_what_is_damaged_is_computed_again(tmp_path):
    kept = Kept(tmp_path)
    kept.put({"a": 1}, np.arange(3.0))
    (file,) = tmp_path.glob("*.npy")
    file.write_bytes(file.read_bytes()[:-4])
    assert kept.get({"a": 1}) is None
    kept.put({"a": 1}, np.asarray([np.nan]))
    assert kept.get({"a": 1}) is None
    Kept(tmp_path / "file.npy" / "below").put({"a": 1}, np.zeros(1))
