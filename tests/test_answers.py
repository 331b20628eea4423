"""Answer files: what the page saves is read, anything else refused by name."""

import json
from pathlib import Path

import pytest

from tests.surveys import build, key_of, write_answers, write_sets, write_signed
from wanjax.errors import UserError
from wanjax.eval.answers import read_study, read_visits

SCORES = {"A": 4, "B": 2, "good": 5, "broken": 1, "same": 3, "again": 3}


def by_label(label: str, question: str) -> int:
    return SCORES[label]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    write_sets(folder)
    return build(folder, "--checks", 2)


def refusal(study: Path, *files: Path) -> str:
    with pytest.raises(UserError) as error:
        read_visits(files, read_study(study))
    assert files[-1].name in str(error.value) and "\n" not in str(error.value)
    return str(error.value)


def test_answers_come_back_by_what_was_rated_whatever_side_it_was_on(study, tmp_path):
    file = write_answers(study, "Anna", by_label, tmp_path / "a.json")
    (visit,) = read_visits([file], read_study(study))
    for trial, about in key_of(study)["key"].items():
        for given in visit.answers[trial].ratings.values():
            assert given == {label: SCORES[label] for label in about["files"]}
        best = max(about["files"], key=SCORES.get)
        assert SCORES[visit.answers[trial].choice] == SCORES[best]


def test_a_file_that_was_written_anew_is_still_whole(study, tmp_path):
    file = write_answers(study, "Zoë ✓", by_label, tmp_path / "a.json")
    file.write_text(json.dumps(json.loads(file.read_text()), indent=4))
    assert read_visits([file], read_study(study))[0].rater == "Zoë ✓"


def changed(content: dict, name: str) -> dict:
    """One change of each kind, made without care for the digest."""
    answers = content["answers"]
    if name == "rating":
        answers[0]["fidelity"][0] = 6 - answers[0]["fidelity"][0]
    elif name == "choice":
        answers[1]["choice"] = "y" if answers[1]["choice"] == "x" else "x"
    elif name == "sides":
        answers[2]["x"], answers[2]["y"] = answers[2]["y"], answers[2]["x"]
    elif name == "rater":
        content["rater"] = "Ben"
    elif name == "order":
        answers.reverse()
    else:
        del content["digest"]
    return content


@pytest.mark.parametrize("name", ["rating", "choice", "sides", "rater", "order", "digest"])
def test_any_change_by_hand_is_found(study, tmp_path, name):
    file = write_answers(study, "Anna", by_label, tmp_path / "a.json")
    before = json.loads(file.read_text())
    after = changed(json.loads(file.read_text()), name)
    assert after != before
    file.write_text(json.dumps(after))
    assert "was changed after it was saved" in refusal(study, file)


def signed(study: Path, path: Path, edit) -> Path:
    """Answers after an edit, with the digest that belongs to them."""
    content = json.loads(write_answers(study, "Anna", by_label, path).read_text())
    del content["digest"]
    edit(content)
    write_signed(path, content)
    return path


@pytest.mark.parametrize(
    "edit, said",
    [
        (lambda c: c["answers"].pop(), "incomplete: 1 of 5 pairs"),
        (lambda c: c["answers"].clear(), "incomplete: 5 of 5 pairs"),
        (lambda c: c["answers"].append(c["answers"][0]), "answers a pair twice"),
        (lambda c: c.update(study="0" * 64), "another study"),
        (lambda c: c.update(version=2), "no answers to a study of this version"),
        (lambda c: c.update(format="other"), "no answers to a study of this version"),
        (lambda c: c["answers"][0].update(fidelity=[6, 1]), "the page cannot give"),
        (lambda c: c["answers"][0].update(fidelity=[3]), "the page cannot give"),
        (lambda c: c["answers"][0].update(fidelity=["3", "4"]), "the page cannot give"),
        (lambda c: c["answers"][0].update(choice="z"), "the page cannot give"),
        (lambda c: c["answers"][0].pop("stability"), "the page cannot give"),
        (lambda c: c["answers"][0].update(x=c["answers"][0]["y"]), "the page cannot give"),
        (lambda c: c["answers"][0].update(x="other.mp4"), "the page cannot give"),
        (lambda c: c["answers"].__setitem__(0, None), "the page cannot give"),
        (lambda c: c.update(answers=7), "the page cannot give"),
        (lambda c: c.pop("rater"), "the page cannot give"),
        (lambda c: c.update(rater=7), "the page cannot give"),
        (lambda c: c.update(rater=""), "does not name its rater"),
        (lambda c: c.update(rater=" \u00a0\t"), "does not name its rater"),
    ],
)
def test_what_the_page_never_saves_is_refused(study, tmp_path, edit, said):
    assert said in refusal(study, signed(study, tmp_path / "bad.json", edit))


def test_doubled_answers_are_refused(study, tmp_path):
    first = write_answers(study, "Anna", by_label, tmp_path / "a.json")
    for other in ("anna", "Anna ", "\tANNA\u00a0"):
        second = write_answers(study, other, by_label, tmp_path / "b.json")
        assert "both of the rater" in refusal(study, first, second)
    assert "both of the rater" in refusal(study, first, first)


def test_a_rater_is_the_same_however_the_name_is_typed(study, tmp_path):
    first = write_answers(study, "Zo\u00eb  Lee", by_label, tmp_path / "a.json")
    second = write_answers(study, "zoe\u0308 lee", by_label, tmp_path / "b.json")
    assert read_visits([first], read_study(study))[0].rater == "Zo\u00eb Lee"
    assert "both of the rater" in refusal(study, first, second)


def test_answers_to_another_study_are_refused(study, tmp_path):
    write_sets(tmp_path)
    other = build(tmp_path, "--checks", 2, "--seed", 1)
    assert "another study" in refusal(study, write_answers(other, "Anna", by_label))


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff\xfe\x00", b'{"format": NaN}'])
def test_what_is_no_answer_file_is_refused(study, tmp_path, content):
    (tmp_path / "bad.json").write_bytes(content)
    refusal(study, tmp_path / "bad.json")
    refusal(study, tmp_path / "missing.json")


def test_a_study_that_is_none_or_was_changed_is_refused(study, tmp_path):
    with pytest.raises(UserError, match="is no study"):
        read_study(tmp_path)
    known = key_of(study)
    known["page"]["trials"].pop()
    (tmp_path / "study.json").write_text(json.dumps(known))
    with pytest.raises(UserError, match="was changed after the study was built"):
        read_study(tmp_path)
    (tmp_path / "study.json").write_text(json.dumps({"format": "other"}))
    with pytest.raises(UserError, match="no study that this version knows"):
        read_study(tmp_path)


def test_no_answers(study):
    with pytest.raises(UserError, match="There are no answers"):
        read_visits([], read_study(study))
