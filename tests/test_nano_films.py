"""The films that nano's base learns from: the same every time, held out by picture, captioned."""

import itertools
import re
from importlib.util import find_spec

import numpy as np
import pytest

from examples.nano import stills
from examples.nano.stills import PHOTOGRAPHS, TEXTURES, camera_move, photograph_films, shape_films

pytestmark = pytest.mark.skipif(
    not (find_spec("skimage") and find_spec("sklearn")),
    reason="needs the pictures in the packages scikit-image and scikit-learn",
)


def test_a_film_follows_from_its_number_alone():
    few, more = (list(photograph_films(n)) for n in (2, 3))
    for a, b in zip(few, more):
        assert (a.name, a.caption) == (b.name, b.caption) and np.array_equal(a.frames, b.frames)
    other = next(iter(photograph_films(1, seed=1)))
    assert not np.array_equal(few[0].frames, other.frames)


def test_held_out_pictures_are_in_no_film_of_training():
    shown = {p.shows: p.split for p in PHOTOGRAPHS}
    for film in photograph_films(40):
        assert shown[film.caption.partition(", the camera")[0]] == film.split
    held_out = [t.shows for t in TEXTURES if t.split != "train"]
    splits = set()
    for film in shape_films(40):
        splits.add(film.split)
        assert film.split == "test" or not any(name in film.caption for name in held_out)
    assert splits == {"train", "validation", "test"}


@pytest.mark.parametrize("seed", range(12))
def test_the_camera_stays_inside_the_picture(seed):
    """Outside of it all would be black; the picture here is white."""
    from PIL import Image

    rng = np.random.default_rng(seed)
    move = next(m for m in iter(lambda: camera_move(rng), None) if not m.posts)
    film = stills.moves_over(Image.new("RGB", (400, 300), "white"), move, rng)
    assert film.shape == (33, 64, 160, 3) and film.min() == 255


def test_the_picture_moves_as_the_caption_says():
    """A pan to the right moves what is seen to the left, about as far as the words say."""
    noise = np.random.default_rng(0).integers(0, 255, (60, 80, 3), np.uint8)
    from PIL import Image

    picture = Image.fromarray(noise).resize((800, 600), Image.Resampling.BICUBIC)
    film = stills.moves_over(picture, stills.Move("", shift=(0.2, 0)), np.random.default_rng(1))
    first, last = film[0].astype(int), film[-1].astype(int)
    moved = round(0.2 * stills.WIDTH)
    error = {d: np.abs(first[:, 40 + d : 110 + d] - last[:, 40:110]).mean() for d in (0, moved)}
    assert error[moved] < 3 < 10 < error[0]


def test_captions_are_sentences_of_few_words():
    for film in itertools.chain(photograph_films(6), shape_films(6)):
        assert re.fullmatch(r"[\w, ]+(photograph|flat shapes)", film.caption), film.caption
        assert len(film.caption.split()) < 35 and "a orange" not in film.caption
