"""Picture and prompt to video: condition, denoise, decode.

A `Pipeline` opens a native checkpoint folder and loads a network when it is first needed, so that
the 11 GB text encoder and the denoiser need not share a device: after conditioning the encoders are
released, and the features of every prompt are kept. The denoise step is compiled once per size.
"""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from jax.typing import DTypeLike
from jaxtyping import Array, Float
from PIL import Image

from wanjax import lora as lora_module
from wanjax.checkpoint import load_lora
from wanjax.conditioning import check_size, encode_picture, encode_text, prepare, size_for
from wanjax.data.video import read_image
from wanjax.errors import UserError
from wanjax.models.clip import CLIPVision
from wanjax.models.dit import Context, DiT, DiTConfig
from wanjax.models.umt5 import UMT5
from wanjax.models.vae import VAE
from wanjax.precision import parse_dtype
from wanjax.progress import progress_bar
from wanjax.prompt_cache import PromptCache
from wanjax.sharding import check_rows, constrain, constrain_state
from wanjax.solvers import Coefficients, State, initial_state, make_schedule, step
from wanjax.text import (
    NEGATIVE_PROMPT,
    NEGATIVE_PROMPT_FLF2V,
    NEGATIVE_PROMPT_I2V,
    Tokenizer,
)
from wanjax.types import Condition, PathLike, Tokens
from wanjax.weights import abstract_network, fingerprint, load_network, read_config

ImageLike = PathLike | Image.Image | np.ndarray


class MissingNetworkError(UserError, AttributeError):
    """The checkpoint folder was made without this network."""


@dataclass(frozen=True)
class Conditioned:
    """A request whose encoders have run: what the denoiser needs, with and without the prompt."""

    positive: Condition
    negative: Condition
    height: int
    width: int
    frames: int


class Pipeline:
    """A Wan2.1 model ready to sample; its networks can also be called on their own.

    `dit(latents, timestep, text, image, condition)`, `vae.encode(video)`, `vae.decode(latents)`,
    `text_encoder(tokens, mask)`, `image_encoder(pixels)`: shapes are in their docstrings.
    """

    def __init__(
        self,
        folder: PathLike,
        *,
        dtype: DTypeLike = jnp.bfloat16,
        residual: str = "float32",
        loras: Sequence[tuple[lora_module.LoRA, float]] = (),
        mesh: Mesh | None = None,
    ):
        self.folder = Path(folder)
        self.configs = read_config(folder)
        self.dtype, self.loras, self.mesh = dtype, tuple(loras), mesh
        self.residual = parse_dtype(residual).name
        self._networks: dict[str, nnx.Module] = {}
        self._prompts: dict[str, np.ndarray] = {}
        if self.loras:
            # Refuse adapters of another model now, not after minutes of loading.
            self._require("dit")
            lora_module.check_fits(abstract_network("dit", self.configs["dit"], dtype), self.loras)

    @classmethod
    def load(
        cls,
        folder: PathLike,
        *,
        dtype: str | DTypeLike = "bfloat16",
        residual: str = "float32",
        lora: Sequence[tuple[PathLike, float]] = (),
        mesh: Mesh | None = None,
    ) -> "Pipeline":
        """Open the native checkpoint in `folder`; weights are read when they are first needed.

        `dtype` is "bfloat16" or "float32" (what runs in fp32 all the same: docs/precision.md), and
        `residual` the type of the denoiser's residual stream. `lora` lists runs or native adapter
        files, each with a strength. Raises `UserError` for a folder, an adapter or a type that
        cannot be used.
        """
        loras = [(load_lora(path), strength) for path, strength in lora]
        return cls(folder, dtype=parse_dtype(dtype), residual=residual, loras=loras, mesh=mesh)

    @property
    def dit(self) -> DiT:
        return self._network("dit")

    @property
    def vae(self) -> VAE:
        return self._network("vae")

    @property
    def text_encoder(self) -> UMT5:
        return self._network("text_encoder")

    @property
    def image_encoder(self) -> CLIPVision:
        return self._network("image_encoder")

    def require(self, *names: str) -> None:
        """Refuse a folder that was made without one of these networks."""
        for name in names:
            self._require(name)

    def release(self, *names: str) -> None:
        """Forget loaded networks; they are read again if they are needed again."""
        for name in names:
            self._networks.pop(name, None)

    def sample(
        self,
        *,
        image: ImageLike | None = None,
        last_image: ImageLike | None = None,
        prompt: str = "",
        negative_prompt: str | None = None,
        height: int | None = None,
        width: int | None = None,
        area: int = 720 * 1280,
        frames: int = 81,
        steps: int = 40,
        guidance: float = 5.0,
        shift: float = 5.0,
        solver: str = "unipc",
        sigmas: Sequence[float] | None = None,
        noise: Float[np.ndarray, "..."] | None = None,
        seed: int = 0,
        preprocess: str = "official",
    ) -> Float[np.ndarray, "T H W 3"]:
        """A video in [0, 1]. Without `height` and `width` its size has `area` and the picture's
        aspect. `negative_prompt=None` is Wan's own; `noise` (`t h w 16`) replaces the seed's;
        `sigmas` (N+1 values falling to 0) replace steps and shift."""
        conditioned = self.condition(
            image=image,
            last_image=last_image,
            prompt=prompt,
            negative_prompt=negative_prompt,
            height=height,
            width=width,
            area=area,
            frames=frames,
            preprocess=preprocess,
        )
        self.release("text_encoder", "image_encoder")
        return self.generate(
            conditioned,
            steps=steps,
            guidance=guidance,
            shift=shift,
            solver=solver,
            sigmas=sigmas,
            noise=noise,
            seed=seed,
        )

    def condition(
        self,
        *,
        image: ImageLike | None = None,
        last_image: ImageLike | None = None,
        prompt: str = "",
        negative_prompt: str | None = None,
        height: int | None = None,
        width: int | None = None,
        area: int = 720 * 1280,
        frames: int = 81,
        preprocess: str = "official",
    ) -> Conditioned:
        """Run the encoders; the arguments are those of `sample`."""
        config = self.configs[self._require("dit")]
        self._check_pictures(image, last_image)
        pictures = [read_picture(p) for p in (image, last_image) if p is not None]
        height, width = _choose_size(height, width, area, pictures)
        check_size(frames, height, width)
        if negative_prompt is None:
            negative_prompt = default_negative(config)
        positive, negative = self.encode_prompts([prompt, negative_prompt])
        tokens = latents = None
        if pictures:
            prepared = prepare(
                pictures[0],
                last_picture=pictures[1] if len(pictures) > 1 else None,
                frames=frames,
                height=height,
                width=width,
                preprocess=preprocess,
                clip_size=self.configs[self._require("image_encoder")].image_size,
            )
            with self._on_mesh():
                tokens, latents = encode_picture(self.vae, self.image_encoder, prepared)
        conditions = (Condition(text[None], tokens, latents) for text in (positive, negative))
        return Conditioned(*jax.device_get(tuple(conditions)), height, width, frames)

    def encode_prompts(self, prompts: Sequence[str]) -> Float[np.ndarray, "B L C"]:
        """umT5 features, zero after the end of each prompt. Known prompts, of this run or of an
        earlier one, are not encoded again."""
        new = [p for p in dict.fromkeys(prompts) if p not in self._prompts]
        if new:
            tokens = self._tokenize(new)
            encoder = fingerprint(self.folder, self._require("text_encoder"))
            cache = PromptCache(encoder, jnp.dtype(self.dtype).name)
            for prompt, ids, mask in zip(new, tokens.ids, tokens.mask):
                features = cache.get(ids)
                if features is None:
                    with self._on_mesh():
                        features = encode_text(self.text_encoder, Tokens(ids[None], mask[None]))[0]
                    cache.put(ids, features)
                self._prompts[prompt] = features
        return np.stack([self._prompts[p] for p in prompts])

    def _tokenize(self, prompts: Sequence[str]) -> Tokens:
        tokenizer = Tokenizer(
            self.folder / "tokenizer", self.configs[self._require("dit")].text_len
        )
        rows = self.configs[self._require("text_encoder")].vocab_size
        tokens = tokenizer(prompts)
        if tokens.ids.max() >= rows:
            raise UserError(
                f"The tokenizer in {self.folder} gives the id {tokens.ids.max()} and the text "
                f"encoder knows {rows}; use the tokenizer that came with the checkpoint."
            )
        return tokens

    def generate(
        self,
        conditioned: Conditioned,
        *,
        steps: int = 40,
        guidance: float = 5.0,
        shift: float = 5.0,
        solver: str = "unipc",
        sigmas: Sequence[float] | None = None,
        noise: Float[np.ndarray, "..."] | None = None,
        seed: int = 0,
    ) -> Float[np.ndarray, "T H W 3"]:
        """Denoise and decode; the arguments are those of `sample`."""
        if not math.isfinite(guidance):
            raise UserError(f"guidance={guidance} is not a scale; use 5, or 1 for no guidance.")
        schedule = make_schedule(solver, steps, shift, sigmas)
        # Committed to their places, as a step's results are: else the second step compiles again.
        guided = guidance != 1
        check_rows(
            1 + guided, self.mesh, "A guided video" if guided else "A video without guidance"
        )
        state, conditions = jax.device_put(
            (
                initial_state(self._noise(conditioned, noise, seed)),
                (conditioned.positive, conditioned.negative)[: 1 + guided],
            ),
            self._everywhere(),
        )
        with self._on_mesh(), progress_bar("Denoising", len(schedule)) as bar:
            given = prepare_rows(self.dit, conditions)
            for i, timestep in enumerate(schedule.timesteps):
                state = denoise_step(
                    self.dit,
                    state,
                    timestep,
                    schedule.row(i),
                    given,
                    np.float32(guidance),
                    guided=guided,
                )
                state.x.block_until_ready()
                bar.advance()
            video = self.vae.decode(state.x)
        return np.clip(np.asarray(video[0], np.float32) * 0.5 + 0.5, 0, 1)

    def _noise(self, conditioned: Conditioned, noise, seed: int) -> jax.Array:
        stride = self.configs[self._require("vae")].stride
        shape = (
            (conditioned.frames - 1) // stride[0] + 1,
            conditioned.height // stride[1],
            conditioned.width // stride[2],
            self.configs["dit"].out_channels,
        )
        if noise is None:
            return jax.random.normal(jax.random.key(seed), (1, *shape), jnp.float32)
        noise = jnp.array(noise, jnp.float32)  # a copy: the denoise step consumes its state
        if noise.shape not in (shape, (1, *shape)):
            raise UserError(f"noise has the shape {noise.shape} and this video needs {shape}.")
        return noise.reshape(1, *shape)

    def _check_pictures(self, image: object, last_image: object) -> None:
        config = self.configs["dit"]
        if (image is None) != (config.image_dim is None):
            need = "needs a picture" if image is None else "is text-to-video and takes no picture"
            remedy = "give one as `image`" if image is None else "leave `image` out"
            raise UserError(f"The model in {self.folder} {need}; {remedy}.")
        if (last_image is None) != (config.image_positions is None):
            need = "needs" if last_image is None else "takes no"
            remedy = "give one as `last_image`" if last_image is None else "leave `last_image` out"
            raise UserError(f"The model in {self.folder} {need} last picture; {remedy}.")

    def _on_mesh(self):
        return nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def _everywhere(self) -> jax.sharding.Sharding:
        """Where what is not a weight lies: whole on every device of the mesh, or on the one."""
        if self.mesh is None:
            return SingleDeviceSharding(jax.local_devices()[0])
        return NamedSharding(self.mesh, PartitionSpec())

    def _require(self, name: str) -> str:
        if name not in self.configs:
            raise MissingNetworkError(
                f"{self.folder} holds no {name} (it has {', '.join(self.configs)}); "
                "convert the checkpoint again, with it."
            )
        return name

    def _network(self, name: str) -> nnx.Module:
        self._require(name)
        if name not in self._networks:
            network = load_network(self.folder, name, dtype=self.dtype, mesh=self.mesh)
            if name == "dit":
                network.residual = self.residual
            if name == "dit" and self.loras:
                lora_module.apply(network, self.loras)
            self._networks[name] = network
        return self._networks[name]


class Rows(NamedTuple):
    """What the denoiser is told in every step, for both branches of guidance as one batch."""

    context: Context
    condition: Float[Array, "B t h w C3"] | None


@jax.jit
def prepare_rows(dit: DiT, conditions: tuple[Condition, ...]) -> Rows:
    """What does not change from step to step, computed once; the prompt's branch comes first."""
    c = jax.tree.map(lambda *parts: jnp.concatenate(parts), *conditions)
    context = jax.tree.map(
        lambda x: constrain(x, None, "batch", None, None, None), dit.context(c.text, c.image)
    )
    return Rows(context, c.latents)


@partial(jax.jit, static_argnames="guided", donate_argnames="state")
def denoise_step(
    dit: DiT,
    state: State,
    timestep: Float[Array, ""],
    coefficients: Coefficients,
    rows: Rows,
    guidance: Float[Array, ""],
    *,
    guided: bool,
) -> State:
    """One solver step under classifier-free guidance, `v = v_n + g * (v_p - v_n)`; both branches
    run as one batch. Not `guided` means g = 1: only the prompt's branch runs."""
    copies = 1 + guided
    x = jnp.concatenate([state.x] * copies)
    velocity = dit.denoise(x, jnp.full(copies, timestep), rows.context, rows.condition)
    if guided:
        towards, away = velocity[:1], velocity[1:]
        velocity = away + guidance * (towards - away)
    return constrain_state(step(state, velocity, coefficients))


def read_picture(image: ImageLike) -> np.ndarray:
    """A path, a PIL image or an array (uint8, or float in [0, 1]) as RGB uint8 `[H W 3]`."""
    if isinstance(image, str | Path):
        return read_image(image)
    if isinstance(image, Image.Image):
        return np.asarray(image.convert("RGB"))
    array = np.asarray(image)
    if array.ndim != 3 or array.shape[-1] != 3:
        raise UserError(f"An image is an array [H W 3], not {list(array.shape)}; convert it first.")
    if array.dtype == np.uint8:
        return array
    return np.round(np.clip(array, 0, 1) * 255).astype(np.uint8)


def default_negative(config: DiTConfig) -> str:
    """Wan's negative prompt for this kind of model."""
    if config.image_dim is None:
        return NEGATIVE_PROMPT
    return NEGATIVE_PROMPT_I2V if config.image_positions is None else NEGATIVE_PROMPT_FLF2V


def _choose_size(
    height: int | None, width: int | None, area: int, pictures: Sequence[np.ndarray]
) -> tuple[int, int]:
    if (height is None) != (width is None):
        raise UserError("Give both height and width, or neither (the picture's aspect decides).")
    if height is not None:
        return height, width
    return size_for(*(pictures[0].shape[:2] if pictures else (9, 16)), area)
