"""Running the scripts, on a checkpoint that is as small as can be: called in the test's own process
or, where the claim is about a process (signals, kills, limits, several devices), started as one.
"""

import contextlib
import hashlib
import importlib
import io
import os
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from wanjax.devices import FRACTION
from wanjax.errors import run_script

ROOT = Path(__file__).resolve().parents[1]
SIZE = ("--frames", 9, "--height", 32, "--width", 48)
# The scripts' programs are compiled quickly and without care for their speed, the same way here and
# in processes. Every figure that is compared is compared between programs compiled alike.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "PYTHONPATH": str(ROOT),
}
# A process that is to be killed reads compiled programs and writes none, so that none is cut off.
READS_PROGRAMS = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1e9"}
_quickly = jax.make_user_context(default_value=None)


@contextlib.contextmanager
def compiled_quickly() -> Iterator[None]:
    """Compile as ENVIRONMENT does, and use no program that was compiled otherwise before."""
    name = "jax_disable_most_optimizations"
    before = jax.config.read(name)
    jax.config.update(name, True)
    try:
        with _quickly(True):
            yield
    finally:
        jax.config.update(name, before)


def call(*words: object, cwd: Path, code: int = 0) -> str:
    """What `run` does, but in this process: its stderr, once it has ended with `code`."""
    name, *arguments = map(str, words[1:] if words[0] == "-m" else words)
    script = importlib.import_module(
        "convert.__main__" if name == "convert" else name.removesuffix(".py")
    )
    said, stop = io.StringIO(), SystemExit(0)
    with _as_a_process(), compiled_quickly(), contextlib.chdir(cwd):
        sys.argv = [name, *arguments]
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
            try:
                run_script(script.main)
            except SystemExit as error:
                stop = error
    assert (stop.code or 0) == code, said.getvalue()
    return said.getvalue()


@contextlib.contextmanager
def _as_a_process() -> Iterator[None]:
    """Give back what a script makes its own: arguments, signals, how warnings are shown, and the
    environment."""
    argv, shown, claimed = sys.argv, warnings.formatwarning, os.environ.get(FRACTION)
    numbers = (signal.SIGINT, signal.SIGTERM)
    handlers = [signal.getsignal(number) for number in numbers]
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning  # pytest would keep them for itself
            yield
    finally:
        sys.argv, warnings.formatwarning = argv, shown
        if claimed is None:
            os.environ.pop(FRACTION, None)
        for number, handler in zip(numbers, handlers):
            signal.signal(number, handler)


def _show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    sys.stderr.write(warnings.formatwarning(message, category, filename, lineno, line))


def last_said(words: Sequence[object]) -> list[str]:
    """A command whose options are given once: what was said last of each."""
    given: dict[str, list[str]] = {}
    for word in map(str, words):
        if word.startswith("--"):
            given.pop(word, None)
        option = word if word.startswith("--") or not given else [*given][-1]
        given.setdefault(option, []).append(word)
    return [word for words in given.values() for word in words]


def write_world(folder: Path) -> None:
    """A checkpoint, two films of 25 frames with captions, and a picture."""
    from PIL import Image

    from wanjax.data.video import write_video

    write_checkpoint(folder / "ck")
    (folder / "clips").mkdir()
    for i in range(2):
        frames = film(i)
        write_video(folder / f"clips/c{i}.mp4", frames)
        (folder / f"clips/c{i}.txt").write_text(f"a street in the rain {i}")
    Image.fromarray(frames[0]).save(folder / "picture.png")


def write_checkpoint(
    folder: Path, seed: int = 0, only: tuple[str, ...] = (), dim: int = 48
) -> None:
    """A native folder of the four networks with random weights; `seed` is the denoiser's."""
    import jax.numpy as jnp

    from examples.toy_tokenizer import train_toy_tokenizer
    from wanjax.models.clip import CLIPVisionConfig
    from wanjax.models.dit import DiTConfig
    from wanjax.models.umt5 import UMT5Config
    from wanjax.models.vae import VAEConfig
    from wanjax.weights import random_network, save_native

    configs = {
        "dit": DiTConfig(
            dim=dim, ffn_dim=64, num_layers=2, num_heads=2, text_dim=24, freq_dim=32, image_dim=32
        ),
        "vae": VAEConfig(base_dim=4, num_res_blocks=1),
        "text_encoder": UMT5Config(
            vocab_size=512, dim=24, attention_dim=24, num_heads=2, ffn_dim=32, num_layers=2
        ),
        "image_encoder": CLIPVisionConfig(
            image_size=28, patch_size=14, dim=32, num_heads=2, num_layers=2, ffn_dim=32
        ),
    }
    networks = {
        name: random_network(name, config, dtype=jnp.float32, seed=seed if name == "dit" else 7)
        for name, config in configs.items()
        if name in (only or configs)
    }
    with tempfile.TemporaryDirectory() as tokenizer:
        train_toy_tokenizer(["a street in the rain at night"], tokenizer)
        save_native(folder, networks, tokenizer=tokenizer)


def film(seed: int, frames: int = 25) -> np.ndarray:
    """A grey wedge that moves, `T 40 64 3`."""
    wedge = np.linspace(0, 255, 40)[:, None, None] + np.arange(64)[:, None] * (seed + 1)
    moving = [(wedge + 4 * k + np.zeros(3)) % 256 for k in range(frames)]
    return np.stack(moving).astype(np.uint8)


def start(
    *words: object,
    cwd: Path,
    environment: Mapping[str, str | None] | None = None,
    largest_file: int | str = "unlimited",
) -> subprocess.Popen:
    """Start `python WORDS` (a script of the project, or -m) in `cwd`; no file grows larger than
    `largest_file` kilobytes. What is None in the `environment` is not in it."""
    first = str(ROOT / str(words[0])) if str(words[0]).endswith(".py") else str(words[0])
    variables = os.environ | ENVIRONMENT | dict(environment or {})
    limit = ("bash", "-c", 'ulimit -f "$0"; exec "$@"', str(largest_file))
    return subprocess.Popen(
        [*limit, sys.executable, first, *map(str, words[1:])],
        cwd=cwd,
        env={name: value for name, value in variables.items() if value is not None},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(
    *words: object, cwd: Path, code: int = 0, environment: Mapping[str, str | None] | None = None
) -> str:
    """Run it to its end, which has to be exit code `code` without a traceback; its stderr."""
    return ended(start(*words, cwd=cwd, environment=environment), code)


def ended(process: subprocess.Popen, code: int) -> str:
    """The stderr of a process, once it has ended as it should."""
    try:
        _, errors = process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.returncode == code, errors
    assert "Traceback" not in errors and "Exception ignored" not in errors, errors
    return errors


def stop_when(
    reached: Callable[[], bool], process: subprocess.Popen, number: signal.Signals, code: int
) -> str:
    """Send a signal as soon as `reached`, and see the process end with `code`; its stderr."""
    limit = time.monotonic() + 240
    while not reached() and process.poll() is None and time.monotonic() < limit:
        time.sleep(0.002)
    process.send_signal(number)
    return ended(process, code)


def listing(folder: Path) -> dict[str, str]:
    """Every file and folder below, with a hash of its content."""
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        if p.is_file()
        else ""
        for p in sorted(folder.rglob("*"))
    }
