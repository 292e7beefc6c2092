"""Pretraining batches for the demo's model, composed on the GPU from text that was tokenised once.

Needle-in-a-haystack rows have the wording of `qkguard.probe.tasks`, token for token: its templates are tokenised here
and their keys and digits turned into slots. Worked arithmetic comes as text from `qkguard.demo.arithmetic`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from random import Random

import torch
from torch import Tensor

from qkguard.demo.arithmetic import problems
from qkguard.probe import haystack, tasks

KEY, VALUE = f"{tasks.ADJECTIVES[0]}-{tasks.NOUNS[0]}", "1234567"
HAYSTACKS = ("noise", "prose", "babble")


@dataclass(frozen=True)
class Pool:
    """Texts end to end. `ids` (n,) long, `mask` (n,) bool for answer tokens, `starts` where texts begin."""

    ids: Tensor
    mask: Tensor
    starts: Tensor

    def windows(self, rows: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Random windows that begin with a text: positions (rows, length) and the first of each (rows,)."""
        fitting = int(torch.searchsorted(self.starts, self.ids.numel() - length))
        if not fitting:
            raise ValueError(f"a pool of {self.ids.numel()} tokens has no window of {length}")
        pick = torch.randint(fitting, (rows,), device=self.ids.device, generator=generator)
        first = self.starts[pick]
        return first[:, None] + torch.arange(length, device=self.ids.device), first


def make_pool(texts: Iterable[tuple[list[int], int]], device: str) -> Pool:
    """Pool of (token ids, index from which on they are an answer) pairs."""
    ids: list[int] = []
    mask: list[bool] = []
    starts: list[int] = []
    for tokens, answer in texts:
        starts.append(len(ids))
        ids += tokens
        mask += [False] * answer + [True] * (len(tokens) - answer)
    return Pool(*(torch.tensor(x, device=device) for x in (ids, mask, starts)))


def corpus() -> list[str]:
    """One text of every kind the model meets: the tokenizer's vocabulary is the words in it."""
    rng = Random(0)
    prompts = [tasks.example(task, rng, units=1)[0] for task in tasks.TASKS.values() if task.value_kind == "numbers"]
    chain = next(problems(0))
    return [*tasks.vocabulary(), *prompts, tasks.NOISE, chain.prompt, chain.completion, *chain.book]


class Batches:
    """Rows of token ids with a mask of the answers in them, both (rows, length), drawn from one seeded generator."""

    def __init__(self, tokenizer, device: str, seed: int, size: int = 1_000_000, easy: tuple[int, int] = (2, 3)):
        self.device, self.bos, self.eos = device, tokenizer.bos_token_id, tokenizer.eos_token_id
        self.generator = torch.Generator(device).manual_seed(seed)
        self._encode = lambda texts: tokenizer(list(texts), add_special_tokens=False).input_ids
        self._templates(tokenizer)
        ids = tokenizer.convert_tokens_to_ids
        self.adjectives = torch.tensor(ids(tasks.ADJECTIVES), device=device)
        self.nouns = torch.tensor(ids(tasks.NOUNS), device=device)
        self.digits = torch.tensor(ids(list("0123456789")), device=device)
        count = size // 10
        sentences = self._encode(islice(haystack.generated_prose(Random(seed)), count))
        noise = self._encode([tasks.NOISE]) * 1000
        self.pools = {
            "noise": make_pool(((s, len(s)) for s in noise), device),
            "prose": make_pool(((s, len(s)) for s in sentences), device),
            "babble": make_pool(((s, len(s)) for s in _babble(tokenizer, Random(seed + 1), count)), device),
            "book": self._documents(c.book for c in islice(problems(seed + 2, (3, 8)), size // 80)),
            "exam": self._documents((c.prompt, c.completion) for c in islice(problems(seed + 3, easy), size // 400)),
        }

    def _templates(self, tokenizer) -> None:
        task = tasks.find_task("single_2")
        needle = tasks.NEEDLE.format(kind="numbers", key=KEY, value=VALUE)
        sample = tasks.TextSample(task, ((needle, 0.0),), 1, (KEY,), (VALUE,))
        texts = sample.opening, needle, f"{sample.question} {sample.answer_prefix} {VALUE}."
        self.opening, self.needle, self.question = (torch.tensor(t, device=self.device) for t in self._encode(texts))
        adjective, noun = tokenizer.convert_tokens_to_ids(KEY.split("-"))
        self.slots = {}
        for name, template in (("needle", self.needle), ("question", self.question)):
            value = int((template == tokenizer.convert_tokens_to_ids(VALUE[0])).nonzero()[0])
            self.slots[name] = (template == adjective).nonzero()[:, 0], (template == noun).nonzero()[:, 0], value

    def _documents(self, pairs: Iterable[tuple[str, str]]) -> Pool:
        prompts, answers = zip(*pairs, strict=True)
        texts = zip(self._encode(prompts), self._encode(answers), strict=True)
        return make_pool((([self.bos, *p, *a, self.eos], 1 + len(p)) for p, a in texts), self.device)

    def _fill(self, name: str, template: Tensor, key: tuple[Tensor, Tensor], value: Tensor) -> Tensor:
        """`template` with keys and values (..., 7) in its slots: (..., tokens)."""
        at_adjective, at_noun, at_value = self.slots[name]
        out = template.expand(*value.shape[:-1], -1).clone()
        out[..., at_adjective] = key[0][..., None]
        out[..., at_noun] = key[1][..., None]
        out[..., at_value : at_value + value.shape[-1]] = value
        return out

    def needles(self, rows: int, length: int, haystack: str, keys: int, asked: int) -> tuple[Tensor, Tensor]:
        """Prompts with `keys` needles at sentence boundaries, of which `asked` are asked for one after the other."""
        gen, dev = self.generator, self.device
        pairs = torch.rand(rows, len(self.adjectives) * len(self.nouns), device=dev, generator=gen).topk(keys).indices
        key = self.adjectives[pairs // len(self.nouns)], self.nouns[pairs % len(self.nouns)]
        value = torch.randint(10, (rows, keys, len(VALUE)), device=dev, generator=gen)
        value[..., 0] = value[..., 0].clamp(min=1)  # seven digits, never with a leading zero
        value = self.digits[value]
        body = length - 2 - len(self.opening) - asked * len(self.question)
        text = self._weave(haystack, self._fill("needle", self.needle, key, value), body)
        order = torch.rand(rows, keys, device=dev, generator=gen).argsort(1)[:, :asked]
        chosen = tuple(half.gather(1, order) for half in key)
        answers = value.gather(1, order[..., None].expand(-1, -1, len(VALUE)))
        questions = self._fill("question", self.question, chosen, answers)
        answer = torch.zeros_like(questions, dtype=torch.bool)
        answer[..., self.slots["question"][2] :][..., : len(VALUE)] = True
        ends = torch.tensor([self.bos, self.eos], device=dev).expand(rows, 2)
        ids = torch.cat([ends[:, :1], self.opening.expand(rows, -1), text, questions.flatten(1), ends[:, 1:]], 1)
        mask = torch.zeros_like(ids, dtype=torch.bool)
        mask[:, -1 - questions[0].numel() : -1] = answer.flatten(1)
        return ids, mask

    def _weave(self, haystack: str, needles: Tensor, length: int) -> Tensor:
        """`length` tokens of haystack with `needles` (rows, keys, tokens) put in at sentence boundaries."""
        rows, keys, size = needles.shape
        pool, straw = self.pools[haystack], length - keys * size
        if straw < 0:
            raise ValueError(f"{keys} needles of {size} tokens do not fit into {length}")
        positions, first = pool.windows(rows, straw, self.generator)
        wish = first[:, None] + torch.randint(straw + 1, (rows, keys), device=self.device, generator=self.generator)
        boundary = pool.starts[torch.searchsorted(pool.starts, wish).clamp(max=len(pool.starts) - 1)]
        at = (boundary - first[:, None]).clamp(0, straw).sort(1).values
        begin = at + size * torch.arange(keys, device=self.device)  # where each needle lands in the woven text
        here = torch.arange(length, device=self.device).expand(rows, -1)
        passed = torch.searchsorted(begin, here.contiguous(), right=True)  # needles begun at or before each position
        offset = here - begin.gather(1, (passed - 1).clamp(min=0))
        inside = (passed > 0) & (offset < size)
        flat = needles.flatten(1).gather(1, ((passed - 1) * size + offset).clamp(0, keys * size - 1))
        if not straw:
            return flat
        straws = pool.ids[positions].gather(1, (here - passed * size).clamp(0, straw - 1))
        return torch.where(inside, flat, straws)

    def arithmetic(self, rows: int, length: int, exam: float) -> tuple[Tensor, Tensor]:
        """Rows of packed worked examples; a share `exam` of the rows holds easy exam-style chains of thought."""
        out = []
        easy = torch.rand(rows, device=self.device, generator=self.generator) < exam
        for name in ("book", "exam"):
            pool = self.pools[name]
            positions, _ = pool.windows(rows, length, self.generator)
            out.append((pool.ids[positions], pool.mask[positions]))
        return tuple(torch.where(easy[:, None], b, a) for a, b in zip(*out, strict=True))  # type: ignore[return-value]


def _babble(tokenizer, rng: Random, count: int) -> list[list[int]]:
    """Sentences of a fixed random Markov chain over all words and letters, sprinkled with stray digits.

    The distractors the built-in prose lacks: numbers that are no needle, and key words outside of keys.
    """
    vocab = tokenizer.get_vocab()
    wordlike = sorted(index for piece, index in vocab.items() if piece.isalpha() and piece.isascii())
    digits, stop = [vocab[d] for d in "0123456789"], vocab["."]
    followers = {word: rng.sample(wordlike, 12) for word in wordlike}
    out = []
    for _ in range(count):
        word, sentence = rng.choice(wordlike), []
        for _ in range(rng.randint(4, 14)):
            if rng.random() < 0.08:
                sentence += rng.choices(digits, k=rng.choice((1, 1, 1, 3, 7)))
            sentence.append(word)
            word = followers[word][min(rng.randrange(12), rng.randrange(12))]
        out.append([*sentence, stop])
    return out
