"""A picture and a prompt become a video: `python sample.py PRESET --checkpoint C --image I ...`.

--lora takes a training run, a native adapter or a ComfyUI file, with an optional strength:
`--lora runs/film:0.8`. --jobs FILE.jsonl makes many videos with one compilation; each line has
`out` and any of image, last_image, prompt, negative_prompt, seed, frames, height, width, steps,
guidance, shift; what it leaves out comes from the command line, and finished videos are skipped.

What was denoised is written to OUT.latents.safetensors before it is decoded, and goes when the
video is whole; after an interruption the same command decodes it, and other settings are refused.
"""

import math
import sys
import warnings
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from configs import SampleJob, command_line, parse_mesh
from convert.lora import open_lora
from wanjax.conditioning import check_size
from wanjax.data.video import write_video
from wanjax.errors import UserError, nearest, run_script
from wanjax.latents import (
    Latents,
    digest,
    latents_path,
    read_latents,
    require_room,
    write_latents,
)
from wanjax.lora import LoRA
from wanjax.outputs import require_writable
from wanjax.pictures import read_picture
from wanjax.pipeline import Conditioned, Pipeline
from wanjax.precision import parse_dtype
from wanjax.solvers import make_schedule
from wanjax.text_files import read_objects
from wanjax.weights import fingerprint

PER_VIDEO = frozenset(
    ["image", "last_image", "prompt", "negative_prompt", "out", "seed", "frames"]
    + ["height", "width", "steps", "guidance", "shift", "solver"]
)
MAKES_LATENTS = PER_VIDEO - {"out"} | {"area", "sigmas", "preprocess"}


def main() -> None:
    _, job = command_line(lambda preset: preset.sample, __doc__)
    wanted = requests(job)
    videos = [video for video in wanted if not video.out.exists()]
    if len(videos) < len(wanted):
        sys.stderr.write(f"{len(wanted) - len(videos)} of {len(wanted)} videos exist already\n")
    for video in wanted:
        if video not in videos:
            latents_path(video.out).unlink(missing_ok=True)  # of a run killed at its very end
    for video in videos:
        check(video)
    pipeline = Pipeline(
        job.checkpoint,
        dtype=parse_dtype(job.dtype),
        residual=job.residual,
        loras=[read_adapter(text) for text in job.lora],
        mesh=parse_mesh(job.mesh),
        residency=job.residency,
        branches=job.branches,
    )
    for video in videos:
        pipeline.check_guidance(video.guidance)
    make(pipeline, videos)


def make(pipeline: Pipeline, videos: list[SampleJob]) -> None:
    """Condition, denoise and decode; what an earlier run denoised is only decoded."""
    base = describe_model(pipeline)
    made_by = {video.out: base | describe(video) for video in videos}
    latents = {out: read_latents(latents_path(out), made_by[out]) for out in made_by}
    # All encoders run first, so that umT5 and CLIP are loaded once.
    new = [video for video in videos if latents[video.out] is None]
    given = {video.out: condition(pipeline, video) for video in new}
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
    adapters = [
        [digest(*(part for role in sorted(lora.layers) for part in content(role, lora))), strength]
        for lora, strength in pipeline.loras
    ]
    return {
        "checkpoint": {name: fingerprint(pipeline.folder, name) for name in pipeline.configs},
        "lora": adapters,
        "dtype": parse_dtype(pipeline.dtype).name,
        "residual": pipeline.residual,
    }


def content(role: str, lora: LoRA) -> Iterator[bytes]:
    """All that one layer's adapter is."""
    adapter = lora.layers[role]
    yield f"{role} {adapter.down.shape} {adapter.alpha} {adapter.numbers}".encode()
    yield from (np.ascontiguousarray(x).tobytes() for x in (adapter.down, adapter.up))


def describe(video: SampleJob) -> dict[str, Any]:
    """What of the settings of latents is the request's; pictures by their content."""
    settings = {name: getattr(video, name) for name in MAKES_LATENTS}
    for name in ("image", "last_image"):
        if (path := getattr(video, name)) is not None:
            picture = read_picture(path)
            settings[name] = digest(str(picture.shape).encode(), picture.tobytes())
    return settings


def denoise(pipeline: Pipeline, video: SampleJob, given: Conditioned) -> Latents:
    return pipeline.denoise(
        given,
        steps=video.steps,
        guidance=video.guidance,
        shift=video.shift,
        solver=video.solver,
        sigmas=video.sigmas,
        seed=video.seed,
    )


def keep(path: Path, latents: Latents, settings: dict[str, Any]) -> None:
    """Write the latents before they are decoded; where that fails there is still the video."""
    try:
        write_latents(path, latents, settings)
    except UserError as error:
        warnings.warn(str(error), stacklevel=2)


def finish(pipeline: Pipeline, video: SampleJob, latents: Latents) -> None:
    """Decode and write the video; then its latents are no longer needed."""
    frames, kept = pipeline.decode(latents), latents_path(video.out)
    try:
        write_video(video.out, frames, fps=video.fps)
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
    check_size(video.frames, video.height or 16, video.width or 16)
    if video.fps < 1:
        raise UserError(f"{video.out} cannot have fps={video.fps}; use 1 or more (Wan has 16).")
    if not 0 <= video.seed < 1 << 32:
        raise UserError(f"seed={video.seed} is not from 0 to {(1 << 32) - 1}; choose another.")


def read_jobs(job: SampleJob) -> list[SampleJob]:
    """One request a line; paths are as they stand, relative to the working folder."""
    videos, places = [], set()
    for where, given in read_objects(job.jobs):
        video = replace(job, **parse_job(given, where))
        if video.out in places:
            raise UserError(f"{where} writes {video.out}, as an earlier line does.")
        places.add(video.out)
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
    return {k: Path(v) if k in paths and v is not None else v for k, v in given.items()}


def _is_of(value: object, annotation: str) -> bool:
    """Whether a JSON value can stand for a field annotated so, such as `int | None`."""
    if value is None or isinstance(value, bool):
        return value is None and "None" in annotation
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
    path, colon, strength = text.rpartition(":")
    if colon and not Path(text).exists():
        try:
            number = float(strength)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise UserError(f"--lora {text} has no number after its last colon; write PATH:0.8.")
        return open_lora(Path(path)), number
    return open_lora(Path(text)), 1.0


if __name__ == "__main__":
    run_script(main)
