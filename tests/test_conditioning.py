"""Sizes, masks, and what they share with the official code's formulas."""

import numpy as np
import pytest

from wanjax.conditioning import centre, mask_for, prepare, resize_bicubic, size_for
from wanjax.data.framing import fit
from wanjax.errors import UserError

HD, SD = 720 * 1280, 480 * 832


@pytest.mark.parametrize(
    ("aspect", "hd", "sd"),
    [
        ((1080, 1920), (720, 1280), (464, 832)),
        ((1000, 2390), (608, 1472), (400, 976)),
        ((1000, 1850), (704, 1296), (464, 848)),
        ((512, 512), (960, 960), (624, 624)),
    ],
)
def test_sizes_are_the_official_ones(aspect, hd, sd):
    assert size_for(*aspect, HD) == hd and size_for(*aspect, SD) == sd
    assert size_for(aspect[1], aspect[0], HD) == hd[::-1]


def picture(height=90, width=120, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


def test_the_first_picture_and_grey_frames():
    prepared = prepare(picture(), frames=9, height=32, width=48)
    assert prepared.video.shape == (9, 32, 48, 3) and prepared.clip.shape == (1, 224, 224, 3)
    assert prepared.video[0].any() and not prepared.video[1:].any()
    assert prepared.mask.shape == (3, 4, 6, 4)
    assert prepared.mask[0].all() and not prepared.mask[1:].any()


def test_first_and_last_picture():
    prepared = prepare(picture(), last_picture=picture(seed=1), frames=9, height=32, width=48)
    assert prepared.clip.shape == (2, 224, 224, 3)
    assert prepared.video[-1].any() and not prepared.video[1:-1].any()
    assert prepared.mask[0].all() and not prepared.mask[1].any()
    assert prepared.mask[2, 0, 0].tolist() == [0, 0, 0, 1]


def test_mask_is_the_official_reshape():
    """`m = cat([m[:1] x 4, m[1:]]).view(t, 4)`, written out frame by frame."""
    given = np.asarray([1, 0, 0, 0, 0, 0, 1, 0, 1], np.float32)
    expected = [[1, 1, 1, 1], [0, 0, 0, 0], [0, 1, 0, 1]]
    assert mask_for(given, 1, 1)[:, 0, 0].tolist() == expected


@pytest.mark.parametrize("area", [32 * 48, SD, HD])
def test_a_size_that_wan_would_choose_keeps_all_of_the_picture(area):
    rng = np.random.default_rng(0)
    for tall, wide in rng.integers(30, 3000, (300, 2)).tolist():
        whole = np.broadcast_to(np.uint8(0), (tall, wide, 3))
        height, width = size_for(tall, wide, area)
        if height and width:
            assert centre(whole, height, width).shape == whole.shape


@pytest.mark.parametrize("source", [(90, 400), (400, 90), (128, 128), (1080, 1920), (1920, 1080)])
@pytest.mark.parametrize("target", [(480, 832), (832, 480), (480, 480)])
def test_another_aspect_is_covered_as_in_training(source, target):
    """The ramps across and down say which part of the picture is in the frame."""
    tall, wide = source
    ramps = np.zeros((tall, wide, 3), np.uint8)
    ramps[..., 0] = np.linspace(0, 255, tall)[:, None]
    ramps[..., 1] = np.linspace(0, 255, wide)
    if max(tall * target[1], wide * target[0]) > 1.06 * min(tall * target[1], wide * target[0]):
        with pytest.warns(UserWarning, match="cut off; choose a height and width"):
            prepared = prepare(ramps, frames=1, height=target[0], width=target[1])
    else:
        prepared = prepare(ramps, frames=1, height=target[0], width=target[1])
    trained = fit(ramps[None], *target)[0] / 127.5 - 1
    assert np.abs(prepared.video[0] - trained).max() < 0.06
    whole = prepare(ramps, frames=1, height=tall // 16 * 16, width=wide // 16 * 16)
    np.testing.assert_array_equal(prepared.clip, whole.clip)  # CLIP sees all of it, squashed


def test_a_common_size_of_a_slightly_other_aspect_is_covered_too():
    """16:9 at 832x480, which is 1.73:1: one in forty columns is left out, and none is squashed."""
    wide = np.zeros((1080, 1920, 3), np.uint8)
    assert centre(wide, 480, 832).shape == (1080, 1872, 3)
    assert centre(wide.swapaxes(0, 1), 832, 480).shape == (1872, 1080, 3)


def test_diffusers_squashes_and_says_so():
    with pytest.warns(UserWarning, match="120x90 has another aspect .* it is squashed"):
        prepared = prepare(picture(), frames=1, height=160, width=32, preprocess="diffusers")
    assert prepared.video.shape == (1, 160, 32, 3)


def test_bicubic_keeps_what_it_should():
    flat = np.full((7, 9, 3), 0.25, np.float32)
    np.testing.assert_allclose(resize_bicubic(flat, 31, 4), 0.25, atol=1e-6)
    image = picture().astype(np.float32)
    np.testing.assert_allclose(resize_bicubic(image, 90, 120), image, atol=1e-4)
    edge = np.zeros((8, 8, 3), np.float32)
    edge[:, 4:] = 1
    assert resize_bicubic(edge, 32, 32).max() > 1.01  # no clamp: it overshoots at an edge


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        ({"frames": 10}, "frames=10 is not 4n"),
        ({"frames": 0}, "frames=0"),
        ({"height": 40}, "height=40 is not divisible by 16; use 32"),
        ({"width": 0}, "width=0"),
        ({"preprocess": "oficial"}, "official"),
    ],
)
def test_bad_sizes_name_the_nearest(sizes, says):
    with pytest.raises(UserError, match=says):
        prepare(picture(), **({"frames": 9, "height": 32, "width": 48} | sizes))
