"""From text to token ids: the prompt template, how answers are written, an encoder beside the user's tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

from qkguard.errors import QKGuardError

_SLOT = "QKGUARD-PROBE-SLOT"
_OPEN_ENDINGS = {
    "<think>": "\n</think>\n\n",
    "[THINK]": "[/THINK]",
    "<|START_THINKING|>": "<|END_THINKING|>",
    "<|start|>assistant": "<|channel|>final<|message|>",
}
"""How a generation prompt may end inside a thinking block, and what leads out of it to the answer."""


@dataclass(frozen=True)
class AnswerFormat:
    """How the model writes its answers after RULER's answer prefix: `before` + v1 + `joiner` + ... + `last` + vn."""

    before: str = " "
    joiner: str = ", "
    last: str = ", and "

    def render(self, answers: Sequence[str]) -> str:
        if len(answers) == 1:
            return self.before + answers[0]
        return self.before + self.joiner.join(answers[:-1]) + self.last + answers[-1]

    def to_json(self) -> dict[str, str]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, str]) -> AnswerFormat:
        return cls(**data)


@dataclass(frozen=True)
class PromptTemplate:
    """What stands around the user's text. `mode` is "plain" or "chat"; `thinking` says how a thinking block was left:
    "none" (the template has none), "template" (switched off by the template itself) or "prefilled".
    """

    mode: str
    head: str
    tail: str
    thinking: str = "none"

    def prompt(self, user_text: str, answer_prefix: str) -> str:
        return f"{self.head}{user_text}{self.tail}{answer_prefix}"


def make_template(tokenizer: Any, mode: str = "auto") -> PromptTemplate:
    """The prompt template for a tokenizer: "chat" or "plain"; "auto" is "chat" where it has a chat template.

    Raises:
        QKGuardError: "chat" without a chat template, or a chat template that does not show the user's text once.
    """
    if mode not in ("auto", "chat", "plain"):
        raise QKGuardError(f"Invalid probe mode {mode!r}: expected auto, chat or plain.")
    inner = getattr(tokenizer, "tokenizer", None)  # a processor's template may be its own or its tokenizer's
    if getattr(inner, "chat_template", None):
        tokenizer = inner
    chat_template = getattr(tokenizer, "chat_template", None)
    if mode == "chat" and not chat_template:
        raise QKGuardError("Invalid probe mode chat: the tokenizer has no chat template. Use mode plain.")
    if mode == "plain" or not chat_template:
        return PromptTemplate("plain", "", " ")
    # Templates that know these switches use them, all others ignore them. A fixed date: some templates print today's.
    switches = {"enable_thinking": False, "thinking": False, "date_string": "26 Jul 2024"}
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": _SLOT}], tokenize=False, add_generation_prompt=True, **switches
    )
    if text.count(_SLOT) != 1:
        raise QKGuardError("The chat template does not show the user's text exactly once. Use probe mode plain.")
    head, tail = text.split(_SLOT)
    for ending, way_out in _OPEN_ENDINGS.items():
        if tail.rstrip().endswith(ending):
            return PromptTemplate("chat", head, tail.rstrip() + way_out, "prefilled")
    return PromptTemplate("chat", head, tail, "template" if "think" in tail.lower() else "none")


class Encoder:
    """Text -> ids as `tokenizer(text)` gives them, in the template's mode, on a copy of a fast tokenizer's backend.

    The copy matters twice: truncation and padding set by the training stay as they are, and single encodings do not
    start the backend's thread pool, after which forking a data loader's workers would print warnings.
    """

    def __init__(self, tokenizer: Any, template: PromptTemplate) -> None:
        self._tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # a processor holds its text tokenizer
        self.template = template
        self.unknown_token: int | None = getattr(self._tokenizer, "unk_token_id", None)
        self._special = template.mode == "plain"  # a chat template writes its own special tokens
        self._backend = None
        if getattr(self._tokenizer, "is_fast", False):
            backend = self._tokenizer.backend_tokenizer
            self._backend = type(backend).from_str(backend.to_str())
            self._backend.no_truncation()
            self._backend.no_padding()
        self._closing = self._count_closing()
        self.size = lru_cache(maxsize=65536)(self._size)

    def encode(self, text: str) -> list[int]:
        """Ids of a prompt, with the special tokens the model expects before it and none after it."""
        ids = self._raw(text, self._special)
        return ids[: len(ids) - self._closing] if self._closing else ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def answer_ids(self, prompt: str, answer: str) -> list[int]:
        """The canonical tokens of `answer` after `prompt` (its last words will do)."""
        start, whole = self.encode(prompt), self.encode(prompt + answer)
        if whole[: len(start)] == start:
            return whole[len(start) :]
        return self._raw(answer, False)  # a token spans the border: take the answer's tokens by themselves

    def answer_lead(self, prompt: str, before: str, value: str) -> int:
        """How many tokens of the answer `before` + `value` hold nothing of the value."""
        start = len(prompt) + len(before)
        first, _ = self.token_spans(prompt + before + value, [(start, start + len(value))])[0]
        return first - len(self.encode(prompt))

    def token_spans(self, text: str, spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """Tokens `start:stop` of the encoded text that touch the characters `start:stop`."""
        if self._backend is None:
            return [self._slow_span(text, a, b) for a, b in spans]
        offsets = self._backend.encode(text, add_special_tokens=self._special).offsets
        out = []
        for a, b in spans:
            touched = [i for i, (lo, hi) in enumerate(offsets) if lo < b and hi > a]
            out.append((touched[0], touched[-1] + 1) if touched else (0, 0))
        return out

    def special_strings(self) -> list[str]:
        """Strings that the tokenizer turns into control tokens."""
        added = getattr(self._tokenizer, "added_tokens_decoder", {})
        named = getattr(self._tokenizer, "all_special_tokens", [])
        return sorted({str(t.content) for t in added.values() if t.special} | {str(t) for t in named})

    def _slow_span(self, text: str, start: int, stop: int) -> tuple[int, int]:
        """Without offsets: tokens that stay what they are when the text goes on end before its end."""
        whole = self.encode(text)
        head, upto = self.encode(text[:start]), self.encode(text[:stop])
        shared, last = _common(head, whole), _common(upto, whole)
        return shared, last + (last < len(upto))

    def _size(self, text: str) -> int:
        """Tokens of a piece of text by itself."""
        return len(self._raw(text, False))

    def _raw(self, text: str, special: bool) -> list[int]:
        if self._backend is not None:
            return self._backend.encode(text, add_special_tokens=special).ids
        return self._tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]

    def _count_closing(self) -> int:
        """How many special tokens the tokenizer puts after a text (EOS, for some)."""
        if not self._special:
            return 0
        bare, full = self._raw("a", False), self._raw("a", True)
        start = next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), 0)
        return len(full) - start - len(bare)


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the common beginning."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
