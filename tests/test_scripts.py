"""encode.py, train.py, sample.py and `python -m convert lora`, one after another.

A script that is called in this process does what it does as a process of its own: for each of the
four there is a result here (for train.py in test_scripts_resume.py) that was made both ways.
"""

import json
import re
import shutil
import signal
from pathlib import Path

import av
import numpy as np
import pytest

import encode
from convert.lora import convert_lora
from tests.scripts import READS_PROGRAMS, SIZE, call, compiled_quickly, run, start, stop_when
from wanjax.data.features import Features
from wanjax.data.probing import probe
from wanjax.data.video import read_video
from wanjax.latents import latents_path
from wanjax.loop import TFLOPS
from wanjax.pipeline import Pipeline

pytestmark = pytest.mark.compiles

PROMPT = "a street in the rain"


def encode_words(world: Path, out: Path) -> tuple:
    paths = ("--data", world / "clips", "--checkpoint", world / "ck", "--out", out)
    return ("encode.py", "nano", *paths, *SIZE, "--stride", 4)


def test_features_are_what_the_models_take(features):
    cache = Features.open(features)
    assert len(cache) == 10 and cache.splits == {"train": 10}
    example = cache.example("c1@8")
    assert example["latents"].shape == (3, 4, 6, 16) and example["condition"].shape == (3, 4, 6, 20)
    assert example["text"].shape == (512, 24) and example["image"].shape == (5, 32)
    assert example["caption"] == "a street in the rain 1"
    assert np.array_equal(example["condition"][..., :4][0], np.ones((4, 6, 4)))


def assert_same_cache(one: Features, other: Features) -> None:
    """Bit for bit, example by example (a record's bytes are not unique: protobuf orders maps)."""
    assert (one.names, one.spec, one.fingerprint) == (other.names, other.spec, other.fingerprint)
    for name in one.names:
        for key, value in one.example(name).items():
            np.testing.assert_array_equal(value, other.example(name)[key])


def test_an_encode_that_was_killed_and_interrupted_goes_on(world, features, tmp_path):
    out, staging = tmp_path / "f", tmp_path / "f.staging"
    staged = lambda n: lambda: len(list(staging.glob("window-*.safetensors"))) >= n  # noqa: E731
    words = encode_words(world, out)
    process = start(*words, cwd=tmp_path, environment=READS_PROGRAMS)
    stop_when(staged(1), process, signal.SIGKILL, -signal.SIGKILL)
    assert not out.exists() and staging.exists()
    before = len(list(staging.glob("window-*.safetensors")))
    said = stop_when(staged(before + 2), start(*words, cwd=tmp_path), signal.SIGINT, 130)
    assert said.endswith("interrupted\n") and f"{10 - before} to encode" in said
    assert [p.name for p in tmp_path.iterdir()] == ["f.staging"]
    assert not [p.name for p in staging.iterdir() if "partial" in p.name]
    call(*words, cwd=tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["f"]
    assert_same_cache(Features.open(out), Features.open(features))


def test_only_what_is_new_is_encoded(world, features, tmp_path, monkeypatch):
    """A caption mended takes umT5 alone, a clip that has gone nothing, another film its windows."""
    out = tmp_path / "f"
    shutil.copytree(features, out)
    shutil.copytree(world / "clips", tmp_path / "clips")
    words = list(encode_words(world, out))
    words[words.index(world / "clips")] = tmp_path / "clips"
    (tmp_path / "clips/c0.txt").write_text("a street in the rain 1")  # a caption that is known
    loaded = []
    network = Pipeline._network
    monkeypatch.setattr(
        Pipeline, "_network", lambda self, name: loaded.append(name) or network(self, name)
    )
    said = call(*words, cwd=tmp_path)
    assert "0 to encode" in said and "5 with another caption: c0@0, c0@4, c0@8 and 2 others" in said
    assert loaded == [] and Features.open(out).example("c0@0")["caption"].endswith("rain 1")
    kept = Features.open(out).example("c1@4")
    film = (tmp_path / "clips/c0.mp4").read_bytes()
    (tmp_path / "clips/c0.mp4").write_bytes((world / "clips/c1.mp4").read_bytes())
    (tmp_path / "clips/c2.mp4").write_bytes(film)
    (tmp_path / "clips/c2.txt").write_text("a new one")
    said = call(*words, cwd=tmp_path)
    assert "10 to encode" in said and "5 new: c2@0" in said and "5 of another film: c0@0" in said
    cache, before = Features.open(out), Features.open(features)
    for key in ("latents", "condition", "image"):
        np.testing.assert_array_equal(cache.example("c1@4")[key], kept[key])
        np.testing.assert_array_equal(cache.example("c0@4")[key], kept[key])
        np.testing.assert_array_equal(cache.example("c2@4")[key], before.example("c0@4")[key])
    for name in ("c0.mp4", "c2.mp4"):
        (tmp_path / "clips" / name).unlink()
    said = call(*words, cwd=tmp_path)
    assert "0 to encode" in said and "10 gone: c0@0" in said and len(Features.open(out)) == 5


def test_windows_that_cannot_be_decoded_are_left_out(world, features, tmp_path, monkeypatch):
    """An encode does not end in the middle for them, and says which they are."""
    read = encode.read_windows
    monkeypatch.setattr(
        encode,
        "read_windows",
        lambda *given: ((w, None if w.name == "c1@8" else f) for w, f in read(*given)),
    )
    shutil.copytree(features, tmp_path / "f")
    shutil.copytree(world / "clips", tmp_path / "clips")
    (tmp_path / "clips/c1.mp4").write_bytes((tmp_path / "clips/c0.mp4").read_bytes())
    words = list(encode_words(world, tmp_path / "f"))
    words[words.index(world / "clips")] = tmp_path / "clips"
    said = call(*words, cwd=tmp_path)
    assert (
        "5 to encode" in said and "warning: Left out, since they cannot be decoded: c1@8;" in said
    )
    assert len(Features.open(tmp_path / "f")) == 9
    monkeypatch.setattr(encode, "read_windows", read)
    assert "1 to encode" in call(*words, cwd=tmp_path)
    assert len(Features.open(tmp_path / "f")) == 10


def test_an_encode_that_is_done_does_nothing(world, features, monkeypatch):
    before = {p: p.stat().st_mtime_ns for p in features.rglob("*")}
    monkeypatch.setattr(Pipeline, "_network", lambda self, name: pytest.fail(f"loaded {name}"))
    call(*encode_words(world, features), cwd=world)
    assert {p: p.stat().st_mtime_ns for p in features.rglob("*")} == before


def test_a_run_leaves_metrics_and_checkpoints(trained):
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    names = {"step", "loss", "gradient_norm", "seconds", "tokens_per_second"} | {TFLOPS}
    assert all(set(line) == names and np.isfinite(line["loss"]) for line in lines)
    assert [p.name for p in (trained / "checkpoints").iterdir()] == ["4"]
    events = list((trained / "tensorboard").iterdir())
    assert len(events) == 1 and events[0].read_bytes().count(b"tokens_per_second") == 4


def test_jobs_are_resumed_and_the_denoiser_is_compiled_once(world, trained, tmp_path):
    """Three videos in two processes: the first is stopped in the middle of the second video. And
    the first once more, in this process."""

    def jobs(*second: dict) -> Path:
        lines = [{"out": f"{tmp_path}/a.mp4", "seed": 1}, *second]
        (tmp_path / "jobs.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
        return tmp_path / "jobs.jsonl"

    words = ("sample.py", "nano", "--checkpoint", "ck", "--image", "picture.png", "--steps", 2)
    words += ("--prompt", PROMPT, "--lora", "run", "--guidance", 5, *SIZE, "--jobs")
    first, second, third = (tmp_path / f"{name}.mp4" for name in "abc")

    endless = jobs({"out": str(second), "steps": 100_000})
    process = start(*words, endless, cwd=world)
    done = lambda: first.exists() and not latents_path(first).exists()  # noqa: E731
    said = stop_when(done, process, signal.SIGINT, 130)
    assert said.endswith("interrupted\n")
    assert {p.name for p in tmp_path.iterdir()} == {"a.mp4", "jobs.jsonl"}
    written, content = first.stat().st_mtime_ns, first.read_bytes()

    rest = jobs(
        {"out": str(second), "seed": 1},
        {"out": str(third), "seed": 2, "prompt": "rain " * 600, "guidance": 3, "steps": 3},
    )
    said = run(*words, rest, cwd=world, environment={"JAX_LOG_COMPILES": "1"})
    assert "1 of 3 videos exist already" in said
    assert (first.stat().st_mtime_ns, first.read_bytes()) == (written, content)
    assert said.count("Finished XLA compilation of jit(denoise_step)") == 1
    (warning,) = [line for line in said.splitlines() if line.startswith("warning:")]
    assert "512 fit" in warning
    # The same seed in another process gives the same file; another seed another one.
    assert second.read_bytes() == content and third.read_bytes() != content
    once_more = tmp_path / "d.mp4"
    call(*words[:-1], "--out", once_more, "--seed", 1, cwd=world)
    assert once_more.read_bytes() == content

    for video in (first, second, third):
        info = probe(video)
        assert (info.width, info.height, info.fps, info.frames) == (48, 32, 16, 9)
        with av.open(str(video)) as container:
            stream = container.streams.video[0]
            assert (stream.codec_context.name, stream.pix_fmt) == ("h264", "yuv420p")
    assert np.std(read_video(first)[0]) > 1


def test_jobs_have_adapters_and_seeds_of_their_own(world, trained, tmp_path):
    lines = [
        {"out": f"{tmp_path}/plain.mp4", "lora": []},
        {"out": f"{tmp_path}/run.mp4"},
        {"out": f"{tmp_path}/weak.mp4", "lora": "run@4:0.5", "seed": -1},
    ]
    jobs = tmp_path / "jobs.jsonl"
    jobs.write_text("\n".join(map(json.dumps, lines)))
    words = ("sample.py", "nano", "--checkpoint", "ck", "--image", "picture.png", "--steps", 1)
    words += ("--prompt", PROMPT, "--lora", "run", *SIZE, "--jobs", jobs)
    said = call(*words, cwd=world)
    drawn = re.search(r"weak.mp4: --seed (\d+), drawn", said)[1]
    made = {}
    for name in ("plain", "run", "weak"):
        with av.open(str(tmp_path / f"{name}.mp4")) as container:
            made[name] = json.loads(container.metadata["comment"])
    assert [m["lora"] for m in made.values()] == [[], ["run"], ["run@4:0.5"]]
    assert made["weak"]["seed"] == int(drawn) and made["run"]["seed"] == 0
    assert made["run"]["image"] == "picture.png" and made["run"]["prompt"] == PROMPT
    frames = [read_video(tmp_path / f"{name}.mp4")[0] for name in made]
    assert (frames[0] != frames[1]).any() and (frames[1] != frames[2]).any()


def test_an_adapter_is_the_same_as_run_native_and_comfyui_file(world, trained, tmp_path):
    from sample import read_adapter

    comfyui, native = tmp_path / "c.safetensors", tmp_path / "n.safetensors"
    words = ("-m", "convert", "lora", trained, "--format", "comfyui")
    run(*words, comfyui, cwd=tmp_path)
    called = tmp_path / "called" / comfyui.name  # the name is in the file, as its title
    call(*words, called, cwd=tmp_path)
    assert called.read_bytes() == comfyui.read_bytes()
    convert_lora(comfyui, native, "native")
    with compiled_quickly():
        plain = Pipeline(world / "ck", dtype="float32")
        given = plain.condition(
            image=world / "picture.png", prompt=PROMPT, frames=9, height=32, width=48
        )

        def video(*adapters: str) -> np.ndarray:
            loras = [read_adapter(text) for text in adapters]
            pipeline = Pipeline(world / "ck", dtype="float32", loras=loras)
            return pipeline.generate(given, steps=2, seed=3)

        without = video()
        full, half = video(f"{trained}"), video(f"{trained}:0.5")
        distance = lambda a, b: float(np.abs(a - b).max())  # noqa: E731
        effect = distance(full, without)
        assert effect > 1e-3 and distance(full, half) > 1e-4
        for same in (f"{comfyui}", f"{native}", f"{native}:1.0"):
            assert distance(video(same), full) <= 1e-5
        assert distance(video(f"{comfyui}:0.5"), half) <= 1e-5
        assert distance(video(f"{trained}:0"), without) <= 1e-5
        # Two products and their sum round otherwise than one product, and a random VAE amplifies
        # it: a thousandth of what the adapter does is allowed, seen were 1e-4 to 3e-4 of it.
        assert distance(video(f"{native}:0.25", f"{comfyui}:0.25"), half) <= 1e-3 * effect


def test_adapters_on_a_quantised_base(world, features, tmp_path):
    """A run knows its base; its adapter is a file like any other, and merges into the model as it
    was converted; a video may be made on any base."""
    train = ("train.py", "nano", "--features", features, "--checkpoint", "ck", "--warmup", 0)
    train += ("--run", tmp_path / "run", "--rank", 2)
    call(*train, "--steps", 2, "--base", "int8", cwd=world)
    said = call(*train, "--steps", 4, "--base", "nf4", cwd=world, code=2)
    assert "was started with base='int8' and this command has 'nf4'" in said
    full = [word for word in train if word not in ("--rank", 2)]
    said = call(*full, "--train", "full", "--base", "nf4", cwd=world, code=2)
    assert "--base says nothing with --train full" in said
    convert_lora(tmp_path / "run", tmp_path / "c.safetensors", "comfyui")
    sample = ("sample.py", "nano", "--checkpoint", "ck", "--image", "picture.png", "--steps", 1)
    sample += ("--prompt", PROMPT, "--lora", tmp_path / "c.safetensors", *SIZE)
    made = {}
    for base in ("bfloat16", "int8"):
        out = tmp_path / f"{base}.mp4"
        call(*sample, "--base", base, "--out", out, cwd=world)
        made[base] = read_video(out)[0].astype(float)
        with av.open(str(out)) as container:
            assert json.loads(container.metadata["comment"])["base"] == base
    assert 0 < np.abs(made["int8"] - made["bfloat16"]).mean() < 8


def test_fast_is_four_steps_of_lcm_without_guidance(world, tmp_path):
    """And what it says again may be said; without it another video comes out."""
    given = ("nano", "--checkpoint", world / "ck", "--image", world / "picture.png", *SIZE)
    given += ("--dtype", "float32", "--seed", 5)
    spelt = ("--solver", "lcm", "--steps", 4, "--shift", 5, "--guidance", 1)
    for name, words in (
        ("fast", ("--fast",)),
        ("spelt", spelt),
        ("both", ("--fast", *spelt)),
        ("euler", ("--solver", "euler", *spelt[2:])),
    ):
        call("sample.py", *given, *words, "--out", f"{name}.mp4", cwd=tmp_path)
    frames = {
        name: [
            f.to_ndarray(format="rgb24") for f in av.open(str(tmp_path / f"{name}.mp4")).decode()
        ]
        for name in ("fast", "spelt", "both", "euler")
    }
    np.testing.assert_array_equal(frames["fast"], frames["spelt"])
    np.testing.assert_array_equal(frames["fast"], frames["both"])
    assert np.any(np.asarray(frames["fast"]) != frames["euler"])
