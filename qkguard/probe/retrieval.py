"""Retrieval heads: which layers hold heads that look up the needle, and how sure that is. Imports no torch.

The score of a head is the attention that it puts on the needle beyond chance, a mean over the samples that the model
answered rightly: (mass - chance) / (1 - chance), where chance is what uniform attention over the tokens that the row
may see would put there. It is 0 for a head that looks everywhere alike, whatever the length of context and needle, 1
for one that sees nothing but the needle, and below 0 for one that avoids it. It is taken over the answer's rows, and
over the question's where these were measured; the larger of the two counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from qkguard.layout.rows import RETRIEVAL
from qkguard.layout.selection import show_layers, up_to_layer
from qkguard.probe.statistics import LEAST

if TYPE_CHECKING:
    from qkguard.layout.spec import AttentionSpec

THRESHOLD = 0.1
"""A head that passes it retrieves. The cut-off of Wu et al. 2024 (arXiv 2404.15574), whose score is how often a head's
most attended token is the needle's token being copied: 3 to 6% of the heads of their models pass it. Ours asks for a
tenth of the attention instead, so a head that copies in a tenth of the rows passes both."""

T = TypeVar("T")


def beyond_chance(mass: T, chance: T) -> T:
    """(mass - chance) / (1 - chance), of numbers or tensors; a row sees itself, so chance is below 1."""
    return (mass - chance) / (1 - chance)  # type: ignore[operator]


@dataclass(frozen=True)
class RetrievalScores:
    """Scores of all softmax-attention heads: `answer[module][head]`, `question[module][head]`.

    `modules` names the attention modules of the outer lists. `question` is empty where the question's rows were not
    measured. `samples`: how many were answered rightly, which the means are over.
    """

    modules: tuple[str, ...]
    answer: list[list[float]]
    question: list[list[float]]
    samples: int

    @classmethod
    def from_json(cls, data: Mapping[str, Any] | None) -> RetrievalScores | None:
        return None if data is None else cls(**{**data, "modules": tuple(data["modules"])})


@dataclass(frozen=True)
class LayerScore:
    """Of one layer: every head's score, the larger one of answer's and question's rows."""

    layer: int
    heads: tuple[float, ...]

    @property
    def best(self) -> int:
        """The head with the highest score."""
        return max(range(len(self.heads)), key=self.heads.__getitem__)

    @property
    def score(self) -> float:
        return self.heads[self.best]


@dataclass(frozen=True)
class RetrievalChoice:
    """Which layers `layers="retrieval"` stands for.

    `layers`: those with a head that passes `threshold`; None stands for all, for the reason `why` (a clause).
    `samples`: how many samples the scores are means over. `scores`: of every layer that could have been chosen.
    """

    layers: tuple[int, ...] | None
    why: str = ""
    threshold: float = THRESHOLD
    samples: int = 0
    scores: tuple[LayerScore, ...] = ()

    def passing(self, layer: int) -> dict[int, float]:
        """The heads of a layer that pass, with their scores."""
        found = next(score for score in self.scores if score.layer == layer)
        return {head: score for head, score in enumerate(found.heads) if score >= self.threshold}

    @property
    def words(self) -> str:
        """What was chosen and why, in a sentence."""
        said = f'layers="{RETRIEVAL}"'
        if self.layers is None:
            return f"{said}: all layers are restored, because {self.why}."
        heads = sum(len(self.passing(layer)) for layer in self.layers)
        best = max(score.score for score in self.scores)
        layers = f"layer{'s' if len(self.layers) > 1 else ''} {show_layers(self.layers)}"
        return (
            f"{said} stands for {layers} of the {len(self.scores)} guarded ones: {heads} "
            f"{'heads there look' if heads > 1 else 'head there looks'} up the needle (score {self.threshold:g} or "
            f"more, the best {best:.2f}; {self.samples} samples answered rightly before SFT). The others stay as "
            "tuned."
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values; `from_json` gives an equal choice."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> RetrievalChoice:
        layers = None if data["layers"] is None else tuple(data["layers"])
        scores = tuple(LayerScore(score["layer"], tuple(score["heads"])) for score in data["scores"])
        return cls(layers, data["why"], data["threshold"], data["samples"], scores)

    def summary(self) -> dict[str, Any]:
        """What manifests keep: the layers, in words too, the threshold, and of every layer its best head and the heads
        that pass, with their scores.
        """
        scores = [
            {
                "layer": found.layer,
                "score": round(found.score, 4),
                "head": found.best,
                "passing": {str(head): round(score, 4) for head, score in self.passing(found.layer).items()},
            }
            for found in self.scores
        ]
        layers = None if self.layers is None else list(self.layers)
        chosen = {"layers": layers, "words": self.words, "threshold": self.threshold, "samples": self.samples}
        return chosen | {"scores": scores}


def choose_layers(
    scores: RetrievalScores | None, specs: Sequence[AttentionSpec], threshold: float = THRESHOLD
) -> RetrievalChoice:
    """The layers of `specs` that hold a retrieval head.

    Args:
        scores: of the model before SFT; None where its attention could not be watched.
        specs: the layers that may be chosen, of the same model.
        threshold: the score from which on a head retrieves.
    """
    if scores is None:
        return RetrievalChoice(
            None, "the model's attention does not go through transformers' AttentionInterface, so no head has a score"
        )
    if scores.samples < LEAST:
        return RetrievalChoice(
            None,
            f"only {scores.samples} samples were answered rightly before SFT, and scores take {LEAST}",
        )
    by_entry = _heads_by_entry(scores)
    heads: dict[int, list[float]] = {}
    for spec in specs:
        found_heads = _of_entry(by_entry, _entry(spec.module))
        if spec.layer is None or not found_heads:
            return RetrievalChoice(None, f"no head of {spec.module} has a score")
        heads[spec.layer] = found_heads
    if any(spec.shares_keys for spec in specs):
        return RetrievalChoice(None, "keys of this model serve several layers, so that none can be restored alone")
    found = tuple(LayerScore(layer, tuple(heads[layer])) for layer in sorted(heads))
    chosen = tuple(score.layer for score in found if score.score >= threshold)
    if chosen:
        return RetrievalChoice(chosen, "", threshold, scores.samples, found)
    best = max(found, key=_score)
    why = f"no head passes the threshold (the best is head {best.best} of layer {best.layer}, with {best.score:.3f})"
    return RetrievalChoice(None, why, threshold, scores.samples, found)


def _score(found: LayerScore) -> float:
    return found.score


def _heads_by_entry(scores: RetrievalScores) -> dict[str, list[float]]:
    """The heads' scores by the entry of a module list that their attention is in: "model.layers.3"."""
    out: dict[str, list[float]] = {}
    measured = [part for part in (scores.answer, scores.question) if part]
    for i, module in enumerate(scores.modules):
        of_heads = zip(*(part[i] for part in measured), strict=True)
        out.setdefault(_entry(module), []).extend(max(pair) for pair in of_heads)
    return out


def _of_entry(by_entry: Mapping[str, list[float]], entry: str) -> list[float]:
    """The heads of an entry, also where the model that was watched has a wrapper around it (PEFT's)."""
    named = [name for name in by_entry if name == entry or name.endswith(f".{entry}")]
    return by_entry[named[0]] if len(named) == 1 else []


def _entry(module: str) -> str:
    """The name up to its layer, by which a layer's owner of projections and its attention are the same."""
    return up_to_layer(module) or module
