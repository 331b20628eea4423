"""The VAE against diffusers' `AutoencoderKLWan`, and its table of names."""

import re
from dataclasses import replace

import numpy as np
import pytest
from flax import nnx

from convert.table import expand
from convert.vae import rows
from tests.parity.reference import from_torch, leaves_of, randomise, relative_error, torch
from tests.tables import from_native, to_native
from wanjax.models.vae import VAE, VAEConfig

pytestmark = pytest.mark.compiles

diffusers = pytest.importorskip("diffusers")

TINY = VAEConfig(
    base_dim=8,
    dim_mult=(1, 2, 3, 3),
    z_dim=4,
    num_res_blocks=1,
    latents_mean=(0.1, -0.2, 0.3, -0.4),
    latents_std=(1.5, 0.5, 2.0, 1.2),
)
MEAN, STD = (np.array(x, np.float32) for x in (TINY.latents_mean, TINY.latents_std))


def blank_reference(config: VAEConfig):
    return diffusers.AutoencoderKLWan(
        base_dim=config.base_dim,
        z_dim=config.z_dim,
        dim_mult=list(config.dim_mult),
        num_res_blocks=config.num_res_blocks,
        temperal_downsample=list(config.temporal_downsample),
        latents_mean=list(config.latents_mean),
        latents_std=list(config.latents_std),
    ).eval()


def random_reference(config: VAEConfig):
    """Random weights, the last convolution's small enough that few pixels are clamped."""
    return scale_pixels(randomise(blank_reference(config)), 0.5)


@torch.no_grad()
def scale_pixels(reference, factor: float):
    for parameter in reference.decoder.conv_out.parameters():
        parameter.mul_(factor)
    return reference


def twin(config: VAEConfig, reference) -> VAE:
    """Ours with the reference's weights."""
    model = nnx.eval_shape(lambda: VAE(config, rngs=nnx.Rngs(0)))
    return from_torch(model, rows(config), "diffusers", 0, reference)


@pytest.fixture(scope="module")
def pair():
    reference = random_reference(TINY)
    return reference, twin(TINY, reference)


def channels_first(x: np.ndarray):
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 1)))


def channels_last(x) -> np.ndarray:
    return np.moveaxis(x.numpy(), 1, -1)


@torch.no_grad()
def encode(reference, video: np.ndarray) -> np.ndarray:
    """Normalised latents as the pipelines of diffusers make them from the mean."""
    mean = reference.encode(channels_first(video)).latent_dist.mode()
    return (channels_last(mean) - MEAN) / STD


@torch.no_grad()
def decode(reference, latents: np.ndarray) -> np.ndarray:
    return channels_last(reference.decode(channels_first(latents * STD + MEAN)).sample)


def random_video(*shape: int) -> np.ndarray:
    return np.random.default_rng(shape[1]).uniform(-1, 1, (*shape, 3)).astype(np.float32)


SIZES = [(1, 1, 24, 40), (1, 5, 40, 24), (2, 9, 24, 40), (1, 13, 16, 56), (1, 33, 24, 40)]


@pytest.mark.parametrize("size", SIZES, ids=lambda s: "x".join(map(str, s)))
def test_encode_and_decode(pair, size):
    reference, model = pair
    video = random_video(*size)
    latents = encode(reference, video)
    assert latents.std() > 0.2
    assert relative_error(model.encode(video), latents) < 1e-5
    # Noise rather than those latents: a decoder's errors must not hide behind small inputs.
    noise = np.random.default_rng(0).standard_normal(latents.shape).astype(np.float32)
    pixels = decode(reference, noise)
    assert (np.abs(pixels) == 1).mean() < 0.03 and pixels.std() > 0.1
    assert relative_error(model.decode(noise), pixels) < 1e-5


def test_other_strides_and_depths():
    """Three stages, time halved at the first only, and Wan's number of blocks."""
    config = replace(TINY, dim_mult=(1, 2, 2), temporal_downsample=(True, False), num_res_blocks=2)
    reference = random_reference(config)
    model = twin(config, reference)
    video = random_video(1, 5, 24, 16)
    latents = encode(reference, video)
    assert latents.shape == (1, 3, 6, 4, 4) and config.stride == (2, 4, 4)
    assert relative_error(model.encode(video), latents) < 1e-5
    assert relative_error(model.decode(latents), decode(reference, latents)) < 1e-5


def test_pixels_are_clamped():
    reference = scale_pixels(random_reference(TINY), 6)
    latents = encode(reference, random_video(1, 1, 24, 40))
    pixels = decode(reference, latents)
    assert (np.abs(pixels) == 1).mean() > 0.1
    ours = twin(TINY, reference).decode(latents)
    assert relative_error(ours, pixels) < 1e-5 and np.abs(ours).max() == 1


def test_export_loads_strictly(pair):
    reference, model = pair
    tensors = from_native(rows(TINY), "diffusers", 0, leaves_of(model))
    assert list(tensors) and tensors.keys() == reference.state_dict().keys()
    fresh = randomise(blank_reference(TINY), seed=1)
    fresh.load_state_dict(
        {k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in tensors.items()}, strict=True
    )
    video = random_video(1, 5, 24, 40)
    latents = encode(reference, video)
    np.testing.assert_array_equal(encode(fresh, video), latents)
    np.testing.assert_array_equal(decode(fresh, latents), decode(reference, latents))


def official_name(name: str, blocks: int) -> str:
    """diffusers' name to the official one, by the rules of the conversion script of diffusers."""
    half, dot, rest = name.partition(".")
    if half in ("quant_conv", "post_quant_conv"):
        return {"quant_conv": "conv1", "post_quant_conv": "conv2"}[half] + dot + rest
    rest = re.sub(r"^up_blocks\.(\d)\.resnets\.(\d)", lambda m: _up(m, blocks), rest)
    rest = re.sub(r"^up_blocks\.(\d)\.upsamplers\.0", lambda m: _up(m, blocks), rest)
    is_residual = "resnets" in name or re.search(r"down_blocks\.\d+\.(norm|conv)", name)
    changes = [("down_blocks.", "downsamples."), ("conv_shortcut", "shortcut")]
    changes += [("mid_block.resnets.0", "middle.0"), ("mid_block.resnets.1", "middle.2")]
    changes += [("mid_block.attentions.0", "middle.1")]
    if is_residual:
        changes += [("norm1", "residual.0"), ("conv1", "residual.2")]
        changes += [("norm2", "residual.3"), ("conv2", "residual.6")]
    else:
        changes += [("norm_out", "head.0"), ("conv_out", "head.2"), ("conv_in", "conv1")]
    for old, new in changes:
        rest = rest.replace(old, new)
    return f"{half}.{rest}"


def _up(match: re.Match, blocks: int) -> str:
    stage, *block = match.groups()
    return f"upsamples.{int(stage) * (blocks + 2) + int(block[0] if block else blocks + 1)}"


@pytest.mark.parametrize("blocks", [1, 2])
def test_both_columns_give_the_same_leaves(blocks):
    config = replace(TINY, num_res_blocks=blocks)
    tensors = {k: v.detach().numpy() for k, v in random_reference(config).state_dict().items()}
    official = {official_name(k, blocks): v for k, v in tensors.items()}
    assert len(official) == len(tensors)
    a = to_native(rows(config), "diffusers", 0, tensors, "the reference")
    b = to_native(rows(config), "official", 0, official, "the reference")
    assert a.keys() == b.keys()
    for name, value in a.items():
        np.testing.assert_array_equal(value, b[name], err_msg=name)


def test_full_size_names_of_diffusers():
    with torch.device("meta"):
        reference = blank_reference(VAEConfig())
    names = [e.theirs for e in expand(rows(VAEConfig()), "diffusers", 0)]
    assert len(names) == len(set(names)) == 194
    assert set(names) == reference.state_dict().keys()
