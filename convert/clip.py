"""Tensor names of CLIP's vision tower: Wan's `.pth`, Hugging Face's `CLIPVisionModel`, and ours."""

from convert.table import CONV2D, LINEAR, Row, lead, linear
from wanjax.models.clip import CLIPVisionConfig

# Transformers 4 writes this before every name, transformers 5 does not. Files are written with it;
# where a name lacks it on reading, put it in front.
PREFIX = "vision_model."

# Per layout, patterns (fnmatch) of tensors that are no part of the tower: the text half of CLIP,
# its temperature, the projection of Hugging Face's other classes, and a range of integers.
DROPPABLE: dict[str, tuple[str, ...]] = {
    "official": ("textual.*", "log_scale"),
    "diffusers": (
        "*embeddings.position_ids",
        "visual_projection.weight",
        "text_model.*",
        "text_projection.weight",
        "logit_scale",
    ),
}


def rows(config: CLIPVisionConfig) -> list[Row]:
    """The table; the head occurs in the official file only, and where `config` has one."""
    block, layer = "visual.transformer.{i}", f"{PREFIX}encoder.layers.{{i}}"
    embeddings = f"{PREFIX}embeddings"
    table = [
        # The two layouts differ in shape here, so each has a row of its own.
        Row("cls_embedding", "visual.cls_embedding", None, lead(2)),
        Row("cls_embedding", None, f"{embeddings}.class_embedding"),
        Row("pos_embedding", "visual.pos_embedding", None, lead(1)),
        Row("pos_embedding", None, f"{embeddings}.position_embedding.weight"),
        Row(
            "patch_embedding.kernel",
            "visual.patch_embedding.weight",
            f"{embeddings}.patch_embedding.weight",
            CONV2D,
        ),
        *_norm("norm_pre", "visual.pre_norm", f"{PREFIX}pre_layrnorm"),
        *_norm("blocks.norm_attn", f"{block}.norm1", f"{layer}.layer_norm1"),
        *_norm("blocks.norm_ffn", f"{block}.norm2", f"{layer}.layer_norm2"),
        *linear("blocks.attn.o", f"{block}.attn.proj", f"{layer}.self_attn.out_proj"),
        *linear("blocks.ffn.up", f"{block}.mlp.0", f"{layer}.mlp.fc1"),
        *linear("blocks.ffn.down", f"{block}.mlp.2", f"{layer}.mlp.fc2"),
        *_norm("norm_post", "visual.post_norm", f"{PREFIX}post_layernorm"),
    ]
    for part, x in enumerate("qkv"):
        ours, fused, alone = (
            f"blocks.attn.{x}",
            f"{block}.attn.to_qkv",
            f"{layer}.self_attn.{x}_proj",
        )
        table += [
            Row(f"{ours}.kernel", f"{fused}.weight[{part}/3]", f"{alone}.weight", LINEAR),
            Row(f"{ours}.bias", f"{fused}.bias[{part}/3]", f"{alone}.bias"),
        ]
    if config.projection_dim is not None:
        table.append(Row("head", "visual.head", None))
    return table


def _norm(ours: str, official: str, diffusers: str) -> list[Row]:
    return [
        Row(f"{ours}.scale", f"{official}.weight", f"{diffusers}.weight"),
        Row(f"{ours}.bias", f"{official}.bias", f"{diffusers}.bias"),
    ]
