"""Work on an accelerator that reads the weights beside the training."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

T = TypeVar("T")


class SideStream:
    """A CUDA stream of the guard's own, whose work is done before the weights change.

    The training's next forward and backward pass run beside it. Before an optimizer's step the host waits, by when the
    work has long ended: for every optimizer of torch's kind, those inside DeepSpeed and accelerate too. Others do not
    announce their steps, so nothing may run beside the training until one has been seen. Without CUDA there is no
    stream, and `run` returns when the work is done.
    """

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream() if torch.cuda.is_available() else None
        self._done: torch.cuda.Event | None = None
        self._listening: RemovableHandle | None = None
        self._steps_seen = False

    def listen(self) -> None:
        """A training begins: wait before its optimizer's steps from now on."""
        self.close()
        self._steps_seen = False
        self._listening = register_optimizer_step_pre_hook(self._before_step)

    @property
    def goes_beside(self) -> bool:
        """Whether work that is begun now would run beside the training."""
        return self._stream is not None and self._steps_seen

    def run(self, work: Callable[[], T]) -> T:
        """Begin some work on the weights as the training has left them; `wait` before they change."""
        if self._stream is None:
            return work()
        self._stream.wait_stream(torch.cuda.current_stream())
        with self.stream():
            try:
                return work()
            finally:
                self._done = self._stream.record_event()

    def stream(self) -> AbstractContextManager[None]:
        """A context for what follows that work on the stream: it waits for the work, not for the training."""
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def wait(self) -> None:
        """Return when the work is done: before the weights change."""
        if self._done is not None:
            self._done.synchronize()
            self._done = None

    def close(self) -> None:
        """The training is over: wait, and listen no more."""
        self.wait()
        if self._listening is not None:
            self._listening.remove()
            self._listening = None

    def _before_step(self, *_: Any) -> None:
        self._steps_seen = True
        self.wait()
