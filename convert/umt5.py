"""Tensor names of the umT5 encoder: `models_t5_umt5-xxl-enc-bf16.pth`, Hugging Face's, and ours."""

from convert.table import Row, linear
from wanjax.models.umt5 import UMT5Config

# Hugging Face ties the embedding to a second name; a file may hold either or both.
ALIASES = {"encoder.embed_tokens.weight": "shared.weight"}

# Per layout, patterns (fnmatch) of tensors that are no part of the encoder: ComfyUI's single file
# carries the tokenizer's model beside the weights.
DROPPABLE: dict[str, tuple[str, ...]] = {"official": (), "diffusers": ("spiece_model",)}


def rows(config: UMT5Config) -> list[Row]:
    """The table. Every tensor occurs whatever `config` says; the layers are counted elsewhere."""
    del config
    attn, ffn = "encoder.block.{i}.layer.0", "encoder.block.{i}.layer.1"
    table = [
        Row("token_embedding.table", "token_embedding.weight", "shared.weight"),
        Row("blocks.norm_attn.scale", "blocks.{i}.norm1.weight", f"{attn}.layer_norm.weight"),
        Row(
            "blocks.position_bias.table",
            "blocks.{i}.pos_embedding.embedding.weight",
            f"{attn}.SelfAttention.relative_attention_bias.weight",
        ),
        Row("blocks.norm_ffn.scale", "blocks.{i}.norm2.weight", f"{ffn}.layer_norm.weight"),
        Row("norm.scale", "norm.weight", "encoder.final_layer_norm.weight"),
    ]
    matrices = [
        *((f"attn.{x}", f"attn.{x}", f"{attn}.SelfAttention.{x}") for x in "qkvo"),
        ("ffn.gate", "ffn.gate.0", f"{ffn}.DenseReluDense.wi_0"),
        ("ffn.up", "ffn.fc1", f"{ffn}.DenseReluDense.wi_1"),
        ("ffn.down", "ffn.fc2", f"{ffn}.DenseReluDense.wo"),
    ]
    for ours, official, diffusers in matrices:
        table += linear(f"blocks.{ours}", f"blocks.{{i}}.{official}", diffusers, bias=False)
    return table
