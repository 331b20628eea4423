"""The published architectures, recognised and inferred from nothing but names and shapes."""

import math
from dataclasses import replace

import numpy as np
import pytest

from convert.configs import dit_from_official, dit_to_official, from_diffusers, to_diffusers
from convert.infer import Shapes, infer
from convert.mapping import foreign_plan, leaf_shapes, native_plan
from convert.networks import recognise
from wanjax.errors import UserError
from wanjax.models.presets import ARCHITECTURES

PUBLISHED = {
    f"{name}-{network}": (network, config)
    for name in ("i2v_14b_720p", "flf2v_14b_720p", "t2v_14b", "t2v_1_3b")
    for network, config in ARCHITECTURES[name].items()
    if network == "dit" or name == "i2v_14b_720p"
}
LAYOUTS = ("official", "diffusers")


def empty_tensors(network, config, layout) -> dict[str, np.ndarray]:
    """Their tensors at full size, of one zero each."""
    leaves = {
        name: np.broadcast_to(np.float32(0), shape)
        for name, shape in leaf_shapes(network, config).items()
    }
    planned = foreign_plan(network, config, layout, leaves, "x")
    return {t.name: np.broadcast_to(np.float32(0), t.shape) for t in planned}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("network", "config"), PUBLISHED.values(), ids=PUBLISHED)
def test_published_models_are_inferred(network, config, layout):
    tensors = empty_tensors(network, config, layout)
    assert recognise(tensors) == (network, layout)
    assert infer(network, Shapes(network, layout, tensors, "x"), layout) == config
    planned = native_plan(network, config, layout, tensors, "x")
    assert {t.name: t.shape for t in planned} == leaf_shapes(network, config)


def test_counts_of_the_official_checkpoint():
    counts = {}
    for network, config in ARCHITECTURES["i2v_14b_720p"].items():
        tensors = empty_tensors(network, config, "official")
        counts[network] = (len(tensors), sum(math.prod(t.shape) for t in tensors.values()))
    assert counts["dit"] == (1303, 16_394_878_784)
    assert counts["vae"] == (194, 126_892_531)
    assert counts["text_encoder"][1] == 5_680_910_336


def test_the_hub_config_is_written_as_it_is():
    hub = {"_class_name": "WanModel", "_diffusers_version": "0.30.0", "dim": 5120, "eps": 1e-06}
    hub |= {"ffn_dim": 13824, "freq_dim": 256, "in_dim": 36, "model_type": "i2v", "num_heads": 40}
    hub |= {"num_layers": 40, "out_dim": 16, "text_len": 512}
    config = ARCHITECTURES["i2v_14b_720p"]["dit"]
    assert dit_to_official(config) == hub
    shapes = Shapes("dit", "official", empty_tensors("dit", config, "official"), "x")
    assert dit_from_official(hub, shapes) == config


@pytest.mark.parametrize(("network", "config"), PUBLISHED.values(), ids=PUBLISHED)
def test_diffusers_configs_come_back(network, config):
    assert from_diffusers(network, to_diffusers(network, config, "float32"), "x") == config
    odd = replace(config, **{"vae": {"base_dim": 32}}.get(network, {"num_layers": 7}))
    assert from_diffusers(network, to_diffusers(network, odd, "float32"), "x") == odd


def test_a_vae_of_another_family_is_refused():
    config = replace(ARCHITECTURES["i2v_14b_720p"]["vae"], z_dim=48, latents_mean=(0.0,) * 48)
    tensors = empty_tensors("vae", config, "official")
    with pytest.raises(UserError, match="not Wan2.1's VAE .*48 latent channels"):
        infer("vae", Shapes("vae", "official", tensors, "x"), "official")
