"""What each script can be told. The docstring of a field is its text in `--help`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from wanjax.quantisation import UNQUANTISED, Base
from wanjax.training import TrainConfig

Required = tyro.MISSING


@dataclass(frozen=True)
class EncodeJob:
    """Run the VAE, umT5 and CLIP once over a folder of clips, and cache what they say."""

    data: Path = Required
    """Folder of videos with NAME.txt captions beside them, or with a metadata.jsonl."""
    checkpoint: Path = Required
    """Native checkpoint folder (python -m convert pipeline SRC DST)."""
    out: Path = Required
    """Features cache to write; an interrupted encode goes on where it stopped."""
    frames: int = 33
    """Frames of a window, 4n+1."""
    fps: float = 16.0
    """Clips are resampled to this rate by time; Wan was trained at 16."""
    stride: int | None = None
    """Frames from one window's start to the next; none means windows do not overlap."""
    area: int = 720 * 1280
    """Pixels of a frame; height and width follow from the first clip's aspect."""
    height: int | None = None
    """Height in pixels, divisible by 16; with --width it replaces --area."""
    width: int | None = None
    """Width in pixels, divisible by 16."""
    max_crop: float = 0.5
    """Share of its picture that a film may lose where its aspect is another; 1 allows all."""
    preprocess: Literal["official", "diffusers"] = "official"
    """How a picture becomes the encoders' input; must be the same when sampling."""
    default_caption: str | None = None
    """Caption of the clips that have none."""
    skip_short: bool = False
    """Leave out shots that are shorter than one window; otherwise they are an error."""
    cover_end: bool = False
    """Where windows leave the end of a shot over, add one that ends with it."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Precision of umT5 and of the cached features; CLIP and the VAE run in fp32."""
    mesh: str | None = None
    """Devices, such as data=2,ulysses=4; none means one device."""

    def unread(self) -> dict[str, str]:
        """Options that say nothing, each with what makes them so."""
        return {} if self.height is None else {"--area": "--height"}


@dataclass(frozen=True)
class TrainJob:
    """Train adapters (or all weights) on cached features. The same command resumes a run."""

    features: Path = Required
    """Features cache that encode.py wrote."""
    checkpoint: Path = Required
    """Native checkpoint folder; it is read and never changed."""
    run: Path = Required
    """Folder of the run: checkpoints, metrics, TensorBoard."""
    mesh: str | None = None
    """Devices, such as data=2,ring=1,ulysses=4; all on one device when left out."""
    init_lora: Path | None = None
    """Start a new run from this adapter: a run, RUN@STEP, RUN@best, or an adapter file of any
    trainer. Rank, alpha and targets are its own."""
    settings: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(default_factory=TrainConfig)

    def unread(self) -> dict[str, str]:
        """Options that say nothing, each with what makes them so."""
        of_adapters = ("--rank", "--alpha", "--targets", "--dtype", "--base", "--init-lora")
        return dict.fromkeys(of_adapters, "--train full") if self.settings.train == "full" else {}


@dataclass(frozen=True)
class SampleJob:
    """Make a video from a picture and a prompt, or many from a file of jobs."""

    checkpoint: Path = Required
    """Native checkpoint folder."""
    image: Path | None = None
    """First frame: any picture; text-to-video models take none."""
    last_image: Path | None = None
    """Last frame, for first-and-last-frame models."""
    prompt: str = ""
    """What happens in the video."""
    negative_prompt: str | None = None
    """What to steer away from; Wan's own negative prompt when left out."""
    lora: tuple[str, ...] = ()
    """Adapters, each PATH or PATH:STRENGTH: a run, or an adapter file of any trainer."""
    out: Path | None = None
    """The mp4 to write."""
    jobs: Path | None = None
    """JSON lines with image, prompt, seed, out, ...: many videos with one compilation;
    those whose file exists are skipped."""
    frames: int = 81
    """Frames of the video, 4n+1."""
    fps: int = 16
    """Frame rate of the file."""
    area: int = 720 * 1280
    """Pixels of a frame; height and width follow from the picture's aspect."""
    height: int | None = None
    """Height in pixels, divisible by 16; with --width it replaces --area."""
    width: int | None = None
    """Width in pixels, divisible by 16."""
    steps: int = 40
    """Denoising steps."""
    guidance: float = 5.0
    """Classifier-free guidance scale; 1 turns it off and halves the work."""
    shift: float = 5.0
    """Wan's time shift (5 for 720p, 3 for 480p, 16 for first-and-last-frame)."""
    solver: Literal["unipc", "dpm++", "euler", "lcm"] = "unipc"
    """Integrator of the flow; lcm is for adapters that were distilled to a few steps."""
    fast: bool = False
    """With a four-step adapter: --solver lcm --steps 4 --shift 5 --guidance 1."""
    sigmas: tuple[float, ...] | None = None
    """An explicit schedule of N+1 values that falls to 0, in place of steps and shift."""
    seed: int = 0
    """Of the initial noise, up to 64 bits; -1 draws one and says which."""
    preprocess: Literal["official", "diffusers"] = "official"
    """How the picture becomes the encoders' input; as in encode.py."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Precision of the large matrix products; what else runs in fp32: docs/precision.md."""
    base: Base = UNQUANTISED
    """The denoiser's blocks in fewer bits: int8 and fp8 take half of the memory, nf4 a quarter,
    each with an error of its own (docs/precision.md); bfloat16 leaves them as --dtype says."""
    residual: Literal["bfloat16", "float32"] = "float32"
    """Type of the denoiser's residual stream; bfloat16 takes less memory, with three times the
    error."""
    branches: Literal["together", "in-turn"] = "together"
    """Guidance's two branches as one batch, or one after the other, in less memory."""
    mesh: str | None = None
    """Devices, such as data=1,ring=1,ulysses=8; all on one device when left out."""
    aot: Path | None = None
    """File of all compiled programs: the first run writes it, the next ones load it and compile
    nothing (docs/startup.md)."""
    residency: Literal["auto", "stay", "host", "disk"] = "auto"
    """What networks do that a phase does not need. auto: they stay where all fit in half of the
    device's memory, else wait in the host's, or are read again; stay, host, disk: always so."""

    def unread(self) -> dict[str, str]:
        """Options that say nothing, each with what makes them so."""
        found = {} if self.height is None else {"--area": "--height"}
        if self.sigmas is not None:
            found |= dict.fromkeys(("--steps", "--shift"), "--sigmas")
        return found

    def fixed(self) -> dict[str, Any]:
        """What --fast sets, by field."""
        four = {"solver": "lcm", "steps": 4, "shift": 5.0, "guidance": 1.0, "sigmas": None}
        return four if self.fast else {}
