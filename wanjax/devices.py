"""What a process gets of its devices, how fast they are, and what is said when memory is out."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import jax
from jax.sharding import Mesh

from wanjax.chips import GIB, GPU_FRACTION, Chip, chip_of
from wanjax.errors import UserError
from wanjax.residency import device_memory

FRACTION = "XLA_CLIENT_MEM_FRACTION"
_OF_THE_USER = (
    FRACTION,
    "XLA_PYTHON_CLIENT_MEM_FRACTION",
    "XLA_PYTHON_CLIENT_PREALLOCATE",
    "XLA_PYTHON_CLIENT_ALLOCATOR",
)
# As GPUs and CPUs say it, and as TPUs do.
_OUT = re.compile(r"RESOURCE_EXHAUSTED|out of memory", re.IGNORECASE)
_ASKED = re.compile(
    r"(?:allocat\w*[^0-9]{0,20}|capacity by )(\d+(?:\.\d+)?)\.? ?([KMGT]i?B?|bytes)"
)


def claim_memory() -> None:
    """Ask JAX for `GPU_FRACTION` of a GPU, of which it takes three quarters by default, unless the
    user has said anything about it. To be called before the first use of a device."""
    if not any(name in os.environ for name in _OF_THE_USER):
        os.environ[FRACTION] = str(GPU_FRACTION)


def describe_devices(count: int) -> str:
    """`8 devices (NVIDIA H100 80GB HBM3, 73.3 GiB each)`; the memory is what this process may have,
    where the platform tells."""
    kind, memory = jax.local_devices()[0].device_kind, device_memory()
    memory = "" if memory is None else f", {memory / GIB:.1f} GiB" + " each" * (count > 1)
    return f"{count} device{'s' * (count > 1)} ({kind}{memory})"


@dataclass(frozen=True)
class Speed:
    """A step's arithmetic by formula (`wanjax.work`): what the model needs, nothing twice."""

    flops: float
    """FLOP of one device."""
    chip: Chip | None

    @classmethod
    def of(cls, flops: float, mesh: Mesh) -> "Speed":
        """A step of `flops` in all on the devices of `mesh`."""
        return cls(flops / mesh.size, chip_of(mesh.devices.flat[0].device_kind))

    def tflops(self, seconds: float) -> float:
        """TFLOP/s of one device."""
        return self.flops / seconds / 1e12

    def said(self, seconds: float) -> str:
        """`model 312 TFLOP/s a device, 32% of the 989 of h100`, for steps that take so long."""
        reached = self.tflops(seconds)
        text = f"model {_three_digits(reached)} TFLOP/s a device"
        if self.chip is None:
            return text
        peak = self.chip.flops / 1e12
        return f"{text}, {reached / peak:.0%} of the {peak:.0f} of {self.chip.name} in bf16"

    def floor(self) -> str:
        """The least time of a step that the chip's peak allows; empty for one that is not known."""
        if self.chip is None:
            return ""
        seconds = self.flops / self.chip.flops
        amount = _three_digits(self.flops / 1e12)
        return f"{amount} TFLOP a device and step, at best {seconds:.2f} s"


def _three_digits(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


@contextmanager
def memory_explained(what: str, mesh: Mesh, known: str, remedy: str) -> Iterator[None]:
    """Turn "out of memory", of a device or of the host, into a sentence: `what` was done, what is
    `known` of its need (a row of the planning table), and a `remedy`. Raises `UserError`."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        if not (isinstance(error, MemoryError) or _OUT.search(str(error))):
            raise
        asked = _asked(str(error))
        axes = ",".join(f"{name}={size}" for name, size in mesh.shape.items())
        raise UserError(
            f"The memory ran out in {what} on {describe_devices(mesh.size)}, mesh {axes}"
            f"{asked and ', where ' + asked + ' more were asked for'}"
            f"{known and '; ' + known}; {remedy}."
        ) from error


def _asked(text: str) -> str:
    """How much was asked for in vain, as far as the message tells."""
    found = _ASKED.search(text)
    if found is None:
        return ""
    number, unit = found.groups()
    return f"{float(number) / GIB:.2f} GiB" if unit == "bytes" else f"{number} {unit}"
