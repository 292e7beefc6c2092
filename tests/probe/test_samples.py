"""Samples: exact lengths, canonical answers, needles where the spans say, nothing of the tokenizer's changed."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from hashlib import sha256
from itertools import pairwise
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest

from qkguard.errors import QKGuardError
from qkguard.probe.haystack import Prose, load_prose
from qkguard.probe.prober import Prober
from qkguard.probe.prompt import AnswerFormat, Encoder, make_template
from qkguard.probe.samples import Sample, SampleKey, SampleMaker, depths_of, plan
from qkguard.probe.settings import ProbeSettings
from qkguard.probe.tasks import TASKS
from tests.support.probing import CHATML, bpe_tokenizer, byte_tokenizer, word_tokenizer

TOKENIZERS = {
    "bpe": bpe_tokenizer,
    "chat": lambda: bpe_tokenizer(CHATML),
    "closing": lambda: bpe_tokenizer(closing=True),
    "merged-digits": lambda: bpe_tokenizer(merge_digits=True),
    "bytes": byte_tokenizer,
    "words": word_tokenizer,
}


def maker(
    tokenizer: Any, prose: Prose | None = None, seed: int = 0, mode: str = "auto", depths: Sequence[float] = ()
) -> SampleMaker:
    return SampleMaker(Encoder(tokenizer, make_template(tokenizer, mode)), prose or Prose(), seed, depths)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_lengths_are_exact_and_text_is_canonical(name: str, shared: bool) -> None:
    tokenizer = TOKENIZERS[name]()
    make = maker(tokenizer, depths=(0.0, 0.9) if shared else ())
    special = name != "chat"
    lengths = (1800, 1801) if name == "bytes" else (640, 641, 655)
    tasks = [t.name for t in TASKS.values() if name != "words" or t.value_kind == "numbers"]
    for key in plan(tasks, lengths, [0.0, 0.9], 1):
        sample = make.make(key)
        assert len(sample.ids) == key.length
        prompt = tokenizer.decode(sample.prompt.tolist(), skip_special_tokens=name == "closing")
        expected = tokenizer(prompt, add_special_tokens=special)["input_ids"]
        assert sample.prompt.tolist() == (expected[:-1] if name == "closing" else expected)
        assert tokenizer.decode(sample.answer.tolist()) == AnswerFormat().render(sample.answers)
        value = tokenizer.decode(sample.answer[sample.lead :].tolist()).lstrip(" ")
        assert value.startswith(sample.answers[0])
        for (start, stop), answer in zip(sample.needles, sorted(sample.answers), strict=True):
            sentence = tokenizer.decode(sample.ids[start:stop].tolist())
            assert sentence.strip().startswith("One of the special magic") and sentence.strip().endswith(".")
            assert answer in prompt
        told = "".join(tokenizer.decode(sample.ids[a:b].tolist()) for a, b in sample.needles)
        assert all(answer in told for answer in sample.answers)
        asked, prefix = tokenizer.decode(sample.ids[list(sample.question_rows)].tolist()), sample.prefix
        assert asked.strip().startswith("What") and prefix[:-4] in asked and sample.answers[0] not in asked
        assert sample.question_rows[-1] + 1 == sample.answer_rows[0] and sample.answer_rows[-1] == key.length - 2


def test_plain_tokenizers_get_their_opening_but_no_closing_token() -> None:
    sample = maker(bpe_tokenizer(closing=True)).make(SampleKey(300, "single_1", 0.5, 0))
    assert sample.ids[0] == 1 and 2 not in sample.ids.tolist()


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("task", ["single_2", "multikey_1", "multikey_2"])
def test_depths_are_spread_over_the_tokens(task: str, shared: bool) -> None:
    make = maker(bpe_tokenizer(), depths=depths_of(5) if shared else ())
    keys = plan([task], [2000], 5, 2)
    starts = [make.make(c).needles[0][0] for c in keys]
    for start, key in zip(starts, keys, strict=True):
        assert start == pytest.approx(30 + key.depth * 1900, abs=90)


def test_what_decides_a_sample_is_what_it_was() -> None:
    """Files of earlier runs are continued by this digest, and compared on these samples."""
    mine = Prober(byte_tokenizer(), ProbeSettings([2000, 2001], depths=3, samples=2, tasks=list(TASKS), seed=3))
    ids = repr([mine.maker.make(key).ids.tolist() for key in mine.sample_keys])
    assert mine.maker.digest(mine.sample_keys) == "cc8c0c6b14799086"
    assert sha256(ids.encode()).hexdigest()[:16] == "128bd635920aba60"


def test_samples_of_one_length_share_what_they_can() -> None:
    tokenizer = bpe_tokenizer()
    depths = depths_of(5)
    apart, shared = maker(tokenizer), maker(tokenizer, depths=depths)
    keys = plan(["single_2"], [1000], depths, 2)
    for one, other in pairwise(keys[2:]):  # the deeper one leaves the common text at its needle, or before
        assert common(apart.make(one), apart.make(other)) < 60
        least = min(shared.make(key).needles[0][0] for key in (one, other))
        assert least <= common(shared.make(one), shared.make(other)) <= least + 12
    keys = plan(["multikey_1", "multikey_2"], [1000], depths, 2)
    for task in ("multikey_1", "multikey_2"):
        asked = sorted((key for key in keys if key.task == task), key=attrgetter("index", "depth"))
        for first in (0, 4, 8):  # four at a time ask one text, of which only the end is cut to their questions' sizes
            group = [shared.make(key) for key in asked[first : first + 4]]
            assert all(common(group[0], sample) > 850 for sample in group[1:])
            text = tokenizer.decode(group[0].prompt.tolist())
            values = {sample.answers[0] for sample in group}
            assert len(values) == len(group) and all(text.count(value) == 1 for value in values)
    assert len({shared.digest(keys), apart.digest(keys), maker(tokenizer, depths=depths_of(6)).digest(keys)}) == 3


def common(one: Sample, other: Sample) -> int:
    """Tokens at the beginning that are the same."""
    return int((one.ids == other.ids).long().cumprod(0).sum())


def test_samples_depend_on_seed_and_cell_alone() -> None:
    tokenizer = bpe_tokenizer()
    keys = plan(["single_2", "multikey_1"], [400, 500], 3, 2)
    first = maker(tokenizer)
    whole = {c: first.make(c).ids.tolist() for c in keys}
    second = maker(tokenizer)
    random.seed(99)
    state = random.getstate()
    for key in reversed(keys[::3]):
        assert second.make(key).ids.tolist() == whole[key]
    assert random.getstate() == state
    assert second.digest(keys) == first.digest(keys)
    other = maker(tokenizer, seed=1)
    assert all(other.make(c).ids.tolist() != whole[c] for c in keys)
    assert other.digest(keys) != first.digest(keys)


def test_the_form_changes_the_answer_and_keeps_the_length() -> None:
    make = maker(bpe_tokenizer())
    key = SampleKey(333, "single_2", 0.5, 0)
    plain = make.make(key)
    make.formats["single_2"] = AnswerFormat(": **")
    bold = make.make(key)
    assert len(bold.ids) == 333 and bold.answers == plain.answers
    assert make.encoder.decode(bold.answer.tolist()) == f": **{plain.answers[0]}"
    assert make.encoder.decode(bold.answer[: bold.lead].tolist()) == ": **"


def test_the_tokenizer_is_left_alone() -> None:
    tokenizer = bpe_tokenizer()
    tokenizer("some words", truncation=True, max_length=1, padding="max_length")
    before = tokenizer.backend_tokenizer.to_str()
    sample = maker(tokenizer).make(SampleKey(300, "single_1", 0.5, 0))
    assert len(sample.ids) == 300
    assert tokenizer.backend_tokenizer.to_str() == before


def test_slow_tokenizers_work_too() -> None:
    class Slow:
        """The calls of a tokenizer without a fast backend."""

        chat_template = None
        is_fast = False
        all_special_tokens = ("<s>",)
        fast = bpe_tokenizer()

        def __call__(self, text: str, add_special_tokens: bool, verbose: bool) -> dict[str, list[int]]:
            return {"input_ids": self.fast(text, add_special_tokens=add_special_tokens)["input_ids"]}

        def decode(self, ids: list[int], **options: Any) -> str:
            return self.fast.decode(ids, **options)

    key = SampleKey(400, "multikey_1", 0.5, 0)
    slow, fast = maker(Slow()).make(key), maker(bpe_tokenizer()).make(key)
    assert slow.ids.tolist() == fast.ids.tolist() and slow.lead == fast.lead
    ((start, stop),) = slow.needles
    assert "One of the special magic" in Slow.fast.decode(slow.ids[start:stop].tolist())


def test_too_short_a_length_is_refused_with_the_least_that_works() -> None:
    with pytest.raises(
        QKGuardError, match=r"Probe length 60 is too short for single_1: .* take (\d+) tokens"
    ) as error:
        maker(bpe_tokenizer()).make(SampleKey(60, "single_1", 0.5, 0))
    least = int(str(error.value).split("take ")[1].split(" tokens")[0])
    assert len(maker(bpe_tokenizer()).make(SampleKey(least + 10, "single_1", 0.5, 0)).ids) == least + 10
    with pytest.raises(QKGuardError, match="too short"):  # another key may be some tokens shorter
        maker(bpe_tokenizer()).make(SampleKey(least - 10, "single_1", 0.5, 0))


def test_answers_that_the_tokenizer_cannot_spell_are_refused() -> None:
    make = maker(word_tokenizer())
    with pytest.raises(QKGuardError, match="cannot spell the answers of single_3"):
        for index in range(20):
            make.make(SampleKey(640, "single_3", 0.5, index))


def test_plans() -> None:
    keys = plan(["S1", "single_1", "mk1"], [512, 256], 3, 2)
    assert len(keys) == 2 * 2 * 3 * 2 and [c.length for c in keys] == [256] * 12 + [512] * 12
    assert {c.depth for c in keys} == {0.0, 0.5, 1.0}
    for bad in ({"depths": 0}, {"depths": [1.5]}, {"samples": 0}, {"tasks": []}, {"tasks": ["nope"]}):
        with pytest.raises(QKGuardError):
            plan(**{"tasks": ["S1"], "lengths": [256], "depths": 3, "samples": 1} | bad)


THINKING = {
    "opened": (
        CHATML.replace("assistant\n{% endif", "assistant\n<think>\n{% endif"),
        "<think>\n</think>\n\n",
        "prefilled",
    ),
    "switch": (
        CHATML.replace(
            "assistant\n{% endif", "assistant\n{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif"
        ),
        "<think>\n\n</think>\n\n",
        "template",
    ),
    "none": (CHATML, "<|im_start|>assistant\n", "none"),
}


@pytest.mark.parametrize("name", THINKING)
def test_thinking_templates_are_prefilled_past_the_thoughts(name: str) -> None:
    template, ending, thinking = THINKING[name]
    template = make_template(bpe_tokenizer(template))
    assert (template.mode, template.thinking) == ("chat", thinking)
    assert template.prompt("Q?", "The special").endswith(f"{ending}The special")
    assert "Q?<|im_end|>" in template.prompt("Q?", "A")


def test_modes() -> None:
    assert make_template(bpe_tokenizer()).mode == "plain"
    assert make_template(bpe_tokenizer(CHATML), "plain").prompt("Q?", "A") == "Q? A"
    with pytest.raises(QKGuardError, match="no chat template"):
        make_template(bpe_tokenizer(), "chat")
    with pytest.raises(QKGuardError, match="exactly once"):
        make_template(bpe_tokenizer("{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}"))


TEXT = "First sentence here. Second one!  Third\n\nwith <|im_end|> inside? " + "word " * 150


def test_haystack_sources(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    rows = [{"messages": [{"role": "user", "content": TEXT}]}]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    (tmp_path / "a.json").write_text(json.dumps({"text": TEXT}))
    sources = [TEXT, tmp_path / "a.txt", str(tmp_path / "a.jsonl"), tmp_path / "a.json", rows, [TEXT]]
    found = {load_prose(s, without=["<|im_end|>"]).sentences for s in sources}
    assert len(found) == 1
    sentences = found.pop()
    assert sentences[:3] == ("First sentence here.", "Second one!", "Third with inside?")
    assert max(len(s.split()) for s in sentences) == 60
    assert load_prose(tmp_path / "a.txt").origin == "a.txt" and load_prose(None).origin == "generated"


def test_haystack_text_is_used_in_order_and_starts_over() -> None:
    prose = load_prose("One a. Two b. Three c. Four d.")
    sample_text = bpe_tokenizer().decode(
        maker(bpe_tokenizer(), prose).make(SampleKey(400, "single_2", 0.0, 0)).ids.tolist()
    )
    assert "One a. Two b. Three c. Four d. One a. Two b." in sample_text


def test_prepared_training_data_is_decoded() -> None:
    tokenizer = bpe_tokenizer(CHATML)

    class Rows:
        """A data set whose rows come with random augmentation."""

        def __len__(self) -> int:
            return 4

        def __getitem__(self, at: int) -> dict[str, Any]:
            random.random()
            text = f"<|im_start|>user\nRow {at} of the data.<|im_end|>"
            return {"input_ids": tokenizer(text)["input_ids"], "completion_mask": [1, 0]}

    state = random.getstate()
    prober = Prober(tokenizer, ProbeSettings(lengths=[400], tasks=["s2"], haystack=Rows()))
    assert random.getstate() == state
    assert sorted(prober.maker.prose.sentences) == [f"user Row {i} of the data." for i in range(4)]
    assert prober.record()["haystack"] == "rows"
    text = tokenizer.decode(prober.maker.make(prober.sample_keys[0]).ids.tolist())
    assert "Row 2 of the data." in text and text.count("<|im_start|>") == 2


def test_processors_lend_their_tokenizer() -> None:
    class Processor:
        tokenizer = bpe_tokenizer(CHATML)
        chat_template = None

    key = SampleKey(400, "single_1", 0.5, 0)
    assert maker(Processor()).make(key).ids.tolist() == maker(bpe_tokenizer(CHATML)).make(key).ids.tolist()


def test_bad_haystacks(tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    (tmp_path / "ids.jsonl").write_text(json.dumps({"input_ids": [1, 2, 3]}))
    for source, message in (
        (tmp_path / "none.txt", "no such file"),
        ("no/such/file.txt", "no such file"),
        (tmp_path / "broken.json", "not valid"),
        (tmp_path / "a.parquet", "cannot read .parquet"),
        (tmp_path / "ids.jsonl", "no text found"),
    ):
        with pytest.raises(QKGuardError, match=message):
            load_prose(source)
