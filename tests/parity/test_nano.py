"""The model that ships, in diffusers: as it lies there, exported again, and with an adapter."""

import numpy as np
import pytest

from convert.export import export
from convert.native import convert_pipeline
from examples.demo import BUNNY_CAPTION, NANO
from examples.measures import psnr
from examples.nano.films import packaged_bunny
from examples.nano.stills import HEIGHT, WIDTH
from wanjax import Pipeline
from wanjax.data.framing import fit
from wanjax.data.video import read_video

pytestmark = pytest.mark.compiles

torch = pytest.importorskip("torch", reason="parity tests compare with PyTorch")
from diffusers import FlowMatchEulerDiscreteScheduler, WanImageToVideoPipeline  # noqa: E402
from PIL import Image  # noqa: E402

FRAMES, STEPS, SHIFT = 17, 8, 3.0


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nano") / "native"
    convert_pipeline(NANO, folder)
    return folder


@pytest.mark.parametrize("source", ["shipped", "exported"])
def test_the_same_noise_gives_the_same_video(native, tmp_path, source):
    """By Euler: the UniPC that diffusers' folders name shows the network truncated times."""
    folder = NANO
    if source == "exported":
        export(native, folder := tmp_path / "again", "diffusers")
    theirs = WanImageToVideoPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    theirs.scheduler = FlowMatchEulerDiscreteScheduler(shift=SHIFT)
    theirs.set_progress_bar_config(disable=True)
    frame = fit(read_video(packaged_bunny(), start=2.0, frames=1)[0], HEIGHT, WIDTH)[0]
    noise = np.random.default_rng(0).normal(size=(1, 5, 8, 20, 16)).astype(np.float32)
    asked = {"prompt": BUNNY_CAPTION, "height": HEIGHT, "width": WIDTH}
    expected = theirs(
        image=Image.fromarray(frame),
        num_frames=FRAMES,
        num_inference_steps=STEPS,
        guidance_scale=1.0,
        latents=torch.from_numpy(noise).movedim(-1, 1),
        output_type="np",
        **asked,
    ).frames[0]
    got = Pipeline.load(native, dtype="float32").sample(
        image=frame,
        frames=FRAMES,
        guidance=1.0,
        solver="euler",
        sigmas=theirs.scheduler.sigmas.numpy(),
        noise=noise,
        preprocess="diffusers",
        **asked,
    )
    assert np.abs(np.diff(expected, axis=0)).mean() > 0.003  # it moves
    assert psnr(2 * got, 2 * np.asarray(expected)) >= 112  # of a range of 2
