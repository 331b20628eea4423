"""CLIP's towers for CLIP-SIM against transformers' `CLIPModel`, from a folder that it saved."""

import json

import numpy as np
import pytest

from tests.parity.reference import randomise, relative_error, torch
from wanjax.errors import UserError
from wanjax.eval.clip import (
    Judge,
    frame_similarity,
    open_clip,
    reference_similarity,
    text_similarity,
)

pytestmark = pytest.mark.compiles

transformers = pytest.importorskip("transformers")

WORDS = [f"{a}{b}" for a in "abcdefghij" for b in "klmnopqrst"]


def save_clip(folder, activation: str, old_eos: bool):
    """A tiny random CLIP of three layers with a tokenizer of a hundred words."""
    letters = [c + end for c in "abcdefghijklmnopqrst" for end in ("", "</w>")]
    vocabulary = {token: i for i, token in enumerate(letters + [w + "</w>" for w in WORDS])}
    for mark in ("<|startoftext|>", "<|endoftext|>"):
        vocabulary[mark] = len(vocabulary)
    merges = [(word[0], word[1] + "</w>") for word in WORDS]
    tokenizer = transformers.CLIPTokenizer(vocab=vocabulary, merges=merges)
    common = {"num_hidden_layers": 3, "num_attention_heads": 3, "hidden_act": activation}
    eos = 2 if old_eos else tokenizer.eos_token_id
    texts = {"vocab_size": len(vocabulary), "hidden_size": 36, "intermediate_size": 50}
    texts |= {"max_position_embeddings": 77, "eos_token_id": eos, **common}
    pictures = {"image_size": 28, "patch_size": 7, "hidden_size": 48, "intermediate_size": 64}
    pictures |= {"layer_norm_eps": 1e-4, **common}
    config = transformers.CLIPConfig(text_config=texts, vision_config=pictures, projection_dim=20)
    model = randomise(transformers.CLIPModel(config))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = {"shortest_edge": 28}
    transformers.CLIPImageProcessorPil(size=size, crop_size=28).save_pretrained(folder)
    return model


@pytest.fixture(scope="module", params=[("quick_gelu", True), ("gelu", False)])
def saved(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    return save_clip(folder, *request.param), folder, open_clip(folder)


def unit(x) -> np.ndarray:
    x = getattr(x, "pooler_output", x)
    return torch.nn.functional.normalize(x, dim=-1).detach().numpy()


@pytest.mark.parametrize("words", [3, 70, 75, 76, 120])
def test_texts_of_any_length(saved, words):
    """Over 75 words the prompt is cut, and is still read at its end mark."""
    model, folder, judge = saved
    prompt = " ".join(np.random.default_rng(words).choice(WORDS, words))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer(prompt, truncation=True, max_length=77, return_tensors="pt")
    theirs = unit(model.get_text_features(**tokens))[0]
    assert relative_error(judge.text(prompt), theirs) < 1e-4
    assert judge.is_cut(prompt) == (words > 75)
    assert tokens["input_ids"].shape[1] == min(words + 2, 77)


def test_pictures(saved):
    model, folder, judge = saved
    video = np.random.default_rng(0).integers(0, 256, (4, 40, 61, 3), np.uint8)
    processor = transformers.CLIPImageProcessorPil.from_pretrained(folder)
    pixels = processor(list(video), return_tensors="pt")
    theirs = unit(model.get_image_features(**pixels))
    assert relative_error(judge.frames(video), theirs) < 1e-4


def test_similarities_are_means_of_cosines():
    frames = np.eye(3)[[0, 0, 1]]
    assert text_similarity(frames, np.eye(3)[0]) == pytest.approx(2 / 3)
    assert frame_similarity(frames) == pytest.approx(1 / 2)
    assert reference_similarity(frames, np.eye(3)[1]) == pytest.approx(1 / 3)


def test_only_uint8(saved):
    judge: Judge = saved[2]
    with pytest.raises(UserError, match="uint8, 0 to 255"):
        judge.frames(np.zeros((2, 40, 40, 3)))


def test_what_is_no_clip(saved, tmp_path):
    with pytest.raises(UserError, match="no folder of a CLIP"):
        open_clip(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(UserError, match="of type 'bert'"):
        open_clip(tmp_path)
    folder = saved[1]
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).unlink(missing_ok=True)
        (tmp_path / name).symlink_to(folder / name)
    with pytest.raises(UserError, match="lacks its tokenizer"):
        open_clip(tmp_path)
