"""CLIP (Radford et al. 2021, arXiv 2103.00020), both towers: the similarities of CLIP-SIM.

Any folder that Hugging Face's `CLIPModel` saved will do. Its tokenizer and its preparation of
pictures are transformers' (extra `[eval]`), which is imported only here, when a folder is opened.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from wanjax.attention import biased
from wanjax.errors import UserError
from wanjax.eval.pixels import Video, check_pixels
from wanjax.nn import gelu_exact, gelu_tanh
from wanjax.precision import matmul_precision
from wanjax.tensor_files import read_safetensors
from wanjax.types import PathLike

WEIGHTS = "model.safetensors"
FIRST_EOS = 2  # configs of before 2023 say so, whatever their tokenizer's end mark is
ACTIVATIONS = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": gelu_exact,
    "gelu_pytorch_tanh": gelu_tanh,
}


@dataclass(frozen=True)
class Tower:
    """Of a transformer: what its config says."""

    prefix: str
    layers: int
    heads: int
    epsilon: float
    activation: str
    causal: bool


class CLIP(nnx.Module):
    """Both towers in fp32, the tensors by the names that they have in the file."""

    def __init__(self, tensors: dict[str, np.ndarray], config: dict[str, Any], where: str):
        texts, pictures = config.get("text_config", {}), config.get("vision_config", {})
        self.text = _tower("text_model", texts, (8, 12), where)
        self.vision = _tower("vision_model", pictures, (12, 12), where)
        self.patch, self.eos = pictures.get("patch_size", 32), texts.get("eos_token_id", FIRST_EOS)
        self.tensors = nnx.Dict(
            {name: nnx.Param(jnp.asarray(x, jnp.float32)) for name, x in tensors.items()}
        )

    def embed_text(self, ids: Int[Array, "B L"]) -> Float[Array, "B C"]:
        """Unit vectors of tokenised texts, each read at its end mark."""
        embeddings = "text_model.embeddings"
        x = self._get(f"{embeddings}.token_embedding.weight")[ids]
        x = x + self._get(f"{embeddings}.position_embedding.weight")[: ids.shape[1]]
        x = self._norm(self._blocks(x, self.text), "text_model.final_layer_norm", self.text)
        at = ids.argmax(1) if self.eos == FIRST_EOS else (ids == self.eos).argmax(1)
        x = x[jnp.arange(len(ids)), at]
        return _unit(_times(x, self._get("text_projection.weight")))

    def embed_pictures(self, pixels: Float[Array, "B H W 3"]) -> Float[Array, "B C"]:
        """Unit vectors of pictures that the folder's processor has prepared."""
        embeddings = "vision_model.embeddings"
        kernel = self._get(f"{embeddings}.patch_embedding.weight")
        count, height, width, _ = pixels.shape
        h, w = height // self.patch, width // self.patch
        x = pixels.reshape(count, h, self.patch, w, self.patch, 3).transpose(0, 1, 3, 2, 4, 5)
        # PyTorch's kernels are (out, in, height, width).
        kernel = kernel.transpose(0, 2, 3, 1).reshape(len(kernel), -1)
        x = _times(x.reshape(count, h * w, -1), kernel)
        first = jnp.broadcast_to(
            self._get(f"{embeddings}.class_embedding"), (count, 1, x.shape[-1])
        )
        x = jnp.concatenate([first, x], 1) + self._get(f"{embeddings}.position_embedding.weight")
        x = self._norm(x, "vision_model.pre_layrnorm", self.vision)
        x = self._blocks(x, self.vision)[:, 0]
        x = self._norm(x, "vision_model.post_layernorm", self.vision)
        return _unit(_times(x, self._get("visual_projection.weight")))

    def _blocks(self, x: Float[Array, "B N C"], tower: Tower) -> Float[Array, "B N C"]:
        for i in range(tower.layers):
            layer = f"{tower.prefix}.encoder.layers.{i}"
            y = self._norm(x, f"{layer}.layer_norm1", tower)
            x = x + self._attention(y, f"{layer}.self_attn", tower)
            y = self._linear(self._norm(x, f"{layer}.layer_norm2", tower), f"{layer}.mlp.fc1")
            x = x + self._linear(ACTIVATIONS[tower.activation](y), f"{layer}.mlp.fc2")
        return x

    def _attention(self, x: Float[Array, "B N C"], name: str, tower: Tower) -> Array:
        batch, count, width = x.shape
        q, k, v = (
            self._linear(x, f"{name}.{part}_proj").reshape(batch, count, tower.heads, -1)
            for part in "qkv"
        )
        later = jnp.triu(jnp.full((count, count), -jnp.inf if tower.causal else 0.0), 1)
        x = biased(q * q.shape[-1] ** -0.5, k, v, later[None, None])
        return self._linear(x.reshape(batch, count, width), f"{name}.out_proj")

    def _norm(self, x: Array, name: str, tower: Tower) -> Array:
        x = x - x.mean(-1, keepdims=True)
        x = x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + tower.epsilon)
        return x * self._get(f"{name}.weight") + self._get(f"{name}.bias")

    def _linear(self, x: Array, name: str) -> Array:
        return _times(x, self._get(f"{name}.weight")) + self._get(f"{name}.bias")

    def _get(self, name: str) -> Array:
        return self.tensors[name][...]


class Judge:
    """A CLIP with its tokenizer and its preparation of pictures."""

    def __init__(self, model: CLIP, tokenizer: Any, processor: Any):
        self.model, self._tokenizer, self._processor = model, tokenizer, processor
        self.longest = model.tensors["text_model.embeddings.position_embedding.weight"].shape[0]

    def frames(self, video: Video) -> Float[np.ndarray, "T C"]:
        """A unit vector of each frame."""
        check_pixels(video)
        prepared = self._processor(
            list(video), return_tensors="np", input_data_format="channels_last"
        )
        pixels = np.asarray(prepared["pixel_values"], np.float32).transpose(0, 2, 3, 1)
        return np.asarray(_embed_pictures(self.model, pixels))

    def text(self, prompt: str) -> Float[np.ndarray, " C"]:
        """The unit vector of a prompt; one that is too long is cut, its end mark kept."""
        return np.asarray(_embed_text(self.model, self.ids([prompt])))[0]

    def ids(self, prompts: Sequence[str]) -> Int[np.ndarray, "B L"]:
        """Tokens, padded to the longest that the tower takes."""
        found = self._tokenizer(
            list(prompts),
            padding="max_length",
            truncation=True,
            max_length=self.longest,
            return_tensors="np",
        )
        return np.asarray(found["input_ids"], np.int32)

    def is_cut(self, prompt: str) -> bool:
        """Whether a prompt is too long to be seen whole."""
        return (
            len(self._tokenizer(prompt, truncation=False, verbose=False)["input_ids"])
            > self.longest
        )


def open_clip(folder: PathLike) -> Judge:
    """The CLIP in a folder of Hugging Face's. Raises `UserError` for what is no such folder."""
    folder = Path(folder)
    config = check_folder(folder)
    tensors = read_safetensors(folder / WEIGHTS).tensors
    unread = ("position_ids", "logit_scale")
    tensors = {name: x for name, x in tensors.items() if not name.endswith(unread)}
    model = CLIP(tensors, config, str(folder))
    return Judge(model, *_preparation(folder))


def check_folder(folder: Path) -> dict[str, Any]:
    """The config of a folder that holds a CLIP. Raises `UserError` for another."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder} is no folder of a CLIP (config.json: {error}); fetch one, such as "
            "openai/clip-vit-large-patch14, with its tokenizer and preprocessor_config.json."
        ) from error
    if config.get("model_type") != "clip":
        raise UserError(
            f"{folder} holds a model of type '{config.get('model_type')}', not 'clip'; CLIP-SIM "
            "takes what Hugging Face's CLIPModel saved."
        )
    return config


def text_similarity(frames: Float[np.ndarray, "T C"], text: Float[np.ndarray, " C"]) -> float:
    """CLIP-SIM of text and video (Wu et al. 2021, arXiv 2104.14806): mean cosine of the prompt and
    each frame, from -1 to 1."""
    return float((frames @ text).mean())


def frame_similarity(frames: Float[np.ndarray, "T C"]) -> float:
    """Mean cosine of neighbouring frames (Esser et al. 2023, arXiv 2302.03011): 1 for a still."""
    return float((frames[1:] * frames[:-1]).sum(-1).mean())


def reference_similarity(
    frames: Float[np.ndarray, "T C"], reference: Float[np.ndarray, " C"]
) -> float:
    """Mean cosine of a reference picture and each frame: does the subject stay itself?"""
    return float((frames @ reference).mean())


_embed_pictures = jax.jit(CLIP.embed_pictures)
_embed_text = jax.jit(CLIP.embed_text)


def _preparation(folder: Path) -> tuple[Any, Any]:
    """The tokenizer and the picture processor."""
    try:
        from transformers import AutoTokenizer, CLIPImageProcessorPil
    except ImportError as error:
        raise UserError(
            "CLIP-SIM needs the package transformers, 5 or newer, which is not installed; run "
            '`pip install "wanjax[eval]"`.'
        ) from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        return tokenizer, CLIPImageProcessorPil.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers may stumble over a file in any way
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{folder} lacks its tokenizer or preprocessor_config.json ({reason}); fetch it whole."
        ) from error


def _tower(prefix: str, config: dict[str, Any], usual: tuple[int, int], where: str) -> Tower:
    activation = config.get("hidden_act", "quick_gelu")
    if activation not in ACTIVATIONS:
        raise UserError(
            f"{where} has the activation '{activation}' in its {prefix}, which is not known here; "
            f"use a CLIP with one of {', '.join(ACTIVATIONS)}."
        )
    heads, layers = usual
    return Tower(
        prefix,
        config.get("num_hidden_layers", layers),
        config.get("num_attention_heads", heads),
        config.get("layer_norm_eps", 1e-5),
        activation,
        causal=prefix == "text_model",
    )


def _times(x: Float[Array, "... C"], weight: Float[Array, "C2 C"]) -> Float[Array, "... C2"]:
    return jnp.matmul(x, weight.T, precision=matmul_precision(x.dtype))


def _unit(x: Float[Array, "... C"]) -> Float[Array, "... C"]:
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)
