"""Training that starts from an adapter: its first weights, its settings, and going on."""

import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
from flax import nnx

from convert.lora import convert_lora, open_lora
from convert.lora_svd import lora_resize
from tests.adapters import (
    assert_same_change,
    in_family,
    merged,
    merged_by_us,
    random_pairs,
    save,
)
from tests.scripts import call
from tests.toy import SMALL, dit_inputs, toy_batch, toy_dit
from wanjax import lora
from wanjax.checkpoint import load_lora
from wanjax.errors import UserError
from wanjax.lora import train_settings
from wanjax.slots import apply
from wanjax.training import TrainConfig, Trainer

pytestmark = [pytest.mark.compiles, pytest.mark.usefixtures("quickly")]
CONFIG = TrainConfig(dtype="float32", residual="float32", warmup=0, steps=4)


def adapter(path, alpha=None, **changes):
    pairs = random_pairs(SMALL, **{"layers": ("self_attn.q", "cross_attn.v_img"), **changes})
    return open_lora(save(path, in_family("musubi", pairs, alpha)))


@pytest.mark.parametrize("blocks", [None, (0, 2)])
def test_the_first_step_starts_with_what_the_adapter_does(blocks, tmp_path):
    """With alpha 6 at rank 4; and blocks that it leaves out learn as well."""
    start = adapter(tmp_path / "a.safetensors", lambda n: np.float32(6), blocks=blocks)
    settings = replace(CONFIG, **train_settings(start))
    assert (settings.rank, settings.alpha) == (4, 6)
    assert settings.targets == "self_attn.q,cross_attn.v_img"
    trainer, expected, given = Trainer(toy_dit(), settings, None, start), toy_dit(), dit_inputs()
    apply(expected, [(start, 1.0)])
    np.testing.assert_allclose(trainer.model()(*given), expected(*given), rtol=2e-5, atol=2e-5)
    before = lora.extract(trainer.model())
    trainer.train(toy_batch())
    after = lora.extract(trainer.model())
    for role, layer in after.layers.items():
        moved = [(a != b).any() for a, b in zip(layer.up, before.layers[role].up)]
        assert all(moved), role


def test_targets_have_the_name_of_a_preset_where_they_are_one(tmp_path):
    roles = ("self_attn.v", "self_attn.q", "cross_attn.v", "cross_attn.q")
    assert train_settings(adapter(tmp_path / "a.safetensors", layers=roles))["targets"] == "qv"


def test_what_training_could_not_have_made_is_refused_with_a_remedy(tmp_path):
    path = tmp_path / "a.safetensors"
    for alpha in (0, -4):
        flat = adapter(path, lambda n, alpha=alpha: np.float32(alpha))
        with pytest.raises(UserError, match=rf"and it\.safetensors has alpha={alpha};"):
            train_settings(flat, "it.safetensors")
    norm = {"diffusion_model.blocks.0.norm3.diff": np.ones(48, np.float32)}
    with pytest.raises(UserError, match=r"changes blocks\.norm_cross\.scale.*lora-merge"):
        train_settings(open_lora(save(path, norm)))


def test_the_remedy_for_several_ranks_loses_nothing(tmp_path):
    """The rank that the refusal names; and what is filled up learns as well."""
    pairs = random_pairs(SMALL, layers=("self_attn.q", "cross_attn.v"), ranks=(2, 5))
    path = save(tmp_path / "a.safetensors", in_family("musubi", pairs))
    with pytest.raises(UserError, match=r"several.*lora-resize --rank \d") as refused:
        train_settings(open_lora(path))
    rank = int(re.search(r"--rank (\d+)", str(refused.value))[1])
    lora_resize(path, tmp_path / "b.safetensors", rank)
    start = open_lora(tmp_path / "b.safetensors")
    assert_same_change(merged_by_us(start), merged(pairs), 2e-6)
    trainer = Trainer(toy_dit(), replace(CONFIG, **train_settings(start)), None, start)
    before = lora.extract(trainer.model()).layers["self_attn.q"]
    assert before.down.any(axis=-2).all()
    trainer.train(toy_batch())
    after = lora.extract(trainer.model()).layers["self_attn.q"]
    assert (after.up != before.up).any(axis=-1).all()


def test_a_run_starts_from_a_run_and_goes_on_without_it(world, features, trained, tmp_path):
    """Rank and targets are the adapter's; what says otherwise is refused; the adapter may be gone
    once there is a checkpoint, and may not be another."""
    shutil.copytree(trained, tmp_path / "first")
    words = ("train.py", "nano", "--features", features, "--checkpoint", world / "ck", "--batch", 2)
    words += ("--run", "second", "--warmup", 1)
    start = ("--init-lora", "first@4")
    said = call(*words, *start, "--rank", 5, "--steps", 2, cwd=tmp_path, code=2)
    assert "--rank 5 contradicts --init-lora first@4, which makes it 2" in said
    assert not (tmp_path / "second").exists()
    call(*words, *start, "--rank", 2, "--steps", 2, cwd=tmp_path)
    settings = json.loads((tmp_path / "second/run.json").read_text())
    assert (settings["rank"], settings["targets"]) == (2, "all") and settings["init_lora"]
    first, second = load_lora(tmp_path / "first@4"), load_lora(tmp_path / "second")
    for role, layer in second.layers.items():
        moved = np.abs(layer.down - first.layers[role].down).max()
        assert 0 < moved < 0.02, role  # two steps from there, and not from a random start
    shutil.rmtree(tmp_path / "first")
    call(*words, *start, "--steps", 3, cwd=tmp_path)
    assert (tmp_path / "second/checkpoints/3").exists()
    convert_lora(tmp_path / "second", tmp_path / "other.safetensors", "kohya")
    said = call(*words, "--init-lora", "other.safetensors", "--steps", 4, cwd=tmp_path, code=2)
    assert "was started with init_lora=" in said
    said = call(*words, "--steps", 4, "--rank", 2, cwd=tmp_path, code=2)
    assert "was started with init_lora=" in said


def test_an_adapter_of_another_model_is_refused_before_weights_are_read(world, features, tmp_path):
    adapter(tmp_path / "a.safetensors")
    words = ("--features", features, "--checkpoint", world / "ck", "--run", "r", "--steps", 2)
    call_words = ("train.py", "nano", *words, "--init-lora", "a.safetensors")
    said = call(*call_words, cwd=tmp_path, code=2)
    assert "made for another model" in said and not (tmp_path / "r").exists()
    nowhere = ("--features", "nowhere")  # features are opened after that
    assert "made for another model" in call(
        "train.py", "nano", *nowhere, *call_words[4:], cwd=tmp_path, code=2
    )
    said = call(*call_words, "--train", "full", cwd=tmp_path, code=2)
    assert "--init-lora says nothing with --train full" in said


def test_adapters_of_every_block_are_as_they_were(tmp_path):
    start = adapter(tmp_path / "a.safetensors")
    model = toy_dit()
    lora.attach(model, rngs=nnx.Rngs(0), **train_settings(start))
    lora.start_from(model, start)
    for role, layer in lora.extract(model).layers.items():
        np.testing.assert_array_equal(layer.down, start.layers[role].down)
        np.testing.assert_array_equal(layer.up, start.layers[role].up)
