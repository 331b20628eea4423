"""What plan.py can be told: the options of the script that it plans, and its own beside them.

Paths of that script may stand there and are not needed: a command line can be planned by writing
plan.py in place of train.py. A checkpoint or features that exist say which model and which size.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import tyro

from configs.jobs import EncodeJob, SampleJob, TrainJob
from configs.presets import Preset
from wanjax.data.features import Features
from wanjax.errors import UserError, nearest
from wanjax.models.presets import ARCHITECTURES
from wanjax.pictures import choose_size
from wanjax.planning.plans import PHASES, Request
from wanjax.weights import read_config

Required = tyro.MISSING


@dataclass(frozen=True)
class PlanOptions:
    """Does it fit, and how long does a step take? Compiled for chips that need not be here."""

    job: Literal["encode", "train", "sample"] = Required
    """Whose options the others are, and what is planned."""
    target: str = Required
    """The devices: v6e:2x4, v5p:2x2x2, v5e:2x4, tpu7x:2x2x1, h100:8, h200:1, a100:8, rtx4090:1."""
    phase: Literal["text", "encode", "denoise", "decode", "train"] | None = None
    """One phase alone; all of the job when left out."""
    search: bool = False
    """Show every mesh that makes sense, where --mesh does not name one."""
    json: Path | None = None
    """Write the plan there as JSON."""
    hlo: Path | None = None
    """Write the optimised program of the step (or of --phase) there as text."""


@dataclass(frozen=True)
class PlanEncode(EncodeJob, PlanOptions):
    """Plan encode.py."""

    data: Path | None = None
    """As for encode.py; not looked at."""
    checkpoint: Path | None = None
    """Whose model it is, where it exists; else the preset's."""
    out: Path | None = None
    """As for encode.py; not looked at."""


@dataclass(frozen=True)
class PlanTrain(TrainJob, PlanOptions):
    """Plan train.py."""

    features: Path | None = None
    """Whose windows they are, where it exists; else --frames and a size."""
    checkpoint: Path | None = None
    """Whose model it is, where it exists; else the preset's."""
    run: Path | None = None
    """As for train.py; not looked at."""
    frames: int = 33
    """Frames of a window."""
    area: int = 720 * 1280
    """Pixels of a frame of 16:9."""
    height: int | None = None
    """Height in pixels; with --width it replaces --area."""
    width: int | None = None
    """Width in pixels."""

    def unread(self) -> dict[str, str]:
        """Options that say nothing, each with what makes them so."""
        found = super().unread()
        if self.features is not None and self.features.exists():
            sizes = ("--frames", "--area", "--height", "--width")
            found |= dict.fromkeys(sizes, "--features")
        return found | ({} if self.height is None else {"--area": "--height"})


@dataclass(frozen=True)
class PlanSample(SampleJob, PlanOptions):
    """Plan sample.py."""

    checkpoint: Path | None = None
    """Whose model it is, where it exists; else the preset's."""


PlanJob = PlanEncode | PlanTrain | PlanSample
_KINDS = {"encode": PlanEncode, "train": PlanTrain, "sample": PlanSample}


def kind_of(arguments: Sequence[str]) -> type[PlanJob]:
    """Which job's options a command line has: --job says it, before anything else is read."""
    words = [word for argument in arguments for word in argument.split("=", 1)]
    if "--job" not in words[:-1]:
        if {"-h", "--help"} & set(words):
            return PlanTrain
        raise UserError("Say what to plan, with --job train, --job sample or --job encode.")
    name = words[words.index("--job") + 1]
    if name not in _KINDS:
        raise UserError(f"There is no job '{name}'{nearest(name, _KINDS)}")
    return _KINDS[name]


def defaults(kind: type[PlanJob], preset: Preset) -> PlanJob:
    """The preset's own settings of that job."""
    job = {PlanEncode: preset.encode, PlanTrain: preset.train, PlanSample: preset.sample}[kind]
    given = {f.name: getattr(job, f.name) for f in fields(job)}
    given |= {name: None for name, value in given.items() if value is Required}
    if kind is PlanTrain:
        given["area"] = preset.encode.area
    return kind(**given)


def request_of(preset: str, job: PlanJob) -> Request:
    """What is to be planned. Raises `UserError` for what the job's own script would refuse."""
    if job.phase is not None and job.phase not in PHASES[job.job]:
        raise UserError(
            f"{job.job} has no phase '{job.phase}'{nearest(job.phase, PHASES[job.job])}"
        )
    here = job.checkpoint is not None and job.checkpoint.exists()
    networks = read_config(job.checkpoint) if here else ARCHITECTURES[preset]
    frames, height, width = size_of(job, networks)
    common = {"networks": networks, "frames": frames, "height": height, "width": width}
    if isinstance(job, PlanTrain):
        return Request("train", settings=job.settings, base=job.settings.base, **common)
    if isinstance(job, PlanEncode):
        return Request("encode", dtype=job.dtype, **common)
    return Request(
        "sample",
        guided=job.guidance != 1,
        branches=job.branches,
        residual=job.residual,
        dtype=job.dtype,
        base=job.base,
        residency=job.residency,
        **common,
    )


def size_of(job: PlanJob, networks: dict) -> tuple[int, int, int]:
    """Frames, height and width."""
    if isinstance(job, PlanTrain) and job.features is not None and job.features.exists():
        t, h, w, _ = Features.open(job.features).spec.latents
        time, height, width = networks["vae"].stride
        return time * (t - 1) + 1, height * h, width * w
    return job.frames, *choose_size(job.height, job.width, job.area, ())
