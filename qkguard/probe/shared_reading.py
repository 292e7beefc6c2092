"""What samples have in common is read once: the model's cache is copied where they part, and read on from.

Under causal attention, and in a recurrent layer, the states at a position depend on nothing after it; so those of a
common beginning are the same for all samples, but for the rounding of other matrix shapes. Whether a model's cache can
be copied and read on from with more than one token is not known of its type: `SharedReading` compares.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from qkguard.distributed import ranks
from qkguard.distributed.sharding import is_sharded
from qkguard.probe.passes import REFUSALS, LastLogits, Past, input_device
from qkguard.probe.recorder import AttentionRecorder
from qkguard.probe.samples import Sample
from qkguard.probe.scoring import Outcome, batches_of, score_batch

logger = logging.getLogger(__name__)

_LEAST = 16  # common tokens that are worth a copy of the cache

TOLERANCE = 1e-4
"""Of an answer's log-probability in float32, in nats: 3e-6 on SmolLM2, at most 4e-5 on the types of
`tests/support/zoo.py` whose caches can be read on from, at least 3e-4 on the others."""

TOLERANCE_HALF = 0.1
"""The same in bfloat16 and float16: 0.016 on SmolLM2 in bfloat16."""

Scored = tuple[Sequence[int], list[Outcome]]
"""Some samples, by their numbers, and what came of them."""


@dataclass(frozen=True)
class Piece:
    """Tokens `start:stop`, which the samples `rows` have in common after what they and others had.

    `alone`: those of them that are read to their end from `stop` on; `longer`: what the others have in common there.
    """

    rows: tuple[int, ...]
    start: int
    stop: int
    alone: tuple[int, ...]
    longer: tuple[Piece, ...]


def common_pieces(ids: Tensor, limits: Sequence[int]) -> Piece:
    """Which beginnings the rows of `ids` (samples, length) have in common; row i only before `limits[i]`."""
    return _piece(ids, limits, tuple(range(len(ids))), 0)


def _piece(ids: Tensor, limits: Sequence[int], rows: tuple[int, ...], start: int) -> Piece:
    limit = min(limits[row] for row in rows)
    tokens = ids[list(rows), start:limit]
    differ = (tokens != tokens[0]).any(0).nonzero()
    stop = start + int(differ[0]) if len(differ) else limit
    groups: dict[int, list[int]] = {}
    for row in rows:
        groups.setdefault(int(ids[row, stop]) if limits[row] > stop else -1, []).append(row)
    alone = groups.pop(-1, [])
    longer: list[Piece] = []
    for group in groups.values():
        if len(group) == 1:
            alone += group
            continue
        found = _piece(ids, limits, tuple(group), stop)
        if found.stop - stop >= _LEAST:
            longer.append(found)
        else:
            alone += found.alone
            longer += [replace(piece, start=stop) for piece in found.longer]
    return Piece(rows, start, stop, tuple(alone), tuple(longer))


def _size(piece: Piece) -> int:
    return len(piece.rows)


def score_shared(
    forward: LastLogits,
    samples: Sequence[Sample],
    places: Sequence[int | None],
    recorder: AttentionRecorder | None,
    batch_tokens: int,
) -> Iterator[Scored]:
    """Score samples of one length, a few (their numbers) at a time; the questions are read with every sample.

    The largest group goes last and takes the cache itself, so that there are few copies at a time: those on the way to
    what is read, each for at most half of the samples of the one before.
    """
    ids = torch.stack([s.ids for s in samples]).long()
    limits = [s.answer_rows[0] if s.question is None else s.question for s in samples]
    due = [(common_pieces(ids, limits), Past(), True)]
    while due:
        piece, past, last = due.pop()
        past = past if last else past.copied()
        if piece.stop > piece.start:
            if recorder is not None:
                recorder.expect(None)
            tokens = ids[piece.rows[:1], piece.start : piece.stop]
            forward(tokens.to(input_device(forward.model)), 1, past=past)
        batches = batches_of(piece.alone, ids.shape[1], batch_tokens)
        for number, rows in enumerate(batches, 1):
            own = past if number == len(batches) and not piece.longer else past.copied()
            group = [samples[row] for row in rows]
            here = [places[row] for row in rows]
            yield rows, score_batch(forward, group, here, recorder, own.repeated(len(rows)))
        longer = sorted(piece.longer, key=_size, reverse=True)
        due += [(found, past, number == 0) for number, found in enumerate(longer)]


class SharedReading:
    """Reads samples that share a haystack, where that gives the model's own verdicts.

    At every length three of the samples are once read whole too: one of the largest batch on a copy of the cache, one
    of the middle, and the one that went on from the cache itself when all copies had been used. Where these differ, or
    the model refuses, one line of the log says so, and everything is read whole from then on.
    """

    def __init__(self) -> None:
        self.refused = False
        self._compared: set[int] = set()  # lengths

    def is_possible(self, model: nn.Module) -> bool:
        """Whether to try it with this model."""
        if not self.refused and any(is_sharded(param) for param in model.parameters()):
            self._refuse("its weights lie in shards, which all ranks would gather for every piece")
        if not self.refused and any(type(module).__name__.endswith("Indexer") for module in model.modules()):
            # Rounding decides near ties; and the indexers of transformers 5.23 read on wrongly, on some texts only
            self._refuse("its attention chooses the tokens that it sees, and may choose others")
        return not self.refused

    def _refuse(self, why: str) -> None:
        self.refused = True
        if ranks.rank() == 0:
            logger.warning("The probe reads samples whole, although they share a haystack: %s.", why)

    def score(
        self,
        forward: LastLogits,
        samples: Sequence[Sample],
        places: Sequence[int | None],
        recorder: AttentionRecorder | None,
        batch_tokens: int,
    ) -> list[Outcome] | None:
        """Outcomes of samples of one length; None where these, and all after them, are to be read whole."""
        length = samples[0].key.length
        try:
            scored = list(score_shared(forward, samples, places, recorder, batch_tokens))
            why = None if length in self._compared else _difference(forward, samples, scored, recorder)
        except REFUSALS as error:  # memory for the cache may have run out, too
            why = f"{type(error).__name__}: {error}"
        if why is None:
            self._compared.add(length)
            outcomes = {row: outcome for rows, found in scored for row, outcome in zip(rows, found, strict=True)}
            return [outcomes[row] for row in range(len(samples))]
        self._refuse(why)
        if recorder is not None:
            recorder.forget(places)
        return None


def _difference(
    forward: LastLogits, samples: Sequence[Sample], scored: Sequence[Scored], recorder: AttentionRecorder | None
) -> str | None:
    """How an outcome differs from that of a whole pass, in a clause; None where it does not."""
    if recorder is not None:
        recorder.expect(None)
    largest = max(len(rows) for rows, _ in scored)
    of_largest = next(found for found in scored if len(found[0]) == largest)
    for rows, outcomes in (of_largest, scored[len(scored) // 2], scored[-1]):
        shared = outcomes[-1]
        with _dtypes(forward.model) as dtypes:
            (whole,) = score_batch(forward, [samples[rows[-1]]])
        tolerance = TOLERANCE if dtypes <= {torch.float32} else TOLERANCE_HALF
        if not shared.agrees_with(whole, tolerance):
            return (
                f"read on from a cache, an answer has the log-probability {shared.logprob:.4f} and is "
                f"{'right' if shared.correct else 'wrong'}; read whole, {whole.logprob:.4f} and "
                f"{'right' if whole.correct else 'wrong'}"
            )
    return None


@contextmanager
def _dtypes(model: nn.Module) -> Iterator[set[torch.dtype]]:
    """Those in which linear layers compute, which autocast makes others than their weights'."""
    found: set[torch.dtype] = set()

    def note(module: nn.Module, args: Any, out: Any) -> None:
        if isinstance(out, Tensor):  # some routers are linear layers and give more
            found.add(out.dtype)

    hooks = [module.register_forward_hook(note) for module in model.modules() if isinstance(module, nn.Linear)]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
