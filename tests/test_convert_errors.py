"""Bad input to `python -m convert`: one sentence, with name and remedy, and nothing left over."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from convert.__main__ import main
from tests.checkpoints import (
    DIT,
    OFFICIAL_FILES,
    diffusers_folder,
    hub_config,
    official_folder,
    random_tensors,
)
from tests.scripts import call
from wanjax import outputs
from wanjax.errors import UserError

SHARD = "diffusion_pytorch_model-00002-of-00003.safetensors"


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sources")
    return {
        "official": official_folder(folder / "official"),
        "diffusers": diffusers_folder(folder / "diffusers"),
    }


@pytest.fixture(scope="module")
def native(sources) -> Path:
    folder = sources["official"].parent / "native"
    main(["pipeline", str(sources["official"]), str(folder)])
    return folder


def refused(match: str, *arguments: object, out: Path) -> None:
    """The command is refused in one sentence, and neither `out` nor a part of it is there."""
    before = set(out.parent.iterdir())
    with pytest.raises(UserError, match=match) as caught:
        main([str(a) for a in arguments])
    message = str(caught.value)
    assert "\n" not in message and message.rstrip()[-1] in ".?" and len(message) < 500, message
    assert set(out.parent.iterdir()) == before


def cut(path: Path, part: float = 0.5) -> None:
    os.truncate(path, int(path.stat().st_size * part))


def edit(path: Path, change) -> None:
    """Change a safetensors file's tensors in place."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def edit_json(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


OFFICIAL = {
    "shard missing": (lambda d: (d / SHARD).unlink(), f"lacks the shard '{SHARD}'"),
    "shard cut": (lambda d: cut(d / SHARD), f"{SHARD} is truncated"),
    "shard cut in its header": (lambda d: cut(d / SHARD, 0.001), f"{SHARD} is truncated"),
    "VAE missing": (lambda d: (d / OFFICIAL_FILES["vae"]).unlink(), r"no vae \(Wan2.1_VAE.pth\)"),
    "VAE cut": (lambda d: cut(d / OFFICIAL_FILES["vae"]), r"Wan2.1_VAE.pth is truncated"),
    "T5 cut": (lambda d: cut(d / OFFICIAL_FILES["text_encoder"], 0.9), r"models_t5.*truncated"),
    "config is no JSON": (lambda d: (d / "config.json").write_text("{"), "config.json is not the"),
    "config of another size": (
        lambda d: edit_json(d / "config.json", ffn_dim=48),
        r"'blocks.0.ffn.2.weight' of shape \(256, 24\), where this model has \(256, 48\)",
    ),
    "config of VACE": (
        lambda d: edit_json(d / "config.json", vace_layers=[0, 5], model_type="vace"),
        "asks for model_type='vace'",
    ),
    "config of a class that extends ours": (
        lambda d: edit_json(d / "config.json", _class_name="VaceWanModel"),
        "config.json is of a VaceWanModel",
    ),
    "unknown setting": (
        lambda d: edit_json(d / "config.json", sliding_window=4),
        "asks for sliding_window=4",
    ),
    "config of a text-to-video model": (
        lambda d: edit_json(d / "config.json", model_type="t2v"),
        "by its tensors .* it is i2v",
    ),
    "a second diffusion model": (
        lambda d: save_file(random_tensors("dit", "official"), d / "other.safetensors"),
        "two files of the dit",
    ),
    "a web page for a shard": (
        lambda d: (d / SHARD).write_text("<!DOCTYPE html><html>" + "a" * 500),
        f"{SHARD} is not a safetensors file",
    ),
    "a git-lfs pointer": (
        lambda d: (d / SHARD).write_text(
            "version https://git-lfs.github.com/spec/v1\noid sha256:0"
        ),
        "git-lfs pointer.*git lfs pull",
    ),
}


@pytest.mark.parametrize(("spoil", "match"), OFFICIAL.values(), ids=OFFICIAL)
def test_spoiled_official_folders(spoil, match, sources, tmp_path):
    src = Path(shutil.copytree(sources["official"], tmp_path / "src"))
    spoil(src)
    refused(match, "pipeline", src, tmp_path / "dst", out=tmp_path / "dst")


DIFFUSERS = {
    "component missing": (lambda d: shutil.rmtree(d / "vae"), r"has no vae \(vae\).*--only"),
    "config missing": (lambda d: (d / "vae/config.json").unlink(), "vae lacks its config.json"),
    "residual VAE (Wan2.2)": (
        lambda d: edit_json(d / "vae/config.json", is_residual=True),
        "asks for is_residual=True",
    ),
    "patched VAE": (lambda d: edit_json(d / "vae/config.json", patch_size=2), "patch_size=2"),
    "another norm": (
        lambda d: edit_json(d / "transformer/config.json", qk_norm="rms_norm"),
        "asks for qk_norm='rms_norm'",
    ),
    "no cross-attention norm": (
        lambda d: edit_json(d / "transformer/config.json", cross_attn_norm=False),
        "asks for cross_attn_norm=False",
    ),
    "another class": (
        lambda d: edit_json(d / "transformer/config.json", _class_name="WanVACETransformer3DModel"),
        "is of a WanVACETransformer3DModel",
    ),
    "two experts": (
        lambda d: edit_json(d / "model_index.json", transformer_2=["diffusers", "W"]),
        "is Wan2.2",
    ),
    "CLIP of OpenAI": (
        lambda d: edit_json(d / "image_encoder/config.json", hidden_act="quick_gelu"),
        "asks for hidden_act='quick_gelu'",
    ),
    "T5 that is no umT5": (
        lambda d: edit_json(d / "text_encoder/config.json", model_type="t5"),
        "config.json is of a t5",
    ),
    "VAE where the encoder belongs": (
        lambda d: shutil.copy(
            d / "vae/diffusion_pytorch_model.safetensors", d / "text_encoder/model.safetensors"
        ),
        "holds a vae where the text_encoder belongs",
    ),
    "no weights": (
        lambda d: (d / "image_encoder/model.safetensors").unlink(),
        "image_encoder has no weights",
    ),
    "two names of one tensor that differ": (
        lambda d: edit(
            d / "text_encoder/model.safetensors",
            lambda t: t.update({"encoder.embed_tokens.weight": 0 * t["shared.weight"]}),
        ),
        "'shared.weight' and 'encoder.embed_tokens.weight'.*different values",
    ),
}


@pytest.mark.parametrize(("spoil", "match"), DIFFUSERS.values(), ids=DIFFUSERS)
def test_spoiled_diffusers_folders(spoil, match, sources, tmp_path):
    src = Path(shutil.copytree(sources["diffusers"], tmp_path / "src"))
    spoil(src)
    refused(match, "pipeline", src, tmp_path / "dst", out=tmp_path / "dst")


TENSORS = {
    "missing": (lambda t: t.pop("blocks.3.ffn.2.bias"), "lacks the tensor 'blocks.3.ffn.2.bias'"),
    "one that inference needs": (
        lambda t: t.pop("img_emb.proj.0.weight"),
        "lacks the tensor 'img_emb.proj.0.weight'",
    ),
    "stray": (
        lambda t: t.update({"blocks.0.ffn.3.weight": t["blocks.0.ffn.2.weight"].copy()}),
        "'blocks.0.ffn.3.weight'.*did you mean 'blocks.",
    ),
    "misshapen": (
        lambda t: t.update({"blocks.2.ffn.0.weight": np.zeros((24, 255), np.float32)}),
        r"'blocks.2.ffn.0.weight' of shape \(24, 255\).*\(24, 256\)",
    ),
    "transposed": (
        lambda t: t.update({"blocks.2.ffn.0.weight": np.zeros((256, 24), np.float32)}),
        r"'blocks.2.ffn.0.weight' of shape \(256, 24\).*\(24, 256\)",
    ),
    "axis lost": (
        lambda t: t.update({"blocks.2.modulation": np.zeros((6, 256), np.float32)}),
        r"'blocks.2.modulation' of shape \(6, 256\).*\(1, 6, 256\)",
    ),
    "fp8_scaled": (
        lambda t: t.update({"blocks.0.ffn.0.scale_weight": np.ones((), np.float32)}),
        "fp8_scaled.*use the bf16, fp16 or fp32 file",
    ),
    "scaled marker": (
        lambda t: t.update({"scaled_fp8": np.ones((2,), np.float32)}),
        "fp8_scaled file",
    ),
}


@pytest.mark.parametrize(("spoil", "match"), TENSORS.values(), ids=TENSORS)
def test_spoiled_tensors(spoil, match, tmp_path):
    tensors = random_tensors("dit", "official")
    spoil(tensors)
    save_file(tensors, tmp_path / "wan.safetensors")
    args = ("pipeline", tmp_path / "wan.safetensors", tmp_path / "dst")
    refused(rf"wan\.safetensors.*{match}", *args, out=tmp_path / "dst")


def test_wrong_sources(sources, native, tmp_path):
    dst = tmp_path / "dst"
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    save_file({"a": np.ones(2)}, tmp_path / "other.safetensors")
    (tmp_path / "empty").mkdir()
    for src, match in {
        "nothing": "no file or folder .*nothing",
        "picture.png": "neither a safetensors nor a .pth",
        "other.safetensors": "not a network of Wan2.1",
        "empty": "holds no network",
        native: "native wanjax checkpoint already",
    }.items():
        refused(match, "pipeline", tmp_path / src, dst, out=dst)
    refused("no dit", "pipeline", tmp_path / "empty", dst, "--only", "dit", out=dst)
    official = sources["official"]
    refused("exists already", "pipeline", official, tmp_path / "empty", out=dst)
    refused("not a native wanjax", "export", official, dst, "--format", "official", out=dst)
    refused("exists already", "export", native, tmp_path, "--format", "official", out=dst)
    refused("one network a file", "export", native, dst, "--format", "comfyui", out=dst)
    arguments = ("export", native, dst, "--format", "official", "--from")
    refused("no file '.*nothing'", *arguments, tmp_path / "nothing", out=dst)
    refused("holds no image_encoder in official names", *arguments, sources["diffusers"], out=dst)
    refused("no file or folder", "inspect", tmp_path / "nothing", out=dst)


def test_a_width_that_heads_of_128_do_not_divide_needs_a_config(tmp_path):
    tensors = random_tensors("dit", "official", replace(DIT, dim=60, num_heads=3))
    save_file(tensors, tmp_path / "wan.safetensors")
    args = ("pipeline", tmp_path / "wan.safetensors", tmp_path / "dst")
    refused("60 does not divide into heads of 128.*config.json", *args, out=tmp_path / "dst")
    config = hub_config() | {"dim": 60, "num_heads": 3}
    (tmp_path / "config.json").write_text(json.dumps(config))
    main([str(a) for a in args])


EXPORT = ("export", "a", "b", "--format", "official")


def test_usage_errors_name_the_nearest(tmp_path):
    out = tmp_path / "out"
    for match, *arguments in (
        ("'exprot' is no command; did you mean 'export'", "exprot"),
        ("'vea' is no network; did you mean 'vae'", "pipeline", "a", "b", "--only", "dit,vea"),
        ("did you mean 'bfloat16'", "pipeline", "a", "b", "--dtype", "bfloat"),
        ("'comfy' is no --format; did you mean 'comfyui'", *EXPORT[:-1], "comfy"),
        ("required: --format", "export", "a", "b"),
        ("'--frmo' is no argument of export.*'--from'", *EXPORT, "--frmo", "x"),
    ):
        refused(match, *arguments, out=out)


RUN = "from wanjax.errors import run_script; from convert.__main__ import main; run_script(main)"
WAIT = "import time, convert.native as n; n.write_manifest = lambda *a: time.sleep(99);"


def command(
    *arguments: object, program: str = RUN, largest_file: int | str = "unlimited"
) -> subprocess.Popen:
    """`python -m convert ARGUMENTS`; no file grows larger than `largest_file` kilobytes."""
    limit = ("bash", "-c", 'ulimit -f "$0"; exec "$@"', str(largest_file))
    return subprocess.Popen(
        [*limit, sys.executable, "-c", program, *map(str, arguments)],
        cwd=Path(__file__).parents[1],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_a_full_disk_leaves_nothing_and_exits_with_2(sources, native, tmp_path):
    """A limit on file sizes fails in the middle of writing, just as a full disk does."""

    for arguments in (
        ("pipeline", sources["official"], tmp_path / "dst"),
        ("export", native, tmp_path / "out", "--format", "official"),
        ("export", native, tmp_path / "out.safetensors", "--format", "comfyui"),
    ):
        process = command(*arguments, largest_file=1000)
        _, errors = process.communicate(timeout=60)
        line = errors.strip().splitlines()[-1]
        assert process.returncode == 2 and line.startswith(f"error: {arguments[2]} could not be")
        assert "Traceback" not in errors and list(tmp_path.iterdir()) == []


def test_no_room_is_seen_before_anything_is_written(sources, tmp_path, monkeypatch):
    class Usage:
        total, free = 1 << 40, 1_000_000

    monkeypatch.setattr(outputs.shutil, "disk_usage", lambda _: Usage)
    args = ("pipeline", sources["official"], tmp_path / "dst")
    refused("needs .* and its disk has .* free; make room", *args, out=tmp_path / "dst")


def test_what_may_not_be_looked_into_is_one_line_and_code_2(tmp_path, monkeypatch):
    def closed(self, *_, **__):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr("pathlib.Path.glob", closed)
    (tmp_path / "src").mkdir()
    said = call("-m", "convert", "pipeline", "src", "dst", cwd=tmp_path, code=2)
    assert said == "error: src may not be used; change its permissions.\n"


def is_written(folder: Path) -> bool:
    """The weights are, and the process now waits before it would finish."""
    files = list(folder.glob("dst.partial-*/dit.safetensors"))
    return bool(files) and files[0].stat().st_blocks * 512 > 30_000_000


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_stopped_run_leaves_nothing(number, sources, tmp_path):
    """A killed one leaves its partial folder, which the next run to the same place removes."""
    arguments = ("pipeline", sources["official"], tmp_path / "dst", "--only", "dit")
    process = command(*arguments, program=WAIT + RUN)
    deadline = time.monotonic() + 60
    while not is_written(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert process.poll() is None
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert "Traceback" not in errors
    if number == signal.SIGKILL:
        assert len(list(tmp_path.iterdir())) == 1
        main([str(a) for a in arguments])
        assert [p.name for p in tmp_path.iterdir()] == ["dst"]
    else:
        assert process.returncode == {signal.SIGTERM: 143, signal.SIGINT: 130}[number]
        assert list(tmp_path.iterdir()) == []


def test_a_config_edited_after_an_export_is_not_overruled(native, tmp_path):
    """What our export notes about itself must agree with the `config.json` beside it."""
    out, again = tmp_path / "out", tmp_path / "again"
    main(["export", str(native), str(out), "--format", "diffusers"])
    path = out / "transformer/config.json"
    config = json.loads(path.read_text())
    config["num_layers"] += 1
    path.write_text(json.dumps(config))
    refused(
        "config.json and wanjax.json do not agree about num_l", "pipeline", out, again, out=again
    )
    (out / "wanjax.json").unlink()
    refused("lacks the tensor", "pipeline", out, again, out=again)
