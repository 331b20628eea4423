"""Features of prompts, kept on disk from run to run: umT5 has 11 GB, a prompt's features a few MB.

An entry is keyed by everything that it depends on: the encoder's fingerprint, the precision, and
the prompt's tokens. It lies in `$XDG_CACHE_HOME/wanjax/prompts` and can be deleted at any time.
"""

import hashlib
import os
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from wanjax.errors import UserError
from wanjax.outputs import whole_file
from wanjax.tensor_files import SafetensorsWriter, read_safetensors


def default_folder() -> Path:
    """Where the cache lies, after the XDG base directory specification."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "wanjax" / "prompts"


class PromptCache:
    """Features by tokens, for one encoder in one precision."""

    def __init__(self, encoder: str, dtype: str, folder: Path | None = None):
        self.folder = folder or default_folder()
        self._kind = f"{encoder} {dtype}"

    def get(self, ids: Int[np.ndarray, " L"]) -> Float[np.ndarray, "L C"] | None:
        """The features of these tokens, or None."""
        try:
            path = self._path(ids)
            if not path.is_file():
                return None
            stored = read_safetensors(path).tensors["features"]
        except (UserError, KeyError, OSError):
            return None  # damaged or out of reach: it is computed again
        padded = np.zeros((len(ids), stored.shape[-1]), stored.dtype)
        padded[: len(stored)] = stored
        return padded

    def put(self, ids: Int[np.ndarray, " L"], features: Float[np.ndarray, "L C"]) -> None:
        """Keep features. A cache that cannot be written is done without."""
        length = int(features.any(-1).cumsum().argmax()) + 1
        header = {"features": (features.dtype, features[:length].shape)}
        try:
            with (
                whole_file(self._path(ids), replace=True) as partial,
                SafetensorsWriter(partial, header, {"format": "wanjax-prompt"}) as writer,
            ):
                writer.write("features", np.ascontiguousarray(features[:length]))
        except (UserError, OSError):
            return

    def _path(self, ids: np.ndarray) -> Path:
        key = self._kind.encode() + np.asarray(ids, np.int32).tobytes()
        return self.folder / f"{hashlib.sha256(key).hexdigest()[:32]}.safetensors"
