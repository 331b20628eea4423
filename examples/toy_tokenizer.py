"""A tiny tokenizer laid out like umT5's, trained on a few captions.

A unigram model with pad 0, end 1, begin 2 and unknown 3, spaces written as "▁" with one in front of
the text, and the end token appended. The folder opens with `wanjax.text.Tokenizer` and with
transformers' `AutoTokenizer`, which give the same ids.
"""

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import UnigramTrainer

SPECIAL = {"pad_token": "<pad>", "eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}


def train_toy_tokenizer(texts: Iterable[str], folder: str | Path, vocab_size: int = 512) -> int:
    """Train on `texts` and write the folder; returns how many entries there are (<= `vocab_size`).

    Printable ASCII is always covered, so that English prompts never become unknown. The words of
    the texts are entries too, the most frequent ones if there are too many: the trainer itself
    counts each word once, and so finds no piece that is a whole word.
    """
    texts = list(texts)
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Replace(Regex(" {2,}"), " ")
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    trainer = UnigramTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL.values()),
        unk_token=SPECIAL["unk_token"],
        initial_alphabet=[chr(code) for code in range(33, 127)],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    vocabulary = _with_words(json.loads(tokenizer.to_str())["model"]["vocab"], texts, vocab_size)
    tokenizer.model = models.Unigram(vocabulary, list(SPECIAL).index("unk_token"), False)
    end = SPECIAL["eos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {end}",
        pair=f"$A {end} $B {end}",
        special_tokens=[(end, tokenizer.token_to_id(end))],
    )

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    settings = SPECIAL | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }
    (folder / "special_tokens_map.json").write_text(json.dumps(SPECIAL, indent=2))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer.get_vocab_size()


def _with_words(
    pieces: Sequence[tuple[str, float]], texts: Sequence[str], most: int
) -> list[tuple[str, float]]:
    """Pieces and their log-probabilities, joined by whole words with theirs, `most` in all."""
    counts = Counter("▁" + word for text in texts for word in text.split(" ") if word)
    words = {word: math.log(n / counts.total()) for word, n in counts.most_common()}
    scores = {piece: words.pop(piece, score) for piece, score in pieces}
    return [*scores.items(), *words.items()][:most]
