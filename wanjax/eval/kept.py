"""What was computed of a video, kept on disk from run to run.

An entry is keyed by everything that it depends on: the content of the files, how their frames were
taken, the metric with its networks, and what computes it. Names and dates of files are no part of
it: another file in the place of one is another. The cache lies in `$XDG_CACHE_HOME/wanjax/measured`
and can be deleted at any time. It has at most `LIMIT` bytes.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

import wanjax
from wanjax.errors import UserError
from wanjax.outputs import whole_file
from wanjax.user_cache import Bounded, user_cache

FORMAT = 1
LIMIT = 1 << 30


class Kept:
    """Arrays by what they depend on."""

    def __init__(self, folder: Path | None = None):
        self.folder = folder or user_cache("measured")
        self._bounded = Bounded(self.folder, "*.npy")

    def get(self, key: Mapping[str, object]) -> np.ndarray | None:
        """The array of this key, or None."""
        try:
            path = self._path(key)
            found = np.load(path, allow_pickle=False)
            os.utime(path)  # it was used
        except (OSError, ValueError, EOFError):
            return None  # missing, damaged or out of reach: it is computed again
        return found if np.isfinite(found).all() else None

    def put(self, key: Mapping[str, object], found: np.ndarray) -> None:
        """Keep an array. A cache that cannot be written is done without."""
        try:
            path = self._path(key)
            with whole_file(path, replace=True) as partial, partial.open("wb") as file:
                np.save(file, found, allow_pickle=False)
            self._bounded.added(path.stat().st_size, LIMIT)
        except (UserError, OSError):
            return

    def _path(self, key: Mapping[str, object]) -> Path:
        made_by = [FORMAT, wanjax.__version__, jax.__version__, jax.default_backend()]
        text = json.dumps([made_by, key], sort_keys=True)
        return self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.npy"
