"""Preprocessing of pictures against torch's bicubic and CLIP's own processor."""

import numpy as np
import pytest

from wanjax.conditioning import CLIP_MEAN, CLIP_STD, prepare, resize_bicubic

torch = pytest.importorskip("torch", reason="parity tests compare with PyTorch")
from diffusers.image_processor import VaeImageProcessor  # noqa: E402
from PIL import Image  # noqa: E402
from transformers import CLIPImageProcessor  # noqa: E402


def picture(height, width):
    return np.random.default_rng(height).integers(0, 256, (height, width, 3)).astype(np.uint8)


def torch_bicubic(image: np.ndarray, height: int, width: int) -> np.ndarray:
    x = torch.from_numpy(image).movedim(-1, 0)[None]
    y = torch.nn.functional.interpolate(x, size=(height, width), mode="bicubic")
    return y[0].movedim(0, -1).numpy()


@pytest.mark.parametrize("source", [(37, 53), (224, 224), (301, 97)])
@pytest.mark.parametrize("target", [(16, 48), (224, 224), (112, 80)])
def test_bicubic_equals_torch(source, target):
    image = picture(*source).astype(np.float32) / 127.5 - 1
    got = resize_bicubic(image, *target)
    assert np.abs(got - torch_bicubic(image, *target)).max() <= 2e-5


def test_official_inputs():
    given = picture(61, 143)
    prepared = prepare(given, frames=5, height=32, width=64)
    signed = given.astype(np.float32) / 255 * 2 - 1
    assert np.abs(prepared.video[0] - torch_bicubic(signed, 32, 64)).max() <= 2e-5
    squashed = torch_bicubic(signed, 224, 224) * 0.5 + 0.5
    assert np.abs(prepared.clip[0] - (squashed - CLIP_MEAN) / CLIP_STD).max() <= 1e-4


@pytest.mark.parametrize("size", [(61, 143), (500, 301), (224, 224)])
def test_diffusers_inputs(size):
    given = picture(*size)
    prepared = prepare(given, frames=5, height=32, width=64, preprocess="diffusers")
    image = Image.fromarray(given)
    theirs = VaeImageProcessor(vae_scale_factor=8).preprocess(image, height=32, width=64)
    assert np.abs(prepared.video[0] - theirs[0].movedim(0, -1).numpy()).max() <= 1e-6
    clip = CLIPImageProcessor()(images=image, return_tensors="np").pixel_values[0]
    assert np.abs(prepared.clip[0] - np.moveaxis(clip, 0, -1)).max() <= 1e-5
