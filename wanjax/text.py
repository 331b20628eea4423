"""Prompts to tokens: cleaning, umT5's tokenizer, and the negative prompts that Wan ships.

The tokenizer's own file, `tokenizer.json`, is read with the `tokenizers` package. Transformers
would take seconds to import, and from version 5 on it rebuilds the T5 tokenizer with T5's id for
unknown characters (2) where umT5 has 3. Source: Wan-Video/Wan2.1, `wan/modules/tokenizers.py`.
"""

import html
import re
import warnings
from collections.abc import Sequence
from pathlib import Path

import ftfy
import jax.numpy as jnp
import numpy as np
import tokenizers
from jaxtyping import Array, Float, Int

from wanjax.errors import UserError
from wanjax.models.dit import DiTConfig
from wanjax.text_files import read_text, whole_characters
from wanjax.types import PathLike, Tokens

PAD, END = 0, 1

# What Wan's sampler steers away from when no negative prompt is given (`wan/configs`): gaudy,
# overexposed, static, blurred, subtitles, paintings, low quality, malformed hands and faces, ...
NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，"
    "低质量，JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，"
    "毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)
NEGATIVE_PROMPT_I2V = "镜头晃动，" + NEGATIVE_PROMPT  # and camera shake
NEGATIVE_PROMPT_FLF2V = "镜头切换，" + NEGATIVE_PROMPT_I2V  # and cuts


def default_negative(config: DiTConfig) -> str:
    """Wan's negative prompt for this kind of model."""
    if config.image_dim is None:
        return NEGATIVE_PROMPT
    return NEGATIVE_PROMPT_I2V if config.image_positions is None else NEGATIVE_PROMPT_FLF2V


def check_vocabulary(tokens: Tokens, rows: int, folder: Path) -> None:
    """Refuse the tokenizer of another model, whose ids the text encoder has no vectors for."""
    if tokens.ids.max() >= rows:
        raise UserError(
            f"The tokenizer in {folder} gives the id {tokens.ids.max()} and the text encoder knows "
            f"{rows}; use the tokenizer that came with the checkpoint."
        )


def clean(prompt: str) -> str:
    """Mend broken Unicode and halves of characters, resolve HTML entities, and make every run of
    white space one blank."""
    text = html.unescape(html.unescape(ftfy.fix_text(whole_characters(prompt))))
    return re.sub(r"\s+", " ", text).strip()


class Tokenizer:
    """umT5's tokenizer, from a folder that holds its `tokenizer.json`.

    Raises `UserError` where there is no such file, or where it is not a tokenizer laid out like
    umT5's (id 0 pads, id 1 ends a prompt).
    """

    def __init__(self, folder: PathLike, length: int = 512):
        self.length = length
        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            raise UserError(
                f"There is no tokenizer at '{path}'; fetch it with the checkpoint "
                "(google/umt5-xxl/tokenizer.json or tokenizer/tokenizer.json)."
            )
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(read_text(path))
        except UserError:
            raise
        except Exception as error:  # the package raises nothing narrower
            raise UserError(
                f"'{path}' is not a tokenizer ({error}); fetch the file again."
            ) from error
        found = [self._tokenizer.token_to_id(token) for token in ("<pad>", "</s>")]
        if found != [PAD, END]:
            raise UserError(
                f"'{path}' has the ids {found} for <pad> and </s> where umT5 has {[PAD, END]}; "
                "use the tokenizer that came with the checkpoint."
            )
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()

    def __call__(self, prompts: Sequence[str]) -> Tokens:
        """Cleaned prompts as ids, each ended and padded to `length`; a longer one is cut."""
        ids = np.full((len(prompts), self.length), PAD, np.int32)
        mask = np.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            text = clean(prompt)
            found = self._tokenizer.encode(text, add_special_tokens=False).ids
            if (lost := len(found) + 1 - self.length) > 0:
                warnings.warn(
                    f"The prompt '{text[:40]}…' has {len(found) + 1} tokens with the end token, "
                    f"and {self.length} fit; its last {lost} are ignored.",
                    stacklevel=2,
                )
            found = [*found[: self.length - 1], END]
            ids[row, : len(found)], mask[row, : len(found)] = found, 1
        return Tokens(ids, mask)


def zero_padding(
    features: Float[Array, "B L C"], mask: Int[Array, "B L"] | Int[np.ndarray, "B L"]
) -> Float[Array, "B L C"]:
    """The encoder's output as the denoiser takes it: zero where the prompt has ended."""
    return jnp.where(jnp.asarray(mask)[..., None] != 0, features, 0)
