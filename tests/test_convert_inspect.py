"""`python -m convert inspect`: it names what a file is, and never fails with a traceback."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from convert.__main__ import main
from convert.inspect import inspect
from convert.native import convert_pipeline
from tests.checkpoints import DIT, OFFICIAL_FILES, official_folder, random_tensors
from wanjax.checkpoint import save_lora
from wanjax.errors import UserError
from wanjax.lora import LayerAdapter, LoRA


@pytest.fixture(scope="module")
def official(tmp_path_factory) -> Path:
    return official_folder(tmp_path_factory.mktemp("official") / "src")


def said(path: Path) -> str:
    """The report without its frame and line breaks."""
    return " ".join(inspect(path).replace("│", " ").split())


def test_an_official_folder(official):
    text = said(official)
    assert "an official checkpoint folder" in text
    assert "375 of 8,008,468 parameters, 32.0 MB" in text and "float32 (375)" in text
    assert "model i2v" in text and "num_layers=11" in text and "num_heads=2" in text
    assert "would drop textual.norm.weight, textual.pos.weight, log_scale" in text
    assert text.count("maps wholly, to the native layout") == 4


def test_a_native_folder(official, tmp_path):
    convert_pipeline(official, tmp_path / "native", only=("text_encoder", "vae"))
    text = said(tmp_path / "native")
    assert "native wanjax checkpoint" in text and "194 of 924,491 parameters" in text
    assert "bfloat16 (12)" in text and "tokenizer there" in text


def test_what_would_not_map_is_listed(tmp_path):
    tensors = random_tensors("dit", "official")
    for name in ("blocks.0.norm3.bias", "head.modulation"):
        del tensors[name]
    tensors["blocks.0.surprise"] = np.ones(2, np.float32)
    save_file(tensors, tmp_path / "x.safetensors")
    text = said(tmp_path / "x.safetensors")
    assert "missing blocks.0.norm3.bias, head.modulation" in text
    assert "stray blocks.0.surprise" in text and "wholly" not in text
    save_file({**random_tensors("dit", "official"), "scaled_fp8": np.ones(2)}, tmp_path / "y.sft")
    assert "does not map" in said(tmp_path / "y.sft") and "fp8_scaled" in said(tmp_path / "y.sft")


def test_a_broken_file_spoils_only_its_own_block(official, tmp_path):
    src = Path(shutil.copytree(official, tmp_path / "src"))
    os.truncate(src / OFFICIAL_FILES["vae"], 5000)
    text = said(src)
    assert "cannot be read" in text and "truncated" in text and text.count("wholly") == 3


def adapter(down: str, up: str, extra: dict | None = None) -> dict[str, np.ndarray]:
    blocks = range(DIT.num_layers)
    tensors = {down.format(i): np.ones((4, DIT.dim), np.float32) for i in blocks}
    tensors |= {up.format(i): np.ones((DIT.dim, 4), np.float32) for i in blocks}
    return tensors | (extra or {})


PEFT = "diffusion_model.blocks.{}.cross_attn.k_img.lora_"
KOHYA = "diffusion_model.blocks.{}.self_attn.q.lora_"
DIFFUSERS = "transformer.blocks.{}.attn1.to_q.lora_"
MUSUBI = "lora_unet_blocks_{}_self_attn_q.lora_"
FUN = "lora_unet__blocks_{}_cross_attn_k.lora_"
BARE = "blocks.{}.self_attn.q.lora_"
ALPHA = {"lora_unet_blocks_0_self_attn_q.alpha": np.full((), 8, np.float32)}
FAMILIES = {
    "ComfyUI, original names (lora_A)": adapter(PEFT + "A.weight", PEFT + "B.weight"),
    "ComfyUI, original names (lora_down)": adapter(KOHYA + "down.weight", KOHYA + "up.weight"),
    "diffusers and PEFT": adapter(DIFFUSERS + "A.weight", DIFFUSERS + "B.weight"),
    "kohya and musubi": adapter(MUSUBI + "down.weight", MUSUBI + "up.weight", ALPHA),
    "VideoX-Fun": adapter(FUN + "down.weight", FUN + "up.weight"),
    "DiffSynth": adapter(BARE + "A.default.weight", BARE + "B.default.weight"),
}


@pytest.mark.parametrize(("family", "tensors"), FAMILIES.items(), ids=FAMILIES)
def test_families_of_adapters(family, tensors, tmp_path):
    save_file(tensors, tmp_path / "lora.safetensors", {"ss_network_dim": "4"})
    text = said(tmp_path / "lora.safetensors")
    assert f"LoRA adapter: {family}" in text
    assert "modules 11" in text and "rank 4 (in 11)" in text and "ss_network_dim" in text
    assert ("alpha 8.0 (in 1)" if "kohya" in family else "alpha none: as the rank") in text
    assert "N" in text.split("roles")[1]


def test_other_adapters_are_named(tmp_path):
    key = "diffusion_model.blocks.0.self_attn.q.lokr_w1"
    save_file({key: np.ones((2, 2), np.float32)}, tmp_path / "lokr.safetensors")
    assert "LoKr adapters are not supported" in said(tmp_path / "lokr.safetensors")


def test_adapters_of_a_run_that_diverged_are_named(tmp_path):
    bad = np.full((3, 2, 8), np.nan, np.float32)
    save_lora(
        tmp_path / "a.safetensors",
        LoRA({"cross_attn.q": LayerAdapter(np.ones((3, 8, 2), np.float32), bad, 4.0)}),
    )
    assert "does not load NaN or infinity in blocks.cross_attn.q.up" in said(
        tmp_path / "a.safetensors"
    )
    key = "diffusion_model.blocks.0.ffn.0.lora_A.weight"
    save_file({key: bad[0]}, tmp_path / "b.safetensors")
    assert f"does not load NaN or infinity in {key}" in said(tmp_path / "b.safetensors")


def test_native_adapters_and_runs(tmp_path):
    layer = LayerAdapter(np.ones((3, 8, 2), np.float32), np.ones((3, 2, 8), np.float32), 4.0)
    save_lora(tmp_path / "a.safetensors", LoRA({"cross_attn.q": layer}))
    text = said(tmp_path / "a.safetensors")
    assert "native adapter" in text and "rank 2" in text and "cross_attn.q" in text
    (tmp_path / "run/checkpoints/20").mkdir(parents=True)
    (tmp_path / "run/run.json").write_text('{"format": "wanjax-run", "rank": 8}')
    text = said(tmp_path / "run")
    assert "a run of train.py" in text and "rank=8" in text and "checkpoints 20" in text


def test_unknown_things(tmp_path, capsys):
    save_file({"some.tensor": np.ones(3)}, tmp_path / "x.safetensors")
    main(["inspect", str(tmp_path / "x.safetensors")])
    assert "unknown: no network of Wan2.1" in capsys.readouterr().out
    (tmp_path / "x.mp4").write_bytes(b"\0" * 100)
    (tmp_path / "x.pth").write_bytes(b"\0" * 100)
    (tmp_path / "empty").mkdir()
    for name in ("x.mp4", "x.pth", "empty", "none"):
        with pytest.raises(UserError, match=name):
            inspect(tmp_path / name)
