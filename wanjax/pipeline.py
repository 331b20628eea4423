"""Picture and prompt to video: condition, denoise, decode.

A `Pipeline` opens a native checkpoint folder and loads a network when it is first needed. Which
networks share the device is a rule over its phases (`wanjax.residency`); the features of every
prompt and the tokens of every picture are kept. The denoise step is compiled once per size.
"""

import hashlib
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Float

from wanjax.checkpoint import load_lora
from wanjax.conditioning import check_size, encode_text, image_tokens, picture_condition, prepare
from wanjax.denoising import Branches, denoise_step, prepare_rows
from wanjax.devices import Speed
from wanjax.errors import UserError
from wanjax.lora import LoRA, check_fits, matched
from wanjax.models.clip import CLIPVision
from wanjax.models.dit import DiT
from wanjax.models.umt5 import UMT5
from wanjax.models.vae import VAE
from wanjax.pictures import ImageLike, check_pictures, choose_size, read_picture
from wanjax.precision import parse_dtype
from wanjax.progress import COMPILING, phase, progress_bar
from wanjax.prompt_cache import PromptCache
from wanjax.quantisation import UNQUANTISED, Base, check_base
from wanjax.residency import Residency, Residents
from wanjax.sharding import check_heads, check_rows, one_device
from wanjax.slots import Slots
from wanjax.solvers import initial_noise, initial_state, make_schedule, renoise, seed_key
from wanjax.text import Tokenizer, check_vocabulary, default_negative
from wanjax.types import Condition, Conditioned, PathLike
from wanjax.weights import abstract_network, device_bytes, fingerprint, load_network, read_config
from wanjax.work import denoise_step as denoise_work


class MissingNetworkError(UserError, AttributeError):
    """The checkpoint folder was made without this network."""


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
        base: Base = UNQUANTISED,
        residual: str = "float32",
        loras: Sequence[tuple[LoRA, float]] = (),
        mesh: Mesh | None = None,
        residency: Residency = "auto",
        branches: Branches = "together",
    ):
        self.folder = Path(folder)
        self.configs = read_config(folder)
        self.dtype, self.base, self.loras = dtype, base, tuple(loras)
        self.mesh = one_device() if mesh is None else mesh
        self.residual, self.branches = parse_dtype(residual).name, branches
        check_base(base)
        self.residents = Residents(self.configs, self._load, self._size, residency)
        self._prompts: dict[str, np.ndarray] = {}
        self._pictures: dict[str, np.ndarray] = {}
        if "dit" in self.configs:
            check_heads(self.configs["dit"].num_heads, self.mesh.shape["ulysses"])
        self._slots, self._slots_hold = Slots(), None
        self._check_adapters(self.loras)

    @classmethod
    def load(
        cls,
        folder: PathLike,
        *,
        dtype: str | DTypeLike = "bfloat16",
        base: Base = UNQUANTISED,
        residual: str = "float32",
        lora: Sequence[tuple[PathLike | LoRA, float]] = (),
        mesh: Mesh | None = None,
        residency: Residency = "auto",
        branches: Branches = "together",
    ) -> "Pipeline":
        """Open the native checkpoint in `folder`; weights are read when they are first needed.

        `dtype` is "bfloat16" or "float32" (what runs in fp32 all the same: docs/precision.md), and
        `residual` the type of the denoiser's residual stream. With `base` "int8", "fp8" or "nf4"
        the denoiser's blocks have fewer bits (`wanjax.quantisation`). `lora` lists runs, native
        adapter files or what `convert.open_lora` read, each with a strength. `residency` says what
        networks do that a phase does not need (`wanjax.residency`). `branches` are those of
        guidance: both as one batch, or one after the other in less memory. Raises `UserError` for
        what cannot be used.
        """
        return cls(
            folder,
            dtype=parse_dtype(dtype),
            base=base,
            residual=residual,
            loras=_opened(lora),
            mesh=mesh,
            residency=residency,
            branches=branches,
        )

    def set_adapters(self, lora: Sequence[tuple[PathLike | LoRA, float]] = ()) -> None:
        """Use these adapters, each with a strength, and no others; as `lora` of `load`.

        The base is not read again. Other strengths compile nothing, and other adapters only where
        the joined rank (in steps of 64) or the set of adapted layers grows (`wanjax.slots`).
        Without any the base is what it was, bit for bit. Raises `UserError`, and changes nothing,
        for adapters of another model.
        """
        loras = _opened(lora)
        self._check_adapters(loras)
        self.loras = loras

    def adapters_matched(self) -> list[str]:
        """For each adapter how many layers of the model it was matched with, in words."""
        return [matched(self._abstract_dit, lora) for lora, _ in self.loras]

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
        check_pictures(config, self.folder, image, last_image)
        pictures = [read_picture(p) for p in (image, last_image) if p is not None]
        height, width = choose_size(height, width, area, pictures)
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
            tokens = self.encode_pictures(prepared.clip)
            with self._working("picture", "vae", "Encoding the picture") as vae:
                latents = jax.block_until_ready(picture_condition(vae, prepared))
        conditions = (Condition(text[None], tokens, latents) for text in (positive, negative))
        return Conditioned(*jax.device_get(tuple(conditions)), height, width, frames)

    def encode_prompts(self, prompts: Sequence[str]) -> Float[np.ndarray, "B L C"]:
        """umT5 features, zero after the end of each prompt. Known prompts, of this run or of an
        earlier one, are not encoded again."""
        for prompt in prompts:
            if prompt not in self._prompts:
                self._prompts[prompt] = self.encode_prompt(prompt)
        length = self.configs[self._require("dit")].text_len
        known = [self._prompts[prompt] for prompt in prompts]
        return np.stack([np.pad(text, ((0, length - len(text)), (0, 0))) for text in known])

    def encode_prompt(self, prompt: str) -> Float[np.ndarray, "n C"]:
        """umT5 features of one prompt at its true length, which only the cache on disk keeps."""
        tokens = self._tokenizer([prompt])
        check_vocabulary(
            tokens, self.configs[self._require("text_encoder")].vocab_size, self.folder
        )
        length = int(tokens.mask.sum())
        features = self._prompt_cache.get(tokens.ids[0, :length])
        if features is None:
            with self._working("text", "text_encoder", "Encoding the prompt") as encoder:
                features = np.asarray(encode_text(encoder, tokens)[0][:length])
            self._prompt_cache.put(tokens.ids[0, :length], features)
        return features

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return Tokenizer(self.folder / "tokenizer", self.configs[self._require("dit")].text_len)

    @cached_property
    def _prompt_cache(self) -> PromptCache:
        encoder = fingerprint(self.folder, self._require("text_encoder"))
        return PromptCache(encoder, jnp.dtype(self.dtype).name)

    def encode_pictures(self, pictures: Float[np.ndarray, "P H W 3"]) -> Float[np.ndarray, "1 S C"]:
        """CLIP's tokens of one picture or two, joined along S; known pictures are not encoded
        again."""
        key = hashlib.sha256(pictures.tobytes()).hexdigest()
        if key not in self._pictures:
            with self._working("picture", "image_encoder", "Looking at the picture") as encoder:
                self._pictures[key] = np.asarray(image_tokens(encoder, pictures))
        return self._pictures[key]

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
        latents = self.denoise(
            conditioned,
            steps=steps,
            guidance=guidance,
            shift=shift,
            solver=solver,
            sigmas=sigmas,
            noise=noise,
            seed=seed,
        )
        return self.decode(latents)

    def denoise(
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
    ) -> Float[np.ndarray, "t h w C"]:
        """The latents of a video, on the host, fp32; the arguments are those of `sample`."""
        schedule = make_schedule(solver, steps, shift, sigmas)
        # Committed to their places, as a step's results are: else the second step compiles again.
        guided = self.check_guidance(guidance)
        noise, key = initial_noise(self.latents_shape(conditioned), noise, seed), seed_key(seed)
        conditions = (conditioned.positive, conditioned.negative)[: 1 + guided]
        given = (initial_state(noise), conditions, key)
        state, conditions, key = jax.device_put(given, self._everywhere())
        speed = self.speed(conditioned, guidance)
        self.residents.enter("denoise")
        dit = self.dit
        with self.on_mesh(), progress_bar("Denoising", len(schedule)) as bar:
            bar.advance(0, note=COMPILING)
            given = prepare_rows(dit, conditions)
            for i, timestep in enumerate(schedule.timesteps):
                since = time.perf_counter()
                state = denoise_step(
                    dit,
                    state,
                    timestep,
                    schedule.row(i),
                    given,
                    np.float32(guidance),
                    guided=guided,
                    branches=self.branches,
                )
                if schedule.fresh[i]:
                    state = renoise(state, schedule.fresh[i], key, np.int32(i))
                state.x.block_until_ready()
                seconds = time.perf_counter() - since
                bar.advance(note=f"{seconds:.2f} s/step, {speed.said(seconds)}" if i else "")
        latents = np.asarray(state.x[0])
        if not np.isfinite(latents).all():
            raise UserError(
                f"The video came out as NaN or infinity (guidance={guidance:g}, shift={shift:g}); "
                "use a smaller guidance, an adapter of less strength, or dtype float32."
            )
        return latents

    def decode(self, latents: Float[np.ndarray, "t h w C"]) -> Float[np.ndarray, "T H W 3"]:
        """The video of latents, in [0, 1]."""
        with self._working("decode", "vae", "Decoding") as vae:
            video = np.asarray(vae.decode(jax.device_put(latents[None], self._everywhere()))[0])
        return np.clip(video * 0.5 + 0.5, 0, 1)

    def latents_shape(self, conditioned: Conditioned) -> tuple[int, int, int, int]:
        """`t h w C` of the latents of a request."""
        stride = self.configs[self._require("vae")].stride
        return (
            (conditioned.frames - 1) // stride[0] + 1,
            conditioned.height // stride[1],
            conditioned.width // stride[2],
            self.configs["dit"].out_channels,
        )

    def speed(self, conditioned: Conditioned, guidance: float) -> Speed:
        """The arithmetic of one step of a request."""
        grid, guided = self.latents_shape(conditioned)[:3], self.check_guidance(guidance)
        return Speed.of(denoise_work(self.configs["dit"], grid, guided=guided), self.mesh)

    def check_guidance(self, guidance: float) -> bool:
        """Whether both branches run; refuses what is no scale, and a mesh with more `data`."""
        if not math.isfinite(guidance):
            raise UserError(f"guidance={guidance} is not a scale; use 5, or 1 for no guidance.")
        guided = guidance != 1
        what = "A guided video" if guided else "A video without guidance"
        check_rows(1 + (guided and self.branches == "together"), self.mesh, what)
        return guided

    def on_mesh(self):
        """The context in which programs are for this pipeline's devices."""
        return jax.set_mesh(self.mesh)

    @contextmanager
    def _working(self, at: str, network: str, label: str) -> Iterator[nnx.Module]:
        """A network on the devices, in the phase of a video that needs it."""
        self.residents.enter(at)
        loaded = self._network(network)
        with self.on_mesh(), phase(label):
            yield loaded

    def _everywhere(self) -> jax.sharding.Sharding:
        """Where what is not a weight lies: whole on every device."""
        return NamedSharding(self.mesh, PartitionSpec())

    def _require(self, name: str) -> str:
        if name not in self.configs:
            raise MissingNetworkError(
                f"{self.folder} holds no {name} (it has {', '.join(self.configs)}); "
                "convert the checkpoint again, with it."
            )
        return name

    def _network(self, name: str) -> nnx.Module:
        network = self.residents.get(self._require(name))
        if name == "dit" and self._slots_hold is not self.loras:
            self._slots.put(network, self.loras)
            self._slots_hold = self.loras
        return network

    def _check_adapters(self, loras: Sequence[tuple[LoRA, float]]) -> None:
        """Refuse adapters of another model now, not after minutes of loading."""
        for _, strength in loras:
            if not math.isfinite(strength):
                raise UserError(f"strength={strength} of an adapter is no number; use 1 or less.")
        if loras:
            check_fits(self._abstract_dit, loras)

    @cached_property
    def _abstract_dit(self) -> DiT:
        config = self.configs[self._require("dit")]
        return abstract_network("dit", config, self.dtype, self.base)

    def _base_of(self, name: str) -> Base:
        return self.base if name == "dit" else UNQUANTISED

    def _size(self, name: str) -> int:
        config, base = self.configs[name], self._base_of(name)
        return device_bytes(name, config, self.dtype, self.mesh, base)

    def _load(self, name: str) -> nnx.Module:
        base = self._base_of(name)
        network = load_network(self.folder, name, dtype=self.dtype, mesh=self.mesh, base=base)
        if name == "dit":
            network.residual = self.residual
            self._slots_hold = None
        return network


def _opened(loras: Sequence[tuple[PathLike | LoRA, float]]) -> tuple[tuple[LoRA, float], ...]:
    return tuple((x if isinstance(x, LoRA) else load_lora(x), float(s)) for x, s in loras)
