"""The files of a report: `results.json`, `results.csv`, and `report.html`, which needs no other."""

import base64
import csv
import io
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from wanjax.data.framing import fit_picture
from wanjax.data.video import write_video
from wanjax.eval.analysis import Findings
from wanjax.eval.measuring import Sets
from wanjax.eval.metrics import METRICS
from wanjax.eval.page import Example, Shown, page
from wanjax.eval.pixels import Video
from wanjax.eval.significance import REAL
from wanjax.eval.videos import View

PREFERRED = ("lpips", "ssim", "psnr", "clip_reference", "clip_text", "warping", "drift", "flicker")
PLAYED, STRIP = 320, 120  # lines of the pictures in players and strips, at most
PICTURES = 6  # of a strip


@dataclass(frozen=True)
class About:
    """What was compared, as `settings` of `results.json`, and sentences on what was done to it."""

    settings: Mapping[str, object]
    notes: Sequence[str]


def write_report(folder: Path, findings: Findings, about: About, sets: Sets, view: View) -> None:
    """Fill an empty folder."""
    results = as_json(findings, about)
    text = json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False)
    (folder / "results.json").write_text(text + "\n", encoding="utf-8")
    (folder / "results.csv").write_text(as_csv(findings), encoding="utf-8")
    examples = [
        Example(title, name, _shown(name, sets, view))
        for title, name in example_names(findings, sets)
    ]
    html = page(findings, about.settings, about.notes, examples)
    (folder / "report.html").write_text(html, encoding="utf-8")


def as_json(findings: Findings, about: About) -> dict[str, object]:
    """Values by metric and set, the comparisons with their sentences, and the settings."""
    results: dict[str, object] = {}
    for metric, sets in findings.values.items():
        results[metric] = {}
        for label, of in sets.items():
            value, low, high = of.value
            entry = {"value": value, "low": low, "high": high, "n": of.n, "shots": of.shots}
            if of.endless is not None:
                entry["infinity"] = of.endless
            results[metric][label] = entry
    results["comparisons"] = [
        {
            "metric": found.metric,
            "a": found.a,
            "b": found.b,
            "difference": found.difference._asdict(),
            "p": found.p,
            "p_holm": found.corrected,
            "smallest_p": found.least,
            "shots": found.shots,
            "paired": found.paired,
            "common": found.common,
            "verdict": sentence,
        }
        for found, sentence in zip(findings.comparisons, findings.verdicts)
    ]
    results["settings"] = {**about.settings, "notes": list(about.notes)}
    return results


def as_csv(findings: Findings) -> str:
    """A line for every value, with its interval, and one for the score of every video."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["metric", "set", "video", "value", "low", "high", "n"])
    for metric, sets in findings.values.items():
        for label, of in sets.items():
            table.writerow([metric, label, "", *of.value, of.n])
            for name, score in of.scores.items():
                table.writerow([metric, label, name, score, "", "", ""])
    return text.getvalue()


def example_names(findings: Findings, sets: Sets) -> list[tuple[str, str]]:
    """The best, the median and the worst video of the last set, with a title that says by which
    metric; without scores of videos the first three."""
    label = [name for name in sets if name != REAL][-1]
    for metric in (name for name in PREFERRED if name in findings.values):
        scores = findings.values[metric][label].scores if label in findings.values[metric] else {}
        if scores:
            sign = -1 if METRICS[metric].direction == "higher" else 1
            ordered = sorted(scores, key=lambda name: sign * scores[name])
            chosen = {"best": 0, "median": len(ordered) // 2, "worst": len(ordered) - 1}
            found = {ordered[i]: which for which, i in reversed(chosen.items())}
            title = METRICS[metric].title
            return [
                (f"{which} {title} of {label}: {scores[name]:.4g}", name)
                for name, which in reversed(found.items())
            ]
    return [("example", name) for name in sorted(sets[label])[:3]]


def _shown(name: str, sets: Sets, view: View) -> list[Shown]:
    """The video of this name of every set that has one."""
    found = []
    for label, clips in sets.items():
        if name in clips:
            frames = view.read(clips[name])
            found.append(Shown(label, _strip(frames), _film(frames, view.fps)))
    return found


def _strip(frames: Video) -> str:
    """Pictures side by side as a JPEG, in base64."""
    chosen = frames[np.linspace(0, len(frames) - 1, PICTURES).round().astype(int)]
    row = np.concatenate([_within(frame, STRIP) for frame in chosen], axis=1)
    data = io.BytesIO()
    Image.fromarray(row).save(data, "JPEG", quality=80)
    return base64.b64encode(data.getvalue()).decode()


def _film(frames: Video, fps: float | int) -> str:
    """A small MP4, in base64."""
    small = np.stack([_within(frame, PLAYED) for frame in frames])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "film.mp4"
        write_video(path, small, fps)
        return base64.b64encode(path.read_bytes()).decode()


def _within(frame: np.ndarray, lines: int) -> np.ndarray:
    """A picture of so many lines at most, of even sides."""
    height, width = frame.shape[:2]
    scale = min(1.0, lines / height)
    sides = (max(2, 2 * round(side * scale / 2)) for side in (height, width))
    return fit_picture(frame, *sides)
