"""Toy checkpoints in others' layouts, made without this project's own writers."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from convert.groups import read_networks
from convert.mapping import leaf_shapes
from convert.networks import TABLES, layers
from examples.toy_tokenizer import train_toy_tokenizer
from tests.tables import from_native
from wanjax.models.clip import CLIPVisionConfig
from wanjax.models.dit import DiTConfig
from wanjax.models.umt5 import UMT5Config
from wanjax.models.vae import VAEConfig

DIT = DiTConfig(
    dim=256,
    ffn_dim=24,
    num_layers=11,  # so that block 10 sorts after block 9 or goes wrong
    num_heads=2,
    text_dim=20,
    freq_dim=16,
    image_dim=20,
)
CONFIGS = {
    "dit": DIT,
    "vae": VAEConfig(base_dim=8),
    "text_encoder": UMT5Config(
        vocab_size=160, dim=20, attention_dim=24, num_heads=3, ffn_dim=28, num_layers=3
    ),
    "image_encoder": CLIPVisionConfig(
        image_size=28, patch_size=14, dim=160, num_heads=2, num_layers=3, ffn_dim=12,
        projection_dim=5,
    ),
}  # fmt: skip
TYPES = {"dit": "f4", "vae": "f4", "text_encoder": "bf16", "image_encoder": "f2"}
OFFICIAL_FILES = {
    "vae": "Wan2.1_VAE.pth",
    "text_encoder": "models_t5_umt5-xxl-enc-bf16.pth",
    "image_encoder": "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth",
}
TEXTUAL = {"textual.norm.weight": (7,), "textual.pos.weight": (3, 5), "log_scale": ()}


def random_tensors(network: str, layout: str, config=None, seed: int = 0) -> dict[str, np.ndarray]:
    """A network's tensors in another layout, fp32, random."""
    config = config or CONFIGS[network]
    rng = np.random.default_rng(seed)
    leaves = {
        name: rng.standard_normal(shape, np.float32)
        for name, shape in leaf_shapes(network, config).items()
    }
    theirs = from_native(TABLES[network].rows(config), layout, layers(config), leaves)
    return {name: np.ascontiguousarray(tensor) for name, tensor in theirs.items()}


def hub_config(config: DiTConfig = DIT) -> dict:
    """The `config.json` of an official folder, with the keys that the hub's has."""
    return {
        "_class_name": "WanModel",
        "_diffusers_version": "0.30.0",
        "dim": config.dim,
        "eps": 1e-06,
        "ffn_dim": config.ffn_dim,
        "freq_dim": config.freq_dim,
        "in_dim": config.in_channels,
        "model_type": config.kind,
        "num_heads": config.num_heads,
        "num_layers": config.num_layers,
        "out_dim": 16,
        "text_dim": config.text_dim,
        "text_len": 512,
    }


def save_sharded(folder: Path, stem: str, tensors: Mapping[str, np.ndarray], count: int) -> None:
    """Shards and the index that names them, as `save_pretrained` writes them."""
    names = list(tensors)
    weight_map = {}
    for i in range(count):
        file = f"{stem}-{i + 1:05}-of-{count:05}.safetensors"
        part = {name: tensors[name] for name in names[i::count]}
        save_file(part, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))


def official_folder(folder: Path) -> Path:
    """An official folder: shards, three `.pth` written by torch, the tokenizer."""
    torch = pytest.importorskip("torch", reason="the .pth files are to be torch's own")
    folder.mkdir()
    save_sharded(folder, "diffusion_pytorch_model", random_tensors("dit", "official"), 3)
    (folder / "config.json").write_text(json.dumps(hub_config()))
    kinds = {"f4": torch.float32, "bf16": torch.bfloat16, "f2": torch.float16}
    for network, file in OFFICIAL_FILES.items():
        tensors = random_tensors(network, "official")
        if network == "image_encoder":
            rng = np.random.default_rng(1)
            tensors |= {n: rng.random(shape, np.float32) for n, shape in TEXTUAL.items()}
        kind = kinds[TYPES[network]]
        state = {n: torch.from_numpy(np.asarray(t)).to(kind) for n, t in tensors.items()}
        torch.save(state, folder / file)
    train_toy_tokenizer(["a street in the rain at night"], folder / "google/umt5-xxl", 160)
    (folder / "xlm-roberta-large").mkdir()
    (folder / "xlm-roberta-large/tokenizer.json").write_text("{}")
    return folder


def diffusers_folder(folder: Path) -> Path:
    """A diffusers folder whose weights `save_pretrained` wrote."""
    torch = pytest.importorskip("torch", reason="the folder is to be diffusers' own")
    from diffusers import AutoencoderKLWan, WanTransformer3DModel
    from transformers import CLIPVisionConfig as HFClip
    from transformers import CLIPVisionModel, UMT5EncoderModel
    from transformers import UMT5Config as HFUmt5

    torch.manual_seed(0)
    dit = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, ffn_dim=40, num_layers=3, text_dim=20,
        image_dim=32, added_kv_proj_dim=24, in_channels=36, freq_dim=16,
    )  # fmt: skip
    dit.save_pretrained(folder / "transformer", max_shard_size="60KB")
    AutoencoderKLWan(base_dim=8).save_pretrained(folder / "vae")
    umt5 = HFUmt5(vocab_size=160, d_model=20, d_kv=8, d_ff=28, num_layers=3, num_heads=3)
    UMT5EncoderModel(umt5).bfloat16().save_pretrained(folder / "text_encoder")
    clip = HFClip(
        hidden_size=32, intermediate_size=12, num_hidden_layers=3, num_attention_heads=4,
        image_size=28, patch_size=14, hidden_act="gelu",
    )  # fmt: skip
    CLIPVisionModel(clip).half().save_pretrained(folder / "image_encoder")
    train_toy_tokenizer(["a street in the rain at night"], folder / "tokenizer", 160)
    (folder / "model_index.json").write_text(
        json.dumps({"_class_name": "WanImageToVideoPipeline", "transformer": ["diffusers", "W"]})
    )
    return folder


def all_tensors(path: Path) -> dict[tuple[str, str], np.ndarray]:
    """Every tensor under `path`, by network and name."""
    found = {}
    for network, group in read_networks(path).items():
        found |= {(network, name): tensor for name, tensor in group.tensors.items()}
    return found


def assert_same_tensors(left: Path, right: Path) -> None:
    """Two folders hold the same tensors: name, shape, type and bits."""
    ours, theirs = all_tensors(left), all_tensors(right)
    assert ours.keys() == theirs.keys(), sorted(ours.keys() ^ theirs.keys())[:4]
    for key, tensor in ours.items():
        other = theirs[key]
        assert (tensor.dtype, tensor.shape) == (other.dtype, other.shape), key
        assert tensor.tobytes() == other.tobytes(), key
