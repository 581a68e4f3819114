"""Every process of a run is watched: when one dies or fails, all end, and say which it was.

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
    """A daemon thread that writes this process's signs of life into the store, reads those of the next process, and
    looks whether any process has given up: three requests a second, however many processes there are.

    Args:
        store: a ``torch.distributed`` key-value store with a connection of its own. host: named in messages.
    """

    def __init__(self, store: Any, rank: int, size: int, host: str):
        super().__init__(name="marval-watch", daemon=True)
        self.store, self.rank, self.size, self.host = store, rank, size, host
        self.ended, self.signed, self.lock = threading.Event(), False, threading.Lock()

    def run(self) -> None:
        beat, after, last, since = 0, (self.rank + 1) % self.size, "", time.monotonic()
        while not self.ended.is_set():
            beat += 1
            try:
                with self.lock:
                    if not self.signed:
                        self.store.set(str(self.rank), f"{beat} {self.host}")
                if why := self.read("gave up"):
                    self.end(why)
                sign = self.read(str(after))
                if sign != last or sign in ("", "done"):  # "": it is not connected yet, which has a limit of its own
                    last, since = sign, time.monotonic()
                elif time.monotonic() - since > LIMIT:
                    host = sign.partition(" ")[2]
                    self.give_up(f"process {after} on {host} has given no sign of life for {LIMIT:.0f} s")
            except RuntimeError:  # the store is gone, and with it the process that serves it
                self.end("the process that connects all others (torchrun's, or that of rank 0) is gone")
            self.ended.wait(INTERVAL)

    def read(self, key: str) -> str:
        """The value in the store, or an empty string."""
        return self.store.get(key).decode() if self.store.check([key]) else ""

    def sign(self, word: str) -> None:
        """The last sign of this process: it is not watched any longer."""
        with self.lock, contextlib.suppress(RuntimeError):
            self.signed = True
            self.store.set(str(self.rank), word)

    def give_up(self, why: str) -> None:
        """End all processes."""
        with contextlib.suppress(RuntimeError):
            self.store.set("gave up", why)
        self.end(why)

    def end(self, why: str) -> None:
        """Leave at once, whatever the main thread waits for: nothing that it could still do would be complete."""
        if not self.ended.wait(2 * INTERVAL):  # unless this process is about to end by itself
            print(f"marval: process {self.rank} of {self.size} stops: {why}", file=sys.stderr, flush=True)
            os._exit(1)

    def wait(self) -> None:
        """Time for the watch to notice that another process has died, and to end this one."""
        time.sleep(LIMIT + 4 * INTERVAL)

    def leave(self, error: BaseException | None) -> None:
        """The end of this process, good or bad; runs at exit too, where nobody called it."""
        if self.ended.is_set():
            return
        error = error or getattr(sys, "last_value", None)
        self.sign("done")
        self.ended.set()
        if error is not None:
            with contextlib.suppress(RuntimeError):
                self.store.set(
                    "gave up", f"process {self.rank} failed with {type(error).__name__}: {error}".splitlines()[0]
                )
            if self.rank == 0:
                time.sleep(3 * INTERVAL)  # it may serve the store: time for the others to read it
        self.join(5)  # a thread in the middle of a request when the interpreter ends would abort the process
