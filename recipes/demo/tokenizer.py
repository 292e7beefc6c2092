"""The demo's tokenizer: whole words, single digits, letters for everything else; about 450 tokens."""

from __future__ import annotations

import re
from collections.abc import Iterable
from string import ascii_lowercase, digits

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
PUNCTUATION = ".,;:?!+-*/=()'\"<>[]{}_#&%$@"


def build_tokenizer(texts: Iterable[str], max_length: int) -> PreTrainedTokenizerFast:
    """A lower-casing tokenizer that knows every word of `texts`; other words fall apart into letters.

    Digits are tokens of their own, the same ones in needles and in arithmetic. White space is not kept: decoding puts
    it back by rule (no space inside numbers and hyphenated words, none before punctuation).
    """
    words = sorted({word for text in texts for word in re.findall(r"[a-z]{2,}", text.lower())})
    pieces = [*SPECIAL.values(), *digits, *PUNCTUATION, *ascii_lowercase, *words, *(f"##{c}" for c in ascii_lowercase)]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=SPECIAL["unk_token"], max_input_chars_per_word=64))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Punctuation("isolated"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.Split(Regex(r"[+=<>$]"), "isolated"),  # symbols, which Punctuation leaves joined to words
        ]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(Regex(r"^(?!##)"), " "),
            decoders.Replace(Regex(r"^##"), ""),
            decoders.Fuse(),
            decoders.Replace(Regex(r"(?<=\d) (?=\d)"), ""),
            decoders.Replace(Regex(r"(?<=[a-z]{2}) - (?=[a-z]{2})"), "-"),
            decoders.Replace(Regex(r" (?=[.,;:?!])"), ""),
            decoders.Strip(" ", 1, 0),
        ]
    )
    bos = SPECIAL["bos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, vocabulary[bos])]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=max_length, **SPECIAL)
