"""The common cases, planned once and kept as data: what runs where, without compiling anything.

`python -m tests.plan --write` makes them, with docs/planning.md.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from wanjax.chips import GIB
from wanjax.outputs import whole_file

DATA = Path(__file__).with_name("table.json")
PAGE = Path(__file__).resolve().parents[2] / "docs" / "planning.md"
BEGIN, END = "<!-- table: made by python -m tests.plan --write -->", "<!-- end of the table -->"
SIZES = {"720p": (720, 1280), "480p": (480, 832)}
"""Heights and widths, by the names that rows have for them."""


@dataclass(frozen=True)
class Row:
    """One phase of a job: bytes of a device, FLOP of the whole mesh, seconds a step at least."""

    phase: str
    size: str
    frames: int
    target: str
    options: str
    """The scripts' own, the mesh first, by which the case differs from their defaults."""
    peak: int | None
    idle: int | None
    capacity: int | None
    fits: bool | None
    flops: float | None
    sent: int | None
    seconds: float | None
    compiled_in: int

    @property
    def key(self) -> tuple:
        return self.phase, self.size, self.frames, self.target, self.options

    @property
    def devices(self) -> int:
        """How many the target has."""
        return math.prod(map(int, (self.target.partition(":")[2] or "1").split("x")))

    @classmethod
    def of(cls, plan, phase: str, size: str, options: str, compiled_in: int) -> "Row":
        """A phase of a `plans.Plan`."""
        found = plan.phases[phase]
        memory, sent = found.memory, found.collective_bytes
        return cls(
            phase,
            size,
            plan.request.frames,
            plan.target.name,
            options,
            peak=found.too_large if memory is None else memory.total,
            idle=memory and memory.idle,
            capacity=plan.target.chip and plan.target.chip.capacity,
            fits=found.fits,
            flops=found.flops,
            sent=None if sent is None else sum(sent.values()),
            seconds=found.seconds.estimate,
            compiled_in=compiled_in,
        )

    @staticmethod
    def head() -> str:
        names = ["phase", "size", "target", "options", "peak GiB", "idle beside", "of", "fits"]
        names += ["PFLOP", "GB sent", "s about", "compiled in s"]
        return f"| {' | '.join(names)} |\n{'|---' * len(names)}|"

    def line(self) -> str:
        gib = lambda n: "unknown" if n is None else f"{n / GIB:.2f}"  # noqa: E731
        known = lambda x, text: "unknown" if x is None else text(x)  # noqa: E731
        cells = [
            self.phase,
            f"{self.size}{self.frames}",
            self.target,
            f"`{self.options}`" if self.options else "-",
            gib(self.peak),
            gib(self.idle),
            gib(self.capacity),
            {True: "yes", False: "**no**", None: "unknown"}[self.fits],
            known(self.flops, lambda x: f"{x / 1e15:.2f}"),
            known(self.sent, lambda x: f"{x / 1e9:.1f}"),
            known(self.seconds, lambda x: f"{x:.1f}"),
            str(self.compiled_in),
        ]
        return f"| {' | '.join(cells)} |"


@cache
def rows() -> tuple[Row, ...]:
    """All that was planned."""
    if not DATA.exists():
        return ()
    return tuple(Row(**values) for values in json.loads(DATA.read_text()))


def write(row: Row) -> None:
    """Put a row in its place, here and on the page."""
    kept = {old.key: old for old in rows()} | {row.key: row}
    with whole_file(DATA, replace=True) as partial:
        lines = ",\n".join(json.dumps(asdict(row)) for row in kept.values())
        partial.write_text(f"[\n{lines}\n]\n")
    rows.cache_clear()
    text = PAGE.read_text()
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    with whole_file(PAGE, replace=True) as partial:
        partial.write_text(f"{before}{BEGIN}\n{as_table(rows())}\n{END}{after}")


def as_table(found: Iterable[Row]) -> str:
    return "\n".join([Row.head(), *(row.line() for row in found)])


def nearest_row(
    phase: str,
    frames: int,
    height: int,
    width: int,
    devices: int,
    found: Iterable[Row] | None = None,
) -> str:
    """What a phase takes in the case that is nearest in pixels and devices, as a clause; empty
    where none is known."""

    def distance(row: Row) -> float:
        size = frames * height * width / (row.frames * math.prod(SIZES[row.size]))
        return abs(math.log(size)) + abs(math.log(devices / row.devices))

    known = rows() if found is None else found
    of_phase = (row for row in known if row.phase == phase and row.peak is not None)
    row = min(of_phase, key=distance, default=None)
    if row is None:
        return ""
    height, width = SIZES[row.size]
    more = f" with {row.options}" if row.options else ""
    held = (row.peak + (row.idle or 0)) / GIB
    return (
        f"I2V-14B takes {held:.1f} GiB of a device to {phase} {row.frames} frames of "
        f"{width}x{height} on {row.target}{more}"
    )
