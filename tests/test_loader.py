"""Batches: every window once an epoch, the same after a resume, on any number of processes."""

import json
from itertools import islice

import ml_dtypes
import numpy as np
import pytest

from tests.test_features import SPEC, assert_example, fill, windows, written
from wanjax.data.feature_writer import FeatureWriter
from wanjax.data.features import Features, FeatureSpec
from wanjax.data.loader import collate, make_loader
from wanjax.errors import UserError
from wanjax.types import Batch

COUNT = 7


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    """Seven windows, each of which is recognised by its latents."""
    held_out = windows(range(COUNT, COUNT + 2), split="validation")
    place = tmp_path_factory.mktemp("cache") / "f"
    writer = FeatureWriter(place, SPEC, {}, windows(range(COUNT)) | held_out)
    fill(writer)
    return writer.finish()


def windows_in(batch, features, split="train"):
    source = features.source(split)
    latents = [source[n]["latents"] for n in range(len(source))]
    return [next(n for n, own in enumerate(latents) if (own == row).all()) for row in batch.latents]


def orders(features, count, **settings):
    loader = make_loader(features, **({"batch": 3, "seed": 0} | settings))
    return [windows_in(batch, features) for batch in islice(loader, count)]


def assert_same(a: Batch, b: Batch):
    for x, y in (
        (a.latents, b.latents),
        (a.condition.text, b.condition.text),
        (a.condition.image, b.condition.image),
        (a.condition.latents, b.condition.latents),
    ):
        np.testing.assert_array_equal(x, y)


def test_a_batch_holds_its_examples(features):
    batch = next(make_loader(features, batch=3, seed=0))
    assert batch.latents.shape == (3, 2, 4, 6, 16)
    assert batch.condition.text.shape == (3, 12, 8)
    assert batch.condition.latents.shape == (3, 2, 4, 6, 20)
    assert batch.condition.image.shape == (3, 5, 7)
    assert batch.latents.dtype == ml_dtypes.bfloat16 and isinstance(batch.latents, np.ndarray)
    for row, number in enumerate(windows_in(batch, features)):
        example = features.source("train")[number]
        assert_example(example, number)
        np.testing.assert_array_equal(batch.condition.text[row], example["text"])
        np.testing.assert_array_equal(batch.condition.image[row], example["image"])
        np.testing.assert_array_equal(batch.condition.latents[row], example["condition"])


def test_every_window_once_an_epoch_in_a_new_order(features):
    stream = sum(orders(features, COUNT), [])  # three epochs of seven in seven batches of three
    epochs = [stream[COUNT * e : COUNT * (e + 1)] for e in range(3)]
    assert all(sorted(epoch) == list(range(COUNT)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_the_seed_decides(features):
    assert orders(features, 9, seed=5) == orders(features, 9, seed=5)
    assert orders(features, 9, seed=5) != orders(features, 9, seed=6)


@pytest.mark.parametrize("taken", [0, 1, 4, 9])
def test_a_restored_state_goes_on_with_the_same_batches(features, taken):
    loader = make_loader(features, batch=3, seed=1)
    for _ in range(taken):
        next(loader)
    state = json.loads(json.dumps(loader.get_state()))
    following = list(islice(loader, 6))
    fresh = make_loader(Features.open(features.path), batch=3, seed=1)
    fresh.set_state(state)
    for ours, expected in zip(islice(fresh, 6), following):
        assert_same(ours, expected)
    loader.set_state(state)  # and backwards, in the same iterator
    assert_same(next(loader), following[0])


@pytest.mark.parametrize("processes", [2, 3, 6])
def test_processes_share_the_same_global_batches(features, processes):
    whole = orders(features, 5, batch=6)
    parts = [orders(features, 5, batch=6, process=p, processes=processes) for p in range(processes)]
    for step in range(5):
        assert sum((part[step] for part in parts), []) == whole[step]


@pytest.mark.parametrize("processes", [1, 2])
def test_batches_in_turn_are_the_rows_of_a_large_one(features, processes):
    """Each process has its rows of every one of them; together they may be more than an epoch."""
    large = sum(orders(features, 14, batch=4), [])
    parts = [
        orders(features, 7, batch=2, accumulate=4, process=p, processes=processes)
        for p in range(processes)
    ]
    rows = [np.concatenate([np.reshape(part[i], (4, -1)) for part in parts], 1) for i in range(7)]
    assert np.ravel(rows).tolist() == large


def test_one_pass_drops_nothing(features):
    taken = orders(features, 99, repeat=False)
    assert [len(batch) for batch in taken] == [3, 3, 1]
    assert sorted(sum(taken, [])) == list(range(COUNT))
    split = make_loader(features, "validation", batch=2, seed=0, repeat=False)
    assert sorted(windows_in(next(split), features, "validation")) == [0, 1]


def test_text_to_video_batches_have_no_image(tmp_path):
    features = written(tmp_path / "f", 2, FeatureSpec(SPEC.latents, SPEC.text))
    batch = collate([features.source()[0], features.source()[1]])
    assert batch.condition.image is None and batch.condition.latents is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch": 8}, r"batch of 8 cannot be filled from the 7 windows of .*f \(train\); choose"),
        ({"batch": 0}, r"batch of 0 cannot"),
        ({"batch": 3, "processes": 2}, r"batch of 3 does not divide among 2 processes; use 2"),
        ({"batch": 6, "data_parallel": 4}, r"batch of 6 .* 4 data-parallel devices; use 4"),
        (
            {"batch": 2, "processes": 2, "repeat": False},
            r"One pass over the 7 windows .* among 2 processes",
        ),
        ({"batch": 2, "split": "val"}, r"no split 'val'"),
    ],
)
def test_what_does_not_divide_is_refused_with_the_numbers(features, settings, message):
    with pytest.raises(UserError, match=message):
        make_loader(features, seed=0, **settings)


def test_a_damaged_shard_is_named_by_the_loader(tmp_path):
    features = written(tmp_path / "f", 3)
    shard = next((tmp_path / "f").glob("*array_record*"))
    data = bytearray(shard.read_bytes())
    data[1000] ^= 0xFF
    shard.write_bytes(data)
    with pytest.raises(UserError, match="cannot be read"):
        next(make_loader(Features.open(features.path), batch=3, seed=0))
