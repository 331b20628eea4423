"""Which networks are on the device: a rule over phases.

A phase names the networks that it needs. Networks stay once they are loaded, unless their weights
and those of the phase that begins would take more than half of the device: the other half is for
the work (decoding 720p81 takes 22 GB). Then those that the phase does not need leave, the largest
first, until the rest fits; they wait in the host's memory, or are read again where that is too
small. Where the platform does not tell its memory (a CPU), all stay.
"""

import warnings
from collections.abc import Callable, Iterable, Set
from functools import cache
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from flax import nnx
from rich.filesize import decimal

Residency = Literal["auto", "stay", "host", "disk"]
PHASES: dict[str, frozenset[str]] = {
    "text": frozenset({"text_encoder"}),
    "picture": frozenset({"image_encoder", "vae"}),
    "denoise": frozenset({"dit"}),
    "decode": frozenset({"vae"}),
}
FOR_WEIGHTS = 0.5  # of a device's memory
FOR_WAITING = 0.8  # of the host's free memory


class Residents:
    """The networks `names`, loaded by `load` when they are first needed, and moved by the rule.

    `size` gives the bytes of one on one device. `policy`: "auto" is the rule; "stay" keeps all on
    the device; "host" and "disk" let everything leave that a phase does not need, to wait in memory
    or to be read again.
    """

    def __init__(
        self,
        names: Iterable[str],
        load: Callable[[str], nnx.Module],
        size: Callable[[str], int],
        policy: Residency = "auto",
    ):
        self._names, self._load, self._size = frozenset(names), load, cache(size)
        self.policy = policy
        self._here: dict[str, nnx.Module] = {}
        self._waiting: dict[str, tuple[nnx.GraphDef, nnx.State, Any]] = {}
        self._needed: frozenset[str] = frozenset()

    @property
    def here(self) -> frozenset[str]:
        """The networks that are on the device now."""
        return frozenset(self._here)

    def enter(self, phase: str) -> None:
        """Begin a phase: what it does not need makes room for what it needs, where it has to."""
        self._needed = self._names & PHASES[phase]
        self._make_room(self._needed)

    def get(self, name: str) -> nnx.Module:
        """A network, on the device."""
        if name not in self._here:
            self._make_room({name} | self._needed & self.here)
            self._here[name] = self._return(name) if name in self._waiting else self._load(name)
        return self._here[name]

    def fit(self, *phases: str) -> bool:
        """Whether the networks of several phases may be on the device together."""
        return self._fit(frozenset().union(*(PHASES[phase] for phase in phases)) & self._names)

    def _make_room(self, needed: Set[str]) -> None:
        if self.policy == "stay":
            return
        memory = 0 if self.policy != "auto" else device_memory()
        for name in self.here - staying(self.here, needed, self._size, memory):
            self._leave(name)

    def _fit(self, names: Set[str]) -> bool:
        if self.policy != "auto":
            return self.policy == "stay"
        return _room(names, self._size, device_memory())

    def _leave(self, name: str) -> None:
        network, size = self._here.pop(name), self._size(name)
        free = host_memory()
        if self.policy == "auto" and free is not None and size > FOR_WAITING * free:
            warnings.warn(
                f"The {name} ({decimal(size)}) leaves the device and finds no room in the host's "
                f"memory ({decimal(free)} free): it will be read again; --residency host keeps it.",
                stacklevel=2,
            )
        elif self.policy != "disk":
            graph, state = nnx.split(network)
            places = jax.tree.map(lambda x: x.sharding, state)
            self._waiting[name] = graph, jax.tree.map(_copy, state), places

    def _return(self, name: str) -> nnx.Module:
        graph, state, places = self._waiting.pop(name)
        return nnx.merge(graph, jax.device_put(state, places))


def staying(
    here: Set[str], needed: Set[str], size: Callable[[str], int], memory: int | None
) -> Set[str]:
    """The networks that are still there in a phase which needs `needed`, on a device of `memory`
    bytes (None: it does not tell): the rule above."""
    here = here | needed
    while (others := here - needed) and not _room(here, size, memory):
        here = here - {max(others, key=size)}
    return here


def _room(names: Set[str], size: Callable[[str], int], memory: int | None) -> bool:
    return memory is None or sum(map(size, names)) <= FOR_WEIGHTS * memory


def _copy(x: jax.Array) -> np.ndarray:
    return np.array(x)  # on a CPU `asarray` would be a view that keeps the device's own alive


def device_memory() -> int | None:
    """Bytes of one device, where the platform tells."""
    stats = jax.local_devices()[0].memory_stats()
    return stats.get("bytes_limit") if stats else None


def host_memory() -> int | None:
    """Bytes that this machine could give, where it tells (Linux does)."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    sizes = dict(line.split(":") for line in lines)
    return int(sizes["MemAvailable"].split()[0]) << 10
