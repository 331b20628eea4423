"""Prompts' features on disk: found again, apart by encoder and precision, harmless when damaged."""

import os

import jax
import numpy as np
import pytest

import wanjax
from wanjax import prompt_cache
from wanjax.prompt_cache import PromptCache

IDS = np.asarray([7, 8, 1])
FEATURES = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)


def test_what_was_put_is_found_and_nothing_else(tmp_path):
    cache = PromptCache("encoder", "float32", tmp_path)
    assert cache.get(IDS) is None
    cache.put(IDS, FEATURES)
    np.testing.assert_array_equal(cache.get(IDS), FEATURES)
    assert cache.get(IDS + 1) is None
    assert PromptCache("another", "float32", tmp_path).get(IDS) is None
    assert PromptCache("encoder", "bfloat16", tmp_path).get(IDS) is None


@pytest.mark.parametrize(
    ("owner", "name", "value"),
    [
        (wanjax, "__version__", "9"),
        (jax, "__version__", "9"),
        (jax, "default_backend", lambda: "tpu"),
        (prompt_cache, "FORMAT", 9),
    ],
)
def test_what_computes_it_is_part_of_the_key(tmp_path, monkeypatch, owner, name, value):
    PromptCache("encoder", "float32", tmp_path).put(IDS, FEATURES)
    monkeypatch.setattr(owner, name, value)
    assert PromptCache("encoder", "float32", tmp_path).get(IDS) is None


def test_what_was_not_used_for_the_longest_time_goes(tmp_path, monkeypatch):
    cache = PromptCache("encoder", "float32", tmp_path)
    cache.put(IDS, FEATURES)
    size = next(tmp_path.iterdir()).stat().st_size
    monkeypatch.setattr(prompt_cache, "LIMIT", 10 * size)
    for n in range(1, 10):
        cache.put(IDS + n, FEATURES)
        os.utime(cache._path(IDS + n), (n, n))
    assert cache.get(IDS + 1) is not None  # which makes it the newest
    cache.put(IDS + 10, FEATURES)
    found = [n for n in range(11) if cache._path(IDS + n).is_file()]
    assert found == [0, 1, 4, 5, 6, 7, 8, 9, 10]
    another = PromptCache("encoder", "bfloat16", tmp_path)
    another.put(IDS, FEATURES)
    another.put(IDS + 1, FEATURES)
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= 10 * size


def test_a_damaged_entry_is_computed_again(tmp_path):
    cache = PromptCache("encoder", "float32", tmp_path)
    cache.put(IDS, FEATURES)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-5])
    assert cache.get(IDS) is None
    cache.put(IDS, FEATURES)
    np.testing.assert_array_equal(cache.get(IDS), FEATURES)


def test_a_folder_that_cannot_be_written_is_done_without(tmp_path):
    (tmp_path / "file").write_text("")
    cache = PromptCache("encoder", "float32", tmp_path / "file" / "below")
    cache.put(IDS, FEATURES)
    assert cache.get(IDS) is None


@pytest.mark.compiles
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_second_pipeline_does_not_load_the_encoder(tmp_path, monkeypatch, dtype):
    from tests.scripts import write_checkpoint
    from wanjax import Pipeline

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_checkpoint(tmp_path / "ck", only=("dit", "text_encoder"))
    first = Pipeline.load(tmp_path / "ck", dtype=dtype).encode_prompts(["a rabbit", "a bird"])
    second = Pipeline.load(tmp_path / "ck", dtype=dtype)
    monkeypatch.setattr(type(second), "text_encoder", property(lambda _: pytest.fail("loaded")))
    np.testing.assert_array_equal(second.encode_prompts(["a rabbit", "a bird"]), first)
