"""Folders in the user's cache: where they lie, and how they stay small. All may be deleted."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

ROOM = 0.9  # of the limit is left when entries have gone, so that this is not done at every one


def user_cache(kind: str) -> Path:
    """`$XDG_CACHE_HOME/wanjax/KIND`, after the XDG base directory specification; of a user without
    a home, in the system's folder for what is temporary."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not base.is_absolute():
        try:
            base = Path.home() / ".cache"
        except RuntimeError:
            return Path(tempfile.gettempdir()) / f"wanjax-{os.getuid()}" / kind
    return base / "wanjax" / kind


class Bounded:
    """Keeps the files of `folder` that match `pattern` within `limit` bytes: what was not used for
    the longest time goes first. A use is a change of the file's time (`os.utime`)."""

    def __init__(self, folder: Path, pattern: str):
        self._folder, self._pattern = folder, pattern
        self._bytes: int | None = None  # in the folder, once that is known

    def added(self, size: int, limit: int) -> None:
        """Make room, now that there is a new file of `size` bytes. Raises `OSError`."""
        if self._bytes is not None:
            self._bytes += size
            if self._bytes <= limit:
                return
        entries = sorted(self._entries())
        self._bytes = sum(size for _, size, _ in entries)
        if self._bytes <= limit:
            return
        for _, size, file in entries:
            if self._bytes <= ROOM * limit:
                return
            file.unlink(missing_ok=True)
            self._bytes -= size

    def _entries(self) -> Iterator[tuple[int, int, Path]]:
        """When each file was used, its bytes, and where it is."""
        for file in self._folder.glob(self._pattern):
            with suppress(FileNotFoundError):  # another process has just removed it
                found = file.stat()
                yield found.st_mtime_ns, found.st_size, file
