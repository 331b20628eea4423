"""The true programs compiled for chips that are not here: `python -m tests.plan [WORD ...]`.

`make test-plan` prints, for every case (or those whose name has one of the words), peak memory of a
chip as the compiler counts it and the bytes that a chip sends in a step, beside the goal and the
nearest peer; it fails where a goal is missed. A case takes minutes on two cores.
"""

import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # nothing here touches a chip

import jax
from jax.experimental import topologies

from tests.real_size import trace_denoise_step, trace_train_step, trace_vae
from wanjax.planning import wire
from wanjax.sharding import make_mesh

GIB, GB = 1 << 30, 10**9
H100 = Path(__file__).with_name("h100_target.txt")


@dataclass(frozen=True)
class Case:
    """A program for some chips; goals are GiB of memory and GB on the wire, a chip and step."""

    program: str
    chips: str
    mesh: dict[str, int]
    trace: Callable[[jax.sharding.Mesh], jax.stages.Traced]
    most_memory: float | None = None
    most_wire: float | None = None
    peer: str = "-"

    @property
    def name(self) -> str:
        sizes = " ".join(f"{axis} {n}" for axis, n in self.mesh.items())
        return f"{self.program}, {self.chips}, {sizes}"


GUIDED = partial(trace_denoise_step, "720p81")
CASES = [
    Case(
        "guided step of 720p81", "v6e:2x4", {"data": 2, "ulysses": 4}, GUIDED,
        6.5, 47, "11.8 GiB, 45.1 GB (bf16 residual)",
    ),
    Case("guided step of 720p81", "h100:8", {"data": 2, "ulysses": 4}, GUIDED),
    *[
        Case(
            f"guided step of 720p81, branches {branches}", "h100:1", {"data": 1},
            partial(GUIDED, branches=branches),
        )
        for branches in ("together", "in-turn")
    ],
    Case(
        "LoRA step of 720p33", "h100:1", {"data": 1}, partial(trace_train_step, "720p33"), 67,
    ),
    Case(
        "LoRA step of 720p81, batch 2", "v5p:2x2x2", {"data": 2, "ulysses": 4},
        partial(trace_train_step, "720p81", batch=2), 20, 125, "17.6 GiB, 142.8 GB (prototype)",
    ),
    *[
        Case(f"{half} of 720p81", chips, mesh, partial(trace_vae, "720p81", half))
        for half in ("encode", "decode")
        for chips, mesh in (
            ("v6e:2x4", {"data": 2, "ulysses": 4}),
            ("v5p:2x2x1", {"data": 1}),
            ("h100:1", {"data": 1}),
        )
    ],
]  # fmt: skip


def devices(chips: str) -> list:
    """Descriptions of absent chips, such as v6e:2x4 or h100:8."""
    kind, _, count = chips.partition(":")
    if kind == "h100":
        config = H100.read_text()
        topology = topologies.get_topology_desc(
            platform="cuda", target_config=config, topology=f"1x1x{count}"
        )
    else:
        topology = topologies.get_topology_desc(chips, platform="tpu")
    return topology.devices


def compiled(case: Case) -> tuple[float, float, float]:
    """GiB at the peak, of which arguments, and GB sent."""
    chips = devices(case.chips)[: math.prod(case.mesh.values())]
    mesh = make_mesh(**case.mesh, devices=chips)
    program = case.trace(mesh).lower().compile()
    m = program.memory_analysis()
    peak = m.argument_size_in_bytes + m.temp_size_in_bytes
    peak += m.output_size_in_bytes - m.alias_size_in_bytes
    sent = sum(wire.sent(program.as_text()).values())
    return peak / GIB, m.argument_size_in_bytes / GIB, sent / GB


def main(words: list[str]) -> int:
    """Print the table; how many goals were missed."""
    missed = 0
    print("| program | peak GiB (arguments) | goal | wire GB | goal | peer | compiled in |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for case in CASES:
        if words and not any(word in case.name for word in words):
            continue
        start = time.monotonic()
        peak, arguments, sent = compiled(case)
        goals = [(peak, case.most_memory), (sent, case.most_wire)]
        missed += sum(goal is not None and value > goal for value, goal in goals)
        memory, traffic = ("-" if goal is None else f"{goal:g}" for _, goal in goals)
        print(
            f"| {case.name} | {peak:.2f} ({arguments:.2f}) | {memory} | {sent:.1f} | {traffic} "
            f"| {case.peer} | {time.monotonic() - start:.0f} s |",
            flush=True,
        )
    return missed


if __name__ == "__main__":
    sys.exit(min(main(sys.argv[1:]), 1))
