"""What the scripts refuse: one sentence that names the matter and the remedy, and nothing written.

Called in this process; as processes of their own to show that those say the same, and where writing
a checkpoint fails, after which Orbax's threads go on failing for a while.
"""

import contextlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import encode
import sample
import train
from tests.scripts import SIZE, call, ended, film, last_said, listing, run, start, write_checkpoint
from wanjax.checkpoint import latest_step
from wanjax.data.video import write_video
from wanjax.errors import UserError
from wanjax.lora import LayerAdapter, LoRA

pytestmark = pytest.mark.compiles

CK = ("--checkpoint", "ck")
TINY = ("--batch", 2, "--rank", 2, "--warmup", 3)  # as in the conftest: the same program
PICTURE = ("--image", "picture.png", "--prompt", "rain")


@pytest.fixture
def bench(world, features, trained, tmp_path, monkeypatch) -> Path:
    """A working folder of its own with all that is good, to which bad things may be added."""
    for name in ("ck", "clips", "features", "run"):
        (tmp_path / name).symlink_to(world / name)
    shutil.copyfile(world / "picture.png", tmp_path / "picture.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(script, *words: object, monkeypatch) -> str:
    """The sentence with which a script refuses; nothing in the working folder changes. What is
    given later of an option takes the place of what was."""
    monkeypatch.setattr("sys.argv", last_said((script.__name__, *words)))
    before = listing(Path())
    with pytest.raises(UserError) as error:
        script.main()
    assert listing(Path()) == before
    sentence = str(error.value)
    assert "\n" not in sentence and sentence[-1] in ".?'" or "python -m" in sentence, sentence
    return sentence


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def checkpoint_missing(folder: Path) -> None:
    pass


def checkpoint_empty(folder: Path) -> None:
    folder.mkdir()


def checkpoint_of_diffusers(folder: Path) -> None:
    (folder / "transformer").mkdir(parents=True)
    (folder / "model_index.json").write_text('{"_class_name": "WanImageToVideoPipeline"}')


def checkpoint_truncated(folder: Path) -> None:
    shutil.copytree("ck", folder)
    cut(folder / "vae.safetensors")


def checkpoint_lacks_a_file(folder: Path) -> None:
    shutil.copytree("ck", folder)
    (folder / "dit.safetensors").unlink()


def checkpoint_is_a_file(folder: Path) -> None:
    folder.write_text("weights")


CHECKPOINTS = {
    checkpoint_missing: "no checkpoint folder 'bad'.*convert pipeline",
    checkpoint_empty: "bad is not a native wanjax checkpoint.*convert pipeline bad",
    checkpoint_of_diffusers: "bad is not a native wanjax checkpoint.*convert pipeline bad",
    checkpoint_truncated: "vae.safetensors is truncated.*again",
    checkpoint_lacks_a_file: "dit.safetensors cannot be read.*check",
    checkpoint_is_a_file: "no checkpoint folder 'bad'",
}


@pytest.mark.parametrize(("spoil", "match"), CHECKPOINTS.items(), ids=lambda x: x)
def test_spoiled_checkpoints(spoil, match, bench, monkeypatch):
    spoil(bench / "bad")
    bad = ("nano", "--checkpoint", "bad")
    for script, words in (
        (encode, ("--data", "clips", "--out", "f", *SIZE)),
        (train, ("--features", "features", "--run", "r")),
        (sample, (*PICTURE, "--out", "o.mp4", *SIZE)),
    ):
        message = refused(script, *bad, *words, monkeypatch=monkeypatch)
        assert re.search(match, message), message


ENCODE = {
    "clip too short": (("--frames", 49), "has 25 frames at 16 fps and a window needs 49; .*25"),
    "all too short": (("--frames", 49, "--skip-short", True), "No shot in clips is as long as one"),
    "frames": (("--frames", 10), "frames=10 is not 4n"),
    "height": (("--height", 40), "height=40 is not divisible by 16; use"),
    "width": (("--width", 50), "width=50 is not divisible by 16; use 48"),
    "width alone": (("--width", 48, "--height", "None"), "Give both --height and --width"),
    "stride": (("--stride", 0), "stride=0"),
    "rate": (("--fps", "nan"), "fps=nan must be above zero"),
    "endless rate": (("--fps", "1e400"), "fps=inf must be above zero"),
    "area": (("--height", "None", "--width", "None", "--area", -4), "area=-4"),
    "data missing": (("--data", "clisp"), "no folder clisp"),
    "out exists": (("--out", "clips"), "clips exists and is no features cache; choose"),
    "out of others": (
        ("--out", "features", "--stride", 8),
        "features was encoded with .*; restore that, or",
    ),
    "out below a file": (("--out", "picture.png/f"), "picture.png is a file; choose another"),
    "dtype": (("--dtype", "bf16"), "'bf16' is no --dtype; did you mean 'bfloat16'"),
    "option": (("--chekpoint", "ck"), "no option '--chekpoint'; did you mean '--checkpoint'"),
}


@pytest.mark.parametrize(("words", "match"), ENCODE.values(), ids=ENCODE)
def test_encode_refuses(words, match, bench, monkeypatch):
    good = ("nano", *CK, "--data", "clips", "--out", "f", *SIZE)
    message = refused(encode, *good, *words, monkeypatch=monkeypatch)
    assert re.search(match, message), message


def test_encode_refuses_films_and_checkpoints(bench, monkeypatch):
    def refusal(data: str = "more", checkpoint: str = "ck") -> str:
        words = ("nano", "--checkpoint", checkpoint, "--data", data, "--out", "f", *SIZE)
        return refused(encode, *words, monkeypatch=monkeypatch)

    shutil.copytree("clips", "more")
    Path("more/c1.txt").unlink()
    assert "more/c1.mp4 has no caption; write one into more/c1.txt" in refusal()
    Path("more/c1.txt").write_text("rain")
    Path("more/c1.mp4").write_text("no film")
    assert "more/c1.mp4 cannot be read as a video" in refusal()
    shutil.copyfile("picture.png", "more/c1.mp4")
    assert "more/c1.mp4 cannot be read as a video (it is a picture)" in refusal()
    shutil.copyfile("picture.png", "more/p.png")
    assert "more/p.png is a picture" in refusal()
    write_checkpoint(Path("only"), only=("vae", "text_encoder"))
    assert "only holds no dit (it has vae, text_encoder); convert" in refusal("clips", "only")
    write_checkpoint(Path("blind"), only=("dit", "vae", "text_encoder"))
    assert "blind holds no image_encoder" in refusal("clips", "blind")
    shutil.copytree("clips", "copies")
    shutil.copyfile("copies/c0.mp4", "copies/c1.mp4")
    lines = [{"file": f"c{i}.mp4", "split": ("train", "test")[i]} for i in range(2)]
    Path("copies/metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    message = refusal("copies", "ck")
    assert "copies/c0.mp4 (train) and copies/c1.mp4 (test) share frames" in message
    shutil.copytree("ck", "mute")
    shutil.rmtree("mute/tokenizer")
    assert "no tokenizer at 'mute/tokenizer/tokenizer.json'" in refusal("clips", "mute")


TRAIN = {
    "features missing": (("--features", "f"), "f does not exist; make one by encode.py"),
    "features of a run": (("--features", "run"), "run is no features cache"),
    "run exists": (("--run", "clips"), "clips exists and is not a run of train.py; choose"),
    "run is a file": (("--run", "picture.png"), "picture.png exists and is not a run"),
    "run below a file": (("--run", "picture.png/r"), "picture.png is a file; choose another"),
    "target": (("--targets", "self_atn.q"), "'self_atn.q' matches no .* mean 'self_attn.q'"),
    "preset of targets": (("--targets", "papre"), "'papre' matches no layer.* 'paper'"),
    "rank": (("--rank", 0), "rank=0 is too small; use 1 or more"),
    "steps": (("--steps", 0), "steps=0 is too small"),
    "batch": (("--batch", 11), "batch of 11 cannot be filled from the 10 windows"),
    "logging": (("--log-every", 0), "log_every=0 is too small"),
    "checkpoints": (("--checkpoint-every", 0), "checkpoint_every=0 is too small"),
    "keep": (("--keep", 0), "keep=0 is too small"),
    "learning rate": (("--learning-rate", "nan"), "learning_rate=nan is not a positive"),
    "shift": (("--shift", 0), "shift=0 is not a positive"),
    "seed": (("--seed", -1), "seed=-1 is too small"),
    "validation": (("--validate-every", 5), "no split 'validation'.*train"),
    "mesh": (("--mesh", "data=2"), "needs 2 devices and there are 1; choose"),
    "mesh axis": (("--mesh", "dta=2"), "unknown axis 'dta'; did you mean 'data'"),
    "train": (("--train", "lorra"), "'lorra' is no --train; did you mean 'lora'"),
    "not a number": (("--steps", "many"), "--steps.*'many'"),
    "option": (("--learning-rte", 1), "no option '--learning-rte'; did you mean '--learning-rate'"),
    "weight decay": (("--weight-decay", "nan"), "weight_decay=nan is no decay"),
    "seed of 64 bits": (("--seed", 1 << 63), "seed=9223372036854775808 is too large"),
    "steps below the run's": (("--run", "run", *TINY, "--steps", 1), "run has . steps.*run@STEP"),
    "rank of all weights": (
        ("--train", "full", "--rank", 2),
        "--rank says nothing with --train full",
    ),
    "stray word": (("--steps", 3, "4"), "[Uu]nrecogni[sz]ed.* 4"),
}


@pytest.mark.parametrize(("words", "match"), TRAIN.values(), ids=TRAIN)
def test_train_refuses(words, match, bench, monkeypatch):
    good = ("nano", *CK, "--features", "features", "--run", "r")
    message = refused(train, *good, *words, monkeypatch=monkeypatch)
    assert re.search(match, message), message


def test_train_refuses_features_of_another_checkpoint(bench, monkeypatch):
    shutil.copytree("ck", "other")
    file = Path("other/vae.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    words = ("nano", "--checkpoint", "other", "--features", "features", "--run", "r")
    message = refused(train, *words, monkeypatch=monkeypatch)
    assert "features was encoded by another vae than the one in other; encode again" in message

    shutil.copytree("features", "damaged", symlinks=False)
    cut(next(Path("damaged").glob("*array_record*")))
    words = ("nano", *CK, "--features", "damaged", "--run", "r")
    assert "array_record" in refused(train, *words, monkeypatch=monkeypatch)


SAMPLE = {
    "image missing": (("--image", "i.png"), "no picture i.png; check"),
    "image is none": (("--image", "clips/c0.txt"), "c0.txt cannot be read as a picture.*PNG"),
    "image left out": (("--image", "None"), "needs a picture"),
    "last image": (("--last-image", "picture.png"), "takes no last picture"),
    "frames": (("--frames", 8), "frames=8 is not 4n.1; use 9"),
    "height": (("--height", 33), "height=33 is not divisible by 16; use 32"),
    "width": (("--width", 47), "width=47 is not divisible by 16; use 48"),
    "height alone": (("--width", "None"), "Give both height and width"),
    "solver": (("--solver", "unipcc"), "'unipcc' is no --solver; did you mean 'unipc'"),
    "steps": (("--steps", 0), "steps=0 is not a number of steps; use 1"),
    "shift": (("--shift", 0), "shift=0 is not a positive"),
    "sigmas": (("--sigmas", 1, 0.5), "sigmas must be .* fall strictly to 0"),
    "seed": (("--seed", -2), "seed=-2 is not from 0 to 18446744073709551615"),
    "steps by the million": (("--steps", 10**9), "steps=1000000000 is not a number of steps"),
    "shift out of range": (("--shift", "1e-320"), "leaves no usable schedule"),
    "rate of billions": (("--fps", 1 << 31), "fps=2147483648; use 1 to 1000"),
    "out of many letters": (("--out", "a" * 232 + ".mp4"), "is too long a name; use"),
    "area beside height": (("--area", 4096), "--area says nothing with --height; leave one"),
    "image of a job": (("--jobs", "jobs.jsonl"), "no picture nowhere.png"),
    "rate": (("--fps", 0), "fps=0; use 1"),
    "out left out": (("--out", "None"), "Say where the video goes"),
    "out exists": (("--out", "clips/c0.mp4"), "clips/c0.mp4 exists already; remove it"),
    "out is no mp4": (("--out", "o.avi"), "o.avi is not an .mp4"),
    "out below a file": (("--out", "picture.png/o.mp4"), "picture.png is a file; choose another"),
    "lora missing": (("--lora", "nowhere:0.5"), "no run or adapter file 'nowhere'"),
    "lora is no lora": (("--lora", "picture.png"), "picture.png is not a safetensors file"),
    "lora is a folder": (("--lora", "clips"), "clips is not a run of train.py"),
    "fast and another solver": (("--fast", "--solver", "euler"), "--solver euler contradicts --f"),
    "fast and guidance": (("--fast", "--guidance", "5"), "--guidance 5 contradicts --fast, .* 1.0"),
    "fast and sigmas": (
        ("--fast", "--sigmas", "1", "0"),
        "--sigmas 1 0 contradicts --fast, which sets that itself",
    ),
    "fast and a job's steps": (
        ("--fast", "--jobs", "steps.jsonl"),
        "steps.jsonl:1: steps=8 contradicts --fast, which makes it 4",
    ),
    "strength": (("--lora", "run:strong"), "no number after its last colon; write PATH:0.8"),
    "jobs missing": (("--jobs", "j.jsonl"), "j.jsonl cannot be read"),
    "jobs are none": (("--jobs", "picture.png"), "picture.png:1 is not UTF-8"),
    "preprocess": (("--preprocess", "diffuser"), "'diffuser' is no .* mean 'diffusers'"),
}


@pytest.mark.parametrize(("words", "match"), SAMPLE.values(), ids=SAMPLE)
def test_sample_refuses(words, match, bench, monkeypatch):
    Path("jobs.jsonl").write_text('{"out": "a.mp4"}\n{"out": "b.mp4", "image": "nowhere.png"}')
    Path("steps.jsonl").write_text('{"out": "a.mp4", "steps": 8}')
    good = ("nano", *CK, *PICTURE, "--out", "o.mp4", *SIZE)
    message = refused(sample, *good, *words, monkeypatch=monkeypatch)
    assert re.search(match, message), message


JOBS = {
    "{": "jobs:1 is not JSON",
    "[1]": "jobs:1 is not a JSON object",
    '{"out": "a.mp4", "prompt": "a\u2028b\x85c"}\r\n{': "jobs:2 is not JSON",
    '{"out": "a.mp4", "prompt": "a \\ud83d smile"}': "jobs:1 holds half of a character",
    '{"out": "a.mp4", "guidance": NaN}': "jobs:1 holds NaN, which is no number",
    '{"out": "a.mp4", "promt": "x"}': "unknown field 'promt'; did you mean 'prompt'",
    '{"out": "a.mp4", "seed": "1"}': "seed='1' is of the wrong kind",
    '{"out": "a.mp4", "frames": null}': "frames=None is of the wrong kind",
    '{"out": ""}': "is not an .mp4",
    '{"out": "a\\u0000.mp4"}': "is no path; choose another",
    '{"out": "a.mp4", "height": 0}': "height=0 is not divisible by 16",
    '{"out": "a.mp4"}\n{"out": "new/../a.mp4"}': "jobs:2 writes new/../a.mp4, as an earlier line",
    '{"out": "a.mp4"}\n{"out": "a.MP4"}': "jobs:2 writes a.MP4, as an earlier line does",
    '{"prompt": "x"}': "Say where the video goes",
    '{"out": "a.mp4", "solver": "unipcc"}': "no solver 'unipcc'; did you mean 'unipc'",
    '{"out": "a.mp4"}\n{"out": "a.mp4"}': "jobs:2 writes a.mp4, as an earlier line does",
    '{"out": "a.mp4"}\n{"out": "b.mp4", "frames": 10}': "frames=10 is not 4n",
    '{"out": "a.mp4"}\n{"out": "b.mp4", "image": "no.png"}': "no picture no.png",
}


@pytest.mark.parametrize(("lines", "match"), JOBS.items())
def test_jobs_are_refused_before_the_first_video(lines, match, bench, monkeypatch):
    (bench / "jobs").write_text(lines)
    monkeypatch.setattr(sample.Pipeline, "_network", lambda *_: np.zeros(()))
    monkeypatch.setattr(sample.Pipeline, "encode_prompts", lambda *_: np.zeros((2, 512, 24)))
    monkeypatch.setattr("wanjax.pipeline.picture_condition", lambda *_: None)
    monkeypatch.setattr("wanjax.pipeline.image_tokens", lambda *_: np.zeros(()))
    words = ("nano", *CK, *PICTURE, *SIZE, "--jobs", "jobs")
    assert match in refused(sample, *words, monkeypatch=monkeypatch)


def test_adapters_of_another_model_are_refused(bench, monkeypatch):
    from convert.lora_write import DTYPES, write_lora
    from wanjax.checkpoint import save_lora

    wide = LayerAdapter(np.ones((2, 64, 3), np.float32), np.ones((2, 3, 64), np.float32), 3.0)
    save_lora(bench / "wide.safetensors", LoRA({"self_attn.q": wide}))
    write_lora(
        bench / "wide_c.safetensors", LoRA({"self_attn.q": wide}), "comfyui", DTYPES["float32"]
    )
    shutil.copyfile("wide.safetensors", "cut.safetensors")
    cut(Path("cut.safetensors"))
    shutil.copytree("run", "blank")
    shutil.rmtree("blank/checkpoints")
    good = ("nano", *CK, *PICTURE, "--out", "o.mp4", *SIZE)
    refusal = lambda name: refused(sample, *good, "--lora", name, monkeypatch=monkeypatch)  # noqa: E731
    sizes = "for 2 blocks of 64 to 64 channels, and this one has 2 of 48 to 48"
    assert sizes in refusal("wide.safetensors") and sizes in refusal("wide_c.safetensors:0.5")
    assert "cut.safetensors is truncated" in refusal("cut.safetensors")
    assert "blank has no checkpoint yet" in refusal("blank")


def test_as_a_process_it_is_one_line_and_code_2(bench):
    """Four scripts at once; none of them writes."""
    commands = {
        "encode.py": ("nnao", "--data", "clips"),
        "train.py": ("nano", *CK, "--features", "features", "--run", "r", "--targets", "papr"),
        "sample.py": ("nano", *CK, *PICTURE, "--out", "o.mp4", "--image", "clips/c0.mp4", *SIZE),
        "-m": ("convert", "lora", "run", "run", "--format", "comfyui"),
    }
    before = listing(bench)
    processes = {name: start(name, *words, cwd=bench) for name, words in commands.items()}
    for name, process in processes.items():
        out, errors = process.communicate(timeout=200)
        assert process.returncode == 2, (name, errors)
        assert errors.startswith("error: ") and errors.count("\n") == 1 and not out, (name, errors)
        assert call(name, *commands[name], cwd=bench, code=2) == errors
    assert listing(bench) == before


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A disk of its own that is as small as one likes; only root can mount one."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if os.geteuid() != 0 or shutil.which("mount") is None or subprocess.run(mount).returncode:
        pytest.skip("a small disk can be mounted by root only")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path, leave: int) -> Path:
    """Leave `leave` bytes free on the disk."""
    filler = folder / "filler"
    filler.write_bytes(b"\1" * (shutil.disk_usage(folder).free - leave))
    return filler


def test_a_checkpoint_that_breaks_off(bench):
    """The disk said that there was room, and then refused: here files larger than 3 kB."""
    words = ("nano", *CK, "--features", "features", "--run", "r", *TINY)
    words += ("--checkpoint-every", 2, "--steps")
    call("train.py", *words, 2, cwd=bench)
    saved = listing(bench / "r" / "checkpoints")
    said = ended(start("train.py", *words, 6, cwd=bench, largest_file=3), code=2)
    assert "error: The checkpoint of step 4 could not be written to r (step 2 is kept)" in said
    assert listing(bench / "r" / "checkpoints") == saved
    call("train.py", *words, 4, cwd=bench)
    assert latest_step(bench / "r") == 4


def test_full_disks(bench):
    """While a checkpoint is saved, while metrics and a video are written."""
    with small_disk(bench / "disk", "8m") as disk:
        words = ("nano", *CK, "--features", "features", "--run", disk / "r", *TINY)
        words += ("--checkpoint-every", 2, "--steps")
        call("train.py", *words, 2, cwd=bench)
        saved = listing(disk / "r" / "checkpoints")

        filler = fill(disk, leave=64 << 10)
        said = run("train.py", *words, 6, cwd=bench, code=2)
        fact = f"The checkpoint of step 4 could not be written to {disk}/r (step 2 is kept)"
        assert f"error: {fact}" in said
        assert said.strip().splitlines()[-1].endswith("make room and run the same command again.")
        assert latest_step(disk / "r") == 2 and listing(disk / "r" / "checkpoints") == saved

        filler.unlink()
        filler = fill(disk, leave=0)
        given = ("nano", *CK, *PICTURE, *SIZE, "--steps", 1)
        said = call("sample.py", *given, "--out", disk / "o.mp4", cwd=bench, code=2)
        assert f"error: {disk}/o.latents.safetensors needs" in said and "0 bytes free" in said
        with pytest.raises(UserError, match="disk is full"):
            write_video(disk / "o.mp4", film(0))
        message = f"{disk}/r/run.json could not be written, the disk is full"
        assert message in call("train.py", *words, 6, cwd=bench, code=2)
        assert not [p.name for p in disk.rglob("*") if "partial" in p.name or "o.mp4" in p.name]

        filler.unlink()
        call("train.py", *words, 6, cwd=bench)
        assert latest_step(disk / "r") == 6
        steps = [json.loads(line)["step"] for line in (disk / "r/metrics.jsonl").open()]
        assert steps == [1, 2, 3, 4, 5, 6]


def test_what_may_not_be_written(bench, monkeypatch):
    """A folder on a read-only disk is refused before any work."""
    with small_disk(bench / "disk", "64k") as disk:
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        sampling = ("nano", *CK, *PICTURE, *SIZE, "--out", "disk/o.mp4")
        training = ("nano", *CK, "--features", "features", "--run", "disk/deep/r")
        encoding = ("nano", *CK, "--data", "clips", *SIZE, "--out", "disk/f")
        for script, words in ((sample, sampling), (train, training), (encode, encoding)):
            message = refused(script, *words, monkeypatch=monkeypatch)
            assert "disk may not be written to; choose another place" in message
