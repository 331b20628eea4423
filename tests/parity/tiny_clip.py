"""A tiny random CLIP on disk, as Hugging Face's `CLIPModel` saves it."""

import pytest

from tests.parity.reference import randomise

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
