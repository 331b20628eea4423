"""The four networks of Wan2.1, by the name that they have in a checkpoint."""

from wanjax.models.clip import CLIPVision, CLIPVisionConfig
from wanjax.models.dit import DiT, DiTConfig
from wanjax.models.umt5 import UMT5, UMT5Config
from wanjax.models.vae import VAE, VAEConfig

Config = DiTConfig | VAEConfig | UMT5Config | CLIPVisionConfig

NETWORKS: dict[str, tuple[type, type]] = {
    "dit": (DiT, DiTConfig),
    "vae": (VAE, VAEConfig),
    "text_encoder": (UMT5, UMT5Config),
    "image_encoder": (CLIPVision, CLIPVisionConfig),
}
