"""The DiT against diffusers' WanTransformer3DModel, fp32, every parameter randomised."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from convert.dit import rows
from convert.table import expand
from tests.parity.reference import from_torch, load_state, randomise, relative_error
from tests.tables import from_native, to_native
from wanjax.models.dit import Block, DiT, DiTConfig
from wanjax.rope import axis_sizes, rotary_table
from wanjax.weights import random_network

torch = pytest.importorskip("torch", reason="parity tests compare with PyTorch")
from diffusers import WanTransformer3DModel  # noqa: E402

pytestmark = pytest.mark.compiles

SMALL = DiTConfig(
    dim=48, ffn_dim=80, num_layers=3, num_heads=4, text_dim=24, freq_dim=32, image_dim=20
)
CONFIGS = {
    "i2v": SMALL,
    "t2v": DiTConfig(**{**vars(SMALL), "image_dim": None, "in_channels": 16}),
    "flf2v": DiTConfig(**{**vars(SMALL), "image_positions": 514}),
    "head 128": DiTConfig(**{**vars(SMALL), "dim": 256, "num_heads": 2, "num_layers": 4}),
    "head 20": DiTConfig(**{**vars(SMALL), "dim": 60, "num_heads": 3}),
}


def reference_model(c: DiTConfig) -> "WanTransformer3DModel":
    model = WanTransformer3DModel(
        patch_size=c.patch_size,
        num_attention_heads=c.num_heads,
        attention_head_dim=c.head_size,
        in_channels=c.in_channels,
        out_channels=c.out_channels,
        text_dim=c.text_dim,
        freq_dim=c.freq_dim,
        ffn_dim=c.ffn_dim,
        num_layers=c.num_layers,
        eps=c.eps,
        image_dim=c.image_dim,
        added_kv_proj_dim=None if c.image_dim is None else c.dim,
        pos_embed_seq_len=c.image_positions,
    )
    return randomise(model)


def inputs(c: DiTConfig, batch=2, grid=(3, 6, 10), image_tokens=257, seed=1):
    """Latents, timesteps, text, image tokens and condition, as numpy arrays, channels last."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    timestep = np.asarray([937, 12][:batch], np.float32)
    image = None if c.image_dim is None else normal(batch, image_tokens, c.image_dim)
    condition = None if c.in_channels == 16 else normal(batch, *grid, c.in_channels - 16)
    return normal(batch, *grid, 16), timestep, normal(batch, 512, c.text_dim), image, condition


def run_reference(model, latents, timestep, text, image, condition, dtype=None):
    dtype = dtype or torch.float32
    x = latents if condition is None else np.concatenate([latents, condition], -1)
    x = torch.from_numpy(x).movedim(-1, 1).to(dtype)
    if image is not None and model.config.pos_embed_seq_len is not None:
        # diffusers folds the two pictures' tokens out of the batch itself: [2B, 257, C].
        image = image.reshape(-1, image.shape[1] // 2, image.shape[2])
    with torch.no_grad():
        out = model(
            hidden_states=x,
            timestep=torch.from_numpy(timestep),
            encoder_hidden_states=torch.from_numpy(text).to(dtype),
            encoder_hidden_states_image=None
            if image is None
            else torch.from_numpy(image).to(dtype),
            return_dict=False,
        )[0]
    return out.float().movedim(1, -1).numpy()


def ours(c: DiTConfig, reference, dtype=jnp.float32) -> DiT:
    model = nnx.eval_shape(lambda: DiT(c, dtype=dtype, rngs=nnx.Rngs(0)))
    return from_torch(model, rows(c), "diffusers", c.num_layers, reference)


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_diffusers(name):
    c = CONFIGS[name]
    reference = reference_model(c)
    given = inputs(c, image_tokens=514 if name == "flf2v" else 257)
    expected = run_reference(reference, *given)
    got = jax.jit(lambda m, *a: m(*a))(ours(c, reference), *given)
    assert relative_error(got, expected) <= 1e-5


@pytest.mark.parametrize("image_tokens", [1, 5, 130])
def test_other_image_token_counts(image_tokens):
    reference = reference_model(SMALL)
    given = inputs(SMALL, batch=1, grid=(2, 4, 14), image_tokens=image_tokens)
    got = ours(SMALL, reference)(*given)
    assert relative_error(got, run_reference(reference, *given)) <= 1e-5


def test_the_image_branch_matters():
    """The comparison above would notice a wrong image branch: it moves the output by a lot."""
    reference = reference_model(SMALL)
    latents, timestep, text, image, condition = inputs(SMALL)
    a = run_reference(reference, latents, timestep, text, image, condition)
    b = run_reference(reference, latents, timestep, text, image[::-1].copy(), condition)
    assert relative_error(a, b) > 1e-2


def test_one_block_at_full_width():
    """A single block of the 14B, at its real width, heads and feed-forward. More than 20 s, since
    it has 350 million parameters to draw, convert and multiply by."""
    c = DiTConfig(num_layers=1, text_dim=32, image_dim=32)
    from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed, WanTransformerBlock

    block = WanTransformerBlock(
        c.dim, c.ffn_dim, c.num_heads, "rms_norm_across_heads", True, c.eps, c.dim
    )
    randomise(block)
    grid = (2, 3, 5)
    rng = np.random.default_rng(0)
    x, text, image = (
        rng.normal(size=(1, n, c.dim)).astype(np.float32) for n in (int(np.prod(grid)), 512, 257)
    )
    time = rng.normal(size=(1, 6, c.dim)).astype(np.float32)
    rotary = WanRotaryPosEmbed(c.head_size, (1, 1, 1), 1024)(torch.zeros(1, 1, *grid))
    context = torch.from_numpy(np.concatenate([image, text], 1))
    with torch.no_grad():
        expected = block(torch.from_numpy(x), context, torch.from_numpy(time), rotary).numpy()

    prefix = "blocks."
    table = [r for r in rows(c) if r.ours.startswith(prefix)]
    tensors = {f"blocks.0.{k}": v.detach().numpy() for k, v in block.state_dict().items()}
    leaves = to_native(table, "diffusers", 1, tensors, where="the reference block")
    leaves = {k.removeprefix(prefix): v[0] for k, v in leaves.items()}
    del tensors, block
    model = nnx.eval_shape(lambda: Block(c, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    ours = load_state(model, leaves)
    rotary = rotary_table(grid, c.head_size)
    got = ours(x, time, ours.cross_attn.context(text, image), rotary, x.shape[1])
    assert relative_error(got, expected) <= 1e-5


def test_timestep_937_stays_937():
    embed = random_network("dit", SMALL, dtype=jnp.bfloat16).time_embed
    at = lambda t: np.asarray(embed(jnp.asarray([t])))  # noqa: E731
    assert relative_error(at(936.0), at(937.0)) > 1e-3
    waves = np.concatenate(
        [f(937 * 10000.0 ** (-np.arange(16) / 16)) for f in (np.cos, np.sin)]
    ).astype(np.float32)
    expected = embed.down(jax.nn.silu(embed.up(waves[None])))
    assert relative_error(at(937.0), expected) < 1e-5


@pytest.mark.parametrize("layout", ["official", "diffusers"])
@pytest.mark.parametrize("name", CONFIGS)
def test_conversion_back_is_the_identity(name, layout):
    c = CONFIGS[name]
    reference = reference_model(c)
    tensors = {k: v.numpy() for k, v in reference.state_dict().items()}
    leaves = to_native(rows(c), "diffusers", c.num_layers, tensors, where="reference")
    official = from_native(rows(c), "official", c.num_layers, leaves)
    again = to_native(rows(c), "official", c.num_layers, official, where="official")
    exported = from_native(rows(c), "diffusers", c.num_layers, again)
    assert exported.keys() == tensors.keys()
    twin = reference_model(c)
    twin.load_state_dict({k: torch.from_numpy(v.copy()) for k, v in exported.items()}, strict=True)
    for key, value in tensors.items():
        np.testing.assert_array_equal(exported[key], value)


COUNTS = {
    "i2v": (DiTConfig(), 1303, 16_394_878_784),
    "t2v": (DiTConfig(image_dim=None, in_channels=16), 1095, 14_288_491_584),
    "t2v_1_3b": (
        DiTConfig(1536, 8960, 30, 12, image_dim=None, in_channels=16),
        825,
        1_418_996_800,
    ),
    "flf2v": (DiTConfig(image_positions=514), 1304, 16_395_536_704),
}


@pytest.mark.parametrize("name", COUNTS)
def test_full_size_counts_in_official_names(name):
    c, tensors, parameters = COUNTS[name]
    model = nnx.eval_shape(lambda: DiT(c, rngs=nnx.Rngs(0)))
    leaves = {".".join(map(str, p)): v for p, v in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    entries = expand(rows(c), "official", c.num_layers)
    assert leaves.keys() == {e.ours for e in entries}
    assert len({e.theirs for e in entries}) == tensors
    assert sum(int(np.prod(v.shape)) for v in leaves.values()) == parameters


def test_rotary_parts():
    assert axis_sizes(128) == (44, 42, 42)
    assert axis_sizes(20) == (8, 6, 6)
