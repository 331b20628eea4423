"""All compiled programs of one command in one file: `sample.py --aot FILE`.

The first run writes it and the next ones load it: on machines that share no folder, on every host
of a pod, where JAX lets only the first write. The entries are those of JAX's own cache, by its own
keys, so that no program is ever run that was compiled for something else; the facts in the header
say by name why a file does not fit. It is a safetensors file: nothing is unpickled, here or by JAX.
Its entries are code all the same: load only what you would run.
"""

import hashlib
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import jax
import jaxlib
import numpy as np
from jax.sharding import Mesh

from wanjax.errors import UserError
from wanjax.outputs import require_writable, whole_file
from wanjax.programs import FLAGS, Cache, cpu, open_with, turn_on
from wanjax.tensor_files import SafetensorsWriter, read_safetensors

FORMAT = "wanjax-programs-1"
Facts = Mapping[str, str]


def facts_of(mesh: Mesh) -> dict[str, str]:
    """What programs for this mesh depend on beside their source."""
    device = mesh.devices.flat[0]
    facts = {
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "platform": f"{device.platform} {device.client.platform_version}",
        "devices": f"{mesh.size} {device.device_kind}",
        "mesh": ",".join(f"{name}={size}" for name, size in mesh.shape.items()),
        **{name: os.environ.get(name, "") for name in FLAGS},
    }
    if device.platform == "cpu":
        facts["CPU"] = hashlib.sha256(cpu().encode()).hexdigest()[:8]
    return facts


@contextmanager
def programs_of(path: Path, facts: Facts) -> Iterator[None]:
    """While this is open, programs come from the file, and else from where they came before. If
    there is no file, it is written at the end with all that was needed, unless the work fails. One
    that does not fit, or is damaged, is left as it is, and a warning says so. Raises `UserError`
    where it could not be written or JAX's cache is turned off."""
    if jax.config.jax_enable_compilation_cache is False:
        raise UserError("--aot needs JAX's cache; unset JAX_ENABLE_COMPILATION_CACHE.")
    write = not path.exists()
    if write:
        require_writable(path)
    file = ProgramFile({} if write else _read(path, facts))
    without = not jax.config.jax_compilation_cache_dir
    before = open_with(lambda place: file.over(None if without else before(place)))
    turn_on(path.parent if without else Path(jax.config.jax_compilation_cache_dir))
    try:
        yield
    finally:
        open_with(before)
    if write and jax.process_index() == 0:
        _write(path, facts, file.used)
    elif file.known and file.missed:
        warnings.warn(
            f"{path} has {len(file.known)} programs and lacks {file.missed} that were needed: they "
            "were compiled anew, and the file is left as it is; for one that has all, use another "
            "name.",
            stacklevel=2,
        )


class ProgramFile:
    """A `Cache` over another: what is `known` comes first, and what was `used` is remembered."""

    def __init__(self, known: Mapping[str, bytes]):
        self.known, self.missed = known, 0
        self.used: dict[str, bytes] = {}
        self._under: Cache | None = None

    def over(self, under: Cache | None) -> "ProgramFile":
        self._under = under
        return self

    @property
    def _path(self) -> str:
        return "a file of programs"  # which JAX wants for its log

    def get(self, key: str) -> bytes | None:
        value = self.known.get(key)
        if value is None:
            self.missed += 1
            value = None if self._under is None else self._under.get(key)
        if value is not None:
            self.used[key] = value
        return value

    def put(self, key: str, value: bytes) -> None:
        self.used[key] = value
        if self._under is not None:
            self._under.put(key, value)


def _read(path: Path, facts: Facts) -> dict[str, bytes]:
    """The programs of a file that fits and is sound; else none, and a warning."""
    try:
        found = read_safetensors(path)
        if found.metadata.get("format") != FORMAT:
            raise UserError(f"{path} is no file of programs")
        made_for, digests = (json.loads(found.metadata[name]) for name in ("facts", "digests"))
        differ = [name for name in facts if made_for.get(name) != facts[name]]
        if differ:
            said = ", ".join(
                f"{name} {made_for.get(name) or 'none'} (here {facts[name] or 'none'})"
                for name in differ
            )
            raise UserError(f"{path} does not fit: it was made for {said}")
        programs = {key: value.tobytes() for key, value in found.tensors.items()}
        if {key: _digest(key, value) for key, value in programs.items()} != digests:
            raise UserError(f"{path} is damaged")
    except (UserError, KeyError, ValueError, AttributeError) as error:
        reason = str(error).rstrip(".") if isinstance(error, UserError) else f"{path} is damaged"
        warnings.warn(
            f"{reason}; everything is compiled anew, and the file is left as it is.", stacklevel=4
        )
        return {}
    return programs


def _write(path: Path, facts: Facts, programs: Mapping[str, bytes]) -> None:
    """A file that cannot be written costs a line."""
    arrays = {key: np.frombuffer(value, np.uint8) for key, value in sorted(programs.items())}
    digests = {key: _digest(key, value) for key, value in programs.items()}
    metadata = {"format": FORMAT, "facts": json.dumps(facts), "digests": json.dumps(digests)}
    header = {key: (array.dtype, array.shape) for key, array in arrays.items()}
    try:
        with (
            whole_file(path, replace=True) as partial,
            SafetensorsWriter(partial, header, metadata) as writer,
        ):
            for key, array in arrays.items():
                writer.write(key, array)
    except UserError as error:
        warnings.warn(str(error), stacklevel=3)


def _digest(key: str, value: bytes) -> str:
    return hashlib.sha256(key.encode() + b"\n" + value).hexdigest()
