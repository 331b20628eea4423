"""A picture and a prompt become a video: `python sample.py PRESET --checkpoint C --image I ...`.

--lora takes a training run, a native adapter or a ComfyUI file, with an optional strength:
`--lora runs/film:0.8`. --jobs FILE.jsonl makes many videos with one compilation; each line has
`out` and any of image, last_image, prompt, negative_prompt, seed, frames, height, width, steps,
guidance, shift, lora; what it leaves out comes from the command line, and finished videos are
skipped.

What was denoised is written to OUT.latents.safetensors before it is decoded, and goes when the
video is whole; after an interruption the same command decodes it, and other settings are refused.
"""

import json
import secrets
import sys
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from configs import SampleJob, check_preset, command_line, contradiction, parse_mesh
from convert.lora import open_lora
from convert.lora_commands import with_strength
from wanjax import __version__
from wanjax.conditioning import check_size
from wanjax.data.video import write_video
from wanjax.devices import claim_memory, describe_devices, memory_explained
from wanjax.errors import UserError, nearest, run_script
from wanjax.latents import (
    Latents,
    digest,
    latents_path,
    read_latents,
    require_room,
    settings_of,
    write_latents,
)
from wanjax.lora import LoRA, content
from wanjax.outputs import require_writable
from wanjax.pictures import check_pictures, choose_size, read_picture
from wanjax.pipeline import Conditioned, Pipeline
from wanjax.planning.table import nearest_row
from wanjax.precision import parse_dtype
from wanjax.program_file import facts_of, programs_of
from wanjax.programs import keep_programs
from wanjax.quantisation import UNQUANTISED
from wanjax.residency import device_memory
from wanjax.solvers import check_seed, make_schedule
from wanjax.text_files import read_objects, whole_characters
from wanjax.weights import fingerprint

PER_VIDEO = frozenset(
    ["image", "last_image", "prompt", "negative_prompt", "out", "seed", "frames"]
    + ["height", "width", "steps", "guidance", "shift", "solver", "lora"]
)
SMALLER = "fewer --frames, a smaller size or more devices (--mesh)"
REMEDY = {
    "encode": f"use --residency host, {SMALLER}",
    "denoise": f"use --branches in-turn, a quantised --base, --residency host, {SMALLER}",
    "decode": f"use --residency host, {SMALLER}",
}
MAKES_LATENTS = PER_VIDEO - {"out", "lora"} | {"area", "sigmas", "preprocess"}

NOT_IN_A_VIDEO = frozenset(
    ["out", "jobs", "mesh", "residency", "aot"]
)  # where it is made, and goes


def main() -> None:
    claim_memory()
    keep_programs()
    fixed = lambda job: ("--fast", job.fixed())  # noqa: E731
    preset, job = command_line(lambda preset: preset.sample, __doc__, fixed=fixed)
    wanted = requests(job)
    videos = [video for video in wanted if not video.out.exists()]
    if len(videos) < len(wanted):
        sys.stderr.write(f"{len(wanted) - len(videos)} of {len(wanted)} videos exist already\n")
    for video in wanted:
        if video not in videos:
            latents_path(video.out).unlink(missing_ok=True)  # of a run killed at its very end
    for video in videos:
        check(video)
    if not videos:
        return
    videos = [with_seed(video) for video in videos]
    groups: dict[tuple[str, ...], list[SampleJob]] = {}
    for video in videos:
        groups.setdefault(video.lora, []).append(video)
    pipeline = open_pipeline(preset, job, videos)
    ready = []
    for lora, group in groups.items():
        pipeline.set_adapters([read_adapter(text) for text in lora])
        ready.append((pipeline.loras, lora, group, Earlier.of(pipeline, group)))
    with all_programs(job, pipeline, videos):
        for loras, lora, group, earlier in ready:
            pipeline.set_adapters(loras)
            for text, matched in zip(lora, pipeline.adapters_matched()):
                sys.stderr.write(f"--lora {text}: {matched}\n")
            make(pipeline, group, earlier)


def all_programs(
    job: SampleJob, pipeline: Pipeline, videos: Sequence[SampleJob]
) -> AbstractContextManager:
    """What is compiled comes from the file of --aot and goes there, if one is given."""
    if job.aot is None:
        return nullcontext()
    dit = pipeline.configs["dit"]
    facts = facts_of(pipeline.mesh) | {
        "model": f"{dit.kind} {dit.dim}x{dit.num_layers}",
        "precision": f"{job.dtype} {job.base} {job.residual}",
        "branches": job.branches,
        "guidance": " ".join(sorted({str(video.guidance != 1) for video in videos})),
        "sizes": " ".join(sorted({size_of(video) for video in videos})),
    }
    return programs_of(job.aot, facts)


def size_of(video: SampleJob) -> str:
    """`81x720x1280`, as the request or its picture decides."""
    pictures = [read_picture(p) for p in (video.image, video.last_image) if p is not None]
    height, width = choose_size(video.height, video.width, video.area, pictures)
    return f"{video.frames}x{height}x{width}"


def open_pipeline(preset: str, job: SampleJob, videos: Sequence[SampleJob]) -> Pipeline:
    """The model; refuses, before weights are read, what it cannot make."""
    pipeline = Pipeline(
        job.checkpoint,
        dtype=parse_dtype(job.dtype),
        base=job.base,
        residual=job.residual,
        mesh=parse_mesh(job.mesh),
        residency=job.residency,
        branches=job.branches,
    )
    pipeline.require("dit", "vae", "text_encoder")
    config = pipeline.configs["dit"]
    if config.image_dim is not None:
        pipeline.require("image_encoder")
    check_preset(preset, job.checkpoint, config)
    for video in videos:
        pipeline.check_guidance(video.guidance)
        check_pictures(config, job.checkpoint, video.image, video.last_image)
    return pipeline


@dataclass(frozen=True)
class Earlier:
    """What makes the latents of each video, and those that an earlier run has left, by place."""

    settings: dict[Path, dict[str, Any]]
    latents: dict[Path, Latents | None]

    @classmethod
    def of(cls, pipeline: Pipeline, videos: Sequence[SampleJob]) -> "Earlier":
        """Raises `UserError` for latents of other settings."""
        base = describe_model(pipeline)
        settings = {video.out: base | describe(video) for video in videos}
        return cls(settings, {o: read_latents(latents_path(o), s) for o, s in settings.items()})


def make(pipeline: Pipeline, videos: list[SampleJob], earlier: Earlier) -> None:
    """Condition, denoise and decode; what an earlier run denoised is only decoded."""
    made_by, latents = earlier.settings, earlier.latents
    # All encoders run first, so that umT5 and CLIP are loaded once.
    new = [video for video in videos if latents[video.out] is None]
    given = {}
    for video in new:
        with memory_told("encode", pipeline, video.frames, video.height, video.width):
            given[video.out] = condition(pipeline, video)
    for out in given:
        require_room(latents_path(out), pipeline.latents_shape(given[out]))
    waiting = []
    for video in videos:
        if video in new:
            latents[video.out] = denoise(pipeline, video, given[video.out])
            keep(latents_path(video.out), latents[video.out], made_by[video.out])
        waiting.append(video)
        # Where the denoiser and the VAE have no room together, all is denoised first.
        if pipeline.residents.fit("denoise", "decode") or video is videos[-1]:
            for done in waiting:
                finish(pipeline, done, latents.pop(done.out))
            waiting = []


def describe_model(pipeline: Pipeline) -> dict[str, Any]:
    """What of the settings of latents is the model's."""
    adapters = [[digest(*content(lora)), strength] for lora, strength in pipeline.loras]
    return {
        "checkpoint": {name: fingerprint(pipeline.folder, name) for name in pipeline.configs},
        "lora": adapters,
        "dtype": parse_dtype(pipeline.dtype).name,
        "residual": pipeline.residual,
        **({} if pipeline.base == UNQUANTISED else {"base": pipeline.base}),
    }


def describe(video: SampleJob) -> dict[str, Any]:
    """What of the settings of latents is the request's; pictures by their content."""
    settings = {name: getattr(video, name) for name in MAKES_LATENTS}
    for name in ("image", "last_image"):
        if (path := getattr(video, name)) is not None:
            picture = read_picture(path)
            settings[name] = digest(str(picture.shape).encode(), picture.tobytes())
    return settings


def denoise(pipeline: Pipeline, video: SampleJob, given: Conditioned) -> Latents:
    """What takes the time. What there is for it, and the least that a step can take, is said first
    where the platform tells."""
    floor = pipeline.speed(given, video.guidance).floor()
    if floor or device_memory() is not None:
        said = [*filter(None, [floor]), f"on {describe_devices(pipeline.mesh.size)}"]
        sys.stderr.write(f"{video.out}: {', '.join(said)}\n")
    with memory_told("denoise", pipeline, given.frames, given.height, given.width):
        return pipeline.denoise(
            given,
            steps=video.steps,
            guidance=video.guidance,
            shift=video.shift,
            solver=video.solver,
            sigmas=video.sigmas,
            seed=video.seed,
        )


def memory_told(
    phase: str, pipeline: Pipeline, frames: int, height: int | None, width: int | None
) -> AbstractContextManager:
    """Running out of memory is a sentence with what decides it."""
    size, known, mesh = "", "", pipeline.mesh
    if height and width:  # else the picture decides, which was still to be read
        size, known = f" of {width}x{height}", nearest_row(phase, frames, height, width, mesh.size)
    doing = {"encode": "encoding", "denoise": "denoising", "decode": "decoding"}[phase]
    return memory_explained(f"{doing} {frames} frames{size}", mesh, known, REMEDY[phase])


def keep(path: Path, latents: Latents, settings: dict[str, Any]) -> None:
    """Write the latents before they are decoded; where that fails there is still the video."""
    try:
        write_latents(path, latents, settings)
    except UserError as error:
        warnings.warn(str(error), stacklevel=2)


def finish(pipeline: Pipeline, video: SampleJob, latents: Latents) -> None:
    """Decode and write the video; then its latents are no longer needed."""
    kept, vae = latents_path(video.out), pipeline.configs["vae"]
    with memory_told("decode", pipeline, *vae.video_shape(latents.shape[:3])):
        frames = pipeline.decode(latents)
    try:
        write_video(video.out, frames, fps=video.fps, comment=made_from(video))
    except UserError as error:
        if not kept.exists():
            raise
        raise UserError(
            f"{str(error).rstrip('.')}; its latents are kept in {kept}, from where the same "
            "command goes on."
        ) from error
    kept.unlink(missing_ok=True)
    count, height, width = frames.shape[:3]
    sys.stderr.write(f"{video.out}: {count} frames, {width}x{height}\n")


def made_from(video: SampleJob) -> str:
    """What a video was made from, as JSON: every setting of its request, with the paths."""
    settings = {f.name: getattr(video, f.name) for f in fields(video)} | {"wanjax": __version__}
    settings = {k: v for k, v in settings.items() if v is not None and k not in NOT_IN_A_VIDEO}
    return whole_characters(json.dumps(settings, default=str, ensure_ascii=False))


def requests(job: SampleJob) -> list[SampleJob]:
    """The videos to make: the command line's own, or one for every line of --jobs."""
    videos = [job] if job.jobs is None else read_jobs(job)
    for video in videos:
        if video.out is None:
            raise UserError("Say where the video goes, with --out VIDEO.mp4 (or `out` in a job).")
        if video.out.suffix.lower() != ".mp4":
            raise UserError(f"{video.out} is not an .mp4; videos are written as mp4 (H.264).")
        if job.jobs is None and video.out.exists():
            raise UserError(f"{video.out} exists already; remove it, or choose another --out.")
    return videos


def check(video: SampleJob) -> None:
    """Refuse, before any network is loaded, what would fail after minutes or hours of work."""
    require_writable(video.out)
    make_schedule(video.solver, video.steps, video.shift, video.sigmas)
    if (video.height is None) != (video.width is None):
        raise UserError("Give both height and width, or neither (the picture's aspect decides).")
    unknown = video.height is None  # as yet: the picture decides
    check_size(video.frames, *(16, 16) if unknown else (video.height, video.width))
    if not 1 <= video.fps <= 1000:
        raise UserError(f"{video.out} cannot have fps={video.fps}; use 1 to 1000 (Wan has 16).")
    if video.seed != -1:
        check_seed(video.seed)
    for picture in (video.image, video.last_image):
        if picture is not None:
            read_picture(picture)


def with_seed(video: SampleJob) -> SampleJob:
    """A seed of -1 becomes one that is drawn, and said; or the one that an earlier run drew."""
    if video.seed != -1:
        return video
    earlier = settings_of(latents_path(video.out)) or {}
    seed = earlier.get("seed", secrets.randbits(32))
    sys.stderr.write(f"{video.out}: --seed {seed}, {'as before' if earlier else 'drawn'}\n")
    return replace(video, seed=seed)


def read_jobs(job: SampleJob) -> list[SampleJob]:
    """One request a line; paths are as they stand, relative to the working folder."""
    videos, places = [], set()
    for where, given in read_objects(job.jobs):
        video = replace(job, **parse_job(given, where))
        for name, value in job.fixed().items():
            if getattr(video, name) != value:
                raise contradiction(f"{where}: {name}={given[name]!r}", "--fast", value)
        place = None if video.out is None else latents_path(video.out.resolve())
        if place in places:
            raise UserError(f"{where} writes {video.out}, as an earlier line does.")
        places |= {place} - {None}
        videos.append(video)
    return videos


def parse_job(given: dict[str, Any], where: str) -> dict[str, Any]:
    """The fields of one line, each of a known name and of its kind."""
    kinds = {f.name: f.type for f in fields(SampleJob)}
    for name, value in given.items():
        if name not in PER_VIDEO:
            raise UserError(f"{where} has an unknown field '{name}'{nearest(name, PER_VIDEO)}")
        if not _is_of(value, str(kinds[name])):
            raise UserError(f"{where}: {name}={value!r} is of the wrong kind; see --help.")
    paths = ("image", "last_image", "out")
    for name in paths:
        if "\0" in (given.get(name) or ""):
            raise UserError(f"{where}: {name}={given[name]!r} is no path; choose another.")
    made = {k: Path(v) for k, v in given.items() if k in paths and v is not None}
    if "lora" in given:
        made["lora"] = (given["lora"],) if isinstance(given["lora"], str) else tuple(given["lora"])
    return given | made


def _is_of(value: object, annotation: str) -> bool:
    """Whether a JSON value can stand for a field annotated so, such as `int | None`."""
    if value is None or isinstance(value, bool):
        return value is None and "None" in annotation
    if "tuple" in annotation:
        return all(isinstance(v, str) for v in (value if isinstance(value, list) else [value]))
    kinds = (int, float) if "float" in annotation else (int,) if "int" in annotation else (str,)
    return isinstance(value, kinds)


def condition(pipeline: Pipeline, video: SampleJob) -> Conditioned:
    """Run the encoders for one request."""
    return pipeline.condition(
        image=video.image,
        last_image=video.last_image,
        prompt=video.prompt,
        negative_prompt=video.negative_prompt,
        height=video.height,
        width=video.width,
        area=video.area,
        frames=video.frames,
        preprocess=video.preprocess,
    )


def read_adapter(text: str) -> tuple[LoRA, float]:
    """`PATH` or `PATH:STRENGTH`."""
    path, strength = with_strength(text)
    return open_lora(path), strength


if __name__ == "__main__":
    run_script(main)
