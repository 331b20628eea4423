"""What a process asks for, how speed is told, and memory that runs out as one sentence."""

import os

import jax
import pytest

from tests.scripts import ROOT, run, start
from wanjax import devices
from wanjax.chips import CHIPS, GIB, GPU_FRACTION
from wanjax.devices import FRACTION, Speed, claim_memory, describe_devices, memory_explained
from wanjax.errors import UserError
from wanjax.planning.table import Row, nearest_row
from wanjax.sharding import one_device

ERRORS = {
    "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 13204889600 bytes.": "12.30 GiB",
    "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 12.30GiB.": "12.30 GiB",
    "INTERNAL: Error dispatching computation: Out of memory allocating 1107792264 bytes.": "1.03 G",
    "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 45.38G of 31.25G hbm. "
    "Exceeded hbm capacity by 14.13G.\n\nTotal hbm usage >= 45.88G:\n": "14.13 G",
    "RESOURCE_EXHAUSTED: no number": "",
}


def test_the_share_of_a_gpu_is_set_unless_the_user_has(monkeypatch):
    for name in devices._OF_THE_USER:
        monkeypatch.delenv(name, raising=False)
    claim_memory()
    assert os.environ[FRACTION] == str(GPU_FRACTION)
    monkeypatch.delenv(FRACTION)


@pytest.mark.compiles
def test_no_script_starts_a_device_before_it_has_asked_for_memory(tmp_path):
    """The share is read when JAX's first device starts, which importing a script must not do."""
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import encode, sample, train;"
        "from jax._src.xla_bridge import backends_are_initialized as started;"
        "assert not started(); import jax; jax.devices(); assert started()"
    )
    run("-c", code, cwd=tmp_path)


@pytest.mark.parametrize("name", devices._OF_THE_USER)
def test_what_the_user_has_said_of_memory_stands(monkeypatch, name):
    for other in devices._OF_THE_USER:
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, "0.5")
    claim_memory()
    assert [n for n in devices._OF_THE_USER if n in os.environ] == [name]
    assert os.environ[name] == "0.5"


def test_a_known_chip_has_a_share_and_a_floor():
    speed = Speed(flops=CHIPS["h100"].flops, chip=CHIPS["h100"])
    assert speed.said(2.0) == "model 495 TFLOP/s a device, 50% of the 989 of h100 in bf16"
    assert speed.floor() == "989 TFLOP a device and step, at best 1.00 s"
    assert Speed(2e9, None).said(0.5) == "model 0.004 TFLOP/s a device"
    assert Speed(2e9, None).floor() == ""


def test_the_work_is_shared_by_the_devices():
    assert Speed.of(6e12, one_device()) == Speed(6e12, None)
    mesh = jax.sharding.AbstractMesh((2, 4), ("data", "ulysses"))
    fake = type("Mesh", (), {"size": mesh.size, "devices": one_device().devices})
    assert Speed.of(6e12, fake).flops == 6e12 / 8


def test_what_a_process_got_is_described(monkeypatch):
    assert describe_devices(1) == "1 device (cpu)"
    monkeypatch.setattr(devices, "device_memory", lambda: 73 * GIB)
    assert describe_devices(8) == "8 devices (cpu, 73.0 GiB each)"


@pytest.mark.parametrize("message", ERRORS)
def test_out_of_memory_is_one_sentence(message):
    with (
        pytest.raises(UserError) as caught,
        memory_explained("denoising 81 frames of 1280x720", one_device(), "A takes 3", "use B"),
    ):
        raise jax.errors.JaxRuntimeError(message)
    said = str(caught.value)
    expected = "The memory ran out in denoising 81 frames of 1280x720 on 1 device (cpu), mesh data="
    assert said.startswith(expected) and said.endswith("; A takes 3; use B.") and "\n" not in said
    assert ("were asked for" in said) == bool(ERRORS[message]) and ERRORS[message] in said


def test_the_hosts_memory_counts_and_other_errors_pass():
    mesh = one_device()
    with pytest.raises(UserError, match="memory ran out"), memory_explained("a", mesh, "", "b"):
        raise MemoryError
    for error in (jax.errors.JaxRuntimeError("INTERNAL: a bug"), ValueError("out of memory")):
        with pytest.raises(type(error)), memory_explained("a", mesh, "", "b"):
            raise error


def row(phase: str, size: str, frames: int, target: str, gib: int | None, options: str = "") -> Row:
    peak = None if gib is None else gib * GIB
    return Row(phase, size, frames, target, options, peak, *[None] * 6, compiled_in=1)


def test_the_nearest_row_is_of_the_phase_and_size():
    rows = [
        row("denoise", "720p", 81, "h100:1", 1),
        row("denoise", "480p", 33, "h100:1", 2, "--branches in-turn"),
        row("denoise", "480p", 33, "v6e:2x4", 3),
        row("denoise", "480p", 17, "h100:1", None),
        row("train", "480p", 33, "h100:1", 4),
    ]
    said = nearest_row("denoise", 33, 480, 832, 1, rows)
    assert said == (
        "I2V-14B takes 2.0 GiB of a device to denoise 33 frames of 832x480 on h100:1 with "
        "--branches in-turn"
    )
    assert " 1.0 GiB" in nearest_row("denoise", 81, 704, 1280, 1, rows)
    assert " 3.0 GiB" in nearest_row("denoise", 33, 480, 832, 16, rows)
    assert " 2.0 GiB" in nearest_row(
        "denoise", 17, 480, 832, 1, rows
    )  # what is unknown says nothing
    assert nearest_row("decode", 33, 480, 832, 1, rows) == ""


@pytest.mark.compiles
def test_a_process_that_runs_out_of_memory_says_so(world, tmp_path):
    """The true error of this JAX under a true limit, of 800 MB beside what the start has taken."""
    code = (
        f"import resource, sys; sys.path.insert(0, {str(ROOT)!r}); import jax, sample;"
        "from wanjax.errors import run_script; jax.devices();"
        "held = int(open('/proc/self/statm').read().split()[5]) * resource.getpagesize();"
        "resource.setrlimit(resource.RLIMIT_DATA, (held + (800 << 20),) * 2);"
        "run_script(sample.main)"
    )
    words = ("--checkpoint", world / "ck", "--image", world / "picture.png", "--out", "a.mp4")
    size = ("--frames", 81, "--height", 1280, "--width", 1280)
    process = start("-c", code, "nano", *words, *size, "--steps", 1, cwd=tmp_path)
    _, said = process.communicate(timeout=240)
    assert process.returncode == 2, said
    last = said.splitlines()[-1]
    assert last.startswith("error: The memory ran out in encoding 81 frames of 1280x1280 on 1 dev")
    assert "were asked for" in last and "use --residency host" in last
    assert "Traceback" not in said
    assert not (tmp_path / "a.mp4").exists()
