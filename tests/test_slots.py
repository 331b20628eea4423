"""Adapters put into a model and taken out: what they add, what compiles, and the base's bits."""

from dataclasses import replace
from functools import reduce

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from convert.dit import rows
from convert.lora import convert_lora, open_lora
from tests.adapters import in_family, random_pairs, save
from tests.processes import on_eight_devices
from tests.tables import from_native, to_native
from tests.test_lora_families import assert_comfyui_takes
from tests.toy import SMALL, dit_inputs, toy_dit
from wanjax.errors import UserError
from wanjax.lora import Change, LoRA, adaptable
from wanjax.pipeline import Pipeline
from wanjax.quantisation import quantise
from wanjax.slots import Slots, apply
from wanjax.weights import parameters, save_native

pytestmark = [pytest.mark.compiles, pytest.mark.usefixtures("quickly")]


def official(model) -> dict[str, np.ndarray]:
    leaves = {name: np.asarray(v[...]) for name, v in parameters(model).items()}
    return from_native(rows(model.config), "official", model.config.num_layers, leaves)


def with_tensors(model, tensors):
    """The model with these tensors, by official names, in the place of its own."""
    config = model.config
    leaves = to_native(rows(config), "official", config.num_layers, tensors, "the test")
    for name, leaf in leaves.items():
        variable = reduce(getattr, name.split("."), model)
        variable[...] = jnp.asarray(leaf, variable.dtype)
    return model


def four_step_file(tensors: dict[str, np.ndarray]) -> tuple[dict, dict]:
    """The keys of the four-step adapter of the 14B, and the change of every tensor: what has a
    million numbers there is a pair, what is smaller `.diff`, a bias `.diff_b`, a table `.diff_m`.
    """
    rng, keys, changes = np.random.default_rng(3), {}, {}
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".")
        small = module in ("head.head", "patch_embedding") or tensor.ndim == 1
        draw = lambda *shape: 0.2 * rng.standard_normal(shape, np.float32)  # noqa: E731
        if kind == "modulation":
            keys[f"{module}.diff_m"] = changes[name] = draw(*tensor.shape)
        elif kind == "bias":
            keys[f"{module}.diff_b"] = changes[name] = draw(*tensor.shape)
        elif small:
            keys[f"{module}.diff"] = changes[name] = draw(*tensor.shape)
        else:
            a, b = draw(4, tensor.shape[1]), draw(tensor.shape[0], 4)
            keys[f"{module}.lora_down.weight"], keys[f"{module}.lora_up.weight"] = a, b
            changes[name] = b @ a
    return {f"diffusion_model.{key}": value for key, value in keys.items()}, changes


@pytest.mark.parametrize("through", [(), ("native",), ("comfyui", "native", "comfyui")])
def test_the_four_step_adapter_is_applied_whole(through, tmp_path):
    """Forty blocks: pairs inside and outside of them, norms, biases, modulation, patches."""
    base = toy_dit(num_layers=40)
    tensors = official(base)
    keys, changes = four_step_file(tensors)
    assert len(keys) > 40 * 25 and {k.rpartition(".diff")[2] for k in keys} >= {"", "_b", "_m"}
    path = save(tmp_path / "a.safetensors", keys)
    for i, format in enumerate(through):
        convert_lora(path, path := tmp_path / f"{i}.safetensors", format)
        if format == "comfyui":
            assert_comfyui_takes(path, base.config)
    given, strength = dit_inputs(batch=1), np.float32(0.7)
    apply(base, [(open_lora(path), strength)])
    summed = {name: t + strength * changes[name] for name, t in tensors.items()}
    by_hand = with_tensors(toy_dit(num_layers=40), summed)
    expected = np.asarray(by_hand(*given))
    assert np.abs(base(*given) - expected).max() <= 1e-5 * np.abs(expected).max()


def adapter_of(tmp_path, ranks, layers=("self_attn.q", "ffn.0"), seed=0, changes=True) -> LoRA:
    pairs = random_pairs(SMALL, ranks=(ranks,), layers=layers, seed=seed)
    tensors = in_family("comfyui", pairs)
    if changes:
        rng = np.random.default_rng(seed)
        for key, width in (("blocks.1.norm3.diff", 48), ("head.head.diff_b", 64)):
            tensors[f"diffusion_model.{key}"] = rng.standard_normal(width, np.float32)
    return open_lora(save(tmp_path / f"{seed}.safetensors", tensors))


def bits(model) -> dict[str, bytes]:
    return {n: np.asarray(v[...]).tobytes() for n, v in parameters(model).items()
            if ".lora." not in n}  # fmt: skip


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_adapters_go_on_and_off_and_leave_no_trace(dtype, tmp_path):
    """A, B, none, A ten times; and what compiles: one program without adapters, one with."""
    model, slots, given = toy_dit(dtype=dtype), Slots(), dit_inputs(batch=1)
    nnx.update(model, jax.device_put(nnx.state(model), jax.devices()[0]))  # as it is when loaded
    run = jax.jit(lambda model, *given: model(*given))
    first, base = bits(model), np.asarray(run(model, *given))
    a, b = adapter_of(tmp_path, 8), adapter_of(tmp_path, 40, ("ffn.0",), seed=1)
    slots.put(model, [(a, 1.0)])
    with_a = np.asarray(run(model, *given))
    assert np.abs(with_a - base).max() > 0.01
    for _ in range(10):
        slots.put(model, [(b, 0.5)])
        with_b = np.asarray(run(model, *given))
        slots.put(model, [])
        assert bits(model) == first
        np.testing.assert_array_equal(run(model, *given), base)
        slots.put(model, [(a, 1.0)])
        np.testing.assert_array_equal(run(model, *given), with_a)
    assert np.abs(with_b - with_a).max() > 0.01 and np.abs(with_b - base).max() > 0.01
    slots.put(model, [(a, 0.3), (b, -1.5)])  # 48 in all: still 64
    run(model, *given)
    assert run._cache_size() == 2
    slots.put(model, [(a, 1.0), (b, 1.0), (b, 1.0)])  # 88: now 128
    run(model, *given)
    assert run._cache_size() == 3
    slots.put(model, [(a, 1.0)])
    run(model, *given)
    assert run._cache_size() == 3


def test_strengths_scale_changes_too(tmp_path):
    adapter, model = adapter_of(tmp_path, 4), toy_dit()
    before = np.asarray(model.head.proj.bias[...])
    apply(model, [(adapter, 0.5), (adapter, 0.25)])
    change = adapter.changes["head.proj.bias"].values
    np.testing.assert_allclose(model.head.proj.bias[...], before + 0.75 * change, rtol=1e-6)


def test_a_quantised_base_takes_norms_and_pairs_and_refuses_whole_kernels(tmp_path):
    model, plain = toy_dit(), toy_dit()
    quantise(model, "int8")
    adapter = adapter_of(tmp_path, 4)
    codes = bits(model)
    apply(model, [(adapter, 1.0)])
    changed = {n for n, b in bits(model).items() if b != codes[n]}
    assert changed == {"blocks.norm_cross.scale", "head.proj.bias"}
    assert adaptable(model)["self_attn.q"].lora is not None
    whole = LoRA({}, {}, {"blocks.ffn.up.kernel": Change(np.ones((3, 48, 80), np.float32))})
    with pytest.raises(UserError, match=r"'blocks\.ffn\.up\.kernel' as a whole .*base=bfloat16"):
        apply(model, [(whole, 1.0)])
    kernel = np.asarray(plain.blocks.ffn.up.kernel[...])
    apply(plain, [(whole, 1.0)])
    np.testing.assert_array_equal(plain.blocks.ffn.up.kernel[...], kernel + np.float32(1))


def test_nothing_changes_where_one_of_several_does_not_fit(tmp_path):
    model, good = toy_dit(), adapter_of(tmp_path, 4)
    before = bits(model)
    for wrong, said in (
        (Change(np.ones(48, np.float32)), r"has the shape \(48,\), and this one's has \(3, 48\)"),
        (Change(np.ones((1, 48), np.float32), (7,)), "in block 7"),
    ):
        bad = LoRA({}, {}, {"blocks.norm_cross.scale": wrong})
        with pytest.raises(UserError, match=said):
            apply(model, [(good, 1.0), (bad, 1.0)])
    assert bits(model) == before
    assert all(layer.lora is None for layer in adaptable(model).values())


def test_other_channels_are_refused_with_both_numbers(tmp_path):
    """The patches of a text-to-video model: 16 channels in the place of 36."""
    patches = {"diffusion_model.patch_embedding.diff": np.ones((48, 16, 1, 2, 2), np.float32)}
    lora = open_lora(save(tmp_path / "a.safetensors", patches))
    with pytest.raises(UserError, match=r"\(1, 2, 2, 16, 48\).*\(1, 2, 2, 36, 48\)"):
        apply(toy_dit(), [(lora, 1.0)])


def test_an_adapter_of_a_model_with_an_image_branch_is_refused_by_one_without(tmp_path):
    model = toy_dit(image_dim=None, in_channels=16)
    pair = adapter_of(tmp_path, 4, ("cross_attn.k_img",))
    norm = {"diffusion_model.blocks.0.cross_attn.norm_k_img.diff": np.ones(48, np.float32)}
    for lora in (pair, open_lora(save(tmp_path / "n.safetensors", norm))):
        with pytest.raises(UserError, match="k_img"):
            apply(model, [(lora, 1.0)])


@pytest.mark.parametrize("residency", ["stay", "host", "disk"])
def test_a_pipeline_changes_its_adapters_without_reading_the_base_again(residency, tmp_path):
    save_native(tmp_path / "ck", {"dit": toy_dit()})
    pipeline = Pipeline.load(tmp_path / "ck", dtype="float32", residency=residency)
    given, a = dit_inputs(batch=1), adapter_of(tmp_path, 8)
    base, first = np.asarray(pipeline.dit(*given)), bits(pipeline.dit)
    model = pipeline.dit
    pipeline.set_adapters([(a, 0.8)])
    assert pipeline.dit is model
    with_a = np.asarray(pipeline.dit(*given))
    expected = toy_dit()
    apply(expected, [(a, 0.8)])
    np.testing.assert_array_equal(with_a, expected(*given))
    pipeline.residents.enter("decode")  # the denoiser leaves, where the policy says so
    assert (pipeline.dit is model) == (residency == "stay")
    np.testing.assert_array_equal(pipeline.dit(*given), with_a)
    pipeline.residents.enter("decode")
    pipeline.set_adapters([])
    np.testing.assert_array_equal(pipeline.dit(*given), base)
    assert bits(pipeline.dit) == first


def test_a_pipeline_refuses_adapters_of_another_model_and_keeps_its_own(tmp_path):
    save_native(tmp_path / "ck", {"dit": toy_dit(ffn_dim=88)})
    good = adapter_of(tmp_path, 4, ("self_attn.q",))
    pipeline = Pipeline.load(tmp_path / "ck", dtype="float32", lora=[(good, 1.0)])
    with pytest.raises(UserError, match=r"'ffn\.up' is for 3 blocks of 48 to 80 channels"):
        pipeline.set_adapters([(adapter_of(tmp_path, 4), 1.0)])
    with pytest.raises(UserError, match="strength=nan"):
        pipeline.set_adapters([(good, float("nan"))])
    assert pipeline.loras == ((good, 1.0),)


ON_A_MESH = """
import json, sys
import jax, numpy as np
from convert.lora import open_lora
from tests.toy import dit_inputs
from wanjax import Pipeline
from wanjax.lora import adaptable
from wanjax.sharding import make_mesh
from wanjax.weights import parameters

lora, given, found = open_lora(sys.argv[2]), dit_inputs(batch=2), {}
for name, sizes in (("one", None), ("mesh", {"data": 2, "ulysses": 4})):
    mesh = None if sizes is None else make_mesh(**sizes)
    pipeline = Pipeline.load(sys.argv[1], dtype="float32", mesh=mesh)
    run = jax.jit(lambda model, *given: model(*given))
    bits = lambda: [np.asarray(v[...]).tobytes() for v in parameters(pipeline.dit).values()]
    with pipeline.on_mesh():
        first = bits()
        outputs = []
        for loras in ([], [(lora, 1.0)], [(lora, 0.5), (lora, -0.2)], []):
            pipeline.set_adapters(loras)
            outputs.append(np.asarray(run(pipeline.dit, *given)))
            if loras:
                down = adaptable(pipeline.dit)["self_attn.q"].lora.down[...]
        found[name] = outputs, down.addressable_shards[0].data.size / down.size
        assert bits() == first and run._cache_size() == 2, run._cache_size()
(one, _), (split, share) = found["one"], found["mesh"]
error = [float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in zip(split, one)]
print(json.dumps({"error": error, "share": share,
    "effect": float(np.abs(one[1] - one[0]).max()), "back": bool((split[3] == split[0]).all())}))
"""


def test_on_a_mesh_adapters_lie_where_their_layers_lie_and_do_the_same(tmp_path):
    """On eight devices: pairs, norms and biases, other strengths without another program, and the
    base's bits at the end. A process of its own, as the devices must be there before JAX starts."""
    save_native(tmp_path / "ck", {"dit": toy_dit(dim=64, num_heads=8)})
    pairs = random_pairs(replace(SMALL, dim=64), layers=("self_attn.q", "ffn.0"))
    tensors = in_family("comfyui", pairs)
    for key, shape in (("blocks.1.norm3.diff", 64), ("blocks.2.diff_m", (1, 6, 64))):
        change = np.random.default_rng(1).standard_normal(shape, np.float32)
        tensors[f"diffusion_model.{key}"] = change
    path = save(tmp_path / "a.safetensors", tensors)
    found = on_eight_devices(ON_A_MESH, tmp_path / "ck", path)
    assert max(found["error"]) <= 1e-5 and found["effect"] > 0.01 and found["back"]
    assert found["share"] == 1 / 8
