"""The true programs of I2V-14B at full size (`wanjax.planning.traces`), for tests to read.

`python -m tests.real_size` prints what they would send on eight virtual devices.
"""

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import replace

import jax
from jax.extend.core import jaxprs_in_params
from jax.sharding import Mesh

from wanjax.denoising import Branches
from wanjax.models.dit import DiTConfig
from wanjax.planning import traces
from wanjax.planning.wire import collectives
from wanjax.quantisation import UNQUANTISED, Base
from wanjax.sharding import make_mesh
from wanjax.training import TrainConfig

# Latents of the published sizes; a token is a patch of 1 x 2 x 2.
GRIDS = {
    "720p81": (21, 90, 160),
    "720p33": (9, 90, 160),
    "480p81": (21, 60, 104),
    "480p33": (9, 60, 104),
}
CONFIG = DiTConfig()
LORA = TrainConfig()


def tokens(size: str) -> int:
    t, h, w = GRIDS[size]
    return t * (h // 2) * (w // 2)


def trace_denoise_step(
    size: str,
    mesh: Mesh | None = None,
    *,
    config: DiTConfig = CONFIG,
    branches: Branches = "together",
    base: Base = UNQUANTISED,
) -> jax.stages.Traced:
    """One guided step in bf16."""
    return traces.denoise(config, GRIDS[size], mesh, branches=branches, base=base).traced


def trace_train_step(
    size: str,
    mesh: Mesh | None = None,
    *,
    batch: int = 1,
    settings: TrainConfig = LORA,
    config: DiTConfig = CONFIG,
) -> jax.stages.Traced:
    """One step of training adapters (or all weights) as the settings say, on `batch` windows at
    once."""
    return traces.train(config, GRIDS[size], replace(settings, batch=batch), mesh).traced


def equations(jaxpr) -> Iterator:
    """Every equation of a jaxpr and of those inside it."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner)


def main() -> None:
    """Print what each program would send on eight (virtual) devices, a JSON line a program."""
    mesh = make_mesh(data=2, ulysses=4)
    traced = {
        "denoise": trace_denoise_step("480p33", mesh),
        "lora": trace_train_step("480p33", mesh, batch=2),
        "save_attention": trace_train_step(
            "480p33", mesh, batch=2, settings=TrainConfig(remat="save_attention")
        ),
    }
    for name in sys.argv[1:] or traced:
        text = traced[name].lower().compile().as_text()
        found = [(kind, shapes, times) for kind, shapes, _, times in collectives(text)]
        print(json.dumps({"program": name, "collectives": found}), flush=True)


if __name__ == "__main__":
    # The partitioned program is wanted, not good code for it.
    os.environ["XLA_FLAGS"] = (
        "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    )
    main()
