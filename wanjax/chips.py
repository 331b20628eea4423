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
FP32_REACHED = 0.45
"""The share of `fp32` that the VAE reaches: measured on an H100, assumed for all."""
HOST_LINK = 50e9
"""Bytes/s of one GPU to those of other hosts: 400 Gbit/s, assumed."""
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
    """Bytes of it: on a TPU what its compiler lets a program have, on a GPU what its driver has
    (the H100's was seen, the others' are of the same share of the card's)."""
    reached: float
    """The share of `flops` that a step of the 14B reaches: measured on H100 (docs/benchmarks.md),
    assumed for the others after the rates that are published for their attention kernels."""
    fp32: float
    """fp32 products, FLOP/s: a TPU makes them of six in bf16."""
    is_gpu: bool = False

    @property
    def granted(self) -> int:
        """Bytes that a process gets."""
        return int(self.memory * (GPU_FRACTION if self.is_gpu else 1.0))

    @property
    def capacity(self) -> int:
        """Bytes for a program: what a process gets, less the reserve."""
        return self.granted - RESERVE


def _tpu(
    name: str, kinds: tuple[str, ...], tera: float, giga: float, link: float, gib: float, r: float
) -> Chip:
    return Chip(
        name, kinds, tera * 1e12, giga * 1e9, link * 1e9, int(gib * GIB), r, tera * 1e12 / 6
    )


def _gpu(
    name: str, kinds: tuple[str, ...], tera: float, giga: float, link: float, gib: float, r: float,
    fp32: float,
) -> Chip:  # fmt: skip
    rates = tera * 1e12, giga * 1e9, link * 1e9
    return Chip(name, kinds, *rates, int(gib * GIB), r, fp32 * 1e12, is_gpu=True)


# TFLOP/s, GB/s of the memory and of the links, GiB, the share that is reached; TFLOP/s in fp32.
_ALL = (
    _tpu("v5e", ("TPU v5 lite", "TPU v5e"), 197, 819, 4 * 45, 15.75, 0.8),
    _tpu("v5p", ("TPU v5", "TPU v5p"), 459, 2765, 6 * 90, 95.73, 0.88),
    _tpu("v6e", ("TPU v6 lite", "TPU v6e"), 918, 1640, 4 * 90, 31.24, 0.73),
    _tpu("tpu7x", ("TPU7x",), 1153.5, 3690, 300, 94.74, 0.6),
    _gpu("h100", ("NVIDIA H100 80GB HBM3",), 989.4, 3350, 450, 79.1, 0.58, 67),
    _gpu("h200", ("NVIDIA H200",), 989.4, 4800, 450, 139.7, 0.6, 67),
    _gpu("a100", ("NVIDIA A100-SXM4-80GB",), 312, 2039, 300, 79.1, 0.5, 19.5),
    _gpu("rtx4090", ("NVIDIA GeForce RTX 4090",), 165.2, 1008, 32, 23.6, 0.6, 82.6),
)
CHIPS = {chip.name: chip for chip in _ALL}


def chip_of(device_kind: str) -> Chip | None:
    """The chip of a device, where it is known."""
    return next((c for c in CHIPS.values() if device_kind in c.device_kinds), None)
