"""Which layers hold retrieval heads: the rule, on scores made by hand and on a head made by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from qkguard.errors import QKGuardError
from qkguard.layout import find_attention
from qkguard.layout.rows import RowSelection
from qkguard.layout.spec import AttentionSpec
from qkguard.probe.prober import Prober
from qkguard.probe.retrieval import THRESHOLD, RetrievalChoice, RetrievalScores, beyond_chance, choose_layers
from qkguard.probe.settings import ProbeSettings
from tests.support.models import tiny_model
from tests.support.probing import all_right, bpe_tokenizer, with_retrieval_head

MODULES = ("model.layers.1.self_attn", "model.layers.3.self_attn", "model.layers.4.self_attn")
ANSWER = [[0.0, 0.05], [0.3, -0.1], [0.02, 0.09]]


def scores(answer: list[list[float]] = ANSWER, question: list[list[float]] | None = None) -> RetrievalScores:
    return RetrievalScores(MODULES, answer, question or [], 20)


def specs(*layers: int) -> list[AttentionSpec]:
    return [AttentionSpec(n, f"model.layers.{n}.self_attn", "full_attention", 2, 2, 16, ()) for n in layers]


def test_chance_is_nought_and_the_needle_alone_is_one() -> None:
    assert beyond_chance(0.02, 0.02) == 0 and beyond_chance(1.0, 0.02) == 1
    assert beyond_chance(0.0, 0.02) == pytest.approx(-0.02 / 0.98)


def test_a_layer_with_one_head_above_the_threshold_is_chosen() -> None:
    chosen = choose_layers(scores(), specs(1, 3, 4))
    assert chosen.layers == (3,) and chosen.threshold == THRESHOLD == 0.1 and chosen.samples == 20
    assert chosen.passing(3) == {0: 0.3} and chosen.passing(4) == {}
    assert "stands for layer 3 of the 3 guarded ones: 1 head there looks up the needle" in chosen.words
    assert choose_layers(scores(), specs(1, 3, 4), threshold=0.09).layers == (3, 4)
    assert choose_layers(scores(), specs(1, 3, 4), threshold=0.0).layers == (1, 3, 4)


def test_the_rows_of_the_question_count_as_the_answers_do() -> None:
    asked = [[0.0, 0.0], [0.0, 0.0], [0.0, 0.2]]
    chosen = choose_layers(scores(question=asked), specs(1, 3, 4))
    assert chosen.layers == (3, 4) and chosen.scores[2].heads == (0.02, 0.2) and chosen.scores[1].heads == (0.3, 0.0)
    assert "layers 3-4" in chosen.words and "2 heads there look up" in chosen.words


def test_only_guarded_layers_are_chosen_from() -> None:
    chosen = choose_layers(scores(), specs(1, 4))
    assert chosen.layers is None and [found.layer for found in chosen.scores] == [1, 4]
    assert "no head passes the threshold (the best is head 1 of layer 4, with 0.090)" in chosen.words


@pytest.mark.parametrize(
    ("found", "layers", "why"),
    [
        (None, (1, 3), "does not go through transformers' AttentionInterface"),
        (RetrievalScores(MODULES, ANSWER, [], 7), (1, 3), "only 7 samples were answered rightly before SFT"),
        (scores(), (1, 2), "no head of model.layers.2.self_attn has a score"),
    ],
)
def test_where_no_choice_can_be_made_all_layers_are_restored_and_why_is_said(
    found: Any, layers: Any, why: str
) -> None:
    chosen = choose_layers(found, specs(*layers))
    assert chosen.layers is None and why in chosen.why
    assert chosen.words == f'layers="retrieval": all layers are restored, because {chosen.why}.'
    assert chosen.summary()["layers"] is None and chosen.summary()["words"] == chosen.words


def test_layers_whose_keys_serve_others_are_not_restored_alone() -> None:
    shared = [replace(spec, shares_keys=True) for spec in specs(1, 3, 4)]
    assert "keys of this model serve several layers" in choose_layers(scores(), shared).words


def test_json_and_back() -> None:
    for chosen in (choose_layers(scores(), specs(1, 3, 4)), choose_layers(None, specs(1))):
        assert RetrievalChoice.from_json(json.loads(json.dumps(chosen.to_json()))) == chosen
    summary = choose_layers(scores(), specs(1, 3, 4)).summary()
    assert summary["layers"] == [3] and summary["threshold"] == 0.1
    assert summary["scores"][1] == {"layer": 3, "score": 0.3, "head": 0, "passing": {"0": 0.3}}


@pytest.mark.parametrize(("layer", "head"), [(2, 1), (0, 2)])
def test_a_head_made_by_hand_is_found(layer: int, head: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = bpe_tokenizer()
    digits = tokenizer.convert_tokens_to_ids(list("0123456789"))
    plain: Any = tiny_model("llama", vocab_size=1024, max_position_embeddings=256)
    settings = ProbeSettings(lengths=[192, 240], depths=2, samples=2, tasks=["single_1"], questions=True)
    prober = Prober(tokenizer, settings)
    guarded = find_attention(plain)
    assert "only 0 samples" in choose_layers(prober.run(plain).retrieval, guarded).why
    all_right(monkeypatch)
    assert choose_layers(prober.run(plain).retrieval, guarded).layers is None, "a model without such a head"
    model = with_retrieval_head(plain, digits, layer, head)
    found = prober.run(model)
    chosen = choose_layers(found.retrieval, guarded)
    assert chosen.layers == (layer,) and set(chosen.passing(layer)) == {head} and chosen.passing(layer)[head] > 0.5
    assert found.attention is not None
    i = found.attention.layers.index(layer)
    assert found.attention.needle[192][i][head] > 0.5, "the mass that the score is made from"


@pytest.mark.parametrize(("layers", "said"), [("retrieval", "needs a measurement"), ("all", "expected layer numbers")])
def test_a_selection_of_rows_needs_numbers(layers: str, said: str) -> None:
    with pytest.raises(QKGuardError, match=said):
        RowSelection.of({"layers": layers})
