"""Chips that are not here, described well enough to compile for them.

TPUs by any name that libtpu knows (`v6e:2x4`, `tpu7x:2x2x1`), GPUs as `h100:8`. The compilers come
as packages of their own, which `make plan-env` installs; no chip and no driver is touched.
"""

import re
from dataclasses import dataclass

import jax
from jax.experimental import topologies

from wanjax.chips import CHIPS, Chip
from wanjax.errors import UserError, nearest

GPUS_IN_A_HOST = 8


@dataclass(frozen=True)
class Target:
    """Devices to compile for, and what one of them can do."""

    name: str
    chip: Chip | None
    devices: tuple[jax.Device, ...]


@dataclass(frozen=True)
class _Gpu:
    """What XLA's compiler asks of a GPU, by its maker's documents."""

    description: str
    capability: tuple[int, int]
    cores: int
    clock_ghz: float
    threads_per_core: int
    shared_per_core: int
    shared_per_block: int
    l2: int
    fpus_per_core: int = 128


_HOPPER = {
    "capability": (9, 0), "cores": 132, "clock_ghz": 1.98, "threads_per_core": 2048,
    "shared_per_core": 233_472, "shared_per_block": 232_448, "l2": 52_428_800,
}  # fmt: skip
_GPUS = {
    "h100": _Gpu("NVIDIA H100 80GB HBM3", **_HOPPER),
    "h200": _Gpu("NVIDIA H200", **_HOPPER),
    "a100": _Gpu(
        "NVIDIA A100-SXM4-80GB", (8, 0), 108, 1.41, 2048, 167_936, 166_912, 41_943_040, 64
    ),
    "rtx4090": _Gpu(
        "NVIDIA GeForce RTX 4090", (8, 9), 128, 2.52, 1536, 102_400, 101_376, 75_497_472
    ),
}
_CONFIG = """\
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {gpu.shared_per_core}
  threads_per_core_limit: {gpu.threads_per_core}
  core_count: {gpu.cores}
  fpus_per_core: {gpu.fpus_per_core}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {chip.bandwidth:.0f}
  l2_cache_size: {gpu.l2}
  clock_rate_ghz: {gpu.clock_ghz}
  device_memory_size: {chip.memory}
  shared_memory_per_block_optin: {gpu.shared_per_block}
  cuda_compute_capability {{ major: {gpu.capability[0]} minor: {gpu.capability[1]} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 patch: 0 }}
device_description_str: "{gpu.description}"
"""
EXAMPLES = "v6e:2x4, v5p:2x2x2, v5e:2x4, tpu7x:2x2x1, h100:8, h200:1, a100:8, rtx4090:1"


def parse_target(name: str) -> Target:
    """The devices of a target's name. Raises `UserError` for a name that nobody knows, and where
    the compiler for it is not installed."""
    kind, _, count = name.partition(":")
    if kind not in CHIPS:
        raise UserError(f"There is no target '{name}'{nearest(kind, CHIPS)}")
    chip = CHIPS[kind]
    if not chip.is_gpu:
        return Target(name, chip, _tpus(name))
    if not re.fullmatch("[1-9][0-9]*", count or "1"):
        raise UserError(f"The target '{name}' has no number of GPUs; write {kind}:8, for example.")
    return Target(name, chip, _gpus(kind, int(count or 1)))


def _tpus(name: str) -> tuple[jax.Device, ...]:
    try:
        return tuple(topologies.get_topology_desc(name, platform="tpu").devices)
    except Exception as error:
        said = str(error).partition("\n")[0][:160]
        if "libtpu" in said or "Unknown backend" in said or "plugin" in said.lower():
            raise UserError(_no_compiler(name, "libtpu")) from error
        raise UserError(
            f"There is no target '{name}' ({said}); use one such as {EXAMPLES}."
        ) from error


def _gpus(kind: str, count: int) -> tuple[jax.Device, ...]:
    hosts, rest = divmod(count, GPUS_IN_A_HOST)
    if rest and hosts:
        raise UserError(
            f"{count} GPUs are no whole hosts of {GPUS_IN_A_HOST}; use {hosts * GPUS_IN_A_HOST}."
        )
    shape = f"1x{hosts}x{GPUS_IN_A_HOST}" if hosts else f"1x1x{count}"
    config = _CONFIG.format(gpu=_GPUS[kind], chip=CHIPS[kind])
    try:
        topology = topologies.get_topology_desc(
            platform="cuda", target_config=config, topology=shape
        )
    except Exception as error:
        raise UserError(_no_compiler(f"{kind}:{count}", "the CUDA plugin")) from error
    return tuple(topology.devices)


def _no_compiler(name: str, what: str) -> str:
    return (
        f"Compiling for {name} needs {what}, which is not installed here; run `make plan-env` and "
        "start plan.py with .venv-plan/bin/python."
    )
