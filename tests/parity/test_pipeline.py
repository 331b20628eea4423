"""The whole pipeline against diffusers' WanImageToVideoPipeline, from the same noise, and adapters
exported to it. The checkpoint goes through `python -m convert pipeline`, as a user's does."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from convert.lora import convert_lora, open_lora
from convert.lora_write import write_lora
from convert.native import convert_pipeline
from examples.toy_tokenizer import train_toy_tokenizer
from tests.parity.reference import randomise, relative_error
from tests.toy import randomised_adapters
from wanjax import Pipeline, lora
from wanjax.checkpoint import save_lora

torch = pytest.importorskip("torch", reason="parity tests compare with PyTorch")
from diffusers import (  # noqa: E402
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanTransformer3DModel,
)
from PIL import Image  # noqa: E402
from transformers import (  # noqa: E402
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    UMT5Config,
    UMT5EncoderModel,
)

pytestmark = pytest.mark.compiles

PROMPTS = ["a rabbit runs through a meadow", "blurred, static, overexposed"]
FRAMES, HEIGHT, WIDTH = 9, 48, 80


def build(*, last_frame: bool = False) -> WanImageToVideoPipeline:
    """A tiny WanImageToVideoPipeline with every parameter random."""
    size, patch = 28, 14
    tokens = (size // patch) ** 2 + 1
    transformer = WanTransformer3DModel(
        num_attention_heads=3,
        attention_head_dim=20,
        in_channels=36,
        out_channels=16,
        text_dim=24,
        freq_dim=32,
        ffn_dim=80,
        num_layers=3,
        image_dim=32,
        added_kv_proj_dim=60,
        pos_embed_seq_len=2 * tokens if last_frame else None,
    )
    vae = AutoencoderKLWan(base_dim=8)
    text = UMT5Config(
        vocab_size=300, d_model=24, d_kv=8, num_heads=3, d_ff=40, num_layers=3,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    vision = CLIPVisionConfig(
        image_size=size, patch_size=patch, hidden_size=32, num_attention_heads=4,
        num_hidden_layers=4, intermediate_size=48, hidden_act="gelu",
    )  # fmt: skip
    return {
        "transformer": randomise(transformer, 1),
        "vae": randomise(vae, 2),
        "text_encoder": randomise(UMT5EncoderModel(text), 3),
        "image_encoder": randomise(CLIPVisionModel(vision), 4),
    }


@pytest.fixture(scope="module", params=["i2v", "flf2v"])
def pair(request, tmp_path_factory):
    """diffusers' pipeline and ours, with the same weights."""
    folder = tmp_path_factory.mktemp(request.param)
    train_toy_tokenizer(PROMPTS, folder / "tokenizer", vocab_size=300)
    size = 28
    theirs = WanImageToVideoPipeline(
        tokenizer=AutoTokenizer.from_pretrained(folder / "tokenizer"),
        image_processor=CLIPImageProcessor(
            size={"shortest_edge": size}, crop_size={"height": size, "width": size}
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        **build(last_frame=request.param == "flf2v"),
    )
    theirs.set_progress_bar_config(disable=True)
    theirs.save_pretrained(folder / "src")
    convert_pipeline(folder / "src", folder / "dst")
    return theirs, Pipeline.load(folder / "dst", dtype="float32"), request.param


def pictures(kind: str) -> dict[str, Image.Image]:
    """Pictures of another size and aspect than the video; smooth, with some texture."""
    rng = np.random.default_rng(0)

    def picture(height, width):
        coarse = rng.integers(0, 255, (7, 9, 3)).astype(np.uint8)
        return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)

    both = {"image": picture(120, 131), "last_image": picture(120, 131)}
    return both if kind == "flf2v" else {"image": both["image"]}


def run_theirs(pipe, kind, noise, **changes):
    settings = {"num_inference_steps": 4, "guidance_scale": 7.5} | changes
    video = pipe(
        **pictures(kind),
        prompt=PROMPTS[0],
        negative_prompt=PROMPTS[1],
        height=HEIGHT,
        width=WIDTH,
        num_frames=FRAMES,
        latents=torch.from_numpy(noise).movedim(-1, 1),
        output_type="np",
        **settings,
    ).frames[0]
    return np.asarray(video)


def run_ours(pipeline, kind, noise, **changes):
    settings = {"steps": 4, "guidance": 7.5} | changes
    return pipeline.sample(
        **pictures(kind),
        prompt=PROMPTS[0],
        negative_prompt=PROMPTS[1],
        height=HEIGHT,
        width=WIDTH,
        frames=FRAMES,
        noise=noise,
        preprocess="diffusers",
        **settings,
    )


def noise_for_test() -> np.ndarray:
    return np.random.default_rng(1).normal(size=(1, 3, 6, 10, 16)).astype(np.float32)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(-10 * np.log10(np.mean((a.astype(np.float64) - b) ** 2)))


def test_four_guided_steps_equal_diffusers(pair):
    """More than 20 s as long as nothing is compiled: all four networks are, as users run them."""
    theirs, ours, kind = pair
    noise = noise_for_test()
    expected = run_theirs(theirs, kind, noise)
    sigmas = theirs.scheduler.sigmas.numpy()
    got = run_ours(ours, kind, noise, solver="euler", sigmas=sigmas)
    assert got.shape == expected.shape == (FRAMES, HEIGHT, WIDTH, 3)
    assert expected.std() > 0.02 and np.mean((expected <= 0) | (expected >= 1)) < 0.5
    assert psnr(got, expected) >= 94


def test_guidance_and_the_picture_matter(pair):
    """The comparison above would notice if either were ignored."""
    _, ours, kind = pair
    noise = noise_for_test()
    base = run_ours(ours, kind, noise)
    assert psnr(base, run_ours(ours, kind, noise, guidance=1.0)) < 45
    wrong = run_ours(ours, kind, noise, guidance=1.0)
    assert psnr(wrong, run_ours(ours, kind, noise[:, :, ::-1].copy(), guidance=1.0)) < 45


def test_without_guidance_equals_diffusers(pair):
    theirs, ours, kind = pair
    noise = noise_for_test()
    expected = run_theirs(theirs, kind, noise, guidance_scale=1.0)
    sigmas = theirs.scheduler.sigmas.numpy()
    got = run_ours(ours, kind, noise, solver="euler", sigmas=sigmas, guidance=1.0)
    assert psnr(got, expected) >= 94


def test_unipc_on_the_same_sigmas_equals_diffusers(pair):
    """Their UniPC shows the network truncated timesteps, so its velocity is given by a formula."""
    theirs, _, _ = pair
    from wanjax.solvers import initial_state, make_schedule, step

    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    scheduler.set_timesteps(6)
    schedule = make_schedule("unipc", 6, 3.0, sigmas=scheduler.sigmas.numpy())
    x = noise_for_test()
    state, sample = initial_state(jnp.asarray(x)), torch.from_numpy(x)
    for i, t in enumerate(scheduler.timesteps):
        state = step(state, jnp.sin(3 * state.x) - 0.2, schedule.row(i))
        sample = scheduler.step(torch.sin(3 * sample) - 0.2, t, sample, return_dict=False)[0]
    assert relative_error(state.x, sample.numpy()) <= 2.5e-6


def test_networks_called_on_their_own(pair):
    theirs, ours, kind = pair
    rng = np.random.default_rng(3)
    video = np.tanh(rng.normal(size=(1, 5, 16, 24, 3))).astype(np.float32)
    with torch.no_grad():
        mode = theirs.vae.encode(torch.from_numpy(video).movedim(-1, 1)).latent_dist.mode()
    mean = np.asarray(theirs.vae.config.latents_mean)
    std = np.asarray(theirs.vae.config.latents_std)
    expected = (mode.movedim(1, -1).numpy() - mean) / std
    assert relative_error(ours.vae.encode(video), expected) <= 2.5e-6
    assert ours.image_encoder(np.zeros((1, 28, 28, 3), np.float32)).shape == (1, 5, 32)
    ids = np.asarray([[5, 6, 1, 0]])
    assert ours.text_encoder(ids, (ids > 0).astype(int)).shape == (1, 4, 24)


def dit_inputs(config):
    """Latents with their condition, text, and image tokens, one of each."""
    rng = np.random.default_rng(0)
    normal = lambda *s: rng.normal(size=s).astype(np.float32)  # noqa: E731
    return normal(1, 3, 6, 10, 36), normal(1, 512, 24), normal(1, config.image_positions or 5, 32)


def our_velocity(model, x, text, image):
    return model(x[..., :16], jnp.asarray([500.0]), text, image, x[..., 16:])


def their_velocity(theirs, adapter, kind, x, text, image):
    """What the pipeline's denoiser gives with an adapter file loaded."""
    theirs.load_lora_weights(adapter)
    try:
        image = image.reshape(-1, 5, 32) if kind == "flf2v" else image
        with torch.no_grad():
            expected = theirs.transformer(
                torch.from_numpy(x).movedim(-1, 1),
                torch.tensor([500.0]),
                torch.from_numpy(text),
                torch.from_numpy(image),
                return_dict=False,
            )[0]
    finally:
        theirs.unload_lora_weights()
    return expected.movedim(1, -1).numpy()


@pytest.mark.parametrize("targets", ["paper", "attention", "qv", "all"])
def test_exported_adapter_acts_in_diffusers_as_here(pair, tmp_path, targets):
    theirs, ours, kind = pair
    if kind == "flf2v" and targets != "all":
        pytest.skip("one set of targets is enough for the second kind of model")
    model = Pipeline.load(ours.folder, dtype="float32").dit
    lora.attach(model, rank=3, alpha=7.0, targets=targets, rngs=nnx.Rngs(0))
    randomised_adapters(model)
    save_lora(tmp_path / "native.safetensors", lora.extract(model))
    convert_lora(tmp_path / "native.safetensors", tmp_path / "comfy.safetensors", "comfyui")

    given = dit_inputs(model.config)
    with_adapter, without = our_velocity(model, *given), our_velocity(ours.dit, *given)
    lora.merge(model)
    merged = our_velocity(model, *given)
    expected = their_velocity(theirs, tmp_path / "comfy.safetensors", kind, *given)
    assert relative_error(with_adapter, expected) <= 1e-5
    assert relative_error(merged, expected) <= 1e-5
    assert relative_error(without, expected) > 1e-2


def test_an_adapter_of_some_blocks_acts_in_diffusers_as_here(pair, tmp_path):
    theirs, ours, kind = pair
    if kind == "flf2v":
        pytest.skip("one kind of model is enough")
    model = Pipeline.load(ours.folder, dtype="float32").dit
    lora.attach(model, rank=3, alpha=7.0, targets="attention", rngs=nnx.Rngs(0))
    whole = lora.extract(randomised_adapters(model))
    layers = {
        role: replace(adapter, down=adapter.down[1:2], up=adapter.up[1:2], blocks=(1,))
        for role, adapter in whole.layers.items()
    }
    write_lora(tmp_path / "c.safetensors", lora.LoRA(layers), "comfyui", np.dtype("f4"))
    pipeline = Pipeline.load(
        ours.folder, dtype="float32", lora=[(open_lora(tmp_path / "c.safetensors"), 1.0)]
    )
    given = dit_inputs(model.config)
    expected = their_velocity(theirs, tmp_path / "c.safetensors", kind, *given)
    assert relative_error(our_velocity(pipeline.dit, *given), expected) <= 1e-5
    assert relative_error(our_velocity(ours.dit, *given), expected) > 1e-2


def test_a_pipeline_with_some_networks_has_only_those(pair, tmp_path):
    _, ours, kind = pair
    source = ours.folder.parent / "src"
    convert_pipeline(source, tmp_path / "some", only=("dit", "vae"))
    some = Pipeline.load(tmp_path / "some", dtype="float32")
    assert hasattr(some, "dit") and hasattr(some, "vae")
    assert not hasattr(some, "text_encoder") and not hasattr(some, "image_encoder")
