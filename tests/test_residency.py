"""Which networks are on the device: by the rule, by hand, and with the same bits afterwards."""

import gc
import math
import warnings
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from tests.scripts import write_checkpoint
from wanjax import Pipeline, residency
from wanjax.precision import F32
from wanjax.residency import PHASES, Residents
from wanjax.weights import abstract_network, device_bytes, parameters, read_config

SIZES = {"dit": 33, "text_encoder": 11, "image_encoder": 1, "vae": 1}
PICTURE = np.linspace(0, 255, 40 * 64 * 3).reshape(40, 64, 3).astype(np.uint8)
PROMPTS = ("a street in the rain", "a night without rain")
REQUEST = {"image": PICTURE, "frames": 5, "height": 32, "width": 48}
REQUEST |= {"steps": 1, "guidance": 1.0}


class Fake(nnx.Module):
    """A network that is only a name."""


def walk(monkeypatch, memory: int | None, policy: str = "auto", times: int = 2) -> list[str]:
    """Which networks lie on the device in each phase of so many videos; and what was loaded."""
    monkeypatch.setattr(residency, "device_memory", lambda: memory)
    loads: Counter[str] = Counter()

    def load(name: str) -> Fake:
        loads[name] += 1
        return Fake()

    held = Residents(SIZES, load, SIZES.get, policy)
    monkeypatch.setattr(held, "_leave", lambda name: held._here.pop(name))
    seen = []
    for phase in ("text", "picture", "denoise", "decode") * times:
        held.enter(phase)
        for name in sorted(PHASES[phase]):
            held.get(name)
            assert PHASES[phase] & held.here >= {name}
        assert PHASES[phase] <= held.here
        if memory is not None and policy == "auto" and len(held.here) > len(PHASES[phase]):
            assert 2 * sum(SIZES[name] for name in held.here) <= memory
        seen.append("".join(sorted(name[0] for name in held.here)))
    return [*seen, str(sum(loads.values()))]


def test_the_rule(monkeypatch):
    """d dit, i image_encoder, t text_encoder, v vae; phases text, picture, denoise, decode."""
    # Everything has room, or the platform does not say: all stay, nothing is loaded twice.
    for memory in (100, None):
        assert walk(monkeypatch, memory) == ["t", "itv", "ditv", *["ditv"] * 5, "4"]
    # Of 80: umT5 and the DiT do not fit in half of it, the DiT and the VAE do.
    assert walk(monkeypatch, 80)[:4] == ["t", "itv", "div", "div"]
    assert walk(monkeypatch, 80)[4:8] == ["itv", "itv", "div", "div"]
    # Of 48 the DiT alone is more than half.
    assert walk(monkeypatch, 48, times=1) == ["t", "itv", "d", "v", "5"]
    # Of 20 each phase has only its own.
    assert walk(monkeypatch, 20, times=1) == ["t", "iv", "d", "v", "5"]
    # By hand.
    assert walk(monkeypatch, 20, "stay", times=1) == ["t", "itv", "ditv", "ditv", "4"]
    assert walk(monkeypatch, None, "host", times=1) == ["t", "iv", "d", "v", "5"]


def test_phases_that_fit_together(monkeypatch):
    fit = lambda policy="auto": Residents(SIZES, Fake, SIZES.get, policy).fit("denoise", "decode")  # noqa: E731
    for memory, together in ((None, True), (80, True), (60, False)):
        monkeypatch.setattr(residency, "device_memory", lambda m=memory: m)
        assert fit() == together and fit("stay") and not fit("host") and not fit("disk")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("residency") / "ck"
    write_checkpoint(path)
    return path


def test_sizes_are_those_of_the_weights(folder):
    for name, config in read_config(folder).items():
        exact = parameters(abstract_network(name, config, "float32")).values()
        assert device_bytes(name, config, F32) == sum(4 * math.prod(v.shape) for v in exact)


def on_device() -> int:
    """Bytes of all living arrays."""
    gc.collect()
    return sum(x.nbytes for x in jax.live_arrays())


@pytest.fixture(scope="module")
def roomy(folder):
    """A pipeline whose networks all stay, and what it makes of two requests."""
    jax.config.update("jax_disable_most_optimizations", True)
    pipeline = Pipeline.load(folder, dtype="float32")
    videos = [pipeline.sample(**REQUEST, prompt=prompt) for prompt in PROMPTS]
    assert pipeline.residents.here == set(SIZES)
    yield pipeline, videos
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.mark.parametrize("policy", ["auto", "host", "disk", "too small a host"])
def test_two_videos_on_a_small_device(folder, roomy, policy, monkeypatch, tmp_path):
    """No second network beside the denoiser, in either; the same videos as where all have room."""
    other, expected = roomy
    sizes = {name: other.residents._size(name) for name in SIZES}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # prompts that nobody has encoded
    monkeypatch.setattr(residency, "device_memory", lambda: 2 * sizes["dit"])
    read, beside = Counter(), set()

    def spied(self, name, load=Pipeline._load):
        read.update([name])
        return load(self, name)

    def watched(self, name, get=Residents.get):
        network = get(self, name)
        beside.add(self.here)
        return network

    monkeypatch.setattr(Pipeline, "_load", spied)
    monkeypatch.setattr(Residents, "get", watched)
    if policy == "too small a host":
        monkeypatch.setattr(residency, "host_memory", lambda: 1000)
    before = on_device()
    residency_of = "auto" if " " in policy else policy
    pipeline = Pipeline.load(folder, dtype="float32", residency=residency_of)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for prompt, video in zip(PROMPTS, expected):
            np.testing.assert_array_equal(pipeline.sample(**REQUEST, prompt=prompt), video)
            # The weights of the others have really left (the rest are features of the prompts).
            assert on_device() - before <= sizes["vae"] + (192 << 10) < sizes["vae"] + sizes["dit"]
    assert {"dit"} in beside and len(beside) > 3
    assert all(names == {"dit"} for names in beside if "dit" in names), beside
    # The picture is the same, so CLIP has run once.
    again = 2 if policy in ("disk", "too small a host") else 1
    assert read["dit"] == read["text_encoder"] == again and read["image_encoder"] == 1
    assert any("will be read again" in str(w.message) for w in said) == (" " in policy)


def test_a_known_picture_is_not_encoded_again(roomy, monkeypatch):
    pipeline, _ = roomy
    encode = "wanjax.pipeline.image_tokens"
    monkeypatch.setattr(encode, lambda *_: pytest.fail("encoded again"))
    request = {name: REQUEST[name] for name in ("image", "frames", "height", "width")}
    first = pipeline.condition(**request, prompt=PROMPTS[0])
    monkeypatch.setattr(encode, lambda _, x: np.zeros_like(first.positive.image))
    other = pipeline.condition(**request | {"image": PICTURE[::-1]}, prompt=PROMPTS[0])
    assert first.positive.image.any() and not other.positive.image.any()
