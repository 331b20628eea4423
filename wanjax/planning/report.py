"""A plan as text for people, and as JSON for programs."""

import math
from dataclasses import asdict
from typing import Any

from wanjax.chips import FP32_REACHED, GIB, GPU_FRACTION, RESERVE, Chip
from wanjax.planning.plans import Memory, PhasePlan, Plan, Request, link_of

UNKNOWN = "unknown"
_COLUMNS = [
    "phase",
    "arguments",
    "temporaries",
    "peak",
    "idle beside",
    "of",
    "host",
    "PFLOP",
    "GB sent",
]
_COLUMNS += ["s: arithmetic", "memory", "wire", "about"]
HEAD = f"| {' | '.join(_COLUMNS)} |\n{'|---' * len(_COLUMNS)}|"


def as_json(plan: Plan) -> dict[str, Any]:
    """The plan: bytes, FLOP and seconds; null is what is not known."""
    phases = {name: _phase_json(phase, plan.target.chip) for name, phase in plan.phases.items()}
    largest, step = phases[plan.largest], plan.step
    return {
        "target": plan.target.name,
        "devices": len(plan.target.devices),
        "mesh": plan.mesh,
        "phases": phases,
        "memory_per_device": largest["memory_per_device"],
        "fits": plan.fits,
        "flops_per_step": step and step.flops,
        "collective_bytes": step and step.collective_bytes,
        "seconds_per_step": step and step.seconds.estimate,
    }


def _phase_json(phase: PhasePlan, chip: Chip | None) -> dict[str, Any]:
    memory = dict.fromkeys(Memory.__dataclass_fields__)
    known = {"total": phase.too_large, "capacity": chip and chip.capacity}
    memory |= asdict(phase.memory) if phase.memory else known
    return {
        "memory_per_device": memory,
        "fits": phase.fits,
        "flops": phase.flops,
        "collective_bytes": phase.collective_bytes,
        "seconds": asdict(phase.seconds) | {"estimate": phase.seconds.estimate},
    }


def describe(plan: Plan) -> str:
    """What is planned, a row for each phase, the verdict, and what was assumed."""
    rows = [_row(name, phase) for name, phase in plan.phases.items()]
    chip = plan.target.chip
    parts = [f"{title(plan.request)}, on {where(plan)}", HEAD + "\n" + "\n".join(rows)]
    parts += [verdict(plan)] + ([assumptions(chip, len(plan.target.devices))] if chip else [])
    return "\n\n".join(parts) + "\n"


def title(request: Request) -> str:
    """The job in words."""
    size = f"{request.frames} frames of {request.height}x{request.width}"
    if request.job == "encode":
        return f"Encoding {size}"
    if request.job == "sample":
        how = f"guided, {request.branches}" if request.guided else "without guidance"
        return f"Sampling {size}, {how}, {request.residual} residual, {request.base} base"
    s = request.settings
    what = "all weights" if s.train == "full" else f"adapters of rank {s.rank} ({s.targets})"
    batch = f"batch {s.batch}" + (f" x {s.accumulate}" if s.accumulate > 1 else "")
    return (
        f"Training {what} on {size}, {batch}, remat {s.remat}, {s.residual} residual, {s.base} base"
    )


def where(plan: Plan) -> str:
    """The target with its mesh."""
    axes = " ".join(f"{name}={size}" for name, size in plan.mesh.items() if size > 1)
    return f"{plan.target.name}, {axes or 'one device'}"


def _row(name: str, phase: PhasePlan) -> str:
    memory, seconds = phase.memory, phase.seconds
    gib = lambda n: UNKNOWN if n is None else _digits(n / GIB)  # noqa: E731
    of = lambda key: gib(memory and getattr(memory, key))  # noqa: E731
    peak = f"over {gib(phase.too_large)}" if phase.too_large else of("total")
    sent = phase.collective_bytes
    cells = [
        name,
        *(of(key) for key in ("arguments", "temporaries")),
        peak,
        of("idle"),
        of("capacity"),
        of("host"),
        UNKNOWN if phase.flops is None else _digits(phase.flops / 1e15),
        UNKNOWN if sent is None else _digits(sum(sent.values()) / 1e9),
        *(_seconds(s) for s in (seconds.compute, seconds.memory, seconds.network)),
        _seconds(seconds.estimate),
    ]
    return f"| {' | '.join(cells)} |"


def _seconds(value: float | None) -> str:
    return UNKNOWN if value is None else _digits(value)


def _digits(value: float) -> str:
    """Three digits that say something, of a toy's numbers too; never an exponent."""
    if value >= 100 or value == 0:
        return f"{value:,.0f}"
    places = 2 - math.floor(math.log10(abs(value)))
    return f"{value:.{places}f}"


def verdict(plan: Plan) -> str:
    """Whether it fits, which phase is the largest, and what bounds a step."""
    phase = plan.phases[plan.largest]
    if phase.memory is None:
        asked = f"asks for {_digits(phase.too_large / GIB)} GiB" if phase.too_large else ""
        text = asked or "is of unknown size: the platform does not tell its memory"
        answer = "Does not fit" if plan.fits is False else "Unknown"
        return f"**{answer}**: {plan.largest} {text}."
    held, capacity = phase.memory.held / GIB, phase.memory.capacity
    if capacity is None:
        return f"**Unknown**: {plan.largest} takes {_digits(held)} GiB of a device of unknown size."
    text = "Fits" if plan.fits else "Does not fit" if plan.fits is False else "Unknown"
    text = f"**{text}**: the largest phase, {plan.largest}, takes {_digits(held)} GiB"
    text += f" of {capacity / GIB:.1f}"
    if plan.step is None or plan.step.seconds.estimate is None:
        return text + "."
    s = plan.step.seconds
    bounds = {"arithmetic": s.compute, "memory traffic": s.memory, "the wire": s.network}
    bound = max(bounds, key=bounds.get)
    return f"{text}; a step takes about {_seconds(s.estimate)} s, bound by {bound}."


def assumptions(chip: Chip, devices: int) -> str:
    """What the figures rest on, in a few lines."""
    share = f"{GPU_FRACTION:.0%} of the card's {chip.memory / GIB:.1f} GiB, "
    source = "measured" if chip.name == "h100" else "assumed"
    memory = share if chip.is_gpu else f"{chip.memory / GIB:.2f} GiB, "
    links = link_of(chip, devices) / 1e9
    return (
        f"A process gets {memory}of which {RESERVE / GIB:.1f} are kept back. idle beside: weights "
        "that lie there and that the phase does not use. GB sent: by one device, every exchange an "
        f"ideal ring. Seconds: arithmetic at {chip.reached:.0%} of {chip.flops / 1e12:.0f} TFLOP/s "
        f"({source}; VAE and CLIP at {FP32_REACHED:.0%} of "
        f"{chip.fp32 / 1e12:.0f} in fp32), memory at {chip.bandwidth / 1e9:.0f} GB/s, links at "
        f"{links:.0f} GB/s; the longest of the three counts, as if they overlapped."
    )
