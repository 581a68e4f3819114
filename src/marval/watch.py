"""Every process of a run watches the others: when one dies or fails, all end, and say which it was.

A collective operation with a dead process may otherwise wait for the backend's timeout, and its error names nobody.
"""

import contextlib
import os
import sys
import threading
import time
from typing import Any

INTERVAL = 1.0
"""Seconds between signs of life."""
LIMIT = 40.0
"""Seconds without a sign of life after which a process counts as dead."""


class Watch(threading.Thread):
    """A daemon thread that writes this process's signs of life into the store and reads those of the others.

    Args:
        store: a ``torch.distributed`` key-value store of its own connection. host: named in messages.
    """

    def __init__(self, store: Any, rank: int, size: int, host: str):
        super().__init__(name="marval-watch", daemon=True)
        self.store, self.rank, self.size, self.host = store, rank, size, host
        self.ended, self.last_words = threading.Event(), ""

    def run(self) -> None:
        beat = 0
        seen = {rank: ("", time.monotonic()) for rank in range(self.size) if rank != self.rank}
        while not self.ended.is_set():
            try:
                if not self.last_words:
                    self.store.set(str(self.rank), f"{beat} {self.host}")
                beat += 1
                for rank, (before, since) in seen.items():
                    sign = self.store.get(str(rank)).decode() if self.store.check([str(rank)]) else ""
                    kind, _, rest = sign.partition(" ")
                    if kind == "failed":
                        self.end(f"process {rank} failed with {rest}")
                    elif sign != before or kind == "done":
                        seen[rank] = (sign, time.monotonic())
                    elif time.monotonic() - since > LIMIT:
                        where = f" on {rest}" if rest else ""
                        self.end(f"process {rank}{where} has given no sign of life for {LIMIT:.0f} s")
            except RuntimeError:  # the store is gone, and with it the process that serves it
                self.end("the process that connects all others (torchrun's, or that of rank 0) is gone")
            self.ended.wait(INTERVAL)

    def sign(self, words: str) -> None:
        """The last sign of this process: ``done``, or ``failed`` and why."""
        self.last_words = words
        with contextlib.suppress(RuntimeError):
            self.store.set(str(self.rank), words)

    def end(self, why: str) -> None:
        """Leave at once, whatever the main thread waits for: nothing that it could still do would be complete."""
        if not self.ended.wait(2 * INTERVAL):  # unless this process is about to end well
            print(f"marval: process {self.rank} of {self.size} stops: {why}", file=sys.stderr, flush=True)
            os._exit(1)

    def wait(self) -> None:
        """Time for the watch to notice that another process has died, and to end this one."""
        time.sleep(LIMIT + 4 * INTERVAL)
