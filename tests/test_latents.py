"""Latents are on disk before they are decoded: sample.py killed, or out of room, at its end."""

import json
import signal
from pathlib import Path

import numpy as np
import pytest

import sample
from configs import SampleJob
from tests.scripts import SIZE, ended, film, last_said, run, start, stop_when
from wanjax.errors import UserError
from wanjax.latents import latents_path, read_latents, write_latents
from wanjax.models.vae import VAEConfig
from wanjax.sharding import one_device
from wanjax.tensor_files import read_safetensors

SETTINGS = {"seed": 1, "prompt": "a street", "sigmas": (1.0, 0.0), "image": None}
PICTURE = ("--image", "picture.png", "--prompt", "rain", "--steps", 2, *SIZE)
COMPILES = {"JAX_LOG_COMPILES": "1"}


def words(out: Path, *more: object) -> tuple:
    return ("sample.py", "nano", "--checkpoint", "ck", *PICTURE, "--out", out, *more)


def test_latents_come_back_with_their_settings_only(tmp_path):
    path = latents_path(tmp_path / "rider.mp4")
    assert path.name == "rider.latents.safetensors" and read_latents(path, SETTINGS) is None
    latents = np.random.default_rng(0).standard_normal((3, 4, 6, 16), np.float32)
    write_latents(path, latents, SETTINGS)
    np.testing.assert_array_equal(read_latents(path, dict(SETTINGS)), latents)
    with pytest.raises(UserError, match="was denoised with seed=1 and this command has 2; use the"):
        read_latents(path, SETTINGS | {"seed": 2})
    with pytest.raises(UserError, match="denoised with solver=None and this command has 'euler'"):
        read_latents(path, SETTINGS | {"solver": "euler"})
    write_latents(path, latents + 1, SETTINGS | {"seed": 2})  # older ones give way
    assert read_latents(path, SETTINGS | {"seed": 2})[0, 0, 0, 0] == latents[0, 0, 0, 0] + 1
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(UserError, match="truncated"):
        read_latents(path, SETTINGS)


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory) -> bytes:
    """The video of an unbroken run."""
    out = tmp_path_factory.mktemp("whole") / "o.mp4"
    run(*words(out), cwd=world)
    assert [p.name for p in out.parent.iterdir()] == ["o.mp4"]
    return out.read_bytes()


def test_killed_while_it_decodes(world, whole, tmp_path, monkeypatch):
    out, kept = tmp_path / "o.mp4", tmp_path / "o.latents.safetensors"
    stop_when(kept.exists, start(*words(out), cwd=world), signal.SIGKILL, -signal.SIGKILL)
    assert [p.name for p in tmp_path.iterdir()] == [kept.name]
    assert read_safetensors(kept).tensors["latents"].shape == (3, 4, 6, 16)
    before = kept.read_bytes()

    # Other settings are refused by name, before anything is loaded; what is free is free.
    monkeypatch.chdir(world)
    monkeypatch.setattr(sample.Pipeline, "_network", lambda *_: pytest.fail("loaded a network"))
    changed = {"seed": 5, "steps": 3, "guidance": 2.0, "prompt": "sun", "dtype": "bfloat16"}
    for name, value in changed.items():
        monkeypatch.setattr("sys.argv", last_said(words(out, f"--{name}", value)))
        with pytest.raises(UserError, match=f"was denoised with {name}=.*remove that file"):
            sample.main()
    assert kept.read_bytes() == before

    said = run(*words(out, "--fps", 8), cwd=world, environment=COMPILES)
    assert "jit(_decode)" in said
    assert "jit(denoise_step)" not in said and "jit(_encode" not in said
    assert [p.name for p in tmp_path.iterdir()] == ["o.mp4"]
    again = tmp_path / "again"
    again.mkdir()
    run(*words(again / "o.mp4"), cwd=world)
    assert (again / "o.mp4").read_bytes() == whole


def test_no_room_for_the_video(world, whole, tmp_path):
    """The latents are kept, the message says so, and the same command ends the work."""
    out, kept = tmp_path / "o.mp4", tmp_path / "o.latents.safetensors"
    limit = 7  # kilobytes: more than the latents have and less than the video
    assert len(whole) > limit << 10
    said = ended(start(*words(out), cwd=world, largest_file=limit), code=2)
    assert f"{out} could not be written, the file grew too large" in said
    assert f"its latents are kept in {kept}, from where the same command goes on." in said
    assert [p.name for p in tmp_path.iterdir()] == [kept.name]
    said = run(*words(out), cwd=world, environment=COMPILES)
    assert "jit(denoise_step)" not in said and out.read_bytes() == whole
    assert [p.name for p in tmp_path.iterdir()] == ["o.mp4"]


class Decoder:
    """A pipeline that only decodes."""

    configs, mesh = {"vae": VAEConfig()}, one_device()

    def decode(self, latents):
        return film(0, frames=9) / np.float32(255)


def test_where_latents_cannot_be_kept_there_is_still_the_video(tmp_path):
    (tmp_path / "file").write_text("")
    below = tmp_path / "file" / "o.latents.safetensors"
    latents = np.zeros((3, 4, 6, 16), np.float32)
    with pytest.warns(UserWarning, match="o.latents.safetensors could not be written"):
        sample.keep(below, latents, SETTINGS)
    job = SampleJob(checkpoint=tmp_path, out=tmp_path / "o.mp4")
    sample.finish(Decoder(), job, latents)
    assert job.out.stat().st_size > 0
    nowhere = SampleJob(checkpoint=tmp_path, out=tmp_path / "file" / "o.mp4")
    with pytest.raises(UserError, match="o.mp4 could not be written") as refused:
        sample.finish(Decoder(), nowhere, latents)
    assert "latents are kept" not in str(refused.value)


def test_of_jobs_only_what_is_missing_is_denoised(world, whole, tmp_path):
    lines = [{"out": f"{tmp_path}/{name}.mp4", "seed": seed} for name, seed in (("a", 0), ("b", 1))]
    (tmp_path / "jobs").write_text("\n".join(map(json.dumps, lines)))
    given = words(tmp_path / "unused.mp4")[:-2]
    jobs = (*given, "--jobs", tmp_path / "jobs", "--residency", "host")
    kept = [tmp_path / f"{name}.latents.safetensors" for name in "ab"]
    # On a device that has no room for both, all is denoised before anything is decoded.
    both = lambda: all(path.exists() for path in kept)  # noqa: E731
    stop_when(both, start(*jobs, cwd=world), signal.SIGKILL, -signal.SIGKILL)
    assert {p.name for p in tmp_path.iterdir()} == {"jobs", *(path.name for path in kept)}
    kept[1].unlink()
    said = run(*jobs, cwd=world, environment=COMPILES)
    assert said.count("Finished XLA compilation of jit(denoise_step)") == 1
    assert (tmp_path / "a.mp4").read_bytes() == whole
    assert {p.name for p in tmp_path.iterdir()} == {"jobs", "a.mp4", "b.mp4"}
    # What a run left that was killed between the video and the removal goes with the next.
    kept[0].write_bytes(b"left")
    run(*jobs, cwd=world)
    assert not kept[0].exists()
