"""Architectures read off the shapes of tensors, for files that come without a config.

Official folders have one for the diffusion model only, and single files have none.
"""

import math
import re
import warnings
from collections.abc import Mapping

import numpy as np

from convert.networks import TABLES
from wanjax.errors import UserError
from wanjax.models import Config
from wanjax.models.check import DEEPEST
from wanjax.models.clip import CLIPVisionConfig
from wanjax.models.dit import DiTConfig
from wanjax.models.umt5 import UMT5Config
from wanjax.models.vae import VAEConfig


class Shapes:
    """Shapes in our layout of the tensors in a file, looked up by our names."""

    def __init__(self, network: str, layout: str, tensors: Mapping[str, np.ndarray], where: str):
        self.where, self.tensors = where, tensors
        rows = TABLES[network].rows(TABLES[network].fullest)
        self._rows = {row.ours: row for row in rows if row.theirs(layout) is not None}
        self._layout = layout

    def __contains__(self, ours: str) -> bool:
        return ours in self._rows and self._name(ours) in self.tensors

    def __call__(self, ours: str, axes: int) -> tuple[int, ...]:
        """The shape of a tensor (of its first layer, if it is stacked) of so many axes."""
        name = self._name(ours)
        if name not in self.tensors:
            raise UserError(f"{self.where} lacks the tensor '{name}'; fetch the checkpoint again.")
        tensor = self.tensors[name]
        try:
            shape = self._rows[ours].op.to_ours(tensor).shape
        except ValueError:  # an axis too few
            shape = ()
        if len(shape) != axes or 0 in shape:
            raise UserError(
                f"{self.where} has the tensor '{name}' of shape {tensor.shape}, which no model of "
                "this kind has; fetch the checkpoint again."
            )
        return shape

    def layers(self, ours: str) -> int:
        """The largest layer number under the list of layers that `ours` belongs to, plus one."""
        return self.layers_under(self._rows[ours].theirs(self._layout).split("{i}")[0])

    def layers_under(self, stem: str) -> int:
        """The largest number that follows `stem` in a name, plus one."""
        pattern = re.compile(rf"{re.escape(stem)}([0-9]{{1,9}})\.")
        numbers = {int(m[1]): name for name in self.tensors if (m := pattern.match(name))}
        last = max(numbers, default=0)
        if last >= DEEPEST["num_layers"]:
            raise UserError(
                f"{self.where} holds '{numbers[last]}', and no model has so many layers; fetch the "
                "checkpoint again."
            )
        return last + 1

    def _name(self, ours: str) -> str:
        theirs = self._rows[ours].theirs(self._layout)
        return re.sub(r"\[.*", "", theirs).replace("{i}", "0")


def infer(network: str, shapes: Shapes, layout: str) -> Config:
    """The architecture that the shapes allow; what they do not tell is Wan2.1's."""
    if network == "vae":
        return _infer_vae(shapes, layout)
    return {"dit": infer_dit, "text_encoder": _infer_umt5, "image_encoder": _infer_clip}[network](
        shapes
    )


def infer_dit(shapes: Shapes, heads: int | None = None) -> DiTConfig:
    """Without a config the heads are of 128 channels, as in all of Wan2.1's models."""
    *patch, d_in, dim = shapes("patch_embed.kernel", 5)
    if heads is None and dim % 128:
        raise UserError(
            f"{shapes.where} has no config, and its width {dim} does not divide into heads of 128 "
            "channels; put the model's config.json beside it."
        )
    image = ("image_embed.norm_in.scale", "blocks.cross_attn.k_img.kernel")
    has_image = any(name in shapes for name in image)
    positions = "image_embed.positions" in shapes
    return DiTConfig(
        dim=dim,
        ffn_dim=shapes("blocks.ffn.up.kernel", 2)[1],
        num_layers=shapes.layers("blocks.ffn.up.kernel"),
        num_heads=heads or dim // 128,
        in_channels=d_in,
        out_channels=shapes("head.proj.kernel", 2)[1] // math.prod(patch),
        patch_size=tuple(patch),
        text_dim=shapes("text_embed.up.kernel", 2)[0],
        freq_dim=shapes("time_embed.up.kernel", 2)[0],
        image_dim=shapes("image_embed.norm_in.scale", 1)[0] if has_image else None,
        image_positions=shapes("image_embed.positions", 2)[0] if positions else None,
    )


def _infer_umt5(shapes: Shapes) -> UMT5Config:
    vocab_size, dim = shapes("token_embedding.table", 2)
    buckets, heads = shapes("blocks.position_bias.table", 2)
    return UMT5Config(
        vocab_size=vocab_size,
        dim=dim,
        attention_dim=shapes("blocks.attn.q.kernel", 2)[1],
        num_heads=heads,
        ffn_dim=shapes("blocks.ffn.up.kernel", 2)[1],
        num_layers=shapes.layers("blocks.ffn.up.kernel"),
        num_buckets=buckets,
    )


def _infer_clip(shapes: Shapes) -> CLIPVisionConfig:
    """Heads of 80 channels, as in ViT-H. At other widths the shapes do not tell, and a guess of the
    most heads up to 16 that divide the width is reported."""
    patch, _, _, dim = shapes("patch_embedding.kernel", 4)
    side = math.isqrt(shapes("pos_embedding", 2)[0] - 1)
    heads = dim // 80 if dim % 80 == 0 else next(n for n in range(16, 0, -1) if dim % n == 0)
    if dim % 80:
        warnings.warn(
            f"{shapes.where} is no ViT-H (width {dim}) and has no config: {heads} heads are a "
            "guess; convert from a diffusers folder, which has one, to be sure.",
            stacklevel=2,
        )
    return CLIPVisionConfig(
        image_size=side * patch,
        patch_size=patch,
        dim=dim,
        num_heads=heads,
        num_layers=shapes.layers("blocks.ffn.up.kernel"),
        ffn_dim=shapes("blocks.ffn.up.kernel", 2)[1],
        projection_dim=shapes("head", 2)[1] if "head" in shapes else None,
    )


def _infer_vae(shapes: Shapes, layout: str) -> VAEConfig:
    """Walk the encoder's list: residual blocks, and a resampling after every stage but the last."""
    stem, conv = {
        "official": ("encoder.downsamples.", "residual.2"),
        "diffusers": ("encoder.down_blocks.", "conv1"),
    }[layout]
    stages: list[list[int]] = [[]]
    temporal = []
    for i in range(shapes.layers_under(stem)):
        if (block := shapes.tensors.get(f"{stem}{i}.{conv}.weight")) is not None:
            stages[-1].append(math.prod(block.shape[:1]))
        elif f"{stem}{i}.resample.1.weight" in shapes.tensors:
            stages.append([])
            temporal.append(f"{stem}{i}.time_conv.weight" in shapes.tensors)
    base = shapes("encoder.conv_in.kernel", 5)[-1]
    z_dim = shapes("post_quant.kernel", 2)[-1]
    blocks = {len(stage) for stage in stages}
    if len(blocks) != 1 or 0 in blocks or any(s[-1] % base for s in stages) or z_dim != 16:
        raise UserError(
            f"{shapes.where} is not Wan2.1's VAE (stages {stages}, {z_dim} latent channels); "
            "use Wan2.1_VAE.pth or a copy of it."
        )
    return VAEConfig(
        base_dim=base,
        dim_mult=tuple(stage[-1] // base for stage in stages),
        num_res_blocks=blocks.pop(),
        temporal_downsample=tuple(temporal),
    )
