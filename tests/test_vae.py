"""What must hold of the VAE without a reference: names, streaming, types, refusals."""

import math
from dataclasses import replace
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from convert.vae import rows
from tests.programs import products
from tests.tables import from_native
from wanjax.causal import Memory, _convolve, _convolve_frames
from wanjax.errors import UserError
from wanjax.models.vae import VAE, VAEConfig, _check_video, tiles

pytestmark = pytest.mark.compiles
quickly = pytest.mark.usefixtures("quickly")

TINY = VAEConfig(
    base_dim=8,
    dim_mult=(1, 2, 2),
    z_dim=4,
    num_res_blocks=1,
    temporal_downsample=(True, True),
    latents_mean=(0.1, -0.2, 0.3, -0.4),
    latents_std=(1.5, 0.5, 2.0, 1.2),
)

MINUTE = replace(TINY, dim_mult=(1, 2), temporal_downsample=(True,))


@pytest.fixture(scope="module")
def vae() -> VAE:
    return random_vae()


def random_vae(config: VAEConfig = TINY) -> VAE:
    """Every parameter random, biases and scales too."""
    model, rng = abstract(config), np.random.default_rng(0)
    state = nnx.state(model)
    for path, variable in nnx.to_flat_state(state):
        shape, is_kernel = variable.shape, path[-1] == "kernel"
        noise = rng.standard_normal(shape) * (math.prod(shape[:-1]) ** -0.5 if is_kernel else 0.2)
        variable.set_value(jnp.asarray(noise + (path[-1] == "scale"), variable.dtype))
    nnx.update(model, state)
    return model


def abstract(config: VAEConfig, dtype=jnp.float32) -> VAE:
    return nnx.eval_shape(lambda: VAE(config, dtype=dtype, rngs=nnx.Rngs(0)))


def flat(model: VAE) -> dict:
    state = nnx.to_flat_state(nnx.state(model))
    return {".".join(map(str, path)): v.get_value() for path, v in state}


def video(frames: int, height: int = 12, width: int = 20) -> np.ndarray:
    shape = (1, frames, height, width, 3)
    return np.random.default_rng(frames).uniform(-1, 1, shape).astype(np.float32)


def test_tiles_equal_the_whole(vae, monkeypatch):
    """In fp32, with three tiles that do not divide the width."""
    given = {
        "_encode": jnp.asarray(video(5, height=12, width=148)),
        "_decode": np.random.default_rng(1).standard_normal((1, 2, 3, 37, 4)).astype(np.float32),
    }

    def both() -> list[np.ndarray]:
        # Anew, or the programs of the first limit would be taken for the second.
        return [jax.jit(getattr(VAE, n).__wrapped__)(vae, x) for n, x in given.items()]

    whole = both()
    monkeypatch.setattr("wanjax.models.vae.TILE_ELEMENTS", 12 * 148 * TINY.base_dim // 3)
    assert tiles(1, 12, 148, TINY.base_dim) == 3
    for got, expected in zip(both(), whole):
        np.testing.assert_allclose(got, expected, atol=2e-5)


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_a_tile_sees_all_that_it_needs_and_little_more(vae, part):
    """The gradient of a column is not zero where it depends on another, however little."""
    network = getattr(vae, part)
    channels = 3 if part == "encoder" else network.stages[-2].blocks[0].norm_in.scale.shape[0]
    x = np.random.default_rng(0).standard_normal((1, 4, 8, 64, channels)).astype(np.float32)
    tiling = network._tiling(x, ((), ()))

    y, back = jax.vjp(jax.jit(lambda x: network._large(x, Memory())), x)
    middle, farthest = y.shape[3] // 2, 0
    for column in (middle, middle + 1):
        slope = np.zeros_like(y)
        slope[:, :, :, column] = 1
        seen = np.flatnonzero(np.asarray(back(slope)[0]).any((0, 1, 2, 4)))
        core = int(column / tiling.scale), int((column + 1) / tiling.scale - Fraction(1, 2))
        farthest = max(farthest, core[0] - seen[0], seen[-1] - core[1])
    assert farthest <= tiling.reach <= farthest + 2 * (tiling.align - 1)


def test_a_720p_picture_is_cut_and_a_small_one_is_not():
    width = VAEConfig().base_dim
    assert tiles(1, 720, 1280, width) == 3 and tiles(1, 240, 416, width) == 1


# The official network as lists of layers, in the order of its Sequentials.
ENCODER = "res 96 96|res 96 96|down 96|res 96 192|res 192 192|down3d 192|res 192 384|res 384 384|"
ENCODER += "down3d 384|res 384 384|res 384 384"
DECODER = "res 384 384|res 384 384|res 384 384|up3d 384|res 192 384|res 384 384|res 384 384|"
DECODER += "up3d 384|res 192 192|res 192 192|res 192 192|up 192|res 96 96|res 96 96|res 96 96"
MIDDLE = "res 384 384|attention 384|res 384 384"


def official_tensors() -> dict[str, tuple[int, ...]]:
    """Names and shapes of `Wan2.1_VAE.pth`, spelled out from the lists above."""
    shapes = {}

    def add(name, d_in, d_out, *size):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (d_out, d_in, *size), (d_out,)

    def add_layer(name, kind, d_in, d_out=None):
        if kind == "res":
            shapes[f"{name}.residual.0.gamma"] = (d_in, 1, 1, 1)
            add(f"{name}.residual.2", d_in, d_out, 3, 3, 3)
            shapes[f"{name}.residual.3.gamma"] = (d_out, 1, 1, 1)
            add(f"{name}.residual.6", d_out, d_out, 3, 3, 3)
            if d_in != d_out:
                add(f"{name}.shortcut", d_in, d_out, 1, 1, 1)
        elif kind == "attention":
            shapes[f"{name}.norm.gamma"] = (d_in, 1, 1)
            add(f"{name}.to_qkv", d_in, 3 * d_in, 1, 1)
            add(f"{name}.proj", d_in, d_in, 1, 1)
        else:
            add(f"{name}.resample.1", d_in, d_in if "down" in kind else d_in // 2, 3, 3)
            if "3d" in kind:
                add(f"{name}.time_conv", d_in, d_in if "down" in kind else 2 * d_in, 3, 1, 1)

    for half, stages, layers, ends in (
        ("encoder", "downsamples", ENCODER, ((3, 96), (384, 32))),
        ("decoder", "upsamples", DECODER, ((16, 384), (96, 3))),
    ):
        add(f"{half}.conv1", *ends[0], 3, 3, 3)
        for part, names in ((stages, layers), ("middle", MIDDLE)):
            for i, layer in enumerate(names.split("|")):
                kind, *widths = layer.split()
                add_layer(f"{half}.{part}.{i}", kind, *map(int, widths))
        shapes[f"{half}.head.0.gamma"] = (ends[1][0], 1, 1, 1)
        add(f"{half}.head.2", *ends[1], 3, 3, 3)
    add("conv1", 32, 32, 1, 1, 1)
    add("conv2", 16, 16, 1, 1, 1)
    return shapes


def test_full_size_in_official_names():
    config = VAEConfig()
    leaves = flat(abstract(config))
    export = jax.eval_shape(lambda x: from_native(rows(config), "official", 0, x), leaves)
    assert {name: x.shape for name, x in export.items()} == official_tensors()
    assert len(export) == 194
    assert sum(math.prod(x.shape) for x in export.values()) == 126_892_531
    assert config.stride == (4, 8, 8)


@quickly
def test_latents_do_not_depend_on_later_frames(vae):
    clip = video(33)
    whole = vae.encode(clip)
    assert whole.shape == (1, 9, 3, 5, 4)
    np.testing.assert_allclose(vae.encode(clip[:, :9]), whole[:, :3], atol=1e-5)
    np.testing.assert_allclose(vae.encode(clip[:, :1]), whole[:, :1], atol=1e-5)
    pixels = vae.decode(whole)
    assert pixels.shape == clip.shape
    np.testing.assert_allclose(vae.decode(whole[:, :3]), pixels[:, :9], atol=1e-5)
    np.testing.assert_allclose(vae.decode(whole[:, :1]), pixels[:, :1], atol=1e-5)


@quickly
def test_latents_depend_on_frames_of_earlier_chunks(vae):
    clip, other = video(13), video(13)
    other[:, 4] *= -1  # the end of the second chunk
    a, b = vae.encode(clip), vae.encode(other)
    np.testing.assert_array_equal(a[:, 0], b[:, 0])
    for t in (1, 2, 3):
        assert np.abs(a[:, t] - b[:, t]).max() > 1e-4


@quickly
def test_calls_leave_nothing_behind(vae):
    before = flat(vae)
    first, again = vae.encode(video(9)), vae.encode(video(9))
    np.testing.assert_array_equal(first, again)
    after = flat(vae)
    assert before.keys() == after.keys()
    assert all(before[name] is after[name] for name in before)
    assert len(jax.tree.leaves(nnx.state(vae, nnx.Param))) == len(before)


@quickly
def test_under_jit_and_step_by_step():
    vae, clip = random_vae(config=MINUTE), video(3, 4, 6)
    latents, pixels = vae.encode(clip), vae.decode(vae.encode(clip))
    np.testing.assert_array_equal(jax.jit(lambda vae, x: vae.encode(x))(vae, clip), latents)
    np.testing.assert_array_equal(jax.jit(lambda vae, x: vae.decode(x))(vae, latents), pixels)
    with jax.disable_jit():
        np.testing.assert_allclose(vae.encode(clip), latents, atol=1e-5)
        np.testing.assert_allclose(vae.decode(latents), pixels, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_all_is_kept_in_fp32(dtype):
    for name, x in flat(abstract(TINY, dtype)).items():
        assert x.dtype == jnp.float32, name


@quickly
def test_batch_elements_are_independent(vae):
    clips = np.concatenate([video(5), video(5)[:, ::-1]])
    together = vae.encode(clips)
    np.testing.assert_allclose(together[1:], vae.encode(clips[1:]), atol=1e-5)
    assert np.abs(together[0] - together[1]).max() > 1e-2


@pytest.mark.parametrize("method,shape", [("encode", (1, 9, 8, 8, 3)), ("decode", (1, 3, 2, 2, 4))])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("given", [jnp.float32, jnp.bfloat16])
def test_all_is_computed_in_fp32(method, shape, dtype, given):
    """Whatever the input's type, and whatever type is asked for."""
    model = abstract(TINY, dtype)
    x = jax.ShapeDtypeStruct(shape, given)
    jaxpr, out = jax.make_jaxpr(lambda m, x: getattr(m, method)(x), return_shape=True)(model, x)
    assert out.dtype == jnp.float32
    found = products(jaxpr.jaxpr)
    assert len(found) > 20
    assert {v.aval.dtype for e in found for v in e.invars} == {jnp.dtype(jnp.float32)}
    assert {e.params["precision"][0] for e in found} == {jax.lax.Precision.HIGHEST}


@pytest.mark.parametrize("size,stride", [((3, 3, 3), 1), ((3, 1, 1), 1), ((3, 1, 1), 2)])
def test_both_formulations_of_the_convolution_agree(size, stride):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((2, 7, 6, 10, 5)), jnp.float32)
    kernel = jnp.asarray(rng.standard_normal((*size, 5, 8)), jnp.float32)
    a, b = _convolve(stride, x, kernel), _convolve_frames(stride, x, kernel)
    assert a.shape == (2, 5 if stride == 1 else 3, 6, 10, 8)
    np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.parametrize("platform", ["cpu", "tpu", "cuda"])
def test_the_program_does_not_grow_with_the_video(platform):
    """And an accelerator gets 3-D convolutions, the processor 2-D ones."""

    def count(frames):
        x = jax.ShapeDtypeStruct((1, frames, 16, 24, 3), jnp.float32)
        traced = jax.jit(lambda m, x: m.encode(x)).trace(abstract(VAEConfig()), x)
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        return text.count("stablehlo.convolution"), text.count("[b, 0, 1, 2, f]x")

    short, long = count(9), count(81)
    assert short == long
    assert (short[1] == 0) == (platform == "cpu")


def test_memory_is_that_of_a_chunk():
    def peak(frames):
        x = jax.ShapeDtypeStruct((1, frames, 96, 160, 3), jnp.float32)
        compiled = jax.jit(lambda m, x: m.encode(x)).lower(abstract(MINUTE), x).compile()
        return compiled.memory_analysis().temp_size_in_bytes, x.size * 4

    (short, small), (long, large) = peak(9), peak(41)
    # What grows is a copy of the video in chunks; activations are 8 channels wide and more.
    assert long - short < 1.5 * (large - small)


@pytest.mark.parametrize(
    "size,words",
    [
        ((8, 16, 16), "8 frames .* 4n.1 .* 5"),
        ((0, 16, 16), "0 frames"),
        ((5, 16, 18), "16x18 .* multiples of 4"),
        ((5, 18, 16), "18x16"),
    ],
)
def test_videos_that_do_not_fit_are_refused(vae, size, words):
    with pytest.raises(UserError, match=words):
        vae.encode(np.zeros((1, *size, 3), np.float32))
    with pytest.raises(UserError, match=words):
        jax.eval_shape(vae.encode, jax.ShapeDtypeStruct((1, *size, 3), jnp.float32))


def test_what_is_no_video_and_no_latents_is_refused(vae):
    for bad in (np.zeros((5, 16, 16, 3), np.float32), np.zeros((1, 5, 16, 16, 3), np.uint8)):
        with pytest.raises(UserError, match="floats in .* of shape"):
            _check_video(bad, (4, 8, 8))
    with pytest.raises(UserError, match="width, 4"):
        vae.decode(np.zeros((1, 2, 3, 4, 5), np.float32))
