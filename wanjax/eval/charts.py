"""Small charts as SVG, in the colours that the page gives."""

from collections.abc import Mapping, Sequence
from html import escape

import numpy as np

WIDTH, HEIGHT, LEFT, BELOW, ABOVE, RIGHT = 320, 240, 58, 34, 12, 14


def scatter(a: Mapping[str, float], b: Mapping[str, float], name_a: str, name_b: str) -> str:
    """The scores of each video in two sets, and the line on which they are equal."""
    names = sorted(a.keys() & b.keys())
    low, high = _range([*(a[n] for n in names), *(b[n] for n in names)])
    across, up = _across(low, high), _up(low, high)
    points = "".join(
        f'<circle cx="{across(a[n]):.1f}" cy="{up(b[n]):.1f}" r="3.5" fill="var(--1)" '
        f'fill-opacity=".7"><title>{escape(n)}: {a[n]:.4g}, {b[n]:.4g}</title></circle>'
        for n in names
    )
    line = _line(across(low), up(low), across(high), up(high), "4 4")
    titles = (
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 4}" text-anchor="middle">'
        f"{escape(name_a)}</text>"
        f'<text x="12" y="{(HEIGHT - BELOW) / 2}" text-anchor="middle" '
        f'transform="rotate(-90 12 {(HEIGHT - BELOW) / 2})">{escape(name_b)}</text>'
    )
    marks = "".join(_mark_up(v, up(v)) for v in (low, high))
    marks += "".join(
        f'<text x="{across(v):.1f}" y="{HEIGHT - BELOW + 14}" text-anchor="{anchor}">{v:.4g}</text>'
        for v, anchor in ((low, "start"), (high, "end"))
    )
    return _svg(_frame() + line + points + titles + marks)


def intervals(sets: Mapping, labels: Sequence[str]) -> str:
    """Every set's scores as a column of points, with its mean and interval."""
    labels = [label for label in labels if label in sets]
    every = [score for label in labels for score in sets[label].scores.values()]
    every += [value for label in labels for value in sets[label].value]
    low, high = _range(every)
    up, step = _up(low, high), (WIDTH - LEFT - RIGHT) / len(labels)
    parts = [_frame(), *(_mark_up(value, up(value)) for value in (low, high))]
    rng = np.random.default_rng(0)  # moves points aside, so that equal ones are seen
    for i, label in enumerate(labels):
        middle, of, colour = LEFT + (i + 0.5) * step, sets[label], f"var(--{1 + i % 5})"
        for name, score in of.scores.items():
            x = middle + rng.uniform(-0.22, 0.22) * step
            parts.append(
                f'<circle cx="{x:.1f}" cy="{up(score):.1f}" r="3" fill="{colour}" '
                f'fill-opacity=".5"><title>{escape(name)}: {score:.4g}</title></circle>'
            )
        mean, least, most = of.value
        x = middle + 0.34 * step
        parts.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{up(least):.1f}" y2="{up(most):.1f}" '
            f'stroke="{colour}" stroke-width="2"/>'
            f'<circle cx="{x:.1f}" cy="{up(mean):.1f}" r="4.5" fill="{colour}"/>'
            f'<text x="{middle:.1f}" y="{HEIGHT - BELOW + 16}" text-anchor="middle">'
            f"{escape(label)}</text>"
        )
    return _svg("".join(parts))


def by_rank(
    runs: Mapping[int, Mapping[int, float]], means: Mapping[int, tuple[float, float, float]]
) -> str:
    """The runs of each rank, and their mean with its interval, where it has one."""
    known = [value for of in means.values() for value in of if np.isfinite(value)]
    low, high = _range([*known, *(value for of in runs.values() for value in of.values())])
    up, step = _up(low, high), (WIDTH - LEFT - RIGHT) / len(runs)
    parts = [_frame(), *(_mark_up(value, up(value)) for value in (low, high))]
    line = []
    for i, (rank, of_seeds) in enumerate(runs.items()):
        x, (mean, least, most) = LEFT + (i + 0.5) * step, means[rank]
        line.append(f"{x:.1f},{up(mean):.1f}")
        parts += [
            f'<circle cx="{x - 10:.1f}" cy="{up(value):.1f}" r="3" fill="var(--1)" '
            f'fill-opacity=".6"><title>seed {seed}: {value:.4g}</title></circle>'
            for seed, value in of_seeds.items()
        ]
        if np.isfinite(least):
            parts.append(
                f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{up(least):.1f}" y2="{up(most):.1f}" '
                'stroke="var(--1)" stroke-width="2"/>'
            )
        parts.append(
            f'<circle cx="{x:.1f}" cy="{up(mean):.1f}" r="4.5" fill="var(--1)"/>'
            f'<text x="{x:.1f}" y="{HEIGHT - BELOW + 16}" text-anchor="middle">rank {rank}</text>'
        )
    parts.append(f'<polyline points="{" ".join(line)}" fill="none" stroke="var(--1)"/>')
    return _svg("".join(parts))


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    room = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return (max(0.0, low - room) if low >= 0 else low - room), high + room


def _across(low: float, high: float):
    return lambda v: LEFT + (v - low) / (high - low) * (WIDTH - LEFT - RIGHT)


def _up(low: float, high: float):
    return lambda v: HEIGHT - BELOW - (v - low) / (high - low) * (HEIGHT - BELOW - ABOVE)


def _mark_up(value: float, y: float) -> str:
    return f'<text x="{LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">{value:.4g}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, dashes: str) -> str:
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="var(--soft)" '
        f'stroke-dasharray="{dashes}"/>'
    )


def _frame() -> str:
    return (
        f'<rect x="{LEFT}" y="{ABOVE}" width="{WIDTH - LEFT - RIGHT}" '
        f'height="{HEIGHT - BELOW - ABOVE}" fill="none" stroke="var(--line)"/>'
    )


def _svg(content: str) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{content}</svg>'
