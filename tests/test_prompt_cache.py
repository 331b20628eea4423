"""Prompts' features on disk: found again, apart by encoder and precision, harmless when damaged."""

import numpy as np
import pytest

from wanjax.prompt_cache import PromptCache, default_folder

IDS = np.asarray([7, 8, 1, 0, 0])
FEATURES = np.pad(np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32), ((0, 2), (0, 0)))


def test_what_was_put_is_found_and_nothing_else(tmp_path):
    cache = PromptCache("encoder", "float32", tmp_path)
    assert cache.get(IDS) is None
    cache.put(IDS, FEATURES)
    np.testing.assert_array_equal(cache.get(IDS), FEATURES)
    assert cache.get(IDS + 1) is None
    assert PromptCache("another", "float32", tmp_path).get(IDS) is None
    assert PromptCache("encoder", "bfloat16", tmp_path).get(IDS) is None


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


def test_the_folder_follows_xdg(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "wanjax" / "prompts"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_folder().parts[-3:] == (".cache", "wanjax", "prompts")


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
