"""umT5 against transformers' `UMT5EncoderModel`, and its table of names against both layouts."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from convert.table import expand
from convert.umt5 import ALIASES, rows
from tests.parity.reference import leaves_of, load_state, randomise, relative_error, torch
from tests.tables import from_native, to_native
from wanjax.models.umt5 import UMT5, UMT5Config, relative_buckets

pytestmark = pytest.mark.compiles

transformers = pytest.importorskip("transformers")

WIDE = UMT5Config(99, dim=40, attention_dim=72, num_heads=6, ffn_dim=56, num_layers=3)
LONG = UMT5Config(50, dim=48, attention_dim=48, num_heads=3, ffn_dim=80, num_layers=4)
ODD = UMT5Config(
    31, dim=16, attention_dim=32, num_heads=2, ffn_dim=24, num_layers=3, num_buckets=20,
    max_distance=50, eps=1e-3,
)  # fmt: skip


def reference_config(config: UMT5Config):
    return transformers.UMT5Config(
        vocab_size=config.vocab_size,
        d_model=config.dim,
        d_kv=config.attention_dim // config.num_heads,
        num_heads=config.num_heads,
        d_ff=config.ffn_dim,
        num_layers=config.num_layers,
        relative_attention_num_buckets=config.num_buckets,
        relative_attention_max_distance=config.max_distance,
        layer_norm_epsilon=config.eps,
    )


def named(tensors) -> dict[str, np.ndarray]:
    """A reference's state with the embedding under one name."""
    return {ALIASES.get(name, name): x.detach().numpy() for name, x in tensors.items()}


def random_reference(config: UMT5Config):
    return randomise(transformers.UMT5EncoderModel(reference_config(config)))


def twin(config: UMT5Config, reference, dtype=jnp.float32) -> UMT5:
    """Ours with the reference's weights."""
    model = nnx.eval_shape(lambda: UMT5(config, dtype=dtype, rngs=nnx.Rngs(0)))
    tensors = named(reference.state_dict())
    return load_state(model, to_native(rows(config), "diffusers", config.num_layers, tensors, ""))


def prompts(config: UMT5Config, length: int, lengths: list[int]):
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (len(lengths), length))
    mask = (np.arange(length) < np.array(lengths)[:, None]).astype(np.int32)
    return tokens.astype(np.int32), mask


def ours(model, tokens, mask) -> np.ndarray:
    return np.asarray(jax.jit(lambda m, *x: m(*x))(model, tokens, mask), np.float32)


@torch.no_grad()
def theirs(reference, tokens, mask) -> np.ndarray:
    out = reference(torch.from_numpy(tokens).long(), torch.from_numpy(mask).long())
    return out.last_hidden_state.float().numpy()


@pytest.mark.parametrize(
    "config, length, lengths",
    [(WIDE, 37, [37, 20, 1]), (LONG, 512, [512, 77]), (ODD, 130, [129])],
    ids=["wide", "long", "odd"],
)
def test_equals_the_reference_and_goes_back(config, length, lengths):
    reference = random_reference(config)
    model = twin(config, reference)
    tokens, mask = prompts(config, length, lengths)
    expected = theirs(reference, tokens, mask)
    error = relative_error(ours(model, tokens, mask), expected)
    print(f"umT5 relative error {error:.1e}")
    assert error <= 1e-5

    state = from_native(rows(config), "diffusers", config.num_layers, leaves_of(model))
    state = {name: torch.tensor(x) for name, x in state.items()}
    again, info = transformers.UMT5EncoderModel.from_pretrained(
        None, config=reference_config(config), state_dict=state, output_loading_info=True
    )
    assert not any(info.values()), info
    assert np.array_equal(theirs(again.eval(), tokens, mask), expected)


def test_padding_changes_nothing_before_it():
    model = twin(WIDE, random_reference(WIDE))
    tokens, mask = prompts(WIDE, 37, [20])
    alone = ours(model, tokens[:, :20], mask[:, :20])
    assert relative_error(ours(model, tokens, mask)[:, :20], alone) <= 1e-5


def test_bf16_is_as_close_as_the_reference_in_bf16():
    reference = random_reference(LONG)
    with torch.no_grad():  # the same bf16 weights in all, so that only the arithmetic differs
        for p in reference.parameters():
            p.copy_(p.bfloat16().float())
    exact, model = twin(LONG, reference), twin(LONG, reference, jnp.bfloat16)
    tokens, mask = prompts(LONG, 64, [64, 50, 9])
    truth = ours(exact, tokens, mask)
    assert relative_error(truth, theirs(reference, tokens, mask)) <= 1e-5
    error = relative_error(ours(model, tokens, mask), truth)
    bound = relative_error(theirs(reference.bfloat16(), tokens, mask), truth)
    print(f"umT5 bf16 error {error:.2e}, the reference's {bound:.2e}")
    assert 0 < error <= 1.2 * bound


@pytest.mark.parametrize("buckets, distance", [(32, 128), (20, 50), (16, 40), (64, 1000)])
def test_buckets(buckets, distance):
    config = replace(WIDE, num_buckets=buckets, max_distance=distance)
    attention = transformers.models.umt5.modeling_umt5.UMT5Attention(reference_config(config))
    position = torch.arange(700)
    expected = attention._relative_position_bucket(position[None, :] - position[:, None])
    assert np.array_equal(relative_buckets(config, 700), expected.numpy())


def test_official_names():
    d, a, k, f = WIDE.dim, WIDE.attention_dim, WIDE.num_heads, WIDE.ffn_dim
    shapes = {"token_embedding.weight": (99, d), "norm.weight": (d,)}
    for i in range(3):
        shapes |= {f"blocks.{i}.attn.{x}.weight": (a, d) for x in "qkv"}
        shapes |= {f"blocks.{i}.norm{x}.weight": (d,) for x in (1, 2)}
        shapes |= {f"blocks.{i}.ffn.{x}.weight": (f, d) for x in ("gate.0", "fc1")}
        shapes |= {
            f"blocks.{i}.attn.o.weight": (d, a),
            f"blocks.{i}.ffn.fc2.weight": (d, f),
            f"blocks.{i}.pos_embedding.embedding.weight": (32, k),
        }
    generator = np.random.default_rng(0)
    official = {n: generator.standard_normal(s, np.float32) for n, s in shapes.items()}
    leaves = to_native(rows(WIDE), "official", 3, official, "")  # refuses missing and stray names
    model = nnx.eval_shape(lambda: UMT5(WIDE, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    load_state(model, leaves)  # refuses missing leaves and other shapes

    # By hand, from the official names to the reference's: the table must agree with this.
    renamed = {"shared.weight": official["token_embedding.weight"]}
    renamed["encoder.final_layer_norm.weight"] = official["norm.weight"]
    for i in range(3):
        src, dst = f"blocks.{i}", f"encoder.block.{i}.layer"
        for x in "qkvo":
            renamed[f"{dst}.0.SelfAttention.{x}.weight"] = official[f"{src}.attn.{x}.weight"]
        for new, old in {
            "0.layer_norm": "norm1",
            "0.SelfAttention.relative_attention_bias": "pos_embedding.embedding",
            "1.layer_norm": "norm2",
            "1.DenseReluDense.wi_0": "ffn.gate.0",
            "1.DenseReluDense.wi_1": "ffn.fc1",
            "1.DenseReluDense.wo": "ffn.fc2",
        }.items():
            renamed[f"{dst}.{new}.weight"] = official[f"{src}.{old}.weight"]
    other = to_native(rows(WIDE), "diffusers", 3, renamed, "")
    assert other.keys() == leaves.keys()
    assert all(np.array_equal(other[name], leaves[name]) for name in leaves)
    back = from_native(rows(WIDE), "official", 3, leaves)
    assert back.keys() == official.keys()
    assert all(np.array_equal(back[name], official[name]) for name in official)


def test_full_size():
    config = UMT5Config()
    model = nnx.eval_shape(lambda: UMT5(config, rngs=nnx.Rngs(0)))
    leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
    assert sum(int(np.prod(x.shape)) for x in leaves) == 5_680_910_336
    with torch.device("meta"):
        reference = transformers.UMT5EncoderModel(reference_config(config))
    names = {ALIASES.get(name, name) for name in reference.state_dict()}
    assert {e.theirs for e in expand(rows(config), "diffusers", 24)} == names
    assert len(expand(rows(config), "official", 24)) == 242
