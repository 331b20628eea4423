"""Adapter files in diffusers: what is written here, and what is read here of its own writing."""

import logging

import jax.numpy as jnp
import numpy as np
import pytest

from convert.loaders import takers
from convert.lora import convert_lora, open_lora
from convert.native import convert_pipeline
from tests.adapters import FAMILIES, LAYERS, in_family, random_pairs, save
from tests.parity.reference import randomise, relative_error
from wanjax import Pipeline
from wanjax.errors import UserError

torch = pytest.importorskip("torch", reason="parity tests compare with PyTorch")
from diffusers import FlowMatchEulerDiscreteScheduler, WanImageToVideoPipeline  # noqa: E402
from diffusers import WanTransformer3DModel as Theirs  # noqa: E402

pytestmark = pytest.mark.compiles
BLOCKS = 3


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """diffusers' pipeline around a small denoiser, and ours of the same weights."""
    torch.manual_seed(0)
    config = {"num_attention_heads": 3, "attention_head_dim": 20, "text_dim": 24, "freq_dim": 32}
    config |= {"ffn_dim": 80, "num_layers": BLOCKS, "image_dim": 32, "added_kv_proj_dim": 60}
    transformer = randomise(Theirs(in_channels=36, out_channels=16, **config))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    none = dict.fromkeys(("tokenizer", "text_encoder", "vae", "image_processor", "image_encoder"))
    theirs = WanImageToVideoPipeline(transformer=transformer, scheduler=scheduler, **none)
    folder = tmp_path_factory.mktemp("both")
    transformer.save_pretrained(folder / "src/transformer")
    convert_pipeline(folder / "src", folder / "ck", only=("dit",))
    return theirs, Pipeline.load(folder / "ck", dtype="float32")


def inputs():
    rng = np.random.default_rng(0)
    normal = lambda *s: rng.normal(size=s).astype(np.float32)  # noqa: E731
    return normal(1, 3, 6, 10, 36), normal(1, 512, 24), normal(1, 5, 32)


def ours_with(pipeline, adapter, strength=1.0):
    x, text, image = inputs()
    pipeline.set_adapters([(open_lora(adapter), strength)] if adapter else [])
    return pipeline.dit(x[..., :16], jnp.asarray([500.0]), text, image, x[..., 16:])


@pytest.fixture
def said(caplog):
    """What diffusers warns of: it drops keys with a line in the log."""
    logger = logging.getLogger("diffusers")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


def theirs_with(pipeline, adapter, said):
    x, text, image = inputs()
    said.clear()
    pipeline.load_lora_weights(adapter)
    try:
        assert not [r for r in said.records if r.levelno >= logging.WARNING], said.text
        tensors = map(torch.from_numpy, (x.transpose(0, 4, 1, 2, 3).copy(), text, image))
        x, text, image = tensors
        with torch.no_grad():
            time = torch.tensor([500.0])
            v = pipeline.transformer(x, time, text, image, return_dict=False)[0]
    finally:
        pipeline.unload_lora_weights()
    return v.movedim(1, -1).numpy()


def config_of(pipeline):
    return pipeline.configs["dit"]


TARGETS = {
    "all": {},
    "mixed ranks": {"ranks": (2, 4, 8)},
    "self-attention": {"layers": ("self_attn.q", "self_attn.o")},
    "one image projection": {"layers": ("cross_attn.q", "cross_attn.v_img")},
    "some blocks": {"blocks": (0, 2), "layers": ("self_attn.v", "ffn.2")},
}


@pytest.mark.parametrize("format", ["comfyui", "diffusers"])
@pytest.mark.parametrize("targets", TARGETS)
def test_what_is_written_acts_in_diffusers_as_here(both, format, targets, said, tmp_path):
    """And nothing is missing or unexpected there, which would be a line in the log."""
    theirs, ours = both
    pairs = random_pairs(config_of(ours), **TARGETS[targets])
    alpha = lambda n: np.float32(1 + n % 3)  # noqa: E731
    save(tmp_path / "a.safetensors", in_family("musubi", pairs, alpha))
    convert_lora(tmp_path / "a.safetensors", tmp_path / "o.safetensors", format)
    expected = theirs_with(theirs, tmp_path / "o.safetensors", said)
    assert relative_error(ours_with(ours, tmp_path / "a.safetensors"), expected) <= 1e-5
    assert relative_error(ours_with(ours, None), expected) > 1e-2


def test_kohya_of_all_layers_acts_in_diffusers_as_here(both, said, tmp_path):
    theirs, ours = both
    pairs = random_pairs(config_of(ours))
    save(tmp_path / "a.safetensors", in_family("bare", pairs))
    convert_lora(tmp_path / "a.safetensors", tmp_path / "o.safetensors", "kohya")
    expected = theirs_with(theirs, tmp_path / "o.safetensors", said)
    assert relative_error(ours_with(ours, tmp_path / "a.safetensors"), expected) <= 1e-5


def test_an_adapter_that_diffusers_saved_acts_here_as_there(both, said, tmp_path):
    """With alpha 6 at rank 4, which stands in its metadata only."""
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    theirs, ours = both
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["to_q", "add_k_proj", "net.2"])
    theirs.transformer.add_adapter(config)
    for name, parameter in theirs.transformer.named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    state = get_peft_model_state_dict(theirs.transformer)
    theirs.save_lora_weights(tmp_path, state, transformer_lora_adapter_metadata=config.to_dict())
    theirs.transformer.delete_adapters("default")
    path = tmp_path / "pytorch_lora_weights.safetensors"
    lora = open_lora(path)
    assert {adapter.scale for adapter in lora.layers.values()} == {1.5}
    blocks = {"self_attn.q", "cross_attn.q", "cross_attn.k_img", "ffn.down"}
    assert set(lora.layers) == blocks | {"image_embed.down"}  # also a "net.2"
    expected = theirs_with(theirs, path, said)
    assert relative_error(ours_with(ours, path), expected) <= 1e-5


@pytest.mark.parametrize("alpha", [None, lambda n: np.float32(1 + n % 3)])
@pytest.mark.parametrize("layers", [tuple(LAYERS), ("self_attn.q", "ffn.0")])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_said_of_diffusers_is_what_it_does(both, family, layers, alpha, said, tmp_path):
    """It takes a file where the output is the same and the log has no line."""
    theirs, ours = both
    pairs = random_pairs(config_of(ours), layers=layers)
    tensors = in_family(family, pairs, alpha)
    path = save(tmp_path / "a.safetensors", tensors)
    try:
        expected = theirs_with(theirs, path, said)
        takes = relative_error(ours_with(ours, path), expected) <= 1e-5
    except (AssertionError, KeyError, ValueError, IndexError):
        takes = False
    assert takes == (not takers(list(tensors))["diffusers"])


def test_a_text_to_video_adapter_acts_in_an_image_model_as_in_diffusers(both, said, tmp_path):
    theirs, ours = both
    layers = [f"{a}.{x}" for a in ("self_attn", "cross_attn") for x in "qkvo"]
    pairs = random_pairs(config_of(ours), layers=layers)
    path = save(tmp_path / "a.safetensors", in_family("comfyui", pairs))
    expected = theirs_with(theirs, path, said)
    assert relative_error(ours_with(ours, path), expected) <= 1e-5


def test_what_diffusers_has_no_place_for_is_refused_when_it_is_written(tmp_path):
    tensors = {"diffusion_model.blocks.0.norm3.diff": np.ones(60, np.float32)}
    save(tmp_path / "a.safetensors", tensors)
    for format in ("diffusers", "kohya"):
        with pytest.raises(UserError, match=r"norm_cross\.scale; use --format comfyui"):
            convert_lora(tmp_path / "a.safetensors", tmp_path / "o.safetensors", format)
    assert not (tmp_path / "o.safetensors").exists()
