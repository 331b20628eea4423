"""Names of the VAE's tensors: official `Wan2.1_VAE.pth` and diffusers' `AutoencoderKLWan`.

Official names count the layers of each half in one list (`downsamples.5`, `upsamples.7`) and the
parts of a residual block by their place in a Sequential (`residual.2`), which is spelled out here.
"""

from collections.abc import Iterator

from convert.table import CONV2D, CONV3D, LINEAR, Op, Row, trail
from wanjax.models.vae import VAEConfig


def _pointwise(count: int) -> Op:
    """A kernel of one point, `count` axes of size 1, is the matrix of a Linear."""
    squeeze = trail(count)
    return Op(
        lambda x: LINEAR.to_ours(squeeze.to_ours(x)),
        lambda x: squeeze.to_theirs(LINEAR.to_theirs(x)),
    )


POINT2D, POINT3D = _pointwise(2), _pointwise(3)


def rows(config: VAEConfig) -> list[Row]:
    """The whole table. Each layer has its own shape, so none is stacked and no row has `{i}`."""
    return [
        *_layer("quant", "conv1", "quant_conv", POINT3D),
        *_layer("post_quant", "conv2", "post_quant_conv", POINT3D),
        *_ends("encoder"),
        *_ends("decoder"),
        *_encoder_stages(config),
        *_decoder_stages(config),
    ]


def _encoder_stages(config: VAEConfig) -> Iterator[Row]:
    width, index = config.base_dim, 0  # diffusers keeps the official flat index here
    for i, d_out in enumerate(config.widths):
        for j in range(config.num_res_blocks):
            official, diffusers = f"encoder.downsamples.{index}", f"encoder.down_blocks.{index}"
            ours = f"encoder.stages.{i}.blocks.{j}"
            yield from _residual(ours, official, diffusers, shortcut=width != d_out)
            width, index = d_out, index + 1
        if i < len(config.temporal_downsample):
            official, diffusers = f"encoder.downsamples.{index}", f"encoder.down_blocks.{index}"
            ours, time = f"encoder.stages.{i}.resample", config.temporal_downsample[i]
            yield from _resample(ours, official, diffusers, time=time)
            index += 1


def _decoder_stages(config: VAEConfig) -> Iterator[Row]:
    width, index = config.widths[-1], 0
    for i, d_out in enumerate(reversed(config.widths)):
        theirs = f"decoder.up_blocks.{i}"
        for j in range(config.num_res_blocks + 1):
            ours, official = f"decoder.stages.{i}.blocks.{j}", f"decoder.upsamples.{index}"
            shortcut = width != d_out
            yield from _residual(ours, official, f"{theirs}.resnets.{j}", shortcut=shortcut)
            width, index = d_out, index + 1
        if i < len(config.temporal_downsample):
            ours, official = f"decoder.stages.{i}.resample", f"decoder.upsamples.{index}"
            time = config.temporal_downsample[-1 - i]
            yield from _resample(ours, official, f"{theirs}.upsamplers.0", time=time)
            width, index = width // 2, index + 1


def _ends(half: str) -> Iterator[Row]:
    """What encoder and decoder have alike: first and last convolution, and the middle."""
    official, diffusers = f"{half}.middle", f"{half}.mid_block"
    yield from _layer(f"{half}.conv_in", f"{half}.conv1", f"{half}.conv_in", CONV3D)
    yield Row(f"{half}.norm_out.scale", f"{half}.head.0.gamma", f"{half}.norm_out.gamma", trail(3))
    yield from _layer(f"{half}.conv_out", f"{half}.head.2", f"{half}.conv_out", CONV3D)
    for ours, i, j in (("block_in", 0, 0), ("block_out", 2, 1)):
        theirs = f"{diffusers}.resnets.{j}"
        yield from _residual(f"{official}.{ours}", f"{official}.{i}", theirs, shortcut=False)
    ours, official, theirs = (
        f"{half}.middle.attention",
        f"{official}.1",
        f"{diffusers}.attentions.0",
    )
    yield Row(f"{ours}.norm.scale", f"{official}.norm.gamma", f"{theirs}.norm.gamma", trail(2))
    yield from _layer(f"{ours}.qkv", f"{official}.to_qkv", f"{theirs}.to_qkv", POINT2D)
    yield from _layer(f"{ours}.out", f"{official}.proj", f"{theirs}.proj", POINT2D)


def _residual(ours: str, official: str, diffusers: str, *, shortcut: bool) -> Iterator[Row]:
    for end, norm, conv, nth in (("in", 0, 2, 1), ("out", 3, 6, 2)):
        gamma = f"{official}.residual.{norm}.gamma", f"{diffusers}.norm{nth}.gamma"
        yield Row(f"{ours}.norm_{end}.scale", *gamma, trail(3))
        theirs = f"{official}.residual.{conv}", f"{diffusers}.conv{nth}"
        yield from _layer(f"{ours}.conv_{end}", *theirs, CONV3D)
    if shortcut:
        theirs = f"{official}.shortcut", f"{diffusers}.conv_shortcut"
        yield from _layer(f"{ours}.shortcut", *theirs, POINT3D)


def _resample(ours: str, official: str, diffusers: str, *, time: bool) -> Iterator[Row]:
    yield from _layer(f"{ours}.space", f"{official}.resample.1", f"{diffusers}.resample.1", CONV2D)
    if time:
        theirs = f"{official}.time_conv", f"{diffusers}.time_conv"
        yield from _layer(f"{ours}.time", *theirs, CONV3D)


def _layer(ours: str, official: str, diffusers: str, op: Op) -> Iterator[Row]:
    yield Row(f"{ours}.kernel", f"{official}.weight", f"{diffusers}.weight", op)
    yield Row(f"{ours}.bias", f"{official}.bias", f"{diffusers}.bias")
