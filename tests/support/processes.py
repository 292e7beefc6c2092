"""Ranks without a launcher: forked processes that have imported everything, joined by gloo on the CPU."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import get_context
from typing import Any

import torch
import torch.distributed as dist

from qkguard.distributed import ranks


def on_ranks(size: int, case: Callable[[int], Any], *, seconds: float = 60.0) -> list[tuple[float, Any]]:
    """What `case(rank)` returns, or the error it raises as text, and after how many seconds, by rank.

    (0, None) for a rank that was killed. What a case returns must be picklable.
    """
    context, port = get_context("fork"), _free_port()
    queue, alone = context.SimpleQueue(), context.Event()

    def run(rank: int) -> None:
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - torch's words on closed connections
        torch.set_num_threads(1)
        store = dist.TCPStore("127.0.0.1", port, size, is_master=rank == 0, timeout=timedelta(seconds=seconds))
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
        ranks.agree("starting", int)
        began = time.monotonic()
        try:
            found = case(rank)
        except BaseException as error:
            found = f"{type(error).__name__}: {error}"
        queue.put((rank, time.monotonic() - began, found))
        if rank == 0:  # it has the store, in which others may still be finding out that a rank is gone
            alone.wait(seconds)
        os._exit(0)

    processes = [context.Process(target=run, args=(rank,)) for rank in range(size)]
    for process in processes:
        process.start()
    results: list[tuple[float, Any]] = [(0.0, None)] * size
    while any(process.is_alive() for process in processes):  # a full pipe would stop the ranks
        _read(queue, results)
        if not any(process.is_alive() for process in processes[1:]):
            alone.set()
        time.sleep(0.05)
        seconds -= 0.05
        assert seconds > 0, "a rank still waits"
    _read(queue, results)
    return results


def _read(queue: Any, results: list[tuple[float, Any]]) -> None:
    while not queue.empty():
        rank, seconds, found = queue.get()
        results[rank] = (seconds, found)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
