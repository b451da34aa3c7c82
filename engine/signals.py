"""Requests to stop: what signals ask for, and how a process answers them."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

# A scheduler sends these before it takes the machine away: the run checkpoints and ends with 0, to be queued again.
REQUEUE = (signal.SIGTERM, signal.SIGUSR1)


def exit_status(number: int) -> int:
    """Of a process that was asked to stop by signal `number` and did so with a checkpoint."""
    return 0 if number in REQUEUE else 128 + number


@contextlib.contextmanager
def stop_requests() -> Iterator[list[int]]:
    """A list that SIGTERM, SIGUSR1 and SIGINT put their number into; a second signal acts as it did before."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # Python delivers signals to the main thread only
        yield received
        return
    before = {number: signal.getsignal(number) for number in (*REQUEUE, signal.SIGINT)}

    def receive(number: int, _frame: Any) -> None:
        received.append(number)
        restore()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    for number in before:
        signal.signal(number, receive)
    try:
        yield received
    finally:
        restore()
