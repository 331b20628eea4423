"""Adapters: slots, targets, split, merge, and files."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from convert.lora import convert_lora, open_lora
from convert.lora_names import by_layer
from tests.toy import SMALL, dit_inputs, randomised_adapters, toy_dit
from wanjax import lora
from wanjax.checkpoint import load_lora, save_lora
from wanjax.errors import UserError
from wanjax.slots import apply
from wanjax.tensor_files import SafetensorsWriter, read_safetensors
from wanjax.training import TrainConfig, Trainer

pytestmark = [pytest.mark.compiles, pytest.mark.usefixtures("quickly")]


def adapted(targets="all", rank=3, alpha=6.0, seed=1):
    model = toy_dit()
    lora.attach(model, rank=rank, alpha=alpha, targets=targets, rngs=nnx.Rngs(seed))
    return model


def test_a_fresh_adapter_changes_nothing_and_a_trained_one_does():
    given = dit_inputs()
    base = toy_dit()(*given)
    np.testing.assert_array_equal(adapted()(*given), base)
    moved = randomised_adapters(adapted())(*given)
    assert float(jnp.abs(moved - base).max()) > 1e-3


def test_roles_of_the_presets():
    counts = {"paper": 6, "attention": 10, "qv": 4, "all": 12}
    for preset, count in counts.items():
        assert len(lora.select(toy_dit(), preset)) == count
    assert set(lora.select(toy_dit(), "self_attn.q,ffn.up")) == {"self_attn.q", "ffn.up"}
    assert set(lora.TARGETS["all"]) == set(dict(lora.linears(toy_dit())))
    assert set(lora.adaptable(toy_dit())) == set(by_layer())


def test_a_text_to_video_model_has_no_image_roles():
    model = toy_dit(image_dim=None, in_channels=16)
    assert "cross_attn.k_img" not in lora.select(model, "paper")
    with pytest.raises(UserError, match="k_img"):
        lora.select(model, "cross_attn.k_img")


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [("cross_atn.q", "cross_attn.q"), ("papper", "paper"), ("ffn.0", "ffn"), ("", "choose")],
)
def test_a_target_that_matches_nothing_names_the_nearest(wrong, hint):
    with pytest.raises(UserError, match=hint):
        lora.select(toy_dit(), wrong)


def test_parameter_counts_of_the_paper():
    """Cross-attention of all 40 blocks at rank 4, 8, 16: 9.83 M, 19.7 M, 39.3 M."""
    from wanjax.models.dit import DiT, DiTConfig

    for rank, millions in ((4, 9.83), (8, 19.66), (16, 39.32)):

        def build(rank=rank):
            model = DiT(DiTConfig(), rngs=nnx.Rngs(0))
            lora.attach(model, rank=rank, alpha=16, targets="paper", rngs=nnx.Rngs(1))
            return lora.split(model)[1]

        adapters = nnx.eval_shape(build)
        total = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(adapters))
        assert round(total / 1e6, 2) == millions


def test_merged_weights_equal_the_side_path():
    model, given = randomised_adapters(adapted()), dit_inputs()
    beside = model(*given)
    lora.merge(model)
    assert all(layer.lora is None for _, layer in lora.linears(model))
    np.testing.assert_allclose(model(*given), beside, rtol=2e-5, atol=2e-5)


def test_an_attached_adapter_acts_by_alpha_over_rank():
    """Beside kernels into which its product was put by hand; alpha 6 at rank 3 doubles it."""
    model, by_hand = randomised_adapters(adapted("qv", rank=3, alpha=6.0)), toy_dit()
    layers = dict(lora.linears(by_hand))
    for role, layer in lora.linears(model):
        if layer.lora is not None:
            kernel, change = layers[role].kernel, layer.lora.down[...] @ layer.lora.up[...]
            kernel[...] = kernel[...] + 2 * change
    given = dit_inputs()
    np.testing.assert_allclose(model(*given), by_hand(*given), rtol=2e-5, atol=2e-5)


def test_training_attaches_the_alpha_that_was_asked_for():
    settings = TrainConfig(rank=3, alpha=7.5, targets="qv", dtype="float32")
    layers = [layer for _, layer in lora.linears(Trainer(toy_dit(), settings).model())]
    assert {layer.lora.scale for layer in layers if layer.lora is not None} == {2.5}


def test_split_separates_adapters_from_the_base():
    model = adapted()
    graph, adapters, frozen = lora.split(model)
    assert len(jax.tree.leaves(adapters)) == 24
    assert not any(
        isinstance(v, lora.LoRAParam)
        for v in jax.tree.leaves(frozen, is_leaf=lambda x: isinstance(x, nnx.Variable))
    )
    given = dit_inputs()
    np.testing.assert_array_equal(nnx.merge(graph, adapters, frozen)(*given), model(*given))


def test_several_adapters_with_strengths_are_their_sum():
    given = dit_inputs()
    models = [randomised_adapters(adapted(rank=r, seed=s), seed=s) for r, s in ((2, 3), (5, 4))]
    sets = [lora.extract(m) for m in models]
    joined = toy_dit()
    apply(joined, [(sets[0], 0.5), (sets[1], -1.25)])

    summed = toy_dit()
    for role, layer in lora.linears(summed):
        for adapter, strength in zip((s.layers[role] for s in sets), (0.5, -1.25)):
            change = strength * adapter.alpha / adapter.rank * (adapter.down @ adapter.up)
            layer.kernel[...] = layer.kernel[...] + change
    np.testing.assert_allclose(joined(*given), summed(*given), rtol=3e-5, atol=3e-5)


def test_native_file_round_trip(tmp_path):
    given, model = dit_inputs(), randomised_adapters(adapted("paper", alpha=5.0))
    save_lora(tmp_path / "a.safetensors", lora.extract(model, {"step": "7"}))
    loaded = load_lora(tmp_path / "a.safetensors")
    assert loaded.metadata == {"step": "7"}
    again = toy_dit()
    apply(again, [(loaded, 1.0)])
    np.testing.assert_allclose(again(*given), model(*given), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("targets", ["paper", "attention", "qv", "all", "cross_attn.k_img"])
def test_comfyui_round_trip(tmp_path, targets):
    given, model = dit_inputs(), randomised_adapters(adapted(targets, rank=4, alpha=2.0))
    save_lora(tmp_path / "native.safetensors", lora.extract(model))
    report = convert_lora(tmp_path / "native.safetensors", tmp_path / "c.safetensors", "comfyui")
    trained = sum(x.size for x in jax.tree.leaves(lora.split(model)[1]))
    assert f"in {SMALL.num_layers} blocks, rank 4, {trained:,} parameters (" in report
    file = read_safetensors(tmp_path / "c.safetensors")
    assert all(k.startswith("diffusion_model.blocks.") for k in file.tensors)
    assert not any("alpha" in k for k in file.tensors)
    assert file.metadata["ss_network_dim"] == file.metadata["ss_network_alpha"] == "4"
    images = {k.split(".")[-3] for k in file.tensors} & {"k_img", "v_img"}
    assert len(images) in (0, 2)
    convert_lora(tmp_path / "c.safetensors", tmp_path / "again.safetensors", "native")
    again = toy_dit()
    apply(again, [(open_lora(tmp_path / "again.safetensors"), 1.0)])
    np.testing.assert_allclose(again(*given), model(*given), rtol=1e-5, atol=1e-5)


def write_tensors(path, tensors):
    header = {k: (v.dtype, v.shape) for k, v in tensors.items()}
    with SafetensorsWriter(path, header, {}) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)


def test_files_without_their_half_are_refused_by_name(tmp_path):
    path, a = tmp_path / "x.safetensors", np.zeros((2, 48), np.float32)
    layer = "diffusion_model.blocks.0.ffn.0"
    write_tensors(path, {f"{layer}.lora_A.weight": a})
    with pytest.raises(UserError, match=r"blocks\.0\.ffn\.0' has no matching"):
        open_lora(path)
    none, up = np.zeros((0, 48), np.float32), np.zeros((72, 0), np.float32)
    write_tensors(path, {f"{layer}.lora_A.weight": none, f"{layer}.lora_B.weight": up})
    with pytest.raises(UserError, match=r"blocks\.0\.ffn\.0' has no matching"):
        open_lora(path)
    with pytest.raises(UserError, match="nowhere"):
        open_lora(tmp_path / "nowhere")
    (tmp_path / "cut.safetensors").write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"cut\.safetensors is truncated"):
        open_lora(tmp_path / "cut.safetensors")


def test_an_adapter_of_another_model_is_refused(tmp_path):
    wide = lora.extract(adapted("all"))
    with pytest.raises(UserError, match="another model"):
        apply(toy_dit(ffn_dim=SMALL.ffn_dim + 8), [(wide, 1.0)])
    with pytest.raises(UserError, match="k_img"):
        apply(toy_dit(image_dim=None, in_channels=16), [(wide, 1.0)])
    with pytest.raises(UserError, match="blocks"):
        apply(toy_dit(num_layers=SMALL.num_layers + 1), [(wide, 1.0)])


def test_ranks_that_differ_between_blocks_are_padded(tmp_path):
    rng = np.random.default_rng(0)
    normal = lambda *s: rng.normal(size=s).astype(np.float32)  # noqa: E731
    tensors, d = {}, SMALL.dim
    for block, rank in ((0, 2), (2, 3)):
        layer = f"diffusion_model.blocks.{block}.self_attn.q"
        tensors[f"{layer}.lora_A.weight"] = normal(rank, d)
        tensors[f"{layer}.lora_B.weight"] = normal(d, rank)
    write_tensors(tmp_path / "x.safetensors", tensors)
    read = open_lora(tmp_path / "x.safetensors").layers["self_attn.q"]
    assert read.alpha == read.rank == 3
    down, up = read.over(3)
    for block in (0, 2):
        layer = f"diffusion_model.blocks.{block}.self_attn.q"
        full = tensors[f"{layer}.lora_B.weight"] @ tensors[f"{layer}.lora_A.weight"]
        np.testing.assert_allclose((down[block] @ up[block]).T, full, atol=1e-5)
    assert not down[1].any()


def some_blocks(*blocks: int, value: float | None = None) -> dict[str, np.ndarray]:
    """A ComfyUI file's tensors for two layers of these blocks; random, or all `value`."""
    rng, d, tensors = np.random.default_rng(5), SMALL.dim, {}
    for block in blocks:
        for layer in ("self_attn.q", "cross_attn.v"):
            for part, shape in (("A", (2, d)), ("B", (d, 2))):
                weight = rng.normal(size=shape) if value is None else np.full(shape, value)
                key = f"diffusion_model.blocks.{block}.{layer}.lora_{part}.weight"
                tensors[key] = weight.astype(np.float32)
    return tensors


@pytest.mark.parametrize("blocks", [(0,), (1,), (2, 0), (2,)])
def test_an_adapter_of_some_blocks_leaves_the_others_as_they_are(blocks, tmp_path):
    """As read, through our format, and through theirs again."""
    tensors = some_blocks(*blocks)
    write_tensors(tmp_path / "c.safetensors", tensors)
    convert_lora(tmp_path / "c.safetensors", tmp_path / "n.safetensors", "native")
    convert_lora(tmp_path / "n.safetensors", tmp_path / "again.safetensors", "comfyui")
    assert read_safetensors(tmp_path / "again.safetensors").tensors.keys() == tensors.keys()
    for name in ("c", "n", "again"):
        model = toy_dit()
        apply(model, [(open_lora(tmp_path / f"{name}.safetensors"), 0.5)])
        layers = dict(lora.linears(model))
        assert layers["ffn.up"].lora is None
        for role in ("self_attn.q", "cross_attn.v"):
            side = layers[role].lora
            change = side.scale * (side.down[...] @ side.up[...])
            for block in range(SMALL.num_layers):
                key = f"diffusion_model.blocks.{block}.{role}.lora_"
                wanted = np.zeros((SMALL.dim, SMALL.dim))
                if block in blocks:
                    wanted = 0.5 * tensors[f"{key}B.weight"] @ tensors[f"{key}A.weight"]
                np.testing.assert_allclose(change[block].T, wanted, atol=1e-5)


def test_blocks_that_the_model_has_not_are_named_and_not_allocated(tmp_path):
    path = tmp_path / "c.safetensors"
    for block, said in ((99_999_999, "99,999,999"), (SMALL.num_layers, str(SMALL.num_layers))):
        write_tensors(path, some_blocks(0, block))
        convert_lora(path, tmp_path / f"{block}.safetensors", "native")
        for name in ("c", block):
            read = open_lora(tmp_path / f"{name}.safetensors")
            with pytest.raises(UserError, match=f"in block {said}, and this one has 3 blocks"):
                apply(toy_dit(), [(read, 1.0)])
    for odd in ("01", "-1", "1" * 5000, "\u0661"):
        key = f"diffusion_model.blocks.{odd}.ffn.0.lora_A.weight"
        write_tensors(path, {key: np.zeros((2, 48))})
        with pytest.raises(UserError, match="not of the form"):
            open_lora(path)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_adapters_of_a_run_that_diverged_are_refused_by_the_tensor(bad, tmp_path):
    tensors = some_blocks(0, 1)
    key = "diffusion_model.blocks.1.cross_attn.v.lora_B.weight"
    tensors[key][3, 1] = bad
    write_tensors(tmp_path / "burnt.safetensors", tensors)
    for attempt in (
        lambda: open_lora(tmp_path / "burnt.safetensors"),
        lambda: convert_lora(tmp_path / "burnt.safetensors", tmp_path / "o.safetensors", "native"),
    ):
        with pytest.raises(UserError, match=rf"burnt\.safetensors holds NaN .*'{key}'"):
            attempt()
    model = randomised_adapters(adapted("qv"))
    layer = dict(lora.linears(model))["self_attn.v"].lora
    layer.up[...] = layer.up[...].at[0, 0, 0].set(bad)
    save_lora(tmp_path / "ours.safetensors", lora.extract(model))
    with pytest.raises(UserError, match=r"ours\.safetensors .*'blocks.self_attn.v.up'"):
        load_lora(tmp_path / "ours.safetensors")
    assert not (tmp_path / "o.safetensors").exists()


def test_blocks_that_differ_in_width_are_refused_before_anything_is_allocated(tmp_path):
    tensors, huge = some_blocks(0), 1 << 50  # of no bytes in the file
    layer = "diffusion_model.blocks.1.self_attn.q"
    tensors[f"{layer}.lora_A.weight"] = np.zeros((huge, 0), np.float32)
    tensors[f"{layer}.lora_B.weight"] = np.zeros((0, huge), np.float32)
    write_tensors(tmp_path / "c.safetensors", tensors)
    with pytest.raises(UserError, match=r"blocks\.1\.self_attn\.q' differs in width"):
        open_lora(tmp_path / "c.safetensors")


def test_codes_of_a_quantised_adapter_are_refused(tmp_path):
    codes = {k: np.ones(v.shape, np.int8) for k, v in some_blocks(0).items()}
    write_tensors(tmp_path / "c.safetensors", codes)
    with pytest.raises(UserError, match="holds .*lora_A.weight' in int8, the codes"):
        open_lora(tmp_path / "c.safetensors")


def test_what_a_type_cannot_hold_is_not_written(tmp_path):
    write_tensors(tmp_path / "c.safetensors", some_blocks(0, value=1e5))
    with pytest.raises(UserError, match=r"lora_A.weight' has values that float16 cannot hold"):
        convert_lora(tmp_path / "c.safetensors", tmp_path / "o.safetensors", "comfyui", "float16")
    huge = {k: v.astype(np.float64) * 1e300 for k, v in some_blocks(0, value=1).items()}
    write_tensors(tmp_path / "c.safetensors", huge)
    with pytest.raises(UserError, match="holds NaN or infinity"):
        open_lora(tmp_path / "c.safetensors")
    assert not (tmp_path / "o.safetensors").exists()


def test_a_pipeline_takes_what_convert_opened(tmp_path):
    """And the refusal of the file itself names that call."""
    import convert
    from wanjax import Pipeline
    from wanjax.weights import save_native

    save_native(tmp_path / "ck", {"dit": toy_dit()})
    write_tensors(tmp_path / "c.safetensors", some_blocks(0, 2))
    with pytest.raises(UserError, match=r"not a native adapter; .*convert\.open_lora\(") as said:
        Pipeline.load(tmp_path / "ck", lora=[(tmp_path / "c.safetensors", 1.0)])
    assert f"open_lora('{tmp_path / 'c.safetensors'}')" in str(said.value)
    opened = convert.open_lora(tmp_path / "c.safetensors")
    pipeline = Pipeline.load(tmp_path / "ck", dtype="float32", lora=[(opened, 0.5)])
    assert pipeline.loras == ((opened, 0.5),)


SPOILT = [
    ("alpha", '{"self_attn.q": NaN}'),
    ("alpha", '{"self_attn.q": 1' + "0" * 400 + "}"),
    ("alpha", '{"self_attn.q": "4"}'),
    ("alpha", '{"self_attn.k": 4}'),
    ("alpha", "[4]"),
    ("alpha", "{}"),
    ("alpha", "[" * 9999),
    ("blocks", '{"self_attn.q": [1, 0, 2]}'),
    ("blocks", '{"self_attn.q": [0, 1]}'),
    ("blocks", '{"self_attn.q": [-1, 0, 1]}'),
    ("blocks", '{"self_attn.q": [0.5, 1, 2]}'),
    ("blocks", '{"self_attn.q": "012"}'),
    ("blocks", "[]"),
]


@pytest.mark.parametrize(("entry", "value"), SPOILT)
def test_a_damaged_note_of_an_adapter_is_refused(entry, value, tmp_path):
    path = tmp_path / "a.safetensors"
    save_lora(path, lora.extract(adapted("self_attn.q")))
    file = read_safetensors(path)
    header = {k: (v.dtype, v.shape) for k, v in file.tensors.items()}
    with SafetensorsWriter(tmp_path / "b", header, file.metadata | {entry: value}) as writer:
        for name, tensor in file.tensors.items():
            writer.write(name, tensor)
    with pytest.raises(UserError, match="b is damaged"):
        load_lora(tmp_path / "b")


def test_a_run_that_may_not_be_read_gets_that_remedy(tmp_path, monkeypatch):
    def closed(*_):
        raise PermissionError(13, "Permission denied")

    (tmp_path / "run").mkdir()
    (tmp_path / "run/run.json").write_text("{}")
    monkeypatch.setattr("pathlib.Path.read_text", closed)
    with pytest.raises(UserError, match=r"run\.json may not be read; change its permissions"):
        open_lora(tmp_path / "run")
