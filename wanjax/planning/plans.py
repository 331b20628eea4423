"""A plan: for each phase of a job its memory, arithmetic, bytes on the wire, and a time.

Memory and bytes on the wire are the compiler's, read from the program that would run; arithmetic is
by formula (`wanjax.work`). The time is the longest of three that would overlap at best: arithmetic
at the share of the chip's peak that a step of this model reaches, memory traffic at its published
bandwidth, and the wire at that of the links. What is not known is None, and None never fits.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import jax
from jax.sharding import Mesh

from wanjax import work
from wanjax.chips import FP32_REACHED, HOST_LINK, Chip
from wanjax.models import Config
from wanjax.models.dit import DiTConfig
from wanjax.planning import traces, wire
from wanjax.planning.targets import GPUS_IN_A_HOST, Target
from wanjax.planning.traces import Grid, Program
from wanjax.residency import Residency, staying
from wanjax.sharding import make_mesh
from wanjax.training import TrainConfig
from wanjax.weights import device_bytes

JobKind = Literal["encode", "train", "sample"]
Phase = Literal["text", "encode", "denoise", "decode", "train"]
PHASES: dict[JobKind, tuple[Phase, ...]] = {
    "encode": ("text", "encode"),
    "train": ("train",),
    "sample": ("text", "encode", "denoise", "decode"),
}
NEEDS: dict[Phase, tuple[str, ...]] = {
    "text": ("text_encoder",),
    "encode": ("image_encoder", "vae"),
    "denoise": ("dit",),
    "decode": ("vae",),
    "train": ("dit",),
}


@dataclass(frozen=True)
class Request:
    """What is to be planned: a job of the three scripts at one size."""

    job: JobKind
    networks: Mapping[str, Config]
    frames: int
    height: int
    width: int
    settings: TrainConfig = field(default_factory=TrainConfig)
    """Of a training job."""
    guided: bool = True
    branches: Literal["together", "in-turn"] = "together"
    residual: str = "float32"
    dtype: str = "bfloat16"
    base: str = "bfloat16"
    residency: Residency = "auto"

    @property
    def dit(self) -> DiTConfig:
        return self.networks["dit"]

    @property
    def grid(self) -> Grid:
        """The latents (t, h, w)."""
        time, height, width = self.networks["vae"].stride
        return (self.frames - 1) // time + 1, self.height // height, self.width // width

    @property
    def rows(self) -> int:
        """How many rows the mesh's `data` may split."""
        if self.job == "train":
            return self.settings.batch
        return 1 + (self.guided and self.branches == "together" and self.job == "sample")


@dataclass(frozen=True)
class Memory:
    """Bytes of one device. `idle` are weights that lie there and that the program does not look
    at, of this network and of others; `total` is the compiler's peak, without them; `host` lies in
    the host's memory, where `offload` puts it."""

    arguments: int
    temporaries: int
    total: int
    idle: int
    capacity: int | None
    host: int = 0

    @property
    def held(self) -> int:
        """All that the device must hold."""
        return self.total + self.idle

    @property
    def fits(self) -> bool | None:
        return None if self.capacity is None else self.held <= self.capacity


@dataclass(frozen=True)
class Seconds:
    """What a run of the program takes at least, by what bounds it."""

    compute: float | None
    memory: float | None
    network: float | None

    @property
    def estimate(self) -> float | None:
        known = (self.compute, self.memory, self.network)
        return None if None in known else max(known)


@dataclass(frozen=True)
class PhasePlan:
    """One phase. `flops` are of the whole mesh and count what is computed again."""

    memory: Memory | None
    flops: float | None
    collective_bytes: dict[str, int] | None
    seconds: Seconds
    too_large: int | None = None
    """Bytes that a compiler asked for when it gave up."""

    @property
    def fits(self) -> bool | None:
        if self.too_large is not None:
            return False
        return None if self.memory is None else self.memory.fits


@dataclass(frozen=True)
class Plan:
    """A job on a mesh of a target's devices."""

    request: Request
    target: Target
    mesh: dict[str, int]
    phases: dict[str, PhasePlan]

    @property
    def largest(self) -> str:
        """The phase that takes the most; one whose memory is not known counts as the most."""
        return max(self.phases, key=lambda name: _size(self.phases[name]))

    @property
    def fits(self) -> bool | None:
        """False if a phase does not fit, None if that is not known of one."""
        found = [phase.fits for phase in self.phases.values()]
        return False if False in found else None if None in found else True

    @property
    def step(self) -> PhasePlan | None:
        """The denoiser's or the trainer's."""
        return self.phases.get("denoise") or self.phases.get("train")

    @property
    def seconds(self) -> float:
        """Of a step, to choose among meshes; infinite where it is not known."""
        known = self.step and self.step.seconds.estimate
        return math.inf if known is None else known


def _size(phase: PhasePlan) -> float:
    if phase.too_large is not None:
        return phase.too_large
    return math.inf if phase.memory is None else phase.memory.held


def meshes(request: Request, devices: int) -> list[dict[str, int]]:
    """The meshes that make sense for so many devices: `data` divides the rows, and what is left
    goes to `ulysses` as far as the heads divide, and to `ring`. Those with less ring come first."""
    heads, found = request.dit.num_heads, []
    for data in range(1, devices + 1):
        if devices % data or request.rows % data:
            continue
        rest = devices // data
        ulysses = max(u for u in range(1, rest + 1) if not rest % u and not heads % u)
        found.append({"data": data, "ring": rest // ulysses, "ulysses": ulysses})
    return sorted(found, key=lambda axes: (axes["ring"], -axes["data"]))


def _forget(name: str, compiled: jax.stages.Compiled) -> None:
    """Keep nothing of a program."""


def plan(
    request: Request,
    target: Target,
    axes: Mapping[str, int],
    phases: tuple[Phase, ...] | None = None,
    keep: Callable[[str, jax.stages.Compiled], None] = _forget,
) -> Plan:
    """Compile every phase for the target, on a mesh of these axes; `keep` gets each program."""
    mesh = make_mesh(**axes, devices=target.devices)
    chosen = phases or PHASES[request.job]
    planned = {name: _phase(request, target.chip, mesh, name, keep) for name in chosen}
    return Plan(request, target, dict(mesh.shape), planned)


def _phase(
    request: Request, chip: Chip | None, mesh: Mesh, name: Phase, keep: Callable
) -> PhasePlan:
    """Of a phase of several programs the largest memory, and the sums of all else."""
    others = _others(request, chip, mesh, name)
    parts = []
    for program in _programs(request, mesh, name):
        parts.append(_part(request, chip, mesh, name, program, others, keep))
        keep = _forget  # the first program is the phase's own
    largest = max(parts, key=_size)
    if len(parts) == 1:
        return largest
    together = lambda values: None if None in values else sum(values)  # noqa: E731
    sent = [part.collective_bytes for part in parts]
    kinds = None if None in sent else {k: sum(s[k] for s in sent) for k in sent[0]}
    columns = zip(*(asdict(part.seconds).values() for part in parts))
    return replace(
        largest,
        flops=together([part.flops for part in parts]),
        collective_bytes=kinds,
        seconds=Seconds(*(together(column) for column in columns)),
    )


def _part(
    request: Request, chip: Chip | None, mesh: Mesh, name: Phase, program: Program, others: int,
    keep: Callable,
) -> PhasePlan:  # fmt: skip
    flops = _flops(request, name, program)
    try:
        compiled = program.traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        wanted = asked_for(str(error))
        if wanted is None:
            raise
        return PhasePlan(None, flops, None, Seconds(None, None, None), too_large=wanted)
    keep(name, compiled)
    capacity = None if chip is None else chip.capacity
    memory = memory_of(compiled.memory_analysis(), program.idle() + others, capacity)
    sent = sent_by(compiled)
    seconds = _seconds(request, chip, mesh, name, flops, memory, sent)
    return PhasePlan(memory, flops, sent, seconds)


def asked_for(error: str) -> int | None:
    """The bytes that a compiler's complaint about too little memory names; None for another."""
    if "HbmOom" not in error and "RESOURCE_EXHAUSTED" not in error:
        return None
    found = re.search(r"(?:Used |\()([\d.]+)([KMGT])", error)
    if found is None:
        return None
    return int(float(found.group(1)) * 1024 ** (1 + "KMGT".index(found.group(2))))


def memory_of(analysis: Any, idle: int, capacity: int | None) -> Memory | None:
    """What a compiler says of a program's memory; None where it says nothing that can be."""
    names = ("argument", "temp", "output", "alias")
    sizes = [getattr(analysis, f"{name}_size_in_bytes", None) for name in names]
    if any(not isinstance(size, int) or size < 0 for size in sizes):
        return None
    arguments, temporaries, output, alias = sizes
    summed = arguments + temporaries + output - alias
    peak = getattr(analysis, "peak_memory_in_bytes", None)
    known = isinstance(peak, int) and peak >= arguments
    # What lies in the host's memory counts in some peaks, and never in the sum.
    total = min(peak, summed) if known else summed
    # No program of these reads nothing and works with nothing: that is a platform without answer.
    if arguments <= 0 or temporaries <= 0 or total <= 0:
        return None
    host = getattr(analysis, "host_temp_size_in_bytes", 0)
    return Memory(arguments, temporaries, total, idle, capacity, host)


def sent_by(compiled: jax.stages.Compiled) -> dict[str, int] | None:
    """Bytes that a device sends, by the kind of collective; None where the platform has no text."""
    try:
        text = compiled.as_text()
    except Exception:  # tpu7x
        return None
    if not text:
        return None
    found = wire.sent(text)
    return {kind.replace("-", "_"): int(found[kind]) for kind in wire.KINDS}


def _programs(request: Request, mesh: Mesh, name: Phase) -> list[Program]:
    networks, grid = request.networks, request.grid
    if name == "train":
        return [traces.train(request.dit, grid, request.settings, mesh)]
    if name == "denoise":
        kinds = {"dtype": request.dtype, "residual": request.residual, "base": request.base}
        of = {"branches": request.branches, "guided": request.guided}
        return [traces.denoise(request.dit, grid, mesh, **kinds, **of)]
    if name == "decode":
        return [traces.decode(networks["vae"], grid, mesh)]
    if name == "text":
        encoder = networks["text_encoder"]
        return [traces.text(encoder, request.dit.text_len, request.dtype, mesh)]
    video = (request.frames, request.height, request.width)
    programs = [traces.encode(networks["vae"], video, mesh)]
    if "image_encoder" in networks:
        pictures = 1 if request.dit.image_positions is None else 2
        programs.append(traces.image(networks["image_encoder"], pictures, request.dtype, mesh))
    return programs


def _flops(request: Request, name: Phase, program: Program) -> float:
    if name == "train":
        settings = request.settings
        return settings.accumulate * work.train_step(
            request.dit, request.grid, windows=settings.batch, remat=settings.remat,
            full=settings.train == "full",
        )  # fmt: skip
    if name == "denoise":
        return work.denoise_step(request.dit, request.grid, guided=request.guided)
    return work.counted(program.traced.jaxpr.jaxpr)


def _others(request: Request, chip: Chip | None, mesh: Mesh, name: Phase) -> int:
    """Bytes of the networks of other phases that are left on the device, by the rule of
    `wanjax.residency`."""
    if request.job == "train" or chip is None:
        return 0
    sizes = {
        network: device_bytes(
            network, config, request.dtype, mesh, request.base if network == "dit" else "bfloat16"
        )
        for network, config in request.networks.items()
    }
    needed = {network for network in NEEDS[name] if network in sizes}
    order = PHASES[request.job][: PHASES[request.job].index(name)]
    before = {network for phase in order for network in NEEDS[phase]} & sizes.keys()
    memory = {"auto": chip.granted, "stay": None}.get(request.residency, 0)
    here = staying(before, needed, sizes.__getitem__, memory)
    return sum(sizes[network] for network in here - needed)


def _seconds(
    request: Request, chip: Chip | None, mesh: Mesh, name: Phase, flops: float,
    memory: Memory | None, sent: dict[str, int] | None,
) -> Seconds:  # fmt: skip
    if chip is None:
        return Seconds(None, None, None)
    dtype = request.settings.dtype if name == "train" else request.dtype
    in_fp32 = name in ("encode", "decode") or dtype == "float32"
    rate = chip.fp32 * FP32_REACHED if in_fp32 else chip.flops * chip.reached
    moved = None if memory is None else memory.arguments + _activations(request, name) / mesh.size
    return Seconds(
        compute=flops / mesh.size / rate,
        memory=None if moved is None else moved / chip.bandwidth,
        network=None if sent is None else sum(sent.values()) / link_of(chip, mesh.size),
    )


def link_of(chip: Chip, devices: int) -> float:
    """Bytes/s that a device sends: GPUs beyond one host are bound by the network between hosts."""
    return HOST_LINK if chip.is_gpu and devices > GPUS_IN_A_HOST else chip.link


def _activations(request: Request, name: Phase) -> float:
    """Bytes of activations that cross the memory of all devices together; of the small phases only
    their arguments are counted."""
    if name == "denoise":
        return work.traffic(request.dit, request.grid, rows=1 + request.guided, passes=1)
    if name != "train":
        return 0.0
    settings = request.settings
    rows = settings.batch * settings.accumulate
    passes = 2 if settings.remat == "none" else 3
    return work.traffic(request.dit, request.grid, rows=rows, passes=passes)
