"""Features of prompts, kept on disk from run to run: umT5 has 11 GB, a prompt's features a few MB.

An entry is keyed by everything that it depends on: the encoder's fingerprint, the precision, the
prompt's tokens, and what computes it (the platform, and the versions of jax and of wanjax). The
cache lies in `$XDG_CACHE_HOME/wanjax/prompts` and can be deleted at any time. It has at most
`LIMIT` bytes: what was not used for the longest time goes.
"""

import hashlib
import os
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Float, Int

import wanjax
from wanjax.errors import UserError
from wanjax.outputs import whole_file
from wanjax.tensor_files import SafetensorsWriter, read_safetensors

FORMAT = 2
LIMIT = 2 << 30
ROOM = 0.9  # of LIMIT is left when entries have gone, so that this is not done at every prompt


def default_folder() -> Path:
    """Where the cache lies, after the XDG base directory specification."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "wanjax" / "prompts"


class PromptCache:
    """Features by tokens, for one encoder in one precision; both without padding."""

    def __init__(self, encoder: str, dtype: str, folder: Path | None = None):
        self.folder = folder or default_folder()
        made_by = f"{FORMAT} {wanjax.__version__} {jax.__version__} {jax.default_backend()}"
        self._kind = f"{made_by} {encoder} {dtype}"
        self._bytes: int | None = None  # in the folder, once that is known

    def get(self, ids: Int[np.ndarray, " n"]) -> Float[np.ndarray, "n C"] | None:
        """The features of these tokens, or None."""
        try:
            path = self._path(ids)
            if not path.is_file():
                return None
            features = np.array(read_safetensors(path).tensors["features"])
            os.utime(path)  # it was used
        except (UserError, KeyError, OSError):
            return None  # damaged or out of reach: it is computed again
        return features if len(features) == len(ids) else None

    def put(self, ids: Int[np.ndarray, " n"], features: Float[np.ndarray, "n C"]) -> None:
        """Keep features. A cache that cannot be written is done without."""
        header = {"features": (features.dtype, features.shape)}
        try:
            path = self._path(ids)
            with (
                whole_file(path, replace=True) as partial,
                SafetensorsWriter(partial, header, {"format": "wanjax-prompt"}) as writer,
            ):
                writer.write("features", np.ascontiguousarray(features))
            self._make_room(path.stat().st_size)
        except (UserError, OSError):
            return

    def _make_room(self, added: int) -> None:
        """Remove the entries that were not used for the longest time, once there are too many."""
        if self._bytes is not None:
            self._bytes += added
            if self._bytes <= LIMIT:
                return
        entries = [(file, file.stat()) for file in self.folder.glob("*.safetensors")]
        self._bytes = sum(stat.st_size for _, stat in entries)
        if self._bytes <= LIMIT:
            return
        for file, stat in sorted(entries, key=lambda entry: entry[1].st_mtime_ns):
            if self._bytes <= ROOM * LIMIT:
                return
            file.unlink(missing_ok=True)
            self._bytes -= stat.st_size

    def _path(self, ids: np.ndarray) -> Path:
        key = self._kind.encode() + np.asarray(ids, np.int32).tobytes()
        return self.folder / f"{hashlib.sha256(key).hexdigest()[:32]}.safetensors"
