"""Which event loop moves the bytes of a relay when the caller is a thread?

One of its own, on one thread per process. gRPC moves the bytes of blocking channels on threads of its own, too, and none of them could
wait in Python. The thread is started with the first relay, ends with the last one or with the process, and is made anew after a fork.
It sees bytes only: no call, no callback of the application's runs on it.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import threading

from meshlib._native import core

from .relay import Relay

# How long somebody who closes a channel waits for the end of its relays.
PATIENCE = 5.0


class RelayThread:
    """State of the process: the thread, its loop, and how many relays need it."""

    def __init__(self) -> None:
        # Taken again by a link that the garbage collector finds while it is held.
        self._lock = threading.RLock()
        self._count = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    @property
    def is_running(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def open(self, tls: core.TlsClient, identity: str, address: str, connect_timeout: float) -> Relay:
        with self._lock:
            self._count += 1
            loop = self._loop
            if loop is None:
                loop = self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(target=_run, args=(loop,), name="meshlib-grpc-relay", daemon=True)
                self._thread.start()
            try:
                relay = Relay(loop, tls, identity, address, connect_timeout)
            except BaseException:
                self._less()
                raise
            loop.call_soon_threadsafe(relay.start)
            return relay

    def close(self, relay: Relay, *, is_waiting: bool = True) -> None:
        """End a relay, and with the last one the thread."""
        thread = None
        relay.close_soon()
        with self._lock:
            if relay.loop is self._loop:
                thread = self._less()
        # Never under the lock, nor by the thread itself: it may be the one that found the last call.
        if is_waiting and thread is not None and thread is not threading.current_thread():
            thread.join(PATIENCE)

    def stop(self) -> None:
        """The process ends."""
        with self._lock:
            self._count = 1
            thread = self._less()
        if thread is not None:
            thread.join(PATIENCE)

    def _less(self) -> threading.Thread | None:
        """The thread, if it has nothing left to do, and so comes to its end."""
        self._count -= 1
        if self._count > 0 or self._loop is None:
            return None
        loop, thread = self._loop, self._thread
        self._loop = self._thread = None
        loop.call_soon_threadsafe(lambda: loop.create_task(_stop(loop)))
        return thread


def _run(loop: asyncio.AbstractEventLoop) -> None:
    try:
        loop.run_forever()
    finally:
        loop.close()


async def _stop(loop: asyncio.AbstractEventLoop) -> None:
    own = asyncio.current_task()
    others = [task for task in asyncio.all_tasks(loop) if task is not own]
    if others:
        _, late = await asyncio.wait(others, timeout=PATIENCE / 2)
        for task in late:
            task.cancel()
    loop.stop()


relay_thread = RelayThread()
_inherited: list[RelayThread] = []


def _after_fork() -> None:
    global relay_thread
    # Kept: its loop shares a selector with the parent, and must not be closed here.
    _inherited.append(relay_thread)
    relay_thread = RelayThread()


def _at_exit() -> None:
    relay_thread.stop()


os.register_at_fork(after_in_child=_after_fork)
atexit.register(_at_exit)
