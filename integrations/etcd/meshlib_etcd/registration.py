"""How does an instance stay in etcd as long as its process lives, and no longer?

Its key hangs on a lease of `ttl` seconds that is kept alive at every third. A process that is killed is out of etcd when the
lease ends; one that leaves revokes it, and is out at once. Each time it is also looked whether the key is still there, and
ours: a lease may be lost (etcd was away for longer, or began with empty hands), and a key may have been deleted by hand. Then
it is entered again.

A question that fails says nothing about the lease: as long as that lives, it is asked again soon, and only when it is over is that
raised. One that hangs is given up while there is time to ask again, whatever `timeout` says. Who isn't entered yet raises at once. Called
again, it takes up what is left of the lease.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, Final, TypeVar

from meshlib.discover import limit_within, pause_within
from meshlib.errors import MeshError

from .client import Client
from .messages import NOT_FOUND, EtcdError

# Seconds for which a dead process stays in etcd. Its callers notice sooner: a refused connection ejects it.
TTL: Final = 10.0

T = TypeVar("T")


class EtcdRegistration:
    """The key of one instance. `is_entered`: it is in etcd, as far as is known."""

    def __init__(self, client: Client, key: bytes, value: bytes, *, ttl: float = TTL) -> None:
        self._client = client
        self._key = key
        self._value = value
        self._ttl = ttl
        self._lease = 0
        self.is_entered = False
        self._ends = 0.0  # until when we are in etcd, whatever becomes of our questions

    def __repr__(self) -> str:
        return f"<EtcdRegistration {self._key.decode()}>"

    async def keep(self) -> None:
        """Enter, keep alive, enter again. Doesn't come back; raises EtcdError."""
        try:
            await self._keep()
        finally:
            self.is_entered = False

    async def _keep(self) -> None:
        clock = asyncio.get_running_loop().time
        given, self._ends = self._ttl, clock()
        while True:
            asked = clock()
            try:
                given = await self._confirm()
            except (OSError, MeshError):  # a secret that can't be read for a moment, too
                left = self._ends - clock()
                if left <= 0.0:
                    raise
                await asyncio.sleep(pause_within(left, given))
                continue
            self._ends = asked + given
            self.is_entered = True
            await asyncio.sleep(given / 3)

    async def _confirm(self) -> float:
        """The lease lives, and the key hangs on it; the seconds for which it was given."""
        while True:
            given = await self._soon(self._client.keep_alive(self._lease)) if self._lease else 0.0
            if not given:
                self._lease, given = await self._soon(self._client.grant(self._ttl))
            if await self._is_entered():
                return given
            try:
                await self._soon(self._client.put(self._key, self._value, self._lease))
            except EtcdError as error:
                if error.code != NOT_FOUND:
                    raise
                # The lease ended just now.
                self._lease = 0
                await asyncio.sleep(given / 30)
            else:
                return given

    async def leave(self) -> None:
        """Out of etcd, at once. Raises EtcdError if it can't be told so: then the lease ends by itself."""
        lease, self._lease = self._lease, 0
        if lease:
            await self._client.revoke(lease)

    def after_fork(self) -> None:
        """In a forked child: the lease is the parent's."""
        self._lease = 0

    async def _is_entered(self) -> bool:
        entries = (await self._soon(self._client.at(self._key))).entries
        return any(entry.lease == self._lease and entry.value == self._value for entry in entries)

    async def _soon(self, question: Coroutine[Any, Any, T]) -> T:
        """Its answer, while there is time to ask once more. Raises TimeoutError."""
        async with asyncio.timeout(limit_within(self._ends - asyncio.get_running_loop().time())):
            return await question
