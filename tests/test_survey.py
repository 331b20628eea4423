"""Building a blind study. Its page is tested in a browser: tests/browser."""

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest

from configs.survey import survey
from tests.surveys import build, film, key_of, write_sets
from wanjax.data.decoding import opened
from wanjax.data.probing import probe
from wanjax.data.video import read_video, write_video
from wanjax.errors import UserError
from wanjax.eval.survey import broken, digest_of


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    write_sets(folder)
    return build(folder, "--checks", 3)


def test_all_videos_are_such_as_browsers_play(study):
    """H.264, yuv420p, no tags, and the index before the pictures."""
    files = sorted((study / "videos").iterdir())
    assert len(files) == 12
    for file in files:
        with opened(file) as (container, stream):
            assert stream.codec_context.name == "h264" and stream.pix_fmt == "yuv420p"
            assert not {"comment", "title"} & set(container.metadata)
        data = file.read_bytes()
        assert 0 < data.index(b"moov") < data.index(b"mdat")


def test_a_pair_keeps_its_pictures_and_rates_and_has_one_length(study):
    for about in key_of(study)["key"].values():
        infos = {name: probe(study / "videos" / file) for name, file in about["files"].items()}
        lengths = [info.duration for info in infos.values()]
        assert max(lengths) - min(lengths) < 1 / 16
        if about["kind"] == "pair":
            assert (round(infos["A"].fps), round(infos["B"].fps)) == (24, 16)
            shown, _ = read_video(study / "videos" / about["files"]["A"])
            meant = film(int(about["name"][-1]), len(shown))
            assert np.abs(shown.astype(float) - meant).mean() < 4


def test_what_raters_get_says_nothing_of_what_is_compared(study):
    """Neither the page nor a name nor the archive, in which all times are one."""
    with zipfile.ZipFile(study / "raters.zip") as archive:
        names = archive.namelist()
        page = archive.read("study/index.html").decode()
        assert len({entry.date_time for entry in archive.infolist()}) == 1
    assert page == (study / "index.html").read_text()
    assert len(names) == 13 and not any("study.json" in name for name in names)
    for secret in ("plain_set", "tuned_set", "shot0", "identical", '"A"', '"B"'):
        assert secret not in page + " ".join(names)
    for text in ("http:", "https:", "//cdn", "@import"):
        assert text not in page


def test_a_check_cannot_be_told_by_its_names(study):
    known = key_of(study)
    files = [file for about in known["key"].values() for file in about["files"].values()]
    assert len(set(files)) == len(files)
    for trial in known["page"]["trials"]:
        assert set(trial) == {"id", "videos", "fps", "aspect"}
        assert trial["videos"] == sorted(trial["videos"])


def test_the_checks_are_what_they_are_called(study):
    kinds = [about["kind"] for about in key_of(study)["key"].values()]
    assert sorted(kinds) == ["broken", "broken", "identical", "pair", "pair", "pair"]
    for about in key_of(study)["key"].values():
        first, second = (study / "videos" / file for file in about["files"].values())
        assert (first.read_bytes() == second.read_bytes()) == (about["kind"] == "identical")


@pytest.mark.parametrize("height, width", [(96, 160), (34, 50), (720, 406)])
def test_a_broken_video_is_coarse_and_does_not_flash(height, width):
    frames = np.random.default_rng(0).integers(0, 256, (24, height, width, 3), np.uint8)
    spoilt = broken(frames, 24)
    assert spoilt.shape == frames.shape
    changes = (np.abs(np.diff(spoilt.astype(int), axis=0)).max((1, 2, 3)) > 0).sum()
    assert changes == 2  # in a second
    assert len(np.unique(spoilt[0].reshape(-1, 3), axis=0)) < 15 * 40


def test_the_same_call_builds_the_same_study(tmp_path, study):
    write_sets(tmp_path)
    assert key_of(build(tmp_path, "--checks", 3))["page"] == key_of(study)["page"]


def test_another_seed_gives_another_study(tmp_path, study):
    write_sets(tmp_path)
    again = key_of(build(tmp_path, "--checks", 3, "--seed", 1))
    assert again["digest"] != key_of(study)["digest"] == digest_of(key_of(study)["page"])


def test_long_and_large_videos_are_made_smaller(tmp_path, capsys):
    for kind in ("plain_set", "tuned_set"):
        (tmp_path / kind).mkdir()
        write_video(tmp_path / kind / "a.mp4", np.zeros((40, 130, 70, 3), np.uint8), 16)
    study = build(tmp_path, "--checks", 0, "--lines", 64, "--seconds", 1)
    for file in (study / "videos").iterdir():
        info = probe(file)
        assert (info.height, info.width, info.frames) == (64, 34, 16)
    assert "1 of 1 pairs are cut" in capsys.readouterr().err


def test_what_is_left_out_and_what_may_give_the_side_away_is_said(tmp_path, capsys):
    write_sets(tmp_path)
    (tmp_path / "tuned_set/shot0.mp4").rename(tmp_path / "tuned_set/other.mp4")
    build(tmp_path, "--checks", 1)
    said = capsys.readouterr().err
    assert "only one set has them: other, shot0" in said
    assert "2 of 2 pairs differ in rate" in said


def refused(*words: object) -> str:
    with pytest.raises(UserError) as error:
        survey(["build", *map(str, words)])
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_cannot_be_built_is_refused(tmp_path):
    """In one sentence each, and nothing is written."""
    write_sets(tmp_path)
    a, b, out = (tmp_path / name for name in ("plain_set", "tuned_set", "study"))
    common = ("--a", a, "--out", out)
    assert "one folder" in refused(*common, "--b", a)
    assert "There is no folder" in refused(*common, "--b", tmp_path / "none")
    assert "between 0 and the 3 pairs" in refused(*common, "--b", b, "--checks", 4)
    assert "--seconds lies between" in refused(*common, "--b", b, "--seconds", 0)
    (tmp_path / "empty").mkdir()
    assert "holds no videos" in refused(*common, "--b", tmp_path / "empty")
    write_video(tmp_path / "empty/x.mp4", film(0, 17), 16)
    assert "No video of one set has the name" in refused(*common, "--b", tmp_path / "empty")
    write_video(tmp_path / "empty/shot0.mp4", film(0, 4), 16)
    assert "nobody can judge" in refused(*common, "--b", tmp_path / "empty")
    (tmp_path / "empty/shot0.mp4").write_bytes(b"no film")
    assert "shot0.mp4" in refused(*common, "--b", tmp_path / "empty")
    assert not out.exists()
    out.mkdir()
    assert "exists already" in refused(*common, "--b", b)
    assert "did you mean 'build'" in str(pytest.raises(UserError, survey, ["biuld"]).value)


def test_a_failure_leaves_nothing(tmp_path, monkeypatch):
    write_sets(tmp_path)
    monkeypatch.setattr("wanjax.eval.survey.page_of", lambda study: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        build(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["plain_set", "tuned_set"]


def test_the_study_in_the_page_is_the_one_on_disk(study):
    html = (study / "index.html").read_text()
    data = html.split('id="study">')[1].split("</script>")[0]
    known = key_of(study)
    assert json.loads(data) == known["page"] | {"digest": known["digest"]}
