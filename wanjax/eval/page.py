"""`report.html`: one file that asks for nothing else, on a phone as on a desk."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from wanjax.eval.analysis import Findings
from wanjax.eval.charts import intervals, scatter
from wanjax.eval.metrics import METRICS
from wanjax.eval.significance import REAL

STYLE = """
:root { --ink: #1c2024; --soft: #5b6570; --line: #d9dee3; --paper: #fff; --panel: #f5f7f9;
  --1: #0b6bcb; --2: #c2410c; --3: #15803d; --4: #7e22ce; --5: #a16207; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8ebee; --soft: #9aa5b1; --line: #39424c;
  --paper: #14181c; --panel: #1d2329; --1: #60a5fa; --2: #fb923c; --3: #4ade80; --4: #c084fc;
  --5: #facc15; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 68rem; padding: 1.2rem; background: var(--paper);
  color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: .2rem 0 .6rem; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
h3 { font-size: 1rem; margin: 1.6rem 0 .4rem; overflow-wrap: anywhere; }
p, li { max-width: 46rem; overflow-wrap: anywhere; }
.soft, caption, figcaption { color: var(--soft); font-size: .875rem; text-align: left; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .7rem .4rem 0; border-bottom: 1px solid var(--line); text-align: left;
  vertical-align: top; }
td small { display: block; color: var(--soft); }
td + td small { white-space: nowrap; }
td:first-child { min-width: 6.5rem; }
ul.verdicts li { max-width: none; margin: .2rem 0; }
ul.verdicts { padding: .8rem 1rem .8rem 2rem; background: var(--panel); border-radius: .5rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(20rem, 100%), 1fr));
  gap: 1rem; }
figure { margin: 0; }
svg { width: 100%; height: auto; font: 12px system-ui, sans-serif; }
svg text { fill: var(--soft); }
.strip { margin: .5rem 0; }
.strip img { width: 100%; display: block; border-radius: .25rem; }
.players { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(16rem, 100%), 1fr));
  gap: .6rem; }
video { width: 100%; display: block; background: #000; border-radius: .25rem; }
.bar { display: flex; gap: .8rem; align-items: center; margin: .6rem 0; }
.bar button { min-height: 2.75rem; min-width: 6rem; font: inherit; border: 1px solid var(--line);
  border-radius: .4rem; background: var(--panel); color: var(--ink); }
.bar input { flex: 1; min-height: 2.75rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
"""

# All players of a group show one time: the first leads, the others are brought to it where they
# are off by a frame. Loops are started together, as two looping videos drift apart.
SCRIPT = """
for (const group of document.querySelectorAll('.group')) {
  const films = [...group.querySelectorAll('video')];
  const button = group.querySelector('button'), slider = group.querySelector('input');
  const lead = films[0], frame = 1 / Number(group.dataset.fps);
  let playing = false;
  const seek = time => films.forEach(film => { film.currentTime = time; });
  const show = on => { playing = on; button.textContent = on ? 'Pause' : 'Play'; };
  const start = () => Promise.all(films.map(film => film.play()))
    .then(() => show(true), () => show(false));
  button.onclick = () => {
    if (!playing) { start(); return; }
    films.forEach(film => film.pause()); show(false); seek(lead.currentTime);
  };
  slider.oninput = () => {
    films.forEach(film => film.pause()); show(false);
    seek(slider.value / 1000 * (lead.duration || 0));
  };
  lead.onended = () => { seek(0); start(); };
  const tick = () => {
    if (playing) {
      slider.value = lead.duration ? 1000 * lead.currentTime / lead.duration : 0;
      for (const film of films)
        if (!film.seeking && Math.abs(film.currentTime - lead.currentTime) > frame)
          film.currentTime = lead.currentTime;
    }
    requestAnimationFrame(tick);
  };
  tick();
}
"""


@dataclass(frozen=True)
class Shown:
    """A set's video: a strip of its pictures (JPEG) and itself (MP4), in base64."""

    label: str
    strip: str
    film: str


@dataclass(frozen=True)
class Example:
    """Videos of one name, under a title."""

    title: str
    name: str
    shown: Sequence[Shown]


def page(
    findings: Findings,
    settings: Mapping[str, object],
    notes: Sequence[str],
    examples: Sequence[Example],
) -> str:
    """The whole file."""
    labels = sorted(settings["sets"], key=lambda label: label == REAL)  # the real ones last
    title = " and ".join(label for label in labels if label != REAL) + " against real videos"
    parts = {
        "What can be said": sentence_list(findings.verdicts, "verdicts"),
        "Values": _table(findings, labels),
        "Video by video": _charts(findings, labels),
        "Examples": "".join(_example(one, settings["fps"]) for one in examples),
        "What was compared": settings_list(settings) + sentence_list(notes),
    }
    return document(title[:1].upper() + title[1:], parts)


def document(title: str, parts: Mapping[str, str]) -> str:
    """A file of sections under their headings; empty ones are left out."""
    sections = "".join(
        f"<section><h2>{heading}</h2>{content}</section>"
        for heading, content in parts.items()
        if content
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>"
        f"<body><h1>{escape(title)}</h1>{sections}<script>{SCRIPT}</script></body></html>\n"
    )


def sentence_list(sentences: Sequence[str], kind: str = "soft") -> str:
    """A bulleted list."""
    items = "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences)
    return f'<ul class="{kind}">{items}</ul>' if items else ""


def _table(findings: Findings, labels: Sequence[str]) -> str:
    head = "".join(f"<th>{escape(label)}</th>" for label in labels)
    rows = [f"<tr><th>metric</th>{head}</tr>"]
    for name, sets in findings.values.items():
        metric = METRICS[name]
        better = f"{metric.direction} is better" if metric.direction else "neither way is better"
        about = ", ".join(part for part in (metric.unit, better) if part)
        cells = [f"<td>{metric.title}<small>{about}</small></td>"]
        for label in labels:
            cells.append(f"<td>{_cell(sets[label]) if label in sets else ''}</td>")
        rows.append(f"<tr>{''.join(cells)}</tr>")
    caption = "<caption>Below each value its 95 % interval over shots, and the videos.</caption>"
    return f'<div class="wide"><table>{caption}{"".join(rows)}</table></div>'


def _cell(of) -> str:
    value, low, high = of.value
    endless = f"<small>endless: {of.endless:.4g}</small>" if of.endless is not None else ""
    return f"{value:.4g}<small>{low:.4g} to {high:.4g}</small><small>n = {of.n}</small>{endless}"


def _charts(findings: Findings, labels: Sequence[str]) -> str:
    figures = []
    for name, sets in findings.values.items():
        metric = METRICS[name]
        scores = {label: of.scores for label, of in sets.items() if of.scores}
        generated = [label for label in scores if label != REAL]
        if not generated:
            continue
        if len(generated) == 2 and len(scores[generated[0]].keys() & scores[generated[1]].keys()):
            a, b = generated
            drawn, text = (
                scatter(scores[a], scores[b], a, b),
                f"a point is a video; {a} across, {b} up",
            )
        else:
            drawn, text = intervals(sets, labels), "a point is a video; bar: mean and interval"
        figures.append(
            f"<figure>{drawn}<figcaption>{metric.title}: {escape(text)}</figcaption></figure>"
        )
    return f'<div class="charts">{"".join(figures)}</div>' if figures else ""


def _example(example: Example, fps: float | int) -> str:
    strips = "".join(
        f'<figure class="strip"><img alt="" src="data:image/jpeg;base64,{shown.strip}">'
        f"<figcaption>{escape(shown.label)}</figcaption></figure>"
        for shown in example.shown
    )
    films = "".join(
        f'<figure><video muted playsinline preload="auto" src="data:video/mp4;base64,{shown.film}">'
        f"</video><figcaption>{escape(shown.label)}</figcaption></figure>"
        for shown in example.shown
    )
    bar = (
        '<div class="bar"><button type="button">Play</button>'
        '<input type="range" min="0" max="1000" value="0" aria-label="time"></div>'
    )
    return (
        f"<h3>{escape(example.title)}</h3>"
        f'<p class="soft">{escape(example.name)}</p>{strips}'
        f'<div class="group" data-fps="{fps:g}"><div class="players">{films}</div>{bar}</div>'
    )


def settings_list(settings: Mapping[str, object]) -> str:
    """Settings by name, and then what each set is made of."""
    rows = []
    for key, value in settings.items():
        if key == "sets":
            continue
        rows.append(f"<dt>{escape(key)}</dt><dd>{escape(_plain(value))}</dd>")
    for label, about in settings["sets"].items():
        text = "; ".join(f"{key} {_plain(value)}" for key, value in about.items())
        rows.append(f"<dt>{escape(label)}</dt><dd>{escape(text)}</dd>")
    return f"<dl>{''.join(rows)}</dl>"


def _plain(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} ({count})" for key, count in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
