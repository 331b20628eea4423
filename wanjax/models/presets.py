"""The architectures of the published models, and `nano`: the same structure at toy widths.

The counts of tensors and parameters are tested against the published ones.
"""

from dataclasses import replace

from wanjax.models import Config
from wanjax.models.clip import CLIPVisionConfig
from wanjax.models.dit import DiTConfig
from wanjax.models.umt5 import UMT5Config
from wanjax.models.vae import VAEConfig

_I2V = {
    "dit": DiTConfig(),
    "vae": VAEConfig(),
    "text_encoder": UMT5Config(),
    "image_encoder": CLIPVisionConfig(),
}
_T2V = {k: v for k, v in _I2V.items() if k != "image_encoder"}
_T2V_DIT = replace(_I2V["dit"], image_dim=None, in_channels=16)

ARCHITECTURES: dict[str, dict[str, Config]] = {
    "i2v_14b_720p": _I2V,
    "i2v_14b_480p": _I2V,
    "flf2v_14b_720p": {**_I2V, "dit": replace(_I2V["dit"], image_positions=514)},
    "t2v_14b": {**_T2V, "dit": _T2V_DIT},
    "t2v_1_3b": {
        **_T2V,
        "dit": replace(_T2V_DIT, dim=1536, ffn_dim=8960, num_layers=30, num_heads=12),
    },
    "nano": {
        "dit": DiTConfig(
            dim=128,
            ffn_dim=384,
            num_layers=4,
            num_heads=4,
            text_dim=64,
            text_len=64,
            freq_dim=64,
            image_dim=64,
        ),
        "vae": VAEConfig(base_dim=16),
        "text_encoder": UMT5Config(
            vocab_size=512, dim=64, attention_dim=64, num_heads=4, ffn_dim=128, num_layers=2
        ),
        "image_encoder": CLIPVisionConfig(
            image_size=56, dim=64, num_heads=4, num_layers=3, ffn_dim=128
        ),
    },
}
