"""The answers to a blind study: read, and refused by name where they cannot be what a rater gave.

An answer file carries the digest of its study and one of itself, which shows damage and changes by
hand. It is no signature: who wants to forge one can compute it, too.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unicodedata import normalize

from wanjax.errors import UserError, some
from wanjax.eval.survey import FORMAT, VERSION, digest_of
from wanjax.text_files import read_object
from wanjax.types import PathLike

ANSWERS = "wanjax survey answers"
SIDES = ("x", "y")


@dataclass(frozen=True)
class Study:
    """What was asked, and the key: per trial its kind, name, shot, and files by label."""

    folder: Path
    digest: str
    sets: Mapping[str, str]
    questions: Mapping[str, str]
    key: Mapping[str, Mapping[str, Any]]

    def of_kind(self, kind: str) -> list[str]:
        """Trials of a kind, by their names."""
        found = [trial for trial, about in self.key.items() if about["kind"] == kind]
        return sorted(found, key=lambda trial: self.key[trial]["name"])


@dataclass(frozen=True)
class Answer:
    """To one trial: ratings from 1 to 5 by question and label (A and B, ...), and the label of the
    video that was chosen."""

    ratings: Mapping[str, Mapping[str, int]]
    choice: str


@dataclass(frozen=True)
class Visit:
    """All that one rater answered, by trial."""

    rater: str
    file: Path
    answers: Mapping[str, Answer]


def read_study(folder: PathLike) -> Study:
    """A folder that `wanjax.eval.survey` made. Raises `UserError` for what is none."""
    path = Path(folder) / "study.json"
    if not path.is_file():
        raise UserError(f"{folder} is no study, as it lacks study.json; name the folder built.")
    found = read_object(path)
    if found.get("format") != FORMAT or found.get("version") != VERSION:
        raise UserError(f"{path} is of no study that this version knows; build it anew.")
    page = found.get("page")
    if digest_of(page) != found.get("digest"):
        raise UserError(f"{path} was changed after the study was built; take the first one again.")
    questions = {one["id"]: one["title"] for one in [*page["questions"], page["choice"]]}
    return Study(Path(folder), found["digest"], found["sets"], questions, found["key"])


def read_visits(files: Sequence[PathLike], study: Study) -> list[Visit]:
    """The raters' visits. Raises `UserError`, which names the file, for one that is no answer file,
    is of another study, was changed, is incomplete, or is of a rater of another file."""
    if not files:
        raise UserError("There are no answers; name the files that raters handed in.")
    visits: dict[str, Visit] = {}
    for file in map(Path, files):
        visit = _read_visit(file, study)
        name = normalize("NFC", visit.rater).casefold()
        if name in visits:
            raise UserError(
                f"{visits[name].file} and {file} are both of the rater '{visit.rater}'; keep one."
            )
        visits[name] = visit
    return list(visits.values())


def answers_digest(found: Mapping[str, Any]) -> str:
    """SHA-256 of an answer file's content as the page computes it, its own digest left out."""
    rest = {key: value for key, value in found.items() if key != "digest"}
    text = json.dumps(rest, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _read_visit(file: Path, study: Study) -> Visit:
    found = read_object(file)
    if found.get("format") != ANSWERS or found.get("version") != VERSION:
        raise UserError(f"{file} holds no answers to a study of this version; leave it out.")
    if found.get("study") != study.digest:
        raise UserError(f"{file} is from another study than {study.folder}; leave it out.")
    if found.get("digest") != answers_digest(found):
        raise UserError(
            f"{file} was changed after it was saved; ask for the file as the page gave it."
        )
    try:
        given = [(entry["trial"], _answer(entry, study)) for entry in found["answers"]]
        rater = " ".join(found["rater"].split())
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{file} holds an answer that the page cannot give; ask for the file again."
        ) from error
    if not rater:
        raise UserError(f"{file} does not name its rater; ask for the file as the page gave it.")
    answers = dict(given)
    if len(answers) < len(given):
        raise UserError(f"{file} answers a pair twice; ask for the file as the page gave it.")
    missing = [trial for trial in study.key if trial not in answers]
    if missing:
        raise UserError(
            f"{file} is incomplete: {len(missing)} of {len(study.key)} pairs are not answered "
            f"({some(missing)}); ask the rater to finish."
        )
    return Visit(rater, file, answers)


def _answer(entry: Mapping[str, Any], study: Study) -> Answer:
    """Raises `ValueError`, `KeyError` or `TypeError` for what the page cannot give."""
    files = study.key[entry["trial"]]["files"]
    labels = {file: label for label, file in files.items()}
    shown = {side: labels[entry[side]] for side in SIDES}
    ratings = {}
    for question in study.questions:
        if question == "choice":
            continue
        x, y = entry[question]
        if not {x, y} <= {1, 2, 3, 4, 5}:
            raise ValueError(f"{x}, {y} are no ratings")
        ratings[question] = {shown["x"]: int(x), shown["y"]: int(y)}
    if len(set(shown.values())) < 2:
        raise ValueError("one video on both sides")
    return Answer(ratings, shown[entry["choice"]])
