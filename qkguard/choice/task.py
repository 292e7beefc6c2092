"""Task quality of a model on rows held out from SFT: loss, and whether answers come out exactly, in forward passes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qkguard.errors import QKGuardError
from qkguard.probe.passes import LastLogits, input_device, undisturbed

ROW_FORMATS = 'rows with "prompt" and "completion" or "answer", "messages", or "text"'


@dataclass(frozen=True)
class TaskRow:
    """One row as token ids: the loss is that of `ids[start:]`, the answer is `ids[answer[0]:answer[1]]`."""

    ids: tuple[int, ...]
    start: int
    answer: tuple[int, int] | None


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
    have "input_ids" and "labels" (-100 where nothing is to be predicted).

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
    begin = next((i for i, label in enumerate(labels) if label != -100 and i), None)
    if begin is None:
        raise QKGuardError(f"Row {number} has nothing to score: all of its labels are -100.")
    if -100 in labels[begin:]:
        raise QKGuardError(f"Row {number} is scored in several places; expected labels of -100 at its start alone.")
    return TaskRow(tuple(ids), begin, None)


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


def score_rows(model: nn.Module, rows: Sequence[TaskRow], batch_tokens: int = 16384) -> TaskResult:
    """Loss and answers of all rows, in batches of up to `batch_tokens` tokens, padding included.

    Rows are padded at their ends, which a causal model's earlier positions do not see. The model is left as it was.
    """
    lengths = [len(row.ids) for row in rows]
    order = sorted(range(len(rows)), key=lengths.__getitem__)
    batches: list[list[int]] = []
    for i in order:
        if batches and (len(batches[-1]) + 1) * lengths[i] <= batch_tokens:
            batches[-1].append(i)
        else:
            batches.append([i])
    nll, exact = [0.0] * len(rows), [False] * len(rows)
    forward, device = LastLogits(model, None), input_device(model)
    with undisturbed(model):
        for batch in batches:
            chosen = [rows[i] for i in batch]
            width = max(len(row.ids) for row in chosen)
            ids = torch.zeros(len(batch), width, dtype=torch.long)
            for line, row in zip(ids, chosen, strict=True):
                line[: len(row.ids)] = torch.tensor(row.ids)
            first = min(row.start for row in chosen) - 1
            logits = forward(ids.to(device), width - first)
            for i, row, line in zip(batch, chosen, logits, strict=True):
                nll[i], exact[i] = _score(row, line, first)
    answered = rows[0].answer is not None
    return TaskResult(tuple(nll), tuple(len(row.ids) - row.start for row in rows), tuple(exact) if answered else None)


def _score(row: TaskRow, logits: Tensor, first: int) -> tuple[float, bool]:
    """Summed negative log-likelihood of a row's scored tokens, and whether all of its answer's were first choices."""
    target = torch.tensor(row.ids[row.start :], device=logits.device)
    said = logits[row.start - 1 - first : len(row.ids) - 1 - first].float()
    nll = torch.nn.functional.cross_entropy(said, target, reduction="sum").item()
    if row.answer is None:
        return nll, False
    lo, hi = row.answer[0] - row.start, row.answer[1] - row.start
    return nll, bool((said[lo:hi].argmax(-1) == target[lo:hi]).all())
