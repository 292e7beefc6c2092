"""Ranks that die, hang, are interrupted or go somewhere else: forked processes, each a rank."""

from __future__ import annotations

import logging
import os
import signal
import time

import pytest

from qkguard.distributed import ranks
from tests.support.processes import on_ranks

SIZE = 3
LAST = SIZE - 1


def test_a_rank_that_dies_ends_the_wait_of_the_others_with_its_number():
    def case(rank: int) -> None:
        if rank == LAST:
            os.kill(os.getpid(), signal.SIGKILL)
        ranks.agree("waiting", int)

    *living, dead = on_ranks(SIZE, case)
    assert dead == (0.0, None)
    for seconds, what in living:
        assert what == f"RankLostError: waiting: rank {LAST} ended or gave no sign of life. Look into the log there."
        assert seconds < 10


def test_a_rank_that_works_while_another_dies_hears_of_it_too():
    def case(rank: int) -> None:
        if rank == LAST:
            os.kill(os.getpid(), signal.SIGKILL)
        ranks.agree("waiting", lambda: time.sleep(4 if rank == 1 else 0))

    found = on_ranks(SIZE, case)
    assert f"rank {LAST} ended" in found[0][1] and found[0][1] == found[1][1]


def test_an_interrupt_is_told_and_raised():
    def case(rank: int) -> None:
        def work() -> None:
            if rank == 1:
                raise KeyboardInterrupt

        ranks.agree("working", work)

    found = on_ranks(SIZE, case)
    assert found[1][1].startswith("KeyboardInterrupt")
    assert found[0][1] == found[2][1] == "RankLostError: working: rank 1 was interrupted (KeyboardInterrupt)."


def test_a_rank_that_waits_for_others_says_for_whom(monkeypatch):
    def case(rank: int) -> list[str]:
        ranks.agree("starting", int)  # from here on all of them are there
        ranks.WARNING_SECONDS = 3.0  # told at the second look, after four seconds: rank 1's own sign has come by then
        lines: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger("qkguard").handlers[:] = [handler]
        if rank == LAST:
            time.sleep(8)
        ranks.agree("writing /a/model", int)
        return lines

    found = [what for _, what in on_ranks(SIZE, case)]
    assert f"Writing /a/model: waiting for rank {LAST} for" in found[0][0]
    assert "All ranks must make this call" in found[0][0]
    assert found[1] == found[2] == []


@pytest.mark.parametrize("seconds", [0.0, 3.0])
def test_work_of_any_length_is_waited_for(seconds):
    def case(rank: int) -> int:
        return ranks.agree("copying", lambda: (time.sleep(seconds if rank == 0 else 0), rank)[1], timeout=2.0)

    assert [what for _, what in on_ranks(SIZE, case)] == [0, 1, 2]
