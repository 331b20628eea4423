"""What each precision policy costs in exactness: the velocity of 40 layers against fp32.

    python -m benchmarks.precision [--pairs 4]

One random DiT (every parameter randomised, 40 layers, toy width, heads of 128 and of 64) computes
in fp32 and under each policy, here and by diffusers. A figure is the relative L2 error of the
velocity, the mean over `pairs` of inputs; guided is `v_n + 5 (v_p - v_n)`, where what both branches
have in common cancels and their errors do not. What differs from a policy to the next is the
arithmetic: all have the same weights, with bf16 values wherever diffusers' bf16 rounds them.
"""

import argparse
import contextlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from functools import partial

import jax
import numpy as np
import torch

from tests.parity.reference import leaves_of, load_state, relative_error
from tests.parity.test_dit import inputs, ours, reference_model, run_reference
from wanjax import precision
from wanjax.models.dit import DiT, DiTConfig
from wanjax.precision import BF16, Kind, Precision
from wanjax.weights import abstract_network

GUIDANCE = 5.0
GRID = (2, 6, 10)
CONFIG = DiTConfig(
    dim=256, ffn_dim=512, num_layers=40, num_heads=2, text_dim=48, freq_dim=64, image_dim=40
)
HEADS = {128: CONFIG, 64: replace(CONFIG, num_heads=4)}

Velocity = Callable[..., np.ndarray]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--pairs", type=int, default=4, help="pairs of inputs")
    arguments = parser.parse_args()
    for size, config in HEADS.items():
        print(f"\n| heads of {size} | velocity | guided | of diffusers' | guided |")
        print("|---|---|---|---|---|")
        errors = measure(config, arguments.pairs)
        plain, guided = errors["diffusers"]
        for name, (a, b) in errors.items():
            print(
                f"| {name} | {a:.2%} | {b:.2%} | {a / plain:.2f} | {b / guided:.2f} |", flush=True
            )


def measure(
    config: DiTConfig, pairs: int, only: Collection[str] = ()
) -> dict[str, tuple[float, float]]:
    """Error of the velocity and of the guided one, by policy, as means over `pairs` of inputs."""
    reference = round_parameters(reference_model(config))
    exact = compiled(ours(config, reference))
    truth = [guided(exact, *pair(config, seed)) for seed in range(pairs)]
    errors = {}
    for name, build in policies(config, reference).items():
        if only and name not in only:
            continue
        velocity = build()
        found = [guided(velocity, *pair(config, seed)) for seed in range(pairs)]
        each = [[relative_error(f, t) for f, t in zip(*both)] for both in zip(found, truth)]
        errors[name] = tuple(np.mean(each, axis=0))
    return errors


def policies(config: DiTConfig, reference) -> dict[str, Callable[[], Velocity]]:
    """Ours, from the default to what was before there was a table, and diffusers'."""
    leaves = leaves_of(ours(config, reference))
    coarse = {"head": BF16, "patch": BF16}

    def model(residual: str, **changes) -> Velocity:
        with table(changes):
            dit = load_state(abstract_network("dit", config, "bfloat16"), leaves)
        dit.residual = residual
        return compiled(dit)

    def diffusers() -> Velocity:
        halve(reference)
        return lambda *given: run_reference(reference, *given, dtype=torch.bfloat16)

    return {
        "residual float32 (default)": partial(model, "float32"),
        "residual bfloat16": partial(model, "bfloat16"),
        "residual float32, head and patches bf16": partial(model, "float32", **coarse),
        "residual bfloat16, head and patches bf16 (0.1.0)": partial(model, "bfloat16", **coarse),
        "diffusers": diffusers,
    }


@contextlib.contextmanager
def table(changes: dict[Kind, np.dtype]) -> Iterator[None]:
    """Let some kinds of layer be stored and computed otherwise while a network is built."""
    kept = dict(precision.TABLE)
    precision.TABLE.update({kind: Precision(t, t) for kind, t in changes.items()})
    try:
        yield
    finally:
        precision.TABLE.update(kept)


def compiled(dit: DiT) -> Velocity:
    run = jax.jit(lambda dit, *given: dit(*given))
    return lambda *given: np.asarray(run(dit, *given))


def pair(config: DiTConfig, seed: int) -> tuple[tuple, tuple]:
    """Inputs of the two branches of guidance, which differ by their text."""
    latents, _, text, image, condition = inputs(config, batch=1, grid=GRID, seed=seed)
    other = inputs(config, batch=1, grid=GRID, seed=1000 + seed)[2]
    time = np.asarray([[900, 600, 300, 100][seed % 4]], np.float32)
    return tuple((latents, time, t, image, condition) for t in (text, other))


def guided(velocity: Velocity, positive: tuple, negative: tuple) -> tuple[np.ndarray, np.ndarray]:
    towards, away = velocity(*positive), velocity(*negative)
    return towards, away + GUIDANCE * (towards - away)


def round_parameters(reference):
    """bf16 values in every parameter that diffusers' bf16 rounds, so that all have the same."""
    for parameter in coarse_parameters(reference):
        parameter.data = parameter.data.bfloat16().float()
    return reference


def halve(reference) -> None:
    """As `from_pretrained(torch_dtype=bfloat16)`, which keeps some modules in fp32."""
    for parameter in coarse_parameters(reference):
        parameter.data = parameter.data.bfloat16()


def coarse_parameters(reference) -> Iterator[torch.nn.Parameter]:
    for name, parameter in reference.named_parameters():
        if not any(part in name for part in reference._keep_in_fp32_modules):
            yield parameter


if __name__ == "__main__":
    main()
