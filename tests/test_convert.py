"""`python -m convert pipeline` and `export`: round trips, single files, others' loaders."""

import json
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from convert import folders
from convert.export import export
from convert.native import convert_pipeline
from tests.checkpoints import (
    CONFIGS,
    DIT,
    OFFICIAL_FILES,
    TEXTUAL,
    all_tensors,
    assert_same_tensors,
    diffusers_folder,
    hub_config,
    official_folder,
    random_tensors,
)
from wanjax.errors import UserError
from wanjax.models.dit import DiTConfig
from wanjax.tensor_files import read_safetensors
from wanjax.weights import abstract_network, parameters, read_config


@pytest.fixture(scope="module")
def official(tmp_path_factory) -> Path:
    return official_folder(tmp_path_factory.mktemp("official") / "src")


@pytest.fixture(scope="module")
def native(official, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("native") / "dst"
    convert_pipeline(official, folder)
    return folder


@pytest.fixture(scope="module")
def diffusers(tmp_path_factory) -> Path:
    return diffusers_folder(tmp_path_factory.mktemp("diffusers") / "src")


def test_official_configs_are_read_and_inferred(native):
    assert read_config(native) == {**CONFIGS, "text_encoder": CONFIGS["text_encoder"]}


def test_official_round_trip_is_the_identity(official, native, tmp_path):
    report = export(native, tmp_path / "out", "official", origin=official)
    assert_same_tensors(official, tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text()) == hub_config()
    for file in ("google/umt5-xxl/tokenizer.json", "xlm-roberta-large/tokenizer.json"):
        assert (tmp_path / "out" / file).read_bytes() == (official / file).read_bytes()
    assert "textual.*, log_scale" in report


def test_what_was_dropped_is_reported_and_missed(official, native, tmp_path):
    report = convert_pipeline(official, tmp_path / "again", only=("image_encoder",))
    assert "dropped 2 tensors textual.*" in report and "dropped 1 tensors log_scale" in report
    report = export(native, tmp_path / "out", "official")
    assert "without textual.*, log_scale" in report and "--from" in report
    lost = all_tensors(official).keys() - all_tensors(tmp_path / "out").keys()
    assert lost == {("image_encoder", name) for name in TEXTUAL}


def test_exported_pth_opens_in_torch(native, official, tmp_path):
    torch = pytest.importorskip("torch")
    export(native, tmp_path / "out", "official", origin=official)
    for file in OFFICIAL_FILES.values():
        ours = torch.load(tmp_path / "out" / file, weights_only=True)
        theirs = torch.load(official / file, weights_only=True)
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor), name


def test_shards_have_an_index(native, official, tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "SHARD_BYTES", 3_000_000)
    export(native, tmp_path / "out", "official", origin=official)
    index = tmp_path / "out/diffusion_pytorch_model.safetensors.index.json"
    shards = set(json.loads(index.read_text())["weight_map"].values())
    assert len(shards) > 2
    assert all((tmp_path / "out" / shard).stat().st_size < 3_100_000 for shard in shards)
    assert_same_tensors(official, tmp_path / "out")


def test_diffusers_round_trip_is_the_identity(diffusers, tmp_path):
    convert_pipeline(diffusers, tmp_path / "native")
    export(tmp_path / "native", tmp_path / "out", "diffusers")
    assert_same_tensors(diffusers, tmp_path / "out")


def test_diffusers_variants_come_back_as_they_were(diffusers, tmp_path):
    """Prefixed CLIP, both names of umT5's embedding, and a norm that diffusers ignores."""
    import shutil

    src = Path(shutil.copytree(diffusers, tmp_path / "src"))
    clip = src / "image_encoder/model.safetensors"
    tensors = load_file(clip)
    prefix = "vision_model."
    prefixed = any(name.startswith(prefix) for name in tensors)
    other = {n.removeprefix(prefix) if prefixed else prefix + n: t for n, t in tensors.items()}
    save_file(other, clip, {"format": "pt"})
    umt5 = src / "text_encoder/model.safetensors"
    tensors = load_file(umt5)
    save_file(
        tensors | {"encoder.embed_tokens.weight": tensors["shared.weight"].copy()},
        umt5,
        {"format": "pt"},
    )
    dit = next((src / "transformer").glob("*00001-of*"))
    extra = "blocks.0.attn2.norm_added_q.weight"
    save_file(load_file(dit) | {extra: np.ones(24, np.float32)}, dit, {"format": "pt"})

    report = convert_pipeline(src, tmp_path / "native")
    assert "dropped 1 tensors blocks.*" in report
    export(tmp_path / "native", tmp_path / "out", "diffusers", origin=src)
    assert_same_tensors(src, tmp_path / "out")
    assert ("text_encoder", "encoder.embed_tokens.weight") in all_tensors(tmp_path / "out")


def test_umt5_with_the_second_name_alone(diffusers, tmp_path):
    tensors = load_file(diffusers / "text_encoder/model.safetensors")
    tensors["encoder.embed_tokens.weight"] = tensors.pop("shared.weight")
    save_file(tensors, tmp_path / "umt5.safetensors", {"format": "pt"})
    convert_pipeline(tmp_path / "umt5.safetensors", tmp_path / "native")
    leaves = read_safetensors(tmp_path / "native/text_encoder.safetensors").tensors
    assert np.array_equal(leaves["token_embedding.table"], tensors["encoder.embed_tokens.weight"])


def test_exported_folder_opens_as_a_diffusers_pipeline(native, tmp_path):
    torch = pytest.importorskip("torch")
    from diffusers import WanImageToVideoPipeline

    export(native, tmp_path / "out", "diffusers")
    pipe = WanImageToVideoPipeline.from_pretrained(tmp_path / "out")
    want = random_tensors("dit", "diffusers")
    assert pipe.transformer.state_dict().keys() == want.keys()
    for name, tensor in pipe.transformer.state_dict().items():
        assert np.array_equal(tensor.numpy(), want[name]), name
    assert pipe.text_encoder.dtype == torch.bfloat16
    assert pipe.tokenizer("rain at night").input_ids[-1] == 1
    assert pipe.image_processor.size == {"shortest_edge": 28}
    assert pipe.scheduler.config.use_flow_sigmas and pipe.scheduler.config.flow_shift == 3.0
    clip = random_tensors("image_encoder", "diffusers")
    state = {n.removeprefix("vision_model."): t for n, t in pipe.image_encoder.state_dict().items()}
    for name, tensor in clip.items():
        got = state[name.removeprefix("vision_model.")].float().numpy()
        assert np.array_equal(got, tensor.astype(np.float16).astype(np.float32)), name


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
def test_single_files_of_comfyui(prefix, tmp_path):
    tensors = random_tensors("dit", "official")
    file = tmp_path / "wan_bf16.safetensors"
    kind = ml_dtypes.bfloat16
    save_file({prefix + n: t.astype(kind) for n, t in tensors.items()}, file)
    convert_pipeline(file, tmp_path / "native")
    assert read_config(tmp_path / "native") == {"dit": DIT}
    export(tmp_path / "native", tmp_path / "out.safetensors", "comfyui")
    back = read_safetensors(tmp_path / "out.safetensors").tensors
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].dtype == kind and np.array_equal(back[name], tensor.astype(kind)), name


def test_a_folder_of_comfyui_files(tmp_path):
    src = tmp_path / "models"
    layouts = {
        "dit": ("diffusion_models", "official"),
        "vae": ("vae", "official"),
        "text_encoder": ("text_encoders", "diffusers"),
        "image_encoder": ("clip_vision", "diffusers"),
    }
    for network, (folder, layout) in layouts.items():
        (src / folder).mkdir(parents=True)
        config = replace(CONFIGS[network], **NO_HEAD) if network == "image_encoder" else None
        tensors = random_tensors(network, layout, config)
        if network == "text_encoder":
            tensors["spiece_model"] = np.arange(50, dtype=np.uint8)
        save_file(tensors, src / folder / "any_name.safetensors")
    convert_pipeline(src, tmp_path / "native")
    assert read_config(tmp_path / "native").keys() == layouts.keys()
    for network in layouts:
        out = tmp_path / f"{network}.safetensors"
        export(tmp_path / "native", out, "comfyui", only=(network,))
        before = load_file(src / layouts[network][0] / "any_name.safetensors")
        after = load_file(out)
        assert before.keys() == after.keys()
        for name, tensor in before.items():
            assert np.array_equal(tensor, after[name]), name


NO_HEAD = {"projection_dim": None}
VARIANTS = {
    "t2v": replace(DIT, image_dim=None, in_channels=16),
    "flf2v": replace(DIT, image_positions=10),
    "odd heads": replace(DIT, dim=60, num_heads=3),
}


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_kinds_of_diffusion_model_through_all_formats(config: DiTConfig, tmp_path):
    """official, comfyui, diffusers and back, with a width that no shape tells the heads of."""
    src = tmp_path / "src"
    src.mkdir()
    save_file(random_tensors("dit", "official", config), src / "dit.safetensors")
    (src / "config.json").write_text(json.dumps(hub_config(config)))
    convert_pipeline(src, tmp_path / "native", only=("dit",))
    export(tmp_path / "native", tmp_path / "comfy.safetensors", "comfyui")
    convert_pipeline(tmp_path / "comfy.safetensors", tmp_path / "native2")
    export(tmp_path / "native2", tmp_path / "diffusers", "diffusers")
    convert_pipeline(tmp_path / "diffusers", tmp_path / "native3", only=("dit",))
    export(tmp_path / "native3", tmp_path / "out", "official")
    assert read_config(tmp_path / "native3") == {"dit": config}
    assert_same_tensors(src, tmp_path / "out")


@pytest.mark.parametrize("asked", ["bfloat16", "float32"])
def test_dtype_casts_what_the_precision_table_says(asked, official, native, tmp_path):
    """Tensor for tensor what a network in that type holds: norms, head and VAE stay in fp32."""
    report = convert_pipeline(official, tmp_path / "cast", dtype=np.dtype(asked))
    assert "coarser in the source" not in report
    seen = set()
    for network, config in read_config(tmp_path / "cast").items():
        cast = read_safetensors(tmp_path / f"cast/{network}.safetensors").tensors
        kept = read_safetensors(native / f"{network}.safetensors").tensors
        for name, leaf in parameters(abstract_network(network, config, asked)).items():
            assert cast[name].dtype == leaf.dtype, name
            assert np.array_equal(cast[name], kept[name].astype(leaf.dtype)), name
            seen.add((network, leaf.dtype.name))
    halves = {("dit", "bfloat16"), ("text_encoder", "bfloat16"), ("image_encoder", "float16")}
    assert seen == {(n, "float32") for n in CONFIGS} | (halves if asked == "bfloat16" else set())


def test_what_a_source_in_bf16_has_lost_is_said(tmp_path):
    tensors = random_tensors("vae", "official")
    save_file({n: t.astype("bfloat16") for n, t in tensors.items()}, tmp_path / "vae.safetensors")
    report = convert_pipeline(tmp_path / "vae.safetensors", tmp_path / "native", np.dtype("f4"))
    assert f"{len(tensors)} tensors that are computed in float32 are coarser" in report


def test_layers_of_two_types_need_a_dtype(tmp_path):
    tensors = random_tensors("dit", "official")
    odd = "blocks.4.ffn.0.weight"
    tensors[odd] = tensors[odd].astype(np.float16)
    save_file(tensors, tmp_path / "mixed.safetensors")
    with pytest.raises(UserError, match=rf"'{odd}' in float16 .*--dtype"):
        convert_pipeline(tmp_path / "mixed.safetensors", tmp_path / "native")
    assert not (tmp_path / "native").exists()
    dtype = np.dtype(np.float32)
    convert_pipeline(tmp_path / "mixed.safetensors", tmp_path / "native", dtype=dtype)


def test_part_of_a_checkpoint(official, tmp_path):
    report = convert_pipeline(official, tmp_path / "native", only=("vae", "text_encoder"))
    assert read_config(tmp_path / "native").keys() == {"vae", "text_encoder"}
    assert "tokenizer      copied" in report
    assert (tmp_path / "native/tokenizer/tokenizer.json").is_file()
