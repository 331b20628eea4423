"""The features cache: what goes in comes out, resumed or not; what is not whole is refused."""

import dataclasses
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

from wanjax.data import feature_writer
from wanjax.data import features as module
from wanjax.data.feature_writer import FeatureWriter
from wanjax.data.features import Features, FeatureSpec, Origin
from wanjax.errors import UserError

SPEC = FeatureSpec((2, 4, 6, 16), (12, 8), condition=(2, 4, 6, 20), image=(5, 7))
PRINT = {"checkpoint": "abc", "size": (32, 48), "preprocess": {"name": "official", "clip": 224}}


def origin(index, split="train", **changes):
    """Of window `index`, whose caption has its number."""
    given = {"caption": f"caption ✓ {index}", "film": "ab12", "start": index / 4}
    return Origin(split, **given | {"size": (480, 832), "fps": 24.0} | changes)


def windows(numbers, split="train"):
    return {f"film/é {n}@0": origin(n, split) for n in numbers}


def arrays(index, spec=SPEC):
    """Random features of a window, whose prompt has `index + 1` tokens."""
    random = np.random.default_rng(index)
    shapes = spec.stored | {"text": (index + 1, spec.text[1])}
    dtype = module.DTYPES[spec.dtype]
    return {key: random.normal(size=shape).astype(dtype) for key, shape in shapes.items()}


def fill(writer, numbers=None):
    """Encode what is to be encoded, or of that the windows `numbers`; how much that was."""
    captions = {f"caption ✓ {n}" for n in numbers or ()}
    todo = [n for n in writer.names() if numbers is None or n in windows(numbers)]
    texts = [c for c in writer.captions() if numbers is None or c in captions]
    for caption in texts:
        writer.add_caption(caption, arrays(number_of(caption), writer.spec)["text"])
    for name in todo:
        given = arrays(number_of(name.removesuffix("@0")), writer.spec)
        writer.add(name, **{key: array for key, array in given.items() if key != "text"})
    return len(todo), len(texts)


def number_of(text):
    return int(text.split()[-1])


def written(out, count=7, spec=SPEC):
    writer = FeatureWriter(out, spec, PRINT, windows(range(count)))
    fill(writer)
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
    assert example["source_size"].tolist() == [480, 832] and example["source_fps"] == 24


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_what_goes_in_comes_out(tmp_path, dtype, monkeypatch):
    monkeypatch.setattr(feature_writer, "SHARD_BYTES", 20_000)  # so that there are several shards
    spec = FeatureSpec(SPEC.latents, SPEC.text, SPEC.condition, SPEC.image, dtype)
    named = windows(range(7)) | windows([8, 9], split="validation")
    writer = FeatureWriter(tmp_path / "f", spec, PRINT, named)
    assert fill(writer) == (9, 9)
    writer.finish()
    features = Features.open(tmp_path / "f")
    assert features.spec == spec and features.origins == named
    features.require(PRINT)
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
    spec, named = FeatureSpec((1, 2, 2, 16), (3, 4)), {"a@0": origin(0, caption="c")}
    writer = FeatureWriter(tmp_path / "f", spec, {}, named)
    latents = jnp.linspace(-3, 3, 64).reshape(1, 2, 2, 16)
    writer.add_caption("c", jnp.ones((3, 4)))  # as long as can be
    writer.add("a@0", latents=latents)
    stored = writer.finish().example("a@0")["latents"]
    assert stored.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(stored, np.asarray(latents).astype(ml_dtypes.bfloat16))


def assert_same(one, other):
    assert one.origins == other.origins
    for name in other.names:
        for key, value in other.example(name).items():
            np.testing.assert_array_equal(one.example(name)[key], value)


def test_an_interrupted_run_goes_on(tmp_path):
    first = FeatureWriter(tmp_path / "f", SPEC, PRINT, windows(range(5)))
    assert fill(first, [0, 1, 2]) == (3, 3)
    with pytest.raises(UserError, match=r"f is only half encoded; run the same"):
        Features.open(tmp_path / "f")
    second = FeatureWriter(tmp_path / "f", SPEC, PRINT, windows(range(5)))
    assert second.names() == [f"film/é {n}@0" for n in (3, 4)] and second.changes() == []
    assert fill(second) == (2, 2)
    resumed = second.finish()
    assert_same(resumed, written(tmp_path / "g", 5))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "f").iterdir()}
    third = FeatureWriter(tmp_path / "f", SPEC, PRINT, windows(range(5)))  # nothing left to do
    assert fill(third) == (0, 0) and len(third.finish()) == 5
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "f").iterdir()}


CHANGES = {
    "a new window": (lambda w: w | windows([5]), (1, 1), "1 new: film/é 5@0"),
    "one is gone": (lambda w: without(w, 2), (0, 0), "1 gone: film/é 2@0"),
    "a caption": (lambda w: changed(w, 2, caption="caption ✓ 9"), (0, 1), "1 with another caption"),
    "a caption of another": (
        lambda w: changed(w, 2, caption="caption ✓ 1"),
        (0, 0),
        "1 with another caption: film/é 2@0",
    ),
    "a film": (lambda w: changed(w, 2, film="cd34"), (1, 0), "1 of another film: film/é 2@0"),
    "a place": (lambda w: changed(w, 2, start=0.7), (1, 0), "1 of another film: film/é 2@0"),
    "a split": (lambda w: changed(w, 2, split="test"), (0, 0), "1 of another split: film/é 2@0"),
}


def without(named, number):
    return {name: o for name, o in named.items() if name != f"film/é {number}@0"}


def changed(named, number, **changes):
    name = f"film/é {number}@0"
    return named | {name: dataclasses.replace(named[name], **changes)}


@pytest.mark.parametrize(("change", "encoded", "said"), CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("interrupted", [False, True])
def test_only_what_changed_is_encoded(tmp_path, change, encoded, said, interrupted):
    named = windows(range(5))
    writer = FeatureWriter(tmp_path / "f", SPEC, PRINT, named)
    fill(writer)
    if not interrupted:
        writer.finish()
    writer = FeatureWriter(tmp_path / "f", SPEC, PRINT, change(named))
    if not interrupted:
        assert len(writer.changes()) == 1 and writer.changes()[0].startswith(said)
    assert fill(writer) == encoded
    extended = writer.finish()
    straight = FeatureWriter(tmp_path / "g", SPEC, PRINT, change(named))
    fill(straight)
    assert_same(extended, straight.finish())
    assert {p.name for p in tmp_path.iterdir()} == {"f", "g"}
    assert FeatureWriter(tmp_path / "f", SPEC, PRINT, change(named)).changes() == []


def test_an_extension_that_is_killed_leaves_the_cache(tmp_path, monkeypatch):
    written(tmp_path / "f", 3)
    writer = FeatureWriter(tmp_path / "f", SPEC, PRINT, windows(range(5)))
    fill(writer, [3])
    assert len(Features.open(tmp_path / "f")) == 3  # meanwhile it can be trained on
    writer = FeatureWriter(tmp_path / "f", SPEC, PRINT, windows(range(5)))
    assert fill(writer) == (1, 1)
    rename = os.rename

    def killed(self, target):
        if ".partial-" in self.name:
            raise KeyboardInterrupt
        rename(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            writer.finish()
    assert len(Features.open(tmp_path / "f")) == 3
    (tmp_path / "f").rename(tmp_path / "f.replaced")  # as a kill would leave it
    with pytest.raises(UserError, match="only half encoded; run the same"):
        Features.open(tmp_path / "f")
    writer = FeatureWriter(tmp_path / "f", SPEC, PRINT, windows(range(5)))
    assert fill(writer) == (0, 0) and len(writer.finish()) == 5
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_a_cache_of_other_windows_is_not_replaced(tmp_path):
    written(tmp_path / "f", 3)
    with pytest.raises(
        UserError, match=r"none of the windows asked for, but film/é 0@0, .*another"
    ):
        FeatureWriter(tmp_path / "f", SPEC, PRINT, windows([7, 8]))


def test_a_window_that_could_not_be_encoded_is_missing(tmp_path):
    writer = FeatureWriter(tmp_path / "f", SPEC, PRINT, windows(range(3)))
    fill(writer, [0, 2])
    assert list(writer.finish().names) == ["film/é 0@0", "film/é 2@0"]
    writer = FeatureWriter(tmp_path / "f", SPEC, PRINT, windows(range(3)))
    assert fill(writer) == (1, 1) and len(writer.finish()) == 3


def test_a_cache_of_format_1_can_be_read_and_not_added_to(tmp_path):
    features = written(tmp_path / "f", 3)
    path = tmp_path / "f" / module.MANIFEST
    manifest = json.loads(path.read_text())
    manifest["names"] = {split: list(names) for split, names in manifest.pop("windows").items()}
    path.write_text(json.dumps(manifest | {"format": 1}))
    old = Features.open(tmp_path / "f")
    assert old.names == features.names and old.origins is None
    assert_example(old.source("train")[1], 1)
    with pytest.raises(UserError, match="earlier wanjax and can be trained on, but not added to"):
        FeatureWriter(tmp_path / "f", SPEC, PRINT, windows(range(3)))


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
    named = windows([0])
    writer = FeatureWriter(tmp_path / "f", SPEC, PRINT, named)
    fill(writer)
    if finished:
        writer.finish().require(PRINT)
        with pytest.raises(UserError, match=message):
            Features.open(tmp_path / "f").require(change)
    with pytest.raises(UserError, match=message):
        FeatureWriter(tmp_path / "f", SPEC, PRINT | change, named)
    other = FeatureSpec(SPEC.latents, SPEC.text, SPEC.condition, SPEC.image, "float32")
    with pytest.raises(UserError, match=r'spec\.dtype = "bfloat16"'):
        FeatureWriter(tmp_path / "f", other, PRINT, named)


def test_bad_features_are_refused(tmp_path):
    writer = FeatureWriter(tmp_path / "f", SPEC, PRINT, {"a@0": origin(0)})
    good = arrays(0)
    text = good.pop("text")
    nan = good["latents"].copy()
    nan[0, 0, 0, 0] = np.nan
    with pytest.raises(UserError, match=r"latents of a@0 hold NaN"):
        writer.add("a@0", **good | {"latents": nan})
    with pytest.raises(UserError, match=r"text of a street hold NaN"):
        writer.add_caption("a street", text * np.float32(np.nan))
    with pytest.raises(ValueError, match="text has shape"):
        writer.add_caption("a street", np.ones((13, 8), np.float32))
    with pytest.raises(ValueError, match="image has shape"):
        writer.add("a@0", **good | {"image": good["image"][:1]})
    with pytest.raises(ValueError, match="got"):
        writer.add("a@0", latents=good["latents"])
    assert writer.names() == ["a@0"] and list(tmp_path.iterdir()) == []
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
    manifest.write_text(text.replace('"format": 2', '"format": 0'))
    with pytest.raises(UserError, match="has format 0 and this program reads 1 and 2; remove it"):
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
    writer = FeatureWriter(tmp_path / "f", SPEC, PRINT, windows(range(3)))
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
    again = FeatureWriter(tmp_path / "f", SPEC, PRINT, windows(range(3)))
    assert again.names() == ["film/é 2@0"]
    assert len(again.finish()) == 2


def test_no_network_no_home_no_tensorflow(tmp_path):
    """In a fresh process: nothing is imported early, fetched, or written elsewhere."""
    script = f"""
import socket, sys
from pathlib import Path
def refuse(*_): raise RuntimeError("a connection was tried")
socket.socket.connect = socket.getaddrinfo = refuse
import wanjax.data.feature_writer, wanjax.data.loader
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
