"""The examples' parts: contact sheets, measures, the loop that resumes, the control's clips."""

import json
import signal

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from examples.measures import borders, digest, motion, pixels, psnr, signed
from examples.nano import loop
from examples.nano.stills import FPS
from examples.nano.tears import FRAMES, STRIDE, control_shots
from examples.nano.train_vae import first_vae
from examples.sheet import contact_sheet, moving_sheet


def film(frames: int = 9, height: int = 16, width: int = 32) -> np.ndarray:
    """A white bar on black that moves one pixel a frame."""
    video = np.zeros((frames, height, width, 3), np.uint8)
    for i in range(frames):
        video[i, :, i : i + 4] = 255
    return video


def test_a_contact_sheet_shows_first_and_last_frames(tmp_path):
    still = np.broadcast_to(film()[:1], film().shape)
    contact_sheet(tmp_path / "sheet.png", {"a": film(), "b": still}, moments=3, scale=1, credit="c")
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    bars = (sheet == 255).all(-1)
    assert bars[24 : 24 + 16, 6:10].all() and bars[24 : 24 + 16, 6 + 2 * 38 + 8 :][:, :4].all()
    assert bars[66:80, 6 + 2 * 38 :][:, :4].all()  # the still one's last frame is its first


def test_a_contact_sheet_wants_videos_of_one_shape(tmp_path):
    with pytest.raises(ValueError, match="unequal shapes"):
        contact_sheet(tmp_path / "sheet.png", {"a": film(9), "b": film(5)})


def test_a_moving_sheet_shows_every_frame_and_rests_at_the_end(tmp_path):
    moving_sheet(tmp_path / "sheet.webp", {"a": film(9)}, fps=16, scale=1)
    sheet = Image.open(tmp_path / "sheet.webp")
    assert sheet.n_frames == 9
    durations = []
    for i in range(9):
        sheet.seek(i)
        sheet.load()
        durations.append(sheet.info["duration"])
    assert sum(durations) == 8 * round(1000 / 16) + 1000 and durations[-1] == 1000


def test_measures():
    video = signed(film())
    assert video.min() == -1 and video.max() == 1 and np.array_equal(pixels(video), film())
    assert psnr(video, np.clip(video + 0.2, -10, 10)) == pytest.approx(20.0, abs=1e-4)
    # Two of 32 columns change from -1 to 1 or back, every frame.
    assert motion(video) == pytest.approx(2 * 2 / 32)
    same = borders(video, video)
    assert same["border_change"] == pytest.approx(same["inner_change"])
    jumps = video.copy()
    jumps[5:] = jumps[5:] * 0.5  # a change of brightness between chunks: frames 1-4, 5-8
    found = borders(jumps, video)
    assert found["border_change"] > 1.5 * found["inner_change"]


def test_a_digest_changes_with_any_file(tmp_path):
    (tmp_path / "a").write_text("1")
    before = digest(tmp_path)
    assert digest(tmp_path) == before
    (tmp_path / "a").write_text("2")
    assert digest(tmp_path) != before


def counting(state, number):
    """A step that any other order or number of steps would tell."""
    total = state["total"] * 0.9 + jnp.sin(jnp.float32(number))
    return {"total": total}, {"loss": total}


def test_a_loop_that_was_stopped_equals_one_that_was_not(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "SAVE_EVERY", 4)
    start = {"total": jnp.float32(0)}
    whole = loop.train("whole", tmp_path / "whole", 10, start, counting)

    def signalled_at_six(state, number):
        if number == 5:
            signal.raise_signal(signal.SIGTERM)
        return counting(state, number)

    with pytest.raises(SystemExit) as stop:
        loop.train("cut", tmp_path / "cut", 10, start, signalled_at_six)
    assert stop.value.code == 128 + signal.SIGTERM
    taken = []

    def noted(state, number):
        taken.append(number)
        return counting(state, number)

    resumed = loop.train("cut", tmp_path / "cut", 10, start, noted)
    assert taken == [6, 7, 8, 9] and resumed["total"] == whole["total"]


@pytest.mark.compiles
@pytest.mark.usefixtures("quickly")
def test_the_first_vae_fades_from_chunk_to_chunk():
    """Before it is trained a chunk's latent is that of its last frame alone, and decodes to it.
    More than 20 s as long as nothing is compiled, for the claim is about this VAE at its size."""
    vae = first_vae(0)
    video = signed(film(9, 16, 16))[None]
    mean, _ = vae.moments(video)
    alone = [vae.moments(video[:, i : i + 1])[0] for i in (0, 4, 8)]
    np.testing.assert_allclose(mean, np.concatenate(alone, axis=1), atol=1e-5)
    again = np.asarray(vae.reconstruct(mean))
    last = np.asarray(vae.reconstruct(mean[:, 2:]))
    np.testing.assert_allclose(again[:, 8:], last, atol=1e-5)
    steps = np.abs(np.diff(again[:, 4:], axis=1)).mean((0, 2, 3, 4))
    assert steps.min() > 0  # what lies between is neither the one nor the other


def test_the_control_has_about_as_many_windows_as_asked_for(tmp_path):
    shots = [{"file": "bunny.mp4", "start": 1.0, "end": 4.0, "caption": "c", "split": "train"}]
    for kind in ("photo", "shapes"):
        for i in range(20):
            file = {"file": f"{kind}_{i:04}.mp4", "caption": "c", "split": "train"}
            shots.append(file | {"split": "test" if i == 3 else "train"})
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(s) + "\n" for s in shots))
    chosen = control_shots(tmp_path, 40)
    count = (3 * FPS - FRAMES) // STRIDE + 1 + 5 * (len(chosen) - 1)
    assert 40 <= count < 45
    kinds = [shot["file"].rsplit("/", 1)[1].partition("_")[0] for shot in chosen[1:]]
    assert kinds[:4] == ["photo", "shapes", "photo", "shapes"]
    assert not any("_0003" in shot["file"] for shot in chosen)
