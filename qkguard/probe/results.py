"""What a probe found: per sample, per group, with intervals, to and from JSON."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from qkguard.errors import QKGuardError
from qkguard.probe.retrieval import RetrievalScores
from qkguard.probe.samples import SampleKey
from qkguard.probe.statistics import paired_interval, sign_test, wilson

VERSION = 1


@dataclass(frozen=True)
class Group:
    """Samples that share a task, a length, a depth, or several of these."""

    count: int
    hits: int
    answer_logprob: float

    @property
    def recall(self) -> float:
        return self.hits / self.count

    @property
    def interval(self) -> tuple[float, float]:
        return wilson(self.hits, self.count)


@dataclass(frozen=True)
class AttentionMass:
    """Where the answer positions look: means over samples, per context length, softmax layer and query head.

    `needle[length][layer][head]` is the attention probability that falls on the asked needles' tokens, `local[...]` on
    the `window` most recent tokens, `distance[...]` how many tokens back attention falls on average. `layers` holds
    the layer numbers of the outer lists. Results of earlier versions have no distances.
    """

    window: int
    layers: tuple[int, ...]
    needle: dict[int, list[list[float]]]
    local: dict[int, list[list[float]]]
    distance: dict[int, list[list[float]]] = field(default_factory=dict)

    def mean(self, kind: str) -> float:
        """Mean over lengths, layers and heads of "needle", "local" or "distance"."""
        return _mean([v for grid in getattr(self, kind).values() for row in grid for v in row])

    def by_layer(self, kind: str, length: int) -> list[float]:
        """The same at one length, layer by layer: means over heads."""
        return [_mean(heads) for heads in getattr(self, kind)[length]]

    def strongest(self, kind: str = "needle") -> float:
        """Largest head's mass, mean over lengths: retrieval is the work of few heads."""
        grids = list(getattr(self, kind).values())
        heads = zip(*([v for row in grid for v in row] for grid in grids), strict=True)
        return max(sum(values) / len(values) for values in heads)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> AttentionMass:
        grids = {k: {int(n): g for n, g in data.get(k, {}).items()} for k in ("needle", "local", "distance")}
        return cls(data["window"], tuple(data["layers"]), **grids)


@dataclass(frozen=True)
class Drop:
    """Fall of recall between two probes, on the `count` samples that both have.

    `lost` and `gained`: samples whose verdict changed. `low` and `high` bound the drop at 95% (paired;
    `statistics.paired_interval`). `p_value`: one-sided exact sign test of "no drop" (McNemar).
    """

    before: float
    now: float
    low: float
    high: float
    p_value: float
    count: int
    lost: int
    gained: int

    @property
    def drop(self) -> float:
        return self.before - self.now

    def is_alarming(self, threshold: float, level: float = 0.05) -> bool:
        """A drop of at least `threshold` that noise does not explain."""
        return self.drop >= threshold and self.p_value < level


@dataclass(frozen=True)
class ProbeResult:
    """Verdicts of one probe.

    `correct[i]`: every answer token of `sample_keys[i]` is the model's first choice given the true tokens before it.
    The answer counts in any of the usual formats (" 123", ": 123"; `answer_formats.py`), whichever the model follows;
    `other_formats` says how many were right in another format than the one recorded in `settings`.
    `logprob[i]`: mean log-probability (nats) of the values' tokens in the recorded format; nan where the model's
    output is not finite.
    `settings` records everything that decides the samples, among them `mode`, `forms` and `digest`: results with
    equal digests are of the same samples. `generated` holds RULER's own metric where generation was asked for.
    `retrieval` scores the heads by where they look on the samples that were answered rightly.
    """

    sample_keys: tuple[SampleKey, ...]
    correct: tuple[bool, ...]
    logprob: tuple[float, ...]
    settings: dict[str, Any]
    attention: AttentionMass | None = None
    seconds: float = 0.0
    other_formats: int = 0
    generated: dict[str, Any] = field(default_factory=dict)
    retrieval: RetrievalScores | None = None

    @property
    def total(self) -> Group:
        return self._group(range(len(self.sample_keys)))

    @property
    def recall(self) -> float:
        return self.total.recall

    @property
    def answer_logprob(self) -> float:
        return self.total.answer_logprob

    @property
    def not_finite(self) -> int:
        """Samples on which the model returned NaN or infinity."""
        return sum(not math.isfinite(v) for v in self.logprob)

    def by(self, *names: str) -> dict[tuple[Any, ...], Group]:
        """Groups by any of "task", "length", "depth", in that order; keys sorted."""
        members: dict[tuple[Any, ...], list[int]] = {}
        for i, key in enumerate(self.sample_keys):
            members.setdefault(tuple(getattr(key, n) for n in names), []).append(i)
        return {key: self._group(members[key]) for key in sorted(members)}

    def drop_since(self, earlier: ProbeResult, **only: Any) -> Drop:
        """Paired drop of recall since an earlier probe, on the samples that both have, or on those of them with e.g.
        `length=4096`.

        Raises:
            QKGuardError: the two probed different samples.
        """
        chosen = [pair for pair in self.pairs_with(earlier) if all(getattr(pair[0], k) == v for k, v in only.items())]
        if not chosen:
            raise QKGuardError(f"The probe has no samples with {only}.")
        return _drop([before for _, before, _ in chosen], [now for _, _, now in chosen])

    def change_since(self, earlier: ProbeResult) -> dict[str, float]:
        """The paired difference of recall with its 95% interval, positive where it rose: value, low, high.

        `before` is the earlier recall on the samples that both have, `count` their number.
        """
        drop = self.drop_since(earlier)
        bounds = {"value": -drop.drop + 0, "low": -drop.high, "high": -drop.low}  # + 0: no -0.0
        return {**bounds, "before": drop.before, "count": drop.count}

    def only(self, keys: Iterable[SampleKey]) -> ProbeResult:
        """The result on some of the samples; attention, its scores and generation, which are of all, are left out."""
        wanted = set(keys)
        if wanted.issuperset(self.sample_keys):
            return self
        kept = [i for i, key in enumerate(self.sample_keys) if key in wanted]
        return replace(
            self,
            sample_keys=tuple(self.sample_keys[i] for i in kept),
            correct=tuple(self.correct[i] for i in kept),
            logprob=tuple(self.logprob[i] for i in kept),
            settings={key: value for key, value in self.settings.items() if key != "digest"},
            attention=None,
            generated={},
            retrieval=None,
        )

    def pairs_with(self, earlier: ProbeResult) -> list[tuple[SampleKey, bool, bool]]:
        """(sample, right earlier, right now) of the samples that both have.

        Equal keys are equal samples where what makes them (`origin`) is equal, or everything (`digest`).

        Raises:
            QKGuardError: the two probed different samples.
        """
        mine, other = self.settings, earlier.settings
        same_maker = mine.get("origin") is not None and mine["origin"] == other.get("origin")
        same_samples = self.sample_keys == earlier.sample_keys and mine.get("digest") == other.get("digest")
        before = dict(zip(earlier.sample_keys, earlier.correct, strict=True))
        pairs = [
            (key, before[key], now) for key, now in zip(self.sample_keys, self.correct, strict=True) if key in before
        ]
        if not pairs or not (same_maker or same_samples):
            raise QKGuardError(
                "Two probes of different samples cannot be compared. Probe both with the same settings."
            )
        return pairs

    def to_json(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts; `from_json` gives an equal result (nan becomes null and back)."""
        low, high = self.total.interval
        groups = [
            {"task": t, "length": n, "count": g.count, "recall": g.recall, "answer_logprob": _plain(g.answer_logprob)}
            for (t, n), g in self.by("task", "length").items()
        ]
        samples = [
            [*(c.task, c.length, c.depth, c.index), v, _plain(p)]
            for c, v, p in zip(self.sample_keys, self.correct, self.logprob, strict=True)
        ]
        return {
            "version": VERSION,
            "recall": self.recall,
            "interval": [low, high],
            "answer_logprob": _plain(self.answer_logprob),
            "groups": groups,
            "samples": samples,
            "attention": None if self.attention is None else asdict(self.attention),
            "retrieval": None if self.retrieval is None else asdict(self.retrieval),
            "generated": self.generated,
            "settings": self.settings,
            "seconds": self.seconds,
            "other_forms": self.other_formats,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ProbeResult:
        if data.get("version") != VERSION:
            raise QKGuardError(f"Probe result of version {data.get('version')}: expected {VERSION}. Probe again.")
        rows: Sequence[Any] = data["samples"]
        return cls(
            sample_keys=tuple(SampleKey(n, t, d, i) for t, n, d, i, _, _ in rows),
            correct=tuple(bool(r[4]) for r in rows),
            logprob=tuple(math.nan if r[5] is None else r[5] for r in rows),
            settings=data["settings"],
            attention=None if data["attention"] is None else AttentionMass.from_json(data["attention"]),
            seconds=data["seconds"],
            other_formats=data["other_forms"],
            generated=data["generated"],
            retrieval=RetrievalScores.from_json(data.get("retrieval")),  # files of earlier versions have none
        )

    def _group(self, members: Iterable[int]) -> Group:
        chosen = list(members)
        return Group(
            len(chosen), sum(self.correct[i] for i in chosen), sum(self.logprob[i] for i in chosen) / len(chosen)
        )


def _drop(before: Sequence[bool], now: Sequence[bool]) -> Drop:
    count = len(before)
    differences = [int(b) - int(n) for b, n in zip(before, now, strict=True)]
    lost, gained = differences.count(1), differences.count(-1)
    low, high = paired_interval(lost, gained, count)
    return Drop(sum(before) / count, sum(now) / count, low, high, sign_test(lost, gained), count, lost, gained)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None
