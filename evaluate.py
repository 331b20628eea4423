"""Is B better than A, and how sure are we? `python evaluate.py --real DIR --generated A=DIR B=DIR`.

Videos of any codec, size and rate are brought to one form, measured, and compared: every value has
a 95 % interval, every difference a p-value, corrected for their number. Videos of one name (without
suffix) are pairs; FILM@FRAME is a window of the shot FILM, and shots are what is counted. REPORT
holds results.json, results.csv and report.html, which opens from disk. What was measured is kept in
the user's cache, by the content of the files.
"""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from configs import parse_job
from configs.evaluate import EvaluateJob
from wanjax.errors import UserError, run_script, some
from wanjax.eval.analysis import analyse
from wanjax.eval.measuring import Measurer
from wanjax.eval.metrics import Metric, chosen_metrics
from wanjax.eval.pairing import paired_by, prompts_of, read_prompts, unpaired
from wanjax.eval.report import About, write_report
from wanjax.eval.significance import REAL, require_equal
from wanjax.eval.videos import ClipFile, View, common_view, describe_set, draw, notes, read_set
from wanjax.outputs import refuse_existing, require_writable, whole_folder
from wanjax.programs import keep_programs

Sets = Mapping[str, Mapping[str, ClipFile]]


def main() -> None:
    keep_programs()
    job = parse_job(EvaluateJob(), sys.argv[1:], __doc__)
    has_prompts, has_clip = job.prompts is not None, job.clip is not None
    names = [name.strip() for name in job.metrics.split(",") if name.strip()]
    metrics = chosen_metrics(names, has_prompts=has_prompts, has_clip=has_clip)
    refuse_existing(job.out)
    require_writable(job.out)
    sets = {label: read_set(folder) for label, folder in folders(job).items()}
    if job.pairs is not None:
        sets = paired_by(job.pairs, sets)
    sets = evened(job, sets, metrics)
    check_pairs(sets, metrics)
    view = common_view(sets, frames=job.frames, fps=job.fps, size=size_of(job))
    about = describe(job, sets, view, metrics)
    sys.stderr.writelines(f"  {note}\n" for note in about.notes)
    prompts = prompts_for(job, sets)
    measured = Measurer(metrics, view, lpips=job.lpips, clip=job.clip).measure(sets, prompts)
    if measured.cut:
        said = f"CLIP sees only the beginning of {measured.cut} of {len(prompts)} prompts."
        about = About(about.settings, [*about.notes, said])
    findings = analyse(metrics, measured, sets, job.seed)
    with whole_folder(job.out) as partial:
        write_report(partial, findings, about, sets, view)
    sys.stdout.writelines(f"{sentence}\n" for sentence in findings.verdicts)
    sys.stdout.write(f"{job.out / 'report.html'}\n")


def folders(job: EvaluateJob) -> dict[str, Path]:
    """The sets by their labels, the real one first."""
    found = {REAL: job.real}
    for text in job.generated:
        label, equals, folder = text.partition("=")
        if not (label and equals and folder):
            raise UserError(f"--generated '{text}' is not LABEL=DIR, such as tuned=out/tuned.")
        if label in found:
            raise UserError(f"The label '{label}' is taken; give each set one of its own.")
        found[label] = Path(folder)
    return found


def evened(job: EvaluateJob, sets: Sets, metrics: list[Metric]) -> Sets:
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


def size_of(job: EvaluateJob) -> tuple[int, int] | None:
    """The size that was asked for."""
    if (job.height is None) != (job.width is None):
        raise UserError("Give both --height and --width, or neither (the smallest video decides).")
    if job.height is None:
        return None
    if min(job.height, job.width) < 32:
        raise UserError(f"{job.width}x{job.height} is too small to be measured; use 32 or more.")
    return job.height, job.width


def prompts_for(job: EvaluateJob, sets: Sets) -> dict[str, str]:
    """The prompt of every video, where they are needed."""
    if job.prompts is None:
        return {}
    return prompts_of(read_prompts(job.prompts), sets, job.prompts)


def describe(job: EvaluateJob, sets: Sets, view: View, metrics: list[Metric]) -> About:
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
    alone = unpaired(sets) if any(metric.needs == "pairs" for metric in metrics) else {}
    said += [
        f"{label}: no real video has the name of {some(names)}." for label, names in alone.items()
    ]
    return About(settings, said)


if __name__ == "__main__":
    run_script(main)
