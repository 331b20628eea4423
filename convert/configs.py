"""Architectures as official and diffusers' `config.json` files write them down, to and from ours.

A config that asks for something which this project does not have is refused by the name of the
setting: to misread it would give noise and no error.
"""

from collections.abc import Collection, Mapping

from convert.infer import Shapes, infer_dit
from wanjax.errors import UserError
from wanjax.models import Config
from wanjax.models.check import check_field, check_whole
from wanjax.models.clip import CLIPVisionConfig
from wanjax.models.dit import DiTConfig
from wanjax.models.umt5 import UMT5Config
from wanjax.models.vae import VAEConfig

Json = Mapping[str, object]

# Settings that are the same in every model of the family: what they must be, if they are there.
_OFFICIAL_FIXED = {
    "model_type": ("t2v", "i2v", "flf2v"),
    "qk_norm": (True,),
    "cross_attn_norm": (True,),
    "window_size": ([-1, -1],),
}
_DIT_FIXED = {
    "qk_norm": ("rms_norm_across_heads",),
    "cross_attn_norm": (True,),
    "rope_max_seq_len": (1024,),
}
_VAE_FIXED = {
    "is_residual": (False,),
    "patch_size": (None,),
    "attn_scales": ([],),
    "dropout": (0.0,),
    "in_channels": (3,),
    "out_channels": (3,),
    "scale_factor_temporal": (4,),
    "scale_factor_spatial": (8,),
    "clip_output": (True,),
}
_UMT5_FIXED = {"model_type": ("umt5",), "feed_forward_proj": ("gated-gelu",)}
_CLIP_FIXED = {"model_type": ("clip_vision_model",), "hidden_act": ("gelu",), "num_channels": (3,)}

# Our fields by their names for them.
_OFFICIAL = {
    "dim": "dim",
    "ffn_dim": "ffn_dim",
    "num_layers": "num_layers",
    "num_heads": "num_heads",
    "in_dim": "in_channels",
    "out_dim": "out_channels",
    "text_len": "text_len",
    "freq_dim": "freq_dim",
    "eps": "eps",
    "text_dim": "text_dim",
    "patch_size": "patch_size",
}
_DIT = {
    "ffn_dim": "ffn_dim",
    "num_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "in_channels": "in_channels",
    "out_channels": "out_channels",
    "patch_size": "patch_size",
    "text_dim": "text_dim",
    "freq_dim": "freq_dim",
    "image_dim": "image_dim",
    "pos_embed_seq_len": "image_positions",
    "eps": "eps",
}
_VAE = {
    "base_dim": "base_dim",
    "dim_mult": "dim_mult",
    "z_dim": "z_dim",
    "num_res_blocks": "num_res_blocks",
    "temperal_downsample": "temporal_downsample",
    "latents_mean": "latents_mean",
    "latents_std": "latents_std",
}
_UMT5 = {
    "vocab_size": "vocab_size",
    "d_model": "dim",
    "num_heads": "num_heads",
    "d_ff": "ffn_dim",
    "num_layers": "num_layers",
    "relative_attention_num_buckets": "num_buckets",
    "relative_attention_max_distance": "max_distance",
    "layer_norm_epsilon": "eps",
}
_CLIP = {
    "image_size": "image_size",
    "patch_size": "patch_size",
    "hidden_size": "dim",
    "num_attention_heads": "num_heads",
    "num_hidden_layers": "num_layers",
    "intermediate_size": "ffn_dim",
    "layer_norm_eps": "eps",
}


def dit_from_official(data: Json, shapes: Shapes) -> DiTConfig:
    """The official `config.json`; what it leaves out (it relies on defaults) is in the shapes."""
    where = f"{shapes.where}'s config.json"
    _require(data, _OFFICIAL_FIXED, where, known=_OFFICIAL)
    if "num_heads" not in data:
        raise UserError(f"{where} lacks 'num_heads'; fetch it again.")
    fields = _fields(DiTConfig, data, _OFFICIAL, where, optional=_OFFICIAL)
    inferred = infer_dit(shapes, heads=fields["num_heads"])
    config = DiTConfig(**{**vars(inferred), **fields})
    if data.get("model_type", config.kind) != config.kind:
        raise UserError(
            f"{where} says that this is an {data['model_type']} model, and by its tensors "
            f"('img_emb.proj.0.weight' and its like) it is {config.kind}; use a whole "
            "Wan2.1 checkpoint (Wan2.2 is another model)."
        )
    return config


def from_diffusers(network: str, data: Json, where: str) -> Config:
    """The `config.json` of a component in a diffusers folder."""
    return {
        "dit": _dit_from_diffusers,
        "vae": _vae_from_diffusers,
        "text_encoder": _umt5_from_diffusers,
        "image_encoder": _clip_from_diffusers,
    }[network](data, where)


def _dit_from_diffusers(data: Json, where: str) -> DiTConfig:
    known = {*_DIT, "attention_head_dim", "added_kv_proj_dim"}
    _require(data, {**_DIT_FIXED, "window_size": ([-1, -1],)}, where, known=known)
    fields = _fields(DiTConfig, data, _DIT, where, optional=("image_dim", "pos_embed_seq_len"))
    head = check_whole("attention_head_dim", data.get("attention_head_dim", 128), where)
    dim = fields["num_heads"] * head
    if data.get("added_kv_proj_dim") not in (None, dim):
        raise _unsupported(where, "added_kv_proj_dim", data["added_kv_proj_dim"])
    if (data.get("added_kv_proj_dim") is None) != (fields.get("image_dim") is None):
        raise _unsupported(where, "image_dim", data.get("image_dim"))
    return DiTConfig(dim=dim, **{"image_dim": None, **fields})


def _vae_from_diffusers(data: Json, where: str) -> VAEConfig:
    _require(data, _VAE_FIXED, where, known={*_VAE, "decoder_base_dim"})
    if data.get("decoder_base_dim") not in (None, data.get("base_dim")):
        raise _unsupported(where, "decoder_base_dim", data["decoder_base_dim"])
    optional = ("latents_mean", "latents_std")
    return VAEConfig(**_fields(VAEConfig, data, _VAE, where, optional))


def _umt5_from_diffusers(data: Json, where: str) -> UMT5Config:
    _require(data, _UMT5_FIXED, where)
    fields = _fields(UMT5Config, data, _UMT5, where, optional=tuple(_UMT5)[5:])
    head = check_whole("d_kv", data.get("d_kv", 64), where)
    return UMT5Config(attention_dim=head * fields["num_heads"], **fields)


def _clip_from_diffusers(data: Json, where: str) -> CLIPVisionConfig:
    data = data.get("vision_config", data)  # the config of a whole CLIP has the tower's inside
    if not isinstance(data, Mapping):
        raise UserError(f"'vision_config' in {where} is no JSON object; fetch it again.")
    _require(data, _CLIP_FIXED, where)
    return CLIPVisionConfig(**_fields(CLIPVisionConfig, data, _CLIP, where, ("layer_norm_eps",)))


def _fields(
    kind: type[Config],
    data: Json,
    names: Mapping[str, str],
    where: str,
    optional: Collection[str] = (),
) -> dict[str, object]:
    """Our fields from theirs, each of its type and in its range; lists become tuples."""
    for name, ours in names.items():
        if name in data:
            check_field(kind, ours, data[name], where, called=name)
    if missing := [name for name in names if name not in data and name not in optional]:
        raise UserError(f"{where} lacks '{missing[0]}'; fetch the checkpoint again.")
    return {
        ours: tuple(data[name]) if isinstance(data[name], list) else data[name]
        for name, ours in names.items()
        if name in data
    }


def _require(data: Json, fixed: Mapping[str, tuple], where: str, known=None) -> None:
    """Refuse settings other than the `fixed` ones; and where `known` is given, unknown ones.

    Unknown settings that are off (None, False) change nothing and pass.
    """
    for name, allowed in fixed.items():
        if name in data and data[name] not in allowed:
            raise _unsupported(where, name, data[name])
    for name, value in data.items():
        unknown = known is not None and name not in known and name not in fixed
        if unknown and not name.startswith("_") and value is not None and value is not False:
            raise _unsupported(where, name, value)


def _unsupported(where: str, name: str, value: object) -> UserError:
    return UserError(
        f"{where} asks for {name[:60]}={repr(value)[:60]}, which wanjax does not have; use a "
        "Wan2.1 text-to-video, image-to-video or first-and-last-frame checkpoint."
    )


def dit_to_official(config: DiTConfig) -> dict[str, object]:
    """As on the hub, which leaves out what has its default value."""
    data = {theirs: getattr(config, ours) for theirs, ours in _OFFICIAL.items()}
    for name in ("text_dim", "patch_size"):
        if data[name] == getattr(DiTConfig(), name):
            del data[name]
    kind = {"_class_name": "WanModel", "_diffusers_version": "0.30.0"}
    return dict(sorted({**kind, **data, "model_type": config.kind}.items()))


def to_diffusers(network: str, config: Config, dtype: str = "float32") -> dict[str, object]:
    """The `config.json` of a component; `dtype` is what transformers is to load it in."""
    if isinstance(config, DiTConfig):
        return {
            "_class_name": "WanTransformer3DModel",
            **_named(config, _DIT),
            "attention_head_dim": config.head_size,
            "added_kv_proj_dim": None if config.image_dim is None else config.dim,
            **{name: allowed[0] for name, allowed in _DIT_FIXED.items()},
        }
    if isinstance(config, VAEConfig):
        return {
            "_class_name": "AutoencoderKLWan",
            **_named(config, _VAE),
            "attn_scales": [],
            "dropout": 0.0,
        }
    if isinstance(config, UMT5Config):
        return {
            "architectures": ["UMT5EncoderModel"],
            **_named(config, _UMT5),
            **{name: allowed[0] for name, allowed in _UMT5_FIXED.items()},
            "d_kv": config.attention_dim // config.num_heads,
            "num_decoder_layers": config.num_layers,
            "dense_act_fn": "gelu_new",
            "is_gated_act": True,
            "is_encoder_decoder": True,
            "tie_word_embeddings": True,
            "dropout_rate": 0.1,
            "pad_token_id": 0,
            "eos_token_id": 1,
            "decoder_start_token_id": 0,
            "torch_dtype": dtype,
        }
    return {
        "architectures": ["CLIPVisionModel"],
        **_named(config, _CLIP),
        **{name: allowed[0] for name, allowed in _CLIP_FIXED.items()},
        "attention_dropout": 0.0,
        "torch_dtype": dtype,
    }


def _named(config: Config, names: Mapping[str, str]) -> dict[str, object]:
    return {theirs: getattr(config, ours) for theirs, ours in names.items()}
