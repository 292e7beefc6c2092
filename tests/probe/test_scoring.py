"""Teacher forcing against transformers' own generation, other answer formats, and dividing over ranks."""

from __future__ import annotations

import threading
from collections.abc import Callable
from copy import deepcopy
from random import Random

import pytest
import torch
from torch import Tensor, nn

from qkguard.probe import answer_formats
from qkguard.probe.passes import LastLogits, check_chunks, undisturbed
from qkguard.probe.prober import Prober
from qkguard.probe.prompt import AnswerFormat, Encoder, make_template
from qkguard.probe.samples import plan
from qkguard.probe.scoring import divide, score_batch, score_retries
from qkguard.probe.settings import ProbeSettings
from tests.support.models import noised, tiny_model
from tests.support.probing import bpe_tokenizer, greedy_tokens, sample_of

ARCHITECTURES = ["llama", "gpt2", "minimax", "qwen3_next", "granitemoehybrid"]
LENGTH, ANSWER = 60, 9


def lively(name: str) -> nn.Module:
    """A tiny model with weights large enough for it to say different things."""
    return noised(tiny_model(name), seed=5, scale=0.15).eval()


def samples_around_generation(model: nn.Module, count: int = 12) -> list:
    """Prompts with the model's own greedy continuation as the answer, every second one spoilt at one place."""
    rng, out = Random(0), []
    for i in range(count):
        size = ANSWER - i % 3
        prompt = [rng.randrange(3, 256) for _ in range(LENGTH - size)]
        answer = greedy_tokens(model, prompt, size)
        if i % 2:
            at = rng.randrange(size)
            answer[at] = (answer[at] + 1 + rng.randrange(200)) % 256
        out.append(sample_of(prompt, answer, index=i))
    return out


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_verdict_is_what_generate_says(name: str) -> None:
    model = lively(name)
    samples = samples_around_generation(model)
    with undisturbed(model):
        outcomes = [o for i in range(0, 12, 4) for o in score_batch(LastLogits(model), samples[i : i + 4])]
    for sample, outcome in zip(samples, outcomes, strict=True):
        generated = greedy_tokens(model, sample.prompt.tolist(), sample.answer_size)
        assert outcome.correct == (generated == sample.answer.tolist())
        if not outcome.correct:  # where and how the model leaves the answer is what generation shows
            assert generated[: outcome.left_at] == sample.answer.tolist()[: outcome.left_at]
            assert generated[outcome.left_at] == outcome.said != sample.answer[outcome.left_at]
    assert [o.correct for o in outcomes] == [True, False] * 6
    assert sum(len(set(s.answer.tolist())) > 3 for s in samples) > 6  # not one token said again and again


@pytest.mark.parametrize("name", ["llama", "minimax"])
def test_logprob_is_that_of_the_full_logits(name: str) -> None:
    model = lively(name)
    samples = samples_around_generation(model, 4)
    with undisturbed(model):
        outcomes = score_batch(LastLogits(model), samples)
        for sample, outcome in zip(samples, outcomes, strict=True):
            logits = model(input_ids=sample.ids[None].long()).logits[0].double()
            rows = logits.log_softmax(-1)[-sample.answer_size - 1 : -1]
            expected = rows[range(sample.answer_size), sample.answer.long()].mean()
            assert outcome.logprob == pytest.approx(float(expected), abs=1e-5)
            shifted = logits.log_softmax(-1)[-sample.answer_size :][range(sample.answer_size), sample.answer.long()]
            assert abs(float(shifted.mean()) - outcome.logprob) > 1e-3  # the next row would be another number


def test_only_the_answers_logits_are_computed() -> None:
    model = tiny_model("llama").eval()
    shapes = []
    model.lm_head.register_forward_hook(lambda module, args, out: shapes.append(tuple(out.shape)))
    with undisturbed(model):
        score_batch(LastLogits(model), samples_around_generation(model, 4))
    assert shapes[-1] == (4, ANSWER, 256)


def test_adapters_are_probed_through_their_wrapper() -> None:
    from peft import LoraConfig, get_peft_model

    base = lively("llama")
    samples = samples_around_generation(base, 4)
    adapted = get_peft_model(base, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    shapes = []
    base.lm_head.register_forward_hook(lambda module, args, out: shapes.append(tuple(out.shape)))
    with undisturbed(adapted):
        outcomes = score_batch(LastLogits(adapted), samples)
    assert [o.correct for o in outcomes] == [True, False] * 2 and shapes == [(4, ANSWER, 256)]


def test_not_a_number_is_no_answer() -> None:
    model = tiny_model("llama").eval()
    samples = samples_around_generation(model, 2)
    with torch.no_grad():
        model.lm_head.weight[5] = torch.nan
    with undisturbed(model):
        outcomes = score_batch(LastLogits(model), samples)
    assert not any(o.correct for o in outcomes) and all(o.logprob != o.logprob for o in outcomes)


@pytest.mark.parametrize("name", ["llama", "minimax", "qwen3_next"])
def test_greedy_is_generation_whatever_is_proposed(name: str) -> None:
    model = lively(name)
    rng = Random(1)
    prompts = [[rng.randrange(3, 256) for _ in range(n)] for n in (40, 43, 45)]
    truth = [greedy_tokens(model, p, 12) for p in prompts]

    def half_right(i: int, done: list[int]) -> list[int]:
        guess = truth[i][len(done) :][:5]
        return guess[:3] + [7] * 3

    for propose, passes, least in ((half_right, 3, 9), (lambda i, done: [], 6, 6), (lambda i, done: [9, 9], 6, 6)):
        with undisturbed(model):
            out = answer_formats.greedy(LastLogits(model), [torch.tensor(p) for p in prompts], propose, passes, 60)
        for said, true in zip(out, truth, strict=True):
            assert len(said) >= least and said[:12] == true[: len(said)]


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "granitemoehybrid", "qwen3_next"])
def test_reading_in_chunks_gives_the_same_logits(name: str) -> None:
    model = tiny_model(name).eval()
    ids = torch.randint(3, 256, (2, 77), generator=torch.Generator().manual_seed(0))
    with undisturbed(model):
        whole = LastLogits(model)(ids, 9)
        for chunk in (10, 16, 76):
            seen: list[int] = []
            parts = LastLogits(model, chunk)(ids, 9, seen.append)
            assert torch.allclose(parts, whole, atol=1e-4) and parts.shape == whole.shape
            assert (
                seen[-1] == 77
                and len(seen) > 1
                and max(b - a for a, b in zip([0, *seen], seen, strict=False)) <= chunk
            )
        assert check_chunks(model, ids, 16, 9) < 1e-3
        assert not torch.allclose(LastLogits(model)(ids[:, 1:], 9), whole, atol=1e-4)  # a token less is another result


def test_a_cache_that_cannot_be_gone_on_from_is_noticed() -> None:
    model = lively("minimax")  # its softmax layers' mask forgets the past when more than one token follows
    ids = torch.randint(3, 256, (2, 77), generator=torch.Generator().manual_seed(0))
    with undisturbed(model):
        assert check_chunks(model, ids, 16, 9) > 0.05

        def refuse(module: nn.Module, args: tuple, options: dict) -> None:
            if options["use_cache"]:
                raise NotImplementedError

        model.register_forward_pre_hook(refuse, with_kwargs=True)
        assert check_chunks(model, ids, 16, 9) == 1.0


# --- answer formats


def encoder() -> Encoder:
    tokenizer = bpe_tokenizer()
    return Encoder(tokenizer, make_template(tokenizer))


@pytest.mark.parametrize("form", [*answer_formats.BEFORE, " -> "])
def test_formats_are_read_from_continuations(form: str) -> None:
    text = AnswerFormat(form).render(["1234567"])
    assert answer_formats.read_format(text + ". And so", ["1234567"]) == (AnswerFormat(form), True)
    if form.strip(" \n"):
        assert answer_formats.read_format(form + "7654321", ["1234567"]) in ((AnswerFormat(form), False), None)


def test_list_formats_are_read() -> None:
    values = ["1111111", "2222222", "3333333"]
    for joiner, last in answer_formats.BETWEEN:
        form = AnswerFormat(": ", joiner, last)
        assert answer_formats.read_format(form.render(values) + ".", values) == (form, True)
    assert answer_formats.read_format(": 1111111; 2222222; 9", values) == (AnswerFormat(": ", "; ", ", and "), False)
    assert answer_formats.read_format("I do not know", values) is None


def test_the_commonest_right_format_is_elected() -> None:
    colon, blank = AnswerFormat(": "), AnswerFormat(" ")
    assert answer_formats.elect([(colon, True), (blank, False), (blank, False), (blank, False)]) == (colon, 1)
    assert answer_formats.elect([(colon, False), None, (blank, False), (colon, False)]) == (colon, 2)
    assert answer_formats.elect([None]) == (AnswerFormat(), 0)


def test_drafts_go_on_where_a_text_stopped() -> None:
    enc = encoder()
    values = ["1234567", "7654321"]
    for text, following in (
        ("", " 1234567, and 7654321"),
        (":", " 1234567, and 7654321"),
        (": **12", "34567, and 7654321"),
        (": 1234567", ", 7654321"),
        (": 1234567,", " 7654321"),
        (": 1234567, 7654321.", ""),
    ):
        assert enc.decode(answer_formats.draft(enc, "provided text is", text, values)) == following


def test_another_format_is_found_by_the_token_that_leaves_the_first() -> None:
    enc = encoder()
    make = Prober(bpe_tokenizer(), ProbeSettings(lengths=[300], depths=1, samples=1, tasks=["s1"])).maker
    sample = make.make(plan(["s1"], [300], 1, 1)[0])
    value = sample.answers[0]
    for form in (": ", ":\n", " **"):
        mine, other = sample.answer.tolist(), enc.answer_ids(sample.prefix, form + value)
        at = next(i for i, (a, b) in enumerate(zip(mine, other, strict=False)) if a != b)
        found = answer_formats.other_format(enc, sample, AnswerFormat(), at, other[at])
        assert found is not None and found[1][: at + 1] == other[: at + 1]
        assert enc.decode(found[1]).endswith(value)
    wrong = next(
        t
        for t in range(5, 40)
        if t not in {enc.answer_ids(sample.prefix, b + value)[0] for b in answer_formats.BEFORE}
    )
    assert answer_formats.other_format(enc, sample, AnswerFormat(), 0, wrong) is None
    spoilt = 17 if mine[-1] != 17 else 18
    assert (
        answer_formats.other_format(enc, sample, AnswerFormat(), len(mine) - 1, spoilt) is None
    )  # a wrong value is wrong


class Oracle(nn.Module):
    """A model that answers probe samples with scripted texts: what it says depends on the prompt alone."""

    def __init__(self, prober: Prober, says: Callable[[int, str], str]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.calls: list[tuple[int, ...]] = []
        self.script = {}
        for i, key in enumerate(prober.sample_keys):
            sample = prober.maker.make(key)
            text = says(i, sample.answers[0]) + " and so on and so on and so on"
            self.script[tuple(sample.prompt.tolist()[-200:])] = prober.maker.encoder.answer_ids(sample.prefix, text)

    def forward(self, input_ids: Tensor, use_cache: bool = False, logits_to_keep: int = 0) -> object:
        self.calls.append(tuple(input_ids.shape))
        logits = torch.zeros(*input_ids.shape, 1024)
        for row, ids in enumerate(input_ids.tolist()):
            for end in range(len(ids), 200, -1):
                answer = self.script.get(tuple(ids[end - 200 : end]))
                if answer is not None:
                    for k, token in enumerate(answer):
                        if end - 1 + k < len(ids) and ids[end : end + k] == answer[:k]:
                            logits[row, end - 1 + k, token] = 9.0
        return type("Out", (), {"logits": logits[:, -logits_to_keep:]})()


def oracle_prober() -> Prober:
    return Prober(
        bpe_tokenizer(), ProbeSettings(lengths=[300, 310], depths=2, samples=5, tasks=["s1"], attention=False)
    )


def scripted(i: int, value: str) -> str:
    """Five of twenty wrong at some digit, five with a blank, ten with a colon; one with unheard-of words."""
    if i % 4 == 0:
        at = i // 4 % 7
        return ": " + value[:at] + str((int(value[at]) + 1) % 10) + value[at + 1 :]
    return "... hm, " + value if i == 19 else (" " if i % 4 == 1 else ": ") + value


def test_a_model_that_mixes_formats_is_scored_in_each() -> None:
    prober = oracle_prober()
    model = Oracle(prober, scripted)
    found = prober.find_formats(model)
    assert found["single_1"].before in (" ", ": ") and prober.formats_seen["single_1"].endswith("of 4")
    result = prober.run(Oracle(prober, scripted))
    assert list(result.correct) == [i % 4 != 0 and i != 19 for i in range(20)]
    assert result.other_formats in (5, 9)  # those with a blank, or those with a colon
    one_format = prober.run(Oracle(prober, lambda i, v: " " + v if i % 2 else "no"))
    assert list(one_format.correct) == [bool(i % 2) for i in range(20)]


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_every_sample_is_scored_once_and_ranks_keep_step(world: int) -> None:
    keys = plan(["s1", "s2"], [256, 512, 700], 3, 3)[: 54 - world]
    shares = [divide(keys, rank, world, 1100) for rank in range(world)]
    shapes = [[(b[0].key.length, len(b)) for b in batches] for batches in shares]
    assert all(s == shapes[0] for s in shapes)
    assert max(length * count for length, count in shapes[0]) <= 1100
    places = [j.place for batches in shares for b in batches for j in b if j.place is not None]
    assert sorted(places) == list(range(len(keys)))
    assert all(len({j.key.length for j in b}) == 1 for batches in shares for b in batches)
    assert all(keys[j.place] == j.key for batches in shares for b in batches for j in b if j.place is not None)


class Ranks:
    """Ranks as threads that take turns: one runs until its next all-reduce."""

    def __init__(self, world: int) -> None:
        self.world, self.sums, self.arrived = world, [], threading.Barrier(world)
        self.turn = threading.Lock()

    def all_reduce(self, vector: Tensor) -> Tensor:
        self.turn.release()
        if self.arrived.wait() == 0:
            self.sums = []
        self.arrived.wait()
        self.sums.append(vector)
        self.arrived.wait()
        total = torch.stack(self.sums).sum(0)
        self.arrived.wait()
        self.turn.acquire()
        return total

    def run(self, work: Callable[[int], object]) -> list:
        out: list = [None] * self.world

        def body(rank: int) -> None:
            with self.turn:
                out[rank] = work(rank)

        threads = [threading.Thread(target=body, args=(r,), daemon=True) for r in range(self.world)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        torch.compiler.set_stance("default")  # the threads' contexts were left in another order than entered
        return out


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_together_find_what_one_process_finds(world: int) -> None:
    def work(rank: int, size: int, all_reduce: Callable[[Tensor], Tensor]) -> tuple:
        prober = oracle_prober()
        model = Oracle(prober, scripted)
        prober.prepare(rank, size)
        prober.find_formats(model, rank=rank, world=size, all_reduce=all_reduce)
        result = prober.run(model, rank=rank, world=size, all_reduce=all_reduce)
        return result, model.calls

    (alone, _) = work(0, 1, lambda v: v)
    ranks = Ranks(world)
    results = ranks.run(lambda rank: work(rank, world, ranks.all_reduce))
    for result, calls in results:
        assert calls == results[0][1] and len(calls) > 4
        assert result.correct == alone.correct and result.other_formats == alone.other_formats
        assert result.logprob == pytest.approx(alone.logprob, abs=1e-12)
        assert result.settings == alone.settings


def test_batching_does_not_change_results() -> None:
    tokenizer = bpe_tokenizer()
    model = tiny_model("minimax", vocab_size=1024, max_position_embeddings=1024).eval()
    options = {"lengths": [300], "depths": 2, "samples": 2, "tasks": ["s1"], "local_window": 16}
    one = Prober(tokenizer, ProbeSettings(**options, batch_tokens=1)).run(model)
    four = Prober(tokenizer, ProbeSettings(**options, batch_tokens=4000)).run(deepcopy(model))
    assert one.logprob == pytest.approx(four.logprob, abs=1e-5)
    assert torch.allclose(torch.tensor(one.attention.needle[300]), torch.tensor(four.attention.needle[300]), atol=1e-6)


def test_retries_are_scored_like_first_tries() -> None:
    model = tiny_model("minimax").eval()
    samples = samples_around_generation(model, 6)
    with undisturbed(model):
        first = score_batch(LastLogits(model), samples)
        again = score_retries(LastLogits(model), [(s, s.answer.tolist()) for s in samples], LENGTH)
    for a, b in zip(first, again, strict=True):
        assert (a.correct, a.left_at, a.said) == (b.correct, b.left_at, b.said)
        assert a.logprob == pytest.approx(b.logprob, abs=1e-5)
