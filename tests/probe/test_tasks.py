"""The text of the tasks: RULER's wording, needles where they belong, seeds."""

from __future__ import annotations

import random
import re
from itertools import islice
from random import Random

import pytest

from qkguard.errors import QKGuardError
from qkguard.probe.haystack import generated_prose
from qkguard.probe.tasks import NOISE, TASKS, Task, draw, example, find_task, haystack_units, vocabulary, weave

# RULER's prompts as lm-evaluation-harness prints them for one needle and for several (key and value filled in).
ONE = (
    "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about the "
    "number afterwards.\n{context}\nWhat is the special magic number for {key} mentioned in the provided text? "
    "The special magic number for {key} mentioned in the provided text is"
)
MANY = (
    "Some special magic numbers are hidden within the following text. Make sure to memorize it. I will quiz you about "
    "the numbers afterwards.\n{context}\nWhat are all the special magic numbers for {key} mentioned in the provided "
    "text? The special magic numbers for {key} mentioned in the provided text are"
)
NEEDLE = re.compile(r"One of the special magic (?:numbers|uuids) for ([\w-]+) is: ([\w-]+)\.")


def test_wording_is_rulers_for_one_needle() -> None:
    prompt, (answer,) = example(TASKS["single_1"], Random(1), 3, depth=1.0)
    lines = prompt.split("\n")
    key = NEEDLE.fullmatch(lines[4]).group(1)
    assert lines[4] == f"One of the special magic numbers for {key} is: {answer}."
    assert prompt == ONE.format(context="\n".join([NOISE] * 3 + [lines[4]]), key=key)
    assert re.fullmatch(r"[1-9]\d{6}", answer)


def test_wording_is_rulers_for_several() -> None:
    prompt, answers = example(TASKS["multiquery"], Random(1), 6)
    context = prompt.split("\n")[1]
    found = dict(NEEDLE.findall(context))
    keys = re.search(r"for ((?:[\w-]+, ){3}and [\w-]+) mentioned", prompt).group(1)
    assert prompt == MANY.format(context=context, key=keys)
    assert [found[k] for k in keys.replace("and ", "").split(", ")] == list(answers)


def test_uuid_tasks_say_uuid() -> None:
    prompt, (answer,) = example(TASKS["single_3"], Random(1), 3)
    assert "A special magic uuid is hidden" in prompt and prompt.endswith("mentioned in the provided text is")
    assert re.fullmatch(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}", answer)


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda t: t.name)
def test_every_answer_is_found_under_its_key_and_once(task: Task) -> None:
    for seed in range(20):
        prompt, answers = example(task, Random(seed), 60)
        found = NEEDLE.findall(prompt)
        asked = re.search(r"for (.+) mentioned in the provided text (?:is|are)$", prompt.split("? ")[-1]).group(1)
        keys = asked.replace("and ", "").split(", ")
        assert len(answers) == task.values * task.queries
        assert [v for k in keys for key, v in found if key == k] == list(answers)
        expected = task.keys * task.values + (60 if task.haystack == "needles" else 0)
        assert len(found) == expected


@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 1.0])
def test_the_needle_lies_at_its_depth(depth: float) -> None:
    prompt, _ = example(TASKS["single_1"], Random(3), 100, depth=depth)
    lines = prompt.split("\n")[1:-1]
    at = next(i for i, line in enumerate(lines) if NEEDLE.fullmatch(line))
    assert at == round(depth * 100)


def test_depth_is_measured_in_sizes() -> None:
    sample = draw(TASKS["single_1"], Random(0), 0.5)
    text, ((start, stop),) = weave(["a", "b", "c"], sample, sizes=[10, 1, 1])
    assert text[start:stop] == sample.needles[0][0]
    assert text.split("\n")[1] == text[start:stop]  # 10 of 12 tokens lie in the first unit


def test_needles_asked_together_are_spread_and_in_reading_order() -> None:
    sample = draw(TASKS["multivalue"], Random(5), 0.1)
    depths = sorted(d for _, d in sample.needles)
    assert depths == pytest.approx([0.1, 0.35, 0.6, 0.85])
    text, spans = weave([NOISE] * 40, sample)
    assert [text[a:b] for a, b in spans] == [s for s, _ in sample.needles]
    assert sorted(sample.answers, key=text.index) == list(sample.answers)


def test_the_haystack_never_repeats_an_asked_key() -> None:
    sample = draw(TASKS["multikey_2"], Random(0), 0.5)
    lines = list(islice(haystack_units(sample, Random(1)), 20_000))
    assert not any(sample.keys[0] in line for line in lines)
    other = draw(TASKS["multikey_2"], Random(2), 0.5)
    assert any(other.keys[0] in line for line in lines)  # a twin that is not left out does occur


def test_seeds_decide_and_the_global_random_state_does_not() -> None:
    task = TASKS["multikey_1"]
    first = example(task, Random(7), 30)
    state = random.getstate()
    random.seed(123)
    assert example(task, Random(7), 30) == first
    random.setstate(state)
    example(task, Random(8), 30)
    assert random.getstate() == state
    assert example(task, Random(8), 30) != first


def test_prose_keeps_to_its_vocabulary() -> None:
    sentences = list(islice(generated_prose(Random(0)), 3000))
    seen = set(re.findall(r"[a-z]+", " ".join(sentences).lower()))
    assert seen <= set(vocabulary())
    assert not seen & {"special", "magic", "number", "numbers"}
    assert len(set(sentences)) > 2000
    assert all(re.fullmatch(r"[A-Z][a-z ,]+\.", s) for s in sentences)


def test_task_names() -> None:
    assert find_task("NIAH_single_2") is find_task("S2") is TASKS["single_2"]
    with pytest.raises(QKGuardError, match="Unknown probe task 'vt'"):
        find_task("vt")
