"""Encode clips once, before training: `python encode.py PRESET --data DIR --checkpoint C --out F`.

Films are resampled to 16 fps by time, cut into windows inside their shots, and seen by the VAE,
umT5 and CLIP; their features are cached. An interrupted encode goes on where it stopped when the
same command is run again; and when films or captions have come, gone or changed, it encodes these.
"""

import sys
import warnings
from collections.abc import Sequence
from functools import partial

import numpy as np
from jaxtyping import UInt8

from configs import EncodeJob, check_preset, command_line, parse_mesh
from wanjax.conditioning import check_size, image_tokens, picture_condition, prepare, size_for
from wanjax.data.clips import Window, read_dataset, read_windows, refuse_shared, windows
from wanjax.data.feature_writer import FeatureWriter
from wanjax.data.features import FeatureSpec, Origin
from wanjax.data.framing import fit_picture
from wanjax.data.probing import digest
from wanjax.data.report import describe_films, refuse_cropped, summary, warn_of_cuts
from wanjax.devices import claim_memory, describe_devices, memory_explained
from wanjax.errors import UserError, run_script, some
from wanjax.pipeline import Pipeline
from wanjax.planning.table import nearest_row
from wanjax.precision import parse_dtype
from wanjax.programs import keep_programs
from wanjax.progress import progress_bar
from wanjax.weights import fingerprint


def main() -> None:
    claim_memory()
    keep_programs()
    preset, job = command_line(lambda preset: preset.encode, __doc__)
    shots = read_dataset(job.data, job.default_caption)
    cut = windows(shots, job.frames, job.fps, job.stride, job.skip_short, job.cover_end)
    if not cut:
        raise UserError(
            f"No shot in {job.data} is as long as one window of {job.frames} frames at "
            f"{job.fps:g} fps; use fewer --frames, or longer clips."
        )
    height, width = choose_size(job, cut)
    refuse_cropped(cut, height, width, job.max_crop)
    pipeline = Pipeline(job.checkpoint, dtype=parse_dtype(job.dtype), mesh=parse_mesh(job.mesh))
    pipeline.require("dit", "vae", "text_encoder")
    if pipeline.configs["dit"].image_dim is not None:
        pipeline.require("image_encoder")
    check_preset(preset, job.checkpoint, pipeline.configs["dit"])
    spec = feature_spec(pipeline, job, height, width)
    encoders = [name for name in pipeline.configs if name != "dit"]
    common = origin(job, encoders, height, width)
    writer = FeatureWriter(job.out, spec, common, origins(cut))
    names = set(writer.names())
    todo = [window for window in cut if window.name in names]
    sys.stderr.write(
        f"{summary(shots, cut)}; {width}x{height}, {len(todo)} to encode on "
        f"{describe_devices(pipeline.mesh.size)}\n"
    )
    said = [*writer.changes(), *describe_films(cut, height, width)]
    sys.stderr.writelines(f"  {line}\n" for line in said)
    if torn := warn_of_cuts(todo):
        warnings.warn(torn, stacklevel=1)
    out_of_memory = memory_explained(
        f"encoding windows of {job.frames} frames of {width}x{height}",
        pipeline.mesh,
        nearest_row("encode", job.frames, height, width, pipeline.mesh.size),
        "use shorter windows (--frames), a smaller size, or more devices (--mesh)",
    )
    with out_of_memory:
        encode_captions(pipeline, writer)
        encode_windows(pipeline, job, writer, todo, height, width, done=len(cut) - len(todo))
    writer.finish()


def choose_size(job: EncodeJob, cut: Sequence[Window]) -> tuple[int, int]:
    """The size asked for, or the one of `area` pixels with the first clip's aspect."""
    if (job.height is None) != (job.width is None):
        raise UserError("Give both --height and --width, or neither (the first clip decides).")
    if job.height is not None:
        size = job.height, job.width
    else:
        info = cut[0].info
        size = size_for(info.height, info.width, job.area)
    check_size(job.frames, *size)
    return size


def feature_spec(pipeline: Pipeline, job: EncodeJob, height: int, width: int) -> FeatureSpec:
    """Shapes of one window's features, from the checkpoint's own configs."""
    dit, vae = pipeline.configs["dit"], pipeline.configs["vae"]
    stride = vae.stride
    grid = ((job.frames - 1) // stride[0] + 1, height // stride[1], width // stride[2])
    has_image = dit.image_dim is not None
    tokens = pipeline.configs["image_encoder"].num_tokens if has_image else 0
    pictures = 1 if dit.image_positions is None else 2
    return FeatureSpec(
        latents=(*grid, vae.z_dim),
        text=(dit.text_len, dit.text_dim),
        condition=(*grid, dit.in_channels - vae.z_dim) if has_image else None,
        image=(pictures * tokens, dit.image_dim) if has_image else None,
        dtype=job.dtype,
    )


def origin(job: EncodeJob, encoders: Sequence[str], height: int, width: int) -> dict:
    """What the features of all windows depend on; a cache made otherwise is refused."""
    return {
        "checkpoint": {name: fingerprint(job.checkpoint, name) for name in encoders},
        "frames": job.frames,
        "fps": job.fps,
        "stride": job.stride or job.frames,
        "cover_end": job.cover_end,
        "height": height,
        "width": width,
        "preprocess": job.preprocess,
    }


def origins(cut: Sequence[Window]) -> dict[str, Origin]:
    """What the features of each window depend on besides; films by their whole content."""
    files = dict.fromkeys(window.shot.file for window in cut)
    films = {}
    with progress_bar("reading the films", len(files)) as bar:
        for file in files:
            films[file] = digest(file)
            bar.advance()
    refuse_shared(dict.fromkeys(window.shot for window in cut), films)  # copies, too
    return {
        window.name: Origin(
            split=window.shot.split,
            caption=window.shot.caption,
            film=films[window.shot.file],
            start=window.start,
            size=(window.info.height, window.info.width),
            fps=window.info.fps,
        )
        for window in cut
    }


def encode_captions(pipeline: Pipeline, writer: FeatureWriter) -> None:
    """Keep the features of every caption that is new, at its true length."""
    captions = writer.captions()
    with progress_bar("Captions", len(captions), hidden=len(captions) < 2) as bar:
        for caption in captions:
            writer.add_caption(caption, pipeline.encode_prompt(caption))
            bar.advance()


def encode_windows(
    pipeline: Pipeline,
    job: EncodeJob,
    writer: FeatureWriter,
    todo: Sequence[Window],
    height: int,
    width: int,
    done: int,
) -> None:
    """Keep the features of every window that is new; `done` are there already."""
    damaged: list[str] = []
    pipeline.residents.enter("picture")
    with (
        pipeline.on_mesh(),
        progress_bar("Encoding", done + len(todo), done=done) as bar,
    ):
        for window, frames in read_windows(todo, partial(fit_picture, height=height, width=width)):
            if frames is None:
                damaged.append(window.name)
                continue
            writer.add(window.name, **encode_window(pipeline, job, frames))
            bar.advance(note=window.name)
    if damaged:
        warnings.warn(
            f"Left out, since they cannot be decoded: {some(damaged)}; when the films are mended, "
            "the same command encodes these windows.",
            stacklevel=1,
        )


def encode_window(
    pipeline: Pipeline, job: EncodeJob, frames: UInt8[np.ndarray, "T H W 3"]
) -> dict[str, np.ndarray]:
    """Latents of a window's frames, and the condition that its own first frame gives."""
    height, width = frames.shape[1:3]
    video = frames.astype(np.float32) / 127.5 - 1
    arrays = {"latents": np.asarray(pipeline.vae.encode(video[None])[0])}
    config = pipeline.configs["dit"]
    if config.image_dim is not None:
        prepared = prepare(
            frames[0],
            last_picture=None if config.image_positions is None else frames[-1],
            frames=job.frames,
            height=height,
            width=width,
            preprocess=job.preprocess,
            clip_size=pipeline.configs["image_encoder"].image_size,
        )
        tokens = image_tokens(pipeline.image_encoder, prepared.clip)
        condition = picture_condition(pipeline.vae, prepared)
        arrays |= {"image": np.asarray(tokens[0]), "condition": np.asarray(condition[0])}
    return arrays


if __name__ == "__main__":
    run_script(main)
