"""Which ranks write files: rank 0, or one rank of every node under `save_on_each_node`."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from qkguard.distributed import collectives, ranks


@dataclass(frozen=True)
class Writers:
    """The ranks that write, whether this is one of them, and whether every node has its own copy of the files."""

    ranks: tuple[int, ...]
    here: bool
    each_node: bool

    @classmethod
    def of(cls, args: TrainingArguments) -> Writers:
        """The ranks that Trainer saves on; ALL ranks must call this."""
        flags = collectives.all_gather_table(torch.tensor([int(args.should_save)])).flatten().tolist()
        writers = tuple(rank for rank, flag in enumerate(flags) if flag) or (0,)
        return cls(writers, ranks.rank() in writers, bool(args.save_on_each_node))

    def run(self, what: str, work: Callable[[], Any]) -> None:
        """`work` on every writer, the other ranks waiting; ALL ranks must call this."""

        def on_writers() -> None:
            if self.here:
                work()

        ranks.agree(what, on_writers)

    def all_find(self, what: str, test: Callable[[], bool]) -> bool:
        """Whether `test` holds on every writer; ALL ranks must call this."""

        def on_writers() -> bool:
            return test() if self.here else True

        return ranks.everywhere(what, on_writers)


def disk_is_shared(*folders: Path) -> bool:
    """Whether every rank sees what rank 0 writes to these folders; ALL ranks must call this."""

    def leave_tokens() -> list[Path]:
        tokens = [folder / f"_{uuid.uuid4().hex}" for folder in folders]
        for token in tokens:
            token.touch()
        return tokens

    def all_seen() -> bool:
        return all(token.exists() for token in tokens)

    def remove_tokens() -> None:
        for token in tokens:
            token.unlink()

    tokens = ranks.on_rank_zero("looking for a shared disk", leave_tokens)
    seen = ranks.everywhere("looking for a shared disk", all_seen)
    ranks.held_by(0, "looking for a shared disk", remove_tokens)
    return seen
