"""The features cache: what goes in comes out, resumed or not; what is not whole is refused."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from wanjax.data import features as module
from wanjax.data.features import Features, FeatureSpec, FeatureWriter
from wanjax.errors import UserError

SPEC = FeatureSpec((2, 4, 6, 16), (12, 8), condition=(2, 4, 6, 20), image=(5, 7))
PRINT = {"checkpoint": "abc", "size": (32, 48), "preprocess": {"name": "official", "clip": 224}}


def arrays(index, spec=SPEC):
    """Random features of a window, whose prompt has `index + 1` tokens."""
    random = np.random.default_rng(index)
    shapes = spec.stored | {"text": (index + 1, spec.text[1])}
    dtype = module.DTYPES[spec.dtype]
    return {key: random.normal(size=shape).astype(dtype) for key, shape in shapes.items()}


def fill(writer, numbers, split="train"):
    for n in numbers:
        writer.add(f"film/é {n}@0", split, f"caption ✓ {n}", **arrays(n, writer.spec))


def written(out, count=7, spec=SPEC):
    writer = FeatureWriter(out, spec, PRINT)
    fill(writer, range(count))
    return writer.finish()


def assert_example(example, number, spec=SPEC):
    expected = arrays(number, spec)
    text = expected.pop("text")
    for key, array in expected.items():
        assert example[key].dtype == array.dtype
        np.testing.assert_array_equal(example[key], array)
    np.testing.assert_array_equal(example["text"][: len(text)], text)
    assert example["text"].shape == spec.text and not example["text"][len(text) :].any()
    assert (example["name"], example["caption"]) == (f"film/é {number}@0", f"caption ✓ {number}")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_what_goes_in_comes_out(tmp_path, dtype, monkeypatch):
    monkeypatch.setattr(module, "SHARD_BYTES", 20_000)  # so that there are several shards
    spec = FeatureSpec(SPEC.latents, SPEC.text, SPEC.condition, SPEC.image, dtype)
    writer = FeatureWriter(tmp_path / "f", spec, PRINT)
    fill(writer, range(7))
    fill(writer, [8, 9], split="validation")
    writer.finish()
    features = Features.open(tmp_path / "f")
    assert features.spec == spec and features.fingerprint == json.loads(json.dumps(PRINT))
    assert features.splits == {"train": 7, "validation": 2} and len(features) == 9
    assert len(list((tmp_path / "f").glob("*train*"))) > 1
    assert len(features.source("train")) == 7
    for n in range(7):
        assert_example(features.source("train")[n], n, spec)
    for n in (3, 9):
        assert_example(features.example(f"film/é {n}@0"), n, spec)
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_text_to_video_has_neither_image_nor_condition(tmp_path):
    features = written(tmp_path / "f", 2, FeatureSpec(SPEC.latents, SPEC.text))
    example = features.example("film/é 1@0")
    assert example["image"] is None and example["condition"] is None


def test_jax_arrays_of_another_type_are_cast(tmp_path):
    writer = FeatureWriter(tmp_path / "f", FeatureSpec((1, 2, 2, 16), (3, 4)), {})
    latents = jnp.linspace(-3, 3, 64).reshape(1, 2, 2, 16)
    writer.add("a@0", "train", "c", latents=latents, text=jnp.ones((2, 4)))
    stored = writer.finish().example("a@0")["latents"]
    assert stored.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(stored, np.asarray(latents).astype(ml_dtypes.bfloat16))


def test_an_interrupted_run_goes_on(tmp_path):
    first = FeatureWriter(tmp_path / "f", SPEC, PRINT)
    fill(first, [0, 1, 2])
    with pytest.raises(UserError, match=r"f is only half encoded; run the same"):
        Features.open(tmp_path / "f")
    second = FeatureWriter(tmp_path / "f", SPEC, PRINT)
    assert [second.done(f"film/é {n}@0") for n in range(5)] == [True] * 3 + [False] * 2
    fill(second, [3, 4])
    resumed = second.finish()
    straight = written(tmp_path / "g", 5)
    assert resumed.names == straight.names
    for name in straight.names:
        for key, value in straight.example(name).items():
            np.testing.assert_array_equal(resumed.example(name)[key], value)
    third = FeatureWriter(tmp_path / "f", SPEC, PRINT)  # nothing left to do
    assert third.done("film/é 4@0") and len(third.finish()) == 5
    with pytest.raises(UserError, match=r"f is finished and has no new@0"):
        third.add("new@0", "train", "c", **arrays(0))


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"checkpoint": "def"}, r'checkpoint = "abc" and now it is "def"; restore that, or'),
        ({"preprocess": {"name": "diffusers", "clip": 224}}, r'preprocess\.name = "official"'),
        ({"size": (48, 48)}, r"size = \[32, 48\] and now it is \[48, 48\]"),
    ],
)
def test_another_fingerprint_is_refused_by_name(tmp_path, finished, change, message):
    writer = FeatureWriter(tmp_path / "f", SPEC, PRINT)
    fill(writer, [0])
    if finished:
        writer.finish().require(PRINT)
        with pytest.raises(UserError, match=message):
            Features.open(tmp_path / "f").require(change)
    with pytest.raises(UserError, match=message):
        FeatureWriter(tmp_path / "f", SPEC, PRINT | change)
    other = FeatureSpec(SPEC.latents, SPEC.text, SPEC.condition, SPEC.image, "float32")
    with pytest.raises(UserError, match=r'spec\.dtype = "bfloat16"'):
        FeatureWriter(tmp_path / "f", other, PRINT)


def test_bad_features_are_refused(tmp_path):
    writer = FeatureWriter(tmp_path / "f", SPEC, PRINT)
    good = arrays(0)
    nan = good["latents"].copy()
    nan[0, 0, 0, 0] = np.nan
    with pytest.raises(UserError, match=r"latents of a@0 hold NaN"):
        writer.add("a@0", "train", "c", **good | {"latents": nan})
    with pytest.raises(ValueError, match="text has shape"):
        writer.add("a@0", "train", "c", **good | {"text": np.ones((13, 8), np.float32)})
    with pytest.raises(ValueError, match="image has shape"):
        writer.add("a@0", "train", "c", **good | {"image": good["image"][:1]})
    with pytest.raises(ValueError, match="got"):
        writer.add("a@0", "train", "c", latents=good["latents"], text=good["text"])
    assert not writer.done("a@0")
    with pytest.raises(UserError, match="Nothing was encoded"):
        writer.finish()
    with pytest.raises(UserError, match="feature type 'bf16'; did you mean 'bfloat16'"):
        FeatureSpec(SPEC.latents, SPEC.text, dtype="bf16")


def test_what_is_not_a_whole_cache_is_refused(tmp_path):
    with pytest.raises(UserError, match="does not exist; make one by encode.py"):
        Features.open(tmp_path / "absent")
    (tmp_path / "foreign").mkdir()
    with pytest.raises(UserError, match="foreign is no features cache"):
        Features.open(tmp_path / "foreign")
    written(tmp_path / "f", 3)
    shard = next((tmp_path / "f").glob("*array_record*"))
    data = shard.read_bytes()
    shard.write_bytes(data[:-100])
    with pytest.raises(UserError, match=rf"{shard.name} has [\d,]+ of its [\d,]+ bytes; copy"):
        Features.open(tmp_path / "f")
    shard.unlink()
    with pytest.raises(UserError, match=rf"{shard.name} has none of its"):
        Features.open(tmp_path / "f")
    shard.write_bytes(data)
    assert len(Features.open(tmp_path / "f")) == 3
    manifest = tmp_path / "f" / module.MANIFEST
    text = manifest.read_text()
    manifest.write_text(text.replace('"format": 1', '"format": 0'))
    with pytest.raises(UserError, match="has format 0 and this program reads 1; encode again"):
        Features.open(tmp_path / "f")
    manifest.write_text(text[:50])
    with pytest.raises(UserError, match=r"wanjax\.json is damaged"):
        Features.open(tmp_path / "f")


def test_a_flipped_byte_is_found(tmp_path):
    features = written(tmp_path / "f", 3)
    shard = next((tmp_path / "f").glob("*array_record*"))
    data = bytearray(shard.read_bytes())
    data[1000] ^= 0xFF  # within the first of the records
    shard.write_bytes(data)
    features = Features.open(tmp_path / "f")
    with pytest.raises(UserError, match=r"Window \d in .*f cannot be read .*encode it again"):
        [features.source("train")[n] for n in range(3)]


def test_mistyped_names_get_the_nearest(tmp_path):
    features = written(tmp_path / "f", 3)
    with pytest.raises(UserError, match=r"no split 'trian'; did you mean 'train'"):
        features.source("trian")
    with pytest.raises(UserError, match=r"no window 'film/é 1'; did you mean"):
        features.example("film/é 1")


def test_a_full_disk_keeps_what_was_encoded(tmp_path):
    writer = FeatureWriter(tmp_path / "f", SPEC, PRINT)
    fill(writer, [0, 1])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # stands in for a full disk
    try:
        with pytest.raises(UserError, match="could not be written"):
            fill(writer, [2])
        with pytest.raises(UserError, match="could not be written"):
            writer.finish()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [p.name for p in tmp_path.iterdir()] == ["f.staging"]
    again = FeatureWriter(tmp_path / "f", SPEC, PRINT)
    assert [again.done(f"film/é {n}@0") for n in range(3)] == [True, True, False]
    assert len(again.finish()) == 2


def test_no_network_no_home_no_tensorflow(tmp_path):
    """In a fresh process: nothing is imported early, fetched, or written elsewhere."""
    script = f"""
import socket, sys
from pathlib import Path
def refuse(*_): raise RuntimeError("a connection was tried")
socket.socket.connect = socket.getaddrinfo = refuse
import wanjax.data.features, wanjax.data.loader
assert "tensorflow_datasets" not in sys.modules
from tests.test_features import written, assert_example
out = Path({str(tmp_path / "f")!r})
features = written(out, 3)
for n in range(3):
    assert_example(features.example(f"film/é {{n}}@0"), n)
assert "tensorflow" not in sys.modules
"""
    (tmp_path / "home").mkdir()
    environment = os.environ | {"HOME": str(tmp_path / "home"), "JAX_PLATFORMS": "cpu"}
    root = Path(__file__).resolve().parents[1]
    subprocess.run([sys.executable, "-c", script], cwd=root, env=environment, check=True)
    assert list((tmp_path / "home").iterdir()) == []
