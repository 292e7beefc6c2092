"""Samples with a common haystack: what they share is read once, with the outcomes of whole passes, or not at all."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from dataclasses import replace
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from qkguard.errors import QKGuardError
from qkguard.probe.passes import LastLogits, Past, undisturbed
from qkguard.probe.prober import Prober
from qkguard.probe.results import ProbeResult
from qkguard.probe.samples import Sample
from qkguard.probe.scoring import score_batch
from qkguard.probe.settings import ProbeSettings
from qkguard.probe.shared_reading import TOLERANCE, Piece, SharedReading, common_pieces
from tests.probe.test_scoring import Ranks
from tests.support import zoo
from tests.support.models import tiny_model
from tests.support.probing import bpe_tokenizer, sample_of
from tests.support.stand_ins import DEMO

LENGTH, QUESTION = 96, 80
READ_ON = (
    *("llama", "gpt2", "bloom", "deepseek_v3", "gemma3_text", "gpt_oss", "llama4_text", "qwen3_next", "olmo_hybrid"),
    *("granitemoehybrid", "lfm2", "falcon_h1", "nemotron_h", "zamba2", "kimi_linear"),
)
"""Types whose caches can be copied and read on from: keys and values, latents, windows, chunks, recurrences."""
NOT_READ_ON = ("jamba", "bamba", "zamba", "minimax", "mamba", "prophetnet", "bert")
"""Types that read on wrongly, or refuse, or return no cache."""


def samples() -> list[Sample]:
    """Six that leave one text at four places, three of them for another one that they share."""
    rng = Random(0)

    def tokens(count: int) -> list[int]:
        return [rng.randrange(3, 200) for _ in range(count)]

    trunk, other = tokens(LENGTH), tokens(24)
    begun = [trunk[:20], trunk[:44], trunk[:44] + other, trunk[:44] + other, trunk[:44] + other, trunk[:75]]
    out = []
    for index, start in enumerate(begun):
        ids = start + tokens(LENGTH - len(start))
        out.append(replace(sample_of(ids[:-6], ids[-6:], index=index), question=QUESTION))
    return out


def score(model: nn.Module) -> tuple[Any, list[Any]]:
    """What comes of the samples read together, and one by one."""
    group, forward = samples(), LastLogits(model)
    with undisturbed(model):
        shared = SharedReading().score(forward, group, range(len(group)), None, batch_tokens=10**6)
        return shared, [score_batch(forward, [sample])[0] for sample in group]


def test_common_pieces() -> None:
    ids = torch.stack([s.ids for s in samples()])
    found = common_pieces(ids, [QUESTION] * len(ids))
    other = Piece((2, 3, 4), 44, 68, (2, 3, 4), ())
    trunk = Piece((1, 2, 3, 4, 5), 20, 44, (1, 5), (other,))  # 5 has no 16 tokens more in common with another
    assert found == Piece((0, 1, 2, 3, 4, 5), 0, 20, (0,), (trunk,))
    assert common_pieces(ids[:1], [QUESTION]) == Piece((0,), 0, QUESTION, (0,), ())
    twice = ids[[5, 5]]  # a question may be asked in the same words; it is read with its sample
    assert common_pieces(twice, [QUESTION, QUESTION]) == Piece((0, 1), 0, QUESTION, (0, 1), ())
    assert common_pieces(twice, [40, QUESTION]).stop == 40


@pytest.mark.parametrize("name", READ_ON)
def test_outcomes_are_those_of_whole_passes(name: str) -> None:
    shared, whole = score(zoo.tiny_model(name, "sdpa" if name not in ("bloom", "gpt_oss") else "eager"))
    assert shared is not None
    assert all(one.agrees_with(other, TOLERANCE) for one, other in zip(shared, whole, strict=True))
    assert not any(one.agrees_with(other, TOLERANCE) for one, other in zip(shared[1:], whole, strict=False))


@pytest.mark.parametrize("name", NOT_READ_ON)
def test_a_cache_that_cannot_be_read_on_from_is_noticed(name: str, caplog: pytest.LogCaptureFixture) -> None:
    shared, _ = score(zoo.tiny_model(name))
    assert shared is None
    (line,) = (record.getMessage() for record in caplog.records if record.name.startswith("qkguard"))
    assert line.startswith("The probe reads samples whole, although they share a haystack: ")


@pytest.mark.parametrize("name", ["llama", "qwen3_next"])
def test_a_cache_that_is_not_copied_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Past, "copied", lambda past: Past(past.cache, past.tokens))
    assert score(zoo.tiny_model(name, "sdpa"))[0] is None


def test_autocast_is_compared_with_the_tolerance_of_its_dtype() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        shared, whole = score(zoo.tiny_model("llama", "sdpa"))
    assert shared is not None
    assert not all(one.agrees_with(other, TOLERANCE) for one, other in zip(shared, whole, strict=True))


def test_weights_in_shards_and_chosen_tokens_are_read_whole() -> None:
    model = tiny_model("llama")
    assert SharedReading().is_possible(model)
    model.lm_head.weight.ds_tensor = torch.zeros(1)  # as DeepSpeed marks what it has divided
    assert not SharedReading().is_possible(model)
    for name in ("dots3_note_text", "deepseek_v32", "qwen4_exp_text"):
        assert not SharedReading().is_possible(zoo.tiny_model(name))


# -- through the prober


def prober(tokenizer: Any, **settings: Any) -> Prober:
    asked: dict[str, Any] = {"lengths": [300, 420], "tasks": ["s2", "mk1", "mk2", "mq"], "haystack_per": "length"}
    return Prober(tokenizer, ProbeSettings(**asked | settings))


def tokens_read(model: nn.Module, mine: Prober) -> tuple[ProbeResult, int]:
    """A result, and how many tokens went through the model for it."""
    read = []

    def count(module: nn.Module, args: Any, options: Any) -> None:
        read.append(options["input_ids"].numel())

    hook = model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        return mine.run(model), sum(read)
    finally:
        hook.remove()


def grids(result: ProbeResult) -> Iterator[float]:
    """Every number of attention."""
    assert result.attention is not None and result.retrieval is not None
    for kind in (result.attention.needle, result.attention.local, result.attention.distance):
        yield from (value for layers in kind.values() for heads in layers for value in heads)
    yield from (
        value for rows in (result.retrieval.answer, result.retrieval.question) for row in rows for value in row
    )


@pytest.mark.parametrize("chunk", [None, 64])
def test_a_probe_reads_less_and_finds_the_same(chunk: int | None) -> None:
    model = tiny_model("llama", vocab_size=1024, max_position_embeddings=512).eval()
    asked: dict[str, Any] = {"lengths": [420], "tasks": ["s2", "mk1"], "questions": True}
    mine = prober(bpe_tokenizer(), **asked, chunk=chunk)
    first, _ = tokens_read(model, mine)
    shared, read = tokens_read(model, mine)
    assert mine.sharing is not None and not mine.sharing.refused
    mine.sharing = None
    whole, all_tokens = tokens_read(model, mine)
    assert all_tokens == 20 * 419 and read < 0.6 * all_tokens
    for found in (first, shared):
        assert found.correct == whole.correct and found.logprob == pytest.approx(whole.logprob, abs=TOLERANCE)
        assert list(grids(found)) == pytest.approx(list(grids(whole)), rel=1e-4, abs=1e-5)
    other = prober(bpe_tokenizer(), **asked, seed=1).run(model)
    assert list(grids(other)) != pytest.approx(list(grids(whole)), rel=1e-4, abs=1e-5)


def test_ranks_read_their_own_samples_together() -> None:
    def work(rank: int, world: int, all_reduce: Any) -> ProbeResult:
        model = tiny_model("llama", vocab_size=1024, max_position_embeddings=512).eval()
        mine = prober(bpe_tokenizer(), lengths=[300], tasks=["s2", "mk1"], samples=1)  # of three ranks some have fewer
        mine.prepare(rank, world)
        found = mine.run(model, rank=rank, world=world, all_reduce=all_reduce)
        assert mine.sharing is not None and not mine.sharing.refused
        return found

    alone, ranks = work(0, 1, Tensor.clone), Ranks(3)
    for found in ranks.run(lambda rank: work(rank, 3, ranks.all_reduce)):
        assert found.correct == alone.correct and found.logprob == pytest.approx(alone.logprob, abs=TOLERANCE)
        assert found.attention is not None and alone.attention is not None
        assert found.attention.needle[300][0] == pytest.approx(alone.attention.needle[300][0], rel=1e-4)


def test_a_model_that_is_read_whole_after_all_gives_what_it_would_have_given() -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(DEMO).eval(), AutoTokenizer.from_pretrained(DEMO)
    mine, whole = (prober(tokenizer, samples=1) for _ in range(2))
    whole.sharing = None
    found, expected = mine.run(model), whole.run(model)
    assert mine.sharing is not None and mine.sharing.refused  # it reads on from its cache, and answers otherwise
    assert found.correct == expected.correct and 0 < sum(found.correct) < len(found.correct)
    assert found.logprob == pytest.approx(expected.logprob, abs=1e-5)
    assert found.attention is not None and expected.attention is not None
    assert found.attention.needle[420][0] == pytest.approx(expected.attention.needle[420][0], rel=1e-4)


def test_few_caches_are_held_and_none_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    held: weakref.WeakSet[Any] = weakref.WeakSet()
    most = 0
    original = Past.copied

    def copied(past: Past) -> Past:
        nonlocal most
        new = original(past)
        held.update(one.cache for one in (past, new) if one.cache is not None)
        most = max(most, len(held))
        return new

    monkeypatch.setattr(Past, "copied", copied)
    model = tiny_model("llama", vocab_size=1024, max_position_embeddings=512).eval()
    prober(bpe_tokenizer(), lengths=[420], tasks=["s2", "mk2"], depths=8, samples=4).run(model)
    gc.collect()
    assert 2 <= most <= 4 and not held


def test_a_haystack_per_something_else_is_refused() -> None:
    with pytest.raises(QKGuardError, match="Invalid haystack_per 'task': expected sample or length"):
        prober(bpe_tokenizer(), haystack_per="task")
