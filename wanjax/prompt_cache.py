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
from wanjax.user_cache import Bounded, user_cache

FORMAT = 2
LIMIT = 2 << 30


class PromptCache:
    """Features by tokens, for one encoder in one precision; both without padding."""

    def __init__(self, encoder: str, dtype: str, folder: Path | None = None):
        self.folder = folder or user_cache("prompts")
        made_by = f"{FORMAT} {wanjax.__version__} {jax.__version__} {jax.default_backend()}"
        self._kind = f"{made_by} {encoder} {dtype}"
        self._bounded = Bounded(self.folder, "*.safetensors")

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
            self._bounded.added(path.stat().st_size, LIMIT)
        except (UserError, OSError):
            return

    def _path(self, ids: np.ndarray) -> Path:
        key = self._kind.encode() + np.asarray(ids, np.int32).tobytes()
        return self.folder / f"{hashlib.sha256(key).hexdigest()[:32]}.safetensors"
