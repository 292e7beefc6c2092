"""Task quality of a model on rows held out from SFT: loss, and whether answers come out exactly, in forward passes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from qkguard.errors import QKGuardError
from qkguard.probe.answer_formats import AllReduce
from qkguard.probe.passes import IGNORED, LastLogits, input_device, undisturbed
from qkguard.probe.scoring import alone

ROW_FORMATS = 'rows with "prompt" and "completion" or "answer", "messages", or "text"'
TASK_TOKENS = 4096  # in one forward pass that scores rows: their logits take the memory
LOSS_TOKENS = 1024  # whose float32 logits are in memory at a time


@dataclass(frozen=True)
class TaskRow:
    """One row as token ids: the loss is that of `ids[start:]` without the places in `unscored` (a chat's later user
    turns), the answer is `ids[answer[0]:answer[1]]`.
    """

    ids: tuple[int, ...]
    start: int
    answer: tuple[int, int] | None
    unscored: tuple[int, ...] = ()

    @property
    def tokens(self) -> int:
        """How many tokens the loss is of."""
        return len(self.ids) - self.start - len(self.unscored)

    @property
    def targets(self) -> list[int]:
        """The tokens to be predicted at `start` and after it, `IGNORED` where none is."""
        left_out = set(self.unscored)
        return [IGNORED if i in left_out else self.ids[i] for i in range(self.start, len(self.ids))]


@dataclass(frozen=True)
class TaskResult:
    """Per row: summed negative log-likelihood (nats), tokens, and whether every answer token was the first choice."""

    nll: tuple[float, ...]
    tokens: tuple[int, ...]
    exact: tuple[bool, ...] | None

    @property
    def loss(self) -> float:
        """Nats per token over all rows."""
        return sum(self.nll) / sum(self.tokens)

    @property
    def accuracy(self) -> float | None:
        """Share of rows whose answer greedy decoding gives, after the true text before it; None without answers."""
        return None if self.exact is None else sum(self.exact) / len(self.exact)


def encode_rows(tokenizer: Any, rows: Iterable[Mapping[str, Any]], max_length: int) -> tuple[list[TaskRow], int]:
    """Token ids of the rows, as TRL's SFTTrainer makes them, and how many rows were left out as too long.

    "prompt" and "completion" (texts, or lists of messages) train on the completion and the end-of-text token;
    "prompt" and "answer" are the same without that token; with all three, the answer is looked up in the completion
    (its last occurrence). Of "messages" the last turn counts, of "text" everything. Rows that are tokenised already
    have "input_ids" and "labels" (-100 where nothing is to be predicted, in several places too).

    Raises:
        QKGuardError: rows of another format, or all too long.
    """
    found = [_encode(tokenizer, row, number) for number, row in enumerate(rows, 1)]
    kept = [row for row in found if len(row.ids) <= max_length]
    if not kept:
        raise QKGuardError(f"Every row is longer than {max_length} tokens. Raise --max-length.")
    answered = {row.answer is not None for row in kept}
    if len(answered) == 2:
        raise QKGuardError('Some rows have an "answer" and some have none. Give all of them one, or none.')
    return kept, len(found) - len(kept)


def _encode(tokenizer: Any, row: Mapping[str, Any], number: int) -> TaskRow:
    if "input_ids" in row and "labels" in row:
        return _encoded(row, number)
    before, after, answer = _texts(tokenizer, row, number)
    prompt, special = [], True
    if before is not None:
        plain = isinstance(row.get("prompt"), str)
        prompt = _ids(tokenizer, before, plain)
        special = plain
    elif "messages" in row:
        special = False
    full, offsets = _ids_with_offsets(tokenizer, (before or "") + after, special)
    start = 0
    while start < min(len(prompt), len(full)) and prompt[start] == full[start]:
        start += 1
    start = max(1, start)  # the first token has nothing before it that could predict it
    if start >= len(full):
        raise QKGuardError(f"Row {number} has nothing to score after its prompt; expected {ROW_FORMATS}.")
    span = None
    if answer is not None:
        at = len(before or "") + after.rfind(answer)
        inside = [i for i, (lo, hi) in enumerate(offsets) if lo < at + len(answer) and hi > at and i >= start]
        if not answer.strip() or after.rfind(answer) < 0 or not inside:
            raise QKGuardError(f"Row {number}: its answer {answer!r} is not in its completion.")
        span = (inside[0], inside[-1] + 1)
    return TaskRow(tuple(full), start, span)


def _encoded(row: Mapping[str, Any], number: int) -> TaskRow:
    """A row that is tokenised already."""
    ids, labels = row["input_ids"], row["labels"]
    scored = [i for i, label in enumerate(labels) if label != IGNORED and i]
    if not scored:
        raise QKGuardError(f"Row {number} has nothing to score: all of its labels are {IGNORED}.")
    begin, end = scored[0], scored[-1] + 1  # what follows the last scored token changes nothing before it
    return TaskRow(tuple(ids[:end]), begin, None, tuple(sorted(set(range(begin, end)) - set(scored))))


def _texts(tokenizer: Any, row: Mapping[str, Any], number: int) -> tuple[str | None, str, str | None]:
    """(prompt, what follows it, answer) of a row, as text."""
    answer = None if row.get("answer") is None else str(row["answer"])
    prompt, completion = row.get("prompt"), row.get("completion")
    end = getattr(tokenizer, "eos_token", None) or ""
    if isinstance(prompt, str) and isinstance(completion, str):
        return prompt, completion if completion.endswith(end) else completion + end, answer
    if isinstance(prompt, str) and answer is not None and completion is None:
        gap = "" if prompt[-1:].isspace() or answer[:1].isspace() else " "
        return prompt, gap + answer, answer
    messages = row.get("messages")
    if isinstance(prompt, list) and isinstance(completion, list):
        messages = [*prompt, *completion]
    if isinstance(messages, list) and len(messages) > 1:
        turns = len(prompt) if isinstance(prompt, list) else len(messages) - 1
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
        begun = tokenizer.apply_chat_template(messages[:turns], tokenize=False, add_generation_prompt=True)
        if not whole.startswith(begun):
            begun = tokenizer.apply_chat_template(messages[:turns], tokenize=False)
        if whole.startswith(begun):
            return begun, whole[len(begun) :], answer
        raise QKGuardError(f"Row {number}: the chat template writes the prompt differently with its completion.")
    if isinstance(row.get("text"), str):
        text = row["text"]
        return None, text if text.endswith(end) else text + end, answer
    raise QKGuardError(f"Row {number} has the keys {', '.join(row) or 'none'}; expected {ROW_FORMATS}.")


def _ids(tokenizer: Any, text: str, special: bool) -> list[int]:
    return list(tokenizer(text, add_special_tokens=special)["input_ids"])


def _ids_with_offsets(tokenizer: Any, text: str, special: bool) -> tuple[list[int], list[tuple[int, int]]]:
    if not getattr(tokenizer, "is_fast", False):
        ids = _ids(tokenizer, text, special)
        return ids, [(len(tokenizer.decode(ids[:i])), len(tokenizer.decode(ids[: i + 1]))) for i in range(len(ids))]
    out = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
    return list(out["input_ids"]), [tuple(pair) for pair in out["offset_mapping"]]


def score_rows(
    model: nn.Module,
    rows: Sequence[TaskRow],
    batch_tokens: int = TASK_TOKENS,
    *,
    rank: int = 0,
    world: int = 1,
    all_reduce: AllReduce = alone,
) -> TaskResult:
    """Loss and answers of all rows, in batches of up to `batch_tokens` tokens, padding included.

    Rows are padded at their ends, which a causal model's earlier positions do not see. The model is left as it was.
    ALL ranks must call this: batches are dealt out to the `world` ranks, and all get the whole result. They are the
    same for any number of ranks, and every rank runs as many passes as the others, because a sharded model's forward
    pass needs them all.

    Args:
        model: a causal language model; parameters may be sharded in ways that a forward pass hides.
        rows: the same ones on every rank.
        batch_tokens: tokens in one forward pass, where more than one row fits.
        rank: this process's number among the `world` that share the rows.
        all_reduce: sum over ranks of a float64 CPU vector.
    """
    batches = _batches(rows, batch_tokens)
    found = torch.zeros(2, len(rows), dtype=torch.float64)  # negative log-likelihood, exact
    forward, device = LastLogits(model), input_device(model)
    with undisturbed(model):
        for turn in range(0, len(batches), world):
            counts = turn + rank < len(batches)
            batch = batches[turn + rank if counts else turn]
            chosen = [rows[i] for i in batch]
            width = max(len(row.ids) for row in chosen)
            ids = torch.zeros(len(batch), width, dtype=torch.long)
            for line, row in zip(ids, chosen, strict=True):
                line[: len(row.ids)] = torch.tensor(row.ids)
            first = min(row.start for row in chosen) - 1
            logits = forward(ids.to(device), width - first)
            if counts:
                for i, row, line in zip(batch, chosen, logits, strict=True):
                    found[:, i] = torch.tensor(_score(row, line[row.start - 1 - first :]), dtype=torch.float64)
    nll, exact = all_reduce(found.flatten()).view(2, -1).tolist()
    answered = rows[0].answer is not None
    tokens = tuple(row.tokens for row in rows)
    return TaskResult(tuple(nll), tokens, tuple(value > 0 for value in exact) if answered else None)


def _batches(rows: Sequence[TaskRow], batch_tokens: int) -> list[list[int]]:
    """The rows' numbers, those of like lengths together, at most `batch_tokens` tokens (but at least one row)."""
    batches: list[list[int]] = []
    lengths = [len(row.ids) for row in rows]
    for i in sorted(range(len(rows)), key=lengths.__getitem__):
        if batches and (len(batches[-1]) + 1) * lengths[i] <= batch_tokens:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def _score(row: TaskRow, logits: Tensor) -> tuple[float, float]:
    """Summed negative log-likelihood of a row's scored tokens, and 1 where all of its answer's were first choices.

    `logits` (from the position before `start` on, vocabulary).
    """
    target = torch.tensor(row.targets, device=logits.device)
    pieces = zip(logits[: len(target)].split(LOSS_TOKENS), target.split(LOSS_TOKENS), strict=True)
    nll = sum(cross_entropy(said.float(), wanted, reduction="sum").item() for said, wanted in pieces)
    if row.answer is None:
        return nll, 0.0
    lo, hi = row.answer[0] - row.start, row.answer[1] - row.start
    return nll, float((logits[lo:hi].argmax(-1) == target[lo:hi]).all())
