"""Wan2.1's relatives, whose tensors map onto its names and which are other models all the same.

They are known by tensors of their own, and by the channels that they take and give: taken for
Wan2.1 they would convert, and fail or make noise hours later. Sources: the models' `config.json`
files, and ComfyUI's and DiffSynth's tables of models.
"""

import re
from collections.abc import Iterable
from pathlib import Path

from wanjax.errors import UserError
from wanjax.models.dit import DiTConfig

# The beginnings of names that only one of them has.
_OWN_TENSORS = {
    "vace_": "VACE",
    "control_adapter.": "a camera-control model (Fun-Camera)",
    "ref_conv.": "a Fun-Control model",
    "casual_audio_encoder.": "Wan2.2's speech-to-video model",
    "face_adapter.": "Wan2.2-Animate",
    "audio_proj": "an audio-driven model (HuMo, MultiTalk or FantasyTalking)",
    "fps_embedding": "SkyReels-V2's diffusion-forcing model",
    "blocks.0.cam_encoder": "ReCamMaster",
}
# Channels in and out, and whether there is a CLIP branch.
_CHANNELS = {
    (36, 16, False): "an expert of Wan2.2's image-to-video pair",
    (48, 48, False): "Wan2.2's TI2V-5B",
    (32, 16, False): "a Fun-Control model",
    (32, 16, True): "a camera-control model (Fun-Camera)",
    (48, 16, False): "a Fun-Control model",
    (48, 16, True): "a Fun-Control model",
    (52, 16, False): "an expert of Wan2.2-Fun-Control",
    (52, 16, True): "a Fun-Control model",
}
_OURS = {(16, 16, False), (36, 16, True)}
# Wan2.2's text-to-video experts are of the very shape of Wan2.1's model: only the name tells.
_EXPERT = re.compile(r"wan[-_. ]?2[-_.]?2(?!\d)|(high|low)[-_ ]?noise", re.IGNORECASE)


def refuse_relatives(names: Iterable[str], config: DiTConfig, where: Path) -> None:
    """Refuse a diffusion model that is not one of Wan2.1's, saying what it is."""
    has_image = config.image_dim is not None
    channels = (config.in_channels, config.out_channels, has_image)
    own = (kind for stem, kind in _OWN_TENSORS.items() for n in names if n.startswith(stem))
    kind = next(own, None)
    if kind is None and channels in _OURS:
        if has_image or not _EXPERT.search(where.name):
            return
        raise UserError(
            f"{where} is by its name an expert of Wan2.2's text-to-video pair, and alone makes no "
            "video; use a Wan2.1 model, or rename the file if it is one."
        )
    kind = kind or _CHANNELS.get(channels, "no model of Wan2.1")
    clip = "with" if has_image else "without"
    raise UserError(
        f"{where} is {kind} ({channels[0]} input and {channels[1]} output channels, {clip} a CLIP "
        "branch), which wanjax does not have; use a Wan2.1 text-to-video, image-to-video or "
        "first-and-last-frame checkpoint."
    )
