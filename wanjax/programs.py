"""Compiled programs, kept on disk from run to run: compiling takes minutes, loading a second.

They lie in `$XDG_CACHE_HOME/wanjax/programs`, which may be deleted at any time, and have at most
`LIMIT` bytes. The name of an entry is a hash of JAX's own key (the program, the versions of jaxlib
and of the platform, the devices, the flags) and of what that leaves out: the features of this CPU,
without which a program of another machine dies of an illegal instruction. An entry begins with a
hash of its name and content, so that what is cut off, damaged or renamed is compiled again.

JAX's own cache on disk never repairs an entry that was cut off, and what a kill leaves behind ends
its bound for good. It is what a user gets who names a folder (JAX_COMPILATION_CACHE_DIR).
"""

import hashlib
import os
import stat
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import Protocol

import jax
import jaxlib

from wanjax.errors import UserError
from wanjax.outputs import whole_file
from wanjax.user_cache import Bounded, user_cache

LIMIT = 2 << 30
FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
_CPU = ("model name", "flags", "CPU implementer", "CPU variant", "CPU part", "Features")
_DIGEST = hashlib.sha256().digest_size


def keep_programs() -> None:
    """Let JAX keep what it compiles from now on, unless the user has said where, or that it must
    not. Nothing that can be wrong with the folder ends the run: it costs one line of warning.

    Of several processes that make up one run JAX lets the first alone write: hosts that share no
    folder compile again.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ or jax.config.jax_compilation_cache_dir:
        return
    programs = Programs(user_cache("programs"))
    open_with(lambda _: programs)
    turn_on(programs.folder)


class Cache(Protocol):
    """What JAX asks of a cache."""

    def get(self, key: str) -> bytes | None: ...

    def put(self, key: str, value: bytes) -> None: ...


Opener = Callable[[str], Cache]


def open_with(opener: Opener) -> Opener:
    """Let JAX open its cache so from now on; gives how it did before."""
    from jax._src import compilation_cache  # there is no public place for a cache of one's own

    before = compilation_cache.get_file_cache
    compilation_cache.get_file_cache = lambda path: (opener(path), path)
    compilation_cache.reset_cache()
    return lambda path: before(path)[0]


def turn_on(folder: Path) -> None:
    """Let JAX keep all programs, and nothing beside them, but for what the user has said."""
    settings = {
        "jax_compilation_cache_dir": str(folder),
        # A start is also dozens of small programs: with them nano's takes 6 s, without 10 s.
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        # XLA's own files beside the entries have no bound, and fail the run on a full disk.
        "jax_persistent_cache_enable_xla_caches": "none",
    }
    for name, value in settings.items():
        if not os.environ.get(name.upper()):
            jax.config.update(name, value)


class Programs:
    """A `Cache` in a folder; `get` and `put` never raise."""

    def __init__(self, folder: Path):
        self._path = self.folder = folder  # JAX wants the former
        self._machine = machine()
        self._bounded = Bounded(folder, "*.program")
        self._trusted: bool | None = None
        self._given_up = False
        self._writing = Lock()  # threads share the name of what is half written

    def get(self, key: str) -> bytes | None:
        """What was put under this key on a machine like this one, or None."""
        path = self._file(key)
        try:
            if not self._is_ours() or not path.is_file():
                return None
            entry = path.read_bytes()
        except OSError:
            return None
        digest, value = entry[:_DIGEST], entry[_DIGEST:]
        if digest != _digest(path.name, value):
            return None  # it is compiled again, and replaced
        with suppress(OSError):  # a folder that may only be read
            os.utime(path)  # it was used
        return value

    def put(self, key: str, value: bytes) -> None:
        """Keep a program. Where that cannot be, one line says so."""
        path = self._file(key)
        if self._given_up:
            return
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not self._is_ours():
                raise PermissionError(0, "others may write into it")
            with self._writing, whole_file(path, replace=True) as partial:
                partial.write_bytes(_digest(path.name, value) + value)
            self._bounded.added(path.stat().st_size, LIMIT)
        except (UserError, OSError) as error:
            self._given_up = True
            cause = error.__cause__ if isinstance(error, UserError) else error
            reason = getattr(cause, "strerror", None) or cause
            warnings.warn(
                f"Compiled programs cannot be kept in {self.folder} ({reason}): every start "
                "compiles again; name another folder by JAX_COMPILATION_CACHE_DIR.",
                stacklevel=2,
            )

    def _is_ours(self) -> bool:
        """Whether nobody else can put code there that would be run here."""
        if self._trusted is None and self.folder.exists():
            found = self.folder.stat()
            writable = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
            self._trusted = found.st_uid == os.getuid() and not writable
        return bool(self._trusted)

    def _file(self, key: str) -> Path:
        name = hashlib.sha256(f"{self._machine}\n{key}".encode()).hexdigest()[:32]
        return self.folder / f"{name}.program"


def machine() -> str:
    """What a compiled program depends on beside its source: versions, flags, this CPU."""
    versions = f"jax {jax.__version__} jaxlib {jaxlib.__version__}"
    flags = "\n".join(f"{name}={os.environ.get(name, '')}" for name in FLAGS)
    return f"{versions}\n{flags}\n{cpu()}"


def cpu() -> str:
    """The model of the first core and what it can do."""
    try:
        first = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
    except OSError:
        return " ".join(os.uname())
    lines = (line.partition(":") for line in first.splitlines())
    return "\n".join(f"{k.strip()}:{v}" for k, _, v in lines if k.strip() in _CPU)


def _digest(name: str, value: bytes) -> bytes:
    return hashlib.sha256(name.encode() + b"\n" + value).digest()
