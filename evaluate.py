"""Is B better than A, and how sure are we? `python evaluate.py --real DIR --generated A=DIR B=DIR`.

Videos of any codec, size and rate are brought to one form, measured, and compared: every value has
a 95 % interval, every difference a p-value, corrected for their number. Videos of one name (without
suffix) are pairs; FILM@FRAME is a window of the shot FILM, and shots are what is counted. REPORT
holds results.json, results.csv and report.html, which opens from disk. What was measured is kept in
the user's cache, by the content of the files.

`python evaluate.py study-ranks --real DIR --runs 4:0=DIR 4:1=DIR 8:0=DIR ...` asks the same of
ranks of adapters, each trained with several seeds.

`python evaluate.py survey` asks people: a blind study, and what came of it.
"""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from configs import parse_job
from configs.evaluate import EvaluateJob, RanksJob, VideosJob
from configs.survey import survey
from wanjax.errors import UserError, run_script
from wanjax.eval.analysis import analyse
from wanjax.eval.measuring import Measured, Measurer, Sets
from wanjax.eval.metrics import Metric, chosen_metrics
from wanjax.eval.pairing import paired_by, prompts_of, read_prompts, unpaired
from wanjax.eval.rank_report import read_costs, write_rank_report
from wanjax.eval.ranks import parse_runs, study, unlike_runs
from wanjax.eval.report import About, write_report
from wanjax.eval.significance import REAL, require_equal
from wanjax.eval.videos import View, common_view, describe_set, draw, notes, read_set
from wanjax.outputs import refuse_existing, require_writable, whole_folder
from wanjax.programs import keep_programs

RANKS = "study-ranks"


@dataclass(frozen=True)
class Study:
    """What was measured, of which videos."""

    metrics: list[Metric]
    sets: Sets
    view: View
    about: About
    measured: Measured


def main() -> None:
    if sys.argv[1:2] == ["survey"]:
        survey(sys.argv[2:])
        return
    keep_programs()
    if sys.argv[1:2] == [RANKS]:
        study_ranks(parse_job(RanksJob(), sys.argv[2:], __doc__))
    else:
        compare(parse_job(EvaluateJob(), sys.argv[1:], __doc__))


def compare(job: EvaluateJob) -> None:
    """Sets with the real videos, and with each other."""
    done = measure(job, labelled(job.generated))
    findings = analyse(done.metrics, done.measured, done.sets, job.seed)
    with whole_folder(job.out) as partial:
        write_report(partial, findings, done.about, done.sets, done.view)
    conclude(findings.verdicts, job.out)


def study_ranks(job: RanksJob) -> None:
    """Ranks with each other, by their runs."""
    runs = parse_runs(job.runs)
    costs = {} if job.costs is None else read_costs(job.costs, {rank for rank, *_ in runs.values()})
    folders = {label: Path(folder) for label, (_, _, folder) in runs.items()}
    done = measure(job, folders, unlike_runs)
    by_label = {label: (rank, seed) for label, (rank, seed, _) in runs.items()}
    findings = study(done.metrics, done.measured, done.sets, by_label, job.seed)
    with whole_folder(job.out) as partial:
        write_rank_report(partial, findings, done.about, costs)
    conclude([found.verdict for found in findings], job.out)


def conclude(sentences: Sequence[str], out: Path) -> None:
    """The last that is said."""
    sys.stdout.writelines(f"{sentence}\n" for sentence in sentences)
    sys.stdout.write(f"{out / 'report.html'}\n")


def measure(
    job: VideosJob,
    generated: Mapping[str, Path],
    check: Callable[[list[Metric], Sets], list[str]] = lambda *_: [],
) -> Study:
    """All that the metrics need of the real and the generated videos; `check` says more of these,
    or refuses them, before anything is measured."""
    has_prompts, has_clip = job.prompts is not None, job.clip is not None
    metrics = chosen_metrics(job.names, has_prompts=has_prompts, has_clip=has_clip)
    refuse_existing(job.out)
    require_writable(job.out)
    sets = {label: read_set(folder) for label, folder in {REAL: job.real, **generated}.items()}
    if job.pairs is not None:
        sets = paired_by(job.pairs, sets)
    sets = evened(job, sets, metrics)
    check_pairs(sets, metrics)
    more = check(metrics, sets)
    view = common_view(sets, frames=job.frames, fps=job.fps, size=size_of(job))
    about = describe(job, sets, view, metrics)
    about = About(about.settings, [*about.notes, *more])
    sys.stderr.writelines(f"  {note}\n" for note in about.notes)
    prompts = prompts_for(job, sets)
    measured = Measurer(metrics, view, lpips=job.lpips, clip=job.clip).measure(sets, prompts)
    if measured.cut:
        said = f"CLIP sees only the beginning of {measured.cut} of {len(prompts)} prompts."
        about = About(about.settings, [*about.notes, said])
    return Study(metrics, sets, view, about, measured)


def labelled(texts: Sequence[str]) -> dict[str, Path]:
    """The folders of generated videos by their labels."""
    found: dict[str, Path] = {}
    for text in texts:
        label, equals, folder = text.partition("=")
        if not (label and equals and folder):
            raise UserError(f"--generated '{text}' is not LABEL=DIR, such as tuned=out/tuned.")
        if label == REAL or label in found:
            raise UserError(f"The label '{label}' is taken; give each set one of its own.")
        found[label] = Path(folder)
    return found


def evened(job: VideosJob, sets: Sets, metrics: list[Metric]) -> Sets:
    """As many videos of each set, where a metric depends on it, or where that is asked for."""
    if job.equal_n is None and not any(metric.needs == "sets" for metric in metrics):
        return sets
    counts = {label: len(clips) for label, clips in sets.items()}
    count = require_equal(counts, job.equal_n)
    return sets if job.equal_n is None else draw(sets, count, job.seed)


def check_pairs(sets: Sets, metrics: list[Metric]) -> None:
    """Refuse a metric of pairs for a set that has none."""
    needing = [metric.name for metric in metrics if metric.needs == "pairs"]
    for label, clips in sets.items():
        if needing and not set(clips) & set(sets[REAL]):
            raise UserError(
                f"{needing[0]} compares videos in pairs, and none of {label} has the name of a "
                "real one; rename them, name the pairs by --pairs, or leave out "
                f"{', '.join(needing)} from --metrics."
            )


def size_of(job: VideosJob) -> tuple[int, int] | None:
    """The size that was asked for."""
    if (job.height is None) != (job.width is None):
        raise UserError("Give both --height and --width, or neither (the smallest video decides).")
    if job.height is None:
        return None
    if min(job.height, job.width) < 32:
        raise UserError(f"{job.width}x{job.height} is too small to be measured; use 32 or more.")
    return job.height, job.width


def prompts_for(job: VideosJob, sets: Sets) -> dict[str, str]:
    """The prompt of every video, where they are needed."""
    if job.prompts is None:
        return {}
    return prompts_of(read_prompts(job.prompts), sets, job.prompts)


def describe(job: VideosJob, sets: Sets, view: View, metrics: list[Metric]) -> About:
    """What is compared, and what was done to it."""
    described = {label: describe_set(clips, view) for label, clips in sets.items()}
    settings = {
        "metrics": [metric.name for metric in metrics],
        "frames": view.frames,
        "size": f"{view.width}x{view.height}",
        "fps": view.fps,
        "seed": job.seed,
        "equal_n": job.equal_n or "not drawn",
        "sets": described,
    }
    if any(metric.name == "lpips" for metric in metrics):
        settings["lpips"] = job.lpips
    if job.clip is not None:
        settings["clip"] = os.fspath(job.clip.name)
    said = [note for label, about in described.items() for note in notes(label, about)]
    if any(metric.needs == "pairs" for metric in metrics):
        said += unpaired(sets)
    return About(settings, said)


if __name__ == "__main__":
    run_script(main)
