"""A picture and a prompt become a video: `python sample.py PRESET --checkpoint C --image I ...`.

--lora takes a training run, a native adapter or a ComfyUI file, with an optional strength:
`--lora runs/film:0.8`. --jobs FILE.jsonl makes many videos with one compilation; each line has
`out` and any of image, last_image, prompt, negative_prompt, seed, frames, height, width, steps,
guidance, shift; what it leaves out comes from the command line, and finished videos are skipped.
"""

import json
import sys
from dataclasses import fields, replace
from pathlib import Path

from configs import SampleJob, command_line, parse_mesh
from convert.lora import read_any_lora
from wanjax.data.video import write_video
from wanjax.errors import UserError, nearest, run_script
from wanjax.lora import LoRA
from wanjax.pipeline import Pipeline, parse_dtype

PER_VIDEO = frozenset(
    ["image", "last_image", "prompt", "negative_prompt", "out", "seed", "frames"]
    + ["height", "width", "steps", "guidance", "shift", "solver"]
)


def main() -> None:
    _, job = command_line(lambda preset: preset.sample, __doc__)
    videos = [v for v in requests(job) if job.jobs is None or not v.out.exists()]
    pipeline = Pipeline(
        job.checkpoint,
        dtype=parse_dtype(job.dtype),
        loras=[read_adapter(text) for text in job.lora],
        mesh=parse_mesh(job.mesh),
    )
    # All encoders run first, so that umT5 and CLIP are loaded once and gone before the denoiser.
    conditioned = [condition(pipeline, video) for video in videos]
    pipeline.release("text_encoder", "image_encoder")
    for video, given in zip(videos, conditioned):
        frames = pipeline.generate(
            given,
            steps=video.steps,
            guidance=video.guidance,
            shift=video.shift,
            solver=video.solver,
            sigmas=video.sigmas,
            seed=video.seed,
        )
        write_video(video.out, frames, fps=video.fps)
        sys.stderr.write(f"{video.out}: {len(frames)} frames, {given.width}x{given.height}\n")


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


def read_jobs(job: SampleJob) -> list[SampleJob]:
    """One request a line; paths are as they stand, relative to the working folder."""
    try:
        lines = job.jobs.read_text().splitlines()
    except OSError as error:
        raise UserError(f"{job.jobs} cannot be read ({error.strerror}); check --jobs.") from error
    videos, places = [], set()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        video = replace(job, **parse_job(line, where=f"{job.jobs}:{number}"))
        if video.out in places:
            raise UserError(f"{job.jobs}:{number} writes {video.out}, as an earlier line does.")
        places.add(video.out)
        videos.append(video)
    return videos


def parse_job(line: str, where: str) -> dict:
    """The fields of one line, each of a known name and of its kind."""
    try:
        given = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where} is not JSON ({error}); write one object a line.") from error
    if not isinstance(given, dict):
        raise UserError(f"{where} is not a JSON object; write {{...}} with `out` and others.")
    kinds = {f.name: f.type for f in fields(SampleJob)}
    for name, value in given.items():
        if name not in PER_VIDEO:
            raise UserError(f"{where} has an unknown field '{name}'{nearest(name, PER_VIDEO)}")
        expected = _json_kind(kinds[name])
        if value is not None and (not isinstance(value, expected) or isinstance(value, bool)):
            raise UserError(f"{where}: {name}={value!r} is of the wrong kind; see --help.")
    return {
        k: Path(v) if k in ("image", "last_image", "out") and v else v for k, v in given.items()
    }


def _json_kind(annotation: object) -> tuple[type, ...]:
    text = str(annotation)
    if "float" in text:
        return (int, float)
    return (int,) if "int" in text else (str,)


def condition(pipeline: Pipeline, video: SampleJob):
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
            return read_any_lora(Path(path)), float(strength)
        except ValueError as error:
            raise UserError(f"--lora {text}: '{strength}' is not a strength.") from error
    return read_any_lora(Path(text)), 1.0


if __name__ == "__main__":
    run_script(main)
