"""Names of the diffusion transformer's tensors: ours, Wan's and diffusers'.

Sources: Wan-Video/Wan2.1 `wan/modules/model.py`; diffusers `WanTransformer3DModel`. Note that the
affine norm before cross-attention is `norm3` officially and `norm2` in diffusers.
"""

from convert.table import CONV3D, Row, lead, linear
from wanjax.models.dit import DiTConfig

# Written by older diffusers, never read: cross-attention has no query from the image.
DROPPABLE = {"official": (), "diffusers": ("blocks.*.attn2.norm_added_q.weight",)}


def rows(config: DiTConfig) -> list[Row]:
    """The table for one architecture."""
    embedder = "condition_embedder"
    table = [
        Row("patch_embed.kernel", "patch_embedding.weight", "patch_embedding.weight", CONV3D),
        Row("patch_embed.bias", "patch_embedding.bias", "patch_embedding.bias"),
        *linear("text_embed.up", "text_embedding.0", f"{embedder}.text_embedder.linear_1"),
        *linear("text_embed.down", "text_embedding.2", f"{embedder}.text_embedder.linear_2"),
        *linear("time_embed.up", "time_embedding.0", f"{embedder}.time_embedder.linear_1"),
        *linear("time_embed.down", "time_embedding.2", f"{embedder}.time_embedder.linear_2"),
        *linear("time_projection", "time_projection.1", f"{embedder}.time_proj"),
        Row("head.modulation", "head.modulation", "scale_shift_table", lead(1)),
        *linear("head.proj", "head.head", "proj_out"),
        *_block_rows(image=config.image_dim is not None),
    ]
    if config.image_dim is not None:
        theirs = f"{embedder}.image_embedder"
        table += [
            *_affine("image_embed.norm_in", "img_emb.proj.0", f"{theirs}.norm1"),
            *linear("image_embed.up", "img_emb.proj.1", f"{theirs}.ff.net.0.proj"),
            *linear("image_embed.down", "img_emb.proj.3", f"{theirs}.ff.net.2"),
            *_affine("image_embed.norm_out", "img_emb.proj.4", f"{theirs}.norm2"),
        ]
        if config.image_positions is not None:
            positions = ("image_embed.positions", "img_emb.emb_pos", f"{theirs}.pos_embed")
            table.append(Row(*positions, lead(1)))
    return table


def _affine(ours: str, official: str, diffusers: str) -> list[Row]:
    return [
        Row(f"{ours}.scale", f"{official}.weight", f"{diffusers}.weight"),
        Row(f"{ours}.bias", f"{official}.bias", f"{diffusers}.bias"),
    ]


def _block_rows(*, image: bool) -> list[Row]:
    block = "blocks.{i}"
    table = [
        Row("blocks.modulation", f"{block}.modulation", f"{block}.scale_shift_table", lead(1)),
        *_affine("blocks.norm_cross", f"{block}.norm3", f"{block}.norm2"),
        *linear("blocks.ffn.up", f"{block}.ffn.0", f"{block}.ffn.net.0.proj"),
        *linear("blocks.ffn.down", f"{block}.ffn.2", f"{block}.ffn.net.2"),
    ]
    names = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0"}
    norms = {"norm_q": "norm_q", "norm_k": "norm_k"}
    for attn, theirs in (("self_attn", "attn1"), ("cross_attn", "attn2")):
        if attn == "cross_attn" and image:
            names = names | {"k_img": "add_k_proj", "v_img": "add_v_proj"}
            norms = norms | {"norm_k_img": "norm_added_k"}
        for ours, name in names.items():
            diffusers = f"{block}.{theirs}.{name}"
            table += linear(f"blocks.{attn}.{ours}", f"{block}.{attn}.{ours}", diffusers)
        for ours, name in norms.items():
            official, diffusers = f"{block}.{attn}.{ours}", f"{block}.{theirs}.{name}"
            table.append(
                Row(f"blocks.{attn}.{ours}.scale", f"{official}.weight", f"{diffusers}.weight")
            )
    return table
