"""The command line of a blind study: `evaluate.py survey build|analyse`. The docstring of a field
is its text in `--help`."""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from configs.command_line import parse_job
from wanjax.errors import UserError, nearest
from wanjax.eval.answers import read_study, read_visits
from wanjax.eval.ratings import analyse_ratings
from wanjax.eval.ratings_report import as_json, describe
from wanjax.eval.survey import notes, pairs_of, with_checks, write_study
from wanjax.eval.videos import read_set
from wanjax.outputs import refuse_existing, require_writable, whole_file

ABOUT = """Which of two sets of videos do people like better? A blind study, without a server.

survey build --a DIR --b DIR --out STUDY makes a web page; send STUDY/raters.zip to raters.
survey analyse STUDY ANSWERS.json ... says what came of the files that they send back.
"""


@dataclass(frozen=True)
class BuildJob:
    """Make the page of a study. Videos of one name (without suffix) in both folders are pairs."""

    a: Path = tyro.MISSING
    """Folder of videos."""
    b: Path = tyro.MISSING
    """Folder of the videos to compare them with."""
    out: Path = tyro.MISSING
    """Folder to write: index.html and videos/, both in raters.zip, too; study.json, the key."""
    checks: int = 3
    """Pairs more that show whether a rater looks: a broken video beside a good one, or one video
    twice."""
    lines: int = 720
    """Videos of more lines are made smaller."""
    seconds: float = 10
    """Videos are cut to this length."""
    seed: int = 0
    """Of the choice of checks."""

    def unread(self) -> dict[str, str]:
        """No option is without effect."""
        return {}


@dataclass(frozen=True)
class AnalyseJob:
    """What raters found: survey analyse STUDY ANSWERS.json ..."""

    out: Path | None = None
    """JSON file to write all numbers to."""
    seed: int = 0
    """Of the bootstraps."""

    def unread(self) -> dict[str, str]:
        """No option is without effect."""
        return {}


def survey(words: Sequence[str]) -> None:
    """Do what the words behind `survey` say."""
    commands = {"build": build, "analyse": analyse}
    if not words or words[0] in ("-h", "--help"):
        sys.stdout.write(ABOUT)
    elif words[0] not in commands:
        raise UserError(f"There is no survey {words[0]}{nearest(words[0], commands)}")
    else:
        commands[words[0]](words[1:])


def build(words: Sequence[str]) -> None:
    """`survey build`."""
    job = parse_job(BuildJob(), words, ABOUT)
    if not 1 <= job.seconds <= 60 or not 64 <= job.lines <= 2160:
        raise UserError("--seconds lies between 1 and 60, and --lines between 64 and 2160.")
    if job.a.resolve() == job.b.resolve():
        raise UserError("--a and --b are one folder; name two.")
    refuse_existing(job.out)
    require_writable(job.out)
    pairs, said = pairs_of(read_set(job.a), read_set(job.b))
    trials = with_checks(pairs, job.checks, job.seed)
    said += notes(trials, job.seconds)
    sys.stderr.writelines(f"  {sentence}\n" for sentence in said)
    sets = {"A": os.fspath(job.a), "B": os.fspath(job.b)}
    write_study(job.out, trials, sets=sets, seed=job.seed, lines=job.lines, seconds=job.seconds)
    sys.stdout.write(
        f"{len(pairs)} pairs and {job.checks} checks. Give raters {job.out / 'raters.zip'}, or put "
        f"its content on a web server; keep {job.out / 'study.json'}, which says what is what.\n"
    )


def analyse(words: Sequence[str]) -> None:
    """`survey analyse`."""
    count = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))
    job = parse_job(AnalyseJob(), words[count:], ABOUT)
    if count < 2:
        raise UserError(
            "Name the study's folder, then the raters' files: survey analyse STUDY a.json b.json."
        )
    study = read_study(words[0])
    visits = read_visits(words[1:count], study)
    if job.out is not None:
        require_writable(job.out)
    result = analyse_ratings(study, visits, job.seed)
    sys.stdout.write(describe(study, result))
    if job.out is not None:
        text = json.dumps(as_json(study, visits, result), indent=1, ensure_ascii=False)
        with whole_file(job.out, replace=True) as partial:
            partial.write_text(text + "\n", encoding="utf-8")
