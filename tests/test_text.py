"""Prompts to tokens, with the real tokenizer where it is present and with one trained here."""

import gzip
import hashlib
import json
import warnings
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from examples.toy_tokenizer import train_toy_tokenizer
from wanjax.errors import UserError
from wanjax.text import (
    NEGATIVE_PROMPT,
    NEGATIVE_PROMPT_FLF2V,
    NEGATIVE_PROMPT_I2V,
    Tokenizer,
    clean,
    zero_padding,
)

ASSETS = Path(__file__).resolve().parents[1] / "../shared/assets/umt5"
CAPTIONS = [
    "A large grey rabbit wakes in a green meadow.",
    "A butterfly lands on the rabbit's nose, close shot, morning light.",
    "Three rodents throw an apple at the butterfly.",
]


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> Path:
    source = ASSETS / "tokenizer.json.gz"
    if not source.is_file():
        pytest.skip("umT5's tokenizer.json.gz is not among the assets")
    folder = tmp_path_factory.mktemp("umt5")
    (folder / "tokenizer.json").write_bytes(gzip.decompress(source.read_bytes()))
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).write_bytes((ASSETS / name).read_bytes())
    return folder


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    train_toy_tokenizer(CAPTIONS, folder, vocab_size=200)
    return folder


def ids_of(folder: Path, prompt: str) -> list[int]:
    tokens = Tokenizer(folder)([prompt])
    return tokens.ids[0, : tokens.mask[0].sum()].tolist()


def test_clean():
    assert clean("  a\tcat\n\n walks  ") == "a cat walks"
    assert clean("Tom &amp;amp; Jerry &lt;3") == "Tom & Jerry <3"
    assert clean("donâ€™t") == "don't"  # UTF-8 that was read as Windows-1252
    assert clean("一只猫\u3000在走路") == "一只猫 在走路"
    assert clean(" \n ") == ""


def rows_of(folder) -> int:
    """The largest id plus one: as many rows the encoder's embedding must have."""
    tokenizer = tokenizers.Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
    return max(tokenizer.get_vocab().values()) + 1


def test_real_ids(real):
    # Recorded with transformers' tokenizer for the same file.
    expected = [320, 6283, 14869, 281, 275, 273, 858, 9457, 14985, 869, 4898, 2741, 1]
    assert ids_of(real, "A cat walks, 一只猫在走路 ") == expected
    assert ids_of(real, "") == [1]
    assert rows_of(real) == 256_300


def test_real_equals_transformers(real):
    """On the file as it is, which is how transformers 4, and so the official code, read it."""
    transformers = pytest.importorskip("transformers")
    reference = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(real / "tokenizer.json"), pad_token="<pad>", eos_token="</s>"
    )
    prompts = [
        NEGATIVE_PROMPT_FLF2V,
        "A giant panda; 3.5 m/s, ½ speed — émigré's naïve “stare” 😀",
        "ꙮ, unknown to umT5",
        "镜头缓缓推进，一位老人坐在海边。",
        "",
    ]
    expected = reference(
        [clean(p) for p in prompts], padding="max_length", max_length=512, truncation=True
    )
    tokens = Tokenizer(real)(prompts)
    assert tokens.ids.shape == tokens.mask.shape == (5, 512)
    assert np.array_equal(tokens.ids, expected["input_ids"])
    assert np.array_equal(tokens.mask, expected["attention_mask"])
    assert 3 in tokens.ids[2]


def test_toy_equals_transformers(toy):
    transformers = pytest.importorskip("transformers")
    reference = transformers.AutoTokenizer.from_pretrained(toy)
    prompts = [*CAPTIONS, "Unseen words: zebra #42 ~ 猫", ""]
    expected = reference(prompts, padding="max_length", max_length=96, truncation=True)
    tokens = Tokenizer(toy, length=96)(prompts)
    assert np.array_equal(tokens.ids, expected["input_ids"])
    assert np.array_equal(tokens.mask, expected["attention_mask"])
    assert (reference.pad_token_id, reference.eos_token_id, reference.unk_token_id) == (0, 1, 3)


def test_toy_layout(toy):
    tokens = Tokenizer(toy, length=96)([*CAPTIONS, "~ zebra #42!"])
    assert tokens.ids.dtype == np.int32
    lengths = tokens.mask.sum(1)
    assert (tokens.ids[np.arange(4), lengths - 1] == 1).all()
    assert (tokens.ids[tokens.mask == 0] == 0).all()
    assert 3 not in tokens.ids  # all of ASCII is covered
    assert tokens.ids.max() < rows_of(toy) <= 200
    # Trained on these captions, it needs fewer tokens than they have letters.
    assert lengths[:3].sum() < sum(map(len, CAPTIONS))


def test_a_long_prompt_is_cut_with_a_warning(toy):
    long = " ".join(CAPTIONS)
    whole = ids_of(toy, long)
    with pytest.warns(UserWarning, match=f"{len(whole)} tokens .* its last {len(whole) - 20} "):
        tokens = Tokenizer(toy, length=20)([long])
    assert tokens.ids[0].tolist() == [*whole[:19], 1]
    assert tokens.mask.all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exact = Tokenizer(toy, length=len(whole))([long])  # just fits
    assert exact.ids[0].tolist() == whole


def test_stored_padding_and_truncation_are_ignored(toy, tmp_path):
    content = json.loads((toy / "tokenizer.json").read_text())
    content["truncation"] = {
        "direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0,
    }  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert ids_of(tmp_path, CAPTIONS[0]) == ids_of(toy, CAPTIONS[0])


def test_bad_folders(toy, tmp_path):
    with pytest.raises(UserError, match="no tokenizer at .*nowhere"):
        Tokenizer(tmp_path / "nowhere")
    broken = tmp_path / "tokenizer.json"
    broken.write_text((toy / "tokenizer.json").read_text()[:1000])
    with pytest.raises(UserError, match="tokenizer.json' is not a tokenizer"):
        Tokenizer(tmp_path)
    broken.write_text((toy / "tokenizer.json").read_text().replace("</s>", "<eos>"))
    with pytest.raises(UserError, match=r"ids \[0, None\] .* umT5 has \[0, 1\]"):
        Tokenizer(tmp_path)


def test_zero_padding():
    features = jnp.arange(1.0, 25.0).reshape(2, 4, 3).at[0, 3].set(jnp.nan)
    out = zero_padding(features, np.array([[1, 1, 0, 0], [1, 1, 1, 1]]))
    assert np.array_equal(out[0, :2], features[0, :2])
    assert not out[0, 2:].any()  # even where the encoder left no number
    assert np.array_equal(out[1], features[1])


def test_negative_prompts():
    """The hash is that of the published string; I2V and FLF2V put words in front of it."""
    digest = hashlib.sha256(NEGATIVE_PROMPT_FLF2V.encode()).hexdigest()
    assert digest == "43885bed372496a7998e1c1c83a19dd46254345e0b2c9a23e6fafde8f9d6e106"
    assert NEGATIVE_PROMPT_I2V == "镜头晃动，" + NEGATIVE_PROMPT
    assert NEGATIVE_PROMPT_FLF2V == "镜头切换，" + NEGATIVE_PROMPT_I2V


def test_a_tokenizer_that_may_not_be_read_gets_that_remedy(tmp_path, monkeypatch):
    def closed(*_):
        raise PermissionError(13, "Permission denied")

    (tmp_path / "tokenizer.json").write_text("{}")
    monkeypatch.setattr("pathlib.Path.read_bytes", closed)
    with pytest.raises(UserError, match=r"tokenizer\.json may not be read; change its permissions"):
        Tokenizer(tmp_path)
