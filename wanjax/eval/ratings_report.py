"""What a blind study found, as text for people and as JSON."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict

from wanjax.eval.answers import Study, Visit
from wanjax.eval.ratings import Finding, Result


def describe(study: Study, result: Result) -> str:
    """The report that is shown."""
    lines = [
        f"A is {study.sets['A']}, B is {study.sets['B']}.",
        f"{_counted(result.raters, 'rater')}, {_counted(result.pairs, 'pair')}; "
        "ratings from 1 to 5, choices as shares; 95 % intervals in brackets.",
        "",
    ]
    lines += _checks(study, result)
    flagged = result.flagged
    lines += _section(f"All {_counted(result.raters, 'rater')}", result.every)
    if flagged and result.passed is not None:
        count = _counted(result.raters - len(flagged), "rater")
        lines += _section(f"Only the {count} who failed no check", result.passed)
    if flagged and result.passed is None:
        lines.append("Every rater failed a check: little can be said by these answers.")
    changed = depends(result)
    if changed:
        lines.append(
            f"{', '.join(changed)}: what is found depends on raters who failed a check; nothing "
            "certain can be said."
        )
    return "\n".join(lines).rstrip() + "\n"


def depends(result: Result) -> list[str]:
    """The questions of which another is found better without the raters who failed a check."""
    if result.passed is None:
        return []
    return [
        of.title for name, of in result.every.items() if of.outcome != result.passed[name].outcome
    ]


def as_json(study: Study, visits: Sequence[Visit], result: Result) -> dict[str, object]:
    """All numbers; what is no number is null."""
    raters = [
        {"rater": visit.rater, "file": visit.file.name, "failed": result.failed[visit.rater]}
        for visit in visits
    ]
    return {
        "study": study.digest,
        "sets": dict(study.sets),
        "pairs": result.pairs,
        "raters": raters,
        "all": _numbers(result.every),
        "without_flagged": None if result.passed is None else _numbers(result.passed),
        "depends_on_flagged": depends(result),
    }


def _checks(study: Study, result: Result) -> list[str]:
    if not study.of_kind("broken") + study.of_kind("identical"):
        return ["The study has no attention checks; who rated without looking is not known.", ""]
    flagged = [f"{rater}: {'; '.join(result.failed[rater])}." for rater in result.flagged]
    return [*(flagged or ["Every rater passed the attention checks."]), ""]


def _section(title: str, found: Mapping[str, Finding]) -> list[str]:
    heads = ("A", "B", "B less A", "A ahead", "even", "B ahead", "alpha", "test", "p", "p (Holm)")
    rows = [("", *heads)]
    for of in found.values():
        shares = [f"{share:.0%}" for share in of.shares]
        alpha = "-" if math.isnan(of.alpha) else f"{of.alpha:.2f}"
        numbers = (_mean(of.a), _mean(of.b), _mean(of.difference), *shares, alpha)
        rows.append((of.title, *numbers, of.test, f"{of.p:.3f}", f"{of.corrected:.3f}"))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    table = ["  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths)).rstrip() for row in rows]
    return [title, *table, *(of.verdict for of in found.values()), ""]


def _numbers(found: Mapping[str, Finding]) -> dict[str, object]:
    numbers = {}
    for question, of in found.items():
        entry = asdict(of) | {"verdict": of.verdict}
        for name in ("a", "b", "difference"):
            mean, low, high = entry[name]
            entry[name] = {"value": mean, "low": low, "high": high}
        entry["shares"] = dict(zip(("a", "even", "b"), of.shares))
        entry["alpha"] = None if math.isnan(of.alpha) else of.alpha
        numbers[question] = entry
    return numbers


def _mean(of: Sequence[float]) -> str:
    value, low, high = of
    return f"{value:.2f} [{low:.2f}, {high:.2f}]"


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"
