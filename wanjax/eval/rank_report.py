"""The files of a study of ranks: `results.json`, `results.csv`, `report.html`."""

import csv
import io
import json
from collections.abc import Collection, Mapping, Sequence
from html import escape
from pathlib import Path

import numpy as np

from wanjax.errors import UserError
from wanjax.eval.bootstrap import Mean
from wanjax.eval.charts import by_rank
from wanjax.eval.metrics import METRICS
from wanjax.eval.page import document, sentence_list, settings_list
from wanjax.eval.ranks import RankFindings
from wanjax.eval.report import About
from wanjax.text_files import read_objects

Costs = Mapping[int, Mapping[str, object]]  # what is to stand beside each rank, by name


def read_costs(path: Path, ranks: Collection[int]) -> dict[int, dict[str, object]]:
    """JSON lines of what is to stand beside `ranks`: {"rank": 4, "parameters": 9830400, ...}.
    Raises `UserError`, with the line, for a rank that is none of these, or is there twice."""
    found: dict[int, dict[str, object]] = {}
    for where, entry in read_objects(path):
        rank = entry.pop("rank", None)
        if not isinstance(rank, int) or isinstance(rank, bool) or rank in found:
            raise UserError(f'{where} needs a rank of its own; write {{"rank": 4, "hours": 2.5}}.')
        if rank not in ranks:
            raise UserError(f"{where} has the rank {rank}, of which there is no run; leave it out.")
        found[rank] = entry
    return found


def write_rank_report(
    folder: Path, findings: Sequence[RankFindings], about: About, costs: Costs
) -> None:
    """Fill an empty folder."""
    text = json.dumps(as_json(findings, about, costs), indent=1, ensure_ascii=False)
    (folder / "results.json").write_text(text + "\n", encoding="utf-8")
    (folder / "results.csv").write_text(as_csv(findings), encoding="utf-8")
    parts = {
        "What can be said": sentence_list([found.verdict for found in findings], "verdicts"),
        "Values": _table(findings, costs),
        "Run by run": _charts(findings),
        "What was compared": settings_list(about.settings) + sentence_list(about.notes),
    }
    (folder / "report.html").write_text(document("Ranks", parts), encoding="utf-8")


def as_json(findings: Sequence[RankFindings], about: About, costs: Costs) -> dict[str, object]:
    """Values by metric and rank; the ends of an interval are null where there is none."""
    results: dict[str, object] = {}
    for found in findings:
        results[found.metric] = {
            "ranks": {
                str(rank): {
                    **_interval(mean),
                    "n": len(found.runs[rank]),
                    "runs": _runs(found, rank),
                }
                for rank, mean in found.means.items()
            },
            "p_holm": found.p,
            "smallest_p": found.least,
            "verdict": found.verdict,
        }
    results["costs"] = {str(rank): dict(of) for rank, of in costs.items()}
    results["settings"] = {**about.settings, "notes": list(about.notes)}
    return results


def as_csv(findings: Sequence[RankFindings]) -> str:
    """A line for every run."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["metric", "rank", "seed", "value"])
    for found in findings:
        for rank, of_seeds in found.runs.items():
            table.writerows([found.metric, rank, seed, value] for seed, value in of_seeds.items())
    return text.getvalue()


def _interval(mean: Mean) -> dict[str, float | None]:
    ends = {"value": mean.mean, "low": mean.low, "high": mean.high}
    return {name: value if np.isfinite(value) else None for name, value in ends.items()}


def _runs(found: RankFindings, rank: int) -> dict[str, float]:
    return {str(seed): value for seed, value in found.runs[rank].items()}


def _table(findings: Sequence[RankFindings], costs: Costs) -> str:
    ranks = list(findings[0].runs)
    names = dict.fromkeys(name for rank in ranks for name in costs.get(rank, {}))
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    head += "".join(f"<th>{METRICS[found.metric].title}</th>" for found in findings)
    rows = [f"<tr><th>rank</th>{head}</tr>"]
    for rank in ranks:
        cells = [f"<td>{rank}</td>"]
        cells += [f"<td>{escape(str(costs.get(rank, {}).get(name, '')))}</td>" for name in names]
        cells += [f"<td>{_cell(found.means[rank], found.runs[rank])}</td>" for found in findings]
        rows.append(f"<tr>{''.join(cells)}</tr>")
    caption = "<caption>Below each mean its 95 % interval (Student's) over runs.</caption>"
    return f'<div class="wide"><table>{caption}{"".join(rows)}</table></div>'


def _cell(mean: Mean, runs: Mapping[int, float]) -> str:
    known = np.isfinite(mean.low)
    interval = f"{mean.low:.4g} to {mean.high:.4g}" if known else "no interval of one run"
    return f"{mean.mean:.4g}<small>{interval}</small><small>runs = {len(runs)}</small>"


def _charts(findings: Sequence[RankFindings]) -> str:
    figures = "".join(
        f"<figure>{by_rank(found.runs, found.means)}<figcaption>{METRICS[found.metric].title}: "
        "small points are runs; line: means with their intervals</figcaption></figure>"
        for found in findings
    )
    return f'<div class="charts">{figures}</div>'
