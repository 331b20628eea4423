"""What is found in a folder of weights, what is passed over and said, and what is another model."""

import json
import pickle
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from convert.configs import to_diffusers
from convert.export import export
from convert.groups import read_networks
from convert.inspect import inspect
from convert.native import convert_pipeline
from convert.sources import COMPONENTS, open_checkpoint
from tests.checkpoints import CONFIGS, DIT, random_tensors, save_sharded
from wanjax.errors import UserError
from wanjax.weights import load_network, replace_network

ONE = replace(DIT, num_layers=1)
T2V = replace(ONE, image_dim=None, in_channels=16)


def dit_tensors(config=ONE, seed=0):
    return random_tensors("dit", "official", config, seed)


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """A diffusers folder of a text-to-video model, one file a component."""
    folder = tmp_path_factory.mktemp("plain") / "diffusers"
    for component, network in COMPONENTS.items():
        if network != "image_encoder":
            config = T2V if network == "dit" else CONFIGS[network]
            (folder / component).mkdir(parents=True)
            text = json.dumps(to_diffusers(network, config))
            (folder / component / "config.json").write_text(text)
            tensors = random_tensors(network, "diffusers", config)
            stem = "model" if network == "text_encoder" else "diffusion_pytorch_model"
            save_file(tensors, folder / component / f"{stem}.safetensors")
    return folder


@pytest.fixture
def folder(plain, tmp_path) -> Path:
    return Path(shutil.copytree(plain, tmp_path / "src"))


def same_as_before(folder: Path, plain: Path) -> None:
    """The folder still gives the tensors that it gave when only they were there."""
    found, known = open_checkpoint(folder).sources, open_checkpoint(plain).sources
    assert found.keys() == known.keys()
    for network, source in found.items():
        for name, tensor in source.named.tensors.items():
            np.testing.assert_array_equal(tensor, known[network].named.tensors[name])


def text_model(folder: Path) -> Path:
    return folder / "text_encoder/model.safetensors"


def other_text() -> dict[str, np.ndarray]:
    return random_tensors("text_encoder", "diffusers", seed=9)


@pytest.mark.filterwarnings("error")
def test_what_a_mac_leaves_behind_is_ignored(folder, plain):
    for path in sorted(folder.rglob("*")):
        (path.parent / f"._{path.name}").write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X        ")
        (path.parent / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    (folder / ".cache").mkdir()
    shutil.copy(text_model(folder), folder / ".cache/model.safetensors")
    same_as_before(folder, plain)
    assert "._" not in inspect(folder) and ".cache" not in inspect(folder)


VARIANTS = ["model.fp16.safetensors", "model.bf16.safetensors", "model.fp8_e4m3fn.safetensors"]


@pytest.mark.parametrize("name", [*VARIANTS, "model.non_ema.safetensors"])
def test_the_plain_file_is_taken_of_variants(name, folder, plain):
    save_file(other_text(), folder / "text_encoder" / name)
    with pytest.warns(UserWarning, match=f"skipped .*{name}, since the plain file is there"):
        same_as_before(folder, plain)


@pytest.mark.parametrize(
    "place", ["model.safetensors.index.fp16.json", "pytorch_model.bin.index.json"]
)
def test_the_plain_file_is_taken_of_shards_that_were_not_fetched(place, folder, plain):
    index = {"weight_map": {"a": "model-00001-of-00002.bin"}}
    (folder / "text_encoder" / place).write_text(json.dumps(index))
    with pytest.warns(UserWarning, match=f"skipped .*{place}, since the plain file is there"):
        same_as_before(folder, plain)


def test_safetensors_are_taken_of_the_same_weights_in_bin(folder, plain):
    torch = pytest.importorskip("torch", reason="the .bin is to be torch's own")
    state = {name: torch.from_numpy(tensor) for name, tensor in other_text().items()}
    torch.save(state, folder / "text_encoder/pytorch_model.bin")
    with pytest.warns(UserWarning, match="skipped .*pytorch_model.bin, since the plain file is"):
        same_as_before(folder, plain)


def test_one_variant_alone_is_taken_and_of_two_both_are_named(folder, plain):
    text_model(folder).rename(folder / "text_encoder/model.fp16.safetensors")
    same_as_before(folder, plain)
    save_file(other_text(), folder / "text_encoder/model.bf16.safetensors")
    with pytest.raises(UserError, match=r"two files .*model\.bf16\.safe.* and model\.fp16\.safe"):
        open_checkpoint(folder)


def test_variants_in_shards(folder, plain):
    tensors = other_text()
    save_sharded(folder / "text_encoder", "model.fp16", tensors, 2)
    with pytest.warns(UserWarning, match=r"model\.fp16\.safetensors\.index\.json, since"):
        same_as_before(folder, plain)
    save_sharded(folder / "text_encoder", "model", tensors, 2)
    with pytest.warns(UserWarning, match="skipped .*model.safetensors, since the plain"):
        found = open_checkpoint(folder).sources["text_encoder"].named.tensors
    np.testing.assert_array_equal(found["shared.weight"], tensors["shared.weight"])


UNRELATED = {
    "a pickle": pickle.dumps({"lr": 1e-4}),
    "noise": bytes(range(256)) * 9,
    "nothing": b"",
    "an old torch file": b"\x80\x02}q\x00.",
}


@pytest.mark.parametrize("data", UNRELATED.values(), ids=UNRELATED)
@pytest.mark.parametrize("place", ["optimizer.bin", "transformer/training_args.bin", "vae/x.ckpt"])
def test_an_unrelated_torch_file_is_skipped_and_said(data, place, folder, plain):
    (folder / place).write_bytes(data)
    if "/" in place:
        with pytest.warns(UserWarning, match=rf"skipped: .*{place.split('/')[1]}"):
            same_as_before(folder, plain)
    else:  # no part of the pipeline is looked for there
        same_as_before(folder, plain)


def test_loose_files_are_told_apart_and_what_is_none_is_said(tmp_path):
    save_file(dit_tensors(), tmp_path / "dit.safetensors")
    save_file({"a": np.ones(2)}, tmp_path / "embedding.safetensors")
    (tmp_path / "scheduler.bin").write_bytes(b"junk")
    with pytest.warns(UserWarning) as said:
        assert list(read_networks(tmp_path)) == ["dit"]
    text = " ".join(str(w.message) for w in said)
    assert "embedding.safetensors" in text and "scheduler.bin" in text
    save_file(dit_tensors(seed=1), tmp_path / "second.safetensors")
    with pytest.raises(UserError, match="dit, dit.safetensors and second.safetensors; leave one"):
        read_networks(tmp_path)


def test_shards_without_their_index_ask_for_it(tmp_path):
    save_sharded(tmp_path, "diffusion_pytorch_model", dit_tensors(), 2)
    (tmp_path / "diffusion_pytorch_model.safetensors.index.json").unlink()
    for place in (tmp_path, tmp_path / "diffusion_pytorch_model-00001-of-00002.safetensors"):
        with pytest.raises(UserError, match="fetch the diffusion_pytorch_model.safetensors.index"):
            read_networks(place)


ELSEWHERE = ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..", ""]
ELSEWHERE += ["model.safetensors.index.json"]  # itself


@pytest.mark.parametrize("name", ELSEWHERE)
def test_an_index_names_only_what_is_beside_it(name, tmp_path):
    folder = tmp_path / "src"
    folder.mkdir()
    save_file(dit_tensors(), tmp_path / "secret.safetensors")
    index = {"weight_map": dict.fromkeys(dit_tensors(), name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="index.json names '.*', which is no file beside it"):
        convert_pipeline(folder, tmp_path / "dst")
    assert not (tmp_path / "dst").exists()


def with_tokenizer(folder: Path) -> Path:
    (folder / "tokenizer").mkdir(parents=True)
    for name in ("tokenizer.json", "spiece.model", "id_rsa", "._tokenizer.json"):
        (folder / "tokenizer" / name).write_text(name)
    return folder


def test_of_a_tokenizer_only_the_known_files_are_copied(folder, tmp_path):
    with_tokenizer(folder)
    convert_pipeline(folder, tmp_path / "dst")
    assert {p.name for p in (tmp_path / "dst/tokenizer").iterdir()} == {
        "tokenizer.json",
        "spiece.model",
    }
    export(tmp_path / "dst", tmp_path / "out", "official")
    assert (tmp_path / "out/google/umt5-xxl/tokenizer.json").read_text() == "tokenizer.json"
    (tmp_path / "dst/tokenizer/id_rsa").write_text("private")
    replace_network(tmp_path / "dst", tmp_path / "next", "vae", load_vae(tmp_path / "dst"))
    assert not (tmp_path / "next/tokenizer/id_rsa").exists()


def load_vae(folder: Path):
    return load_network(folder, "vae", dtype="float32")


@pytest.mark.parametrize("what", ["a file", "the folder"])
def test_no_link_out_of_the_checkpoint_is_followed(what, folder, tmp_path):
    secret = with_tokenizer(tmp_path / "elsewhere") / "tokenizer"
    if what == "the folder":
        (folder / "tokenizer").symlink_to(secret)
    else:
        with_tokenizer(folder)
        (folder / "tokenizer/spiece.model").unlink()
        (folder / "tokenizer/spiece.model").symlink_to("../../elsewhere/tokenizer/id_rsa")
    with pytest.raises(UserError, match=r"tokenizer/\S+ is a link out of .*; put the file itself"):
        convert_pipeline(folder, tmp_path / "dst")
    assert not (tmp_path / "dst").exists()


def test_links_within_the_checkpoint_and_into_the_hubs_cache_are_followed(folder, tmp_path):
    snapshot = tmp_path / "models--x/snapshots/0123"
    snapshot.parent.mkdir(parents=True)
    shutil.move(with_tokenizer(folder), snapshot)
    blobs = tmp_path / "models--x/blobs"
    blobs.mkdir()
    shutil.move(snapshot / "tokenizer/tokenizer.json", blobs / "abc")
    (snapshot / "tokenizer/tokenizer.json").symlink_to("../../../blobs/abc")
    (snapshot / "tokenizer/spiece.model").unlink()
    (snapshot / "tokenizer/spiece.model").symlink_to("id_rsa")
    convert_pipeline(snapshot, tmp_path / "dst")
    copied = tmp_path / "dst/tokenizer"
    assert (copied / "tokenizer.json").read_text() == "tokenizer.json"
    assert (copied / "spiece.model").read_text() == "id_rsa"
    assert not (copied / "tokenizer.json").is_symlink()


def test_pointers_in_the_place_of_large_files_are_named(folder, tmp_path):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    with_tokenizer(folder)
    (folder / "tokenizer/tokenizer.json").write_text(pointer)
    with pytest.raises(UserError, match=r"tokenizer\.json is a git-lfs pointer.*git lfs pull"):
        convert_pipeline(folder, tmp_path / "dst")
    (tmp_path / "src2").mkdir()
    (tmp_path / "src2/Wan2.1_VAE.pth").write_text(pointer)
    with pytest.raises(UserError, match=r"VAE\.pth is a git-lfs pointer.*git lfs pull"):
        convert_pipeline(tmp_path / "src2", tmp_path / "dst")
    assert not (tmp_path / "dst").exists()


def changed(in_channels, out_channels=16, image_dim=None):
    return replace(ONE, in_channels=in_channels, out_channels=out_channels, image_dim=image_dim)


RELATIVES = {
    "Wan2.2 I2V": (changed(36), {}, "an expert of Wan2.2's image-to-video pair"),
    "TI2V-5B": (changed(48, 48), {}, "Wan2.2's TI2V-5B"),
    "Fun-Control": (changed(48, image_dim=20), {}, "a Fun-Control model"),
    "Fun-Control 1.1": (changed(48, image_dim=20), {"ref_conv.bias": (8,)}, "Fun-Control"),
    "Fun-Camera": (
        changed(32, image_dim=20), {"control_adapter.conv.weight": (8, 24, 2, 2)}, "camera-control"
    ),
    "Wan2.2 Fun-Camera": (changed(36), {"control_adapter.conv.bias": (8,)}, "camera-control"),
    "Wan2.2 Fun-Control": (changed(52), {"ref_conv.bias": (8,)}, "Fun-Control"),
    "VACE": (T2V, {"vace_patch_embedding.bias": (8,)}, "is VACE"),
    "speech": (T2V, {"casual_audio_encoder.weights": (8,)}, "speech-to-video"),
    "unknown": (changed(20), {}, "no model of Wan2.1 .20 input and 16 output channels, without"),
    "text-to-video with CLIP": (changed(16, image_dim=20), {}, "no model of Wan2.1 .16 input"),
}  # fmt: skip


@pytest.mark.parametrize(("config", "more", "kind"), RELATIVES.values(), ids=RELATIVES)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_relatives_of_wan21_are_refused_by_what_they_are(config, more, kind, prefix, tmp_path):
    path = tmp_path / "wan_14B.safetensors"
    tensors = dit_tensors(config) | {n: np.ones(shape, np.float32) for n, shape in more.items()}
    save_file({prefix + name: tensor for name, tensor in tensors.items()}, path)
    with pytest.raises(UserError, match=rf"wan_14B\.safetensors is .*{kind}|{kind}"):
        convert_pipeline(path, tmp_path / "dst")
    report = " ".join(inspect(path).split())
    assert "does not map" in report and "wholly" not in report
    assert not (tmp_path / "dst").exists()


@pytest.mark.parametrize("layout", ["official", "diffusers"])
def test_a_relative_in_a_folder_with_its_config(layout, tmp_path):
    config = changed(36)
    data = to_diffusers("dit", config)
    save_file(random_tensors("dit", layout, config), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(data))
    with pytest.raises(UserError, match="an expert of Wan2.2's image-to-video pair"):
        open_checkpoint(tmp_path)


def test_experts_of_the_text_to_video_pair_are_known_by_their_names(tmp_path):
    for name in ("wan2.2_t2v_high_noise_14B_fp16", "Wan2_2-T2V-A14B-LOW", "t2v_low_noise"):
        save_file(dit_tensors(T2V), tmp_path / f"{name}.safetensors")
        with pytest.raises(UserError, match=rf"{name}.* by its name an expert of Wan2.2"):
            open_checkpoint(tmp_path / f"{name}.safetensors")
    for name, config in (
        ("wan2_2025_t2v", T2V),
        ("wan2.1_t2v_1.3B", T2V),
        ("Wan2_1-I2V-14B", ONE),
        ("noise_2025", T2V),
    ):
        save_file(dit_tensors(config), tmp_path / f"{name}.safetensors")
        assert list(open_checkpoint(tmp_path / f"{name}.safetensors").sources) == ["dit"]
    pair = tmp_path / "pair"
    for half in ("high_noise_model", "low_noise_model"):
        (pair / half).mkdir(parents=True)
        save_file(dit_tensors(T2V), pair / half / "diffusion_pytorch_model.safetensors")
        with pytest.raises(UserError, match="is Wan2.2 .it has a high_noise_model"):
            open_checkpoint(pair)


def test_a_base_in_8_bits_is_taken_with_a_warning(tmp_path):
    eight = {
        name: tensor.astype(ml_dtypes.float8_e4m3fn) if tensor.ndim == 2 else tensor
        for name, tensor in dit_tensors().items()
    }
    save_file(eight, tmp_path / "fp8.safetensors")
    with pytest.warns(UserWarning, match=r"fp8\.safetensors .* tensors in fp8"):
        convert_pipeline(tmp_path / "fp8.safetensors", tmp_path / "dst", np.dtype(np.float32))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_file(dit_tensors(), tmp_path / "fp32.safetensors")
        open_checkpoint(tmp_path / "fp32.safetensors")


@pytest.mark.parametrize("kind", ["i1", "u1", "i4", "?"])
def test_codes_are_no_weights(kind, tmp_path):
    tensors = dit_tensors()
    tensors["blocks.0.ffn.0.weight"] = tensors["blocks.0.ffn.0.weight"].astype(kind)
    save_file(tensors, tmp_path / "int8.safetensors")
    with pytest.raises(UserError, match="'blocks.0.ffn.0.weight' in .*codes of a quantised model"):
        open_checkpoint(tmp_path / "int8.safetensors")
