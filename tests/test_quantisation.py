"""A base in 8 or 4 bits: its codes, loading, and what may not be done with it."""

from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
from flax import nnx

from benchmarks import bases
from tests.real_size import equations
from tests.toy import SMALL, dit_inputs, randomised_adapters, toy_batch, toy_dit
from wanjax import lora
from wanjax.errors import UserError
from wanjax.flow import losses_at
from wanjax.nn import linears
from wanjax.quantisation import (
    CODES,
    RULES,
    UNQUANTISED,
    QuantisedKernel,
    block_size,
    decode,
    draw,
    encode,
    nf4_values,
    quantise,
)
from wanjax.remat import Remat
from wanjax.training import TrainConfig, Trainer, prepare_model
from wanjax.weights import (
    abstract_network,
    load_network,
    parameters,
    random_network,
    save_native,
)

pytestmark = [pytest.mark.compiles, pytest.mark.usefixtures("quickly")]

BASES = list(CODES)
# The largest error of one number, as a share of its block's largest: half of the widest step.
STEP = {"int8": 0.5 / 127, "fp8": 16 / 448, "nf4": 0.5 * 0.31}
SIZES = {"dim": 96, "ffn_dim": 160}


def blocks(seed: int = 0, shape=(3, 5, 64, 24)) -> np.ndarray:
    rng = np.random.default_rng(seed)
    sizes = np.exp2(rng.integers(-20, 20, (*shape[:2], 1, 1)))
    return rng.standard_normal(shape, np.float32) * sizes.astype(np.float32)


def kernel_of(values: np.ndarray) -> np.ndarray:
    """Blocks as the kernel that they are of."""
    return values.reshape(values.shape[0], -1, values.shape[-1])


@pytest.mark.parametrize("base", BASES)
def test_no_number_is_off_by_more_than_half_a_step(base):
    values = blocks()
    found = decode(*encode(values, CODES[base].dtype))
    largest = np.abs(values).max(-2, keepdims=True)
    # A scale is rounded to bf16, by 2^-9 at most.
    error = np.abs(found.reshape(values.shape) - values) / largest
    assert error.max() <= STEP[base] + 2**-8
    assert error.max() > 0.5 * STEP[base]


@pytest.mark.parametrize("base", BASES)
def test_what_was_decoded_has_the_same_codes_again(base):
    codes, scales = encode(blocks(), CODES[base].dtype)
    again = decode(codes, scales).reshape(blocks().shape)
    np.testing.assert_array_equal(decode(*encode(again, CODES[base].dtype)), kernel_of(again))


@pytest.mark.parametrize("base", BASES)
def test_zeros_stay_and_what_is_no_number_shows(base):
    values = blocks()
    values[0, 0], values[1, 2, 3, 4], values[2, 1, 5, 6] = 0, np.nan, np.inf
    found = np.asarray(decode(*encode(values, CODES[base].dtype))).reshape(values.shape)
    assert (found[0, 0] == 0).all()
    lost = ~np.isfinite(found)
    assert lost[1, 2, :, 4].all() and lost[2, 1, :, 6].all()
    assert lost.sum() == 2 * 64  # and no other block


@pytest.mark.parametrize("base", BASES)
def test_the_error_is_that_of_qwix(base):
    kernel = kernel_of(blocks())[0]
    kind = "nf4" if base == "nf4" else CODES[base].dtype
    theirs = qwix.quantize(jnp.asarray(kernel), kind, channelwise_axes=[1], tiled_axes={0: 64})
    ours = decode(*encode(kernel.reshape(5, 64, 24), CODES[base].dtype))
    errors = [np.linalg.norm(x - kernel) for x in (ours, qwix.dequantize(theirs))]
    assert errors[0] == pytest.approx(errors[1], rel=0.01)


def test_the_values_of_nf4_are_the_published():
    published = [-1.0, -0.69619280, -0.52507305, -0.39491749, -0.28444138, -0.18477343]
    published += [-0.09105004, 0.0, 0.07958030, 0.16093020, 0.24611230, 0.33791524]
    published += [0.44070983, 0.56261700, 0.72295684, 1.0]
    np.testing.assert_allclose(nf4_values(), published, atol=2e-7)


def test_blocks_divide_the_fan_in():
    assert [block_size(n, "x") for n in (5120, 13824, 192, 96, 80, 34)] == [64, 64, 64, 48, 40, 34]
    with pytest.raises(UserError, match="'ffn.down' has a fan-in of 63, which is odd"):
        block_size(63, "ffn.down")


@pytest.mark.parametrize("base", BASES)
def test_kernels_of_the_blocks_and_nothing_else(base):
    model, whole = toy_dit(**SIZES), parameters(toy_dit(**SIZES))
    shapes = {role: layer.kernel.shape for role, layer in linears(model)}
    quantise(model, base)
    assert all(isinstance(layer.kernel, QuantisedKernel) for _, layer in linears(model))
    assert {role: layer.kernel.shape for role, layer in linears(model)} == shapes
    same = {name for name, v in parameters(model).items() if name in whole}
    assert whole.keys() - same == {f"blocks.{role}.kernel" for role in shapes}
    for name in same:
        np.testing.assert_array_equal(parameters(model)[name][...], whole[name][...])


def test_what_is_quantised_twice_or_matches_nothing_is_refused():
    with pytest.raises(UserError, match="no base 'int4'; did you mean 'int8'"):
        quantise(toy_dit(), "int4")
    with pytest.raises(UserError, match=r"'ff.\*' of what is quantised matches no layer"):
        quantise(toy_dit(), "int8", rules=[*RULES, "ff.*"])
    from wanjax.models.vae import VAEConfig

    with pytest.raises(UserError, match=r"'self_attn.\*' .* matches no layer"):
        abstract_network("vae", VAEConfig(base_dim=8), "bfloat16", base="int8")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("base", BASES)
def test_loading_quantises_as_in_memory(base, dtype, tmp_path):
    model = toy_dit(**SIZES)
    save_native(tmp_path / "ck", {"dit": model})
    loaded = load_network(tmp_path / "ck", "dit", dtype=dtype, base=base)
    quantise(model, base)
    expected, found = parameters(model), parameters(loaded)
    abstract = parameters(abstract_network("dit", model.config, dtype, base=base))
    assert expected.keys() == found.keys() == abstract.keys()
    for name, variable in found.items():
        assert (variable.shape, variable.dtype) == (abstract[name].shape, abstract[name].dtype)
        if "kernel." in name:
            np.testing.assert_array_equal(variable[...], expected[name][...], err_msg=name)


def test_codes_are_no_checkpoint(tmp_path):
    model = toy_dit()
    quantise(model, "int8")
    with pytest.raises(UserError, match="quantised"):
        save_native(tmp_path / "ck", {"dit": model})
    assert list(tmp_path.iterdir()) == []


def test_adapters_are_beside_codes_and_never_added_to_them():
    model = toy_dit()
    quantise(model, "int8")
    lora.attach(model, rank=2, alpha=2, targets="all", rngs=nnx.Rngs(0))
    with pytest.raises(UserError, match="cannot be added to '.*', whose base is quantised"):
        lora.merge(model)
    assert all(layer.lora is not None for _, layer in linears(model))


@pytest.mark.parametrize("base", BASES)
def test_drawn_kernels_have_the_variance_of_random_ones(base):
    leaves = parameters(abstract_network("dit", toy_dit().config, "bfloat16", base=base))
    name = "blocks.ffn.down.kernel"
    codes, scales = draw(leaves[f"{name}.codes"], jax.random.key(0))
    for part, value in (("codes", codes), ("scales", scales)):
        like = leaves[f"{name}.{part}"]
        assert (value.shape, value.dtype) == (like.shape, like.dtype)
    kernel = np.asarray(decode(codes, scales))
    assert np.isfinite(kernel).all()
    assert kernel.var() * kernel.shape[-2] == pytest.approx(1, rel=0.05)
    assert not np.array_equal(codes[0], codes[1])


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("remat", ["full", "none"])
def test_a_base_trains_as_the_numbers_that_its_codes_stand_for(base, remat):
    """Loss and gradients of adapters beside codes, and beside what they decode to."""
    coded, whole = toy_dit(), toy_dit()
    quantise(coded, base)
    for (_, layer), (_, other) in zip(linears(coded), linears(whole)):
        other.kernel[...] = layer.kernel[...]
    settings = TrainConfig(rank=2, targets="all", dtype="float32", remat=remat, warmup=0)
    results = []
    for model in (coded, whole):
        trainer = Trainer(model, settings)
        randomised_adapters(adapted := trainer.model())
        trainer.state = trainer.state._replace(params=nnx.state(adapted, lora.LoRAParam))
        results.append(trainer.train(toy_batch()))
    for name in ("loss", "gradient_norm"):
        np.testing.assert_allclose(*(float(r[name]) for r in results), rtol=1e-5)


@pytest.mark.parametrize("remat", get_args(Remat))
def test_no_decoded_kernel_is_kept_for_the_gradient(remat):
    """Nothing of all layers in floating point has the size of a stacked kernel."""
    settings = TrainConfig(base="int8", targets="all", remat=remat)
    build = lambda: abstract_network("dit", SMALL, "bfloat16", base="int8")  # noqa: E731
    graph, adapters, frozen = nnx.eval_shape(lambda: prepare_model(build(), settings))
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), toy_batch())

    def loss(adapters, frozen, batch):
        dit = nnx.merge(graph, adapters, frozen)
        return losses_at(dit, batch, jnp.ones(2), batch.latents).sum()

    jaxpr = jax.make_jaxpr(jax.grad(loss))(adapters, frozen, batch).jaxpr
    count, dim, ffn = SMALL.num_layers, SMALL.dim, SMALL.ffn_dim
    kernels = {(count, dim, dim), (count, dim, ffn), (count, ffn, dim)}
    made = [v.aval for equation in equations(jaxpr) for v in equation.outvars]
    assert [a for a in made if a.shape in kernels and jnp.issubdtype(a.dtype, jnp.floating)] == []
    assert any(a.shape == (dim, ffn) and a.dtype == jnp.float32 for a in made)  # one layer's is


@pytest.mark.parametrize("name, most", [("normal weights", 0.007), ("outlying inputs", 0.012)])
def test_what_a_velocity_loses_on_an_int8_base(name, most):
    """Four layers of width 1,024; a thousand times larger rows are 0.1 % of each kernel's. With one
    scale for each output it would lose more; the other types' errors are in docs/precision.md."""
    model = bases.WIDE_MODELS[name](), bases.random_inputs(1)
    found = bases.error("int8", model)
    assert found <= most <= 0.015
    assert bases.error(bases.CHANNEL, model) > 1.2 * found


@pytest.mark.parametrize("base", BASES)
def test_a_base_beside_outlying_activations_in_bf16(base):
    """Text features a thousand times too large; all is finite, and as near as in fp32."""
    latents, time, text, image, condition = dit_inputs()
    text[:, ::7] *= 1000
    found = []
    for dtype, kind in (("float32", UNQUANTISED), ("float32", base), ("bfloat16", base)):
        model = random_network("dit", SMALL, dtype=dtype)
        quantise(model, kind)
        found.append(np.asarray(model(latents, time, text, image, condition)))
    assert np.isfinite(found).all()
    distance = lambda x: np.linalg.norm(x - found[0]) / np.linalg.norm(found[0])  # noqa: E731
    assert distance(found[2]) <= distance(found[1]) + 0.02
