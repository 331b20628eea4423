"""The precision table: the networks are built and compute by it, and it decides what is cast."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.programs import products
from tests.scripts import write_checkpoint
from tests.toy import SMALL, dit_inputs, toy_dit
from wanjax import Pipeline
from wanjax.errors import UserError
from wanjax.models.clip import CLIPVisionConfig
from wanjax.models.umt5 import UMT5Config
from wanjax.models.vae import VAEConfig
from wanjax.nn import Linear
from wanjax.precision import BF16, F16, F32, TABLE, WHOLE, parse_dtype, precision_of
from wanjax.training import TrainConfig, Trainer
from wanjax.weights import abstract_network, lost, parameters

CONFIGS = {
    "dit": SMALL,
    "vae": VAEConfig(base_dim=4, num_res_blocks=1),
    "text_encoder": UMT5Config(
        vocab_size=32, dim=24, attention_dim=24, num_heads=2, ffn_dim=32, num_layers=2
    ),
    "image_encoder": CLIPVisionConfig(
        image_size=28, patch_size=14, dim=32, num_heads=2, num_layers=2, ffn_dim=32
    ),
}
# What else than the matrices of blocks and embeddings is fp32, of a network in bfloat16.
IN_FP32 = {
    "dit": ("bias", "scale", "modulation", "time_", "head."),
    "vae": ("",),
    "text_encoder": ("scale",),
    "image_encoder": ("bias", "scale"),
}


@pytest.mark.parametrize("network", CONFIGS)
def test_what_is_stored_in_which_type(network):
    for asked in ("float32", "bfloat16"):
        for name, leaf in parameters(abstract_network(network, CONFIGS[network], asked)).items():
            half = F16 if network == "image_encoder" else BF16
            kept = any(part in name for part in IN_FP32[network])
            assert leaf.dtype == (F32 if asked == "float32" or kept else half), name


def test_fp32_is_fp32_throughout():
    assert all(precision_of(kind, "float32") == WHOLE for kind in TABLE)
    assert {row.accumulate for row in TABLE.values()} == {F32}
    with pytest.raises(UserError, match="no precision 'bfloat'; did you mean 'bfloat16'"):
        parse_dtype("bfloat")


def widths(found: list, dtype: np.dtype) -> list[int]:
    """The last axes of the products whose operands are of a type."""
    types = [{v.aval.dtype for v in e.invars} for e in found]
    assert all(len(kinds) == 1 for kinds in types), "a product of two types"
    return [e.outvars[0].aval.shape[-1] for e, kinds in zip(found, types) if kinds == {dtype}]


@pytest.mark.parametrize("residual", ["float32", "bfloat16"])
@pytest.mark.parametrize("given", [jnp.float32, jnp.bfloat16])
def test_the_denoiser_computes_by_the_table(residual, given):
    """Its fp32 products are the timestep's three, the patches and the head, whatever the input's
    type; the stream between the blocks is of the type that was chosen."""
    model = abstract_network("dit", SMALL, "bfloat16")
    model.residual = residual
    x = [jax.ShapeDtypeStruct(a.shape, given) for a in dit_inputs()]
    program = jax.make_jaxpr(lambda m, *x: m(*x))(model, *x)
    assert [v.aval.dtype for v in program.jaxpr.outvars] == [F32]
    found = products(program.jaxpr)
    d = SMALL.dim
    assert sorted(widths(found, F32)) == sorted([d, d, d, 6 * d, 4 * SMALL.out_channels])
    assert len(widths(found, BF16)) > 15
    exact = {e.params["precision"][0] for e in found if e.invars[0].aval.dtype == F32}
    assert exact == {jax.lax.Precision.HIGHEST}
    scans = [e for e in program.jaxpr.eqns if e.primitive.name == "scan"]
    carried = [v.aval for e in scans for v in e.outvars if v.aval.shape == (2, 18, d)]
    assert [v.dtype for v in carried] == [residual]


def test_the_stream_is_never_coarser_than_what_is_added_to_it():
    model = abstract_network("dit", SMALL, "float32")
    model.residual = "bfloat16"
    program = jax.make_jaxpr(lambda m, *x: m(*x))(model, *dit_inputs())
    assert {v.aval.dtype for e in products(program.jaxpr) for v in e.invars} == {np.dtype(F32)}


def test_the_stream_is_a_setting_of_sampling_and_of_training(tmp_path):
    """fp32 by default where videos are made, bf16 where every block's input is kept."""
    write_checkpoint(tmp_path / "ck", only=("dit",))
    assert Pipeline.load(tmp_path / "ck").dit.residual == "float32"
    assert Pipeline.load(tmp_path / "ck", residual="bfloat16").dit.residual == "bfloat16"
    with pytest.raises(UserError, match="no precision 'float16'"):
        Pipeline.load(tmp_path / "ck", residual="float16")
    for settings in (TrainConfig(), TrainConfig(residual="float32")):
        model = Trainer(toy_dit(dtype=jnp.bfloat16), settings).model()
        assert model.residual == settings.residual
    assert TrainConfig().residual == "bfloat16"


@pytest.mark.parametrize("network", ["vae", "image_encoder"])
def test_the_vae_and_clip_compute_in_fp32(network):
    model = abstract_network(network, CONFIGS[network], "bfloat16")
    x = jax.ShapeDtypeStruct((1, 28, 28, 3), jnp.bfloat16)
    run = lambda m, x: m(x)  # noqa: E731
    if network == "vae":
        x = jax.ShapeDtypeStruct((1, 5, 16, 16, 3), jnp.bfloat16)
        run = lambda m, x: m.decode(m.encode(x))  # noqa: E731
    found = products(jax.make_jaxpr(run)(model, x).jaxpr)
    assert len(found) > 8 and len(widths(found, F32)) == len(found)
    assert {e.params["precision"][0] for e in found} == {jax.lax.Precision.HIGHEST}


@pytest.mark.parametrize("storage", ["int8", "float8_e4m3fn", "float32"])
def test_a_kernels_type_decides_nothing(storage):
    """A kernel that is stored in less leaves the input in the compute type."""
    layer = Linear(8, 12, dtype="bfloat16", rngs=nnx.Rngs(0))
    whole = jnp.round(3 * layer.kernel[...].astype(jnp.float32))
    layer.kernel = nnx.Param(whole.astype(storage))
    x = jnp.linspace(-1, 1, 16).reshape(2, 8)
    (equation,) = products(jax.make_jaxpr(lambda m, x: m(x))(layer, x).jaxpr)
    assert {v.aval.dtype for v in equation.invars} == {BF16}
    expected = (x.astype(jnp.bfloat16) @ whole.astype(jnp.bfloat16)).astype(np.float32)
    np.testing.assert_array_equal(np.asarray(layer(x), np.float32), expected)


def test_what_a_file_in_bf16_has_lost():
    for network, config in CONFIGS.items():
        leaves = parameters(abstract_network(network, config, "bfloat16"))
        assert lost(network, config, {k: v.dtype for k, v in leaves.items()}) == []
        names = lost(network, config, dict.fromkeys(leaves, BF16))
        # umT5 was published so, and fp16 is CLIP's own.
        assert bool(names) == (network in ("dit", "vae"))
        if network == "vae":
            assert names == list(leaves)
        if network == "dit":
            assert "head.proj.kernel" in names and "blocks.ffn.up.kernel" not in names
