"""CLIP's vision tower against transformers' `CLIPVisionModel`, and its table of names."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from convert.clip import PREFIX, rows
from convert.table import expand
from tests.parity.reference import leaves_of, load_state, randomise, relative_error, torch
from tests.tables import from_native, to_native
from wanjax.errors import UserError
from wanjax.models.clip import CLIPVision, CLIPVisionConfig

pytestmark = pytest.mark.compiles

transformers = pytest.importorskip("transformers")

TOKENS_257 = CLIPVisionConfig(dim=48, num_heads=4, num_layers=3, ffn_dim=80)
TOKENS_50 = CLIPVisionConfig(56, 8, dim=60, num_heads=5, num_layers=4, ffn_dim=36, eps=1e-3)


def reference_config(config: CLIPVisionConfig):
    return transformers.CLIPVisionConfig(
        image_size=config.image_size,
        patch_size=config.patch_size,
        hidden_size=config.dim,
        intermediate_size=config.ffn_dim,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        layer_norm_eps=config.eps,
        hidden_act="gelu",
    )


def random_reference(config: CLIPVisionConfig):
    return randomise(transformers.CLIPVisionModel(reference_config(config)))


def prefixed(name: str) -> str:
    return name if name.startswith(PREFIX) else PREFIX + name


def twin(config: CLIPVisionConfig, reference, dtype=jnp.float32) -> CLIPVision:
    """Ours with the reference's weights."""
    tensors = {prefixed(n): x.detach().numpy() for n, x in reference.state_dict().items()}
    leaves = to_native(rows(config), "diffusers", config.num_layers, tensors, "")
    return load_state(abstract(config, dtype), leaves)


def abstract(config: CLIPVisionConfig, dtype=jnp.float32) -> CLIPVision:
    return nnx.eval_shape(lambda: CLIPVision(config, dtype=dtype, rngs=nnx.Rngs(0)))


def pictures(config: CLIPVisionConfig, count: int = 2) -> np.ndarray:
    shape = (count, config.image_size, config.image_size, 3)
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def ours(model, pixels) -> np.ndarray:
    return np.asarray(jax.jit(lambda m, x: m(x))(model, pixels), np.float32)


@torch.no_grad()
def theirs(reference, pixels) -> np.ndarray:
    pixels = torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()).to(reference.dtype)
    return reference(pixels, output_hidden_states=True).hidden_states[-2].float().numpy()


@pytest.mark.parametrize("config", [TOKENS_257, TOKENS_50], ids=["257", "50"])
def test_equals_the_reference_and_goes_back(config):
    reference = random_reference(config)
    model, pixels = twin(config, reference), pictures(config)
    expected = theirs(reference, pixels)
    out = ours(model, pixels)
    assert out.shape == expected.shape == (2, config.num_tokens, config.dim)
    error = relative_error(out, expected)
    print(f"CLIP relative error {error:.1e}")
    assert error <= 5e-6

    state = from_native(rows(config), "diffusers", config.num_layers, leaves_of(model))
    state = {name: torch.tensor(x) for name, x in state.items()}
    again, info = transformers.CLIPVisionModel.from_pretrained(
        None, config=reference_config(config), state_dict=state, output_loading_info=True
    )
    assert not any(info.values()), info
    # The unused last block and final norm came back too: the pooled output depends on both.
    images = torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        pooled = [m.eval()(images).pooler_output for m in (reference, again)]
    assert torch.equal(*pooled)
    assert np.array_equal(theirs(again, pixels), expected)


def test_in_bf16_it_is_closer_than_the_reference_in_fp16():
    """Where bf16 is asked for, its kernels are fp16, as officially, and its products fp32."""
    reference = random_reference(TOKENS_257)
    exact, model = twin(TOKENS_257, reference), twin(TOKENS_257, reference, jnp.bfloat16)
    pixels = pictures(TOKENS_257)
    truth = ours(exact, pixels)
    error = relative_error(ours(model, pixels), truth)
    half = relative_error(theirs(reference.half(), pixels), truth)
    coarse = relative_error(theirs(reference.float().bfloat16(), pixels), truth)
    print(f"CLIP's error {error:.2e}; the reference's in fp16 {half:.2e}, in bf16 {coarse:.2e}")
    assert 0 < error <= half < coarse


def test_official_names():
    c = CLIPVisionConfig(28, 14, dim=20, num_heads=2, num_layers=3, ffn_dim=24, projection_dim=7)
    shapes = {
        "visual.cls_embedding": (1, 1, 20),
        "visual.pos_embedding": (1, 5, 20),
        "visual.patch_embedding.weight": (20, 3, 14, 14),
        "visual.head": (20, 7),
    }
    norms, linears = ["visual.pre_norm", "visual.post_norm"], {}
    for i in range(3):
        block = f"visual.transformer.{i}"
        norms += [f"{block}.norm1", f"{block}.norm2"]
        linears |= {f"{block}.attn.to_qkv": (60, 20), f"{block}.attn.proj": (20, 20)}
        linears |= {f"{block}.mlp.0": (24, 20), f"{block}.mlp.2": (20, 24)}
    shapes |= {f"{n}.{x}": (20,) for n in norms for x in ("weight", "bias")}
    shapes |= {f"{n}.weight": s for n, s in linears.items()}
    shapes |= {f"{n}.bias": s[:1] for n, s in linears.items()}
    generator = np.random.default_rng(0)
    official = {n: generator.standard_normal(s, np.float32) for n, s in shapes.items()}
    leaves = to_native(rows(c), "official", 3, official, "")  # refuses missing and stray names
    load_state(abstract(c), leaves)  # refuses missing leaves and other shapes

    # By hand, from the official names to the reference's: the table must agree with this.
    split = {
        "embeddings.class_embedding": official["visual.cls_embedding"][0, 0],
        "embeddings.position_embedding.weight": official["visual.pos_embedding"][0],
        "embeddings.patch_embedding.weight": official["visual.patch_embedding.weight"],
    }
    for kind in ("weight", "bias"):
        split[f"pre_layrnorm.{kind}"] = official[f"visual.pre_norm.{kind}"]
        split[f"post_layernorm.{kind}"] = official[f"visual.post_norm.{kind}"]
        for i in range(3):
            src, dst = f"visual.transformer.{i}", f"encoder.layers.{i}"
            fused = official[f"{src}.attn.to_qkv.{kind}"]
            for part, x in enumerate("qkv"):
                split[f"{dst}.self_attn.{x}_proj.{kind}"] = fused[20 * part : 20 * (part + 1)]
            for new, old in {
                "self_attn.out_proj": "attn.proj",
                "layer_norm1": "norm1",
                "layer_norm2": "norm2",
                "mlp.fc1": "mlp.0",
                "mlp.fc2": "mlp.2",
            }.items():
                split[f"{dst}.{new}.{kind}"] = official[f"{src}.{old}.{kind}"]
    split = {prefixed(n): x for n, x in split.items()}
    other = to_native(rows(c), "diffusers", 3, split, "")
    assert other.keys() == leaves.keys() - {"head"}
    assert all(np.array_equal(other[name], leaves[name]) for name in other)
    back = from_native(rows(c), "official", 3, leaves)
    assert back.keys() == official.keys()
    assert all(np.array_equal(back[name], official[name]) for name in official)


def test_full_size():
    config = CLIPVisionConfig(projection_dim=1024)
    leaves = jax.tree.leaves(nnx.state(abstract(config, jnp.bfloat16), nnx.Param))
    count = sum(int(np.prod(x.shape)) for x in leaves)
    with torch.device("meta"):
        reference = transformers.CLIPVisionModel(reference_config(config))
    assert count == reference.num_parameters() + 1280 * 1024 == 632_076_800
    names = {prefixed(name) for name in reference.state_dict()}
    assert {e.theirs for e in expand(rows(config), "diffusers", 32)} == names
    assert len({e.theirs for e in expand(rows(config), "official", 32)}) == 8 + 32 * 12


def test_refuses_pictures_of_another_size():
    model = twin(TOKENS_50, random_reference(TOKENS_50))
    with pytest.raises(UserError, match=r"56x56 pixels and got 28x112"):
        model(jnp.zeros((1, 112, 28, 3)))  # as many patches, but not a square
