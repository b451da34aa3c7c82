"""Who is dead, who is stuck: heartbeats of all ranks over the job's key-value store, beside the training.

A collective that one rank does not enter blocks all others without saying for whom they wait. Here every rank writes
what it is at every second, from a thread, and reads the others: silence names a dead process, a standstill the rank
that all wait for. The process then ends with status 4, instead of after the collective's time-out, or never.
May touch: torch.distributed's store, stderr, and this process.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from dataclasses import dataclass

import torch.distributed as dist

PEER_LOST = 4  # exit status
_SILENT_SECONDS = 30.0  # a living process beats every second


@dataclass
class _Peer:
    """What is known of another rank. heard, moved: when its beat and its progress last changed, monotonic seconds."""

    heard: float
    moved: float
    beat: int = -1
    progress: int = -1
    at: str = "start"
    host: str = "unknown host"


class PeerLost(RuntimeError):
    """Another rank is dead."""


class Watchdog:
    """Use as a context around everything that communicates; call `at` whenever this rank gets on."""

    def __init__(self, store: dist.Store, rank: int, world_size: int, timeout_seconds: float) -> None:
        """timeout_seconds: how long a rank may take for one step, checkpoint, export or validation."""
        self.rank, self.timeout = rank, timeout_seconds
        self.silence = min(_SILENT_SECONDS, timeout_seconds)
        self._store = dist.PrefixStore("watchdog", store)
        self._others = {peer: _Peer(time.monotonic(), time.monotonic()) for peer in range(world_size) if peer != rank}
        self._progress, self._at = 0, "start"
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def at(self, what: str) -> None:
        """This rank has come to `what`, such as "step 12"."""
        self._progress, self._at = self._progress + 1, what

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stopped.set()
        self._thread.join()

    def find_dead(self) -> str | None:
        """After a collective failed: who is dead, by waiting until a silent rank has been silent long enough."""
        deadline = time.monotonic() + self.silence + 2
        while time.monotonic() < deadline and self._thread.is_alive():
            dead = self._find(stuck_after=float("inf"))
            if dead is not None:
                return dead
            time.sleep(0.2)
        return None

    def _run(self) -> None:
        beat = 0
        host = socket.gethostname()
        while not self._stopped.wait(1.0):
            beat += 1
            try:
                self._store.set(str(self.rank), f"{beat} {self._progress} {host} {self._at}")
                self._listen()
            except RuntimeError:  # the store went with the process that keeps it
                if not self._stopped.wait(2.0):
                    self._end("the process that keeps the job's store, rank 0 or its agent, is dead")
                return
            lost = self._find(stuck_after=self.timeout)
            if lost is not None:
                self._end(lost)

    def _listen(self) -> None:
        for rank, peer in self._others.items():
            if not self._store.check([str(rank)]):
                continue
            beat, progress, host, at = self._store.get(str(rank)).decode().split(" ", 3)
            now = time.monotonic()
            if int(beat) != peer.beat:
                peer.beat, peer.heard = int(beat), now
            if int(progress) != peer.progress:
                peer.progress, peer.moved = int(progress), now
            peer.host, peer.at = host, at

    def _find(self, stuck_after: float) -> str | None:
        """The rank that is dead, or that all have been waiting for so long."""
        now = time.monotonic()
        for rank, peer in self._others.items():
            if now - peer.heard > self.silence:
                return f"rank {rank} on {peer.host} has been silent for {now - peer.heard:.0f} s, last at {peer.at}"
        behind = min(self._others.items(), key=lambda entry: entry[1].progress, default=None)
        if behind is not None and behind[1].progress < self._progress and now - behind[1].moved > stuck_after:
            rank, peer = behind
            standstill = f"{now - peer.moved:.0f} s, this one at {self._at}"
            return f"rank {rank} on {peer.host} has been at {peer.at} for {standstill}"
        return None

    def _end(self, why: str) -> None:
        print(f"steep: rank {self.rank}: {why}; ending", file=sys.stderr, flush=True)
        os._exit(PEER_LOST)
