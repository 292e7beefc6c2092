"""For probe tests: small tokenizers made on the spot, and models that answer some samples and not others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from random import Random
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import PreTrainedTokenizerFast

from qkguard.probe import scoring
from qkguard.probe.prober import Prober
from qkguard.probe.prompt import AnswerFormat
from qkguard.probe.results import ProbeResult
from qkguard.probe.samples import Sample, SampleKey
from qkguard.probe.scoring import Outcome
from qkguard.probe.tasks import TASKS, example
from qkguard.training.recall_monitor import RecallMonitor

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]


@cache
def _trained() -> str:
    """A byte-level BPE trained on the tasks' own text; digits are single tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    texts = [example(task, Random(i), 30)[0] for task in TASKS.values() for i in range(8)]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=700, special_tokens=SPECIAL, initial_alphabet=alphabet)
    )
    return tokenizer.to_str()


def bpe_tokenizer(chat_template: str | None = None, closing: bool = False, merge_digits: bool = False) -> Any:
    """`closing` adds <s> before and </s> after every text; `merge_digits` leaves no digit tokens to themselves."""
    tokenizer = Tokenizer.from_str(_trained())
    if merge_digits:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if closing:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    return _wrap(tokenizer, chat_template)


def byte_tokenizer() -> Any:
    """Every byte is a token."""
    tokenizer = Tokenizer.from_str(_trained())
    vocabulary = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    bare = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    bare.pre_tokenizer, bare.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), tokenizer.decoder
    return PreTrainedTokenizerFast(tokenizer_object=bare)


def word_tokenizer() -> Any:
    """Words, digits and signs, each with the blank before it: a word-level tokenizer that decodes what it encoded."""
    pattern = Regex(r" ?[A-Za-z]+| ?[0-9]|\n| ?[^A-Za-z0-9\s]| ")
    split = pre_tokenizers.Split(pattern, "isolated")
    words: set[str] = {"[UNK]"}
    for task in TASKS.values():
        for i in range(20):
            prompt, answers = example(task, Random(i), 40)
            words |= {piece for piece, _ in split.pre_tokenize_str(f"{prompt} {', and '.join(answers)}")}
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(sorted(words))}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer, tokenizer.decoder = split, decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


def _wrap(tokenizer: Tokenizer, chat_template: str | None) -> Any:
    out = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=SPECIAL[3:],
    )
    if chat_template is not None:
        out.chat_template = chat_template
    return out


def sample_of(prompt: list[int], answer: list[int], needle: tuple[int, int] = (0, 1), index: int = 0) -> Sample:
    """A sample made of bare token ids."""
    ids = torch.tensor([*prompt, *answer], dtype=torch.int32)
    key = SampleKey(len(ids), "single_1", 0.5, index)
    return Sample(key, AnswerFormat(), ids, len(answer), 0, (needle,), ("1234567",), "is")


def greedy_tokens(model: nn.Module, prompt: list[int], count: int) -> list[int]:
    """The first tokens of transformers' own greedy generation, whatever they are."""
    out = model.generate(  # type: ignore[operator]
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return out[0, len(prompt) :].tolist()


def pretend(patch: Any, verdict: Callable[[int, SampleKey], bool]) -> list[int]:
    """Let a tiny model find needles: sample `key` of the n-th pass (from 0) is right where `verdict(n, key)` says so.

    `patch`: pytest's monkeypatch. The list that is returned has an entry, its number of samples, for every pass.
    """
    original, passes = Prober.run, []

    def run(self: Prober, *args: Any, **options: Any) -> ProbeResult:
        number = len(passes)
        passes.append(0)
        found = original(self, *args, **options)
        passes[number] = len(found.sample_keys)
        return replace(found, correct=tuple(verdict(number, key) for key in found.sample_keys))

    patch.setattr(Prober, "run", run)
    return passes


def no_floor(patch: Any) -> None:
    """Let trainings be probed on, although a tiny model of random weights finds no needles before them."""
    patch.setattr(RecallMonitor, "at_floor", False)


def all_right(patch: Any) -> None:
    """Let every answer count as right where it is scored, so that the heads' scores are of all samples."""

    def right(logits: Any, answer: Any, lead: int) -> Outcome:
        return Outcome(True, -0.1)

    patch.setattr(scoring, "_judge", right)


@torch.no_grad()
def with_retrieval_head(model: Any, tokens: Sequence[int], layer: int, head: int, gain: float = 1.2) -> Any:
    """A llama in which one head looks at these tokens wherever they are, and no other head has a purpose.

    Two dimensions of the embeddings say "a token" and "one of these"; the head's queries read the first, its keys the
    second. Both are written to the pair of dimensions that rotary embedding turns least.
    """
    embedding = model.get_input_embeddings().weight
    embedding[:, :2] = torch.tensor([1.0, 0.0])
    embedding[list(tokens), 1] = 1.0
    attention = model.model.layers[layer].self_attn
    size, groups = attention.head_dim, attention.num_key_value_groups
    for weight, number, reads in ((attention.q_proj.weight, head, 0), (attention.k_proj.weight, head // groups, 1)):
        rows = weight[number * size : (number + 1) * size]
        rows.zero_()
        rows[size // 2 - 1, reads] = gain
    return model


def always(number: int, key: SampleKey) -> bool:
    """A verdict for `pretend`: every needle is found."""
    return True


@torch.no_grad()
def damaged(model: nn.Module, damage: float, seed: int = 0) -> nn.Module:
    """Noise on the queries and keys of the softmax layers, in units of their own spread."""
    generator = torch.Generator().manual_seed(seed)
    for name, param in model.named_parameters():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            param += damage * param.std() * torch.randn(param.shape, generator=generator)
    return model


def damage_until_some_are_wrong(model: nn.Module, prober: Prober, step: float) -> float:
    """Add noise until 30 to 80% of the answers are wrong; the share of right ones."""
    for seed in range(20):
        recall = prober.run(damaged(model, step, seed)).recall
        if recall <= 0.7:
            assert recall >= 0.2, recall
            return recall
    raise AssertionError("the model recalls whatever is done to it")
