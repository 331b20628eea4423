"""`assets/nano`, the model that ships: its files, what it makes of a film, and the demo's parts."""

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from configs import PRESETS
from convert.native import convert_pipeline
from examples import demo
from examples.measures import batch_of, borders, motion, pixels, psnr, sample_from
from examples.nano.films import packaged_bunny
from examples.nano.make import DIT, LARGEST
from examples.nano.stills import FPS, FRAMES, PHOTOGRAPHS, TEXTURES
from wanjax import Pipeline
from wanjax.data.clips import Shot, windows
from wanjax.data.video import write_video
from wanjax.errors import UserError
from wanjax.models import NETWORKS
from wanjax.precision import parse_dtype
from wanjax.training import Trainer
from wanjax.types import Batch
from wanjax.weights import load_network

NANO = demo.NANO


@pytest.fixture(scope="module")
def nano(tmp_path_factory) -> Pipeline:
    folder = tmp_path_factory.mktemp("nano") / "native"
    convert_pipeline(NANO, folder)
    return Pipeline.load(folder, dtype="float32")


@pytest.fixture(scope="module")
def film() -> np.ndarray:
    """Of the shot of Big Buck Bunny that was held out the middle window: `T H W 3` in [-1, 1]."""
    cut = windows([Shot(packaged_bunny(), "bunny", demo.BUNNY_CAPTION)], FRAMES, FPS, 4)
    return demo.truth_of(cut[len(cut) // 2])


@pytest.fixture(scope="module")
def batch(nano, film) -> Batch:
    """The film as training sees it."""
    return batch_of(nano, pixels(film), demo.BUNNY_CAPTION)


def test_the_files_are_small_and_all_of_a_pipeline():
    files = [file for file in NANO.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= LARGEST <= 13_000_000
    assert max(file.stat().st_size for file in files) <= 12_000_000
    index = json.loads((NANO / "model_index.json").read_text())
    assert index["_class_name"] == "WanImageToVideoPipeline"


def test_the_card_names_every_source_and_licence():
    card = (NANO / "README.md").read_text()
    for picture in (*PHOTOGRAPHS, *TEXTURES):
        assert Path(picture.path).name in card and picture.licence in card, picture
    assert demo.BUNNY_CREDIT in card


def test_it_is_stored_as_the_table_of_precision_says(nano, tmp_path):
    """The recipe's last command changes nothing of it."""
    assert nano.configs["dit"] == DIT
    convert_pipeline(NANO, tmp_path / "again", parse_dtype("bfloat16"))
    for network in NETWORKS:
        name = f"{network}.safetensors"
        assert (tmp_path / "again" / name).read_bytes() == (nano.folder / name).read_bytes()


def test_the_preset_samples_as_nano_was_trained():
    settings = PRESETS["nano"].sample
    assert (settings.guidance, settings.frames, settings.fps) == (1.0, FRAMES, FPS)
    assert settings.shift == PRESETS["nano"].train.settings.shift


@pytest.mark.compiles
def test_the_vae_gives_a_film_back_without_flicker(nano, film):
    again = np.asarray(nano.vae.decode(nano.vae.encode(film[None])))[0]
    assert psnr(again, film) >= 22
    found = borders(again, film)
    assert found["border_change"] <= 1.5 and found["inner_change"] <= 1.5


@pytest.mark.compiles
def test_a_video_begins_with_its_picture_and_moves(nano, film, batch):
    video = sample_from(nano, batch, PRESETS["nano"].sample)
    again = np.asarray(nano.vae.decode(batch.latents))[0]
    assert psnr(video[0], again[0]) >= 21
    assert 0.2 <= motion(video) / motion(film) <= 4


@pytest.mark.compiles
def test_an_adapter_learns_as_well_on_an_int8_base(nano, batch):
    """The film's own loss at fixed noise, before and after 20 steps on it: more than 20 s, since
    nothing smaller than this model has learnt anything that a base could lose."""
    settings = replace(PRESETS["nano"].train.settings, batch=1, warmup=2)
    after = {}
    for base in ("bfloat16", "int8"):
        dit = load_network(nano.folder, "dit", dtype="float32", base=base)
        trainer = Trainer(dit, replace(settings, base=base))
        before = trainer.validate(iter([batch]))
        for _ in range(20):
            trainer.train(batch)
        after[base] = trainer.validate(iter([batch]))
        assert after[base] < 0.8 * before
    assert after["int8"] == pytest.approx(after["bfloat16"], rel=0.02)


def write_clip(path: Path, frames: int = 60, height: int = 48, width: int = 80) -> Path:
    """A grey ramp that moves."""
    ramp = np.arange(width)[:, None] * 3 + np.zeros((height, 1, 3))
    moving = [(ramp + 4 * k) % 256 for k in range(frames)]
    write_video(path, np.stack(moving).astype(np.uint8), FPS)
    return path


def test_a_strangers_film_is_not_called_a_rabbit(tmp_path):
    clip = write_clip(tmp_path / "mine.mp4")
    assert demo.chosen_film(clip, None).caption == demo.ANY_CAPTION
    assert demo.chosen_film(clip, "  ").caption == demo.ANY_CAPTION
    assert demo.chosen_film(clip, "a ramp").caption == "a ramp"
    assert not demo.chosen_film(clip, None).credit
    assert "rabbit" in demo.chosen_film(None, None).caption


def test_the_demo_takes_ten_seconds_of_a_long_film_and_copies_none(tmp_path):
    clip = write_clip(tmp_path / "long.mp4", frames=240)
    cut = demo.prepare(tmp_path / "demo", demo.chosen_film(clip, "a ramp"))
    assert len(cut) == (160 - FRAMES) // 4 + 1 and {w.shot.file for w in cut} == {clip}
    assert len(demo.spread(cut, demo.MEASURED)) == demo.MEASURED
    assert demo.spread(cut, 2) == [cut[0], cut[-1]]
    assert demo.spread(cut[:3], demo.MEASURED) == cut[:3]
    assert not list((tmp_path / "demo").rglob("*.mp4"))


def test_the_demo_replaces_its_own_folder_only(tmp_path):
    film = demo.chosen_film(write_clip(tmp_path / "mine.mp4"), "a ramp")
    demo.prepare(tmp_path / "demo", film)
    (tmp_path / "demo" / "old").write_text("")
    demo.prepare(tmp_path / "demo", film)
    assert not (tmp_path / "demo" / "old").exists()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").touch()
    with pytest.raises(UserError, match="choose another --out"):
        demo.prepare(tmp_path / "other", film)
    assert (tmp_path / "other" / "mine.txt").exists()
    (tmp_path / "empty").mkdir()
    demo.prepare(tmp_path / "empty", film)
    inside = tmp_path / "demo" / "mine.mp4"
    inside.symlink_to(film.clip)
    for clip in (
        inside,
        tmp_path / "other/../demo/mine.mp4",
        write_clip(inside.with_name("b.mp4")),
    ):
        with pytest.raises(UserError, match="move the clip elsewhere"):
            demo.prepare(tmp_path / "demo", demo.chosen_film(clip, "a ramp"))
    assert inside.exists() and not list(tmp_path.glob("*.old-*"))
    with pytest.raises(UserError, match="cannot be used .*; choose another --out"):
        demo.prepare(film.clip / "below", film)


def test_a_clip_too_short_is_refused_before_anything_is_replaced(tmp_path):
    film = demo.chosen_film(write_clip(tmp_path / "mine.mp4"), "a ramp")
    demo.prepare(tmp_path / "demo", film)
    short = demo.chosen_film(write_clip(tmp_path / "short.mp4", frames=20), "a ramp")
    before = sorted((tmp_path / "demo").rglob("*"))
    with pytest.raises(UserError, match=r"lasts 1\.2 s.*give it a longer clip"):
        demo.prepare(tmp_path / "demo", short)
    assert sorted((tmp_path / "demo").rglob("*")) == before


CAPTIONS = [
    'it\'s "fine" $HOME `date`',
    "x $(shell touch pwned) y",
    "a $(b",
    "$5",
    "-a dog",
    "電影 # %=\\",
]


@pytest.mark.parametrize("caption", CAPTIONS)
@pytest.mark.parametrize("way", ["argument", "environment"])
def test_make_hands_a_caption_on_as_it_is(tmp_path, caption, way):
    """Neither make nor the shell reads anything in it."""
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin/python"
    python.write_text('#!/bin/sh\nprintf "%s\\0" "$@" > "$0.said"\n')
    python.chmod(0o755)
    for ready in (".library", ".demo"):
        (tmp_path / ready).touch()
        os.utime(tmp_path / ready, (2**32, 2**32))
    given = [f"CAPTION={caption}"] if way == "argument" else []
    environment = os.environ | ({"CAPTION": caption} if way == "environment" else {})
    words = ["make", "-C", str(demo.ROOT), "demo", f"VENV={tmp_path}", *given]
    subprocess.run(words, env=environment, check=True, capture_output=True)
    said = Path(f"{python}.said").read_text().split("\0")
    assert said == ["-m", "examples.demo", f"--caption={caption}", ""]
    assert not (demo.ROOT / "pwned").exists()
