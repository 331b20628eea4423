"""CLIP's towers for CLIP-SIM against transformers' `CLIPModel`, from a folder that it saved."""

import json

import numpy as np
import pytest

from tests.parity.reference import relative_error, torch
from tests.parity.tiny_clip import WORDS, save_clip
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
