"""The common cases compiled for chips that are not here: `python -m tests.plan [WORD ...]`.

`make test-plan` plans every case (or those whose name has one of the words), prints a row for each
beside its goal, and fails where a goal is missed. With --write what was planned takes its place in
`wanjax/planning/table.json` and in the table of docs/planning.md. A case takes seconds for a GPU,
and minutes for a TPU, on two cores.
"""

import os
import sys
import time
from dataclasses import dataclass, field

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # nothing here touches a chip
os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from wanjax.chips import GIB
from wanjax.models.presets import ARCHITECTURES
from wanjax.planning.plans import Phase, Request, plan
from wanjax.planning.table import SIZES, Row, write
from wanjax.planning.targets import parse_target
from wanjax.training import TrainConfig

GB = 10**9
MODEL = ARCHITECTURES["i2v_14b_720p"]
DATA_2 = {"data": 2, "ulysses": 4}


@dataclass(frozen=True)
class Case:
    """A phase of a job on some chips; goals are GiB of memory and GB on the wire, a chip and step.
    `options` are the scripts' own, by which the case differs from their defaults."""

    job: str
    phase: Phase
    size: str
    frames: int
    target: str
    mesh: dict[str, int] = field(default_factory=dict)
    options: dict[str, object] = field(default_factory=dict)
    most_memory: float | None = None
    most_wire: float | None = None

    @property
    def name(self) -> str:
        return f"{self.phase} {self.size}{self.frames} {self.target} {self.said}".strip()

    @property
    def said(self) -> str:
        """The options as on a command line."""
        mesh = ",".join(f"{axis}={n}" for axis, n in self.mesh.items())
        words = ([f"--mesh {mesh}"] if mesh else []) + [
            f"--{name} {value}" for name, value in self.options.items()
        ]
        return " ".join(words)

    @property
    def request(self) -> Request:
        height, width = SIZES[self.size]
        common = {"frames": self.frames, "height": height, "width": width}
        if self.job != "train":
            return Request(self.job, MODEL, **common, **self.options)
        settings = TrainConfig(**self.options)
        return Request("train", MODEL, **common, settings=settings, base=settings.base)


def sampling(target: str, mesh: dict | None = None, *goals: float, **options: object) -> Case:
    return Case("sample", "denoise", "720p", 81, target, mesh or {}, options, *goals)


def training(size: str, frames: int, target: str, mesh: dict | None = None,
             *goals: float, **options: object) -> Case:  # fmt: skip
    return Case("train", "train", size, frames, target, mesh or {}, options, *goals)


CASES = [
    sampling("v6e:2x4", DATA_2, 6.5, 47),
    sampling("v5p:2x2x1", {"data": 2, "ulysses": 2}),
    sampling("h100:8", DATA_2),
    sampling("h100:1"),
    sampling("h100:1", branches="in-turn"),
    sampling("h200:1"),
    sampling("a100:1"),
    sampling("a100:8", DATA_2),
    sampling("rtx4090:1", base="nf4", branches="in-turn", residual="bfloat16"),
    Case("sample", "denoise", "480p", 81, "rtx4090:1", {},
         {"base": "nf4", "branches": "in-turn", "residual": "bfloat16"}),
    sampling("v5e:2x4", DATA_2),
    training("720p", 33, "h100:1", None, 67),
    training("720p", 33, "h100:1", None, 52, base="int8"),
    training("720p", 33, "h100:1", base="nf4"),
    training("720p", 33, "h100:1", None, 67, remat="save_attention"),
    training("720p", 33, "h100:1", None, 45, remat="offload"),
    training("720p", 33, "h100:1", None, 67, accumulate=4),
    training("480p", 33, "h100:1"),
    training("480p", 81, "h100:1"),
    training("720p", 81, "h100:1", base="int8", remat="offload"),
    training("720p", 81, "h200:1"),
    training("480p", 33, "rtx4090:1", base="nf4"),
    training("480p", 33, "rtx4090:1", base="nf4", remat="offload"),
    training("480p", 33, "a100:1"),
    training("480p", 33, "v5e:2x4", {"ulysses": 8}),
    training("720p", 33, "v5e:2x4", {"ulysses": 8}),
    training("720p", 81, "v5p:2x2x2", DATA_2, 20, 125, batch=2),
    training("720p", 81, "v6e:8x8", {"data": 8, "ulysses": 8}, batch=8),
    # The same work over more chips: docs/planning.md, "Scaling".
    sampling("v6e:8x8", {"data": 2, "ring": 4, "ulysses": 8}),
    sampling("v6e:16x16", {"data": 2, "ring": 16, "ulysses": 8}),
    training("720p", 81, "v5p:4x4x4", {"data": 16, "ulysses": 4}, batch=16),
    training("720p", 81, "v5p:4x8x8", {"data": 64, "ulysses": 4}, batch=64),
    *[
        Case("encode" if phase == "encode" else "sample", phase, "720p", 81, target, mesh)
        for phase in ("encode", "decode")
        for target, mesh in (("h100:1", {}), ("v6e:2x4", DATA_2), ("v5p:2x2x1", {"data": 1}))
    ],
]  # fmt: skip


def row(case: Case) -> Row:
    """The case as it compiles."""
    start = time.monotonic()
    axes = case.mesh or {"data": 1}
    found = plan(case.request, parse_target(case.target), axes, (case.phase,))
    return Row.of(found, case.phase, case.size, case.said, round(time.monotonic() - start))


def missed(case: Case, found: Row) -> list[str]:
    """The goals that a case misses."""
    wanted = [
        ("GiB", found.peak, GIB, case.most_memory),
        ("GB sent", found.sent, GB, case.most_wire),
    ]
    return [
        f"{goal:g} {unit}"
        for unit, value, scale, goal in wanted
        if goal is not None and (value is None or value > goal * scale)
    ]


def main(words: list[str]) -> int:
    """Print the table; how many cases missed a goal."""
    keep = "--write" in words
    words = [word for word in words if word != "--write"]
    failed = 0
    print(Row.head(), flush=True)
    for case in CASES:
        if words and not any(word in case.name for word in words):
            continue
        found = row(case)
        if keep:
            write(found)
        lost = missed(case, found)
        failed += bool(lost)
        print(found.line() + (f" **goal missed: {', '.join(lost)}**" if lost else ""), flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(min(main(sys.argv[1:]), 1))
