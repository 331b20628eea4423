"""What chips can do, as their makers publish it: the yardstick of the planner and of speed.

Figures are those of one JAX device, which is a whole chip everywhere but on TPU7x, where a chip is
two devices. Sources: cloud.google.com/tpu/docs (v5e, v5p, v6e, TPU7x) and jax-ml.github.io/
scaling-book for the links; NVIDIA's data sheets of H100 SXM, H200 SXM, A100 SXM 80 GB and RTX 4090,
dense and with fp32 sums.
"""

from dataclasses import dataclass

GIB = 1 << 30
GPU_FRACTION = 0.92
"""The share of a GPU's memory that the scripts ask JAX for, unless the user sets another."""
RESERVE = GIB // 2
"""Bytes of a device left for what no program counts: code, the next batch, gaps."""


@dataclass(frozen=True)
class Chip:
    """One JAX device. `flops` and `link` count a second; `link` is what it sends, one way."""

    name: str
    device_kinds: tuple[str, ...]
    """As `jax.Device.device_kind` has them."""
    flops: float
    """bf16 products with fp32 sums, FLOP/s."""
    bandwidth: float
    """Bytes/s of its memory."""
    link: float
    """Bytes/s to the other chips of its slice or host, all its links together."""
    memory: int
    """Bytes that a program may have: on TPU what the compiler allows, on a GPU the card's."""
    is_gpu: bool = False

    @property
    def capacity(self) -> int:
        """Bytes for a program: what a process gets, less the reserve."""
        share = GPU_FRACTION if self.is_gpu else 1.0
        return int(self.memory * share) - RESERVE


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", ("TPU v5 lite", "TPU v5e"), 197e12, 819e9, 4 * 45e9, int(15.75 * GIB)),
        Chip("v5p", ("TPU v5", "TPU v5p"), 459e12, 2765e9, 6 * 90e9, int(95.74 * GIB)),
        Chip("v6e", ("TPU v6 lite", "TPU v6e"), 918e12, 1640e9, 4 * 90e9, int(31.25 * GIB)),
        Chip("tpu7x", ("TPU7x",), 1153.5e12, 3690e9, 300e9, int(94.75 * GIB)),
        Chip("h100", ("NVIDIA H100 80GB HBM3",), 989.4e12, 3350e9, 450e9, 81_559 << 20, True),
        Chip("h200", ("NVIDIA H200",), 989.4e12, 4800e9, 450e9, 143_771 << 20, True),
        Chip(
            "a100",
            ("NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB PCIe"),
            312e12, 2039e9, 300e9, 81_920 << 20, True,
        ),
        Chip("rtx4090", ("NVIDIA GeForce RTX 4090",), 165.2e12, 1008e9, 32e9, 24_564 << 20, True),
    )
}  # fmt: skip


def chip_of(device_kind: str) -> Chip | None:
    """The chip of a device, where it is known."""
    return next((c for c in CHIPS.values() if device_kind in c.device_kinds), None)
