"""What evaluate.py can be told. The docstring of a field is its text in `--help`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

Required = tyro.MISSING


@dataclass(frozen=True)
class VideosJob:
    """What is measured of which videos, and how they are seen."""

    real: Path = Required
    """Folder of real videos."""
    out: Path = Required
    """Folder to write: results.json, results.csv, report.html."""
    metrics: str = "fvd,kvd,lpips,flicker,warping,motion"
    """Any of fvd, kvd, lpips, psnr, ssim, clip_text, clip_frames, clip_reference, flicker, warping,
    motion, drift, first_frame, with commas between."""
    prompts: Path | None = None
    """JSON lines with the prompt of each video, for clip_text: {"file": "a.mp4", "prompt": "..."},
    or a metadata.jsonl, or the jobs of sample.py."""
    pairs: Path | None = None
    """JSON lines of what belongs together where names differ: {"real": "a.mp4", "LABEL": "b.mp4"},
    LABEL a set's."""
    clip: Path | None = None
    """Folder of a CLIP as Hugging Face's CLIPModel saves it, for clip_text, clip_frames and
    clip_reference."""
    lpips: Literal["alexnet", "vgg16"] = "alexnet"
    """Network of LPIPS; alexnet is the usual one."""
    frames: int | None = None
    """Frames of each video, from its start; none means the length of the shortest."""
    fps: float | None = None
    """Rate to which all are resampled; none means the lowest of all."""
    height: int | None = None
    """Height to which all are brought, with --width; none means the size of the smallest."""
    width: int | None = None
    """Width in pixels."""
    equal_n: int | None = None
    """Draw so many videos of each set, where their numbers differ: FVD depends on the number."""
    seed: int = 0
    """Of that draw, of bootstraps and of permutations."""

    @property
    def names(self) -> list[str]:
        """Of the metrics."""
        return [name for part in self.metrics.split(",") if (name := part.strip())]

    def unread(self) -> dict[str, str]:
        """Options that say nothing, each with what makes them so."""
        names, found = self.names, {}
        if not any(name.startswith("clip") for name in names):
            found["--clip"] = "no metric of CLIP among --metrics"
        if "clip_text" not in names:
            found["--prompts"] = "no clip_text among --metrics"
        if "lpips" not in names:
            found["--lpips"] = "no lpips among --metrics"
        return found


@dataclass(frozen=True)
class EvaluateJob(VideosJob):
    """Compare folders of generated videos with real ones, and with each other."""

    generated: tuple[str, ...] = Required
    """Folders of generated videos, each LABEL=DIR: --generated base=out/base tuned=out/tuned."""


@dataclass(frozen=True)
class RanksJob(VideosJob):
    """Compare adapters of several ranks, each trained with several seeds."""

    runs: tuple[str, ...] = Required
    """Folders of generated videos, each RANK:SEED=DIR: --runs 4:0=out/r4s0 4:1=out/r4s1 8:0=..."""
    costs: Path | None = None
    """JSON lines of what is to stand beside each rank: {"rank": 4, "parameters": 9830400}."""
