"""Denoised latents on disk, beside the video that they become, until that is whole.

Denoising takes hours where decoding takes seconds: what it gave is written before it is decoded,
with the settings that made it, and the same command goes on from there. Latents that were made with
other settings are refused by name, never silently decoded as if they were this command's.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from wanjax.errors import UserError
from wanjax.outputs import require_space, whole_file
from wanjax.tensor_files import SafetensorsWriter, read_safetensors

FORMAT, VERSION = "wanjax-latents", 1

Latents = Float[np.ndarray, "t h w C"]


def latents_path(video: Path) -> Path:
    """Where the latents of a video lie: `rider.latents.safetensors` beside `rider.mp4`."""
    return video.with_suffix(".latents.safetensors")


def write_latents(path: Path, latents: Latents, settings: Mapping[str, Any]) -> None:
    """Write latents and what made them, whole or not at all; older ones give way."""
    header = {"latents": (np.dtype(np.float32), latents.shape)}
    metadata = {"format": FORMAT, "version": str(VERSION), "settings": json.dumps(settings)}
    with (
        whole_file(path, replace=True) as partial,
        SafetensorsWriter(partial, header, metadata) as writer,
    ):
        writer.write("latents", np.asarray(latents, np.float32))


def settings_of(path: Path) -> dict[str, Any] | None:
    """What made the latents at `path`, if there are any. Raises `UserError` for another file."""
    if not path.exists():
        return None
    file = read_safetensors(path)
    if file.metadata.get("format") != FORMAT or "latents" not in file.tensors:
        raise UserError(f"{path} are not latents of a video; remove it, or choose another --out.")
    return json.loads(file.metadata["settings"])


def read_latents(path: Path, settings: Mapping[str, Any]) -> Latents | None:
    """The latents at `path`, if there are any. Raises `UserError` where these settings did not
    make them, naming the first that differs, or where the file is damaged."""
    made_with = settings_of(path)
    if made_with is None:
        return None
    now = json.loads(json.dumps(settings))
    for name in sorted(made_with.keys() | now.keys()):
        if made_with.get(name) != now.get(name):
            raise UserError(
                f"{path} was denoised with {name}={made_with.get(name)!r} and this command has "
                f"{now.get(name)!r}; use the old value, or remove that file to denoise anew."
            )
    return np.array(read_safetensors(path).tensors["latents"])


def require_room(path: Path, shape: tuple[int, ...]) -> None:
    """Refuse, before any work, a disk on which not even the latents have room."""
    require_space(path, 4 * int(np.prod(shape)))


def digest(*parts: bytes) -> str:
    """A short hash of content, for settings that are files."""
    whole = hashlib.sha256()
    for part in parts:
        whole.update(part)
    return whole.hexdigest()[:16]
